"""A photograph through timm's Swin before and after ``swinops.patch``: how far the logits move."""

import copy
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import swinops
from swinops import backends
from swinops.benchmarks.harness import Settings, table, why_not_timed
from swinops.benchmarks.models import quiet, randomise
from swinops.published import import_library
from swinops.testing import accuracy

PHOTOGRAPH = Path(__file__).with_name("chelsea.png")


def pixels(height: int, width: int) -> Tensor:
    """The photograph cut to the aspect ratio around its centre, resized and normalised as for ImageNet. [1, 3, H, W]"""
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(PHOTOGRAPH) as image:
        values = np.array(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC))
    x = torch.from_numpy(values).permute(2, 0, 1) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    return ((x - mean) / std)[None]


@torch.no_grad()
def logits_on_photograph(model: nn.Module, x: Tensor, names: list[str]) -> dict[str, Any]:
    """The logits of ``model`` before and after ``patch``, for each backend, against float64."""
    before = model(x)
    exact = copy.deepcopy(model).double()(x.double())
    without = copy.deepcopy(model)
    for name, parameter in without.named_parameters():
        # of a continuous bias, which is the same everywhere without its network's output
        if name.endswith(("relative_position_bias_table", "cpb_mlp.2.weight", "meta_mlp.fc2.weight")):
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
    x = pixels(height, width).to(settings.device, settings.dtype)
    attention = "cosine_attention" if any("logit_scale" in name for name in model.state_dict()) else "window_attention"
    runs = [name for name in backends.MODULES if why_not_timed(name, x, attention) is None]
    settings.bar.set_description("a photograph, before and after patch")
    found = logits_on_photograph(model, x, ["auto", *runs])
    settings.bar.update(1)
    settings.say(f"\n{PHOTOGRAPH.name} through {title}, {height} x {width}, {settings.precision}")
    settings.say(describe(found, random))
    return all(row["ok"] for row in found["rows"])


def demonstrate_interpreted(settings: Settings) -> bool:
    """The same on a CPU with the Triton kernels in their interpreter, in a process that starts with it."""
    if importlib.util.find_spec("triton") is None:
        settings.bar.update(1)
        settings.say("\nTriton is not installed: its kernels are not interpreted")
        return True
    settings.bar.set_description("the Triton kernels, interpreted")
    command = [sys.executable, "-c", "from swinops.benchmarks import photograph; photograph.interpreted()"]
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
    import_library("timm")
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
    found = logits_on_photograph(randomise(model), pixels(*size), ["triton"])
    print(json.dumps({**found, "launches": launches, "seconds": time.perf_counter() - start}))
