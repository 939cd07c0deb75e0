"""V2: norms come last, scores are scaled cosines, and a network makes the position bias."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from .common import Attention, Block, PatchMerging, Transformer, window_partition, window_reverse


class WindowAttention(Attention):
    def __init__(self, dim, window_size, num_heads, qkv_bias=True, pretrained_window_size=(0, 0), **options):
        super().__init__(dim, window_size, num_heads, qkv_bias=False, pretrained=pretrained_window_size, **options)
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1))
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    def forward(self, x, mask=None):
        """[B * nW, N, C] -> [B * nW, N, C]"""
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias, requires_grad=False), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        scores = cosines * self.logit_scale.clamp(max=math.log(100)).exp()
        scores = scores + 16 * torch.sigmoid(table[self.relative_position_index].permute(2, 0, 1))
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
        x = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class SwinTransformerBlock(Block):
    Attention = WindowAttention

    def forward(self, x):
        """[B, H * W, C] -> [B, H * W, C]"""
        (H, W), M, s = self.input_resolution, self.window_size, self.shift_size
        assert x.shape[1] == H * W, "input feature has wrong size"
        y = torch.roll(x.unflatten(1, (H, W)), (-s, -s), (1, 2))
        y = self.attn(window_partition(y, M), mask=self.attn_mask)
        y = torch.roll(window_reverse(y, M, H, W), (s, s), (1, 2))
        x = x + self.drop_path(self.norm1(y.flatten(1, 2)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class PatchMergingV2(PatchMerging):
    def __init__(self, dim, resolution, pad):
        super().__init__(dim, resolution, pad)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        """[B, H * W, C] -> [B, H * W / 4, 2 * C]"""
        return self.norm(self.reduction(self.merge(x)))


class SwinTransformerV2(Transformer):
    Block, Merging = SwinTransformerBlock, PatchMergingV2

    def __init__(self, *args, pretrained_window_sizes=(0, 0, 0, 0), **options):
        sizes = [{"pretrained_window_size": (size, size)} for size in pretrained_window_sizes]
        super().__init__(*args, block=lambda stage, i: sizes[stage], **options)
