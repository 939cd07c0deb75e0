"""``save_checkpoint``: a folder that a model can be made from again."""

import contextlib
import json
import os
import shutil
import tempfile

from torch import nn

from swinops.checkpoints.configuration import CONFIG, PARAMETERS, configuration, read_configuration


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters of a model to the folder ``path``, as model.safetensors, and its settings, as config.json.

    ``create_model(checkpoint=path)`` makes the same model again, bit for bit, and ``load_checkpoint(model, path)``
    loads the parameters alone. How the model runs is not kept: its device, its backend, gradient checkpointing.

    Both files are complete before either gets its name. Where writing fails the folder is as it was. Should the machine
    stop between the two names, ``create_model`` says that the files do not belong together.

    Args:
        model: A ``SwinTransformer`` or ``SwinTransformerV2`` of ``swinops.models``.
        path: A new folder, that of an earlier ``save_checkpoint``, whose two files are replaced, or one without files
            of these names.

    Raises:
        ValueError: ``path`` is a file, or holds such files that are not from here; or the model has been changed in a
            way that its arguments cannot tell. Nothing has been written then.
        TypeError: ``model`` is no such model, or ``path`` no path.
        ImportError: There is no package to write safetensors with.
        OSError: The folder cannot be written.
    """
    from swinops import models  # which imports this package

    if type(model) not in (models.SwinTransformer, models.SwinTransformerV2):
        raise TypeError(f"model must be a SwinTransformer or SwinTransformerV2 of swinops, got {type(model).__name__}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a path, got {type(path).__name__}")
    folder = os.fsdecode(path)
    if (why := why_not_written(folder)) is not None:
        raise ValueError(f"path must be a new folder or one of save_checkpoint, and {folder!r} {why}")
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("save_checkpoint needs the package safetensors: pip install safetensors") from error
    config = json.dumps(configuration(model), indent=2)
    # copies: safetensors holds no two names for one tensor
    state = {name: x.to("cpu", copy=True).contiguous() for name, x in model.state_dict().items()}
    is_new = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as unfinished:
            written = {name: os.path.join(unfinished, name) for name in (CONFIG, PARAMETERS)}
            with open(written[CONFIG], "w", encoding="utf-8") as file:
                file.write(config + "\n")
            save_file(state, written[PARAMETERS], metadata={"format": "pt", "swinops": config})
            shutil.copymode(written[CONFIG], written[PARAMETERS])  # safetensors writes for the owner alone
            for file_name in written.values():
                flush(file_name)
            for name, file_name in written.items():
                os.replace(file_name, os.path.join(folder, name))
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        raise


def why_not_written(folder: str) -> str | None:
    """What a checkpoint there would destroy, in words."""
    if os.path.lexists(folder) and not os.path.isdir(folder):
        return "is a file"
    if os.path.splitext(folder)[1] in (".safetensors", ".pth", ".pt", ".bin") and not os.path.isdir(folder):
        return "is named like a file"
    for name in (CONFIG, PARAMETERS):
        if os.path.lexists(os.path.join(folder, name)):
            try:
                read_configuration(folder)
            except (OSError, ValueError):
                return f"holds a {name} that is not its"
    return None


def flush(path: str) -> None:
    """Wait until the file is on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
