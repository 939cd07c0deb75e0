"""The CUDA backend and its kernels without a GPU.

A host compiler builds the files that nvcc builds, over the emulator of tests/emulator, which runs their kernels.
"""

import itertools
import mmap
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swinops import reference
from swinops.backends import cuda

from . import emulator


@pytest.fixture(scope="module")
def host_extension():
    """swinops._C, built by the host's compiler."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    pytest.importorskip("pybind11")
    return emulator.extension()


@pytest.fixture(scope="module")
def backend(host_extension):
    """The CUDA backend, with the host's build in place of nvcc's and no GPU to select."""
    with emulator.cuda_backend():
        yield cuda


def image(batch, size, channels, dtype=torch.int16):
    return torch.arange(batch * torch.Size(size).numel() * channels).view(batch, *size, channels).to(dtype)


def check(backend, x, window, shift):
    """Partition and merge move the same bits as their definition, and undo each other."""
    windows = backend.window_partition(x, window, shift)
    expected = reference.window_partition(x, window, shift)
    assert windows.is_contiguous() and windows.shape == expected.shape and torch.equal(windows, expected)
    merged = backend.window_merge(windows, x.shape[1:-1], shift)
    assert merged.is_contiguous() and torch.equal(merged, x)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(0, 6)), min_size=2, max_size=3),
    st.integers(1, 40),
    st.sampled_from([torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex128]),
)
def test_matches_the_definition(backend, batch, axes, channels, dtype):
    size = [count * window for count, window, _ in axes]
    window = [window for _, window, _ in axes]
    check(backend, image(batch, size, channels, dtype), window, [shift % w for (_, w, shift) in axes])


@pytest.mark.parametrize(
    "batch, size, channels, window, shift",
    [
        (2, (56, 28), 96, (7, 7), (3, 3)),  # Swin's first stage
        (1, (4, 512), 48, (4, 8), (0, 7)),  # a line longer than a block
        (1, (1, 2048), 24, (1, 2048), (0, 2047)),  # one window, the largest shift
        (3, (8, 14, 14), 5, (8, 7, 7), (4, 3, 3)),
        (70_000, (1, 1), 1, (1, 1), (0, 0)),  # more windows than a grid is high
        (0, (7, 7), 3, (7, 7), (3, 3)),
        (2, (7, 7), 0, (7, 7), (3, 3)),
    ],
)
def test_shapes(backend, batch, size, channels, window, shift):
    check(backend, image(batch, size, channels), window, shift)


@pytest.mark.parametrize("start, channels", list(itertools.product(range(4), (6, 8, 12))))
def test_any_strides_and_alignment(backend, start, channels):
    whole = image(3, (8, 28), 16)
    check(backend, whole[..., start : start + channels], (4, 7), (2, 3))
    check(backend, whole.transpose(1, 2)[..., start : start + channels], (7, 4), (3, 2))
    check(backend, whole[1:2, :, ::2, start : start + channels], (4, 7), (2, 3))
    check(backend, whole[:1, :1, :1, start : start + 1].expand(2, 8, 14, channels), (4, 7), (2, 3))
    check(backend, whole.permute(0, 3, 2, 1)[:, start : start + 4], (4, 7), (2, 3))  # last stride not 1: copied

    windows = reference.window_partition(whole, (4, 7), (2, 3))[..., start : start + channels]
    assert torch.equal(backend.window_merge(windows, (8, 28), (2, 3)), whole[..., start : start + channels])


@pytest.mark.parametrize("axis", range(3))
def test_offsets_beyond_32_bits(backend, axis):
    """A view whose stride passes 2^31 elements; only the pages it touches exist."""
    strides = [16, 16, 16, 1]
    strides[axis] = 2**31 + 16
    strides[(axis + 1) % 3] = 64
    memory = mmap.mmap(-1, 3 * sum(strides) + 16)
    x = torch.frombuffer(memory, dtype=torch.int8).as_strided((4, 4, 4, 16), strides).copy_(image(4, (4, 4), 16))
    check(backend, x, (2, 2), (1, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"window": (1, 3, 4)},
        {"window": (0, 4, 4)},
        {"shift": (0, 0, 8)},
        {"shift": (0, -1, 0)},
        {"batch": -1},
        {"element_size": 3},
        {"element_size": 32},
        {"size": (2**16, 2**16, 1), "window": (1, 1, 1)},
    ],
)
def test_launcher_refuses(host_extension, change):
    arguments = dict(image=0, windows=0, batch=1, size=(1, 8, 8), channels=4, window=(1, 4, 4), shift=(0, 0, 0))
    arguments |= dict(image_stride=(0, 0, 0, 0), windows_stride=(0, 0, 0, 0), element_size=2, stream=0)
    for launcher in (host_extension.window_partition, host_extension.window_merge):
        with pytest.raises(RuntimeError, match="CUDA error: invalid argument"):
            launcher(**arguments | change)


def test_launcher_refuses_misaligned_pointers(host_extension):
    bytes_ = torch.zeros(65, dtype=torch.int8)
    arguments = dict(image=bytes_.data_ptr() + 1, windows=bytes_.data_ptr(), batch=1, size=(1, 2, 2), channels=4)
    arguments |= dict(window=(1, 2, 2), shift=(0, 0, 0), image_stride=(16, 16, 8, 4), windows_stride=(16, 16, 8, 4))
    with pytest.raises(RuntimeError, match="CUDA error: misaligned address"):
        host_extension.window_partition(**arguments, element_size=4, stream=0)


@pytest.mark.parametrize(
    "arch, capability, runs",
    [
        ("90", (9, 0), True),
        ("80", (8, 6), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("80+PTX", (9, 0), True),
        ("100+PTX", (9, 0), False),
        ("90a", (9, 0), True),
        ("100a", (10, 3), False),
        ("100f", (10, 3), True),
        ("90a+PTX", (10, 0), False),
    ],
)
def test_which_gpus_a_build_runs_on(arch, capability, runs):
    assert cuda.runs_on(arch, capability) == runs
