"""The emulator of tests/emulator: its instructions against their definitions, and faults that it has to find.

A fault is a change to a kernel's source, such as a barrier deleted. It has to be found: by a report or wrong numbers.
"""

import itertools
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from swinops import reference
from swinops.backends import cuda
from swinops.testing import attention_inputs, logit_scales

from . import emulator

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

KERNELS = emulator.HERE / "kernels.cu"
SEEDS = range(4)


@pytest.fixture(scope="module")
def kernels():
    return emulator.Library(emulator.build(KERNELS))


@pytest.fixture(scope="module")
def instructions():
    return emulator.Library(emulator.build(emulator.HERE / "instructions.cu"))


def integers(*shape, dtype=torch.float32):
    """Small ones, whose products and sums are exact in every format."""
    return torch.randint(-8, 9, shape).to(dtype)


def apart(x):
    """A copy with memory around it that no kernel may touch: a stray access does not land in the next tensor."""
    around = 4096
    return x.new_empty(x.numel() + 2 * around)[around:-around].view(x.shape).copy_(x)


# Instructions.


@pytest.mark.parametrize("dtype, depth", list(itertools.product((torch.float16, torch.bfloat16), (8, 16))))
def test_mma_is_a_matrix_product(instructions, dtype, depth):
    a, b, d = integers(16, depth, dtype=dtype), integers(depth, 8, dtype=dtype), integers(16, 8)
    expected = d + a.float() @ b.float()
    instructions.launch("fragments", a, b, d, depth, dtype == torch.float16)
    assert torch.equal(d, expected)


@pytest.mark.parametrize("dtype, depth", list(itertools.product((torch.float16, torch.bfloat16), (8, 16))))
def test_mma_sums_in_float32(instructions, dtype, depth):
    a, b, d = torch.randn(16, depth).to(dtype), torch.randn(depth, 8).to(dtype), torch.randn(16, 8)
    expected = d.double() + a.double() @ b.double()
    bound = depth * torch.finfo(torch.float32).eps * (d.double().abs() + a.double().abs() @ b.double().abs())
    instructions.launch("fragments", a, b, d, depth, dtype == torch.float16)
    assert ((d - expected).abs() <= bound).all()


def test_mma_of_tf32_ignores_the_low_bits(instructions):
    a, b, d = integers(16, 8), integers(8, 8), integers(16, 8)
    expected = d + a @ b
    a, b = (x.view(torch.int32) | torch.randint(0, 2**13, x.shape, dtype=torch.int32) for x in (a, b))
    instructions.launch("tf32_fragments", a, b, d)
    assert torch.equal(d, expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(instructions, transposed):
    """Lane i gets row i / 4, columns 2 (i % 4) and the next, of each of four matrices, or of their transposes."""
    matrices, registers = torch.randint(-(2**15), 2**15, (4, 8, 8)).short(), torch.empty(4, 32, 2, dtype=torch.int16)
    instructions.launch("ldmatrix", matrices, registers, transposed)
    assert torch.equal(registers, (matrices.mT if transposed else matrices).reshape(4, 32, 2))


@pytest.mark.parametrize("threads, width, by", [(32, 32, 5), (64, 8, 3), (96, 16, 9), (32, 2, 1), (32, 32, 0)])
def test_shuffles_and_votes(instructions, threads, width, by):
    x = torch.randint(0, 1000, (threads,), dtype=torch.int32) | (torch.arange(threads) < 32).int()
    out = torch.empty(7, threads, dtype=torch.int32)
    instructions.launch("lanes", x, out, threads, by, width)
    segments = x.view(-1, width)
    lane = torch.arange(width)
    odd = (x & 1).view(-1, 32)
    expected = [
        segments[:, [by % width] * width],
        segments[:, torch.where(lane >= by, lane - by, lane)],
        segments[:, torch.where(lane + by < width, lane + by, lane)],
        segments[:, torch.where(lane ^ by < width, lane ^ by, lane)],
        (odd.long() << torch.arange(32)).sum(1, keepdim=True).int().expand(-1, 32),
        (odd.any(1).int() + 2 * odd.all(1).int())[:, None].expand(-1, 32),
        odd.sum().expand(threads),
    ]
    for got, right in zip(out, expected, strict=True):
        assert torch.equal(got, right.reshape(-1).int())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_16_bits_widens_exactly(instructions, dtype):
    x, out = torch.arange(-(2**15), 2**15).short().view(dtype), torch.empty(2**16)
    instructions.launch("widen", x, out, 2**16, dtype == torch.float16)
    assert torch.equal(out.nan_to_num(nan=7.5), x.float().nan_to_num(nan=7.5))
    assert torch.equal(out.isnan(), x.isnan()) and torch.equal(out.signbit()[~x.isnan()], x.signbit()[~x.isnan()])


def floats():
    """Of every exponent, both signs, infinities and NaNs; every half and bfloat16, their midpoints and neighbours."""
    random = torch.randint(-(2**31), 2**31, (50_000,)).int().view(torch.float32)
    exact = torch.arange(-(2**15), 2**15).short()
    exact = torch.cat([exact.view(torch.float16).float(), exact.view(torch.bfloat16).float()]).view(torch.int32)
    near = torch.cat([exact + step for step in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)])
    return torch.cat([random, near.view(torch.float32)])


def test_rounding(instructions):
    x = floats()
    half, bfloat16, tf32 = (torch.empty(len(x), dtype=torch.int32) for _ in range(3))
    instructions.launch("round_to", x, half, bfloat16, tf32, len(x))
    for packed, dtype in ((half, torch.float16), (bfloat16, torch.bfloat16)):
        low, high = packed.view(dtype).view(-1, 2).unbind(1)
        torch.testing.assert_close(low, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(high, -x.to(dtype), rtol=0, atol=0, equal_nan=True)
    normal = x.isfinite() & (x.abs() >= torch.finfo(torch.float32).tiny) & (x.abs() < 2.0**127)
    mantissa, exponent = np.frexp(x[normal].double().numpy())
    nearest = np.copysign(np.floor(np.abs(mantissa) * 2**11 + 0.5), mantissa)  # ties away from zero
    assert np.array_equal(tf32[normal].view(torch.float32).double().numpy(), np.ldexp(nearest, exponent - 11))


# Launches.


def test_limits_of_shared_memory(kernels):
    out = torch.empty(1)
    kernels.launch("ask_for_shared", out, 48 << 10, False)
    for bytes_, allowed in (((48 << 10) + 1, False), ((227 << 10) + 1, True)):
        with pytest.raises(RuntimeError, match="invalid argument"):
            kernels.launch("ask_for_shared", out, bytes_, allowed)
    kernels.launch("ask_for_shared", out, 227 << 10, True)


def test_a_launch_that_is_too_large_fails(instructions):
    with pytest.raises(RuntimeError, match="invalid configuration"):
        instructions.launch("lanes", torch.zeros(1025).int(), torch.zeros(7, 1025).int(), 1025, 1, 32)


def test_a_report_says_who_where_and_what(kernels):
    kernels.seed(5)
    with pytest.raises(RuntimeError) as error:
        kernels.launch("transpose", torch.zeros(50, 70), torch.zeros(70 * 50 - 1), 50, 70)
    line = next(i for i, text in enumerate(KERNELS.read_text().splitlines(), 1) if "out[to * rows + row] =" in text)
    report = str(error.value)
    assert report.startswith("kernel TransposeKernel, block (2, 1, 0): thread (17, 1, 0): write of 4 bytes at 0x"), (
        report
    )
    assert report.endswith(f"4 bytes past the end of argument 1 of 13996 bytes at kernels.cu:{line} [seed 5]"), report


def test_static_shared_memory_does_not_compile(tmp_path):
    source = tmp_path / "static.cu"
    source.write_text('#include "common.cuh"\n__global__ void K() { __shared__ float x[2]; x[0] = 1; }\n')
    with pytest.raises(RuntimeError, match="kernels_take_their_shared_memory_by_SWINOPS_DYNAMIC_SHARED_only"):
        emulator.build(source)


# Kernels, whole and broken.


def transpose(library):
    x, out = apart(torch.randn(50, 70)), apart(torch.empty(70, 50))
    library.launch("transpose", x, out, 50, 70)
    return torch.equal(out, x.T)


def sum_rows(library):
    x, out = apart(integers(3, 1000)), apart(torch.empty(3))
    library.launch("sum", x, out, 3, 1000)
    return torch.equal(out, x.sum(1))


def pipeline(library):
    x, out = apart(integers(7, 512)), apart(torch.empty(512))
    library.launch("pipeline", x, out, 7, 512)
    return torch.equal(out, x.sum(0))


def matmul(library):
    a, b, d = integers(16, 16, dtype=torch.float16), integers(16, 8, dtype=torch.float16), integers(16, 8)
    expected = d + a.float() @ b.float()
    library.launch("matmul", a, b, d)
    return torch.equal(d, expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("check", [transpose, sum_rows, pipeline, matmul])
def test_kernels_are_right(kernels, check, seed):
    kernels.seed(seed)
    assert check(kernels)


class Fault(NamedTuple):
    """``old``, which stands once in the source, becomes ``new``; ``found`` is in the report, or numbers are WRONG."""

    old: str
    new: str
    found: str | None


WRONG = None

FAULTS = {
    transpose: [
        Fault("  __syncthreads();\n  const int row = blockIdx.y", "  const int row = blockIdx.y", "race: "),
        Fault(
            "  __syncthreads();\n  const int row",
            "  if (threadIdx.y) __syncthreads();\n  const int row",
            "race: |deadlock: ",
        ),
        Fault(
            "  __syncthreads();\n  const int row",
            "  if (column >= columns) return;\n  __syncthreads();\n  const int row",
            "deadlock: .* have returned",
        ),
        Fault("row < rows && column < columns) tile", "column < columns) tile", "past the end of argument 0"),
        Fault("row < rows && to < columns) out", "row < rows) out", "past the end of argument 1"),
        Fault("= tile[threadIdx.x * (kTile + 1) + i]", "= tile[i * (kTile + 1) + threadIdx.x]", WRONG),
        Fault("kTile * (kTile + 1) * sizeof", "kTile * kTile * sizeof", "of 4096 bytes of shared memory"),
        Fault(
            "float* out, int rows, int columns) {", "float* out, int rows, int columns) {\n  out += 1;", "past the end"
        ),
        Fault(
            "float* out, int rows, int columns) {",
            "float* out, int rows, int columns) {\n  columns *= 1 << 30;",
            "overflow",
        ),
    ],
    sum_rows: [
        Fault("  __syncthreads();\n  if (threadIdx.x == 0)", "  if (threadIdx.x == 0)", "race: "),
        Fault("__shfl_xor_sync(kWholeWarp, sum, step)", "__shfl_xor_sync(0xffffu, sum, step)", "not in the mask"),
        Fault(
            "sum += __shfl_xor_sync",
            "if (threadIdx.x % 3) sum += __shfl_xor_sync",
            "deadlock: |is at |which has returned",
        ),
        Fault("if (threadIdx.x % kWarp == 0) sums", "sums", "race: write"),
        Fault("w < int(blockDim.x) / kWarp", "w <= int(blockDim.x) / kWarp", "of 16 bytes of shared memory"),
        Fault("out[blockIdx.x] = sum", "out[0] = sum", "race: write of byte 0 of argument 1, which block"),
        Fault("step > 0; step /= 2", "step > 1; step /= 2", WRONG),
    ],
    pipeline: [
        Fault("    cp_async_wait<1>();\n", "", "cp_async is under way"),
        Fault("cp_async_wait<1>", "cp_async_wait<2>", "cp_async is under way"),
        Fault("cp_async_wait<0>();", "", "returns before 1 cp_async"),
        Fault("    cp_async_commit();\n    cp_async_wait", "    cp_async_wait", "cp_async is under way"),
        Fault("    __syncthreads();\n    const float4 x", "    const float4 x", "cp_async is under way|race: "),
        Fault(
            "    __syncthreads();  // before the next copies overwrite it\n", "", "race: cp_async|cp_async is under way"
        ),
        Fault(
            "    cp_async_wait<1>();\n    __syncthreads();\n",
            "    __syncthreads();\n    cp_async_wait<1>();\n",
            "cp_async is under way|race: ",
        ),
        Fault("&rows_in[thread], true", "in + 4 * thread + 1, true", "cp_async at .* not aligned to 16"),
        Fault(
            "reinterpret_cast<float4*>(out)[other]",
            "reinterpret_cast<float4*>(out + 2)[other]",
            "misaligned pointer at .*kernel",
        ),
        Fault(
            "more ? row + 1 : row;\n    cp_async(&buffers[(row + 1) % 2 * blockDim.x + thread], "
            "&rows_in[next * blockDim.x + thread], more);",
            "row + 1;\n    cp_async(&buffers[(row + 1) % 2 * blockDim.x + thread], "
            "&rows_in[next * blockDim.x + thread], true);",
            "cp_async of 16 bytes at .* past the end of argument 0",
        ),
    ],
    matmul: [
        Fault("  __syncwarp();\n  uint32_t left", "  uint32_t left", "race: ldmatrix"),
        Fault("lane % 16 * 16 + lane / 16 * 8", "lane / 16 * 8 + lane % 16 * 16 + 1", "ldmatrix at .* not aligned"),
        Fault("ldmatrix(left, &tile[lane % 16 * 16", "ldmatrix(left, &a[lane % 16 * 16", "ldmatrix of 16 bytes at "),
        Fault("ldmatrix_transposed(right", "ldmatrix(right", WRONG),
        Fault("lane % 16 * 16 + lane / 16 * 8", "lane / 16 * 8 * 16 + lane % 16 * 8", WRONG),
        Fault("mma<T>(sum, left", "if (lane < 16) mma<T>(sum, left", "mma m16n8k16 of half waits for lane|deadlock"),
    ],
}


def apply(fault, path):
    text = path.read_text()
    assert text.count(fault.old) == 1, f"{fault.old!r} is in {path.name} {text.count(fault.old)} times"
    path.write_text(text.replace(fault.old, fault.new))


def assert_found(fault, check, library):
    for seed in SEEDS:
        library.seed(seed)
        if fault.found is WRONG:
            assert not check(library)
        else:
            with pytest.raises(RuntimeError, match=fault.found):
                check(library)


@pytest.mark.parametrize("check, fault", [(check, fault) for check, faults in FAULTS.items() for fault in faults])
def test_faults_are_found(tmp_path, check, fault):
    source = Path(shutil.copy(KERNELS, tmp_path))
    apply(fault, source)
    assert_found(fault, check, emulator.Library(emulator.build(source)))


# The package's kernels, broken.


def partition(library, start=0):
    image = apart(torch.arange(2 * 14 * 21 * 14).view(2, 14, 21, 14).short())[..., start : start + 6]
    with emulator.cuda_backend(library):
        windows = cuda.window_partition(image, (7, 7), (3, 2))
    return torch.equal(windows, reference.window_partition(image, (7, 7), (3, 2)))


def partition_of_unaligned(library):
    return partition(library, start=1)


def expand(library):
    table = apart(torch.randn(13 * 13, 2))
    with emulator.cuda_backend(library):
        bias = cuda.relative_position_bias(table, (7, 7))
    return torch.equal(bias, reference.relative_position_bias(table, (7, 7)))


def sum_bias(library):
    dbias = apart(integers(2, 49, 49))
    with emulator.cuda_backend(library):
        dtable = cuda.relative_position_bias_backward(dbias, (7, 7))
    return torch.equal(dtable, reference.relative_position_bias_backward(dbias, (7, 7)))


def attend(library, window=(7, 7), cosine=False):
    """Three windows and more a block, shifted and padded: the output and every gradient, near float64's."""
    size = tuple(2 * m - 3 for m in window)
    q, k, v, bias, pad_kv, dout = attention_inputs(size, window, batch=3, heads=1, head_dim=32, dtype=torch.float16)
    learned = [logit_scales(1, device="cpu"), bias, pad_kv] if cosine else [bias, pad_kv]
    settings = window, [m // 2 for m in window], *([] if cosine else [0.2]), "pad_roll", -100.0
    name = "cosine_attention" if cosine else "window_attention"

    def run(module, cast):
        inputs = [cast(apart(x)) for x in (q, k, v, *learned)]
        out, lse = getattr(module, name)(*inputs, *settings)
        gradients = [torch.empty_like(x) for x in inputs]
        getattr(module, f"{name}_backward")(cast(dout), *inputs, out, lse, *gradients, *settings)
        return [out, *gradients]

    with emulator.cuda_backend(library):
        results = run(cuda, lambda x: x)
    exact = run(reference, torch.Tensor.double)
    return all((x - y).abs().max() < 0.05 * y.abs().max() for x, y in zip(results, exact, strict=True))


def attend_cosine(library):
    return attend(library, cosine=True)


def attend_tiled(library):
    return attend(library, window=(9, 16))  # three chunks a stage


# Which .cu is built again, the check that fails, the file that is changed, and how.
WHOLE_BARRIER = "    __syncthreads();  // this window is there, and the other stage is free\n"
CHUNK_BARRIER = "        __syncthreads();  // this stage is there, and the other is free\n"
FAULTS_OF_CSRC = [
    ("cyclic_shift.cu", check, "cyclic_shift.cu", fault)
    for check, fault in (
        (partition, Fault("  if (line >= s.size[0] * s.size[1]) return;\n", "", "past the end of")),
        (partition, Fault("if (i + u * blockDim.x < n) dst", "dst", "past the end of|race: write")),
        (partition, Fault("p + shift : p - (size - shift)", "p + shift : p - (size - shift) + 1", WRONG)),
        (partition_of_unaligned, Fault("reinterpret_cast<uintptr_t>(src) | ", "", "misaligned pointer")),
    )
] + [
    ("relative_position_bias.cu", check, "relative_position_bias.cuh", fault)
    for check, fault in (
        (expand, Fault("    __syncthreads();\n  }\n", "  }\n", "race: ")),
        (expand, Fault("row <= high; row +=", "row < high; row +=", WRONG)),
        (expand, Fault("bias += head * N * N", "bias += (head + 1) * N * N", "past the end of argument 1")),
        (sum_bias, Fault("  __syncthreads();\n\n  if (threadIdx.y > 0", "  if (threadIdx.y > 0", "race: ")),
        (
            sum_bias,
            Fault("  __syncthreads();\n\n  if", "  if (threadIdx.y) return;\n  __syncthreads();\n\n  if", "deadlock: "),
        ),
        (sum_bias, Fault("if (offset > 0) store", "store", "bytes before argument 1|race: write")),
    )
]
FAULTS_OF_CSRC += [
    ("window_attention.cu", attend, file, fault)
    for file, fault in (
        ("attention_whole_forward.cuh", Fault("    cp_async_wait<0>();\n", "", "cp_async is under way")),
        ("attention_whole_forward.cuh", Fault(WHOLE_BARRIER, "", "race: |cp_async is under way")),
        ("attention_whole.cuh", Fault("(cut & 2 ? apart[0] : 0)", "0", WRONG)),
    )
]
FAULTS_OF_CSRC += [
    ("window_attention.cu", attend, "attention_whole_backward.cuh", fault)
    for fault in (
        Fault("    __syncthreads();  // pairs are there, and", "    // pairs are there, and", "race: "),
        Fault("      __syncwarp();\n      T* const image", "      T* const image", "race: "),
        Fault("exists[i] && !current.inside[i]) sums", "exists[i]) sums", WRONG),
    )
]
FAULTS_OF_CSRC += [
    (
        "cosine_attention.cu",
        attend_cosine,
        "attention_whole_backward.cuh",
        Fault(
            "      __syncthreads();  // all have read the keys as they came",
            "      // all have read the keys",
            "race: ",
        ),
    ),
    ("attention_tiled.cu", attend_tiled, "attention_tiled.cu", Fault(CHUNK_BARRIER, "", "race: |under way")),
    ("attention_tiled.cu", attend_tiled, "attention_tiled.cu", Fault("        total[i] *= rescale;\n", "", WRONG)),
    ("attention_tiled.cu", attend_tiled, "attention_tiled.cu", Fault("stage + part * kKeys * kStride", "stage", WRONG)),
]


def test_the_readme(tmp_path, monkeypatch):
    """Its kernel runs as it says, and without the barrier is reported as it says."""
    text = (emulator.HERE / "README.md").read_text()
    (kernel,), (script,) = (re.findall(rf"```{kind}\n(.*?)```", text, re.S) for kind in ("cpp", "python"))
    monkeypatch.chdir(tmp_path)
    Path("mine.cu").write_text(kernel)
    ran: dict[str, Any] = {}
    exec(script, ran)
    assert torch.equal(ran["x"], torch.arange(100.0))  # turned eight times
    with pytest.raises(TypeError, match="argument 1 of mine must be a tensor or an int, got float"):
        ran["library"].launch("mine", ran["x"], 100.0)
    assert kernel.count("  __syncthreads();\n") == 1
    Path("mine.cu").write_text(kernel.replace("  __syncthreads();\n", ""))
    with pytest.raises(RuntimeError, match=r"race: .* shared byte .* mine\.cu:6"):
        exec(script, {})
    Path("mine.cu").write_text('#include "nowhere.h"\n' + kernel)
    with pytest.raises(RuntimeError, match=r"nowhere\.h: No such file"):
        exec(script, {})


@pytest.mark.parametrize("source, check, file, fault", FAULTS_OF_CSRC)
def test_faults_of_the_package_are_found(tmp_path, source, check, file, fault):
    folder = Path(shutil.copytree(emulator.CSRC, tmp_path / "csrc"))
    apply(fault, folder / file)
    sources = [folder / source, *(path for path in emulator.sources() if path.name != source)]
    path = emulator.build(*sources)
    assert_found(fault, check, emulator.Library(path, emulator.load(path)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("check", dict.fromkeys(check for _, check, _, _ in FAULTS_OF_CSRC))
def test_the_package_is_right(check, seed):
    library = emulator.extension()
    library.seed(seed)
    assert check(library)
