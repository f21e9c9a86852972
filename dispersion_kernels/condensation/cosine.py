"""Cosines of pairs of tokens: the mean in closed form, and the sums of a layer's pairs and tokens over texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.backends import cpu
from dispersion_kernels.backends.registry import choose
from dispersion_kernels.checks import beside, check_choice, check_tensor, layers_of
from dispersion_kernels.condensation.result import BINS, QUANTILES, CosineStatistics
from dispersion_kernels.numerics import accumulation_dtype, statistics_dtype, token_norms
from dispersion_kernels.potentials import AngularSpread

# Tokens normalized at a time; bounds the extra memory for sequences of any length.
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
    """:func:`mean_pairwise_cosine` of every layer's hidden states, ``[layers]``, on the device of the first layer.

    Args:
        hidden: hidden states ``[B, L, F]`` or ``[L, F]``, one tensor a layer.
        mask: boolean ``[B, L]`` or ``[L]``, of all layers.

    Raises ValueError for a wrong shape or value, TypeError for a wrong type.
    """
    if isinstance(hidden, Tensor):
        raise TypeError(
            "hidden must be a list of tensors, one a layer, got one tensor; give [hidden] where it is one layer's, "
            "hidden.unbind() where its first dimension is the layers"
        )
    layers = layers_of(hidden, "hidden")
    first = layers[0]
    return torch.stack([mean_pairwise_cosine(z, mask=beside(mask, z, first)).to(first.device) for z in layers])


class Texts(NamedTuple):
    """Tokens of the texts in hidden states ``[rows, F]``. A text's tokens stand together, those that are no content
    first: the pairs i < j of content tokens are then those with i from ``splits`` on. All tensors are int64 on the CPU.
    """

    order: Tensor
    """``[tokens]``: row of each token."""
    begins: Tensor
    """``[texts]``: place of a text's first token in ``order``."""
    splits: Tensor
    """``[texts]``: place of its first content token."""
    ends: Tensor
    """``[texts]``: place after its last token."""


def select_texts(mask: Tensor, content: Tensor) -> tuple[Texts, list[int]]:
    """:class:`Texts` from ``mask`` and ``content``, boolean ``[B, L]`` on the CPU, and the rows that have at least two
    tokens, which are the texts."""
    orders, bounds, chosen = [], [], []
    end = 0
    for row, (attended, is_content) in enumerate(zip(mask, content, strict=True)):
        tokens = attended.nonzero().flatten()
        if tokens.numel() < 2:
            continue
        text_content = is_content[tokens]
        orders.append(row * mask.shape[1] + torch.cat([tokens[~text_content], tokens[text_content]]))
        begin, end = end, end + tokens.numel()
        bounds.append((begin, end - int(text_content.sum()), end))
        chosen.append(row)
    order = torch.cat(orders) if orders else torch.empty(0, dtype=torch.int64, device="cpu")
    begins, splits, ends = torch.tensor(bounds, dtype=torch.int64, device="cpu").view(-1, 3).unbind(1)
    return Texts(order, begins.contiguous(), splits.contiguous(), ends.contiguous()), chosen


class PairSums(NamedTuple):
    """Sums over the pairs i < j of each text's tokens, on the CPU. Of the two parts, part 1 has the pairs of content
    tokens, and part 0 all other pairs."""

    counts: Tensor
    """``[texts, 2, BINS]`` int64: histogram of the cosines over [-1, 1]."""
    sums: Tensor
    """``[texts, 2, 2]`` float64: sum of the cosines and of their squares; NaN where a token is not finite."""


def pair_sums(z: Tensor, texts: Texts, impl: str = "auto") -> PairSums:
    """:class:`PairSums` of hidden states ``z`` ``[rows, F]``, of any floating dtype, in tiles of the pairs.

    A cosine beyond 1 by rounding counts as 1; a token of norm zero has cosine 0 with every other token. ``impl`` is
    ``"cpu"`` for the CPU kernel, ``"triton"`` for Triton's, ``"torch"`` for PyTorch on any device, or ``"auto"``.

    Raises:
        RuntimeError: ``impl`` cannot run here.
    """
    check_choice("impl", impl, ("auto", "triton", "cpu", "torch"))
    # The backends take the tokens that they take for a potential of the cosine.
    chosen = choose(impl, z, AngularSpread())
    if chosen == "cpu":
        return PairSums(*cpu.cosines(_evenly_spaced(z), *texts))
    if chosen == "triton":
        from dispersion_kernels.backends.triton import cosines

        return PairSums(*cosines.pair_sums(z, *texts))
    return _tiled_pair_sums(z, texts)


def _evenly_spaced(z: Tensor) -> Tensor:
    """``z`` in the form that the CPU kernel takes."""
    return z if cpu.row_stride(z) is not None else z.contiguous()


# Tokens of a tile of the PyTorch version: its 2^18 cosines and their bins take 5 MiB.
TILE = 512


def _tiled_pair_sums(z: Tensor, texts: Texts) -> PairSums:
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    number = len(texts.begins)
    counts = torch.zeros(number, 2, BINS, dtype=torch.int64, device=z.device)
    sums = torch.zeros(number, 2, 2, dtype=statistics_dtype(z.device), device=z.device)
    order = texts.order.to(z.device)
    bounds = torch.stack(texts[1:], 1).tolist()
    for text, (begin, split, end) in enumerate(bounds):
        x = z[order[begin:end]].to(dtype)
        norm = token_norms(x)
        x = x / norm.masked_fill(norm == 0, math.inf)
        tiles = [
            (part, first, min(first + TILE, last))
            for part, (start, last) in enumerate(((0, split - begin), (split - begin, end - begin)))
            for first in range(start, last, TILE)
        ]
        for part, first, last in tiles:
            for column in range(first, end - begin, TILE):
                cosine = (x[first:last] @ x[column : column + TILE].T).clamp(-1, 1)
                if column == first:
                    above = torch.ones_like(cosine, dtype=torch.bool).triu(1)
                    cosine = cosine[above]
                bins = (cosine * (BINS // 2) + BINS // 2).nan_to_num(0).to(torch.int64).clamp_(max=BINS - 1)
                counts[text, part] += torch.bincount(bins.flatten(), minlength=BINS)
                wide = cosine.to(sums.dtype)
                sums[text, part] += torch.stack([wide.sum(), wide.square().sum()])
    return PairSums(counts.cpu(), sums.to("cpu", torch.float64))


class LayerSums:
    """Sums of one layer over texts, from which its statistics follow. The memory is that of a histogram, of a mean for
    each text, and of half a matrix F x F in float64."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2, BINS, dtype=torch.int64, device="cpu")
        self.sums = torch.zeros(2, 2, dtype=torch.float64, device="cpu")
        self.text_means: list[tuple[float, float]] = []
        """Means of each text's pairs, of all tokens and of content tokens; NaN without a pair."""
        self._moments: _Moments | None = None

    def add(self, z: Tensor, texts: Texts) -> int | None:
        """Adds hidden states ``[rows, F]``. Returns the number of the first text with a token that is not finite, of
        which there must be none, or None."""
        counts, sums = pair_sums(z, texts)
        if not (finite := sums.isfinite().all(-1).all(-1)).all():
            return int(finite.long().argmin())
        self.counts += counts.sum(0)
        self.sums += sums.sum(0)
        pairs = counts.sum(-1)
        totals = torch.stack([sums[:, :, 0].sum(1), sums[:, 1, 0]], 1)
        means = totals / torch.stack([pairs.sum(1), pairs[:, 1]], 1)
        self.text_means += [(mean, content) for mean, content in means.tolist()]
        content = torch.cat([torch.arange(split, end, device="cpu") for split, end in zip(*texts[2:], strict=True)])
        if len(content):
            self._moments = self._moments or _Moments(z, texts.order[content])
            self._moments.add(z, texts.order[content])
        return None

    def cosines(self, content: bool, interval: tuple[float, float]) -> CosineStatistics | None:
        """Statistics of all pairs or of those of content tokens; None without a pair."""
        counts, sums = (self.counts[1], self.sums[1]) if content else (self.counts.sum(0), self.sums.sum(0))
        pairs = int(counts.sum())
        if pairs == 0:
            return None
        text_means = tuple(means[content] for means in self.text_means)
        present = [mean for mean in text_means if not math.isnan(mean)]
        mean, square = (sums / pairs).tolist()
        return CosineStatistics(
            pairs=pairs,
            mean=math.fsum(present) / len(present),
            interval=interval,
            standard_deviation=math.sqrt(max(square - mean * mean, 0.0)),
            quantiles=_quantiles(counts.tolist()),
            histogram=tuple(counts.tolist()),
            text_means=text_means,
        )

    def geometry(self) -> tuple[float, float, float]:
        """Effective rank, share of the first direction, and mean norm of the content tokens; NaN without any."""
        if self._moments is None:
            return math.nan, math.nan, math.nan
        shares = self._moments.shares()
        entropy = -torch.special.xlogy(shares, shares).sum()
        return float(entropy.exp()), float(shares.max()), self._moments.norms / self._moments.tokens


class _Moments:
    """First and second moments of tokens ``[tokens, F]``, about the mean of the first tokens: about zero, the mean of
    condensed tokens would cancel most digits of the covariance. Only blocks on and above the diagonal are kept."""

    BLOCK = 128

    def __init__(self, z: Tensor, order: Tensor) -> None:
        self.dtype = accumulation_dtype(z.dtype)
        self.wide = statistics_dtype(z.device)
        features = z.shape[1]
        self.shift = z.index_select(0, order.to(z.device)).to(self.dtype).mean(0)
        self.total = torch.zeros(features, dtype=self.wide, device=z.device)
        self.blocks = [
            torch.zeros(min(self.BLOCK, features - k), features - k, dtype=self.wide, device=z.device)
            for k in range(0, features, self.BLOCK)
        ]
        self.norms, self.tokens = 0.0, 0

    def add(self, z: Tensor, order: Tensor) -> None:
        """Adds the tokens ``z[order]``."""
        self.tokens += len(order)
        if choose("auto", z, AngularSpread()) == "cpu" and self.dtype == torch.float32:
            self.norms += cpu.moments(_evenly_spaced(z), order, self.shift, self.total, self.blocks)
            return
        tokens = z.index_select(0, order.to(z.device))
        self.norms += float(token_norms(tokens).sum(dtype=self.wide))
        x = tokens.to(self.dtype) - self.shift
        self.total += x.sum(0)
        for number, block in enumerate(self.blocks):
            k = number * self.BLOCK
            block += x[:, k : k + self.BLOCK].T @ x[:, k:]

    def shares(self) -> Tensor:
        """Eigenvalues' shares of the trace of the covariance, ``[F]``; NaN where all tokens are equal."""
        features = len(self.total)
        moment = torch.zeros(features, features, dtype=torch.float64, device="cpu")
        for number, block in enumerate(self.blocks):
            k = number * self.BLOCK
            moment[k : k + len(block), k:] = block
        offset = self.total.to("cpu", torch.float64) / self.tokens
        covariance = moment.div_(self.tokens).sub_(offset.outer(offset))
        values = torch.linalg.eigvalsh(covariance, UPLO="U").clamp(min=0)
        shares: Tensor = values / values.sum()
        return shares


def _quantiles(counts: list[int]) -> tuple[float, ...]:
    """Quantiles at :data:`QUANTILES`, with the pairs of a bin spread evenly over it."""
    width, pairs, values = 2 / BINS, sum(counts), []
    for probability in QUANTILES:
        below = 0
        for number, count in enumerate(counts):
            if below + count >= probability * pairs and count:
                values.append(-1 + width * (number + (probability * pairs - below) / count))
                break
            below += count
    return tuple(values)
