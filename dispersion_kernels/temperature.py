"""Derivative of the loss with respect to the temperature (``tau``, ``sigma2`` or ``t``), by the torch backend.

The loss of a distance potential is a function of z / sqrt(tau), so that d loss / d tau = -sum z . dz / (2 tau) (Euler).
The loss of a cosine potential is log(mean psi) with psi = exp(e) and an exponent e proportional to 1 / tau or t: its
derivative is the mean of e over the pairs, weighted with psi, divided by -tau or t.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from dispersion_kernels.backends.torch_tiled import sweep
from dispersion_kernels.numerics import accumulation_dtype
from dispersion_kernels.potentials import ExponentialPotential, L2Repel, Potential, temperature_field


def slope_of_temperature(
    z: Tensor, potential: Potential, pair_ids: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Derivative ``[S]`` of each sequence's loss by the temperature, 0 for a sequence without a pair; and the number
    ``[S]`` of its pairs."""
    field = temperature_field(potential)
    assert field is not None
    value, power = getattr(potential, field), 1 if field == "t" else -1
    if potential.row_transform == "none":
        if isinstance(potential, L2Repel):
            potential = dataclasses.replace(potential, norm_weight=0.0)
        _, pairs, grad, scale = sweep(z, potential, pair_ids, cu_seqlens, True)
        assert grad is not None
        assert scale is not None
        # Centring leaves distances unchanged and reduces the cancellation in the products with the gradient.
        taking_part = (scale != 0).unsqueeze(2)
        x = z.to(grad.dtype).masked_fill(~taking_part, 0.0)
        x = (x - x.sum(1, keepdim=True) / taking_part.sum(1, keepdim=True).clamp(min=1)).masked_fill(~taking_part, 0.0)
        along = (x * grad).sum(2) * scale
        if cu_seqlens is None:
            return -along.sum(1) / (2 * value), pairs
        offsets = cu_seqlens.to(z.device).long()
        return -torch.segment_reduce(along[0], "sum", offsets=offsets, unsafe=True) / (2 * value), pairs
    assert isinstance(potential, ExponentialPotential)
    loss, pairs, _, _ = sweep(z, potential, pair_ids, cu_seqlens, False)
    log_mean = (loss - potential.loss_offset).masked_fill(pairs == 0, -math.inf)
    shift = log_mean.nan_to_num(-math.inf, -math.inf, -math.inf).max() if loss.numel() else loss.new_zeros(())
    weighted = sweep(z, _Weighted(potential, shift), pair_ids, cu_seqlens, False).loss
    share = (log_mean - shift).exp()
    # A mean psi that underflows beside the largest sequence's leaves the derivative unknown: NaN, not 0.
    share = share.masked_fill(share < torch.finfo(accumulation_dtype(z.dtype)).tiny, math.nan)
    return (weighted / share * (power / value)).masked_fill(pairs == 0, 0.0), pairs


class _Weighted(Potential):
    """Potential psi e / exp(shift), where e is the exponent of psi."""

    reduction = "mean"

    def __init__(self, potential: ExponentialPotential, shift: Tensor) -> None:
        self.potential, self.shift = potential, shift
        self.norm_eps = potential.norm_eps  # type: ignore[misc]

    def value(self, c: Tensor) -> Tensor:
        exponent = self.potential.exponent_(c.clone())
        return (exponent - self.shift).exp_().mul_(exponent)
