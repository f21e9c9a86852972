"""The CPU kernel under the address, undefined-behaviour and thread sanitizers, and its NEON version in an emulator.

tests/sanitizers/driver.cpp calls it without PyTorch at sizes around the panels and compares with float64."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512", *AVX2]
X86 = {"kernels_avx2": AVX2, "kernels_avx512": AVX512}
NEON: dict[str, list[str]] = {"kernels_neon": []}
KERNELS = {"x86_64": X86, "aarch64": NEON}
FLAGS = ["-std=c++17", "-g", "-fno-omit-frame-pointer", "-fno-math-errno", "-ffp-contract=fast", "-DDK_GUARDED"]

pytestmark = [
    pytest.mark.sanitizers,
    pytest.mark.skipif(not (ROOT / "csrc" / "cpu").exists(), reason="needs the sources of the CPU kernel"),
    pytest.mark.skipif(sys.platform != "linux", reason="built on Linux alone"),
]


@pytest.mark.skipif(platform.machine() not in KERNELS, reason=f"the kernel has no version for {platform.machine()}")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize(
    ("flags", "step", "threads"),
    [
        (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], 16, 2),
        (["-fsanitize=thread"], 48, 4),
    ],
    ids=["address,undefined", "thread"],
)
def test_sanitizers(flags: list[str], step: int, threads: int, tmp_path: Path) -> None:
    """No access out of bounds, no undefined behaviour, no race, right numbers, and the same bits with any number of
    threads."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    linked = subprocess.run(["g++", *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True, text=True)
    if linked.returncode or subprocess.run([tmp_path / "probe"], capture_output=True).returncode:
        pytest.skip(f"g++ has no library for {flags[0]}, or it does not run here: {linked.stderr.strip()[-200:]}")
    drive([driver("g++", ["-O1", *flags], KERNELS[platform.machine()], tmp_path)], step, threads)


def test_neon(tmp_path: Path) -> None:
    """Allocations end at pages that nobody may touch; arrays on the stack have bounds that are checked."""
    compiler, emulator = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip(
            f"there is no {compiler if emulator else 'qemu-aarch64'} (Debian: g++-aarch64-linux-gnu, qemu-user)"
        )
    flags = ["-O2", "-static", "-fsanitize=bounds", "-fsanitize-undefined-trap-on-error", "-fstack-protector-all"]
    output = drive([emulator, driver(compiler, flags, NEON, tmp_path)], 16, 1)
    assert output.startswith("neon ")


def driver(compiler: str, flags: list[str], kernels: dict[str, list[str]], directory: Path) -> str:
    sources = {f"csrc/cpu/{name}": [] for name in ("call", "cosines", "moments", "dispersion", "sampled")}
    sources |= {f"csrc/cpu/{name}": isa for name, isa in kernels.items()}
    sources |= {f"tests/sanitizers/{name}": [] for name in ("driver", "exact")}

    def compiled(name: str) -> str:
        out = str(directory / f"{Path(name).name}.o")
        command = [compiler, *FLAGS, "-Wno-psabi", *flags, *sources[name], "-c", str(ROOT / f"{name}.cpp"), "-o", out]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    program = str(directory / "driver")
    subprocess.run([compiler, *flags, *objects, "-pthread", "-o", program], check=True)
    return program


def drive(command: list[str], step: int, threads: int) -> str:
    """Output of the driver: a line per failed call, and the count."""
    result = subprocess.run([*command, str(step), str(threads)], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " calls, " in result.stdout
    return result.stdout
