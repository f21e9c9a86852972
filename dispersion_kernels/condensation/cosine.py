"""Cosines of pairs of tokens: the mean in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dispersion_kernels.checks import beside, check_tensor, layers_of
from dispersion_kernels.numerics import token_norms

# Tokens normalised at a time; bounds the extra memory for sequences of any length.
CHUNK = 4096


@torch.no_grad()
def mean_pairwise_cosine(z: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean cosine over the pairs i != j of each sequence's tokens, averaged over the sequences; a scalar.

    With unit vectors ``x_i = z_i / |z_i|`` the sum over all pairs has a closed form::

        sum_{i != j} x_i . x_j = |sum_i x_i|^2 - sum_i |x_i|^2

    The mean over L (L - 1) pairs is therefore exact in O(L F) time, and its memory does not grow with L^2.
    A token of norm zero has cosine 0 with every other token.

    Args:
        z: hidden states, ``[B, L, F]`` or ``[L, F]``, any floating dtype.
        mask: boolean, ``[B, L]`` or ``[L]``; only tokens where ``mask`` is True take part.

    Returns:
        A scalar, float64 for float64 input and float32 otherwise. Sequences with fewer than two tokens do not count;
        the result is NaN where no sequence counts.

    Source: Liu et al., ICML 2026, arXiv 2602.00217 (the measure; the closed form is elementary).
    """
    check_tensor("z", z, "hidden states [B, L, F] or [L, F]", "of a list of layers, take condensation_by_layer")
    if z.layout != torch.strided or z.is_nested:
        raise TypeError("z must be a dense tensor, got a nested or sparse one")
    if z.ndim not in (2, 3) or not z.is_floating_point() or z.shape[-1] < 1:
        raise ValueError(f"z must be floating point of shape [B, L, F] or [L, F], got {z.dtype} {list(z.shape)}")
    if mask is not None:
        check_tensor("mask", mask, "boolean with one entry a token", "give torch.as_tensor(mask)")
        if mask.dtype != torch.bool or mask.shape != z.shape[:-1]:
            raise ValueError(
                f"mask must be boolean of shape {list(z.shape[:-1])}, as z without its features, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        if mask.device != z.device:
            raise ValueError(f"mask is on {mask.device}; it must be on {z.device}, with z")
    if z.ndim == 2:
        z, mask = z[None], None if mask is None else mask[None]

    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    total = z.new_zeros(z.shape[0], z.shape[2], dtype=dtype)
    squares = z.new_zeros(z.shape[0], dtype=dtype)
    for start in range(0, z.shape[1], CHUNK):
        x = z[:, start : start + CHUNK].to(dtype)
        if mask is not None:
            x = x.masked_fill(~mask[:, start : start + CHUNK, None], 0)
        norm = token_norms(x)
        x = x / norm.masked_fill(norm == 0, math.inf)
        total += x.sum(1)
        squares += x.square().sum((1, 2))
    tokens = torch.full_like(squares, z.shape[1]) if mask is None else mask.sum(1).to(dtype)
    pairs = tokens * (tokens - 1)
    mean = (total.square().sum(1) - squares) / pairs.clamp(min=1)
    counted = pairs > 0
    return mean.masked_fill(~counted, 0).sum() / counted.sum()


def condensation_by_layer(hidden: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """:func:`mean_pairwise_cosine` of every layer's hidden states, ``[layers]``, on the device of the first layer."""
    if isinstance(hidden, Tensor):
        raise TypeError(
            "hidden must be a list of tensors, one a layer, got one tensor; give [hidden] where it is one layer's, "
            "hidden.unbind() where its first dimension is the layers"
        )
    layers = layers_of(hidden, "hidden")
    first = layers[0]
    return torch.stack([mean_pairwise_cosine(z, mask=beside(mask, z, first)).to(first.device) for z in layers])
