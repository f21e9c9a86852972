"""`dispersion-gpt2`: trains GPT-2 with the dispersion loss, from scratch or from GPT-2's weights.

Reads from top to bottom: the command, one run and its steps, what a run is built from.
"""

import argparse
import contextlib
import importlib
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dispersion_kernels import fused_dispersion_loss

from ..condensation import condensation_by_layer, plot_condensation
from ..potentials import resolve_potential
from .data import TokenData, load_data, mixed_seed, training_windows, validation_windows, windows_at
from .model import GPT2, GPT2Config, load_weights, save_weights
from .options import DTYPES, SHAPE, parse_options
from .runtime import (
    Metrics,
    StopRequest,
    keep_freed_memory,
    mean_over_ranks,
    peak_memory,
    process_group,
    rank,
    read_checkpoint,
    replaced,
    say,
    world,
    write_json,
)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options = parse_options(argv)
        check_libraries(options)
        keep_freed_memory()
        with process_group(options), StopRequest() as stop:
            if options.compare:
                compare(options, stop)
            else:
                Run(options, options.out, options.dispersion_weight).train(stop)
    except KeyboardInterrupt:
        print("dispersion-gpt2: interrupted outside training, nothing to save", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        remedy = "take a smaller --batch-size and a larger --accumulate, or --checkpoint-activations"
        print(f"dispersion-gpt2: error: {str(error).splitlines()[0]}; {remedy}", file=sys.stderr)
        return 2
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"dispersion-gpt2: error: {error}", file=sys.stderr)
        return 2
    return 0


def compare(options: argparse.Namespace, stop: StopRequest) -> None:
    """Two runs, one after the other, that differ in the dispersion term alone; both in one picture and one table."""
    results = {}
    for name, weight in (("without", 0.0), ("with", options.dispersion_weight)):
        say(f"{name} the dispersion loss")
        result = Run(options, options.out / name, weight).train(stop)
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
    """A model, its optimiser and its data, trained in the folder `out` with this weight of the dispersion loss."""

    def __init__(self, options: argparse.Namespace, out: Path, weight: float) -> None:
        self.options, self.out, self.weight = options, out, weight
        self.device = pick_device(options)
        checkpoint = read_checkpoint(out / "checkpoint.pt") if (out / "checkpoint.pt").exists() else None
        self.data = load_tokens(options)
        torch.manual_seed(mixed_seed(options.seed))
        self.model = build_model(options, self.data, checkpoint).to(self.device)
        config = self.model.config
        self.context = options.context or config.context
        if self.context > config.context:
            raise ValueError(
                f"--context {self.context} is more than the weights' {config.context} positions; take fewer"
            )
        self.layers = dispersion_layers(options.dispersion_layers, config.layers)
        self.dispersion = partial(
            fused_dispersion_loss,
            potential=resolve_potential(options.potential, tau=options.tau),
            max_tokens=options.dispersion_tokens,
            pairs=options.pairs,
            control_variate=options.control_variate,
            rank=options.control_variate_rank,
            impl=options.impl,
        )
        # What it does not take should fail before the work.
        self.dispersion(torch.randn(1, 2, config.width, device=self.device))
        self.windows = validation_windows(self.data.validation, self.context, options.validation_windows)
        self.optimizer = build_optimizer(self.model, options, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.dtype == "float16")
        self.autocast = partial(
            torch.autocast, self.device.type, DTYPES[options.dtype], enabled=options.dtype != "float32"
        )
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.step_tokens = options.batch_size * options.accumulate * world() * self.context
        self.step, self.seconds = 0, 0.0
        self.before: list[float] = []
        if checkpoint is not None:
            self.restore(checkpoint)
        forward: nn.Module = torch.compile(self.model) if options.compile else self.model  # type: ignore[assignment]
        if world() > 1:
            forward = DistributedDataParallel(forward, device_ids=[self.device] if self.device.type == "cuda" else None)
        self.forward = forward

    def train(self, stop: StopRequest) -> dict[str, Any] | None:
        """Trains to the last step and returns the results, or saves, says how to go on, and returns None."""
        from tqdm import tqdm

        options = self.options
        metrics = Metrics(self.out / "metrics.jsonl", self.step) if rank() == 0 else None
        validation = self.validate()
        self.before = self.before or validation[1]
        say(
            f"{self.parameters:,} parameters, {len(self.data.train):,} training tokens, "
            f"{self.step_tokens:,} a step, {self.device}, {options.dtype}"
        )
        stop.listen()
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
                    if not math.isfinite(measured["cross_entropy"] + measured["dispersion"]):
                        raise ValueError(
                            f"the loss is no longer finite at step {self.step} with --lr {options.lr:g} and --dtype "
                            f"{options.dtype}; resume the last checkpoint, or start again, with a smaller --lr"
                        )
                    steps_per_second = (self.step - logged[0]) / (self.seconds - logged[1])
                    measured["tokens_per_second"] = self.step_tokens * steps_per_second
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
                    say(f"stopped after step {self.step} of {options.steps} and saved; to go on:")
                    say(f"  dispersion-gpt2 --resume --out {shlex.quote(str(options.out))}")
                    return None
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
        cosine = torch.zeros(self.model.config.layers, device=self.device)
        for micro in range(options.accumulate):
            first = (micro * world() + rank()) * size
            tokens, targets = windows_at(self.data.train, starts[first : first + size], self.context)
            # Dropout and token sampling, like the windows, depend on the step alone: nothing to save, exact on resume.
            torch.manual_seed(mixed_seed(options.seed, self.step, micro, rank()))
            wants_hidden = self.weight != 0 or measure
            with self.gradients_synchronised(micro + 1 == options.accumulate):
                with self.autocast():
                    output = self.forward(tokens.to(self.device), targets.to(self.device), wants_hidden)
                    loss = output.loss
                    if self.weight != 0:
                        loss = loss + self.weight * self.dispersion(self.dispersed(output.hidden))
                    if measure:
                        with torch.no_grad():  # the call above has the mean alone
                            of_layers = [self.dispersion(z) for z in self.dispersed(output.hidden)]
                            dispersion += torch.stack(of_layers) / options.accumulate
                cross_entropy += output.loss.detach() / options.accumulate
                if measure:
                    cosine += condensation_by_layer([z.detach() for z in output.hidden]) / options.accumulate
                # Hidden states are freed as the backward pass goes on, where nothing else holds them.
                del output
                self.scaler.scale(loss / options.accumulate).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if not measure:
            return {}
        measured = torch.cat([cross_entropy[None], dispersion, cosine])
        values = mean_over_ranks(measured).tolist()
        split = 1 + len(self.layers)
        return {
            "cross_entropy": values[0],
            "dispersion": sum(values[1:split]) / len(self.layers),
            "dispersion_per_layer": dict(zip(map(str, self.layers), values[1:split], strict=True)),
            "cosine": values[split:],
            "lr": lr,
            "grad_norm": norm.item() if norm.isfinite() else None,  # a step the GradScaler skipped
        }

    def dispersed(self, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The hidden states that the loss takes. On a GPU in the dtype of autocast, under which the residual stream is
        fp32: a matrix product of its blocks would round them likewise, and the loss's products in fp32 would cost a
        quarter of a step."""
        narrow = self.device.type == "cuda" and self.options.dtype != "float32"
        chosen = [hidden[layer - 1] for layer in self.layers]
        return [z.to(DTYPES[self.options.dtype]) for z in chosen] if narrow else chosen

    def gradients_synchronised(self, now: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.forward, DistributedDataParallel) and not now:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    @torch.no_grad()
    def validate(self) -> tuple[float, list[float]]:
        """Cross-entropy and mean pairwise cosine of every layer, over the same windows every time."""
        self.model.eval()
        size = self.options.batch_size
        starts = self.windows[rank() :: world()]
        sums = torch.zeros(2 + self.model.config.layers, dtype=torch.float64)
        for first in range(0, len(starts), size):
            tokens, targets = windows_at(self.data.validation, starts[first : first + size], self.context)
            with self.autocast():
                output = self.model(tokens.to(self.device), targets.to(self.device), True)
            values = torch.cat([torch.ones(1), output.loss[None].cpu(), condensation_by_layer(output.hidden).cpu()])
            sums += len(tokens) * values.double()
        if world() > 1:
            total = sums.to(self.device)
            dist.all_reduce(total)
            sums = total.cpu()
        self.model.train()
        loss, *cosine = (sums[1:] / sums[0]).tolist()
        return loss, cosine

    def save(self) -> None:
        if rank() != 0:
            return
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "before": self.before,
            "config": asdict(self.model.config),
            "data": self.data.key,
            # The seed is among them; every random draw is a function of it and of the step.
            "options": {name: value for name, value in vars(self.options).items() if name not in ("out", "resume")},
        }
        with replaced(self.out / "checkpoint.pt") as file:
            torch.save(state, file)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["data"] != self.data.key:
            raise ValueError(
                f"--resume: the text or its tokeniser is not what {self.out} was trained on; give the same --data, or "
                "start another run with another --out"
            )
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.step, self.seconds, self.before = checkpoint["step"], checkpoint["seconds"], checkpoint["before"]

    def finish(self, loss: float, cosine: list[float]) -> dict[str, Any]:
        tokens = self.step * self.step_tokens
        results = {
            "validation_loss": loss,
            "cosine_before": self.before,
            "cosine_after": cosine,
            "cosine_last": cosine[-1],
            "cosine_mean": sum(cosine) / len(cosine),
            "tokens": tokens,
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds,
            "peak_memory_bytes": peak_memory(self.device),
            "parameters": self.parameters,
        }
        if rank() == 0:
            write_json(self.out / "results.json", results)
            save_weights(self.model, self.out)
            curves = {"before training": self.before, "after training": cosine}
            plot_condensation(curves, self.out / "condensation.png", dashed=["before training"])
            say(
                f"validation loss {loss:.4f}; mean pairwise cosine of the last layer {cosine[-1]:.3f}, before training "
                f"{self.before[-1]:.3f}\n{self.out} holds condensation.png, metrics.jsonl, results.json, checkpoint.pt "
                "and the weights in Hugging Face's naming, model.safetensors and config.json\n"
            )
        return results


def check_libraries(options: argparse.Namespace) -> None:
    """What is imported late is missed early: not after the training it was to save or to draw."""
    for name in ("tqdm", "safetensors", "matplotlib", *(["tokenizers"] if options.tokenizer != "bytes" else [])):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'{name} is missing: pip install "dispersion-kernels[gpt2]"', name=name
            ) from error


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < options.warmup:
        share: float = (step + 1) / options.warmup
    else:
        done = (step - options.warmup) / max(options.steps - options.warmup, 1)
        share = 0.55 + 0.45 * math.cos(math.pi * done)
    return float(options.lr) * share


def dispersion_layers(choice: str, layers: int) -> list[int]:
    """The layers whose hidden states are dispersed, counted from 1; the embedding is not one of them."""
    half = max(layers // 2, 1)
    named = {
        "all": range(1, layers + 1),
        "last": range(layers, layers + 1),
        "early_half": range(1, half + 1),
        "late_half": range(layers - half + 1, layers + 1),
    }
    if choice in named:
        return list(named[choice])
    try:
        chosen = sorted({int(number) for number in choice.split(",")})
    except ValueError:
        chosen = []
    if not chosen or not 1 <= chosen[0] <= chosen[-1] <= layers:
        raise ValueError(
            f"--dispersion-layers must be all, last, early_half, late_half or numbers from 1 to {layers} with commas "
            f"between, got {choice!r}"
        )
    return chosen


def pick_device(options: argparse.Namespace) -> torch.device:
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and world() > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA raises the latter
        raise ValueError(f"--device {name}: PyTorch cannot use it here ({str(error).splitlines()[0]})") from error
    if options.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("--dtype bfloat16: this GPU does not have it; use float16 or float32")
    return device


def load_tokens(options: argparse.Namespace) -> TokenData:
    load = partial(
        load_data, options.data, tokenizer=options.tokenizer, vocab_size=options.vocab_size, cache=options.cache
    )
    # One process a machine tokenises, the others find its files.
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    data = load(progress=rank() == 0) if first else None
    if world() > 1:
        dist.barrier()
    return data or load()


def build_model(options: argparse.Namespace, data: TokenData, checkpoint: dict[str, Any] | None) -> GPT2:
    if checkpoint is not None:
        return GPT2(GPT2Config(**checkpoint["config"]), checkpoint_activations=options.checkpoint_activations)
    if options.init_from is None:
        shape = {name: getattr(options, name) for name in SHAPE}
        config = GPT2Config(**shape, vocab=data.vocab, dropout=options.dropout)
        return GPT2(config, checkpoint_activations=options.checkpoint_activations)
    try:
        model = load_weights(
            options.init_from,
            dropout=options.dropout,
            heads=options.heads,
            checkpoint_activations=options.checkpoint_activations,
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"--init-from: {error}") from error
    if data.vocab > model.config.vocab:
        raise ValueError(
            f"--tokenizer {options.tokenizer} has {data.vocab} tokens, the weights in {options.init_from} know "
            f"{model.config.vocab}; use the tokeniser they were trained with"
        )
    return model


def build_optimizer(model: GPT2, options: argparse.Namespace, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda", "mps"))


if __name__ == "__main__":
    sys.exit(main())
