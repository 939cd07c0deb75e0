"""Other libraries' models on this package's ops: the classes of single instances are swapped, and swapped back."""

from swinops.dropin.comparison import Comparison, Report, check
from swinops.dropin.patching import Row, Table, explain, patch, patched, unpatch

__all__ = ["Comparison", "Report", "Row", "Table", "check", "explain", "patch", "patched", "unpatch"]
