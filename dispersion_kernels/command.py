"""Command ``dispersion``: measure condensation in models, draw the measurements, run and compare trainings, and report
the installation.

The trainer is a command of its own, ``dispersion-gpt2``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .condensation import (
    Condensation,
    Record,
    load_model,
    measure_condensation,
    plot_condensation,
    plot_heat_map,
    plot_training,
    read_records,
)
from .condensation.result import aligned
from .env_report import report
from .gpt2.build import pick_device
from .gpt2.files import named_failure
from .gpt2.options import DTYPES, at_least, folder, not_empty
from .gpt2.runtime import exit_status, say
from .gpt2.text import Document, find_documents, named_by
from .study import stats, sweep

FORMATS = ("png", "svg", "pdf")
KINDS: dict[str, Any] = {"heat-map": plot_heat_map, "curves": plot_condensation}
"""Pictures of measurements, by name."""
CHARACTERS = 8
"""Length of a passage in characters for each token of --max-length, with room for long tokens."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. The exit status is 0 when all is done, 1 where a run of a sweep failed, 2 after an error, and
    130 after a Ctrl-C."""
    options = build_parser().parse_args(argv)
    return exit_status(
        "dispersion",
        partial(options.run, options),
        interrupted="interrupted; what was written before is whole",
        memory="take a smaller --batch-size or --max-length",
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dispersion",
        description="Measure condensation in models, draw it, run and compare trainings, report the installation.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    measure = commands.add_parser(
        "measure",
        help="cosines of all pairs of tokens, layer by layer, in models",
        description="Measure the cosines of all pairs of tokens, layer by layer. Writes NAME.json for each model, "
        "heat_map.png and curves.png. A model that cannot be measured is reported, and the others are measured.",
    )
    measure.set_defaults(run=run_measure)
    add = measure.add_argument
    add(
        "models",
        nargs="+",
        type=not_empty,
        metavar="MODEL",
        help="folder or hub name of a transformers model, GGUF file, or run or checkpoint of dispersion-gpt2",
    )
    add("-o", "--out", type=folder, default=Path("condensation"), metavar="DIR", help="(default: %(default)s/)")
    add(
        "--text",
        nargs="+",
        type=not_empty,
        default=[],
        metavar="FILE",
        help="text files (.gz and .xz, too), folders, /dev/stdin or hf:NAME, as dispersion-gpt2 --data; a line of one "
        "NUL character separates documents (default: the source text of Python's library)",
    )
    add("--texts", type=at_least(1), default=100, metavar="N", help="passages measured (default: %(default)s)")
    add("--max-length", type=at_least(2), default=512, metavar="TOKENS", help="of a passage (default: %(default)s)")
    add("--initialised", action="store_true", help="also a random initialisation of each model's configuration")
    add("--published", action="store_true", help="also the published procedure, whose L x L matrices are averaged")
    add("--layers", type=layers, default="all", metavar="WHICH", help="all, last, late_half, ..., or 0,1,2 (all)")
    add("--stack", metavar="NAME", help="of blocks, where a model has several, as decoder")
    add("--final-norm", action="store_true", help="also the last hidden state behind the final norm")
    add("--tokenizer", type=not_empty, metavar="FOLDER", help="or tokenizer.json, for models that have none")
    add("--batch-size", type=at_least(1), default=8, metavar="N", help="passages at a time (default: %(default)s)")
    add("--device", metavar="NAME", help="cpu, cuda, ... (default: cuda if there is one, else cpu)")
    add("--dtype", choices=DTYPES, help="of the weights (default: that they have)")
    add("--format", choices=FORMATS, default="png", help="of the pictures (default: %(default)s)")

    plot = commands.add_parser(
        "plot",
        help="pictures of measurements",
        description="Draw files of `dispersion measure`, or one file of condensation over training: a metrics.jsonl of "
        "dispersion-gpt2, or the records of a CondensationMonitor.",
    )
    plot.set_defaults(run=run_plot)
    add = plot.add_argument
    add("files", nargs="+", type=folder, metavar="FILE")
    add("-o", "--out", type=folder, required=True, metavar="PICTURE", help="as .png, .svg or .pdf")
    add("--kind", choices=(*KINDS, "training"), help="(default: heat-map of measurements, training of records)")
    add("--tokens", choices=("all", "content"), default="all", help="content: without special ones (default: all)")
    add("--title", help="above the picture")

    sweep.register(commands)
    stats.register(commands)

    env = commands.add_parser("env", help="machine and installation, for bug reports")
    env.set_defaults(run=run_env)
    return parser


def layers(text: str) -> str | list[int]:
    if text.isidentifier():
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted all, last, early_half, late_half or 0,1,2, got {text!r}") from None


def run_measure(options: argparse.Namespace) -> int:
    device = pick_device(options)
    with named_by("--text"):
        texts = passages(find_documents(options.text), options.texts, CHARACTERS * options.max_length)
    if not texts:
        raise ValueError(f"--text {' '.join(options.text)}: every text in it is empty; give files that hold text")
    with named_failure(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    measured: list[Condensation] = []
    used: set[str] = set()
    failed = False
    for name in options.models:
        try:
            model, tokenizer = load_model(name)
            tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else tokenizer
            model = model.to(device, DTYPES[options.dtype] if options.dtype else None)
            for initialised in (False, True) if options.initialised else (False,):
                result = measure(options, name, model, tokenizer, texts, initialised)
                file = options.out / f"{file_stem(result, used)}.json"
                result.to_json(file)
                measured.append(result)
                say(f"{result.summary()}\nwritten {file}\n")
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            said = " ".join(str(error).splitlines())
            print("dispersion: error:", said if name in said else f"{name}: {said}", file=sys.stderr)
            failed = True
    if measured:
        for kind in ("heat-map", "curves"):
            picture = options.out / f"{kind.replace('-', '_')}.{options.format}"
            KINDS[kind](measured, picture)
            say(f"picture {picture}")
        say(f"\n{table(measured)}")
    return 2 if failed else 0


def measure(
    options: argparse.Namespace, name: str, model: nn.Module, tokenizer: Any, texts: list[str], initialised: bool
) -> Condensation:
    return measure_condensation(
        model,
        texts,
        tokenizer,
        layers=options.layers,
        stack=options.stack,
        final_norm=options.final_norm,
        max_length=options.max_length,
        batch_size=options.batch_size,
        published=options.published,
        initialised=initialised,
        name=name,
    )


def load_tokenizer(name: str) -> Any:
    """Tokenizer of a folder, a name on the hub, or a file tokenizer.json."""
    try:
        if Path(name).is_file():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(name)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(name)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # tokenizers and transformers raise many kinds
        raise ValueError(f"--tokenizer {name} cannot be loaded ({type(error).__name__}: {error})") from error


def passages(documents: Sequence[Document], count: int, size: int) -> list[str]:
    """At most ``count`` passages, evenly spread over the documents.

    Each document is cut into pieces of ``size`` characters, at white space where there is some, the last one shorter.
    Of all pieces in order, every n-th is taken, from the first.
    """
    piece = re.compile(rf"\S[\s\S]{{0,{size - 1}}}(?!\S)|\S[\s\S]{{0,{size - 1}}}")
    pieces = [found.rstrip() for document in documents for found in piece.findall(document.read())]
    count = min(count, len(pieces))
    return [pieces[number * len(pieces) // count] for number in range(count)]


def file_stem(measured: Condensation, used: set[str]) -> str:
    """Name for the file of a measurement, from that of the model, with a number where ``used`` has it already."""
    path = Path(measured.model)
    name = path.absolute().parent.name if path.name == "checkpoint.pt" else path.name
    stem = re.sub(r"[^\w.-]+", "-", name.removesuffix(".gguf").removesuffix(".safetensors")).strip(".") or "model"
    stem = f"{stem}-initialised" if measured.initialised else stem
    chosen, number = stem, 1
    while chosen in used:
        number += 1
        chosen = f"{stem}-{number}"
    used.add(chosen)
    return chosen


def table(measured: Sequence[Condensation]) -> str:
    """Table of the mean cosines of the first, the last and all blocks, and of the trend, with a row for each model."""
    rows = [["", "texts", "first block", "last block", "mean of blocks", "Spearman with depth"]]
    for one in measured:
        means = [layer.all_tokens.mean for layer in one.layers if layer.name.startswith("block ")] or [math.nan]
        figures = [f"{mean:.3f}" for mean in (means[0], means[-1], sum(means) / len(means))]
        low, high = one.trend.spearman_interval
        name = f"{one.model}, random initialisation" if one.initialised else one.model
        rows.append([name, str(one.texts), *figures, f"{one.trend.spearman:.2f} ({low:.2f} to {high:.2f})"])
    return "\n".join(aligned(rows))


def run_plot(options: argparse.Namespace) -> int:
    read = [read_file(file) for file in options.files]
    records = [one for one in read if not isinstance(one, Condensation)]
    kind = options.kind or ("training" if records else "heat-map")
    if records and (kind != "training" or len(read) > 1):
        raise ValueError(
            f"{options.files[0]}: condensation over training is drawn by --kind training, of one file; got --kind "
            f"{kind} and {len(read)} files"
        )
    if kind == "training" and not records:
        raise ValueError(
            f"--kind training takes a metrics.jsonl or the records of a CondensationMonitor, and {options.files[0]} is "
            "a measurement; take --kind heat-map or curves"
        )
    more = {"title": options.title} if options.title is not None else {}
    if records:
        plot_training(records[0], options.out, **more)
    else:
        KINDS[kind](read, options.out, tokens=options.tokens, **more)
    say(f"picture {options.out}")
    return 0


def read_file(path: Path) -> Condensation | list[Record]:
    """Measurement, or records of condensation over training: those have the ending .jsonl, or the key "records"."""
    if path.suffix != ".jsonl":
        text = path.read_text("utf-8", errors="replace")
        try:
            values = json.loads(text)
        except ValueError:
            values = None
        if not (isinstance(values, dict) and "records" in values):
            return Condensation.from_json(path)
    return read_records(path)


def run_env(options: argparse.Namespace) -> int:
    say(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
