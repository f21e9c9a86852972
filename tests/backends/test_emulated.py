"""The compiled PTX of the GPU kernels, run on the CPU by an emulator that finds races, missing waits and wild accesses.

The launcher runs as on a GPU. Each Triton launch is specialised and compiled as Triton would; the CUDA kernels come
through their operators, whose launches go to the emulator, with the PTX that the extension has. The emulator is not
part of this repository: without it, beside the repository, these tests are skipped, and those of a backend that is not
installed, too.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import published_values as published
import pytest
import torch
from conftest import (
    INTERPRETED,
    POTENTIALS,
    Answer,
    Edge,
    assert_as_accurate_as_naive,
    edges,
    oracle,
    relative_errors,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dispersion_kernels import AngularSpread, Decorrelation, DispersiveL2, L2Repel, Potential, SampledPairs, Uniformity
from dispersion_kernels.backends import cuda
from dispersion_kernels.backends.gpu import launch
from dispersion_kernels.backends.interface import Losses
from dispersion_kernels.backends.torch_tiled import sweep
from dispersion_kernels.options import check_options
from dispersion_kernels.sampling.estimate import draw, estimate
from kernel_audit import sass

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
if not (SHARED / "ptx_emulator").is_dir():
    pytest.skip("the PTX emulator is not beside this repository", allow_module_level=True)
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
sys.path.append(str(SHARED))

import ptx_emulator  # noqa: E402

pytestmark = pytest.mark.emulator
SEEDS = (1, 2, 3)
# How tensor cores round a sum, once an instruction: to nearest ("rn") or, more as they do, toward zero ("rz").
_ROUNDING = ["rn"]
# Of kernels that have run with all of them: later launches take one.
_SEEN: set[tuple[str, str]] = set()


def emulate(
    ptx: str,
    name: str,
    grid: tuple[int, ...],
    threads: int,
    shared: int,
    arguments: Callable[[dict[int, Tensor]], list[Any]],
    tensors: Iterable[Tensor],
    conflicts: bool,
) -> None:
    """Runs a launch on ``tensors``; a kernel, the first time, with each seed, which must give the same bits.

    ``conflicts``: whether its accesses to shared memory (ldmatrix, loads and stores; the emulator does not count those
    of wgmma and of copies) may meet in a bank. ``arguments`` makes the emulator's arguments from the storages of
    ``tensors``, by their addresses. Arguments that share memory share it in the emulator, too: they are whole storages
    and an offset.
    """
    storages = {t.untyped_storage().data_ptr(): _bytes_of(t) for t in tensors if t.numel()}
    before = {pointer: storage.clone() for pointer, storage in storages.items()}
    first: dict[int, Tensor] = {}
    seeds = SEEDS[:1] if (ptx, name) in _SEEN else SEEDS
    _SEEN.add((ptx, name))
    for seed in seeds:
        for pointer, storage in storages.items():
            storage.copy_(before[pointer])
        report = _load(ptx).launch(
            name, grid, threads, arguments(storages), dynamic_shared=shared, seed=seed, tensor_rounding=_ROUNDING[-1]
        )
        assert report.ok, report.summary()
        assert conflicts or not report.bank_conflicts, report.summary()
        for pointer, storage in storages.items():
            same = torch.equal(first.setdefault(pointer, storage.clone()), storage)
            assert same, f"{name}: other bits with seed {seed}"


def _bytes_of(tensor: Tensor) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def _pointer(address: int, storages: dict[int, Tensor]) -> Any:
    """The argument for an address in one of the storages; None for another."""
    for begin, storage in storages.items():
        if begin <= address < begin + storage.numel():
            return ptx_emulator.Buffer(storage.numpy(), "inout", 256, address - begin)
    return None


@functools.cache
def _load(ptx: str) -> Any:
    return ptx_emulator.load(ptx)


# ---- Triton


@contextmanager
def triton_kernels(z: Tensor, arch: str) -> Iterator[launch.Kernels]:
    pytest.importorskip("triton", reason="Triton is not installed")
    from dispersion_kernels.backends.triton.backend import TritonKernels
    from kernel_audit import ahead_of_time

    def run(kernel: Any, grid: tuple[int, ...], values: dict[str, Any], options: dict[str, int]) -> None:
        specialization = ahead_of_time.specialize(kernel, values)
        compiled = ahead_of_time.compile_for(kernel, specialization, arch, options)
        # A specialised integer is no parameter; a tuple is one for each of its tensors.
        names = [name for name, kind in specialization.signature.items() if kind != "constexpr"]
        parts = [values[name] if isinstance(values[name], tuple) else (values[name],) for name in names]
        flat = [value for part in parts for value in part]

        def arguments(storages: dict[int, Tensor]) -> list[Any]:
            return [_pointer(value.data_ptr(), storages) if isinstance(value, Tensor) else value for value in flat]

        tensors = [value for value in flat if isinstance(value, Tensor)]
        threads, shared = 32 * options["num_warps"], compiled.metadata.shared
        emulate(compiled.asm["ptx"], kernel.__name__, grid, threads, shared, arguments, tensors, conflicts=True)

    yield TritonKernels(z, arch, run=run)


# ---- CUDA


class _Tensors(TorchDispatchMode):
    """The tensors of the operator of a CUDA kernel that runs now."""

    now: ClassVar[list[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("dispersion_kernels::cuda_"):
            flat = [value for arg in args for value in (arg if isinstance(arg, list) else [arg])]
            _Tensors.now = [value for value in flat if isinstance(value, Tensor)]
        return func(*args, **(kwargs or {}))


@contextmanager
def _joined(tensors: list[Tensor], join: bool) -> Iterator[tuple[list[Tensor], Callable[[int], Any]]]:
    """The tensors, and where an address in one of them is; with ``join`` they lie in one piece of memory meanwhile, so
    that the emulator keeps their distances. None for an address in none of them."""
    storages = {t.untyped_storage().data_ptr(): _bytes_of(t) for t in tensors if t.numel()}
    places = dict.fromkeys(storages, 0)
    memory = torch.empty(
        sum(-(-storage.numel() // 256) * 256 for storage in storages.values()) if join else 0, dtype=torch.uint8
    )
    end = 0
    for begin, storage in storages.items():
        places[begin] = memory.data_ptr() + end if join else begin
        if join:
            memory[end : end + storage.numel()] = storage
            end += -(-storage.numel() // 256) * 256

    def moved(address: int) -> Any:
        of = next((begin for begin, storage in storages.items() if begin <= address < begin + storage.numel()), None)
        return None if of is None else places[of] + address - of

    yield ([memory] if join else tensors), moved
    if join:
        for begin, storage in storages.items():
            at = places[begin] - memory.data_ptr()
            storage.copy_(memory[at : at + storage.numel()])


@contextmanager
def cuda_kernels(z: Tensor, arch: str) -> Iterator[launch.Kernels]:
    if cuda.unavailable_reason() is not None:
        pytest.skip(f"no CUDA kernels: {cuda.unavailable_reason()}")
    if not _cuda_ptx(arch):
        wanted = arch.removeprefix("sm_").replace("0", ".0") + "+PTX"
        pytest.skip(f"the CUDA kernels were built without PTX for {arch}: TORCH_CUDA_ARCH_LIST has no {wanted}")

    def watch(launched: cuda.Launch) -> None:
        ptx = _cuda_ptx(arch)[launched.kernel]
        parameters = _load(ptx).kernels[launched.kernel].params
        pieces = zip(launched.arguments, parameters, strict=True)
        raw = [ctypes.string_at(address, size) for address, (_, _, size) in pieces]
        maps = len(raw) - 1 if launched.kernel.endswith("_wgmma") else None
        # Of the other parameters of more than eight bytes, which are the distances of the layers from the first.
        distances = {
            n: torch.frombuffer(bytearray(part), dtype=torch.int64)
            for n, part in enumerate(raw)
            if len(part) > 8 and n != maps
        }
        several = any(part.any() for part in distances.values())
        with _joined(_Tensors.now, several) as (tensors, moved):

            def arguments(storages: dict[int, Tensor]) -> list[Any]:
                flat: list[Any] = []
                for n, part in enumerate(raw):
                    # Eight bytes are an address of a tensor, or a number that is none.
                    address = moved(int.from_bytes(part, "little")) if len(part) == 8 else None
                    if n in distances:
                        first = int.from_bytes(raw[n - 1], "little")
                        there = [moved(first + d) - moved(first) if d else 0 for d in distances[n].tolist()]
                        part = torch.tensor(there).numpy().tobytes()
                    if n == maps:
                        part = _tensor_maps(part, flat[0], moved, _load(ptx))
                    flat.append(part if address is None else _pointer(address, storages))
                return flat

            emulate(
                ptx,
                launched.kernel,
                launched.grid,
                launched.threads,
                launched.shared,
                arguments,
                tensors,
                conflicts=False,
            )

    with cuda.watch_launches(watch, arch), _Tensors():
        yield cuda.CudaKernels(z)


def _tensor_maps(sources: bytes, z: Any, moved: Callable[[int], Any], module: Any) -> bytes:
    """The emulator's tensor maps in place of what they are made of, ``TensorMapSource`` of operators.cpp; ``z`` is the
    first argument, and what the maps are of lies in its memory."""
    # As the emulator will place its first argument.
    begin = ptx_emulator.memory.GLOBAL_BASE + module._arena().reserve(z.array.nbytes, "z", z.align)
    maps = []
    for n in range(0, len(sources), 128):
        address, *sizes_and_strides, x, y, z_box, swizzle = struct.unpack_from("<6Q4I", sources, n)
        if address == 0:
            maps.append(bytes(128))
            continue
        place = moved(address) - z.array.__array_interface__["data"][0]
        sizes, strides = sizes_and_strides[2::-1], sizes_and_strides[:2:-1]
        elements = torch.empty(0, dtype=torch.int16).numpy()
        tensor_map = ptx_emulator.TensorMap(elements, (z_box, y, x), swizzle, tuple(sizes), (*strides, 2))
        maps.append(tensor_map.encode(begin + place))
    return b"".join(maps)


@functools.cache
def _cuda_ptx(arch: str) -> dict[str, str]:
    """The PTX of each kernel of the extension alone."""
    kernels: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        command = [sass.tool_path("cuobjdump"), "-xptx", "all", str(cuda.LIBRARY)]
        subprocess.run(command, cwd=directory, check=True, capture_output=True)
        for path in Path(directory).glob(f"*.{arch}.ptx"):
            head, *entries = path.read_text().split(".visible .entry ")
            for entry in entries:
                kernels[entry.split("(", 1)[0].strip()] = head + ".visible .entry " + entry
    return kernels


KERNELS = {"triton": triton_kernels, "cuda": cuda_kernels}


def dispersion(
    layers: list[Tensor],
    potential: Potential,
    backend: str,
    pair_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    with_grad: bool = True,
    max_seqlen: int | None = None,
) -> launch.Result:
    name, arch = backend.split("-")
    with KERNELS[name](layers[0], arch) as kernels:
        return launch.dispersion(layers, potential, pair_ids, cu_seqlens, with_grad, kernels, max_seqlen=max_seqlen)


def finished(losses: launch.Result, layers: list[Tensor], potential: Potential, backend: str) -> list[Tensor]:
    """Gradient of each layer in its dtype."""
    assert losses.scale is not None
    name, arch = backend.split("-")
    with KERNELS[name](layers[0], arch) as kernels:
        found = launch.finish(
            lambda _: kernels, losses.gradients, layers, losses.scale, torch.tensor(1.0), potential, layers[0].dtype
        )
    return [gradient for gradient in found if gradient is not None]


def evaluate(
    z: Tensor,
    potential: Potential,
    backend: str,
    pair_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Answer:
    losses = dispersion([z], potential, backend, pair_ids, cu_seqlens, max_seqlen=max_seqlen)
    return Answer(losses.loss[0].float(), finished(losses, [z], potential, backend)[0])


def check(z: Tensor, potential: Potential, backend: str) -> None:
    assert_as_accurate_as_naive(z, potential, evaluate(z, potential, backend), oracle(z, potential))


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape) * 0.7 + 0.4 * torch.randn(shape[-1])).to(dtype)


BACKENDS = ["triton-sm_80", "triton-sm_90", "cuda-sm_80", "cuda-sm_90a"]
# sm_90a has sm_80's kernels of one slice, which test_every_dtype and others run: it is left out of every potential.
STRATEGIES = [
    pytest.param(backend, features, id=f"{name}-{backend}")
    for backend in BACKENDS
    for features, name in ((36, "fused"), (200, "workspace"))
    if (backend, name) != ("cuda-sm_90a", "fused")
]


@pytest.mark.parametrize(("backend", "features"), STRATEGIES)
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_every_potential(potential: Potential, features: int, backend: str) -> None:
    """More than one tile of tokens, and the last ones ragged: of 64 (one slice of features) and 128 (several)."""
    z = tokens(1, 67 if features < 128 else 133, features)
    answer = evaluate(z, potential, backend)
    assert_as_accurate_as_naive(z, potential, answer, oracle(z, potential))
    alone = dispersion([z], potential, backend, with_grad=False)
    torch.testing.assert_close(alone.loss[0].float(), answer.loss, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [36, 200], ids=["fused", "workspace"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "highest"), (torch.float32, "highest"), (torch.float32, "high")],
    ids=["fp16", "fp32", "tf32"],
)
def test_every_dtype(dtype: torch.dtype, precision: str, features: int, backend: str) -> None:
    z = tokens(1, 67, features, dtype=dtype)
    torch.set_float32_matmul_precision(precision)
    try:
        answer = evaluate(z, AngularSpread(), backend)
        bounds = torch.tensor([0, 67], dtype=torch.int32)
        for potential in (AngularSpread(), AngularSpread(tau=0.005)):
            alone = dispersion([z], potential, backend, cu_seqlens=bounds, with_grad=False)
            exact_loss = oracle(z[0], potential, cu_seqlens=bounds).loss
            torch.testing.assert_close(alone.loss[0], exact_loss, rtol=1e-3 if precision == "high" else 2e-6, atol=0)
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = oracle(z, AngularSpread())
    if precision == "highest":
        assert_as_accurate_as_naive(z, AngularSpread(), answer, exact)
    else:
        # tf32 keeps ten bits of each factor.
        assert (answer.loss - exact.loss).abs().max() < 1e-3
        assert (answer.grad - exact.grad).abs().max() < 5e-3 * exact.grad.abs().max()


@pytest.fixture
def _cut_off() -> Iterator[None]:
    """Tensor cores that cut off what does not fit the sum."""
    _ROUNDING.append("rz")
    yield
    _ROUNDING.pop()


@pytest.mark.usefixtures("_cut_off")
@pytest.mark.parametrize("backend", ["triton-sm_80", "cuda-sm_80"])
@pytest.mark.parametrize("features", [36, 768], ids=["fused", "workspace"])
@pytest.mark.parametrize("tau", [1.0, 0.05])
def test_fp32_with_sums_that_are_cut_off(tau: float, features: int, backend: str) -> None:
    """The bounds are those of fp32 everywhere."""
    z = torch.randn(1, 67, features) + 1.28 * torch.randn(features)  # mean cosine 0.62
    check(z, AngularSpread(tau=tau), backend)


@pytest.mark.parametrize(("backend", "features"), STRATEGIES)
@pytest.mark.parametrize("name", ["angular_spread", "l2_repel_diagonal_out", "perplexity_entropy", "decorrelation"])
def test_masks_and_packed_sequences(name: str, features: int, backend: str) -> None:
    potential, z = POTENTIALS[name], tokens(1, 133, features)
    pair_ids = (torch.arange(133) // 50 - (torch.rand(133) > 0.8).long() * 9).clamp(min=-1)[None]
    answer = evaluate(z, potential, backend, pair_ids=pair_ids)
    assert_as_accurate_as_naive(
        z, potential, answer, oracle(z, potential, document_ids=pair_ids), document_ids=pair_ids
    )
    bounds = torch.tensor([0, 1, 70, 70, 133], dtype=torch.int32)
    packed = z[0]
    exact = oracle(packed, potential, cu_seqlens=bounds)
    alone = dispersion([z], potential, backend, cu_seqlens=bounds, with_grad=False)
    torch.testing.assert_close(alone.loss[0].float(), exact.loss.float(), rtol=1e-5, atol=1e-5)
    answer = evaluate(z, potential, backend, cu_seqlens=bounds)
    answer = Answer(answer.loss, answer.grad[0])
    assert_as_accurate_as_naive(packed, potential, answer, exact, cu_seqlens=bounds)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "potential",
    [AngularSpread(tau=0.005), AngularSpread(clamp=0.0), L2Repel(tau=1.0, include_diagonal=False)],
    ids=repr,
)
def test_a_maximum_first_and_the_wide_band(potential: Potential, backend: str) -> None:
    check(tokens(1, 133, 200), potential, backend)
    check(tokens(1, 67, 36), potential, backend)


@pytest.mark.parametrize(
    ("backend", "features"), [("triton-sm_80", 36), ("cuda-sm_80", 200)], ids=["one-slice-triton", "slices-cuda"]
)
def test_slopes_of_fp16_at_their_largest(backend: str, features: int) -> None:
    """Of equal tokens, whose slope with clamp = 0 is held at what fp32 resolves: as in fp32."""
    z = tokens(1, 67, features, dtype=torch.float16)
    z[0, 5] = z[0, 6]
    potential = AngularSpread(tau=0.13, clamp=0.0, eps=0.0)
    answer, wide = (evaluate(x, potential, backend) for x in (z, z.float()))
    torch.testing.assert_close(answer.loss, wide.loss, rtol=2e-6, atol=1e-6)
    assert relative_errors(answer, Answer(wide.loss.double(), wide.grad.double()))[1] < 2**-10


@pytest.mark.usefixtures("_cut_off")
@pytest.mark.parametrize("backend", ["triton-sm_80", "cuda-sm_80"])
@pytest.mark.parametrize("edge", edges().values(), ids=edges().keys())
def test_edges(edge: Edge, backend: str) -> None:
    edge.check(evaluate(edge.z, edge.potential, backend))


@pytest.mark.parametrize("backend", ["triton-sm_80", "cuda-sm_80"])
@pytest.mark.parametrize("features", [16, 160], ids=["fused", "workspace"])
def test_equal_tokens(features: int, backend: str) -> None:
    """Equal tokens in 16 bits; psi of the other pairs is 1e-8 of theirs, and makes the whole gradient."""
    z = tokens(1, 40, features)
    z[0, 4:8] = z[0, :1]
    loss, grad = relative_errors(evaluate(z, Uniformity(t=10.0), backend), oracle(z, Uniformity(t=10.0)))
    assert loss < 2e-6
    assert grad < 2**-7


@pytest.mark.parametrize("backend", ["triton-sm_80", "cuda-sm_80"])
@pytest.mark.parametrize(
    ("potential", "scale"),
    [(AngularSpread(eps=0.0), 1e-25), (Uniformity(), 1e20), (Decorrelation(), 1e-25), (DispersiveL2(), 1e19)],
    ids=str,
)
def test_norms_beyond_the_range_of_products(potential: Potential, scale: float, backend: str) -> None:
    answer = evaluate(torch.randn(1, 40, 16) * scale, potential, backend)
    assert answer.loss.isnan().all()
    assert answer.grad.isnan().all()


@pytest.mark.parametrize("backend", ["triton-sm_80", "cuda-sm_80"])
@pytest.mark.parametrize("variant", published.VARIANTS)
def test_published_value(variant: str, backend: str) -> None:
    """The least of those with as many tokens as a tile has, or half of them."""
    cases = [case for case in published.CASES if case["variant"] == variant and case["shape"][1] >= 40]
    case = min(cases, key=lambda case: math.prod(case["shape"]))
    z = published.tokens(case).float()
    answer = evaluate(z, published.loss_of(case, "auto").options.potential, backend)
    loss, grad = published.errors_of(case, answer.loss.mean().item(), answer.grad / len(z))
    assert loss <= published.BOUNDS[torch.float32][0]
    assert grad <= published.BOUNDS[torch.float32][1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("features", [36, 200], ids=["fused", "workspace"])
def test_layers_and_batches_in_one_launch(features: int, backend: str) -> None:
    layers = [tokens(2, 67, features) for _ in range(2)]
    losses = dispersion(layers, AngularSpread(), backend)
    gradients = finished(losses, layers, AngularSpread(), backend)
    for z, loss, gradient in zip(layers, losses.loss, gradients, strict=True):
        # Each layer has half of the weight.
        answer = Answer(2 * loss.float(), 2 * gradient)
        assert_as_accurate_as_naive(z, AngularSpread(), answer, oracle(z, AngularSpread()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("potential", "dtype", "gradient_dtype", "features"),
    [
        (AngularSpread(eps=1e-3), torch.bfloat16, torch.bfloat16, 36),
        (AngularSpread(eps=1e-3), torch.bfloat16, torch.float32, 1100),
        (Decorrelation(), torch.float16, torch.float32, 36),
        (Decorrelation(), torch.float32, torch.float32, 1100),
        (L2Repel(), torch.bfloat16, torch.float32, 36),
    ],
    ids=["bf16", "bf16-wide", "fp16-standardize", "fp32-standardize", "none"],
)
def test_last_step_of_backward(
    potential: Potential, dtype: torch.dtype, gradient_dtype: torch.dtype, features: int, backend: str
) -> None:
    """One layer without a gradient, tokens that are not aligned, a token of scale 0 that is NaN, as padding may be, and
    a factor for each sequence or for each token; against the operations that compilers take."""
    shape = (2, 5, features)
    gradients = [torch.randn(shape).to(gradient_dtype), None, torch.randn(shape).to(gradient_dtype)]
    layers = [torch.randn(2, 5, features + 1).to(dtype)[:, :, 1:] for _ in range(3)]
    scale = torch.randn(3, 2, 5)
    layers[2][1, 2], scale[2, 1, 2] = torch.nan, 0.0
    name, arch = backend.split("-")
    with KERNELS[name](layers[0], arch) as kernels:
        for factor in (torch.tensor(3.0), torch.randn(2, 1), torch.randn(5)):
            for output in {dtype, torch.float32}:
                arguments = (gradients, layers, scale, factor, potential, output)
                found = launch.finish(lambda _: kernels, *arguments)
                assert found[1] is None
                for got, expected in zip(found, launch.finish_by_operations(*arguments), strict=True):
                    if got is not None:
                        assert got.dtype == output
                        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(output).eps, atol=1e-5)
    assert found[2] is not None
    assert not found[2][1, 2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_a_row(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 1)
    check(tokens(1, 261, 136), AngularSpread(), backend)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton-sm_80", torch.bfloat16), ("triton-sm_90", torch.bfloat16), ("triton-sm_80", torch.float32)],
    ids=str,
)
def test_packed_sequences_of_known_length(dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The band of tiles that pair, in a workspace that, of tiles of 64, is used again for the last one."""
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 1)
    z, bounds = tokens(1, 390, 136, dtype=dtype), torch.tensor([0, 3, 103, 103, 104, 170, 270, 390], dtype=torch.int32)
    answer = evaluate(z, AngularSpread(), backend, None, bounds, 120)
    exact = oracle(z[0], AngularSpread(), cu_seqlens=bounds)
    assert_as_accurate_as_naive(z[0], AngularSpread(), Answer(answer.loss, answer.grad[0]), exact, cu_seqlens=bounds)
    if dtype == torch.float32:
        return
    mask = torch.ones(390, dtype=torch.bool)
    mask[192:256] = False
    z[0, ~mask] = torch.nan
    answer = evaluate(z, AngularSpread(), backend, (mask.long() - 1)[None], bounds, 120)
    known = torch.where(mask[:, None], z[0], 0)
    exact = oracle(known, AngularSpread(), cu_seqlens=bounds, mask=mask)
    packed = Answer(answer.loss, answer.grad[0])
    assert_as_accurate_as_naive(known, AngularSpread(), packed, exact, cu_seqlens=bounds, mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_the_gradient(backend: str) -> None:
    """More features than a program's registers hold of it; and bounds in int64, which are taken, too."""
    z, bounds = tokens(1, 67, 300), torch.tensor([0, 67])
    answer = evaluate(z, AngularSpread(), backend, cu_seqlens=bounds)
    exact = oracle(z[0], AngularSpread(), cu_seqlens=bounds)
    packed = Answer(answer.loss, answer.grad[0])
    assert_as_accurate_as_naive(z[0], AngularSpread(), packed, exact, cu_seqlens=bounds)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampled_pairs(backend: str) -> None:
    """Two blocks of 66 tokens, as rows of their own and, without some tokens, as packed sequences."""

    def emulated(layers: Sequence[Tensor], ids: Tensor | None, bounds: Tensor | None, *options: Any) -> Losses:
        losses = dispersion(layers, AngularSpread(), backend, pair_ids=ids, cu_seqlens=bounds)
        assert losses.scale is not None
        ones, name, arch = torch.ones_like(losses.scale), *backend.split("-")
        with KERNELS[name](layers[0], arch) as kernels:
            arguments = (losses.gradients, layers, losses.scale, ones[0], AngularSpread(), torch.float32)
            return losses.loss[0], launch.finish(lambda _: kernels, *arguments), ones

    def in_float64(layers: Sequence[Tensor], ids: Tensor | None, bounds: Tensor | None, *options: Any) -> Losses:
        result = sweep(layers[0], AngularSpread(), ids, bounds, True)
        return result.loss, [result.grad], result.scale

    options = check_options("angular_spread", None, SampledPairs(0.5), "none", False, "auto")
    mask = (torch.arange(132) % 9 > 0).long()[None] - 1
    for z, pair_ids in ((tokens(1, 132, 200), None), (tokens(1, 132, 36), mask)):
        arguments = (pair_ids, None, options, draw([z], 0.5, None), True, False)
        found = estimate([z], *arguments, emulated)
        exact = estimate([z.double()], *arguments, in_float64)
        torch.testing.assert_close(found.loss, exact.loss, rtol=1e-3, atol=1e-3)
        gradients = []
        for each in (found, exact):
            assert each.grad is not None
            assert each.scale is not None
            gradients.append(each.grad * each.scale.unsqueeze(-1))
        assert (gradients[0] - gradients[1]).norm() < 5e-3 * gradients[1].norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    """Features that are not next to each other, and rows that begin at odd addresses."""
    check(tokens(67, 200, 2).permute(2, 0, 1)[:1], AngularSpread(), backend)
    check(tokens(1, 67, 205)[:, :, 3:202], AngularSpread(), backend)


@pytest.mark.parametrize("backend", ["cuda-sm_80", "cuda-sm_90a"])
def test_every_stage_of_the_pipeline_more_than_twice(backend: str) -> None:
    check(tokens(1, 67, 450), AngularSpread(), backend)


def test_cuda_launches_that_the_copy_engine_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expanded batch has a stride of 0, which no tensor map has: Hopper takes the kernel of the other GPUs."""
    launched: list[str] = []
    run = emulate

    def record(ptx: str, name: str, *arguments: Any, **options: Any) -> None:
        launched.append(name)
        run(ptx, name, *arguments, **options)

    monkeypatch.setitem(globals(), "emulate", record)
    z = tokens(1, 67, 200)
    alone, twice = (evaluate(batch, AngularSpread(), "cuda-sm_90a") for batch in (z, z.expand(2, -1, -1)))
    assert [name[-6:] for name in launched if name.startswith("dk_pair_tiles")] == ["_wgmma", "_write"]
    exact = oracle(z, AngularSpread())
    for n in range(2):
        answer = Answer(twice.loss[n : n + 1], twice.grad[n : n + 1])
        assert_as_accurate_as_naive(z, AngularSpread(), answer, exact)
    torch.testing.assert_close(twice.loss[:1], alone.loss, rtol=1e-6, atol=0)
