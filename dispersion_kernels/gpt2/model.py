"""GPT-2 (Radford et al., 2019), its published shapes, and its weights in Hugging Face's naming.

Parameters have Hugging Face's names (``wte``, ``h.0.attn.c_attn``, ...); reading and writing weights only handles the
``transformer.`` prefix and four transposed matrices per block.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .files import replaced, write_json


@dataclass(frozen=True)
class GPT2Config:
    """Shape of a GPT-2. ``mlp_width=0`` becomes four times the width, as published, as is ``norm="layernorm"``."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_width: int = 0
    context: int = 1024
    vocab: int = 50257
    dropout: float = 0.0
    norm: str = "layernorm"

    def __post_init__(self) -> None:
        if self.mlp_width == 0:
            object.__setattr__(self, "mlp_width", 4 * self.width)
        for field in ("layers", "width", "heads", "mlp_width", "context", "vocab"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be a positive integer, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width={self.width} and heads={self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {list(NORMS)}, got {self.norm!r}")


# Norms before the branches of a block and before the head. GPT-2 has the first; the second neither centres nor shifts.
NORMS: dict[str, Callable[..., nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}

PRESETS = {
    "nano": GPT2Config(layers=6, width=128, heads=4, context=256, vocab=1024),
    "gpt2": GPT2Config(layers=12, width=768, heads=12),
    "gpt2-medium": GPT2Config(layers=24, width=1024, heads=16),
    "gpt2-large": GPT2Config(layers=36, width=1280, heads=20),
    "gpt2-xl": GPT2Config(layers=48, width=1600, heads=25),
}


# Standard deviation of the initial weights, and the norms' addition to the variance, as published.
INIT_STD = 0.02
EPSILON = 1e-5


class GPT2Output(NamedTuple):
    logits: Tensor
    loss: Tensor | None
    hidden: list[Tensor]


class GPT2(nn.Module):
    """GPT-2 from tokens ``[B, L]`` to next-token logits ``[B, L, V]``.

    With ``targets`` ``[B, L]`` the output's ``loss`` is the mean cross-entropy in nats. With ``return_hidden`` its
    ``hidden`` holds the residual stream ``[B, L, width]`` after every block, without the embedding, and without the
    final LayerNorm on the last one.
    """

    def __init__(self, config: GPT2Config, *, checkpoint_activations: bool = False, init_std: float = INIT_STD) -> None:
        super().__init__()
        self.config = config
        self.init_std = init_std
        self.checkpoint_activations = checkpoint_activations
        self.wte = nn.Embedding(config.vocab, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = norm(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # 2 * layers branches end in a c_proj; the scale keeps the variance of their sum in the residual stream.
                branches = 2 * self.config.layers if name.endswith("c_proj.weight") else 1
                nn.init.normal_(parameter, std=self.init_std / math.sqrt(branches))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor | None = None, return_hidden: bool = False) -> GPT2Output:
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"tokens hold {length} positions, the model's context is {self.config.context}")
        x = self.drop(self.wte(tokens) + self.wpe.weight[:length])
        hidden = []
        for block in self.h:
            x = block(x, self.checkpoint_activations and self.training)
            if return_hidden:
                hidden.append(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return GPT2Output(logits, loss, hidden)


def norm(config: GPT2Config) -> nn.Module:
    return NORMS[config.norm](config.width, eps=EPSILON)


class Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        # Only ``residual`` is checkpointed, so that hooks on the block are outside: the compiler takes none inside.
        return checkpoint(self.residual, x, use_reentrant=False) if recompute else self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class Attention(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.width, 3 * config.width)
        self.c_proj = nn.Linear(config.width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, dim=-1))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = self.drop(self.c_proj(y.transpose(1, 2).flatten(2)))
        return x


class MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.mlp_width)
        self.c_proj = nn.Linear(config.mlp_width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")
        x = self.drop(self.c_proj(x))
        return x


# Names in config.json. transformers' AutoModel knows no second one.
MODEL_TYPES = {"layernorm": "gpt2", "rmsnorm": "gpt2-rmsnorm"}
# Matrices that Hugging Face stores as Conv1D, [in, out]; nn.Linear is [out, in]. With RMSNorm they are stored as
# [out, in], so that transformers' GPT-2 refuses their shapes: it would compute LayerNorm.
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Constants in older files, which are not loaded.
BUFFERS = (".attn.bias", ".attn.masked_bias")


def load_weights(path: str | Path, *, dropout: float = 0.0, heads: int | None = None, **options: Any) -> GPT2:
    """GPT-2 from a local safetensors file in Hugging Face's naming, or from the folder of its ``model.safetensors``.

    The names may have the prefix ``transformer.``. The number of heads is ``heads``, else that of a ``config.json``
    beside the file, else that of the published shape. Further options go to :class:`GPT2`.
    """
    from safetensors import SafetensorError, safe_open

    file = weights_file(Path(path))
    try:
        with safe_open(file, framework="pt") as tensors:
            named = {key.removeprefix("transformer."): tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file ({error}); download it again") from error
    weights = {name: tensor for name, tensor in named.items() if not name.endswith(BUFFERS)}

    head = weights.pop("lm_head.weight", None)
    if head is not None and not ("wte.weight" in weights and torch.equal(head, weights["wte.weight"])):
        raise ValueError(f"{file}: lm_head.weight differs from wte.weight; only GPT-2 with a tied head can be loaded")

    config = config_of(weights, file, heads=heads, dropout=dropout)
    model = GPT2(config, **options)
    wanted = model.state_dict()
    if missing := wanted.keys() - weights.keys():
        raise ValueError(f"{file}: tensor {min(missing)} is missing ({len(missing)} in all); is it a GPT-2?")
    if unknown := weights.keys() - wanted.keys():
        raise ValueError(f"{file}: tensor {min(unknown)} is not one of GPT-2's ({len(unknown)} such in all)")
    for name, tensor in weights.items():
        transposed = is_transposed(name, config)
        expected = wanted[name].t().shape if transposed else wanted[name].shape
        if tensor.shape != expected:
            raise ValueError(f"{file}: tensor {name} has shape {list(tensor.shape)}, expected {list(expected)}")
        weights[name] = tensor.t() if transposed else tensor
    model.load_state_dict(weights)
    return model


def weights_file(path: Path) -> Path:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"no GPT-2 weights at {file}: give a .safetensors file in Hugging Face's naming, or a folder with "
            "model.safetensors in it"
        )
    return file


def config_of(weights: dict[str, Tensor], file: Path, *, heads: int | None, dropout: float) -> GPT2Config:
    """Shape of the model from its tensors. ``config.json``, where present, gives the heads, and must describe GPT-2's
    arithmetic."""
    shapes = {}
    for name in ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight"):
        if name not in weights:
            raise ValueError(f"{file}: tensor {name} is missing; is it a GPT-2 in Hugging Face's naming?")
        shapes[name] = weights[name].shape
        if len(shapes[name]) != 2:
            raise ValueError(f"{file}: tensor {name} has shape {list(shapes[name])}, expected a matrix")
    vocab, width = shapes["wte.weight"]
    kind = "layernorm"
    layers = len({name.split(".")[1] for name in weights if name.startswith("h.")})

    config_file = file.with_name("config.json")
    if config_file.is_file():
        try:
            stored = dict(json.loads(config_file.read_text("utf-8")))
            heads = heads or int(stored["n_head"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{config_file} is not the config.json of a GPT-2 ({error!r})") from error
        if stored.get("model_type") == MODEL_TYPES["rmsnorm"]:
            kind = "rmsnorm"
        fixed = {
            "model_type": MODEL_TYPES[kind],
            "activation_function": "gelu_new",
            "layer_norm_epsilon": EPSILON,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
        }
        for key, value in fixed.items():
            if stored.get(key, value) != value:
                raise ValueError(f"{config_file}: {key} is {stored[key]!r}, only {value!r} can be loaded")
    published = {(preset.layers, preset.width): preset.heads for name, preset in PRESETS.items() if name != "nano"}
    heads = heads or published.get((layers, width))
    if heads is None:
        raise ValueError(f"{file} does not say how many heads it has: put its config.json beside it, or give heads")
    mlp_width, context = shapes["h.0.mlp.c_fc.weight"][kind == "layernorm"], shapes["wpe.weight"][0]
    return GPT2Config(layers, width, heads, mlp_width, context, vocab, dropout, kind)


def save_weights(model: GPT2, folder: str | Path) -> Path:
    """Writes ``model.safetensors`` and ``config.json`` for ``transformers.GPT2LMHeadModel.from_pretrained``, which has
    no RMSNorm: it refuses a model with it, which :func:`load_weights` alone reads."""
    from safetensors.torch import save

    folder = Path(folder)
    tensors = {f"transformer.{name}": tensor.contiguous() for name, tensor in exported(model)}
    config = model.config
    description = {
        **({"architectures": ["GPT2LMHeadModel"]} if config.norm == "layernorm" else {}),
        "model_type": MODEL_TYPES[config.norm],
        "activation_function": "gelu_new",
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "n_positions": config.context,
        "vocab_size": config.vocab,
        "layer_norm_epsilon": EPSILON,
        **{f"{part}_pdrop": config.dropout for part in ("embd", "attn", "resid")},
        "tie_word_embeddings": True,
    }
    write_json(folder / "config.json", description)
    content = save(tensors, metadata={"format": "pt"})
    with replaced(folder / "model.safetensors", len(content)) as stream:
        stream.write(content)
    return folder / "model.safetensors"


def exported(model: GPT2) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        yield name, tensor.t() if is_transposed(name, model.config) else tensor


def is_transposed(name: str, config: GPT2Config) -> bool:
    return config.norm == "layernorm" and name.endswith(TRANSPOSED)
