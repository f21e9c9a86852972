"""Relative error of loss and gradient, by dtype and by the tokens' condensation, of all backends and of the naive
version in the same dtype.

The reference is the naive computation in float64 on exactly the numbers that the tokens hold. An fp16 loss is
multiplied by 4,096 first, in all variants, as a ``GradScaler`` would: otherwise most of an fp16 gradient is below the
range of fp16, whichever variant computes it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss import SHORT, out_of_memory
from benchmarks.machine import describe, pick_device
from dispersion_kernels import fused_dispersion_loss, supported
from dispersion_kernels.condensation import mean_pairwise_cosine

COSINES = (0.0, 0.5, 0.9, 0.99, 0.999)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = (2, 512, 768)
VARIANTS = {"naive": "reference", "torch": "torch", "cpu": "cpu", "triton": "triton", "cuda": "cuda"}
SCALE = {torch.float16: 4096.0}


def run(
    quick: bool, potentials: tuple[str, ...] = ("angular_spread",), shape: tuple[int, int, int] = SHAPE
) -> list[dict[str, Any]]:
    device = pick_device()
    shape = (1, 64, 32) if quick else shape
    names = [name for name, impl in VARIANTS.items() if supported(impl, torch.zeros(1, 2, 2, device=device))]
    print(f"machine: {describe()}")
    print(f"relative error of the gradient (of the loss), B, L, F = {', '.join(map(str, shape))}\n")
    print("| potential, mean cosine, dtype | " + " | ".join(names) + " |")
    print("|---" * (1 + len(names)) + "|")
    rows = []
    for potential in potentials:
        for cosine in COSINES:
            tokens = tokens_at(cosine, shape).to(device)
            for dtype in DTYPES:
                case_rows = _case(tokens.to(dtype), potential, cosine, names)
                rows += case_rows
                cells = " | ".join(map(_cell, case_rows))
                print(f"| {potential}, {cosine:g}, {SHORT[dtype]} | {cells} |", flush=True)
    return rows


def _cell(row: dict[str, Any]) -> str:
    return f"{row['grad_error']:.1e} ({row['loss_error']:.1e})" if row["status"] == "computed" else row["status"]


def tokens_at(cosine: float, shape: tuple[int, int, int]) -> Tensor:
    """Gaussian tokens of norm about sqrt(F) around one direction per sequence, whose mean pairwise cosine is
    ``cosine``."""
    torch.manual_seed(0)
    batch, _, features = shape
    common = torch.nn.functional.normalize(torch.randn(batch, 1, features), dim=2) * math.sqrt(features)
    return math.sqrt(cosine) * common + math.sqrt(1 - cosine) * torch.randn(shape)


def _case(z: Tensor, potential: str, cosine: float, names: list[str]) -> list[dict[str, Any]]:
    exact = _evaluate(z.double(), potential, "reference", 1.0)
    rows = []
    for name in names:
        row: dict[str, Any] = {
            "potential": potential,
            "B": z.shape[0],
            "L": z.shape[1],
            "F": z.shape[2],
            "mean_cosine": cosine,
            "measured_cosine": mean_pairwise_cosine(z.float()).item(),
            "dtype": SHORT[z.dtype],
            "variant": name,
        }
        support = supported(VARIANTS[name], z, potential)
        if not support:
            rows.append(row | {"status": f"skipped: {support.reason}"})
            continue
        try:
            loss, grad = _evaluate(z, potential, VARIANTS[name], SCALE.get(z.dtype, 1.0))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            rows.append(row | {"status": "out of memory"})
            continue
        difference = grad - exact[1]
        row |= {"status": "computed", "loss": loss.item(), "grad_norm": exact[1].norm().item()}
        row["loss_error"] = ((loss - exact[0]).abs() / exact[0].abs()).item()
        row["grad_error"] = (difference.norm() / exact[1].norm()).item()
        row["grad_error_largest"] = (difference.abs().max() / exact[1].abs().max()).item()
        rows.append(row)
    return rows


def _evaluate(z: Tensor, potential: str, impl: str, scale: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient, computed in the dtype of ``z`` and widened to float64."""
    z = z.detach().requires_grad_()
    loss = fused_dispersion_loss(z, potential, impl=impl)
    (loss * scale).backward()
    assert z.grad is not None
    return loss.detach().double(), z.grad.double() / scale
