"""Builds csrc/ into swinops._C with nvcc and pybind11, without importing torch.

Without nvcc, or with SWINOPS_CUDA=0, builds a package without CUDA that holds the reason in swinops/_no_cuda.txt.
SWINOPS_CUDA_ARCHS chooses architectures: "90;100+PTX". Otherwise: those of the GPUs present, else DEFAULT_ARCHS.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
DEFAULT_ARCHS = ("80", "90", "100", "120")


def find_nvcc() -> tuple[str | None, str | None]:
    """The nvcc to build with, or else why there is none."""
    if os.environ.get("SWINOPS_CUDA") == "0":
        return None, "swinops was built with SWINOPS_CUDA=0"
    if sys.platform != "linux":
        return None, f"CUDA kernels are built on Linux only, and swinops was built on {sys.platform}"
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for path in [*(os.path.join(home, "bin") for home in homes), None]:  # None: PATH
        if nvcc := shutil.which("nvcc", path=path):
            return nvcc, None
    return None, "no nvcc was found in CUDA_HOME, CUDA_PATH or PATH when swinops was built"


def output_of(*command: str) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def choose_archs(nvcc: str) -> list[str]:
    """Architectures to compile for, such as ["90", "100+PTX"]."""
    known = sorted((code.removeprefix("sm_") for code in output_of(nvcc, "--list-gpu-code")), key=int)
    if asked := os.environ.get("SWINOPS_CUDA_ARCHS"):
        archs = [arch.strip() for arch in asked.split(";")]
        for arch in archs:
            # "90a" and "100f", the targets whose features do not carry over, come with the plain ones
            match = re.fullmatch(r"(\d+)[af]?(\+PTX)?", arch)
            if match is None or match[1] not in known:
                raise SystemExit(
                    'SWINOPS_CUDA_ARCHS must look like "90;100+PTX", each architecture one of those '
                    f"that this nvcc knows ({', '.join(known)}), got {asked!r}"
                )
        return archs
    try:
        capabilities = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    except (OSError, subprocess.CalledProcessError):
        capabilities = []
    present = {capability.replace(".", "") for capability in capabilities}
    if present and present <= set(known):
        return sorted(present, key=int)
    archs = [arch for arch in DEFAULT_ARCHS if arch in known]
    if not archs:
        raise SystemExit(f"{nvcc} knows none of the architectures {', '.join(DEFAULT_ARCHS)}: set SWINOPS_CUDA=0")
    return [*archs[:-1], archs[-1] + "+PTX"]


def gencode(arch: str) -> list[str]:
    number = arch.removesuffix("+PTX")
    codes = [f"sm_{number}"] + [f"compute_{number}"] * arch.endswith("+PTX")
    return [f"-gencode=arch=compute_{number},code={code}" for code in codes]


class BuildExtension(build_ext):
    """nvcc compiles the files side by side, and links them."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        archs = choose_archs(NVCC)
        library = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp, "csrc")
        for folder in (library.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        codes = [flag for arch in archs for flag in gencode(arch)]
        flags = [
            *("-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", *codes),
            f'-DSWINOPS_ARCHS="{";".join(archs)}"',
            *(f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))),
        ]
        compiled = [str(objects / f"{Path(source).stem}.o") for source in ext.sources]
        commands = [[NVCC, "-c", *flags, s, "-o", o] for s, o in zip(ext.sources, compiled, strict=True)]
        # the longest first, or all would wait for it at the end
        commands.sort(key=lambda command: -os.path.getsize(command[-3]))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(nvcc, commands))
        # the runtime goes into the library and stays hidden there: torch brings its own
        link = [NVCC, "-shared", *codes, "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
        nvcc([*link, *compiled, "-o", str(library)])


def nvcc(command: list[str]) -> None:
    print(*command, flush=True)
    if code := subprocess.run(command).returncode:
        raise SystemExit(f"nvcc failed with exit status {code}; SWINOPS_CUDA=0 builds swinops without CUDA")


class BuildPython(build_py):
    """Adds the reason why there is no extension, where there is none."""

    def run(self) -> None:
        super().run()
        # an editable install runs from the source tree, where an earlier build may have left its own
        package = ROOT / "swinops" if self.editable_mode else Path(self.build_lib, "swinops")
        package.mkdir(parents=True, exist_ok=True)
        for stale in ("_C" + sysconfig.get_config_var("EXT_SUFFIX"), "_no_cuda.txt"):
            (package / stale).unlink(missing_ok=True)
        if WHY_NO_CUDA is not None:
            (package / "_no_cuda.txt").write_text(WHY_NO_CUDA + "\n")


NVCC, WHY_NO_CUDA = find_nvcc()
if WHY_NO_CUDA is not None:
    print(f"building swinops without CUDA: {WHY_NO_CUDA}", file=sys.stderr)

sources = sorted(str(path.relative_to(ROOT)) for pattern in ("*.cu", "*.cpp") for path in (ROOT / "csrc").glob(pattern))
setup(
    packages=[*find_packages(include=["swinops", "swinops.*"]), "swinops.kernels", "swinops.benchmarks"],
    package_dir={"swinops.kernels": "kernels", "swinops.benchmarks": "benchmarks"},
    ext_modules=[Extension("swinops._C", sources)] if NVCC else [],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
