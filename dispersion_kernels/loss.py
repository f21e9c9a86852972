"""The public function and module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from dispersion_kernels import reference
from dispersion_kernels.backends import check_impl
from dispersion_kernels.checks import (
    beside,
    check_choice,
    check_flag,
    check_generator,
    check_tensor,
    layers_of,
    refuse_tracing,
)
from dispersion_kernels.operators import dispersion_loss, sampled_loss, without_autocast
from dispersion_kernels.potentials import (
    BUILT_IN,
    AngularSpread,
    DispersiveL2,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    at_temperature,
    for_backends,
    resolve_potential,
    temperature_field,
    temperature_of,
)
from dispersion_kernels.sampling import SampledPairs, SampledTokens, Sampling, resolve_sampling
from dispersion_kernels.sampling.estimate import draw, visits_all
from dispersion_kernels.segments import make_groups, on_device, sample_packed_tokens, sample_tokens, warn_of_no_pair

Reduction = Literal["mean", "sum", "none"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SamplingStats(NamedTuple):
    """What :func:`fused_dispersion_loss` says of its estimate with ``return_stats=True``."""

    relative_error: Tensor
    """The relative error to expect of the gradient, the root of its mean square: ``[]``, or ``[layers]`` for a list. It
    is estimated from the residuals of a few thousand pairs, and right within a third or so; 0 where all pairs were
    visited."""


@overload
def fused_dispersion_loss(
    z: Tensor | Sequence[Tensor],
    potential: str | Potential = "angular_spread",
    *,
    tau: float | Tensor | None = None,
    clamp: float | None = None,
    eps: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    sampling: Sampling | float | None = None,
    generator: torch.Generator | None = None,
    return_stats: Literal[False] = False,
    reduction: Reduction = "mean",
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor: ...
@overload
def fused_dispersion_loss(
    z: Tensor | Sequence[Tensor],
    potential: str | Potential = "angular_spread",
    *,
    tau: float | Tensor | None = None,
    clamp: float | None = None,
    eps: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    sampling: Sampling | float | None = None,
    generator: torch.Generator | None = None,
    return_stats: Literal[True],
    reduction: Reduction = "mean",
    recompute: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, SamplingStats]: ...
def fused_dispersion_loss(
    z: Tensor | Sequence[Tensor],
    potential: str | Potential = "angular_spread",
    *,
    tau: float | Tensor | None = None,
    clamp: float | None = None,
    eps: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    document_ids: Tensor | None = None,
    sampling: Sampling | float | None = None,
    generator: torch.Generator | None = None,
    return_stats: bool = False,
    reduction: Reduction = "mean",
    recompute: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, SamplingStats]:
    """The dispersion loss over all pairs of tokens of each sequence, exact, without the L x L matrix.

    For each sequence of n ordered pairs of tokens, with ``c_ij = x_i . x_j`` of the row-transformed tokens::

        loss = log(1/n sum_{i != j} psi(c_ij)) + eps          (log-mean potentials; else the mean itself)

    and for the default, ``angular_spread``: ``x = z / (|z| + eps)``, ``psi = exp(-D / tau)``,
    ``D = arccos(clip(c, -1 + clamp, 1 - clamp)) / pi`` with a straight-through clip. Add it to the cross-entropy with a
    weight of about 0.1. Loss and gradient take 3 B L^2 F FLOPs together and memory O(B L F); under ``torch.no_grad``
    the loss alone takes 1 B L^2 F.

    Args:
        z: hidden states ``[B, L, F]``, or ``[L, F]`` for one sequence, or ``[T, F]`` packed with ``cu_seqlens``, or a
            list of them, one a layer, whose losses are averaged, on the device of the first (and mask,
            ``document_ids`` and ``cu_seqlens`` with it). fp64, fp32, bf16 or fp16, any strides, F >= 2. Sums are fp32
            (fp64 for fp64).
        potential: ``"angular_spread"``, ``"orthogonalization"``, ``"l2_repel"``, ``"decorrelation"``,
            ``"perplexity_entropy"``, ``"uniformity"``, ``"dispersive_l2"``, or a :class:`Potential`.
        tau, clamp, eps: fields of the named potential to set; None leaves its default. tau (and sigma2 and t of the
            potentials that have them) may be a tensor of one number. It is data: ``torch.compile`` compiles once for
            all values, and one that requires a gradient gets it, from one or two more sweeps in PyTorch. Reading it on
            an accelerator synchronises.
        mask: boolean, ``z.shape[:-1]``; False takes a token out of all pairs.
        cu_seqlens: int32 ``[S + 1]``, as in flash-attention: sequence s is the tokens ``cu_seqlens[s]:cu_seqlens[s +
            1]`` of the packed ``z``. On the CPU its values are checked here; on an accelerator by an assertion on the
            device.
        document_ids: integers, ``z.shape[:-1]``: only tokens of equal id pair; a negative id takes a token out. The row
            stays one sequence with one loss, the (log-)mean over the pairs that are left. For a loss a document, pack
            them with ``cu_seqlens``.
        sampling: None: all pairs. A fraction of them, as 1/16, or :class:`SampledPairs`: an unbiased estimate in less
            time, for potentials of the cosine or the correlation. :class:`SampledTokens`: all pairs of some tokens, as
            published.
        generator: for these draws; on the device of ``z``.
        return_stats: also return :class:`SamplingStats`, the error to expect of sampled pairs.
        reduction: ``"mean"`` over the sequences that have a pair, their ``"sum"``, or ``"none"``: one loss a sequence,
            ``[B]``, ``[S]`` or ``[]``, 0 for those without a pair.
        recompute: keep the tokens alone between forward and backward, and sweep again there: 4 instead of 3 B L^2 F
            FLOPs.
        impl: ``"auto"``; ``"triton"`` or ``"cuda"``, the GPU kernels; ``"cpu"``, the C++ kernel; ``"torch"``, the same
            sweep in PyTorch, on any device; ``"reference"``, which materialises. See :func:`supported`.

    Returns:
        The loss in fp32 (fp64 for fp64 tokens). 0 with a zero gradient where no sequence has two tokens that pair, with
        a warning, once a process, where that is known without waiting for an accelerator. NaN for a sequence with a NaN
        or infinity among the tokens that take part, or a norm beyond fp32's range, 3.4e38, or, for the potentials of a
        distance, a squared norm of a token less their mean, or an exponent, beyond 1e37. A norm below 1.2e-38 counts as
        0. With ``return_stats`` a pair: the loss, and :class:`SamplingStats`.

    Raises:
        ValueError: a shape or value that is wrong. The message names the argument and what it should be.
        TypeError: a type or dtype that is wrong.
        RuntimeError: an explicit ``impl`` that cannot run here; a second derivative (``impl="reference"`` has one).

    Source: Liu et al., ICML 2026, arXiv 2602.00217; for the others see :mod:`dispersion_kernels.potentials`.
    """
    resolved = resolve_potential(potential, tau=tau, clamp=clamp, eps=eps)
    check_impl(impl)
    check_reduction(reduction)
    sampling = check_sampling(sampling, resolved)
    check_flag("recompute", recompute)
    check_flag("return_stats", return_stats)
    check_generator(generator)
    refuse_tracing(impl)
    layers = layers_of(z)
    if mask is not None:
        check_tensor("mask", mask, "boolean with one entry a token", "give torch.as_tensor(mask)")
    if document_ids is not None:
        check_tensor("document_ids", document_ids, "integers, one a token", "give torch.as_tensor(document_ids)")
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, "int32 [S + 1]", "give torch.tensor(cu_seqlens, dtype=torch.int32)")
    for layer in layers:
        if layer.is_meta and not layers[0].is_meta:
            raise ValueError(
                f"z has layers on {layers[0].device} and on meta, which holds no values to average with those; "
                "materialise them, or give all on meta"
            )
        given = (beside(tensor, layer, layers[0]) for tensor in (mask, cu_seqlens, document_ids))
        _check_inputs(layer, *given)
    if isinstance(sampling, SampledPairs):
        _check_sampled(sampling, mask, cu_seqlens, document_ids, impl)
    first = layers[0]
    alike = all(
        (layer.shape, layer.dtype, layer.device) == (first.shape, first.dtype, first.device) for layer in layers
    )
    if len(layers) > 1 and (not alike or isinstance(sampling, SampledTokens) or impl == "reference"):
        # Each layer by itself: the draws are other ones in each.
        of_layers = [
            fused_dispersion_loss(
                layer,
                resolved,
                mask=beside(mask, layer, first),
                cu_seqlens=beside(cu_seqlens, layer, first),
                document_ids=beside(document_ids, layer, first),
                sampling=sampling,
                generator=generator,
                return_stats=True,
                reduction=reduction,
                recompute=recompute,
                impl=impl,
            )
            for layer in layers
        ]
        loss = torch.stack([of_layer.to(first.device) for of_layer, _ in of_layers]).mean(0)
        errors = torch.stack([of_layer.relative_error.to(first.device) for _, of_layer in of_layers])
        stats = SamplingStats(errors)
        return (loss, stats) if return_stats else loss

    one_sequence = first.dim() == 2
    if one_sequence:
        layers = [layer.unsqueeze(0) for layer in layers]
        mask = None if mask is None else mask.unsqueeze(0)
        document_ids = None if document_ids is None else document_ids.unsqueeze(0)
    if cu_seqlens is None and layers[0].shape[1] < 2 and not torch.compiler.is_compiling():
        warn_of_no_pair()
    groups = make_groups(mask, document_ids)
    if isinstance(sampling, SampledTokens) and sampling.count < layers[0].shape[1]:
        if cu_seqlens is None:
            layers[0], groups = sample_tokens(layers[0], groups, sampling.count, generator)
        else:
            groups = sample_packed_tokens(
                groups, on_device(cu_seqlens, first.device), layers[0].shape[1], sampling.count, generator
            )
    error: Tensor | None = None
    if impl == "reference":
        loss = _reference_loss(layers[0], groups, cu_seqlens, resolved, reduction)
    # A compiler would ask for each length which it is, and compile it again: there the operator does.
    elif isinstance(sampling, SampledPairs) and (
        torch.compiler.is_compiling() or not visits_all(sampling.fraction, layers[0], cu_seqlens)
    ):
        loss, error = sampled_loss(
            layers,
            groups,
            cu_seqlens,
            resolved,
            reduction,
            impl,
            recompute,
            sampling,
            draw(layers, sampling.fraction, generator),
            return_stats,
        )
    else:
        loss = dispersion_loss(layers, groups, cu_seqlens, resolved, reduction, impl, recompute)
    if reduction == "none" and one_sequence and cu_seqlens is None:
        loss = loss.squeeze(0)
    if not return_stats:
        return loss
    error = loss.new_zeros(len(layers)) if error is None else error
    return loss, SamplingStats(error.squeeze(0) if isinstance(z, Tensor) else error)


class DispersionLoss(nn.Module):
    """:func:`fused_dispersion_loss` as a module, with the published code's constructor arguments.

    Args:
        variant: the potential: a name, or a :class:`Potential`.
        tau_l2: tau of ``l2_repel`` and ``dispersive_l2``, sigma2 of ``perplexity_entropy``.
        tau_cos: tau of ``angular_spread``. Either may be a tensor, which becomes the buffer ``tau``, or a parameter.
        margin: of ``orthogonalization``.
        epsilon: eps of the potentials that have one.
        clamp_threshold: clamp of ``angular_spread`` and ``orthogonalization``.
        sampling: all pairs, by default. The published code draws 256 tokens: ``SampledTokens(256)``.
        reduction, recompute, impl: as in :func:`fused_dispersion_loss`.

    As in the published class, every variant accepts all arguments and ignores those that it does not use. Errors are
    raised here, as there.
    """

    def __init__(
        self,
        variant: str | Potential = "angular_spread",
        tau_l2: float | Tensor = 1.0,
        tau_cos: float | Tensor = 1.0,
        margin: float = 0.5,
        epsilon: float = 0.01,
        clamp_threshold: float = 0.25,
        *,
        sampling: Sampling | float | None = None,
        reduction: Reduction = "mean",
        recompute: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.potential: Potential
        cosine: Any = tau_cos
        distance: Any = tau_l2
        match variant if isinstance(variant, str) else None:
            case "angular_spread":
                self.potential = AngularSpread(tau=cosine, clamp=clamp_threshold, eps=epsilon)
            case "orthogonalization":
                self.potential = Orthogonalization(margin=margin, clamp=clamp_threshold, eps=epsilon)
            case "l2_repel":
                self.potential = L2Repel(tau=distance, eps=epsilon)
            case "perplexity_entropy":
                self.potential = PerplexityEntropy(sigma2=distance, eps=epsilon)
            case "dispersive_l2":
                self.potential = DispersiveL2(tau=distance)
            case _:
                self.potential = resolve_potential(variant)
        check_impl(impl)
        check_reduction(reduction)
        self.sampling = check_sampling(sampling, self.potential)
        check_flag("recompute", recompute)
        self.reduction, self.recompute, self.impl = reduction, recompute, impl
        self.tau: Tensor | None
        field = temperature_field(self.potential)
        tau = None if field is None else getattr(self.potential, field)
        if isinstance(tau, nn.Parameter):
            self.register_parameter("tau", tau)
        else:
            self.register_buffer("tau", tau if isinstance(tau, Tensor) else None)

    def forward(
        self,
        z: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        document_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of ``z``; arguments as in :func:`fused_dispersion_loss`."""
        return fused_dispersion_loss(
            z,
            self.potential if self.tau is None else at_temperature(self.potential, self.tau),
            mask=mask,
            cu_seqlens=cu_seqlens,
            document_ids=document_ids,
            sampling=self.sampling,
            generator=generator,
            reduction=self.reduction,
            recompute=self.recompute,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.potential}, sampling={self.sampling}, reduction={self.reduction!r}, recompute={self.recompute}, "
            f"impl={self.impl!r}"
        )


def _reference_loss(
    z: Tensor, groups: Tensor | None, cu_seqlens: Tensor | None, potential: Potential, reduction: Reduction
) -> Tensor:
    for values in (groups, cu_seqlens):
        if values is not None and (values.is_meta or type(values).__name__ == "FakeTensor"):
            raise ValueError(
                "impl='reference' reads the values of mask, document_ids and cu_seqlens, and a meta or fake tensor "
                "holds none; take impl='torch' or 'auto'"
            )
    with without_autocast(z.device):
        temperature = temperature_of(potential)
        if temperature is not None:
            potential = at_temperature(potential, temperature)
        losses, pairs = reference.dispersion_loss(z, for_backends(potential), groups, cu_seqlens)
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (pairs > 0).sum().clamp(min=1)


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, ("mean", "sum", "none"))


def check_sampling(sampling: Sampling | float | None, potential: Potential) -> Sampling | None:
    resolved = resolve_sampling(sampling)
    if isinstance(resolved, SampledPairs) and potential.row_transform == "none":
        names = ", ".join(name for name, cls in BUILT_IN.items() if cls.row_transform != "none")
        raise ValueError(
            f"sampling={sampling!r} was given, but potential {potential.name()!r} is not a function of the cosine of a "
            f"pair alone; pairs are sampled for {names}, and your own: take sampling=None, or SampledTokens"
        )
    return resolved


def _check_sampled(
    sampling: SampledPairs, mask: Tensor | None, cu_seqlens: Tensor | None, document_ids: Tensor | None, impl: str
) -> None:
    if impl == "reference":
        raise ValueError(
            f"impl='reference' materialises all pairs, and sampling={sampling} was given; take another impl"
        )
    for name, value in {"mask": mask, "cu_seqlens": cu_seqlens, "document_ids": document_ids}.items():
        if value is not None and sampling.fraction == 0:
            raise ValueError(f"fraction=0 is for whole sequences, and {name} was given; take a small one, as 1/64")
        if value is not None and sampling.control_variate == "full_rank":
            raise ValueError(f"full_rank is for whole sequences, and {name} was given; take control_variate='low_rank'")


def _check_inputs(z: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, document_ids: Tensor | None) -> None:
    if type(z).__name__ == "DTensor":
        raise TypeError(
            "z is a DTensor, whose shards hold only a part of the pairs; pass the local tensor of whole sequences: "
            "z.to_local() where it is sharded over the batch, z.full_tensor() elsewhere"
        )
    if z.is_nested or z.layout != torch.strided:
        raise TypeError(
            "z must be a dense tensor, got a nested or sparse one; for a jagged nested tensor pass z.values() and "
            "cu_seqlens=z.offsets().int()"
        )
    if z.dtype not in _DTYPES:
        raise TypeError(f"z must be float64, float32, bfloat16 or float16, got {z.dtype}; convert it: z.float()")
    if cu_seqlens is not None:
        if z.dim() != 2:
            raise ValueError(
                f"with cu_seqlens z must be packed, [T, F], got shape {tuple(z.shape)}; drop a batch dimension of 1: "
                "z.squeeze(0)"
            )
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32, as in flash-attention, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
            raise ValueError(
                f"cu_seqlens must be [S + 1], the S + 1 bounds of S sequences, got shape {tuple(cu_seqlens.shape)}"
            )
        if cu_seqlens.device not in (z.device, torch.device("cpu")):
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; it must be on {z.device}, with z, or on the CPU")
        if document_ids is not None:
            raise ValueError("both cu_seqlens and document_ids given; cu_seqlens already separates the sequences")
    elif z.dim() not in (2, 3):
        raise ValueError(
            f"z must be [B, L, F], [L, F], or packed [T, F] with cu_seqlens, got shape {tuple(z.shape)}; merge further "
            "batch dimensions with z.flatten(0, -3)"
        )
    if z.shape[-1] < 2:
        raise ValueError(f"z must have at least 2 features, got shape {tuple(z.shape)}; its last dimension is F")
    for name, per_token in (("mask", mask), ("document_ids", document_ids)):
        if per_token is None:
            continue
        if per_token.shape != z.shape[:-1]:
            raise ValueError(
                f"{name} must have one entry a token, shape {tuple(z.shape[:-1])}, got {tuple(per_token.shape)}"
            )
        if per_token.device != z.device:
            raise ValueError(f"{name} is on {per_token.device}; it must be on {z.device}, with z")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be boolean, True for the tokens that take part, got {mask.dtype}; of 0 and 1 take "
            "mask.bool(), of an additive mask of 0 and -inf mask == 0"
        )
    if document_ids is not None and (
        document_ids.is_floating_point() or document_ids.is_complex() or document_ids.dtype == torch.bool
    ):
        raise TypeError(f"document_ids must be integers, got {document_ids.dtype}; which tokens take part is mask")
