"""Atomic writes of files, errors that name the file that cannot be written, and locks of a run's folder."""

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
from torch import Tensor


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context with exclusive use of a run's folder, which is made where missing. The system releases the lock with the
    process, however the process ends. Under torchrun the first rank, which writes, takes the lock.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    from filelock import FileLock, Timeout

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
            if os.listdir(folder) == [".lock"]:  # the run was refused, or failed before writing
                (folder / ".lock").unlink()
                folder.rmdir()


@contextlib.contextmanager
def replaced(path: Path, size: int | None = None, remedy: str = "") -> Iterator[Any]:
    """File open for writing that replaces ``path`` once all of it is on the disk, and not otherwise.

    ``size`` in bytes, where known, and ``remedy`` are for the message of a full disk.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    needed = None if size is None else f"{size / 1e9:.3g} GB"
    with named_failure(path, needed, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


# Errors of a full disk, an exhausted quota, and a file at its size limit.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def named_failure(path: Path, needed: str | None = None, remedy: str = "") -> Iterator[None]:
    """Context that adds the name ``path`` to the system's errors while writing; for a full disk also the free space,
    the space ``needed`` and ``remedy``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch raises its own error while it handles the file's error, or a Ctrl-C.
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
    """File metrics.jsonl of a run. Lines after ``step``, which a resumed run writes again, and incomplete lines are
    removed first."""

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
    """SHA-256 of a tensor's elements in order; about a second per GB where the processor has SHA instructions."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().data).hexdigest()
