"""Checkpoints of a run, every byte of which is checked before use.

A checkpoint may come from anywhere. PyTorch reads tensors and plain values from it, never code, and each part has a
checksum. The command line in it names files to read and a folder to write to; it is signed with a key that only its
user can read, so that the paths in a checkpoint of another user are not used unconfirmed.
"""

import contextlib
import hashlib
import hmac
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import cache_folder
from .files import replaced, tensor_sha256
from .model import GPT2, GPT2Config

# Parts of a checkpoint and their types.
PARTS: dict[str, type] = {
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "step": int,
    "seconds": float,
    "before": list,
    "config": dict,
    "data": str,
    "windows": int,
    "arguments": list,
    "signature": str,
}
TENSORS = ("model", "optimizer")


def checkpoints(out: Path) -> list[Path]:
    """Existing checkpoint files in a run's folder, or in the two folders of a comparison."""
    files = [out / folder / "checkpoint.pt" for folder in (".", "without", "with")]
    return [file for file in files if file.exists()]


def write_checkpoint(file: Path, state: dict[str, Any]) -> None:
    """Writes ``state``, which has every part but the signature, with its signature and checksums."""
    state = {**state, "signature": signature(state["arguments"])}
    checksums = {name: checksum(part) for name, part in state.items()}
    size = sum(value.nbytes for _, value in leaves(state) if isinstance(value, Tensor))
    kept = "make room and --resume from the checkpoint before it, which is kept"
    with replaced(file, size, kept if file.exists() else "make room and start again") as stream:
        torch.save({**state, "checksums": checksums}, stream)


def read_checkpoint(file: Path, tensors: bool = True) -> dict[str, Any]:
    """Parts of a checkpoint, each checked. Without ``tensors`` the parts other than tensors are read, and only those
    from the disk."""
    wanted = [name for name in PARTS if tensors or name not in TENSORS]
    with damage_named(file):
        if not file.is_file():
            raise ValueError("it is not a regular file")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=not tensors)
        compare("it", state, dict.fromkeys([*PARTS, "checksums"]))
        for name in wanted:
            if type(state[name]) is not PARTS[name]:
                raise ValueError(f"its {name} is of type {type(state[name]).__name__}")
            if checksum(state[name]) != state["checksums"].get(name):
                raise ValueError(f"its {name} does not have its checksum")
        if tensors:
            compare("its config", state["config"], dict.fromkeys(field.name for field in fields(GPT2Config)))
            check_model(state["model"], GPT2Config(**state["config"]))
        if not (state["step"] > 0 and 0 < state["seconds"] < math.inf):
            raise ValueError(f"its step is {state['step']} after {state['seconds']} seconds")
    return {name: state[name] for name in wanted}


def check_model(saved: dict[str, Any], config: GPT2Config) -> None:
    """Raises where the tensors do not have the shapes of ``config``; the check allocates no memory for the tensors."""
    if config.layers > len(saved):
        raise ValueError(f"its model has {len(saved)} tensors, too few for {config.layers} layers")
    with torch.device("meta"):
        expected = GPT2(config).state_dict()
    compare("its model", saved, expected)


def restore_optimizer(optimizer: torch.optim.AdamW, saved: dict[int, Any]) -> None:
    """Restores moments and step counts; learning rate, weight decay and the like come from the command line."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if saved:  # empty as long as the GradScaler has skipped every step
        compare("its optimizer", saved, dict.fromkeys(range(len(parameters))))
        for index, parameter in enumerate(parameters):
            moments = {"exp_avg": parameter, "exp_avg_sq": parameter}
            compare(f"its optimizer's {index}", saved[index], {"step": torch.tensor(0.0), **moments})
    optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})


def compare(which: str, saved: Mapping[Any, Any], expected: Mapping[Any, Tensor | None]) -> None:
    """Raises where the names differ, or the shapes or dtypes of the tensors in ``expected``."""
    if missing := expected.keys() - saved.keys():
        raise ValueError(f"{which} lacks {min(missing)}")
    if unknown := saved.keys() - expected.keys():
        raise ValueError(f"{which} has {min(map(repr, unknown))}, which does not belong there")
    for name, tensor in expected.items():
        if tensor is not None and (saved[name].shape, saved[name].dtype) != (tensor.shape, tensor.dtype):
            form = f"{saved[name].dtype} {list(saved[name].shape)}"
            raise ValueError(f"{which} has {name} as {form}, expected {tensor.dtype} {list(tensor.shape)}")


@contextlib.contextmanager
def damage_named(file: Path) -> Iterator[None]:
    """Context that turns every exception from a file's content (zip, pickle, tensors, values) into a ValueError."""
    try:
        yield
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--resume: {file} is damaged, or not a checkpoint of dispersion-gpt2 ({reason}); restore it from a copy, "
            "or start again with another --out"
        ) from error


def checksum(part: Any) -> str:
    """SHA-256 of names, values and tensors, hashed on as many threads as processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.sha256(json.dumps(list(pool.map(leaf_checksum, leaves(part)))).encode()).hexdigest()


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values and tensors in nested dicts and lists, each with its path. A dict or list itself yields its type."""
    if isinstance(value, dict | list):
        yield name, type(value)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{name}/{key!r}")
    else:
        yield name, value


def leaf_checksum(leaf: tuple[str, Any]) -> list[str]:
    name, value = leaf
    if isinstance(value, Tensor):
        return [name, str(value.dtype), str(list(value.shape)), tensor_sha256(value)]
    return [name, repr(value)]


def signature(arguments: list[str]) -> str:
    """HMAC-SHA-256 of a command line under the user's key; empty without a key."""
    key = user_key()
    return hmac.new(key, json.dumps(arguments).encode(), "sha256").hexdigest() if key else ""


def is_signed(state: dict[str, Any]) -> bool:
    """Whether this user wrote the checkpoint and thus chose the paths in its command line."""
    expected = signature(state["arguments"])
    return bool(expected) and hmac.compare_digest(expected.encode(), state["signature"].encode())


def user_key() -> bytes:
    """User's key: 32 random bytes in a file of the cache folder, made on first use. Empty where the file cannot be
    kept, or where other users can read or write it."""
    try:
        file = cache_folder() / "key"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=".key.")
            with open(descriptor, "wb") as stream:
                stream.write(os.urandom(32))
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.link(temporary, file)
            os.unlink(temporary)
        status = file.stat()
        if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & 0o077):
            return b""
        key = file.read_bytes()
    except (OSError, ValueError):  # ValueError where the user has no home folder
        return b""
    return key if len(key) == 32 else b""
