"""Empty inputs, meta and fake tensors, lists over several devices: the right value, or an error with its remedy."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from conftest import GPU, GPU_IMPLS, IMPLS, skip_unless_supported
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dispersion_kernels import SampledPairs, SampledTokens, fused_dispersion_loss
from dispersion_kernels.segments import warn_of_no_pair

SAMPLED: list[dict[str, Any]] = [
    {},
    {"sampling": SampledTokens(4)},
    {"sampling": SampledPairs(1 / 16, "none")},
    {"sampling": SampledPairs(1 / 16), "return_stats": True},
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


@pytest.mark.parametrize("impl", GPU_IMPLS or ["triton"])
class TestKernels:
    pytestmark = [pytest.mark.gpu] if GPU else []

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_nothing_to_pair_is_zero(self, dtype: torch.dtype, impl: str) -> None:
        test_nothing_to_pair_is_zero(dtype, "none", impl)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values_give_shapes(kind: str, impl: str) -> None:
    """Meta and fake tensors, as tools use them that estimate memory or initialise large models: forward and backward
    give shape, dtype and device, inside of autocast, too."""
    mode: Any = FakeTensorMode() if kind == "fake" else contextlib.nullcontext()
    with mode:
        device = "meta" if kind == "meta" else "cpu"
        mask = torch.ones(2, 700, dtype=torch.bool, device=device)
        reads: list[dict[str, Any]] = [
            {"mask": mask, "reduction": "none"},
            {"document_ids": mask.long()},
            {"cu_seqlens": torch.zeros(4, dtype=torch.int32, device=device)},
            {"cu_seqlens": torch.zeros(4, dtype=torch.int32, device=device), "sampling": SampledTokens(8)},
        ]
        others: list[dict[str, Any]] = [{}, {"sampling": SampledTokens(8)}, {"recompute": True}, {"reduction": "none"}]
        if impl != "reference":
            others += reads
            others += [{"sampling": 0}, {"sampling": 1 / 16, "mask": mask}, {"sampling": SampledPairs(1 / 16)}]
            others += [{"sampling": 1 / 16, "cu_seqlens": torch.zeros(4, dtype=torch.int32, device=device)}]
        for options in others:
            packed = "cu_seqlens" in options
            z = torch.empty(
                (1400, 8) if packed else (2, 700, 8), dtype=torch.bfloat16, device=device, requires_grad=True
            )
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(options)):
                loss = fused_dispersion_loss(z, impl=impl, **options)
            assert loss.shape == ((2,) if options.get("reduction") == "none" else ())
            assert (loss.dtype, loss.device.type) == (torch.float32, device)
            (grad,) = torch.autograd.grad(loss.sum(), z)
            assert (grad.shape, grad.dtype, grad.device.type) == (z.shape, z.dtype, device)
        for options in reads if impl == "reference" else []:
            z = torch.empty((1400, 8) if "cu_seqlens" in options else (2, 700, 8), device=device)
            with pytest.raises(ValueError, match=r"impl='reference' reads the values of mask.*take impl='torch'"):
                fused_dispersion_loss(z, impl=impl, **options)


@pytest.fixture
def _anew() -> Iterator[None]:
    warn_of_no_pair.cache_clear()
    yield
    warn_of_no_pair.cache_clear()


@pytest.mark.usefixtures("_anew")
@pytest.mark.parametrize("impl", ["cpu", "torch"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cu_seqlens": bounds(0, 1, 2, 3, 3, 6), "mask": torch.arange(6) < 4},
        {"cu_seqlens": bounds(0, 1, 2, 3, 4, 5, 6), "sampling": 1 / 16},
        {"mask": torch.zeros(6, dtype=torch.bool)},
        {"document_ids": torch.arange(6)},
    ],
    ids=["one token", "packed, masked", "packed, sampled", "masked", "documents"],
)
def test_no_pair_at_all_is_said_once(options: dict[str, Any], impl: str) -> None:
    z = torch.randn(6, 8) if options else torch.randn(2, 1, 8)
    skip_unless_supported(impl, z)
    with pytest.warns(UserWarning, match="no two tokens that pair") as warned:
        losses = [fused_dispersion_loss(z, impl=impl, **options) for _ in range(2)]
    assert losses == [0, 0]
    assert len(warned) == 1


@pytest.mark.usefixtures("_anew")
def test_a_pair_is_no_occasion_to_warn() -> None:
    z = torch.randn(6, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for impl in ("auto", "torch"):
            fused_dispersion_loss(z, cu_seqlens=bounds(0, 1, 2, 3, 4, 6), impl=impl)
            fused_dispersion_loss(z, mask=torch.arange(6) < 2, impl=impl)
            fused_dispersion_loss(z.to("meta"), mask=torch.ones(6, dtype=torch.bool, device="meta"), impl=impl)
        compiled = torch.compile(fused_dispersion_loss, backend="eager", fullgraph=True)
        assert compiled(torch.randn(2, 1, 8)) == 0
