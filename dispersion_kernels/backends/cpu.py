"""The CPU kernel (``csrc/cpu``) through ``ctypes``: a call computes the loss of each sequence and its gradient.

The package's library ``_native_cpu`` has a plain C interface and does not link against PyTorch, so one build serves
every PyTorch and Python version. It runs on PyTorch's threads: ``torch_parallel_for`` is looked up in ``libtorch_cpu``
and passed as a pointer; where it is absent (PyTorch before 2.10) a call runs on one thread.

Importing this module loads nothing. :func:`unavailable_reason` says in words why the kernel cannot be used.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dispersion_kernels.backends.interface import Losses, joined_scales
from dispersion_kernels.numerics import loss_weight
from dispersion_kernels.potentials import Potential
from dispersion_kernels.segments import host_segments

__all__ = [
    "COSINE_BINS",
    "LARGEST_BLOCK",
    "PARAMETERS",
    "build_info",
    "cosines",
    "dispersion",
    "isa",
    "moments",
    "row_stride",
    "run",
    "sampled",
    "scaled",
    "unavailable_reason",
]

#: Names of each potential's parameters, in the order of the C interface (``params`` of ``dk_args``).
PARAMETERS: dict[str, tuple[str, ...]] = {
    "angular_spread": ("tau", "clamp", "eps"),
    "orthogonalization": ("margin", "clamp", "eps"),
    "decorrelation": (),
    "uniformity": ("t",),
    "l2_repel": ("tau", "eps", "norm_weight", "include_diagonal"),
    "dispersive_l2": ("tau", "include_diagonal"),
}

#: Number of bins of :func:`cosines`.
COSINE_BINS = 200
#: Most tokens of a block of :func:`sampled`.
LARGEST_BLOCK = 256

_ABI_VERSION = 9
_POTENTIALS = {name: number for number, name in enumerate(PARAMETERS)}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ISAS = {"": 0, "avx2": 1, "avx512": 2, "neon": 3}
_STATUS = {
    1: "an argument is out of range (segments must be ascending, disjoint and within the tokens)",
    2: "out of memory for the workspace",
    3: "this processor lacks the instructions the library was built for",
}


def unavailable_reason() -> str | None:
    """Reason, in words, why the CPU kernel cannot be used here; None if it can."""
    return _unavailable_reason(_requested_isa())


def isa() -> str:
    """Instruction set of a call made now: ``"avx2"``, ``"avx512"`` or ``"neon"``; ``""`` if the kernel is unavailable.

    The environment variable ``DISPERSION_KERNELS_CPU_ISA`` forces one; it is read at every call.
    """
    if unavailable_reason() is not None:
        return ""
    resolved = _library().dk_resolve_isa(_ISAS[_requested_isa()])
    return next(name for name, number in _ISAS.items() if number == resolved)


def _requested_isa() -> str:
    return os.environ.get("DISPERSION_KERNELS_CPU_ISA", "")


@functools.cache
def _unavailable_reason(requested: str) -> str | None:
    library = _library()
    if isinstance(library, str):
        return library
    if requested not in _ISAS:
        return f"DISPERSION_KERNELS_CPU_ISA={requested!r} is not one of avx2, avx512, neon"
    if not library.dk_resolve_isa(_ISAS[requested]):
        wanted = requested or "AVX2 with FMA, AVX-512 or NEON"
        return f"this processor, or this build of the library, lacks {wanted}"
    return None


@functools.cache
def build_info() -> dict[str, Any]:
    """Record that ``setup.py`` left of the build: ``native`` (bool), ``reason``, ``compiler``, ``isas``."""
    path = Path(__file__).parents[1] / "_build_info.json"
    if not path.is_file():
        return {"native": False, "reason": "the CPU kernel was not built: run `pip install -e .`"}
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return info


def run(
    layers: Sequence[Tensor],
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    potential: Potential,
    reduction: str,
    with_grad: Sequence[bool],
    max_seqlen: int | None = None,
) -> Losses:
    """:class:`~dispersion_kernels.backends.interface.Run` of the kernel."""
    batch, length, _ = layers[0].shape
    runs = host_segments(batch, length, pair_ids, None if cu_seqlens is None else cu_seqlens.cpu())
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    weight = float(loss_weight(len(layers), reduction, runs.sequences_with_pairs))
    results = [
        dispersion(
            z.contiguous() if row_stride(z) is None else z,
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
        for z, need_grad in zip(layers, with_grad, strict=True)
    ]
    losses, grads, scales = zip(*results, strict=True)
    total = losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)
    return total.float(), grads, joined_scales(scales)


def dispersion(
    z: torch.Tensor,
    *,
    potential_name: str,
    params: Sequence[float],
    begins: torch.Tensor,
    ends: torch.Tensor,
    sequence: torch.Tensor,
    num_sequences: int,
    index: torch.Tensor | None = None,
    weight: float = 1.0,
    need_grad: bool,
    total: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    r"""Loss of each sequence and, if asked, its gradient :math:`\partial\ell_s / \partial z`.

    Token ``i`` is row ``index[i]`` of the flattened ``z`` (row ``i`` without an index). Segment ``k`` is the range
    ``begins[k] <= i < ends[k]``; tokens pair only within a segment, and its pairs count towards sequence
    ``sequence[k]``. Segments of fewer than two tokens have no pair: their tokens get a zero gradient and do not
    enter ``l2_repel``'s mean of squares.

    Args:
        z: hidden states ``[..., F]``, CPU, float32, bfloat16 or float16, with a :func:`row_stride`.
        potential_name: a key of :data:`PARAMETERS`.
        params: the values of that potential's parameters, in the order of :data:`PARAMETERS`.
        begins: first token of each segment, ``[segments]`` int64, CPU, ascending; segments must not overlap.
        ends: end of each segment, ``[segments]`` int64, CPU.
        sequence: sequence of each segment, ``[segments]`` int64, CPU, non-decreasing, below ``num_sequences``.
        num_sequences: the number of losses.
        index: row of each token, ``[tokens]`` int64, CPU, without repetitions; None for all rows in their order.
        weight: factor of every loss and of its gradient.
        need_grad: whether to compute the gradient (three times the arithmetic of the loss alone).
        total: whether to return the sum of the losses, float32 ``[]``, in place of the losses.

    Returns:
        The losses, float64 ``[num_sequences]``, 0 for a sequence without a pair, NaN if a paired token holds a NaN
        or an infinity; ``grad``, float32 of the shape of ``z``, and ``scale``, float32 of that shape without F. The
        product of ``grad`` and ``scale``, row by row, is the gradient of every sequence's own loss; both are None
        without ``need_grad``.

    Raises:
        RuntimeError: if the kernel is unavailable (:func:`unavailable_reason`) or the call fails.
        ValueError: if an argument has the wrong type, shape or layout.
    """
    requested = _available_isa()
    values = _values(potential_name, params)
    stride = row_stride(z) if z.dim() >= 2 else None
    if stride is None or not z.is_cpu or z.dtype not in _DTYPES:
        raise ValueError(
            "z must be a float32, bfloat16 or float16 CPU tensor [..., F] with contiguous features and evenly spaced "
            "rows, "
            f"got {z.dtype} {tuple(z.shape)} with strides {z.stride()} on {z.device}"
        )
    begins, ends, sequence = (
        _int64_list(name, tensor) for name, tensor in (("begins", begins), ("ends", ends), ("sequence", sequence))
    )
    if not begins.numel() == ends.numel() == sequence.numel():
        raise ValueError("begins, ends and sequence must have one entry per segment")
    shape = z.shape
    features = shape[-1]
    rows = math.prod(shape[:-1])
    if index is not None:
        index = _int64_list("index", index)
    tokens = rows if index is None else index.numel()

    if total:
        loss = torch.empty((), dtype=torch.float32, device="cpu")
    else:
        loss = torch.empty(num_sequences, dtype=torch.float64, device="cpu")
    grad = scale = None
    if need_grad:
        # The kernel writes the gradient of every indexed row, so only a gather leaves rows to be zeroed here.
        allocate = torch.empty if index is None else torch.zeros
        grad = allocate(shape, dtype=torch.float32, device="cpu")
        scale = allocate(shape[:-1], dtype=torch.float32, device="cpu")

    args = _Args(
        *_call(requested, z.dtype),
        z=z.data_ptr(),
        row_stride=stride,
        rows=rows,
        index=None if index is None else index.data_ptr(),
        tokens=tokens,
        features=features,
        begins=begins.data_ptr(),
        ends=ends.data_ptr(),
        sequence=sequence.data_ptr(),
        segments=begins.numel(),
        sequences=num_sequences,
        potential=_POTENTIALS[potential_name],
        params=ctypes.addressof(values),
        weight=weight,
        grad=None if grad is None else grad.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        loss=None if total else loss.data_ptr(),
        total=loss.data_ptr() if total else None,
    )
    _check(_library().dk_dispersion(ctypes.byref(args)))
    return loss, grad, scale


def sampled(
    layers: Sequence[torch.Tensor],
    *,
    potential_name: str,
    params: Sequence[float],
    order: torch.Tensor | None,
    populations: torch.Tensor,
    blocks: torch.Tensor | None,
    inverse_probability: torch.Tensor,
    sequence: torch.Tensor,
    pairs: torch.Tensor,
    draws: torch.Tensor | None,
    gradient: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient from the pairs within blocks and a model of all others (:mod:`dispersion_kernels.sampling`).

    Tokens are read in place, and nothing of their size is written but the gradient. Token ``i`` is row ``order[i]``
    (row ``i`` without an order), counted through all layers.

    Args:
        layers: hidden states ``[..., F]``, alike: CPU, float32, bfloat16 or float16, with the same
            :func:`row_stride`.
        potential_name: a key of :data:`PARAMETERS`, of a potential of the cosine or the correlation whose exponents
            need no running maximum.
        params: the values of that potential's parameters, in the order of :data:`PARAMETERS`.
        order: row of each token, ``[tokens]`` int64, without repetitions; or None.
        populations: bounds of the populations, ``[populations + 1]`` int64, ascending; the tokens of a population
            are of one layer and pair with each other.
        blocks: bounds of the blocks, ``[blocks + 1]`` int64, ascending through all populations; a block has at most
            :data:`LARGEST_BLOCK` tokens, and all its pairs are evaluated. None: no pair is evaluated.
        inverse_probability: 1 / the probability that a pair is evaluated, ``[populations]`` float64.
        sequence: sequence whose loss a population's pairs belong to, ``[populations]`` int64; every layer has the
            same number of sequences.
        pairs: number of ordered pairs, evaluated or not, ``[sequences]`` int64.
        draws: random numbers in [0, 1), ``[layers, groups, 1 + tokens]`` float32: for each group a population and
            tokens of it, to whose pairs the model is fitted; None: no model.
        gradient: outputs for the two factors of the gradient of every sequence's own loss, contiguous float32
            ``[layers, ..., F]`` and the same without F; None for no gradient.

    Returns:
        The losses, float64 ``[sequences]``, 0 without a pair, NaN if a token is not finite; and, float64
        ``[sequences]``, the factor of ``sum_j slope(c_ij) x_j`` in their derivatives by ``x_i``.

    Raises:
        RuntimeError: if the kernel is unavailable (:func:`unavailable_reason`) or the call fails.
        ValueError: if an argument has the wrong type, shape or layout.
    """
    requested = _available_isa()
    values = _values(potential_name, params)
    first = layers[0]
    stride = row_stride(first)
    if stride is None or first.dtype not in _DTYPES:
        raise ValueError(
            "layers must be float32, bfloat16 or float16 [..., F] with contiguous features and evenly spaced rows, "
            f"got {first.dtype} {tuple(first.shape)} with strides {first.stride()}"
        )
    for n, z in enumerate(layers):
        if not z.is_cpu or z.shape != first.shape or z.dtype != first.dtype or row_stride(z) != stride:
            raise ValueError(
                f"layers must be alike and on the CPU; layer {n} is {z.dtype} {tuple(z.shape)} with strides "
                f"{z.stride()} on {z.device}, the first {first.dtype} {tuple(first.shape)} with {first.stride()}"
            )
    rows, features = math.prod(first.shape[:-1]), first.shape[-1]
    # Tensors that the library reads through their addresses are bound to names, so that they live as long as the call.
    order, blocks = (
        tensor if tensor is None else _int64_list(name, tensor)
        for name, tensor in (("order", order), ("blocks", blocks))
    )
    populations, sequence, pairs = (
        _int64_list(name, tensor)
        for name, tensor in (("populations", populations), ("sequence", sequence), ("pairs", pairs))
    )
    inverse_probability = inverse_probability.to("cpu", torch.float64).contiguous()
    draws = None if draws is None else draws.to("cpu", torch.float32).contiguous()
    loss, per_pair = (torch.empty(pairs.numel(), dtype=torch.float64, device="cpu") for _ in range(2))
    grad, scale = (None, None) if gradient is None else gradient
    if grad is not None and scale is not None:
        if (grad.shape, scale.shape) != ((len(layers), *first.shape), grad.shape[:-1]) or not grad.is_contiguous():
            raise ValueError(
                f"gradient must be contiguous, {(len(layers), *first.shape)} and the same without the last, got "
                f"{tuple(grad.shape)} and {tuple(scale.shape)}"
            )
        if int(populations[-1]) < scale.numel():  # the kernel leaves the rows that are in no population
            grad.zero_()
            scale.zero_()
    pointers = _addresses(layers)
    args = _SampledArgs(
        *_call(requested, first.dtype),
        layers=ctypes.addressof(pointers),
        layer_count=len(layers),
        rows=rows,
        row_stride=stride,
        features=features,
        order=None if order is None else order.data_ptr(),
        tokens=rows * len(layers) if order is None else order.numel(),
        populations=populations.data_ptr(),
        population_count=populations.numel() - 1,
        blocks=None if blocks is None else blocks.data_ptr(),
        block_count=0 if blocks is None else blocks.numel() - 1,
        inverse_probability=inverse_probability.data_ptr(),
        sequence=sequence.data_ptr(),
        pairs=pairs.data_ptr(),
        sequence_count=pairs.numel(),
        params=ctypes.addressof(values),
        potential=_POTENTIALS[potential_name],
        draws=None if draws is None else draws.data_ptr(),
        fit_groups=0 if draws is None else draws.shape[1],
        fit_tokens=0 if draws is None else draws.shape[2] - 1,
        loss=loss.data_ptr(),
        per_pair=per_pair.data_ptr(),
        grad=None if grad is None else grad.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
    )
    _check(_library().dk_sampled(ctypes.byref(args)))
    return loss, per_pair


def cosines(
    z: torch.Tensor, order: torch.Tensor, begins: torch.Tensor, splits: torch.Tensor, ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Histograms and sums of the cosines over the pairs i < j of each text's tokens, the same bits for any number of
    threads. Part 0 has the pairs whose token i is before the text's split, part 1 all others.

    Args:
        z: hidden states ``[rows, F]``, CPU, float32, bfloat16 or float16, with a :func:`row_stride`.
        order: row of each token, ``[tokens]`` int64, CPU.
        begins, splits, ends: a text's tokens are ``begins[k] <= i < ends[k]``, ``[texts]`` int64, CPU, ascending and
            disjoint; ``begins[k] <= splits[k] <= ends[k]``.

    Returns:
        Counts, int64 ``[texts, 2, COSINE_BINS]``, in equal bins over [-1, 1]; and sums of the cosines and of their
        squares, float64 ``[texts, 2, 2]``, NaN for a text of two or more tokens, one of which is not finite.

    Raises:
        RuntimeError: if the kernel is unavailable (:func:`unavailable_reason`) or the call fails.
        ValueError: if an argument has the wrong type, shape or layout.
    """
    requested = _available_isa()
    stride = _matrix_stride(z)
    names = ("order", "begins", "splits", "ends")
    order, begins, splits, ends = map(_int64_list, names, (order, begins, splits, ends))
    if not begins.numel() == splits.numel() == ends.numel():
        raise ValueError("begins, splits and ends must have one entry per text")
    counts = torch.empty(begins.numel(), 2, COSINE_BINS, dtype=torch.int64, device="cpu")
    sums = torch.empty(begins.numel(), 2, 2, dtype=torch.float64, device="cpu")
    args = _CosinesArgs(
        *_call(requested, z.dtype),
        z=z.data_ptr(),
        row_stride=stride,
        rows=z.shape[0],
        order=order.data_ptr(),
        tokens=order.numel(),
        features=z.shape[1],
        begins=begins.data_ptr(),
        splits=splits.data_ptr(),
        ends=ends.data_ptr(),
        texts=begins.numel(),
        counts=counts.data_ptr(),
        sums=sums.data_ptr(),
    )
    _check(_library().dk_cosines(ctypes.byref(args)))
    return counts, sums


def moments(
    z: torch.Tensor, order: torch.Tensor, shift: torch.Tensor, total: torch.Tensor, blocks: Sequence[torch.Tensor]
) -> float:
    """Sum of the tokens' norms ``|z|``; sums of ``x = z - shift`` and ``x x^T`` over the tokens are added to ``total``
    and ``blocks``. The same bits for any number of threads. Sums over some hundred tokens are fp32, all others fp64.

    Args:
        z: hidden states ``[rows, F]``, CPU, float32, bfloat16 or float16, with a :func:`row_stride`.
        order: row of each token, ``[tokens]`` int64, CPU.
        shift: ``[F]`` float32, contiguous, CPU.
        total: ``[F]`` float64, contiguous, CPU.
        blocks: the part of the matrix ``[F, F]`` on and above the diagonal: block n has the rows from n R on, of which
            there are R (the last block may have fewer), and the columns from n R on, ``[R, F - n R]`` float64,
            contiguous, CPU.

    Raises:
        RuntimeError: if the kernel is unavailable (:func:`unavailable_reason`) or the call fails.
        ValueError: if an argument has the wrong type, shape or layout.
    """
    requested = _available_isa()
    stride = _matrix_stride(z)
    order, features, height = _int64_list("order", order), z.shape[1], len(blocks[0]) if blocks else 0
    if height == 0:
        raise ValueError(f"blocks must be one or more matrices of one or more rows, got {len(blocks)} of none")
    if len(blocks) != math.ceil(features / height):
        raise ValueError(f"blocks of {height} rows must be {math.ceil(features / height)}, got {len(blocks)}")
    expected: list[tuple[str, torch.Tensor, torch.dtype, tuple[int, ...]]]
    expected = [("shift", shift, torch.float32, (features,)), ("total", total, torch.float64, (features,))]
    for number, block in enumerate(blocks):
        left = features - number * height
        expected.append((f"blocks[{number}]", block, torch.float64, (min(height, left), left)))
    for name, tensor, dtype, shape in expected:
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, {dtype}, {shape} and on the CPU, "
                f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
    norms, pointers = ctypes.c_double(0.0), _addresses(blocks)
    args = _MomentsArgs(
        *_call(requested, z.dtype),
        z=z.data_ptr(),
        row_stride=stride,
        rows=z.shape[0],
        order=order.data_ptr(),
        tokens=order.numel(),
        features=features,
        shift=shift.data_ptr(),
        block_rows=height,
        total=total.data_ptr(),
        blocks=ctypes.addressof(pointers),
        norms=ctypes.addressof(norms),
    )
    _check(_library().dk_moments(ctypes.byref(args)))
    return norms.value


def _matrix_stride(z: torch.Tensor) -> int:
    """:func:`row_stride` of hidden states ``[rows, F]`` that the kernel takes; an error says what it takes."""
    stride = row_stride(z) if z.dim() == 2 else None
    if stride is None or not z.is_cpu or z.dtype not in _DTYPES:
        raise ValueError(
            "z must be a float32, bfloat16 or float16 CPU tensor [rows, F] with contiguous features, "
            f"got {z.dtype} {tuple(z.shape)} with strides {z.stride()} on {z.device}"
        )
    return stride


def row_stride(z: torch.Tensor) -> int | None:
    """Distance, in elements, between consecutive rows of the flattened ``z`` ``[..., F]``; None if it is not the same
    everywhere or the features are not contiguous."""
    if z.is_contiguous():
        return z.shape[-1]
    sizes, strides = z.shape, z.stride()
    if sizes[-1] > 1 and strides[-1] != 1:
        return None
    evenly = all(strides[d] == strides[d + 1] * sizes[d + 1] for d in range(z.dim() - 2))
    return strides[-2] if evenly else None


def scaled(
    grads: Sequence[torch.Tensor | None],
    scale: torch.Tensor,
    factor: torch.Tensor,
    dtype: torch.dtype,
    *,
    in_place: bool = False,
) -> list[torch.Tensor | None]:
    """Product ``grad * (scale * factor)`` for each layer, row by row, rounded once, to ``dtype``.

    Args:
        grads: gradient of each layer, float32 ``[..., F]``, CPU, contiguous, alike; or None, which stays None.
        scale: factor of each row, float32 ``[layers, ...]``, CPU, contiguous.
        factor: one factor for all rows, float32 ``[]``; or ``[n]``, one for each n-th of a layer's rows, with n = 0
            if there are no rows. CPU, contiguous.
        dtype: dtype of the results, float32, bfloat16 or float16.
        in_place: whether ``grads`` may be overwritten; they are if ``dtype`` is float32.

    Raises:
        RuntimeError: if the kernel is unavailable (:func:`unavailable_reason`).
        ValueError: if an argument has the wrong type, shape or layout.
    """
    requested = _available_isa()
    present = [grad for grad in grads if grad is not None]
    for name, tensor in (*(("grads", grad) for grad in present), ("scale", scale), ("factor", factor)):
        if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous, float32 and on the CPU, "
                f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
            )
    shape, factors = scale.shape[1:], factor.numel()
    rows = shape.numel()
    fits = len(grads) == len(scale) and all(grad.shape == (*shape, present[0].shape[-1]) for grad in present)
    if not fits or dtype not in _DTYPES or (rows % factors if factors else rows):
        shapes = [None if grad is None else tuple(grad.shape) for grad in grads]
        raise ValueError(
            "grads must be layers of [..., F], scale [layers, ...], factor [] or [n] with n a divisor of the rows and "
            f"dtype float32, bfloat16 or float16, got {shapes}, {tuple(scale.shape)}, {tuple(factor.shape)} and {dtype}"
        )
    if not present:
        return list(grads)
    new = not in_place or dtype != torch.float32
    out = [torch.empty_like(grad, dtype=dtype) if new and grad is not None else grad for grad in grads]
    from_grads, to_out = _addresses(grads), _addresses(out)
    args = _ScaleArgs(
        *_call(requested, dtype),
        grads=ctypes.addressof(from_grads),
        scale=scale.data_ptr(),
        factor=factor.data_ptr(),
        layer_count=len(grads),
        rows=rows,
        features=present[0].shape[-1],
        rows_per_factor=max(1, rows // max(1, factors)),
        out=ctypes.addressof(to_out),
    )
    _check(_library().dk_scale(ctypes.byref(args)))
    return out


def _addresses(tensors: Sequence[torch.Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """Addresses of the tensors, in an array that must live as long as the call."""
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def _available_isa() -> str:
    requested = _requested_isa()
    reason = _unavailable_reason(requested)
    if reason is not None:
        raise RuntimeError(f"the CPU kernel is unavailable: {reason}")
    return requested


def _values(potential_name: str, params: Sequence[float]) -> ctypes.Array[ctypes.c_double]:
    """Values of the parameters, in an array that must live as long as the call."""
    if potential_name not in PARAMETERS:
        raise ValueError(f"potential_name must be one of {', '.join(PARAMETERS)}, got {potential_name!r}")
    if len(params) != len(PARAMETERS[potential_name]):
        raise ValueError(f"{potential_name} takes the parameters {PARAMETERS[potential_name]}, got {tuple(params)}")
    return (ctypes.c_double * max(len(params), 1))(*params)


def _call(requested: str, dtype: torch.dtype) -> tuple[int, int, int | None, int, int]:
    """Values of the fields of :class:`_Call`."""
    return _ABI_VERSION, _ISAS[requested], _torch_parallel_for(), torch.get_num_threads(), _DTYPES[dtype]


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the CPU kernel failed: {_STATUS.get(status, f'status {status}')}")


class _Call(ctypes.Structure):
    """Common first fields of ``dk_args`` and the arguments of the other calls of ``csrc/cpu/dispersion.h``."""

    _fields_ = [
        ("abi_version", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("parallel_for", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class _Args(_Call):
    """Fields of ``dk_args`` of ``csrc/cpu/dispersion.h`` after those of :class:`_Call`."""

    _fields_ = [
        ("z", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("begins", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("sequence", ctypes.c_void_p),
        ("segments", ctypes.c_int64),
        ("sequences", ctypes.c_int64),
        ("params", ctypes.c_void_p),
        ("weight", ctypes.c_double),
        ("potential", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("grad", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
    ]


class _SampledArgs(_Call):
    """Fields of ``dk_sampled_args`` of ``csrc/cpu/dispersion.h`` after those of :class:`_Call`."""

    _fields_ = [
        ("layers", ctypes.c_void_p),
        ("layer_count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("populations", ctypes.c_void_p),
        ("population_count", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
        ("block_count", ctypes.c_int64),
        ("inverse_probability", ctypes.c_void_p),
        ("sequence", ctypes.c_void_p),
        ("pairs", ctypes.c_void_p),
        ("sequence_count", ctypes.c_int64),
        ("params", ctypes.c_void_p),
        ("potential", ctypes.c_int32),
        ("fit_groups", ctypes.c_int32),
        ("fit_tokens", ctypes.c_int32),
        ("draws", ctypes.c_void_p),
        ("loss", ctypes.c_void_p),
        ("per_pair", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
    ]


class _TokensCall(_Call):
    """Fields after those of :class:`_Call` that ``dk_cosines_args`` and ``dk_moments_args`` have in common."""

    _fields_ = [
        ("z", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("order", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("features", ctypes.c_int64),
    ]


class _CosinesArgs(_TokensCall):
    """Fields of ``dk_cosines_args`` of ``csrc/cpu/dispersion.h`` after those of :class:`_TokensCall`."""

    _fields_ = [
        ("begins", ctypes.c_void_p),
        ("splits", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("texts", ctypes.c_int64),
        ("counts", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
    ]


class _MomentsArgs(_TokensCall):
    """Fields of ``dk_moments_args`` of ``csrc/cpu/dispersion.h`` after those of :class:`_TokensCall`."""

    _fields_ = [
        ("shift", ctypes.c_void_p),
        ("block_rows", ctypes.c_int64),
        ("total", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("norms", ctypes.c_void_p),
    ]


class _ScaleArgs(_Call):
    """Fields of ``dk_scale_args`` of ``csrc/cpu/dispersion.h`` after those of :class:`_Call`."""

    _fields_ = [
        ("grads", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("layer_count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("rows_per_factor", ctypes.c_int64),
        ("out", ctypes.c_void_p),
    ]


def _int64_list(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.int64 or tensor.dim() != 1 or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be a one-dimensional int64 CPU tensor, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.contiguous()


@functools.cache
def _library() -> Any:
    """The loaded library, or the reason, in words, why there is none."""
    info = build_info()
    if not info.get("native"):
        return str(info.get("reason", "the package was built without the CPU kernel"))
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = Path(__file__).parents[1] / f"_native_cpu{suffix}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} cannot be loaded: {error}"
    library.dk_abi_version.restype = ctypes.c_int32
    version = library.dk_abi_version()
    if version != _ABI_VERSION:
        return f"{path} has interface version {version}, this package needs {_ABI_VERSION}: reinstall it"
    library.dk_resolve_isa.restype = ctypes.c_int32
    library.dk_resolve_isa.argtypes = [ctypes.c_int32]
    library.dk_dispersion.restype = ctypes.c_int32
    library.dk_dispersion.argtypes = [ctypes.POINTER(_Args)]
    library.dk_sampled.restype = ctypes.c_int32
    library.dk_sampled.argtypes = [ctypes.POINTER(_SampledArgs)]
    library.dk_cosines.restype = ctypes.c_int32
    library.dk_cosines.argtypes = [ctypes.POINTER(_CosinesArgs)]
    library.dk_moments.restype = ctypes.c_int32
    library.dk_moments.argtypes = [ctypes.POINTER(_MomentsArgs)]
    library.dk_scale.restype = ctypes.c_int32
    library.dk_scale.argtypes = [ctypes.POINTER(_ScaleArgs)]
    return library


@functools.cache
def _torch_parallel_for() -> int | None:
    """Address of PyTorch's ``torch_parallel_for``, or None where this PyTorch does not export it."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(sys.platform, "libtorch_cpu.so")
    try:
        function = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value
