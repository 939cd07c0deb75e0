"""Which module runs a call, and why another cannot.

A backend is a module with the reference's functions and signatures, and ``why_not(x, op, tokens)``: its reason, in a
sentence, for not running ``op`` on a tensor like ``x`` with windows of so many tokens, or None.
"""

import importlib
from types import ModuleType

from torch import Tensor

from swinops.backends import choice

MODULES = {"cuda": "swinops.backends.cuda", "triton": "swinops.kernels", "reference": "swinops.reference"}


def check_name(backend: str) -> None:
    """Raise a ValueError unless ``backend`` is "auto" or one of ``MODULES``."""
    if backend != "auto" and backend not in MODULES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, MODULES))}, got {backend!r}")


def module(name: str) -> ModuleType:
    check_name(name)
    return importlib.import_module(MODULES[name])


def why_not(name: str, x: Tensor, op: str, tokens: int = 0) -> str | None:
    """Why backend ``name`` cannot run ``op`` on tensors like ``x``, in a sentence; None where it can.

    ``tokens``: of a window, where that is known.
    """
    try:
        backend = module(name)
    except ImportError as error:
        return f"{MODULES[name]} cannot be imported ({error})"
    reason: str | None = backend.why_not(x, op, tokens)
    return reason


def resolve(name: str, x: Tensor, op: str, tokens: int = 0, backward: bool = False) -> ModuleType:
    """The module that runs ``op`` on ``x``: the one asked for, or for ``"auto"`` the fastest that can (see ``choice``).

    Args:
        tokens: Of a window, where the op has windows.
        backward: It is the op's gradient that is to run.

    Raises:
        RuntimeError: with every reason, where the backend asked for cannot run, or no kernel can run on a CUDA tensor.
    """
    if name != "auto":
        reason = why_not(name, x, op, tokens)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run {op}: {reason}")
        return module(name)
    if x.device.type != "cuda":
        return module("reference")
    reasons = []
    for kernel in choice.order(op, backward, x.device, x.dtype, tokens, x.shape[-1]):
        reason = why_not(kernel, x, op, tokens)
        if reason is None:
            return module(kernel)
        reasons.append(f"{kernel}: {reason}")
    raise RuntimeError(
        f"no kernel can run {op} on this CUDA tensor ({'; '.join(reasons)}); "
        'backend="reference" runs it in plain PyTorch'
    )
