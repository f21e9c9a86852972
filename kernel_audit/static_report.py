"""The static report: what every shipped GPU kernel costs on every architecture, found without a GPU.

``python -m kernel_audit.static_report [--arch sm_90 ...] [--out FILE] [--check]`` compiles the Triton kernels. With
``--backend cuda`` it reads the CUDA C++ kernels as they are built into the installed extension, for its architectures.
``--summary FILE ... --out docs/static-report.md`` makes the page of the documentation from such full reports, and
compiles nothing.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks import machine
from kernel_audit import sass

HEAD = """\
# Static report: {title}

Commit {commit}.

Compiled ahead of time, read from the machine code, run on nothing: bounds, not measurements.

- *tile*: the pairs of tokens that one pass over the epilogue handles; all figures per tile are for one SM (or CU).
- *registers* a thread; *spills*: bytes on the stack (AMD: bytes of scratch memory, and vector registers spilled to it;
  scalar registers, "sgpr", spill to lanes of a vector register and not to memory, and as many as one vector register
  has lanes are no fault).
- *tensor instructions*: how many a warp's code holds, and the FLOPs they add up to, times the loops' trips, as a share
  of those that the kernel is there for (no share where the opcode does not tell its shape). More than 100% are
  products in several parts (tf32x3), warps that repeat each other's work, or iterations that the compiler peeled off
  a loop, which come on top of its trips.
- *thread instructions*: warps x trips of the loop around it x lanes of a warp, in thousands. Both sides of a condition
  count, and a masked instruction counts in full: an upper bound.
- *cycles*: thread instructions / lanes of the pipe. Loads and stores count 128 bytes a clock (AMD: 128 from LDS, 64
  from the vector cache) without bank conflicts or misses. *tensor* is FLOPs / rate, and *+ library* the library's
  products that belong to the same tile, at the same rate; in true fp32 it is the rate of the FMA pipe. *issue* is all
  instructions at four warps a clock.
- *epilogue share*: the busiest pipe outside of the product loop, as a share of the tensor cycles with the library's.
  The product loop is an innermost loop with tensor instructions that computes nothing else in floating point (in
  tf32, where splitting a number is part of the product: that has no special functions).
- *of peak*: tensor cycles with the library's as a share of what the tile takes. With ideal overlap that is the kernel's
  busiest pipe, then the library's products; without overlap the product loop's busiest pipe, then the epilogue's, then
  the library's products. FLOPs beyond 100% take their time, too. Latencies, a device that is not full, and memory
  beyond L1 are not in it.
"""
OF_CUDA = """\
These are the CUDA C++ kernels as the extension has them, by the names that a profiler shows. Most epilogues are there
twice, with the masks of the diagonal and of the last tiles and without, and both count. Of the wgmma kernels half of
the warps copy: thread instructions are of the others, and of the registers that a block starts with those that copy
keep 24 a thread and those that multiply get 232.
"""
# Text on the shapes of --every.
SIZES = (
    "With F of 64, 128 and 768, with and without pair ids; angular_spread also at F=100 and 776, at lengths "
    "that 16 does not divide and for 12 layers."
)
COLUMNS = (
    "kernel | tile, warps, stages | registers | spills | shared memory, KiB | CTAs per SM (warps) | "
    "tensor instructions | thread instructions per tile, thousands | cycles per tile | epilogue share | "
    "of peak: ideal (no overlap)"
)
SUMMARY = """\
# Static report

The shipped GPU kernels, compiled ahead of time and read from the machine code on a machine without a GPU: bounds, not
measurements. The tables have the kernels of `angular_spread` in every dtype, and of every potential in bf16 at F = 768;
the last section has those of every potential in every dtype. Full reports, with a line for each kernel and the
definition of every column, are made by

```bash
python -m kernel_audit.static_report --every --check --out build/triton.md  # an hour on two cores
python -m kernel_audit.static_report --backend cuda --check --out build/cuda.md  # needs the built CUDA extension
```

and this summary of them by `python -m kernel_audit.static_report --summary build/triton.md build/cuda.md --out
docs/static-report.md`. The kernels are those of these commits, from which later ones may differ:

{sources}

The columns:

- *registers* a thread; *spilling*: kernels that spill a register, or have anything else on the stack.
- *of peak, ideal*: busy cycles of the tensor cores as a share of what a tile of pairs takes if all pipes overlap, from
  the lowest to the highest kernel; "-" for kernels without matrix products. Latencies, a device that is not full, and
  memory beyond L1 are not in it.
- *worst case*: the kernel with the lowest share, its share, and in parentheses its share without overlap.
"""
SUMMARY_COLUMNS = (
    "report: kernels | number | most registers | spilling | most shared memory, KiB | of peak, ideal | worst case"
)
EVERY = "Every potential in every dtype"
# Limit of the epilogue's cycles on any pipe, for the kernels in TARGETS, as a share of the tile's tensor cycles with
# the library's.
EPILOGUE_SHARE = 0.2
TARGETS = {(arch, "pair tiles, loss and weights, angular_spread, bf16, F=768") for arch in ("sm_80", "sm_90")}
# Floating-point opcodes that a product loop in 16 bits does not have.
ARITHMETIC = re.compile(r"FH?FMA|FMUL|FADD|v_(pk_)?(fma|fmac|mul|add|sub)_f32")


@dataclass(frozen=True)
class Device:
    """Rates and limits of one SM (or CU) of a device, and the number of SMs."""

    name: str
    sms: int
    gigahertz: float
    flops: dict[str, int]  # dense FLOPs per clock and SM, with fp32 accumulation
    lanes: dict[str, int]  # lanes per clock and SM
    warps: int
    ctas: int
    shared: int  # KiB per SM
    shared_cta: int  # most KiB per CTA
    reserved: int = 1024  # bytes of a CTA's shared memory that the system reserves
    warp_size: int = 32
    registers: int = 16384  # registers of each of the four partitions of an SM


def _nvidia_lanes(fp32: int, integer: int, fp64: int) -> dict[str, int]:
    return {"fma": fp32, "imad": 64, "alu": integer, "xu": 16, "fp64": fp64, "lsu": 32, "issue": 128}


def device_of(arch: str) -> Device:
    """Device of an architecture; sm_90a is the same device as sm_90."""
    return DEVICES[arch.removesuffix("a") if arch.startswith("sm_") else arch]


# Lanes and limits: CUDA C++ Programming Guide, tables "Throughput of Native Arithmetic Instructions" and "Technical
# Specifications per Compute Capability". Tensor rates: the devices' data sheets divided by SMs and boost clock (A100
# 312, A40 150, L40S 362, H100 SXM 989, B200 2,250, RTX PRO 6000 504 dense bf16 TFLOP/s). GeForce cards of sm_86, sm_89
# and sm_120 accumulate in fp32 at half the rate given here, so an epilogue weighs half as much there. RTX Blackwell has
# as many int32 as fp32 lanes, but they are the same lanes; the issue slots give the same bound on both together.
# AMD: CDNA2 and CDNA3 white papers (383 and 1,307 dense bf16 TFLOP/s); a wave is four passes of a 16-wide SIMD.
DEVICES = {
    "sm_80": Device(
        "A100", 108, 1.41, {"16-bit": 2048, "tf32": 1024, "fp32": 128}, _nvidia_lanes(64, 64, 32), 64, 32, 164, 163
    ),
    "sm_86": Device(
        "A40", 84, 1.74, {"16-bit": 1024, "tf32": 512, "fp32": 256}, _nvidia_lanes(128, 64, 2), 48, 16, 100, 99
    ),
    "sm_89": Device(
        "L40S", 142, 2.52, {"16-bit": 1024, "tf32": 512, "fp32": 256}, _nvidia_lanes(128, 64, 2), 48, 24, 100, 99
    ),
    "sm_90": Device(
        "H100 SXM", 132, 1.83, {"16-bit": 4096, "tf32": 2048, "fp32": 256}, _nvidia_lanes(128, 64, 64), 64, 32, 228, 227
    ),
    "sm_100": Device(
        "B200", 148, 1.86, {"16-bit": 8192, "tf32": 4096, "fp32": 256}, _nvidia_lanes(128, 64, 64), 64, 32, 228, 227
    ),
    "sm_120": Device(
        "RTX PRO 6000",
        188,
        2.62,
        {"16-bit": 1024, "tf32": 512, "fp32": 256},
        _nvidia_lanes(128, 128, 2),
        48,
        24,
        100,
        99,
    ),
}
_AMD: dict[str, Any] = {
    "lanes": {"alu": 64, "xu": 16, "lds": 32, "vmem": 16},
    "warps": 32,
    "ctas": 16,
    "shared": 64,
    "shared_cta": 64,
    "reserved": 0,
    "warp_size": 64,
    "registers": 32768,
}
DEVICES |= {
    "gfx90a": Device("MI250X", 220, 1.7, {"16-bit": 1024, "tf32": 256, "fp32": 256}, **_AMD),
    "gfx942": Device("MI300X", 304, 2.1, {"16-bit": 2048, "tf32": 1024, "fp32": 256}, **_AMD),
}


class Variant(Protocol):
    """Kernel in one configuration, with the fields that the report reads: :class:`kernel_audit.ahead_of_time.Variant`
    or :class:`kernel_audit.cuda_kernels.Variant`."""

    @property
    def label(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def tile(self) -> tuple[int, int]: ...
    @property
    def options(self) -> dict[str, int]: ...
    @property
    def tensor_flops(self) -> float: ...
    @property
    def library_flops(self) -> float: ...
    @property
    def trips(self) -> dict[int, float]: ...
    @property
    def tensor_kind(self) -> str: ...


@dataclass(frozen=True)
class Row:
    """Shipped kernel with the figures from its machine code."""

    variant: Variant
    registers: int
    spills: dict[str, int]
    shared: int  # bytes of shared memory, without those that the system reserves
    ctas: int
    tensor_opcodes: Counter[str]
    counted_flops: float  # FLOPs per tile of the tensor instructions, 0 if the opcodes do not tell
    instructions: dict[str, float]  # pipe -> thread instructions per tile
    loop: dict[str, float]  # pipe -> cycles per tile in product loops
    epilogue: dict[str, float]  # pipe -> cycles per tile outside of them
    tensor: float  # cycles per tile
    library: float  # cycles per tile
    unknown: set[str]  # opcodes that are in no table
    accesses: dict[str, int] | None = None  # accesses of global memory in the PTX by kind and bytes; None without PTX

    @property
    def tensor_busy(self) -> float:
        """Cycles per tile of the tensor cores, with the FLOPs that the code does beyond ``tensor_flops``."""
        return self.tensor * max(1.0, self.counted_flops / (self.variant.tensor_flops or 1.0))

    @property
    def cycles(self) -> dict[str, float]:
        return {pipe: self.loop.get(pipe, 0) + self.epilogue.get(pipe, 0) for pipe in {**self.loop, **self.epilogue}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernel_audit.static_report", description=__doc__)
    parser.add_argument(
        "--backend", choices=["triton", "cuda"], default="triton", help="cuda: what the installed extension has"
    )
    parser.add_argument("--arch", nargs="+", choices=[*DEVICES, "sm_90a"], help="default: all of them")
    parser.add_argument("--out", type=Path, help="a Markdown file for the report")
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail on spills, too much shared memory, missing tensor instructions, or an epilogue beyond its share",
    )
    parser.add_argument(
        "--every",
        action="store_true",
        help="compile the kernels of every potential in every dtype, too, some 3,200: an hour on two cores; the "
        "tables stay those of angular_spread in every dtype and of every "
        "potential in bf16 at F=768",
    )
    parser.add_argument("--summary", nargs="+", type=Path, help="full reports to sum up in one page; compiles nothing")
    args = parser.parse_args(arguments)
    if args.summary is not None:
        if args.arch or args.check or args.every or args.backend != "triton":
            parser.error("--summary compiles nothing: the only other option it takes is --out")
        _publish(summarize({str(path): path.read_text(encoding="utf-8") for path in args.summary}), args.out)
        return
    examine_all = examine_shipped if args.backend == "triton" else examine_extension
    rows = examine_all(args.arch)
    text = render(rows, *(("CUDA", OF_CUDA) if args.backend == "cuda" else ("Triton", "")))
    if args.every:
        everything = examine_all(args.arch, every=True)
        text += "\n" + render_every(everything)
        rows += everything
    _publish(text, args.out)
    if args.check and (found := [fault for row in rows for fault in faults(row)]):
        print("\n".join(found), file=sys.stderr)
        raise SystemExit(1)


def _publish(text: str, out: Path | None) -> None:
    print(text)
    if out is not None:
        machine.write_text(out, text)


def examine_shipped(arches: list[str] | None, every: bool = False) -> list[Row]:
    """Figures of every Triton kernel shipped for these architectures, compiled on all cores."""
    arches = arches or list(DEVICES)
    workers = os.cpu_count() or 1
    # Spawned, not forked: PyTorch's threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {
            arch: [pool.submit(_examine_part, arch, every, n, workers) for n in range(workers)] for arch in arches
        }
        rows = {arch: [part.result() for part in parts] for arch, parts in futures.items()}
    # Variants were dealt out to the workers in turn; their rows are put back in order.
    return [row for parts in rows.values() for turn in itertools.zip_longest(*parts) for row in turn if row is not None]


def _examine_part(arch: str, every: bool, part: int, parts: int) -> list[Row]:
    # Imported here, because it needs Triton, which this module's users may lack.
    from kernel_audit.ahead_of_time import compile_variant, shipped

    rows = []
    for variant in shipped(arch, every)[part::parts]:
        try:
            row = examine(variant, compile_variant(variant))
        except Exception as error:
            raise RuntimeError(f"{arch}: {variant.label}") from error
        # The kernel's functions are removed, because they cannot be sent between processes.
        rows.append(replace(row, variant=replace(variant, kernel=None, constexprs={})))
    return rows


def examine_extension(arches: list[str] | None, every: bool = False) -> list[Row]:
    """Figures of every CUDA kernel of the extension for these architectures."""
    from dispersion_kernels.backends import cuda
    from kernel_audit import cuda_kernels

    if (reason := cuda.unavailable_reason()) is not None:
        raise SystemExit(f"kernel_audit.static_report: {reason}")
    built = sass.architectures(cuda.LIBRARY)
    if not built:
        raise SystemExit(
            "kernel_audit.static_report: the extension has PTX alone: TORCH_CUDA_ARCH_LIST=8.0+PTX has both"
        )
    if missing := set(arches or ()) - set(built):
        raise SystemExit(
            f"kernel_audit.static_report: the extension is built for {', '.join(built)}, not for "
            f"{', '.join(sorted(missing))}: build it again with TORCH_CUDA_ARCH_LIST naming that"
        )
    rows = []
    for arch in arches or built:
        kernels = sass.read_library(cuda.LIBRARY, arch)
        for variant in cuda_kernels.shipped(arch, every):
            kernel = kernels[variant.kernel]()
            shared = variant.shared + kernel.shared
            rows.append(_row(variant, kernel, variant.warps, shared, variant.precision, variant.other_trips))
    return rows


def examine(variant: Variant, compiled: Any) -> Row:
    """Figures of one compiled kernel, a result of ``triton.compile``."""
    amd = "amdgcn" in compiled.asm
    kernel = sass.read_amdgcn(compiled.asm["amdgcn"]) if amd else sass.read_cubin(compiled.asm["cubin"])
    precision = _precision(variant, compiled, any(one.pipe == "tensor" for one in kernel.instructions))
    row = _row(variant, kernel, compiled.metadata.num_warps, compiled.metadata.shared + kernel.shared, precision, {})
    return row if amd else replace(row, accesses=accesses(compiled.asm["ptx"]))


def accesses(ptx: str) -> dict[str, int]:
    """Number of instructions that load from global memory (``"ld"``), store to it (``"st"``) and copy from it to
    shared memory (``"cp.async"``), by kind and bytes, as ``"st 16"``."""
    counts: Counter[str] = Counter()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        counts[f"{kind} {int(vector or 1) * int(bits) // 8}"] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\S*\s*\[[^]]*\],\s*\[[^]]*\],\s*(\w+)", ptx):
        counts[f"cp.async {int(size, 0)}"] += 1
    return dict(counts)


def _row(
    variant: Variant,
    kernel: sass.Kernel,
    warps: int,
    shared: int,
    precision: str,
    other_trips: dict[int, float],
) -> Row:
    """Figures of a kernel. ``warps``: number of warps that the code is counted for; ``other_trips``: trips, by depth,
    of loops without tensor instructions, where they differ from ``variant.trips``."""
    device = device_of(variant.arch)
    deepest = max(one.depth for one in kernel.instructions)
    if deepest > max(variant.trips):
        raise ValueError(f"a loop at depth {deepest}; trips are given to depth {max(variant.trips)}")
    tensor_opcodes = Counter(one.opcode for one in kernel.instructions if one.pipe == "tensor")
    unit = "tensor" if tensor_opcodes else "fma"
    loops_of_unit = {one.loop for one in kernel.instructions if one.pipe == unit} - {None}
    product_loops = loops_of_unit - {
        one.loop
        for one in kernel.instructions
        if one.pipe == "xu" or (precision == "16-bit" and ARITHMETIC.match(one.opcode))
    }
    instructions: defaultdict[str, float] = defaultdict(float)
    loop: defaultdict[str, float] = defaultdict(float)
    epilogue: defaultdict[str, float] = defaultdict(float)
    counted_flops = 0.0
    for one in kernel.instructions:
        trips = variant.trips if one.loop in loops_of_unit else variant.trips | other_trips
        executions = warps * trips[one.depth]
        instructions[one.pipe] += executions * device.warp_size
        counted_flops += executions * one.flops
        part = loop if one.loop in product_loops else epilogue
        for pipe, passes in one.busy.items():
            part[pipe] += executions * passes * device.warp_size / device.lanes[pipe]
    rate = device.flops[precision or "fp32"]
    return Row(
        variant,
        kernel.registers,
        kernel.spills,
        shared,
        ctas_per_sm(device, kernel.registers, variant.options.get("num_warps", 4), shared),
        tensor_opcodes,
        counted_flops,
        dict(instructions),
        dict(loop),
        dict(epilogue),
        variant.tensor_flops / rate,
        variant.library_flops / rate,
        {one.opcode for one in kernel.instructions if not one.known},
    )


def _precision(variant: Any, compiled: Any, tensor: bool) -> str:
    """Key of the device's rate for the kernel's matrix products and the library's."""
    # Read from the PTX, because not every opcode of the machine code tells: UTCHMMA stands for all kinds.
    text = compiled.asm["amdgcn"] if "amdgcn" in compiled.asm else compiled.asm["ptx"]
    if re.search(r"mma\S*(\.tf32|kind::tf32|_xf32)", text):
        return "tf32"
    sixteen = any(kind in str(variant.signature.values()) for kind in ("*bf16", "*fp16"))
    if re.search(r"v_mfma_f32_\w+x\d+_?f32", text) or not (tensor or sixteen):
        return "fp32"
    return "16-bit"


def ctas_per_sm(device: Device, registers: int, warps: int, shared: int) -> int:
    """Number of CTAs of ``warps`` warps that are resident on an SM; 0 if a CTA does not fit."""
    if shared > 1024 * device.shared_cta:
        return 0
    # Registers are allocated per warp, in one of the four partitions, in units of eight per lane.
    warp_registers = _round_up(max(registers, 1), 8) * device.warp_size
    by_registers = 4 * (device.registers // warp_registers) // warps
    taken = _round_up(shared + device.reserved, 128)
    by_shared = 1024 * device.shared // taken if taken else device.ctas
    return min(device.ctas, device.warps // warps, by_registers, by_shared)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def faults(row: Row) -> list[str]:
    """Reasons, in words, why the kernel must not be shipped."""
    variant, limit = row.variant, device_of(row.variant.arch).shared_cta
    found = []
    # Spills of AMD's scalar registers to lanes of a vector register, a move each and no memory access, are no fault up
    # to one register's worth: most are masks of the last tile, two scalar registers each, and a smaller tile costs
    # more.
    if set(row.spills) - {"sgpr"} or row.spills.get("sgpr", 0) > device_of(variant.arch).warp_size:
        found.append(f"spills {_spills(row)}")
    if row.shared > 1024 * limit:
        found.append(f"{row.shared / 1024:.1f} KiB of shared memory, the device has {limit}")
    if variant.tensor_kind and not any(re.search(variant.tensor_kind, opcode) for opcode in row.tensor_opcodes):
        found.append(f"no tensor instruction {variant.tensor_kind}, but {', '.join(row.tensor_opcodes) or 'none'}")
    if variant.tensor_flops and row.accesses is not None:
        found += _narrow(variant, row.accesses)
    if (variant.arch, variant.label) in TARGETS:
        products = row.tensor + row.library
        pipes = {pipe: cycles / products for pipe, cycles in row.epilogue.items() if pipe != "issue"}
        found += [
            f"its epilogue takes {share:.0%} on {pipe}" for pipe, share in pipes.items() if share > EPILOGUE_SHARE
        ]
    return [f"{variant.arch}: {variant.label}: {fault}" for fault in found]


def _narrow(variant: Variant, accesses: dict[str, int]) -> list[str]:
    """Reasons why a kernel with products does not read, copy and store 16 bytes at a time."""
    found = [f"{count} accesses {kind} bytes wide" for kind, count in accesses.items() if kind in ("ld 2", "st 2")]
    # A row sweep may keep its tokens in registers, whose loads are no copies.
    wide = {"cp.async 16"} if "pair tiles" in variant.label else {"cp.async 16", "ld 16"}
    if variant.options["num_stages"] > 1 and not wide & set(accesses):
        found.append("no asynchronous copy of 16 bytes")
    if variant.library_flops and "st 16" not in accesses:
        found.append("no store of 16 bytes")
    return found


def render(rows: Iterable[Row], title: str, note: str = "") -> str:
    """Full report in Markdown: a table for each architecture."""
    by_arch: dict[str, list[Row]] = {}
    for row in rows:
        by_arch.setdefault(row.variant.arch, []).append(row)
    head = HEAD.format(title=title, commit=machine.describe()["commit"])
    heads = [head, note] if note else [head]
    return "\n".join([*heads, *(_section(arch, arch_rows) for arch, arch_rows in by_arch.items())])


def render_every(rows: Iterable[Row]) -> str:
    """Section with totals over the kernels of every potential in every dtype."""
    by_arch: dict[str, list[Row]] = {}
    for row in rows:
        by_arch.setdefault(row.variant.arch, []).append(row)
    lines = [
        f"## {EVERY}",
        "",
        SIZES,
        "",
        "| architecture | kernels | that spill | most registers | most shared memory, KiB |",
        "|---|---|---|---|---|",
    ]
    for arch, arch_rows in by_arch.items():
        spilling = sum(bool(row.spills) for row in arch_rows)
        registers, shared = max(row.registers for row in arch_rows), max(row.shared for row in arch_rows) / 1024
        lines.append(f"| {arch} | {len(arch_rows)} | {spilling} | {registers} | {shared:.1f} |")
    return "\n".join([*lines, ""])


def summarize(reports: dict[str, str]) -> str:
    """Page that summarises full reports, given by the names of their files: a table for each architecture.

    Raises ``ValueError`` for a text that is no full report.
    """
    sources: list[str] = []
    tables: dict[str, list[str]] = {}
    every: list[str] = []
    for name, report in reports.items():
        head = re.match(r"# Static report: (.+)\n\nCommit (\S+)\.\n", report)
        if head is None:
            raise ValueError(f"{name} is no full report; python -m kernel_audit.static_report --out {name} makes one")
        title, commit = head.groups()
        sources.append(f"- {title}: commit {commit}")
        for section in re.split(r"^## ", report, flags=re.MULTILINE)[1:]:
            arch, _, body = section.partition("\n")
            if arch == EVERY:
                every += [f"{title}. {body.strip()}", ""]
            else:
                tables.setdefault(arch, []).extend(_summary_lines(title, body))
    parts = [SUMMARY.format(sources="\n".join(sources))]
    for arch, lines in tables.items():
        parts += [
            f"## {arch}",
            "",
            f"| {SUMMARY_COLUMNS} |",
            "|---" * (SUMMARY_COLUMNS.count("|") + 1) + "|",
            *lines,
            "",
        ]
    if every:
        parts += [f"## {EVERY}", "", *every]
    return "\n".join(parts)


def _summary_lines(title: str, section: str) -> list[str]:
    """Lines of the summary for one architecture's table of a full report, one for each kind of kernel."""
    kinds: dict[str, list[dict[str, str]]] = {}
    columns = COLUMNS.split(" | ")
    for line in re.findall(r"^\| (.+) \|$", section, flags=re.MULTILINE):
        row = dict(zip(columns, line.split(" | "), strict=True))
        if row["kernel"] != "kernel":
            # "dk_row_sweep_bf16_..." is a row sweep of the CUDA kernels.
            kind = re.sub(r"_(bf|fp|tf)\d.*", "", row["kernel"].split(",")[0])
            kinds.setdefault(kind, []).append(row)
    lines = []
    for kind, rows in kinds.items():
        shares = {row["kernel"]: row[columns[-1]] for row in rows if row[columns[-1]] != "-"}
        peak_fraction = worst_case = "-"
        if shares:
            ideal = {kernel: int(share.partition("%")[0]) for kernel, share in shares.items()}
            worst = min(ideal, key=lambda kernel: ideal[kernel])
            peak_fraction = f"{ideal[worst]}% to {max(ideal.values())}%"
            worst_case = f"{worst}: {shares[worst]}"
        cells = [
            f"{title}: {kind.removeprefix('dk_').replace('_', ' ')}",
            str(len(rows)),
            str(max(int(row["registers"]) for row in rows)),
            str(sum(row["spills"] != "0" for row in rows)),
            f"{max(float(row['shared memory, KiB']) for row in rows):.1f}",
            peak_fraction,
            worst_case,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _section(arch: str, rows: list[Row]) -> str:
    device = device_of(arch)
    peak = device.sms * device.gigahertz * device.flops["16-bit"] / 1000
    lines = [
        f"## {arch}",
        "",
        f"As {device.name}: {device.sms} SMs at {device.gigahertz} GHz; FLOPs a clock and SM: "
        f"{device.flops['16-bit']:,} in 16 bits ({peak:,.0f} TFLOP/s), {device.flops['tf32']:,} in tf32; "
        "lanes a clock and SM: " + ", ".join(f"{pipe} {lanes}" for pipe, lanes in device.lanes.items()) + ".",
        "",
        f"| {COLUMNS} |",
        "|---" * (COLUMNS.count("|") + 1) + "|",
        *map(_line, rows),
        "",
    ]
    if unknown := set().union(*(row.unknown for row in rows)):
        lines += [f"Opcodes that no table has, counted as issue slots only: {', '.join(sorted(unknown))}.", ""]
    return "\n".join(lines)


def _line(row: Row) -> str:
    variant = row.variant
    tensor = ", ".join(f"{count} {opcode}" for opcode, count in row.tensor_opcodes.most_common()) or "none"
    if row.counted_flops and variant.tensor_flops:
        tensor += f" ({row.counted_flops / variant.tensor_flops:.0%})"
    cycles = {"tensor": row.tensor, "+ library": row.library} | _by_size(row.cycles)
    products = row.tensor + row.library
    share = peak_fraction = "-"
    if products:
        busiest = max(row.epilogue, key=lambda pipe: row.epilogue[pipe])
        share = f"{row.epilogue[busiest] / products:.0%} ({busiest})"
        ideal = max(row.tensor_busy, *row.cycles.values()) + row.library
        apart = max(row.tensor_busy, 0, *row.loop.values()) + row.epilogue[busiest] + row.library
        peak_fraction = f"{products / ideal:.0%} ({products / apart:.0%})"
    warps = variant.options.get("num_warps", 4)
    cells = [
        variant.label,
        f"{variant.tile[0]} x {variant.tile[1]}, {warps}, {variant.options.get('num_stages', '-')}",
        str(row.registers),
        _spills(row),
        f"{row.shared / 1024:.1f}",
        f"{row.ctas} ({row.ctas * warps})",
        tensor,
        ", ".join(f"{pipe} {_short(count / 1000)}" for pipe, count in _by_size(row.instructions).items()),
        ", ".join(f"{pipe} {count:,.0f}" for pipe, count in cycles.items() if count >= 0.5),
        share,
        peak_fraction,
    ]
    return f"| {' | '.join(cells)} |"


def _spills(row: Row) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in row.spills.items()) or "0"


def _by_size(figures: dict[str, float]) -> dict[str, float]:
    return dict(sorted(figures.items(), key=lambda item: -item[1]))


def _short(thousands: float) -> str:
    return f"{thousands:,.0f}" if thousands >= 10 else f"{thousands:.1f}"


if __name__ == "__main__":
    main()
