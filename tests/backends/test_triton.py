"""The GPU kernels against the float64 oracle: Triton's and the CUDA ones on a GPU, Triton's with TRITON_INTERPRET=1 in
its interpreter.

Without a GPU ``test_in_the_interpreter`` runs this file again in a process of its own: the interpreter has to be chosen
before Triton's functions are defined.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import (
    GPU,
    INTERPRETED,
    POTENTIALS,
    Answer,
    assert_as_accurate_as_naive,
    evaluate,
    oracle,
    read_nothing,
    relative_errors,
)
from torch import Tensor

from dispersion_kernels import (
    AngularSpread,
    Decorrelation,
    DispersionRegularizer,
    L2Repel,
    Orthogonalization,
    Potential,
    Uniformity,
    fused_dispersion_loss,
    operators,
    supported,
)
from dispersion_kernels.backends import cuda
from dispersion_kernels.backends.gpu import launch

DEVICE = "cuda" if GPU else "cpu"
TRITON = importlib.util.find_spec("triton") is not None
IMPLS = ["triton"] * TRITON + ["cuda"] * (GPU and cuda.unavailable_reason() is None)
if not IMPLS:
    pytest.skip("neither Triton nor the CUDA kernels are installed", allow_module_level=True)
# Names of the other files, in tests/api, with tests of the kernels.
OTHER_FILES = ("test_numerics.py", "test_edge_cases.py", "test_published.py")
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")

# One token, one pair, around the tiles of 32 tokens that the interpreter uses, and F that no tile divides; F above
# 128 (64 in fp32) takes several slices of the features, and below it one.
SHAPES = [(2, 1, 20), (3, 2, 64), (2, 3, 2), (1, 31, 150), (2, 33, 100), (1, 97, 64), (2, 70, 150)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Condensed as hidden states are."""
    return (torch.randn(shape) * 0.7 + 0.4 * torch.randn(shape[-1])).to(DEVICE, dtype)


class OnEveryBackend:
    """``self.impl`` is one after the other."""

    impl: str

    @pytest.fixture(autouse=True, params=IMPLS)
    def _backend(self, request: pytest.FixtureRequest) -> None:
        self.impl = request.param

    def check(self, z: Tensor, potential: str | Potential, **options: Any) -> None:
        exact = oracle(z, potential, **options)
        assert_as_accurate_as_naive(z, potential, evaluate(z, potential, impl=self.impl, **options), exact, **options)


@needs_triton
@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests of this file run in this process")
@pytest.mark.timeout(1800)  # more than a hundred tests
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param("angular_spread and (packed or masks or ragged and float32) or equal_tokens", id="some"),
        pytest.param("", id="all", marks=pytest.mark.interpreter),
    ],
)
def test_in_the_interpreter(chosen: str) -> None:
    others = [f"{Path(__file__).parents[1] / 'api' / name}::TestKernels" for name in OTHER_FILES]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", "-k", chosen, __file__, *others],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]


def test_import_and_the_cpu_need_no_triton() -> None:
    code = """if True:
        import sys
        import torch
        sys.modules["triton"] = None  # an import of it fails
        import dispersion_kernels
        from dispersion_kernels.env_report import report
        z = torch.randn(1, 4, 8, requires_grad=True)
        dispersion_kernels.fused_dispersion_loss(z).backward()
        print(dispersion_kernels.supported("triton", z).reason)
        report()
    """
    command = [sys.executable, "-c", code]
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert "Triton is not installed" in output.stdout


@needs_triton
def test_why_not_triton() -> None:
    reasons = {
        "the tokens are on meta": (torch.zeros(1, 2, 2, device="meta"), "angular_spread"),
        "float64": (torch.zeros(1, 2, 2, dtype=torch.float64, device="cuda" if GPU else "cpu"), "angular_spread"),
    }
    for reason, (z, potential) in reasons.items():
        if INTERPRETED or GPU or z.device.type != "cpu":
            assert reason in str(supported("triton", z, potential).reason)
    if GPU or INTERPRETED:
        assert "no Triton function" in str(supported("triton", tokens(1, 2, 2), WithoutTriton()).reason)
        assert "more than four fields" in str(supported("triton", tokens(1, 2, 2), FiveFields()).reason)
        assert "a field that is no number" in str(supported("triton", tokens(1, 2, 2), Quartic("strong")).reason)  # type: ignore[arg-type]
    else:
        with pytest.raises(RuntimeError, match=r'impl="triton" cannot run here: the tokens are on the CPU'):
            fused_dispersion_loss(tokens(1, 2, 2), impl="triton")


@needs_triton
def test_tuning_keeps_the_fastest_that_does_not_spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dispersion_kernels.backends.triton import configs, tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    candidates = configs.tile_candidates(configs.tile_config("sm_90", torch.bfloat16, "ieee", False))
    assert len(candidates) == len(set(candidates))
    launched: list[configs.TileConfig] = []

    def launch(candidate: configs.TileConfig) -> SimpleNamespace:
        launched.append(candidate)
        return SimpleNamespace(n_spills=8 if candidate.num_warps == 4 else 0)

    def time(call: Callable[[], Any]) -> float:
        call()
        return float(launched[-1].num_stages * launched[-1].block)

    chosen = tuning.best("a", candidates, launch, time)
    assert (chosen.block, chosen.num_warps, chosen.num_stages) == (64, 8, 2)
    launched.clear()
    assert tuning.best("a", candidates, launch, time) == chosen
    tuning._DECIDED.clear()  # as a new process
    assert tuning.best("a", candidates, launch, time) == chosen
    assert not launched
    assert tuning.best("b", candidates[:1], lambda _: SimpleNamespace(n_spills=1), time) == candidates[0]
    assert set(json.loads((tmp_path / "dispersion_kernels" / "tuning.json").read_text())) == {"a", "b"}
    (tmp_path / "dispersion_kernels" / "tuning.json").write_text("{half")
    tuning._DECIDED.clear()
    assert tuning.best("a", candidates, launch, time) == chosen
    assert not tuning.enabled(torch.device("cpu"))
    assert [tuning.length_bucket(n) for n in (2, 256, 257, 5000)] == [256, 256, 512, 8192]


class TestKernels(OnEveryBackend):
    """Deselected (in conftest.py) where neither a GPU nor the interpreter runs them."""

    pytestmark = [pytest.mark.gpu] if GPU else []

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
    def test_matches_the_oracle_at_ragged_shapes(self, potential: Potential, dtype: torch.dtype) -> None:
        for shape in SHAPES:
            if shape[2] == 2 and isinstance(potential, Decorrelation):
                continue  # the correlation of two features is 1 or -1 and its gradient nothing but rounding
            z = tokens(*shape, dtype=dtype)
            upstream = torch.rand(shape[0], dtype=torch.float64, device=DEVICE) + 0.5
            exact = oracle(z, potential, upstream)
            answer = evaluate(z, potential, upstream, impl=self.impl)
            assert answer.loss.dtype == torch.float32
            assert answer.grad.dtype == dtype
            assert_as_accurate_as_naive(z, potential, answer, exact, upstream=upstream)
            with torch.no_grad():
                alone = fused_dispersion_loss(z, potential, reduction="none", impl=self.impl)
            torch.testing.assert_close(alone, answer.loss, rtol=2e-6, atol=1e-6)

    @pytest.mark.parametrize("features", [24, 150])
    @pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
    def test_masks_and_documents(self, potential: Potential, features: int) -> None:
        z = tokens(2, 70, features)
        mask = torch.rand(2, 70, device=DEVICE) > 0.3
        self.check(z, potential, mask=mask)
        sorted_ids = torch.randint(0, 4, (2, 70), device=DEVICE).sort(1).values
        self.check(z, potential, document_ids=sorted_ids, mask=mask)
        self.check(z, potential, document_ids=torch.randint(-1, 2**40, (2, 70), device=DEVICE) % 5 - 1)
        self.check(z, potential, mask=torch.zeros_like(mask))

    @pytest.mark.parametrize("features", [24, 150])
    @pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
    def test_packed_sequences(self, potential: Potential, features: int) -> None:
        lengths = torch.tensor([5, 0, 1, 33, 2, 1, 40])
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)
        z = tokens(int(lengths.sum()), features)
        z[40:] *= 2  # sequences whose exponents differ by far must not share a shift
        self.check(z, potential, cu_seqlens=cu_seqlens)
        self.check(z, potential, cu_seqlens=cu_seqlens, mask=torch.rand(len(z), device=DEVICE) > 0.2)

        with pytest.MonkeyPatch.context() as patch:  # as with bounds on a GPU
            patch.setattr(operators, "longest_sequence", lambda _: None)
            self.check(z, potential, cu_seqlens=cu_seqlens)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_packed_sequences_of_known_length(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """The band of tiles that pair, in a workspace that holds a part of them."""
        # A tile that is masked, sequences within a tile, and some across the tile where the workspace begins again.
        scale = 2 if GPU else 1  # tiles are twice as large there
        lengths = scale * torch.tensor([3, 47, 50, 1, 0, 49, 50, 50, 9, 41, 50, 50, 50, 50, 7])
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(DEVICE)
        layers = [tokens(int(lengths.sum()), 150, dtype=dtype) for _ in range(2)]
        mask = torch.rand(len(layers[0]), device=DEVICE) > 0.2
        mask[scale * 224 : scale * 288] = False
        regions = []
        launched = launch._Call._pair_tiles

        def pair_tiles(call: Any, shape: Any, region: launch.Region, *rest: Any, **options: Any) -> Any:
            regions.append((region, launch.ceil_div(call.length, shape.block)))
            return launched(call, shape, region, *rest, **options)

        monkeypatch.setattr(launch._Call, "_pair_tiles", pair_tiles)
        for workspace in (launch.WORKSPACE_BYTES, 1):
            monkeypatch.setattr(launch, "WORKSPACE_BYTES", workspace)
            several = dtype == torch.float32 and workspace == 1
            for potential in (AngularSpread(), Uniformity(t=2.0), Decorrelation())[: 3 if several else 1]:
                self.check(layers[0], potential, cu_seqlens=bounds, max_seqlen=scale * 50, mask=mask)
        self.check(layers[0], "angular_spread", cu_seqlens=bounds, max_seqlen=scale * 60, recompute=True)
        for z in layers:
            z.requires_grad_()
        alone = [fused_dispersion_loss(z, cu_seqlens=bounds, max_seqlen=scale * 50, impl=self.impl) for z in layers]
        together = fused_dispersion_loss(layers, cu_seqlens=bounds, max_seqlen=scale * 50, impl=self.impl)
        torch.testing.assert_close(together, sum(alone) / 2)
        expected = torch.autograd.grad(sum(alone) / 2, layers)
        for gradient, one in zip(torch.autograd.grad(together, layers), expected, strict=True):
            torch.testing.assert_close(gradient, one, rtol=0, atol=1e-2 * one.abs().max().item())
        if self.impl == "triton":
            rings = [(region.band.ring, tiles) for region, tiles in regions if region.band is not None]
            assert len(rings) == len(regions)
            assert {tiles > 2 * ring for ring, tiles in rings} == {False, True}
            regions.clear()
            monkeypatch.setattr(launch, "_BAND_BYTES", 0)
            self.check(layers[0].detach(), "angular_spread", cu_seqlens=bounds, max_seqlen=scale * 50)
            assert not regions

    @pytest.mark.parametrize("pairs", [0.25, 0.0])
    @pytest.mark.parametrize("length", [132, 131])
    def test_sampled_pairs(self, length: int, pairs: float) -> None:
        """The general sampler over the backend's sweep, in blocks of one length and of two, against float64."""
        z = tokens(2, length, 24)
        ids = torch.randint(-1, 2, (2, length), device=DEVICE)
        for options in ({}, {"document_ids": ids}) if pairs else ({},):
            seeds = (torch.Generator(DEVICE).manual_seed(1) for _ in range(2))
            with pytest.MonkeyPatch.context() as patch:
                read_nothing(patch)  # for the same bounds as on a GPU
                answer = evaluate(z, "angular_spread", sampling=pairs, generator=next(seeds), impl=self.impl, **options)
            exact = evaluate(
                z.double(), "angular_spread", sampling=pairs, generator=next(seeds), impl="torch", **options
            )
            torch.testing.assert_close(answer.loss.double(), exact.loss, rtol=2e-5, atol=2e-5)
            assert (answer.grad.double() - exact.grad).norm() < 5e-4 * exact.grad.norm()

    @pytest.mark.parametrize(
        "potential",
        [
            AngularSpread(tau=1e-3, eps=0.0),
            AngularSpread(tau=0.1, clamp=0.0),
            Orthogonalization(clamp=0.1),
            Uniformity(t=30.0),
            L2Repel(tau=0.1, eps=0.0, include_diagonal=False),
        ],
        ids=repr,
    )
    def test_exponents_beyond_fp32_and_wide_bands(self, potential: Potential) -> None:
        z = tokens(2, 70, 150)
        self.check(z, potential)
        self.check(z, potential, mask=torch.rand(2, 70, device=DEVICE) > 0.3)
        self.check(z[0], potential, cu_seqlens=torch.tensor([0, 30, 70], dtype=torch.int32, device=DEVICE))

    @pytest.mark.parametrize("features", [48, 150])
    @pytest.mark.parametrize(
        "potential",
        [
            AngularSpread(tau=0.13, clamp=0.01),
            AngularSpread(clamp=0.0, eps=0.0),
            AngularSpread(tau=0.02, clamp=0.0),
            Orthogonalization(margin=0.9, clamp=0.0, eps=0.0),
            Uniformity(t=2.0),
        ],
        ids=repr,
    )
    def test_slopes_of_fp16_at_their_largest(self, potential: Potential, features: int) -> None:
        """Equal and nearly equal tokens, where psi and its slope are largest: they fit the range, and what is far below
        them does, too. In fp32 nothing is rounded to 16 bits."""
        z = tokens(2, 70, features, dtype=torch.float16)
        z[:, 5] = z[:, 6]
        z[:, 7] = z[:, 8] * 1.001
        answer, wide = (evaluate(x, potential, impl=self.impl) for x in (z, z.float()))
        # The exponents of AngularSpread(tau=0.02) are tens, and those of equal tokens have the rounding of 1 - c.
        naive, exact = evaluate(z.float(), potential, impl="reference"), oracle(z, potential)
        rounding = 2 * (naive.loss - exact.loss).abs().max().item()
        torch.testing.assert_close(answer.loss, wide.loss, rtol=2e-6, atol=max(1e-6, rounding))
        assert relative_errors(answer, Answer(wide.loss.double(), wide.grad.double()))[1] < 2**-10

    @pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
    def test_degenerate_tokens(self, potential: Potential) -> None:
        """Zero tokens, duplicates, antipodes, constant tokens, tiny norms."""
        z = tokens(1, 40, 48)
        z[0, 3] = 0
        z[0, 9] = 0
        z[0, 5] = z[0, 6]
        z[0, 7] = -z[0, 8]
        z[0, 10] = 0.1
        z[0, 11] = z[0, 12] * 1e-4
        self.check(z, potential)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("scale", [1e-4, 1e4])
    @pytest.mark.parametrize("name", ["angular_spread", "orthogonalization", "decorrelation", "uniformity"])
    def test_norms_far_from_one(self, name: str, scale: float, dtype: torch.dtype) -> None:
        z = torch.randn(2, 40, 72)
        self.check((z * (scale / z.norm(dim=-1, keepdim=True))).to(DEVICE, dtype), name)

    @pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS.keys())
    def test_more_than_the_workspace(self, potential: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows in rounds of fewer than all, across layers, and rows in pairs of blocks."""
        from dispersion_kernels.backends.gpu import launch

        layers = [tokens(2, 100, 150) for _ in range(3)]
        expected = [oracle(z, potential) for z in layers]
        for size in (4 * 100 * 104 * 3, 1):
            monkeypatch.setattr(launch, "WORKSPACE_BYTES", size)
            leaves = [z.clone().requires_grad_() for z in layers]
            loss = fused_dispersion_loss(leaves, potential, reduction="none", impl=self.impl)
            loss.sum().backward()
            torch.testing.assert_close(
                loss.double(), torch.stack([e.loss for e in expected]).mean(0), rtol=1e-5, atol=1e-5
            )
            for leaf, exact in zip(leaves, expected, strict=True):
                assert leaf.grad is not None
                error = (leaf.grad.double() * 3 - exact.grad).abs().max() / exact.grad.abs().max()
                assert error < 2e-5

    def test_more_rows_than_a_grid_has(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from dispersion_kernels.backends.gpu import launch

        layers = [tokens(3, 40, 24).requires_grad_() for _ in range(2)]
        mask = torch.rand(3, 40, device=DEVICE) > 0.3
        expected = torch.autograd.grad(fused_dispersion_loss(layers, mask=mask, impl=self.impl), layers)
        monkeypatch.setattr(launch, "MAX_ROWS", 2)
        for got, whole in zip(
            torch.autograd.grad(fused_dispersion_loss(layers, mask=mask, impl=self.impl), layers), expected, strict=True
        ):
            assert torch.equal(got, whole)

    def test_any_strides_and_layers_that_differ_in_them(self) -> None:
        z = tokens(70, 150, 2).permute(2, 0, 1)
        self.check(z, "angular_spread")
        self.check(tokens(2, 70, 300)[:, :, ::2], "angular_spread")
        layers = [z, z.contiguous()]
        first, second = (
            fused_dispersion_loss(layer, impl=self.impl, reduction="none") for layer in (layers, z.contiguous())
        )
        torch.testing.assert_close(first, second)

    def test_a_layer_without_gradient(self) -> None:
        z, constant = tokens(2, 40, 72).requires_grad_(), tokens(2, 40, 72)
        fused_dispersion_loss([constant, z], impl=self.impl).backward()
        (expected,) = torch.autograd.grad(fused_dispersion_loss(z, impl=self.impl) / 2, z)
        assert z.grad is not None
        assert torch.equal(z.grad, expected)

    @pytest.mark.parametrize("features", [24, 150])
    def test_not_finite_stays_in_its_sequence(self, features: int) -> None:
        z = tokens(3, 40, features)
        clean = evaluate(z, "angular_spread", impl=self.impl)
        z[1, 7, 3] = float("nan")
        z[2, 0, 0] = float("inf")
        answer = evaluate(z, "angular_spread", impl=self.impl)
        assert answer.loss[1:].isnan().all()
        assert answer.grad[1:].isnan().all()
        assert torch.equal(answer.loss[0], clean.loss[0])
        assert torch.equal(answer.grad[0], clean.grad[0])
        mask = torch.ones(3, 40, dtype=torch.bool, device=DEVICE)
        mask[1, 7] = mask[2, 0] = False
        masked = evaluate(z, "angular_spread", impl=self.impl, mask=mask)
        assert masked.loss.isfinite().all()
        assert masked.grad.isfinite().all()
        packed = z.reshape(-1, features)
        bounds = torch.tensor([0, 40, 80, 120], dtype=torch.int32, device=DEVICE)
        answer = evaluate(packed, "angular_spread", impl=self.impl, cu_seqlens=bounds)
        assert answer.loss.isnan().tolist() == [False, True, True]
        assert answer.grad[:40].isfinite().all()

    @pytest.mark.parametrize(
        "potential", [AngularSpread(), AngularSpread(tau=0.57), Uniformity(), Orthogonalization()], ids=str
    )
    @pytest.mark.parametrize("kind", ["condensed", "clusters", "padded", "repeated"])
    def test_digits_of_condensed_and_equal_tokens(self, kind: str, potential: Potential) -> None:
        """G is mostly along its token where the mean cosine is 0.99; the gradient is the rest. In bf16, without the
        diagonal that takes that part out of G, the error would be 1.5e-2. Of equal tokens a few pairs have most of a
        token's G, where the slopes differ much: those potentials have G in fp32."""
        torch.manual_seed(0)
        z, direction = torch.randn(1, 300, 200), torch.randn(200)
        if kind == "repeated":  # as words are
            z = z[:, torch.multinomial(1 / torch.arange(1, 301.0), 300, replacement=True)]
        else:
            sign = torch.randint(0, 2, (1, 300, 1)) * 2 - 1 if kind == "clusters" else 1
            z = z + 10 * sign * direction
        z = z.to(DEVICE, torch.bfloat16)
        mask = torch.arange(300, device=DEVICE)[None] < 201 if kind == "padded" else None
        exact = oracle(z, potential, mask=mask).grad
        ours, naive = (
            ((evaluate(z, potential, impl=impl, mask=mask).grad - exact).norm() / exact.norm()).item()
            for impl in (self.impl, "reference")
        )
        assert ours < 6.5e-3
        assert ours < naive / 3

    def test_writes_after_a_gradient_that_was_kept(self) -> None:
        """A model may write to a block's output in place where ``keep_gradients`` has read it before."""
        gradients = []
        for write in (False, True):
            torch.manual_seed(0)
            block = torch.nn.Linear(150, 150).to(DEVICE)
            regularizer = DispersionRegularizer(block, layers=[block], keep_gradients=True, impl=self.impl)
            hidden = block(tokens(2, 40, 150))
            if write:
                hidden += torch.linspace(0, 5, 150, device=DEVICE)
            (0 * hidden.sum() + regularizer.loss()).backward()
            gradients.append(block.weight.grad)
        assert gradients[0] is not None
        assert torch.equal(*gradients)

    def test_operator(self) -> None:
        """Fake tensors and autograd's registration, with G in either dtype."""
        operator = torch.ops.dispersion_kernels.dispersion_loss.default
        for potential, dtype, shape, temperature in (
            (AngularSpread(), torch.bfloat16, (2, 20, 150), None),
            (AngularSpread(), torch.bfloat16, (2, 1, 150), None),
            (AngularSpread(), torch.bfloat16, (2, 20, 150), torch.tensor(0.7)),
            (AngularSpread(), torch.bfloat16, (2, 20, 36), None),
            (Decorrelation(), torch.float32, (2, 20, 150), None),
            (L2Repel(), torch.bfloat16, (2, 20, 150), None),
        ):
            layers = [tokens(*shape, dtype=dtype).requires_grad_() for _ in range(2)]
            others = (None, None, temperature, None, None, potential.name(), potential.params())
            for with_grad in ([True, True], [False, False]):  # kept, or computed again in backward
                arguments = (layers, *others, "mean", self.impl, 1.0, "", with_grad, False, False, None)
                torch.library.opcheck(operator, arguments)
        packed, bounds = [tokens(1, 40, 150).requires_grad_()], torch.tensor([0, 30, 40], dtype=torch.int32)
        others = (None, bounds.to(DEVICE), None, None, None, "angular_spread", AngularSpread().params())
        arguments = (packed, *others, "mean", self.impl, 1.0, "", [True], False, False, 30)
        torch.library.opcheck(operator, arguments)

    @pytest.mark.parametrize("potential", [AngularSpread(), Decorrelation(), L2Repel()], ids=lambda p: p.name())
    def test_under_transforms(self, potential: Potential) -> None:
        """The last step of backward in PyTorch's operations, which torch.func takes."""
        z = tokens(2, 40, 150)

        def loss(z: Tensor) -> Tensor:
            return fused_dispersion_loss(z, potential, reduction="sum", impl=self.impl)

        torch.testing.assert_close(torch.func.grad(loss)(z), evaluate(z, potential, impl=self.impl).grad)

    def test_the_same_bits_every_time(self) -> None:
        z = tokens(2, 70, 150, dtype=torch.bfloat16)
        first = evaluate(z, "angular_spread", impl=self.impl)
        for _ in range(2):
            again = evaluate(z, "angular_spread", impl=self.impl)
            assert torch.equal(again.loss, first.loss)
            assert torch.equal(again.grad, first.grad)

    def test_recompute_is_the_same(self) -> None:
        z = tokens(2, 70, 24, dtype=torch.bfloat16)
        kept, swept = (evaluate(z, "angular_spread", impl=self.impl, recompute=flag) for flag in (False, True))
        assert torch.equal(kept.grad, swept.grad)

    @pytest.mark.parametrize("cells", [(2, 1, 20), (0, 5, 20)])
    def test_nothing_to_pair(self, cells: tuple[int, int, int]) -> None:
        z = tokens(*cells).requires_grad_()
        loss = fused_dispersion_loss(z, impl=self.impl)
        loss.backward()
        assert loss == 0
        assert z.grad is not None
        assert not z.grad.any()


@needs_triton
class TestKernelsOfTriton:
    """Deselected like those."""

    pytestmark = [pytest.mark.gpu] if GPU else []

    @pytest.mark.parametrize("features", [24, 150])
    def test_a_potential_of_ones_own(self, features: int) -> None:
        z = tokens(2, 70, features)
        potential = Quartic(strength=0.7)
        assert supported("triton", z, potential)
        answer = evaluate(z, potential, impl="triton")
        assert_as_accurate_as_naive(z, potential, answer, oracle(z, potential))
        # Potentials: a class that is no dataclass, and a subclass of a built-in one.
        for potential in (OfAttributes(0.7), OfABuiltIn(margin=0.7)):
            answer = evaluate(z, potential, impl="triton")
            torch.testing.assert_close(answer, evaluate(z, Quartic(strength=0.7), impl="triton"))
            assert_as_accurate_as_naive(z, potential, answer, oracle(z, potential))
        # Slopes of up to 2,000 times an inverse norm fit fp16.
        z, potential = z.half(), Quartic(strength=500.0)
        z[:, 5] = z[:, 6]
        assert relative_errors(evaluate(z, potential, impl="triton"), oracle(z, potential))[1] < 2**-10

    @pytest.mark.parametrize("name", ["narrow", "wide"])
    def test_error_of_the_arcsine(self, name: str) -> None:
        """Over the whole interval, close to 0 and to 1 included: of the approximation itself, evaluated in fp64, and of
        what fp32 makes of it, below 1e-7 of D = angle / pi in both."""
        import triton

        from dispersion_kernels.backends.triton import epilogues

        c = torch.cat([torch.linspace(0, 1, 2**20), torch.logspace(-30, 0, 2**16), 1 - torch.logspace(-7.2, -1, 2**16)])
        c = c[c <= 0.75] if name == "narrow" else c
        c = torch.cat([c, -c]).to(DEVICE)
        function = epilogues.arcsine_narrow if name == "narrow" else epilogues.arcsine
        errors = {}
        for dtype in (torch.float64, torch.float32):
            out = torch.empty_like(c, dtype=dtype)
            elementwise[(triton.cdiv(len(c), 2**16),)](c.to(dtype), out, len(c), function, 2**16)
            errors[dtype] = (out.double() - c.double().asin()).abs().max().item()
        approximation, rounded = (4e-8, 1e-7) if name == "narrow" else (1e-8, 2e-7)
        assert errors[torch.float64] < approximation
        assert errors[torch.float32] < rounded


try:
    import triton
    import triton.language as tl
except ImportError:
    quartic = None
else:

    @triton.jit
    def elementwise(x, y, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + i, FUNCTION(tl.load(x + i, mask=i < n, other=0.0)), mask=i < n)

    @triton.jit
    def quartic(c, p0, p1, p2, p3):  # type: ignore[no-untyped-def]
        return p0 * c * c * c * c, 4.0 * p0 * c * c * c


@dataclass(frozen=True)
class Quartic(Potential):
    """strength c^4, as a user would write it."""

    reduction = "mean"
    strength: float = 1.0
    triton = staticmethod(quartic)

    def value(self, c: Tensor) -> Tensor:
        return self.strength * c**4

    def slope(self, c: Tensor) -> Tensor:
        return 4 * self.strength * c**3


class OfAttributes(Potential):
    """The same of a class that is no dataclass."""

    reduction = "mean"
    triton = staticmethod(quartic)
    value, slope = Quartic.value, Quartic.slope

    def __init__(self, strength: float) -> None:
        self.strength = strength


class OfABuiltIn(Orthogonalization):
    """margin c^4."""

    triton = staticmethod(quartic)
    norm_eps = 0.0

    def value(self, c: Tensor) -> Tensor:
        return self.margin * c**4

    def slope(self, c: Tensor) -> Tensor:
        return 4 * self.margin * c**3


class WithoutTriton(Quartic):
    triton = None


@dataclass(frozen=True)
class FiveFields(Quartic):
    a: float = 0.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
class TestOnAGpu(OnEveryBackend):
    @pytest.mark.parametrize("features", [64, 768])
    def test_peak_memory(self, features: int) -> None:
        """Beyond z: the fp32 gradient, its 16-bit copy, statistics and the workspace, and nothing of L^2."""
        from dispersion_kernels.backends.gpu import launch

        z = tokens(1, 32_768, features, dtype=torch.bfloat16).requires_grad_()
        fused_dispersion_loss(z[:, :256], impl=self.impl).backward()  # compiled, and the libraries' handles made
        z.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_dispersion_loss(z, impl=self.impl).backward()
        extra = torch.cuda.max_memory_allocated() - before
        assert extra < 3.5 * z.numel() * z.element_size() + 2 * launch.WORKSPACE_BYTES

    @pytest.mark.parametrize("features", [64, 768])
    def test_cuda_graph(self, features: int) -> None:
        z = tokens(2, 300, features, dtype=torch.bfloat16).requires_grad_()
        mask = torch.rand(2, 300, device="cuda") > 0.2
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                z.grad = None
                fused_dispersion_loss(z, mask=mask, impl=self.impl).backward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        z.grad = None
        with torch.cuda.graph(graph):
            loss = fused_dispersion_loss(z, mask=mask, impl=self.impl)
            loss.backward()
        with torch.no_grad():
            z.copy_(tokens(2, 300, features, dtype=torch.bfloat16))
            mask.copy_(torch.rand(2, 300, device="cuda") > 0.5)
        graph.replay()
        expected = evaluate(z, "angular_spread", impl=self.impl, mask=mask)
        assert z.grad is not None
        torch.testing.assert_close(loss, expected.loss.mean())
        torch.testing.assert_close(z.grad, expected.grad / 2, rtol=1e-2, atol=1e-8)

    def test_no_synchronisation(self) -> None:
        layers = [tokens(2, 300, 768, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
        ids = torch.randint(0, 3, (2, 300), device="cuda")
        bounds = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
        on_the_cpu = bounds.cpu()
        for call in range(2):  # the first call compiles
            torch.cuda.set_sync_debug_mode("error" if call else "default")
            try:
                fused_dispersion_loss(layers, impl=self.impl).backward()
                fused_dispersion_loss(layers, document_ids=ids, impl=self.impl).backward()
                fused_dispersion_loss(layers[0][0], cu_seqlens=bounds, impl=self.impl).backward()
                loss = fused_dispersion_loss(layers[0][0], cu_seqlens=on_the_cpu, reduction="none", impl=self.impl)
                loss.sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_side_stream(self) -> None:
        z = tokens(4, 700, 768, dtype=torch.bfloat16)
        expected = evaluate(z, "angular_spread", impl=self.impl)
        stream = torch.cuda.Stream()
        torch.cuda._sleep(10**8)  # whatever is launched on the default stream by mistake comes too late
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            answer = evaluate(z, "angular_spread", impl=self.impl)
        stream.synchronize()
        assert torch.equal(answer.grad, expected.grad)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_second_device(self) -> None:
        z = tokens(2, 300, 768, dtype=torch.bfloat16)
        here, there = (evaluate(z.to(device), "angular_spread", impl=self.impl) for device in ("cuda:0", "cuda:1"))
        assert torch.equal(here.grad, there.grad.to("cuda:0"))

    def test_compile(self) -> None:
        layers = [tokens(2, 300, 768, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]

        def training_loss(layers: list[Tensor]) -> Tensor:
            return 0.1 * fused_dispersion_loss([layer * 2 for layer in layers], impl=self.impl)

        expected = torch.autograd.grad(training_loss(layers), layers)
        grads = torch.autograd.grad(torch.compile(training_loss, fullgraph=True)(layers), layers)
        for got, eager in zip(grads, expected, strict=True):
            torch.testing.assert_close(got, eager, rtol=2e-2, atol=1e-9)

    @pytest.mark.parametrize("precision", ["highest", "high"])
    def test_fp32_follows_the_precision_of_products(self, precision: str) -> None:
        z = tokens(1, 512, 768)
        torch.set_float32_matmul_precision(precision)
        try:
            error = relative_errors(evaluate(z, "angular_spread", impl=self.impl), oracle(z, "angular_spread"))[1]
        finally:
            torch.set_float32_matmul_precision("highest")
        assert error < (5e-6 if precision == "highest" else 5e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_newer_settings_of_precision_and_fp16_accumulation(self, dtype: torch.dtype) -> None:
        """After them PyTorch's older getter raises, and so do its fp16 products with an fp32 result."""
        z = tokens(1, 512, 768, dtype=dtype)
        expected = evaluate(z, "angular_spread", impl=self.impl)
        matmul = torch.backends.cuda.matmul
        matmul.fp32_precision, matmul.allow_fp16_accumulation = "tf32", True
        try:
            answer = evaluate(z, "angular_spread", impl=self.impl)
            assert matmul.allow_fp16_accumulation
        finally:
            matmul.allow_fp16_accumulation = False
            torch.set_float32_matmul_precision("highest")
        assert torch.equal(answer.grad, expected.grad)

    def test_more_than_2_31_elements(self) -> None:
        if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
            pytest.skip("needs a GPU with 40 GiB")
        z = torch.randn(2, 8, 2**28 + 64, dtype=torch.bfloat16, device="cuda")
        whole = evaluate(z, "angular_spread", impl=self.impl)
        last = evaluate(z[1:], "angular_spread", impl=self.impl)
        assert torch.equal(whole.loss[1:], last.loss)
        assert torch.equal(whole.grad[1:], last.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@needs_triton
class TestTritonOnAGpu:
    @pytest.mark.parametrize("features", [64, 768])
    def test_tuned(self, features: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("DISPERSION_KERNELS_AUTOTUNE", "1")
        z = tokens(2, 300, features, dtype=torch.bfloat16)
        answer = evaluate(z, "angular_spread", impl="triton")
        assert_as_accurate_as_naive(z, "angular_spread", answer, oracle(z, "angular_spread"))
        assert (tmp_path / "dispersion_kernels" / "tuning.json").is_file()

    def test_auto_chooses_triton(self) -> None:
        z = tokens(2, 300, 768, dtype=torch.bfloat16)
        auto, triton_ = (evaluate(z, "angular_spread", impl=impl) for impl in ("auto", "triton"))
        assert torch.equal(auto.grad, triton_.grad)
