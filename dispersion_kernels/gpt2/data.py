"""Conversion of text to tokens on disk, and of tokens to batches.

Documents are tokenised once into memory-mapped files in a cache folder, each followed by the end-of-text token. Some
documents are kept for validation; of a single document, its last part.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from .files import named_failure, tensor_sha256
from .text import Document, find_documents, named_by
from .tokenizer import END_OF_TEXT, GPT2_FILES, blocks, encode, gpt2_bpe, train_bpe

VALIDATION_SHARE = 0.05
# Version of the cache; incremented when the same texts would give other tokens or files, to ignore old caches.
CACHE_FORMAT = 2


@dataclass(frozen=True)
class TokenData:
    """Memory-mapped tokens. ``train`` and ``validation`` are 1-D, uint16 or uint32; ``key`` identifies text and
    tokeniser."""

    train: Tensor
    validation: Tensor
    vocab: int
    end_of_text: int
    key: str
    folder: Path


@named_by("--data")
def load_data(
    sources: Sequence[str] = (),
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 1024,
    cache: str | Path | None = None,
    progress: bool = False,
) -> TokenData:
    """Tokens of the texts in ``sources``, from the cache where they were tokenised before.

    Args:
        sources: text files (also .gz and .xz), folders of text files, ``/dev/stdin`` or another open pipe, or
            ``hf:NAME[:CONFIG]``, a data set on Hugging Face's hub whose column ``text`` holds documents. Without
            sources, the source text of the running Python's library.
        tokenizer: ``gpt2`` (GPT-2's own), ``bpe`` (a byte-level BPE trained on the texts) or ``bytes``.
        vocab_size: size of the ``bpe`` vocabulary, end-of-text token included.
        cache: folder of the tokenised files; by default below ``$XDG_CACHE_HOME`` or ``~/.cache``.
        progress: whether to draw a progress bar while tokenising.
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
    folder = cache_folder(cache) / key
    remove_leftovers(folder.parent)
    if not folder.is_dir():
        needed = f"up to {2 * sum(sizes) / 1e9:.3g} GB for the tokens of {sum(sizes) / 1e9:.3g} GB of text"
        with named_failure(folder, needed, "--cache DIR puts them on another disk"):
            tokenize_into(folder, *split(documents, hashes, sizes), tokenizer, vocab_size, progress)
    return open_tokens(folder)


def cache_folder(chosen: str | Path | None = None) -> Path:
    if chosen is not None:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dispersion-kernels"
    except RuntimeError as error:
        raise ValueError(f"--cache is needed: {error}") from error


def split(documents: list[Document], hashes: list[str], sizes: list[int]) -> tuple[list[Document], list[Document]]:
    """Training and validation documents; validation gets about VALIDATION_SHARE of the bytes.

    Whole documents are taken in the order of their hashes, so that copies of a document land on the same side. Where
    the documents are too few or too large for that, validation is the smallest document of at least that share which
    leaves half of the text to train on; where there is none, the end of the largest document.
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
    """Writes the cache folder under a temporary name and renames it, so that it exists whole or not at all."""
    from tqdm import tqdm

    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder) as temporary:
        bpe = None
        vocab, end_of_text = 257, 256
        if tokenizer != "bytes":
            bpe = gpt2_bpe() if tokenizer == "gpt2" else train_bpe(train, vocab_size)
            (temporary / "tokenizer.json").write_text(bpe.to_str(pretty=True), "utf-8")
            vocab, end_of_text = bpe.get_vocab_size(), bpe.token_to_id(END_OF_TEXT)
        counts, checksums = {}, {}
        with tqdm(
            total=len(train) + len(validation), desc="tokenising", unit=" texts", disable=None if progress else True
        ) as bar:
            for part, documents in (("train", train), ("validation", validation)):
                counts[part], checksum = 0, hashlib.sha256()
                with open(temporary / f"{part}.bin", "wb") as file:
                    # 64 blocks at a time keep the tokeniser's threads busy and bound the memory.
                    for batch in batched(blocks(documents), 64):
                        encoded = encode([text for text in batch if text is not None], bpe)
                        for text in batch:
                            ids = [end_of_text] if text is None else next(encoded)
                            content = array("H" if vocab <= 1 << 16 else "I", ids).tobytes()
                            file.write(content)
                            checksum.update(content)
                            counts[part] += len(ids)
                            bar.update(text is None)
                checksums[part] = checksum.hexdigest()
        meta = {"vocab": vocab, "end_of_text": end_of_text, "tokens": counts, "sha256": checksums}
        (temporary / "meta.json").write_text(json.dumps({**meta, "checksum": checksum_of(meta)}) + "\n", "utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def batched(items: Iterable[str | None], size: int) -> Iterator[list[str | None]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Temporary folder beside ``folder``, removed at the end unless renamed. A lock file beside it shows that the
    process is alive: the system releases the lock with the process, however the process ends."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    lock = FileLock(f"{temporary}.lock")
    with lock.acquire(timeout=0):
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):  # Windows does not delete open files
                Path(lock.lock_file).unlink()


def remove_leftovers(cache: Path) -> None:
    """Removes temporary folders of processes killed while tokenising, whose locks are free."""
    for file in cache.glob(".*.lock"):
        with contextlib.suppress(Timeout, OSError), FileLock(file).acquire(timeout=0):
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)
            file.unlink(missing_ok=True)


def open_tokens(folder: Path) -> TokenData:
    """Tokens in a cache folder, every byte of which is checked against its checksum."""
    try:
        meta = json.loads((folder / "meta.json").read_text("utf-8"))
        if meta.pop("checksum", None) != checksum_of(meta):
            raise ValueError("meta.json does not have its checksum")
        dtype = torch.uint16 if meta["vocab"] <= 1 << 16 else torch.uint32
        parts = {}
        for part, count in meta["tokens"].items():
            file = folder / f"{part}.bin"
            if file.stat().st_size != count * dtype.itemsize:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes")
            parts[part] = torch.from_file(str(file), shared=False, size=count, dtype=dtype)
            if tensor_sha256(parts[part]) != meta["sha256"][part]:
                raise ValueError(f"{file.name} does not have its checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the tokenised text in {folder} is damaged ({error}); delete that folder") from error
    return TokenData(**parts, vocab=meta["vocab"], end_of_text=meta["end_of_text"], key=folder.name, folder=folder)


def checksum_of(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def training_windows(tokens: Tensor, context: int, count: int, *, seed: int, step: int) -> list[int]:
    """First tokens of the ``count`` windows of one optimiser step, a function of seed and step alone.

    Resumed runs, any number of ranks, and accumulated micro-batches therefore draw the windows of one uninterrupted run
    with large batches.
    """
    check_length(tokens, context, "training")
    generator = torch.Generator().manual_seed(mixed_seed(seed, step))
    return torch.randint(0, len(tokens) - context, (count,), generator=generator).tolist()


def validation_windows(tokens: Tensor, context: int, count: int) -> list[int]:
    """First tokens of at most ``count`` windows, evenly spread and without overlap, the same at every call."""
    check_length(tokens, context, "validation")
    count = min(count, (len(tokens) - 1) // context)
    return [i * (len(tokens) - context - 1) // max(count - 1, 1) for i in range(count)]


def windows_at(tokens: Tensor, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
    """Inputs, and targets, which are the inputs shifted by one token; each int64 ``[len(starts), context]``."""
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
