"""What gets built and installed, with nvcc and without, and what importing it does."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from swinops.cli import main

ROOT = Path(__file__).parents[1]

# one worker runs them all: they share builds
pytestmark = pytest.mark.xdist_group("packaging")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc in PATH")


def run(*command, cwd=None, **env):
    """Run with exactly these of the variables that steer a build."""
    steering = ("SWINOPS_CUDA", "SWINOPS_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if name not in steering} | {
        n: str(v) for n, v in env.items()
    }
    return subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)


def python(code, cwd, **env):
    """The JSON that ``code`` prints in a Python of its own."""
    done = run(sys.executable, "-c", code, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# an editable install finds swinops._C even for a swinops that came from elsewhere and has none
WITHOUT_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)]"


def pip_wheel(source, *options, **env):
    """The wheel of ``source``, or the output of the build that failed."""
    out = source.parent / f"wheel{len(list(source.parent.iterdir()))}"
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, *options, source, **env)
    if done.returncode == 0:
        (wheel,) = out.glob("swinops-*.whl")
        return wheel
    return done.stdout + done.stderr


def copy_source(to):
    """A copy of the source tree as a fresh checkout has it: builds leave files behind."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the source tree is not here")
    leave = shutil.ignore_patterns("__pycache__", "*.so", "_no_cuda.txt")
    for name in ("swinops", "kernels", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, to / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


@pytest.fixture
def source(tmp_path):
    return copy_source(tmp_path / "source")


@pytest.fixture
def fake_nvcc(tmp_path):
    """A CUDA whose nvcc knows four architectures, writes its arguments for a library and fails where told to."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\nif [ "$1" = --list-gpu-code ]; then printf "sm_75\\nsm_80\\nsm_90\\nsm_100\\n"; exit; fi\n'
        'if [ -n "$FAIL" ]; then echo "kernel.cu(7): error: $FAIL"; exit 2; fi\n'
        'for last; do :; done; echo "$@" > "$last"\n'
    )
    nvcc.chmod(0o755)
    return nvcc.parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `pip install .` installs, built in an environment that holds the build requirements and nothing else."""
    source = copy_source(tmp_path_factory.mktemp("wheel") / "source")
    arch = {"SWINOPS_CUDA_ARCHS": "90+PTX"}  # each takes minutes
    wheel = pip_wheel(source, **arch)
    if isinstance(wheel, str) and "No matching distribution found for setuptools" in wheel:
        wheel = pip_wheel(source, "--no-build-isolation", **arch)  # no package index can be reached
    assert isinstance(wheel, Path), wheel
    return wheel


@pytest.fixture
def install(tmp_path):
    """Unpacks a wheel where PYTHONPATH finds it before the installed package."""

    def unpack(wheel):
        assert isinstance(wheel, Path), wheel
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "site")
        return tmp_path / "site"

    return unpack


@pytest.fixture
def library(wheel, install):
    (library,) = install(wheel).glob("swinops/_C.*.so")
    return library


def test_wheel_holds_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read("swinops-0.1.0.dist-info/METADATA").decode()
    for package, folder in {
        "swinops": "swinops",
        "swinops/kernels": "kernels",
        "swinops/benchmarks": "benchmarks",
    }.items():
        files = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py"))
        assert names >= {f"{package}/{path}" for path in files}
    pictures = {
        f"swinops/benchmarks/{path.name}" for path in (ROOT / "benchmarks").iterdir() if path.suffix in (".jpg", ".png")
    }
    assert names >= {"swinops/py.typed", "swinops/backends/choice.csv", *pictures}
    assert {name.split("/")[0] for name in names} == {"swinops", "swinops-0.1.0.dist-info"}
    assert "License-Expression: BSD-3-Clause" in metadata and "Requires-Python: >=3.10" in metadata


@needs_nvcc
def test_extension_knows_nothing_of_torch(library):
    needed = run("readelf", "-d", library).stdout
    assert "NEEDED" in needed and not re.search(r"NEEDED.*(torch|c10|cudart|libcuda)", needed)
    symbols = " ".join(line.split()[-1] for line in run("nm", "-D", library).stdout.splitlines())
    assert "PyInit__C" in symbols and not re.search(r"c10|at::|_ZN2at|torch|cuda[A-Z]", symbols)


@needs_nvcc
def test_extension_moves_16_bytes_at_a_time(library):
    cuobjdump = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    code = run(cuobjdump, "-sass", library).stdout
    kernels = re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", code, re.S)
    wide = [body for name, body in kernels if "CyclicShiftKernelI5uint4" in name]
    assert len(wide) > 0 and len(wide) % 2 == 0  # partition and merge, for each architecture
    for body in wide:
        assert body.count("LDG.E.128") >= 4 and body.count("STG.E.128") >= 4
        assert all(".128" in access for access in re.findall(r"\b(?:LDG|STG)\S*", body))
        assert not re.search(r"\b(LDL|STL)\b", body)  # nothing spills


@needs_nvcc
def test_extension_holds_the_architectures_it_names(library):
    code = "import json; from swinops import _C; print(json.dumps(_C.archs))"
    archs = python(code, library.parent, PYTHONPATH=library.parents[1]).split(";")
    cuobjdump = Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin/cuobjdump"
    built = re.findall(r"\.(sm_\w+)\.cubin", run(cuobjdump, "--list-elf", library).stdout)
    assert set(built) == {"sm_" + arch.removesuffix("+PTX") for arch in archs}
    assert ("PTX file" in run(cuobjdump, "--list-ptx", library).stdout) == any("+PTX" in arch for arch in archs)


def test_wheel_imports(wheel, install):
    site = install(wheel)
    code = """
import json, swinops, swinops.kernels, swinops.benchmarks
from swinops.backends import cuda
print(json.dumps([[m.__file__ for m in (swinops, swinops.kernels, swinops.benchmarks)], cuda.extension()[1]]))
"""
    files, missing = python(code, site, PYTHONPATH=site)
    assert all(file.startswith(str(site / "swinops")) for file in files)
    assert (missing is None) == (shutil.which("nvcc") is not None)


@pytest.mark.parametrize(
    "env, reason",
    [
        ({"SWINOPS_CUDA": "0"}, "swinops was built with SWINOPS_CUDA=0"),
        ({"PATH": ""}, "no nvcc was found in CUDA_HOME, CUDA_PATH or PATH when swinops was built"),
    ],
    ids=["SWINOPS_CUDA=0", "no nvcc"],
)
def test_build_without_cuda_says_why(source, install, env, reason):
    wheel = pip_wheel(source, "--no-build-isolation", **env)
    site = install(wheel)
    assert wheel.name == "swinops-0.1.0-py3-none-any.whl"
    info = python(f"{WITHOUT_EDITABLE}; from swinops.cli import main; main(['info', '--json'])", site, PYTHONPATH=site)
    assert info["extension"] == reason
    assert info["backends"]["cuda"]["window_partition"] == reason
    assert info["backends"]["reference"]["window_partition"] is None


@pytest.mark.parametrize(
    "asked, present, flags",
    [
        ("", "", "sm_80 sm_90 sm_100 compute_100"),  # as far as this nvcc knows them
        ("", "9.0\n9.0\n", "sm_90"),
        ("", "8.0\n9.0\n", "sm_80 sm_90"),
        ("", "12.0\n", "sm_80 sm_90 sm_100 compute_100"),  # newer than nvcc
        ("", "[N/A]\n", "sm_80 sm_90 sm_100 compute_100"),
        ("90", "8.0\n", "sm_90"),
        ("80; 100a+PTX", "", "sm_80 sm_100a compute_100a"),
    ],
)
def test_chosen_architectures(source, fake_nvcc, asked, present, flags):
    smi = fake_nvcc / "bin/nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{present}'\n")
    smi.chmod(0o755)
    path = f"{fake_nvcc}/bin:{os.environ['PATH']}"
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=source, PATH=path, SWINOPS_CUDA_ARCHS=asked)
    assert done.returncode == 0, done.stderr
    (library,) = source.glob("build/lib*/swinops/_C.*.so")
    objects = sorted(source.glob("build/temp*/csrc/*.o"))
    assert {path.stem for path in objects} == {
        path.stem for path in (source / "csrc").iterdir() if path.suffix in (".cu", ".cpp")
    }
    assert all(path.name in library.read_text() for path in objects)
    assert {" ".join(re.findall(r"code=((?:sm|compute)_\w+)", path.read_text())) for path in objects} == {flags}


@pytest.mark.parametrize("asked", ["9.0", "90,100", "sm_90", "90;", "120", "90+ptx"])
def test_bad_architectures_get_a_sentence(source, fake_nvcc, asked):
    done = run(sys.executable, "setup.py", "-q", "build_ext", cwd=source, CUDA_HOME=fake_nvcc, SWINOPS_CUDA_ARCHS=asked)
    assert done.returncode == 1
    assert done.stderr == (
        'SWINOPS_CUDA_ARCHS must look like "90;100+PTX", each architecture one of those that this nvcc knows '
        f"(75, 80, 90, 100), got {asked!r}\n"
    )


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_failing_nvcc_fails_the_build(source, fake_nvcc, name):
    output = pip_wheel(source, "--no-build-isolation", **{name: fake_nvcc}, FAIL="expected a ';'")
    assert "kernel.cu(7): error: expected a ';'" in output
    assert "nvcc failed with exit status 2; SWINOPS_CUDA=0 builds swinops without CUDA" in output


def test_editable_install(source, fake_nvcc, tmp_path):
    """`pip install --no-build-isolation --no-deps -e .` without an index: first with CUDA, then without."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    interpreter = tmp_path / "env/bin/python"
    (site,) = (tmp_path / "env").glob("lib/python3*/site-packages")
    (site / "parent.pth").write_text(str(Path(torch.__file__).parents[1]))  # setuptools, pybind11 and torch
    install = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--ignore-installed", "--no-index"]
    install += ["--no-build-isolation", "--no-deps", "-e", source]

    done = run(*install, CUDA_HOME=fake_nvcc)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(source.glob("swinops/_C.*.so"))) == 1
    code = (
        "import swinops, swinops.kernels as k, swinops.benchmarks as b; print(swinops.__file__, k.__file__, b.__file__)"
    )
    files = run(interpreter, "-c", code, cwd=tmp_path).stdout.split()
    assert files == [f"{source}/{folder}/__init__.py" for folder in ("swinops", "kernels", "benchmarks")]

    done = run(*install, SWINOPS_CUDA=0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(source.glob("swinops/_C.*.so")) == []
    info = json.loads(run(tmp_path / "env/bin/swinops", "info", "--json", cwd=tmp_path).stdout)
    assert info["extension"] == "swinops was built with SWINOPS_CUDA=0"


def test_importing_changes_nothing(tmp_path):
    code = """
import json, logging, os, sys, time, warnings
import torch, triton, torch._dynamo

def state():
    places = (torch, torch.nn, torch.nn.functional, torch.nn.Module, torch.Tensor, torch.cuda, torch.autograd, triton)
    values = {(place.__name__, name): id(value) for place in places for name, value in vars(place).items()}
    settings = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_rng_state().sum().item(), dict(os.environ)
    return values, *settings, sys.path[:], sys.meta_path[:], warnings.filters[:], logging.root.handlers[:]

before, start = state(), time.process_time()
import swinops
seconds, after = time.process_time() - start, state()
changed = [name for name, value in before[0].items() if after[0].get(name) != value]
guests = [name for name in ("timm", "torchvision", "transformers", "swinops.benchmarks") if name in sys.modules]
print(json.dumps([changed, before[1:] == after[1:], guests, torch.cuda.is_initialized(), seconds]))
"""
    changed, same_settings, guests, cuda_initialized, seconds = python(code, tmp_path)
    assert changed == [] and same_settings and guests == [] and not cuda_initialized
    assert seconds < 2  # of processor time, so that a busy machine does not matter


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["swinops"] == version("swinops") and facts["torch"].startswith(torch.__version__)
    assert facts["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert list(facts["backends"]) == ["cuda", "triton", "reference"]

    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for backend, reasons in facts["backends"].items():
        assert {"window_partition", "window_merge", "window_attention", "relative_position_bias"} <= set(reasons)
        assert all(f"{backend:<11}" in text and (reason or "runs") in text for reason in reasons.values())


def test_command_without_arguments_shows_its_use(capsys):
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "usage: swinops" in capsys.readouterr().err
