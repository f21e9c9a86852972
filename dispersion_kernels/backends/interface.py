"""Interface of the backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dispersion_kernels.potentials import Potential

# Losses of layers ``[B, L, F]`` by a backend: mean over the layers of their reduced losses; G per layer, ``[B, L, F]``:
# the gradient without its scale and, of backends with ``Finish``, the row transform; and the scale, ``[layers, B, L]``.
# The latter two are None where not requested.
Losses = tuple[Tensor, Sequence[Tensor | None], Tensor | None]
# Gradient of each layer in a dtype, rounded once. Arguments: G per layer, None where not requested; the layers; the
# scale; another factor, which broadcasts to ``[B, L]``; potential; dtype.
Finish = Callable[
    [Sequence[Tensor | None], Sequence[Tensor], Tensor, Tensor, Potential, torch.dtype], list[Tensor | None]
]


class Run(Protocol):
    """Function of a backend that computes losses and gradients. ``with_grad``: per layer, whether its gradient is
    requested; ``max_seqlen``: largest length of the sequences in ``cu_seqlens``, None where it is not known."""

    def __call__(
        self,
        layers: Sequence[Tensor],
        pair_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        potential: Potential,
        reduction: str,
        with_grad: Sequence[bool],
        max_seqlen: int | None = None,
    ) -> Losses: ...


def joined_scales(scales: Sequence[Tensor | None]) -> Tensor | None:
    """Scales ``[layers, B, L]``, with zeros for layers without a gradient; None where no layer has one."""
    if len(scales) == 1:
        return None if scales[0] is None else scales[0].unsqueeze(0)
    shape = next((scale for scale in scales if scale is not None), None)
    if shape is None:
        return None
    return torch.stack([torch.zeros_like(shape) if scale is None else scale for scale in scales])
