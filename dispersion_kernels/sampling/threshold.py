"""Question whether all pairs are evaluated where a fraction was asked for.

On a GPU an estimate is hundreds of small operations, whose launches take the host milliseconds: up to some length all
pairs take less. The figures are predictions: nothing of this was timed on a GPU.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dispersion_kernels.backends.gpu.launch import fp32_precision
from dispersion_kernels.backends.registry import choose
from dispersion_kernels.options import LossOptions
from dispersion_kernels.sampling import SampledPairs
from dispersion_kernels.sampling.partition import block_tokens, mean_length

# Operations of an estimate for one layer beside the sweep over the blocks, as tests/sampling/test_threshold.py counts.
OPERATIONS = {"low_rank": 320, "full_rank": 290, "none": 55}
# Time in which PyTorch's host launches a small operation.
SECONDS_PER_OPERATION = 5e-6
# Fraction of the tensor cores' peak that all pairs reach in docs/gpu-model.md, for long sequences of 768 features.
EFFICIENCY = 0.4
# Dense 16-bit FLOPs with fp32 sums, per clock and SM, by compute capability, from data sheets; others as GeForce.
_FLOPS_PER_CLOCK = {(8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
_GEFORCE, _CDNA3 = 512, 2048


def evaluates_all(options: LossOptions, z: Tensor, cu_seqlens: Tensor | None) -> bool:
    """Whether a call with sampled pairs evaluates all pairs of tokens ``[B, L, F]``: the batch is empty, a block would
    be a whole sequence, or GPU kernels should take less time for all pairs than an estimate takes."""
    sampling, length = options.sampling, mean_length(z, cu_seqlens)
    assert isinstance(sampling, SampledPairs)
    if z.shape[0] == 0 or length <= block_tokens(sampling.fraction, length):
        return True
    if not z.is_cuda or not torch.cuda.is_available() or choose(options.impl, z, options.potential) == "torch":
        return False
    rate = EFFICIENCY * _peak_rate(z.device)
    if z.dtype == torch.float32:
        rate /= {"tf32": 2, "tf32x3": 6}[fp32_precision()]
    flops = 3.0 * z.shape[0] * z.shape[1] * length * z.shape[2]
    return flops < rate * OPERATIONS[sampling.control_variate] * SECONDS_PER_OPERATION


@functools.cache
def _peak_rate(device: torch.device) -> float:
    """Dense 16-bit FLOPs a second of the device."""
    found = torch.cuda.get_device_properties(device)
    per_clock = _CDNA3 if torch.version.hip else _FLOPS_PER_CLOCK.get((found.major, found.minor), _GEFORCE)
    kilohertz = getattr(found, "clock_rate", 0) or 1_500_000
    return 1e3 * kilohertz * found.multi_processor_count * per_clock
