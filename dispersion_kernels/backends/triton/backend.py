"""The Triton kernels behind the launcher's interface: their configurations, arguments and constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from dispersion_kernels.backends.gpu.epilogues import Epilogue
from dispersion_kernels.backends.gpu.launch import Entropy, Region, Statistics, Tokens, fp32_precision
from dispersion_kernels.backends.triton import epilogues, kernels, tuning
from dispersion_kernels.backends.triton.configs import (
    RowConfig,
    TileConfig,
    architecture,
    row_candidates,
    row_config,
    tile_candidates,
    tile_config,
    tokens_of_a_program,
)


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> Any:
    """Launches a kernel on the current stream and returns the compiled kernel."""
    return kernel[grid](**arguments, **options, enable_fp_fusion=True)


class TritonKernels:
    """:class:`dispersion_kernels.backends.gpu.launch.Kernels` in Triton.

    Args:
        z: one of the layers, for their device and dtype.
        arch: the column of the table of configurations; None: that of the device.
        precision: precision of fp32 matrix products, ``"tf32"``, ``"tf32x3"`` or ``"ieee"``; None: that of PyTorch's
            products.
        run: the function that launches a kernel; that of :mod:`kernel_audit.ahead_of_time` records the launch instead.
    """

    max_layers = 2**31
    alignment = 16  # Triton specialises on whether 16 divides a number

    def __init__(
        self, z: Tensor, arch: str | None = None, precision: str | None = None, run: Callable[..., Any] = run
    ) -> None:
        self.device, self.dtype = z.device, z.dtype
        self.arch = architecture(z.device) if arch is None else arch
        self.precision = _precision(z.dtype, self.arch) if precision is None else precision
        self.run = run

    def tile_shape(self, has_pair_ids: bool) -> TileConfig:
        return tile_config(self.arch, self.dtype, self.precision, has_pair_ids)

    def row_shape(self, features: int, perplexity: bool, gradient: bool) -> RowConfig:
        return row_config(self.arch, self.dtype, self.precision, features, perplexity, gradient)

    def tuned(self, strategy: str, what: tuple[Any, ...], shape: Any, launch: Callable[[Any], Any]) -> Any:
        if not tuning.enabled(self.device):
            return shape
        potential, dtype, features, length, pairs = what
        device = torch.cuda.get_device_name(self.device)
        bucket = tuning.length_bucket(length)
        key = (
            device,
            f"Triton {triton.__version__}",
            strategy,
            potential,
            dtype,
            self.precision,
            features,
            bucket,
            pairs,
        )
        candidates: list[Any] = tile_candidates(shape) if isinstance(shape, TileConfig) else row_candidates(shape)
        return tuning.best("; ".join(map(str, key)), candidates, launch)

    def row_statistics(self, tokens: Tokens, epilogue: Epilogue, norm: Tensor, inverse: Tensor, extra: Tensor) -> None:
        self._launch_on_tokens(
            kernels.row_statistics_kernel,
            tokens,
            epilogue,
            norm_ptr=norm,
            inverse_ptr=inverse,
            extra_ptr=extra,
            eps=epilogue.eps,
            q=epilogue.q,
        )

    def pair_tiles(
        self,
        shape: TileConfig,
        region: Region,
        tokens: Tokens,
        epilogue: Epilogue,
        statistics: Statistics,
        sums: Tensor,
        maxima: Tensor | None,
        shift: Tensor | None,
        pair_ids: Tensor | None,
        pair_id_ranges: Tensor | None,
        weights: Tensor | None,
        mirror: Tensor | None,
    ) -> Any:
        unused = statistics.norm
        return self._launch(
            kernels.pair_tiles_kernel,
            (region.programs, region.rows),
            tokens,
            **self._epilogue_arguments(epilogue),
            inverse_ptr=statistics.inverse,
            weight_inverse_ptr=statistics.weight_inverse,
            extra_ptr=statistics.extra,
            shift_ptr=unused if shift is None else shift,
            pair_ids_ptr=unused if pair_ids is None else pair_ids,
            pair_id_range_ptr=unused if pair_id_ranges is None else pair_id_ranges,
            weights_ptr=unused if weights is None else weights,
            mirror_ptr=unused if mirror is None else mirror,
            weights_row_stride=0 if weights is None else weights.stride(0),
            weights_stride=0 if weights is None else weights.stride(1),
            sums_ptr=sums,
            maxima_ptr=sums if maxima is None else maxima,
            sums_stride=sums.shape[1],
            first_sum=region.first_sum,
            first_row=region.first_row,
            first_i=region.first_i,
            first_j=region.first_j,
            tiles_i=region.tiles_i,
            tiles_j=region.tiles_j,
            ONLINE=maxima is not None,
            HAS_SHIFT=shift is not None,
            HAS_PAIR_IDS=pair_ids is not None,
            WRITE=weights is not None,
            TRIANGLE=region.triangle,
            BLOCK=shape.block,
            BLOCK_K=shape.block_k,
            EVEN_K=tokens.width % shape.block_k == 0,
            PRECISION=self.precision,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )

    def row_sweep(
        self,
        shape: RowConfig,
        which: str,
        tokens: Tokens,
        epilogue: Epilogue,
        statistics: Statistics,
        *,
        sums: Tensor | None = None,
        maxima: Tensor | None = None,
        shift: Tensor | None = None,
        pair_ids: Tensor | None = None,
        tile_ranges: Tensor | None = None,
        entropy: Entropy | None = None,
        weight_sums: Tensor | None = None,
        gradients: Sequence[Tensor] = (),
    ) -> Any:
        unused = statistics.norm
        slices = triton.cdiv(tokens.features, shape.block_f) if gradients else 1
        arguments = self._epilogue_arguments(epilogue)
        if entropy is not None:
            arguments["p2"] = entropy.eps
        return self._launch(
            kernels.row_sweep_kernel,
            (triton.cdiv(tokens.length, shape.block_m), tokens.rows, slices),
            tokens,
            **arguments,
            inverse_ptr=statistics.inverse,
            weight_inverse_ptr=statistics.weight_inverse,
            extra_ptr=statistics.extra,
            shift_ptr=unused if shift is None else shift,
            pair_ids_ptr=unused if pair_ids is None else pair_ids,
            tile_range_ptr=unused if tile_ranges is None else tile_ranges,
            largest_ptr=unused if entropy is None else entropy.largest,
            total_ptr=unused if entropy is None else entropy.total,
            expected_ptr=unused if entropy is None or entropy.expected is None else entropy.expected,
            average_ptr=unused if entropy is None else entropy.average,
            features=tokens.features,
            sums_ptr=unused if sums is None else sums,
            maxima_ptr=unused if maxima is None else maxima,
            weight_sums_ptr=unused if weight_sums is None else weight_sums,
            gradients=tuple(gradients) if gradients else (unused,) * len(tokens.layers),
            PASS=which,
            HAS_SHIFT=shift is not None,
            HAS_PAIR_IDS=pair_ids is not None,
            SUM_WEIGHTS=weight_sums is not None,
            WEIGHTED=epilogue.transform != "none" or statistics.weight_scale is not None,
            BLOCK_M=shape.block_m,
            BLOCK_N=shape.block_n,
            BLOCK_K=shape.block_k,
            BLOCK_F=shape.block_f,
            RESIDENT=shape.resident,
            EVEN_K=tokens.width % shape.block_k == 0,
            PRECISION=self.precision,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )

    def sequence_sums(
        self,
        length: int,
        norm: Tensor,
        sums: Tensor,
        maxima: Tensor | None,
        bounds: Tensor | None,
        total: Tensor,
        shift: Tensor | None,
    ) -> None:
        arguments = {
            "norm_ptr": norm,
            "sums_ptr": sums,
            "maxima_ptr": sums if maxima is None else maxima,
            "bounds_ptr": norm if bounds is None else bounds,
            "total_ptr": total,
            "shift_ptr": total if shift is None else shift,
            "length": length,
            "sums_stride": sums.shape[1],
            "ONLINE": maxima is not None,
            "HAS_BOUNDS": bounds is not None,
            "BLOCK": 1024,
        }
        rows, sequences = total.shape
        self.run(kernels.sequence_sums_kernel, (sequences, rows), arguments, {"num_warps": 4})

    def project(
        self,
        tokens: Tokens,
        epilogue: Epilogue,
        statistics: Statistics,
        weight_sums: Tensor | None,
        gradients: Sequence[Tensor],
    ) -> None:
        self._launch_on_tokens(
            kernels.project_kernel,
            tokens,
            epilogue,
            norm_ptr=statistics.norm,
            inverse_ptr=statistics.inverse,
            extra_ptr=statistics.extra,
            weight_sums_ptr=statistics.norm if weight_sums is None else weight_sums,
            gradients=tuple(gradients),
        )

    def _epilogue_arguments(self, epilogue: Epilogue) -> dict[str, Any]:
        return dict(
            **{f"p{n}": value for n, value in enumerate(epilogue.p)},
            FUNCTION=getattr(epilogues, epilogue.function) if epilogue.own is None else epilogue.own,
            OWN=epilogue.own is not None,
            EXPONENTIAL=epilogue.exponential,
            TRANSFORM=epilogue.transform,
        )

    def _launch_on_tokens(self, kernel: Any, tokens: Tokens, epilogue: Epilogue, **arguments: Any) -> None:
        """Launches a kernel that reads each token by itself."""
        block = tokens_of_a_program(self.arch)
        self._launch(
            kernel,
            (triton.cdiv(tokens.length, block), tokens.rows),
            tokens,
            **arguments,
            features=tokens.features,
            TRANSFORM=epilogue.transform,
            BLOCK_M=block,
            BLOCK_F=min(512, max(16, triton.next_power_of_2(tokens.features))),
            num_warps=4,
        )

    def _launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        tokens: Tokens,
        *,
        num_warps: int,
        num_stages: int = 3,
        **rest: Any,
    ) -> Any:
        stride_b, stride_l, _ = tokens.layers[0].stride()
        arguments = dict(
            layers=tuple(tokens.layers),
            stride_b=stride_b if tokens.batch > 1 else 0,
            stride_l=stride_l,
            batch=tokens.batch,
            length=tokens.length,
            width=tokens.width,
            LAYERS=len(tokens.layers),
            **rest,
        )
        return self.run(kernel, grid, arguments, {"num_warps": num_warps, "num_stages": num_stages})


def _precision(dtype: torch.dtype, arch: str) -> str:
    """Precision of the kernels' fp32 products, that of PyTorch's matrix products; 16-bit products are exact anyway."""
    return "ieee" if dtype != torch.float32 or arch.startswith("gfx") else fp32_precision()
