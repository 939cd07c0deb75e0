"""continuous_position_bias: a network's arithmetic, held to what plain PyTorch achieves, and a gather."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swinops import continuous_position_bias, reference
from swinops.testing import (
    assert_accurate,
    assert_op_accurate,
    continuous_position_bias_inputs,
    differentiate,
    random_tensor,
)

OP = "continuous_position_bias"


class Case(NamedTuple):
    window: tuple[int, int]
    heads: int = 2
    hidden: int = 20
    pretrained: tuple[int, int] | None = None
    log_spaced: bool = True

    @property
    def settings(self):
        """What the reference takes after the weights."""
        return self.window, self.pretrained or self.window, self.log_spaced

    def inputs(self, dtype=torch.float32, device="cpu"):
        return continuous_position_bias_inputs(
            self.window, hidden=self.hidden, heads=self.heads, dtype=dtype, device=device
        )

    def op(self, backend):
        return lambda w1, b1, w2: continuous_position_bias(
            w1, b1, w2, self.window, self.pretrained, log_spaced=self.log_spaced, backend=backend
        )

    def definition(self, w1, b1, w2):
        return reference.continuous_position_bias(w1, b1, w2, *self.settings)[0]


CASES = {
    "square": Case((4, 4), heads=3),
    "wide": Case((2, 7), heads=1, hidden=16),
    "tall": Case((7, 2), hidden=33),
    "one token": Case((1, 1), heads=3),
    "one row": Case((1, 5)),
    "one column": Case((5, 1)),
    "many hidden units": Case((3, 5), hidden=70),
    "one hidden unit": Case((3, 3), hidden=1),
    "many heads": Case((3, 2), heads=18),
    "no heads": Case((3, 3), heads=0),
    "published": Case((8, 8), heads=3, hidden=512),
    "many tokens": Case((12, 12), heads=1),
    "pretrained": Case((6, 6), pretrained=(4, 4)),
    "pretrained, by axis": Case((4, 3), pretrained=(6, 1)),
    "linear-spaced": Case((3, 5), log_spaced=False),
    "linear-spaced, pretrained": Case((5, 4), pretrained=(3, 2), log_spaced=False),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_matches_reference(case, dtype, backend, device):
    case = CASES[case]
    weights, _ = case.inputs(dtype, device)
    assert_op_accurate(case.op(backend), case.definition, weights, (None,))
    # of the table, which backward reads, the bias is a rounded copy
    bias, table = torch.ops.swinops.continuous_position_bias(*weights.values(), *case.settings, backend)
    assert bias.is_contiguous() and table.dtype == torch.float32
    assert torch.equal(bias, reference.relative_position_bias(table.to(dtype), case.window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_backward_matches_reference(case, dtype, backend, device):
    case = CASES[case]
    weights, dbias = case.inputs(dtype, device)
    assert_op_accurate(case.op(backend), case.definition, weights, dbias.transpose(1, 2))


def test_any_strides(backend, device):
    case = Case((3, 4), heads=3)
    weights, dbias = case.inputs(device=device)
    spread = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in weights.items()}
    assert not any(x.is_contiguous() for x in spread.values())
    # heads last; every second key; expanded, as sum().backward() makes it
    for view in (
        dbias.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        dbias.repeat_interleave(2, 2)[..., ::2],
        dbias[:1, :1, :1],
    ):
        assert_op_accurate(case.op(backend), case.definition, spread, view.expand(dbias.shape))


@pytest.mark.parametrize("case", ["square", "one token", "one row", "many hidden units", *list(CASES)[-4:]])
def test_reference_matches_its_definition(case):
    """Pair by pair, in Python's floats; backward is autograd's."""
    case = CASES[case]
    weights, dbias = case.inputs(torch.float64)

    def coordinate(offset, axis):
        span = case.settings[1][axis] - 1
        y = 8 * offset / span if span else 8.0 * offset
        return math.copysign(math.log2(1 + abs(y)) / math.log2(8), y) if case.log_spaced else y

    tokens = [(h, w) for h in range(case.window[0]) for w in range(case.window[1])]
    units = list(zip(weights["w1"].tolist(), weights["b1"].tolist(), strict=True))
    for (head, w2), (i, query), (j, key) in [
        (head, i, j)
        for head in enumerate(weights["w2"].tolist())
        for i in enumerate(tokens)
        for j in list(enumerate(tokens))[:: max(1, len(tokens) // 6)]
    ]:
        x = [coordinate(a - b, axis) for axis, (a, b) in enumerate(zip(query, key, strict=True))]
        h = [max(0.0, w[0] * x[0] + w[1] * x[1] + b) for w, b in units]
        z = sum(w * y for w, y in zip(w2, h, strict=True))
        expected = 16 / (1 + math.exp(-z))
        assert math.isclose(case.definition(**weights)[head, i, j], expected, rel_tol=1e-12), (head, query, key)

    exact = differentiate(case.definition, weights, dbias)
    _, table = reference.continuous_position_bias(*weights.values(), *case.settings)
    explicit = reference.continuous_position_bias_backward(dbias, table, *weights.values(), *case.settings)
    for name, gradient in zip(("dw1", "db1", "dw2"), explicit, strict=True):
        torch.testing.assert_close(gradient, exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window, pretrained", [((4, 4), (0, 0)), ((3, 5), (0, 0)), ((8, 8), (6, 6)), ((5, 4), (7, 3))])
def test_matches_timm(window, pretrained, backend, device):
    """The bias of timm's own module, to float32's rounding."""
    swin = pytest.importorskip("timm.models.swin_transformer_v2")
    module = swin.WindowAttention(12, window, 3, pretrained_window_size=pretrained)
    weights = dict(zip(("w1", "b1", "w2"), (p.detach() for p in module.cpb_mlp.parameters()), strict=True))
    for seed, x in enumerate(weights.values()):
        x.copy_(random_tensor(x.shape, seed) * x.shape[-1] ** -0.5)
    table = module.cpb_mlp(module.relative_coords_table).view(-1, 3)
    theirs = table[module.relative_position_index.view(-1)].view(math.prod(window), -1, 3).permute(2, 0, 1)
    theirs = (16 * torch.sigmoid(theirs)).detach()

    case = Case(window, heads=3, pretrained=pretrained if any(pretrained) else None)
    exact = case.definition(**{name: x.double() for name, x in weights.items()})
    assert_accurate(theirs, case.definition(**weights), exact, "timm's bias")
    ours = case.op(backend)(**{name: x.to(device) for name, x in weights.items()})
    assert_accurate(ours, theirs.to(device), exact, "bias")


def test_gradcheck(device):
    for case in (Case((2, 3), hidden=5), Case((3, 2), hidden=4, pretrained=(2, 5)), Case((1, 3), log_spaced=False)):
        weights, _ = case.inputs(torch.float64, device)
        assert torch.autograd.gradcheck(case.op("reference"), [x.requires_grad_() for x in weights.values()])


def test_second_order(backend, device):
    """There is none, and asking for it is an error, not a silent zero."""
    case = Case((2, 3))
    w1, b1, w2 = (x.requires_grad_() for x in case.inputs(device=device)[0].values())
    (dw1,) = torch.autograd.grad(case.op(backend)(w1, b1, w2).square().sum(), w1, create_graph=True)
    with pytest.raises(RuntimeError, match=r"swinops\.continuous_position_bias has no second derivative"):
        dw1.sum().backward()


def test_deterministic(backend, device):
    case = Case((5, 9), hidden=40)
    weights, dbias = case.inputs(device=device)
    first, second = (differentiate(case.op(backend), weights, dbias) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("wanted", [("w1",), ("b1",), ("w2",), ()], ids=str)
def test_only_the_gradients_that_are_wanted(wanted, backend, device):
    case = Case((2, 3))
    weights, dbias = case.inputs(device=device)
    every = differentiate(case.op(backend), weights, dbias)
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in weights.items()}
    bias = case.op(backend)(**leaves)
    assert bias.requires_grad == bool(wanted)
    if wanted:
        bias.backward(dbias)
    for name, x in leaves.items():
        assert x.grad is None if name not in wanted else torch.equal(x.grad, every[f"d{name}"])


def test_units_that_are_just_off_have_no_gradient(backend, device):
    """Without b1 every unit is 0 at the offset 0, where autograd has a ReLU's derivative 0."""
    case = Case((1, 1))
    weights, dbias = case.inputs(device=device)
    weights["b1"].zero_()
    results = differentiate(case.op(backend), weights, dbias)
    assert (results["out"] == 8).all()
    assert not any(results[name].any() for name in ("dw1", "db1", "dw2"))
    case = Case((3, 3))
    weights, dbias = case.inputs(device=device)
    weights["b1"].zero_()
    assert_op_accurate(case.op(backend), case.definition, weights, dbias)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreter's numpy: infinity is right
def test_saturated(backend, device):
    """The sigmoid of any number, and its gradient, are finite."""
    case = Case((3, 3))
    weights, dbias = case.inputs(device=device)
    weights["b1"].fill_(1e6)
    weights["w2"][0], weights["w2"][1] = 1e6, -1e6
    results = differentiate(case.op(backend), weights, dbias)
    assert (results["out"][0] == 16).all() and (results["out"][1] == 0).all()
    assert not any(results[name].any() for name in ("dw1", "db1", "dw2"))


def test_nan_is_not_hidden(backend, device):
    case = Case((2, 3), heads=3)
    weights, dbias = case.inputs(device=device)
    weights["w2"][1, 4] = float("nan")
    results = differentiate(case.op(backend), weights, dbias)
    assert results["out"].isnan().any(-1).any(-1).tolist() == [False, True, False]
    assert all(results[name].isnan().any() for name in ("dw1", "db1", "dw2"))
    weights, dbias = case.inputs(device=device)
    weights["b1"][3] = float("nan")
    results = differentiate(case.op(backend), weights, dbias)
    assert results["out"].isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of dw2, which float16 does not hold either
def test_half_precision_sums_are_wide(backend, device):
    """Sums over an offset's pairs that float16 does not hold."""
    case = Case((1, 70), heads=1, hidden=4)
    weights, dbias = case.inputs(torch.float16, device)
    weights["w2"] *= 0.001
    dbias = torch.full_like(dbias, 1000)
    assert dbias.diagonal(0, 1, 2).sum() == float("inf")
    results = differentiate(case.op(backend), weights, dbias)
    plain = differentiate(case.definition, {name: x.float() for name, x in weights.items()}, dbias.float())
    exact = differentiate(case.definition, {name: x.double() for name, x in weights.items()}, dbias.double())
    for name in ("dw1", "db1"):
        assert_accurate(results[name], plain[name].half(), exact[name], name)


def test_autocast_leaves_the_weights(backend, device):
    """The bias stays float32, and has the bits it has without autocast."""
    case = Case((3, 4))
    weights, dbias = case.inputs(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        results = differentiate(case.op(backend), weights, dbias)
    expected = differentiate(case.op(backend), weights, dbias)
    assert {x.dtype for x in results.values()} == {torch.float32}
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("log_spaced", [True, False])
def test_another_window_is_the_same_network(log_spaced, backend, device):
    """With the pretrained window given, a larger window has the smaller one's bias at the offsets of both."""
    small, large = Case((4, 3), log_spaced=log_spaced), Case((6, 8), pretrained=(4, 3), log_spaced=log_spaced)
    weights, _ = small.inputs(device=device)
    bias = large.op(backend)(**weights).view(2, 6, 8, 6, 8)[:, :4, :3, :4, :3].reshape(2, 12, 12)
    exact = small.definition(**{name: x.double() for name, x in weights.items()})
    assert_accurate(bias, small.definition(**weights), exact, "bias")


def test_int_means_both_axes(backend, device):
    weights, _ = continuous_position_bias_inputs((3, 3), device=device)
    bias = continuous_position_bias(**weights, window_size=3, backend=backend)
    for other in (dict(window_size=(3, 3)), dict(window_size=[3, 3], pretrained_window_size=3)):
        assert torch.equal(bias, continuous_position_bias(**weights, **other, backend=backend))
    assert not torch.equal(
        bias, continuous_position_bias(**weights, window_size=3, pretrained_window_size=4, backend=backend)
    )


def test_beyond_31_bits(backend, device, beyond_31_bits):
    case = Case((1, 3))
    weights, dbias = case.inputs(torch.float16, device)
    _, table = reference.continuous_position_bias(*weights.values(), *case.settings)
    arguments = table, *weights.values(), [1, 3], [1, 3], True, backend
    far = torch.ops.swinops.continuous_position_bias_backward(beyond_31_bits(dbias), *arguments)
    for gradient, near in zip(far, torch.ops.swinops.continuous_position_bias_backward(dbias, *arguments), strict=True):
        assert torch.equal(gradient, near)


@given(st.data())
def test_any_arguments(backend, device, data):
    window, pretrained = (
        tuple(data.draw(st.integers(1, most), name) for _ in range(2))
        for name, most in (("window", 6), ("pretrained", 9))
    )
    case = Case(
        window,
        data.draw(st.integers(1, 5), "heads"),
        data.draw(st.integers(1, 80), "hidden"),
        pretrained,
        data.draw(st.booleans(), "log_spaced"),
    )
    weights, dbias = case.inputs(data.draw(st.sampled_from(DTYPES), "dtype"), device)
    assert_op_accurate(case.op(backend), case.definition, weights, dbias.transpose(1, 2))
