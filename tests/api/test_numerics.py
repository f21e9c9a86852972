"""Norms whose squares leave fp32's range, tokens that are equal, and parameters at their limits, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import (
    GPU,
    GPU_IMPLS,
    IMPLS,
    Answer,
    Edge,
    edges,
    evaluate,
    oracle,
    relative_errors,
    skip_unless_supported,
)

from dispersion_kernels import (
    AngularSpread,
    Decorrelation,
    DispersiveL2,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    Uniformity,
    condensation,
    fused_dispersion_loss,
    loss,
)
from dispersion_kernels.numerics import dtype_under_autocast

EVERY = ["reference", *IMPLS]
GPU_KERNELS = ("triton", "cuda")


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("edge", edges().values(), ids=edges().keys())
def test_edges(edge: Edge, impl: str) -> None:
    edge = edge._replace(z=edge.z.to(torch.get_default_device()))
    skip_unless_supported(impl, edge.z, edge.potential)
    edge.check(evaluate(edge.z, edge.potential, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("grouped", [False, True], ids=["", "documents"])
@pytest.mark.parametrize(
    ("potential", "scale"),
    [
        (Uniformity(t=10.0), 1.0),
        (Uniformity(t=25.0), 0.1),
        (L2Repel(tau=4.0, norm_weight=0.0), 1.0),
        (DispersiveL2(tau=0.05, include_diagonal=False), 1.0),
    ],
    ids=str,
)
def test_many_equal_tokens(potential: Potential, scale: float, grouped: bool, impl: str) -> None:
    """Twenty equal tokens, whose psi of 1 is e^20 times that of the others. The naive fp32 gradient is off by 10% and
    more."""
    z = scale * torch.randn(2, 600, 64)
    z[0, 100:600:25] = z[0, 3]
    ids = torch.arange(600).remainder(2).expand(2, 600).contiguous() if grouped else None
    exact = oracle(z, potential, document_ids=ids)
    loss, gradient = relative_errors(evaluate(z, potential, impl=impl, document_ids=ids), exact)
    print(f"{loss:.1e} {gradient:.1e}")
    assert loss <= 2e-6
    assert gradient <= 5e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", [Uniformity(t=1.0), L2Repel(norm_weight=0.0), DispersiveL2()], ids=str)
def test_opposite_tokens_are_not_equal(potential: Potential, impl: str) -> None:
    """Two centred tokens of a distance are always opposite."""
    for features in (2, 8, 64):
        z = torch.randn(3, 2, features)
        exact = oracle(z, potential)
        assert relative_errors(evaluate(z, potential, impl=impl), exact)[1] <= 2e-5
        z = torch.cat([z, -z], 1)
        assert relative_errors(evaluate(z, potential, impl=impl), oracle(z, potential))[1] <= 2e-5


NORMALIZED = [AngularSpread(eps=0.0), AngularSpread(), Orthogonalization(eps=0.0), Decorrelation(), Uniformity()]


@pytest.mark.parametrize("impl", EVERY)
@pytest.mark.parametrize("scale", [1e-25, 1e20])
@pytest.mark.parametrize("potential", NORMALIZED, ids=str)
def test_norms_beyond_the_range_of_their_squares(potential: Potential, scale: float, impl: str) -> None:
    check_norms(potential, scale, impl)


def check_norms(potential: Potential, scale: float, impl: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if impl == "reference" and dtype != torch.float32:
            continue  # it rounds every operation
        z = ((torch.randn(2, 30, 16) + 0.5) * scale).to(dtype)
        skip_unless_supported(impl, z, potential)
        exact, answer = oracle(z, potential), evaluate(z, potential, impl=impl)
        # GPU kernels multiply the tokens themselves, whose products leave fp32's range; tiny ones beside an eps are 0.
        if impl in GPU_KERNELS and not 1e-15 < scale < 1e18 and (scale > 1 or potential.norm_eps == 0):
            assert answer.loss.isnan().all()
            assert answer.grad.isnan().all()
            continue
        answer, exact = (Answer(each.loss, each.grad.double() * scale) for each in (answer, exact))
        loss, grad = relative_errors(answer, exact)
        assert loss < 2e-6
        # GPU kernels round slopes to 16 bits, too.
        assert grad < (1e-5 if dtype == torch.float32 else 2**-7 if impl in GPU_KERNELS else 2**-8)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e20])
def test_cosine_of_norms_beyond_the_range_of_their_squares(scale: float) -> None:
    z = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]]) * scale
    cosine = condensation.mean_pairwise_cosine(z)
    torch.testing.assert_close(cosine, torch.tensor(0.96 / 3))
    torch.testing.assert_close(condensation.mean_pairwise_cosine(torch.ones(2, 9, 4) * scale), torch.tensor(1.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_other_tokens_do_not_change_a_norm(impl: str) -> None:
    """The same bits, whether some other sequence has norms that need to be scaled or not."""
    z = torch.randn(2, 20, 16)
    skip_unless_supported(impl, z, "uniformity")
    alone = evaluate(z, "uniformity", impl=impl)
    z[1] *= 1e-25
    assert torch.equal(evaluate(z, "uniformity", impl=impl).grad[0], alone.grad[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", [DispersiveL2(), L2Repel(norm_weight=0.0), PerplexityEntropy()], ids=str)
def test_a_squared_distance_beyond_fp32_is_nan(potential: Potential, impl: str) -> None:
    z = torch.randn(3, 20, 16)
    skip_unless_supported(impl, z, potential)
    clean = fused_dispersion_loss(z, potential, reduction="none", impl=impl)
    z[1, 3] *= 1e19
    loss = fused_dispersion_loss(z, potential, reduction="none", impl=impl)
    assert loss[1].isnan()
    assert torch.equal(loss[::2], clean[::2])


@pytest.mark.parametrize("impl", EVERY)
def test_a_norm_beyond_fp32_is_nan(impl: str) -> None:
    z = torch.randn(1, 20, 16)
    z[0, 3] = 3e38
    skip_unless_supported(impl, z, "uniformity")
    assert fused_dispersion_loss(z, "uniformity", impl=impl).isnan()


@pytest.mark.parametrize("impl", EVERY)
def test_the_diagonal_is_exact_however_far_tokens_are_apart(impl: str) -> None:
    z = 3e4 * torch.randn(1, 50, 96)
    skip_unless_supported(impl, z, "dispersive_l2")
    loss = fused_dispersion_loss(z, "dispersive_l2", impl=impl)
    torch.testing.assert_close(loss.item(), -math.log(50), rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_token_with_any_strides(impl: str) -> None:
    for z in (torch.randn(17, 3, 1).permute(1, 2, 0), torch.randn(17, 1, 3).permute(2, 1, 0)):
        skip_unless_supported(impl, z)
        answer = evaluate(z, "angular_spread", impl=impl)
        assert answer.loss.tolist() == [0.0] * 3
        assert not answer.grad.any()


@pytest.mark.parametrize("impl", GPU_IMPLS or ["triton"])
class TestKernels:
    """GPU kernels on a GPU, or the Triton kernels in their interpreter."""

    pytestmark = [pytest.mark.gpu] if GPU else []

    @pytest.mark.parametrize("edge", edges().values(), ids=edges().keys())
    def test_edges_of_workspace_and_packed(self, edge: Edge, impl: str) -> None:
        few = edge.z.to(torch.get_default_device())
        if not isinstance(edge.potential, PerplexityEntropy):  # of which these are the same kernels
            bounds = torch.tensor([0, few.shape[1]], dtype=torch.int32)
            packed = evaluate(few[0], edge.potential, impl=impl, cu_seqlens=bounds)
            edge._replace(z=few).check(Answer(packed.loss, packed.grad[None]))
        many = torch.nn.functional.pad(few, (0, 80))
        edge._replace(z=many).check(evaluate(many, edge.potential, impl=impl))

    @pytest.mark.parametrize("scale", [1e-25, 1e-14, 1e17, 1e20])
    @pytest.mark.parametrize("potential", NORMALIZED, ids=str)
    def test_norms_far_from_one(self, potential: Potential, scale: float, impl: str) -> None:
        check_norms(potential, scale, impl)

    @pytest.mark.parametrize(
        "potential", [DispersiveL2(), L2Repel(norm_weight=0.0), PerplexityEntropy(sigma2=1e-30)], ids=str
    )
    def test_a_squared_distance_beyond_fp32_is_nan(self, potential: Potential, impl: str) -> None:
        test_a_squared_distance_beyond_fp32_is_nan(potential, impl)

    def test_the_diagonal_is_exact_however_far_tokens_are_apart(self, impl: str) -> None:
        test_the_diagonal_is_exact_however_far_tokens_are_apart(impl)

    @pytest.mark.parametrize("features", [16, 160])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_equal_tokens(self, dtype: torch.dtype, features: int, impl: str) -> None:
        """Several, beside whose psi that of the other pairs is 1e-8: what these have of the gradient is all of it."""
        z = torch.randn(1, 40, features)
        z[0, 4:8] = z[0, :1]
        z = z.to(dtype)
        for potential in (Uniformity(t=10.0), L2Repel(tau=features / 8, norm_weight=0.0, include_diagonal=False)):
            loss, grad = relative_errors(evaluate(z, potential, impl=impl), oracle(z, potential))
            assert loss < 2e-6
            assert grad < (1e-5 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize(
    ("dtype", "device_type", "autocast", "expected"),
    [
        (torch.float32, "cuda", None, torch.float32),
        (torch.float32, "cuda", torch.bfloat16, torch.bfloat16),
        (torch.float32, "cuda", torch.float16, torch.float16),
        (torch.bfloat16, "cuda", torch.float16, torch.float16),
        (torch.float64, "cuda", torch.bfloat16, torch.float64),
        (torch.float32, "cpu", torch.bfloat16, torch.float32),
        (torch.float32, "meta", torch.bfloat16, torch.float32),
    ],
)
def test_dtype_under_autocast(
    dtype: torch.dtype, device_type: str, autocast: torch.dtype | None, expected: torch.dtype
) -> None:
    assert dtype_under_autocast(dtype, device_type, autocast) == expected


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_hidden_states_are_rounded_as_under_autocast(autocast: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of rounded hidden states, and a gradient in the dtype of those given."""
    monkeypatch.setattr(loss, "loss_dtype", lambda z: dtype_under_autocast(z.dtype, "cuda", autocast))
    z = torch.randn(2, 40, 16, requires_grad=True)
    value = fused_dispersion_loss([z, z], impl="torch")
    (grad,) = torch.autograd.grad(value, z)
    monkeypatch.undo()
    rounded = z.detach().to(autocast).requires_grad_()
    expected = fused_dispersion_loss([rounded, rounded], impl="torch")
    assert torch.equal(value, expected)
    assert grad.dtype == torch.float32
    (expected_grad,) = torch.autograd.grad(expected, rounded)
    torch.testing.assert_close(grad, expected_grad.float(), rtol=0, atol=0)
