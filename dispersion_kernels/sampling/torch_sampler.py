"""Sampler of one layer's pairs over any backend, which sees blocks as short sequences, with the model in PyTorch:
for every potential, control variate and backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dispersion_kernels.backends.interface import Run
from dispersion_kernels.numerics import statistics_dtype
from dispersion_kernels.potentials import Potential
from dispersion_kernels.sampling.control_variate import Fit, Transformed, corrected_losses, transformed
from dispersion_kernels.sampling.partition import Partition, Rows, rows_of, select, sum_of_runs
from dispersion_kernels.segments import segment_of_token


def sample(
    run: Run,
    z: Tensor,
    partition: Partition,
    potential: Potential,
    fit: Fit | None,
    evaluated: bool,
    gradient: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Loss of each sequence of tokens ``[B, L, F]``, and ``per_pair``, both ``[S]``, as in :func:`corrected_losses`.

    ``gradient``, where given, receives the two factors ``[1, B, L, F]`` and ``[1, B, L]`` of the gradient of each
    token's sequence loss.
    """
    order = partition.order
    grad = None
    if gradient is not None:
        grad = gradient[0].view(-1, z.shape[2])  # holds the whole gradient; the second factor is 1
        gradient[1].fill_(1.0)
    tokens = z.flatten(0, 1) if order is None else select(z, order)
    rows = rows_of(partition) if fit is not None and fit.b is not None else None
    read = transformed(tokens, potential, partition.left_out) if rows is not None else None
    missed = model = None
    if rows is not None and read is not None and fit is not None:
        missed, model = _model(read, partition, rows, fit, grad is not None)
    if not evaluated:
        assert fit is not None
        assert read is not None
        nonfinite = read.nonfinite.view(z.shape[:2]).any(1)
        mean = fit.mean_psi.expand(z.shape[0]).masked_fill(nonfinite, math.nan)
        losses, per_pair = corrected_losses(partition, potential, mean, missed, fit, evaluated)
        if grad is not None and model is not None:
            torch.mul(model, (read.inverse * per_pair.to(model.dtype).repeat_interleave(z.shape[1]))[:, None], out=grad)
        return losses, per_pair

    means, grads, scale = _block_means(run, tokens, partition, potential, grad is not None)
    sequence = partition.sequence[partition.population]
    met = partition.bounds.diff()
    pairs = partition.pairs.clamp(min=1).to(means.dtype)[sequence]
    weight = met * (met - 1) * partition.inverse_probability[partition.population] / pairs
    bounds = torch.searchsorted(sequence, torch.arange(partition.pairs.numel() + 1, device=sequence.device))
    mean = sum_of_runs(weight * means, bounds)
    losses, per_pair = corrected_losses(partition, potential, mean, missed, fit, evaluated)
    if grad is None or order is None or grads is None or scale is None:
        return losses, per_pair
    # Weight of the gradient of a block's loss in the gradient of its sequence's loss.
    block_factor = per_pair[sequence] * weight * pairs / 2
    if potential.reduction == "log_mean":
        block_factor = block_factor * means
    block = segment_of_token(torch.nn.functional.pad(partition.bounds, (0, 1), value=tokens.shape[0]), tokens.shape[0])
    swept = grads.flatten(0, 1)
    token_factor = torch.nn.functional.pad(block_factor, (0, 1))[block].to(swept.dtype)  # 0 for those that are left out
    swept *= (token_factor * scale.flatten()).unsqueeze(1)
    if model is not None and read is not None:
        token_factor = torch.nn.functional.pad(per_pair[sequence], (0, 1))[block].to(swept.dtype)
        swept.addcmul_(model, (token_factor * read.inverse).unsqueeze(1))
    grad.index_copy_(0, order, swept)
    return losses, per_pair


def _block_means(
    run: Run, tokens: Tensor, partition: Partition, potential: Potential, with_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Mean ``[K]`` of psi over the pairs of each block, in :func:`statistics_dtype`; and both factors of the gradient
    of the blocks' losses, for the tokens in the order of the partition (None without ``with_grad``)."""
    if partition.same_size:
        blocks = tokens.view(-1, partition.size, tokens.shape[1])
        losses, (grad,), scale = run([blocks], None, None, potential, "none", [with_grad])
    else:
        # Tokens that are left out form one more sequence.
        pair_ids = None if partition.left_out is None else -partition.left_out.long().unsqueeze(0)
        bounds = torch.nn.functional.pad(partition.bounds, (0, 1), value=tokens.shape[0])
        losses, (grad,), scale = run([tokens.unsqueeze(0)], pair_ids, bounds, potential, "none", [with_grad])
        losses = losses[:-1]
    means = losses.to(statistics_dtype(losses.device))
    if potential.reduction == "log_mean":
        means = (means - potential.loss_offset).exp()
    return means, grad, scale


def _model(
    read: Transformed, partition: Partition, rows: Rows, fit: Fit, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Differences ``[S]`` and ``[N, F]`` between sums over all pairs of modelled populations and 1/p times the sums
    over the evaluated pairs: of c, and of ``h_ij x_j`` over j. The latter, None without ``with_grad``, is passed
    through the derivative of the row transform without its factor x / z."""
    assert fit.b is not None
    x, phi = _rows(read.x, rows), _rows(fit.features(read.x), rows)
    population = partition.population[rows.block]
    inverse = partition.inverse_probability[population]
    sums = phi.mT @ x  # [R, k, F]
    totals = sum_of_runs(sums, rows.population_runs)

    # The first feature in phi is 1, so that sums[:, 0] is the sum of x.
    squares = x.square().sum((1, 2), dtype=inverse.dtype)
    row_products = sums[:, 0].to(inverse.dtype).square().sum(1) - squares
    population_products = totals[:, 0].to(inverse.dtype).square().sum(1) - sum_of_runs(squares, rows.population_runs)
    # Population sums are divided equally among the population's rows, which are summed by sequence.
    missed = population_products[rows.population] / partition.blocks[population].clamp(min=1) - row_products * inverse
    missed = sum_of_runs(missed, rows.sequence_runs)
    if not with_grad:
        return missed, None

    inverse_p = inverse.to(x.dtype).view(-1, 1, 1)
    out = (phi * fit.b) @ torch.addcmul(totals[rows.population], sums, inverse_p, value=-1)
    own = phi.square() @ fit.b * (1 - inverse_p.squeeze(2))  # h_ii, in both sums, is no pair
    if fit.b_of_c is not None:
        # The term of c itself: (X X^T) X for the rows, X (X^T X) for a whole sequence.
        if partition.order is not None:
            out.baddbmm_((x @ x.mT) * (inverse_p * -fit.b_of_c), x)
        own += x.square().sum(2) * fit.b_of_c * (1 - inverse_p.squeeze(2))
    out, own = _places(out, rows, read.x), _places(own, rows, read.ratio)
    if fit.b_of_c is not None:
        whole = read.x.view(partition.pairs.numel(), -1, out.shape[1])
        out.view(whole.shape).baddbmm_(whole, (whole.mT @ whole) * fit.b_of_c)
    squares = torch.where(read.ratio > 0, read.ratio.square().reciprocal(), 0.0)
    along = own + read.ratio * (torch.linalg.vecdot(out, read.x) - own * squares)
    return missed, out.addcmul_(read.x, along.unsqueeze(1), value=-1)


def _rows(values: Tensor, rows: Rows) -> Tensor:
    """Rows ``[R, size, ...]`` of ``values`` ``[N, ...]`` in the order of the partition, 0 for padding."""
    if rows.places is None:
        return values.view(*rows.shape, -1)
    return torch.cat([values, values.new_zeros(1, values.shape[1])])[rows.places]


def _places(values: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """Values ``[N, ...]`` in the order of the partition from rows ``[R, size, ...]``, the inverse of :func:`_rows`; 0
    for tokens in no row."""
    values = values.flatten(0, 1)
    if rows.places is None:
        return values
    out = like.new_zeros(like.shape[0] + 1, *like.shape[1:])
    return out.index_copy_(0, rows.places.flatten(), values)[:-1]
