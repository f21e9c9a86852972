"""The dispersion loss in a loop of Hugging Face's accelerate, which divides by the accumulated batches itself.

``accelerate launch examples/with_accelerate.py`` runs it on several devices.
"""

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from dispersion_kernels import DispersionRegularizer


def main(steps: int) -> float:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    reg = DispersionRegularizer(model, layers="all", weight=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = DataLoader(torch.randint(64, (8 * steps, 32)), batch_size=4)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    for tokens in batches:
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss + reg.loss()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        dispersion = torch.stack(list(reg.values.values())).mean().item()
        accelerator.print(f"loss {loss.item():.4f}, dispersion {dispersion:.4f}")
    return dispersion


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
