"""The Swin of Microsoft's detection and segmentation repositories as a stand-in: they are on no package registry.

The file is ``swin_transformer.py`` there, and ``swin.py`` in Mask2Former and others that have it vendored. Names,
arguments and attributes are theirs, the rest is written anew.
"""
