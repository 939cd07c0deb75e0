"""layer_norm, add_layer_norm and layer_norm_add, each output and each gradient against the reference in float64."""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from swinops import add_layer_norm, layer_norm, layer_norm_add, reference
from swinops.testing import assert_accurate, assert_op_accurate, differentiate, norm_inputs, random_tensor

OP = "layer_norm"  # of tests that have no parameter ``op``
OPS = ["layer_norm", "add_layer_norm", "layer_norm_add"]
RESIDUAL = OPS[1:]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_op = pytest.mark.parametrize("op", OPS)


class Case(NamedTuple):
    shape: tuple[int, ...] = (2, 5, 32)
    f: bool | torch.dtype = True
    weight: bool | torch.dtype = True
    bias: bool | torch.dtype = True
    sample_scale: tuple[float, ...] | None = None
    eps: float = 1e-5
    dtype: torch.dtype | None = None
    layout: str = "contiguous"

    def inputs(self, op, dtype, device, seed=0):
        f = self.f if op in RESIDUAL else False
        return norm_inputs(self.shape, dtype=dtype, weight=self.weight, bias=self.bias, f=f, device=device, seed=seed)

    def scale(self, x):
        """sample_scale on the device of ``x``, whose numbers are the same in every dtype."""
        return None if self.sample_scale is None else torch.tensor(self.sample_scale, device=x.device)

    def fits(self, op):
        """Whether ``op`` has what the case is about, and where the interpreter is slow whether it is the simplest."""
        if self.shape[-1] > 1000:
            return op == "layer_norm"
        if op == "layer_norm":
            return self.f is True and self.sample_scale is None
        return self.dtype is None or op == "add_layer_norm"


CASES = {
    "1 channel": Case((3, 4, 1)),
    "5 channels": Case((2, 3, 5)),
    "32 channels": Case((2, 7, 32)),
    "96 channels": Case((2, 9, 96)),
    "100 channels": Case((3, 3, 100)),
    "192 channels": Case((1, 5, 192)),
    "1536 channels": Case((1, 3, 1536), weight=False),
    "3072 channels": Case((1, 2, 3072), bias=False),
    "one row": Case((1, 1, 96)),
    "one axis": Case((40,)),
    "images": Case((2, 3, 5, 24)),
    "many rows": Case((3, 211, 8)),
    "no samples": Case((0, 4, 12)),
    "no tokens": Case((2, 0, 12)),
    "no weight": Case(weight=False),
    "no bias": Case(bias=False),
    "neither": Case(weight=False, bias=False),
    "parameters in float32": Case(weight=torch.float32, bias=torch.float32),
    "parameters in float16 and bfloat16": Case(weight=torch.float16, bias=torch.bfloat16),
    "parameters in float64": Case(weight=torch.float64, bias=torch.float64),
    "large eps": Case(eps=0.7),
    "to float32": Case(dtype=torch.float32),
    "to bfloat16": Case(dtype=torch.bfloat16),
    "f in float32": Case(f=torch.float32),
    "f in bfloat16": Case(f=torch.bfloat16),
    "f in float16, to float16": Case(f=torch.float16, dtype=torch.float16),
    "scaled samples": Case((3, 4, 20), sample_scale=(0.0, 1.25, 0.5)),
    "scaled images": Case((3, 2, 3, 20), sample_scale=(2.0, 0.0, 1.5), weight=False),
    "scaled rows": Case((3, 20), sample_scale=(0.0, 1.25, 0.5), bias=False),
    "scaled samples, f in bfloat16": Case((2, 4, 20), sample_scale=(1.25, 0.0), f=torch.bfloat16),
    "last stride not 1": Case(layout="last stride not 1"),
    "every second channel": Case(layout="every second channel"),
    "rows of a wider tensor": Case(layout="rows of a wider tensor"),
    "rows without one stride": Case((3, 4, 20), sample_scale=(0.5, 0.0, 2.0), layout="rows without one stride"),
    "rows without one stride, unscaled": Case((3, 4, 20), layout="rows without one stride"),
    "expanded": Case(layout="expanded"),
    "one element": Case(layout="one element"),
}
EVERY_DTYPE = [
    "1 channel", "100 channels", "many rows", "no samples", "parameters in float16 and bfloat16", "to float32",
    "f in float32", "scaled samples", "scaled samples, f in bfloat16",
]  # fmt: skip
TRIPLES = [
    (op, name, dtype)
    for op in OPS
    for name, case in CASES.items()
    for dtype in DTYPES
    if case.fits(op) and (name in EVERY_DTYPE or dtype == torch.float16)
]
every_case = pytest.mark.parametrize("op, case, dtype", TRIPLES, ids=str)


def lay_out(x, layout):
    """``x`` with other strides; its numbers too where several places share one."""
    if layout == "last stride not 1":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second channel":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "rows of a wider tensor":
        return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]
    if layout == "rows without one stride":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "one element":
        return x.flatten()[:1].view([1] * x.dim()).expand(x.shape)
    return x


def run(op, case, dtype, device, backend):
    """(op, definition, tensors, dout), the arguments of ``assert_op_accurate``. The gradient is never contiguous."""
    tensors = case.inputs(op, dtype, device)
    for name in ("x", "f"):
        # a row of one number in all has no variance: that is for the gradient
        if name in tensors and case.layout != "one element":
            tensors[name] = lay_out(tensors[name], case.layout)

    def call(x, weight, bias, f=None):
        if op == "layer_norm":
            return layer_norm(x, weight, bias, eps=case.eps, dtype=case.dtype, backend=backend)
        settings = {"sample_scale": case.scale(x), "eps": case.eps, "backend": backend}
        if op == "add_layer_norm":
            return add_layer_norm(x, f, weight, bias, dtype=case.dtype, **settings)
        return layer_norm_add(x, f, weight, bias, **settings)

    def definition(**tensors):
        outputs = define(op, case, **tensors)[:-2]
        return outputs[0] if len(outputs) == 1 else outputs

    layout = "last stride not 1" if case.layout == "contiguous" and len(case.shape) > 1 else case.layout
    with torch.no_grad():
        outputs = definition(**tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dout = tuple(
        lay_out(random_tensor(x.shape, 99 + n, x.dtype, device), layout) if x.numel() else torch.empty_like(x)
        for n, x in enumerate(outputs)
    )
    return call, definition, tensors, dout


def define(op, case, x, weight, bias, f=None):
    """All outputs of the reference, in float64 where x is."""
    scale = case.scale(x)
    promoted = x.dtype if f is None else torch.promote_types(x.dtype, f.dtype)
    dtype = case.dtype if case.dtype and x.dtype != torch.float64 else promoted
    if op == "layer_norm":
        return reference.layer_norm(x, weight, bias, case.eps, dtype)
    if op == "add_layer_norm":
        return reference.add_layer_norm(x, f, scale, weight, bias, case.eps, dtype)
    return reference.layer_norm_add(x, f, scale, weight, bias, case.eps)


def registered(op, case, backend, x, weight, bias, f=None):
    """All outputs of the registered op."""
    settings = [case.eps, backend] if op == "layer_norm_add" else [case.eps, case.dtype, backend]
    rows = [x] if op == "layer_norm" else [x, f, case.scale(x)]
    return getattr(torch.ops.swinops, op)(*rows, weight, bias, *settings)


@every_case
def test_forward_matches_reference(op, case, dtype, backend, device):
    """Every output, and each row's mean and rstd."""
    case = CASES[case]
    _, _, tensors, _ = run(op, case, dtype, device, backend)
    outputs = registered(op, case, backend, **tensors)
    assert all(x.is_contiguous() for x in outputs)
    assert_op_accurate(
        functools.partial(registered, op, case, backend),
        functools.partial(define, op, case),
        tensors,
        (None,) * len(outputs),
    )


@every_case
def test_backward_matches_reference(op, case, dtype, backend, device):
    assert_op_accurate(*run(op, CASES[case], dtype, device, backend))


def by_hand(op, case, x, weight, bias, f=None):
    """The formulas of arXiv 1607.06450, in elementary operations that autograd differentiates."""
    scale = 1 if case.sample_scale is None else case.scale(x).double().view(-1, *[1] * (x.dim() - 1))

    def norm(x):
        mean = x.sum(-1, keepdim=True) / x.shape[-1]
        variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
        y = (x - mean) / (variance + case.eps) ** 0.5
        return (y if weight is None else y * weight) + (0 if bias is None else bias)

    if op == "layer_norm":
        return norm(x)
    if op == "add_layer_norm":
        return x + scale * f, norm(x + scale * f)
    return x + scale * norm(f)


@pytest.mark.parametrize("op, case", [(op, case) for op, case, dtype in TRIPLES if dtype == torch.float16], ids=str)
def test_reference_matches_its_definition(op, case):
    """In float64: the outputs, and the explicit backward against autograd of the formulas."""
    case = CASES[case]
    # every dtype is float64 here, so the cases for dtypes are left as they are without them
    case = case._replace(dtype=None, f=bool(case.f), weight=bool(case.weight), bias=bool(case.bias))
    call, _, tensors, dout = run(op, case, torch.float64, "cpu", "reference")
    actual = differentiate(call, tensors, dout)
    expected = differentiate(lambda **tensors: by_hand(op, case, **tensors), tensors, dout)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("weight, bias", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_reference_is_torchs(weight, bias):
    """In float32 layer_norm's output and gradients are those of torch.nn.functional.layer_norm, bit for bit."""
    tensors = norm_inputs((2, 7, 96), weight=weight, bias=bias)
    dout = random_tensor((2, 7, 96), 9)
    ours = differentiate(lambda **tensors: layer_norm(**tensors, backend="reference"), tensors, dout)
    torchs = differentiate(lambda x, weight, bias: F.layer_norm(x, (96,), weight, bias), tensors, dout)
    for name in torchs:
        assert torch.equal(ours[name], torchs[name]), name


@every_op
def test_gradcheck(op):
    """The registered op, by finite differences, through every differentiable argument."""
    case = Case((2, 2, 3), eps=0.1, sample_scale=None if op == "layer_norm" else (0.5, 2.0))
    call, _, tensors, _ = run(op, case, torch.float64, "cpu", "reference")
    leaves = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(lambda *leaves: call(**dict(zip(tensors, leaves, strict=True))), leaves)


@every_op
def test_second_order(op, backend, device):
    """There is none, and asking for it is an error, not a silent zero."""
    call, _, tensors, _ = run(op, Case(), torch.float32, device, backend)
    x = tensors["f" if op == "layer_norm_add" else "x"].requires_grad_()
    out = call(**tensors)
    (dx,) = torch.autograd.grad((out if op != "add_layer_norm" else out[1]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=rf"swinops\.{op} has no second derivative"):
        dx.sum().backward()


@every_op
def test_statistics_are_constants(op, device):
    """mean and rstd are there for backward: what is made of them has no gradient, rather than a wrong one."""
    tensors = {name: x.requires_grad_() for name, x in Case().inputs(op, torch.float32, device).items()}
    *outputs, mean, rstd = registered(op, Case(), "reference", **tensors)
    assert all(x.requires_grad for x in outputs) and not mean.requires_grad and not rstd.requires_grad


@every_op
@pytest.mark.parametrize("case", ["many rows", "192 channels"])
def test_deterministic(op, case, backend, device):
    call, _, tensors, dout = run(op, CASES[case], torch.float16, device, backend)
    first, second = (differentiate(call, tensors, dout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_op
@pytest.mark.parametrize("wanted", [("x",), ("f",), ("weight",), ("bias",), ("x", "bias"), ()], ids=str)
def test_only_the_gradients_that_are_wanted(op, wanted, backend, device):
    """A gradient is the same, and the others None, whichever else is asked for."""
    call, _, tensors, dout = run(op, CASES["96 channels"], torch.float32, device, backend)
    everything = differentiate(call, tensors, dout)
    for name, x in tensors.items():
        x.requires_grad_(name in wanted)
    out = call(**tensors)
    if not set(wanted) & set(tensors):
        assert not any(x.requires_grad for x in (out if isinstance(out, tuple) else (out,)))
        return
    torch.autograd.backward(out, dout if isinstance(out, tuple) else dout[0])
    for name, x in tensors.items():
        assert (x.grad is not None) == (name in wanted)
        assert x.grad is None or torch.equal(x.grad, everything[f"d{name}"]), name


@pytest.mark.parametrize("op", ["add_layer_norm"])
@pytest.mark.parametrize("scale", [None, (0.0, 1.5)], ids=["", "scaled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unused", [0, 1])
def test_one_output_unused(op, unused, dtype, scale, backend, device):
    """Only y, as of a model's last norm, or only s, is differentiated."""
    call, definition, tensors, dout = run(op, Case((2, 5, 24), sample_scale=scale), dtype, device, backend)
    dout = tuple(None if n == unused else d for n, d in enumerate(dout))
    assert_op_accurate(call, definition, tensors, dout)


@pytest.mark.parametrize("op", ["add_layer_norm"])
def test_gradients_of_a_sum_are_two_tensors(op, backend, device):
    """One tensor inside; but what is added to x.grad later must not arrive in f.grad."""
    call, _, tensors, dout = run(op, Case(), torch.float32, device, backend)
    x, f = (tensors[name].requires_grad_() for name in "xf")
    torch.autograd.backward(call(**tensors), dout)
    assert torch.equal(x.grad, f.grad)
    x.grad.zero_()
    assert f.grad.all()


@pytest.mark.parametrize("op", ["add_layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("f", DTYPES, ids=str)
def test_norm_is_that_of_the_rounded_sum(op, f, dtype, backend, device):
    """s is rounded once, and y, here in float32, is the norm of the s that is returned."""
    tensors = norm_inputs((2, 5, 96), dtype=dtype, f=f, device=device)
    s, y = add_layer_norm(**tensors, dtype=torch.float32, backend=backend)
    promoted = torch.promote_types(dtype, f)
    assert torch.equal(s, (tensors["x"].double() + tensors["f"].double()).to(promoted))
    norm = tensors["weight"], tensors["bias"], 1e-5
    exact = reference.layer_norm(s.double(), *norm, torch.float64)[0]
    assert_accurate(y, reference.layer_norm(s, *norm, torch.float32)[0], exact, "y")


@pytest.mark.parametrize("op", RESIDUAL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_samples(op, dtype, backend, device):
    """Where sample_scale is zero the residual passes as it is, and f gets no gradient, in any dtype of the scale."""
    for scale_dtype in (dtype, torch.float64, torch.float32):
        tensors = norm_inputs((3, 4, 20), dtype=dtype, f=True, device=device)
        scale = torch.tensor([0.0, 1.5, 0.0], device=device, dtype=scale_dtype)
        f = tensors["f"].requires_grad_()
        function = add_layer_norm if op == "add_layer_norm" else layer_norm_add
        out = function(**tensors, sample_scale=scale, backend=backend)
        out = out[0] if op == "add_layer_norm" else out
        out.backward(random_tensor(out.shape, 9, dtype, device))
        same = (out == tensors["x"]).flatten(1).all(1)
        assert same.tolist() == [True, False, True]
        assert [bool(x.any()) for x in f.grad] == [False, True, False]


@every_op
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_nan_stays_in_its_row(op, backend, device):
    """So do infinities; of the gradients, dx of the other rows is what it was, and dweight and dbias are NaN."""
    call, _, tensors, dout = run(op, Case((2, 7, 20)), torch.float32, device, backend)
    name = "f" if op == "layer_norm_add" else "x"
    clean = differentiate(call, tensors, dout)
    tensors[name][0, 3, 5], tensors[name][1, 2, 19], tensors[name][1, 6, 0] = float("nan"), float("inf"), -float("inf")
    results = differentiate(call, tensors, dout)
    hit = torch.zeros(2, 7, dtype=torch.bool, device=device)
    hit[0, 3] = hit[1, 2] = hit[1, 6] = True
    out = "out 1" if op == "add_layer_norm" else "out"
    for key in (out, f"d{name}"):
        assert torch.equal(results[key].isnan().all(-1), hit), key
        assert torch.equal(results[key][~hit], clean[key][~hit]), key
    assert results["dweight"].isnan().all() and torch.equal(results["dbias"], clean["dbias"])


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_mean(op, dtype, backend, device):
    """A mean of 1e4 spreads: E[x^2] - E[x]^2 in float32 would lose every digit of the variance."""
    call, definition, tensors, dout = run(op, Case((3, 3, 96)), dtype, device, backend)
    name = "f" if op == "layer_norm_add" else "x"
    # in float32 a spread of about one; bfloat16 cannot hold that beside its mean
    tensors[name] = (random_tensor((3, 3, 96), 8, device=device) * (1 if dtype == torch.float32 else 64) + 1e4).to(
        dtype
    )
    assert_op_accurate(call, definition, tensors, dout)


@every_op
@pytest.mark.parametrize("value", [0.0, -3.5])
def test_constant_rows(op, value, backend, device):
    """Without variance the norm is the bias, exactly: 100 channels, whose mean is not exact in every order."""
    tensors = norm_inputs((2, 3, 100), f=op in RESIDUAL, device=device)
    for name in ("x", "f"):
        if name in tensors:
            tensors[name] = torch.full_like(tensors[name], value)
    call, definition, _, dout = run(op, Case((2, 3, 100)), torch.float32, device, backend)
    out = call(**tensors)
    y = out[1] if op == "add_layer_norm" else out
    expected = tensors["bias"] + (value if op == "layer_norm_add" else 0)
    assert torch.equal(y, expected.expand(y.shape))
    assert_op_accurate(call, definition, tensors, dout)


@every_op
def test_many_rows(op, backend, device):
    """More rows than a grid of one program each: gradients of the parameters are sums over all of them."""
    assert_op_accurate(*run(op, Case((2, 2503, 5)), torch.float32, device, backend))


@every_op
def test_half_precision_sums_are_wide(op, backend, device):
    """A sum over 5000 rows kept in float16 would stop at 2048."""
    call, _, tensors, _ = run(op, Case((5000, 2)), torch.float16, device, backend)
    bias = tensors["bias"].requires_grad_()
    out = call(**tensors)
    (out[1] if op == "add_layer_norm" else out).sum().backward()
    assert torch.equal(bias.grad, torch.full_like(bias, 5000))


@every_op
def test_beyond_31_bits(op, backend, device, beyond_31_bits):
    """Rows more than 2**31 elements apart, in the inputs and in the gradient."""
    call, _, tensors, dout = run(op, Case((2, 12)), torch.float16, device, backend)
    expected = differentiate(call, tensors, dout)
    for name in ("x", "f"):
        if name in tensors:
            tensors[name] = beyond_31_bits(tensors[name])
    actual = differentiate(call, tensors, tuple(beyond_31_bits(d) for d in dout))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.gpu
@every_op
def test_beyond_31_bits_in_memory(op):
    """Each part of a long batch is the same as alone; where dweight is summed over all, its parts would be."""
    part = norm_inputs((4096, 256), dtype=torch.bfloat16, f=op in RESIDUAL, device="cuda")
    dout = random_tensor((4096, 256), 9, torch.bfloat16, "cuda")
    repeats = 2**31 // part["x"].numel() + 1

    def gradient(n):
        tensors = {name: x.repeat(n, 1) if x.dim() == 2 else x for name, x in part.items()}
        name = "f" if op == "layer_norm_add" else "x"
        tensors[name].requires_grad_()
        function = {"layer_norm": layer_norm, "add_layer_norm": add_layer_norm, "layer_norm_add": layer_norm_add}[op]
        out = function(**tensors)
        out = out[1] if op == "add_layer_norm" else out
        return out.detach(), torch.autograd.grad(out, tensors[name], dout.repeat(n, 1))[0]

    for few, many in zip(gradient(1), gradient(repeats), strict=True):
        assert all(torch.equal(rows, few) for rows in many.split(4096))


@given(st.data())
def test_any_arguments(backend, device, data):
    op = data.draw(st.sampled_from(OPS), "op")
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3), "rows"))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    parameter = st.sampled_from([True, False, *DTYPES])
    scales = st.lists(st.sampled_from([0.0, 0.5, 1.25]), min_size=shape[0], max_size=shape[0])
    case = Case(
        # the norm of one or two numbers hardly depends on them: its gradient is what rounding leaves
        (*shape, data.draw(st.integers(4, 140), "channels")),
        f=data.draw(st.sampled_from(DTYPES), "f"),
        weight=data.draw(parameter, "weight"),
        bias=data.draw(parameter, "bias"),
        sample_scale=None if op == "layer_norm" else data.draw(st.none() | scales.map(tuple), "sample_scale"),
        eps=data.draw(st.sampled_from([1e-6, 1e-5, 0.1]), "eps"),
        dtype=None if op == "layer_norm_add" else data.draw(st.sampled_from([None, *DTYPES]), "dtype of y"),
        layout=data.draw(st.sampled_from(["contiguous", "expanded", "every second channel"]), "layout"),
    )
    assert_op_accurate(*run(op, case, dtype, device, backend))
