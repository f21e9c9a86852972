"""DispersionRegularizer on tiny random models of Hugging Face's transformers: blocks, numbers, padding, packing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from regularized import WEIGHT, Step, assert_same, by_hand, gradients, tokens
from torch import Tensor, nn

from dispersion_kernels import DispersionRegularizer, fused_dispersion_loss, regularizer

transformers = pytest.importorskip("transformers", reason="needs transformers")

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT = {
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"experts_implementation": "eager", "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}
T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_ff": 32,
    "d_kv": 8,
    "num_layers": 3,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
BERT = {"is_decoder": True}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout_rate": 0.0}
DROPOUT |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attention_dropout": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("GPT2LMHeadModel", GPT, "transformer.h"),
    "llama": ("LlamaForCausalLM", SMALL, "model.layers"),
    "qwen2": ("Qwen2ForCausalLM", SMALL, "model.layers"),
    "qwen3": ("Qwen3ForCausalLM", SMALL, "model.layers"),
    "gemma": ("GemmaForCausalLM", SMALL, "model.layers"),
    "gemma3": ("Gemma3ForCausalLM", SMALL, "model.layers"),
    "mistral": ("MistralForCausalLM", SMALL, "model.layers"),
    "mixtral": ("MixtralForCausalLM", {**SMALL, **EXPERTS}, "model.layers"),
    "olmo": ("OlmoForCausalLM", SMALL, "model.layers"),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL, "gpt_neox.layers"),
    "bert": ("BertLMHeadModel", {**SMALL, **BERT}, "bert.encoder.layer"),
    "mamba": ("MambaForCausalLM", {**SMALL, "state_size": 4}, "backbone.layers"),
    "t5 encoder": ("T5ForConditionalGeneration", T5, "encoder.block"),
    "t5 decoder": ("T5ForConditionalGeneration", T5, "decoder.block"),
}


def build(name: str) -> tuple[nn.Module, str, dict[str, str]]:
    """The model, the name of its stack, and what DispersionRegularizer must be told of it."""
    cls, options, stack = MODELS[name]
    model_class = getattr(transformers, cls)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**DROPOUT, **options}))
    return model.train(), stack, {"stack": stack.split(".")[0]} if name.startswith("t5") else {}


def blocks_of(stack: str) -> Callable[[nn.Module], Sequence[nn.Module]]:
    return lambda model: list(model.get_submodule(stack))  # type: ignore[call-overload]


def call(batch: Tensor, **arguments: Any) -> Callable[[nn.Module], Tensor]:
    def run(model: nn.Module) -> Tensor:
        loss: Tensor = model(input_ids=batch, labels=batch, use_cache=False, **arguments).loss
        return loss

    return run


def step(model: nn.Module, reg: DispersionRegularizer, run: Callable[[nn.Module], Tensor]) -> Step:
    model.zero_grad()
    total = run(model) + reg.loss()
    total.backward()
    return Step(total.detach(), gradients(model))


@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_by_hand(name: str) -> None:
    model, stack, which = build(name)
    batch = tokens(length=16)
    reg = DispersionRegularizer(model, weight=WEIGHT, **which)
    assert reg.layers == [f"{stack}.{k}" for k in range(3)]
    mask = torch.ones_like(batch)
    mask[1, 10:] = 0
    seen = mask.bool()
    arguments = {"attention_mask": mask}
    if name == "t5 decoder":
        arguments = {"decoder_attention_mask": mask}
    run = call(batch, **arguments)
    exact = by_hand(model, [run], blocks_of(stack), options=[{"mask": seen}])
    assert_same(step(model, reg, run), exact, tolerance=5e-5)
    # hidden_states has the same numbers, but behind the final norm for the last layer.
    states = "hidden_states" if not which else f"{which['stack']}_hidden_states"
    hidden = getattr(model(input_ids=batch, labels=batch, output_hidden_states=True, **arguments), states)
    last = reg.values[f"{stack}.1"]
    reg.loss()
    second = hidden[1 if name == "mamba" else 2]  # Mamba's begin behind the first block
    torch.testing.assert_close(fused_dispersion_loss(second.detach(), mask=seen), last)
    model.eval()
    with torch.no_grad():
        evaluated = run(model)
        reg.remove()
        assert torch.equal(run(model), evaluated)


def test_several_stacks_are_listed() -> None:
    model, _, _ = build("t5 encoder")
    with pytest.raises(ValueError, match=r"encoder.block \(3 x T5Block\), decoder.block \(3 x T5Block\)"):
        DispersionRegularizer(model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_modules_have_the_mask_of_their_own_stack(wrapped: bool) -> None:
    """The encoder's mask, of the same shape, is not the decoder's; nor does a wrapper's call come between."""
    model, stack, _ = build("t5 decoder")
    batch = tokens(length=16)
    mask, other = torch.arange(16) < torch.tensor([[16], [10]]), torch.arange(16) < torch.tensor([[7], [16]])
    run = call(batch, decoder_attention_mask=mask.long(), attention_mask=other.long())
    exact = by_hand(model, [run], blocks_of(stack), options=[{"mask": mask}])
    outside = nn.ModuleDict({"model": model}) if wrapped else model
    reg = DispersionRegularizer(outside, blocks_of(stack)(model), WEIGHT)
    assert_same(step(model, reg, run), exact, tolerance=5e-5)


def test_what_no_single_mask_or_label_fits_is_refused() -> None:
    model, _, _ = build("t5 decoder")
    both = [model.encoder.block[0], model.decoder.block[0]]  # type: ignore[union-attr, index]
    with pytest.raises(ValueError, match=r"each of which has a mask of its own.*tokens='all'"):
        DispersionRegularizer(model, both)
    DispersionRegularizer(model, both, tokens="all").remove()
    DispersionRegularizer(model, [model.decoder.block[0], model.lm_head]).remove()  # type: ignore[union-attr, index, list-item]
    with pytest.raises(ValueError, match="labels are of the decoder's"):
        DispersionRegularizer(model, stack="encoder", tokens="labels")
    DispersionRegularizer(model, stack="decoder", tokens="labels")
    config = transformers.UMT5Config(**T5)
    DispersionRegularizer(transformers.UMT5ForTokenClassification(config), tokens="labels")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_packed_is_padded(name: str) -> None:
    """The gradients of documents of 9, 5 and 12 tokens, packed in one row, are those of three padded rows."""
    model, stack, _ = build(name)
    lengths = (9, 5, 12)
    batch = tokens(batch=3, length=12)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    labels = batch.masked_fill(~mask, -100)
    labels[:, 0] = -100  # whose prediction would be the document before's
    packed = batch[mask][None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    reg = DispersionRegularizer(model, weight=WEIGHT)
    answers = []
    for arguments in (
        {"input_ids": batch, "attention_mask": mask.long(), "labels": labels},
        {"input_ids": packed, "position_ids": positions, "labels": labels[mask][None]},
    ):

        def run(m: nn.Module, arguments: dict[str, Tensor] = arguments) -> Tensor:
            loss: Tensor = m(**arguments, use_cache=False).loss
            return loss

        answers.append(step(model, reg, run))
    assert_same(answers[1], Step(answers[0].loss.double(), answers[0].grads))
    exact = by_hand(
        model, [run], blocks_of(stack), options=[{"cu_seqlens": torch.tensor([0, 9, 14, 26])}], flatten=True
    )
    assert_same(answers[1], exact)


def test_the_arguments_of_the_flattening_collator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds and largest length as transformers' own collator gives them to a model."""
    collate = transformers.DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)
    batch = collate([{"input_ids": [*range(1, 8)]}, {"input_ids": [*range(2, 14)]}])
    given = []

    def loss(z: Any, *arguments: Any, **options: Any) -> Any:
        given.append(arguments[2:4])
        return computed(z, *arguments, **options)

    computed = regularizer.loss_and_error
    monkeypatch.setattr(regularizer, "loss_and_error", loss)
    model, *_ = build("llama")
    reg = DispersionRegularizer(model, weight=WEIGHT)
    model(**batch)
    assert reg.loss().isfinite()
    assert len(given) == SMALL["num_hidden_layers"]
    for bounds, largest in given:
        assert bounds.tolist() == [0, 7, 19]
        assert largest == 12


def test_left_padding_and_generation() -> None:
    """``generate`` in training mode, as GRPO's, is without gradients, and unchanged."""
    model, stack, _ = build("llama")
    batch, mask = tokens(length=10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    before = model.generate(batch, **arguments)  # type: ignore[operator]
    reg = DispersionRegularizer(model, weight=WEIGHT)
    model.train()
    assert torch.equal(model.generate(batch, **arguments), before)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="did not run"):
        reg.loss()
    run = call(batch, attention_mask=mask)
    exact = by_hand(model, [run], blocks_of(stack), options=[{"mask": mask.bool()}])
    assert_same(step(model, reg, run), exact)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    model, stack, _ = build(name)
    batch = tokens(length=16)
    exact = by_hand(model, [call(batch)], blocks_of(stack))
    reg = DispersionRegularizer(model, weight=WEIGHT)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})  # type: ignore[operator]
    if use_reentrant:
        model.enable_input_require_grads()  # type: ignore[operator]
    for _ in range(2):
        assert_same(step(model, reg, call(batch)), exact, tolerance=5e-5)
