"""Window attention as a layer: projections around the op."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swinops.ops.arguments import check_window, per_axis


class WindowAttentionBase(nn.Module):
    """What layers of window attention share: arguments, projections, and the shift of a call.

    ``attend`` is theirs: tokens and shifts to the heads' outputs, [B, *space, heads, head_dim].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int],
        *,
        qkv_bias: bool,
        pad_order: str,
        backend: str,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"num_heads must divide dim, {dim}, got {num_heads}")
        axes = len(window_size) if isinstance(window_size, (tuple, list)) else 2
        self.num_heads = num_heads
        self.window_size = per_axis(window_size, axes, "window_size")
        self.shift_size = per_axis(shift_size, axes, "shift_size")
        if axes not in (2, 3):
            raise ValueError(f"window_size must be an int or two or three ints, got {window_size}")
        check_window(self.window_size, self.shift_size, axes)
        if pad_order not in ("pad_roll", "roll_pad"):
            raise ValueError(f"pad_order must be 'pad_roll' or 'roll_pad', got {pad_order!r}")
        self.pad_order = pad_order
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def attend(self, x: Tensor, shift: Sequence[int]) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, dim] -> [B, H, W, dim], or with a depth before H where the window has three axes."""
        space = [int(n) if isinstance(n, Tensor) else n for n in x.shape[1:-1]]  # torch.jit.trace has tensors
        if len(space) != len(self.window_size):
            raise ValueError(f"x must be [B, *{len(self.window_size)} spatial axes, C], got {tuple(x.shape)}")
        # 0 where n <= w, without a branch: one compiled graph serves every size
        shift = [
            torch.sym_min(s, s * torch.sym_max(n - w, 0))
            for s, n, w in zip(self.shift_size, space, self.window_size, strict=True)
        ]
        x = self.proj(self.attend(x, shift).flatten(-2))
        return x

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shift_size={self.shift_size}"


class WindowAttention(WindowAttentionBase):
    """Multi-head attention within the shifted windows of an image, with a relative position bias (arXiv 2103.14030).

    The image need not divide by the window: pad tokens are keys that nobody masks, as published. On an axis that is no
    longer than the window there is no shift, for one window holds all of it.

    Args:
        dim: Channels.
        num_heads: Heads, of ``dim // num_heads`` channels each.
        window_size: Tokens of a window along each axis: an int for two equal ones, or two or three ints.
        shift_size: Tokens that the windows are shifted by, an int or one per axis.
        qkv_bias: Whether the projection to q, k and v has a bias, which is also the key and value of pads.
        pad_order: "pad_roll" pads, then shifts (torchvision, Transformers); "roll_pad" shifts first (timm).
        backend: "auto", or one of ``swinops.backends.MODULES``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int] = 0,
        *,
        qkv_bias: bool = True,
        pad_order: str = "pad_roll",
        backend: str = "auto",
    ):
        super().__init__(
            dim, num_heads, window_size, shift_size, qkv_bias=qkv_bias, pad_order=pad_order, backend=backend
        )
        offsets = math.prod(2 * w - 1 for w in self.window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def attend(self, x: Tensor, shift: Sequence[int]) -> Tensor:
        bias = torch.ops.swinops.relative_position_bias(
            self.relative_position_bias_table, self.window_size, self.backend
        )
        heads = (3, self.num_heads, -1)
        pad_kv = None if self.qkv.bias is None else self.qkv.bias.view(heads)[1:]
        out: Tensor = torch.ops.swinops.window_attention_qkvpacked(
            self.qkv(x).unflatten(-1, heads), bias, pad_kv, self.window_size, shift,
            None, self.pad_order, -100.0, self.backend,
        )[0]  # fmt: skip
        return out
