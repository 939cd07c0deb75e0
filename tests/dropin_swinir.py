"""SwinIR and Swin2SR, small: heads of 10 channels, and images of the size that the masks are for and of others."""

from functools import partial

import swinops
from swinops.testing import random_tensor

from .dropin_case import Case, randomise
from .swinir.network_swin2sr import Swin2SR
from .swinir.network_swinir import SwinIR


def build(model, **options):
    defaults = {"img_size": (8, 12), "embed_dim": 40, "depths": (2,), "num_heads": (4,), "window_size": 4}
    return randomise(model(**{**defaults, "mlp_ratio": 2.0, **options})).eval()


def image(batch, size):
    return random_tensor((batch, 3, *size), 99)


def use_checkpoint(model):
    for layer in model.layers:
        layer.residual_group.use_checkpoint = True


BLOCKS = {f"layers.0.residual_group.blocks.{i}": "SwinTransformerBlock" for i in range(2)}
UNSUPPORTED = {"script": "cannot be used as a tuple|requires_grad unknown", "fx": "inputs to control flow"}

# (11, 14) is reflected to (12, 16) before the blocks
CASES = tuple(
    Case(
        name, model.__name__, partial(build, model), image, ((8, 16), (8, 12), (11, 14)), BLOCKS, op, pads=False,
        projection="attn.proj", dropout={"attn_drop_rate": 0.2}, checkpointing=use_checkpoint, unsupported=UNSUPPORTED,
    )
    for name, model, op in (("swinir", SwinIR, "window_attention"), ("swin2sr", Swin2SR, "cosine_attention"))
)  # fmt: skip
for built in CASES:
    swinops.explain(built.model())  # runs a small block of each class that is new to it, which no test should count
