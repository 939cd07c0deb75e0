"""Continuous position bias. Like the relative one it depends on no image, and its network is of 512 hidden units."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import swinops
from swinops.benchmarks.harness import BOTH, FORWARD, Case, Settings, implementations
from swinops.reference.continuous_position_bias import coordinates
from swinops.reference.relative_position_bias import relative_position_index
from swinops.testing import continuous_position_bias_inputs

HIDDEN = 512


def shapes(settings: Settings) -> list[tuple[int, int]]:
    """Window, heads."""
    if settings.quick:
        return [(4, 2)]
    if settings.device.type == "cpu":
        return [(8, 12)]
    return [(8, 3), (8, 24), (16, 16), (24, 24)]


def cases(settings: Settings) -> Iterator[Case]:
    for window, heads in shapes(settings):
        weights, dbias = continuous_position_bias_inputs(
            (window, window), hidden=HIDDEN, heads=heads, dtype=settings.dtype, device=settings.device
        )
        definition = plain(window, settings.dtype, settings.device)
        ours = functools.partial(swinops.continuous_position_bias, window_size=window)
        contenders = implementations("continuous_position_bias", weights["w1"], definition, ours, settings)
        # the weights in, the bias out; backward: their gradients, the same way back
        once = sum(x.nbytes for x in weights.values()) + dbias.nbytes
        moved = {FORWARD: once, BOTH: 2 * once}
        shape = f"window {window}, {heads} heads"
        yield Case("continuous_position_bias", shape, {**weights}, dbias, definition, contenders, moved)


def plain(window: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """The lines of published models, which keep coordinates and indices as buffers."""
    x64 = coordinates((window, window), (window, window), True, torch.empty(0, dtype=torch.float64, device=device))
    buffers = {each: x64.to(each) for each in (dtype, torch.float64)}
    index = relative_position_index((window, window), device).flatten()

    def bias(w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
        table = F.linear(F.relu(F.linear(buffers[w1.dtype], w1, b1)), w2)
        pairs = table[index].view(window**2, window**2, -1).permute(2, 0, 1).contiguous()
        return 16 * torch.sigmoid(pairs)

    return bias
