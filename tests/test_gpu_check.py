"""``swinops gpu-check`` as far as a machine without a GPU can run it: its sentences, its table, what it makes of other
programs' output, and the checks themselves on plain PyTorch or on Triton's interpreter."""

import contextlib
import importlib.util
import json
import os
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch

from swinops import verify
from swinops.backends import cuda
from swinops.benchmarks import gpu_check, gpu_checks, harness
from swinops.benchmarks.gpu_check import Outcome, Skipped, Step
from swinops.cli import main

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
CPU = torch.device("cpu")
OPS = {
    **{op: [verify.Attention((4, 3), (4, 4), (2, 2), 1, 8)] for op in gpu_checks.ATTENTION},
    **{op: [verify.Partition((2, 4), (2, 2), (1, 1), 3)] for op in gpu_checks.SHIFT},
    "relative_position_bias": [verify.PositionBias((2, 3), 2)],
    "continuous_position_bias": [verify.ContinuousPositionBias((2, 2), 1, 4)],
    **{op: [verify.Norm((3, 2), 8)] for op in gpu_checks.NORMS},
}


@pytest.fixture
def small(monkeypatch):
    """One small shape of each op, and one precision."""
    assert OPS.keys() == verify.OPS.keys()
    for op, shapes in OPS.items():
        monkeypatch.setitem(verify.OPS, op, (shapes, verify.OPS[op][1]))
    monkeypatch.setattr(gpu_checks, "PRECISIONS", [(torch.float16, False)])


@pytest.fixture
def plain(small, monkeypatch):
    """Plain PyTorch in place of the kernels, and a GPU that runs everything at once."""
    monkeypatch.setattr(gpu_checks, "KERNELS", ("reference",))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None)
    for name, value in {"Stream": stream, "current_stream": stream, "stream": contextlib.nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, lambda of, value=value: value)


def test_without_a_gpu_there_is_a_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["gpu-check"]) == 2
    out, err = capsys.readouterr()
    assert err == f"swinops gpu-check needs a CUDA GPU, and torch {torch.__version__} sees none here\n"
    assert not out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--minutes 0", "argument --minutes: must be a positive number, got '0'"),
        ("--minutes soon", "argument --minutes: must be a positive number, got 'soon'"),
        ("--only everything", "argument --only: invalid choice: 'everything'"),
        ("--output /", "--output / cannot be written: it is a folder"),
    ],
)
def test_bad_arguments(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as exit:
        main(["gpu-check", *arguments.split()])
    assert exit.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_ten_minutes(gpu, monkeypatch, tmp_path, capsys):
    """What a step leaves is for those after it, and all of it for the only one."""
    assert sum(step.seconds for step in gpu_check.STEPS.values()) == 600
    steps = {"a": Step(30, skip, said), "b": Step(90, skip, said)}
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    arguments = ["gpu-check", "--output", str(tmp_path / "x.md"), "--minutes", "4"]
    assert main(arguments) == 0
    assert "a, at most 60 s" in (out := capsys.readouterr().out) and "b, at most 240 s" in out
    assert main([*arguments, "--only", "b"]) == 0
    assert "b, at most 240 s" in (out := capsys.readouterr().out) and "a, " not in out


def python(code):
    return lambda: [sys.executable, "-c", code]


def said(output, status):
    return Outcome("failed" if status else "ok", output.strip())


def test_what_it_ran_on(monkeypatch):
    machine = {"device": "an H100", "torch": "2.11.0", "triton": "", "commit": "abc-dirty"}
    monkeypatch.setattr(harness, "machine", lambda device: machine)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "extension", lambda: (None, "it was not built"))
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    facts = gpu_check.environment()
    assert facts["GPU"] == "2 x an H100, compute capability 9.0"
    assert facts["driver"] == f"unknown, CUDA {torch.version.cuda}" and facts["extension"] == "it was not built"
    assert facts["versions"].startswith("torch 2.11.0, triton none, Python 3.")
    assert facts["commit"].startswith("abc-dirty (swinops ")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "environment", lambda: {"GPU": "1 x a GPU", "commit": "abc (swinops 1)"})


def skip():
    raise Skipped("there is none")


@pytest.mark.parametrize("failing", [False, True])
def test_table_file_and_status(failing, gpu, monkeypatch, tmp_path, capsys):
    steps = {
        "first": Step(60, python("print('a | b')"), said),
        "second": Step(60, python("import sys; print('why'); sys.exit(3)"), said),
        "third": Step(60, skip, said),
    }
    monkeypatch.setattr(gpu_check, "STEPS", steps if failing else {name: steps[name] for name in ("first", "third")})
    path = tmp_path / "new" / "check.md"
    assert main(["gpu-check", "--output", str(path)]) == failing
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = [["step", "result", "seconds", "covered"], ["first", "ok", "0", "a", "|", "b"]]
    table += [["second", "failed", "0", "why"]] * failing + [["third", "skipped", "0", "there", "is", "none"]]
    start = lines.index(table[0])
    assert lines[start : start + len(table)] == table
    text = path.read_text()
    assert text.startswith("## 1 x a GPU, abc (swinops 1)\n\nGPU: 1 x a GPU  \n")
    assert "| first | ok | 0 | a \\| b |\n" in text and "| third | skipped | 0 | there is none |\n" in text
    assert ("\nsecond:\n\n    why\n" in text) == failing
    assert [each.name for each in path.parent.iterdir()] == ["check.md"]


def test_only_some_steps(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "STEPS", {"a": Step(60, skip, said), "b": Step(60, skip, said)})
    assert main(["gpu-check", "--only", "b", "--output", str(tmp_path / "x.md")]) == 0
    assert "\na  " not in capsys.readouterr().out


def test_a_step_that_takes_too_long_is_stopped():
    """It may say how far it came; what it started is stopped with it."""
    patient = "import signal, time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('half', flush=True)"
    row = gpu_check.execute("patient", Step(1, python(patient), said), 8)  # time to start on a busy machine
    assert row[:2] == ("patient", "failed") and row.covered == "stopped after 8 s, see --minutes: half"
    assert 8 <= row.seconds < 30


def test_a_step_that_cannot_be_stopped_is_killed(monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    deaf = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
    time.sleep(60)
    """
    start = time.perf_counter()
    output, status = gpu_check.finish(python(textwrap.dedent(deaf))(), 3)
    assert status is None and time.perf_counter() - start < 30
    pid = int(output)
    deadline = time.monotonic() + 10
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(pid)


def running(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:  # an orphan that nobody waits for is a zombie
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_steps_do_not_interpret_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; print(os.environ.get('TRITON_INTERPRET'), os.environ['ALONE'])"
    assert gpu_check.finish(python(code)(), 60, {"ALONE": "1"}) == ("None 1\n", 0)


PYTEST = {
    "failed": (
        "..........s.F [100%]\n"
        "FAILED tests/test_a.py::test_b[x-y] - AssertionError: 1\n"
        "1 failed, 8 passed, 1 skipped in 3.21s\n",
        1,
        ("failed", "1 failed, 8 passed, 1 skipped: tests/test_a.py::test_b[x-y]"),
    ),
    "in parallel": (
        "bringing up nodes...\n....\n812 passed, 20 skipped, 300 deselected in 145.21s (0:02:25)\n",
        0,
        ("ok", "812 passed, 20 skipped, 300 deselected"),
    ),
    "not quiet": ("== 812 passed, 1 warning in 145.21s ==\n", 0, ("ok", "812 passed, 1 warning")),
    "not collected": (
        "ERROR tests/test_a.py\n!!! Interrupted: 1 error during collection !!!\n1 error in 0.21s\n",
        2,
        ("failed", "1 error: tests/test_a.py"),
    ),
    "only skipped": ("3 skipped, 4 deselected in 0.03s\n", 0, ("failed", "3 skipped, 4 deselected")),
    "none": ("no tests ran in 0.01s\n", 5, ("failed", "exit status 5: no tests ran in 0.01s")),
    "stopped": ("!!!! KeyboardInterrupt !!!!\n12 passed in 3.00s\n", -1, ("failed", "12 passed")),
    "silent": ("", 4, ("failed", "exit status 4: it said nothing")),
}


@pytest.mark.parametrize("output, status, outcome", PYTEST.values(), ids=PYTEST)
def test_what_pytest_said(output, status, outcome):
    assert gpu_check.read_pytest(output, status) == outcome


TOUCHED = json.dumps({"result": "ok", "covered": "triton: _norm_kernel"})
UNTOUCHED = json.dumps({"result": "failed", "covered": "not launched: _sum_kernel of triton"})
INVALID = """\
Invalid __global__ write of size 2 bytes
=========     at swinops::CopyKernel(const void *)+0x1d0 in cyclic_shift.cu:61
=========     by thread (5,0,0) in block (3,0,0)
=========     Address 0x7f2b is out of bounds"""
HAZARD = "Error: Race reported between Read access at _dq_kernel+0x9 and Write access at _dq_kernel+0xa [8 hazards]"
TERMINATED = "Error: Target application terminated before first instrumented API call"
SANITIZER = {  # what it reports, what the check says, the summary, and what that is
    "memcheck": (None, TOUCHED, "ERROR SUMMARY: 0 errors", ("ok", "ERROR SUMMARY: 0 errors")),
    "racecheck": (
        None,
        TOUCHED,
        "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
        ("ok", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"),
    ),
    "invalid": (
        INVALID,
        TOUCHED,
        "ERROR SUMMARY: 2 errors",
        (
            "failed",
            "ERROR SUMMARY: 2 errors: Invalid __global__ write of size 2 bytes "
            "at swinops::CopyKernel(const void *)+0x1d0 in cyclic_shift.cu:61",
        ),
    ),
    "hazard": (
        HAZARD,
        TOUCHED,
        "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
        ("failed", f"RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings): {HAZARD}"),
    ),
    # nothing was wrong with what did not run
    "untouched": (None, UNTOUCHED, "ERROR SUMMARY: 0 errors", ("failed", "not launched: _sum_kernel of triton")),
    "killed": (
        None,
        "Killed",
        "ERROR SUMMARY: 0 errors",
        ("failed", "exit status 9: ========= ERROR SUMMARY: 0 errors"),
    ),
    "not started": (TERMINATED, "", None, ("failed", f"exit status 9: ========= {TERMINATED}")),
}


@pytest.mark.parametrize("report, check, summary, outcome", SANITIZER.values(), ids=SANITIZER)
def test_what_compute_sanitizer_said(report, check, summary, outcome):
    lines = ["========= COMPUTE-SANITIZER", report and f"========= {report}", check, summary and f"========= {summary}"]
    output = "".join(f"{line}\n" for line in lines if line)
    assert gpu_check.read_sanitizer(output, 9) == outcome


def test_what_verify_said(capsys):
    """Of its own output; and of rows as they could be on a GPU."""
    arguments = "--op relative_position_bias --backend reference --dtype float16 --jobs 1 --json"
    assert main(["verify", *arguments.split()]) == 0
    report = json.loads(capsys.readouterr().out)
    assert gpu_check.read_verify(f"a warning\n{json.dumps(report, indent=2)}\nanother", 0) == (
        "failed",
        "no kernel can run",
    )
    (row,) = report["rows"]
    report["rows"] = [{**row, "backend": "cuda"}, {**row, "backend": "triton", "cannot_run": "no"}, row]
    calls = f"{row['shapes']} calls on cuda within the bounds, and each a second time with the same bits"
    assert gpu_check.read_verify(json.dumps(report, indent=2), 0) == ("ok", calls)
    report["rows"][0] |= {"ok": False, "problems": ["7x7: out is off by 1, allowed 0", "another"]}
    wrong = "relative_position_bias on cuda, float16, 7x7: out is off by 1, allowed 0"
    assert gpu_check.read_verify(json.dumps(report, indent=2), 1) == ("failed", wrong)
    assert gpu_check.read_verify("Traceback\nRuntimeError: no\n", 1) == ("failed", "exit status 1: RuntimeError: no")


def test_where_compute_sanitizer_is_found(monkeypatch, tmp_path):
    def program(folder, name):
        path = tmp_path / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o755)
        return path

    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "links"))
    with pytest.raises(Skipped, match="no compute-sanitizer in CUDA_HOME, in PATH or beside nvcc"):
        gpu_check.sanitizer_command("memcheck")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/nvcc").symlink_to(program("toolkit/bin", "nvcc"))
    beside = program("toolkit/bin", "compute-sanitizer")
    command = gpu_check.sanitizer_command("racecheck")
    assert command[:3] == [str(beside), "--tool", "racecheck"] and "--report-api-errors" not in command
    assert command[-3:] == ["-m", "swinops.benchmarks.gpu_checks", "touch"]
    home = program("home/bin", "compute-sanitizer")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert gpu_check.sanitizer_command("memcheck")[0] == str(home)


def test_tests_that_use_the_gpu(monkeypatch, tmp_path):
    """The plugin, in pytest's own processes: fixtures and the mark decide; a run that is stopped has counts."""
    pytest.importorskip("xdist")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu: ", "xdist_group: "]\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_some.py").write_text("""
import time
import pytest
@pytest.fixture
def device(): pass
def test_plain(): pass
def test_on_device(device): pass
@pytest.mark.gpu
def test_marked(): pass
def test_beyond_31_bits(device): pass
""")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "workers", lambda: 2)

    def outcome(seconds=100, **arguments):
        step = Step(1, lambda: gpu_check.tests_command(**arguments), gpu_check.read_pytest)
        return gpu_check.execute("tests", step, seconds)

    assert outcome(large=True)[1::2] == ("ok", "1 passed, 3 deselected")
    row = outcome(large=False)
    assert row.result == "ok" and row.covered.startswith("2 passed"), row.output
    with (tmp_path / "tests/test_some.py").open("a") as file:
        file.write("def test_slow(device): time.sleep(300)\n")
    monkeypatch.setattr(gpu_check, "GRACE", 100)  # a busy machine's
    row = outcome(large=False, seconds=30)
    assert row.result == "failed" and row.covered.startswith("stopped after 30 s, see --minutes: 2 passed"), row.output
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path / "tests")
    assert outcome(large=False)[1:] == ("skipped", 0.0, "the tests are not installed: run it from a checkout", "")


def test_workers(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    for free, count in ((2, 1), (10, 3), (100, 6)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free * 2**30, 0))
        monkeypatch.setattr(os, "sysconf", lambda name: 2**20)
        assert gpu_check.workers() == count


# The checks


@needs_triton
def test_touch_launches_every_triton_kernel_on_the_tensors_device(small, monkeypatch):
    """In the interpreter, where kernels are the same and a device is a context; a window of 81 tokens takes tiles."""
    if torch.cuda.is_available():
        pytest.skip("compiled kernels are touched by swinops gpu-check")
    entered, guarded = [], []

    @contextlib.contextmanager
    def on_device(x):
        entered.append(x)
        yield
        entered.pop()

    modules = {sys.modules[kernel.fn.__module__] for kernel in gpu_checks.triton_kernels().values()}
    for module in modules:
        monkeypatch.setattr(module, "on_device", on_device)
    kind = type(next(iter(gpu_checks.triton_kernels().values())))
    run = kind.run

    def guarded_run(kernel, *arguments, **named):
        guarded.append((kernel.fn.__name__, len(entered)))
        return run(kernel, *arguments, **named)

    monkeypatch.setattr(kind, "run", guarded_run)
    tiled = [verify.Attention((9, 9), (9, 9), (0, 0), 1, 8)]
    monkeypatch.setitem(verify.OPS, "window_attention", (tiled, verify.OPS["window_attention"][1]))
    launched = gpu_checks.touch_ops([op for op in OPS if not op.endswith("_qkvpacked")], CPU)
    assert launched["triton"].keys() == gpu_checks.kernels("triton")
    assert not launched["cuda"] and kind.run is guarded_run
    assert launched["triton"].total() == len(guarded)
    assert {depth for _, depth in guarded} == {1}


def test_touch_counts_cuda_launchers(monkeypatch):
    extension = SimpleNamespace(archs="90", fill=lambda: "filled", _private=len)
    monkeypatch.setattr(cuda, "extension", lambda: (extension, None))
    before = cuda.extension
    with gpu_checks.recording() as launched:
        assert cuda.extension()[0].archs == "90" and cuda.extension()[0].fill() == "filled"
    assert launched["cuda"] == {"fill": 1} and cuda.extension is before
    assert gpu_checks.kernels("cuda") == {"fill"}
    monkeypatch.setattr(cuda, "extension", lambda: (None, "it was not built"))
    with gpu_checks.recording():
        assert cuda.extension() == (None, "it was not built")


def test_touch_fails_where_a_kernel_was_not_launched(plain, monkeypatch):
    launched = {"reference": {"one": 1}}
    monkeypatch.setattr(gpu_checks, "touch_ops", lambda ops, device: launched)
    monkeypatch.setattr(gpu_checks, "kernels", lambda backend: {"one", "two"})
    with pytest.raises(AssertionError, match="not launched: two of reference"):
        gpu_checks.touch(CPU)
    launched["reference"]["two"] = 1
    assert gpu_checks.touch(CPU) == "reference: one, two"
    monkeypatch.setattr(gpu_checks, "KERNELS", ())
    with pytest.raises(AssertionError, match="not launched: anything"):
        gpu_checks.touch(CPU)


@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("position_bias")])  # which have no images
def test_a_repeated_image(op, plain):
    each = gpu_checks.subject(op, "reference", OPS[op][0], torch.float32, CPU)
    assert list(gpu_checks.repeated(each, 5)) == []

    def spoilt(**tensors):
        """Wrong in the last image of a batch of five."""
        outputs = each.run(**tensors)
        out = outputs[0] if isinstance(outputs, tuple) else outputs
        scale = torch.ones(out.shape)
        scale[-1] = 1 if len(out) < 5 else 1.5
        return (out * scale, *outputs[1:]) if isinstance(outputs, tuple) else out * scale

    wrong = list(gpu_checks.repeated(each._replace(run=spoilt), 5))
    assert wrong and all("of 5 images is not that of each" in text for text in wrong)
    inexact = list(gpu_checks.repeated(each._replace(run=lambda **tensors: negated(each.run(**tensors))), 5))
    assert any("is off by" in text for text in inexact)


def negated(outputs):
    return tuple(-x for x in outputs) if isinstance(outputs, tuple) else -outputs


def test_windows(plain, monkeypatch):
    monkeypatch.setattr(gpu_checks, "WINDOWS", 3)
    monkeypatch.setattr(gpu_checks, "SMALL", {op: OPS[op] for op in ("window_attention", "window_merge")})
    assert gpu_checks.windows(CPU) == "3 windows: window_attention, window_merge, forward and backward"


def test_elements_needs_memory(plain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (14 * 2**30, 0))
    with pytest.raises(Skipped, match="needs 40 GiB of free memory, and 14 are"):
        gpu_checks.elements(CPU)
    counts = []
    monkeypatch.setattr(gpu_checks, "repeated", lambda each, count: counts.append(count) or ["a", "b", "c", "d"])
    monkeypatch.setattr(gpu_checks, "LARGE", {"window_merge": OPS["window_merge"]})
    with pytest.raises(AssertionError, match=r"4 wrong: a; b; c$"):
        gpu_checks.elements(CPU, memory=0)
    assert counts == [2**31 // (2 * 4 * 3) + 1]


def test_second_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Skipped, match="there is one GPU"):
        gpu_checks.second(CPU)


def test_stream(plain, monkeypatch):
    assert "side stream" in gpu_checks.stream(CPU)

    class Late:
        """What runs on the stream does not see the inputs."""

        def __enter__(self):
            self.patch = pytest.MonkeyPatch()
            self.patch.setattr(torch.Tensor, "copy_", lambda x, other: x)

        def __exit__(self, *error):
            self.patch.undo()

    each = gpu_checks.subject("window_merge", "reference", OPS["window_merge"][0], torch.float32, CPU)
    monkeypatch.setattr(gpu_checks, "subjects", lambda device: [each])
    monkeypatch.setattr(torch.cuda, "stream", lambda side: Late())
    with pytest.raises(AssertionError, match="is off by nan"):
        gpu_checks.stream(CPU)


def test_graph(plain, monkeypatch):
    """A graph whose replay does nothing leaves the results of the first inputs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda captured: contextlib.nullcontext())
    with pytest.raises(AssertionError, match=r"wrong: window_attention on reference, .*: out is off by"):
        gpu_checks.graph(CPU)
    monkeypatch.setattr(gpu_checks, "shuffled", lambda x, places: x)
    assert "replayed" in gpu_checks.graph(CPU)


def test_outcome_of_a_check(monkeypatch):
    def fail(error):
        def check(device):
            raise error

        monkeypatch.setitem(gpu_checks.CHECKS, "touch", check)
        return gpu_checks.outcome("touch")

    assert fail(Skipped("why")) == ("skipped", "why")
    assert fail(AssertionError("2 wrong: a; b")) == ("failed", "2 wrong: a; b")
    assert fail(RuntimeError("CUDA error: x\nmore")) == ("failed", "RuntimeError: CUDA error: x")


@pytest.mark.gpu
def test_a_check_in_its_own_process():
    row = gpu_check.execute("stream", gpu_check.STEPS["stream"], 60)
    assert row.result == "ok", row
