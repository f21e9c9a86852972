"""The CPU kernel: one call computes the loss of each sequence and its finished gradient.

The library beside this file has a plain C interface and does not link against PyTorch, so one build serves every
PyTorch and Python version. Its threads are PyTorch's own: ``torch_parallel_for`` is looked up in libtorch_cpu and
passed as a pointer; where it is absent (PyTorch before 2.10) the call runs on one thread.

Importing this module loads nothing. :func:`unavailable_reason` says in words why the kernel cannot be used.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["PARAMETERS", "build_info", "dispersion", "isa", "unavailable_reason"]

#: The parameters each potential takes, in the order of the C interface (``params`` of ``dk_args``).
PARAMETERS: dict[str, tuple[str, ...]] = {
    "angular_spread": ("tau", "clamp", "eps"),
    "orthogonalization": ("margin", "clamp", "eps"),
    "decorrelation": (),
    "uniformity": ("t",),
    "l2_repel": ("tau", "eps", "norm_weight", "include_diagonal"),
    "dispersive_l2": ("tau", "include_diagonal"),
}

_ABI_VERSION = 3
_POTENTIALS = {name: number for number, name in enumerate(PARAMETERS)}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ISAS = {"": 0, "avx2": 1, "avx512": 2, "neon": 3}
_STATUS = {
    1: "an argument is out of range (segments must be ascending, disjoint and within the tokens)",
    2: "out of memory for the workspace",
    3: "this processor lacks the instructions the library was built for",
}


def unavailable_reason() -> str | None:
    """Why the CPU kernel cannot be used here, in words; None if it can."""
    library = _library()
    if isinstance(library, str):
        return library
    requested = os.environ.get("DISPERSION_KERNELS_CPU_ISA", "")
    if requested not in _ISAS:
        return f"DISPERSION_KERNELS_CPU_ISA={requested!r} is not one of avx2, avx512, neon"
    if not library.dk_resolve_isa(_ISAS[requested]):
        wanted = requested or "AVX2 with FMA, AVX-512 or NEON"
        return f"this processor, or this build of the library, lacks {wanted}"
    return None


def isa() -> str:
    """The instruction set a call would use now: ``"avx2"``, ``"avx512"`` or ``"neon"``; ``""`` if unavailable.

    The environment variable ``DISPERSION_KERNELS_CPU_ISA`` forces one; it is read at every call.
    """
    if unavailable_reason() is not None:
        return ""
    resolved = _library().dk_resolve_isa(_ISAS[os.environ.get("DISPERSION_KERNELS_CPU_ISA", "")])
    return next(name for name, number in _ISAS.items() if number == resolved)


@functools.cache
def build_info() -> dict[str, Any]:
    """What setup.py recorded: ``native`` (bool), ``reason``, ``compiler``, ``isas``."""
    path = Path(__file__).with_name("_build_info.json")
    if not path.is_file():
        return {"native": False, "reason": "the CPU kernel was not built: run `pip install -e .`"}
    info: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return info


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
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    r"""Loss of each sequence and, if asked, its gradient :math:`\partial\ell_s / \partial z`.

    The sweep's token ``i`` is row ``index[i]`` of ``z`` (row ``i`` without an index). Segment ``k`` is the range
    ``begins[k] <= i < ends[k]``; tokens pair only within a segment, and its pairs count towards sequence
    ``sequence[k]``. Segments of fewer than two tokens have no pair: their tokens get a zero gradient and do not
    enter ``l2_repel``'s mean of squares.

    Args:
        z: ``[rows, F]``, CPU, float32, bfloat16 or float16, features contiguous, any row stride.
        potential_name: a key of :data:`PARAMETERS`.
        params: the values of that potential's parameters, in their order there.
        begins: ``[segments]`` int64, CPU, ascending; segments must not overlap.
        ends: ``[segments]`` int64, CPU.
        sequence: ``[segments]`` int64, CPU, non-decreasing, below ``num_sequences``.
        num_sequences: how many losses are returned.
        index: ``[tokens]`` int64, CPU, without repetitions, or None for all rows in their order.
        weight: a factor of every loss, and so of its gradient.
        need_grad: whether to compute the gradient (three times the arithmetic of the loss alone).

    Returns:
        The losses, float64 ``[num_sequences]``, 0 for a sequence without a pair, NaN where a paired token holds a
        NaN or an infinity; and, or None, float32 ``grad`` ``[rows, F]`` and ``scale`` ``[rows]``, whose product, row by
        row, is the gradient of every sequence's own loss.

    Raises:
        RuntimeError: if the kernel is unavailable (:func:`unavailable_reason`) or the call fails.
        ValueError: if an argument has the wrong type, shape or layout.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"the CPU kernel is unavailable: {reason}")
    if potential_name not in PARAMETERS:
        raise ValueError(f"potential_name must be one of {', '.join(PARAMETERS)}, got {potential_name!r}")
    if len(params) != len(PARAMETERS[potential_name]):
        raise ValueError(f"{potential_name} takes the parameters {PARAMETERS[potential_name]}, got {tuple(params)}")
    if z.dim() != 2 or z.device.type != "cpu" or z.dtype not in _DTYPES or (z.size(1) > 1 and z.stride(1) != 1):
        raise ValueError(
            "z must be a float32, bfloat16 or float16 CPU tensor [rows, F] with contiguous features, "
            f"got {z.dtype} {tuple(z.shape)} with strides {z.stride()} on {z.device}"
        )
    begins, ends, sequence = (
        _int64_list(name, tensor) for name, tensor in (("begins", begins), ("ends", ends), ("sequence", sequence))
    )
    if not begins.numel() == ends.numel() == sequence.numel():
        raise ValueError("begins, ends and sequence must have one entry per segment")
    rows, features = z.shape
    if index is not None:
        index = _int64_list("index", index)
    tokens = rows if index is None else index.numel()

    loss = torch.empty(num_sequences, dtype=torch.float64, device="cpu")
    grad = scale = None
    if need_grad:
        # The kernel writes the gradient of every indexed row, so only a gather leaves rows to be zeroed here.
        allocate = torch.empty if index is None else torch.zeros
        grad = allocate(rows, features, dtype=torch.float32, device="cpu")
        scale = allocate(rows, dtype=torch.float32, device="cpu")

    values = (ctypes.c_double * max(len(params), 1))(*params)
    args = _Args(
        abi_version=_ABI_VERSION,
        isa=_ISAS[os.environ.get("DISPERSION_KERNELS_CPU_ISA", "")],
        parallel_for=_torch_parallel_for(),
        threads=torch.get_num_threads(),
        dtype=_DTYPES[z.dtype],
        z=z.data_ptr(),
        row_stride=z.stride(0),
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
        loss=loss.data_ptr(),
    )
    status = _library().dk_dispersion(ctypes.byref(args))
    if status:
        raise RuntimeError(f"the CPU kernel failed: {_STATUS.get(status, f'status {status}')}")
    return loss, grad, scale


class _Args(ctypes.Structure):
    """``dk_args`` of csrc/cpu/dispersion.h, field by field."""

    _fields_ = [
        ("abi_version", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("parallel_for", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
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
    ]


def _int64_list(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.device.type != "cpu":
        raise ValueError(
            f"{name} must be a one-dimensional int64 CPU tensor, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    return tensor.contiguous()


@functools.cache
def _library() -> Any:
    """The loaded library, or the reason why there is none."""
    info = build_info()
    if not info.get("native"):
        return str(info.get("reason", "the package was built without the CPU kernel"))
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    path = Path(__file__).with_name(f"_native_cpu{suffix}")
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
