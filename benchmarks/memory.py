"""Peak memory of forward + backward against the length of one sequence, each measurement in a process of its own.

What is counted is the growth of the resident set over what it was with the tokens in memory: gradient, workspace and
whatever is kept in between. The process may take what memory the machine has free; the naive version ends there.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from dispersion_kernels import fused_dispersion_loss, supported

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
FEATURES = 64
VARIANTS = {"naive eager": "reference", "torch": "torch", "cpu": "cpu"}


def run(quick: bool) -> list[dict[str, Any]]:
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("the memory suite reads /proc, which only Linux has")
    print(f"machine: {describe()}, {_available() / 2**30:.1f} GiB free")
    print(
        f"peak memory of forward + backward beyond the input, in multiples of the input's bytes; F = {FEATURES}, fp32\n"
    )
    print("| L | input, MiB | " + " | ".join(f"{name}, multiple (MiB), s" for name in VARIANTS) + " |")
    print("|---" * (2 + len(VARIANTS)) + "|")
    rows = []
    names = [name for name in VARIANTS if name != "cpu" or supported("cpu", torch.zeros(1, 2, 2))]
    ended: set[str] = set()
    for length in LENGTHS[:4] if quick else LENGTHS:
        size = length * FEATURES * 4
        cells = []
        for name in names:
            row: dict[str, Any] = {"variant": name, "L": length, "F": FEATURES, "input_bytes": size}
            measured = None if name in ended else _in_a_process(VARIANTS[name], length)
            if measured is None:
                ended.add(name)
                cells.append("out of memory")
            else:
                row |= measured | {"multiple": measured["peak_bytes"] / size}
                cells.append(f"{row['multiple']:.1f} ({row['peak_bytes'] / 2**20:.1f}), {row['seconds']:.2f}")
            rows.append(row)
        print(f"| {length:,} | {size / 2**20:.2f} | " + " | ".join(cells) + " |", flush=True)
    return rows


def _in_a_process(impl: str, length: int) -> dict[str, float] | None:
    """Peak and time of one case; None where memory ran out."""
    command = [sys.executable, "-m", "benchmarks.memory", impl, str(length), str(_available())]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode == 0:
        result: dict[str, float] = json.loads(child.stdout)
        return result
    if "alloc" in child.stderr or "memory" in child.stderr or child.returncode == -9:
        return None
    raise RuntimeError(f"{' '.join(command)} failed:\n{child.stderr}")


def _available() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def _measure(impl: str, length: int, limit: int) -> dict[str, float]:
    warm = torch.randn(1, 256, FEATURES, requires_grad=True)
    fused_dispersion_loss(warm, impl=impl).backward()
    z = torch.randn(1, length, FEATURES, requires_grad=True)
    # An allocation beyond what is free fails, rather than wake the kernel's out-of-memory killer.
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + limit, resource.RLIM_INFINITY))
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _status("VmRSS")
    start = time.perf_counter()
    fused_dispersion_loss(z, impl=impl).backward()
    return {"seconds": time.perf_counter() - start, "peak_bytes": _status("VmHWM") - before}


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("impl")
    parser.add_argument("length", type=int)
    parser.add_argument("limit", type=int)
    print(json.dumps(_measure(**vars(parser.parse_args()))))
