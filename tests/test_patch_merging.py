"""patch_merging_norm: its output and each gradient against the reference in float64."""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swinops import patch_merging_norm, reference
from swinops.testing import assert_op_accurate, differentiate, norm_inputs, random_tensor

OP = "patch_merging_norm"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Case(NamedTuple):
    shape: tuple[int, ...] = (2, 4, 6, 8)
    weight: bool | torch.dtype = True
    bias: bool | torch.dtype = True
    eps: float = 1e-5
    dtype: torch.dtype | None = None
    layout: str = "contiguous"


CASES = {
    "square": Case((1, 6, 6, 12)),
    "wide": Case((1, 2, 10, 5)),
    "tall": Case((1, 10, 2, 5)),
    "odd": Case((2, 5, 7, 8)),
    "odd height": Case((2, 3, 4, 6)),
    "odd width": Case((1, 4, 5, 6)),
    "one token": Case((2, 1, 1, 12)),
    "one row": Case((2, 1, 6, 7)),
    "one column": Case((2, 7, 1, 7)),
    "one patch": Case((1, 2, 2, 96)),
    "1 channel": Case((2, 4, 3, 1)),
    "25 channels": Case((1, 4, 4, 25)),
    "96 channels": Case((1, 6, 5, 96)),
    "768 channels": Case((1, 2, 2, 768), bias=False),
    "many patches": Case((2, 15, 31, 3)),
    "empty batch": Case((0, 4, 5, 8)),
    "no weight": Case(weight=False),
    "no bias": Case(bias=False),
    "neither": Case(weight=False, bias=False),
    "parameters in float32": Case(weight=torch.float32, bias=torch.float32),
    "parameters in float16 and bfloat16": Case(weight=torch.float16, bias=torch.bfloat16),
    "large eps": Case(eps=0.7),
    "to float32": Case(dtype=torch.float32),
    "to bfloat16": Case((2, 3, 5, 8), dtype=torch.bfloat16),
    "last stride not 1": Case((2, 3, 5, 8), layout="last stride not 1"),
    "channels first": Case((2, 3, 5, 8), layout="channels first"),
    "width first": Case((2, 3, 5, 8), layout="width first"),
    "part of a larger image": Case((2, 3, 5, 8), layout="part of a larger image"),
    "expanded": Case((3, 3, 5, 8), layout="expanded"),
}
EVERY_DTYPE = ["odd", "25 channels", "many patches", "empty batch", "parameters in float32", "to bfloat16"]
PAIRS = [(case, dtype) for case in CASES for dtype in DTYPES if case in EVERY_DTYPE or dtype == torch.float16]


def lay_out(x, layout):
    """``x`` with other strides; its numbers too where several places share one."""
    if layout == "last stride not 1":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "channels first":
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == "width first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "part of a larger image":
        return torch.cat([torch.cat([x, x + 1], 1)] * 2, 2)[:, x.shape[1] :, : x.shape[2]]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


def run(case, dtype, device, backend):
    """(op, definition, tensors, dout), the arguments of ``assert_op_accurate``. The gradient is never contiguous."""
    tensors = norm_inputs(case.shape, merged=True, dtype=dtype, weight=case.weight, bias=case.bias, device=device)
    tensors["x"] = lay_out(tensors["x"], case.layout)

    def op(x, weight, bias):
        return patch_merging_norm(x, weight, bias, eps=case.eps, dtype=case.dtype, backend=backend)

    def definition(x, weight, bias):
        return define(case, x, weight, bias)[0]

    B, H, W, C = case.shape
    dout = random_tensor((B, (H + 1) // 2, (W + 1) // 2, 4 * C), 99, case.dtype or dtype, device)
    return op, definition, tensors, lay_out(dout, "channels first" if case.layout == "contiguous" else case.layout)


def define(case, x, weight, bias):
    """All outputs of the reference, in float64 where x is."""
    dtype = case.dtype if case.dtype and x.dtype != torch.float64 else x.dtype
    return reference.patch_merging_norm(x, weight, bias, case.eps, dtype)


@pytest.mark.parametrize("case, dtype", PAIRS, ids=str)
def test_forward_matches_reference(case, dtype, backend, device):
    """Output, and each merged token's mean and rstd."""
    case = CASES[case]
    _, _, tensors, _ = run(case, dtype, device, backend)

    def registered(x, weight, bias):
        return torch.ops.swinops.patch_merging_norm(x, weight, bias, case.eps, case.dtype, backend)

    assert all(x.is_contiguous() for x in registered(**tensors))
    assert_op_accurate(registered, functools.partial(define, case), tensors, (None, None, None))


@pytest.mark.parametrize("case, dtype", PAIRS, ids=str)
def test_backward_matches_reference(case, dtype, backend, device):
    assert_op_accurate(*run(CASES[case], dtype, device, backend))


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if "in float" not in name and not case.dtype])
def test_reference_matches_its_definition(case):
    """Number by number, in float64; and the explicit backward against autograd of that."""
    op, _, tensors, dout = run(CASES[case], torch.float64, "cpu", "reference")
    eps = CASES[case].eps
    actual = differentiate(op, tensors, dout)
    expected = differentiate(lambda **tensors: by_hand(eps, **tensors), tensors, dout)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-11, msg=name)


def by_hand(eps, x, weight, bias):
    """Part p of a merged token is the token p % 2 below and p // 2 to the right of the patch's first, zero outside."""
    B, H, W, C = x.shape
    grid = (H + 1) // 2, (W + 1) // 2
    outside = x.new_zeros(B, C)
    tokens = []
    for row, column in itertools.product(*map(range, grid)):
        places = [(2 * row + part % 2, 2 * column + part // 2) for part in range(4)]
        tokens.append(torch.cat([x[:, h, w] if h < H and w < W else outside for h, w in places], -1))
    merged = torch.stack(tokens, 1).unflatten(1, grid)
    centred = merged - merged.sum(-1, keepdim=True) / (4 * C)
    y = centred / ((centred**2).sum(-1, keepdim=True) / (4 * C) + eps) ** 0.5
    return (y if weight is None else y * weight) + (0 if bias is None else bias)


@pytest.mark.parametrize("case", ["odd", "square", "one row"])
def test_order_is_swins(case):
    """As Microsoft's, timm's and torchvision's Swin write it: pad, slice, concatenate, normalise."""
    x, weight, bias = norm_inputs(CASES[case].shape, merged=True).values()
    padded = torch.nn.functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
    parts = padded[:, 0::2, 0::2], padded[:, 1::2, 0::2], padded[:, 0::2, 1::2], padded[:, 1::2, 1::2]
    expected = torch.nn.functional.layer_norm(torch.cat(parts, -1), weight.shape, weight, bias)
    assert torch.equal(patch_merging_norm(x, weight, bias, backend="reference"), expected)


def test_gradcheck():
    """The registered op, by finite differences, through every differentiable argument."""
    op, _, tensors, _ = run(Case((2, 3, 2, 2), eps=0.1), torch.float64, "cpu", "reference")
    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in tensors.values()])


def test_second_order(backend, device):
    """There is none, and asking for it is an error, not a silent zero."""
    op, _, tensors, _ = run(Case(), torch.float32, device, backend)
    x = tensors["x"].requires_grad_()
    (dx,) = torch.autograd.grad(op(**tensors).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"swinops\.patch_merging_norm has no second derivative"):
        dx.sum().backward()


def test_statistics_are_constants(device):
    """mean and rstd are there for backward: what is made of them has no gradient, rather than a wrong one."""
    _, _, tensors, _ = run(Case(), torch.float32, device, "reference")
    inputs = [x.requires_grad_() for x in tensors.values()]
    outputs = torch.ops.swinops.patch_merging_norm(*inputs, 1e-5, None, "reference")
    assert [x.requires_grad for x in outputs] == [True, False, False]


@pytest.mark.parametrize("case", ["many patches", "96 channels"])
def test_deterministic(case, backend, device):
    op, _, tensors, dout = run(CASES[case], torch.float16, device, backend)
    first, second = (differentiate(op, tensors, dout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ()], ids=str)
def test_only_the_gradients_that_are_wanted(wanted, backend, device):
    """A gradient is the same, and the others None, whichever else is asked for."""
    op, _, tensors, dout = run(CASES["odd"], torch.float32, device, backend)
    everything = differentiate(op, tensors, dout)
    for name, x in tensors.items():
        x.requires_grad_(name in wanted)
    y = op(**tensors)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(dout)
    for name, x in tensors.items():
        assert (x.grad is not None) == (name in wanted)
        assert x.grad is None or torch.equal(x.grad, everything[f"d{name}"]), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_nan_stays_in_its_patch(backend, device):
    """So do infinities, at the padded end too; dx of the other patches is what it was."""
    op, _, tensors, dout = run(Case((2, 5, 7, 8)), torch.float32, device, backend)
    clean = differentiate(op, tensors, dout)
    x = tensors["x"]
    x[0, 2, 3, 1], x[1, 4, 6, 7], x[1, 0, 1, 0] = float("nan"), float("inf"), -float("inf")
    results = differentiate(op, tensors, dout)
    patches = torch.zeros(2, 3, 4, dtype=torch.bool, device=device)
    patches[0, 1, 1] = patches[1, 2, 3] = patches[1, 0, 0] = True
    tokens = patches.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :5, :7]
    for name, hit in (("out", patches), ("dx", tokens)):
        assert torch.equal(results[name].isnan().all(-1), hit), name
        assert torch.equal(results[name][~hit], clean[name][~hit]), name


def test_large_mean(backend, device):
    """A mean of 1e4 spreads: E[x^2] - E[x]^2 in float32 would lose every digit of the variance."""
    op, definition, tensors, dout = run(Case((1, 4, 4, 24)), torch.float32, device, backend)
    tensors["x"] = random_tensor((1, 4, 4, 24), 8, device=device) + 1e4
    assert_op_accurate(op, definition, tensors, dout)


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_constant_patches(value, backend, device):
    """Without variance the norm is the bias, exactly; pads are zeros beside -3.5, and count in the variance."""
    op, definition, tensors, dout = run(Case((2, 5, 4, 25)), torch.float32, device, backend)
    tensors["x"] = torch.full_like(tensors["x"], value)
    y = op(**tensors)
    whole = y if value == 0 else y[:, :2]
    assert torch.equal(whole, tensors["bias"].expand(whole.shape))
    assert value == 0 or not torch.equal(y[:, 2:], tensors["bias"].expand(y[:, 2:].shape))
    assert_op_accurate(op, definition, tensors, dout)


def test_beyond_31_bits(backend, device, beyond_31_bits):
    """Images more than 2**31 elements apart, in the input and in the gradient."""
    op, _, tensors, dout = run(Case((2, 3, 4, 6)), torch.float16, device, backend)
    expected = differentiate(op, tensors, dout)
    actual = differentiate(op, {**tensors, "x": beyond_31_bits(tensors["x"])}, beyond_31_bits(dout))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.gpu
def test_beyond_31_bits_in_memory():
    """Each part of a long batch is the same as alone."""
    tensors = norm_inputs((8, 63, 64, 96), merged=True, dtype=torch.bfloat16, device="cuda")
    dout = random_tensor((8, 32, 32, 384), 9, torch.bfloat16, "cuda")
    repeats = 2**31 // tensors["x"].numel() + 1

    def gradient(n):
        x = tensors["x"].repeat(n, 1, 1, 1).requires_grad_()
        y = patch_merging_norm(x, tensors["weight"], tensors["bias"])
        return y.detach(), torch.autograd.grad(y, x, dout.repeat(n, 1, 1, 1))[0]

    for few, many in zip(gradient(1), gradient(repeats), strict=True):
        assert all(torch.equal(part, few) for part in many.split(8))


@settings(max_examples=20)
@given(st.data())
def test_any_arguments(backend, device, data):
    sizes = [data.draw(st.integers(1, most), name) for name, most in (("B", 3), ("H", 6), ("W", 6))]
    # the norm of one or two numbers hardly depends on them: its gradient is what rounding leaves
    sizes.append(data.draw(st.integers(4, 33), "C"))
    parameter = st.sampled_from([True, False, *DTYPES])
    case = Case(
        tuple(sizes),
        weight=data.draw(parameter, "weight"),
        bias=data.draw(parameter, "bias"),
        eps=data.draw(st.sampled_from([1e-6, 1e-5, 0.1]), "eps"),
        dtype=data.draw(st.sampled_from([None, *DTYPES]), "dtype of y"),
        layout=data.draw(st.sampled_from(["contiguous", "channels first", "width first", "expanded"]), "layout"),
    )
    assert_op_accurate(*run(case, data.draw(st.sampled_from(DTYPES), "dtype"), device, backend))
