"""Runs of a sweep from its TOML file: experiments, each a product of lists of options, variants and seeds."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..gpt2.data import load_data
from ..gpt2.model import weights_file
from ..gpt2.options import DECIDED_BY_WEIGHTS, SavedParser, build_parser, complete
from ..gpt2.options import WEIGHTS as WEIGHT_OPTIONS

# Options of the trainer that a sweep sets itself.
OWN = ("out", "resume", "compare")
# Options that come from a file of weights, where there is one, in place of the defaults of the sweep.
FROM_WEIGHTS = tuple(name.replace("_", "-") for name in DECIDED_BY_WEIGHTS)
# Options whose value may be a table that selects a run of another experiment.
WEIGHTS = tuple(name.replace("_", "-") for name in WEIGHT_OPTIONS)
# Options that are replaced by the key of the tokens in the hash of a run's settings.
TEXT = ("data", "cache", "tokenizer", "vocab-size")
# Numbers of a run that variants are compared by, and their names in text.
OUTCOMES = {
    "validation_loss": "validation loss",
    "validation_loss_at_equal_time": "validation loss at equal time",
    "cosine_mean": "mean cosine over the layers",
    "cosine_last": "mean cosine of the last layer",
    "depth_trend": "Spearman correlation of cosine and depth",
    "initial_cosine_mean": "mean cosine over the layers before training",
    "initial_cosine_last": "mean cosine of the last layer before training",
    "initial_depth_trend": "Spearman correlation of cosine and depth before training",
}
DEFAULT_OUTCOMES = ("validation_loss", "cosine_mean")
# Keys of an experiment that are no options of the trainer.
QUESTIONS = ("variant", "baseline", "outcomes", "trend")


@dataclass(frozen=True)
class Run:
    """A run of the trainer.

    ``settings`` are the options that the file gives, by their names in it. ``varied`` are those of the experiment's
    lists, without the seed. ``sources`` are the runs whose weights this run takes, by option.
    """

    experiment: str
    variant: str
    seed: int
    settings: Mapping[str, Any]
    varied: Mapping[str, Any]
    sources: Mapping[str, Run]
    options: argparse.Namespace

    @property
    def name(self) -> str:
        """Readable name, which is also that of a folder: without the commas and equals signs at which lm-eval splits
        its arguments."""
        shown = [self.experiment, *([self.variant] if self.variant else [])]
        shown += [f"{key}-{label(value)}" for key, value in self.varied.items()]
        return re.sub(r"[^\w.+-]+", "-", "_".join([*shown, f"seed-{self.seed}"]))[:120]


@dataclass(frozen=True)
class Experiment:
    """Runs, and the questions about them: variants against ``baseline``, and a trend with the option ``trend``."""

    name: str
    baseline: str | None
    outcomes: tuple[str, ...]
    trend: str | None
    runs: list[Run] = field(default_factory=list)


def label(value: Any) -> str:
    if isinstance(value, Mapping):  # a run of another experiment
        return "+".join([str(value["experiment"]), *(f"{k}={label(v)}" for k, v in value.items() if k != "experiment")])
    if isinstance(value, list):
        return "+".join(Path(item).name for item in value)
    return str(value)


def read_plan(file: Path) -> list[Experiment]:
    """Experiments of a TOML file, in its order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not TOML, or a key or value is wrong; with the line, where it is known, and a remedy.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; give the TOML file of a sweep")
    try:
        text = file.read_text("utf-8")
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from error
    return Reader(file, text).experiments(content)


class Reader:
    def __init__(self, file: Path, text: str) -> None:
        self.file, self.text = file, text
        self.actions = {
            flag.removeprefix("--"): action
            for flag, action in build_parser(SavedParser)._option_string_actions.items()
            if action.dest not in OWN
        }

    def experiments(self, content: dict[str, Any]) -> list[Experiment]:
        for key in content:
            if key not in ("defaults", "experiment"):
                raise self.error((), key, "is no part of a sweep; use [defaults] and [experiment.NAME]")
        defaults, tables = content.get("defaults", {}), content.get("experiment", {})
        for key, value in (("defaults", defaults), ("experiment", tables)):
            if not isinstance(value, dict):
                raise self.error((), key, f"must be a table, got {value!r}; write [{key}...]")
        if not tables:
            raise ValueError(f"{self.file} has no experiment; add a table [experiment.NAME]")
        self.check_options(("defaults",), defaults)
        done: dict[str, Experiment] = {}
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise self.error(("experiment",), name, f"must be a table, got {table!r}; write [experiment.{name}]")
            done[name] = self.experiment(name, table, defaults, done)
        return list(done.values())

    def experiment(
        self, name: str, table: dict[str, Any], defaults: dict[str, Any], others: dict[str, Experiment]
    ) -> Experiment:
        where = ("experiment", name)
        own = {key: value for key, value in table.items() if key not in QUESTIONS}
        self.check_options(where, own)
        variants = self.variants(where, table.get("variant", {}))
        given = [own, *variants.values()]
        from_weights = any("init-from" in options for options in given)
        inherited = {k: v for k, v in defaults.items() if not (from_weights and k in FROM_WEIGHTS)}
        settings = {"seed": 0, **inherited, **own}
        axes = {key: value for key, value in settings.items() if is_axis(key, value)}
        for key, values in axes.items():
            if not values:
                raise self.error(where, key, "is an empty list; give a value, or leave the key out")
            if any(values.count(value) > 1 for value in values):
                raise self.error(where, key, f"lists a value twice: {values!r}; take one out")
            for variant, options in variants.items():
                if key in options:
                    raise self.error(
                        (*where, "variant", variant), key, "is also a list of the experiment; give it in one of the two"
                    )
        experiment = self.questions(where, table, name, axes, variants)
        seeds = axes.pop("seed", None) or [settings["seed"]]
        products = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        for place, seed in enumerate(seeds):
            for varied in products:
                for variant, options in variants.items():
                    chosen = {**settings, **varied, **options, "seed": seed}
                    at = (*where, "variant", variant) if variant else where
                    experiment.runs.append(self.run(at, experiment, variant, chosen, varied, others, place))
        return experiment

    def variants(self, where: tuple[str, ...], tables: Any) -> dict[str, dict[str, Any]]:
        if not isinstance(tables, dict) or not all(isinstance(value, dict) for value in tables.values()):
            raise self.error(where, "variant", 'must hold tables; write [experiment.NAME.variant."..."]')
        for name, options in tables.items():
            self.check_options((*where, "variant", name), options)
            for key, value in options.items():
                if key == "seed" or is_axis(key, value):
                    raise self.error(
                        (*where, "variant", name), key, "cannot vary in a variant; list its values in the experiment"
                    )
        return tables or {"": {}}

    def questions(
        self, where: tuple[str, ...], table: dict[str, Any], name: str, axes: dict[str, Any], variants: dict[str, Any]
    ) -> Experiment:
        baseline, trend = table.get("baseline"), table.get("trend")
        outcomes = table.get("outcomes", list(DEFAULT_OUTCOMES))
        named = [variant for variant in variants if variant]
        if baseline is not None and baseline not in named:
            raise self.error(where, "baseline", f"must be one of the variants, {named}, got {baseline!r}")
        if baseline is None and len(named) > 1:
            raise self.error(where, "baseline", f"is missing; name the variant to compare with, of {named}")
        numeric = [
            key
            for key, values in axes.items()
            if key != "seed" and len(values) > 2 and all(type(value) in (int, float) for value in values)
        ]
        if trend is not None and trend not in numeric:
            raise self.error(
                where, "trend", f"must be an option with a list of at least three numbers, of {numeric}, got {trend!r}"
            )
        if not isinstance(outcomes, list) or not outcomes or not set(outcomes) <= set(OUTCOMES):
            raise self.error(where, "outcomes", f"must be a list of some of {list(OUTCOMES)}, got {outcomes!r}")
        return Experiment(name, baseline, tuple(outcomes), trend)

    def run(
        self,
        where: tuple[str, ...],
        experiment: Experiment,
        variant: str,
        settings: dict[str, Any],
        varied: dict[str, Any],
        others: dict[str, Experiment],
        place: int,
    ) -> Run:
        sources = {
            key: self.source(where, key, settings[key], others, place)
            for key in WEIGHTS
            if isinstance(settings.get(key), dict)
        }
        shown = {key: label(value) if key in sources else value for key, value in settings.items()}
        return Run(
            experiment=experiment.name,
            variant=variant,
            seed=settings["seed"],
            settings=shown,
            varied={key: shown[key] for key in varied},
            sources=sources,
            options=self.parse(where, {**settings, **dict.fromkeys(sources, "a run of this sweep")}),
        )

    def source(
        self, where: tuple[str, ...], key: str, wanted: dict[str, Any], others: dict[str, Experiment], place: int
    ) -> Run:
        """Run that a table such as ``{experiment = "width", mlp-width = 32}`` selects, with the seed at the same place
        of that experiment's list."""
        name = wanted.get("experiment")
        if name not in others:
            raise self.error(
                where, key, f"must name an earlier experiment of the file, of {list(others)}, got {name!r}"
            )
        conditions = {k: v for k, v in wanted.items() if k != "experiment"}
        runs = others[name].runs
        seeds = list(dict.fromkeys(run.seed for run in runs))
        if place >= len(seeds):
            raise self.error(
                where, key, f"has no run for seed number {place + 1}: {name} has {len(seeds)} seeds; give as many"
            )
        found = [
            run
            for run in runs
            if run.seed == seeds[place]
            and all({**run.settings, "variant": run.variant}.get(k) == v for k, v in conditions.items())
        ]
        if len(found) != 1:
            raise self.error(
                where,
                key,
                f"must select one run of {name} for each seed, {conditions or 'the name alone'} selects {len(found)}; "
                f"give the values of {list(runs[0].varied) + (['variant'] if runs[0].variant else [])}",
            )
        return found[0]

    def check_options(self, where: tuple[str, ...], table: dict[str, Any]) -> None:
        for key, value in table.items():
            if key not in self.actions:
                close = get_close_matches(key.replace("_", "-"), [*self.actions, *QUESTIONS], 1)
                remedy = f"did you mean {close[0]}?" if close else "dispersion-gpt2 --help lists them, without the --"
                raise self.error(where, key, f"is no option of a sweep; {remedy}")
            values = value if is_axis(key, value) else [value]
            for one in values:
                if isinstance(one, dict) and key not in WEIGHTS:
                    raise self.error(where, key, f"cannot be a table, got {one!r}")
                if key == "seed" and type(one) is not int:
                    raise self.error(where, key, f"must be a whole number or a list of them, got {value!r}")

    def parse(self, where: tuple[str, ...], settings: dict[str, Any]) -> argparse.Namespace:
        try:
            return complete(build_parser(SavedParser).parse_args(self.arguments(where, settings)))
        except ValueError as error:
            found = re.match(r"(?:argument )?--([a-z-]+):? ", str(error))
            if found is None or found[1] not in settings:
                raise self.error(where, "", str(error)) from error
            raise self.error(where, found[1], str(error)[found.end() :]) from error

    def arguments(self, where: tuple[str, ...], settings: dict[str, Any]) -> list[str]:
        """Command line of the trainer. Relative paths are those from the folder of the file."""
        arguments = []
        for key, value in settings.items():
            if isinstance(self.actions[key], argparse._StoreTrueAction):
                if not isinstance(value, bool):
                    raise self.error(where, key, f"must be true or false, got {value!r}")
                arguments += [f"--{key}"] if value else []
            elif isinstance(value, bool):
                raise self.error(where, key, f"must not be {str(value).lower()}; give a value, as on the command line")
            elif key == "data":
                texts = value if isinstance(value, list) else [value]
                named = [str(text) if str(text).startswith("hf:") else self.path(text) for text in texts]
                arguments += ["--data", *named] if named else []  # without a text, the trainer's default
            else:
                arguments.append(f"--{key}={self.path(value) if key in ('cache', *WEIGHTS) else value}")
        return arguments

    def path(self, value: Any) -> str:
        return os.path.normpath(self.file.absolute().parent / str(value))

    def error(self, where: tuple[str, ...], key: str, problem: str) -> ValueError:
        line = self.line(where, key)
        place = f", line {line}" if line else ""
        table = f"[{'.'.join(where)}] " if where else ""
        return ValueError(f"{self.file}{place}: {table}{key + ' ' if key else ''}{problem}")

    def line(self, where: tuple[str, ...], key: str) -> int | None:
        """Line of ``key`` in the table ``where``, or in the nearest table around it, else None."""
        header: tuple[str, ...] = ()
        found: dict[tuple[str, ...], int] = {}
        for number, line in enumerate(self.text.splitlines(), 1):
            if match := re.match(r"\s*\[([^\[\]]+)\]\s*(?:#.*)?$", line):
                header = split_key(match[1])
                name: tuple[str, ...] = ()
            elif match := re.match(r"\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"))*)\s*=", line):
                name = split_key(match[1])
            else:
                continue
            found.setdefault((*header, *name), number)
        around = [(*where[:depth], key) for depth in range(len(where), -1, -1)] if key else []
        tables = [where[:depth] for depth in range(len(where), 0, -1)]
        candidates = [around[0], ("defaults", key), *tables] if around else tables
        lines = (line for wanted in candidates for path, line in found.items() if path[: len(wanted)] == wanted)
        return next(lines, None)


def split_key(key: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in re.findall(r"\"[^\"]*\"|'[^']*'|[\w-]+", key))


def is_axis(key: str, value: Any) -> bool:
    """Whether a value lists several: a list, and for the texts of one run, which are a list, a list of lists."""
    return isinstance(value, list) and (key != "data" or any(isinstance(item, list) for item in value))


class Identities:
    """Hashes of the settings of runs. Texts and weights enter by their content: a moved file gives the same run, a
    changed file another."""

    def __init__(self) -> None:
        self.texts: dict[tuple[Any, ...], str] = {}

    def of(self, run: Run) -> str:
        options = run.options
        given = {key: getattr(options, key.replace("-", "_")) for key in run.settings if key not in TEXT}
        for key in WEIGHTS:
            if key in run.sources:
                given[key] = self.of(run.sources[key])
            elif key in given:
                given[key] = hashlib.sha256(weights_file(Path(given[key])).read_bytes()).hexdigest()
        content = {**dict(sorted(given.items())), "text": self.text(options)}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    def text(self, options: argparse.Namespace) -> str:
        """Key of the tokens, which are made here where they are not in the cache."""
        wanted = {"tokenizer": options.tokenizer, "vocab_size": options.vocab_size, "cache": options.cache}
        key = (*options.data, *wanted.values())
        if key not in self.texts:
            self.texts[key] = load_data(options.data, **wanted, progress=True).key
        return self.texts[key]


def all_runs(experiments: list[Experiment]) -> Iterator[Run]:
    return itertools.chain.from_iterable(experiment.runs for experiment in experiments)
