"""Launch configurations: tables keyed by kernel, architecture, sizes and element size.

The first row that admits a call is used; nothing is measured at call time.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Config(NamedTuple):
    """Tile sizes, warps and stages of a launch. ``whole``: a window is one tile, and there is no BLOCK_M."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    per_sm: int
    whole: bool = False

    @property
    def options(self) -> dict[str, int]:
        return {
            n: v for n, v in self._asdict().items() if n not in ("whole", "per_sm", "BLOCK_M" if self.whole else "")
        }

    def programs(self, x: Tensor, items: int, heads: int) -> int:
        """Programs a head that share ``items`` evenly, at most ``per_sm`` blocks a multiprocessor over all heads."""
        most = max(1, multiprocessors(x) * self.per_sm // heads)
        return -(-items // -(-items // most))


MANY = 1 << 20
# kernel, oldest architecture, most tokens, largest BLOCK_D, largest element, configuration
ROWS = (
    ("forward", 80, 16, 64, 4, Config(0, 16, 1, 1, 16, True)),
    ("forward", 80, 32, 64, 4, Config(0, 32, 2, 1, 8, True)),
    ("forward", 100, 64, 64, 2, Config(0, 64, 4, 1, 4, True)),
    ("forward", 80, 64, 64, 2, Config(0, 64, 4, 2, 4, True)),
    ("forward", 90, 64, 32, 4, Config(0, 64, 4, 1, 3, True)),
    ("forward", 80, 64, 32, 4, Config(0, 64, 8, 1, 2, True)),
    ("forward", 80, 160, 64, 2, Config(64, 32, 4, 1, MANY)),
    ("forward", 80, MANY, 64, 2, Config(64, 64, 4, 1, MANY)),
    ("forward", 80, MANY, 128, 2, Config(64, 32, 4, 1, MANY)),
    ("forward", 80, MANY, 32, 4, Config(32, 32, 4, 1, MANY)),
    ("forward", 80, MANY, 64, 4, Config(32, 32, 8, 1, MANY)),
    ("forward", 80, MANY, 256, 4, Config(16, 16, 4, 1, MANY)),
    ("backward", 80, 16, 64, 4, Config(0, 16, 1, 1, 8, True)),
    ("backward", 80, 32, 32, 4, Config(0, 32, 2, 1, 4, True)),
    ("backward", 80, 64, 32, 2, Config(0, 64, 4, 1, 2, True)),
    ("backward", 90, 64, 64, 2, Config(0, 64, 8, 1, 1, True)),
    ("backward", 80, MANY, 256, 4, None),
    ("dq", 80, MANY, 32, 2, Config(64, 32, 4, 1, MANY)),
    ("dq", 100, MANY, 64, 2, Config(64, 32, 8, 1, MANY)),
    ("dq", 80, MANY, 64, 2, Config(64, 32, 4, 1, MANY)),
    ("dq", 80, MANY, 128, 2, Config(32, 32, 4, 1, MANY)),
    ("dq", 80, MANY, 32, 4, Config(32, 32, 4, 1, MANY)),
    ("dq", 80, MANY, 64, 4, Config(32, 32, 8, 1, MANY)),
    ("dq", 80, MANY, 256, 4, Config(16, 16, 4, 1, MANY)),
    ("dkdv", 100, MANY, 32, 2, Config(64, 64, 8, 1, 8)),
    ("dkdv", 90, MANY, 64, 2, Config(32, 64, 4, 1, 8)),
    ("dkdv", 80, MANY, 32, 2, Config(32, 64, 4, 1, 8)),
    ("dkdv", 80, MANY, 128, 2, Config(32, 32, 4, 1, 8)),
    ("dkdv", 80, MANY, 32, 4, Config(32, 32, 4, 1, 8)),
    ("dkdv", 80, MANY, 64, 4, Config(32, 32, 8, 1, 8)),
    ("dkdv", 80, MANY, 256, 4, Config(16, 16, 4, 1, 8)),
    ("dbias", 80, MANY, 64, 2, Config(64, 32, 4, 1, 4)),
    ("dbias", 80, MANY, 128, 2, Config(32, 32, 4, 1, 4)),
    ("dbias", 80, MANY, 32, 4, Config(32, 32, 4, 1, 4)),
    ("dbias", 80, MANY, 64, 4, Config(32, 32, 8, 1, 4)),
    ("dbias", 80, MANY, 256, 4, Config(16, 16, 4, 1, 4)),
)


def configure(kernel: str, x: Tensor, tokens: int) -> Config | None:
    """A kernel's configuration; None for a "backward" that takes the three kernels dq, dkdv and dbias instead."""
    head_dim = max(16, triton.next_power_of_2(x.shape[-1]))
    device = architecture(x)
    for name, arch, most_tokens, most_head_dim, most_bytes, config in ROWS:
        if (
            name == kernel
            and device >= arch
            and tokens <= most_tokens
            and head_dim <= most_head_dim
            and x.itemsize <= most_bytes
        ):
            return config
    raise KeyError(f"no configuration for {kernel}")


class NormConfig(NamedTuple):
    """A tile of BLOCK_M rows of BLOCK_C channels, tiles that are loaded ahead, warps, programs a multiprocessor."""

    BLOCK_M: int
    BLOCK_C: int
    STAGES: int
    num_warps: int
    per_sm: int

    @property
    def options(self) -> dict[str, int]:
        # registers for per_sm programs to run at once, or the last would wait for the first
        registers = 65536 // (32 * self.num_warps * self.per_sm) // 8 * 8
        return {n: v for n, v in self._asdict().items() if n != "per_sm"} | {"maxnreg": min(255, registers)}

    def programs(self, x: Tensor, lines: int, length: int, most: int = MANY) -> int:
        """Programs that share the tiles evenly, at most ``most`` and ``per_sm`` blocks a multiprocessor."""
        tiles = lines * -(-length // self.BLOCK_M)
        return -(-tiles // -(-tiles // min(most, multiprocessors(x) * self.per_sm)))


# kernel, oldest architecture, largest BLOCK_C, largest element in bytes,
# elements of a tile, stages, warps, programs a multiprocessor
NORM_ROWS = (
    ("forward", 80, 256, 2, 4096, 1, 4, 5),
    ("forward", 80, 1024, 2, 4096, 1, 4, 4),
    ("forward", 80, 1024, 4, 2048, 1, 4, 6),
    ("forward", 80, 8192, 4, 8192, 1, 8, 2),
    ("backward", 80, 256, 2, 2048, 2, 4, 4),
    ("backward", 80, 256, 4, 2048, 2, 4, 3),
    ("backward", 80, 4096, 2, 4096, 2, 8, 2),
    ("backward", 80, 4096, 4, 4096, 2, 8, 1),
    ("backward", 80, 8192, 4, 8192, 2, 16, 1),
)


def configure_norm(kernel: str, C: int, x: Tensor, *others: Tensor | None) -> NormConfig:
    """The configuration for rows of C channels of all these tensors: the largest element counts."""
    block_c, device = triton.next_power_of_2(C), architecture(x)
    itemsize = max(y.itemsize for y in (x, *others) if y is not None)
    for name, arch, most_channels, most_bytes, elements, stages, num_warps, per_sm in NORM_ROWS:
        if name == kernel and device >= arch and block_c <= most_channels and itemsize <= most_bytes:
            return NormConfig(max(1, elements // block_c), block_c, stages, num_warps, per_sm)
    raise KeyError(f"no configuration for {kernel}")


def architecture(x: Tensor) -> int:
    """Compute capability of the tensor's device, 90 for 9.0; the interpreter on a CPU takes that one's."""
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    # 12.0 has neither the 9.0's nor the 10.0's matrix instructions: to these kernels it is an 8.0
    return 80 if major >= 12 else major * 10 + minor


def multiprocessors(x: Tensor) -> int:
    """Multiprocessors of the tensor's device; two in the interpreter, so that programs loop there as on a GPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
