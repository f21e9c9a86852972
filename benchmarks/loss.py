"""Time, memory and error of the loss: the naive version, its peers and our backends, as multiples of the limit.

The limit is 3 B L^2 F FLOPs (similarities, by symmetry, 1; gradient 2) at the rate that ``torch.mm`` reaches on square
matrices in the same rounds. A variant is timed only if its loss and gradient agree with a float64 computation. On a
processor with AVX-512 the CPU kernel is measured on AVX2, too, against the rate of ``torch.mm`` there.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import variants
from benchmarks.machine import describe, peak_memory, pick_device, synchronize
from benchmarks.timing import SECONDS, interleaved, matrix_product, quartiles
from dispersion_kernels.backends import cpu

Variant = tuple[str, torch.dtype]

# FLOPs of each mode, in units of B L^2 F: the loss, by symmetry, 1, the gradient 2.
MODES = {"f+b": 3, "forward": 1, "loss": 1}
CASES = {
    "cpu": [(4, 1024, 768), (1, 2048, 768), (1, 4096, 768), (1, 8192, 256), (2, 1024, 64), (1, 256, 768)],
    "cuda": [
        *[(8, 1024, 768), (8, 1024, 1600), (2, 4096, 768), (1, 8192, 768), (1, 16384, 768), (1, 32768, 768)],
        *[(8, 1024, 64), (1, 8192, 128), (1, 256, 768)],
    ],
}
# Variants by device. On a CPU the naive version in bf16 is left out: it is a different computation, 3 to 17 percent
# off, and slow. On a GPU it is the usual choice, and its error stands beside its time.
VARIANTS = {
    "cpu": [
        *[(name, torch.float32) for name in ("naive eager", "naive compiled", "row-chunked", "KeOps", "torch", "cpu")],
        *[(name, torch.bfloat16) for name in ("torch", "cpu")],
    ],
    "cuda": [
        *[(name, torch.float32) for name in ("naive eager", "naive compiled", "row-chunked", "KeOps")],
        *[(name, torch.float32) for name in ("torch", "triton", "cuda")],
        *[(name, torch.bfloat16) for name in ("naive eager", "naive compiled", "torch", "triton", "cuda")],
    ],
}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Variant that runs in a separate process: with the OpenMP threads of KeOps in the process, PyTorch's own loops were
# seen to take up to twelve times as long.
ALONE = "KeOps"
# Environment in which neither PyTorch, nor Intel's library of matrix products, nor the CPU kernel uses AVX-512.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "DISPERSION_KERNELS_CPU_ISA": "avx2"}
# Seconds; a longer call is not timed, because timing repeats it some dozens of times.
LONGEST_CALL = 10.0


def run(quick: bool, cases: list[tuple[int, int, int]] | None = None) -> list[dict[str, Any]]:
    device = pick_device()
    print(f"machine: {describe()}")
    print("multiples of the limit of 3 B L^2 F FLOPs at torch.mm's rate: forward + backward (forward; loss, no_grad)\n")
    isa = cpu.isa() if device.type == "cpu" else ""
    runs = [Run(isa, VARIANTS[device.type], {})]
    if isa == "avx512":
        runs.append(Run("avx2", [name for name in VARIANTS[device.type] if name[0] == "cpu"], AVX2))
    columns = [(name, SHORT[dtype], on) for on, names, _ in runs for name, dtype in names]
    heads = [", ".join((name, dtype, on) if on != isa else (name, dtype)) for name, dtype, on in columns]
    print(f"| B, L, F | limit, ms | {' | '.join(heads)} |")
    print("|---" * (2 + len(columns)) + "|")
    rows = []
    for shape in cases or (CASES[device.type][-2:] if quick else CASES[device.type]):
        torch._dynamo.reset()  # because the limit on recompilations counts all shapes
        case_rows = [row for one in runs if one.names for row in _case(shape, one, device, quick)]
        rows += case_rows
        limits = [row["limit_ms"] for row in case_rows if "limit_ms" in row]
        cells = [_cell(case_rows, *column) for column in columns]
        print(f"| {', '.join(map(str, shape))} | {limits[0]:.2f} | {' | '.join(cells)} |", flush=True)
    return rows


class Run(NamedTuple):
    """Variants that are measured on an instruction set (on a GPU ``""``), and the environment that chooses it: empty,
    or of a process of its own."""

    isa: str
    names: list[Variant]
    environment: dict[str, str]


def _cell(rows: list[dict[str, Any]], *column: str) -> str:
    column_rows = {row["mode"]: row for row in rows if (row["variant"], row["dtype"], row["isa"]) == column}
    first = column_rows["f+b"]
    if first["status"] != "timed":
        return str(first["status"])
    return f"{first['ratio']:.2f} ({column_rows['forward']['ratio']:.2f}; {column_rows['loss']['ratio']:.2f})"


@dataclass
class Measured:
    """Figures of a variant in one case; ``peaks`` (bytes) and ``times`` (seconds) are by mode, and empty if the variant
    was not timed."""

    status: str
    errors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int | None] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)


def _case(shape: tuple[int, int, int], run: Run, device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """Rows of one shape, one for every variant and mode, with times or with the reason why there are none."""
    batch, length, features = shape
    if run.environment:
        rates, measured = _measure_in_a_process(shape, run.names, quick, run.environment)
    else:
        rates, measured = _measure(shape, [name for name in run.names if name[0] != ALONE], device, quick)
        for alone in run.names:
            if alone[0] == ALONE:  # its process's products of matrices would be as slow as its loops
                measured |= _measure_in_a_process(shape, [alone], quick, {})[1]
    rows = []
    for name, dtype in run.names:
        one = measured[name, dtype]
        rate = rates[rate_dtype(device, dtype)]
        limit = 3 * batch * length**2 * features / rate
        for mode, flops in MODES.items():
            row: dict[str, Any] = {
                "B": batch,
                "L": length,
                "F": features,
                "dtype": SHORT[dtype],
                "variant": name,
                "mode": mode,
                "isa": run.isa,
                "status": one.status,
                "limit_ms": 1e3 * limit,
                "mm_gflops": rate / 1e9,
                **one.errors,
            }
            if mode in one.times:
                first, middle, third = quartiles(one.times[mode])
                achieved = flops * batch * length**2 * features / middle
                row |= {"ms": 1e3 * middle, "ms_q1": 1e3 * first, "ms_q3": 1e3 * third, "ratio": middle / limit}
                row |= {"gflops": achieved / 1e9, "of_limit": achieved / rate}
                row |= {"peak_bytes": one.peaks[mode], "input_bytes": math.prod(shape) * dtype.itemsize}
            rows.append(row)
    return rows


# FLOP/s of torch.mm by dtype, and the figures of the variants.
Figures = tuple[dict[torch.dtype, float], dict[tuple[str, torch.dtype], Measured]]


def _measure(shape: tuple[int, int, int], names: list[Variant], device: torch.device, quick: bool) -> Figures:
    """FLOP/s of ``torch.mm`` by dtype, and the figures of the variants; all are timed interleaved."""
    tokens = condensed_tokens(shape, device)
    calls: dict[tuple[str, str, torch.dtype], Callable[[], object]] = {}
    product_flops = {}
    for dtype in dict.fromkeys(rate_dtype(device, dtype) for _, dtype in names):
        calls["torch.mm", "product", dtype], product_flops[dtype] = matrix_product(device, dtype)
    measured = {}
    for name, dtype in names:
        z, loss = tokens.to(dtype, copy=True).requires_grad_(), variants.build(name)
        one = measured[name, dtype] = _checked(name, z, loss, 2.0 if quick else LONGEST_CALL)
        if one.status == "timed":
            for mode, call in modes(z, loss).items():
                one.peaks[mode] = peak_memory(call, device)
                z.grad = None
                calls[name, mode, dtype] = call
    times = interleaved(calls, rounds=2 if quick else 7, seconds=0.05 if quick else SECONDS, device=device)
    for name, dtype in names:
        measured[name, dtype].times = {mode: times[name, mode, dtype] for mode in measured[name, dtype].peaks}
    rates = {
        dtype: flops / quartiles(times["torch.mm", "product", dtype]).median for dtype, flops in product_flops.items()
    }
    return rates, measured


def _measure_in_a_process(
    shape: tuple[int, int, int], names: list[Variant], quick: bool, environment: dict[str, str]
) -> Figures:
    """The same as :func:`_measure`, in a process of its own with other environment variables."""
    asked = json.dumps({"shape": shape, "names": [(name, SHORT[dtype]) for name, dtype in names], "quick": quick})
    command = [sys.executable, "-m", "benchmarks.loss", asked]
    child = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{child.stderr}")
    rates, measured = json.loads(child.stdout.splitlines()[-1])
    return (
        {dtype: rates[short] for dtype, short in SHORT.items() if short in rates},
        {name: Measured(**one) for name, one in zip(names, measured, strict=True)},
    )


def _checked(name: str, z: Tensor, loss: variants.Loss, longest: float) -> Measured:
    """Errors of a variant, and its status: ``"timed"`` if it is to be timed, or the reason why not.

    Raises ``RuntimeError`` if its loss or gradient is wrong.
    """
    if reason := variants.why_not(name, z):
        return Measured(f"skipped: {reason}")
    try:
        for length in (32, 48):  # two lengths, so that what is compiled takes any length
            small = torch.randn(len(z), length, z.shape[2], device=z.device, dtype=z.dtype, requires_grad=True)
            forward_backward(small, loss)
        for _ in range(2):  # the second call counts
            synchronize(z.device)
            start = time.perf_counter()
            value, grad = forward_backward(z, loss)
            synchronize(z.device)
            seconds = time.perf_counter() - start
    except torch._dynamo.exc.TorchDynamoException as error:
        return Measured(f"skipped: torch.compile: {str(error).splitlines()[0]}")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return Measured("out of memory")
    errors = check(name, (value, grad), float64(z))
    z.grad = None
    status = "timed" if seconds <= longest else f"not timed: a call takes {seconds:.0f} s"
    return Measured(status, dict(zip(("loss_error", "grad_error"), errors, strict=True)))


def condensed_tokens(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Tokens ``[B, L, F]`` fp32, condensed like the hidden states of a trained model: mean cosine about 0.5."""
    torch.manual_seed(0)
    return (torch.randn(shape) + torch.randn(shape[-1])).to(device)


def rate_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Dtype whose matrix products set a variant's limit: on a CPU fp32, to which 16-bit tokens are widened."""
    return torch.float32 if device.type == "cpu" else dtype


def modes(z: Tensor, loss: variants.Loss) -> dict[str, Callable[[], object]]:
    """Calls by mode: ``f+b``, forward and backward; ``forward``, with the preparation for backward; ``loss``, under
    ``no_grad``."""
    return {
        "f+b": partial(forward_backward, z, loss),
        "forward": partial(loss, z),
        "loss": partial(_loss_alone, z, loss),
    }


def forward_backward(z: Tensor, loss: variants.Loss) -> tuple[Tensor, Tensor]:
    z.grad = None
    value = loss(z)
    value.backward()
    assert z.grad is not None
    return value.detach(), z.grad


def _loss_alone(z: Tensor, loss: variants.Loss) -> Tensor:
    with torch.no_grad():
        return loss(z)


def float64(z: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64 on the numbers that ``z`` holds: by the naive version, or, where its matrices would
    be too large, by the torch backend, which the tests compare with the naive version."""
    loss = variants.naive if z.shape[1] <= 2048 else variants.build("torch")
    return forward_backward(z.detach().double().requires_grad_(), loss)


def check(name: str, got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Errors of loss and gradient relative to float64. Raises ``RuntimeError`` for errors that are too large."""
    dtype = got[1].dtype
    loss_error = ((got[0].double() - exact[0]).abs() / exact[0].abs()).item()
    grad_error = ((got[1].double() - exact[1]).norm() / exact[1].norm()).item()
    bounds = (1e-5, 1e-5 if dtype == torch.float32 else 5e-3)
    if dtype != torch.float32 and name not in variants.OURS:
        bounds = (0.5, 0.5)  # 16-bit sums are off by some tens of percent; more would be another computation
    if not (loss_error < bounds[0] and grad_error < bounds[1]):
        raise RuntimeError(
            f"{name} is wrong: relative error of the loss {loss_error:.1e}, of the gradient {grad_error:.1e}"
        )
    return loss_error, grad_error


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or in the CPU allocator, whose error has no type of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def _answer(asked: str) -> None:
    """Prints what :func:`_measure_in_a_process` reads."""
    wanted = json.loads(asked)
    dtypes = {short: dtype for dtype, short in SHORT.items()}
    names = [(name, dtypes[short]) for name, short in wanted["names"]]
    rates, measured = _measure(tuple(wanted["shape"]), names, pick_device(), wanted["quick"])
    print(json.dumps([{SHORT[dtype]: rate for dtype, rate in rates.items()}, [asdict(measured[n]) for n in names]]))


if __name__ == "__main__":
    _answer(sys.argv[1])
