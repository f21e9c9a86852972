"""The dispersion loss in Lightning, by a callback."""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from dispersion_kernels.gpt2.model import GPT2, GPT2Config
from dispersion_kernels.integrations.lightning import Dispersion


class LanguageModel(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2(GPT2Config(layers=2, width=32, heads=2, context=64, vocab=64))

    def training_step(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.model(tokens[:, :-1], tokens[:, 1:]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(steps: int) -> float:
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        callbacks=[Dispersion(layers="all", weight=0.1)],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(LanguageModel(), DataLoader(torch.randint(64, (8 * steps, 65)), batch_size=4))
    return float(trainer.callback_metrics["dispersion"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
