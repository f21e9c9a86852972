"""The CPU kernel under the address, undefined-behaviour and thread sanitizers.

tests/sanitizers/driver.cpp calls it without PyTorch at sizes around the panels and compares with float64."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512", *AVX2]
X86 = {"kernels_avx2": AVX2, "kernels_avx512": AVX512}
KERNELS: dict[str, dict[str, list[str]]] = {"x86_64": X86, "aarch64": {"kernels_neon": []}}
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fno-math-errno", "-ffp-contract=fast", "-DDK_GUARDED"]

pytestmark = [
    pytest.mark.sanitizers,
    pytest.mark.skipif(not (ROOT / "csrc" / "cpu").exists(), reason="needs the sources of the CPU kernel"),
    pytest.mark.skipif(platform.machine() not in KERNELS or sys.platform != "linux", reason="built on Linux alone"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
]


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
    sources = {f"csrc/cpu/{name}": [] for name in ("call", "dispersion", "sampled")}
    sources |= {f"csrc/cpu/{name}": isa for name, isa in KERNELS[platform.machine()].items()}
    sources |= {f"tests/sanitizers/{name}": [] for name in ("driver", "exact")}

    def compiled(name: str) -> str:
        out = str(tmp_path / f"{Path(name).name}.o")
        command = ["g++", *FLAGS, "-Wno-psabi", *flags, *sources[name], "-c", str(ROOT / f"{name}.cpp"), "-o", out]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    driver = str(tmp_path / "driver")
    subprocess.run(["g++", *flags, *objects, "-pthread", "-o", driver], check=True)
    result = subprocess.run([driver, str(step), str(threads)], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " calls, " in result.stdout
