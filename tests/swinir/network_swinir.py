"""SwinIR: V1's attention. The image is padded outside of the blocks, and its size stays the same throughout."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

from ..microsoft_swin.common import Attention, Block, per_axis, window_partition, window_reverse


class WindowAttention(Attention):
    def __init__(self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0):
        super().__init__(dim, window_size, num_heads, qkv_bias, attn_drop, proj_drop)
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size[0] - 1) ** 2, num_heads))

    def forward(self, x, mask=None):
        """[B * nW, N, C] -> [B * nW, N, C]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        scores = q * self.scale @ k.transpose(-2, -1) + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
        x = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class SwinTransformerBlock(Block):
    Attention = WindowAttention

    def calculate_mask(self, x_size):
        """Made on the CPU, as the published one is. [nW, N, N]"""
        M, regions = self.window_size, torch.zeros(1, *x_size, 1)
        for axis in (1, 2):
            for start in (M, self.shift_size):
                regions.transpose(1, axis)[:, slice(-start, None)] += 3 ** (axis - 1) if start else 0
        regions = window_partition(regions, M).view(-1, M * M)
        different = regions.unsqueeze(1) != regions.unsqueeze(2)
        return torch.zeros(different.shape).masked_fill(different, -100.0)

    def forward(self, x, x_size):
        """[B, H * W, C] -> [B, H * W, C]"""
        M, s = self.window_size, self.shift_size
        y = torch.roll(self.norm1(x).view(-1, *x_size, x.shape[2]), (-s, -s), (1, 2))
        mask = self.attn_mask if self.input_resolution == x_size else self.calculate_mask(x_size).to(x.device)
        y = window_reverse(self.attn(window_partition(y, M), mask=mask), M, *x_size)
        x = x + self.drop_path(torch.roll(y, (s, s), (1, 2)).flatten(1, 2))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BasicLayer(nn.Module):
    def __init__(self, blocks, use_checkpoint):
        super().__init__()
        self.blocks, self.use_checkpoint = nn.ModuleList(blocks), use_checkpoint

    def forward(self, x, x_size):
        for block in self.blocks:
            if self.use_checkpoint:
                x = checkpoint.checkpoint(block, x, x_size, use_reentrant=False)
            else:
                x = block(x, x_size)
        return x


class RSTB(nn.Module):
    """Blocks, a convolution, and a residual."""

    def __init__(self, dim, residual_group):
        super().__init__()
        self.residual_group = residual_group
        self.conv = nn.Conv2d(dim, dim, 3, 1, 1)

    def forward(self, x, x_size):
        y = self.residual_group(x, x_size).mT.unflatten(2, x_size)
        return x + self.conv(y).flatten(2).mT


class SwinIR(nn.Module):
    """For a picture of the same size, as in the removal of noise."""

    Block = SwinTransformerBlock

    def __init__(
        self, img_size=64, in_chans=3, embed_dim=96, depths=(6, 6, 6, 6), num_heads=(6, 6, 6, 6), window_size=7,
        use_checkpoint=False, drop_rate=0.0, attn_drop_rate=0.0, **options,
    ):  # fmt: skip
        super().__init__()
        self.window_size = window_size
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, 1, 1)
        self.layers = nn.ModuleList()
        for depth, heads in zip(depths, num_heads, strict=True):
            blocks = [
                self.Block(
                    embed_dim, per_axis(img_size), heads, window_size, i % 2 * (window_size // 2),
                    drop=drop_rate, attn_drop=attn_drop_rate, **options,
                )
                for i in range(depth)
            ]  # fmt: skip
            self.layers.append(RSTB(embed_dim, BasicLayer(blocks, use_checkpoint)))
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, 1, 1)
        self.conv_last = nn.Conv2d(embed_dim, in_chans, 3, 1, 1)

    def forward(self, x):
        """[B, in_chans, H, W] -> [B, in_chans, H, W]"""
        H, W = x.shape[2:]
        below, right = (-size % self.window_size for size in (H, W))
        first = self.conv_first(F.pad(x, (0, right, 0, below), "reflect"))
        x_size = (H + below, W + right)
        y = first.flatten(2).mT
        for layer in self.layers:
            y = layer(y, x_size)
        y = self.norm(y).mT.unflatten(2, x_size)
        return x + self.conv_last(self.conv_after_body(y) + first)[:, :, :H, :W]
