"""Other libraries' models by name, without their memory: what ``swinops explain`` looks at."""

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

Make = Callable[[], nn.Module]


def build(name: str, device: str) -> tuple[str, nn.Module]:
    """The first of timm, torchvision and Transformers with a model of that name, and its version; and the model.

    Each parameter is one number, seen as a tensor of the parameter's shape. What ``patch`` looks at is there: classes,
    attributes, shapes, dtypes and the device of parameters.

    Args:
        name: As in ``timm.list_models()`` or ``torchvision.models.list_models()``; for Transformers a type of model
            ("swinv2", with its default configuration), a folder with a config.json, or a repository of the hub.

    Raises:
        ImportError: None of the libraries can be imported.
        ValueError: There is no such model, or its library cannot build it.
    """
    libraries: dict[str, ModuleType] = {}
    for key in LIBRARIES:
        try:
            libraries[key] = import_library(key)
        except ImportError:
            continue
    if not libraries:
        raise ImportError("it builds models of other libraries, and needs timm: pip install timm")
    for key, library in libraries.items():
        find, _ = LIBRARIES[key]
        try:
            make = find(library, name)
            if make is not None:
                return f"{key} {library.__version__}", hollow(make, device)
        except Exception as error:  # other libraries raise any
            raise ValueError(f"{name!r} is a model that {key} cannot build: {error}") from error
    known = [known for key, library in libraries.items() for known in LIBRARIES[key][1](library)]
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "each library lists its models"
    where = ", ".join(f"{key} {library.__version__}" for key, library in libraries.items())
    raise ValueError(f"must be the name of a model in {where}, got {name!r}: {hint}")


def hollow(make: Make, device: str) -> nn.Module:
    """What ``make`` makes, without the memory of its parameters."""
    try:
        with torch.device("meta"):
            model = make()
    except (NotImplementedError, RuntimeError):  # some read the numbers of a tensor while they are built
        model = make()
    for module in model.modules():
        for key, x in module._parameters.items():
            if x is not None:
                one = torch.zeros((), dtype=x.dtype, device=device)
                module._parameters[key] = nn.Parameter(one.expand(x.shape), x.requires_grad)
    return model


def import_library(name: str) -> ModuleType:
    define_torchvision_ops()
    return importlib.import_module(name)


kept: list[torch.library.Library] = []  # definitions last as long as the object


def define_torchvision_ops() -> None:
    """Let torchvision, and timm with it, be imported where its compiled ops cannot: a CUDA build beside a CPU torch."""
    spec = importlib.util.find_spec("torchvision")
    defined = hasattr(torch.ops.torchvision, "nms")
    if torch.version.cuda is None and not defined and spec is not None and spec.origin is not None:
        try:
            torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
        except OSError:
            ops = torch.library.Library("torchvision", "FRAGMENT")
            for op in ("nms", "qnms"):
                ops.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            kept.append(ops)


def find_timm(timm: ModuleType, name: str) -> Make | None:
    return (lambda: timm.create_model(name, pretrained=False)) if timm.is_model(name) else None


def find_torchvision(torchvision: ModuleType, name: str) -> Make | None:
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        return None
    # a detector would download its backbone
    taken = inspect.signature(models.get_model_builder(name)).parameters
    return lambda: models.get_model(name, **{key: None for key in ("weights", "weights_backbone") if key in taken})


def find_transformers(transformers: ModuleType, name: str) -> Make | None:
    if name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name)
    elif name.startswith(("/", "./", "../")) and not (Path(name) / "config.json").is_file():
        raise ValueError("there is no such folder with a config.json")
    elif "/" in name or (Path(name) / "config.json").is_file():
        config = transformers.AutoConfig.from_pretrained(name)
    else:
        return None
    cls = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    return lambda: transformers.AutoModel.from_config(config) if cls is None else cls(config)


# how to find a model, and the names there are
LIBRARIES: dict[str, tuple[Callable[[ModuleType, str], Make | None], Callable[[ModuleType], list[str]]]] = {
    "timm": (find_timm, lambda timm: timm.list_models()),
    "torchvision": (find_torchvision, lambda _: importlib.import_module("torchvision.models").list_models()),
    "transformers": (find_transformers, lambda transformers: list(transformers.CONFIG_MAPPING)),
}
