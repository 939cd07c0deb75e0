"""What the classes that ``patch`` puts on instances have in common."""

import functools
import inspect
import operator
import sys
import types
import warnings
from collections.abc import Iterable
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
    MODULES: ClassVar[tuple[str, ...]]  # where the library defines the class; vendored copies have the last parts
    NAME: ClassVar[str]
    ATTRIBUTES: ClassVar[tuple[str, ...]]  # what an instance must have, dotted
    OVERRIDES: ClassVar[tuple[str, ...]]  # the library's methods that are replaced; each remains as library_<name>
    KEPT: ClassVar[tuple[str, ...]]  # further methods that must be the library's, for the overrides rely on them
    # for methods that an override has in its own words, the arguments ("x?": not in every version) and the names that
    # the library's may use
    CODE: ClassVar[tuple[tuple[str, str, str], ...]] = ()
    COMPANION: ClassVar[bool]  # replaced only in a model where another module is

    original: ClassVar[type[nn.Module]]
    swinops_backend: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # swapped_class made the class, so pickle would not find it by its name
        parts = super().__reduce_ex__(2)
        return rebuild, (kind_of(self), self.original), *parts[2:]

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


def kind_of(module: Swapped) -> type[Swapped]:
    """The class in this package that ``module`` was given."""
    return next(kind for (kind, _), cls in CLASSES.items() if isinstance(module, cls))


# a class of one of these is recognised by identity alone: some have the file and class names of others
PACKAGES = ("timm", "torchvision", "transformers", "monai")


def library_class(kind: type[Swapped], cls: type[nn.Module]) -> type[nn.Module] | None:
    """The library's class that ``cls`` is or inherits: by identity, or by module suffix and name in a vendored copy."""
    own = [getattr(sys.modules.get(module), kind.NAME, None) for module in kind.MODULES]
    suffixes = [module.rpartition(".")[2] for module in kind.MODULES]
    for base in cls.__mro__:
        package, suffix = base.__module__.partition(".")[0], base.__module__.rpartition(".")[2]
        if base in own or (base.__name__ == kind.NAME and suffix in suffixes and package not in PACKAGES):
            return base
    return None


def missing(kind: type[Swapped], module: nn.Module) -> str | None:
    """The first of ``kind.ATTRIBUTES`` that ``module`` lacks."""
    for name in kind.ATTRIBUTES:
        try:
            operator.attrgetter(name)(module)
        except AttributeError:
            return name
    return None


def recognised(kinds: Iterable[type[Swapped]], module: nn.Module) -> tuple[type[Swapped], type[nn.Module]] | None:
    """Which of ``kinds`` is for ``module``, and the library's class; of several of its name, the one it has all of."""
    found = [(kind, library) for kind in kinds if (library := library_class(kind, type(module))) is not None]
    # what goes with a block may have a name that other libraries have, too
    found = [(kind, library) for kind, library in found if not kind.COMPANION or missing(kind, module) is None]
    return next((entry for entry in found if missing(entry[0], module) is None), found[0] if found else None)


def why_left(kind: type[Swapped], library: type[nn.Module], module: nn.Module) -> str | None:
    """Why an instance of ``library`` or of a subclass cannot be replaced; None where it can."""
    if (name := missing(kind, module)) is not None:
        return f"it has no {name}, unlike {kind.LIBRARY}'s {kind.NAME}"
    for name in ("forward", *kind.OVERRIDES, *kind.KEPT):
        if name in vars(module):
            return f"its {name} was replaced on the instance"
        if not same_method(getattr(type(module), name), getattr(library, name)):
            return f"its class overrides {name}"
        if getattr(library, name).__module__ != library.__module__:
            return f"{name} of {library.__name__} was replaced in the library"
    for path, arguments, names in kind.CODE:
        if (reason := why_unknown(module, path, arguments, names)) is not None:
            return f"{reason}, unlike that of {kind.LIBRARY}'s {kind.NAME}"
    return kind.why_left(module)


def same_method(f: Any, g: Any) -> bool:
    """Transformers wraps the ``forward`` of every subclass of its layers, overridden or not."""
    return f is g or (getattr(f, "__code__", f) is getattr(g, "__code__", g) and inspect.unwrap(f) is inspect.unwrap(g))


def why_unknown(module: nn.Module, path: str, arguments: str, names: str) -> str | None:
    """Why a method is not the published one, by its arguments and the names that it uses; None where it may be.

    Vendored files are changed: a scale on a residual has to be seen, for the override would not have it. ``path`` may
    also name a function of the file that ``forward`` is in; its first argument is no more compared than ``self`` is.
    """
    owner, _, name = path.rpartition(".")
    cls: Any = type(operator.attrgetter(owner)(module) if owner else module)
    method = getattr(cls, name, None) or inspect.unwrap(cls.forward).__globals__.get(name)
    if method is None:
        return f"it has no {path}"
    f = inspect.unwrap(method)
    if (decorator := decorated(method)) is not None:
        return f"its {path} is decorated with {decorator}"
    taken = list(inspect.signature(f).parameters)[1:]
    if taken != [x.rstrip("?") for x in arguments.split() if not x.endswith("?") or x[:-1] in taken]:
        return f"its {path} takes {', '.join(inspect.signature(f).parameters)}"
    unknown = sorted(names_in(f.__code__) - set(names.split()))
    return f"its {path} uses {', '.join(unknown)}" if unknown else None


def decorated(f: Any) -> str | None:
    """A function that is around a method of a copy, as ``torch.no_grad()`` would be; not one that a library adds."""
    while hasattr(f, "__wrapped__"):
        home = f.__globals__["__name__"]
        if home.partition(".")[0] not in PACKAGES:
            return str(home)
        f = f.__wrapped__
    return None


def names_in(code: types.CodeType) -> set[str]:
    """Globals and attributes."""
    nested = [names_in(x) for x in code.co_consts if isinstance(x, types.CodeType)]
    return set(code.co_names).union(*nested)


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
