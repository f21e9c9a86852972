"""Loss and gradient of one very long sequence, of up to 262,144 tokens, under a memory ceiling that the process sets
itself.

The ceiling is linear in L, as the tokens are; one L x L matrix is a multiple of it. The results are checked against the
formula in float64, the gradient for some tokens; see :func:`check_rows`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss import forward_backward
from benchmarks.machine import describe, peak_memory, pick_device, process_memory, synchronize
from dispersion_kernels import AngularSpread, fused_dispersion_loss

LENGTHS = [16384, 65536, 262144]
FEATURES = 64
POTENTIAL = AngularSpread()


def run(quick: bool, lengths: list[int] | None = None) -> list[dict[str, Any]]:
    print(f"machine: {describe()}")
    print(f"loss and gradient of one sequence, F = {FEATURES}, fp32\n")
    print("| L | seconds | peak beyond the input, MiB | ceiling, MiB | an L x L matrix, MiB | error of gradient rows |")
    print("|---" * 6 + "|")
    rows = []
    for length in lengths or ([2048, 8192] if quick else LENGTHS):
        command = [sys.executable, "-m", "benchmarks.scale", str(length)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{child.stderr}")
        row: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        rows.append(row)
        mib = [f"{row[name] / 2**20:,.1f}" for name in ("peak_bytes", "ceiling_bytes", "matrix_bytes")]
        print(f"| {length:,} | {row['seconds']:.2f} | {' | '.join(mib)} | {row['row_error']:.1e} |", flush=True)
    return rows


def ceiling(length: int, features: int) -> int:
    """Memory in bytes that loss and gradient may take beyond the fp32 tokens; linear in L."""
    return 8 * length * features * 4 + (32 << 20)


def measure(length: int, impl: str = "auto", features: int = FEATURES) -> dict[str, Any]:
    """Figures of loss and gradient of one sequence, computed under the ceiling; the check of the numbers follows
    without a ceiling.

    Raises ``RuntimeError`` if the ceiling is too low, or the loss or the gradient wrong.
    """
    device = pick_device()
    torch.manual_seed(0)
    # A first call, because the libraries and threads that it loads and starts are not memory of the loss.
    warm = torch.randn(1, 256, features, device=device, requires_grad=True)
    forward_backward(warm, lambda z: fused_dispersion_loss(z, POTENTIAL, impl=impl))
    z = torch.randn(1, length, features, device=device, requires_grad=True)
    limit = ceiling(length, features)
    _set_ceiling(limit, device)
    results: list[tuple[Tensor, Tensor]] = []
    start = time.perf_counter()
    peak = peak_memory(
        lambda: results.append(forward_backward(z, lambda z: fused_dispersion_loss(z, POTENTIAL, impl=impl))), device
    )
    synchronize(device)
    seconds = time.perf_counter() - start
    _set_ceiling(None, device)
    loss, grad = results[0]
    loss_error, row_error = check_rows(z.detach()[0], loss, grad[0])
    return {
        "L": length,
        "F": features,
        "impl": impl,
        "seconds": seconds,
        "peak_bytes": peak,
        "input_bytes": z.numel() * 4,
        "ceiling_bytes": limit,
        "matrix_bytes": 4 * length**2,
        "loss": loss.item(),
        "loss_error": loss_error,
        "row_error": row_error,
    }


def _set_ceiling(limit: int | None, device: torch.device) -> None:
    """Limits the memory of this process to ``limit`` bytes beyond the memory in use; None ends the limit."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.empty_cache()
        share = 1.0 if limit is None else (torch.cuda.memory_reserved(device) + limit) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard if limit is None else process_memory("VmSize") + limit
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_rows(z: Tensor, loss: Tensor, grad: Tensor, rows: int = 64) -> tuple[float, float]:
    """Errors of the loss and of some rows of its gradient, against the formula in float64.

    The sum P over all pairs is estimated from the pairs of ``rows`` tokens with all others, which gives the loss within
    some standard errors. The gradient of these tokens is exact up to the factor 1 / P, which is taken from the loss:
    dz = u / (r + eps) - z (z . u) / (r (r + eps)^2), u_i = 2 / P sum_j slope(c_ij) x_j.

    Raises ``RuntimeError`` if one of the errors is too large.
    """
    length, count = z.shape[0], z.shape[0] * (z.shape[0] - 1)
    chosen = torch.linspace(0, length - 1, min(rows, length), device=z.device).long()
    chosen_rows = z[chosen].double()
    norms = torch.linalg.vector_norm(chosen_rows, dim=1, keepdim=True)
    x_rows = chosen_rows / (norms + POTENTIAL.eps)
    sums = torch.zeros(len(chosen), dtype=torch.float64, device=z.device)
    weighted = torch.zeros_like(chosen_rows)
    for first in range(0, length, 8192):
        block = z[first : first + 8192].double()
        x = block / (torch.linalg.vector_norm(block, dim=1, keepdim=True) + POTENTIAL.eps)
        c = (x_rows @ x.T).clamp(POTENTIAL.clamp - 1, 1 - POTENTIAL.clamp)
        psi = torch.exp(-torch.arccos(c) / (math.pi * POTENTIAL.tau))
        psi[chosen[:, None] == torch.arange(first, first + len(block), device=z.device)] = 0
        sums += psi.sum(1)
        weighted += (psi / (math.pi * POTENTIAL.tau * (1 - c.square()).sqrt())) @ x
    estimate = math.log(sums.mean().item() * length / count) + POTENTIAL.loss_offset
    spread = (sums.std() / sums.mean() / math.sqrt(len(chosen))).item()
    loss_error = abs(loss.item() - estimate)
    u = 2 * weighted / (count * math.exp(loss.item() - POTENTIAL.loss_offset))
    inner = (chosen_rows * u).sum(1, keepdim=True)
    exact = u / (norms + POTENTIAL.eps) - chosen_rows * inner / (norms * (norms + POTENTIAL.eps).square())
    row_error = ((grad[chosen].double() - exact).norm() / exact.norm()).item()
    if not (loss_error <= 5 * spread + 1e-6 and row_error < 1e-5):
        raise RuntimeError(
            f"{length} tokens: the loss is {loss.item():.7f}, {len(chosen)} of its rows say {estimate:.7f} within "
            f"{spread:.1e}; "
            f"relative error of their gradient {row_error:.1e}"
        )
    return loss_error, row_error


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("length", type=int)
    parser.add_argument("impl", nargs="?", default="auto")
    print(json.dumps(measure(**vars(parser.parse_args()))))
