"""`dispersion stats` on results with known effects: what is claimed, what is not, and what is said of gaps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from dispersion_kernels import command
from dispersion_kernels.study import inference, stats

ENVIRONMENT = {"source": "a", "torch": "2.13.0", "processor": "p", "threads": 1}


def row(variant: str, seed: int, loss: float, *, step_seconds: float = 0.1, **varied: Any) -> dict[str, Any]:
    steps = [100, 200, 300]
    cosines = [0.1, 0.2, 0.2 + 0.01 * loss]
    return {
        "experiment": "e",
        "variant": variant,
        "seed": seed,
        "varied": varied,
        "validation_loss": loss,
        "cosine_mean": sum(cosines) / 3,
        "cosine_last": cosines[-1],
        "depth_trend": 1.0,
        "cosine_by_layer": cosines,
        "initial_cosine_by_layer": [0.0, 0.1, 0.1],
        "step_seconds": step_seconds,
        "clock": "processor",
        "curve": {"step": steps, "validation_loss": [loss + 2, loss + 1, loss], "cosine_by_layer": [cosines] * 3},
        **ENVIRONMENT,
    }


def results(rows: list[dict[str, Any]], **questions: Any) -> dict[str, Any]:
    asked = {"baseline": "without", "outcomes": ["validation_loss"], "trend": None, "missing": [], **questions}
    return {"format": 1, "experiments": {"e": asked}, "rows": rows}


def report(rows: list[dict[str, Any]], **questions: Any) -> stats.Report:
    content = results(rows, **questions)
    return stats.Report.of("e", content["experiments"]["e"], content["rows"])


NOISE = np.random.default_rng(0).normal(0, 1, (2, 10))


def pairs(effect: float, seeds: int = 10) -> list[dict[str, Any]]:
    """Seeds that differ by 1 from each other, and by `effect` and 0.1 from variant to variant."""
    base = [row("without", seed, 5 + NOISE[0, seed]) for seed in range(seeds)]
    return base + [row("with", seed, 5 + NOISE[0, seed] + 0.1 * NOISE[1, seed] + effect) for seed in range(seeds)]


def test_an_effect_is_claimed_with_its_numbers() -> None:
    (found,) = report(pairs(-0.3)).comparisons
    differences = 0.1 * NOISE[1] - 0.3
    assert found.mean == pytest.approx(differences.mean())
    assert found.interval == pytest.approx(inference.mean_interval(list(differences)))
    assert found.p == found.p_holm == pytest.approx(2 / 2**10)
    assert found.detectable == pytest.approx(inference.detectable_effect(10, 1) * differences.std(ddof=1))
    low, high = found.interval or (math.nan, math.nan)
    assert found.sentence() == (
        f"The validation loss of 'with' is lower than that of 'without' by {-found.mean:.4g} (95% interval {low:+.4g} "
        f"to {high:+.4g}; p = 0.002 after Holm over 1 test; 10 seeds)."
    )


def test_no_effect_is_no_claim() -> None:
    (found,) = report(pairs(0.02)).comparisons
    assert found.sentence().startswith(
        "Cannot tell whether the validation loss of 'with' differs from that of 'without'"
    )
    assert (
        f"A mean difference of {found.detectable:.3g} would have been found with probability 0.8." in found.sentence()
    )
    (same,) = report(pairs(0.0)[:10] + [{**one, "variant": "with"} for one in pairs(0.0)[:10]]).comparisons
    assert (same.mean, same.interval, same.p) == (0, (0, 0), 1)
    assert same.sentence().startswith("Cannot tell")


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (5, "No difference can be shown by 5 seeds in 1 test; it takes 6"),
        (
            1,
            "Nothing can be said of the validation loss of 'with': there is one seed (its difference from 'without' is",
        ),
    ],
)
def test_few_seeds_tell_nothing(seeds: int, said: str) -> None:
    (found,) = report(pairs(-3, seeds)).comparisons
    assert said in found.sentence()


def test_seeds_are_paired_and_gaps_are_told() -> None:
    rows = [one for one in pairs(-0.3) if (one["variant"], one["seed"]) not in (("with", 3), ("without", 7))]
    (found,) = report(rows[::-1]).comparisons
    assert found.seeds == [0, 1, 2, 4, 5, 6, 8, 9]
    assert found.differences == pytest.approx((0.1 * NOISE[1] - 0.3)[found.seeds])
    assert found.sentence().endswith(" Seeds without a partner: 3, 7.")
    (found,) = report([one for one in rows if one["variant"] == "with"]).comparisons
    assert found.sentence().startswith("Nothing can be said of the validation loss of 'with': no seed has finished in")


def test_a_seed_that_diverged_has_no_partner() -> None:
    rows = pairs(-0.3)
    diverged = next(one for one in rows if (one["variant"], one["seed"]) == ("with", 3))
    diverged["validation_loss"] = math.nan
    diverged["curve"] = {**diverged["curve"], "validation_loss": [math.nan] * 3}
    for outcome in ("validation_loss", "validation_loss_at_equal_time"):
        (found,) = report(rows, outcomes=[outcome]).comparisons
        assert found.differences == pytest.approx(np.delete(0.1 * NOISE[1] - 0.3, 3))
        assert found.sentence().endswith(" Seeds without a partner: 3.")
    rows[rows.index(diverged) - 10]["validation_loss"] = math.nan  # that of its partner
    assert report(rows).comparisons[0].sentence().endswith(" Seeds without a partner: 3.")
    assert "nan" not in report(rows).markdown()
    assert report(rows).markdown().count("(9 seeds)") == 2
    rows = [row("", seed, 5 - 0.1 * width, width=width) for seed in range(4) for width in (1, 2, 3)]
    for one in rows[:3]:
        one["validation_loss"] = math.nan
    (trend,) = report(rows, baseline=None, trend="width").trends
    assert trend.seeds == [1, 2, 3]
    assert trend.incomplete == [0]


def test_holm_is_over_the_family() -> None:
    """Two variants, two other options, two outcomes: eight tests, corrected together."""
    rows = []
    for width in (8, 64):
        for number, variant in enumerate(("without", "a", "b")):
            rows += [
                row(variant, seed, 5 + NOISE[0, seed] + number * (0.05 * NOISE[1, seed] - 0.01 * width), width=width)
                for seed in range(10)
            ]
    found = report(rows, outcomes=["validation_loss", "cosine_last"]).comparisons
    assert len(found) == 8
    assert [one.p_holm for one in found] == inference.holm([one.p or 0 for one in found])
    assert {one.tests for one in found} == {8}
    assert {(one.variant, one.varied["width"]) for one in found} == {(v, w) for v in "ab" for w in (8, 64)}


def test_equal_time_reads_the_slower_variant_earlier() -> None:
    """The slower variant takes twice as long a step, and has reached step 150 of 300 when the other one ends."""
    slow = [row("with", seed, 5.0 - 0.2, step_seconds=0.2) for seed in range(6)]
    fast = [row("without", seed, 5.0) for seed in range(6)]
    (found,) = report(slow + fast, outcomes=["validation_loss_at_equal_time"]).comparisons
    assert found.baseline_mean == pytest.approx(5.0)
    assert found.variant_mean == pytest.approx(4.8 + 1.5)


def test_trend() -> None:
    rows = [
        row("", seed, 5 + NOISE[0, seed] - 0.1 * math.log(width), width=width)
        for seed in range(4)
        for width in (8, 16, 64, 256)
    ]
    (found,) = report(rows, baseline=None, trend="width").trends
    assert found.correlation == -1
    assert found.p == pytest.approx(2 * (1 / 24) ** 4)
    assert found.means == pytest.approx([5 + NOISE[0, :4].mean() - 0.1 * math.log(w) for w in (8, 16, 64, 256)])
    assert found.sentence().startswith("The validation loss falls with width (mean Spearman correlation -1.00, 95%")
    (found,) = report(rows[:-1], baseline=None, trend="width").trends
    assert (found.seeds, found.incomplete) == ([0, 1, 2], [3])
    shuffled = [{**one, "validation_loss": float(NOISE[1, i % 7])} for i, one in enumerate(rows)]
    assert (
        report(shuffled, baseline=None, trend="width").trends[0].sentence().startswith("Cannot tell whether the valid")
    )


def test_mixed_and_missing_runs_are_told() -> None:
    rows = pairs(-0.3)
    rows[0] = {**rows[0], "source": "b", "threads": 2}
    found = report(rows, missing=["with,seed=11"]).warnings()
    assert found[0] == "1 of 21 runs are missing, as with,seed=11."
    assert found[1] == "The runs are of 2 versions of the code: a, b."
    assert found[2] == "Times are of 2 machines or numbers of threads: p, 1 threads; p, 2 threads."


def test_the_command_writes_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row(v, s, 5 + NOISE[0, s] - 0.01 * w, width=w)
        for v in ("without", "with")
        for s in range(6)
        for w in (1, 9, 99)
    ]
    (tmp_path / "results.json").write_text(json.dumps(results(rows, trend="width", outcomes=["validation_loss"])))
    assert command.main(["stats", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "stats.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    sentences = [one["sentence"] for one in content[0]["comparisons"] + content[0]["trends"]]
    assert len(sentences) == 5
    page = (tmp_path / "stats.md").read_text()
    assert all(sentence in page and sentence in printed for sentence in sentences)
    for name in ("differences", "trend", "curves"):
        assert (tmp_path / f"e-{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_wrong_results_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["stats", str(tmp_path)]) == 2
    assert "results.json: there is no such file; give the folder of a sweep" in capsys.readouterr().err
    for content in ("{", "[]", '{"format": 9}'):
        (tmp_path / "results.json").write_text(content)
        assert command.main(["stats", str(tmp_path)]) == 2
        assert "is not the results.json of a sweep in format 1" in capsys.readouterr().err


def test_times_of_two_clocks_are_not_compared() -> None:
    rows = [
        {"seed": 0, "clock": clock, "step_seconds": 1.0, "curve": {"step": [10], "validation_loss": [5.0]}}
        for clock in ("processor", "wall")
    ]
    with pytest.raises(ValueError, match="some runs have the processor's time of a step and some the wall clock's"):
        stats.values_of("validation_loss_at_equal_time", rows[:1], rows[1:])
    assert stats.values_of("validation_loss_at_equal_time", rows[:1], rows[:1]) == {0: 5.0}
