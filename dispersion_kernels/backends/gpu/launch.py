"""The launcher of the GPU backends: the strategy, the schedule and the order of the kernels.

*Workspace*: the similarities of the upper triangle of tiles, whose slopes go to a workspace of bounded size, and
library matrix products of the workspace with the tokens; 3 L^2 F FLOPs per row. *Fused*: one kernel that keeps a tile's
gradient in registers and stores no slope, for few features and for packed sequences; 2 (1 + n) L^2 F FLOPs per row,
where n is the number of slices of the features. The launcher reads no value back from the device, and every launch
depends on shapes alone, so a CUDA graph can capture a call.

A *row* is one sequence of L tokens of one layer: row r is batch ``r % batch`` of layer ``r // batch``. A backend
implements :class:`Kernels`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dispersion_kernels.backends.gpu.epilogues import Epilogue, epilogue_of
from dispersion_kernels.backends.interface import Losses
from dispersion_kernels.numerics import log_mean_loss, loss_weight, mean_loss
from dispersion_kernels.potentials import L2Repel, PerplexityEntropy, Potential
from dispersion_kernels.segments import on_device, pair_id_counts, segment_of_token, within_segments

# Size of the workspace of slopes: small enough for the last-level cache, large enough to fill the machine.
WORKSPACE_BYTES = 32 << 20
# Most features for which the fused kernel, with 4 L^2 F FLOPs, should cost less than the workspace, with 3 L^2 F
# and the traffic of slopes.
_FUSED_FEATURES = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}
# CUDA's gridDim.y limit.
MAX_ROWS = 65_535
_LN2 = math.log(2)
_NO_PAIR_ID = 2**31 - 1


@dataclass(frozen=True)
class Tokens:
    """Input of the kernels: the layers, all alike."""

    layers: list[Tensor]
    """Layers ``[B, L, W]``, as :func:`aligned` gives them."""
    features: int
    """Number F of features; the W - F others are 0."""

    @property
    def batch(self) -> int:
        return self.layers[0].shape[0]

    @property
    def length(self) -> int:
        return self.layers[0].shape[1]

    @property
    def width(self) -> int:
        return self.layers[0].shape[2]

    @property
    def rows(self) -> int:
        return self.batch * len(self.layers)


@dataclass(frozen=True)
class Statistics:
    """Statistics of the tokens, ``[rows, L]`` fp32: norm r, inverse, and a second number, extra.

    ``normalize``: r = |z|, inverse 1 / (r + eps), or 0, extra a tiny number that equal tokens share and other tokens
    hardly ever do, or -q for a zero token. ``standardize``: r = |z - mean|, inverse 1 / r, or 0 for a constant token,
    extra mean sqrt(F). ``none``: r = |z|, inverse 1, extra q r^2. r is infinite where later results leave the range of
    fp32.
    """

    norm: Tensor
    inverse: Tensor
    extra: Tensor
    weight_inverse: Tensor
    """``inverse`` times a power of two, so that slopes times ``weight_inverse`` are in the range of fp16."""
    weight_scale: Tensor | None
    """Power of two in ``weight_inverse``, ``[rows, 1]``; None for 1."""


@dataclass(frozen=True)
class Region:
    """The pairs of tiles of one launch of ``pair_tiles``."""

    rows: int
    programs: int
    """Programs per row: the triangle of ``tiles_i`` folded to a rectangle, or ``tiles_i * tiles_j``."""
    tiles_i: int
    tiles_j: int = 0
    triangle: bool = True
    first_row: int = 0
    first_i: int = 0
    first_j: int = 0
    first_sum: int = 0


class TileShape(Protocol):
    @property
    def block(self) -> int: ...


class RowShape(Protocol):
    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...


@dataclass(frozen=True)
class Entropy:
    """Statistics of each token's distribution P, ``[rows, L]``, for the later passes of perplexity_entropy."""

    largest: Tensor
    """Largest exponent, of base 2."""
    total: Tensor
    """Sum of the exponentials relative to ``largest``."""
    average: Tensor
    """Mean of P, 1 / the number of partners."""
    eps: float
    expected: Tensor | None
    """Expectation ``sum_j P_ij g_ij``, for the gradient; None before it is known."""


@dataclass(frozen=True)
class Inputs:
    """Inputs that all launches over the pairs of a call have."""

    tokens: Tokens
    epilogue: Epilogue
    statistics: Statistics
    pair_ids: Tensor | None
    """Pair ids, ``[B, L]`` int32; None where all tokens of a row pair."""


class PairTilesCall(NamedTuple):
    """Arguments of ``pair_tiles``, which computes the sum of psi over each pair of tiles and, if asked, the slopes."""

    inputs: Inputs
    shape: Any
    """:class:`TileShape` of the backend."""
    region: Region
    sums: Tensor
    """Partial sums of psi, ``[rows, programs]``; output."""
    maxima: Tensor | None
    """Largest exponents, ``[rows, programs]``, that ``sums`` are relative to; output."""
    shift: Tensor | None
    """Number that is subtracted from the exponents of a row, ``[rows, 1]``."""
    pair_id_ranges: Tensor | None
    """Least and largest pair id of each tile, ``[B, tiles, 2]`` int32."""
    weights: Tensor | None
    """Slopes times the inverse norm of the column, ``[rows, N, N]`` in the dtype of the tokens; output. N is a multiple
    of the block; elements beyond the last token may be written, too."""
    mirror: Tensor | None
    """``weights`` of the pairs (j, i); output."""


class RowSweepCall(NamedTuple):
    """Arguments of ``row_sweep``, which computes sums of each token over its pairs, ``[rows, L]``, and its gradient."""

    inputs: Inputs
    shape: Any
    """:class:`RowShape` of the backend."""
    which: str
    """``"loss"``, ``"online"``, ``"gradient"`` or, for perplexity_entropy, ``"partition"``, ``"entropy"`` or
    ``"entropy_gradient"``."""
    sums: Tensor | None
    """Sums of psi, or of the pass; output."""
    maxima: Tensor | None
    """Largest exponents; output."""
    shift: Tensor | None
    """Number that is subtracted from the exponents of a token, ``[rows, L]``."""
    tile_ranges: Tensor | None
    """Tiles that each tile may pair with: the first, and one past the last, ``[B, tiles, 2]`` int32."""
    entropy: Entropy | None
    """Results of earlier passes of perplexity_entropy."""
    weight_sums: Tensor | None
    """Sums of the weights; output."""
    gradients: Sequence[Tensor]
    """Gradient of each layer, ``[B, L, F]``, without its scale and the row transform; output. Empty for none."""


class Kernels(Protocol):
    """Interface of a backend for one dtype: five kernels and the sizes of their tiles.

    Statistics and sums are fp32. Outputs that are None are not computed, inputs that are None not read.
    """

    max_layers: int
    """Most layers of one launch."""

    @property
    def alignment(self) -> int:
        """Common divisor, in elements, that the width and the strides of the tokens must have."""

    def tile_shape(self, has_pair_ids: bool) -> TileShape: ...
    def row_shape(self, features: int, perplexity: bool, gradient: bool) -> RowShape: ...

    def tuned(self, strategy: str, what: tuple[Any, ...], shape: Any, launch: Callable[[Any], Any]) -> Any:
        """``shape``, or a shape that is faster on the device, found by timing ``launch``; ``what`` is the key of the
        decision."""

    def row_statistics(
        self, tokens: Tokens, epilogue: Epilogue, norm: Tensor, inverse: Tensor, extra: Tensor
    ) -> None: ...

    def pair_tiles(self, call: PairTilesCall) -> Any: ...
    def row_sweep(self, call: RowSweepCall) -> Any: ...

    def sequence_sums(
        self,
        length: int,
        norm: Tensor,
        sums: Tensor,
        maxima: Tensor | None,
        bounds: Tensor | None,
        total: Tensor,
        shift: Tensor | None,
    ) -> None: ...

    def project(self, inputs: Inputs, weight_sums: Tensor | None, gradients: Sequence[Tensor]) -> None: ...


class SequenceLosses(NamedTuple):
    """SequenceLosses and gradients of all layers."""

    loss: Tensor
    """Loss of each sequence, ``[layers, S]`` fp64; 0 without a pair."""
    pairs: Tensor
    """Number of ordered pairs of each sequence, ``[S]`` int64."""
    gradients: list[Tensor]
    """Gradient of each layer without its scale, ``[B, L, F]`` fp32; empty if no gradient was asked for."""
    scale: Tensor | None
    """Factor of each token's gradient, ``[layers, B, L]`` fp32."""


def fp32_precision() -> str:
    """Precision of the kernels' fp32 products, that of PyTorch's matrix products: ``"tf32"``, or ``"tf32x3"``, three
    tf32 products.

    It is read from ``torch.backends.cuda.matmul.fp32_precision``, which reflects whichever of PyTorch's settings was
    set last; ``torch.get_float32_matmul_precision()`` raises after one of the newer settings, as
    ``torch.backends.fp32_precision``.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def run(
    kernels_for: Callable[[Tensor], Kernels],
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    with_grad: Sequence[bool],
) -> Losses:
    """:data:`~dispersion_kernels.backends.interface.Run` of the kernels that ``kernels_for`` makes for tokens."""
    with torch.cuda.device_of(layers[0]):  # Triton launches on the current device
        kernels = kernels_for(layers[0])
        loss, pairs, gradients, scale = dispersion(layers, potential, pair_ids, cu_seqlens, any(with_grad), kernels)
    weight = loss_weight(len(layers), reduction, (pairs > 0).sum())
    total = (loss.sum(0) if reduction == "none" else loss.sum()) * weight
    grads = [gradients[n] if need else None for n, need in enumerate(with_grad)]
    return total.float(), grads, None if scale is None else scale * weight


def dispersion(
    layers: Sequence[Tensor],
    potential: Potential,
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    with_grad: bool,
    kernels: Kernels,
) -> SequenceLosses:
    """Loss of each sequence of each layer and, if asked, its gradient.

    Args:
        layers: hidden states ``[B, L, F]``, all alike.
        potential, pair_ids, cu_seqlens: as in :mod:`dispersion_kernels.segments`.
        with_grad: whether to compute the gradient.
        kernels: the kernels of the backend.
    """
    batch, length, _ = layers[0].shape
    if batch == 0 or length < 2:
        return _nothing(layers, cu_seqlens, with_grad)
    if len(layers) > kernels.max_layers:
        halves = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        return _join_layers([dispersion(half, potential, pair_ids, cu_seqlens, with_grad, kernels) for half in halves])
    if batch > 1 and len(layers) * batch > MAX_ROWS:
        parts = [slice(0, batch // 2), slice(batch // 2, batch)]
        return _join_batches(
            [
                dispersion(
                    [z[part] for z in layers],
                    potential,
                    None if pair_ids is None else pair_ids[part],
                    None,
                    with_grad,
                    kernels,
                )
                for part in parts
            ]
        )
    if cu_seqlens is not None:
        cu_seqlens = on_device(cu_seqlens, layers[0].device).to(torch.int32)  # the dtype that compiled kernels read
        pair_ids = within_segments(pair_ids, cu_seqlens, length)
    call = _Call(layers, potential, pair_ids, cu_seqlens, kernels)
    call.row_statistics()
    if isinstance(potential, PerplexityEntropy):
        loss, scale = call.perplexity_entropy(potential, with_grad)
    else:
        loss, scale = call.pair_sums(with_grad)
    return call.finish(loss, scale, with_grad)


def aligned(layers: Sequence[Tensor], alignment: int) -> list[Tensor]:
    """Layers ``[B, L, W]`` from ``[B, L, F]``, with common strides that allow loads of 16 bytes.

    Features are contiguous; W and the strides of tokens are multiples of ``alignment`` elements. Layers that are so
    already are returned themselves; else all are copied, with zeros beyond F. A copy costs one pass over the tokens,
    where a kernel makes one pass for each of its tiles.
    """
    z = layers[0]
    features, strides = z.shape[2], z.stride()
    width = alignment * _blocks(features, alignment)
    steps = [step for step, size in zip(strides[:2], z.shape[:2], strict=True) if size > 1]
    if (
        width == features
        and strides[2] == 1
        and all(step % alignment == 0 for step in steps)
        and all(other.stride() == strides and other.data_ptr() % 16 == 0 for other in layers)
    ):
        return list(layers)
    copies = []
    for z in layers:
        copy = z.new_empty(*z.shape[:2], width)
        copy[:, :, :features] = z
        copy[:, :, features:] = 0
        copies.append(copy)
    return copies


def _nothing(layers: Sequence[Tensor], cu_seqlens: Tensor | None, with_grad: bool) -> SequenceLosses:
    z = layers[0]
    sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return SequenceLosses(
        torch.zeros(len(layers), sequences, dtype=torch.float64, device=z.device),
        torch.zeros(sequences, dtype=torch.int64, device=z.device),
        [torch.zeros_like(z, dtype=torch.float32) for z in layers] if with_grad else [],
        torch.zeros(len(layers), *z.shape[:2], dtype=torch.float32, device=z.device) if with_grad else None,
    )


def _join_layers(parts: list[SequenceLosses]) -> SequenceLosses:
    scales = [part.scale for part in parts if part.scale is not None]
    return SequenceLosses(
        torch.cat([part.loss for part in parts]),
        parts[0].pairs,
        [gradient for part in parts for gradient in part.gradients],
        torch.cat(scales) if scales else None,
    )


def _join_batches(parts: list[SequenceLosses]) -> SequenceLosses:
    scales = [part.scale for part in parts if part.scale is not None]
    return SequenceLosses(
        torch.cat([part.loss for part in parts], 1),
        torch.cat([part.pairs for part in parts]),
        [torch.cat(pieces) for pieces in zip(*(part.gradients for part in parts), strict=True)],
        torch.cat(scales, 1) if scales else None,
    )


class _Call:
    """State that the kernels of one call share."""

    def __init__(
        self,
        layers: Sequence[Tensor],
        potential: Potential,
        pair_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        kernels: Kernels,
    ) -> None:
        z = layers[0]
        self.layers = aligned(layers, kernels.alignment)
        self.potential, self.cu_seqlens, self.kernels = potential, cu_seqlens, kernels
        self.batch, self.length, self.features = z.shape
        self.rows = self.batch * len(layers)
        self.device, self.dtype = z.device, z.dtype
        self.epilogue: Epilogue = epilogue_of(potential, self.features, narrow_range=z.dtype == torch.float16)
        self.partners: Tensor | None = None
        self.pair_ids: Tensor | None = None
        self._pair_id_ranges: dict[int, Tensor] = {}
        if pair_ids is not None:
            self.partners = pair_id_counts(pair_ids) - 1
            self.pair_ids = _dense(pair_ids)
        self.segment = None if cu_seqlens is None else segment_of_token(cu_seqlens, self.length)
        # Sequences per row, S in shapes: 1, or the number of segments of cu_seqlens.
        self.sequences = 1 if cu_seqlens is None else cu_seqlens.numel() - 1

    # ---- statistics

    def row_statistics(self) -> None:
        norm, inverse, extra = self._row_statistics()
        if self.partners is not None:
            # Tokens without a partner must neither reach other tokens through 0 * NaN nor make the loss NaN. Tokens
            # with a partner that are not finite make the loss NaN, but do not reach other tokens.
            alone = self.partners <= 0
            norm.view(-1, self.batch, self.length).masked_fill_(alone, 0.0)
            left_out = ~norm.isfinite().view(-1, self.batch, self.length) | alone
            inverse.view(left_out.shape).masked_fill_(left_out, 0.0)
            extra.view(left_out.shape).masked_fill_(left_out, 0.0)
            masked = [z.masked_fill(out.unsqueeze(-1), 0.0) for z, out in zip(self.layers, left_out, strict=True)]
            self.layers = aligned(masked, self.kernels.alignment)
        self.tokens = self.layers
        if self.epilogue.transform == "none" and self.dtype == torch.float32:
            # Subtracting the mean leaves distances as they are and makes them cancel less. In 16 bits the difference
            # would be rounded.
            self.layers = aligned([z - z.mean(1, keepdim=True) for z in self.layers], self.kernels.alignment)
            _, _, extra = self._row_statistics()
        weight_inverse, weight_scale = inverse, None
        if self.dtype == torch.float16:
            largest = inverse.amax(1, keepdim=True)
            largest_exponent = torch.where(largest > 0, largest, 1.0).log2().floor()
            weight_scale = torch.exp2(self.epilogue.weight_exponent - largest_exponent)
            weight_inverse = inverse * weight_scale
        self.statistics = Statistics(norm, inverse, extra, weight_inverse, weight_scale)
        self.inputs = Inputs(Tokens(self.layers, self.features), self.epilogue, self.statistics, self.pair_ids)

    def _row_statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        norm, inverse, extra = (self._empty_statistic() for _ in range(3))
        self.kernels.row_statistics(Tokens(self.layers, self.features), self.epilogue, norm, inverse, extra)
        return norm, inverse, extra

    # ---- potentials that are a sum over pairs

    def pair_sums(self, with_grad: bool) -> tuple[Tensor, Tensor]:
        """Loss and scale of each sequence of each row, ``[rows, S]``; G goes to ``self.gradients``."""
        epilogue, potential = self.epilogue, self.potential
        packed = self.cu_seqlens is not None
        total: Tensor | None = None
        maximum: Tensor | None = None
        if epilogue.online or not with_grad:
            total, maximum = self._loss_of_rows() if packed else self._loss_of_tiles()
        if with_grad:
            fused = packed or self.features <= _FUSED_FEATURES[self.dtype]
            sums = self._gradient_fused(maximum) if fused else self._gradient_by_workspace(maximum)
            total = sums if total is None else total
        assert total is not None
        count = self._pairs.clamp(min=1).double()
        if not epilogue.exponential:
            return mean_loss(potential, total, count)
        shift = torch.full_like(total, epilogue.shift)
        if maximum is not None:
            shift += maximum * _LN2
        if getattr(potential, "include_diagonal", False):
            total = total + self._paired_tokens
        return log_mean_loss(potential, total.log() + shift, shift, count)

    def _loss_of_tiles(self) -> tuple[Tensor, Tensor | None]:
        shape = self._tile_shape()
        region = self._triangle(shape, self.rows)
        sums, maxima = self._partial_sums(region.programs)
        self._pair_tiles(shape, region, sums, maxima)
        return self._sequence_sums(sums, maxima)

    def _loss_of_rows(self) -> tuple[Tensor, Tensor | None]:
        sums, maxima = self._partial_sums(self.length)
        self._row_sweep(self._row_shape(False), "online" if self.epilogue.online else "loss", sums=sums, maxima=maxima)
        return self._sequence_sums(sums, maxima)

    def _gradient_fused(self, maximum: Tensor | None) -> Tensor:
        sums = self._empty_statistic()
        self.weight_sums = self._empty_statistic() if self.epilogue.transform == "none" else None
        self.gradients = [self._empty_gradient() for _ in self.layers]
        shape = self.kernels.tuned(
            "fused",
            self._tuned_for(),
            self._row_shape(True),
            lambda candidate: self._row_sweep(candidate, "gradient", sums=sums),
        )
        shift = None if maximum is None else self._spread(maximum).contiguous()
        self._row_sweep(shape, "gradient", sums=sums, shift=shift)
        return self._sequence_sums(sums, None)[0]

    def _gradient_by_workspace(self, maximum: Tensor | None) -> Tensor:
        shape = self._tile_shape()
        self.weight_sums = torch.zeros_like(self.statistics.norm) if self.epilogue.transform == "none" else None
        self.gradients = [self._empty_gradient() for _ in self.layers]
        padded = shape.block * _blocks(self.length, shape.block)  # whole tiles: stores have 16 bytes and no mask
        matrix = padded**2 * self.dtype.itemsize
        if matrix <= WORKSPACE_BYTES:
            return self._rows_by_workspace(shape, maximum, padded, WORKSPACE_BYTES // matrix)
        return self._blocks_by_workspace(shape, maximum)

    def _rows_by_workspace(self, shape: TileShape, maximum: Tensor | None, padded: int, together: int) -> Tensor:
        """Workspace strategy with several rows at a time; the workspace holds all slopes of a row."""
        sums, _ = self._partial_sums(self._triangle(shape, 1).programs)
        workspace = torch.empty(min(together, self.rows), padded, padded, dtype=self.dtype, device=self.device)
        for first in range(0, self.rows, together):
            rows = min(together, self.rows - first)
            region = self._triangle(shape, rows, first)
            self._pair_tiles(shape, region, sums, None, maximum, weights=workspace, mirror=workspace)
            for begin, end in _runs_of_layers(first, first + rows, self.batch):
                weights = workspace[begin - first : end - first, : self.length, : self.length]
                layer, b = divmod(begin, self.batch)
                batches = slice(b, b + end - begin)
                z = self.layers[layer][batches, :, : self.features]
                _product_(self.gradients[layer][batches], weights, z, add=False)
                if self.weight_sums is not None:
                    torch.sum(weights, 2, dtype=torch.float32, out=self.weight_sums[begin:end])
        return self._sequence_sums(sums, None)[0]

    def _blocks_by_workspace(self, shape: TileShape, maximum: Tensor | None) -> Tensor:
        """Workspace strategy with one row at a time, in pairs of blocks whose slopes fill the workspace."""
        size = math.isqrt(WORKSPACE_BYTES // (2 * self.dtype.itemsize)) // shape.block * shape.block
        size = max(size, shape.block)
        bounds = [(begin, min(begin + size, self.length)) for begin in range(0, self.length, size)]
        tiles = [_blocks(end - begin, shape.block) for begin, end in bounds]
        programs = {
            (i, j): _programs_of_triangle(tiles[i]) if i == j else tiles[i] * tiles[j]
            for i in range(len(bounds))
            for j in range(i, len(bounds))
        }
        sums, _ = self._partial_sums(sum(programs.values()))
        workspace = torch.empty(2, size, size, dtype=self.dtype, device=self.device)
        for row in range(self.rows):
            layer, b = divmod(row, self.batch)
            z, gradient = self.layers[layer][b : b + 1, :, : self.features], self.gradients[layer][b : b + 1]
            first_sum = 0
            for (i, j), count in programs.items():
                region = Region(
                    rows=1,
                    programs=count,
                    tiles_i=tiles[i],
                    tiles_j=tiles[j],
                    triangle=i == j,
                    first_row=row,
                    first_i=bounds[i][0],
                    first_j=bounds[j][0],
                    first_sum=first_sum,
                )
                mirror = workspace[0 if i == j else 1 :][:1]
                self._pair_tiles(shape, region, sums, None, maximum, weights=workspace[:1], mirror=mirror)
                first_sum += count
                for number, (side, other) in enumerate([(i, j), (j, i)] if i != j else [(i, i)]):
                    side_tokens, other_tokens = slice(*bounds[side]), slice(*bounds[other])
                    weights = workspace[
                        number : number + 1,
                        : side_tokens.stop - side_tokens.start,
                        : other_tokens.stop - other_tokens.start,
                    ]
                    _product_(gradient[:, side_tokens], weights, z[:, other_tokens], add=other > 0)
                    if self.weight_sums is not None:
                        self.weight_sums[row, side_tokens] += weights[0].sum(1, dtype=torch.float32)
        return self._sequence_sums(sums, None)[0]

    # ---- perplexity_entropy

    def perplexity_entropy(self, potential: PerplexityEntropy, with_grad: bool) -> tuple[Tensor, Tensor]:
        """Loss and scale as in :meth:`pair_sums`, in three passes; the last two read each token's largest exponent and
        sum, which the first computes."""
        shape = self._row_shape(True)
        total, largest, entropy, expected = (self._empty_statistic() for _ in range(4))
        self._row_sweep(shape, "partition", sums=total, maxima=largest)
        total.masked_fill_(total == 0, 1.0)  # a token without a partner has no P
        if self.partners is None:
            average = torch.full_like(total, 1 / (self.length - 1))
        else:
            average = (1 / self.partners.clamp(min=1).float()).repeat(len(self.layers), 1)
        anchors = self._paired_tokens.clamp(min=1)
        known = Entropy(largest, total, average, potential.eps, None)
        self._row_sweep(shape, "entropy", sums=entropy, maxima=expected, entropy=known)
        entropy += (average + potential.eps).log2()
        if self.partners is not None:
            entropy.view(-1, self.batch, self.length).masked_fill_(self.partners <= 0, 0.0)
        if with_grad:
            self.weight_sums = self._empty_statistic()
            self.gradients = [self._empty_gradient() for _ in self.layers]
            self._row_sweep(shape, "entropy_gradient", entropy=replace(known, expected=expected))
        return self._sequence_sums(entropy, None)[0] / anchors, 1 / anchors

    # ---- from the sums to the loss and its gradient

    def finish(self, loss: Tensor, scale: Tensor, with_grad: bool) -> SequenceLosses:
        """Final losses, the gradient through the row transform, and the factor of each token."""
        pairs = self._pairs
        empty = pairs == 0
        # Masked before any other use: without a pair the scale may be infinite.
        scale = (scale * self.epilogue.kappa).masked_fill(empty, 0.0).masked_fill(loss.isnan(), math.nan)
        penalty = None
        if isinstance(self.potential, L2Repel) and self.potential.norm_weight:
            penalty = self.potential.norm_weight / (self._paired_tokens.clamp(min=1) * self.features)
            loss = loss + penalty * self._sequence_sums(self.statistics.norm.square(), None)[0]
        # From [rows, S] to [layers, batch], or to [layers, S] with cu_seqlens.
        loss = loss.masked_fill(empty, 0.0).view(len(self.layers), -1)
        pairs = pairs[: self.batch].flatten()
        if not with_grad:
            return SequenceLosses(loss, pairs, [], None)
        self._project()
        factors = self._paired_token_values(scale)
        if self.epilogue.transform != "none":
            factors *= self.statistics.inverse.view(factors.shape)
        if self.statistics.weight_scale is not None:
            factors /= self.statistics.weight_scale.view(len(self.layers), self.batch, 1)
        if penalty is not None:
            square_scales = self._paired_token_values(2 * penalty)
            for gradient, z, factor, square_scale in zip(
                self.gradients, self.tokens, factors, square_scales, strict=True
            ):
                gradient.mul_(factor.unsqueeze(2)).addcmul_(z[:, :, : self.features], square_scale.unsqueeze(2))
            factors = torch.ones_like(factors)
        return SequenceLosses(loss, pairs, self.gradients, factors)

    def _paired_token_values(self, sequence_values: Tensor) -> Tensor:
        """Values of tokens, ``[layers, batch, L]`` fp32, from values of sequences, ``[rows, S]``; 0 for tokens without
        a partner."""
        token_values = self._spread(sequence_values).float().reshape(len(self.layers), self.batch, self.length)
        return token_values if self.partners is None else token_values.masked_fill(self.partners <= 0, 0.0)

    def _project(self) -> None:
        self.kernels.project(self.inputs, self.weight_sums, self.gradients)

    # ---- sequences of a row: one, or the segments of cu_seqlens

    @functools.cached_property
    def _pairs(self) -> Tensor:
        """Number of ordered pairs of each sequence, ``[rows, S]`` int64, with the diagonal if the potential has it."""
        with_itself = int(getattr(self.potential, "include_diagonal", False))
        if self.partners is None:
            count = self.length * (self.length - 1 + with_itself)
            return torch.full((self.rows, 1), count, dtype=torch.int64, device=self.device)
        return self._over_sequences((self.partners + with_itself).masked_fill(self.partners <= 0, 0))

    @functools.cached_property
    def _paired_tokens(self) -> Tensor:
        """Number of tokens with a partner, ``[rows, S]`` fp64."""
        if self.partners is None:
            return torch.full((self.rows, 1), float(self.length), dtype=torch.float64, device=self.device)
        return self._over_sequences((self.partners > 0).long()).double()

    def _over_sequences(self, token_values: Tensor) -> Tensor:
        """Sums over sequences, ``[rows, S]``, of integers ``[batch, L]``."""
        if self.segment is None:
            sums = token_values.sum(1, keepdim=True)
        else:
            sums = torch.zeros(1, self.sequences, dtype=torch.int64, device=self.device)
            sums.index_add_(1, self.segment, token_values)
        return sums.repeat(len(self.layers), 1)

    def _spread(self, sequence_values: Tensor) -> Tensor:
        """Values of tokens, ``[rows, L]``, from values of their sequences, ``[rows, S]``."""
        if self.segment is None:
            return sequence_values.expand(self.rows, self.length)
        return sequence_values[:, self.segment]

    # ---- launches

    def _sequence_sums(self, sums: Tensor, maxima: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Totals of the sequences, ``[rows, S]`` fp64, and, with ``maxima``, the exponents they are relative to."""
        sequences = self.sequences
        total = torch.empty(self.rows, sequences, dtype=torch.float64, device=self.device)
        shift = None if maxima is None else torch.empty(self.rows, sequences, dtype=torch.float32, device=self.device)
        if sequences == 0:
            return total, shift
        self.kernels.sequence_sums(self.length, self.statistics.norm, sums, maxima, self.cu_seqlens, total, shift)
        return total, shift

    def _pair_tiles(
        self,
        shape: TileShape,
        region: Region,
        sums: Tensor,
        maxima: Tensor | None,
        shift: Tensor | None = None,
        weights: Tensor | None = None,
        mirror: Tensor | None = None,
    ) -> Any:
        ranges = self._cached_pair_id_ranges(shape.block)
        return self.kernels.pair_tiles(
            PairTilesCall(self.inputs, shape, region, sums, maxima, shift, ranges, weights, mirror)
        )

    def _cached_pair_id_ranges(self, block: int) -> Tensor | None:
        """Ranges of the pair ids of tiles of ``block`` tokens; cached, because a row in blocks takes many launches."""
        if self.pair_ids is None:
            return None
        if block not in self._pair_id_ranges:
            self._pair_id_ranges[block] = _pair_id_ranges(self.pair_ids, block)
        return self._pair_id_ranges[block]

    def _triangle(self, shape: TileShape, rows: int, first_row: int = 0) -> Region:
        """Region of all pairs of tiles of ``rows`` rows."""
        tiles = _blocks(self.length, shape.block)
        return Region(rows, _programs_of_triangle(tiles), tiles, first_row=first_row)

    def _tile_shape(self) -> TileShape:
        # Tokens per row of the launch that is timed: whole tiles, as many as fit the workspace.
        tokens = min(self.length, math.isqrt(WORKSPACE_BYTES // self.dtype.itemsize)) // 128 * 128

        def launch(candidate: TileShape) -> Any:
            rows = min(self.rows, WORKSPACE_BYTES // (tokens**2 * self.dtype.itemsize))
            workspace = torch.empty(rows, tokens, tokens, dtype=self.dtype, device=self.device)
            tiles = tokens // candidate.block
            region = Region(rows, _programs_of_triangle(tiles), tiles)
            sums, _ = self._partial_sums(region.programs)
            return self._pair_tiles(candidate, region, sums, None, weights=workspace, mirror=workspace)

        shape = self.kernels.tile_shape(self.pair_ids is not None)
        if tokens == 0:
            return shape
        tuned: TileShape = self.kernels.tuned("workspace", self._tuned_for(), shape, launch)
        return tuned

    def _tuned_for(self) -> tuple[Any, ...]:
        pairs = "pair_ids" if self.pair_ids is not None else "whole"
        return self.potential.name(), self.dtype, self.features, self.length, pairs

    def _row_shape(self, gradient: bool) -> RowShape:
        return self.kernels.row_shape(self.features, isinstance(self.potential, PerplexityEntropy), gradient)

    def _row_sweep(
        self,
        shape: RowShape,
        which: str,
        *,
        sums: Tensor | None = None,
        maxima: Tensor | None = None,
        shift: Tensor | None = None,
        entropy: Entropy | None = None,
    ) -> Any:
        with_grad = which in ("gradient", "entropy_gradient")
        return self.kernels.row_sweep(
            RowSweepCall(
                self.inputs,
                shape,
                which,
                sums,
                maxima,
                shift,
                None if self.pair_ids is None else _tile_ranges(self.pair_ids, shape.block_m, shape.block_n),
                entropy,
                self.weight_sums if with_grad else None,
                self.gradients if with_grad else (),
            )
        )

    def _partial_sums(self, columns: int) -> tuple[Tensor, Tensor | None]:
        sums = torch.empty(self.rows, columns, dtype=torch.float32, device=self.device)
        return sums, torch.empty_like(sums) if self.epilogue.online else None

    def _empty_statistic(self) -> Tensor:
        return torch.empty(self.rows, self.length, dtype=torch.float32, device=self.device)

    def _empty_gradient(self) -> Tensor:
        return torch.empty(self.batch, self.length, self.features, dtype=torch.float32, device=self.device)


def _product_(out: Tensor, weights: Tensor, z: Tensor, add: bool) -> None:
    """Product ``out (+)= weights @ z``, with an fp32 result, also for 16-bit factors."""
    if out.dtype == z.dtype:
        if add:
            torch.baddbmm(out, weights, z, out=out)
        else:
            torch.bmm(weights, z, out=out)
    elif out.device.type == "cuda" and not torch.version.hip:
        with fp32_accumulation() if z.dtype == torch.float16 else contextlib.nullcontext():
            if add:
                torch.ops.aten.baddbmm.dtype_out(out, weights, z, torch.float32, out=out)
            else:
                torch.ops.aten.bmm.dtype_out(weights, z, torch.float32, out=out)
    else:
        _product_(out, weights.float(), z.float(), add)


_FP16_ACCUMULATION = threading.Lock()


@contextlib.contextmanager
def fp32_accumulation() -> Iterator[None]:
    """Context in which PyTorch's fp16 matrix products accumulate in fp32: with
    ``torch.backends.cuda.matmul.allow_fp16_accumulation`` products with an fp32 result raise.

    The flag is global to the process: the lock keeps one thread from restoring it during another thread's product.
    """
    with _FP16_ACCUMULATION:
        allowed = torch.backends.cuda.matmul.allow_fp16_accumulation
        if allowed:
            torch.backends.cuda.matmul.allow_fp16_accumulation = False
        try:
            yield
        finally:
            if allowed:
                torch.backends.cuda.matmul.allow_fp16_accumulation = True


def _runs_of_layers(begin: int, end: int, batch: int) -> list[tuple[int, int]]:
    """Ranges of the rows ``begin`` to ``end``, cut where a layer ends."""
    cuts = [begin, *range((begin // batch + 1) * batch, end, batch), end]
    return list(itertools.pairwise(cuts))


def _dense(pair_ids: Tensor) -> Tensor:
    """``pair_ids`` as int32, in the same order: equal ids stay equal, negative ones negative."""
    ordered = pair_ids.sort(dim=1).values
    return torch.searchsorted(ordered, pair_ids.contiguous()).int().masked_fill_(pair_ids < 0, -1)


def _pair_id_ranges(pair_ids: Tensor, block: int) -> Tensor:
    """Least and largest pair id of each tile of tokens, ``[B, tiles, 2]``."""
    padded = torch.nn.functional.pad(pair_ids, (0, -pair_ids.shape[1] % block), value=-1).unflatten(1, (-1, block))
    least = padded.masked_fill(padded < 0, _NO_PAIR_ID).amin(2)
    return torch.stack([least, padded.amax(2)], 2)


def _tile_ranges(pair_ids: Tensor, block_m: int, block_n: int) -> Tensor:
    """Range of the tiles of ``block_n`` tokens that each tile of ``block_m`` tokens may pair with, ``[B, tiles, 2]``:
    the first, and one past the last. It is exact if the ids are sorted, as in packed sequences, and never too small.

    Computed by bisection, in the running maximum of the ids up to a tile and the running minimum from a tile on, with
    memory linear in the number of tiles.
    """
    ranges_i, ranges_j = _pair_id_ranges(pair_ids, block_m), _pair_id_ranges(pair_ids, block_n)
    largest_until = ranges_j[..., 1].cummax(1).values
    least_from = ranges_j[..., 0].flip(1).cummin(1).values.flip(1)
    first = torch.searchsorted(largest_until, ranges_i[..., 0].contiguous())
    end = torch.searchsorted(least_from, ranges_i[..., 1].contiguous(), right=True)
    return torch.stack([first, end], 2).int()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _programs_of_triangle(tiles: int) -> int:
    """Number of programs of ``pair_tiles`` for the upper triangle of ``tiles`` x ``tiles``, folded to a rectangle."""
    return _blocks(tiles, 2) * (tiles + 1)
