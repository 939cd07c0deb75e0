"""window_attention and window_attention_qkvpacked, each output and each gradient against the reference in float64."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import swinops
from swinops import reference, window_attention, window_attention_qkvpacked
from swinops.backends import MODULES, why_not
from swinops.testing import (
    accuracy,
    assert_accurate,
    assert_op_accurate,
    attention_inputs,
    differentiate,
    random_tensor,
)

OP = "window_attention"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAD_ORDERS = ["pad_roll", "roll_pad"]


class Case(NamedTuple):
    space: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    batch: int = 1
    heads: int = 2
    head_dim: int = 8
    bias: bool | torch.dtype = True
    pad_kv: bool | torch.dtype = True
    layout: str = "contiguous"
    scale: float | None = None
    mask_value: float = -100.0

    @property
    def pad_orders(self):
        """Both, where they differ."""
        divides = all(n % w == 0 for n, w in zip(self.space, self.window, strict=True))
        return PAD_ORDERS[:1] if divides or not any(self.shift) else PAD_ORDERS

    def inputs(self, dtype, device, seed=0):
        names = ("batch", "heads", "head_dim", "bias", "pad_kv")
        sizes = {name: getattr(self, name) for name in names}
        return attention_inputs(self.space, self.window, dtype=dtype, device=device, seed=seed, **sizes)

    def settings(self, pad_order):
        return self.window, self.shift, self.scale or self.head_dim**-0.5, pad_order, self.mask_value


CASES = {
    "square": Case((4, 4), (2, 2), (0, 0)),
    "wide": Case((3, 9), (3, 3), (1, 1)),
    "tall": Case((9, 3), (3, 3), (1, 2), heads=1),
    "unequal windows": Case((4, 6), (2, 3), (1, 1), heads=1),
    "ragged": Case((5, 7), (3, 4), (1, 2)),
    "ragged, unshifted": Case((5, 7), (3, 4), (0, 0), heads=1),
    "ragged on one axis": Case((6, 7), (3, 4), (2, 1), heads=1),
    "one window": Case((4, 4), (4, 4), (0, 0), batch=2, heads=3),
    "one shifted window": Case((4, 4), (4, 4), (2, 2)),
    "window larger than the map": Case((3, 5), (7, 7), (0, 0)),
    "shift larger than the map": Case((2, 3), (7, 7), (3, 3)),
    "window larger on one axis": Case((2, 8), (4, 4), (2, 2)),
    "largest shift": Case((8, 4), (4, 4), (3, 3)),
    "largest shift, ragged": Case((6, 5), (4, 4), (3, 3), heads=1),
    "shift on one axis": Case((4, 8), (4, 4), (0, 2)),
    "shift on the other": Case((7, 4), (4, 4), (2, 0)),
    "windows of one token": Case((2, 3), (1, 1), (0, 0), heads=1),
    "rows": Case((2, 9), (1, 5), (0, 2), heads=1),
    "volume": Case((2, 3, 8), (2, 3, 4), (1, 1, 2)),
    "ragged volume": Case((3, 4, 5), (2, 3, 4), (1, 1, 2), heads=1),
    "empty batch": Case((5, 4), (4, 4), (2, 2), batch=0),
    "head_dim 1": Case((4, 4), (4, 4), (1, 1), head_dim=1, heads=1),
    "head_dim 10": Case((3, 4), (4, 4), (1, 1), head_dim=10),
    "head_dim 30": Case((3, 4), (4, 4), (1, 1), head_dim=30),
    "head_dim 33": Case((3, 4), (4, 4), (1, 1), head_dim=33),
    "head_dim 64": Case((3, 4), (4, 4), (1, 1), head_dim=64),
    "head_dim 256": Case((3, 3), (3, 3), (1, 1), head_dim=256),
    "49 tokens": Case((7, 14), (7, 7), (3, 3), heads=1, head_dim=32),
    "72 tokens": Case((8, 9), (8, 9), (4, 4), heads=1, head_dim=16, batch=2),
    "72 tokens, ragged": Case((9, 8), (8, 9), (4, 0), heads=1, head_dim=10),
    "144 tokens, ragged": Case((11, 10), (12, 12), (6, 6), heads=1, head_dim=10),
    "144 tokens": Case((12, 12), (12, 12), (0, 0), heads=1, head_dim=32),
    "no bias": Case((5, 4), (4, 4), (2, 2), bias=False),
    "no pad_kv": Case((5, 4), (4, 4), (2, 2), pad_kv=False),
    "neither": Case((5, 4), (4, 4), (2, 2), bias=False, pad_kv=False),
    "72 tokens, neither": Case((7, 9), (8, 9), (4, 4), heads=1, bias=False, pad_kv=False),
    "bias in float32": Case((5, 4), (4, 4), (2, 2), bias=torch.float32),
    "bias in float16": Case((5, 4), (4, 4), (2, 2), bias=torch.float16),
    "pad_kv in float32": Case((5, 4), (4, 4), (2, 2), pad_kv=torch.float32),
    "72 tokens, both float32": Case((7, 9), (8, 9), (4, 4), heads=1, bias=torch.float32, pad_kv=torch.float32),
    "packed view": Case((5, 4), (4, 4), (2, 2), layout="packed view"),
    "packed": Case((5, 4), (4, 4), (2, 2), layout="packed"),
    "packed, strided": Case((5, 4), (4, 4), (2, 2), layout="packed, strided"),
    "packed volume": Case((2, 3, 5), (2, 3, 4), (1, 1, 2), heads=1, layout="packed"),
    "72 tokens, packed": Case((8, 9), (8, 9), (4, 4), heads=1, head_dim=16, layout="packed"),
    "heads first": Case((5, 4), (4, 4), (2, 2), layout="heads first"),
    "last stride not 1": Case((5, 4), (4, 4), (2, 2), layout="last stride not 1"),
    "expanded": Case((4, 4), (4, 4), (2, 2), batch=2, layout="expanded"),
    "odd stride of one row": Case((1, 7), (4, 4), (2, 2), layout="odd stride of one"),
    "each its own strides": Case((5, 4), (4, 4), (2, 2), layout="each its own"),
    "scale": Case((4, 4), (4, 4), (2, 2), scale=0.7),
    "mask_value": Case((4, 8), (4, 4), (2, 2), mask_value=-1.5),
}
# float16 takes the kernels of one tile wherever they fit; float32, whose backward is tiled above 32 tokens, runs these
EVERY_DTYPE = [
    "wide", "ragged", "one shifted window", "shift larger than the map", "shift on one axis", "ragged volume",
    "empty batch", "head_dim 1", "head_dim 10", "head_dim 256", "49 tokens", "72 tokens, ragged", "neither",
    "bias in float32", "bias in float16", "72 tokens, both float32", "packed", "mask_value",
]  # fmt: skip
PAIRS = [(case, dtype) for case in CASES for dtype in DTYPES if case in EVERY_DTYPE or dtype == torch.float16]


def lay_out(x, layout):
    """``x`` with other strides."""
    if layout == "heads first":
        return x.movedim(-2, 1).contiguous().movedim(1, -2)
    if layout == "last stride not 1":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "odd stride of one":  # what torch takes for contiguous: no step is ever made along that axis
        return x.as_strided(x.shape, [1 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)])
    return x


def run(case, dtype, device, backend, pad_order, logit_scale=None):
    """(op, definition, tensors, dout), the arguments of ``assert_op_accurate``. The gradient is never contiguous.

    The op is cosine attention where there is a ``logit_scale``.
    """
    q, k, v, bias, pad_kv, dout = case.inputs(dtype, device)
    settings = case.settings(pad_order)
    names = ["window_size", "shift_size", "scale", "pad_order", "mask_value"]
    name, others = "window_attention", {"bias": bias, "pad_kv": pad_kv}
    if logit_scale is not None:
        name, others = "cosine_attention", {"logit_scale": logit_scale, **others}
        settings, names = (*settings[:2], *settings[3:]), [n for n in names if n != "scale"]
    keywords = dict(zip(names, settings, strict=True), backend=backend)

    def op(q, k, v, **learned):
        return getattr(swinops, name)(q, k, v, **learned, **keywords)

    def op_packed(qkv, **learned):
        return getattr(swinops, f"{name}_qkvpacked")(qkv, **learned, **keywords)

    def definition(q, k, v, **learned):
        return getattr(reference, name)(q, k, v, *learned.values(), *settings)[0]

    def definition_packed(qkv, **learned):
        return definition(*qkv.unbind(-3), **learned)

    dout = lay_out(dout, "last stride not 1" if case.layout in ("contiguous", "packed") else case.layout)
    qkv = torch.stack((q, k, v), -3)
    if case.layout == "packed, strided":
        qkv = qkv.transpose(-3, -1).contiguous().transpose(-3, -1)
    if case.layout.startswith("packed") and case.layout != "packed view":
        return op_packed, definition_packed, {"qkv": qkv, **others}, dout
    if case.layout == "packed view":
        q, k, v = qkv.unbind(-3)
    elif case.layout == "each its own":
        q, k, v = q, lay_out(k, "heads first"), lay_out(v, "last stride not 1")
    else:
        q, k, v = (lay_out(x, case.layout) for x in (q, k, v))
    return op, definition, {"q": q, "k": k, "v": v, **others}, dout


@pytest.mark.parametrize("case, dtype", PAIRS, ids=str)
def test_forward_matches_reference(case, dtype, backend, device):
    """Output and log-sum-exp."""
    case = CASES[case]
    for pad_order in case.pad_orders:
        _, _, tensors, _ = run(case, dtype, device, backend, pad_order)
        inputs, settings = list(tensors.values()), case.settings(pad_order)
        op = torch.ops.swinops.window_attention if "q" in tensors else torch.ops.swinops.window_attention_qkvpacked
        actual = op(*inputs, *settings, backend)
        if "qkv" in tensors:
            inputs = [*inputs[0].unbind(-3), *inputs[1:]]
        exact = reference.window_attention(*[None if x is None else x.double() for x in inputs], *settings)
        plain = reference.window_attention(*inputs, *settings)
        for name, *results in zip(("out", "lse"), actual, plain, exact, strict=True):
            assert results[0].is_contiguous()
            assert_accurate(*results, f"{name}, {pad_order}")


@pytest.mark.parametrize("case, dtype", PAIRS, ids=str)
def test_backward_matches_reference(case, dtype, backend, device):
    case = CASES[case]
    for pad_order in case.pad_orders:
        assert_op_accurate(*run(case, dtype, device, backend, pad_order))


@pytest.mark.parametrize("case", ["49 tokens", "72 tokens, ragged"])
def test_backward_takes_the_forward_of_any_backend(case, backend, device):
    """ "auto" may choose one kernel for each: what forward leaves for backward means the same to all."""
    case = CASES[case]
    q, k, v, bias, pad_kv, dout = case.inputs(torch.float16, device)
    inputs, settings = (q, k, v, bias, pad_kv), case.settings("pad_roll")
    exact = differentiate(
        lambda **named: reference.window_attention(*named.values(), *settings)[0],
        dict(zip(("q", "k", "v", "bias", "pad_kv"), (x.double() for x in inputs), strict=True)),
        dout.double(),
    )
    names = list(exact)[1:]
    for forward in [name for name in MODULES if why_not(name, q, OP) is None]:
        out, lse = torch.ops.swinops.window_attention(*inputs, *settings, forward)
        grads = torch.ops.swinops.window_attention_backward(dout, out, lse, [True] * 2, *inputs, *settings, backend)
        for name, x in zip(names, grads, strict=True):
            error, size = (x.double() - exact[name]).abs().max(), exact[name].abs().max()
            assert error <= 0.01 * size, (forward, name)  # an lse in other units is off by far more


@pytest.mark.parametrize("case", ["unequal windows", "ragged", "one shifted window", "shift larger than the map",
                                  "largest shift, ragged", "shift on the other", "ragged volume"])  # fmt: skip
def test_reference_matches_its_definition(case):
    """Token by token from the definition, in float64; and the explicit backward against autograd of the forward."""
    case = CASES[case]
    for pad_order in case.pad_orders:
        q, k, v, bias, pad_kv, dout = case.inputs(torch.float64, "cpu")
        expected = by_hand(q, k, v, bias, pad_kv, *case.settings(pad_order))
        out = reference.window_attention(q, k, v, bias, pad_kv, *case.settings(pad_order))[0]
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)

        op, definition, tensors, dout = run(case, torch.float64, "cpu", "reference", pad_order)
        explicit, exact = differentiate(op, tensors, dout), differentiate(definition, tensors, dout)
        for name in exact:
            torch.testing.assert_close(explicit[name], exact[name], rtol=1e-12, atol=1e-12, msg=name)


def by_hand(q, k, v, bias, pad_kv, window, shift, scale, pad_order, mask_value):
    """Window attention in loops over windows and places: nothing is shared with the reference."""
    space = q.shape[1:-2]
    padded = [math.ceil(n / w) * w for n, w in zip(space, window, strict=True)]
    out = torch.full_like(q, float("nan"))
    for corner in itertools.product(*[range(0, n, w) for n, w in zip(padded, window, strict=True)]):
        places = list(itertools.product(*[range(c, c + w) for c, w in zip(corner, window, strict=True)]))
        sources = [source_of(place, space, padded, shift, pad_order) for place in places]
        # the far side of the seam, on each axis
        sides = [[p + s >= n for p, s, n in zip(place, shift, padded, strict=True)] for place in places]
        keys = torch.stack(
            [pad_kv[0].expand(len(q), -1, -1) if s is None else k[(slice(None), *s)] for s in sources], 1
        )
        values = torch.stack(
            [pad_kv[1].expand(len(q), -1, -1) if s is None else v[(slice(None), *s)] for s in sources], 1
        )
        mask = torch.tensor([[mask_value * (a != b) for b in sides] for a in sides], dtype=q.dtype)
        for i, source in enumerate(sources):
            if source is not None:
                token = (slice(None), *source)
                scores = torch.einsum("bhd,bjhd->bhj", q[token], keys) * scale + bias[:, i] + mask[i]
                out[token] = torch.einsum("bhj,bjhd->bhd", scores.softmax(-1), values)
    return out


def source_of(place, space, padded, shift, pad_order):
    """The image's token that lands on ``place`` of the padded, shifted image; None for a pad."""
    if pad_order == "pad_roll":
        source = [(p + s) % n for p, s, n in zip(place, shift, padded, strict=True)]
        return source if all(p < n for p, n in zip(source, space, strict=True)) else None
    if any(p >= n for p, n in zip(place, space, strict=True)):
        return None
    return [(p + s) % n for p, s, n in zip(place, shift, space, strict=True)]


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
def test_gradcheck(pad_order):
    """The registered op, by finite differences, through every differentiable argument."""
    q, k, v, bias, pad_kv, _ = attention_inputs((3, 2), (2, 2), batch=1, heads=1, head_dim=2, dtype=torch.float64)
    settings = {"window_size": 2, "shift_size": 1, "pad_order": pad_order, "mask_value": -2.0, "backend": "reference"}
    leaves = [x.requires_grad_() for x in (q, k, v, bias, pad_kv)]
    assert torch.autograd.gradcheck(lambda q, k, v, b, p: window_attention(q, k, v, b, pad_kv=p, **settings), leaves)
    qkv = torch.stack((q, k, v), -3).detach().requires_grad_()
    leaves = [qkv, bias, pad_kv]
    assert torch.autograd.gradcheck(lambda x, b, p: window_attention_qkvpacked(x, b, pad_kv=p, **settings), leaves)


@pytest.mark.parametrize("case", ["ragged", "largest shift, ragged", "shift larger than the map", "ragged volume",
                                  "72 tokens, ragged"])  # fmt: skip
def test_inverse(case, backend, device):
    """With all the weight on the token itself the op copies v: reading undoes writing, bit for bit."""
    case = CASES[case]
    for pad_order in case.pad_orders:
        q, k, v, bias, pad_kv, _ = case.inputs(torch.float16, device)
        bias += 6e4 * torch.eye(bias.shape[-1], dtype=bias.dtype, device=device)
        keywords = {"window_size": case.window, "shift_size": case.shift, "pad_order": pad_order, "backend": backend}
        assert torch.equal(window_attention(q, k, v, bias, pad_kv=pad_kv, **keywords), v)


@pytest.mark.parametrize("packed", [False, True])
def test_second_order(packed, backend, device):
    """There is none, and asking for it is an error, not a silent zero."""
    q, k, v, bias, *_ = attention_inputs((4, 4), (4, 4), batch=1, heads=1, device=device)
    q.requires_grad_()
    if packed:
        out = window_attention_qkvpacked(torch.stack((q, k, v), -3), bias, window_size=4, shift_size=2, backend=backend)
    else:
        out = window_attention(q, k, v, bias, window_size=4, shift_size=2, backend=backend)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"swinops\.window_attention\w* has no second derivative"):
        dq.sum().backward()


@pytest.mark.parametrize("case", ["ragged", "72 tokens, ragged", "packed"])
def test_deterministic(case, backend, device):
    op, _, tensors, dout = run(CASES[case], torch.float16, device, backend, "pad_roll")
    first, second = (differentiate(op, tensors, dout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wanted", [("q",), ("v",), ("bias",), ("pad_kv",), ()], ids=str)
@pytest.mark.parametrize("case", ["one shifted window", "72 tokens, both float32"])
def test_only_the_gradients_that_are_wanted(case, wanted, backend, device):
    """A gradient is the same, and the others None, whichever else is asked for."""
    case = CASES[case]
    op, _, tensors, dout = run(case, torch.float32, device, backend, "pad_roll")
    every = differentiate(op, tensors, dout)
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    out = op(**leaves)
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.backward(dout)
    for name, x in leaves.items():
        assert (x.grad is not None) == (name in wanted), name
        assert x.grad is None or torch.equal(x.grad, every[f"d{name}"]), name


@pytest.mark.parametrize(
    "size, value",
    [
        ((6, 9), float("nan")),
        ((6, 9), float("inf")),
        ((6, 9), float("-inf")),
        ((16, 9), float("nan")),
        ((16, 9), float("inf")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_and_inf_stay_in_their_window(name, size, value, backend, device):
    """They arrive where the reference has them, and every other window is as it is without them, bit for bit."""
    window, shift = ((3, 3), (1, 1)) if size == (6, 9) else ((8, 9), (0, 0))
    inputs = attention_inputs(size, window, batch=1, heads=1, device=device)
    clean = dict(zip(("q", "k", "v", "bias"), inputs[:4], strict=True))
    dirty = {**clean, name: clean[name].clone()}
    dirty[name][0, 4, 4, 0, 3] = value

    def op(q, k, v, bias):
        return window_attention(q, k, v, bias, window_size=window, shift_size=shift, backend=backend)

    def definition(q, k, v, bias):
        return reference.window_attention(q, k, v, bias, None, window, shift, 8**-0.5, "pad_roll", -100.0)[0]

    calls = (op, dirty), (definition, dirty), (op, clean)
    results, expected, without = (differentiate(*call, inputs.dout) for call in calls)
    # a sum over all windows; of a masked pair's weight, which may be flushed to 0, and inf it is NaN or infinite
    assert torch.equal(results.pop("dbias").isfinite(), expected["dbias"].isfinite())
    rows, columns = (
        set(((torch.arange(w) + 4 - (4 - s) % w) % n).tolist()) for w, s, n in zip(window, shift, size, strict=True)
    )
    elsewhere = torch.tensor(
        [[i not in rows or j not in columns for j in range(size[1])] for i in range(size[0])], device=device
    )
    for key, x in results.items():
        assert torch.equal(x.isfinite(), expected[key].isfinite()), key
        assert x.isnan()[expected[key].isnan()].all(), key  # where a weight is flushed to 0, inf becomes NaN too
        assert torch.equal(x[0, elsewhere], without[key][0, elsewhere]), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", ["some", "first key tile", "last key tile", "all but two"])
@pytest.mark.parametrize("window", [(3, 4), (8, 16)], ids=str)
def test_bias_of_minus_infinity(window, masked, dtype, backend, device):
    """A mask of the user's. A whole tile of keys may be -inf, the first one included."""
    tokens = math.prod(window)
    q, k, v, bias, _, dout = attention_inputs(window, window, batch=1, heads=1, dtype=dtype, device=device)
    key, query = torch.arange(tokens, device=device), torch.arange(tokens, device=device)[:, None]
    bias[:, {
        "some": (key * 7 + query * 3) % 5 == 0,
        "first key tile": key.expand(tokens, -1) < tokens * 3 // 4,
        "last key tile": key.expand(tokens, -1) >= tokens // 4,
        "all but two": (key - query) % tokens > 1,
    }[masked]] = float("-inf")  # fmt: skip

    def op(q, k, v, bias):
        return window_attention(q, k, v, bias, window_size=window, shift_size=1, backend=backend)

    def definition(q, k, v, bias):
        return reference.window_attention(q, k, v, bias, None, window, (1, 1), 8**-0.5, "pad_roll", -100.0)[0]

    assert_op_accurate(op, definition, {"q": q, "k": k, "v": v, "bias": bias}, dout)


@pytest.mark.parametrize("window", [(3, 4), (8, 16)], ids=str)
def test_large_scores(window, backend, device):
    """Scores around -300: the running maximum keeps every exponential finite, and its sum above zero."""
    q, k, v, bias, _, dout = attention_inputs(window, window, batch=1, heads=1, device=device)

    def op(q, k, v, bias):
        return window_attention(q, k, v, bias - 300, window_size=window, backend=backend)

    def definition(q, k, v, bias):
        return reference.window_attention(q, k, v, bias - 300, None, window, (0, 0), 8**-0.5, "pad_roll", -100.0)[0]

    assert_op_accurate(op, definition, {"q": q, "k": k, "v": v, "bias": bias}, dout)


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
@pytest.mark.parametrize("window", [(3, 4), (8, 9)], ids=str)
def test_beyond_31_bits(window, pad_order, backend, device, beyond_31_bits):
    """Addresses past 2**31 elements: every tensor's batch lies that far apart, the gradients' too."""
    q, k, v, bias, pad_kv, dout = attention_inputs((3, 5), window, heads=1, dtype=torch.float16, device=device)
    settings = window, (1, 2), 8**-0.5, pad_order, -100.0
    # the kernels' own functions: an op's outputs are contiguous, and would fill gigabytes
    from swinops.backends import module

    far, run_on = [beyond_31_bits(x) for x in (q, k, v)], module(backend)
    out, lse = run_on.window_attention(*far, bias, pad_kv, *settings)
    near_out, near_lse = run_on.window_attention(q, k, v, bias, pad_kv, *settings)
    assert torch.equal(out, near_out) and torch.equal(lse, near_lse)

    near = [torch.empty_like(x) for x in (q, k, v, bias, pad_kv)]
    run_on.window_attention_backward(dout, q, k, v, bias, pad_kv, out, lse, *near, *settings)
    grads = [
        *(beyond_31_bits(torch.full_like(x, float("nan"))) for x in (q, k, v)),
        *(torch.empty_like(x) for x in near[3:]),
    ]
    # out and lse are contiguous always: the forward made them
    run_on.window_attention_backward(beyond_31_bits(dout), *far, bias, pad_kv, out, lse, *grads, *settings)
    assert all(torch.equal(a, b) for a, b in zip(grads, near, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [7, 12])
def test_more_than_65535_windows(window):
    """More than 65,535 windows and more than 2**31 elements at once; each image of the batch is the same as alone."""
    batch, size = (2**31 // (28 * 28 * 96) + 1, 28) if window == 7 else (2**31 // (36 * 36 * 96) + 1, 36)
    q, k, v, bias, _, dout = attention_inputs(
        (size, size), (window, window), batch=8, heads=3, head_dim=32, dtype=torch.bfloat16, device="cuda"
    )
    repeats = -(-batch // 8)
    assert 8 * repeats * math.ceil(size / window) ** 2 > 65535 or window == 12

    def times(n):
        keys, values = k.repeat(n, 1, 1, 1, 1), v.repeat(n, 1, 1, 1, 1)
        return differentiate(
            lambda q: window_attention(q, keys, values, bias, window_size=window, shift_size=3),
            {"q": q.repeat(n, 1, 1, 1, 1)},
            dout.repeat(n, 1, 1, 1, 1),
        )

    few, many = times(1), times(repeats)
    for name in ("out", "dq"):
        for part in many[name].split(8):
            assert torch.equal(part, few[name]), name


def test_window_of_343_tokens(backend, device):
    """7 x 7 x 7, as SwinUNETR and Video Swin have it."""
    case = Case((7, 7, 7), (7, 7, 7), (3, 3, 3), batch=1, heads=1, head_dim=16)
    assert_op_accurate(*run(case, torch.float16, device, backend, "pad_roll"))


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
def test_largest_windows(pad_order, backend, device):
    """48 x 48 = 2304 tokens; in the interpreter 24 x 24."""
    window = (48, 48) if device.type == "cuda" else (24, 24)
    case = Case((window[0] - 3, window[1]), window, (window[0] // 2, 5), batch=1, heads=1, head_dim=16)
    op, definition, tensors, _ = run(case, torch.float16, device, backend, pad_order)
    with torch.no_grad():
        exact = {name: x.double() for name, x in tensors.items()}
        assert_accurate(op(**tensors), definition(**tensors), definition(**exact), "out")
    if device.type == "cuda":
        assert_op_accurate(*run(case, torch.float16, device, backend, pad_order))


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
        head_dim=data.draw(st.integers(1, 40), "head_dim"),
        bias=data.draw(st.sampled_from([True, False, torch.float32]), "bias"),
        pad_kv=data.draw(st.sampled_from([True, False, torch.float32]), "pad_kv"),
        layout=data.draw(st.sampled_from(["contiguous", "packed", "packed view", "heads first"]), "layout"),
    )
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    assert_op_accurate(*run(case, dtype, device, backend, data.draw(st.sampled_from(PAD_ORDERS), "pad_order")))


def test_accuracy_rule_fails_where_it_must():
    exact = random_tensor((4, 5), 0, torch.float64)
    plain = exact.half()
    assert accuracy(plain, plain, exact).ok
    for wrong in (
        plain * 1.01,
        plain.where(plain > -10, 0).index_fill(0, torch.tensor([1]), float("nan")),
        plain.roll(1),
    ):
        with pytest.raises(AssertionError, match=r"out .* is off by"):
            assert_accurate(wrong, plain, exact, "out")
    # plain PyTorch that overflowed allows nothing
    assert not accuracy(plain * 2, plain * float("inf"), exact).ok


def test_float32_follows_torchs_setting():
    """The kernels' products are tf32 where torch's own would be on CUDA, in either spelling of the setting."""
    from swinops.kernels.window_attention import Call

    x = torch.ones(1, 4, 4, 1, 8)
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed, precision in ((True, "tf32"), (False, "ieee")):
            matmul.allow_tf32 = allowed
            for dtype, expected in ((torch.float32, precision), (torch.bfloat16, "ieee")):
                call = Call(x.to(dtype), (4, 4), (0, 0), 1.0, "pad_roll", -100.0)
                assert call.constants["PRECISION"] == expected
    finally:
        matmul.allow_tf32 = before
