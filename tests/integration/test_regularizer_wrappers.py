"""DispersionRegularizer under activation checkpointing, torch.compile, DDP, FSDP2 and LoRA."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from regularized import (
    WEIGHT,
    Model,
    Step,
    assert_backward_has_the_temperature_of_forward,
    assert_same,
    by_hand,
    gradients,
    tokens,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from dispersion_kernels import DispersionRegularizer, SampledTokens


def blocks(model: nn.Module) -> Sequence[nn.Module]:
    return list(model.blocks)  # type: ignore[arg-type]


def step(model: nn.Module, reg: DispersionRegularizer, batch: Tensor, **arguments: Any) -> Step:
    model.zero_grad()
    total = model(batch, **arguments) + reg.loss()
    total.backward()
    return Step(total.detach(), gradients(model))


class Checkpointed(Model):
    """Its hooks are inside of the checkpointed region."""

    use_reentrant = False

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def wrap(model: Model, use_reentrant: bool) -> None:
    kind = CheckpointImpl.REENTRANT if use_reentrant else CheckpointImpl.NO_REENTRANT
    model.blocks = nn.ModuleList(checkpoint_wrapper(block, kind) for block in model.blocks)


@pytest.mark.parametrize("options", [{}, {"keep_gradients": True}, {"sampling": SampledTokens(8)}], ids=str)
@pytest.mark.parametrize("hooks", ["inside", "inside, wrapped after", "outside"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_once(use_reentrant: bool, hooks: str, options: dict[str, Any]) -> None:
    batches = tokens(seed=1), tokens(seed=2)
    mask = torch.arange(24) < torch.tensor([[17], [24]])
    plain = Model()
    exact = by_hand(
        plain,
        [lambda m: m(batches[0]), lambda m: m(batches[1])],
        blocks,
        weight=WEIGHT / 2,
        options=[{"mask": mask}, {}],
        scales=[1.0, 1.0],
    )
    model = Model() if hooks != "inside" else Checkpointed()
    if hooks == "inside":
        model.use_reentrant = use_reentrant  # type: ignore[assignment]
    if hooks == "outside":
        wrap(model, use_reentrant)
    reg = DispersionRegularizer(model, weight=WEIGHT, **options)
    if hooks == "inside, wrapped after":
        wrap(model, use_reentrant)
    if use_reentrant and hooks != "outside":
        loss = model(batches[0])
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            reg.loss()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            # Two forwards before their backwards: each makes its own tokens again.
            model.zero_grad()
            total = model(batches[0], mask) + model(batches[1]) + reg.loss()
            total.backward()
            answer = Step(total.detach(), gradients(model))
            if "sampling" not in options:
                assert_same(answer, exact)
        with pytest.raises(RuntimeError, match="did not run"):
            reg.loss()


def test_checkpointing_draws_again_what_it_drew() -> None:
    answers = []
    for kind in (Model, Checkpointed):
        model = kind()
        reg = DispersionRegularizer(model, weight=WEIGHT, sampling=SampledTokens(8))
        torch.manual_seed(3)
        answers.append(step(model, reg, tokens()))
    torch.testing.assert_close(*answers)


def test_checkpointing_computes_the_value_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    value = DispersionRegularizer._value

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return value(*args, **options)

    monkeypatch.setattr(DispersionRegularizer, "_value", counted)
    for kind in (Model, Checkpointed):
        for keep_gradients in (False, True):
            model = kind()
            reg = DispersionRegularizer(model, weight=WEIGHT, keep_gradients=keep_gradients)
            step(model, reg, tokens())
            assert sorted(calls) == ([True] * 4 if keep_gradients else [False] * 4 + [True] * 4)
            calls.clear()


class Inner(Model):
    def forward(
        self, tokens: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        return super().forward(tokens)


class Outer(nn.Module):
    """The module that owns the blocks is within another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner(layers=2)

    def forward(self, tokens: Tensor, **arguments: Tensor) -> Tensor:
        loss: Tensor = self.inner(tokens, **arguments)
        return loss


LENGTHS = (20, 24, 30, 17, 40, 24)


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("given", ["nothing", "attention_mask", "position_ids"])
@pytest.mark.parametrize("keep_gradients", [False, True])
def test_one_graph_for_the_first_length_and_one_for_all(
    counter: CompileCounterWithBackend, keep_gradients: bool, given: str
) -> None:
    model = Outer()
    reg = DispersionRegularizer(model, weight=WEIGHT, keep_gradients=keep_gradients)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in LENGTHS:
        batch = tokens(length=length)
        positions = torch.cat([torch.arange(5), torch.arange(length - 5)])[None].expand(2, -1)
        bounds = torch.tensor([0, 5, length, length + 5, 2 * length])
        mask = torch.arange(length) < torch.tensor([[length], [11]])
        arguments, options = {
            "nothing": ({}, {}),
            "attention_mask": ({"attention_mask": mask}, {"mask": mask}),
            "position_ids": ({"position_ids": positions}, {"cu_seqlens": bounds}),
        }[given]
        packed = given == "position_ids"
        exact = by_hand(
            model,
            [lambda m, b=batch: m(b)],  # type: ignore[misc]
            lambda m: blocks(m.inner),  # type: ignore[arg-type]
            options=[options],
            flatten=packed,
        )
        assert_same(step(compiled, reg, batch, **arguments), exact)  # type: ignore[arg-type]
    assert counter.frame_count == 2


@pytest.mark.slow
def test_the_loss_may_be_compiled_with_the_model(counter: CompileCounterWithBackend) -> None:
    model = Model(layers=2)
    reg = DispersionRegularizer(model, weight=WEIGHT)
    compiled = torch.compile(lambda batch: model(batch) + reg.loss(), backend=counter, fullgraph=True)
    for length in LENGTHS:
        batch = tokens(length=length)
        model.zero_grad()
        total = compiled(batch)
        total.backward()
        exact = by_hand(model, [lambda m, b=batch: m(b)], blocks)  # type: ignore[misc]
        assert_same(Step(total.detach(), gradients(model)), exact)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_inductor() -> None:
    if os.name == "nt":
        pytest.skip("the compiler needs MSVC on Windows")
    torch._dynamo.reset()
    model, batch = Model(layers=2), tokens()
    reg = DispersionRegularizer(model, weight=WEIGHT)
    compiled = torch.compile(model, fullgraph=True)
    assert_same(step(compiled, reg, batch), by_hand(model, [lambda m: m(batch)], blocks))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_twelve_blocks_compiled_one_by_one(counter: CompileCounterWithBackend, checkpointed: bool) -> None:
    """Regional compilation: of the twelve blocks, whose code is one, ten have hooks."""
    kind = Checkpointed if checkpointed else Model
    model = kind(layers=12)
    reg = DispersionRegularizer(model, list(range(3, 13)), WEIGHT)
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)  # type: ignore[operator]
    for length in LENGTHS:
        batch = tokens(length=length)
        plain = Model(layers=12)
        exact = by_hand(plain, [lambda m, b=batch: m(b)], lambda m: blocks(m)[2:])  # type: ignore[misc]
        assert_same(step(model, reg, batch), exact)
    assert counter.frame_count <= torch._dynamo.config.recompile_limit


@pytest.mark.slow
def test_compiled_twice_in_a_step_and_with_another_weight(counter: CompileCounterWithBackend) -> None:
    model, batches = Model(layers=2), [tokens(seed=k) for k in range(4)]
    reg = DispersionRegularizer(model, weight=1.0)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for weight, count in ((1.0, 1), (2.0, 2), (3.0, 4)):
        reg.weight = weight
        chosen = batches[:count]
        model.zero_grad()
        total = torch.stack([compiled(batch) for batch in chosen]).sum() + reg.loss()
        total.backward()
        exact = by_hand(
            model,
            [lambda m, b=b: m(b) for b in chosen],  # type: ignore[misc]
            blocks,
            weight=weight / count,
            options=[{}] * count,
            scales=[1.0] * count,
        )
        assert_same(Step(total.detach(), gradients(model)), exact)
    compiled.eval()
    with torch.no_grad():
        compiled(batches[0])
    compiled.train()
    with pytest.raises(RuntimeError, match="did not run"):
        reg.loss()
    assert counter.frame_count == 2  # for training, for evaluation


def test_hooks_after_the_first_compiled_call_are_missed_aloud(counter: CompileCounterWithBackend) -> None:
    model, batch = Model(layers=2), tokens()
    compiled = torch.compile(model, backend=counter)
    compiled(batch)
    reg = DispersionRegularizer(model)
    compiled(batch)
    with pytest.raises(RuntimeError, match="before the first call of a compiled model"):
        reg.loss()


def test_a_forgotten_loss_of_a_compiled_model_warns_at_the_step(counter: CompileCounterWithBackend) -> None:
    model, batch = Model(layers=2), tokens()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    reg = DispersionRegularizer(model, weight=WEIGHT)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):
        compiled(batch).backward()
        with pytest.warns(RuntimeWarning, match=r"whose loss\(\) nobody added"):
            optimizer.step()
        with pytest.raises(RuntimeError, match="backward ran between"):
            reg.loss()
    model.zero_grad()
    loss = compiled(batch)
    optimizer.step()  # as of another model, between forward and backward
    total = loss + reg.loss()
    total.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert_same(Step(total.detach(), gradients(model)), by_hand(model, [lambda m: m(batch)], blocks))


def test_removed_from_a_compiled_model(counter: CompileCounterWithBackend) -> None:
    model, batch = Model(layers=2), tokens()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    reg = DispersionRegularizer(compiled, weight=WEIGHT)  # type: ignore[arg-type]
    step(compiled, reg, batch)  # type: ignore[arg-type]
    reg.remove()
    model.zero_grad()
    compiled(batch).backward()
    exact = by_hand(model, [lambda m: m(batch)], blocks, weight=0.0)
    assert_same(Step(exact.loss, gradients(model)), exact)
    with pytest.raises(RuntimeError, match=r"after remove\(\)"):
        reg.loss()


@pytest.mark.slow
@pytest.mark.parametrize("hooks", ["inside", "outside"])
def test_compiled_with_checkpointing(counter: CompileCounterWithBackend, hooks: str) -> None:
    """PyTorch compiles no checkpointed region that writes to something outside of it: it takes its eager mode there,
    and refuses ``fullgraph``."""
    model = Checkpointed(layers=2) if hooks == "inside" else Model(layers=2)
    if hooks == "outside":
        wrap(model, use_reentrant=False)
    reg = DispersionRegularizer(model, weight=WEIGHT)
    compiled = torch.compile(model, backend=counter, fullgraph=hooks == "outside")
    for length in LENGTHS[:3]:
        batch = tokens(length=length)
        exact = by_hand(Model(layers=2), [lambda m, b=batch: m(b)], blocks)  # type: ignore[misc]
        assert_same(step(compiled, reg, batch), exact)  # type: ignore[arg-type]
    if hooks == "outside":
        assert counter.frame_count == 2
    else:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
            compiled(batch)


RUNS = ("ddp", "ddp, unused", "ddp, static", "ddp, no_sync", "fsdp2, before", "fsdp2, after")


class Unused(Model):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)


def _run(name: str, rank: int) -> Step:
    kind, _, how = name.partition(", ")
    inner = Unused() if how == "unused" else Model()
    reg = None if how == "after" else DispersionRegularizer(inner, weight=WEIGHT)
    model: nn.Module = inner
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(
            inner, find_unused_parameters=how == "unused", static_graph=how == "static"
        )
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in inner.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(inner, mesh=mesh)
    reg = reg or DispersionRegularizer(model, weight=WEIGHT)
    micros = 2 if how == "no_sync" else 1
    for _ in range(2):  # a static graph is used from the second step on
        model.zero_grad()
        total = torch.zeros(())
        for micro in range(micros):
            with contextlib.nullcontext() if micro + 1 == micros else model.no_sync():  # type: ignore[operator]
                loss = (model(tokens(seed=2 * rank + micro)) + reg.loss()) / micros
                total += loss.detach()
                loss.backward()
    grads = gradients(model)
    if kind == "fsdp2":
        grads = {name: grad.full_tensor() for name, grad in grads.items()}  # type: ignore[operator]
    dist.all_reduce(total)
    return Step(total / 2, grads)


def _train_on(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    answers = {name: _run(name, rank) for name in RUNS}
    if rank == 0:
        torch.save({name: tuple(answer) for name, answer in answers.items()}, f"{folder}/answers.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Without the destructors at exit: now and then one of PyTorch's FSDP2 ends a thread that still runs, by SIGABRT.
    os._exit(0)


@pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs torch.distributed with gloo over files")
@pytest.mark.process
def test_two_processes_are_the_mean_of_both(tmp_path: Path) -> None:
    mp.spawn(_train_on, (str(tmp_path),), nprocs=2)
    answers = torch.load(tmp_path / "answers.pt")
    for name in RUNS:
        seeds = range(4) if name.endswith("no_sync") else (0, 2)
        count = len(seeds)
        exact = by_hand(
            Model(),
            [lambda m, s=seed: m(tokens(seed=s)) for seed in seeds],  # type: ignore[misc]
            blocks,
            options=[{}] * count,
            scales=[1 / count] * count,
        )
        loss, grads = answers[name]
        grads = {parameter: grad for parameter, grad in grads.items() if "idle" not in parameter}
        assert_same(Step(loss, grads), exact)


@pytest.mark.parametrize("keep_gradients", [False, True])
def test_compiled_backward_has_the_temperature_of_forward(
    counter: CompileCounterWithBackend, keep_gradients: bool
) -> None:
    model, batch, tau = Model(layers=2), tokens(), torch.tensor(0.5)
    reg = DispersionRegularizer(model, weight=WEIGHT, tau=tau, keep_gradients=keep_gradients)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert_backward_has_the_temperature_of_forward(model, lambda: compiled(batch), reg, tau, batch)
