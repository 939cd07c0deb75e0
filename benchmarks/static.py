"""What the compilers made of the Triton and the CUDA kernels, and the bars it must pass. Needs no GPU.

The package's own launchers are called on CPU tensors whose memory is never touched, with a stand-in for Triton's
driver or the CUDA runtime: each kernel they would launch is specialised (divisibility, strides of 1) and compiled as on
the GPU it names, then disassembled.

Issue time and memory time are lower bounds on time, not timings: the instructions that the warps must issue, over what
the device issues at its nominal clock, and the bytes that must move, over the bandwidth of a copy.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from swinops import backends
from swinops.backends import cuda
from swinops.benchmarks import nvcc
from swinops.benchmarks.nvcc import tool
from swinops.text import aligned

NOT_A_TIMING = "Issue time and memory time are lower bounds on time, not timings."


class Device(NamedTuple):
    """Clock in Hz, bandwidth of a copy in B/s, shared memory in bytes on a multiprocessor and for a block."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    shared: int
    block_shared: int


# clocks and bandwidths are nominal, near what a copy reaches on such a device; a particular one differs
DEVICES = {
    80: Device("A100", 108, 1.41e9, 1.75e12, 164 << 10, 163 << 10),
    90: Device("H100", 132, 1.755e9, 3.0e12, 228 << 10, 227 << 10),
    100: Device("B200", 148, 1.85e9, 7.0e12, 228 << 10, 227 << 10),
}
# of a multiprocessor, the same on all three
SCHEDULERS = 4  # each issues one warp instruction a cycle and owns a quarter of the registers
REGISTERS = 65536
WARPS = 64
BLOCKS = 32
TENSOR_MEMORY = 512  # columns
REGISTER_UNIT = 256  # registers are given to a warp in these units,
SHARED_UNIT = 128  # and shared memory to a block in these, with
SHARED_RESERVED = 1024  # bytes more for the system

STACK_LIMIT = 16  # bytes
WIDE = 16  # bytes of a 128-bit access
LATENCY = 800e-9  # seconds from a load to its value in a loaded device
ENOUGH_WARPS = 16  # on a multiprocessor: what 128 registers a thread leave
# part of the memory time that issue may take in the forward pass of small windows; otherwise all of it
ISSUE_SHARE = {("cuda", 90): 0.5}
BACKENDS = ("triton", "cuda")
FORWARD = ("window_attention", "cosine_attention")
ATTENTION = (*FORWARD, *(f"{op}_backward" for op in FORWARD))
CONTINUOUS_BIAS = ("continuous_position_bias", "continuous_position_bias_backward")
BIAS = ("relative_position_bias", "relative_position_bias_backward", *CONTINUOUS_BIAS)
# the tensors that hold vectors of channels, by the names of the kernels' arguments without _ptr
NORM_VECTORS = {
    "layer_norm": {"x", "y"},
    "layer_norm_backward": {"dy", "s", "dx"},
    "add_layer_norm": {"x", "f", "s", "y"},
    "add_layer_norm_backward": {"ds", "dy", "s", "dx", "df"},
    "layer_norm_add": {"x", "residual", "y"},
    "layer_norm_add_backward": {"dy", "s", "dx"},
    "patch_merging_norm": {"x", "y"},
    "patch_merging_norm_backward": {"dy", "s", "dx"},
}
VECTORS = {
    **{op: {"q", "k", "v", "out"} for op in FORWARD},
    **{f"{op}_backward": {"q", "k", "v", "dout", "dq", "dk", "dv"} for op in FORWARD},
    **NORM_VECTORS,
}
NORMS = tuple(NORM_VECTORS)
OPS = (*ATTENTION, "window_partition", "window_merge", *BIAS, *NORMS)
NORM_KERNELS = ("_norm_kernel", "_norm_backward_kernel")
# read or written once a program, not once a window: left out of the bytes that must move for a window
PARTIALS = {"dlogit_scale", "dbias", "dpad"}  # of the Triton kernels, a program each; torch adds them up
ONCE = {"logit_scale", "bias", "pad", *PARTIALS}


class CompileOnly:
    """Stands in for Triton's CUDA driver where there is no GPU, or another one."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


class Turns(NamedTuple):
    """How often loops turn, by depth. ``persistent``: the outer one does ``items`` items in ``trips[0]`` turns.

    ``loads``: bytes that a lane loads in all turns of a loop that only reads, where these do not turn by ``trips``: the
    compiler may have unrolled it, so that it turns less often and another takes what is left. ``fmas``: likewise the
    multiply-adds of a loop of little else.

    ``stage``: how often the loops in the innermost hot one turn when it copies, of which ``trips`` has the mean.
    """

    persistent: bool
    trips: tuple[float, ...]
    items: float = 1
    loads: int = 0
    fmas: int = 0
    stage: tuple[float, ...] | None = None


class Launch:
    """A kernel that was compiled in place of being launched."""

    name: str
    cubin: bytes
    grid: tuple[int, ...]
    warps: int
    shared: int  # bytes a block, beside what the machine code declares
    stages = 1
    tensor_memory = 0
    filled = 1.0  # part of the lanes that load
    partials = 0  # bytes that torch moves to add up what the programs leave

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def turns(self) -> Turns | None:
        """None where it is not known."""
        raise NotImplementedError

    def moved(self, items: int) -> float | None:
        """Bytes that must move for one item; None where it is not known."""
        raise NotImplementedError

    def accesses(self) -> list["Access"]:
        """Global accesses by tensor, where the compiler tells."""
        return []


@dataclass
class CudaLaunch(Launch):
    """``loops`` and ``item_bytes``: its turns and what it moves, in the call that it was launched in."""

    name: str
    cubin: bytes
    grid: tuple[int, ...]
    warps: int
    shared: int
    loops: Turns | None
    item_bytes: float | None

    @property
    def turns(self) -> Turns | None:
        return self.loops

    def moved(self, items: int) -> float | None:
        return self.item_bytes


@dataclass
class TritonLaunch(Launch):
    """``arguments``: what it was given, by name."""

    name: str
    compiled: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        metadata = self.compiled.metadata
        self.cubin = self.compiled.asm["cubin"]
        self.warps, self.stages, self.shared = metadata.num_warps, metadata.num_stages, metadata.shared
        self.tensor_memory = getattr(metadata, "tmem_size", 0) or 0
        if self.name in NORM_KERNELS:  # the lanes past the last channel load nothing
            self.filled = self.arguments["C"] / self.arguments["BLOCK_C"]
        if self.attention:
            # each sum is written, then copied
            self.partials = sum(x.nbytes + 3 * x[0].nbytes for n, x in self.tensors.items() if n in PARTIALS)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {n.removesuffix("_ptr"): x for n, x in self.arguments.items() if isinstance(x, torch.Tensor)}

    @property
    def attention(self) -> bool:
        return bool({"q", "k"} & self.tensors.keys())

    def moved(self, items: int) -> int:
        return sum(x.nbytes for n, x in self.tensors.items() if n not in ONCE or not self.attention) // items

    def accesses(self) -> list["Access"]:
        return accesses(self.compiled.asm["ptx"], self.pointers())

    @property
    def turns(self) -> Turns | None:
        """Known for the package's kernels; None for others."""
        tokens = math.prod(self.arguments.get("WINDOW", (1,)))

        def tiles(block: str) -> int:
            return math.ceil(tokens / self.arguments[block])

        if self.name in ("_forward_kernel", "_backward_kernel"):
            return Turns(True, (1,))
        if self.name in ("_forward_tiled_kernel", "_dq_kernel"):
            return Turns(True, (tiles("BLOCK_M"), tiles("BLOCK_N")))
        if self.name == "_dkdv_kernel":
            return Turns(True, (tiles("BLOCK_N"), tiles("BLOCK_M")))
        if self.name == "_dbias_kernel":
            return Turns(True, (tiles("BLOCK_M") * tiles("BLOCK_N"),))
        if self.name in ("_shift_kernel", "_expand_kernel"):
            return Turns(False, ())
        if self.name == "_reduce_kernel":
            return Turns(False, (tiles("BLOCK_I"),))
        if self.name == "_weights_kernel":
            rows = self.arguments["table_ptr"].shape[0]
            blocks = (self.arguments["heads"], "BLOCK_H"), (rows, "BLOCK_R")
            return Turns(False, tuple(math.ceil(n / self.arguments[block]) for n, block in blocks))
        if self.name == "_bias_kernel":
            # over hidden units, of which each turn loads the same; then over the queries whose keys are in the window
            loads = sum(access.width for access in self.accesses() if not access.store)
            (height, width), block = self.arguments["WINDOW"], self.arguments["BLOCK_R"]
            lines = [
                min((first + block - 1) // (2 * width - 1) + 1, height) - max(first // (2 * width - 1) - height + 1, 0)
                for first in range(0, block * self.grid[0], block)
            ]
            queries = [math.ceil(n * width / self.arguments["BLOCK_I"]) for n in lines]
            units = math.ceil(self.arguments["hidden"] / self.arguments["BLOCK_K"])
            return Turns(False, (sum(queries) / len(queries),), loads=units * loads)
        if self.name in NORM_KERNELS:
            length = self.arguments["length"]
            return Turns(True, (1,), length / math.ceil(length / self.arguments["BLOCK_M"]))
        if self.name == "_sum_kernel":
            return Turns(False, (math.ceil(self.arguments["programs"] / self.arguments["BLOCK_P"]),))
        return None

    def pointers(self) -> list[str | None]:
        """Name of the tensor behind each parameter of the compiled kernel; None for numbers."""

        def flat(name: str, kind: Any) -> Iterator[str | None]:
            if isinstance(kind, (tuple, list)):
                for part in kind:
                    yield from flat(name, part)
            elif kind != "constexpr":
                yield name.removesuffix("_ptr") if str(kind).startswith("*") else None

        return [entry for name, kind in self.compiled.src.signature.items() for entry in flat(name, kind)]


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[TritonLaunch]]:
    """Within, kernels are compiled for ``arch`` and listed, not launched, with the configurations for that device."""
    tuning = importlib.import_module("swinops.kernels.tuning")
    launches: list[TritonLaunch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        self.device_caches.clear()  # they hold kernels of the last architecture
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        self.device_caches.clear()
        arguments = dict(zip(self.arg_names, args, strict=False)) | {
            n: x for n, x in kwargs.items() if n in self.arg_names
        }
        blocks = grid(arguments) if callable(grid) else grid
        launches.append(TritonLaunch(self.fn.__name__, compiled, blocks, arguments))
        return compiled

    # window_attention.py has its own name for each of the two
    attention = importlib.import_module("swinops.kernels.window_attention")
    replaced = {"architecture": lambda x: arch, "multiprocessors": lambda x: DEVICES[arch].multiprocessors}
    places = [(module, name) for module in (tuning, attention) for name in replaced if hasattr(module, name)]
    before = [getattr(module, name) for module, name in places]
    active = driver._active
    driver.set_active(CompileOnly(arch))
    JITFunction.run = compile_only
    for module, name in places:
        setattr(module, name, replaced[name])
    try:
        yield launches
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
        JITFunction.run = run
        driver._active = active


class Moves(NamedTuple):
    """What a CUDA kernel moves: tensors like q or an image, and float32 numbers of a token and head."""

    loads: int
    stores: int
    floats: int


MOVES = {
    "WholeForwardKernel": Moves(3, 1, 1),
    "TiledForwardKernel": Moves(3, 1, 1),
    "WholeBackwardKernel": Moves(4, 3, 1),
    "TiledBackwardKernel dq": Moves(5, 1, 2),
    "TiledBackwardKernel dk": Moves(4, 1, 2),
    "TiledBackwardKernel dv": Moves(4, 1, 2),
    "TiledBackwardKernel dkdv": Moves(4, 2, 2),
    "TiledBackwardKernel dbias": Moves(4, 0, 2),
    "CyclicShiftKernel": Moves(1, 1, 0),
}


@contextlib.contextmanager
def recording(arch: int) -> Iterator[None]:
    """Within, the CUDA backend takes CPU tensors, and its launches can be recorded."""
    before = cuda.extension, cuda.launching, cuda.limits
    extension, device = nvcc.extension().module, DEVICES[arch]
    replaced: dict[str, Any] = {
        "extension": lambda: (extension, None),
        "launching": lambda op, **tensors: contextlib.nullcontext(0),
        "limits": lambda _: (device.multiprocessors, device.block_shared),
    }
    cuda.attention_shape.cache_clear()  # it holds those of the last architecture
    vars(cuda).update(replaced)
    try:
        yield
    finally:
        vars(cuda).update(zip(replaced, before, strict=True))
        cuda.attention_shape.cache_clear()


TENSOR_CORE = re.compile(r"[HIDBQO]G?MMA$|UTC\w*MMA$")
BULK = {"UBLKCP", "UTMALDG", "UTMASTG"}
GLOBAL_LOAD = {"LDG", "LDGSTS", "LD", "UBLKCP", "UTMALDG"}
GLOBAL_STORE = {"STG", "ST", "UTMASTG"}
LOCAL = {"LDL", "STL"}
FMA = {"FFMA", "FFMA2"}
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class Instruction(NamedTuple):
    predicated: bool
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a thread moves; of a bulk copy, which one thread starts for all, those of the widest access."""
        if self.name in BULK:
            return WIDE
        return next((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), 4)

    @property
    def tensor_core(self) -> bool:
        return TENSOR_CORE.match(self.name) is not None

    @property
    def work(self) -> Counter["Kind"]:
        found: Counter[Kind] = Counter({"instruction": 1})
        if self.tensor_core:
            found["product"] = 1
        if self.name in FMA:
            found["fma"] = 1
        for kind, names in (("load", GLOBAL_LOAD), ("store", GLOBAL_STORE)):
            if self.name in names:
                found[kind, self.width] = 1
        return found


Kind = str | tuple[str, int]  # "instruction", "product", "fma", "loop", or a global "load" or "store" and its width
Work = Counter[Kind]


def by_width(work: Work, access: str) -> dict[int, int]:
    return {kind[1]: n for kind, n in sorted(work.items(), key=str) if kind[0] == access}


def wide(work: Work, access: str) -> int:
    """Bytes that a lane moves by 128-bit accesses."""
    return sum(width * n for width, n in by_width(work, access).items() if width >= WIDE)


@dataclass(eq=False)
class Loop:
    header: int
    blocks: set[int]
    parent: "Loop | None" = None


class Program:
    """A kernel's machine code as basic blocks and loops."""

    def __init__(self, sass: str) -> None:
        self.blocks: list[list[Instruction]] = [[]]
        labels: dict[str, int] = {}
        for line in sass.splitlines():
            if label := re.match(r"(\.L_\w+):", line.strip()):
                if self.blocks[-1]:
                    self.blocks.append([])
                labels[label[1]] = len(self.blocks) - 1
            elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z]\S*)\s*(.*?)\s*;", line):
                self.blocks[-1].append(Instruction(match[1] is not None, match[2], match[3]))
                if re.match(r"BRA|CALL|EXIT|RET", match[2]):
                    self.blocks.append([])
        self.successors = [self._successors(i, labels) for i in range(len(self.blocks))]
        self.loops = self._loops()
        self.products = any(x.tensor_core for x in self.instructions())

    def _successors(self, i: int, labels: dict[str, int]) -> set[int]:
        following = {i + 1} & set(range(len(self.blocks)))
        if not self.blocks[i]:
            return following
        last = self.blocks[i][-1]
        if last.name in ("EXIT", "RET"):
            return following if last.predicated else set()
        # BRA.DIV is taken by a warp whose threads have parted, which no kernel here does; a CALL of a label is a jump
        jumps = last.name == "CALL" and "`(.L_" in last.operands
        if not jumps and (last.name != "BRA" or last.opcode == "BRA.DIV"):
            return following
        condition, _, target = last.operands.partition("`(")
        taken = {labels[target.rstrip(") ")]} if target else set()
        return taken | following if last.predicated or condition.strip() else taken

    def _loops(self) -> list[Loop]:
        """Natural loops, the outer before the inner."""
        reachable, stack = {0}, [0]
        while stack:
            for block in self.successors[stack.pop()] - reachable:
                reachable.add(block)
                stack.append(block)
        self.reachable = reachable
        predecessors = {block: [p for p in reachable if block in self.successors[p]] for block in reachable}
        dominators = {block: {0} if block == 0 else set(reachable) for block in reachable}
        changed = True
        while changed:
            changed = False
            for block in sorted(reachable - {0}):
                new = {block} | set.intersection(*(dominators[p] for p in predecessors[block]))
                changed |= new != dominators[block]
                dominators[block] = new
        loops: dict[int, Loop] = {}
        for latch in reachable:
            for header in self.successors[latch] & dominators[latch]:
                loop = loops.setdefault(header, Loop(header, {header}))
                stack = [latch]
                while stack:
                    block = stack.pop()
                    if block not in loop.blocks:
                        loop.blocks.add(block)
                        stack += predecessors[block]
        ordered = sorted(loops.values(), key=lambda loop: -len(loop.blocks))
        for i, loop in enumerate(ordered):
            loop.parent = next((outer for outer in reversed(ordered[:i]) if loop.header in outer.blocks), None)
        return ordered

    def instructions(self, loop: Loop | None = None) -> list[Instruction]:
        """Those of a loop and the loops within it, or all that can be reached."""
        return [x for block in sorted(loop.blocks if loop else self.reachable) for x in self.blocks[block]]

    def hot(self, loop: Loop) -> bool:
        """Whether it is a loop over windows, tiles or elements, and none that waits."""
        code = self.instructions(loop)
        # beside products, a loop that only writes ends one of the others' turns
        written = not self.products and any(x.name in GLOBAL_STORE for x in code)
        return written or any(x.tensor_core or x.name in GLOBAL_LOAD for x in code)

    def nest(self) -> list[Loop]:
        """The hot loop and its inner one, and so on: at each depth the one with the most products.

        Those are tensor-core instructions, or multiply-adds where there are none. To the depth that holds most of them:
        loops further in prepare what these multiply.
        """

        def weight(loop: Loop) -> tuple[int, int]:
            code = self.instructions(loop)
            return sum(x.tensor_core if self.products else x.name in FMA for x in code), len(code)

        chain: list[Loop] = []
        while inner := [
            loop for loop in self.loops if loop.parent is (chain[-1] if chain else None) and self.hot(loop)
        ]:
            heaviest = max(inner, key=weight)
            if chain and 2 * weight(heaviest)[0] < weight(chain[-1])[0]:
                break
            chain.append(heaviest)
        return chain

    def turns(self, parent: Loop | None, trips: Sequence[float], loads: int, fmas: int) -> dict[Loop, float]:
        """How often each loop turns that lies in ``parent`` and in none further in; the rest as for ``way``."""
        loops = [loop for loop in self.loops if loop.parent is parent]
        often = {loop: trips[0] if self.hot(loop) and trips else 1 for loop in loops}
        sizes = {loop: size for loop in loops if (size := self.read(loop))} if loads else {}
        ordered = sorted(set(sizes.values()), reverse=True)
        for size in ordered:
            turns, loads = divmod(loads, size) if size > ordered[-1] else (math.ceil(loads / size), 0)
            often.update((loop, turns) for loop in sizes if sizes[loop] == size)
        for loop in loops if fmas else ():
            names = Counter(x.name in FMA for x in self.instructions(loop))
            if not self.hot(loop) and names[True] > names[False]:
                often[loop] = fmas / names[True]
        return often

    def read(self, loop: Loop) -> int:
        """Bytes that a lane loads in one turn of a loop that only reads, and has none that does inside; else 0."""
        code = self.instructions(loop)
        if any(x.name in GLOBAL_STORE for x in code) or any(x.parent is loop and self.hot(x) for x in self.loops):
            return 0
        return sum(x.width for x in code if x.name in GLOBAL_LOAD)

    def way(self, loop: Loop | None, trips: Sequence[float], longest: bool, loads: int = 0, fmas: int = 0) -> Work:
        """What a warp issues in one turn of a loop, or from entry to exit, on the longest way or the shortest.

        Of the ways that have tensor-core instructions, where there are any, and then the most 128-bit accesses: a turn
        of a warp without rows is not counted, nor one that does not load the next window, as the last. Without
        tensor cores, of those with the most multiply-adds and through the most loops, for the same reason.

        ``trips``: how often the loops inside turn, by depth; a loop that only waits turns once. ``loads``, ``fmas``:
        see Turns.
        """
        region = loop.blocks if loop else self.reachable
        start = loop.header if loop else 0
        inside = {block: inner for inner in self.loops if inner.parent is loop for block in inner.blocks}
        often = self.turns(loop, trips, loads, fmas)

        def rank(work: Work) -> tuple[float, ...]:
            length = work["instruction"]
            access = wide(work, "load") + wide(work, "store")
            products = work["product"] > 0 if self.products else work["fma"]
            return products, access, work["loop"], length if longest else -length

        @functools.cache
        def ahead(block: int) -> Work | None:
            inner = inside.get(block)
            if inner is None:
                work, successors = sum((x.work for x in self.blocks[block]), Work()), self.successors[block]
            else:
                hot = self.hot(inner)
                turn = self.way(inner, trips[1:] if hot else (), longest, loads, fmas)
                work = Work({kind: often[inner] * n for kind, n in turn.items()})
                work["loop"] += hot and not self.products
                successors = {s for b in inner.blocks for s in self.successors[b]} - inner.blocks
            ends = start in successors if loop else not successors
            rest = [w for s in successors if s in region and s != start and (w := ahead(s)) is not None]
            return work + max([*rest, *([Work()] if ends else [])], key=rank) if rest or ends else None

        return ahead(start) or Work()


@functools.lru_cache(64)
def disassemble(cubin: bytes) -> tuple[Program, dict[str, int]]:
    """A kernel's machine code, and its resources: REG a thread, STACK in bytes a thread, SHARED in bytes a block."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        return Program(tool("nvdisasm", "-c", file.name)), {
            n: int(v) for n, v in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)
        }


class Access(NamedTuple):
    """A global access in a kernel's PTX. ``tensor``: where its address comes from, "?" where that is not clear."""

    tensor: str
    width: int
    store: bool


def accesses(ptx: str, pointers: Sequence[str | None]) -> list[Access]:
    """Global loads and stores, each traced from its address, through 64-bit registers, to the pointer it came from."""
    sources: dict[str, set[str]] = {}
    found: list[tuple[str, int, bool]] = []
    for line in ptx.splitlines():
        match = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);", line)
        if match is None:
            continue
        opcode, operands = match.groups()
        if opcode.startswith(("ld.global", "st.global", "atom.global", "red.global")):
            vector = re.search(r"\.v(\d)", opcode)
            width = int(re.findall(r"\.[busf](\d+)", opcode)[-1]) // 8 * (int(vector[1]) if vector else 1)
            found.append((re.findall(r"\[\s*(%\w+)", operands)[0], width, not opcode.startswith("ld")))
        elif opcode.startswith("cp.async.c"):
            found.append(
                (re.findall(r"\[\s*(%\w+)", operands)[1], int(operands.split("],")[2].split(",")[0], 0), False)
            )
        elif opcode.startswith("ld.param"):
            register, parameter = re.findall(r"%\w+|param_\d+", operands)[:2]
            index = int(parameter.removeprefix("param_"))
            if index < len(pointers) and pointers[index] is not None:
                sources.setdefault(register, set()).add(str(pointers[index]))
        elif not opcode.startswith(("ld.", "st.")):
            registers = re.findall(r"%rd\d+", operands)
            if registers and operands.lstrip().startswith(registers[0]):
                sources.setdefault(registers[0], set()).update(registers[1:])

    def tensors(register: str) -> set[str]:
        seen, stack = {register}, [register]
        while stack:
            for source in sources.get(stack.pop(), set()) - seen:
                seen.add(source)
                stack.append(source)
        return {name for name in seen if not name.startswith("%")}

    names = [tensors(register) for register, _, _ in found]
    return [
        Access(next(iter(name)) if len(name) == 1 else "?", width, store)
        for name, (_, width, store) in zip(names, found, strict=True)
    ]


def blocks_per_sm(arch: int, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> tuple[int, str]:
    """Blocks that fit on a multiprocessor, and what limits them: the arithmetic of CUDA's cuda_occupancy.h."""
    device = DEVICES[arch]
    by_warp = math.ceil(registers * 32 / REGISTER_UNIT) * REGISTER_UNIT
    block = math.ceil((shared + SHARED_RESERVED) / SHARED_UNIT) * SHARED_UNIT
    limits = {
        "registers": REGISTERS // SCHEDULERS // by_warp * SCHEDULERS // warps,
        "shared": device.shared // block if shared <= device.block_shared else 0,
        "warps": WARPS // warps,
        "blocks": BLOCKS,
    }
    if tensor_memory:
        limits["tensor memory"] = TENSOR_MEMORY // tensor_memory
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


@dataclass
class Row:
    """One kernel of one configuration.

    Times in ns for one item: a (window, head) of attention, a window of partition and merge, a head of the bias, a row
    of a norm, a channel of the sum of its partials. Of two values, the first is along the longest way and the second
    along the shortest: with the border mask and without it, where the compiler left a branch. Those that a launch
    settles, such as the bias's dtype, are branches too.
    """

    arch: int
    kernel: str
    warps: int
    stages: int
    registers: int
    stack: int  # bytes a thread
    local_hot: int  # local-memory instructions in the hot loop
    local_cold: int
    shared: int  # bytes a block, without what the system reserves
    programs: int
    blocks_per_sm: int
    limited_by: str
    resident: int  # blocks on a multiprocessor: the grid may hold fewer than fit
    bytes_in_flight: (
        int  # of a multiprocessor: the global loads of one turn of the innermost hot loop, times resident blocks
    )
    loads: dict[int, int]  # global load instructions by their width in bytes
    stores: dict[int, int]
    hot_loads: dict[int, int]  # those of the innermost hot loop
    hot_stores: dict[int, int]
    accesses: dict[str, list[int]]  # widths of the global accesses to each tensor
    tensor_core: dict[str, int]
    hot_loop: tuple[int, int]  # instructions a warp in one turn of the innermost hot loop
    instructions: tuple[int, ...] | None  # a warp, for one item; of a norm, for one tile of rows
    issue_ns: tuple[float, ...] | None
    wide: tuple[int, int] | None  # bytes of 128-bit accesses for one item, loads and stores; of persistent kernels
    bytes: float | None  # that must move for one item
    memory_ns: float | None
    bound: str
    partials_ns: float = 0.0  # that the bytes take which torch moves to add up partials
    case: dict[str, Any] = field(default_factory=dict)


def measure(launch: Launch, arch: int, items: int, turns: Turns | None = None) -> Row:
    """Disassemble a kernel that does ``items`` items in this launch."""
    device = DEVICES[arch]
    program, usage = disassemble(launch.cubin)
    nest, turns = program.nest(), turns or launch.turns
    every = program.instructions()
    hot = program.instructions(nest[0]) if nest else every
    total, innermost = (
        sum((x.work for x in code), Work()) for code in (every, program.instructions(nest[-1]) if nest else every)
    )
    inside = (turns.stage or turns.trips[len(nest) :]) if turns and turns.persistent else ()
    rest = (turns.loads, turns.fmas) if turns else ()
    inner = [program.way(nest[-1], inside, longest, *rest) for longest in (True, False)] if nest else [total, total]
    widths: dict[str, list[int]] = {}
    for access in launch.accesses():
        widths.setdefault(access.tensor, []).append(access.width)

    # on the newer architectures the system's reserve is in the kernel's own
    shared = launch.shared + max(0, usage["SHARED"] - (SHARED_RESERVED if arch >= 90 else 0))
    most, limit = blocks_per_sm(arch, usage["REG"], shared, launch.warps, launch.tensor_memory)
    resident = min(most, math.ceil(launch.programs / device.multiprocessors))
    issued = issue = moved_wide = None
    if turns is not None:
        if turns.persistent and nest:
            ways = [program.way(nest[0], turns.trips[1:], longest, *rest) for longest in (True, False)]
            ways = [Work({kind: turns.trips[0] * n for kind, n in way.items()}) for way in ways]
            issued = tuple(math.ceil(way["instruction"]) for way in ways)
            lanes = 32 * launch.warps / turns.items
            moved_wide = round(wide(ways[1], "load") * lanes), round(wide(ways[1], "store") * lanes)
        else:
            ways = [program.way(None, turns.trips, longest, *rest) for longest in (True, False)]
            issued = tuple(math.ceil(way["instruction"] * launch.programs / items) for way in ways)
        rate = SCHEDULERS * device.multiprocessors * device.clock / 1e9
        issue = tuple(n * launch.warps / rate / turns.items for n in issued)
    moved = launch.moved(items)
    memory = None if moved is None else moved / device.bandwidth * 1e9
    return Row(
        arch=arch,
        kernel=launch.name,
        warps=launch.warps,
        stages=launch.stages,
        registers=usage["REG"],
        stack=usage["STACK"],
        local_hot=sum(x.name in LOCAL for x in hot),
        local_cold=sum(x.name in LOCAL for x in every) - sum(x.name in LOCAL for x in hot),
        shared=shared,
        programs=launch.programs,
        blocks_per_sm=most,
        limited_by=limit,
        resident=resident,
        bytes_in_flight=int(
            sum(width * n for width, n in by_width(inner[1], "load").items())
            * (32 * launch.warps * resident * launch.filled)
        ),
        loads=by_width(total, "load"),
        stores=by_width(total, "store"),
        hot_loads=by_width(innermost, "load"),
        hot_stores=by_width(innermost, "store"),
        accesses=widths,
        tensor_core=dict(Counter(x.name for x in every if x.tensor_core)),
        hot_loop=(math.ceil(inner[0]["instruction"]), math.ceil(inner[1]["instruction"])) if nest else (0, 0),
        instructions=issued,
        issue_ns=issue,
        wide=moved_wide,
        bytes=moved,
        memory_ns=memory,
        bound="?" if issue is None or memory is None else "issue" if issue[0] >= memory else "memory",
        partials_ns=launch.partials / items / device.bandwidth * 1e9,
    )


class Call:
    """One call of one op for one architecture."""

    arch: int
    op: str
    dtype: str
    backend: str

    @property
    def items(self) -> int:
        raise NotImplementedError

    @property
    def wide(self) -> bool:
        """Whether all accesses to vectors must be of 128 bits."""
        raise NotImplementedError

    def bounded(self, row: Row) -> bool:
        """Whether a kernel must be bound by memory."""
        raise NotImplementedError

    def call(self) -> None:
        """Call the op's launcher as the ops do."""
        raise NotImplementedError

    def labels(self) -> list[str]:
        """Its cells in the table, after architecture, op and kernel."""
        raise NotImplementedError

    def launches(self) -> Sequence[Launch]:
        with compiling(self.arch) as launches:
            self.call()
        return launches

    def measure(self) -> list[Row]:
        rows = []
        for launch in self.launches():
            items = self.items
            if isinstance(launch, TritonLaunch) and launch.name == "_sum_kernel":
                items = 2 * launch.arguments["C"]
            rows.append(measure(launch, self.arch, items))
            rows[-1].case = asdict(self)
        return rows


@dataclass(frozen=True)
class Case(Call):
    """A call of any op but a norm."""

    arch: int
    op: str
    window: int
    shift: int = 0
    head_dim: int = 32
    dtype: str = "bfloat16"
    bias: str = "float32"
    padded: bool = False
    backend: str = "triton"

    heads = 3
    batch = 64
    hidden = 512  # of the network of the continuous bias

    def __str__(self) -> str:
        parts = [f"sm_{self.arch} {self.op} window {self.window}"]
        if self.op not in BIAS:
            parts += [f"shift {self.shift} head_dim {self.head_dim} {self.dtype}"]
        if self.op in ATTENTION:
            parts += [f"bias {self.bias}"]
        return " ".join([*parts, *["padded"] * self.padded, *["cuda"] * (self.backend == "cuda")])

    @property
    def size(self) -> int:
        """Height and width of the image: near Swin's 56 x 56 tokens."""
        size = 48 if self.window in (12, 16, 24, 48) else 56 // self.window * self.window
        return size - 1 if self.padded else size

    @property
    def items(self) -> int:
        windows = self.batch * math.ceil(self.size / self.window) ** 2
        if self.op in ATTENTION:
            return windows * self.heads
        return self.heads if self.op in BIAS else windows

    def call(self) -> None:
        """Call the op's launcher as the ops do, on tensors laid out as a QKV projection leaves them."""
        launch = getattr(backends.module(self.backend), self.op)
        dtype, bias_dtype = getattr(torch, self.dtype), getattr(torch, self.bias)
        n, heads, tokens = self.size, self.heads, self.window**2
        window, shift = (self.window,) * 2, (self.shift,) * 2
        if self.op == "relative_position_bias":
            launch(torch.empty((2 * self.window - 1) ** 2, heads), window)
        elif self.op == "relative_position_bias_backward":
            launch(torch.empty(heads, tokens, tokens), window)
        elif self.op in CONTINUOUS_BIAS:
            weights = torch.empty(self.hidden, 2), torch.empty(self.hidden), torch.empty(heads, self.hidden)
            table = torch.empty((2 * self.window - 1) ** 2, heads)
            gradient = (torch.empty(heads, tokens, tokens), table) if self.op.endswith("backward") else ()
            launch(*gradient, *weights, window, window, True)
        elif self.op == "window_partition":
            launch(torch.empty(self.batch, n, n, heads * self.head_dim, dtype=dtype), window, shift)
        elif self.op == "window_merge":
            windows = torch.empty(self.items, *window, heads * self.head_dim, dtype=dtype)
            launch(windows, (n, n), shift)
        else:
            qkv = torch.empty(self.batch, n, n, 3, heads, self.head_dim, dtype=dtype)
            bias = torch.empty(heads, tokens, tokens, dtype=bias_dtype)
            pad = torch.empty(2, heads, self.head_dim, dtype=dtype) if self.padded else None
            cosine = self.op.startswith("cosine")
            scale: tuple[float, ...] = () if cosine else (self.head_dim**-0.5,)
            rest = window, shift, *scale, "pad_roll", -100.0
            learned = *[torch.empty(heads)] * cosine, bias, pad
            if self.op in FORWARD:
                launch(*qkv.unbind(-3), *learned, *rest)
            else:
                q = qkv.select(-3, 0)
                out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
                dout, dqkv = torch.empty_like(out), torch.empty_like(qkv)
                gradients = [None if x is None else torch.empty_like(x) for x in learned]
                launch(dout, *qkv.unbind(-3), *learned, out, lse, *dqkv.unbind(-3), *gradients, *rest)

    def launches(self) -> Sequence[Launch]:
        if self.backend == "triton":
            return super().launches()
        library = nvcc.extension()
        with recording(self.arch):
            return [self.cuda_launch(library, launch) for launch in library.record(self.call)]

    def cuda_launch(self, library: nvcc.Library, launch: nvcc.Launch) -> CudaLaunch:
        match = re.search(r"(\w+)(<.*>)?\(", launch.kernel.replace("(anonymous namespace)", ""))
        name = match[1] if match else launch.kernel
        tokens, threads = self.window**2, math.prod(launch.block)
        turns, moved = None, None
        if name in ("WholeForwardKernel", "WholeBackwardKernel"):
            turns = Turns(True, (1,))
        elif name == "TiledForwardKernel":
            # blocks that share a window's rows, chunks of its keys, and the copies that a thread starts for a stage
            width, keys = (int(number) for number in re.findall(r"\b\d+\b", launch.kernel)[:2])
            groups, chunks = math.ceil(math.ceil(tokens / 16) / (threads // 32)), math.ceil(tokens / keys)
            row = width * getattr(torch, self.dtype).itemsize
            stage = self.stage_chunks(launch, chunks, keys, row + WIDE)
            copies = math.ceil(stage * keys * row / WIDE / threads)
            trips = groups, chunks, copies * math.ceil(chunks / stage) / chunks
            turns = Turns(True, trips, fmas=keys * width // 2, stage=(copies,))
        elif name == "TiledBackwardKernel":
            # the same, of queries or of keys, a chunk a stage; for dq the keys are taken twice, but where the forward's
            # output is exact enough; dbias is of one chunk a block
            width, keys, kind = (int(number) for number in re.findall(r"\b\d+\b", launch.kernel)[:3])
            groups, chunks = math.ceil(math.ceil(tokens / 16) / (threads // 32)), math.ceil(tokens / keys)
            copies = math.ceil(keys * width * getattr(torch, self.dtype).itemsize / WIDE / threads)
            twice = self.dtype == "float32" or self.op.startswith("cosine") or tokens <= 64
            passes = 2 if kind == 0 and twice else 1
            trips = (groups * chunks, 1, copies) if kind == 4 else (groups, chunks * passes, copies)
            turns = Turns(True, trips, fmas=keys * width // 2)
            name = f"{name} {('dq', 'dk', 'dv', 'dkdv', 'dbias')[kind]}"
        elif name == "SumKernel" and self.op in ATTENTION:
            # a warp adds every so manieth partial
            partials, size = launch.integers
            turns = Turns(False, (), loads=4 * math.ceil(partials / (threads // 32)))
            moved = (partials + 1) * size * 4 / self.items
        elif name == "CyclicShiftKernel":
            # images of the batch that share a block, and four vectors of a line a thread
            vectors = self.size * self.heads * self.head_dim * getattr(torch, self.dtype).itemsize // WIDE
            images = math.ceil(self.batch / (launch.grid[1] * launch.block[2]))
            turns = Turns(False, (images, math.ceil(vectors / (4 * launch.block[0]))))
        elif self.op in BIAS:
            turns, moved = self.bias_turns(name, launch), self.bias_bytes(name)
        if name in MOVES:
            *tensors, floats = MOVES[name]
            moved = sum(tensors) * self.vector_bytes
            moved += floats * 4 * self.batch * self.size**2 * self.heads // self.items
        cubin = library.assemble(launch.symbol, self.arch).read_bytes()
        return CudaLaunch(name, cubin, launch.grid, math.ceil(threads / 32), launch.shared, turns, moved)

    def stage_chunks(self, launch: nvcc.Launch, chunks: int, keys: int, row: int) -> int:
        """Of the tiled forward pass: what shared memory has room for beside queries, sides and, maybe, the bias.

        ``row``: bytes of a row in shared memory
        """
        warps, chunk = launch.block[0] // 32, 4 * keys * (row + 1)
        left = launch.shared - 2 * 16 * warps * row - 4 * chunks * keys
        bias = 64 * warps * chunks * keys
        found = [room // chunk for room in (left - bias, left) if room > 0 and room % chunk == 0]
        assert found, f"{launch.shared} bytes of shared memory hold no whole number of chunks of {chunk}"
        return found[0]

    def bias_turns(self, name: str, launch: nvcc.Launch) -> Turns | None:
        """Of the CUDA kernels of the position biases, which are called with float32 here."""
        tokens, (x, y, _) = self.window**2, launch.block
        if name == "ExpandKernel":
            # threads y over a block's queries and x over vectors of keys; first they copy the rows that these share
            vector = int(re.findall(r"\b\d+\b", launch.kernel)[0])
            queries = math.ceil(tokens / launch.grid[0])
            lines = self.window - 1 + (queries - 1) // self.window
            rows = tokens + queries - 1 + lines * (self.window - 1)
            trips = math.ceil(tokens / vector / x), math.ceil(queries / y)
            return Turns(False, trips, loads=4 * math.ceil(rows / (x * y)))
        if name == "SumKernel":
            # threads y over the lines of a block, of which here is the mean
            return Turns(False, (tokens / launch.grid[0] / y,), loads=4 * self.window)
        if name == "TableKernel":
            # a lane takes every 32nd hidden unit: three numbers, and its weights to eight heads
            _, _, hidden = launch.integers
            return Turns(False, (), loads=4 * (3 + 8) * math.ceil(hidden / 32))
        if name == "WeightsKernel":
            rows, heads, _ = launch.integers
            return Turns(False, (math.ceil(heads / 8), math.ceil(rows / x)))
        return None

    def bias_bytes(self, name: str) -> float | None:
        """What they move for a head."""
        rows, network = (2 * self.window - 1) ** 2, (3 + self.heads) * self.hidden / self.heads
        numbers = {
            "ExpandKernel": rows + self.window**4,
            "SumKernel": self.window**4 + rows * (2 if self.op in CONTINUOUS_BIAS else 1),
            "TableKernel": network + rows,
            "WeightsKernel": rows + 2 * network,
        }
        return numbers[name] * 4 if name in numbers else None

    @property
    def vector_bytes(self) -> int:
        """Of one item's part of q, or of an image."""
        size = self.heads * self.head_dim * getattr(torch, self.dtype).itemsize
        return self.batch * self.size**2 * size // self.items

    def labels(self) -> list[str]:
        return [
            f"{self.window}{'p' if self.padded else ''}",
            *(["-", "-", "float32"] if self.op in BIAS else [str(self.shift), str(self.head_dim), self.dtype]),
            self.bias if self.op in ATTENTION else "-",
        ]

    @property
    def wide(self) -> bool:
        return self.head_dim == 32

    def bounded(self, row: Row) -> bool:
        forward = self.op in FORWARD and self.arch in (80, 90)
        return forward and self.window in (7, 8) and self.head_dim == 32 and not self.padded


@dataclass(frozen=True)
class NormCase(Call):
    """A call of a norm: with float32 weights and, where there is a residual sum, factors of samples.

    ``dtype`` is that of branches and projections, ``stream`` that of the residual stream: float32 under autocast.
    """

    arch: int
    op: str
    channels: int
    dtype: str = "bfloat16"
    stream: str = "bfloat16"
    padded: bool = False

    backend = "triton"
    batch = 64

    def __str__(self) -> str:
        text = f"sm_{self.arch} {self.op} channels {self.channels} {self.dtype} stream {self.stream}"
        return text + " padded" * self.padded

    @property
    def wide(self) -> bool:
        return True

    @property
    def merging(self) -> bool:
        return self.op.startswith("patch_merging")

    @property
    def row(self) -> int:
        """Channels of a row."""
        return self.channels * (4 if self.merging else 1)

    @property
    def size(self) -> int:
        """Height and width of the image: Swin's at this many channels, even where it is merged."""
        size = max(7 * (1 + self.merging), 56 * 96 // self.channels // 14 * 14)
        return size - 1 if self.padded else size

    @property
    def rows(self) -> tuple[int, int, int]:
        """Batch, height and width of the rows."""
        side = math.ceil(self.size / 2) if self.merging else self.size
        return self.batch, side, side

    @property
    def items(self) -> int:
        return math.prod(self.rows)

    def labels(self) -> list[str]:
        return [f"{self.channels}{'p' if self.padded else ''}", self.dtype, self.stream]

    def call(self) -> None:
        launch = getattr(importlib.import_module("swinops.kernels"), self.op)
        dtype, stream = getattr(torch, self.dtype), getattr(torch, self.stream)
        x = torch.empty(self.batch, self.size, self.size, self.channels, dtype=stream)
        y = torch.empty(*self.rows, self.row, dtype=dtype)
        mean, scale, weight = torch.empty(self.rows), torch.empty(self.batch), torch.empty(self.row)
        # outputs and gradients may lie where inputs do: nothing is written
        arguments: dict[str, tuple[object, ...]] = {
            "layer_norm": (x, weight, weight, 1e-5, dtype),
            "layer_norm_backward": (y, x, mean, mean, weight, x, weight, weight),
            "add_layer_norm": (x, y, scale, weight, weight, 1e-5, dtype),
            "add_layer_norm_backward": (x, y, x, mean, mean, scale, weight, x, y, weight, weight),
            "layer_norm_add": (x, y, scale, weight, weight, 1e-5),
            "layer_norm_add_backward": (x, y, mean, mean, scale, weight, y, weight, weight),
            "patch_merging_norm": (x, weight, weight, 1e-5, dtype),
            "patch_merging_norm_backward": (y, x, mean, mean, weight, x, weight, weight),
        }
        launch(*arguments[self.op])

    def bounded(self, row: Row) -> bool:
        return row.kernel in NORM_KERNELS and self.arch in (80, 90)


class Failure(NamedTuple):
    bar: str
    kernel: str
    case: str
    value: str
    limit: str

    def __str__(self) -> str:
        return f"{self.bar}: {self.kernel}, {self.case}: {self.value}, limit {self.limit}"


def failures(case: Call, rows: Sequence[Row]) -> list[Failure]:
    """The bars that an op's kernels miss.

    Of float32, and of the ops that only move data, only that a block fits; of the continuous bias the stack too.
    """
    found: list[Failure] = []

    def bar(name: str, row: Row, passes: bool, value: object, limit: object) -> None:
        if not passes:
            found.append(Failure(name, row.kernel, str(case), str(value), str(limit)))

    for row in rows:
        bar("resources", row, row.blocks_per_sm > 0, f"no block fits, by {row.limited_by}", "1 block on an SM")
        if case.op in CONTINUOUS_BIAS:
            bar("stack", row, row.stack <= STACK_LIMIT, f"{row.stack} bytes", f"{STACK_LIMIT} bytes")
        if case.op not in VECTORS or case.dtype == "float32":
            continue
        bar("stack", row, row.stack <= STACK_LIMIT, f"{row.stack} bytes", f"{STACK_LIMIT} bytes")
        bar("local memory", row, row.local_hot == 0, f"{row.local_hot} instructions in the hot loop", 0)
        if case.op in ATTENTION and row.kernel != "SumKernel":
            bar("tensor cores", row, bool(row.tensor_core), "no tensor-core instruction", "1")
        if case.backend == "cuda":
            cuda_failures(case, row, bar)
        elif case.wide:
            vectors = VECTORS[case.op] | {"out", "?"}
            narrow = {n: min(widths) for n, widths in row.accesses.items() if n in vectors and min(widths) < WIDE}
            bar("128-bit accesses", row, not narrow, f"bytes an access {narrow}", f"{WIDE} bytes")
            # what the compiler asked for, and what the assembler made of it: split, or left out if no lane needs it
            asked = Counter(width >= WIDE for widths in row.accesses.values() for width in widths)
            made: Counter[bool] = Counter()
            for counts in (row.loads, row.stores):
                for width, n in counts.items():
                    made[width >= WIDE] += n
            kept = made[True] >= asked[True] or made[False] <= asked[False]
            bar("128-bit accesses", row, kept, f"{made[True]} in the machine code", f"{asked[True]}, as in the PTX")
        if case.bounded(row):
            share = ISSUE_SHARE.get((case.backend, row.arch), 1.0)
            memory = (row.memory_ns or 0.0) * share
            issue = "unknown" if row.issue_ns is None else f"{row.issue_ns[0]:.2f} ns"
            limit = f"memory time {memory:.2f} ns" if share == 1 else f"{share} of the memory time, {memory:.2f} ns"
            bar("issue time", row, row.issue_ns is not None and row.issue_ns[0] < memory, issue, limit)
        if row.kernel in NORM_KERNELS:
            device = DEVICES[row.arch]
            fit = row.blocks_per_sm * device.multiprocessors
            bar("one wave", row, row.programs <= fit, f"{row.programs} programs", f"{fit} that run at once")
            if case.bounded(row):
                needed = bytes_needed(row.arch)
                bar("bytes in flight", row, row.bytes_in_flight >= needed, f"{row.bytes_in_flight} on an SM", needed)
    if rows and case.op in VECTORS and case.backend == "triton":
        missing = VECTORS[case.op] - {name for row in rows for name in row.accesses}
        bar("128-bit accesses", rows[0], not missing, f"no access to {sorted(missing)} was found", "each tensor")
    return found


Bar = Callable[[str, Row, bool, object, object], None]


def cuda_failures(case: Call, row: Row, bar: Bar) -> None:
    needed = bytes_needed(row.arch)
    warps = row.warps * row.blocks_per_sm
    value = f"{row.registers} a thread, with {warps} warps and {row.bytes_in_flight} bytes in flight on an SM"
    enough = warps >= ENOUGH_WARPS or row.bytes_in_flight >= needed
    bar("registers", row, enough, value, f"128, with {ENOUGH_WARPS} warps, or {needed} bytes")
    if case.wide and isinstance(case, Case) and row.wide is not None and row.kernel in MOVES:
        # the bytes have to come from somewhere: as much as the tensors hold, by accesses of a kind
        for access, done, tensors in zip(("loaded", "stored"), row.wide, MOVES[row.kernel], strict=False):
            least = tensors * case.vector_bytes
            bar("128-bit accesses", row, done >= least, f"{done} bytes of an item {access} by them", f"all {least}")


def bytes_needed(arch: int) -> int:
    """In flight on a multiprocessor, to keep the memory busy."""
    device = DEVICES[arch]
    return math.ceil(device.bandwidth * LATENCY / device.multiprocessors)


def slower(done: Sequence[tuple[Call, list[Row], list[Failure]]]) -> Iterator[Failure]:
    """The calls that must be bound by memory and of which CUDA's kernel issues for longer than Triton's."""
    calls = {case: rows for case, rows, _ in done if isinstance(case, Case)}
    for case, rows in calls.items():
        others = calls.get(replace(case, backend="triton"))
        if case.backend == "cuda" and rows and others and case.bounded(rows[0]):
            (row,), (other,) = rows, others
            if row.issue_ns and other.issue_ns and row.issue_ns[0] > other.issue_ns[0]:
                times = f"{row.issue_ns[0]:.2f} ns", f"{other.issue_ns[0]:.2f} ns, as Triton's"
                yield Failure("issue time", row.kernel, str(case), *times)


LABELS = {Case: ("window", "shift", "head_dim", "dtype", "bias"), NormCase: ("channels", "dtype", "stream")}
COLUMNS = (
    *("warps", "regs", "stack", "local", "smem"),
    *("blocks", "in_flight", "ld128", "ld_less", "st128", "st_less", "narrow", "tensor_core", "hot_loop", "issue_ns"),
    *("memory_ns", "bound"),
)


def cells(case: Call, row: Row) -> list[str]:
    """A row of the table. "a+b": in the hot loop and outside. "a/b": along the longest way and the shortest.

    local: local-memory instructions; blocks: resident of those that fit, and what limits them; narrow: bytes an access
    to the tensors that are not accessed by 16 bytes; hot_loop: instructions a warp in one turn.
    """

    def ways(values: Sequence[float] | None, form: str) -> str:
        return "?" if values is None else "/".join(dict.fromkeys(format(value, form) for value in values))

    def split(counts: dict[int, int], hot: dict[int, int]) -> list[str]:
        pairs = []
        for chosen in ({w for w in counts if w >= WIDE}, {w for w in counts if w < WIDE}):
            inside = sum(n for w, n in hot.items() if w in chosen)
            pairs.append(f"{inside}+{sum(n for w, n in counts.items() if w in chosen) - inside}")
        return pairs

    narrow = {name: min(widths) for name, widths in sorted(row.accesses.items()) if min(widths) < WIDE}
    return [
        f"sm_{case.arch}",
        case.backend,
        case.op,
        row.kernel.strip("_").removesuffix("_kernel").removesuffix("Kernel"),
        *case.labels(),
        str(row.warps),
        str(row.registers),
        str(row.stack),
        f"{row.local_hot}+{row.local_cold}",
        str(row.shared),
        f"{row.resident} of {row.blocks_per_sm} ({row.limited_by})",
        str(row.bytes_in_flight),
        *split(row.loads, row.hot_loads),
        *split(row.stores, row.hot_stores),
        " ".join(f"{name}:{width}" for name, width in narrow.items()) or "-",
        " ".join(f"{n} {name}" for name, n in row.tensor_core.items()) or "-",
        ways(row.hot_loop, "d"),
        ways(row.issue_ns, ".2f"),
        "?" if row.memory_ns is None else f"{row.memory_ns:.2f}",
        row.bound,
    ]


def cases(arguments: argparse.Namespace) -> list[Call]:
    chosen: list[Call] = []
    for arch, backend in itertools.product(arguments.arch, arguments.backend):
        for op in arguments.op:
            if not hasattr(backends.module(backend), op):
                continue
            if op in NORMS:
                for channels, dtype in itertools.product(arguments.channels, arguments.dtype):
                    if channels <= 768 or not op.startswith("patch_merging"):
                        streams = (dtype, "float32")
                        chosen += [NormCase(arch, op, channels, dtype, x, arguments.padded) for x in streams]
                continue
            for window in arguments.window:
                if op in BIAS:
                    chosen.append(Case(arch, op, window, backend=backend))
                    continue
                # a window of thousands of tokens, at the head dimension of published models only
                for head_dim in arguments.head_dim if window < 48 else [32]:
                    for dtype in arguments.dtype:
                        shifts = [(0, "float32"), (window // 2, "float32")]
                        if op in ATTENTION:
                            shifts.append((window // 2, dtype))
                        if backend == "cuda":  # one kernel serves them all
                            shifts = shifts[1:2]
                        for shift, bias in shifts:
                            if arguments.shift is None or (shift > 0) == arguments.shift or len(shifts) == 1:
                                rest = head_dim, dtype, bias, arguments.padded, backend
                                chosen.append(Case(arch, op, window, shift, *rest))
    return list(dict.fromkeys(chosen))


def outcome(case: Call) -> tuple[Call, list[Row], list[Failure]]:
    """Rows and failures of a case; that a kernel does not compile is one."""
    try:
        rows = case.measure()
    except Exception as error:
        return case, [], [Failure("compiles", case.op, str(case), f"{type(error).__name__}: {error}", "it compiles")]
    return case, rows, failures(case, rows)


def outcomes(chosen: Sequence[Call], jobs: int) -> Iterator[tuple[Call, list[Row], list[Failure]]]:
    if jobs == 1:
        yield from map(outcome, chosen)
        return
    # spawned: torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        # not neighbours at once: they may wait for one another to compile a file that both need
        apart = [case for first in range(jobs) for case in chosen[first::jobs]]
        for future in as_completed([pool.submit(outcome, case) for case in apart]):
            yield future.result()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compile the Triton and the CUDA kernels ahead of time and check what became of them."
    )
    parser.add_argument("--backend", choices=[*BACKENDS, "both"], default="both")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--window", type=int, nargs="+", default=[4, 7, 8, 12, 16, 24, 48])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument(
        "--channels",
        type=int,
        nargs="+",
        default=[96, 128, 192, 384, 768, 1536, 3072],
        help="of the norms; patch merging, whose rows have four times as many, takes those to 768",
    )
    parser.add_argument(
        "--dtype", nargs="+", choices=["float16", "bfloat16", "float32"], default=["float16", "bfloat16"]
    )
    parser.add_argument("--shift", action=argparse.BooleanOptionalAction, help="only shifted windows, or none")
    parser.add_argument("--padded", action="store_true", help="images that the window, or merging, does not divide")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows and the failures there")
    arguments = parser.parse_args(argv)
    for name in ("window", "head_dim", "channels"):
        if least := [n for n in getattr(arguments, name) if n < 1]:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {least[0]}")
    arguments.backend = BACKENDS if arguments.backend == "both" else (arguments.backend,)
    if "cuda" in arguments.backend and (reason := nvcc.why_not()):
        if arguments.backend == ("cuda",):
            parser.error(reason)
        print(f"Triton only: {reason}")
        arguments.backend = ("triton",)
    if "triton" in arguments.backend and triton.knobs.runtime.interpret:
        parser.error("the kernels are interpreted in this process: unset TRITON_INTERPRET")

    chosen = cases(arguments)
    if not chosen:
        backends, ops = (" or ".join(names) for names in (arguments.backend, arguments.op))
        parser.error(f"there is no kernel of {ops} for {backends} among what was asked for")
    done: list[tuple[Call, list[Row], list[Failure]]] = []
    with progress(len(chosen)) as advance:
        for result in outcomes(chosen, max(1, arguments.jobs)):
            done.append(result)
            advance()
    done.sort(key=lambda result: chosen.index(result[0]))

    for kind, labels in LABELS.items():
        lines = [cells(case, row) for case, rows, _ in done if isinstance(case, kind) for row in rows]
        if lines:
            print("\n".join(aligned([("arch", "backend", "op", "kernel", *labels, *COLUMNS), *lines])))
    for arch in arguments.arch:
        device = DEVICES[arch]
        print(
            f"sm_{arch}: as an {device.name}, {device.multiprocessors} SMs at {device.clock / 1e9:.3f} GHz, "
            f"{device.bandwidth / 1e12:.2f} TB/s, nominal"
        )
    print(NOT_A_TIMING)
    missed = [*(failure for _, _, failed in done for failure in failed), *slower(done)]
    for failure in missed:
        print(f"FAILED {failure}")
    print(f"{sum(len(rows) for _, rows, _ in done)} kernels compiled, {len(missed)} bars missed")
    if arguments.json:
        write_json(arguments.json, done, missed)
    return 1 if missed else 0


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[], object]]:
    """A bar on a terminal, where tqdm is installed."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            with tqdm(total=total, unit="call", desc="compiling") as bar:
                yield bar.update
            return
    yield lambda: None


def write_json(path: Path, done: Sequence[tuple[Call, list[Row], list[Failure]]], missed: Sequence[Failure]) -> None:
    report = {
        "note": NOT_A_TIMING,
        "triton": triton.__version__,
        "nvcc": nvcc.version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "devices": {f"sm_{arch}": device._asdict() for arch, device in DEVICES.items()},
        "rows": [asdict(row) for _, rows, _ in done for row in rows],
        "failures": [failure._asdict() for failure in missed],
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
