"""The static report against kernels whose instructions are known by construction, and against figures of known GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from dispersion_kernels import AngularSpread
from dispersion_kernels.backends import cuda
from kernel_audit import sass, static_report

triton = pytest.importorskip("triton", reason="the static report reads what Triton compiles")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernel_audit import ahead_of_time  # noqa: E402

try:
    sass.tool_path("nvdisasm"), sass.tool_path("cuobjdump")
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

FFMAS = tl.constexpr(5)


@triton.jit
def product(a, b, c, features, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """One tile of A B^T; the epilogue is FFMAS multiply-adds and one special function an element."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    chunk = tl.arange(0, BLOCK_F)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, features, BLOCK_F):
        left = tl.load(a + rows[:, None] * stride + start + chunk[None, :])
        right = tl.load(b + columns[None, :] * stride + start + chunk[:, None])
        sums = tl.dot(left, right, sums)
    value = sums
    for _ in tl.static_range(FFMAS):
        value = value * sums + 0.25
    value = tl.math.exp2(value)
    tl.store(c + rows[:, None] * stride + columns[None, :], value.to(c.dtype.element_ty))


@triton.jit
def row_sums(a, b, c, features, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """All tiles of a row of tiles: the same product in a loop, with exp2 between the loops."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk = tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, stride, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, features, BLOCK_F):
            left = tl.load(a + rows[:, None] * stride + start + chunk[None, :])
            right = tl.load(b + columns[None, :] * stride + start + chunk[:, None])
            sums = tl.dot(left, right, sums)
        total += tl.math.exp2(sums)
    columns = tl.arange(0, BLOCK_N)
    tl.store(c + rows[:, None] * stride + columns[None, :], total.to(c.dtype.element_ty))


FEATURES = 768


@dataclass(frozen=True)
class Toy:
    """The fields of ahead_of_time.Variant that the report reads."""

    label: str
    arch: str
    kernel: Any = product
    tile: tuple[int, int] = (128, 128)
    block_f: int = 64
    dtype: str = "bf16"
    tensor_kind: str = "HMMA"
    library_flops: float = 0
    trips: dict[int, float] = field(default_factory=lambda: {0: 1, 1: FEATURES / 64})
    options: dict[str, Any] = field(default_factory=lambda: {"num_warps": 8, "num_stages": 3})
    aligned: bool = True

    @property
    def signature(self) -> dict[str, Any]:
        types = [f"*{self.dtype}"] * 3 + ["i32"] * 2 + ["constexpr"] * 3
        return dict(zip(self.kernel.arg_names, types, strict=True))

    @property
    def tensor_flops(self) -> float:
        return 2.0 * self.tile[0] * self.tile[1] * FEATURES


def compiled(toy: Toy) -> Any:
    blocks = {(5,): toy.tile[0], (6,): toy.tile[1], (7,): toy.block_f}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5 if toy.aligned else 0)}
    source = ASTSource(fn=toy.kernel, signature=toy.signature, constexprs=blocks, attrs=aligned)
    amd = toy.arch.startswith("gfx")
    target = GPUTarget("hip", toy.arch, 64) if amd else GPUTarget("cuda", int(toy.arch.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options={"enable_fp_fusion": True, **toy.options})


def examined(toy: Toy) -> static_report.Row:
    return static_report.examine(toy, compiled(toy))


SPILLING = Toy("too wide for four warps", "sm_80", tile=(128, 256), options={"num_warps": 4, "num_stages": 3})


@pytest.mark.parametrize(
    ("arch", "kind", "counted"), [("sm_80", "HMMA", 1), ("sm_90", "HGMMA", 1), ("sm_100", "UTCHMMA", 0)]
)
def test_counts_are_those_of_the_source(arch: str, kind: str, counted: float) -> None:
    toy = Toy("product", arch, tensor_kind=kind)
    row = examined(toy)
    pairs = toy.tile[0] * toy.tile[1]
    stray = 8 * 32 * 8 if arch == "sm_100" else 0  # what allocates tensor memory there
    assert pairs <= row.instructions["xu"] <= pairs + stray
    assert FFMAS.value * pairs <= row.instructions["fma"] <= FFMAS.value * pairs + stray
    assert row.counted_flops == counted * toy.tensor_flops
    assert not static_report.faults(row)
    assert not row.unknown
    assert not row.spills
    device = static_report.DEVICES[arch]
    assert row.tensor == toy.tensor_flops / device.flops["16-bit"]
    assert row.epilogue["xu"] == row.instructions["xu"] / 16
    assert "xu" not in row.loop
    assert row.loop["lsu"] > 0


def test_cycles_of_tf32() -> None:
    toy = Toy("product", "sm_80", dtype="fp32", block_f=32, trips={0: 1, 1: FEATURES / 32})
    row = examined(toy)
    assert row.tensor == toy.tensor_flops / 1024
    assert row.counted_flops == toy.tensor_flops


def test_unknown_opcodes_are_named() -> None:
    listing = "        /*0000*/                   FNEW.F32 R0, R1 ;\n        /*0010*/                   EXIT ;\n"
    new, end = sass.read_sass(listing)
    assert not new.known
    assert new.busy == {"issue": 1}
    assert end.known


@pytest.mark.parametrize(("arch", "kind"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_depth_of_nested_loops(arch: str, kind: str) -> None:
    instructions = sass.read_cubin(compiled(Toy("row sums", arch, kernel=row_sums)).asm["cubin"]).instructions
    assert {one.depth for one in instructions if one.opcode.startswith("MUFU")} == {1}
    assert {one.depth for one in instructions if one.opcode.startswith(kind)} == {2}
    assert {one.depth for one in instructions if one.opcode.startswith("STG")} == {0}


def test_trips_must_reach_every_loop() -> None:
    with pytest.raises(ValueError, match="depth 2"):
        examined(Toy("row sums", "sm_80", kernel=row_sums))


def test_loops_of_a_listing() -> None:
    """A loop, a barrier's polling moved behind the end, a conditional inside of the loop, the padding at the end."""
    listing = """
kernel:
        /*0000*/                   MOV R0, RZ ;
.L_x_0:
        /*0010*/                   FADD R0, R0, 1 ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   BRA.U !UP0, `(.L_x_5) ;
        /*0050*/                   FMUL R0, R0, R0 ;
.L_x_5:
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/               @P0 EXIT ;
        /*0080*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*00b0*/              @!P1 BRA `(.L_x_2) ;
        /*00c0*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*00d0*/                   BRA `(.L_x_3);
        /*00e0*/                   NOP;
"""
    instructions = sass.read_sass(listing)
    inside = {one.opcode for one in instructions if one.depth}
    assert inside == {"FADD", "BRA", "NOP", "BRA.U", "FMUL", "SYNCS.PHASECHK.TRANS64.TRYWAIT"}
    assert max(one.depth for one in instructions) == 1
    assert [one.opcode for one in instructions if not one.depth] == ["MOV", "EXIT", "STG.E.128", "EXIT"]
    assert sum(one.busy.get("lsu", 0) for one in instructions) == 4


def test_occupancy_of_known_cases() -> None:
    a100, ada, mi300 = (static_report.DEVICES[arch] for arch in ("sm_80", "sm_89", "gfx942"))
    ctas = static_report.ctas_per_sm
    assert ctas(a100, registers=255, warps=8, shared=0) == 1
    assert ctas(a100, registers=128, warps=8, shared=0) == 2
    assert ctas(a100, registers=129, warps=8, shared=0) == 1
    assert ctas(a100, registers=64, warps=8, shared=0) == 4
    assert ctas(a100, registers=32, warps=8, shared=0) == 8  # 64 warps
    assert ctas(ada, registers=32, warps=8, shared=0) == 6  # 48 warps
    assert ctas(a100, registers=32, warps=1, shared=0) == 32
    assert ctas(a100, registers=32, warps=8, shared=81 * 1024) == 2  # with the 1 KiB that each CTA leaves the system
    assert ctas(a100, registers=32, warps=8, shared=82 * 1024) == 1
    assert ctas(a100, registers=32, warps=8, shared=163 * 1024) == 1
    assert ctas(a100, registers=32, warps=8, shared=164 * 1024) == 0
    assert ctas(mi300, registers=128, warps=4, shared=0) == 4
    assert ctas(mi300, registers=128, warps=4, shared=32 * 1024) == 2


def test_amd() -> None:
    toy = Toy("product", "gfx942", tensor_kind="v_mfma", options={"num_warps": 4, "num_stages": 1})
    row = examined(toy)
    pairs = toy.tile[0] * toy.tile[1]
    assert row.instructions["xu"] == pairs
    assert row.counted_flops == toy.tensor_flops
    assert not static_report.faults(row)
    assert 0 < row.registers <= 512
    assert row.epilogue["alu"] >= row.epilogue["xu"]


def test_faults() -> None:
    row = examined(SPILLING)
    assert row.spills["bytes"] > 0
    assert [fault.split(": ")[2] for fault in static_report.faults(row)] == [f"spills {row.spills['bytes']} bytes"]
    wrong = static_report.faults(examined(Toy("product", "sm_80", tensor_kind="HGMMA")))
    assert [fault.split(": ")[2] for fault in wrong] == ["no tensor instruction HGMMA, but HMMA.16816.F32.BF16"]
    stages = {"num_warps": 8, "num_stages": 5}
    shared = static_report.faults(examined(Toy("product", "sm_86", options=stages)))
    assert [fault.split(": ")[2] for fault in shared] == ["128.0 KiB of shared memory, the device has 99"]


def test_scalar_registers_in_one_vector_register_are_no_fault() -> None:
    row = examined(Toy("product", "gfx942", tensor_kind="v_mfma", options={"num_warps": 4, "num_stages": 1}))
    assert not static_report.faults(replace(row, spills={"sgpr": 64}))
    for spills in ({"sgpr": 65}, {"sgpr": 3, "vgpr": 1}, {"bytes": 4}):
        assert len(static_report.faults(replace(row, spills=spills))) == 1


def test_an_epilogue_beyond_its_share_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy("pair tiles", "sm_80")
    row = static_report.examine(toy, compiled(toy))
    busiest = max(cycles for pipe, cycles in row.epilogue.items() if pipe != "issue") / (row.tensor + row.library)
    monkeypatch.setattr(static_report, "TARGETS", {("sm_80", "pair tiles")})
    monkeypatch.setattr(static_report, "EPILOGUE_SHARE", busiest * 0.99)
    assert any("its epilogue takes" in fault for fault in static_report.faults(row))
    monkeypatch.setattr(static_report, "EPILOGUE_SHARE", busiest * 1.01)
    assert not static_report.faults(row)


@pytest.mark.slow  # 28 kernels
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_gradient_of_the_entropy_in_every_dtype(arch: str) -> None:
    """Kernels that take the most registers: every change to them has let one spill."""
    variants = [
        one for one in ahead_of_time.shipped(arch, every=True) if one.constexprs.get("PASS") == "entropy_gradient"
    ]
    assert len(variants) > 10
    rows = [static_report.examine(one, ahead_of_time.compile_variant(one)) for one in variants]
    assert [fault for row in rows for fault in static_report.faults(row)] == []


@pytest.mark.skipif(cuda.unavailable_reason() is not None, reason=str(cuda.unavailable_reason()))
def test_kernels_of_the_extension() -> None:
    built = sass.architectures(cuda.LIBRARY)
    if not built:
        pytest.skip("the CUDA kernels were built as PTX alone")
    arch = built[-1]
    rows = {row.variant.label: row for row in static_report.examine_extension([arch])}
    assert not [fault for row in rows.values() for fault in static_report.faults(row)]
    assert not set().union(*(row.unknown for row in rows.values()))
    wgmma = "_wgmma" if arch == "sm_90a" else ""
    for element, parts in (("bf16", 1), ("fp16", 1), ("tf32", 1), ("tf32x3", 3)):
        hopper_suffix = wgmma if parts == 1 and element != "tf32" else ""
        row = rows[f"dk_pair_tiles_{element}_angular_spread_narrow_write{hopper_suffix}, F=768"]
        assert row.counted_flops == parts * row.variant.tensor_flops
        # An exponential and a root of every pair, with the masks of the last tiles and without, and indices.
        pairs = row.variant.tile[0] * row.variant.tile[1]
        assert 2 * pairs <= row.instructions["xu"] <= 4.5 * pairs
    with pytest.raises(SystemExit, match="not for sm_75: build it again"):
        static_report.examine_extension(["sm_75"])


def test_lengths_and_strides_that_share_their_kernels() -> None:
    """Of a length it matters whether 16 divides it, and strided features are copied to aligned ones."""

    def kernels(length: int, features: int, step: int = 1) -> set[str]:
        z = torch.zeros(1, length, features * step, dtype=torch.bfloat16)[:, :, ::step]
        launches = [
            launch
            for bounds in (None, torch.tensor([0, length]))
            for launch in ahead_of_time.record([z], AngularSpread(), None, bounds, True, "sm_80")
        ]
        specialised = [(one, ahead_of_time.specialize(one.kernel, one.arguments)) for one in launches]
        return {f"{one.kernel.__name__} {specialization} {one.options}" for one, specialization in specialised}

    assert kernels(1000, 776) == kernels(1023, 776) == kernels(3, 776)
    assert kernels(1024, 776) == kernels(32, 776) == kernels(1024, 776, 2)
    assert kernels(1024, 768) == kernels(1024, 768, 2)
    # One token has no pair, and a gradient of 0.
    assert {kernel.split()[0] for kernel in kernels(1, 768)} == {"token_gradients_kernel"}


def test_narrow_accesses() -> None:
    """Of features that 16 does not divide, which loads and stores 2 bytes at a time show."""
    toy = Toy("pair tiles", "sm_80", library_flops=1.0)
    wide = static_report.accesses(compiled(toy).asm["ptx"])
    assert {"cp.async 16", "st 16"} <= set(wide)
    assert not {"ld 2", "st 2"} & set(wide)
    row = static_report.examine(toy, compiled(replace(toy, aligned=False)))
    assert row.accesses is not None
    faults = [fault.split(": ")[2] for fault in static_report.faults(row)]
    assert f"{row.accesses['st 2']} accesses st 2 bytes wide" in faults
    assert "no asynchronous copy of 16 bytes" in faults
    assert "no store of 16 bytes" in faults


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = {"sm_80": [Toy("pair tiles", "sm_80", library_flops=1e8), SPILLING], "sm_90": []}

    def examine_shipped(arches: list[str]) -> list[static_report.Row]:
        return [static_report.examine(toy, compiled(toy)) for arch in arches for toy in shipped[arch]]

    monkeypatch.setattr(static_report, "examine_shipped", examine_shipped)
    report = tmp_path / "report.md"
    with pytest.raises(SystemExit) as exit:
        static_report.main(["--arch", "sm_80", "sm_90", "--check", "--out", str(report)])
    assert exit.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"sm_80: {SPILLING.label}: spills ")
    assert len(printed.err.splitlines()) == 1
    text = report.read_text()
    assert text in printed.out
    assert list(tmp_path.iterdir()) == [report]
    assert "| pair tiles | 128 x 128, 8, 3 |" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    shipped["sm_80"].pop()
    static_report.main(["--arch", "sm_80", "--check"])


def test_summary_of_full_reports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    product = examined(Toy("product", "sm_80"))
    rows = [
        replace(product, variant=replace(product.variant, label=label), registers=registers, epilogue={"fma": cycles})
        for label, registers, cycles in (
            ("pair tiles, loss, F=64", 90, 3 * product.tensor),
            ("pair tiles, loss, F=768", 120, 0.0),
            ("dk_row_sweep_tf32x3_narrow_loss, F=64", 30, 0.0),
        )
    ]
    rows[1] = replace(rows[1], spills={"bytes": 8})
    monkeypatch.setattr(static_report, "examine_shipped", lambda arches, **_: rows)
    full, summary = tmp_path / "full.md", tmp_path / "summary.md"
    static_report.main(["--out", str(full)])
    static_report.main(["--summary", str(full), "--out", str(summary)])
    text = summary.read_text()
    assert f"- Triton: commit {static_report.machine.describe()['commit']}\n" in text
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert table[0] == static_report.SUMMARY_COLUMNS.split(" | ")
    kinds = {kind: cells for kind, *cells in table[1:]}
    number, registers, spilling, shared, peak_fraction, worst = kinds["Triton: pair tiles"]
    assert (number, registers, spilling, shared) == ("2", "120", "1", f"{product.shared / 1024:.1f}")
    lowest, highest = (int(share.rstrip("%")) for share in peak_fraction.split(" to "))
    assert lowest < highest
    assert worst.startswith(f"pair tiles, loss, F=64: {lowest}% (")
    assert kinds["Triton: row sweep"][:2] == ["1", "30"]
    # A summary is no full report.
    with pytest.raises(ValueError, match=r"summary\.md is no full report"):
        static_report.main(["--summary", str(summary)])
    with pytest.raises(SystemExit):
        static_report.main(["--summary", str(full), "--check"])
    assert "--summary compiles nothing" in capsys.readouterr().err
