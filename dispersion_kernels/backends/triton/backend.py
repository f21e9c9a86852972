"""The Triton kernels behind the launcher's interface: their configurations, arguments and constants."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from dispersion_kernels.backends.gpu.launch import (
    BandProductCall,
    DiagonalCall,
    Inputs,
    PairTilesCall,
    RowStatisticsCall,
    RowSweepCall,
    SequenceLossesCall,
    TokenGradientsCall,
    Tokens,
    ceil_div,
    fp32_precision,
    multiprocessors,
)
from dispersion_kernels.backends.triton import epilogues, kernels, tuning
from dispersion_kernels.backends.triton.configs import (
    RowConfig,
    TileConfig,
    architecture,
    band_config,
    padded_width,
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
        sms: number of multiprocessors to plan for; None: that of the device.
    """

    max_layers = 2**31
    alignment = 16  # Triton specialises on whether 16 divides a number
    has_band = True

    def __init__(
        self,
        z: Tensor,
        arch: str | None = None,
        precision: str | None = None,
        run: Callable[..., Any] = run,
        sms: int | None = None,
    ) -> None:
        self.device, self.dtype = z.device, z.dtype
        self.arch = architecture(z.device) if arch is None else arch
        self.precision = _precision(z.dtype, self.arch) if precision is None else precision
        self.run = run
        self.multiprocessors = multiprocessors(z.device) if sms is None else sms

    def tile_shape(self, has_pair_ids: bool, band_of: str | None) -> TileConfig:
        return tile_config(self.arch, self.dtype, self.precision, has_pair_ids, band_of)

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

    def row_statistics(self, call: RowStatisticsCall) -> None:
        norm = call.norm
        self._launch_on_tokens(
            kernels.row_statistics_kernel,
            call.tokens,
            partners_ptr=norm if call.partners is None else call.partners,
            norm_ptr=norm,
            inverse_ptr=call.inverse,
            extra_ptr=call.extra,
            cleaned=tuple(call.cleaned) if call.cleaned else (norm,) * len(call.tokens.layers),
            eps=call.epilogue.eps,
            q=call.epilogue.q,
            TRANSFORM=call.epilogue.transform,
            HAS_PARTNERS=call.partners is not None,
            CLEAN=len(call.cleaned) > 0,
        )

    def pair_tiles(self, call: PairTilesCall) -> Any:
        shape, region, sums, weights = call.shape, call.region, call.sums, call.weights
        unused, band = call.inputs.statistics.norm, call.region.band
        return self._launch(
            kernels.pair_tiles_kernel,
            (region.programs, region.rows),
            call.inputs.tokens,
            **self._input_arguments(call.inputs),
            shift_ptr=unused if call.shift is None else call.shift,
            weights_ptr=unused if weights is None else weights,
            mirror_ptr=unused if call.mirror is None else call.mirror,
            weights_row_stride=0 if weights is None else weights.stride(0),
            weights_stride=0 if weights is None else weights.stride(1),
            sums_ptr=sums,
            maxima_ptr=sums if call.maxima is None else call.maxima,
            sums_stride=sums.stride(0),
            first_sum=region.first_sum,
            first_row=region.first_row,
            first_i=region.first_i,
            first_j=region.first_j,
            tiles_i=region.tiles_i,
            tiles_j=region.tiles_j,
            tile_range_ptr=unused if band is None else band.tile_ranges,
            reach=0 if band is None else band.reach,
            ring=0 if band is None else band.ring,
            ONLINE=call.maxima is not None,
            HAS_SHIFT=call.shift is not None,
            WRITE=weights is not None,
            TRIANGLE=region.triangle,
            BAND=band is not None,
            BLOCK=shape.block,
            BLOCK_K=shape.block_k,
            EVEN_K=call.inputs.tokens.width % shape.block_k == 0,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )

    def band_product(self, call: BandProductCall) -> Any:
        tokens, band, weights = call.inputs.tokens, call.band, call.weights
        shape = band_config(self.arch, self.dtype, self.precision, tokens.features, call.shape.block)
        return self._launch(
            kernels.band_product_kernel,
            (call.tiles * ceil_div(tokens.features, shape.block_f), call.rows),
            tokens,
            weights_ptr=weights,
            weights_row_stride=weights.stride(0),
            weights_stride=weights.stride(1),
            tile_range_ptr=band.tile_ranges,
            gradients=tuple(call.gradients),
            first_row=call.first_row,
            first_tile=call.first_tile,
            reach=band.reach,
            ring=band.ring,
            features=tokens.features,
            BLOCK=call.shape.block,
            BLOCK_K=shape.block_k,
            BLOCK_F=shape.block_f,
            PRECISION=self.precision,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )

    def diagonal(self, call: DiagonalCall) -> None:
        tokens, statistics = call.inputs.tokens, call.inputs.statistics
        block, block_k = 128, 64
        self._launch(
            kernels.diagonal_kernel,
            (ceil_div(tokens.length, block), call.rows),
            tokens,
            inverse_ptr=statistics.inverse,
            extra_ptr=statistics.extra,
            weights_ptr=call.weights,
            weights_row_stride=call.weights.stride(0),
            weights_stride=call.weights.stride(1),
            first_row=call.first_row,
            TRANSFORM=call.inputs.epilogue.transform,
            BLOCK=block,
            SAMPLE=16,
            BLOCK_K=block_k,
            EVEN_K=tokens.width % block_k == 0,
            num_warps=1,
        )

    def row_sweep(self, call: RowSweepCall) -> Any:
        inputs, shape, entropy, gradients = call.inputs, call.shape, call.entropy, call.gradients
        tokens, unused = inputs.tokens, inputs.statistics.norm
        slices = ceil_div(tokens.features, shape.block_f) if gradients else 1
        arguments = self._input_arguments(inputs)
        if entropy is not None:
            arguments["p2"] = entropy.eps
        return self._launch(
            kernels.row_sweep_kernel,
            (ceil_div(tokens.length, shape.block_m), tokens.rows, slices),
            tokens,
            **arguments,
            shift_ptr=unused if call.shift is None else call.shift,
            tile_range_ptr=unused if call.tile_ranges is None else call.tile_ranges,
            largest_ptr=unused if entropy is None else entropy.largest,
            total_ptr=unused if entropy is None else entropy.total,
            expected_ptr=unused if entropy is None or entropy.expected is None else entropy.expected,
            average_ptr=unused if entropy is None else entropy.average,
            features=tokens.features,
            sums_ptr=unused if call.sums is None else call.sums,
            maxima_ptr=unused if call.maxima is None else call.maxima,
            weight_sums_ptr=unused if call.weight_sums is None else call.weight_sums,
            gradients=tuple(gradients) if gradients else (unused,) * len(tokens.layers),
            PASS=call.which,
            HAS_SHIFT=call.shift is not None,
            SUM_WEIGHTS=call.weight_sums is not None,
            WEIGHTED=inputs.epilogue.transform != "none" or inputs.statistics.weight_scale is not None,
            BLOCK_M=shape.block_m,
            BLOCK_N=shape.block_n,
            BLOCK_K=shape.block_k,
            BLOCK_F=shape.block_f,
            SINGLE_SLICE=shape.single_slice,
            EVEN_K=tokens.width % shape.block_k == 0,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
        )

    def sequence_losses(self, call: SequenceLossesCall) -> None:
        norm = call.norm
        constant = ctypes.c_float(call.constant).value  # floats are passed on as fp32
        arguments = {
            "norm_ptr": norm,
            "inverse_ptr": call.inverse,
            "partners_ptr": norm if call.partners is None else call.partners,
            "sums_ptr": call.sums,
            "maxima_ptr": norm if call.maxima is None else call.maxima,
            "bounds_ptr": norm if call.bounds is None else call.bounds,
            "counts_ptr": norm if call.counts is None else call.counts,
            "tokens_ptr": norm if call.tokens is None else call.tokens,
            "loss_ptr": call.loss,
            "token_scale_ptr": norm if call.token_scale is None else call.token_scale,
            "shift_ptr": norm if call.shift is None else call.shift,
            "length": call.length,
            "sums_stride": call.sums.shape[1],
            "batch": call.batch,
            "first_sequence": call.first_sequence,
            "all_sequences": 0 if call.counts is None else call.counts.shape[0],
            "divisor": call.divisor,
            "constant": constant,
            "constant_rest": call.constant - constant,
            "factor": call.factor,
            "ONLINE": call.maxima is not None,
            "HAS_BOUNDS": call.bounds is not None,
            "HAS_COUNTS": call.counts is not None,
            "WITH_SCALE": call.token_scale is not None,
            "OF_TOKENS": call.of_tokens,
            "DIAGONAL": call.diagonal,
            "LOGARITHM": call.logarithm,
            "DIVIDE_BY_SEQUENCES": call.divide_by_sequences,
            "BLOCK": 1024,
        }
        rows, sequences = call.loss.shape
        self.run(kernels.sequence_losses_kernel, (sequences, rows), arguments, {"num_warps": 4})

    def differences(self, tokens: Tokens, weight_sums: Tensor, gradients: Sequence[Tensor]) -> None:
        self._launch_on_tokens(
            kernels.differences_kernel, tokens, weight_sums_ptr=weight_sums, gradients=tuple(gradients)
        )

    def token_gradients(self, call: TokenGradientsCall) -> None:
        tokens, block = call.tokens, tokens_of_a_program(self.arch)
        self._launch(
            kernels.token_gradients_kernel,
            (ceil_div(tokens.batch * tokens.length, block), len(tokens.layers)),
            tokens,
            gradients=tuple(call.gradients),
            scale_ptr=call.scale,
            factor_ptr=call.factor,
            outputs=tuple(call.outputs),
            factor_stride_b=call.factor.stride(0),
            factor_stride_l=call.factor.stride(1),
            features=tokens.features,
            eps=call.eps,
            TRANSFORM=call.transform,
            BLOCK_M=block,
            BLOCK_F=_block_of_features(tokens.features),
            num_warps=4,
        )

    def _input_arguments(self, inputs: Inputs) -> dict[str, Any]:
        """Arguments that both kernels over pairs have."""
        epilogue, statistics, pair_ids = inputs.epilogue, inputs.statistics, inputs.pair_ids
        p0, p1, p2, p3 = epilogue.p
        return {
            "p0": p0,
            "p1": p1,
            "p2": p2,
            "p3": p3,
            "FUNCTION": getattr(epilogues, epilogue.function) if epilogue.own is None else epilogue.own,
            "OWN": epilogue.own is not None,
            "EXPONENTIAL": epilogue.exponential,
            "TRANSFORM": epilogue.transform,
            "inverse_ptr": statistics.inverse,
            "weight_inverse_ptr": statistics.weight_inverse,
            "extra_ptr": statistics.extra,
            "pair_ids_ptr": statistics.norm if pair_ids is None else pair_ids,
            "HAS_PAIR_IDS": pair_ids is not None,
            "PRECISION": self.precision,
        }

    def _launch_on_tokens(self, kernel: Any, tokens: Tokens, **arguments: Any) -> None:
        """Launches a kernel that reads each token by itself."""
        block = tokens_of_a_program(self.arch)
        self._launch(
            kernel,
            (ceil_div(tokens.length, block), tokens.rows),
            tokens,
            **arguments,
            features=tokens.features,
            BLOCK_M=block,
            BLOCK_F=_block_of_features(tokens.features),
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


def _block_of_features(features: int) -> int:
    """Features of a token that a program reads at a time."""
    return min(512, padded_width(features))


def _precision(dtype: torch.dtype, arch: str) -> str:
    """Precision of the kernels' fp32 products, that of PyTorch's matrix products; 16-bit products are exact anyway."""
    return "ieee" if dtype != torch.float32 or arch.startswith("gfx") else fp32_precision()
