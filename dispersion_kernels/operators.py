"""Operator that ``torch.compile`` and ``torch.library`` see, and the ``autograd.Function`` over it.

Forward computes the loss and, where a gradient will be needed, the gradient without its factor per token, in fp32 (fp64
for fp64); the GPU kernels compute the gradient before the row transform, in bf16 where it loses no digits, and keep the
tokens for the transform. Backward does the rest: multiplies by that factor and the upstream gradient at once and rounds
once to the tokens' dtype, so that a GradScaler's factor is included before an fp16 gradient could underflow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from dispersion_kernels import flops
from dispersion_kernels.backends import cpu
from dispersion_kernels.backends.gpu.launch import finish_by_operations, gradient_dtype
from dispersion_kernels.backends.interface import Finish
from dispersion_kernels.backends.registry import BACKENDS, Backend, choose
from dispersion_kernels.numerics import accumulation_dtype, in_blocks, loss_weight
from dispersion_kernels.options import LossOptions
from dispersion_kernels.potentials import (
    Potential,
    at_temperature,
    carried,
    carry,
    for_backends,
    is_built_in,
    temperature_of,
)
from dispersion_kernels.sampling import SampledPairs
from dispersion_kernels.sampling.estimate import Draws, estimate
from dispersion_kernels.sampling.threshold import evaluates_all
from dispersion_kernels.segments import check_cu_seqlens, longest_sequence, on_device, segment_of_token
from dispersion_kernels.temperature import slope_of_temperature


def dispersion_loss(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    options: LossOptions,
    draws: Draws | None = None,
    with_error: bool = False,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Mean over ``layers`` ``[B, L, F]`` of their reduced losses, ``[]`` (``[S]`` for ``"none"``), differentiable once;
    and ``[layers]``, the expected relative error of each layer's gradient.

    ``draws`` are those of sampled pairs, for layers that are alike in shape, dtype and device. Without draws all pairs
    are evaluated, and the error is None.
    """
    potential = options.potential
    _refuse_parameters(potential)
    needed = _need_gradients(layers)
    with_grad = [False] * len(layers) if options.recompute else needed
    if draws is not None:
        with_grad = [with_error or any(with_grad)] * len(layers)
        tensors = _Tensors(pair_ids, cu_seqlens, None, *draws)
        return _differentiable(_Call(options, with_grad, False, with_error, max_seqlen), tensors, layers, any(needed))
    if options.sampling is not None:
        options = options._replace(sampling=None)
    temperature, slope_needed = temperature_of(potential), False
    if temperature is not None:
        options = options._replace(potential=at_temperature(potential, 1.0))
        (slope_needed,) = _need_gradients([temperature])
    call = _Call(options, with_grad, slope_needed and not options.recompute, max_seqlen=max_seqlen)
    return _differentiable(call, _Tensors(pair_ids, cu_seqlens, temperature), layers, any(needed) or slope_needed)


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


class _Tensors(NamedTuple):
    """Tensor arguments of the operator beside the layers."""

    pair_ids: Tensor | None
    cu_seqlens: Tensor | None
    temperature: Tensor | None
    """``[]``: value of the potential's temperature field; None where the field is a number or there is none."""
    shuffle: Tensor | None = None
    fit: Tensor | None = None
    """``shuffle`` and ``fit`` of :class:`Draws`; None for all pairs."""


class _Call(NamedTuple):
    """Arguments of the operator other than tensors."""

    options: LossOptions
    """``sampling`` is :class:`SampledPairs`, or None for all pairs."""
    with_grad: Sequence[bool]
    """Flag per layer: whether the forward pass computes the layer's gradient; alike for all layers of sampled pairs."""
    with_slope: bool = False
    with_error: bool = False
    max_seqlen: int | None = None

    def run(self, tensors: _Tensors, layers: Sequence[Tensor], unobserved: bool) -> _Result:
        """Calls the operator. ``unobserved`` calls bypass PyTorch's dispatcher, which takes 20 us or more."""
        if unobserved:
            return _run(layers, tensors, self)
        if not torch.compiler.is_compiling():
            flops.register(torch.ops.dispersion_kernels.dispersion_loss, _flop_formula)
        outputs = torch.ops.dispersion_kernels.dispersion_loss(layers, *tensors, *_packed(self))
        return _Result(*outputs)


class _Result(NamedTuple):
    """Outputs of the operator. An output that was not requested is None, or empty where PyTorch's dispatcher passed it
    on."""

    loss: Tensor
    grads: Sequence[Tensor | None]
    """``[B, L, F]`` per layer, or, of sampled pairs, one ``[layers, B, L, F]``: d loss / d z (for ``"none"``, of the
    loss of z's sequence) without the factor ``scale``, and, of all pairs and a backend with ``finish``, the row
    transform."""
    scale: Tensor | None
    """``[layers, B, L]``: factor per token of ``grads``."""
    slope: Tensor | None = None
    """d loss / d temperature, of the shape of ``loss``."""
    error: Tensor | None = None
    """``[layers]``: expected relative error of the gradient from sampled pairs."""
    anchor: Tensor | None = None
    """``[0]`` or ``[]``: differentiable output that no caller sees. Backward keeps the anchor to show autograd what
    the gradients depend on; of the loss, which callers change in place (``loss *= weight``), autograd would refuse
    that."""


def _differentiable(
    call: _Call, tensors: _Tensors, layers: Sequence[Tensor], needed: bool
) -> tuple[Tensor, Tensor | None]:
    """Loss of the call, differentiable, and the error of sampled pairs."""
    if _unobserved(*layers, *tensors) and forward_ad._current_level < 0:
        if needed:
            loss, error, _ = _Loss.apply(call, *tensors, *layers)
            return loss, error
        result = call.run(tensors, layers, unobserved=True)
    # The operator has a derivative formula of its own, used under compilers and modes, but not under torch.func.
    elif not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        result = call.run(tensors, layers, unobserved=False)
    elif torch.compiler.is_compiling():
        raise RuntimeError(
            "torch.compile found fused_dispersion_loss inside of a transform of torch.func or of a dual level, and "
            'traces it there with impl="reference" alone; transform outside of the compiled function'
        )
    else:
        loss, _, error, *_ = _Transformed.apply(call, *tensors, *layers)
        return loss, error
    return result.loss, result.error


# Number of tensors before the layers among the arguments of the classes below.
_COUNT = len(_Tensors._fields)


class _Loss(torch.autograd.Function):
    """Differentiable loss of plain tensors (:func:`_unobserved`)."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *arguments: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        tensors, layers = _Tensors(*arguments[:_COUNT]), arguments[_COUNT:]
        result = call.run(tensors, layers, unobserved=True)
        anchor = anchor_beside(result.loss)
        if result.error is not None:
            ctx.mark_non_differentiable(result.error)
        ctx.set_materialize_grads(False)
        _keep(ctx, call, tensors, layers, result._replace(anchor=anchor), ctx.needs_input_grad[1:], visible=False)
        return result.loss, result.error, anchor

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, upstream[0])


class _Transformed(torch.autograd.Function):
    """Differentiable loss under the transforms of ``torch.func`` and in forward mode. :class:`_Loss` serves all other
    calls, because this class takes 60 us more per call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, *arguments: Any) -> tuple[Tensor | None, ...]:
        result = call.run(_Tensors(*arguments[:_COUNT]), arguments[_COUNT:], _unobserved(*arguments))
        anchor = anchor_beside(result.loss)
        return result.loss, anchor, result.error, result.slope, result.scale, *result.grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        call, *arguments = inputs
        loss, anchor, error, slope, scale, *grads = output
        ctx.mark_non_differentiable(*(value for value in output[2:] if value is not None))
        ctx.set_materialize_grads(False)  # zeros for the gradients would be as large as the layers
        tensors, layers = _Tensors(*arguments[:_COUNT]), arguments[_COUNT:]
        _keep(ctx, call, tensors, layers, _Result(loss, grads, scale, slope, error, anchor), ctx.needs_input_grad[1:])

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
    tensors: _Tensors,
    layers: Sequence[Tensor],
    result: _Result,
    needed: Sequence[bool],
    visible: bool = True,
) -> None:
    """Saves the result for backward, or, where it lacks a gradient that is needed, the inputs to recompute it from.

    ``needed`` has a flag per tensor and layer. ``visible`` says that the caller can reach the result, so that backward
    must not overwrite it.
    """
    ctx.call, ctx.dtype, ctx.needed = call, layers[0].dtype, list(needed[_COUNT:])
    ctx.temperature = tensors.temperature if any(needed[:_COUNT]) else None
    ctx.recompute = any(need and not there for need, there in zip(ctx.needed, call.with_grad, strict=True))
    ctx.recompute = ctx.recompute or (ctx.temperature is not None and not call.with_slope)
    ctx.hooked = visible or _hooks_see_what_is_saved()
    ctx.finish = finish_of(call.options, layers[0])
    if ctx.recompute:
        ctx.save_for_backward(*tensors, *layers)
    else:
        read: list[Tensor | None] = []
        if ctx.finish is not None and call.options.potential.row_transform != "none":
            read = [z if need else None for z, need in zip(layers, ctx.needed, strict=True)]
        ctx.save_for_backward(tensors.cu_seqlens, result.anchor, result.slope, result.scale, *read, *result.grads)


def anchor_beside(tensor: Tensor) -> Tensor:
    """Output for ``_Result.anchor``: a zero where hooks of saved tensors, which may take a maximum, see the anchor,
    else an empty tensor, which takes no launch."""
    return tensor.new_zeros(()) if _hooks_see_what_is_saved() else tensor.new_empty(0)


def reads_tokens(options: LossOptions, z: Tensor) -> bool:
    """Whether backward reads the tokens even where forward computed the gradient."""
    return options.potential.row_transform != "none" and finish_of(options, z) is not None


def finish_of(options: LossOptions, z: Tensor) -> Finish | None:
    """Function that completes the gradients of the backend for ``z``; None where they lack nothing but their scale, as
    those of sampled pairs."""
    # The latter is a fake tensor, on a device that this machine lacks.
    if options.sampling is not None or (z.is_cuda and not torch.cuda.is_available()):
        return None
    return BACKENDS[choose(options.impl, z, options.potential)].finish


def _gradients(ctx: Any, upstream: Tensor | None) -> Sequence[Tensor | None]:
    """Gradients of the tensors and of each layer, None where not needed."""
    saved = ctx.saved_tensors
    gradients: list[Tensor | None] = [None] * (_COUNT + len(ctx.needed))
    if upstream is None:
        return gradients
    if ctx.recompute:
        tensors, layers = _Tensors(*saved[:_COUNT]), saved[_COUNT:]
        with torch.no_grad():
            with_grad = ctx.needed if ctx.call.options.sampling is None else [True] * len(ctx.needed)
            with_slope = ctx.temperature is not None
            call = _Call(ctx.call.options, with_grad, with_slope, max_seqlen=ctx.call.max_seqlen)
            result = call.run(tensors, layers, _unobserved(*tensors, *layers))
        cu_seqlens, scale, grads, slope = tensors.cu_seqlens, result.scale, result.grads, result.slope
        causes = layers if ctx.temperature is None else [*layers, ctx.temperature]
    else:
        cu_seqlens, anchor, slope, scale, *rest = saved
        count = len(ctx.needed) if ctx.call.options.sampling is None else 1
        layers, grads, causes = rest[:-count], rest[-count:], [anchor]
    if any(ctx.needed):
        assert scale is not None
        if ctx.call.options.sampling is not None:
            (together,) = grads
            assert together is not None
            grads = together.unbind()
        needed = [grad if need else None for grad, need in zip(grads, ctx.needed, strict=True)]
        factor = _token_factor(upstream, cu_seqlens, scale.shape[2])
        gradients[_COUNT:] = _finished(ctx, needed, layers, scale, factor)
    if ctx.temperature is not None:
        assert slope is not None
        gradients[2] = (upstream * slope).sum().to(ctx.temperature)
    # Under create_graph the gradient would count as a constant, and a gradient penalty would silently do nothing.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        found = iter(differentiable_once(causes, [grad for grad in gradients if grad is not None]))
        return [None if grad is None else next(found) for grad in gradients]
    return gradients


def differentiable_once(causes: Sequence[Tensor], gradients: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients, whose derivative with respect to the causes is an error."""
    found: tuple[Tensor, ...] = _Once.apply(len(causes), *causes, *gradients)
    return found


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


def _token_factor(upstream: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
    """Upstream gradient ``[]`` or ``[S]`` in a shape that broadcasts to the tokens ``[B, L]``."""
    if upstream.dim() == 0:
        return upstream
    if cu_seqlens is None:
        return upstream.unsqueeze(1)
    return upstream[segment_of_token(on_device(cu_seqlens, upstream.device), length)]


def _finished(
    ctx: Any, grads: Sequence[Tensor | None], layers: Sequence[Tensor], scale: Tensor, factor: Tensor
) -> list[Tensor | None]:
    """Gradient of each layer in the tokens' dtype, rounded once: ``grads`` ``[B, L, F]`` per layer, with ``layers``
    through the row transform where they lack it, times ``scale`` ``[layers, B, L]`` and ``factor``, which broadcasts to
    ``[B, L]``. In place where the graph is freed afterwards."""
    unobserved = _unobserved(*grads, *layers, scale, factor)
    if ctx.finish is not None:
        finish = ctx.finish if unobserved else finish_by_operations
        with torch.no_grad():  # under create_graph saved layers require gradients
            finished: list[Tensor | None] = finish(grads, layers, scale, factor, ctx.call.options.potential, ctx.dtype)
        return finished
    is_fp32_on_cpu = scale.is_cpu and scale.dtype == torch.float32
    if unobserved and is_fp32_on_cpu and cpu.unavailable_reason() is None:
        in_place = ctx.recompute or not (ctx.hooked or graph_is_kept())
        factor = factor.flatten().contiguous()  # the gradient of a sum has stride 0
        finished = cpu.scaled(grads, scale, factor, ctx.dtype, in_place=in_place)
        # DLPack makes each gradient a tensor of its own, not a view of all layers': autograd adds to those in place.
        return [None if grad is None else from_dlpack(to_dlpack(grad)) for grad in finished]
    factors = (scale * factor).unsqueeze(3)
    return [
        None if grad is None else _scaled(grad, layer_factor, ctx.dtype)
        for grad, layer_factor in zip(grads, factors, strict=True)
    ]


def graph_is_kept() -> bool:
    """Whether the running backward keeps the saved tensors of its graph, so that it may run again. PyTorch has no
    public name for that."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or bool(keeps())


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


# The signature of the operator. _packed and _unpacked are its two sides, so that only they and this text know it.
_library = torch.library.Library("dispersion_kernels", "FRAGMENT")
_library.define(
    "dispersion_loss(Tensor[] layers, Tensor? pair_ids, Tensor? cu_seqlens, Tensor? temperature, Tensor? shuffle,"
    " Tensor? fit, str potential, float[] params, str reduction, str impl, float fraction, str control_variate,"
    " bool[] with_grad, bool with_slope, bool with_error, SymInt? max_seqlen)"
    " -> (Tensor loss, Tensor[] grads, Tensor scale, Tensor slope, Tensor error, Tensor anchor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _packed(call: _Call) -> tuple[Any, ...]:
    """Arguments of the operator after the tensors."""
    options, sampling = call.options, call.options.sampling
    sampled = (float(sampling.fraction), sampling.control_variate) if isinstance(sampling, SampledPairs) else (1.0, "")
    flags = list(call.with_grad), call.with_slope, call.with_error
    return *carry(options.potential), options.reduction, options.impl, *sampled, *flags, call.max_seqlen


def _unpacked(layers: Sequence[Tensor], *arguments: Any) -> tuple[Sequence[Tensor], _Tensors, _Call]:
    """Arguments of :func:`_run` from those of the operator."""
    potential, params, reduction, impl, fraction, control_variate, *rest = arguments[_COUNT:]
    sampling = SampledPairs(fraction, control_variate) if control_variate else None
    options = LossOptions(carried(potential, params), sampling, reduction, recompute=False, impl=impl)
    return layers, _Tensors(*arguments[:_COUNT]), _Call(options, *rest)


@torch.library.impl(_library, "dispersion_loss", "CompositeExplicitAutograd")
def _dispersion_loss(*arguments: Any) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    loss, grads, *others = _run(*_unpacked(*arguments))
    # An operator returns no None, and no tensor twice.
    scale, slope, error, anchor = (loss.new_empty(0) if value is None else value for value in others)
    return loss, [loss.new_empty(0) if grad is None else grad for grad in grads], scale, slope, error, anchor


@torch.library.register_fake("dispersion_kernels::dispersion_loss")
def _dispersion_loss_fake(*arguments: Any) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    layers, tensors, call = _unpacked(*arguments)
    z, bounds = layers[0], tensors.cu_seqlens
    sequences = z.shape[0] if bounds is None else bounds.shape[0] - 1
    dtype, sampled, with_grad = accumulation_dtype(z.dtype), call.options.sampling is not None, any(call.with_grad)
    loss = z.new_empty(sequences if call.options.reduction == "none" else (), dtype=dtype)
    shapes = [(len(layers), *z.shape)] if sampled else [layer.shape for layer in layers]
    of_g = dtype
    if tensors.temperature is None and finish_of(call.options, z) is not None:
        of_g = gradient_dtype(z, call.options.potential, bounds)
    grads = [
        loss.new_empty(shape, dtype=of_g) if need else loss.new_empty(0)
        for shape, need in zip(shapes, call.with_grad, strict=not sampled)
    ]
    scale = loss.new_empty((len(layers), *z.shape[:2]) if with_grad else 0)
    slope = loss.new_empty(loss.shape if call.with_slope else 0)
    error, anchor = loss.new_empty(len(layers) if sampled else 0), loss.new_empty(0)
    return loss, grads, scale, slope, error, anchor


def _flop_formula(*arguments: Any, out_val: Any = None) -> int:
    layers, tensors, call = _unpacked(*arguments)
    return flops.count(layers, tensors.cu_seqlens, call.options, call.with_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    layers, tensors, call = _unpacked(*inputs)
    ctx.others = [[] if isinstance(value, list) and not value else None for value in inputs[1 + _COUNT :]]
    ctx.mark_non_differentiable(*tree_leaves(output[1:-1]))
    ctx.set_materialize_grads(False)
    needed = [value is not None and value.requires_grad for value in (*tensors, *layers)]
    _keep(ctx, call, tensors, layers, _Result(*output), needed)


def _backward(ctx: Any, upstream: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    gradients = list(_gradients(ctx, upstream))
    return gradients[_COUNT:], *gradients[:_COUNT], *ctx.others


def _one_by_one(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """Batch of a vmap: a call of the operator for each of its entries."""
    results = [
        torch.ops.dispersion_kernels.dispersion_loss(
            *(_entry(value, dim, n) for value, dim in zip(arguments, in_dims, strict=True))
        )
        for n in range(info.batch_size)
    ]
    together = tuple(
        [torch.stack(part) for part in zip(*outputs, strict=True)]
        if isinstance(outputs[0], list)
        else torch.stack(outputs)
        for outputs in zip(*results, strict=True)
    )
    return together, tree_map(lambda _: 0, together)


def _entry(value: Any, dim: Any, n: int) -> Any:
    """Entry ``n`` of a vmap batch along ``dim``; ``value`` itself where it is not batched."""
    if isinstance(value, list | tuple) and isinstance(dim, list | tuple):
        return [_entry(each, each_dim, n) for each, each_dim in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, n)


torch.library.register_autograd(
    "dispersion_kernels::dispersion_loss", _backward, setup_context=_setup_context, lib=_library
)
torch.library.register_vmap("dispersion_kernels::dispersion_loss", _one_by_one, lib=_library)


def _run(layers: Sequence[Tensor], tensors: _Tensors, call: _Call) -> _Result:
    """Outputs of the operator."""
    z, cu_seqlens, temperature = layers[0], tensors.cu_seqlens, tensors.temperature
    options, potential, sampling = call.options, call.options.potential, call.options.sampling
    max_seqlen = None if call.max_seqlen is None else min(call.max_seqlen, z.shape[1])
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, z.shape[1], max_seqlen)
        if max_seqlen is None and cu_seqlens.is_cpu:
            max_seqlen = longest_sequence(cu_seqlens)
    if temperature is not None and temperature.is_meta and not z.is_meta:
        raise ValueError(f"tau is a tensor on meta, which holds no value, and z is on {z.device}; give tau a value")
    if temperature is not None and not temperature.is_meta:
        potential = at_temperature(potential, float(temperature))
    backend = BACKENDS[choose(options.impl, z, potential)]
    with without_autocast(z.device):
        # Under a compiler the caller leaves this question to the operator.
        if isinstance(sampling, SampledPairs) and not evaluates_all(options, z, cu_seqlens):
            return _run_sampled(layers, tensors, call, backend, sampling)
        run = backend.run if sampling is None else backend.run_whole
        loss, grads, scale = run(
            layers,
            tensors.pair_ids,
            cu_seqlens,
            for_backends(potential),
            options.reduction,
            call.with_grad,
            max_seqlen,
        )
        if temperature is not None:
            # The dtype of G depends on a value that fake tensors do not have.
            grads = [None if grad is None else grad.to(loss.dtype) for grad in grads]
        slope = _slope(layers, tensors, potential, options.reduction).to(loss.dtype) if call.with_slope else None
    if sampling is None:
        return _Result(loss, grads, scale, slope)
    grad = torch.stack([grad for grad in grads if grad is not None]) if any(call.with_grad) else None
    return _Result(loss, [grad], scale, error=loss.new_zeros(len(layers)))


def _run_sampled(
    layers: Sequence[Tensor], tensors: _Tensors, call: _Call, backend: Backend, sampling: SampledPairs
) -> _Result:
    assert tensors.shuffle is not None
    assert tensors.fit is not None
    potential = for_backends(call.options.potential)
    found = estimate(
        layers,
        tensors.pair_ids,
        tensors.cu_seqlens,
        call.options._replace(potential=potential),
        Draws(tensors.shuffle, tensors.fit),
        any(call.with_grad),
        call.with_error,
        backend.run_whole,
        backend.sampler(potential, sampling, layers[0], tensors.cu_seqlens),
    )
    dtype = accumulation_dtype(layers[0].dtype)
    return _Result(found.loss.to(dtype), [found.grad], found.scale, error=found.error.to(dtype))


def _slope(layers: Sequence[Tensor], tensors: _Tensors, potential: Potential, reduction: str) -> Tensor:
    """Derivative of the loss with respect to the temperature, by the torch backend."""
    slopes = []
    for z in layers:
        slope, pairs = slope_of_temperature(z, potential, tensors.pair_ids, tensors.cu_seqlens)
        weight = loss_weight(len(layers), reduction, (pairs > 0).sum())
        slopes.append((slope if reduction == "none" else slope.sum()) * weight)
    return torch.stack(slopes).sum(0)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which matrix products stay fp32 under autocast. A null context where autocast is off, because
    ``torch.autocast`` takes as long to enter as several operators."""
    # PyTorch raises where asked for the autocast state of a device without autocast, as meta.
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()
