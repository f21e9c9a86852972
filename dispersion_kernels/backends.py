"""Which backend computes the loss, and why another cannot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dispersion_kernels import native
from dispersion_kernels.potentials import Potential, resolve_potential

IMPLS = ("auto", "cpu", "torch", "reference")


@dataclass(frozen=True)
class Support:
    """Whether a backend can do something; true if it can, and else ``reason`` says why not."""

    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is None


def supported(impl: str, z: Tensor, potential: str | Potential = "angular_spread") -> Support:
    """Whether ``impl`` can compute the loss of these tokens.

    Args:
        impl: ``"cpu"`` (the C++ kernel), ``"torch"`` (the sweep in PyTorch) or ``"reference"`` (materialises);
            ``"auto"`` always can.
        z: hidden states; only their device and dtype matter.
        potential: as in :func:`fused_dispersion_loss`.

    Returns:
        A :class:`Support`: true, or false with the ``reason`` in words.

    Raises:
        ValueError: an unknown ``impl`` or potential.
    """
    check_impl(impl)
    name = resolve_potential(potential).name()
    return Support(_why_not_cpu(z, name)) if impl == "cpu" else Support()


def check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; available: {', '.join(IMPLS)}")


def choose(impl: str, z: Tensor, potential: str) -> str:
    """``"cpu"`` or ``"torch"``, for the potential of that name.

    An explicit request that cannot be met is an error, never another backend.
    """
    if impl == "torch":
        return "torch"
    reason = _why_not_cpu(z, potential)
    if reason is None:
        return "cpu"
    if impl == "cpu":
        raise RuntimeError(f'impl="cpu" cannot run here: {reason}. impl="auto" chooses what can')
    return "torch"


def _why_not_cpu(z: Tensor, potential: str) -> str | None:
    if z.device.type != "cpu":
        return f"the tokens are on {z.device}, and the CPU kernel takes CPU tensors"
    if z.dtype == torch.float64:
        return "the CPU kernel computes in fp32, and the tokens are float64"
    if potential not in native.PARAMETERS:
        return f"the CPU kernel has no potential {potential!r}; it has {', '.join(native.PARAMETERS)}"
    return native.unavailable_reason()
