"""The CUDA backend: allocates outputs and calls swinops._C, the extension module built from csrc/."""

import functools
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPS = ("window_partition", "window_merge", "relative_position_bias", "continuous_position_bias")

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/swinops.h's Dtype


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
    if op == "relative_position_bias" and x.dtype == torch.float64:
        return "its relative position bias sums in float32, which loses float64's precision"
    if op == "continuous_position_bias" and x.dtype not in DTYPES:
        return f"its continuous position bias takes float32, float16 and bfloat16, not {x.dtype}"
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


def relative_position_bias(table: Tensor, window: Sequence[int]) -> Tensor:
    """[prod(2M - 1), heads] -> [heads, N, N]"""
    heads, tokens = table.shape[1], math.prod(window)
    bias = table.new_empty(heads, tokens, tokens)
    with launching("relative_position_bias", table=table) as stream:
        extension()[0].relative_position_bias(
            address(table), address(bias), heads, three(window), *table.stride(), table.element_size(), stream
        )
    return bias


def relative_position_bias_backward(dbias: Tensor, window: Sequence[int]) -> Tensor:
    """[heads, N, N] -> [prod(2M - 1), heads]"""
    heads = dbias.shape[0]
    dtable = dbias.new_empty(math.prod(2 * m - 1 for m in window), heads)
    with launching("relative_position_bias_backward", dbias=dbias) as stream:
        extension()[0].relative_position_bias_backward(
            address(dbias), address(dtable), heads, three(window), dbias.stride(), DTYPES[dbias.dtype], stream
        )
    return dtable


def three(window: Sequence[int]) -> Sequence[int]:
    return window if len(window) == 3 else (1, *window)


def continuous_position_bias(
    w1: Tensor, b1: Tensor, w2: Tensor, window: Sequence[int], pretrained: Sequence[int], log_spaced: bool
) -> tuple[Tensor, Tensor]:
    """-> bias [heads, N, N], and the float32 table [rows, heads] that it is rounded from"""
    heads, hidden = w2.shape
    tokens, rows = math.prod(window), math.prod(2 * m - 1 for m in window)
    bias, table = w2.new_empty(heads, tokens, tokens), w2.new_empty(rows, heads, dtype=torch.float32)
    w1, b1, w2 = w1.contiguous(), b1.contiguous(), w2.contiguous()
    with launching("continuous_position_bias", w1=w1, b1=b1, w2=w2) as stream:
        extension()[0].continuous_position_bias(
            *map(address, (w1, b1, w2, bias, table)),
            *(heads, window, hidden, pretrained, log_spaced, DTYPES[w1.dtype], stream),
        )
    return bias, table


def continuous_position_bias_backward(
    dbias: Tensor,
    table: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    window: Sequence[int],
    pretrained: Sequence[int],
    log_spaced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, hidden = w2.shape
    dbias = dbias if dbias.dtype in DTYPES else dbias.float()
    table = table.float().contiguous()
    w1, b1, w2 = w1.contiguous(), b1.contiguous(), w2.contiguous()
    dw1, db1, dw2 = (x.new_empty(x.shape) for x in (w1, b1, w2))
    _C = extension()[0]
    workspace = table.new_empty(_C.continuous_position_bias_workspace(heads, window))
    with launching("continuous_position_bias_backward", dbias=dbias, w1=w1, b1=b1, w2=w2) as stream:
        _C.continuous_position_bias_backward(
            *map(address, (dbias, table, w1, b1, w2, dw1, db1, dw2, workspace)),
            *(heads, window, hidden, pretrained, log_spaced, DTYPES[w1.dtype]),
            *(dbias.stride(), DTYPES[dbias.dtype], stream),
        )
    return dw1, db1, dw2
