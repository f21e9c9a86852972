"""Public loss: the function :func:`fused_dispersion_loss` and the module :class:`DispersionLoss`."""

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
from dispersion_kernels.segments import make_pair_ids, on_device, sample_packed_tokens, sample_tokens, warn_of_no_pair

Reduction = Literal["mean", "sum", "none"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SamplingStats(NamedTuple):
    """Statistics of the estimate that :func:`fused_dispersion_loss` returns with ``return_stats=True``."""

    relative_error: Tensor
    """Expected relative error of the gradient (root mean square), ``[]``, or ``[layers]`` for a list. The residuals of
    a few thousand pairs give it, within about a third where all tokens have a like part in the gradient, too low where
    a few have most of it; infinite where the noise exceeds the gradient, 0 where all pairs were visited."""


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
    """Dispersion loss over the pairs of tokens of each sequence, exact by default, without the L x L matrix.

    The loss of n ordered pairs is ``log(1/n sum_{i != j} psi(x_i . x_j)) + eps``, or the mean itself; x and psi are
    defined in :mod:`dispersion_kernels.potentials`. Add it to the cross-entropy with a weight of about 0.1. Loss and
    gradient take 3 B L^2 F FLOPs and O(B L F) memory, the loss alone 1 B L^2 F. Source: Liu et al., arXiv 2602.00217.

    Args:
        z: hidden states ``[B, L, F]``, ``[L, F]``, or ``[T, F]`` packed with ``cu_seqlens``; or a list, one per layer,
            whose losses are averaged on the first one's device, where ``mask``, ``document_ids`` and ``cu_seqlens``
            are. fp64, fp32, bf16 or fp16; any strides; F >= 2. Sums are fp32 (fp64 for fp64).
        potential: ``"angular_spread"``, ``"orthogonalization"``, ``"l2_repel"``, ``"decorrelation"``, ``"uniformity"``,
            ``"perplexity_entropy"``, ``"dispersive_l2"``, or a :class:`Potential`.
        tau, clamp, eps: fields of the named potential; None for its default. ``tau`` (and ``sigma2``, ``t`` of a
            :class:`Potential`) may be a one-element tensor: ``torch.compile`` compiles once for all values, a gradient
            takes one or two more sweeps in PyTorch, and reading the value on an accelerator synchronises.
        mask: boolean ``z.shape[:-1]``; False takes a token out of all pairs.
        cu_seqlens: int32 ``[S + 1]``, as in flash-attention; ``z[cu_seqlens[s] : cu_seqlens[s + 1]]`` is sequence s.
            Checked here on a CPU, by an assertion on the device on an accelerator.
        document_ids: integers ``z.shape[:-1]``; tokens of equal id pair, a negative id takes a token out. A row keeps
            one loss, over the pairs that are left; ``cu_seqlens`` gives one loss per document.
        sampling: None for all pairs; a fraction or :class:`SampledPairs` for an unbiased estimate, for potentials of
            the cosine or correlation; :class:`SampledTokens` for all pairs of some tokens, as published.
        generator: random generator for ``sampling``, on the device of ``z``.
        return_stats: also return :class:`SamplingStats`, with the expected error of sampled pairs.
        reduction: ``"mean"`` or ``"sum"`` over the sequences that have a pair, or ``"none"``: ``[B]``, ``[S]`` or
            ``[]``, 0 for sequences without a pair.
        recompute: keep only the tokens for backward and sweep again there, 4 B L^2 F FLOPs in all.
        impl: backend: ``"auto"``; ``"triton"`` or ``"cuda"``, on GPUs; ``"cpu"``, in C++; ``"torch"``, on any device;
            ``"reference"``, which materialises the L x L matrix. See :func:`supported`.

    Returns:
        Loss in fp32 (fp64 for fp64), or a pair of loss and stats. 0 with zero gradient where no tokens pair, with one
        warning per process if the host knows. NaN for a sequence whose paired tokens have a NaN, an infinity or a norm
        above 3.4e38 (for distances a centred squared norm or exponent above 1e37). Norms below 1.2e-38 count as 0.

    Raises:
        ValueError, TypeError: a wrong shape or value; a wrong type or dtype. The message names the argument.
        RuntimeError: an ``impl`` that cannot run here; a second derivative (only ``impl="reference"`` has one).

    Example: ``loss = cross_entropy + 0.1 * fused_dispersion_loss(hidden_states, mask=attention_mask.bool())``"""
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
        # One call per layer: layers differ, the reference takes one layer, or the tokens are drawn for each layer.
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
    pair_ids = make_pair_ids(mask, document_ids)
    if isinstance(sampling, SampledTokens) and sampling.count < layers[0].shape[1]:
        if cu_seqlens is None:
            layers[0], pair_ids = sample_tokens(layers[0], pair_ids, sampling.count, generator)
        else:
            pair_ids = sample_packed_tokens(
                pair_ids, on_device(cu_seqlens, first.device), layers[0].shape[1], sampling.count, generator
            )
    error: Tensor | None = None
    if impl == "reference":
        loss = _reference_loss(layers[0], pair_ids, cu_seqlens, resolved, reduction)
    # Under a compiler the operator calls ``visits_all``: here it would be a guard, and a compilation, for each length.
    elif isinstance(sampling, SampledPairs) and (
        torch.compiler.is_compiling() or not visits_all(sampling.fraction, layers[0], cu_seqlens)
    ):
        loss, error = sampled_loss(
            layers,
            pair_ids,
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
        loss = dispersion_loss(layers, pair_ids, cu_seqlens, resolved, reduction, impl, recompute)
    if reduction == "none" and one_sequence and cu_seqlens is None:
        loss = loss.squeeze(0)
    if not return_stats:
        return loss
    error = loss.new_zeros(len(layers)) if error is None else error
    return loss, SamplingStats(error.squeeze(0) if isinstance(z, Tensor) else error)


class DispersionLoss(nn.Module):
    """Module form of :func:`fused_dispersion_loss` with the published code's constructor arguments.

    Args:
        variant: name of a potential, or a :class:`Potential`.
        tau_l2: ``tau`` of ``l2_repel`` and ``dispersive_l2``, ``sigma2`` of ``perplexity_entropy``.
        tau_cos: ``tau`` of ``angular_spread``. A tensor for ``tau_l2`` or ``tau_cos`` becomes the module's buffer
            ``tau``, a parameter its parameter ``tau``.
        margin: ``margin`` of ``orthogonalization``.
        epsilon: ``eps`` of the potentials that have one.
        clamp_threshold: ``clamp`` of ``angular_spread`` and ``orthogonalization``.
        sampling: None, the default, for all pairs. The published code draws 256 tokens: ``SampledTokens(256)``.
        reduction, recompute, impl: as in :func:`fused_dispersion_loss`.

    Every variant accepts all arguments and ignores those that it does not use, as the published class does.

    Raises:
        ValueError, TypeError: as :func:`fused_dispersion_loss`, at construction.
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
        """Loss of ``z``; arguments as in :func:`fused_dispersion_loss`."""
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
    z: Tensor, pair_ids: Tensor | None, cu_seqlens: Tensor | None, potential: Potential, reduction: Reduction
) -> Tensor:
    for values in (pair_ids, cu_seqlens):
        if values is not None and (values.is_meta or type(values).__name__ == "FakeTensor"):
            raise ValueError(
                "impl='reference' reads the values of mask, document_ids and cu_seqlens, and a meta or fake tensor "
                "holds none; take impl='torch' or 'auto'"
            )
    with without_autocast(z.device):
        temperature = temperature_of(potential)
        if temperature is not None:
            known = type(temperature) is Tensor and not temperature.is_meta and not torch.compiler.is_compiling()
            if known and not torch._C._are_functorch_transforms_active():
                at_temperature(potential, float(temperature))  # an error for a value out of range
            potential = at_temperature(potential, temperature)
        losses, pairs = reference.dispersion_loss(z, for_backends(potential), pair_ids, cu_seqlens)
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
    if isinstance(resolved, SampledPairs) and temperature_of(potential) is not None:
        raise TypeError(
            f"{temperature_field(potential)} must be a number with SampledPairs, got a tensor; give its float(), or "
            "leave sampling out"
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
