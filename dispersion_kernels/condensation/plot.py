"""Pictures of embedding condensation."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def _numbers(label: str, values: Iterable[float]) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"curves[{label!r}] must be numbers, one a layer, got {values!r}") from error


# Okabe and Ito's palette, distinguishable in all common kinds of colour blindness; markers distinguish in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_condensation(
    curves: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    title: str = "Embedding condensation",
    dashed: Sequence[str] = (),
) -> Path:
    """Plots the mean pairwise cosine against the layer, one curve per label.

    Args:
        curves: map from a label to one mean pairwise cosine per layer, first layer first.
        path: file of the picture; its suffix selects the format, PNG without one. The picture is written under a
            temporary name and renamed, so that ``path`` never holds a part of it.
        title: title above the axes.
        dashed: labels of the curves drawn thin, grey and dashed, for states to compare with.

    Raises:
        ValueError: no curve, an empty curve, a label in ``dashed`` that is not in ``curves``, or an unknown format.
        TypeError: an argument of the wrong type.
        ModuleNotFoundError: matplotlib is missing.

    Source: Liu et al., ICML 2026, arXiv 2602.00217.
    """
    if not isinstance(curves, Mapping):
        raise TypeError(f"curves must map labels to one number a layer, got {curves!r}; as {{'model': cosines}}")
    curves = {label: _numbers(label, values) for label, values in curves.items()}
    if not curves or not all(curves.values()):
        raise ValueError("curves must hold at least one label with at least one layer")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a string or a path, got {path!r}")
    if isinstance(dashed, str) or not isinstance(dashed, Iterable):
        raise TypeError(f"dashed must be a list of labels, got {dashed!r}; give [{dashed!r}]")
    if unknown := set(dashed) - set(curves):
        raise ValueError(f"dashed names {sorted(unknown)}, curves has {list(curves)}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'drawing needs matplotlib: pip install "dispersion-kernels[gpt2]"', name=error.name
        ) from error

    # A Figure without pyplot needs no display, changes no global state, and leaves no figure open.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if (ending := Path(path).suffix.lstrip(".").lower() or "png") not in formats:
        raise ValueError(f"path ends in .{ending}, which is no format of a picture; available: {', '.join(formats)}")
    axes = figure.add_subplot()
    coloured = iter(zip(COLOURS * len(curves), MARKERS * len(curves), strict=True))
    for label, values in curves.items():
        layers = range(1, len(values) + 1)
        if label in dashed:
            axes.plot(layers, values, "--", color="0.55", linewidth=1.2, label=label)
        else:
            colour, marker = next(coloured)
            axes.plot(layers, values, color=colour, marker=marker, markersize=5, linewidth=2, label=label)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean pairwise cosine of the tokens")
    axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    every = [value for values in curves.values() for value in values]
    axes.set_ylim(min(0.0, 1.1 * min(every)), min(1.02, max(0.1, 1.25 * max(every))))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=160, format=ending)
    os.replace(temporary, path)
    return path
