"""Helpers of the tests of sweeps: tiny TOML files, and the command in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TINY = """
[defaults]
data = ["text.txt"]
layers = 2
width = 16
heads = 2
context = 16
tokenizer = "bytes"
steps = 6
warmup = 2
batch-size = 2
lr = 0.01
validation-windows = 5
log-interval = 1
eval-interval = 3
"""


def sweep_file(folder: Path, experiments: str, defaults: str = TINY) -> Path:
    (folder / "text.txt").write_text("".join(f"{i} is followed by {i + 1}.\n" for i in range(2000)))
    file = folder / "sweep.toml"
    file.write_text(defaults + experiments)
    return file


def sweep_process(file: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "dispersion_kernels.command",
            "sweep",
            str(file),
            "--out",
            str(file.parent / "out"),
            "-j2",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(file.parent / "xdg")},
    )


def sweep(file: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a sweep of two runs at a time, each on a core."""
    process = sweep_process(file, *arguments)
    out, error = process.communicate(timeout=300)
    assert "Traceback" not in out + error, error
    return process.returncode, out, error
