"""Timing that holds on a machine whose speed drifts: variants interleaved, batches of at least a quarter second,
medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

# Short parallel regions after idling can take milliseconds, so a single call is never timed.
SECONDS = 0.25


Name = TypeVar("Name", bound=Hashable)


def interleaved(
    variants: dict[Name, Callable[[], object]], rounds: int, seconds: float = SECONDS
) -> dict[Name, list[float]]:
    """Seconds a call of each variant, once a round, each figure the mean of a batch of at least ``seconds``."""
    counts = {}
    for name, call in variants.items():
        call()
        start = time.perf_counter()
        call()
        counts[name] = max(1, round(seconds / (time.perf_counter() - start)))
    times: dict[Name, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            calls, start = 0, time.perf_counter()
            while calls < counts[name] or time.perf_counter() - start < seconds:
                call()
                calls += 1
            times[name].append((time.perf_counter() - start) / calls)
    return times


def matrix_product() -> tuple[Callable[[], object], float]:
    """``torch.mm`` of two 2048 x 2048 fp32 matrices, and its FLOPs: the rate that limits are taken at."""
    a, b, out = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.empty(2048, 2048)
    return lambda: torch.mm(a, b, out=out), 2.0 * 2048**3


def median(values: list[float]) -> float:
    return statistics.median(values)
