"""README.md and the pages of docs/: their Python snippets run, in order, in one namespace a section; their links lead
somewhere; the names in README's tables are those of the code."""

from __future__ import annotations

import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest

import dispersion_kernels
from dispersion_kernels import fused_dispersion_loss
from dispersion_kernels.condensation import Condensation
from dispersion_kernels.potentials import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {Path("README.md"): README, **PAGES}


def sections(text: str) -> dict[str, str]:
    """The section, of any level, under each heading."""
    return {part.partition("\n")[0]: part for part in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]}


SNIPPETS = {
    f"{path}: {heading}": "\n".join(found)
    for path, text in TEXTS.items()
    for heading, section in {"": re.split(r"^##+ ", text, flags=re.MULTILINE)[0], **sections(text)}.items()
    if (found := re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL))
}


@pytest.mark.parametrize("where", SNIPPETS)
def test_snippets_run(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("triton", "transformers"):
        if re.search(rf"^(import|from) {module}\b", SNIPPETS[where], flags=re.MULTILINE):
            pytest.importorskip(module)
    if "import attach" in SNIPPETS[where]:
        pytest.importorskip("accelerate")  # of transformers' Trainer
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[where], encoding="utf-8")
    runpy.run_path(str(script), run_name="readme")


def test_the_snippets_are_found() -> None:
    assert {path.split(":")[0] for path in SNIPPETS} >= {"README.md", "docs/custom-potentials.md", "docs/sampling.md"}


def links(path: Path) -> list[Path]:
    """The files of the repository to which a page links, or whose image it shows."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", TEXTS[path])
    return [(ROOT / path.parent / target).resolve() for target in targets if not target.startswith("http")]


def test_links_lead_somewhere() -> None:
    missing = [str(target) for path in TEXTS for target in links(path) if not target.exists()]
    assert not missing


def test_a_release_has_absolute_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package index shows the description away from the repository: each relative address leads to the file at the
    tag, and nothing else differs."""
    setup_py = runpy.run_path(str(ROOT / "setup.py"), run_name="setup_py")
    monkeypatch.delenv("DISPERSION_KERNELS_REPOSITORY", raising=False)
    assert setup_py["description"]() == README
    monkeypatch.setenv("DISPERSION_KERNELS_REPOSITORY", "https://host/owner/name")
    description = setup_py["description"]()
    at_the_tag = rf"https://host/owner/name/(?:blob|raw)/v{dispersion_kernels.__version__}/"
    assert re.sub(rf"\]\({at_the_tag}", "](", description) == README
    assert len(re.findall(at_the_tag, description)) == len(links(Path("README.md")))
    targets = re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", description)
    assert all(target.startswith(("https://", "#")) for _, target in targets)
    images = [target for mark, target in targets if mark]
    assert images
    assert all("/raw/" in image for image in images)


def test_a_reader_finds_every_page() -> None:
    """README links to each page once, or one of these pages does."""
    from_readme = links(Path("README.md"))
    first = {path: from_readme.count(ROOT / path) for path in PAGES}
    second = {target for path, count in first.items() if count for target in links(path)}
    assert max(first.values()) == 1
    assert not [path for path, count in first.items() if not count and ROOT / path not in second]


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_figures_of_condensation_are_those_of_the_committed_measurements() -> None:
    """The command of the README wrote the files, and its sentence has their numbers."""
    section = " ".join(sections(README)["Condensation"].split())
    files = [ROOT / "docs" / "results" / f"condensation-smollm2{part}.json" for part in ("", "-initialised")]
    trained, initialised = (Condensation.from_json(file) for file in files)
    assert (trained.initialised, initialised.initialised) == (False, True)
    (given,) = re.findall(r"dispersion measure (.*?) ```", section)
    command = pytest.importorskip("dispersion_kernels.command")
    options = command.build_parser().parse_args(["measure", *shlex.split(given)])
    for measured in (trained, initialised):
        assert options.models == [measured.model]
        assert (options.texts, options.max_length) == (measured.texts, measured.options["max_length"])
    assert options.initialised
    means, others = ([layer.all_tokens.mean for layer in one.layers] for one in (trained, initialised))
    embedding, *blocks = means
    low, high = trained.trend.spearman_interval
    for said in (
        f"({trained.texts} passages, {trained.tokens:,} tokens)",
        f"from {embedding:.2f} at the embedding to {max(blocks):.2f} behind block {1 + blocks.index(max(blocks))} of "
        f"{len(blocks)}",
        f"(Spearman's correlation with depth {trained.trend.spearman:.2f}, 95% interval {low:.2f} to {high:.2f})",
        f"from {others[0]:.2f} to {others[-1]:.2f}",
    ):
        assert said in section


def first_column(heading: str) -> list[str]:
    """The names, in backticks, of the first column of a section's table."""
    rows = re.findall(r"^\| (.*?) \|", sections(README)[heading], flags=re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def test_the_tables_have_the_names_of_the_code() -> None:
    assert sorted(first_column("Options")) == sorted(inspect.signature(fused_dispersion_loss).parameters)
    assert sorted(first_column("Potentials")) == sorted(BUILT_IN)


def test_the_trainer_has_the_options_that_the_pages_name() -> None:
    options = pytest.importorskip("dispersion_kernels.gpt2.options")
    known = options.build_parser()._option_string_actions
    commands = [line for text in TEXTS.values() for line in re.findall(r"^.*dispersion-gpt2 (.*)$", text, re.MULTILINE)]
    words = [word for line in commands for word in shlex.split(line.split("`")[0], comments=True)]
    table = re.sub(r"`pip [^`]*`", "", sections(TEXTS[Path("docs/trainer.md")])["Options"])
    words += re.findall(r"(?<=[`\s])--[a-z-]+", table)
    unknown = {word for word in words if word.startswith("--")} - set(known)
    assert not unknown
