"""Sampled pairs from a backend's sweep, to which a clique is a short sequence, and PyTorch's matrix products for the
model: of every potential, at every rank, on every backend.

The tokens are read where they lie. As many cliques as hold AT_ONCE numbers are gathered at a time and swept, the model
is added, and their gradient goes to its place. A unit that is larger is gathered twice, first for the model's sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dispersion_kernels.cliques import of_sequences, select, sum_of_runs
from dispersion_kernels.control_variates import Fit, transformed
from dispersion_kernels.native import Sampled
from dispersion_kernels.sampling import Request, Sampler, losses_of
from dispersion_kernels.sweep import accumulation_dtype, wide_dtype

# So many numbers are gathered at a time, or a single clique; and of several units, on a CPU, fewer, for its cache.
AT_ONCE, CACHED = 2**24, 2**21

# A backend's sweep of tokens ``[R, L, F]``, each row a sequence, or packed ones ``[1, N, F]`` with groups and bounds:
# the loss of each, and of its gradient the two factors, as ``autograd.py`` has them.
Sweep = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor, Tensor]]


def sampler_of(sweep: Sweep) -> Sampler:
    return functools.partial(_compose, sweep)


def _compose(sweep: Sweep, request: Request) -> Sampled:
    return _Composition(sweep, request).answer()


@dataclass(frozen=True)
class _Part:
    """Rows of the plan that are taken together."""

    rows: slice
    shape: tuple[int, int]
    units: int
    """Of which they are all, or the one of which they are some; 0 where the plan has a table."""
    layers: slice
    places: slice
    """Of the order, where the plan has no table."""
    index: Tensor | None
    """``[R size]``: their tokens, of all layers one after the other; None: those at these places."""
    there: Tensor | None
    """``[R, size]``: which are tokens and no padding; None: all."""

    @property
    def gathered(self) -> bool:
        """Whether they have to be copied to be side by side."""
        return self.index is not None or self.layers.stop - self.layers.start > 1


@dataclass(frozen=True)
class _Read:
    """What the model needs of the tokens of a part."""

    x: Tensor
    """``[R, size, F]``."""
    inverse: Tensor
    """``[R, size]``: x / z."""
    ratio: Tensor
    """``[R, size]``: of the row transform, 1 / |x|, or 0."""
    squares: Tensor
    """``[R, size]``: |x|^2."""
    phi: Tensor
    """``[R, size, k]``."""
    sums: Tensor
    """``[R, k, F]``: of phi_jk x_j over the tokens of the row."""
    moments: Tensor | None
    """``[R, F, F]``: X^T X of the row, at full rank and where the row has as many tokens."""


@dataclass(frozen=True)
class _Totals:
    """Of units."""

    sums: Tensor
    """``[U, k, F]``: T."""
    moments: Tensor | None
    """``[U, F, F]``: X^T X, at full rank."""


class _Composition:
    """What the steps of one call share."""

    def __init__(self, sweep: Sweep, request: Request) -> None:
        self.sweep, self.request, self.plan = sweep, request, request.plan
        self.layers, fit = request.layers, request.fit
        first = self.layers[0]
        self.of_layer, self.features = first.shape[0] * first.shape[1], first.shape[2]
        self.dtype, self.wide = accumulation_dtype(first.dtype), wide_dtype(first.device)
        self.at_once = max(1, AT_ONCE // max(1, self.features))
        self.scratch = first.new_empty(0, self.features)
        self.modelled = fit is not None and fit.b is not None and self.plan.rows.shape[0] > 0
        self.full_rank = self.modelled and request.with_grad and fit is not None and fit.b_of_c is not None
        # Of cliques, of tokens, and of the rows and units as they come.
        self.losses = first.new_zeros(self.plan.weight.numel(), dtype=self.wide)
        self.nonfinite: list[Tensor] = []
        self.row_squares: list[Tensor] = []
        self.row_products: list[Tensor] = []
        self.unit_products: list[Tensor] = []
        self.grad: Tensor | None = None
        self.scale: Tensor | None = None
        if request.with_grad:
            count = len(self.layers) * self.of_layer
            self.grad = first.new_empty(count, self.features, dtype=self.dtype) if request.out is None else request.out
            self.grad, self.scale = self.grad.view(count, self.features), first.new_empty(count, dtype=self.dtype)

    def answer(self) -> Sampled:
        request, plan = self.request, self.plan
        if plan.bounds is not None:
            self._sweep_packed(plan.bounds)
        if plan.bounds is None or self.modelled:
            for parts in self._together():
                self._take(parts)

        if request.share > 0:
            means = self.losses
            if request.potential.reduction == "log_mean":
                means = (means - request.potential.loss_offset).exp()
            mean = sum_of_runs(plan.weight * means, plan.cliques_of_sequence)
        else:
            assert request.fit is not None
            nonfinite = torch.cat(self.nonfinite).view(plan.pairs.numel(), -1).any(1)
            mean = of_sequences(request.fit.mean_psi, plan).masked_fill(nonfinite, math.nan)
        loss, per_pair = losses_of(request, mean, self._missed() if self.modelled else None)
        if self.grad is None or self.scale is None:
            return Sampled(loss, per_pair, None, None, None)
        if request.share > 0:
            assert plan.order is not None
            of_token = torch.empty_like(self.scale)
            of_token[plan.order] = self._of_cliques(slice(None)).to(self.dtype)[plan.clique_of_token]
            self.scale *= of_token
        self.scale *= per_pair.to(self.dtype)[plan.sequence_of_row]
        shape = (len(self.layers), *request.layers[0].shape)
        return Sampled(loss, per_pair, self.grad.view(shape), self.scale.view(shape[:3]), None)

    def _sweep_packed(self, bounds: Tensor) -> None:
        """The sweep of cliques of any length, those together that begin near each other in the order. Which these are
        is not read: what is beyond them is masked, and has a 0 added to it."""
        plan, count, cliques, size = self.plan, self.of_layer, bounds.numel() - 1, self.plan.rows.shape[1]
        assert plan.order is not None
        step = max(size, self.at_once)
        if step >= count:
            losses, grad, scale = self.sweep(self._gathered(plan.order, 0, count).unsqueeze(0), plan.groups, bounds)
            self.losses = losses.to(self.wide)
            if self.grad is not None and self.scale is not None:
                self.grad.index_copy_(0, plan.order, grad.flatten(0, 1))
                self.scale[plan.order] = scale.flatten()
            return
        if self.grad is not None and self.scale is not None:
            self.grad.zero_()
            self.scale.zero_()
        capacity = min(count, step + size)
        for begin in range(0, count, step):
            edges = torch.arange(begin, begin + step + 1, step, device=bounds.device)
            edges = torch.searchsorted(bounds, edges).clamp(max=cliques)
            (first, last), (start, end) = edges.unbind(), bounds[edges].unbind()
            place = start + torch.arange(capacity, device=bounds.device)
            there, place = place < end, place.clamp(max=count - 1)
            index = plan.order[place]
            groups = there.long() - 1 if plan.groups is None else plan.groups[0][place].masked_fill(~there, -1)
            # No more of them begin there than there are tokens; those without tokens are at the end of all.
            clique = first + torch.arange(min(cliques, step) + 1, device=bounds.device)
            ends = (torch.minimum(bounds[clique.clamp(max=cliques)], end) - start).clamp(max=capacity)
            ends = torch.nn.functional.pad(ends, (0, 1), value=capacity)
            losses, grad, scale = self.sweep(self._gathered(index, 0, capacity).unsqueeze(0), groups.unsqueeze(0), ends)
            losses = losses[:-1].to(self.wide).masked_fill(clique[:-1] >= last, 0.0)
            self.losses.index_add_(0, clique[:-1].clamp(max=cliques - 1), losses)
            if self.grad is not None and self.scale is not None:
                self.grad.index_add_(0, index, grad.flatten(0, 1).masked_fill_(~there.unsqueeze(1), 0.0))
                self.scale.index_add_(0, index, scale.flatten().masked_fill(~there, 0.0))

    def _together(self) -> Iterator[list[_Part]]:
        """Whole units, in one part if it holds them: of as many layers as it does, or some of a layer. Where there is a
        table all of them."""
        rows = self.plan.rows
        count, size = rows.shape
        if count == 0:
            return
        of_part = max(1, self.at_once // size)
        if not isinstance(rows.of_unit, int):
            yield [self._part(row, min(row + of_part, count)) for row in range(0, count, of_part)]
            return
        units, of_layer = count // rows.of_unit, count // rows.of_unit // len(self.layers)
        numbers = min(AT_ONCE, CACHED) if self.scratch.is_cpu else AT_ONCE
        held = max(1, numbers // (rows.of_unit * size * self.features))
        step = held // of_layer * of_layer or held
        whole_layers = max(step, of_layer)
        for first in range(0, units, whole_layers):
            last = min(first + whole_layers, units)
            for unit in range(first, last, step):
                begin, end = unit * rows.of_unit, min(unit + step, last) * rows.of_unit
                yield [self._part(row, min(row + of_part, end)) for row in range(begin, end, of_part)]

    def _part(self, begin: int, end: int) -> _Part:
        plan, (count, size) = self.plan, self.plan.rows.shape
        rows, shape, places = slice(begin, end), (end - begin, size), slice(begin * size, end * size)
        if plan.rows.table is not None:
            assert plan.order is not None
            table = plan.rows.table[rows]
            index = plan.order[table.flatten().clamp(max=self.of_layer - 1)]
            return _Part(rows, shape, 0, slice(0, 1), slice(0, 0), index, table < self.of_layer)
        assert isinstance(plan.rows.of_unit, int)
        of_layer = count // len(self.layers)
        layers = slice(begin // of_layer, (end - 1) // of_layer + 1)
        units = max(1, (end - begin) // plan.rows.of_unit)
        return _Part(rows, shape, units, layers, places, None if plan.order is None else plan.order[places], None)

    def _take(self, parts: list[_Part]) -> None:
        """Losses and gradient of one part after the other."""
        totals = self._no_totals(parts[0]) if self.modelled else None
        if totals is not None and len(parts) > 1:
            for part in parts:
                self._add(totals, part, self._read(part, self._tokens_of(part)))
        for part in parts:
            tokens = self._tokens_of(part)
            grad = self._swept(part, tokens)
            if totals is not None:
                read = self._read(part, tokens)
                if len(parts) == 1:
                    self._add(totals, part, read)
                of_row = read.squares.to(self.wide).sum(1)
                self.row_squares.append(of_row)
                self.row_products.append(read.sums[:, 0].to(self.wide).square().sum(1) - of_row)  # phi begins with 1
                self._add_model(part, read, totals, grad)
            if grad is not None and self.grad is not None:
                assert part.index is not None
                self.grad.index_copy_(0, part.index, grad.flatten(0, 1))
        if totals is not None:
            self.unit_products.append(totals.sums[:, 0].to(self.wide).square().sum(1))

    def _tokens_of(self, part: _Part) -> Tensor:
        return self._gathered(part.index, part.places.start, part.shape[0] * part.shape[1])

    def _gathered(self, index: Tensor | None, begin: int, count: int) -> Tensor:
        """``[count, F]``: the tokens of that index, of all layers one after the other from the place ``begin`` on, or,
        where it is None, those that lie there, which are whole sequences."""
        length = self.layers[0].shape[1]
        layer, within = divmod(begin, self.of_layer)
        if index is None and within + count <= self.of_layer:
            return self.layers[layer][within // length :][: count // length].flatten(0, 1)
        if self.scratch.shape[0] < count:  # once: new memory takes longer than what is done with it
            self.scratch = self.scratch.new_empty(count, self.features)
        done = 0
        while done < count:
            z, out = self.layers[layer], self.scratch[done:count]
            if len(self.layers) > 1:  # of one layer there may be padding, and more than it has
                out = out[: self.of_layer - within]
            if index is None:
                out.view(-1, *z.shape[1:]).copy_(z[within // length :][: out.shape[0] // length])
            else:
                select(z, index[done : done + out.shape[0]] - layer * self.of_layer, out)
            done, layer, within = done + out.shape[0], layer + 1, 0
        return self.scratch[:count]

    def _swept(self, part: _Part, tokens: Tensor) -> Tensor | None:
        """``[R, size, F]``: the gradient from the pairs within rows, but for its scale; None where they are not visited
        here, or no gradient is wanted. Puts the losses, and the scale, into their places."""
        if self.request.share == 0 or self.plan.bounds is not None:
            return None
        losses, grad, scale = self.sweep(tokens.view(*part.shape, self.features), None, None)
        self.losses[part.rows] = losses.to(self.wide)
        if self.scale is None:
            return None
        assert part.index is not None
        self.scale[part.index] = scale.flatten()
        return grad

    def _of_cliques(self, cliques: slice | Tensor) -> Tensor:
        """What the gradient of a clique's loss counts in that of the sequence's, but for ``per_pair``."""
        plan, losses = self.plan, self.losses[cliques]
        of_clique = plan.weight[cliques] * (plan.pairs.to(self.wide) / 2)[plan.sequence_of_clique[cliques]]
        # Undoes the logarithm of a clique in its gradient.
        potential = self.request.potential
        logarithmic = potential.reduction == "log_mean"
        return of_clique * (losses - potential.loss_offset).exp() if logarithmic else of_clique

    def _model(self) -> tuple[Fit, Tensor]:
        """The fit and its b, which there are where it is asked for."""
        fit = self.request.fit
        assert fit is not None
        assert fit.b is not None
        return fit, fit.b

    def _no_totals(self, part: _Part) -> _Totals:
        rows, (_, b) = self.plan.rows, self._model()
        units = part.units if isinstance(rows.of_unit, int) else rows.of_unit.numel() - 1
        features = b.shape[1] if self.request.with_grad else 1
        sums = b.new_zeros(units, features, self.features)
        moments = sums.new_zeros(units, self.features, self.features) if self.full_rank else None
        return _Totals(sums, moments)

    def _read(self, part: _Part, tokens: Tensor) -> _Read:
        (fit, _), there = self._model(), part.there
        x, inverse, ratio, nonfinite = transformed(
            tokens,
            self.request.potential,
            None if there is None else there.flatten(),
            in_place=part.gathered and tokens.dtype == self.dtype,
        )
        if self.request.share == 0:
            self.nonfinite.append(nonfinite)
        # The loss needs a constant's sums alone.
        phi = fit.features(x, part.layers) if self.request.with_grad else torch.ones_like(x[:, :1])
        x, phi, ratio = x.view(*part.shape, -1), phi.view(*part.shape, -1), ratio.view(part.shape)
        if there is not None:
            phi.masked_fill_(~there.unsqueeze(2), 0.0)
        by_row = self.full_rank and self.request.share > 0 and part.units > 0 and part.shape[1] >= self.features
        return _Read(
            x=x,
            inverse=inverse.view(part.shape),
            ratio=ratio,
            squares=torch.where(ratio > 0, ratio.square().reciprocal(), 0.0),
            phi=phi,
            sums=phi.mT @ x,
            moments=x.mT @ x if by_row else None,
        )

    def _add(self, totals: _Totals, part: _Part, read: _Read) -> None:
        """Adds what the rows of a part are of their units."""
        if part.units:
            totals.sums.add_(read.sums.unflatten(0, (part.units, -1)).sum(1))
            if totals.moments is None:
                return
            if read.moments is not None:
                totals.moments.add_(read.moments.unflatten(0, (part.units, -1)).sum(1))
            else:
                of_units = read.x.view(part.units, -1, self.features)
                totals.moments.baddbmm_(of_units.mT, of_units)
            return
        self._add_of_units(totals.sums, read.sums, part.rows.start)
        if totals.moments is not None:
            for some in _few(read.x):
                self._add_of_units(totals.moments, read.x[some].mT @ read.x[some], part.rows.start + some.start)

    def _add_of_units(self, totals: Tensor, of_rows: Tensor, begin: int) -> None:
        """Adds to ``[U, ...]`` the values ``[R, ...]`` of the rows from ``begin`` on. Each unit's are summed first, so
        that what is added at a place more than once is 0, in whichever order."""
        rows, count = self.plan.rows, of_rows.shape[0]
        assert isinstance(rows.of_unit, Tensor)
        number = torch.arange(min(count, totals.shape[0]) + 1, device=of_rows.device)
        unit = (rows.unit[begin : begin + 1] + number).clamp(max=totals.shape[0])
        bounds = rows.of_unit[unit].clamp(begin, begin + count) - begin
        totals.index_add_(0, unit[:-1].clamp(max=totals.shape[0] - 1), sum_of_runs(of_rows, bounds))

    def _add_model(self, part: _Part, read: _Read, totals: _Totals, grad: Tensor | None) -> None:
        """Adds what the model has of all pairs, less 1/p times what it has of those visited, to the gradient from
        these, or puts it into its place where there are none."""
        if self.grad is None or self.scale is None:
            return
        if self.request.share == 0:
            self.scale[part.places] = read.inverse.flatten()
            self._write_model(part, read, totals, self.grad[part.places].view(read.x.shape))
            return
        # The sweep's sums are in units of their own, the same for the tokens of a clique.
        assert part.index is not None
        unit = (self.scale[part.index].view(part.shape) / read.inverse).nan_to_num(0.0, 0.0, 0.0)
        unit = unit if part.there is None else unit.masked_fill(~part.there, 0.0)
        unit = unit.amax(1).to(self.wide) * self._of_cliques(self.plan.rows.clique[part.rows])
        factor = torch.where(unit > 0, 1 / unit, 0.0).to(self.dtype).view(-1, 1, 1)
        if grad is not None and totals.moments is None:
            weighted, missed, own = self._terms(part, read, totals)
            weighted, own = weighted * factor, own * factor.squeeze(2)
            inner = (weighted.mT * (missed @ read.x.mT)).sum(1)
            grad.baddbmm_(weighted, missed).addcmul_(read.x, _along(read, own, inner), value=-1)
            return
        of_rows = torch.empty_like(read.x)
        self._write_model(part, read, totals, of_rows)
        if grad is not None:
            grad.addcmul_(of_rows, factor)
        else:
            self.grad.index_add_(0, part.index, of_rows.mul_(factor).flatten(0, 1))

    def _write_model(self, part: _Part, read: _Read, totals: _Totals, out: Tensor) -> None:
        """That, seen through the row transform."""
        weighted, missed, own = self._terms(part, read, totals)
        torch.bmm(weighted, missed, out=out)
        b_of_c = self._model()[0].b_of_c
        if totals.moments is not None and b_of_c is not None:
            self._add_moments(part, read, totals.moments, b_of_c, out)
        inner = torch.linalg.vecdot(out, read.x)
        out.addcmul_(read.x, _along(read, own, inner), value=-1)

    def _terms(self, part: _Part, read: _Read, totals: _Totals) -> tuple[Tensor, Tensor, Tensor]:
        """``[R, size, k]``: b_k phi_ik; ``[R, k, F]``: T of the unit less 1/p times that of the row; and ``[R, size]``:
        h_ii, which is among both sums and is no pair."""
        rows, (fit, b) = self.plan.rows, self._model()
        share = self._inverse_share(part)
        if part.units:
            by_unit = (read.sums.unflatten(0, (part.units, -1)), share.unflatten(0, (part.units, -1)))
            missed = torch.addcmul(totals.sums.unsqueeze(1), *by_unit, value=-1).flatten(0, 1)
        else:
            missed = torch.addcmul(totals.sums[rows.unit[part.rows]], read.sums, share, value=-1)
        b = _of_rows(b, part)
        own = (read.phi.square() @ b.unsqueeze(2)).squeeze(2)
        if fit.b_of_c is not None:
            own = torch.addcmul(own, _of_rows(fit.b_of_c, part).unsqueeze(1), read.squares)
        return read.phi * b.unsqueeze(1), missed, own * (1 - share.squeeze(2))

    def _add_moments(self, part: _Part, read: _Read, of_units: Tensor, b_of_c: Tensor, out: Tensor) -> None:
        """Adds b1 (X^T X) x_i, of the unit less 1/p times of the row. Of a row it is (X X^T) X that is computed where
        that is less."""
        rows, x = self.plan.rows, read.x
        b = _of_rows(b_of_c, part).view(-1, 1, 1)
        share = self._inverse_share(part)
        if part.units and read.moments is None:
            by_unit = x.view(part.units, -1, self.features)
            of_rows = x.shape[0] // part.units
            out.view(by_unit.shape).baddbmm_(by_unit, of_units * b[::of_rows])
            if self.request.share > 0:
                out.baddbmm_((x @ x.mT).mul_(b * -share), x)
        elif read.moments is not None:
            moments = (read.moments * -share).unflatten(0, (part.units, -1)).add_(of_units.unsqueeze(1)).flatten(0, 1)
            out.baddbmm_(x, moments.mul_(b))
        else:
            unit = rows.unit[part.rows]
            for some in _few(x):
                moments = of_units[unit[some]]
                if part.shape[1] < self.features:
                    out[some].baddbmm_((x[some] @ x[some].mT).mul_(b[some] * -share[some]), x[some])
                else:
                    moments.baddbmm_(x[some].mT, x[some] * -share[some])
                out[some].baddbmm_(x[some], moments.mul_(b[some]))

    def _inverse_share(self, part: _Part) -> Tensor:
        """``[R, 1, 1]``."""
        return self.plan.rows.inverse_share[part.rows].to(self.dtype).view(-1, 1, 1)

    def _missed(self) -> Tensor:
        """``[Y S]``: the sum of c over all pairs of modelled units, less 1/p times that over the pairs visited."""
        rows = self.plan.rows
        of_rows, of_units = torch.cat(self.row_squares), torch.cat(self.unit_products)
        of_units = of_units - sum_of_runs(of_rows, rows.of_unit)
        # Divided among the rows of a unit, which know their sequence.
        number = sum_of_runs(torch.ones_like(of_rows), rows.of_unit)
        missed = (of_units / number)[rows.unit] - torch.cat(self.row_products) * rows.inverse_share
        return sum_of_runs(missed, rows.of_sequence)


def _of_rows(of_layers: Tensor, part: _Part) -> Tensor:
    """``[R, ...]`` from ``[Y, ...]``."""
    of_layer = part.shape[0] // (part.layers.stop - part.layers.start)
    return of_layers[part.layers].repeat_interleave(of_layer, 0)


def _along(read: _Read, own: Tensor, inner: Tensor) -> Tensor:
    """What to take away of x: h_ii, and what of the rest, whose product with x is ``inner``, is along it."""
    return (own + read.ratio * (inner - own * read.squares)).unsqueeze(2)


def _few(x: Tensor) -> Iterator[slice]:
    """Rows of ``[R, size, F]``, so many at a time that matrices ``[F, F]`` of them take no more memory than x."""
    count, size, features = x.shape
    step = max(1, count * size // features)
    return (slice(n, min(n + step, count)) for n in range(0, count, step))
