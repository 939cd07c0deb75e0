"""Bad input: each case gets one sentence that names the argument, what was expected and what came."""

import re

import pytest
import torch

from swinops import (
    add_layer_norm,
    continuous_position_bias,
    cosine_attention,
    cosine_attention_qkvpacked,
    layer_norm,
    layer_norm_add,
    patch_merging_norm,
    relative_position_bias,
    window_attention,
    window_attention_qkvpacked,
    window_merge,
    window_partition,
)

# case -> what is changed in a good call, the error's type, and its sentence (the end of it, where it is long)
PARTITION = {
    "rank": (dict(x=torch.ones(8, 8, 3)), ValueError, "x must be [B, H, W, C] or [B, D, H, W, C], got (8, 8, 3)"),
    "rank, window per axis": (dict(x=torch.ones(8, 8, 3), window_size=(4, 4)), ValueError, "x must be [B, H, W, C]"),
    "indivisible": (
        dict(x=torch.ones(1, 8, 9, 3)),
        ValueError,
        "axis divisible by the window (4, 4), got (1, 8, 9, 3)",
    ),
    "integers": (
        dict(x=torch.ones(1, 8, 8, 3).int()),
        TypeError,
        "x must have a floating-point dtype, got torch.int32",
    ),
    "complex": (
        dict(x=torch.ones(1, 8, 8, 3) * 1j),
        TypeError,
        "x must have a floating-point dtype, got torch.complex64",
    ),
    "window 0": (
        dict(window_size=0),
        ValueError,
        "window_size must be at least 1 on each of the 2 spatial axes, got (0, 0)",
    ),
    "window for 3 axes": (dict(window_size=(2, 4, 4)), ValueError, "window_size must be"),
    "window of floats": (
        dict(window_size=4.0),
        TypeError,
        "window_size must be an int or one int for each of the 2 spatial axes, got 4.0",
    ),
    "window True": (dict(window_size=True), TypeError, "window_size must be an int"),
    "shift -1": (
        dict(shift_size=-1),
        ValueError,
        "shift_size must be at least 0 and less than the window (4, 4) on every axis, got (-1, -1)",
    ),
    "shift of a window": (
        dict(shift_size=(0, 4)),
        ValueError,
        "shift_size must be at least 0 and less than the window",
    ),
    "shift for 1 axis": (dict(shift_size=(1,)), ValueError, "shift_size must be"),
    "shift of a string": (dict(shift_size="1"), TypeError, "shift_size must be an int"),
    "backend": (
        dict(backend="cudnn"),
        ValueError,
        "backend must be 'auto' or one of 'cuda', 'triton', 'reference', got 'cudnn'",
    ),
}
MERGE = {
    "rank": (dict(windows=torch.ones(4, 4, 3)), ValueError, "windows must be [B * nW, Mh, Mw, C]"),
    "image indivisible": (
        dict(image_size=(8, 9)),
        ValueError,
        "image_size must be divisible by the window (4, 4) on every axis, got (8, 9)",
    ),
    "image 0": (dict(image_size=(8, 0)), ValueError, "image_size must be"),
    "image of 3 axes": (dict(image_size=(8, 8, 8)), ValueError, "image_size must be"),
    "count": (
        dict(windows=torch.ones(5, 4, 4, 3)),
        ValueError,
        "windows must fill whole images, 4 windows (4, 4) for each image (8, 8), got 5",
    ),
    "integers": (dict(windows=torch.ones(4, 4, 4, 3).long()), TypeError, "windows must have a floating-point dtype"),
    "shift": (dict(shift_size=4), ValueError, "shift_size must be at least 0 and less than the window"),
    "backend": (dict(backend=""), ValueError, "backend must be 'auto' or one of"),
}
POSITION_BIAS = {
    "rank": (dict(table=torch.ones(49)), ValueError, "table must be [49, heads] for the window (4, 4), got (49,)"),
    "rows": (dict(table=torch.ones(48, 2)), ValueError, "table must be [49, heads] for the window (4, 4), got (48, 2)"),
    "integers": (
        dict(table=torch.ones(49, 2).int()),
        TypeError,
        "table must have a floating-point dtype, got torch.int32",
    ),
    "window 0": (dict(window_size=(4, 0)), ValueError, "window_size must be at least 1 on each of two or three axes"),
    "window of 1 axis": (
        dict(window_size=(4,)),
        ValueError,
        "window_size must be at least 1 on each of two or three axes",
    ),
    "window of floats": (dict(window_size=4.0), TypeError, "window_size must be an int"),
    "window of strings": (dict(window_size="44"), TypeError, "window_size must be an int"),
    "backend": (dict(backend="numpy"), ValueError, "backend must be 'auto' or one of"),
}
WEIGHTS = dict(w1=torch.ones(6, 2), b1=torch.ones(6), w2=torch.ones(3, 6))
CONTINUOUS_POSITION_BIAS = {
    "w1's rank": (
        dict(w1=torch.ones(6)),
        ValueError,
        "w1 must be [hidden, 2] with at least one hidden unit, got (6,)",
    ),
    "w1's coordinates": (dict(w1=torch.ones(6, 3)), ValueError, "w1 must be [hidden, 2] with at least one hidden unit"),
    "no hidden units": (dict(w1=torch.ones(0, 2)), ValueError, "w1 must be [hidden, 2] with at least one hidden unit"),
    "b1's hidden size": (
        dict(b1=torch.ones(5)),
        ValueError,
        "b1 must be [hidden] = (6,), as w1 is [hidden, 2], got (5,)",
    ),
    "b1's rank": (dict(b1=torch.ones(1, 6)), ValueError, "b1 must be [hidden] = (6,)"),
    "w2's hidden size": (
        dict(w2=torch.ones(3, 5)),
        ValueError,
        "w2 must be [heads, 6], as w1 is [6, 2], got (3, 5)",
    ),
    "w2's rank": (dict(w2=torch.ones(6)), ValueError, "w2 must be [heads, 6], as w1 is [6, 2], got (6,)"),
    "b1's dtype": (
        dict(b1=torch.ones(6).half()),
        TypeError,
        "b1 must have the dtype of w1, torch.float32, got torch.float16",
    ),
    "w2's dtype": (dict(w2=torch.ones(3, 6).double()), TypeError, "w2 must have the dtype of w1, torch.float32"),
    "integers": (dict(w1=torch.ones(6, 2).int()), TypeError, "w1 must have a floating-point dtype, got torch.int32"),
    "8 bits": (
        {name: x.to(torch.float8_e4m3fn) for name, x in WEIGHTS.items()},
        TypeError,
        "w1 must have a floating-point dtype of 16 bits or more, got torch.float8_e4m3fn",
    ),
    "b1's device": (
        dict(b1=torch.ones(6, device="meta")),
        ValueError,
        "b1 must be on the device of w1, cpu, got meta",
    ),
    "w2's device": (dict(w2=torch.ones(3, 6, device="meta")), ValueError, "w2 must be on the device of w1, cpu"),
    "window 0": (
        dict(window_size=(4, 0)),
        ValueError,
        "window_size must be at least 1 on each of the two axes, got (4, 0)",
    ),
    "window for 3 axes": (
        dict(window_size=(2, 4, 4)),
        ValueError,
        "window_size must be an int or one int for each of the 2 spatial axes, got (2, 4, 4)",
    ),
    "window of floats": (dict(window_size=4.0), TypeError, "window_size must be an int"),
    "pretrained window 0": (
        dict(pretrained_window_size=0),
        ValueError,
        "pretrained_window_size must be at least 1 on each of the two axes, got (0, 0)",
    ),
    "pretrained window -1": (
        dict(pretrained_window_size=(4, -1)),
        ValueError,
        "pretrained_window_size must be at least 1 on each of the two axes, got (4, -1)",
    ),
    "pretrained window for 3 axes": (
        dict(pretrained_window_size=(4, 4, 4)),
        ValueError,
        "pretrained_window_size must be an int or one int for each of the 2 spatial axes",
    ),
    "pretrained window of strings": (
        dict(pretrained_window_size="8"),
        TypeError,
        "pretrained_window_size must be an int",
    ),
    "backend": (dict(backend="numpy"), ValueError, "backend must be 'auto' or one of"),
}
SHAPE = (1, 6, 5, 2, 8)
ATTENTION = {
    "rank": (
        dict(q=torch.ones(6, 5, 2, 8)),
        ValueError,
        "q must be [B, H, W, heads, head_dim] or [B, D, H, W, heads, head_dim]",
    ),
    "rank, window per axis": (dict(q=torch.ones(6, 2, 8), window_size=(4, 4)), ValueError, "q must be [B, H, W, heads"),
    "k's shape": (
        dict(k=torch.ones(1, 6, 4, 2, 8)),
        ValueError,
        "k must have the shape of q (1, 6, 5, 2, 8), got (1, 6, 4, 2, 8)",
    ),
    "v's shape": (dict(v=torch.ones(1, 6, 5, 2, 9)), ValueError, "v must have the shape of q (1, 6, 5, 2, 8)"),
    "k's rank": (dict(k=torch.ones(8)), ValueError, "k must have the shape of q"),
    "k's dtype": (
        dict(k=torch.ones(SHAPE).half()),
        TypeError,
        "k must have the dtype of q, torch.float32, got torch.float16",
    ),
    "v's dtype": (dict(v=torch.ones(SHAPE).double()), TypeError, "v must have the dtype of q, torch.float32"),
    "integers": (dict(q=torch.ones(SHAPE).int()), TypeError, "q must have a floating-point dtype, got torch.int32"),
    "8-bit bias": (
        dict(bias=torch.ones(2, 16, 16).to(torch.float8_e4m3fn)),
        TypeError,
        "bias must have a floating-point dtype of 16 bits or more, got torch.float8_e4m3fn",
    ),
    "complex": (dict(q=torch.ones(SHAPE) * 1j), TypeError, "q must have a floating-point dtype, got torch.complex64"),
    "k's device": (dict(k=torch.ones(SHAPE, device="meta")), ValueError, "k must be on the device of q, cpu, got meta"),
    "bias's device": (
        dict(bias=torch.ones(2, 16, 16, device="meta")),
        ValueError,
        "bias must be on the device of q, cpu, got meta",
    ),
    "pad_kv's device": (
        dict(pad_kv=torch.ones(2, 2, 8, device="meta")),
        ValueError,
        "pad_kv must be on the device of q",
    ),
    "bias's shape": (
        dict(bias=torch.ones(2, 16, 15)),
        ValueError,
        "bias must be [heads, N, N] = (2, 16, 16), got (2, 16, 15)",
    ),
    "bias's heads": (dict(bias=torch.ones(1, 16, 16)), ValueError, "bias must be [heads, N, N] = (2, 16, 16)"),
    "bias's rank": (dict(bias=torch.ones(1, 2, 16, 16)), ValueError, "bias must be [heads, N, N] = (2, 16, 16)"),
    "bias of integers": (dict(bias=torch.ones(2, 16, 16).int()), TypeError, "bias must have a floating-point dtype"),
    "bias complex": (dict(bias=torch.ones(2, 16, 16) * 1j), TypeError, "bias must have a floating-point dtype"),
    "pad_kv's shape": (
        dict(pad_kv=torch.ones(2, 8)),
        ValueError,
        "pad_kv must be [2, heads, head_dim] = (2, 2, 8), got (2, 8)",
    ),
    "pad_kv of integers": (
        dict(pad_kv=torch.ones(2, 2, 8).int()),
        TypeError,
        "pad_kv must have a floating-point dtype",
    ),
    "no tokens": (
        dict.fromkeys("qkv", torch.ones(1, 0, 5, 2, 8)),
        ValueError,
        "q must have at least one token, head and channel",
    ),
    "no channels": (
        dict.fromkeys("qkv", torch.ones(1, 6, 5, 2, 0)),
        ValueError,
        "q must have at least one token, head and channel",
    ),
    "window 0": (dict(window_size=(4, 0)), ValueError, "window_size must be at least 1"),
    "window for 3 axes": (dict(window_size=(4, 4, 4)), ValueError, "window_size must be"),
    "window None": (dict(window_size=None), TypeError, "window_size must be an int"),
    "shift": (
        dict(shift_size=4),
        ValueError,
        "shift_size must be at least 0 and less than the window (4, 4) on every axis",
    ),
    "shift -1": (dict(shift_size=(0, -1)), ValueError, "shift_size must be at least 0"),
    "pad_order": (dict(pad_order="pad"), ValueError, "pad_order must be 'pad_roll' or 'roll_pad', got 'pad'"),
    "backend": (
        dict(backend="flash"),
        ValueError,
        "backend must be 'auto' or one of 'cuda', 'triton', 'reference', got 'flash'",
    ),
}
PACKED = {
    "rank": (dict(qkv=torch.ones(6, 5, 3, 2, 8)), ValueError, "qkv must be [B, H, W, 3, heads, head_dim] or"),
    "rank, window per axis": (
        dict(qkv=torch.ones(5, 3, 2, 8), window_size=(4, 4)),
        ValueError,
        "qkv must be [B, H, W, 3",
    ),
    "not 3": (dict(qkv=torch.ones(1, 6, 5, 2, 2, 8)), ValueError, "qkv must be [B, H, W, 3, heads, head_dim] or"),
    "integers": (
        dict(qkv=torch.ones(1, 6, 5, 3, 2, 8).int()),
        TypeError,
        "must have a floating-point dtype, got torch.int32",
    ),
    "bias's shape": (
        dict(bias=torch.ones(16, 16)),
        ValueError,
        "bias must be [heads, N, N] = (2, 16, 16), got (16, 16)",
    ),
    "pad_order": (dict(pad_order=""), ValueError, "pad_order must be"),
    "shift": (dict(shift_size=5), ValueError, "shift_size must be"),
    "backend": (dict(backend="flash"), ValueError, "backend must be 'auto' or one of"),
}
LOGIT_SCALE = {
    "logit_scale of the wrong size": (
        dict(logit_scale=torch.ones(3)),
        ValueError,
        "logit_scale must be [heads] = (2,) or (2, 1, 1), got (3,)",
    ),
    "logit_scale for one head": (dict(logit_scale=torch.ones(1, 1, 1)), ValueError, "logit_scale must be [heads] ="),
    "logit_scale a row": (dict(logit_scale=torch.ones(1, 2)), ValueError, "got (1, 2)"),
    "logit_scale a square": (dict(logit_scale=torch.ones(2, 1, 2)), ValueError, "got (2, 1, 2)"),
    "logit_scale of integers": (
        dict(logit_scale=torch.ones(2).int()),
        TypeError,
        "logit_scale must have a floating-point dtype, got torch.int32",
    ),
    "logit_scale's device": (
        dict(logit_scale=torch.ones(2, device="meta")),
        ValueError,
        "logit_scale must be on the device of q, cpu, got meta",
    ),
}
NORM = {
    "no axes": (dict(x=torch.tensor(1.0)), ValueError, "x must be [*, C] with at least one channel, got ()"),
    "no channels": (
        dict(x=torch.ones(2, 0)),
        ValueError,
        "x must be [*, C] with at least one channel, got (2, 0)",
    ),
    "integers": (dict(x=torch.ones(2, 3, 4).int()), TypeError, "x must have a floating-point dtype, got torch.int32"),
    "complex": (dict(x=torch.ones(2, 3, 4) * 1j), TypeError, "x must have a floating-point dtype, got torch.complex64"),
    "8 bits": (
        dict(x=torch.ones(2, 3, 4).to(torch.float8_e5m2)),
        TypeError,
        "x must have a floating-point dtype of 16 bits or more, got torch.float8_e5m2",
    ),
    "weight's size": (dict(weight=torch.ones(5)), ValueError, "weight must be [C] = (4,), got (5,)"),
    "weight's rank": (dict(weight=torch.ones(1, 4)), ValueError, "weight must be [C] = (4,), got (1, 4)"),
    "weight of integers": (dict(weight=torch.ones(4).long()), TypeError, "weight must have a floating-point dtype"),
    "weight's device": (
        dict(weight=torch.ones(4, device="meta")),
        ValueError,
        "weight must be on the device of x, cpu, got meta",
    ),
    "bias's size": (dict(bias=torch.ones(3)), ValueError, "bias must be [C] = (4,), got (3,)"),
    "bias of 8 bits": (
        dict(bias=torch.ones(4).to(torch.float8_e4m3fn)),
        TypeError,
        "bias must have a floating-point dtype of 16 bits or more, got torch.float8_e4m3fn",
    ),
    "bias's device": (dict(bias=torch.ones(4, device="meta")), ValueError, "bias must be on the device of x, cpu"),
    "eps 0": (dict(eps=0.0), ValueError, "eps must be positive and finite, got 0.0"),
    "eps negative": (dict(eps=-1e-5), ValueError, "eps must be positive and finite, got -1e-05"),
    "eps infinite": (dict(eps=float("inf")), ValueError, "eps must be positive and finite, got inf"),
    "eps NaN": (dict(eps=float("nan")), ValueError, "eps must be positive and finite, got nan"),
    "backend": (dict(backend="apex"), ValueError, "backend must be 'auto' or one of"),
}
DTYPE = {
    "dtype of integers": (
        dict(dtype=torch.int64),
        TypeError,
        "dtype must be a floating-point dtype of 16 bits or more, got torch.int64",
    ),
    "wider dtype": (
        dict(dtype=torch.float64),
        TypeError,
        "dtype must be float32 or narrower where float32 is computed in",
    ),
    "dtype of 8 bits": (dict(dtype=torch.float8_e5m2), TypeError, "dtype must be a floating-point dtype of 16 bits"),
    "complex dtype": (dict(dtype=torch.complex64), TypeError, "dtype must be a floating-point dtype of 16 bits"),
}
RESIDUAL = {
    "f's shape": (dict(f=torch.ones(2, 3, 5)), ValueError, "f must have the shape of x (2, 3, 4), got (2, 3, 5)"),
    "f that broadcasts": (dict(f=torch.ones(4)), ValueError, "f must have the shape of x (2, 3, 4), got (4,)"),
    "f of integers": (dict(f=torch.ones(2, 3, 4).int()), TypeError, "f must have a floating-point dtype"),
    "f's device": (dict(f=torch.ones(2, 3, 4, device="meta")), ValueError, "f must be on the device of x, cpu"),
    "sample_scale's size": (dict(sample_scale=torch.ones(3)), ValueError, "sample_scale must be [B] = (2,), got (3,)"),
    "sample_scale's rank": (
        dict(sample_scale=torch.ones(2, 1, 1)),
        ValueError,
        "sample_scale must be [B] = (2,), got (2, 1, 1)",
    ),
    "sample_scale of integers": (
        dict(sample_scale=torch.ones(2).bool()),
        TypeError,
        "sample_scale must have a floating-point dtype",
    ),
    "sample_scale's device": (
        dict(sample_scale=torch.ones(2, device="meta")),
        ValueError,
        "sample_scale must be on the device of x, cpu, got meta",
    ),
    "sample_scale of a row": (
        dict(x=torch.ones(4), f=torch.ones(4), sample_scale=torch.ones(4)),
        ValueError,
        "x must be [B, *, C] where there is a sample_scale, got (4,)",
    ),
    "sample_scale that is learnt": (
        dict(sample_scale=torch.ones(2, requires_grad=True)),
        ValueError,
        "sample_scale must be without gradient, for none is computed, got one that requires it",
    ),
}
MERGING = {
    **{name: NORM[name] for name in NORM if name.startswith(("eps", "backend"))},
    **DTYPE,
    "rank": (
        dict(x=torch.ones(2, 3, 4)),
        ValueError,
        "x must be [B, H, W, C] with at least one token and channel, got (2, 3, 4)",
    ),
    "no rows": (dict(x=torch.ones(1, 0, 5, 3)), ValueError, "x must be [B, H, W, C] with at least one token"),
    "no channels": (dict(x=torch.ones(1, 4, 5, 0)), ValueError, "x must be [B, H, W, C] with at least one token"),
    "integers": (
        dict(x=torch.ones(1, 4, 5, 3).int()),
        TypeError,
        "x must have a floating-point dtype, got torch.int32",
    ),
    "weight's size": (dict(weight=torch.ones(3)), ValueError, "weight must be [4C] = (12,), got (3,)"),
    "bias's size": (dict(bias=torch.ones(6)), ValueError, "bias must be [4C] = (12,), got (6,)"),
    "bias's device": (dict(bias=torch.ones(12, device="meta")), ValueError, "bias must be on the device of x, cpu"),
}
ROWS = dict(x=torch.ones(2, 3, 4), weight=torch.ones(4), bias=torch.ones(4))
SUM = {**ROWS, "f": torch.ones(2, 3, 4), "sample_scale": torch.ones(2)}
OPS = {
    window_partition: (dict(x=torch.ones(1, 8, 8, 3), window_size=4), PARTITION),
    window_merge: (dict(windows=torch.ones(4, 4, 4, 3), image_size=(8, 8)), MERGE),
    relative_position_bias: (dict(table=torch.ones(49, 2), window_size=4), POSITION_BIAS),
    continuous_position_bias: ({**WEIGHTS, "window_size": 4}, CONTINUOUS_POSITION_BIAS),
    window_attention: ({**dict.fromkeys("qkv", torch.ones(SHAPE)), "window_size": 4}, ATTENTION),
    window_attention_qkvpacked: (dict(qkv=torch.ones(1, 6, 5, 3, 2, 8), window_size=4), PACKED),
    cosine_attention: (
        {**dict.fromkeys("qkv", torch.ones(SHAPE)), "logit_scale": torch.ones(2), "window_size": 4},
        {**ATTENTION, **LOGIT_SCALE},
    ),
    cosine_attention_qkvpacked: (
        dict(qkv=torch.ones(1, 6, 5, 3, 2, 8), logit_scale=torch.ones(2, 1, 1), window_size=4),
        {**PACKED, **LOGIT_SCALE},
    ),
    layer_norm: (ROWS, {**NORM, **DTYPE}),
    add_layer_norm: (SUM, {**NORM, **DTYPE, **RESIDUAL}),
    layer_norm_add: (SUM, {**NORM, **RESIDUAL}),
    patch_merging_norm: (dict(x=torch.ones(1, 4, 5, 3)), MERGING),
}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_accepts_good_arguments(op):
    op(**OPS[op][0])


@pytest.mark.parametrize(
    "op, case", [(op, case) for op, (_, cases) in OPS.items() for case in cases],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)  # fmt: skip
def test_rejects_bad_arguments(op, case):
    good, cases = OPS[op]
    changes, error, sentence = cases[case]
    with pytest.raises(error, match=re.escape(sentence)):
        op(**{**good, **changes})


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_the_fake_rejects_them_too(op):
    """The same sentences where nothing is computed: on the meta device, as under compile and export."""
    good, cases = OPS[op]
    for changes, error, sentence in cases.values():
        call = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in {**good, **changes}.items()}
        if "backend" not in changes and "on the device of" not in sentence:
            with pytest.raises(error, match=re.escape(sentence)):
                op(**call)


def test_rejects_a_wrong_gradient():
    """The backward is an op that can be called by itself."""
    q = torch.ones(SHAPE)
    settings = (None, None, [4, 4], [0, 0], None, "pad_roll", -100.0, "reference")
    out, lse = torch.ops.swinops.window_attention(q, q, q, *settings)
    with pytest.raises(ValueError, match=r"dout must have the shape of q \(1, 6, 5, 2, 8\), got \(1, 6, 5, 2, 7\)"):
        torch.ops.swinops.window_attention_backward(out[..., 1:], out, lse, [False, False], q, q, q, *settings)
    with pytest.raises(ValueError, match=r"dbias must be \[heads, 16, 16\] for the window \(4, 4\), got \(2, 16\)"):
        torch.ops.swinops.relative_position_bias_backward(torch.ones(2, 16), [4, 4], "reference")
    network = (*WEIGHTS.values(), [4, 4], [4, 4], True, "reference")
    with pytest.raises(ValueError, match="dbias must have a matrix for each of the 3 heads of w2, got 2"):
        torch.ops.swinops.continuous_position_bias_backward(torch.ones(2, 16, 16), torch.ones(49, 3), *network)
    with pytest.raises(ValueError, match=r"table must be \[49, 3\], as forward returned it, got \(3, 49\)"):
        torch.ops.swinops.continuous_position_bias_backward(torch.ones(3, 16, 16), torch.ones(3, 49), *network)
    x, mean = torch.ones(2, 3, 4), torch.ones(2, 3)
    saved = (mean, mean, None, None, False, False, "reference")
    ops = torch.ops.swinops
    with pytest.raises(ValueError, match=r"dy must have the shape of x \(2, 3, 4\), got \(2, 3, 3\)"):
        ops.layer_norm_backward(x[..., 1:], x, *saved)
    with pytest.raises(ValueError, match=r"ds must have the shape of s \(2, 3, 4\), got \(2, 3, 3\)"):
        ops.add_layer_norm_backward(x[..., 1:], x, x, None, torch.float32, torch.float32, *saved)
    with pytest.raises(TypeError, match="dout must have a floating-point dtype, got"):
        ops.layer_norm_add_backward(x.int(), x, None, *saved)
    image = torch.ones(1, 4, 5, 3)
    with pytest.raises(
        ValueError, match=r"dy must be \[B, ceil\(H / 2\), ceil\(W / 2\), 4C\] = \(1, 2, 3, 12\), got \(1, 4, 5, 3\)"
    ):
        ops.patch_merging_norm_backward(image, image, *saved)


def test_bad_arguments_leave_no_trace():
    """After an error the same tensors work, and hold no gradient and no history."""
    q = torch.ones(SHAPE, requires_grad=True)
    with pytest.raises(ValueError, match="shift_size"):
        window_attention(q, q, q, window_size=4, shift_size=4)
    assert q.grad is None and q.grad_fn is None
    window_attention(q, q, q, window_size=4, shift_size=3).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.gpu
def test_rejects_tensors_of_two_devices():
    q = torch.ones(SHAPE, device="cuda")
    with pytest.raises(ValueError, match="k must be on the device of q, cuda:0, got cpu"):
        window_attention(q, q.cpu(), q, window_size=4)
