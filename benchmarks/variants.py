"""The variants that are compared: our backends, the naive version and its peers, each a function from tokens
``[B, L, F]`` to the mean loss of ``angular_spread``."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dispersion_kernels import AngularSpread, fused_dispersion_loss, reference, supported

Loss = Callable[[Tensor], Tensor]

POTENTIAL = AngularSpread()
OURS = ("torch", "cpu", "triton", "cuda")
NAMES = ("naive eager", "naive compiled", "row-chunked", "KeOps", *OURS)
# Bytes of one chunk of rows of the similarity matrix; a dozen such tensors are alive at the same time.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}


def why_not(name: str, z: Tensor) -> str | None:
    """Reason, in words, why a variant cannot run on such tokens; None if it can."""
    if name in OURS:
        return supported(name, z, POTENTIAL).reason
    if name == "KeOps":
        if importlib.util.find_spec("pykeops") is None:
            return "pykeops is not installed: pip install pykeops"
        if z.dtype not in (torch.float32, torch.float64):
            return "KeOps computes in fp32"
    return None


def build(name: str) -> Loss:
    """Variant as a function of the tokens."""
    if name in OURS:
        return lambda z: fused_dispersion_loss(z, POTENTIAL, impl=name)
    if name == "naive compiled":
        return torch.compile(naive, fullgraph=True, dynamic=True)
    return {"naive eager": naive, "row-chunked": row_chunked, "KeOps": keops}[name]


def naive(z: Tensor) -> Tensor:
    """Loss by the materialised similarity matrix, with the gradient left to autograd."""
    return reference.dispersion_loss(z, POTENTIAL)[0].mean()


def row_chunked(z: Tensor) -> Tensor:
    """Loss in plain PyTorch with bounded memory: some rows of the similarity matrix at a time, computed again in
    backward (``torch.utils.checkpoint``). 8 B L^2 F FLOPs.

    The tensors alive at the same time are bounded; the memory that glibc's allocator keeps of freed tensors is not.
    With 16,384 tokens and F = 64 the process grows by 2.8 GiB, and by 46 MiB if ``MALLOC_MMAP_THRESHOLD_=65536`` gives
    each tensor its own mapping.
    """
    length = z.shape[1]
    rows = max(1, CHUNK_BYTES[z.device.type] // (length * z.element_size()))
    losses = []
    for tokens in z:
        x = tokens / (torch.linalg.vector_norm(tokens, dim=1, keepdim=True) + POTENTIAL.eps)
        sums = [
            checkpoint(_log_sum_of_rows, x, first, min(first + rows, length), use_reentrant=False)
            for first in range(0, length, rows)
        ]
        losses.append(_loss(torch.logsumexp(torch.stack(sums), 0), length))
    return torch.stack(losses).mean()


def _log_sum_of_rows(x: Tensor, first: int, end: int) -> Tensor:
    """Logarithm of the sum of psi over the pairs of the tokens ``first`` to ``end`` with all others."""
    c = x[first:end] @ x.T
    clipped = c + (c.clamp(POTENTIAL.clamp - 1, 1 - POTENTIAL.clamp) - c).detach()
    exponent = -torch.arccos(clipped) / (math.pi * POTENTIAL.tau)
    itself = torch.arange(first, end, device=x.device)[:, None] == torch.arange(x.shape[0], device=x.device)
    return torch.logsumexp(exponent.masked_fill(itself, -math.inf), (0, 1))


def _loss(log_total: Tensor, length: int) -> Tensor:
    return log_total - math.log(length * (length - 1)) + POTENTIAL.loss_offset


def keops(z: Tensor) -> Tensor:
    """Loss by KeOps at its best: one reduction for the loss and one for the gradient, because its automatic
    differentiation does not know the straight-through slope. About 8 B L^2 F FLOPs, none of them in a matrix
    product."""
    import pykeops

    pykeops.set_verbose(False)
    length = z.shape[1]
    x = z / (torch.linalg.vector_norm(z, dim=2, keepdim=True) + POTENTIAL.eps)
    total: Tensor = _KeOpsSum.apply(x)
    return _loss(total.log(), length).mean()


class _KeOpsSum(torch.autograd.Function):
    """Sum of psi over the pairs of each sequence of unit vectors, ``[B]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        psi, _ = _keops_psi_and_slope(x)
        itself, _ = _psi_and_slope(x.square().sum(2))
        return (psi.sum(2).squeeze(2) - itself).sum(1)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        from pykeops.torch import LazyTensor

        _, slope = _keops_psi_and_slope(x)
        weighted = (slope * LazyTensor(x[:, None].contiguous())).sum(2)
        _, itself = _psi_and_slope(x.square().sum(2))
        gradient: Tensor = 2 * upstream[0][:, None, None] * (weighted - itself[:, :, None] * x)
        return gradient


def _keops_psi_and_slope(x: Tensor) -> tuple[Any, Any]:
    from pykeops.torch import LazyTensor

    c = LazyTensor(x[:, :, None].contiguous()) | LazyTensor(x[:, None].contiguous())
    c = c.clamp(POTENTIAL.clamp - 1, 1 - POTENTIAL.clamp)
    psi = (-c.acos() / (math.pi * POTENTIAL.tau)).exp()
    return psi, psi * (1 - c.square()).rsqrt() / (math.pi * POTENTIAL.tau)


def _psi_and_slope(c: Tensor) -> tuple[Tensor, Tensor]:
    c = c.clamp(POTENTIAL.clamp - 1, 1 - POTENTIAL.clamp)
    psi = torch.exp(-torch.arccos(c) / (math.pi * POTENTIAL.tau))
    return psi, psi * (1 - c.square()).rsqrt() / (math.pi * POTENTIAL.tau)
