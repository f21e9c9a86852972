"""How a run of `dispersion-gpt2` ends early: a signal, a closed terminal, a full disk, another run, no memory."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from gpt2_runs import (
    ENDLESS,
    assert_same_weights,
    child,
    command_line,
    computed,
    metrics,
    refusal,
    wait_for_step,
)

from dispersion_kernels.gpt2 import files, runtime, train

pty, resource = pytest.importorskip("pty"), pytest.importorskip("resource")  # which Windows lacks
for library in ("tokenizers", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(library)
needs_distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")


@pytest.fixture(autouse=True)
def one_user_on_one_thread(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def signals_as_in_a_terminal():
    """SIGINT and SIGHUP with their default handlers, here and in child processes: a background job and nohup have them
    ignored."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    previous = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.fixture
def arguments(tmp_path):
    return partial(command_line, tmp_path)


def before_step(patch: pytest.MonkeyPatch, number: int, action) -> None:
    """Has `action` happen before a run's step of that number, counted from 0."""
    step = train.Run.train_step

    def train_step(self, measure):
        if self.step == number:
            action()
        return step(self, measure)

    patch.setattr(train.Run, "train_step", train_step)


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_its_step_and_nothing_is_lost(arguments, tmp_path, capfd, number):
    assert train.main(arguments(tmp_path / "whole")) == 0
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 1, lambda: os.kill(os.getpid(), number))
        assert train.main(arguments(tmp_path / "parts")) == 128 + number
    printed = capfd.readouterr()
    assert "stopped after step 2 of 6 and saved" in printed.out
    assert "stopping after this step, and saving; a second signal stops at once, without saving" in printed.err
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    assert not (tmp_path / "parts" / "results.json").exists()
    assert train.main(["--resume", "--out", str(tmp_path / "parts")]) == 0
    assert computed(metrics(tmp_path / "parts")) == computed(metrics(tmp_path / "whole"))
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_ends_a_comparison_too(arguments, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train.main(arguments(tmp_path / "out", "--compare")) == 143
    assert not (tmp_path / "out" / "with").exists()
    assert train.main(["--resume", "--out", str(tmp_path / "out")]) == 0


def test_a_hangup_that_is_ignored_stays_so(arguments, tmp_path):
    """As under nohup."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            before_step(patch, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
            assert train.main(arguments(tmp_path / "out")) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (1, "stopped at once, after step 1; there is no checkpoint"),
        (4, "stopped at once, after step 4; the checkpoint is of step 3"),
    ],
)
def test_what_a_second_ctrl_c_says_is_true(arguments, tmp_path, capfd, at, said):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, at, twice)
        assert train.main(arguments(tmp_path / "out")) == 130
    assert f"dispersion-gpt2: {said}\n" in capfd.readouterr().err
    assert (tmp_path / "out" / "checkpoint.pt").exists() == ("no checkpoint" not in said)
    if at == 4:
        assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 3


def test_a_second_ctrl_c_while_saving_keeps_the_old_checkpoint(arguments, tmp_path, capfd, monkeypatch):
    """PyTorch makes a RuntimeError of what interrupts its writing."""

    def write(state, stream):
        class Interrupted:
            def write(self, content):
                raise KeyboardInterrupt

        save(state, Interrupted() if state["step"] == 6 else stream)

    save = torch.save
    monkeypatch.setattr(torch, "save", write)
    assert train.main(arguments(tmp_path / "out")) == 130
    assert "stopped at once, after step 6; the checkpoint is of step 3\n" in capfd.readouterr().err
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] == 3


def test_ctrl_c_before_training_says_so(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_tokens", lambda options: os.kill(os.getpid(), signal.SIGINT))
    assert train.main(arguments(tmp_path / "out")) == 130
    assert "interrupted before training, nothing is lost" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.process
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_distributed)])
def test_ctrl_c_in_real_processes(arguments, tmp_path, ranks):
    out = tmp_path / "out"
    process = child(arguments(out, *ENDLESS), ranks=ranks)
    wait_for_step(process, out)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert f"stopped after step {step} of 100000 and saved" in printed
    assert f"dispersion-gpt2 --resume --out {out}" in printed
    assert metrics(out)[-1]["step"] == step
    # torchrun, when it is interrupted, ends with an error of its own.
    assert process.returncode == (130 if ranks == 1 else 1), printed
    # Of two ranks: one goes on with twice the windows.
    assert train.main(["--resume", "--out", str(out), "--steps", str(step + 2)]) == 0
    assert [line["step"] for line in metrics(out)] == list(range(1, step + 3))
    assert torch.load(out / "checkpoint.pt", weights_only=True)["windows"] == 2 * ranks


@pytest.mark.process
def test_a_closed_terminal_ends_the_run_saved(arguments, tmp_path):
    """The system sends SIGHUP, and what is written to the terminal fails from then on."""
    out = tmp_path / "out"
    ours, theirs = pty.openpty()
    code = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-m", "dispersion_kernels.gpt2.train", *arguments(out, *ENDLESS)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    try:
        wait_for_step(process, out)
        os.close(ours)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        process.kill()
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == metrics(out)[-1]["step"]


@pytest.mark.process
def test_a_pipe_that_is_gone_does_not_end_the_run(arguments, tmp_path):
    """As when Ctrl-C ends `tee`, too."""
    out = tmp_path / "out"
    process = child(arguments(out, *ENDLESS, "--eval-interval", "1"))
    wait_for_step(process, out)
    process.stdout.close()
    written = (out / "metrics.jsonl").stat().st_size
    while (out / "metrics.jsonl").stat().st_size < written + 2000:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == metrics(out)[-1]["step"]


def test_a_second_run_in_the_same_folder_is_refused(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    refused = partial(refusal, capsys)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        before_step(patch, 4, lambda: said.append(refused(["--resume", "--out", str(out)])))
        assert train.main(arguments(out)) == 0
    assert said == [f"--out {out}: another run is writing there; wait for its end, stop it, or choose another folder\n"]
    with files.locked(tmp_path / "new"):
        assert "another run is writing there" in refused(arguments(tmp_path / "new"))
    assert train.main(["--resume", "--out", str(out)]) == 0


def test_a_comparison_has_both_of_its_folders(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    busy = f"--out {out / 'with'}: another run is writing there"
    said = []
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 1, lambda: said.append(refusal(capsys, arguments(out / "with"))))
        assert train.main(arguments(out, "--compare")) == 0
    assert [line.split(";")[0] for line in said] == [busy] * 2  # in the run without the loss and in the one with it
    with files.locked(out / "with"):
        assert busy in refusal(capsys, ["--resume", "--out", str(out)])


@pytest.mark.process
def test_the_lock_of_a_dead_process_is_none(arguments, tmp_path):
    out = tmp_path / "out"
    process = child(arguments(out, *ENDLESS))
    wait_for_step(process, out)
    process.kill()
    process.communicate()
    assert (out / ".lock").exists()
    assert train.main(arguments(out)) == 0


def test_a_run_that_is_refused_leaves_no_folder(arguments, tmp_path, capsys):
    assert "no such file" in refusal(capsys, arguments(tmp_path / "a" / "b", "--data", str(tmp_path / "nothing")))
    assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes").touch()
    assert "no such file" in refusal(capsys, arguments(tmp_path / "kept", "--data", str(tmp_path / "nothing")))
    assert (tmp_path / "kept" / "notes").exists()
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} cannot be written (File exists)" in refusal(capsys, arguments(tmp_path / "file"))


def limit_file_size(size: int) -> None:
    """The largest file that this process may write: what the system says beyond it is much as of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def file_size_limit(size: int | None = None):
    """The limit, where a size is given, until the block ends: pytest's own output may go to a file that is larger."""
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if size is not None:
            limit_file_size(size)
        yield
    finally:
        limit_file_size(soft)


def test_a_disk_that_fills_up_keeps_the_old_checkpoint(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch, file_size_limit():
        before_step(patch, 4, lambda: limit_file_size(50_000))
        said = refusal(capsys, arguments(out))
    assert re.fullmatch(
        rf"{out / 'checkpoint.pt'} cannot be written \(File too large\): [\d.e+]+ GB are free, it needs 0.000132 GB; "
        "make room and --resume from the checkpoint before it, which is kept\n",
        said,
    )
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 3
    assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert train.main(arguments(tmp_path / "whole")) == 0
    assert_same_weights(tmp_path / "whole", out)


@pytest.mark.parametrize(
    ("size", "name"), [(0, "metrics.jsonl"), (1000, "metrics.jsonl"), (45_000, "checkpoint.pt"), (300_000, None)]
)
def test_a_file_that_cannot_be_written_is_named(arguments, tmp_path, capsys, size, name):
    out = tmp_path / "out"
    train.main(arguments(out, "--steps", "1"))  # the cache is there, matplotlib's, too
    for file in out.iterdir():
        file.unlink()
    with file_size_limit(size):
        if name is None:
            assert train.main(arguments(out)) == 0
        else:
            said = refusal(capsys, arguments(out))
    if name is not None:
        assert f"{out / name} cannot be written (File too large): " in said


def test_weights_that_cannot_be_written_are_named(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(arguments(out)) == 0
    for name, size in (("model.safetensors", 40_000), ("condensation.png", 40_000)):
        if name == "condensation.png":
            size = (out / name).stat().st_size - 1000
        (out / name).unlink()
        # The checkpoint is written already.
        with file_size_limit(size):
            said = refusal(capsys, ["--resume", "--out", str(out)])
        assert f"{out / name} cannot be written (File too large)" in said, said
        assert train.main(["--resume", "--out", str(out)]) == 0


def test_no_memory_is_said_on_a_cpu_too(arguments, tmp_path, capsys):
    said = refusal(capsys, arguments(tmp_path / "out", "--mlp-width", str(10**15)))
    assert re.match(r"can't allocate memory: you tried to allocate \d+ bytes.*; take a smaller --batch-size", said)
    assert runtime.out_of_memory(MemoryError()) == "Python cannot allocate memory"
    assert (
        runtime.out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")) == "CUDA out of memory. Tried"
    )
    assert runtime.out_of_memory(RuntimeError("shapes differ")) is None
