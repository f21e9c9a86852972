"""`dispersion sweep` in processes: what is run, what is kept after a kill, what is said of failures."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from gpt2_runs import ENDLESS, child
from sweeps import TINY, sweep, sweep_file, sweep_process

from dispersion_kernels import command

for library in ("tokenizers", "tqdm", "matplotlib", "safetensors", "scipy"):
    pytest.importorskip(library)
if os.name == "nt":
    pytest.skip("signals of POSIX", allow_module_level=True)
pytestmark = pytest.mark.process

TWO = "[experiment.width]\nmlp-width = [8, 64]\ndispersion-weight = 0.5\n"
LONG = TINY + "save-interval = 10\n"
MANY_STEPS = "[experiment.long]\nsteps = 120\nmlp-width = [8, 64]\ndispersion-weight = 0.5\n"


def rows(file: Path) -> list[dict[str, Any]]:
    return json.loads((file.parent / "out" / "results.json").read_text())["rows"]


def computed(rows: list[dict[str, Any]]) -> list[Any]:
    """Columns of a row that do not depend on the clock."""
    return [[row["run"], row["curve"], row["cosine_by_layer"], row["validation_loss"]] for row in rows]


def finished(file: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (file.parent / "out").glob("*/finished.json")}


def test_a_sweep_and_a_larger_one(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, TWO)
    code, out, error = sweep(file)
    assert (code, "2 of 2 runs are finished" in out) == (0, True), out + error
    before = finished(file)
    with open(tmp_path / "out" / "results.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    for row, line in zip(rows(file), table, strict=True):
        folder = tmp_path / "out" / row["folder"]
        results = json.loads((folder / "results.json").read_text())
        metrics = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        assert row["validation_loss"] == results["validation_loss"] == float(line["validation_loss"])
        assert row["curve"]["step"] == [3, 6]
        assert row["curve"]["validation_loss"] == [metrics[2]["validation_loss"], metrics[5]["validation_loss"]]
        assert row["initial_cosine_by_layer"] == results["cosine_before"]
        assert [float(line["cosine_1"]), float(line["cosine_2"])] == results["cosine_after"]
        assert line["mlp-width"] == str(row["varied"]["mlp-width"])
        assert row["depth_trend"] == pytest.approx(1 if results["cosine_after"][1] > results["cosine_after"][0] else -1)
        assert not {"", "None"} & {line[name] for name in ("source", "version", "torch", "processor", "threads")}
        assert (folder / "model.safetensors").exists()
        assert not (folder / "checkpoint.pt").exists()

    file = sweep_file(tmp_path, TWO.replace("[8, 64]", "[64, 8, 32]"))
    code, out, _ = sweep(file, "--list")
    assert (code, out.count("finished "), out.count("to do")) == (0, 2, 1)
    code, out, _ = sweep(file)
    assert code == 0
    assert out.count("validation loss") == 1, "a finished run ran again"
    assert {**finished(file), **before} == finished(file)
    assert [row["varied"]["mlp-width"] for row in rows(file)] == [64, 8, 32]
    file = sweep_file(tmp_path, TWO.replace("[8, 64]", "[32]"))
    code, out, _ = sweep(file)
    assert code == 0
    assert "2 runs in" in out
    assert "of other settings, and stay out of the tables" in out
    assert [row["varied"]["mlp-width"] for row in rows(file)] == [32]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL of the sweep, whose runs live on, and of all its processes, at several moments."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = sweep_file(tmp_path / "whole", MANY_STEPS, LONG)
    began = time.monotonic()
    assert sweep(whole)[0] == 0
    duration = time.monotonic() - began
    killed = sweep_file(tmp_path / "killed", MANY_STEPS, LONG)
    seen: dict[str, int] = {}
    for share, everything in ((0.3, True), (0.35, False), (0.4, True), (0.6, True)):
        process = sweep_process(killed)
        time.sleep(share * duration)
        process.kill()
        process.communicate()
        if everything:
            for record in (tmp_path / "killed" / "out").glob("*/run.json"):
                kill_run(record.parent)
        assert seen.items() <= finished(killed).items(), "a finished run ran again"
        seen = finished(killed)
    code, out, error = sweep(killed)
    assert code == 0, out + error
    assert seen.items() <= finished(killed).items()
    assert computed(rows(killed)) == computed(rows(whole))


def kill_run(folder: Path) -> None:
    """Kills the trainer at work in ``folder``, which belongs to no process of ours any more."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(folder) in command and "dispersion_kernels.gpt2.train" in command:
            os.kill(int(process.name), signal.SIGKILL)


def test_a_stopped_sweep_saves_and_goes_on(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, MANY_STEPS.replace("120", "100000"), LONG)
    process = sweep_process(file)
    wait_for(lambda: len(list((tmp_path / "out").glob("*/metrics.jsonl"))) == 2, process)
    code, _, error = sweep(file)
    assert code == 2
    assert "another sweep is at work there; wait for its end, or stop it" in error
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "stopped: 0 of 2 runs are finished; the same command goes on" in out
    assert len(list((tmp_path / "out").glob("*/checkpoint.pt"))) == 2
    _, out, _ = sweep(file, "--list")
    assert out.count("begun") == 2


def wait_for(condition: Any, process: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def test_a_process_left_by_a_killed_sweep_is_waited_for(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, TWO.replace("[8, 64]", "8"))
    assert sweep(file)[0] == 0
    (expected,) = rows(file)
    folder = tmp_path / "out" / expected["folder"]
    for name in ("finished.json", "results.json", "metrics.jsonl", "model.safetensors"):
        (folder / name).unlink()
    options = [f"--{k}={v}" for k, v in expected["settings"].items() if k not in ("data", "steps")]
    data = ["--data", str(tmp_path / "text.txt"), "--cache", str(tmp_path / "xdg" / "dispersion-kernels")]
    # ENDLESS, because it saves no checkpoint, from which the sweep's run would go on.
    left = child(["--out", str(folder), "--seed=0", *data, *options, *ENDLESS])
    wait_for(lambda: (folder / "metrics.jsonl").exists(), left)
    process = sweep_process(file)
    time.sleep(4)
    assert process.poll() is None
    left.kill()
    left.communicate()
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, out + error
    assert computed(rows(file)) == computed([expected])


def test_failures_are_told_and_stop_nothing(tmp_path: Path) -> None:
    """A learning rate at which the loss overflows, a run that starts from such a run, and one that is well."""
    bad = "[experiment.rate]\nlr = [1e30, 0.01]\n[experiment.next]\ninit-from = {experiment = 'rate', lr = 1e30}\n"
    code, out, error = sweep(sweep_file(tmp_path, bad))
    assert code == 1
    assert "failed with exit status 2; its last lines:" in out
    assert "the loss is no longer finite" in out
    assert "not begun, because" in out
    assert "1 of 3 runs are finished" in out
    assert error.count("failed: ") == 2
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["settings"]["lr"] for row in results["rows"]] == [0.01]
    assert len(results["experiments"]["rate"]["missing"]) == 1


def test_other_code_and_other_defaults_are_told(tmp_path: Path) -> None:
    file = sweep_file(tmp_path, TWO)
    assert sweep(file)[0] == 0
    path = next((tmp_path / "out").glob("*/finished.json"))
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "source": "0" * 12}))
    code, out, _ = sweep(file)
    assert code == 0
    assert "finished runs are of other code than" in out
    assert {row["source"] for row in rows(file)} >= {"0" * 12}
    path.write_text(json.dumps({**row, "options": {**row["options"], "clip": 2.0}}))
    code, _, error = sweep(file)
    assert code == 2
    assert "was trained with clip = 2.0, the trainer's default then; now it is 1.0. Give clip in the file" in error


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """docs/sweeps.md from its TOML block to the sentences, with the first two seeds of each experiment."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```toml\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "texts").mkdir()
    file = sweep_file(tmp_path, "", re.sub(r"seed = \[(\d+, \d+)[^]]*\]", r"seed = [\1]", block))
    (tmp_path / "text.txt").rename(tmp_path / "texts" / "text.txt")
    code, out, error = sweep(file)
    assert code == 0, out + error
    assert command.main(["stats", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert [one["experiment"] for one in content] == ["mlp", "weight", "continued"]
    assert [len(one["comparisons"]) for one in content] == [0, 2, 2]
    assert all(len(answer["seeds"]) == 2 for one in content for answer in one["comparisons"] + one["trends"])
    assert "No difference can be shown by 2 seeds in 2 tests; it takes 7" in content[1]["comparisons"][0]["sentence"]
