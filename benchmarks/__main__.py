"""``python -m benchmarks --suite NAME [--quick] [--out results.csv]``.

On a CUDA device where there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import accuracy, condensation, convergence, loss, memory, regularizer, sampling, scale, train
from benchmarks.machine import write_csv
from kernel_audit import static_report

SUITES: dict[str, Callable[[bool], list[dict[str, Any]]]] = {
    "loss": loss.run,
    "memory": memory.run,
    "train": train.run,
    "regularizer": regularizer.run,
    "accuracy": accuracy.run,
    "scale": scale.run,
    "sampling": sampling.run,
    "convergence": convergence.run,
    "condensation": condensation.run,
}
WHAT = (
    "loss: time, memory and error against the naive version and its peers; memory: peak and time against L; train: "
    "the cost of a training step; regularizer: that of each way to add the loss to a model; accuracy: errors by dtype "
    "and condensation; static: the compiled GPU kernels; scale: one very long sequence under a memory ceiling; "
    "sampling: the gradient's error against time, of a share of the pairs; convergence: where training with it ends; "
    "condensation: the measurement against all matrices of cosines"
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", choices=(*SUITES, "static"), default="loss", help=WHAT)
    parser.add_argument("--quick", action="store_true", help="few and short runs: to try it out, not for figures")
    parser.add_argument("--out", type=Path, help="a CSV file for the rows, with the machine, versions and commit")
    parser.add_argument("--potential", nargs="+", help="of the accuracy suite (default: angular_spread)")
    parser.add_argument(
        "--recipe", type=shlex.split, help="of the train suite: more options of dispersion-gpt2, all in one argument"
    )
    args = parser.parse_args(arguments)
    if args.potential and args.suite != "accuracy":
        parser.error(f"--potential is for --suite accuracy; {args.suite} has angular_spread alone")
    if args.recipe and args.suite != "train":
        parser.error(f"--recipe is for --suite train; {args.suite} trains nothing that could have another")
    if args.suite == "static":
        out = [] if args.out is None else ["--out", str(args.out)]
        static_report.main([*(["--arch", "sm_90"] if args.quick else []), *out])
        return
    if args.potential:
        rows = accuracy.run(args.quick, tuple(args.potential))
    elif args.recipe:
        rows = train.run(args.quick, args.recipe)
    else:
        rows = SUITES[args.suite](args.quick)
    if args.out is not None:
        write_csv(args.out, rows)
        print(f"\nrows: {args.out}")


if __name__ == "__main__":
    main()
