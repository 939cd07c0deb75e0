"""Implementations side by side: each is checked against float64, and those that pass are timed in turns.

A round runs every implementation once, in random order, so that what slows the machine down slows all of them; ratios
are taken within a round. Reported are medians, with the 20th and 80th percentiles.
"""

import csv
import functools
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from swinops import backends
from swinops.testing import Expected, differentiate, expect
from swinops.text import aligned, first_line

if TYPE_CHECKING:
    from tqdm import tqdm

BASELINE = "pytorch"
OUT_OF_MEMORY = "out of memory"
FORWARD, BOTH = "forward", "forward+backward"
DRAWS = 6  # of which plain PyTorch's largest error counts: of one it is chance
Tensors = dict[str, Tensor | None]
Results = dict[str, Tensor]


class Spread(NamedTuple):
    """Median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Spread(statistics.median(values), fifths[0], fifths[3])


def paired_ratio(baseline: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times faster than the baseline, taken within each round."""
    return spread([a / b for a, b in zip(baseline, other, strict=True)])


class CPUClock:
    """Wall time. A timing repeats its call until it is long enough for the clock."""

    shortest = 0.003  # seconds

    def run(self, f: Callable[[], Any], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            f()
        return (time.perf_counter() - start) / calls

    def read(self, mark: float) -> float:
        return mark

    def peak(self, f: Callable[[], Any]) -> float | None:
        """Not measured: the peak of a process is that of everything it ever ran."""
        return None

    def recover(self) -> None:
        pass


class CUDAClock:
    """Events around one call, after a write that is larger than the L2 cache: the call finds it cold, and its launch
    overlaps with that write."""

    shortest = 0.0  # one call each

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(256 << 20, 2 * cache), dtype=torch.uint8, device=device)

    def run(self, f: Callable[[], Any], calls: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        f()
        end.record()
        return start, end

    def read(self, mark: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        mark[1].synchronize()
        return mark[0].elapsed_time(mark[1]) / 1e3

    def peak(self, f: Callable[[], Any]) -> float:
        """Megabytes that a call takes beyond what was allocated before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def recover(self) -> None:
        gc.collect()  # modules and their graphs refer to each other
        torch.cuda.empty_cache()


Clock = CPUClock | CUDAClock


@dataclass
class Settings:
    """What one run of the benchmarks shares."""

    device: torch.device
    dtype: torch.dtype
    clock: Clock
    bar: "tqdm"
    quick: bool = False
    full: bool = False
    tf32: bool = False  # in the matrix products of float32
    compiler: str = "inductor"  # or another backend of torch.compile, which takes no mode
    compile_mode: str = "default"
    seconds: float = 2.0  # of timing for one comparison
    say: Callable[[str], None] = print
    bandwidth: float = field(default=0.0)  # of a copy, bytes per second

    @property
    def rounds(self) -> tuple[int, int]:
        """At least, at most."""
        return (3, 3) if self.quick else (7, 100)

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 else dtype_name(self.dtype)

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        mode = self.compile_mode if self.compiler == "inductor" else None
        return torch.compile(f, dynamic=False, backend=self.compiler, mode=mode)

    @property
    def compiled(self) -> str:
        """For the record."""
        return self.compile_mode if self.compiler == "inductor" else f"{self.compiler} backend"


def make_clock(device: torch.device) -> Clock:
    return CUDAClock(device) if device.type == "cuda" else CPUClock()


class Contender(NamedTuple):
    """One implementation. ``build`` returns what is timed, and a function that returns the tensors to check."""

    name: str
    build: Callable[[], tuple[Callable[[], Any], Callable[[], Results]]]
    compile: str = ""


@dataclass
class Outcome:
    """``status`` is "ok", "wrong", or the reason why there is no result. Times are seconds of a call."""

    status: str
    compile: str = ""
    error: float | None = None
    allowed: float | None = None
    peak: float | None = None
    time: Spread | None = None
    ratio: Spread | None = None


def out_of_memory(error: BaseException) -> bool:
    """A CPU has no exception of its own for that, only words."""
    words = ("DefaultCPUAllocator", "not enough memory")
    said = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    return said or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def reason(error: BaseException) -> str:
    """A cell of a table."""
    if out_of_memory(error):
        return OUT_OF_MEMORY
    text = first_line(error)
    return text if len(text) <= 160 else text[:157] + "..."


def compare(
    contenders: Sequence[Contender],
    expected: Mapping[str, Expected],
    settings: Settings,
    title: str,
    baseline: str = BASELINE,
    weight: float = 1.0,
    needs_all: bool = False,
) -> dict[str, Outcome]:
    """Check every contender, then time those that are right.

    Args:
        expected: Of each tensor to check.
        weight: What the comparison counts in the progress bar.
        needs_all: A contender that is out of memory when it is checked ends the comparison, its outcome the last.
    """
    step = weight / (len(contenders) + 1)
    torch.compiler.reset()  # or the graphs of earlier shapes count against the limit of a function
    outcomes: dict[str, Outcome] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for contender in contenders:
        settings.bar.set_description(f"{title}: {contender.name}"[:70])
        # whatever a peer or a compiler raises is a result to report, and no reason to lose the others
        try:
            run, results = contender.build()
            worst = check(results(), expected)
            outcome = Outcome("ok" if worst.ok else "wrong", contender.compile, *worst)
            if worst.ok:
                run()
                outcome.peak = settings.clock.peak(run)
                runs[contender.name] = run
        except Exception as error:
            outcome = Outcome(reason(error), contender.compile)
            settings.clock.recover()
        outcomes[contender.name] = outcome
        settings.bar.update(step)
        if needs_all and outcome.status == OUT_OF_MEMORY:
            return outcomes
    settings.bar.set_description(f"{title}: timing"[:70])
    times = race(runs, outcomes, settings)
    for name in times:
        outcomes[name].time = spread(times[name])
        if baseline in times:
            outcomes[name].ratio = paired_ratio(times[baseline], times[name])
    settings.bar.update(step)
    return outcomes


def check(results: Results, expected: Mapping[str, Expected]) -> Any:
    """The accuracy of the worst tensor, by how much of its bound it uses."""
    found = [wanted.accuracy(results[name].detach()) for name, wanted in expected.items()]
    return max(found, key=lambda a: (not a.ok, a.error / a.bound if a.bound else 0.0))


def race(
    runs: dict[str, Callable[[], Any]], outcomes: dict[str, Outcome], settings: Settings
) -> dict[str, list[float]]:
    """Seconds of a call in each round, for each implementation that finished."""
    clock, order = settings.clock, random.Random(0)
    estimates, calls = {}, {}

    def drop(name: str, error: Exception) -> None:
        outcomes[name] = Outcome(reason(error), outcomes[name].compile)
        clock.recover()

    for name, run in runs.items():
        try:
            run()
            estimates[name] = clock.read(clock.run(run, 1))
        except Exception as error:
            drop(name, error)
            continue
        calls[name] = max(1, round(clock.shortest / max(estimates[name], 1e-7)))
    total = sum(estimates[name] * calls[name] for name in calls)
    least, most = settings.rounds
    rounds = min(most, max(least, int(settings.seconds / max(total, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        marks = {}
        for name in order.sample(list(times), len(times)):
            try:
                marks[name] = clock.run(runs[name], calls[name])
            except Exception as error:
                drop(name, error)
                del times[name]
        for name, mark in marks.items():
            if name in times:
                times[name].append(clock.read(mark))
    return times


@dataclass
class Implementation:
    """A function of a case's tensors, by name.

    Where it wants them in another layout, ``pack`` makes that outside of the timing, and ``unpack`` turns its gradients
    back before they are checked.
    """

    run: Callable[..., Tensor]
    pack: Callable[[Tensors], Tensors] = dict
    unpack: Callable[[Results], Results] = dict
    compile: str = ""

    def contender(self, name: str, case: "Case", direction: str) -> Contender:
        def forward() -> tuple[Callable[[], Any], Callable[[], Results]]:
            tensors = {key: None if x is None else x.detach() for key, x in self.pack(case.tensors).items()}

            @torch.no_grad()
            def run() -> Tensor:
                return self.run(**tensors)

            return run, lambda: {"out": run().clone()}

        def both() -> tuple[Callable[[], Any], Callable[[], Results]]:
            run = functools.partial(differentiate, self.run, self.pack(case.tensors), case.dout)
            return run, lambda: self.unpack({key: x.clone() for key, x in run().items()})

        return Contender(name, forward if direction == FORWARD else both, self.compile)


@dataclass
class Case:
    """One op on one shape; ``definition`` is it in plain PyTorch."""

    op: str
    shape: str
    tensors: Tensors
    dout: Tensor
    definition: Callable[..., Tensor]
    implementations: dict[str, Implementation]
    bytes: dict[str, int]  # that have to move, by direction

    def expected(self, direction: str) -> dict[str, Expected]:
        found = expect(self.definition, self.tensors, self.dout, DRAWS)
        return {"out": found["out"]} if direction == FORWARD else found


def implementations(
    op: str,
    x: Tensor,
    definition: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    settings: Settings,
    **layout: Any,
) -> dict[str, Implementation]:
    """Plain PyTorch, eager and compiled, and this package's op on every backend that can be timed on ``x``."""
    found = {
        BASELINE: Implementation(definition),
        f"{BASELINE}-compiled": Implementation(settings.compile(definition), compile=settings.compiled),
    }
    for name in backends.MODULES:
        if why_not_timed(name, x, op) is None:
            found[f"swinops-{name}"] = Implementation(functools.partial(ours, backend=name), **layout)
    return found


def why_not_timed(backend: str, x: Tensor, op: str) -> str | None:
    if backend == "triton" and x.device.type == "cpu":
        return "Triton runs on a CPU only in its interpreter, which says nothing about speed"
    return backends.why_not(backend, x, op)


def measure(cases: Iterable[Case], settings: Settings) -> list[dict[str, Any]]:
    """A row for each case, direction and implementation, printed as they come."""
    rows = []
    for case in cases:
        for direction in (FORWARD, BOTH):
            title = f"{case.op} {direction}"
            contenders = [each.contender(name, case, direction) for name, each in case.implementations.items()]
            outcomes = compare(contenders, case.expected(direction), settings, title)
            new = [op_row(case, direction, name, outcome, settings) for name, outcome in outcomes.items()]
            settings.say(f"\n{case.op}, {case.shape}, {direction}, {settings.precision}")
            settings.say(table([op_cells(row) for row in new]))
            rows += new
    return rows


def op_row(case: Case, direction: str, name: str, outcome: Outcome, settings: Settings) -> dict[str, Any]:
    time, ratio = outcome.time, outcome.ratio
    moved = case.bytes[direction]
    return {
        "op": case.op,
        "shape": case.shape,
        "direction": direction,
        "impl": name,
        "status": outcome.status,
        "median_ms": time and number(time.median * 1e3),
        "p20_ms": time and number(time.p20 * 1e3),
        "p80_ms": time and number(time.p80 * 1e3),
        "ratio": ratio and number(ratio.median),
        "ratio_p20": ratio and number(ratio.p20),
        "ratio_p80": ratio and number(ratio.p80),
        "baseline": BASELINE,
        "bytes": moved,
        "floor_percent": time and settings.bandwidth and number(100 * moved / settings.bandwidth / time.median),
        "peak_mem_mb": number(outcome.peak),
        "error": number(outcome.error),
        "allowed": number(outcome.allowed),
        "dtype": settings.precision,
        "compile": outcome.compile,
        **machine(settings.device),
    }


def op_cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "": row["impl"],
        "ms": shown(row["median_ms"], "{:.3g}", row["status"]),
        "20-80%": f"{row['p20_ms']:.3g}-{row['p80_ms']:.3g}" if row["median_ms"] else "",
        f"times {BASELINE}": with_range(row, "ratio"),
        "% of copy": shown(row["floor_percent"], "{:.0f}"),
        "peak MB": shown(row["peak_mem_mb"], "{:.0f}"),
    }


def shown(value: Any, form: str, otherwise: str = "") -> str:
    return otherwise if value is None or value == "" else form.format(value)


def with_range(row: Mapping[str, Any], key: str) -> str:
    if row[key] is None or row[key] == "":
        return ""
    return f"{row[key]:.2f} ({row[f'{key}_p20']:.2f}-{row[f'{key}_p80']:.2f})"


def number(x: float | None) -> float | None:
    """Four digits: what a timing is worth at most. None for what JSON cannot hold: the error of a NaN."""
    return None if x is None or not math.isfinite(x) else float(f"{x:.4g}")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Aligned columns; those that are empty throughout are left out."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = aligned([names, *([row[name] for name in names] for row in rows)])
    return "\n".join(f"  {line}" for line in lines)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def copy_bandwidth(settings: Settings) -> float:
    """Bytes per second of a copy, read and write counted, of a tensor far larger than the caches."""
    size = (1 << 30) if settings.device.type == "cuda" else (1 << 24) if settings.quick else (1 << 28)
    source = torch.empty(size // 4, device=settings.device).normal_()
    target = torch.empty_like(source)
    clock, copy = settings.clock, functools.partial(target.copy_, source)
    copy()
    return 2 * size / statistics.median(clock.read(clock.run(copy, 1)) for _ in range(9))


@functools.cache
def machine(device: torch.device) -> dict[str, str]:
    """The columns that every row has."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}"


def installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """Of the checkout that this file is in, with "-dirty" where it was edited; the version of an installed package."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    if (here.parent / ".git").exists():
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"the commit is not recorded: {error}", file=sys.stderr)
    return installed("swinops")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name to write under; what is written takes the name ``path`` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise now the OSError that writing ``path`` would end in."""
    if path.is_dir():
        raise IsADirectoryError("it is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch()
    temporary.unlink()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with whole(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=2) + "\n")
