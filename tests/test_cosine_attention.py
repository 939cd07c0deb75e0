"""cosine_attention and cosine_attention_qkvpacked, each output and each gradient against the reference in float64.

Geometry, layouts and what else the op shares with window_attention are tested there at length.
"""

import functools
import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from swinops import cosine_attention, cosine_attention_qkvpacked, reference
from swinops.testing import (
    assert_op_accurate,
    attention_inputs,
    differentiate,
    logit_scales,
    random_tensor,
)

from .test_window_attention import CASES, DTYPES, PAD_ORDERS, Case, by_hand
from .test_window_attention import run as run_attention

OP = "cosine_attention"
# the geometry is window_attention's; these reach every kernel, and every place that a norm or the scale enters
EVERY_DTYPE = ["ragged", "ragged volume", "head_dim 10", "49 tokens", "72 tokens, ragged", "packed"]
IN_FLOAT16 = [
    "wide", "one shifted window", "window larger than the map", "windows of one token", "empty batch", "head_dim 33",
    "head_dim 256", "144 tokens, ragged", "neither", "pad_kv in float32", "packed, strided", "each its own strides",
]  # fmt: skip
PAIRS = [(case, dtype) for case in EVERY_DTYPE for dtype in DTYPES] + [(case, torch.float16) for case in IN_FLOAT16]
# of one channel, cosines are 1 or -1 in every dtype, and plain PyTorch's dlogit_scale is exact
PAIRS += [("head_dim 1", torch.float32)]
LN_100 = math.log(100)


def run(case, dtype, device, backend, pad_order):
    return run_attention(case, dtype, device, backend, pad_order, logit_scales(case.heads, device=device))


@pytest.mark.parametrize("case, dtype", PAIRS, ids=str)
def test_forward_matches_reference(case, dtype, backend, device):
    """Output and log-sum-exp."""
    case = CASES[case]
    for pad_order in case.pad_orders:
        _, _, tensors, _ = run(case, dtype, device, backend, pad_order)
        window, shift, _, *rest = case.settings(pad_order)
        settings = window, shift, *rest
        op = torch.ops.swinops.cosine_attention if "q" in tensors else torch.ops.swinops.cosine_attention_qkvpacked

        def define(settings=settings, **tensors):
            if "qkv" in tensors:
                q, k, v = tensors.pop("qkv").unbind(-3)
                tensors = {"q": q, "k": k, "v": v, **tensors}
            return reference.cosine_attention(*tensors.values(), *settings)

        def run_op(op=op, settings=settings, **tensors):
            return op(*tensors.values(), *settings, backend)

        assert all(x.is_contiguous() for x in run_op(**tensors))
        assert_op_accurate(run_op, define, tensors, (None, None))


@pytest.mark.parametrize("case, dtype", PAIRS, ids=str)
def test_backward_matches_reference(case, dtype, backend, device):
    case = CASES[case]
    for pad_order in case.pad_orders:
        assert_op_accurate(*run(case, dtype, device, backend, pad_order))


@pytest.mark.parametrize("case", ["ragged", "one shifted window", "shift larger than the map", "ragged volume"])
def test_reference_matches_its_definition(case):
    """Token by token from the definition, in float64; and the explicit backward against autograd of the forward."""
    case = CASES[case]
    for pad_order in case.pad_orders:
        q, k, v, bias, pad_kv, dout = case.inputs(torch.float64, "cpu")
        logit_scale = logit_scales(case.heads, dtype=torch.float64)
        window, shift, _, *rest = case.settings(pad_order)
        scaled = F.normalize(q, dim=-1) * logit_scale.clamp(max=LN_100).exp()[:, None]
        unit_pads = torch.stack((F.normalize(pad_kv[0], dim=-1), pad_kv[1]))
        expected = by_hand(scaled, F.normalize(k, dim=-1), v, bias, unit_pads, window, shift, 1.0, *rest)
        out = reference.cosine_attention(q, k, v, logit_scale, bias, pad_kv, window, shift, *rest)[0]
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

        op, definition, tensors, dout = run_attention(
            case, torch.float64, "cpu", "reference", pad_order, logit_scale
        )  # fmt: skip
        explicit, exact = differentiate(op, tensors, dout), differentiate(definition, tensors, dout)
        for name in exact:
            torch.testing.assert_close(explicit[name], exact[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
def test_gradcheck(pad_order):
    """The registered op, by finite differences, through every differentiable argument."""
    q, k, v, bias, pad_kv, _ = attention_inputs((3, 2), (2, 2), batch=1, heads=2, head_dim=2, dtype=torch.float64)
    logit_scale = logit_scales(2, dtype=torch.float64)
    settings = {"window_size": 2, "shift_size": 1, "pad_order": pad_order, "mask_value": -2.0, "backend": "reference"}
    leaves = [x.requires_grad_() for x in (q, k, v, logit_scale, bias, pad_kv)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, s, b, p: cosine_attention(q, k, v, s, b, pad_kv=p, **settings), leaves
    )
    qkv = torch.stack((q, k, v), -3).detach().requires_grad_()
    leaves = [qkv, logit_scale, bias, pad_kv]
    assert torch.autograd.gradcheck(
        lambda x, s, b, p: cosine_attention_qkvpacked(x, s, b, pad_kv=p, **settings), leaves
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(4, 4), (8, 9)], ids=str)
def test_vectors_of_zeros(window, dtype, backend, device):
    """Cosine 0 and gradient 0, with pads whose key is zero too; the other tokens' are those of torch's normalize."""
    q, k, v, bias, pad_kv, dout = attention_inputs((5, 7), window, heads=2, dtype=dtype, device=device)
    q[:, 1, 2], k[:, 3, :2], pad_kv[0] = 0, 0, 0
    logit_scale = torch.tensor([2.0, 4.0], device=device)
    names, inputs = ("q", "k", "v", "logit_scale", "bias", "pad_kv"), (q, k, v, logit_scale, bias, pad_kv)

    def op(q, k, v, logit_scale, bias, pad_kv):
        return cosine_attention(
            q, k, v, logit_scale, bias, pad_kv=pad_kv, window_size=window, shift_size=1, backend=backend
        )

    def definition(q, k, v, logit_scale, bias, pad_kv):
        return reference.cosine_attention(q, k, v, logit_scale, bias, pad_kv, window, (1, 1), "pad_roll", -100.0)[0]

    def by_normalize(q, k, v, logit_scale, bias, pad_kv):
        q = F.normalize(q, dim=-1) * logit_scale.exp()[:, None]
        pad_kv = torch.stack((F.normalize(pad_kv[0], dim=-1), pad_kv[1]))
        k = F.normalize(k, dim=-1)
        return reference.window_attention(q, k, v, bias, pad_kv, window, (1, 1), 1.0, "pad_roll", -100.0)[0]

    tensors = dict(zip(names, inputs, strict=True))
    results = differentiate(op, tensors, dout)
    assert all(x.isfinite().all() for x in results.values())
    for name, zero in (("q", q == 0), ("k", k == 0)):
        assert zero.any() and not results[f"d{name}"][zero].any()
    assert not results["dpad_kv"][0].any() and results["dpad_kv"][1].any()
    assert_op_accurate(op, definition, tensors, dout)

    exact = {name: x.double() for name, x in tensors.items()}
    ours, theirs = (differentiate(f, exact, dout.double()) for f in (definition, by_normalize))
    for name in ("q", "k"):
        theirs[f"d{name}"][exact[name] == 0] = 0  # 1e12 times the gradient of the direction
    theirs["dpad_kv"][0] = 0
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("length", [0.9, 1.1])
def test_shortest_vectors(length, backend, device):
    """Vectors around 1e-12 are divided as torch's normalize does; those that are shorter have no gradient."""
    q, k, v, *_, dout = attention_inputs((4, 4), (4, 4), batch=1, device=device)
    q = F.normalize(q, dim=-1) * length * 1e-12
    logit_scale = torch.zeros(2, device=device)

    def op(q):
        return cosine_attention(q, k, v, logit_scale, window_size=4, backend=backend)

    def plain(q):
        unit, zeros = F.normalize(q, dim=-1), (0, 0)
        return reference.window_attention(
            unit, F.normalize(k, dim=-1), v, None, None, (4, 4), zeros, 1.0, "pad_roll", 0.0
        )[0]

    actual, expected = differentiate(op, {"q": q}, dout), differentiate(plain, {"q": q}, dout)
    torch.testing.assert_close(actual["out"], expected["out"])
    if length < 1:
        assert not actual["dq"].any()
    else:
        torch.testing.assert_close(
            actual["dq"], expected["dq"], rtol=1e-5, atol=1e-6 * float(expected["dq"].abs().max())
        )


@pytest.mark.parametrize("window", [(4, 4), (8, 9)], ids=str)
def test_lengths_do_not_matter(window, backend, device):
    """Vectors of other lengths give the same output bit for bit, and gradients that are shorter as they are longer."""
    q, k, v, bias, pad_kv, dout = attention_inputs((5, 7), window, heads=2, device=device)
    lengths = 4.0 ** random_tensor(q.shape[:-1], 9, device=device).round()[..., None]
    logit_scale = logit_scales(2, device=device)

    def op(q, k):
        return cosine_attention(q, k, v, logit_scale, bias, pad_kv=pad_kv, window_size=window, backend=backend)

    near, far = differentiate(op, {"q": q, "k": k}, dout), differentiate(op, {"q": q * lengths, "k": k / lengths}, dout)
    assert torch.equal(near["out"], far["out"])
    if backend != "reference":  # whose torch.sum adds in another order where a row is aligned otherwise
        assert torch.equal(near["dq"], far["dq"] * lengths)
        assert torch.equal(near["dk"], far["dk"] / lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [(3, 4), (8, 9)], ids=str)
def test_logit_scale_is_clamped(window, dtype, backend, device):
    """Above ln 100 the scale is 100 and has no gradient; at ln 100 it has one, as autograd's clamp gives it."""
    q, k, v, bias, _, dout = attention_inputs(window, window, heads=4, dtype=dtype, device=device)
    at = torch.tensor(LN_100)
    logit_scale = torch.stack((at - 0.1, at, at.nextafter(torch.tensor(5.0)), torch.tensor(30.0))).to(device)

    def op(logit_scale):
        return cosine_attention(q, k, v, logit_scale, bias, window_size=window, backend=backend)

    results = differentiate(op, {"logit_scale": logit_scale.view(4, 1, 1)}, dout)
    assert results["dlogit_scale"].shape == (4, 1, 1)
    (clamped,) = torch.autograd.grad(logit_scale.requires_grad_().clamp(max=LN_100).sum(), logit_scale)
    assert clamped.tolist() == [1, 1, 0, 0]
    assert (results["dlogit_scale"].flatten() != 0).tolist() == [True, True, False, False]
    with torch.no_grad():
        assert torch.equal(results["out"], op(logit_scale.clamp(max=LN_100)))


@pytest.mark.parametrize("window", [(3, 4), (8, 9)], ids=str)
def test_logit_scale_of_nan(window, backend, device):
    """A scale that diverged is not taken for 100: its head is NaN, and the other as without it."""
    q, k, v, bias, _, dout = attention_inputs(window, window, batch=1, device=device)
    good = torch.tensor([2.0, 2.0], device=device)

    def op(logit_scale):
        return cosine_attention(q, k, v, logit_scale, bias, window_size=window, backend=backend)

    bad = torch.tensor([float("nan"), 2.0], device=device)
    results, clean = (differentiate(op, {"logit_scale": x}, dout) for x in (bad, good))
    assert results["out"][..., 0, :].isnan().all() and results["dlogit_scale"][0].isnan()
    assert torch.equal(results["out"][..., 1, :], clean["out"][..., 1, :])
    assert torch.equal(results["dlogit_scale"][1], clean["dlogit_scale"][1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_logit_scale_of_another_dtype(dtype, backend, device):
    """It is read as it is: not rounded to q's dtype, and its gradient has its own."""
    q, k, v, bias, _, dout = attention_inputs((4, 4), (4, 4), dtype=torch.float16, device=device)
    logit_scale = logit_scales(2, dtype=dtype, device=device)

    def op(logit_scale):
        return cosine_attention(q, k, v, logit_scale, bias, window_size=4, backend=backend)

    results, wide = (differentiate(op, {"logit_scale": x}, dout) for x in (logit_scale, logit_scale.float()))
    assert results["dlogit_scale"].dtype == dtype
    assert torch.equal(results["dlogit_scale"], wide["dlogit_scale"].to(dtype))
    if dtype != torch.float64:
        assert torch.equal(results["out"], wide["out"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [(3, 4), (8, 9)], ids=str)
def test_scale_of_100(window, dtype, backend, device):
    """Every key of a query opposite to it: the scores are near -100, where exp2 of what a fixed bound leaves is 0."""
    q, k, v, bias, _, dout = attention_inputs(window, window, batch=1, heads=1, dtype=dtype, device=device)
    direction = random_tensor(k.shape[-1:], 8, dtype, device)
    q, k = direction + q / 64, -direction + k / 64
    logit_scale = torch.tensor([LN_100], device=device)

    def op(q, k, v, logit_scale, bias):
        return cosine_attention(q, k, v, logit_scale, bias, window_size=window, backend=backend)

    def definition(q, k, v, logit_scale, bias):
        return reference.cosine_attention(q, k, v, logit_scale, bias, None, window, (0, 0), "pad_roll", -100.0)[0]

    inputs = q, k, v, logit_scale, bias
    lse = torch.ops.swinops.cosine_attention(*inputs, None, window, [0, 0], "pad_roll", -100.0, backend)[1]
    assert (lse < -100).all()  # to base 2: the largest exponential is far below what 2^0 less a bound of 2^288 keeps
    if dtype != torch.float32:
        # what is left of the sum over cosines that are all -1 is the rounding of those, or of what they multiply
        op, definition = (functools.partial(f, logit_scale=logit_scale) for f in (op, definition))
        assert_op_accurate(op, definition, {"q": q, "k": k, "v": v, "bias": bias}, dout)
    else:
        tensors = dict(zip(("q", "k", "v", "logit_scale", "bias"), inputs, strict=True))
        assert_op_accurate(op, definition, tensors, dout)


@pytest.mark.parametrize("packed", [False, True])
def test_second_order(packed, backend, device):
    """There is none, and asking for it is an error, not a silent zero."""
    q, k, v, bias, *_ = attention_inputs((4, 4), (4, 4), batch=1, heads=1, device=device)
    logit_scale = logit_scales(1, device=device).requires_grad_()
    if packed:
        out = cosine_attention_qkvpacked(
            torch.stack((q, k, v), -3), logit_scale, bias, window_size=4, shift_size=2, backend=backend
        )
    else:
        out = cosine_attention(q, k, v, logit_scale, bias, window_size=4, shift_size=2, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), logit_scale, create_graph=True)
    with pytest.raises(RuntimeError, match=r"swinops\.cosine_attention\w* has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("case", ["ragged", "72 tokens, ragged", "packed"])
def test_deterministic(case, backend, device):
    op, _, tensors, dout = run(CASES[case], torch.float16, device, backend, "pad_roll")
    first, second = (differentiate(op, tensors, dout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wanted", [("q",), ("logit_scale",), ("bias",), ("pad_kv", "logit_scale"), ()], ids=str)
@pytest.mark.parametrize("case", ["one shifted window", "72 tokens, both float32"])
def test_only_the_gradients_that_are_wanted(case, wanted, backend, device):
    """A gradient is the same, and the others None, whichever else is asked for."""
    op, _, tensors, dout = run(CASES[case], torch.float32, device, backend, "pad_roll")
    every = differentiate(op, tensors, dout)
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    out = op(**leaves)
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.backward(dout)
    for name, x in leaves.items():
        assert (x.grad is not None) == (name in wanted), name
        assert x.grad is None or torch.equal(x.grad, every[f"d{name}"]), name


@pytest.mark.parametrize("window", [(3, 4), (8, 9)], ids=str)
def test_beyond_31_bits(window, backend, device, beyond_31_bits):
    """Addresses past 2**31 elements: every tensor's batch lies that far apart, the gradients' too."""
    q, k, v, bias, pad_kv, dout = attention_inputs((3, 5), window, heads=1, dtype=torch.float16, device=device)
    learned, settings = (logit_scales(1, device=device), bias, pad_kv), (window, (1, 2), "roll_pad", -100.0)
    from swinops.backends import module

    far, run_on = [beyond_31_bits(x) for x in (q, k, v)], module(backend)
    out, lse = run_on.cosine_attention(*far, *learned, *settings)
    near_out, near_lse = run_on.cosine_attention(q, k, v, *learned, *settings)
    assert torch.equal(out, near_out) and torch.equal(lse, near_lse)

    near = [torch.empty_like(x) for x in (q, k, v, *learned)]
    run_on.cosine_attention_backward(dout, q, k, v, *learned, out, lse, *near, *settings)
    grads = [
        *(beyond_31_bits(torch.full_like(x, float("nan"))) for x in (q, k, v)),
        *(torch.empty_like(x) for x in near[3:]),
    ]
    run_on.cosine_attention_backward(beyond_31_bits(dout), *far, *learned, out, lse, *grads, *settings)
    assert all(torch.equal(a, b) for a, b in zip(grads, near, strict=True))


@settings(max_examples=20)
@given(st.data())
def test_any_arguments(backend, device, data):
    axes = data.draw(st.sampled_from([2, 2, 3]), "axes")
    window = tuple(data.draw(st.integers(1, 5 if axes == 2 else 3), "window") for _ in range(axes))
    case = Case(
        space=tuple(data.draw(st.integers(1, 6 if axes == 2 else 4), "size") for _ in range(axes)),
        window=window,
        shift=tuple(data.draw(st.integers(0, w - 1), "shift") for w in window),
        batch=data.draw(st.integers(1, 2), "batch"),
        heads=data.draw(st.integers(1, 3 if axes == 2 else 1), "heads"),
        head_dim=data.draw(st.integers(2, 40), "head_dim"),
        bias=data.draw(st.sampled_from([True, False, torch.float32]), "bias"),
        pad_kv=data.draw(st.sampled_from([True, False, torch.float32]), "pad_kv"),
        layout=data.draw(st.sampled_from(["contiguous", "packed", "heads first"]), "layout"),
        # with -100 the whole gradient of a window of two tokens may be less than float16 holds
        mask_value=-5.0,
    )
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    assert_op_accurate(*run(case, dtype, device, backend, data.draw(st.sampled_from(PAD_ORDERS), "pad_order")))


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of all the memory that is taken while it is on: what is freed meanwhile is not subtracted."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(x, torch.Tensor):
                self.seen[x.untyped_storage()._cdata] = x.untyped_storage()
        return results

    @property
    def total(self):
        return sum(storage.nbytes() for storage in self.seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_linear_in_tokens(dtype, monkeypatch):
    """Forward and backward at windows of 8 to 48 take what the tokens take, and the bias and its gradient.

    What the launchers allocate is counted: the kernels themselves cannot allocate, and are not run.
    """
    kernels = importlib.import_module("swinops.kernels.window_attention")  # whose function has its name

    launched = []

    class Launch:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(self.name)

    for name in [name for name in vars(kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, Launch(name))

    def taken(window, side, bias_gradient):
        qkv = torch.zeros(1, side, side, 3, 2, 32, dtype=dtype, requires_grad=True)
        bias = torch.zeros(2, window**2, window**2, requires_grad=bias_gradient)
        logit_scale = torch.zeros(2, requires_grad=True)
        with Allocations() as allocations:
            out = cosine_attention_qkvpacked(
                qkv, logit_scale, bias, window_size=window, shift_size=window // 2, backend="triton"
            )
            out.backward(torch.empty_like(out))
        return allocations.total

    # out, its gradient and that of qkv, and a few numbers a head for each token
    tokens, most = 96 * 96 * 2, dtype.itemsize * (32 + 32 + 3 * 32) + 4 * 8
    for window in (8, 16, 24, 48):
        alone = taken(window, 96, False)
        assert alone <= most * tokens, f"window {window}: {alone / tokens} bytes a token and head"
        assert taken(window, 192, False) <= 4.01 * alone
        bias = 4 * 2 * window**4
        assert taken(window, 96, True) - alone <= bias + max(bias, kernels.Partials.WORKSPACE) + 4096
    whole = {"_forward_kernel", "_backward_kernel"} if dtype == torch.bfloat16 else {"_forward_kernel"}
    assert {*launched} == {"_forward_tiled_kernel", "_dq_kernel", "_dkdv_kernel", "_dbias_kernel"} | whole
