"""What makes a model again: its class and arguments, read off its modules and written as JSON."""

import inspect
import itertools
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swinops.checkpoints.reading import FILES

CONFIG, PARAMETERS = "config.json", FILES[0]
# how a model runs and not what it computes, and what other attributes say too
UNSAVED = ("training", "grad_checkpointing", "backend", "num_classes", "grid_size")


def configuration(model: nn.Module) -> dict[str, Any]:
    """For a model that was changed after it was made, too (a head, a window), as long as arguments can tell it.

    Raises:
        ValueError: they cannot.
    """
    parameters = model.state_dict().values()
    expected = "model must be as its class makes it from arguments"
    if odd := [x for x in parameters if type(x) is not Tensor or x.is_meta]:
        raise ValueError(f"{expected}, and has a parameter without data or of another type, {type(odd[0]).__name__}")
    try:
        found = arguments(model)
        with torch.device("meta"):
            again = type(model)(**found)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{expected}, and cannot be: {error}") from error
    if (name := difference(model, again)) is not None:
        raise ValueError(f"{expected}, and {name or 'it'} is not: it would be lost")
    dtypes = sorted({str(x.dtype).removeprefix("torch.") for x in parameters})
    if len(dtypes) > 1:
        raise ValueError(f"{expected}, and its parameters have {' and '.join(dtypes)}: the difference would be lost")
    return {
        "library": "swinops",
        "class": type(model).__name__,
        "arguments": found,
        "dtype": dtypes[0],
    }


def arguments(model: Any) -> dict[str, Any]:
    """Those that the class of ``model`` makes it from."""
    attention, last = [stage.blocks[0].attn for stage in model.layers], model.layers[-1].blocks[-1]
    head = None if model.features_only else model.head.fc
    found = {
        "img_size": [*model.img_size],
        "patch_size": [*model.patch_embed.patch_size],
        "in_chans": model.patch_embed.proj.in_channels,
        "num_classes": model.num_classes if head is None else getattr(head, "out_features", 0),
        "embed_dim": model.patch_embed.proj.out_channels,
        "depths": [len(stage.blocks) for stage in model.layers],
        "num_heads": [attn.num_heads for attn in attention],
        "window_size": [*attention[0].window_size],  # no later stage has a larger map to cut it to
        "mlp_ratio": ratio(last.mlp.fc1.out_features, last.mlp.fc1.in_features),
        "drop_path_rate": last.drop_path.rate,
        "absolute_pos_embed": model.absolute_pos_embed is not None,
        "features_only": model.features_only,
        "pad_order": attention[0].pad_order,
    }
    if hasattr(attention[0], "pretrained_window_size"):
        depths = [
            depth
            for stage in model.layers
            for depth, block in enumerate(stage.blocks, 1)
            if not isinstance(block.norm3, nn.Identity)
        ]
        found["pretrained_window_sizes"] = [[*attn.pretrained_window_size] for attn in attention]
        found["extra_norm_period"] = min(depths, default=0)
        found["log_spaced"] = attention[0].log_spaced
    return found


def ratio(hidden: int, dim: int) -> float:
    """Of which ``int(ratio * dim)`` is ``hidden``: the quotient or, where that was rounded down, the next number."""
    quotient = hidden / dim
    return quotient if int(quotient * dim) == hidden else math.nextafter(quotient, math.inf)


def difference(model: nn.Module, again: nn.Module) -> str | None:
    """The name of a module, a setting or a parameter of ``again`` that is another in ``model``."""
    for (name, mine), (other, made) in itertools.zip_longest(
        model.named_modules(), again.named_modules(), fillvalue=("", None)
    ):
        if name != other or type(mine) is not type(made):
            return name or other
        for key, value in vars(made).items():
            plain = isinstance(value, (bool, int, float, str, list, tuple)) and key[0] != "_" and key not in UNSAVED
            if plain and not same(getattr(mine, key, None), value):
                return f"{name}.{key}".lstrip(".")
    mine, made = ({name: x.shape for name, x in each.state_dict().items()} for each in (model, again))
    return next((name for name in mine | made if mine.get(name) != made.get(name)), None)


def same(x: Any, y: Any) -> bool:
    """Rates of stochastic depth are quotients, and here they are rounded once more."""
    return math.isclose(x, y, rel_tol=1e-12) if isinstance(x, float) and isinstance(y, float) else bool(x == y)


def read_configuration(folder: str) -> dict[str, Any]:
    """What ``save_checkpoint`` wrote to the folder's config.json.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is another's, damaged, or of other parameters than the folder's.
    """
    path = os.path.join(folder, CONFIG)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint must be a folder of save_checkpoint, and there is no {path}")
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, and is not: {error}") from error
    keys = {"class": str, "arguments": dict, "dtype": str}
    if not isinstance(config, dict) or config.get("library") != "swinops":
        raise ValueError(f"{path} must be save_checkpoint's, and is not: name the model and load its parameters")
    if wrong := [key for key, kind in keys.items() if not isinstance(config.get(key), kind)]:
        raise ValueError(f"{path} must have class, arguments and dtype, and lacks {', '.join(wrong)}")
    return config


def make(folder: str, classes: Mapping[str, type[nn.Module]], options: dict[str, Any]) -> nn.Module:
    """The model that was saved to ``folder``, less what ``options`` change, with random parameters."""
    config, path = read_configuration(folder), os.path.join(folder, CONFIG)
    if saved_with(os.path.join(folder, PARAMETERS)) not in (None, config):
        raise ValueError(f"{path} must be as it was saved with {PARAMETERS}, and is not: pass settings to create_model")
    dtype = getattr(torch, config["dtype"], None)
    cls = classes.get(config["class"])
    if cls is None or not isinstance(dtype, torch.dtype):
        raise ValueError(
            f"{path} must name a model and a dtype that are known, got {config['class']}, {config['dtype']}"
        )
    if unknown := config["arguments"].keys() - inspect.signature(cls).parameters.keys():
        raise ValueError(f"{path} must have arguments of {cls.__name__} alone, got {', '.join(sorted(unknown))}")
    try:
        with torch.device("meta"):
            cls(**config["arguments"])
    except Exception as error:  # JSON may hold anything
        raise ValueError(f"{path} must have arguments that make a {cls.__name__}: {error}") from error
    return cls(**config["arguments"] | options).to(dtype)


def saved_with(path: str) -> Any:
    """The configuration that ``save_checkpoint`` wrote into the file of parameters as well; None without one."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        return None  # reading the parameters will say so
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("swinops", "null"))
    except (OSError, SafetensorError, ValueError):
        return None  # the same
