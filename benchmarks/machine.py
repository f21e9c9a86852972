"""Description of the machine, files of results, and measurement of memory."""

from __future__ import annotations

import csv
import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dispersion_kernels.backends import cpu
from dispersion_kernels.backends.registry import triton_version
from dispersion_kernels.env_report import processor


def pick_device() -> torch.device:
    """A CUDA (or ROCm) device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe() -> dict[str, str]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "triton": triton_version() or "",
        "pykeops": _version("pykeops"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_isa": cpu.isa(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or "unknown",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes all rows, each with the description of the machine, under a temporary name and renames the file."""
    machine = describe()
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *machine])
        writer.writeheader()
        writer.writerows({**row, **machine} for row in rows)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text under a temporary name and renames the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of ``call`` in bytes, beyond the memory in use before it; None if the system does not tell.

    On a GPU it is the memory that PyTorch's allocator hands out, on Linux the growth of the resident set.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        call()
        return None
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # memory that the allocator keeps of earlier calls would count as in use before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory that is resident now
    before = process_memory("VmRSS")
    call()
    return max(0, process_memory("VmHWM") - before)


def process_memory(field: str) -> int:
    """Memory of this process in bytes: ``VmRSS`` resident, ``VmHWM`` peak of that, ``VmSize`` addresses. Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def free_memory(device: torch.device) -> int:
    """Memory in bytes that a process may still allocate."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
