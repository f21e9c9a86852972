"""Wheels with the CPU kernel, without a compiler, and with the kernel turned off: what each says of itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"DISPERSION_KERNELS_SKIP_NATIVE": "1"}, "DISPERSION_KERNELS_SKIP_NATIVE was set"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler (tried $CXX (no-such-compiler))"),
        ({}, None),
    ],
)
def test_wheel(environment: dict[str, str], reason: str | None, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    source = tmp_path / "source"
    # The sources alone: what a build left in the tree must not help this one.
    left_by_builds = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "_build_info.json")
    for folder in ("csrc", "dispersion_kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=left_by_builds)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    built = subprocess.run(
        [*pip, str(source)], env=os.environ | environment, check=False, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert (installed / "dispersion_kernels" / "py.typed").exists()
    report = subprocess.run(
        [sys.executable, "-m", "dispersion_kernels.env_report"],
        env=os.environ | {"PYTHONPATH": str(installed)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    if reason is None and "CPU kernel: not built" in report:
        pytest.skip("no C++ compiler here")
    if reason is None:
        assert "py3-none-any" not in wheel.name
        assert wheel.name.startswith("dispersion_kernels-0.1.0-py3-none-")
        assert 'impl="cpu": yes' in report
    else:
        assert wheel.name == "dispersion_kernels-0.1.0-py3-none-any.whl"
        assert f"not built: {reason}" in report
        assert 'impl="cpu": no' in report
        loss = "import torch, dispersion_kernels as d; print(float(d.fused_dispersion_loss(torch.ones(1, 3, 2))))"
        subprocess.run(
            [sys.executable, "-c", loss], env=os.environ | {"PYTHONPATH": str(installed)}, check=True, cwd=tmp_path
        )
