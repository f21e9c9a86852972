"""Noise of the dispersion loss's gradient at fixed weights, of 256 random tokens of 512, as published, and of a
sixteenth of the pairs, beside the noise of the batches. Item 4 of docs/study/README.md.

python docs/study/gradient_noise.py docs/study/study.toml runs/study -o docs/study/results

The weights are those that the runs "all pairs" of the experiment ``tokens`` end with; the batches are random windows of
the text they were trained on. Of a batch b, a_b is the gradient of the weighted loss over all pairs, s_bd its estimate
in draw d, and e_b the gradient of the cross-entropy, over all parameters, in Euclidean norm:

- noise: sqrt(mean_bd |s_bd - mean_d s_bd|^2), the bias excluded, with D - 1 in the denominator;
- square of the bias: mean_b |mean_d s_bd - a_b|^2 less what the noise contributes to it, an unbiased estimate, which
  may be negative where the bias is small;
- noise of batches: sqrt(sum_b |e_b - mean_b e_b|^2 / (B - 1)), and likewise of a_b and e_b + a_b.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dispersion_kernels import SampledPairs, SampledTokens, fused_dispersion_loss
from dispersion_kernels.gpt2 import load_weights
from dispersion_kernels.gpt2.build import load_tokens
from dispersion_kernels.gpt2.data import training_windows, windows_at
from dispersion_kernels.study.inference import mean_interval
from dispersion_kernels.study.plan import Identities, Run, read_plan
from dispersion_kernels.study.stats import table
from dispersion_kernels.study.table import write_whole

METHODS = {"256 tokens": SampledTokens(256), "1/16 of the pairs": SampledPairs(1 / 16)}
QUANTITIES = {
    "noise": "noise / norm of the gradient over all pairs",
    "squared_bias": "square of (bias / that norm)",
    "noise_of_batches": "noise / noise of the cross-entropy over batches",
    "increase": "increase of the step's noise",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="TOML file of the study")
    parser.add_argument("results", type=Path, help="folder of its runs")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of gradient-noise.json and .md")
    parser.add_argument("--batches", type=int, default=8, help="2 or more (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=4, help="of each batch, 2 or more (default: %(default)s)")
    options = parser.parse_args()
    if min(options.batches, options.draws) < 2:
        parser.error(f"a variance takes --batches and --draws of at least 2, got {options.batches} and {options.draws}")
    experiment = next((one for one in read_plan(options.plan) if one.name == "tokens"), None)
    if experiment is None:
        parser.error(f"{options.plan} has no experiment tokens, whose runs end with the weights; give the study's plan")
    identities = Identities()
    rows = []
    for run in experiment.runs:
        folder = next(options.results.glob(f"{identities.of(run)}-*"), None)
        if run.variant == "all pairs" and folder is not None and (folder / "finished.json").exists():
            rows += measure(run, folder, options.batches, options.draws)
            print(rows[-2:], flush=True)
    if not rows:
        raise SystemExit(f"{options.results} has no finished run of the experiment tokens with all pairs")
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "gradient-noise.json", json.dumps({"draws": options.draws, "rows": rows}, indent=1))
    write_whole(options.out / "gradient-noise.md", markdown(rows, options.batches, options.draws))


def measure(run: Run, folder: Path, batches: int, draws: int) -> list[dict[str, Any]]:
    """Rows of a run, one a method."""
    options = run.options
    model = load_weights(folder)
    data = load_tokens(options)
    parameters = list(model.parameters())
    torch.manual_seed(options.seed)
    text, dispersed, step = Spread(), Spread(), Spread()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
        return torch.cat([one.flatten() for one in found]).double()

    for number in range(batches):
        starts = training_windows(
            data.train, options.context, options.batch_size, seed=options.seed, step=options.steps + number
        )
        output = model(*windows_at(data.train, starts, options.context), True)
        loss = partial(fused_dispersion_loss, output.hidden)
        e, a = gradient(output.loss), gradient(options.dispersion_weight * loss())
        text.add(e)
        dispersed.add(a)
        step.add(e + a)
        for name, sampling in METHODS.items():
            spread = Spread()
            for _ in range(draws):
                spread.add(gradient(options.dispersion_weight * loss(sampling=sampling)))
            samples[name].append((spread.variance(), (spread.mean() - a).square().sum().item()))
    norm = math.sqrt(dispersed.mean_square())
    rows = []
    for name, found in samples.items():
        variance = sum(one for one, _ in found) / batches
        bias = sum(square - one / draws for one, square in found) / batches
        rows.append(
            {
                "method": name,
                "seed": run.seed,
                "noise": math.sqrt(variance) / norm,
                "squared_bias": bias / norm**2,
                "noise_of_batches": math.sqrt(variance / text.variance()),
                "increase": math.sqrt(1 + variance / step.variance()) - 1,
                "norm": norm,
                "norm_of_cross_entropy": math.sqrt(text.mean_square()),
                "batches_of_cross_entropy": math.sqrt(text.variance()),
                "batches_of_dispersion": math.sqrt(dispersed.variance()),
            }
        )
    return rows


class Spread:
    """Mean, mean square and variance of vectors, added one at a time: the variance is the trace of the covariance."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros((), dtype=torch.float64), 0.0

    def add(self, vector: Tensor) -> None:
        self.count, self.total = self.count + 1, self.total + vector
        self.squares += vector.square().sum().item()

    def mean(self) -> Tensor:
        return self.total / self.count

    def mean_square(self) -> float:
        return self.squares / self.count

    def variance(self) -> float:
        return (self.squares - self.count * self.mean().square().sum().item()) / (self.count - 1)


def markdown(rows: list[dict[str, Any]], batches: int, draws: int) -> str:
    seeds = len({row["seed"] for row in rows})
    lines = []
    for method in METHODS:
        cells = [method]
        for quantity in QUANTITIES:
            values = [row[quantity] for row in rows if row["method"] == method]
            cells.append(f"{sum(values) / len(values):.3g}")
            if len(values) > 1:
                low, high = mean_interval(values)
                cells[-1] += f" ({low:.3g} to {high:.3g})"
        lines.append(cells)
    caption = f"Mean over {seeds} runs, 95% interval; {batches} batches, {draws} draws each."
    return f"{table(', '.join(['method', *QUANTITIES.values()]), lines)}\n\n{caption}"


if __name__ == "__main__":
    main()
