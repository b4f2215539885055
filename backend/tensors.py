"""The tensor classes of the layouts: what the parts of each are; int4_tensor.py has the rest.

CudaCoalescedInt4Tensor   coalesced.v1   row-major
CudaMarlinInt4Tensor      marlin.v1      tiles of tensor core fragments
CudaMarlin24Int4Tensor    marlin24.v1    the same, 2:4 sparse: half of the codes
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import marlin_layouts
from .int4 import CanonicalInt4
from .int4_tensor import CudaInt4Tensor
from .layouts import COALESCED, WeightForm, choose_layout
from .marlin import Marlin24Int4, MarlinInt4, check_marlin24_meta, check_marlin_parts
from .marlin_layouts import MARLIN, MARLIN24
from .packing import SYMMETRIC_ZERO_POINT, check_int4_parts, unpack_rows
from .sparse24 import check_24, is_24

__all__ = [
    "TENSORS",
    "CudaCoalescedInt4Tensor",
    "CudaInt4Tensor",
    "CudaMarlin24Int4Tensor",
    "CudaMarlinInt4Tensor",
    "pack_int4",
]

_ATTRIBUTES = ["group_size", "layout_tag", "activation", "shape", "dtype"]


class _DenseInt4Tensor(CudaInt4Tensor):
    """The constructor of layouts that store every code."""

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        group_size: int,
        layout_tag: str,
        activation: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        zero_point: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
    ) -> _DenseInt4Tensor:
        """Check the parts and wrap them; no bytes are copied."""
        return cls._wrapped(
            dict(qdata=qdata, scale=scale, zero_point=zero_point, act_pre_scale=act_pre_scale,
                 group_size=group_size, layout_tag=layout_tag, activation=activation, shape=shape,
                 dtype=dtype)
        )  # fmt: skip

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        group_size: int,
        layout_tag: str,
        activation: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        zero_point: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
    ) -> None:
        """See the class; ``shape`` and ``dtype`` live on the wrapper that ``__new__`` made."""
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.zero_point = zero_point
        self.act_pre_scale = act_pre_scale
        self.group_size = group_size
        self.layout_tag = layout_tag
        self.activation = activation


class CudaCoalescedInt4Tensor(_DenseInt4Tensor):
    """Groupwise int4 weight of a linear layer, shape [N, K]: w = (q - zero_point) * scale.

    Tensors:
        qdata: uint8 [N, K/2], row-major; codes 0..15, the even k in the low nibble.
        scale: float16, bfloat16 or float32 [N, n_groups], row-major, in units of w.
        zero_point: None (8 everywhere), or dtype of scale or float32 [N, n_groups], in units of q.
        act_pre_scale: None, or [1] or [K]; x is multiplied by it before the linear.

    The attributes are those of :class:`CudaInt4Tensor`; ``layout_tag`` is ``"coalesced.v1"``.

    Raises:
        ValueError: the parts disagree with each other or with ``layout_tag``.
    """

    TAG = COALESCED
    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = _ATTRIBUTES
    optional_tensor_data_names = ["zero_point", "act_pre_scale"]

    @classmethod
    def _check_parts(cls, fields: dict[str, Any]) -> None:
        qdata, who = fields["qdata"], cls.__name__
        check_int4_parts(
            qdata, fields["scale"], fields["zero_point"], fields["group_size"],
            fields["act_pre_scale"], who=who,
        )  # fmt: skip
        N, K = qdata.shape[0], qdata.shape[1] * 2
        if tuple(fields["shape"]) != (N, K):
            raise ValueError(
                f"{who}: expected shape [{N}, {K}] for qdata {list(qdata.shape)}, got "
                f"{list(fields['shape'])}; two codes lie in each byte"
            )

    @classmethod
    def _pack(cls, weight: CanonicalInt4, who: str) -> dict[str, Tensor | None]:
        # coalesced.v1 is the canonical order itself: nothing moves.
        return dict(qdata=weight.qdata, scale=weight.scale, zero_point=weight.zero_point)

    def unpack(self) -> CanonicalInt4:
        """The inverse of packing."""
        return CanonicalInt4(
            self.qdata, self.scale, self.zero_point, self.group_size, self.act_pre_scale, self.dtype
        )

    def _code_rows(self, indices: Tensor) -> Tensor:
        return unpack_rows(F.embedding(indices, self.qdata))

    def _scale_rows(self, scale: Tensor, indices: Tensor) -> Tensor:
        return F.embedding(indices, scale)


class CudaMarlinInt4Tensor(_DenseInt4Tensor):
    """Groupwise int4 weight [N, K] in the order of tensor core fragments: ``marlin.v1``.

    Np is N rounded up to 64; the rows added are 0, and ``shape`` is without them. What lies where:
    marlin_layouts.py.

    Tensors:
        qdata: uint8 [K/16, 8*Np]; its bytes are the published int32 [K/16, 2*Np].
        scale: float16, bfloat16 or float32 [n_groups, Np], permuted, in units of w.
        zero_point: None (8 everywhere), or dtype of scale or float32 [n_groups, Np], permuted.
        act_pre_scale: None, or [1] or [K]; x is multiplied by it before the linear.

    The attributes are those of :class:`CudaInt4Tensor`; ``layout_tag`` is ``"marlin.v1"``.

    Raises:
        ValueError: the parts disagree with each other or with ``layout_tag``.
    """

    TAG = MARLIN
    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = _ATTRIBUTES
    optional_tensor_data_names = ["zero_point", "act_pre_scale"]

    @classmethod
    def _check_parts(cls, fields: dict[str, Any]) -> None:
        check_marlin_parts(
            MARLIN, fields["shape"], fields["group_size"], fields["qdata"], fields["scale"],
            zero_point=fields["zero_point"], act_pre_scale=fields["act_pre_scale"],
            who=cls.__name__,
        )  # fmt: skip

    @classmethod
    def _pack(cls, weight: CanonicalInt4, who: str) -> dict[str, Tensor | None]:
        packed = MarlinInt4.pack(weight)
        return dict(qdata=packed.qdata, scale=packed.scale, zero_point=packed.zero_point)

    def unpack(self) -> CanonicalInt4:
        """The inverse of packing; the padding is dropped."""
        return MarlinInt4(
            self.qdata, self.scale, self.zero_point, self.group_size, _shape(self),
            self.act_pre_scale, self.dtype,
        ).unpack()  # fmt: skip

    def _code_rows(self, indices: Tensor) -> Tensor:
        bit_offset = marlin_layouts.marlin_bit_offset
        return _nibbles_of_rows(self.qdata, indices, range(16), bit_offset, self.shape)

    def _scale_rows(self, scale: Tensor, indices: Tensor) -> Tensor:
        place = marlin_layouts.marlin_scale_index(indices, 0, self.shape[0], len(scale))  # type: ignore[arg-type]
        return scale[:, place].movedim(0, -1)


class CudaMarlin24Int4Tensor(CudaInt4Tensor):
    """Groupwise int4 weight [N, K], 2:4 sparse: 2 of each 4 weights, and their places.

    Np is N rounded up to 64; the rows added are 0, and ``shape`` is without them. Symmetric: what
    is not kept is 0. What lies where: marlin_layouts.py.

    Tensors:
        qdata: uint8 [K/32, 8*Np], the kept codes; its bytes are the published int32 [K/32, 2*Np].
        meta: int16 [K/32, 2*Np], the places of the kept.
        scale: float16, bfloat16 or float32 [n_groups, Np], permuted, in units of w.
        act_pre_scale: None, or [1] or [K]; x is multiplied by it before the linear.

    The attributes are those of :class:`CudaInt4Tensor`; ``layout_tag`` is ``"marlin24.v1"``.

    Raises:
        ValueError: the parts disagree with each other or with ``layout_tag``, ``meta`` names what
            are not two places in order, or a weight to pack is not 2:4.
    """

    TAG = MARLIN24
    tensor_data_names = ["qdata", "meta", "scale"]
    tensor_attribute_names = _ATTRIBUTES
    optional_tensor_data_names = ["act_pre_scale"]
    meta: Tensor

    def __new__(
        cls,
        qdata: Tensor,
        meta: Tensor,
        scale: Tensor,
        group_size: int,
        layout_tag: str,
        activation: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        act_pre_scale: Tensor | None = None,
    ) -> CudaMarlin24Int4Tensor:
        """Check the parts and wrap them; no bytes are copied."""
        return cls._wrapped(
            dict(qdata=qdata, meta=meta, scale=scale, act_pre_scale=act_pre_scale,
                 group_size=group_size, layout_tag=layout_tag, activation=activation, shape=shape,
                 dtype=dtype)
        )  # fmt: skip

    def __init__(
        self,
        qdata: Tensor,
        meta: Tensor,
        scale: Tensor,
        group_size: int,
        layout_tag: str,
        activation: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        act_pre_scale: Tensor | None = None,
    ) -> None:
        """See the class; ``shape`` and ``dtype`` live on the wrapper that ``__new__`` made."""
        super().__init__()
        self.qdata = qdata
        self.meta = meta
        self.scale = scale
        self.act_pre_scale = act_pre_scale
        self.group_size = group_size
        self.layout_tag = layout_tag
        self.activation = activation

    @classmethod
    def _check_parts(cls, fields: dict[str, Any]) -> None:
        meta, who = fields["meta"], cls.__name__
        check_marlin_parts(
            MARLIN24, fields["shape"], fields["group_size"], fields["qdata"], fields["scale"],
            meta=meta, act_pre_scale=fields["act_pre_scale"], who=who,
        )  # fmt: skip
        if type(meta) in (Tensor, torch.nn.Parameter) and not meta.is_meta:  # it has values
            check_marlin24_meta(meta, who=who)

    @classmethod
    def _pack(cls, weight: CanonicalInt4, who: str) -> dict[str, Tensor | None]:
        packed = Marlin24Int4.pack(weight, who=who)
        return dict(qdata=packed.qdata, meta=packed.meta, scale=packed.scale)

    def unpack(self) -> CanonicalInt4:
        """The inverse of packing; the padding is dropped."""
        return Marlin24Int4(
            self.qdata, self.meta, self.scale, self.group_size, _shape(self), self.act_pre_scale,
            self.dtype,
        ).unpack()  # fmt: skip

    def _code_rows(self, indices: Tensor) -> Tensor:
        offsets = marlin_layouts.marlin24_bit_offset, marlin_layouts.marlin24_meta_bit_offset
        kept = _nibbles_of_rows(self.qdata, indices, range(16), offsets[0], self.shape)
        places = _nibbles_of_rows(self.meta, indices, range(0, 32, 4), offsets[1], self.shape)
        places, kept = places.unsqueeze(-1), kept.unflatten(-1, (-1, 2))
        second = torch.floor(places * 0.25)
        first = places - 4 * second
        at = torch.arange(4.0, device=kept.device)
        eights = torch.full_like(at, SYMMETRIC_ZERO_POINT)
        codes = torch.where(at == second, kept[..., 1:], eights)
        return torch.where(at == first, kept[..., :1], codes).flatten(-2)

    def _scale_rows(self, scale: Tensor, indices: Tensor) -> Tensor:
        place = marlin_layouts.marlin24_scale_index(indices, 0, self.shape[0], len(scale))  # type: ignore[arg-type]
        return scale[:, place].movedim(0, -1)


TENSORS: dict[str, type[CudaInt4Tensor]] = {
    cls.TAG: cls  # type: ignore[type-abstract]
    for cls in (CudaCoalescedInt4Tensor, CudaMarlinInt4Tensor, CudaMarlin24Int4Tensor)
}


def pack_int4(
    weight: CanonicalInt4, layout: str = "auto", activation: str = "none", *, who: str = "weight"
) -> CudaInt4Tensor:
    """Pack a weight into the layout that ``layout`` says, or that ``"auto"`` picks for it.

    Raises:
        ValueError: the layout does not take this weight: it has zero points, or is not 2:4; the
            message has the first such place.
    """
    tag = choose_layout(layout, form_of(weight, activation), who=who)
    return TENSORS[tag].from_int4(weight, activation, who=who)


def check_packs(
    weight: CanonicalInt4, layout: str = "auto", activation: str = "none", *, who: str = "weight"
) -> None:
    """Refuse what ``pack_int4`` would, and pack nothing.

    Raises:
        ValueError: as of ``pack_int4``.
    """
    tag = choose_layout(layout, form_of(weight, activation), who=who)
    if tag == MARLIN24 and layout != "auto":  # which has looked
        check_24(weight, who=who)


def form_of(weight: CanonicalInt4, activation: str) -> WeightForm:
    """What the choice of a layout may look at."""
    N, K = weight.shape
    return WeightForm(
        N, K, weight.group_size, weight.zero_point is None, lambda: is_24(weight), activation
    )


def _shape(weight: CudaInt4Tensor) -> tuple[int, int]:
    N, K = weight.shape
    return N, K


def _nibbles_of_rows(
    tiles: Tensor,
    indices: Tensor,
    ks: range,
    bit_offset: Callable[..., Any],
    shape: tuple[int, ...],
) -> Tensor:
    """The 4 bits of weights (n, k) in every row of tiles: n of indices [...], [..., rows * ks].

    In float arithmetic, exact for 16 bits, so that an exported lookup needs no bitwise kernel. How
    far a nibble is from the start of its word depends on k alone.
    """
    word_bits = 8 * tiles.dtype.itemsize
    all_ks = torch.tensor(list(ks), device=tiles.device)
    words = bit_offset(indices.unsqueeze(-1), all_ks, *shape) // word_bits
    shifts = [bit_offset(0, k, *shape) % word_bits for k in ks]
    found = tiles[:, words].to(torch.float32).movedim(0, -2)
    found = found - 65536 * torch.floor(found / 65536)  # of int16: as if it had no sign
    powers = torch.tensor([2.0**-shift for shift in shifts], device=tiles.device)
    nibbles = torch.floor(found * powers)
    return (nibbles - 16 * torch.floor(nibbles / 16)).flatten(-2)
