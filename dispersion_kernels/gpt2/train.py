"""`dispersion-gpt2`: trains GPT-2 with the dispersion loss, from scratch or from GPT-2's weights.

Reads from top to bottom: the command, one run and its steps, what a run is built from, files, options.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dispersion_kernels import fused_dispersion_loss

from ..condensation import condensation_by_layer, plot_condensation
from .data import TokenData, load_data, mixed_seed, training_windows, validation_windows, windows_at
from .model import GPT2, PRESETS, GPT2Config, load_weights, save_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a preset is trained with unless told otherwise; the learning rates of the published shapes are GPT-3's.
RECIPES: dict[str, dict[str, Any]] = {
    "nano": dict(steps=600, warmup=50, batch_size=16, accumulate=1, lr=2e-3, tokenizer="bpe"),
    "gpt2": dict(steps=20_000, warmup=500, batch_size=8, accumulate=8, lr=6e-4, tokenizer="gpt2"),
    "gpt2-medium": dict(steps=20_000, warmup=500, batch_size=8, accumulate=8, lr=3e-4, tokenizer="gpt2"),
    "gpt2-large": dict(steps=20_000, warmup=500, batch_size=4, accumulate=16, lr=2.5e-4, tokenizer="gpt2"),
    "gpt2-xl": dict(steps=20_000, warmup=500, batch_size=4, accumulate=16, lr=2e-4, tokenizer="gpt2"),
    "weights": dict(steps=2_000, warmup=100, batch_size=8, accumulate=8, lr=5e-5, tokenizer="gpt2"),
}
SHAPE = ("layers", "width", "heads", "mlp_width", "context")


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = parse_options(argv)
        with process_group(options), StopRequest() as stop:
            if options.compare:
                compare(options, stop)
            else:
                Run(options, options.out).train(stop)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"dispersion-gpt2: error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(options: argparse.Namespace, stop: "StopRequest") -> None:
    """Two runs, one after the other, that differ in the dispersion term alone; both in one picture and one table."""
    results = {}
    for name, weight in (("without", 0.0), ("with", options.dispersion_weight)):
        say(f"{name} the dispersion loss")
        changed = argparse.Namespace(**{**vars(options), "dispersion_weight": weight})
        result = Run(changed, options.out / name).train(stop)
        if result is None:
            return
        results[name] = result
    if rank() != 0:
        return
    write_json(options.out / "results.json", results)
    curves = {
        "before training": results["with"]["cosine_before"],
        "trained without the dispersion loss": results["without"]["cosine_after"],
        f"trained with it (weight {options.dispersion_weight:g})": results["with"]["cosine_after"],
    }
    plot_condensation(curves, options.out / "condensation.png", dashed=["before training"])
    say(table(results))
    say(f"picture   {options.out / 'condensation.png'}\nresults   {options.out / 'results.json'}")


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = {
        "validation loss": "{validation_loss:.4f}",
        "mean cosine, last layer": "{cosine_last:.3f}",
        "mean cosine, all layers": "{cosine_mean:.3f}",
        "tokens per second": "{tokens_per_second:,.0f}",
        "training time": "{seconds:.0f} s",
    }
    lines = [f"{'':24}" + "".join(f"{name:>12}" for name in results)]
    for label, form in rows.items():
        lines.append(f"{label:24}" + "".join(f"{form.format(**result):>12}" for result in results.values()))
    return "\n".join(lines)


class Run:
    """A model, its optimiser and its data, trained in the folder `out`."""

    def __init__(self, options: argparse.Namespace, out: Path) -> None:
        self.options, self.out = options, out
        self.device = pick_device(options)
        checkpoint = load_checkpoint(options, out)
        self.data = load_tokens(options)
        torch.manual_seed(options.seed)
        self.model = build_model(options, self.data, checkpoint).to(self.device)
        config = self.model.config
        self.context = options.context or config.context
        if self.context > config.context:
            raise ValueError(f"--context {self.context} is more than the {config.context} positions of the weights")
        self.layers = dispersion_layers(options.dispersion_layers, config.layers)
        self.dispersion = partial(
            fused_dispersion_loss,
            potential=options.potential,
            tau=options.tau,
            max_tokens=options.dispersion_tokens,
            impl=options.impl,
        )
        self.dispersion(torch.randn(1, 2, 2, device=self.device))  # what it does not take should fail before the work
        self.windows = validation_windows(self.data.validation, self.context, options.validation_windows)
        self.optimizer = build_optimizer(self.model, options, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.dtype == "float16")
        self.autocast = partial(
            torch.autocast, self.device.type, DTYPES[options.dtype], enabled=options.dtype != "float32"
        )
        self.step, self.seconds = 0, 0.0
        self.before: list[float] = []
        if checkpoint is not None:
            self.restore(checkpoint)
        forward: nn.Module = torch.compile(self.model) if options.compile else self.model  # type: ignore[assignment]
        if world() > 1:
            forward = DistributedDataParallel(forward, device_ids=[self.device] if self.device.index is not None else None)
        self.forward = forward

    def train(self, stop: "StopRequest") -> dict[str, Any] | None:
        """Trains to the last step and returns the results, or saves, says how to go on, and returns None."""
        from tqdm import tqdm

        options = self.options
        metrics = Metrics(self.out / "metrics.jsonl", self.step) if rank() == 0 else None
        validation = self.validate() if self.step in (0, options.steps) else None
        if validation and self.step == 0:
            self.before = validation[1]
        say(
            f"{sum(p.numel() for p in self.model.parameters()):,} parameters, {len(self.data.train):,} training tokens, "
            f"{options.batch_size * options.accumulate * world() * self.context:,} a step, {self.device}, {options.dtype}"
        )
        bar = tqdm(total=options.steps, initial=self.step, unit="step", disable=rank() != 0 or None)
        with bar:
            logged = (self.step, self.seconds)
            while self.step < options.steps:
                started = time.perf_counter()
                last = self.step + 1 == options.steps
                validates = last or (self.step + 1) % options.eval_interval == 0
                logs = validates or (self.step + 1) % options.log_interval == 0
                measured = self.train_step(logs)
                self.step += 1
                bar.update()
                self.seconds += time.perf_counter() - started
                if logs:
                    tokens = (self.step - logged[0]) * options.batch_size * options.accumulate * world() * self.context
                    measured["tokens_per_second"] = tokens / (self.seconds - logged[1])
                    measured["peak_memory_bytes"] = peak_memory(self.device)
                    logged = (self.step, self.seconds)
                    bar.set_postfix(loss=f"{measured['cross_entropy']:.3f}", cosine=f"{measured['cosine'][-1]:.3f}")
                if validates:
                    validation = self.validate()
                    measured |= {"validation_loss": validation[0], "validation_cosine": validation[1]}
                    if rank() == 0:
                        bar.write(f"step {self.step}: validation loss {validation[0]:.4f}")
                if metrics and logs:
                    metrics.append(self.step, measured)
                stopped = not last and stop.agreed(self.device)
                if stopped or last or self.step % options.save_interval == 0:
                    self.save()
                if stopped:
                    bar.close()
                    say(f"stopped after step {self.step} of {options.steps} and saved; to go on:\n  {resume_command(options)}")
                    return None
        assert validation is not None
        return self.finish(*validation)

    def train_step(self, measure: bool) -> dict[str, Any]:
        """One step of the optimiser; with `measure`, what metrics.jsonl says of it, averaged over the ranks."""
        options = self.options
        lr = learning_rate(self.step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        size = options.batch_size
        count = size * options.accumulate * world()
        starts = training_windows(self.data.train, self.context, count, seed=options.seed, step=self.step)
        cross_entropy = torch.zeros((), device=self.device)
        dispersion = torch.zeros(len(self.layers), device=self.device)
        for micro in range(options.accumulate):
            first = (micro * world() + rank()) * size
            tokens, targets = windows_at(self.data.train, starts[first : first + size], self.context)
            # Dropout and token sampling, like the windows, depend on the step alone: nothing to save, exact on resume.
            torch.manual_seed(mixed_seed(options.seed, self.step, micro, rank()))
            wants_hidden = bool(options.dispersion_weight) or measure
            with self.gradients_synchronised(micro + 1 == options.accumulate), self.autocast():
                output = self.forward(tokens.to(self.device), targets.to(self.device), wants_hidden)
                loss = output.loss
                if wants_hidden:
                    with torch.set_grad_enabled(bool(options.dispersion_weight)):
                        terms = torch.stack([self.dispersion(output.hidden[layer - 1]) for layer in self.layers])
                    loss = loss + options.dispersion_weight * terms.mean()
                    dispersion += terms.detach() / options.accumulate
                self.scaler.scale(loss / options.accumulate).backward()
            cross_entropy += output.loss.detach() / options.accumulate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if not measure:
            return {}
        measured = torch.cat([cross_entropy[None], dispersion, condensation_by_layer(output.hidden)])
        values = mean_over_ranks(measured).tolist()
        split = 1 + len(self.layers)
        return {
            "cross_entropy": values[0],
            "dispersion": sum(values[1:split]) / len(self.layers),
            "dispersion_per_layer": dict(zip(map(str, self.layers), values[1:split], strict=True)),
            "cosine": values[split:],
            "lr": lr,
            "grad_norm": norm.item(),
        }
