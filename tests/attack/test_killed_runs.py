"""Runs of `dispersion-gpt2` that are killed at random moments and resumed, and end as one that was not.

ATTACK_SECONDS sets how long each test goes on.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from gpt2_runs import command_line, computed, metrics

from dispersion_kernels.gpt2 import train

for library in ("tokenizers", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(library)
if os.name == "nt":
    pytest.skip("signals of POSIX", allow_module_level=True)
pytestmark = [pytest.mark.attack, pytest.mark.timeout(3600)]

SECONDS = float(os.environ.get("ATTACK_SECONDS", 75))
STEPS = [
    "--steps",
    "40",
    "--warmup",
    "5",
    "--eval-interval",
    "10",
    "--save-interval",
    "1",
    "--dispersion-weight",
    "0.5",
]
KINDS = {
    "bytes": [*STEPS, "--dropout", "0.2", "--dispersion-tokens", "5", "--accumulate", "2"],
    # Text that takes a while to tokenise, and hidden states of which a share of the pairs is visited.
    "bpe": [*STEPS, "--tokenizer", "bpe", "--vocab-size", "400", "--context", "64", "--pairs", "0.25"],
}


def run_main(argv: list[str], log: str) -> None:
    """In a process of its own, forked from one that has imported PyTorch."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    sys.exit(train.main(argv))


def ended(out: Path) -> tuple[dict, list[dict], dict]:
    """What a finished run has written that does not depend on the clock."""
    results = json.loads((out / "results.json").read_text())
    kept = {name: results[name] for name in ("validation_loss", "cosine_before", "cosine_after", "tokens")}
    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    # SHA-256 of every weight and moment, verified against them in the last resume.
    sums = {name: checkpoint["checksums"][name] for name in ("model", "optimizer", "step", "config", "data")}
    return kept, computed(metrics(out)), sums


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_until_done(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpt2_runs", "dispersion_kernels.gpt2.train", "matplotlib.figure", "tqdm"])
    whole = command_line(tmp_path, tmp_path / "whole", *KINDS[kind])
    if kind == "bpe":
        for i in range(30):
            (tmp_path / "texts" / f"{i}.txt").write_text("".join(f"{i} times {j} is {i * j}.\n" for j in range(1500)))

    def start(argv: list[str]) -> multiprocessing.Process:
        process = context.Process(target=run_main, args=(argv, str(tmp_path / "log")))
        process.start()
        return process

    start(["--help"]).join()  # the first one waits for PyTorch
    began = time.monotonic()
    process = start(whole)
    process.join()
    duration = time.monotonic() - began
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    expected = ended(tmp_path / "whole")

    random.seed(f"killed {kind}")
    counts: Counter[str] = Counter()
    while time.monotonic() - began < SECONDS:
        counts["runs"] += 1
        folder = tmp_path / str(counts["runs"])
        folder.mkdir()
        (folder / "texts").symlink_to(tmp_path / "texts")
        out = folder / "out"
        plain = command_line(folder, out, *KINDS[kind])
        while True:
            argv = ["--resume", "--out", str(out)] if (out / "checkpoint.pt").exists() else plain
            process = start(argv)
            process.join(random.expovariate(4 / duration))
            number = random.choice([signal.SIGKILL] * 7 + [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
            if process.is_alive():
                os.kill(process.pid, number)
                process.join()
                counts[number.name] += 1
                # Before it listens, a signal has its way; after the last step there is nothing left to stop.
                assert process.exitcode in (-number, 128 + number, 0), (tmp_path / "log").read_text()
                counts["saved"] += process.exitcode == 128 + number
            else:
                assert process.exitcode == 0, (tmp_path / "log").read_text()
            if process.exitcode == 0:
                break
        assert ended(out) == expected, f"run {counts['runs']}"
        assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))
        assert [path.name.split("-")[0] for path in (folder / "cache").iterdir()] == [kind]
    print(f"\n{kind}: a run of {duration:.1f} s; {dict(counts)}")
    assert counts["SIGKILL"] > 2
