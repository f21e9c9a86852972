"""Time of the loss against the naive version, eager and compiled, as multiples of the limit.

The limit is 3 B L^2 F FLOPs (similarities by symmetry 1, gradient 2) at the rate that ``torch.mm`` reaches on 2048 x
2048 fp32 matrices in the same rounds. A variant is timed only after its loss and gradient agreed with a float64
computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.timing import SECONDS, interleaved, matrix_product, median
from dispersion_kernels import fused_dispersion_loss, reference, supported
from dispersion_kernels.potentials import resolve_potential

CASES = [(4, 1024, 768), (1, 2048, 768), (1, 4096, 768), (1, 8192, 256), (2, 1024, 64), (1, 256, 768)]
VARIANTS = ("naive eager", "naive compiled", "torch", "cpu")
POTENTIAL = resolve_potential("angular_spread")


def run(quick: bool) -> list[dict[str, Any]]:
    print(f"machine: {describe()}")
    print(
        "multiples of the limit of 3 B L^2 F FLOPs at torch.mm's rate; f+b: forward + backward, loss: under no_grad\n"
    )
    print("| B, L, F | dtype | limit, ms | " + " | ".join(f"{name}, f+b (loss)" for name in VARIANTS) + " |")
    print("|---" * (3 + len(VARIANTS)) + "|")
    rows = []
    for shape in CASES[-2:] if quick else CASES:
        torch._dynamo.reset()  # else the naive version is compiled for shapes in general after the first
        for dtype in (torch.float32, torch.bfloat16):
            # The naive version in bf16 is a different computation, 3 to 17 percent off, and is not compared.
            names = VARIANTS if dtype == torch.float32 else ("torch", "cpu")
            rows += _case(shape, dtype, [name for name in names if _supported(name)], quick)
    return rows


def _supported(name: str) -> bool:
    return name != "cpu" or bool(supported("cpu", torch.zeros(1, 2, 2)))


def _case(shape: tuple[int, int, int], dtype: torch.dtype, names: list[str], quick: bool) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    batch, length, features = shape
    # Condensed as the hidden states of a trained model: mean cosine about 0.5.
    z = (torch.randn(shape) + torch.randn(features)).to(dtype).requires_grad_()
    product, product_flops = matrix_product()
    calls: dict[str, Callable[[], object]] = {"mm": product}
    errors = {}
    exact = _forward_backward(z.detach().double().requires_grad_(), _loss("torch"))
    for name in names:
        loss = _loss(name)
        errors[name] = _check(name, _forward_backward(z, loss), exact)
        calls[f"{name} f+b"] = lambda loss=loss: _forward_backward(z, loss)  # type: ignore[misc]
        calls[f"{name} loss"] = lambda loss=loss: _loss_alone(z, loss)  # type: ignore[misc]
    times = interleaved(calls, rounds=2 if quick else 7, seconds=0.05 if quick else SECONDS)
    limit = 3 * batch * length**2 * features / (product_flops / median(times["mm"]))
    rows = [
        {
            "B": batch,
            "L": length,
            "F": features,
            "dtype": str(dtype).removeprefix("torch."),
            "variant": call.rsplit(" ", 1)[0],
            "mode": call.rsplit(" ", 1)[1],
            "ms": 1e3 * median(values),
            "ms_best": 1e3 * min(values),
            "ms_worst": 1e3 * max(values),
            "limit_ms": 1e3 * limit,
            "ratio": median(values) / limit,
            "mm_gflops": product_flops / median(times["mm"]) / 1e9,
            "loss_error": errors[call.rsplit(" ", 1)[0]][0],
            "grad_error": errors[call.rsplit(" ", 1)[0]][1],
        }
        for call, values in times.items()
        if call != "mm"
    ]
    ratio = {(row["variant"], row["mode"]): row["ratio"] for row in rows}
    cells = [f"{ratio[name, 'f+b']:.2f} ({ratio[name, 'loss']:.2f})" if name in names else "-" for name in VARIANTS]
    print(
        f"| {batch}, {length}, {features} | {rows[0]['dtype']} | {1e3 * limit:.2f} | " + " | ".join(cells) + " |",
        flush=True,
    )
    return rows


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
