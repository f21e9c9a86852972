"""The torch backend: the symmetric sweep over tiles of pairs with library matrix products, on any device.

A pair of tiles (I, J), I <= J, of a sequence's tokens computes its similarities S = X_I X_J^T once and feeds both
G_I += W X_J and G_J += W^T X_I, where W holds the slopes: 3 B L^2 F FLOPs for loss and gradient (1 for the
similarities, half of them by symmetry, and 2 for the gradient), 1 for the loss alone. What the loss divides the
gradient by is one number a sequence, so it is multiplied in at the end and one pass over the pairs does. Memory: x and
G, and a workspace whose size is a constant.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from dispersion_kernels.backends.batches import batches
from dispersion_kernels.numerics import (
    Rows,
    accumulation_dtype,
    in_blocks,
    log_mean_loss,
    mean_loss,
    sum_of_tokens,
    token_norms,
    transform,
    wide_dtype,
)
from dispersion_kernels.potentials import (
    DistancePotential,
    ExponentialPotential,
    L2Repel,
    PerplexityEntropy,
    Potential,
)
from dispersion_kernels.segments import HostSegments, group_sizes, host_segments, segment_of_token, within_segments

# Bytes of one tile of similarities: on a CPU it should stay in the last-level cache, on a GPU it must fill the machine.
_TILE_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
# The largest |x|^2 of a potential of the distance, as a share of the largest number: sums of four stay finite.
LARGEST_SQUARE = 0.03
# A range of the exponent that fp32 holds around its middle, sums over 2^31 tokens included.
_SAFE_RANGE = 80.0


class Result(NamedTuple):
    """What a sweep gives."""

    loss: Tensor
    """``[S]`` in the accumulation dtype; 0 for a sequence without a pair."""
    pairs: Tensor
    """``[S]`` int64: the ordered pairs of each sequence."""
    grad: Tensor | None
    """``[B, L, F]`` in the accumulation dtype: d loss of its sequence / d z, but for its scale. None where it was not
    asked for."""
    scale: Tensor | None
    """``[B, L]`` in the accumulation dtype: what ``grad`` is to be multiplied by. Kept apart, because backward has
    another factor, and one pass over the memory does both."""


def sweep(z: Tensor, potential: Potential, groups: Tensor | None, cu_seqlens: Tensor | None, with_grad: bool) -> Result:
    """Loss of each sequence and, if asked, its gradient. Arguments as in :mod:`dispersion_kernels.segments`.

    On the CPU the runs of tokens that pair with each other are swept, those of like length together. On an accelerator
    no value there is read, because that would synchronise: the sweep visits all pairs of a row, or of a packed sequence
    whose bounds are on the CPU, and masks those of different groups.
    """
    if cu_seqlens is None and (groups is None or z.device.type != "cpu"):
        return _sweep_rows(z, potential, groups, None, with_grad)
    if z.device.type == "cpu":
        sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        runs = host_segments(z.shape[0], z.shape[1], groups, cu_seqlens)
        return _sweep_runs(z, potential, runs, sequences, with_grad)
    assert cu_seqlens is not None
    if cu_seqlens.device.type == "cpu":
        return _sweep_stretches(z, potential, groups, cu_seqlens, with_grad)
    groups = within_segments(groups, cu_seqlens, z.shape[1])
    return _sweep_rows(z, potential, groups, cu_seqlens, with_grad)


def _sweep_rows(
    z: Tensor, potential: Potential, groups: Tensor | None, cu_seqlens: Tensor | None, with_grad: bool
) -> Result:
    """The sweep over the rows of ``z``: each a sequence, or, with ``cu_seqlens``, the one that holds them all."""
    if z.shape[0] == 0 or z.shape[1] < 2:
        return _nothing(z, z.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1, with_grad)
    sums, tokens = _sums_of_rows(z, potential, groups, cu_seqlens, with_grad)
    losses = _losses(sums, potential, z)
    if tokens.grad is None:
        return Result(losses.loss, sums.pairs, None, None)
    scale = tokens.scale(losses.scale)
    if losses.penalty is not None:
        _add_penalty_(tokens.grad, scale, tokens.spread(losses.penalty), z)
    return Result(losses.loss, sums.pairs, tokens.grad, scale)


def _sweep_runs(z: Tensor, potential: Potential, runs: HostSegments, sequences: int, with_grad: bool) -> Result:
    """The sweep over runs of tokens that pair with each other, on the CPU; a sequence may have several."""
    _, _, grad, scale = result = _nothing(z, sequences, with_grad)
    parts = list(batches(runs))
    if not parts:
        return result
    flat = z.reshape(-1, z.shape[2])
    sums, tokens = [], []
    for part in parts:
        added, swept = _sums_of_rows(part.gathered(flat), potential, part.groups, None, with_grad)
        if grad is not None and swept.grad is not None:
            part.scatter(swept.grad, grad.view(flat.shape))
        sums.append(added)
        tokens.append(swept._replace(grad=None))
    of_runs = _Sums(*map(torch.cat, zip(*sums, strict=True)))
    sequence = torch.cat([part.sequence for part in parts])
    of_sequences = _of_sequences(of_runs, potential, sequence, sequences)
    losses = _losses(of_sequences, potential, z)
    if grad is None or scale is None:
        return Result(losses.loss, of_sequences.pairs, None, None)
    penalty = torch.zeros_like(scale)
    # A run's gradient is in units of its own exp(shift).
    factor = losses.scale[sequence] * (of_runs.shift - of_sequences.shift[sequence]).exp()
    first = 0
    for part, swept in zip(parts, tokens, strict=True):
        units = slice(first, first := first + part.shape[0])
        part.scatter(swept.scale(factor[units]), scale.view(-1))
        if losses.penalty is not None:
            part.scatter(swept.spread(losses.penalty[sequence[units]]), penalty.view(-1))
    if losses.penalty is not None:
        _add_penalty_(grad, scale, penalty, z)
    return Result(losses.loss, of_sequences.pairs, grad, scale)


def _sweep_stretches(
    z: Tensor, potential: Potential, groups: Tensor | None, cu_seqlens: Tensor, with_grad: bool
) -> Result:
    """The sweep over packed sequences whose bounds alone are on the CPU: neighbours of one length together."""
    parts, begin = [], 0
    for length, alike in itertools.groupby(cu_seqlens.diff().tolist()):
        rows = len(list(alike))
        stretch = slice(begin, begin := begin + rows * length)
        within = None if groups is None else groups[0, stretch].view(rows, length)
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
    """What the pairs of each unit add up to, ``[U]``: a unit is a row, or, with ``cu_seqlens``, a sequence of a row."""

    pairs: Tensor
    """int64: the ordered pairs."""
    tokens: Tensor
    """The tokens that have a partner."""
    total: Tensor
    """The sum of psi, or its logarithm (:class:`ExponentialPotential`), or the sum of the tokens' entropies
    (:class:`PerplexityEntropy`)."""
    shift: Tensor
    """G is in units of its exponential."""
    squares: Tensor
    """The sum of |z|^2 over the tokens that have a partner; 0 where the loss has no term of it."""
    nonfinite: Tensor
    """Boolean: whether one of them is NaN, infinite or too large."""


class _Tokens(NamedTuple):
    """What the pairs of each token add up to."""

    grad: Tensor | None
    """``[R, N, F]``: d loss / d z, but for a factor of its unit and ``inverse``; None where it was not asked for."""
    inverse: Tensor | None
    """``[R, N]``; None for 1."""
    alone: Tensor | None
    """``[R, N]``: whether a token has no partner; None where all have."""
    dtype: torch.dtype
    """That of ``grad``."""
    reduce: _Reduction

    def scale(self, of_units: Tensor) -> Tensor:
        """``[R, N]``: what ``grad`` is to be multiplied by, from the factors of units ``[U]``."""
        scale = self.spread(of_units)
        return scale if self.inverse is None else scale.mul_(self.inverse)

    def spread(self, of_units: Tensor) -> Tensor:
        """``[R, N]`` in new memory, 0 for tokens without a partner."""
        spread = self.reduce.spread(of_units).to(self.dtype).expand(self.reduce.shape)
        # Before it meets anything: where there is no pair it may be infinite.
        return spread.clone() if self.alone is None else spread.masked_fill(self.alone, 0.0)


def _sums_of_rows(
    z: Tensor, potential: Potential, groups: Tensor | None, cu_seqlens: Tensor | None, with_grad: bool
) -> tuple[_Sums, _Tokens]:
    """What the pairs of the rows of ``z`` add up to; with ``cu_seqlens`` the row holds the sequences of all units."""
    batch, length, features = z.shape
    reduce = _Reduction(batch, length, cu_seqlens)
    partners = None if groups is None else group_sizes(groups) - 1
    alone = None if partners is None else partners <= 0

    norm = token_norms(z)
    # A zero in place of what is not finite keeps it out of other sequences; its own is made NaN at the end. So is one
    # whose norm overflows, or the sum of whose features might: its x would be 0, and the loss a finite wrong number.
    nonfinite = ~(norm.squeeze(-1) * math.sqrt(features)).isfinite()
    left_out = nonfinite
    if alone is not None:
        nonfinite, left_out = nonfinite & ~alone, nonfinite | alone
    x, rows = transform(z, norm.masked_fill_(left_out.unsqueeze(-1), 0.0), potential, left_out)
    if potential.row_transform == "none":
        # A distance is lost where its square leaves the dtype's range.
        nonfinite = nonfinite | (x.square().sum(-1) > LARGEST_SQUARE * torch.finfo(x.dtype).max)

    wide = wide_dtype(z.device)
    shift: Tensor | None = None
    if isinstance(potential, PerplexityEntropy):
        entropy, grad = _perplexity_entropy(x, potential, groups, partners, with_grad)
        total = reduce.sum((entropy if alone is None else entropy.masked_fill_(alone, 0.0)).to(wide))
    elif isinstance(potential, ExponentialPotential):
        total, shift, grad = _exponential_sums(x, potential, groups, partners, reduce, with_grad)
    else:
        total, grad = _sums(x, potential, groups, reduce, with_grad)
    if grad is not None:
        _project_(grad, x, rows, potential)
    zeros = torch.zeros_like(total)
    sums = _Sums(
        pairs=_count_pairs(potential, partners, reduce, z),
        tokens=torch.full_like(total, length) if alone is None else reduce.sum((~alone).to(wide)),
        total=total,
        shift=zeros if shift is None else shift,
        squares=reduce.sum(_squares(z.to(x.dtype), alone).to(wide)) if _has_penalty(potential) else zeros,
        nonfinite=reduce.any(nonfinite),
    )
    return sums, _Tokens(grad, None if rows is None else rows.inverse.squeeze(-1), alone, x.dtype, reduce)


def _of_sequences(of_runs: _Sums, potential: Potential, sequence: Tensor, sequences: int) -> _Sums:
    """Those of sequences ``[S]`` on the CPU from those of runs, whose ``sequence`` is ``[U]``."""

    def added(values: Tensor) -> Tensor:
        return values.new_zeros(sequences).index_add_(0, sequence, values)

    least = torch.full((sequences,), -math.inf, dtype=of_runs.shift.dtype, device="cpu")
    shift = least.scatter_reduce_(0, sequence, of_runs.shift, "amax")
    if isinstance(potential, ExponentialPotential):
        total = added((of_runs.total - shift[sequence]).exp()).log() + shift
    else:
        total = added(of_runs.total)
    return _Sums(
        pairs=added(of_runs.pairs),
        tokens=added(of_runs.tokens),
        total=total,
        shift=shift,
        squares=added(of_runs.squares),
        nonfinite=added(of_runs.nonfinite.to(total.dtype)) > 0,
    )


class _Losses(NamedTuple):
    """``[S]``."""

    loss: Tensor
    """In the accumulation dtype; 0 for a sequence without a pair."""
    scale: Tensor
    """What the gradient of its tokens is to be multiplied by."""
    penalty: Tensor | None
    """What of z is to be added to its own gradient."""


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
    """Adds to ``grad``, whose scale is multiplied in first, ``penalty`` ``[B, L]`` times z."""
    of_z = z.to(grad.dtype).masked_fill((penalty == 0).unsqueeze(-1), 0.0)  # of the others not even what is not finite
    grad.mul_(scale.unsqueeze(-1)).add_(of_z.mul_(penalty.unsqueeze(-1)))
    scale.fill_(1.0)


def _nothing(z: Tensor, sequences: int, with_grad: bool) -> Result:
    """The result where there is no pair at all."""
    dtype = accumulation_dtype(z.dtype)
    loss = torch.zeros(sequences, dtype=dtype, device=z.device)
    pairs = torch.zeros(sequences, dtype=torch.int64, device=z.device)
    if not with_grad:
        return Result(loss, pairs, None, None)
    grad, scale = (torch.zeros(shape, dtype=dtype, device=z.device) for shape in (z.shape, z.shape[:2]))
    return Result(loss, pairs, grad, scale)


class _Reduction:
    """From values of tokens ``[B, L]`` to values of sequences ``[S]``, and back."""

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
        """``[B, L]`` (or what broadcasts to it) from ``[S]``."""
        return values.unsqueeze(1) if self.segment is None else values[self.segment].unsqueeze(0)


def _count_pairs(potential: Potential, partners: Tensor | None, reduce: _Reduction, z: Tensor) -> Tensor:
    """The ordered pairs of each sequence."""
    with_itself = int(getattr(potential, "include_diagonal", False))
    if partners is None:
        batch, length = reduce.shape
        return torch.full((batch,), length * (length - 1 + with_itself), dtype=torch.int64, device=z.device)
    per_token = (partners + with_itself).masked_fill(partners <= 0, 0)
    # float64 holds every count up to 2^53; segment_reduce has no integers. MPS has no float64 and no packed input.
    return per_token.sum(1) if reduce.offsets is None else reduce.sum(per_token.double()).long()


def _project_(grad: Tensor, x: Tensor, rows: Rows | None, potential: Potential) -> None:
    """``dz = (u - x (x . u) / |x|^2 r / (r + eps)) / (r + eps)`` with u = G, in place of it and but for the last
    division. |x|^2 is (r / (r + eps))^2, but for a rounding that would leave a part of u along x."""
    if rows is None:
        return
    length = torch.where(rows.ratio > 0, 1 / rows.ratio, torch.zeros_like(rows.ratio))
    for u, xs, of_rows in in_blocks(grad, x, length):
        if potential.row_transform == "standardize":
            u.sub_(u.mean(-1, keepdim=True))
        squares = xs.square().sum(-1, keepdim=True)
        along = (xs * u).sum(-1, keepdim=True).mul_(of_rows).div_(torch.where(squares > 0, squares, 1.0))
        u.addcmul_(xs, along, value=-1)


class _Tile(NamedTuple):
    """A pair of tiles: rows ``batch`` of x, its tokens ``i`` against its tokens ``j``."""

    batch: slice
    i: slice
    j: slice

    @property
    def diagonal(self) -> bool:
        """Whether i and j are the same tokens; the tile then holds every pair in both orders."""
        return self.i == self.j

    def sides(self) -> tuple[tuple[slice, slice, int], ...]:
        """The tokens whose sums the tile adds to, those it sums over, and the dimension of the tile that these are."""
        both = (self.i, self.j, 2), (self.j, self.i, 1)
        return both[:1] if self.diagonal else both


class _Pairs:
    """The tile pairs of every row of x, the workspace they share, and which of their entries are pairs."""

    def __init__(self, x: Tensor, groups: Tensor | None) -> None:
        batch, length, _ = x.shape
        budget = _TILE_BYTES.get(x.device.type, _TILE_BYTES["cuda"]) // x.element_size()
        self.x, self.groups = x, groups
        self.size = math.ceil(length / math.ceil(length / math.isqrt(budget)))
        self.rows = min(max(1, budget // self.size**2), batch)
        # Allocated once: fresh memory for every tile would cost a page fault for every 1,024 pairs.
        self.workspace = [x.new_empty(self.rows * self.size**2) for _ in range(2)]
        # What rounding may leave of the distance of equal tokens, relative to their squared norms.
        self.resolution = 16 * torch.finfo(x.dtype).eps

    def __iter__(self) -> Iterator[_Tile]:
        """The upper triangle of tile pairs, several rows at once where a tile has room for them; first all tokens with
        those of their own tile."""
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
        """The tile of some tokens with themselves: in halves where it is large, which leaves out a quarter of it."""
        rows, begin, end = tile.batch, tile.i.start, tile.i.stop
        if end - begin <= max(256, self.size // 2):
            own.append(tile)
            return
        first, second = slice(begin, (begin + end) // 2), slice((begin + end) // 2, end)
        self._cut(_Tile(rows, first, first), own, others)
        self._cut(_Tile(rows, second, second), own, others)
        others.append(_Tile(rows, first, second))

    def similarities(self, tile: _Tile) -> Tensor:
        """X_I X_J^T, in the first workspace."""
        out = self._view(0, tile)
        return torch.bmm(self.x[tile.batch, tile.i], self.x[tile.batch, tile.j].transpose(1, 2), out=out)

    def scratch(self, tile: _Tile) -> Tensor:
        """The second workspace, uninitialised."""
        return self._view(1, tile)

    def _view(self, number: int, tile: _Tile) -> Tensor:
        shape = [part.stop - part.start for part in (tile.batch, tile.i, tile.j)]
        return self.workspace[number][: math.prod(shape)].view(shape)

    def squared_distances(self, tile: _Tile) -> Tensor:
        """|x_i - x_j|^2 from the inner products and the squared norms, in the first workspace; 0 for equal tokens, and
        infinite for a token with itself."""
        c, of_both = self.similarities(tile), self.scratch(tile)
        squares_i, squares_j = (
            self.squares[tile.batch, tile.i].unsqueeze(2),
            self.squares[tile.batch, tile.j].unsqueeze(1),
        )
        torch.add(squares_i, squares_j, out=of_both)
        squared = torch.sub(of_both, c, alpha=2, out=c).clamp_(min=0)
        if tile.diagonal:
            squared.diagonal(dim1=1, dim2=2).fill_(math.inf)
        # Equal tokens have the same squared norm, and a distance that is the rounding of the products alone.
        if squared.device.type != "cpu" or squared.amin() < self.resolution * 2 * self.squares.amax():
            squared.masked_fill_((squares_i == squares_j) & (squared < of_both.mul_(self.resolution)), 0.0)
        return squared

    @functools.cached_property
    def squares(self) -> Tensor:
        """``[B, L]``: |x|^2."""
        return self.x.square().sum(-1)

    def leave_out_equal(self, tile: _Tile, weights: Tensor) -> Tensor:
        """``weights`` with 0 for equal tokens: what they add to each other's gradient is 0, and beside their psi of 1
        the working precision would round away that of pairs far apart."""
        if self.keys is not None:
            equal = [
                of_tokens[tile.batch, tile.i].unsqueeze(2) == of_tokens[tile.batch, tile.j].unsqueeze(1)
                for of_tokens in (self.keys, self.squares)
            ]
            weights.masked_fill_(equal[0] & equal[1], 0.0)
        return weights

    @functools.cached_property
    def keys(self) -> Tensor | None:
        """``[B, L]``: hash of the bits of x; None where no two tokens of a row are known to be equal."""
        bits = self.x.view(torch.int32 if self.x.dtype == torch.float32 else torch.int64)
        odd = torch.arange(1, 2 * bits.shape[2], 2, device=bits.device, dtype=torch.int64).mul_(0x1E3779B97F4A7C15)
        keys: Tensor = bits.mul((odd >> 16).to(bits.dtype) | 1).sum(2, dtype=bits.dtype)  # wraps around
        if keys.device.type == "cpu" and not (keys.sort(1).values.diff(dim=1) == 0).any():
            return None
        return keys

    def leave_out(self, tile: _Tile, values: Tensor, value: float) -> None:
        """Puts ``value`` at the entries that are no pairs, the diagonal among them."""
        if self.groups is not None:
            i, j = self.groups[tile.batch, tile.i].unsqueeze(2), self.groups[tile.batch, tile.j].unsqueeze(1)
            # x is 0 for a token with a negative group, but psi need not be.
            values.masked_fill_((i != j) | (i < 0), value)
        if tile.diagonal:
            values.diagonal(dim1=1, dim2=2).fill_(value)

    def accumulate(self, grad: Tensor, tile: _Tile, weights: Tensor) -> None:
        """G_I += W X_J and, off the diagonal, G_J += W^T X_I; ``grad`` need not be initialised."""
        for side, others, dim in tile.sides():
            self.accumulate_side(grad, tile, side, others, weights if dim == 2 else weights.transpose(1, 2))

    def accumulate_side(self, grad: Tensor, tile: _Tile, side: slice, others: slice, weights: Tensor) -> None:
        grad[tile.batch, side].baddbmm_(weights, self.x[tile.batch, others], beta=0 if tile.diagonal else 1)


def _sums(
    x: Tensor, potential: Potential, groups: Tensor | None, reduce: _Reduction, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """``sum psi`` of each sequence, and G, for a potential that is a function of c and needs no shift."""
    total = _PairTotal(x, reduce)
    grad = torch.empty_like(x) if with_grad else None
    pairs = _Pairs(x, groups)
    for tile in pairs:
        c = pairs.similarities(tile)
        psi = potential.value(c)
        pairs.leave_out(tile, psi, 0.0)
        total.add(psi, tile)
        if grad is not None:
            slope = potential.slope(c)
            pairs.leave_out(tile, slope, 0.0)
            pairs.accumulate(grad, tile, slope)
    return total.of_sequences(), grad


class _PairTotal:
    """The sum of psi over all ordered pairs of each sequence, tile by tile."""

    def __init__(self, x: Tensor, reduce: _Reduction) -> None:
        self.reduce = reduce
        # Sequences that share a row are told apart by token; else one number a row is enough.
        shape = x.shape[:1] if reduce.offsets is None else x.shape[:2]
        self.value = torch.zeros(shape, dtype=wide_dtype(x.device), device=x.device)

    def add(self, psi: Tensor, tile: _Tile) -> None:
        if self.reduce.offsets is None:
            # Of rows first: one thread sums a row.
            self.value[tile.batch] += psi.sum(2).sum(1, dtype=self.value.dtype) * (1 if tile.diagonal else 2)
            return
        self.value[tile.batch, tile.i] += psi.sum(2)
        if not tile.diagonal:
            self.value[tile.batch, tile.j] += psi.sum(1)

    def of_sequences(self) -> Tensor:
        return self.value if self.reduce.offsets is None else self.reduce.sum(self.value)


def _exponential_sums(
    x: Tensor,
    potential: ExponentialPotential,
    groups: Tensor | None,
    partners: Tensor | None,
    reduce: _Reduction,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``log sum psi`` of each sequence, the shift that G is in units of the exponential of, and G.

    Where the exponent's range is small one fixed shift in its middle is enough; else each token keeps the largest
    exponent it has met, as in an online softmax, and what it has summed is rescaled when that grows.
    """
    rate = distance_rate(potential, x.shape[2], x.dtype)
    low, high = potential.exponent_range()
    if high - low <= _SAFE_RANGE:
        # Left alone where exp neither overflows nor vanishes, which saves a pass; and of distances, so that psi of
        # equal tokens is 1: a multiple of x that is rounded is not along x.
        alone = rate is not None or (low >= -_SAFE_RANGE / 2 and high <= _SAFE_RANGE / 2)
        middle = 0.0 if alone else (low + high) / 2
        return _bounded_exponential_sums(x, potential, rate, middle, groups, reduce, with_grad)

    with_itself = isinstance(potential, DistancePotential) and potential.include_diagonal
    pairs = _Pairs(x, groups)
    # Of a distance it is -|x_i - x_j|^2 that is kept; its rate comes after the difference, which may be small.
    largest = x.new_full(x.shape[:2], 0.0 if with_itself else torch.finfo(x.dtype).min)
    row_sum = torch.zeros_like(largest)
    weight_sum = torch.zeros_like(largest)  # of unequal tokens
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
    # The least number is finite, so a sequence without a pair gives exp(0), not exp(inf - inf).
    relative = largest - reduce.spread(shift)
    shift = shift.to(wide_dtype(x.device))
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
    """That of ``potential``, as far as the dtype of x goes."""
    rate = potential.distance_rate(features)
    return None if rate is None else min(rate, torch.finfo(dtype).max)


def _difference_(grad: Tensor, x: Tensor, row_sum: Tensor) -> None:
    """``sum_j w_ij (x_j - x_i)`` in place of ``sum_j w_ij x_j``."""
    grad.addcmul_(x, row_sum.unsqueeze(-1), value=-1)


def _bounded_exponential_sums(
    x: Tensor,
    potential: ExponentialPotential,
    rate: float | None,
    shift: float,
    groups: Tensor | None,
    reduce: _Reduction,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    total = _PairTotal(x, reduce)
    grad = torch.empty_like(x) if with_grad else None
    pairs = _Pairs(x, groups)
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
    sums = total.of_sequences()
    return sums.log() + shift, torch.full_like(sums, shift), grad


def _perplexity_entropy(
    x: Tensor, potential: PerplexityEntropy, groups: Tensor | None, partners: Tensor | None, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """``sum_j P_ij log2(P_ij + eps)`` of each token ``[B, L]``, and the gradient of their sum over each row.

    With d^2_ij = |z_i - z_j|^2, m_i the least of them, P_ij = exp((m_i - d^2_ij) / sigma2) / s_i, p the mean of P over
    a token's partners, h = log2((P + eps) / (p + eps)) and g = dP h / dP = h + P / ((P + eps) ln 2): the entropy is
    log2(p + eps) + sum_j P h, because P sums to 1, and without that constant h has its digits where P varies little.
    By the exponent -d^2_ij / sigma2 its derivative is A_ij = P_ij (g_ij - sum_k P_ik g_ik), and
    dz_i = 2 / sigma2 * sum_j (A_ij + A_ji) (z_j - z_i). Three passes: m and the sum s (kept apart, because a rounded
    m + log s of some hundreds would cost P four digits); entropy and sum_k P g; A.
    """
    pairs = _Pairs(x, groups)
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
        # log1p keeps the digits where P is near its mean, the logarithm of a quotient where it is far below.
        h = (p - mean).div_(mean + potential.eps)
        far_below = ((p + potential.eps) / (mean + potential.eps)).clamp_(min=info.tiny).log_()
        return p, torch.where(h > -0.5, h.log1p(), far_below).mul_(1 / math.log(2))

    def derivative(p: Tensor, h: Tensor) -> Tensor:
        return h + p / (p + potential.eps).clamp_(min=info.tiny).mul_(math.log(2))

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
        # The distances of (j, i) need not be rounded as those of (i, j), whose largest P must not be another's.
        weights = weights + (weights.mT if tile.diagonal else slopes(squared, tile, tile.j, 1))
        for side, _, dim in tile.sides():
            row_sum[tile.batch, side] += weights.sum(dim)
        pairs.accumulate(grad, tile, weights)
    _difference_(grad, x, row_sum)
    return entropy, grad.mul_(2 * rate)
