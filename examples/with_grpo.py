"""The dispersion loss in TRL's GRPOTrainer, and condensation while it trains: a reward for many different words."""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from dispersion_kernels.integrations.transformers import attach, attach_monitor


def different_words(completions: list[str], **kwargs: object) -> list[float]:
    return [float(len(set(completion.split()))) for completion in completions]


def main(steps: int) -> float:
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, **{f"w{k}": k for k in range(2, 64)}}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    prompts = [" ".join(f"w{k}" for k in row.tolist()) for row in torch.randint(2, 64, (32, 12))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model,
            different_words,
            GRPOConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=12,
                learning_rate=3e-3,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                bf16=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
        )
        attach(trainer, layers="all", weight=0.1)
        monitor = attach_monitor(trainer, prompts[:8], every=10)
        trainer.train()
    for record in monitor.records:
        print(f"step {record.step}: mean cosine of each block {[round(mean, 3) for mean in record.means.values()]}")
    return float(trainer.state.log_history[-2]["dispersion"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
