"""What training code puts around a loss: compile, autocast, loss scaling, checkpointing, DDP, FSDP2, and the import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import IMPLS, POTENTIALS, evaluate, skip_unless_supported, slow_but_first
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dispersion_kernels import AngularSpread, DispersionLoss, Potential, SampledTokens, fused_dispersion_loss


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", slow_but_first(POTENTIALS.values(), POTENTIALS))
def test_opcheck(potential: Potential, impl: str) -> None:
    z = torch.randn(2, 20, 8)
    skip_unless_supported(impl, z, potential)
    ids = torch.randint(-1, 3, (2, 20))
    cu_seqlens = torch.tensor([0, 4, 20], dtype=torch.int32)
    operator = torch.ops.dispersion_kernels.dispersion_loss.default
    others, all_pairs = (None, None, None, potential.name(), potential.params()), (1.0, "")
    for layers, pair_ids, bounds, largest, reduction in (
        ([z, z + 1], None, None, None, "mean"),
        ([z.bfloat16()], ids, None, None, "none"),
        ([z[:1]], None, cu_seqlens, None, "sum"),
        ([z[:1]], None, cu_seqlens, 16, "mean"),
    ):
        for with_grad in ([True] * len(layers), [False] * len(layers)):
            args = (layers, pair_ids, bounds, *others, reduction, impl, *all_pairs, with_grad, False, False, largest)
            torch.library.opcheck(operator, args)
    differentiable = [z.clone().requires_grad_(), z + 1]
    for with_grad in ([True, False], [False, False]):  # kept, or swept again in backward
        args = (differentiable, ids, None, *others, "none", impl, *all_pairs, with_grad, False, False, None)
        torch.library.opcheck(operator, args)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_equals_eager(backend: str, impl: str) -> None:
    if backend == "inductor" and os.name == "nt":
        pytest.skip("the compiler needs MSVC on Windows")

    def training_loss(z: Tensor, w: Tensor, mask: Tensor | None) -> Tensor:
        hidden = torch.tanh(z @ w)
        loss = fused_dispersion_loss([hidden, hidden * 2], tau=0.7, mask=mask, impl=impl)
        loss *= 0.1  # in place, as in many a training loop
        return hidden.square().mean() + loss

    compiled = torch.compile(training_loss, fullgraph=True, backend=backend)
    for mask in (None, torch.rand(2, 50) > 0.3):
        z, w = torch.randn(2, 50, 16), torch.randn(16, 16, requires_grad=True)
        expected = torch.autograd.grad(training_loss(z, w, mask), w)[0]
        loss = compiled(z, w, mask)
        torch.testing.assert_close(loss, training_loss(z, w, mask))
        torch.testing.assert_close(torch.autograd.grad(loss, w)[0], expected)
    module = torch.compile(DispersionLoss("uniformity", impl=impl), fullgraph=True, backend=backend)
    z = torch.randn(2, 50, 16, requires_grad=True)
    grad = torch.autograd.grad(module(z), z)[0]
    torch.testing.assert_close(grad, evaluate(z, "uniformity", impl=impl).grad / 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({}, False),
        ({"sampling": 0}, False),
        ({"sampling": 1 / 16}, False),
        ({"sampling": 1 / 16}, True),
        ({"sampling": SampledTokens(8)}, False),
        ({"sampling": SampledTokens(8)}, True),
    ],
)
def test_compile_takes_any_shape(options: dict[str, Any], packed: bool) -> None:
    """Twice over all batch sizes and lengths, sampled ones on both sides of the length up to which all pairs are
    visited, too: once for the first shape, once for all. The random numbers are those of an eager call."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused_dispersion_loss, fullgraph=True, backend=counter)
    for batch, length in ((2, 600), (3, 700), (5, 40), (4, 1040), (6, 513), (2, 33)):
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length if packed else None
        answers = []
        for function in (fused_dispersion_loss, compiled):
            z = torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(length))
            z = (z.flatten(0, 1) if packed else z).requires_grad_()
            torch.manual_seed(length)
            loss = function(z, cu_seqlens=cu_seqlens, **options)
            answers.append((loss, torch.autograd.grad(loss, z)[0]))
        torch.testing.assert_close(*answers)
    assert counter.frame_count == 2


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_autocast_leaves_the_arithmetic_alone(impl: str) -> None:
    z = torch.randn(2, 64, 32, requires_grad=True)
    skip_unless_supported(impl, z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused_dispersion_loss(z, impl=impl)
        hidden = nn.Linear(32, 32)(z)
        assert hidden.dtype == torch.bfloat16
        assert fused_dispersion_loss(hidden, impl=impl).dtype == torch.float32
    outside = fused_dispersion_loss(z, impl=impl)
    assert torch.equal(inside, outside)
    assert torch.equal(*(torch.autograd.grad(loss, z)[0] for loss in (inside, outside)))
    if impl == "torch":
        # The sweep of a backward that recomputes is inside whatever region the backward runs in.
        recomputed = fused_dispersion_loss(z, impl=impl, recompute=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grad = torch.autograd.grad(recomputed, z)[0]
        assert torch.equal(grad, torch.autograd.grad(fused_dispersion_loss(z, impl=impl), z)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_loss_scaling_saves_an_fp16_gradient_from_underflow(impl: str) -> None:
    """The gradient of a mean over many tokens of large norm is below the smallest fp16 number until it is scaled."""
    z = (torch.randn(2, 400, 64) * 300).half().float().requires_grad_()
    skip_unless_supported(impl, z)
    optimizer = torch.optim.SGD([z], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    scaler.scale(0.1 * fused_dispersion_loss(z.half(), impl=impl)).backward()
    scaler.unscale_(optimizer)
    assert z.grad is not None
    exact = evaluate(z.detach().double(), "angular_spread", impl="reference").grad * 0.05
    assert exact.abs().max() < torch.finfo(torch.float16).smallest_normal
    assert (z.grad - exact).abs().max() < 1e-3 * exact.abs().max()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**20


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_once(use_reentrant: bool, impl: str) -> None:
    layer = nn.Linear(16, 16)
    z = torch.randn(2, 40, 16, requires_grad=True)
    skip_unless_supported(impl, z)

    def block(tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(layer(tokens))
        return hidden, fused_dispersion_loss(hidden, impl=impl)

    def gradients(run: Callable[..., Any]) -> list[Tensor]:
        hidden, loss = run()
        return list(torch.autograd.grad(hidden.square().mean() + loss, [layer.weight, z], materialize_grads=True))

    def gradients_backward(run: Callable[..., Any]) -> list[Tensor]:
        layer.zero_grad()
        z.grad = None
        hidden, loss = run()
        (hidden.square().mean() + loss).backward()
        return [layer.weight.grad.clone(), z.grad.clone()]  # type: ignore[union-attr, list-item]

    plain = gradients(lambda: block(z))
    checkpointed = gradients_backward(lambda: checkpoint(block, z, use_reentrant=use_reentrant))
    torch.testing.assert_close(checkpointed, plain)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, z: Tensor) -> Tensor:
        hidden = []
        for layer in self.layers:
            z = z + torch.tanh(layer(z))
            hidden.append(z)
        return z.square().mean() + 0.1 * fused_dispersion_loss(hidden)


def _train_on(rank: int, sharding: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model: nn.Module = Model()
    if sharding == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    model(_batch()[2 * rank : 2 * rank + 2]).backward()
    grads = [p.grad.full_tensor() if sharding == "fsdp2" else p.grad for p in model.parameters()]  # type: ignore[union-attr]
    if rank == 0:
        torch.save(grads, f"{folder}/grads.pt")
    dist.barrier()
    dist.destroy_process_group()
    # Without the destructors at exit: now and then one of PyTorch's FSDP2 ends a thread that still runs, by SIGABRT.
    os._exit(0)


def _batch() -> Tensor:
    return torch.randn(4, 30, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.skipif(not dist.is_available() or os.name == "nt", reason="needs torch.distributed with gloo over files")
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.process
def test_two_processes_are_one_of_twice_the_batch(sharding: str, tmp_path: Path) -> None:
    mp.spawn(_train_on, (sharding, str(tmp_path)), nprocs=2)
    model = Model()
    model(_batch()).backward()
    expected = [p.grad for p in model.parameters()]
    torch.testing.assert_close(torch.load(tmp_path / "grads.pt"), expected)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_another_default_device_does_not_matter(impl: str) -> None:
    z, mask = torch.randn(2, 21, 8), torch.rand(2, 21) > 0.3
    cu_seqlens = torch.tensor([0, 4, 21], dtype=torch.int32)
    skip_unless_supported(impl, z)
    for tokens, options in ((z, {}), (z, {"mask": mask}), (z[0], {"cu_seqlens": cu_seqlens})):
        expected = evaluate(tokens, "angular_spread", impl=impl, **options)
        with torch.device("meta"):
            loss = fused_dispersion_loss(tokens.requires_grad_(), impl=impl, reduction="none", **options)
            (grad,) = torch.autograd.grad(loss.sum(), tokens)
        tokens.requires_grad_(False)
        assert torch.equal(loss, expected.loss)
        assert torch.equal(grad, expected.grad)


def test_import_touches_nothing() -> None:
    """No Triton, no matplotlib, no CUDA context, no library loaded; the same where the CPU kernel was not built."""
    code = (
        "import sys, torch, dispersion_kernels as d; import dispersion_kernels.backends.cpu as n\n"
        "heavy = {'triton', 'matplotlib', 'tokenizers', 'safetensors', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert n._library.cache_info().currsize == 0\n"
        "assert d.fused_dispersion_loss(torch.randn(2, 9, 4)).isfinite()\n"
    )
    # PyTorch itself may import what it likes.
    before = "import torch, sys; torch_own = set(sys.modules)\n"
    code = before + code.replace("set(sys.modules)\n", "(set(sys.modules) - torch_own)\n", 1)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_env_report() -> None:
    report = subprocess.run(
        [sys.executable, "-m", "dispersion_kernels.env_report"], check=True, capture_output=True, text=True
    ).stdout
    assert f"torch: {torch.__version__}" in report
    for impl in ("cpu", "torch", "reference"):
        assert f'impl="{impl}":' in report


def test_a_potential_made_inside_a_compiled_region() -> None:
    compiled = torch.compile(
        lambda z: fused_dispersion_loss(z, AngularSpread(tau=0.5)), fullgraph=True, backend="aot_eager"
    )
    z = torch.randn(2, 20, 8)
    torch.testing.assert_close(compiled(z), fused_dispersion_loss(z, tau=0.5))
