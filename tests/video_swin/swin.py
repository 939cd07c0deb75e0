"""mmaction2's layer: channels come last in what it returns, and its caller may downsample in its place."""

from . import swin_transformer
from .swin_transformer import compute_mask, get_window_size


class BasicLayer(swin_transformer.Layer):
    def forward(self, x, do_downsample=True):
        """[B, C, D, H, W] -> [B, D, H, W, C]"""
        D, H, W = x.shape[2:]
        window, shift = get_window_size((D, H, W), self.window_size, self.shift_size)
        Md, Mh, Mw = window
        mask = compute_mask(D + -D % Md, H + -H % Mh, W + -W % Mw, window, shift, x.device)
        x = x.permute(0, 2, 3, 4, 1)
        for block in self.blocks:
            x = block(x, mask)
        return self.downsample(x) if self.downsample is not None and do_downsample else x


class SwinTransformer3D(swin_transformer.SwinTransformer3D):
    def __init__(self, **options):
        super().__init__(layer=BasicLayer, **options)

    def forward(self, x):
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x, do_downsample=False)
            if layer.downsample is not None:
                x = layer.downsample(x)
            x = x.permute(0, 4, 1, 2, 3)
        return self.norm(x.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)
