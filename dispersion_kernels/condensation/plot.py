"""Pictures of embedding condensation: cosines by layer, mean cosines by layer, and mean cosines over training.

The pictures use no global state of matplotlib and need no display. Their colours are perceptually uniform, or Okabe and
Ito's, which stay distinguishable in all common kinds of colour blindness and, by lightness or marker, in grey.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from dispersion_kernels.gpt2.files import replaced

from .records import Record
from .result import BINS, Condensation, CosineStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Tokens = Literal["all", "content"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAP = "magma_r"
"""Colour map with a light background, for paper."""
TOP_DENSITY = 20.0
"""Highest density with a colour of its own: a fifth of the pairs in one bin."""
PANELS = 4
"""Number of panels in a row of a heat map."""


def plot_heat_map(
    condensations: Condensation | Iterable[Condensation],
    path: str | Path,
    *,
    tokens: Tokens = "all",
    title: str = "",
) -> Path:
    """Plots the distribution of the pairwise cosines of each layer: layers down, cosine across, density as colour.

    Each model has a panel. All panels share the range of the cosine and the colours, which grow with the square root of
    the density (white where there is no pair). A line marks the mean cosine of each layer.

    Args:
        condensations: one measurement or several, as a model's and that of its random initialisation.
        path: file of the picture; its suffix selects the format (as .png, .svg or .pdf), PNG without one. The picture
            is written under a temporary name and renamed, so that ``path`` never holds a part of it.
        tokens: ``"all"``, or ``"content"``: without position 0 and special tokens.
        title: title above the panels.

    Returns:
        Path of the picture.

    Raises:
        ValueError: no measurement, a layer without pairs of content tokens, or an unknown format.
        TypeError: an argument of the wrong type.
        ModuleNotFoundError: matplotlib is missing.

    Example::

        plot_heat_map([measure_condensation(model, texts, tokenizer)], "heat_map.pdf")

    Source: Liu et al., ICML 2026, arXiv 2602.00217.
    """
    measured = _measured(condensations)
    picture = Picture(path)
    densities = [np.array([_density(cosines) for cosines in _cosines(one, tokens)]) for one in measured]
    columns = min(PANELS, len(measured))
    rows = math.ceil(len(measured) / columns)
    deepest = max(len(density) for density in densities)
    figure = picture.figure(1.6 + 2.4 * columns, 1.0 + rows * min(max(0.11 * deepest, 1.8), 5.0))
    from matplotlib.colors import PowerNorm

    limits = _range(densities)
    top = min(max(float(density.max()) for density in densities), TOP_DENSITY)
    scale = PowerNorm(0.5, 0.0, top)
    panels: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place, (axes, one, density) in enumerate(zip(panels, measured, densities, strict=False)):
        image = axes.imshow(
            np.ma.masked_equal(density, 0),
            extent=(-1, 1, len(density) - 0.5, -0.5),
            aspect="auto",
            interpolation="nearest",
            cmap=MAP,
            norm=scale,
        )
        means = [cosines.mean for cosines in _cosines(one, tokens)]
        # A white line in a dark one is seen on every colour of the map.
        axes.plot(means, range(len(means)), color="black", linewidth=2.2)
        axes.plot(means, range(len(means)), color="white", linewidth=1.0)
        axes.set_title(_label(one, "\n"), loc="left", fontsize=9)
        _name_layers(axes, [layer.name for layer in one.layers])
        axes.set_xlim(*limits)
        axes.tick_params(axis="x", labelsize=8)
        if place % columns and len(densities[place - 1]) == len(density):
            axes.tick_params(labelleft=False)
        if place + columns >= len(measured):
            axes.set_xlabel("cosine of two tokens", fontsize=9)
    for axes in panels[len(measured) :]:
        axes.remove()
    clipped = any(float(density.max()) > top for density in densities)
    bar = figure.colorbar(
        image, ax=panels[: len(measured)], extend="max" if clipped else "neither", pad=0.02, aspect=30
    )
    bar.set_label("density of the pairs", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return picture.save(figure)


def plot_condensation(
    curves: Mapping[str, Sequence[float] | Condensation] | Condensation | Iterable[Condensation],
    path: str | Path,
    *,
    title: str = "Embedding condensation",
    dashed: Sequence[str] = (),
    tokens: Tokens = "all",
) -> Path:
    """Plots the mean pairwise cosine against the layer, one curve per model.

    A :class:`Condensation` is drawn with the 95% confidence intervals of its means; the embedding is layer 0, and the
    final norm, which is no layer, is left out. A random initialisation has the colour of its model, and is dashed.

    Args:
        curves: measurements, one or several; or a map from a label to a measurement, or to one mean pairwise cosine per
            layer, first layer first.
        path: file of the picture, as in :func:`plot_heat_map`.
        title: title above the axes.
        dashed: labels of the curves drawn thin, grey and dashed, for states to compare with.
        tokens: ``"all"``, or ``"content"``: without position 0 and special tokens; of measurements.

    Returns:
        Path of the picture.

    Raises:
        ValueError: no curve, an empty curve, a label in ``dashed`` that is not in ``curves``, or an unknown format.
        TypeError: an argument of the wrong type.
        ModuleNotFoundError: matplotlib is missing.

    Source: Liu et al., ICML 2026, arXiv 2602.00217.
    """
    lines = _lines(curves, tokens)
    if isinstance(dashed, str) or not isinstance(dashed, Iterable):
        raise TypeError(f"dashed must be a list of labels, got {dashed!r}; give [{dashed!r}]")
    if unknown := set(dashed) - {line.label for line in lines}:
        raise ValueError(f"dashed names {sorted(unknown)}, curves has {[line.label for line in lines]}")
    picture = Picture(path)
    figure = picture.figure(7, 4.2)
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    styles: dict[str, tuple[str, str]] = {}
    for line in lines:
        if line.label in dashed:
            axes.plot(line.layers, line.means, "--", color="0.55", linewidth=1.2, label=line.label)
            continue
        place = len(styles)
        colour, marker = styles.setdefault(line.model, (COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]))
        axes.plot(
            line.layers,
            line.means,
            "--" if line.initialised else "-",
            color=colour,
            linewidth=2,
            marker=marker,
            markersize=5,
            markerfacecolor="white" if line.initialised else colour,
            label=line.label,
        )
        if line.low is not None and line.high is not None:
            axes.fill_between(line.layers, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean pairwise cosine of the tokens")
    axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    every = [value for line in lines for value in line.means if not math.isnan(value)] or [0.0]
    axes.set_ylim(min(0.0, 1.1 * min(every)), min(1.02, max(0.1, 1.25 * max(every))))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return picture.save(figure)


def plot_training(records: Iterable[Record], path: str | Path, *, title: str = "Condensation over training") -> Path:
    """Plots the mean pairwise cosine over training: layers down, optimiser steps across, cosine as colour.

    Args:
        records: measurements of one model at several steps, as of :class:`CondensationMonitor`.
        path: file of the picture, as in :func:`plot_heat_map`.
        title: title above the axes.

    Returns:
        Path of the picture.

    Raises:
        ValueError: fewer than two steps, records of different layers, or an unknown format.
        TypeError: an argument of the wrong type.
        ModuleNotFoundError: matplotlib is missing.
    """
    steps, names, means = _series(records)
    picture = Picture(path)
    figure = picture.figure(7, 1.6 + min(max(0.2 * len(names), 1.6), 6.0))
    axes = figure.add_subplot()
    # Each measurement is drawn around its step, up to half the way to its neighbours.
    middles = [(one + two) / 2 for one, two in pairwise(steps)]
    edges = [steps[0], *middles, steps[-1]]
    values = np.ma.masked_invalid(np.array(means).T)
    image = axes.pcolormesh(edges, np.arange(len(names) + 1) - 0.5, values, cmap=MAP, rasterized=True)
    if values.count():
        image.set_clim(min(0.0, float(values.min())), max(0.1, float(values.max())))
    axes.invert_yaxis()
    _name_layers(axes, names)
    axes.set_xlabel("optimiser step")
    axes.set_title(title, loc="left", fontsize=11)
    figure.colorbar(image, ax=axes, pad=0.02).set_label("mean pairwise cosine")
    return picture.save(figure)


class Picture:
    """File of a picture: its name and format, checked before the drawing, and the way it is written."""

    def __init__(self, path: str | Path) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path must be a string or a path, got {path!r}")
        self.path = Path(path)
        formats = self.figure(1, 1).canvas.get_supported_filetypes()
        self.format = self.path.suffix.lstrip(".").lower() or "png"
        if self.format not in formats:
            raise ValueError(
                f"path ends in .{self.format}, which is no format of a picture; available: {', '.join(formats)}"
            )

    def figure(self, width: float, height: float) -> Figure:
        """Figure of a size in inches. Without pyplot it needs no display, and none stays open."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("drawing needs matplotlib: pip install matplotlib", name=error.name) from error
        return Figure(figsize=(width, height), layout="constrained")

    def save(self, figure: Figure) -> Path:
        with replaced(self.path) as file:
            figure.savefig(file, dpi=160, format=self.format)
        return self.path


def _measured(condensations: Any) -> list[Condensation]:
    given = [condensations] if isinstance(condensations, Condensation) else condensations
    if not isinstance(given, Iterable) or isinstance(given, str | Mapping):
        raise TypeError(f"condensations must be measurements of measure_condensation, got {condensations!r}")
    given = list(given)
    if strangers := [one for one in given if not isinstance(one, Condensation)]:
        raise TypeError(f"condensations must be measurements of measure_condensation, got {strangers[0]!r} among them")
    if not given:
        raise ValueError("condensations is empty; give at least one measurement")
    return given


def _cosines(condensation: Condensation, tokens: Tokens) -> list[CosineStatistics]:
    if tokens not in ("all", "content"):
        raise ValueError(f"tokens must be 'all' or 'content', got {tokens!r}")
    found = []
    for layer in condensation.layers:
        cosines = layer.all_tokens if tokens == "all" else layer.content_tokens
        if cosines is None:
            raise ValueError(
                f"{condensation.model} has no pairs of content tokens measured in {layer.name}; give tokens='all'"
            )
        found.append(cosines)
    return found


def _density(cosines: CosineStatistics) -> list[float]:
    """Density of the pairs in each bin: shares of the pairs over the width of a bin, 2 / BINS."""
    pairs = max(sum(cosines.histogram), 1)
    return [count / pairs * BINS / 2 for count in cosines.histogram]


def _range(densities: Sequence[np.ndarray[Any, Any]]) -> tuple[float, float]:
    """Cosines from and to which a layer of any panel has at least 0.1% of its pairs in a bin, in quarters."""
    occupied = np.flatnonzero(np.concatenate(densities).max(0) >= 0.001 * BINS / 2)
    if not occupied.size:
        return -1.0, 1.0
    low, high = 2 * occupied[0] / BINS - 1, 2 * (occupied[-1] + 1) / BINS - 1
    return math.floor(4 * low) / 4, math.ceil(4 * high) / 4


def _label(condensation: Condensation, between: str = ", ") -> str:
    """Name of the model without the folders before it and the ending of its file."""
    name = Path(condensation.model).name.removesuffix(".gguf") or condensation.model
    return f"{name}{between}random initialisation" if condensation.initialised else name


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    """Ticks at the layers: at each of a few; of many at every fifth, or a multiple, and at those without a number."""
    every = 1 if len(names) <= 14 else 5 * math.ceil(len(names) / 70)
    numbers = [int(name.rpartition(" ")[2]) if name[-1:].isdigit() else 0 for name in names]
    shown = [place for place, number in enumerate(numbers) if number % every == 0]
    if every > 1 and numbers[-1] == 0 and len(names) - 2 in shown:
        shown.remove(len(names) - 2)  # no room beside the final norm
    axes.set_yticks(shown, [names[place] for place in shown], fontsize=8)


class _Line(NamedTuple):
    label: str
    model: str
    """Name that a model and its random initialisation share, or the label."""
    initialised: bool
    layers: list[int]
    means: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


def _lines(curves: Any, tokens: Tokens) -> list[_Line]:
    if isinstance(curves, Condensation):
        curves = [curves]
    if isinstance(curves, Iterable) and not isinstance(curves, Mapping | str):
        curves = list(curves)
        if all(isinstance(curve, Condensation) for curve in curves):
            lines = [_line(_label(curve), curve, tokens) for curve in curves]
            if not lines:
                raise ValueError("curves must hold at least one measurement")
            return lines
    if not isinstance(curves, Mapping):
        raise TypeError(
            "curves must map labels to one number a layer, as {'model': cosines}, or be measurements of "
            f"measure_condensation, got {curves!r}"
        )
    lines = [_line(label, curve, tokens) for label, curve in curves.items()]
    if not lines or not all(line.means for line in lines):
        raise ValueError("curves must hold at least one label with at least one layer")
    return lines


def _line(label: str, curve: Any, tokens: Tokens) -> _Line:
    if not isinstance(curve, Condensation):
        means = _numbers(label, curve)
        return _Line(label, label, False, list(range(1, len(means) + 1)), means)
    chosen = [
        (layer.name, cosines)
        for layer, cosines in zip(curve.layers, _cosines(curve, tokens), strict=True)
        if layer.name != "final norm"
    ]
    layers = [0 if name == "embedding" else int(name.rpartition(" ")[2]) for name, _ in chosen]
    low, high = (list(side) for side in zip(*(cosines.interval for _, cosines in chosen), strict=True))
    return _Line(label, curve.model, curve.initialised, layers, [cosines.mean for _, cosines in chosen], low, high)


def _numbers(label: str, values: Iterable[float]) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"curves[{label!r}] must be numbers, one a layer, got {values!r}") from error


def _series(records: Iterable[Record]) -> tuple[list[int], list[str], list[list[float]]]:
    """Steps in ascending order, names of the layers, and the means ``[steps][layers]``."""
    given = list(records) if isinstance(records, Iterable) else [records]
    if strangers := [one for one in given if not isinstance(one, Record)]:
        raise TypeError(f"records must be those of a CondensationMonitor, got {strangers[0]!r} among them")
    by_step = {record.step: record for record in given}  # of a step measured twice, the last measurement
    if len(by_step) < 2:
        raise ValueError(f"records must be of at least two steps, got {sorted(by_step)}; measure more often")
    steps = sorted(by_step)
    names = list(by_step[steps[0]].means)
    for step in steps:
        if list(by_step[step].means) != names:
            raise ValueError(f"records must be of the same layers: step {step} has {list(by_step[step].means)}")
    return steps, names, [list(by_step[step].means.values()) for step in steps]
