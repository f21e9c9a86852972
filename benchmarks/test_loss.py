"""The cases of the loss suite for pytest-benchmark: ``pytest benchmarks [--shape 4,1024,768 ...]``.

Not collected by ``pytest`` alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import variants
from benchmarks.loss import MODES, SHORT, VARIANTS, check, condensed_tokens, float64, forward_backward, modes
from benchmarks.machine import describe, peak_memory, pick_device, synchronize

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

DEVICE = pick_device()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    shapes = metafunc.config.getoption("--shape")
    metafunc.parametrize("shape", [tuple(map(int, shape.split(","))) for shape in shapes], ids=shapes)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    VARIANTS[DEVICE.type],
    ids=[f"{name.replace(' ', '-')}-{SHORT[dtype]}" for name, dtype in VARIANTS[DEVICE.type]],
)
def test_loss(benchmark: Any, shape: tuple[int, int, int], name: str, dtype: torch.dtype, mode: str) -> None:
    z = condensed_tokens(shape, DEVICE).to(dtype).requires_grad_()
    if reason := variants.why_not(name, z):
        pytest.skip(reason)
    loss = variants.build(name)
    errors = check(name, forward_backward(z, loss), float64(z))
    call = modes(z, loss)[mode]
    z.grad = None
    benchmark.group = f"{shape}, {mode}"
    benchmark.extra_info |= {**describe(), "loss_error": errors[0], "grad_error": errors[1]}
    benchmark.extra_info["peak_bytes"] = peak_memory(call, DEVICE)

    def run() -> None:
        call()
        synchronize(DEVICE)

    benchmark(run)
