"""Stack of blocks in anybody's model, and the hidden states in a block's output."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor, nn


class Stack(NamedTuple):
    name: str
    callers: tuple[nn.Module, ...]
    """Modules around the blocks that are called, from the model to the owner."""
    blocks: list[nn.Module]

    @property
    def owner(self) -> nn.Module:
        """Nearest module around the blocks that :func:`has_tokens_of_its_own`, else the nearest one with a forward: its
        arguments select the tokens."""
        return self.callers[-1]


def find_stack(model: nn.Module, name: str | None) -> Stack:
    stacks = list(_stacks(model, "", (model,)))
    pretrained = [stack for stack in stacks if is_pretrained(stack.owner)]
    stacks = pretrained or stacks
    candidates = [f"{stack.name} ({len(stack.blocks)} x {type(stack.blocks[0]).__name__})" for stack in stacks]
    if name is not None:
        stacks = [stack for stack in stacks if f".{name}." in f".{stack.name}."]
    if len(stacks) == 1:
        return stacks[0]
    type_name = type(model).__name__
    if not candidates:
        raise ValueError(
            f"{type_name} has no stack of blocks, which is a ModuleList, or a ModuleDict whose keys are numbers; give "
            "the blocks, as layers=[model.first, model.second]"
        )
    wanted = "several stacks of blocks" if name is None else f"{len(stacks) or 'no'} stacks of blocks named {name!r}"
    raise ValueError(
        f"{type_name} has {wanted}; give stack= the name of one of: {', '.join(candidates)}; or the blocks, as "
        "layers=[model.first, model.second]"
    )


def _stacks(module: nn.Module, prefix: str, callers: tuple[nn.Module, ...]) -> Iterator[Stack]:
    """Stacks of blocks below ``module``, without stacks inside the blocks of another stack."""
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        if _is_list(child):
            blocks = list(child.children())
            if blocks:
                yield Stack(name, callers, blocks)
        else:
            yield from _stacks(child, f"{name}.", _with_child(callers, child))


def callers_of(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, ...]:
    """``Stack.callers`` of the modules of these names, which need be in no list."""
    callers: tuple[nn.Module, ...] = (model,)
    module = model
    paths = [name.split(".")[:-1] for name in names]
    for part, *_ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)):
        module = getattr(module, part)
        if _is_list(module):  # a block has no mask of the tokens
            break
        callers = _with_child(callers, module)
    return callers


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) or (
        isinstance(module, nn.ModuleDict) and all(key.isdecimal() for key in module)
    )


def _with_child(callers: tuple[nn.Module, ...], child: nn.Module) -> tuple[nn.Module, ...]:
    # Lists and dicts of modules have no forward, and what is within a PreTrainedModel need not keep its names.
    is_called = inspect.getattr_static(type(child), "forward", None) is not nn.Module.forward
    is_owner = is_pretrained(child) or (has_tokens_of_its_own(child) and not is_pretrained(callers[-1]))
    return (*callers, child) if is_owner or (is_called and not has_tokens_of_its_own(callers[-1])) else callers


def has_tokens_of_its_own(module: nn.Module) -> bool:
    """Whether the module is one of those that are given a mask for their tokens, or none."""
    return is_pretrained(module) or isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder)


def is_pretrained(module: nn.Module) -> bool:
    """Whether ``module`` is a ``PreTrainedModel`` of Hugging Face's transformers, found by name without the import."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def layer_numbers(layers: Any, count: int) -> list[int]:
    """Numbers of the chosen among ``count`` layers, counted from 1, ascending."""
    half = max(count // 2, 1)
    named = {
        "all": range(1, count + 1),
        "last": range(count, count + 1),
        "early_half": range(1, half + 1),
        "late_half": range(count - half + 1, count + 1),
    }
    if isinstance(layers, str):
        if layers in named:
            return list(named[layers])
    elif all(isinstance(k, Integral) and not isinstance(k, bool) and 1 <= int(k) <= count for k in layers):
        return sorted({int(k) for k in layers})
    raise ValueError(
        f"layers must be 'all', 'last', 'early_half', 'late_half', a list of numbers from 1 to {count}, or of modules, "
        f"got {layers!r}"
    )


def hidden_states_of(output: Any, name: str) -> Tensor:
    """First of a block's outputs; ``name`` is the block's name, for the error."""
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    elif isinstance(output, tuple | list):
        first = output[0] if output else None
    if not isinstance(first, Tensor):
        raise TypeError(
            f"{name} returned {type(output).__name__}; hidden states are read from a block that "
            "returns a tensor, or a tuple, list or mapping that begins with one. Give layers= a list of modules that do"
        )
    return first
