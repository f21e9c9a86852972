"""Random calls against float64: every potential, dtype and layout, and norms from 1e-25 to 1e20."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from formulas import sequence
from torch import Tensor

from dispersion_kernels import (
    AngularSpread,
    Decorrelation,
    DispersiveL2,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    SampledPairs,
    Uniformity,
    fused_dispersion_loss,
    supported,
)

pytestmark = pytest.mark.attack

CALLS = 600


@dataclass
class Case:
    z: Tensor
    """``[B, L, F]``, or ``[T, F]`` where it is packed."""
    potential: Potential
    upstream: Tensor
    """``[S]`` float64."""
    options: dict[str, Any] = field(default_factory=dict)

    def sequences(self) -> list[tuple[Tensor, Tensor | None]]:
        """The tokens and the pair ids of each."""
        mask, ids, bounds = (self.options.get(name) for name in ("mask", "document_ids", "cu_seqlens"))
        pair_ids = ids
        if mask is not None:
            pair_ids = (torch.zeros_like(mask, dtype=torch.int64) if pair_ids is None else pair_ids).masked_fill(
                ~mask, -1
            )
        if bounds is None:
            return [(z, None if pair_ids is None else pair_ids[n]) for n, z in enumerate(self.z)]
        cuts = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        return [(self.z[a:b], None if pair_ids is None else pair_ids[a:b]) for a, b in cuts]


class Dice:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def of(self, *choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def some(self, length: int, share: float) -> Tensor:
        return (torch.rand(length, generator=self.generator) < share).nonzero().flatten()


def draw(seed: int) -> Case:
    dice = Dice(seed)
    dtype = dice.of(torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    layout = dice.of("plain", "plain", "mask", "documents", "both", "packed", "packed_mask")
    length = dice.of(1, 2, 3, 1 + dice.below(40), 1 + dice.below(300), 1 + dice.below(300))
    features = dice.of(2, 3, 8, 17, 64, 96)
    batch = 1 if layout.startswith("packed") else dice.of(1, 1, 2, 3)
    z = dice.randn(batch, length, features)
    z += dice.of(0.0, 0.0, 1.0, 10.0) * dice.randn(features)
    scales = (
        [1e-2, 1.0, 1.0, 30.0]
        if dtype == torch.float16
        else [1e-25, 1e-10, 1e-4, 1.0, 1.0, 30.0, 1e4, 1e10, 1e15, 1e20]
    )
    scale = dice.of(*scales)
    z *= scale
    if dice.below(6) == 0:  # tokens of different scales
        z *= torch.tensor([dice.of(*scales) / scale for _ in range(length)], dtype=torch.float64).unsqueeze(1)
    if dice.below(8) == 0:
        z[0, 0] *= 300
    z = z.to(dtype)
    for share, change in ((0.2, "equal"), (0.1, "opposite"), (0.05, "zero"), (0.05, "constant"), (1.0, "all")):
        if dice.below(12 if change == "all" else 4):
            continue
        tokens = dice.some(length, share)
        if change in ("equal", "all"):
            z[:, tokens] = z[:, dice.below(length)].clone().unsqueeze(1)
        elif change == "opposite":
            z[:, tokens] = -z[:, dice.below(length)].clone().unsqueeze(1)
        elif change == "zero":
            z[:, tokens] = 0
        else:
            z[:, tokens] = z[:, tokens, :1].clone()
    tau = dice.of(0.02, 0.1, 1.0, 10.0)
    eps, clamp = dice.of(0.0, 1e-10, 0.01, 0.01), dice.of(0.0, 1e-9, 1e-6, 0.1, 0.25, 0.25, 0.9)
    # Of a distance: so that exponents are some, or as it comes.
    typical = min(max(float(z.double().square().mean()) * features, 1e-30), 1e30) if dice.below(2) else 1.0
    potential = dice.of(
        AngularSpread(tau, clamp, eps),
        AngularSpread(),
        Orthogonalization(dice.of(0.1, 0.5, 1.0), clamp, eps),
        Decorrelation(),
        Uniformity(dice.of(0.5, 2.0, 10.0, 30.0)),
        L2Repel(tau * typical, eps, dice.of(0.0, 0.1), bool(dice.below(2))),
        DispersiveL2(tau * typical / features, bool(dice.below(2))),
        PerplexityEntropy(tau * typical, dice.of(1e-30, 1e-10, 1e-8, 0.01, 1.0)),
        PerplexityEntropy(dice.of(1.0, 50.0)),
    )
    options: dict[str, Any] = {}
    if layout in ("mask", "both", "packed_mask"):
        options["mask"] = torch.rand(batch, length, generator=dice.generator) < dice.of(0.0, 0.3, 0.8, 1.0)
    if layout in ("documents", "both"):
        options["document_ids"] = torch.randint(-1, dice.of(1, 2, 6), (batch, length), generator=dice.generator)
    if layout.startswith("packed"):
        cuts = sorted(dice.below(length + 1) for _ in range(dice.below(5)))
        options["cu_seqlens"] = torch.tensor([0, *cuts, length], dtype=torch.int32)
        z = z[0]
        options = {name: value[0] if name == "mask" else value for name, value in options.items()}
    case = Case(z, potential, torch.ones(1), options)
    case.upstream = torch.rand(len(case.sequences()), generator=dice.generator, dtype=torch.float64) + 0.5
    return case


def complaint(case: Case, impl: str) -> str | None:
    """What is wrong with the call, in words; None if nothing is."""
    z = case.z.detach().requires_grad_()
    loss = fused_dispersion_loss(z, case.potential, reduction="none", impl=impl, **case.options)
    loss.backward(case.upstream.to(loss.dtype))
    assert z.grad is not None
    computed = torch.float64 if z.dtype == torch.float64 else torch.float32
    largest = torch.finfo(torch.float32).max
    begin, complaints = 0, []
    for n, (tokens, pair_ids) in enumerate(case.sequences()):
        exact = sequence(tokens.double(), case.potential, pair_ids, computed)
        end = begin + len(tokens)
        grad = (z.grad[begin:end] if "cu_seqlens" in case.options else z.grad[n]).double()
        begin = end
        if not len(tokens):
            continue
        if not exact.in_range and loss[n].isnan():
            continue  # as documented
        if abs(exact.loss) > largest:
            continue
        factor = case.upstream[n].item()
        # A gradient of 16 bits is rounded once, and may be beyond its range.
        expected = exact.grad * factor
        expected_in_dtype = expected.to(z.dtype)
        within = expected_in_dtype.isfinite() & (expected.abs() < 0.5 * torch.finfo(z.dtype).max)
        steps = 2.0 ** (math.log2(torch.finfo(z.dtype).eps) - 1) if z.dtype in (torch.bfloat16, torch.float16) else 0.0
        relative = 1e-11 if computed == torch.float64 else 1e-5
        if impl == "reference" or computed == torch.float64:  # where a softmax is exp(e - log(sum exp(e)))
            relative += torch.finfo(computed).eps * abs(exact.loss)
        tiny = 1e-300 if z.dtype == torch.float64 else 1e-37 if z.dtype != torch.float16 else 1e-7
        allowed = (
            4 * exact.grad_bound.unsqueeze(1) * factor + relative * expected.abs().max() + steps * expected.abs() + tiny
        )
        off = ((grad - expected).abs() / allowed).masked_fill(~within, 0.0).nan_to_num(math.inf)
        if off.max() > 1:
            complaints.append(
                f"gradient of sequence {n} off by {(grad - expected).abs().max():.1e} of {expected.abs().max():.1e}, "
                f"{off.max():.1e} times what rounding allows"
            )
        # Five standard deviations, because one pair may be the whole loss: of 1,800 sequences one is beyond 4.6.
        allowed_loss = (1e-11 if computed == torch.float64 else 2e-6) * max(1.0, abs(exact.loss)) + 5 * exact.loss_bound
        if not abs(loss[n].item() - exact.loss) <= allowed_loss:
            complaints.append(f"loss {n} is {loss[n].item():.9g}, not {exact.loss:.9g}; {allowed_loss:.1e} allowed")
    return "; ".join(complaints) or None


@pytest.mark.parametrize("impl", ["torch", "cpu", "reference"])
def test_random_calls(impl: str) -> None:
    failed, tried = [], 0
    for seed in range(CALLS):
        case = draw(seed)
        # The reference rounds every operation to the dtype of z.
        if impl == "reference" and case.z.dtype in (torch.bfloat16, torch.float16):
            continue
        if impl != "reference" and not supported(impl, case.z, case.potential):
            continue
        tried += 1
        try:
            wrong = complaint(case, impl)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            failed.append(f"{seed}: {case.potential} {tuple(case.z.shape)} {case.z.dtype} {[*case.options]}: {wrong}")
    print(f"{impl}: {tried} tried, {len(failed)} failed")
    assert not failed, "\n".join(failed)


def draw_sampled(seed: int) -> tuple[Tensor, Potential, dict[str, Any]]:
    """Tokens ``[B, L, F]`` or ``[T, F]``, a potential of the cosine, and the options of a share of the pairs."""
    dice = Dice(seed)
    dtype = dice.of(torch.float32, torch.bfloat16, torch.float16)
    pairs = dice.of(0, 1 / 64, 1 / 16, 0.3, 1)
    layout = "plain" if pairs == 0 else dice.of("plain", "mask", "documents", "packed")
    batch, length, features = (
        dice.of(1, 2),
        dice.of(1, 2, 17, 1 + dice.below(100), 1 + dice.below(600)),
        dice.of(2, 17, 40),
    )
    batch = 1 if layout == "packed" else batch
    z = dice.randn(batch, length, features) + dice.of(0.0, 1.0) * dice.randn(features)
    z *= 1.0 if dtype == torch.float16 else dice.of(1e-20, 1e-4, 1.0, 1.0, 1e4, 1e15)
    z = z.to(dtype)
    for share, value in ((0.3, "zero"), (0.2, "equal"), (0.1, "constant")):
        tokens = dice.some(length, share)
        if dice.below(4) == 0:
            z[:, tokens] = {"zero": 0 * z, "equal": z[:, :1].expand_as(z), "constant": z[:, :, :1].expand_as(z)}[value][
                :, tokens
            ]
    if dice.below(3) == 0:
        z = z.transpose(1, 2).contiguous().transpose(1, 2)
    models = ["low_rank"] + ["none"] * (pairs > 0) + ["full_rank"] * (layout == "plain")
    options: dict[str, Any] = {"sampling": SampledPairs(pairs, dice.of(*models)), "generator": seed}
    if layout == "mask":
        options["mask"] = torch.rand(batch, length, generator=dice.generator) < dice.of(0.0, 0.5, 1.0)
    if layout == "documents":
        options["document_ids"] = torch.randint(-1, dice.of(0, 1, 5), (batch, length), generator=dice.generator)
    if layout == "packed":
        cuts = sorted(dice.below(length + 1) for _ in range(dice.below(5)))
        options["cu_seqlens"] = torch.tensor([0, *cuts, length], dtype=torch.int32)
        z = z[0]
    eps = dice.of(0.0, 0.01)
    potential = dice.of(
        AngularSpread(eps=eps), Orthogonalization(eps=eps), Decorrelation(), Uniformity(), Uniformity(t=8.0)
    )
    return z, potential, options


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_random_sampled_calls(impl: str) -> None:
    """Against the same draws in float64."""

    def evaluate(z: Tensor, impl: str) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        generator = torch.Generator().manual_seed(options["generator"])
        given = {**options, "generator": generator}
        loss = fused_dispersion_loss(z, potential, reduction="none", impl=impl, **given)
        loss.sum().backward()
        assert z.grad is not None
        return loss.detach().double(), z.grad.double()

    failed, tried = [], 0
    for seed in range(CALLS):
        z, potential, options = draw_sampled(seed)
        if isinstance(potential, Decorrelation) and z.shape[-1] == 2:
            continue  # whose gradient is rounding alone
        tried += 1
        try:
            exact_loss, exact_grad = evaluate(z.double(), "torch")
            loss, grad = evaluate(z, impl)
            largest = max(exact_grad.abs().max().item() if exact_grad.numel() else 0.0, 1e-300)
            size = exact_grad.norm() / largest
            overflows = largest > 0.1 * torch.finfo(z.dtype).max or largest < torch.finfo(z.dtype).tiny
            bad_loss = not bool(((loss - exact_loss).abs() <= 1e-4).all())
            bad_grad = not bool(((grad - exact_grad) / largest).norm() <= 0.02 * size) and not overflows
            wrong = f"loss {loss.tolist()}, not {exact_loss.tolist()}" * bad_loss
            wrong += f" gradient off by {(grad - exact_grad).abs().max():.1e} of {largest:.1e}" * bad_grad
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            failed.append(f"{seed}: {potential} {tuple(z.shape)} {z.dtype} {options}: {wrong}")
    print(f"{impl}: {tried} tried, {len(failed)} failed")
    assert not failed, "\n".join(failed)
