"""The loss and its gradient against the formulas, the float64 oracle and the naive computation in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from conftest import (
    IMPLS,
    POTENTIALS,
    assert_as_accurate_as_naive,
    evaluate,
    oracle,
    relative_errors,
    skip_unless_supported,
    slow_but_first,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dispersion_kernels.backends.torch_tiled as sweep_module
from dispersion_kernels import (
    AngularSpread,
    Decorrelation,
    DispersionLoss,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    SampledTokens,
    Uniformity,
    fused_dispersion_loss,
)

# Ragged on purpose: one token, one pair, around the widths of vectors and tiles, and F that no power of two divides.
SHAPES = [(2, 1, 20), (3, 2, 64), (2, 3, 2), (1, 31, 1030), (2, 127, 100), (1, 129, 64), (3, 257, 20), (1, 257, 768)]


def by_the_formula(z: np.ndarray, name: str) -> float:
    """One sequence's loss, pair by pair, from the table of formulas; float64 and plain Python."""
    length, features = z.shape
    norms = [np.linalg.norm(row) for row in z]

    def angle(i: int, j: int) -> float:
        c = z[i] @ z[j] / ((norms[i] + 0.01) * (norms[j] + 0.01))
        return math.acos(min(max(c, -0.75), 0.75)) / math.pi

    def squared(i: int, j: int) -> float:
        return float(((z[i] - z[j]) ** 2).sum())

    off = [(i, j) for i in range(length) for j in range(length) if i != j]
    every = [(i, j) for i in range(length) for j in range(length)]
    if name == "angular_spread":
        return math.log(np.mean([math.exp(-angle(i, j)) for i, j in off])) + 0.01
    if name == "orthogonalization":
        return float(np.mean([max(0, 0.5 - angle(i, j)) ** 2 for i, j in off]))
    if name == "l2_repel":
        return math.log(np.mean([math.exp(-squared(i, j)) for i, j in every])) + 0.01 + 0.1 * float((z**2).mean())
    if name == "decorrelation":
        x = [(row - row.mean()) / row.std(ddof=1) for row in z]
        return float(np.mean([(x[i] @ x[j] / (features - 1)) ** 2 for i, j in off]))
    if name == "perplexity_entropy":
        total = 0.0
        for i in range(length):
            weights = np.array([math.exp(-squared(i, j)) for j in range(length) if j != i])
            p = weights / weights.sum()
            total += float((p * np.log2(p + 0.01)).sum())
        return total / length
    if name == "uniformity":
        unit = z / np.array(norms)[:, None]
        return math.log(np.mean([math.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i, j in off]))
    assert name == "dispersive_l2"
    return math.log(np.mean([math.exp(-squared(i, j) / features) for i, j in every]))


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize(
    "name",
    [
        "angular_spread",
        "orthogonalization",
        "l2_repel",
        "decorrelation",
        "perplexity_entropy",
        "uniformity",
        "dispersive_l2",
    ],
)
def test_value_is_the_formula(name: str, impl: str) -> None:
    z = torch.randn(2, 7, 5, dtype=torch.float64) * 0.6 + 0.3
    tokens = z.float() if impl == "cpu" else z
    skip_unless_supported(impl, tokens, name)
    loss = fused_dispersion_loss(tokens, name, reduction="none", impl=impl)
    expected = [by_the_formula(sequence.numpy(), name) for sequence in z]
    torch.testing.assert_close(
        loss.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6 if impl == "cpu" else 1e-12, atol=1e-7
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_matches_the_oracle_at_ragged_shapes(potential: Potential, dtype: torch.dtype, impl: str) -> None:
    for shape in SHAPES:
        if shape[2] == 2 and isinstance(potential, Decorrelation):
            continue  # the correlation of two features is 1 or -1 and its gradient nothing but rounding
        z = (torch.randn(shape) * 0.7 + 0.4 * torch.randn(shape[2])).to(dtype)
        skip_unless_supported(impl, z, potential)
        upstream = torch.rand(shape[0], dtype=torch.float64) + 0.5
        exact = oracle(z, potential, upstream)
        answer = evaluate(z, potential, upstream, impl=impl)
        assert answer.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert answer.grad.dtype == dtype
        assert_as_accurate_as_naive(z, potential, answer, exact, upstream=upstream)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_many_tiles(potential: Potential, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles far smaller than the sequence, ragged at its end; several sequences in one tile."""
    z = torch.randn(3, 203, 24) * 0.7 + 0.4
    skip_unless_supported(impl, z, potential)
    exact = oracle(z, potential)
    for tokens_of_a_tile in (7, 64, 300):
        monkeypatch.setitem(sweep_module._TILE_BYTES, "cpu", 4 * tokens_of_a_tile**2)
        assert_as_accurate_as_naive(z, potential, evaluate(z, potential, impl=impl), exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_degenerate_tokens(potential: Potential, impl: str) -> None:
    """Zero tokens, duplicates, antipodes, constant tokens (zero variance, with a mean that rounds), tiny norms."""
    z = torch.randn(1, 40, 48) * 0.3
    z[0, 3] = 0
    z[0, 9] = 0
    z[0, 5] = z[0, 6]
    z[0, 7] = -z[0, 8]
    z[0, 10] = 0.1
    z[0, 11] = z[0, 12] * 1e-4
    skip_unless_supported(impl, z, potential)
    exact = oracle(z, potential)
    assert exact.grad.isfinite().all()
    assert_as_accurate_as_naive(z, potential, evaluate(z, potential, impl=impl), exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize(
    "name", ["angular_spread", "orthogonalization", "decorrelation", "uniformity", "l2_repel", "dispersive_l2"]
)
def test_norms_far_from_one(name: str, scale: float, impl: str) -> None:
    z = torch.randn(2, 65, 64)
    z *= scale / z.norm(dim=-1, keepdim=True)
    skip_unless_supported(impl, z, name)
    assert_as_accurate_as_naive(z, name, evaluate(z, name, impl=impl), oracle(z, name))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "potential",
    [
        AngularSpread(tau=1e-3, eps=0.0),
        AngularSpread(tau=0.01, eps=0.0),
        AngularSpread(tau=0.1, clamp=0.0),
        AngularSpread(tau=1.0, clamp=0.9),
        Uniformity(t=300.0),
        L2Repel(tau=0.1, eps=0.0, include_diagonal=False),
        L2Repel(tau=1.0, eps=0.0, include_diagonal=False),
    ],
    ids=repr,
)
def test_exponents_beyond_fp32(potential: Potential, impl: str) -> None:
    """Exponents of -15,000: finite wherever a float64 logsumexp is, though exp underflows for every pair."""
    z = torch.randn(2, 130, 768) + 0.5 * torch.randn(768)
    skip_unless_supported(impl, z, potential)
    exact = oracle(z, potential)
    assert exact.loss.isfinite().all()
    assert exact.grad.abs().max() > 0
    answer = evaluate(z, potential, impl=impl)
    # The loss is about the largest exponent.
    assert_as_accurate_as_naive(z, potential, answer, exact, exact.loss.abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_bf16_is_an_order_of_magnitude_more_accurate_than_naive(impl: str) -> None:
    z = (torch.randn(1, 512, 256) + 1.5 * torch.randn(256)).bfloat16()
    skip_unless_supported(impl, z)
    exact = oracle(z, "angular_spread")
    naive = relative_errors(evaluate(z, "angular_spread", impl="reference"), exact)
    ours = relative_errors(evaluate(z, "angular_spread", impl=impl), exact)
    assert ours[1] < 0.005
    assert naive[1] > 5 * ours[1]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("potential", slow_but_first(POTENTIALS.values(), POTENTIALS))
def test_gradcheck(potential: Potential, impl: str) -> None:
    """Inside the clamp band: the straight-through slope differs from finite differences outside, by design."""
    z = torch.randn(2, 6, 24, dtype=torch.float64)
    cosines = torch.nn.functional.cosine_similarity(z[:, :, None], z[:, None], dim=-1)
    assert cosines[cosines < 0.999].abs().max() < 0.74
    assert torch.autograd.gradcheck(
        lambda t: fused_dispersion_loss(t, potential, reduction="none", impl=impl), (z.requires_grad_(),)
    )


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_condensed_tokens_are_still_pushed_apart(impl: str) -> None:
    """Beyond the clip the slope stays the boundary's: exp(-D) / (pi sqrt(1 - 0.75^2)) with D = arccos(0.75) / pi."""
    z = torch.tensor([[[1.0, 0.1], [1.0, -0.1]]])
    skip_unless_supported(impl, z)
    grad = evaluate(z, AngularSpread(eps=0.0), impl=impl).grad[0]
    norm = math.hypot(1, 0.1)
    x0, x1 = np.array([1, 0.1]) / norm, np.array([1, -0.1]) / norm
    # Loss log psi(c), c = x0 . x1; tangent part of x1 at x0, divided by |z|.
    expected = 1 / (math.pi * math.sqrt(1 - 0.75**2)) * (x1 - x0 * (x0 @ x1)) / norm
    np.testing.assert_allclose(grad[0].numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl: str) -> None:
    base = torch.randn(64, 40, 2).permute(2, 1, 0)
    for z in (
        base,
        torch.randn(2, 64, 40).transpose(1, 2),
        torch.randn(4, 80, 128)[::2, ::2, ::2],
        torch.randn(1, 40, 64).expand(2, -1, -1),
        torch.randn(2, 40, 100)[:, :, 7:71],
    ):
        assert z.shape == (2, 40, 64)
        skip_unless_supported(impl, z)
        for potential in ("angular_spread", "l2_repel"):
            contiguous = evaluate(z.contiguous(), potential, impl=impl)
            strided = evaluate(z, potential, impl=impl)
            # Library reductions sum in an order that depends on the strides.
            exact: dict[str, float] = {"rtol": 0.0, "atol": 0.0} if impl == "cpu" else {}
            torch.testing.assert_close(strided, contiguous, **exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_same_input_same_bits(potential: Potential, impl: str) -> None:
    z = torch.randn(2, 300, 96)
    skip_unless_supported(impl, z, potential)
    first = evaluate(z, potential, impl=impl)
    for _ in range(5):
        again = evaluate(z, potential, impl=impl)
        assert torch.equal(again.loss, first.loss)
        assert torch.equal(again.grad, first.grad)
    with torch.no_grad():
        torch.testing.assert_close(fused_dispersion_loss(z, potential, impl=impl, reduction="none"), first.loss)


def test_same_bits_for_any_number_of_threads() -> None:
    z = torch.randn(2, 300, 96)
    skip_unless_supported("cpu", z)
    threads = torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(evaluate(z, "angular_spread", impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        assert torch.equal(answer.loss, answers[0].loss)
        assert torch.equal(answer.grad, answers[0].grad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_make_their_own_sequence_nan(bad: float, potential: Potential, impl: str) -> None:
    z = torch.randn(3, 50, 20)
    skip_unless_supported(impl, z, potential)
    clean = evaluate(z, potential, impl=impl)
    z[1, 17, 4] = bad
    answer = evaluate(z, potential, impl=impl)
    assert answer.loss[1].isnan()
    for other in (0, 2):
        assert torch.equal(answer.loss[other], clean.loss[other])
        assert torch.equal(answer.grad[other], clean.grad[other])
    assert not evaluate(z, potential, impl=impl, mask=~z.isfinite().logical_not().any(-1)).loss.isnan().any()
    with torch.no_grad():
        assert fused_dispersion_loss(z, potential, impl=impl, reduction="none").isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_reductions_and_forms_agree(impl: str) -> None:
    z = torch.randn(3, 20, 16)
    skip_unless_supported(impl, z)
    losses = fused_dispersion_loss(z, reduction="none", impl=impl)
    assert losses.shape == (3,)
    torch.testing.assert_close(fused_dispersion_loss(z, impl=impl), losses.mean())
    torch.testing.assert_close(fused_dispersion_loss(z, reduction="sum", impl=impl), losses.sum())
    one = fused_dispersion_loss(z[1], reduction="none", impl=impl)
    assert one.shape == ()
    torch.testing.assert_close(one, losses[1])
    other = torch.randn(3, 20, 16)
    layers = fused_dispersion_loss([z, other], impl=impl, reduction="none")
    torch.testing.assert_close(layers, (losses + fused_dispersion_loss(other, reduction="none", impl=impl)) / 2)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_only_the_layers_that_require_a_gradient_get_one(impl: str) -> None:
    layers = [torch.randn(2, 12, 8, requires_grad=i == 1) for i in range(3)]
    skip_unless_supported(impl, layers[0])
    fused_dispersion_loss(layers, impl=impl).backward()
    assert layers[0].grad is None
    assert layers[2].grad is None
    alone = layers[1].detach().requires_grad_()
    (fused_dispersion_loss(alone, impl=impl) / 3).backward()
    torch.testing.assert_close(layers[1].grad, alone.grad)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_nothing_to_pair(potential: Potential, impl: str) -> None:
    """No valid pair at all: a loss of 0 and a gradient of 0, in every way to have none."""
    z = torch.randn(2, 6, 8)
    skip_unless_supported(impl, z, potential)
    nothing: list[tuple[Tensor, dict[str, Any]]] = [
        (z[:, :1], {}),
        (z[:, :0], {}),
        (z[:0], {}),
        (z, {"mask": torch.zeros(2, 6, dtype=torch.bool)}),
        (z, {"document_ids": torch.arange(6).repeat(2, 1)}),
        (z, {"document_ids": torch.full((2, 6), -1)}),
        (z[0], {"cu_seqlens": torch.arange(7, dtype=torch.int32)}),
        (z[0, :0], {"cu_seqlens": torch.zeros(1, dtype=torch.int32)}),
        (z[0, :0], {"cu_seqlens": torch.zeros(4, dtype=torch.int32)}),
    ]
    for tokens, options in nothing:
        for reduction in ("mean", "sum"):
            tokens = tokens.detach().requires_grad_()
            loss = fused_dispersion_loss(tokens, potential, impl=impl, reduction=reduction, **options)
            assert loss.item() == 0.0
            loss.backward()
            assert tokens.grad is not None
            assert not tokens.grad.any()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_nothing_to_pair_beside_a_norm_penalty(impl: str) -> None:
    """Without eps the loss of no pairs is a logarithm of 0, whose scale must not meet the penalty's gradient."""
    z = torch.randn(2, 6, 8)
    potential = L2Repel(eps=0.0, include_diagonal=False)
    skip_unless_supported(impl, z, potential)
    mask = torch.tensor([[True] * 6, [False] * 6])
    answer = evaluate(z, potential, mask=mask, impl=impl)
    assert answer.loss[1] == 0
    assert not answer.grad[1].any()
    assert answer.grad[0].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_packed_sequences_are_sequences(potential: Potential, impl: str) -> None:
    """cu_seqlens with empty, single and long segments is each sequence by itself; those without a pair do not count."""
    lengths = [5, 0, 1, 33, 2, 1, 70]
    parts = [torch.randn(n, 24) for n in lengths]
    z = torch.cat(parts)
    skip_unless_supported(impl, z, potential)
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    packed = evaluate(z, potential, cu_seqlens=cu_seqlens, impl=impl)
    assert packed.loss.shape == (7,)
    apart = [evaluate(part, potential, impl=impl) for part in parts]
    torch.testing.assert_close(packed.loss, torch.stack([a.loss for a in apart]))
    torch.testing.assert_close(packed.grad, torch.cat([a.grad for a in apart]), rtol=1e-5, atol=1e-7)
    mean = fused_dispersion_loss(z, potential, cu_seqlens=cu_seqlens, impl=impl)
    torch.testing.assert_close(mean, packed.loss.sum() / 4)
    for largest in (70, np.int64(71), 2**80):
        known = evaluate(z, potential, cu_seqlens=cu_seqlens, max_seqlen=largest, impl=impl)
        assert torch.equal(known.loss, packed.loss)
        assert torch.equal(known.grad, packed.grad)
    nothing = {"cu_seqlens": torch.zeros(2, dtype=torch.int32), "max_seqlen": 0}
    assert fused_dispersion_loss(z[:0], potential, impl=impl, **nothing) == 0


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_mask_is_leaving_out(potential: Potential, impl: str) -> None:
    z = torch.randn(3, 40, 24)
    skip_unless_supported(impl, z, potential)
    mask = torch.rand(3, 40) > 0.4
    mask[2] = False
    mask[2, 7] = True
    masked = evaluate(z, potential, mask=mask, impl=impl)
    for b in range(3):
        alone = evaluate(z[b, mask[b]], potential, impl=impl)
        torch.testing.assert_close(masked.loss[b], alone.loss)
        torch.testing.assert_close(masked.grad[b, mask[b]], alone.grad, rtol=1e-5, atol=1e-7)
        assert not masked.grad[b, ~mask[b]].any()
    mean = fused_dispersion_loss(z, potential, mask=mask, impl=impl)
    torch.testing.assert_close(mean, masked.loss.sum() / 2)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_documents_restrict_pairs(potential: Potential, dtype: torch.dtype, impl: str) -> None:
    """Interleaved documents, huge and negative ids, a mask on top: as the oracle, which materialises them all."""
    z = (torch.randn(2, 60, 24) * 0.7).to(dtype)
    skip_unless_supported(impl, z, potential)
    ids = torch.randint(-1, 5, (2, 60)) * 2**61
    ids[0, 3] = 77
    mask = torch.rand(2, 60) > 0.2
    options: dict[str, Any] = {"document_ids": ids, "mask": mask}
    answer = evaluate(z, potential, impl=impl, **options)
    assert_as_accurate_as_naive(z, potential, answer, oracle(z, potential, **options), **options)


@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_packed_sequences_without_reading_their_lengths(potential: Potential) -> None:
    """What the sweep does on an accelerator, where reading cu_seqlens would synchronise: mask within the packed row."""
    lengths = [5, 0, 1, 33, 2, 1, 70]
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    z = torch.randn(1, sum(lengths), 24)
    z[0, 50:] *= 3  # sequences whose exponents differ by far must not share a shift
    mask = (torch.rand(1, sum(lengths)) > 0.2).long() - 1
    for pair_ids in (None, mask):
        apart = sweep_module.sweep(z, potential, pair_ids, cu_seqlens, True)
        within = sweep_module.within_segments(pair_ids, cu_seqlens, z.shape[1])
        together = sweep_module._sweep_rows(z, potential, within, cu_seqlens, True)
        assert torch.equal(apart.pairs, together.pairs)
        torch.testing.assert_close(apart.loss, together.loss)
        torch.testing.assert_close(_gradient(apart), _gradient(together), rtol=1e-4, atol=1e-6)


def _gradient(result: sweep_module.Result) -> Tensor:
    assert result.grad is not None
    assert result.scale is not None
    return result.grad * result.scale.unsqueeze(-1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_recompute_is_the_same_and_keeps_the_tokens_alone(potential: Potential, impl: str) -> None:
    z = torch.randn(2, 50, 32).bfloat16()
    skip_unless_supported(impl, z, potential)
    kept: list[Tensor] = []
    tokens = z.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = fused_dispersion_loss(tokens, potential, impl=impl, recompute=True, reduction="none")
    assert {t.data_ptr() for t in kept} == {tokens.data_ptr()}
    loss.sum().backward()
    plain = evaluate(z, potential, impl=impl)
    torch.testing.assert_close(loss, plain.loss)
    assert torch.equal(tokens.grad, plain.grad)


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.with_grad: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.dispersion_kernels.dispersion_loss.default:
            self.with_grad.append(args[-4])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_gradient_only_the_loss_is_computed(impl: str) -> None:
    z = torch.randn(2, 40, 16, requires_grad=True)
    skip_unless_supported(impl, z)
    with _Calls() as calls:
        with torch.no_grad():
            fused_dispersion_loss(z, impl=impl)
        fused_dispersion_loss(z.detach(), impl=impl)
        fused_dispersion_loss(z, impl=impl, recompute=True)
        fused_dispersion_loss(z, impl=impl)
        fused_dispersion_loss([z, z.detach(), z], impl=impl)
    assert calls.with_grad == [[False], [False], [False], [True], [True, False, True]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_is_rounded_once_after_the_upstream_gradient(dtype: torch.dtype, impl: str) -> None:
    z = torch.randn(2, 300, 32).to(dtype)
    skip_unless_supported(impl, z)
    upstream = torch.tensor([3e-3, 7e4])
    exact = evaluate(z.float(), "angular_spread", upstream, impl=impl).grad
    assert torch.equal(evaluate(z, "angular_spread", upstream, impl=impl).grad, exact.to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_that_is_kept_gives_the_gradient_again(reduction: Literal["mean", "none"], impl: str) -> None:
    """The last backward may return the saved gradient itself; one before it may not."""
    z = [torch.randn(2, 40, 24, requires_grad=True) for _ in range(2)]
    skip_unless_supported(impl, z[0])
    losses = fused_dispersion_loss(z, reduction=reduction, impl=impl)
    upstream = torch.tensor([3.0, -0.5])[: losses.numel()].reshape(losses.shape)
    expected = torch.autograd.grad(fused_dispersion_loss(z, reduction=reduction, impl=impl), z, upstream)
    for retain in (True, True, False):
        for grad, right in zip(torch.autograd.grad(losses, z, upstream, retain_graph=retain), expected, strict=True):
            assert torch.equal(grad, right)
            grad.zero_()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(losses, z, upstream)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_a_hook_keeps_is_left_alone(impl: str) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append((saved, saved.clone()))
        return saved

    z = torch.randn(2, 40, 24, requires_grad=True)
    skip_unless_supported(impl, z)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = fused_dispersion_loss(z, impl=impl)
    (3 * loss).backward()
    assert any(saved.shape == z.shape for saved, _ in kept)
    for saved, before in kept:
        assert torch.equal(saved, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_batched_upstream_gradients(impl: str) -> None:
    z = torch.randn(3, 20, 24, requires_grad=True)
    skip_unless_supported(impl, z)
    losses = fused_dispersion_loss(z, reduction="none", impl=impl)
    (rows,) = torch.autograd.grad(losses, z, torch.eye(3), retain_graph=True, is_grads_batched=True)
    for row_gradient, upstream in zip(rows, torch.eye(3), strict=True):
        torch.testing.assert_close(row_gradient, torch.autograd.grad(losses, z, upstream, retain_graph=True)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_tensors_that_are_not_their_memory(impl: str) -> None:
    """A view whose sign is a flag, and an upstream gradient without memory."""
    z = torch.complex(torch.randn(2, 20, 24), torch.randn(2, 20, 24)).conj().imag
    skip_unless_supported(impl, z)
    assert z.is_neg()
    torch.testing.assert_close(evaluate(z, "l2_repel", impl=impl), evaluate(z.clone(), "l2_repel", impl=impl))
    leaf = torch.randn(2, 20, 24, requires_grad=True)
    (grad,) = torch.autograd.grad(fused_dispersion_loss(leaf, impl=impl), leaf, torch._efficientzerotensor(()))
    assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_dispatch_mode_sees_the_operator(impl: str) -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    z = torch.randn(2, 20, 24, requires_grad=True)
    skip_unless_supported(impl, z)
    expected = evaluate(z.detach(), "angular_spread", impl=impl)
    seen: list[str] = []
    with Names():
        loss = fused_dispersion_loss(z, impl=impl, reduction="sum")
        loss.backward()
    assert seen.count("dispersion_kernels.dispersion_loss.default") == 1
    assert z.grad is not None
    torch.testing.assert_close(z.grad, expected.grad)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"recompute": True}, {"sampling": 0.5}], ids=repr)
def test_the_loss_may_change_in_place(options: dict[str, Any]) -> None:
    """``loss /= steps`` is ordinary code, and the loss is no input of backward."""
    z = torch.randn(3, 40, 16)

    def gradient(change: Callable[[Tensor], Tensor], *, tau: Tensor | None = None) -> list[Tensor]:
        leaf = z.clone().requires_grad_()
        generator = torch.Generator().manual_seed(0) if "sampling" in options else None
        loss = fused_dispersion_loss([leaf * 1, leaf * 2], tau=tau, generator=generator, **options)
        change(loss).sum().backward()
        return [tensor.grad for tensor in (leaf, tau) if tensor is not None and tensor.grad is not None]

    def in_place(loss: Tensor) -> Tensor:
        loss *= 0.1
        loss += 1
        return loss.nan_to_num_(0.0)

    assert_equal(gradient(in_place), gradient(lambda loss: loss * 0.1 + 1))
    if "sampling" not in options:
        taus = [torch.tensor(0.7, requires_grad=True) for _ in range(2)]
        assert_equal(gradient(in_place, tau=taus[0]), gradient(lambda loss: loss * 0.1 + 1, tau=taus[1]))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivative_is_refused(impl: str) -> None:
    z = torch.randn(1, 8, 8, requires_grad=True)
    skip_unless_supported(impl, z)
    (once,) = torch.autograd.grad(fused_dispersion_loss(z, impl=impl), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivative.*reference"):
        once.square().sum().backward()
    (grad,) = torch.autograd.grad(fused_dispersion_loss(z, impl="reference"), z, create_graph=True)
    grad.square().sum().backward()
    assert z.grad is not None
    assert z.grad.abs().max() > 0


@pytest.mark.parametrize("potential", [*POTENTIALS.values(), AngularSpread(tau=0.001)], ids=repr)
def test_no_synchronisation_on_an_accelerator(potential: Potential) -> None:
    """Meta tensors hold no numbers: an .item(), or whatever else reads one, fails here as it would stall a GPU."""
    z = torch.empty(2, 300, 64, device="meta", dtype=torch.bfloat16)
    pair_ids = torch.empty(2, 300, device="meta", dtype=torch.int64)
    cu_seqlens = torch.empty(5, device="meta", dtype=torch.int32)
    cases = ((z, None, None), (z, pair_ids, None), (z[:1], None, cu_seqlens), (z[:1], pair_ids[:1], cu_seqlens))
    for tokens, ids, bounds in cases:
        result = sweep_module.sweep(tokens, potential, ids, bounds, True)
        assert result.grad is not None
        assert result.grad.shape == tokens.shape
        assert result.loss.shape == ((4,) if bounds is not None else tokens.shape[:1])


@dataclass(frozen=True)
class Repulsion(Potential):
    """exp(sharpness * c) - what a user would write."""

    reduction: ClassVar[Literal["mean", "log_mean"]] = "log_mean"
    sharpness: float = 4.0

    def value(self, c: Tensor) -> Tensor:
        return torch.exp(self.sharpness * c)

    def slope(self, c: Tensor) -> Tensor:
        return self.sharpness * torch.exp(self.sharpness * c)


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_a_potential_of_the_users(impl: str) -> None:
    """exp(4 c) is exp(-2 |x_i - x_j|^2) times e^4: uniformity at t = 2, plus 4."""
    z = torch.randn(2, 90, 32, dtype=torch.float64)
    ours = evaluate(z, Repulsion(), impl=impl)
    uniformity = oracle(z, Uniformity(t=2.0))
    torch.testing.assert_close(ours.loss, uniformity.loss + 4)
    torch.testing.assert_close(ours.grad, uniformity.grad)
    mask = torch.rand(2, 90) > 0.3
    torch.testing.assert_close(evaluate(z, Repulsion(2.0), impl=impl, mask=mask), oracle(z, Repulsion(2.0), mask=mask))


def test_module_is_the_function() -> None:
    z = torch.randn(2, 30, 16)
    pairs: list[tuple[DispersionLoss, dict[str, Any]]] = [
        (DispersionLoss(), {}),
        (DispersionLoss("l2_repel", tau=3.0), {"potential": "l2_repel", "tau": 3.0}),
        (DispersionLoss("dispersive_l2", tau=0.7, recompute=True), {"potential": "dispersive_l2", "tau": 0.7}),
        (DispersionLoss(AngularSpread(clamp=0.1)), {"potential": AngularSpread(clamp=0.1)}),
        (DispersionLoss("uniformity", impl="torch"), {"potential": "uniformity", "impl": "torch"}),
        (DispersionLoss(Repulsion(1.0), reduction="sum"), {"potential": Repulsion(1.0), "reduction": "sum"}),
    ]
    for module, options in pairs:
        assert torch.equal(module(z), fused_dispersion_loss(z, **options))
    assert "AngularSpread(tau=1.0" in repr(DispersionLoss())
    for sampling in (None, SampledTokens(10)):
        loss, stats = DispersionLoss(sampling=sampling)([z, 2 * z], return_stats=True)
        assert loss.shape == ()
        assert stats.relative_error.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("variant", "potential"),
    [
        ("angular_spread", AngularSpread(0.3, 0.1, 0.02)),
        ("orthogonalization", Orthogonalization(0.7, 0.1, 0.02)),
        ("l2_repel", L2Repel(3.0, 0.02)),
        ("decorrelation", Decorrelation()),
        ("perplexity_entropy", PerplexityEntropy(3.0, 0.02)),
    ],
)
def test_the_published_constructor_takes_all_arguments_for_every_variant(variant: str, potential: Potential) -> None:
    published = {"tau_l2": 3.0, "tau_cos": 0.3, "margin": 0.7, "epsilon": 0.02, "clamp_threshold": 0.1}
    module = DispersionLoss.from_published(variant, **published, reduction="sum")
    assert module.options.potential == potential
    assert DispersionLoss.from_published(variant, 3.0, 0.3, 0.7, 0.02, 0.1).options.potential == potential
    z = torch.randn(2, 30, 16)
    assert torch.equal(module(z), fused_dispersion_loss(z, potential, reduction="sum"))


class TestSubsampling:
    def test_each_sequence_draws_its_own_tokens(self) -> None:
        z = torch.randn(4, 100, 16)
        grad = evaluate(
            z, "angular_spread", sampling=SampledTokens(10), generator=torch.Generator().manual_seed(1)
        ).grad
        chosen = grad.abs().sum(-1) > 0
        assert chosen.sum(1).tolist() == [10, 10, 10, 10]
        assert not torch.equal(chosen[0], chosen[1])

    def test_the_generator_decides(self) -> None:
        z = torch.randn(4, 100, 16)

        def draw(seed: int) -> Tensor:
            return fused_dispersion_loss(z, sampling=SampledTokens(10), generator=torch.Generator().manual_seed(seed))

        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))

    def test_it_is_the_loss_of_the_tokens_drawn(self) -> None:
        z = torch.randn(2, 100, 16)
        answer = evaluate(z, "angular_spread", sampling=SampledTokens(12))
        for b in range(2):
            chosen = answer.grad[b].abs().sum(-1) > 0
            alone = evaluate(z[b, chosen], "angular_spread")
            torch.testing.assert_close(answer.loss[b], alone.loss)
            torch.testing.assert_close(answer.grad[b, chosen], alone.grad)

    def test_masked_tokens_are_not_drawn(self) -> None:
        z = torch.randn(3, 100, 16)
        mask = torch.zeros(3, 100, dtype=torch.bool)
        mask[0, 20:60] = True
        mask[1, :3] = True
        mask[2, 5] = True
        grad = evaluate(z, "angular_spread", sampling=SampledTokens(10), mask=mask).grad
        chosen = grad.abs().sum(-1) > 0
        assert chosen.sum(1).tolist() == [10, 3, 0]
        assert not (chosen & ~mask).any()

    def test_packed_sequences_draw_each_for_itself(self) -> None:
        lengths = [50, 3, 0, 1, 80]
        cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
        z = torch.randn(sum(lengths), 16)
        mask = torch.ones(sum(lengths), dtype=torch.bool)
        mask[:45] = False
        answer = evaluate(z, "angular_spread", sampling=SampledTokens(8), cu_seqlens=cu_seqlens, mask=mask)
        chosen = answer.grad.abs().sum(-1) > 0
        assert [int(part.sum()) for part in chosen.split(lengths)] == [5, 3, 0, 0, 8]
        assert not chosen[:45].any()

    def test_as_many_as_there_are_is_all(self) -> None:
        z = torch.randn(2, 30, 16)
        assert torch.equal(fused_dispersion_loss(z, sampling=SampledTokens(30)), fused_dispersion_loss(z))
