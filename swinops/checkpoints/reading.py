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


def read(path: str) -> Any:
    """What the file holds, its tensors on the CPU. No code in it runs."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint must be a state dict or a file, and there is no file {path!r}")
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises anything
        held = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if held is None:
            told = isinstance(error, (RuntimeError, OSError, pickle.UnpicklingError))  # others are "KeyError: 101"
            reason = str(error).partition("\n")[0] if told else "it is empty, or something else"
            raise ValueError(f"{path} is not a checkpoint that torch.load reads: {reason}") from error
        raise ValueError(
            f"{path} holds more than tensors ({held[1]}) and is not loaded, because unpickling that runs code; if you "
            f"trust it, read checkpoint = torch.load({path!r}, weights_only=False) and save its parameters alone: "
            'torch.save({"model": checkpoint["model"]}, path), or checkpoint.state_dict() of a whole model'
        ) from error


def read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path} needs the package safetensors to be read: pip install safetensors") from error
    try:
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    return state


def parameters(contents: Any, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters among what a checkpoint holds, without a wrapper's prefix; and in words what was passed over."""
    notes = []
    while isinstance(contents, Mapping):
        nest = next((key for key in NESTS if isinstance(contents.get(key), Mapping)), None)
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
