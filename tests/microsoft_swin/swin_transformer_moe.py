"""MoE: V1 whose table of the bias comes from a network; in some blocks several MLPs share the tokens, at a loss."""

import torch
from torch import nn

from .common import Attention, BasicLayer, Block, Mlp, Transformer, window_partition, window_reverse


class WindowAttention(Attention):
    def __init__(self, dim, window_size, num_heads, qkv_bias=True, qk_scale=None, **options):
        super().__init__(dim, window_size, num_heads, qkv_bias, pretrained=(0, 0), **options)
        self.scale = qk_scale or (dim // num_heads) ** -0.5

    def forward(self, x, mask=None):
        """[B * nW, N, C] -> [B * nW, N, C]"""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        scores = q * self.scale @ k.transpose(-2, -1) + table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask.unsqueeze(1)).flatten(0, 1)
        x = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class MoEMlp(nn.Module):
    """Two MLPs, weighted for each token, and a loss that is least where they are used alike."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate = nn.Linear(dim, 2)
        self.experts = nn.ModuleList(Mlp(dim, hidden) for _ in range(2))

    def forward(self, x):
        shares = self.gate(x).softmax(-1)
        x = sum(share.unsqueeze(-1) * mlp(x) for share, mlp in zip(shares.unbind(-1), self.experts, strict=True))
        return x, shares.mean((0, 1)).square().sum()


class SwinTransformerBlock(Block):
    Attention = WindowAttention

    def __init__(self, dim, *sizes, is_moe=False, mlp_ratio=4.0, **options):
        super().__init__(dim, *sizes, mlp_ratio=mlp_ratio, **options)
        self.is_moe = is_moe
        if is_moe:
            self.mlp = MoEMlp(dim, int(dim * mlp_ratio))

    def forward(self, x):
        """[B, H * W, C] -> [B, H * W, C], and the loss where there is one"""
        (H, W), M, s = self.input_resolution, self.window_size, self.shift_size
        assert x.shape[1] == H * W, "input feature has wrong size"
        y = torch.roll(self.norm1(x).unflatten(1, (H, W)), (-s, -s), (1, 2))
        y = self.attn(window_partition(y, M), mask=self.attn_mask)
        y = torch.roll(window_reverse(y, M, H, W), (s, s), (1, 2))
        x = x + self.drop_path(y.flatten(1, 2))
        y = self.mlp(self.norm2(x))
        if self.is_moe:
            y, loss = y
            return x + self.drop_path(y), loss
        return x + self.drop_path(y)


class MoELayer(BasicLayer):
    def forward(self, x):
        loss = 0.0
        for block in self.blocks:
            x = self.run(block, x)
            if isinstance(x, tuple):
                x, own = x
                loss = loss + own
        return x if self.downsample is None else self.downsample(x), loss


class SwinTransformerMoE(Transformer):
    """``moe_blocks``: of each stage, the places of the blocks with several MLPs."""

    Block, Layer = SwinTransformerBlock, MoELayer

    def __init__(self, *args, qk_scale=None, moe_blocks=((), (), (), ()), aux_loss_weight=0.01, **options):
        super().__init__(
            *args, block=lambda stage, i: {"qk_scale": qk_scale, "is_moe": i in moe_blocks[stage]}, **options
        )
        self.aux_loss_weight = aux_loss_weight

    def forward(self, x):
        """[B, in_chans, H, W] -> [B, num_classes], and the loss"""
        x, loss = self.embed(x), 0.0
        for layer in self.layers:
            x, own = layer(x)
            loss = loss + own
        return self.head(self.norm(x).mean(1)), self.aux_loss_weight * loss
