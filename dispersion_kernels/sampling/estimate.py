"""Estimate of the loss and its gradient from a fraction of the pairs; docs/sampling.md has the mathematics.

The CPU kernel has a sampler of its own for blocks of up to 256 tokens and exponents that need no running maximum,
except for full-rank models. :mod:`dispersion_kernels.sampling.torch_sampler` serves all other calls over the
backend, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.backends.interface import Run
from dispersion_kernels.numerics import accumulation_dtype, loss_weight, statistics_dtype, sum_of_tokens
from dispersion_kernels.options import LossOptions
from dispersion_kernels.potentials import Potential
from dispersion_kernels.sampling import SampledPairs
from dispersion_kernels.sampling.control_variate import FIT_GROUPS, FIT_TOKENS, fit, noise
from dispersion_kernels.sampling.partition import (
    Partition,
    blocks_of_same_size,
    partition_of,
)
from dispersion_kernels.sampling.torch_sampler import sample
from dispersion_kernels.segments import uniform


class Draws(NamedTuple):
    """Random draws of Y layers."""

    shuffle: Tensor
    """``[Y, B, L]`` int64: random order of the tokens of each row; empty where no pair is evaluated."""
    fit: Tensor
    """``[Y, FIT_GROUPS, 1 + FIT_TOKENS]``, uniform in [0, 1): one draw of a population per group, and FIT_TOKENS draws
    of its tokens."""


class Estimate(NamedTuple):
    """Estimates of Y layers from sampled pairs."""

    loss: Tensor
    """``[]``, or ``[S]`` for ``"none"``: mean over the layers of their reduced losses, in :func:`statistics_dtype`; 0
    for a sequence without a pair."""
    grad: Tensor | None
    """``[Y, B, L, F]``: d loss (of the token's sequence) / d z without the factor ``scale``; None where not
    requested."""
    scale: Tensor | None
    """``[Y, B, L]``: factor of ``grad`` per token; None where not requested."""
    error: Tensor
    """``[Y]``: expected relative error of the gradient; 0 where the error or the gradient was not requested."""


class Request(NamedTuple):
    """Arguments of a backend's own sampler for Y layers at once."""

    layers: Sequence[Tensor]
    partition: Partition
    potential: Potential
    uniform: Tensor | None
    """``Draws.fit`` of these layers, for the ``low_rank`` control variate; None without a control variate."""
    evaluated: bool
    """Whether any pair is evaluated (the fraction is above 0)."""
    grad: tuple[Tensor, Tensor] | None
    """``[Y, B, L, F]`` and ``[Y, B, L]``: outputs for the two factors of the gradient; None without a gradient."""


# A backend's own sampler; it returns the loss of each sequence and ``per_pair``, ``[Y S]``, as ``corrected_losses``.
Sampler = Callable[[Request], tuple[Tensor, Tensor]]


def draw(layers: Sequence[Tensor], fraction: float, generator: torch.Generator | None) -> Draws:
    """Random draws for a ``fraction`` of the pairs of the tokens ``[B, L, F]`` of each layer."""
    (batch, length, _), device, count = layers[0].shape, layers[0].device, len(layers)
    fit_draws = uniform(count, FIT_GROUPS, 1 + FIT_TOKENS, device=device, generator=generator)
    if fraction == 0:
        return Draws(fit_draws.new_empty(count, 0, 0, dtype=torch.int64), fit_draws)
    if device.type != "cpu" or _in_vmap():
        return Draws(uniform(count, batch, length, device=device, generator=generator).argsort(2), fit_draws)
    # Sorting random numbers takes seven times as long on a CPU as random permutations.
    if torch.compiler.is_compiling() and generator is None:
        orders = torch.ops.dispersion_kernels.permutations(count * batch, length)
    else:
        orders = _permutations(count * batch, length, generator)
    return Draws(orders.view(count, batch, length), fit_draws)


def _in_vmap() -> bool:
    """Whether vmap is active; it does not support operators with an ``out``."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(transform.key() == torch._C._functorch.TransformType.Vmap for transform in stack)


def _permutations(count: int, length: int, generator: torch.Generator | None = None) -> Tensor:
    """Random permutations ``[count, length]``, int64 on the CPU."""
    orders = torch.empty(count, length, dtype=torch.int64, device="cpu")
    for order in orders.unbind():
        torch.randperm(length, generator=generator, out=order)
    return orders


# An operator, because torch.compile would unroll the loop and compile it for each number of sequences.
_library = torch.library.Library("dispersion_kernels", "FRAGMENT")
_library.define(
    "permutations(SymInt count, SymInt length) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
_library.impl("permutations", _permutations, "CompositeExplicitAutograd")


@torch.library.register_fake("dispersion_kernels::permutations")
def _permutations_fake(count: int, length: int) -> Tensor:
    return torch.empty(count, length, dtype=torch.int64, device="cpu")


def estimate(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    options: LossOptions,
    draws: Draws,
    with_grad: bool,
    with_error: bool,
    run: Run,
    sampler: Sampler | None = None,
) -> Estimate:
    """Loss and gradient of layers ``[B, L, F]``, alike in shape, dtype and device, from a fraction of their pairs.

    ``pair_ids`` and ``cu_seqlens`` are as in :mod:`dispersion_kernels.segments`, None where the fraction is 0.
    ``options.sampling`` is :class:`SampledPairs`. ``run`` is the backend, ``sampler`` its own sampler where it has one
    for these options.
    """
    sampling, potential, reduction = options.sampling, options.potential, options.reduction
    assert isinstance(sampling, SampledPairs)
    fraction, control_variate = sampling.fraction, sampling.control_variate
    first, count, evaluated = layers[0], len(layers), fraction > 0
    dtype, stats_dtype = accumulation_dtype(first.dtype), statistics_dtype(first.device)
    grad = first.new_empty(count, *first.shape, dtype=dtype) if with_grad else None
    scale = first.new_empty(count, *first.shape[:2], dtype=dtype) if with_grad else None
    # A backend's sampler takes layers of whole sequences as one larger batch; the error is computed layer by layer.
    whole = pair_ids is None and cu_seqlens is None and blocks_of_same_size(fraction, first.shape[1]) > 0
    at_once = count if whole and sampler is not None and not with_error else 1
    losses, errors, weight = [], [], loss_weight(count, reduction, 0)
    for n in range(0, count, at_once):
        some = slice(n, n + at_once)
        partition = partition_of(layers[some], draws.shuffle[some], pair_ids, cu_seqlens, fraction)
        weight = loss_weight(count, reduction, partition.with_pairs // at_once)
        gradient = None if grad is None or scale is None else (grad[some], scale[some])
        model = None
        if (sampler is None and control_variate != "none") or (with_error and gradient is not None):
            model = fit(layers[n], partition, draws.fit[n], potential, control_variate)
        if sampler is not None:
            uniform = None if control_variate == "none" else draws.fit[some]
            loss, per_pair = sampler(Request(layers[some], partition, potential, uniform, evaluated, gradient))
        else:
            loss, per_pair = sample(run, layers[n], partition, potential, model, evaluated, gradient)
        losses.append(loss.view(at_once, -1).sum(0))
        if gradient is not None and model is not None and with_error:
            errors.append(_relative_error(*gradient, noise(model, partition, per_pair, evaluated)))
    total = torch.stack(losses).sum(0) * weight
    if scale is not None:
        scale *= weight
    error = torch.stack(errors) if errors else first.new_zeros(count, dtype=stats_dtype)
    return Estimate(total if reduction == "none" else total.sum(), grad, scale, error)


def _relative_error(grad: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Relative error ``[]`` of one layer's gradient, from its two factors and ``noise``, its expected squared error."""
    lengths = torch.linalg.vector_norm(grad.flatten(0, -2), dim=1) * scale.flatten()
    squares = sum_of_tokens(lengths.to(noise.dtype).square().unsqueeze(0)).squeeze(0)
    error = (noise / (squares - noise).clamp(min=torch.finfo(grad.dtype).tiny)).sqrt()
    return torch.where(noise < squares, error, torch.where(noise > 0, torch.inf, 0.0).to(error.dtype))
