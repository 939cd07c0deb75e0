"""Builds csrc/ with nvcc so that it can be read without a GPU.

The host's code is linked to a stand-in for the CUDA runtime, which reports launches in place of making them, or does
nothing where nobody asked for reports. A kernel is compiled when it is asked for, as the extension's build does it.
Files are kept by content in a temporary folder.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import triton

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CACHE = Path(tempfile.gettempdir()) / f"swinops-static-{os.getuid()}"
# those of setup.py, but for -O3, which is the host compiler's
FLAGS = ("-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden")

RUNTIME = r"""
#include <cstdlib>
#include <map>
#include <cuda_runtime.h>
#include <cxxabi.h>

// symbol, demangled name, blocks, threads, bytes of dynamic shared memory, where the arguments lie
using Report = void (*)(const char*, const char*, const unsigned*, const unsigned*, size_t, void**);

static Report report;
static dim3 next_grid, next_block;
static size_t next_shared;

// kernels register themselves before main, in any order
static std::map<const void*, const char*>& kernels() {
  static std::map<const void*, const char*> symbols;
  return symbols;
}

extern "C" {

__attribute__((visibility("default"))) void swinops_report_to(Report to) { report = to; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* symbol, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[kernel] = symbol;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void*) {
  next_grid = grid, next_block = block, next_shared = shared;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void*) {
  *grid = next_grid, *block = next_block, *shared = next_shared;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  if (report == nullptr) return cudaSuccess;
  const char* symbol = kernels().at(kernel);
  char* name = abi::__cxa_demangle(symbol, nullptr, nullptr, nullptr);
  report(symbol, name ? name : symbol, &grid.x, &block.x, shared, arguments);
  std::free(name);
  return cudaSuccess;
}
// what a launch compiles to from CUDA 13 on
cudaError_t __cudaGetKernel(const void** handle, const void* kernel) {
  *handle = kernel;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInvalidValue ? "invalid value" : "other"; }
}
"""


def why_not() -> str | None:
    """Why the CUDA kernels cannot be read here, in a sentence; None where they can."""
    if not CSRC.is_dir():
        return "the CUDA kernels are read in the source tree only: there is no csrc/ next to this package"
    if nvcc() is None:
        return "the CUDA kernels are compiled by nvcc, and there is none in CUDA_HOME, CUDA_PATH or PATH"
    if importlib.util.find_spec("pybind11") is None:
        return "the CUDA kernels are called through pybind11, which is not installed"
    return None


@functools.cache
def nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(os.path.join(home, "bin") for home in homes), None]  # None: PATH
    return next((found for path in places if (found := shutil.which("nvcc", path=path))), None)


@functools.cache
def version() -> str | None:
    if nvcc() is None:
        return None
    done = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split(", V")[-1].split()[0]


class Launch(NamedTuple):
    """``kernel``: its demangled name; ``shared``: dynamic shared memory in bytes; ``integers``: arguments, in order."""

    symbol: str
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    integers: tuple[int, ...] = ()


REPORT = ctypes.CFUNCTYPE(
    *(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint)),
    *(ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)),
)
INTEGERS = {"int": ctypes.c_int, "long": ctypes.c_long}


def integers(kernel: str, arguments: Any) -> Iterator[int]:
    """Those among a kernel's arguments, of which its demangled name tells the types. ``arguments``: where each lies"""
    name, before = kernel.replace("(anonymous namespace)", ""), ""
    while name != before:  # without what is in angle brackets, the inner ones first
        name, before = re.sub(r"<[^<>]*>", "", name), name
    for i, kind in enumerate(name.partition("(")[2].rstrip(")").split(", ")):
        if kind in INTEGERS:
            yield INTEGERS[kind].from_address(arguments[i]).value


class Library:
    """CUDA and C++ files. With bindings.cpp among them, ``module`` is swinops._C."""

    def __init__(self, sources: Sequence[Path]) -> None:
        CACHE.mkdir(exist_ok=True)
        runtime = written(CACHE / f"{digest(RUNTIME)}.cpp", RUNTIME)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_host, (*sources, runtime)))
        self.objects = dict(zip(sources, objects, strict=False))
        self.path = CACHE / f"{digest(*map(str, objects))}.so"
        made(self.path, nvcc(), "-shared", "-cudart=none", *objects)
        self.native = ctypes.CDLL(str(self.path))

    @functools.cached_property
    def module(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location("_C", self.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def record(self, call: Callable[[], object]) -> list[Launch]:
        """What ``call`` launches."""
        launches: list[Launch] = []

        def report(symbol: bytes, name: bytes, grid: Any, block: Any, shared: int, arguments: Any) -> None:
            kernel = name.decode()
            sizes = tuple(grid[:3]), tuple(block[:3]), shared
            launches.append(Launch(symbol.decode(), kernel, *sizes, tuple(integers(kernel, arguments))))

        callback = REPORT(report)
        self.native.swinops_report_to(callback)
        try:
            call()
        finally:
            self.native.swinops_report_to(None)
        return launches

    def assemble(self, symbol: str, arch: int) -> Path:
        """Compile a kernel for an architecture. -> the cubin"""
        source = next(path for path, made in self.objects.items() if symbol.encode() in made.read_bytes())
        ptx = compiled(source, "ptx", "-ptx", f"-arch=compute_{arch}")
        target = CACHE / f"{ptx.stem}-{digest(symbol)}.cubin"
        return made(target, nvcc(), f"-arch=sm_{arch}", "-cubin", f"-Xptxas=--entry={symbol}", ptx)


@functools.cache
def extension() -> Library:
    """swinops._C"""
    return Library(sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cpp")]))


def compile_host(source: Path) -> Path:
    if source.suffix == ".cu":
        # kernels as well, which register themselves, but only just
        return compiled(source, "o", "-c", "-gencode=arch=compute_80,code=compute_80", "-Xcicc=-O0")
    import pybind11

    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    return compiled(source, "o", "-c", *includes, '-DSWINOPS_ARCHS="none"')


def compiled(source: Path, suffix: str, *flags: str) -> Path:
    headers = sorted({path for folder in (CSRC, source.parent) for path in folder.glob("*.*h")})
    # anonymous namespaces are named after the path
    content = digest(str(version()), *FLAGS, *flags, str(source), *(path.read_bytes() for path in (source, *headers)))
    return made(CACHE / f"{source.stem}-{content}.{suffix}", nvcc(), *FLAGS, f"-I{CSRC}", *flags, source)


def digest(*parts: str | bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
        sha.update(b"\0")
    return sha.hexdigest()[:16]


def tool(name: str, *arguments: str) -> str:
    """Run one of the CUDA tools that come in Triton's wheel."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed with exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def making(target: Path) -> Iterator[Path | None]:
    """-> where to write ``target``, or None where it is there. Other processes wait for the one that makes it."""
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
        else:
            partial = target.with_name(f"partial-{target.name}")
            yield partial
            partial.rename(target)


def written(target: Path, text: str) -> Path:
    with making(target) as partial:
        if partial:
            partial.write_text(text)
    return target


def made(target: Path, *command: str | Path | None) -> Path:
    """Run ``command -o target``."""
    with making(target) as partial:
        if partial:
            done = subprocess.run([*map(str, command), "-o", str(partial)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stderr.strip()[-4000:]}")
    return target
