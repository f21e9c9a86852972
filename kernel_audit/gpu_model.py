"""The GPU's time on paper: what the launcher launches, what the static report says of its kernels, a device's rates.

``python -m kernel_audit.gpu_model [--out docs/gpu-model.md] [--measure]``

Nothing is run on a GPU, but with ``--measure``, which puts measured times in place of the predicted ones of the GPU
that the machine has.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import variants
from benchmarks.loss import SHORT, forward_backward, out_of_memory
from benchmarks.machine import describe, write_text
from benchmarks.timing import interleaved, quartiles
from dispersion_kernels.gpt2.model import PRESETS
from kernel_audit import host_time
from kernel_audit.static_report import DEVICES, Device, Row, examine


@dataclass(frozen=True)
class Card:
    """A GPU: the static report's device, its memory and its L2 cache."""

    device: Device
    arch: str
    accumulation: float  # share of the device's rate that tensor products with sums in fp32 reach
    memory: float  # bytes per second
    l2: float  # bytes per second

    def rate(self, precision: str) -> float:
        """Rate of matrix products in FLOP/s: ``"16-bit"``, ``"tf32"`` or ``"fp32"``, the last without tensor cores."""
        share = 1.0 if precision == "fp32" else self.accumulation
        return share * self.device.flops[precision] * self.device.sms * self.device.gigahertz * 1e9


CARDS = [
    Card(replace(DEVICES["sm_80"], name="A100"), "sm_80", 1.0, 2.04e12, 5.0e12),
    Card(replace(DEVICES["sm_90"], name="H100"), "sm_90", 1.0, 3.35e12, 5.7e12),
    Card(replace(DEVICES["sm_90"], name="H200"), "sm_90", 1.0, 4.8e12, 5.7e12),
    Card(replace(DEVICES["sm_89"], name="RTX 4090", sms=128, gigahertz=2.52), "sm_89", 0.5, 1.01e12, 5.0e12),
    Card(replace(DEVICES["sm_100"], name="B200"), "sm_100", 1.0, 8.0e12, 10.0e12),
]
LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]
FEATURES = [768, 128]
# Tokens of a call: as many sequences as make this number, or one sequence that is longer.
TOKENS = 8192
# Lengths of packed sequences, which no tile divides.
PACKED_LENGTHS = [250, 500, 1000, 2000, 4000]
LAUNCH = 2.5e-6
EFFICIENCY = 0.7
LIBRARY_TILE = 128
# Bytes that a kernel moves an element of the tokens, which have ``size`` bytes, and G ``of_g``. The diagonal of the
# slopes takes an eighth of the tokens, which the pairs have left in L2.
BYTES: dict[str, Callable[[int, int], int]] = {
    "row_statistics_kernel": lambda size, of_g: size,
    "diagonal_kernel": lambda size, of_g: 0,
    "sequence_losses_kernel": lambda size, of_g: 0,
    "token_gradients_kernel": lambda size, of_g: of_g + 2 * size,
}
# Peak memory of the naive version, in L x L matrices, measured on a CPU (docs/results/memory-cpu.csv).
NAIVE_MATRICES = 8.3
# Share of the 16-bit rate that a training step reaches, and its FLOPs per token and parameter.
UTILISATION, STEP_FLOPS = 0.4, 6
# Figures of the host in microseconds.
_FIGURES = {**host_time.HOST._asdict(), "driver": host_time.DRIVER, "dispatch": host_time.DISPATCH}
US = {name: round(1e6 * seconds) for name, seconds in _FIGURES.items()}

HEAD = f"""\
# GPU time on paper

Made by `python -m kernel_audit.gpu_model --out docs/gpu-model.md`, on a machine without a GPU: predictions, none of
which has been held against a measurement yet. On a machine with one of these GPUs, `--measure` puts measured times in
their place.

What is added up: every kernel that the launcher launches for forward and backward of one layer, and every operation
of PyTorch's, both recorded from the launcher itself on tensors without memory; B = {TOKENS:,} / L sequences, or one
that is longer; `angular_spread`.

- *Rates*: SMs, clocks and rates of the static report's table, at boost clock. The RTX 4090 has 128 SMs at 2.52 GHz and
  sums in fp32 at half the rate of its architecture's professional cards. Device memory, TB/s: A100 (80 GB) 2.04, H100
  SXM 3.35, H200 4.8, RTX 4090 1.01, B200 8.0, from the data sheets. L2 cache, TB/s: A100 5.0, H100 and H200 5.7, RTX
  4090 5.0, about what microbenchmarks report, and B200 10, a guess.
- *tensor, fma, xu (special functions), alu, lsu*: milliseconds that each pipe is busy: instructions a tile from the
  compiled kernel ([full static report](static-report.md)) times tiles, with the library's products under tensor, at the
  data sheet's rates and on all SMs.
- *L2, memory*: milliseconds that the bytes take: through L2 the tokens that each tile reads, none of them taken for a
  hit in L1, and the slopes, written to the workspace and read by the library; through memory the tokens, G (the
  gradient before the row transform), the sums and the gradient in the input's dtype.
- *at best*: each kernel takes as long as its busiest pipe or its L2 traffic, with as many tiles on every SM as on the
  busiest (wave quantisation); the library's products run at the data sheet's rate.
- *estimate*: the tensor cores reach {EFFICIENCY:.0%} of the data sheet's rate, in the library's products, too, whose
  {LIBRARY_TILE} x {LIBRARY_TILE} tiles come in whole waves; the epilogue does not overlap with the products of its
  tile, and the workspace goes through device memory, as if L2 held none of it.
- Both add {LAUNCH * 1e6:g} us for each launch and for each small operation. The host's own time is left out of them: it
  hides behind a model's other kernels, but not where the loss is all that runs.
- *host*: the time in which the host issues forward and backward of that layer. Where it is longer than the time on the
  GPU, the host bounds a loss that runs alone. Measured by `python -m kernel_audit.host_time` without a GPU
  ({host_time.MACHINE}):
  CPU time of the public function and its backward on CPU tensors, with Triton's launch up to its launcher in C, and
  without the kernels and the library's products; a fit, within 7%, to five calls of one layer and of twelve:
  {US["call"]} us a call, {US["layer"]} a layer, {US["step"]} a launch or operation for its
  arguments, and {US["launch"]} more a launch in Triton. Assumed, as usual figures:
  {US["driver"]} us a launch for Triton's launcher in C and the driver, and {US["dispatch"]} us an operation for
  PyTorch's dispatch on CUDA tensors. In none of it: a first call, which compiles; autograd's change of threads and its
  own operations; queries of the device.
- *naive*: the materialised version in the same dtype, eager: the bytes that its operations read and write, recorded in
  the same way, at the device's bandwidth, or its products' FLOPs at {EFFICIENCY:.0%} of the rate where they take
  longer; its launches counted once, as if it took all sequences at a time. Its peak is taken as {NAIVE_MATRICES} L x L
  matrices of every sequence, as measured on a CPU. "-": that is more than 80 GiB.
- Latencies, clocks that fall under load, power limits, bank conflicts and TLB misses are in none of it.
"""
COLUMNS = (
    "L (B) | launches | tensor | fma | xu | alu | lsu | L2 | memory | at best, ms | estimate, ms | host, ms | "
    "naive moves, GB | its peak, GiB | naive, ms | naive / estimate"
)
PIPES = ("tensor", "fma", "xu", "alu", "lsu", "L2", "memory")


class Operation(NamedTuple):
    """Operation of PyTorch."""

    read: int  # bytes
    written: int  # bytes
    product: tuple[int, int, int, int] | None  # batch, m, n, k of a matrix product


class Work(NamedTuple):
    """Launches and operations of a call on the GPU."""

    launches: list[Any]  # ahead_of_time.Launch
    operations: list[Operation]


@dataclass
class Time:
    """Predicted seconds, busy seconds of each of ``PIPES``, and seconds in which the host issues the call."""

    best: float = 0.0
    estimate: float = 0.0
    pipes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    launches: int = 0
    host: float = 0.0

    def add(self, best: float, estimate: float) -> None:
        self.best += best + LAUNCH
        self.estimate += estimate + LAUNCH
        self.launches += 1


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernel_audit.gpu_model", description=__doc__)
    parser.add_argument("--out", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--measure", action="store_true", help="with the times of this machine's GPU, one of the list")
    args = parser.parse_args(arguments)
    measured = {card_of_this_machine().device.name: measure(LENGTHS, FEATURES)} if args.measure else {}
    text = render(CARDS, LENGTHS, FEATURES, measured)
    print(text)
    if args.out is not None:
        write_text(args.out, text)


def card_of_this_machine() -> Card:
    if not torch.cuda.is_available():
        raise SystemExit("--measure needs a CUDA device, and PyTorch finds none")
    name = torch.cuda.get_device_name()
    for card in CARDS:
        if card.device.name in name:
            return card
    known = ", ".join(card.device.name for card in CARDS)
    raise SystemExit(f"--measure: this machine has {name}, and the model {known}; add its rates to CARDS")


def measure(lengths: Iterable[int], features: Iterable[int]) -> dict[tuple[int, int], tuple[float, float | None]]:
    """Seconds of forward and backward by (F, L): of the Triton backend, and of the naive version, None if memory runs
    out."""
    device, measured = torch.device("cuda"), {}
    for width in features:
        for length in lengths:
            torch.manual_seed(0)
            z = torch.randn(batch_of(length), length, width, device=device, dtype=torch.bfloat16, requires_grad=True)
            calls: dict[str, Callable[[], object]] = {"ours": partial(forward_backward, z, variants.build("triton"))}
            naive = partial(forward_backward, z, variants.naive)
            try:
                naive()
                calls["naive"] = naive
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            times = interleaved(calls, rounds=7, device=device)
            medians = {name: quartiles(values).median for name, values in times.items()}
            measured[width, length] = medians["ours"], medians.get("naive")
    return measured


def batch_of(length: int) -> int:
    return max(1, TOKENS // length)


def render(
    cards: list[Card],
    lengths: list[int],
    features: list[int],
    measured: dict[str, dict[tuple[int, int], tuple[float, float | None]]],
) -> str:
    """Page in Markdown. ``measured``: results of ``measure`` by the name of the card."""
    parts = [HEAD]
    for card in cards:
        card_times = measured.get(card.device.name)
        what = "measured" if card_times else "predicted"
        parts += [f"## {card.device.name}", ""]
        if card_times:
            machine = describe()
            parts += [", ".join(machine[name] for name in ("device", "torch", "cuda", "triton", "date", "commit")), ""]
        for width in features:
            parts += [f"{what}, F = {width}, bf16, forward and backward:", ""]
            columns = COLUMNS + " | measured, ms | naive measured, ms | naive / measured" if card_times else COLUMNS
            parts += [f"| {columns} |", "|---" * (columns.count("|") + 1) + "|"]
            for length in lengths:
                cells = _cells(card, width, length)
                if card_times:
                    cells += _measured_cells(*card_times[width, length])
                parts.append(f"| {' | '.join(cells)} |")
            parts.append("")
    return "\n".join([*parts, _packed(cards), _training(cards)])


def _packed(cards: list[Card]) -> str:
    """Section on packed sequences: beside rows of the same tokens."""
    lines = [
        "## Packed sequences",
        "",
        "Estimates in milliseconds, F = 768, bf16, forward and backward of one layer, of sequences of one length: as "
        "rows of a batch; packed in one row with `max_seqlen` (or bounds on the CPU); and packed without it, by the "
        "fused kernel. In brackets, how many times as long as the rows. Programs that find nothing to do count as "
        "none. Packing costs tiles of two sequences, a copy of the tokens and some 20 small operations on the bounds, "
        "which a list of layers shares: the last line is of 12 layers in one call, the times a layer.",
        "",
        f"| L (sequences) | {' | '.join(card.device.name for card in cards)} |",
        "|---" * (len(cards) + 1) + "|",
    ]
    for length, layers in [*((length, 1) for length in PACKED_LENGTHS), (PACKED_LENGTHS[2], 12)]:
        count, cells = TOKENS // length, []
        for card in cards:
            estimate = partial(_estimate, card, layers)
            rows = estimate(count, length)
            known, unknown = (estimate(1, count * length, packed=Packed(count, length, one)) for one in (True, False))
            cells.append(f"{_ms(rows)}; {_ms(known)} ({known / rows:.2f}); {_ms(unknown)} ({unknown / rows:.2f})")
        lines.append(f"| {length:,} ({count}){', of 12 layers' if layers > 1 else ''} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _estimate(card: Card, layers: int, batch: int, length: int, packed: Packed | None = None) -> float:
    """Estimated seconds a layer, for 768 features in bf16."""
    return time_of_ours(card, batch, length, 768, torch.bfloat16, layers=layers, packed=packed).estimate / layers


def _cells(card: Card, features: int, length: int) -> list[str]:
    batch, dtype = batch_of(length), torch.bfloat16
    ours = time_of_ours(card, batch, length, features, dtype)
    naive, moved = time_of_naive(card, batch, length, features, dtype)
    peak = NAIVE_MATRICES * batch * length**2 * dtype.itemsize / 2**30
    return [
        f"{length:,} ({batch})",
        str(ours.launches),
        *(_ms(ours.pipes[pipe]) for pipe in PIPES),
        _ms(ours.best),
        _ms(ours.estimate),
        _ms(ours.host),
        f"{moved / 1e9:,.2f}",
        f"{peak:,.2f}",
        *([_ms(naive), f"{naive / ours.estimate:.1f}"] if peak <= 80 else ["-", "-"]),
    ]


def _measured_cells(ours: float, naive: float | None) -> list[str]:
    return [_ms(ours), *(["out of memory", "-"] if naive is None else [_ms(naive), f"{naive / ours:.1f}"])]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _training(cards: list[Card]) -> str:
    """Section on training: the share of a step of the trainer's preset gpt2 that the loss on all layers takes."""
    config, batch = PRESETS["gpt2"], 8
    weights = 12 * config.layers * config.width**2 + (config.vocab + config.context) * config.width
    tokens = batch * config.context
    # FLOPs of attention per token: two products over, on average, half of the tokens, and twice that in backward.
    attention = 6 * config.layers * config.width * config.context
    flops = tokens * (STEP_FLOPS * weights + attention)
    lines = [
        "## In training",
        "",
        f"A step of GPT-2 ({weights / 1e6:.0f} M parameters) on {batch} x {config.context:,} tokens takes "
        f"{flops / 1e12:.1f} TFLOP, here at {UTILISATION:.0%} of the 16-bit rate. Beside it the loss on all "
        f"{config.layers} layers, in one call with a list of them. Under autocast the residual stream is fp32; the "
        "loss takes it rounded to bf16, and the first column has the time of that, in forward and backward. "
        "The others: the loss of the fp32 hidden states, its products in tf32 or in true fp32, as "
        "`torch.set_float32_matmul_precision` says (`high`; `highest`, PyTorch's default), and of bf16 ones in a call "
        "a layer. All have autograd's addition of the gradient to that of the residual stream, in fp32, or in bf16 in "
        "the last of them. The goal is 5% of the step. What forward keeps for backward is a bf16 activation a layer, "
        "and under autocast the rounded hidden state. Beside them the time in which the host issues the loss of bf16 "
        "hidden states, in one call and in a call a layer. Milliseconds, and the share of the step, at best and "
        "estimate:",
        "",
        "| | step | under autocast: rounded to bf16 | fp32, `high` | fp32, `highest` | bf16, a call a layer | "
        "host, one call | host, a call a layer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for card in cards:
        step = flops / (UTILISATION * card.rate("16-bit"))
        cells = [card.device.name, _ms(step)]
        rounding = Time()
        for _ in range(2 * config.layers):  # rounding of the hidden states, and of the gradient back to fp32
            _add_moved(rounding, card, (4 + 2) * tokens * config.width)
        # Autograd adds the gradient to that of the residual stream, which has ``size`` bytes a number.
        added = {size: Time() for size in (2, 4)}
        for size, time in added.items():
            for _ in range(config.layers):
                _add_moved(time, card, 3 * size * tokens * config.width)
        ways: list[tuple[torch.dtype, str | None, int, list[Time]]] = [
            (torch.bfloat16, None, config.layers, [rounding, added[4]]),
            (torch.float32, "tf32", config.layers, [added[4]]),
            (torch.float32, "tf32x3", config.layers, [added[4]]),
            (torch.bfloat16, None, 1, [added[2]]),
        ]
        hosts = []
        for dtype, precision, together, around in ways:
            one = time_of_ours(card, batch, config.context, config.width, dtype, precision, together)
            calls = config.layers // together
            best = calls * one.best + sum(part.best for part in around)
            estimate = calls * one.estimate + sum(part.estimate for part in around)
            cells.append(f"{_ms(best)} to {_ms(estimate)}, {best / step:.1%} to {estimate / step:.1%}")
            hosts.append(calls * one.host)
        cells += [_ms(hosts[0]), _ms(hosts[-1])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def time_of_ours(
    card: Card,
    batch: int,
    length: int,
    features: int,
    dtype: torch.dtype,
    precision: str | None = None,
    layers: int = 1,
    packed: Packed | None = None,
) -> Time:
    """Time of forward and backward of the Triton kernels. ``precision`` is of fp32 products, ``"tf32"`` or
    ``"tf32x3"``."""
    work = record(card.arch, card.device.sms, batch, length, features, dtype, precision, layers, packed)
    library = {torch.bfloat16: "16-bit", torch.float32: "tf32" if precision == "tf32" else "fp32"}[dtype]
    host = host_time.seconds(layers, len(work.launches), len(work.operations))
    time, size, tokens = Time(host=host), dtype.itemsize, layers * batch * length * features
    for launch in work.launches:
        name = launch.kernel.__name__
        if name in ("pair_tiles_kernel", "row_sweep_kernel", "band_product_kernel"):
            row = examined(card.arch, name, features, precision or SHORT[dtype], packed)
            _add_tiles(time, card, row, launch, size, packed)
        else:
            of_g = launch.arguments["gradients"][0].element_size() if "gradients" in launch.arguments else 0
            copied = size if launch.arguments.get("CLEAN") else 0
            _add_moved(time, card, (BYTES[name](size, of_g) + copied) * tokens)
    for operation in work.operations:
        if operation.product is None:
            _add_moved(time, card, operation.read + operation.written)
        else:
            _add_product(time, card, operation, card.rate(library), size)
    return time


def _add_tiles(time: Time, card: Card, row: Row, launch: Any, size: int, packed: Packed | None = None) -> None:
    """Adds a launch of the kernel whose figures are in ``row``."""
    arguments, variant = launch.arguments, row.variant
    programs, tiles = math.prod(launch.grid), 1
    read = written = 0
    if "WRITE" in arguments:  # pair_tiles_kernel
        block = arguments["BLOCK"]
        read, written = 2 * block * arguments["width"] * size, 2 * block**2 * size * arguments["WRITE"]
        if packed is not None:
            of_all = -(-arguments["length"] // block)
            passes = (packed.tiles(block, block) + of_all) // 2 * arguments["tiles_i"] // of_all
            programs = passes * launch.grid[1]
    elif "BLOCK" in arguments:  # band_product_kernel
        assert packed is not None
        block = arguments["BLOCK"]
        read, of_all = block * (block + arguments["BLOCK_F"]) * size, -(-arguments["length"] // block)
        programs = packed.tiles(block, block) * launch.grid[0] // of_all * launch.grid[1]
    else:
        block = arguments["BLOCK_N"]
        tiles, read = -(-arguments["length"] // block), block * arguments["width"] * size
        if packed is not None:
            tiles, programs = 1, packed.tiles(arguments["BLOCK_M"], block) * launch.grid[1] * launch.grid[2]
    # Tensor cycles with repeated products: from the opcodes, or, where these do not tell, from the three parts of a
    # tf32x3 product.
    parts = 3.0 if "tf32x3" in variant.label else 1.0
    tensor = row.tensor * max(parts, row.tensor_busy / row.tensor) / card.accumulation
    hertz, sms = card.device.gigahertz * 1e9, card.device.sms
    waves = -(-programs // sms) * tiles
    read, written = read * programs * tiles, written * programs
    for pipe, cycles in {**row.cycles, "tensor": tensor}.items():
        time.pipes[pipe] += programs * tiles * cycles / sms / hertz
    time.pipes["L2"] += (read + written) / card.l2
    best = waves * max(tensor, *row.cycles.values()) / hertz
    apart = max([tensor / EFFICIENCY, *row.loop.values()]) + max(row.epilogue.values())
    time.add(max(best, (read + written) / card.l2), max(waves * apart / hertz, read / card.l2, written / card.memory))


def _add_product(time: Time, card: Card, operation: Operation, rate: float, size: int) -> None:
    """Adds a matrix product of the library, of factors of ``size`` bytes per number, with an fp32 result."""
    assert operation.product is not None
    batch, m, n, k = operation.product
    flops = 2.0 * batch * m * n * k
    tiles = batch * -(-m // LIBRARY_TILE) * -(-n // LIBRARY_TILE)
    waves = -(-tiles // card.device.sms)
    whole = 2.0 * waves * card.device.sms * LIBRARY_TILE**2 * k
    slopes, others = size * batch * m * k, size * batch * k * n + operation.written
    time.pipes["tensor"] += flops / rate
    time.pipes["L2"] += slopes / card.l2
    time.pipes["memory"] += others / card.memory
    time.add(
        max(flops / rate, slopes / card.l2, others / card.memory),
        max(whole / (rate * EFFICIENCY), (slopes + others) / card.memory),
    )


def _add_moved(time: Time, card: Card, moved: int) -> None:
    time.pipes["memory"] += moved / card.memory
    time.add(moved / card.memory, moved / card.memory)


def time_of_naive(card: Card, batch: int, length: int, features: int, dtype: torch.dtype) -> tuple[float, int]:
    """Seconds of forward and backward of the naive version, and the bytes that it moves."""
    seconds, moved = 0.0, 0
    rate = card.rate("16-bit" if dtype.itemsize == 2 else "fp32") * EFFICIENCY
    for operation in record_naive(length, features, dtype):
        flops = 0.0 if operation.product is None else 2.0 * math.prod(operation.product)
        seconds += LAUNCH + batch * max((operation.read + operation.written) / card.memory, flops / rate)
        moved += batch * (operation.read + operation.written)
    return seconds, moved


@dataclass(frozen=True)
class Packed:
    """Sequences of one length in one row of tokens."""

    sequences: int
    length: int
    known: bool
    """Whether the launcher is told the length."""

    def tiles(self, block_i: int, block_j: int) -> int:
        """Number of pairs of a tile of ``block_i`` and one of ``block_j`` tokens that have a common sequence."""
        tokens, found = self.sequences * self.length, 0
        for begin in range(0, tokens, block_i):
            first = begin // self.length * self.length
            end = min(-(-min(begin + block_i, tokens) // self.length) * self.length, tokens)
            found += -(-end // block_j) - first // block_j
        return found


@cache
def record(
    arch: str,
    sms: int,
    batch: int,
    length: int,
    features: int,
    dtype: torch.dtype,
    precision: str | None,
    layers: int,
    packed: Packed | None = None,
) -> Work:
    """Launches and operations of the launcher on ``arch`` for loss and gradient, recorded on tensors without memory."""
    # Imported here, because it needs Triton.
    from kernel_audit.ahead_of_time import record as record_launches

    z = [torch.empty(batch, length, features, dtype=dtype, device="meta") for _ in range(layers)]
    bounds = None if packed is None else torch.arange(packed.sequences + 1, dtype=torch.int32, device="meta")
    known = packed.length if packed is not None and packed.known else None
    with Recorder() as recorder:
        launches = record_launches(z, variants.POTENTIAL, None, bounds, True, arch, precision or "ieee", sms, known)
    return Work(launches, recorder.operations)


@cache
def record_naive(length: int, features: int, dtype: torch.dtype) -> list[Operation]:
    """Operations of the naive version in forward and backward of one sequence."""
    z = torch.empty(1, length, features, dtype=dtype, device="meta", requires_grad=True)
    with Recorder() as recorder:
        variants.naive(z).backward()
    operations: list[Operation] = recorder.operations
    return operations


class Recorder(TorchDispatchMode):
    """Mode that records the bytes that each operation reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        inputs = [one for one in tree_leaves(args) if isinstance(one, Tensor)]
        outputs = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        # Widening of 16-bit factors is not recorded: on a GPU the product takes them with an fp32 result, elsewhere the
        # launcher widens them first.
        widened = name == "aten::_to_copy" and inputs[0].dim() == 3 and inputs[0].element_size() == 2
        if not (func.is_view or name.startswith(("aten::empty", "aten::new_empty")) or widened):
            product = None
            if name.split(".")[0] in ("aten::mm", "aten::bmm", "aten::baddbmm"):
                left, right = inputs[-2:]
                product = (left.shape[0] if left.dim() == 3 else 1, left.shape[-2], right.shape[-1], left.shape[-1])
            self.operations.append(Operation(_bytes(inputs), _bytes(outputs), product))
        return result


def _bytes(tensors: list[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


@cache
def examined(arch: str, kernel: str, features: int, precision: str, packed: Packed | None = None) -> Row:
    """Figures of the static report for the shipped kernel of ``angular_spread`` with gradient."""
    from kernel_audit.ahead_of_time import compile_variant

    pair_ids = "" if packed is None else ", pair ids"
    part = {
        "pair_tiles_kernel": f"pair tiles, loss and weights{', band' if packed is not None else ''}",
        "row_sweep_kernel": "row sweep, gradient",
        "band_product_kernel": "band product",
    }[kernel]
    label = f"{part}, angular_spread, {precision}, F={features}{'' if part == 'band product' else pair_ids}"
    variant = next(variant for variant in shipped(arch) if variant.label == label)
    return examine(variant, compile_variant(variant))


@cache
def shipped(arch: str) -> list[Any]:
    from kernel_audit.ahead_of_time import shipped as variants_of

    return variants_of(arch)


if __name__ == "__main__":
    main()
