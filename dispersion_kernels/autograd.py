"""The operator that torch.compile and torch.library see, and the autograd.Function over it.

Forward computes the loss and, where a gradient will be wanted, all of that but a factor a token, in fp32 (fp64 for
fp64). Backward multiplies by that factor and the upstream gradient at once, and rounds, once, to the dtype of the
tokens: what a GradScaler multiplies in is there before an fp16 gradient could underflow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from dispersion_kernels import native
from dispersion_kernels.backends import choose
from dispersion_kernels.cuda import CudaKernels
from dispersion_kernels.gpu import launch
from dispersion_kernels.potentials import Potential, carried, carry, for_backends
from dispersion_kernels.sampling import cpu_sampler
from dispersion_kernels.sampling.estimate import Draws, estimate, visits_all
from dispersion_kernels.segments import check_cu_seqlens, host_segments, on_device, segment_of_token
from dispersion_kernels.sweep import accumulation_dtype, in_blocks, loss_weight, sweep

if TYPE_CHECKING:
    from dispersion_kernels.triton.backend import TritonKernels


def dispersion_loss(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    impl: str,
    recompute: bool,
) -> Tensor:
    """The mean over ``layers``, each ``[B, L, F]``, of their reduced loss (``[S]`` for ``"none"``), differentiable
    once."""
    options = (potential, reduction, impl)
    if torch.is_grad_enabled() and any(z.requires_grad for z in layers):
        loss: Tensor = _Dispersion.apply(groups, cu_seqlens, options, recompute, *layers)
        return loss
    loss, _, _ = _run("forward", layers, groups, cu_seqlens, *options, [False] * len(layers))
    return loss


def sampled_loss(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    impl: str,
    recompute: bool,
    fraction: float,
    control_variate: str,
    draws: Draws,
    with_error: bool,
) -> tuple[Tensor, Tensor]:
    """The mean over ``layers``, each ``[B, L, F]`` and alike, of their reduced loss, from a fraction of the pairs
    (:mod:`dispersion_kernels.sampling`), and the relative error to expect of the gradient of each."""
    options = (potential, reduction, impl, fraction, control_variate)
    if torch.is_grad_enabled() and any(z.requires_grad for z in layers):
        loss, error = _Sampled.apply(groups, cu_seqlens, *draws, options, recompute, with_error, *layers)
        return loss, error
    loss, _, _, error = _run("sampled", layers, groups, cu_seqlens, *draws, *options, with_error, with_error)
    return loss, error


class _Dispersion(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        groups: Tensor | None,
        cu_seqlens: Tensor | None,
        options: tuple[Potential, str, str],
        recompute: bool,
        *layers: Tensor,
    ) -> Tensor:
        needed: list[bool] = list(ctx.needs_input_grad[4:])
        now = [False] * len(layers) if recompute else needed
        loss: Tensor
        loss, grads, scale = _run("forward", layers, groups, cu_seqlens, *options, now)
        ctx.save_for_backward(cu_seqlens, *((groups, *layers) if recompute else (*grads, scale)))
        ctx.options, ctx.recompute, ctx.needed, ctx.hooked = options, recompute, needed, _hooks_see_what_is_saved()
        ctx.dtype = layers[0].dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        cu_seqlens, *saved = ctx.saved_tensors
        if ctx.recompute:
            groups, *layers = saved
            _, grads, scale = _run("forward", layers, groups, cu_seqlens, *ctx.options, ctx.needed)
        else:
            *grads, scale = saved
        factor = _of_tokens(upstream[0], cu_seqlens, scale.shape[2])
        dz = _finished(ctx, grads, scale, factor)
        return None, None, None, None, *dz


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        groups: Tensor | None,
        cu_seqlens: Tensor | None,
        shuffle: Tensor,
        fit: Tensor,
        options: tuple[Potential, str, str, float, str],
        recompute: bool,
        with_error: bool,
        *layers: Tensor,
    ) -> tuple[Tensor, Tensor]:
        inputs = (groups, cu_seqlens, shuffle, fit)
        with_grad = with_error or not recompute
        loss, grad, scale, error = _run("sampled", layers, *inputs, *options, with_grad, with_error)
        ctx.save_for_backward(cu_seqlens, *((groups, shuffle, fit, *layers) if recompute else (grad, scale)))
        ctx.options, ctx.recompute, ctx.hooked = options, recompute, _hooks_see_what_is_saved()
        ctx.needed, ctx.dtype = list(ctx.needs_input_grad[7:]), layers[0].dtype
        ctx.mark_non_differentiable(error)
        return loss, error

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        cu_seqlens, *saved = ctx.saved_tensors
        if ctx.recompute:
            groups, shuffle, fit, *layers = saved
            _, grad, scale, _ = _run("sampled", layers, groups, cu_seqlens, shuffle, fit, *ctx.options, True, False)
        else:
            grad, scale = saved
        factor = _of_tokens(upstream[0], cu_seqlens, scale.shape[2])
        dz = _finished(ctx, grad.unbind(), scale, factor)
        return None, None, None, None, None, None, None, *dz


def _run(name: Literal["forward", "sampled"], layers: Sequence[Tensor], *rest: Any) -> Any:
    """The operator of that name; past the dispatcher, which takes 20 us or more, where nobody watches it."""
    if _unobserved(*layers, *(value for value in rest if isinstance(value, Tensor))):
        implementation: Callable[..., Any] = _forward if name == "forward" else _sampled
        return implementation(layers, *rest)
    arguments: list[Any] = []
    for value in rest:
        arguments.extend(carry(value) if isinstance(value, Potential) else (value,))
    return getattr(torch.ops.dispersion_kernels, name)(layers, *arguments)


def _unobserved(*tensors: Tensor | None) -> bool:
    """Whether these are memory and nothing else, and no compiler, tracer, mode or transform sees what is done to it."""
    if (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    ):
        return False
    return all(tensor is None or _is_memory(tensor) for tensor in tensors)


def _is_memory(tensor: Tensor) -> bool:
    # Without a storage: a batch that vmap hides. A subclass, a pending minus sign or a symbolic zero has one.
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and torch._C._has_storage(tensor)
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def _hooks_see_what_is_saved() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or (not torch.compiler.is_compiling() and top(True) is not None)


def _refuse_second_derivative() -> None:
    # With create_graph what backward returns would count as a constant, and a gradient penalty silently do nothing.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fused_dispersion_loss was differentiated with create_graph=True, for a second derivative, which it "
            'does not have. Use impl="reference", which materialises the L x L matrices and has one'
        )


def _of_tokens(upstream: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
    """The upstream gradient as a factor of tokens ``[B, L]``."""
    if upstream.dim() == 0:
        return upstream
    if cu_seqlens is None:
        return upstream.unsqueeze(1)
    return upstream[segment_of_token(on_device(cu_seqlens, upstream.device), length)]


def _finished(ctx: Any, grads: Sequence[Tensor], scale: Tensor, factor: Tensor) -> list[Tensor | None]:
    """``grads`` ``[B, L, F]``, one a layer, times ``scale`` ``[layers, B, L]`` and ``factor`` of the tokens, each
    rounded once; in place where ``ctx`` will not be asked for them again."""
    needed = [grad if need else None for grad, need in zip(grads, ctx.needed, strict=True)]
    fp32_on_cpu = scale.is_cpu and scale.dtype == torch.float32
    if fp32_on_cpu and _unobserved(*needed, scale, factor) and native.unavailable_reason() is None:
        in_place = ctx.recompute or (not ctx.hooked and _graph_is_freed())
        factor = factor.flatten().contiguous()  # the gradient of a sum is one number, expanded
        finished = native.scaled(needed, scale, factor, ctx.dtype, in_place=in_place)
        # As memory of its own, not a part of that of all layers: autograd adds to the one in place.
        return [None if grad is None else from_dlpack(to_dlpack(grad)) for grad in finished]
    of_layers = zip(needed, (scale * factor).unsqueeze(3), strict=True)
    return [None if grad is None else _scaled(grad, of_layer, ctx.dtype) for grad, of_layer in of_layers]


def _graph_is_freed() -> bool:
    """Whether what the running backward saved is dropped after it. PyTorch has no public name for that."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * factor``, rounded once, to ``dtype``."""
    if dtype == grad.dtype:
        return grad * factor
    if torch.compiler.is_compiling():
        return (grad * factor).to(dtype)  # which the compiler fuses
    dz = torch.empty_like(grad, dtype=dtype)
    if grad.device.type != "cpu":
        return torch.mul(grad, factor, out=dz)
    # In blocks that stay in the cache: PyTorch's CPU kernels write all of the product in fp32 before they narrow it.
    for rounded, g, f in in_blocks(dz, grad, factor):
        rounded.copy_(g * f)
    return dz


_library = torch.library.Library("dispersion_kernels", "FRAGMENT")
_library.define(
    "forward(Tensor[] layers, Tensor? groups, Tensor? cu_seqlens, str potential, float[] params, str reduction,"
    " str impl, bool[] with_grad) -> (Tensor loss, Tensor[] grads, Tensor scale)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward_carried(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: str,
    params: list[float],
    *options: Any,
) -> tuple[Tensor, list[Tensor], Tensor]:
    return _forward(layers, groups, cu_seqlens, carried(potential, params), *options)


def _forward(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    impl: str,
    with_grad: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The loss, and, where any layer has a gradient, ``grad`` ``[B, L, F]`` of each, empty for those that have none,
    and ``scale`` ``[layers, B, L]``: their product is d loss / d z (for ``"none"``, d loss of its sequence / d z)."""
    z = layers[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, z.shape[1])
    run = _SWEEPS[choose(impl, z, potential)]
    with without_autocast(z.device):
        return run(layers, groups, cu_seqlens, for_backends(potential), reduction, with_grad)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products are fp32 inside of autocast, too. (Where it is off, to say so takes as long as several operators.)"""
    # A meta tensor has no autocast, and PyTorch refuses to be asked for it.
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def _gpu_sweep(
    kernels_for: Callable[[Tensor], launch.Kernels],
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    with_grad: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    with torch.cuda.device_of(layers[0]):  # Triton launches on the current device
        kernels = kernels_for(layers[0])
        loss, pairs, gradients, scale = launch.dispersion(
            layers, potential, groups, cu_seqlens, any(with_grad), kernels
        )
    weight = loss_weight(len(layers), reduction, (pairs > 0).sum())
    total = (loss.sum(0) if reduction == "none" else loss.sum()) * weight
    grads = [gradients[n] if need else total.new_empty(0, dtype=torch.float32) for n, need in enumerate(with_grad)]
    return total.float(), grads, total.new_empty(0, dtype=torch.float32) if scale is None else scale * weight


def _triton_kernels(z: Tensor) -> TritonKernels:
    from dispersion_kernels.triton.backend import TritonKernels  # imports Triton

    return TritonKernels(z)


def _native_sweep(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    with_grad: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    batch, length, _ = layers[0].shape
    runs = host_segments(batch, length, groups, None if cu_seqlens is None else cu_seqlens.cpu())
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    weight = float(loss_weight(len(layers), reduction, runs.sequences_with_pairs))
    losses: list[Tensor] = []
    grads: list[Tensor] = []
    scales: list[Tensor] = []
    for z, need_grad in zip(layers, with_grad, strict=True):
        loss, grad, scale = native.dispersion(
            z.contiguous() if native.row_stride(z) is None else z,
            potential_name=potential.name(),
            params=potential.params(),
            index=runs.rows,
            begins=runs.begins,
            ends=runs.ends,
            sequence=runs.sequence,
            num_sequences=sequences,
            weight=weight,
            need_grad=need_grad,
            total=reduction != "none",
        )
        losses.append(loss)
        grads.append(loss.new_empty(0, dtype=torch.float32) if grad is None else grad)
        scales.append(loss.new_empty(0, dtype=torch.float32) if scale is None else scale)
    total = losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)
    return total.float(), *_joined(grads, scales, with_grad)


def _torch_sweep(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    with_grad: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    losses: list[Tensor] = []
    grads: list[Tensor] = []
    scales: list[Tensor] = []
    for z, need_grad in zip(layers, with_grad, strict=True):
        loss, pairs, grad, scale = sweep(z, potential, groups, cu_seqlens, need_grad)
        weight = loss_weight(len(layers), reduction, (pairs > 0).sum())
        losses.append((loss if reduction == "none" else loss.sum()) * weight)
        grads.append(loss.new_empty(0) if grad is None else grad)
        scales.append(loss.new_empty(0) if scale is None else scale * weight)
    total = torch.stack(losses).sum(0).to(accumulation_dtype(layers[0].dtype))
    return total, *_joined(grads, scales, with_grad)


_SWEEPS: dict[str, Callable[..., tuple[Tensor, list[Tensor], Tensor]]] = {
    "triton": partial(_gpu_sweep, _triton_kernels),
    "cuda": partial(_gpu_sweep, CudaKernels),
    "cpu": _native_sweep,
    "torch": _torch_sweep,
}


def _joined(grads: list[Tensor], scales: list[Tensor], with_grad: list[bool]) -> tuple[list[Tensor], Tensor]:
    """``grad`` of each layer, new memory for those that have none, and ``scale`` of all."""
    if len(scales) == 1:
        return [grads[0]], scales[0].unsqueeze(0) if with_grad[0] else scales[0]
    if not any(with_grad):
        return grads, grads[0].new_empty(0)
    shape = next(scale for scale, need in zip(scales, with_grad, strict=True) if need)
    return grads, torch.stack(
        [s if need else torch.zeros_like(shape) for s, need in zip(scales, with_grad, strict=True)]
    )


@torch.library.register_fake("dispersion_kernels::forward")
def _forward_fake(
    layers: list[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: str,
    params: list[float],
    reduction: str,
    impl: str,
    with_grad: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    z = layers[0]
    sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(z.dtype)
    loss = z.new_empty(sequences if reduction == "none" else (), dtype=dtype)
    needs = zip(layers, with_grad, strict=True)
    grads = [z.new_empty(z.shape if need else 0, dtype=dtype) for z, need in needs]
    scale = z.new_empty((len(layers), *z.shape[:2]) if any(with_grad) else 0, dtype=dtype)
    return loss, grads, scale


_library.define(
    "sampled(Tensor[] layers, Tensor? groups, Tensor? cu_seqlens, Tensor shuffle, Tensor fit, str potential,"
    " float[] params, str reduction, str impl, float fraction, str control_variate, bool with_grad, bool with_error)"
    " -> (Tensor loss, Tensor grad, Tensor scale, Tensor error)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "sampled", "CompositeExplicitAutograd")
def _sampled_carried(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    shuffle: Tensor,
    fit: Tensor,
    potential: str,
    params: list[float],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _sampled(layers, groups, cu_seqlens, shuffle, fit, carried(potential, params), *options)


def _sampled(
    layers: Sequence[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    shuffle: Tensor,
    fit: Tensor,
    potential: Potential,
    reduction: str,
    impl: str,
    fraction: float,
    control_variate: str,
    with_grad: bool,
    with_error: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``forward``, of layers that are alike, with a gradient for all in one tensor, ``[layers, B, L, F]``, or for
    none; and ``[layers]``, the relative error to expect of each's."""
    z = layers[0]
    if visits_all(fraction, z, cu_seqlens):  # where a compiler has not asked
        loss, grads, scale = _forward(layers, groups, cu_seqlens, potential, reduction, impl, [with_grad] * len(layers))
        return loss, torch.stack(grads) if with_grad else loss.new_empty(0), scale, loss.new_zeros(len(layers))
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, z.shape[1])
    chosen = choose(impl, z, potential)
    run = _SWEEPS[chosen]
    formula = for_backends(potential)

    def sweep_blocks(tokens: Tensor, groups: Tensor | None, bounds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        loss, grads, scale = run([tokens], groups, bounds, formula, "none", [with_grad])
        return loss, grads[0], scale

    own = chosen == "cpu" and cpu_sampler.takes(formula, fraction, control_variate, z, cu_seqlens)
    with without_autocast(z.device):
        found = estimate(
            layers,
            groups,
            cu_seqlens,
            formula,
            Draws(shuffle, fit),
            fraction,
            control_variate,
            reduction,
            with_grad,
            with_error,
            sweep_blocks,
            cpu_sampler.sample if own else None,
        )
    dtype = accumulation_dtype(z.dtype)
    loss, error = found.loss.to(dtype), found.error.to(dtype)
    if found.grad is None or found.scale is None:
        return loss, loss.new_empty(0), loss.new_empty(0), error
    return loss, found.grad, found.scale, error


@torch.library.register_fake("dispersion_kernels::sampled")
def _sampled_fake(
    layers: list[Tensor],
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    shuffle: Tensor,
    fit: Tensor,
    potential: str,
    params: list[float],
    reduction: str,
    impl: str,
    fraction: float,
    control_variate: str,
    with_grad: bool,
    with_error: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, _, scale = _forward_fake(
        layers, groups, cu_seqlens, potential, params, reduction, impl, [with_grad] * len(layers)
    )
    grad = loss.new_empty((len(layers), *layers[0].shape) if with_grad else 0)
    return loss, grad, scale, loss.new_empty(len(layers))
