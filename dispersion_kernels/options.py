"""Options of the loss beside its tensors: checked once, then handed on as one object, :class:`LossOptions`."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from dispersion_kernels.checks import check_choice, check_flag
from dispersion_kernels.potentials import BUILT_IN, Potential, resolve_potential, temperature_field, temperature_of
from dispersion_kernels.sampling import SampledPairs, Sampling, resolve_sampling

IMPLS = ("auto", "triton", "cuda", "cpu", "torch", "reference")
Reduction = Literal["mean", "sum", "none"]


class LossOptions(NamedTuple):
    """Checked options of :func:`fused_dispersion_loss`."""

    potential: Potential
    sampling: Sampling | None
    """None for all pairs."""
    reduction: Reduction
    recompute: bool
    impl: str


def check_options(
    potential: str | Potential,
    tau: float | Tensor | None,
    sampling: Sampling | float | None,
    reduction: Reduction,
    recompute: bool,
    impl: str,
) -> LossOptions:
    """Options from the arguments of :func:`fused_dispersion_loss`, which also has the errors."""
    resolved = resolve_potential(potential, tau)
    check_impl(impl)
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    sampled = _check_sampling(sampling, resolved)
    check_flag("recompute", recompute)
    return LossOptions(resolved, sampled, reduction, recompute, impl)


def check_impl(impl: str) -> None:
    check_choice("impl", impl, IMPLS)


def _check_sampling(sampling: Sampling | float | None, potential: Potential) -> Sampling | None:
    resolved = resolve_sampling(sampling)
    if isinstance(resolved, SampledPairs) and potential.row_transform == "none":
        names = ", ".join(name for name, cls in BUILT_IN.items() if cls.row_transform != "none")
        raise ValueError(
            f"sampling={sampling!r} was given, but potential {potential.name()!r} is not a function of the cosine of a "
            f"pair alone; pairs are sampled for {names}, and your own: take sampling=None, or SampledTokens"
        )
    if isinstance(resolved, SampledPairs) and temperature_of(potential) is not None:
        raise TypeError(
            f"{temperature_field(potential)} must be a number with SampledPairs, got a tensor; give its float(), or "
            "leave sampling out"
        )
    return resolved
