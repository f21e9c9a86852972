"""Everything that a machine with a GPU can show of this package, in one command and one report.

``python -m benchmarks.on_gpu --out DIR [--stage NAME ...] [--list]``

Runs stage after stage, each a process of its own that is stopped after nine minutes, and writes ``DIR/report.md`` with
the device, the versions and the commit. A stage whose needs are not met is skipped, and the report says why. Stages may
be run one by one, in any order and on different days: the report has what the folder has of each. One that was stopped
is quicker when it is run again: what Triton compiled is kept. ``build`` comes first where the CUDA kernels are wanted.
In a checkout, with the package installed from it (``pip install -e '.[dev,bench]'``) beside the machine's PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import loss, memory
from benchmarks.machine import describe, write_csv, write_text
from dispersion_kernels.backends import cuda
from dispersion_kernels.backends.gpu import launch
from dispersion_kernels.backends.registry import triton_version
from kernel_audit.shipped import Call, calls

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 9 * 60
# Length and numbers of features of calls under compute-sanitizer: two tiles and a ragged third; few features and many.
SANITIZED_LENGTH, SANITIZED_FEATURES = 261, {64: 36, 128: 100, 768: 200}


@dataclass(frozen=True)
class Stage:
    name: str
    what: str
    needs: str
    why_not: Callable[[], str | None]
    """Reason, in words, why the stage cannot run here; None if it can."""
    command: list[str]
    environment: dict[str, str] | None = None
    lines: int | None = None
    """Number of last lines of the output that are in the report; None for all."""


@dataclass(frozen=True)
class Outcome:
    """Outcome of a stage: the fields of its JSON file."""

    stage: str
    status: str
    """``"passed"``, ``"failed"``, ``"stopped"`` (after SECONDS) or ``"skipped"``."""
    reason: str
    seconds: float
    command: str
    machine: dict[str, str]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the folder for the report, the stages' output and their rows")
    parser.add_argument("--stage", nargs="+", metavar="NAME", help="these alone, in this order; default: all")
    parser.add_argument("--list", action="store_true", help="the stages, what they need, and whether they can run here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.list:
        for stage in STAGES:
            reason = stage.why_not()
            print(f"{stage.name}: {stage.what}. Needs {stage.needs}. {'Can run' if reason is None else reason}")
        return
    if args.out is None:
        parser.error("--out DIR: where is the report to go?")
    if args.child is not None:
        kind, _, number = args.child.partition(":")
        CHILDREN[kind](args.out, int(number or 0))
        return
    stages = {stage.name: stage for stage in STAGES}
    if unknown := set(args.stage or ()) - set(stages):
        parser.error(f"--stage {' '.join(sorted(unknown))}: there is none of that name; there are {', '.join(stages)}")
    args.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for name in args.stage or stages:
        print(f"--- {name}: {stages[name].what}", flush=True)
        outcome = run(stages[name], args.out)
        outcomes.append(outcome)
        write_text(args.out / f"{name}.json", json.dumps(asdict(outcome), indent=1))
        write_text(args.out / "report.md", report(args.out))
        print(
            f"    {outcome.status}, {outcome.seconds:.0f} s{': ' if outcome.reason else ''}{outcome.reason}", flush=True
        )
    print(f"\nreport: {args.out / 'report.md'}")
    if any(outcome.status in ("failed", "stopped") for outcome in outcomes):
        raise SystemExit(1)


def run(stage: Stage, out: Path) -> Outcome:
    """Runs the stage in a separate process, whose output goes to ``out/NAME.log``."""
    command = [part.replace("{out}", str(out.resolve())) for part in stage.command]
    outcome = Outcome(stage.name, "skipped", stage.why_not() or "", 0.0, shlex.join(command), describe())
    log = out / f"{stage.name}.log"
    if outcome.reason:
        log.unlink(missing_ok=True)
        return outcome
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(stage.environment or {})},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(SECONDS)
            status, reason = ("failed", f"exit status {code}") if code else ("passed", "")
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the child and the processes that it started
            child.wait()
            status, reason = "stopped", f"not done after {SECONDS / 60:.0f} minutes"
    return replace(outcome, status=status, reason=reason, seconds=time.perf_counter() - began)


def report(out: Path) -> str:
    """Report in Markdown on the outcomes and outputs of the stages in ``out``."""
    outcomes = {
        stage.name: Outcome(**json.loads(path.read_text(encoding="utf-8")))
        for stage in STAGES
        if (path := out / f"{stage.name}.json").exists()
    }
    lines = ["# On a GPU", "", "Made by `python -m benchmarks.on_gpu`. A stage is stopped after nine minutes.", ""]
    machines = list(dict.fromkeys(tuple(outcome.machine.items()) for outcome in outcomes.values()))
    for machine in machines:
        lines.append("- " + ", ".join(f"{name}: {value}" for name, value in machine if value))
    lines += ["", "| stage | what | outcome | seconds |", "|---|---|---|---|"]
    for stage in STAGES:
        if stage.name in outcomes:
            outcome = outcomes[stage.name]
            why = f": {outcome.reason}" if outcome.reason else ""
            lines.append(f"| {stage.name} | {stage.what} | {outcome.status}{why} | {outcome.seconds:.0f} |")
        else:
            lines.append(f"| {stage.name} | {stage.what} | not run yet | |")
    for stage in STAGES:
        log = out / f"{stage.name}.log"
        if stage.name not in outcomes or not log.exists():
            continue
        text = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        shown = text if stage.lines is None or outcomes[stage.name].status == "failed" else text[-stage.lines :]
        table = stage.lines is None and outcomes[stage.name].status == "passed"
        fence = [] if table else ["```"]
        lines += ["", f"## {stage.name}", "", f"`{outcomes[stage.name].command}`", "", *fence, *shown[-400:], *fence]
    return "\n".join([*lines, ""])


# ---- needs of the stages


def no_gpu() -> str | None:
    return None if torch.cuda.is_available() else f"no CUDA device (PyTorch {torch.__version__} finds none)"


def no_nvidia_gpu() -> str | None:
    return no_gpu() or ("the GPU is AMD's: the CUDA kernels are for NVIDIA's" if torch.version.hip else None)


def cannot_build() -> str | None:
    if reason := no_nvidia_gpu():
        return reason
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc") or (home and (Path(home) / "bin" / "nvcc").exists())
    return None if found else "no nvcc: install the CUDA toolkit, or set CUDA_HOME"


def no_triton() -> str | None:
    return no_gpu() or (None if triton_version() else "Triton is not installed")


def no_cuda_kernels() -> str | None:
    return no_nvidia_gpu() or cuda.unavailable_reason()


def no_sanitizer() -> str | None:
    if reason := no_cuda_kernels():
        return reason
    return None if shutil.which("compute-sanitizer") else "no compute-sanitizer on the PATH: it is in the CUDA toolkit"


def architecture() -> str:
    """Architecture of this machine's GPU for ``TORCH_CUDA_ARCH_LIST``; empty, for the extension's default, without an
    NVIDIA GPU."""
    if no_nvidia_gpu():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}a" if major == 9 else f"{major}.{minor}"


# ---- stages that are functions of this module, each run in a separate process


@contextmanager
def _rows(out: Path, name: str) -> Iterator[list[dict[str, object]]]:
    rows: list[dict[str, object]] = []
    yield rows
    write_csv(out / f"{name}.csv", rows)


def _loss(out: Path, number: int) -> None:
    with _rows(out, f"loss-{number}") as rows:
        rows += loss.run(False, LOSS_CASES[number])


def _memory(out: Path, number: int) -> None:
    with _rows(out, f"memory-{number}") as rows:
        rows += memory.run(False, MEMORY_LENGTHS[number])


def _sanitized(out: Path, number: int) -> None:
    """Runs one call for each CUDA kernel, for compute-sanitizer to watch; the results are not checked."""
    seen: set[str] = set()
    for call in calls(every=True):
        small = _small(call, "cpu")
        launched: list[cuda.Launch] = []
        arch = "sm_90a" if torch.cuda.get_device_capability()[0] == 9 else "sm_80"
        with cuda.watch_launches(launched.append, arch):
            _dispersion(small)
        if {one.kernel for one in launched} <= seen:
            continue
        seen |= {one.kernel for one in launched}
        _dispersion(_small(call, "cuda"))
    torch.cuda.synchronize()
    print(f"{len(seen)} kernels")


def _small(call: Call, device: str) -> Call:
    """Copy of ``call`` on few tokens, of ragged number."""
    z, length = call.layers[0], SANITIZED_LENGTH
    features = SANITIZED_FEATURES.get(z.shape[2], z.shape[2])
    torch.manual_seed(0)
    pair_ids = None if call.pair_ids is None else (torch.arange(length) // 50 - 1)[None].to(device)
    bounds = None if call.cu_seqlens is None else torch.tensor([0, 1, 100, 100, length], dtype=torch.int32).to(device)
    layers = [torch.randn(1, length, features).to(device, z.dtype) for _ in call.layers]
    return replace(call, layers=layers, pair_ids=pair_ids, cu_seqlens=bounds)


def _dispersion(call: Call) -> list[Tensor]:
    kernels = cuda.CudaKernels(call.layers[0], call.precision or "tf32x3")
    found = launch.dispersion(call.layers, call.potential, call.pair_ids, call.cu_seqlens, call.with_grad, kernels)
    if found.scale is None:
        return []
    one, dtype = torch.ones((), device=found.scale.device), call.layers[0].dtype
    finished = launch.finish(lambda _: kernels, found.gradients, call.layers, found.scale, one, call.potential, dtype)
    return [gradient for gradient in finished if gradient is not None]


# Parts of tests/backends/test_triton.py, each small enough for nine minutes with all kernels compiled anew.
TESTS = {
    "shapes": "TestKernels and ragged",
    "masks": "TestKernels and (masks or packed)",
    "sampled": "TestKernels and sampled",
    "edges": "TestKernels and not (ragged or masks or packed or sampled)",
    "device": "not TestKernels",
}
CHILDREN = {"loss": _loss, "memory": _memory, "sanitized": _sanitized}
# Parts of the loss and memory suites, each small enough for nine minutes.
LOSS_CASES = [[case] for case in loss.CASES["cuda"]]
MEMORY_LENGTHS = [[length, 2 * length] for length in memory.LENGTHS["cuda"][::2]]


def _child(what: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.on_gpu", "--child", what, "--out", "{out}"]


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfE", "--durations=5", *arguments]


def _stages() -> list[Stage]:
    one, triton, both = "a CUDA or ROCm GPU", "a GPU and Triton", "an NVIDIA GPU and the CUDA kernels (stage build)"
    sanitizer = "an NVIDIA GPU, the CUDA kernels (stage build) and compute-sanitizer"
    stages = [
        Stage(
            "build",
            "the CUDA kernels, built for this GPU",
            "an NVIDIA GPU, nvcc, and setuptools, ninja and wheel",
            cannot_build,
            [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."],
            {"DISPERSION_KERNELS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture()},
            lines=20,
        )
    ]
    for impl, why_not, needs in (("triton", no_triton, triton), ("cuda", no_cuda_kernels, both)):
        for part, chosen in TESTS.items():
            # The value of the class's fixture is the first part of a test's name; Triton's own tests have no fixture.
            impl_filter = "not [cuda" if impl == "triton" else "[cuda"
            command = _pytest("tests/backends/test_triton.py", "-k", f"({chosen}) and {impl_filter}")
            what = f"pytest -m gpu, {impl}: {part}"
            stages.append(Stage(f"tests-{impl}-{part}", what, needs, why_not, command, lines=30))
    stages.append(
        Stage(
            "tests-others",
            "pytest -m gpu: every other file",
            one,
            no_gpu,
            _pytest("--ignore=tests/backends/test_triton.py", "tests"),
            lines=30,
        )
    )
    for tool in ("memcheck", "racecheck"):
        checker = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "3",
            "--kernel-name",
            "kernel_substring=dk_",
        ]
        what = f"compute-sanitizer's {tool} over a call of each CUDA kernel"
        command = [*checker, *_child("sanitized")]
        stages.append(Stage(f"sanitizer-{tool}", what, sanitizer, no_sanitizer, command, lines=20))
    suite = [sys.executable, "-m", "benchmarks", "--suite"]
    stages.append(
        Stage(
            "accuracy",
            "errors by dtype and condensation, all backends and the naive version",
            one,
            no_gpu,
            [*suite, "accuracy", "--out", "{out}/accuracy.csv"],
        )
    )
    for number, cases in enumerate(LOSS_CASES):
        shapes = ", ".join("x".join(map(str, case)) for case in cases)
        what = f"time, memory and error of all backends, naive and compiled, at B x L x F = {shapes}"
        stages.append(Stage(f"loss-{number}", what, one, no_gpu, _child(f"loss:{number}")))
    for number, lengths in enumerate(MEMORY_LENGTHS):
        what = f"peak memory and time against L, L = {', '.join(f'{length:,}' for length in lengths)}"
        stages.append(Stage(f"memory-{number}", what, one, no_gpu, _child(f"memory:{number}")))
    stages.append(
        Stage(
            "model",
            "predicted times beside the measured ones",
            triton + ", one of the model's cards",
            no_triton,
            [sys.executable, "-m", "kernel_audit.gpu_model", "--measure", "--out", "{out}/gpu-model.md"],
        )
    )
    stages.append(
        Stage(
            "train",
            "a training step of --preset gpt2 with and without the loss",
            one + ", and the packages of the extra gpt2",
            no_gpu,
            [*suite, "train", "--out", "{out}/train.csv"],
        )
    )
    return stages


STAGES = _stages()


if __name__ == "__main__":
    main()
