"""Packing int4 weights for tensor cores, ``marlin.v1`` and ``marlin24.v1``, and back, exactly.

    CanonicalInt4  <->  MarlinInt4     dense, symmetric or with zero points
    CanonicalInt4  <->  Marlin24Int4   2:4 sparse, symmetric: half of the codes, and their places

marlin_layouts.py says where each bit lies. N is padded to a multiple of 64 with rows of scale 0,
code 8 and zero point 8, which are 0 whatever x is; ``shape`` keeps the N that was. K is never
padded: every K of int4 weights is a multiple of 32, so no group is cut or filled.

Packing is a few operations on whole tensors, on the device where the weight is: the linears of a 7B
model take 2.7 s dense and 6.4 s 2:4 on two CPU cores (benchmarks/results/packing.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import marlin_layouts
from .int4 import CanonicalInt4
from .layouts import check_shape
from .marlin_layouts import MARLIN, MARLIN24
from .packing import SCALE_DTYPES, SYMMETRIC_ZERO_POINT, describe, dtype_name
from .sparse24 import check_meta, compress_24, expand_24, view_as

_EIGHTS = 0x88  # a byte of two codes 8
_NO_NONZERO = 0xE  # meta of four zeros


@dataclass(frozen=True, eq=False)
class MarlinInt4:
    """A dense int4 weight [N, K] in the order ``marlin.v1``; Np is N rounded up to 64.

    Attributes:
        qdata: uint8 [K/16, 8*Np]; its bytes are the published int32 [K/16, 2*Np].
        scale: float16, bfloat16 or float32 [n_groups, Np], permuted, in units of w; 0 beyond N.
        zero_point: None (8 everywhere), or dtype of scale or float32 [n_groups, Np], permuted as
            scale is, in units of q; 8 beyond N.
        group_size: weights along K that share a scale; 32, 64, 128, 256 or K.
        shape: (N, K), without padding.
        act_pre_scale: None, or [1] or [K]; x is multiplied by it before the linear.
        dtype: what the weight stands in for; default the dtype of scale.

    Raises:
        ValueError: the parts disagree with each other.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int
    shape: tuple[int, int]
    act_pre_scale: Tensor | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the parts; every code of every byte is valid."""
        check_marlin_parts(
            MARLIN, self.shape, self.group_size, self.qdata, self.scale, zero_point=self.zero_point,
            act_pre_scale=self.act_pre_scale, who=type(self).__name__,
        )  # fmt: skip
        if self.dtype is None:
            object.__setattr__(self, "dtype", self.scale.dtype)

    @classmethod
    def pack(cls, weight: CanonicalInt4) -> MarlinInt4:
        """Reorder codes, scales and zero points; no value changes, and any N fits."""
        qdata = _pad_rows(weight.qdata, _EIGHTS)
        zero_point = weight.zero_point
        return cls(
            _tile(qdata, _DENSE_ROWS),
            _permute_scale(MARLIN, weight.scale, 0.0),
            None
            if zero_point is None
            else _permute_scale(MARLIN, zero_point, SYMMETRIC_ZERO_POINT),
            weight.group_size,
            weight.shape,
            weight.act_pre_scale,
            weight.dtype,
        )

    def unpack(self) -> CanonicalInt4:
        """The inverse of :meth:`pack`, exact; the padding is dropped."""
        N = self.shape[0]
        zero_point = self.zero_point
        return CanonicalInt4(
            _first_rows(_untile(self.qdata, _DENSE_ROWS), N),
            _restore_scale(MARLIN, self.scale, N),
            None if zero_point is None else _restore_scale(MARLIN, zero_point, N),
            self.group_size,
            self.act_pre_scale,
            self.dtype,
        )


@dataclass(frozen=True, eq=False)
class Marlin24Int4:
    """A 2:4 sparse int4 weight [N, K] in the order ``marlin24.v1``; Np is N rounded up to 64.

    Attributes:
        qdata: uint8 [K/32, 8*Np], the kept codes; its bytes are the published int32 [K/32, 2*Np].
        meta: int16 [K/32, 2*Np], the places of the kept.
        scale: float16, bfloat16 or float32 [n_groups, Np], permuted, in units of w; 0 beyond N.
        group_size: weights along K, kept or not, that share a scale; 32, 64, 128, 256 or K.
        shape: (N, K), without padding.
        act_pre_scale: None, or [1] or [K]; x is multiplied by it before the linear.
        dtype: what the weight stands in for; default the dtype of scale.

    Raises:
        ValueError: the parts disagree with each other.
    """

    qdata: Tensor
    meta: Tensor
    scale: Tensor
    group_size: int
    shape: tuple[int, int]
    act_pre_scale: Tensor | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the parts; the values of meta are looked at by unpack and by check_values."""
        check_marlin_parts(
            MARLIN24, self.shape, self.group_size, self.qdata, self.scale, meta=self.meta,
            act_pre_scale=self.act_pre_scale, who=type(self).__name__,
        )  # fmt: skip
        if self.dtype is None:
            object.__setattr__(self, "dtype", self.scale.dtype)

    @classmethod
    def pack(cls, weight: CanonicalInt4, *, who: str = "weight") -> Marlin24Int4:
        """Keep two codes of each four and reorder them; no value changes, and any N fits.

        Raises:
            ValueError: it has zero points, or is not 2:4; the message has the first place.
        """
        kept, meta = compress_24(weight, who=who)
        return cls(
            _tile(_pad_rows(kept, _EIGHTS), _SPARSE_ROWS),
            _tile_meta(_pad_rows(meta, _NO_NONZERO)),
            _permute_scale(MARLIN24, weight.scale, 0.0),
            weight.group_size,
            weight.shape,
            weight.act_pre_scale,
            weight.dtype,
        )

    def unpack(self, *, who: str = "weight") -> CanonicalInt4:
        """The inverse of :meth:`pack`, exact; the padding is dropped.

        Raises:
            ValueError: meta names places that are not two, in order.
        """
        N = self.shape[0]
        kept, meta = _untile(self.qdata, _SPARSE_ROWS), _untile_meta(self.meta)
        return CanonicalInt4(
            _first_rows(expand_24(kept, meta, who=who), N),
            _restore_scale(MARLIN24, self.scale, N),
            None,
            self.group_size,
            self.act_pre_scale,
            self.dtype,
        )

    def check_values(self, *, who: str = "weight") -> None:
        """Look at every place that meta names; for weights that others packed.

        Raises:
            ValueError: one is not two places in order; the message has row and columns.
        """
        check_marlin24_meta(self.meta, who=who)


# ---- codes ----

# How n = 64c + .. splits into the place in a tile: the fields below c, from the highest to the
# lowest, "row" 0..7, "half" 0..1 and "word" 0..3. Row and half are the rows of one instruction's
# fragment, word picks the instruction.
_DENSE_ROWS = ("word", "half", "row")
_SPARSE_ROWS = ("row", "half", "word")
_ROW_SIZES = {"row": 8, "half": 2, "word": 4}
_LOW = 0x0F0F0F0F  # the low codes of four bytes


def _tile(qdata: Tensor, rows: tuple[str, str, str]) -> Tensor:
    """Row-major bytes [Np, K/2] to tiles [K/16, 8*Np] (for 2:4, K counts kept codes).

    k = 16 * tile + 8 * upper + 2 * pair + odd: a row has 8 bytes (upper, pair) of each tile, and a
    byte both codes of odd. In a tile a byte has both codes of upper, and comes in the order (row,
    pair, word, odd, half). Tiles are brought together first, 8 bytes at a time, then codes are
    reordered within: to move single bytes as far took 0.16 s in place of 0.035 s (N=11008, K=4096,
    one CPU core).
    """
    Np, n_tiles = qdata.shape[0], qdata.shape[1] // 8
    split = view_as(qdata, torch.int64).view(-1, *(_ROW_SIZES[name] for name in rows), n_tiles)
    row, half, word = (1 + rows.index(name) for name in ("row", "half", "word"))
    near = split.permute(4, 0, row, word, half).contiguous().view(torch.int32)
    lower, upper = near.view(-1, 4, 2, 2).unbind(-1)
    even = (lower & _LOW) | ((upper & _LOW) << 4)
    odd = ((lower >> 4) & _LOW) | (upper & ~_LOW)
    in_order = torch.stack([even, odd], 2).view(torch.uint8).view(-1, 16, 4)
    return in_order.transpose(1, 2).reshape(n_tiles, 8 * Np)


def _untile(tiles: Tensor, rows: tuple[str, str, str]) -> Tensor:
    """The inverse of :func:`_tile`."""
    n_tiles, Np = tiles.shape[0], tiles.shape[1] // 8
    in_order = tiles.view(-1, 4, 16).transpose(1, 2).contiguous()
    even, odd = in_order.view(torch.int32).view(-1, 4, 2, 2).unbind(2)
    lower = (even & _LOW) | ((odd & _LOW) << 4)
    upper = ((even >> 4) & _LOW) | (odd & ~_LOW)
    near = torch.stack([lower, upper], -1).view(torch.int64).view(n_tiles, -1, 8, 4, 2)
    place = {"row": 2, "word": 3, "half": 4}
    split = near.permute(1, *(place[name] for name in rows), 0).contiguous()
    return split.view(torch.uint8).view(Np, 8 * n_tiles)


# ---- the places of kept codes ----


def _tile_meta(meta: Tensor) -> Tensor:
    """Places uint8 [Np, K/4], one to a byte, to int16 [K/32, 2*Np], four to a word."""
    Np, n_tiles = meta.shape[0], meta.shape[1] // 8
    words = (meta[:, ::2] | (meta[:, 1::2] << 4)).view(torch.int16)
    # n = 64R + 8o + 4 * b2 + 2 * b1 + b0; a tile has two words of each row.
    split = words.view(-1, 8, 2, 2, 2, n_tiles, 2)
    R, o, b2, b1, b0, tile, c0 = range(7)
    return split.permute(tile, R, b1, o, b0, c0, b2).reshape(n_tiles, 2 * Np)


def _is_ordered(meta: Tensor) -> bool:
    """Whether all four ``first | second << 2`` of every word have first < second."""
    first1, second0, second1 = meta >> 1, meta >> 2, meta >> 3
    less = (second1 & ~first1) | (~(second1 ^ first1) & second0 & ~meta)
    return bool((less & 0x1111).eq(0x1111).all())


def _untile_meta(tiles: Tensor) -> Tensor:
    """The inverse of :func:`_tile_meta`."""
    n_tiles, Np = tiles.shape[0], tiles.shape[1] // 2
    tile, R, b1, o, b0, c0, b2 = range(7)
    split = tiles.view(n_tiles, -1, 2, 8, 2, 2, 2).permute(R, o, b2, b1, b0, tile, c0)
    pairs = split.reshape(Np, 2 * n_tiles).view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], -1).view(Np, -1)


# ---- scales and zero points ----


def _permute_scale(tag: str, scale: Tensor, padding: float) -> Tensor:
    """[N, n_groups] to [n_groups, Np]."""
    a, b, e = marlin_layouts.SCALE_SWAP[tag, scale.shape[1] == 1]
    padded = _pad_rows(scale, padding).t()
    return padded.reshape(len(padded), -1, b, a, e).transpose(2, 3).reshape(padded.shape)


def _restore_scale(tag: str, scale: Tensor, N: int) -> Tensor:
    """The inverse of :func:`_permute_scale`."""
    a, b, e = marlin_layouts.SCALE_SWAP[tag, scale.shape[0] == 1]
    rows = scale.view(len(scale), -1, a, b, e).transpose(2, 3).reshape(scale.shape)
    # A copy: the strides of a new tensor, also where a dimension is 1.
    return rows[:, :N].t().clone(memory_format=torch.contiguous_format)


def _pad_rows(rows: Tensor, value: float) -> Tensor:
    added = marlin_layouts.padded_n(len(rows)) - len(rows)
    return F.pad(rows, (0, 0, 0, added), value=value) if added else rows


def _first_rows(rows: Tensor, N: int) -> Tensor:
    return rows if len(rows) == N else rows[:N].clone()  # a view would keep the padding alive


# ---- checks ----


def check_marlin24_meta(meta: Tensor, *, who: str) -> None:
    """Refuse ``meta`` int16 [K/32, 2*Np] that names what are not two places in order.

    Raises:
        ValueError: with the first row and its columns.
    """
    if not _is_ordered(meta):
        check_meta(_untile_meta(meta), who=who)


def check_marlin_parts(
    tag: str,
    shape: tuple[int, ...],
    group_size: int,
    qdata: Tensor,
    scale: Tensor,
    *,
    meta: Tensor | None = None,
    zero_point: Tensor | None = None,
    act_pre_scale: Tensor | None = None,
    who: str,
) -> None:
    """Check shapes, dtypes, devices and strides of parts in ``marlin.v1`` or ``marlin24.v1``.

    Raises:
        ValueError: one disagrees; the message says which.
    """
    if len(shape) != 2:
        raise ValueError(f"{who}: expected shape (N, K), got {tuple(shape)}; a weight is 2-D")
    N, K = shape
    check_shape(N, K, group_size, who=who)
    scale_shape = marlin_layouts.scale_shape(N, K // group_size)
    qdata_shape = marlin_layouts.qdata_shape(tag, N, K)
    expected: list[tuple[str, Tensor, tuple[torch.dtype, ...], tuple[int, ...]]] = [
        ("qdata", qdata, (torch.uint8,), qdata_shape),
        ("scale", scale, SCALE_DTYPES, scale_shape),
    ]
    if meta is not None:
        expected.append(("meta", meta, (torch.int16,), marlin_layouts.meta_shape(N, K)))
    if zero_point is not None:
        dtypes = tuple({scale.dtype: 0, torch.float32: 0})
        expected.append(("zero_point", zero_point, dtypes, scale_shape))
    if act_pre_scale is not None:
        per_k = (1,) if act_pre_scale.numel() == 1 else (K,)
        expected.append(("act_pre_scale", act_pre_scale, SCALE_DTYPES, per_k))
    for name, part, dtypes, part_shape in expected:
        if part.dtype not in dtypes or tuple(part.shape) != part_shape:
            raise ValueError(
                f"{who}: expected {name} {' or '.join(map(dtype_name, dtypes))} "
                f"{list(part_shape)} for N={N} (padded to {marlin_layouts.padded_n(N)}), K={K}, "
                f"group_size={group_size}, got {describe(part)}; the parts are of another weight "
                f"or in another order than {tag}"
            )
        if part.device != qdata.device or not part.is_contiguous():
            raise ValueError(
                f"{who}: expected {name} contiguous on {qdata.device}, where qdata is, got "
                f"strides {tuple(part.stride())} on {part.device}; move it there, and call "
                ".contiguous() on it"
            )
