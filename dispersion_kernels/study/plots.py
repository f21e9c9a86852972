"""Pictures of a sweep's statistics: differences with their intervals, curves with bands over seeds, and trends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..condensation.plot import COLOURS, MARKERS, Picture
from . import inference
from .plan import OUTCOMES

Varied = tuple[tuple[str, Any], ...]

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .stats import Report, Row, Trend

# Curves of a picture beyond which it is unreadable; a picture has the variants of one combination of other options.
MOST_CURVES = len(COLOURS)


def plot_report(report: Report, out: Path) -> Iterator[Path]:
    """Pictures of an experiment, each drawn where there is something to show."""
    if any(comparison.interval for comparison in report.comparisons):
        yield plot_differences(report, out / f"{report.name}-differences.png")
    if report.trends and any(trend.means for trend in report.trends):
        yield plot_trends(report, out / f"{report.name}-trend.png")
    if report.rows:
        yield plot_curves(report, out / f"{report.name}-curves.png")


def plot_differences(report: Report, path: Path) -> Path:
    """Forest plot: a panel for each outcome, a line for each variant and combination of other options."""
    outcomes = list(dict.fromkeys(c.outcome for c in report.comparisons))
    lines = list(dict.fromkeys(name_of(c.variant, c.varied) for c in report.comparisons))
    picture = Picture(path)
    figure = picture.figure(2.2 + 3.2 * len(outcomes), 1.2 + 0.42 * len(lines))
    panels = figure.subplots(1, len(outcomes), squeeze=False, sharey=True)[0]
    for axes, outcome in zip(panels, outcomes, strict=True):
        axes.axvline(0, color="0.6", linewidth=1)
        for c in report.comparisons:
            if c.outcome != outcome or c.interval is None:
                continue
            y = lines.index(name_of(c.variant, c.varied))
            told = c.p_holm is not None and c.p_holm <= inference.LEVEL
            colour = COLOURS[0] if told else "0.45"
            axes.plot(c.differences, [y + 0.2] * len(c.differences), "|", color=colour, alpha=0.5, markersize=6)
            axes.plot(c.interval, [y, y], color=colour, linewidth=2)
            # Filled where the difference may be claimed, so that it shows in grey, too.
            axes.plot(c.mean, y, "o", color=colour, markerfacecolor=colour if told else "white", markersize=7)
        axes.set_title(wrapped(OUTCOMES[outcome]), fontsize=9, loc="left")
        axes.set_xlabel(f"minus that of {report.questions['baseline']!r}", fontsize=9)
        axes.locator_params(axis="x", nbins=5)
        tidy(axes)
    panels[0].set_yticks(range(len(lines)), lines, fontsize=9)
    panels[0].set_ylim(len(lines) - 0.4, -0.6)
    figure.suptitle(
        f"{report.name}: mean difference with 95% interval; filled: p after Holm ≤ {inference.LEVEL}; ticks: seeds",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    return picture.save(figure)


def plot_trends(report: Report, path: Path) -> Path:
    """Outcome against the option of the trend: means over seeds with their intervals, a panel for each outcome."""
    outcomes = list(dict.fromkeys(trend.outcome for trend in report.trends))
    picture = Picture(path)
    # At most three panels beside each other, which a page shows at a readable size.
    across = 3 if len(outcomes) % 3 == 0 else min(len(outcomes), 2)
    down = -(-len(outcomes) // across)
    figure = picture.figure(3.4 * across, 3.3 * down)
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for empty in panels[len(outcomes) :]:
        empty.set_visible(False)
    for axes, outcome in zip(panels, outcomes, strict=False):
        shown = [trend for trend in report.trends if trend.outcome == outcome and trend.means][:MOST_CURVES]
        for number, trend in enumerate(shown):
            columns = [values_at(report.rows, trend, value) for value in trend.values]
            label = name_of(trend.variant, trend.varied) or f"mean of {len(trend.seeds)} seeds"
            band(axes, trend.values, columns, number, label, marker=MARKERS[number])
        option = report.trends[0].option
        if min(shown[0].values) > 0 and max(shown[0].values) >= 8 * min(shown[0].values):
            axes.set_xscale("log", base=2)
            axes.set_xticks(shown[0].values, [f"{value:g}" for value in shown[0].values])
            axes.minorticks_off()
        axes.set_title(wrapped(OUTCOMES[outcome]), fontsize=9, loc="left")
        axes.set_xlabel(option)
        tidy(axes)
    panels[0].legend(frameon=False, fontsize=8)
    return picture.save(figure)


def values_at(rows: list[Row], trend: Trend, value: float) -> list[float]:
    wanted = {**trend.varied, trend.option: value}
    return [
        row[trend.outcome]
        for row in rows
        if row["variant"] == trend.variant and row["varied"] == wanted and row["seed"] in trend.seeds
    ]


def plot_curves(report: Report, path: Path) -> Path:
    """Validation loss against steps and against time, its difference from the baseline, and the cosine of the layers.

    Bands are 95% intervals of the mean over seeds. A row of panels has one combination of other options; experiments
    without variants have one row, with a curve for each combination.
    """
    from .stats import groups, step_seconds

    found = groups(report.rows)
    baseline = report.questions["baseline"]
    named = baseline is not None
    contexts: list[Varied] = list(dict.fromkeys(varied for (_, varied), _ in found)) if named else [()]
    picture = Picture(path)
    columns = 4 if named else 3
    figure = picture.figure(3.5 * columns, 0.4 + 2.9 * len(contexts))
    for line, context in zip(figure.subplots(len(contexts), columns, squeeze=False), contexts, strict=True):
        members = [one for one in found if not named or one[0][1] == context]
        control = {row["seed"]: row for (variant, _), rows in members if variant == baseline for row in rows}
        for number, ((variant, varied), rows) in enumerate(members[:MOST_CURVES]):
            steps = rows[0]["curve"]["step"]
            label = variant if named else name_of(variant, dict(varied))
            losses = list(zip(*(row["curve"]["validation_loss"] for row in rows), strict=True))
            band(line[0], steps, losses, number, label)
            band(line[1], [step * step_seconds(rows) for step in steps], losses, number, label)
            layers = list(zip(*(row["cosine_by_layer"] for row in rows), strict=True))
            band(line[2], list(range(1, len(layers) + 1)), layers, number, label, marker=MARKERS[number])
            before = np.mean([row["initial_cosine_by_layer"] for row in rows], axis=0)
            line[2].plot(range(1, len(before) + 1), before, color=COLOURS[number], linewidth=0.8)
            if named and variant != baseline:
                pairs = [(row, control[row["seed"]]) for row in rows if row["seed"] in control]
                differences = [
                    np.subtract(row["curve"]["validation_loss"], other["curve"]["validation_loss"])
                    for row, other in pairs
                    if row["curve"]["step"] == other["curve"]["step"]
                ]
                if differences:
                    band(line[3], steps, list(zip(*differences, strict=True)), number, label)
        where = name_of("", dict(context))
        clock = members[0][1][0].get("clock", "wall")
        for axes, x, y in zip(
            line,
            ("step", f"{clock} seconds of training", "layer", "step"),
            (
                "validation loss",
                "validation loss",
                "mean cosine (thin: before training)",
                f"loss minus that of {baseline!r}",
            ),
            strict=False,
        ):
            axes.set_xlabel(x, fontsize=9)
            axes.set_ylabel(y, fontsize=9)
            tidy(axes)
        line[0].set_title(where, fontsize=9, loc="left")
        if named:
            line[3].axhline(0, color="0.6", linewidth=1)
        line[0].legend(frameon=False, fontsize=8)
    return picture.save(figure)


def band(axes: Axes, x: Any, columns: list[Any], number: int, label: str, marker: str = "") -> None:
    """Curve of means, with the interval of each mean where there are several seeds."""
    colour = COLOURS[number]
    means = [float(np.mean(column)) for column in columns]
    axes.plot(x, means, color=colour, linewidth=1.8, label=label, marker=marker, markersize=4, linestyle=STYLES[number])
    if len(columns[0]) > 1:
        bounds = np.array([inference.mean_interval([float(value) for value in column]) for column in columns])
        axes.fill_between(x, bounds[:, 0], bounds[:, 1], color=colour, alpha=0.18, linewidth=0)


# Line styles beside colours, for print in grey.
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def name_of(variant: str, varied: dict[str, Any]) -> str:
    return ", ".join([*([variant] if variant else []), *(f"{key} {value}" for key, value in varied.items())])


def wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 34))


def tidy(axes: Axes) -> None:
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
