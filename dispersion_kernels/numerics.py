"""Numerics shared by the backends and the sampler: dtypes, norms, row transforms, and losses from sums over pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.potentials import Potential


def log_mean_loss(potential: Potential, log_total: Tensor, shift: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Loss from ``log_total``, the logarithm of the sum of psi over ``count`` pairs; and the factor of the slopes of
    psi / exp(shift) in the gradient."""
    log_mean = log_total - count.log()
    return log_mean + potential.loss_offset, 2 / count * (shift - log_mean).exp()


def mean_loss(potential: Potential, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Loss from ``total``, the sum of psi over ``count`` pairs; and the factor of the slopes of psi in the gradient."""
    mean = total / count
    if potential.reduction == "log_mean":
        return mean.log() + potential.loss_offset, 2 / count / mean
    return mean, 2 / count


def loss_weight(layers: int, reduction: str, with_pairs: int | Tensor) -> float | Tensor:
    """Weight of each sequence's loss: 1 / (layers * with_pairs) for ``reduction="mean"``, 1 / layers otherwise.

    ``with_pairs`` counts the sequences of a layer that have a pair. A tensor gives a tensor in
    :func:`statistics_dtype`.
    """
    if reduction != "mean":
        return 1 / layers
    if isinstance(with_pairs, Tensor):
        return 1 / (layers * with_pairs.clamp(min=1).to(statistics_dtype(with_pairs.device)))
    return 1 / (layers * max(1, with_pairs))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over features and pairs: fp64 for fp64 tokens, fp32 for narrower ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_under_autocast(dtype: torch.dtype, device_type: str, autocast: torch.dtype | None) -> torch.dtype:
    """Dtype in which the loss takes hidden states of ``dtype``: on a GPU that of autocast, as a matrix product does,
    which leaves fp64 alone, too; elsewhere their own. ``autocast`` is None where it is off."""
    if autocast is None or device_type != "cuda" or dtype == torch.float64:
        return dtype
    return autocast


def loss_dtype(z: Tensor) -> torch.dtype:
    """Dtype in which the loss takes ``z`` here and now: :func:`dtype_under_autocast`."""
    on = z.is_cuda and torch.is_autocast_enabled("cuda")
    return dtype_under_autocast(z.dtype, z.device.type, torch.get_autocast_dtype("cuda") if on else None)


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Dtype of per-sequence numbers, of which there are few: fp64; fp32 on MPS, which has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def token_norms(z: Tensor) -> Tensor:
    """Norms ``[..., 1]`` of tokens ``[..., F]`` in the accumulation dtype; 0 below the dtype's smallest normal number.

    Tokens whose squares may leave the dtype's range, though their norm does not, are scaled before they are squared.
    """
    dtype = accumulation_dtype(z.dtype)
    tiny = torch.finfo(dtype).tiny
    norm: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=dtype)
    ordinary = (norm > tiny**0.4) & norm.isfinite()
    if z.numel() == 0 or (z.device.type == "cpu" and ordinary.all()):  # reading a value does not synchronise on a CPU
        return norm
    largest = torch.linalg.vector_norm(z, math.inf, dim=-1, keepdim=True, dtype=dtype)
    scale = torch.where((largest >= tiny) & largest.isfinite(), 1 / largest, 1.0)
    scaled = torch.linalg.vector_norm(z * scale, dim=-1, keepdim=True) / scale
    return torch.where(ordinary, norm, scaled.masked_fill_(scaled < tiny, 0.0))


def sum_of_tokens(values: Tensor) -> Tensor:
    """Sums ``[B]`` of values ``[B, L]``, in parts of 2^14 tokens: PyTorch divides longer sums among threads, and the
    bits of the result would depend on the number of threads."""
    parts = values.split(2**14, 1)
    return torch.stack([part.sum(1) for part in parts], 1).sum(1) if len(parts) > 1 else values.sum(1)


class Rows(NamedTuple):
    """Factors per token, ``[B, L, 1]``, for the gradient of the row transform; r is the norm before the division."""

    inverse: Tensor
    """1 / (r + eps); 0 where r + eps is not positive, which makes x 0."""
    ratio: Tensor
    """(r + eps) / r; 0 where r is 0."""


def transform(
    z: Tensor, norm: Tensor, potential: Potential, left_out: Tensor, in_place: bool = False
) -> tuple[Tensor, Rows | None]:
    """Row-transformed tokens x ``[B, L, F]`` in the accumulation dtype, and the :class:`Rows` of their gradient (None
    for ``row_transform="none"``). x is 0 where ``left_out`` ``[B, L]`` is True.

    ``in_place`` allows x to take the memory of ``z``, which must be contiguous and of the accumulation dtype.
    """
    if potential.row_transform == "normalize":
        rows = _inverse_norms(norm, potential.norm_eps)
        return _zero_(left_out, z.mul_(rows.inverse) if in_place else (z * rows.inverse).contiguous()), rows
    x = _zero_(left_out, z.to(norm.dtype, copy=True, memory_format=torch.contiguous_format))
    if potential.row_transform == "standardize":
        # A constant token's rounded mean may differ from its features; the difference must not be scaled to length 1.
        constant = (x == x[:, :, :1]).all(-1, keepdim=True)
        x.sub_(x.mean(-1, keepdim=True)).masked_fill_(constant, 0.0)
        rows = _inverse_norms(token_norms(x), 0.0)
        return x.mul_(rows.inverse), rows
    # Subtracting the mean leaves distances unchanged and reduces the cancellation in their inner products.
    kept = (~left_out).sum(1).clamp(min=1).view(-1, 1, 1)
    return _zero_(left_out, x.sub_(x.sum(1, keepdim=True) / kept)), None


def _zero_(tokens: Tensor, x: Tensor) -> Tensor:
    """Sets ``x`` ``[B, L, F]`` to 0 where ``tokens`` ``[B, L]`` is True. On a CPU, where reading a value does not
    synchronise, an all-False ``tokens`` skips the pass over ``x``."""
    return x if x.device.type == "cpu" and not tokens.any() else x.masked_fill_(tokens.unsqueeze(-1), 0.0)


def _inverse_norms(norm: Tensor, eps: float) -> Rows:
    denominator = norm + eps
    inverse = torch.where(denominator > 0, 1 / denominator, torch.zeros_like(norm))
    ratio = (denominator / norm).clamp_(max=torch.finfo(norm.dtype).max)
    return Rows(inverse, torch.where(norm > 0, ratio, torch.zeros_like(norm)))


def in_blocks(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks ``[block, n]`` of the same tokens of each tensor ``[B, L, n]``; n may differ between tensors. On a CPU a
    block has at most 2^19 elements per tensor, so that it stays in the cache between passes; elsewhere one block holds
    all tokens."""
    tokens = values[0].shape[0] * values[0].shape[1]
    features = max(value.shape[2] for value in values)
    block = max(1, 2**19 // features) if values[0].device.type == "cpu" else max(1, tokens)
    return zip(*(value.reshape(tokens, value.shape[2]).split(block) for value in values), strict=True)
