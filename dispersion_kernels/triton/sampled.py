"""Sampled pairs in Triton: the model's sums, the sweep of the cliques, and the loss from their sums.

The tokens are read where they lie, through the order of the plan, and each gradient is written once, at its own place.
What is left to PyTorch has the size of the fit or of the cliques. Nothing is read back from the device, and every
launch depends on shapes alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dispersion_kernels.cliques import Plan, Runs, of_sequences, sum_of_runs
from dispersion_kernels.control_variates import RANK
from dispersion_kernels.gpu.epilogues import Epilogue, epilogue_of
from dispersion_kernels.gpu.launch import MAX_ROWS, Statistics, Tokens, aligned
from dispersion_kernels.native import Sampled
from dispersion_kernels.potentials import Potential
from dispersion_kernels.sampling import Request, Sampler, losses_of
from dispersion_kernels.sweep import wide_dtype
from dispersion_kernels.triton.backend import TritonKernels

# The features of ``low_rank``, padded for a matrix product.
_FEATURES = 32
# The tokens of a program that adds up features, where units are whole sequences.
_CHUNK = 256


def sampler_of(kernels: TritonKernels, layers: Sequence[Tensor], potential: Potential) -> Sampler | None:
    """None where exponents need a running maximum, where the tokens have no row transform, for a batch that no launch
    holds, and on AMD's processors for psi that is no exponential: its masks take more scalar registers than there
    are."""
    batch, _, features = layers[0].shape
    epilogue = epilogue_of(potential, features, narrow_range=layers[0].dtype == torch.float16)
    if epilogue.online or epilogue.transform == "none" or not 0 < len(layers) * batch <= MAX_ROWS:
        return None
    if kernels.arch.startswith("gfx") and not epilogue.exponential:
        return None
    return functools.partial(_sample, kernels, epilogue)


def _sample(kernels: TritonKernels, epilogue: Epilogue, request: Request) -> Sampled | None:
    if request.rank != RANK:
        return None
    with torch.cuda.device_of(request.layers[0]):  # Triton launches on the current device
        tokens = Tokens(aligned(request.layers, kernels.alignment), request.layers[0].shape[2])
        return _Sample(kernels, epilogue, request, tokens).answer()


@dataclass(frozen=True)
class _Model:
    """h = 0 where there is none."""

    features: int
    """Of phi, padded."""
    phi: Tensor | None
    """``[tokens, features]``; None for 1 alone."""
    b: Tensor
    """``[Y, features]``, in the units of the kernels' slopes."""
    total: Tensor
    """``[U, features, F]``: T of each unit that has more than one clique."""
    missed: Tensor
    """``[Y S]``: the sum of c over all pairs of these units."""


@dataclass(frozen=True)
class _Chunks:
    """The tokens of units that have more than one clique, in pieces."""

    begins: Tensor
    ends: Tensor
    """``[C]``, in the order."""
    of_unit: Runs
    unit: Tensor
    """``[C]``."""
    of_sequence: Runs


class _Sample:
    """What the steps of one call share."""

    def __init__(self, kernels: TritonKernels, epilogue: Epilogue, request: Request, tokens: Tokens) -> None:
        self.kernels, self.epilogue, self.request, self.tokens = kernels, epilogue, request, tokens
        self.plan, self.visited = request.plan, request.share > 0
        self.device = request.layers[0].device
        self.wide = wide_dtype(self.device)
        self.slope_unit = epilogue.kappa * math.exp(epilogue.shift)
        norm, inverse, extra = (self._empty(tokens.rows, tokens.length) for _ in range(3))
        kernels.row_statistics(tokens, epilogue, norm, inverse, extra)
        self.statistics = Statistics(norm, inverse, extra, inverse, None)

    def answer(self) -> Sampled:
        request, plan = self.request, self.plan
        model = self._model()
        unit, inverse_share = _of_cliques(plan)
        grad = scale = None
        if request.with_grad:
            grad = request.out
            if grad is None:
                grad = self._empty(len(request.layers), *request.layers[0].shape)
        sums = self._sweep(model, unit, inverse_share, grad)
        loss, per_pair = self._losses(model, unit, inverse_share, sums)
        if grad is not None:
            self.kernels.project(self.tokens, self.epilogue, self.statistics, None, list(grad))
            factor = (per_pair * self.slope_unit).float()[plan.sequence_of_row]
            scale = factor.view(grad.shape[:3]) * self.statistics.inverse.view(grad.shape[:3])
            if plan.bounds is not None:
                alone = self._alone(plan, plan.bounds).view(grad.shape[:3])
                scale.masked_fill_(alone, 0.0)
                grad.masked_fill_(alone.unsqueeze(3), 0.0)
        return Sampled(loss, per_pair, grad, scale, None)

    def _model(self) -> _Model | None:
        fit, plan = self.request.fit, self.plan
        if fit is None or fit.b is None or plan.rows.shape[0] == 0:
            return None
        low_rank = fit.directions is not None and self.request.with_grad  # the loss needs a constant's sums alone
        features, phi = 1, None
        if low_rank:
            assert fit.directions is not None
            features, phi = _FEATURES, self._empty(self.statistics.norm.numel(), _FEATURES)
            self.kernels.features(self.tokens, self.epilogue, self.statistics, fit.directions.contiguous(), phi)
        chunks = _chunks(plan)
        count = chunks.unit.numel()
        sums, squares = self._empty(count, features, self.tokens.features), self._empty(count)
        self.kernels.model_sums(
            self.tokens, self.epilogue, self.statistics, phi, plan.order, chunks.begins, chunks.ends, sums, squares
        )
        total = sum_of_runs(sums, chunks.of_unit)
        # phi begins with 1.
        of_units = total[:, 0].to(self.wide).square().sum(1) - sum_of_runs(squares.to(self.wide), chunks.of_unit)
        number = sum_of_runs(torch.ones_like(squares, dtype=self.wide), chunks.of_unit)
        return _Model(
            features=features,
            phi=phi,
            b=torch.nn.functional.pad(fit.b / self.slope_unit, (0, features - fit.b.shape[1])).contiguous(),
            total=total,
            missed=sum_of_runs((of_units / number)[chunks.unit], chunks.of_sequence),
        )

    def _sweep(self, model: _Model | None, unit: Tensor, inverse_share: Tensor, grad: Tensor | None) -> Tensor | None:
        """``[2, K]``: sums of psi and of c over the pairs of each clique, if they are visited. Writes ``grad``."""
        if not self.visited and grad is None:
            return None
        largest = self.plan.rows.shape[1]
        shape = self.kernels.clique_shape(largest)
        cliques, tiles = self.plan.cliques.numel() - 1, -(-largest // shape.block_m)
        sums = self._empty(2, cliques, tiles)
        self.kernels.clique_sweep(
            shape,
            self.tokens,
            self.epilogue,
            self.statistics,
            order=self.plan.order,
            bounds=self.plan.cliques,
            unit=unit,
            inverse_share=inverse_share if self.visited else None,
            phi=None if model is None else model.phi,
            b=None if model is None else model.b,
            total=None if model is None else model.total,
            sums=sums,
            gradient=grad,
        )
        return sums.sum(2, dtype=self.wide) if self.visited else None

    def _losses(
        self, model: _Model | None, unit: Tensor, inverse_share: Tensor, sums: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        plan, fit = self.plan, self.request.fit
        missed = None if model is None else model.missed
        if sums is None:
            assert fit is not None
            return losses_of(self.request, of_sequences(fit.mean_psi, plan), missed)
        psi, c = sums * inverse_share
        weighted = torch.stack([psi * math.exp(self.epilogue.shift), c.masked_fill(unit < 0, 0.0)], 1)
        if plan.bounds is not None:  # whose last clique are the tokens that are left out
            weighted = torch.nn.functional.pad(weighted, (0, 0, 0, 1))
        psi, c = sum_of_runs(weighted, plan.cliques_of_sequence).unbind(1)
        mean = psi / plan.pairs.clamp(min=1)
        return losses_of(self.request, mean, None if missed is None else missed - c)

    def _alone(self, plan: Plan, bounds: Tensor) -> Tensor:
        """``[N]``, of the tokens as they lie: those without a partner or left out, whose gradient nobody wrote."""
        assert plan.order is not None
        alone = bounds.diff()[plan.clique_of_token] < 2
        if plan.taking_part is not None:
            alone |= ~plan.taking_part
        return torch.empty_like(alone).scatter_(0, plan.order, alone)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def _of_cliques(plan: Plan) -> tuple[Tensor, Tensor]:
    """``[K]``: the unit of each clique among those that have chunks, -1 for one that is all of its unit; and 1/p."""
    rows = plan.rows
    if rows.table is None:
        return rows.unit, rows.inverse_share
    partial = rows.table[:, 0] < plan.clique_of_token.numel()
    cliques = plan.cliques.numel() - 1
    unit = rows.unit.new_full((cliques,), -1).scatter_(0, rows.clique, rows.unit.masked_fill(~partial, -1))
    inverse_share = rows.inverse_share.new_ones(cliques)
    return unit, inverse_share.scatter_(0, rows.clique, rows.inverse_share.masked_fill(~partial, 1.0))


def _chunks(plan: Plan) -> _Chunks:
    rows = plan.rows
    if rows.table is not None:
        begins = rows.table[:, 0].contiguous()
        ends = begins + (rows.table < plan.clique_of_token.numel()).sum(1)
        return _Chunks(begins, ends, rows.of_unit, rows.unit, rows.of_sequence)
    units = plan.units.numel() - 1
    length = plan.clique_of_token.numel() // units
    number = -(-length // _CHUNK)
    within = torch.arange(number, device=plan.units.device) * _CHUNK
    begins = (plan.units[:-1].unsqueeze(1) + within).flatten()
    unit = torch.arange(units, device=begins.device).repeat_interleave(number)
    return _Chunks(begins, torch.minimum(begins + _CHUNK, plan.units[1:][unit]), number, unit, number)
