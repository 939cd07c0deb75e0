"""SwinIR and Swin2SR as stand-ins: their files are on no package registry.

``network_swinir`` (BasicSR's ``swinir_arch``) and ``network_swin2sr`` have the classes of the published files: a block
that takes [B, H * W, C] and the size of the image, with a mask for one size, and another one made anew for any other.
Names, arguments and attributes are theirs, the rest is written anew.
"""
