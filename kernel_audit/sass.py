"""Reader of compiled GPU kernels: registers, spills, and the instructions by pipe and loop depth.

NVIDIA's cubins are read with ``cuobjdump`` and ``nvdisasm``, which ship inside Triton's wheel; for AMD the assembly
text that Triton keeps is enough. No GPU is needed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One machine instruction of one warp, with the properties that determine its throughput."""

    opcode: str
    pipe: str  # pipe that the instruction is counted under; "other" takes an issue slot and nothing else
    busy: dict[str, int]  # pipe -> passes of the whole warp through it, for every pipe that is kept busy
    flops: float = 0  # FLOPs of a matrix product, one warp's share; 0 if the opcode does not tell the shape
    depth: int = 0  # number of loops around the instruction
    loop: int | None = None  # innermost loop
    known: bool = True  # False for an opcode that is in no table below


@dataclass(frozen=True)
class Kernel:
    registers: int
    spills: dict[str, int]  # kind -> count: bytes of stack or scratch memory, AMD's VGPRs and SGPRs; empty if none
    shared: int  # bytes of shared memory fixed at compile time, without those that the launch adds
    instructions: list[Instruction]


def read_cubin(cubin: bytes) -> Kernel:
    """Registers, spills and instructions of a cubin that holds one kernel."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        return _kernel(_run("cuobjdump", "-res-usage", str(path)), _run("nvdisasm", "-c", str(path)))


def architectures(library: Path) -> list[str]:
    """Architectures for which a library of compiled CUDA code has machine code."""
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", _run("cuobjdump", "-lelf", str(library)))))


def read_library(library: Path, arch: str) -> dict[str, Callable[[], Kernel]]:
    """Readers, by name, of all kernels that a library of compiled CUDA code has for ``arch``; calling one reads it."""
    kernels: dict[str, Callable[[], Kernel]] = {}
    with tempfile.TemporaryDirectory() as directory:
        _run("cuobjdump", "-xelf", arch, str(library.resolve()), directory=directory)
        for path in sorted(Path(directory).glob(f"*.{arch}.cubin")):
            usage = _run("cuobjdump", "-res-usage", str(path))
            usages = dict(re.findall(r"Function (\w+):\n?(.*)", usage))
            sections = re.split(r"^//-+ \.text\.(\w+) +-+$", _run("nvdisasm", "-c", str(path)), flags=re.MULTILINE)
            for name, listing in zip(sections[1::2], sections[2::2], strict=True):
                # The first section names the architecture.
                kernels[name] = partial(_kernel, usages[name], sections[0] + listing)
    return kernels


def _kernel(usage: str, listing: str) -> Kernel:
    registers, stack, shared = (_number(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK", "SHARED"))
    instructions = read_sass(listing)
    local = sum(4 * one.busy["lsu"] for one in instructions if one.opcode.startswith(("LDL", "STL")))
    # From sm_90 on the figure includes the 1 KiB of every CTA's shared memory that the system reserves.
    reserved = 1024 if shared >= 1024 and _number(r"(?:\.target\s+sm_|EF_CUDA_SM)(\d+)", listing) >= 90 else 0
    return Kernel(registers, _positive({"bytes": stack or local}), shared - reserved, instructions)


def read_amdgcn(assembly: str) -> Kernel:
    """Registers, spills and instructions of the assembly text of one kernel."""
    fields = ("vgpr_count", "group_segment_fixed_size", "private_segment_fixed_size")
    registers, shared, scratch = (_number(rf"^\s*(?:- )?\.{field}:\s*(\d+)", assembly) for field in fields)
    # SGPRs are spilled to lanes of a VGPR, which is cheaper than memory, but not free.
    spills = {kind: _number(rf"^\s*(?:- )?\.{kind}_spill_count:\s*(\d+)", assembly) for kind in ("vgpr", "sgpr")}
    lines: list[_Line] = []
    labels: list[str] = []
    for text in assembly.partition(".Lfunc_end")[0].splitlines():
        if label := re.match(r"([\w.$]+):", text):
            labels.append(label[1])
        elif match := re.match(r"\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*([^;]*)", text):
            opcode, operands = match[1], match[2].strip()
            branches = opcode.startswith(("s_branch", "s_cbranch"))
            ends = opcode.startswith(("s_branch", "s_endpgm", "s_setpc"))
            lines.append(_Line(opcode, tuple(labels), operands if branches else None, not ends))
            labels = []
    return Kernel(registers, _positive({"bytes": scratch} | spills), shared, _with_loops(lines, _amd))


def _positive(counts: dict[str, int]) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if count}


def read_sass(listing: str) -> list[Instruction]:
    """Reachable instructions of a listing of ``nvdisasm -c``."""
    lines: list[_Line] = []
    labels: list[str] = []
    for text in listing.splitlines():
        if label := re.match(r"([\w.$]+):\s*$", text):
            labels.append(label[1])
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@\S+ )?\s*([A-Z][\w.]*)\s*([^;]*)", text):
            guard, opcode, operands = match[1] or "", match[2], match[3]
            branch = opcode.startswith(("BRA", "JMP", "CALL"))
            target = re.search(r"`\((\S+)\)", operands) if branch else None
            # A branch may carry its condition in front of the target: BRA.U UP0, `(.L_x_2)
            conditional = bool(guard) or opcode.startswith("CALL") or "," in operands
            ends = opcode.startswith(("BRA", "JMP", "EXIT", "RET"))
            never = guard.strip() in ("@!PT", "@!UPT")
            lines.append(
                _Line("NOP" if never else opcode, tuple(labels), target[1] if target else None, not ends or conditional)
            )
            labels = []
    return _with_loops(lines, _nvidia)


@dataclass(frozen=True)
class _Line:
    opcode: str
    labels: tuple[str, ...]
    target: str | None
    falls_through: bool


def _with_loops(lines: list[_Line], classify: Callable[[str], Instruction]) -> list[Instruction]:
    """Instructions that can be reached from the first line, with their loops."""
    starts = [i for i, line in enumerate(lines) if i == 0 or line.labels or _leaves(lines[i - 1])]
    blocks = [range(start, end) for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
    at = {label: i for i, block in enumerate(blocks) for label in lines[block[0]].labels}
    successors = []
    for i, block in enumerate(blocks):
        last = lines[block[-1]]
        following = [i + 1] if last.falls_through and i + 1 < len(blocks) else []
        successors.append(following + ([at[last.target]] if last.target in at else []))
    reachable, loops = _loops(successors)
    loops = [loop for loop in loops if not _waits([lines[j].opcode for i in loop for j in blocks[i]])]
    instructions = []
    for i in sorted(reachable):
        around = [number for number, loop in enumerate(loops) if i in loop]
        innermost = min(around, key=lambda number: len(loops[number]), default=None)
        instructions += [replace(classify(lines[j].opcode), depth=len(around), loop=innermost) for j in blocks[i]]
    return instructions


def _leaves(line: _Line) -> bool:
    return line.target is not None or not line.falls_through


def _waits(opcodes: list[str]) -> bool:
    """Whether a loop only polls a barrier: ``mbarrier.try_wait`` and the like, on the side of the real control flow."""
    return len(opcodes) <= 8 and any(
        opcode.startswith(("SYNCS.PHASECHK", "NANOSLEEP", "UTCATOMSWS", "s_sleep")) for opcode in opcodes
    )


def _loops(successors: list[list[int]]) -> tuple[set[int], list[set[int]]]:
    """Blocks reachable from block 0, and the natural loops among them, each a set of blocks.

    A natural loop belongs to the edges that lead back to a block which dominates their origin. The interval between a
    label and a backward branch is not enough: compilers move cold paths behind the end, from where they branch back.
    """
    order = _reverse_postorder(successors)
    place = {block: i for i, block in enumerate(order)}
    predecessors: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for successor in successors[block]:
            predecessors[successor].append(block)
    # Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm".
    dominator = {0: 0}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            candidates = [predecessor for predecessor in predecessors[block] if predecessor in dominator]
            new = candidates[0]
            for other in candidates[1:]:
                while new != other:
                    if place[new] > place[other]:
                        new = dominator[new]
                    else:
                        other = dominator[other]
            if dominator.get(block) != new:
                dominator[block] = new
                changed = True
    loops: dict[int, set[int]] = {}
    for block in order:
        for header in successors[block]:
            if header in _dominators(block, dominator):
                body, waiting = loops.setdefault(header, {header}), [block]
                while waiting:
                    if (inside := waiting.pop()) not in body:
                        body.add(inside)
                        waiting += predecessors[inside]
    return set(order), list(loops.values())


def _reverse_postorder(successors: list[list[int]]) -> list[int]:
    seen, stack, order = {0}, [(0, iter(successors[0]))], []
    while stack:
        block, remaining = stack[-1]
        for successor in remaining:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(successors[successor])))
                break
        else:
            order.append(block)
            stack.pop()
    return order[::-1]


def _dominators(block: int, dominator: dict[int, int]) -> Iterator[int]:
    yield block
    while dominator[block] != block:
        block = dominator[block]
        yield block


# Pipe of each opcode, from the pipelines section of the Nsight Compute profiling guide. FMA executes FADD, FMUL, FFMA
# and, in its "heavy" half alone, integer multiply-add, which compilers also use to move registers (IMAD.MOV); ALU the
# other integer, logic, comparison and selection instructions and the packing conversion of fp32 to 16 bits; XU the
# special functions, the conversions between integer and floating point, and, by the throughput table of the CUDA C++
# Programming Guide (16 results per clock), bit counts. 16-bit arithmetic (HFMA2) is FMA from sm_86 on; sm_80 has a
# separate pipe for it, which the kernels here leave idle.
_NVIDIA_PIPES = {
    "tensor": "HMMA HGMMA IMMA IGMMA DMMA QMMA QGMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "fma": "FFMA FHFMA FMUL FADD FFMA32I FMUL32I FADD32I FFMA2 FMUL2 FADD2 HFMA2 HMUL2 HADD2 FSWZADD",
    "imad": "IMAD IMUL IDP IDP4A",
    "alu": (
        "FMNMX FMNMX3 FSEL FSET FSETP FCHK HMNMX2 HSET2 HSETP2 VHMNMX F2FP I2FP F2IP I2IP IADD IADD3 IADD32I ISETP "
        "ISET IMNMX IABS ISCADD LEA LOP LOP3 LOP32I PLOP3 SHF SHL SHR SEL PRMT SGXT BMSK MOV MOV32I MOVM P2R R2P VIADD "
        "VIADDMNMX VIMNMX VIMNMX3 VABSDIFF VABSDIFF4 VOTE PSETP"
    ),
    "xu": "MUFU F2F F2I I2F I2I FRND POPC FLO BREV REDUX CREDUX",
    "fp64": "DFMA DADD DMUL DSETP DMNMX",
    "lsu": "LD LDG LDS LDL LDSM LDGSTS ST STG STS STL STSM STAS SHFL ATOM ATOMG ATOMS RED REDG REDS",
    "other": (
        "ACQBULK ARRIVES B2R BAR BMOV BPT BRA BREAK BRX BRXU BSSY BSYNC CALL CCTL CCTLL CCTLT CGAERRBAR CS2R CS2UR "
        "DEPBAR ELECT ENDCOLLECTIVE ERRBAR EXIT FENCE GETLMEMBASE JMP JMX KILL LDC LDCU LDGDEPBAR LDTM LEPC MATCH "
        "MEMBAR NANOSLEEP NOP PREEXIT QSPC R2B R2UR RET RPCMOV S2R S2UR SETCTAID STTM SYNCS VOTEU WARPGROUP "
        "WARPSYNC YIELD"
    ),
}
_NVIDIA_PIPE = {opcode: pipe for pipe, opcodes in _NVIDIA_PIPES.items() for opcode in opcodes.split()}


def _nvidia(opcode: str) -> Instruction:
    base, *suffixes = opcode.split(".")
    # The uniform datapath (U...) works once per warp, beside the other pipes; bulk copies and tensor memory are
    # asynchronous.
    pipe = _NVIDIA_PIPE.get(base, "other")
    known = base in _NVIDIA_PIPE or base.startswith("U")
    busy = {"issue": 1}
    if pipe == "imad":
        busy |= {"fma": 1, "imad": 1}
    elif pipe == "fma":
        busy["fma"] = 2 if base in ("FFMA2", "FMUL2", "FADD2") else 1
    elif pipe == "lsu":
        # A pass is 128 bytes, 4 per lane.
        matrices = base in ("LDSM", "STSM") and suffixes[-1] in ("2", "4") and int(suffixes[-1])
        busy["lsu"] = matrices or (4 if "128" in suffixes else 2 if "64" in suffixes else 1)
    elif pipe not in ("tensor", "other"):
        busy[pipe] = 1
    return Instruction(opcode, pipe, busy, _nvidia_flops(base, suffixes), known=known)


def _nvidia_flops(base: str, suffixes: list[str]) -> float:
    if base == "HMMA" and (shape := re.fullmatch(r"(16)(8)(4|8|16)", suffixes[0])):
        return 2.0 * int(shape[1]) * int(shape[2]) * int(shape[3])
    if base == "HGMMA" and (shape := re.fullmatch(r"(\d+)x(\d+)x(\d+)", suffixes[0])):
        return 2.0 * int(shape[1]) * int(shape[2]) * int(shape[3]) / 4  # issued by each of the four warps of a group
    return 0


# Pipes of AMD's CDNA: the vector ALU takes 64 lanes per clock; special functions and 32-bit integer products go through
# it at a quarter of that rate (CDNA3 instruction set architecture guide; rocprofiler-compute, pipeline descriptions).
_AMD_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_AMD_QUARTER = re.compile(r"v_(mul_lo_[ui]32|mul_hi_[ui]32|mad_[ui]64_[ui]32)")


def _amd(opcode: str) -> Instruction:
    if opcode.startswith(("v_mfma", "v_smfmac")):
        shape = re.search(r"_(\d+)x(\d+)x(\d+)", opcode)
        flops = 2.0 * int(shape[1]) * int(shape[2]) * int(shape[3]) if shape else 0
        return Instruction(opcode, "tensor", {}, flops)
    if _AMD_SPECIAL.match(opcode):
        return Instruction(opcode, "xu", {"xu": 1, "alu": 4})
    if opcode.startswith("v_"):
        return Instruction(opcode, "alu", {"alu": 4 if _AMD_QUARTER.match(opcode) else 1})
    if opcode.startswith("ds_"):
        return Instruction(opcode, "lds", {"lds": _amd_words(opcode)})
    if opcode.startswith(("global_", "buffer_", "flat_", "scratch_")):
        return Instruction(opcode, "vmem", {"vmem": _amd_words(opcode)})
    return Instruction(opcode, "other", {})


def _amd_words(opcode: str) -> int:
    """Number of 32-bit words that a lane moves: 4 for ds_read_b128, ds_read2st64_b64 and global_load_dwordx4."""
    bits = re.search(r"_b(64|96|128)(?:_|$)", opcode)
    words = re.search(r"_dwordx(\d)", opcode)
    single = int(bits[1]) // 32 if bits else int(words[1]) if words else 1
    return single * (2 if opcode.startswith(("ds_read2", "ds_write2")) else 1)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ValueError(f"no {pattern} in\n{text[:2000]}")
    return int(match[1])


def _run(tool: str, *arguments: str, directory: str | None = None) -> str:
    command = [tool_path(tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=directory).stdout


@cache
def tool_path(tool: str) -> str:
    """Path of ``cuobjdump`` or ``nvdisasm``: in Triton's wheel, else on PATH."""
    spec = importlib.util.find_spec("triton")
    roots = spec.submodule_search_locations if spec is not None and spec.submodule_search_locations else []
    wheel = [Path(root) / "backends" / "nvidia" / "bin" / tool for root in roots]
    found = next((str(path) for path in wheel if path.exists()), None) or shutil.which(tool)
    if found is None:
        raise FileNotFoundError(f"{tool}: neither in Triton's wheel nor on PATH (it is part of the CUDA toolkit)")
    return found
