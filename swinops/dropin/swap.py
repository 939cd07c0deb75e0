"""What the classes that ``patch`` puts on instances have in common."""

import functools
import operator
import sys
import types
import warnings
from typing import Any, ClassVar

import torch
from torch import nn

from swinops.backends import MODULES, why_not

Call = tuple[str, torch.device, torch.dtype, int]  # an op, and device, dtype and last axis of its first tensor


class Swapped(nn.Module):
    """First base of a class that takes another's place on an instance; the second base is the class it takes.

    It has no parameter, buffer or submodule of its own and caches nothing: what the library changes later is seen at
    the next call. Its only state is the string ``swinops_backend`` in the instance's ``__dict__``.
    """

    LIBRARY: ClassVar[str]
    MODULE: ClassVar[str]  # where the library defines the class
    NAME: ClassVar[str]
    ATTRIBUTES: ClassVar[tuple[str, ...]]  # what an instance must have, dotted
    OVERRIDES: ClassVar[tuple[str, ...]]  # the library's methods that are replaced; each remains as library_<name>
    KEPT: ClassVar[tuple[str, ...]]  # further methods that must be the library's, for the overrides rely on them
    COMPANION: ClassVar[bool]  # replaced only in a model where another module is

    original: ClassVar[type[nn.Module]]
    swinops_backend: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # swapped_class made the class, so pickle would not find it by its name
        parts = super().__reduce_ex__(2)
        kind = next(base for base in type(self).__bases__ if issubclass(base, Swapped))
        return rebuild, (kind, self.original), *parts[2:]

    def is_last_swap(self) -> bool:
        """Nobody has swapped the class again."""
        return type(self) in CLASSES.values()

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"swinops={self.swinops_backend!r}"]))

    @classmethod
    def why_left(cls, module: Any) -> str | None:
        """Why ``module``, an instance of the library's class, cannot be replaced; None where it can."""
        return None

    @classmethod
    def why_own(cls, module: Any, backend: str) -> str | None:
        """Why ``module`` would run its library's own forward in its present state; None where it would run the op."""
        return None

    @classmethod
    def calls(cls, module: Any) -> list[Call]:
        """The ops that ``module`` calls."""
        return []


def library_class(kind: type[Swapped], cls: type[nn.Module]) -> type[nn.Module] | None:
    """The library's class that ``cls`` is or inherits: by identity, or by module suffix and name in a vendored copy."""
    own = getattr(sys.modules.get(kind.MODULE), kind.NAME, None)
    suffix = kind.MODULE.rpartition(".")[2]
    for base in cls.__mro__:
        if base is own or (base.__name__ == kind.NAME and base.__module__.rpartition(".")[2] == suffix):
            return base
    return None


def why_left(kind: type[Swapped], library: type[nn.Module], module: nn.Module) -> str | None:
    """Why an instance of ``library`` or of a subclass cannot be replaced; None where it can."""
    for name in kind.ATTRIBUTES:
        try:
            operator.attrgetter(name)(module)
        except AttributeError:
            return f"it has no {name}, unlike {kind.LIBRARY}'s {kind.NAME}"
    for name in ("forward", *kind.OVERRIDES, *kind.KEPT):
        if name in vars(module):
            return f"its {name} was replaced on the instance"
        if getattr(type(module), name) is not getattr(library, name):
            return f"its class overrides {name}"
        if getattr(library, name).__module__ != library.__module__:
            return f"{name} of {library.__name__} was replaced in the library"
    return kind.why_left(module)


CLASSES: dict[tuple[type[Swapped], type[nn.Module]], type[Swapped]] = {}


def swapped_class(kind: type[Swapped], original: type[nn.Module]) -> type[Swapped]:
    """The class that an instance of ``original`` gets."""
    if (kind, original) not in CLASSES:
        members: dict[str, Any] = {
            "original": original,
            "__module__": original.__module__,
            "__doc__": original.__doc__,
            # what TorchScript reads of a class; it takes the annotations of the first base that has any
            "__annotations__": next(filter(None, (vars(c).get("__annotations__") for c in original.__mro__)), {}),
            "__constants__": [*getattr(original, "__constants__", ()), *getattr(kind, "__constants__", ())],
        }
        library = library_class(kind, original)
        for name in kind.OVERRIDES:
            kept = f"library_{name.lstrip('_')}"
            members[kept] = renamed(getattr(library, name), kept)
        # the name as before: device maps and wrapping policies select modules by the name of their class
        CLASSES[kind, original] = type(original.__name__, (kind, original), members)
    return CLASSES[kind, original]


def renamed(f: types.FunctionType, name: str) -> types.FunctionType:
    """A copy under another name: TorchScript names a method after its function, and the override has the old name."""
    copy = types.FunctionType(f.__code__, f.__globals__, name, f.__defaults__, f.__closure__)
    copy.__annotations__ = f.__annotations__
    return copy


def rebuild(kind: type[Swapped], original: type[nn.Module]) -> Swapped:
    """An empty instance, for pickle and copy to fill."""
    cls = swapped_class(kind, original)
    return cls.__new__(cls)


def hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(h) > 0 for h in hooks)


@functools.cache
def kernel(op: str, device: torch.device, dtype: torch.dtype, channels: int) -> tuple[str, str]:
    """The fastest backend whose kernel runs ``op`` on such tensors, "" for none; and why the others do not."""
    if device.type != "cuda":
        return "", f'the model is on {device}, and backend="auto" runs kernels on CUDA only'
    x = torch.empty(0, channels, device=device, dtype=dtype)
    reasons = {name: why_not(name, x, op) for name in MODULES if name != "reference"}
    fastest = next((name for name, reason in reasons.items() if reason is None), "")
    return fastest, "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)


def why_raises(calls: list[Call], backend: str) -> str | None:
    """Why a module that makes these calls would raise, for a backend asked for by name; None where it would not."""
    for op, device, dtype, channels in calls if backend != "auto" else ():
        reason = why_not(backend, torch.empty(0, channels, device=device, dtype=dtype), op)
        if reason is not None:
            return f"backend {backend!r} cannot run {op}: {reason}"
    return None


# torch.compile runs the next two while it traces, and takes their result as a constant


@torch.compiler.assume_constant_result
def no_kernel(op: str, device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why no kernel runs ``op`` on such tensors; None where one does."""
    fastest, reason = kernel(op, device, dtype, channels)
    return None if fastest else reason


warned: set[str] = set()


@torch.compiler.assume_constant_result
def warn_once(library: str, reason: str) -> None:
    """Say why the library's own forward runs, once per reason in a process."""
    if reason not in warned:
        warned.add(reason)
        warnings.warn(f"swinops: {library}'s own forward runs in place of the op: {reason}", stacklevel=2)
