"""tau as a tensor: data for a compiler, and a derivative, against the naive loss in float64 through autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dispersion_kernels import (
    AngularSpread,
    DispersionLoss,
    DispersiveL2,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    SampledPairs,
    Uniformity,
    fused_dispersion_loss,
)

POTENTIALS: dict[str, tuple[Any, float]] = {
    "angular_spread": (AngularSpread, 0.7),
    "angular_spread, small": (AngularSpread, 0.02),
    "l2_repel": (L2Repel, 20.0),
    "l2_repel, diagonal out": (lambda tau: L2Repel(tau, include_diagonal=False), 3.0),
    "dispersive_l2": (DispersiveL2, 1.3),
    "uniformity": (Uniformity, 2.0),
    "uniformity, large": (Uniformity, 60.0),
    "perplexity_entropy": (PerplexityEntropy, 30.0),
}
EVERY = pytest.mark.parametrize(("make", "value"), POTENTIALS.values(), ids=POTENTIALS)
Z = torch.randn(2, 40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.8


def by_hand(z: Tensor, tau: Tensor) -> Tensor:
    """angular_spread, of each sequence."""
    x = z / (z.norm(dim=2, keepdim=True) + 0.01)
    off = ~torch.eye(z.shape[1], dtype=torch.bool)
    angle = torch.arccos((x @ x.mT).clamp(-0.75, 0.75)[:, off]) / torch.pi
    return torch.exp(-angle / tau).mean(1).log() + 0.01


def gradients(z: Tensor, make: Any, value: float, upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    z, tau = z.detach().clone().requires_grad_(), torch.tensor(value, dtype=torch.float64, requires_grad=True)
    loss = fused_dispersion_loss(z, make(tau), **options)
    return [loss.detach(), *torch.autograd.grad(loss, (z, tau), upstream)]


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_by_hand(impl: str) -> None:
    for value in (0.2, 1.0):
        tau = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(by_hand(Z, tau).mean(), tau)
        found = fused_dispersion_loss(Z, tau=tau, impl=impl)  # the tokens need no gradient
        torch.testing.assert_close(torch.autograd.grad(found, tau)[0], expected, rtol=1e-10, atol=0.0)


@EVERY
def test_as_the_reference(make: Any, value: float) -> None:
    mask = torch.rand(2, 40) > 0.3
    z = Z.clone()
    z[0, ~mask[0]] = torch.nan  # what is masked is not read
    packed = torch.tensor([0, 7, 8, 40], dtype=torch.int32)
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (Z, {}),
        (Z, {"reduction": "sum"}),
        (Z, {"reduction": "none", "upstream": torch.tensor([0.3, -2.0], dtype=torch.float64)}),
        (z, {"mask": mask}),
        (Z, {"document_ids": torch.randint(-1, 3, (2, 40))}),
        (Z[0], {"cu_seqlens": packed}),
    ]
    for tokens, options in cases:
        exact = gradients(tokens.nan_to_num(), make, value, impl="reference", **options)
        for more in ({}, {"recompute": True}):
            found = gradients(tokens, make, value, **options, **more)
            torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-12)


@EVERY
def test_single_precision(make: Any, value: float) -> None:
    exact = gradients(Z, make, value, impl="reference")[2]
    naive = gradients(Z.float(), make, value, impl="reference")[2]
    for impl in ("auto", "torch"):
        found = gradients(Z.float(), make, value, impl=impl)[2]
        assert (found - exact).abs() <= 4 * (naive - exact).abs() + 1e-5 * exact.abs()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradcheck(impl: str) -> None:
    z = (Z[:, :5] / 2).clone().requires_grad_()
    for make, value in (POTENTIALS["dispersive_l2"], POTENTIALS["uniformity"], POTENTIALS["perplexity_entropy"]):
        tau = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda z, tau, make=make: fused_dispersion_loss(z, make(tau), impl=impl), (z, tau)
        )


def test_layers_and_one_number() -> None:
    def loss(tau: Any, impl: str) -> Tensor:
        return fused_dispersion_loss([Z, 2 * Z + 1], "angular_spread", tau=tau, impl=impl)

    tau = torch.tensor([0.5], requires_grad=True)
    found, exact = (torch.autograd.grad(loss(tau, impl), tau)[0] for impl in ("torch", "reference"))
    assert found.shape == (1,)
    torch.testing.assert_close(found, exact)
    for impl in ("auto", "torch"):
        assert torch.equal(loss(tau.detach(), impl), loss(0.5, impl))
    single = Z.float()
    assert torch.equal(
        fused_dispersion_loss(single, tau=torch.tensor(0.5), impl="auto"), fused_dispersion_loss(single, tau=0.5)
    )


def test_a_potential_without_temperature_takes_none() -> None:
    module = DispersionLoss("decorrelation")
    module.tau = torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"tau of a DispersionLoss was set, .*'decorrelation' has no tau"):
        module(torch.randn(1, 8, 4))


def test_compiled_once_for_all_values() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(z: Tensor, tau: Tensor) -> Tensor:
        return fused_dispersion_loss(z, tau=tau)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    z, graphs = Z.clone().requires_grad_(), 0
    for step in range(10):
        tau = torch.tensor(0.3 + 0.1 * step, dtype=torch.float64, requires_grad=True)
        found, exact = (torch.autograd.grad(call(z, tau), (z, tau)) for call in (compiled, loss))
        torch.testing.assert_close(found, exact)
        graphs = counter.frame_count if step == 0 else graphs
    assert counter.frame_count == graphs


def test_transformed_and_exported() -> None:
    tau = torch.tensor(0.5, dtype=torch.float64)

    def loss(z: Tensor, tau: Tensor, impl: str = "torch") -> Tensor:
        return fused_dispersion_loss(z, tau=tau, impl=impl)

    def naive(z: Tensor, tau: Tensor) -> Tensor:
        return loss(z, tau, "reference")

    both = (0, 1)
    torch.testing.assert_close(torch.func.grad(loss, both)(Z, tau), torch.func.grad(naive, both)(Z, tau))
    taus = torch.tensor([0.3, 0.9], dtype=torch.float64)
    slopes = torch.func.vmap(torch.func.grad(loss, 1), in_dims=(None, 0))(Z, taus)
    torch.testing.assert_close(slopes, torch.stack([torch.func.grad(naive, 1)(Z, each) for each in taus]))

    class Module(nn.Module):
        def forward(self, z: Tensor, tau: Tensor) -> Tensor:
            return loss(z, tau)

    program = torch.export.export(Module(), (Z, tau)).module()
    tau = taus[1].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(program(Z, tau), tau), torch.autograd.grad(naive(Z, tau), tau))


def _published(variant: str, tau: Tensor, **options: Any) -> DispersionLoss:
    return DispersionLoss.from_published(variant, tau_l2=tau, tau_cos=tau, **options)


def _new(potential: str, tau: Tensor, **options: Any) -> DispersionLoss:
    return DispersionLoss(potential, tau=tau, **options)


@pytest.mark.parametrize(
    ("make", "potential"),
    [
        (_published, "angular_spread"),
        (_published, "l2_repel"),
        (_published, "perplexity_entropy"),
        (_new, "angular_spread"),
        (_new, "dispersive_l2"),
    ],
)
def test_module(make: Callable[..., DispersionLoss], potential: str) -> None:
    tau = nn.Parameter(torch.tensor(0.5))
    module = make(potential, tau)
    assert [name for name, _ in module.named_parameters()] == ["tau"]
    module(Z).backward()
    (expected,) = torch.autograd.grad(make(potential, tau, impl="reference")(Z), tau)
    torch.testing.assert_close(tau.grad, expected)
    other = make(potential, torch.tensor(3.0))
    assert not list(other.parameters())
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(Z), module(Z))
    assert torch.equal(other.double()(Z), module(Z))
    assert not DispersionLoss(potential).state_dict()


def test_errors() -> None:
    tau = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=r"tau must be a number with SampledPairs, got a tensor; give its float"):
        fused_dispersion_loss(torch.randn(1, 600, 8), tau=tau, sampling=SampledPairs(0.1))
    makes: list[Any] = [lambda: AngularSpread(clamp=tau), lambda: Orthogonalization(margin=tau)]
    for make in [*makes, lambda: L2Repel(norm_weight=tau), lambda: L2Repel(eps=tau)]:
        with pytest.raises(TypeError, match="must be a number, got a tensor that requires a gradient"):
            make()
    for bad in (torch.ones(2), torch.tensor(1)):
        with pytest.raises(TypeError, match="tau must be a number, or a floating tensor of one"):
            fused_dispersion_loss(Z, tau=bad)
    with pytest.raises(ValueError, match="tau must be a finite number > 0"):
        fused_dispersion_loss(Z, tau=torch.tensor(-1.0))


class Learned(Potential):
    """w c^2."""

    reduction = "mean"

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def value(self, c: Tensor) -> Tensor:
        return self.weight * c.square()

    def slope(self, c: Tensor) -> Tensor:
        return 2 * self.weight * c


def test_a_parameter_of_ones_own_potential() -> None:
    weight = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    loss = fused_dispersion_loss(Z, Learned(weight), impl="reference")
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], loss.detach() / 3)
    with pytest.raises(TypeError, match=r"Learned has a tensor that requires a gradient.*impl=\"reference\""):
        fused_dispersion_loss(Z, Learned(weight))
    with torch.no_grad():
        torch.testing.assert_close(fused_dispersion_loss(Z, Learned(weight)), loss)
    torch.testing.assert_close(fused_dispersion_loss(Z, Learned(weight.detach())), loss.detach())
