"""What the GPU backends share, as far as it runs without a GPU."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dispersion_kernels import AngularSpread, segments
from dispersion_kernels.backends import cuda
from dispersion_kernels.backends.gpu import launch

MATMUL = torch.backends.cuda.matmul


class Standardized(AngularSpread):
    row_transform = "standardize"


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
            from dispersion_kernels.backends.triton.backend import TritonKernels

            assert TritonKernels(z, "sm_90").precision == expected
        if cuda.unavailable_reason() is None:
            assert cuda.CudaKernels(z).element == {"ieee": "bf16"}.get(expected, expected)


@pytest.mark.parametrize("allowed", [False, True])
def test_products_accumulate_in_fp32_whatever_the_process_allows(allowed: bool) -> None:
    def fail() -> None:
        with launch.fp32_accumulation():
            assert not MATMUL.allow_fp16_accumulation
            assert not MATMUL.allow_bf16_reduced_precision_reduction
            raise ValueError("inside")

    before = MATMUL.allow_bf16_reduced_precision_reduction
    MATMUL.allow_fp16_accumulation = MATMUL.allow_bf16_reduced_precision_reduction = allowed
    try:
        with pytest.raises(ValueError, match="inside"):
            fail()
        assert MATMUL.allow_fp16_accumulation == allowed
        assert MATMUL.allow_bf16_reduced_precision_reduction == allowed
    finally:
        MATMUL.allow_fp16_accumulation, MATMUL.allow_bf16_reduced_precision_reduction = False, before


@pytest.mark.parametrize("kind", ["packed", "masked", "unsorted"])
def test_ranges_of_tiles(kind: str) -> None:
    """Every pair of tiles that share a pair id is in them, and where the ids are sorted nothing else."""
    pair_ids = torch.randint(0, 40, (2, 1000), dtype=torch.int32).sort(1).values
    if kind == "masked":
        pair_ids[torch.rand(pair_ids.shape) > 0.7] = -1
        pair_ids[1, 300:500] = -1  # whole tiles
    elif kind == "unsorted":
        pair_ids = pair_ids[:, torch.randperm(1000)]
    got = launch._tile_ranges(pair_ids, 64, 32)
    for b in range(2):
        tile_ids = [set(tile[tile >= 0].tolist()) for tile in pair_ids[b].split(32)]
        for tile, (first, end) in zip(pair_ids[b].split(64), got[b].tolist(), strict=True):
            own = set(tile[tile >= 0].tolist())
            meets = [j for j, other in enumerate(tile_ids) if own & other]
            assert set(meets) <= set(range(first, end))
            if kind == "packed":
                assert meets == list(range(first, end))
            if not own:
                assert first >= end


@pytest.mark.parametrize("block_m", [32, 64, 128])
def test_packed_sequences_need_no_sort(block_m: int) -> None:
    for _ in range(20):
        lengths = torch.randint(0, 150, (9,)) * torch.randint(0, 2, (9,))
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        length = int(bounds[-1])
        if length == 0:
            continue
        sorted_ids = launch._partners(segments.within_segments(None, bounds, length), bounds)
        found = launch._partners_in_segments(bounds, length)
        for name in ("pair_ids", "counts", "pairs", "tokens"):
            torch.testing.assert_close(getattr(found, name), getattr(sorted_ids, name), rtol=0, atol=0)
        ranges = launch._tile_ranges_of_segments(found.pair_ids, found.ends, block_m, 64)
        torch.testing.assert_close(ranges, launch._tile_ranges(found.pair_ids, block_m, 64), rtol=0, atol=0)


def test_ranges_of_tiles_take_memory_linear_in_the_tokens() -> None:
    pair_ids = torch.arange(1 << 17, dtype=torch.int32)[None] // 999
    with LargestTensor() as largest:
        launch._tile_ranges(pair_ids, 64, 32)
    assert largest.elements <= pair_ids.numel()


class LargestTensor(TorchDispatchMode):
    """How many elements the largest result of an operation has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(one.numel() for one in tree_leaves(result) if isinstance(one, Tensor)))
        return result


def test_bounds_on_the_cpu_are_copied_once_for_the_same_values() -> None:
    bounds = torch.tensor([0, 3, 5], dtype=torch.int32)
    meta = torch.device("meta")
    copy = segments.on_device(bounds, meta)
    assert segments.on_device(bounds.clone(), meta) is copy
    assert segments.on_device(bounds.long(), meta).dtype == torch.int64
    bounds.numpy()[1] = 4  # of which PyTorch sees nothing
    assert segments.on_device(bounds, meta) is not copy
    assert segments.on_device(bounds, torch.device("cpu")) is bounds


@pytest.mark.parametrize("features", [128, 768], ids=["fused", "workspace"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layers", [1, 12])
def test_launches_and_operations_of_a_call(layers: int, reduction: str, features: int) -> None:
    """Forward takes at most 6 (fused: 5) and backward one, for any number of layers, beside the library's products, one
    a layer, and, where the slopes of all rows do not fit the workspace, two launches for each further filling of it."""
    forward, backward, operations = _recorded([(8, 1024, features)] * layers, reduction)
    assert backward == ["token_gradients_kernel"]
    products = [name for name in operations if "bmm" in name]
    fillings = forward.count("pair_tiles_kernel")
    if features == 128:
        assert (products, fillings) == ([], 0)
    else:
        assert len(products) == layers
        assert fillings == math.ceil(8 * layers * 2 * 1024**2 / launch.WORKSPACE_BYTES)
    launches = len(forward) + len(operations) - len(products) - 2 * max(0, fillings - 1)
    assert launches <= (5 if features == 128 else 6)


@pytest.mark.parametrize("potential", [AngularSpread(eps=0.5), Standardized(eps=0.5)], ids=lambda p: p.row_transform)
def test_last_step_of_backward_is_the_derivative_of_the_row_transform(potential: AngularSpread) -> None:
    """``norm_eps`` is a part of ``normalize`` alone."""
    z, g = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 8, dtype=torch.float64)
    if potential.row_transform == "standardize":
        centred = z - z.mean(2, keepdim=True)
        inverse = 1 / centred.norm(dim=2)
    else:
        centred, inverse = z, 1 / (z.norm(dim=2) + 0.5)
    (exact,) = torch.autograd.grad((g * centred * inverse.unsqueeze(2)).sum(), z)
    one = torch.ones(2, 5, dtype=torch.float64)
    (found,) = launch.finish_by_operations([g], [z.detach()], inverse.detach()[None], one, potential, torch.float64)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize(("multiprocessors", "tiles"), [(108, 18), (128, 21), (132, 22), (148, 24)])
def test_blocks_fill_the_multiprocessors(multiprocessors: int, tiles: int) -> None:
    """A100, RTX 4090, H100, B200: six tiles of 128 features for each of a block's tiles of tokens make a whole wave."""
    most = math.isqrt(launch.WORKSPACE_BYTES // 4)
    assert launch.block_size(32_768, 768, 128, most, multiprocessors) == 128 * tiles
    assert 0.97 < 6 * tiles / multiprocessors <= 1


@pytest.mark.parametrize(
    ("length", "tile", "most"), [(5000, 64, 2172), (261, 64, 64), (10**7, 128, 3072), (129, 128, 128)]
)
def test_blocks_hold_whole_tiles_and_fit(length: int, tile: int, most: int) -> None:
    size = launch.block_size(length, 1600, tile, most, 132)
    assert size % tile == 0
    assert tile <= size <= most


def test_operations_of_a_padding_mask() -> None:
    """A mask costs at most 15 operations, none of which sorts twice or goes over the tokens' features."""
    shapes = [(8, 1024, 768)] * 2
    forward, backward, operations = _recorded(shapes, "mean")
    mask = torch.ones(8, 1024, dtype=torch.bool, device="meta")
    masked_forward, masked_backward, masked_operations = _recorded(shapes, "mean", mask)
    assert (masked_forward, masked_backward) == (forward, backward)
    assert len(masked_operations) - len(operations) <= 15
    assert sum("sort" in name.replace("searchsorted", "") for name in masked_operations) == 1


def _recorded(
    shapes: list[tuple[int, int, int]], reduction: str, mask: Tensor | None = None
) -> tuple[list[str], list[str], list[str]]:
    """Names of Triton's kernels in forward and in backward, and of PyTorch's operations other than views and
    allocations; on tensors without memory."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from dispersion_kernels.backends.triton.backend import TritonKernels

    launched: list[str] = []

    def kernels(z: Tensor) -> TritonKernels:
        return TritonKernels(z, "sm_90", run=lambda kernel, *_: launched.append(kernel.__name__))

    z = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    with Operations() as operations:
        pair_ids = segments.make_pair_ids(mask, None)
        requested = [True] * len(z)
        loss, gradients, scale = launch.run(kernels, z, pair_ids, None, AngularSpread(), reduction, requested)
        forward = list(launched)
        assert scale is not None
        factor = loss if loss.dim() == 0 else loss.unsqueeze(1)
        launch.finish(kernels, gradients, z, scale, factor, AngularSpread(), torch.bfloat16)
    return forward, launched[len(forward) :], operations.names


class Operations(TorchDispatchMode):
    """Names of the operations that launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        # Widening of 16-bit factors, before a product, is for devices whose products have no fp32 result.
        widens = name == "aten::_to_copy" and args[0].dim() == 3 and args[0].element_size() == 2
        if not (func.is_view or widens or name.startswith(("aten::empty", "aten::new_empty"))):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_a_sequence_without_a_pair_has_contiguous_gradients() -> None:
    """The kernel of backward takes contiguous gradients, whatever the layout of the tokens."""
    z = torch.randn(8, 4).T.unsqueeze(1)
    for layers in ([z], [z, z]):
        _, gradients, _ = launch.run(lambda _: None, layers, None, None, AngularSpread(), "mean", [True] * len(layers))
        assert all(gradient.is_contiguous() for gradient in gradients)
