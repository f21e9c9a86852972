"""Potentials of one's own: what runs is the object that was given, whatever its class is called and inherits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import evaluate, oracle
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dispersion_kernels import (
    AngularSpread,
    DispersionLoss,
    L2Repel,
    Orthogonalization,
    Potential,
    Uniformity,
    fused_dispersion_loss,
    supported,
)
from dispersion_kernels.potentials import carried, carry

Z = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)) + 0.8


@dataclass(frozen=True)
class Line(Potential):
    """factor (c + shift)."""

    reduction = "mean"
    factor: float = 1  # an int literal, as users write them
    shift: float = 0.0
    label: str = "line"

    def value(self, c: Tensor) -> Tensor:
        return self.factor * (c + self.shift)

    def slope(self, c: Tensor) -> Tensor:
        return torch.full_like(c, self.factor)


class Power(Potential):
    """c^k, of a class that is no dataclass."""

    reduction = "mean"

    def __init__(self, k: int = 2) -> None:
        self.k = k

    def value(self, c: Tensor) -> Tensor:
        return c**self.k

    def slope(self, c: Tensor) -> Tensor:
        return self.k * c ** (self.k - 1)


class Slotted(Power):
    __slots__ = ("hidden",)

    def __init__(self, k: int = 2, factor: float = 1.0) -> None:
        super().__init__(k)
        self.hidden = factor

    def value(self, c: Tensor) -> Tensor:
        return self.hidden * super().value(c)

    def slope(self, c: Tensor) -> Tensor:
        return self.hidden * super().slope(c)


class Weighted(Power):
    """weights[0] c^k, with an attribute that no key holds."""

    def __init__(self, k: int = 2, weight: float = 1.0) -> None:
        super().__init__(k)
        self.weights = torch.tensor([weight])

    def value(self, c: Tensor) -> Tensor:
        return self.weights.item() * super().value(c)

    def slope(self, c: Tensor) -> Tensor:
        return self.weights.item() * super().slope(c)


@dataclass(frozen=True)
class Doubled(Orthogonalization):
    def value(self, c: Tensor) -> Tensor:
        return 2 * super().value(c)

    def slope(self, c: Tensor) -> Tensor:
        return 2 * super().slope(c)


@dataclass(frozen=True)
class Scaled(AngularSpread):
    """A subclass with one more field, and a property in place of what would be overridden."""

    factor: float = 1.0
    cached: float = field(default=0.0, init=False, repr=False)

    def value(self, c: Tensor) -> Tensor:
        return super().value(c) ** self.factor

    def slope(self, c: Tensor) -> Tensor:
        return self.factor * super().value(c) ** (self.factor - 1) * super().slope(c)


class Renamed(Uniformity):
    """A subclass that changes nothing."""


def closure(k: float) -> type[Potential]:
    class Local(Potential):
        reduction = "mean"

        def value(self, c: Tensor) -> Tensor:
            return k * c

        def slope(self, c: Tensor) -> Tensor:
            return torch.full_like(c, k)

    return Local


def mean_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The loss of each sequence, by hand, of ``function`` of the cosines of all pairs."""

    def loss(z: Tensor) -> Tensor:
        x = z / z.norm(dim=2, keepdim=True)
        c = x @ x.mT
        length = z.shape[1]
        off = ~torch.eye(length, dtype=torch.bool)
        return function(c)[:, off].view(z.shape[0], -1).mean(1)

    return loss


NOTEBOOK = "class Cell(Potential):\n    reduction = 'mean'\n    value = lambda self, c: {0} * c\n"
NOTEBOOK += "    slope = lambda self, c: torch.full_like(c, {0})\n"


def cell(k: float) -> Potential:
    namespace: dict[str, Any] = {"Potential": Potential, "torch": torch, "__name__": "__main__"}
    exec(NOTEBOOK.format(k), namespace)
    potential: Potential = namespace["Cell"]()
    return potential


CASES: dict[str, tuple[Callable[[], Potential], Callable[[Tensor], Tensor]]] = {
    "a float for an int default": (lambda: Line(0.9), mean_of(lambda c: 0.9 * c)),
    "two floats": (lambda: Line(0.9, 0.2, "other"), mean_of(lambda c: 0.9 * (c + 0.2))),
    "no dataclass": (lambda: Power(3), mean_of(lambda c: c**3)),
    "no dataclass, its default": (Power, mean_of(lambda c: c**2)),
    "slots": (lambda: Slotted(3, 0.5), mean_of(lambda c: 0.5 * c**3)),
    "a tensor as attribute": (lambda: Weighted(3, 0.5), mean_of(lambda c: 0.5 * c**3)),
    "a closure": (lambda: closure(3.0)(), mean_of(lambda c: 3 * c)),
    "another of its name": (lambda: closure(5.0)(), mean_of(lambda c: 5 * c)),
    "a notebook's cell": (lambda: cell(2.0), mean_of(lambda c: 2 * c)),
    "that cell once more": (lambda: cell(4.0), mean_of(lambda c: 4 * c)),
    "of a built-in": (Doubled, lambda z: 2 * built_in_loss(z, Orthogonalization())),
    "of a built-in, with a field": (
        lambda: Scaled(tau=0.5, factor=2.0, eps=0.0),
        lambda z: built_in_loss(z, AngularSpread(tau=0.25, eps=0.0)),
    ),
    "of a built-in, nothing changed": (Renamed, lambda z: built_in_loss(z, Uniformity())),
}


def built_in_loss(z: Tensor, potential: Potential) -> Tensor:
    return fused_dispersion_loss(z, potential, reduction="none", impl="reference")


def assert_is(loss: Tensor, z: Tensor, expected: Callable[[Tensor], Tensor]) -> None:
    """``loss`` and its gradient against the one by hand, in float64."""
    exact = expected(z)
    torch.testing.assert_close(loss, exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), z)[0], torch.autograd.grad(exact.sum(), z)[0], rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize(("make", "expected"), CASES.values(), ids=CASES)
def test_the_object_that_is_given_runs(make: Any, expected: Any, impl: str) -> None:
    z = Z.double().requires_grad_()
    made = [make() for make, _ in CASES.values()]  # of other classes by the same name, defined later
    potential = make()
    modes: list[dict[str, Any]] = [{}] if impl == "reference" else [{}, {"recompute": True}]
    for mode in modes:
        assert_is(fused_dispersion_loss(z, potential, reduction="none", impl=impl, **mode), z, expected)
    assert_is(DispersionLoss(potential, reduction="none", impl=impl)(z), z, expected)
    with torch.no_grad():
        torch.testing.assert_close(DispersionLoss(potential, reduction="none", impl=impl)(z), expected(z))
    del made


COMPILED = ("two floats", "slots", "a tensor as attribute", "that cell once more", "of a built-in, with a field")


@pytest.mark.parametrize(("make", "expected"), [CASES[name] for name in COMPILED], ids=COMPILED)
def test_compiled(make: Any, expected: Any) -> None:
    """A graph holds no objects; an object equal to the last needs no other graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def loss(z: Tensor, potential: Potential, recompute: bool) -> Tensor:
        return fused_dispersion_loss(z, potential, reduction="none", recompute=recompute)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    z = Z.double().requires_grad_()
    potential = make()
    for given in (potential, copy.copy(potential)):
        assert_is(compiled(z, given, True), z, expected)
    assert counter.frame_count == 1 + isinstance(potential, Weighted | Slotted)


def test_compiled_with_other_numbers() -> None:
    z = Z.double()
    for potentials in ((Line(0.9), Line(0.8), Line(1), Line(True)), (Power(2), Power(3))):
        torch._dynamo.reset()
        compiled = torch.compile(lambda z, p: fused_dispersion_loss(z, p), fullgraph=True, backend="aot_eager")
        for potential in potentials:
            torch.testing.assert_close(compiled(z, potential), fused_dispersion_loss(z, potential, impl="reference"))


def test_made_inside_of_a_compiled_region() -> None:
    torch._dynamo.reset()
    for make in (lambda k: Line(k), lambda k: Power(k)):
        compiled = torch.compile(lambda z, k: fused_dispersion_loss(z, make(k)), fullgraph=True, backend="aot_eager")  # noqa: B023
        for k in (1.5, 2.5, 3.0):
            z = Z.double().abs()
            torch.testing.assert_close(compiled(z, k), fused_dispersion_loss(z, make(k), impl="reference"))
    compiled = torch.compile(lambda z: fused_dispersion_loss(z, Weighted(3)), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"Weighted' was made inside of a function that torch.compile compiles"):
        compiled(Z)


def test_a_subclass_leaves_the_built_in_alone() -> None:
    exact = oracle(Z, "orthogonalization")
    assert Doubled().name() != "orthogonalization"
    for impl in ("auto", "torch", "reference"):
        twice = evaluate(Z, Doubled(), impl=impl)
        answer = evaluate(Z, "orthogonalization", impl=impl)
        torch.testing.assert_close(answer.loss.double(), exact.loss)
        torch.testing.assert_close(twice.grad.double(), 2 * exact.grad)
    assert supported("cpu", Z, "orthogonalization")
    for subclass in (Doubled(), Renamed(), Scaled()):
        assert "the CPU kernel has no potential" in str(supported("cpu", Z, subclass).reason)
        with pytest.raises(RuntimeError, match='impl="cpu" cannot run here'):
            fused_dispersion_loss(Z, subclass, impl="cpu")
    with pytest.raises(ValueError, match="unknown potential"):
        fused_dispersion_loss(Z, Line().name())


def test_a_subclass_of_a_distance_is_refused() -> None:
    """Its value is no function of the cosine."""

    class Nearer(L2Repel):
        def distance_scale(self, features: int) -> float:
            return 2 * self.tau

    for impl in ("auto", "reference"):
        with pytest.raises(ValueError, match="Nearer has row_transform='none'"):
            fused_dispersion_loss(Z, Nearer(), impl=impl)


def test_sampled_pairs() -> None:
    """All pairs of a line in c are its model: exact at full rank."""
    z = (torch.randn(1, 600, 8, dtype=torch.float64) + 0.8).requires_grad_()
    options: dict[str, Any] = {"sampling": 1 / 16}
    compiled = torch.compile(fused_dispersion_loss, fullgraph=True, backend="aot_eager")
    for potential, factor in ((Line(0.9), 0.9), (closure(3.0)(), 3.0), (cell(2.0), 2.0), (Power(1), 1.0)):
        for call, recompute in ((fused_dispersion_loss, False), (fused_dispersion_loss, True), (compiled, True)):
            if call is compiled and factor != 2:
                continue
            options["recompute"] = recompute
            assert_is(call(z, potential, reduction="none", **options), z, mean_of(lambda c, factor=factor: factor * c))  # type: ignore[misc]


@pytest.mark.parametrize(
    "potential", [AngularSpread(0.5), L2Repel(include_diagonal=False), Line(0.9), Power(-3), Slotted()]
)
def test_what_an_operator_carries(potential: Potential) -> None:
    key, numbers = carry(potential)
    back = carried(key, numbers)
    assert type(back) is type(potential)
    assert repr(vars(back)) == repr(vars(potential))
    assert carry(copy.copy(potential))[0] == key or isinstance(potential, Slotted)
    assert (key in ("angular_spread", "l2_repel")) == (type(potential) in (AngularSpread, L2Repel))


@pytest.mark.parametrize(("attribute", "value"), [("row_transform", "normalise"), ("reduction", "sum")])
def test_attributes_that_are_misspelt(attribute: str, value: str) -> None:
    class Misspelt(Potential):
        def value(self, c: Tensor) -> Tensor:
            return c * c

        def slope(self, c: Tensor) -> Tensor:
            return 2 * c

    setattr(Misspelt, attribute, value)
    with pytest.raises(ValueError, match=f"{attribute}='{value}'; it must be"):
        fused_dispersion_loss(Z, Misspelt())
