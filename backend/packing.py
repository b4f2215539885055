"""Int4 parts in coalesced order: the checks on them, their nibbles, and what they mean.

The canonical form (int4.py) and the tensor subclass (tensors.py) hold the same parts: they are
checked and dequantised here, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import check_shape

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SYMMETRIC_ZERO_POINT = 8.0


def unpack_rows(qdata: Tensor) -> Tensor:
    """Codes 0..15 of any rows as float32 [..., K]: qdata [..., K/2].

    Written in float arithmetic, exact for bytes, so that an exported embedding lookup needs no
    bitwise kernel.
    """
    byte = qdata.to(torch.float32)
    high = torch.floor(byte * 0.0625)
    return torch.stack([byte - high * 16, high], dim=-1).reshape(*qdata.shape[:-1], -1)


def dequantize_codes(
    q: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """``(q - zero_point) * scale`` of any rows: codes [..., K], float; scale [..., n_groups]."""
    compute = torch.promote_types(dtype, torch.float32)
    groups = q.to(compute).reshape(*scale.shape, group_size)
    zero = SYMMETRIC_ZERO_POINT if zero_point is None else zero_point.to(compute).unsqueeze(-1)
    w = (groups - zero) * scale.to(compute).unsqueeze(-1)
    return w.reshape(q.shape).to(dtype)


def dequantize_rows(
    qdata: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """``(q - zero_point) * scale`` of any rows: qdata [..., K/2], scale [..., n_groups]."""
    return dequantize_codes(unpack_rows(qdata), scale, zero_point, group_size, dtype)


def pack_nibbles(q: Tensor) -> Tensor:
    """Codes 0..15, uint8 [N, K], to bytes [N, K/2]: the even k in the low nibble."""
    return q[:, ::2] | (q[:, 1::2] << 4)


def unpack_nibbles(qdata: Tensor) -> Tensor:
    """The inverse of :func:`pack_nibbles`."""
    return torch.stack([qdata & 0xF, qdata >> 4], dim=-1).reshape(qdata.shape[0], -1)


def check_int4_parts(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    act_pre_scale: Tensor | None = None,
    *,
    who: str = "int4 weight",
) -> None:
    """Check shapes, dtypes, devices and strides of parts in coalesced order.

    Raises:
        ValueError: one disagrees; the message says which.
    """
    if qdata.dtype != torch.uint8 or qdata.ndim != 2:
        raise ValueError(
            f"{who}: expected qdata uint8 [N, K/2], got {describe(qdata)}; only 2-D weights are "
            "supported, a stack of experts must be split into one weight each"
        )
    N, K = qdata.shape[0], qdata.shape[1] * 2
    check_shape(N, K, group_size, who=who)
    n_groups = K // group_size
    if scale.dtype not in SCALE_DTYPES or tuple(scale.shape) != (N, n_groups):
        raise ValueError(
            f"{who}: expected scale float16, bfloat16 or float32 [N, n_groups] = [{N}, {n_groups}],"
            f" got {describe(scale)}; torchao's [n_groups, N] order is read by from_int4"
        )
    if zero_point is not None and (
        zero_point.dtype not in (scale.dtype, torch.float32) or zero_point.shape != scale.shape
    ):
        raise ValueError(
            f"{who}: expected zero_point {dtype_name(scale.dtype)} or float32 [{N}, {n_groups}], "
            f"got {describe(zero_point)}; None means 8 everywhere"
        )
    if act_pre_scale is not None and (
        act_pre_scale.dtype not in SCALE_DTYPES or tuple(act_pre_scale.shape) not in ((1,), (K,))
    ):
        raise ValueError(
            f"{who}: expected act_pre_scale float16, bfloat16 or float32 [1] or [K] = [{K}], got "
            f"{describe(act_pre_scale)}; it multiplies x along K"
        )
    parts = dict(qdata=qdata, scale=scale, zero_point=zero_point, act_pre_scale=act_pre_scale)
    for name, part in parts.items():
        if part is None:
            continue
        if part.device != qdata.device:
            raise ValueError(
                f"{who}: expected {name} on {qdata.device}, where qdata is, got {part.device}; "
                "move the parts to one device"
            )
        if not part.is_contiguous():
            raise ValueError(
                f"{who}: expected {name} contiguous, got strides {tuple(part.stride())} for shape "
                f"{tuple(part.shape)}; call .contiguous() on it"
            )


def describe(t: Tensor) -> str:
    """Dtype and shape, as messages give them."""
    return f"{dtype_name(t.dtype)} {list(t.shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
