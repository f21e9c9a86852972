"""The closed form of the mean pairwise cosine against the matrix of all cosines."""

import pytest
import torch

from dispersion_kernels.condensation import condensation_by_layer, cosine, mean_pairwise_cosine


def naive(z: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Every cosine, one pair after the other."""
    means = []
    for b in range(z.shape[0]):
        rows = z[b].double() if mask is None else z[b][mask[b]].double()
        cosines = [
            torch.nn.functional.cosine_similarity(rows[i], rows[j], dim=0)
            for i in range(len(rows))
            for j in range(len(rows))
            if i != j
        ]
        if cosines:
            means.append(torch.stack(cosines).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_mean_over_all_pairs(dtype):
    z = (torch.randn(3, 17, 8, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)
    measured = mean_pairwise_cosine(z)
    assert measured.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert measured.item() == pytest.approx(naive(z).item(), abs=1e-12 if dtype == torch.float64 else 1e-6)


def test_masked_tokens_take_no_part_whatever_they_hold():
    z = torch.randn(3, 9, 4, dtype=torch.float64)
    mask = torch.rand(3, 9) < 0.6
    mask[:, :2] = True
    expected = naive(z, mask)
    z[~mask] = torch.nan
    assert mean_pairwise_cosine(z, mask=mask).item() == pytest.approx(expected.item(), abs=1e-12)
    assert mean_pairwise_cosine(z[0], mask=mask[0]).item() == pytest.approx(naive(z[:1], mask[:1]).item(), abs=1e-12)


def test_a_long_sequence_is_measured_in_chunks(monkeypatch):
    z = torch.randn(2, 50, 6, dtype=torch.float64) + 1
    whole = mean_pairwise_cosine(z)
    monkeypatch.setattr(cosine, "CHUNK", 7)
    assert mean_pairwise_cosine(z).item() == pytest.approx(whole.item(), abs=1e-14)


def test_zero_tokens_have_cosine_zero():
    z = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]])
    assert mean_pairwise_cosine(z).item() == pytest.approx(2 / 6)


def test_known_configurations():
    assert mean_pairwise_cosine(torch.ones(1, 5, 3)).item() == pytest.approx(1, abs=1e-6)
    assert mean_pairwise_cosine(torch.eye(4)).item() == pytest.approx(0, abs=1e-6)
    assert mean_pairwise_cosine(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])).item() == pytest.approx(-1, abs=1e-6)


def test_sequences_without_a_pair_do_not_count():
    z = torch.randn(2, 4, 3)
    mask = torch.tensor([[True, True, True, True], [True, False, False, False]])
    assert mean_pairwise_cosine(z, mask=mask).item() == pytest.approx(mean_pairwise_cosine(z[0]).item(), abs=1e-6)
    assert mean_pairwise_cosine(torch.randn(2, 1, 3)).isnan()


def test_layers_are_measured_one_by_one():
    layers = [torch.randn(2, 5, 3) + offset for offset in range(3)]
    assert condensation_by_layer(layers).tolist() == [mean_pairwise_cosine(z).item() for z in layers]
    with pytest.raises(ValueError, match="at least one layer"):
        condensation_by_layer([])


@pytest.mark.parametrize(
    ("z", "mask", "message"),
    [
        (torch.zeros(3), None, r"\[B, L, F\]"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), None, "floating point"),
        (torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool), r"\[2, 3\]"),
        (torch.zeros(2, 3, 4), torch.ones(2, 3), "boolean"),
    ],
)
def test_wrong_arguments_are_named(z, mask, message):
    with pytest.raises(ValueError, match=message):
        mean_pairwise_cosine(z, mask=mask)
