"""Dispersion loss on the hidden states of any model, by hooks on its blocks: :class:`DispersionRegularizer`.

Each block's output z passes through an identity ``z -> (z, term)``, whose second output is the layer's loss. The
backward of the identity receives the gradients of both outputs, computes the gradient of the loss, and returns the sum.
Factors of the term in the total loss (a weight, a loss scale, a division by accumulation steps) arrive with its
gradient; only z is saved, and autograd adds no tensors.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from dispersion_kernels.blocks import (
    callers_of,
    find_stack,
    has_tokens_of_its_own,
    hidden_states_of,
    is_pretrained,
    layer_numbers,
)
from dispersion_kernels.checks import check_number
from dispersion_kernels.loss import loss_and_error
from dispersion_kernels.numerics import loss_dtype
from dispersion_kernels.operators import anchor_beside, differentiable_once, graph_is_kept, reads_tokens
from dispersion_kernels.options import LossOptions, check_options
from dispersion_kernels.potentials import Potential, at_temperature, temperature_of
from dispersion_kernels.sampling import Sampling

Layers = str | Sequence[int | nn.Module]
Tokens = Literal["attended", "labels", "all"]

IGNORED_LABEL = -100
"""Label of tokens without a prediction, in Hugging Face's models and in ``cross_entropy``."""


class DispersionRegularizer:
    """Dispersion loss on the outputs of a model's blocks, as a term to add to the model's own loss::

        reg = DispersionRegularizer(model, layers="all", weight=0.1)
        loss = model(**batch).loss + reg.loss()  # once per forward

    Hooks on the blocks act only in training mode with gradients enabled. Make the regulariser before the first call of
    a compiled model: PyTorch compiles the hooks with the blocks and ignores hooks added later. Deep copies and pickles
    of the model have no regulariser, and those of the regulariser are as after :meth:`remove`.

    Args:
        model: module with a stack of blocks in a ``ModuleList`` (or a ``ModuleDict`` whose keys are numbers). Blocks
            return hidden states ``[B, L, F]`` or ``[L, F]``, or a tuple, list or mapping that begins with them. DDP,
            FSDP2, PEFT and ``torch.compile`` may wrap the model before or after.
        layers: ``"all"``, ``"last"``, ``"early_half"``, ``"late_half"``, or a list of layer numbers, counted from 1 as
            in ``hidden_states`` of Hugging Face's models; or a list of modules anywhere in the model. The embedding is
            no layer, and the final norm is not applied.
        weight: factor of the mean over the chosen layers in :meth:`loss`. The attribute may change between steps.
        stack: name of the stack, or a part of the name, as ``"decoder"``, for a model with several stacks.
        tokens: ``"attended"``: tokens that the model attends to, by arguments of the module that owns the blocks:
            ``cu_seq_lens_q``, else a 2-D ``attention_mask`` of booleans or integers (or the padding mask of PyTorch's
            encoder or decoder), else ``position_ids``, which restart at each document (one loss per document), else all
            tokens. For a list of modules outside of Hugging Face's models, by those of ``model``. ``"labels"``:
            attended tokens whose label, in the model's argument ``labels``, is not -100. ``"all"``: all tokens.
        potential, tau, sampling, impl: as in :func:`~dispersion_kernels.fused_dispersion_loss`.
        keep_gradients: compute the gradient in forward and keep it until backward. This takes 3 instead of 4 B L^2 F
            FLOPs and the memory of one fp32 z per layer, on a GPU also that of a copy of z. Needed for a model that
            writes to its blocks' outputs in place.

    On a GPU under autocast the loss takes hidden states in autocast's dtype, as a matrix product does.

    Raises:
        ValueError: a model without a stack of blocks, or with several; a wrong layer or option.
        TypeError: a wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = "all",
        weight: float = 0.1,
        *,
        stack: str | None = None,
        tokens: Tokens = "attended",
        potential: str | Potential = "angular_spread",
        tau: float | Tensor | None = None,
        sampling: Sampling | float | None = None,
        impl: str = "auto",
        keep_gradients: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; give the model itself")
        check_number("weight", weight)
        if isinstance(weight, bool) or not 0 <= weight < math.inf:
            raise ValueError(f"weight must be a finite number of at least 0, got {weight!r}; try 0.1")
        if tokens not in ("attended", "labels", "all"):
            raise ValueError(f"tokens must be 'attended', 'labels' or 'all', got {tokens!r}")
        self.weight: float = float(weight)
        self.values: dict[str, Tensor] = {}
        """Loss of each layer, by module name, without the weight, at the last call of :meth:`loss`."""
        self._tokens = tokens
        self._keep_gradients = keep_gradients
        self._options = check_options(potential, tau, sampling, "mean", False, impl)
        temperature = temperature_of(self._options.potential)
        if temperature is not None and temperature.requires_grad:
            raise TypeError(
                "tau requires a gradient, which DispersionRegularizer does not give; give tau.detach(), or train it "
                "with fused_dispersion_loss"
            )
        self._random = sampling is not None

        callers, owner, self._layers = _choose(self, model, layers, stack)
        self._pending: _Term = _END
        self._before: _Term = _END
        self._scrap: Tensor | None = None
        self._forward: _Forward | None = None
        self._removed = self._dropped = False
        self._handles = [layer.module.register_forward_hook(layer) for layer in self._layers]
        for depth, module in enumerate(callers):
            begin = _Begin(self, module, depth, is_owner=module is owner)
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(_Finish(self, depth), always_call=True))
        _WATCHED.add(self)
        _watch_optimizers()

    @property
    def layers(self) -> list[str]:
        """Names of the chosen layers' modules."""
        return [layer.name for layer in self._layers]

    def loss(self) -> Tensor:
        """Mean loss over the chosen layers times ``weight``, ``[]``. Call it once per forward; it averages over several
        forwards since the last call.

        Raises RuntimeError where a layer did not run in training since the last call, or after :meth:`remove`."""
        found: dict[_Layer, list[Tensor]] = {layer: [] for layer in self._layers}
        for term in _chain(self._pending):
            term.forward.taken = True
            found[term.layer].append(term.value)
        self._pending = _END
        self._before, self._scrap = _END, None
        dropped, self._dropped = self._dropped, False
        if (missing := [layer.name for layer in self._layers if not found[layer]]) or self._removed:
            raise RuntimeError(self._nothing_to_add(missing, dropped))
        device = found[self._layers[-1]][0].device
        means = [torch.stack(values[::-1]).mean().to(device) for values in found.values()]
        self.values = {layer.name: mean.detach() for layer, mean in zip(self._layers, means, strict=True)}
        return self.weight * torch.stack(means).mean()

    def _nothing_to_add(self, missing: list[str], dropped: bool) -> str:
        if self._removed:
            return (
                "DispersionRegularizer.loss() was called after remove(), or of a copy; make another "
                "DispersionRegularizer of the model"
            )
        if dropped:
            return (
                "backward ran between the model's forward and DispersionRegularizer.loss(), and dropped its terms; "
                "call loss() right after the forward, before any backward or torch.autograd.grad"
            )
        return (
            f"{len(missing)} of {len(self._layers)} layers did not run in training mode with gradients enabled since "
            f"the last call of DispersionRegularizer.loss(): {', '.join(missing)}. Call it once, after the model's "
            "forward, in training alone. If they did run: call the model, not a method of it or its blocks; make the "
            "DispersionRegularizer before the first call of a compiled model; activation checkpointing around the "
            "blocks' hooks needs use_reentrant=False"
        )

    def remove(self) -> None:
        """Removes the hooks, which restores the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _WATCHED.discard(self)
        self._removed = True
        self._pending = self._before = _END
        self._scrap, self._forward = None, None

    def __deepcopy__(self, memo: object) -> DispersionRegularizer:
        return _removed_one(self.weight)

    def __reduce__(self) -> tuple[Any, ...]:
        return _removed_one, (self.weight,)

    def _select(self, given: Mapping[str, Any]) -> _Selection:
        if self._tokens == "all":
            return _ALL
        mask, cu_seqlens = None, given.get("cu_seq_lens_q")
        paddings = [given.get(f"{side}_key_padding_mask") for side in ("src", "tgt")]
        padding, *more = [one for one in paddings if one is not None] or [None]
        attention_mask, position_ids = given.get("attention_mask"), given.get("position_ids")
        if cu_seqlens is None and attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
                shape = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else ""
                raise ValueError(
                    f"attention_mask is a {type(attention_mask).__name__} {shape}, and DispersionRegularizer knows "
                    "which tokens take part from one of shape [B, L] alone; give the model that, or take tokens='all'"
                )
            if attention_mask.is_floating_point():
                raise TypeError(
                    f"attention_mask is {attention_mask.dtype}, and DispersionRegularizer takes booleans or integers, "
                    "not 0 for the tokens that take part (an additive mask has 0 there); give the model such a mask, "
                    "or take tokens='all'"
                )
            mask = attention_mask.bool()
        elif cu_seqlens is None and padding is not None:
            if more or padding.dtype != torch.bool:
                raise ValueError(
                    f"{'src_ and tgt_key_padding_mask' if more else 'the key padding mask'} is {padding.dtype}, and "
                    "DispersionRegularizer takes one of booleans, True for padding; give the model that, or take "
                    "tokens='all'"
                )
            mask = ~padding
        elif cu_seqlens is None and isinstance(position_ids, Tensor) and position_ids.dim() == 2:
            tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
            batch = position_ids.shape[0] if tokens is None else tokens.shape[0]
            cu_seqlens = _documents(position_ids.expand(batch, -1))
        if self._tokens == "labels":
            labels = given.get("labels")
            if labels is None:
                raise ValueError(
                    "tokens='labels' was given, and the model was called without labels; call it with labels=, or take "
                    "tokens='attended'"
                )
            predicted = labels != IGNORED_LABEL
            mask = predicted if mask is None else mask & predicted
        largest = given.get("max_length_q") if given.get("cu_seq_lens_q") is not None else None
        is_length = isinstance(largest, int | torch.SymInt)
        return _Selection(mask, cu_seqlens, largest if is_length else None)

    def _value(
        self,
        z: Tensor,
        selection: _Selection,
        options: LossOptions,
        seed: int | None = None,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """Loss of one layer, ``[]``."""
        mask, cu_seqlens, max_seqlen = selection
        if cu_seqlens is not None:
            z = z.flatten(0, -2)
        if mask is not None and z.dim() == 2:
            mask = mask.flatten()
        generator = None if seed is None else torch.Generator(z.device).manual_seed(seed)
        options = options._replace(recompute=recompute)
        return loss_and_error(z, options, mask, cu_seqlens, max_seqlen, None, generator, with_error=False)[0]

    def _options_now(self) -> LossOptions:
        """Options with a copy of a temperature that is a tensor, for backward, before which it may change."""
        temperature = temperature_of(self._options.potential)
        if temperature is None:
            return self._options
        return self._options._replace(potential=at_temperature(self._options.potential, temperature.clone()))

    def _abandon_forward(self) -> None:
        """Drops the terms of the current forward, which failed."""
        self._pending, self._forward = self._before, None

    def _discard(self, forward: _Forward) -> None:
        """Drops the terms of a forward whose backward ran without them, and warns."""
        kept = [term for term in _chain(self._pending) if term.forward is not forward]
        self._pending, self._dropped = _END, True
        for term in reversed(kept):
            self._pending = _Term(self._pending, term.layer, term.forward, term.value)
        warnings.warn(
            "backward ran through a model with a DispersionRegularizer whose loss() nobody added: the model is trained "
            "without it. Add reg.loss() to the loss once a forward, or call reg.remove()",
            RuntimeWarning,
            stacklevel=2,
        )


def _removed_one(weight: float) -> DispersionRegularizer:
    """Copy of a regulariser, which has no model."""
    copy = DispersionRegularizer.__new__(DispersionRegularizer)
    copy.weight, copy.values = weight, {}
    copy._layers, copy._handles = [], []
    copy._dropped = False
    copy.remove()
    return copy


_WATCHED: weakref.WeakSet[DispersionRegularizer] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    """Hook on optimisers, which notices a forgotten loss() of a compiled model, where _WithTerm does not run. There is
    one for all regularisers, and for good: PyTorch iterates over the hooks, and garbage may be collected meanwhile."""
    register_optimizer_step_post_hook(_discard_spent)


def _discard_spent(*_: object) -> None:
    """Drops, after a step of an optimiser, the forwards of pending terms whose backward has run."""
    for regularizer in list(_WATCHED):
        for forward in {term.forward for term in _chain(regularizer._pending) if _is_spent(term.value)}:
            regularizer._discard(forward)


def _is_spent(value: Tensor) -> bool:
    """Whether backward has run through the node that made ``value``, in compiled code, and freed its saved tensors.

    Reading those of a :class:`_WithTerm`, which notices that itself, would make checkpointing compute the block again.
    """
    if isinstance(value.grad_fn, _WithTerm._backward_cls):
        return False
    try:
        getattr(value.grad_fn, "saved_tensors", None)
    except RuntimeError as error:
        return "second time" in str(error)
    return False


class _Forward:
    """Call of the model, or of the first module that is called on the way to the blocks, at ``depth``."""

    def __init__(self, depth: int, given: dict[str, Any], options: LossOptions) -> None:
        self.depth, self.given, self.options = depth, given, options
        self.selection: _Selection | None = None
        self.taken = False
        """Whether :meth:`DispersionRegularizer.loss` has taken the terms of this forward, or they were dropped."""


class _Term:
    """Loss of one layer, a node of a linked list. With a Python list the compiler would compile for each length."""

    def __init__(self, earlier: _Term, layer: _Layer, forward: _Forward, value: Tensor) -> None:
        self.earlier, self.layer, self.forward, self.value = earlier, layer, forward, value


# End of a chain, a _Term itself, because the compiler would compile separate cases for two types.
_END = _Term.__new__(_Term)


def _chain(term: _Term) -> Iterator[_Term]:
    while term is not _END:
        yield term
        term = term.earlier


class _Selection(NamedTuple):
    """Tokens of ``z`` ``[B, L, F]`` that take part."""

    mask: Tensor | None
    """``[B, L]`` boolean; None for all tokens."""
    cu_seqlens: Tensor | None
    """``[S + 1]``: bounds of the sequences in the B L tokens; None where they are the rows."""
    max_seqlen: int | None
    """Length of the longest of these sequences; None where it is not known."""


_ALL = _Selection(None, None, None)


def _no_hook(*_: object) -> None:
    """Copy of a hook: does nothing."""


class _Hook:
    """Hook of one module; its deep copies and pickles do nothing."""

    def __init__(self, regularizer: DispersionRegularizer) -> None:
        self.regularizer = regularizer

    def __deepcopy__(self, memo: object) -> Any:
        return _no_hook

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (_no_hook,)


class _Begin(_Hook):
    """Forward pre-hook of the model, at depth 0, and of the modules from there to the owner of the blocks: selects the
    tokens that take part. Not every hook runs: Lightning calls a method of the model, and Sentence Transformers call
    the owner's ``forward`` directly."""

    def __init__(self, regularizer: DispersionRegularizer, module: nn.Module, depth: int, *, is_owner: bool) -> None:
        super().__init__(regularizer)
        self.names = _argument_names(module)
        self.depth, self.is_owner = depth, is_owner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        regularizer = self.regularizer
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "DispersionRegularizer is not for nn.DataParallel, whose replicas run in threads; take "
                "DistributedDataParallel, or make one GPU visible: CUDA_VISIBLE_DEVICES=0"
            )
        forward = regularizer._forward
        # The last forward ended in an interruption, or in an exception of compiled code.
        if forward is not None and self.depth <= forward.depth:
            regularizer._abandon_forward()
            forward = None
        if regularizer._removed or not torch.is_grad_enabled():
            return
        if forward is None and (not module.training or _recomputes()):
            return
        given = _known(self.names, args, kwargs)
        if forward is None:
            regularizer._scrap, regularizer._dropped = None, False
            forward = _Forward(self.depth, given, regularizer._options_now())
            regularizer._before, regularizer._forward = regularizer._pending, forward
        elif given.get("labels") is not None:
            forward.given["labels"] = given["labels"]
        if self.is_owner:
            if "labels" in forward.given:
                given["labels"] = forward.given["labels"]
            forward.selection = regularizer._select(given)


class _Finish(_Hook):
    """Forward hook of the same modules: ends the :class:`_Forward`, whose terms are discarded where it failed."""

    def __init__(self, regularizer: DispersionRegularizer, depth: int) -> None:
        super().__init__(regularizer)
        self.depth = depth

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        regularizer = self.regularizer
        forward = regularizer._forward
        if forward is None or self.depth > forward.depth:
            return
        # PyTorch calls the hook without an output while it handles the exception that ended the forward.
        if output is None and sys.exc_info()[1] is not None:
            regularizer._abandon_forward()
        regularizer._forward = None


_KNOWN = (
    "cu_seq_lens_q",
    "max_length_q",
    "attention_mask",
    "src_key_padding_mask",
    "tgt_key_padding_mask",
    "position_ids",
    "input_ids",
    "inputs_embeds",
    "labels",
)


def _known(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that select tokens, by name; some models take the arguments in one mapping."""
    given = dict(zip(names, args, strict=False), **kwargs)
    for value in args:
        if isinstance(value, Mapping):
            given.update(value)
    return {name: given[name] for name in _KNOWN if name in given}


def _argument_names(module: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # a scripted module's
        return []


def _recomputes() -> bool:
    """Whether activation checkpointing computes a part of the model again, in backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _documents(position_ids: Tensor) -> Tensor | None:
    """Bounds ``cu_seqlens`` of the documents in ``position_ids`` ``[B, L]``. A document begins with each row, and where
    a position is not its predecessor plus 1. None where a CPU tensor shows that every row is one document."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    begins = torch.nn.functional.pad(begins.flatten(), (0, 1), value=True)
    if position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = begins.nonzero().flatten()
        return None if bounds.numel() == position_ids.shape[0] + 1 else bounds
    # Reading the number of documents would synchronise; empty sequences fill the B L + 1 bounds.
    places = torch.arange(begins.numel(), device=begins.device)
    return torch.where(begins, places, places[-1]).sort().values


class _Layer(_Hook):
    """Forward hook of a block: adds the block's term."""

    def __init__(self, regularizer: DispersionRegularizer, name: str, module: nn.Module) -> None:
        super().__init__(regularizer)
        self.name, self.module = name, module

    def __call__(self, module: nn.Module, args: object, output: Any) -> Any:
        regularizer = self.regularizer
        forward = regularizer._forward
        # A block in training with gradients but without a forward is recomputed by activation checkpointing in
        # backward: the hook must save the same tensors as the first time, and must not count a term.
        if regularizer._removed or not torch.is_grad_enabled() or (forward is None and not module.training):
            return None
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "torch.func transforms a model with a DispersionRegularizer, which hooks into backward; call "
                "reg.remove() first, and take fused_dispersion_loss of the hidden states, which torch.func transforms"
            )
        z = hidden_states_of(output, self.name)
        if (
            isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
            and z.dim() == 3
            and not getattr(module.self_attn, "batch_first", True)
        ):
            raise ValueError(
                f"{self.name} is a {type(module).__name__} with batch_first=False, whose output [L, B, F] would be "
                "taken for L sequences; make it with batch_first=True"
            )
        if forward is None:
            selection, options = _ALL, regularizer._options
        else:
            if forward.selection is None:
                forward.selection = regularizer._select(forward.given)
            selection, options = forward.selection, forward.options
        if torch.compiler.is_compiling():
            # _WithTerm is not needed: the compiler fuses the addition of the two gradients.
            value = regularizer._value(z, selection, options, recompute=not regularizer._keep_gradients)
            if forward is None:
                regularizer._scrap = value
            else:
                regularizer._pending = _Term(regularizer._pending, self, forward, value)
            return None
        if not z.requires_grad:
            if forward is not None:
                value = regularizer._value(z, selection, options)
                regularizer._pending = _Term(regularizer._pending, self, forward, value)
            return None
        z, value, _ = _WithTerm.apply(z, regularizer, forward, selection, options)
        if forward is not None:
            regularizer._pending = _Term(regularizer._pending, self, forward, value)
        return _replaced(output, z)


class _WithTerm(torch.autograd.Function):
    """Identity ``z -> (z, term)`` whose backward adds the gradient of the loss; and a third output, ``[0]``, that shows
    autograd what the gradient depends on."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        regularizer: DispersionRegularizer,
        forward: _Forward | None,
        selection: _Selection,
        options: LossOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # Under checkpointing backward runs on the node of the first forward, and only saved tensors are recomputed. All
        # else is an attribute of ctx, which the recomputing forward need not compute.
        ctx.regularizer, ctx.forward_call, ctx.selection, ctx.kept = regularizer, forward, selection, None
        ctx.options = options
        ctx.seed = int(torch.randint(2**62, (), device="cpu")) if regularizer._random else None
        ctx.dtype = loss_dtype(z)
        # A new tensor, because autograd would refuse in-place writes to an input that is returned as it is.
        same, anchor = z.detach(), anchor_beside(z)
        ctx.save_for_backward(anchor, None if regularizer._keep_gradients else z)
        if forward is None:
            return same, torch.zeros((), device=z.device), anchor
        if regularizer._keep_gradients:
            ctx.kept = _leaf_and_loss(ctx, z)
            return same, ctx.kept[1].detach(), anchor
        return same, regularizer._value(z.to(ctx.dtype), selection, options, ctx.seed), anchor

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, dterm: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dterm is None:
            forward = ctx.forward_call
            if forward is not None and not forward.taken:
                forward.taken = True
                ctx.regularizer._discard(forward)
            return dz, None, None, None, None
        kept, ctx.kept = ctx.kept, (ctx.kept if graph_is_kept() else None)
        if kept is None:
            if ctx.regularizer._keep_gradients:
                raise RuntimeError(
                    "backward ran a second time through a DispersionRegularizer with keep_gradients=True; give the "
                    "first one retain_graph=True"
                )
            try:
                anchor, z = ctx.saved_tensors  # once: checkpointing allows no second time
            except RuntimeError as error:
                if "inplace" not in str(error):
                    raise
                raise RuntimeError(
                    "the hidden states that a DispersionRegularizer reads were modified in place by what follows the "
                    "block; make it with keep_gradients=True, which reads them before that"
                ) from error
            kept = _leaf_and_loss(ctx, z)
        elif torch.is_grad_enabled():
            anchor, _ = ctx.saved_tensors
        leaf, loss = kept
        (gradient,) = torch.autograd.grad(loss, leaf, dterm, retain_graph=ctx.kept is not None)
        if torch.is_grad_enabled():
            (gradient,) = differentiable_once([anchor, dterm], [gradient])
            return gradient if dz is None else gradient + dz, None, None, None, None
        return gradient if dz is None else gradient.add_(dz), None, None, None, None


def _leaf_and_loss(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    # Identity hooks replace those of checkpointing or offloading, which would compute the gradient again.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        leaf = z.detach()
        if ctx.regularizer._keep_gradients and ctx.dtype == z.dtype and reads_tokens(ctx.options, z):
            leaf = leaf.clone()  # a model may write to z before backward
        leaf.requires_grad_()
        return leaf, ctx.regularizer._value(leaf.to(ctx.dtype), ctx.selection, ctx.options, ctx.seed)


def _replaced(output: Any, z: Tensor) -> Any:
    """Copy of ``output`` with ``z`` in place of its hidden states."""
    if isinstance(output, Tensor):
        return z
    if isinstance(output, Mapping):
        changed = {**output, next(iter(output)): z}
        return changed if type(output) is dict else type(output)(**changed)
    if hasattr(output, "_fields"):
        return type(output)(z, *output[1:])
    return type(output)((z, *output[1:]))


def _choose(
    regularizer: DispersionRegularizer, model: nn.Module, layers: Layers, stack: str | None
) -> tuple[tuple[nn.Module, ...], nn.Module | None, list[_Layer]]:
    """Modules around the blocks that are called, the one whose arguments select the tokens (None for the outermost one
    that is called), and a hook for each chosen block."""
    if not isinstance(layers, str):
        if not isinstance(layers, Iterable):
            raise TypeError(
                "layers must be 'all', 'last', 'early_half', 'late_half', a list of numbers or of modules, got "
                f"{layers!r}; for one layer give layers=[{layers!r}]"
            )
        layers = list(layers)
        if not layers:
            raise ValueError("layers is an empty list; give at least one layer, or layers='all'")
        modules = [layer for layer in layers if isinstance(layer, nn.Module)]
        if len(modules) == len(layers):
            names = {module: name for name, module in model.named_modules()}
            if strangers := [type(module).__name__ for module in modules if module not in names]:
                raise ValueError(f"layers has modules that are no part of model: {', '.join(strangers)}")
            chosen = {names[module]: module for module in modules}
            callers, owner = _callers_of_modules(regularizer, model, list(chosen))
            _check_labels(regularizer, model, owner)
            return callers, owner, [_Layer(regularizer, name, module) for name, module in chosen.items()]
        if modules:
            raise TypeError("layers mixes numbers and modules; give either")
    found = find_stack(model, stack)
    _check_labels(regularizer, model, found.owner)
    hooks = [
        _Layer(regularizer, f"{found.name}.{number - 1}", found.blocks[number - 1])
        for number in layer_numbers(layers, len(found.blocks))
    ]
    return found.callers, found.owner, hooks


def _callers_of_modules(
    regularizer: DispersionRegularizer, model: nn.Module, names: list[str]
) -> tuple[tuple[nn.Module, ...], nn.Module | None]:
    """Modules around those of these names that are called, and the one whose arguments select the tokens."""
    each = [callers_of(model, [name]) for name in names]
    owners = {callers[-1]: callers for callers in each if has_tokens_of_its_own(callers[-1])}
    # Owners around another owner are left out: the inner one is given the mask of the tokens.
    owners = {
        one: found for one, found in owners.items() if not any(m in owners for m in one.modules() if m is not one)
    }
    if not owners:
        return callers_of(model, names), None
    if len(owners) > 1 and regularizer._tokens != "all":
        raise ValueError(
            f"layers has modules of {' and '.join(type(one).__name__ for one in owners)}, each of which has a mask of "
            "its own; make a DispersionRegularizer for each, or take tokens='all'"
        )
    owner, callers = next(iter(owners.items()))
    return (callers, owner) if len(owners) == 1 else (callers_of(model, names), None)


def _check_labels(regularizer: DispersionRegularizer, model: nn.Module, owner: nn.Module | None) -> None:
    """Raises where labels are not of the owner's tokens."""
    if regularizer._tokens == "labels" and any(_is_encoder(owner, whole) for whole in model.modules()):
        raise ValueError(
            f"tokens='labels' was given for the encoder, a {type(owner).__name__}, and labels are of the decoder's "
            "tokens; take tokens='attended', or the decoder's layers"
        )


def _is_encoder(owner: nn.Module | None, whole: Any) -> bool:
    """Whether ``owner`` is the encoder of ``whole``, a model of Hugging Face that has a decoder beside it."""
    if owner is None or whole is owner or not is_pretrained(whole):
        return False
    if not getattr(whole.config, "is_encoder_decoder", False) or whole.get_encoder() is not owner:
        return False
    beside = set(whole.modules()) - set(owner.modules())
    return any(is_pretrained(m) and owner not in set(m.modules()) for m in beside)
