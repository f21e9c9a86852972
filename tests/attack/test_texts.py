"""Texts of every kind, odd names and damaged files: each is read as what it is, or refused by its name, and soon.

ATTACK_SECONDS sets how long each test goes on.
"""

from __future__ import annotations

import gzip
import lzma
import os
import random
import signal
import socket
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from dispersion_kernels.gpt2.data import load_data
from dispersion_kernels.gpt2.text import read_text

pytest.importorskip("tokenizers")
if os.name == "nt":
    pytest.skip("pipes and links of POSIX", allow_module_level=True)
pytestmark = [pytest.mark.attack, pytest.mark.timeout(3600)]

SECONDS = float(os.environ.get("ATTACK_SECONDS", 20))
PATIENCE = 20
"""Seconds that one case may take."""


@pytest.fixture
def soon():
    """Ends a case that hangs."""

    def late(*arguments: object) -> None:
        raise AssertionError(f"it took more than {PATIENCE} seconds")

    previous = signal.signal(signal.SIGALRM, late)
    yield lambda: signal.alarm(PATIENCE)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


NAMES = ["a b", "new\nline", "quo'te", "ümlaut", "-dash", "#", "x.md", "\udcff"]
WORDS = ["the ", "token", " is\n", "n't", "\n\n", "  ", "1984"]
REPEATED = ["a", " ", "\n", "\t", "7", "-", "é", "日", "😀", "\0", "\u2028", "\r"]
PLANES = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]


def some_text() -> str:
    """Words, runs of one character, any planes of Unicode, every kind of line end, breaks between documents."""
    parts = []
    for _ in range(random.randint(1, 6)):
        kind = random.randrange(6)
        length = int(10 ** random.uniform(0, 4.5))
        if kind == 0:
            parts.append("".join(random.choices(WORDS, k=length // 4)))
        elif kind == 1:
            parts.append(random.choice(REPEATED) * length)
        elif kind == 2:
            parts.append("".join(chr(random.randint(*random.choice(PLANES))) for _ in range(length // 20)))
        elif kind == 3:
            parts.append(random.choice(["\r\n", "\r", "\ufeff", "<|endoftext|>", "\x1a", "\x85"]))
        elif kind == 4:
            parts.append("\n\0\n")
        else:
            parts.append("x" * length + "\n" + "y" * length)
    return "".join(parts)


def documents_in(content: bytes) -> list[str]:
    """As README says: UTF-8, line ends as Python reads them from Windows, one NUL on a line between documents."""
    return content.decode("utf-8-sig").replace("\r\n", "\n").split("\n\0\n")


def tokenised(sources: list[Path], cache: Path, tokenizer: str) -> list[str]:
    """The documents that are in the tokens again; a single one has been cut into two."""
    tokens = load_data([str(source) for source in sources], tokenizer=tokenizer, vocab_size=300, cache=cache)
    documents = []
    for part in (tokens.train, tokens.validation):
        ids = part.tolist()
        assert ids[-1] == tokens.end_of_text
        assert max(ids) < tokens.vocab
        start = 0
        for end in (i for i, token in enumerate(ids) if token == tokens.end_of_text):
            documents.append(decode(tokens, ids[start:end]))
            start = end + 1
    return documents


def decode(tokens, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    file = tokens.folder / "tokenizer.json"
    return Tokenizer.from_file(str(file)).decode(ids) if file.exists() else bytes(ids).decode()


def test_any_text_comes_back(tmp_path, soon):
    random.seed("texts")
    counts: Counter[str] = Counter()
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        case = tmp_path / str(counts["cases"])
        counts["cases"] += 1
        case.mkdir()
        contents = {}
        for number in range(random.randint(1, 5)):
            name = f"{random.choice(NAMES)}{number}.txt"
            content = some_text().encode()
            if random.random() < 0.1:
                content = random.randbytes(random.randint(0, 200))
            contents[name] = content
            packed = random.choice(["", "", ".gz", ".xz"])
            pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[packed]
            (case / f"{name}{packed}").write_bytes(pack(content))
        sources = [case] if random.random() < 0.5 else sorted(case.iterdir())
        soon()
        try:
            expected = [text for content in contents.values() for text in documents_in(content)]
        except UnicodeDecodeError:
            with pytest.raises(ValueError, match=r"(?s)--data .* not UTF-8"):
                tokenised(sources, tmp_path / "cache", "bytes")
            counts["not UTF-8"] += 1
            continue
        tokenizer = random.choice(["bytes", "bpe"])
        try:
            found = tokenised(sources, tmp_path / "cache", tokenizer)
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert "is empty" in refusal
            assert any(not text.strip() for text in expected)
            counts["empty"] += 1
            continue
        if len(found) == len(expected):
            assert sorted(found) == sorted(expected), case
        else:
            assert sorted(map(len, found)) != sorted(map(len, expected))
            assert len(found) == len(expected) + 1, case
            assert sum(map(len, found)) == sum(map(len, expected)), case
            assert Counter("".join(found)) == Counter("".join(expected)), case
        counts[tokenizer] += 1
    print(f"\ntexts: {dict(counts)}")
    assert counts["bpe"] > 3


@pytest.mark.parametrize("tool", ["gzip", "xz"])
def test_damaged_packed_files_are_never_another_text(tmp_path, soon, tool):
    """What the tool of the format unpacks without a complaint is the text, and nothing else is ever read."""
    suffix, pack = {"gzip": (".gz", gzip.compress), "xz": (".xz", lzma.compress)}[tool]
    random.seed(f"packed {tool}")
    counts: Counter[str] = Counter()
    file = tmp_path / f"a.txt{suffix}"
    began = time.monotonic()
    while time.monotonic() - began < SECONDS:
        counts["cases"] += 1
        texts = [some_text().replace("\r", "").replace("\ufeff", "") for _ in range(random.randint(1, 3))]
        packed = bytearray(b"".join(pack(text.encode()) for text in texts))
        damage = random.choice(["none", "flip", "cut", "append", "zeros", "swap"])
        if damage == "flip":
            for _ in range(random.choice([1, 1, 2, 50])):
                packed[random.randrange(len(packed))] ^= 1 << random.randrange(8)
        elif damage == "cut":
            del packed[random.randrange(len(packed)) :]
        elif damage == "append":
            packed += random.choice([random.randbytes(random.randint(1, 40)), packed[: random.randrange(len(packed))]])
        elif damage == "zeros":
            packed += bytes(random.randint(1, 12))
        elif damage == "swap":
            middle = random.randrange(len(packed))
            packed = packed[middle:] + packed[:middle]
        file.write_bytes(packed)
        shown = subprocess.run([tool, "-dc", str(file)], capture_output=True)
        soon()
        refusal, read = "", ""
        try:
            read = read_text(file)
        except ValueError as error:
            refusal = str(error)
        counts[f"{damage} {'refused' if refusal else 'read'}"] += 1
        if refusal:
            assert refusal.startswith(f"{file}: ")
            assert shown.returncode != 0, (damage, counts["cases"], refusal)
        elif shown.returncode == 0:
            assert read == shown.stdout.decode().replace("\r\n", "\n"), (damage, counts["cases"])
        else:
            assert damage != "append", (counts["cases"], shown.stderr)
            assert read in ("".join(texts), ""), (damage, counts["cases"], shown.stderr)
    print(f"\n{tool}: {dict(sorted(counts.items()))}")
    assert counts["flip refused"] > 10


def test_things_that_are_no_files_do_not_hang(tmp_path, soon, capsys):
    random.seed("things")
    counts: Counter[str] = Counter()
    began = time.monotonic()
    kinds = [
        "fifo",
        "socket",
        "link to nothing",
        "link to itself",
        "link to a fifo",
        "folder",
        "device",
        "link to device",
    ]
    while time.monotonic() - began < SECONDS / 4:
        case = tmp_path / str(counts["cases"])
        counts["cases"] += 1
        case.mkdir()
        (case / "text.txt").write_text("some text of its own\n" * 20)
        chosen = random.choices(kinds, k=random.randint(1, 5))
        for number, kind in enumerate(chosen):
            path = case / f"{number}.txt"
            if kind == "fifo":
                os.mkfifo(path)
            elif kind == "socket":
                os.chdir(case)  # a socket's name is at most 108 bytes long
                with socket.socket(socket.AF_UNIX) as endpoint:
                    endpoint.bind(path.name)
            elif kind == "folder":
                path.mkdir()
            elif kind == "device":
                path.symlink_to("/dev/full")
            else:
                target = {"nothing": "none", "itself": path.name, "fifo": "fifo", "device": "/dev/zero"}
                path.symlink_to(target[kind.split()[-1]])
                if kind == "link to a fifo" and not (case / "fifo").exists():
                    os.mkfifo(case / "fifo")
        soon()
        load_data([str(case)], tokenizer="bytes", cache=tmp_path / "cache")
        said = capsys.readouterr().out
        assert said.count("skipped, ") == sum(kind != "folder" for kind in chosen)
        for number, kind in enumerate(chosen):
            soon()
            with pytest.raises((ValueError, OSError), match=rf"--data .*{number}\.txt: "):
                load_data([str(case / f"{number}.txt")], tokenizer="bytes", cache=tmp_path / "cache")
            counts[kind] += 1
    with capsys.disabled():
        print(f"\nthings: {dict(counts)}")
