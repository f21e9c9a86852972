"""Files that are there whole or not at all, that name themselves when they cannot be written, and that belong to one
run at a time."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A run's folder, made if it is not there, for this process alone. The lock ends with the process, however that
    ends. Under torchrun the first rank takes it, which is the one that writes.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    lock = FileLock(folder / ".lock")
    with named_failure(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"--out {folder}: another run is writing there; wait for its end, stop it, or choose another folder"
            ) from error
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            if os.listdir(folder) == [".lock"]:  # refused, or failed before it wrote anything
                (folder / ".lock").unlink()
                folder.rmdir()


@contextlib.contextmanager
def replaced(path: Path, size: int | None = None, remedy: str = "") -> Iterator[Any]:
    """A file open for writing that takes the place of `path` when all of it is on the disk, and else never does.

    `size` in bytes, where it is known, and `remedy` are for the message of a disk that is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    needed = None if size is None else f"{size / 1e9:.3g} GB"
    with named_failure(path, needed, remedy):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


# The disk, the user's share of it, or a file that may be no larger.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def named_failure(path: Path, needed: str | None = None, remedy: str = "") -> Iterator[None]:
    """The system's errors while `path` is written, with its name; where it is full, with the space that there is and
    the space `needed`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch raises an error of its own while it handles the file's, or a Ctrl-C.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, KeyboardInterrupt):
            raise reason from None
        if not isinstance(reason, OSError):
            raise
        message = f"{path} cannot be written ({reason.strerror or reason})"
        if reason.errno in FULL:
            folder = next(parent for parent in path.absolute().parents if parent.is_dir())
            message += f": {shutil.disk_usage(folder).free / 1e9:.3g} GB are free"
            message += f", it needs {needed}" if needed else ""
            message += f"; {remedy}" if remedy else ""
        raise OSError(message) from error


def write_json(path: Path, value: Any) -> None:
    with replaced(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


class Metrics:
    """metrics.jsonl; what a resumed run will write again, and a line cut short, is taken out first."""

    def __init__(self, file: Path, step: int) -> None:
        self.file = file
        kept = []
        for line in file.read_text("utf-8", errors="replace").splitlines() if file.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        with replaced(file) as new:
            new.write("".join(kept).encode())

    def append(self, step: int, measured: dict[str, Any]) -> None:
        with named_failure(self.file), open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **measured}) + "\n")


def tensor_sha256(tensor: Tensor) -> str:
    """The checksum of a tensor's elements in memory: about a second a GB, where the processor has SHA instructions."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()
