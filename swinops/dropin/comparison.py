"""``check``: does a model compute patched what it computes unpatched?"""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swinops.dropin.patching import patch, swapped_modules, unpatch
from swinops.text import aligned

Results = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Comparison:
    """The largest errors among the outputs, the gradient of the input, or the gradients of the parameters.

    An error is the largest difference from the unpatched model in float64, relative to the tensor's largest value.
    ``patched`` is that of ``tensor``, the worst one; ``original`` is the unpatched model's in the same dtype, the worst
    of three: for this input, and for two that are off by the last bit. Where that is not finite (Swin V2 with pads in
    float16), it is enough that ``patched`` is.
    """

    dtype: torch.dtype
    quantity: str
    tensor: str
    patched: float
    original: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.patched <= self.allowed and self.patched < float("inf")


@dataclass(frozen=True)
class Report:
    """What ``check`` found; prints as a table."""

    rows: list[Comparison]
    ran: list[str]  # in words, what the patched model ran in each dtype

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("dtype", "quantity", "patched", "original", "allowed", "", "worst")]
        for row in self.rows:
            errors = (f"{error:.1e}" for error in (row.patched, row.original, row.allowed))
            verdict = "ok" if row.ok else "WRONG"
            cells.append((str(row.dtype).removeprefix("torch."), row.quantity, *errors, verdict, row.tensor))
        title = "largest errors against the unpatched model in float64, relative to a tensor's largest value"
        return "\n".join([title, *aligned(cells), *self.ran])

    __repr__ = __str__


def check(model: nn.Module, x: Tensor, backend: str = "auto") -> Report:
    """Compare ``model`` patched with ``model`` unpatched: outputs, and gradients of the input and of every parameter.

    The truth is the unpatched model in float64, where no kernel computes: the patched model runs the reference there,
    which shows that the op is this model's formula (padding, shift, mask, bias), down to rounding. In the model's own
    dtype the patched model runs ``backend``, and may err twice as much as the unpatched one does in that dtype. Where
    no kernel runs here, "auto" means the reference there too, and the report says so.

    Copies of the model are compared, in evaluation mode: ``model``, ``x`` and the random state stay as they are.

    Args:
        model: Patched or not; takes one tensor, and returns tensors, in lists, tuples or dicts. Its parameters should
            be trained or random: whatever a zero norm or a zero table hides is not compared.
        x: Input.
        backend: As in ``patch``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
    x = x.detach().to(dtype)
    rows, ran = [], []
    exact = run(model, x, torch.float64, None)[0]
    for case, chosen in [(torch.float64, "reference")] + [(dtype, backend)] * (dtype != torch.float64):
        plain = [exact] if case == torch.float64 else [run(model, near, case, None)[0] for near in neighbours(x)]
        actual, what = run(model, x, case, chosen)
        ran.append(f"{str(case).removeprefix('torch.')}: {what}")
        for quantity in exact:
            originals = [results[quantity] for results in plain]
            rows.append(compare(case, quantity, actual[quantity], originals, exact[quantity]))
    return Report(rows, ran)


def neighbours(x: Tensor) -> Iterator[Tensor]:
    """``x``, and twice with a last bit up or down: the largest error of one run alone is a matter of luck."""
    yield x
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        up = torch.randint(2, x.shape, generator=generator).to(x.device)
        yield torch.where(up == 1, x * (1 + torch.finfo(x.dtype).eps), x * (1 - torch.finfo(x.dtype).eps))


def compare(
    dtype: torch.dtype,
    quantity: str,
    actual: dict[str, Tensor],
    originals: list[dict[str, Tensor]],
    exact: dict[str, Tensor],
) -> Comparison:
    sizes = {name: largest(x) for name, x in exact.items()}
    top = max(sizes.values(), default=0.0) or 1.0
    # a gradient that is nothing but rounding, as that of a bias which softmax takes out, has no relative error; and in
    # fewer digits than float64 that of a small one, as of Swin V2's two or three logit_scale, is a matter of luck
    small = 1e-6 if dtype == torch.float64 else 1e-2
    sizes = {name: max(size, small * top) if size > 1e-9 * top else top for name, size in sizes.items()}

    def errors(of: dict[str, Tensor]) -> dict[str, float]:
        found = {name: largest(of[name].double() - x) / sizes[name] for name, x in exact.items()}
        return {name: float("inf") if math.isnan(error) else error for name, error in found.items()}

    patched = errors(actual)
    worst = max(patched, key=patched.__getitem__)
    error = max(max(errors(original).values()) for original in originals)
    # in float64 the two differ by rounding, and by constants that some libraries keep in float32 even there: ln 100,
    # which cosines are multiplied by the exponential of, is off by 2^-24 of 4.6; a wrong formula differs by far more
    allowed = 2.0**-15 if dtype == torch.float64 else 2 * error + torch.finfo(dtype).eps
    return Comparison(dtype, quantity, worst, patched[worst], error, allowed)


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def run(model: nn.Module, x: Tensor, dtype: torch.dtype, backend: str | None) -> tuple[Results, str]:
    """Outputs and gradients of a copy of ``model`` in ``dtype``, unpatched if ``backend`` is None; and what it ran."""
    model = copy.deepcopy(model).to(dtype)
    if backend is None:
        unpatch(model)
    model.eval()  # which some backbones have return None
    model.zero_grad(set_to_none=True)
    parameters = {name: p.requires_grad_() for name, p in model.named_parameters() if p.is_floating_point()}
    ran = "" if backend is None else patch_to_compare(model, backend)
    x = x.to(dtype, copy=True).requires_grad_()
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        outputs = dict(flatten("out", model(x)))
        generator = torch.Generator().manual_seed(0)
        douts = [torch.randn(y.shape, generator=generator).to(y) for y in outputs.values()]
        torch.autograd.backward(list(outputs.values()), douts)
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    dx = torch.zeros_like(x) if x.grad is None else x.grad
    results = {"outputs": {name: y.detach() for name, y in outputs.items()}, "input gradient": {"x": dx}}
    return {**results, "parameter gradients": gradients}, ran


def patch_to_compare(model: nn.Module, backend: str) -> str:
    """Patch a copy, with the reference where "auto" would run the library's own forward; in words, what will run."""
    from swinops.dropin.swap import kernel

    patch(model, backend)
    counts: Counter[str] = Counter()
    for module in swapped_modules(model):
        reason = module.why_own(module, module.swinops_backend)
        if reason is not None and module.why_own(module, "reference") is None:
            module.swinops_backend = "reference"
            counts[f"the reference, because {reason}"] += 1
        elif reason is not None:
            counts[f"the library's own forward, because {reason}"] += 1
        elif module.calls(module):
            counts[kernel(*module.calls(module)[0])[0] if backend == "auto" else backend] += 1
    return "; ".join(f"{count} modules ran {what}" for what, count in counts.items()) or "nothing was replaced"


def flatten(name: str, outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """Every differentiable tensor in lists, tuples and dicts, by name."""
    if isinstance(outputs, Tensor):
        if outputs.requires_grad:
            yield name, outputs
    elif isinstance(outputs, (list, tuple)):
        for i, y in enumerate(outputs):
            yield from flatten(f"{name}[{i}]", y)
    elif isinstance(outputs, dict):
        for key, y in outputs.items():
            yield from flatten(f"{name}[{key!r}]", y)
