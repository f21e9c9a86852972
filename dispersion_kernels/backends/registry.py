"""The registry of backends: the choice of one for a call, and the reasons why another cannot compute it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dispersion_kernels.backends import cpu, cuda, torch_tiled
from dispersion_kernels.backends.gpu import launch
from dispersion_kernels.backends.interface import Finish, Losses, Run
from dispersion_kernels.checks import check_tensor
from dispersion_kernels.options import check_impl
from dispersion_kernels.potentials import Potential, is_built_in, resolve_potential
from dispersion_kernels.sampling import SampledPairs, cpu_sampler
from dispersion_kernels.sampling.estimate import Sampler

if TYPE_CHECKING:
    from dispersion_kernels.backends.triton.backend import TritonKernels


@dataclass(frozen=True)
class Backend:
    """A way to compute the loss."""

    why_not: Callable[[Tensor, Potential], str | None]
    """Reason, in words, why tokens ``[B, L, F]`` and a potential cannot be computed; None where they can."""
    run: Run
    sampler: Callable[[Potential, SampledPairs, Tensor, Tensor | None], Sampler | None] = lambda *_: None
    """Sampler of the backend's own for a potential, options, tokens ``[B, L, F]`` and cu_seqlens; None where
    :mod:`dispersion_kernels.sampling.torch_sampler` is to sample over ``run``."""
    finish: Finish | None = None
    """Last step of backward, in one launch; None where G lacks nothing but the scale."""

    def run_whole(
        self,
        layers: Sequence[Tensor],
        pair_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        potential: Potential,
        reduction: str,
        with_grad: Sequence[bool],
        max_seqlen: int | None = None,
    ) -> Losses:
        """:attr:`run` with G that lacks nothing but the scale."""
        loss, grads, scale = self.run(layers, pair_ids, cu_seqlens, potential, reduction, with_grad, max_seqlen)
        if self.finish is None or scale is None:
            return loss, grads, scale
        one = torch.ones_like(scale)
        return loss, self.finish(grads, layers, scale, one[0], potential, scale.dtype), one


@dataclass(frozen=True)
class Support:
    """Answer whether a backend can compute a call: true if it can; else false, and ``reason`` says why not."""

    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None


def supported(impl: str, z: Tensor, potential: str | Potential = "angular_spread") -> Support:
    """Whether ``impl`` can compute the loss of these tokens.

    Args:
        impl: ``"triton"`` or ``"cuda"`` (the GPU kernels), ``"cpu"`` (the C++ kernel), ``"torch"`` (PyTorch alone)
            or ``"reference"`` (materialises); ``"auto"`` always can.
        z: hidden states; only their device and dtype matter.
        potential: as in :func:`fused_dispersion_loss`.

    Returns:
        A :class:`Support`: true, or false with the ``reason`` in words.

    Raises:
        ValueError: an unknown ``impl`` or potential.
        TypeError: no tensor, as a list of layers.

    Example: ``supported("triton", z).reason``
    """
    check_impl(impl)
    check_tensor("z", z, "hidden states", "of a list of layers, ask for each: supported(impl, layers[0])")
    resolved = resolve_potential(potential)
    return Support(BACKENDS[impl].why_not(z, resolved) if impl in BACKENDS else None)


def choose(impl: str, z: Tensor, potential: Potential) -> str:
    """Name in ``BACKENDS`` of the backend for a call.

    An explicit request that cannot be met raises ``RuntimeError``; another backend never takes its place.
    """
    if impl != "auto":
        reason = BACKENDS[impl].why_not(z, potential)
        if reason is not None:
            raise RuntimeError(f'impl="{impl}" cannot run here: {reason}. impl="auto" chooses what can')
        return impl
    if z.device.type != "cpu":
        return next(impl for impl in ("triton", "cuda", "torch") if BACKENDS[impl].why_not(z, potential) is None)
    # Triton is no candidate on the CPU, where it has only its interpreter, which is for tests.
    reason = _why_not_cpu(z, potential)
    # The warning is for a missing kernel alone, which the user can build; other dtypes and potentials have only the
    # torch backend.
    if reason is not None and reason == cpu.unavailable_reason():
        _warn_that_there_is_no_kernel(reason)
    return "cpu" if reason is None else "torch"


@functools.cache
def _warn_that_there_is_no_kernel(reason: str) -> None:
    """Warning, once per process, that the CPU kernel was not built: pip hides the output of the build."""
    warnings.warn(
        f"dispersion_kernels computes in plain PyTorch, several times slower than its CPU kernel: {reason}. "
        "(`python -m dispersion_kernels.env_report` says what was built; "
        'impl="torch" asks for PyTorch and does not warn)',
        stacklevel=2,
    )


def _why_not_cpu(z: Tensor, potential: Potential) -> str | None:
    if z.device.type != "cpu":
        return f"the tokens are on {z.device}, and the CPU kernel takes CPU tensors"
    if z.dtype == torch.float64:
        return "the CPU kernel computes in fp32, and the tokens are float64"
    if not is_built_in(potential) or potential.name() not in cpu.PARAMETERS:
        return f"the CPU kernel has no potential {potential.name()!r}; it has {', '.join(cpu.PARAMETERS)}"
    return cpu.unavailable_reason()


def _why_not_triton(z: Tensor, potential: Potential) -> str | None:
    if triton_version() is None:
        return "Triton is not installed (there is none for macOS; on Windows it is triton-windows): pip install triton"
    if z.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "the tokens are on the CPU, and the Triton kernels take GPU tensors"
    elif z.device.type != "cuda":
        return f"the tokens are on {z.device}, and the Triton kernels run on NVIDIA and AMD GPUs"
    elif not torch.version.hip and torch.cuda.get_device_capability(z.device) < (8, 0):
        return _too_old(z.device, "Triton")
    if z.dtype == torch.float64:
        return "the Triton kernels compute in fp32, and the tokens are float64"
    if not is_built_in(potential):
        if potential.triton is None:
            return (
                f"potential {potential.name()!r} has no Triton function; give its class an attribute "
                "triton = staticmethod(f), f a @triton.jit function (c, p0, p1, p2, p3) that returns psi and its slope"
            )
        try:
            fields = potential.params()
        except (TypeError, ValueError):
            return (
                f"potential {potential.name()!r} has a field that is no number, and the Triton kernels pass on numbers"
            )
        if len(fields) > 4:
            return f"potential {potential.name()!r} has more than four fields, and the Triton kernels pass on p0 to p3"
    return None


def _why_not_cuda(z: Tensor, potential: Potential) -> str | None:
    reason = cuda.unavailable_reason()
    if reason is not None:
        return reason
    if not torch.cuda.is_available() or torch.version.hip:
        return "there is no CUDA device"
    if z.device.type != "cuda":
        return f"the tokens are on {z.device}, and the CUDA kernels take tensors on a CUDA device"
    if torch.cuda.get_device_capability(z.device) < (8, 0):
        return _too_old(z.device, "CUDA")
    if z.dtype == torch.float64:
        return "the CUDA kernels compute in fp32, and the tokens are float64"
    if not is_built_in(potential):
        return f"the CUDA kernels are compiled, and potential {potential.name()!r} is not among them; Triton's take it"
    return None


def _too_old(device: torch.device, kernels: str) -> str:
    found = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{device} has compute capability {found}, and the {kernels} kernels need 8.0 (Ampere) or newer"


@functools.cache
def triton_version() -> str | None:
    """Version of the installed Triton, found without importing it; None if Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _triton_kernels(z: Tensor) -> TritonKernels:
    from dispersion_kernels.backends.triton.backend import TritonKernels  # imports Triton

    return TritonKernels(z)


def _gpu_backend(
    why_not: Callable[[Tensor, Potential], str | None], kernels_for: Callable[[Tensor], launch.Kernels]
) -> Backend:
    return Backend(why_not, partial(launch.run, kernels_for), finish=partial(launch.finish, kernels_for))


BACKENDS = {
    "triton": _gpu_backend(_why_not_triton, _triton_kernels),
    "cuda": _gpu_backend(_why_not_cuda, cuda.CudaKernels),
    "cpu": Backend(_why_not_cpu, cpu.run, cpu_sampler.sampler),
    "torch": Backend(lambda *_: None, torch_tiled.run),
}
