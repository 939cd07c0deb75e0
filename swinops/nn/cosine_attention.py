"""Swin V2's scaled cosine attention as a layer, with its continuous position bias."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swinops.nn.window_attention import WindowAttentionBase
from swinops.ops.arguments import check_window, per_axis


class CachedBias(NamedTuple):
    """A bias, and what it was computed from."""

    weights: tuple[Tensor, ...]
    # aliases of the weights: while they live no other tensor can have that memory, so an address tells the data
    data: tuple[Tensor, ...]
    versions: tuple[int, ...]
    settings: tuple[Any, ...]
    bias: Tensor

    def is_of(self, weights: tuple[Tensor, ...], settings: tuple[Any, ...]) -> bool:
        return self.settings == settings and all(
            w is old and w._version == version and w.data_ptr() == data.data_ptr() and w.dtype == data.dtype
            for w, old, data, version in zip(weights, self.weights, self.data, self.versions, strict=True)
        )


class Projection(nn.Linear):
    """A projection whose bias is made of other parameters, and comes with the call."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)


class CosineWindowAttention(WindowAttentionBase):
    """Multi-head cosine attention within the shifted windows of an image (arXiv 2111.09883, section 3).

        out = softmax(cos(q, k) * exp(min(logit_scale, ln 100)) + 16 * sigmoid(cpb_mlp(offsets)) + mask) v

    The weights of ``cpb_mlp`` are read, and it is not called. In evaluation the bias [heads, N, N] is computed once and
    kept, heads * N * N numbers, unless a gradient could reach ``cpb_mlp`` or the call is compiled or traced. It is
    computed again when PyTorch counts a change of the weights, when they move or are replaced, after ``train()`` and
    ``eval()``, and after a call that kept nothing; while a weight has a gradient nothing is kept, for a fused
    optimizer's step is not counted. Other writes that PyTorch does not count (through ``parameter.data``, NumPy or
    another process) are not seen: call ``eval()`` after them. No copy, pickle or state dict holds the bias.

    Args:
        window_size: Tokens of a window along each axis: an int or two.
        pretrained_window_size: The window that ``cpb_mlp`` was trained with, an int or one per axis; 0 is this window.
        qkv_bias: Whether q and v have a bias; k has none, so pads have the key 0, and the value ``v_bias``.
        cpb_hidden_dim: Hidden channels of ``cpb_mlp``.
        log_spaced: The network's coordinates are the logarithms of offsets, and not the offsets themselves.

    The rest is as in ``WindowAttention``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int] = 0,
        *,
        pretrained_window_size: int | Sequence[int] = 0,
        qkv_bias: bool = True,
        cpb_hidden_dim: int = 512,
        log_spaced: bool = True,
        pad_order: str = "pad_roll",
        backend: str = "auto",
    ):
        super().__init__(
            dim, num_heads, window_size, shift_size, qkv_bias=False, pad_order=pad_order, backend=backend
        )  # fmt: skip
        if len(self.window_size) != 2:
            raise ValueError(f"window_size must be an int or two ints, got {window_size}")
        if not isinstance(cpb_hidden_dim, int) or cpb_hidden_dim < 1:
            raise ValueError(f"cpb_hidden_dim must be an int of at least 1, got {cpb_hidden_dim!r}")
        self.pretrained_window_size = per_axis(pretrained_window_size, 2, "pretrained_window_size")
        if len(self.pretrained_window_size) != 2 or min(self.pretrained_window_size) < 0:
            raise ValueError(
                "pretrained_window_size must be at least 0 on each of the 2 spatial axes, "
                f"got {tuple(self.pretrained_window_size)}"
            )
        self.qkv = Projection(dim, 3 * dim, bias=False)
        self.log_spaced = log_spaced
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, cpb_hidden_dim), nn.ReLU(), nn.Linear(cpb_hidden_dim, num_heads, bias=False)
        )
        self.cached_bias: CachedBias | None = None

    def attend(self, x: Tensor, shift: Sequence[int]) -> Tensor:
        heads = (3, self.num_heads, -1)
        qkv_bias = pad_kv = None
        if self.q_bias is not None and self.v_bias is not None:
            qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
            pad_kv = qkv_bias.view(heads)[1:]
        qkv = self.qkv(x, qkv_bias).unflatten(-1, heads)
        out: Tensor = torch.ops.swinops.cosine_attention_qkvpacked(
            qkv, self.logit_scale, self.position_bias(), pad_kv, self.window_size, shift,
            self.pad_order, -100.0, self.backend,
        )[0]  # fmt: skip
        return out

    def position_bias(self) -> Tensor:
        """[heads, N, N], the dtype of ``cpb_mlp``. Not to be written to: it may be the one that is kept."""
        hidden: Any = self.cpb_mlp[0]
        output: Any = self.cpb_mlp[2]
        weights = (hidden.weight, hidden.bias, output.weight)
        pretrained = [p or w for p, w in zip(self.pretrained_window_size, self.window_size, strict=True)]
        settings = (tuple(self.window_size), tuple(pretrained), self.log_spaced, self.backend)
        if self.training or not constant(weights):
            if not torch.compiler.is_compiling():
                self.cached_bias = None  # a step of an optimizer may follow, and fused ones count no change
            bias: Tensor = torch.ops.swinops.continuous_position_bias(*weights, *settings)[0]
            return bias
        # a stream that did not compute the bias would have to wait for it
        stream = torch.cuda.current_stream(hidden.weight.device) if hidden.weight.is_cuda else None
        key = (*settings, stream)
        kept = self.cached_bias
        if kept is None or not kept.is_of(weights, key):
            # of inference mode it would be no tensor to differentiate with later
            with torch.inference_mode(False), torch.no_grad():
                bias = torch.ops.swinops.continuous_position_bias(*weights, *settings)[0]
                data = tuple(w.detach() for w in weights)
            kept = CachedBias(weights, data, tuple(w._version for w in weights), key, bias)
            if type(bias) is Tensor:  # what a tracer makes is the tracer's
                self.cached_bias = kept
        return kept.bias

    def set_window_size(self, window_size: int | Sequence[int], shift_size: int | Sequence[int] = 0) -> None:
        """Use another window, to which the bias continues; the first one becomes the pretrained window.

        Raises:
            ValueError, TypeError: a size is out of range. Nothing has changed then.
        """
        window, shift = per_axis(window_size, 2, "window_size"), per_axis(shift_size, 2, "shift_size")
        check_window(window, shift, 2)
        self.pretrained_window_size = [
            p or w for p, w in zip(self.pretrained_window_size, self.window_size, strict=True)
        ]  # fmt: skip
        self.window_size, self.shift_size = window, shift

    def train(self, mode: bool = True) -> "CosineWindowAttention":
        self.cached_bias = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cached_bias": None}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pretrained_window_size={self.pretrained_window_size}"


def constant(weights: Sequence[Tensor]) -> bool:
    """Whether what is computed of ``weights`` now is right for as long as they stay as they are."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    # tensors of inference mode have no version; other types are a tracer's, or those of a functional call
    if any(type(w) is not nn.Parameter or w.is_inference() for w in weights):
        return False
    # a step of a fused optimizer, which counts no change, may be next
    if any(w.grad is not None for w in weights):
        return False
    # memory of a CUDA graph is its own, and what it reads has to stay where it is
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not (torch.is_grad_enabled() and any(w.requires_grad for w in weights))
