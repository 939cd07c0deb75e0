"""Window partition and merge. Both only move data: the tensor is read once and written once."""

import functools
from collections.abc import Iterator

import swinops
from swinops import reference
from swinops.benchmarks.harness import BOTH, FORWARD, Case, Settings, implementations
from swinops.testing import partition_inputs


def shapes(settings: Settings) -> list[tuple[int, int, int, int, int]]:
    """Batch, side of the image, channels, window, shift."""
    if settings.quick:
        return [(1, 14, 32, 7, 3)]
    if settings.device.type == "cpu":
        return [(2, 56, 96, 7, 3)]
    swin_t = [(128, 56, 96, 7, 3), (128, 28, 192, 7, 3), (128, 14, 384, 7, 3)]
    return swin_t + [(128, 64, 96, 8, 4), (32, 96, 128, 12, 6)] * settings.full


def cases(settings: Settings) -> Iterator[Case]:
    for batch, side, channels, window, shift in shapes(settings):
        x, windows = partition_inputs(
            (side, side), (window, window), batch=batch, channels=channels, dtype=settings.dtype, device=settings.device
        )
        shape = f"{batch} x {side} x {side} x {channels}, window {window}, shift {shift}"
        # forward: x in, windows out; backward: their gradients, the same way back
        moved = {FORWARD: 2 * x.nbytes, BOTH: 4 * x.nbytes}

        definition = functools.partial(reference.window_partition, window=[window] * 2, shift=[shift] * 2)
        ours = functools.partial(swinops.window_partition, window_size=window, shift_size=shift)
        contenders = implementations("window_partition", x, definition, ours, settings)
        yield Case("window_partition", shape, {"x": x}, windows, definition, contenders, moved)

        size = {"image_size": [side] * 2}
        definition = functools.partial(reference.window_merge, shift=[shift] * 2, **size)
        ours = functools.partial(swinops.window_merge, shift_size=shift, **size)
        contenders = implementations("window_merge", windows, definition, ours, settings)
        yield Case("window_merge", shape, {"windows": windows}, x, definition, contenders, moved)
