"""Peak memory and time of forward + backward against the length of one sequence, each measured in a separate process.

Peak memory is the growth beyond the memory in use with the tokens: gradient, workspace and everything kept for
backward. A process may take all memory that the machine has free; the naive version ends there. Each variant's numbers
are checked first, on shorter sequences.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import variants
from benchmarks.loss import SHORT, check, float64, forward_backward, out_of_memory, rate_dtype
from benchmarks.machine import describe, free_memory, peak_memory, pick_device, process_memory, synchronize
from benchmarks.timing import interleaved, matrix_product, quartiles

LENGTHS = {
    "cpu": [1024, 2048, 4096, 8192, 16384, 32768, 65536],
    "cuda": [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072],
}
FEATURES = {"cpu": 64, "cuda": 768}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Seconds; a call that is expected to take longer is stopped.
LONGEST = 120.0
_NO_MEMORY = 3


def run(quick: bool, lengths: list[int] | None = None) -> list[dict[str, Any]]:
    device = pick_device()
    if device.type == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise SystemExit("the memory suite reads /proc, which only Linux has")
    features, dtype = FEATURES[device.type], DTYPE[device.type]
    free = free_memory(device)
    print(f"machine: {describe()}, {free / 2**30:.1f} GiB free")
    print(f"forward + backward of one sequence; F = {features}, {SHORT[dtype]}")
    print("peak memory beyond the input, in multiples of the input's bytes (MiB), and milliseconds\n")
    z = torch.zeros(1, 2, features, device=device, dtype=dtype)
    reasons = {name: variants.why_not(name, z) for name in variants.NAMES}
    names = [name for name in variants.NAMES if not (name in variants.OURS and reasons[name])]
    print("| L | input, MiB | " + " | ".join(names) + " |")
    print("|---" * (2 + len(names)) + "|")
    rows = []
    ended = {name: f"skipped: {reason}" for name, reason in reasons.items() if reason}
    last: dict[str, tuple[int, float]] = {}
    for length in lengths or (LENGTHS[device.type][:3] if quick else LENGTHS[device.type]):
        size = length * features * dtype.itemsize
        cells = []
        for name in names:
            row: dict[str, Any] = {"variant": name, "L": length, "F": features, "dtype": SHORT[dtype]}
            row |= {"input_bytes": size, "free_bytes": free}
            expected = None
            if name in last:
                seconds = last[name][1] * (length / last[name][0]) ** 2
                if quick and seconds > 2:
                    ended.setdefault(name, f"not timed: a call takes {seconds:.0f} s")
                expected = seconds if seconds > LONGEST else None
            measured = ended.get(name) or _in_a_process(name, length, device, expected)
            if isinstance(measured, str):
                ended[name] = row["status"] = measured
                cells.append(measured)
            else:
                last[name] = length, measured["ms"] / 1e3
                row |= {"status": "timed", **measured, "multiple": measured["peak_bytes"] / size}
                cells.append(f"{row['multiple']:.1f} ({row['peak_bytes'] / 2**20:.1f}), {row['ms']:.1f}")
            rows.append(row)
        print(f"| {length:,} | {size / 2**20:.2f} | " + " | ".join(cells) + " |", flush=True)
    return rows


def _in_a_process(name: str, length: int, device: torch.device, expected: float | None) -> dict[str, float] | str:
    """Peak and time of one case, or the reason why it has none. ``expected``: seconds that a call is expected to take,
    if more than ``LONGEST``; the call is stopped after ``LONGEST`` seconds, in which it may run out of memory."""
    command = [sys.executable, "-m", "benchmarks.memory", name, str(length), str(free_memory(device))]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=None if expected is None else LONGEST
        )
    except subprocess.TimeoutExpired:
        return f"not timed: a call takes {expected:.0f} s"
    if child.returncode == 0:
        result: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
        return result
    if child.returncode in (_NO_MEMORY, -9):  # -9: SIGKILL of the kernel's out-of-memory killer
        return "out of memory"
    raise RuntimeError(f"{' '.join(command)} failed:\n{child.stderr}")


def _measure(name: str, length: int, limit: int) -> dict[str, float]:
    device = pick_device()
    features, dtype = FEATURES[device.type], DTYPE[device.type]
    rate = _product_rate(device, dtype)
    loss = variants.build(name)
    torch.manual_seed(0)
    # Short sequences, so that no memory of this length is kept; two lengths, so that what is compiled takes any length.
    for short in (256, 320):
        warm = torch.randn(1, short, features, device=device, dtype=dtype, requires_grad=True)
        check(name, forward_backward(warm, loss), float64(warm))
    z = torch.randn(1, length, features, device=device, dtype=dtype, requires_grad=True)
    if device.type == "cpu":
        import resource

        # With the limit, an allocation beyond the free memory fails, rather than wake the kernel's out-of-memory
        # killer.
        resource.setrlimit(resource.RLIMIT_AS, (process_memory("VmSize") + limit, resource.RLIM_INFINITY))
    call = partial(forward_backward, z, loss)
    if name == "naive compiled":
        call()  # may compile once more, which is neither memory nor time of the loss
    start = time.perf_counter()
    peak = peak_memory(call, device)
    synchronize(device)
    values = [time.perf_counter() - start]
    if values[0] < 10:
        values = interleaved({"f+b": call}, rounds=5, device=device)["f+b"]
    first, middle, third = quartiles(values)
    times = {"ms": 1e3 * middle, "ms_q1": 1e3 * first, "ms_q3": 1e3 * third, "batches": len(values)}
    assert peak is not None
    return {"peak_bytes": peak, **times, "limit_ms": 1e3 * 3 * length**2 * features / rate, "mm_gflops": rate / 1e9}


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of ``torch.mm``, measured just before the variant."""
    product, flops = matrix_product(device, rate_dtype(device, dtype))
    times = interleaved({"mm": product}, rounds=3, seconds=0.2, device=device)["mm"]
    return flops / quartiles(times).median


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("length", type=int)
    parser.add_argument("limit", type=int)
    try:
        print(json.dumps(_measure(**vars(parser.parse_args()))))
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(_NO_MEMORY)
