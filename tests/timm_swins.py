"""timm's three Swins, small and with every parameter random, and the comparison that their tests share."""

import copy
import importlib
from typing import NamedTuple

import pytest
import torch

from swinops.testing import random_tensor, shuffled

pytest.importorskip("timm")


class Family(NamedTuple):
    """One of timm's files."""

    name: str
    module: str
    model: str
    block: str
    attn: str
    seam: str  # the block's method that patch replaces
    stages: str
    rows: int  # of explain, for a model of four blocks
    attention: str  # the op that runs
    example: str  # a published model

    def load(self):
        return importlib.import_module(f"timm.models.{self.module}")


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "v1", "swin_transformer", "SwinTransformer", "SwinTransformerBlock", "WindowAttention", "_attn", "layers",
            5, "window_attention", "swin_tiny_patch4_window7_224",
        ),
        Family(
            "v2", "swin_transformer_v2", "SwinTransformerV2", "SwinTransformerV2Block", "WindowAttention", "_attn",
            "layers", 5, "cosine_attention", "swinv2_tiny_window8_256",
        ),
        Family(
            "v2_cr", "swin_transformer_v2_cr", "SwinTransformerV2Cr", "SwinTransformerV2CrBlock",
            "WindowMultiHeadAttention", "_shifted_window_attn", "stages", 4, "cosine_attention", "swinv2_cr_tiny_224",
        ),
    )
}  # fmt: skip


def build(family, module=None, **options):
    """Two stages on maps of 7 x 5 and 4 x 3, which a window of 4 pads."""
    defaults = {"img_size": (14, 10), "patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    defaults |= {"window_size": 4, "num_classes": 5, "drop_path_rate": 0.0}
    return randomise(getattr(module or family.load(), family.model)(**{**defaults, **options})).eval()


def randomise(model):
    """At timm's initialisation norms are ones or zeros, and biases zeros: most of a model would not be compared."""
    for seed, (name, p) in enumerate(model.named_parameters()):
        fan_in = p[0].numel() if p.dim() > 1 and "table" not in name else 1
        p.data.copy_(random_tensor(p.shape, seed) / fan_in**0.5 + (p.dim() == 1 and "norm" in name))
        if "logit_scale" in name:  # the last is above ln 100, where it is clamped
            p.data.copy_(torch.linspace(1, 5, len(p)).view(p.shape))
    return model


def image(batch=2, size=(14, 10)):
    return random_tensor((batch, 3, *((size, size) if isinstance(size, int) else size)), 99)


def blocks(model):
    return [block for stage in getattr(model, "layers", None) or model.stages for block in stage.blocks]


def results(model, x):
    """Output, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    out = model(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, [x, *parameters], random_tensor(out.shape, 7).to(out))
    return {"out": out.detach(), **dict(zip(("x", *names), grads, strict=True))}


def assert_same(actual, model, x, exact=None):
    """``actual`` is as exact as the unpatched ``model`` at ``x``. Errors are relative to a tensor's largest value.

    It is the rule of ``assert_accurate``, but with the plain error of the model's worst tensor of several images for
    each tensor: what reaches a tensor through the rest of a model is rounding, by luck smaller in the one or in the
    other. In float64 the two differ by rounding alone. ``exact``: the model in float64, where it is not ``model``'s
    copy.
    """
    exact = exact or copy.deepcopy(model).double()
    ideal, eps = results(exact, x.double()), torch.finfo(x.dtype).eps
    assert list(actual) == list(ideal)
    if x.dtype == torch.float64:
        allowed = 1e-12
    else:
        draws = [shuffled(x, places) for places in (0, 3, 7, 12)]
        allowed = 2 * max(max(errors(results(model, y), results(exact, y.double())).values()) for y in draws) + eps
        assert allowed < min(1000 * eps, 0.5)
    wrong = {name: error for name, error in errors(actual, ideal).items() if not error <= allowed}
    assert not wrong, f"allowed {allowed:.1e}, off by {wrong}"


def errors(actual, exact):
    """Of each tensor, relative to its largest value."""
    top = max(float(y.abs().max()) for y in exact.values())
    # sums that cancel leave little but rounding: a logit_scale's, and that of V2-CR's bias which softmax takes out
    sizes = {name: max(float(y.abs().max()), 0.01 * top) for name, y in exact.items()}
    return {name: float((actual[name].double() - y).abs().max()) / sizes[name] for name, y in exact.items()}


def count_calls(monkeypatch, module, names):
    """How often each of ``module``'s functions is called from now on."""
    counts = dict.fromkeys(names, 0)
    for name in names:
        f = getattr(module, name)

        def counted(*args, f=f, name=name):
            counts[name] += 1
            return f(*args)

        monkeypatch.setattr(module, name, counted)
    return counts
