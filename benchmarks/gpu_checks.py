"""The checks of ``swinops gpu-check``. Each returns what it covered, or raises what is wrong or why it is skipped.

``python -m swinops.benchmarks.gpu_checks touch`` runs one of them on the first GPU.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinops import backends, verify
from swinops.backends import cuda
from swinops.backends.choice import KERNELS
from swinops.testing import as_tuple, differentiate, expect, shuffled
from swinops.text import first_line

HALF = torch.float16
PRECISIONS = ((HALF, False), (torch.bfloat16, False), (torch.float32, False), (torch.float32, True))  # with tf32?
SHAPES = 4  # the last ones of verify's: padded and shifted, in one tile and in several
BATCHED = {"q", "k", "v", "qkv", "x", "f", "windows"}  # the tensors that hold a batch of images
GIB = 2**30
WINDOWS = 65537


class Skipped(Exception):
    """Why a check is left out."""


class Outcome(NamedTuple):
    result: str  # "ok", "failed" or "skipped"
    covered: str  # or what is wrong, or why it was skipped


class Subject(NamedTuple):
    """One call of one op on one backend."""

    name: str
    run: Callable[..., Any]
    check: verify.Check

    def results(self, tensors: Mapping[str, Tensor | None] | None = None) -> dict[str, Tensor]:
        return differentiate(self.run, tensors or self.check.tensors, self.check.dout)

    def wrong(self, results: Mapping[str, Tensor], tensors: Mapping[str, Tensor | None] | None = None) -> Iterator[str]:
        """Where ``results`` break the rule of swinops.testing; what is only moved is right to the bit."""
        draws = 1 if len(self.check.moved) > 1 else 16  # copies are the same whatever is drawn
        expected = expect(self.check.definition, tensors or self.check.tensors, self.check.dout, draws)
        for name, x in results.items():
            accuracy = expected[name].accuracy(x)
            error, bound = accuracy = accuracy._replace(bound=0.0) if name in self.check.moved else accuracy
            if not accuracy.ok:
                yield f"{self.name}: {name} is off by {error:.3g}, allowed {bound:.3g}"


def runnable(
    device: torch.device, dtype: torch.dtype = HALF, ops: Iterable[str] = verify.OPS
) -> Iterator[tuple[str, str]]:
    """Every op with each backend that has a kernel for it here."""
    for op in ops:
        for backend in KERNELS:
            if verify.why_not(op, backend, dtype, str(device)) is None:
                yield op, backend


def subject(op: str, backend: str, shape: Any, dtype: torch.dtype, device: torch.device) -> Subject:
    check = verify.OPS[op][1](shape, dtype, device)
    return Subject(f"{op} on {backend}, {shape}", functools.partial(check.op, backend=backend), check)


def subjects(device: torch.device) -> Iterator[Subject]:
    """Each op on each backend, in one tile and in several where it has tiles."""
    for op, backend in runnable(device):
        for shape in verify.OPS[op][0][-2:]:
            yield subject(op, backend, shape, HALF, device)


def verdict(wrong: Iterable[str], covered: str) -> str:
    problems = list(wrong)
    assert not problems, f"{len(problems)} wrong: {'; '.join(problems[:3])}"
    return covered


def touch(device: torch.device) -> str:
    """Every kernel, forward and backward, in every precision: what compute-sanitizer looks at."""
    launched = touch_ops(verify.OPS, device)
    torch.cuda.synchronize(device)
    here = sorted({backend for _, backend in runnable(device)})
    missed = [
        f"{name} of {backend}" for backend in here for name in sorted(kernels(backend) - launched[backend].keys())
    ]
    assert here and not missed, f"not launched: {', '.join(missed) or 'anything'}"
    return "; ".join(f"{backend}: {', '.join(sorted(launched[backend]))}" for backend in here)


def touch_ops(ops: Iterable[str], device: torch.device, shapes: int = SHAPES) -> dict[str, Counter[str]]:
    """Launch ``ops``. -> for each backend its kernels, and how often each was launched"""
    with recording() as launched:
        for dtype, tf32 in PRECISIONS:
            torch.backends.cuda.matmul.allow_tf32 = tf32
            for op, backend in runnable(device, dtype, ops):
                before = launched[backend].total()
                for shape in verify.OPS[op][0][-shapes:]:
                    subject(op, backend, shape, dtype, device).results()
                assert launched[backend].total() > before, f"{op} launched no kernel of {backend}"
    return launched


def kernels(backend: str) -> set[str]:
    """All that a backend can launch: Triton's kernels, or the functions of swinops._C."""
    if backend == "triton":
        return set(triton_kernels())
    extension = cuda.extension()[0]
    return {name for name in dir(extension) if not name.startswith("_") and callable(getattr(extension, name))}


def triton_kernels() -> dict[str, Any]:
    package = backends.module("triton")
    found = {}
    for each in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{each.name}")
        found |= {
            name: value for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "fn")
        }
    return found


@contextlib.contextmanager
def recording() -> Iterator[dict[str, Counter[str]]]:
    """Within, launches are counted, by backend and kernel."""
    launched: dict[str, Counter[str]] = {name: Counter() for name in KERNELS}
    find_extension = cuda.extension

    class Extension:
        def __getattr__(self, name: str) -> Any:
            value = getattr(find_extension()[0], name)
            launched["cuda"] += Counter([name] if callable(value) else ())
            return value

    # the class of the kernels, which differs in Triton's interpreter
    kinds = {type(kernel) for kernel in triton_kernels().values()} if importlib.util.find_spec("triton") else ()
    with contextlib.ExitStack() as undo:
        undo.callback(setattr, cuda, "extension", find_extension)
        counting = Extension()
        cuda.extension = lambda: (counting if find_extension()[0] else None, find_extension()[1])
        for kind in kinds:

            def run(kernel: Any, *arguments: Any, original: Any = kind.run, **named: Any) -> Any:
                launched["triton"][kernel.fn.__name__] += 1
                return original(kernel, *arguments, **named)

            undo.callback(setattr, kind, "run", kind.run)
            kind.run = run
        yield launched


def second(device: torch.device) -> str:
    if torch.cuda.device_count() < 2:
        raise Skipped("there is one GPU")
    other = torch.device("cuda", 1)
    wrong = (text for each in subjects(other) for text in each.wrong(each.results()))
    return verdict(wrong, f"every op on {torch.cuda.get_device_name(other)}, cuda:1, while cuda:0 is current")


def batch(each: Subject, count: int) -> Subject:
    """The same with the first image of the batch ``count`` times."""

    def times(x: Tensor) -> Tensor:
        first = x[: len(x) // verify.images(x.device)]
        # an image is one in memory; its windows cannot be
        return first.expand(count, *first.shape[1:]) if len(first) == 1 else first.repeat(count, *[1] * (x.dim() - 1))

    tensors = {name: times(x) if x is not None and name in BATCHED else x for name, x in each.check.tensors.items()}
    dout = tuple(None if d is None else times(d) for d in as_tuple(each.check.dout))
    return each._replace(check=each.check._replace(tensors=tensors, dout=dout))


def repeated(each: Subject, count: int) -> Iterator[str]:
    """What is wrong with ``count`` times one image: that one alone is not exact, or that another has other bits."""
    alone, many = batch(each, 1), batch(each, count)
    results = alone.results()
    yield from alone.wrong(results)
    for name, x in many.results().items():
        if name.startswith("out") or name.removeprefix("d") in BATCHED:
            one = results[name]
            parts = x.reshape(count, *one.shape).split(max(1, 2**26 // one.numel()))
            if not all(torch.equal(part, one.expand_as(part)) for part in parts):
                yield f"{each.name}: {name} of {count} images is not that of each"


ATTENTION = tuple(op for op in verify.OPS if "attention" in op)
SHIFT = ("window_partition", "window_merge")
NORMS = ("layer_norm", "add_layer_norm", "layer_norm_add", "patch_merging_norm")
SMALL = {  # a window an image
    **{op: [verify.Attention((n, n), (n, n), (n // 2, n // 2), 1, 16) for n in (4, 12)] for op in ATTENTION},
    **{op: [verify.Partition((4, 4), (4, 4), (2, 2), 16)] for op in SHIFT},
}
LARGE = {
    **{op: [verify.Attention((13, n), (n, n), (3, 3), 6) for n in (7, 12)] for op in ATTENTION},
    **{op: [verify.Partition((14, 14), (7, 7), (3, 3), 96)] for op in SHIFT},
    **{op: [verify.Norm((13, 14), 96)] for op in NORMS},
}


def windows(device: torch.device) -> str:
    """More than a grid is high."""
    wrong: list[str] = []
    for op, backend in runnable(device, ops=SMALL):
        for shape in SMALL[op]:
            wrong += repeated(subject(op, backend, shape, HALF, device), WINDOWS)
    return verdict(wrong, f"{WINDOWS:,} windows: {', '.join(SMALL)}, forward and backward")


def elements(device: torch.device, memory: int = 40 * GIB) -> str:
    free = torch.cuda.mem_get_info(device)[0]
    if free < memory:
        raise Skipped(f"needs {memory / GIB:.0f} GiB of free memory, and {free / GIB:.0f} are")
    wrong: list[str] = []
    for op, backend in runnable(device, ops=LARGE):
        for shape in LARGE[op]:
            each = subject(op, backend, shape, HALF, device)
            first = next(x for name, x in each.check.tensors.items() if x is not None and name in BATCHED)
            wrong += repeated(each, 2**31 // (first.numel() // verify.images(device)) + 1)
            torch.cuda.empty_cache()
    return verdict(wrong, f"more than 2^31 elements in a tensor: {', '.join(LARGE)}, forward and backward")


def stream(device: torch.device) -> str:
    """On a stream that nothing else waits for, inputs arrive late: a kernel elsewhere finds NaN."""
    wrong: list[str] = []
    for each in subjects(device):
        each.results()  # compiled now: later that would take longer than the inputs
        late = {name: None if x is None else torch.full_like(x, float("nan")) for name, x in each.check.tensors.items()}
        torch.cuda.synchronize(device)
        side = torch.cuda.Stream(device)
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # cycles, some 30 ms
            for name, x in late.items():
                if x is not None:
                    x.copy_(each.check.tensors[name])
            results = each.results(late)
        side.synchronize()
        wrong += each.wrong(results)
    return verdict(wrong, "every op, forward and backward, on a side stream behind 30 ms of work")


def graph(device: torch.device) -> str:
    """Captured, then replayed on other inputs."""
    wrong: list[str] = []
    for each in subjects(device):
        inputs = {name: None if x is None else x.clone() for name, x in each.check.tensors.items()}
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            each.results(inputs)  # compiled now: nothing may be while a graph is captured
        torch.cuda.synchronize(device)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            results = each.results(inputs)
        others = {name: None if x is None else shuffled(x, 7) for name, x in inputs.items()}
        for name, x in inputs.items():
            if x is not None:
                x.copy_(others[name])
        captured.replay()
        torch.cuda.synchronize(device)
        wrong += each.wrong(results, others)
        eager = each.results(others)
        wrong += [
            f"{each.name}: {name} is not the eager one" for name, x in results.items() if not x.equal(eager[name])
        ]
    return verdict(wrong, "every op, forward and backward, captured once and replayed on other inputs")


CHECKS: dict[str, Callable[[torch.device], str]] = {
    check.__name__: check for check in (touch, second, windows, elements, stream, graph)
}


def outcome(name: str) -> Outcome:
    try:
        return Outcome("ok", CHECKS[name](torch.device("cuda", 0)))
    except Skipped as reason:
        return Outcome("skipped", str(reason))
    except AssertionError as problem:
        return Outcome("failed", str(problem))
    except Exception as error:
        return Outcome("failed", first_line(error))


def main() -> int:
    parser = argparse.ArgumentParser(description="One check of swinops gpu-check; its outcome is the last line.")
    parser.add_argument("check", choices=CHECKS)
    print(json.dumps(outcome(parser.parse_args().check)._asdict()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
