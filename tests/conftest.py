"""What the tests of the loss share: backends, potentials, the float64 oracle and the tolerance rule."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dispersion_kernels import (
    AngularSpread,
    Decorrelation,
    DispersiveL2,
    L2Repel,
    Orthogonalization,
    PerplexityEntropy,
    Potential,
    Uniformity,
    fused_dispersion_loss,
    supported,
)
from dispersion_kernels.backends import cpu
from dispersion_kernels.sampling import partition, threshold

POTENTIALS: dict[str, Potential] = {
    "angular_spread": AngularSpread(),
    "orthogonalization": Orthogonalization(),
    "l2_repel": L2Repel(tau=10.0),
    "l2_repel_published": L2Repel(),
    "l2_repel_diagonal_out": L2Repel(tau=10.0, include_diagonal=False),
    "decorrelation": Decorrelation(),
    # Exponents of some tens, as those of the others: fp32 rounds an exponent of hundreds by 1e-5, naive or not.
    "perplexity_entropy": PerplexityEntropy(sigma2=50.0),
    "uniformity": Uniformity(),
    "dispersive_l2": DispersiveL2(),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED
# What use_deterministic_algorithms asks of matrix products on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ON_REQUEST = ("attack", "emulator", "integrations", "interpreter", "process", "sanitizers", "slow", "wheel")
IMPLS = ["cpu", "torch"]
GPU_IMPLS = [impl for impl in ("triton", "cuda") if GPU and supported(impl, torch.zeros(1, device="cuda"))]
IMPLS += [pytest.param(impl, marks=pytest.mark.gpu) for impl in GPU_IMPLS]  # type: ignore[misc]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The default run is what two cores do in three minutes: a test with a marker of ON_REQUEST runs where `-m` or the
    test's own address names it, and the Triton kernels' tests where something can run them."""
    named = {name for name in ON_REQUEST if name in config.option.markexpr}
    if "gpu" in config.option.markexpr:
        named.add("slow")
    if INTERPRETED or any("::" in argument for argument in config.args):
        named.update(ON_REQUEST)

    def is_left_out(item: pytest.Item) -> bool:
        markers = {marker.name for marker in item.iter_markers()}.intersection(ON_REQUEST)
        return (bool(markers) and not markers & named) or ("TestKernels" in item.nodeid and not (GPU or INTERPRETED))

    left_out = [item for item in items if is_left_out(item)]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


def slow_but_first(values: Iterable[Any], ids: Iterable[str] | None = None) -> list[Any]:
    """Parameters of a test, of which all but the first are marked slow."""
    named = zip(values, ids or itertools.repeat(None), strict=False)
    marks: Iterator[Any] = itertools.chain([()], itertools.repeat(pytest.mark.slow))
    return [pytest.param(value, id=name, marks=mark) for (value, name), mark in zip(named, marks, strict=False)]


class Answer(NamedTuple):
    loss: Tensor
    grad: Tensor


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty gives NaN, so that reading what nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    callspec = getattr(request.node, "callspec", None)
    on_gpu = GPU and callspec is not None and callspec.params.get("impl") in GPU_IMPLS
    torch.set_default_device("cuda" if on_gpu else None)
    yield
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _estimates_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU short sequences would have all their pairs evaluated."""
    monkeypatch.setattr(threshold, "SECONDS_PER_OPERATION", 0.0)


def read_nothing(patch: pytest.MonkeyPatch) -> None:
    """Sampled pairs as on an accelerator, where reading a value would synchronise."""
    patch.setattr(partition, "may_read", lambda device: False)


def _isas() -> list[str]:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("avx2", "avx512", "neon"):
            patch.setenv("DISPERSION_KERNELS_CPU_ISA", name)
            if cpu.unavailable_reason() is None:
                found.append(name)
    return found


@pytest.fixture(params=_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set of the CPU kernel: each that this processor has."""
    monkeypatch.setenv("DISPERSION_KERNELS_CPU_ISA", request.param)
    assert cpu.isa() == request.param
    return str(request.param)


def skip_unless_supported(impl: str, z: Tensor, potential: str | Potential = "angular_spread") -> None:
    support = supported(impl, z, potential)
    if not support:
        pytest.skip(f"impl={impl!r}: {support.reason}")


class Edge(NamedTuple):
    """A call at the edge of what fp32 holds, and the errors (as of :func:`relative_errors`) that are rounding."""

    potential: Potential
    z: Tensor
    loss: float
    grad: float

    def check(self, answer: Answer) -> None:
        exact = oracle(self.z, self.potential)
        assert exact.grad.isfinite().all()
        errors = relative_errors(answer, exact)
        print(f"{self.potential}: {errors[0]:.1e} of {self.loss:.0e}, {errors[1]:.1e} of {self.grad:.0e}")
        assert errors[0] <= self.loss
        assert errors[1] <= self.grad


def edges() -> dict[str, Edge]:
    """For every backend: outliers, equal and opposite tokens, and parameters that fp32 rounds to their limit."""
    generator = torch.Generator().manual_seed(2)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    unit = torch.nn.functional.normalize(randn(1, 64, 64), dim=2)
    outlier = randn(1, 96, 64)
    outlier[0, 0] *= 300
    equal = randn(1, 32, 16)
    equal[0, 1] = equal[0, 0]
    opposite = randn(1, 40, 16)
    opposite[0, 1], opposite[0, 3] = opposite[0, 0], -opposite[0, 2]
    far = 1e6 * randn(1, 40, 16)
    far[0, 20:] = far[0, :20]
    entropy = PerplexityEntropy
    cases = {
        "entropy of an outlier": Edge(entropy(), outlier, 1e-5, 1e-3),
        "entropy, norms of 3e4": Edge(entropy(sigma2=1e7), 3e4 * unit, 2e-6, 5e-5),
        "entropy, norms of 1e15": Edge(entropy(), 1e15 * unit, 2e-6, 0.0),
        "entropy, eps of 1e-10": Edge(entropy(sigma2=50.0, eps=1e-10), outlier[:, 1:], 2e-6, 2e-5),
        "entropy, eps below fp32": Edge(entropy(sigma2=5.0, eps=1e-50), outlier[:, 1:], 2e-6, 2e-5),
        "entropy of one other token": Edge(entropy(eps=1e-8), outlier[:, 1:3], 2e-6, 0.0),
        # Of a slope that fp32 multiplies by 2^11.5, and the angle of 2^-11.5 that it resolves.
        "angular_spread, clamp = 0": Edge(AngularSpread(clamp=0.0, eps=0.0), opposite, 1e-5, 2e-3),
        "angular_spread, clamp = 1e-9": Edge(AngularSpread(clamp=1e-9, eps=0.0), opposite, 1e-5, 2e-3),
        "orthogonalization, clamp = 0": Edge(Orthogonalization(clamp=0.0, eps=0.0), opposite, 1e-5, 2e-3),
        "orthogonalization, clamp = 1e-9": Edge(Orthogonalization(clamp=1e-9, eps=0.0), opposite, 1e-5, 2e-3),
        "uniformity of equal tokens, t = 10": Edge(Uniformity(t=10.0), equal, 2e-6, 5e-5),
        "uniformity of equal tokens, t = 20": Edge(Uniformity(t=20.0), equal, 2e-6, 5e-5),
        "uniformity of equal tokens, t = 100": Edge(Uniformity(t=100.0), equal, 2e-6, 5e-5),
        "equal tokens far away": Edge(DispersiveL2(include_diagonal=False), far, 2e-6, 0.0),
        "equal tokens far away, with the diagonal": Edge(L2Repel(norm_weight=0.0), far, 2e-6, 0.0),
    }
    return {name: edge._replace(z=edge.z.contiguous()) for name, edge in cases.items()}


def evaluate(z: Tensor, potential: str | Potential, upstream: Tensor | None = None, **options: Any) -> Answer:
    """Loss of each sequence and the gradient of their sum weighted by ``upstream``."""
    z = z.detach().requires_grad_()
    loss = fused_dispersion_loss(z, potential, reduction="none", **options)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype))
    assert z.grad is not None
    return Answer(loss.detach(), z.grad)


def oracle(z: Tensor, potential: str | Potential, upstream: Tensor | None = None, **options: Any) -> Answer:
    """The materialised computation in float64, on exactly the numbers that ``z`` holds."""
    return evaluate(z.double(), potential, upstream, **{**options, "impl": "reference"})


def relative_errors(answer: Answer, exact: Answer) -> tuple[float, float]:
    """Of the loss, relative to the larger of it and 1; of the gradient, relative to its largest entry."""
    loss = ((answer.loss.double() - exact.loss).abs() / exact.loss.abs().clamp(min=1)).max().item()
    scale = exact.grad.abs().max().clamp(min=1e-30)
    return loss, ((answer.grad.double() - exact.grad).abs().max() / scale).item()


def assert_as_accurate_as_naive(
    z: Tensor, potential: str | Potential, answer: Answer, exact: Answer, exponent: float = 0.0, **options: Any
) -> None:
    """fp32: loss to 1e-6 and gradient to 5e-6, or what the naive fp32 computation reaches where that is worse (squared
    distances of hundreds cost it digits); 16 bits: no worse than naive in that dtype, and a rounding of slack.

    ``exponent``: of psi, where it is large: fp32 holds it to half an ulp, and psi to no less than that. A similarity's
    last digits, which are luck, are then digits of psi: naive is the worst of four orders of the features."""
    generator, count = torch.Generator().manual_seed(0), z.shape[-1]
    orders = [torch.arange(count), *(torch.randperm(count, generator=generator) for _ in range(3 if exponent else 0))]
    errors = []
    for order in orders:
        permuted = evaluate(z[..., order.to(z.device)], potential, **{**options, "impl": "reference"})
        errors.append(relative_errors(permuted, exact._replace(grad=exact.grad[..., order.to(z.device)])))
    naive = max(error[0] for error in errors), max(error[1] for error in errors)
    ours = relative_errors(answer, exact)
    print(
        f"{potential} {tuple(z.shape)} {z.dtype}: ours {ours[0]:.1e} {ours[1]:.1e}, naive {naive[0]:.1e} {naive[1]:.1e}"
    )
    bounds = {
        torch.float64: (1e-12, 1e-10),
        torch.float32: (max(1e-6, 2 * naive[0]), max(5e-6, 2 * naive[1] + exponent * 2**-24)),
        # A gradient rounded once is off by half a unit in the last place of each of its entries.
        torch.bfloat16: (naive[0] + 1e-6, naive[1] + 2**-8),
        torch.float16: (naive[0] + 1e-6, naive[1] + 2**-11),
    }[z.dtype]
    assert ours[0] <= bounds[0]
    assert ours[1] <= bounds[1]
