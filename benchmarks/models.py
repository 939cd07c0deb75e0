"""timm's Swin before and after ``swinops.patch``: its logits for a photograph, and its speed."""

import copy
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swinops
from swinops import backends
from swinops.benchmarks.harness import (
    Contender,
    Outcome,
    Results,
    Settings,
    compare,
    dtype_name,
    machine,
    number,
    shown,
    table,
    why_not_timed,
    with_range,
)
from swinops.testing import accuracy

PHOTOGRAPH = Path(__file__).with_name("chelsea.png")
MODEL = "swin_tiny_patch4_window7_224"
CUT = {"embed_dim": 32, "depths": (2, 1), "num_heads": (2, 4), "num_classes": 100}  # for --quick
TIMM = "timm"
CHUNK = 16  # images at a time in float64, whose scores are large


def import_timm() -> ModuleType:
    """timm, also beside a CPU torch whose torchvision was compiled for CUDA and cannot be imported otherwise."""
    spec = importlib.util.find_spec("torchvision")
    defined = hasattr(torch.ops.torchvision, "nms")
    if torch.version.cuda is None and not defined and spec is not None and spec.origin is not None:
        try:
            torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
        except OSError:
            global torchvision_ops  # the definitions last as long as the library object
            torchvision_ops = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                torchvision_ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


def create(name: str, img_size: int, checkpoint: str | None = None, **options: Any) -> nn.Module:
    """A Swin of timm's in evaluation mode, its parameters from ``checkpoint`` or all random.

    Stochastic depth is off: two training steps can then be compared.

    Raises:
        ValueError: there is no such Swin, it takes no such size, or the checkpoint cannot be loaded.
    """
    timm = import_timm()
    known = timm.list_models(module="swin_transformer")
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
        filter_fn = timm.models.swin_transformer.checkpoint_filter_fn
        timm.models.load_checkpoint(model, checkpoint, filter_fn=filter_fn, weights_only=True)
    except Exception as error:  # unpickling raises anything
        raise ValueError(f"--checkpoint {checkpoint} cannot be loaded into {name}: {error}") from error
    return model


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter at random, norms, bias tables and head too: at first little depends on the attention."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("relative_position_bias_table"):
            value = noise
        elif parameter.dim() > 1:
            value = noise * parameter[0].numel() ** -0.5
        else:
            value = 0.2 * noise + (1.0 if name.endswith("weight") else 0.0)
        parameter.data.copy_(value)
    return model


def photograph(height: int, width: int) -> Tensor:
    """The photograph cut to the aspect ratio around its centre, resized and normalised as for ImageNet. [1, 3, H, W]"""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(PHOTOGRAPH) as image:
        pixels = np.array(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC))
    x = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return ((x - mean) / std)[None]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that timm's own forward runs: the benchmark says so itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def logits_on_photograph(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, Any]:
    """The logits of ``model`` before and after ``patch``, for each backend, against float64."""
    before = model(x)
    exact = copy.deepcopy(model).double()(x.double())
    without = copy.deepcopy(model)
    for name, parameter in without.named_parameters():
        if name.endswith("relative_position_bias_table"):
            parameter.zero_()
    rows = []
    for name in names:
        with quiet(), swinops.patched(copy.deepcopy(model), backend=name) as patched:
            reasons = {row.reason for row in swinops.explain(patched, backend=name) if "own forward" in row.reason}
            after = patched(x)
        exactness = accuracy(after, before, exact)
        rows.append(
            {
                "backend": name,
                "difference": float((after - before).abs().max()),
                "relative": float((after - before).abs().max() / exact.abs().max()),
                "error": exactness.error,
                "ok": exactness.ok,
                "top5": len(set(after[0].topk(5).indices.tolist()) & set(before[0].topk(5).indices.tolist())),
                "note": "; ".join(reasons),
            }
        )
    return {
        "largest": float(exact.abs().max()),
        "error": float((before - exact).abs().max()),
        "bias": float((without(x) - before).abs().max()),
        "top5": exact[0].topk(5).indices.tolist(),
        "rows": rows,
    }


def describe(found: Mapping[str, Any], random: bool) -> str:
    lines = ["every parameter is random (seed 0): nothing is downloaded, and the logits mean nothing"] if random else []
    lines += [
        f"largest logit {found['largest']:.3g}; without the position bias the logits move by {found['bias']:.2g}",
        f"timm's own error against float64: {found['error']:.2g}",
    ]
    cells = [
        {
            "patch": row["backend"],
            "largest difference": f"{row['difference']:.2g}",
            "of the largest logit": f"{row['relative']:.2g}",
            "error against float64": f"{row['error']:.2g}" + ("" if row["ok"] else "  WRONG"),
            "top 5 that agree": f"{row['top5']} of 5",
        }
        for row in found["rows"]
    ]
    lines = [f"  {line}" for line in lines] + [table(cells)]
    return "\n".join(lines + [f"  {row['backend']}: {row['note']}" for row in found["rows"] if row["note"]])


def demonstrate(model: nn.Module, title: str, random: bool, settings: Settings) -> bool:
    """Print how far ``patch`` moves the logits of the photograph; False where that is too far."""
    height, width = model.patch_embed.img_size
    model = copy.deepcopy(model).to(settings.device, settings.dtype)
    x = photograph(height, width).to(settings.device, settings.dtype)
    runs = [name for name in backends.MODULES if why_not_timed(name, x, "window_attention") is None]
    settings.bar.set_description("a photograph, before and after patch")
    found = logits_on_photograph(model, x, ["auto", *runs])
    settings.bar.update(1)
    settings.say(f"\n{PHOTOGRAPH.name} through {title}, {height} x {width}, {dtype_name(settings.dtype)}")
    settings.say(describe(found, random))
    return all(row["ok"] for row in found["rows"])


def demonstrate_interpreted(settings: Settings) -> bool:
    """The same on a CPU with the Triton kernels in their interpreter, in a process that starts with it."""
    if importlib.util.find_spec("triton") is None:
        settings.bar.update(1)
        settings.say("\nTriton is not installed: its kernels are not interpreted")
        return True
    settings.bar.set_description("the Triton kernels, interpreted")
    command = [sys.executable, "-c", "from swinops.benchmarks import models; models.interpreted()"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    settings.bar.update(1)
    settings.say(f"\n{PHOTOGRAPH.name} through a small Swin that pads, its Triton kernels interpreted, float32")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        settings.say(f"  cannot run: {lines[-1] if lines else f'exit status {done.returncode}'}")
        return False
    found = json.loads(done.stdout.splitlines()[-1])
    settings.say(describe(found, random=True))
    settings.say(f"  the attention kernels were launched {found['launches']} times, in {found['seconds']:.1f} s")
    return all(row["ok"] for row in found["rows"]) and found["launches"] > 0


def interpreted() -> None:
    """Print as JSON what ``logits_on_photograph`` finds for Triton, and how often its attention was called."""
    import_timm()
    from timm.models.swin_transformer import SwinTransformer

    from swinops import kernels

    # 18 x 13 tokens, then 9 x 7: windows of 7 pad both
    size = (72, 52)
    model = SwinTransformer(img_size=size, embed_dim=32, depths=(2, 2), num_heads=(2, 4), num_classes=100).eval()
    launches = 0
    attention = kernels.window_attention

    @functools.wraps(attention)
    def counted(*arguments: Any) -> Any:
        nonlocal launches
        launches += 1
        return attention(*arguments)

    kernels.window_attention = counted
    start = time.perf_counter()
    found = logits_on_photograph(randomise(model), photograph(*size), ["triton"])
    print(json.dumps({**found, "launches": launches, "seconds": time.perf_counter() - start}))


def contestants(model: nn.Module, settings: Settings) -> dict[str, tuple[Callable[[], nn.Module], str]]:
    """What makes each copy of the model, and how it is compiled."""

    def make(patch: bool, compiled: bool) -> nn.Module:
        own = copy.deepcopy(model)
        if patch:
            swinops.patch(own)
        return settings.compile(own) if compiled else own

    mode = settings.compiled
    return {
        TIMM: (functools.partial(make, False, False), ""),
        f"{TIMM}-compiled": (functools.partial(make, False, True), mode),
        "patched": (functools.partial(make, True, False), ""),
        "patched-compiled": (functools.partial(make, True, True), mode),
    }


def inference(model: nn.Module, x: Tensor, settings: Settings) -> dict[str, Outcome]:
    model = copy.deepcopy(model).to(settings.device, settings.dtype)
    x = x.to(settings.device, settings.dtype)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        expected = {"logits": (model(x), torch.cat([exact(part.double()) for part in x.split(CHUNK)]))}
        del exact

    def build(make: Callable[[], nn.Module]) -> tuple[Callable[[], Any], Callable[[], Results]]:
        own = make()

        @torch.no_grad()
        def run() -> Tensor:
            return own(x)

        return run, lambda: {"logits": run().clone()}

    contenders = [
        Contender(name, functools.partial(build, make), compiled)
        for name, (make, compiled) in contestants(model, settings).items()
    ]
    with quiet():
        return compare(contenders, expected, settings, "inference", TIMM, weight=4)


def training(model: nn.Module, x: Tensor, settings: Settings) -> dict[str, Outcome]:
    """A step is forward, loss, backward and AdamW. On a GPU the parameters are float32, under autocast."""
    model = copy.deepcopy(model).to(settings.device).train()
    x = x.to(settings.device)
    labels = torch.arange(len(x), device=x.device) % model.num_classes
    autocast = functools.partial(
        torch.autocast, x.device.type, dtype=settings.dtype, enabled=settings.dtype != torch.float32
    )

    def gradients(own: nn.Module) -> list[Tensor]:
        return [parameter.grad.double() for parameter in own.parameters()]

    exact = copy.deepcopy(model).double()
    for part, answers in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
        (F.cross_entropy(exact(part.double()), answers, reduction="sum") / len(x)).backward()
    ideal = gradients(exact)
    scales = [g.abs().max().clamp_min(1e-30) for g in ideal]
    del exact

    def flat(parts: list[Tensor]) -> Tensor:
        """Every gradient by its own largest value, so that small ones count."""
        return torch.cat([(g / scale).flatten() for g, scale in zip(parts, scales, strict=True)])

    def backward(own: nn.Module, call: Callable[..., Tensor]) -> None:
        own.zero_grad()
        with autocast():
            loss = F.cross_entropy(call(x), labels)
        loss.backward()

    backward(model, model)
    expected = {"gradients": (flat(gradients(model)).float(), flat(ideal))}
    model.zero_grad()

    def build(make: Callable[[], nn.Module]) -> tuple[Callable[[], Any], Callable[[], Results]]:
        own = make()
        optimizer = torch.optim.AdamW(own.parameters(), lr=1e-6, fused=True)

        def run() -> None:
            backward(own, own)
            optimizer.step()

        def results() -> Results:
            backward(own, own)
            return {"gradients": flat(gradients(own)).float()}

        return run, results

    contenders = [
        Contender(name, functools.partial(build, make), compiled)
        for name, (make, compiled) in contestants(model, settings).items()
    ]
    with quiet():
        return compare(contenders, expected, settings, "training step", TIMM, weight=8)


def model_rows(
    name: str,
    model: nn.Module,
    batch: int,
    results: Mapping[str, tuple[dict[str, Outcome], str]],
    settings: Settings,
) -> list[dict[str, Any]]:
    """A row for each implementation, in timm's benchmark columns; ``results`` has outcomes and dtype of each mode."""
    size = model.patch_embed.img_size[0]
    rows = []
    for impl in results["infer"][0]:
        row: dict[str, Any] = {"model": name}
        for mode in ("infer", "train"):
            outcomes, dtype = results.get(mode, ({}, ""))
            outcome = outcomes.get(impl, Outcome(""))
            step, ratio = outcome.time, outcome.ratio
            row |= {
                f"{mode}_samples_per_sec": step and number(batch / step.median),
                f"{mode}_step_time": step and number(step.median * 1e3),
                f"{mode}_step_time_p20": step and number(step.p20 * 1e3),
                f"{mode}_step_time_p80": step and number(step.p80 * 1e3),
                f"{mode}_ratio": ratio and number(ratio.median),
                f"{mode}_ratio_p20": ratio and number(ratio.p20),
                f"{mode}_ratio_p80": ratio and number(ratio.p80),
                f"{mode}_batch_size": batch if outcomes else None,
                f"{mode}_img_size": size if outcomes else None,
                f"{mode}_dtype": dtype,
                f"{mode}_status": outcome.status,
                f"{mode}_peak_mem_mb": number(outcome.peak),
            }
        row["peak_mem_mb"] = row["infer_peak_mem_mb"]
        row["param_count"] = round(sum(p.numel() for p in model.parameters()) / 1e6, 2)
        row |= {"impl": impl, "baseline": TIMM, "dtype": row["infer_dtype"]}
        row["compile"] = results["infer"][0][impl].compile
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


def measure(name: str, model: nn.Module, batch: int, settings: Settings) -> list[dict[str, Any]]:
    """Inference, and with ``--full`` the training step, printed as they come."""
    x = torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    dtype = dtype_name(settings.dtype)
    results = {"infer": (inference(model, x, settings), dtype)}
    if settings.full:
        results["train"] = training(model, x, settings), dtype if dtype == "float32" else f"amp_{dtype}"
    rows = model_rows(name, model, batch, results, settings)
    for mode, words in (("infer", "inference"), ("train", "training step")):
        if mode in results:
            settings.say(f"\n{name}, batch {batch}, {words}, {results[mode][1]}")
            settings.say(table([model_cells(row, mode) for row in rows]))
    if settings.device.type == "cpu":
        settings.say("  on a CPU a patched model runs timm's own forward: the two should be the same")
    return rows
