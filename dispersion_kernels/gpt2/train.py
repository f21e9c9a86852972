"""Command ``dispersion-gpt2``, which trains GPT-2 with the dispersion loss, from scratch or from GPT-2's weights.

The order is that of calls: the command, a run, its steps. build.py constructs the parts of a run.
"""

import argparse
import contextlib
import importlib
import math
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

from dispersion_kernels import DispersionRegularizer, fused_dispersion_loss

from ..condensation import condensation_by_layer, plot_condensation, plot_training
from ..condensation.records import block_record, read_records
from ..potentials import resolve_potential
from .build import (
    build_model,
    build_optimizer,
    dispersion_layers,
    learning_rate,
    load_teacher,
    load_tokens,
    pick_device,
)
from .checkpoint import damage_named, read_checkpoint, restore_optimizer, write_checkpoint
from .data import mixed_seed, training_windows, validation_windows, windows_at
from .files import Metrics, locked, write_json
from .model import save_weights
from .options import DTYPES, as_arguments, parse_command, sampling_of, settle
from .runtime import (
    StopRequest,
    exit_status,
    keep_freed_memory,
    mean_over_ranks,
    out_of_memory,
    peak_memory,
    process_group,
    rank,
    say,
    world,
)
from .tokenizer import save_tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. The exit status is 0 after complete training, 128 + N after signal N, and 2 after an error."""
    return exit_status(
        "dispersion-gpt2",
        partial(command, argv),
        interrupted="interrupted before training, nothing is lost",
        memory="take a smaller --batch-size and a larger --accumulate, or --checkpoint-activations",
    )


def command(argv: Sequence[str] | None) -> int:
    given = parse_command(argv)
    with locked(given.out):
        options = settle(given, argv)
        check_libraries(options)
        keep_freed_memory()
        with process_group(options), StopRequest() as stop:
            if options.compare:
                done = compare(options, stop)
            else:
                done = Run(options, options.out, options.dispersion_weight).train(stop) is not None
    return 0 if done else 128 + stop.number


def check_libraries(options: argparse.Namespace) -> None:
    """Raises for missing libraries before the training; they are imported only to tokenise, save or draw."""
    names = ("tqdm", "safetensors", "matplotlib", *(["tokenizers"] if options.tokenizer != "bytes" else []))
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name} is missing: pip install {' '.join(names)}", name=name) from error


def compare(options: argparse.Namespace, stop: StopRequest) -> bool:
    """Trains two runs, one after the other, that differ only in the dispersion term, and shows both in one picture and
    one table. Returns whether both runs were completed."""
    results = {}
    weights = {"without": 0.0, "with": options.dispersion_weight}
    with contextlib.ExitStack() as locks:
        for name in weights:
            locks.enter_context(locked(options.out / name))
        for name, weight in weights.items():
            say(f"{name} the dispersion loss")
            result = Run(options, options.out / name, weight).train(stop)
            if result is None:
                return False
            results[name] = result
    if rank() == 0:
        write_json(options.out / "results.json", results)
        curves = {
            "before training": results["with"]["cosine_before"],
            "trained without the dispersion loss": results["without"]["cosine_after"],
            f"trained with it (weight {options.dispersion_weight:g})": results["with"]["cosine_after"],
        }
        plot_condensation(curves, options.out / "condensation.png", dashed=["before training"])
        say(table(results))
        say(f"picture   {options.out / 'condensation.png'}\nresults   {options.out / 'results.json'}")
    return True


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
    """Model, optimiser and data of a run in the folder ``out`` with the ``weight`` of the dispersion loss."""

    def __init__(self, options: argparse.Namespace, out: Path, weight: float) -> None:
        self.options, self.out, self.weight = options, out, weight
        self.device = pick_device(options)
        self.windows_per_step = options.batch_size * options.accumulate * world()
        self.file = out / "checkpoint.pt"
        checkpoint = self.read()
        self.data = load_tokens(options)
        if checkpoint is not None and checkpoint["data"] != self.data.key:
            raise ValueError(
                f"--resume: the text or its tokeniser is not what {out} was trained on; give the same --data, or start "
                "another run with another --out"
            )
        torch.manual_seed(mixed_seed(options.seed))
        self.model = build_model(options, self.data, checkpoint).to(self.device)
        config = self.model.config
        self.context = options.context or config.context
        if self.context > config.context:
            raise ValueError(
                f"--context {self.context} is more than the weights' {config.context} positions; take fewer"
            )
        teacher = load_teacher(options, self.model, self.context)
        self.teacher = teacher and teacher.to(self.device)
        self.layers = dispersion_layers(options.dispersion_layers, config.layers)
        self.potential = resolve_potential(options.potential, tau=options.tau)
        self.loss_options = {"sampling": sampling_of(options), "impl": options.impl}
        self.dispersion = partial(fused_dispersion_loss, potential=self.potential, **self.loss_options)
        self.try_dispersion()
        if options.compile:
            self.try_compiler()
        self.regularizer = self.regularized()
        self.windows = validation_windows(self.data.validation, self.context, options.validation_windows)
        self.optimizer = build_optimizer(self.model, options, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.dtype == "float16")
        self.autocast = partial(
            torch.autocast, self.device.type, DTYPES[options.dtype], enabled=options.dtype != "float32"
        )
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.step_tokens = self.windows_per_step * self.context
        self.step, self.seconds = 0, 0.0
        self.saved: int | None = None
        """Step of the last checkpoint; None without one."""
        self.before: list[float] = []
        if checkpoint is not None:
            self.restore(checkpoint)
        forward: nn.Module = torch.compile(self.model) if options.compile else self.model  # type: ignore[assignment]
        if world() > 1:
            forward = DistributedDataParallel(forward, device_ids=[self.device] if self.device.type == "cuda" else None)
        self.forward = forward

    def read(self) -> dict[str, Any] | None:
        """Checkpoint of the run, None without one. Raises where a step would take another number of windows than
        before, with any number of ranks, and where the run has taken more steps already."""
        if not self.file.exists():
            return None
        checkpoint = read_checkpoint(self.file)
        windows, options = checkpoint["windows"], self.options
        if windows != self.windows_per_step:
            raise ValueError(
                f"--resume: a step of the run in {self.out} takes {windows} windows, and {self.windows_per_step} with "
                f"--batch-size {options.batch_size} and --accumulate {options.accumulate} on {world()} ranks; give a "
                f"--batch-size and an --accumulate whose product, times the ranks, is {windows}"
            )
        if checkpoint["step"] > options.steps:
            raise ValueError(
                f"--resume: the run in {self.out} has taken {checkpoint['step']} steps, more than --steps "
                f"{options.steps}; give at least as many, or start another run with another --out"
            )
        paths = {"data": options.data, "cache": [options.cache] if options.cache else []}
        named = "".join(f" --{name} {shlex.join(values)}" for name, values in paths.items() if values)
        step = f"{options.batch_size} x {options.accumulate} x {world()} windows a step"
        say(f"{self.out} goes on after step {checkpoint['step']}, {step},{named or ' on the default text'}")
        return checkpoint

    def try_dispersion(self) -> None:
        """Calls the loss once, so that options it rejects fail before the work."""
        try:
            self.dispersion(torch.randn(1, 2, self.model.config.width, device=self.device))
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise ValueError(f"--impl {self.options.impl}: {error}") from error

    def regularized(self) -> DispersionRegularizer | None:
        """Regulariser on the model; None for the weight 0."""
        if self.weight == 0:
            return None
        return DispersionRegularizer(
            self.model, self.layers, self.weight, potential=self.potential, tokens="all", **self.loss_options
        )

    def try_compiler(self) -> None:
        """Compiles a function once, because ``torch.compile`` needs a C++ compiler on a CPU and Triton on a GPU."""
        try:
            torch.compile(torch.neg)(torch.ones(1, device=self.device))
        except Exception as error:  # from TorchDynamo, TorchInductor or the compiler
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"--compile: PyTorch cannot compile here ({reason})") from error

    def train(self, stop: StopRequest) -> dict[str, Any] | None:
        """Trains to the last step and returns the results; after a signal saves, prints how to resume, and returns
        None."""
        try:
            return self.take_steps(stop)
        except KeyboardInterrupt:
            kept = "there is no checkpoint" if self.saved is None else f"the checkpoint is of step {self.saved}"
            raise KeyboardInterrupt(f"stopped at once, after step {self.step}; {kept}") from None

    def take_steps(self, stop: StopRequest) -> dict[str, Any] | None:
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
            # Processor time of the steps that measure nothing, and their number.
            spent, unmeasured = 0.0, 0
            while self.step < options.steps:
                started = time.perf_counter()
                last = self.step + 1 == options.steps
                validates = last or (self.step + 1) % options.eval_interval == 0
                logs = validates or (self.step + 1) % options.log_interval == 0
                before = time.process_time()
                measured = self.train_step(logs)
                if not logs:
                    spent, unmeasured = spent + time.process_time() - before, unmeasured + 1
                self.step += 1
                bar.update()
                self.seconds += time.perf_counter() - started
                if logs:
                    self.check_finite("loss is", measured["cross_entropy"] + measured["dispersion"])
                    steps_per_second = (self.step - logged[0]) / (self.seconds - logged[1])
                    measured["tokens_per_second"] = self.step_tokens * steps_per_second
                    measured["peak_memory_bytes"] = peak_memory(self.device)
                    if unmeasured and self.device.type == "cpu":
                        measured["processor_seconds"] = spent / unmeasured
                    logged, spent, unmeasured = (self.step, self.seconds), 0.0, 0
                    bar.set_postfix(loss=f"{measured['cross_entropy']:.3f}", cosine=f"{measured['cosine'][-1]:.3f}")
                if validates:
                    validation = self.validate()
                    self.check_finite("validation loss is", validation[0])
                    measured |= {"validation_loss": validation[0], "validation_cosine": validation[1]}
                    with bar.external_write_mode():
                        say(f"step {self.step}: validation loss {validation[0]:.4f}")
                if metrics and logs:
                    metrics.append(self.step, measured)
                number = 0 if last else stop.agreed(self.device)
                if number or last or self.step % options.save_interval == 0:
                    self.save()
                if number:
                    stop.number = number
                    bar.close()
                    say(f"stopped after step {self.step} of {options.steps} and saved; to go on:")
                    say(f"  dispersion-gpt2 --resume --out {shlex.quote(str(options.out))}")
                    return None
        return self.finish(*validation)

    def train_step(self, measure: bool) -> dict[str, Any]:
        """Takes one optimiser step. With ``measure`` returns the values of metrics.jsonl, averaged over the ranks."""
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
            windows = windows_at(self.data.train, starts[first : first + size], self.context)
            tokens, targets = (window.to(self.device) for window in windows)
            # Dropout and token sampling, like the windows, depend on the seed and the step alone: nothing has to be
            # saved, and resuming is exact.
            torch.manual_seed(mixed_seed(options.seed, self.step, micro, rank()))
            with self.gradients_synchronised(micro + 1 == options.accumulate):
                with self.autocast():
                    output = self.forward(tokens, targets, measure)
                    loss = output.loss
                    if self.teacher is not None:
                        weight = options.teacher_weight
                        loss = (1 - weight) * loss + weight * divergence(self.teacher, output.logits, tokens)
                    if self.regularizer is not None:
                        loss = loss + self.regularizer.loss()
                if measure:
                    dispersion += self.dispersion_by_layer(output.hidden) / options.accumulate
                cross_entropy += output.loss.detach() / options.accumulate
                if measure:
                    cosine += condensation_by_layer([z.detach() for z in output.hidden]) / options.accumulate
                # Without this reference, the backward pass frees hidden states as it proceeds.
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
            "grad_norm": norm.item() if norm.isfinite() else None,  # None for a step that the GradScaler skipped
        }

    @torch.no_grad()
    def dispersion_by_layer(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.regularizer is not None:
            return torch.stack(list(self.regularizer.values.values()))
        with self.autocast():
            return torch.stack([self.dispersion(hidden[layer - 1]) for layer in self.layers])

    def gradients_synchronised(self, now: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.forward, DistributedDataParallel) and not now:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    @torch.no_grad()
    def validate(self) -> tuple[float, list[float]]:
        """Cross-entropy in nats, and mean pairwise cosine of every layer, over the same windows at every call."""
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

    def check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(
                f"the {name} no longer finite at step {self.step} with --lr {self.options.lr:g} and --dtype "
                f"{self.options.dtype}; resume the last checkpoint, or start again, with a smaller --lr"
            )

    def save(self) -> None:
        # Weights that are not finite would take the place of the checkpoint from which to go on.
        self.check_finite("weights are", sum(float(w.detach().sum()) for w in self.model.parameters()))
        if rank() == 0:
            state = {
                "model": dict(self.model.state_dict()),
                "optimizer": self.optimizer.state_dict()["state"],
                "scaler": self.scaler.state_dict(),
                "step": self.step,
                "seconds": self.seconds,
                "before": self.before,
                "config": asdict(self.model.config),
                "data": self.data.key,
                "windows": self.windows_per_step,
                # The arguments include the seed, from which every random draw follows, with the step.
                "arguments": as_arguments(self.options),
            }
            write_checkpoint(self.file, state)
        self.saved = self.step

    def restore(self, checkpoint: dict[str, Any]) -> None:
        with damage_named(self.file):
            restore_optimizer(self.optimizer, checkpoint["optimizer"])
            if checkpoint["scaler"]:  # another --dtype may have had none
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.before = [float(cosine) for cosine in checkpoint["before"]]
            if len(self.before) != self.model.config.layers:
                raise ValueError(f"its before has {len(self.before)} layers")
        self.step, self.seconds, self.saved = checkpoint["step"], checkpoint["seconds"], checkpoint["step"]

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
            save_tokenizer(self.data.folder, self.out, self.context)
            curves = {"before training": self.before, "after training": cosine}
            plot_condensation(curves, self.out / "condensation.png", dashed=["before training"])
            records = [block_record(0, self.before), *read_records(self.out / "metrics.jsonl")]
            plot_training(records, self.out / "condensation-over-training.png")
            say(
                f"validation loss {loss:.4f}; mean pairwise cosine of the last layer {cosine[-1]:.3f}, before training "
                f"{self.before[-1]:.3f}\n{self.out} holds condensation.png, condensation-over-training.png, "
                "metrics.jsonl, results.json, checkpoint.pt and, as Hugging Face names them, the weights, config.json "
                "and the tokeniser\n"
            )
        return results


def divergence(teacher: nn.Module, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from the teacher's predictions of those that ``logits [B, L, V]`` give, in nats, mean
    over the tokens ``[B, L]``, at temperature 1 (Hinton et al., 2015)."""
    with torch.no_grad():
        wanted = teacher(tokens).logits.float().log_softmax(-1)
    predicted = logits.float().log_softmax(-1)
    return nn.functional.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1).mean()


if __name__ == "__main__":
    sys.exit(main())
