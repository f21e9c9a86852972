"""Transforms of functions, forward mode and torch.export: the right derivative, or an error that names the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from dispersion_kernels import fused_dispersion_loss

Z = torch.randn(3, 2, 30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.8
MASKS = torch.rand(3, 2, 30, generator=torch.Generator().manual_seed(1)) > 0.3
SAMPLED = [{"sampling": 0}, {"sampling": 0.1}]


def loss_of(**options: Any) -> Callable[..., Tensor]:
    def loss(z: Tensor, mask: Tensor | None = None) -> Tensor:
        return fused_dispersion_loss(z, tau=0.5, mask=mask, **options)

    return loss


def exact(z: Tensor, mask: Tensor | None = None) -> Tensor:
    return loss_of(impl="reference")(z, mask)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("recompute", [False, True])
def test_reverse_mode(recompute: bool) -> None:
    loss = loss_of(recompute=recompute)
    z, expected = Z[0], grad(exact)(Z[0])
    close(grad(loss)(z), expected)
    close(grad(loss)(z, MASKS[0]), grad(exact)(z, MASKS[0]))
    value, pull = vjp(loss, z)
    close(value, exact(z))
    close(pull(torch.tensor(2.0, dtype=z.dtype))[0], 2 * expected)
    losses = loss_of(recompute=recompute, reduction="none")
    close(jacrev(losses)(z), jacrev(loss_of(impl="reference", reduction="none"))(z))
    with torch.no_grad():
        close(grad(loss)(z), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_vmap(recompute: bool) -> None:
    loss = loss_of(recompute=recompute)
    expected = torch.stack([grad(exact)(z) for z in Z])
    close(vmap(loss)(Z), torch.stack([exact(z) for z in Z]))
    close(vmap(loss)(Z, MASKS), torch.stack([exact(z, mask) for z, mask in zip(Z, MASKS, strict=True)]))
    close(vmap(loss, in_dims=(None, 0))(Z[0], MASKS), torch.stack([exact(Z[0], mask) for mask in MASKS]))
    close(vmap(loss, in_dims=1)(Z.transpose(0, 1)), torch.stack([exact(z) for z in Z]))
    close(vmap(grad(loss))(Z), expected)
    close(grad(lambda z: vmap(loss)(z).sum())(Z), expected)
    z = Z.clone().requires_grad_()
    close(torch.autograd.grad(vmap(loss)(z).sum(), z)[0], expected)
    layers = vmap(lambda z: fused_dispersion_loss([z, 2 * z], "uniformity", recompute=recompute))
    close(layers(Z), torch.stack([fused_dispersion_loss([z, 2 * z], "uniformity", impl="reference") for z in Z]))
    narrow = Z.bfloat16()
    assert torch.equal(vmap(grad(loss))(narrow), torch.stack([grad(loss)(z) for z in narrow]))


FORWARD = r"differentiated in forward mode .*impl=\"reference\""
TWICE = r"no second derivative\. Use impl=\"reference\""


@pytest.mark.parametrize("options", [{}, {"recompute": True}, SAMPLED[1]], ids=str)
def test_forward_mode_and_second_derivatives_say_what_has_them(options: dict[str, Any]) -> None:
    loss = loss_of(**options)
    z = Z[0] if "sampling" not in options else Z[0].repeat(1, 20, 1)
    with pytest.raises(RuntimeError, match=FORWARD):
        jvp(loss, (z,), (z,))
    if "sampling" not in options:
        with pytest.raises(RuntimeError, match=FORWARD):
            hessian(loss)(z[:, :6])
    for tokens in (z, z.clone().requires_grad_()):
        with forward_ad.dual_level():
            with pytest.raises(RuntimeError, match=FORWARD), torch.no_grad():
                loss(forward_ad.make_dual(tokens, z))
            assert loss(tokens).isfinite()  # without a tangent
    with pytest.raises(RuntimeError, match=TWICE):
        grad(lambda z: grad(loss)(z).square().sum())(z)
    z.requires_grad_()
    (once,) = torch.autograd.grad(loss(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        torch.autograd.grad(once.square().sum(), z)
    z.requires_grad_(False)


def test_compiled() -> None:
    """Outside of the graph, and with fullgraph=True an error; never 0."""
    loss, z = loss_of(), Z[0]
    for transformed, tokens in ((grad(loss), z), (vmap(grad(loss)), Z)):
        torch._dynamo.reset()
        close(torch.compile(transformed, backend="aot_eager")(tokens), transformed(tokens))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=FORWARD):
        torch.compile(lambda z: jvp(loss, (z,), (z,)), backend="aot_eager")(z)
    for transform in (lambda z: jvp(loss, (z,), (z,)), grad(loss)):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=r"inside of a transform of torch.func .*impl=\\?\"reference\\?\""):
            torch.compile(transform, fullgraph=True, backend="aot_eager")(z)


def test_the_reference_has_them() -> None:
    z = Z[0, :1, :6]
    tangent = torch.randn_like(z)
    close(jvp(exact, (z,), (tangent,))[1], (grad(exact)(z) * tangent).sum())
    close(jacfwd(exact)(z), grad(exact)(z))
    close(hessian(exact)(z), jacrev(jacrev(exact))(z))
    assert hessian(exact)(z).abs().max() > 1e-3


@pytest.mark.parametrize("options", SAMPLED, ids=str)
def test_sampled_pairs(options: dict[str, Any]) -> None:
    def loss(z: Tensor) -> Tensor:
        torch.manual_seed(0)
        return loss_of(**options)(z)

    z = Z[0].repeat(1, 20, 1) + 0.1 * torch.randn(2, 600, 8, dtype=torch.float64)
    x = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    close(grad(loss)(z), expected)
    both = torch.stack([z, z])
    same = vmap(grad(loss_of(**options)), randomness="same")(both)
    other = vmap(grad(loss_of(**options)), randomness="different")(both)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(other[0], other[1])
    for estimate in (*same, *other):
        assert (estimate - expected).norm() < 0.5 * expected.norm()
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(loss_of(**options))(both)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, SAMPLED[1]], ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_have_a_backward(strict: bool, options: dict[str, Any]) -> None:
    class Module(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return loss_of(**options)(z * 2)

    z = (Z[0] if "sampling" not in options else Z[0].repeat(1, 20, 1)).clone().requires_grad_()
    torch.manual_seed(0)
    loss = Module()(z)
    (expected,) = torch.autograd.grad(loss, z)
    for example in (z, z.detach()):  # exported where no gradient was wanted, too
        program = torch.export.export(Module(), (example,), strict=strict).module()
        torch.manual_seed(0)
        found = program(z)
        close(found, loss)
        close(torch.autograd.grad(found, z)[0], expected)
        torch.manual_seed(0)
        with torch.no_grad():
            close(program(z), loss)
