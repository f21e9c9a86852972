"""Tables and figures of docs/study/README.md, from docs/study/results: what stands between ``<!-- NAME -->`` and
``<!-- end -->``.

python docs/study/page.py [--check]

Of an experiment of which runs are missing, the page says how many: what they show is for the end. ``--check`` writes
nothing, and fails where the page is not what the results make.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from dispersion_kernels.command import table
from dispersion_kernels.condensation import Condensation

FOLDER = Path(__file__).resolve().parent
PAGE, RESULTS = FOLDER / "README.md", FOLDER / "results"


def main(arguments: list[str]) -> int:
    text = PAGE.read_text("utf-8")
    made = filled(text)
    if "--check" in arguments:
        return int(text != made)
    PAGE.write_text(made, "utf-8")
    return 0


def filled(text: str) -> str:
    parts = {**experiments(RESULTS), **experiments(RESULTS / "sft"), "pretrained": pretrained(), "noise": noise()}

    def part(match: re.Match[str]) -> str:
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
    return f"{counted} are finished ({'; '.join(by) or 'none yet'})."


def pretrained() -> str:
    files = sorted((RESULTS / "pretrained").glob("*.json"))
    if not files:
        return "*Not run yet.*"
    pictures = [
        f"![{path.stem}]({path.relative_to(FOLDER).as_posix()})" for path in (RESULTS / "pretrained").glob("*.png")
    ]
    measured = [Condensation.from_json(file) for file in files]
    return "\n\n".join([f"```\n{table(measured)}\n```", *sorted(pictures)])


def noise() -> str:
    file = RESULTS / "gradient-noise.md"
    return file.read_text("utf-8").strip() if file.exists() else "*Not run yet.*"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
