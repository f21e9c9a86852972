"""Sums over the pairs of tokens, against matrices of all cosines in float64."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GPU, INTERPRETED
from exact_cosines import assert_are, cosines, parts

from dispersion_kernels.backends import cpu
from dispersion_kernels.condensation import BINS, QUANTILES, cosine
from dispersion_kernels.condensation.cosine import LayerSums, Texts, pair_sums, select_texts

GPU_IMPLS = [
    pytest.param("triton", marks=[pytest.mark.gpu] if GPU else []),
] * (GPU or INTERPRETED)
IMPLS = [
    "torch",
    *GPU_IMPLS,
    pytest.param("cpu", marks=pytest.mark.skipif(bool(cpu.unavailable_reason()), reason=str(cpu.unavailable_reason()))),
]


def ragged_texts(rows: int, lengths: list[int], seed: int = 0) -> Texts:
    """Texts of these lengths in a random order of the rows, each with some tokens that are no content."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator)[: sum(lengths)]
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    begins = ends - torch.tensor(lengths)
    splits = begins + torch.tensor([(n * 3 + 1) % (length + 1) for n, length in enumerate(lengths)])
    return Texts(order, begins, splits, ends)


def condensed(rows: int, features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, features, generator=generator) + 0.8 * torch.randn(features, generator=generator)
    return z * torch.rand(rows, 1, generator=generator).exp()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[2], [3, 2, 40, 0, 1], [70, 31, 64, 65, 7], [290]])
def test_every_pair_is_counted(
    lengths: list[int], dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if impl != "torch" and dtype == torch.float64:
        pytest.skip("the kernels take no float64")
    monkeypatch.setattr(cosine, "TILE", 16)
    z = condensed(300, 33).to(dtype)
    texts = ragged_texts(300, lengths)
    assert_are(pair_sums(z, texts, impl), parts(z, texts), 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.skipif(bool(cpu.unavailable_reason()), reason=str(cpu.unavailable_reason()))
@pytest.mark.parametrize("lengths", [[2] * 40, [513], [4200, 1, 700]])
def test_the_kernel_gives_the_same_bits_on_any_number_of_threads(lengths: list[int]) -> None:
    z, texts = condensed(5000, 20), ragged_texts(5000, lengths)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            results.append(pair_sums(z, texts, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert_are(results[0], parts(z, texts), 1e-6)
    for other in results[1:]:
        assert torch.equal(other.counts, results[0].counts)
        assert torch.equal(other.sums, results[0].sums)


@pytest.mark.skipif(bool(cpu.unavailable_reason()), reason=str(cpu.unavailable_reason()))
def test_the_kernel_takes_strided_rows_and_refuses_the_rest() -> None:
    z, texts = condensed(120, 48), ragged_texts(120, [60, 33])
    expected = pair_sums(z[:, 16:].contiguous(), texts, "cpu")
    for strided in (z[:, 16:], z.T.contiguous().T[:, 16:]):
        assert torch.equal(pair_sums(strided, texts, "cpu").counts, expected.counts)
    one = torch.tensor([0])
    for wrong, message in (
        ((z.double(), *texts), "float32, bfloat16 or float16"),
        ((z, texts.order.int(), *texts[1:]), "order must be a one-dimensional int64"),
        ((z, texts.order, one, one, texts.ends), "one entry per text"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.cosines(*wrong)
    for beyond in ((z, torch.tensor([0, 120]), one, one, one + 2), (z, texts.order, one, one + 3, one + 2)):
        with pytest.raises(RuntimeError, match="out of range"):
            cpu.cosines(*beyond)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown impl 'gpu'; available: auto, triton, cpu, torch"):
        pair_sums(condensed(4, 2), ragged_texts(4, [4]), "gpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_norms_of_all_sizes_and_zero_tokens(impl: str) -> None:
    z = condensed(60, 24)
    z[3:20] *= 1e20
    z[20:40] *= 1e-25
    z[50:53] = 0
    texts = ragged_texts(60, [60])
    assert_are(pair_sums(z, texts, impl), parts(z, texts), 1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("features", [1, 3, 64, 576])
def test_equal_and_opposite_tokens_are_in_the_outer_bins(features: int, impl: str) -> None:
    z = condensed(1, features).repeat(40, 1) * torch.rand(40, 1).exp()
    z[20:] *= -1
    counts, sums = pair_sums(z, Texts(torch.arange(40), *map(torch.tensor, ([0], [0], [40]))), impl)
    assert counts[0, 1, -1] == 20 * 19
    assert counts[0, 1, :2].sum() == 20 * 20  # -1 by rounding may fall on either side of the first edge
    assert counts.sum() == 40 * 39 // 2
    assert sums[0, 1, 1].item() == pytest.approx(40 * 39 // 2, rel=1e-6)
    assert sums[0, 1, 1].item() <= 40 * 39 // 2


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_that_is_not_finite_makes_its_text_nan_alone(impl: str) -> None:
    for bad in (math.nan, math.inf):
        z = condensed(90, 8)
        z[40, 3] = bad
        texts = Texts(torch.arange(90), *map(torch.tensor, ([0, 30, 60], [1, 31, 60], [30, 60, 90])))
        sums = pair_sums(z, texts, impl).sums
        assert sums.isfinite().all(-1).all(-1).tolist() == [True, False, True]


def test_the_numbers_of_pytorch_repeat() -> None:
    z, texts = condensed(1100, 40), ragged_texts(1100, [1050, 3])
    first = pair_sums(z, texts, "torch")
    for _ in range(3):
        again = pair_sums(z, texts, "torch")
        assert torch.equal(first.counts, again.counts)
        assert torch.equal(first.sums, again.sums)


def moments_by(impl: str, z: torch.Tensor, order: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> cosine._Moments:
    """Moments of tokens in two parts, from a backend."""
    monkeypatch.setattr(cosine, "choose", lambda *_: impl)
    moments = cosine._Moments(z, order[:50])
    for part in (order[:50], order[50:]):
        moments.add(z, part)
    return moments


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl not in GPU_IMPLS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "features"), [(60, 1), (53, 23), (1300, 257), (600, 576)])
def test_moments_are_the_sums_over_tokens(
    tokens: int, features: int, dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against NumPy's matrix products in float64, relative to the products of the norms, as errors of products are."""
    z = condensed(tokens + 9, features).to(dtype)
    order = torch.randperm(tokens + 9, generator=torch.Generator().manual_seed(2))[:tokens]
    moments = moments_by(impl, z, order, monkeypatch)
    x = (z[order].float() - moments.shift).double().numpy()
    lengths = np.linalg.norm(x, axis=0)
    assert np.abs(moments.total.numpy() - x.sum(0)).max() <= 1e-6 * np.abs(x).sum(0).max()
    assert moments.norms == pytest.approx(np.linalg.norm(z[order].double().numpy(), axis=1).sum(), rel=1e-6)
    assert moments.tokens == tokens
    product, height = x.T @ x, moments.BLOCK
    for k, block in zip(range(0, features, height), moments.blocks, strict=True):
        errors = np.triu(block.numpy() - product[k : k + height, k:]) / np.outer(lengths[k : k + height], lengths[k:])
        # PyTorch's sums over all tokens of a call are fp32, the kernel's over at most 512.
        assert np.abs(errors).max() <= (2e-6 if impl == "cpu" else 4e-6)


@pytest.mark.skipif(bool(cpu.unavailable_reason()), reason=str(cpu.unavailable_reason()))
def test_moments_of_the_kernel_are_the_same_bits_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    z, threads = condensed(1500, 300), torch.get_num_threads()
    wide = torch.cat([z, z], 1)  # rows of a wider matrix
    results = []
    try:
        for number, tokens in ((1, z), (2, z), (5, z), (3, wide[:, :300]), (2, wide.T.contiguous().T[:, :300])):
            torch.set_num_threads(number)
            results.append(moments_by("cpu", tokens, torch.arange(1500), monkeypatch))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert other.norms == results[0].norms
        for found, expected in zip([other.total, *other.blocks], [results[0].total, *results[0].blocks], strict=True):
            assert torch.equal(found, expected)


@pytest.mark.skipif(bool(cpu.unavailable_reason()), reason=str(cpu.unavailable_reason()))
def test_moments_refuse_what_does_not_fit() -> None:
    z, order = torch.ones(4, 3), torch.arange(4)
    shift, total, blocks = (
        torch.zeros(3),
        torch.zeros(3).double(),
        [torch.zeros(2, 3).double(), torch.zeros(1, 1).double()],
    )
    cpu.moments(z, order, shift, total, blocks)
    for wrong, message in (
        ((z.double(), order, shift, total, blocks), "float32, bfloat16 or float16"),
        ((z, order.int(), shift, total, blocks), "order must be a one-dimensional int64"),
        ((z, order, shift.double(), total, blocks), "shift must be contiguous, torch.float32"),
        ((z, order, shift, total[:2], blocks), r"total must be contiguous, torch.float64, \(3,\)"),
        ((z, order, shift, total, []), "blocks must be one or more matrices"),
        ((z, order, shift, total, blocks[:1]), "blocks of 2 rows must be 2, got 1"),
        ((z, order, shift, total, [blocks[0], blocks[0]]), r"blocks\[1\] must be contiguous, torch.float64, \(1, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.moments(*wrong)
    with pytest.raises(RuntimeError, match="out of range"):
        cpu.moments(z, order + 1, shift, total, blocks)


def test_texts_are_chosen_by_mask_and_content() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 1, 1, 0, 1]]).bool()
    content = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 1]]).bool()
    texts, rows = select_texts(mask, content)
    assert rows == [0, 2]
    assert texts.order.tolist() == [0, 2, 1, 3, 11, 12, 14]
    assert [bound.tolist() for bound in texts[1:]] == [[0, 4], [2, 5], [4, 7]]


def test_statistics_of_a_layer_over_several_calls() -> None:
    """Mean, deviation, quantiles and geometry of two batches against all pairs at once."""
    z = condensed(200, 150).double()
    layer = LayerSums()
    chosen = [
        Texts(torch.arange(100), *map(torch.tensor, ([0, 50], [1, 50], [50, 100]))),
        Texts(torch.arange(100, 200), *map(torch.tensor, ([0], [3], [100]))),
    ]
    values = []
    for texts in chosen:
        assert layer.add(z, texts) is None
        values += parts(z, texts)
    found = layer.cosines(False, (0.0, 1.0))
    content = layer.cosines(True, (0.0, 1.0))
    assert found is not None
    assert content is not None
    everything = np.concatenate([np.concatenate(pair) for pair in values])
    assert found.pairs == len(everything)
    assert found.text_means == pytest.approx([np.concatenate(pair).mean() for pair in values], abs=1e-12)
    assert found.mean == pytest.approx(np.mean(found.text_means), abs=1e-12)
    assert found.standard_deviation == pytest.approx(everything.std(), abs=1e-12)
    assert found.quantiles == pytest.approx(np.quantile(everything, QUANTILES), abs=2 / BINS)
    assert content.text_means == pytest.approx([content_values.mean() for _, content_values in values], abs=1e-12)
    assert sum(content.histogram) == content.pairs == sum(len(content_values) for _, content_values in values)

    tokens = z[torch.cat([torch.arange(1, 100), torch.arange(103, 200)])].numpy()
    eigenvalues = np.linalg.eigvalsh(np.cov(tokens.T, bias=True))
    shares = eigenvalues / eigenvalues.sum()
    rank, first, norm = layer.geometry()
    assert rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert first == pytest.approx(shares.max(), rel=1e-9)
    assert norm == pytest.approx(np.linalg.norm(tokens, axis=1).mean(), rel=1e-12)


def test_the_covariance_of_condensed_tokens_keeps_its_digits() -> None:
    """fp32 tokens a thousand times as far from zero as from each other."""
    z = torch.randn(400, 20, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 1, 20) + 1000
    layer = LayerSums()
    layer.add(z, Texts(torch.arange(400), *map(torch.tensor, ([0, 200], [0, 200], [200, 400]))))
    eigenvalues = np.linalg.eigvalsh(np.cov(z.double().numpy().T, bias=True))
    assert layer.geometry()[1] == pytest.approx(eigenvalues.max() / eigenvalues.sum(), rel=1e-5)


def test_geometry_of_simple_tokens() -> None:
    one_text = [torch.tensor([0]), torch.tensor([0]), torch.tensor([8])]
    line = LayerSums()
    line.add(torch.arange(8.0)[:, None] * torch.tensor([1.0, 2.0, 2.0]) + 1, Texts(torch.arange(8), *one_text))
    assert line.geometry()[:2] == pytest.approx((1, 1), abs=1e-5)
    cross = LayerSums()
    cross.add(torch.cat([torch.eye(4), -torch.eye(4)]), Texts(torch.arange(8), *one_text))
    assert cross.geometry() == pytest.approx((4, 0.25, 1), abs=1e-6)
    equal = LayerSums()
    equal.add(torch.ones(8, 3), Texts(torch.arange(8), *one_text))
    assert math.isnan(equal.geometry()[0])


def test_the_oracle_is_the_formula() -> None:
    z = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert cosines(z) == pytest.approx(np.array([[1, 0.5**0.5, 0], [0.5**0.5, 1, 0], [0, 0, 0]]))


@pytest.mark.interpreter
@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests of this file run in this process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_triton_in_the_interpreter() -> None:
    """The interpreter has to be chosen before Triton's functions are defined: in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]
    assert " passed" in result.stdout
