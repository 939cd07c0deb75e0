"""Which kernel ``backend="auto"`` takes where several can run: the faster by the rows of choice.csv.

A row holds the time of each backend for one op in one direction: measured on a GPU, or from the static model of
swinops.benchmarks.static, the larger of issue time and memory time, which is a lower bound and not a timing.
``python -m swinops.benchmarks.choice`` writes them. The row of a call is the nearest one:

1. of the same op, direction and dtype;
2. of the same architecture, else of the nearest older one;
3. with as many tokens a window, else the nearest number above, else the largest; likewise the length of the last axis
   (head_dim of attention, channels of an image, heads of a bias);
4. measured rather than static.

Where no row is of the same op, direction and dtype, or all are of later architectures, and where the times differ by
less than either way of finding them can tell, the order is that of KERNELS.
"""

import csv
import functools
from pathlib import Path
from typing import NamedTuple

import torch

KERNELS = ("cuda", "triton")
MARGIN = 1.02  # of times that are the same
PATH = Path(__file__).with_name("choice.csv")


class Row(NamedTuple):
    op: str
    direction: str  # "forward" or "backward"
    arch: int  # 90 for compute capability 9.0
    dtype: str
    tokens: int  # of a window
    channels: int  # length of the last axis
    cuda: float
    triton: float
    unit: str
    source: str  # "measured" or "static"
    device: str  # empty in a static row
    commit: str

    @property
    def order(self) -> tuple[str, ...]:
        least = min(getattr(self, name) for name in KERNELS)
        return tuple(sorted(KERNELS, key=lambda name: bool(getattr(self, name) > MARGIN * least)))

    @property
    def basis(self) -> str:
        if self.source == "measured":
            return f"measured on {self.device} at {self.commit}"
        return "static model, not measured"

    @property
    def why(self) -> str:
        first, second = (getattr(self, name) for name in self.order)
        return f"{self.basis}: {first:.3g} against {second:.3g} {self.unit}"


def read(path: Path) -> list[Row]:
    kinds = Row.__annotations__
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](text) for name, text in line.items()}) for line in csv.DictReader(file)]


@functools.cache
def rows() -> tuple[Row, ...]:
    return tuple(read(PATH))


def nearest(op: str, direction: str, arch: int, dtype: str, tokens: int, channels: int) -> Row | None:
    """The row that decides such a call, by the rules above."""

    def distance(there: int, here: int) -> tuple[bool, int]:
        return there < here, abs(there - here)

    candidates = [row for row in rows() if row[:2] == (op, direction) and row.arch <= arch and row.dtype == dtype]
    return min(
        candidates,
        key=lambda row: (
            arch - row.arch,
            distance(row.tokens, tokens),
            distance(row.channels, channels),
            row.source != "measured",
        ),
        default=None,
    )


def architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    # 12.0 has neither the 9.0's nor the 10.0's matrix instructions: to the kernels it is an 8.0
    return 80 if major >= 12 else major * 10 + minor


@functools.cache
def order(
    op: str, backward: bool, device: torch.device, dtype: torch.dtype, tokens: int, channels: int
) -> tuple[str, ...]:
    """KERNELS, the fastest first. Cached: this is asked at every call."""
    direction = "backward" if backward else "forward"
    row = nearest(op, direction, architecture(device), str(dtype).removeprefix("torch."), tokens, channels)
    return KERNELS if row is None else row.order
