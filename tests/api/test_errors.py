"""Bad input: an error that names the argument, what it got and what it wants."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from dispersion_kernels import (
    AngularSpread,
    DispersionLoss,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    SampledTokens,
    Uniformity,
    fused_dispersion_loss,
    supported,
)
from dispersion_kernels.backends import cpu, registry
from dispersion_kernels.segments import check_cu_seqlens

Z = torch.randn(2, 6, 8)
PACKED = torch.randn(10, 8)


def bounds(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize(
    ("z", "options", "error", "message"),
    [
        (torch.randn(8), {}, ValueError, r"z must be \[B, L, F\].*got shape \(8,\)"),
        (torch.randn(2, 2, 6, 8), {}, ValueError, r"got shape \(2, 2, 6, 8\); merge.*flatten"),
        (torch.randn(2, 6, 1), {}, ValueError, r"at least 2 features, got shape \(2, 6, 1\)"),
        (torch.ones(2, 6, 8, dtype=torch.int64), {}, TypeError, r"z must be float64.*got torch.int64"),
        (torch.ones(2, 6, 8, dtype=torch.complex64), {}, TypeError, r"got torch.complex64"),
        (Z.to_sparse(), {}, TypeError, "dense"),
        ([], {}, ValueError, "empty list"),
        (Z, {"potential": "angular"}, ValueError, r"unknown potential 'angular'; available: angular_spread"),
        (Z, {"potential": 3}, TypeError, "potential must be a name or a Potential, got int"),
        (
            Z,
            {"potential": "decorrelation", "tau": 1.0},
            ValueError,
            "tau=1.0 was given, but potential 'decorrelation' has no tau",
        ),
        (Z, {"potential": AngularSpread(), "tau": 1.0}, ValueError, "tau given beside a potential that is an instance"),
        (Z, {"reduction": "max"}, ValueError, "unknown reduction 'max'; available: mean, sum, none"),
        (Z, {"tau": 0.0}, ValueError, r"tau must be a finite number > 0 .*got 0.0"),
        (Z, {"tau": -1.0}, ValueError, "tau must be"),
        (Z, {"tau": math.nan}, ValueError, "tau must be"),
        (Z, {"tau": math.inf}, ValueError, "tau must be"),
        (
            Z,
            {"mask": torch.ones(2, 5, dtype=torch.bool)},
            ValueError,
            r"mask must have one entry a token, shape \(2, 6\), got \(2, 5\)",
        ),
        (Z, {"mask": torch.ones(2, 6)}, TypeError, "mask must be boolean.*got torch.float32"),
        (Z, {"document_ids": torch.ones(6, dtype=torch.int64)}, ValueError, "document_ids must have one entry a token"),
        (Z, {"document_ids": torch.ones(2, 6)}, TypeError, "document_ids must be integers, got torch.float32"),
        (Z, {"document_ids": torch.ones(2, 6, dtype=torch.uint64)}, TypeError, "int64 holds, got torch.uint64.*unique"),
        (
            Z,
            {"cu_seqlens": bounds(0, 6)},
            ValueError,
            r"z must be packed, \[T, F\], got shape \(2, 6, 8\); drop.*squeeze",
        ),
        (PACKED, {"cu_seqlens": bounds(1, 10)}, ValueError, r"cu_seqlens is \[1, 10\]; it must start at 0"),
        (
            PACKED,
            {"cu_seqlens": bounds(0, 9)},
            ValueError,
            r"cu_seqlens is \[0, 9\]; it must .* end at the number of tokens \(10\)",
        ),
        (
            PACKED,
            {"cu_seqlens": bounds(0, 7, 4, 10)},
            ValueError,
            r"cu_seqlens is \[0, 7, 4, 10\]; it must .*never decrease",
        ),
        (PACKED, {"cu_seqlens": bounds()}, ValueError, r"cu_seqlens must be \[S \+ 1\].*got shape \(0,\)"),
        (PACKED, {"cu_seqlens": bounds(0)}, ValueError, "cu_seqlens is"),
        (PACKED, {"cu_seqlens": bounds(0, 10)[None]}, ValueError, r"cu_seqlens must be \[S \+ 1\].*got shape \(1, 2\)"),
        (PACKED, {"cu_seqlens": torch.tensor([0.0, 10.0])}, TypeError, "cu_seqlens must be int32.*got torch.float32"),
        (
            PACKED,
            {"cu_seqlens": bounds(0, 10), "document_ids": torch.zeros(10).long()},
            ValueError,
            "both cu_seqlens and document_ids",
        ),
        (Z, {"max_seqlen": 6}, ValueError, "max_seqlen=6 was given without cu_seqlens"),
        (PACKED, {"cu_seqlens": bounds(0, 10), "max_seqlen": -1}, ValueError, "max_seqlen must be at least 0, got -1"),
        (PACKED, {"cu_seqlens": bounds(0, 10), "max_seqlen": True}, TypeError, "max_seqlen must be an integer, got T"),
        (PACKED, {"cu_seqlens": bounds(0, 10), "max_seqlen": 10.0}, TypeError, r"got 10.0; give int\(cu_seqlens.diff"),
        (
            PACKED,
            {"cu_seqlens": bounds(0, 7, 10), "max_seqlen": 6},
            ValueError,
            "max_seqlen is 6, and the longest sequence of cu_seqlens has 7 tokens",
        ),
    ],
)
def test_wrong_arguments(z: Any, options: dict[str, Any], error: type[Exception], message: str, impl: str) -> None:
    with pytest.raises(error, match=message):
        fused_dispersion_loss(z, impl=impl, **options)


def test_wrong_values_of_packed_bounds_with_subsampling() -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens is \[0, 7, 4, 10\]"):
        fused_dispersion_loss(PACKED, cu_seqlens=bounds(0, 7, 4, 10), sampling=SampledTokens(2))


def test_unknown_impl() -> None:
    for call in (
        lambda: fused_dispersion_loss(Z, impl="gpu"),
        lambda: supported("gpu", Z),
        lambda: DispersionLoss(impl="gpu"),
    ):
        with pytest.raises(
            ValueError, match="unknown impl 'gpu'; available: auto, triton, cuda, cpu, torch, reference"
        ):
            call()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AngularSpread(clamp=1.0), r"clamp must be in \[0, 1\), got 1.0"),
        (lambda: AngularSpread(clamp=-0.1), "clamp must be"),
        (lambda: Orthogonalization(clamp=math.nan), "clamp must be"),
        (lambda: AngularSpread(eps=-0.1), "eps must be"),
        (lambda: Orthogonalization(margin=1.5), "margin must be"),
        (lambda: L2Repel(norm_weight=-1.0), "norm_weight must be"),
        (lambda: L2Repel(tau=0.0), "tau must be"),
        (lambda: PerplexityEntropy(sigma2=0.0), "sigma2 must be"),
        (lambda: PerplexityEntropy(eps=0.0), "eps must be"),
        (lambda: Uniformity(t=-2.0), "t must be"),
        (lambda: DispersionLoss("angular_spread", tau=0.0), "tau must be"),
        (lambda: DispersionLoss.from_published("l2_repel", tau_l2=-1.0), "tau must be"),
        (lambda: DispersionLoss("spread"), "unknown potential 'spread'"),
        (lambda: DispersionLoss(reduction="max"), "unknown reduction"),
    ],
)
def test_wrong_parameters(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_dtensor_is_told_the_remedy() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        z = distribute_tensor(Z, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match=r"DTensor.*to_local\(\).*full_tensor\(\)"):
            fused_dispersion_loss(z)
        torch.testing.assert_close(fused_dispersion_loss(z.to_local()), fused_dispersion_loss(Z))
    finally:
        dist.destroy_process_group()


def test_a_nested_tensor_is_told_the_remedy() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"z.values\(\) and cu_seqlens=z.offsets\(\)"):
        fused_dispersion_loss(nested)
    loss = fused_dispersion_loss(nested.values(), cu_seqlens=nested.offsets().int(), reduction="none")
    torch.testing.assert_close(loss, torch.stack([fused_dispersion_loss(part) for part in nested.unbind()]))


def test_an_explicit_request_never_falls_back() -> None:
    z = Z.double()
    assert not supported("cpu", z)
    assert "float64" in str(supported("cpu", z).reason)
    with pytest.raises(RuntimeError, match=r'impl="cpu" cannot run here: .*float64.*impl="auto"'):
        fused_dispersion_loss(z, impl="cpu")
    assert not supported("cpu", Z, "perplexity_entropy")
    assert supported("torch", z)
    assert supported("reference", z)
    assert supported("auto", z)
    assert not supported("cpu", Z.to("meta"))


def test_without_the_native_library_auto_is_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fused_dispersion_loss(Z, impl="torch")
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "no C++ compiler was found at install")
    registry._warn_that_there_is_no_kernel.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch.*no C\\+\\+ compiler was found at install"):
        assert torch.equal(fused_dispersion_loss(Z), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once
        assert torch.equal(fused_dispersion_loss(Z), expected)
        assert registry.choose("auto", Z, AngularSpread()) == "torch"
    assert supported("cpu", Z).reason == "no C++ compiler was found at install"
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler was found at install"):
        fused_dispersion_loss(Z, impl="cpu")


@dataclass(frozen=True)
class Unfinished(Potential):
    pass


@dataclass(frozen=True)
class OfTheDistance(Potential):
    row_transform: ClassVar[Literal["normalize", "standardize", "none"]] = "none"


def test_a_potential_of_the_users_that_cannot_work() -> None:
    with pytest.raises(NotImplementedError, match=r"Unfinished must define value\(c\) and slope\(c\)"):
        fused_dispersion_loss(Z, Unfinished())
    with pytest.raises(ValueError, match="OfTheDistance has row_transform='none'"):
        fused_dispersion_loss(Z, OfTheDistance())


@dataclass(frozen=True)
class Returning(Potential):
    """Potential whose value and slope are the same object for every c."""

    result: Any
    of: str = "value"

    def value(self, c: Tensor) -> Any:
        return self.result if self.of == "value" else torch.exp(c)

    def slope(self, c: Tensor) -> Any:
        return self.result if self.of == "slope" else torch.exp(c)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("sampling", [None, 0.1])
def test_a_potential_of_the_users_that_returns_no_tensor(impl: str, sampling: float | None) -> None:
    if impl == "reference" and sampling is not None:
        pytest.skip("materialises all pairs")
    z = torch.randn(1, 300, 8, requires_grad=True)
    for of in ("value", "slope"):
        for result, error, found in (
            (1.0, TypeError, "got 1.0; for a constant return torch.full_like"),
            (None, TypeError, "got None"),
            (torch.ones(()), ValueError, r"got \(\)"),
        ):
            with pytest.raises(error, match=rf"Returning.{of}\(c\) must return a tensor of the shape of c.*{found}"):
                fused_dispersion_loss(z, Returning(result, of), impl=impl, sampling=sampling).backward()


def test_one_loss_per_sequence_of_layers_that_differ_in_batch() -> None:
    message = r"the layers differ in batch: z\[0\] has shape \(2, 6, 8\), z\[1\] \(1, 6, 8\); give layers of one batch"
    with pytest.raises(ValueError, match=message):
        fused_dispersion_loss([Z, Z[:1]], reduction="none")
    with pytest.raises(ValueError, match=r"z\[1\] \(6, 8\)"):
        fused_dispersion_loss([Z, Z[0]], reduction="none", impl="reference")
    mean = fused_dispersion_loss([Z, Z[:1]])
    torch.testing.assert_close(mean, (fused_dispersion_loss(Z) + fused_dispersion_loss(Z[:1])) / 2)
    one = fused_dispersion_loss([Z[0], Z[0, :4]], reduction="none")  # lengths may differ
    torch.testing.assert_close(one, (fused_dispersion_loss(Z[0]) + fused_dispersion_loss(Z[0, :4])) / 2)


def test_bounds_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch raises for a message of 255 characters."""
    said = []
    monkeypatch.setattr(torch, "_assert_async", lambda valid, message: said.append(message))
    for largest in (None, 2**31 - 1):
        check_cu_seqlens(bounds(0, 6).to("meta"), 2**31 - 1, largest)
    assert [len(message) < 255 for message in said] == [True, True]
    assert "longer than max_seqlen, 2147483647" in said[1]


def test_mask_on_another_device() -> None:
    with pytest.raises(ValueError, match="mask is on meta; it must be on cpu"):
        fused_dispersion_loss(Z, mask=torch.ones(2, 6, dtype=torch.bool, device="meta"))


def test_a_potential_that_this_process_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"'elsewhere.Mine' is not known in this process; an exported program"):
        torch.ops.dispersion_kernels.dispersion_loss(
            [Z], *[None] * 5, "elsewhere.Mine", [], "mean", "torch", 1.0, "", [False], False, False, None
        )
