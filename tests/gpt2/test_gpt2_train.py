"""The command `dispersion-gpt2`: what it computes, what it writes, that it resumes exactly, what it refuses."""

import json
import platform
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from gpt2_runs import OFTEN, SHORT, assert_same_weights, child, command_line, computed, metrics, refusal, weights

from dispersion_kernels import fused_dispersion_loss
from dispersion_kernels.condensation import mean_pairwise_cosine
from dispersion_kernels.gpt2 import GPT2, GPT2Config, build, files, load_weights, save_weights, train
from dispersion_kernels.gpt2.data import load_data, mixed_seed, training_windows, validation_windows, windows_at
from dispersion_kernels.gpt2.options import build_parser, complete

for library in ("tokenizers", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(library)

needs_distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are faster so, and the children of these tests do not fight over the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def memory_goes_back(monkeypatch):
    """Other tests of this process measure memory."""
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """The user's, where the key lies that signs checkpoints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def text(tmp_path):
    command_line(tmp_path, tmp_path)
    return tmp_path / "texts"


@pytest.fixture
def arguments(tmp_path):
    return partial(command_line, tmp_path)


@pytest.fixture
def run(arguments):
    def run(out: Path, *more: str) -> list[dict]:
        assert train.main(arguments(out, *more)) == 0
        return metrics(out)

    return run


@pytest.fixture
def refused(arguments, tmp_path, capsys):
    """What the command says of options it does not take."""

    def refused(*more: str, out: Path | None = None) -> str:
        return refusal(capsys, arguments(out or tmp_path / "refused", *more))

    return refused


def test_a_run_learns_and_writes_what_it_says(run, tmp_path, capsys):
    out = tmp_path / "out"
    lines = run(out, "--steps", "40", "--log-interval", "5", "--eval-interval", "20")
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"] - 1
    assert set(lines[0]) == {
        *("step", "cross_entropy", "dispersion", "dispersion_per_layer", "cosine", "lr", "grad_norm"),
        *("tokens_per_second", "processor_seconds", "peak_memory_bytes"),
    }
    assert [line["step"] for line in lines if "validation_loss" in line] == [20, 40]
    for line in lines:
        assert list(line["dispersion_per_layer"]) == ["1", "2"]
        assert line["dispersion"] == pytest.approx(sum(line["dispersion_per_layer"].values()) / 2)
        assert all(-1 <= cosine <= 1 for cosine in line["cosine"])
        assert 1e7 < line["peak_memory_bytes"] < 1e11
        assert line["tokens_per_second"] > 0
        assert line["processor_seconds"] > 0
    assert sorted(path.name for path in out.iterdir()) == [
        *(".lock", "checkpoint.pt", "condensation-over-training.png", "condensation.png", "config.json"),
        *("metrics.jsonl", "model.safetensors", "results.json"),
    ]
    for name in ("condensation.png", "condensation-over-training.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert results["validation_loss"] == lines[-1]["validation_loss"]
    assert results["cosine_after"] == lines[-1]["validation_cosine"]
    assert len(results["cosine_before"]) == 2
    assert results["cosine_before"] != results["cosine_after"]
    printed = capsys.readouterr().out
    assert f"validation loss {results['validation_loss']:.4f}" in printed
    assert str(out) in printed


def test_the_exported_weights_and_the_validation_figures_are_right(run, arguments, tmp_path):
    out = tmp_path / "out"
    run(out, "--dropout", "0.5")  # which validation must not see
    results = json.loads((out / "results.json").read_text())
    model = load_weights(out).eval()
    options = complete(build_parser().parse_args(arguments(out)))
    data = load_data(options.data, tokenizer="bytes", cache=options.cache)
    tokens, targets = windows_at(data.validation, validation_windows(data.validation, 16, 5), 16)
    with torch.no_grad():
        output = model(tokens, targets, True)
    assert results["validation_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    expected = [mean_pairwise_cosine(hidden).item() for hidden in output.hidden]
    assert results["cosine_after"] == pytest.approx(expected, abs=1e-5)


def test_one_step_is_adamw_on_cross_entropy_plus_weighted_dispersion(run, arguments, tmp_path):
    """Against the step written out: fresh model, the same windows, plain AdamW on matrices and vectors."""
    more = ("--steps", "1", "--dispersion-weight", "0.7", "--tau", "0.5", "--dispersion-layers", "2", "--seed", "3")
    (line,) = run(tmp_path / "out", *more)
    options = complete(build_parser().parse_args(arguments(tmp_path / "out", *more)))
    data = load_data(options.data, tokenizer="bytes", cache=options.cache)
    torch.manual_seed(mixed_seed(3))
    model = GPT2(GPT2Config(layers=2, width=16, heads=2, context=16, vocab=257))
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01 / 2, betas=(0.9, 0.95))
    output = model(*windows_at(data.train, training_windows(data.train, 16, 2, seed=3, step=0), 16), True)
    dispersion = fused_dispersion_loss(output.hidden[1], tau=0.5, impl="reference")
    (output.loss + 0.7 * dispersion).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert line["cross_entropy"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert line["dispersion"] == pytest.approx(dispersion.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert line["lr"] == 0.005
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights(tmp_path / "out")[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_accumulated_batches_equal_the_large_one(run, tmp_path):
    one = run(tmp_path / "one", "--batch-size", "6", "--dispersion-weight", "0.5")
    two = run(tmp_path / "two", "--batch-size", "2", "--accumulate", "3", "--dispersion-weight", "0.5")
    for first, second in zip(one, two, strict=True):
        for name in ("cross_entropy", "dispersion", "cosine", "grad_norm"):
            assert first[name] == pytest.approx(second[name], rel=1e-4), name
    assert_same_weights(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-4)


def test_the_loss_disperses(run, tmp_path):
    run(tmp_path / "without", "--steps", "30", "--dispersion-weight", "0")
    run(tmp_path / "with", "--steps", "30", "--dispersion-weight", "2")
    cosine = {
        name: json.loads((tmp_path / name / "results.json").read_text())["cosine_mean"] for name in ("without", "with")
    }
    assert cosine["with"] < cosine["without"] - 0.05


def test_without_weight_the_dispersion_is_measured_and_has_no_effect(run, tmp_path):
    one = run(tmp_path / "one", "--dispersion-weight", "0")
    run(tmp_path / "two", "--dispersion-weight", "0", "--potential", "uniformity", "--dispersion-layers", "last")
    assert all(line["dispersion"] < 0 for line in one)
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_a_fraction_of_the_pairs(run, tmp_path):
    """Other steps than with all of them, and near them."""
    context = ("--context", "64", "--steps", "2")
    every = run(tmp_path / "all", *context)
    for name in ("none", "full_rank"):
        some = run(tmp_path / name, *context, "--pairs", "0.3", "--control-variate", name)
        for one, other in zip(every, some, strict=True):
            assert one["dispersion"] != other["dispersion"]
            assert one["dispersion"] == pytest.approx(other["dispersion"], rel=0.05)


@pytest.mark.parametrize("more", [(), ("--dropout", "0.3", "--dispersion-tokens", "5", "--accumulate", "2")])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(run, tmp_path, more):
    whole = run(tmp_path / "whole", *more)

    class Interrupted(Exception):
        pass

    step = train.Run.train_step

    def interrupted_step(self, measure):
        if self.step == 4:  # one step after the checkpoint of step 3
            raise Interrupted
        return step(self, measure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "train_step", interrupted_step)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", *more)
    assert [line["step"] for line in metrics(tmp_path / "parts")] == [1, 2, 3, 4]
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "cross_')  # the machine died while it wrote this
    assert train.main(["--resume", "--out", str(tmp_path / "parts")]) == 0
    assert computed(metrics(tmp_path / "parts")) == computed(whole)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    before = [
        json.loads((tmp_path / name / "results.json").read_text())["cosine_before"] for name in ("whole", "parts")
    ]
    assert before[0] == before[1]


def test_resuming_can_train_longer_but_not_change_the_model(run, refused, tmp_path):
    out = tmp_path / "out"
    run(out)
    assert train.main(["--resume", "--out", str(out), "--steps", "9"]) == 0
    assert [line["step"] for line in metrics(out)] == list(range(1, 10))
    before = (out / "results.json").read_bytes()
    assert "has taken 9 steps, more than --steps 8; give at least" in refused("--resume", "--steps", "8", out=out)
    assert (out / "results.json").read_bytes() == before
    assert "--width was 16 when the run in" in refused("--resume", "--width", "32", out=out)
    assert "--seed was 0" in refused("--resume", "--seed", "1", out=out)
    assert "leave it out" in refused("--resume", "--compare", out=out)


def test_a_run_is_not_overwritten(run, refused, tmp_path):
    run(tmp_path / "out")
    assert "holds a run already: continue it with --resume" in refused(out=tmp_path / "out")


def test_another_text_is_not_resumed_with(run, text, tmp_path, capsys):
    run(tmp_path / "out")
    (text / "0.txt").write_text("something else\n" * 20)
    assert train.main(["--resume", "--out", str(tmp_path / "out")]) == 2
    assert "is not what" in capsys.readouterr().err


def test_an_absent_checkpoint_is_named(refused, tmp_path, capsys):
    assert f"there is no checkpoint in {tmp_path / 'none'}" in refused("--resume", out=tmp_path / "none")
    assert train.main(["--resume"]) == 2
    assert "--resume needs --out" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_written_keeps_the_old_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")

    def fail_half_way():
        with files.replaced(path) as file:
            file.write(b"half of the new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_compare_end_to_end(run, arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(arguments(out, "--compare", "--steps", "12", "--dispersion-weight", "1")) == 0
    printed = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["without", "with"]
    assert (out / "condensation.png").read_bytes().startswith(b"\x89PNG")
    for row in ("validation loss", "mean cosine, last layer", "mean cosine, all layers", "tokens per second"):
        assert row in printed
    assert f"{results['with']['validation_loss']:.4f}" in printed
    # The same start and the same batches; the one differs by the weight, and is what a single run gives.
    assert results["without"]["cosine_before"] == results["with"]["cosine_before"]
    one, two = metrics(out / "without"), metrics(out / "with")
    assert one[0]["cross_entropy"] == two[0]["cross_entropy"]
    assert one[-1]["dispersion"] > two[-1]["dispersion"]
    single = run(tmp_path / "single", "--steps", "12", "--dispersion-weight", "1")
    assert computed(single) == computed(two)


def test_a_comparison_resumes_where_it_was(arguments, refused, tmp_path, capsys):
    out = tmp_path / "out"
    assert train.main(arguments(out, "--compare")) == 0
    expected = {name: computed(metrics(out / name)) for name in ("without", "with")}
    shutil.rmtree(out / "with")
    (out / "results.json").unlink()
    assert train.main(["--resume", "--out", str(out)]) == 0
    assert {name: computed(metrics(out / name)) for name in ("without", "with")} == expected
    assert list(json.loads((out / "results.json").read_text())) == ["without", "with"]
    assert "is half of a comparison; resume the whole by --out" in refused("--resume", out=out / "with")


def test_training_goes_on_from_gpt2_weights(refused, arguments, tmp_path):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(layers=3, width=32, heads=4, context=64, vocab=300))
    save_weights(model, tmp_path / "weights")
    start = ["--init-from", str(tmp_path / "weights"), "--tokenizer", "bytes", "--lr", "1e-9", "--device", "cpu"]
    texts = arguments(tmp_path / "out")[:6]
    assert train.main([*texts, *SHORT, *OFTEN, *start, "--context", "16"]) == 0
    trained = load_weights(tmp_path / "out")
    assert trained.config == model.config
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert "--layers cannot be given with --init-from" in refused(*start)


def test_a_teacher_is_learnt_from(run, refused, tmp_path):
    """The divergence is the mean over the tokens of sum(p log(p / q)). It is all of the loss at weight 1, and falls
    further than at weight 0, at which the run is that without a teacher."""
    torch.manual_seed(0)
    teacher = GPT2(GPT2Config(layers=1, width=16, heads=2, context=16, vocab=257)).requires_grad_(False)
    teacher.wte.weight *= 20
    save_weights(teacher, tmp_path / "teacher")
    tokens = torch.randint(0, 257, (2, 16))
    logits = torch.randn(2, 16, 257, requires_grad=True)
    p, q = (x.double().softmax(-1) for x in (teacher(tokens).logits, logits.detach()))
    value = train.divergence(teacher, logits, tokens)
    torch.testing.assert_close(value.detach().double(), (p * (p / q).log()).sum(-1).mean(), rtol=1e-5, atol=0)
    value.backward()
    torch.testing.assert_close(logits.grad, ((q - p) / 32).float(), rtol=1e-4, atol=1e-7)

    plain = ["--dispersion-weight", "0", "--steps", "40"]
    run(tmp_path / "none", *plain)
    found = {}
    for weight in ("0", "1"):
        run(tmp_path / weight, *plain, "--teacher", str(tmp_path / "teacher"), "--teacher-weight", weight)
        student = load_weights(tmp_path / weight).eval()
        found[weight] = train.divergence(teacher, student(tokens).logits, tokens).item()
    assert_same_weights(tmp_path / "none", tmp_path / "0")
    assert found["1"] < 0.8 * found["0"]

    save_weights(GPT2(GPT2Config(layers=1, width=16, heads=2, context=8, vocab=257)), tmp_path / "teacher")
    said = refused("--teacher", str(tmp_path / "teacher"))
    assert "predicts 257 tokens in a context of 8, wanted 257 tokens in 16 or more; take a teacher" in said
    assert "--teacher: no GPT-2 weights at" in refused("--teacher", str(tmp_path / "nowhere"))
    assert "--teacher-weight: wanted a fraction from 0 to 1, got '2'" in refused("--teacher-weight", "2")


def test_a_folder_has_the_tokeniser_of_its_text(run, tmp_path):
    """As Hugging Face reads it: the tokens are those that the run was trained on."""
    run(tmp_path / "out", "--tokenizer", "bpe", "--vocab-size", "300")
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = (tmp_path / "texts" / "3.txt").read_text()
    kept = next((tmp_path / "cache").glob("bpe-*"))
    ids = bpe.encode(text).ids
    assert ids == tokenizers.Tokenizer.from_file(str(kept / "tokenizer.json")).encode(text).ids
    assert bpe.decode(ids) == text
    described = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (described["eos_token"], described["model_max_length"]) == ("<|endoftext|>", 16)
    run(tmp_path / "bytes")
    assert not (tmp_path / "bytes" / "tokenizer.json").exists()


def test_weights_that_cannot_be_gone_on_from(arguments, tmp_path, capsys):
    texts = arguments(tmp_path / "out")[:6]
    torch.manual_seed(0)
    save_weights(GPT2(GPT2Config(layers=1, width=16, heads=2, context=8, vocab=200)), tmp_path / "weights")
    for more, message in (
        (["--init-from", str(tmp_path / "weights"), "--tokenizer", "bytes"], "has 257 tokens, the weights in"),
        (["--init-from", str(tmp_path / "nowhere"), "--tokenizer", "bytes"], "--init-from: no GPT-2 weights at"),
    ):
        assert train.main([*texts, *more]) == 2
        assert message in capsys.readouterr().err
    save_weights(GPT2(GPT2Config(layers=1, width=16, heads=2, context=8, vocab=257)), tmp_path / "weights")
    start = ["--init-from", str(tmp_path / "weights"), "--tokenizer", "bytes", "--context", "9"]
    assert train.main([*texts, *start]) == 2
    assert "--context 9 is more than the weights' 8 positions" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_autocast(run, tmp_path, dtype):
    exact = run(tmp_path / "exact", "--steps", "8")
    lines = run(tmp_path / "low", "--steps", "8", "--dtype", dtype)
    assert lines[0]["cross_entropy"] != exact[0]["cross_entropy"]
    for low, high in zip(lines, exact, strict=True):
        assert low["cross_entropy"] == pytest.approx(high["cross_entropy"], rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "low").values())
    scaler = torch.load(tmp_path / "low" / "checkpoint.pt", weights_only=True)["scaler"]
    assert bool(scaler) == (dtype == "float16")


def test_checkpointed_activations_change_nothing(run, tmp_path):
    one = run(tmp_path / "one")
    two = run(tmp_path / "two", "--checkpoint-activations")
    assert computed(one) == computed(two)


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")), reason="no C++ compiler"
)
def test_compiled(run, tmp_path):
    one = run(tmp_path / "one", "--steps", "2", "--layers", "1", "--dispersion-layers", "last")
    two = run(tmp_path / "two", "--steps", "2", "--layers", "1", "--dispersion-layers", "last", "--compile")
    for eager, compiled in zip(one, two, strict=True):
        assert compiled["cross_entropy"] == pytest.approx(eager["cross_entropy"], rel=1e-4)
        assert compiled["dispersion"] == pytest.approx(eager["dispersion"], rel=1e-3)


def test_without_a_compiler_it_is_said(refused, monkeypatch):
    def fail(x):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    said = refused("--compile")
    assert said == "--compile: PyTorch cannot compile here (InvalidCxxCompiler: No working C++ compiler found)\n"


@pytest.mark.process
@needs_distributed
def test_two_processes_equal_one(run, arguments, tmp_path):
    more = ("--dispersion-weight", "0.5")
    one = run(tmp_path / "one", "--batch-size", "8", *more)
    process = child(arguments(tmp_path / "two", "--batch-size", "2", "--accumulate", "2", *more), ranks=2)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert printed.count("validation loss") == 3  # of one rank: two on the way, one at the end
    two = metrics(tmp_path / "two")
    for single, both in zip(one, two, strict=True):
        for name in ("cross_entropy", "dispersion", "grad_norm"):
            assert both[name] == pytest.approx(single[name], rel=1e-4), name
        if "validation_loss" in single:
            assert both["validation_loss"] == pytest.approx(single["validation_loss"], rel=1e-4)
            assert both["validation_cosine"] == pytest.approx(single["validation_cosine"], abs=1e-3)
    assert_same_weights(tmp_path / "one", tmp_path / "two", rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("choice", "layers", "expected"),
    [
        ("all", 5, [1, 2, 3, 4, 5]),
        ("last", 5, [5]),
        ("early_half", 6, [1, 2, 3]),
        ("late_half", 6, [4, 5, 6]),
        ("early_half", 5, [1, 2]),
        ("late_half", 5, [4, 5]),
        ("late_half", 1, [1]),
        ("4,2,2", 5, [2, 4]),
    ],
)
def test_layers_by_name_and_number(choice, layers, expected):
    assert build.dispersion_layers(choice, layers) == expected


def test_the_chosen_layers_are_the_ones_logged(run, tmp_path):
    every = run(tmp_path / "every", "--steps", "1")
    last = run(tmp_path / "last", "--steps", "1", "--dispersion-layers", "last")
    assert list(last[0]["dispersion_per_layer"]) == ["2"]
    assert last[0]["dispersion"] == pytest.approx(every[0]["dispersion_per_layer"]["2"], rel=1e-5)
    assert len(last[0]["cosine"]) == 2


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    options = complete(build_parser().parse_args(["--steps", "110", "--warmup", "10", "--lr", "2"]))
    rates = [build.learning_rate(step, options) for step in range(111)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2)
    assert rates[60] == pytest.approx(1.1)
    assert rates[110] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators do as they please")
def test_freed_memory_is_kept():
    resident = 'int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")'
    code = f"""
import os, torch
from dispersion_kernels.gpt2.runtime import keep_freed_memory
def left():
    before = {resident}
    torch.ones(2**26)
    return {resident} - before
gives_back = left()
keep_freed_memory()
print(gives_back < 2**26, left() > 2**27)
"""
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["True", "True"]


def test_presets_choose_shape_and_recipe():
    options = complete(build_parser().parse_args(["--preset", "gpt2-medium", "--heads", "8"]))
    assert (options.layers, options.width, options.heads, options.context) == (24, 1024, 8, 1024)
    assert options.tokenizer == "gpt2"
    options = complete(build_parser().parse_args(["--width", "64"]))
    assert (options.preset, options.width, options.tokenizer) == ("nano", 64, "bpe")
    assert GPT2Config(width=64, heads=4, mlp_width=options.mlp_width).mlp_width == 256
    assert options.context >= 256


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "0"), "argument --steps: wanted a whole number of at least 1, got '0'"),
        (("--steps", "many"), "argument --steps: wanted a whole number of at least 1, got 'many'"),
        (("--lr", "-1"), "argument --lr: wanted a number from 0"),
        (("--lr", "nan"), "argument --lr: wanted a number from 0"),
        (("--dropout", "1"), "argument --dropout: wanted a number from 0 to below 1, got '1'"),
        (("--dispersion-tokens", "1"), "argument --dispersion-tokens: wanted a whole number of at least 2, got '1'"),
        (("--pairs", "2"), "argument --pairs: wanted all, or a fraction of the pairs from 0 to 1, got '2'"),
        (("--pairs", "some"), "argument --pairs: wanted all, or a fraction of the pairs from 0 to 1, got 'some'"),
        (
            ("--pairs", "0.1", "--dispersion-tokens", "5"),
            "--pairs 0.1 and --dispersion-tokens 5 are two ways of sampling",
        ),
        (
            ("--dispersion-layers", "0"),
            "--dispersion-layers must be all, last, early_half, late_half or numbers from 1",
        ),
        (("--dispersion-layers", "1,3"), "numbers from 1 to 2 with commas between, got '1,3'"),
        (("--dispersion-layers", "middle"), "got 'middle'"),
        (("--dispersion-weight", "-1"), "argument --dispersion-weight: wanted a number from 0"),
        (("--potential", "gravity"), "gravity"),
        (("--tau", "-1"), "tau"),
        (("--impl", "fastest"), "fastest"),
        (("--impl", "triton"), '--impl triton: impl="triton" cannot run here: the tokens are on the CPU'),
        (
            ("--impl", "cpu", "--potential", "perplexity_entropy"),
            '--impl cpu: impl="cpu" cannot run here: the CPU kernel has no potential',
        ),
        (("--preset", "huge"), "argument --preset: invalid choice: 'huge'"),
        (("--heads", "3"), "width must be a multiple of heads, got width=16 and heads=3"),
        (("--device", "toaster"), "--device toaster: PyTorch cannot use it here"),
        (("--device", "meta"), "--device meta: PyTorch cannot use it here"),
        (("--device", "hpu"), "--device hpu: PyTorch cannot use it here"),
        (("--data", ""), "argument --data: wanted the name of a file or folder, got ''"),
        (("--cache", ""), "argument --cache: wanted the name of a file or folder, got ''"),
        (("--out", ""), "argument --out: wanted the name of a file or folder, got ''"),
        (("--init-from", ""), "argument --init-from: wanted the name of a file or folder, got ''"),
        (("--data", "/no/such/place"), "--data /no/such/place: there is no such file or folder"),
        (("--context", "100000"), "shorter than --context 100000 + 1"),
        (("--compare", "--dispersion-weight", "0"), "--compare needs a --dispersion-weight other than 0"),
        (("--lr", "1e30", "--clip", "0", "--steps", "60"), "no longer finite"),
        (
            ("--lr", "1e30", "--clip", "0", "--steps", "1", "--warmup", "0"),
            "the validation loss is no longer finite at",
        ),
        (
            ("--lr", "1e30", "--clip", "0", "--warmup", "0", "--save-interval", "2", "--log-interval", "50"),
            "the weights are no longer finite at step 2 ",
        ),
    ],
)
def test_options_it_does_not_take_are_named(refused, more, message):
    assert message in refused(*more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(refused):
    assert "--device cuda: PyTorch cannot use it here" in refused("--device", "cuda")


@pytest.mark.parametrize("missing", ["tqdm", "safetensors", "matplotlib", "tokenizers"])
def test_a_missing_library_is_named_with_its_remedy(arguments, tmp_path, monkeypatch, capsys, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert train.main(arguments(tmp_path / "out", "--steps", "1", "--tokenizer", "bpe")) == 2
    error = capsys.readouterr().err
    assert missing in error
    assert "pip install tqdm safetensors matplotlib tokenizers" in error
    assert not (tmp_path / "out").exists()


def test_help_names_every_group(capsys):
    with pytest.raises(SystemExit) as raised:
        train.main(["--help"])
    assert raised.value.code == 0
    printed = capsys.readouterr().out
    for group in ("run:", "data:", "model:", "dispersion:", "optimiser"):
        assert group in printed
