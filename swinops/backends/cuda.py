"""The CUDA backend: allocates outputs and calls swinops._C, the extension module built from csrc/."""

import functools
import importlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swinops.precision import tf32_allowed

ATTENTION = ("window_attention", "cosine_attention")
OPS = ("window_partition", "window_merge", *ATTENTION, "relative_position_bias", "continuous_position_bias")

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


def why_not(x: Tensor, op: str, tokens: int = 0) -> str | None:
    """Why this backend cannot run ``op`` on tensors like ``x``, in a sentence; None where it can.

    ``tokens``: of a window, where that is known.
    """
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
    if op in ATTENTION:
        if x.dtype not in DTYPES:
            return f"its window attention takes float32, float16 and bfloat16, not {x.dtype}"
        if x.shape[-1] > 128:
            return f"its window attention takes a head_dim up to 128, not {x.shape[-1]}"
        if x.dim() > 1 and x.shape[-2] > 65535:
            return f"its window attention takes up to 65,535 heads, not {x.shape[-2]}"
        if tokens > 8192:
            return f"its window attention takes windows of up to 8,192 tokens, not {tokens:,}"
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


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    pad_order: str,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    return attend("window_attention", q, k, v, None, bias, pad_kv, window, shift, scale, pad_order, mask_value)


def cosine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    pad_order: str,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    return attend("cosine_attention", q, k, v, logit_scale, bias, pad_kv, window, shift, 0.0, pad_order, mask_value)


def attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor | None,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """Allocate and launch the forward pass: of cosine attention where there is a ``logit_scale``."""
    q, k, v = same_strides(q, k, v)
    logit_scale, bias, pad_kv = parameters(q, logit_scale, bias, pad_kv)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    shape = describe(q, logit_scale, bias, (), (), *settings)
    inputs = list(map(address, (q, k, v, logit_scale, bias, pad_kv)))
    with launching(op, q=q, k=k, v=v, logit_scale=logit_scale, bias=bias, pad_kv=pad_kv) as stream:
        extension()[0].attention(shape, inputs, address(out), address(lse), stream)
    return out, lse


def window_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: Tensor | None,
    dpad_kv: Tensor | None,
    *settings: Any,
) -> None:
    learned, dlearned = (None, bias, pad_kv), (None, dbias, dpad_kv)
    attend_backward(
        "window_attention_backward", dout, (q, k, v), learned, out, lse, (dq, dk, dv), dlearned, *settings
    )  # fmt: skip


def cosine_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlogit_scale: Tensor | None,
    dbias: Tensor | None,
    dpad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    pad_order: str,
    mask_value: float,
) -> None:
    learned, dlearned = (logit_scale, bias, pad_kv), (dlogit_scale, dbias, dpad_kv)
    settings = window, shift, 0.0, pad_order, mask_value
    attend_backward(
        "cosine_attention_backward", dout, (q, k, v), learned, out, lse, (dq, dk, dv), dlearned, *settings
    )  # fmt: skip


def attend_backward(
    op: str,
    dout: Tensor,
    qkv: Sequence[Tensor],
    learned: Sequence[Tensor | None],
    out: Tensor,
    lse: Tensor,
    dqkv: Sequence[Tensor],
    dlearned: Sequence[Tensor | None],
    *settings: Any,
) -> None:
    """Launch the backward pass, which fills the gradients. ``learned``: logit_scale, bias, pad_kv"""
    q, k, v = same_strides(*qkv)
    logit_scale, bias, pad_kv = parameters(q, *learned)
    (dout,), out, lse = same_strides(dout), out.contiguous(), lse.contiguous()
    empty = not q.numel()
    padded = any(n % w for n, w in zip(q.shape[1:-2], settings[0], strict=True))
    # sums over nothing are left to the end
    summed = [None if empty else x for x in (*dlearned[:2], dlearned[2] if padded else None)]
    written = [x if x is None or x.dtype in DTYPES else x.float() for x in summed]
    dtypes = [0 if x is None else DTYPES[x.dtype] for x in written]
    shape = describe(q, logit_scale, bias, dout.stride()[:-1], dqkv[0].stride()[:-1], *settings)
    read = list(map(address, (q, k, v, logit_scale, bias, pad_kv)))
    filled = list(map(address, (*dqkv, *written)))
    workspace = q.new_empty(extension()[0].attention_workspace(shape, read, filled), dtype=torch.float32)
    with launching(op, dout=dout, q=q, k=k, v=v, logit_scale=logit_scale, bias=bias, pad_kv=pad_kv) as stream:
        extension()[0].attention_backward(
            shape, address(dout), read, address(out), address(lse), filled, dtypes, address(workspace), stream
        )
    for gradient, x in zip(dlearned, written, strict=True):
        if gradient is not None and x is not gradient:
            gradient.zero_() if x is None else gradient.copy_(x)


def same_strides(*tensors: Tensor) -> Sequence[Tensor]:
    """The tensors as the kernels take them: their strides are one, the last of them 1 and those of an image short."""
    strides = tensors[0].stride()
    if strides[-1] == 1 and max(strides[1:]) < 2**31 and all(x.stride() == strides for x in tensors):
        return tensors
    return [x.contiguous() for x in tensors]


def parameters(
    q: Tensor, logit_scale: Tensor | None, bias: Tensor | None, pad_kv: Tensor | None
) -> tuple[Tensor | None, ...]:
    """As the kernels take them: contiguous, in a dtype that they read, and ``pad_kv`` in that of the keys."""
    logit_scale, bias = (
        x if x is None or (x.dtype in DTYPES and x.is_contiguous()) else x.to(torch.float32).contiguous()
        for x in (logit_scale, bias)
    )
    return logit_scale, bias, None if pad_kv is None else pad_kv.to(q.dtype).contiguous()


def describe(
    q: Tensor,
    logit_scale: Tensor | None,
    bias: Tensor | None,
    dout_stride: Sequence[int],
    grad_stride: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    pad_order: str,
    mask_value: float,
) -> Any:
    """The extension's AttentionShape."""
    dtypes = [DTYPES[torch.float32 if x is None else x.dtype] for x in (q, logit_scale, bias)]
    strides = q.stride()[:-1], tuple(dout_stride), tuple(grad_stride)
    tf32 = q.dtype == torch.float32 and tf32_allowed()
    settings = tuple(window), tuple(shift), scale, pad_order == "roll_pad", mask_value
    return attention_shape(extension()[0], tuple(q.shape), *strides, *dtypes, tf32, q.device, *settings)


def limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, and bytes of shared memory that a block can have."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


@functools.lru_cache(4096)
def attention_shape(
    _C: Any,
    shape: tuple[int, ...],
    qkv_stride: tuple[int, ...],
    dout_stride: tuple[int, ...],
    grad_stride: tuple[int, ...],
    dtype: int,
    scale_dtype: int,
    bias_dtype: int,
    tf32: bool,
    device: torch.device,
    window: tuple[int, ...],
    shift: tuple[int, ...],
    scale: float,
    roll_pad: bool,
    mask_value: float,
) -> Any:
    """Kept, for making it takes longer than a launch."""
    axes = len(window)

    def strides(given: tuple[int, ...]) -> tuple[int, ...]:
        """Of the batch, three axes and the heads."""
        return (given[0], *(0,) * (3 - axes), *given[1:]) if given else (0,) * 5

    batch, *size, heads, head_dim = shape
    multiprocessors, shared_bytes = limits(device)
    return _C.AttentionShape(
        batch=batch,
        size=(*(1,) * (3 - axes), *size),
        heads=heads,
        head_dim=head_dim,
        window=three(window),
        shift=(*(0,) * (3 - axes), *shift),
        roll_pad=roll_pad,
        scale=scale,
        mask_value=mask_value,
        dtype=dtype,
        scale_dtype=scale_dtype,
        bias_dtype=bias_dtype,
        tf32=tf32,
        qkv_stride=strides(qkv_stride),
        dout_stride=strides(dout_stride),
        grad_stride=strides(grad_stride),
        multiprocessors=multiprocessors,
        shared_bytes=shared_bytes,
    )
