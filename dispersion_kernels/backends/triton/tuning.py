"""Opt-in tuning: ``DISPERSION_KERNELS_AUTOTUNE=1`` times the configurations near the table's on the user's own device.

The fastest is kept in ``$XDG_CACHE_HOME/dispersion_kernels/tuning.json`` (``~/.cache`` by default) for each device,
Triton version, kernel, dtype, number of features and bucket of lengths; buckets keep a new length from being tuned
again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton

Config = TypeVar("Config", bound=Any)


def enabled(device: torch.device) -> bool:
    """Whether to tune for ``device``; false while a CUDA graph is captured, because timing would break the capture."""
    wanted = os.environ.get("DISPERSION_KERNELS_AUTOTUNE") == "1"
    return wanted and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def length_bucket(length: int) -> int:
    """Least power of two that is at least ``length`` and at least 256."""
    return max(256, 1 << (length - 1).bit_length())


def best(
    key: str,
    candidates: list[Config],
    launch: Callable[[Config], Any],
    time: Callable[[Callable[[], Any]], float] = triton.testing.do_bench,
) -> Config:
    """Candidate that an earlier decision for ``key`` chose, or else the one whose ``launch`` takes the least time.

    ``launch`` returns the compiled kernel. Candidates that spill registers or do not fit the device are skipped; if
    none is left, the first one, the table's, is chosen.
    """
    decided = (str(_path()), key)
    if decided not in _DECIDED:
        _DECIDED[decided] = _best(key, candidates, launch, time)
    chosen: Config = _DECIDED[decided]
    return chosen


# Decisions of this process by file and key, so that a call reads no file.
_DECIDED: dict[tuple[str, str], Any] = {}


def _best(
    key: str,
    candidates: list[Config],
    launch: Callable[[Config], Any],
    time: Callable[[Callable[[], Any]], float],
) -> Config:
    known = _read()
    for candidate in candidates:
        if known.get(key) == dataclasses.asdict(candidate):
            return candidate
    times: list[tuple[float, int]] = []
    for number, candidate in enumerate(candidates):
        try:
            if getattr(launch(candidate), "n_spills", 0):
                continue
            times.append((time(functools.partial(launch, candidate)), number))
        except triton.runtime.errors.OutOfResources:
            continue
    chosen = candidates[min(times)[1]] if times else candidates[0]
    _write({**_read(), key: dataclasses.asdict(chosen)})
    return chosen


def _path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "dispersion_kernels" / "tuning.json"


def _read() -> dict[str, Any]:
    try:
        known = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(known: dict[str, Any]) -> None:
    """Writes the file under a temporary name and renames it, so that processes that tune at once read whole files."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(known, file, indent=1, sort_keys=True)
    Path(file.name).replace(path)
