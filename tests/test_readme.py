"""Every Python snippet of README.md runs, in order, in one namespace a section."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def sections() -> list[tuple[str, str]]:
    """The Python code of every section that has some, under its heading."""
    found = []
    for section in re.split(r"^## ", README, flags=re.MULTILINE):
        code = "\n".join(re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL))
        if code:
            found.append((section.splitlines()[0], code))
    return found


@pytest.mark.parametrize(("heading", "code"), sections(), ids=[heading for heading, _ in sections()])
def test_snippets_run(heading: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import triton" in code:
        pytest.importorskip("triton")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "snippet.py"
    script.write_text(code, encoding="utf-8")
    runpy.run_path(str(script), run_name="readme")


def test_there_are_snippets_and_links_lead_somewhere() -> None:
    assert len(sections()) >= 2
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_trainer_has_the_options_that_readme_names() -> None:
    options = pytest.importorskip("dispersion_kernels.gpt2.options")
    known = options.build_parser()._option_string_actions
    for line in re.findall(r"^.*dispersion-gpt2 (.*)$", README, flags=re.MULTILINE):
        for word in shlex.split(line.split("`")[0], comments=True):
            if word.startswith("--"):
                assert word in known, word
