"""timm's Swin, as it is and after ``swinops.patch``, and this package's own model with the same parameters: speed."""

import copy
import functools
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swinops
from swinops.benchmarks.harness import (
    OUT_OF_MEMORY,
    Contender,
    Outcome,
    Results,
    Settings,
    compare,
    machine,
    number,
    out_of_memory,
    reason,
    shown,
    table,
    with_range,
)
from swinops.published import import_library
from swinops.testing import Expected, accuracy

SMALL = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")  # what a CPU is measured on
MODELS = (*SMALL, "swinv2_base_window16_256")
CUT = {"embed_dim": 32, "depths": (2, 1), "num_heads": (2, 4), "window_size": 7, "num_classes": 100}  # for --quick
MODULES = ("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr")  # of timm
TIMM = "timm"
CHUNK = 16  # images at a time in float64, whose scores are large
MODES = {"infer": "inference", "train": "training step"}
WEIGHTS = {"infer": 4, "train": 8}  # in the progress bar


class Precision(NamedTuple):
    name: str  # in the rows
    dtype: torch.dtype  # of parameters and images
    autocast: torch.dtype | None = None

    def context(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None)


PRECISIONS = {
    "float32": Precision("float32", torch.float32),
    "bfloat16": Precision("bfloat16", torch.bfloat16),
    "float16": Precision("float16", torch.float16),
    "amp": Precision("amp_bfloat16", torch.float32, torch.bfloat16),
    "tf32": Precision("tf32", torch.float32),
}


Build = Callable[[nn.Module], tuple[Callable[[], Any], Callable[[], Results]]]


@dataclass
class Subject:
    """A model to be timed, and how."""

    name: str  # in the rows
    model: nn.Module  # timm's
    ours: Callable[[], nn.Module] | None  # makes this package's, with the parameters of timm's
    batch: int
    precisions: dict[str, Precision]  # for each of MODES that is measured
    channels_last: bool = False
    compiled: bool = True  # also under torch.compile

    @property
    def img_size(self) -> tuple[int, int]:
        height, width = self.model.patch_embed.img_size
        return height, width

    def place(self, x: Any, mode: str, settings: Settings) -> Any:
        """A model or images, where and as they are timed."""
        options = {"memory_format": torch.channels_last} if self.channels_last else {}
        return x.to(device=settings.device, dtype=self.precisions[mode].dtype, **options)

    def images(self, batch: int, mode: str, settings: Settings) -> Tensor:
        x = torch.randn(batch, 3, *self.img_size, generator=torch.Generator().manual_seed(0))
        return self.place(x, mode, settings)

    def contenders(self, mode: str, model: nn.Module, build: Build, settings: Settings) -> list[Contender]:
        """``build`` is called with copies of ``model``, with what replaces it, and with each of them compiled."""

        def ours() -> nn.Module:
            own = self.place(self.ours(), mode, settings).train(model.training)
            own.load_state_dict(model.state_dict())
            return own

        makers = {TIMM: lambda: copy.deepcopy(model), "patched": lambda: swinops.patch(copy.deepcopy(model))}
        if self.ours is not None:
            makers["swinops"] = ours
        found = []
        for name, make in makers.items():
            found.append(Contender(name, lambda make=make: build(make())))
            if self.compiled:
                compiled = Contender(
                    f"{name}-compiled", lambda make=make: build(settings.compile(make())), settings.compiled
                )
                found.append(compiled)
        return found


def create(name: str, img_size: int, checkpoint: str | None = None, **options: Any) -> nn.Module:
    """A Swin of timm's in evaluation mode, its parameters from ``checkpoint`` or all random.

    Stochastic depth is off: two training steps can then be compared.

    Raises:
        ValueError: there is no such Swin, it takes no such size, or the checkpoint cannot be loaded.
    """
    timm = import_library("timm")
    known = [model for module in MODULES for model in timm.list_models(module=module)]
    if name.partition(".")[0] not in known:
        raise ValueError(f"--model must be one of timm's Swin models ({known[0]}, ...), got {name!r}")
    try:
        model = timm.create_model(name, img_size=img_size, pretrained=False, drop_path_rate=0.0, **options).eval()
    except (AssertionError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--img-size {img_size} does not fit {name}: {error}") from error
    patch = model.patch_embed.patch_size[0]
    if img_size % patch != 0:
        raise ValueError(f"--img-size {img_size} does not fit {name}: it must be a multiple of the patch size {patch}")
    if checkpoint is None:
        return randomise(model)
    try:
        filter_fn = sys.modules[type(model).__module__].checkpoint_filter_fn
        timm.models.load_checkpoint(model, checkpoint, filter_fn=filter_fn, weights_only=True)
    except Exception as error:  # unpickling raises anything
        raise ValueError(f"--checkpoint {checkpoint} cannot be loaded into {name}: {reason(error)}") from error
    return model


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter at random, norms, bias tables and head too: at first little depends on the attention.

    Scales of cosine attention are around 10, where training starts, and some are clamped.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("relative_position_bias_table"):
            value = noise
        elif name.endswith("logit_scale"):
            value = noise + 2.3
        elif parameter.dim() > 1:
            value = noise * parameter[0].numel() ** -0.5
        else:
            value = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
        parameter.data.copy_(value)
    return model


def own_model(name: str, **options: Any) -> Callable[[], nn.Module] | None:
    """What makes this package's model of that name; None where it has none."""
    name = name.partition(".")[0]
    if name not in swinops.list_models():
        return None
    return functools.partial(swinops.create_model, name, drop_path_rate=0.0, pad_order="roll_pad", **options)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that timm's own forward runs: the benchmark says so itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def expected_of(plain: Tensor, exact: Tensor) -> Expected:
    return Expected(plain, exact, accuracy(plain, plain, exact).bound)


def inference(subject: Subject, batch: int, settings: Settings) -> dict[str, Outcome]:
    model = subject.place(copy.deepcopy(subject.model), "infer", settings)
    x = subject.images(batch, "infer", settings)
    precision = subject.precisions["infer"]

    def build(own: nn.Module) -> tuple[Callable[[], Any], Callable[[], Results]]:
        @torch.no_grad()
        def run() -> Tensor:
            with precision.context(x.device):
                return own(x)

        return run, lambda: {"logits": run().clone()}

    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        ideal = torch.cat([exact(part.double()) for part in x.split(CHUNK)])
        del exact
    expected = {"logits": expected_of(build(model)[0](), ideal)}
    contenders = subject.contenders("infer", model, build, settings)
    return compare(contenders, expected, settings, MODES["infer"], TIMM, WEIGHTS["infer"], needs_all=batch > 1)


def training(subject: Subject, batch: int, settings: Settings) -> dict[str, Outcome]:
    """A step is forward, loss, backward and AdamW."""
    model = subject.place(copy.deepcopy(subject.model), "train", settings).train()
    x = subject.images(batch, "train", settings)
    labels = torch.arange(len(x), device=x.device) % model.num_classes
    precision = subject.precisions["train"]
    names = [name for name, _ in model.named_parameters()]

    def gradients(own: nn.Module) -> list[Tensor]:
        found = {name.removeprefix("_orig_mod."): parameter.grad for name, parameter in own.named_parameters()}
        return [found[name].double() for name in names]

    exact = copy.deepcopy(model).double()
    for part, answers in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
        (F.cross_entropy(exact(part.double()), answers, reduction="sum") / len(x)).backward()
    ideal = gradients(exact)
    scales = [g.abs().max().clamp_min(1e-30) for g in ideal]
    del exact

    def flat(parts: list[Tensor]) -> Tensor:
        """Every gradient by its own largest value, so that small ones count."""
        return torch.cat([(g / scale).flatten() for g, scale in zip(parts, scales, strict=True)])

    def backward(own: nn.Module) -> None:
        own.zero_grad()
        with precision.context(x.device):
            loss = F.cross_entropy(own(x), labels)
        loss.backward()

    backward(model)
    expected = {"gradients": expected_of(flat(gradients(model)).float(), flat(ideal))}
    model.zero_grad()

    def build(own: nn.Module) -> tuple[Callable[[], Any], Callable[[], Results]]:
        optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6, fused=True)

        def run() -> None:
            backward(own)
            optimizer.step()

        def results() -> Results:
            backward(own)
            return {"gradients": flat(gradients(own)).float()}

        return run, results

    contenders = subject.contenders("train", model, build, settings)
    return compare(contenders, expected, settings, MODES["train"], TIMM, WEIGHTS["train"], needs_all=batch > 1)


def halving(
    attempt: Callable[[int], dict[str, Outcome]], batch: int, title: str, weight: float, settings: Settings
) -> tuple[dict[str, Outcome], int]:
    """The outcomes of ``attempt(batch)`` and the batch, which is halved for all while one of them is out of memory."""
    start = settings.bar.n
    while True:
        try:
            outcomes = attempt(batch)
        except Exception as error:  # what the implementations are compared with
            if not out_of_memory(error):
                raise
            outcomes = {TIMM: Outcome(reason(error))}
            settings.clock.recover()
        hungry = [name for name, outcome in outcomes.items() if outcome.status == OUT_OF_MEMORY]
        if batch == 1 or not hungry:
            settings.bar.update(start + weight - settings.bar.n)
            return outcomes, batch
        settings.say(f"\n{title}: {hungry[0]} is out of memory at batch {batch}, all go on with {batch // 2}")
        settings.bar.update(start - settings.bar.n)
        batch //= 2


class Timed(NamedTuple):
    outcomes: dict[str, Outcome]
    batch: int


def measure(subject: Subject, settings: Settings) -> list[dict[str, Any]]:
    """A row for each implementation, printed after all of them have run."""
    timed = {}
    for mode in subject.precisions:
        attempt = functools.partial({"infer": inference, "train": training}[mode], subject, settings=settings)
        with quiet():
            timed[mode] = Timed(*halving(attempt, subject.batch, MODES[mode], WEIGHTS[mode], settings))
    rows = model_rows(subject, timed, settings)
    for mode, (_, batch) in timed.items():
        title = f"{subject.name}, batch {batch}, {MODES[mode]}, {subject.precisions[mode].name}"
        settings.say(f"\n{title}{', channels last' * subject.channels_last}")
        settings.say(table([model_cells(row, mode) for row in rows]))
    if settings.device.type == "cpu":
        settings.say("  on a CPU a patched model runs timm's own forward: the two should be the same")
    if subject.ours is None:
        settings.say("  swinops: this package has no model of that name")
    elif settings.device.type == "cpu":
        settings.say("  swinops: on a CPU this package's model runs the reference of each op, in plain PyTorch")
    return rows


def model_rows(subject: Subject, timed: Mapping[str, Timed], settings: Settings) -> list[dict[str, Any]]:
    """A row for each implementation, in timm's benchmark columns."""
    rows = []
    for impl in dict.fromkeys(itertools.chain(*(outcomes for outcomes, _ in timed.values()))):
        row: dict[str, Any] = {"model": subject.name}
        compiled, precision = "", ""
        for mode in MODES:
            outcomes, batch = timed.get(mode, Timed({}, 0))
            outcome = outcomes.get(impl, Outcome(""))
            step, ratio = outcome.time, outcome.ratio
            dtype = subject.precisions[mode].name if mode in timed else ""
            row |= {
                f"{mode}_samples_per_sec": step and number(batch / step.median),
                f"{mode}_step_time": step and number(step.median * 1e3),
                f"{mode}_step_time_p20": step and number(step.p20 * 1e3),
                f"{mode}_step_time_p80": step and number(step.p80 * 1e3),
                f"{mode}_ratio": ratio and number(ratio.median),
                f"{mode}_ratio_p20": ratio and number(ratio.p20),
                f"{mode}_ratio_p80": ratio and number(ratio.p80),
                f"{mode}_batch_size": batch or None,
                f"{mode}_img_size": subject.img_size[0] if batch else None,
                f"{mode}_dtype": dtype,
                f"{mode}_status": outcome.status,
                f"{mode}_peak_mem_mb": number(outcome.peak),
            }
            compiled, precision = compiled or outcome.compile, precision or dtype
        row["peak_mem_mb"] = row["infer_peak_mem_mb"]
        row["param_count"] = round(sum(p.numel() for p in subject.model.parameters()) / 1e6, 2)
        row |= {"impl": impl, "baseline": TIMM, "dtype": precision, "compile": compiled}
        row["channels_last"] = subject.channels_last
        rows.append(row | machine(settings.device))
    return rows


def model_cells(row: Mapping[str, Any], mode: str) -> dict[str, str]:
    return {
        "": row["impl"],
        "images/s": shown(row[f"{mode}_samples_per_sec"], "{:.1f}", row[f"{mode}_status"]),
        "ms a step": shown(row[f"{mode}_step_time"], "{:.1f}"),
        "20-80%": f"{row[f'{mode}_step_time_p20']:.1f}-{row[f'{mode}_step_time_p80']:.1f}"
        if row[f"{mode}_step_time"]
        else "",
        "times timm": with_range(row, f"{mode}_ratio"),
        "peak MB": shown(row[f"{mode}_peak_mem_mb"], "{:.0f}"),
    }
