"""Time and peak memory of a measurement of condensation beside the model's own forward pass: ``measure_condensation``,
the straightforward way in NumPy, and the published procedure, written from its formulas.

The hidden states have the shape of SmolLM2-135M's. They come from a stack of blocks that each add a direction, which
takes next to no time, so that a difference of two long times is not what is measured. The forward of SmolLM2-135M's
configuration, with random weights, is timed beside it where transformers is installed. Before the timing, all
must give the same means and counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.machine import describe, peak_memory, pick_device, synchronize
from benchmarks.timing import interleaved, matrix_product, quartiles
from dispersion_kernels.condensation import BINS, measure_condensation
from dispersion_kernels.condensation.intervals import scipy_stats
from dispersion_kernels.condensation.result import PUBLISHED_BINS

# SmolLM2-135M.
SHAPE = {"blocks": 30, "features": 576, "texts": 100, "tokens": 512}
QUICK = {"blocks": 3, "features": 64, "texts": 4, "tokens": 96}
LLAMA = {
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    **{"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True},
}
ROUNDS = 3


class AddedDirection(nn.Module):
    """Block that adds a direction to all tokens, which condenses them."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(0.2 * torch.randn(features, dtype=torch.float32))

    def forward(self, z: Tensor) -> Tensor:
        return z + self.direction


class Blocks(nn.Module):
    """Stack of blocks on hidden states ``[B, L, F]``."""

    def __init__(self, blocks: int, features: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(AddedDirection(features) for _ in range(blocks))

    def forward(self, z: Tensor) -> Tensor:
        for block in self.blocks:
            z = block(z)
        return z


class Texts:
    """Hidden states ``[1, L, F]`` of each text's embedding, made when they are asked for."""

    def __init__(self, texts: int, tokens: int, features: int, device: torch.device) -> None:
        self.shape, self.texts, self.device = (1, tokens, features), texts, device

    def __iter__(self) -> Iterator[Tensor]:
        for text in range(self.texts):
            generator = torch.Generator().manual_seed(text)
            yield torch.randn(self.shape, generator=generator, dtype=torch.float32).to(self.device)


def run(quick: bool) -> list[dict[str, Any]]:
    device = pick_device()
    shape = QUICK if quick else SHAPE
    blocks, features, texts, tokens = shape.values()
    print(f"machine: {describe()}")
    print(f"{texts} texts of {tokens} tokens, {blocks + 1} layers, F = {features}\n")
    model = Blocks(blocks, features).to(device)
    _check(model, Texts(2, tokens, features, device))
    scipy_stats()  # the memory of libraries and of their threads is not the measurement's
    matrix_product(device, torch.float32)[0]()
    variants = {name: partial(way, model, Texts(texts, tokens, features, device)) for name, way in VARIANTS.items()}
    peaks: dict[str, int | None] = {}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(1 if quick else ROUNDS):
        for name, call in variants.items():
            synchronize(device)
            began = time.perf_counter()
            peak = peak_memory(call, device)
            times[name].append(time.perf_counter() - began)
            if turn == 0:  # later, what a library keeps would not count
                peaks[name] = peak
    least = median(times[NOTHING])
    forward = None if quick else _forward(tokens, device)
    rows = []
    print("| way | ms a text and layer | of ours | peak beside the forward, MiB |")
    print("|---" * 4 + "|")
    for name, values in times.items():
        if name == NOTHING:
            continue
        ms = [1e3 * (value - least) / texts / (blocks + 1) for value in values]
        peak, base = peaks[name], peaks[NOTHING]
        row: dict[str, Any] = {
            **{"variant": name, "texts": texts, "L": tokens, "F": features, "layers": blocks + 1},
            **{"ms": quartiles(ms).median, "q1_ms": quartiles(ms).first, "q3_ms": quartiles(ms).third},
            "of_ours": median(v - least for v in values) / median(v - least for v in times[OURS]),
            "of_forward": None if forward is None else 1e-3 * quartiles(ms).median * (blocks + 1) / forward,
            "peak_bytes": None if peak is None or base is None else max(0, peak - base),
        }
        rows.append(row)
        memory = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.1f}"
        print(f"| {name} | {row['ms']:.3f} | {row['of_ours']:.2f} | {memory} |", flush=True)
    return rows


# ---- the ways


def forward_alone(model: Blocks, texts: Texts) -> None:
    with torch.no_grad():
        for z in texts:
            model(z)


def ours(model: Blocks, texts: Texts) -> tuple[list[float], list[list[int]]]:
    layers = measure_condensation(model, texts, progress=False).layers
    return [layer.all_tokens.mean for layer in layers], [list(layer.all_tokens.histogram) for layer in layers]


def _forward_seen(model: Blocks, texts: Texts, see: Callable[[int, Tensor], None]) -> None:
    """Forward of all texts, in which ``see`` gets the number and the hidden states ``[L, F]`` of each layer."""
    handles = [model.blocks[0].register_forward_pre_hook(lambda module, args: see(0, args[0][0]))]
    for number, block in enumerate(model.blocks, 1):
        handles.append(block.register_forward_hook(lambda module, args, z, number=number: see(number, z[0])))
    forward_alone(model, texts)
    for handle in handles:
        handle.remove()


def in_numpy(model: Blocks, texts: Texts) -> tuple[list[float], list[list[int]]]:
    """For each text and layer the matrix of all cosines, its pairs i < j, their histogram and moments; the same without
    position 0; and the second moment of the features."""
    layers, features = len(model.blocks) + 1, texts.shape[2]
    counts = np.zeros((layers, 2, BINS), dtype=np.int64)
    means: list[list[tuple[float, float, float]]] = [[] for _ in range(layers)]
    moments = np.zeros((layers, features, features))
    pairs = np.triu_indices(texts.shape[1], 1)
    content = pairs[0] > 0

    def see(layer: int, states: Tensor) -> None:
        z = states.cpu().numpy()
        norm = np.linalg.norm(z, axis=1, keepdims=True)
        x = z / norm
        cosines = np.clip((x @ x.T)[pairs], -1, 1)
        counts[layer, 0] += np.histogram(cosines, BINS, (-1, 1))[0]
        counts[layer, 1] += np.histogram(cosines[content], BINS, (-1, 1))[0]
        means[layer].append((float(cosines.mean()), float(cosines[content].mean()), float(cosines.std())))
        moments[layer] += z.T @ z

    _forward_seen(model, texts, see)
    return [float(np.mean([mean for mean, *_ in layer])) for layer in means], counts[:, 0].tolist()


def published(model: Blocks, texts: Texts) -> tuple[list[float], npt.NDArray[np.float64]]:
    """Published procedure: all matrices of all layers and texts are kept, then averaged."""
    matrices: list[list[Tensor]] = [[] for _ in range(len(model.blocks) + 1)]

    def see(layer: int, z: Tensor) -> None:
        x = z / z.norm(dim=-1, keepdim=True).clamp(min=1e-3)
        matrices[layer].append((x @ x.T).clamp(-1, 1).cpu())

    _forward_seen(model, texts, see)
    averaged = [torch.stack(layer).mean(0).numpy() for layer in matrices]
    columns = np.stack([np.histogram(m, PUBLISHED_BINS, (-1, 1), density=True)[0] for m in averaged], 1)
    means = [float(m.mean()) for m in averaged]
    for correlation in (scipy_stats().spearmanr, scipy_stats().kendalltau):
        correlation(range(len(means)), means)
    return means, columns


NOTHING, OURS = "the forward alone", "measure_condensation"
VARIANTS: dict[str, Callable[[Blocks, Texts], object]] = {
    NOTHING: forward_alone,
    OURS: ours,
    "matrices in NumPy": in_numpy,
    "published procedure": published,
}


def _check(model: Blocks, texts: Texts) -> None:
    """Equal means and, but for pairs at the edges of bins, equal counts; the published mean has the diagonal in."""
    means, counts = ours(model, texts)
    expected, exact = in_numpy(model, texts)
    with_diagonal, _ = published(model, texts)
    tokens = texts.shape[1]
    for layer, mean in enumerate(means):
        moved = int(np.abs(np.cumsum(counts[layer]) - np.cumsum(exact[layer])).max())
        matrix_mean = (with_diagonal[layer] * tokens - 1) / (tokens - 1)
        if not (math.isclose(mean, expected[layer], abs_tol=1e-5) and math.isclose(mean, matrix_mean, abs_tol=1e-5)):
            raise RuntimeError(
                f"layer {layer}: mean cosine {mean}, in NumPy {expected[layer]}, published {matrix_mean}"
            )
        if moved > max(2, 1e-3 * sum(counts[layer])):
            raise RuntimeError(f"layer {layer}: {moved} pairs are in other bins than NumPy's")


def _forward(tokens: int, device: torch.device) -> float | None:
    """Seconds of a forward of one text through SmolLM2-135M's configuration; None without transformers."""
    try:
        from transformers import LlamaConfig, LlamaModel
    except ModuleNotFoundError:
        return None
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**LLAMA)).to(device).eval()
    ids = torch.randint(LLAMA["vocab_size"], (1, tokens), device=device)

    def call() -> None:
        with torch.no_grad():
            model(ids, use_cache=False)

    return median(interleaved({"forward": call}, rounds=ROUNDS, seconds=0.0, device=device)["forward"])
