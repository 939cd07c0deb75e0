"""The CUDA backend: allocates outputs and calls swinops._C, the extension module built from csrc/."""

import functools
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPS = ("window_partition", "window_merge")


@functools.cache
def extension() -> tuple[Any, str | None]:
    """swinops._C, or None and the reason why it is not there."""
    try:
        return importlib.import_module("swinops._C"), None
    except ModuleNotFoundError:
        record = Path(__file__).parents[1] / "_no_cuda.txt"
        if record.exists():
            return None, record.read_text().strip()
        return None, "swinops was not built for this Python: install it again"
    except ImportError as error:
        return None, f"swinops._C cannot be loaded: {error}"


def why_not(x: Tensor, op: str) -> str | None:
    """Why this backend cannot run ``op`` on tensors like ``x``, in a sentence; None where it can."""
    if op not in OPS:
        return "it has no CUDA kernel yet"
    _C, missing = extension()
    if missing is not None:
        return missing
    if x.device.type != "cuda":
        return f"its kernels run on CUDA tensors, and this one is on {x.device}"
    capability = torch.cuda.get_device_capability(x.device)
    here = f"{x.device} has {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return f"its kernels need compute capability 8.0 or higher, and {here}"
    if not any(runs_on(arch, capability) for arch in _C.archs.split(";")):
        return f"swinops._C was built for compute capability {_C.archs}, and {here}: install it again on this machine"
    return None


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``arch`` runs on a GPU of that capability.

    Machine code ("90") runs on the later GPUs of its major version, PTX ("90+PTX") on every later
    one, "90a" on 9.0 alone.
    """
    number = arch.removesuffix("+PTX")
    if number[-1] == "a":
        return divmod(int(number[:-1]), 10) == capability
    built = divmod(int(number.removesuffix("f")), 10)
    return built <= capability and (built[0] == capability[0] or arch.endswith("+PTX"))


def address(x: Tensor | None) -> int:
    """Where a tensor's first element lies; 0 for None. Kernels get every address from here."""
    return 0 if x is None else x.data_ptr()


class launching:
    """Within, the tensors' device is the current one; a CUDA error then carries the op and their shapes. -> the stream

    A class: contextlib's generator costs half a microsecond more, each launch.
    """

    def __init__(self, op: str, **tensors: Tensor | None) -> None:
        self.op = op
        self.tensors = {name: x for name, x in tensors.items() if x is not None}
        self.guard = torch.cuda.device(next(iter(self.tensors.values())).device)

    def __enter__(self) -> int:
        self.guard.__enter__()
        stream: int = torch.cuda.current_stream().cuda_stream
        return stream

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self.guard.__exit__(kind, error, traceback)
        if isinstance(error, RuntimeError):
            shapes = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in self.tensors.items())
            raise RuntimeError(f"{self.op} of {shapes}: {error}") from error


def window_partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """[B, *space, C] -> [B * nW, *window, C]."""
    count = math.prod(size // w for size, w in zip(x.shape[1:-1], window, strict=True))
    windows = x.new_empty(x.shape[0] * count, *window, x.shape[-1])
    image = x if x.stride(-1) == 1 else x.contiguous()
    _launch("window_partition", image, windows, shift)
    return windows


def window_merge(windows: Tensor, image_size: Sequence[int], shift: Sequence[int]) -> Tensor:
    """[B * nW, *window, C] -> [B, *image_size, C]."""
    count = math.prod(size // w for size, w in zip(image_size, windows.shape[1:-1], strict=True))
    image = windows.new_empty(windows.shape[0] // count, *image_size, windows.shape[-1])
    windows = windows if windows.stride(-1) == 1 else windows.contiguous()
    _launch("window_merge", image, windows, shift)
    return image


def _launch(op: str, image: Tensor, windows: Tensor, shift: Sequence[int]) -> None:
    if image.dim() == 4:  # two axes are three with a first of size 1
        image, windows, shift = image.unsqueeze(1), windows.unsqueeze(1), (0, *shift)
    batch, *size, channels = image.shape
    with launching(op, image=image, windows=windows) as stream:
        getattr(extension()[0], op)(
            image=address(image),
            windows=address(windows),
            batch=batch,
            size=size,
            channels=channels,
            window=windows.shape[1:-1],
            shift=shift,
            image_stride=image.stride()[:-1],
            windows_stride=windows.stride()[:-1],
            element_size=image.element_size(),
            stream=stream,
        )
