"""relative_position_bias: a gather, so bitwise forward; its gradient is a sum."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swinops import reference, relative_position_bias
from swinops.testing import assert_accurate, assert_op_accurate, differentiate, position_bias_inputs, random_tensor

OP = "relative_position_bias"

# window, heads
CASES = {
    "square": ((4, 4), 3),
    "wide": ((2, 7), 2),
    "tall": ((7, 2), 1),
    "one token": ((1, 1), 3),
    "one row": ((1, 8), 1),
    "one column": ((8, 1), 1),
    "odd": ((5, 5), 3),
    "more than 64 tokens": ((8, 9), 2),
    "many tokens": ((12, 12), 1),
    "volume": ((2, 3, 4), 2),
    "no heads": ((3, 3), 0),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_matches_reference(case, dtype, backend, device):
    window, heads = CASES[case]
    table, _ = position_bias_inputs(window, heads=heads, dtype=dtype, device=device)
    for view in (table, table.t().contiguous().t(), table.repeat_interleave(2, 0)[::2]):
        bias = relative_position_bias(view, window, backend=backend)
        assert bias.is_contiguous()
        assert torch.equal(bias, reference.relative_position_bias(table, window))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_backward_matches_reference(case, dtype, backend, device):
    window, heads = CASES[case]
    table, dbias = position_bias_inputs(window, heads=heads, dtype=dtype, device=device)
    assert_op_accurate(op(window, backend), definition(window), {"table": table}, dbias.transpose(1, 2))


def test_gradient_of_any_strides(backend, device):
    table, dbias = position_bias_inputs((3, 4), device=device)
    # heads last; every second key; expanded, as sum().backward() makes it
    for view in (
        dbias.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        dbias.repeat_interleave(2, 2)[..., ::2],
        dbias[:1, :1, :1],
    ):
        assert_op_accurate(op((3, 4), backend), definition((3, 4)), {"table": table}, view.expand(dbias.shape))


@pytest.mark.parametrize("case", CASES)
def test_reference_matches_its_definition(case):
    """Pair by pair, bias[h, i, j] is the table's row for the offset i - j; backward is autograd's of that."""
    window, heads = CASES[case]
    table, dbias = position_bias_inputs(window, heads=heads, dtype=torch.float64)
    grid = table.view(*[2 * w - 1 for w in window], heads)
    tokens = list(itertools.product(*map(range, window)))
    rows = [tuple(a - b + w - 1 for a, b, w in zip(i, j, window, strict=True)) for i in tokens for j in tokens]
    expected = torch.stack([grid[row] for row in rows]).t().reshape(heads, len(tokens), len(tokens))
    assert torch.equal(reference.relative_position_bias(table, window), expected)
    exact = differentiate(definition(window), {"table": table}, dbias)["dtable"]
    explicit = reference.relative_position_bias_backward(dbias, window)
    torch.testing.assert_close(explicit, exact, rtol=1e-13, atol=1e-13)


def test_inverse(backend, device):
    """The gradient of the table's own bias is the table times the number of pairs that read each row."""
    window = (3, 5)
    table = torch.randint(-8, 9, (45, 2), device=device).float()
    bias = relative_position_bias(table, window, backend=backend)
    dtable = torch.ops.swinops.relative_position_bias_backward(bias, window, backend)
    rows, columns = (torch.tensor([w - abs(n) for n in range(1 - w, w)], device=device) for w in window)
    assert torch.equal(dtable, table * (rows[:, None] * columns).view(-1, 1))


def test_second_order(backend, device):
    if backend == "reference":
        table, _ = position_bias_inputs((2, 3), dtype=torch.float64, device=device)
        table.requires_grad_()
        assert torch.autograd.gradcheck(op((2, 3), backend), table)
        assert torch.autograd.gradgradcheck(op((2, 3), backend), table)
    # linear: the gradient of <backward(dbias), g> for dbias is forward(g), whatever the precision
    table, dbias = position_bias_inputs((2, 3), device=device)
    table.requires_grad_(), dbias.requires_grad_()
    g = random_tensor(table.shape, 9, device=device)
    (dtable,) = torch.autograd.grad(op((2, 3), backend)(table), table, dbias, create_graph=True)
    (second,) = torch.autograd.grad(dtable, dbias, g)
    assert torch.equal(second, reference.relative_position_bias(g, (2, 3)))


def test_deterministic(backend, device):
    table, dbias = position_bias_inputs((8, 9), device=device)
    first, second = (differentiate(op((8, 9), backend), {"table": table}, dbias) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_int_means_two_axes(backend, device):
    table, _ = position_bias_inputs((3, 3), device=device)
    assert torch.equal(
        relative_position_bias(table, 3, backend=backend), relative_position_bias(table, (3, 3), backend=backend)
    )


def test_half_precision_sums_are_wide(backend, device):
    """Thousands of equal pairs: a sum kept in float16 would stop at 2048."""
    dbias = torch.ones(1, 70, 70, dtype=torch.float16, device=device)
    dtable = torch.ops.swinops.relative_position_bias_backward(dbias.expand(1, 70, 70) * 40, (1, 70), backend)
    expected = 40 * torch.tensor([70 - abs(n) for n in range(-69, 70)], device=device, dtype=torch.float64)
    assert_accurate(dtable, expected.half().view(-1, 1), expected.view(-1, 1), "dtable")


def test_nan_stays_in_its_row(backend, device):
    table, dbias = position_bias_inputs((3, 4), device=device)
    table[5, 1], table[7, 0] = float("nan"), float("inf")
    bias = relative_position_bias(table, (3, 4), backend=backend)
    expected = reference.relative_position_bias(table, (3, 4))
    torch.testing.assert_close(bias, expected, rtol=0, atol=0, equal_nan=True)
    dbias[0, 2, 3] = float("nan")
    dtable = torch.ops.swinops.relative_position_bias_backward(dbias, (3, 4), backend)
    assert torch.equal(dtable.isnan(), reference.relative_position_bias_backward(dbias, (3, 4)).isnan())
    assert dtable.isnan().sum() == 1


def test_beyond_31_bits(backend, device, beyond_31_bits):
    table, dbias = position_bias_inputs((1, 3), heads=2, dtype=torch.float16, device=device)
    bias = relative_position_bias(beyond_31_bits(table.t().contiguous()).t(), (1, 3), backend=backend)
    assert torch.equal(bias, reference.relative_position_bias(table, (1, 3)))
    dtable = torch.ops.swinops.relative_position_bias_backward(beyond_31_bits(dbias), (1, 3), backend)
    exact = reference.relative_position_bias_backward(dbias.double(), (1, 3))
    assert_accurate(dtable, reference.relative_position_bias_backward(dbias, (1, 3)), exact, "dtable")


@given(st.data())
def test_any_arguments(backend, device, data):
    axes = data.draw(st.integers(2, 3), "axes")
    window = tuple(data.draw(st.integers(1, 5 if axes == 2 else 3), "window") for _ in range(axes))
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    table, dbias = position_bias_inputs(window, heads=data.draw(st.integers(1, 3), "heads"), dtype=dtype, device=device)
    bias = relative_position_bias(table, window, backend=backend)
    assert torch.equal(bias, reference.relative_position_bias(table, window))
    assert_op_accurate(op(window, backend), definition(window), {"table": table}, dbias.transpose(1, 2))


def op(window, backend):
    return lambda table: relative_position_bias(table, window, backend=backend)


def definition(window):
    return lambda table: reference.relative_position_bias(table, window)
