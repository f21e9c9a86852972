"""Checkpoints and cached tokens with flipped bits, other bytes and other contents: refused in one line, or unharmed.

ATTACK_SECONDS sets how long each test goes on.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt2_runs import command_line

from dispersion_kernels.gpt2 import checkpoint, data, train

for library in ("tokenizers", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(library)
pytestmark = [pytest.mark.attack, pytest.mark.timeout(3600)]

SECONDS = float(os.environ.get("ATTACK_SECONDS", 15))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a finished run, its texts and its cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)
    torch.set_num_threads(1)
    assert train.main(command_line(tmp_path, tmp_path / "out")) == 0
    return tmp_path


def damaged(content: bytes) -> tuple[str, bytes]:
    """A name of what was done, and what came of it."""
    kind = random.choice(["one bit", "bits", "bytes", "cut", "more", "zeros", "swapped"])
    changed = bytearray(content)
    start = random.randrange(len(content))
    if kind in ("one bit", "bits"):
        for _ in range(1 if kind == "one bit" else random.choice([2, 10, 1000])):
            changed[random.randrange(len(content))] ^= 1 << random.randrange(8)
    elif kind == "bytes":
        for _ in range(random.choice([1, 3, 100])):
            changed[random.randrange(len(content))] = random.randrange(256)
    elif kind == "cut":
        del changed[start:]
    elif kind == "more":
        changed[start:start] = random.randbytes(random.randint(1, 100))
    elif kind == "zeros":
        end = start + random.randint(1, 4096)
        changed[start:end] = bytes(len(changed[start:end]))
    else:
        length = random.randint(1, 200)
        other = random.randrange(len(content))
        changed[start : start + length], changed[other : other + length] = (
            changed[other : other + length],
            changed[start : start + length],
        )
    return kind, bytes(changed)


def test_damaged_files_are_refused_or_hold_what_they_held(folder):
    random.seed("damaged")
    counts: Counter[str] = Counter()
    file = folder / "out" / "checkpoint.pt"
    content, whole = file.read_bytes(), checkpoint.read_checkpoint(file)
    sums = {name: checkpoint.checksum(part) for name, part in whole.items()}
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        kind, changed = damaged(content)
        file.write_bytes(changed)
        tensors = random.random() < 0.7
        refused = ""
        try:
            read = checkpoint.read_checkpoint(file, tensors)
        except ValueError as error:
            refused = str(error)
        if refused:
            assert refused.startswith(f"--resume: {file} is damaged, or not a checkpoint of dispersion-gpt2 (")
        else:  # in the bytes between the parts
            assert {name: checkpoint.checksum(part) for name, part in read.items()}.items() <= sums.items(), kind
        counts[f"{kind} {'refused' if refused else 'unharmed'}"] += 1
        counts["cases"] += 1
    print(f"\ncheckpoint: {dict(sorted(counts.items()))}")
    assert counts["one bit refused"] > 10


def test_damaged_caches_are_refused_or_hold_what_they_held(folder):
    random.seed("cache")
    counts: Counter[str] = Counter()
    (cache,) = (folder / "cache").iterdir()
    whole = data.open_tokens(cache)
    expected = [whole.train.clone(), whole.validation.clone(), whole.vocab, whole.end_of_text]
    contents = {file: file.read_bytes() for file in cache.iterdir()}
    began = time.monotonic()
    while time.monotonic() - began < SECONDS / 3:
        file = random.choice(list(contents))
        kind, changed = damaged(contents[file])
        file.write_bytes(changed)
        try:
            read = data.open_tokens(cache)
        except ValueError as error:
            assert f"the tokenised text in {cache} is damaged" in str(error)  # noqa: PT017
            counts[f"{kind} refused"] += 1
        else:
            assert torch.equal(read.train.int(), expected[0].int()), kind
            assert torch.equal(read.validation.int(), expected[1].int()), kind
            assert [read.vocab, read.end_of_text] == expected[2:], kind
            counts[f"{kind} unharmed"] += 1
        file.write_bytes(contents[file])
    print(f"\ncache: {dict(sorted(counts.items()))}")
    assert counts["one bit refused"] > 10


def places(part: Any) -> list[tuple[Any, Any]]:
    """Every dict or list in a part, with each of its keys."""
    if not isinstance(part, dict | list):
        return []
    keys = list(part) if isinstance(part, dict) else list(range(len(part)))
    return [(part, key) for key in keys] + [place for key in keys for place in places(part[key])]


def other_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and random.random() < 0.7:
        changes = [
            lambda: value.double(),
            lambda: value[..., None],
            lambda: torch.full_like(value, torch.nan),
            lambda: torch.full_like(value, -1),
            lambda: value.flatten()[:1],
            lambda: value.to("meta"),
            lambda: torch.zeros(1).expand(10**12),
            lambda: value.to_sparse(),
            lambda: value.bool(),
        ]
        return random.choice(changes)()
    hostile = [None, True, -1, 0, 10**30, -(10**9), 0.5, float("nan"), float("inf"), "", "text", [], {}, [[]], {"a": 1}]
    return random.choice([*hostile, torch.zeros(2), b"bytes"])


def changed(state: dict[str, Any]) -> str:
    """Changes a place or two in a checkpoint's parts; says what it was."""
    done = []
    for _ in range(random.choice([1, 1, 2])):
        every, top = places(state), [(state, key) for key in state]
        small = [place for name in ("config", "scaler", "before") for place in places(state.get(name))]
        container, key = random.choice(random.choice([every, top, small or top]))
        kind = random.choice(["delete", "replace", "replace", "add", "move"])
        done.append(f"{kind} {key!r}")
        if kind == "delete":
            del container[key]
        elif kind == "replace":
            container[key] = other_value(container[key])
        elif isinstance(container, list):
            container.insert(key, other_value(container[key]))
        elif kind == "add":
            container[random.choice(["more", 7, 10**9, "h.9.ln_1.weight", ("a",)])] = other_value(container[key])
        else:
            container[f"{key}."] = container.pop(key)
    return ", ".join(done)


PATHS = ("--data", "--cache", "--init-from")


def crafted(arguments: list[str], hostile: Path) -> list[str]:
    """A command line with other values, options and paths."""
    arguments = list(arguments)
    for _ in range(random.choice([1, 1, 3])):
        kind = random.randrange(4)
        place = random.randrange(len(arguments))
        if kind == 0:
            del arguments[place]
        elif kind == 1:
            flag = arguments[place].split("=")[0]
            arguments[place] = f"{flag}={random.choice(['-1', '0', '1e400', 'nan', '', 'x', str(10**30), '/etc'])}"
        elif kind == 2:
            arguments.insert(place, random.choice(["--help", "--resume", "--compare", "--other", "@file", "--", "-h"]))
        else:
            arguments.append(f"{random.choice(PATHS)}={hostile}")
    return arguments


def test_crafted_checkpoints_are_refused_in_one_line_or_train(folder, capsys, monkeypatch):
    """With right checksums. What is not signed reads and writes nothing that the command line does not name."""
    random.seed("crafted")
    counts: Counter[str] = Counter()
    out, hostile, texts = folder / "out", folder / "hostile", folder / "texts"
    original = torch.load(out / "checkpoint.pt", weights_only=True)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    read: list[str] = []
    find = data.find_documents
    monkeypatch.setattr(data, "find_documents", lambda sources: read.extend(sources) or find(sources))
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        counts["cases"] += 1
        shutil.rmtree(out)
        out.mkdir()
        for name, content in files.items():
            (out / name).write_bytes(content)
        state = copy.deepcopy({name: part for name, part in original.items() if name != "checksums"})
        if random.random() < 0.4:
            state["arguments"] = crafted(state["arguments"], hostile)
            what = f"arguments {' '.join(state['arguments'])}"
        else:
            what = changed(state)
        if random.random() < 0.5 and str(hostile) not in what:
            with contextlib.suppress(KeyError, TypeError):
                state["signature"] = checkpoint.signature(state["arguments"])
        try:
            sums = {name: checkpoint.checksum(part) for name, part in state.items()}
        except Exception:
            counts["without a checksum"] += 1
            sums = original["checksums"]
        try:
            torch.save({**state, "checksums": sums}, out / "checkpoint.pt")
        except Exception:
            counts["not to be saved"] += 1
            continue
        read.clear()
        given = ["--data", str(texts), "--cache", str(folder / "cache")] if random.random() < 0.5 else []
        # Few steps, whatever the checkpoint says.
        argv = ["--resume", "--out", str(out), "--steps", "7", "--accumulate", "1", "--batch-size", "2", *given]
        try:
            code = train.main(argv)
        except SystemExit as exit:
            code = exit.code
        said = capsys.readouterr().err
        assert code in (0, 2), what
        assert "Traceback" not in said, what
        if code == 2:
            assert said.splitlines()[-1].startswith("dispersion-gpt2: error: "), (what, said)
            counts["refused"] += 1
        else:
            counts["trained"] += 1
        assert set(read) <= {str(texts)}, what
        assert not hostile.exists(), what
    with capsys.disabled():
        print(f"\ncrafted: {dict(counts)}")
    assert counts["refused"] > 10
