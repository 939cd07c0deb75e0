"""MONAI's Swin encoder of images and of volumes, small; all of its feature maps are what it returns."""

from functools import partial

import pytest
import torch
from torch import nn

from swinops.testing import random_tensor

from .dropin_case import Case, randomise

pytest.importorskip("monai")

from monai.networks.nets.swin_unetr import SwinTransformer


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.swin = SwinTransformer(**options)

    def forward(self, x):
        return torch.cat([y.flatten(1) for y in self.swin(x, normalize=False)], 1)


def build(axes, **options):
    defaults = {"in_chans": 1, "embed_dim": 8, "depths": (2, 2, 1, 1), "num_heads": (2, 2, 4, 4), "patch_norm": True}
    defaults |= {"window_size": (2, 3, 4)[-axes:], "patch_size": (2,) * axes, "spatial_dims": axes}
    return randomise(Encoder(**{**defaults, **options})).eval()


def image(batch, size):
    return random_tensor((batch, 1, *size), 99)


def use_checkpoint(model):
    for module in model.modules():
        module.use_checkpoint = True


BLOCKS = {
    f"swin.layers{stage}.0.blocks.{block}": "SwinTransformerBlock"
    for stage, depth in enumerate((2, 2, 1, 1), start=1)
    for block in range(depth)
}
SPECIAL = {
    "shift": "swin.layers1.0.blocks.1",
    "dropout": {"attn_drop_rate": 0.2},
    "overrides": "forward_part1",
    "checkpointing": use_checkpoint,
    "unsupported": {"script": "variable number of arguments|out of range", "fx": "'len' is not supported"},
}

# a map is half the size of its image, and half of that, rounded up, in each next stage: the second stage's windows are
# cut on one or two axes, or on all, and the last's are one token
CASES = (
    Case("monai", "MONAI", partial(build, 3), image, ((10, 8, 12), (8, 12, 16), (6, 4, 10)), BLOCKS, **SPECIAL),
    Case("monai_2d", "MONAI", partial(build, 2), image, ((10, 22), (12, 16), (4, 18)), BLOCKS, **SPECIAL),
)
