"""TOML files of sweeps: the runs they stand for, their identity, and what is said of wrong files."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch
from sweeps import TINY, sweep_file

from dispersion_kernels.gpt2 import GPT2, GPT2Config, save_weights
from dispersion_kernels.gpt2.options import as_arguments, build_parser, complete
from dispersion_kernels.study.plan import Identities, Run, all_runs, read_plan

pytest.importorskip("safetensors")

VARIANTS = """
[experiment.scratch]
seed = [3, 4]
mlp-width = [8, 64]
baseline = "without"
variant.without = { dispersion-weight = 0 }
variant."weight 0.5" = { dispersion-weight = 0.5 }

[experiment.again]
seed = [13, 14]
steps = 7
init-from = [{ experiment = "scratch", variant = "without", mlp-width = 8 }]
"""


def runs(folder: Path, experiments: str) -> list[Run]:
    return list(all_runs(read_plan(sweep_file(folder, experiments))))


def test_lists_variants_and_seeds_multiply(tmp_path: Path) -> None:
    scratch, again = read_plan(sweep_file(tmp_path, VARIANTS))
    found = [(run.seed, run.options.mlp_width, run.variant, run.options.dispersion_weight) for run in scratch.runs]
    assert found == [
        (seed, width, name, weight)
        for seed in (3, 4)
        for width in (8, 64)
        for name, weight in (("without", 0.0), ("weight 0.5", 0.5))
    ]
    assert scratch.baseline == "without"
    assert len({run.name for run in scratch.runs}) == 8
    assert scratch.runs[1].name == "scratch_weight-0.5_mlp-width-8_seed-3"
    # The n-th seed starts from the n-th seed, without the shape that the defaults give to other experiments.
    assert [(run.seed, run.sources["init-from"].seed) for run in again.runs] == [(13, 3), (14, 4)]
    assert {run.sources["init-from"].variant for run in again.runs} == {"without"}
    assert all(run.options.layers is None and run.options.steps == 7 for run in again.runs)


def test_options_are_those_of_the_command_line(tmp_path: Path) -> None:
    (run,) = runs(tmp_path, "[experiment.one]\ncompile = true\npairs = 0.25\ntau = 2\ndispersion-layers = 'last'\n")
    flags = re.findall(r"^(\S+) = (.*)$", TINY.replace('"', ""), flags=re.MULTILINE)
    argv = [word for name, value in flags if name != "data" for word in (f"--{name}", value)]
    argv += ["--data", str(tmp_path / "text.txt"), "--compile", "--pairs=0.25", "--tau=2", "--dispersion-layers=last"]
    assert run.options == complete(build_parser().parse_args(argv))
    again = complete(build_parser(argparse.ArgumentParser).parse_args(as_arguments(run.options)))
    assert again == run.options


def test_identity_is_that_of_settings_and_content(tmp_path: Path) -> None:
    def identities(experiments: str, folder: str = "a") -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        cache = f"\ncache = '{tmp_path / 'cache'}'\n"
        plan = read_plan(sweep_file(tmp_path / folder, experiments, TINY + cache))
        return [Identities().of(run) for run in all_runs(plan)]

    one = identities("[experiment.one]\nmlp-width = [8, 16]\ndispersion-weight = 0")
    assert len(set(one)) == 2
    # Another order, name, folder and way of writing a number: the same runs; another seed, or weight, or list: others.
    assert identities("[experiment.two]\ndispersion-weight = 0.0\nmlp-width = [16, 8]", "b") == one[::-1]
    assert not set(identities("[experiment.one]\nmlp-width = [8, 16]\ndispersion-weight = 0\nseed = 1")) & set(one)
    assert not set(identities("[experiment.one]\nmlp-width = [8, 16]\ndispersion-weight = 0.1")) & set(one)
    # The source of weights counts by its own settings, and a file of weights by its content.
    chain = "[experiment.one]\n{}\n[experiment.two]\ninit-from = {{ experiment = 'one' }}"
    first, second = identities(chain.format("lr = 0.1")), identities(chain.format("lr = 0.2"))
    assert first[1] != second[1]
    weights = "[experiment.one]\ninit-from = 'weights'\nheads = 2\n"
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        save_weights(GPT2(GPT2Config(1, 8, 2, 8, 16, 257)), tmp_path / "a" / "weights")
        found += identities(weights)
    assert found[0] == found[1] != found[2]
    # The text counts by its content.
    file = sweep_file(tmp_path / "a", "[experiment.one]\nmlp-width = [8, 16]\ndispersion-weight = 0")
    (tmp_path / "a" / "text.txt").write_text("another text, of another hundred words. " * 100)
    assert not {Identities().of(run) for run in all_runs(read_plan(file))} & set(one)


WRONG = {
    "[experiment.a]\nmlpwidth = 8": "line 17: [experiment.a] mlpwidth is no option of a sweep; did you mean mlp-width?",
    "[experiment.a]\nmlp_width = 8": "did you mean mlp-width?",
    "[experiment.a]\nout = 'x'": "out is no option of a sweep; ",
    "[experiment.a]\nlr = -1": "line 17: [experiment.a] lr wanted a number from 0",
    "[experiment.a]\nsteps = [5, 0]": "line 17: [experiment.a] steps wanted a whole number of at least 1",
    "[experiment.a]\nlr = []": "lr is an empty list",
    "[experiment.a]\nlr = [1, 1]": "lr lists a value twice",
    "[experiment.a]\ncompile = 1": "compile must be true or false, got 1",
    "[experiment.a]\nlr = true": "lr must not be true",
    "[experiment.a]\nseed = 'x'": "seed must be a whole number or a list of them, got 'x'",
    "[experiment.a]\nlr = {a = 1}": "lr cannot be a table",
    "[experiment.a]\nvariant = 3": "variant must hold tables",
    "[experiment.a.variant.b]\nlr = [1, 2]": "line 17: [experiment.a.variant.b] lr cannot vary in a variant",
    "[experiment.a]\nlr = [1, 2]\n[experiment.a.variant.b]\nlr = 3": "lr is also a list of the experiment",
    "[experiment.a]\n[experiment.a.variant.b]\n[experiment.a.variant.c]": "baseline is missing",
    "[experiment.a]\nbaseline = 'c'\n[experiment.a.variant.b]": "line 17: [experiment.a] baseline must be one of the",
    "[experiment.a]\ntrend = 'lr'": "trend must be an option with a list of at least three numbers, of []",
    "[experiment.a]\noutcomes = ['loss']": "outcomes must be a list of some of ['validation_loss'",
    "[experiment.a]\npreset = 'big'": "preset invalid choice: 'big'",
    "[experiment.a]\ninit-from = {experiment = 'b'}": "init-from must name an earlier experiment of the",
    "[experiment.a]\nlr = [1, 2]\n[experiment.b]\ninit-from = {experiment = 'a'}": (
        "init-from must select one run of a for each seed, the name alone selects 2; give the values of ['lr']"
    ),
    "[experiment.a]\n[experiment.b]\nseed = [1, 2]\ninit-from = {experiment = 'a'}": "a has 1 seeds; give as many",
    "[experiment.a]\ninit-from = 'x'\nmlp-width = 8": "mlp-width cannot be given with --init-from",
    "[experiments.a]": "line 16: experiments is no part of a sweep; use [defaults] and [experiment.NAME]",
    "": "has no experiment; add a table [experiment.NAME]",
    "[experiment.a": "is not TOML: ",
}


@pytest.mark.parametrize("experiments", WRONG)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, experiments: str) -> None:
    with pytest.raises(ValueError, match=r"sweep\.toml") as caught:
        runs(tmp_path, experiments)
    assert WRONG[experiments] in str(caught.value)


def test_the_files_of_the_documentation() -> None:
    """docs/study's, and the example of docs/sweeps.md, whose runs test_sweep.py runs."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    study = {experiment.name: experiment for experiment in read_plan(docs / "study" / "study.toml")}
    assert [*study][:2] == ["width", "weight"], "the first questions first"
    assert [*study][-1] == "long", "it takes the rates of tuning"
    assert {run.sources["init-from"].options.mlp_width for run in study["continued"].runs} == {32, 2048}
    assert {run.seed for run in study["distilled"].runs} == {run.seed for run in study["width"].runs}
    widths = sorted({run.options.mlp_width for run in study["width"].runs})
    assert len(widths) >= 5
    assert widths[-1] >= 16 * widths[0]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.toml: there is no such file; give"):
        read_plan(tmp_path / "none.toml")
