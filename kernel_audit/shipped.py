"""The calls whose kernels the ahead-of-time checks examine: potentials, dtypes, shapes, pair ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dispersion_kernels.potentials import (
    AngularSpread,
    Decorrelation,
    DispersiveL2,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    Uniformity,
)


@dataclass(frozen=True)
class Call:
    """Arguments of :func:`dispersion_kernels.backends.gpu.launch.dispersion`, on the CPU."""

    name: str
    potential: Potential
    layers: list[Tensor]
    pair_ids: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    with_grad: bool
    precision: str | None
    """Precision of fp32 products: ``"tf32"``, or None for the backend's most accurate."""


_DTYPES = [(torch.bfloat16, None), (torch.float16, None), (torch.float32, None), (torch.float32, "tf32")]
_POTENTIALS: list[tuple[str, Potential]] = [
    ("angular_spread", AngularSpread()),
    ("angular_spread, tau=0.005", AngularSpread(tau=0.005)),
    ("angular_spread, clamp=0", AngularSpread(clamp=0.0)),
    ("orthogonalization", Orthogonalization()),
    ("orthogonalization, clamp=0", Orthogonalization(clamp=0.0)),
    ("l2_repel", L2Repel()),
    ("l2_repel, no diagonal", L2Repel(include_diagonal=False)),
    ("decorrelation", Decorrelation()),
    ("uniformity", Uniformity()),
    ("dispersive_l2", DispersiveL2()),
    ("perplexity_entropy", PerplexityEntropy()),
]


# Lengths, numbers of features and numbers of layers. Ragged ones are divided neither by a tile nor by the numbers that
# Triton specialises on.
_SHAPES = [(1024, 64, 1), (1024, 128, 1), (1024, 768, 1)]
_RAGGED = [(1000, 100, 1), (1023, 776, 1), (1000, 768, 12), (1, 768, 1)]


def calls(every: bool = False) -> Iterator[Call]:
    """Calls with and without pair ids, gradient and packed sequences, of known and of unknown largest length.

    angular_spread in every dtype for few and for many features, in bf16 and fp32 at ragged shapes and for many layers;
    every potential in bf16 at F=768. With ``every``: every potential and dtype for few and for many features, and
    angular_spread in every dtype at ragged shapes.
    """
    for name, potential in _POTENTIALS:
        default = name == "angular_spread"
        for dtype, precision in _DTYPES if every or default else _DTYPES[:1]:
            ragged = default and (every or (precision is None and dtype != torch.float16))
            shapes = [*(_SHAPES if every or default else _SHAPES[-1:]), *(_RAGGED if ragged else [])]
            for length, features, count in shapes:
                layers = [torch.zeros(1, length, features, dtype=dtype) for _ in range(count)]
                cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
                mask = torch.zeros(1, length, dtype=torch.int64)
                for pair_ids, bounds in ((None, None), (mask, None), (None, cu_seqlens)):
                    for with_grad in (True, False):
                        yield Call(name, potential, layers, pair_ids, bounds, None, with_grad, precision)
                yield Call(name, potential, layers, None, cu_seqlens, length, True, precision)
