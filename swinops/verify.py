"""``swinops verify``: every op, on every backend and in every dtype that can run here, against float64.

Outputs and gradients of a dozen shapes are held to the rule of ``swinops.testing``, to the bit where data is only
moved, and a second run has to give the same bits. Uninitialised memory is filled with NaN meanwhile.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import swinops
from swinops import backends, reference
from swinops.testing import (
    Accuracy,
    Gradients,
    Outputs,
    accuracies,
    as_tuple,
    attention_inputs,
    continuous_position_bias_inputs,
    differentiate,
    logit_scales,
    partition_inputs,
    position_bias_inputs,
    random_rows,
    random_tensor,
)
from swinops.text import aligned, first_line

EXAMPLE = "example:\n  swinops verify --op window_attention --backend triton --dtype float16 bfloat16"
INTERPRETED = 5  # shapes of each op in Triton's interpreter
SHOWN = 3  # problems of each row
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Check(NamedTuple):
    """An op beside its definition in plain PyTorch, the tensors both are called with, and a gradient of the output."""

    op: Callable[..., Outputs]  # takes backend= too
    definition: Callable[..., Outputs]
    tensors: Mapping[str, Tensor | None]
    dout: Gradients
    moved: tuple[str, ...] = ()  # the results that are copies: right to the bit


class Attention(NamedTuple):
    space: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    heads: int = 1
    head_dim: int = 32
    bias: bool = True
    pad_kv: bool = True
    pad_order: str = "pad_roll"

    def __str__(self) -> str:
        order = "" if self.pad_order == "pad_roll" else f", {self.pad_order}"
        size = f"{times(self.space)}, {self.heads} x {self.head_dim}"
        return f"{size}, window {times(self.window)}, shift {times(self.shift)}{order}"


ATTENTION = (
    Attention((8, 8), (4, 4), (2, 2), head_dim=1),
    Attention((3, 5), (7, 7), (0, 0), pad_kv=False),  # most of the window is padding
    Attention((5, 8), (4, 4), (2, 2), heads=2, pad_order="roll_pad"),
    Attention((2, 2, 5), (1, 2, 3), (0, 1, 1), head_dim=20),  # a padded volume
    Attention((7, 7), (7, 7), (3, 3), heads=2),  # one window
    Attention((7, 7), (7, 7), (0, 0), bias=False),
    Attention((4, 6), (4, 3), (1, 2), head_dim=256),
    Attention((10, 9), (7, 7), (3, 3)),  # padded
    Attention((14, 14), (7, 7), (3, 3), heads=6),
    Attention((7, 35), (7, 7), (3, 3), heads=6),  # wide
    Attention((35, 7), (7, 7), (3, 3), heads=6),  # tall
    Attention((8, 9), (8, 8), (4, 4), head_dim=64),
    Attention((24, 12), (12, 12), (6, 6), heads=4),
)
# the cosine of one channel is 1 or -1 in every dtype: plain PyTorch's gradient of logit_scale is then exact, by chance
COSINE = (
    ATTENTION[0]._replace(head_dim=2),
    *ATTENTION[1:-4],
    *ATTENTION[-2:],
    Attention((16, 16), (8, 8), (4, 4), heads=3),  # SwinV2-T's first stage
    Attention((16, 32), (16, 16), (8, 8), heads=4),  # SwinV2-B's with large windows
)


def attention(shape: Attention, dtype: torch.dtype, device: torch.device, *, name: str, packed: bool) -> Check:
    names = ("heads", "head_dim", "bias", "pad_kv")
    options: dict[str, Any] = {name: getattr(shape, name) for name in names}
    q, k, v, bias, pad_kv, dout = attention_inputs(
        shape.space, shape.window, batch=images(device), dtype=dtype, device=device, **options
    )
    settings: dict[str, Any] = {"pad_order": shape.pad_order, "mask_value": -100.0}
    tensors: dict[str, Tensor | None] = {"bias": bias, "pad_kv": pad_kv}
    scale = {"scale": shape.head_dim**-0.5}
    if name == "cosine_attention":
        tensors, scale = {"logit_scale": logit_scales(shape.heads, device=device), **tensors}, {}
    op = partial(
        getattr(swinops, f"{name}_qkvpacked" if packed else name),
        window_size=shape.window,
        shift_size=shape.shift,
        **settings,
        **scale,
    )
    define = partial(getattr(reference, name), window=shape.window, shift=shape.shift, **settings, **scale)

    def definition(q: Tensor, k: Tensor, v: Tensor, **learned: Tensor | None) -> Tensor:
        out: Tensor = define(q, k, v, **learned)[0]
        return out

    def definition_packed(qkv: Tensor, **learned: Tensor | None) -> Tensor:
        q, k, v = qkv.unbind(-3)
        return definition(q, k, v, **learned)

    if packed:
        return Check(op, definition_packed, {"qkv": torch.stack((q, k, v), -3), **tensors}, dout)
    return Check(op, definition, {"q": q, "k": k, "v": v, **tensors}, dout)


class Partition(NamedTuple):
    space: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    channels: int

    def __str__(self) -> str:
        return f"{times(self.space)} x {self.channels}, window {times(self.window)}, shift {times(self.shift)}"


PARTITION = (
    Partition((8, 8), (4, 4), (2, 2), 1),
    Partition((5, 7), (1, 1), (0, 0), 32),
    Partition((6, 8), (3, 2), (1, 1), 5),
    Partition((36, 4), (4, 4), (2, 2), 33),  # tall
    Partition((24, 12), (12, 12), (0, 6), 96),
    Partition((14, 14), (7, 7), (6, 6), 96),  # the largest shift
    Partition((2, 14, 7), (2, 7, 7), (1, 3, 3), 96),  # a volume
    Partition((12, 12), (12, 12), (6, 6), 128),  # one window
    Partition((7, 35), (7, 7), (3, 3), 192),  # wide
    Partition((56, 56), (7, 7), (0, 0), 96),
    Partition((56, 56), (7, 7), (3, 3), 96),
    Partition((7, 7), (7, 7), (3, 3), 3072),
)


def partition(shape: Partition, dtype: torch.dtype, device: torch.device, *, merge: bool) -> Check:
    space, window, shift, channels = shape
    x, windows = partition_inputs(space, window, batch=images(device), channels=channels, dtype=dtype, device=device)
    if merge:
        op = partial(swinops.window_merge, image_size=space, shift_size=shift)
        definition = partial(reference.window_merge, image_size=space, shift=shift)
        return Check(op, definition, {"windows": windows}, x, ("out", "dwindows"))
    op = partial(swinops.window_partition, window_size=window, shift_size=shift)
    definition = partial(reference.window_partition, window=window, shift=shift)
    return Check(op, definition, {"x": x}, windows, ("out", "dx"))


class PositionBias(NamedTuple):
    window: tuple[int, ...]
    heads: int

    def __str__(self) -> str:
        return f"window {times(self.window)}, {self.heads} heads"


POSITION_BIAS = (
    PositionBias((1, 1), 3),
    PositionBias((1, 9), 4),
    PositionBias((9, 1), 1),
    PositionBias((3, 5), 2),
    PositionBias((5, 3), 2),
    PositionBias((4, 4), 6),
    PositionBias((7, 7), 3),
    PositionBias((7, 7), 24),
    PositionBias((2, 7, 7), 3),  # a volume
    PositionBias((8, 8), 6),
    PositionBias((12, 12), 48),
    PositionBias((16, 16), 4),
)


def position_bias(shape: PositionBias, dtype: torch.dtype, device: torch.device) -> Check:
    window, heads = shape
    table, dbias = position_bias_inputs(window, heads=heads, dtype=dtype, device=device)
    op = partial(swinops.relative_position_bias, window_size=window)
    return Check(op, partial(reference.relative_position_bias, window=window), {"table": table}, dbias, ("out",))


class ContinuousPositionBias(NamedTuple):
    window: tuple[int, int]
    heads: int
    hidden: int = 512
    pretrained: tuple[int, int] | None = None
    log_spaced: bool = True

    def __str__(self) -> str:
        text = f"window {times(self.window)}, {self.heads} heads, {self.hidden} hidden units"
        if self.pretrained:
            text += f", pretrained {times(self.pretrained)}"
        return text if self.log_spaced else f"{text}, linear-spaced"


CONTINUOUS_POSITION_BIAS = (
    ContinuousPositionBias((1, 1), 3, 16),
    ContinuousPositionBias((1, 5), 2, 70),
    ContinuousPositionBias((4, 3), 2, 33, (6, 1)),
    ContinuousPositionBias((5, 4), 2, 20, log_spaced=False),
    ContinuousPositionBias((6, 6), 3, 100, (4, 4)),
    ContinuousPositionBias((3, 5), 18),
    ContinuousPositionBias((8, 8), 3),
    ContinuousPositionBias((8, 8), 24),
    ContinuousPositionBias((12, 12), 6, 384),
    ContinuousPositionBias((16, 16), 4),
    ContinuousPositionBias((16, 16), 8, pretrained=(12, 12)),
    ContinuousPositionBias((24, 24), 2, pretrained=(12, 12)),
)


def continuous_position_bias(shape: ContinuousPositionBias, dtype: torch.dtype, device: torch.device) -> Check:
    window, heads, hidden, pretrained, log_spaced = shape
    weights, dbias = continuous_position_bias_inputs(window, hidden=hidden, heads=heads, dtype=dtype, device=device)
    settings = window, pretrained or window, log_spaced

    def definition(w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        return reference.continuous_position_bias(w1, b1, w2, *settings)[0]

    op = partial(
        swinops.continuous_position_bias, window_size=window, pretrained_window_size=pretrained, log_spaced=log_spaced
    )
    return Check(op, definition, weights, dbias)


class Norm(NamedTuple):
    space: tuple[int, ...]
    channels: int
    weight: bool = True
    bias: bool = True
    scaled: bool = False  # a factor for each sample
    mixed: bool = False  # as under autocast: x and parameters in float32, f and the norm's result in the row's dtype

    def __str__(self) -> str:
        flags = "".join(f", {name}" for name in ("scaled", "mixed") if getattr(self, name))
        return f"{times(self.space)} x {self.channels}{flags}"


NORM = (
    Norm((6, 5), 1),
    Norm((1,), 33),  # one row of an image
    Norm((9,), 32, scaled=True, mixed=True),
    Norm((4, 5), 100, scaled=True),
    Norm((3, 9), 96, mixed=True),
    Norm((4,), 1536, weight=False),
    Norm((1, 3), 3072, bias=False),
    Norm((14, 14), 96),
    Norm((7, 7), 192, weight=False, bias=False),
    Norm((4, 7), 384, scaled=True),
    Norm((2, 3, 4), 768),  # a volume
    Norm((3, 3), 1024, mixed=True),
)
MERGING = (
    Norm((6, 4), 1),
    Norm((1, 1), 32),  # three of four tokens are padding
    Norm((3, 6), 25, weight=False),
    Norm((2, 12), 32, mixed=True),  # wide
    Norm((14, 2), 32),  # tall
    Norm((2, 2), 768),
    Norm((3, 3), 768, weight=False, bias=False),
    Norm((8, 8), 96),
    Norm((7, 7), 128),  # padded
    Norm((5, 4), 192),
    Norm((4, 5), 192, mixed=True),
    Norm((4, 4), 384, bias=False),
)


def norm(shape: Norm, dtype: torch.dtype, device: torch.device, *, name: str) -> Check:
    size = images(device), *shape.space, shape.channels
    own = torch.float32 if shape.mixed else dtype
    channels = 4 * size[-1] if name == "patch_merging_norm" else size[-1]
    residual = name in ("add_layer_norm", "layer_norm_add")
    tensors: dict[str, Tensor | None] = {"x": random_rows(size, 0, own, device)}
    if residual:
        tensors["f"] = random_rows(size, 1, dtype, device)
    tensors["weight"] = random_tensor((channels,), 20, own, device) if shape.weight else None
    tensors["bias"] = random_tensor((channels,), 21, own, device) if shape.bias else None
    options: dict[str, Any] = {}
    if residual and shape.scaled:
        options["sample_scale"] = torch.tensor([1.25, 0.0], device=device).repeat(size[0] // 2)
    # the result of layer_norm_add is the residual stream, and has its dtype
    to: dict[str, torch.dtype] = {} if name == "layer_norm_add" else {"dtype": dtype}

    def definition(**tensors: Any) -> Outputs:
        exact = {key: torch.float64 for key in to} if tensors["x"].dtype == torch.float64 else to
        settings = {"sample_scale": None, **options} if residual else {}
        *outputs, _, _ = getattr(reference, name)(**tensors, **settings, **exact, eps=1e-5)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    with torch.no_grad():
        outputs = as_tuple(definition(**tensors))
    dout = tuple(None if x is None else random_tensor(x.shape, 22 + n, x.dtype, device) for n, x in enumerate(outputs))
    return Check(partial(getattr(swinops, name), **options, **to), definition, tensors, dout)


OPS: dict[str, tuple[Sequence[Any], Callable[..., Check]]] = {
    **{
        f"{name}{'_qkvpacked' * packed}": (shapes, partial(attention, name=name, packed=packed))
        for name, shapes in (("window_attention", ATTENTION), ("cosine_attention", COSINE))
        for packed in (False, True)
    },
    "window_partition": (PARTITION, partial(partition, merge=False)),
    "window_merge": (PARTITION, partial(partition, merge=True)),
    "relative_position_bias": (POSITION_BIAS, position_bias),
    "continuous_position_bias": (CONTINUOUS_POSITION_BIAS, continuous_position_bias),
    **{name: (NORM, partial(norm, name=name)) for name in ("layer_norm", "add_layer_norm", "layer_norm_add")},
    "patch_merging_norm": (MERGING, partial(norm, name="patch_merging_norm")),
}


def images(device: torch.device) -> int:
    """A batch that gives every multiprocessor of a GPU several windows, and is short on a CPU."""
    return 64 if device.type == "cuda" else 2


@dataclass
class Row:
    """One op on one backend in one dtype: the result that came nearest to its bound, and what is wrong."""

    op: str
    backend: str
    dtype: str
    cannot_run: str | None = None  # why, in a sentence
    shapes: int = 0  # that were checked
    error: float = 0.0
    bound: float = 0.0
    worst: str = ""  # the tensor and the shape of that error
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for option, choices in (("op", OPS), ("backend", backends.MODULES), ("dtype", DTYPES)):
        names = list(choices)
        parser.add_argument(
            f"--{option}", nargs="+", choices=names, default=names, metavar=option.upper(), help=", ".join(names)
        )
    jobs = min(4, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N", help=f"processes that share the work ({jobs})")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 where something is wrong, or nothing could be checked."""
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        Row(op, backend, dtype, why_not(op, backend, DTYPES[dtype], device))
        for op in arguments.op
        for backend in arguments.backend
        for dtype in arguments.dtype
    ]
    checked = list(check_rows([row for row in rows if row.cannot_run is None], device, arguments.jobs))
    facts = {
        "ok": bool(checked) and all(row.ok for row in checked),
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "swinops": swinops.__version__,
    }
    left_out = [row for row in rows if row.cannot_run is not None]
    if arguments.json:
        print(json.dumps({**facts, "rows": [as_json(row) for row in checked + left_out]}, indent=2, allow_nan=False))
    else:
        print("\n".join(report(checked, left_out, facts)))
    return 0 if facts["ok"] else 1


def why_not(op: str, backend: str, dtype: torch.dtype, device: str, head_dim: int = 1) -> str | None:
    x = torch.empty(0, 1, 1, 1, head_dim, dtype=dtype, device=device)
    reason = backends.why_not(backend, x, op.removesuffix("_qkvpacked"))  # the same kernel
    if reason is None and interpreted(backend) and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 numbers as integers, and cuts bits off where it should round"
    return reason


def interpreted(backend: str) -> bool:
    return backend == "triton" and bool(backends.module(backend).INTERPRETED)


def check_rows(rows: Sequence[Row], device: str, jobs: int) -> Iterator[Row]:
    """In several processes, because nearly all of the time goes into compiling kernels."""
    if jobs < 2 or len(rows) < 2:
        yield from progress(map(partial(check_row, device=device), rows), len(rows))
        return
    # CUDA does not survive a fork
    with ProcessPoolExecutor(min(jobs, len(rows)), multiprocessing.get_context("spawn")) as pool:
        yield from progress(pool.map(partial(check_row, device=device), rows), len(rows))


def check_row(row: Row, device: str) -> Row:
    """Check every shape. What a kernel raises is a problem of its row, and not the end.

    After an illegal access the GPU refuses this process everything: the first such row is the one to look at.
    """
    shapes, make = OPS[row.op]
    used = -1.0
    # the first are small, and the interpreter takes half a second for a window
    for shape in shapes[:INTERPRETED] if interpreted(row.backend) else shapes:
        if why_not(row.op, row.backend, DTYPES[row.dtype], device, getattr(shape, "head_dim", 1)) is not None:
            continue
        row.shapes += 1
        try:
            with settled():
                results, other = run_twice(make(shape, DTYPES[row.dtype], torch.device(device)), row.backend)
        except Exception as error:
            row.problems.append(f"{shape}: {first_line(error)}")
            continue
        for name, result in results.items():
            if not result.ok:
                row.problems.append(f"{shape}: {name} is off by {result.error:.3g}, allowed {result.bound:.3g}")
            if share(result) > used:
                used, row.worst = share(result), f"{name} of {shape}"
                row.error, row.bound = result
        if other:
            row.problems.append(f"{shape}: a second run gives other bits in {', '.join(other)}")
    return row


def run_twice(check: Check, backend: str) -> tuple[dict[str, Accuracy], list[str]]:
    """The accuracy of each output and gradient, and the names of those to which a second run gives other bits."""
    op = partial(check.op, backend=backend)
    draws = 1 if len(check.moved) > 1 else 16  # copies are the same whatever is drawn
    results = accuracies(op, check.definition, check.tensors, check.dout, draws)
    results |= {name: results[name]._replace(bound=0.0) for name in check.moved}
    if interpreted(backend):  # by one thread, in order
        return results, []
    first, second = (differentiate(op, check.tensors, check.dout) for _ in range(2))
    return results, [name for name in first if not first[name].allclose(second[name], 0, 0, equal_nan=True)]


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """One thread, and NaN in new memory: a kernel that leaves part of its output unwritten must not find it right."""
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled, threads = memory.fill_uninitialized_memory, torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    torch.set_num_threads(1)  # on tensors of this size they only wait for each other
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what has no deterministic form
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        memory.fill_uninitialized_memory = filled
        torch.set_num_threads(threads)


def progress(rows: Iterable[Row], total: int) -> Iterable[Row]:
    """``rows``, with a bar on stderr where that is a terminal and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return rows
    bar: Iterable[Row] = tqdm(rows, "verifying", total, leave=False, disable=None)
    return bar


def share(result: Accuracy) -> float:
    """The part of its bound that an error uses: above 1 where it is not ok."""
    error, bound = result
    if math.isnan(error) or error > 0 == bound:
        return math.inf
    return error / bound if bound else 0.0


def as_json(row: Row) -> dict[str, Any]:
    """JSON has neither NaN nor infinity: null."""
    numbers = {"error": row.error, "bound": row.bound, "used": share(Accuracy(row.error, row.bound))}
    return {**asdict(row), **{name: x if math.isfinite(x) else None for name, x in numbers.items()}, "ok": row.ok}


def report(checked: Sequence[Row], left_out: Sequence[Row], facts: Mapping[str, Any]) -> Iterator[str]:
    """The table, what is wrong, what cannot run, and the verdict."""
    yield f"swinops {facts['swinops']} with torch {facts['torch']} on {facts['device']}: errors against float64"
    yield "bound: twice plain PyTorch's largest error in that dtype, and one rounding; 0 where data is only moved"
    yield ""
    if checked:
        heading = ("op", "backend", "dtype", "shapes", "error", "bound", "used", "", "worst")
        yield from aligned([heading, *map(cells, checked)])
        yield ""
    for row in checked:
        for problem in row.problems[:SHOWN]:
            yield f"WRONG: {row.op}, {row.backend}, {row.dtype}, {problem}"
        if len(row.problems) > SHOWN:
            yield f"WRONG: {row.op}, {row.backend}, {row.dtype}, and {len(row.problems) - SHOWN} more"
    for backend, reason in dict.fromkeys((row.backend, row.cannot_run) for row in left_out):
        those = [row for row in left_out if (row.backend, row.cannot_run) == (backend, reason)]
        others = [row for row in (*checked, *left_out) if row.backend == backend and row not in those]
        # named only where that tells them from the others
        named = [distinct(those, key) for key in ("op", "dtype") if distinct(those, key) != distinct(others, key)]
        yield f"not run: {'; '.join([backend, *named] if others else [backend])}: {reason}"
    wrong = sum(not row.ok for row in checked)
    if not checked:
        verdict = "nothing can run here"
    elif wrong:
        verdict = f"{wrong} of {len(checked)} rows are WRONG"
    else:
        kernels = "" if any(row.backend != "reference" for row in checked) else ", and no kernel can run here"
        verdict = f"all {len(checked)} rows are right{kernels}"
    yield f"{verdict} ({facts['seconds']} s)"


def distinct(rows: Iterable[Row], key: str) -> str:
    return ", ".join(dict.fromkeys(getattr(row, key) for row in rows))


def cells(row: Row) -> tuple[str, ...]:
    used = share(Accuracy(row.error, row.bound))
    shown = f"{used:.0%}" if row.bound else "inf" if used else "exact"
    numbers = (f"{row.error:.2g}", f"{row.bound:.2g}", shown) if row.worst else ("", "", "")
    return row.op, row.backend, row.dtype, str(row.shapes), *numbers, "ok" if row.ok else "WRONG", row.worst


def times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
