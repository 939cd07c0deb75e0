"""What every test runs under: Triton's interpreter where there is no GPU, and NaN in uninitialised memory."""

import importlib.util
import os
import shutil
import sys
import zlib

import pytest
import torch

from swinops.published import define_torchvision_ops

NO_GPU = "needs a GPU, and torch sees none here"

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before swinops.kernels is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def correct_interpreter() -> None:
    """Make bfloat16 in Triton's interpreter what it is on a GPU.

    The interpreter keeps bfloat16 as raw 16-bit integers. Its dot multiplies those integers, and its conversion from
    float32 cuts the lower bits off where the hardware rounds to the nearest.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def dot(self, a, b, *rest):
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    def cast(self, src, dst_type):
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            bits = src.data.view(np.uint32)
            rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
            return TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast


def hasten_interpreter() -> None:
    """Halve the interpreter's time: it replaces all of triton.language again at every call of a device function."""
    from triton.runtime import interpreter

    patch_lang = interpreter._patch_lang
    patched = set()  # what the running kernel has replaced, by the globals of the function that needed it

    def patch_once(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    def patch_for_kernel(fn):
        patched.clear()
        patched.add(id(fn.__globals__))
        return patch_lang(fn)

    interpreter.InterpretedFunction.__call__, interpreter._patch_lang = patch_once, patch_for_kernel


define_torchvision_ops()
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    correct_interpreter()
    hasten_interpreter()
if importlib.util.find_spec("hypothesis"):
    import hypothesis

    # the same examples on every machine: a red test is then red for everyone
    hypothesis.settings.register_profile(
        "swinops",
        derandomize=True,
        deadline=None,
        max_examples=40,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("swinops")


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """A kernel that leaves part of its output unwritten must not find yesterday's right answer there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def nothing_warned_yet(monkeypatch):
    """A patched model says why it runs its library's own forward once in a process."""
    if (swap := sys.modules.get("swinops.dropin.swap")) is not None:
        monkeypatch.setattr(swap, "warned", set())


@pytest.fixture
def calls(monkeypatch):
    """Calls of the reference's attention: it runs wherever a test asks for backend "reference"."""
    import swinops.reference

    from .timm_swins import count_calls

    return count_calls(monkeypatch, swinops.reference, ("window_attention", "cosine_attention"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["reference", "triton", "cuda"])
def backend(request, device) -> str:
    """Each backend that can run the op ``OP`` of the test's module (or the test's parameter ``op``) here.

    Without a GPU, CUDA's kernels run in the emulator.
    """
    from swinops.backends import cuda, why_not

    params = getattr(request.node, "callspec", None)
    op = (params.params.get("op") if params else None) or request.module.OP
    if request.param == "cuda" and device.type == "cpu" and op in cuda.OPS:
        request.getfixturevalue("emulated_cuda")
    case = getattr(request.module, "CASES", {}).get(params.params.get("case")) if params else None
    head_dim = getattr(case, "head_dim", 1)
    require(request.param, why_not(request.param, torch.empty(head_dim, device=device), op))
    return request.param


def require(backend: str, reason: str | None) -> None:
    """Skip where ``backend`` has a reason not to run; Triton has none wherever it can be installed."""
    if reason is None:
        return
    if backend == "triton" and importlib.util.find_spec("triton"):
        pytest.fail(f"the Triton backend cannot run here: {reason}")
    pytest.skip(f"backend {backend!r} cannot run here: {reason}")


@pytest.fixture
def emulated_cuda(request):
    """The CUDA backend on CPU tensors, with an order of threads of the test's own."""
    if shutil.which("g++") is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip(f"{NO_GPU}, and no g++ and pybind11 for the emulator")
    from . import emulator

    with emulator.cuda_backend() as library:
        library.seed(int(os.environ.get("SWINOPS_EMULATOR_SEED", zlib.crc32(request.node.nodeid.encode()))))
        yield library


@pytest.fixture
def beyond_31_bits(device, monkeypatch):
    """A copy of a tensor whose first two entries along the batch lie more than 2**31 elements apart in memory."""
    # the interpreter copies every argument's storage onto itself at the end: gigabytes, and nothing changes
    copy = torch.UntypedStorage.copy_
    monkeypatch.setattr(
        torch.UntypedStorage,
        "copy_",
        lambda self, other, *rest: self if self.data_ptr() == other.data_ptr() else copy(self, other, *rest),
    )

    def spread(x: torch.Tensor) -> torch.Tensor:
        distance = 2**31 + 3 * 2**20
        if device.type == "cpu":
            # zeros that numpy has only reserved: the system provides the few pages that are touched
            import numpy as np

            storage = torch.from_numpy(np.zeros((distance + x[0].numel()) * x.itemsize, np.uint8)).view(x.dtype)
        else:
            storage = torch.empty(distance + x[0].numel(), dtype=x.dtype, device=device)
        assert len(x) == 2
        return storage.as_strided(x.shape, (distance, *x[0].contiguous().stride())).copy_(x)

    return spread


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU, and is skipped where there is none")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip(NO_GPU)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NO_GPU in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.write_line(f"{count} tests were skipped because they need a GPU, and torch sees none here")
