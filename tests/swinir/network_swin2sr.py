"""Swin2SR: V2's attention, and norms that come last."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ..microsoft_swin.common import Attention, Block, window_partition, window_reverse
from .network_swinir import SwinIR


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
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        scores = scores * self.logit_scale.clamp(max=math.log(100)).exp()
        table = 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table)).flatten(0, -2)
        scores = scores + table[self.relative_position_index].permute(2, 0, 1)
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
        y = torch.roll(x.view(-1, *x_size, x.shape[2]), (-s, -s), (1, 2))
        mask = self.attn_mask if self.input_resolution == x_size else self.calculate_mask(x_size).to(x.device)
        y = window_reverse(self.attn(window_partition(y, M), mask=mask), M, *x_size)
        x = x + self.drop_path(self.norm1(torch.roll(y, (s, s), (1, 2)).flatten(1, 2)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class Swin2SR(SwinIR):
    Block = SwinTransformerBlock
