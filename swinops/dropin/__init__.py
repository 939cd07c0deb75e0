"""Other libraries' models on this package's ops: the classes of single instances are swapped, and swapped back."""

from swinops.dropin.patching import Row, Table, explain, patch, patched, unpatch

__all__ = ["Row", "Table", "explain", "patch", "patched", "unpatch"]
