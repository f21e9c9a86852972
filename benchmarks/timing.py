"""Timing on a machine whose speed drifts: variants interleaved, batches of at least a quarter second, medians with
quartiles."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NamedTuple, TypeVar

import torch

from benchmarks.machine import synchronize

# Least seconds of a batch. A single call is never timed, because a short parallel region after idling can take
# milliseconds.
SECONDS = 0.25


Name = TypeVar("Name", bound=Hashable)


class Quartiles(NamedTuple):
    first: float
    median: float
    third: float


def interleaved(
    variants: Mapping[Name, Callable[[], object]],
    rounds: int,
    seconds: float = SECONDS,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
) -> dict[Name, list[float]]:
    """Seconds per call of each variant, one figure per round, each the mean of a batch of at least ``seconds``.

    The order differs from round to round, so that no variant always runs after the heaviest one.
    """
    counts = {}
    for name, call in variants.items():
        call()
        counts[name] = max(1, round(seconds / _batch(call, 1, 0.0, device)))
    times: dict[Name, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(variants), len(variants)):
            times[name].append(_batch(variants[name], counts[name], seconds, device))
    return times


def _batch(call: Callable[[], object], count: int, seconds: float, device: torch.device) -> float:
    """Seconds per call, the mean over ``count`` calls, and on a CPU over at least ``seconds`` seconds."""
    synchronize(device)
    if device.type == "cuda":
        # Timed by the device's clock. The host runs ahead of the device, so the cost of launches shows only where it
        # exceeds the kernels'.
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3 / count
    calls, began = 0, time.perf_counter()
    while calls < count or time.perf_counter() - began < seconds:
        call()
        calls += 1
    return (time.perf_counter() - began) / calls


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """Call of ``torch.mm`` on two square matrices, and its FLOPs; its rate is that of the limits."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * size**3


def quartiles(values: list[float]) -> Quartiles:
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))
