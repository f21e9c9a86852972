"""The dispersion loss in Hugging Face's Trainer."""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dispersion_kernels.integrations.transformers import attach


def main(steps: int) -> float:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    rows = torch.randint(64, (64, 32))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=3e-3,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        )
        attach(trainer, layers="all", weight=0.1)
        trainer.train()
    return float(trainer.state.log_history[-2]["dispersion"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
