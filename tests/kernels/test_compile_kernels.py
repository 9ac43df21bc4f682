"""Kernels compiled ahead of time: what is read from binaries, what is a fault, and the script."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import binary
from kernel_checks.binary import Facts, Product
from kernel_checks.case import HEADS, KV_HEADS
from kernel_checks.checks import complaints
from kernel_checks.chips import CHIPS, occupancy
from kernel_checks.forms import FORMS
from kernel_checks.report import config_text, failures, markdown
from kernel_checks.roofline import Tile, roofline
from kernel_checks.sass import Code, Instruction, overwritten, shortest_loop, written
from sparse_patch_kernels.triton.layout import Tiling

import sparse_patch

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function attn:
  REG:255 STACK:7192 SHARED:1024 LOCAL:16 CONSTANT[0]:592 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0090*/               @P0 LDG.E R2, [R14.64] ;
        /*00b0*/              @!P1 LDGSTS.E.BYPASS.LTC128B.128 [R9+0x1000], [R6.64] ;
        /*00c0*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*01e0*/                   STL.64 [R1+0xd20], R14 ;
        /*0280*/                   LDL R14, [R1+0xd20] ;
        /*0290*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*02a0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*02b0*/                   UTCHMMA gdesc[UR16], gdesc[UR18], tmem[UR7], UP0 ;
        /*02c0*/                   MUFU.EX2 R0, R0 ;
        /*02d0*/                   MUFU.RCP R0, R0 ;
        /*02e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*02f0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0300*/                   NOP ;
"""
AMD = """
attn:                                   ; @attn
	s_load_dwordx2 s[2:3], s[0:1], 0x0
	scratch_store_dwordx4 off, v[90:93], off offset:112 ; 16-byte Folded Spill
	v_mfma_f32_32x32x8_bf16 v[16:31], v[90:91], v[50:51], v[16:31]
	v_exp_f32_e32 v1, v1
	s_barrier
	s_endpgm
	.amdhsa_next_free_vgpr 116
  - .agpr_count:     0
    .max_flat_workgroup_size: 512
    .private_segment_fixed_size: 1872
    .vgpr_count:     116
    .vgpr_spill_count: 3
"""
DOT = "%s = tt.dot %q, %k, %c, inputPrecision = tf32 : tensor<128x64x{0}> * tensor<64x32x{0}> -> x"
TTIR = f"""
  tt.func public @attn(%q: !tt.ptr<bf16>) {{
    {DOT.format("f32")}
    %a = scf.for %i = %c0 to %n step %c1 iter_args(%b = %c) -> (tensor<128x32xf32>)  : i32 {{
      %x = tt.load %p : tensor<64x32x!tt.ptr<bf16>>
      {DOT.format("bf16")}
      scf.yield %s : tensor<128x32xf32>
    }}
    %b = scf.for %i = %c0 to %n step %c1 iter_args(%b = %c) -> (tensor<128x32xf32>)  : i32 {{
      %x = tt.load %p : tensor<64x32x!tt.ptr<bf16>>
      {DOT.format("f16")}
    }} {{tt.num_stages = 1 : i32}}
    %i:2 = scf.while (%d = %a) : (tensor<64x64xf32>) -> (tensor<64x64xf32>) {{
      scf.condition(%9) %d : tensor<64x64xf32>
    }} do {{
      %x = tt.load %p : tensor<64x32x!tt.ptr<bf16>>
      {DOT.format("bf16")}
    }}
  }}
"""
GOOD = Facts(
    registers=168,
    local_bytes=0,
    spills=0,
    shared=96 * 1024,
    tensor_columns=0,
    threads=256,
    instructions=2000,
    mix={"HGMMA": 24, "LDGSTS": 43, "EX2": 68, "BAR": 11},
    binary_bytes=100_000,
    products=["128x64x128 bf16"],
    widest=128,
    looped=True,
    plain_products=0,
    waiting_loads=0,
)
HOPPER = CHIPS["sm_90"]


def facts(**changes):
    return dataclasses.replace(GOOD, **changes)


def test_registers_and_local_memory_are_read():
    assert binary.resource_usage(USAGE) == (255, 7208)
    with pytest.raises(ValueError, match="2 kernels"):
        binary.resource_usage(USAGE + USAGE)
    assert binary.ptx_threads(".visible .entry attn(\n)\n.reqntid 256\n{") == 256
    assert binary.amd_entry(AMD, "vgpr_count") == 116
    assert binary.amd_entry(AMD, "private_segment_fixed_size") == 1872
    assert binary.amd_entry(AMD, "max_flat_workgroup_size") == 512
    with pytest.raises(ValueError, match="0 times"):
        binary.amd_entry(AMD, "sgpr_count")


def test_instructions_are_counted_by_kind():
    opcodes = [one.opcode for one in Code.parse(SASS).instructions]
    instructions, mix = binary.count(opcodes)
    assert instructions == 13
    assert mix == {
        "HGMMA": 1, "UTCHMMA": 1, "HMMA": 1, "LDGSTS": 1, "UTMALDG": 1, "EX2": 1, "BAR": 1,
        "store local": 1, "load local": 1,
    }  # fmt: skip
    instructions, mix = binary.count(binary.amd_opcodes(AMD))
    assert instructions == 6
    assert mix == {"MFMA": 1, "EX2": 1, "BAR": 1, "store local": 1}


def test_products_know_their_shape_and_whether_a_loop_feeds_them():
    assert binary.products(TTIR) == [
        Product(128, 32, 64, "f32", looped=False),
        Product(128, 32, 64, "bf16", looped=True),
        Product(128, 32, 64, "f16", looped=False),  # one stage was asked for
        Product(128, 32, 64, "bf16", looped=True),
    ]


def test_products_without_tensor_cores_are_seen_after_lowering():
    line = (
        "%s = tt.dot %a, %b, %c : tensor<32x128x{0}, #ttg.dot_op<{{opIdx = 0, parent = #{1}}}>> * "
        "tensor<128x32x{0}, #ttg.dot_op<{{opIdx = 1, parent = #{1}}}>> -> tensor<32x32xf32, #{1}>\n"
    )
    assert binary.plain_products(line.format("bf16", "blocked2")) == 1
    assert binary.plain_products(line.format("bf16", "mma")) == 0
    assert binary.plain_products(line.format("f32", "blocked")) == 0


def test_loads_that_wait_are_seen_after_lowering():
    loop = (
        "    %a = scf.for %i = %c0 to %n step %c1  : i32 {\n"
        "      %k = LOAD\n"
        "      %s = ttng.warp_group_dot %q, %k, %c : x\n"
        "    }\n"
    )
    wait = "tt.load %p : tensor<64x32x!tt.ptr<bf16>, #blocked>"
    ahead = "ttg.async_copy_global_to_local %p, %m : tensor<64x32x!tt.ptr<bf16>, #blocked>"
    index = "tt.load %p : tensor<64x!tt.ptr<i32>, #blocked>"
    assert binary.waiting_loads(loop.replace("LOAD", wait)) == 1
    assert binary.waiting_loads(loop.replace("LOAD", ahead)) == 0
    assert binary.waiting_loads(loop.replace("LOAD", index)) == 0
    assert binary.waiting_loads(wait) == 0


@pytest.mark.parametrize(
    ("chip", "threads", "registers", "shared", "columns", "expected"),
    [
        ("sm_80", 256, 255, 0, 0, (1, 164, 8, None)),
        ("sm_80", 256, 128, 81 * 1024, 0, (2, 2, 8, None)),
        ("sm_80", 128, 168, 81 * 1024 + 1, 0, (3, 1, 16, None)),
        ("sm_86", 128, 32, 0, 0, (16, 100, 12, None)),
        ("sm_90", 256, 168, 113 * 1024, 0, (1, 2, 8, None)),
        ("sm_100", 128, 128, 64 * 1024, 256, (4, 3, 16, 2)),
        ("gfx942", 256, 116, 32 * 1024, 0, (4, 2, 8, None)),
        ("gfx942", 512, 116, 64 * 1024, 0, (2, 1, 4, None)),
    ],
)
def test_resident_programs_are_bound_by_the_scarcest_resource(
    chip, threads, registers, shared, columns, expected
):
    found = occupancy(CHIPS[chip], threads, registers, shared, columns)
    by_registers, by_shared, by_warps, by_tensor_memory = expected
    by_shared = min(by_shared, CHIPS[chip].shared)  # where none is used, other limits are lower
    assert (found.by_registers, found.by_shared, found.by_warps) == (
        by_registers, by_shared, by_warps,
    )  # fmt: skip
    assert found.by_tensor_memory == by_tensor_memory
    assert found.programs == min(x for x in expected if x is not None)


def test_a_good_binary_has_no_fault():
    assert complaints(GOOD, HOPPER, num_stages=3, default=True) == []


@pytest.mark.parametrize(
    ("changes", "chip", "says"),
    [
        ({"spills": 4, "local_bytes": 16}, "sm_90", "16 bytes of local memory"),
        ({"local_bytes": 16}, "sm_90", "16 bytes of local memory"),
        ({"mix": {"LDGSTS": 1}}, "sm_90", "no HGMMA"),
        ({"mix": {"LDGSTS": 1, "HMMA": 1}}, "sm_90", "no HGMMA"),
        ({"mix": {"LDGSTS": 1, "HMMA": 1}}, "sm_100", "no UTCHMMA"),
        ({"mix": {"LDGSTS": 1}, "widest": 16}, "sm_90", "no HGMMA or HMMA"),
        ({"mix": {"LDGSTS": 1}}, "sm_86", "no HMMA"),
        ({"mix": {}, "shared": 0}, "gfx942", "no MFMA"),
        ({"plain_products": 2}, "sm_90", "2 products of 16-bit numbers"),
        ({"shared": 227 * 1024 + 1}, "sm_90", "bytes of shared memory"),
        ({"tensor_columns": 1024, "mix": {"LDGSTS": 1, "UTCHMMA": 1}}, "sm_100", "1024 columns"),
        ({"mix": {"HGMMA": 1}}, "sm_90", "no asynchronous copies"),
        ({"serialized": True}, "sm_90", "wait for one another (C7515)"),
        ({"overwritten": 3}, "sm_90", "3 writes to registers"),
    ],
)
def test_a_fault_is_found(changes, chip, says):
    (complaint,) = complaints(facts(**changes), CHIPS[chip], num_stages=3, default=True)
    assert says in complaint


@pytest.mark.parametrize(
    ("changes", "chip", "stages", "default"),
    [
        ({"spills": 4, "local_bytes": 16}, "sm_90", 3, False),  # tuning measures what it costs
        ({"mix": {"LDGSTS": 1, "HMMA": 1}, "widest": 32}, "sm_90", 3, True),
        ({"mix": {"LDGSTS": 1}, "products": ["64x64x64 f32"], "widest": 0}, "sm_90", 3, True),
        ({"mix": {"HGMMA": 1}}, "sm_90", 1, True),
        ({"mix": {"HGMMA": 1}, "looped": False}, "sm_90", 3, True),
        ({"mix": {"MFMA": 1}, "shared": 0}, "gfx942", 3, True),
    ],
)
def test_what_is_no_fault_is_left_alone(changes, chip, stages, default):
    assert complaints(facts(**changes), CHIPS[chip], stages, default) == []


def test_a_loop_that_takes_too_many_instructions_a_key_is_a_fault(entry):
    long = {**entry, "most": 560, "facts": dataclasses.asdict(facts(loop=281))}
    (fault,) = failures(long)
    assert fault.endswith("562 instructions for 128 keys, more than 560")
    assert failures({**long, "facts": dataclasses.asdict(facts(loop=280))}) == []
    assert failures({**long, "default": False}) == []
    assert failures({**long, "most": None}) == []


def test_what_ptxas_says_of_products_that_wait_is_heard():
    said = (
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to non wgmma instructions defining accumulator registers"
    )
    assert binary.serialized(said)
    assert not binary.serialized("ptxas info    : Used 254 registers, used 1 barriers")


LOOPS = """
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
.L_x_2:
        /*0020*/              @!P0 IMAD.WIDE R8, R3, R4, R6 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR8].tnspB, R88 ;
        /*0040*/                   {between} ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   {after} ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
        /*0080*/               @P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   IADD3 R1, R1, 0x1, RZ ;
        /*00a0*/                   NOP ;
        /*00b0*/               @P0 BRA `(.L_x_3) ;
        /*00c0*/                   BRA `(.L_x_4) ;
.L_x_4:
        /*00d0*/                   EXIT ;
"""


def test_only_the_innermost_loops_with_products_count():
    code = Code.parse(LOOPS.format(between="MOV R1, R2", after="MOV R1, R2"))
    assert [len(body) for body in code.product_loops()] == [6]
    assert shortest_loop(code) == 6
    assert shortest_loop(Code.parse("  /*0010*/   HMMA.16816.F32 R4, R8, R12, R4 ;")) == 0


@pytest.mark.parametrize(
    ("instruction", "writes"),
    [
        ("F2FP.BF16.F32.PACK_AB R153, R2, R3", {153}),
        ("LDS.64 R154, [R2]", {154, 155}),
        ("LDG.E.128 R152, desc[UR4][R2.64]", {152, 153, 154, 155}),
        ("IMAD.WIDE R152, R3, R4, R6", {152, 153}),
        ("SHFL.BFLY PT, R155, R158, 0x2, 0x1f", {155}),
        ("STS [R152], R153", set()),
        ("LDGSTS.E.BYPASS.128 [R152], desc[UR16][R6.64]", set()),
        ("ISETP.NE.U32.AND P0, PT, R152, UR4, PT", set()),
        ("MOV R15, R152", {15}),
    ],
)
def test_writes_to_registers_of_a_product_in_flight_are_found(instruction, writes):
    opcode, operands = instruction.split(" ", 1)
    assert written(Instruction(opcode, operands)) == writes
    found = len(writes & {152, 153, 154, 155})
    code = Code.parse(LOOPS.format(between=instruction, after="MOV R1, R2"))
    # Once as it stands, and in both of the turns that the loop is followed for.
    assert overwritten(code) == 3 * found
    assert overwritten(Code.parse(LOOPS.format(between="MOV R1, R2", after=instruction))) == 0


def test_the_roofline_is_the_arithmetic_it_says():
    found = roofline(Tile(rows=128, keys=64, dim=80, v_dim=80, padded=192, warps=8), HOPPER)
    rate = 989.4e12 / 132 / 1.83e9
    assert found.tensor == pytest.approx(2 * 128 * 64 * 192 / rate)
    assert found.exp == 128 * 65 / 16
    keys = 64 * 192 * 2
    assert found.shared == (keys + 2 * keys + 128 * 80 * 2) / 128
    assert found.memory == pytest.approx(64 * 160 * 2 / (3.35e12 / 132 / 1.83e9))
    slowest = max(found.tensor, found.exp, found.shared)
    assert found.bound == "tensor"
    assert found.share == pytest.approx(found.tensor * 160 / 192 / slowest)
    assert found.share_far == pytest.approx(found.tensor * 160 / 192 / max(slowest, found.memory))
    # Without HGMMA each warp reads the keys for its own 16 rows.
    on_a100 = roofline(Tile(128, 64, 128, 128, 256, warps=8), CHIPS["sm_80"])
    assert on_a100.shared == 9 * 64 * 256 * 2 / 128
    assert on_a100.bound == "shared"


@pytest.fixture
def entry():
    constants = {"ROWS": 128, "BLOCK_N": 64, "D": 128, "V": 128}
    return {
        "family": "forward",
        "kernel": "block_sparse_forward",
        "variant": 1,
        "shape": "blocks of 128",
        "dim": "128",
        "dtype": "bf16",
        "config": {"BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
        "default": True,
        "chip": "sm_90",
        "constants": {**constants, "D0": 128, "D1": 0, "V0": 128, "V1": 0},
        "key": "1",
        "facts": dataclasses.asdict(GOOD),
        "seconds": 1.5,
    }


def test_the_page_has_a_row_a_configuration_and_a_column_a_chip(entry):
    other = {**entry, "chip": "sm_80", "facts": dataclasses.asdict(facts(local_bytes=8))}
    del other["facts"]["mix"]["HGMMA"]
    broken = {**entry, "dim": "64", "facts": None, "error": "ptxas fatal"}
    second = {**entry, "variant": 2, "facts": dataclasses.asdict(facts(registers=90))}
    page = markdown([entry, other, broken, second], "Commit abc.")
    assert "| block_sparse_forward (2) | blocks of 128 | 128 | bf16 |" in page
    assert "| - | 90/0/96/2\\* |" in page
    row = "| block_sparse_forward | blocks of 128 | {} | bf16 | BLOCK_N 64, 8 warps, 3 stages |"
    assert f"{row.format(128)} 168/8/96/1\\* ! | 168/0/96/1\\* |" in page
    assert f"{row.format(64)} - | none\\* ! |" in page
    assert f"{row.format(128)} 0/43/68/11/2000 | 24/43/68/11/2000 |" in page
    assert "4 binaries, 3 faults." in page
    where = "block_sparse_forward (forward, blocks of 128, 128, bf16) on sm_80, BLOCK_N 64, 8 warps"
    assert f"- {where}, 3 stages: 8 bytes of local memory" in page
    assert f"- {where}, 3 stages: no HMMA" in page
    assert "does not compile: ptxas fatal" in page
    assert "| 128 | 128 | BLOCK_N 64, 8 warps, 3 stages | 89% / 84% (shared;" in page
    assert "| FlexPrefill, attention, 128k | A100 | 3.6x | sm_80 | 72% | 0.34 | 0.32 |" in page
    assert failures(entry) == []
    assert config_text(entry) == "BLOCK_N 64, 8 warps, 3 stages"


def form(plan, heads, kv_heads):
    """What of a plan the forward kernel is compiled for."""
    return (
        Tiling.of(plan.block_q, math.gcd(heads // kv_heads, heads // plan.heads), 128),
        tuple((run.width, run.pool, run.ranked) for run in plan.runs),
        plan.sink > 0,
        plan.window > 0,
        plan.key_order is not None,
    )


def test_every_form_of_plan_that_a_method_makes_is_compiled():
    compiled = {form(one.plan(), HEADS, KV_HEADS) for one in FORMS.values()}
    torch.manual_seed(0)
    q, k = torch.randn(4, 2560, 32), torch.randn(1, 2560, 32)
    missing = {}
    planned = 0
    for name in sparse_patch.list_methods():
        for preset in (None, *sparse_patch.describe(name).presets):
            method = sparse_patch.get_method(name, **({"preset": preset} if preset else {}))
            plan = method.plan(q, k, scale=32**-0.5, q_offset=0)
            if plan is not None:
                planned += 1
                if (found := form(plan, 4, 1)) not in compiled:
                    missing[name, preset] = found
    assert missing == {}
    assert planned > 15


def run(*command):
    """In a process of its own: there Triton compiles, here it may interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folders = (str(ROOT / name) for name in (".", "kernels", "eval", "scripts"))
    environment["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=ROOT
    )


@pytest.fixture(scope="module")
def toys():
    done = run("tests/kernels/toy_kernels.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
def test_a_good_kernel_passes_on_every_kind_of_chip(toys):
    for chip, core in {
        "sm_80": "HMMA",
        "sm_90": "HGMMA",
        "sm_100": "UTCHMMA",
        "gfx942": "MFMA",
    }.items():
        toy = toys["good"][chip]
        assert toy["default"] == [], chip
        assert toy["facts"]["mix"][core] > 0
        assert toy["facts"]["mix"]["EX2"] > 0
        assert toy["facts"]["registers"] > 16
        assert toy["facts"]["shared"] > 0
        assert toy["facts"]["products"] == ["64x64x32 bf16"]
        assert toy["facts"]["threads"] == (256 if chip == "gfx942" else 128)


@needs_triton
@pytest.mark.parametrize(
    ("name", "chip", "says"),
    [
        ("spills", "sm_80", "bytes of local memory"),
        ("spills", "gfx942", "bytes of local memory"),
        ("two warps", "sm_90", "no HGMMA"),
        ("too much shared", "sm_86", "131072 bytes of shared memory; the chip has 101376"),
        ("too much shared", "gfx942", "131072 bytes of shared memory; the chip has 65536"),
        ("too much tensor memory", "sm_100", "columns of tensor memory; the chip has 512"),
        ("while", "sm_90", "no asynchronous copies in a loop of 3 stages"),
    ],
)
def test_a_bad_kernel_fails(toys, name, chip, says):
    assert any(says in complaint for complaint in toys[name][chip]["default"])


@needs_triton
@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("two warps", "sm_80"),
        ("few rows", "sm_90"),
        ("full precision", "sm_90"),
        ("too much shared", "sm_80"),
        ("while", "gfx942"),
        ("while, one stage", "sm_90"),
    ],
)
def test_a_kernel_that_is_only_unusual_passes(toys, name, chip):
    assert toys[name][chip]["default"] == []


@needs_triton
def test_local_memory_is_no_fault_where_tuning_chooses(toys):
    assert toys["spills"]["sm_80"]["facts"]["local_bytes"] > 0
    assert toys["spills"]["sm_80"]["other"] == []


@pytest.mark.wide
@needs_triton
def test_the_quick_run_finds_no_fault_and_compiles_nothing_twice(tmp_path):
    command = ("scripts/compile_kernels.py", "--quick", "--output", str(tmp_path))
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    first = json.loads((tmp_path / "kernels.json").read_text())
    assert {entry["chip"] for entry in first["entries"]} == {"sm_80", "sm_90", "gfx942"}
    assert first["versions"]["ptxas (sm_80)"]
    assert first["versions"]["ptxas (sm_90)"]
    assert (tmp_path / "kernels.md").read_text().count("\n| block_sparse_forward |") >= 2

    # Marked, so that what is compiled again shows; the first one looks as if its source had been
    # another, and the second as if it had not compiled.
    marked = json.loads(json.dumps(first))
    for entry in marked["entries"]:
        entry["seconds"] = -1
    marked["entries"][0]["key"] = "of another source"
    marked["entries"][1]["facts"] = None
    (tmp_path / "kernels.json").write_text(json.dumps(marked))
    assert run(*command).returncode == 0
    second = json.loads((tmp_path / "kernels.json").read_text())
    assert [entry["seconds"] > 0 for entry in second["entries"]] == [
        i < 2 for i in range(len(first["entries"]))
    ]
    for old, new in zip(first["entries"], second["entries"], strict=True):
        assert {**old, "seconds": 0} == {**new, "seconds": 0}


@needs_triton
def test_what_does_not_exist_is_named():
    done = run("scripts/compile_kernels.py", "--chips", "sm_42")
    assert done.returncode == 2
    assert "sm_42" in done.stderr
