"""From a file, or from what it holds, to names and tensors."""

import os
import pickle
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

NESTS = ("model", "state_dict")  # where training loops keep the parameters
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder, the first that is there
TEXTS = {b"<": "a web page", b"version https://git-lfs": "a pointer of Git LFS to the file"}  # by how they begin


def read(path: str) -> Any:
    """What the file holds, or a folder's file, its tensors on the CPU. No code in it runs."""
    if os.path.isdir(path):
        path = file_of(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint must be a state dict, a file or a folder, and there is no file {path!r}")
    with open(path, "rb") as file:
        start = file.read(64)
    # safetensors begin with eight bytes, the length of a header in JSON
    if start[8:9] == b"{":
        return read_safetensors(path)
    found = next((what for text, what in TEXTS.items() if start.lstrip().startswith(text)), None)
    if found or not start:
        raise ValueError(f"{path} must be a checkpoint, and is {found or 'empty'}")
    try:
        # a path's suffix would mean something to it
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        held = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if held is None:
            raise ValueError(f"{path} must be a checkpoint, and cannot be read: {reason(error)}") from error
        raise ValueError(
            f"{path} holds more than tensors ({held[1]}) and is not loaded, because unpickling that runs code; if you "
            f"trust it, read checkpoint = torch.load({path!r}, weights_only=False) and save its parameters alone: "
            'torch.save({"model": checkpoint["model"]}, path), or checkpoint.state_dict() of a whole model'
        ) from error


def file_of(folder: str) -> str:
    """The file with the parameters in a folder as ``save_checkpoint``, timm and Transformers write it."""
    for name in FILES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
        if os.path.isfile(f"{path}.index.json"):
            raise ValueError(f"{folder} must hold one file of parameters, and {name} is in several: save it as one")
    raise FileNotFoundError(f"checkpoint must be a folder with {' or '.join(FILES)}, and {folder!r} has neither")


def reason(error: Exception) -> str:
    """The first sentence of what torch.load says, where that says anything."""
    text = re.split(r"[.:]?\s*\n|\. ", str(error))[0]
    if "TorchScript" in text:
        return "it is a TorchScript archive, which holds code"
    # its advice is to run what is in the file; others are "KeyError: 101"
    if text.startswith("Weights only load failed") or not isinstance(error, (RuntimeError, OSError)):
        return "it is neither of torch.save nor safetensors, or it is damaged"
    return text


def read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs the package safetensors to be read: pip install safetensors") from error
    try:
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a checkpoint, and is no whole safetensors file: {error}") from error
    return state


def parameters(contents: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters among what a checkpoint holds, without a wrapper's prefix; and in words what was passed over."""
    notes = []
    for _ in range(8):  # a mapping could hold itself
        nest = next(
            (key for key in NESTS if isinstance(contents, Mapping) and isinstance(contents.get(key), Mapping)), None
        )
        if nest is None:
            break
        others = [repr(key) for key, value in contents.items() if key != nest and is_state_dict(value)]
        if others:
            notes.append(f"took {nest!r}, not {' or '.join(others)}")
        contents = contents[nest]
    if not isinstance(contents, Mapping):
        raise ValueError(f"{source} must hold a state dict, got {type(contents).__name__}")
    if not is_state_dict(contents):
        others = [f"{key!r} ({type(value).__name__})" for key, value in contents.items() if not is_named(key, value)]
        raise ValueError(f"{source} must hold tensors by name, also below 'model', got {listed(others) or 'nothing'}")
    state = dict(contents)
    if odd := [name for name, x in state.items() if x.layout != torch.strided or x.is_nested or x.is_quantized]:
        raise ValueError(f"{source} must hold dense tensors, got others for {listed(odd)}")
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): x for name, x in state.items()}
    return state, notes


def is_state_dict(x: Any) -> bool:
    return isinstance(x, Mapping) and len(x) > 0 and all(is_named(key, value) for key, value in x.items())


def is_named(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def listed(names: Sequence[str], shown: int = 6) -> str:
    """All names, or the first ones and the number of the others."""
    more = [f"and {len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*names[:shown], *more])
