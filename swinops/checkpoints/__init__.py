"""Parameters from files: this package's, timm's and Microsoft's."""

from swinops.checkpoints.loading import load_checkpoint

__all__ = ["load_checkpoint"]
