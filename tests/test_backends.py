"""Which backend runs a call, and what is said where one cannot."""

import importlib
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import swinops
from swinops import backends, reference, window_attention, window_partition
from swinops.backends import choice, cuda
from swinops.testing import random_tensor

OPS = [
    "window_partition", "window_merge", "relative_position_bias", "continuous_position_bias", "window_attention",
    "cosine_attention",
    "layer_norm", "add_layer_norm", "layer_norm_add", "patch_merging_norm",
]  # fmt: skip
ON_CUDA = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(1, 4, 4, 1, 8))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", backends.MODULES)
def test_unavailable_backend_says_why(name, op, monkeypatch):
    """A backend asked for by name runs or raises: it is never replaced by another."""
    stub = SimpleNamespace(why_not=lambda x, op, tokens: "it is a stub")
    monkeypatch.setattr(backends, "module", {name: stub}.__getitem__)
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run {op}: it is a stub"):
        backends.resolve(name, torch.ones(1), op)


def test_unavailable_backend_raises_from_the_op(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda name, x, op, tokens: "it is a stub")
    x = random_tensor((1, 4, 4, 1, 8), 0)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run window_attention: it is a stub"):
        window_attention(x, x, x, window_size=4, backend="triton")


def test_a_module_that_cannot_be_imported_is_a_reason(monkeypatch):
    monkeypatch.setitem(backends.MODULES, "triton", "swinops.absent")
    assert backends.why_not("triton", torch.ones(1), "window_merge") == (
        "swinops.absent cannot be imported (No module named 'swinops.absent')"
    )


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be 'auto' or one of 'cuda', 'triton', 'reference', got 'tpu'"):
        window_partition(torch.ones(1, 4, 4, 1), 2, backend="tpu")


def test_auto_lists_every_reason(rows, monkeypatch):
    """An op on a CUDA tensor never falls back to the reference in silence."""
    monkeypatch.setattr(backends, "why_not", lambda name, x, op, tokens: f"no {name} today")
    with pytest.raises(RuntimeError) as error:
        backends.resolve("auto", ON_CUDA, "window_attention")
    assert str(error.value) == (
        "no kernel can run window_attention on this CUDA tensor (cuda: no cuda today; triton: no triton today); "
        'backend="reference" runs it in plain PyTorch'
    )


@pytest.fixture
def rows(monkeypatch):
    """The rows that "auto" chooses by, for a test to fill; the GPU is a 9.0."""
    table = []
    monkeypatch.setattr(choice, "rows", lambda: table)
    monkeypatch.setattr(choice, "architecture", lambda device: 90)
    choice.order.cache_clear()
    yield table
    choice.order.cache_clear()


def row(cuda=2.0, triton=1.0, **changes):
    same = {
        "op": "window_attention",
        "direction": "forward",
        "arch": 90,
        "dtype": "float32",
        "tokens": 49,
        "channels": 32,
    }
    end = {"unit": "ns a window and head", "source": "static", "device": "", "commit": "abc"}
    return choice.Row(**{**same, "cuda": cuda, "triton": triton, **end, **changes})


def test_auto_takes_the_first_that_can(rows, monkeypatch):
    """The fastest by the row, or the next one; without a row in the order of MODULES."""
    assert (*choice.KERNELS, "reference") == tuple(backends.MODULES)
    reasons = {"cuda": None, "triton": None, "reference": None}
    monkeypatch.setattr(backends, "why_not", lambda name, x, op, tokens: reasons[name])
    monkeypatch.setattr(backends, "module", lambda name: name)

    def chosen(**arguments):
        choice.order.cache_clear()
        return backends.resolve("auto", ON_CUDA, "window_attention", 49, **arguments)

    assert chosen() == "cuda"
    rows.append(row(cuda=2.0, triton=1.0))
    assert chosen() == "triton" and chosen(backward=True) == "cuda"
    reasons["triton"] = "no"
    assert chosen() == "cuda"
    rows[0] = row(cuda=1.0, triton=1.0)
    reasons |= {"cuda": "no", "triton": None}
    assert chosen() == "triton"


def test_the_nearest_row_decides(rows):
    def nearest(op="window_attention", direction="forward", arch=90, dtype="float32", tokens=49, channels=32):
        return choice.nearest(op, direction, arch, dtype, tokens, channels)

    assert nearest() is None
    rows += [row(), row(arch=80), row(tokens=64), row(tokens=256), row(channels=64), row(direction="backward")]
    assert nearest() is rows[0]
    assert nearest(direction="backward") is rows[5]
    assert nearest(op="cosine_attention") is None and nearest(dtype="float16") is None
    # an architecture: the same, else the nearest older
    assert nearest(arch=89) is rows[1] and nearest(arch=100) is rows[0] and nearest(arch=75) is None
    assert nearest(arch=89, tokens=64, channels=64) is rows[1]
    # tokens, then channels: the nearest at or above, else the largest
    assert [nearest(tokens=n).tokens for n in (0, 49, 50, 64, 65, 256, 2304)] == [49, 49, 64, 64, 256, 256, 256]
    assert [nearest(channels=n).channels for n in (16, 32, 33, 64, 128)] == [32, 32, 64, 64, 64]
    assert nearest(tokens=64, channels=64) is rows[2]
    # what was measured counts, wherever in the table it stands
    rows.append(row(source="measured", device="H100"))
    assert nearest() is rows[-1]
    assert nearest(tokens=60) is rows[2]


def test_a_row_says_why():
    assert row(cuda=12.14, triton=14.0).why == "static model, not measured: 12.1 against 14 ns a window and head"
    measured = row(cuda=14.0, triton=12.14, source="measured", device="an H100", unit="us")
    assert measured.why == "measured on an H100 at abc: 12.1 against 14 us"
    assert measured.order == ("triton", "cuda") and row(cuda=1.0, triton=1.0).order == ("cuda", "triton")
    # what differs less than the times are good for is equal
    assert row(cuda=1.019, triton=1.0).order == ("cuda", "triton")
    assert row(cuda=1.021, triton=1.0).order == ("triton", "cuda")
    assert row(cuda=1.019, triton=1.0).why.endswith(": 1.02 against 1 ns a window and head")


def test_attention_asks_with_its_tokens_and_direction(monkeypatch):
    asked = []
    resolve = backends.resolve
    for op in ("attention", "relative_position_bias", "continuous_position_bias"):
        # importlib: a function of that name hides the module
        module = importlib.import_module(f"swinops.ops.{op}")
        monkeypatch.setattr(module, "resolve", lambda *a, **named: asked.append((a[2:], named)) or resolve(*a, **named))
    x = random_tensor((1, 4, 6, 2, 8), 0).requires_grad_()
    swinops.window_attention(x, x, x, window_size=(4, 3)).sum().backward()
    swinops.cosine_attention_qkvpacked(
        x[..., None, :, :].expand(-1, -1, -1, 3, -1, -1), x[0, 0, 0, :, 0], window_size=4
    ).sum().backward()
    swinops.relative_position_bias(random_tensor((35, 2), 0).requires_grad_(), (3, 4)).sum().backward()
    weights = (random_tensor(shape, 0).requires_grad_() for shape in ((4, 2), (4,), (1, 4)))
    swinops.continuous_position_bias(*weights, 3).sum().backward()
    wanted = {
        "window_attention": 12,
        "cosine_attention": 16,
        "relative_position_bias": 12,
        "continuous_position_bias": 9,
    }
    assert asked == [
        ((op, tokens), named) for op, tokens in wanted.items() for named in ({}, {"backward": True})
    ]  # fmt: skip


def test_the_table_of_choices():
    """One row for each key; what was measured names where; the order in the file is its own."""
    table = choice.rows()
    keys = [(*each[:6], each.source) for each in table]
    assert len(set(keys)) == len(keys) and list(table) == sorted(table)
    # no op with a CUDA kernel is without, in any dtype that is tabled and on any architecture that is built
    found = {each[:4] for each in table}
    for op, arch in itertools.product(cuda.OPS, (80, 90, 100)):
        directions = ("forward",) if op in ("window_partition", "window_merge") else ("forward", "backward")
        dtypes = ("float32",) if op.endswith("position_bias") else ("float32", "float16", "bfloat16")
        assert found >= {(op, direction, arch, dtype) for direction in directions for dtype in dtypes}
    for each in table:
        assert each.op in OPS and each.direction in ("forward", "backward") and hasattr(torch, each.dtype)
        assert each.cuda > 0 and each.triton > 0 and each.unit and each.commit
        assert each.source == ("measured" if each.device else "static")


@pytest.mark.parametrize("capability, arch", [((8, 9), 89), ((9, 0), 90), ((10, 3), 103), ((12, 0), 80)])
def test_architecture_of_a_choice(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choice.architecture(torch.device("cuda")) == arch


@pytest.mark.parametrize("op", OPS)
def test_auto_on_a_cpu_is_the_reference(op):
    assert backends.resolve("auto", torch.ones(1), op) is reference


@pytest.mark.parametrize("name", backends.MODULES)
def test_backends_have_the_functions_of_the_reference(name):
    """A backend that runs an op has its function; ``why_not`` answers for each op in a sentence or with None."""
    for op in OPS:
        reason = backends.why_not(name, torch.ones(1, 4, 4, 1, 8), op)
        assert reason is None or (isinstance(reason, str) and len(reason.split()) > 3), reason
        if reason is None:
            assert callable(getattr(backends.module(name), op))


@pytest.mark.parametrize(
    "x, reason",
    [
        (torch.ones(1, 2, 2, 1, 4, dtype=torch.float64), "takes float32, float16 and bfloat16, not torch.float64"),
        (torch.ones(1, 2, 2, 1, 257), "takes a head_dim up to 256, not 257"),
    ],
    ids=["float64", "head_dim 257"],
)
def test_triton_says_what_it_cannot(x, reason, device):
    pytest.importorskip("triton")
    x = x.to(device)
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run window_attention: .*{reason}"):
        window_attention(x, x, x, window_size=2, backend="triton")


def test_triton_computes_no_bias_in_float64(device):
    pytest.importorskip("triton")
    weights = (torch.ones(shape, dtype=torch.float64, device=device) for shape in ((4, 2), (4,), (1, 4)))
    reason = "takes float32, float16 and bfloat16, not torch.float64"
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run continuous_position_bias: .*{reason}"):
        swinops.continuous_position_bias(*weights, 2, backend="triton")


@pytest.mark.parametrize("op", [swinops.layer_norm, swinops.patch_merging_norm], ids=lambda op: op.__name__)
def test_triton_says_which_norms_it_cannot(op, device):
    pytest.importorskip("triton")
    reason = f"backend 'triton' cannot run {op.__name__}: .* takes float32, float16 and bfloat16, not torch.float64"
    with pytest.raises(RuntimeError, match=reason):
        op(torch.ones(1, 2, 2, 4, dtype=torch.float64, device=device), backend="triton")
    with pytest.raises(RuntimeError, match=f"cannot run {op.__name__}: .* takes rows of up to 8192 channels, not 8196"):
        op(torch.ones(1, 2, 2, 8196 if op is swinops.layer_norm else 2049, device=device), backend="triton")


@pytest.mark.parametrize("op", [swinops.add_layer_norm, swinops.layer_norm_add], ids=lambda op: op.__name__)
@pytest.mark.parametrize("wide", ["x", "f"])
def test_triton_adds_no_float64(wide, op, device):
    """Whichever of the two it is that is summed."""
    pytest.importorskip("triton")
    x, f = (torch.ones(2, 4, device=device, dtype=torch.float64 if name == wide else torch.float16) for name in "xf")
    with pytest.raises(RuntimeError, match=f"backend 'triton' cannot run {op.__name__}: .*not torch.float64"):
        op(x, f, backend="triton")


def test_triton_on_a_cpu_without_its_interpreter():
    """In a process of its own, because kernels are interpreted or compiled from their import on."""
    pytest.importorskip("triton")
    code = "import torch, swinops; swinops.window_partition(torch.ones(1, 4, 4, 1), 2, backend='triton')"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "RuntimeError: backend 'triton' cannot run window_partition: the tensor is on the CPU" in done.stderr


@pytest.mark.parametrize(
    "op, reason, changed",
    [
        ("window_attention", None, {}),
        ("window_attention", None, {"tokens": 8192}),
        ("layer_norm", "it has no CUDA kernel yet", {}),
        ("window_partition", "they were not built", {"missing": "they were not built"}),
        ("window_partition", "its kernels run on CUDA tensors, and this one is on cpu", {"device": "cpu"}),
        (
            "window_partition",
            "its kernels need compute capability 8.0 or higher, and cuda:0 has 7.5",
            {"capability": (7, 5)},
        ),
        (
            "window_partition",
            "swinops._C was built for compute capability 80;90, and cuda:0 has 10.0: install it again on this machine",
            {"capability": (10, 0)},
        ),
        (
            "cosine_attention",
            "its window attention takes float32, float16 and bfloat16, not torch.float64",
            {"dtype": torch.float64},
        ),
        ("cosine_attention", "its window attention takes a head_dim up to 128, not 129", {"shape": (1, 4, 4, 2, 129)}),
        (
            "window_attention",
            "its window attention takes up to 65,535 heads, not 65536",
            {"shape": (1, 4, 4, 65536, 8)},
        ),
        ("window_attention", "its window attention takes windows of up to 8,192 tokens, not 8,193", {"tokens": 8193}),
        (
            "relative_position_bias",
            "its relative position bias sums in float32, which loses float64's precision",
            {"dtype": torch.float64},
        ),
        (
            "continuous_position_bias",
            "its continuous position bias takes float32, float16 and bfloat16, not torch.float64",
            {"dtype": torch.float64},
        ),
    ],
)
def test_cuda_says_what_it_cannot(op, reason, changed, monkeypatch):
    call = {"missing": None, "device": "cuda:0", "capability": (8, 6), "dtype": torch.float16, "tokens": 49}
    call |= {"shape": (1, 4, 4, 2, 32)} | changed
    monkeypatch.setattr(cuda, "extension", lambda: (SimpleNamespace(archs="80;90"), call["missing"]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: call["capability"])
    x = torch.empty(call["shape"], dtype=call["dtype"], device="meta")
    stand_in = SimpleNamespace(device=torch.device(call["device"]), dtype=x.dtype, shape=x.shape, dim=x.dim)
    assert backends.why_not("cuda", stand_in, op, call["tokens"]) == reason


def test_cuda_on_a_cpu_tensor():
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run window_partition: \w+ .*"):
        window_partition(torch.ones(1, 4, 4, 1), 2, backend="cuda")


@pytest.mark.gpu
def test_auto_on_a_gpu_is_a_kernel():
    x = torch.ones(1, 4, 4, 1, 8, device="cuda")
    for op in OPS:
        assert backends.resolve("auto", x, op) is not reference
    with pytest.raises(RuntimeError, match='backend="reference" runs it in plain PyTorch'):
        window_attention(x.double(), x.double(), x.double(), window_size=2)


@pytest.mark.parametrize("capability, table", [((8, 0), 80), ((8, 9), 89), ((9, 0), 90), ((10, 0), 100), ((12, 0), 80)])
def test_architectures_of_the_table(capability, table, monkeypatch):
    """12.0 lacks the matrix instructions that the rows for 9.0 and 10.0 count on."""
    from swinops.kernels import tuning

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tuning.architecture(SimpleNamespace(is_cuda=True, device=None)) == table


def test_float64_bias_leaves_the_dtype_of_the_log_sum_exp():
    x = random_tensor((1, 4, 4, 1, 8), 0)
    bias = torch.zeros(1, 4, 4, dtype=torch.float64)
    arguments = (x, x, x, bias, None, [2, 2], [1, 1], None, "pad_roll", -100.0, "reference")
    torch.library.opcheck(torch.ops.swinops.window_attention, arguments)


@pytest.fixture
def launched(monkeypatch):
    """The CUDA backend's launches go to a stand-in for swinops._C: what it was given, and the stream and device."""
    calls, devices = [], []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            devices.append(self.device)

        def __exit__(self, *error):
            devices.append("left")

    extension = SimpleNamespace(window_partition=lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(cuda, "extension", lambda: (extension, None))
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    return SimpleNamespace(calls=calls, devices=devices, extension=extension)


def test_cuda_launches_on_the_tensors_device(launched):
    x = random_tensor((2, 4, 4, 3), 0)
    cuda.window_partition(x, (2, 2), (1, 1))
    assert launched.devices == [x.device, "left"]
    (call,) = launched.calls
    assert call["stream"] == 7 and call["image"] == x.data_ptr()


def test_cuda_error_carries_op_and_shapes(launched):
    def fail(**arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    launched.extension.window_partition = fail
    with pytest.raises(RuntimeError) as error:
        cuda.window_partition(random_tensor((2, 4, 4, 3), 0, torch.float16), (2, 2), (1, 1))
    assert str(error.value) == (
        "window_partition of image [2, 1, 4, 4, 3] torch.float16, windows [8, 1, 2, 2, 3] torch.float16: "
        "CUDA error: an illegal memory access was encountered"
    )
    assert launched.devices[-1] == "left"  # the device that was current is so again
    launched.extension.window_partition = lambda **arguments: 1 / 0
    with pytest.raises(ZeroDivisionError):  # no error of CUDA's
        cuda.window_partition(random_tensor((2, 4, 4, 3), 0), (2, 2), (1, 1))


def write(path, *rows):
    from swinops.benchmarks.choice import write

    write(rows, path)
    return path


def test_measured_rows_come_from_the_benchmarks_file(tmp_path, capsys):
    """Sums over shapes of one key; a backward is the difference; what one backend could not do is left out."""
    pytest.importorskip("triton")
    from swinops.benchmarks.choice import main

    lines = ["op,shape,direction,impl,median_ms,dtype,device,commit"]

    def add(op, shape, dtype="float16", **times):
        for impl, (forward, both) in times.items():
            for direction, time in (("forward", forward), ("forward+backward", both)):
                lines.append(f'{op},"{shape}",{direction},{impl},{time},{dtype},an H100,abc')

    kernels = {"swinops-cuda": (0.1, 0.3), "swinops-triton": (0.12, 0.31), "pytorch": (1, 3)}
    add("window_attention", "128 x 56 x 56, 3 heads of 32, window 7, shift 0", **kernels)
    add("window_attention", "128 x 56 x 56, 3 heads of 32, window 7, shift 3", **kernels)
    add("window_attention", "2 x 64 x 64, 3 heads of 32, window 8, shift 4", **{**kernels, "swinops-cuda": ("", "")})
    add("window_partition", "128 x 56 x 56 x 96, window 7, shift 3", **kernels)
    add("relative_position_bias", "window 12, 4 heads", **kernels)
    add("relative_position_bias", "window 16, 4 heads", dtype="tf32", **kernels)
    (tmp_path / "ops.csv").write_text("\n".join(lines) + "\n")
    static, other = row(), row(source="measured", device="an A100", arch=80)
    path = write(tmp_path / "choice.csv", static, other, row(source="measured", device="an H100", dtype="float16"))
    assert main(["--measured", str(tmp_path / "ops.csv"), "--arch", "90"], path) == 0
    measured = {"unit": "us", "source": "measured", "device": "an H100", "dtype": "float16"}
    assert choice.read(path) == sorted([
        static,
        other,
        row(200.0, 240.0, **measured),
        row(400.0, 380.0, direction="backward", **measured),
        row(100.0, 120.0, op="window_partition", channels=96, **measured),
        row(100.0, 120.0, op="relative_position_bias", tokens=144, channels=4, **measured),
        row(200.0, 190.0, op="relative_position_bias", direction="backward", tokens=144, channels=4, **measured),
    ])  # fmt: skip
    assert "5 measured rows written, 7 in all" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--measured", str(tmp_path / "ops.csv")], path)
    assert "--measured and --arch go together" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["choice.csv", "ops.csv"]


def test_static_rows_leave_measured_ones(tmp_path):
    pytest.importorskip("triton")
    from swinops.benchmarks.choice import merge

    measured, new = row(source="measured", device="an H100"), row(tokens=144)
    assert merge([row(), row(tokens=64), measured], [new], "static") == [measured, new]


def test_a_static_row_of_every_case(monkeypatch):
    """Kernels run one after the other, each as long as memory takes or issue in most windows, its shorter way.

    Adding up partials of attention takes as long as their bytes, whoever does it.
    """
    pytest.importorskip("triton")
    from swinops.benchmarks import choice as writer

    def measure(case):
        issue, partials = {"cuda": (1.0, 0.0), "triton": (3.0, 0.25)}[case.backend]
        kernels = [kernel((2 * issue, issue), 2.0), kernel((1.0, 0.25), 0.5, partials)]
        adds_up = case.backend == "cuda" and case.op == "window_attention_backward"
        return kernels + [kernel((8.0, 8.0), 0.25, name="SumKernel")] * adds_up

    def kernel(issue, memory, partials=0.0, name="a kernel"):
        return SimpleNamespace(kernel=name, issue_ns=issue, memory_ns=memory, partials_ns=partials)

    monkeypatch.setattr(writer.static.Case, "measure", measure)
    monkeypatch.setattr(cuda, "OPS", ("window_attention", "relative_position_bias", "window_merge"))
    made = [writer.estimate(case) for case in writer.cases()]
    for each in made:
        backward = (each.op, each.direction) == ("window_attention", "backward")
        assert (each.cuda, each.triton) == (2.75 if backward else 2.5, 3.75)
    found = {(each.op, each.direction, each.dtype, each.channels, each.unit) for each in made}
    assert len(made) == len(found) * 3 * 4  # architectures and windows
    dtypes, ways = ("bfloat16", "float16", "float32"), ("forward", "backward")
    assert found == {
        *(("window_attention", way, dtype, 32, "ns a window and head") for way in ways for dtype in dtypes),
        *(("relative_position_bias", way, "float32", 3, "ns a head") for way in ways),
        *(("window_merge", "forward", dtype, 96, "ns a window") for dtype in dtypes),
    }
    monkeypatch.setattr(writer.static.Case, "measure", lambda case: [kernel(None, 2.0)])
    sentence = writer.estimate(next(iter(writer.cases())))
    assert sentence.startswith("no row for sm_80 ")
    assert sentence.endswith("ValueError: the issue or the memory time of a kernel is not known")
