"""Checks of the types and values of arguments, with errors that name the argument, what it got, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def layers_of(z: Any, name: str = "z") -> list[Tensor]:
    """List of the hidden states of each layer: ``[z]`` for a tensor, the elements for an iterable of tensors."""
    if isinstance(z, Tensor):
        return [z]
    remedy = _remedy(z, name)
    if remedy is None and not isinstance(z, str | bytes | nn.Module) and isinstance(z, Iterable):
        layers = list(z)
        for number, layer in enumerate(layers):
            if not isinstance(layer, Tensor):
                remedy = _remedy(layer, f"{name}[{number}]") or "stack what is nested, or flatten the list"
                raise TypeError(
                    f"{name} must be a tensor or a list of tensors, one a layer, and {name}[{number}] is "
                    f"{_kind(layer)}; {remedy}"
                )
        if not layers:
            raise ValueError(f"{name} is an empty list; it must hold the hidden states of at least one layer")
        return layers
    raise TypeError(
        f"{name} must be a tensor or a list of tensors, one a layer, got {_kind(z)}; "
        f"{remedy or 'give hidden states [B, L, F]'}"
    )


def _remedy(value: Any, name: str) -> str | None:
    """Remedy for a ``value`` that is often given by mistake; None where none is known."""
    if value is None:
        return "a Hugging Face model returns hidden_states with output_hidden_states=True alone"
    if isinstance(value, Mapping):
        if "hidden_states" in value or hasattr(value, "hidden_states"):
            return f"of a model's output give the hidden states: {name}=output.hidden_states[1:-1]"
        return (
            "of a model's output give output.hidden_states, from a call with output_hidden_states=True, and of a dict "
            "of tensors list(tensors.values())"
        )
    if hasattr(value, "__array__"):
        return f"give torch.from_numpy({name})"
    return None


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_tensor(name: str, value: Any, wanted: str, remedy: str) -> None:
    """Raises where ``value`` is no tensor; ``wanted`` describes the tensor for the message, as "boolean [B, L]"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, {wanted}, got {_kind(value)}; {remedy}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_generator(generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r}; for a seed give "
            "torch.Generator(z.device).manual_seed(seed)"
        )


def check_number(name: str, value: Any) -> None:
    """Raises where ``value`` is neither a number of Python or NumPy nor a 0-dimensional tensor without gradient."""
    if not isinstance(value, int | float) and (
        not hasattr(value, "__float__") or getattr(value, "ndim", 0) != 0 or getattr(value, "is_meta", False)
    ):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be a float or an integer of 64 bits, got {value}; give {float(value):g}")
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name} must be a number, got a tensor that requires a gradient (tau, t and sigma2 of the "
            f"built-in potentials have one); give float({name})"
        )


def check_choice(name: str, value: Any, available: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in available:
        raise ValueError(f"unknown {name} {value!r}; available: {', '.join(available)}")


def beside(tensor: Tensor | None, layer: Tensor, first: Tensor) -> Tensor | None:
    """``tensor``, given on the device of the ``first`` layer, copied to the device of ``layer`` where that differs."""
    moves = tensor is not None and layer.device != first.device and tensor.device == first.device
    return tensor.to(layer.device) if moves and tensor is not None else tensor


def refuse_tracing(impl: str) -> None:
    if impl != "reference" and not torch.compiler.is_compiling() and torch._C._is_tracing():
        raise RuntimeError(
            f"torch.jit.trace (or the older ONNX exporter, which traces) cannot record fused_dispersion_loss with "
            f"impl={impl!r}: its choices would be frozen into the graph. Trace the model without the loss, take "
            "torch.compile or torch.export, or give impl='reference'"
        )
