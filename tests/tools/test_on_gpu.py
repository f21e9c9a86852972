"""The command that shows everything on a GPU, where there is none: its stages, its report, its exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.on_gpu import Stage


def _stage(name: str, code: str, reason: str | None = None) -> Stage:
    command = [sys.executable, "-c", code, "{out}"]
    return Stage(name, f"what {name} shows", "nothing", lambda: reason, command, {"ANSWER": "42"}, lines=2)


def test_stages_and_their_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = _stage("passes", "import os, sys; print(f'first\\nsecond\\n{sys.argv[1]} {os.environ[\"ANSWER\"]}')")
    fails = _stage("fails", "print('one\\ntwo\\nthree'); raise SystemExit(7)")
    hangs = _stage("hangs", "import time; print('began', flush=True); time.sleep(60)")
    skipped = _stage("skipped", "", "no CUDA device")
    monkeypatch.setattr(on_gpu, "STAGES", [passes, fails, hangs, skipped])
    monkeypatch.setattr(on_gpu, "SECONDS", 1)
    on_gpu.main(["--out", str(tmp_path), "--stage", "passes", "skipped"])
    report = (tmp_path / "report.md").read_text()
    assert "| passes | what passes shows | passed |" in report
    assert "| skipped | what skipped shows | skipped: no CUDA device |" in report
    assert "| fails | what fails shows | not run yet |" in report
    assert f"second\n{tmp_path.resolve()} 42\n" in report
    assert "\nfirst\n" not in report
    assert f"torch: {torch.__version__}" in report
    with pytest.raises(SystemExit) as exit:
        on_gpu.main(["--out", str(tmp_path), "--stage", "fails", "hangs"])
    assert exit.value.code == 1
    report = (tmp_path / "report.md").read_text()
    assert "| passes | what passes shows | passed |" in report  # of the run before
    assert "| fails | what fails shows | failed: exit status 7 |" in report
    assert "one\ntwo\nthree" in report  # all of what failed
    assert "| hangs | what hangs shows | stopped: not done after" in report
    assert "began" in report
    assert json.loads((tmp_path / "hangs.json").read_text())["seconds"] < 30
    with pytest.raises(SystemExit):
        on_gpu.main(["--out", str(tmp_path), "--stage", "nothing"])
    assert "there is none of that name; there are passes, fails, hangs, skipped" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_runs_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_gpu.main(["--out", str(tmp_path)])
    report = (tmp_path / "report.md").read_text()
    assert len(on_gpu.STAGES) == len({stage.name for stage in on_gpu.STAGES}) == report.count("skipped: no CUDA device")
    on_gpu.main(["--list"])
    listed = capsys.readouterr().out
    assert all(f"{stage.name}: {stage.what}. Needs {stage.needs}. no CUDA device" in listed for stage in on_gpu.STAGES)
