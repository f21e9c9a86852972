"""Interface of a run to its machine: processes, signals, the terminal, memory."""

import argparse
import contextlib
import ctypes
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor


def exit_status(program: str, command: Callable[[], int], *, interrupted: str, memory: str) -> int:
    """Exit status of ``command``, or 2 after an error and 130 after a Ctrl-C, of which it prints a line.

    Args:
        program: name of the program, before its messages.
        interrupted: message after a Ctrl-C that has none itself.
        memory: remedy after a failed allocation.
    """
    stdout, stderr = PersistentStream(sys.stdout), PersistentStream(sys.stderr)
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            return command()
        except KeyboardInterrupt as interrupt:
            print(f"{program}: {str(interrupt) or interrupted}", file=sys.stderr)
            return 130
        except (ValueError, OSError, ModuleNotFoundError) as error:
            message = str(error)
        except (RuntimeError, MemoryError) as error:
            reason = out_of_memory(error)
            if reason is None:
                raise
            message = f"{reason}; {memory}"
        print(f"{program}: error:", *message.splitlines(), file=sys.stderr)
        return 2


@contextlib.contextmanager
def process_group(options: argparse.Namespace) -> Iterator[None]:
    """Context in which the ranks of torchrun form a process group; without torchrun it does nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    on_cuda = (options.device or "cuda").startswith("cuda") and torch.cuda.is_available()
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


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


class PersistentStream(io.TextIOBase):
    """Terminal or pipe for writing whose other end may close, as by a hangup, or by a Ctrl-C that also ends a ``tee``
    behind it. Later output is lost, and the run continues."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:  # a file's name, in a terminal of another encoding
            return self.stream.write(text.encode("ascii", "backslashreplace").decode())
        except OSError:
            self.let_go()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.let_go()

    def let_go(self) -> None:
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding


class StopRequest:
    """Request to stop after the current step, by SIGINT (Ctrl-C), SIGTERM or SIGHUP while listening. A second signal
    acts at once, except under torchrun, which passes a Ctrl-C on to processes that may already have it from the
    terminal.
    """

    def __init__(self) -> None:
        self.number = 0
        """Number of the signal; 0 without one."""
        self.previous: dict[int, Any] = {}

    def listen(self) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # under nohup
                continue
            self.previous.setdefault(number, signal.signal(number, self.request))

    def request(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        second = ""
        if world() == 1:
            self.restore()
            second = "; a second signal stops at once, without saving"
        if rank() == 0:
            with contextlib.suppress(OSError):  # a signal may interrupt print, which is not reentrant
                os.write(2, f"\nstopping after this step, and saving{second}\n".encode())

    def agreed(self, device: torch.device) -> int:
        """Highest signal number of any rank, so that all ranks stop after the same step; 0 without a signal."""
        if world() == 1:
            return self.number
        number = torch.tensor(float(self.number), device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number.item())

    def restore(self) -> None:
        for number in list(self.previous):
            signal.signal(number, self.previous.pop(number))

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


# Parameters of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Keeps memory that a step frees in the process, for the next step. glibc returns the memory of large tensors to
    the system at once, and new memory is cleared page by page: some 2% of a step of the nano GPT-2 on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0)):
            libc.mallopt(parameter, value)


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes, of the GPU or else of the process; None where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def out_of_memory(error: BaseException) -> str | None:
    """Message of an allocation failure on a GPU, on the CPU or in Python; None for other errors."""
    said = (str(error) or "Python cannot allocate memory").splitlines()[0].split("DefaultCPUAllocator: ")[-1]
    out_of_host_memory = isinstance(error, RuntimeError) and ("can't allocate memory" in said or "bad_alloc" in said)
    return said if out_of_host_memory or isinstance(error, MemoryError | torch.OutOfMemoryError) else None
