"""Video Swin as a stand-in: its two files are on no package registry, or need packages that few have.

``swin_transformer`` has the classes of the paper's repository (SwinTransformer/Video-Swin-Transformer), which are
vendored under that name; ``swin`` has what mmaction2 changed. Names, arguments and attributes are theirs, the rest is
written anew.
"""
