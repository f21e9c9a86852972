"""The launcher of the Triton backend: the strategy, the schedule and the order of the kernels.

*Swept*: the similarities of the upper triangle of tiles, whose slopes go to a workspace of bounded size, and library
matrix products of the workspace with the tokens; 3 L^2 F FLOPs a row. *Resident*: one kernel that keeps a tile's
gradient in registers and no slope at all, for few features and for packed sequences; 2 (1 + n) L^2 F FLOPs, where n is
the number of slices of the features. Nothing here reads a value back from the device, and every launch depends on
shapes alone, so a CUDA graph can hold it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dispersion_kernels.potentials import L2Repel, PerplexityEntropy, Potential
from dispersion_kernels.segments import group_sizes, segment_of_token, within_segments
from dispersion_kernels.sweep import log_mean_loss, mean_loss
from dispersion_kernels.triton import kernels, tuning
from dispersion_kernels.triton.configs import (
    RowConfig,
    TileConfig,
    architecture,
    row_candidates,
    row_config,
    tile_candidates,
    tile_config,
    tokens_of_a_program,
)
from dispersion_kernels.triton.potentials import Epilogue, epilogue_of

# Of the slopes in flight: it should stay in the last-level cache and yet fill the machine.
WORKSPACE_BYTES = 32 << 20
# Up to here the resident kernel's 4 L^2 F FLOPs should cost less than the swept one's 3 and its traffic of slopes.
_RESIDENT_FEATURES = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 64}
# Of a grid's second dimension.
_MAX_ROWS = 65_535
_LN2 = math.log(2)
_NO_GROUP = 2**31 - 1


class Losses(NamedTuple):
    """What the kernels give for all layers."""

    loss: Tensor
    """``[layers, S]`` fp64: of each sequence; 0 without a pair."""
    pairs: Tensor
    """``[S]`` int64: the ordered pairs of each."""
    gradients: list[Tensor]
    """``[B, L, F]`` fp32 of each layer, but for its scale; empty where none was asked for."""
    scale: Tensor | None
    """``[layers, B, L]`` fp32."""


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> Any:
    """Launches a kernel on the current stream; gives what Triton compiled."""
    return kernel[grid](**arguments, **options, enable_fp_fusion=True)


def dispersion(
    layers: Sequence[Tensor],
    potential: Potential,
    groups: Tensor | None,
    cu_seqlens: Tensor | None,
    with_grad: bool,
    *,
    arch: str | None = None,
    precision: str | None = None,
    run: Callable[..., Any] = run,
) -> Losses:
    """Loss of each sequence of each layer and, if asked, its gradient.

    Args:
        layers: ``[B, L, F]`` each, all alike.
        potential, groups, cu_seqlens: as in :mod:`dispersion_kernels.segments`.
        with_grad: whether to compute the gradient.
        arch: the column of the table of configurations; None: that of the device.
        precision: of fp32 matrix products, ``"tf32"``, ``"tf32x3"`` or ``"ieee"``; None: as PyTorch's.
        run: what launches a kernel; :mod:`dispersion_kernels.triton.ahead_of_time` records the launches instead.
    """
    batch, length, _ = layers[0].shape
    if batch == 0 or length < 2:
        return _nothing(layers, cu_seqlens, with_grad)
    if batch > 1 and len(layers) * batch > _MAX_ROWS:
        parts = [slice(0, batch // 2), slice(batch // 2, batch)]
        return _joined(
            [
                dispersion(
                    [z[part] for z in layers],
                    potential,
                    None if groups is None else groups[part],
                    None,
                    with_grad,
                    arch=arch,
                    precision=precision,
                    run=run,
                )
                for part in parts
            ]
        )
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(layers[0].device)
        groups = within_segments(groups, cu_seqlens, length)
    arch = architecture(layers[0].device) if arch is None else arch
    precision = _precision(layers[0].dtype, arch) if precision is None else precision
    call = _Call(_same_strides(layers), potential, groups, cu_seqlens, arch, precision, run)
    call.row_statistics()
    if isinstance(potential, PerplexityEntropy):
        loss, scale = call.perplexity_entropy(potential, with_grad)
    else:
        loss, scale = call.pair_sums(with_grad)
    return call.finish(loss, scale, with_grad)


def _nothing(layers: Sequence[Tensor], cu_seqlens: Tensor | None, with_grad: bool) -> Losses:
    z = layers[0]
    sequences = z.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    return Losses(
        torch.zeros(len(layers), sequences, dtype=torch.float64, device=z.device),
        torch.zeros(sequences, dtype=torch.int64, device=z.device),
        [torch.zeros_like(z, dtype=torch.float32) for z in layers] if with_grad else [],
        torch.zeros(len(layers), *z.shape[:2], device=z.device) if with_grad else None,
    )


def _joined(parts: list[Losses]) -> Losses:
    """Of the whole batch, from those of its parts."""
    scales = [part.scale for part in parts if part.scale is not None]
    return Losses(
        torch.cat([part.loss for part in parts], 1),
        torch.cat([part.pairs for part in parts]),
        [torch.cat(of_layer) for of_layer in zip(*(part.gradients for part in parts), strict=True)],
        torch.cat(scales, 1) if scales else None,
    )


def _same_strides(layers: Sequence[Tensor]) -> list[Tensor]:
    """The layers with one set of strides, of which that of the features times F fits 32 bits; the others are 64."""
    stride, features = layers[0].stride(), layers[0].shape[2]
    if all(z.stride() == stride for z in layers) and stride[2] * features < 2**31:
        return list(layers)
    return [z.contiguous() for z in layers]


@dataclass(frozen=True)
class _Statistics:
    """Of the tokens, ``[rows, L]`` fp32; see ``row_statistics_kernel``."""

    norm: Tensor
    inverse: Tensor
    extra: Tensor
    weight_inverse: Tensor
    """``inverse`` times a power of two that keeps slopes times it in the range of fp16."""
    weight_scale: Tensor | None
    """``[rows, 1]``: that power; None for 1."""


class _Call:
    """What the kernels of one call share."""

    def __init__(
        self,
        layers: list[Tensor],
        potential: Potential,
        groups: Tensor | None,
        cu_seqlens: Tensor | None,
        arch: str,
        precision: str,
        run: Callable[..., Any],
    ) -> None:
        z = layers[0]
        self.layers, self.potential, self.cu_seqlens = layers, potential, cu_seqlens
        self.batch, self.length, self.features = z.shape
        self.rows = self.batch * len(layers)
        self.device, self.dtype = z.device, z.dtype
        self.epilogue: Epilogue = epilogue_of(potential, self.features, narrow_range=z.dtype == torch.float16)
        self.arch, self.precision, self.run = arch, precision, run
        self.partners: Tensor | None = None
        self.groups: Tensor | None = None
        self._group_ranges: dict[int, Tensor] = {}
        if groups is not None:
            self.partners = group_sizes(groups) - 1
            self.groups = _dense(groups)
        self.segment = None if cu_seqlens is None else segment_of_token(cu_seqlens, self.length)
        # Of one row. S in shapes is this: 1, or the segments of cu_seqlens.
        self.sequences = 1 if cu_seqlens is None else cu_seqlens.numel() - 1

    # ---- statistics

    def row_statistics(self) -> None:
        norm, inverse, extra = self._row_statistics()
        if self.partners is not None:
            # Tokens left out must not reach the others through 0 * NaN, nor make the loss NaN. Those that take part and
            # are not finite do the latter alone.
            alone = self.partners <= 0
            norm.view(-1, self.batch, self.length).masked_fill_(alone, 0.0)
            left_out = ~norm.isfinite().view(-1, self.batch, self.length) | alone
            inverse.view(left_out.shape).masked_fill_(left_out, 0.0)
            extra.view(left_out.shape).masked_fill_(left_out, 0.0)
            self.layers = [z.masked_fill(out.unsqueeze(-1), 0.0) for z, out in zip(self.layers, left_out, strict=True)]
        self.tokens = self.layers
        if self.epilogue.transform == "none" and self.dtype == torch.float32:
            # Distances do not change when the mean is subtracted, and cancel less. 16 bits would round the difference.
            self.layers = [z - z.mean(1, keepdim=True) for z in self.layers]
            _, _, extra = self._row_statistics()
        weight_inverse, weight_scale = inverse, None
        if self.dtype == torch.float16 and self.epilogue.transform != "none":
            largest = inverse.amax(1, keepdim=True)
            weight_scale = torch.exp2(8 - torch.where(largest > 0, largest, 1.0).log2().floor())
            weight_inverse = inverse * weight_scale
        self.statistics = _Statistics(norm, inverse, extra, weight_inverse, weight_scale)

    def _row_statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        block = tokens_of_a_program(self.arch)
        norm, inverse, extra = (self._of_tokens() for _ in range(3))
        self._launch(
            kernels.row_statistics_kernel,
            (_blocks(self.length, block), self.rows),
            norm_ptr=norm,
            inverse_ptr=inverse,
            extra_ptr=extra,
            eps=self.epilogue.eps,
            q=self.epilogue.q,
            TRANSFORM=self.epilogue.transform,
            BLOCK_M=block,
            BLOCK_F=min(512, _power_of_two(self.features)),
            num_warps=4,
        )
        return norm, inverse, extra

    # ---- potentials that are a sum over pairs

    def pair_sums(self, with_grad: bool) -> tuple[Tensor, Tensor]:
        """The loss and the scale of each sequence of each row ``[rows, S]``; G to ``self.gradients``."""
        epilogue, potential = self.epilogue, self.potential
        packed = self.cu_seqlens is not None
        total: Tensor | None = None
        maximum: Tensor | None = None
        if epilogue.online or not with_grad:
            total, maximum = self._loss_of_rows() if packed else self._loss_of_tiles()
        if with_grad:
            resident = packed or self.features <= _RESIDENT_FEATURES[self.dtype]
            sums = self._resident(maximum) if resident else self._swept(maximum)
            total = sums if total is None else total
        assert total is not None
        count = self._pairs.clamp(min=1).double()
        if not epilogue.exponential:
            return mean_loss(potential, total, count)
        shift = torch.full_like(total, epilogue.shift)
        if maximum is not None:
            shift += maximum * _LN2
        if getattr(potential, "include_diagonal", False):
            total = total + self._paired_tokens
        return log_mean_loss(potential, total.log() + shift, shift, count)

    def _loss_of_tiles(self) -> tuple[Tensor, Tensor | None]:
        config = self._tile_config()
        tiles = _blocks(self.length, config.block)
        programs = _triangle(tiles)
        sums, maxima = self._partial_sums(programs)
        self._pair_tiles(config, sums, maxima, self.rows, programs, tiles_i=tiles)
        return self._sequence_sums(sums, maxima)

    def _loss_of_rows(self) -> tuple[Tensor, Tensor | None]:
        config = self._row_config()
        sums, maxima = self._partial_sums(self.length)
        self._row_sweep(config, "online" if self.epilogue.online else "loss", sums=sums, maxima=maxima)
        return self._sequence_sums(sums, maxima)

    def _resident(self, maximum: Tensor | None) -> Tensor:
        sums = self._of_tokens()
        self.weight_sums = self._of_tokens() if self.epilogue.transform == "none" else None
        self.gradients = [self._empty_gradient() for _ in self.layers]
        config = self._row_config()
        if tuning.enabled(self.device):
            config = tuning.best(
                self._tuning_key("resident"),
                row_candidates(config),
                lambda candidate: self._row_sweep(candidate, "gradient", sums=sums),
            )
        self._row_sweep(
            config, "gradient", sums=sums, shift=None if maximum is None else self._spread(maximum).contiguous()
        )
        return self._sequence_sums(sums, None)[0]

    def _swept(self, maximum: Tensor | None) -> Tensor:
        config = self._tile_config()
        self.weight_sums = torch.zeros_like(self.statistics.norm) if self.epilogue.transform == "none" else None
        self.gradients = [self._empty_gradient() for _ in self.layers]
        stride = 8 * _blocks(self.length, 8)  # 16-byte stores, and what the library's products like
        matrix = self.length * stride * self.dtype.itemsize
        if matrix <= WORKSPACE_BYTES:
            return self._swept_rows(config, maximum, stride, WORKSPACE_BYTES // matrix)
        return self._swept_blocks(config, maximum)

    def _swept_rows(self, config: TileConfig, maximum: Tensor | None, stride: int, together: int) -> Tensor:
        """Several rows at once, all of a row's slopes in the workspace."""
        tiles = _blocks(self.length, config.block)
        programs = _triangle(tiles)
        sums, _ = self._partial_sums(programs)
        workspace = torch.empty(min(together, self.rows), self.length, stride, dtype=self.dtype, device=self.device)
        for first in range(0, self.rows, together):
            rows = min(together, self.rows - first)
            self._pair_tiles(
                config,
                sums,
                None,
                rows,
                programs,
                tiles_i=tiles,
                shift=maximum,
                first_row=first,
                weights=workspace,
                mirror=workspace,
            )
            for begin, end in _runs_of_layers(first, first + rows, self.batch):
                weights = workspace[begin - first : end - first, :, : self.length]
                layer, b = divmod(begin, self.batch)
                of_batch = slice(b, b + end - begin)
                _product_(self.gradients[layer][of_batch], weights, self.layers[layer][of_batch], add=False)
                if self.weight_sums is not None:
                    torch.sum(weights, 2, dtype=torch.float32, out=self.weight_sums[begin:end])
        return self._sequence_sums(sums, None)[0]

    def _swept_blocks(self, config: TileConfig, maximum: Tensor | None) -> Tensor:
        """One row at a time, in pairs of blocks whose slopes fill the workspace."""
        size = math.isqrt(WORKSPACE_BYTES // (2 * self.dtype.itemsize)) // config.block * config.block
        size = max(size, config.block)
        bounds = [(begin, min(begin + size, self.length)) for begin in range(0, self.length, size)]
        tiles = [_blocks(end - begin, config.block) for begin, end in bounds]
        programs = {
            (i, j): _triangle(tiles[i]) if i == j else tiles[i] * tiles[j]
            for i in range(len(bounds))
            for j in range(i, len(bounds))
        }
        sums, _ = self._partial_sums(sum(programs.values()))
        workspace = torch.empty(2, size, size, dtype=self.dtype, device=self.device)
        for row in range(self.rows):
            layer, b = divmod(row, self.batch)
            z, gradient = self.layers[layer][b : b + 1], self.gradients[layer][b : b + 1]
            first_sum = 0
            for (i, j), count in programs.items():
                self._pair_tiles(
                    config,
                    sums,
                    None,
                    1,
                    count,
                    tiles_i=tiles[i],
                    tiles_j=tiles[j],
                    triangle=i == j,
                    shift=maximum,
                    first_row=row,
                    first_i=bounds[i][0],
                    first_j=bounds[j][0],
                    first_sum=first_sum,
                    weights=workspace[:1],
                    mirror=workspace[0 if i == j else 1 :][:1],
                )
                first_sum += count
                for number, (side, other) in enumerate([(i, j), (j, i)] if i != j else [(i, i)]):
                    of_side, of_other = slice(*bounds[side]), slice(*bounds[other])
                    weights = workspace[
                        number : number + 1, : of_side.stop - of_side.start, : of_other.stop - of_other.start
                    ]
                    _product_(gradient[:, of_side], weights, z[:, of_other], add=other > 0)
                    if self.weight_sums is not None:
                        self.weight_sums[row, of_side] += weights[0].sum(1, dtype=torch.float32)
        return self._sequence_sums(sums, None)[0]

    # ---- perplexity_entropy

    def perplexity_entropy(self, potential: PerplexityEntropy, with_grad: bool) -> tuple[Tensor, Tensor]:
        """As :meth:`pair_sums`: three passes, of which the last two know each token's largest exponent and sum."""
        config = self._row_config()
        total, largest, entropy, expected = (self._of_tokens() for _ in range(4))
        self._row_sweep(config, "partition", sums=total, maxima=largest)
        total.masked_fill_(total == 0, 1.0)  # a token without a partner has no P
        if self.partners is None:
            average = torch.full_like(total, 1 / (self.length - 1))
        else:
            average = (1 / self.partners.clamp(min=1).float()).repeat(len(self.layers), 1)
        anchors = self._paired_tokens.clamp(min=1)
        self._row_sweep(
            config,
            "entropy",
            sums=entropy,
            maxima=expected,
            largest=largest,
            total=total,
            average=average,
            eps=potential.eps,
        )
        entropy += (average + potential.eps).log2()
        if self.partners is not None:
            entropy.view(-1, self.batch, self.length).masked_fill_(self.partners <= 0, 0.0)
        if with_grad:
            self.weight_sums = self._of_tokens()
            self.gradients = [self._empty_gradient() for _ in self.layers]
            self._row_sweep(
                config,
                "entropy_gradient",
                largest=largest,
                total=total,
                expected=expected,
                average=average,
                eps=potential.eps,
            )
        return self._sequence_sums(entropy, None)[0] / anchors, 1 / anchors

    # ---- from the sums to the loss and its gradient

    def finish(self, loss: Tensor, scale: Tensor, with_grad: bool) -> Losses:
        """The gradient through the row transform, and the factor of each token."""
        pairs = self._pairs
        empty = pairs == 0
        # Before it meets anything: where there is no pair it may be infinite.
        scale = (scale * self.epilogue.kappa).masked_fill(empty, 0.0).masked_fill(loss.isnan(), math.nan)
        penalty = None
        if isinstance(self.potential, L2Repel) and self.potential.norm_weight:
            penalty = self.potential.norm_weight / (self._paired_tokens.clamp(min=1) * self.features)
            loss = loss + penalty * self._sequence_sums(self.statistics.norm.square(), None)[0]
        # [rows, S] is [layers, batch] or [layers, S].
        loss = loss.masked_fill(empty, 0.0).view(len(self.layers), -1)
        pairs = pairs[: self.batch].flatten()
        if not with_grad:
            return Losses(loss, pairs, [], None)
        self._project()
        of_tokens = self._of_paired_tokens(scale)
        if self.epilogue.transform != "none":
            of_tokens *= self.statistics.inverse.view(of_tokens.shape)
            if self.statistics.weight_scale is not None:
                of_tokens /= self.statistics.weight_scale.view(len(self.layers), self.batch, 1)
        if penalty is not None:
            of_squares = self._of_paired_tokens(2 * penalty)
            for gradient, z, factor, of_square in zip(self.gradients, self.tokens, of_tokens, of_squares, strict=True):
                gradient.mul_(factor.unsqueeze(2)).addcmul_(z, of_square.unsqueeze(2))
            of_tokens = torch.ones_like(of_tokens)
        return Losses(loss, pairs, self.gradients, of_tokens)

    def _of_paired_tokens(self, of_sequences: Tensor) -> Tensor:
        """``[layers, batch, L]`` fp32 from ``[rows, S]``; 0 for tokens without a partner."""
        of_tokens = self._spread(of_sequences).float().reshape(len(self.layers), self.batch, self.length)
        return of_tokens if self.partners is None else of_tokens.masked_fill(self.partners <= 0, 0.0)

    def _project(self) -> None:
        block = tokens_of_a_program(self.arch)
        self._launch(
            kernels.project_kernel,
            (_blocks(self.length, block), self.rows),
            norm_ptr=self.statistics.norm,
            inverse_ptr=self.statistics.inverse,
            extra_ptr=self.statistics.extra,
            weight_sums_ptr=self.statistics.norm if self.weight_sums is None else self.weight_sums,
            gradients=tuple(self.gradients),
            TRANSFORM=self.epilogue.transform,
            BLOCK_M=block,
            BLOCK_F=min(512, _power_of_two(self.features)),
            num_warps=4,
        )

    # ---- sequences of a row: one, or the segments of cu_seqlens

    @functools.cached_property
    def _pairs(self) -> Tensor:
        """``[rows, S]`` int64: the ordered pairs of each sequence, the diagonal counted if it counts."""
        with_itself = int(getattr(self.potential, "include_diagonal", False))
        if self.partners is None:
            count = self.length * (self.length - 1 + with_itself)
            return torch.full((self.rows, 1), count, dtype=torch.int64, device=self.device)
        return self._over_sequences((self.partners + with_itself).masked_fill(self.partners <= 0, 0))

    @functools.cached_property
    def _paired_tokens(self) -> Tensor:
        """``[rows, S]`` fp64: the tokens with a partner."""
        if self.partners is None:
            return torch.full((self.rows, 1), float(self.length), dtype=torch.float64, device=self.device)
        return self._over_sequences((self.partners > 0).long()).double()

    def _over_sequences(self, of_token: Tensor) -> Tensor:
        """``[rows, S]``: sums of integers ``[batch, L]``."""
        if self.segment is None:
            sums = of_token.sum(1, keepdim=True)
        else:
            sums = torch.zeros(1, self.sequences, dtype=torch.int64, device=self.device)
            sums.index_add_(1, self.segment, of_token)
        return sums.repeat(len(self.layers), 1)

    def _spread(self, of_sequences: Tensor) -> Tensor:
        """``[rows, L]`` from ``[rows, S]``."""
        if self.segment is None:
            return of_sequences.expand(self.rows, self.length)
        return of_sequences[:, self.segment]

    # ---- launches

    def _sequence_sums(self, sums: Tensor, maxima: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``[rows, S]``: totals in fp64 and, if asked, the exponent they are relative to."""
        sequences = self.sequences
        total = torch.empty(self.rows, sequences, dtype=torch.float64, device=self.device)
        shift = None if maxima is None else torch.empty(self.rows, sequences, dtype=torch.float32, device=self.device)
        if sequences == 0:
            return total, shift
        arguments = {
            "norm_ptr": self.statistics.norm,
            "sums_ptr": sums,
            "maxima_ptr": sums if maxima is None else maxima,
            "bounds_ptr": self.statistics.norm if self.cu_seqlens is None else self.cu_seqlens,
            "total_ptr": total,
            "shift_ptr": total if shift is None else shift,
            "length": self.length,
            "sums_stride": sums.shape[1],
            "ONLINE": maxima is not None,
            "HAS_BOUNDS": self.cu_seqlens is not None,
            "BLOCK": 1024,
        }
        self.run(kernels.sequence_sums_kernel, (sequences, self.rows), arguments, {"num_warps": 4})
        return total, shift

    def _pair_tiles(
        self,
        config: TileConfig,
        sums: Tensor,
        maxima: Tensor | None,
        rows: int,
        programs: int,
        *,
        tiles_i: int,
        tiles_j: int = 0,
        triangle: bool = True,
        shift: Tensor | None = None,
        first_row: int = 0,
        first_i: int = 0,
        first_j: int = 0,
        first_sum: int = 0,
        weights: Tensor | None = None,
        mirror: Tensor | None = None,
    ) -> Any:
        statistics, groups = self.statistics, self.groups
        unused = statistics.norm
        return self._launch(
            kernels.pair_tiles_kernel,
            (programs, rows),
            **self._epilogue_arguments(),
            inverse_ptr=statistics.inverse,
            weight_inverse_ptr=statistics.weight_inverse,
            extra_ptr=statistics.extra,
            shift_ptr=unused if shift is None else shift,
            groups_ptr=unused if groups is None else groups,
            group_range_ptr=unused if groups is None else self._ranges_of_groups(groups, config.block),
            weights_ptr=unused if weights is None else weights,
            mirror_ptr=unused if mirror is None else mirror,
            weights_row_stride=0 if weights is None else weights.stride(0),
            weights_stride=0 if weights is None else weights.stride(1),
            sums_ptr=sums,
            maxima_ptr=sums if maxima is None else maxima,
            sums_stride=sums.shape[1],
            first_sum=first_sum,
            first_row=first_row,
            first_i=first_i,
            first_j=first_j,
            tiles_i=tiles_i,
            tiles_j=tiles_j,
            ONLINE=maxima is not None,
            HAS_SHIFT=shift is not None,
            HAS_GROUPS=groups is not None,
            WRITE=weights is not None,
            TRIANGLE=triangle,
            BLOCK=config.block,
            BLOCK_K=config.block_k,
            EVEN_K=self.features % config.block_k == 0,
            PRECISION=self.precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def _ranges_of_groups(self, groups: Tensor, block: int) -> Tensor:
        """Kept, because a row in blocks is many launches."""
        if block not in self._group_ranges:
            self._group_ranges[block] = _group_ranges(groups, block)
        return self._group_ranges[block]

    def _tile_config(self) -> TileConfig:
        config = tile_config(self.arch, self.dtype, self.precision, self.groups is not None)
        if not tuning.enabled(self.device):
            return config
        # As many whole tiles of as many rows as the workspace holds.
        tokens = min(self.length, math.isqrt(WORKSPACE_BYTES // self.dtype.itemsize)) // 128 * 128
        if tokens == 0:
            return config
        rows = min(self.rows, WORKSPACE_BYTES // (tokens**2 * self.dtype.itemsize))

        def launch(candidate: TileConfig) -> Any:
            workspace = torch.empty(rows, tokens, tokens, dtype=self.dtype, device=self.device)
            tiles = tokens // candidate.block
            programs = _triangle(tiles)
            sums, _ = self._partial_sums(programs)
            return self._pair_tiles(
                candidate, sums, None, rows, programs, tiles_i=tiles, weights=workspace, mirror=workspace
            )

        return tuning.best(self._tuning_key("swept"), tile_candidates(config), launch)

    def _tuning_key(self, strategy: str) -> str:
        device = torch.cuda.get_device_name(self.device)
        groups = "groups" if self.groups is not None else "whole"
        bucket = tuning.length_bucket(self.length)
        what = (strategy, self.potential.name(), self.dtype, self.precision, self.features, bucket, groups)
        return "; ".join(map(str, (device, f"Triton {triton.__version__}", *what)))

    def _row_config(self) -> RowConfig:
        perplexity = isinstance(self.potential, PerplexityEntropy)
        return row_config(self.arch, self.dtype, self.precision, self.features, perplexity)

    def _row_sweep(
        self,
        config: RowConfig,
        which: str,
        *,
        sums: Tensor | None = None,
        maxima: Tensor | None = None,
        shift: Tensor | None = None,
        largest: Tensor | None = None,
        total: Tensor | None = None,
        expected: Tensor | None = None,
        average: Tensor | None = None,
        eps: float | None = None,
    ) -> Any:
        statistics, groups = self.statistics, self.groups
        unused = statistics.norm
        with_grad = which in ("gradient", "entropy_gradient")
        slices = _blocks(self.features, config.block_f) if with_grad else 1
        weight_sums = self.weight_sums if with_grad else None
        arguments = self._epilogue_arguments()
        if eps is not None:
            arguments["p2"] = eps
        return self._launch(
            kernels.row_sweep_kernel,
            (_blocks(self.length, config.block_m), self.rows, slices),
            **arguments,
            inverse_ptr=statistics.inverse,
            weight_inverse_ptr=statistics.weight_inverse,
            extra_ptr=statistics.extra,
            shift_ptr=unused if shift is None else shift,
            groups_ptr=unused if groups is None else groups,
            tile_range_ptr=unused if groups is None else _tile_ranges(groups, config.block_m, config.block_n),
            largest_ptr=unused if largest is None else largest,
            total_ptr=unused if total is None else total,
            expected_ptr=unused if expected is None else expected,
            average_ptr=unused if average is None else average,
            sums_ptr=unused if sums is None else sums,
            maxima_ptr=unused if maxima is None else maxima,
            weight_sums_ptr=unused if weight_sums is None else weight_sums,
            gradients=tuple(self.gradients) if with_grad else (unused,) * len(self.layers),
            PASS=which,
            HAS_SHIFT=shift is not None,
            HAS_GROUPS=groups is not None,
            SUM_WEIGHTS=weight_sums is not None,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            BLOCK_F=config.block_f,
            RESIDENT=config.resident,
            EVEN_K=self.features % config.block_k == 0,
            PRECISION=self.precision,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def _epilogue_arguments(self) -> dict[str, Any]:
        epilogue = self.epilogue
        return dict(
            **{f"p{n}": value for n, value in enumerate(epilogue.p)},
            FUNCTION=epilogue.function,
            OWN=epilogue.own,
            EXPONENTIAL=epilogue.exponential,
            TRANSFORM=epilogue.transform,
        )

    def _launch(self, kernel: Any, grid: tuple[int, ...], *, num_warps: int, num_stages: int = 3, **rest: Any) -> Any:
        """A kernel that reads the tokens."""
        stride_b, stride_l, stride_f = self.layers[0].stride()
        arguments = dict(
            layers=tuple(self.layers),
            stride_b=stride_b,
            stride_l=stride_l,
            stride_f=stride_f,
            batch=self.batch,
            length=self.length,
            features=self.features,
            LAYERS=len(self.layers),
            **rest,
        )
        return self.run(kernel, grid, arguments, {"num_warps": num_warps, "num_stages": num_stages})

    def _partial_sums(self, columns: int) -> tuple[Tensor, Tensor | None]:
        sums = torch.empty(self.rows, columns, dtype=torch.float32, device=self.device)
        return sums, torch.empty_like(sums) if self.epilogue.online else None

    def _of_tokens(self) -> Tensor:
        return torch.empty(self.rows, self.length, dtype=torch.float32, device=self.device)

    def _empty_gradient(self) -> Tensor:
        return torch.empty(self.batch, self.length, self.features, dtype=torch.float32, device=self.device)


def _precision(dtype: torch.dtype, arch: str) -> str:
    """How the kernels multiply fp32: as PyTorch's matrix products do. 16-bit products are exact anyway."""
    if dtype != torch.float32 or arch.startswith("gfx"):
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _product_(out: Tensor, weights: Tensor, z: Tensor, add: bool) -> None:
    """``out (+)= weights @ z`` with an fp32 result of 16-bit factors."""
    if out.dtype == z.dtype:
        if add:
            torch.baddbmm(out, weights, z, out=out)
        else:
            torch.bmm(weights, z, out=out)
    elif out.device.type == "cuda" and not torch.version.hip:
        if add:
            torch.ops.aten.baddbmm.dtype_out(out, weights, z, torch.float32, out=out)
        else:
            torch.ops.aten.bmm.dtype_out(weights, z, torch.float32, out=out)
    else:
        _product_(out, weights.float(), z.float(), add)


def _runs_of_layers(begin: int, end: int, batch: int) -> list[tuple[int, int]]:
    """The rows ``begin`` to ``end``, cut where a layer ends."""
    cuts = [begin, *range((begin // batch + 1) * batch, end, batch), end]
    return list(itertools.pairwise(cuts))


def _dense(groups: Tensor) -> Tensor:
    """``groups`` as int32 in the same order: equal where they were, negative where they were."""
    ordered = groups.sort(dim=1).values
    return torch.searchsorted(ordered, groups.contiguous()).int().masked_fill_(groups < 0, -1)


def _group_ranges(groups: Tensor, block: int) -> Tensor:
    """``[B, tiles, 2]``: the least and the largest group of each tile of tokens."""
    padded = torch.nn.functional.pad(groups, (0, -groups.shape[1] % block), value=-1).unflatten(1, (-1, block))
    least = padded.masked_fill(padded < 0, _NO_GROUP).amin(2)
    return torch.stack([least, padded.amax(2)], 2)


def _tile_ranges(groups: Tensor, block_m: int, block_n: int) -> Tensor:
    """``[B, tiles, 2]``: the first tile of ``block_n`` tokens that each tile of ``block_m`` may pair with, and one past
    the last."""
    of_i, of_j = _group_ranges(groups, block_m).unsqueeze(2), _group_ranges(groups, block_n).unsqueeze(1)
    meets = (of_i[..., 0] <= of_j[..., 1]) & (of_j[..., 0] <= of_i[..., 1])
    number = torch.arange(meets.shape[2], dtype=torch.int32, device=groups.device)
    first = torch.where(meets, number, meets.shape[2]).amin(2)
    end = torch.where(meets, number + 1, 0).amax(2)
    return torch.stack([first, end], 2).int()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _triangle(tiles: int) -> int:
    """The programs of ``pair_tiles_kernel`` for the upper triangle of so many tiles, folded to a rectangle."""
    return _blocks(tiles, 2) * (tiles + 1)


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
