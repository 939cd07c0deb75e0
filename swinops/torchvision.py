"""torchvision's functions of shifted-window attention on this package's ops; they do not import torchvision."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from swinops.ops.arguments import check_window


def shifted_window_attention(
    input: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    relative_position_bias: Tensor,
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """``torchvision.models.swin_transformer.shifted_window_attention``: its arguments, and ``backend``.

    The attention of Swin, or of Swin V2 where there is a ``logit_scale``, with its two projections. The image is padded
    at its end to whole windows, then shifted, but not along an axis that one window covers.

    It compiles under ``torch.jit.script``. ``torch.fx`` takes it for one operation where it is called as an attribute
    of this module, for the shift depends on the image's size.

    Args:
        input: [B, H, W, C]
        qkv_weight, qkv_bias: What projects a token to its query, key and value. [3 * C, C] and [3 * C]. With a
            ``logit_scale`` the bias of the key counts as zero, and its gradient is zero.
        proj_weight, proj_bias: What projects the outputs of the heads. [C, C] and [C]
        relative_position_bias: Added to the scores of the N tokens of a window, with gradient. [heads, N, N] or
            [1, heads, N, N]
        window_size, shift_size: For H and W; the shift less than the window.
        attention_dropout: 0 while training, for the ops have no dropout of attention weights.
        dropout: Of the output, while training.
        logit_scale: See ``swinops.cosine_attention``. [heads, 1, 1]
        backend: "auto", or one of ``swinops.backends.MODULES``.

    Returns:
        [B, H, W, C], contiguous

    Raises:
        ValueError, TypeError: an argument's shape, device, range or dtype is not as above.
        RuntimeError: ``backend`` cannot run here; or, in backward, a second derivative is asked for.
    """
    return attention(
        input, qkv_weight, proj_weight, relative_position_bias, window_size, num_heads, shift_size, attention_dropout,
        dropout, qkv_bias, proj_bias, logit_scale, training, backend, ["H", "W"],
    )  # fmt: skip


def shifted_window_attention_3d(
    input: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    relative_position_bias: Tensor,
    window_size: list[int],
    num_heads: int,
    shift_size: list[int],
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """``torchvision.models.video.swin_transformer.shifted_window_attention_3d``: its arguments, and ``backend``.

    ``shifted_window_attention`` of a video [B, T, H, W, C]. Unlike that it shifts every axis as it is told: where one
    window covers an axis, torchvision's module makes the shift 0 and the window no longer than the axis.
    """
    return attention(
        input, qkv_weight, proj_weight, relative_position_bias, window_size, num_heads, shift_size, attention_dropout,
        dropout, qkv_bias, proj_bias, None, training, backend, ["T", "H", "W"],
    )  # fmt: skip


# under these names in this module: fx finds them where they are called as its attributes
torch.fx.wrap("shifted_window_attention")
torch.fx.wrap("shifted_window_attention_3d")


def attention(
    x: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    relative_position_bias: Tensor,
    window: list[int],
    num_heads: int,
    shift: list[int],
    attention_dropout: float,
    dropout: float,
    qkv_bias: Tensor | None,
    proj_bias: Tensor | None,
    logit_scale: Tensor | None,
    training: bool,
    backend: str,
    axes: list[str],
) -> Tensor:
    """What the two functions have in common; ``axes`` are the names of the spatial ones."""
    if not torch.jit.is_scripting():
        check_image(x, axes, window, shift, num_heads)
        check_parameters(
            x.shape[-1], num_heads, math.prod(window), qkv_weight=qkv_weight, qkv_bias=qkv_bias,
            proj_weight=proj_weight, proj_bias=proj_bias, relative_position_bias=relative_position_bias,
            logit_scale=logit_scale,
        )  # fmt: skip
    if attention_dropout > 0.0 and training:
        raise ValueError(f"attention_dropout must be 0 while training, for the op has none, got {attention_dropout}")
    if len(axes) == 2:
        shift = [0 if x.shape[1 + i] <= window[i] else shift[i] for i in range(2)]
    if logit_scale is not None and qkv_bias is not None:
        q, k, v = qkv_bias.chunk(3)
        qkv_bias = torch.cat([q, torch.zeros_like(k), v])
    # a pad is a token of zeros, which the projection takes to its bias
    pad_kv = None if qkv_bias is None else qkv_bias.reshape(3, num_heads, -1)[1:]
    qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, [3, num_heads, -1])
    bias = relative_position_bias.flatten(0, -3)
    if logit_scale is None:
        out = torch.ops.swinops.window_attention_qkvpacked(
            qkv, bias, pad_kv, window, shift, None, "pad_roll", -100.0, backend
        )[0]
    else:
        out = torch.ops.swinops.cosine_attention_qkvpacked(
            qkv, logit_scale, bias, pad_kv, window, shift, "pad_roll", -100.0, backend
        )[0]
    return F.dropout(F.linear(out.flatten(-2), proj_weight, proj_bias), dropout, training)


def check_image(x: Tensor, axes: list[str], window: list[int], shift: list[int], heads: int) -> None:
    if x.dim() != len(axes) + 2:
        raise ValueError(f"input must be [B, {', '.join(axes)}, C], got {tuple(x.shape)}")
    if heads < 1 or x.shape[-1] % heads != 0:
        raise ValueError(f"num_heads must divide the {x.shape[-1]} channels of input, got {heads}")
    check_window(window, shift, len(axes))


def check_parameters(channels: int, heads: int, tokens: int, **parameters: Tensor | None) -> None:
    layouts: dict[str, tuple[str, tuple[int, ...]]] = {
        "qkv_weight": ("[3 * C, C]", (3 * channels, channels)),
        "qkv_bias": ("[3 * C]", (3 * channels,)),
        "proj_weight": ("[C, C]", (channels, channels)),
        "proj_bias": ("[C]", (channels,)),
        "relative_position_bias": ("[1, heads, N, N]", (1, heads, tokens, tokens)),
        "logit_scale": ("[heads, 1, 1]", (heads, 1, 1)),
    }
    for name, x in parameters.items():
        layout, shape = layouts[name]
        if x is None:
            continue
        # a bias [heads, N, N] is added to the scores just so
        found = (1, *x.shape) if name == "relative_position_bias" and x.dim() == 3 else x.shape
        # number by number: torch.compile takes tuples with sizes that vary for different
        if len(found) != len(shape) or any(n != expected for n, expected in zip(found, shape, strict=True)):
            raise ValueError(f"{name} must be {layout} = {shape}, got {tuple(x.shape)}")
