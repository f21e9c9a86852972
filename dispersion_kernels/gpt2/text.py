"""Documents from sources of text: files, folders, open pipes, data sets on Hugging Face's hub.

A document is a file, or a part of a file whose parts are separated by lines of one NUL character.
"""

import contextlib
import gzip
import lzma
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .runtime import say

DOCUMENT_BREAK = "\n\0\n"
PROSE = {".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".json", ".jsonl", ".csv"}
CODE = {".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"}
TEXT_SUFFIXES = frozenset(PROSE | CODE)
# Folders of Python's library left out of the default text: tests, tables, and installed packages.
NOT_DEFAULT_TEXT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings"})
# Names of the process's own open files, as the shell's ``<(command)``.
DESCRIPTOR = re.compile(r"/dev/stdin|(?:/dev/fd|/proc/self/fd)/(\d+)")


@dataclass(frozen=True)
class Document:
    name: str
    read: Callable[[], str]


class TextError(ValueError):
    """Text that cannot be read. The message begins with the source's name, for :func:`named_by` to put the option that
    named it before."""


@contextlib.contextmanager
def named_by(option: str) -> Iterator[None]:
    """Context, or decorator, that names the command-line ``option`` of the sources in errors."""
    try:
        yield
    except TextError as error:
        raise ValueError(f"{option} {error}") from error


def find_documents(sources: Sequence[str]) -> list[Document]:
    """Documents of all ``sources``; without sources, those of the running Python's library."""
    if not sources:
        library = Path(sysconfig.get_path("stdlib"))
        files = list(text_files(library, {".py"}, skip=NOT_DEFAULT_TEXT)) if library.is_dir() else []
        if not files:
            raise TextError(f"is missing: there is no source text in Python's library ({library}); give texts of yours")
        return [document for file in files for document in file_documents(file)]
    return [document for source in sources for document in source_documents(source)]


def source_documents(source: str) -> list[Document]:
    path = Path(source)
    if not source:
        raise TextError("got an empty name; give files, folders or hf:NAME")
    if source.startswith("hf:"):
        return hub_documents(source)
    if match := DESCRIPTOR.fullmatch(os.path.abspath(source)):
        return stream_documents(source, int(match[1] or 0))
    if path.is_dir():
        files = list(text_files(path))
        if not files:
            known = " ".join(sorted(TEXT_SUFFIXES))
            raise TextError(f"{source}: the folder holds no text file (known by {known}, and .gz or .xz)")
        return [document for file in files for document in file_documents(file)]
    if path.is_file():
        return file_documents(path)
    if path.exists():
        raise TextError(
            f"{source}: neither a file nor a folder; a pipe or a device can be read as /dev/stdin alone, by < {source}"
        )
    raise TextError(f"{source}: there is no such file or folder (a data set of Hugging Face's hub is hf:NAME)")


def text_files(
    folder: Path, suffixes: Iterable[str] = TEXT_SUFFIXES, skip: frozenset[str] = frozenset()
) -> Iterator[Path]:
    """Text files below a folder in a fixed order, without hidden ones. Other files that are left out are reported."""

    def cannot_be_listed(error: OSError) -> None:
        raise TextError(f"{error.filename}: cannot be read ({error.strerror})") from error

    for parent, folders, names in os.walk(folder, onerror=cannot_be_listed):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        for name in folders:
            if Path(parent, name).is_symlink():
                say(f"{Path(parent, name)}: skipped, a link to a folder; give that folder to read it")
        for name in sorted(names):
            stem = name.removesuffix(".gz").removesuffix(".xz")
            if name.startswith(".") or Path(stem).suffix.lower() not in suffixes:
                continue
            file = Path(parent, name)
            if file.is_file():
                yield file
            elif file.is_symlink():
                say(f"{file}: skipped, a link to what is not a file or not there")
            else:
                say(f"{file}: skipped, not a regular file")


def file_documents(path: Path) -> list[Document]:
    """Documents of a file: one, read on use, or several separated by DOCUMENT_BREAK, which stay in memory."""
    documents = in_memory(os.fspath(path), read_text(path))
    return documents if len(documents) > 1 else [Document(os.fspath(path), partial(read_text, path))]


def stream_documents(source: str, descriptor: int) -> list[Document]:
    """Documents of an open pipe or file, which can be read only once, so that they stay in memory."""
    try:
        with open(descriptor, "rb", closefd=False) as stream:
            content = stream.read()
    except OSError as error:
        raise TextError(f"{source}: cannot be read ({error})") from error
    return in_memory(source, decoded(source, content))


def in_memory(name: str, text: str) -> list[Document]:
    parts = text.split(DOCUMENT_BREAK)
    if len(parts) == 1:
        return [Document(name, partial(str, text))]
    return [Document(f"{name}#{number}", partial(str, part)) for number, part in enumerate(parts)]


def read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        elif path.suffix == ".xz":
            content = decompress_xz(content)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise TextError(f"{path}: cannot be read ({error})") from error
    return decoded(os.fspath(path), content)


def decompress_xz(content: bytes) -> bytes:
    """Content of all streams of an .xz file. ``lzma.decompress`` would accept any trailing bytes as padding."""
    parts = []
    while content:
        decompressor = lzma.LZMADecompressor()
        parts.append(decompressor.decompress(content))
        if not decompressor.eof:
            raise EOFError("the file ends before its end-of-stream marker")
        content = decompressor.unused_data.lstrip(b"\0")
        if (len(decompressor.unused_data) - len(content)) % 4:  # the format pads in multiples of four bytes
            raise EOFError("the file ends with padding that is no multiple of four bytes")
    return b"".join(parts)


def decoded(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise TextError(f"{name}: not UTF-8 ({error}); convert it, for example with iconv") from error


def hub_documents(source: str) -> list[Document]:
    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ModuleNotFoundError as error:
        remedy = "pip install datasets, or pass text files"
        raise ModuleNotFoundError(f"{source} needs the package datasets: {remedy}", name="datasets") from error
    try:
        rows = datasets.load_dataset(name, config or None, split="train")
    except Exception as error:  # datasets has its own classes for a wrong name, network errors and missing files
        raise TextError(f"{source}: {type(error).__name__}: {error} (wanted: hf:NAME or hf:NAME:CONFIG)") from error
    if "text" not in rows.column_names:
        raise TextError(f"{source}: it has no column text, only {', '.join(rows.column_names)}")
    return [Document(f"{source}#{row}", partial(hub_text, rows, row)) for row in range(len(rows))]


def hub_text(rows: Any, row: int) -> str:
    return str(rows[row]["text"])
