"""``python -m benchmarks --suite loss|memory [--out results.csv]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import loss, memory
from benchmarks.machine import write_csv

SUITES = {"loss": loss.run, "memory": memory.run}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--suite", choices=SUITES, default="loss", help="loss: time and accuracy; memory: peak against L"
    )
    parser.add_argument("--quick", action="store_true", help="few and short runs: to try it out, not for figures")
    parser.add_argument("--out", type=Path, help="a CSV file for the rows, with the machine, versions and commit")
    args = parser.parse_args()
    rows = SUITES[args.suite](args.quick)
    if args.out is not None:
        write_csv(args.out, rows)
        print(f"\nrows: {args.out}")


if __name__ == "__main__":
    main()
