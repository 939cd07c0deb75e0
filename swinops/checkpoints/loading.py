"""``load_checkpoint``: read, rename, resize, check, and only then copy."""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from swinops.checkpoints import microsoft, openmmlab, timm, torchvision, transformers
from swinops.checkpoints.reading import PREFIXES, listed, parameters, read
from swinops.checkpoints.resizing import TABLE, resize, why_not_resized

M = TypeVar("M", bound=nn.Module)

logger = logging.getLogger("swinops")
SOURCES = (torchvision, transformers, openmmlab, timm, microsoft)
BUFFERS = ("relative_position_index", "attn_mask")  # most files have some of them
COORDINATES = "relative_coords_table"  # of SwinV2's offsets, in Microsoft's and torchvision's files
VERSIONS = {TABLE: "Swin V1", "logit_scale": "Swin V2"}  # by what only that has
# the norms of feature maps in backbones, the head of a classifier, and what only learns from masked images
PARTS = re.compile(r"(norm\d*|head|decoder)\.|mask_token$")


@torch.no_grad()
def load_checkpoint(
    model: M, checkpoint: str | os.PathLike[str] | Mapping[str, Any], source: str = "auto", *, skip_head: bool = False
) -> M:
    """Copy the parameters of a Swin V1 or V2 into ``model``, all of them or none.

    Bias tables of other window sizes and position embeddings of other image sizes are resized as published (bicubic);
    SwinV2 computes its bias, for any window: whether ``pretrained_window_sizes`` are the checkpoint's can be told of
    Microsoft's, OpenMMLab's and torchvision's alone. What stands beside the backbone of a larger model (a neck, a
    decoder) is left out, and so are a head and norms that the model does not have. All that is one line of the log
    "swinops", at the level WARNING.

    Args:
        model: A model of ``swinops.models``. Parameters keep their dtype and device.
        checkpoint: A .safetensors file, a file of ``torch.save`` (read with ``weights_only=True``), a folder with
            model.safetensors or pytorch_model.bin, or what such a file holds: names and tensors, also below "model" or
            "state_dict".
        source: Whose names they are: "microsoft" (also SimMIM and detection), "timm" (and this package's own),
            "torchvision", "transformers" (in memory and on disk) or "openmmlab" (MMPretrain, MMDetection,
            MMSegmentation); "auto" tells by the names.
        skip_head: Leave the model's head as it is: for a checkpoint with other classes, or without a head.

    Returns:
        ``model``

    Raises:
        FileNotFoundError: There is no such file. Nothing is downloaded.
        ValueError: The file cannot be read, is not of ``source``, or does not fit the model; the message has the
            missing, the unexpected and the wrongly shaped names, of many the first ones and their number, or says that
            the one is a V1 and the other a V2. The model is then unchanged.
        ImportError: A .safetensors file, and no package to read it with.
        TypeError: ``model`` is not a module, or ``checkpoint`` neither a path nor a mapping.
    """
    names = [name_of(library) for library in SOURCES]
    if source not in ("auto", *names):
        raise ValueError(f"source must be 'auto', {', '.join(map(repr, names[:-1]))} or {names[-1]!r}, got {source!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    own = model.state_dict()
    for prefix in PREFIXES:
        if own and all(name.startswith(prefix) for name in own):
            raise ValueError(f"model must be the model itself, got a {type(model).__name__}: pass model.{prefix[:-1]}")
    if isinstance(checkpoint, Mapping):
        where, contents = "the checkpoint", checkpoint
    elif isinstance(checkpoint, (str, os.PathLike)):
        where = os.fsdecode(checkpoint)
        contents = read(where)
    else:
        raise TypeError(f"checkpoint must be a path or a state dict, got {type(checkpoint).__name__}")
    state, notes = parameters(contents, where)
    # timm's models that return maps have their stages under other names
    state = {
        re.sub(r"\blayers_(\d+)\.", r"layers.\1.", name): x for name, x in state.items() if not name.endswith(BUFFERS)
    }
    state, beside = unwrapped(state, where)
    state = last_norm(in_our_names(state, source, where))
    tables = {name: state.pop(name) for name in list(state) if name.endswith(COORDINATES)}
    if skip_head:
        state = {name: x for name, x in state.items() if not name.startswith("head.")}
        state |= {name: x for name, x in own.items() if name.startswith("head.")}
    state, spare = without_spare_parts(own, state)
    state, resized = resize(model, state)
    problems = misfits(own, state)
    if problems:
        raise ValueError(f"{where} does not fit {type(model).__name__}: {'; '.join(problems)}")
    notes += beside + spare + resized + other_windows(model, tables)
    # a dtype that cannot be converted raises here, before anything is copied
    model.load_state_dict({name: x.to(own[name].dtype) for name, x in state.items()})
    if notes:
        logger.warning("%s: %s", where, "; ".join(notes))
    return model


def name_of(library: ModuleType) -> str:
    return library.__name__.rpartition(".")[2]


def unwrapped(state: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters of the Swin in a larger model, by its own names; and in words what stands beside it."""
    for library in SOURCES:
        block = re.compile(rf"((?:.*?\.)??){library.BLOCK}")
        prefixes = sorted({match[1] for match in map(block.match, state) if match})
        if len(prefixes) > 1:
            raise ValueError(f"{where} must hold one Swin, got {listed([f'{p}*' for p in prefixes])}: pass one of them")
        if prefixes:
            break
    prefix = prefixes[0] if prefixes else ""
    # OpenMMLab's classifiers have their head beside the backbone
    head = prefix if any(name.startswith(f"{prefix}head.") for name in state) else "head.fc."
    inside = {name: x for name, x in state.items() if name.startswith((prefix, head))}
    beside = list(dict.fromkeys(f"{name.partition('.')[0]}.*" for name in state if name not in inside))
    notes = [f"left out {listed(beside)}, beside {prefix}*"] if beside else []
    return {name.removeprefix(prefix): x for name, x in inside.items()}, notes


def in_our_names(state: dict[str, Tensor], source: str, where: str) -> dict[str, Tensor]:
    """By the names of this package's models; what no library is known to write stays as it is for "auto"."""
    found = [library for library in SOURCES if library.recognises(state)]
    chosen = found[:1] if source == "auto" else [library for library in found if name_of(library) == source]
    if not chosen and source != "auto":
        right = f"{name_of(found[0])!r}" if found else "a library that is known, which is none"
        raise ValueError(f"source must be 'auto' or {right}, by the names in {where}, got {source!r}")
    converted: dict[str, Tensor] = chosen[0].convert(state) if chosen else state
    return converted


def last_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the norm of the last of a backbone's maps, norm3 of four, as the norm before the head."""
    stages = [int(match[1]) for match in map(re.compile(r"layers\.(\d+)\.").match, state) if match]
    if not stages or any(name.startswith("norm.") for name in state):
        return state
    return {re.sub(rf"^norm{max(stages)}\.", "norm.", name): x for name, x in state.items()}


def without_spare_parts(own: Mapping[str, Tensor], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A model that returns feature maps has no norm and no head, one without classes no head; and that in words."""
    parts = {match[0]: None for match in map(PARTS.match, state) if match}
    spare = tuple(part for part in parts if not any(name.startswith(part) for name in own))
    shown = ", ".join(f"{part}*" if part.endswith(".") else part for part in spare)
    notes = [f"left out {shown}, which the model does not have"] if spare else []
    return {name: x for name, x in state.items() if not name.startswith(spare)}, notes


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
    others = [*missing, *misshapen, *kinds["unexpected"]]
    if others and all(name.startswith("head.") for name in others):
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
        if not hasattr(attn, "pretrained_window_size") or table.is_meta or table.dim() != 4:
            continue
        if not table.numel() or table.shape[-1] != 2:
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
    # outside of these bounds it is none: the windows would be a thousand times apart
    return 1 + round(8 * (window - 1) / (2 ** (3 * coordinate) - 1)) if window > 1 and 1e-3 < coordinate < 10 else None
