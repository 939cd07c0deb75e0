"""``load_checkpoint``: read, rename, resize, check, and only then copy."""

import logging
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from swinops.checkpoints import microsoft, torchvision, transformers
from swinops.checkpoints.reading import listed, parameters, read
from swinops.checkpoints.resizing import TABLE, resize, why_not_resized

M = TypeVar("M", bound=nn.Module)

logger = logging.getLogger("swinops")
SOURCES = (torchvision, transformers, microsoft)  # the last recognises torchvision's head too
BUFFERS = ("relative_position_index", "attn_mask")  # most files have some of them
COORDINATES = "relative_coords_table"  # of SwinV2's offsets, in Microsoft's and torchvision's files
VERSIONS = {TABLE: "Swin V1", "logit_scale": "Swin V2"}  # by what only that has


@torch.no_grad()
def load_checkpoint(model: M, checkpoint: str | os.PathLike[str] | Mapping[str, Any], *, skip_head: bool = False) -> M:
    """Copy the parameters of a Swin V1 or V2 into ``model``, all of them or none.

    Whose they are is told by their names: Microsoft's, timm's, torchvision's (``swin_*``, ``swin_v2_*``), Transformers'
    (``Swin*`` and ``Swinv2*``, with or without a classifier) or this package's.

    Bias tables of other window sizes and position embeddings of other image sizes are resized as published (bicubic);
    SwinV2 computes its bias, for any window: whether ``pretrained_window_sizes`` are the checkpoint's can be told of
    Microsoft's and torchvision's alone. All that, and whatever of the checkpoint is left out, is one line of the log
    "swinops", at the level WARNING.

    Args:
        model: A model of ``swinops.models``. Parameters keep their dtype and device.
        checkpoint: A .safetensors file, a file of ``torch.save`` (read with ``weights_only=True``), or what such a
            file holds: names and tensors, also below "model" or "state_dict".
        skip_head: Leave the model's head as it is: for a checkpoint with other classes, or without a head.

    Returns:
        ``model``

    Raises:
        FileNotFoundError: There is no such file. Nothing is downloaded.
        ValueError: The file cannot be read, or does not fit the model; the message has the missing, the unexpected and
            the wrongly shaped names, of many the first ones and their number, or says that the one is a V1 and the
            other a V2. The model is then unchanged.
        ImportError: A .safetensors file, and no package to read it with.
        TypeError: ``model`` is not a module, or ``checkpoint`` neither a path nor a mapping.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(checkpoint, Mapping):
        source, contents = "the checkpoint", checkpoint
    elif isinstance(checkpoint, (str, os.PathLike)):
        source, contents = os.fspath(checkpoint), read(os.fspath(checkpoint))
    else:
        raise TypeError(f"checkpoint must be a path or a state dict, got {type(checkpoint).__name__}")
    own = model.state_dict()
    state, notes = parameters(contents, source)
    state = {name: x for name, x in state.items() if not name.endswith(BUFFERS)}
    library = next((library for library in SOURCES if library.recognises(state)), None)
    if library is not None:
        state = library.convert(state)
    tables = {name: state.pop(name) for name in list(state) if name.endswith(COORDINATES)}
    if skip_head:
        state = {name: x for name, x in state.items() if not name.startswith("head.")}
        state |= {name: x for name, x in own.items() if name.startswith("head.")}
    for part in ("norm.", "head."):
        # a model that returns feature maps has neither, one without classes has no head
        if any(name.startswith(part) for name in state) and not any(name.startswith(part) for name in own):
            state = {name: x for name, x in state.items() if not name.startswith(part)}
            notes.append(f"left out {part}*, which the model does not have")
    state, resized = resize(model, state)
    problems = misfits(own, state)
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state)
    notes += resized + other_windows(model, tables)
    if notes:
        logger.warning("%s: %s", source, "; ".join(notes))
    return model


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Why ``state`` cannot be copied into ``own``, in words."""
    mine, theirs = version(own), version(state)
    if mine and theirs and mine != theirs:
        return [f"the checkpoint is of a {theirs}, and the model is a {mine}"]
    shared = {name: (x, own[name]) for name, x in state.items() if name in own}
    missing = [name for name in own if name not in state]
    misshapen = [name for name, (x, mine) in shared.items() if x.shape != mine.shape]
    kinds = {
        "missing": missing,
        "unexpected": [name for name in state if name not in own],
        "wrong shapes": [
            f"{name} must be {list(own[name].shape)}, got {list(state[name].shape)}{why_not_resized(name, state[name])}"
            for name in misshapen
        ],
        "without data": [name for name, (x, _) in shared.items() if x.is_meta],
        "not floating point": [
            f"{name} ({str(x.dtype).removeprefix('torch.')})"
            for name, (x, mine) in shared.items()
            if mine.is_floating_point() and not x.is_floating_point()
        ],
    }
    problems = [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]
    if any(name.startswith("head.") for name in missing + misshapen):
        problems.append("skip_head=True would leave the model's head as it is")
    if any(mine.is_meta for mine in own.values()):
        problems.append("the model is on the meta device: call model.to_empty(device=...) first")
    return problems


def version(state: Mapping[str, Tensor]) -> str | None:
    """Whose parameters these are, where that can be told."""
    found = [which for mark, which in VERSIONS.items() if any(name.endswith(mark) for name in state)]
    return found[0] if len(found) == 1 else None


def other_windows(model: nn.Module, tables: Mapping[str, Tensor]) -> list[str]:
    """In words, where the position bias was trained with other windows than the model takes it to be."""
    modules, counts = dict(model.named_modules()), Counter[str]()
    for name, table in tables.items():
        attn: Any = modules.get(name.rpartition(".")[0])
        if attn is None or table.dim() != 4 or table.is_meta:
            continue
        own = tuple(p or w for p, w in zip(attn.pretrained_window_size, attn.window_size, strict=True))
        theirs = tuple(
            trained_window(float(table[0, -1, -1, axis]), (table.shape[1 + axis] + 1) // 2) or own[axis]
            for axis in range(2)
        )
        if theirs != own:
            counts[f"the position bias was trained with the window {theirs} and is taken to be of {own}"] += 1
    return [f"{what}: {count} (see pretrained_window_sizes)" for what, count in counts.items()]


def trained_window(coordinate: float, window: int) -> int | None:
    """The pretrained window of which ``coordinate``, log-spaced, is the largest offset in ``window``; None of one."""
    return None if window == 1 or not coordinate > 0 else 1 + round(8 * (window - 1) / (2 ** (3 * coordinate) - 1))
