"""Report of the machine and the installation for bug reports: ``python -m dispersion_kernels.env_report``."""

from __future__ import annotations

import os
import platform
import sys

import torch

from dispersion_kernels import __version__, supported
from dispersion_kernels.backends import cpu, triton_version


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
        f"processor: {platform.processor() or platform.machine()}, {os.cpu_count()} logical cores",
        f"CPU kernel: {built}",
        f"CUDA kernels: {cuda_built}",
        f"CUDA: {torch.version.cuda}, ROCm: {torch.version.hip}, {device}",
        f"triton: {triton_version() or 'not installed'}",
    ]
    for impl in ("triton", "cuda", "cpu", "torch", "reference"):
        support = supported(impl, z.cuda() if impl in ("triton", "cuda") and torch.cuda.is_available() else z)
        lines.append(f'impl="{impl}": ' + ("yes" if support else f"no: {support.reason}"))
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
