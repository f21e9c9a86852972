"""FLOP formulas of the operators for ``torch.utils.flop_counter.FlopCounterMode``.

Counted are the matrix products over pairs, by the mode's rules for the naive loss: 2 FLOPs per multiply-add, L^2 pairs
per sequence, one product for the loss and three for loss and gradient: 2 B L^2 F and 6 B L^2 F. (The kernels do half of
that, because c is symmetric.) Packed sequences count their own pairs where ``cu_seqlens`` has values; masks and
documents do not change the count. Sampled pairs count the evaluated pairs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from dispersion_kernels.sampling.estimate import visits_all
from dispersion_kernels.sampling.partition import block_tokens, mean_length


def register() -> None:
    """Registers the formulas with PyTorch and with the active counters. Counters copy the registry when they are made,
    so that the active ones have to be told; registering at import would import ``torch.utils.flop_counter``, and Triton
    with it."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    operators = torch.ops.dispersion_kernels
    formulas = {operators.forward: _all_pairs_flops, operators.sampled: _sampled_pairs_flops}
    modes = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, counter._FlopCounterMode)]
    for known in (counter.flop_registry, *(mode.counter.flop_registry for mode in modes)):
        for operator, formula in formulas.items():
            known.setdefault(operator, formula)


def _all_pairs_flops(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
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


def _sampled_pairs_flops(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
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
    size = block_tokens(fraction, mean_length(layers[0], cu_seqlens))
    pairs = sum(length * min(length, size) for length in lengths) if fraction else 0
    return 2 * (3 if with_grad else 1) * len(layers) * pairs * layers[0].shape[2]


def _lengths(z: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    """Length of each sequence of ``z`` ``[B, L, F]``; L for a packed row whose ``cu_seqlens`` has no values."""
    if cu_seqlens is None or cu_seqlens.is_meta or type(cu_seqlens).__name__ == "FakeTensor":
        return [z.shape[1]] * z.shape[0]
    lengths: list[int] = cu_seqlens.diff().tolist()
    return lengths
