"""measure_condensation on small models: layers, texts, masks, intervals, the published figures, and wrong arguments."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exact_cosines import cosines
from published_values import hashed
from torch import Tensor, nn

from dispersion_kernels.condensation import Condensation, mean_pairwise_cosine, measure_condensation
from dispersion_kernels.condensation.intervals import kendall, mean_interval, spearman, trend_of
from dispersion_kernels.gpt2 import GPT2, GPT2Config, save_weights

stats = pytest.importorskip("scipy.stats")
pytest.importorskip("safetensors")

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "a pair takes two",
    "condensation of embeddings in small language models",
    "of a text that is longer than the context, only the beginning is read: " + "and so on " * 9,
    "tokens are bytes here",
]


def to_bytes(text: str) -> list[int]:
    return list(text.encode())


def small_gpt2() -> GPT2:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(layers=3, width=32, heads=2, context=64, vocab=256))
    nn.init.normal_(model.wpe.weight, std=0.5)
    return model


def measure(model: Any, texts: Any = TEXTS, tokenizer: Any = to_bytes, **options: Any) -> Condensation:
    return measure_condensation(model, texts, tokenizer, progress=False, **options)


def hidden_by_hand(model: GPT2, texts: list[str]) -> list[list[Tensor]]:
    """Hidden states of each text, ``[layers][texts]`` of ``[L, F]``: embedding, blocks, final norm."""
    by_text = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor(to_bytes(text)[:64])
            blocks = [z[0] for z in model(ids[None], return_hidden=True).hidden]
            by_text.append([model.wte(ids) + model.wpe.weight[: len(ids)], *blocks, model.ln_f(blocks[-1])])
    return [list(layer) for layer in zip(*by_text, strict=True)]


def text_means(hidden: list[Tensor], first: int = 0) -> list[float]:
    """Mean over the pairs of each text, without its first tokens."""
    matrices = [cosines(z[first:]) for z in hidden]
    return [m[np.triu_indices(len(m), 1)].mean() for m in matrices]


@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_layer_is_measured_by_its_own_hidden_states(batch_size: int) -> None:
    model = small_gpt2()
    found = measure(model, batch_size=batch_size, final_norm=True)
    assert [layer.name for layer in found.layers] == ["embedding", "block 1", "block 2", "block 3", "final norm"]
    assert (found.model, found.initialised, found.texts, found.skipped) == ("GPT2", False, 5, 0)
    assert found.tokens == sum(min(len(to_bytes(text)), 64) for text in TEXTS)
    assert found.options["max_length"] == 64
    assert found.options["stack"] == "h"
    for layer, hidden in zip(found.layers, hidden_by_hand(model, TEXTS), strict=True):
        assert layer.all_tokens.text_means == pytest.approx(text_means(hidden), abs=2e-6)
        assert layer.all_tokens.mean == pytest.approx(np.mean(text_means(hidden)), abs=2e-6)
        assert layer.content_tokens is not None
        assert layer.content_tokens.text_means == pytest.approx(text_means(hidden, 1), abs=2e-6)
        tokens = torch.cat([z[1:] for z in hidden]).double().numpy()
        assert layer.mean_norm == pytest.approx(np.linalg.norm(tokens, axis=1).mean(), rel=1e-5)
        eigenvalues = np.linalg.eigvalsh(np.cov(tokens.T, bias=True))
        assert layer.first_direction == pytest.approx(eigenvalues[-1] / eigenvalues.sum(), rel=1e-4)


def test_the_chosen_layers_and_no_others() -> None:
    whole = measure(small_gpt2())
    for layers, names in (("last", ["block 3"]), ([0, 2], ["embedding", "block 2"]), ("early_half", ["block 1"])):
        found = measure(small_gpt2(), layers=layers)
        assert [layer.name for layer in found.layers] == names
        for layer in found.layers:
            assert layer == next(other for other in whole.layers if other.name == layer.name)


def test_batches_of_ids_are_what_texts_are() -> None:
    expected = measure(small_gpt2(), batch_size=1)
    ids = [torch.tensor(to_bytes(text)[:64]) for text in TEXTS]
    assert measure(small_gpt2(), ids, None).layers == expected.layers
    assert measure(small_gpt2(), (ids[n][None] for n in range(5)), None).layers == expected.layers
    mappings = [{"input_ids": i[None], "attention_mask": torch.ones(1, len(i)), "labels": i[None]} for i in ids]
    assert measure(small_gpt2(), mappings, None).layers == expected.layers


def test_masked_and_special_tokens() -> None:
    """Left-padded rows: position 0 is the first attended token."""
    z = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    z[0, :3] = math.nan
    found = measure_condensation([z, z * 2], mask=mask)
    texts = [z[0, 3:], z[1]]
    assert [layer.name for layer in found.layers] == ["layer 1", "layer 2"]
    assert found.layers[0].all_tokens.text_means == pytest.approx(text_means(texts), abs=1e-6)
    assert found.layers[0].content_tokens is not None
    assert found.layers[0].content_tokens.text_means == pytest.approx(text_means(texts, 1), abs=1e-6)
    assert found.layers[0].all_tokens.mean == pytest.approx(mean_pairwise_cosine(z, mask=mask).item(), abs=1e-6)

    model = small_gpt2()
    (hidden,) = hidden_by_hand(model, [TEXTS[0]])[1]
    layer = measure(model, TEXTS[:1], special_ids=[ord("o"), ord(" ")]).layers[1]
    kept = [n for n, c in enumerate(TEXTS[0]) if n > 0 and c not in "o "]
    assert layer.content_tokens is not None
    assert layer.content_tokens.text_means == pytest.approx(text_means([hidden[kept]]), abs=1e-6)


def test_short_texts_are_skipped_and_counted() -> None:
    expected = measure(small_gpt2())
    found = measure(small_gpt2(), ["", *TEXTS[:2], "x", *TEXTS[2:]])
    assert (found.texts, found.skipped, found.tokens) == (5, 2, expected.tokens)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        assert layer.all_tokens.text_means == pytest.approx(other.all_tokens.text_means, abs=1e-6)
    assert "2 too short" in found.summary()


def test_two_tokens_have_a_pair_but_no_content() -> None:
    found = measure(small_gpt2(), ["ab", "cd"])
    assert found.layers[0].content_tokens is None
    assert found.layers[0].all_tokens.pairs == 2
    assert Condensation.from_json(found.to_json()).layers[0].content_tokens is None


def test_a_result_is_the_same_after_its_file_and_in_a_second_run() -> None:
    found = measure(small_gpt2())
    assert Condensation.from_json(found.to_json()) == found
    assert measure(small_gpt2()) == found


def test_the_model_is_left_as_it_was() -> None:
    model = small_gpt2().train()
    model.h[1].eval()
    before = [module.training for module in model.modules()]
    nn.init.constant_(model.h[1].mlp.c_proj.bias, math.nan)
    with pytest.raises(ValueError, match="block 2 holds NaN"):
        measure(model)
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()


def test_dropout_is_off() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config(layers=1, width=16, heads=2, context=32, vocab=256, dropout=0.5)).train()
    assert measure(model) == measure(model)


def test_a_random_initialisation_of_the_same_configuration() -> None:
    model = small_gpt2()
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    found = measure(model, initialised=True)
    assert torch.equal(torch.rand(1), expected_next)
    assert found.initialised
    assert found == measure(small_gpt2(), initialised=True)
    assert found.layers != measure(model).layers
    assert found.model == "GPT2"


def test_any_module_with_a_stack_of_blocks() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    batch = torch.randn(2, 7, 8)
    net = Net()
    found = measure(net, [batch], None)
    with torch.no_grad():
        states = [batch, net.blocks[0](batch), net(batch)]
    for layer, z in zip(found.layers, states, strict=True):
        assert layer.all_tokens.mean == pytest.approx(mean_pairwise_cosine(z).item(), abs=1e-6)


# ---- intervals


def test_intervals_are_those_of_scipy() -> None:
    values = np.random.default_rng(3).normal(0.4, 0.1, 40)
    low, high = mean_interval([*values, math.nan])
    error = values.std() / 40**0.5
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    assert mean_interval([0.5]) == (0.5, 0.5)
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)


def test_rank_correlations_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 6, (20, 9)).astype(float)  # with ties
    depths = np.arange(9)
    for row, rho, tau in zip(values, spearman(values, depths), kendall(values, depths), strict=True):
        assert rho == pytest.approx(stats.spearmanr(row, depths).statistic, abs=1e-12)
        assert tau == pytest.approx(stats.kendalltau(row, depths).statistic, abs=1e-12)
    assert math.isnan(spearman(np.ones(9), depths))
    assert math.isnan(kendall(np.ones(9), depths))


def test_trend_of_rising_and_single_layers() -> None:
    rising = np.arange(8.0)[:, None] + np.random.default_rng(0).normal(0, 0.1, (8, 20))
    trend = trend_of(rising, range(1, 9))
    assert (trend.spearman, trend.kendall) == (pytest.approx(1), pytest.approx(1))
    assert trend.spearman_interval == pytest.approx((1, 1))
    assert trend_of(-rising, range(1, 9)).kendall == pytest.approx(-1)
    noisy = trend_of(rising * 0.05 + np.random.default_rng(1).normal(0, 1, (8, 20)), range(1, 9))
    assert -1 <= noisy.spearman_interval[0] < noisy.spearman_interval[1] <= 1
    assert math.isnan(trend_of(rising[:1], [1]).spearman)


# ---- the published procedure


PUBLISHED = json.loads((Path(__file__).parents[1] / "published" / "condensation.json").read_text())


def published_states() -> list[Tensor]:
    """Hidden states ``[texts, S, F]`` of each layer, by the recipe of tests/published/README.md."""
    layers, texts, tokens, features = (PUBLISHED[key] for key in ("layers", "texts", "tokens", "features"))
    return [
        torch.stack(
            [
                hashed(100 * layer + text + 1, tokens * features).view(tokens, features)
                + (0.06 if layer == 4 else 0.12) * layer
                for text in range(texts)
            ]
        )
        for layer in range(layers)
    ]


def test_the_published_figures() -> None:
    found = measure_condensation(published_states(), published=True).published
    assert found is not None
    assert found.mean_by_layer == pytest.approx(PUBLISHED["mean_by_layer"], abs=1e-12)
    assert (
        np.abs(np.array(found.histogram_of_averaged_matrix) - PUBLISHED["histogram_of_averaged_matrix"]).max() < 1e-12
    )
    assert found.spearman == pytest.approx(PUBLISHED["spearman"], abs=1e-12)
    assert found.kendall == pytest.approx(PUBLISHED["kendall"], abs=1e-12)


def test_the_published_procedure_on_a_model() -> None:
    """Embedding, blocks but the last, and the last behind the final norm; tokens shorter than 1e-3 stay short."""
    model = small_gpt2().double()
    with torch.no_grad():
        model.wte.weight *= 1e-5
        model.wpe.weight *= 1e-3
    texts = [text[:16] for text in TEXTS]
    found = measure(model, texts, published=True)
    assert [layer.name for layer in found.layers] == ["embedding", "block 1", "block 2", "block 3"]
    assert found.published is not None
    states = hidden_by_hand(model, texts)
    del states[3]
    for hidden, mean, density in zip(
        states, found.published.mean_by_layer, found.published.histogram_of_averaged_matrix, strict=True
    ):
        averaged = np.zeros((16, 16))
        for z in hidden:
            x = z.double().numpy()
            x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-3)
            averaged += np.clip(x @ x.T, -1, 1) / len(texts)
        assert mean == pytest.approx(averaged.mean(), abs=1e-12)
        expected, _ = np.histogram(averaged, 128, (-1, 1), density=True)
        assert density == pytest.approx(expected, abs=1e-9)
    assert Condensation.from_json(found.to_json()) == found


def test_the_published_procedure_needs_texts_of_one_length() -> None:
    with pytest.raises(ValueError, match="texts of one length, got 43 and 16 tokens"):
        measure(small_gpt2(), published=True)
    with pytest.raises(ValueError, match="published=True takes all layers"):
        measure(small_gpt2(), published=True, layers="last")


# ---- what is refused


class Broken(nn.Module):
    def __init__(self, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(x)


def broken(output: Callable[[Tensor], Any]) -> GPT2:
    """A GPT-2 whose second block gives something else."""
    model = small_gpt2()
    model.h[1] = Broken(output)
    model.forward = lambda ids: [block(model.wte(ids)) for block in model.h[:2]]  # type: ignore[method-assign]
    return model


def nan_in_the_third_text(x: Tensor) -> Tensor:
    z = x.clone()
    if len(z) > 2:
        z[2, 1, 0] = math.inf
    return z


Z = torch.randn(2, 6, 4)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no texts": (lambda: measure(small_gpt2(), None), TypeError, "texts is missing"),
    "one string": (lambda: measure(small_gpt2(), "text"), TypeError, r"got one str; give \[it\]"),
    "one tensor": (lambda: measure(small_gpt2(), torch.ones(2, 3).long()), TypeError, "got one Tensor"),
    "a number": (lambda: measure(small_gpt2(), 3), TypeError, "texts must be a list of strings"),
    "numbers": (lambda: measure(small_gpt2(), [3]), TypeError, "item 0 of texts is int"),
    "strings, then ids": (lambda: measure(small_gpt2(), ["ab", torch.ones(3)]), TypeError, "mixes strings and batches"),
    "nothing": (lambda: measure(small_gpt2(), []), ValueError, "no text of at least two tokens"),
    "empty texts": (lambda: measure(small_gpt2(), ["", "a"]), ValueError, r"\(2 shorter ones were skipped"),
    "no tokenizer": (lambda: measure(small_gpt2(), TEXTS, None), ValueError, "tokenizer is missing"),
    "a wrong tokenizer": (lambda: measure(small_gpt2(), TEXTS, 3), TypeError, "tokenizer must be .* got int"),
    "a tokenizer of words": (lambda: measure(small_gpt2(), TEXTS, str.split), TypeError, "tokenizer gave"),
    "floating-point ids": (lambda: measure(small_gpt2(), [torch.ones(2, 3)], None), ValueError, r"shape \[2, 3\]"),
    "a mask of another shape": (
        lambda: measure(
            small_gpt2(), [{"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)}], None
        ),
        ValueError,
        r"attention_mask of item 0 of texts has shape \[2, 4\], expected \[2, 3\]",
    ),
    "a mapping without ids": (lambda: measure(small_gpt2(), [{"x": Z}], None), ValueError, "no tensor input_ids"),
    "an unknown layer": (lambda: measure(small_gpt2(), layers=[4]), ValueError, r"numbers from 1 to 3.*got \[4\]"),
    "a word for layers": (lambda: measure(small_gpt2(), layers="first"), ValueError, "layers must be 'all'"),
    "one layer": (lambda: measure(small_gpt2(), layers=2), TypeError, r"layers=\[2\]"),
    "no layers": (lambda: measure(small_gpt2(), layers=[]), ValueError, "layers is an empty list"),
    "an unknown stack": (lambda: measure(small_gpt2(), stack="decoder"), ValueError, "no stacks of blocks named"),
    "a number as stack": (lambda: measure(small_gpt2(), stack=1), TypeError, "stack must be the name"),
    "a model without blocks": (lambda: measure(nn.Linear(2, 2)), ValueError, "Linear has no stack of blocks"),
    "max_length of 1": (
        lambda: measure(small_gpt2(), max_length=1),
        ValueError,
        "max_length must be at least 2, got 1",
    ),
    "half a max_length": (lambda: measure(small_gpt2(), max_length=8.5), TypeError, "max_length must be an integer"),
    "batches of none": (lambda: measure(small_gpt2(), batch_size=0), ValueError, "batch_size must be at least 1"),
    "a published word": (lambda: measure(small_gpt2(), published="yes"), TypeError, "published must be True or False"),
    "special words": (lambda: measure(small_gpt2(), special_ids="eos"), TypeError, "special_ids must be a list"),
    "a mask with texts": (lambda: measure(small_gpt2(), mask=Z[..., 0] > 0), TypeError, "mask is for hidden states"),
    "no model": (lambda: measure(None, None, None), TypeError, "model must be"),
    "texts for states": (lambda: measure([Z], TEXTS), TypeError, "hidden states are measured without texts"),
    "states of two shapes": (lambda: measure([Z, Z[:1]], None, None), ValueError, r"\[1, 6, 4\] as layer 2"),
    "integer states": (lambda: measure([Z.long()], None, None), ValueError, "floating point"),
    "a mask of floats": (lambda: measure([Z], None, None, mask=Z[..., 0]), ValueError, "mask must be boolean"),
    "a mask for one": (lambda: measure([Z], None, None, mask=torch.ones(6) > 0), ValueError, r"boolean \[2, 6\]"),
    "states of one token": (lambda: measure([Z[:, :1]], None, None), ValueError, "no text of at least two tokens"),
    "states with a NaN": (
        lambda: measure([Z, Z / 0], None, None),
        ValueError,
        "layer 2 holds NaN or infinity in text 0",
    ),
    "a norm of no known model": (
        lambda: measure(nn.ModuleDict({"h": nn.ModuleList([nn.Linear(2, 2)])}), final_norm=True),
        ValueError,
        "final_norm=True needs",
    ),
    "an unknown initialisation": (
        lambda: measure(nn.Sequential(nn.Linear(2, 2)), initialised=True),
        TypeError,
        "initialised=True needs a model of Hugging Face",
    ),
    "a block without states": (lambda: measure(broken(lambda x: None)), TypeError, "block 2 returned NoneType"),
    "a block of other tokens": (
        lambda: measure(broken(lambda x: x[:, 1:])),
        ValueError,
        "block 2 returned .* for a batch",
    ),
    "a silent block": (lambda: measure(broken(lambda x: x)), ValueError, "block 3 did not run"),
    "infinity": (
        lambda: measure(
            broken(nan_in_the_third_text), [torch.ones(1, 5).long(), torch.ones(3, 5).long()], None, layers=[1, 2]
        ),
        ValueError,
        "block 2 holds NaN or infinity in text 3, counted from 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named(case: str) -> None:
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_blocks_that_share_weights_are_refused() -> None:
    model = small_gpt2()
    model.forward = lambda ids: model.h[0](model.h[0](model.wte(ids)))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="block 1 ran more than once in a forward"):
        measure(model, layers=[1])


@pytest.mark.parametrize("module", ["scipy.stats", "tqdm"])
def test_a_missing_library_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {module.split('.')[0]}"):
        measure_condensation(small_gpt2(), TEXTS, to_bytes)


# ---- models from files


def test_weights_of_the_trainer(tmp_path: Path) -> None:
    model = small_gpt2()
    file = save_weights(model, tmp_path / "run")
    expected = measure(model)
    for path in (file, file.parent, str(file.parent)):
        found = measure(path)
        assert found.model == str(path)
        assert found.layers == expected.layers
    assert measure(file, initialised=True).layers == measure(model, initialised=True).layers


def test_a_run_of_the_trainer_needs_no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<|endoftext|>": 0, "a": 1, "pair": 2, "takes": 3, "two": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = small_gpt2()
    save_weights(model, tmp_path)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = measure_condensation(tmp_path, ["a pair takes two"], progress=False)
    assert found.layers == measure(model, [torch.tensor([1, 2, 3, 4])], None, special_ids=[0]).layers
    assert found.options["special_ids"] == [0]
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer is missing"):
        measure_condensation(tmp_path, ["a pair takes two"], progress=False)


def test_files_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*weights\.safetensors"):
        measure(tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match="is an empty folder"):
        measure(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"")
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="several GGUF files"):
        measure(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("nothing")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json, GGUF file or checkpoint\.pt"):
        measure(tmp_path / "other")
