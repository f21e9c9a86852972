"""Histogram of the cosines of all pairs of tokens within each text, in Triton."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dispersion_kernels.backends.cpu import COSINE_BINS
from dispersion_kernels.backends.triton.backend import run
from dispersion_kernels.numerics import token_norms

# Tokens of a tile, features of a step, and width of a part's bins, of which the last holds what is no pair.
BLOCK, BLOCK_F, WIDTH = 64, 32, 256


@triton.jit
def cosines_kernel(
    x_ptr,
    bounds_ptr,
    counts_ptr,
    partial_ptr,
    features,
    tiles,
    BINS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Adds the histogram of a pair of tiles of one text to ``counts`` ``[texts, 2, WIDTH]``, and writes the sums of the
    cosines and of their squares to ``partial`` ``[texts, tiles, tiles, 2, 2]``. ``x`` ``[tokens, features]`` is
    normalised; ``bounds`` is ``[texts, 3]``: begin, split, end."""
    row, column, text = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(bounds_ptr + text * 3)
    split = tl.load(bounds_ptr + text * 3 + 1)
    end = tl.load(bounds_ptr + text * 3 + 2)
    if (column < row) | (begin + column * BLOCK >= end):
        return
    i = begin + row * BLOCK + tl.arange(0, BLOCK)
    j = begin + column * BLOCK + tl.arange(0, BLOCK)
    f = tl.arange(0, BLOCK_F)
    # Tokens beyond the text are read as its last one, and are in no pair.
    left = x_ptr + tl.minimum(i, end - 1)[:, None] * features
    right = x_ptr + tl.minimum(j, end - 1)[:, None] * features
    cosine = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, features, BLOCK_F):
        inside = (start + f < features)[None, :]
        a = tl.load(left + (start + f)[None, :], mask=inside, other=0.0)
        b = tl.load(right + (start + f)[None, :], mask=inside, other=0.0)
        cosine = tl.dot(a, tl.trans(b), cosine, input_precision="ieee")
    cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    is_pair = (i[:, None] < j[None, :]) & (j[None, :] < end)
    is_content = (i >= split)[:, None] & is_pair
    bins = tl.minimum((cosine * (BINS // 2) + BINS // 2).to(tl.int32), BINS - 1)
    bins = tl.where(is_pair, tl.where(is_content, bins + WIDTH, bins), WIDTH - 1)
    histogram = tl.histogram(tl.reshape(bins, (BLOCK * BLOCK,)), 2 * WIDTH)
    # Additions of integers: the result does not depend on their order.
    tl.atomic_add(counts_ptr + text.to(tl.int64) * 2 * WIDTH + tl.arange(0, 2 * WIDTH), histogram.to(tl.int64))
    partial = partial_ptr + ((text.to(tl.int64) * tiles + row) * tiles + column) * 4
    others = is_pair & (is_content == 0)
    tl.store(partial, tl.sum(tl.where(others, cosine, 0.0)))
    tl.store(partial + 1, tl.sum(tl.where(others, cosine * cosine, 0.0)))
    tl.store(partial + 2, tl.sum(tl.where(is_content, cosine, 0.0)))
    tl.store(partial + 3, tl.sum(tl.where(is_content, cosine * cosine, 0.0)))


def pair_sums(z: Tensor, order: Tensor, begins: Tensor, splits: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and sums as of :func:`dispersion_kernels.backends.cpu.cosines`, on the CPU, of hidden states ``[rows, F]``
    in fp32, bf16 or fp16. The products are in fp32."""
    texts, device = len(begins), z.device
    x = z[order.to(device)].float()
    norm = token_norms(x)
    x = (x / norm.masked_fill(norm == 0, math.inf)).nan_to_num_(0.0)
    longest = int((ends - begins).max()) if texts else 0
    tiles = triton.cdiv(longest, BLOCK)
    counts = torch.zeros(texts, 2, WIDTH, dtype=torch.int64, device=device)
    partial = torch.zeros(texts, tiles * tiles, 2, 2, dtype=torch.float32, device=device)
    if tiles:
        bounds = torch.stack([begins, splits, ends], 1).to(device)
        arguments: dict[str, Any] = {"x_ptr": x, "bounds_ptr": bounds, "counts_ptr": counts, "partial_ptr": partial}
        constants = {"BINS": COSINE_BINS, "WIDTH": WIDTH, "BLOCK": BLOCK, "BLOCK_F": BLOCK_F}
        run(cosines_kernel, (tiles, tiles, texts), {**arguments, "features": z.shape[1], "tiles": tiles}, constants)
    sums = partial.sum(1, dtype=torch.float64).cpu()
    finite = norm.flatten().isfinite().cpu()
    for text, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        if end - begin > 1 and not finite[begin:end].all():
            sums[text] = math.nan
    return counts[:, :, :COSINE_BINS].cpu(), sums
