"""Results of a sweep: a row for each run of each experiment, as CSV and JSON, with what they were computed by."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import platform
import statistics
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

import dispersion_kernels

from ..env_report import processor
from ..gpt2.files import replaced
from .plan import Experiment, Run, label

PACKAGE = Path(dispersion_kernels.__file__).parent
FORMAT = 1


def environment(threads: int, jobs: int) -> dict[str, Any]:
    """Code, versions and machine, on which a run's numbers and time depend beside its settings."""
    return {
        "commit": commit(),
        "source": source(),
        "version": dispersion_kernels.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": threads,
        "jobs": jobs,
    }


def commit() -> str:
    """Commit of the package where it lies in a Git repository of its own, else an empty string."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", "-C", PACKAGE, *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no Git
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    # A package that is installed below somebody else's repository is not tracked in it.
    return git("describe", "--always", "--dirty") if git("ls-files", "__init__.py") else ""


@cache
def source() -> str:
    """Hash of the package's Python files and kernels, without this folder, which trains nothing."""
    digest = hashlib.sha256()
    files = [path for pattern in ("*.py", "*.so", "*.dll", "*.dylib") for path in PACKAGE.rglob(pattern)]
    for path in sorted(files):
        if Path(__file__).parent not in path.parents:
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def row_of(folder: Path) -> dict[str, Any]:
    """Numbers of a finished run, from what the trainer wrote."""
    results = json.loads((folder / "results.json").read_text("utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    validations = [line for line in lines if "validation_loss" in line]
    step_tokens = results["tokens"] / lines[-1]["step"]
    processor_seconds = [line["processor_seconds"] for line in lines if "processor_seconds" in line]
    row = {
        "validation_loss": results["validation_loss"],
        **condensation("", results["cosine_after"]),
        **condensation("initial_", results["cosine_before"]),
        "seconds": results["seconds"],
        # The median over intervals, which other work on the machine moves less than the mean.
        "step_seconds": statistics.median(
            processor_seconds or [step_tokens / line["tokens_per_second"] for line in lines]
        ),
        "clock": "processor" if processor_seconds else "wall",
        "tokens": results["tokens"],
        "parameters": results["parameters"],
        "peak_memory_bytes": results["peak_memory_bytes"],
        "cosine_by_layer": results["cosine_after"],
        "initial_cosine_by_layer": results["cosine_before"],
        "curve": {
            "step": [line["step"] for line in validations],
            "validation_loss": [line["validation_loss"] for line in validations],
            "cosine_by_layer": [line["validation_cosine"] for line in validations],
        },
        "gradient_norm": {
            "step": [line["step"] for line in lines],
            "value": [line["grad_norm"] for line in lines],
        },
        "date": time.strftime("%Y-%m-%d"),
    }
    return row


def condensation(prefix: str, cosines: list[float]) -> dict[str, Any]:
    """Mean pairwise cosine over the layers and of the last one, and Spearman's correlation with the layer's number."""
    from scipy.stats import spearmanr

    constant = len(set(cosines)) < 2
    trend = math.nan if constant else float(spearmanr(range(len(cosines)), cosines).statistic)
    return {
        f"{prefix}cosine_mean": sum(cosines) / len(cosines),
        f"{prefix}cosine_last": cosines[-1],
        f"{prefix}depth_trend": None if math.isnan(trend) else trend,
    }


def write_tables(
    out: Path, experiments: list[Experiment], members: list[tuple[Run, str]], rows: dict[str, dict[str, Any]]
) -> None:
    """Writes results.json and results.csv, each under a temporary name. A row is a finished run in an experiment."""
    table = [
        {
            "experiment": run.experiment,
            "variant": run.variant,
            "seed": run.seed,
            "run": identity,
            "varied": dict(run.varied),
            "settings": dict(run.settings),
            **rows[identity],
        }
        for run, identity in members
        if identity in rows
    ]
    questions = {
        experiment.name: {
            "baseline": experiment.baseline,
            "outcomes": list(experiment.outcomes),
            "trend": experiment.trend,
            "missing": [run.name for run, one in members if run.experiment == experiment.name and one not in rows],
        }
        for experiment in experiments
    }
    write_whole(out / "results.json", json.dumps({"format": FORMAT, "experiments": questions, "rows": table}))
    columns = [flat(row) for row in table]
    names = list(dict.fromkeys(name for row in columns for name in row))
    content = io.StringIO()
    writer = csv.DictWriter(content, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(columns)
    write_whole(out / "results.csv", content.getvalue())


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Row of the CSV file: settings and layers as columns, no curves."""
    nested = ("varied", "settings", "options", "curve", "gradient_norm", "cosine_by_layer", "initial_cosine_by_layer")
    columns = {name: row[name] for name in ("experiment", "variant", "seed", "run")}
    columns |= {key: label(value) for key, value in row["settings"].items() if key != "seed"}
    columns |= {key: value for key, value in row.items() if key not in nested and key not in columns}
    for prefix in ("", "initial_"):
        columns |= {f"{prefix}cosine_{layer}": value for layer, value in enumerate(row[f"{prefix}cosine_by_layer"], 1)}
    return columns


def write_whole(path: Path, text: str) -> None:
    with replaced(path) as file:
        file.write((text + "\n").encode())
