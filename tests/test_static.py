"""The bars on the compiled kernels: what the package's must pass, and for each bar a bad kernel that misses it.

Run as a script, this file measures the bad kernels: pytest's process interprets kernels, and cannot compile them.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from swinops.benchmarks import static

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
    assert program.count(outer, (3,), min) == ahead
    assert program.count(outer, (3,), max) == ahead + 2 + 3
    assert program.count(None, (10, 3), max) == 2 + 10 * (ahead + 2 + 3) + 2
    assert (
        program.count(None, (10, 3), min) == 2 + 10 * ahead + 2
    )  # the early exit does nothing, and is no way to do it


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


def compiling_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python, with kernels compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_kernels_pass_the_bars(tmp_path):
    report = tmp_path / "static.json"
    done = compiling_process(
        *("-m", "swinops.benchmarks.static", "--arch", "80", "90", "--window", "7", "12", "--head-dim", "32"),
        *("--dtype", "bfloat16", "--channels", "96", "--op", *static.ATTENTION, *NORMS),
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
        *("-m", "swinops.benchmarks.static", "--arch", "90", "--window", "8", "12", "--jobs", "2"),
        *("--op", *static.CONTINUOUS_BIAS, "--json", str(report)),
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    rows = json.loads(report.read_text())["rows"]
    assert [row["kernel"] for row in rows] == ["_bias_kernel"] * 2 + ["_reduce_kernel", "_weights_kernel"] * 2
    assert all(row["stack"] <= static.STACK_LIMIT and "?" not in row["accesses"] for row in rows)
    # of two loops side by side the turns are not known
    assert all((row["issue_ns"] is None) == (row["kernel"] == "_bias_kernel") for row in rows)


def test_command_fails_where_a_bar_does(tmp_path):
    report = tmp_path / "static.json"
    arguments = ["--arch", "80", "--op", "window_attention", "--window", "7", "--head-dim", "32", "--dtype", "bfloat16"]
    arguments += ["--no-shift", "--jobs", "1", "--json", str(report)]
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
