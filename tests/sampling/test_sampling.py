"""The loss from a fraction of the pairs: unbiased, as accurate as it says, and the same on every backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from conftest import IMPLS, Answer, evaluate, oracle, read_nothing, skip_unless_supported, slow_but_first
from torch import Tensor

from dispersion_kernels import (
    AngularSpread,
    Decorrelation,
    DispersionLoss,
    Orthogonalization,
    Potential,
    SampledPairs,
    SampledTokens,
    Uniformity,
    fused_dispersion_loss,
)
from dispersion_kernels.backends.interface import Losses
from dispersion_kernels.backends.torch_tiled import sweep
from dispersion_kernels.operators import dispersion_loss
from dispersion_kernels.options import check_options
from dispersion_kernels.sampling import ControlVariate, partition
from dispersion_kernels.sampling.estimate import Draws, draw, estimate

SAMPLED: dict[str, Potential] = {
    "angular_spread": AngularSpread(),
    "orthogonalization": Orthogonalization(),
    "decorrelation": Decorrelation(),
    "uniformity": Uniformity(),
}


@dataclass(frozen=True)
class Cubic(Potential):
    """What a user would write."""

    reduction: ClassVar[Literal["mean", "log_mean"]] = "mean"
    factor: float = 2.0

    def value(self, c: Tensor) -> Tensor:
        return self.factor * (1 + c) ** 3

    def slope(self, c: Tensor) -> Tensor:
        return 3 * self.factor * (1 + c) ** 2


@dataclass(frozen=True)
class Square(Potential):
    """Its slope is a line, which is what a model of full rank has."""

    reduction: ClassVar[Literal["mean", "log_mean"]] = "mean"

    def value(self, c: Tensor) -> Tensor:
        return (c + 0.3).square()

    def slope(self, c: Tensor) -> Tensor:
        return 2 * (c + 0.3)


def tokens(*shape: int, cosine: float = 0.4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gaussian tokens around a common direction, with a few principal ones."""
    common = torch.randn(shape[-1])
    few = torch.randn(*shape[:-1], 3) @ torch.randn(3, shape[-1])
    return (cosine**0.5 * common + (1 - cosine) ** 0.5 * (torch.randn(shape) + 0.5 * few)).to(dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cases(copies: int = 1) -> dict[str, dict[str, Any]]:
    """Fifty tokens: in equal blocks, in unequal ones, and in units of their own of which some are evaluated whole."""
    ids = torch.tensor([0] * 35 + [1] * 8 + [2] * 4 + [-1] * 3)[torch.randperm(50)]
    bounds = torch.tensor([40, 40, 48, 50]) + 50 * torch.arange(copies).unsqueeze(1)
    return {
        "equal": {},
        "ragged": {},
        "mask": {"mask": (torch.arange(50) % 7 != 3).expand(copies, 50)},
        "documents": {"document_ids": ids.expand(copies, 50)},
        "packed": {"cu_seqlens": torch.nn.functional.pad(bounds.flatten(), (1, 0)).int()},
    }


@pytest.mark.parametrize(
    ("case", "control_variate"),
    [
        ("mask", "low_rank"),
        pytest.param("equal", "none", marks=pytest.mark.slow),
        *(pytest.param(case, "low_rank", marks=pytest.mark.slow) for case in cases() if case != "mask"),
        *(pytest.param(case, "full_rank", marks=pytest.mark.slow) for case in ("equal", "ragged")),
    ],
)
def test_unbiased(case: str, control_variate: ControlVariate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over many draws, of copies of one sequence, is the exact number, within what its own scatter allows."""
    monkeypatch.setattr(partition, "_SMALLEST_BLOCK", 8)
    copies = 150
    options = cases(copies)[case]
    potential: Potential = Orthogonalization(margin=0.9) if case == "mask" else AngularSpread(tau=0.5)
    features = 18 if control_variate == "full_rank" else 6
    z = tokens(48 if case == "equal" else 50, features, dtype=torch.float64).expand(copies, -1, -1)
    if case == "packed":
        z = z.flatten(0, 1)
    exact = oracle(z, potential, **options)
    drawn = evaluate(z, potential, sampling=SampledPairs(0.2, control_variate), impl="torch", **options)
    if case == "packed":
        # The first of the four sequences of a copy is estimated; the others are evaluated whole.
        torch.testing.assert_close(drawn.loss.view(copies, 4)[:, 1:], exact.loss.view(copies, 4)[:, 1:])
        exact, drawn = (Answer(answer.loss[::4], answer.grad.view(copies, 50, -1)[:, :40]) for answer in (exact, drawn))
    if potential.reduction == "log_mean":
        # It is the mean of psi and its gradient that are unbiased.
        exact, drawn = (
            Answer(answer.loss.exp(), answer.grad * answer.loss.exp().view(-1, 1, 1)) for answer in (exact, drawn)
        )
    for expected, values in ((exact.loss[0], drawn.loss), (exact.grad[0], drawn.grad)):
        mean_variance = values.var(0).sum() / copies
        error = (values.mean(0) - expected).square().sum()
        assert mean_variance > 0
        # A single square may be nine times its mean; a sum of many hardly differs from it.
        assert error <= (9 if expected.dim() == 0 else 1.6) * mean_variance


def test_the_control_variates_help() -> None:
    """Each has a fraction of the last one's error, and all of a subsample's with the same number of pairs."""
    z = tokens(512, 64)
    exact = oracle(z, "angular_spread")

    def error(**options: Any) -> float:
        errors = [
            (evaluate(z, "angular_spread", generator=seeded(n), **options).grad - exact.grad).norm() for n in range(3)
        ]
        return (sum(errors) / len(errors) / exact.grad.norm()).item()

    subsample = error(sampling=SampledTokens(128))
    none, low_rank = error(sampling=SampledPairs(1 / 16, "none")), error(sampling=1 / 16)
    assert low_rank < 0.06 * none < 0.06 * subsample
    # The model alone: a bias, of the size of what it misses, and no more noise than that of the fit.
    assert error(sampling=SampledPairs(0)) < 0.1


def test_two_clusters() -> None:
    """Where the cosine takes values far from each other a line in it misses more than a parabola does."""
    centres = 4 * torch.randn(3, 64)
    z = (centres[torch.randint(0, 3, (1, 512))] + torch.randn(1, 512, 64)).float()
    exact = oracle(z, "angular_spread")
    none, low_rank = (
        (evaluate(z, "angular_spread", sampling=sampling).grad - exact.grad).norm()
        for sampling in (SampledPairs(1 / 16, "none"), 1 / 16)
    )
    assert low_rank < 0.25 * none


def test_full_rank_sees_what_16_directions_do_not() -> None:
    z = torch.randn(1, 1024, 576)
    exact = oracle(z, "angular_spread")

    def error(pairs: float, control_variate: ControlVariate) -> float:
        answer = evaluate(z, "angular_spread", sampling=SampledPairs(pairs, control_variate))
        return ((answer.grad - exact.grad).norm() / exact.grad.norm()).item()

    assert error(1 / 16, "full_rank") < 0.012 < 0.25 * error(1 / 16, "low_rank")
    assert error(0, "full_rank") < 0.5 * error(0, "low_rank")


@pytest.mark.parametrize("pairs", [0.2, 0.5])
@pytest.mark.parametrize("case", ["equal", "ragged"])
def test_full_rank_of_a_line(case: str, pairs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It misses nothing of the slope, and so the gradient is exact, whichever pairs are evaluated: in blocks of fewer
    tokens than features, and of more."""
    monkeypatch.setattr(partition, "_SMALLEST_BLOCK", 8)
    z = tokens(3, 48 if case == "equal" else 50, 20, dtype=torch.float64)
    exact = oracle(z, Square())
    answer = evaluate(z, Square(), sampling=SampledPairs(pairs, "full_rank"), impl="torch")
    torch.testing.assert_close(answer.grad, exact.grad, rtol=1e-5, atol=1e-5 * exact.grad.abs().max().item())


@pytest.mark.parametrize("pairs", [1 / 16, 1 / 4, 0.0])
@pytest.mark.parametrize("control_variate", ["none", "low_rank", "full_rank"])
def test_the_stated_error_is_the_true_one(control_variate: ControlVariate, pairs: float) -> None:
    if pairs == 0 and control_variate == "none":
        pytest.skip("that leaves nothing of the loss")
    z = tokens(2, 512, 32)
    exact = oracle(z, "angular_spread")

    def tangent(grad: Tensor) -> Tensor:
        return grad - z * (grad * z).sum(-1, keepdim=True) / z.square().sum(-1, keepdim=True)

    true, stated = [], []
    for seed in range(4):
        tokens_of_seed = z.clone().requires_grad_()
        loss, stats = fused_dispersion_loss(
            tokens_of_seed,
            sampling=SampledPairs(pairs, control_variate),
            generator=seeded(seed),
            return_stats=True,
            reduction="sum",
        )
        loss.backward()
        assert tokens_of_seed.grad is not None
        true.append((tangent(tokens_of_seed.grad - exact.grad).norm() / tangent(exact.grad).norm()).item())
        stated.append(stats.relative_error.item())
    ratio = sum(stated) / sum(true)
    print(f"{control_variate}, pairs={pairs:g}: true {sum(true) / 4:.4f}, stated {sum(stated) / 4:.4f}")
    assert 0.67 < ratio < 1.5


def test_the_statistics_of_lists_and_of_all_pairs() -> None:
    z = tokens(528, 16)
    loss, stats = fused_dispersion_loss([z, 2 * z], sampling=1 / 16, generator=seeded(0), return_stats=True)
    assert loss.dim() == 0
    assert stats.relative_error.shape == (2,)
    assert (stats.relative_error > 0).all()
    for sampling in (None, 1.0):
        loss, stats = fused_dispersion_loss(z, sampling=sampling, return_stats=True)
        assert torch.equal(loss, fused_dispersion_loss(z))
        assert stats.relative_error == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("potential", [*SAMPLED.values(), Cubic()], ids=repr)
def test_backends_agree(potential: Potential, dtype: torch.dtype, impl: str) -> None:
    """The same draws in float64 are the oracle of what a backend makes of them."""
    z = tokens(2, 320, 24, dtype=dtype)
    skip_unless_supported(impl, z, potential)
    ids = torch.randint(-1, 2, (2, 320))
    upstream = torch.full((2,), 4096.0)  # an fp16 gradient underflows without
    whole: dict[str, Any] = {}
    for fraction, options in ((0.1, whole), (0.1, {"document_ids": ids}), (0, whole)):
        models: tuple[ControlVariate, ...] = ("none", "low_rank") if fraction else ("low_rank",)
        for control_variate in models:
            options = {**options, "sampling": SampledPairs(fraction, control_variate)}
            exact = evaluate(z.double(), potential, upstream, impl="torch", generator=seeded(3), **options)
            answer = evaluate(z, potential, upstream, impl=impl, generator=seeded(3), **options)
            assert answer.grad.dtype == dtype
            torch.testing.assert_close(answer.loss.double(), exact.loss, rtol=2e-5, atol=2e-5)
            # What fp32 makes of the fit of low_rank is another model, as unbiased.
            fit = 2e-4 if control_variate == "low_rank" else 2e-5
            rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
            difference = (answer.grad.double() - exact.grad).norm() / exact.grad.norm()
            assert difference < fit + rounding


@pytest.mark.parametrize("impl", IMPLS)
def test_backends_agree_at_full_rank(impl: str) -> None:
    z = tokens(2, 320, 24, dtype=torch.bfloat16)
    skip_unless_supported(impl, z, AngularSpread())
    for pairs in (0.1, 0):
        options: dict[str, Any] = {"sampling": SampledPairs(pairs, "full_rank")}
        exact = evaluate(z.double(), "angular_spread", impl="torch", generator=seeded(3), **options)
        answer = evaluate(z, "angular_spread", impl=impl, generator=seeded(3), **options)
        torch.testing.assert_close(answer.loss.double(), exact.loss, rtol=2e-5, atol=2e-5)
        assert (answer.grad.double() - exact.grad).norm() < (2e-4 + 2**-8) * exact.grad.norm()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", SAMPLED.values(), ids=list(SAMPLED))
@pytest.mark.parametrize("pairs", [0.0, 1 / 32])
def test_tokens_that_are_nearly_equal(potential: Potential, pairs: float, impl: str) -> None:
    """Their cosines differ by no more than some roundings of fp32, and psi is nearly a line over them."""
    z = torch.randn(64) + 1e-3 * torch.randn(2, 1024, 64)
    skip_unless_supported(impl, z, potential)
    exact = fused_dispersion_loss(z.double(), potential)
    loss = fused_dispersion_loss(z, potential, sampling=SampledPairs(pairs), impl=impl)
    assert abs(loss - exact) < 1e-5


@pytest.mark.parametrize("case", ["ragged", "mask", "documents", "packed", "many small ones"])
def test_lengths_that_are_not_read(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator does, where bounds known from shapes take the place of lengths, on the CPU."""
    monkeypatch.setattr(partition, "_SMALLEST_BLOCK", 8)
    small = {"document_ids": (torch.arange(50) - 8).clamp(min=0).view(1, 50) // 2}  # but for the first
    options = {
        "sampling": 0.2,
        "impl": "torch",
        **{**cases(), "many small ones": small}[case],
    }
    z = tokens(50, 20, dtype=torch.float64)
    z = z if case == "packed" else z.unsqueeze(0)
    expected = evaluate(z, "angular_spread", generator=seeded(0), **options)
    read_nothing(monkeypatch)
    answer = evaluate(z, "angular_spread", generator=seeded(0), **options)
    torch.testing.assert_close(answer.loss, expected.loss)
    torch.testing.assert_close(answer.grad, expected.grad)


@pytest.mark.parametrize("control_variate", ["low_rank", "full_rank"])
@pytest.mark.parametrize("potential", [*SAMPLED.values(), AngularSpread(tau=0.001)], ids=repr)
def test_no_synchronisation_on_an_accelerator(potential: Potential, control_variate: ControlVariate) -> None:
    """Meta tensors hold no numbers: whatever reads one fails here as it would stall a GPU."""
    z = torch.empty(2, 300, 64, device="meta", dtype=torch.bfloat16)
    pair_ids = torch.empty(2, 300, device="meta", dtype=torch.int64)
    cu_seqlens = torch.empty(5, device="meta", dtype=torch.int32)

    def on_meta(layers: Sequence[Tensor], ids: Tensor | None, bounds: Tensor | None, *options: Any) -> Losses:
        result = sweep(layers[0], potential, ids, bounds, True)
        return result.loss, [result.grad], result.scale

    prime = torch.empty(2, 331, 64, device="meta", dtype=torch.bfloat16)
    whole: list[Any] = [([z, z], None, None), ([prime], None, None)]
    others: list[Any] = [([z, z], pair_ids, None), ([z[:1]], pair_ids[:1], cu_seqlens)]
    for layers, ids, bounds in whole + (others if control_variate == "low_rank" else []):
        draws = draw(layers, 0.1, None)
        options = check_options(potential, None, SampledPairs(0.1, control_variate), "none", False, "torch")
        found = estimate(layers, ids, bounds, options, draws, True, True, on_meta)
        assert found.grad is not None
        assert found.grad.shape == (len(layers), *layers[0].shape)
        assert found.loss.shape == (4 if bounds is not None else 2,)


def test_all_pairs_where_sampling_saves_nothing() -> None:
    z = tokens(2, 200, 16)
    exact = evaluate(z, "angular_spread")
    answer = evaluate(z, "angular_spread", sampling=1)
    assert torch.equal(answer.loss, exact.loss)
    assert torch.equal(answer.grad, exact.grad)
    evaluate(z, "angular_spread", sampling=SampledPairs(0.95, "none"))
    # Documents no longer than a block have all their pairs evaluated, whatever their number.
    ids = torch.arange(400).view(1, 400) // 15
    z = tokens(1, 400, 16)
    answer = evaluate(z, "angular_spread", document_ids=ids, sampling=SampledPairs(1 / 16))
    exact = evaluate(z, "angular_spread", document_ids=ids)
    torch.testing.assert_close(answer.loss, exact.loss)
    torch.testing.assert_close(answer.grad, exact.grad)


@pytest.mark.parametrize("pairs", [0.1, 0.0])
def test_an_empty_batch(pairs: float) -> None:
    z = torch.zeros(0, 600, 16, requires_grad=True)
    loss, stats = fused_dispersion_loss(z, sampling=SampledPairs(pairs), return_stats=True)
    loss.backward()
    assert loss == 0
    assert stats.relative_error == 0


@pytest.mark.parametrize("pairs", [0.05, 0])
def test_seeds(pairs: float) -> None:
    z = tokens(2, 640, 16)
    first, again, other = (evaluate(z, "angular_spread", sampling=pairs, generator=seeded(n)) for n in (1, 1, 2))
    assert torch.equal(first.loss, again.loss)
    assert torch.equal(first.grad, again.grad)
    assert not torch.equal(first.grad, other.grad)
    kept = evaluate(z, "angular_spread", sampling=pairs, generator=seeded(1), recompute=True)
    assert torch.equal(first.grad, kept.grad)
    with torch.no_grad():
        assert torch.equal(fused_dispersion_loss(z, sampling=pairs, generator=seeded(1), reduction="none"), first.loss)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("control_variate", ["none", "low_rank"])
def test_tokens_that_are_nothing(impl: str, control_variate: ControlVariate) -> None:
    """Zero tokens, a NaN that is left out, one that is not, and sequences with nothing to pair."""
    z = tokens(4, 320, 24)
    skip_unless_supported(impl, z)
    mask = torch.ones(4, 320, dtype=torch.bool)
    z[0, :7] = 0
    z[1, 5], mask[1, 5] = torch.nan, False
    z[2, 9] = torch.nan
    mask[3, 1:] = False
    options: dict[str, Any] = {"sampling": SampledPairs(0.1, control_variate), "impl": impl}
    answer = evaluate(z, "angular_spread", mask=mask, generator=seeded(0), **options)
    assert answer.loss.isnan().tolist() == [False, False, True, False]
    assert answer.loss[3] == 0
    assert answer.grad[:2].isfinite().all()
    assert (answer.grad[1, 5] == 0).all()
    assert (answer.grad[3] == 0).all()
    nothing = evaluate(z, "angular_spread", mask=torch.zeros_like(mask), sampling=0.1, impl=impl)
    assert (nothing.loss == 0).all()
    assert (nothing.grad == 0).all()
    model_alone = evaluate(z, "angular_spread", sampling=0, generator=seeded(0), impl=impl)
    assert model_alone.loss.isnan().tolist() == [False, True, True, False]
    assert model_alone.grad[[0, 3]].isfinite().all()
    equal = z[:1, :1].expand(1, 320, 24).clone()
    same = evaluate(equal, "angular_spread", sampling=0.1, impl=impl)
    assert same.loss.isfinite().all()
    assert same.grad.isfinite().all()


@pytest.mark.parametrize(
    "sampling",
    slow_but_first([SampledPairs(0.1), SampledPairs(0), SampledPairs(0.1, "none"), SampledPairs(0.1, "full_rank")]),
    ids=str,
)
def test_operator_and_compiler(sampling: SampledPairs) -> None:
    fraction, control_variate = sampling.fraction, sampling.control_variate
    z = [tokens(2, 300, 20), tokens(2, 300, 20).transpose(0, 1).contiguous().transpose(0, 1)]
    draws = draw(z, fraction, seeded(0))
    ids = torch.randint(-1, 2, (2, 300)) if fraction and control_variate != "full_rank" else None
    for pair_ids, with_grad in ((None, True), (ids, True), (None, False)):
        options = ("angular_spread", [1.0, 0.25, 0.01], "mean", "auto", fraction, control_variate)
        args = (z, pair_ids, None, None, *draws, *options, [with_grad] * 2, False, with_grad, None)
        torch.library.opcheck(torch.ops.dispersion_kernels.dispersion_loss.default, args)
        differentiable = ([x.clone().requires_grad_() for x in z], *args[1:])
        torch.library.opcheck(torch.ops.dispersion_kernels.dispersion_loss.default, differentiable)

    def loss(x: Tensor) -> Tensor:
        return fused_dispersion_loss([torch.tanh(x), x], sampling=sampling)

    compiled: Callable[[Tensor], Tensor] = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for call in (loss, compiled):
        torch.manual_seed(5)
        x = tokens(1, 600, 20).requires_grad_()
        call(x).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_module() -> None:
    z = tokens(2, 400, 16)
    module = DispersionLoss(sampling=SampledPairs(0.1, "none"))
    expected = fused_dispersion_loss(z, sampling=SampledPairs(0.1, "none"), generator=seeded(0))
    assert torch.equal(module(z, generator=seeded(0)), expected)
    loss, stats = module(z, generator=seeded(0), return_stats=True)
    assert torch.equal(loss, expected)
    _, same = fused_dispersion_loss(z, sampling=SampledPairs(0.1, "none"), generator=seeded(0), return_stats=True)
    assert torch.equal(stats.relative_error, same.relative_error)
    assert stats.relative_error > 0
    assert "sampling=SampledPairs(fraction=0.1, control_variate='none')" in repr(module)


@pytest.mark.parametrize("pairs", [0.1, 0.0])
@pytest.mark.parametrize(
    ("impl", "control_variate"), [("torch", "low_rank"), ("cpu", "low_rank"), ("cpu", "none"), ("torch", "full_rank")]
)
def test_a_list_is_the_mean_of_its_layers(impl: str, control_variate: ControlVariate, pairs: float) -> None:
    """With draws of their own, whether they are taken together or one by one."""
    if pairs == 0 and control_variate == "none":
        pytest.skip("that leaves nothing of the loss")
    # In fp32 PyTorch's products of a larger batch may be summed in another order, and a small stated error is of that.
    dtype = torch.float32 if impl == "cpu" else torch.float64
    layers = [tokens(2, 300, 20, cosine=cosine, dtype=dtype) for cosine in (0.1, 0.5, 0.9)]
    layers = [layer.requires_grad_(n != 1) for n, layer in enumerate(layers)]
    skip_unless_supported(impl, layers[0])
    masked = pairs > 0 and control_variate != "full_rank"
    checked = check_options("angular_spread", None, SampledPairs(pairs, control_variate), "mean", False, impl)
    for options in ({}, {"mask": torch.arange(600).view(2, 300) % 7 > 0} if masked else {}):
        draws = draw(layers, pairs, seeded(0))
        arguments = (None if not options else options["mask"].long() - 1, None, checked)
        together, errors = dispersion_loss(layers, *arguments, draws, True)
        gradients = torch.autograd.grad(together, [layers[0], layers[2]])
        by_themselves = [
            dispersion_loss([layer], *arguments, Draws(*(d[n : n + 1] for d in draws)), True)
            for n, layer in enumerate(layers)
        ]
        torch.testing.assert_close(together, torch.stack([loss for loss, _ in by_themselves]).mean())
        torch.testing.assert_close(errors, torch.cat([error for _, error in by_themselves if error is not None]))
        for n, grad in zip((0, 2), gradients, strict=True):
            torch.testing.assert_close(grad, torch.autograd.grad(by_themselves[n][0] / 3, layers[n])[0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SampledPairs("some"), TypeError, "fraction must be a number from 0 to 1, got 'some'; try 1/16"),  # type: ignore[arg-type]
        (lambda: SampledPairs(True), TypeError, "got True"),
        (lambda: SampledPairs(1.5), ValueError, r"fraction must be from 0 to 1, got 1.5; .*take SampledTokens"),
        (lambda: SampledPairs(-0.1), ValueError, "got -0.1"),
        (lambda: SampledPairs(float("nan")), ValueError, "got nan"),
        (
            lambda: SampledPairs(0.1, "linear"),
            ValueError,
            "control_variate 'linear'; available: low_rank, full_rank, none",
        ),  # type: ignore[arg-type]
        (lambda: SampledPairs(0, "none"), ValueError, "fraction=0 with control_variate='none' leaves nothing.*above 0"),
        (lambda: SampledTokens(1), ValueError, "count must be an integer of at least 2.*got 1; .*take SampledPairs"),
        (lambda: SampledTokens(2.5), ValueError, "got 2.5"),  # type: ignore[arg-type]
        (lambda: SampledTokens(True), ValueError, "got True"),
    ],
)
def test_wrong_samples(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


WHOLE = torch.ones(2, 300, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"sampling": "all"},
            TypeError,
            "sampling must be None for all pairs, a fraction.*got 'all'; try sampling=1/16",
        ),
        ({"sampling": True}, TypeError, "got True"),
        ({"sampling": 256}, ValueError, "got 256; .*for a number of tokens take SampledTokens"),
        (
            {"sampling": 0.1, "potential": "l2_repel"},
            ValueError,
            "'l2_repel' is not a function of the cosine.*uniformity",
        ),
        (
            {"sampling": 0.1, "potential": "dispersive_l2"},
            ValueError,
            "'dispersive_l2'.*take sampling=None, or SampledT",
        ),
        ({"sampling": 0.1, "potential": "perplexity_entropy"}, ValueError, "'perplexity_entropy'"),
        ({"sampling": 0.1, "impl": "reference"}, ValueError, "impl='reference' materialises all pairs"),
        ({"sampling": 0, "mask": WHOLE}, ValueError, "fraction=0 is for whole sequences, and mask.*as 1/64"),
        ({"sampling": 0, "document_ids": WHOLE.long()}, ValueError, "and document_ids was given"),
        (
            {"sampling": SampledPairs(0.1, "full_rank"), "mask": WHOLE},
            ValueError,
            "full_rank is for whole sequences, and mask was given; take control_variate='low_rank'",
        ),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused_dispersion_loss(torch.randn(2, 300, 8), **options)
    if not {"impl", "mask", "document_ids"} & set(options):
        with pytest.raises(error, match=message):
            DispersionLoss(
                options.get("potential", "angular_spread"), **{k: v for k, v in options.items() if k != "potential"}
            )
