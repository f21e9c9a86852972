"""Models to measure: loaded by folder or name, and their random initialisation."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dispersion_kernels.blocks import is_pretrained
from dispersion_kernels.gpt2.checkpoint import read_checkpoint
from dispersion_kernels.gpt2.model import GPT2, GPT2Config, load_weights
from dispersion_kernels.gpt2.tokenizer import gpt2_bpe

# Seed of a random initialisation.
SEED = 0
# Size of the vocabulary of --tokenizer bytes: the bytes and the end of a text.
BYTES_VOCABULARY = 257


def load_model(name: str | Path, *, initialised: bool = False) -> tuple[nn.Module, Any]:
    """Model without its head, in evaluation mode, and its tokenizer, or None where it has none.

    Args:
        name: one of

            - folder of a model of Hugging Face, or its name on the hub: by ``AutoModel``, which has every causal,
              masked and encoder-decoder model without the head, of which a measurement needs nothing;
            - GGUF file, or folder with one and no ``config.json``: as transformers loads it, dequantised;
            - run of ``dispersion-gpt2``: its folder or ``checkpoint.pt``; a ``.safetensors`` file of GPT-2.
        initialised: whether to give a random initialisation of the same configuration in place of the weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is there cannot be loaded; the message says why.
        ModuleNotFoundError: transformers, or gguf and accelerate for a GGUF file, is missing.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name must be a folder, a file or a name on the hub, got {name!r}")
    path = Path(name)
    if path.suffix in (".gguf", ".safetensors", ".pt") and not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.is_dir() and not any(path.iterdir()):
        raise FileNotFoundError(f"{path} is an empty folder; give the folder with a model's config.json and weights")
    if path.suffix == ".gguf":
        return _from_transformers(str(path.parent), path.name, initialised)
    if path.suffix == ".safetensors":
        return _gpt2(load_weights(path), path.parent, initialised)
    if path.suffix == ".pt":
        return _gpt2(_from_checkpoint(path), path.parent, initialised)
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _from_transformers(str(path), files[0].name, initialised)
        if files:
            raise ValueError(f"{path} has several GGUF files; give one of {', '.join(map(str, files))}")
        if (path / "checkpoint.pt").is_file():
            return _gpt2(_from_checkpoint(path / "checkpoint.pt"), path, initialised)
        raise FileNotFoundError(f"{path} has no config.json, GGUF file or checkpoint.pt; give the folder of a model")
    needs_transformers = _has_tokenizer(path) and importlib.util.find_spec("transformers") is not None
    if path.is_dir() and not needs_transformers and (path / "model.safetensors").is_file() and _is_gpt2(path):
        return _gpt2(load_weights(path), path, initialised)
    return _from_transformers(str(name), None, initialised)


def initialised_like(model: nn.Module) -> nn.Module:
    """Random initialisation of the configuration of ``model``, on its device and in its dtype; the seed is fixed."""
    parameter = next(model.parameters(), None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        if isinstance(model, GPT2):
            other: nn.Module = GPT2(model.config)
        elif is_pretrained(model):
            other = type(model)(copy.deepcopy(model.config))
        else:
            raise TypeError(
                "initialised=True needs a model of Hugging Face or a GPT2 of this package, whose configuration says "
                f"how to make it, got {type(model).__name__}; make it yourself and measure it"
            )
    return other if parameter is None else other.to(parameter.device, parameter.dtype)


def name_of(model: nn.Module) -> str:
    """Name that the model was loaded by, or its class."""
    return str(getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__)


def _gpt2(model: GPT2, folder: Path, initialised: bool) -> tuple[nn.Module, Any]:
    """GPT-2 and its tokenizer: that of its folder, else the one that the size of the vocabulary tells."""
    tokenizer: Any = None
    with contextlib.suppress(ModuleNotFoundError):
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        elif model.config.vocab == 50257:
            tokenizer = gpt2_bpe()
        elif model.config.vocab == BYTES_VOCABULARY:
            tokenizer = _bytes
    return initialised_like(model).eval() if initialised else model.eval(), tokenizer


def _from_checkpoint(path: Path) -> GPT2:
    state = read_checkpoint(path)
    model = GPT2(GPT2Config(**state["config"]))
    model.load_state_dict(state["model"])
    return model


def _from_transformers(name: str, gguf_file: str | None, initialised: bool) -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"loading {name} needs transformers: pip install transformers", name=error.name
        ) from error
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        model = AutoModel.from_pretrained(name, **options)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # transformers and the hub raise many kinds
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        remedy = "" if Path(name).is_dir() else "; give the folder of a model, or load it once with a network"
        raise ValueError(
            f"{name} cannot be loaded by transformers ({type(error).__name__}: {reason}){remedy}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception:  # a folder of weights alone; texts then need tokenizer=
        tokenizer = None
    return initialised_like(model).eval() if initialised else model.eval(), tokenizer


def _bytes(text: str) -> list[int]:
    """Tokens of ``dispersion-gpt2 --tokenizer bytes``."""
    return list(text.encode())


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))


def _is_gpt2(folder: Path) -> bool:
    return '"model_type": "gpt2"' in (folder / "config.json").read_text("utf-8", errors="replace")
