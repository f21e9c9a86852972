"""The kernels of the CUDA extension for the static report, recorded from the launcher's launches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from dispersion_kernels.backends import cuda
from dispersion_kernels.backends.gpu import launch
from kernel_audit.shipped import Call, calls


@dataclass(frozen=True)
class Variant:
    """One kernel at one number of features; fields as in :class:`kernel_audit.ahead_of_time.Variant`, and some more."""

    label: str
    arch: str
    kernel: str
    tile: tuple[int, int]
    options: dict[str, int]
    shared: int
    """Bytes of dynamic shared memory."""
    precision: str
    """Key of the device's rate for the kernel's products; empty without products."""
    warps: int
    """Warps that multiply and run the epilogue; the wgmma kernels have others, which copy."""
    tensor_flops: float = 0.0
    library_flops: float = 0.0
    trips: dict[int, float] = field(default_factory=lambda: dict.fromkeys(range(4), 1.0))
    other_trips: dict[int, float] = field(default_factory=dict)
    """Trips, by depth, of loops without tensor instructions, where they differ from ``trips``."""
    tensor_kind: str = ""


def shipped(arch: str, every: bool = False) -> list[Variant]:
    """Kernels of :func:`kernel_audit.shipped.calls`, each once per number of features."""
    variants = {variant.label: variant for call in calls(every) for variant in _launched(call, arch)}
    return list(variants.values())


def _launched(call: Call, arch: str) -> Iterator[Variant]:
    launches: list[cuda.Launch] = []
    with cuda.watch_launches(launches.append, arch):
        kernels = cuda.CudaKernels(call.layers[0], call.precision or "tf32x3")
        found = launch.dispersion(call.layers, call.potential, call.pair_ids, call.cu_seqlens, call.with_grad, kernels)
        if found.scale is not None:
            one, dtype = torch.tensor(1.0), call.layers[0].dtype
            launch.finish(lambda _: kernels, found.gradients, call.layers, found.scale, one, call.potential, dtype)
    for launched in launches:
        yield _variant(launched, arch, call.layers[0].shape[2])


def _variant(launched: cuda.Launch, arch: str, features: int) -> Variant:
    name, warps = launched.kernel, launched.threads // 32
    common: dict[str, Any] = {"arch": arch, "kernel": name, "shared": launched.shared}
    if not name.startswith(("dk_pair_tiles", "dk_row_sweep")):
        options = {"num_warps": warps}
        return Variant(name, tile=(1, 1), options=options, precision="", warps=warps, **common)
    element = name.split("_")[3]
    common |= {
        "label": f"{name}, F={features}",
        "options": {"num_warps": warps, "num_stages": 3},
        "precision": "tf32" if element.startswith("tf32") else "16-bit",
    }
    size = 4 if element.startswith("tf32") else 2
    if name.startswith("dk_row_sweep"):
        tile = 64, 32 if size == 4 else 64
        width = min(features, launched.grid[2] and -(-features // launched.grid[2])) if "gradient" in name else 0
        flops = 2.0 * tile[0] * tile[1]
        return Variant(
            **common,
            tile=tile,
            warps=warps,
            tensor_flops=flops * (features + width),
            # The code outside of the loop over tiles is charged to the tiles of 1,024 tokens together; the rows of
            # panels have 128 bytes.
            trips={0: tile[1] / 1024, 1: 1.0, 2: features * size / 128},
            tensor_kind="HMMA",
        )
    wgmma = name.endswith("_wgmma")
    block, multiplying = 64 if size == 4 else 128, warps // 2 if wgmma else warps
    flops = 2.0 * block * block * features
    return Variant(
        **common,
        tile=(block, block),
        warps=multiplying,
        tensor_flops=flops,
        library_flops=2 * flops * name.removesuffix("_wgmma").endswith("_write"),
        trips={0: 1.0, 1: features * size / (128 if wgmma or size == 4 else 64), 2: 1.0},
        # The loop that stores slopes, 16 bytes at a time, is unrolled by four.
        other_trips={1: block * block * size / 16 / (32 * multiplying) / 4},
        tensor_kind="HGMMA" if wgmma else "HMMA",
    )
