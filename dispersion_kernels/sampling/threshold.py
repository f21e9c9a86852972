"""Length up to which all pairs take less time than an estimate, on a GPU: there an estimate is hundreds of small
operations, whose launches take the host milliseconds.

The figures are predictions: nothing of this was timed on a GPU.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dispersion_kernels.backends.gpu.launch import fp32_precision

# Operations of an estimate for one layer beside the sweep over the blocks, as tests/sampling/test_threshold.py counts.
OPERATIONS = {"low_rank": 320, "full_rank": 290, "none": 55}
# Time in which PyTorch's host launches a small operation.
SECONDS_PER_OPERATION = 5e-6
# Fraction of the tensor cores' peak that all pairs reach in docs/gpu-model.md, for long sequences of 768 features.
EFFICIENCY = 0.4
# Dense 16-bit FLOPs with fp32 sums, per clock and SM, by compute capability, of the data sheets; of GeForce cards for
# 8.6, 8.9 and 12.0. Other devices: as 8.0, and AMD's CDNA 3 likewise.
_FLOPS_PER_CLOCK = {(8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192, (12, 0): 512}


def all_pairs_are_faster(z: Tensor, length: int, control_variate: str) -> bool:
    """Whether loss and gradient over all pairs of tokens ``[B, L, F]``, in sequences of ``length`` tokens, should take
    less time than the operations of an estimate. False on a CPU, where the C++ kernel estimates in one call."""
    if not z.is_cuda or not torch.cuda.is_available():
        return False
    rate = EFFICIENCY * _peak_rate(z.device)
    if z.dtype == torch.float32:
        rate /= {"tf32": 2, "tf32x3": 6}[fp32_precision()]
    flops = 6.0 * z.shape[0] * z.shape[1] * length * z.shape[2]
    return flops < rate * OPERATIONS[control_variate] * SECONDS_PER_OPERATION


@functools.cache
def _peak_rate(device: torch.device) -> float:
    """Dense 16-bit FLOPs a second of the device."""
    found = torch.cuda.get_device_properties(device)
    per_clock = 2048 if torch.version.hip else _FLOPS_PER_CLOCK.get((found.major, found.minor), 2048)
    kilohertz = getattr(found, "clock_rate", 0) or 1_500_000
    return 1e3 * kilohertz * found.multi_processor_count * per_clock
