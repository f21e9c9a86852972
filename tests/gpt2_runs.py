"""What the tests of `dispersion-gpt2` share: tiny runs, in this process and in their own, and what they wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

TINY = ["--layers", "2", "--width", "16", "--heads", "2", "--context", "16", "--tokenizer", "bytes", "--device", "cpu"]
SHORT = ["--steps", "6", "--warmup", "2", "--batch-size", "2", "--lr", "0.01", "--validation-windows", "5"]
OFTEN = ["--log-interval", "1", "--eval-interval", "3", "--save-interval", "3"]
ENDLESS = ["--steps", "100000", "--eval-interval", "100000", "--save-interval", "100000"]

TIMED = ("tokens_per_second", "processor_seconds", "peak_memory_bytes")


def command_line(folder: Path, out: Path, *more: str) -> list[str]:
    """A tiny run in `out`, with texts and cache in `folder`; later options win."""
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir()
        for i in range(30):
            (texts / f"{i}.txt").write_text(f"{i} is followed by {i + 1}, and {i + 1} by {i + 2}.\n" * 8)
    data = ["--data", str(texts), "--cache", str(folder / "cache"), "--out", str(out)]
    return [*data, *TINY, *SHORT, *OFTEN, *more]


def child(arguments: list[str], *, ranks: int = 1, **options: object) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "dispersion_kernels.gpt2.train", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **{**defaults, **options},
    )


def wait_for_step(process: subprocess.Popen[str], out: Path) -> None:
    """Until the run has written the metrics of a step."""
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text()) < 100:
        assert time.monotonic() < deadline, "no step in a minute"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def computed(lines: list[dict]) -> list[dict]:
    """What must not depend on the clock or the machine."""
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def assert_same_weights(one: Path, two: Path, **tolerance: float) -> None:
    for (name, first), second in zip(weights(one).items(), weights(two).values(), strict=True):
        torch.testing.assert_close(
            first, second, rtol=tolerance.get("rtol", 0), atol=tolerance.get("atol", 0), msg=name
        )


def refusal(capsys, arguments: list[str]) -> str:
    """What the command says of options or files that it does not take."""
    from dispersion_kernels.gpt2 import train

    try:
        code = train.main(arguments)
    except SystemExit as exit:  # argparse
        code = exit.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert "dispersion-gpt2: error: " in error
    assert "Traceback" not in error
    said = error.split("dispersion-gpt2: error: ")[1]
    assert said.count("\n") == 1, "more than a line"
    return said
