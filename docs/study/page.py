"""Tables and figures of docs/study/README.md, from docs/study/results: what stands between ``<!-- NAME -->`` and
``<!-- end -->``.

python docs/study/page.py [--check]

Of an experiment of which runs are missing, the page says how many: what they show is for the end. ``--check`` writes
nothing, and fails where the page is not what the results make.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from dispersion_kernels.condensation import Condensation
from dispersion_kernels.study.inference import mean_interval
from dispersion_kernels.study.stats import table

FOLDER = Path(__file__).resolve().parent
PAGE, RESULTS = FOLDER / "README.md", FOLDER / "results"


def main(arguments: list[str]) -> int:
    text = PAGE.read_text("utf-8")
    made = filled(text)
    if "--check" in arguments:
        if text != made:
            print(f"{PAGE} is not what {RESULTS} makes; run python docs/study/page.py", file=sys.stderr)
        return int(text != made)
    PAGE.write_text(made, "utf-8")
    return 0


def filled(text: str) -> str:
    parts = {**experiments(RESULTS), **experiments(RESULTS / "sft"), "pretrained": pretrained(), "noise": noise()}

    plan = re.findall(r"^\[experiment\.([\w-]+)\]", (FOLDER / "study.toml").read_text("utf-8"), re.M)
    known = {*plan, "sft", "runs-results", "runs-sft", *parts}

    def part(match: re.Match[str]) -> str:
        if match[1] not in known:
            raise ValueError(f"{PAGE}: <!-- {match[1]} --> is none of {', '.join(sorted(known))}")
        return f"<!-- {match[1]} -->\n{parts.get(match[1], '*Not run yet.*')}\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n(?:(?!<!--).)*<!-- end -->", part, text, flags=re.DOTALL)


def experiments(folder: Path) -> dict[str, str]:
    """Parts of the experiments of a sweep, and ``runs-FOLDER``, how many of its runs are finished and by what."""
    if not (folder / "results.json").exists():
        return {}
    results = json.loads((folder / "results.json").read_text("utf-8"))
    sections = dict(
        re.findall(r"^## ([^\n]+)\n\n(.*?)(?=\n## |\Z)", (folder / "stats.md").read_text("utf-8"), re.S | re.M)
    )
    parts = {f"runs-{folder.name}": runs(results)}
    for name, questions in results["experiments"].items():
        finished = sum(row["experiment"] == name for row in results["rows"])
        if missing := len(questions["missing"]):
            parts[name] = f"*Not finished: {finished} of {finished + missing} runs.*"
            continue
        pictures = [folder / f"{name}-{kind}.png" for kind in ("differences", "trend", "curves")]
        shown = [f"![{path.stem}]({path.relative_to(FOLDER).as_posix()})" for path in pictures if path.exists()]
        parts[name] = "\n\n".join([sections[name].strip(), *shown])
    return parts


def runs(results: dict[str, Any]) -> str:
    rows = list({row["run"]: row for row in results["rows"]}.values())
    by = sorted({f"commit {row['commit']}, PyTorch {row['torch']}, {row['processor']}" for row in rows})
    missing = sum(len(questions["missing"]) for questions in results["experiments"].values())
    counted = f"{len(results['rows'])} of {len(results['rows']) + missing} runs of the experiments"
    if len(rows) < len(results["rows"]):
        counted += f" ({len(rows)} different ones)"
    return f"{counted} are finished ({'; '.join(by) or 'none yet'})."


def pretrained() -> str:
    """Table of the models, each beside its initialisation, with intervals over passages, and the pictures."""
    measured = [Condensation.from_json(file) for file in sorted((RESULTS / "pretrained").glob("*.json"))]
    if not measured:
        return "*Not run yet.*"
    lines = []
    for one in (one for one in measured if not one.initialised):
        (other,) = (other for other in measured if other.initialised and other.model == one.model)
        for name, blocks in {"first": slice(1), "last": slice(-1, None), "mean of all": slice(None)}.items():
            trained, initial = by_text(one, blocks), by_text(other, blocks)
            difference = [a - b for a, b in zip(trained, initial, strict=True)]
            low, high = mean_interval(difference)
            means = [f"{statistics.fmean(values):.3f}" for values in (initial, trained, difference)]
            lines.append([one.model, name, *means[:2], f"{means[2]} ({low:.3f} to {high:.3f})"])
        trends = [f"{each.trend.spearman:.2f} ({spread(each.trend.spearman_interval)})" for each in (other, one)]
        lines.append([one.model, "Spearman with depth", *trends, ""])
    header = "model, block, cosine before training, after it, difference (95% interval over passages)"
    pictures = sorted((RESULTS / "pretrained").glob("*.png"))
    shown = [f"![{path.stem}]({path.relative_to(FOLDER).as_posix()})" for path in pictures]
    return "\n\n".join([table(header, lines), *shown])


def by_text(measured: Condensation, blocks: slice) -> list[float]:
    """Mean cosine of each passage, over some of the blocks."""
    layers = [layer for layer in measured.layers if layer.name.startswith("block ")][blocks]
    return [statistics.fmean(values) for values in zip(*(layer.all_tokens.text_means for layer in layers), strict=True)]


def spread(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def noise() -> str:
    file = RESULTS / "gradient-noise.md"
    return file.read_text("utf-8").strip() if file.exists() else "*Not run yet.*"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
