"""Builds the CPU kernel (csrc/cpu) beside the Python package; everything else is in pyproject.toml.

The kernel is a shared library with a plain C interface. It needs a C++17 compiler (``$CXX``, or c++, g++, clang++) and
no PyTorch. Without a compiler, or with ``DISPERSION_KERNELS_SKIP_NATIVE=1``, the package installs without the kernel;
the reason is printed and kept in ``_build_info.json``, which ``dispersion_kernels.native`` reports.
"""

import functools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc" / "cpu"
PACKAGE = "dispersion_kernels"
INFO = "_build_info.json"
LIBRARY = "_native_cpu" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512", *AVX2]
X86: dict[str, list[str]] = {"avx2": AVX2, "avx512": AVX512}
ARM: dict[str, list[str]] = {"neon": []}
ISAS = {"x86_64": X86, "amd64": X86, "arm64": ARM, "aarch64": ARM}


@dataclass
class BuildInfo:
    native: bool
    reason: str | None = None
    compiler: str | None = None
    isas: list[str] = field(default_factory=list)


@functools.cache
def native_library() -> tuple[BuildInfo, Path]:
    """Compiles the CPU kernel once; says why where it cannot be had."""
    directory = ROOT / "build" / f"native-{sys.platform}-{platform.machine()}"
    library = directory / LIBRARY
    try:
        info = compile_library(directory)
    except SkipNative as skip:
        info = BuildInfo(native=False, reason=str(skip))
        print(f"dispersion_kernels: installing without the CPU kernel: {skip}", file=sys.stderr)
    return info, library


class SkipNative(Exception):
    """Why the package is installed without the kernel."""


def compile_library(directory: Path) -> BuildInfo:
    if os.environ.get("DISPERSION_KERNELS_SKIP_NATIVE", "0") not in ("", "0"):
        raise SkipNative("DISPERSION_KERNELS_SKIP_NATIVE was set")
    machine = platform.machine().lower()
    if machine not in ISAS:
        raise SkipNative(f"there is no CPU kernel for {machine or 'this processor'}")
    compiler, version = find_compiler()
    ninja = find_ninja()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "build.ninja").write_text(ninja_file(compiler, "clang" in version, ISAS[machine]), encoding="utf-8")
    result = subprocess.run([ninja, "-C", str(directory)], capture_output=True, text=True)
    if result.returncode:
        print(result.stdout, result.stderr, sep="\n", file=sys.stderr)
        raise SkipNative(f"{version} failed to compile it (`ninja -C {directory}` shows how)")
    return BuildInfo(native=True, compiler=version, isas=sorted(ISAS[machine]))


def find_compiler() -> tuple[list[str], str]:
    """The compiler's command and the first line of its ``--version``."""
    requested = os.environ.get("CXX")
    for command in [shlex.split(requested)] if requested else [["c++"], ["g++"], ["clang++"]]:
        if not shutil.which(command[0]):
            continue
        result = subprocess.run([*command, "--version"], capture_output=True, text=True)
        if result.returncode == 0 and result.stdout:
            return command, result.stdout.splitlines()[0]
    tried = f"$CXX ({requested})" if requested else "c++, g++ and clang++"
    windows = "; MSVC lacks the vector extensions it is written in" if sys.platform == "win32" else ""
    raise SkipNative(f"no C++ compiler (tried {tried}{windows})")


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            raise SkipNative("ninja is missing (`pip install ninja`)") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def ninja_file(compiler: list[str], clang: bool, isas: dict[str, list[str]]) -> str:
    # Contracting a * b + c is wanted; -ffast-math is not, because NaN must stay NaN.
    flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wextra"]
    if sys.platform != "win32":
        flags.append("-fPIC")
    if not clang:
        # GCC's own AVX-512 headers trip maybe-uninitialized (GCC bug 105593).
        flags += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
    sources: dict[str, list[str]] = {"dispersion": []} | {
        f"kernels_{isa}": isa_flags for isa, isa_flags in isas.items()
    }

    def path(file: Path) -> str:
        return re.sub(r"([ :$])", r"$\1", str(file))

    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {shlex.join(compiler)}",
        f"flags = {shlex.join(flags)}",
        "rule compile",
        "  command = $cxx $flags $isa_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared $in -o $out",
    ]
    for name, isa_flags in sources.items():
        lines += [f"build {name}.o: compile {path(SOURCES / name)}.cpp", f"  isa_flags = {shlex.join(isa_flags)}"]
    lines += [f"build {LIBRARY}: link {' '.join(f'{name}.o' for name in sources)}", f"default {LIBRARY}", ""]
    return "\n".join(lines)


class BuildPy(build_py):
    """Puts the library and ``_build_info.json`` into the package: the built one, or the source tree's if editable."""

    def run(self) -> None:
        super().run()
        info, library = native_library()
        package = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        target = package / LIBRARY
        target.unlink(missing_ok=True)
        if info.native:
            shutil.copyfile(library, target)
        (package / INFO).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        names = [INFO, LIBRARY] if native_library()[0].native else [INFO]
        return [*super().get_outputs(include_bytecode), *(str(Path(self.build_lib, PACKAGE, name)) for name in names)]


class BdistWheel(bdist_wheel):
    """One wheel for every Python 3: the library uses no Python interface."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return native_library()[0].native


setup(distclass=BinaryDistribution, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
