"""Figures of the published implementation (tests/published/README.md), and the errors of ours against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dispersion_kernels import DispersionLoss

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "published" / "values.json").read_text())["cases"]
ARGUMENTS = ("tau_l2", "tau_cos", "margin", "epsilon", "clamp_threshold")


def hashed(seed: int, count: int) -> Tensor:
    """``[count]`` float64 in [-1/2, 1/2), by the recipe of tests/published/README.md."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(1000003 * seed)) & np.uint64(0xFFFFFFFF)
    for _ in range(2):
        x = (x ^ (x >> np.uint64(16))) * np.uint64(0x45D9F3B) & np.uint64(0xFFFFFFFF)
    x = x ^ (x >> np.uint64(16))
    return torch.from_numpy(x.astype(np.float64) / 2**32 - 0.5)


def tokens(case: dict[str, Any]) -> Tensor:
    """``[B, L, F]`` float64."""
    shape = torch.Size(case["shape"])
    z = torch.tensor(case["z"], dtype=torch.float64) if "z" in case else hashed(case["seed"], shape.numel())
    return (z if "z" in case else (z + case["shift"]) * case["scale"]).view(shape).to(torch.get_default_device())


def loss_of(case: dict[str, Any], impl: str) -> DispersionLoss:
    return DispersionLoss.from_published(case["variant"], **{name: case[name] for name in ARGUMENTS}, impl=impl)


def errors(case: dict[str, Any], impl: str, dtype: torch.dtype) -> tuple[float, float]:
    z = tokens(case).to(dtype).requires_grad_()
    loss = loss_of(case, impl)(z)
    loss.backward()
    assert z.grad is not None
    return errors_of(case, loss.item(), z.grad)


def errors_of(case: dict[str, Any], loss: float, grad: Tensor) -> tuple[float, float]:
    """Errors of the loss, relative to max(1, loss), and of the gradient, relative to its norm."""
    # A published gradient below 1e-15 is zero or its rounding (softmaxes of one partner, or saturated).
    grad, norm = grad.double().flatten().cpu(), case["gradient_norm"] if case["gradient_norm"] > 1e-15 else 1.0
    error = abs(loss - case["loss"]) / max(1.0, abs(case["loss"]))
    if "gradient" in case:
        return error, (grad - torch.tensor(case["gradient"], dtype=torch.float64)).norm().item() / norm
    direction = hashed(7919, grad.numel())
    first = torch.tensor(case["gradient_first"], dtype=torch.float64)
    gradient_errors = (
        abs(grad.norm().item() - case["gradient_norm"]),
        (grad[: first.numel()] - first).norm().item(),
        abs((grad @ direction).item() - case["gradient_dot_hashed_7919"]) / direction.norm().item(),
    )
    return error, max(gradient_errors) / norm


# Relative errors of the loss and of the gradient. The float32 bounds include the rounding of the tokens to float32.
BOUNDS = {torch.float64: (1e-12, 1e-11), torch.float32: (2e-6, 2e-5)}
VARIANTS = sorted({case["variant"] for case in CASES})
