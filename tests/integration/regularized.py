"""Models for the tests of DispersionRegularizer, and the loss that it stands for, added by hand in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dispersion_kernels import DispersionRegularizer, fused_dispersion_loss

WEIGHT = 3.0


class Step(NamedTuple):
    loss: Tensor
    grads: dict[str, Tensor]


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Model(nn.Module):
    """Tokens ``[B, L]`` and targets to a cross-entropy."""

    def __init__(self, layers: int = 4, width: int = 16, block: Callable[[int], nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(32, width)
        nn.init.normal_(self.embedding.weight, mean=1.0)  # condensed: so that the loss has a gradient to speak of
        self.blocks = nn.ModuleList(block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 32)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def tokens(batch: int = 2, length: int = 24, seed: int = 0, vocabulary: int = 32) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the parameters that have one, under the parameters' names without those of wrappers."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod.", "module."):
                name = name.replace(wrapper, "")
            found[name] = parameter.grad.clone()
    return found


def by_hand(
    model: nn.Module,
    calls: Sequence[Callable[[nn.Module], Tensor]],
    blocks: Callable[[nn.Module], Sequence[nn.Module]],
    *,
    weight: float = WEIGHT,
    options: Sequence[Mapping[str, Any]] = ({},),
    scales: Sequence[float] = (1.0,),
    flatten: bool = False,
) -> Step:
    """The sum over ``calls`` of a scale times: the model's own loss and ``weight`` times the mean reference loss of the
    blocks' outputs. It and its gradients are by a float64 copy of ``model`` without hooks."""
    model = copy.deepcopy(model).double().train()
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for call, chosen, scale in zip(calls, options, scales, strict=True):
        outputs: list[Tensor] = []

        def record(module: nn.Module, args: object, output: Any, outputs: list[Tensor] = outputs) -> None:
            outputs.append(output if isinstance(output, Tensor) else output[0])

        handles = [block.register_forward_hook(record) for block in blocks(model)]
        own = call(model)
        for handle in handles:
            handle.remove()
        outputs = [z.flatten(0, 1) for z in outputs] if flatten else outputs
        losses = [fused_dispersion_loss(z, impl="reference", **chosen) for z in outputs]
        total = total + scale * (own + weight * sum(losses) / len(losses))
    total.backward()
    return Step(total.detach(), gradients(model))


def assert_same(step: Step, exact: Step, tolerance: float = 2e-5) -> None:
    """Within ``tolerance`` of the largest entry of any gradient: the rounding of fp32."""
    torch.testing.assert_close(step.loss.double(), exact.loss, rtol=tolerance, atol=tolerance)
    assert step.grads.keys() == exact.grads.keys()
    scale = max(grad.abs().max().item() for grad in exact.grads.values())
    for name, grad in exact.grads.items():
        error = (step.grads[name].double() - grad).abs().max().item()
        assert error <= tolerance * scale, f"{name}: {error:.1e} of {scale:.1e}"


def assert_backward_has_the_temperature_of_forward(
    model: Model, forward: Callable[[], Tensor], reg: DispersionRegularizer, tau: Tensor, batch: Tensor
) -> None:
    """Of a tensor ``tau`` that is 0.5 and changes between forward and backward."""
    for now, after in ((0.5, 2.0), (2.0, 0.5)):
        model.zero_grad()
        total = forward() + reg.loss()
        tau.fill_(after)
        total.backward()
        exact = by_hand(model, [lambda m: m(batch)], lambda m: list(m.blocks), options=[{"tau": now}])  # type: ignore[arg-type]
        assert_same(Step(total.detach(), gradients(model)), exact)
