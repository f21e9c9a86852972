"""The CPU kernel against a float64 oracle, on every instruction set this processor has."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from dispersion_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))

ANGULAR = ("angular_spread", {"tau": 1.0, "clamp": 0.25, "eps": 0.01})
L2_REPEL = ("l2_repel", {"tau": 1.0, "eps": 0.01, "norm_weight": 0.1, "include_diagonal": 0.0})
DISPERSIVE = ("dispersive_l2", {"tau": 1.0, "include_diagonal": 1.0})
# One default of each potential, its sensitivity 1; then the other code paths. The sensitivity is how far the exponent
# magnifies the fp32 rounding of a cosine or a distance, and the tolerance with it.
POTENTIALS = [
    (*ANGULAR, 1),
    ("orthogonalization", {"margin": 0.5, "clamp": 0.25, "eps": 0.01}, 1),
    ("decorrelation", {}, 1),
    ("uniformity", {"t": 2.0}, 1),
    (*L2_REPEL, 10),
    (*DISPERSIVE, 1),
]
VARIANTS = [
    ("angular_spread", {"tau": 2.0, "clamp": 1e-3, "eps": 0.01}, 2),  # polynomials of higher degree
    ("angular_spread", {"tau": 0.1, "clamp": 0.25, "eps": 0.0}, 4),  # no polynomials: arccos and exp
    ("angular_spread", {"tau": 0.05, "clamp": 1e-3, "eps": 0.01}, 10),
    ("angular_spread", {"tau": 1e-3, "clamp": 0.25, "eps": 0.0}, 300),  # rescaled online
    ("orthogonalization", {"margin": 0.9, "clamp": 1e-3, "eps": 0.01}, 10),  # a polynomial of higher degree
    ("orthogonalization", {"margin": 0.9, "clamp": 0.0, "eps": 0.01}, 10),  # no polynomial
    ("uniformity", {"t": 100.0}, 100),  # rescaled online
    ("l2_repel", {"tau": 50.0, "eps": 0.01, "norm_weight": 0.0, "include_diagonal": 1.0}, 10),
    ("dispersive_l2", {"tau": 0.01, "include_diagonal": 0.0}, 100),
]


def _arccos_clipped(c: torch.Tensor, clamp: float) -> torch.Tensor:
    """Straight through the clip: outside the band the value is the boundary's, and so is the slope."""
    inside = c.detach().clip(clamp - 1, 1 - clamp)
    return torch.arccos(inside) - (c - c.detach()) / torch.sqrt(1 - inside**2)


def _oracle_segments(z: torch.Tensor, name: str, p: dict[str, float], segments: list[tuple[int, int]]) -> torch.Tensor:
    """Loss of one sequence of float64 tokens."""
    include_diagonal = bool(p.get("include_diagonal", 0.0))
    log_weights, tokens, total = [], [], 0
    for begin, end in segments:
        if end - begin < 2:
            continue
        x = z[begin:end]
        tokens.append(x)
        keep = torch.ones(len(x), len(x), dtype=torch.bool)
        if not include_diagonal:
            keep.fill_diagonal_(False)
        if name in ("angular_spread", "orthogonalization"):
            x = x / (x.norm(dim=1, keepdim=True) + p["eps"])
            distance = _arccos_clipped(x @ x.T, p["clamp"]) / math.pi
            excess = (p.get("margin", 0.0) - distance).clip(min=0)
            values = -distance / p["tau"] if name == "angular_spread" else excess**2
        elif name == "decorrelation":
            centred = x - x.mean(1, keepdim=True)
            std = x.std(1, keepdim=True)
            x = torch.where(std > 0, centred / torch.where(std > 0, std, 1.0), 0.0)
            values = (x @ x.T / (x.shape[1] - 1)) ** 2
        else:
            scale = {"uniformity": p.get("t", 0), "l2_repel": 1 / p.get("tau", 1)}.get(
                name, 1 / (p.get("tau", 1) * x.shape[1])
            )
            if name == "uniformity":
                norm = x.norm(dim=1, keepdim=True)
                x = torch.where(norm > 0, x / torch.where(norm > 0, norm, 1.0), 0.0)
            x = x - x.mean(0)
            square = x.square().sum(1)
            values = -scale * (square[:, None] + square - 2 * x @ x.T)
        log_weights.append(values[keep])
        total += int(keep.sum())
    if not total:
        return z.sum() * 0.0
    values = torch.cat(log_weights)
    if name in ("orthogonalization", "decorrelation"):
        return values.mean()
    log_mean = torch.logsumexp(values, 0) - math.log(total)
    if name not in ("angular_spread", "l2_repel"):
        return log_mean
    return log_mean + p["eps"] + p.get("norm_weight", 0.0) * torch.cat(tokens).square().mean()


def oracle(
    z: torch.Tensor,
    name: str,
    p: dict[str, float],
    begins: list[int],
    ends: list[int],
    sequence: list[int],
    num_sequences: int,
    index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = z.double().requires_grad_()
    swept = rows if index is None else rows[index]
    losses = []
    for s in range(num_sequences):
        segments = [(b, e) for b, e, q in zip(begins, ends, sequence, strict=True) if q == s]
        losses.append(_oracle_segments(swept, name, p, segments))
    loss = torch.stack(losses)
    (grad,) = torch.autograd.grad(loss.sum(), rows)
    return loss.detach(), grad


def run(
    z: torch.Tensor,
    name: str,
    p: dict[str, float],
    begins: list[int] | None = None,
    ends: list[int] | None = None,
    sequence: list[int] | None = None,
    num_sequences: int = 1,
    index: torch.Tensor | None = None,
    need_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The losses and the gradient, its scale multiplied in."""
    loss, grad, scale = cpu.dispersion(
        z,
        potential_name=name,
        params=list(p.values()),
        begins=torch.tensor([0] if begins is None else begins, dtype=torch.int64),
        ends=torch.tensor([len(z)] if ends is None else ends, dtype=torch.int64),
        sequence=torch.tensor([0] if sequence is None else sequence, dtype=torch.int64),
        num_sequences=num_sequences,
        index=index,
        need_grad=need_grad,
    )
    return loss, None if grad is None or scale is None else grad * scale.unsqueeze(1)


def check(
    z: torch.Tensor,
    name: str,
    p: dict[str, float],
    sensitivity: float = 1,
    begins: list[int] | None = None,
    ends: list[int] | None = None,
    sequence: list[int] | None = None,
    num_sequences: int = 1,
    index: torch.Tensor | None = None,
) -> None:
    tokens = len(z) if index is None else len(index)
    begins, ends = [0] if begins is None else begins, [tokens] if ends is None else ends
    sequence = [0] if sequence is None else sequence
    expected, expected_grad = oracle(z, name, p, begins, ends, sequence, num_sequences, index)
    loss, grad = run(z, name, p, begins, ends, sequence, num_sequences, index)
    loss_only, none = run(z, name, p, begins, ends, sequence, num_sequences, index, need_grad=False)
    assert none is None
    assert grad is not None
    tolerance = 1e-6 * expected.abs().clip(min=max(1.0, 0.1 * sensitivity))
    if name == "l2_repel" and not p["include_diagonal"]:
        # The loss may be that of the nearest tokens, whose distance is a difference of their squares: the naive
        # computation is off by as much, 3e-5 where tokens are equal and |z|^2 is 80.
        tolerance += 2**-22 * 2 * z.square().sum(1).max().double() / p["tau"]
    assert ((loss - expected).abs() <= tolerance).all(), (loss, expected)
    assert ((loss_only - expected).abs() <= tolerance).all(), (loss_only, expected)
    assert grad.isfinite().all()
    error = (grad - expected_grad).abs().max().item()
    largest = expected_grad.abs().max().item()
    assert error <= 5e-6 * sensitivity * largest + 1e-30, error / largest


def tokens(length: int, features: int, dtype: torch.dtype = torch.float32, common: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * length + features)
    z = torch.randn(length, features, generator=generator) + common * torch.randn(features, generator=generator)
    return z.to(dtype)


# L: none, one pair, odd, one short of and beyond a tile or a panel, several tiles. F: below, at and
# beyond a panel (with 2, a standardised token is constant).
SHAPES = [(1, 64), (2, 20), (3, 3), (31, 100), (127, 64), (129, 100), (257, 768), (300, 1030)]


@pytest.mark.parametrize(("name", "p", "sensitivity"), VARIANTS)
@pytest.mark.parametrize(("length", "features"), [(2, 20), (129, 100), (257, 768)])
def test_variants(isa: str, name: str, p: dict[str, float], sensitivity: float, length: int, features: int) -> None:
    check(tokens(length, features), name, p, sensitivity)


@pytest.mark.parametrize(("name", "p", "sensitivity"), POTENTIALS)
@pytest.mark.parametrize(("length", "features"), SHAPES)
def test_shapes(isa: str, name: str, p: dict[str, float], sensitivity: float, length: int, features: int) -> None:
    check(tokens(length, features), name, p, sensitivity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "p", "sensitivity"), POTENTIALS)
@pytest.mark.parametrize(("length", "features"), [(31, 20), (129, 100), (130, 64)])
def test_16_bit_input(
    isa: str, dtype: torch.dtype, name: str, p: dict[str, float], sensitivity: float, length: int, features: int
) -> None:
    check(tokens(length, features, dtype), name, p, sensitivity)


@pytest.mark.parametrize(("name", "p", "sensitivity"), [POTENTIALS[0], POTENTIALS[4]])
@pytest.mark.parametrize("length", [700, 1100])
def test_many_tiles(isa: str, name: str, p: dict[str, float], sensitivity: float, length: int) -> None:
    # Odd and even numbers of tiles.
    check(tokens(length, 40), name, p, sensitivity)


@pytest.mark.parametrize(("name", "p", "sensitivity"), POTENTIALS)
def test_long_tiles(isa: str, name: str, p: dict[str, float], sensitivity: float) -> None:
    # From 4,096 tokens on, tiles are longer.
    ends = torch.tensor([600, 300, *[70] * 46]).cumsum(0).tolist()
    assert ends[-1] >= 4096
    check(tokens(ends[-1], 33), name, p, sensitivity, [0, *ends[:-1]], ends, list(range(48)), 48)


@pytest.mark.parametrize(("name", "p", "sensitivity"), [*POTENTIALS, VARIANTS[2]])
@pytest.mark.parametrize("gather", [False, True])
def test_segments(isa: str, name: str, p: dict[str, float], sensitivity: float, gather: bool) -> None:
    # Empty, single, short ones that share a tile, ones that fill several; gaps; sequences without a pair at either end.
    lengths = [1, 0, 5, 40, 1, 2, 300, 7, 1, 33, 64, 3, 0, 2]
    sequence = [1, 2, 2, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6]
    begins, ends, at = [], [], 4
    for length in lengths:
        begins.append(at)
        ends.append(at + length)
        at = ends[-1] + (2 if length == 5 else 0)
    rows = at + 10
    z = tokens(2 * rows if gather else rows, 60)
    index = torch.randperm(2 * rows, generator=torch.Generator().manual_seed(0))[:rows] if gather else None
    check(z, name, p, sensitivity, begins, ends, sequence, 8, index)


def test_row_stride(isa: str) -> None:
    wide = tokens(90, 200)
    check(wide[:, 13:113], *ANGULAR)
    check(wide[::3, :64], *ANGULAR)
    repeated = wide[:1].expand(40, 200)
    strided, contiguous = run(repeated, *ANGULAR), run(repeated.clone(), *ANGULAR)
    torch.testing.assert_close(strided, contiguous, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "p", "sensitivity"), POTENTIALS)
@pytest.mark.parametrize("need_grad", [False, True])
def test_nan_stays_in_its_sequence(
    isa: str, name: str, p: dict[str, float], sensitivity: float, need_grad: bool
) -> None:
    z = tokens(600, 70)
    z[0, 3] = math.nan  # not in a segment
    z[150, 5] = math.nan
    z[350, 0] = math.inf
    z[590, 0] = math.nan  # alone in its segment
    begins, ends, sequence = [10, 110, 300, 400, 590], [110, 300, 400, 590, 591], [0, 1, 2, 3, 3]
    loss, grad = run(z, name, p, begins, ends, sequence, 4, need_grad=need_grad)
    clean = z.nan_to_num(0.0, 0.0)
    expected, expected_grad = oracle(clean, name, p, begins, ends, sequence, 4, None)
    assert loss.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(loss[[0, 3]], expected[[0, 3]], rtol=1e-6, atol=1e-6)
    if need_grad:
        assert grad is not None
        assert (grad[:10] == 0).all()
        assert (grad[590:] == 0).all()
        for rows in (slice(10, 110), slice(400, 590)):
            error = (grad[rows] - expected_grad[rows]).abs().max() / expected_grad[rows].abs().max()
            assert error < 5e-6 * sensitivity


@pytest.mark.parametrize(("name", "p", "sensitivity"), POTENTIALS)
def test_degenerate_tokens(isa: str, name: str, p: dict[str, float], sensitivity: float) -> None:
    if name in ("angular_spread", "orthogonalization", "uniformity"):
        z = tokens(140, 64)
        z[3] = z[100] = 0.0
        z[5] = z[101] = z[7]  # duplicates, in one tile and across two
        z[9] = -z[11]  # antipodes
        z[102] = -z[11]
        if name == "uniformity":  # the gradient of a zero token is 0 there, not autograd's NaN
            z[3], z[100] = z[4], z[4]
        check(z, name, p, sensitivity)
    elif name == "decorrelation":
        z = tokens(140, 64)
        z[3], z[100] = 0.1, 0.0  # constant tokens
        z[5] = z[7]
        z[9] = 1.0 - z[11]
        check(z, name, p, sensitivity)
    else:
        z = tokens(140, 64)
        z[5] = z[101] = z[7]
        z[3] = 0.0
        check(z, name, p, sensitivity)


def test_zero_token_of_uniformity(isa: str) -> None:
    z = tokens(50, 64)
    z[3] = 0.0
    expected, _ = oracle(z, "uniformity", {"t": 2.0}, [0], [50], [0], 1, None)
    loss, grad = run(z, "uniformity", {"t": 2.0})
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert grad is not None
    assert (grad[3] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize(("name", "p", "sensitivity"), POTENTIALS[:4])
@pytest.mark.parametrize("norm", [1e-4, 1e4])
def test_norms(isa: str, name: str, p: dict[str, float], sensitivity: float, norm: float) -> None:
    z = tokens(100, 64)
    check(z / z.norm(dim=1, keepdim=True) * norm, name, p, sensitivity)
    # Both in one sequence; the gradient of a row is of the order of 1 / norm, so the large rows' is checked by itself.
    z[:50] *= norm
    check(z, name, p, sensitivity)


@pytest.mark.parametrize(("name", "p"), [L2_REPEL, DISPERSIVE])
def test_norms_of_distances(isa: str, name: str, p: dict[str, float]) -> None:
    check(tokens(100, 64) * 1e-4, name, p)
    # A common offset cancels in every distance.
    without_norm = p | ({"norm_weight": 0.0} if "norm_weight" in p else {})
    check(tokens(100, 64) * 0.1 + 1e3, name, without_norm, 20)
    # Weights of distances around 1e8 follow fp32's rounding of the distance: the loss is what can be asked for.
    z = tokens(100, 64) * 1e4
    expected, _ = oracle(z, name, p, [0], [100], [0], 1, None)
    loss, grad = run(z, name, p)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert grad is not None
    assert grad.isfinite().all()


@pytest.mark.parametrize("length", [60, 400])
def test_l2_far_apart_without_diagonal(isa: str, length: int) -> None:
    # Squared distances around 1,500: exp(-d^2) is 0 even in float64, its logarithm is not.
    p = {"tau": 1.0, "eps": 0.0, "norm_weight": 0.1, "include_diagonal": 0.0}
    check(tokens(length, 768), "l2_repel", p, 1000)


def test_one_tile_dominates(isa: str) -> None:
    # The shift of a row block grows by hundreds from one tile to the next.
    z = tokens(500, 32) * 3
    z[480] = z[20] + 0.1
    z[481] = z[470]
    p = {"tau": 0.5, "eps": 0.0, "norm_weight": 0.0, "include_diagonal": 0.0}
    check(z, "l2_repel", p, 1000)


@pytest.mark.parametrize(("name", "p", "sensitivity"), [*POTENTIALS, VARIANTS[2]])
def test_bitwise_repeatable(isa: str, name: str, p: dict[str, float], sensitivity: float) -> None:
    z = tokens(1500, 72)
    begins, ends, sequence = [0, 700, 720, 740], [700, 715, 735, 1500], [0, 1, 1, 2]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2, 1):
            torch.set_num_threads(count)
            results.append(run(z, name, p, begins, ends, sequence, 3))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert grad is not None
        assert results[0][1] is not None
        assert torch.equal(grad, results[0][1])


def test_rows_outside_the_index_stay_zero(isa: str) -> None:
    z = tokens(40, 50)
    z[7] = math.nan
    index = torch.tensor([i for i in range(40) if i not in (7, 21)])
    loss, grad = run(z, *ANGULAR, ends=[38], index=index)
    assert grad is not None
    assert loss.isfinite().all()
    assert (grad[[7, 21]] == 0).all()
    assert grad.isfinite().all()


def test_no_tokens(isa: str) -> None:
    loss, grad = run(torch.empty(0, 8), *ANGULAR, begins=[], ends=[], sequence=[], num_sequences=2)
    assert loss.tolist() == [0.0, 0.0]
    assert grad is not None
    assert grad.shape == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z": torch.zeros(4, 4, dtype=torch.float64)}, "z must be"),
        ({"z": torch.zeros(4, 8).T}, "z must be"),
        ({"potential_name": "perplexity_entropy"}, "potential_name must be"),
        ({"params": {"tau": 1.0}}, "takes the parameters"),
        ({"begins": torch.tensor([0], dtype=torch.int32)}, "begins must be"),
        ({"ends": torch.tensor([4, 5])}, "one entry per segment"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    valid: dict[str, object] = {
        "z": torch.zeros(4, 8),
        "potential_name": ANGULAR[0],
        "params": list(ANGULAR[1].values()),
        "begins": zero,
        "ends": zero + 4,
        "sequence": zero,
        "num_sequences": 1,
        "need_grad": True,
    }
    call: Callable[..., object] = cpu.dispersion
    with pytest.raises(ValueError, match=message):
        call(**(valid | arguments))


@pytest.mark.parametrize(("begins", "ends"), [([0], [9]), ([0, 2], [4, 6]), ([3], [1]), ([-1], [3])])
def test_segments_out_of_range(begins: list[int], ends: list[int]) -> None:
    with pytest.raises(RuntimeError, match="out of range"):
        run(torch.zeros(8, 8), *ANGULAR, begins=begins, ends=ends, sequence=[0] * len(begins))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scaled_is_rounded_once(dtype: torch.dtype, isa: str) -> None:
    grad = torch.randn(2, 4, 50, 300) * 2.0 ** torch.randint(-40, 40, (2, 4, 50, 300))
    grad[0, 0, 0, :5] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0])
    grad[1, 1, 0, :2] = torch.finfo(torch.float32).max
    scale, factor = torch.randn(2, 4, 50), torch.randn(4)
    scale[1, 1, 0] = factor[1] = 1.0
    for grad_of, factors in (
        (grad, factor),
        (grad, factor[0]),
        (grad[..., :37], torch.randn(200)),  # features that are no whole vectors
        (grad[:, :0], factor),
    ):
        scale_of = scale[:, : grad_of.shape[1]].contiguous()
        rows = factors.repeat_interleave(scale_of[0].numel() // factors.numel()).view(scale_of.shape[1:])
        expected = (grad_of * (scale_of * rows).unsqueeze(3)).to(dtype)
        given = [layer_grad.contiguous() for layer_grad in grad_of]
        before = [layer_grad.clone() for layer_grad in given]
        scaled = cpu.scaled(given, scale_of, factors, dtype)
        torch.testing.assert_close(scaled, list(expected), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(given, before, rtol=0, atol=0, equal_nan=True)
        without, second = cpu.scaled([None, given[1]], scale_of, factors, dtype, in_place=True)
        assert without is None
        assert second is not None
        torch.testing.assert_close(second, expected[1], rtol=0, atol=0, equal_nan=True)
        assert (second.data_ptr() == given[1].data_ptr()) == (dtype == torch.float32 or not second.numel())


def test_nothing_to_scale() -> None:
    assert cpu.scaled([None], torch.zeros(1, 3), torch.ones(1), torch.float32) == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grads": [torch.zeros(2, 3, 4, dtype=torch.float64)]}, "grads must be contiguous, float32"),
        ({"grads": [torch.zeros(2, 4, 3).transpose(1, 2)]}, "grads must be contiguous, float32"),
        ({"grads": [torch.zeros(2, 3, 4)] * 2}, "grads must be layers"),
        ({"grads": [torch.zeros(2, 4, 4)]}, "grads must be layers"),
        ({"scale": torch.zeros(1, 3, 2)}, "grads must be .*, scale"),
        ({"factor": torch.zeros(4)}, "divisor of the rows"),
        ({"factor": torch.zeros(0)}, "divisor of the rows"),
        ({"dtype": torch.int32}, "dtype float32"),
    ],
)
def test_scaled_refuses_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    valid = {
        "grads": [torch.zeros(2, 3, 4)],
        "scale": torch.zeros(1, 2, 3),
        "factor": torch.zeros(2),
        "dtype": torch.float32,
    }
    call: Callable[..., object] = cpu.scaled
    with pytest.raises(ValueError, match=message):
        call(**(valid | arguments))


def test_rows_of_every_even_spacing() -> None:
    z = torch.randn(6, 5, 40)
    one_token = z[:, 0].clone().view(1, 6, 40).transpose(0, 1)  # contiguous; its strides are (40, 240, 1)
    spacings = [(z, 40), (z[..., :32], 40), (z[:, 0], 200), (z[:, 0, :1], 200), (one_token, 40)]
    for tokens, stride in spacings:
        assert cpu.row_stride(tokens) == stride
        rows = tokens.reshape(-1, tokens.shape[-1])
        for strided, packed in zip(_both_calls(tokens), _both_calls(rows.clone()), strict=True):
            torch.testing.assert_close(strided.flatten(), packed.flatten(), rtol=0, atol=0)
    for tokens in (z[:, :3], z.transpose(0, 1), z.mT, z[:1].expand(6, -1, -1)):
        assert cpu.row_stride(tokens) is None


def _both_calls(z: torch.Tensor) -> list[torch.Tensor]:
    """The losses and their gradient of tokens that all pair, and the total loss."""
    whole = torch.zeros(1, dtype=torch.int64), torch.tensor([z.shape[:-1].numel()])
    options = {"potential_name": ANGULAR[0], "params": list(ANGULAR[1].values()), "num_sequences": 2}
    call: Callable[..., tuple[torch.Tensor, ...]] = cpu.dispersion
    segments = dict(zip(("begins", "ends", "sequence"), (*whole, torch.ones(1, dtype=torch.int64)), strict=True))
    loss, grad, scale = call(z, **options, **segments, need_grad=True)
    total, _, _ = call(z, **options, **segments, need_grad=True, total=True)
    assert total.dtype == torch.float32
    assert total == loss.sum().float()
    assert grad.shape == z.shape
    return [loss, grad, scale]


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPERSION_KERNELS_CPU_ISA", "mmx")
    assert "mmx" in str(cpu.unavailable_reason())
    assert cpu.isa() == ""


def test_import_loads_no_library() -> None:
    code = "import dispersion_kernels.backends.cpu as n; assert n._library.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], check=True)
