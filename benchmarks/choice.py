"""Writes swinops/backends/choice.csv, the times by which ``backend="auto"`` takes CUDA's kernel or Triton's.

    python -m swinops.benchmarks.choice                                             # static rows anew; needs no GPU
    python -m swinops.benchmarks.choice --measured results/<device>/ops.csv --arch 90   # what make bench measured there

Static rows leave measured ones alone, and measured rows those of other devices' architectures and other sizes.
"""

import argparse
import csv
import itertools
import multiprocessing
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from swinops.backends import choice, cuda
from swinops.backends.choice import KERNELS, Row
from swinops.benchmarks import harness, nvcc, static
from swinops.text import first_line

WINDOWS = (7, 8, 12, 16)
HEAD_DIM = 32
DTYPES = ("bfloat16", "float16", "float32")


def cases() -> Iterator[static.Case]:
    """What static.py can compile of the ops that have a CUDA kernel."""
    for op in static.OPS:
        if op.removesuffix("_backward") in cuda.OPS:
            dtypes = DTYPES if op not in static.BIAS else ("float32",)
            for arch, dtype, window in itertools.product(static.DEVICES, dtypes, WINDOWS):
                yield static.Case(arch, op, window, window // 2, HEAD_DIM, dtype)


def time_of(case: static.Case) -> float:
    """Nanoseconds for one item: what the kernels take one after the other, each as long as issue or memory takes.

    Issue time is that of most windows, without the mask. Of adding up the partials of attention's gradients only the
    bytes are counted, for both backends: torch does it for Triton, and its code is not among what is compiled here.
    """
    total = 0.0
    for row in case.measure():
        if row.memory_ns is None or row.issue_ns is None:
            raise ValueError(f"the issue or the memory time of {row.kernel} is not known")
        adds_up = row.kernel == "SumKernel" and case.op in static.ATTENTION
        total += row.memory_ns if adds_up else max(row.memory_ns, row.issue_ns[-1])
        total += row.partials_ns
    return total


def estimate(case: static.Case) -> Row | str:
    """The row of a case; or, for one that cannot be estimated, a sentence."""
    try:
        times = {name: round(time_of(replace(case, backend=name)), 3) for name in KERNELS}
    except Exception as error:
        return f"no row for {case}: {first_line(error)}"
    attention, bias = case.op in static.ATTENTION, case.op in static.BIAS
    return Row(
        op=case.op.removesuffix("_backward"),
        direction="backward" if case.op.endswith("_backward") else "forward",
        arch=case.arch,
        dtype=case.dtype,
        tokens=case.window**2,
        channels=case.head_dim if attention else case.heads if bias else case.heads * case.head_dim,
        **times,
        unit="ns a window and head" if attention else "ns a head" if bias else "ns a window",
        source="static",
        device="",
        commit=harness.commit(),
    )


def measured(path: Path, arch: int) -> Iterator[Row]:
    """The rows in an ops.csv of make bench in which both backends were timed; of several shapes the sum.

    A backward's time is what forward and backward take together, less the forward's.
    """
    shapes: dict[tuple[Any, ...], dict[tuple[str, str], float]] = {}
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            if line["impl"].removeprefix("swinops-") in KERNELS and line["median_ms"] and line["dtype"] in DTYPES:
                key = tuple(line[name] for name in ("op", "dtype", "shape", "device", "commit"))
                found = shapes.setdefault(key, {})
                found[line["impl"].removeprefix("swinops-"), line["direction"]] = float(line["median_ms"]) * 1e3
    sums: dict[tuple[Any, ...], dict[str, float]] = {}
    for (op, dtype, shape, device, commit), times in shapes.items():
        if len(times) < 2 * len(KERNELS):
            continue
        tokens, channels = sizes(shape)
        for name in KERNELS:
            forward, both = times[name, harness.FORWARD], times[name, harness.BOTH]
            # partition and merge are each other's gradients
            backward = {} if op in ("window_partition", "window_merge") else {"backward": both - forward}
            for direction, time in {"forward": forward, **backward}.items():
                total = sums.setdefault((op, direction, arch, dtype, tokens, channels, device, commit), {})
                total[name] = total.get(name, 0.0) + time
    for (*key, device, commit), times in sums.items():
        if min(times.values()) > 0:
            rounded = {name: round(time, 2) for name, time in times.items()}
            yield Row(*key, **rounded, unit="us", source="measured", device=device, commit=commit)


def sizes(shape: str) -> tuple[int, int]:
    """Tokens of a window and length of the last axis, from a benchmark's words for its shape."""
    window = re.search(r"window (\d+)", shape)
    channels = re.search(r"heads of (\d+)|(\d+), window|window \d+, (\d+) heads", shape)
    assert window and channels, f"no window and channels in {shape!r}"
    return int(window[1]) ** 2, int(next(filter(None, channels.groups())))


def merge(old: Iterable[Row], new: Iterable[Row], source: str) -> list[Row]:
    """``new`` replaces the static rows, or the measured ones of the same keys; sorted."""
    fresh = {row[:6]: row for row in new}
    kept = [row for row in old if row.source != source or (source == "measured" and row[:6] not in fresh)]
    return sorted([*kept, *fresh.values()])


def write(rows: Sequence[Row], path: Path) -> None:
    with harness.whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None, path: Path = choice.PATH) -> int:
    parser = argparse.ArgumentParser(description='Write the times by which backend="auto" chooses.')
    parser.add_argument("--measured", type=Path, metavar="CSV", help="an ops.csv of make bench, in place of static.py")
    parser.add_argument("--arch", type=int, help="of the GPU that it was measured on: 90 for compute capability 9.0")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (2)")
    arguments = parser.parse_args(argv)
    if (arguments.measured is None) != (arguments.arch is None):
        parser.error("--measured and --arch go together")
    old = choice.read(path)
    if arguments.measured:
        source, new = "measured", list(measured(arguments.measured, arguments.arch))
    else:
        reason = nvcc.why_not()
        if reason is not None:
            parser.error(reason)
        # spawned: torch's threads do not survive a fork
        with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(estimate, cases()))
        print("".join(f"{each}\n" for each in found if isinstance(each, str)), end="", file=sys.stderr)
        source, new = "static", [each for each in found if isinstance(each, Row)]
    rows = merge(old, new, source)
    write(rows, path)
    print(f"{path}: {len(new)} {source} rows written, {len(rows)} in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
