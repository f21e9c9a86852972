"""Loss and gradient of a long sequence under a memory ceiling, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scale

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 6144

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the ceiling is measured in /proc, which only Linux has"
)


def in_a_process(length: int, impl: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.scale", str(length), impl]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_a_long_sequence_stays_under_the_ceiling(impl: str) -> None:
    child = in_a_process(LENGTH, impl)
    assert child.returncode == 0, child.stderr
    row = json.loads(child.stdout.splitlines()[-1])
    # One similarity matrix alone would break it.
    assert row["peak_bytes"] <= row["ceiling_bytes"] < row["matrix_bytes"] / 3
    assert row["row_error"] < 1e-5
    assert row["loss_error"] < 1e-2


def test_the_naive_version_does_not() -> None:
    child = in_a_process(LENGTH, "reference")
    assert child.returncode != 0
    assert "allocate memory" in child.stderr


def test_a_wrong_gradient_or_loss_is_found() -> None:
    z = scale.torch.randn(300, 8, requires_grad=True)
    loss = scale.fused_dispersion_loss(z)
    loss.backward()
    assert z.grad is not None
    scale.check_rows(z.detach(), loss.detach(), z.grad, rows=300)
    with pytest.raises(RuntimeError, match="relative error of their gradient"):
        scale.check_rows(z.detach(), loss.detach(), z.grad * 1.0001, rows=300)
    with pytest.raises(RuntimeError, match="300 tokens: the loss is"):
        scale.check_rows(z.detach(), loss.detach() + 0.5, z.grad, rows=300)
