"""The compiled PTX of the Triton kernels, run on the CPU by an emulator that finds races, missing waits and accesses
out of bounds.

The launcher runs as on a GPU, but each launch is specialised and compiled as Triton would and its PTX emulated. The
emulator is not part of this repository: without it, beside the repository, these tests are skipped.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import INTERPRETED, POTENTIALS, Answer, assert_as_accurate_as_naive, oracle
from torch import Tensor

from dispersion_kernels import AngularSpread, L2Repel, Potential

SHARED = Path(__file__).resolve().parents[2] / "shared"
if not (SHARED / "ptx_emulator").is_dir():
    pytest.skip("the PTX emulator is not beside this repository", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
sys.path.append(str(SHARED))

import ptx_emulator  # noqa: E402

from dispersion_kernels.triton import ahead_of_time, launch  # noqa: E402

SEEDS = (1, 2, 3)


class Emulator:
    """Runs launches for one architecture; every compiled kernel, the first time, with each seed, which must give the
    same bits, and later with one."""

    seen: ClassVar[set[str]] = set()

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def __call__(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]) -> None:
        specialization = ahead_of_time.specialize(kernel, arguments)
        compiled = ahead_of_time.compile_for(kernel, specialization, self.arch, options)
        module = _load(compiled.asm["ptx"])
        # A specialised integer is no parameter; a tuple is one for each of its tensors.
        names = [name for name, kind in specialization.signature.items() if kind != "constexpr"]
        flat = [
            value
            for name in names
            for value in (arguments[name] if isinstance(arguments[name], tuple) else (arguments[name],))
        ]
        # Arguments that share memory share it in the emulator, too: whole storages, and an offset in bytes.
        storages = {t.untyped_storage().data_ptr(): _bytes_of(t) for t in flat if isinstance(t, Tensor)}
        before = {pointer: storage.clone() for pointer, storage in storages.items()}
        first: dict[int, Tensor] = {}
        seeds = SEEDS[:1] if compiled.asm["ptx"] in self.seen else SEEDS
        self.seen.add(compiled.asm["ptx"])
        for seed in seeds:
            for pointer, storage in storages.items():
                storage.copy_(before[pointer])
            report = module.launch(
                kernel.__name__,
                grid,
                32 * options["num_warps"],
                [_argument(value, storages) for value in flat],
                dynamic_shared=compiled.metadata.shared,
                seed=seed,
            )
            assert report.ok, report.summary()
            for pointer, storage in storages.items():
                same = torch.equal(first.setdefault(pointer, storage.clone()), storage)
                assert same, f"{kernel.__name__}: other bits with seed {seed}"


def _bytes_of(tensor: Tensor) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())


def _argument(value: Any, storages: dict[int, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage().data_ptr()
    return ptx_emulator.Buffer(storages[storage].numpy(), "inout", 256, value.data_ptr() - storage)


@functools.cache
def _load(ptx: str) -> Any:
    return ptx_emulator.load(ptx)


def evaluate(
    z: Tensor, potential: Potential, arch: str, groups: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Answer:
    losses = launch.dispersion([z], potential, groups, cu_seqlens, True, arch=arch, run=Emulator(arch))
    assert losses.scale is not None
    gradient = losses.gradients[0] * losses.scale[0].unsqueeze(-1)
    return Answer(losses.loss[0].float(), gradient.to(z.dtype).reshape(z.shape))


def check(z: Tensor, potential: Potential, arch: str) -> None:
    assert_as_accurate_as_naive(z, potential, evaluate(z, potential, arch), oracle(z, potential))


def tokens(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(shape) * 0.7 + 0.4 * torch.randn(shape[-1])).to(dtype)


ARCHES = ["sm_80", "sm_90"]


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("features", [36, 200], ids=["resident", "swept"])
@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
def test_every_potential(potential: Potential, features: int, arch: str) -> None:
    """More than one tile of tokens, and the last ones ragged: the tiles have 64 (resident) and 128 (swept)."""
    z = tokens(1, 67 if features < 128 else 133, features)
    answer = evaluate(z, potential, arch)
    assert_as_accurate_as_naive(z, potential, answer, oracle(z, potential))
    alone = launch.dispersion([z], potential, None, None, False, arch=arch, run=Emulator(arch))
    torch.testing.assert_close(alone.loss[0].float(), answer.loss, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("features", [36, 200], ids=["resident", "swept"])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float16, "highest"), (torch.float32, "highest"), (torch.float32, "high")],
    ids=["fp16", "fp32", "tf32"],
)
def test_every_dtype(dtype: torch.dtype, precision: str, features: int, arch: str) -> None:
    z = tokens(1, 67, features, dtype=dtype)
    torch.set_float32_matmul_precision(precision)
    try:
        answer = evaluate(z, AngularSpread(), arch)
        bounds = torch.tensor([0, 67], dtype=torch.int32)
        for potential in (AngularSpread(), AngularSpread(tau=0.005)):
            alone = launch.dispersion([z], potential, None, bounds, False, arch=arch, run=Emulator(arch))
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


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("features", [36, 200], ids=["resident", "swept"])
@pytest.mark.parametrize("name", ["angular_spread", "l2_repel_diagonal_out", "perplexity_entropy", "decorrelation"])
def test_masks_and_packed_sequences(name: str, features: int, arch: str) -> None:
    potential, z = POTENTIALS[name], tokens(1, 133, features)
    groups = (torch.arange(133) // 50 - (torch.rand(133) > 0.8).long() * 9).clamp(min=-1)[None]
    answer = evaluate(z, potential, arch, groups=groups)
    assert_as_accurate_as_naive(z, potential, answer, oracle(z, potential, document_ids=groups), document_ids=groups)
    bounds = torch.tensor([0, 1, 70, 70, 133], dtype=torch.int32)
    packed = z[0]
    exact = oracle(packed, potential, cu_seqlens=bounds)
    alone = launch.dispersion([z], potential, None, bounds, False, arch=arch, run=Emulator(arch))
    torch.testing.assert_close(alone.loss[0].float(), exact.loss.float(), rtol=1e-5, atol=1e-5)
    answer = evaluate(z, potential, arch, cu_seqlens=bounds)
    answer = Answer(answer.loss, answer.grad[0])
    assert_as_accurate_as_naive(packed, potential, answer, exact, cu_seqlens=bounds)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    "potential",
    [AngularSpread(tau=0.005), AngularSpread(clamp=0.0), L2Repel(tau=1.0, include_diagonal=False)],
    ids=repr,
)
def test_a_maximum_first_and_the_wide_band(potential: Potential, arch: str) -> None:
    check(tokens(1, 133, 200), potential, arch)
    check(tokens(1, 67, 36), potential, arch)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("features", [36, 200], ids=["resident", "swept"])
def test_layers_and_batches_in_one_launch(features: int, arch: str) -> None:
    layers = [tokens(2, 67, features) for _ in range(2)]
    losses = launch.dispersion(layers, AngularSpread(), None, None, True, arch=arch, run=Emulator(arch))
    assert losses.scale is not None
    for z, loss, gradient, scale in zip(layers, losses.loss, losses.gradients, losses.scale, strict=True):
        answer = Answer(loss.float(), (gradient * scale.unsqueeze(-1)).to(z.dtype))
        assert_as_accurate_as_naive(z, AngularSpread(), answer, oracle(z, AngularSpread()))


@pytest.mark.parametrize("arch", ARCHES)
def test_blocks_of_a_row(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "WORKSPACE_BYTES", 1)
    check(tokens(1, 261, 136), AngularSpread(), arch)


@pytest.mark.parametrize("arch", ARCHES)
def test_strides(arch: str) -> None:
    """Features that are not next to each other, and rows that begin at odd addresses."""
    check(tokens(67, 200, 2).permute(2, 0, 1)[:1], AngularSpread(), arch)
    check(tokens(1, 67, 205)[:, :, 3:202], AngularSpread(), arch)
