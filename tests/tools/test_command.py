"""Command ``dispersion``: what it writes is what was measured, and what it refuses is said in a line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dispersion_kernels import command, env_report
from dispersion_kernels.condensation import Condensation, Record, write_records
from dispersion_kernels.gpt2 import GPT2, GPT2Config, load_weights, save_weights
from dispersion_kernels.gpt2.text import Document

for library in ("scipy", "matplotlib", "tqdm", "safetensors"):
    pytest.importorskip(library)

PASSAGES = ["one two three four five", "a word, and another", "x" * 50]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Current folder with two models and a file of three documents, the last without white space."""
    for name, layers in (("small", 2), ("deep", 3)):
        torch.manual_seed(layers)
        model = GPT2(GPT2Config(layers=layers, width=16, heads=2, context=32, vocab=257))
        save_weights(model, tmp_path / "models" / name)
    (tmp_path / "text.txt").write_text("\n\0\n".join(PASSAGES), "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Line that the command says of what it does not do."""
    try:
        status = command.main(arguments)
    except SystemExit as exit:  # argparse
        status = exit.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2, error
    assert "Traceback" not in error
    said = error.split("error: ", 1)[1]
    assert said.count("\n") == 1, "more than a line"
    return said.strip()


def means_by_hand(model: Path, texts: list[str], length: int) -> list[float]:
    """Mean over texts of the mean of all pairs' cosines, of the embedding and of each block."""
    gpt2 = load_weights(model).eval()
    means = []
    for text in texts:
        ids = torch.tensor([list(text.encode())[:length]])
        with torch.no_grad():
            embedding = gpt2.wte(ids) + gpt2.wpe.weight[: ids.shape[1]]
            hidden = [embedding, *gpt2(ids, return_hidden=True).hidden]
        text_means = []
        for z in hidden:
            x = z[0].double().numpy()
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
            text_means.append((x @ x.T)[np.triu_indices(len(x), 1)].mean())
        means.append(text_means)
    return np.mean(means, 0).tolist()


def test_measure_writes_files_pictures_and_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--text", "text.txt", "--max-length", "16", "--initialised", "-o", "out"]
    assert command.main(["measure", "models/small", "models/deep", *arguments]) == 0
    files = ["deep-initialised.json", "deep.json", "small-initialised.json", "small.json"]
    assert sorted(path.name for path in Path("out").iterdir()) == ["curves.png", *files[:2], "heat_map.png", *files[2:]]
    printed = capsys.readouterr().out
    for name, layers in (("small", 2), ("deep", 3)):
        measured = Condensation.from_json(f"out/{name}.json")
        assert (measured.model, measured.texts, measured.initialised) == (f"models/{name}", 3, False)
        assert [layer.name for layer in measured.layers] == ["embedding", *(f"block {k + 1}" for k in range(layers))]
        means = [layer.all_tokens.mean for layer in measured.layers]
        assert means == pytest.approx(means_by_hand(Path("models", name), PASSAGES, 16), abs=1e-6)
        assert measured.summary() in printed
        last = printed.strip().splitlines()[-4:]
        row = next(line for line in last if line.startswith(f"models/{name} "))
        assert row.split()[1:5] == ["3", *(f"{x:.3f}" for x in (means[1], means[-1], np.mean(means[1:])))]
        other = Condensation.from_json(f"out/{name}-initialised.json")
        assert other.initialised
        assert other.layers != measured.layers


def test_passages_are_spread_evenly_and_keep_to_their_documents() -> None:
    random = np.random.default_rng(0)
    texts = [" ".join(str(n) for n in random.integers(0, 10**6, count)) for count in (5, 400, 0, 90)]
    documents = [Document(str(k), lambda text=text: f"\n{text} \n") for k, text in enumerate(texts)]
    every = command.passages(documents, 10**6, 50)
    assert "".join(every).replace(" ", "") == "".join(texts).replace(" ", "")  # nothing is lost or read twice
    for passage in every:
        assert len(passage) <= 50
        assert sum(f" {passage} " in f" {text} " for text in texts) == 1  # whole words, of one document
    assert command.passages(documents, 10, 50) == [every[k * len(every) // 10] for k in range(10)]
    assert command.passages([Document("a", lambda: "漢" * 120)], 9, 50) == ["漢" * 50, "漢" * 50, "漢" * 20]
    assert command.passages([Document("a", lambda: " \n ")], 9, 50) == []


def test_the_text_is_that_of_the_trainer_by_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "library").mkdir()
    (folder / "library" / "module.py").write_text("import this\n", "utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder / "library"))
    assert command.main(["measure", "models/small", "--layers", "1,2", "--format", "svg"]) == 0
    measured = Condensation.from_json("condensation/small.json")
    assert (measured.texts, measured.tokens) == (1, len("import this"))
    assert [layer.name for layer in measured.layers] == ["block 1", "block 2"]
    assert Path("condensation/heat_map.svg").read_text("utf-8").startswith("<?xml")


def test_a_model_that_cannot_be_measured_stops_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = folder / "models" / "damaged"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"damaged")
    (weights / "config.json").write_text('{"model_type": "gpt2"}')
    said = refusal(capsys, "measure", "models/damaged", "models/small", "--text", "text.txt", "-o", "out")
    assert said.startswith("models/damaged/model.safetensors is not a readable safetensors file")
    assert Condensation.from_json("out/small.json").texts == 3
    assert Path("out/heat_map.png").exists()
    assert "models/none.gguf" in refusal(capsys, "measure", "models/none.gguf", "--text", "text.txt", "-o", "nothing")
    assert list(Path("nothing").iterdir()) == []


def test_models_of_one_name_have_files_of_their_own(folder: Path) -> None:
    models = ["models/small", "./models/small", str(folder / "models" / "small")]
    assert command.main(["measure", *models, "--text", "text.txt", "-o", "out"]) == 0
    assert sorted(path.name for path in Path("out").glob("*.json")) == ["small-2.json", "small-3.json", "small.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "none.txt"], "--text none.txt: there is no such file or folder"),
        (["--text", "blank.txt"], "--text blank.txt: every text in it is empty"),
        (["--text", "text.txt", "--device", "nowhere"], "--device nowhere: PyTorch cannot use it here"),
        (["--text", "text.txt", "-o", "text.txt/out"], "text.txt/out cannot be written (Not a directory)"),
        (["--text", "text.txt", "--layers", "9"], "models/small: layers must be"),
        (["--text", "text.txt", "--layers", "1;2"], "argument --layers: wanted all, last, early_half"),
        (["--text", "text.txt", "--tokenizer", "text.txt"], "models/small: --tokenizer text.txt cannot be loaded"),
        (["--text", "text.txt", "--texts", "0"], "argument --texts: wanted a whole number of at least 1, got '0'"),
        (["--text", "text.txt", "--max-length", "1"], "argument --max-length: wanted a whole number of at least 2"),
    ],
)
def test_what_cannot_be_measured_is_named(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "blank.txt").write_text(" \n")
    assert message in refusal(capsys, "measure", "models/small", *arguments)


@pytest.fixture
def files(folder: Path) -> Path:
    """Current folder with a measurement, records, the trainer's metrics, and what is none of them."""
    assert command.main(["measure", "models/small", "--text", "text.txt", "-o", "."]) == 0
    write_records([Record(0, {"block 1": 0.1}), Record(10, {"block 1": 0.2})], folder / "records.json")
    lines = [{"step": step, "validation_cosine": [0.1, 0.2]} for step in (10, 20)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    (folder / "damaged.json").write_bytes((folder / "small.json").read_bytes()[:-100])
    (folder / "list.json").write_text("[1, 2]")
    return folder


@pytest.mark.parametrize(
    ("arguments", "drawn"),
    [
        (["small.json"], "plot_heat_map"),
        (["small.json", "small.json", "--tokens", "content", "--title", "two"], "plot_heat_map"),
        (["small.json", "--kind", "curves"], "plot_condensation"),
        (["records.json"], "plot_training"),
        (["metrics.jsonl", "--kind", "training"], "plot_training"),
    ],
)
def test_plot_draws_what_the_files_hold(
    arguments: list[str], drawn: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any, dict[str, Any]]] = []
    for name, kind in (("plot_heat_map", "heat-map"), ("plot_condensation", "curves"), ("plot_training", "")):
        draw = getattr(command, name)

        def noting(what: Any, path: Path, draw: Any = draw, name: str = name, **options: Any) -> Path:
            calls.append((name, what, options))
            return draw(what, path, **options)  # type: ignore[no-any-return]

        monkeypatch.setattr(command, name, noting)
        if kind:
            monkeypatch.setitem(command.KINDS, kind, noting)
    assert command.main(["plot", *arguments, "-o", "picture.pdf"]) == 0
    assert (files / "picture.pdf").read_bytes().startswith(b"%PDF")
    ((name, what, options),) = calls
    assert name == drawn
    if "--title" in arguments:
        assert options == {"tokens": "content", "title": "two"}
        assert what == [Condensation.from_json("small.json")] * 2
    if arguments == ["records.json"]:
        assert what == [Record(0, {"block 1": 0.1}), Record(10, {"block 1": 0.2})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.json"], "none.json"),
        (["."], "Is a directory"),
        (["damaged.json"], "damaged.json is not a measurement"),
        (["list.json"], "list.json is not a measurement"),
        (["small.json", "--kind", "training"], "--kind training takes a metrics.jsonl"),
        (
            ["records.json", "small.json"],
            "records.json: condensation over training is drawn by --kind training, of one",
        ),
        (["records.json", "--kind", "curves"], "got --kind curves"),
        (["small.json", "-o", "a.doc"], "path ends in .doc, which is no format of a picture"),
        (["small.json", "-o", "list.json/a.png"], "list.json/a.png cannot be written"),
    ],
)
def test_what_cannot_be_drawn_is_named(
    arguments: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    before = sorted(files.iterdir())
    assert message in refusal(capsys, "plot", "-o", "picture.png", *arguments)
    assert sorted(files.iterdir()) == before


def test_a_measurement_is_replaced_by_a_whole_one_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["measure", "models/small", "--text", "text.txt", "-o", "out"]
    assert command.main(arguments) == 0
    old = {path: path.read_bytes() for path in Path("out").iterdir()}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        assert command.main([*arguments, "--max-length", "8"]) == 130
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == old
    assert "interrupted; what was written before is whole" in capsys.readouterr().err


def test_env_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["env"]) == 0
    assert capsys.readouterr().out == env_report.report() + "\n"


@pytest.mark.process
def test_the_command_runs_by_itself(folder: Path) -> None:
    run = [sys.executable, "-m", "dispersion_kernels.command"]
    done = subprocess.run([*run, "measure", "models/small", "--text", "text.txt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^models/small +3 ", done.stdout, re.MULTILINE)
    assert subprocess.run([*run, "plot", "none.json", "-o", "a.png"], capture_output=True).returncode == 2
