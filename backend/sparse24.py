"""2:4 sparsity: of every 4 consecutive weights along K, at most 2 are not zero.

``check_24`` says whether a weight, float or int4, is 2:4 and where it is not. ``compress_24`` and
``expand_24`` change canonical int4 codes to the two kept of each four and their places, and back;
nothing is ever dropped: a weight that is not 2:4 is refused. prune.py makes a model 2:4.

The format of the places (``meta``) is that of NVIDIA's sparse tensor cores: PTX ISA, mma.sp.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .int4 import CanonicalInt4
from .packing import SCALE_DTYPES, SYMMETRIC_ZERO_POINT, describe, unpack_nibbles

# Which two of four weights are kept, by which are not zero (bit i: weight i): first | second << 2.
# Where fewer than two are not zero, the others kept are zeros, and first < second still holds.
_META_OF_NONZERO = {
    0b0000: 0xE, 0b0001: 0x8, 0b0010: 0x9, 0b0100: 0xE, 0b1000: 0xE,
    0b0011: 0x4, 0b0101: 0x8, 0b0110: 0x9, 0b1001: 0xC, 0b1010: 0xD, 0b1100: 0xE,
}  # fmt: skip
VALID_META = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)
_REFUSED = -1  # in the table of compress_24: no entry of it is negative otherwise


def is_24(weight: Tensor | CanonicalInt4) -> bool:
    """Whether at most 2 of every 4 consecutive weights of a row are non-zero; see check_24."""
    return not bool(_crowded(weight, "weight").any())


def check_24(weight: Tensor | CanonicalInt4, *, who: str = "weight") -> None:
    """Refuse a weight that is not 2:4.

    Args:
        weight: float16, bfloat16 or float32 [N, K], K % 4 == 0; or int4, whose zeros are the codes
            that equal the zero point.
        who: its name, for the message.

    Raises:
        ValueError: more than 2 of 4 weights are non-zero; the message has the first such row, its
            columns, their values and how many such places there are.
    """
    crowded = _crowded(weight, who)
    if bool(crowded.any()):
        raise ValueError(_not_24(weight, crowded, who))


def compress_24(weight: CanonicalInt4, *, who: str = "weight") -> tuple[Tensor, Tensor]:
    """Keep two codes of each four, and where they stood.

    What is zero is the weight, not the code: codes are compared with 8, the zero point.

    Args:
        weight: symmetric, 2:4.
        who: its name, for messages.

    Returns:
        Kept codes uint8 [N, K/4], two to a byte, the first in the low nibble; meta uint8 [N, K/4],
        ``first | second << 2`` with first < second, the places (0..3) of the two.

    Raises:
        ValueError: it has zero points, or is not 2:4.
    """
    if weight.zero_point is not None:
        raise ValueError(
            f"{who}: expected a symmetric int4 weight (zero_point None), got zero_point "
            f"{describe(weight.zero_point)}; 2:4 kernels know no zero points: quantise with "
            "Int4Config(symmetric=True)"
        )
    fours = view_as(weight.qdata, torch.int16)  # the 4 codes of weights 4i..4i+3 are one word
    found = _look_up(_compress_table, fours)
    if bool((found == _REFUSED).any()):
        raise ValueError(_not_24(weight, found == _REFUSED, who))
    return found.to(torch.uint8), (found >> 8).to(torch.uint8)  # the first wraps: its low byte


def expand_24(kept: Tensor, meta: Tensor, *, who: str = "weight") -> Tensor:
    """The inverse of :func:`compress_24`: canonical qdata uint8 [N, K/2], 8 where none was kept.

    Args:
        kept: uint8 [N, K/4].
        meta: uint8 [N, K/4], 0..15.
        who: the weight's name.

    Raises:
        ValueError: meta that no two ordered places have.
    """
    words = torch.stack([kept, meta], -1).view(torch.int16).squeeze(-1)
    fours = _look_up(_expand_table, words)
    if bool((fours == 0).any()):  # two of four codes are 8: only what the table lacks is 0
        check_meta(meta, who=who)
    return fours.view(torch.uint8)


def check_meta(meta: Tensor, *, who: str = "weight") -> None:
    """Refuse ``meta`` uint8 [N, K/4] that does not name two places in order.

    Raises:
        ValueError: with the first row and column group.
    """
    valid = torch.zeros(16, dtype=torch.bool, device=meta.device)
    valid[list(VALID_META)] = True
    bad = ~valid[meta.int()]
    if bool(bad.any()):
        row, four = bad.nonzero()[0].tolist()
        value = int(meta[row, four])
        raise ValueError(
            f"{who}: expected meta 'first | second << 2' with first < second, got {value:#x} "
            f"(first {value & 3}, second {value >> 2}) in row {row}, columns {4 * four}.."
            f"{4 * four + 3} ({int(bad.sum())} such in all); the metadata is damaged or of another "
            "order: read the checkpoint again, or pack the weight from its source"
        )


def view_as(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous bytes as wider words; a copy only where they start between two words."""
    aligned = data.storage_offset() % dtype.itemsize == 0
    return (data if aligned else data.clone()).view(dtype)


def _crowded(weight: Tensor | CanonicalInt4, who: str) -> Tensor:
    """Where more than two of four weights are not zero, bool [N, K/4]."""
    if isinstance(weight, CanonicalInt4):
        if weight.zero_point is None:
            return _look_up(_compress_table, view_as(weight.qdata, torch.int16)) == _REFUSED
        groups = unpack_nibbles(weight.qdata).view(*weight.scale.shape, weight.group_size)
        nonzero = groups != weight.zero_point.unsqueeze(-1)
        return nonzero.view(weight.shape[0], -1, 4).sum(-1, dtype=torch.uint8) > 2
    if weight.ndim != 2 or weight.dtype not in SCALE_DTYPES or weight.shape[1] % 4:
        raise ValueError(
            f"{who}: expected a weight float16, bfloat16 or float32 [N, K] with K % 4 == 0, got "
            f"{describe(weight)}; 2:4 counts fours of weights along K"
        )
    fours = (weight != 0).reshape(weight.shape[0], -1, 4)
    return fours.sum(-1, dtype=torch.uint8) > 2


def _not_24(weight: Tensor | CanonicalInt4, crowded: Tensor, who: str) -> str:
    row, four = crowded.nonzero()[0].tolist()
    columns = slice(4 * four, 4 * four + 4)
    values = weight[row, columns] if isinstance(weight, Tensor) else _values(weight, row, columns)
    nonzero = int((values != 0).sum())
    shown = ", ".join(f"{value:g}" for value in values.tolist())
    if not isinstance(weight, Tensor):
        shown += " in int4"
    return (
        f"{who}: expected at most 2 non-zero of every 4 consecutive weights of a row, got "
        f"{nonzero} in row {row}, columns {columns.start}..{columns.stop - 1}: {shown} "
        f"({int(crowded.sum())} such of {crowded.numel()}); prune the float model with prune_24_ "
        "before quantize_, or keep a dense layout"
    )


def _values(weight: CanonicalInt4, row: int, columns: slice) -> Tensor:
    """Of an int4 weight: q - zero_point, which scale cannot make 0 or inf."""
    q = unpack_nibbles(weight.qdata[row : row + 1, columns.start // 2 : columns.stop // 2])[0]
    if weight.zero_point is None:
        return q.float() - SYMMETRIC_ZERO_POINT
    zero_point = weight.zero_point[row, columns.start // weight.group_size]
    return q.float() - zero_point.float()


def _look_up(table: Callable[[torch.device], Tensor], words: Tensor) -> Tensor:
    """``table[words]`` with the 16-bit patterns of words as unsigned indices."""
    index = words.reshape(-1).int().bitwise_and_(0xFFFF)
    return table(words.device).index_select(0, index).view(words.shape)


@functools.cache
def _compress_table(device: torch.device) -> Tensor:
    """int16 [65536]: kept codes | meta << 8 of four codes, or ``_REFUSED``."""
    fours = torch.arange(1 << 16)
    codes = torch.stack([fours >> 4 * i & 15 for i in range(4)])
    nonzero = sum((codes[i] != 8) << i for i in range(4))
    table = torch.full_like(fours, _REFUSED)
    for pattern, meta in _META_OF_NONZERO.items():
        here = nonzero == pattern
        table[here] = (codes[meta & 3] | codes[meta >> 2] << 4 | meta << 8)[here]
    return table.to(device, torch.int16)


@functools.cache
def _expand_table(device: torch.device) -> Tensor:
    """int16 [4096]: four codes of kept codes | meta << 8; 0 where meta is not valid."""
    index = torch.arange(1 << 12)
    low, high = index & 15, index >> 4 & 15
    table = torch.zeros_like(index)
    for meta in VALID_META:
        first, second = meta & 3, meta >> 2
        eights = 0x8888 & ~(15 << 4 * first) & ~(15 << 4 * second)
        here = index >> 8 == meta
        table[here] = (low << 4 * first | high << 4 * second | eights)[here]
    return table.to(device, torch.int16)  # wraps: the pattern of the low 16 bits is what is meant
