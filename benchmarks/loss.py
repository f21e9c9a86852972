"""Time, memory and error of the loss: the naive version, its peers and our backends, as multiples of the limit.

The limit is 3 B L^2 F FLOPs (similarities by symmetry 1, gradient 2) at the rate that ``torch.mm`` reaches on square
matrices in the same rounds. A variant is timed only after its loss and gradient agreed with a float64 computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import variants
from benchmarks.machine import describe, peak_memory, pick_device, synchronize
from benchmarks.timing import SECONDS, interleaved, matrix_product, quartiles

# FLOPs that a mode needs, in B L^2 F: the loss by symmetry 1, the gradient 2.
MODES = {"f+b": 3, "forward": 1, "loss": 1}
CASES = {
    "cpu": [(4, 1024, 768), (1, 2048, 768), (1, 4096, 768), (1, 8192, 256), (2, 1024, 64), (1, 256, 768)],
    "cuda": [
        *[(8, 1024, 768), (8, 1024, 1600), (2, 4096, 768), (1, 8192, 768), (1, 16384, 768), (1, 32768, 768)],
        *[(8, 1024, 64), (1, 8192, 128), (1, 256, 768)],
    ],
}
# On a CPU the naive version in bf16 is a different computation, 3 to 17 percent off, and slow, and is not compared; on
# a GPU it is what one would run, and its error stands beside its time.
VARIANTS = {
    "cpu": [
        *[(name, torch.float32) for name in ("naive eager", "naive compiled", "row-chunked", "KeOps", "torch", "cpu")],
        *[(name, torch.bfloat16) for name in ("torch", "cpu")],
    ],
    "cuda": [
        *[(name, torch.float32) for name in ("naive eager", "naive compiled", "row-chunked", "KeOps")],
        *[(name, torch.float32) for name in ("torch", "triton")],
        *[(name, torch.bfloat16) for name in ("naive eager", "naive compiled", "torch", "triton")],
    ],
}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# A longer call is not repeated some dozens of times.
LONGEST_CALL = 10.0


def run(quick: bool, cases: list[tuple[int, int, int]] | None = None) -> list[dict[str, Any]]:
    device = pick_device()
    print(f"machine: {describe()}")
    print("multiples of the limit of 3 B L^2 F FLOPs at torch.mm's rate: forward + backward (forward; loss, no_grad)\n")
    names = VARIANTS[device.type]
    print("| B, L, F | limit, ms | " + " | ".join(f"{name}, {SHORT[dtype]}" for name, dtype in names) + " |")
    print("|---" * (2 + len(names)) + "|")
    rows = []
    for shape in cases or (CASES[device.type][-2:] if quick else CASES[device.type]):
        torch._dynamo.reset()  # the limit on recompilation counts all shapes
        of_case = _case(shape, names, device, quick)
        rows += of_case
        limits = [row["limit_ms"] for row in of_case if "limit_ms" in row]
        cells = [_cell(of_case, name, SHORT[dtype]) for name, dtype in names]
        print(f"| {', '.join(map(str, shape))} | {limits[0]:.2f} | {' | '.join(cells)} |", flush=True)
    return rows


def _cell(rows: list[dict[str, Any]], name: str, dtype: str) -> str:
    of_variant = {row["mode"]: row for row in rows if (row["variant"], row["dtype"]) == (name, dtype)}
    first = of_variant["f+b"]
    if first["status"] != "timed":
        return str(first["status"])
    return f"{first['ratio']:.2f} ({of_variant['forward']['ratio']:.2f}; {of_variant['loss']['ratio']:.2f})"


def _case(
    shape: tuple[int, int, int], names: list[tuple[str, torch.dtype]], device: torch.device, quick: bool
) -> list[dict[str, Any]]:
    """A row for every variant and mode of one shape, timed or with the reason why not."""
    batch, length, features = shape
    tokens = condensed_tokens(shape, device)
    calls: dict[tuple[str, str, torch.dtype], Callable[[], object]] = {}
    product_flops = {}
    for dtype in dict.fromkeys(rate_dtype(device, dtype) for _, dtype in names):
        calls["torch.mm", "product", dtype], product_flops[dtype] = matrix_product(device, dtype)
    errors, peaks, status = {}, {}, {}
    for name, dtype in names:
        z, loss = tokens.to(dtype, copy=True).requires_grad_(), variants.build(name)
        try:
            status[name, dtype], errors[name, dtype] = _checked(name, z, loss, 2.0 if quick else LONGEST_CALL)
        except NotRun as reason:
            status[name, dtype] = str(reason)
            continue
        if status[name, dtype] == "timed":
            for mode, call in modes(z, loss).items():
                peaks[name, mode, dtype] = peak_memory(call, device)
                z.grad = None
                calls[name, mode, dtype] = call
    times = interleaved(calls, rounds=2 if quick else 7, seconds=0.05 if quick else SECONDS, device=device)
    rows = []
    for name, dtype in names:
        of_product = rate_dtype(device, dtype)
        rate = product_flops[of_product] / quartiles(times["torch.mm", "product", of_product]).median
        limit = 3 * batch * length**2 * features / rate
        for mode, flops in MODES.items():
            row: dict[str, Any] = {
                "B": batch,
                "L": length,
                "F": features,
                "dtype": SHORT[dtype],
                "variant": name,
                "mode": mode,
                "status": status[name, dtype],
                "limit_ms": 1e3 * limit,
                "mm_gflops": rate / 1e9,
            }
            if (name, dtype) in errors:
                row |= dict(zip(("loss_error", "grad_error"), errors[name, dtype], strict=True))
            if (name, mode, dtype) in times:
                row |= {"peak_bytes": peaks[name, mode, dtype], "input_bytes": tokens.numel() * dtype.itemsize}
                first, middle, third = quartiles(times[name, mode, dtype])
                achieved = flops * batch * length**2 * features / middle
                row |= {"ms": 1e3 * middle, "ms_q1": 1e3 * first, "ms_q3": 1e3 * third, "ratio": middle / limit}
                row |= {"gflops": achieved / 1e9, "of_limit": achieved / rate}
            rows.append(row)
    return rows


class NotRun(Exception):
    """Why a variant has no figures in a case, in words."""


def _checked(name: str, z: Tensor, loss: variants.Loss, longest: float) -> tuple[str, tuple[float, float]]:
    """``"timed"``, or why a variant is not, after a look at its numbers; and their errors.

    Raises NotRun where it cannot run, and RuntimeError where it is wrong.
    """
    if reason := variants.why_not(name, z):
        raise NotRun(f"skipped: {reason}")
    try:
        small = torch.randn(1, 32, z.shape[2], device=z.device, dtype=z.dtype, requires_grad=True)
        forward_backward(small, loss)  # compiles, where it compiles
        for _ in range(2):
            synchronize(z.device)
            start = time.perf_counter()
            value, grad = forward_backward(z, loss)
            synchronize(z.device)
            if (seconds := time.perf_counter() - start) > longest:
                break
    except torch._dynamo.exc.TorchDynamoException as error:
        raise NotRun(f"skipped: torch.compile: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise NotRun("out of memory") from error
    errors = check(name, (value, grad), float64(z))
    z.grad = None
    return "timed" if seconds <= longest else f"not timed: a call takes {seconds:.0f} s", errors


def condensed_tokens(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Condensed as the hidden states of a trained model: mean cosine about 0.5. ``[B, L, F]`` fp32."""
    torch.manual_seed(0)
    return (torch.randn(shape) + torch.randn(shape[-1])).to(device)


def rate_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype whose matrix products are a variant's limit: on a CPU fp32, to which 16 bits are widened."""
    return torch.float32 if device.type == "cpu" else dtype


def modes(z: Tensor, loss: variants.Loss) -> dict[str, Callable[[], object]]:
    """Forward and backward; forward with what backward will want; the loss alone, under ``no_grad``."""
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
    """Loss and gradient in float64 on the numbers that ``z`` holds: by the oracle, and where its matrices would be too
    large by the sweep, which the tests hold to the oracle."""
    loss = variants.naive if z.shape[1] <= 2048 else variants.build("torch")
    return forward_backward(z.detach().double().requires_grad_(), loss)


def check(name: str, got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The errors of loss and gradient relative to float64; too large ones are not timed."""
    dtype = got[1].dtype
    loss_error = ((got[0].double() - exact[0]).abs() / exact[0].abs()).item()
    grad_error = ((got[1].double() - exact[1]).norm() / exact[1].norm()).item()
    bounds = (1e-5, 1e-5 if dtype == torch.float32 else 5e-3)
    if dtype != torch.float32 and name not in variants.OURS:
        bounds = (2e-2, 0.3)
    if not (loss_error < bounds[0] and grad_error < bounds[1]):
        raise RuntimeError(
            f"{name} is wrong: relative error of the loss {loss_error:.1e}, of the gradient {grad_error:.1e}"
        )
    return loss_error, grad_error


def out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU allocator, which has no exception of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
