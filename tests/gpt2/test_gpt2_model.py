"""GPT-2: published shapes, causality, hidden states, and weights in Hugging Face's naming."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from dispersion_kernels.gpt2 import GPT2, PRESETS, GPT2Config, load_weights, save_weights

safetensors = pytest.importorskip("safetensors.torch")

TINY = GPT2Config(layers=2, width=16, heads=4, mlp_width=24, context=8, vocab=19)


def tiny(**options) -> GPT2:
    torch.manual_seed(0)
    return GPT2(TINY, **options)


def perturbed(model: GPT2) -> GPT2:
    """Biases and LayerNorms away from their 0 and 1, or mistakes in them would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tokens(length: int = 8) -> torch.Tensor:
    return torch.randint(TINY.vocab, (3, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_sizes(preset, parameters):
    with torch.device("meta"):
        model = GPT2(PRESETS[preset])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.process
def test_importing_needs_none_of_the_optional_libraries():
    absent = ("tqdm", "matplotlib", "tokenizers", "safetensors", "datasets")
    imports = "import dispersion_kernels.gpt2.train, dispersion_kernels.condensation"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); {imports}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_initialisation():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(layers=8, width=64, heads=4, context=64, vocab=500))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for branch in (model.h[0].attn, model.h[7].mlp):
        assert branch.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
        assert not branch.c_proj.bias.any()
    wider = GPT2(model.config, init_std=0.1)
    assert wider.wpe.weight.std().item() == pytest.approx(0.1, rel=0.05)
    assert wider.h[3].attn.c_proj.weight.std().item() == pytest.approx(0.1 / 4, rel=0.05)


def test_rmsnorm_neither_centres_nor_shifts():
    torch.manual_seed(0)
    model = GPT2(dataclasses.replace(TINY, norm="rmsnorm"))
    assert not any(".ln_" in name and name.endswith("bias") for name in model.state_dict())
    x = torch.randn(5, 16, dtype=torch.float64) + 2
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(model.h[0].ln_1.double()(x), expected)
    torch.testing.assert_close(model.ln_f.double()(x), expected)


def test_no_token_sees_a_later_one():
    model = perturbed(tiny()).eval()
    first = tokens()
    second = first.clone()
    second[:, 5:] = (second[:, 5:] + 1) % TINY.vocab
    one, two = model(first, return_hidden=True), model(second, return_hidden=True)
    torch.testing.assert_close(one.logits[:, :5], two.logits[:, :5])
    assert not torch.allclose(one.logits[:, 5:], two.logits[:, 5:])
    assert not torch.allclose(one.hidden[0][:, 5:], two.hidden[0][:, 5:])


def test_hidden_states_are_the_residual_stream_after_every_block():
    model = perturbed(tiny()).eval()
    output = model(tokens(), return_hidden=True)
    x = model.wte(tokens()) + model.wpe.weight
    assert len(output.hidden) == TINY.layers
    for block, hidden in zip(model.h, output.hidden, strict=True):
        x = block(x)
        torch.testing.assert_close(hidden, x)
    torch.testing.assert_close(output.logits, model.ln_f(x) @ model.wte.weight.T)
    assert model(tokens()).hidden == []


def test_loss_is_the_mean_cross_entropy():
    model = perturbed(tiny()).eval()
    output = model(tokens(), tokens())
    picked = output.logits.log_softmax(-1).gather(-1, tokens()[..., None])
    assert output.loss.item() == pytest.approx(-picked.mean().item(), rel=1e-5)


def test_checkpointed_activations_give_the_same_gradients():
    gradients = []
    for checkpoint_activations in (False, True):
        model = tiny(checkpoint_activations=checkpoint_activations)
        output = model(tokens(), tokens(), return_hidden=True)
        (output.loss + sum(hidden.square().mean() for hidden in output.hidden)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_too_many_tokens():
    with pytest.raises(ValueError, match="hold 9 positions, the model's context is 8"):
        tiny()(tokens(9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"context": 2.5}, "context must be a positive integer, got 2.5"),
        ({"heads": 3}, "multiple of heads, got width=16 and heads=3"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"norm": "batchnorm"}, r"norm must be one of \['layernorm', 'rmsnorm'\], got 'batchnorm'"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_weights_survive_a_round_trip(tmp_path, norm):
    config = dataclasses.replace(TINY, norm=norm)
    model = perturbed(GPT2(config))
    file = save_weights(model, tmp_path / "out")
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.json", "model.safetensors"]
    stored = safetensors.load_file(file)
    assert list(stored["transformer.h.0.mlp.c_fc.weight"].shape) == ([16, 24] if norm == "layernorm" else [24, 16])
    for path in (file, file.parent):
        loaded = load_weights(path)
        assert loaded.config == config
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name


def rewrite(model: GPT2, folder, change) -> None:
    """The weights in another dress: `change` edits the stored tensors."""
    file = save_weights(model, folder)
    stored = dict(safetensors.load_file(file))
    change(stored)
    safetensors.save_file(stored, file)


def test_older_names_buffers_and_a_tied_head_are_understood(tmp_path):
    model = perturbed(tiny())

    def as_published(stored):
        for name in list(stored):
            stored[name.removeprefix("transformer.")] = stored.pop(name)
        for layer in range(TINY.layers):
            stored[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
            stored[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        stored["lm_head.weight"] = stored["wte.weight"].clone()

    rewrite(model, tmp_path, as_published)
    loaded = load_weights(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens()).logits, model.eval()(tokens()).logits, rtol=0, atol=0)


def swap(name, tensor):
    return lambda stored: stored.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop("transformer.h.1.ln_2.bias"), r"h\.1\.ln_2\.bias is missing"),
        (lambda stored: stored.pop("transformer.wte.weight"), r"wte\.weight is missing"),
        (swap("transformer.h.0.mlp.c_proj.weight", torch.zeros(16, 24)), r"shape \[16, 24\], expected \[24, 16\]"),
        (swap("transformer.ln_f.bias", torch.zeros(3)), r"ln_f\.bias has shape \[3\], expected \[16\]"),
        (swap("transformer.wte.weight", torch.zeros(19)), r"wte\.weight has shape \[19\], expected a matrix"),
        (swap("transformer.h.0.extra", torch.zeros(3)), r"h\.0\.extra is not one of GPT-2's"),
        (swap("lm_head.weight", torch.zeros(19, 16)), "tied head"),
    ],
)
def test_weights_that_do_not_fit_name_file_and_tensor(tmp_path, change, message):
    rewrite(tiny(), tmp_path, change)
    with pytest.raises(ValueError, match=message) as raised:
        load_weights(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(raised.value)


def test_weights_that_are_not_there_or_not_readable(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no GPT-2 weights at .*model\.safetensors"):
        load_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_weights(tmp_path)


def test_the_number_of_heads_must_come_from_somewhere(tmp_path):
    model = perturbed(tiny())
    file = save_weights(model, tmp_path)
    config = tmp_path / "config.json"
    stored = json.loads(config.read_text())
    config.unlink()
    with pytest.raises(ValueError, match="how many heads"):
        load_weights(file)
    assert load_weights(file, heads=4).config == TINY
    for change, message in (
        ({"activation_function": "relu"}, "activation_function is 'relu', only 'gelu_new'"),
        ({"n_head": None}, "not the config.json of a GPT-2"),
    ):
        config.write_text(json.dumps(stored | change))
        with pytest.raises(ValueError, match=message):
            load_weights(file)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"not the config.json of a GPT-2"):
        load_weights(file)


def test_transformers_computes_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = {"n_layer": 2, "n_embd": 16, "n_head": 4, "n_inner": 24, "n_positions": 8, "vocab_size": 19}
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    perturbed(theirs).save_pretrained(tmp_path / "theirs")
    ours = load_weights(tmp_path / "theirs").eval()
    with torch.no_grad():
        expected = theirs(tokens(), output_hidden_states=True)
        got = ours(tokens(), return_hidden=True)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
        # Theirs hold the embedding first and the final LayerNorm in the last.
        torch.testing.assert_close(got.hidden[0], expected.hidden_states[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.ln_f(got.hidden[1]), expected.hidden_states[2], rtol=1e-5, atol=1e-5)
        save_weights(ours, tmp_path / "ours")
        again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours").eval()
        torch.testing.assert_close(again(tokens()).logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_transformers_refuses_rmsnorm_which_it_would_compute_as_layernorm(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_weights(GPT2(dataclasses.replace(TINY, norm="rmsnorm")), tmp_path)
    with pytest.raises(ValueError, match="gpt2-rmsnorm"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes|size mismatch"):
        transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
