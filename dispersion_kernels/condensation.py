"""Measurement and plot of embedding condensation: the mean pairwise cosine of the tokens, layer by layer.

In small language models the embeddings of a sequence's tokens gather in a narrow cone, the more so the deeper the
layer. Liu et al., "Dispersion loss counteracts embedding condensation and improves generalization in small language
models" (ICML 2026, arXiv 2602.00217) measure it by the cosine of every pair of tokens, layer by layer.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dispersion_kernels.checks import beside, check_tensor, layers_of
from dispersion_kernels.numerics import token_norms

# Tokens normalised at a time; bounds the extra memory for sequences of any length.
CHUNK = 4096


@torch.no_grad()
def mean_pairwise_cosine(z: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean cosine over the pairs i != j of each sequence's tokens, averaged over the sequences; a scalar.

    With unit vectors ``x_i = z_i / |z_i|`` the sum over all pairs has a closed form::

        sum_{i != j} x_i . x_j = |sum_i x_i|^2 - sum_i |x_i|^2

    The mean over L (L - 1) pairs is therefore exact in O(L F) time, and its memory does not grow with L^2.
    A token of norm zero has cosine 0 with every other token.

    Args:
        z: hidden states, ``[B, L, F]`` or ``[L, F]``, any floating dtype.
        mask: boolean, ``[B, L]`` or ``[L]``; only tokens where ``mask`` is True take part.

    Returns:
        A scalar, float64 for float64 input and float32 otherwise. Sequences with fewer than two tokens do not count;
        the result is NaN where no sequence counts.

    Source: Liu et al., ICML 2026, arXiv 2602.00217 (the measure; the closed form is elementary).
    """
    check_tensor("z", z, "hidden states [B, L, F] or [L, F]", "of a list of layers, take condensation_by_layer")
    if z.layout != torch.strided or z.is_nested:
        raise TypeError("z must be a dense tensor, got a nested or sparse one")
    if z.ndim not in (2, 3) or not z.is_floating_point() or z.shape[-1] < 1:
        raise ValueError(f"z must be floating point of shape [B, L, F] or [L, F], got {z.dtype} {list(z.shape)}")
    if mask is not None:
        check_tensor("mask", mask, "boolean with one entry a token", "give torch.as_tensor(mask)")
        if mask.dtype != torch.bool or mask.shape != z.shape[:-1]:
            raise ValueError(
                f"mask must be boolean of shape {list(z.shape[:-1])}, as z without its features, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        if mask.device != z.device:
            raise ValueError(f"mask is on {mask.device}; it must be on {z.device}, with z")
    if z.ndim == 2:
        z, mask = z[None], None if mask is None else mask[None]

    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    total = z.new_zeros(z.shape[0], z.shape[2], dtype=dtype)
    squares = z.new_zeros(z.shape[0], dtype=dtype)
    for start in range(0, z.shape[1], CHUNK):
        x = z[:, start : start + CHUNK].to(dtype)
        if mask is not None:
            x = x.masked_fill(~mask[:, start : start + CHUNK, None], 0)
        norm = token_norms(x)
        x = x / norm.masked_fill(norm == 0, math.inf)
        total += x.sum(1)
        squares += x.square().sum((1, 2))
    tokens = torch.full_like(squares, z.shape[1]) if mask is None else mask.sum(1).to(dtype)
    pairs = tokens * (tokens - 1)
    mean = (total.square().sum(1) - squares) / pairs.clamp(min=1)
    counted = pairs > 0
    return mean.masked_fill(~counted, 0).sum() / counted.sum()


def condensation_by_layer(hidden: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """:func:`mean_pairwise_cosine` of every layer's hidden states, ``[layers]``, on the device of the first layer."""
    if isinstance(hidden, Tensor):
        raise TypeError(
            "hidden must be a list of tensors, one a layer, got one tensor; give [hidden] where it is one layer's, "
            "hidden.unbind() where its first dimension is the layers"
        )
    layers = layers_of(hidden, "hidden")
    first = layers[0]
    return torch.stack([mean_pairwise_cosine(z, mask=beside(mask, z, first)).to(first.device) for z in layers])


def _numbers(label: str, values: Iterable[float]) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise TypeError(f"curves[{label!r}] must be numbers, one a layer, got {values!r}") from error


# Okabe and Ito's palette, distinguishable in all common kinds of colour blindness; markers distinguish in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_condensation(
    curves: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    title: str = "Embedding condensation",
    dashed: Sequence[str] = (),
) -> Path:
    """Plots the mean pairwise cosine against the layer, one curve per label.

    Args:
        curves: map from a label to one mean pairwise cosine per layer, first layer first.
        path: file of the picture; its suffix selects the format, PNG without one. The picture is written under a
            temporary name and renamed, so that ``path`` never holds a part of it.
        title: title above the axes.
        dashed: labels of the curves drawn thin, grey and dashed, for states to compare with.

    Raises:
        ValueError: no curve, an empty curve, a label in ``dashed`` that is not in ``curves``, or an unknown format.
        TypeError: an argument of the wrong type.
        ModuleNotFoundError: matplotlib is missing.

    Source: Liu et al., ICML 2026, arXiv 2602.00217.
    """
    if not isinstance(curves, Mapping):
        raise TypeError(f"curves must map labels to one number a layer, got {curves!r}; as {{'model': cosines}}")
    curves = {label: _numbers(label, values) for label, values in curves.items()}
    if not curves or not all(curves.values()):
        raise ValueError("curves must hold at least one label with at least one layer")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a string or a path, got {path!r}")
    if isinstance(dashed, str) or not isinstance(dashed, Iterable):
        raise TypeError(f"dashed must be a list of labels, got {dashed!r}; give [{dashed!r}]")
    if unknown := set(dashed) - set(curves):
        raise ValueError(f"dashed names {sorted(unknown)}, curves has {list(curves)}")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'drawing needs matplotlib: pip install "dispersion-kernels[gpt2]"', name=error.name
        ) from error

    # A Figure without pyplot needs no display, changes no global state, and leaves no figure open.
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if (ending := Path(path).suffix.lstrip(".").lower() or "png") not in formats:
        raise ValueError(f"path ends in .{ending}, which is no format of a picture; available: {', '.join(formats)}")
    axes = figure.add_subplot()
    coloured = iter(zip(COLOURS * len(curves), MARKERS * len(curves), strict=True))
    for label, values in curves.items():
        layers = range(1, len(values) + 1)
        if label in dashed:
            axes.plot(layers, values, "--", color="0.55", linewidth=1.2, label=label)
        else:
            colour, marker = next(coloured)
            axes.plot(layers, values, color=colour, marker=marker, markersize=5, linewidth=2, label=label)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean pairwise cosine of the tokens")
    axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    every = [value for values in curves.values() for value in values]
    axes.set_ylim(min(0.0, 1.1 * min(every)), min(1.02, max(0.1, 1.25 * max(every))))
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=160, format=ending)
    os.replace(temporary, path)
    return path
