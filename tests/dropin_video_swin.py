"""Video Swin, small, and mmaction2's."""

from functools import partial

import swinops
from swinops.testing import random_tensor

from .dropin_case import Case, randomise
from .video_swin import swin, swin_transformer


def build(module, **options):
    defaults = {"patch_size": (2, 2, 2), "in_chans": 1, "embed_dim": 20, "depths": (2, 2), "num_heads": (2, 4)}
    return randomise(module.SwinTransformer3D(**{**defaults, "window_size": (2, 4, 3), **options})).eval()


def image(batch, size):
    return random_tensor((batch, 1, *size), 99)


def use_checkpoint(model):
    for module in model.modules():
        module.use_checkpoint = True


BLOCKS = {f"layers.{stage}.blocks.{block}": "SwinTransformerBlock3D" for stage in (0, 1) for block in (0, 1)}
SPECIAL = {
    "shift": "layers.0.blocks.1",
    "dropout": {"attn_drop_rate": 0.2},
    "overrides": "forward_part1",
    "checkpointing": use_checkpoint,
    # TorchScript says the latter once it has failed on the block
    "unsupported": {
        "script": "variable number of arguments|Can't redefine method",
        "fx": "inputs to control flow",
    },
}

# a map is half the size of its video; the first stage's windows are cut on no axis, on one and on two, the second's on
# the last two and on all
CASES = tuple(
    Case(name, "Video Swin", partial(build, module), image, sizes, BLOCKS, **SPECIAL)
    for name, module, sizes in (
        ("video_swin", swin_transformer, ((6, 10, 10), (4, 16, 6), (8, 8, 6))),
        ("mmaction", swin, ((4, 10, 6), (8, 8, 6))),
    )
)
for built in CASES:
    swinops.explain(built.model())  # runs a small block of each class that is new to it, which no test should count
