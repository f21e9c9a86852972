"""Report of the machine and the installation for bug reports: ``python -m dispersion_kernels.env_report``."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from dispersion_kernels import __version__, supported
from dispersion_kernels.backends import cpu
from dispersion_kernels.backends.registry import triton_version


def report() -> str:
    """Text with the versions, processor, threads, kernels built at install, and each backend's support or lack of it
    with the reason."""
    z = torch.zeros(1, 2, 2)
    build = cpu.build_info()
    built = "not built: " + str(build.get("reason"))
    if build.get("native"):
        built = f"built by {build.get('compiler')} for {', '.join(build.get('isas', []))}, using {cpu.isa() or 'none'}"
    cuda = build.get("cuda") or {}
    cuda_built = f"not built: {cuda.get('reason', 'no build information')}"
    if cuda.get("built"):
        architectures = ", ".join(cuda.get("architectures", []))
        cuda_built = f"built by {cuda.get('compiler')} against PyTorch {cuda.get('torch')} for {architectures}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    lines = [
        f"dispersion-kernels: {__version__}",
        f"python: {sys.version.split()[0]} on {platform.platform()}",
        f"torch: {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        f"processor: {processor()}, {os.cpu_count()} logical cores",
        f"CPU kernel: {built}",
        f"CUDA kernels: {cuda_built}",
        f"CUDA: {torch.version.cuda}, ROCm: {torch.version.hip}, {device}",
        f"triton: {triton_version() or 'not installed'}",
    ]
    for impl in ("triton", "cuda", "cpu", "torch", "reference"):
        support = supported(impl, z.cuda() if impl in ("triton", "cuda") and torch.cuda.is_available() else z)
        lines.append(f'impl="{impl}": ' + ("yes" if support else f"no: {support.reason}"))
    return "\n".join(lines)


def processor() -> str:
    """Name of the processor with its family and model, because clouds give several processors the same name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    # Reversed, so that the first core's fields are kept.
    found = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    if "model name" not in found:
        return platform.processor() or platform.machine()
    if "cpu family" not in found:
        return found["model name"]
    return f"{found['model name']} (family {found['cpu family']}, model {found['model']})"


if __name__ == "__main__":
    print(report())
