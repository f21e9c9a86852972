"""Time of the loss against the naive version, eager and compiled, as multiples of the limit.

The limit is 3 B L^2 F FLOPs (similarities by symmetry 1, gradient 2) at the rate that ``torch.mm`` reaches on 2048 x
2048 fp32 matrices in the same rounds. A variant is timed only after its loss and gradient agreed with a float64
computation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.timing import SECONDS, interleaved, matrix_product, median
from dispersion_kernels import fused_dispersion_loss, reference, supported
from dispersion_kernels.potentials import resolve_potential

CASES = [(4, 1024, 768), (1, 2048, 768), (1, 4096, 768), (1, 8192, 256), (2, 1024, 64), (1, 256, 768)]
# The naive version in bf16 is a different computation, 3 to 17 percent off, and is not compared.
VARIANTS = [
    ("naive eager", torch.float32),
    ("naive compiled", torch.float32),
    ("torch", torch.float32),
    ("cpu", torch.float32),
    ("torch", torch.bfloat16),
    ("cpu", torch.bfloat16),
]
POTENTIAL = resolve_potential("angular_spread")


def run(quick: bool) -> list[dict[str, Any]]:
    variants = [variant for variant in VARIANTS if variant[0] != "cpu" or supported("cpu", torch.zeros(1, 2, 2))]
    print(f"machine: {describe()}")
    print("multiples of the limit of 3 B L^2 F FLOPs at torch.mm's rate: forward + backward (loss alone, no_grad)\n")
    print("| B, L, F | limit, ms | " + " | ".join(f"{name}, {_short(dtype)}" for name, dtype in variants) + " |")
    print("|---" * (2 + len(variants)) + "|")
    rows = []
    for shape in CASES[-2:] if quick else CASES:
        torch._dynamo.reset()  # the limit on recompilation counts all shapes
        of_case = _case(shape, variants, quick)
        rows += of_case
        ratio = {(row["variant"], row["dtype"], row["mode"]): row["ratio"] for row in of_case}
        cells = [f"{ratio[name, _short(d), 'f+b']:.2f} ({ratio[name, _short(d), 'loss']:.2f})" for name, d in variants]
        print(f"| {', '.join(map(str, shape))} | {of_case[0]['limit_ms']:.2f} | {' | '.join(cells)} |", flush=True)
    return rows


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def _case(shape: tuple[int, int, int], variants: list[tuple[str, torch.dtype]], quick: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    batch, length, features = shape
    # Condensed as the hidden states of a trained model: mean cosine about 0.5.
    tokens = torch.randn(shape) + torch.randn(features)
    product, product_flops = matrix_product()
    mm = ("torch.mm", torch.float32, "product")
    calls: dict[tuple[str, torch.dtype, str], Callable[[], object]] = {mm: product}
    errors = {}
    for name, dtype in variants:
        z, loss = tokens.to(dtype, copy=True).requires_grad_(), _loss(name)
        exact = _forward_backward(z.detach().double().requires_grad_(), _loss("torch"))
        errors[name, dtype] = _check(name, _forward_backward(z, loss), exact)
        calls[name, dtype, "f+b"] = partial(_forward_backward, z, loss)
        calls[name, dtype, "loss"] = partial(_loss_alone, z, loss)
    times = interleaved(calls, rounds=2 if quick else 7, seconds=0.05 if quick else SECONDS)
    rate = product_flops / median(times.pop(mm))
    limit = 3 * batch * length**2 * features / rate
    return [
        {
            "B": batch,
            "L": length,
            "F": features,
            "dtype": _short(dtype),
            "variant": name,
            "mode": mode,
            "ms": 1e3 * median(values),
            "ms_best": 1e3 * min(values),
            "ms_worst": 1e3 * max(values),
            "limit_ms": 1e3 * limit,
            "ratio": median(values) / limit,
            "mm_gflops": rate / 1e9,
            "loss_error": errors[name, dtype][0],
            "grad_error": errors[name, dtype][1],
        }
        for (name, dtype, mode), values in times.items()
    ]


def _loss(name: str) -> Callable[[Tensor], Tensor]:
    if name in ("cpu", "torch"):
        return lambda z: fused_dispersion_loss(z, POTENTIAL, impl=name)

    def naive(z: Tensor) -> Tensor:
        return reference.dispersion_loss(z, POTENTIAL)[0].mean()

    return torch.compile(naive, fullgraph=True, dynamic=True) if name == "naive compiled" else naive


def _forward_backward(z: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    z.grad = None
    value = loss(z)
    value.backward()
    assert z.grad is not None
    return value.detach(), z.grad


def _loss_alone(z: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return loss(z)


def _check(name: str, got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The errors of loss and gradient relative to float64; too large ones are not timed."""
    loss_error = ((got[0].double() - exact[0]).abs() / exact[0].abs()).item()
    grad_error = ((got[1].double() - exact[1]).norm() / exact[1].norm()).item()
    bound = 1e-5 if got[1].dtype == torch.float32 else 5e-3
    if not (loss_error < 1e-5 and grad_error < bound):
        raise RuntimeError(
            f"{name} is wrong: relative error of the loss {loss_error:.1e}, of the gradient {grad_error:.1e}"
        )
    return loss_error, grad_error
