"""The dispersion loss in TRL's SFTTrainer, on the completions alone, and condensation while it trains."""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from dispersion_kernels.integrations.transformers import attach, attach_monitor


def main(steps: int) -> float:
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, **{f"w{k}": k for k in range(2, 64)}}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    text = [" ".join(f"w{k}" for k in row.tolist()) for row in torch.randint(2, 64, (64, 24))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            SFTConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=3e-3,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                bf16=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": text[:32], "completion": text[32:]}),
            processing_class=tokenizer,
        )
        attach(trainer, layers="all", weight=0.1, tokens="labels")
        monitor = attach_monitor(trainer, text[:8], every=10)
        trainer.train()
    for record in monitor.records:
        print(f"step {record.step}: mean cosine of each block {[round(mean, 3) for mean in record.means.values()]}")
    return float(trainer.state.log_history[-2]["dispersion"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    main(parser.parse_args().steps)
