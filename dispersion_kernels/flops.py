"""FLOP formula of the operator for ``torch.utils.flop_counter.FlopCounterMode``.

Counted are the matrix products over pairs, by the mode's rules for the naive loss: 2 FLOPs per multiply-add, L^2 pairs
per sequence, one product for the loss and three for loss and gradient: 2 B L^2 F and 6 B L^2 F. (The kernels do half of
that, because c is symmetric.) Packed sequences count their own pairs where ``cu_seqlens`` has values; masks and
documents do not change the count. Sampled pairs count the evaluated pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from dispersion_kernels.options import LossOptions
from dispersion_kernels.sampling import SampledPairs
from dispersion_kernels.sampling.partition import block_tokens, mean_length
from dispersion_kernels.sampling.threshold import evaluates_all


def register(operator: Any, formula: Callable[..., int]) -> None:
    """Registers the ``formula`` with PyTorch and with the active counters. Counters copy the registry when they are
    made, so that the active ones have to be told; registering at import would import ``torch.utils.flop_counter``, and
    Triton with it."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, counter._FlopCounterMode)]
    for known in (counter.flop_registry, *(mode.counter.flop_registry for mode in modes)):
        known.setdefault(operator, formula)


def count(layers: Sequence[Tensor], cu_seqlens: Tensor | None, options: LossOptions, with_grad: Sequence[bool]) -> int:
    """FLOPs of the loss of ``layers`` ``[B, L, F]``, and of their gradients where ``with_grad`` has True."""
    lengths, largest, sampling = _lengths(layers[0], cu_seqlens), layers[0].shape[1], options.sampling
    if isinstance(sampling, SampledPairs) and not evaluates_all(options, layers[0], cu_seqlens):
        largest = block_tokens(sampling.fraction, mean_length(layers[0], cu_seqlens)) if sampling.fraction else 0
    pairs = sum(length * min(length, largest) for length in lengths)
    return sum(2 * (3 if need else 1) * pairs * z.shape[2] for z, need in zip(layers, with_grad, strict=True))


def _lengths(z: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Length of each sequence of ``z`` ``[B, L, F]``; L for a packed row whose ``cu_seqlens`` has no values."""
    if cu_seqlens is None or cu_seqlens.is_meta or type(cu_seqlens).__name__ == "FakeTensor":
        return [z.shape[1]] * z.shape[0]
    lengths: list[int] = cu_seqlens.diff().tolist()
    return lengths
