"""Cost of the loss in training: tokens per second and peak memory of the GPT-2 trainer without the loss, with the naive
loss on 256 tokens and on all tokens, and with ours on all tokens, on a fraction of the pairs, and on no pairs.

The runs share one process and take steps in turn, in a new random order each turn, so that a machine that slows down
slows all of them; each step is compared with the step without the loss in the same turn. Each turn the runs pass their
models on, because the place of a model in memory makes its steps 1 or 2% faster or slower, however often they are
timed. Before that, the naive loss on all tokens and ours must give the same cross-entropy, dispersion and gradient norm
in the first step.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import Module
from torch.optim import AdamW

from benchmarks.machine import describe, peak_memory, pick_device
from benchmarks.timing import interleaved, quartiles
from dispersion_kernels.gpt2.model import GPT2
from dispersion_kernels.gpt2.options import parse_options
from dispersion_kernels.gpt2.runtime import keep_freed_memory
from dispersion_kernels.gpt2.train import Run

# Options by device. Windows have 1,024 tokens on both: with nano's own 256, 256 random tokens would be all tokens.
RECIPE = {
    "cpu": ["--preset", "nano", "--context", "1024", "--batch-size", "2"],
    "cuda": [
        *["--preset", "gpt2", "--batch-size", "8", "--accumulate", "1", "--dtype", "bfloat16"],
        *["--tokenizer", "bpe", "--vocab-size", "50257"],
    ],
}
ROUNDS = 200
QUICK = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "512", "--tokenizer", "bytes"]
VARIANTS: dict[str, list[str]] = {
    "no loss": ["--dispersion-weight", "0"],
    "naive, 256 tokens": ["--impl", "reference", "--dispersion-tokens", "256"],
    "naive, all tokens": ["--impl", "reference"],
    "ours, all tokens": ["--impl", "auto"],
    "ours, 1/16 of the pairs": ["--pairs", "0.0625"],
    "ours, 1/64 of the pairs": ["--pairs", "0.015625"],
    "ours, no pairs": ["--pairs", "0"],
}


def run(quick: bool, options: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows of the suite. ``options``: options of the trainer, after those for this device."""
    device = pick_device()
    recipe = [*RECIPE[device.type], *(QUICK if quick else []), *(options or [])]
    print(f"machine: {describe()}")
    print(f"a step of dispersion-gpt2 {' '.join(recipe)}\n")
    keep_freed_memory()  # as the trainer does
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: _run(Path(folder, str(n)), [*recipe, *VARIANTS[name]]) for n, name in enumerate(VARIANTS)}
        _check({name: one.train_step(True) for name, one in runs.items()})
        for one in runs.values():
            if one.regularizer is not None:  # because each model gets the regularizers of all runs, one after another
                one.regularizer.remove()
        models = [(one.model, one.forward, one.optimizer) for one in runs.values()]
        steps = {
            name: partial(_step, one, itertools.cycle(models[n:] + models[:n]))
            for n, (name, one) in enumerate(runs.items())
        }
        for step in steps.values():
            step()  # creates the optimiser's state
        peaks = {name: peak_memory(step, device) for name, step in steps.items()}
        times = interleaved(steps, rounds=2 if quick else ROUNDS, seconds=0.0, device=device)
    print("| | tokens per second | of the time without | peak memory of a step, MiB |")
    print("|---" * 4 + "|")
    rows = []
    for name, values in times.items():
        one, (first, middle, third) = runs[name], quartiles(values)
        ratios = [value / without for value, without in zip(values, times["no loss"], strict=True)]
        below, ratio, above = quartiles(ratios)
        row: dict[str, Any] = {
            "variant": name,
            "recipe": " ".join(recipe),
            "parameters": one.parameters,
            "layers": len(one.layers),
            "context": one.context,
            "step_tokens": one.step_tokens,
            "ms": 1e3 * middle,
            "ms_q1": 1e3 * first,
            "ms_q3": 1e3 * third,
            "tokens_per_second": one.step_tokens / middle,
            "of_time_without": ratio,
            # Standard error of the median, for a normal distribution with the ratios' quartiles.
            "of_time_error": 1.2533 * (above - below) / 1.349 / len(ratios) ** 0.5,
            "peak_bytes": peaks[name],
            # Bytes of one layer's hidden states in fp32, the residual stream's dtype under autocast, too.
            "activation_bytes": 4 * one.options.batch_size * one.context * one.model.config.width,
        }
        rows.append(row)
        peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.1f}"
        print(f"| {name} | {row['tokens_per_second']:,.0f} | {_ratio(row)} | {peak} |", flush=True)
    return rows


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['of_time_without']:.3f} +- {row['of_time_error']:.3f}"


def _run(out: Path, arguments: list[str]) -> Run:
    # A number of steps so large that the learning rate stays at its value after the warm-up.
    options = parse_options([*arguments, "--steps", "1000000", "--warmup", "0", "--out", str(out)])
    return Run(options, out, options.dispersion_weight)


def _step(run: Run, models: Iterator[tuple[GPT2, Module, AdamW]]) -> None:
    run.model, run.forward, run.optimizer = next(models)
    run.regularizer = run.regularized()
    run.train_step(False)
    if run.regularizer is not None:
        run.regularizer.remove()
    run.step += 1


def _check(first_steps: dict[str, dict[str, Any]]) -> None:
    naive, ours = (first_steps[name] for name in ("naive, all tokens", "ours, all tokens"))
    for name in ("cross_entropy", "dispersion", "grad_norm"):
        if not abs(ours[name] - naive[name]) <= 1e-3 * abs(naive[name]):
            raise RuntimeError(
                f"the first step differs: {name} is {ours[name]} with ours, {naive[name]} with the naive"
            )
