"""Scaled cosine attention within shifted windows: the kernels of ``window_attention`` with a scale for each head."""

from collections.abc import Sequence

from torch import Tensor

from swinops.kernels.window_attention import Call, attend, attend_backward


def cosine_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    pad_order: str,
    mask_value: float,
) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, logit_scale, bias, pad_kv, Call(q, window, shift, None, pad_order, mask_value))


def cosine_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logit_scale: Tensor,
    bias: Tensor | None,
    pad_kv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dlogit_scale: Tensor | None,
    dbias: Tensor | None,
    dpad_kv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    pad_order: str,
    mask_value: float,
) -> None:
    call = Call(q, window, shift, None, pad_order, mask_value)
    attend_backward(
        dout, q, k, v, logit_scale, bias, pad_kv, out, lse, dq, dk, dv, dlogit_scale, dbias, dpad_kv, call
    )  # fmt: skip
