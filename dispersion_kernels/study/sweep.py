"""Command ``dispersion sweep``, which runs the trainer for every combination of options in a TOML file.

A run is a process of its own in a folder of its own. It counts as finished once the sweep has written its row,
``finished.json``, after the process has ended well; what a killed sweep leaves behind goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from ..gpt2.options import WEIGHTS, as_arguments, at_least, folder
from .plan import Experiment, Identities, Run, all_runs, read_plan
from .table import environment, row_of, write_tables, write_whole

# Options that are not settings of a run: paths, whose content is in the run's hash.
PATHS = ("out", "resume", "compare", "data", "cache", *WEIGHTS)
# Columns in which a half-finished run must equal the process that goes on with it.
SAME = ("source", "version", "torch", "python", "processor", "threads")
LAST_LINES = 12
BUSY = "another run is writing there"


def register(commands: Any) -> None:
    """Adds the subcommand to the parsers of ``dispersion``."""
    parser = commands.add_parser(
        "sweep",
        help="runs of dispersion-gpt2 from a TOML file",
        description="Run dispersion-gpt2 for every combination of options in a TOML file, each run in a process of its "
        "own. The same command goes on after an interruption. The exit status is 1 where a run failed.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("file", type=folder, metavar="FILE.toml")
    add("-o", "--out", type=folder, metavar="DIR", help="of the runs and tables (default: runs/ and FILE's name)")
    add(
        "-j",
        "--jobs",
        type=at_least(1),
        default=1,
        metavar="N",
        help="runs at a time, which share the cores (default: 1)",
    )
    add("--list", action="store_true", help="list the runs and what is done, and run nothing")


def run(options: argparse.Namespace) -> int:
    """Exit status: 0 when every run is finished, 1 when a run failed, and 130 when stopped."""
    check_libraries()
    experiments = read_plan(options.file)
    out = options.out or Path("runs", options.file.stem)
    with whole(out):
        sweep = Sweep(experiments, out, options.jobs)
        return sweep.show() if options.list else sweep.run()


def check_libraries() -> None:
    names = ("scipy", "tqdm", "matplotlib", "tokenizers", "safetensors", "filelock")
    for name in names:
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{name} is missing: pip install {' '.join(names)}", name=name) from error


@contextmanager
def whole(out: Path) -> Iterator[None]:
    """Context with exclusive use of a sweep's folder, which the system releases with the process."""
    from filelock import FileLock, Timeout

    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / ".lock")
    try:
        with lock.acquire(timeout=0):
            yield
    except Timeout as error:
        raise ValueError(f"--out {out}: another sweep is at work there; wait for its end, or stop it") from error


class Stopped(Exception):
    """Result of a run that a signal to the sweep ended."""


class Sweep:
    def __init__(self, experiments: list[Experiment], out: Path, jobs: int) -> None:
        self.experiments, self.out, self.jobs = experiments, out, jobs
        self.environment = environment(threads=max(1, cores() // jobs), jobs=jobs)
        identities = Identities()
        self.runs: dict[str, Run] = {}
        """Runs by the hash of their settings. Experiments may share a run."""
        self.members: list[tuple[Run, str]] = []
        """Every run of every experiment, and its hash."""
        for run in all_runs(experiments):
            identity = identities.of(run)
            self.runs.setdefault(identity, run)
            self.members.append((run, identity))
        self.identity = {id(run): identity for run, identity in self.members}
        self.rows: dict[str, dict[str, Any]] = {}
        for identity, run in self.runs.items():
            if row := self.finished(identity, run):
                self.rows[identity] = row
        self.guard = threading.Lock()
        self.stopping = False
        self.active: dict[str, subprocess.Popen[bytes]] = {}
        self.futures: dict[str, Future[str]] = {}

    def folder(self, identity: str) -> Path:
        """Folder of a run: its hash and its name. The hash alone decides, because a name may change in the file."""
        found = sorted(self.out.glob(f"{identity}-*"))
        return found[0] if found else self.out / f"{identity}-{self.runs[identity].name}"

    def finished(self, identity: str, run: Run) -> dict[str, Any] | None:
        """Row of a finished run, else None. Raises where the trainer's defaults were others when it ran."""
        folder = self.folder(identity)
        with suppress(FileNotFoundError):
            row: dict[str, Any] = json.loads((folder / "finished.json").read_text("utf-8"))
            for name, value in settings_of(run).items():
                if row["options"].get(name, value) != value:
                    flag = name.replace("_", "-")
                    raise ValueError(
                        f"{folder} was trained with {flag} = {row['options'][name]!r}, the trainer's default then; now "
                        f"it is {value!r}. Give {flag} in the file, or choose another --out, or delete that folder"
                    )
            return row
        return None

    def show(self) -> int:
        for identity, run in self.runs.items():
            folder = self.folder(identity)
            state = "finished" if identity in self.rows else "begun" if folder.exists() else "to do"
            print(f"{state:9}{identity}  {run.name}")
        print(f"{len(self.rows)} of {len(self.runs)} runs are finished")
        return 0

    def run(self) -> int:
        from tqdm import tqdm

        self.say_what_is_there()
        write_tables(self.out, self.experiments, self.members, self.rows)
        left = {identity: run for identity, run in self.runs.items() if identity not in self.rows}
        work = {identity: work_of(run) for identity, run in left.items()}
        form = "{percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
        previous = {number: signal.signal(number, interrupt) for number in stop_signals()}
        bar = tqdm(total=sum(work.values()), bar_format=form, disable=None if left else True)
        pool = ThreadPoolExecutor(self.jobs)
        failures: dict[str, str] = {}
        try:
            with bar:
                for identity, run in left.items():
                    # In this order, so that a run finds the future of every run from which it starts.
                    self.futures[identity] = pool.submit(self.one, identity, run)
                pending, shown = set(self.futures), 0.0
                while pending:
                    wait([self.futures[identity] for identity in pending], timeout=1, return_when="FIRST_COMPLETED")
                    for identity in [one for one in self.futures if one in pending and self.futures[one].done()]:
                        pending.remove(identity)
                        failure = self.futures[identity].result()
                        if failure:
                            failures[identity] = failure
                        with bar.external_write_mode():
                            print(failure or self.line(identity), flush=True)
                    share = {one: 1.0 if one not in pending else self.share(one) for one in left}
                    done = sum(work[one] * share[one] for one in left)
                    bar.set_postfix_str(f"{len(self.rows)} of {len(self.runs)} runs", refresh=False)
                    bar.update(done - shown)
                    shown = done
        except KeyboardInterrupt:
            self.stop()
            pool.shutdown(cancel_futures=True)
            print(f"stopped: {len(self.rows)} of {len(self.runs)} runs are finished; the same command goes on")
            return 130
        finally:
            pool.shutdown()
            for number, handler in previous.items():
                signal.signal(number, handler)
        print(f"{len(self.rows)} of {len(self.runs)} runs are finished: {self.out / 'results.csv'} and results.json")
        for identity in failures:
            print(f"failed: {self.folder(identity)}, whose output.txt has all it said", file=sys.stderr)
        return 1 if failures else 0

    def say_what_is_there(self) -> None:
        folders = {path.parent for path in self.out.glob("*/run.json")}
        others = folders - {self.folder(identity) for identity in self.runs}
        if others:
            print(f"{len(others)} runs in {self.out} are of other settings, and stay out of the tables")
        sources = {row["source"] for row in self.rows.values()} | {self.environment["source"]}
        if len(sources) > 1:
            print(
                f"finished runs are of other code than {self.environment['source']}, which runs now: the column source "
                "tells them apart; delete their folders to run them again"
            )

    def one(self, identity: str, run: Run) -> str:
        """Brings a run to its end. Returns what to say of its failure, empty for a success."""
        folder = self.folder(identity)
        sources = {}
        for key, source in run.sources.items():
            other = self.identity[id(source)]
            if other in self.futures and self.futures[other].result():
                return f"{folder.name}: not begun, because {self.folder(other).name} failed, from which it starts"
            sources[key] = self.folder(other)
        try:
            code, said = self.train(folder, run, sources)
            while code == 2 and BUSY in said:  # a process that an earlier sweep had just started
                code, said = self.train(folder, run, sources)
            if code:
                return f"{folder.name} failed with exit status {code}; its last lines:\n{said}"
            row = {"folder": folder.name, "options": settings_of(run), **row_of(folder), **self.environment}
            write_whole(folder / "finished.json", json.dumps(row))
            (folder / "checkpoint.pt").unlink(missing_ok=True)
            with self.guard:
                self.rows[identity] = row
                write_tables(self.out, self.experiments, self.members, self.rows)
        except (OSError, ValueError) as error:
            return f"{folder.name} failed: {error}"
        return ""

    def wait_for_leftover(self, folder: Path) -> None:
        """Waits for a process that a killed sweep has left at work in ``folder``. It may end well."""
        from filelock import FileLock, Timeout

        while (folder / ".lock").exists():
            with suppress(Timeout), FileLock(folder / ".lock").acquire(timeout=1):
                return
            if self.stopping:
                raise Stopped

    def train(self, folder: Path, run: Run, sources: dict[str, Path]) -> tuple[int, str]:
        """Exit status and last lines of a process of the trainer, which goes on from a checkpoint of the same code,
        versions, machine and threads, and begins again without one."""
        self.wait_for_leftover(folder)
        record = folder / "run.json"
        begun = json.loads(record.read_text("utf-8"))["environment"] if record.exists() else self.environment
        if any(begun[name] != self.environment[name] for name in SAME):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps({"environment": self.environment, "settings": dict(run.settings)}, indent=2))
        options = copy.copy(run.options)
        for key, source in sources.items():
            setattr(options, key.replace("-", "_"), str(source.absolute()))
        resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        command = [sys.executable, "-m", "dispersion_kernels.gpt2.train", "--out", str(folder), *resume]
        with open(folder / "output.txt", "ab") as output:
            with self.guard:
                if self.stopping:
                    raise Stopped
                # A session of its own, so that a Ctrl-C reaches the sweep alone, which passes it on once.
                process = subprocess.Popen(
                    [*command, *as_arguments(options)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": str(self.environment["threads"])},
                    start_new_session=True,
                )
                self.active[folder.name] = process
            code = process.wait()
            with self.guard:
                del self.active[folder.name]
                if self.stopping:
                    raise Stopped
        lines = (folder / "output.txt").read_text("utf-8", errors="replace").splitlines()
        return code, "\n".join(f"  {line}" for line in lines[-LAST_LINES:])

    def stop(self) -> None:
        """Has every process save its checkpoint and end."""
        with self.guard:
            self.stopping = True
            for process in self.active.values():
                process.terminate()

    def share(self, identity: str) -> float:
        """Share of a run's steps that it has taken."""
        file = self.folder(identity) / "metrics.jsonl"
        with suppress(OSError, ValueError, IndexError, KeyError):
            return float(
                json.loads(file.read_text("utf-8").splitlines()[-1])["step"] / self.runs[identity].options.steps
            )
        return 0.0

    def line(self, identity: str) -> str:
        row = self.rows[identity]
        return f"{row['folder']}: validation loss {row['validation_loss']:.4f}, {row['seconds']:.0f} s"


def settings_of(run: Run) -> dict[str, Any]:
    """Options of a run with the trainer's defaults, without paths."""
    return {name: value for name, value in vars(run.options).items() if name not in PATHS}


def work_of(run: Run) -> float:
    """Estimate of a run's cost in FLOPs, for the time left. A run that starts from weights counts with their shape."""
    options = run.options
    if "init-from" in run.sources:
        options = argparse.Namespace(**{**vars(run.sources["init-from"].options), "steps": options.steps})
    width, mlp = options.width or 768, options.mlp_width or 3072
    parameters = (options.layers or 12) * (4 * width**2 + 2 * width * mlp) + options.vocab_size * width
    tokens = options.batch_size * options.accumulate * (options.context or 1024)
    return float(6 * parameters * tokens * options.steps)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stop_signals() -> list[signal.Signals]:
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
