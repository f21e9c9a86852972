"""Random calls of the public functions: legal ones agree with float64, and whatever else is given for an argument works
or is an error that names an argument."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import oracle, relative_errors
from torch import Tensor

from dispersion_kernels import DispersionLoss, fused_dispersion_loss, supported
from dispersion_kernels.condensation import condensation_by_layer, mean_pairwise_cosine
from dispersion_kernels.potentials import BUILT_IN

CALLS = 150
LONG = 3_000


class Draw:
    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def legal(self) -> tuple[Tensor, dict[str, Any]]:
        """Tokens and options that must work."""
        dice = self.dice
        batch, length, features = dice.choice([1, 2, 3]), dice.choice([1, 2, 7, 40]), dice.choice([2, 8, 33])
        packed = dice.random() < 0.3
        shape = (length, features) if packed or dice.random() < 0.3 else (batch, length, features)
        z = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        z = (z + dice.choice([0.0, 1.0])).to(dice.choice([torch.float32, torch.float64, torch.bfloat16]))
        name = dice.choice([*BUILT_IN])
        options: dict[str, Any] = {"potential": name}
        fields = {field.name for field in dataclasses.fields(BUILT_IN[name])}
        values = {"tau": [0.5, 2, np.float64(3.0)], "clamp": [0.1, 0.5], "eps": [0.01, 0.3]}
        some = [field for field in values if field in fields and dice.random() < 0.5]
        if some == ["tau"]:
            options["tau"] = dice.choice(values["tau"])
        elif some:
            made: Any = BUILT_IN[name]
            options["potential"] = made(**{field: dice.choice(values[field]) for field in some})
        if "sigma2" in fields or "norm_weight" in fields:
            options = {"potential": BUILT_IN[name](30.0)}  # exponents of some
        if dice.random() < 0.4:
            options["mask"] = torch.rand(shape[:-1], generator=self.generator) < 0.7
        if packed:
            cuts = sorted(dice.randrange(length + 1) for _ in range(dice.randrange(4)))
            options["cu_seqlens"] = torch.tensor([0, *cuts, length], dtype=dice.choice([torch.int32, torch.int64]))
            if dice.random() < 0.5:
                options["max_seqlen"] = int(options["cu_seqlens"].diff().max())
        elif dice.random() < 0.3:
            ids = torch.randint(-1, 3, shape[:-1], generator=self.generator)
            options["document_ids"] = ids.to(dice.choice([torch.int64, torch.int32, torch.int8]))
        options["recompute"] = dice.random() < 0.3
        options["impl"] = dice.choice(["auto", "torch", "torch", "reference"])
        return z, options

    def hostile(self) -> Any:
        """Hostile value for an argument, of a kind that somebody has given."""
        shapes = [(), (2,), (2, 7), (2, 7, 8), (2, 2, 7, 8), (0, 7, 8), (2, 0, 8), (2, 7, 0), (2, 7, 1)]
        dtypes = [torch.float32, torch.float16, torch.float64, torch.bool, torch.int32, torch.int64, torch.complex64]
        ones = torch.ones(self.dice.choice(shapes), dtype=self.dice.choice(dtypes))
        plain = [None, True, False, -1, 0, 1, 2, 3.5, 2**80, math.nan, math.inf, -math.inf, 1e-320, "x", "", b"x", 1j]
        objects = [(), [], [1], {}, abs, object(), torch.float32, type(self), torch.Generator(), iter([]), np.int64(3)]
        tensors = [
            ones,
            ones.to("meta"),
            ones.to_sparse(),
            ones.numpy(),
            [ones],
            [ones, ones[None]],
            {"hidden_states": ones},
        ]
        tensors += [torch.tensor([-1, 2**40]), torch.tensor([7, 0, 3]), torch.full((2, 7, 8), math.nan)]
        tensors += [torch.quantize_per_tensor(torch.ones(2, 7, 8), 0.1, 0, torch.qint8), torch.nn.Linear(2, 2)]
        return self.dice.choice(self.dice.choice([plain, objects, tensors]))


def wrong_answer(seed: int) -> str | None:
    """Fault of a legal call, in words; None if the call is right."""
    z, options = Draw(seed).legal()
    if options["potential"] == "decorrelation" and z.shape[-1] == 2:
        return None  # of which the gradient is rounding alone
    tokens = z.detach().requires_grad_()
    loss = fused_dispersion_loss(tokens, reduction="none", **options)
    loss.sum().backward()
    assert tokens.grad is not None
    if z.dtype == torch.bfloat16 and options["impl"] == "reference":
        return None  # every operation of which is rounded
    potential = options.pop("potential")
    exact = oracle(z, potential, **options)
    answer = exact._replace(loss=loss.detach(), grad=tokens.grad)
    if not loss.numel():
        return None
    loss_error, grad_error = relative_errors(answer, exact)
    if exact.grad.abs().max() < 1e-6:  # of rounding alone
        grad_error = 0.0 if tokens.grad.abs().max() < 1e-4 else math.inf
    rounding = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-8}[z.dtype]
    return (
        None
        if loss_error <= rounding and grad_error <= rounding * 10
        else f"loss off by {loss_error:.1e}, gradient {grad_error:.1e}"
    )


def surprise(seed: int) -> str | None:
    """Outcome of a call with one or two hostile arguments if it is neither a result nor an error in words; None if
    nothing."""
    draw = Draw(seed)
    dice = draw.dice
    z, options = draw.legal()
    others = [DispersionLoss, supported, mean_pairwise_cosine, condensation_by_layer]
    function: Any = fused_dispersion_loss if dice.random() < 0.6 else dice.choice(others)
    names = [*inspect.signature(function).parameters]
    if function is fused_dispersion_loss:
        arguments: dict[str, Any] = {"z": dice.choice([z, [z, z]]), **options}
    else:
        arguments = {"impl": {"impl": "cpu"}}.get(names[0], {})
        arguments |= {name: [z] if name == "hidden" else z for name in names if name in ("z", "hidden")}
    for _ in range(dice.choice([1, 1, 2])):
        arguments[dice.choice(names)] = draw.hostile()
    try:
        function(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        message = str(error)
        known = [*names, "z", "fraction", "potential", "tau", "clamp", "eps", "margin", "t", "sigma2"]
        if not any(re.search(rf"\b{name}\b", message) for name in known):
            return f"{type(error).__name__} that names no argument: {message[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def failures(found: Callable[[int], str | None], seeds: range) -> list[str]:
    failed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a mask without a pair
        for seed in seeds:
            try:
                wrong = found(seed)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                failed.append(f"seed {seed}: {wrong}")
    return failed


@pytest.mark.parametrize("found", [wrong_answer, surprise])
def test_random_arguments(found: Callable[[int], str | None]) -> None:
    failed = failures(found, range(CALLS))
    assert not failed, "\n".join(failed)


@pytest.mark.attack
@pytest.mark.parametrize("found", [wrong_answer, surprise])
def test_many_random_arguments(found: Callable[[int], str | None]) -> None:
    failed = failures(found, range(CALLS, LONG))
    assert not failed, "\n".join(failed)
