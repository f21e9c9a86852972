"""The options of `dispersion-gpt2`, and what a preset makes of those not given."""

import argparse
import math
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ..control_variates import CONTROL_VARIATES, RANK, RANKS
from .model import PRESETS
from .runtime import checkpoints, read_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a preset is trained with unless told otherwise; the learning rates of the published shapes are GPT-3's.
RECIPE = ("steps", "warmup", "batch_size", "accumulate", "lr", "dispersion_weight", "tokenizer")
RECIPES = {
    "nano": (500, 50, 8, 1, 3e-3, 0.5, "bpe"),
    "gpt2": (20_000, 500, 8, 8, 6e-4, 0.1, "gpt2"),
    "gpt2-medium": (20_000, 500, 8, 8, 3e-4, 0.1, "gpt2"),
    "gpt2-large": (20_000, 500, 4, 16, 2.5e-4, 0.1, "gpt2"),
    "gpt2-xl": (20_000, 500, 4, 16, 2e-4, 0.1, "gpt2"),
    "from weights": (2_000, 100, 8, 8, 5e-5, 0.1, "gpt2"),
}
SHAPE = ("layers", "width", "heads", "mlp_width", "context")
# What a run cannot change half-way: the saved state would not fit, or not mean the same.
FIXED = ("preset", *SHAPE, "dropout", "init_from", "data", "tokenizer", "vocab_size", "seed", "compare")


def parse_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, with a preset's or, to resume, the saved run's in place of those not given."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.resume:
        if options.out is None:
            raise ValueError("--resume needs --out, the folder of the run to continue")
        found = checkpoints(options.out)
        if not found:
            raise FileNotFoundError(f"--resume: there is no checkpoint in {options.out}; start it without --resume")
        saved = read_checkpoint(found[-1])["options"]
        if saved["compare"] and found[-1].parent == options.out:
            raise ValueError(
                f"--out {options.out} is half of a comparison; resume the whole by --out {options.out.parent}"
            )
        parser.set_defaults(**saved)
        options = complete(parser.parse_args(argv))
        for name in FIXED:
            given = getattr(options, name)
            if given != saved[name]:
                raise ValueError(
                    f"--{name.replace('_', '-')} was {saved[name]} when the run in {options.out} began, got {given}; "
                    "leave it out, or start another run with another --out"
                )
        return options
    if options.out is None:
        options.out = Path("runs", datetime.now().strftime("%Y-%m-%d-%H%M%S"))
    if checkpoints(options.out):
        raise ValueError(
            f"--out {options.out} holds a run already: continue it with --resume, or choose another folder"
        )
    return complete(options)


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Puts the preset's shape and recipe in place of what was not given."""
    defaults: dict[str, Any] = {}
    if options.init_from is None:
        options.preset = options.preset or "nano"
        preset = PRESETS[options.preset]
        # The MLP follows the width, which may be given.
        defaults = {**{name: getattr(preset, name) for name in SHAPE}, "mlp_width": 0}
    else:
        for name in ("preset", "layers", "width", "mlp_width"):
            if getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} cannot be given with --init-from, whose weights have a shape; leave it out")
        options.init_from = os.path.abspath(options.init_from)
    defaults.update(zip(RECIPE, RECIPES[options.preset or "from weights"], strict=True))
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.compare and options.dispersion_weight == 0:
        raise ValueError("--compare needs a --dispersion-weight other than 0: that of its second run")
    options.data = [text if text.startswith("hf:") else os.path.abspath(text) for text in options.data]
    return options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dispersion-gpt2",
        description="Train GPT-2 with a dispersion loss on its hidden states. Without options: a nano GPT-2 on the "
        "source text of the Python it runs on. Several GPUs: torchrun -m dispersion_kernels.gpt2.train ...",
    )
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="folder of the run (default: runs/ and the time)")
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
    add("--data", nargs="+", default=[], metavar="TEXT", help="text files (.gz and .xz too), folders, hf:NAME[:CONFIG]")
    add(
        "--tokenizer",
        choices=("gpt2", "bpe", "bytes"),
        help="bpe is trained on the text (default: nano bpe, else gpt2)",
    )
    add("--vocab-size", type=at_least(257), default=1024, metavar="N", help="of --tokenizer bpe (default: %(default)s)")
    add("--cache", metavar="DIR", help="of tokenised texts (default: in $XDG_CACHE_HOME or ~/.cache)")

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=PRESETS, help="shape and recipe (default: nano)")
    add("--layers", type=at_least(1), metavar="N")
    add("--width", type=at_least(1), metavar="N")
    add("--heads", type=at_least(1), metavar="N")
    add("--mlp-width", type=at_least(1), metavar="N", help="(default: 4 * width)")
    add("--context", type=at_least(2), metavar="N", help="tokens a window")
    add("--dropout", type=number(0, below=1), default=0.0, metavar="P")
    add("--init-from", metavar="PATH", help="GPT-2 weights to go on from: safetensors in Hugging Face's naming")
    add("--checkpoint-activations", action="store_true", help="less memory, a forward pass more")

    add = parser.add_argument_group("dispersion").add_argument
    add("--dispersion-weight", type=number(0), metavar="X", help="0: none (default: nano 0.5, else 0.1)")
    add("--potential", default="angular_spread", help="(default: %(default)s)")
    add("--tau", type=float, metavar="X", help="temperature (default: the potential's)")
    add(
        "--dispersion-layers", default="all", metavar="WHICH", help="all, last, early_half, late_half, or 1,2,... (all)"
    )
    add("--dispersion-tokens", type=tokens_or_all, metavar="N", help="random tokens a sequence, or all (default: all)")
    add(
        "--pairs",
        type=share_or_all,
        default="all",
        metavar="X",
        help="share of the pairs of tokens to visit, or all (default: all)",
    )
    add("--control-variate", choices=CONTROL_VARIATES, default="auto", help="for the rest (default: %(default)s)")
    add(
        "--control-variate-rank",
        type=at_least(RANKS[0]),
        default=RANK,
        metavar="N",
        help="directions of low_rank; the width or more: all (default: %(default)s)",
    )
    add("--impl", default="auto", help="backend of the loss (default: %(default)s)")

    add = parser.add_argument_group("optimiser (defaults: the preset's)").add_argument
    add("--steps", type=at_least(1), metavar="N")
    add("--batch-size", type=at_least(1), metavar="N", help="windows at a time, on each rank")
    add("--accumulate", type=at_least(1), metavar="N", help="batches whose gradients are added up for one step")
    add("--lr", type=number(0), metavar="X", help="at its highest; warms up, then falls along a cosine to a tenth")
    add("--warmup", type=at_least(0), metavar="STEPS")
    add("--weight-decay", type=number(0), default=0.1, metavar="X", help="of matrices alone (default: %(default)s)")
    add("--clip", type=number(0), default=1.0, metavar="NORM", help="of the gradient; 0: none (default: %(default)s)")
    return parser


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


def share_or_all(text: str) -> str | float:
    try:
        share = math.nan if text == "all" else float(text)
    except ValueError:
        share = math.nan
    if text != "all" and not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"wanted all, or a share of the pairs from 0 to 1, got {text!r}")
    return text if text == "all" else share


def tokens_or_all(text: str) -> int | None:
    return None if text == "all" else at_least(2)(text)
