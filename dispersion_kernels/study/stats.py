"""Command ``dispersion stats``: what a sweep's results say about the questions in its TOML file.

Each experiment has a family of tests: every variant against the baseline, at equal other options, in every outcome, and
the trend with an option. P-values are corrected over the family.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..gpt2.options import folder
from . import inference
from .plan import OUTCOMES
from .table import FORMAT, write_whole

Row = dict[str, Any]


def register(commands: Any) -> None:
    """Adds the subcommand to the parsers of ``dispersion``."""
    parser = commands.add_parser(
        "stats",
        help="what the results of a sweep show",
        description="Compare the variants of a sweep with its baseline over seeds: paired differences, bootstrap "
        "intervals, permutation tests with Holm's correction, and the sentences that may be said.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("results", type=folder, help="folder of a sweep, or its results.json")
    parser.add_argument(
        "-o", "--out", type=folder, metavar="DIR", help="of tables and pictures (default: the results')"
    )


def run(options: argparse.Namespace) -> int:
    from .plots import plot_report

    file = options.results / "results.json" if options.results.is_dir() else options.results
    results = read_results(file)
    out = options.out or file.parent
    reports = [Report.of(name, questions, results["rows"]) for name, questions in results["experiments"].items()]
    write_whole(out / "stats.json", json.dumps([report.content() for report in reports], indent=2))
    write_whole(out / "stats.md", "\n\n".join([*(report.markdown() for report in reports), METHOD]))
    pictures = [picture for report in reports for picture in plot_report(report, out)]
    for report in reports:
        print(f"{report.name}:", *(f"- {sentence}" for sentence in report.sentences()), sep="\n")
    print("written:", *(out / "stats.md", out / "stats.json", *pictures))
    return 0


def read_results(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; give the folder of a sweep, or its results.json")
    try:
        results: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if results["format"] != FORMAT:
            raise ValueError(f"its format is {results['format']}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not the results.json of a sweep in format {FORMAT} ({error}); run dispersion sweep again"
        ) from error
    return results


@dataclass(frozen=True)
class Comparison:
    """A variant and the baseline, paired by seed. Differences are variant minus baseline."""

    outcome: str
    variant: str
    baseline: str
    varied: dict[str, Any]
    seeds: list[int]
    unpaired: list[int]
    variant_mean: float
    baseline_mean: float
    differences: list[float]
    mean: float
    interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None = None
    tests: int = 0
    detectable: float | None = None
    """Smallest mean difference that these seeds would have shown with power 0.8; None where they cannot show any."""

    def corrected(self, p_holm: float, tests: int) -> Comparison:
        effect = inference.detectable_effect(len(self.seeds), tests) * statistics.stdev(self.differences)
        return replace(self, p_holm=p_holm, tests=tests, detectable=effect if math.isfinite(effect) else None)

    def sentence(self) -> str:
        what = f"{OUTCOMES[self.outcome]} of {self.variant!r}{at(self.varied)}"
        left_out = f" Seeds without a partner: {', '.join(map(str, self.unpaired))}." if self.unpaired else ""
        if not self.seeds:
            return f"Nothing can be said of the {what}: no seed has finished in it and in {self.baseline!r}.{left_out}"
        if self.interval is None or self.p_holm is None:
            return (
                f"Nothing can be said of the {what}: there is one seed (its difference from {self.baseline!r} is "
                f"{self.mean:+.4g}).{left_out}"
            )
        low, high = self.interval
        numbers = (
            f"95% interval {low:+.4g} to {high:+.4g}; p = {self.p_holm:.2g} after Holm over "
            f"{counted(self.tests, 'test')}; {len(self.seeds)} seeds"
        )
        if self.p_holm <= inference.LEVEL:
            direction = "lower" if self.mean < 0 else "higher"
            return (
                f"The {what} is {direction} than that of {self.baseline!r} by {abs(self.mean):.4g} "
                f"({numbers}).{left_out}"
            )
        if math.isinf(inference.detectable_effect(len(self.seeds), self.tests)):
            needed = inference.seeds_needed(self.tests)
            few = f"{len(self.seeds)} seeds in {counted(self.tests, 'test')}"
            power = f"No difference can be shown by {few}; it takes {needed}"
        else:
            power = (
                f"A mean difference of {self.detectable:.3g} would have been found with probability {inference.POWER}"
            )
        return (
            f"Cannot tell whether the {what} differs from that of {self.baseline!r}: {self.mean:+.4g} ({numbers}). "
            f"{power}.{left_out}"
        )


@dataclass(frozen=True)
class Trend:
    """Spearman's correlation of an outcome with an option, by seed."""

    outcome: str
    variant: str
    varied: dict[str, Any]
    option: str
    values: list[float]
    seeds: list[int]
    incomplete: list[int]
    """Seeds that lack a value of the option, and are left out."""
    means: list[float]
    correlation: float
    interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None = None
    tests: int = 0

    def corrected(self, p_holm: float, tests: int) -> Trend:
        return replace(self, p_holm=p_holm, tests=tests)

    def sentence(self) -> str:
        name = f" of {self.variant!r}" if self.variant else ""
        what = f"{OUTCOMES[self.outcome]}{name}{at(self.varied)}"
        left_out = f" Seeds without all runs: {', '.join(map(str, self.incomplete))}." if self.incomplete else ""
        if self.interval is None or self.p_holm is None:
            few = counted(len(self.seeds), "seed")
            return f"Nothing can be said of the trend of the {what} with {self.option}: {few}.{left_out}"
        low, high = self.interval
        numbers = (
            f"mean Spearman correlation {self.correlation:+.2f}, 95% interval {low:+.2f} to {high:+.2f}; "
            f"p = {self.p_holm:.2g} after Holm over {counted(self.tests, 'test')}; {len(self.seeds)} seeds"
        )
        if self.p_holm <= inference.LEVEL:
            return (
                f"The {what} {'rises' if self.correlation > 0 else 'falls'} with {self.option} ({numbers}).{left_out}"
            )
        return f"Cannot tell whether the {what} rises or falls with {self.option} ({numbers}).{left_out}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def at(varied: dict[str, Any]) -> str:
    return " at " + ", ".join(f"{key} {value}" for key, value in varied.items()) if varied else ""


@dataclass(frozen=True)
class Report:
    """Answers to the questions of one experiment."""

    name: str
    questions: dict[str, Any]
    rows: list[Row]
    comparisons: list[Comparison]
    trends: list[Trend]

    @classmethod
    def of(cls, name: str, questions: dict[str, Any], rows: list[Row]) -> Report:
        rows = [row for row in rows if row["experiment"] == name]
        answers: list[Comparison | Trend] = [*comparisons(questions, rows), *trends(questions, rows)]
        tested = [index for index, answer in enumerate(answers) if answer.p is not None]
        p_values = inference.holm([answers[index].p or 0.0 for index in tested])
        for index, p_holm in zip(tested, p_values, strict=True):
            answers[index] = answers[index].corrected(p_holm, len(tested))
        return cls(
            name,
            questions,
            rows,
            [answer for answer in answers if isinstance(answer, Comparison)],
            [answer for answer in answers if isinstance(answer, Trend)],
        )

    def sentences(self) -> list[str]:
        answers: list[Comparison | Trend] = [*self.comparisons, *self.trends]
        return [*self.warnings(), *(answer.sentence() for answer in answers)]

    def warnings(self) -> list[str]:
        """Warnings: differences between the rows of one experiment other than its settings, and missing runs."""
        said = []
        if missing := self.questions["missing"]:
            said.append(f"{len(missing)} of {len(missing) + len(self.rows)} runs are missing, as {missing[0]}.")
        for column, what in (("source", "versions of the code"), ("torch", "versions of PyTorch")):
            if len(found := sorted({row[column] for row in self.rows})) > 1:
                said.append(f"The runs are of {len(found)} {what}: {', '.join(found)}.")
        if len(found := sorted({f"{row['processor']}, {row['threads']} threads" for row in self.rows})) > 1:
            said.append(f"Times are of {len(found)} machines or numbers of threads: {'; '.join(found)}.")
        return said

    def content(self) -> dict[str, Any]:
        def content(answer: Comparison | Trend) -> dict[str, Any]:
            values = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(answer).items()}
            return {**values, "sentence": answer.sentence()}

        answers: dict[str, list[Any]] = {"comparisons": list(self.comparisons), "trends": list(self.trends)}
        listed = {name: [content(answer) for answer in found] for name, found in answers.items()}
        return {"experiment": self.name, "warnings": self.warnings(), **listed}

    def markdown(self) -> str:
        parts = [f"## {self.name}", "\n".join(f"- {sentence}" for sentence in self.sentences())]
        if self.comparisons:
            parts.append(
                table(
                    "variant, at, outcome, seeds, baseline, variant, difference, interval, p, Holm's p, detectable",
                    [
                        [
                            c.variant,
                            at(c.varied).removeprefix(" at "),
                            OUTCOMES[c.outcome],
                            len(c.seeds),
                            *(shown(value) for value in (c.baseline_mean, c.variant_mean, c.mean)),
                            "" if c.interval is None else f"{c.interval[0]:.4g} to {c.interval[1]:.4g}",
                            *(shown(value) for value in (c.p, c.p_holm, c.detectable)),
                        ]
                        for c in self.comparisons
                    ],
                )
            )
        if self.rows:
            parts.append(self.means())
        return "\n\n".join(parts)

    def means(self) -> str:
        """Table of mean and standard deviation over seeds, of every group of runs and outcome."""
        outcomes = [name for name in self.questions["outcomes"] if name in self.rows[0]]
        lines = []
        for (variant, varied), rows in groups(self.rows):
            cells = [variant, at(dict(varied)).removeprefix(" at "), len(rows)]
            for name in outcomes:
                values = [row[name] for row in rows if is_finite(row[name])]
                spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
                fewer = f" ({counted(len(values), 'seed')})" if len(values) < len(rows) else ""
                cells.append(f"{statistics.mean(values):.4g}{spread}{fewer}" if values else fewer.strip(" ()"))
            lines.append([*cells, f"{float(f'{1e3 * step_seconds(rows):.3g}'):g}"])
        return table(f"variant, at, seeds, {', '.join(OUTCOMES[name] for name in outcomes)}, ms a step", lines)


METHOD = f"""## Method

- Differences are variant minus baseline, paired by seed. Intervals of the mean are expanded percentile bootstrap
  intervals at 95% ({inference.RESAMPLES:,} resamples), each for itself, uncorrected.
- p is that of the permutation test that flips the signs of pairs, two-sided, exact up to 16 seeds; of a trend, that of
  Page's test with seeds as blocks. Holm's correction is over all tests of an experiment.
- Detectable is the mean difference that the test finds with probability {inference.POWER} at the level of Holm's first
  step, by simulation of normal differences of the measured standard deviation.
- Times are of processors on a CPU, which other work on the machine changes little, over all threads of a run, without
  the steps that measure something; on a GPU they are those of a clock.
- A seed of which a value is not finite has no partner.
- At equal time: each variant takes the median time of its steps; losses are interpolated at the time when the faster
  variant ends, whose learning rate has then fallen further.
"""


def comparisons(questions: dict[str, Any], rows: list[Row]) -> Iterator[Comparison]:
    baseline = questions["baseline"]
    if baseline is None:
        return
    found = dict(groups(rows))
    contexts = dict.fromkeys(varied for _, varied in found)
    variants = [name for name in dict.fromkeys(variant for variant, _ in found) if name != baseline]
    for variant, varied, outcome in itertools.product(variants, contexts, questions["outcomes"]):
        treated, control = found.get((variant, varied), []), found.get((baseline, varied), [])
        a, b = values_of(outcome, treated, control), values_of(outcome, control, treated)
        seeds = sorted(a.keys() & b.keys())
        differences = [a[seed] - b[seed] for seed in seeds]
        several = len(seeds) > 1
        yield Comparison(
            outcome=outcome,
            variant=variant,
            baseline=baseline,
            varied=dict(varied),
            seeds=seeds,
            unpaired=sorted({row["seed"] for row in (*treated, *control)} - set(seeds)),
            variant_mean=mean(a[seed] for seed in seeds),
            baseline_mean=mean(b[seed] for seed in seeds),
            differences=differences,
            mean=mean(differences),
            interval=inference.mean_interval(differences) if several else None,
            p=inference.sign_flip_p(differences) if several else None,
        )


def trends(questions: dict[str, Any], rows: list[Row]) -> Iterator[Trend]:
    option = questions["trend"]
    if option is None:
        return
    values = sorted({row["varied"][option] for row in rows})
    others: dict[tuple[str, tuple[tuple[str, Any], ...]], list[Row]] = {}
    for (variant, varied), found in groups(rows):
        rest = tuple(item for item in varied if item[0] != option)
        others.setdefault((variant, rest), []).extend(found)
    for ((variant, rest), found), outcome in itertools.product(others.items(), questions["outcomes"]):
        if outcome == "validation_loss_at_equal_time":  # which is of two variants
            continue
        by_seed: dict[int, dict[float, float]] = {}
        for row in found:
            if is_finite(row[outcome]):
                by_seed.setdefault(row["seed"], {})[row["varied"][option]] = row[outcome]
        complete = {
            seed: [line[value] for value in values] for seed, line in by_seed.items() if len(line) == len(values)
        }
        seeds = sorted(complete)
        lines = [complete[seed] for seed in seeds]
        several = len(seeds) > 1 and len(values) > 2
        correlations = inference.rank_correlations(values, lines)
        yield Trend(
            outcome=outcome,
            variant=variant,
            varied=dict(rest),
            option=option,
            values=values,
            seeds=seeds,
            incomplete=sorted({row["seed"] for row in found} - complete.keys()),
            means=[mean(column) for column in zip(*lines, strict=True)],
            correlation=mean(correlations),
            interval=inference.mean_interval(correlations) if several else None,
            p=inference.trend_p(lines) if several else None,
        )


def groups(rows: list[Row]) -> list[tuple[tuple[str, tuple[tuple[str, Any], ...]], list[Row]]]:
    """Rows by variant and by the options of the experiment's lists, in the order of the file."""
    found: dict[tuple[str, tuple[tuple[str, Any], ...]], list[Row]] = {}
    for row in rows:
        found.setdefault((row["variant"], tuple(row["varied"].items())), []).append(row)
    return list(found.items())


def values_of(outcome: str, rows: list[Row], others: list[Row]) -> dict[int, float]:
    """Outcome by seed, without seeds that diverged. The loss at equal time is that when the faster of ``rows`` and
    ``others`` ends."""
    if outcome != "validation_loss_at_equal_time":
        return {row["seed"]: row[outcome] for row in rows if is_finite(row[outcome])}
    if not rows or not others:
        return {}
    if len({row.get("clock", "wall") for row in (*rows, *others)}) > 1:
        raise ValueError(
            "validation_loss_at_equal_time: some runs have the processor's time of a step and some the wall clock's; "
            "run them again with one --log-interval, of at least 2"
        )
    end = min(step_seconds(group) * group[0]["curve"]["step"][-1] for group in (rows, others))
    step = end / step_seconds(rows)
    found = {
        row["seed"]: float(np.interp(step, row["curve"]["step"], row["curve"]["validation_loss"]))
        for row in rows
        if step >= row["curve"]["step"][0]
    }
    return {seed: value for seed, value in found.items() if is_finite(value)}


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def step_seconds(rows: list[Row]) -> float:
    """Median over the runs of a variant of their time of a step."""
    return float(statistics.median(row["step_seconds"] for row in rows))


def mean(values: Any) -> float:
    listed = list(values)
    return statistics.fmean(listed) if listed else math.nan


def shown(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"


def table(header: str, lines: list[list[Any]]) -> str:
    names = header.split(", ")
    rows = [names, ["---"] * len(names), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
