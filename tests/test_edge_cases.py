"""Empty inputs, meta and fake tensors, lists over several devices: the right value, or an error with its remedy."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from conftest import IMPLS, skip_unless_supported
from torch import Tensor

from dispersion_kernels import fused_dispersion_loss

SAMPLED: list[dict[str, Any]] = [
    {},
    {"max_tokens": 4},
    {"pairs": 1 / 16, "control_variate": "none"},
    {"pairs": 1 / 16, "control_variate": "low_rank", "return_stats": True},
]


def bounds(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_to_pair_is_zero(dtype: torch.dtype, reduction: Literal["mean", "sum", "none"], impl: str) -> None:
    """No sequence, sequences without tokens, or of one: a loss of 0 each, and a gradient of 0 of the tokens' shape."""
    skip_unless_supported(impl, torch.zeros(1, dtype=dtype))
    cases: list[tuple[tuple[int, ...], list[int], dict[str, Any]]] = [
        ((0, 5, 8), [0], {}),
        ((2, 0, 8), [2], {}),
        ((0, 0, 8), [0], {}),
        ((2, 1, 8), [2], {}),
        ((0, 8), [], {}),
        ((0, 8), [0], {"cu_seqlens": bounds(0)}),
        ((0, 8), [2], {"cu_seqlens": bounds(0, 0, 0)}),
        ((3, 8), [4], {"cu_seqlens": bounds(0, 1, 1, 2, 3)}),
        ((0, 5, 8), [0], {"mask": torch.ones(0, 5, dtype=torch.bool)}),
        ((2, 0, 8), [2], {"document_ids": torch.zeros(2, 0, dtype=torch.int64)}),
        ((2, 40, 8), [2], {"mask": torch.zeros(2, 40, dtype=torch.bool)}),
        ((2, 40, 8), [2], {"document_ids": torch.full((2, 40), -1)}),
        ((2, 40, 8), [2], {"document_ids": torch.arange(40).expand(2, 40)}),
    ]
    for shape, losses, options in cases:
        for sampled in SAMPLED if impl != "reference" else SAMPLED[:2]:
            for layers in (1, 2):
                z = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(layers)]
                loss: Any = fused_dispersion_loss(z, impl=impl, reduction=reduction, **options, **sampled)
                if "return_stats" in sampled:
                    loss, stats = loss
                    assert torch.equal(stats.relative_error, torch.zeros(layers))
                assert torch.equal(loss, torch.zeros(losses if reduction == "none" else []))
                for grad, layer in zip(torch.autograd.grad(loss.sum(), z), z, strict=True):
                    assert torch.equal(grad, torch.zeros_like(layer))
