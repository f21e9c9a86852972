"""Monitor: it measures what the model computes on its texts, and training does not notice it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dispersion_kernels.condensation import CondensationMonitor, read_records
from dispersion_kernels.gpt2 import GPT2, GPT2Config

TEXTS = ["one two three", "another text, a longer one", "short", "the last one of them"]


def to_bytes(text: str) -> list[int]:
    return list(text.encode())


def small(dropout: float = 0.2) -> GPT2:
    torch.manual_seed(0)
    return GPT2(GPT2Config(layers=3, width=16, heads=2, context=32, vocab=257, dropout=dropout))


def by_hand(model: GPT2, texts: list[Tensor]) -> list[float]:
    """Mean over texts of the mean of all pairs' cosines, of each block, in float64."""
    model = copy.deepcopy(model).eval()
    means = []
    for ids in texts:
        text_means = []
        for z in model(ids[None], return_hidden=True).hidden:
            x = z[0].detach().double().numpy()
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
            text_means.append((x @ x.T)[np.triu_indices(len(x), 1)].mean())
        means.append(text_means)
    return np.mean(means, 0).tolist()  # type: ignore[no-any-return]


def ids_of(texts: list[str]) -> list[Tensor]:
    return [torch.tensor(to_bytes(text)) for text in texts]


def train(model: nn.Module, monitor: Any = None, steps: int = 5) -> list[dict[str, float]]:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    logged = []
    for step in range(steps):
        if monitor is not None:
            logged.append(monitor(step))
        tokens = torch.randint(257, (2, 17))
        model(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return logged


def test_each_measurement_is_that_of_the_model_at_its_step() -> None:
    model = small()
    monitor = CondensationMonitor(model, TEXTS, to_bytes, every=2)
    expected = []

    def measure(step: int) -> dict[str, float]:
        expected.append(by_hand(model, ids_of(TEXTS)))
        return monitor(step)

    logged = train(model, measure)
    assert [record.step for record in monitor.records] == [0, 2, 4]
    for record in monitor.records:
        assert list(record.means) == ["block 1", "block 2", "block 3"]
        assert list(record.means.values()) == pytest.approx(expected[record.step], abs=1e-6)
        scalars = {f"condensation/{name}": mean for name, mean in record.means.items()}
        mean = sum(record.means.values()) / 3
        assert logged[record.step] == {**scalars, "condensation/mean": pytest.approx(mean)}
    assert logged[1] == logged[3] == {}
    assert monitor.records[0].means != monitor.records[-1].means


def test_training_is_the_same_with_and_without_a_monitor() -> None:
    """Dropout draws from the generator, and modes differ between modules."""
    alone, watched = small(), small()
    for model in (alone, watched):
        model.h[1].eval()
    train(alone)
    monitor = CondensationMonitor(watched, TEXTS, to_bytes, every=1)
    train(watched, monitor)
    assert len(monitor.records) == 5
    for one, two in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [module.training for module in alone.modules()] == [module.training for module in watched.modules()]


def test_gradients_under_way_are_untouched() -> None:
    model = small()
    monitor = CondensationMonitor(model, TEXTS, to_bytes)
    tokens = torch.randint(257, (2, 17))
    loss = model(tokens[:, :-1], tokens[:, 1:]).loss
    loss.backward(retain_graph=True)
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    monitor.measure(3)
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    loss.backward()  # the graph of before the measurement is whole


def test_of_many_texts_some_evenly_spread_ones_are_measured() -> None:
    texts = [f"text number {k} of a hundred" for k in range(100)]
    monitor = CondensationMonitor(small(), texts, to_bytes, count=4, max_length=12)
    model = small()
    chosen = [ids[:12] for ids in ids_of([texts[k] for k in (0, 25, 50, 75)])]
    monitor.measure(0)
    assert list(monitor.records[0].means.values()) == pytest.approx(by_hand(model, chosen), abs=1e-6)


def test_batches_of_ids_and_chosen_layers() -> None:
    model = small()
    batch = torch.randint(257, (3, 11), generator=torch.Generator().manual_seed(0))
    monitor = CondensationMonitor(model, [batch], layers=[1, 3])
    assert list(monitor.measure(7)) == ["condensation/block 1", "condensation/block 3", "condensation/mean"]
    expected = by_hand(model, list(batch))
    assert list(monitor.records[0].means.values()) == pytest.approx([expected[0], expected[2]], abs=1e-6)


@pytest.mark.slow
def test_a_compiled_model_is_measured_without_its_graph() -> None:
    model = small()
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, steps=1)  # type: ignore[arg-type]
    monitor = CondensationMonitor(compiled, TEXTS, to_bytes)  # type: ignore[arg-type]
    for step in range(2):
        monitor.measure(step)
        assert list(monitor.records[-1].means.values()) == pytest.approx(by_hand(model, ids_of(TEXTS)), abs=1e-6)
        train(compiled, steps=1)  # type: ignore[arg-type]


def test_what_is_not_finite_is_recorded_and_stops_no_training() -> None:
    model = small()
    with torch.no_grad():
        model.h[1].mlp.c_proj.bias.fill_(torch.nan)  # type: ignore[union-attr]
    means = CondensationMonitor(model, TEXTS, to_bytes).measure(0)
    assert [np.isnan(mean) for mean in means.values()] == [False, True, True, True]


def test_the_records_are_saved_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = small()
    monitor = CondensationMonitor(model, TEXTS, to_bytes, every=2)
    train(model, monitor)
    monitor.save(tmp_path / "records.json")
    assert read_records(tmp_path / "records.json") == monitor.records
    assert monitor.plot(tmp_path / "training.svg").read_text("utf-8").startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"every": 0}, ValueError, "every must be at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every must be an integer, got 1.5"),
        ({"max_length": 1}, ValueError, "max_length must be at least 2"),
        ({"layers": [4]}, ValueError, "layers must be .* numbers from 1 to 3"),
        ({"texts": "one"}, TypeError, "texts must be a list of strings"),
        ({"texts": ["a", ""]}, ValueError, "no text of at least two tokens"),
        ({"texts": []}, ValueError, "no text of at least two tokens"),
        ({"tokenizer": None}, ValueError, "tokenizer is missing"),
    ],
)
def test_what_is_wrong_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CondensationMonitor(**{"model": small(), "texts": TEXTS, "tokenizer": to_bytes, **arguments})
