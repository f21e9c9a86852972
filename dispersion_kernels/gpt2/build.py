"""Construction of a run's device, tokens, model, optimiser and learning-rate schedule from the options."""

import argparse
import math
import os
from typing import Any

import torch
import torch.distributed as dist

from ..blocks import layer_numbers
from .data import TokenData, cache_folder, load_data, open_tokens
from .model import GPT2, GPT2Config, load_weights
from .options import SHAPE
from .runtime import rank, world


def pick_device(options: argparse.Namespace) -> torch.device:
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and world() > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()  # a meta tensor holds no value
    except (RuntimeError, AssertionError, ImportError) as error:  # this PyTorch was built without the backend
        raise ValueError(f"--device {name}: PyTorch cannot use it here ({str(error).splitlines()[0]})") from error
    if options.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("--dtype bfloat16: this GPU does not have it; use float16 or float32")
    return device


def load_tokens(options: argparse.Namespace) -> TokenData:
    """Tokens of the run. One process per machine reads and tokenises the text; the others open its files."""
    data = None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        data = load_data(
            options.data,
            tokenizer=options.tokenizer,
            vocab_size=options.vocab_size,
            cache=options.cache,
            progress=rank() == 0,
        )
    keys: list[str | None] = [data.key if data else None] * world()
    if world() > 1:
        dist.all_gather_object(keys, keys[0])
    key, *others = {key for key in keys if key is not None}
    if others:
        raise ValueError("--data: it is not the same text on every machine of this run")
    return data or open_tokens(cache_folder(options.cache) / key)


def build_model(options: argparse.Namespace, data: TokenData, checkpoint: dict[str, Any] | None) -> GPT2:
    if checkpoint is not None:
        model = GPT2(GPT2Config(**checkpoint["config"]), checkpoint_activations=options.checkpoint_activations)
        model.load_state_dict(checkpoint["model"])
    elif options.init_from is None:
        shape = {name: getattr(options, name) for name in SHAPE}
        config = GPT2Config(**shape, vocab=data.vocab, dropout=options.dropout)
        model = GPT2(config, checkpoint_activations=options.checkpoint_activations, init_std=options.init_std)
    else:
        try:
            model = load_weights(
                options.init_from,
                dropout=options.dropout,
                heads=options.heads,
                checkpoint_activations=options.checkpoint_activations,
            )
        except (ValueError, OSError) as error:
            raise ValueError(f"--init-from: {error}") from error
    if data.vocab > model.config.vocab:
        raise ValueError(
            f"--tokenizer {options.tokenizer} has {data.vocab} tokens, the weights in "
            f"{options.init_from or options.out} know {model.config.vocab}; use the tokeniser they were trained with"
        )
    return model


def load_teacher(options: argparse.Namespace, model: GPT2, context: int) -> GPT2 | None:
    """Model whose predictions the ``model`` learns, without gradients; None without ``--teacher``."""
    if options.teacher is None:
        return None
    try:
        teacher = load_weights(options.teacher)
    except (ValueError, OSError) as error:
        raise ValueError(f"--teacher: {error}") from error
    if teacher.config.vocab != model.config.vocab or teacher.config.context < context:
        raise ValueError(
            f"--teacher {options.teacher} predicts {teacher.config.vocab} tokens in a context of "
            f"{teacher.config.context}, wanted {model.config.vocab} tokens in {context} or more; take a teacher "
            "trained on the same text with the same --tokenizer, and no smaller --context"
        )
    return teacher.eval().requires_grad_(False)


def build_optimizer(model: GPT2, options: argparse.Namespace, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda", "mps"))


def dispersion_layers(choice: str, layers: int) -> list[int]:
    """Numbers of the layers whose hidden states are dispersed, counted from 1; the embedding is no layer."""
    try:
        return layer_numbers(choice if choice.isidentifier() else [int(k) for k in choice.split(",")], layers)
    except ValueError:
        raise ValueError(
            f"--dispersion-layers must be all, last, early_half, late_half or numbers from 1 to {layers} with commas "
            f"between, got {choice!r}"
        ) from None


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Learning rate of ``step``: linear warm-up to ``options.lr``, then a cosine down to a tenth of ``options.lr``."""
    if step < options.warmup:
        share: float = (step + 1) / options.warmup
    else:
        done = (step - options.warmup) / max(options.steps - options.warmup, 1)
        share = 0.55 + 0.45 * math.cos(math.pi * done)
    return float(options.lr) * share
