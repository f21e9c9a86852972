"""File of a measurement: what is written is read again, and what is not a measurement is refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispersion_kernels.condensation import BINS, Condensation, CosineStatistics, Layer, PublishedMeasurement, Trend


def measurement() -> Condensation:
    histogram = tuple(n % 7 for n in range(BINS))
    cosines = CosineStatistics(
        pairs=sum(histogram),
        mean=0.25,
        interval=(0.2, 0.3),
        standard_deviation=0.1,
        quantiles=(-0.1, 0.0, 0.2, 0.3, 1 / 3),
        histogram=histogram,
        text_means=(0.2, math.nan, 0.3),
    )
    layers = (
        Layer("embedding", cosines, None, 7.5, 0.25, 3.0),
        Layer("block 1", replace(cosines, mean=0.5), replace(cosines, mean=0.125), 6.5, 0.5, 30.0),
    )
    return Condensation(
        model="a model",
        initialised=True,
        layers=layers,
        trend=Trend(math.nan, (math.nan, math.nan), math.nan, (math.nan, math.nan)),
        texts=3,
        tokens=60,
        skipped=1,
        options={"max_length": 512, "layers": "all"},
        published=PublishedMeasurement(((0.5,) * 128,) * 2, (0.1, 0.2), 1.0, 1.0),
    )


def assert_same(one: Condensation, other: Condensation) -> None:
    """Equality of all fields, with NaN equal to NaN."""
    assert repr(one) == repr(other)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = measurement()
    path = tmp_path / "deep" / "measurement.json"
    text = written.to_json(path)
    assert path.read_text("utf-8") == text == written.to_json()
    assert [file.name for file in path.parent.iterdir()] == ["measurement.json"]
    for source in (text, path, str(path)):
        assert_same(Condensation.from_json(source), written)
    without = replace(written, published=None)
    assert_same(Condensation.from_json(without.to_json()), without)


def test_the_file_is_json_of_the_standard(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    values = json.loads(measurement().to_json(), parse_constant=refuse)
    assert values["layers"][0]["all_tokens"]["text_means"] == [0.2, None, 0.3]
    assert values["format"] == 1


def changed(path: str, value: Any) -> str:
    """JSON of a measurement with another value at the ``path``, or, for ``...``, without it."""
    values = json.loads(measurement().to_json())
    *parents, last = path.split("/")
    at = values
    for key in parents:
        at = at[int(key)] if isinstance(at, list) else at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "path_or_text is not a measurement"),
        (changed("format", 2), "format is 2, this version reads 1"),
        (changed("layers", ...), "it lacks layers"),
        (changed("colour", 3), "it has 'colour'"),
        (changed("layers/1/all_tokens/mean", "0.5"), "mean must be a number, got '0.5'"),
        (changed("layers/1/all_tokens/histogram", [1, 2]), "histogram must be a list of 200"),
        (changed("layers/0/all_tokens/pairs", -1), "pairs must be a count, got -1"),
        (changed("layers/0/mean_norm", ...), "layer 0 lacks mean_norm"),
        (changed("trend", None), "trend is None"),
        (changed("initialised", 1), "initialised is 1"),
        (changed("published/mean_by_layer", [0.1]), "published means must be a list of 2"),
    ],
)
def test_other_content_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Condensation.from_json(text)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Condensation.from_json(tmp_path / "none.json")
    path = tmp_path / "picture.json"
    path.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"picture\.json is not a measurement"):
        Condensation.from_json(path)
    with pytest.raises(TypeError, match="path_or_text must be"):
        Condensation.from_json(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path must be"):
        measurement().to_json(3)  # type: ignore[arg-type]


def test_the_frame_has_a_row_for_each_layer_and_choice_of_tokens() -> None:
    pytest.importorskip("pandas")
    frame = measurement().to_frame()
    assert frame[["layer", "tokens", "mean"]].to_numpy().tolist() == [
        ["embedding", "all", 0.25],
        ["block 1", "all", 0.5],
        ["block 1", "content", 0.125],
    ]
    assert frame["q95"].tolist() == [1 / 3] * 3


def test_the_summary_says_what_was_measured() -> None:
    lines = measurement().summary().splitlines()
    assert lines[0] == "a model, random initialisation: 3 texts, 60 tokens, 1 too short"
    assert lines[2].split() == ["embedding", "0.250", "0.200", "to", "0.300", "0.100", "-", "7.5", "25.0%", "3"]
    assert lines[3].split() == ["block", "1", "0.500", "0.200", "to", "0.300", "0.100", "0.125", "6.5", "50.0%", "30"]
