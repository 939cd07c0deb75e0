"""V1: norms come first, and the position bias is a table."""

import torch
from torch import nn
from torch.nn import functional as F

from .common import Attention, Block, Transformer, window_partition, window_reverse

WindowProcess = WindowProcessReverse = None  # as in the published file where its compiled module is not installed


class WindowAttention(Attention):
    def __init__(self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, **options):
        super().__init__(dim, window_size, num_heads, qkv_bias, **options)
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        rows = (2 * window_size[0] - 1) * (2 * window_size[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))

    def forward(self, x, mask=None):
        """[B * nW, N, C] -> [B * nW, N, C]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * self.scale @ k.transpose(-2, -1)
        scores = scores + self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
        x = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class SwinTransformerBlock(Block):
    Attention = WindowAttention

    def __init__(self, *sizes, fused_window_process=False, **options):
        super().__init__(*sizes, **options)
        self.fused_window_process = fused_window_process

    def forward(self, x):
        """[B, H * W, C] -> [B, H * W, C]"""
        (H, W), M, s = self.input_resolution, self.window_size, self.shift_size
        assert x.shape[1] == H * W, "input feature has wrong size"
        y = self.norm1(x).unflatten(1, (H, W))
        if s == 0 or not self.fused_window_process:
            y = self.attn(window_partition(torch.roll(y, (-s, -s), (1, 2)), M), mask=self.attn_mask)
            y = torch.roll(window_reverse(y, M, H, W), (s, s), (1, 2))
        else:
            y = WindowProcess.apply(y, *y.shape, -s, M)
            y = self.attn(y.flatten(1, 2), mask=self.attn_mask).unflatten(1, (M, M))
            y = WindowProcessReverse.apply(y, x.shape[0], H, W, x.shape[2], s, M)
        x = x + self.drop_path(y.flatten(1, 2))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PaddedBlock(SwinTransformerBlock):
    """What V1's detection models add for sizes that the window does not divide: zeros below and right of the tokens.

    They are padded first and shifted then. No window is cut, and even a single one is shifted.
    """

    pads = True

    def forward(self, x):
        """[B, H * W, C] -> [B, H * W, C]"""
        (H, W), M, s = self.input_resolution, self.window_size, self.shift_size
        y = F.pad(self.norm1(x).unflatten(1, (H, W)), (0, 0, 0, -W % M, 0, -H % M))
        padded = y.shape[1:3]
        y = self.attn(window_partition(y.roll((-s, -s), (1, 2)), M), self.attn_mask)
        y = window_reverse(y, M, *padded).roll((s, s), (1, 2))[:, :H, :W]
        x = x + y.flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class SwinTransformer(Transformer):
    Block = SwinTransformerBlock

    def __init__(self, *args, qk_scale=None, fused_window_process=False, pad=False, **options):
        if pad:
            self.Block = PaddedBlock
        block = {"qk_scale": qk_scale, "fused_window_process": fused_window_process}
        super().__init__(*args, block=lambda stage, i: block, **options)
