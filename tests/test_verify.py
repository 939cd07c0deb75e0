"""``swinops verify``: right backends pass, and every way of being wrong is a row that says so."""

import argparse
import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch

import swinops
from swinops import backends, reference, verify

TITLES = ["op", "backend", "dtype", "shapes", "error", "bound", "used", "worst"]


def run(*arguments):
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    return parsed.run(parsed)


@pytest.fixture
def install(monkeypatch):
    """Makes a backend "wrong" of the reference with other functions."""

    def install(**functions):
        module = ModuleType("wrong_backend")
        module.__dict__.update({name: getattr(reference, name) for name in reference.__all__}, **functions)
        monkeypatch.setitem(sys.modules, "wrong_backend", module)
        monkeypatch.setitem(backends.MODULES, "wrong", "wrong_backend")

    return install


def verdicts(capsys, op, dtype="float32"):
    """Exit status, the one row, and the lines after the table, of the backend "wrong"."""
    arguments = ("--op", op, "--backend", "wrong", "--dtype", dtype, "--jobs", "1")
    status = run(*arguments)
    text = capsys.readouterr().out
    assert run(*arguments, "--json") == status
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["ok"] == (status == 0) and ("WRONG" in text) == (status != 0)
    return status, row, [line for line in text.splitlines() if line.startswith("WRONG: ")]


def test_a_row_for_each_op_backend_and_dtype(capsys):
    ops = ["window_partition", "relative_position_bias", "layer_norm"]
    assert run("--op", *ops, "--backend", "reference", "--jobs", "1") == 0
    _, _, _, titles, *rows, blank, verdict = capsys.readouterr().out.splitlines()
    assert titles.split() == TITLES and blank == ""
    assert [row.split()[:4] for row in rows] == [
        [op, "reference", dtype, "12"] for op in ops for dtype in ("float32", "float16", "bfloat16")
    ]
    assert all(" ok " in row and ("exact" in row) == ("window_partition" in row) for row in rows)
    assert verdict.startswith("all 9 rows are right, and no kernel can run here (")


def test_every_op_and_a_dozen_shapes():
    assert sorted(verify.OPS) == sorted(swinops.ops.__all__)
    for op, (shapes, make) in verify.OPS.items():
        assert len(shapes) >= 12 and len({str(shape) for shape in shapes}) >= 12, op
        check = make(shapes[0], torch.float16, torch.device("cpu"))
        results, other = verify.run_twice(check, "reference")
        outputs = {name for name in results if name.startswith("out")}
        assert outputs == ({"out 0", "out 1"} if op == "add_layer_norm" else {"out"})
        assert set(results) - outputs == {f"d{name}" for name, x in check.tensors.items() if x is not None}
        assert not other


@pytest.mark.parametrize("op", verify.OPS)
def test_kernels(op, device, monkeypatch):
    if not importlib.util.find_spec("triton"):
        pytest.skip("there is no Triton here")
    monkeypatch.setattr(verify, "INTERPRETED", 2)
    row = verify.check_row(verify.Row(op, "triton", "float16"), device.type)
    assert row.problems == [] and row.shapes == (2 if device.type == "cpu" else len(verify.OPS[op][0]))


def test_processes_share_the_rows(capsys):
    ops = ["window_partition", "window_merge"]
    assert run("--op", *ops, "--backend", "reference", "--dtype", "float16", "--jobs", "2", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] and facts["seconds"] > 0 and facts["torch"] == torch.__version__
    assert [(row["op"], row["ok"], row["used"], row["shapes"]) for row in facts["rows"]] == [
        (op, True, 0.0, 12) for op in ops
    ]


def test_a_wrong_output(install, capsys, monkeypatch):
    """Off by more than the bound in one element of one shape."""
    shapes, make = verify.OPS["window_attention"]
    monkeypatch.setitem(verify.OPS, "window_attention", (shapes[:2] + shapes[-2:], make))

    def window_attention(q, *rest, **settings):
        out, lse = reference.window_attention(q, *rest, **settings)
        if q.shape[-1] == 64:
            out.view(-1)[-1] += 1e-4
        return out, lse

    install(window_attention=window_attention)
    status, row, (line,) = verdicts(capsys, "window_attention")
    assert status == 1 and row["worst"].startswith("out of 8x9, 1 x 64") and row["used"] > 1
    assert line.startswith("WRONG: window_attention, wrong, float32, 8x9, 1 x 64, window 8x8, shift 4x4: out is off by")


def test_a_wrong_gradient(install, capsys):
    def layer_norm_backward(dy, x, mean, rstd, weight, dx, dweight, dbias):
        reference.layer_norm_backward(dy, x, mean, rstd, weight, dx, dweight, dbias)
        if dbias is not None:
            dbias.zero_()

    install(layer_norm_backward=layer_norm_backward)
    status, row, _ = verdicts(capsys, "layer_norm", "float16")
    assert status == 1 and row["worst"].startswith("dbias of ")
    assert row["problems"] and all(": dbias is off by " in problem for problem in row["problems"])


def test_moved_data_is_right_to_the_bit(install, capsys):
    """Half an ulp is far within what the rule allows to arithmetic."""
    install(window_merge=lambda windows, *rest: reference.window_merge(windows, *rest) * (1 + 2**-23))
    status, row, _ = verdicts(capsys, "window_merge")
    assert status == 1 and row["bound"] == 0 and row["used"] is None and 0 < row["error"] < 1e-5


def test_nan_is_wrong(install, capsys):
    def window_partition(x, *rest):
        windows = reference.window_partition(x, *rest)
        windows.view(-1)[0] = float("nan")
        return windows

    install(window_partition=window_partition)
    status, row, (*lines, more) = verdicts(capsys, "window_partition", "bfloat16")
    assert status == 1 and row["error"] is None and len(row["problems"]) == 12
    assert len(lines) == 3 and all(line.endswith(": out is off by nan, allowed 0") for line in lines)
    assert more == "WRONG: window_partition, wrong, bfloat16, and 9 more"


def test_unwritten_memory_is_wrong(install, capsys):
    def relative_position_bias_backward(dbias, window):
        return torch.empty_like(reference.relative_position_bias_backward(dbias, window))

    install(relative_position_bias_backward=relative_position_bias_backward)
    status, row, _ = verdicts(capsys, "relative_position_bias")
    assert status == 1 and row["error"] is None and row["worst"].startswith("dtable of ")


def test_what_a_kernel_raises_is_a_row(install, capsys):
    def layer_norm_add(x, *rest):
        if x.shape[-1] == 1024:
            raise RuntimeError("out of resources: shared memory\nand a page of details")
        return reference.layer_norm_add(x, *rest)

    install(layer_norm_add=layer_norm_add)
    status, row, (line,) = verdicts(capsys, "layer_norm_add", "float16")
    assert status == 1 and row["shapes"] == 12 and row["used"] < 1
    assert line.endswith("3x3 x 1024, mixed: RuntimeError: out of resources: shared memory")


def test_an_output_of_another_shape_is_a_row(install, capsys):
    install(window_partition=lambda x, *rest: reference.window_partition(x, *rest)[:-1])
    status, _, lines = verdicts(capsys, "window_partition")
    assert status == 1 and lines


def test_other_bits_in_a_second_run_are_wrong(install, capsys):
    """Within the bound, but not the same twice."""
    calls = iter(range(10000))

    def layer_norm(*arguments):
        y, mean, rstd = reference.layer_norm(*arguments)
        return y * (1 + 2**-23 * (next(calls) % 2)), mean, rstd

    install(layer_norm=layer_norm)
    status, row, _ = verdicts(capsys, "layer_norm")
    assert status == 1 and row["used"] < 1 and row["problems"]
    assert all(problem.endswith(": a second run gives other bits in out") for problem in row["problems"])


def test_what_cannot_run_has_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(reference, "why_not", lambda x, op, tokens: "it rests today" if op == "window_merge" else None)
    ops = ["relative_position_bias", "window_merge"]
    assert run("--op", *ops, "--backend", "reference", "--jobs", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "not run: reference; window_merge: it rests today"
    assert sum("it rests today" in line for line in lines) == 1

    # to have checked nothing is not to have found everything right
    assert run("--op", "window_merge", "--backend", "reference", "--jobs", "1") == 1
    *_, reason, verdict = capsys.readouterr().out.splitlines()
    assert reason == "not run: reference: it rests today" and verdict.startswith("nothing can run here")


def test_bfloat16_is_left_out_of_the_interpreter(monkeypatch):
    triton = pytest.importorskip("swinops.kernels")
    monkeypatch.setattr(triton, "why_not", lambda x, op, tokens: None)
    for interpreted in (True, False):
        monkeypatch.setattr(triton, "INTERPRETED", interpreted)
        reason = verify.why_not("window_attention_qkvpacked", "triton", torch.bfloat16, "cpu")
        assert ("interpreter" in reason) if interpreted else reason is None
        assert verify.why_not("window_attention_qkvpacked", "triton", torch.float16, "cpu") is None


def test_settings_are_put_back():
    def state():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.get_num_threads(),
        )

    before = state()
    with pytest.raises(RuntimeError, match="boom"), verify.settled():
        assert torch.get_num_threads() == 1 and torch.empty(3).isnan().all()
        raise RuntimeError("boom")
    assert state() == before


def test_rejects_bad_arguments(capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--op", "global_attention")
    assert "invalid choice: 'global_attention'" in capsys.readouterr().err
