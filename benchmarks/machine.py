"""Where a figure was measured, and the file it is kept in."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from dispersion_kernels import native


def processor() -> str:
    """The processor's name and flags that matter, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def describe() -> dict[str, str]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_isa": native.isa(),
        "commit": commit.stdout.strip() or "unknown",
    }


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """All rows with the machine beside them; written to a temporary name and renamed."""
    machine = describe()
    names = list(dict.fromkeys(name for row in rows for name in row))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *machine])
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)
    os.replace(temporary, path)
