"""``patch`` and its reverse."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from swinops.backends import check_name
from swinops.text import aligned

if TYPE_CHECKING:
    from swinops.dropin.swap import Swapped

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Row:
    """What ``patch`` does to one module.

    ``action`` is "replace", "replaced" where that was done before, or "leave". ``reason`` says why a module is left,
    or why one that is replaced would run its library's own forward in its present state, or raise.
    """

    path: str
    class_name: str
    library: str
    action: str
    reason: str


class Table(list[Row]):
    """Rows that print as a table."""

    def __str__(self) -> str:
        cells = [("path", "class", "library", "action", "reason"), *map(astuple, self)]
        return "\n".join([*aligned(cells), *([] if self else ["(no module that swinops knows)"])])

    __repr__ = __str__


def patch(model: M, backend: str = "auto") -> M:
    """Run the window attention of ``model`` on this package's ops: the same parameters, the same numbers.

    The instances that ``explain`` lists get another class; parameters, buffers and submodules stay what and where they
    are. Where no kernel can run (a CPU, float64, an old GPU), and where the op would bypass what was added to a module
    (hooks, attention dropout in training), the library's own forward runs, with one warning per reason. A second
    derivative through a replaced module raises: ``unpatch`` first.

    Args:
        model: A module, or a wrapper of it (DDP, FSDP). If it is patched already, it takes the new backend.
        backend: "auto", or one of ``swinops.backends.MODULES``, which then runs or raises with the reasons.

    Returns:
        ``model``

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: There is no such backend.
    """
    check_name(backend)
    table = Table()
    for row, module, cls in plan(model, backend):
        table.append(row)
        if cls is not None:
            module.__class__ = cls
            vars(module)["swinops_backend"] = backend
    left = Table(row for row in table if row.action == "leave")
    if len(left) == len(table):
        warnings.warn(f"swinops.patch found nothing to replace in {type(model).__name__}:\n{table}", stacklevel=2)
    elif left:
        warnings.warn(f"swinops.patch left {len(left)} of {len(table)} modules as they were:\n{left}", stacklevel=2)
    return model


def unpatch(model: M) -> M:
    """Give every module of ``model`` the class it had before ``patch``.

    Raises:
        RuntimeError: a module was given yet another class after ``patch``, as FSDP's ``fully_shard`` does.
    """
    modules = swapped_modules(model)
    for module in modules:
        if not module.is_last_swap():
            raise RuntimeError(f"a module got the class {type(module).__name__} after swinops.patch; undo that first")
    for module in modules:
        restore(module)
    return model


@contextmanager
def patched(model: M, backend: str = "auto") -> Iterator[M]:
    """``patch`` within a ``with`` block; what was patched before stays so, with its backend."""
    before = {module: module.swinops_backend for module in swapped_modules(model)}
    try:
        yield patch(model, backend)
    finally:
        for module in swapped_modules(model):
            if module in before:
                module.swinops_backend = before[module]
            else:
                restore(module)


def restore(module: "Swapped") -> None:
    module.__class__ = module.original  # type: ignore[assignment]
    del vars(module)["swinops_backend"]


def explain(model: nn.Module, backend: str = "auto") -> Table:
    """The table that ``patch`` would act on, with nothing touched."""
    return Table(row for row, _, _ in plan(model, backend))


def plan(model: nn.Module, backend: str) -> list[tuple[Row, nn.Module, "type[Swapped] | None"]]:
    """For each module that a library's file recognises: its row, and the class to give it if it is to be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    # here, because torch.compiler imports torch._dynamo, and importing swinops should cost nothing
    from swinops.dropin import swap
    from swinops.dropin.libraries import SWAPS

    found: list[tuple[Row, nn.Module, type[Swapped] | None]] = []
    companions, unlike = [], []
    for path, module in model.named_modules():
        cls: type[Swapped] | None = None
        reason: str | None
        if isinstance(module, swap.Swapped):
            kind, cls, action = swap.kind_of(module), type(module), "replaced"
            reason = state(kind, module, module.swinops_backend)
        elif (entry := swap.recognised(SWAPS, module)) is None:
            continue
        else:
            kind, action = entry[0], "leave"
            try:
                reason = swap.why_left(*entry, module)
                if reason is None:
                    reason = state(kind, module, backend)
                    cls, action = swap.swapped_class(kind, type(module)), "replace"
            except Exception as error:  # what has the names of a library may hold anything
                reason = f"it cannot be looked at ({type(error).__name__}: {error})"
            if swap.missing(kind, module) is not None:
                unlike.append(module)
        row = Row(path or "(itself)", type(module).__name__, kind.LIBRARY, action, reason)
        found.append((row, module, cls))
        if kind.COMPANION:
            companions.append(row)
    if all(cls is None or row in companions for row, _, cls in found):
        found = [entry for entry in found if entry[0] not in companions]
    # what is inside of a module that only has the name tells more: the attention of a copied torchvision block
    paths = [row.path for row, _, _ in found]
    return [entry for entry in found if entry[1] not in unlike or not inside(entry[0].path, paths)]


def inside(path: str, paths: list[str]) -> bool:
    """One of ``paths`` is of a submodule of that at ``path``."""
    return any(path == "(itself)" != other or other.startswith(f"{path}.") for other in paths)


def state(kind: "type[Swapped]", module: nn.Module, backend: str) -> str:
    """What keeps a replaced module from running the op; "" where nothing does."""
    from swinops.dropin.swap import why_raises

    if (reason := kind.why_own(module, backend)) is not None:
        return f"own forward for now: {reason}"
    reason = why_raises(kind.calls(module), backend)
    return "" if reason is None else f"raises: {reason}"


def swapped_modules(model: nn.Module) -> "list[Swapped]":
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    from swinops.dropin.swap import Swapped

    return [module for module in model.modules() if isinstance(module, Swapped)]
