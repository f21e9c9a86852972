"""torch.set_default_dtype, which some trainers call (Lightning in precision="16-true"), changes no number here.
Bits and random draws are the same as under float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import POTENTIALS, skip_unless_supported
from torch import Tensor

from dispersion_kernels import DispersionLoss, SampledPairs, SampledTokens, fused_dispersion_loss
from dispersion_kernels.condensation import condensation_by_layer, mean_pairwise_cosine
from dispersion_kernels.gpt2.model import GPT2, GPT2Config

IMPLS = ["reference", "cpu", "torch"]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_the_same_bits(call: Callable[[], list[Tensor]]) -> None:
    torch.manual_seed(3)
    expected = call()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with default_dtype(dtype):
            torch.manual_seed(3)
            found = call()
        for under_dtype, under_float32 in zip(found, expected, strict=True):
            assert under_dtype.dtype == under_float32.dtype
            assert torch.equal(under_dtype, under_float32)


def loss_and_gradients(layers: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [z.detach().clone().requires_grad_() for z in layers]
    result = fused_dispersion_loss(leaves if len(leaves) > 1 else leaves[0], **options)
    loss, stats = result if options.get("return_stats") else (result, ())
    grads = torch.autograd.grad(loss.sum(), leaves)
    with torch.no_grad():
        alone = fused_dispersion_loss(layers if len(layers) > 1 else layers[0], **options)
    return [loss.detach(), *stats, *grads, alone if isinstance(alone, Tensor) else alone[0]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_every_potential(potential: Any, impl: str) -> None:
    z = torch.randn(2, 40, 16)
    skip_unless_supported(impl, z, potential)
    assert_the_same_bits(lambda: loss_and_gradients([z], potential=potential, impl=impl))


_Z = torch.randn(2, 600, 24, generator=torch.Generator().manual_seed(1))
_MASK = torch.rand(2, 600, generator=torch.Generator().manual_seed(2)) > 0.3
_CU_SEQLENS = torch.tensor([0, 60, 61, 61, 600], dtype=torch.int32)
_IDS = torch.arange(600).div(90, rounding_mode="floor").sub(1).repeat(2, 1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ([_Z[:, :40], _Z[:, 40:80]], {"reduction": "none"}),
        ([_Z[:, :40], _Z[:, 40:90]], {"reduction": "sum"}),
        ([_Z[:, :40].bfloat16()], {}),
        ([_Z[:, :40].half()], {"recompute": True}),
        ([_Z[:, :40].double()], {}),
        ([_Z[:, :1]], {}),
        ([_Z[:, :60]], {"mask": _MASK[:, :60], "tau": 0.3}),
        ([_Z[:, :200]], {"document_ids": _IDS[:, :200], "mask": _MASK[:, :200]}),
        ([_Z[0]], {"cu_seqlens": _CU_SEQLENS, "reduction": "none"}),
        ([_Z], {"sampling": SampledTokens(30)}),
        ([_Z], {"sampling": SampledTokens(30), "mask": _MASK}),
        ([_Z[0]], {"sampling": SampledTokens(30), "cu_seqlens": _CU_SEQLENS}),
        ([_Z], {"sampling": 1 / 16}),
        ([_Z, _Z + 1], {"sampling": SampledPairs(1 / 16), "return_stats": True}),
        ([_Z], {"sampling": SampledPairs(1 / 16, "none")}),
        ([_Z], {"sampling": SampledPairs(1 / 16, "full_rank"), "return_stats": True}),
        ([_Z], {"sampling": 0, "return_stats": True}),
        ([_Z], {"sampling": 0}),
        ([_Z], {"sampling": 1 / 16, "potential": "orthogonalization"}),
        ([_Z], {"sampling": 1 / 16, "mask": _MASK, "return_stats": True}),
        ([_Z], {"sampling": 1 / 16, "document_ids": _IDS}),
        ([_Z[0]], {"sampling": 1 / 16, "cu_seqlens": _CU_SEQLENS}),
        ([_Z.double()], {"sampling": SampledPairs(1 / 16), "return_stats": True}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else f"{len(value)} of {list(value[0].shape)}",
)
def test_every_option(layers: list[Tensor], options: dict[str, Any], impl: str) -> None:
    skip_unless_supported(impl, layers[0])
    if impl == "reference" and "sampling" in options and not isinstance(options["sampling"], SampledTokens):
        pytest.skip("the reference visits all pairs")
    options = {"generator": torch.Generator().manual_seed(7), **options}

    def call() -> list[Tensor]:
        options["generator"].manual_seed(7)
        return loss_and_gradients(layers, impl=impl, **options)

    assert_the_same_bits(call)


def test_what_is_beside_the_loss() -> None:
    z = torch.randn(2, 40, 16)
    mask = torch.rand(2, 40) > 0.3
    assert_the_same_bits(lambda: [mean_pairwise_cosine(z), mean_pairwise_cosine(z.half(), mask=mask)])
    assert_the_same_bits(lambda: [condensation_by_layer([z, z.double().float()], mask=mask)])
    assert_the_same_bits(lambda: [DispersionLoss("l2_repel", tau=3.0)(z), DispersionLoss()(z.bfloat16())])
    model = GPT2(GPT2Config(layers=2, width=16, heads=2, context=32, vocab=50))
    tokens = torch.randint(50, (2, 20))

    def outputs() -> list[Tensor]:
        output = model(tokens, tokens, return_hidden=True)
        assert output.loss is not None
        return [output.logits, output.loss, *output.hidden]

    assert_the_same_bits(outputs)
