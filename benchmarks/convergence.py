"""Final validation loss and cosines of training with sampled pairs and with all pairs: the nano GPT-2 without the loss,
with the loss on 256 random tokens, on a fraction of the pairs, and on all pairs, from several seeds each.

Windows have 1,024 tokens, of which 256 are a quarter. Each run is a process of one thread; as many run at a time as
there are processors, all on the same text.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

RECIPE = ["--preset", "nano", "--context", "1024", "--batch-size", "1", "--steps", "240", "--warmup", "24"]
RECIPE += ["--eval-interval", "1000", "--validation-windows", "32"]
QUICK = ["--layers", "2", "--width", "32", "--heads", "2", "--context", "512", "--tokenizer", "bytes", "--steps", "3"]
QUICK += ["--validation-windows", "4"]
VARIANTS: dict[str, list[str]] = {
    "no loss": ["--dispersion-weight", "0"],
    "256 tokens": ["--dispersion-tokens", "256"],
    "1/16 of the pairs": ["--pairs", "0.0625"],
    "1/64 of the pairs": ["--pairs", "0.015625"],
    "no pairs": ["--pairs", "0"],
    "all pairs": [],
}
SEEDS = 5
MEASURED = ("validation_loss", "cosine_last", "cosine_mean")


def run(quick: bool) -> list[dict[str, Any]]:
    seeds = range(1 if quick else SEEDS)
    recipe = [*RECIPE, *(QUICK if quick else [])]
    print(f"machine: {describe()}")
    print(f"dispersion-gpt2 {' '.join(recipe)}, {len(seeds)} seeds\n")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        # Seed by seed, so that a slow hour, or an early end, affects all variants alike.
        cases = [(name, seed) for seed in seeds for name in VARIANTS]
        rows = list(pool.map(lambda case: _train(case[0], case[1], recipe, Path(folder)), cases))
    print("| | " + " | ".join(name.replace("_", " ") for name in MEASURED) + " |")
    print("|---" * (1 + len(MEASURED)) + "|")
    for name in VARIANTS:
        cells = [_spread([row[measured] for row in rows if row["variant"] == name]) for measured in MEASURED]
        print(f"| {name} | {' | '.join(cells)} |")
    return rows


def _train(name: str, seed: int, recipe: list[str], folder: Path) -> dict[str, Any]:
    out = folder / f"{name.replace('/', '-')}-{seed}"
    arguments = [*recipe, *VARIANTS[name], "--seed", str(seed), "--out", str(out)]
    subprocess.run(
        [sys.executable, "-m", "dispersion_kernels.gpt2.train", *arguments],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    row = {"variant": name, "seed": seed, "recipe": " ".join(recipe), **{key: results[key] for key in MEASURED}}
    print(f"seed {seed}, {name}: {', '.join(f'{key} {row[key]:.4f}' for key in MEASURED)}", flush=True)
    return row


def _spread(values: list[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"
