"""The launcher of the GPU backends: the strategy, the schedule and the order of the kernels.

*Workspace*: the similarities of the upper triangle of tiles, whose slopes go to a workspace of bounded size, and
library matrix products of the workspace with the tokens; 3 L^2 F FLOPs per row. *Band*: the same for packed sequences
of a known largest length, whose tiles pair with few others; the workspace holds those alone, and the product is a
kernel that leaves out tiles without a common sequence. *Fused*: one kernel that keeps a tile's gradient in registers
and stores no slope, for few features and for packed sequences that no band serves; 2 (1 + n) L^2 F FLOPs per row, where
n is the number of slices of the features. The launcher reads no value back from the device, and every launch depends on
shapes and the largest length alone, so a CUDA graph can capture a call.

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

from dispersion_kernels.backends.gpu.epilogues import Epilogue, epilogue_of, slope_ratio
from dispersion_kernels.backends.interface import Losses
from dispersion_kernels.potentials import AngularSpread, L2Repel, PerplexityEntropy, Potential, is_built_in
from dispersion_kernels.segments import on_device, segment_of_token, within_segments

# Size of the workspace of slopes: small enough for the last-level cache, large enough to fill the machine. A B200's 148
# multiprocessors are busy with two blocks of 3,072 x 3,072 slopes in 16 bits.
WORKSPACE_BYTES = 36 << 20
# Largest workspace of the band strategy, for sequences of a few thousand tokens; longer ones are fused, but where all
# of a row's band is smaller.
_BAND_BYTES = 4 * WORKSPACE_BYTES
# Most features for which the fused kernel, with 4 L^2 F FLOPs, should cost less than the workspace, with 3 L^2 F
# and the traffic of slopes.
_FUSED_FEATURES = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}
# Largest ratio of slopes for G in bf16; the default of angular_spread has 2.6.
_SLOPES_ALIKE = 4.0
# Most tokens of a tile of ``pair_tiles``; also of the tiles of the library's products, which have as many features.
_LARGEST_TILE = 128
# Costs in units of a library tile's 128 products a multiprocessor: of a tile's epilogue in ``pair_tiles``, of a launch.
_EPILOGUE, _LAUNCH = 6, 3
# CUDA's gridDim.y limit.
MAX_ROWS = 65_535
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
class Band:
    """The pairs of tiles at most ``reach`` apart, and the workspace of their slopes: ``[rows, ring * block, (2 reach +
    1) * block]``, where the tokens of tile I are at ``I % ring``, and their pairs with J at ``J - I + reach``."""

    reach: int
    ring: int
    tile_ranges: Tensor
    """As those of :class:`RowSweepCall`, for tiles of ``block`` tokens. Pairs of tiles in neither's range are left
    out, also of the workspace."""


@dataclass(frozen=True)
class Region:
    """The pairs of tiles of one launch of ``pair_tiles``."""

    rows: int
    programs: int
    """Programs per row: the triangle of ``tiles_i`` folded to a rectangle, ``tiles_i * tiles_j``, or, of a band,
    ``tiles_i * (reach + 1)``."""
    tiles_i: int
    tiles_j: int = 0
    triangle: bool = True
    first_row: int = 0
    first_i: int = 0
    first_j: int = 0
    first_sum: int = 0
    band: Band | None = None
    """With ``triangle`` false: the pairs of ``tiles_i`` tiles with themselves and the next ``reach`` tiles."""


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
    """Partial sums of psi, ``[rows, programs]``; of a band ``[region.rows, reach + 1, L]``, one a token, from
    ``region.first_row`` on; output."""
    maxima: Tensor | None
    """Largest exponents, ``[rows, programs]``, that ``sums`` are relative to; output."""
    shift: Tensor | None
    """Number that is subtracted from the exponents of a row, ``[rows, 1]``."""
    weights: Tensor | None
    """Slopes times the inverse norm of the column, ``[rows, N, N]`` in the dtype of the tokens; output. N is a multiple
    of the block; elements beyond the last token may be written, too."""
    mirror: Tensor | None
    """``weights`` of the pairs (j, i); output."""


class DiagonalCall(NamedTuple):
    """Arguments of ``diagonal``, which computes the diagonal of the weights of tokens x: minus an estimate of x . G,
    times the inverse norm.

    The row transform takes the part along the token out of G, whatever its size; where that part is by far the larger,
    as of condensed tokens, G in 16 bits would have few digits for the rest. The diagonal takes most of that part out
    before G is rounded. It need not be exact: an estimate from a few pairs of a tile of tokens serves the whole tile.
    """

    inputs: Inputs
    rows: int
    first_row: int
    """Row of ``weights[0]``."""
    weights: Tensor
    """Weights, ``[rows, N, N]``, as from ``pair_tiles``; the diagonal is output."""


class BandProductCall(NamedTuple):
    """Arguments of ``band_product``, which computes G of ``tiles`` tiles of tokens: the product of a band's weights and
    the tokens."""

    inputs: Inputs
    shape: Any
    """:class:`TileShape` that ``weights`` were written with."""
    band: Band
    rows: int
    first_row: int
    """Row of ``weights[0]``."""
    first_tile: int
    tiles: int
    weights: Tensor
    """Weights, as from ``pair_tiles``."""
    gradients: Sequence[Tensor]
    """G of each layer, ``[B, L, F]`` fp32; output."""


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


@dataclass(frozen=True)
class Partners:
    """Tokens that pair with each other, from pair ids; of a part of the batch, where a call is split."""

    pair_ids: Tensor
    """Pair ids, ``[B, L]`` int32: equal where tokens of a row pair; -1 for none."""
    counts: Tensor
    """Number of partners of each token, ``[B, L]`` int32."""
    all_counts: Tensor
    """``counts`` of the whole batch."""
    pairs: Tensor
    """Number of ordered pairs of each sequence of the whole batch, int64."""
    cu_seqlens: Tensor | None
    ends: Tensor | None = None
    """One past the last token of each token's sequence, ``[1, L]`` int32, where all tokens of packed sequences pair:
    ``pair_ids`` are the first ones then. Else None."""
    first_sequence: int = 0
    """Place in the whole batch of the part's first sequence."""

    @functools.cached_property
    def tokens(self) -> Tensor:
        """Number of tokens with a partner of each sequence of the whole batch, int64."""
        return _over_sequences(self.all_counts > 0, self.cu_seqlens)


class RowStatisticsCall(NamedTuple):
    """Arguments of ``row_statistics``, which computes the :class:`Statistics`."""

    tokens: Tokens
    epilogue: Epilogue
    partners: Tensor | None
    """Number of partners of each token, ``[B, L]`` int32: all statistics of a token without one are 0, and inverse and
    extra of a token that is not finite. None where all tokens of a row pair."""
    norm: Tensor
    inverse: Tensor
    extra: Tensor
    cleaned: Sequence[Tensor]
    """Copies ``[B, L, W]`` of the layers, in which tokens with an inverse of 0 for want of a partner or because they
    are not finite are 0; output. Empty for none."""


class SequenceLossesCall(NamedTuple):
    """Arguments of ``sequence_losses``, which computes each sequence's loss and its tokens' scale from partial sums.
    Without partners a sequence is a row, whose tokens all pair."""

    length: int
    batch: int
    norm: Tensor
    """Norms, ``[rows, L]``; a sequence with one that is not finite has loss NaN."""
    inverse: Tensor
    """Inverse norms, ``[rows, L]``."""
    partners: Tensor | None
    """Number of partners of each token, ``[B, L]`` int32; None where all tokens of a row pair."""
    sums: Tensor
    """Partial sums, ``[rows, N]``; with ``bounds`` N is L, and a sequence has the sums of its tokens."""
    maxima: Tensor | None
    """Exponents that ``sums`` are relative to, ``[rows, N]``."""
    bounds: Tensor | None
    """cu_seqlens ``[S + 1]`` int32."""
    counts: Tensor | None
    """Number of terms of each sequence's mean, int64; None for that of a whole row."""
    first_sequence: int
    """Place in ``counts`` and ``tokens`` of the first sequence."""
    tokens: Tensor | None
    """Number of tokens with a partner of each sequence, int64, with ``counts`` and ``diagonal``; else None."""
    of_tokens: bool
    """Whether the mean is over tokens, rather than over pairs."""
    diagonal: bool
    """Whether the mean has a term 1 for each token with itself, which ``sums`` and ``counts`` lack."""
    logarithm: bool
    """Whether the loss is the logarithm of the mean, plus ``constant``, and not the mean."""
    constant: float
    factor: float
    """Factor of a sequence's scale: factor d loss / d sum."""
    divisor: int
    """Number by which loss and scale are divided."""
    divide_by_sequences: bool
    """Whether they are also divided by the number of sequences with a term, of those in ``counts``."""
    loss: Tensor
    """Losses, ``[rows, S]`` fp64; 0 for a sequence without a term; output."""
    token_scale: Tensor | None
    """Scale of a token: that of its sequence times the inverse norm, ``[rows, L]`` fp32; 0 for a token without a
    partner; output."""
    shift: Tensor | None
    """Largest of ``maxima``, which the scale is relative to, ``[rows, S]``; output."""


class TokenGradientsCall(NamedTuple):
    """Arguments of ``token_gradients``, which computes the gradients of the tokens from G: through the row transform,
    times scale and factor, rounded once."""

    tokens: Tokens
    transform: str
    """Row transform that G lacks: ``"normalize"`` or ``"standardize"``; ``"none"`` where it lacks none."""
    eps: float
    """Term that ``normalize`` adds to a norm."""
    gradients: Sequence[Tensor]
    """G of each layer, as from ``row_sweep``; not read for tokens of scale 0, whose gradient is 0."""
    scale: Tensor
    """Scale of each token, ``[layers, B, L]`` fp32."""
    factor: Tensor
    """Another factor, ``[B, L]`` fp32 of any strides."""
    outputs: Sequence[Tensor]
    """Gradient of each layer, ``[B, L, F]``; output."""


class Kernels(Protocol):
    """Interface of a backend for one dtype: its kernels and the sizes of their tiles.

    Statistics and sums are fp32. Outputs that are None are not computed, inputs that are None not read.
    """

    max_layers: int
    """Most layers of one launch."""
    multiprocessors: int
    """Multiprocessors of the device."""
    has_band: bool
    """Whether there is ``band_product``, and ``pair_tiles`` of a band."""

    @property
    def alignment(self) -> int:
        """Common divisor, in elements, that the width and the strides of the tokens must have."""

    def tile_shape(self, has_pair_ids: bool, band_of: str | None) -> TileShape:
        """Shape for ``pair_tiles``; ``band_of``: the function of the epilogue for a band, None for all pairs of
        tiles."""
        ...

    def row_shape(self, features: int, perplexity: bool, gradient: bool) -> RowShape: ...

    def tuned(self, strategy: str, what: tuple[Any, ...], shape: Any, launch: Callable[[Any], Any]) -> Any:
        """``shape``, or a shape that is faster on the device, found by timing ``launch``; ``what`` is the key of the
        decision."""

    def row_statistics(self, call: RowStatisticsCall) -> None: ...
    def pair_tiles(self, call: PairTilesCall) -> Any: ...
    def band_product(self, call: BandProductCall) -> None: ...
    def diagonal(self, call: DiagonalCall) -> None: ...
    def row_sweep(self, call: RowSweepCall) -> Any: ...
    def sequence_losses(self, call: SequenceLossesCall) -> None: ...

    def differences(self, tokens: Tokens, weight_sums: Tensor, gradients: Sequence[Tensor]) -> None:
        """Computes w z - G in place of G = ``gradients``, with w = ``weight_sums``, the sum of the token's weights,
        ``[rows, L]``: the gradient of potentials of the distance."""

    def token_gradients(self, call: TokenGradientsCall) -> None: ...


class Result(NamedTuple):
    """Losses and gradients of all layers."""

    loss: Tensor
    """Weighted loss of each sequence, ``[layers, S]`` fp64; 0 without a pair."""
    gradients: list[Tensor]
    """G of each layer, ``[B, L, F]`` in :func:`gradient_dtype`: the gradient without its scale and, but for
    ``row_transform="none"``, the row transform, which :func:`finish` computes; empty if no gradient was asked for."""
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
    max_seqlen: int | None = None,
) -> Losses:
    """:class:`~dispersion_kernels.backends.interface.Run` of the kernels that ``kernels_for`` makes for tokens."""
    with torch.cuda.device_of(layers[0]):  # Triton launches on the current device
        loss, gradients, scale = dispersion(
            layers, potential, pair_ids, cu_seqlens, any(with_grad), kernels_for(layers[0]), reduction, max_seqlen
        )
    total = loss.sum(0) if reduction == "none" else loss.sum()
    return total.float(), [gradients[n] if need else None for n, need in enumerate(with_grad)], scale


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; those of an H100 for another device, on which launches are only examined."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def by_workspace(features: int, dtype: torch.dtype, cu_seqlens: Tensor | None) -> bool:
    """Whether the gradient is computed by the workspace strategy."""
    return cu_seqlens is None and features > _FUSED_FEATURES[dtype]


def gradient_dtype(z: Tensor, potential: Potential, cu_seqlens: Tensor | None) -> torch.dtype:
    """Dtype of G for tokens ``[B, L, F]``: bf16, which halves the bytes, where one product of bf16 tokens makes all of
    it and rounding takes no more digits from the gradient than one more rounding of the gradient would; else fp32.

    The latter asks for slopes of like size: else a few near tokens, such as equal ones, have most of a token's G, which
    the estimate of :class:`DiagonalCall` cannot know.
    """
    if z.dtype != torch.bfloat16 or not by_workspace(z.shape[2], z.dtype, cu_seqlens):
        return torch.float32
    if not (is_built_in(potential) and isinstance(potential, AngularSpread)):
        return torch.float32
    slopes = (_LARGEST_TILE * ceil_div(z.shape[1], _LARGEST_TILE)) ** 2 * z.dtype.itemsize
    alike = slope_ratio(potential) <= _SLOPES_ALIKE
    return torch.bfloat16 if slopes <= WORKSPACE_BYTES and alike else torch.float32


def finish(
    kernels_for: Callable[[Tensor], Kernels],
    gradients: Sequence[Tensor | None],
    layers: Sequence[Tensor],
    scale: Tensor,
    factor: Tensor,
    potential: Potential,
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """:data:`~dispersion_kernels.backends.interface.Finish` of the kernels that ``kernels_for`` makes for tokens."""
    outputs = [None if gradient is None else torch.empty_like(gradient, dtype=dtype) for gradient in gradients]
    numbers = [n for n, output in enumerate(outputs) if output is not None]
    given = [gradient for gradient in gradients if gradient is not None]
    taken = [output for output in outputs if output is not None]
    if not taken or taken[0].numel() == 0:
        return outputs
    scale = scale if len(numbers) == len(outputs) else torch.stack([scale[n] for n in numbers])
    # Without a row transform the kernel takes no more than the shape of the tokens.
    read = taken if potential.row_transform == "none" else aligned([layers[n] for n in numbers], 1)
    with torch.cuda.device_of(scale):
        kernels = kernels_for(read[0])
        for n in range(0, len(taken), kernels.max_layers):
            some = slice(n, n + kernels.max_layers)
            kernels.token_gradients(
                TokenGradientsCall(
                    Tokens(read[some], read[0].shape[2]),
                    potential.row_transform,
                    _term_of_norm(potential),
                    given[some],
                    scale[some],
                    factor.expand(scale.shape[1:]),
                    taken[some],
                )
            )
    return outputs


def finish_by_operations(
    gradients: Sequence[Tensor | None],
    layers: Sequence[Tensor],
    scale: Tensor,
    factor: Tensor,
    potential: Potential,
    dtype: torch.dtype,
) -> list[Tensor | None]:
    """:func:`finish` in PyTorch's operations, for compilers and transforms, which fuse them or see through them."""
    outputs: list[Tensor | None] = []
    for n, (gradient, token_scale) in enumerate(zip(gradients, scale.unsqueeze(3), strict=True)):
        if gradient is None:
            outputs.append(None)
            continue
        u = gradient.to(scale.dtype)
        if potential.row_transform != "none":
            x = layers[n].to(scale.dtype)
            if potential.row_transform == "standardize":
                x, u = x - x.mean(2, keepdim=True), u - u.mean(2, keepdim=True)
            norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
            squares = norm * (norm + _term_of_norm(potential))
            u = u - x * ((u * x).sum(2, keepdim=True) * torch.where(squares > 0, 1 / squares, 0.0))
        # Tokens of scale 0 may be NaN.
        outputs.append(torch.where(token_scale == 0, 0.0, u * (token_scale * factor.unsqueeze(-1))).to(dtype))
    return outputs


def _term_of_norm(potential: Potential) -> float:
    return potential.norm_eps if potential.row_transform == "normalize" else 0.0


def dispersion(
    layers: Sequence[Tensor],
    potential: Potential,
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    with_grad: bool,
    kernels: Kernels,
    reduction: str = "none",
    max_seqlen: int | None = None,
) -> Result:
    """Loss of each sequence of each layer and, if asked, its gradient, times the weight that the loss has in the
    reduction: :func:`~dispersion_kernels.numerics.loss_weight`.

    Args:
        layers: hidden states ``[B, L, F]``, all alike.
        potential, pair_ids, cu_seqlens: as in :mod:`dispersion_kernels.segments`.
        with_grad: whether to compute the gradient.
        kernels: the kernels of the backend.
        reduction, max_seqlen: as in :func:`fused_dispersion_loss`.
    """
    batch, length, _ = layers[0].shape
    if batch == 0 or length < 2:
        return _nothing(layers, potential, cu_seqlens, with_grad)
    if cu_seqlens is not None:
        cu_seqlens = on_device(cu_seqlens, layers[0].device).to(torch.int32)  # the dtype that compiled kernels read
        pair_ids = None if pair_ids is None else within_segments(pair_ids, cu_seqlens, length)
    partners = None
    if pair_ids is not None:
        partners = _partners(pair_ids, cu_seqlens)
    elif cu_seqlens is not None:
        partners = _partners_in_segments(cu_seqlens, length)
    by_sequences = reduction == "mean" and partners is not None
    divisor = len(layers) * (batch if reduction == "mean" and partners is None else 1)
    return _dispersion(layers, _Request(potential, partners, divisor, by_sequences, with_grad, kernels, max_seqlen))


def _nothing(layers: Sequence[Tensor], potential: Potential, cu_seqlens: Tensor | None, with_grad: bool) -> Result:
    z = layers[0]
    dtype = gradient_dtype(z, potential, cu_seqlens)
    sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return Result(
        torch.zeros(len(layers), sequences, dtype=torch.float64, device=z.device),
        [z.new_zeros(z.shape, dtype=dtype) for z in layers] if with_grad else [],
        torch.zeros(len(layers), *z.shape[:2], dtype=torch.float32, device=z.device) if with_grad else None,
    )


class _Request(NamedTuple):
    """Arguments of a call beside the layers."""

    potential: Potential
    partners: Partners | None
    divisor: int
    divide_by_sequences: bool
    with_grad: bool
    kernels: Kernels
    max_seqlen: int | None


def _dispersion(layers: Sequence[Tensor], request: _Request) -> Result:
    """Losses in as many parts as launches need."""
    batch, partners = layers[0].shape[0], request.partners
    if len(layers) > request.kernels.max_layers:
        halves = layers[: len(layers) // 2], layers[len(layers) // 2 :]
        return _joined([_dispersion(half, request) for half in halves], 0)
    if batch > 1 and len(layers) * batch > MAX_ROWS:
        losses = []
        for part in (slice(0, batch // 2), slice(batch // 2, batch)):
            chosen = partners
            if partners is not None:
                ids, counts = partners.pair_ids[part], partners.counts[part]
                first = partners.first_sequence + part.start
                chosen = replace(partners, pair_ids=ids, counts=counts, first_sequence=first)
            losses.append(_dispersion([z[part] for z in layers], request._replace(partners=chosen)))
        return _joined(losses, 1)
    call = _Call(layers, request)
    call.row_statistics()
    if isinstance(request.potential, PerplexityEntropy):
        loss, scale = call.perplexity_entropy(request.potential)
    else:
        loss, scale = call.pair_sums()
    return call.result(loss, scale)


def aligned(layers: Sequence[Tensor], alignment: int) -> list[Tensor]:
    """Layers ``[B, L, W]`` from ``[B, L, F]``, with common strides that allow loads of 16 bytes.

    Features are contiguous; W and the strides of tokens are multiples of ``alignment`` elements. Layers that are so
    already are returned themselves; else all are copied, with zeros beyond F. A copy costs one pass over the tokens,
    where a kernel makes one pass for each of its tiles.
    """
    z = layers[0]
    features, strides = z.shape[2], z.stride()
    width = alignment * ceil_div(features, alignment)
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


def _joined(parts: list[Result], dimension: int) -> Result:
    """Results of parts of the layers (dimension 0) or of the batch (dimension 1)."""
    scales = [part.scale for part in parts if part.scale is not None]
    gradients = [part.gradients for part in parts]
    pieces = zip(*gradients, strict=True)
    return Result(
        torch.cat([part.loss for part in parts], dimension),
        list(itertools.chain(*gradients))
        if dimension == 0
        else [torch.cat(pieces_of_layer) for pieces_of_layer in pieces],
        torch.cat(scales, dimension) if scales else None,
    )


class _Call:
    """State that the kernels of one call share."""

    def __init__(self, layers: Sequence[Tensor], request: _Request) -> None:
        z = layers[0]
        self.request, self.potential, self.kernels = request, request.potential, request.kernels
        self.layers = aligned(layers, self.kernels.alignment)
        self.batch, self.length, self.features = z.shape
        self.rows = self.batch * len(layers)
        self.device, self.dtype = z.device, z.dtype
        self.epilogue: Epilogue = epilogue_of(self.potential, self.features, narrow_range=z.dtype == torch.float16)
        self.partners = request.partners
        # Number of partners of each token.
        self.counts = None if self.partners is None else self.partners.counts
        self.cu_seqlens = None if self.partners is None else self.partners.cu_seqlens
        # Sequences per row, S in shapes: 1, or the number of segments of cu_seqlens.
        self.sequences = 1 if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    # ---- statistics

    def row_statistics(self) -> None:
        # Tokens without a partner must neither reach other tokens through 0 * NaN nor make the loss NaN. Tokens with a
        # partner that are not finite make the loss NaN, but do not reach other tokens. Without a gradient the epilogue
        # leaves their pairs out.
        centred = self.epilogue.transform == "none" and self.dtype == torch.float32
        clean = self.partners is not None and (self.request.with_grad or centred)
        cleaned = [z.new_empty(self.batch, self.length, z.shape[2]) for z in self.layers] if clean else []
        norm, inverse, extra = self._row_statistics(cleaned)
        self.layers = cleaned or self.layers
        self.tokens = self.layers
        if centred:
            # Subtracting the mean leaves distances as they are and makes them cancel less. In 16 bits the difference
            # would be rounded.
            self.layers = aligned([z - z.mean(1, keepdim=True) for z in self.layers], self.kernels.alignment)
            _, _, extra = self._row_statistics([])
        weight_inverse, weight_scale = inverse, None
        if self.dtype == torch.float16:
            largest = inverse.amax(1, keepdim=True)
            largest_exponent = torch.where(largest > 0, largest, 1.0).log2().floor()
            weight_scale = torch.exp2(self.epilogue.weight_exponent - largest_exponent)
            weight_inverse = inverse * weight_scale
        self.statistics = Statistics(norm, inverse, extra, weight_inverse, weight_scale)
        pair_ids = None if self.partners is None else self.partners.pair_ids
        self.inputs = Inputs(Tokens(self.layers, self.features), self.epilogue, self.statistics, pair_ids)

    def _row_statistics(self, cleaned: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        norm, inverse, extra = (self._empty_statistic() for _ in range(3))
        tokens = Tokens(self.layers, self.features)
        self.kernels.row_statistics(
            RowStatisticsCall(tokens, self.epilogue, self.counts, norm, inverse, extra, cleaned)
        )
        return norm, inverse, extra

    # ---- potentials that are a sum over pairs

    def pair_sums(self) -> tuple[Tensor, Tensor | None]:
        """Loss of each sequence of each row, ``[rows, S]``, and scale of each token, ``[rows, L]``; G goes to
        ``self.gradients``."""
        packed, with_grad = self.cu_seqlens is not None, self.request.with_grad
        maximum: Tensor | None = None
        if self.epilogue.online or not with_grad:
            sums, maxima = self._loss_of_rows() if packed else self._loss_of_tiles()
            loss, scale, maximum = self._pair_losses(sums, maxima)
        if with_grad:
            if by_workspace(self.features, self.dtype, self.cu_seqlens):
                sums = self._gradient_by_workspace(maximum)
            elif (band := self._band()) is not None:
                sums = self._gradient_by_band(*band)
            else:
                sums = self._gradient_fused(maximum)
            if not self.epilogue.online:
                loss, scale, _ = self._pair_losses(sums, None)
        return loss, scale

    def _pair_losses(self, sums: Tensor, maxima: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """:meth:`_sequence_losses` from the sums of psi, and, with ``maxima``, the exponents they are relative to."""
        potential, epilogue = self.potential, self.epilogue
        return self._sequence_losses(
            sums,
            maxima,
            of_tokens=False,
            diagonal=getattr(potential, "include_diagonal", False),
            # d loss / d sum is 1 / sum for the logarithm of the mean, else 1 / count; a pair is in the sum twice.
            logarithm=epilogue.exponential or potential.reduction == "log_mean",
            constant=epilogue.shift + potential.loss_offset,
            factor=2 * epilogue.kappa,
        )

    def _loss_of_tiles(self) -> tuple[Tensor, Tensor | None]:
        shape = self._tile_shape()
        region = self._triangle(shape, self.rows)
        sums, maxima = self._partial_sums(region.programs)
        self._pair_tiles(shape, region, sums, maxima)
        return sums, maxima

    def _loss_of_rows(self) -> tuple[Tensor, Tensor | None]:
        sums, maxima = self._partial_sums(self.length)
        self._row_sweep(self._row_shape(False), "online" if self.epilogue.online else "loss", sums=sums, maxima=maxima)
        return sums, maxima

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
        return sums

    def _band(self) -> tuple[TileShape, Band] | None:
        """Tiles and band of packed sequences of a known largest length; None where the fused kernel is to serve."""
        largest = self.request.max_seqlen
        if largest is None or not self.kernels.has_band:
            return None
        if self.features <= _FUSED_FEATURES[self.dtype] or self.epilogue.online or self.epilogue.transform == "none":
            return None
        shape = self.kernels.tile_shape(has_pair_ids=True, band_of=self.epilogue.function)
        tiles = ceil_div(self.length, shape.block)
        reach = min((largest + shape.block - 2) // shape.block, tiles - 1)
        of_a_tile = (2 * reach + 1) * shape.block**2 * self.dtype.itemsize
        ring = min(tiles, max(WORKSPACE_BYTES // of_a_tile, 2 * (reach + 1)))
        if ring * of_a_tile > _BAND_BYTES:
            return None
        return shape, Band(reach, ring, self._tile_ranges(shape.block, shape.block))

    def _gradient_by_band(self, shape: TileShape, band: Band) -> Tensor:
        """Band strategy, in parts of as many tiles as the workspace holds beside the next ``reach`` tiles, which get
        the mirrored slopes of the part."""
        self.weight_sums = None
        self.gradients = [self._empty_gradient() for _ in self.layers]
        tiles = ceil_div(self.length, shape.block)
        part = tiles if band.ring == tiles else band.ring - band.reach
        height, width = band.ring * shape.block, (2 * band.reach + 1) * shape.block
        together = max(1, min(self.rows, WORKSPACE_BYTES // (height * width * self.dtype.itemsize)))
        workspace = torch.empty(together, height, width, dtype=self.dtype, device=self.device)
        sums = torch.empty(together, band.reach + 1, self.length, dtype=torch.float32, device=self.device)
        token_sums = self._empty_statistic()
        for first_row in range(0, self.rows, together):
            rows = min(together, self.rows - first_row)
            for first in range(0, tiles, part):
                count = min(part, tiles - first)
                begin = first * shape.block
                region = Region(
                    rows=rows,
                    programs=count * (band.reach + 1),
                    tiles_i=count,
                    triangle=False,
                    first_row=first_row,
                    first_i=begin,
                    first_j=begin,
                    band=band,
                )
                self._pair_tiles(shape, region, sums, None, weights=workspace, mirror=workspace)
                self.kernels.band_product(
                    BandProductCall(self.inputs, shape, band, rows, first_row, first, count, workspace, self.gradients)
                )
            torch.sum(sums[:rows], 1, out=token_sums[first_row : first_row + rows])
        return token_sums

    def _gradient_by_workspace(self, maximum: Tensor | None) -> Tensor:
        shape = self._tile_shape()
        self.weight_sums = torch.zeros_like(self.statistics.norm) if self.epilogue.transform == "none" else None
        self.gradients = [self._empty_gradient() for _ in self.layers]
        padded = shape.block * ceil_div(self.length, shape.block)  # whole tiles: stores have 16 bytes and no mask
        matrix = padded**2 * self.dtype.itemsize
        if matrix <= WORKSPACE_BYTES:
            return self._rows_by_workspace(shape, maximum, padded, WORKSPACE_BYTES // matrix)
        return self._blocks_by_workspace(shape, maximum)

    def _rows_by_workspace(self, shape: TileShape, maximum: Tensor | None, padded: int, together: int) -> Tensor:
        """Workspace strategy with several rows at a time; the workspace holds all slopes of a row."""
        sums, _ = self._partial_sums(self._triangle(shape, 1).programs)
        together = min(together, self.rows)
        if together > self.batch:
            together -= together % self.batch  # a product for each layer, of all its rows
        workspace = torch.empty(together, padded, padded, dtype=self.dtype, device=self.device)
        for first in range(0, self.rows, together):
            rows = min(together, self.rows - first)
            region = self._triangle(shape, rows, first)
            self._pair_tiles(shape, region, sums, None, maximum, weights=workspace, mirror=workspace)
            if self.gradients[0].dtype == torch.bfloat16:
                self.kernels.diagonal(DiagonalCall(self.inputs, rows, first, workspace))
            for begin, end in _runs_of_layers(first, first + rows, self.batch):
                weights = workspace[begin - first : end - first, : self.length, : self.length]
                layer, b = divmod(begin, self.batch)
                batches = slice(b, b + end - begin)
                z = self.layers[layer][batches, :, : self.features]
                _product_(self.gradients[layer][batches], weights, z, add=False)
                if self.weight_sums is not None:
                    torch.sum(weights, 2, dtype=torch.float32, out=self.weight_sums[begin:end])
        return sums

    def _blocks_by_workspace(self, shape: TileShape, maximum: Tensor | None) -> Tensor:
        """Workspace strategy with one row at a time, in pairs of blocks whose slopes fill the workspace."""
        most = max(math.isqrt(WORKSPACE_BYTES // (2 * self.dtype.itemsize)), shape.block)
        size = block_size(self.length, self.features, shape.block, most, self.kernels.multiprocessors)
        bounds = [(begin, min(begin + size, self.length)) for begin in range(0, self.length, size)]
        tiles = [ceil_div(end - begin, shape.block) for begin, end in bounds]
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
        return sums

    # ---- perplexity_entropy

    def perplexity_entropy(self, potential: PerplexityEntropy) -> tuple[Tensor, Tensor | None]:
        """Loss and scale as in :meth:`pair_sums`, in three passes; the last two read each token's largest exponent and
        sum, which the first computes."""
        shape = self._row_shape(True)
        total, largest, entropy, expected = (self._empty_statistic() for _ in range(4))
        self._row_sweep(shape, "partition", sums=total, maxima=largest)
        total.masked_fill_(total == 0, 1.0)  # a token without a partner has no P
        if self.counts is None:
            average = torch.full_like(total, 1 / (self.length - 1))
        else:
            average = (1 / self.counts.clamp(min=1).float()).repeat(len(self.layers), 1)
        known = Entropy(largest, total, average, potential.eps, None)
        self._row_sweep(shape, "entropy", sums=entropy, maxima=expected, entropy=known)
        entropy += (average + potential.eps).log2()
        if self.counts is not None:
            entropy.view(-1, self.batch, self.length).masked_fill_(self.counts <= 0, 0.0)
        if self.request.with_grad:
            self.weight_sums = self._empty_statistic()
            self.gradients = [self._empty_gradient() for _ in self.layers]
            self._row_sweep(shape, "entropy_gradient", entropy=replace(known, expected=expected))
        loss, scale, _ = self._token_losses(entropy, self.epilogue.kappa)
        return loss, scale

    def _token_losses(self, values: Tensor, factor: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Mean of the values of a sequence's tokens with a partner, ``[rows, L]``, as a loss."""
        return self._sequence_losses(
            values, None, of_tokens=True, diagonal=False, logarithm=False, constant=0.0, factor=factor
        )

    # ---- from the sums to the loss and its gradient

    def result(self, loss: Tensor, scale: Tensor | None) -> Result:
        """Losses, G or, without a row transform, the gradient, and the scale of each token."""
        count, square_scale = len(self.layers), None
        if isinstance(self.potential, L2Repel) and self.potential.norm_weight:
            per_feature = self.potential.norm_weight / self.features
            squares, square_scale, _ = self._token_losses(self.statistics.norm.square(), 2.0 * per_feature)
            loss = loss + per_feature * squares
        # From [rows, S] to [layers, batch], or to [layers, S] with cu_seqlens.
        loss = loss.view(count, -1)
        if scale is None:
            return Result(loss, [], None)
        if self.statistics.weight_scale is not None:
            scale = scale / self.statistics.weight_scale
        scale = scale.view(count, self.batch, self.length)
        if self.epilogue.transform == "none":
            assert self.weight_sums is not None
            self.kernels.differences(self.inputs.tokens, self.weight_sums, self.gradients)
        if square_scale is not None:
            square_scale = square_scale.view(scale.shape)
            for gradient, z, token_scale, token_square_scale in zip(
                self.gradients, self.tokens, scale, square_scale, strict=True
            ):
                gradient.mul_(token_scale.unsqueeze(2))
                gradient.addcmul_(z[:, :, : self.features], token_square_scale.unsqueeze(2))
            scale = torch.ones_like(scale)
        return Result(loss, self.gradients, scale)

    # ---- sequences of a row: one, or the segments of cu_seqlens

    def _spread(self, sequence_values: Tensor) -> Tensor:
        """Values of tokens, ``[rows, L]``, from values of their sequences, ``[rows, S]``."""
        if self.cu_seqlens is None:
            return sequence_values.expand(self.rows, self.length)
        return sequence_values[:, segment_of_token(self.cu_seqlens, self.length)]

    # ---- launches

    def _sequence_losses(
        self,
        sums: Tensor,
        maxima: Tensor | None,
        *,
        of_tokens: bool,
        diagonal: bool,
        logarithm: bool,
        constant: float,
        factor: float,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss of each sequence, ``[rows, S]`` fp64; scale of each token, ``[rows, L]`` fp32, where a gradient was
        asked for; and, with ``maxima``, the exponents that the scale is relative to, ``[rows, S]`` fp32."""
        shape, partners = (self.rows, self.sequences), self.partners
        loss = torch.empty(shape, dtype=torch.float64, device=self.device)
        token_scale = self._empty_statistic() if self.request.with_grad else None
        shift = None if maxima is None else torch.empty(shape, dtype=torch.float32, device=self.device)
        counts, tokens = None, None
        if partners is not None:
            counts = partners.tokens if of_tokens else partners.pairs
            tokens = partners.tokens if diagonal else None
        if self.sequences > 0:
            self.kernels.sequence_losses(
                SequenceLossesCall(
                    length=self.length,
                    batch=self.batch,
                    norm=self.statistics.norm,
                    inverse=self.statistics.inverse,
                    partners=self.counts,
                    sums=sums,
                    maxima=maxima,
                    bounds=self.cu_seqlens,
                    counts=counts,
                    first_sequence=0 if partners is None else partners.first_sequence,
                    tokens=tokens,
                    of_tokens=of_tokens,
                    diagonal=diagonal,
                    logarithm=logarithm,
                    constant=constant,
                    factor=factor,
                    divisor=self.request.divisor,
                    divide_by_sequences=self.request.divide_by_sequences,
                    loss=loss,
                    token_scale=token_scale,
                    shift=shift,
                )
            )
        return loss, token_scale, shift

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
        return self.kernels.pair_tiles(PairTilesCall(self.inputs, shape, region, sums, maxima, shift, weights, mirror))

    def _triangle(self, shape: TileShape, rows: int, first_row: int = 0) -> Region:
        """Region of all pairs of tiles of ``rows`` rows."""
        tiles = ceil_div(self.length, shape.block)
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

        shape = self.kernels.tile_shape(self.partners is not None, band_of=None)
        if tokens == 0:
            return shape
        tuned: TileShape = self.kernels.tuned("workspace", self._tuned_for(), shape, launch)
        return tuned

    def _tuned_for(self) -> tuple[Any, ...]:
        pairs = "pair_ids" if self.partners is not None else "whole"
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
                None if self.partners is None else self._tile_ranges(shape.block_m, shape.block_n),
                entropy,
                self.weight_sums if with_grad else None,
                self.gradients if with_grad else (),
            )
        )

    def _tile_ranges(self, block_m: int, block_n: int) -> Tensor:
        assert self.partners is not None
        if self.partners.ends is None:
            return _tile_ranges(self.partners.pair_ids, block_m, block_n)
        return _tile_ranges_of_segments(self.partners.pair_ids, self.partners.ends, block_m, block_n)

    def _partial_sums(self, columns: int) -> tuple[Tensor, Tensor | None]:
        sums = torch.empty(self.rows, columns, dtype=torch.float32, device=self.device)
        return sums, torch.empty_like(sums) if self.epilogue.online else None

    def _empty_statistic(self) -> Tensor:
        return torch.empty(self.rows, self.length, dtype=torch.float32, device=self.device)

    def _empty_gradient(self) -> Tensor:
        dtype = gradient_dtype(self.layers[0][:, :, : self.features], self.potential, self.cu_seqlens)
        return torch.empty(self.batch, self.length, self.features, dtype=dtype, device=self.device)


@functools.cache
def block_size(length: int, features: int, tile: int, most: int, multiprocessors: int) -> int:
    """Tokens of a block for which the tiles of ``pair_tiles`` and of the products take the fewest whole waves of the
    device's multiprocessors, up to ``most``."""
    columns = ceil_div(features, _LARGEST_TILE)

    def waves(tiles: int) -> int:
        return ceil_div(tiles, multiprocessors)

    def cost(size: int) -> int:
        whole, (rows, last) = length // size, (ceil_div(tokens, _LARGEST_TILE) for tokens in (size, length % size))
        products = (whole * waves(rows * columns) + waves(last * columns)) * ceil_div(length, _LARGEST_TILE)
        pairs = whole * waves(_programs_of_triangle(rows)) + whole * (whole - 1) // 2 * waves(rows * rows)
        pairs += waves(_programs_of_triangle(last)) + whole * waves(rows * last)
        blocks = whole + (last > 0)
        # Launches: three of each pair of blocks, ``pair_tiles`` and two products; two of each block with itself.
        return products + pairs * (columns + _EPILOGUE) + _LAUNCH * blocks * (3 * blocks + 1) // 2

    step = tile * max(1, _LARGEST_TILE // tile)
    sizes = range(most // step * step or tile, most // 3, -step)
    return min(sizes, key=cost)


def _product_(out: Tensor, weights: Tensor, z: Tensor, add: bool) -> None:
    """Product ``out (+)= weights @ z``, summed in fp32, also for 16-bit factors; ``out`` is fp32 or as the factors."""
    with contextlib.nullcontext() if z.dtype == torch.float32 else fp32_accumulation():
        if out.dtype == z.dtype:
            if add:
                torch.baddbmm(out, weights, z, out=out)
            else:
                torch.bmm(weights, z, out=out)
        elif out.device.type == "cuda" and not torch.version.hip:
            if add:
                torch.ops.aten.baddbmm.dtype_out(out, weights, z, torch.float32, out=out)
            else:
                torch.ops.aten.bmm.dtype_out(weights, z, torch.float32, out=out)
        else:
            _product_(out, weights.float(), z.float(), add)


_ACCUMULATION = threading.Lock()


@contextlib.contextmanager
def fp32_accumulation() -> Iterator[None]:
    """Context in which PyTorch's 16-bit matrix products are summed in fp32.

    With ``torch.backends.cuda.matmul.allow_fp16_accumulation`` fp16 products with an fp32 result raise, and with
    ``allow_bf16_reduced_precision_reduction``, PyTorch's default, parts of a split bf16 product are rounded before they
    are added. The flags are global to the process: the lock keeps one thread from restoring them during another
    thread's product.
    """
    matmul = torch.backends.cuda.matmul
    with _ACCUMULATION:
        fp16, bf16 = matmul.allow_fp16_accumulation, matmul.allow_bf16_reduced_precision_reduction
        # Newer versions of PyTorch have a second flag, which the first one's setter sets.
        split_k = getattr(matmul, "allow_bf16_reduced_precision_reduction_split_k", None)
        if fp16:
            matmul.allow_fp16_accumulation = False
        if bf16:
            matmul.allow_bf16_reduced_precision_reduction = False
        try:
            yield
        finally:
            if fp16:
                matmul.allow_fp16_accumulation = True
            if bf16:
                matmul.allow_bf16_reduced_precision_reduction = True if split_k is None else (True, split_k)


def _runs_of_layers(begin: int, end: int, batch: int) -> list[tuple[int, int]]:
    """Ranges of the rows ``begin`` to ``end``, cut where a layer ends."""
    cuts = [begin, *range((begin // batch + 1) * batch, end, batch), end]
    return list(itertools.pairwise(cuts))


def _partners(pair_ids: Tensor, cu_seqlens: Tensor | None) -> Partners:
    """Partners of all tokens from ``pair_ids`` ``[B, L]``. The place of an id in their order takes the place of the id:
    equal ids stay equal, in the same order."""
    pair_ids = pair_ids.contiguous()  # avoids a warning of searchsorted, which copies otherwise
    ordered = pair_ids.sort(dim=1).values
    places = torch.searchsorted(ordered, pair_ids, out_int32=True)
    counts = torch.searchsorted(ordered, pair_ids, right=True, out_int32=True).sub_(places).sub_(1)
    left_out = pair_ids < 0
    places.masked_fill_(left_out, -1)
    counts.masked_fill_(left_out, 0)
    return Partners(places, counts, counts, _over_sequences(counts, cu_seqlens), cu_seqlens)


def _partners_in_segments(cu_seqlens: Tensor, length: int) -> Partners:
    """Partners of all tokens of packed sequences, whose pair ids are the first tokens of their sequences."""
    segment = segment_of_token(cu_seqlens, length)
    begins, ends = cu_seqlens[segment][None], cu_seqlens[segment + 1][None]
    counts = ends - begins - 1
    lengths = cu_seqlens.diff().long()
    return Partners(begins, counts, counts, lengths * (lengths - 1), cu_seqlens, ends)


def _over_sequences(token_values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sums over sequences, ``[S]`` int64, of integers or flags of tokens ``[B, L]``."""
    if cu_seqlens is None:
        return token_values.sum(1, dtype=torch.int64)
    sums = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.int64, device=token_values.device)
    return sums.index_add_(0, segment_of_token(cu_seqlens, token_values.shape[1]), token_values[0].long())


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


def _tile_ranges_of_segments(begins: Tensor, ends: Tensor, block_m: int, block_n: int) -> Tensor:
    """:func:`_tile_ranges` of packed sequences, from the first token of each token's sequence and one past the last,
    ``[1, L]``."""
    length = begins.shape[1]
    last = torch.nn.functional.pad(ends, (0, -length % block_m), value=length)[:, block_m - 1 :: block_m]
    return torch.stack([begins[:, ::block_m] // block_n, (last + (block_n - 1)) // block_n], 2)


def ceil_div(size: int, block: int) -> int:
    """Quotient rounded up. Triton's ``cdiv`` takes 7 us on the host."""
    return -(-size // block)


def _programs_of_triangle(tiles: int) -> int:
    """Number of programs of ``pair_tiles`` for the upper triangle of ``tiles`` x ``tiles``, folded to a rectangle."""
    return ceil_div(tiles, 2) * (tiles + 1)
