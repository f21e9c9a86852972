"""Public loss: the function :func:`fused_dispersion_loss` and the module :class:`DispersionLoss`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from dispersion_kernels import reference
from dispersion_kernels.checks import (
    beside,
    check_choice,
    check_flag,
    check_generator,
    check_tensor,
    layers_of,
    refuse_tracing,
)
from dispersion_kernels.numerics import loss_dtype
from dispersion_kernels.operators import dispersion_loss, without_autocast
from dispersion_kernels.options import LossOptions, Reduction, check_options
from dispersion_kernels.potentials import (
    AngularSpread,
    Decorrelation,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    at_temperature,
    for_backends,
    temperature_field,
    temperature_of,
)
from dispersion_kernels.sampling import SampledPairs, SampledTokens, Sampling
from dispersion_kernels.sampling.estimate import draw
from dispersion_kernels.sampling.threshold import evaluates_all
from dispersion_kernels.segments import (
    check_cu_seqlens,
    make_pair_ids,
    on_device,
    sample_packed_tokens,
    sample_tokens,
    warn_of_no_pair,
)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class SamplingStats(NamedTuple):
    """Statistics of the estimate that :func:`fused_dispersion_loss` returns with ``return_stats=True``."""

    relative_error: Tensor
    """Expected relative error of the gradient (root mean square), ``[]``, or ``[layers]`` for a list. The residuals of
    a few thousand pairs give it, within about a third where all tokens have a like part in the gradient, too low where
    a few have most of it; infinite where the noise exceeds the gradient, 0 where all pairs were evaluated."""


@overload
def fused_dispersion_loss(
    z: Tensor | Sequence[Tensor],
    potential: str | Potential = "angular_spread",
    *,
    tau: float | Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
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
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
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
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
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
            are. fp64, fp32, bf16 or fp16; any strides; F >= 2. Sums are fp32 (fp64 for fp64). On a GPU under autocast
            fp32 is rounded to autocast's dtype; within ``torch.autocast("cuda", enabled=False)`` it is not.
        potential: ``"angular_spread"``, ``"orthogonalization"``, ``"l2_repel"``, ``"decorrelation"``, ``"uniformity"``,
            ``"perplexity_entropy"``, ``"dispersive_l2"``, or a :class:`Potential`.
        tau: temperature of the named potential; None for its default. Other fields: ``AngularSpread(clamp=0.1)``.
            ``tau`` (and ``sigma2``, ``t`` of a :class:`Potential`) may be a one-element tensor, but not with
            :class:`SampledPairs`: ``torch.compile`` compiles once for all values, a gradient takes one or two more
            sweeps in PyTorch, and reading the value on an accelerator synchronises.
        mask: boolean ``z.shape[:-1]``; False takes a token out of all pairs.
        cu_seqlens: int32 ``[S + 1]``, as in flash-attention; ``z[cu_seqlens[s] : cu_seqlens[s + 1]]`` is sequence s.
            Checked here on a CPU, by an assertion on the device on an accelerator.
        max_seqlen: length of the longest of these sequences, or more, as in flash-attention. With it, or with
            ``cu_seqlens`` on the CPU, the Triton kernels take 3 products a pair of tokens of 768 features, not 8; the
            result is the same but for rounding.
        document_ids: integers ``z.shape[:-1]``; tokens of equal id pair, a negative id takes a token out. A row keeps
            one loss, over the pairs that are left; ``cu_seqlens``, which excludes it, gives one loss per document.
        sampling: None for all pairs; a fraction or :class:`SampledPairs` for an unbiased estimate, for potentials of
            the cosine or correlation; :class:`SampledTokens` for all pairs of some tokens, as published.
        generator: random generator for ``sampling``, on the device of ``z``.
        return_stats: also return :class:`SamplingStats`, with the expected error of sampled pairs.
        reduction: ``"mean"`` or ``"sum"`` over the sequences that have a pair, or ``"none"``: ``[B]``, ``[S]`` or
            ``[]``, 0 for sequences without a pair.
        recompute: keep only the tokens for backward and sweep again there, 4 B L^2 F FLOPs in all.
        impl: backend: ``"auto"``; ``"triton"`` or ``"cuda"``, on GPUs; ``"cpu"``, in C++; ``"torch"``, on any device;
            ``"reference"``, which materialises the L x L matrix and takes no :class:`SampledPairs`. See
            :func:`supported`.

    Returns:
        Loss in fp32 (fp64 for fp64), or a pair of loss and stats. 0 with zero gradient where no tokens pair, with one
        warning per process if the host knows. NaN for a sequence whose paired tokens have a NaN, an infinity or a norm
        above 3.4e38 (for distances a centred squared norm or exponent above 1e37). Norms below 1.2e-38 count as 0.
        On a GPU NaN above 1.8e19, too, and, where eps is below 1.5e-8, for norms below 8.9e-16 other than 0.

    Raises:
        ValueError, TypeError: a wrong shape or value; a wrong type or dtype. The message names the argument.
        RuntimeError: an ``impl`` that cannot run here; a second derivative (only ``impl="reference"`` has one).

    Example: ``loss = cross_entropy + 0.1 * fused_dispersion_loss(hidden_states, mask=attention_mask.bool())``"""
    options = check_options(potential, tau, sampling, reduction, recompute, impl)
    check_flag("return_stats", return_stats)
    loss, error = loss_and_error(z, options, mask, cu_seqlens, max_seqlen, document_ids, generator, return_stats)
    return loss if error is None else (loss, SamplingStats(error))


def loss_and_error(
    z: Tensor | Sequence[Tensor],
    options: LossOptions,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    document_ids: Tensor | None,
    generator: torch.Generator | None,
    with_error: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss of :func:`fused_dispersion_loss` with checked ``options``; and the ``relative_error`` of
    :class:`SamplingStats`, None without ``with_error``."""
    check_generator(generator)
    refuse_tracing(options.impl)
    layers = layers_of(z)
    if mask is not None:
        check_tensor("mask", mask, "boolean with one entry a token", "give torch.as_tensor(mask)")
    if document_ids is not None:
        check_tensor("document_ids", document_ids, "integers, one a token", "give torch.as_tensor(document_ids)")
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, "int32 [S + 1]", "give torch.tensor(cu_seqlens, dtype=torch.int32)")
    if max_seqlen is not None:
        max_seqlen = _checked_max_seqlen(max_seqlen, cu_seqlens)
    first = layers[0]
    for layer in layers:
        if layer.is_meta and not first.is_meta:
            raise ValueError(
                f"z has layers on {first.device} and on meta, which holds no values to average with those; "
                "materialise them, or give all on meta"
            )
        _check_inputs(layer, *(beside(tensor, layer, first) for tensor in (mask, cu_seqlens, document_ids)))
    layers = [layer.to(loss_dtype(layer)) for layer in layers]
    if isinstance(options.sampling, SampledPairs):
        _check_sampled(options.sampling, mask, cu_seqlens, document_ids, options.impl)
    if len(layers) == 1 or _run_together(layers, options):
        loss, errors = _loss_of_alike(
            layers, options, mask, cu_seqlens, max_seqlen, document_ids, generator, with_error
        )
    else:
        if options.reduction == "none" and cu_seqlens is None:
            _check_batches(layers)
        layer_losses, layer_errors = [], []
        for layer in layers:
            own_mask, own_cu_seqlens, own_ids = (beside(t, layer, first) for t in (mask, cu_seqlens, document_ids))
            layer_loss, layer_error = _loss_of_alike(
                [layer], options, own_mask, own_cu_seqlens, max_seqlen, own_ids, generator, with_error
            )
            layer_losses.append(layer_loss.to(first.device))
            layer_errors.append(layer_error.to(first.device))
        loss, errors = torch.stack(layer_losses).mean(0), torch.cat(layer_errors)
    if not with_error:
        return loss, None
    return loss, errors.squeeze(0) if isinstance(z, Tensor) else errors


def _run_together(layers: Sequence[Tensor], options: LossOptions) -> bool:
    """Whether one call of the operator takes all layers: they are alike, no tokens are drawn for each, and it is not
    the reference, which takes one layer."""
    first = layers[0]
    if isinstance(options.sampling, SampledTokens) or options.impl == "reference":
        return False
    return all((layer.shape, layer.dtype, layer.device) == (first.shape, first.dtype, first.device) for layer in layers)


def _loss_of_alike(
    layers: Sequence[Tensor],
    options: LossOptions,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    document_ids: Tensor | None,
    generator: torch.Generator | None,
    with_error: bool,
) -> tuple[Tensor, Tensor]:
    """Mean loss of layers that are alike in shape, dtype and device, and the error ``[layers]``: 0 where all pairs are
    evaluated, or without ``with_error``."""
    one_sequence = layers[0].dim() == 2
    if one_sequence:
        layers = [layer.unsqueeze(0) for layer in layers]
        mask = None if mask is None else mask.unsqueeze(0)
        document_ids = None if document_ids is None else document_ids.unsqueeze(0)
    z, sampling = layers[0], options.sampling
    if max_seqlen is not None and not torch.compiler.is_compiling():
        max_seqlen = min(max_seqlen, z.shape[1])  # in the range of the operator's integers
    if cu_seqlens is None and z.shape[1] < 2 and not torch.compiler.is_compiling():
        warn_of_no_pair()
    pair_ids = make_pair_ids(mask, document_ids)
    if isinstance(sampling, SampledTokens) and sampling.count < z.shape[1]:
        if cu_seqlens is None:
            z, pair_ids = sample_tokens(z, pair_ids, sampling.count, generator)
            layers = [z]
        else:
            bounds = on_device(cu_seqlens, z.device)
            pair_ids = sample_packed_tokens(pair_ids, bounds, z.shape[1], sampling.count, generator)
    error: Tensor | None = None
    if options.impl == "reference":
        loss = _reference_loss(z, pair_ids, cu_seqlens, max_seqlen, options)
    # Under a compiler the operator calls ``evaluates_all``: a call here would be a guard, and a compilation, for each
    # length.
    elif isinstance(sampling, SampledPairs) and (
        torch.compiler.is_compiling() or not evaluates_all(options, z, cu_seqlens)
    ):
        draws = draw(layers, sampling.fraction, generator)
        loss, error = dispersion_loss(layers, pair_ids, cu_seqlens, options, draws, with_error, max_seqlen)
    else:
        loss, _ = dispersion_loss(layers, pair_ids, cu_seqlens, options, max_seqlen=max_seqlen)
    if options.reduction == "none" and one_sequence and cu_seqlens is None:
        loss = loss.squeeze(0)
    return loss, loss.new_zeros(len(layers)) if error is None else error


class DispersionLoss(nn.Module):
    """Module form of :func:`fused_dispersion_loss`, with the arguments of its constructor.

    Args:
        potential, sampling, reduction, recompute, impl: as in :func:`fused_dispersion_loss`.
        tau: temperature of the named potential; None for its default. A tensor for it (or for ``sigma2`` or ``t`` of a
            :class:`Potential`) becomes the module's buffer ``tau``, a parameter its parameter ``tau``.

    Raises:
        ValueError, TypeError: as :func:`fused_dispersion_loss`, at construction.

    Example: ``loss = cross_entropy + 0.1 * DispersionLoss("uniformity")(hidden_states)``
    """

    def __init__(
        self,
        potential: str | Potential = "angular_spread",
        *,
        tau: float | Tensor | None = None,
        sampling: Sampling | float | None = None,
        reduction: Reduction = "mean",
        recompute: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self._options = check_options(potential, tau, sampling, reduction, recompute, impl)
        self.tau: Tensor | None
        field = temperature_field(self._options.potential)
        temperature = None if field is None else getattr(self._options.potential, field)
        if isinstance(temperature, nn.Parameter):
            self.register_parameter("tau", temperature)
        else:
            self.register_buffer("tau", temperature if isinstance(temperature, Tensor) else None)

    @classmethod
    def from_published(
        cls,
        variant: str = "angular_spread",
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
    ) -> DispersionLoss:
        """Module from the arguments of the published constructor. Each variant ignores those that it does not use, as
        the published class does.

        Args:
            variant: ``"angular_spread"``, ``"orthogonalization"``, ``"l2_repel"``, ``"decorrelation"`` or
                ``"perplexity_entropy"``.
            tau_l2: ``tau`` of ``l2_repel``, ``sigma2`` of ``perplexity_entropy``.
            tau_cos: ``tau`` of ``angular_spread``.
            margin: ``margin`` of ``orthogonalization``.
            epsilon: ``eps`` of all variants but ``decorrelation``.
            clamp_threshold: ``clamp`` of ``angular_spread`` and ``orthogonalization``.
            sampling: None, the default, for all pairs. The published code draws 256 tokens: ``SampledTokens(256)``.
            reduction, recompute, impl: as in :func:`fused_dispersion_loss`.

        Raises:
            ValueError, TypeError: an unknown variant; otherwise as :func:`fused_dispersion_loss`.

        Example: ``DispersionLoss.from_published("l2_repel", tau_l2=10.0, tau_cos=1.0)(hidden_states)``
        """
        angle: Any = tau_cos
        distance: Any = tau_l2
        potentials: dict[str, Callable[[], Potential]] = {
            "angular_spread": lambda: AngularSpread(tau=angle, clamp=clamp_threshold, eps=epsilon),
            "orthogonalization": lambda: Orthogonalization(margin=margin, clamp=clamp_threshold, eps=epsilon),
            "l2_repel": lambda: L2Repel(tau=distance, eps=epsilon),
            "decorrelation": Decorrelation,
            "perplexity_entropy": lambda: PerplexityEntropy(sigma2=distance, eps=epsilon),
        }
        check_choice("variant", variant, tuple(potentials))
        return cls(potentials[variant](), sampling=sampling, reduction=reduction, recompute=recompute, impl=impl)

    def forward(
        self,
        z: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        document_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, SamplingStats]:
        """Loss of ``z``, or a pair of loss and stats; arguments as in :func:`fused_dispersion_loss`."""
        check_flag("return_stats", return_stats)
        loss, error = loss_and_error(
            z, self.options, mask, cu_seqlens, max_seqlen, document_ids, generator, return_stats
        )
        return loss if error is None else (loss, SamplingStats(error))

    @property
    def options(self) -> LossOptions:
        """Options with the module's ``tau``, which ``.to()`` may have moved."""
        if self.tau is None:
            return self._options
        if temperature_field(self._options.potential) is None:
            name = self._options.potential.name()
            raise ValueError(f"tau of a DispersionLoss was set, and the potential {name!r} has no tau; leave it None")
        return self._options._replace(potential=at_temperature(self._options.potential, self.tau))

    def extra_repr(self) -> str:
        options = self.options
        return (
            f"{options.potential}, sampling={options.sampling}, reduction={options.reduction!r}, "
            f"recompute={options.recompute}, impl={options.impl!r}"
        )


def _reference_loss(
    z: Tensor, pair_ids: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None, options: LossOptions
) -> Tensor:
    potential = options.potential
    for values in (pair_ids, cu_seqlens):
        if values is not None and (values.is_meta or type(values).__name__ == "FakeTensor"):
            raise ValueError(
                "impl='reference' reads the values of mask, document_ids and cu_seqlens, and a meta or fake tensor "
                "holds none; take impl='torch' or 'auto'"
            )
    if cu_seqlens is not None and max_seqlen is not None:
        check_cu_seqlens(cu_seqlens, z.shape[1], max_seqlen)
    with without_autocast(z.device):
        temperature = temperature_of(potential)
        if temperature is not None:
            known = type(temperature) is Tensor and not temperature.is_meta and not torch.compiler.is_compiling()
            if known and not torch._C._are_functorch_transforms_active():
                at_temperature(potential, float(temperature))  # an error for a value out of range
            potential = at_temperature(potential, temperature)
        losses, pairs = reference.dispersion_loss(z, for_backends(potential), pair_ids, cu_seqlens)
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    if options.reduction == "none":
        return losses
    return losses.sum() if options.reduction == "sum" else losses.sum() / (pairs > 0).sum().clamp(min=1)


def _check_batches(layers: Sequence[Tensor]) -> None:
    """Raises where layers of hidden states differ in the number of sequences, so that their losses have no mean."""
    for number, layer in enumerate(layers):
        if layer.shape[:-2] != layers[0].shape[:-2]:
            raise ValueError(
                "reduction='none' gives one loss per sequence, the mean over the layers, and the layers differ in "
                f"batch: z[0] has shape {tuple(layers[0].shape)}, z[{number}] {tuple(layer.shape)}; give layers of one "
                "batch, or take reduction='mean', or a call per layer"
            )


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


def _checked_max_seqlen(max_seqlen: Any, cu_seqlens: Tensor | None) -> int:
    if not isinstance(max_seqlen, int | torch.SymInt | Tensor) and hasattr(max_seqlen, "__index__"):
        max_seqlen = operator.index(max_seqlen)  # an integer of NumPy
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int | torch.SymInt):
        raise TypeError(f"max_seqlen must be an integer, got {max_seqlen!r}; give int(cu_seqlens.diff().max())")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen must be at least 0, got {max_seqlen}; it is the length of the longest sequence")
    if cu_seqlens is None:
        raise ValueError(
            f"max_seqlen={max_seqlen} was given without cu_seqlens, whose longest sequence it is; give both, or neither"
        )
    return max_seqlen  # type: ignore[return-value]


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
    if document_ids is not None and document_ids.dtype == torch.uint64:
        raise TypeError(
            "document_ids must be integers that int64 holds, got torch.uint64; number the documents: "
            "torch.unique(document_ids, return_inverse=True)[1]"
        )
