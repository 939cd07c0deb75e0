"""What the compiler made of the Triton kernels, and the bars it must pass. Needs no GPU.

The package's own launchers are called on CPU tensors whose memory is never touched, with a stand-in for Triton's
driver: each kernel they would launch is specialised (divisibility, strides of 1) and compiled as on the GPU it names,
then disassembled.

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
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

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
ONCE = {"logit_scale", "bias", "pad", "dlogit_scale", "dbias", "dpad"}


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


@dataclass
class Launch:
    """A kernel that was compiled in place of being launched. ``arguments``: what it was given, by name."""

    name: str
    compiled: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {n.removesuffix("_ptr"): x for n, x in self.arguments.items() if isinstance(x, torch.Tensor)}

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

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
def compiling(arch: int) -> Iterator[list[Launch]]:
    """Within, kernels are compiled for ``arch`` and listed, not launched, with the configurations for that device."""
    tuning = importlib.import_module("swinops.kernels.tuning")
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        self.device_caches.clear()  # they hold kernels of the last architecture
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        self.device_caches.clear()
        arguments = dict(zip(self.arg_names, args, strict=False)) | {
            n: x for n, x in kwargs.items() if n in self.arg_names
        }
        launches.append(Launch(self.fn.__name__, compiled, grid(arguments) if callable(grid) else grid, arguments))
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


TENSOR_CORE = re.compile(r"[HIDBQO]G?MMA$|UTC\w*MMA$")
BULK = {"UBLKCP", "UTMALDG", "UTMASTG"}
GLOBAL_LOAD = {"LDG", "LDGSTS", "LD", "UBLKCP", "UTMALDG"}
GLOBAL_STORE = {"STG", "ST", "UTMASTG"}
LOCAL = {"LDL", "STL"}
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
    def hot(self) -> bool:
        """What tells a loop over windows or tiles from one that waits."""
        return self.tensor_core or self.name in GLOBAL_LOAD


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

    def nest(self) -> list[Loop]:
        """The hot loop and its inner one, and so on: at each depth the one with the most tensor-core instructions."""

        def weight(loop: Loop) -> tuple[int, int]:
            code = self.instructions(loop)
            return sum(x.tensor_core for x in code), len(code)

        chain: list[Loop] = []
        while inner := [
            loop
            for loop in self.loops
            if loop.parent is (chain[-1] if chain else None) and any(x.hot for x in self.instructions(loop))
        ]:
            chain.append(max(inner, key=weight))
        return chain

    def count(self, loop: Loop | None, trips: Sequence[int], choose: Callable[[Iterable[int]], int]) -> int:
        """Instructions that a warp issues in one turn of a loop, or from entry to exit, the longest or shortest way.

        ``trips``: how often the loops inside turn, by depth; a loop that only waits turns once.
        """
        region = loop.blocks if loop else self.reachable
        start = loop.header if loop else 0
        inside = {block: inner for inner in self.loops if inner.parent is loop for block in inner.blocks}

        @functools.cache
        def ahead(block: int) -> int | None:
            inner = inside.get(block)
            if inner is None:
                length, successors = len(self.blocks[block]), self.successors[block]
            else:
                hot = any(x.hot for x in self.instructions(inner))
                turns = trips[0] if hot and trips else 1
                length = turns * self.count(inner, trips[1:] if hot else (), choose)
                successors = {s for b in inner.blocks for s in self.successors[b]} - inner.blocks
            ends = start in successors if loop else not successors
            rest = [n for s in successors if s in region and s != start and (n := ahead(s)) is not None]
            return length + choose([*rest, *([0] if ends else [])]) if rest or ends else None

        return ahead(start) or 0


def tool(name: str, *arguments: str) -> str:
    """Run one of the CUDA tools that come in Triton's wheel."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed with exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def disassemble(cubin: bytes) -> tuple[Program, dict[str, int]]:
    """A kernel's machine code, and its resources: REG a thread, STACK in bytes a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        return Program(tool("nvdisasm", "-c", file.name)), {
            n: int(v) for n, v in re.findall(r"(REG|STACK):(\d+)", usage)
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


class Turns(NamedTuple):
    """How often loops turn, by depth. ``persistent``: the outer one does ``items`` items in ``trips[0]`` turns."""

    persistent: bool
    trips: tuple[int, ...]
    items: float = 1


def turns(launch: Launch) -> Turns | None:
    """Known for the package's kernels, but for one that has two loops side by side; None for others."""
    tokens = math.prod(launch.arguments.get("WINDOW", (1,)))

    def tiles(block: str) -> int:
        return math.ceil(tokens / launch.arguments[block])

    if launch.name in ("_forward_kernel", "_backward_kernel"):
        return Turns(True, (1,))
    if launch.name in ("_forward_tiled_kernel", "_dq_kernel"):
        return Turns(True, (tiles("BLOCK_M"), tiles("BLOCK_N")))
    if launch.name == "_dkdv_kernel":
        return Turns(True, (tiles("BLOCK_N"), tiles("BLOCK_M")))
    if launch.name == "_dbias_kernel":
        return Turns(True, (tiles("BLOCK_M") * tiles("BLOCK_N"),))
    if launch.name in ("_shift_kernel", "_expand_kernel"):
        return Turns(False, ())
    if launch.name == "_reduce_kernel":
        return Turns(False, (tiles("BLOCK_I"),))
    if launch.name == "_weights_kernel":
        rows = launch.arguments["table_ptr"].shape[0]
        blocks = (launch.arguments["heads"], "BLOCK_H"), (rows, "BLOCK_R")
        return Turns(False, tuple(math.ceil(n / launch.arguments[block]) for n, block in blocks))
    if launch.name in NORM_KERNELS:
        length = launch.arguments["length"]
        return Turns(True, (1,), length / math.ceil(length / launch.arguments["BLOCK_M"]))
    if launch.name == "_sum_kernel":
        return Turns(False, (math.ceil(launch.arguments["programs"] / launch.arguments["BLOCK_P"]),))
    return None


@dataclass
class Row:
    """One kernel of one configuration.

    Times in ns for one item: a (window, head) of attention, a window of partition and merge, a head of the bias, a row
    of a norm, a channel of the sum of its partials. Of two values, the first is along the longest way and the second
    along the shortest: with the border mask and without it, where the compiler left a branch.
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
    instructions: tuple[int, int] | None  # a warp, for one item; of a norm, for one tile of rows
    issue_ns: tuple[float, float] | None
    bytes: int  # that must move for one item
    memory_ns: float
    bound: str
    case: dict[str, Any] = field(default_factory=dict)


def measure(launch: Launch, arch: int, items: int, loops: Turns | None = None) -> Row:
    """Disassemble a kernel that does ``items`` items in this launch."""
    device, metadata = DEVICES[arch], launch.compiled.metadata
    program, usage = disassemble(launch.compiled.asm["cubin"])
    nest, loops = program.nest(), loops or turns(launch)
    every = program.instructions()
    hot, inner = (program.instructions(nest[0]), program.instructions(nest[-1])) if nest else (every, every)
    widths: dict[str, list[int]] = {}
    for access in accesses(launch.compiled.asm["ptx"], launch.pointers()):
        widths.setdefault(access.tensor, []).append(access.width)

    def by_width(code: list[Instruction], names: set[str]) -> dict[int, int]:
        return dict(sorted(Counter(x.width for x in code if x.name in names).items()))

    warps = metadata.num_warps
    most, limit = blocks_per_sm(arch, usage["REG"], metadata.shared, warps, getattr(metadata, "tmem_size", 0) or 0)
    resident = min(most, math.ceil(launch.programs / device.multiprocessors))
    hot_loads = by_width(inner, GLOBAL_LOAD)
    # of a norm, the lanes past the last channel load nothing
    filled = launch.arguments["C"] / launch.arguments["BLOCK_C"] if launch.name in NORM_KERNELS else 1
    issued = issue = None
    if loops is not None:
        if loops.persistent and nest:
            ways = [loops.trips[0] * program.count(nest[0], loops.trips[1:], choose) for choose in (max, min)]
        else:
            whole = [program.count(None, loops.trips, choose) for choose in (max, min)]
            ways = [math.ceil(instructions * launch.programs / items) for instructions in whole]
        issued = ways[0], ways[1]
        rate = SCHEDULERS * device.multiprocessors * device.clock / 1e9
        issue = ways[0] * warps / rate / loops.items, ways[1] * warps / rate / loops.items
    moved = {n: x for n, x in launch.tensors.items() if n not in ONCE or not {"q", "k"} & launch.tensors.keys()}
    moved_bytes = sum(x.numel() * x.itemsize for x in moved.values()) // items
    memory = moved_bytes / device.bandwidth * 1e9
    return Row(
        arch=arch,
        kernel=launch.name,
        warps=warps,
        stages=metadata.num_stages,
        registers=usage["REG"],
        stack=usage["STACK"],
        local_hot=sum(x.name in LOCAL for x in hot),
        local_cold=sum(x.name in LOCAL for x in every) - sum(x.name in LOCAL for x in hot),
        shared=metadata.shared,
        programs=launch.programs,
        blocks_per_sm=most,
        limited_by=limit,
        resident=resident,
        bytes_in_flight=int(sum(width * n for width, n in hot_loads.items()) * 32 * warps * resident * filled),
        loads=by_width(every, GLOBAL_LOAD),
        stores=by_width(every, GLOBAL_STORE),
        hot_loads=hot_loads,
        hot_stores=by_width(inner, GLOBAL_STORE),
        accesses=widths,
        tensor_core=dict(Counter(x.name for x in every if x.tensor_core)),
        hot_loop=(program.count(nest[-1], (), max), program.count(nest[-1], (), min)) if nest else (0, 0),
        instructions=issued,
        issue_ns=issue,
        bytes=moved_bytes,
        memory_ns=memory,
        bound="?" if issue is None else "issue" if issue[0] >= memory else "memory",
    )


class Call:
    """One call of one op for one architecture."""

    arch: int
    op: str
    dtype: str

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

    def measure(self) -> list[Row]:
        with compiling(self.arch) as launches:
            self.call()
        rows = []
        for launch in launches:
            items = self.items if launch.name != "_sum_kernel" else 2 * launch.arguments["C"]
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

    heads = 3
    batch = 64

    def __str__(self) -> str:
        parts = [f"sm_{self.arch} {self.op} window {self.window}"]
        if self.op not in BIAS:
            parts += [f"shift {self.shift} head_dim {self.head_dim} {self.dtype}"]
        if self.op in ATTENTION:
            parts += [f"bias {self.bias}"]
        return " ".join([*parts, *["padded"] * self.padded])

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
        kernels = importlib.import_module("swinops.kernels")
        launch = getattr(kernels, self.op)
        dtype, bias_dtype = getattr(torch, self.dtype), getattr(torch, self.bias)
        n, heads, tokens = self.size, self.heads, self.window**2
        window, shift = (self.window,) * 2, (self.shift,) * 2
        if self.op == "relative_position_bias":
            launch(torch.empty((2 * self.window - 1) ** 2, heads), window)
        elif self.op == "relative_position_bias_backward":
            launch(torch.empty(heads, tokens, tokens), window)
        elif self.op in CONTINUOUS_BIAS:
            weights = torch.empty(512, 2), torch.empty(512), torch.empty(heads, 512)
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
        if case.op in ATTENTION:
            bar("tensor cores", row, bool(row.tensor_core), "no tensor-core instruction", "1")
        if case.wide:
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
            issue = "unknown" if row.issue_ns is None else f"{row.issue_ns[0]:.2f} ns"
            bar("issue time", row, row.bound == "memory", issue, f"memory time {row.memory_ns:.2f} ns")
        if row.kernel in NORM_KERNELS:
            device = DEVICES[row.arch]
            fit = row.blocks_per_sm * device.multiprocessors
            bar("one wave", row, row.programs <= fit, f"{row.programs} programs", f"{fit} that run at once")
            if case.bounded(row):
                needed = math.ceil(device.bandwidth * LATENCY / device.multiprocessors)
                bar("bytes in flight", row, row.bytes_in_flight >= needed, f"{row.bytes_in_flight} on an SM", needed)
    if rows and case.op in VECTORS:
        missing = VECTORS[case.op] - {name for row in rows for name in row.accesses}
        bar("128-bit accesses", rows[0], not missing, f"no access to {sorted(missing)} was found", "each tensor")
    return found


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
        case.op,
        row.kernel.strip("_").removesuffix("_kernel"),
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
        f"{row.memory_ns:.2f}",
        row.bound,
    ]


def cases(arguments: argparse.Namespace) -> list[Call]:
    chosen: list[Call] = []
    for arch in arguments.arch:
        for op in arguments.op:
            if op in NORMS:
                for channels, dtype in itertools.product(arguments.channels, arguments.dtype):
                    if channels <= 768 or not op.startswith("patch_merging"):
                        streams = (dtype, "float32")
                        chosen += [NormCase(arch, op, channels, dtype, x, arguments.padded) for x in streams]
                continue
            for window in arguments.window:
                if op in BIAS:
                    chosen.append(Case(arch, op, window))
                    continue
                # a window of thousands of tokens, at the head dimension of published models only
                for head_dim in arguments.head_dim if window < 48 else [32]:
                    for dtype in arguments.dtype:
                        shifts = [(0, "float32"), (window // 2, "float32")]
                        if op in ATTENTION:
                            shifts.append((window // 2, dtype))
                        for shift, bias in shifts:
                            if arguments.shift is None or (shift > 0) == arguments.shift:
                                chosen.append(Case(arch, op, window, shift, head_dim, dtype, bias, arguments.padded))
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
        for future in as_completed([pool.submit(outcome, case) for case in chosen]):
            yield future.result()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compile the Triton kernels ahead of time and check what became of them."
    )
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
    if triton.knobs.runtime.interpret:
        parser.error("the kernels are interpreted in this process: unset TRITON_INTERPRET")

    chosen = cases(arguments)
    done: list[tuple[Call, list[Row], list[Failure]]] = []
    with progress(len(chosen)) as advance:
        for result in outcomes(chosen, max(1, arguments.jobs)):
            done.append(result)
            advance()
    done.sort(key=lambda result: chosen.index(result[0]))

    for kind, labels in LABELS.items():
        lines = [cells(case, row) for case, rows, _ in done if isinstance(case, kind) for row in rows]
        if lines:
            print("\n".join(aligned([("arch", "op", "kernel", *labels, *COLUMNS), *lines])))
    for arch in arguments.arch:
        device = DEVICES[arch]
        print(
            f"sm_{arch}: as an {device.name}, {device.multiprocessors} SMs at {device.clock / 1e9:.3f} GHz, "
            f"{device.bandwidth / 1e12:.2f} TB/s, nominal"
        )
    print(NOT_A_TIMING)
    missed = [failure for _, _, failed in done for failure in failed]
    for failure in missed:
        print(f"FAILED {failure}")
    print(f"{sum(len(rows) for _, rows, _ in done)} kernels compiled, {len(missed)} bars missed")
    if arguments.json:
        write_json(arguments.json, done)
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


def write_json(path: Path, done: Sequence[tuple[Call, list[Row], list[Failure]]]) -> None:
    report = {
        "note": NOT_A_TIMING,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "devices": {f"sm_{arch}": device._asdict() for arch, device in DEVICES.items()},
        "rows": [asdict(row) for _, rows, _ in done for row in rows],
        "failures": [failure._asdict() for _, _, failed in done for failure in failed],
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
