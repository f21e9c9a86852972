"""The folder of a finished run as others read it: transformers, and lm-eval over it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from gpt2_runs import command_line

from dispersion_kernels.gpt2 import load_weights, train
from dispersion_kernels.gpt2.data import load_data

for library in ("tokenizers", "tqdm", "matplotlib", "safetensors"):
    pytest.importorskip(library)
TEXT = "3 is followed by 4, and 4 by 5."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose MLP is not four times as wide as the model."""
    folder = tmp_path_factory.mktemp("folder")
    options = ["--tokenizer", "bpe", "--vocab-size", "300", "--mlp-width", "24", "--context", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "keep_freed_memory", lambda: None)
        patch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))
        assert train.main(command_line(folder, folder / "out", *options)) == 0
    return folder


def test_transformers_loads_model_and_tokeniser(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    ids = tokenizer(TEXT)["input_ids"]
    trained = load_data([str(folder / "texts")], tokenizer="bpe", vocab_size=300, cache=folder / "cache").train.tolist()
    assert str(ids)[1:-1] in str(trained), "other tokens than those of the training"
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_token_id in trained
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
    assert model.config.n_inner == 24
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens).logits, load_weights(folder / "out")(tokens).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.integrations
def test_lm_eval_scores_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log-likelihood of a continuation is that of the model; no task is downloaded."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'lm-eval[hf]'")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    evaluated = HFLM(pretrained=str(folder / "out"), device="cpu", batch_size=1)
    context, continuation = TEXT[:16], TEXT[16:]
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((likelihood, _),) = evaluated.loglikelihood([request], disable_tqdm=True)
    whole = evaluated.tokenizer(TEXT)["input_ids"]
    start = len(evaluated.tokenizer(context)["input_ids"])
    with torch.no_grad():
        predicted = load_weights(folder / "out")(torch.tensor([whole])).logits.log_softmax(-1)[0]
    expected = sum(predicted[place - 1, whole[place]].item() for place in range(start, len(whole)))
    assert likelihood == pytest.approx(expected, rel=1e-4)
