"""The dispersion loss in a loop as torchtitan's: layers in a ModuleDict, activation checkpointing, each block compiled,
FSDP2.

The regulariser comes after checkpointing, whose regions the compiler takes without hooks inside, and before compiling.
``torchrun --nproc-per-node 2 examples/torchtitan_style.py`` runs it in several processes.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dispersion_kernels import DispersionRegularizer


class TransformerBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.attention_norm(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, dim: int = 32, layers: int = 3, vocabulary: int = 64) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleDict({str(k): TransformerBlock(dim) for k in range(layers)})
        self.norm, self.output = nn.RMSNorm(dim), nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            h = layer(h)
        logits: Tensor = self.output(self.norm(h))
        return logits


def main(steps: int, backend: str = "inductor", accumulate: int = 2) -> float:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.manual_seed(0)
    model = Transformer()
    for name, block in model.layers.items():
        model.layers[name] = checkpoint_wrapper(block)
    reg = DispersionRegularizer(model, layers="all", weight=0.1)
    for block in model.layers.values():
        block.compile(backend=backend, fullgraph=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(dist.get_rank())
    for step in range(steps):
        for _ in range(accumulate):
            tokens = torch.randint(64, (4, 33))
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()) + reg.loss()
            (loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dispersion = torch.stack(list(reg.values.values())).mean().item()
        print(f"step {step + 1}: loss {loss.item():.4f}, dispersion {dispersion:.4f}")
    dist.destroy_process_group()
    return dispersion


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    main(**vars(parser.parse_args()))
