"""Records of condensation over training, and their file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispersion_kernels.gpt2.files import write_json

FORMAT = 1
"""Version of the JSON file, which changes when a field changes its meaning."""


@dataclass(frozen=True)
class Record:
    """Measurement of a model in training."""

    step: int
    """Number of optimiser steps taken before the measurement."""
    means: dict[str, float]
    """Mean pairwise cosine by the layer's name, first layer first: the mean over texts of each text's mean."""


def write_records(records: Sequence[Record], path: str | Path) -> None:
    """Writes the records as JSON, NaN as ``null``, all of them or nothing."""
    rows = [
        {"step": record.step, "means": {name: None if math.isnan(x) else x for name, x in record.means.items()}}
        for record in records
    ]
    write_json(Path(path), {"format": FORMAT, "records": rows})


def read_records(path: str | Path) -> list[Record]:
    """Records from a file of :func:`write_records`, or from a ``metrics.jsonl`` of ``dispersion-gpt2``: of its
    evaluations, which are all on the same windows of the validation text.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the content is no such file's.
    """
    path = Path(path)
    text = path.read_text("utf-8", errors="replace")
    try:
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines()]
            evaluations = [line for line in lines if "validation_cosine" in line]
            return [block_record(_step(line["step"]), line["validation_cosine"]) for line in evaluations]
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']!r}, this version reads {FORMAT}")
        return [
            Record(_step(row["step"]), {str(name): _mean(x) for name, x in row["means"].items()})
            for row in values["records"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} does not hold condensation over training ({reason}); record it again") from error


def block_record(step: int, cosines: Sequence[Any]) -> Record:
    """Record of the means behind blocks 1 and on."""
    return Record(step, {f"block {number}": _mean(x) for number, x in enumerate(cosines, start=1)})


def _step(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"step must be a count, got {value!r}")
    return value


def _mean(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a mean must be a number, got {value!r}")
    return float(value)
