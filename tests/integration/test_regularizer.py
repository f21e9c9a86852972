"""DispersionRegularizer on plain PyTorch models: numbers, life cycle, choice of blocks and tokens, refusals."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from regularized import (
    WEIGHT,
    Block,
    Model,
    Step,
    assert_backward_has_the_temperature_of_forward,
    assert_same,
    by_hand,
    gradients,
    tokens,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from dispersion_kernels import AngularSpread, DispersionRegularizer, SampledPairs, SampledTokens, fused_dispersion_loss
from dispersion_kernels.gpt2.model import GPT2, GPT2Config


def blocks(model: nn.Module) -> Sequence[nn.Module]:
    return list(model.blocks)  # type: ignore[arg-type]


def step(model: nn.Module, reg: DispersionRegularizer, *batches: Tensor, **arguments: Any) -> Step:
    model.zero_grad()
    own = torch.stack([model(batch, **arguments) for batch in batches]).sum()
    total = own + reg.loss()
    total.backward()
    return Step(total.detach(), gradients(model))


@pytest.mark.parametrize("keep_gradients", [False, True])
@pytest.mark.parametrize(
    ("layers", "numbers"),
    [("all", (1, 2, 3, 4)), ("last", (4,)), ("early_half", (1, 2)), ("late_half", (3, 4)), ([3, 1], (1, 3))],
)
def test_loss_and_gradients_are_the_sum_by_hand(layers: Any, numbers: tuple[int, ...], keep_gradients: bool) -> None:
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model, layers, WEIGHT, keep_gradients=keep_gradients)
    exact = by_hand(model, [lambda m: m(batch)], lambda m: [blocks(m)[k - 1] for k in numbers])
    assert_same(step(model, reg, batch), exact)
    assert reg.layers == [f"blocks.{k - 1}" for k in numbers]
    assert list(reg.values) == reg.layers
    without = by_hand(model, [lambda m: m(batch)], blocks, weight=0.0)
    assert (exact.grads["embedding.weight"] - without.grads["embedding.weight"]).abs().max() > 1e-3
    assert_same(step(model, reg, batch), exact)  # nothing is left over


def test_explicit_modules_and_options() -> None:
    model, batch = Model(), tokens()
    chosen = [model.blocks[1], model.norm]
    reg = DispersionRegularizer(model, chosen, WEIGHT, potential="uniformity", impl="torch")
    exact = by_hand(
        model, [lambda m: m(batch)], lambda m: [blocks(m)[1], m.norm], options=[{"potential": "uniformity"}]
    )
    assert_same(step(model, reg, batch), exact)
    other = DispersionRegularizer(model, "last", 0.1, potential=AngularSpread(tau=0.5))
    model(batch)
    reg.loss()
    z = []
    handle = model.blocks[3].register_forward_hook(lambda m, a, output: z.append(output))
    model(batch)
    handle.remove()
    torch.testing.assert_close(other.loss(), 0.1 * fused_dispersion_loss(z[0], tau=0.5))
    reg.loss()


def test_weight_may_change_and_the_value_is_of_the_loss_alone() -> None:
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model, weight=1.0)
    model(batch)
    one = reg.loss()
    reg.weight = 0.25
    model(batch)
    torch.testing.assert_close(reg.loss(), one / 4)
    torch.testing.assert_close(torch.stack(list(reg.values.values())).mean(), one)
    assert not any(value.requires_grad for value in reg.values.values())


def test_two_forwards_and_one_loss_are_the_mean_of_both() -> None:
    model, batches = Model(), (tokens(seed=1), tokens(seed=2))
    reg = DispersionRegularizer(model, weight=WEIGHT)
    exact = [by_hand(model, [lambda m, b=b: m(b)], blocks, weight=WEIGHT / 2) for b in batches]  # type: ignore[misc]
    both = Step(exact[0].loss + exact[1].loss, {name: g + exact[1].grads[name] for name, g in exact[0].grads.items()})
    assert_same(step(model, reg, *batches), both)


def test_an_upstream_factor_arrives_once() -> None:
    """A GradScaler's, and the division of accumulation: four microbatches of a quarter are the mean."""
    model, batches = Model(), [tokens(seed=k) for k in range(4)]
    reg = DispersionRegularizer(model, weight=WEIGHT)
    exact = by_hand(
        model,
        [lambda m, b=b: m(b) for b in batches],  # type: ignore[misc]
        blocks,
        options=[{}] * 4,
        scales=[0.25] * 4,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    total = torch.zeros(())
    for batch in batches:
        loss = (model(batch) + reg.loss()) / 4
        total += loss.detach()
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert_same(Step(total, gradients(model)), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_like_the_model(dtype: torch.dtype) -> None:
    """Under autocast the residual stream is fp32; in a 16-bit model the gradient of z is 16 bits."""
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model, weight=3.0)
    exact = by_hand(model, [lambda m: m(batch)], blocks, weight=3.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = model(batch) + reg.loss()
    loss.backward()
    assert_same(Step(loss.detach(), gradients(model)), exact, tolerance=2e-2)
    if dtype == torch.bfloat16:
        model = model.to(dtype)
        assert_same(step(model, reg, batch), exact, tolerance=5e-2)


@pytest.mark.parametrize("options", [{"sampling": SampledTokens(8)}, {"sampling": SampledPairs(1 / 4, "none")}])
@pytest.mark.parametrize("keep_gradients", [False, True])
def test_backward_draws_what_forward_drew(options: dict[str, Any], keep_gradients: bool) -> None:
    model, batch = Model(layers=1), tokens(length=64)
    reg = DispersionRegularizer(model, weight=1.0, keep_gradients=keep_gradients, **options)
    z = []
    handle = model.blocks[0].register_forward_pre_hook(lambda m, args: z.append(args[0]))
    torch.manual_seed(5)
    model(batch)
    term = reg.loss()
    (grad,) = torch.autograd.grad(term, z[0])
    handle.remove()
    seed = torch.manual_seed(5) and int(torch.randint(2**62, ()))
    again = z[0].detach().requires_grad_()
    drawn = fused_dispersion_loss(
        Block.forward(model.blocks[0], again), generator=torch.Generator().manual_seed(seed), **options
    )  # type: ignore[arg-type]
    torch.testing.assert_close(term, drawn)
    torch.testing.assert_close(grad, torch.autograd.grad(drawn, again)[0])


def test_only_in_training_with_gradients() -> None:
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model)
    plain = copy.deepcopy(model)
    model.eval()
    assert torch.equal(model(batch), plain(batch))
    model(batch).backward()  # a gradient in evaluation is the model's own, without a warning
    plain(batch).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    model.train()
    with torch.no_grad():
        assert torch.equal(model(batch), plain(batch))
    with torch.inference_mode():
        model(batch)
    with pytest.raises(RuntimeError, match=r"4 of 4 layers did not run .* blocks.0, blocks.1, blocks.2, blocks.3"):
        reg.loss()
    model(batch)
    assert reg.loss() != 0
    with pytest.raises(RuntimeError, match="did not run"):
        reg.loss()


def test_frozen_layers_count_in_the_mean() -> None:
    model, batch = Model(), tokens()
    for part in (model.embedding, model.blocks[0], model.blocks[1]):
        part.requires_grad_(False)
    reg = DispersionRegularizer(model, weight=WEIGHT)
    exact = by_hand(model, [lambda m: m(batch)], blocks)
    assert_same(step(model, reg, batch), exact)
    assert len(reg.values) == 4


def test_a_forgotten_loss_warns_and_nothing_grows() -> None:
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model)

    def objects() -> int:
        gc.collect()
        return sum(type(found) is Tensor or "_Term" in type(found).__name__ for found in gc.get_objects())

    with pytest.warns(RuntimeWarning, match=r"whose loss\(\) nobody added"):
        model(batch).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(batch).backward()
        before = objects()
        for _ in range(50):
            model(batch).backward()
        assert objects() <= before
    with pytest.raises(RuntimeError, match="backward ran between"):
        reg.loss()
    model(batch)
    loss = reg.loss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.zero_grad()
        loss.backward()


def test_backward_in_two_parts_needs_no_warning() -> None:
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model, weight=WEIGHT)
    exact = by_hand(model, [lambda m: m(batch)], blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own, term = model(batch), reg.loss()
        own.backward(retain_graph=True)
        term.backward()
    assert_same(Step((own + term).detach(), gradients(model)), exact)


@pytest.mark.parametrize("keep_gradients", [False, True])
def test_backward_again(keep_gradients: bool) -> None:
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model, weight=WEIGHT, keep_gradients=keep_gradients)
    total = model(batch) + reg.loss()
    total.backward(retain_graph=True)
    once = gradients(model)
    total.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * once[name])
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()
    model(batch)
    reg.loss().backward()
    model(batch)
    (grad,) = torch.autograd.grad(reg.loss(), model.embedding.weight, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_a_forward_that_raises_leaves_no_term() -> None:
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model, weight=WEIGHT)
    exact = by_hand(model, [lambda m: m(batch)], blocks)
    with pytest.raises(IndexError):
        model(torch.full_like(batch, 99))
    # After two terms, and after all of them.
    for module in (model.blocks[2], model.head):
        handle = module.register_forward_pre_hook(lambda m, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(batch)
        with pytest.raises(RuntimeError, match="4 of 4 layers did not run"):
            reg.loss()
        handle.remove()
    assert_same(step(model, reg, batch), exact)
    model(batch)  # whose terms a later failure leaves alone
    handle = model.head.register_forward_pre_hook(lambda m, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch)
    handle.remove()
    assert torch.equal(reg.loss(), reg.weight * torch.stack(list(reg.values.values())).mean())


class InPlace(Block):
    """Writes to its input, which is the output of the block before."""

    def forward(self, x: Tensor) -> Tensor:
        x += 0.1 * torch.tanh(self.linear(self.norm(x.clone())))
        return x


class InPlaceInside(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(torch.tanh(self.norm(x)))
        h += x
        return h


def test_in_place_residual_blocks() -> None:
    batch = tokens()
    for block, keep_gradients in ((InPlaceInside, False), (InPlaceInside, True), (InPlace, True)):
        model = Model(block=block)
        reg = DispersionRegularizer(model, weight=WEIGHT, keep_gradients=keep_gradients)

        def outputs(m: nn.Module) -> Sequence[nn.Module]:
            return blocks(m)

        if block is InPlace:  # by hand what a block writes must not change what was recorded
            exact = by_hand(copy.deepcopy(model), [lambda m: m(batch)], lambda m: [Cloned.after(b) for b in blocks(m)])
        else:
            exact = by_hand(model, [lambda m: m(batch)], outputs)
        assert_same(step(model, reg, batch), exact)
    model = Model(block=InPlace)
    reg = DispersionRegularizer(model, weight=WEIGHT)
    loss = model(batch) + reg.loss()
    with pytest.raises(RuntimeError, match="keep_gradients=True"):
        loss.backward()


class Cloned:
    """A block whose hook gets a copy of its output."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    @classmethod
    def after(cls, block: nn.Module) -> Any:
        return cls(block)

    def register_forward_hook(self, hook: Callable[..., None]) -> Any:
        return self.block.register_forward_hook(lambda m, args, output: hook(m, args, output.clone()))


class Returns(Block):
    """A block that returns its hidden states in a container."""

    container: Callable[[Tensor], Any] = staticmethod(lambda z: (z, None))

    def forward(self, x: Any) -> Any:
        return self.container(super().forward(x if isinstance(x, Tensor) else next(iter(_values(x)))))


def _values(output: Any) -> Any:
    return output.values() if isinstance(output, dict) else output


@pytest.mark.parametrize(
    "container",
    [
        lambda z: (z, None),
        lambda z: [z],
        lambda z: {"hidden_states": z, "cache": None},
        lambda z: {0: z, 1: None},
        lambda z: torch.return_types.max((z, z)),
    ],
    ids=["tuple", "list", "dict", "numbered", "structseq"],
)
def test_blocks_may_return_more(container: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Returns, "container", staticmethod(container))
    model, batch = Model(block=Returns), tokens()
    final = model.norm.forward
    monkeypatch.setattr(model.norm, "forward", lambda x: final(next(iter(_values(x)))))
    reg = DispersionRegularizer(model, weight=WEIGHT)
    loss = model(batch) + reg.loss()
    loss.backward()
    plain = Model()
    plain.load_state_dict(model.state_dict())
    assert_same(Step(loss.detach(), gradients(model)), by_hand(plain, [lambda m: m(batch)], blocks))


def test_removing_the_hooks_restores_the_model() -> None:
    model, batch = Model(), tokens()
    before = copy.deepcopy(model)
    reg = DispersionRegularizer(model)
    model(batch)
    reg.remove()
    for a, b in zip(model.modules(), before.modules(), strict=True):
        assert {k: v for k, v in vars(a).items() if "hooks" in k} == {k: v for k, v in vars(b).items() if "hooks" in k}
        assert vars(a).keys() == vars(b).keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = [m(batch) for m in (model, before)]
        for loss in losses:
            loss.backward()
    assert torch.equal(*losses)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"after remove\(\)"):
        reg.loss()


def test_a_copy_has_no_regulariser() -> None:
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model)
    model(batch)  # with terms that wait
    file = io.BytesIO()
    torch.save(model, file)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(io.BytesIO(file.getvalue()), weights_only=False),
    ]
    reg.remove()
    for other in (*copies, copy.deepcopy(model)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = other(batch)
            loss.backward()
        assert torch.equal(loss, model(batch))
    mended = DispersionRegularizer(copies[0], weight=WEIGHT)
    assert_same(step(copies[0], mended, batch), by_hand(model, [lambda m: m(batch)], blocks))


def test_the_state_dict_is_the_model_s() -> None:
    model = Model()
    keys = list(model.state_dict())
    DispersionRegularizer(model)
    assert list(model.state_dict()) == keys


class Padded(Model):
    """The padding is in the stack's own arguments, as in Hugging Face's models."""

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, **others: Any) -> Tensor:
        return super().forward(tokens)


class Bypassed(nn.Module):
    """Calls the ``forward`` of the module that owns the blocks, past its hooks, with all arguments in one mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Padded()

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.inner.forward(**features)


def test_the_owner_s_hooks_may_be_passed_by() -> None:
    model, batch = Bypassed(), tokens()
    mask = torch.arange(24) < torch.tensor([[24], [15]])
    reg = DispersionRegularizer(model, weight=WEIGHT)
    call = {"tokens": batch, "attention_mask": mask}
    exact = by_hand(model, [lambda m: m(call)], lambda m: blocks(m.inner), options=[{"mask": mask}])  # type: ignore[arg-type]
    for _ in range(2):
        model.zero_grad()
        total = model(call) + reg.loss()
        total.backward()
        assert_same(Step(total.detach(), gradients(model)), exact)
    model.zero_grad()
    total = model.inner(batch, mask) + reg.loss()  # and the model may
    total.backward()
    assert_same(Step(total.detach(), {f"inner.{k}": v for k, v in gradients(model.inner).items()}), exact)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part(side: str) -> None:
    model, batch = Padded(), tokens()
    mask = torch.ones_like(batch)
    mask[0, : 7 if side == "left" else None] = 0 if side == "left" else 1
    mask[1, -5 if side == "right" else 24 :] = 0
    reg = DispersionRegularizer(model, weight=WEIGHT)
    exact = by_hand(model, [lambda m: m(batch)], blocks, options=[{"mask": mask.bool()}])
    assert_same(step(model, reg, batch, attention_mask=mask), exact)
    everything = DispersionRegularizer(model, weight=WEIGHT, tokens="all")
    total = model(batch, mask) + everything.loss()  # positional, too
    reg.loss()
    torch.testing.assert_close(total.double(), by_hand(model, [lambda m: m(batch)], blocks).loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", ["cu_seq_lens_q", "position_ids", "position_ids of one row"])
def test_packed_documents_have_a_loss_each(given: str) -> None:
    model, batch = Padded(), tokens(batch=2 if given == "position_ids of one row" else 1, length=30)
    cu_seqlens = torch.tensor([0, 7, 19, 30], dtype=torch.int32)
    positions = torch.cat([torch.arange(7), torch.arange(12), torch.arange(11)])[None]
    arguments = (
        {"cu_seq_lens_q": cu_seqlens, "max_length_q": 12}
        if given == "cu_seq_lens_q"
        else {"position_ids": positions, "input_ids": batch}
    )
    reg = DispersionRegularizer(model, weight=WEIGHT)
    bounds = cu_seqlens if len(batch) == 1 else torch.cat([cu_seqlens, cu_seqlens[1:] + 30])
    exact = by_hand(model, [lambda m: m(batch)], blocks, options=[{"cu_seqlens": bounds}], flatten=True)
    assert_same(step(model, reg, batch, **arguments), exact)
    # And these are the losses of the documents, each a row of its own.
    model(batch, **arguments)
    packed = reg.loss()
    pieces = [batch[0, begin:end][None] for begin, end in itertools.pairwise(cu_seqlens)]
    if len(batch) == 1:
        for piece in pieces:
            model(piece)
        torch.testing.assert_close(reg.loss(), packed)


def test_the_largest_length_is_handed_on() -> None:
    model, batch = Padded(), tokens(batch=1, length=30)
    reg = DispersionRegularizer(model, weight=WEIGHT)
    bounds = torch.tensor([0, 7, 19, 30], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_seqlen is 11, and the longest sequence of cu_seqlens has 12 tokens"):
        model(batch, cu_seq_lens_q=bounds, max_length_q=11)
    for other in (torch.tensor(3), 12.0, None):  # as no length at all
        model(batch, cu_seq_lens_q=bounds, max_length_q=other)
        reg.loss()


def test_whole_rows_of_positions_are_no_documents() -> None:
    model, batch = Padded(), tokens()
    reg = DispersionRegularizer(model, weight=WEIGHT)
    exact = by_hand(model, [lambda m: m(batch)], blocks)
    assert_same(step(model, reg, batch, position_ids=torch.arange(3, 27)[None]), exact)


@pytest.mark.parametrize("packed", [False, True])
def test_labels_leave_prompts_out(packed: bool) -> None:
    model, batch = Padded(), tokens(batch=1 if packed else 2)
    labels = batch.clone()
    labels[:, :6] = -100
    arguments: dict[str, Any] = {"attention_mask": torch.arange(24).expand(batch.shape) < 20}
    options: dict[str, Any] = {"mask": (labels != -100) & arguments["attention_mask"]}
    if packed:
        arguments = {"cu_seq_lens_q": torch.tensor([0, 11, 24], dtype=torch.int32)}
        options = {"mask": (labels != -100).flatten(), "cu_seqlens": arguments["cu_seq_lens_q"]}
    reg = DispersionRegularizer(model, weight=WEIGHT, tokens="labels")
    exact = by_hand(model, [lambda m: m(batch)], blocks, options=[options], flatten=packed)
    assert_same(step(model, reg, batch, labels=labels, **arguments), exact)
    with pytest.raises(ValueError, match="called without labels"):
        model(batch)
    assert_same(step(model, reg, batch, labels=labels, **arguments), exact)


def test_bad_arguments_are_named() -> None:
    model = Model()
    two = nn.ModuleDict({"encoder": Model(), "decoder": Model()})
    for error, wanted, arguments in (
        (TypeError, "model must be a torch.nn.Module", (3,)),
        (ValueError, "weight must be .* got -1", (model, "all", -1)),
        (ValueError, "weight must be .* got nan", (model, "all", float("nan"))),
        (ValueError, "layers must be .* from 1 to 4.*'some'", (model, "some")),
        (ValueError, r"layers must be .*\[0\]", (model, [0])),
        (ValueError, r"layers must be .*\[5\]", (model, [5])),
        (ValueError, "empty list", (model, [])),
        (ValueError, "no part of model: Linear", (model, [nn.Linear(2, 2)])),
        (TypeError, "mixes", (model, [1, model.norm])),
        (ValueError, "no stack of blocks.*layers=", (model.head,)),
        (ValueError, r"several stacks.*encoder.blocks \(4 x Block\), decoder.blocks \(4 x Block\)", (two,)),
    ):
        with pytest.raises(error, match=wanted):
            DispersionRegularizer(*arguments)
    assert DispersionRegularizer(two, "last", stack="decoder").layers == ["decoder.blocks.3"]
    with pytest.raises(ValueError, match=r"no stacks of blocks named 'middle'.*encoder.blocks"):
        DispersionRegularizer(two, stack="middle")
    for name, options in (
        ("tokens", {"tokens": "some"}),
        ("unknown potential", {"potential": "nothing"}),
        ("fraction", {"sampling": 2.0}),
        ("impl", {"impl": "nothing"}),
    ):
        with pytest.raises(ValueError, match=name):
            DispersionRegularizer(model, **options)
    model = Padded()
    DispersionRegularizer(model)
    with pytest.raises(ValueError, match=r"attention_mask is a Tensor \(2, 1, 24, 24\).*tokens='all'"):
        model(tokens(), attention_mask=torch.ones(2, 1, 24, 24))
    model = Model(block=lambda width: Strange(width))
    DispersionRegularizer(model)
    with pytest.raises(TypeError, match=r"blocks.0 returned str"):
        model(tokens())


class Strange(Block):
    def forward(self, x: Tensor) -> Any:
        return "hidden states"


class Nested(nn.Module):
    """Experts are a list within the blocks, numbered layers a dictionary, as in torchtitan's models."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(k): nn.ModuleList(Block() for _ in range(3)) for k in range(2)})
        self.losses = nn.ModuleDict({"main": nn.MSELoss()})
        self.no_blocks = nn.ModuleList()


def test_lists_within_blocks_are_no_stacks() -> None:
    assert DispersionRegularizer(Nested()).layers == ["model.layers.0", "model.layers.1"]


def test_data_parallel_is_refused() -> None:
    model = Model()
    DispersionRegularizer(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DataParallel"):
        replica(tokens())


def test_our_gpt2() -> None:
    config = GPT2Config(layers=3, width=16, heads=2, context=24, vocab=32)
    batch = tokens()
    torch.manual_seed(0)
    model = GPT2(config)
    reg = DispersionRegularizer(model, "late_half", WEIGHT)
    assert reg.layers == ["h.2"]

    def call(m: nn.Module) -> Tensor:
        loss: Tensor = m(batch, batch).loss
        return loss

    exact = by_hand(model, [call], lambda m: [m.h[2]])  # type: ignore[index]
    total = call(model) + reg.loss()
    total.backward()
    assert_same(Step(total.detach(), gradients(model)), exact)


def test_a_temperature_that_wants_a_gradient_and_a_lone_layer_are_refused() -> None:
    with pytest.raises(TypeError, match="tau requires a gradient"):
        DispersionRegularizer(Model(), tau=nn.Parameter(torch.tensor(0.5)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"give layers=\[2\]"):
        DispersionRegularizer(Model(), layers=2)  # type: ignore[arg-type]


class Dictionary(nn.Module):
    """nanoGPT's layout: the modules in a ``ModuleDict``, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        whole = Model()
        self.transformer = nn.ModuleDict({"wte": whole.embedding, "h": whole.blocks, "ln_f": whole.norm})
        self.lm_head = whole.head

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        parts: Any = self.transformer
        x = parts.wte(tokens)
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class Wrapper(nn.Module):
    """Lightning's layout: a method calls the model, and the wrapper itself is never called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Tensor, **arguments: Any) -> Tensor:
        loss: Tensor = self.model(batch, **arguments)
        return loss


@pytest.mark.parametrize("by", ["numbers", "modules"])
def test_a_wrapper_need_not_be_called(by: str) -> None:
    batch, mask = tokens(), torch.arange(24) < torch.tensor([[24], [15]])
    wrapper = Wrapper(Dictionary())
    stack = wrapper.model.transformer.h  # type: ignore[union-attr]
    reg = DispersionRegularizer(wrapper, "all" if by == "numbers" else list(stack), WEIGHT)  # type: ignore[arg-type]
    assert reg.layers == [f"model.transformer.h.{k}" for k in range(4)]
    exact = by_hand(
        wrapper,
        [lambda m: m.training_step(batch, attention_mask=mask)],  # type: ignore[operator]
        lambda m: list(m.model.transformer.h),  # type: ignore[arg-type, union-attr]
        options=[{"mask": mask}],
    )
    for _ in range(2):
        wrapper.zero_grad()
        total = wrapper.training_step(batch, attention_mask=mask) + reg.loss()
        total.backward()
        assert_same(Step(total.detach(), gradients(wrapper)), exact)


class Head(nn.Module):
    """Takes the labels, as a causal model of Hugging Face, whose stack does not get them."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Padded()

    def forward(self, tokens: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = self.stack(tokens, attention_mask=attention_mask)
        return loss


def test_labels_of_any_module_on_the_way_to_the_blocks() -> None:
    batch, wrapper = tokens(), Wrapper(Head())
    labels = batch.clone()
    labels[:, :6] = -100
    mask = torch.arange(24) < torch.tensor([[24], [15]])
    reg = DispersionRegularizer(wrapper, weight=WEIGHT, tokens="labels")
    exact = by_hand(
        wrapper,
        [lambda m: m.training_step(batch, attention_mask=mask, labels=labels)],  # type: ignore[operator]
        lambda m: blocks(m.model.stack),  # type: ignore[arg-type, union-attr]
        options=[{"mask": mask & (labels != -100)}],
    )
    total = wrapper.training_step(batch, attention_mask=mask, labels=labels) + reg.loss()
    total.backward()
    assert_same(Step(total.detach(), gradients(wrapper)), exact)


class Outer(nn.Module):
    """Knows the padding, of which the module that owns the blocks hears nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Model()

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        loss: Tensor = self.stack(tokens)
        return loss


@pytest.mark.parametrize("by", ["modules", "one module in a block"])
def test_modules_have_the_mask_of_the_model(by: str) -> None:
    model, batch, mask = Outer(), tokens(), torch.arange(24) < torch.tensor([[24], [15]])

    def chosen(m: nn.Module) -> Sequence[nn.Module]:
        of_stack = blocks(m.stack)  # type: ignore[arg-type]
        return [of_stack[2].linear] if by == "one module in a block" else of_stack  # type: ignore[list-item]

    reg = DispersionRegularizer(model, chosen(model), WEIGHT)
    exact = by_hand(model, [lambda m: m(batch, mask)], chosen, options=[{"mask": mask}])
    assert_same(step(model, reg, batch, attention_mask=mask), exact)


def test_a_mask_that_may_mean_its_opposite_is_refused() -> None:
    model, batch = Padded(), tokens()
    reg = DispersionRegularizer(model, weight=WEIGHT)
    additive = torch.zeros(2, 24).masked_fill(torch.arange(24) > 20, float("-inf"))
    with pytest.raises(TypeError, match=r"attention_mask is torch.float32.*booleans or integers.*tokens='all'"):
        model(batch, attention_mask=additive)
    assert_same(step(model, reg, batch), by_hand(model, [lambda m: m(batch)], blocks))


def test_pytorchs_encoder() -> None:
    """``src_key_padding_mask`` is True for padding; with ``batch_first=False`` rows would be taken for tokens."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    )
    x, padding = torch.randn(2, 24, 16) + 1, torch.arange(24) >= torch.tensor([[24], [15]])
    reg = DispersionRegularizer(encoder, weight=WEIGHT)

    def call(m: nn.Module) -> Tensor:
        dtype = next(m.parameters()).dtype
        out: Tensor = m(x.to(dtype), src_key_padding_mask=padding)
        return out[:, :15].square().mean()

    exact = by_hand(encoder, [call], lambda m: list(m.layers), options=[{"mask": ~padding}])  # type: ignore[arg-type]
    total = call(encoder) + reg.loss()
    total.backward()
    assert_same(Step(total.detach(), gradients(encoder)), exact)
    with pytest.raises(ValueError, match=r"key padding mask is torch.float32"):
        encoder(x, src_key_padding_mask=torch.zeros(2, 24))
    encoder(x[1], src_key_padding_mask=padding[1])
    unbatched = reg.loss()
    encoder(x[1, :15])
    torch.testing.assert_close(unbatched, reg.loss())
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    DispersionRegularizer(encoder)
    with pytest.raises(ValueError, match="batch_first=False"):
        encoder(x)


@pytest.mark.parametrize("by", ["stack", "modules"])
def test_pytorchs_decoder_has_its_own_mask(by: str) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 2, 2, 32, dropout=0.0, batch_first=True)
    x, y = torch.randn(2, 24, 16) + 1, torch.randn(2, 24, 16) + 1
    padding, others = torch.arange(24) >= torch.tensor([[24], [15]]), torch.arange(24) >= torch.tensor([[9], [24]])
    layers = "all" if by == "stack" else list(model.decoder.layers)
    reg = DispersionRegularizer(model, layers, WEIGHT, stack="decoder" if by == "stack" else None)

    def call(m: nn.Module) -> Tensor:
        dtype = next(m.parameters()).dtype
        out: Tensor = m(x.to(dtype), y.to(dtype), src_key_padding_mask=others, tgt_key_padding_mask=padding)
        return out[:, :15].square().mean()

    exact = by_hand(model, [call], lambda m: list(m.decoder.layers), options=[{"mask": ~padding}])  # type: ignore[arg-type, union-attr]
    total = call(model) + reg.loss()
    total.backward()
    assert_same(Step(total.detach(), gradients(model)), exact)


class Transposing(nn.Module):
    """Block of one's own, in whose attention the first dimension is the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        q = x.transpose(0, 1)
        mixed: Tensor = self.self_attn(q, q, q)[0]
        return x + mixed.transpose(0, 1)


def test_what_a_block_or_a_neighbour_is_made_of_does_not_matter() -> None:
    model, batch = Model(block=Transposing), tokens()
    model.front = torch.jit.script(nn.Linear(2, 2))
    reg = DispersionRegularizer(model, weight=WEIGHT)
    found = step(model, reg, batch)
    del model.front
    assert_same(found, by_hand(model, [lambda m: m(batch)], blocks))


class Recomputed(nn.Module):
    """A part around the blocks is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Model()

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = checkpoint(self.part, tokens, use_reentrant=False)
        return loss


@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpointing_of_a_module_around_the_blocks_adds_no_term(early_stop: bool) -> None:
    model, batch = Recomputed(), tokens()
    exact = by_hand(model, [lambda m: m.part(batch)], lambda m: blocks(m.part))  # type: ignore[arg-type, operator]
    reg = DispersionRegularizer(model, weight=WEIGHT)
    with set_checkpoint_early_stop(early_stop):
        for _ in range(2):
            assert_same(step(model, reg, batch), exact)
    with pytest.raises(RuntimeError, match="4 of 4 layers did not run"):
        reg.loss()


@pytest.mark.parametrize("keep_gradients", [False, True])
def test_first_derivatives_under_checkpointing_and_hooks_of_saved_tensors(keep_gradients: bool) -> None:
    """With ``create_graph``, and by hooks that take a maximum, as those that quantise do."""
    model, batch = Model(), tokens()
    exact = by_hand(model, [lambda m: m(batch)], blocks)
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    reg = DispersionRegularizer(model, weight=WEIGHT, keep_gradients=keep_gradients)
    names, weights = zip(*model.named_parameters(), strict=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: (saved, saved.abs().max()), lambda saved: saved[0]):
        total = model(batch) + reg.loss()
    grads = torch.autograd.grad(total, weights, create_graph=True)
    assert_same(Step(total.detach(), dict(zip(names, (grad.detach() for grad in grads), strict=True))), exact)


def test_a_step_of_another_optimiser_computes_nothing_again() -> None:
    model, batch, calls = Model(), tokens(), []
    model.blocks[0].linear.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    inner = DispersionRegularizer(model, [block.linear for block in blocks(model)])  # type: ignore[misc]
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
    total = model(batch) + inner.loss()
    torch.optim.SGD(nn.Linear(2, 2).parameters()).step()
    assert len(calls) == 1
    total.backward()
    assert len(calls) == 2


class Evaluated(nn.Module):
    """The module that owns the blocks is in evaluation mode, and has a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Padded()

    def forward(self, tokens: Tensor, attention_mask: Tensor, own_mask: Tensor) -> Tensor:
        loss: Tensor = self.stack(tokens, attention_mask=own_mask)
        return loss


def test_an_owner_in_evaluation_mode_has_its_own_mask() -> None:
    model, batch = Evaluated(), tokens()
    other, own = torch.arange(24) < torch.tensor([[24], [15]]), torch.arange(24) < torch.tensor([[9], [24]])
    model.stack.eval()
    reg = DispersionRegularizer(model, weight=WEIGHT)
    exact = by_hand(model, [lambda m: m(batch, other, own)], lambda m: blocks(m.stack), options=[{"mask": own}])  # type: ignore[arg-type]
    assert_same(step(model, reg, batch, attention_mask=other, own_mask=own), exact)


class Kept(nn.Module):
    """Model that has its regulariser as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Model()
        self.reg = DispersionRegularizer(self.inner)

    def forward(self, tokens: Tensor) -> Tensor:
        loss: Tensor = self.inner(tokens)
        return loss


def test_a_copy_of_the_regulariser_is_a_removed_one() -> None:
    model, batch = Kept(), tokens()
    model(batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(batch).backward()
        with pytest.raises(RuntimeError, match=r"of a copy; make another"):
            other.reg.loss()
        other.reg.remove()
    model.reg.loss()


def test_all_regularisers_share_one_hook_of_optimisers() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook

    DispersionRegularizer(Model())
    before = len(_global_optimizer_post_hooks)
    for _ in range(3):
        DispersionRegularizer(Model())
    assert len(_global_optimizer_post_hooks) == before
    optimizer = torch.optim.SGD(Model().parameters())
    collects = register_optimizer_step_post_hook(lambda *_: gc.collect())  # type: ignore[arg-type, return-value]
    optimizer.step()
    collects.remove()


def test_loss_after_a_backward_says_so() -> None:
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model, weight=WEIGHT)
    own = model(batch)
    with pytest.warns(RuntimeWarning, match="nobody added"):
        torch.autograd.grad(own, list(model.parameters()), retain_graph=True)
    with pytest.raises(RuntimeError, match=r"backward ran between .*right after the forward"):
        reg.loss()
    assert_same(step(model, reg, batch), by_hand(model, [lambda m: m(batch)], blocks))


@pytest.mark.parametrize("keep_gradients", [False, True])
def test_second_derivatives_of_the_model_without_the_term_and_no_others(keep_gradients: bool) -> None:
    model, batch = Model(), tokens()

    def penalty(own: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(own, [model.embedding.weight], create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), [model.embedding.weight])
        return second

    exact = penalty(model(batch))
    reg = DispersionRegularizer(model, weight=WEIGHT, keep_gradients=keep_gradients)
    own = model(batch)
    term = reg.loss()
    torch.testing.assert_close(penalty(own), exact)
    for with_own in (True, False):
        own = model(batch)
        with pytest.raises(RuntimeError, match="no second derivative"):
            penalty(own + reg.loss() if with_own else reg.loss())
    del term
    with pytest.raises(RuntimeError, match=r"torch.func transforms a model with a DispersionRegularizer"):
        torch.func.grad(lambda weights: torch.func.functional_call(model, weights, batch))(
            dict(model.named_parameters())
        )


@pytest.mark.parametrize("keep_gradients", [False, True])
def test_backward_has_the_temperature_of_forward(keep_gradients: bool) -> None:
    model, batch, tau = Model(), tokens(), torch.tensor(0.5)
    reg = DispersionRegularizer(model, weight=WEIGHT, tau=tau, keep_gradients=keep_gradients)
    assert_backward_has_the_temperature_of_forward(model, lambda: model(batch), reg, tau, batch)


def test_numbers_of_numpy_and_modules_given_twice() -> None:
    model, batch = Model(), tokens()
    reg = DispersionRegularizer(model, np.array([3, 1]), np.float32(WEIGHT))  # type: ignore[arg-type]
    assert_same(step(model, reg, batch), by_hand(model, [lambda m: m(batch)], lambda m: [blocks(m)[0], blocks(m)[2]]))
    reg.remove()
    twice = DispersionRegularizer(model, [model.blocks[0], model.blocks[0], model.blocks[2]])
    assert twice.layers == ["blocks.0", "blocks.2"]
