"""Relative position bias. It depends on no image: at these sizes a launch costs more than the bytes."""

import functools
from collections.abc import Iterator

import swinops
from swinops import reference
from swinops.benchmarks.harness import BOTH, FORWARD, Case, Settings, implementations
from swinops.testing import position_bias_inputs


def shapes(settings: Settings) -> list[tuple[int, int]]:
    """Window, heads."""
    if settings.quick:
        return [(4, 2)]
    if settings.device.type == "cpu":
        return [(7, 12)]
    return [(7, 3), (7, 24), (12, 24), (24, 24)]


def cases(settings: Settings) -> Iterator[Case]:
    for window, heads in shapes(settings):
        table, dbias = position_bias_inputs((window, window), heads=heads, dtype=settings.dtype, device=settings.device)
        definition = functools.partial(reference.relative_position_bias, window=[window] * 2)
        ours = functools.partial(swinops.relative_position_bias, window_size=window)
        contenders = implementations("relative_position_bias", table, definition, ours, settings)
        # the table in, the bias out; backward: their gradients, the same way back
        once = table.nbytes + dbias.nbytes
        moved = {FORWARD: once, BOTH: 2 * once}
        shape = f"window {window}, {heads} heads"
        yield Case("relative_position_bias", shape, {"table": table}, dbias, definition, contenders, moved)
