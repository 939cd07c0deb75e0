"""V1 for images of any size: a layer tells its blocks the size, and makes the mask that they share."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import checkpoint

from ..microsoft_swin.common import Attention, DropPath, Mlp, per_axis, window_partition, window_reverse


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


class SwinTransformerBlock(nn.Module):
    def __init__(
        self, dim, num_heads, window_size=7, shift_size=0, mlp_ratio=4.0, qkv_bias=True, qk_scale=None, drop=0.0,
        attn_drop=0.0, drop_path=0.0,
    ):  # fmt: skip
        super().__init__()
        self.dim, self.num_heads, self.window_size, self.shift_size = dim, num_heads, window_size, shift_size
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, per_axis(window_size), num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.H = self.W = None

    def forward(self, x, mask_matrix):
        """[B, H * W, C] -> [B, H * W, C]"""
        H, W, M, s = self.H, self.W, self.window_size, self.shift_size
        assert x.shape[1] == H * W, "input feature has wrong size"
        y = F.pad(self.norm1(x).view(-1, H, W, x.shape[2]), (0, 0, 0, -W % M, 0, -H % M))
        padded = y.shape[1:3]
        if s > 0:
            y = self.attn(window_partition(torch.roll(y, (-s, -s), (1, 2)), M), mask=mask_matrix)
            y = torch.roll(window_reverse(y, M, *padded), (s, s), (1, 2))
        else:
            y = window_reverse(self.attn(window_partition(y, M), mask=None), M, *padded)
        x = x + self.drop_path(y[:, :H, :W].flatten(1, 2))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x, H, W):
        """[B, H * W, C] -> [B, ceil(H / 2) * ceil(W / 2), 2 * C]"""
        x = F.pad(x.unflatten(1, (H, W)), (0, 0, 0, W % 2, 0, H % 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.reduction(self.norm(x.flatten(1, 2)))


class BasicLayer(nn.Module):
    def __init__(self, dim, depth, num_heads, window_size=7, downsample=None, use_checkpoint=False, **options):
        super().__init__()
        self.window_size, self.shift_size, self.use_checkpoint = window_size, window_size // 2, use_checkpoint
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(dim, num_heads, window_size, i % 2 * self.shift_size, **options) for i in range(depth)
        )
        self.downsample = None if downsample is None else downsample(dim)

    def forward(self, x, H, W):
        """[B, H * W, C] -> the same and its size, and the next layer's input and its size"""
        M, s = self.window_size, self.shift_size
        regions = torch.zeros(1, *(int(np.ceil(size / M)) * M for size in (H, W)), 1, device=x.device)
        for axis in (1, 2):
            for start in (M, s):
                regions.transpose(1, axis)[:, slice(-start, None)] += 3 ** (axis - 1)
        regions = window_partition(regions, M).view(-1, M * M)
        different = regions.unsqueeze(1) != regions.unsqueeze(2)
        mask = torch.zeros(different.shape, device=x.device).masked_fill(different, -100.0)
        for block in self.blocks:
            block.H, block.W = H, W
            x = checkpoint.checkpoint(block, x, mask, use_reentrant=True) if self.use_checkpoint else block(x, mask)
        if self.downsample is not None:
            return x, H, W, self.downsample(x, H, W), (H + 1) // 2, (W + 1) // 2
        return x, H, W, x, H, W


class SwinTransformer(nn.Module):
    def __init__(
        self, patch_size=4, in_chans=3, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7,
        mlp_ratio=4.0, qkv_bias=True, drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.2, use_checkpoint=False,
    ):  # fmt: skip
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        options = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "drop": drop_rate, "attn_drop": attn_drop_rate}
        self.layers = nn.ModuleList()
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, downsample = embed_dim * 2**stage, PatchMerging if stage < len(depths) - 1 else None
            layer = BasicLayer(
                dim, depth, heads, window_size, downsample, use_checkpoint, drop_path=drop_path_rate, **options
            )
            self.layers.append(layer)
            setattr(self, f"norm{stage}", nn.LayerNorm(dim))

    def forward(self, x):
        """[B, in_chans, H, W] -> the feature maps of all stages [B, C, H, W]"""
        below, right = (-size % self.patch_size for size in x.shape[2:])
        x = self.patch_embed(F.pad(x, (0, right, 0, below)))
        H, W = x.shape[2:]
        x, maps = x.flatten(2).mT, []
        for stage, layer in enumerate(self.layers):
            out, *size, x, H, W = layer(x, H, W)
            maps.append(getattr(self, f"norm{stage}")(out).mT.unflatten(2, size))
        return tuple(maps)

    def train(self, mode=True):
        """As the published one, it returns nothing."""
        super().train(mode)
