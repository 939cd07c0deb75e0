"""Whole models on this package's layers, one file per family. Names are timm's."""

import difflib
import fnmatch
import os
from typing import Any

from torch import nn

from swinops.checkpoints import configuration, load_checkpoint
from swinops.models import swin, swinv2
from swinops.models.swin import SwinTransformer
from swinops.models.swinv2 import SwinTransformerV2

__all__ = ["SwinTransformer", "SwinTransformerV2", "create_model", "list_models"]

MODELS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    name: (cls, options)
    for cls, variants in ((SwinTransformer, swin.MODELS), (SwinTransformerV2, swinv2.MODELS))
    for name, options in variants.items()
}


def create_model(
    name: str | None = None,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    skip_head: bool = False,
    **options: Any,
) -> nn.Module:
    """A model by its name, with its published settings and random parameters, or those of a file.

    Args:
        name: One of ``list_models()``; None for the model that ``save_checkpoint`` wrote to the folder ``checkpoint``,
            with its settings.
        checkpoint: A file or folder of Microsoft's, timm's, torchvision's, Transformers', OpenMMLab's or this package's
            (.pth, .pt, .bin or .safetensors); nothing is downloaded. See ``load_checkpoint``.
        skip_head: Leave the head as it is: for a checkpoint with other classes.
        options: Settings that differ from the published or the saved ones, such as ``num_classes``, ``img_size``,
            ``window_size``, ``features_only`` or ``drop_path_rate``: the arguments of the model's class. None changes
            nothing.

    Raises:
        ValueError: There is no such model, the checkpoint does not fit it, or ``skip_head`` has no checkpoint.
        TypeError: The model has no such setting.
    """
    if skip_head and checkpoint is None:
        raise ValueError("skip_head must be False without a checkpoint, got True")
    options = {key: value for key, value in options.items() if value is not None}
    if name is None and checkpoint is not None:
        classes = {cls.__name__: cls for cls, _ in MODELS.values()}
        model = configuration.make(os.fsdecode(checkpoint), classes, options)
    elif name in MODELS:
        cls, published = MODELS[name]
        model = cls(**published | options)
    else:
        close = difflib.get_close_matches(str(name), MODELS, n=3)
        hint = f"did you mean {' or '.join(close)}" if close else f"known are {', '.join(MODELS)}"
        raise ValueError(f"name must be one of swinops.list_models(), got {name!r}: {hint}")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, skip_head=skip_head)
    return model


def list_models(pattern: str = "*") -> list[str]:
    """Names of models, sorted; ``pattern`` may hold ``*`` and ``?``."""
    return sorted(fnmatch.filter(MODELS, pattern))
