"""timm's CoAtNet and MaxViT, small: their convolutions are cut down, and their attention has each kind of bias."""

from functools import partial

import pytest
from torch import nn

from swinops.testing import random_tensor

from .dropin_case import Case
from .timm_swins import randomise as randomise_parameters

maxxvit = pytest.importorskip("timm.models.maxxvit")

OPTIONS = {"num_classes": 5, "stem_width": (8, 12), "embed_dim": (16, 24), "transformer_dim_head": 8}


def build(config, fused, **options):
    """A model with timm's fused attention or its plain one, which are two ways to the same numbers."""
    model = maxxvit.MaxxVit(maxxvit.MaxxVitCfg(**config), **{**OPTIONS, **options})
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    return randomise(model).eval()


def randomise(model):
    """And the statistics of the batch norms, which are the identity at first."""
    randomise_parameters(model)
    for seed, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(random_tensor(module.running_mean.shape, seed))
            module.running_var.copy_(random_tensor(module.running_var.shape, seed + 1).exp())
    return model


def image(batch, size):
    return random_tensor((batch, 3, *size), 99)


def checkpoint(model):
    """In evaluation mode, for in training a batch norm has other numbers."""
    model.eval().set_grad_checkpointing()


def coatnet(**options):
    """A stage of convolutions, and one of two transformer blocks on a map of an eighth of the image."""
    return partial(build, maxxvit._rw_coat_cfg(), depths=(1, 2), block_type=("C", "T"), **options)


def maxvit(config, **options):
    """Two stages of a convolution, a block partition and a grid, on a quarter and an eighth of the image."""
    options = {"transformer_window_size": (2, 3), "transformer_grid_size": (2, 3), **options}
    return partial(build, config, depths=(1, 1), block_type=("M", "M"), **options)


COATNET = {f"stages.1.blocks.{i}.attn": "Attention2d" for i in range(2)}
MAXVIT = {f"stages.{i}.blocks.0.attn_block": "PartitionAttentionCl" for i in range(2)}
DROPOUT = {"transformer_attn_drop": 0.2}

# nothing pads or shifts in either
CASES = (
    Case(
        "coatnet",
        "timm",
        coatnet(fused=False),
        image,
        ((32, 24), (24, 40), (32, 32)),
        COATNET,
        pads=False,
        shifts=False,
        bypassed=("attn_drop", "rel_pos"),
        projection="qkv",
        dropout=DROPOUT,
        resize=lambda size: {"img_size": size},
        checkpointing=checkpoint,
    ),
    Case(
        "coatnet_rmlp",
        "timm",
        coatnet(fused=True, transformer_rel_pos_type="mlp", transformer_rel_pos_dim=16),
        image,
        ((32, 24), (24, 40)),
        COATNET,
        pads=False,
        shifts=False,
        bypassed=(),
        projection="qkv",
        dropout=DROPOUT,
        resize=lambda size: {"img_size": size},
        checkpointing=checkpoint,
    ),
    Case(
        "maxvit",
        "timm",
        maxvit(maxxvit._rw_max_cfg(), fused=True),
        image,
        ((16, 24), (32, 24), (16, 48)),
        MAXVIT,
        pads=False,
        shifts=False,
        bypassed=("attn",),
        dropout=DROPOUT,
        overrides="_partition_attn",
        checkpointing=checkpoint,
    ),
    Case(
        "maxvit_tf",
        "timm",
        maxvit(maxxvit._tf_cfg(), fused=False),
        image,
        ((16, 24), (32, 24)),
        MAXVIT,
        pads=False,
        shifts=False,
        bypassed=("attn", "attn.attn_drop", "attn.rel_pos"),
        dropout=DROPOUT,
        overrides="_partition_attn",
        checkpointing=checkpoint,
        unsupported={"fx": "symbolically traced variables"},  # its convolutions pad by the size of the map
    ),
)
