"""Every example runs for a few steps."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "plain_loop": [],
    "torchtitan_style": [],
    "with_accelerate": ["accelerate", "transformers"],
    "with_trainer": ["accelerate", "transformers"],
    "with_sft": ["trl"],
    "with_grpo": ["trl"],
    "with_lightning": ["lightning.pytorch"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.integrations) if needs else name for name, needs in NEEDS.items()]
)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"needs {package}")
    if name == "torchtitan_style" and os.name == "nt":
        pytest.skip("needs torch.distributed with gloo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    options = {"backend": "aot_eager"} if name == "torchtitan_style" else {}
    dispersion = importlib.import_module(name).main(3, **options)
    # Between the least that tokens on a sphere can have and that of equal ones.
    assert -1 < dispersion < 0
    assert math.isfinite(dispersion)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)
