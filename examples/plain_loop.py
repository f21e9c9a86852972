"""The dispersion loss in a training loop of one's own: accumulation, autocast and clipping, as without it."""

import argparse

import torch

from dispersion_kernels import DispersionRegularizer
from dispersion_kernels.gpt2.model import GPT2, GPT2Config


def main(steps: int, accumulate: int = 2) -> float:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(layers=2, width=32, heads=2, context=64, vocab=64))
    reg = DispersionRegularizer(model, layers="all", weight=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        for _ in range(accumulate):
            tokens = torch.randint(64, (4, 65))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(tokens[:, :-1], tokens[:, 1:]).loss + reg.loss()
            (loss / accumulate).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dispersion = torch.stack(list(reg.values.values())).mean().item()
        print(f"step {step + 1}: loss {loss.item():.4f}, dispersion {dispersion:.4f}")
    return dispersion


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
