"""``swinops gpu-check``: what only a GPU can say of the kernels, in ten minutes and without a network.

Every step is a process of its own with its share of the time: a kernel that hangs, or leaves CUDA unusable, ends no
other step. A table follows, and gpu-check.md for benchmarks/VALIDATION.md. The exit status is 1 where a step failed and
2 where there is no GPU.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import swinops
from swinops.backends import cuda
from swinops.backends.choice import KERNELS
from swinops.benchmarks import harness
from swinops.benchmarks.gpu_checks import GIB, Outcome, Skipped
from swinops.text import aligned

EXAMPLES = """\
examples:
  swinops gpu-check
  swinops gpu-check --minutes 30 --only tests racecheck"""
ROOT = Path(__file__).parents[1]
GRACE = 10  # seconds in which a step that was stopped says how far it came


class Step(NamedTuple):
    seconds: int  # of ten minutes; what it leaves is for those after it
    command: Callable[[], list[str]]  # raises Skipped
    read: Callable[[str, int], Outcome]  # of the output and the exit status; of a step that was stopped too
    environment: Mapping[str, str] = {}


def last_line(output: str) -> str:
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it said nothing")


def read_check(output: str, status: int) -> Outcome:
    for line in reversed(output.splitlines()):
        if line.startswith('{"result": '):
            return Outcome(**json.loads(line))
    return Outcome("failed", f"exit status {status}: {last_line(output)}")


def check_command(name: str) -> list[str]:
    return [sys.executable, "-m", "swinops.benchmarks.gpu_checks", name]


def verify_command() -> list[str]:
    return [sys.executable, "-m", "swinops", "verify", "--json", "--jobs", str(workers())]


def read_verify(output: str, status: int) -> Outcome:
    start = re.search(r"^\{$", output, re.MULTILINE)
    try:
        found, _ = json.JSONDecoder().raw_decode(output[start.start() if start else len(output) :])
    except ValueError:
        return Outcome("failed", f"exit status {status}: {last_line(output)}")
    checked = [row for row in found["rows"] if row["cannot_run"] is None and row["backend"] in KERNELS]
    problems = [
        f"{row['op']} on {row['backend']}, {row['dtype']}, {row['problems'][0]}" for row in checked if not row["ok"]
    ]
    shapes = sum(row["shapes"] for row in checked)
    if problems or not checked or status:
        return Outcome("failed", "; ".join(problems[:3]) or "no kernel can run")
    names = ", ".join(sorted({row["backend"] for row in checked}))
    return Outcome("ok", f"{shapes} calls on {names} within the bounds, and each a second time with the same bits")


def workers() -> int:
    """Processes that the machine has room for: a core each, and 3 GiB of its memory and of the GPU's."""
    memory = min(torch.cuda.mem_get_info()[0], os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(1, min(os.cpu_count() or 1, memory // (3 * GIB), 8))


def tests_command(large: bool) -> list[str]:
    """The tests that run on the GPU; those that fill its memory one at a time."""
    if not (ROOT / "tests").is_dir():
        raise Skipped("the tests are not installed: run it from a checkout")
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(ROOT / "pyproject.toml"),
        str(ROOT / "tests"),
        "-q",
        "--tb=short",
    ]
    words += ["-p", "swinops.benchmarks.gpu_check"]
    if large:
        return [*words, "-k", "31_bits or 65535"]
    parallel = ["-n", str(workers()), "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
    return [*words, *parallel, "-k", "not 31_bits and not 65535"]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """As a plugin of pytest, this file keeps the tests that use the GPU where there is one."""
    kept = [item for item in items if item.get_closest_marker("gpu") or {"device", "backend"} & {*item.fixturenames}]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def read_pytest(output: str, status: int) -> Outcome:
    summaries = re.findall(r"^=* ?((?:\d+ \w+(?:, )?)+) in [\d.]+s", output, re.MULTILINE)
    if not summaries:
        return Outcome("failed", f"exit status {status}: {last_line(output)}")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    if status or "passed" not in summaries[-1]:
        return Outcome("failed", ": ".join([summaries[-1], *[", ".join(failed[:3])] * bool(failed)]))
    return Outcome("ok", summaries[-1])


def find_sanitizer() -> str:
    folders = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders.append(os.environ.get("PATH", os.defpath))
    if nvcc := shutil.which("nvcc"):
        folders.append(os.path.dirname(os.path.realpath(nvcc)))
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    if found is None:
        raise Skipped("no compute-sanitizer in CUDA_HOME, in PATH or beside nvcc")
    return found


def sanitizer_command(tool: str) -> list[str]:
    # PyTorch asks CUDA what may fail
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [find_sanitizer(), "--tool", tool, *options, "--print-limit", "10", *check_command("touch")]


def read_sanitizer(output: str, status: int) -> Outcome:
    summary = re.search(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) .*$", output, re.MULTILINE)
    outcome = read_check(output, status)
    if summary is None:
        return Outcome("failed", f"exit status {status}: {last_line(output)}")
    if int(summary[1]):
        findings = re.findall(r"^=+ (?!COMPUTE-SANITIZER)(\S.*)\n(?:=+ +(at .*))?", output, re.MULTILINE)
        return Outcome("failed", f"{summary[0].strip('= ')}: {' '.join(findings[0]).strip()}")
    return outcome if outcome.result != "ok" else Outcome("ok", summary[0].strip("= "))


def check_step(name: str, seconds: int) -> Step:
    return Step(seconds, functools.partial(check_command, name), read_check)


# each tensor an allocation of its own, or what lies past its end is another's
ALONE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
STEPS = {
    "verify": Step(100, verify_command, read_verify),
    "touch": check_step("touch", 40),
    "second": check_step("second", 20),
    "windows": check_step("windows", 20),
    "elements": check_step("elements", 30),
    "stream": check_step("stream", 20),
    "graph": check_step("graph", 20),
    **{tool: Step(40, functools.partial(sanitizer_command, tool), read_sanitizer, ALONE) for tool in TOOLS},
    "tests": Step(150, functools.partial(tests_command, large=False), read_pytest),
    "large-tests": Step(40, functools.partial(tests_command, large=True), read_pytest),
}


class Row(NamedTuple):
    step: str
    result: str
    seconds: float
    covered: str
    output: str = ""

    def cells(self) -> tuple[str, ...]:
        return self.step, self.result, f"{self.seconds:.0f}", self.covered


def execute(name: str, step: Step, most: float) -> Row:
    """Run a step for ``most`` seconds at most."""
    start = time.monotonic()
    try:
        command = step.command()
    except Skipped as reason:
        return Row(name, "skipped", 0.0, str(reason))
    output, status = finish(command, most, step.environment)
    outcome = step.read(output, -1 if status is None else status)
    if status is None:
        outcome = Outcome("failed", f"stopped after {most:.0f} s, see --minutes: {outcome.covered}")
    return Row(name, outcome.result, time.monotonic() - start, outcome.covered, output)


def finish(command: Sequence[str], seconds: float, environment: Mapping[str, str] = {}) -> tuple[str, int | None]:
    """Output and exit status of a command; None for one that had to be stopped."""
    # a step and what it starts are one group, to be stopped together
    process = subprocess.Popen(
        command,
        env={**{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=seconds)[0], process.returncode
        os.killpg(process.pid, signal.SIGINT)  # pytest then says how far it came
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=GRACE)[0], None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0], None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=positive, default=10.0, metavar="N", help="that it may take at most (10)")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--output", type=Path, default=Path("gpu-check.md"), metavar="PATH", help="gpu-check.md")
    parser.set_defaults(run=functools.partial(run, parser))


def positive(text: str) -> float:
    number = float(text) if re.fullmatch(r"[\d.]+", text) else 0.0
    if not number:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print(f"swinops gpu-check needs a CUDA GPU, and torch {torch.__version__} sees none here", file=sys.stderr)
        return 2
    try:
        harness.check_writable(arguments.output)
    except OSError as error:
        parser.error(f"--output {arguments.output} cannot be written: {error}")
    facts = environment()
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), flush=True)
    rows, names = [], arguments.only or list(STEPS)
    unit = 60 * arguments.minutes / sum(STEPS[name].seconds for name in names)
    end = time.monotonic()
    for name in names:
        end += unit * STEPS[name].seconds
        most = max(0.0, end - time.monotonic())
        print(f"{name}, at most {most:.0f} s ...", flush=True)
        rows.append(execute(name, STEPS[name], most))
        print(f"    {rows[-1].result}: {rows[-1].covered}", flush=True)
    print("\n" + "\n".join(aligned([("step", "result", "seconds", "covered"), *(row.cells() for row in rows)])))
    with harness.whole(arguments.output) as temporary:
        temporary.write_text(markdown(facts, rows))
    print(f"\n{arguments.output} is for benchmarks/VALIDATION.md")
    return int(any(row.result == "failed" for row in rows))


def environment() -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability(0)
    extension, missing = cuda.extension()
    found = harness.machine(torch.device("cuda", 0))
    return {
        "GPU": f"{torch.cuda.device_count()} x {found['device']}, compute capability {major}.{minor}",
        "driver": f"{driver()}, CUDA {torch.version.cuda}",
        "versions": f"torch {found['torch']}, triton {found['triton'] or 'none'}, Python {sys.version.split()[0]}",
        "extension": missing or f"CUDA {extension.cuda_version}, architectures {extension.archs}",
        "commit": f"{found['commit']} (swinops {swinops.__version__})",
    }


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def markdown(facts: Mapping[str, str], rows: Sequence[Row]) -> str:
    """A section of benchmarks/VALIDATION.md, with the end of what failing steps said."""
    lines = [f"## {facts['GPU']}, {facts['commit']}", ""]
    lines += [f"{name}: {value}  " for name, value in facts.items()]
    lines += ["", "| step | result | seconds | covered |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells()) + " |" for row in rows]
    for row in rows:
        if row.result == "failed":
            lines += ["", f"{row.step}:", "", *(f"    {line}" for line in row.output.splitlines()[-40:])]
    return "\n".join(lines) + "\n"
