"""The torch backend: the symmetric sweep over tiles of pairs with library matrix products, on any device.

A pair of tiles (I, J), I <= J, of a sequence's tokens computes its similarities S = X_I X_J^T once and feeds both
G_I += W X_J and G_J += W^T X_I, where W holds the slopes: 3 B L^2 F FLOPs for loss and gradient (1 for the
similarities, half of them by symmetry, and 2 for the gradient), 1 for the loss alone. The loss scales the gradient by
one number per sequence, which is multiplied in at the end, so one pass over the pairs suffices. Memory: x and G, and a
workspace of constant size.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from dispersion_kernels.backends.batches import batches
from dispersion_kernels.backends.interface import Losses, joined_scales
from dispersion_kernels.numerics import (
    Rows,
    accumulation_dtype,
    in_blocks,
    log_mean_loss,
    loss_weight,
    mean_loss,
    statistics_dtype,
    sum_of_tokens,
    token_norms,
    transform,
)
from dispersion_kernels.potentials import (
    DistancePotential,
    ExponentialPotential,
    L2Repel,
    PerplexityEntropy,
    Potential,
)
from dispersion_kernels.segments import HostSegments, host_segments, pair_id_counts, segment_of_token, within_segments

# Bytes of one tile of similarities: on a CPU it should stay in the last-level cache, on a GPU it must fill the machine.
_TILE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
# Largest |x|^2 of a potential of the distance, as a fraction of the dtype's largest number: sums of four stay finite.
LARGEST_SQUARE = 0.03
# Largest range of the exponent that fp32 holds around its middle, sums over 2^31 tokens included.
_SAFE_RANGE = 80.0


def run(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    with_grad: Sequence[bool],
    max_seqlen: int | None = None,
) -> Losses:
    """:class:`~dispersion_kernels.backends.interface.Run` of the sweep."""
    losses: list[Tensor] = []
    grads: list[Tensor | None] = []
    scales: list[Tensor | None] = []
    for z, need_grad in zip(layers, with_grad, strict=True):
        loss, pairs, grad, scale = sweep(z, potential, pair_ids, cu_seqlens, need_grad)
        weight = loss_weight(len(layers), reduction, (pairs > 0).sum())
        losses.append((loss if reduction == "none" else loss.sum()) * weight)
        grads.append(grad)
        scales.append(None if scale is None else scale * weight)
    total = torch.stack(losses).sum(0).to(accumulation_dtype(layers[0].dtype))
    return total, grads, joined_scales(scales)


class Result(NamedTuple):
    """Result of a sweep."""

    loss: Tensor
    """Loss of each sequence, ``[S]`` in the accumulation dtype; 0 for a sequence without a pair."""
    pairs: Tensor
    """Number of ordered pairs of each sequence, ``[S]`` int64."""
    grad: Tensor | None
    """Gradient of each sequence's loss without its scale, ``[B, L, F]`` in the accumulation dtype; None if it was not
    asked for."""
    scale: Tensor | None
    """Factor of each token's ``grad``, ``[B, L]`` in the accumulation dtype. It is kept apart because backward has
    another factor, and one pass over the memory multiplies in both."""


def sweep(
    z: Tensor, potential: Potential, pair_ids: Tensor | None, cu_seqlens: Tensor | None, with_grad: bool
) -> Result:
    """Loss of each sequence and, if asked, its gradient. Arguments as in :mod:`dispersion_kernels.segments`.

    On the CPU the runs of tokens that pair with each other are swept, runs of similar length together. On an
    accelerator no value of a tensor is read, because reading would synchronise: the sweep evaluates all pairs of a row,
    or of a packed sequence whose bounds are on the CPU, and masks the pairs of different pair ids.
    """
    if cu_seqlens is None and (pair_ids is None or z.device.type != "cpu"):
        return _sweep_rows(z, potential, pair_ids, None, with_grad)
    if z.device.type == "cpu":
        sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        runs = host_segments(z.shape[0], z.shape[1], pair_ids, cu_seqlens)
        return _sweep_runs(z, potential, runs, sequences, with_grad)
    assert cu_seqlens is not None
    if cu_seqlens.device.type == "cpu":
        return _sweep_stretches(z, potential, pair_ids, cu_seqlens, with_grad)
    pair_ids = within_segments(pair_ids, cu_seqlens, z.shape[1])
    return _sweep_rows(z, potential, pair_ids, cu_seqlens, with_grad)


def _sweep_rows(
    z: Tensor, potential: Potential, pair_ids: Tensor | None, cu_seqlens: Tensor | None, with_grad: bool
) -> Result:
    """Sweep over the rows of ``z``: each a sequence, or, with ``cu_seqlens``, one row that holds all sequences."""
    if z.shape[0] == 0 or z.shape[1] < 2:
        return _nothing(z, z.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1, with_grad)
    sums, tokens = _sums_of_rows(z, potential, pair_ids, cu_seqlens, with_grad)
    losses = _losses(sums, potential, z)
    if tokens.grad is None:
        return Result(losses.loss, sums.pairs, None, None)
    scale = tokens.scale(losses.scale)
    if losses.penalty is not None:
        _add_penalty_(tokens.grad, scale, tokens.spread(losses.penalty), z)
    return Result(losses.loss, sums.pairs, tokens.grad, scale)


def _sweep_runs(z: Tensor, potential: Potential, runs: HostSegments, sequences: int, with_grad: bool) -> Result:
    """Sweep, on the CPU, over runs of tokens that pair with each other; a sequence may have several runs."""
    _, _, grad, scale = result = _nothing(z, sequences, with_grad)
    parts = list(batches(runs))
    if not parts:
        return result
    flat = z.reshape(-1, z.shape[2])
    sums, tokens = [], []
    for part in parts:
        added, part_tokens = _sums_of_rows(part.gathered(flat), potential, part.pair_ids, None, with_grad)
        if grad is not None and part_tokens.grad is not None:
            part.scatter(part_tokens.grad, grad.view(flat.shape))
        sums.append(added)
        tokens.append(part_tokens._replace(grad=None))
    run_sums = _Sums(*map(torch.cat, zip(*sums, strict=True)))
    sequence = torch.cat([part.sequence for part in parts])
    sequence_sums = _sum_runs(run_sums, potential, sequence, sequences)
    losses = _losses(sequence_sums, potential, z)
    if grad is None or scale is None:
        return Result(losses.loss, sequence_sums.pairs, None, None)
    penalty = torch.zeros_like(scale)
    # A run's gradient is in units of its own exp(shift).
    factor = losses.scale[sequence] * (run_sums.shift - sequence_sums.shift[sequence]).exp()
    first = 0
    for part, part_tokens in zip(parts, tokens, strict=True):
        chosen = slice(first, first := first + part.shape[0])
        part.scatter(part_tokens.scale(factor[chosen]), scale.view(-1))
        if losses.penalty is not None:
            part.scatter(part_tokens.spread(losses.penalty[sequence[chosen]]), penalty.view(-1))
    if losses.penalty is not None:
        _add_penalty_(grad, scale, penalty, z)
    return Result(losses.loss, sequence_sums.pairs, grad, scale)


def _sweep_stretches(
    z: Tensor, potential: Potential, pair_ids: Tensor | None, cu_seqlens: Tensor, with_grad: bool
) -> Result:
    """Sweep over packed sequences whose bounds are on the CPU and whose tokens are not: neighbours of the same length
    are swept together."""
    parts, begin = [], 0
    for length, alike in itertools.groupby(cu_seqlens.diff().tolist()):
        rows = len(list(alike))
        stretch = slice(begin, begin := begin + rows * length)
        within = None if pair_ids is None else pair_ids[0, stretch].view(rows, length)
        parts.append(_sweep_rows(z[0, stretch].view(rows, length, z.shape[2]), potential, within, None, with_grad))
    if not parts:
        return _nothing(z, 0, with_grad)
    loss, pairs = torch.cat([part.loss for part in parts]), torch.cat([part.pairs for part in parts])
    grads = [part.grad.flatten(0, 1) for part in parts if part.grad is not None]
    scales = [part.scale.flatten() for part in parts if part.scale is not None]
    if not grads:
        return Result(loss, pairs, None, None)
    return Result(loss, pairs, torch.cat(grads).view(z.shape), torch.cat(scales).view(z.shape[:2]))


class _Sums(NamedTuple):
    """Sums over the pairs of each population, ``[P]``: a row, or, with ``cu_seqlens``, a sequence of a row."""

    pairs: Tensor
    """Number of ordered pairs, int64."""
    tokens: Tensor
    """Number of tokens that have a partner."""
    total: Tensor
    """Sum of psi, or its logarithm (:class:`ExponentialPotential`), or the sum of the tokens' entropies
    (:class:`PerplexityEntropy`)."""
    shift: Tensor
    """Logarithm of the unit that G is in: G times exp(shift) is the sum over the pairs."""
    squares: Tensor
    """Sum of |z|^2 over the tokens that have a partner; 0 if the loss has no such term."""
    nonfinite: Tensor
    """Whether a token that has a partner is NaN, infinite or too large, boolean."""


class _Tokens(NamedTuple):
    """Sums over the pairs of each token."""

    grad: Tensor | None
    """Gradient without the factor of its population and without ``inverse``, ``[R, N, F]``; None if it was not asked
    for."""
    inverse: Tensor | None
    """Inverse norm of each token, ``[R, N]``; None for 1."""
    alone: Tensor | None
    """Whether a token has no partner, ``[R, N]``; None if all have one."""
    dtype: torch.dtype
    """Dtype of ``grad``."""
    reduce: _Reduction

    def scale(self, values: Tensor) -> Tensor:
        """Factor of each token's ``grad``, ``[R, N]``, from the factors of populations ``[P]``."""
        scale = self.spread(values)
        return scale if self.inverse is None else scale.mul_(self.inverse)

    def spread(self, values: Tensor) -> Tensor:
        """Values of tokens, ``[R, N]`` in new memory, from values of populations ``[P]``; 0 for tokens without a
        partner."""
        spread = self.reduce.spread(values).to(self.dtype).expand(self.reduce.shape)
        # Masked before any other use: without a pair the value may be infinite.
        return spread.clone() if self.alone is None else spread.masked_fill(self.alone, 0.0)


def _sums_of_rows(
    z: Tensor, potential: Potential, pair_ids: Tensor | None, cu_seqlens: Tensor | None, with_grad: bool
) -> tuple[_Sums, _Tokens]:
    """Sums over the pairs of the rows of ``z``; with ``cu_seqlens`` the one row holds all sequences."""
    batch, length, features = z.shape
    reduce = _Reduction(batch, length, cu_seqlens)
    partners = None if pair_ids is None else pair_id_counts(pair_ids) - 1
    alone = None if partners is None else partners <= 0

    norm = token_norms(z)
    # Tokens that are not finite are replaced by 0, which keeps them out of other sequences; the loss of their own
    # sequence becomes NaN at the end. So does that of a token whose norm, or the sum of whose features, may overflow:
    # its x would be 0, and the loss a finite wrong number.
    nonfinite = ~(norm.squeeze(-1) * math.sqrt(features)).isfinite()
    left_out = nonfinite
    if alone is not None:
        nonfinite, left_out = nonfinite & ~alone, nonfinite | alone
    x, rows = transform(z, norm.masked_fill_(left_out.unsqueeze(-1), 0.0), potential, left_out)
    if potential.row_transform == "none":
        # A distance is lost where its square leaves the dtype's range.
        nonfinite = nonfinite | (x.square().sum(-1) > LARGEST_SQUARE * torch.finfo(x.dtype).max)

    stats_dtype = statistics_dtype(z.device)
    shift: Tensor | None = None
    if isinstance(potential, PerplexityEntropy):
        entropy, grad = _perplexity_entropy(x, potential, pair_ids, partners, with_grad)
        total = reduce.sum((entropy if alone is None else entropy.masked_fill_(alone, 0.0)).to(stats_dtype))
    elif isinstance(potential, ExponentialPotential):
        total, shift, grad = _exponential_sums(x, potential, pair_ids, partners, reduce, with_grad)
    else:
        total, grad = _sums(x, potential, pair_ids, reduce, with_grad)
    if grad is not None:
        _project_(grad, x, rows, potential)
    zeros = torch.zeros_like(total)
    sums = _Sums(
        pairs=_count_pairs(potential, partners, reduce, z),
        tokens=torch.full_like(total, length) if alone is None else reduce.sum((~alone).to(stats_dtype)),
        total=total,
        shift=zeros if shift is None else shift,
        squares=reduce.sum(_squares(z.to(x.dtype), alone).to(stats_dtype)) if _has_penalty(potential) else zeros,
        nonfinite=reduce.any(nonfinite),
    )
    return sums, _Tokens(grad, None if rows is None else rows.inverse.squeeze(-1), alone, x.dtype, reduce)


def _sum_runs(run_sums: _Sums, potential: Potential, sequence: Tensor, sequences: int) -> _Sums:
    """Sums over the pairs of sequences, ``[S]``, from the sums of runs, ``[P]``, on the CPU; ``sequence`` ``[P]`` is
    the sequence of each run."""

    def added(values: Tensor) -> Tensor:
        return values.new_zeros(sequences).index_add_(0, sequence, values)

    least = torch.full((sequences,), -math.inf, dtype=run_sums.shift.dtype, device="cpu")
    shift = least.scatter_reduce_(0, sequence, run_sums.shift, "amax")
    if isinstance(potential, ExponentialPotential):
        total = added((run_sums.total - shift[sequence]).exp()).log() + shift
    else:
        total = added(run_sums.total)
    return _Sums(
        pairs=added(run_sums.pairs),
        tokens=added(run_sums.tokens),
        total=total,
        shift=shift,
        squares=added(run_sums.squares),
        nonfinite=added(run_sums.nonfinite.to(total.dtype)) > 0,
    )


class _Losses(NamedTuple):
    """Losses of sequences and the factors of their gradients, ``[S]`` each."""

    loss: Tensor
    """Loss, in the accumulation dtype; 0 for a sequence without a pair."""
    scale: Tensor
    """Factor of the gradient of the sequence's tokens."""
    penalty: Tensor | None
    """Factor of z in its own gradient, from the norm term; None without that term."""


def _losses(sums: _Sums, potential: Potential, z: Tensor) -> _Losses:
    features, dtype = z.shape[2], accumulation_dtype(z.dtype)
    count, tokens = sums.pairs.clamp(min=1).to(sums.total.dtype), sums.tokens.clamp(min=1)
    factor = 1.0
    if isinstance(potential, PerplexityEntropy):
        loss, scale = sums.total / tokens, 1 / tokens
    elif isinstance(potential, ExponentialPotential):
        loss, scale = log_mean_loss(potential, sums.total, sums.shift, count)
        rate = distance_rate(potential, features, dtype)
        factor = potential.slope_factor if rate is None else 2 * rate
    else:
        loss, scale = mean_loss(potential, sums.total, count)
    poison = torch.zeros_like(loss).masked_fill_(sums.nonfinite, math.nan)
    loss, scale, penalty = loss + poison, (scale + poison) * factor, None
    if _has_penalty(potential):
        per_token = potential.norm_weight / (tokens * features)
        loss, penalty = loss + sums.squares * per_token, 2 * per_token
    return _Losses(loss.masked_fill(sums.pairs == 0, 0.0).to(dtype), scale, penalty)


def _has_penalty(potential: Potential) -> TypeGuard[L2Repel]:
    """Whether the loss has the term norm_weight * mean(z^2), over the features of the tokens that have a partner."""
    return isinstance(potential, L2Repel) and potential.norm_weight > 0


def _squares(z: Tensor, alone: Tensor | None) -> Tensor:
    return (z if alone is None else z.masked_fill(alone.unsqueeze(-1), 0.0)).square().sum(-1)


def _add_penalty_(grad: Tensor, scale: Tensor, penalty: Tensor, z: Tensor) -> None:
    """Multiplies ``grad`` by its scale and adds ``penalty`` ``[B, L]`` times z; the scale becomes 1."""
    z_term = z.to(grad.dtype).masked_fill((penalty == 0).unsqueeze(-1), 0.0)  # masked, because 0 times infinity is NaN
    grad.mul_(scale.unsqueeze(-1)).add_(z_term.mul_(penalty.unsqueeze(-1)))
    scale.fill_(1.0)


def _nothing(z: Tensor, sequences: int, with_grad: bool) -> Result:
    """Result of an input without any pair."""
    dtype = accumulation_dtype(z.dtype)
    loss = torch.zeros(sequences, dtype=dtype, device=z.device)
    pairs = torch.zeros(sequences, dtype=torch.int64, device=z.device)
    if not with_grad:
        return Result(loss, pairs, None, None)
    grad, scale = (torch.zeros(shape, dtype=dtype, device=z.device) for shape in (z.shape, z.shape[:2]))
    return Result(loss, pairs, grad, scale)


class _Reduction:
    """Reductions from values of tokens ``[B, L]`` to values of sequences ``[S]``, and the way back."""

    def __init__(self, batch: int, length: int, cu_seqlens: Tensor | None) -> None:
        self.shape = (batch, length)
        self.offsets = None if cu_seqlens is None else cu_seqlens.long()
        self.segment = None if cu_seqlens is None else segment_of_token(cu_seqlens, length)

    def sum(self, values: Tensor) -> Tensor:
        if self.offsets is None:
            return sum_of_tokens(values)
        return torch.segment_reduce(values[0], "sum", offsets=self.offsets, unsafe=True)

    def max(self, values: Tensor) -> Tensor:
        if self.offsets is None:
            return values.amax(1)
        initial = torch.finfo(values.dtype).min
        return torch.segment_reduce(values[0], "max", offsets=self.offsets, unsafe=True, initial=initial)

    def any(self, flags: Tensor) -> Tensor:
        return self.sum(flags.float()) > 0

    def spread(self, values: Tensor) -> Tensor:
        """Values of tokens, ``[B, L]`` or a shape that broadcasts to it, from values of sequences, ``[S]``."""
        return values.unsqueeze(1) if self.segment is None else values[self.segment].unsqueeze(0)


def _count_pairs(potential: Potential, partners: Tensor | None, reduce: _Reduction, z: Tensor) -> Tensor:
    """Number of ordered pairs of each sequence, ``[S]`` int64."""
    with_itself = int(getattr(potential, "include_diagonal", False))
    if partners is None:
        batch, length = reduce.shape
        return torch.full((batch,), length * (length - 1 + with_itself), dtype=torch.int64, device=z.device)
    per_token = (partners + with_itself).masked_fill(partners <= 0, 0)
    # In float64, which holds every count up to 2^53, because segment_reduce takes no integers. MPS has no float64, but
    # no packed input either.
    return per_token.sum(1) if reduce.offsets is None else reduce.sum(per_token.double()).long()


def _project_(grad: Tensor, x: Tensor, rows: Rows | None, potential: Potential) -> None:
    """Gradient ``dz = (u - x (x . u) / |x|^2 r / (r + eps)) / (r + eps)``, with u = G, in place of G and without the
    last division. |x|^2 equals (r / (r + eps))^2 up to rounding; |x|^2 as computed leaves no part of u along x."""
    if rows is None:
        return
    length = torch.where(rows.ratio > 0, 1 / rows.ratio, torch.zeros_like(rows.ratio))
    for u, xs, lengths in in_blocks(grad, x, length):
        if potential.row_transform == "standardize":
            u.sub_(u.mean(-1, keepdim=True))
        squares = xs.square().sum(-1, keepdim=True)
        along = (xs * u).sum(-1, keepdim=True).mul_(lengths).div_(torch.where(squares > 0, squares, 1.0))
        u.addcmul_(xs, along, value=-1)


class _Tile(NamedTuple):
    """A pair of tiles: tokens ``i`` against tokens ``j`` of the rows ``batch`` of x."""

    batch: slice
    i: slice
    j: slice

    @property
    def diagonal(self) -> bool:
        """Whether i and j are the same tokens; the tile then holds every pair in both orders."""
        return self.i == self.j

    def sides(self) -> tuple[tuple[slice, slice, int], ...]:
        """Triples of the tokens whose sums the tile adds to, the tokens it sums over, and the latter's dimension in the
        tile."""
        both = (self.i, self.j, 2), (self.j, self.i, 1)
        return both[:1] if self.diagonal else both


class _Pairs:
    """The tile pairs of every row of x, their common workspace, and the mask of entries that are pairs."""

    def __init__(self, x: Tensor, pair_ids: Tensor | None) -> None:
        batch, length, _ = x.shape
        budget = _TILE_BYTES.get(x.device.type, _TILE_BYTES["cuda"]) // x.element_size()
        self.x, self.pair_ids = x, pair_ids
        self.size = math.ceil(length / math.ceil(length / math.isqrt(budget)))
        self.rows = min(max(1, budget // self.size**2), batch)
        # Allocated once: new memory for every tile would cost a page fault for every 1,024 pairs.
        self.workspace = [x.new_empty(self.rows * self.size**2) for _ in range(2)]
        # Bound on the computed squared distance of equal tokens, which is rounding alone, relative to their squared
        # norms.
        self.resolution = 16 * torch.finfo(x.dtype).eps

    def __iter__(self) -> Iterator[_Tile]:
        """Tile pairs of the upper triangle, with several rows at a time if a tile has room for them; the tiles on the
        diagonal come first."""
        batch, length, _ = self.x.shape
        bounds = [*range(0, length, self.size), length]
        for b in range(0, batch, self.rows):
            rows = slice(b, min(b + self.rows, batch))
            own: list[_Tile] = []
            others: list[_Tile] = []
            for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
                self._cut(_Tile(rows, slice(begin, end), slice(begin, end)), own, others)
                later = itertools.starmap(slice, itertools.pairwise(bounds[number + 1 :]))
                others += [_Tile(rows, slice(begin, end), tokens) for tokens in later]
            yield from own
            yield from others

    def _cut(self, tile: _Tile, own: list[_Tile], others: list[_Tile]) -> None:
        """Adds the tile pairs of some tokens with themselves: a large tile is halved, which leaves out a quarter of
        it."""
        rows, begin, end = tile.batch, tile.i.start, tile.i.stop
        if end - begin <= max(256, self.size // 2):
            own.append(tile)
            return
        first, second = slice(begin, (begin + end) // 2), slice((begin + end) // 2, end)
        self._cut(_Tile(rows, first, first), own, others)
        self._cut(_Tile(rows, second, second), own, others)
        others.append(_Tile(rows, first, second))

    def similarities(self, tile: _Tile) -> Tensor:
        """Similarities X_I X_J^T, in the first workspace."""
        out = self._view(0, tile)
        return torch.bmm(self.x[tile.batch, tile.i], self.x[tile.batch, tile.j].transpose(1, 2), out=out)

    def scratch(self, tile: _Tile) -> Tensor:
        """The second workspace, uninitialised."""
        return self._view(1, tile)

    def _view(self, number: int, tile: _Tile) -> Tensor:
        shape = [part.stop - part.start for part in (tile.batch, tile.i, tile.j)]
        return self.workspace[number][: math.prod(shape)].view(shape)

    def squared_distances(self, tile: _Tile) -> Tensor:
        """Squared distances |x_i - x_j|^2 from the inner products and the squared norms, in the first workspace; 0 for
        equal tokens, and infinite for a token with itself."""
        c, squares = self.similarities(tile), self.scratch(tile)
        squares_i, squares_j = (
            self.squares[tile.batch, tile.i].unsqueeze(2),
            self.squares[tile.batch, tile.j].unsqueeze(1),
        )
        torch.add(squares_i, squares_j, out=squares)
        squared = torch.sub(squares, c, alpha=2, out=c).clamp_(min=0)
        if tile.diagonal:
            squared.diagonal(dim1=1, dim2=2).fill_(math.inf)
        # Equal tokens are known by equal squared norms and a computed distance no larger than the products' rounding.
        # (A comparison with the NaN of another row is False.)
        if squared.device.type != "cpu" or not squared.amin() >= self.resolution * 2 * self.squares.amax():
            squared.masked_fill_((squares_i == squares_j) & (squared < squares.mul_(self.resolution)), 0.0)
        return squared

    @functools.cached_property
    def squares(self) -> Tensor:
        """Squared norms |x|^2, ``[B, L]``."""
        return self.x.square().sum(-1)

    def leave_out_equal(self, tile: _Tile, weights: Tensor) -> Tensor:
        """``weights`` with 0 for equal tokens, in place: equal tokens add 0 to each other's gradient, and beside their
        psi of 1 the working precision would round away the psi of pairs far apart."""
        if self.keys is not None:
            equal = [
                statistic[tile.batch, tile.i].unsqueeze(2) == statistic[tile.batch, tile.j].unsqueeze(1)
                for statistic in (self.keys, self.squares)
            ]
            weights.masked_fill_(equal[0] & equal[1], 0.0)
        return weights

    @functools.cached_property
    def keys(self) -> Tensor | None:
        """Hash of the bits of x, ``[B, L]``; None, on the CPU, if no two tokens of a row have the same hash."""
        bits = self.x.view(torch.int32 if self.x.dtype == torch.float32 else torch.int64)
        odd = torch.arange(1, 2 * bits.shape[2], 2, device=bits.device, dtype=torch.int64).mul_(0x1E3779B97F4A7C15)
        mixed = bits.mul((odd >> 16).to(bits.dtype) | 1)  # wraps around
        # A product leaves a flipped sign in the highest bit, where two of them cancel: x and -x would have one hash.
        keys: Tensor = mixed.bitwise_xor_(mixed >> 15).sum(2, dtype=bits.dtype)
        if keys.device.type == "cpu" and not (keys.sort(1).values.diff(dim=1) == 0).any():
            return None
        return keys

    def leave_out(self, tile: _Tile, values: Tensor, value: float) -> None:
        """Puts ``value`` at the entries that are no pairs, the diagonal among them."""
        if self.pair_ids is not None:
            i, j = self.pair_ids[tile.batch, tile.i].unsqueeze(2), self.pair_ids[tile.batch, tile.j].unsqueeze(1)
            # A token with a negative pair id has x = 0, but psi of it need not be 0.
            values.masked_fill_((i != j) | (i < 0), value)
        if tile.diagonal:
            values.diagonal(dim1=1, dim2=2).fill_(value)

    def accumulate(self, grad: Tensor, tile: _Tile, weights: Tensor) -> None:
        """Adds W X_J to G_I and, off the diagonal, W^T X_I to G_J; ``grad`` need not be initialised."""
        for side, others, dim in tile.sides():
            self.accumulate_side(grad, tile, side, others, weights if dim == 2 else weights.transpose(1, 2))

    def accumulate_side(self, grad: Tensor, tile: _Tile, side: slice, others: slice, weights: Tensor) -> None:
        grad[tile.batch, side].baddbmm_(weights, self.x[tile.batch, others], beta=0 if tile.diagonal else 1)


def _sums(
    x: Tensor, potential: Potential, pair_ids: Tensor | None, reduce: _Reduction, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum of psi of each sequence, and G, for a potential that is a function of c and needs no shift."""
    total = _PairTotal(x, reduce)
    grad = torch.empty_like(x) if with_grad else None
    pairs = _Pairs(x, pair_ids)
    for tile in pairs:
        c = pairs.similarities(tile)
        psi = potential.value(c)
        pairs.leave_out(tile, psi, 0.0)
        total.add(psi, tile)
        if grad is not None:
            slope = potential.slope(c)
            pairs.leave_out(tile, slope, 0.0)
            pairs.accumulate(grad, tile, slope)
    return total.sequence_sums(), grad


class _PairTotal:
    """Sum of psi over all ordered pairs of each sequence, accumulated tile by tile."""

    def __init__(self, x: Tensor, reduce: _Reduction) -> None:
        self.reduce = reduce
        # Sums per token where sequences share a row; else sums per row are enough.
        shape = x.shape[:1] if reduce.offsets is None else x.shape[:2]
        self.value = torch.zeros(shape, dtype=statistics_dtype(x.device), device=x.device)

    def add(self, psi: Tensor, tile: _Tile) -> None:
        if self.reduce.offsets is None:
            # The sums over columns come first, because one thread sums a row.
            self.value[tile.batch] += psi.sum(2).sum(1, dtype=self.value.dtype) * (1 if tile.diagonal else 2)
            return
        self.value[tile.batch, tile.i] += psi.sum(2)
        if not tile.diagonal:
            self.value[tile.batch, tile.j] += psi.sum(1)

    def sequence_sums(self) -> Tensor:
        return self.value if self.reduce.offsets is None else self.reduce.sum(self.value)


def _exponential_sums(
    x: Tensor,
    potential: ExponentialPotential,
    pair_ids: Tensor | None,
    partners: Tensor | None,
    reduce: _Reduction,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logarithm of the sum of psi of each sequence; the shift, where G is in units of exp(shift); and G.

    For a small range of the exponent one fixed shift, in the middle of the range, is enough. Else each token keeps its
    largest exponent so far, as in an online softmax, and its sums are rescaled when that exponent grows.
    """
    rate = distance_rate(potential, x.shape[2], x.dtype)
    low, high = potential.exponent_range()
    if high - low <= _SAFE_RANGE:
        # No shift, which saves a pass, where exp neither overflows nor vanishes; nor for distances, whose exponent is
        # at most 0: exp(-_SAFE_RANGE) is a normal number of fp32.
        alone = rate is not None or (low >= -_SAFE_RANGE / 2 and high <= _SAFE_RANGE / 2)
        middle = 0.0 if alone else (low + high) / 2
        return _bounded_exponential_sums(x, potential, rate, middle, pair_ids, reduce, with_grad)

    with_itself = isinstance(potential, DistancePotential) and potential.include_diagonal
    pairs = _Pairs(x, pair_ids)
    # Largest exponent of each token; for distances the largest -|x_i - x_j|^2, which is multiplied by the rate after
    # the subtraction, because the difference may be small.
    largest = x.new_full(x.shape[:2], 0.0 if with_itself else torch.finfo(x.dtype).min)
    row_sum = torch.zeros_like(largest)
    weight_sum = torch.zeros_like(largest)  # sum of each token's weights, without equal tokens
    grad = torch.empty_like(x) if with_grad else None
    for tile in pairs:
        slope = None
        if rate is not None:
            exponent = pairs.squared_distances(tile).neg_()
        else:
            exponent = pairs.similarities(tile)
            slope = torch.empty_like(exponent) if with_grad and potential.varying_slope else None
            potential.exponent_(exponent, slope)
        pairs.leave_out(tile, exponent, -math.inf)
        for side, others, dim in tile.sides():
            before = largest[tile.batch, side]
            now = torch.maximum(before, exponent.amax(dim))
            weights = torch.sub(exponent, now.unsqueeze(dim), out=pairs.scratch(tile))
            shrink = before - now
            if rate is not None:
                weights.mul_(rate)
                shrink.mul_(rate)
            weights.exp_()
            shrink.exp_()
            row_sum[tile.batch, side] = row_sum[tile.batch, side] * shrink + weights.sum(dim)
            largest[tile.batch, side] = now
            if grad is not None:
                if slope is not None:
                    weights.mul_(slope)
                if rate is not None:
                    sums = pairs.leave_out_equal(tile, weights).sum(dim)
                    weight_sum[tile.batch, side] = weight_sum[tile.batch, side] * shrink + sums
                grad[tile.batch, side].mul_(shrink.unsqueeze(-1))
                pairs.accumulate_side(grad, tile, side, others, weights if dim == 2 else weights.transpose(1, 2))
    shift = reduce.max(largest)
    # The initial value of ``largest`` is finite, so a sequence without a pair gives exp(0), not exp(inf - inf).
    relative = largest - reduce.spread(shift)
    shift = shift.to(statistics_dtype(x.device))
    if rate is not None:
        relative, shift = relative.mul_(rate), shift * rate
    relative.exp_()
    total = row_sum.clone()
    if with_itself:
        total += 1 if partners is None else (partners > 0).to(total.dtype)
    log_total = reduce.sum((total * relative).to(shift.dtype)).log() + shift
    if grad is not None:
        if isinstance(potential, DistancePotential):
            _difference_(grad, x, weight_sum)
        grad.mul_(relative.unsqueeze(-1))
    return log_total, shift, grad


def distance_rate(potential: ExponentialPotential, features: int, dtype: torch.dtype) -> float | None:
    """Rate of ``potential``, at most the largest number of the dtype of x; None if it is not of the distance."""
    rate = potential.distance_rate(features)
    return None if rate is None else min(rate, torch.finfo(dtype).max)


def _difference_(grad: Tensor, x: Tensor, row_sum: Tensor) -> None:
    """Turns ``sum_j w_ij x_j`` into ``sum_j w_ij (x_j - x_i)``, in place."""
    grad.addcmul_(x, row_sum.unsqueeze(-1), value=-1)


def _bounded_exponential_sums(
    x: Tensor,
    potential: ExponentialPotential,
    rate: float | None,
    shift: float,
    pair_ids: Tensor | None,
    reduce: _Reduction,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    total = _PairTotal(x, reduce)
    grad = torch.empty_like(x) if with_grad else None
    pairs = _Pairs(x, pair_ids)
    for tile in pairs:
        slope = pairs.scratch(tile) if with_grad and potential.varying_slope else None
        if rate is not None:
            psi = pairs.squared_distances(tile).mul_(-rate)
        else:
            psi = potential.exponent_(pairs.similarities(tile), slope)
        if shift:
            psi.sub_(shift)
        psi.exp_()
        pairs.leave_out(tile, psi, 0.0)
        total.add(psi, tile)
        if grad is not None:
            weights = psi if slope is None else psi.mul_(slope)
            pairs.accumulate(grad, tile, weights if rate is None else pairs.leave_out_equal(tile, weights))
    sums = total.sequence_sums()
    return sums.log() + shift, torch.full_like(sums, shift), grad


def _perplexity_entropy(
    x: Tensor, potential: PerplexityEntropy, pair_ids: Tensor | None, partners: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum ``sum_j P_ij log2(P_ij + eps)`` of each token, ``[B, L]``, and the gradient of the sums' total over each row.

    Notation: d^2_ij = |z_i - z_j|^2; m_i, the least d^2_ij of token i; P_ij = exp((m_i - d^2_ij) / sigma2) / s_i; p,
    the mean of P over a token's partners; h = log2((P + eps) / (p + eps)); g = d(P h) / dP - 1 / ln 2 = h - eps / ((P +
    eps) ln 2). The entropy is log2(p + eps) + sum_j P h, because P sums to 1. The constant 1 / ln 2 leaves the gradient
    for the same reason. Without the constants, h and g keep their digits where P varies little. The derivative of the
    entropy by the exponent -d^2_ij / sigma2 is A_ij = P_ij (g_ij - sum_k P_ik g_ik), and dz_i = 2 / sigma2 * sum_j
    (A_ij + A_ji) (z_j - z_i). Three passes compute m and s (kept apart, because a rounded m + log s of some hundreds
    would cost P four digits); the entropy and sum_k P g; and A.
    """
    pairs = _Pairs(x, pair_ids)
    info = torch.finfo(x.dtype)
    rate = min(1 / potential.sigma2, info.max)

    def squared_distances(tile: _Tile) -> Tensor:
        squared = pairs.squared_distances(tile)
        pairs.leave_out(tile, squared, math.inf)
        return squared

    nearest = x.new_full(x.shape[:2], info.max)
    total = torch.zeros_like(nearest)
    for tile in pairs:
        squared = squared_distances(tile)
        for side, _, dim in tile.sides():
            before = nearest[tile.batch, side]
            now = torch.minimum(before, squared.amin(dim))
            added = torch.sub(now.unsqueeze(dim), squared, out=pairs.scratch(tile)).mul_(rate).exp_().sum(dim)
            total[tile.batch, side] = total[tile.batch, side] * (now - before).mul_(rate).exp_() + added
            nearest[tile.batch, side] = now
    # A token without a partner has no P.
    total.masked_fill_(total == 0, 1.0)
    if partners is None:
        average = torch.full_like(total, 1 / (x.shape[1] - 1))
    else:
        average = 1 / partners.clamp(min=1).to(x.dtype)

    def probabilities(squared: Tensor, tile: _Tile, side: slice, dim: int) -> tuple[Tensor, Tensor]:
        p = torch.sub(nearest[tile.batch, side].unsqueeze(dim), squared).mul_(rate).exp_()
        p.div_(total[tile.batch, side].unsqueeze(dim))
        mean = average[tile.batch, side].unsqueeze(dim)
        # log1p keeps the digits where P is near its mean, the logarithm of the quotient where P is far below its mean.
        h = (p - mean).div_(mean + potential.eps)
        far_below = ((p + potential.eps) / (mean + potential.eps)).clamp_(min=info.tiny).log_()
        return p, torch.where(h > -0.5, h.log1p(), far_below).mul_(1 / math.log(2))

    def derivative(p: Tensor, h: Tensor) -> Tensor:
        return h - potential.eps / (p + potential.eps).clamp_(min=info.tiny).mul_(math.log(2))

    entropy, expected = (average + potential.eps).log2_(), torch.zeros_like(total)
    for tile in pairs:
        squared = squared_distances(tile)
        for side, _, dim in tile.sides():
            p, h = probabilities(squared, tile, side, dim)
            entropy[tile.batch, side] += (p * h).sum(dim)
            if with_grad:
                expected[tile.batch, side] += (p * derivative(p, h)).sum(dim)
    if not with_grad:
        return entropy, None

    def slopes(squared: Tensor, tile: _Tile, side: slice, dim: int) -> Tensor:
        p, h = probabilities(squared, tile, side, dim)
        return p * (derivative(p, h) - expected[tile.batch, side].unsqueeze(dim))

    grad, row_sum = torch.empty_like(x), torch.zeros_like(total)
    for tile in pairs:
        squared = squared_distances(tile)
        weights = slopes(squared, tile, tile.i, 2)
        # A diagonal tile takes P_ji from the distance of (j, i), not of (i, j), which may be rounded differently: the
        # nearest distance and the sum of token j are from row j of the tile.
        weights = weights + (weights.mT if tile.diagonal else slopes(squared, tile, tile.j, 1))
        for side, _, dim in tile.sides():
            row_sum[tile.batch, side] += weights.sum(dim)
        pairs.accumulate(grad, tile, weights)
    _difference_(grad, x, row_sum)
    return entropy, grad.mul_(2 * rate)
