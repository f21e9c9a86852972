"""The CPU kernel's sampled pairs against what PyTorch makes of the same draws in float64, on every instruction set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Answer, evaluate
from torch import Tensor

from dispersion_kernels import (
    AngularSpread,
    Decorrelation,
    Orthogonalization,
    Potential,
    SampledPairs,
    Uniformity,
    fused_dispersion_loss,
)
from dispersion_kernels.backends import cpu
from dispersion_kernels.sampling import ControlVariate, cpu_sampler

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))

# With what fp32 makes of a cosine magnified so much.
POTENTIALS: list[tuple[Potential, float]] = [
    (AngularSpread(), 1),
    (AngularSpread(tau=0.1), 10),  # no polynomials: arccos and exp
    (Orthogonalization(margin=0.9), 1),
    (Decorrelation(), 1),
    (Uniformity(), 1),
]


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Around a common direction, with a few principal ones."""
    few = torch.randn(*shape[:-1], 3) @ torch.randn(3, shape[-1])
    return (0.6 * torch.randn(shape[-1]) + 0.8 * torch.randn(shape) + 0.4 * few).to(dtype)


def both(z: Tensor, potential: Potential, **options: Any) -> tuple[Answer, Answer]:
    """The kernel's answer, and the oracle's."""
    seeds = (torch.Generator().manual_seed(3) for _ in range(2))
    ours, exact = (
        evaluate(tensor, potential, generator=seed, impl=impl, **options)
        for tensor, seed, impl in ((z, next(seeds), "cpu"), (z.double(), next(seeds), "torch"))
    )
    return ours, exact


def check(z: Tensor, potential: Potential, sensitivity: float, **options: Any) -> None:
    ours, exact = both(z, potential, **options)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=2e-5 * sensitivity, atol=2e-5 * sensitivity)
    # What fp32 makes of the fit of low rank is another model, as good.
    tolerance = sensitivity * (2e-4 if options["sampling"].control_variate == "low_rank" else 2e-5)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[z.dtype]
    assert (ours.grad.double() - exact.grad).norm() < (tolerance + rounding) * exact.grad.norm()


@pytest.fixture
def sampled_here(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """An entry for each call of the kernel."""
    done: list[bool] = []

    def spy(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        done.append(True)
        return original(*args, **kwargs)

    original: Callable[..., tuple[Tensor, Tensor]] = cpu.sampled
    monkeypatch.setattr(cpu, "sampled", spy)
    return done


@pytest.mark.parametrize("control_variate", ["none", "low_rank"])
@pytest.mark.parametrize(("potential", "sensitivity"), POTENTIALS, ids=repr)
@pytest.mark.parametrize(
    ("length", "features", "pairs"),
    [
        (320, 24, 0.1),  # blocks of a panel
        (240, 37, 1 / 16),  # of which some share a tile
        (600, 130, 0.25),  # of many panels
        (331, 40, 0.2),  # of different lengths
        (300, 5, 0.0),
    ],
)
def test_the_estimate(
    isa: str,
    length: int,
    features: int,
    pairs: float,
    potential: Potential,
    sensitivity: float,
    control_variate: ControlVariate,
    sampled_here: list[bool],
) -> None:
    if pairs == 0 and control_variate == "none":
        pytest.skip("that leaves nothing of the loss")
    z = tokens(2, length, features)
    check(z, potential, sensitivity, sampling=SampledPairs(pairs, control_variate))
    assert sampled_here == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_tokens(isa: str, dtype: torch.dtype) -> None:
    for pairs in (0.0, 0.1):
        # Larger by a factor that takes the gradient out of fp16's subnormal numbers.
        z = tokens(1, 320, 37, dtype=dtype) / 256
        check(z, AngularSpread(), 1, sampling=SampledPairs(pairs))


@pytest.mark.parametrize("control_variate", ["none", "low_rank"])
@pytest.mark.parametrize("case", ["mask", "documents", "packed"])
def test_populations(isa: str, case: str, control_variate: ControlVariate, sampled_here: list[bool]) -> None:
    """Tokens that are left out, populations that are evaluated whole, and empty ones."""
    z = tokens(3, 300, 24)
    options: dict[str, Any] = {
        "mask": {"mask": torch.rand(3, 300) < 0.8},
        "documents": {"document_ids": torch.cat([torch.randint(-1, 3, (2, 300)), torch.full((1, 300), -1)])},
        "packed": {"cu_seqlens": torch.tensor([0, 500, 512, 512, 890, 899, 900, 900])},
    }[case]
    z = z.flatten(0, 1) if case == "packed" else z
    check(z, AngularSpread(), 1, sampling=SampledPairs(0.1, control_variate), **options)
    assert sampled_here == [True]


def test_rows_where_they_lie(isa: str) -> None:
    """Of a wider tensor, and of layers that are not spaced alike."""
    wide = tokens(2, 320, 48)
    check(wide[..., :24], AngularSpread(), 1, sampling=SampledPairs(0.1))
    layers = [wide[..., :24], wide[..., 24:].contiguous(), wide[..., ::2]]
    losses = [
        fused_dispersion_loss(z, sampling=0.1, generator=torch.Generator().manual_seed(0))
        for z in (layers, [z.contiguous() for z in layers])
    ]
    assert torch.equal(*losses)


def test_what_is_left_to_the_sweep(sampled_here: list[bool]) -> None:
    """Blocks larger than a tile, exponents that need a running maximum, and a model of full rank."""
    check(tokens(1, 1024, 24), AngularSpread(), 1, sampling=SampledPairs(0.5))
    assert sampled_here == []
    check(tokens(1, 320, 24), AngularSpread(tau=0.005), 100, sampling=SampledPairs(0.1, "none"))
    check(tokens(1, 320, 24), AngularSpread(), 1, sampling=SampledPairs(0.1, "full_rank"))
    assert sampled_here == []
    call(blocks=torch.tensor([0, 256, 300]), **TOKENS_300)


@pytest.mark.parametrize("rate", [9.8, 9.9, 9.99, 10.0, 10.01])
def test_exponents_that_need_a_running_maximum(rate: float) -> None:
    """What is said to be for the kernel it takes."""
    for potential in (Uniformity(t=2 * rate), AngularSpread(tau=0.5 / (rate * 4), clamp=0.0)):
        z = tokens(1, 320, 24)
        if cpu_sampler.sampler(potential, SampledPairs(0.1), z, None):
            fused_dispersion_loss(z, potential, sampling=0.1, impl="cpu")
        else:
            assert rate > 9.85


@pytest.mark.parametrize("control_variate", ["none", "low_rank"])
@pytest.mark.parametrize("pairs", [0.0, 0.05])
def test_the_error_it_states(isa: str, control_variate: ControlVariate, pairs: float) -> None:
    if pairs == 0 and control_variate == "none":
        pytest.skip("that leaves nothing of the loss")
    z = tokens(2, 640, 24)
    stated = []
    for tensor, impl in ((z, "cpu"), (z.double(), "torch")):
        leaf = tensor.clone().requires_grad_()
        _, stats = fused_dispersion_loss(
            leaf,
            sampling=SampledPairs(pairs, control_variate),
            impl=impl,
            generator=torch.Generator().manual_seed(0),
            return_stats=True,
        )
        stated.append(stats.relative_error.item())
    assert stated[0] == pytest.approx(stated[1], rel=5e-3)


def test_bitwise_repeatable(isa: str) -> None:
    layers = [tokens(2, 600, 40) for _ in range(3)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            leaves = [z.clone().requires_grad_() for z in layers]
            loss = fused_dispersion_loss(leaves, sampling=1 / 16, generator=torch.Generator().manual_seed(0))
            loss.backward()
            results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert ours is not None
            assert first is not None
            assert torch.equal(ours, first)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("pairs", [0.0, 0.1])
def test_nan_stays_in_its_sequence(isa: str, pairs: float, value: float) -> None:
    z = tokens(3, 320, 24)
    # Another sequence's model may be fitted to fewer tokens, and is otherwise the same.
    z[1, 7, 3] = value
    ours, exact = both(z, AngularSpread(), sampling=SampledPairs(pairs))
    assert ours.loss[1].isnan()
    assert ours.grad[1].isnan().any()
    for sequence in (0, 2):
        assert ours.loss[sequence].item() == pytest.approx(exact.loss[sequence].item(), abs=2e-5)
        assert (ours.grad[sequence] - exact.grad[sequence]).norm() < 2e-4 * exact.grad[sequence].norm()


def test_tokens_that_are_all_the_same_or_zero(isa: str) -> None:
    for z in (torch.zeros(1, 320, 24), torch.ones(1, 320, 24)):
        for pairs in (0.0, 0.1):
            ours, exact = both(z, AngularSpread(), sampling=SampledPairs(pairs))
            torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-5)
            assert ours.grad.isfinite().all()


@pytest.mark.parametrize("norm", [1e-33, 1e-12, 1e12])
@pytest.mark.parametrize("pairs", [0.0, 0.1])
def test_norms(isa: str, norm: float, pairs: float) -> None:
    z = torch.nn.functional.normalize(tokens(2, 320, 24), dim=2) * norm
    check(z, Uniformity(), 1, sampling=SampledPairs(pairs))  # which adds nothing to a norm


TOKENS_300 = {"layers": [torch.ones(1, 300, 8)], "order": None, "populations": torch.tensor([0, 300])}


def call(**changes: Any) -> tuple[Tensor, Tensor]:
    layers = changes.pop("layers", [tokens(1, 96, 8)])
    arguments: dict[str, Any] = {
        "potential_name": "angular_spread",
        "params": AngularSpread().params(),
        "order": torch.arange(96),
        "populations": torch.tensor([0, 96]),
        "blocks": torch.tensor([0, 32, 64, 96]),
        "inverse_probability": torch.tensor([95 / 31]),
        "sequence": torch.tensor([0]),
        "pairs": torch.tensor([96 * 95]),
        "draws": None,
        "gradient": (torch.empty(1, *layers[0].shape), torch.empty(1, *layers[0].shape[:2])),
    }
    return cpu.sampled(layers, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": [torch.zeros(1, 96, 8, dtype=torch.float64)]}, "layers must be float32"),
        ({"layers": [torch.zeros(1, 96, 8), torch.zeros(1, 95, 8)]}, "layer 1 is torch.float32"),
        ({"potential_name": "perplexity_entropy"}, "potential_name must be"),
        ({"params": [1.0]}, "takes the parameters"),
        ({"order": torch.arange(96, dtype=torch.int32)}, "order must be"),
        ({"gradient": (torch.empty(96, 8), torch.empty(96))}, "gradient must be contiguous"),
        ({"populations": torch.tensor([0.0, 96.0])}, "populations must be"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"order": torch.arange(96) + 1},
        {"populations": torch.tensor([0, 97])},
        {"populations": torch.tensor([96, 0])},
        {"blocks": torch.tensor([0, 32, 64])},
        {"blocks": torch.tensor([0, 64, 32, 96])},
        {"blocks": torch.tensor([0, 32, 64, 97])},
        {"blocks": None},
        {"sequence": torch.tensor([1])},
        {"draws": torch.zeros(1, 2, 3)},
        {"potential_name": "dispersive_l2", "params": [1.0, 0.0]},
        {"potential_name": "uniformity", "params": [50.0]},  # exponents that need a running maximum
        {"blocks": torch.tensor([0, 300]), **TOKENS_300},
    ],
)
def test_arguments_out_of_range(changes: dict[str, Any]) -> None:
    call()
    with pytest.raises(RuntimeError, match="out of range"):
        call(**changes)


def test_largest_blocks(isa: str) -> None:
    """Blocks of 256 tokens, which a panel of 24 columns does not divide: near all pairs with every instruction set."""
    torch.manual_seed(0)
    z = torch.randn(1, 4096, 32) + 0.5
    sampled, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    losses = fused_dispersion_loss(sampled, sampling=1 / 16), fused_dispersion_loss(exact, impl="torch")
    for loss in losses:
        loss.backward()
    assert sampled.grad is not None
    assert exact.grad is not None
    assert abs(losses[0].item() - losses[1].item()) < 1e-4, isa
    assert (sampled.grad - exact.grad).norm() < 0.05 * exact.grad.norm(), isa
