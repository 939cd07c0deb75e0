"""The bars on the compiled kernels: what the package's must pass, and for each bar a bad kernel that misses it.

Run as a script, this file measures the bad kernels: pytest's process interprets kernels, and cannot compile them.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from swinops.benchmarks import nvcc, static

NORMS = ("layer_norm", "add_layer_norm_backward", "patch_merging_norm_backward")

SASS = """
        .text:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/               @P0 EXIT ;
.L_x_0:
        /*0020*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R1], desc[UR4][R2.64] ;
        /*0030*/              @!P3 BRA P2, `(.L_x_1) ;
        /*0040*/                   FADD R1, R1, R2 ;
        /*0050*/                   FADD R1, R1, R2 ;
.L_x_1:
        /*0060*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0070*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0080*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0090*/               @P1 CALL.REL.NOINC `(.L_x_2) ;
        /*00a0*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR64], R12 ;
        /*00c0*/              @!P0 BRA `(.L_x_3) ;
.L_x_4:
        /*00d0*/                   STL [R1], R2 ;
        /*00e0*/                   BRA.U !UP1, `(.L_x_0) ;
        /*00f0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0100*/                   EXIT ;
.L_x_3:
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR64], R12 ;
        /*0120*/              @!P0 BRA `(.L_x_3) ;
        /*0130*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*0140*/                   BRA `(.L_x_5);
        /*0150*/                   NOP;
"""

PTX = """
	.param .u64 .ptr .global .align 1 _kernel_param_0,
	ld.param.b64 	%rd1, [_kernel_param_0];
	ld.param.b64 	%rd2, [_kernel_param_2];
	ld.param.b32 	%r1, [_kernel_param_1];
	mul.wide.s32 	%rd3, %r1, 64;
	add.s64 	%rd4, %rd1, %rd3;
	add.s64 	%rd5, %rd4, 16;
	@%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd5 + 0 ];
	@%p1 cp.async.cg.shared.global [ %r9 + 0 ], [ %rd4 + 0 ], 0x10, %r10;
	@!%p2 cp.async.ca.shared.global [ %r9 + 0 ], [ %rd4 + 0 ], 0x8, %r10;
	ld.global.b64 	%rd6, [ %rd1 + 0 ];
	add.s64 	%rd7, %rd2, %rd6;
	st.global.b16 	[ %rd7 + 0 ], { %rs1 };
	add.s64 	%rd8, %rd1, %rd2;
	st.global.v2.b64 	[ %rd8 + 0 ], { %rd6, %rd6 };
"""


def test_machine_code():
    program = static.Program(SASS)
    assert [x.opcode for x in program.instructions()].count("NOP") == 0  # past the end
    outer, inner = program.nest()
    assert inner.parent is outer
    assert [x.name for x in program.instructions(inner)] == ["LDG", "HMMA", "HMMA", "CALL", "BRA"]
    assert [x.width for x in program.instructions() if x.name in ("LDGSTS", "LDG", "STG", "STL")] == [16, 2, 4, 16]
    # a turn: the load and its branch, two more on the longer way, three turns of five, and on to the branch back;
    # the longer way waits for the barrier once more
    ahead = 2 + 3 * 5 + 2 + 2

    def instructions(loop, trips):
        return [program.way(loop, trips, longest)["instruction"] for longest in (True, False)]

    assert instructions(outer, (3,)) == [ahead + 2 + 3, ahead]
    # the early exit does nothing, and is no way to do it
    assert instructions(None, (10, 3)) == [2 + 10 * (ahead + 2 + 3) + 2, 2 + 10 * ahead + 2]
    turn = program.way(outer, (3,), False)
    assert static.by_width(turn, "load") == {16: 1, 2: 3}
    assert turn["product"] == 3 * 2


def test_the_shortest_way_loads():
    """The branch that leaves out the next window's load is that of the last turn, and no turn to count."""
    program = static.Program("""
.L_x_0:
        /*0000*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
.L_x_1:
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   FADD R1, R1, R2 ;
.L_x_2:
        /*0050*/               @P2 BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
""")
    (loop,) = program.nest()
    assert [program.way(loop, (), longest)["instruction"] for longest in (True, False)] == [6, 5]


UNROLLED = """
        /*0000*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E R5, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.64 R6, desc[UR4][R2.64] ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0050*/               @P2 BRA `(.L_x_3) ;
.L_x_2:
        /*0060*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0070*/               @P3 BRA `(.L_x_2) ;
.L_x_3:
        /*0080*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0090*/               @P4 BRA `(.L_x_3) ;
        /*00a0*/                   EXIT ;
"""


@pytest.mark.parametrize(("numbers", "turns"), [(8, (2, 0)), (11, (2, 3)), (3, (0, 3))])
def test_an_unrolled_loop_and_what_it_leaves(numbers, turns):
    program = static.Program(UNROLLED)
    for longest in (True, False):  # past no loop: that is the way of a thread that has nothing to do
        work = program.way(None, (5,), longest, 4 * numbers)
        assert sum(width * n for width, n in static.by_width(work, "load").items()) == 4 * numbers
        assert work["instruction"] == 1 + 4 * turns[0] + 1 + 2 * turns[1] + 2 * 5 + 1
    assert program.way(None, (5,), False)["instruction"] == 1 + 5 * 4 + 1 + 5 * 2 + 5 * 2 + 1


MULTIPLYING = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   LDS.128 R8, [R1] ;
        /*0030*/                   FFMA R4, R8, R9, R4 ;
        /*0040*/                   FFMA R5, R8, R10, R5 ;
        /*0050*/                   FFMA R6, R8, R11, R6 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   FADD R1, R1, R2 ;
.L_x_1:
        /*0090*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00a0*/                   EXIT ;
"""


def test_a_loop_of_multiply_adds():
    """Where there are no tensor cores it takes the place of their instructions: nor is it passed by."""
    program = static.Program(MULTIPLYING)
    ways = [program.way(None, (), longest, fmas=12) for longest in (True, False)]
    assert [work["fma"] for work in ways] == [12, 12]
    assert [work["instruction"] for work in ways] == [2 + 4 * 5 + 2 + 2, 2 + 4 * 5 + 1 + 2]


COPYING = """
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   HMMA.16816.F32.BF16 R24, R4, R8, R24 ;
        /*0050*/               @P0 BRA `(.L_x_0) ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   EXIT ;
"""


def test_a_loop_within_the_hot_one_turns_but_is_counted_once(monkeypatch):
    """Its instructions are in the hot loop, and each turn's bytes in flight."""
    monkeypatch.setattr(
        static, "disassemble", lambda cubin: (static.Program(COPYING), {"REG": 32, "STACK": 0, "SHARED": 0})
    )
    launch = static.CudaLaunch("NewKernel", b"", (132,), 4, 0, static.Turns(True, (1, 12)), 64)
    row = static.measure(launch, 90, 132)
    assert (row.loads, row.hot_loads) == ({4: 1, 16: 2}, {16: 2})
    assert (row.stores, row.hot_stores) == ({16: 1}, {})
    assert row.hot_loop == (3 + 12 * 2, 3 + 12 * 2)
    assert row.bytes_in_flight == 13 * 16 * 32 * 4
    cells = static.cells(cuda_case(90, "window_attention", 7), row)
    first = static.COLUMNS.index("ld128") - len(static.COLUMNS)
    assert cells[first : first + 4] == ["2+0", "0+1", "0+1", "0+0"]


def test_accesses_are_traced_to_their_tensors():
    assert static.accesses(PTX, ["q", None, "out"]) == [
        ("q", 16, False),
        ("q", 16, False),
        ("q", 8, False),
        ("q", 8, False),
        ("out", 2, True),  # through an offset that was itself loaded, which is no pointer
        ("?", 16, True),
    ]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        (80, 128, 0, 4, (4, "registers")),
        (80, 129, 0, 4, (3, "registers")),  # registers are given by eight to a thread
        (90, 168, 28672, 4, (3, "registers")),
        (90, 255, 0, 8, (1, "registers")),
        (90, 32, 0, 1, (32, "blocks")),
        (90, 32, 0, 8, (8, "registers")),
        (90, 24, 0, 8, (8, "warps")),
        (80, 32, 40 << 10, 4, (4, "shared")),  # 41 KB each of 164
        (90, 32, 40 << 10, 4, (5, "shared")),
        (80, 32, 164 << 10, 4, (0, "shared")),
    ],
)
def test_blocks_per_sm(arch, registers, shared, warps, blocks):
    assert static.blocks_per_sm(arch, registers, shared, warps) == blocks


def test_tensor_memory_limits_blocks():
    assert static.blocks_per_sm(100, 64, 0, 4, tensor_memory=256) == (2, "tensor memory")


def test_a_kernel_that_does_not_compile_is_a_failure(monkeypatch):
    def call(case):
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(static.Case, "call", call)
    _, rows, (failure,) = static.outcome(static.Case(80, "window_attention", 7, head_dim=64))
    assert not rows
    assert failure.bar == "compiles"
    assert "head_dim 64" in str(failure)
    assert "ptxas died" in str(failure)


def test_refuses_to_compile_interpreted_kernels(capsys, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit) as refusal:
        static.main([])
    assert refusal.value.code == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--window", "7", "0"], "--window must be at least 1, got 0"),
        (["--head-dim", "-1"], "--head-dim must be at least 1, got -1"),
        (["--op", "layer_norm", "--backend", "cuda"], "there is no kernel of layer_norm for cuda among what was"),
    ],
)
def test_refuses_what_has_no_kernel(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(nvcc, "why_not", lambda: None)
    with pytest.raises(SystemExit) as refusal:
        static.main(arguments)
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


def compiling_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, with kernels compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_kernels_pass_the_bars(tmp_path):
    report = tmp_path / "static.json"
    done = compiling_process(
        *("-m", "swinops.benchmarks.static", "--backend", "triton", "--arch", "80", "90", "--window", "7", "12"),
        *("--head-dim", "32", "--dtype", "bfloat16", "--channels", "96", "--op", *static.ATTENTION, *NORMS),
        *("--jobs", "2", "--json", str(report)),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert static.NOT_A_TIMING in done.stdout
    assert "0 bars missed" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["static.json"]  # nothing temporary is left

    written = json.loads(report.read_text())
    assert written["note"] == static.NOT_A_TIMING
    assert not written["failures"]
    rows = written["rows"]
    attention = [row for row in rows if row["case"]["op"] in static.ATTENTION]
    measured = {(row["arch"], row["case"]["op"], row["case"]["window"], row["case"]["shift"] > 0) for row in attention}
    assert len(measured) == 2 * len(static.ATTENTION) * 2 * 2
    norms = [row for row in rows if row["kernel"] in static.NORM_KERNELS]
    assert {(row["arch"], row["case"]["op"], row["case"]["stream"]) for row in norms} == {
        (arch, op, stream) for arch in (80, 90) for op in NORMS for stream in ("bfloat16", "float32")
    }
    assert len(rows) == len(attention) + len(norms) + sum(row["kernel"] == "_sum_kernel" for row in rows)
    for row in rows:
        assert row["issue_ns"] is not None, f"how often the loops of {row['kernel']} turn is unknown"
        assert row["memory_ns"] > 0
        assert row["bytes_in_flight"] > 0
        assert row["hot_loop"][0] >= row["hot_loop"][1] > 0
        assert "?" not in row["accesses"]


def test_kernels_of_the_continuous_bias(tmp_path):
    report = tmp_path / "static.json"
    done = compiling_process(
        *("-m", "swinops.benchmarks.static", "--backend", "triton", "--arch", "90", "--window", "8", "12"),
        *("--jobs", "2", "--op", *static.CONTINUOUS_BIAS, "--json", str(report)),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads(report.read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["_bias_kernel"] * 2 + ["_reduce_kernel", "_weights_kernel"] * 2
    assert all(row["stack"] <= static.STACK_LIMIT and "?" not in row["accesses"] for row in rows)
    assert all(issues_its_work(row) for row in rows)


def issues_its_work(row: dict) -> bool:
    """Whether a bias's kernel issues at least what its sums and copies take, for a head, by 32 lanes."""
    window = row["case"]["window"]
    network = row["kernel"] in ("_bias_kernel", "_weights_kernel", "TableKernel", "WeightsKernel")
    work = 512 * (2 * window - 1) ** 2 if network else window**4 / 4  # products, or vectors of four pairs
    return row["issue_ns"][0] >= row["issue_ns"][1] > 0 and row["instructions"][1] * row["warps"] >= work / 32


without_nvcc = nvcc.why_not()
with_nvcc = pytest.mark.skipif(without_nvcc is not None, reason=str(without_nvcc))


@with_nvcc
def test_cuda_kernels_pass_the_bars(tmp_path):
    small, large = tmp_path / "small.json", tmp_path / "large.json"
    common = "-m", "swinops.benchmarks.static", "--backend", "cuda", "--head-dim", "32", "--dtype", "bfloat16"
    commands = [
        (*common, "--arch", "80", "90", "--window", "7", "8", "--jobs", "2", "--op", *static.ATTENTION),
        # of more than 64 tokens
        (*common, "--arch", "90", "--window", "12", "--jobs", "2", "--op", *static.ATTENTION),
    ]
    with ThreadPoolExecutor() as pool:
        done = list(
            pool.map(lambda command, path: compiling_process(*command, "--json", str(path)), commands, (small, large))
        )
    for one in done:
        assert one.returncode == 0, one.stdout[-4000:] + one.stderr[-4000:]
        assert static.NOT_A_TIMING in one.stdout
        assert "0 bars missed" in one.stdout
    reports = [json.loads(path.read_text()) for path in (small, large)]

    sums = [row for row in reports[0]["rows"] if row["kernel"] == "SumKernel"]
    assert len(sums) == 2 * 2 * 3  # of two ops, cosine attention's with one for the scale
    for row in sums:
        assert row["issue_ns"][1] > 0
        # a load of each number, by 32 lanes
        assert row["instructions"][1] * row["warps"] >= row["bytes"] / 4 / 32 > 0
    rows = [row for row in reports[0]["rows"] if row["kernel"] != "SumKernel"]
    assert [(row["arch"], row["case"]["op"], row["case"]["window"]) for row in rows] == [
        (arch, op, window) for arch in (80, 90) for op in static.ATTENTION for window in (7, 8)
    ]
    sums = ["TiledBackwardKernel dq", "TiledBackwardKernel dkdv", "TiledBackwardKernel dbias"]
    tiled = [row for row in reports[1]["rows"] if row["kernel"] != "SumKernel"]
    assert [row["kernel"] for row in tiled] == ["TiledForwardKernel"] * 2 + sums * 2
    assert all(row["issue_ns"][0] >= row["issue_ns"][1] > 0 for row in tiled)
    rows += tiled[:2]
    # a stage is a whole window's keys and values, beside which the next queries are copied
    assert all(row["bytes_in_flight"] >= 3 * 12**2 * 32 * 2 for row in rows[-2:])
    for row in rows:
        backward = row["case"]["op"].endswith("backward")
        assert row["tensor_core"]
        assert row["issue_ns"][0] >= row["issue_ns"][1] > 0
        assert row["hot_loop"][0] >= row["hot_loop"][1] > 0
        vector = row["case"]["window"] ** 2 * 32 * 2
        assert row["wide"][0] >= (4 if backward else 3) * vector
        # out or three gradients, and a float32 of every token
        assert row["bytes"] == (7 if backward else 4) * vector + row["case"]["window"] ** 2 * 4


@with_nvcc
def test_cuda_kernels_of_the_other_ops(tmp_path):
    report = tmp_path / "static.json"
    ops = "window_partition", "window_merge", *static.BIAS
    done = compiling_process(
        *("-m", "swinops.benchmarks.static", "--backend", "cuda", "--arch", "80", "90", "--window", "7", "12"),
        *("--head-dim", "32", "--dtype", "bfloat16", "--jobs", "2", "--op", *ops, "--json", str(report)),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads(report.read_text())["rows"]
    kernels = ("CyclicShiftKernel",), ("CyclicShiftKernel",), ("ExpandKernel",), ("SumKernel",)
    kernels += ("TableKernel", "ExpandKernel"), ("SumKernel", "WeightsKernel")
    assert [(row["arch"], row["case"]["op"], row["case"]["window"], row["kernel"]) for row in rows] == [
        (arch, op, window, name)
        for arch in (80, 90)
        for op, names in zip(ops, kernels, strict=True)
        for window in (7, 12)
        for name in names
    ]
    for row in rows:
        window = row["case"]["window"]
        if row["case"]["op"] in static.BIAS:
            assert issues_its_work(row)
            assert row["memory_ns"] > 0
        else:  # a load and a store of 16 bytes by each lane
            assert row["bytes"] == 2 * window**2 * 3 * 32 * 2
            assert row["instructions"][1] * row["warps"] >= row["bytes"] / 16 / 32


@with_nvcc
def test_cuda_kernels_without_tensor_cores(tmp_path):
    report = tmp_path / "static.json"
    done = compiling_process(
        *("-m", "swinops.benchmarks.static", "--backend", "cuda", "--arch", "90", "--window", "7", "12", "--jobs", "1"),
        *("--head-dim", "32", "--dtype", "float32", "--op", *static.FORWARD, "--json", str(report)),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads(report.read_text())["rows"]
    assert [(row["kernel"], row["case"]["window"]) for row in rows] == [
        ("TiledForwardKernel", 7),
        ("TiledForwardKernel", 12),
    ] * 2
    for row in rows:
        assert not row["tensor_core"]
        # the multiply-adds of two products, by 32 lanes
        assert row["instructions"][1] * row["warps"] >= 2 * row["case"]["window"] ** 4 * 32 / 32


@with_nvcc
def test_integers_among_the_arguments_of_a_launch(tmp_path):
    source = tmp_path / "small.cu"
    source.write_text("""
template <class A, class B> struct Pair { A a; B b; };
namespace {
template <int n, class T> __global__ void Kernel(const T*, int, Pair<int, Pair<T, long>>, long, bool, int) {}
}
extern "C" __attribute__((visibility("default"))) void launch() {
  Kernel<(3 > 2), float><<<dim3(5, 2), 64, 32>>>(nullptr, -7, {}, 1L << 40, true, 9);
}
""")
    library = nvcc.Library([source])
    library.native.launch()  # nobody asks: nothing happens
    (launch,) = library.record(library.native.launch)
    assert (launch.grid, launch.block, launch.shared) == ((5, 2, 1), (64, 1, 1), 32)
    assert launch.integers == (-7, 1 << 40, 9)
    library.native.launch()  # nor any more


def cuda_case(arch: int, op: str, window: int) -> static.Case:
    return static.Case(arch, op, window, window // 2, backend="cuda")


def test_kernels_that_are_not_known_have_no_times():
    row = static.Row(
        *(90, "NewKernel", 4, 1, 96, 0, 0, 0, 1024, 132, 5, "registers", 1, 49152, {}, {}, {}, {}, {}, {"HMMA": 1}),
        *((9, 8), None, None, None, None, None, "?"),
    )
    case = cuda_case(90, "window_attention_backward", 12)
    assert static.cells(case, row)[-3:] == ["?", "?", "?"]
    assert not static.failures(case, [row])


def test_says_why_cuda_kernels_cannot_be_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(nvcc, "CSRC", tmp_path / "csrc")
    with pytest.raises(SystemExit) as refusal:
        static.main(["--backend", "cuda"])
    assert refusal.value.code == 2
    assert "there is no csrc/" in capsys.readouterr().err


def test_cuda_must_not_issue_longer_than_triton():
    def row(issue: float) -> static.Row:
        return static.Row(
            *(90, "kernel", 4, 1, 96, 0, 0, 0, 1024, 132, 5, "registers", 1, 49152, {}, {}, {}, {}, {}, {"HMMA": 1}),
            *((9, 8), (9, 8), (issue, 1.0), None, 1, 4.0, "memory"),
        )

    case = cuda_case(90, "window_attention", 7)
    triton_case = static.Case(90, "window_attention", 7, 3)
    assert not list(static.slower([(case, [row(1.9)], []), (triton_case, [row(2.0)], [])]))
    (failure,) = static.slower([(case, [row(2.1)], []), (triton_case, [row(2.0)], [])])
    assert failure.bar == "issue time"


def test_command_fails_where_a_bar_does(tmp_path):
    report = tmp_path / "static.json"
    arguments = ["--arch", "80", "--op", "window_attention", "--window", "7", "--head-dim", "32", "--dtype", "bfloat16"]
    arguments += ["--no-shift", "--backend", "triton", "--jobs", "1", "--json", str(report)]
    program = (
        f"from swinops.benchmarks import static; static.STACK_LIMIT = -1; raise SystemExit(static.main({arguments}))"
    )
    done = compiling_process("-c", program)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED stack: _forward_kernel, sm_80 window_attention window 7 shift 0 head_dim 32" in done.stdout
    (failure,) = json.loads(report.read_text())["failures"]
    assert failure["bar"] == "stack"
    assert failure["limit"] == "-1 bytes"


@pytest.fixture(scope="module")
def missed() -> dict[str, set[str]]:
    """The bars that each bad kernel misses, and "good": those that the same code misses without its fault."""
    done = compiling_process(__file__)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: set(bars) for name, bars in json.loads(done.stdout).items()}


@pytest.mark.parametrize(
    ("kernel", "bars"),
    [
        ("good", set()),
        ("spilling", {"stack", "local memory"}),
        ("narrow", {"128-bit accesses"}),
        ("without tensor cores", {"tensor cores"}),
        ("naive", {"issue time"}),
        ("a row a program", {"128-bit accesses", "issue time", "one wave", "bytes in flight"}),
    ],
)
def test_bad_kernel_misses_its_bar(missed, kernel, bars):
    assert missed[kernel] == bars


BAD_CUDA = r"""
#include "attention.cuh"

using namespace swinops;
using Math = HalfMath<bfloat16, 32>;

enum Fault { kNone, kSpilling, kNarrow, kIssuing, kHoarding };

// Attention within windows of 64 tokens that are contiguous: one head a block, a loop over windows.
template <int kFault>
__global__ void __launch_bounds__(128, kFault == kSpilling ? 12 : kFault == kHoarding ? 1 : 4)
    WholeForwardKernel(const bfloat16* q, const bfloat16* k, const bfloat16* v, const float* bias, bfloat16* out,
                       int windows) {
  SWINOPS_DYNAMIC_SHARED(bfloat16, tile);
  constexpr int kTile = 64 * Math::Rows::kStride;
  const Math math;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float held[32];
  if (kFault == kHoarding) {
    for (int i = 0; i < 32; ++i) held[i] = bias[i * 128 + threadIdx.x];
  }
  for (int window = blockIdx.x; window < windows; window += gridDim.x) {
    const int64_t start = (int64_t(window) * gridDim.y + blockIdx.y) * 64 * 32;
    const bfloat16* const inputs[3] = {q + start, k + start, v + start};
    __syncthreads();
    for (int n = 0; n < 3; ++n) {
      if (kFault == kNarrow && n == 1) {
        for (int i = threadIdx.x; i < 64 * 32; i += 128) {
          tile[kTile + Math::Rows::element(i / 32, i % 32)] = inputs[n][i];
        }
      } else {
        for (int i = 0; i < 2; ++i) {
          const int row = 16 * warp + g + 8 * i;
          cp_async(tile + n * kTile + Math::Rows::chunk(row, t), inputs[n] + row * 32 + t * 8, true);
        }
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    bfloat16* const rows = tile + 16 * warp * Math::Rows::kStride;
    float s[8][4] = {}, result[4][4] = {}, total[2] = {};
    math.scores(s, rows, tile + kTile);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float& x = s[i / 4][i % 4];
      if (kFault == kHoarding) x += held[i];
      if (kFault == kIssuing) {
#pragma unroll
        for (int n = 0; n < 16; ++n) x = x * x + 0.5f;
      }
      x = exp2_fast(x);
    }
    math.weigh(result, total, s, tile + 2 * kTile);
    __syncwarp();
    for (int i = 0; i < 8; ++i) {
      Math::store(rows, g + i / 4 * 8, i % 4 * 8 + 2 * t, result[i % 4][i / 4 * 2] / total[i / 4],
                  result[i % 4][i / 4 * 2 + 1] / total[i / 4]);
    }
    __syncwarp();
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<uint4*>(out + start + (16 * warp + g + 8 * i) * 32 + t * 8) =
          *reinterpret_cast<const uint4*>(rows + Math::Rows::chunk(g + 8 * i, t));
    }
  }
}

template <int kFault>
void launch(size_t shared) {
  SWINOPS_LAUNCH(WholeForwardKernel<kFault>, dim3(176, 3), dim3(128), shared, 0, nullptr, nullptr, nullptr, nullptr,
                 nullptr, 4096);
}

extern "C" __attribute__((visibility("default"))) void launch_all() {
  launch<kNone>(15360);
  launch<kSpilling>(15360);
  launch<kNarrow>(15360);
  launch<kIssuing>(15360);
  launch<kHoarding>(160 << 10);
}
"""


@pytest.fixture(scope="module")
def missed_by_cuda(tmp_path_factory) -> dict[str, set[str]]:
    source = tmp_path_factory.mktemp("static") / "bad.cu"
    source.write_text(BAD_CUDA)
    library = nvcc.Library([source])
    launches = library.record(library.native.launch_all)
    case = cuda_case(90, "window_attention", 8)
    missed = []
    for launch in launches:
        row = static.measure(case.cuda_launch(library, launch), 90, case.items)
        missed.append({failure.bar for failure in static.failures(case, [row])})
    return dict(zip(("good", "spilling", "narrow", "issuing", "hoarding"), missed, strict=True))


@with_nvcc
@pytest.mark.parametrize(
    ("kernel", "bars"),
    [
        ("good", set()),
        ("spilling", {"stack", "local memory"}),
        ("narrow", {"128-bit accesses"}),
        ("issuing", {"issue time"}),
        ("hoarding", {"registers"}),  # one block on a multiprocessor, whose loads do not keep the memory busy
    ],
)
def test_bad_cuda_kernel_misses_its_bar(missed_by_cuda, kernel, bars):
    assert missed_by_cuda[kernel] == bars


@triton.jit
def persistent_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, token_stride, channel_stride, windows, heads,
    N: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attention within windows that are contiguous: one head a program, a loop over windows."""
    t = tl.arange(0, BLOCK_N)
    c = tl.arange(0, HEAD_DIM)
    head = tl.program_id(1)
    pairs = head * N * N + t[:, None] * N + t[None, :]
    bias = tl.load(bias_ptr + pairs, (t < N)[:, None] & (t < N)[None, :], other=float("-inf"))
    for window in tl.range(tl.program_id(0), windows, tl.num_programs(0)):
        place = (window * N + t)[:, None] * token_stride + head * HEAD_DIM + c[None, :] * channel_stride
        v = tl.load(v_ptr + place, (t < N)[:, None], other=0.0)
        if DOT:
            q = tl.load(q_ptr + place, (t < N)[:, None], other=0.0)
            k = tl.load(k_ptr + place, (t < N)[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k)) + bias
        else:
            q = tl.load(q_ptr + place, (t < N)[:, None], other=0.0).to(tl.float32)
            k = tl.load(k_ptr + place, (t < N)[:, None], other=0.0).to(tl.float32)
            scores = tl.sum(q, 1)[:, None] * tl.sum(k, 1)[None, :] + bias
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(p, 1)[:, None]
        if DOT:
            out = tl.dot(p.to(v.dtype), v) / total
        else:
            out = v.to(tl.float32) * total
        tl.store(out_ptr + place, out.to(v.dtype), (t < N)[:, None])


@triton.jit
def naive_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr, token_stride, heads, side, shift,
    M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program a (window, head): the bias is gathered from its table, and every window compares its regions."""
    N: tl.constexpr = M * M
    t = tl.arange(0, BLOCK_N)
    c = tl.arange(0, HEAD_DIM)
    window, head = tl.program_id(0), tl.program_id(1)
    h, w = window // side * M + t // M, window % side * M + t % M
    place = ((h + shift) % (side * M) * side * M + (w + shift) % (side * M))[:, None] * token_stride
    place += head * HEAD_DIM + c[None, :]
    q = tl.load(q_ptr + place, (t < N)[:, None], other=0.0)
    k = tl.load(k_ptr + place, (t < N)[:, None], other=0.0)
    v = tl.load(v_ptr + place, (t < N)[:, None], other=0.0)
    row = (t[:, None] // M - t[None, :] // M + M - 1) * (2 * M - 1) + t[:, None] % M - t[None, :] % M + M - 1
    inside = (t < N)[:, None] & (t < N)[None, :]
    scores = tl.dot(q, tl.trans(k)) + tl.load(table_ptr + row * heads + head, inside, other=float("-inf"))
    region = (
        (h >= side * M - M).to(tl.int32)
        + (h >= side * M - shift)
        + 3 * (w >= side * M - M)
        + 3 * (w >= side * M - shift)
    )
    scores += tl.where(region[:, None] != region[None, :], -100.0, 0.0)
    p = tl.exp(scores - tl.max(scores, 1)[:, None])
    out = tl.dot(p.to(v.dtype), v) / tl.sum(p, 1)[:, None]
    tl.store(out_ptr + place, out.to(v.dtype), (t < N)[:, None])


@triton.jit
def _norm_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, stride, eps, C: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Layer norm of one row a program, by the name that the bars of the package's own go by."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    x = tl.load(x_ptr + row * stride + c, c < C, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / C
    centred = tl.where(c < C, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / C + eps)
    y = centred * rstd * tl.load(weight_ptr + c, c < C) + tl.load(bias_ptr + c, c < C)
    tl.store(y_ptr + row * stride + c, y.to(y_ptr.dtype.element_ty), c < C)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


def bad_kernels() -> dict[str, list[str]]:
    heads, batch, side, head_dim = 3, 64, 8, 32
    windows = batch * side**2

    def missed(window: int, launch, turns: static.Turns) -> list[str]:
        case = static.Case(90, "window_attention", window, head_dim=head_dim)
        q, k, v, out = torch.empty(4, windows * window**2, heads, head_dim, dtype=torch.bfloat16).unbind()
        with static.compiling(90) as launches:
            launch(q, k, v, out)
        rows = [static.measure(one, 90, windows * heads, turns) for one in launches]
        return [failure.bar for failure in static.failures(case, rows)]

    def persistent(tokens: int, block: int, dot: bool = True, channel_stride: int = 1):
        bias = torch.empty(heads, tokens, tokens)
        sizes = heads * head_dim, channel_stride, windows, heads
        return lambda q, k, v, out: persistent_kernel[(132, heads)](
            q, k, v, bias, out, *sizes, tokens, block, head_dim, dot, num_warps=4
        )  # fmt: skip

    def naive(q, k, v, out):
        table = torch.empty(169, heads)
        naive_kernel[(windows, heads)](
            q, k, v, table, out, heads * head_dim, heads, side, 3, 7, 64, head_dim, num_warps=4
        )

    def row_a_program() -> list[str]:
        case = static.NormCase(90, "layer_norm", 96)
        x, y = torch.empty(2, case.items, 96, dtype=torch.bfloat16).unbind()
        weight, bias = torch.empty(2, 96).unbind()
        mean, rstd = torch.empty(2, case.items).unbind()
        with static.compiling(90) as launches:
            _norm_kernel[(case.items,)](x, y, weight, bias, mean, rstd, 96, 1e-5, 96, 128, num_warps=4)
        rows = [static.measure(one, 90, case.items, static.Turns(False, ())) for one in launches]
        return [failure.bar for failure in static.failures(case, rows)]

    each = static.Turns(True, (1,))
    return {
        "good": missed(7, persistent(49, 64), each),
        "spilling": missed(16, persistent(256, 256), each),
        "narrow": missed(8, persistent(64, 64, channel_stride=2), each),
        "without tensor cores": missed(7, persistent(49, 64, dot=False), each),
        "naive": missed(7, naive, static.Turns(False, ())),
        "a row a program": row_a_program(),
    }


if __name__ == "__main__":
    print(json.dumps(bad_kernels()))
