"""The host's time for a call of the Triton backend, forward and backward: its Python and Triton's, measured without a
GPU, and usual figures for the driver and for PyTorch's operations.

``python -m kernel_audit.host_time`` measures ``HOST`` on this machine and prints it.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import variants
from benchmarks.machine import describe
from dispersion_kernels import fused_dispersion_loss
from dispersion_kernels.backends import registry
from dispersion_kernels.backends.gpu import launch


class Host(NamedTuple):
    """Measured seconds. A step is a launch of a kernel or an operation of PyTorch's."""

    call: float  # Python of a call: public function, operator, autograd, launcher
    layer: float  # Python for each layer
    step: float  # Python for each step
    launch: float  # Triton's for each launch, up to its launcher in C: binding, specialisation, key, look-up


Sample = tuple[tuple[int, int, int, int], float]  # what each figure of ``Host`` counts in a call, and seconds

# Output of the command; another run is within 20%.
HOST = Host(call=0.00016, layer=2.1e-05, step=2.5e-05, launch=4.2e-05)
MACHINE = "Intel(R) Xeon(R) Processor (family 6, model 167); Python 3.11.7, PyTorch 2.13.0+cpu, Triton 3.9.0"
# Usual figures in seconds, not measured here: Triton's launcher in C with cuLaunchKernelEx, and an operation of
# PyTorch's on CUDA tensors.
DRIVER, DISPATCH = 4e-6, 5e-6
# Layers, features and length of the calls that are measured.
SHAPES = [(1, 768, 1024), (1, 128, 1024), (12, 768, 1024), (12, 128, 1024), (1, 768, 16384)]


def main() -> None:
    argparse.ArgumentParser(prog="python -m kernel_audit.host_time", description=__doc__).parse_args()
    samples = [sample for shape in SHAPES for sample in measure(*shape)]
    host, machine = fit(samples), describe()
    for counts, taken in samples:
        print(f"{counts}: {1e6 * taken:.0f} us, fitted {1e6 * _fitted(counts, host):.0f} us")
    print(f"HOST = Host({', '.join(f'{name}={value:.2g}' for name, value in host._asdict().items())})")
    names = {"Python": "python", "PyTorch": "torch", "Triton": "triton"}
    versions = ", ".join(f"{name} {machine[key]}" for name, key in names.items())
    print(f'MACHINE = "{machine["processor"]}; {versions}"')


def seconds(layers: int, launches: int, operations: int) -> float:
    """Time in which the host issues a call: what is measured, and the usual figures."""
    measured = _fitted((1, layers, launches + operations, launches), HOST)
    return measured + DRIVER * launches + DISPATCH * operations


def _fitted(counts: tuple[int, ...], host: Host) -> float:
    return sum(count * figure for count, figure in zip(counts, host, strict=True))


def fit(samples: list[Sample]) -> Host:
    """Figures for which the sum of the squares of relative errors is least."""
    rows = torch.tensor([[count / taken for count in counts] for counts, taken in samples], dtype=torch.float64)
    return Host(*torch.linalg.lstsq(rows, torch.ones_like(rows[:, :1])).solution.flatten().tolist())


def measure(layers: int, features: int, length: int, calls: int = 300) -> list[Sample]:
    """Medians of the thread's CPU time, which other processes do not lengthen, with launches that do nothing and with
    Triton's. Kernels and the library's products are not run. PyTorch's few other operations are, on CPU tensors:
    on meta tensors they take longer."""
    # Imported here, because they need Triton.
    from dispersion_kernels.backends.triton.backend import run
    from kernel_audit.gpu_model import batch_of, record

    batch, dtype, samples = batch_of(length), torch.bfloat16, []
    work = record("sm_90", 132, batch, length, features, dtype, None, layers)
    z = [torch.empty(batch, length, features, dtype=dtype, requires_grad=True) for _ in range(layers)]
    for launcher, launches in ((lambda *_: None, 0), (run, len(work.launches))):
        times = []
        with without_gpu(launcher):
            for _ in range(calls):
                for one in z:
                    one.grad = None
                began = time.thread_time()
                fused_dispersion_loss(z, variants.POTENTIAL, impl="triton").backward()
                times.append(time.thread_time() - began)
        steps = len(work.launches) + len(work.operations)
        samples.append(((1, layers, steps, launches), statistics.median(times)))
    return samples


@contextlib.contextmanager
def without_gpu(launcher: Callable[..., Any]) -> Iterator[list[str]]:
    """Context in which the Triton backend takes CPU tensors, plans for an H100, and gives its kernels to ``launcher``;
    the list gets the names of those that Triton launches, of which none runs."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from dispersion_kernels.backends.triton.backend import TritonKernels

    launched: list[str] = []
    device = object()  # no GPU's number, under which a kernel that does nothing would stay in the caches
    stub = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )

    def compiled(kernel: Any, key: str, *_: Any) -> Any:
        nothing = SimpleNamespace(function=None, packed_metadata=None, launch_metadata=lambda *_: None)
        nothing.run = lambda *_: launched.append(kernel.__name__)
        kernel.device_caches[device][0][key] = nothing
        return nothing

    def product(*_: Any, add: bool) -> None:
        with launch.fp32_accumulation():
            pass

    backend = registry._gpu_backend(lambda *_: None, lambda z: TritonKernels(z, "sm_90", "ieee", launcher, 132))
    with (
        mock.patch.dict(registry.BACKENDS, triton=backend),
        mock.patch.object(launch, "_product_", product),
        mock.patch.object(driver, "_active", stub),
        mock.patch.object(JITFunction, "_do_compile", compiled),
    ):
        yield launched


if __name__ == "__main__":
    main()
