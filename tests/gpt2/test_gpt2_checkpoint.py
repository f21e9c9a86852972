"""Checkpoints that are not what a run wrote: damaged, incomplete, of another user, made to do harm."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt2_runs import assert_same_weights, command_line, refusal

from dispersion_kernels.gpt2 import checkpoint, train

for library in ("tokenizers", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(library)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of six steps, and of what it read."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))
        patch.setattr(train, "keep_freed_memory", lambda: None)
        assert train.main(command_line(folder, folder / "out")) == 0
    return folder


@pytest.fixture
def out(finished, tmp_path, monkeypatch):
    """A copy of that run, of the same user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(finished / "xdg"))
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)
    return shutil.copytree(finished / "out", tmp_path / "out")


@pytest.fixture
def refused(out, capsys):
    """What `--resume` says."""
    return lambda *more: refusal(capsys, ["--resume", "--out", str(out), *more])


def resume(out: Path, *more: str) -> int:
    return train.main(["--resume", "--out", str(out), *more])


def load(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def store(out: Path, state: dict[str, Any], *, sealed: bool) -> None:
    """Writes a changed checkpoint, `sealed` with the checksums of what it has now."""
    if sealed:
        parts = {name: part for name, part in state.items() if name != "checksums"}
        state = {**parts, "checksums": {name: checkpoint.checksum(part) for name, part in parts.items()}}
    torch.save(state, out / "checkpoint.pt")


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", None])
def test_a_damaged_checkpoint_is_named(out, refused, damage):
    file = out / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-1000] if damage is None else damage)
    assert f"{file} is damaged, or not a checkpoint of dispersion-gpt2" in refused()


def test_a_file_that_is_another_checkpoint_is_named(out, refused):
    torch.save({"model": {}}, out / "checkpoint.pt")
    assert "(it lacks arguments)" in refused()
    torch.save(Path("code that would run"), out / "checkpoint.pt")
    assert "is damaged, or not a checkpoint" in refused()
    (out / "checkpoint.pt").unlink()
    (out / "checkpoint.pt").mkdir()
    assert "it is not a regular file" in refused()


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_flipped_weights_are_seen(out, refused, part):
    state = load(out)
    tensors = state["model"] if part == "model" else {i: moments["exp_avg"] for i, moments in state[part].items()}
    max(tensors.values(), key=torch.numel).flatten()[:1000].neg_()
    store(out, state, sealed=False)
    assert f"its {part} does not have its checksum" in refused()


@pytest.mark.parametrize("part", checkpoint.PARTS)
def test_a_part_that_is_missing_other_or_of_another_type_is_named(out, refused, part):
    state = load(out)
    value = state.pop(part)
    store(out, state, sealed=True)
    assert f"(it lacks {part})" in refused()
    store(out, {**state, part: value, "more": 1}, sealed=True)
    assert "(it has 'more', which does not belong there)" in refused()
    store(out, {**state, part: None}, sealed=True)
    assert f"(its {part} is of type NoneType)" in refused()


def without(name: Any) -> Any:
    return lambda part: part.pop(name)


def with_more(name: Any, value: Any) -> Any:
    return lambda part: part.update({name: value})


STATE = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model", without("h.0.attn.c_attn.bias"), "its model lacks h.0.attn.c_attn.bias"),
        ("model", with_more("h.7", torch.zeros(1)), "its model has 'h.7', which does not belong there"),
        ("model", with_more("wte.weight", torch.zeros(2, 2)), "its model has wte.weight as torch.float32 [2, 2]"),
        ("model", with_more("ln_f.bias", torch.zeros(16).half()), "its model has ln_f.bias as torch.float16 [16]"),
        ("model", with_more("ln_f.bias", "zeros"), "'str' object has no attribute"),
        ("optimizer", without(3), "its optimizer lacks 3"),
        ("optimizer", with_more(99, STATE), "its optimizer has 99"),
        ("optimizer", with_more(3, STATE), "its optimizer's 3 has exp_avg as torch.float32 [3]"),
        ("optimizer", with_more(3, {"step": torch.tensor(1.0)}), "its optimizer's 3 lacks exp_avg"),
        ("config", without("dropout"), "its config lacks dropout"),
        ("config", with_more("depth", 3), "its config has 'depth', which does not belong there"),
        ("config", with_more("layers", 3), "its model lacks h.2."),
        ("config", with_more("layers", 10**9), "too few for 1000000000 layers"),
        ("config", with_more("mlp_width", 10**9), "expected torch.float32 [1000000000, 16]"),
        ("config", with_more("vocab", 100), "expected torch.float32 [100, 16]"),
        ("config", with_more("heads", 0), "heads must be a positive integer"),
        ("before", lambda part: part.pop(), "its before has 1 layers"),
        ("before", lambda part: part.__setitem__(0, "high"), "could not convert string to float"),
    ],
)
def test_a_checkpoint_whose_parts_do_not_fit_is_refused(out, refused, part, change, message):
    state = load(out)
    change(state[part])
    store(out, state, sealed=True)
    said = refused()
    assert f"{out / 'checkpoint.pt'} is damaged, or not a checkpoint of dispersion-gpt2" in said
    assert message in said


def test_a_vocabulary_smaller_than_the_texts_is_refused(out, refused):
    """Which would look tokens up beyond the end of the embedding."""
    state = load(out)
    state["config"]["vocab"] = 100
    state["model"]["wte.weight"] = state["model"]["wte.weight"][:100].clone()
    store(out, state, sealed=True)
    assert "--tokenizer bytes has 257 tokens, the weights in" in refused()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", -1, "its step is -1"),
        ("seconds", 0.0, "its step is 6 after 0.0 seconds"),
        ("seconds", float("nan"), "after nan seconds"),
        ("scaler", {"scale": "large"}, "is damaged"),
        ("data", "bytes-other", "the text or its tokeniser is not what"),
        ("windows", 7, "takes 7 windows, and 6 with --batch-size 2 and --accumulate 3 on 1 ranks"),
        ("arguments", ["--help"], "unrecognized arguments: --help"),
        ("arguments", ["--steps", "-3"], "argument --steps: wanted a whole number of at least 1"),
        ("arguments", ["--eval-interval=0"], "argument --eval-interval"),
        ("arguments", ["--cache="], "argument --cache: wanted the name of a file or folder"),
        ("arguments", [3], "is damaged"),
        ("arguments", ["--device=meta", "--tokenizer=bytes"], "--device meta: PyTorch cannot use it here"),
    ],
)
def test_values_that_no_run_has_are_refused(out, refused, name, value, message):
    state = load(out)
    state[name] = value
    more = ("--dtype", "float16") if name == "scaler" else ()
    if name == "arguments":
        state["signature"] = checkpoint.signature(value)
    store(out, state, sealed=True)
    assert message in refused(*more)


def crafted(out: Path, name: str, path: Path) -> None:
    """A checkpoint whose command line names another path."""
    state = load(out)
    shape = ("--preset", "--layers", "--width", "--mlp-width", "--context", "--norm", "--init-std")
    kept = [argument for argument in state["arguments"] if not argument.startswith((f"--{name}=", *shape))]
    if name == "data":
        kept[kept.index("--data") + 1] = str(path)
    else:
        kept.append(f"--{name}={path}")
    state["arguments"] = kept
    store(out, state, sealed=True)


@pytest.mark.parametrize("name", ["data", "cache", "init-from", "teacher"])
def test_paths_of_a_crafted_checkpoint_are_not_used(out, refused, finished, tmp_path, monkeypatch, name):
    monkeypatch.setattr(train, "load_tokens", lambda options: pytest.fail("the paths were used"))
    hostile = tmp_path / "hostile"
    crafted(out, name, hostile)
    said = refused()
    assert "was not written by you on this machine" in said
    assert f"--data {hostile if name == 'data' else finished / 'texts'}" in said
    if name in ("init-from", "teacher"):
        assert f"--{name} {hostile}" in said
    assert not hostile.exists()


def test_a_run_of_another_user_goes_on_where_its_paths_are_given(out, refused, finished, tmp_path, monkeypatch, capsys):
    """The cache is the user's own then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another"))
    assert "are used only if you give them, too: --data" in refused("--steps", "8")
    shutil.copytree(finished / "texts", tmp_path / "moved")
    assert resume(out, "--steps", "8", "--data", str(tmp_path / "moved")) == 0
    assert f"goes on after step 6, 2 x 1 x 1 windows a step, --data {tmp_path / 'moved'}\n" in capsys.readouterr().out
    assert list((tmp_path / "of another").glob("*/bytes-*"))
    # From now on it is a run of this user.
    assert resume(out, "--steps", "9") == 0


def test_a_run_says_which_paths_it_goes_on_with(out, finished, capsys):
    assert resume(out) == 0
    assert f"--data {finished / 'texts'} --cache {finished / 'cache'}\n" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("fault", ["readable", "cut", "nowhere"])
def test_a_key_that_is_not_the_users_alone_signs_nothing(out, refused, tmp_path, monkeypatch, fault):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    key = checkpoint.user_key()
    file = tmp_path / "mine" / "dispersion-kernels" / "key"
    assert (len(key), file.stat().st_mode & 0o777) == (32, 0o600)
    assert key == checkpoint.user_key()
    if fault == "readable":
        file.chmod(0o644)
    elif fault == "cut":
        file.write_bytes(b"")
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(out / "checkpoint.pt"))
    assert checkpoint.signature([]) == ""
    assert not checkpoint.is_signed({"arguments": [], "signature": ""})
    assert "was not written by you" in refused()


def test_a_step_keeps_its_windows(out, refused, capsys):
    assert resume(out, "--steps", "7", "--batch-size", "1") == 0
    assert "1 x 2 x 1 windows a step" in capsys.readouterr().out
    assert "takes 2 windows, and 4 with --batch-size 4 and --accumulate 1 on 1 ranks" in refused("--batch-size", "4")
    assert "takes 2 windows, and 3 with" in refused("--accumulate", "3")


def test_another_dtype_and_another_decay_are_those_given(out, finished, tmp_path):
    """float16 brings a GradScaler that the checkpoint has no state of."""
    assert resume(out, "--steps", "8", "--dtype", "float16") == 0
    assert load(out)["scaler"]
    other = shutil.copytree(finished / "out", tmp_path / "other")
    assert resume(out, "--steps", "9", "--dtype", "float32") == 0
    for folder, decay in ((out, "0"), (other, "100")):
        shutil.copy(finished / "out" / "checkpoint.pt", folder)
        assert resume(folder, "--steps", "7", "--weight-decay", decay) == 0
    with pytest.raises(AssertionError):
        assert_same_weights(out, other)
