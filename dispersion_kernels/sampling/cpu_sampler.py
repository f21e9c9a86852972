"""Sampled pairs in the CPU kernel, which computes model, blocks, loss and gradient in one call."""

from __future__ import annotations

from torch import Tensor

from dispersion_kernels.backends import cpu
from dispersion_kernels.potentials import ExponentialPotential, Potential
from dispersion_kernels.sampling import SampledPairs
from dispersion_kernels.sampling.control_variate import DIRECTIONS
from dispersion_kernels.sampling.estimate import Request, Sampler
from dispersion_kernels.sampling.partition import block_tokens, blocks_of_same_size, mean_length

# Largest range of the exponent for which the kernel needs no running maximum.
_FIXED_RANGE = 79.0


def sampler(potential: Potential, sampling: SampledPairs, z: Tensor, cu_seqlens: Tensor | None) -> Sampler | None:
    """The kernel's sampler, where the kernel can sample the pairs of tokens ``[B, L, F]``."""
    length, fraction = mean_length(z, cu_seqlens), sampling.fraction
    blocks = 0 if cu_seqlens is not None else blocks_of_same_size(fraction, length)
    size = length // blocks if blocks else block_tokens(fraction, length)
    if isinstance(potential, ExponentialPotential):
        low, high = potential.exponent_range()
        if high - low > _FIXED_RANGE:
            return None
    full_rank = sampling.control_variate == "full_rank" and z.shape[2] > DIRECTIONS
    return None if full_rank or (fraction > 0 and size > cpu.LARGEST_BLOCK) else _sample


def _sample(request: Request) -> tuple[Tensor, Tensor]:
    layers, partition = request.layers, request.partition
    if any(cpu.row_stride(z) is None or z.stride() != layers[0].stride() for z in layers):
        layers = [z.contiguous() for z in layers]
    return cpu.sampled(
        layers,
        potential_name=request.potential.name(),
        params=request.potential.params(),
        order=partition.order,
        populations=partition.populations,
        blocks=partition.bounds if request.evaluated else None,
        inverse_probability=partition.inverse_probability,
        sequence=partition.sequence,
        pairs=partition.pairs,
        draws=request.uniform,
        gradient=request.grad,
    )
