"""Modules with the functions of other projects' extensions, on this package's ops."""

from swinops.compat import swin_window_process

__all__ = ["swin_window_process"]
