"""FlopCounterMode counts what it counts of the naive loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import IMPLS, skip_unless_supported
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dispersion_kernels import SampledPairs, fused_dispersion_loss


def count(z: Any, backward: bool, **options: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        loss = fused_dispersion_loss(z, **options)
        if backward:
            loss.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("potential", ["angular_spread", "decorrelation", "dispersive_l2"])
def test_as_the_naive_loss(potential: str, impl: str) -> None:
    z = torch.randn(3, 40, 16, requires_grad=True)
    skip_unless_supported(impl, z, potential)
    naive = {"potential": potential, "impl": "reference"}
    ours = {"potential": potential, "impl": impl}
    assert count(z, True, **ours) == count(z, True, **naive) == 6 * 3 * 40 * 40 * 16
    assert count(z, False, recompute=True, **ours) == 2 * 3 * 40 * 40 * 16
    assert count(z, True, recompute=True, **ours) == 8 * 3 * 40 * 40 * 16
    with torch.no_grad():
        assert count(z, False, **ours) == count(z, False, **naive) == 2 * 3 * 40 * 40 * 16
    layers = [z, torch.randn(3, 40, 16)]
    assert count(layers, True, **ours) == count(layers, True, **naive) == 8 * 3 * 40 * 40 * 16
    packed = torch.randn(50, 16, requires_grad=True)
    bounds = torch.tensor([0, 7, 50], dtype=torch.int32)
    assert count(packed, True, cu_seqlens=bounds, **ours) == count(packed, True, cu_seqlens=bounds, **naive)
    mask = torch.arange(40).expand(3, 40) < 38
    assert count(z, True, mask=mask, **ours) == 6 * 3 * 40 * 40 * 16


def test_without_values() -> None:
    z = torch.randn(50, 16, device="meta", requires_grad=True)
    bounds = torch.zeros(3, dtype=torch.int32, device="meta")
    assert count(z, True, cu_seqlens=bounds, impl="torch") == 6 * 50 * 50 * 16


def test_a_fraction_of_the_pairs() -> None:
    z = torch.randn(2, 1024, 16, requires_grad=True)
    assert count(z, True, sampling=SampledPairs(1 / 16)) == 6 * 2 * 1024 * 64 * 16
    assert count(z, True, sampling=SampledPairs(0)) == 0
    assert count(z, True, sampling=SampledPairs(1.0)) == 6 * 2 * 1024 * 1024 * 16
    # Blocks of packed sequences have the size of a sixteenth of the mean length, of a longer sequence, too.
    packed = torch.randn(2048, 16, requires_grad=True)
    bounds = torch.tensor([0, 1536, 2048], dtype=torch.int32)
    assert count(packed, True, cu_seqlens=bounds, sampling=SampledPairs(1 / 16)) == 6 * 2048 * 64 * 16


def test_compiled_and_checkpointed() -> None:
    z = torch.randn(3, 40, 16, requires_grad=True)

    def loss(z: Tensor) -> Tensor:
        return fused_dispersion_loss(torch.tanh(z))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    compiled(z).backward()
    for function in (compiled, lambda z: checkpoint(loss, z, use_reentrant=False)):
        with FlopCounterMode(display=False) as counter:
            function(z).backward()
        again = 1 + (function is not compiled)
        assert counter.get_total_flops() == again * 6 * 3 * 40 * 40 * 16
