"""Every class that ``patch`` replaces, by library."""

from swinops.dropin import timm, timm_maxxvit, timm_v2
from swinops.dropin.swap import Swapped

SWAPS: tuple[type[Swapped], ...] = (
    *timm.SWAPS,
    *timm_v2.SWAPS,
    *timm_maxxvit.SWAPS,
)
