"""The dispersion loss in trainers of Hugging Face, TRL and Sentence Transformers, and in PEFT: each gradient that the
optimiser takes is the sum by hand in float64."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from regularized import WEIGHT, Step, assert_same, by_hand, gradients, tokens
from torch import Tensor, nn

from dispersion_kernels import DispersionRegularizer

pytestmark = pytest.mark.integrations
transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")
datasets = pytest.importorskip("datasets", reason="needs datasets")
integration = pytest.importorskip("dispersion_kernels.integrations.transformers")
DispersionMixin, attach = integration.DispersionMixin, integration.attach

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
VOCABULARY = 64


def llama(layers: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{k}": k for k in range(4, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


LENGTHS = (12, 7, 12, 9, 11, 5)


def rows() -> list[dict[str, list[int]]]:
    """Six sequences of several lengths."""
    batch = tokens(6, 12, seed=7, vocabulary=VOCABULARY - 4) + 4
    return [{"input_ids": row[:length].tolist()} for row, length in zip(batch, LENGTHS, strict=True)]


class Recorded(transformers.TrainerCallback):  # type: ignore[misc]
    """The gradients that each step of the optimiser begins with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **others: Any) -> None:
        self.steps.append(gradients(model))


def arguments(folder: Path, batch_size: int, accumulate: int, kind: Any = None, **options: Any) -> Any:
    return (kind or transformers.TrainingArguments)(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0,
        learning_rate=0.0,  # every step is at the same parameters
        optim="sgd",
        num_train_epochs=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        **options,
    )


def exact_steps(model: nn.Module, groups: Sequence[Sequence[int]]) -> list[Step]:
    """Cross-entropy over all tokens of each step, and mean dispersion of its sequences."""
    return [by_hand(model, [_call(group)], _blocks, options=[{"mask": _padded(group)[1].bool()}]) for group in groups]


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    return [m for name, m in model.named_modules() if name.split(".")[-2:-1] == ["layers"]]


def _padded(group: Sequence[int]) -> tuple[Tensor, Tensor]:
    chosen = [rows()[k]["input_ids"] for k in group]
    ids, mask = torch.zeros(len(group), 12, dtype=torch.long), torch.zeros(len(group), 12, dtype=torch.long)
    for k, row in enumerate(chosen):
        ids[k, : len(row)] = torch.tensor(row)
        mask[k, : len(row)] = 1
    return ids, mask


def _call(group: Sequence[int]) -> Callable[[nn.Module], Tensor]:
    ids, mask = _padded(group)

    def run(model: nn.Module) -> Tensor:
        labels = ids.masked_fill(mask == 0, -100)
        loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss

    return run


STEPS = ((0, 1, 2, 3), (4, 5))


def _trainer(kind: str, folder: Path, batch_size: int, accumulate: int, **options: Any) -> tuple[Any, Recorded]:
    """A trainer of the six sequences."""
    recorded, model = Recorded(), llama()
    dataset = datasets.Dataset.from_list(rows())
    if kind == "trainer":
        collator = transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False)
        trainer = transformers.Trainer(
            model,
            arguments(folder, batch_size, accumulate, **options),
            train_dataset=dataset,
            eval_dataset=dataset,
            data_collator=collator,
            callbacks=[recorded],
        )
    else:
        trl = pytest.importorskip("trl", reason="needs trl")
        trainer = trl.SFTTrainer(
            model,
            arguments(folder, batch_size, accumulate, trl.SFTConfig, max_length=None, **options),
            train_dataset=dataset,
            eval_dataset=dataset,
            processing_class=tokenizer(),
            callbacks=[recorded],
        )
    return trainer, recorded


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_accumulation_changes_nothing(kind: str, batch_size: int, accumulate: int, tmp_path: Path) -> None:
    """The last step has two sequences, of however many batches."""
    trainer, recorded = _trainer(kind, tmp_path, batch_size, accumulate)
    before = trainer.evaluate()["eval_loss"]
    attach(trainer, weight=WEIGHT)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, rel=1e-6)
    exact = exact_steps(llama(), STEPS)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(recorded.steps) == len(logs) == 2
    for grads, entry, answer in zip(recorded.steps, logs, exact, strict=True):
        assert_same(Step(torch.tensor(entry["loss"]), grads), answer, tolerance=1e-4)
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + WEIGHT * entry["dispersion"], rel=1e-5)
    without = by_hand(llama(), [_call(STEPS[0])], _blocks, weight=0.0)
    assert logs[0]["cross_entropy"] == pytest.approx(without.loss.item(), rel=1e-4)
    name = "model.layers.0.mlp.up_proj.weight"
    assert (exact[0].grads[name] - without.grads[name]).abs().max() > 0.05 * without.grads[name].abs().max()


def _inputs_of(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Appended to at each forward with gradients: the tokens and mask that the owner of the blocks was given."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            given = {**kwargs, **(args[0] if args else {})}
            seen.append((given["input_ids"].clone(), given["attention_mask"].clone()))

    # Sentence Transformers' takes a mapping, and calls the forward of its BertModel.
    owner = next(m for m in model.modules() if type(m).__name__ in ("LlamaModel", "Transformer"))
    owner.register_forward_pre_hook(record, with_kwargs=True)
    return seen


def assert_adds_the_dispersion(
    model: nn.Module,
    blocks: Callable[[nn.Module], Sequence[nn.Module]],
    without: dict[str, Tensor],
    together: dict[str, Tensor],
    seen: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """The gradients of two runs differ by those of ``WEIGHT`` times the mean of the dispersion of what was ``seen``."""
    owner = next(m for m in model.modules() if type(m).__name__ in ("LlamaModel", "BertModel"))
    prefix = next(name for name, m in model.named_modules() if m is owner)

    def zero(ids: Tensor, mask: Tensor) -> Callable[[nn.Module], Tensor]:
        return lambda m: 0.0 * m.get_submodule(prefix)(input_ids=ids, attention_mask=mask).last_hidden_state.sum()

    exact = by_hand(
        model,
        [zero(ids, mask) for ids, mask in seen],
        blocks,
        options=[{"mask": mask.bool()} for _, mask in seen],
        scales=[1 / len(seen)] * len(seen),
    )
    names = [name for name, grad in exact.grads.items() if grad.any()]
    assert len(names) > 5
    added = {name: together[name].double() - without[name] for name in names}
    assert_same(Step(exact.loss, added), Step(exact.loss, {name: exact.grads[name] for name in names}), tolerance=1e-4)


def _grpo(folder: Path, batch_size: int, accumulate: int, weight: float) -> tuple[Any, list[Any], Any]:
    trl = pytest.importorskip("trl", reason="needs trl")
    recorded, model = Recorded(), llama()
    dataset = datasets.Dataset.from_list(
        [{"prompt": " ".join(f"w{5 + k + j}" for j in range(3 + k))} for k in range(2)]
    )
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **others: [float(len(text) % 7) for text in completions],
        args=arguments(
            folder,
            batch_size,
            accumulate,
            trl.GRPOConfig,
            num_generations=2,
            max_completion_length=8,
            max_steps=1,
            beta=0.0,
        ),
        train_dataset=dataset,
        processing_class=tokenizer(),
        callbacks=[recorded],
    )
    seen = _inputs_of(trainer.model)
    if weight:
        attach(trainer, weight=weight)
    trainer.train()
    assert len(recorded.steps) == 1
    return trainer, seen, recorded.steps[0]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (2, 2), (1, 4)])
def test_grpo(batch_size: int, accumulate: int, tmp_path: Path) -> None:
    """``generate`` and the old policy's probabilities are without gradients, and no part of it."""
    _, seen, without = _grpo(tmp_path, batch_size, accumulate, 0.0)
    trainer, again, together = _grpo(tmp_path, batch_size, accumulate, WEIGHT)
    assert len(seen) == len(again) == accumulate
    assert all(torch.equal(a, b) for a, b in zip(sum(seen, ()), sum(again, ()), strict=True))  # type: ignore[arg-type]
    assert_adds_the_dispersion(llama(), _blocks, without, together, seen)
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entry["loss"] == pytest.approx(entry["cross_entropy"] + WEIGHT * entry["dispersion"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (1, 4)])
def test_sentence_transformers(batch_size: int, accumulate: int, tmp_path: Path) -> None:
    """Two forwards, of either column, in each loss."""
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    sentences = [" ".join(f"w{k}" for k in row["input_ids"]) for row in rows()]
    dataset = datasets.Dataset.from_dict({"a": sentences[:4], "b": sentences[2:], "score": [0.1, 0.9, 0.3, 0.5]})

    def run(weight: float) -> tuple[nn.Module, list[Any], dict[str, Tensor]]:
        parts = sentence_transformers.sentence_transformer.modules
        transformer = parts.Transformer(str(tmp_path / "bert"))
        model = sentence_transformers.SentenceTransformer(modules=[transformer, parts.Pooling(16)], device="cpu")
        start, recorded = copy.deepcopy(model), Recorded()
        trainer = sentence_transformers.SentenceTransformerTrainer(
            model,
            arguments(tmp_path, batch_size, accumulate, sentence_transformers.SentenceTransformerTrainingArguments),
            train_dataset=dataset,
            loss=sentence_transformers.sentence_transformer.losses.CosineSimilarityLoss(model),
            callbacks=[recorded],
        )
        seen = _inputs_of(model)
        if weight:
            reg = attach(trainer, weight=weight)
            assert [name.split(".")[-3:] for name in reg.layers] == [
                ["encoder", "layer", "0"],
                ["encoder", "layer", "1"],
            ]
        trainer.train()
        assert len(recorded.steps) == 1
        return start, seen, recorded.steps[0]

    start, seen, without = run(0.0)
    _, _, together = run(WEIGHT)
    assert len(seen) == 2 * accumulate

    def layers(m: nn.Module) -> Sequence[nn.Module]:
        return [block for name, block in m.named_modules() if name.split(".")[-2:-1] == ["layer"]]

    assert_adds_the_dispersion(start, layers, without, together, seen)


def test_the_mixin(tmp_path: Path) -> None:
    class MyTrainer(DispersionMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    recorded = Recorded()
    trainer = MyTrainer(
        llama(),
        arguments(tmp_path, 2, 2),
        train_dataset=datasets.Dataset.from_list(rows()),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer(), mlm=False),
        callbacks=[recorded],
        dispersion={"weight": WEIGHT},
    )
    trainer.train()
    for grads, answer in zip(recorded.steps, exact_steps(llama(), STEPS), strict=True):
        assert_same(Step(answer.loss, grads), answer, tolerance=1e-4)
    with pytest.raises(ValueError, match="already"):
        attach(trainer)
    with pytest.raises(TypeError, match=r"trainer must be .* got Linear"):
        attach(nn.Linear(2, 2))


def _on_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    answers = {}
    for kind in ("trainer", "sft"):
        trainer, recorded = _trainer(kind, Path(folder), 1, 2, max_steps=1)
        attach(trainer, weight=WEIGHT)
        trainer.train()
        answers[kind] = (recorded.steps[0], next(entry for entry in trainer.state.log_history if "loss" in entry))
    _, _, without = _grpo(Path(folder), 1, 2, 0.0)
    trainer, seen, together = _grpo(Path(folder), 1, 2, WEIGHT)
    answers["grpo"] = (without, together, seen)  # type: ignore[assignment]
    torch.save(answers, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="needs gloo")
def test_two_processes(tmp_path: Path) -> None:
    import socket

    pytest.importorskip("trl", reason="needs trl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_on_two, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    answer = exact_steps(llama(), STEPS)[0]
    for kind in ("trainer", "sft"):
        grads, entry = first[kind]
        assert_same(Step(torch.tensor(entry["loss"]), grads), answer, tolerance=1e-4)
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + WEIGHT * entry["dispersion"], rel=1e-5)
    without, together, seen = first["grpo"]
    assert_adds_the_dispersion(llama(), _blocks, without, together, [*seen, *second["grpo"][2]])


def test_lora_on_late_layers() -> None:
    """The early layers have no gradient, and their dispersion counts in the mean."""
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3], init_lora_weights=False
    )
    model = peft.get_peft_model(llama(layers=4), config)
    batch = tokens(2, 12, vocabulary=VOCABULARY)

    def call(m: nn.Module) -> Tensor:
        loss: Tensor = m(input_ids=batch, labels=batch).loss
        return loss

    exact = by_hand(model, [call], _blocks)
    for regularized in (model, model.base_model.model):  # around and below PEFT's wrapper
        model.zero_grad()
        reg = DispersionRegularizer(regularized, weight=WEIGHT)
        assert len(reg.layers) == 4
        total = call(model) + reg.loss()
        total.backward()
        reg.remove()
        assert_same(Step(total.detach(), gradients(model)), exact)
    assert all("lora" in name for name in exact.grads)
