"""The CUDA C++ kernels (``csrc/cuda``) behind the launcher's interface.

The kernels need neither Triton nor a compiler at run time: all are compiled when the package is built, for the
architectures of ``TORCH_CUDA_ARCH_LIST``. The extension uses PyTorch's stable ABI alone, so one build serves several
versions of PyTorch. Importing this module loads nothing.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dispersion_kernels.backends.cpu import build_info
from dispersion_kernels.backends.gpu.launch import (
    BandProductCall,
    DiagonalCall,
    PairTilesCall,
    RowStatisticsCall,
    RowSweepCall,
    SequenceLossesCall,
    TokenGradientsCall,
    Tokens,
    fp32_precision,
    multiprocessors,
)

_TRANSFORMS = {"normalize": 0, "standardize": 1, "none": 2}
LIBRARY = Path(__file__).parents[1] / "_cuda.so"
_ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def unavailable_reason() -> str | None:
    """Reason, in words, why the extension cannot be loaded; None if it is loaded."""
    reason: str | None = _load()
    return reason


@functools.cache
def _load() -> str | None:
    info = build_info().get("cuda") or {}
    if not LIBRARY.exists():
        return f"the package was built without the CUDA kernels ({info.get('reason', 'no build information')})"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY} cannot be loaded: {error}"
    for name in (
        "row_statistics",
        "pair_tiles",
        "diagonal",
        "row_sweep",
        "sequence_losses",
        "differences",
        "token_gradients",
    ):
        # The operators write to their arguments and return nothing, so their fake versions do nothing.
        torch.library.register_fake(f"dispersion_kernels::cuda_{name}", lambda *args, **kwargs: None)
    return None


@dataclass(frozen=True)
class TileShape:
    """Tile of ``pair_tiles``: ``PairTilesShape`` of ``csrc/cuda/pair_tiles.cuh``."""

    block: int


@dataclass(frozen=True)
class RowShape:
    """Tile of ``row_sweep``: ``RowSweepShape`` of ``csrc/cuda/row_sweep.cuh``."""

    block_m: int
    block_n: int
    single_slice: bool


class CudaKernels:
    """:class:`dispersion_kernels.backends.gpu.launch.Kernels` in CUDA C++.

    Args:
        z: one of the layers, for their device and dtype.
        precision: precision of fp32 matrix products, ``"tf32"`` or ``"tf32x3"``; None: that of PyTorch's products.
    """

    max_layers = 64  # kMaxLayers of csrc/cuda/kernels.h
    has_band = False

    def __init__(self, z: Tensor, precision: str | None = None) -> None:
        reason = unavailable_reason()
        if reason is not None:
            raise RuntimeError(f"the CUDA kernels are unavailable: {reason}")
        self.dtype = z.dtype
        self.is_fp32 = z.dtype == torch.float32
        self.element = (precision or fp32_precision()) if self.is_fp32 else _ELEMENTS[z.dtype]
        self.multiprocessors = multiprocessors(z.device)
        self.alignment = 16 // z.dtype.itemsize  # elements per copy, which is of 16 bytes
        # Kernels are queued on the current stream.
        self.stream = torch.cuda.current_stream(z.device).cuda_stream if z.is_cuda else 0

    def tile_shape(self, has_pair_ids: bool, band_of: str | None) -> TileShape:
        return TileShape(64 if self.is_fp32 else 128)

    def row_shape(self, features: int, perplexity: bool, gradient: bool) -> RowShape:
        if self.is_fp32:
            return RowShape(64, 32, features <= 64)
        return RowShape(64, 64, features <= 128)

    def tuned(self, strategy: str, what: tuple[Any, ...], shape: Any, launch: Callable[[Any], Any]) -> Any:
        """``shape`` itself: the shapes are compiled in."""
        return shape

    def row_statistics(self, call: RowStatisticsCall) -> None:
        torch.ops.dispersion_kernels.cuda_row_statistics(
            f"dk_row_statistics_{self._storage}",
            _layers(call.tokens),
            call.partners,
            call.norm,
            call.inverse,
            call.extra,
            list(call.cleaned),
            call.epilogue.eps,
            call.epilogue.q,
            _TRANSFORMS[call.epilogue.transform],
            self.stream,
        )

    def pair_tiles(self, call: PairTilesCall) -> None:
        inputs, region = call.inputs, call.region
        mode = "write" if call.weights is not None else "online" if call.maxima is not None else "loss"
        torch.ops.dispersion_kernels.cuda_pair_tiles(
            f"dk_pair_tiles_{self.element}_{inputs.epilogue.function}_{mode}",
            _layers(inputs.tokens),
            inputs.statistics.inverse,
            inputs.statistics.weight_inverse,
            inputs.statistics.extra,
            call.shift,
            inputs.pair_ids,
            call.weights,
            call.mirror,
            call.sums,
            call.maxima,
            region.rows,
            region.programs,
            region.tiles_i,
            region.tiles_j,
            region.triangle,
            region.first_row,
            region.first_i,
            region.first_j,
            region.first_sum,
            *inputs.epilogue.p,
            self.stream,
        )

    def band_product(self, call: BandProductCall) -> None:
        raise NotImplementedError("the CUDA kernels have no band of tiles: has_band is False")

    def diagonal(self, call: DiagonalCall) -> None:
        torch.ops.dispersion_kernels.cuda_diagonal(
            _layers(call.inputs.tokens),
            call.inputs.statistics.inverse,
            call.inputs.statistics.extra,
            call.weights,
            call.rows,
            call.first_row,
            _TRANSFORMS[call.inputs.epilogue.transform],
            self.stream,
        )

    def row_sweep(self, call: RowSweepCall) -> None:
        inputs, entropy = call.inputs, call.entropy
        single_slice = "_resident" if call.gradients and call.shape.single_slice else ""
        p0, p1, p2, p3 = inputs.epilogue.p
        torch.ops.dispersion_kernels.cuda_row_sweep(
            f"dk_row_sweep_{self.element}_{inputs.epilogue.function}_{call.which}{single_slice}",
            _layers(inputs.tokens),
            inputs.statistics.inverse,
            inputs.statistics.weight_inverse,
            inputs.statistics.extra,
            call.shift,
            inputs.pair_ids,
            call.tile_ranges,
            None if entropy is None else entropy.largest,
            None if entropy is None else entropy.total,
            None if entropy is None else entropy.expected,
            None if entropy is None else entropy.average,
            call.sums,
            call.maxima,
            call.weight_sums,
            list(call.gradients),
            call.shape.block_m,
            p0,
            p1,
            p2 if entropy is None else entropy.eps,
            p3,
            self.stream,
        )

    def sequence_losses(self, call: SequenceLossesCall) -> None:
        torch.ops.dispersion_kernels.cuda_sequence_losses(
            call.norm,
            call.inverse,
            call.partners,
            call.sums,
            call.maxima,
            call.bounds,
            call.counts,
            call.tokens,
            call.loss,
            call.token_scale,
            call.shift,
            call.length,
            call.batch,
            call.first_sequence,
            call.divisor,
            call.of_tokens,
            call.diagonal,
            call.logarithm,
            call.divide_by_sequences,
            call.constant,
            call.factor,
            self.stream,
        )

    def differences(self, tokens: Tokens, weight_sums: Tensor, gradients: Sequence[Tensor]) -> None:
        torch.ops.dispersion_kernels.cuda_differences(
            f"dk_differences_{self._storage}", _layers(tokens), weight_sums, list(gradients), self.stream
        )

    def token_gradients(self, call: TokenGradientsCall) -> None:
        gradient, output = (
            "fp32" if one.dtype == torch.float32 else self._storage for one in (call.gradients[0], call.outputs[0])
        )
        torch.ops.dispersion_kernels.cuda_token_gradients(
            f"dk_token_gradients_{self._storage}_{gradient}_{output}",
            _layers(call.tokens),
            list(call.gradients),
            call.scale,
            call.factor,
            list(call.outputs),
            call.eps,
            _TRANSFORMS[call.transform],
            self.stream,
        )

    @property
    def _storage(self) -> str:
        return "fp32" if self.is_fp32 else self.element


def _layers(tokens: Tokens) -> list[Tensor]:
    """Layers ``[B, L, F]``: the operators take F from the shape, and read zeros beyond it."""
    if tokens.width == tokens.features:
        return tokens.layers
    return [z[:, :, : tokens.features] for z in tokens.layers]


class Launch(NamedTuple):
    """Launch of a kernel that :func:`watch_launches` redirected from the device."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    """Bytes of dynamic shared memory."""
    arguments: list[int]
    """Addresses of the arguments, valid until the watcher returns."""


_Watcher = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_int,
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_int,
)


@contextmanager
def watch_launches(watch: Callable[[Launch], None], arch: str) -> Iterator[None]:
    """Context in which launches go to ``watch`` in place of a GPU, with tensors on any device.

    The kernels are examined with it on machines without a GPU. With ``arch`` ``sm_90a`` the launches are those of
    Hopper; in place of a tensor map among their arguments is the ``TensorMapSource`` of ``csrc/cuda/operators.cpp``
    that it would be made from. The first exception that ``watch`` raises is raised at the end.
    """
    failures: list[BaseException] = []

    def called(name: bytes, grid: Any, threads: int, shared: int, arguments: Any, count: int) -> None:
        try:
            watch(Launch(name.decode(), (grid[0], grid[1], grid[2]), threads, shared, arguments[:count]))
        except BaseException as failure:  # kept, because an exception does not pass through C++
            failures.append(failure)

    library = ctypes.CDLL(str(LIBRARY))
    watcher = _Watcher(called)
    library.dispersion_kernels_watch_launches(watcher, int(arch == "sm_90a"))
    try:
        yield
    finally:
        library.dispersion_kernels_watch_launches(None, 0)
    if failures:
        raise failures[0]
