"""OpenMMLab's Swins, small: the attention of mmsegmentation and mmdetection, and that of mmpretrain for V1 and V2."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

import swinops
from swinops.testing import random_tensor

from .dropin_case import Case, randomise
from .microsoft_swin.common import Mlp
from .openmmlab import attention, swin


class SwinBlock(nn.Module):
    """Norms come first, or last as in V2."""

    def __init__(self, attn, dim, last):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), attn, nn.LayerNorm(dim)
        self.ffn, self.last, self.with_cp = Mlp(dim, 2 * dim), last, False

    def run(self, x, hw_shape):
        if self.last:
            x = x + self.norm1(self.attn(x, hw_shape))
            return x + self.norm2(self.ffn(x))
        x = x + self.attn(self.norm1(x), hw_shape)
        return x + self.ffn(self.norm2(x))

    def forward(self, x, hw_shape):
        return checkpoint(self.run, x, hw_shape, use_reentrant=False) if self.with_cp else self.run(x, hw_shape)


class Backbone(nn.Module):
    """One stage on a map of half the size of its image."""

    def __init__(self, module, dim=16, last=False, **options):
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 2, 2)
        self.blocks = nn.ModuleList(
            SwinBlock(module.ShiftWindowMSA(dim, 2, 4, shift, **options), dim, last) for shift in (0, 2)
        )

    def forward(self, x):
        """[B, 3, H, W] -> [B, C, H / 2, W / 2]"""
        x = self.embed(x)
        hw_shape = (x.shape[2], x.shape[3])
        x = x.flatten(2).mT.contiguous()
        for block in self.blocks:
            x = block(x, hw_shape)
        return x.mT.unflatten(2, hw_shape)


def build(module, **options):
    return randomise(Backbone(module, **options)).eval()


def image(batch, size):
    return random_tensor((batch, 3, *size), 99)


def with_cp(model):
    for block in model.blocks:
        block.with_cp = True


def case(name, module, sizes, dropout, script="cannot be used as a tuple", op="window_attention", **options):
    return Case(
        name,
        "OpenMMLab",
        partial(build, module, **options),
        image,
        sizes,
        {f"blocks.{i}.attn": "ShiftWindowMSA" for i in (0, 1)},
        op=op,
        bypassed=("w_msa", "w_msa.softmax", "w_msa.attn_drop"),
        projection="w_msa.proj",
        dropout={dropout: 0.2},
        checkpointing=with_cp,
        unsupported={"script": script, "fx": "inputs to control flow"},
    )


V2 = {
    "window_msa": attention.WindowMSAV2,
    "last": True,
    "op": "cosine_attention",
    "script": "requires_grad unknown|redefine method",
}
SIZES = (14, 10), (16, 16), (8, 18)

# of the last size, one window covers an axis: mmpretrain drops the shift there, unless it pads small maps
CASES = (
    case("mmseg", swin, (*SIZES, (6, 4)), "attn_drop_rate"),
    case("mmpretrain", attention, SIZES, "attn_drop"),
    case("mmpretrain_v2", attention, SIZES, "attn_drop", **V2),
    case(
        "mmpretrain_small",
        attention,
        ((6, 10), (8, 8)),
        "attn_drop",
        pad_small_map=True,
        pretrained_window_size=(6, 6),
        **V2,
    ),
)
for built in CASES:
    swinops.explain(built.model())  # runs a small block of each class that is new to it, which no test should count
