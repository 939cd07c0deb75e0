"""Torch's settings that kernels follow."""

import torch


def tf32_allowed() -> bool:
    """Torch's own setting for float32 matrix products on CUDA, which its older switches update too."""
    matmul = torch.backends.cuda.matmul
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
