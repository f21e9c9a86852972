"""Pictures: what they show is what was measured; their files are whole, of the format of the name, or not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from measurements import condensation_of

from dispersion_kernels.condensation import (
    Condensation,
    Record,
    plot,
    plot_condensation,
    plot_heat_map,
    plot_training,
    read_records,
    write_records,
)

pytest.importorskip("matplotlib")


def cosines(seed: int, layers: int = 4, texts: int = 3) -> list[np.ndarray]:
    """Cosines ``[texts, 40]`` of each layer, which grow with the layer."""
    random = np.random.default_rng(seed)
    return [np.clip(random.normal(0.2 * layer, 0.1, (texts, 40)), -1, 1) for layer in range(layers)]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures that were saved, in order."""
    kept: list[Any] = []
    save = plot.Picture.save

    def keeping(self: Any, figure: Any) -> Path:
        kept.append(figure)
        return save(self, figure)

    monkeypatch.setattr(plot.Picture, "save", keeping)
    # Drawing needs no pyplot, and so no display.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    return kept


RECORDS = [Record(step, {"block 1": step / 1000, "block 2": 0.5 - step / 1000}) for step in (0, 100, 150)]
DRAWN = {
    "heat map": lambda path: plot_heat_map(condensation_of(cosines(0)), path),
    "curves": lambda path: plot_condensation({"before": [0.1, 0.2], "with": [0.2, -0.1]}, path, dashed=["before"]),
    "training": lambda path: plot_training(RECORDS, path),
}


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize(
    ("name", "begins"), [("a.png", b"\x89PNG"), ("a", b"\x89PNG"), ("a.SVG", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_the_suffix_chooses_the_format_and_nothing_else_is_left(
    kind: str, name: str, begins: bytes, tmp_path: Path, figures: list[Any]
) -> None:
    path = DRAWN[kind](tmp_path / "deep" / name)
    assert path.read_bytes().startswith(begins)
    assert [file.name for file in path.parent.iterdir()] == [name]


@pytest.mark.parametrize("kind", DRAWN)
def test_a_picture_that_fails_leaves_the_old_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    path = DRAWN[kind](tmp_path / "picture.png")
    old = path.read_bytes()

    def broken(self: Figure, target: Any, **options: object) -> None:
        target.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", broken)
    with pytest.raises(OSError, match=r"picture\.png cannot be written .no space"):
        DRAWN[kind](path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_a_heat_map_shows_the_density_of_each_layer_on_one_scale(tmp_path: Path, figures: list[Any]) -> None:
    trained, initialised = cosines(0), cosines(1)
    initialised[0] = np.full((3, 40), 0.005)  # all of a layer in one bin, of density 100
    models = [condensation_of(trained, "a/b/model.gguf"), condensation_of(initialised, "a/b/model.gguf", True)]
    plot_heat_map(models, tmp_path / "a.png", title="of two")
    (figure,) = figures
    one, two, bar = figure.axes
    for axes, given in ((one, trained), (two, initialised)):
        expected = [np.histogram(layer, 200, (-1, 1), density=True)[0] for layer in given]
        (image,) = axes.images
        np.testing.assert_allclose(image.get_array().filled(0), expected, rtol=1e-12)
        assert image.get_extent() == [-1, 1, 3.5, -0.5]  # the embedding on top
        assert image.norm is one.images[0].norm
        for line in axes.lines:
            np.testing.assert_allclose(line.get_xdata(), [layer.mean(1).mean() for layer in given], rtol=1e-12)
            assert list(line.get_ydata()) == [0, 1, 2, 3]
    assert (one.images[0].norm.vmin, one.images[0].norm.vmax) == (0, plot.TOP_DENSITY)
    assert bar.get_ylabel() == "density of the pairs"
    assert one.get_xlim() == two.get_xlim()
    low, high = one.get_xlim()
    assert low <= min(map(np.min, trained)) < low + 0.25
    assert high - 0.25 < max(map(np.max, trained + initialised)) <= high
    titles = [axes.get_title("left") for axes in (one, two)]
    assert titles == ["model", "model\nrandom initialisation"]
    assert [label.get_text() for label in one.get_yticklabels()] == ["embedding", "block 1", "block 2", "block 3"]


@pytest.mark.parametrize(("layers", "shown"), [(5, 5), (31, 7), (151, 11)])
def test_the_names_of_many_layers_have_room(layers: int, shown: int, tmp_path: Path, figures: list[Any]) -> None:
    plot_heat_map(condensation_of(cosines(0, layers)), tmp_path / "a.png")
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert len(names) == shown
    assert (names[0], names[-1]) == ("embedding", f"block {layers - 1}")


def test_more_models_than_a_row_has_panels(tmp_path: Path, figures: list[Any]) -> None:
    plot_heat_map([condensation_of(cosines(k, 2 + k), f"model {k}") for k in range(5)], tmp_path / "a.png")
    *panels, _ = figures[0].axes
    assert [axes.get_title("left") for axes in panels] == [f"model {k}" for k in range(5)]


def test_measurements_are_curves_with_intervals(tmp_path: Path, figures: list[Any]) -> None:
    trained, initialised = cosines(0), cosines(1)
    models = [condensation_of(trained, "m"), condensation_of(initialised, "m", True), condensation_of(cosines(2), "n")]
    plot_condensation(models, tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["m", "m, random initialisation", "n"]
    for line, band, given in zip(axes.lines, axes.collections, (trained, initialised), strict=False):
        means = np.array([layer.mean(1) for layer in given])
        assert list(line.get_xdata()) == [0, 1, 2, 3]
        np.testing.assert_allclose(line.get_ydata(), means.mean(1))
        corners = band.get_paths()[0].vertices
        for layer, layer_means in enumerate(means):
            at = corners[corners[:, 0] == layer, 1]
            np.testing.assert_allclose((at.min(), at.max()), (layer_means.min(), layer_means.max()))
    colours = [line.get_color() for line in axes.lines]
    assert colours[0] == colours[1] != colours[2]
    assert [line.get_linestyle() for line in axes.lines] == ["-", "--", "-"]
    plot_condensation({"label": models[0], "numbers": [0.5, 0.6]}, tmp_path / "a.png")
    (axes,) = figures[1].axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 1, 2, 3], [1, 2]]


def test_training_is_layer_by_step(tmp_path: Path, figures: list[Any]) -> None:
    plot_training(reversed(RECORDS), tmp_path / "a.png")
    axes, bar = figures[0].axes
    (mesh,) = axes.collections
    np.testing.assert_allclose(mesh.get_array(), [[0, 0.1, 0.15], [0.5, 0.4, 0.35]])
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [0, 50, 125, 150])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["block 1", "block 2"]
    assert axes.get_ylim() == (1.5, -0.5)
    assert mesh.get_clim() == (0, 0.5)
    assert bar.get_ylabel() == "mean pairwise cosine"


def test_a_nan_in_training_is_left_white(tmp_path: Path, figures: list[Any]) -> None:
    broken = Record(200, {"block 1": float("nan"), "block 2": 0.2})
    plot_training([*RECORDS, broken], tmp_path / "a.png")
    assert figures[0].axes[0].collections[0].get_array().mask.sum() == 1


def test_wrong_measurements_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match="condensations is empty"):
        plot_heat_map([], path)
    with pytest.raises(TypeError, match=r"condensations must be measurements.*got 'a\.json'"):
        plot_heat_map("a.json", path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got 3 among them"):
        plot_heat_map([3], path)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="model has no pairs of content tokens measured in embedding"):
        plot_heat_map(condensation_of(cosines(0), content=False), path, tokens="content")
    with pytest.raises(ValueError, match="tokens must be 'all' or 'content', got 'some'"):
        plot_heat_map(condensation_of(cosines(0)), path, tokens="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"path ends in \.doc, which is no format"):
        plot_heat_map(condensation_of(cosines(0)), tmp_path / "a.doc")
    with pytest.raises(ValueError, match="at least one"):
        plot_condensation({}, path)
    with pytest.raises(ValueError, match="at least one"):
        plot_condensation([], path)
    with pytest.raises(ValueError, match="at least one"):
        plot_condensation({"a": []}, path)
    with pytest.raises(ValueError, match="dashed names"):
        plot_condensation({"a": [1.0]}, path, dashed=["b"])
    with pytest.raises(ValueError, match=r"at least two steps, got \[100\]"):
        plot_training(RECORDS[1:2], path)
    with pytest.raises(ValueError, match=r"step 200 has \['block 1'\]"):
        plot_training([*RECORDS, Record(200, {"block 1": 0.5})], path)
    with pytest.raises(TypeError, match=r"records must be those of a CondensationMonitor, got 3"):
        plot_training(3, path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        plot_condensation({"a": [1.0]}, tmp_path / "a.png")


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.json"
    write_records([*RECORDS, Record(200, {"block 1": float("nan"), "block 2": 1.0})], path)
    *same, last = read_records(path)
    assert same == RECORDS
    assert repr(last.means) == "{'block 1': nan, 'block 2': 1.0}"


def test_records_of_the_trainer_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 10, "cosine": [0.7, 0.3], "validation_cosine": [0.5, 0.25]}\n{"step": 20, "cosine": [1, 1]}\n',
        "utf-8",
    )
    assert read_records(path) == [Record(10, {"block 1": 0.5, "block 2": 0.25})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value"),
        ("[]", "list indices"),
        ("{}", "it lacks 'format'"),
        ('{"format": 2, "records": []}', "its format is 2"),
        ('{"format": 1, "records": [{"step": -1, "means": {}}]}', "step must be a count, got -1"),
        ('{"format": 1, "records": [{"step": 1, "means": {"block 1": "x"}}]}', "a mean must be a number, got 'x'"),
    ],
)
def test_damaged_records_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=rf"records\.json does not hold condensation over training \({message}"):
        read_records(path)


def test_a_measurement_read_again_gives_the_same_picture(tmp_path: Path) -> None:
    measured = condensation_of(cosines(0))
    again = Condensation.from_json(measured.to_json())
    first, second = plot_heat_map(measured, tmp_path / "1.png"), plot_heat_map(again, tmp_path / "2.png")
    assert first.read_bytes() == second.read_bytes()
