"""Parameters from files: this package's, timm's, Microsoft's, torchvision's and Transformers'."""

from swinops.checkpoints.loading import load_checkpoint

__all__ = ["load_checkpoint"]
