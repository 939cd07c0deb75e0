"""The Triton backend: one file per op, each with its kernels, their launcher and the function that ops call."""

import torch
import triton
from torch import Tensor

from swinops.kernels.continuous_position_bias import continuous_position_bias, continuous_position_bias_backward
from swinops.kernels.cosine_attention import cosine_attention, cosine_attention_backward
from swinops.kernels.cyclic_shift import window_merge, window_partition
from swinops.kernels.layer_norm import (
    add_layer_norm,
    add_layer_norm_backward,
    layer_norm,
    layer_norm_add,
    layer_norm_add_backward,
    layer_norm_backward,
)
from swinops.kernels.patch_merging import patch_merging_norm, patch_merging_norm_backward
from swinops.kernels.relative_position_bias import relative_position_bias, relative_position_bias_backward
from swinops.kernels.window_attention import window_attention, window_attention_backward

__all__ = [
    "add_layer_norm",
    "add_layer_norm_backward",
    "continuous_position_bias",
    "continuous_position_bias_backward",
    "cosine_attention",
    "cosine_attention_backward",
    "layer_norm",
    "layer_norm_add",
    "layer_norm_add_backward",
    "layer_norm_backward",
    "patch_merging_norm",
    "patch_merging_norm_backward",
    "relative_position_bias",
    "relative_position_bias_backward",
    "why_not",
    "window_attention",
    "window_attention_backward",
    "window_merge",
    "window_partition",
]

# read once, as @triton.jit does: the kernels of a process are all interpreted or all compiled
INTERPRETED = triton.knobs.runtime.interpret


def why_not(x: Tensor, op: str, tokens: int = 0) -> str | None:
    """Why Triton cannot run ``op`` on tensors like ``x``, in a sentence; None where it can. It takes any ``tokens``."""
    if x.device.type == "cpu" and not INTERPRETED:
        return "the tensor is on the CPU, where Triton runs only in its interpreter (TRITON_INTERPRET=1 at import)"
    if x.device.type not in ("cpu", "cuda"):
        return f"the tensor is on {x.device.type}, where there is no Triton kernel"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(x.device)
        return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0"
    if op in ("window_attention", "cosine_attention"):
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its window attention takes float32, float16 and bfloat16, not {x.dtype}"
        if x.shape[-1] > 256:
            return f"its window attention takes a head_dim up to 256, not {x.shape[-1]}"
    elif op in ("layer_norm", "add_layer_norm", "layer_norm_add", "patch_merging_norm"):
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its layer norm takes float32, float16 and bfloat16, not {x.dtype}"
        C = x.shape[-1] * (4 if op == "patch_merging_norm" else 1)
        if C > 8192:
            return f"its layer norm takes rows of up to 8192 channels, not {C}"
    elif op == "continuous_position_bias":
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"its continuous position bias takes float32, float16 and bfloat16, not {x.dtype}"
    elif op == "relative_position_bias" and x.dtype == torch.float64:
        return "its relative position bias sums in float32, which loses float64's precision"
    return None
