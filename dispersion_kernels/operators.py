"""Operators that ``torch.compile`` and ``torch.library`` see, and the ``autograd.Function`` over them.

Forward computes the loss and, where a gradient will be needed, the gradient without its factor per token, in fp32 (fp64
for fp64). Backward multiplies by that factor and the upstream gradient at once and rounds once to the tokens' dtype, so
that a GradScaler's factor is included before an fp16 gradient could underflow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from dispersion_kernels import flops
from dispersion_kernels.backends import choose, cpu
from dispersion_kernels.backends.cuda import CudaKernels
from dispersion_kernels.backends.gpu import launch
from dispersion_kernels.backends.torch_tiled import sweep
from dispersion_kernels.numerics import accumulation_dtype, in_blocks, loss_weight
from dispersion_kernels.potentials import (
    Potential,
    at_temperature,
    carried,
    carry,
    for_backends,
    is_built_in,
    temperature_of,
)
from dispersion_kernels.sampling import SampledPairs, cpu_sampler
from dispersion_kernels.sampling.estimate import Draws, estimate, visits_all
from dispersion_kernels.segments import check_cu_seqlens, host_segments, on_device, segment_of_token
from dispersion_kernels.temperature import slope_of_temperature

if TYPE_CHECKING:
    from dispersion_kernels.backends.triton.backend import TritonKernels


def dispersion_loss(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    impl: str,
    recompute: bool,
) -> Tensor:
    """Mean over ``layers`` ``[B, L, F]`` of their reduced losses, ``[]`` (``[S]`` for ``"none"``); differentiable
    once."""
    _refuse_parameters(potential)
    needed = _need_gradients(layers)
    temperature, slope_needed = temperature_of(potential), False
    if temperature is not None:
        potential = at_temperature(potential, 1.0)
        (slope_needed,) = _need_gradients([temperature])
    call = _Call(
        "forward",
        (potential, reduction, impl),
        [False] * len(layers) if recompute else needed,
        with_slope=slope_needed and not recompute,
    )
    return _differentiable(call, (pair_ids, cu_seqlens, temperature), layers, any(needed) or slope_needed)[0]


def sampled_loss(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    impl: str,
    recompute: bool,
    sampling: SampledPairs,
    draws: Draws,
    with_error: bool,
) -> tuple[Tensor, Tensor]:
    """Mean over ``layers`` ``[B, L, F]``, alike in shape, dtype and device, of their reduced losses, estimated from a
    fraction of the pairs (:mod:`dispersion_kernels.sampling`); and ``[layers]``, the expected relative error of each
    layer's gradient."""
    _refuse_parameters(potential)
    needed = any(_need_gradients(layers))
    wanted = [with_error or (needed and not recompute)] * len(layers)
    options = (potential, reduction, impl, float(sampling.fraction), sampling.control_variate)
    call = _Call("sampled", options, wanted, with_error)
    loss, error = _differentiable(call, (pair_ids, cu_seqlens, *draws), layers, needed)
    assert error is not None
    return loss, error


def _refuse_parameters(potential: Potential) -> None:
    if is_built_in(potential) or not torch.is_grad_enabled():
        return
    if any(isinstance(value, Tensor) and value.requires_grad for value in vars(potential).values()):
        raise TypeError(
            f"potential {type(potential).__name__} has a tensor that requires a gradient, which the potentials of your "
            'own have with impl="reference" alone; take that, or give its detach()'
        )


def _need_gradients(layers: Sequence[Tensor]) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and z.requires_grad for z in layers]


class _Result(NamedTuple):
    """Outputs of an operator."""

    loss: Tensor
    error: Tensor | None
    """``[layers]``: expected relative error of the gradient; None unless pairs are sampled."""
    scale: Tensor
    """``[layers, B, L]``: factor per token of ``grads``; empty without a gradient."""
    grads: Sequence[Tensor]
    """``[B, L, F]`` per layer, or one ``[layers, B, L, F]`` for all layers: d loss / d z without the factor ``scale``;
    empty for layers without a gradient."""
    slope: Tensor | None
    """d loss / d temperature, of the shape of ``loss``; empty where not requested."""


class _Call(NamedTuple):
    """Operator with its arguments other than tensors."""

    name: Literal["forward", "sampled"]
    options: tuple[Any, ...]
    """Arguments between the tensors and the flags below; the potential is the first."""
    wanted: Sequence[bool]
    """Flag per layer: whether the forward pass computes the layer's gradient."""
    with_error: bool = False
    with_slope: bool = False

    def run(self, data: Sequence[Tensor | None], layers: Sequence[Tensor], unobserved: bool) -> _Result:
        """Calls the operator. ``unobserved`` calls bypass PyTorch's dispatcher, which takes 20 us or more."""
        potential, *options = self.options
        sampled = self.name == "sampled"
        options += [any(self.wanted), self.with_error] if sampled else [self.with_slope, list(self.wanted)]
        if unobserved:
            implementation: Callable[..., Any] = _sampled if sampled else _forward
            found = implementation(layers, *data, potential, *options)
        else:
            if not torch.compiler.is_compiling():
                flops.register()
            found = getattr(torch.ops.dispersion_kernels, self.name)(layers, *data, *carry(potential), *options)
        if not sampled:
            loss, grads, scale, slope = found
            return _Result(loss, None, scale, grads, slope)
        loss, grad, scale, error = found
        return _Result(loss, error, scale, [grad], None)


def _differentiable(
    call: _Call, data: tuple[Tensor | None, ...], layers: Sequence[Tensor], needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of the call, differentiable, and the error of sampled pairs (None for all pairs)."""
    if _unobserved(*layers, *data) and forward_ad._current_level < 0:
        if needed:
            loss, error = _Loss.apply(call, len(data), *data, *layers)
            return loss, error
        result = call.run(data, layers, unobserved=True)
    # The operator has a derivative formula of its own, used under compilers and modes, but not under torch.func.
    elif not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        result = call.run(data, layers, unobserved=False)
    elif torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.compile found fused_dispersion_loss inside of a transform of torch.func or of a dual level, and "
            'traces it there with impl="reference" alone; transform outside of the compiled function'
        )
    else:
        loss, error, *_ = _Transformed.apply(call, len(data), *data, *layers)
        return loss, error
    return result.loss, result.error


class _Loss(torch.autograd.Function):
    """Differentiable loss of plain tensors (:func:`_unobserved`)."""

    @staticmethod
    def forward(ctx: Any, call: _Call, count: int, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        data, layers = tensors[:count], tensors[count:]
        result = call.run(data, layers, unobserved=True)
        if result.error is not None:
            ctx.mark_non_differentiable(result.error)
        _keep(ctx, call, data, layers, result, ctx.needs_input_grad[2:], visible=False)
        return result.loss, result.error

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *_gradients(ctx, upstream[0])


class _Transformed(torch.autograd.Function):
    """Differentiable loss under the transforms of ``torch.func`` and in forward mode. :class:`_Loss` serves all other
    calls, because this class takes 60 us more per call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, count: int, *tensors: Any) -> tuple[Tensor | None, ...]:
        result = call.run(tensors[:count], tensors[count:], _unobserved(*tensors))
        return result.loss, result.error, result.slope, result.scale, *result.grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, count, *tensors = inputs
        loss, error, slope, scale, *grads = output
        ctx.mark_non_differentiable(*(value for value in output[1:] if value is not None))
        ctx.set_materialize_grads(False)  # zeros for the gradients would be as large as the layers
        result = _Result(loss, error, scale, grads, slope)
        _keep(ctx, call, tensors[:count], tensors[count:], result, ctx.needs_input_grad[2:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Loss.backward(ctx, *upstream)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        raise RuntimeError(
            "fused_dispersion_loss was differentiated in forward mode (jvp, jacfwd, dual tensors), which it does not "
            'have. Use impl="reference", which materialises the L x L matrices and has it, or reverse mode (grad, vjp, '
            "jacrev)"
        )


def _keep(
    ctx: Any,
    call: _Call,
    data: Sequence[Tensor | None],
    layers: Sequence[Tensor],
    result: _Result,
    needed: Sequence[bool],
    visible: bool = True,
) -> None:
    """Saves the result for backward, or, where it lacks a gradient that is needed, the inputs to recompute it from.

    ``visible`` says that the caller can reach the result, so that backward must not overwrite it.
    """
    ctx.call, ctx.data, ctx.dtype = call, len(data), layers[0].dtype
    ctx.needed, ctx.temperature = list(needed[len(data) :]), data[2] if any(needed[: len(data)]) else None
    ctx.recompute = any(need and not there for need, there in zip(ctx.needed, call.wanted, strict=True))
    ctx.recompute = ctx.recompute or (ctx.temperature is not None and not call.with_slope)
    ctx.hooked = visible or _hooks_see_what_is_saved()
    if ctx.recompute:
        ctx.save_for_backward(*data, *layers)
    else:
        ctx.save_for_backward(data[1], result.loss, result.slope, result.scale, *result.grads)


def _gradients(ctx: Any, upstream: Tensor | None) -> Sequence[Tensor | None]:
    """Gradients of the ``data`` tensors and of each layer, None where not needed."""
    saved = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * (ctx.data + len(ctx.needed))
    if upstream is None:
        return gradients
    if ctx.recompute:
        data, layers = saved[: ctx.data], saved[ctx.data :]
        with torch.no_grad():
            call = ctx.call._replace(wanted=ctx.needed, with_error=False, with_slope=ctx.temperature is not None)
            result = call.run(data, layers, _unobserved(*data, *layers))
        cu_seqlens, scale, grads, slope = data[1], result.scale, result.grads, result.slope
        causes = layers if ctx.temperature is None else [*layers, ctx.temperature]
    else:
        cu_seqlens, loss, slope, scale, *grads = saved
        causes = [loss]
    if ctx.call.name == "sampled":
        grads = grads[0].unbind()
    if any(ctx.needed):
        gradients[ctx.data :] = _finished(ctx, grads, scale, _of_tokens(upstream, cu_seqlens, scale.shape[2]))
    if ctx.temperature is not None:
        gradients[2] = (upstream * slope).sum().to(ctx.temperature)
    # Under create_graph the gradient would count as a constant, and a gradient penalty would silently do nothing.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = iter(_Once.apply(len(causes), *causes, *(grad for grad in gradients if grad is not None)))
        return [None if grad is None else next(found) for grad in gradients]
    return gradients


class _Once(torch.autograd.Function):
    """Identity on the gradients whose derivative is an error. The first ``causes`` tensors are those that the gradients
    depend on; as inputs they show autograd the dependence."""

    generate_vmap_rule = True

    @staticmethod
    def forward(causes: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[causes:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        _refuse_second_derivative()

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> None:
        _refuse_second_derivative()


def _refuse_second_derivative() -> None:
    raise RuntimeError(
        "the gradient of fused_dispersion_loss was differentiated again, and it has no second derivative. Use "
        'impl="reference", which materialises the L x L matrices and has one'
    )


def _unobserved(*tensors: Tensor | None) -> bool:
    """Whether the tensors are plain memory and no compiler, tracer, mode or transform observes operations on them."""
    if (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    ):
        return False
    return all(tensor is None or _is_memory(tensor) for tensor in tensors)


def _is_memory(tensor: Tensor) -> bool:
    # Tensors batched by vmap have no storage; subclasses, lazy negations and symbolic zeros have one, hence the rest.
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and torch._C._has_storage(tensor)
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
    )


def _hooks_see_what_is_saved() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or (not torch.compiler.is_compiling() and top(True) is not None)


def _of_tokens(upstream: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
    """Upstream gradient ``[]`` or ``[S]`` in a shape that broadcasts to the tokens ``[B, L]``."""
    if upstream.dim() == 0:
        return upstream
    if cu_seqlens is None:
        return upstream.unsqueeze(1)
    return upstream[segment_of_token(on_device(cu_seqlens, upstream.device), length)]


def _finished(ctx: Any, grads: Sequence[Tensor], scale: Tensor, factor: Tensor) -> list[Tensor | None]:
    """Gradient of each layer in the tokens' dtype, rounded once: ``grads`` ``[B, L, F]`` per layer times ``scale``
    ``[layers, B, L]`` and ``factor``, which broadcasts to ``[B, L]``. In place where the graph is freed afterwards."""
    needed = [grad if need else None for grad, need in zip(grads, ctx.needed, strict=True)]
    fp32_on_cpu = scale.is_cpu and scale.dtype == torch.float32
    if fp32_on_cpu and _unobserved(*needed, scale, factor) and cpu.unavailable_reason() is None:
        in_place = ctx.recompute or (not ctx.hooked and _graph_is_freed())
        factor = factor.flatten().contiguous()  # the gradient of a sum has stride 0
        finished = cpu.scaled(needed, scale, factor, ctx.dtype, in_place=in_place)
        # DLPack makes each gradient a tensor of its own, not a view of all layers': autograd adds to those in place.
        return [None if grad is None else from_dlpack(to_dlpack(grad)) for grad in finished]
    of_layers = zip(needed, (scale * factor).unsqueeze(3), strict=True)
    return [None if grad is None else _scaled(grad, of_layer, ctx.dtype) for grad, of_layer in of_layers]


def _graph_is_freed() -> bool:
    """Whether the running backward frees the saved tensors of its graph. PyTorch has no public name for that."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` in ``dtype``, rounded once."""
    if dtype == grad.dtype:
        return grad * factor
    if not _unobserved(grad, factor):
        return (grad * factor).to(dtype)  # a compiler fuses the two
    dz = torch.empty_like(grad, dtype=dtype)
    if grad.device.type != "cpu":
        return torch.mul(grad, factor, out=dz)
    # Blocks stay in the cache: PyTorch's CPU kernels write the whole product in fp32 before they narrow it.
    for rounded, g, f in in_blocks(dz, grad, factor):
        rounded.copy_(g * f)
    return dz


_library = torch.library.Library("dispersion_kernels", "FRAGMENT")
_library.define(
    "forward(Tensor[] layers, Tensor? pair_ids, Tensor? cu_seqlens, Tensor? temperature, str potential, float[] params,"
    " str reduction, str impl, bool with_slope, bool[] with_grad)"
    " -> (Tensor loss, Tensor[] grads, Tensor scale, Tensor slope)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward_carried(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: Tensor | None,
    potential: str,
    params: list[float],
    *options: Any,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    return _forward(layers, pair_ids, cu_seqlens, temperature, carried(potential, params), *options)


def _forward(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: Tensor | None,
    potential: Potential,
    reduction: str,
    impl: str,
    with_slope: bool,
    with_grad: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Loss, ``grads``, ``scale`` and ``slope`` of the operator ``forward``.

    ``grads`` holds ``[B, L, F]`` per layer, empty for layers without a gradient; ``scale`` is ``[layers, B, L]``, empty
    where no layer has one. ``grads`` times ``scale`` is d loss / d z (for ``"none"``, of the loss of z's sequence).
    ``slope`` is d loss / d ``temperature``, computed by the torch backend; empty without ``with_slope``.
    """
    z = layers[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, z.shape[1])
    if temperature is not None and temperature.is_meta and not z.is_meta:
        raise ValueError(f"tau is a tensor on meta, which holds no value, and z is on {z.device}; give tau a value")
    if temperature is not None and not temperature.is_meta:
        potential = at_temperature(potential, float(temperature))
    run = _SWEEPS[choose(impl, z, potential)]
    with without_autocast(z.device):
        loss, grads, scale = run(layers, pair_ids, cu_seqlens, for_backends(potential), reduction, with_grad)
        if not with_slope:
            return loss, grads, scale, loss.new_empty(0)
        slopes = []
        for z in layers:
            slope, pairs = slope_of_temperature(z, potential, pair_ids, cu_seqlens)
            weight = loss_weight(len(layers), reduction, (pairs > 0).sum())
            slopes.append((slope if reduction == "none" else slope.sum()) * weight)
        return loss, grads, scale, torch.stack(slopes).sum(0).to(loss.dtype)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which matrix products stay fp32 under autocast. A null context where autocast is off, because
    ``torch.autocast`` takes as long to enter as several operators."""
    # PyTorch raises where asked for the autocast state of a device without autocast, as meta.
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()


def _gpu_sweep(
    kernels_for: Callable[[Tensor], launch.Kernels],
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    with_grad: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    with torch.cuda.device_of(layers[0]):  # Triton launches on the current device
        kernels = kernels_for(layers[0])
        loss, pairs, gradients, scale = launch.dispersion(
            layers, potential, pair_ids, cu_seqlens, any(with_grad), kernels
        )
    weight = loss_weight(len(layers), reduction, (pairs > 0).sum())
    total = (loss.sum(0) if reduction == "none" else loss.sum()) * weight
    grads = [gradients[n] if need else total.new_empty(0, dtype=torch.float32) for n, need in enumerate(with_grad)]
    return total.float(), grads, total.new_empty(0, dtype=torch.float32) if scale is None else scale * weight


def _triton_kernels(z: Tensor) -> TritonKernels:
    from dispersion_kernels.backends.triton.backend import TritonKernels  # imports Triton

    return TritonKernels(z)


def _native_sweep(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    with_grad: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    batch, length, _ = layers[0].shape
    runs = host_segments(batch, length, pair_ids, None if cu_seqlens is None else cu_seqlens.cpu())
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    weight = float(loss_weight(len(layers), reduction, runs.sequences_with_pairs))
    losses: list[Tensor] = []
    grads: list[Tensor] = []
    scales: list[Tensor] = []
    for z, need_grad in zip(layers, with_grad, strict=True):
        loss, grad, scale = cpu.dispersion(
            z.contiguous() if cpu.row_stride(z) is None else z,
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
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    with_grad: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor]:
    losses: list[Tensor] = []
    grads: list[Tensor] = []
    scales: list[Tensor] = []
    for z, need_grad in zip(layers, with_grad, strict=True):
        loss, pairs, grad, scale = sweep(z, potential, pair_ids, cu_seqlens, need_grad)
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
    """Gradients per layer, and the layers' scales ``[layers, B, L]``, with zeros for layers without a gradient; empty
    where no layer has one."""
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
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    temperature: Tensor | None,
    potential: str,
    params: list[float],
    reduction: str,
    impl: str,
    with_slope: bool,
    with_grad: list[bool],
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    z = layers[0]
    sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(z.dtype)
    loss = z.new_empty(sequences if reduction == "none" else (), dtype=dtype)
    needs = zip(layers, with_grad, strict=True)
    grads = [z.new_empty(z.shape if need else 0, dtype=dtype) for z, need in needs]
    scale = z.new_empty((len(layers), *z.shape[:2]) if any(with_grad) else 0, dtype=dtype)
    return loss, grads, scale, loss.new_empty(loss.shape if with_slope else 0)


_library.define(
    "sampled(Tensor[] layers, Tensor? pair_ids, Tensor? cu_seqlens, Tensor shuffle, Tensor fit, str potential,"
    " float[] params, str reduction, str impl, float fraction, str control_variate, bool with_grad, bool with_error)"
    " -> (Tensor loss, Tensor grad, Tensor scale, Tensor error)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "sampled", "CompositeExplicitAutograd")
def _sampled_carried(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    shuffle: Tensor,
    fit: Tensor,
    potential: str,
    params: list[float],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _sampled(layers, pair_ids, cu_seqlens, shuffle, fit, carried(potential, params), *options)


def _sampled(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
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
    """Loss, ``grad``, ``scale`` and ``error`` of the operator ``sampled``.

    As ``forward``, for layers that are alike; ``grad`` is one tensor ``[layers, B, L, F]``, empty without
    ``with_grad``. ``error`` ``[layers]`` is the expected relative error of each layer's gradient.
    """
    z = layers[0]
    if visits_all(fraction, z, cu_seqlens):  # the caller leaves this question to the operator under a compiler
        every = [with_grad] * len(layers)
        loss, grads, scale, _ = _forward(layers, pair_ids, cu_seqlens, None, potential, reduction, impl, False, every)
        return loss, torch.stack(grads) if with_grad else loss.new_empty(0), scale, loss.new_zeros(len(layers))
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, z.shape[1])
    chosen = choose(impl, z, potential)
    run = _SWEEPS[chosen]
    formula = for_backends(potential)

    def sweep_blocks(tokens: Tensor, pair_ids: Tensor | None, bounds: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        loss, grads, scale = run([tokens], pair_ids, bounds, formula, "none", [with_grad])
        return loss, grads[0], scale

    own = chosen == "cpu" and cpu_sampler.takes(formula, fraction, control_variate, z, cu_seqlens)
    with without_autocast(z.device):
        found = estimate(
            layers,
            pair_ids,
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
    pair_ids: Tensor | None,
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
    every = [with_grad] * len(layers)
    loss, _, scale, _ = _forward_fake(
        layers, pair_ids, cu_seqlens, None, potential, params, reduction, impl, False, every
    )
    grad = loss.new_empty((len(layers), *layers[0].shape) if with_grad else 0)
    return loss, grad, scale, loss.new_empty(len(layers))


def _make_differentiable(name: Literal["forward", "sampled"], tensors: int, outputs: Callable[..., _Result]) -> None:
    """Registers a backward and a vmap rule for the operator ``name``; ``tensors`` counts its tensor arguments after the
    layers, and ``outputs`` makes a :class:`_Result` of its outputs."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        layers, *data = inputs[: 1 + tensors]
        potential, params, *options = inputs[1 + tensors :]
        result, count = outputs(*output), len(layers)
        wanted = options[-1] if name == "forward" else [options[-2]] * count
        with_slope = name == "forward" and options[-2]
        call = _Call(name, (carried(potential, params), *options[:-2]), wanted, with_slope=with_slope)
        ctx.others = [[] if isinstance(value, list) and not value else None for value in inputs[1:]]
        ctx.mark_non_differentiable(*tree_leaves(output[1:]))
        ctx.set_materialize_grads(False)
        needed = [value is not None and value.requires_grad for value in (*data, *layers)]
        _keep(ctx, call, data, layers, result, needed)

    def backward(ctx: Any, upstream: Tensor | None, *rest: Any) -> tuple[Any, ...]:
        gradients = list(_gradients(ctx, upstream))
        return gradients[tensors:], *gradients[:tensors], *ctx.others[tensors:]

    def one_by_one(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        operator = getattr(torch.ops.dispersion_kernels, name)
        found = [
            operator(*(_entry(value, dim, n) for value, dim in zip(args, in_dims, strict=True)))
            for n in range(info.batch_size)
        ]
        together = tuple(
            [torch.stack(part) for part in zip(*values, strict=True)]
            if isinstance(values[0], list)
            else torch.stack(values)
            for values in zip(*found, strict=True)
        )
        return together, tree_map(lambda _: 0, together)

    torch.library.register_autograd(f"dispersion_kernels::{name}", backward, setup_context=setup_context, lib=_library)
    torch.library.register_vmap(f"dispersion_kernels::{name}", one_by_one, lib=_library)


def _entry(value: Any, dim: Any, n: int) -> Any:
    """Entry ``n`` of a vmap batch along ``dim``; ``value`` itself where it is not batched."""
    if isinstance(value, list | tuple) and isinstance(dim, list | tuple):
        return [_entry(each, of_each, n) for each, of_each in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, n)


_make_differentiable("forward", 3, lambda loss, grads, scale, slope: _Result(loss, None, scale, grads, slope))
_make_differentiable("sampled", 4, lambda loss, grad, scale, error: _Result(loss, error, scale, [grad], None))
