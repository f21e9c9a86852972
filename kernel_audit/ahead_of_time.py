"""Ahead-of-time compilation of the Triton kernels that the launcher launches, without a GPU.

Launches are recorded from the launcher itself, on CPU tensors and without running a kernel, and are specialised as
Triton does at a call, so that the compiled kernels are those that would run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dispersion_kernels.backends.gpu import launch
from dispersion_kernels.backends.triton.backend import TritonKernels
from dispersion_kernels.potentials import Potential
from kernel_audit.shipped import calls

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """Recorded launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Specialization:
    """Specialisation of a kernel that Triton compiles for a launch."""

    signature: dict[str, Any]
    constexprs: dict[str, Any]
    divisible: tuple[tuple[int, ...], ...]
    """Paths of the arguments that 16 divides."""


@dataclass(frozen=True)
class Variant:
    """One kernel in one shipped configuration."""

    kernel: Any
    label: str
    arch: str
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    divisible: tuple[tuple[int, ...], ...]
    options: dict[str, int]
    tile: tuple[int, int]
    """Rows and columns of a tile, in tokens; the pairs of a tile are one pass over the epilogue."""
    features: int
    tensor_flops: float
    """FLOPs per tile of matrix products in the kernel."""
    library_flops: float
    """FLOPs per tile of the library's products that belong to the tile."""
    trips: dict[int, float]
    """Executions per tile of the code at each depth of loops."""
    tensor_kind: str
    """Pattern of the tensor-core instruction that the assembly must have; empty for none."""


def compile_variant(variant: Variant) -> Any:
    """Kernel of ``variant``, compiled by Triton for its architecture."""
    return compile_for(
        variant.kernel,
        Specialization(variant.signature, variant.constexprs, variant.divisible),
        variant.arch,
        variant.options,
    )


def compile_for(kernel: Any, specialization: Specialization, arch: str, options: dict[str, int]) -> Any:
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=specialization.signature,
        constexprs={(names.index(name),): value for name, value in specialization.constexprs.items()},
        attrs={path: [["tt.divisibility", 16]] for path in specialization.divisible},
    )
    nvidia = arch.startswith("sm_")
    target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})


def specialize(kernel: Any, arguments: dict[str, Any]) -> Specialization:
    """Specialisation of Triton's launcher for these arguments: their types, the integers that are 1, and the integers
    and addresses that 16 divides."""
    signature: dict[str, Any] = {}
    constexprs: dict[str, Any] = {}
    divisible: list[tuple[int, ...]] = []
    for number, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(f"*{_TYPES[tensor.dtype]}" for tensor in value)
            divisible += [(number, n) for n, tensor in enumerate(value) if tensor.data_ptr() % 16 == 0]
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            divisible += [(number,)] if value.data_ptr() % 16 == 0 else []
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        elif value == 1:
            signature[parameter.name], constexprs[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [(number,)] if value % 16 == 0 else []
    return Specialization(signature, constexprs, tuple(divisible))


def record(
    layers: list[Tensor],
    potential: Potential,
    pair_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    with_grad: bool,
    arch: str,
    precision: str | None = None,
    sms: int | None = None,
    max_seqlen: int | None = None,
) -> list[Launch]:
    """Launches of a call on ``arch`` and, with ``with_grad``, of its backward; none of them is run."""
    launches: list[Launch] = []

    def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> None:
        launches.append(Launch(kernel, grid, arguments, options))

    def kernels(z: Tensor) -> TritonKernels:
        return TritonKernels(z, arch, precision, run, sms)

    requested = [with_grad] * len(layers)
    loss, gradients, scale = launch.run(kernels, layers, pair_ids, cu_seqlens, potential, "mean", requested, max_seqlen)
    if scale is not None:
        launch.finish(kernels, gradients, layers, scale, loss, potential, layers[0].dtype)
    return launches


def shipped(arch: str, every: bool = False) -> list[Variant]:
    """Kernels of every potential in bf16, and of angular_spread in every dtype, for few and for many features, with and
    without pair ids; with ``every``, the kernels of every potential in every dtype, each once."""
    variants: dict[tuple[Any, ...], Variant] = {}
    for variant in _recorded(arch, every):
        constexprs = {name: str(value) for name, value in variant.constexprs.items()}
        same = (variant.kernel, str(variant.signature), str(constexprs), variant.divisible, str(variant.options))
        variants.setdefault(same if every else (variant.label,), variant)
    return list(variants.values())


def _recorded(arch: str, every: bool) -> Iterator[Variant]:
    for call in calls(every):
        if call.precision == "tf32" and arch.startswith("gfx"):
            continue
        for recorded in record(
            call.layers,
            call.potential,
            call.pair_ids,
            call.cu_seqlens,
            call.with_grad,
            arch,
            call.precision,
            max_seqlen=call.max_seqlen,
        ):
            yield _variant(recorded, call.name, arch, call.layers[0])


def _variant(recorded: Launch, potential: str, arch: str, z: Tensor) -> Variant:
    arguments, features = recorded.arguments, z.shape[2]
    specialization = specialize(recorded.kernel, arguments)
    name = recorded.kernel.__name__.removesuffix("_kernel").replace("_", " ")
    has_pair_ids = ", pair ids" if arguments.get("HAS_PAIR_IDS") else ""
    dtype = arguments["PRECISION"] if z.dtype == torch.float32 and "PRECISION" in arguments else _TYPES[z.dtype]
    layers = f", {arguments['LAYERS']} layers" if arguments.get("LAYERS", 1) > 1 else ""
    length = f", L={z.shape[1]}" if z.shape[1] % 16 else ""
    what = f"{potential}, {dtype}, F={features}{length}{layers}{has_pair_ids}"
    if "pair tiles" in name:
        block, block_k = arguments["BLOCK"], arguments["BLOCK_K"]
        products = 2.0 * block * block * features
        part = "loss and weights" if arguments["WRITE"] else "loss"
        extras = ", online" if arguments["ONLINE"] else ", shift" if arguments["HAS_SHIFT"] else ""
        extras += ", band" if arguments["BAND"] else ""
        label, tile, flops = (
            f"{name}, {part}{extras}, {what}",
            (block, block),
            # The product with a band is a kernel of its own.
            (products, 2 * products * (arguments["WRITE"] and not arguments["BAND"])),
        )
        trips = {0: 1.0, 1: features / block_k}
    elif "band product" in name:
        block, block_f = arguments["BLOCK"], arguments["BLOCK_F"]
        label, tile, flops = f"{name}, {what}", (block, block), (2.0 * block * block * block_f, 0.0)
        # The code outside of the loop over tiles is charged to the tiles of 1,024 tokens together.
        trips = {0: block / 1024, 1: block / arguments["BLOCK_K"]}
    elif "row sweep" in name:
        block_m, block_n, block_f = arguments["BLOCK_M"], arguments["BLOCK_N"], arguments["BLOCK_F"]
        gradient_flops = 2.0 * block_m * block_n * block_f if "gradient" in arguments["PASS"] else 0.0
        products = 2.0 * block_m * block_n * features
        shift = ", shift" if arguments["HAS_SHIFT"] else ""
        label, tile, flops = (
            f"{name}, {arguments['PASS']}{shift}, {what}",
            (block_m, block_n),
            (products + gradient_flops, 0.0),
        )
        # The code outside of the loop over tiles is charged to the tiles of 1,024 tokens together.
        trips = {0: block_n / 1024, 1: 1.0, 2: features / arguments["BLOCK_K"]}
    else:
        transform = arguments.get("TRANSFORM", "")
        label = f"{name}, {transform}, {_TYPES[z.dtype]}{layers}" if transform else f"{name}"
        label += ", online" if arguments.get("ONLINE") else ""
        tile, flops, trips = (arguments.get("BLOCK_M", 1), 1), (0.0, 0.0), {0: 1.0, 1: 1.0}
    return Variant(
        kernel=recorded.kernel,
        label=label,
        arch=arch,
        signature=specialization.signature,
        constexprs=specialization.constexprs,
        divisible=specialization.divisible,
        options=recorded.options,
        tile=tile,
        features=features,
        tensor_flops=flops[0],
        library_flops=flops[1],
        trips=trips,
        tensor_kind=_tensor_kind(arch, tile[0]) if flops[0] else "",
    )


def _tensor_kind(arch: str, rows: int) -> str:
    """Pattern of the tensor-core instruction for a tile of ``rows`` rows; the wider instructions take 64 rows."""
    if arch.startswith("gfx"):
        return "v_mfma"
    if arch == "sm_90" and rows >= 64:
        return "HGMMA"
    if arch == "sm_100" and rows >= 64:
        return "UTC[A-Z]*MMA"
    return "HMMA"
