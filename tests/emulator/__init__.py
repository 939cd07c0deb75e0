"""Builds CUDA sources with g++ over the emulator, and runs their kernels on CPU tensors."""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import itertools
import os
import re
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from swinops.backends import cuda

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"swinops-emulator-{os.getuid()}"

FLAGS = ("-O1", "-g1", "-gdwarf-4", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique")
# products and sums are rounded one by one, as they are written: nvcc fuses them where it likes
FLAGS += ("-ffp-contract=off", "-U_FORTIFY_SOURCE", '-DSWINOPS_ARCHS="80"')
# the emulator answers the calls that these insert, at every load, store and possible undefined behaviour of a kernel
KERNEL_FLAGS = (
    "-fsanitize=thread,alignment,bounds,signed-integer-overflow,integer-divide-by-zero",
    "--param=tsan-instrument-func-entry-exit=0",
    "-ftrivial-auto-var-init=pattern",
)


def build(*sources: Path | str) -> Path:
    """A shared library of CUDA files (.cu), C++ files (.cpp) and the emulator. Built once for each content."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_object, (HERE / "emulator.cpp", *map(Path, sources))))
    return once(CACHE / f"{digest(*(path.name for path in objects))}.so", "g++", "-shared", *objects)


def compile_object(source: Path) -> Path:
    flags = [*FLAGS, "-I", HERE, "-I", CSRC]
    if source.suffix == ".cu":
        flags += KERNEL_FLAGS
    elif source == HERE / "emulator.cpp":
        flags += ["-O3"]
    else:
        import pybind11

        flags += ["-O0", "-g0", "-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    content = (path.read_bytes() for path in included(source))
    target = CACHE / f"{source.stem}-{digest(*map(str, flags), *content)}.o"
    return once(target, "g++", *flags, "-c", "-x", "c++", source)


def included(source: Path) -> list[Path]:
    """A source and the files that it includes by quotes, those they include too."""
    found, waiting = [], [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.append(path)
            for name in re.findall(r'#include "(.+)"', path.read_text()):
                # one that is nowhere here is the compiler's own, or the compiler will say so
                there = (folder / name for folder in (path.parent, HERE, CSRC) if (folder / name).exists())
                waiting += itertools.islice(there, 1)
            waiting += [HERE / "cuda_runtime.h"]
    return sorted(found, key=lambda path: path.name)


failures: dict[Path, str] = {}  # of this process: what does not build is not tried again by each test


def once(target: Path, *command: str | Path) -> Path:
    """Make ``target`` by ``command -o target``, unless it is there. Other processes wait for the one that makes it."""
    if target in failures:
        raise RuntimeError(failures[target])
    target.parent.mkdir(mode=0o700, exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            done = subprocess.run([*command, "-o", partial], capture_output=True, text=True)
            if done.returncode:
                failures[target] = f"{' '.join(map(str, command))}\n{done.stderr[:4000]}"
                raise RuntimeError(failures[target])
            partial.rename(target)
    return target


def digest(*parts: str | bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
        sha.update(b"\0")
    return sha.hexdigest()[:16]


class Address(int):
    """A tensor's address, which knows the tensor."""

    tensor: Tensor | None


def address(tensor: Tensor | None) -> Address:
    """In place of ``swinops.backends.cuda.address``: 0 for None."""
    result = Address(0 if tensor is None else tensor.data_ptr())
    result.tensor = tensor
    return result


def extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class Library:
    """A built library. Its functions know the tensors whose addresses they are given, and no other memory."""

    def __init__(self, path: Path, functions: Any = None):
        self.path = path
        self.native = ctypes.CDLL(str(path))
        self.native.emulator_set_seed.argtypes = [ctypes.c_uint64]
        self.native.emulator_register_range.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
        self.native.emulator_error_string.restype = ctypes.c_char_p
        self.functions = functions

    def seed(self, seed: int) -> None:
        """Choose the order in which threads run, and when asynchronous copies read."""
        self.native.emulator_set_seed(seed)

    def launch(self, name: str, *args: Tensor | int) -> None:
        """Call an `extern "C" cudaError_t name(pointers and int64_t ...)`; RuntimeError with what is wrong."""
        for i, value in enumerate(args):
            if not isinstance(value, (Tensor, int)):
                raise TypeError(f"argument {i} of {name} must be a tensor or an int, got {type(value).__name__}")
        function = getattr(self.native, name)
        values = [address(value) if isinstance(value, Tensor) else value for value in args]
        function.argtypes = [ctypes.c_int64] * len(values)
        if error := self.call(function)(*values):
            raise RuntimeError(self.native.emulator_error_string(error).decode())

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.functions, name)
        return self.call(value) if callable(value) else value

    def call(self, function: Any) -> Any:
        def checked(*args: Any, **kwargs: Any) -> Any:
            for name, value in [*((f"argument {i}", value) for i, value in enumerate(args)), *kwargs.items()]:
                self.register(name, value)
            try:
                return function(*args, **kwargs)
            finally:
                self.native.emulator_clear_ranges()

        return checked

    def register(self, name: str, value: Any) -> None:
        if isinstance(value, Address) and value.tensor is not None and value.tensor.numel():
            self.native.emulator_register_range(name.encode(), value, extent(value.tensor))
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                self.register(f"{name}[{i}]", item)


def load(path: Path) -> ModuleType:
    # pybind11 takes a module that has the name of an earlier one for the earlier one
    spec = importlib.util.spec_from_file_location(f"{path.stem}._C", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def extension() -> Library:
    """swinops._C as g++ builds it from csrc/."""
    path = build(*sources())
    return Library(path, load(path))


def sources() -> list[Path]:
    """What setup.py builds swinops._C of."""
    return sorted(path for path in CSRC.iterdir() if path.suffix in (".cu", ".cpp"))


class OnGPU:
    """A CPU tensor that says it lies on a GPU."""

    device = torch.device("cuda")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)


@contextlib.contextmanager
def cuda_backend(library: Library | None = None) -> Iterator[Library]:
    """Within, swinops.backends.cuda runs its ops on CPU tensors, by an extension of its own or the one of csrc/."""
    library = library or extension()
    why_not = cuda.why_not
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "extension", lambda: (library, None))
        patch.setattr(cuda, "address", address)
        # two multiprocessors, so that blocks loop, as on a GPU, with the shared memory of the smallest
        patch.setattr(cuda, "limits", lambda device: (2, 99 << 10))
        patch.setattr(cuda, "why_not", lambda x, *rest: why_not(OnGPU(x), *rest))
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda *device: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 0))
        yield library
