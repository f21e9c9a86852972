"""What a run needs of its machine: other processes, signals, and files that are there whole or not at all."""

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@contextlib.contextmanager
def process_group(options: argparse.Namespace) -> Iterator[None]:
    """Under torchrun, the ranks joined to one group."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    on_cuda = (options.device or "cuda").startswith("cuda") and torch.cuda.is_available()
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


# Of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Leaves what a step frees with the process, for the next step. glibc gives large tensors' memory back to the
    system at once, and what it gets again is cleared page by page: some 2% of a step of the nano GPT-2 on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0)):
            libc.mallopt(parameter, value)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(values: Tensor) -> Tensor:
    if world() > 1:
        dist.all_reduce(values)
    return values / world()


def say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


class StopRequest:
    """While it listens, Ctrl-C or SIGTERM asks for the end after the current step; a second one acts at once.

    Not so under torchrun, which passes a Ctrl-C on to processes that may have it from the terminal already.
    """

    def __init__(self) -> None:
        self.requested = False
        self.previous: dict[int, Any] = {}

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous.setdefault(number, signal.signal(number, self.request))

    def request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if world() == 1:
            self.restore()
        if rank() == 0:
            print("\nstopping after this step", file=sys.stderr)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked to stop, so that all stop after the same step."""
        if world() == 1:
            return self.requested
        flag = torch.tensor(float(self.requested), device=device)
        dist.all_reduce(flag)
        return bool(flag.item())

    def restore(self) -> None:
        for number in list(self.previous):
            signal.signal(number, self.previous.pop(number))

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


def checkpoints(out: Path) -> list[Path]:
    """Those there are in a run's folder, or in the two of a comparison."""
    files = [out / folder / "checkpoint.pt" for folder in (".", "without", "with")]
    return [file for file in files if file.exists()]


def read_checkpoint(file: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        wanted = {"model", "optimizer", "scaler", "step", "seconds", "before", "config", "data", "options"}
        if missing := wanted - checkpoint.keys():
            raise ValueError(f"it lacks {min(missing)}")
    except Exception as error:  # what breaks may be the zip, the pickle or a tensor
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"--resume: {file} is damaged, or not a checkpoint of dispersion-gpt2 ({reason}); restore it from a copy, "
            "or start again with another --out"
        ) from error
    return checkpoint


class Metrics:
    """metrics.jsonl; what a resumed run will write again, and a line cut short, is taken out first."""

    def __init__(self, file: Path, step: int) -> None:
        self.file = file
        kept = []
        for line in file.read_text("utf-8").splitlines() if file.exists() else []:
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        with replaced(file) as new:
            new.write("".join(kept).encode())

    def append(self, step: int, measured: dict[str, Any]) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **measured}) + "\n")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Any]:
    """A file open for writing that takes the place of `path` when all of it is on the disk, and else never does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with replaced(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the GPU's high-water mark, or the process's; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
