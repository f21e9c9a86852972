"""The tile sizes of the Triton kernels by architecture, dtype and number of features.

No configuration may spill a register on its architecture: ``python -m kernel_audit.static_report --every --check``
compiles them all.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class TileConfig:
    """Configuration of ``pair_tiles_kernel``."""

    block: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowConfig:
    """Configuration of ``row_sweep_kernel``. Without ``single_slice``, ``block_f`` is the width of a slice of the
    gradient."""

    block_m: int
    block_n: int
    block_k: int
    block_f: int
    single_slice: bool
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class BandConfig:
    """Configuration of ``band_product_kernel``; its tiles have as many tokens as those of the slopes."""

    block_k: int
    block_f: int
    num_warps: int
    num_stages: int


_INTERPRETER = "interpreter"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")


def architecture(device: torch.device) -> str:
    """Column of the table for a device: its own architecture, or the nearest older one in the table."""
    if device.type == "cpu":
        return _INTERPRETER
    if torch.version.hip:
        name = str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
        return name if name in ARCHITECTURES else "gfx90a"
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch in ARCHITECTURES if arch.startswith("sm_") and int(arch[3:]) <= 10 * major + minor]
    return max(known, key=lambda arch: int(arch[3:]), default="sm_80")


def tokens_of_a_program(arch: str) -> int:
    """Tokens per program of the kernels that read each token by itself."""
    return 128 if arch == _INTERPRETER else 4


def padded_width(features: int) -> int:
    """Least power of two that is at least ``features`` and at least 16, as blocks of features are."""
    return max(16, 1 << (features - 1).bit_length())


def tile_config(
    arch: str, dtype: torch.dtype, precision: str, has_pair_ids: bool, band_of: str | None = None
) -> TileConfig:
    """Configuration for similarities over the upper triangle of tiles, or over a band of them with the epilogue
    ``band_of``."""
    if arch == _INTERPRETER:
        return TileConfig(32, 32, 1, 1)
    if band_of == "angular_spread_narrow" and dtype != torch.float32 and arch in ("sm_90", "sm_100"):
        # Smaller tiles would wait for the L2 cache; elsewhere they pay, since they leave out more.
        return TileConfig(128, 64, 8, 3)
    if has_pair_ids or (arch == "gfx90a" and dtype != torch.float32):
        # Smaller tiles: the mask of a 128 x 128 tile takes all remaining registers (on gfx90a, the scalar ones).
        if precision == "tf32x3":
            return TileConfig(64, 16 if arch == "sm_120" and band_of is not None else 32, 8, 3)
        more_warps = arch == "sm_120" or (arch == "sm_100" and precision == "tf32" and band_of is not None)
        return TileConfig(64, 32 if dtype == torch.float32 else 64, 8 if more_warps else 4, 3)
    if dtype != torch.float32:
        return TileConfig(128, 64, 8, 3)
    if precision == "tf32":
        return TileConfig(128, 32, 8, 3)
    # Eight warps on sm_100: lengths that 16 does not divide take a few registers more than four warps have.
    return TileConfig(64, 32, 8 if arch == "sm_100" and precision == "tf32x3" else 4, 2)


def row_config(
    arch: str, dtype: torch.dtype, precision: str, features: int, perplexity: bool, gradient: bool
) -> RowConfig:
    """Configuration for a tile of tokens against all others, with a gradient or for the loss alone."""
    width = padded_width(features)
    amd = arch.startswith("gfx")
    if arch == _INTERPRETER:
        return RowConfig(32, 32, 32, min(width, 64), width <= 64, 1, 1)
    if dtype == torch.float32:
        # Few warps: more than a tile has rows for multiply the same numbers twice. Two probabilities per pair need the
        # registers of more, no single slice, and on sm_100 fewer columns. One stage where two leave too few registers.
        few_registers = arch == "sm_100" and precision == "tf32x3"
        warps = 8 if gradient and (precision == "tf32" or (perplexity and not amd)) else 4
        stages = 1 if amd or few_registers else 2
        single_slice = width <= 64 and precision != "tf32x3" and (gradient or precision != "tf32") and not perplexity
        columns = 16 if few_registers and perplexity and gradient else 32
        return RowConfig(64, columns, 32, min(width, 64), single_slice, warps, stages)
    if perplexity:
        # In slices: the tokens of a single slice leave too few registers for two probabilities per pair.
        if arch == "sm_100":
            return RowConfig(64, 32, 64, min(width, 128), False, 4, 2)
        return RowConfig(64, 32 if arch == "sm_80" else 64, 64, min(width, 128), False, 8, 2)
    if width <= 128 and gradient:
        if amd:
            return RowConfig(64, 32, 64, width, True, 4, 1)
        return RowConfig(64, 32 if arch == "sm_100" else 64, 64, width, True, 4, 2)
    # Narrow tiles for the loss alone on sm_100, where wide ones spill with pair ids.
    return RowConfig(64, 32 if arch == "sm_100" and not gradient else 64, 64, 256, False, 8, 2)


def band_config(arch: str, dtype: torch.dtype, precision: str, features: int, block: int) -> BandConfig:
    """Configuration for the product of the slopes of a band and the tokens."""
    width = padded_width(features)
    if arch == _INTERPRETER:
        return BandConfig(32, min(width, 64), 1, 1)
    if dtype == torch.float32:
        return BandConfig(32, min(width, 64 if precision == "tf32x3" else 128), 4, 2)
    if block == 128:
        return BandConfig(64, min(width, 128), 8, 3) if arch == "sm_100" else BandConfig(32, min(width, 256), 8, 3)
    # Eight warps on sm_120: lengths that 16 does not divide take a few registers more than four warps have.
    return BandConfig(32, min(width, 256), 8 if arch == "sm_120" else 4, 2 if arch.startswith("gfx") else 3)


def tile_candidates(config: TileConfig) -> list[TileConfig]:
    """Configurations that tuning tries; the table's comes first."""
    grid = itertools.product((64, 128), (32, 64), (4, 8), (2, 3, 4))
    return [config, *(other for other in (TileConfig(*cell) for cell in grid) if other != config)]


def row_candidates(config: RowConfig) -> list[RowConfig]:
    """As :func:`tile_candidates`; the width of a slice stays the same, because it determines the amount of work."""
    grid = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    others = (replace(config, block_m=m, block_n=n, num_warps=w, num_stages=s) for m, n, w, s in grid)
    return [config, *(other for other in others if other != config)]
