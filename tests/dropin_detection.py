"""Microsoft's Swin for detection and segmentation, small; all of its feature maps are what it returns."""

import torch
from torch import nn

import swinops
from swinops.testing import random_tensor

from .detection_swin.swin_transformer import SwinTransformer
from .dropin_case import Case, randomise

OPTIONS = {
    "patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
}  # fmt: skip


class Backbone(nn.Module):
    def __init__(self, swin):
        super().__init__()
        self.swin = swin

    def forward(self, x):
        return torch.cat([y.flatten(1) for y in self.swin(x)], 1)


# a map is half the size of its image; a single window is shifted, too
SIZES = (14, 10), (16, 16), (6, 8), (13, 18)


def build(swin=SwinTransformer, **options):
    model = randomise(Backbone(swin(**{**OPTIONS, **options})))
    model.eval()
    model(image(1, SIZES[0]))  # a layer leaves the size of its last image in its blocks
    return model


def image(batch, size):
    return random_tensor((batch, 3, *size), 99)


def use_checkpoint(model):
    for layer in model.swin.layers:
        layer.use_checkpoint = True


CASES = (
    Case(
        "detection",
        "Microsoft detection",
        build,
        image,
        SIZES,
        {f"swin.layers.{stage}.blocks.{i}": "SwinTransformerBlock" for stage in (0, 1) for i in (0, 1)},
        dropout={"attn_drop_rate": 0.2},
        checkpointing=use_checkpoint,
        unsupported={"script": "cannot be used as a tuple", "fx": "cannot be iterated"},
    ),
)
for built in CASES:
    swinops.explain(built.model())  # runs a small block of each class that is new to it, which no test should count
