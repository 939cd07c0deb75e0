"""Every class that ``patch`` replaces, by library."""

from swinops.dropin import (
    detection,
    microsoft,
    mm,
    monai,
    swinir,
    timm,
    timm_maxxvit,
    timm_v2,
    torchvision,
    transformers,
    video_swin,
)
from swinops.dropin.swap import Swapped

SWAPS: tuple[type[Swapped], ...] = (
    *timm.SWAPS,
    *timm_v2.SWAPS,
    *timm_maxxvit.SWAPS,
    *microsoft.SWAPS,
    *video_swin.SWAPS,
    *detection.SWAPS,
    *swinir.SWAPS,
    *mm.SWAPS,
    *torchvision.SWAPS,
    *transformers.SWAPS,
    *monai.SWAPS,
)
