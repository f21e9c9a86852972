"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of the operators.

The matrix products over pairs, as it counts those of the naive loss: 2 FLOPs a multiply-add, L^2 pairs a sequence, one
product for the loss and three with its gradient: 2 B L^2 F and 6 B L^2 F. (The kernels do half of it, because c is
symmetric.) A packed sequence counts its own pairs, where ``cu_seqlens`` has values; masks and documents, which leave
pairs out, change nothing. A fraction of the pairs counts those that are visited.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from dispersion_kernels.sampling.estimate import visits_all
from dispersion_kernels.sampling.partition import block_tokens


def register() -> None:
    """Tells the counters at work. They take the formulas known when they are made, and to make these known to PyTorch
    before would import Triton, as its module of the counter does."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    operators = torch.ops.dispersion_kernels
    formulas = {operators.forward: _of_all_pairs, operators.sampled: _of_sampled_pairs}
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, counter._FlopCounterMode)]
    for known in (counter.flop_registry, *(mode.counter.flop_registry for mode in modes)):
        for operator, formula in formulas.items():
            known.setdefault(operator, formula)


def _of_all_pairs(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: Tensor | None,
    potential: str,
    params: Sequence[float],
    reduction: str,
    impl: str,
    with_slope: bool,
    with_grad: Sequence[bool],
    *,
    out_val: Any = None,
) -> int:
    pairs = sum(length * length for length in _lengths(layers[0], cu_seqlens))
    return sum(2 * (3 if need else 1) * pairs * z.shape[2] for z, need in zip(layers, with_grad, strict=True))


def _of_sampled_pairs(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    shuffle: Tensor,
    fit: Tensor,
    potential: str,
    params: Sequence[float],
    reduction: str,
    impl: str,
    fraction: float,
    control_variate: str,
    with_grad: bool,
    with_error: bool,
    *,
    out_val: Any = None,
) -> int:
    lengths = _lengths(layers[0], cu_seqlens)
    if visits_all(fraction, layers[0], cu_seqlens):
        fraction = 1.0
    pairs = sum(length * min(length, block_tokens(fraction, length)) for length in lengths) if fraction else 0
    return 2 * (3 if with_grad else 1) * len(layers) * pairs * layers[0].shape[2]


def _lengths(z: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Of each sequence of ``[B, L, F]``; the whole of a packed row where ``cu_seqlens`` has no values."""
    if cu_seqlens is None or cu_seqlens.is_meta or type(cu_seqlens).__name__ == "FakeTensor":
        return [z.shape[1]] * z.shape[0]
    lengths: list[int] = cu_seqlens.diff().tolist()
    return lengths
