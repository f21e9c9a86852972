"""Builds the CPU kernel (csrc/cpu) and, where it can, the CUDA kernels (csrc/cuda); all else is in pyproject.toml.

The CPU kernel is a shared library with a plain C interface. It needs a C++17 compiler (``$CXX``, or c++, g++, clang++)
and no PyTorch; ``CPPFLAGS``, ``CFLAGS``, ``CXXFLAGS`` and ``LDFLAGS`` are passed to it. Without a compiler, or with
``DISPERSION_KERNELS_SKIP_NATIVE=1``, the package installs without it, and says so at its first call on a CPU.

The CUDA kernels need nvcc and a CUDA build of PyTorch that setup.py can import: ``pip install --no-build-isolation``.
``DISPERSION_KERNELS_BUILD_CUDA=1`` makes their absence an error, ``=0`` leaves them out; ``TORCH_CUDA_ARCH_LIST`` says
for which architectures. They are compiled against PyTorch's stable ABI, so the wheel serves other versions, too.

A release is built with ``DISPERSION_KERNELS_REPOSITORY``, the URL of the sources, which its description then links to.

What was built, or the reason why not, is printed and kept in ``_build_info.json``, which
``python -m dispersion_kernels.env_report`` shows.
"""

import functools
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc" / "cpu"
CUDA_SOURCES = ROOT / "csrc" / "cuda"
PACKAGE = "dispersion_kernels"
INFO = "_build_info.json"
LIBRARY = "_native_cpu" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512", *AVX2]
# The kernel's AVX2 version has no AVX-512, which -march=native in CXXFLAGS would give it.
X86: dict[str, list[str]] = {"avx2": [*AVX2, "-mno-avx512f"], "avx512": AVX512}
ARM: dict[str, list[str]] = {"neon": []}
ISAS = {"x86_64": X86, "amd64": X86, "arm64": ARM, "aarch64": ARM}


# The first PyTorch that the CUDA kernels run under: 2.10, as TORCH_TARGET_VERSION writes it.
TORCH_TARGET_VERSION = 0x020A << 48


@dataclass
class CudaInfo:
    built: bool
    reason: str | None = None
    compiler: str | None = None
    torch: str | None = None
    architectures: list[str] = field(default_factory=list)


@dataclass
class BuildInfo:
    native: bool
    reason: str | None = None
    compiler: str | None = None
    isas: list[str] = field(default_factory=list)
    cuda: CudaInfo = field(default_factory=lambda: CudaInfo(built=False))


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
        raise SkipNative("DISPERSION_KERNELS_SKIP_NATIVE was set when the package was built")
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
        error = re.search(r"\berror: (.+)", result.stdout)
        raise SkipNative(
            f"{version} failed to compile it ({error[1] if error else 'no reason given'}): set CXX to another compiler "
            f"and build the package again (`ninja -C {directory}` repeats what failed)"
        )
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
    raise SkipNative(f"no C++ compiler (tried {tried}{windows}): install g++ or clang++ and build the package again")


def find_ninja() -> str:
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            raise SkipNative("ninja is missing: `pip install ninja` and build the package again") from None
        return found
    return str(Path(ninja.BIN_DIR) / "ninja")


def ninja_file(compiler: list[str], clang: bool, isas: dict[str, list[str]]) -> str:
    given = {name: shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CFLAGS", "CXXFLAGS", "LDFLAGS")}
    defaults = ["-O3", "-Wall", "-Wextra"]
    # Flags that the kernel needs whatever the environment says. Contracting a * b + c is wanted; -ffast-math is not,
    # because NaN must stay NaN.
    needed = ["-std=c++17", "-fvisibility=hidden", "-fno-fast-math", "-fno-math-errno", "-ffp-contract=fast"]
    if sys.platform != "win32":
        needed.append("-fPIC")
    if not clang:
        # GCC's own AVX-512 headers trip maybe-uninitialized (GCC bug 105593). Predictive commoning carries the left
        # factor of a product with short rows from step to step, through the stack.
        needed += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-fno-predictive-commoning"]
    sources: dict[str, list[str]] = {name: [] for name in ("call", "cosines", "dispersion", "moments", "sampled")} | {
        f"kernels_{isa}": isa_flags for isa, isa_flags in isas.items()
    }
    # The C interface alone: the standard library's templates are visible whatever -fvisibility says, and would be
    # merged with another library's.
    exports = SOURCES / "exports.map"
    exported = {"win32": [], "darwin": ["-Wl,-exported_symbol,_dk_*"]}.get(
        sys.platform, [f"-Wl,--version-script={exports}"]
    )

    def path(file: Path) -> str:
        return re.sub(r"([ :$])", r"$\1", str(file))

    def words(flags: list[str]) -> str:
        return shlex.join(flags).replace("$", "$$")

    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {words(compiler)}",
        f"flags = {words([*defaults, *given['CPPFLAGS'], *given['CFLAGS'], *given['CXXFLAGS'], *needed])}",
        f"link_flags = {words([*given['LDFLAGS'], *exported])}",
        "rule compile",
        "  command = $cxx $flags $isa_flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # -O3, because with -Ofast GCC links code that makes subnormal numbers 0 for the whole process.
        "  command = $cxx $flags -O3 -shared $in -o $out $link_flags",
    ]
    for name, isa_flags in sources.items():
        lines += [f"build {name}.o: compile {path(SOURCES / name)}.cpp", f"  isa_flags = {words(isa_flags)}"]
    objects = " ".join(f"{name}.o" for name in sources)
    lines += [f"build {LIBRARY}: link {objects} | {path(exports)}", f"default {LIBRARY}", ""]
    return "\n".join(lines)


class SkipCuda(Exception):
    """Why the package is installed without the CUDA kernels."""


@functools.cache
def cuda_extension() -> tuple[CudaInfo, Extension | None]:
    """How to build the CUDA kernels; says why where they cannot be had."""
    wanted = os.environ.get("DISPERSION_KERNELS_BUILD_CUDA", "")
    try:
        if wanted == "0":
            raise SkipCuda("DISPERSION_KERNELS_BUILD_CUDA=0 was set")
        return _cuda_extension()
    except SkipCuda as skip:
        if wanted not in ("", "0"):
            raise SystemExit(
                f"dispersion_kernels: DISPERSION_KERNELS_BUILD_CUDA={wanted} was set, but {skip}"
            ) from None
        print(f"dispersion_kernels: installing without the CUDA kernels: {skip}", file=sys.stderr)
        return CudaInfo(built=False, reason=str(skip)), None


def _cuda_extension() -> tuple[CudaInfo, Extension]:
    if sys.platform != "linux":
        raise SkipCuda("they are built on Linux alone")
    root = find_toolkit()
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        raise SkipCuda(
            "PyTorch cannot be imported while building: install a CUDA build of it and give pip --no-build-isolation"
        ) from None
    if torch.version.cuda is None:
        raise SkipCuda(f"PyTorch {torch.__version__} is no CUDA build; install one (pytorch.org says how)")
    if root is None:
        raise SkipCuda(
            f"there is no nvcc: install the CUDA toolkit {torch.version.cuda}, or set CUDA_HOME to where it is"
        )
    nvcc = nvcc_version(root)
    check_versions(nvcc, torch.version.cuda, torch.__version__)
    library = next(iter(sorted(root.glob("**/libcudart_static.a"))), None)
    if library is None:
        raise SkipCuda(f"{root} has no libcudart_static.a: install the toolkit's cudart development package")
    # Before PyTorch reads it.
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_architectures(nvcc)
    os.environ["TORCH_CUDA_ARCH_LIST"] = with_hopper(wanted)
    defines = [f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET_VERSION:016x}ULL", "-DUSE_CUDA"]
    extension = cpp_extension.CppExtension(
        f"{PACKAGE}._cuda",
        [str(source.relative_to(ROOT)) for source in sorted(CUDA_SOURCES.glob("*.c*")) if source.suffix != ".cuh"],
        include_dirs=[str(root / "include")],
        # The runtime is linked in, and of PyTorch nothing that only its CUDA builds have: the library loads anywhere.
        extra_objects=[str(library)],
        libraries=["dl", "rt", "pthread"],
        extra_compile_args={
            "cxx": ["-std=c++17", "-O2", "-fvisibility=hidden", *defines],
            "nvcc": ["-std=c++17", "-O3", "--threads=2", *defines],
        },
        py_limited_api=True,
    )
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";").split(";")
    return CudaInfo(True, None, f"nvcc {nvcc}", torch.__version__, architectures), extension


def find_toolkit() -> Path | None:
    """Where the CUDA toolkit is; PyTorch is told, too, which would guess by where nvcc is, and that may be a script."""
    root = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not root and (nvcc := shutil.which("nvcc")):
        result = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-"], input="", capture_output=True, text=True)
        found = re.search(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
        root = str(Path(found[1]).resolve()) if found else str(Path(nvcc).resolve().parent.parent)
    if not root or not (Path(root) / "bin" / "nvcc").exists():
        return None
    os.environ["CUDA_HOME"] = root
    return Path(root)


def nvcc_version(root: Path) -> str:
    result = subprocess.run([str(root / "bin" / "nvcc"), "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", result.stdout)
    if found is None:
        raise SkipCuda(f"{root / 'bin' / 'nvcc'} --version failed")
    return found[1]


def check_versions(nvcc: str, cuda: str, torch: str) -> None:
    if nvcc.split(".")[0] != cuda.split(".")[0]:
        raise SkipCuda(
            f"nvcc is of CUDA {nvcc} and PyTorch {torch} of CUDA {cuda}: install a PyTorch built for CUDA "
            f"{nvcc.split('.')[0]}, or set CUDA_HOME to a toolkit {cuda}"
        )


def default_architectures(nvcc: str) -> str:
    """A GPU runs what was compiled for an older one of its generation (8.0 serves 8.6 and 8.9), and PTX of any older
    one, which the driver compiles when it is first used. Hopper has kernels of its own in 9.0a, which runs on it alone.
    """
    major, minor = map(int, nvcc.split("."))
    return "8.0+PTX;9.0a" + (";10.0;12.0+PTX" if (major, minor) >= (12, 8) else "")


def with_hopper(architectures: str) -> str:
    """``TORCH_CUDA_ARCH_LIST`` with 9.0a where it has 9.0, as that of many images: without, the kernels of Hopper's
    copy engine and wgmma would be missing, and nothing would say so."""
    named = re.split(r"[ ;]+", architectures.strip(" ;"))
    if "9.0a" in {name.removesuffix("+PTX") for name in named} or not {"9.0", "9.0+PTX", "Hopper"} & set(named):
        return architectures
    print(f"dispersion_kernels: TORCH_CUDA_ARCH_LIST={architectures} lacks 9.0a, Hopper's own: added", file=sys.stderr)
    return ";".join([*named, "9.0a"])


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
        info = replace(info, cuda=cuda_extension()[0])
        (package / INFO).write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        names = [INFO, LIBRARY] if native_library()[0].native else [INFO]
        return [*super().get_outputs(include_bytecode), *(str(Path(self.build_lib, PACKAGE, name)) for name in names)]


class BdistWheel(bdist_wheel):
    """One wheel for every Python 3: the libraries use no Python interface."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return native_library()[0].native or cuda_extension()[1] is not None


def build_ext_command() -> Any:
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension.with_options(no_python_abi_suffix=True)


def description() -> str:
    """README.md. A package index shows no image that has a relative address: where ``DISPERSION_KERNELS_REPOSITORY``
    is the URL of the sources, images and links lead to its files at the tag of this version."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    repository = os.environ.get("DISPERSION_KERNELS_REPOSITORY", "").rstrip("/")
    if not repository:
        return text

    def absolute(link: re.Match[str]) -> str:
        return f"{link[1]}({repository}/{'raw' if link[0][0] == '!' else 'blob'}/v{version()}/{link[2]})"

    return re.sub(r"(!?\[[^]]*\])\((?!https?://|#)([^)\s]+)\)", absolute, text)


def version() -> str:
    return str(runpy.run_path(str(ROOT / PACKAGE / "_version.py"))["__version__"])


def main() -> None:
    repository = os.environ.get("DISPERSION_KERNELS_REPOSITORY")
    commands: dict[str, Any] = {"build_py": BuildPy, "bdist_wheel": BdistWheel}
    extension = cuda_extension()[1]
    if extension is not None:
        commands["build_ext"] = build_ext_command()
    setup(
        distclass=BinaryDistribution,
        cmdclass=commands,
        ext_modules=[extension] if extension else [],
        long_description=description(),
        long_description_content_type="text/markdown",
        project_urls={"Source": repository} if repository else {},
    )


if __name__ == "__main__":
    main()
