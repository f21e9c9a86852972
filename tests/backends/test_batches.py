"""Short documents and packed sequences on the torch backend: those of like length are swept together."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import POTENTIALS, assert_as_accurate_as_naive, evaluate, oracle, slow_but_first
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dispersion_kernels import DispersiveL2, Potential
from dispersion_kernels.backends import batches, torch_tiled
from dispersion_kernels.segments import host_segments

LENGTHS = [5, 0, 1, 33, 2, 1, 12, 33, 5, 5, 70, 2]


def bounds(lengths: list[int]) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("few", [1, 1000, 2**17])
@pytest.mark.parametrize("documents", [False, True])
def test_every_run_of_two_is_in_one_batch(documents: bool, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "_FEW_PAIRS", few)
    tokens = sum(LENGTHS)
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[torch.randperm(tokens)]
    runs = host_segments(1, tokens, ids[None] if documents else None, None if documents else bounds(LENGTHS))
    z, out, seen = torch.randn(tokens, 3), torch.zeros(tokens, 3), Counter[int]()
    for part in batches.batches(runs):
        gathered = part.gathered(z)
        rows, size = part.shape
        there = torch.ones(rows, size, dtype=torch.bool) if part.pair_ids is None else part.pair_ids == 0
        for row, is_token in zip(gathered, there, strict=True):
            seen[int(is_token.sum())] += 1
            if documents:
                (id_of_row,) = {int(ids[(z == token).all(1)]) for token in row[is_token]}
                assert torch.equal(row[is_token], z[ids == id_of_row])
        assert part.pair_ids is None or rows * size**2 <= few
        part.scatter(gathered, out)
    assert seen == Counter(length for length in LENGTHS if length > 1)
    left_out = (out == 0).all(1)
    assert torch.equal(out[~left_out], z[~left_out])
    assert int(left_out.sum()) == LENGTHS.count(1)


@pytest.mark.parametrize("few", [1, 2**17], ids=["a batch a length", "one batch"])
@pytest.mark.parametrize("potential", slow_but_first(POTENTIALS.values(), POTENTIALS))
def test_lengths_that_differ(potential: Potential, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several documents each, in several batches, and packed sequences, of exponents that differ by far."""
    monkeypatch.setattr(batches, "_FEW_PAIRS", few)
    tokens = sum(LENGTHS)
    z = torch.randn(2, tokens, 24)
    z[0, 50:] *= 3
    ids = torch.stack(
        [torch.arange(-1, 11).repeat_interleave(torch.tensor(LENGTHS))[torch.randperm(tokens)] for _ in z]
    )
    mask = torch.rand(tokens) > 0.2
    upstream = torch.rand(len(LENGTHS)) + 0.5
    cases: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (z, upstream[:2], {"document_ids": ids}),
        (z.transpose(1, 2).contiguous().transpose(1, 2), upstream[:2], {"mask": mask.expand(2, -1)}),
        (z[0], upstream, {"cu_seqlens": bounds(LENGTHS)}),
        (z[0], upstream, {"cu_seqlens": bounds(LENGTHS), "mask": mask}),
    ]
    for case, reduction, options in cases:
        answer = evaluate(case, potential, reduction, impl="torch", **options)
        exact = oracle(case, potential, reduction, **options)
        assert_as_accurate_as_naive(case, potential, answer, exact, **options)
        again = evaluate(case, potential, reduction, impl="torch", **options)
        assert torch.equal(answer.grad, again.grad)
        assert torch.equal(answer.loss, again.loss)


@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_bounds_on_the_cpu_of_tokens_elsewhere(potential: Potential) -> None:
    """Packed tokens on an accelerator, swept with their neighbours of the same length."""
    lengths = [4, 4, 4, 0, 0, 1, 30, 7, 7]
    z, packed = torch.randn(1, sum(lengths), 24), bounds(lengths)
    mask = (torch.rand(1, sum(lengths)) > 0.2).long() - 1
    for pair_ids in (None, mask):
        together = torch_tiled.sweep(z, potential, pair_ids, packed, True)
        stretches = torch_tiled._sweep_stretches(z, potential, pair_ids, packed, True)
        assert torch.equal(together.pairs, stretches.pairs)
        torch.testing.assert_close(together.loss, stretches.loss)
        grads = []
        for result in (together, stretches):
            assert result.grad is not None
            assert result.scale is not None
            grads.append(result.grad * result.scale.unsqueeze(-1))
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
        assert torch_tiled._sweep_stretches(z, potential, pair_ids, packed, False).grad is None
    meta = torch_tiled.sweep(z.to("meta"), potential, mask.to("meta"), packed, True)
    assert meta.grad is not None
    assert (meta.loss.shape, meta.grad.shape) == ((len(lengths),), z.shape)


class _Operators(TorchDispatchMode):
    """How many run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("potential", ["angular_spread", "l2_repel", "decorrelation", "perplexity_entropy"])
def test_a_thousand_documents_take_no_more_operators_than_some(potential: str) -> None:
    """The cost of short sequences is that of operators: one by one, a thousand of 16 tokens took a hundred times as
    long as a tensor ``[1024, 16, F]``."""
    counts = []
    for documents in (16, 1024):
        ids = torch.arange(documents).repeat_interleave(16)
        z = torch.randn(1, 16 * documents, 8)
        for pair_ids, packed in ((ids[None], None), (None, bounds([16] * documents))):
            with _Operators() as operators:
                torch_tiled.sweep(z, POTENTIALS[potential], pair_ids, packed, True)
            counts.append(operators.count)
    assert counts[2] <= 1.2 * counts[0]
    assert counts[3] <= 1.2 * counts[1]


def test_a_sequence_that_is_not_finite_leaves_the_others_alone() -> None:
    """Equal tokens far from zero, whose distance is the rounding of products, beside squares that overflow."""
    z = torch.randn(24, 64)
    z[12] = 1e15 * torch.randn(64)
    z[13:18] = z[18:23]
    bounds_of_two = bounds([12, 12])
    potential = DispersiveL2(tau=0.01, include_diagonal=False)
    alone = evaluate(z, potential, impl="torch", cu_seqlens=bounds_of_two)
    z[5] = 1e20  # the squares overflow
    beside = evaluate(z, potential, impl="torch", cu_seqlens=bounds_of_two)
    assert beside.loss[0].isnan()
    assert beside.loss[1] == alone.loss[1]
    assert torch.equal(beside.grad[12:], alone.grad[12:])
