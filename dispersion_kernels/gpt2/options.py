"""Options of ``dispersion-gpt2``, with the defaults of presets and of resumed runs."""

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from ..potentials import BUILT_IN
from ..sampling import ControlVariate, SampledPairs, SampledTokens, Sampling
from .checkpoint import checkpoints, damage_named, is_signed, read_checkpoint
from .model import INIT_STD, NORMS, PRESETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Training options of each preset by default; the learning rates of the published shapes are GPT-3's.
RECIPE = ("steps", "warmup", "batch_size", "accumulate", "lr", "dispersion_weight", "tokenizer")
RECIPES = {
    "nano": (500, 50, 8, 1, 3e-3, 0.5, "bpe"),
    "gpt2": (20_000, 500, 8, 8, 6e-4, 0.1, "gpt2"),
    "gpt2-medium": (20_000, 500, 8, 8, 3e-4, 0.1, "gpt2"),
    "gpt2-large": (20_000, 500, 4, 16, 2.5e-4, 0.1, "gpt2"),
    "gpt2-xl": (20_000, 500, 4, 16, 2e-4, 0.1, "gpt2"),
    "from weights": (2_000, 100, 8, 8, 5e-5, 0.1, "gpt2"),
}
# Options that name weights: a safetensors file in Hugging Face's naming, or its folder.
WEIGHTS = ("init_from", "teacher")
SHAPE = ("layers", "width", "heads", "mlp_width", "context", "norm")
# Options of a model that begins at random, which weights decide.
DECIDED_BY_WEIGHTS = ("preset", "layers", "width", "mlp_width", "norm", "init_std")
# Options that a resumed run cannot change, because the saved state would not fit or would change its meaning. The text
# is compared by the key of its tokens.
FIXED = ("preset", *SHAPE, "dropout", "init_std", "init_from", "tokenizer", "vocab_size", "seed", "compare", "teacher")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    return settle(parse_command(argv), argv)


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options on the command line with the run's folder chosen, so that it can be locked before anything is read."""
    given = build_parser().parse_args(argv)
    if given.resume and given.out is None:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    if given.resume and not checkpoints(given.out):
        raise FileNotFoundError(f"--resume: there is no checkpoint in {given.out}; start it without --resume")
    given.out = given.out or Path("runs", datetime.now().strftime("%Y-%m-%d-%H%M%S"))
    return given


def settle(given: argparse.Namespace, argv: Sequence[str] | None) -> argparse.Namespace:
    """Complete options: options not given are the preset's or, for ``--resume``, the saved run's."""
    if given.resume:
        return resumed(given, argv)
    if checkpoints(given.out):
        raise ValueError(f"--out {given.out} holds a run already: continue it with --resume, or choose another folder")
    return complete(given)


def resumed(given: argparse.Namespace, argv: Sequence[str] | None) -> argparse.Namespace:
    file = checkpoints(given.out)[-1]
    checkpoint = read_checkpoint(file, tensors=False)
    with damage_named(file):
        saved = complete(build_parser(SavedParser).parse_args(checkpoint["arguments"]))
    if saved.compare and file.parent == given.out:
        raise ValueError(f"--out {given.out} is half of a comparison; resume the whole by --out {given.out.parent}")
    if not is_signed(checkpoint):
        distrust(saved, given, file)
    options = build_parser().parse_args([*as_arguments(saved), *(sys.argv[1:] if argv is None else argv)])
    options.out = given.out
    complete(options)
    if given.accumulate is None:
        # A step keeps its number of windows under another --batch-size or number of ranks, where it can be divided.
        at_once = options.batch_size * int(os.environ.get("WORLD_SIZE", 1))
        options.accumulate = max(checkpoint["windows"] // at_once, 1)
    for name in FIXED:
        if getattr(options, name) != getattr(saved, name):
            raise ValueError(
                f"--{name.replace('_', '-')} was {getattr(saved, name)} when the run in {given.out} began, got "
                f"{getattr(options, name)}; leave it out, or start another run with another --out"
            )
    return options


def distrust(saved: argparse.Namespace, given: argparse.Namespace, file: Path) -> None:
    """Raises for paths in a checkpoint of another user or machine that the command line does not confirm."""
    saved.cache = None
    weights = {name: [getattr(saved, name)] for name in WEIGHTS if getattr(saved, name)}
    unconfirmed = {"data": saved.data, **weights}
    unconfirmed = {name: paths for name, paths in unconfirmed.items() if paths and not getattr(given, name)}
    if unconfirmed:
        named = " ".join(f"--{name.replace('_', '-')} {shlex.join(paths)}" for name, paths in unconfirmed.items())
        raise ValueError(
            f"--resume: {file} was not written by you on this machine, or the key that would tell is gone; paths in it "
            f"are used only if you give them, too: {named}"
        )


def as_arguments(options: argparse.Namespace) -> list[str]:
    """Command line that gives these options, with absolute paths."""
    arguments = []
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("out", "resume") or value is None or value is False or value == []:
            continue
        if value is True:
            arguments.append(flag)
        elif isinstance(value, list):
            arguments += [flag, *value]
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Fills options that were not given from the preset's shape and recipe."""
    defaults: dict[str, Any] = {}
    if options.init_from is None:
        options.preset = options.preset or "nano"
        preset = PRESETS[options.preset]
        defaults = {name: getattr(preset, name) for name in SHAPE}
        # The MLP's default width follows the given width.
        defaults["mlp_width"] = 4 * (options.width or preset.width)
        defaults["init_std"] = INIT_STD
    else:
        for name in DECIDED_BY_WEIGHTS:
            if getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} cannot be given with --init-from, whose weights decide it; leave it out")
    defaults.update(zip(RECIPE, RECIPES[options.preset or "from weights"], strict=True))
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.compare and options.dispersion_weight == 0:
        raise ValueError("--compare needs a --dispersion-weight other than 0: that of its second run")
    options.data = [text if text.startswith("hf:") else os.path.abspath(text) for text in options.data]
    for name in ("cache", *WEIGHTS):
        if getattr(options, name) is not None:
            setattr(options, name, os.path.abspath(getattr(options, name)))
    return options


def sampling_of(options: argparse.Namespace) -> Sampling | None:
    """Argument ``sampling`` of the loss; None for all pairs."""
    if options.pairs != "all" and options.dispersion_tokens is not None:
        raise ValueError(
            f"--pairs {options.pairs} and --dispersion-tokens {options.dispersion_tokens} are two ways of sampling; "
            "give --pairs alone, which has the smaller error for as many pairs"
        )
    if options.dispersion_tokens is not None:
        return SampledTokens(options.dispersion_tokens)
    return None if options.pairs == "all" else SampledPairs(options.pairs, options.control_variate)


class SavedParser(argparse.ArgumentParser):
    """Parser of a checkpoint's command line: without help and abbreviations, and with exceptions for errors."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def build_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser = kind(
        prog="dispersion-gpt2",
        description="Train GPT-2 with a dispersion loss on its hidden states. Without options: a nano GPT-2 on the "
        "source text of the Python it runs on. Several GPUs: torchrun -m dispersion_kernels.gpt2.train ...",
    )
    add = parser.add_argument_group("run").add_argument
    add("--out", type=folder, help="folder of the run (default: runs/ and the time)")
    add("--compare", action="store_true", help="train twice, without and with the dispersion loss, and draw both")
    add("--resume", action="store_true", help="continue the run in --out; the options not given are those it had")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of everything random (default: %(default)s)")
    add("--device", help="cpu, cuda, mps, ... (default: cuda if there is one, else cpu)")
    add("--dtype", choices=DTYPES, default="float32", help="of autocast; weights stay float32 (default: %(default)s)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--log-interval", type=at_least(1), default=10, metavar="STEPS", help="between metrics (default: %(default)s)")
    add(
        "--eval-interval",
        type=at_least(1),
        default=200,
        metavar="STEPS",
        help="between validations (default: %(default)s)",
    )
    add(
        "--save-interval",
        type=at_least(1),
        default=500,
        metavar="STEPS",
        help="between checkpoints (default: %(default)s)",
    )
    add("--validation-windows", type=at_least(1), default=128, metavar="N", help="validated on (default: %(default)s)")

    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        nargs="+",
        type=not_empty,
        default=[],
        metavar="TEXT",
        help="text files (.gz and .xz too), folders, /dev/stdin, hf:NAME[:CONFIG] (default: the source text of "
        "this Python)",
    )
    add(
        "--tokenizer",
        choices=("gpt2", "bpe", "bytes"),
        help="bpe is trained on the text (default: nano bpe, else gpt2)",
    )
    add("--vocab-size", type=at_least(257), default=1024, metavar="N", help="of --tokenizer bpe (default: %(default)s)")
    add("--cache", type=not_empty, metavar="DIR", help="of tokenised texts (default: in $XDG_CACHE_HOME or ~/.cache)")

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=PRESETS, help="shape and recipe (default: nano)")
    add("--layers", type=at_least(1), metavar="N")
    add("--width", type=at_least(1), metavar="N")
    add("--heads", type=at_least(1), metavar="N")
    add("--mlp-width", type=at_least(1), metavar="N", help="(default: 4 * width)")
    add("--context", type=at_least(2), metavar="N", help="tokens a window")
    add("--norm", choices=NORMS, help="(default: layernorm, GPT-2's)")
    add("--init-std", type=number(1e-6), metavar="X", help="standard deviation of the initial weights (default: 0.02)")
    add("--dropout", type=number(0, below=1), default=0.0, metavar="P")
    add(
        "--init-from",
        type=not_empty,
        metavar="PATH",
        help="GPT-2 weights to go on from: safetensors in Hugging Face's naming",
    )
    add(
        "--teacher",
        type=not_empty,
        metavar="PATH",
        help="distillation: GPT-2 weights, of the same tokeniser, whose predictions are learnt, too",
    )
    add(
        "--teacher-weight",
        type=fraction,
        default=0.5,
        metavar="X",
        help="share of the divergence from the teacher in the loss, the text's cross-entropy has the rest "
        "(default: %(default)s)",
    )
    add("--checkpoint-activations", action="store_true", help="less memory, a forward pass more")

    add = parser.add_argument_group("dispersion").add_argument
    add("--dispersion-weight", type=number(0), metavar="X", help="0: none (default: nano 0.5, else 0.1)")
    add("--potential", default="angular_spread", metavar="NAME", help=f"{', '.join(BUILT_IN)} (default: %(default)s)")
    add("--tau", type=float, metavar="X", help="temperature (default: the potential's)")
    add(
        "--dispersion-layers", default="all", metavar="WHICH", help="all, last, early_half, late_half, or 1,2,... (all)"
    )
    add("--dispersion-tokens", type=tokens_or_all, metavar="N", help="random tokens a sequence, or all (default: all)")
    add(
        "--pairs",
        type=fraction_or_all,
        default="all",
        metavar="X",
        help="fraction of the pairs of tokens to evaluate, or all (default: all)",
    )
    add(
        "--control-variate",
        choices=get_args(ControlVariate),
        default="low_rank",
        help="for the rest (default: %(default)s)",
    )
    add(
        "--impl",
        default="auto",
        metavar="NAME",
        help="backend of the loss: auto, triton, cuda, cpu, torch or reference (default: %(default)s)",
    )

    add = parser.add_argument_group("optimiser (defaults: docs/trainer.md)").add_argument
    add("--steps", type=at_least(1), metavar="N")
    add("--batch-size", type=at_least(1), metavar="N", help="windows at a time, on each rank")
    add("--accumulate", type=at_least(1), metavar="N", help="batches whose gradients are added up for one step")
    add("--lr", type=number(0), metavar="X", help="at its highest; warms up, then falls along a cosine to a tenth")
    add("--warmup", type=at_least(0), metavar="STEPS")
    add("--weight-decay", type=number(0), default=0.1, metavar="X", help="of matrices alone (default: %(default)s)")
    add("--clip", type=number(0), default=1.0, metavar="NORM", help="of the gradient; 0: none (default: %(default)s)")
    return parser


def not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("wanted the name of a file or folder, got ''")
    return text


def folder(text: str) -> Path:
    return Path(not_empty(text))


def at_least(low: int) -> Any:
    def convert(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"wanted a whole number of at least {low}, got {text!r}")
        return int(text)

    return convert


def number(low: float, below: float = math.inf) -> Any:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value < below:
            raise argparse.ArgumentTypeError(f"wanted a number from {low:g} to below {below:g}, got {text!r}")
        return value

    return convert


def fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a fraction from 0 to 1, got {text!r}")
    return value


def fraction_or_all(text: str) -> str | float:
    try:
        return text if text == "all" else fraction(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"wanted all, or a fraction of the pairs from 0 to 1, got {text!r}") from None


def tokens_or_all(text: str) -> int | None:
    return None if text == "all" else at_least(2)(text)
