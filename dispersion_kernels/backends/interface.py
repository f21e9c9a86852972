"""Interface of the backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dispersion_kernels.potentials import Potential

# Losses of layers ``[B, L, F]`` by a backend: mean over the layers of their reduced losses; G per layer, ``[B, L, F]``:
# the gradient without its scale and, of backends with ``Finish``, the row transform; and the scale, ``[layers, B, L]``.
# The latter two are None where not requested.
Losses = tuple[Tensor, Sequence[Tensor | None], Tensor | None]
# Arguments: layers, pair_ids, cu_seqlens, potential, reduction, and, per layer, whether its gradient is requested.
Run = Callable[[Sequence[Tensor], Tensor | None, Tensor | None, Potential, str, Sequence[bool]], Losses]
# Gradient of each layer in a dtype, rounded once. Arguments: G per layer, None where not requested; the layers; the
# scale; another factor, which broadcasts to ``[B, L]``; potential; dtype.
Finish = Callable[
    [Sequence[Tensor | None], Sequence[Tensor], Tensor, Tensor, Potential, torch.dtype], list[Tensor | None]
]


def joined_scales(scales: Sequence[Tensor | None]) -> Tensor | None:
    """Scales ``[layers, B, L]``, with zeros for layers without a gradient; None where no layer has one."""
    if len(scales) == 1:
        return None if scales[0] is None else scales[0].unsqueeze(0)
    shape = next((scale for scale in scales if scale is not None), None)
    if shape is None:
        return None
    return torch.stack([torch.zeros_like(shape) if scale is None else scale for scale in scales])
