"""The CUDA extension without a GPU: how it is built, its operators, and what it says; its numbers are in
test_emulated.py."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GPU
from torch import Tensor

from dispersion_kernels import AngularSpread, Potential, fused_dispersion_loss, supported
from dispersion_kernels.backends import cuda
from dispersion_kernels.backends.gpu import launch
from dispersion_kernels.env_report import report

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(cuda.unavailable_reason() is not None, reason=str(cuda.unavailable_reason()))


@pytest.fixture(scope="module")
def setup_py() -> Any:
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_versions_that_disagree(setup_py: Any) -> None:
    setup_py.check_versions("13.0", "13.1", "2.14.1")
    with pytest.raises(setup_py.SkipCuda, match=r"nvcc is of CUDA 12.4 and PyTorch 2.14.1 of CUDA 13.0: install a"):
        setup_py.check_versions("12.4", "13.0", "2.14.1")
    assert setup_py.default_architectures("13.0") == "8.0+PTX;9.0a;10.0;12.0+PTX"
    assert setup_py.default_architectures("12.4") == "8.0+PTX;9.0a"


def test_hopper_is_asked_for_by_its_own_name_too(setup_py: Any, capfd: pytest.CaptureFixture[str]) -> None:
    for given, wanted in {
        "8.0;9.0": "8.0;9.0;9.0a",
        "8.0 9.0+PTX": "8.0;9.0+PTX;9.0a",
        "Ampere;Hopper;": "Ampere;Hopper;9.0a",
    }.items():
        assert setup_py.with_hopper(given) == wanted
        assert f"TORCH_CUDA_ARCH_LIST={given} lacks 9.0a" in capfd.readouterr().err
    for given in ("8.0;9.0a", "9.0 9.0a+PTX", "8.0+PTX", "10.0;12.0+PTX"):
        assert setup_py.with_hopper(given) == given
    assert not capfd.readouterr().err


def test_what_is_asked_for(setup_py: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPERSION_KERNELS_BUILD_CUDA", "0")
    info, extension = setup_py.cuda_extension()
    assert (info.built, info.reason, extension) == (False, "DISPERSION_KERNELS_BUILD_CUDA=0 was set", None)
    if torch.version.cuda is None:
        setup_py.cuda_extension.cache_clear()
        monkeypatch.setenv("DISPERSION_KERNELS_BUILD_CUDA", "1")
        with pytest.raises(SystemExit, match=r"BUILD_CUDA=1 was set, but PyTorch .* is no CUDA build"):
            setup_py.cuda_extension()


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_why_not() -> None:
    z = torch.zeros(1, 4, 8)
    reason = cuda.unavailable_reason() or "there is no CUDA device"
    assert supported("cuda", z).reason == reason
    with pytest.raises(RuntimeError, match='impl="cuda" cannot run here: '):
        fused_dispersion_loss(z, impl="cuda")
    assert f'impl="cuda": no: {reason}' in report()


def test_users_potentials_are_not_among_the_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class Own(Potential):
        reduction = "mean"

    class OnAGpu(torch.Tensor):
        device, dtype = torch.device("cuda"), torch.float32

    tokens: Any = torch.zeros(1, 4, 8).as_subclass(OnAGpu)
    assert "Own' is not among them" in str(supported("cuda", tokens, Own()).reason)
    tokens.dtype = torch.float64
    assert "the tokens are float64" in str(supported("cuda", tokens).reason)


@pytest.fixture
def launches() -> Iterator[list[str]]:
    """The names of the kernels that are launched, none of which runs."""
    names: list[str] = []
    with cuda.watch_launches(lambda launch: names.append(launch.kernel), "sm_80"):
        yield names


def _statistics() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    return [torch.randn(2, 5, 8), torch.randn(2, 5, 8)], *(torch.zeros(4, 5) for _ in range(3))


@built
def test_operators(launches: list[str]) -> None:
    layers, *statistics = _statistics()
    arguments = ("dk_row_statistics_fp32", layers, None, *statistics, [], 0.01, 0.0, 0, 0)
    torch.library.opcheck(
        torch.ops.dispersion_kernels.cuda_row_statistics.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )
    loss, scale = torch.zeros(4, 1, dtype=torch.float64), torch.zeros(4, 5)
    torch.library.opcheck(
        torch.ops.dispersion_kernels.cuda_sequence_losses.default,
        (
            *(*statistics[:2], None, statistics[2], *[None] * 4, loss, scale, None, 5, 2, 0, 4),
            *(False, False, True, False, 0.0, 1.0, 0),
        ),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.dispersion_kernels.cuda_diagonal.default,
        ([z.bfloat16() for z in layers], *statistics[:2], torch.zeros(4, 8, 8, dtype=torch.bfloat16), 4, 0, 0, 0),
        test_utils=("test_schema", "test_faketensor"),
    )
    gradients = [torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)]
    torch.library.opcheck(
        torch.ops.dispersion_kernels.cuda_differences.default,
        ("dk_differences_fp32", layers, statistics[0], gradients, 0),
        test_utils=("test_schema", "test_faketensor"),
    )
    outputs = [torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)]
    torch.library.opcheck(
        torch.ops.dispersion_kernels.cuda_token_gradients.default,
        ("dk_token_gradients_fp32_fp32_fp32", layers, gradients, scale, torch.ones(2, 5), outputs, 0.0, 0, 0),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert set(launches) == {
        "dk_row_statistics_fp32",
        "dk_sequence_losses",
        "dk_diagonal_bf16",
        "dk_differences_fp32",
        "dk_token_gradients_fp32_fp32_fp32",
    }


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_which_kernels_hopper_has_of_its_own(dtype: torch.dtype) -> None:
    z = torch.zeros(2, 130, 200, dtype=dtype)
    names = {}
    for arch in ("sm_80", "sm_90a"):
        launched: list[cuda.Launch] = []
        with cuda.watch_launches(launched.append, arch):
            launch.dispersion([z, z.clone()], AngularSpread(), None, None, True, cuda.CudaKernels(z))
        names[arch] = {one.kernel for one in launched}
    assert any("pair_tiles" in name for name in names["sm_80"])
    own = {name for name in names["sm_80"] if "pair_tiles" in name and dtype != torch.float32}
    assert names["sm_90a"] == names["sm_80"] - own | {f"{name}_wgmma" for name in own}


@built
def test_what_a_watcher_raises() -> None:
    def watch(one: cuda.Launch) -> None:
        raise ValueError(one.kernel)

    layers, *statistics = _statistics()
    with pytest.raises(ValueError, match="dk_row_statistics_fp32"), cuda.watch_launches(watch, "sm_80"):
        torch.ops.dispersion_kernels.cuda_row_statistics(
            "dk_row_statistics_fp32", layers, None, *statistics, [], 0.0, 0.0, 0, 0
        )


@built
def test_operators_refuse_what_they_cannot_run(launches: list[str]) -> None:
    run = torch.ops.dispersion_kernels.cuda_row_statistics
    layers, *statistics = _statistics()
    with pytest.raises(RuntimeError, match="there is no CUDA kernel dk_nothing"):
        run("dk_nothing", layers, None, *statistics, [], 0.0, 0.0, 0, 0)
    with pytest.raises(RuntimeError, match="same sizes and strides"):
        run("dk_row_statistics_fp32", [layers[0], layers[1][:1]], None, *statistics, [], 0.0, 0.0, 0, 0)
    with pytest.raises(RuntimeError, match="next to each other"):
        run("dk_row_statistics_fp32", [layers[0].mT], None, *statistics, [], 0.0, 0.0, 0, 0)
    with pytest.raises(RuntimeError, match="at most 64 layers"):
        run("dk_row_statistics_fp32", layers * 40, None, *statistics, [], 0.0, 0.0, 0, 0)
    with pytest.raises(RuntimeError, match="a copy of each layer, got 1 of 2 layers"):
        run("dk_row_statistics_fp32", layers, None, *statistics, layers[:1], 0.0, 0.0, 0, 0)
    differences, token_gradients = (
        getattr(torch.ops.dispersion_kernels, f"cuda_{name}") for name in ("differences", "token_gradients")
    )
    with pytest.raises(RuntimeError, match="needs a gradient and an output of each layer"):
        token_gradients(
            "dk_token_gradients_fp32_fp32_fp32", layers, layers, statistics[0], statistics[0], [], 0.0, 0, 0
        )
    for gradients, message in (
        ([], "needs a gradient of each layer"),
        ([torch.zeros(2, 5, 8)], "a gradient of each layer, got 1 of 2 layers"),
        ([torch.zeros(2, 5, 8), torch.zeros(2, 4, 8)], "contiguous and of the layers' sizes"),
        ([torch.zeros(2, 5, 8), torch.zeros(2, 8, 5).mT], "contiguous and of the layers' sizes"),
    ):
        with pytest.raises(RuntimeError, match=message):
            differences("dk_differences_fp32", layers, statistics[0], gradients, 0)
    with pytest.raises(RuntimeError, match="dk_row_sweep_tf32_gaussian_loss has 64 tokens, got 32"):
        torch.ops.dispersion_kernels.cuda_row_sweep(
            *("dk_row_sweep_tf32_gaussian_loss", layers, *statistics), *[None] * 10, [], 32, *[0.0] * 4, 0
        )
    assert not launches


@built
@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_a_launch_needs_a_gpu() -> None:
    layers, *statistics = _statistics()
    with pytest.raises(RuntimeError, match="dk_row_statistics_fp32: its tensors are not on a CUDA device"):
        torch.ops.dispersion_kernels.cuda_row_statistics(
            "dk_row_statistics_fp32", layers, None, *statistics, [], 0.0, 0.0, 0, 0
        )
