"""What the GPU backends share, as far as it runs without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import pytest
import torch

from dispersion_kernels import cuda
from dispersion_kernels.gpu import launch

MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def _default_precision() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def _matmul(value: str) -> None:
    MATMUL.fp32_precision = value


def _everywhere(value: str) -> None:
    MATMUL.fp32_precision = "none"
    torch.backends.fp32_precision = value


@pytest.mark.usefixtures("_default_precision")
@pytest.mark.parametrize(
    ("choose", "value", "precision"),
    [
        (torch.set_float32_matmul_precision, "highest", "tf32x3"),
        (torch.set_float32_matmul_precision, "high", "tf32"),
        (torch.set_float32_matmul_precision, "medium", "tf32"),
        (_matmul, "tf32", "tf32"),
        (_matmul, "ieee", "tf32x3"),
        (_everywhere, "tf32", "tf32"),
        (_everywhere, "ieee", "tf32x3"),
        (_everywhere, "none", "tf32x3"),
    ],
)
def test_fp32_products_follow_each_of_pytorchs_settings(
    choose: Callable[[str], None], value: str, precision: str
) -> None:
    choose(value)
    assert launch.fp32_precision() == precision
    for dtype, expected in ((torch.float32, precision), (torch.bfloat16, "ieee")):
        z = torch.zeros(1, 2, 2, dtype=dtype)
        if importlib.util.find_spec("triton") is not None:
            from dispersion_kernels.triton.backend import TritonKernels

            assert TritonKernels(z, "sm_90").precision == expected
        if cuda.unavailable_reason() is None:
            assert cuda.CudaKernels(z).element == {"ieee": "bf16"}.get(expected, expected)


@pytest.mark.parametrize("allowed", [False, True])
def test_fp16_products_accumulate_in_fp32_whatever_the_process_allows(allowed: bool) -> None:
    def fail() -> None:
        with launch.fp32_accumulation():
            assert not MATMUL.allow_fp16_accumulation
            raise ValueError("inside")

    MATMUL.allow_fp16_accumulation = allowed
    try:
        with pytest.raises(ValueError, match="inside"):
            fail()
        assert MATMUL.allow_fp16_accumulation == allowed
    finally:
        MATMUL.allow_fp16_accumulation = False
