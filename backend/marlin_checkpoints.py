"""Reading weights that others packed for Marlin and Sparse-Marlin: their bytes are ours.

    read_marlin      B, s               GPTQ checkpoints with checkpoint_format "marlin"
    read_marlin24    B_24, B_meta, s    the same, "marlin_24"; compressed-tensors "marlin-24" has
                                        weight_packed, meta, scale_packed

Both return a tensor that runs, without moving a byte:

    linear.weight = nn.Parameter(read_marlin24(B_24, B_meta, s), requires_grad=False)

4 bits and symmetric only, which is what these formats are. A checkpoint with act_order
(``desc_act``, a ``g_idx`` that is not sorted) needs x permuted as well: it has more fields than
these, and is none of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layouts import check_shape
from .marlin import check_marlin24_meta
from .marlin_layouts import K_TILE, MARLIN, MARLIN24, N_TILE
from .packing import SCALE_DTYPES, describe
from .tensors import CudaMarlin24Int4Tensor, CudaMarlinInt4Tensor

_INT32 = (torch.int32, torch.uint32)
_INT16 = (torch.int16, torch.uint16)


def read_marlin(
    B: Tensor,
    s: Tensor,
    *,
    dtype: torch.dtype | None = None,
    activation: str = "none",
    who: str = "weight",
) -> CudaMarlinInt4Tensor:
    """Read the fields of a dense Marlin weight [N, K].

    Args:
        B: int32 or uint32 [K/16, 2*N], eight codes to a word.
        s: float16 or bfloat16 (or float32) [K/group_size, N], permuted as Marlin has them.
        dtype: what the weight stands in for; default the dtype of s.
        activation: ``"none"`` (w4a16) or ``"int8"`` (w4a8).
        who: its name, for messages.

    Raises:
        ValueError: the fields contradict each other, or are of another format.
    """
    N, K, group_size = _sizes(MARLIN, "B", B, s, who)
    return CudaMarlinInt4Tensor(
        _bytes(B), s.contiguous(), group_size, MARLIN, activation, (N, K), dtype or s.dtype
    )


def read_marlin24(
    B_24: Tensor,
    B_meta: Tensor,
    s: Tensor,
    *,
    dtype: torch.dtype | None = None,
    activation: str = "none",
    who: str = "weight",
) -> CudaMarlin24Int4Tensor:
    """Read the fields of a 2:4 sparse Marlin weight [N, K]; every place in B_meta is looked at.

    Args:
        B_24: int32 or uint32 [K/32, 2*N], eight kept codes to a word.
        B_meta: int16 or uint16, [K/32, 2*N] or the same bytes as [N, K/16]; the places of the kept.
        s: float16 or bfloat16 (or float32) [K/group_size, N], permuted as Sparse-Marlin has them.
        dtype: what the weight stands in for; default the dtype of s.
        activation: ``"none"`` (w4a16) or ``"int8"`` (w4a8).
        who: its name, for messages.

    Raises:
        ValueError: the fields contradict each other, are of another format, or B_meta names what
            are not two places in order.
    """
    N, K, group_size = _sizes(MARLIN24, "B_24", B_24, s, who)
    if B_meta.dtype not in _INT16 or tuple(B_meta.shape) not in ((K // 32, 2 * N), (N, K // 16)):
        raise ValueError(
            f"{who}: expected B_meta int16 [K/32, 2*N] = [{K // 32}, {2 * N}], got "
            f"{describe(B_meta)}; the fields are of two weights, or not of the format marlin_24"
        )
    meta = B_meta.contiguous().view(torch.int16).view(K // 32, 2 * N)
    check_marlin24_meta(meta, who=who)
    return CudaMarlin24Int4Tensor(
        _bytes(B_24), meta, s.contiguous(), group_size, MARLIN24, activation, (N, K),
        dtype or s.dtype,
    )  # fmt: skip


def _sizes(tag: str, name: str, B: Tensor, s: Tensor, who: str) -> tuple[int, int, int]:
    """N, K and group_size, from the shapes of the fields."""
    tile = K_TILE[tag]
    if B.ndim != 2 or B.dtype not in _INT32 or B.shape[1] % (2 * N_TILE) or not B.numel():
        raise ValueError(
            f"{who}: expected {name} int32 [K/{tile}, 2*N] with N % {N_TILE} == 0, got "
            f"{describe(B)}; it is not 4-bit in the order of {tag}"
        )
    N, K = B.shape[1] // 2, B.shape[0] * tile
    if s.ndim != 2 or s.dtype not in SCALE_DTYPES or s.shape[1] != N or not s.numel():
        raise ValueError(
            f"{who}: expected s float16, bfloat16 or float32 [n_groups, N] with N={N}, as {name} "
            f"{describe(B)} has it, got {describe(s)}; the fields are of two weights, or of "
            "another format"
        )
    if K % s.shape[0]:
        raise ValueError(
            f"{who}: expected a number of groups that divides K={K}, got {s.shape[0]} rows of s; "
            f"the fields are of two weights, or {name} is not 4-bit"
        )
    check_shape(N, K, K // s.shape[0], who=who)
    if not bool(s.isfinite().all()):
        raise ValueError(
            f"{who}: expected finite scales, got {int((~s.isfinite()).sum())} of {s.numel()} inf "
            "or nan; the checkpoint is damaged"
        )
    return N, K, K // s.shape[0]


def _bytes(words: Tensor) -> Tensor:
    return words.contiguous().view(torch.uint8)
