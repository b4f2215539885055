"""Reads every int4 weight format we know into one canonical form.

    canonical     w[n, k] = (q[n, k] - zero_point[n, g]) * scale[n, g],  g = k // group_size
    native        w = q * scale + zero          torchao Int4Tensor with int8 qdata: q in -8..7
    executorch    w = (q - zero_point) * scale  Int4Tensor or ExportableInt4Tensor with uint8 qdata
    GGUF Q4_K     w = q * (d * sc) - (dmin * m) one sc and m per 32 weights, one d and dmin per 256

Reading loses nothing: every value equals the source's own definition to a rounding of float32,
``|w_read - w| <= 2**-22 * (16 * |scale| + |w|)``. Zero points may be fractional or negative and are
never clamped. A group whose scale is 0 but whose weights are not (native zero, GGUF min) becomes
q = 0, zero_point = -1, scale = the value, which is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .layouts import check_shape
from .packing import (
    SCALE_DTYPES,
    SYMMETRIC_ZERO_POINT,
    check_int4_parts,
    dequantize_rows,
    describe,
    dtype_name,
    pack_nibbles,
)

Convention = Literal["native", "executorch"]
_Q4_K_BLOCK_BYTES, _Q4_K_BLOCK = 144, 256  # bytes and weights of one GGUF super-block
_Q4_K_GROUP_SIZE = 32


@dataclass(frozen=True, eq=False)
class CanonicalInt4:
    """A groupwise int4 weight [N, K], whatever it was read from.

    Attributes:
        qdata: uint8 [N, K/2], contiguous; codes 0..15, the even k in the low nibble.
        scale: float16, bfloat16 or float32 [N, n_groups], contiguous, in units of w.
        zero_point: dtype of scale or float32 [N, n_groups], contiguous, in units of q; None: 8.
        group_size: weights along K that share a scale; 32, 64, 128, 256 or K.
        act_pre_scale: None, or [1] or [K]; x is multiplied by it before the linear.
        dtype: what the weight stands in for (``weight.dtype``); default the dtype of scale.

    Raises:
        ValueError: the parts disagree with each other.
    """

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int
    act_pre_scale: Tensor | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the parts; values are looked at by the readers below."""
        check_int4_parts(
            self.qdata, self.scale, self.zero_point, self.group_size, self.act_pre_scale
        )
        if self.dtype is None:
            object.__setattr__(self, "dtype", self.scale.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.qdata.shape[0], self.qdata.shape[1] * 2

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The definition, [N, K]; computed in ``dtype`` but at least in float32."""
        return dequantize_rows(self.qdata, self.scale, self.zero_point, self.group_size, dtype)

    def with_scale_dtype(self, dtype: torch.dtype, *, who: str = "weight") -> CanonicalInt4:
        """Scales and zero points in a smaller dtype: less to read per token, values rounded.

        The zero point is refitted, so that what was 0 in w keeps its place: z' = z * s / s'.
        """
        scale, zero_point = self.scale.to(dtype), self.zero_point
        if bool(((scale == 0) & (self.scale != 0)).any()) or not bool(scale.isfinite().all()):
            raise ValueError(
                f"{who}: expected scales within the range of {dtype_name(dtype)}, got "
                f"{float(self.scale.abs().min()):g}..{float(self.scale.abs().max()):g}; "
                "take bfloat16, which has the range of float32"
            )
        if zero_point is not None:
            moved = zero_point.double() * self.scale.double() / scale.double()
            zero_point = torch.where(scale == 0, zero_point.double(), moved).to(dtype)
            _check_finite("zero_point", zero_point, who)
        return CanonicalInt4(
            self.qdata, scale, zero_point, self.group_size, self.act_pre_scale, self.dtype
        )


def read_int4(
    weight: Tensor | CanonicalInt4, convention: Convention | None = None, *, who: str = "weight"
) -> CanonicalInt4:
    """Read an int4 weight of any known kind.

    Args:
        weight: torchao Int4Tensor or IntxUnpackedToInt8Tensor (int4, weight-only), executorch
            ExportableInt4Tensor or ExportableGGUFTensor (Q4_K), or a CanonicalInt4.
        convention: ``"native"`` or ``"executorch"`` where the caller knows better than the dtype
            of qdata (int8: native, uint8: executorch).
        who: the weight's name, for messages.

    Raises:
        ValueError: it contradicts itself, or fits no convention.
        NotImplementedError: sound, but of a kind that is not supported.
    """
    if isinstance(weight, CanonicalInt4):
        return weight
    for kind, reader in _readers().items():
        if isinstance(weight, kind):
            if has_convention(weight):
                return reader(weight, convention, who=who)
            if convention is None:
                return reader(weight, who=who)
            raise ValueError(
                f"{who}: expected no convention for {kind.__name__}, which has one meaning, got "
                f"{convention!r}; leave it out"
            )
    names = ", ".join(kind.__name__ for kind in _readers())
    raise NotImplementedError(
        f"{who}: expected an int4 weight ({names}), got {type(weight).__name__} of "
        f"{describe(weight)}; quantise a float weight with quantize_, rebuild another int4 packing"
        " as Int4Tensor"
    )


def is_readable(weight: object) -> bool:
    """Whether :func:`read_int4` knows this kind of tensor (its contents may still be refused)."""
    return isinstance(weight, (CanonicalInt4, *_readers()))


def has_convention(weight: object) -> bool:
    """Whether this kind of tensor comes in more than one convention."""
    return any(
        isinstance(weight, kind)
        for kind, reader in _readers().items()
        if reader in (from_int4_tensor, from_exportable)
    )


@functools.cache
def _readers() -> dict[type, Callable[..., CanonicalInt4]]:
    # Imported on first use: executorch's modules register their ops in torchao's namespace.
    from executorch.extension.llm.export.gguf import ExportableGGUFTensor
    from executorch.extension.llm.export.int4 import ExportableInt4Tensor
    from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor

    return {
        Int4Tensor: from_int4_tensor,
        ExportableInt4Tensor: from_exportable,
        ExportableGGUFTensor: from_gguf,
        IntxUnpackedToInt8Tensor: from_intx,
    }


def from_int4_tensor(
    weight: Tensor, convention: Convention | None = None, *, who: str = "weight"
) -> CanonicalInt4:
    """Read a torchao ``Int4Tensor``; the dtype of qdata names the convention unless stated."""
    w: Any = weight
    if w.activation_dtype not in (None, *SCALE_DTYPES):
        raise NotImplementedError(
            f"{who}: expected an Int4Tensor with 16-bit activations, got activation_dtype="
            f"{w.activation_dtype}; quantise again with activation_dtype=torch.bfloat16, and ask "
            "for int8 activations with activation='int8'"
        )
    block_size = list(w.block_size)
    _check_block_size(who, block_size)
    if tuple(w.qdata.shape) != (w.shape[0], w.shape[1] // 2):
        raise ValueError(
            f"{who}: expected qdata [N, K/2] = [{w.shape[0]}, {w.shape[1] // 2}] for shape "
            f"{tuple(w.shape)}, got {describe(w.qdata)}; the Int4Tensor contradicts itself"
        )
    if convention is None:
        by_dtype: dict[torch.dtype, Convention] = {torch.int8: "native", torch.uint8: "executorch"}
        convention = by_dtype.get(w.qdata.dtype)
    read = {"native": from_native, "executorch": from_executorch}.get(convention or "")
    if read is None:
        raise ValueError(
            f"{who}: expected qdata int8 (native: signed nibbles, float zero) or uint8 (executorch:"
            f" unsigned nibbles, integer zero point), got {describe(w.qdata)}; state convention="
            f"'native' or 'executorch' (got {convention!r})"
        )
    return read(
        w.qdata,
        w.scale,
        w.zero_point,
        block_size[-1],
        act_pre_scale=w.act_pre_scale,
        dtype=w.dtype,
        who=who,
    )


def from_exportable(
    weight: Tensor, convention: Convention | None = None, *, who: str = "weight"
) -> CanonicalInt4:
    """Read an executorch ``ExportableInt4Tensor``.

    ``ExportableInt4Tensor.from_int4_tensor`` copies the fields of a native Int4Tensor as they are
    and then reads them wrongly; the int8 qdata gives it away, and is refused unless the convention
    is stated.
    """
    w: Any = weight
    if convention is None and w.qdata.dtype != torch.uint8:
        raise ValueError(
            f"{who}: expected an ExportableInt4Tensor with uint8 qdata, got {describe(w.qdata)}: "
            "it was made from a native Int4Tensor, whose nibbles are signed; give prepare_ the "
            "Int4Tensor itself, or state convention='native'"
        )
    read = from_native if convention == "native" else from_executorch
    return read(w.qdata, w.scale, w.zero_point, w.group_size, dtype=w.orig_dtype, who=who)


def from_intx(weight: Tensor, *, who: str = "weight") -> CanonicalInt4:
    """Read a torchao ``IntxUnpackedToInt8Tensor`` of int4, weight-only: one int8 per code."""
    w: Any = weight
    if str(w.target_dtype) != "torch.int4":
        raise NotImplementedError(
            f"{who}: expected target_dtype torch.int4, got {w.target_dtype}; quantise to 4 bits"
        )
    if w.activation_quantization is not None:
        raise NotImplementedError(
            f"{who}: expected a weight-only tensor, got activation_quantization="
            f"{w.activation_quantization}; quantise again weight-only (IntxWeightOnlyConfig) and "
            "ask for int8 activations with activation='int8'"
        )
    _check_block_size(who, list(w.block_size))
    low, high = int(w.qdata.min()), int(w.qdata.max())
    if low < -8 or high > 7:
        raise ValueError(
            f"{who}: expected codes in -8..7, got {low}..{high}; the tensor is not 4-bit"
        )
    return from_executorch(
        pack_nibbles((w.qdata + 8).to(torch.uint8)),
        w.scale.t(),
        w.zero_point.t().double() + 8,
        w.block_size[-1],
        dtype=w.dtype,
        who=who,
    )


def from_gguf(weight: Tensor, *, who: str = "weight") -> CanonicalInt4:
    """Read an executorch ``ExportableGGUFTensor``; see :func:`from_gguf_blocks`."""
    w: Any = weight
    return from_gguf_blocks(w.raw, w.ggml_type, dtype=w.orig_dtype, who=who)


def from_native(
    qdata: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    *,
    act_pre_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    who: str = "weight",
) -> CanonicalInt4:
    """``w = q * scale + zero``: signed nibbles, scale and zero [n_groups, N] in units of w."""
    scale, zero = _rows_first(who, qdata, scale, zero, group_size)
    return _encode(
        qdata.view(torch.uint8) ^ 0x88,  # -8..7 to 0..15
        scale,
        SYMMETRIC_ZERO_POINT - zero.double() / scale.double(),
        zero,
        group_size,
        act_pre_scale,
        dtype,
        who,
    )


def from_executorch(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    *,
    act_pre_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    who: str = "weight",
) -> CanonicalInt4:
    """``w = (q - zero_point) * scale``: unsigned nibbles, scale and zero_point [n_groups, N]."""
    scale, zero_point = _rows_first(who, qdata, scale, zero_point, group_size)
    _check_finite("zero_point", zero_point.float(), who)
    return _encode(
        qdata.view(torch.uint8),
        scale,
        zero_point.double(),
        torch.zeros_like(scale),
        group_size,
        act_pre_scale,
        dtype,
        who,
    )


def from_gguf_blocks(
    raw: Tensor, ggml_type: str, *, dtype: torch.dtype | None = None, who: str = "weight"
) -> CanonicalInt4:
    """GGUF Q4_K blocks, uint8 [N, K/256*144]; scales are float32, as d * sc does not fit fp16.

    One block, 256 weights: fp16 d, fp16 dmin, 12 bytes with eight 6-bit sc and eight 6-bit m, then
    four runs of 32 bytes; byte j of run r has weight 64r + j below and weight 64r + 32 + j above.
    """
    if ggml_type != "q4_k":
        raise NotImplementedError(
            f"{who}: expected a GGUF tensor of type q4_k, got {ggml_type}; quantise it to Q4_K, or "
            "dequantise it and quantise again with quantize_"
        )
    if raw.ndim != 2 or raw.dtype != torch.uint8 or raw.shape[1] % _Q4_K_BLOCK_BYTES:
        raise ValueError(
            f"{who}: expected Q4_K blocks uint8 [N, 144 * K/256], got {describe(raw)}; the tensor "
            "is truncated or of another type"
        )
    N, n_blocks = raw.shape[0], raw.shape[1] // _Q4_K_BLOCK_BYTES
    block = raw.reshape(N, n_blocks, _Q4_K_BLOCK_BYTES)
    d, dmin = block[..., :4].contiguous().view(torch.float16).float().split(1, dim=-1)
    a, b, c = block[..., 4:16].split(4, dim=-1)
    sc = torch.cat([a & 63, (c & 15) | (a >> 6 << 4)], dim=-1)
    m = torch.cat([b & 63, (c >> 4) | (b >> 6 << 4)], dim=-1)
    scale, minimum = (d * sc).reshape(N, -1), (dmin * m).reshape(N, -1)
    even, odd = block[..., 16:].reshape(N, -1, 32)[..., ::2], block[..., 17::2].reshape(N, -1, 16)
    qdata = torch.cat([(even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0)], dim=-1)
    return _encode(
        qdata.reshape(N, n_blocks * _Q4_K_BLOCK // 2),
        scale,
        minimum.double() / scale.double(),
        -minimum,
        _Q4_K_GROUP_SIZE,
        None,
        dtype,
        who,
    )


def _encode(
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    constant: Tensor,
    group_size: int,
    act_pre_scale: Tensor | None,
    dtype: torch.dtype | None,
    who: str,
) -> CanonicalInt4:
    """Settle groups without a scale, and the dtype of the zero points.

    Args:
        qdata: uint8 [N, K/2], possibly the source's own memory: copied before it is changed.
        scale: [N, n_groups].
        zero_point: float64 [N, n_groups]; anything where scale is 0.
        constant: what a group's weights are where its scale is 0, [N, n_groups].
        group_size: weights per group.
        act_pre_scale: of the source, any broadcastable shape.
        dtype: of the canonical weight.
        who: the weight's name.
    """
    _check_finite("scale", scale, who)
    _check_finite("zero_point", constant, who)
    # A zero point beyond float32 belongs to a scale that vanishes beside the weights: constant too.
    flat = (scale == 0) | ~zero_point.float().isfinite()
    if bool(flat.any()):
        if not torch.equal(constant.to(scale.dtype).to(constant.dtype)[flat], constant[flat]):
            scale = scale.float()
        scale = torch.where(flat, constant.to(scale.dtype), scale)
        filled = flat & (constant != 0)
        zero_point = torch.where(filled, -1.0, torch.where(flat, SYMMETRIC_ZERO_POINT, zero_point))
        groups = qdata.reshape(*scale.shape, group_size // 2)
        qdata = torch.where(filled.unsqueeze(-1), 0, groups).reshape(qdata.shape)
    _check_finite("zero_point", zero_point, who)
    zero_point_or_none = _narrow_zero_point(zero_point, scale.dtype)
    return CanonicalInt4(
        _dense(qdata),
        _dense(scale),
        None if zero_point_or_none is None else _dense(zero_point_or_none),
        group_size,
        _flat_pre_scale(who, act_pre_scale, 2 * qdata.shape[1]),
        dtype,
    )


def _narrow_zero_point(zero_point: Tensor, scale_dtype: torch.dtype) -> Tensor | None:
    """None if all are 8, else in scale's dtype if all fit it, else in float32."""
    if bool((zero_point == SYMMETRIC_ZERO_POINT).all()):
        return None
    narrow = zero_point.to(scale_dtype)
    exact = torch.equal(narrow.double(), zero_point)
    return narrow if exact else zero_point.float()


def _dense(t: Tensor) -> Tensor:
    """Row-major, with the strides of a new tensor also where a dimension is 1."""
    return t.contiguous().view(-1).view(t.shape)


def _flat_pre_scale(who: str, act_pre_scale: Tensor | None, K: int) -> Tensor | None:
    if act_pre_scale is None:
        return None
    _check_finite("act_pre_scale", act_pre_scale, who)
    if act_pre_scale.numel() == 1 or (
        act_pre_scale.numel() == K and act_pre_scale.ndim and act_pre_scale.shape[-1] == K
    ):
        return _dense(act_pre_scale.reshape(-1))
    raise ValueError(
        f"{who}: expected act_pre_scale with 1 value or K={K} along its last dimension, got "
        f"{describe(act_pre_scale)}; it multiplies x along K"
    )


def _rows_first(
    who: str, qdata: Tensor, scale: Tensor, zero: Tensor, group_size: int
) -> tuple[Tensor, Tensor]:
    """[n_groups, N] to [N, n_groups], after checking that it is [n_groups, N]."""
    if qdata.ndim != 2 or qdata.dtype not in (torch.int8, torch.uint8):
        raise ValueError(
            f"{who}: expected qdata int8 or uint8 [N, K/2], got {describe(qdata)}; only 2-D "
            "weights are supported, a stack of experts must be split into one weight each"
        )
    N, K = qdata.shape[0], qdata.shape[1] * 2
    check_shape(N, K, group_size, who=who)
    if scale.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{who}: expected scale float16, bfloat16 or float32, got {dtype_name(scale.dtype)}; "
            "cast it to one of them"
        )
    for name, part in (("scale", scale), ("zero_point", zero)):
        if tuple(part.shape) != (K // group_size, N):
            raise ValueError(
                f"{who}: expected {name} [n_groups, N] = [{K // group_size}, {N}], got "
                f"{describe(part)}; the weight contradicts its block_size or shape"
            )
    return scale.t(), zero.t()


def _check_block_size(who: str, block_size: list[int]) -> None:
    if len(block_size) != 2 or block_size[0] != 1:
        raise NotImplementedError(
            f"{who}: expected a 2-D weight with block_size [1, group_size], got block_size="
            f"{block_size}; quantise again along K, one weight at a time"
        )


def _check_finite(name: str, part: Tensor, who: str) -> None:
    finite = part.isfinite()
    if not bool(finite.all()):
        first = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{who}: expected finite {name}, got {part[tuple(first)].item()} at {first} "
            f"({int((~finite).sum())} in all); quantise again from weights without inf and nan"
        )
