"""What every backend and the sampler compute alike: dtypes, norms, row transforms, and losses of sums over pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.potentials import Potential


def log_mean_loss(potential: Potential, log_total: Tensor, shift: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The loss from the logarithm of the sum of psi over ``count`` pairs, and what the slopes of psi / exp(shift) are
    to be multiplied by."""
    log_mean = log_total - count.log()
    return log_mean + potential.loss_offset, 2 / count * (shift - log_mean).exp()


def mean_loss(potential: Potential, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The loss from the sum of psi over ``count`` pairs, and what the slopes are to be multiplied by."""
    mean = total / count
    if potential.reduction == "log_mean":
        return mean.log() + potential.loss_offset, 2 / count / mean
    return mean, 2 / count


def loss_weight(layers: int, reduction: str, with_pairs: int | Tensor) -> float | Tensor:
    """What the loss of each sequence is multiplied by, so many of which, in a layer, have a pair; a tensor in
    :func:`wide_dtype`."""
    if reduction != "mean":
        return 1 / layers
    if isinstance(with_pairs, Tensor):
        return 1 / (layers * with_pairs.clamp(min=1).to(wide_dtype(with_pairs.device)))
    return 1 / (layers * max(1, with_pairs))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """For the few numbers that each sequence has."""
    return torch.float32 if device.type == "mps" else torch.float64


def token_norms(z: Tensor) -> Tensor:
    """The norm of each token ``[..., F]``, ``[..., 1]`` in the accumulation dtype; 0 where it is no normal number.

    A square may leave the dtype's range where the norm does not: there tokens are scaled before they are squared.
    """
    dtype = accumulation_dtype(z.dtype)
    tiny = torch.finfo(dtype).tiny
    norm: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=dtype)
    ordinary = (norm > tiny**0.4) & norm.isfinite()
    if z.numel() == 0 or (z.device.type == "cpu" and ordinary.all()):  # where looking costs nothing
        return norm
    largest = torch.linalg.vector_norm(z, math.inf, dim=-1, keepdim=True, dtype=dtype)
    scale = torch.where((largest >= tiny) & largest.isfinite(), 1 / largest, 1.0)
    scaled = torch.linalg.vector_norm(z * scale, dim=-1, keepdim=True) / scale
    return torch.where(ordinary, norm, scaled.masked_fill_(scaled < tiny, 0.0))


def sum_of_tokens(values: Tensor) -> Tensor:
    """``[B]`` from ``[B, L]``; so many at a time as PyTorch does not share among threads, whose number would matter."""
    parts = values.split(2**14, 1)
    return torch.stack([part.sum(1) for part in parts], 1).sum(1) if len(parts) > 1 else values.sum(1)


class Rows(NamedTuple):
    """What the gradient of the row transform needs of each token, ``[B, L, 1]``."""

    inverse: Tensor
    """1 / (r + eps), where r is the norm that was divided by; 0 where x was set to 0."""
    ratio: Tensor
    """(r + eps) / r, 0 where r is 0."""


def transform(
    z: Tensor, norm: Tensor, potential: Potential, left_out: Tensor, in_place: bool = False
) -> tuple[Tensor, Rows | None]:
    """x ``[B, L, F]`` in the accumulation dtype, 0 for the tokens left out, and what its gradient needs.

    ``in_place``: the memory of ``z``, contiguous and of that dtype, may take x.
    """
    if potential.row_transform == "normalize":
        rows = _inverse_norms(norm, potential.norm_eps)
        return _zero_(left_out, z.mul_(rows.inverse) if in_place else (z * rows.inverse).contiguous()), rows
    x = _zero_(left_out, z.to(norm.dtype, copy=True, memory_format=torch.contiguous_format))
    if potential.row_transform == "standardize":
        # The rounded mean of a constant token may differ from its features; it must not be blown up to length 1.
        constant = (x == x[:, :, :1]).all(-1, keepdim=True)
        x.sub_(x.mean(-1, keepdim=True)).masked_fill_(constant, 0.0)
        rows = _inverse_norms(token_norms(x), 0.0)
        return x.mul_(rows.inverse), rows
    # Distances do not change when the mean is subtracted, and their computation from inner products cancels less.
    kept = (~left_out).sum(1).clamp(min=1).view(-1, 1, 1)
    return _zero_(left_out, x.sub_(x.sum(1, keepdim=True) / kept)), None


def _zero_(tokens: Tensor, x: Tensor) -> Tensor:
    """Sets some tokens to 0. On a CPU, where looking costs nothing, not at all where there are none."""
    return x if x.device.type == "cpu" and not tokens.any() else x.masked_fill_(tokens.unsqueeze(-1), 0.0)


def _inverse_norms(norm: Tensor, eps: float) -> Rows:
    denominator = norm + eps
    inverse = torch.where(denominator > 0, 1 / denominator, torch.zeros_like(norm))
    ratio = (denominator / norm).clamp_(max=torch.finfo(norm.dtype).max)
    return Rows(inverse, torch.where(norm > 0, ratio, torch.zeros_like(norm)))


def in_blocks(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors ``[B, L, n]``, each with its own n, in blocks of the same tokens ``[block, n]``: on a CPU so many that
    they stay in the cache between passes over them, elsewhere all."""
    tokens = values[0].shape[0] * values[0].shape[1]
    features = max(value.shape[2] for value in values)
    block = max(1, 2**19 // features) if values[0].device.type == "cpu" else max(1, tokens)
    return zip(*(value.reshape(tokens, value.shape[2]).split(block) for value in values), strict=True)
