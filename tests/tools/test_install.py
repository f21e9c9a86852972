"""What pip builds: wheels by every compiler, without one, and with the kernel turned off, and what each says of
itself."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.wheel


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The sources alone: what a build left in the tree must not help another."""
    source = tmp_path / "source"
    left_by_builds = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "_build_info.json")
    for folder in ("csrc", "dispersion_kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=left_by_builds)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    return source


def build(source: Path, environment: dict[str, str]) -> tuple[str, Path]:
    """The name of the wheel, and where it is unpacked."""
    out = source.parent / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(out)]
    result = subprocess.run([*command, str(source)], env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = out.glob("*.whl")
    installed = source.parent / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert (installed / "dispersion_kernels" / "py.typed").exists()
    return wheel.name, installed


def run(installed: Path, *arguments: str) -> str:
    """What Python prints there, on either stream."""
    result = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=installed,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"DISPERSION_KERNELS_SKIP_NATIVE": "1"}, "DISPERSION_KERNELS_SKIP_NATIVE was set when the package was built"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler (tried $CXX (no-such-compiler)): install g++ or clang++"),
        ({"CXXFLAGS": "--no-such-option"}, "failed to compile it ("),
    ],
    ids=["skipped", "no_compiler", "compiler_fails"],
)
def test_without_the_kernel(source: Path, environment: dict[str, str], reason: str) -> None:
    """A wheel for every platform, which says why and what to do: once, where the kernel is missed."""
    name, installed = build(source, environment)
    if "CXXFLAGS" in environment and "no C++ compiler" in run(installed, "-m", "dispersion_kernels.env_report"):
        pytest.skip("no C++ compiler here")
    assert name == "dispersion_kernels-0.1.0-py3-none-any.whl"
    report = run(installed, "-m", "dispersion_kernels.env_report")
    assert "CPU kernel: not built: " in report
    assert reason in report
    assert 'impl="cpu": no' in report
    output = run(
        installed,
        "-c",
        "import torch, dispersion_kernels as d; z = torch.ones(1, 3, 2); d.fused_dispersion_loss(z, impl='torch'); "
        "print('none yet', flush=True); [d.fused_dispersion_loss(z) for _ in range(3)]",
    )
    assert output.startswith("none yet")
    assert output.count("UserWarning: dispersion_kernels computes in plain PyTorch") == 1
    assert reason in output


@pytest.mark.skipif(sys.platform == "win32", reason="runs a shell script as the compiler")
def test_flags_of_the_environment(source: Path, tmp_path: Path) -> None:
    """They reach every command; -Ofast leaves NaN what it is, and the process its subnormal numbers, and -march=native
    puts no AVX-512 into the AVX2 kernels."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler here")
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    compiling = {"CPPFLAGS": "-DA_CPPFLAG", "CFLAGS": "-DA_CFLAG", "CXXFLAGS": "-DA_CXXFLAG='a b $c' -Ofast"}
    if sys.platform == "linux":
        compiling["CXXFLAGS"] += " -march=native"
    name, installed = build(source, {"CXX": str(compiler), **compiling, "LDFLAGS": f"-L{tmp_path}"})
    assert name.startswith("dispersion_kernels-0.1.0-py3-none-")
    assert "py3-none-any" not in name
    assert 'impl="cpu": yes' in run(installed, "-m", "dispersion_kernels.env_report")
    commands = [line for line in log.read_text().splitlines() if "--version" not in line]
    assert len(commands) >= 5
    for command in commands:
        assert all(flag in command for flag in ("-DA_CPPFLAG", "-DA_CFLAG", "-DA_CXXFLAG=a b $c", "-Ofast")), command
        assert (f"-L{tmp_path}" in command) == ("-shared" in command), command
    output = run(
        installed,
        "-c",
        "import numpy, torch, dispersion_kernels as d; z = torch.ones(1, 3, 2); z[0, 0, 0] = torch.nan; "
        "print(d.fused_dispersion_loss(z, impl='cpu'), numpy.float32(1e-40) * numpy.float32(1) > 0)",
    )
    assert output.split() == ["tensor(nan)", "True"]
    if platform.machine() == "x86_64" and shutil.which("objdump"):
        (kernels,) = source.glob("build/native-*/kernels_avx2.o")
        assert (
            "zmm" not in subprocess.run(["objdump", "-d", kernels], check=True, capture_output=True, text=True).stdout
        )


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="needs nm, for ELF")
@pytest.mark.parametrize("compiler", ["g++", "clang++", "clang++-19"])
def test_compilers(source: Path, compiler: str) -> None:
    """The library exports the C interface alone, and computes."""
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    _, installed = build(source, {"CXX": compiler})
    assert 'impl="cpu": yes' in run(installed, "-m", "dispersion_kernels.env_report")
    library = installed / "dispersion_kernels" / "_native_cpu.so"
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True).stdout
    entries = {
        "dk_abi_version",
        "dk_cosines",
        "dk_dispersion",
        "dk_moments",
        "dk_resolve_isa",
        "dk_sampled",
        "dk_scale",
    }
    assert {line.split()[-1] for line in symbols.splitlines()} == entries
    output = run(
        installed,
        "-c",
        "import torch, dispersion_kernels as d; z = torch.randn(1, 600, 40)\n"
        "for sampling in (None, 1 / 4):\n"
        "    torch.manual_seed(0); a = d.fused_dispersion_loss(z, sampling=sampling, impl='cpu')\n"
        "    torch.manual_seed(0); b = d.fused_dispersion_loss(z, sampling=sampling, impl='torch')\n"
        "    print(abs(a - b).item() < 1e-6)",
    )
    assert output.split() == ["True", "True"], output
