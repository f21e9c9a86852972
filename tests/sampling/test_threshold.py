"""Length from which pairs are sampled on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dispersion_kernels import SampledPairs
from dispersion_kernels.options import LossOptions, check_options
from dispersion_kernels.sampling import ControlVariate, threshold
from dispersion_kernels.sampling.estimate import draw, estimate
from dispersion_kernels.sampling.threshold import evaluates_all

SECONDS_PER_OPERATION = threshold.SECONDS_PER_OPERATION
# Operations that launch nothing.
FREE = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "lift_fresh", "permute", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_unsafe_view"),
    *("empty", "empty_like", "empty_strided", "new_empty"),
}


class Counted(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator._schema.name.removeprefix("aten::") not in FREE
        return operator(*args, **(kwargs or {}))


def sampled(control_variate: ControlVariate = "low_rank", impl: str = "auto") -> LossOptions:
    return check_options("angular_spread", 1.0, SampledPairs(1 / 16, control_variate), "mean", False, impl)


@pytest.mark.parametrize("control_variate", get_args(ControlVariate))
def test_operations_are_as_many_as_said(control_variate: ControlVariate) -> None:
    def no_sweep(layers: Any, *_: Any) -> Any:
        z = layers[0]
        return torch.zeros(z.shape[0]), [torch.zeros_like(z)], torch.zeros(1, *z.shape[:2])

    layers = [torch.randn(1, 2048, 64)]
    options = sampled(control_variate, "torch")
    with Counted() as counted:
        draws = draw(layers, 1 / 16, None)
        estimate(layers, None, None, options, draws, True, False, no_sweep)
    assert counted.count == pytest.approx(threshold.OPERATIONS[control_variate], rel=0.15)


def on_gpu(length: int, dtype: torch.dtype, patch: pytest.MonkeyPatch, **properties: int) -> Tensor:
    """Tokens ``[1, length, 768]`` without memory, on a GPU with these properties."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (properties["major"], properties["minor"]))
    patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    patch.setattr(threshold, "SECONDS_PER_OPERATION", SECONDS_PER_OPERATION)
    threshold._peak_rate.cache_clear()
    with FakeTensorMode():
        return torch.empty(1, length, 768, dtype=dtype, device="cuda")


A100 = {"major": 8, "minor": 0, "multi_processor_count": 108, "clock_rate": 1_410_000}
H100 = {"major": 9, "minor": 0, "multi_processor_count": 132, "clock_rate": 1_830_000}
RTX_4090 = {"major": 8, "minor": 9, "multi_processor_count": 128, "clock_rate": 2_520_000}


@pytest.mark.parametrize(
    ("properties", "dtype", "length"),
    [
        # By hand: sqrt(1.6 ms * 0.4 * peak / (3 * 768)), with peaks of 312, 989 and 165 TFLOP/s in 16 bits.
        (A100, torch.bfloat16, 9_310),
        (H100, torch.bfloat16, 16_575),
        (RTX_4090, torch.float16, 6_771),
        (H100, torch.float32, 6_767),
    ],
    ids=str,
)
def test_all_pairs_up_to_a_length(
    properties: dict[str, int], dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokens, expected in ((int(0.97 * length), True), (int(1.03 * length), False)):
        z = on_gpu(tokens, dtype, monkeypatch, **properties)
        assert evaluates_all(sampled(), z, None) == expected
    # A plain estimate takes a sixth of the operations, and the torch backend does not reach these rates.
    z = on_gpu(length // 2, dtype, monkeypatch, **properties)
    assert not evaluates_all(sampled("none"), z, None)
    assert not evaluates_all(sampled(impl="torch"), z, None)
    assert not evaluates_all(sampled(), on_gpu(length // 2, torch.float64, monkeypatch, **properties), None)
    threshold._peak_rate.cache_clear()


def test_a_cpu_samples_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "SECONDS_PER_OPERATION", 1.0)
    assert not evaluates_all(sampled(), torch.empty(1, 1024, 64), None)
