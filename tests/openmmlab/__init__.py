"""OpenMMLab's shifted windows as stand-ins: mmcv, which they need, is built from source for each torch.

``swin`` has the classes of mmsegmentation's and mmdetection's file of that name, ``attention`` those of mmpretrain's
(mmclassification's before it). Names, arguments and attributes are theirs, the rest is written anew.
"""
