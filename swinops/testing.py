"""Random inputs for each op, and the accuracy rule. Tests, ``swinops verify`` and the benchmarks share them.

Nothing here is degenerate: bias, pad tokens and every gradient are random, because a kernel that ignores a tensor of
zeros passes any test.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Accuracy(NamedTuple):
    """The largest error of a tensor, and what it may be: see ``accuracy``."""

    error: float
    bound: float

    @property
    def ok(self) -> bool:
        # a NaN compares false, and an infinite bound allows nothing: it only says that plain PyTorch overflowed
        return self.error <= self.bound < float("inf")


def accuracy(actual: Tensor, plain: Tensor, exact: Tensor) -> Accuracy:
    """Compare ``actual`` with the float64 result ``exact``, allowing for plain PyTorch's error in its dtype.

        max|actual - exact| <= 2 * max|plain - exact| + eps(dtype) * max|exact| + 2**-126

    ``plain`` is what plain PyTorch makes of the same inputs in the same dtype. 2**-126: a GPU's fast exponential takes
    what is below float32's normal numbers for zero.

    Raises:
        AssertionError: shapes or dtypes differ, or ``exact`` is not float64.
    """
    shapes = [tuple(x.shape) for x in (actual, plain, exact)]
    assert shapes[0] == shapes[1] == shapes[2], f"shapes differ: {shapes}"
    assert actual.dtype == plain.dtype, f"dtypes differ: {actual.dtype} and {plain.dtype}"
    assert exact.dtype == torch.float64, f"exact must be float64, got {exact.dtype}"
    if not actual.numel():
        return Accuracy(0.0, 0.0)
    exact = exact.to(actual.device)
    error, plain_error = (float((x.double() - exact).abs().max()) for x in (actual, plain))
    return Accuracy(error, 2 * plain_error + torch.finfo(actual.dtype).eps * float(exact.abs().max()) + 2**-126)


def assert_accurate(actual: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    """Raise an AssertionError with the numbers where ``actual`` breaks the rule of ``accuracy``. NaN never passes."""
    error, bound = result = accuracy(actual, plain, exact)
    assert result.ok, (
        f"{name} {list(actual.shape)} {actual.dtype} is off by {error:.3g}, allowed {bound:.3g} "
        f"(max |exact| {float(exact.abs().max()):.3g}, {int(actual.isnan().sum())} NaN)"
    )


# what an op returns, one tensor or several, and a gradient for each: None for an output that nothing uses
Outputs = Tensor | tuple[Tensor, ...]
Gradients = Tensor | tuple[Tensor | None, ...]


def differentiate(
    f: Callable[..., Outputs], tensors: Mapping[str, Tensor | None], dout: Gradients
) -> dict[str, Tensor]:
    """``f(**tensors)`` as "out", and for each tensor ``x`` that is not None its gradient as "dx".

    The outputs of an ``f`` that returns several are "out 0", "out 1" and so on. Where ``dout`` holds nothing but None
    there are no gradients.
    """
    leaves = {name: None if x is None else x.detach().requires_grad_() for name, x in tensors.items()}
    wanted = {f"d{name}": x for name, x in leaves.items() if x is not None}
    out = f(**leaves)
    named = {"out": out} if isinstance(out, Tensor) else {f"out {n}": x for n, x in enumerate(out)}
    used = [(x, d) for x, d in zip(named.values(), as_tuple(dout), strict=True) if d is not None]
    outputs = {name: x.detach() for name, x in named.items()}
    if not used:
        return outputs
    # zero where nothing depends on a tensor, as on pad_kv without pads
    grads = torch.autograd.grad(
        [x for x, _ in used], list(wanted.values()), [d for _, d in used], materialize_grads=True
    )
    return {**outputs, **dict(zip(wanted, grads, strict=True))}


def as_tuple(dout: Gradients) -> tuple[Tensor | None, ...]:
    return (dout,) if isinstance(dout, Tensor) else dout


class Expected(NamedTuple):
    """A tensor in plain PyTorch and in float64, and how far from the latter it may be."""

    plain: Tensor
    exact: Tensor
    bound: float

    def accuracy(self, actual: Tensor) -> Accuracy:
        return Accuracy(accuracy(actual, self.plain, self.exact).error, self.bound)


def expect(
    definition: Callable[..., Outputs], tensors: Mapping[str, Tensor | None], dout: Gradients, draws: int
) -> dict[str, Expected]:
    """What an op and its gradients should be, by the rule of ``accuracy``; ``definition`` is the op in plain PyTorch.

    Its error is the largest of several draws of the same sizes: of one draw of a few hundred numbers the largest error
    is so much chance that a second plain implementation (exp(s - lse) for softmax) breaks the rule for one float32
    tensor in twenty. Every second draw is the same numbers scaled, whose rounding differs and whose worst element does
    not.
    """

    def draw(number: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        moved = number % 2 == 1
        drawn = {
            name: None if x is None else shuffled(x, number * n, moved)
            for n, (name, x) in enumerate(tensors.items(), 2)
        }
        exact = {name: None if x is None else x.double() for name, x in drawn.items()}
        gradient = tuple(None if d is None else shuffled(d, number, moved) for d in as_tuple(dout))
        plain = differentiate(definition, drawn, gradient)
        ideal = differentiate(definition, exact, tuple(None if d is None else d.double() for d in gradient))
        yield from ((name, plain[name], ideal[name]) for name in ideal)

    def largest(x: Tensor) -> float:
        return float(x.abs().max()) if x.numel() else 0.0

    found = {name: Expected(plain, exact, accuracy(plain, plain, exact).bound) for name, plain, exact in draw(0)}
    for number in range(1, draws):
        for name, plain, exact in draw(number):
            own, size = found[name], largest(found[name].exact)
            if largest(exact):
                # a sum that is small by chance is not more exact for it
                error = largest(plain - exact) * max(1.0, size / largest(exact))
                bound = 2 * error + torch.finfo(plain.dtype).eps * size
                found[name] = own._replace(bound=max(own.bound, bound))
    return found


def accuracies(
    op: Callable[..., Outputs],
    definition: Callable[..., Outputs],
    tensors: Mapping[str, Tensor | None],
    dout: Gradients,
    draws: int = 16,
) -> dict[str, Accuracy]:
    """The accuracy of ``op(**tensors)`` and of each of its gradients: see ``expect``."""
    expected = expect(definition, tensors, dout, draws)
    return {name: expected[name].accuracy(actual) for name, actual in differentiate(op, tensors, dout).items()}


def assert_op_accurate(
    op: Callable[..., Outputs],
    definition: Callable[..., Outputs],
    tensors: Mapping[str, Tensor | None],
    dout: Gradients,
) -> None:
    """Raise an AssertionError with the numbers where ``op(**tensors)`` or one of its gradients is not accurate."""
    results = accuracies(op, definition, tensors, dout)
    wrong = [f"{name} is off by {x.error:.3g}, allowed {x.bound:.3g}" for name, x in results.items() if not x.ok]
    inputs = ", ".join(f"{name} {x.dtype} {list(x.shape)}" for name, x in tensors.items() if x is not None)
    assert not wrong, f"{inputs}: {'; '.join(wrong)}"


def shuffled(x: Tensor, places: int, moved: bool = True) -> Tensor:
    """Other numbers of the same kind: all of ``x`` scaled, and ``moved`` by ``places``; ``x`` where that is 0.

    Scaled, because the error of a norm's one row hardly depends on the order of its numbers.
    """
    scaled = x * (1 - places % 16 / 64) if places else x
    return scaled.flatten().roll(places).view(x.shape) if moved else scaled


def random_tensor(
    shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal, drawn in float32: the same numbers, rounded, in every dtype."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device).to(dtype)


class AttentionInputs(NamedTuple):
    """The tensors of ``window_attention``, and a gradient for its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    pad_kv: Tensor | None
    dout: Tensor


def attention_inputs(
    space: Sequence[int],
    window: Sequence[int],
    *,
    batch: int = 2,
    heads: int = 2,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    bias: bool | torch.dtype = True,
    pad_kv: bool | torch.dtype = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionInputs:
    """q, k, v and dout [batch, *space, heads, head_dim], bias [heads, N, N] and pad_kv [2, heads, head_dim].

    ``bias`` and ``pad_kv`` are False for none, or a dtype where it is not that of q.
    """
    shape, tokens = (batch, *space, heads, head_dim), torch.Size(window).numel()

    def optional(wanted: bool | torch.dtype, shape: Sequence[int], seed: int) -> Tensor | None:
        return random_tensor(shape, seed, dtype if wanted is True else wanted, device) if wanted else None

    q, k, v, dout = (random_tensor(shape, 6 * seed + n, dtype, device) for n in range(4))
    return AttentionInputs(
        q,
        k,
        v,
        optional(bias, (heads, tokens, tokens), 6 * seed + 4),
        optional(pad_kv, (2, heads, head_dim), 6 * seed + 5),
        dout,
    )


def logit_scales(
    heads: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> Tensor:
    """Of cosine attention, around ln 10, where training starts; of several, the last is clamped. [heads]"""
    scales = random_tensor((heads,), seed, device=device).clamp(-2, 2) / 2 + 2.3
    if heads > 1:
        scales[-1] += 4
    return scales.to(dtype)


def partition_inputs(
    space: Sequence[int],
    window: Sequence[int],
    *,
    batch: int = 2,
    channels: int = 8,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """An image [batch, *space, channels], and windows [batch * nW, *window, channels] that fill one of that size."""
    count = batch * torch.Size([size // w for size, w in zip(space, window, strict=True)]).numel()
    x = random_tensor((batch, *space, channels), 2 * seed, dtype, device)
    return x, random_tensor((count, *window, channels), 2 * seed + 1, dtype, device)


def position_bias_inputs(
    window: Sequence[int],
    *,
    heads: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A table [prod(2M - 1), heads], and a gradient [heads, N, N] of the bias."""
    rows, tokens = torch.Size([2 * w - 1 for w in window]).numel(), torch.Size(window).numel()
    table = random_tensor((rows, heads), 2 * seed, dtype, device)
    return table, random_tensor((heads, tokens, tokens), 2 * seed + 1, dtype, device)


def continuous_position_bias_inputs(
    window: Sequence[int],
    *,
    hidden: int = 20,
    heads: int = 2,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """w1 [hidden, 2], b1 [hidden] and w2 [heads, hidden], and a gradient [heads, N, N] of the bias.

    Scaled so that some hidden units are off, and the sigmoid is not saturated.
    """
    tokens = torch.Size(window).numel()
    weights = {
        "w1": random_tensor((hidden, 2), 4 * seed, dtype, device),
        "b1": random_tensor((hidden,), 4 * seed + 1, dtype, device),
        "w2": random_tensor((heads, hidden), 4 * seed + 2, dtype, device) * hidden**-0.5,
    }
    return weights, random_tensor((heads, tokens, tokens), 4 * seed + 3, dtype, device)


def random_rows(
    shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Each row has a mean and a spread of its own.

    No spread is small beside the mean: the norm of such a row has the largest error, and that of one row is chance.
    """
    values, spread, mean = (
        random_tensor(size, 10 * seed + n, device=device)
        for n, size in enumerate((shape, (*shape[:-1], 1), (*shape[:-1], 1)))
    )
    return (values * (0.5 + spread.abs()) + mean / 2).to(dtype)


def norm_inputs(
    shape: Sequence[int],
    *,
    merged: bool = False,
    dtype: torch.dtype = torch.float32,
    weight: bool | torch.dtype = True,
    bias: bool | torch.dtype = True,
    f: bool | torch.dtype = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """x [*shape], f of that shape, and weight and bias [C], or [4C] where four tokens are ``merged``.

    ``f`` is left out where it is False; ``weight`` and ``bias`` are then None. Each is a dtype where that is not x's.
    """
    channels = shape[-1] * (4 if merged else 1)

    def parameter(wanted: bool | torch.dtype, seed: int) -> Tensor | None:
        chosen = dtype if wanted is True else wanted
        return random_tensor((channels,), seed, chosen, device) if chosen else None

    branch = {"f": random_rows(shape, 6 * seed + 1, dtype if f is True else f, device)} if f else {}
    return {
        "x": random_rows(shape, 6 * seed, dtype, device),
        **branch,
        "weight": parameter(weight, 6 * seed + 2),
        "bias": parameter(bias, 6 * seed + 3),
    }
