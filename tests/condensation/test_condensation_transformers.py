"""measure_condensation on tiny models of transformers: which layer is which, padding, stacks, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dispersion_kernels.condensation import Condensation, load_model, mean_pairwise_cosine, measure_condensation

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.integrations

SMALL = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0},
}
GPT = {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
T5 = {"vocab_size": 64, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 3, "num_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SMALL),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", SMALL),
    "bert": ("BertForMaskedLM", SMALL),
    "roberta": ("RobertaModel", {**SMALL, "max_position_embeddings": 66, "pad_token_id": 1}),
    "distilbert": ("DistilBertModel", {"vocab_size": 64, "dim": 16, "hidden_dim": 32, "n_layers": 3, "n_heads": 2}),
}
TEXTS = ["a quick brown fox", "two", "", "of embeddings in language models"]


def tokenizer(text: str) -> list[int]:
    return [2 + ord(c) % 60 for c in text]


def made(name: str, options: dict[str, Any]) -> nn.Module:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model: nn.Module = cls(cls.config_class(**options))
    return model


def hidden_states(model: nn.Module, key: str = "hidden_states", **inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return list(model.eval()(**inputs, output_hidden_states=True)[key])


def means(found: Condensation) -> list[list[float]]:
    return [list(layer.all_tokens.text_means) for layer in found.layers]


def expected(states: list[list[Tensor]]) -> list[Any]:
    """Means of each layer's texts, of ``states`` ``[texts][layers]``."""
    return [pytest.approx([mean_pairwise_cosine(z[0]).item() for z in layer], abs=1e-5) for layer in zip(*states)]  # noqa: B905


@pytest.mark.parametrize("kind", MODELS)
def test_layers_are_those_of_hidden_states_but_for_the_final_norm(kind: str) -> None:
    model = made(*MODELS[kind])
    found = measure_condensation(model, TEXTS, tokenizer, final_norm=True, progress=False)
    assert (found.texts, found.skipped) == (3, 1)
    assert [layer.name for layer in found.layers] == ["embedding", "block 1", "block 2", "block 3", "final norm"]
    ids = [torch.tensor([tokenizer(text)]) for text in TEXTS if text]
    states = [hidden_states(model, input_ids=i) for i in ids]
    measured = means(found)
    for layer, expected_layer in zip([*measured[:3], measured[4]], expected(states), strict=True):
        assert layer == expected_layer


def test_the_last_block_is_before_the_norm() -> None:
    model = made(*MODELS["llama"])
    nn.init.normal_(model.model.norm.weight)
    found = measure_condensation(model, TEXTS, tokenizer, final_norm=True, progress=False)
    assert found.layers[3].all_tokens.mean != pytest.approx(found.layers[4].all_tokens.mean, abs=1e-3)


@pytest.mark.parametrize(
    ("stack", "name", "key"),
    [
        (None, "encoder.block", "encoder_hidden_states"),
        ("decoder", "decoder.block", "decoder_hidden_states"),
    ],
)
def test_an_encoder_decoder_says_which_stack_was_measured(stack: str | None, name: str, key: str) -> None:
    for cls in ("T5ForConditionalGeneration", "T5Model"):
        model = made(cls, T5)
        found = measure_condensation(model, TEXTS, tokenizer, stack=stack, progress=False)
        assert found.options["stack"] == name
        ids = [torch.tensor([tokenizer(text)]) for text in TEXTS if text]
        states = [hidden_states(model, key, input_ids=i, decoder_input_ids=i)[:-1] for i in ids]
        for layer, expected_layer in zip(means(found), expected(states), strict=False):
            assert layer == expected_layer


def test_blocks_that_share_weights_are_refused() -> None:
    model = made("AlbertModel", {**SMALL, "embedding_size": 16})
    with pytest.raises(ValueError, match="ran more than once in a forward"):
        measure_condensation(model, TEXTS, tokenizer, progress=False)


def test_the_published_procedure_takes_hidden_states_as_they_are() -> None:
    model = made(*MODELS["llama"])
    texts = ["a quick brown", "fox of a text"]
    found = measure_condensation(model, texts, tokenizer, published=True, progress=False).published
    assert found is not None
    states = [hidden_states(model, input_ids=torch.tensor([tokenizer(text)])) for text in texts]
    for mean, layer in zip(found.mean_by_layer, zip(*states, strict=True), strict=True):
        x = torch.cat(layer).double()
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-3)
        assert mean == pytest.approx((x @ x.mT).clamp(-1, 1).mean().item(), abs=1e-9)


def test_a_folder_with_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: n for n, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "a", "quick", "brown", "fox"])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    model = made(*MODELS["bert"])
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    found = measure_condensation(tmp_path, ["a quick brown fox"], progress=False)
    assert (found.model, found.tokens, found.options["special_ids"]) == (str(tmp_path), 6, [0, 1, 2])
    (state,) = [hidden_states(model, input_ids=torch.tensor([[1, 3, 4, 5, 6, 2]]))]
    assert found.layers[1].all_tokens.mean == pytest.approx(mean_pairwise_cosine(state[1]).item(), abs=1e-5)
    content = found.layers[1].content_tokens
    assert content is not None
    assert content.mean == pytest.approx(mean_pairwise_cosine(state[1][:, 1:5]).item(), abs=1e-5)
    without = measure_condensation(tmp_path, ["a quick brown fox"], add_special_tokens=False, progress=False)
    assert without.tokens == 4
    random = measure_condensation(tmp_path, ["a quick brown fox"], initialised=True, progress=False)
    assert random.initialised
    assert random.layers != found.layers


def test_what_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded by transformers"):
        load_model(tmp_path)
