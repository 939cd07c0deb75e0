"""Parameters to files, and from those of this package, timm, Microsoft, torchvision, Transformers and OpenMMLab."""

from swinops.checkpoints.loading import load_checkpoint
from swinops.checkpoints.saving import save_checkpoint

__all__ = ["load_checkpoint", "save_checkpoint"]
