"""Condensation measured in trainers of Hugging Face, TRL and Lightning: the logs have what the model computes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.integrations
os.environ["HF_HUB_OFFLINE"] = "1"
VOCABULARY = 64
TEXTS = [torch.arange(5, 25), torch.arange(30, 12, -1)]


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        attention_dropout=0.1,
    )
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, **{f"w{k}": k for k in range(2, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def by_hand(model: nn.Module, texts: list[Tensor]) -> list[float]:
    """Mean over texts of the mean of all pairs' cosines, of blocks 1 and 2, in float64: the third of the hidden states
    that a model returns is behind the final norm."""
    training = model.training
    model.eval()
    means = []
    for ids in texts:
        with torch.no_grad():
            hidden = model(input_ids=ids[None], output_hidden_states=True).hidden_states
        text_means = []
        for z in hidden[1:-1]:
            x = z[0].double().numpy()
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
            text_means.append((x @ x.T)[np.triu_indices(len(x), 1)].mean())
        means.append(text_means)
    model.train(training)
    return np.mean(means, 0).tolist()  # type: ignore[no-any-return]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }


def hf_trainer(folder: Path) -> Any:
    from transformers import Trainer, TrainingArguments

    rows = torch.randint(VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(llama(), TrainingArguments(**options(folder)), train_dataset=data)


def sentences() -> list[str]:
    rows = torch.randint(2, VOCABULARY, (16, 10), generator=torch.Generator().manual_seed(0))
    return [" ".join(f"w{k}" for k in row.tolist()) for row in rows]


def sft_trainer(folder: Path) -> Any:
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset

    return trl.SFTTrainer(
        llama(),
        trl.SFTConfig(**options(folder, bf16=False)),
        train_dataset=Dataset.from_dict({"text": sentences()}),
        processing_class=tokenizer(),
    )


def grpo_trainer(folder: Path) -> Any:
    trl = pytest.importorskip("trl", reason="needs trl")
    from datasets import Dataset

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(set(completion.split()))) for completion in completions]

    config = trl.GRPOConfig(**options(folder, bf16=False, num_generations=2, max_completion_length=8))
    return trl.GRPOTrainer(
        llama(),
        reward,
        config,
        train_dataset=Dataset.from_dict({"prompt": sentences()}),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("make", [hf_trainer, sft_trainer, grpo_trainer])
def test_logs_have_the_cosines_of_the_steps_at_which_they_were_measured(make: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    from transformers import TrainerCallback

    from dispersion_kernels.integrations.transformers import attach, attach_monitor

    trainer = make(tmp_path)
    attach(trainer, weight=0.1)
    monitor = attach_monitor(trainer, TEXTS, every=2)
    seen: list[dict[str, float]] = []  # by what reports, as wandb does

    class Reporting(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer.add_callback(Reporting)
    before = by_hand(trainer.model, TEXTS)
    trainer.train()
    assert [record.step for record in monitor.records] == [0, 2, 4, 5]
    assert trainer.condensation is monitor
    for record, expected in ((monitor.records[0], before), (monitor.records[-1], by_hand(trainer.model, TEXTS))):
        assert [record.means["block 1"], record.means["block 2"]] == pytest.approx(expected, abs=1e-5)
    assert monitor.records[0].means != monitor.records[-1].means
    logged = {line["step"]: line for line in trainer.state.log_history if "loss" in line}
    assert list(logged) == [2, 4, 5]
    for record in monitor.records[1:]:
        for name, mean in record.means.items():
            assert logged[record.step][f"condensation/{name}"] == mean
        assert {"dispersion", "condensation/mean"} <= logged[record.step].keys()
    assert [line["condensation/block 3"] for line in seen if "loss" in line] == [
        record.means["block 3"] for record in monitor.records[1:]
    ]


def test_training_is_the_same_with_and_without_a_monitor(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    from dispersion_kernels.integrations.transformers import attach_monitor

    weights = []
    for watched in (False, True):
        trainer = hf_trainer(tmp_path)  # which seeds
        if watched:
            attach_monitor(trainer, TEXTS, every=1)
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    for one, two in zip(*weights, strict=True):
        assert torch.equal(one, two)


def test_strings_take_the_trainers_tokenizer_and_what_is_wrong_is_named(tmp_path: Path) -> None:
    from dispersion_kernels.integrations.transformers import attach_monitor

    trainer = sft_trainer(tmp_path)
    monitor = attach_monitor(trainer, ["w5 w6 w7 w8", "w9 w10"])
    monitor.measure(0)
    expected = by_hand(trainer.model, [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10])])
    assert [monitor.records[0].means[f"block {k}"] for k in (1, 2)] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="trainer has a monitor already"):
        attach_monitor(trainer, TEXTS)
    with pytest.raises(TypeError, match=r"trainer must be a transformers\.Trainer"):
        attach_monitor(trainer.model, TEXTS)


@pytest.mark.parametrize("has_forward", [False, True])
def test_lightning(has_forward: bool, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch", reason="needs lightning")
    from dispersion_kernels.integrations.lightning import Condensation

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = llama()
            self.logged: dict[int, dict[str, float]] = {}

        def training_step(self, batch: Tensor) -> Tensor:
            loss: Tensor = self.net(input_ids=batch, labels=batch).loss
            return loss

        def log_dict(self, values: dict[str, float], *args: Any, **kwargs: Any) -> None:
            self.logged[self.trainer.global_step] = dict(values)
            super().log_dict(values, *args, **kwargs)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class WithForward(Module):
        def forward(self, input_ids: Tensor) -> Any:
            return self.net(input_ids=input_ids)

    module = WithForward() if has_forward else Module()
    callback = Condensation(TEXTS, every=2)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=5,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
    )
    rows = torch.randint(VOCABULARY, (20, 12), generator=torch.Generator().manual_seed(0))
    before = by_hand(module.net, TEXTS)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))  # type: ignore[arg-type]
    assert callback.monitor is not None
    records = callback.monitor.records
    assert [record.step for record in records] == [0, 2, 4, 5]
    for record, expected in ((records[0], before), (records[-1], by_hand(module.net, TEXTS))):
        assert [record.means["block 1"], record.means["block 2"]] == pytest.approx(expected, abs=1e-5)
    assert list(module.logged) == [2, 4]
    assert module.logged[4]["condensation/block 3"] == records[2].means["block 3"]
    assert float(trainer.callback_metrics["condensation/mean"]) == pytest.approx(
        np.mean(list(records[2].means.values())), abs=1e-6
    )
