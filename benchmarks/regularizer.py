"""Cost of the loss in a training loop: peak memory and time of a step of a GPT-2 without the loss, with the recipe
(hidden states returned by the model, and the function on all of them), with the function and ``recompute=True``, and
with ``DispersionRegularizer``.

The variants share one model and take steps in turn. Before that, all must give the gradients of the recipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe, peak_memory, pick_device
from benchmarks.timing import interleaved, quartiles
from dispersion_kernels import DispersionRegularizer, fused_dispersion_loss
from dispersion_kernels.gpt2.model import GPT2, GPT2Config

WEIGHT = 0.1
SHAPE: dict[str, Any] = {"layers": 8, "width": 128, "heads": 4, "context": 512, "vocab": 256}
QUICK: dict[str, Any] = {"layers": 2, "width": 32, "heads": 2, "context": 256, "vocab": 64}
BATCH = 2
ROUNDS = 15
# Largest error of a gradient, relative to its largest entry: for the rounding of fp32 and of a bf16 model.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def run(quick: bool) -> list[dict[str, Any]]:
    device = pick_device()
    config = GPT2Config(**(QUICK if quick else SHAPE))
    shape = f"{config.layers} layers, {BATCH} x {config.context} tokens, F = {config.width}"
    print(f"machine: {describe()}\nforward and backward of a GPT-2: {shape}\n")
    print("| dtype, checkpointing | variant | more memory, z of a layer | of the time without | ms |")
    print("|---" * 5 + "|")
    rows = []
    for dtype in TOLERANCE:
        for checkpointing in (False, True):
            torch.manual_seed(0)
            model = GPT2(config, checkpoint_activations=checkpointing).to(device, dtype)
            tokens = torch.randint(config.vocab, (BATCH, config.context), device=device)
            steps = {name: partial(step, model, tokens) for name, step in VARIANTS.items()}
            _check(model, steps, TOLERANCE[dtype])
            peaks = {name: _peak(model, step, device) for name, step in steps.items()}
            times = interleaved(steps, rounds=2 if quick else ROUNDS, seconds=0.0, device=device)
            z_bytes = BATCH * config.context * config.width * dtype.itemsize
            least = peaks["no loss"]
            for name, values in times.items():
                ratio = median(v / without for v, without in zip(values, times["no loss"], strict=True))
                peak = peaks[name]
                row: dict[str, Any] = {
                    "variant": name,
                    "shape": shape,
                    "dtype": SHORT[dtype],
                    "checkpointing": int(checkpointing),
                    "z_bytes": z_bytes,
                    "peak_bytes": peak,
                    "more_z": None if peak is None or least is None else (peak - least) / z_bytes,
                    "of_time_without": ratio,
                    "ms": 1e3 * quartiles(values).median,
                }
                rows.append(row)
                more = "-" if row["more_z"] is None else f"{row['more_z']:.1f}"
                kind = f"{row['dtype']}{', checkpointed' if checkpointing else ''}"
                print(f"| {kind} | {name} | {more} | {ratio:.3f} | {row['ms']:,.1f} |", flush=True)
    return rows


def plain(model: GPT2, tokens: Tensor) -> None:
    model.zero_grad()
    loss = model(tokens, tokens).loss
    loss.backward()


def by_function(model: GPT2, tokens: Tensor, recompute: bool) -> None:
    model.zero_grad()
    output = model(tokens, tokens, return_hidden=True)
    loss = output.loss + WEIGHT * fused_dispersion_loss(output.hidden, recompute=recompute)
    del output
    loss.backward()


def by_regularizer(model: GPT2, tokens: Tensor, keep_gradients: bool) -> None:
    reg = DispersionRegularizer(model, weight=WEIGHT, keep_gradients=keep_gradients)
    model.zero_grad()
    loss = model(tokens, tokens).loss + reg.loss()
    loss.backward()
    reg.remove()


VARIANTS: dict[str, Callable[[GPT2, Tensor], None]] = {
    "no loss": plain,
    "recipe": partial(by_function, recompute=False),
    "recipe, recompute": partial(by_function, recompute=True),
    "regulariser": partial(by_regularizer, keep_gradients=False),
    "regulariser, keep_gradients": partial(by_regularizer, keep_gradients=True),
}


def _check(model: GPT2, steps: Mapping[str, Callable[[], None]], tolerance: float) -> None:
    gradients = {}
    for name, step in steps.items():
        step()
        gradients[name] = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    wanted = gradients["recipe"]
    for name in list(VARIANTS)[2:]:
        error = ((gradients[name] - wanted).abs().max() / wanted.abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(f"the gradients of {name} differ from the recipe's by {error:.1e} of their largest")


def _peak(model: GPT2, step: Callable[[], None], device: torch.device) -> int | None:
    """Peak memory in bytes of the tensors that a step allocates. On a CPU it is measured by the profiler, because the
    allocator keeps as much memory of freed tensors as is to be measured."""
    model.zero_grad()  # before the profiler starts, which would not see this memory freed
    if device.type != "cpu":
        return peak_memory(step, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    sizes: list[int] = [
        event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()) if event.name() == "[memory]"
    ]
    return max(itertools.accumulate(sizes))
