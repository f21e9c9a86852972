"""Stack of blocks in anybody's model, and the hidden states in a block's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn


class Stack(NamedTuple):
    name: str
    owner: nn.Module
    """Module whose arguments select the tokens."""
    blocks: list[nn.Module]


def find_stack(model: nn.Module, name: str | None) -> Stack:
    stacks = list(_stacks(model, "", model))
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


def _stacks(module: nn.Module, prefix: str, owner: nn.Module) -> Iterator[Stack]:
    """Stacks of blocks below ``module``, without stacks inside the blocks of another stack."""
    for key, child in module.named_children():
        name = f"{prefix}{key}"
        is_list = isinstance(child, nn.ModuleList) or (
            isinstance(child, nn.ModuleDict) and all(key.isdecimal() for key in child)
        )
        if is_list:
            blocks = list(child.children())
            if blocks:
                yield Stack(name, owner, blocks)
        else:
            yield from _stacks(child, f"{name}.", child if is_pretrained(child) or not is_pretrained(owner) else owner)


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
    elif all(isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= count for k in layers):
        return sorted(set(layers))
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
