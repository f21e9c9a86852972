"""The page of the study: it is what the committed results make, and shows no experiment before its last run."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for library in ("scipy", "matplotlib"):
    pytest.importorskip(library)
STUDY = Path(__file__).resolve().parents[2] / "docs" / "study"
PAGE = runpy.run_path(str(STUDY / "page.py"))


def test_the_page_is_what_the_results_make() -> None:
    assert PAGE["main"](["--check"]) == 0, "run python docs/study/page.py"


def test_an_unfinished_experiment_shows_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"commit": "c0ffee", "torch": "2.13", "processor": "a processor"}
    rows = [{"experiment": name, "run": name, **shared} for name in ("done", "half")]
    questions: dict[str, Any] = {"done": {"missing": []}, "half": {"missing": ["half_seed-1", "half_seed-2"]}}
    results = {"experiments": questions, "rows": rows}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "stats.md").write_text(
        "## done\n\n- The loss is lower.\n\n## half\n\n- Not yet.\n\n## Method\n\n- As said.\n"
    )
    monkeypatch.setitem(PAGE["experiments"].__globals__, "FOLDER", tmp_path)
    parts = PAGE["experiments"](tmp_path)
    assert parts["done"] == "- The loss is lower."
    assert parts["half"] == "*Not finished: 1 of 3 runs.*"
    said = "2 of 4 runs of the experiments are finished (commit c0ffee, PyTorch 2.13, a processor)."
    assert parts[f"runs-{tmp_path.name}"] == said
    results["rows"] = [*rows, {**rows[0], "experiment": "half"}]
    assert PAGE["runs"](results).startswith("3 of 5 runs of the experiments (2 different ones) are finished")


def test_only_the_parts_between_the_marks_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAGE["filled"].__globals__, "RESULTS", Path("no such folder"))
    text = "a\n<!-- width -->\n<!-- end -->\nb\n<!-- noise -->\nold\n\nold\n<!-- end -->\nc\n"
    made = "a\n<!-- width -->\n*Not run yet.*\n<!-- end -->\nb\n<!-- noise -->\n*Not run yet.*\n<!-- end -->\nc\n"
    assert PAGE["filled"](text) == made
    assert PAGE["filled"](made) == made


def test_the_noise_is_that_of_its_definition() -> None:
    """Means and variances of the vectors are NumPy's."""
    spread = runpy.run_path(str(STUDY / "gradient_noise.py"))["Spread"]()
    vectors = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 3
    for vector in vectors:
        spread.add(vector)
    assert spread.variance() == pytest.approx(np.cov(vectors.numpy(), rowvar=False).trace())
    assert spread.mean_square() == pytest.approx(vectors.square().sum(1).mean().item())
    torch.testing.assert_close(spread.mean(), vectors.mean(0))
