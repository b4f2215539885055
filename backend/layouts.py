"""Layout tags and what each one means: where weight (n, k) and its scale lie in memory.

A tag is a name and a version (``coalesced.v1``). It fixes the order and the encoding of ``qdata``,
``scale`` and ``zero_point``; a new order or encoding gets a new tag, never a reused one. This file
knows nothing of torch: the index maps are plain arithmetic, on ints or on integer arrays.

To add a layout: one entry in ``LAYOUTS``, a class in tensors.py, kernels in backend/kernels/, and a
row of ``choose_auto`` once it is the fastest for some weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from . import marlin_layouts
from .marlin_layouts import MARLIN, MARLIN24

PLAIN = "plain.v1"
COALESCED = "coalesced.v1"

GROUP_SIZES = (32, 64, 128, 256)  # and one group per row: group_size == K
K_MULTIPLE = 32  # every K is a multiple of this; N is free
ACTIVATIONS = ("none", "int8")  # w4a16, w4a8

_TAG = re.compile(r"([a-z][a-z0-9_]*)\.v(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class LayoutTag:
    """The two parts of a tag, such as ``coalesced`` and 1."""

    name: str
    version: int

    @classmethod
    def parse(cls, text: object, *, who: str = "layout_tag") -> LayoutTag:
        """Split ``"coalesced.v1"``; ``who`` names the weight in the message.

        Raises:
            ValueError: ``text`` does not have the form ``name.vN``.
        """
        match = _TAG.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"{who}: expected a layout tag of the form 'name.vN', such as {COALESCED!r}, "
                f"got {text!r}; state the name and the version"
            )
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        """The tag as it is written."""
        return f"{self.name}.v{self.version}"


@dataclass(frozen=True)
class Layout:
    """One memory order. N, K, n_groups are the whole weight's; n, k, g are one element's indices.

    Attributes:
        tag: its name and version.
        runs: whether kernels read it; False for an interchange format.
        qdata_bit_offset: ``(n, k, N, K)`` to the first of the 4 bits of code (n, k), in bits from
            the start of ``qdata``; bit b is bit ``b % 8`` of byte ``b // 8``. Of a sparse layout, k
            counts the codes kept.
        scale_index: ``(n, g, N, n_groups)`` to the element of ``scale`` and of ``zero_point``.
        qdata_shape: ``(N, K)`` to the shape of ``qdata``, uint8.
        scale_shape: ``(N, n_groups)`` to the shape of ``scale`` and of ``zero_point``.
        pads_n: whether N is padded to whole tiles; the op then needs ``out_features``.
        is_sparse: whether it keeps 2 codes of 4, their places in ``meta``, and no zero points.
    """

    tag: str
    runs: bool
    qdata_bit_offset: Callable[[int, int, int, int], int]
    scale_index: Callable[[int, int, int, int], int]
    qdata_shape: Callable[[int, int], tuple[int, ...]]
    scale_shape: Callable[[int, int], tuple[int, ...]]
    pads_n: bool = False
    is_sparse: bool = False


def _row_major_bit_offset(n: int, k: int, N: int, K: int) -> int:
    return 4 * (n * K + k)  # an even k is the low nibble of its byte


LAYOUTS: dict[str, Layout] = {
    layout.tag: layout
    for layout in (
        # What torchao and ExecuTorch exchange: a warp that reads along K would stride over scales.
        Layout(
            tag=PLAIN,
            runs=False,
            qdata_bit_offset=_row_major_bit_offset,
            scale_index=lambda n, g, N, n_groups: g * N + n,
            qdata_shape=lambda N, K: (N, K // 2),
            scale_shape=lambda N, n_groups: (n_groups, N),
        ),
        # The scales of one row are neighbours: 32 lanes on 32 groups of a row read one line.
        Layout(
            tag=COALESCED,
            runs=True,
            qdata_bit_offset=_row_major_bit_offset,
            scale_index=lambda n, g, N, n_groups: n * n_groups + g,
            qdata_shape=lambda N, K: (N, K // 2),
            scale_shape=lambda N, n_groups: (N, n_groups),
        ),
        # Fragments of tensor core instructions, 16 bytes a lane; marlin_layouts.py.
        Layout(
            tag=MARLIN,
            runs=True,
            qdata_bit_offset=marlin_layouts.marlin_bit_offset,
            scale_index=marlin_layouts.marlin_scale_index,
            qdata_shape=lambda N, K: marlin_layouts.qdata_shape(MARLIN, N, K),
            scale_shape=marlin_layouts.scale_shape,
            pads_n=True,
        ),
        # The same of 2:4 sparse instructions: half of the codes.
        Layout(
            tag=MARLIN24,
            runs=True,
            qdata_bit_offset=marlin_layouts.marlin24_bit_offset,
            scale_index=marlin_layouts.marlin24_scale_index,
            qdata_shape=lambda N, K: marlin_layouts.qdata_shape(MARLIN24, N, K),
            scale_shape=marlin_layouts.scale_shape,
            pads_n=True,
            is_sparse=True,
        ),
    )
}
RUNNABLE = tuple(tag for tag, layout in LAYOUTS.items() if layout.runs)


def check_tag(tag: object, *, who: str = "layout_tag", interchange: bool = False) -> Layout:
    """The layout that ``tag`` names.

    Args:
        tag: what was found.
        who: the weight or argument, for the message.
        interchange: also accept a layout that no kernel reads (plain.v1).

    Raises:
        ValueError: malformed, of unknown name, of another version, or not runnable.
    """
    parsed = LayoutTag.parse(tag, who=who)
    layout = LAYOUTS.get(str(parsed))
    if layout is not None:
        if layout.runs or interchange:
            return layout
        raise ValueError(
            f"{who}: expected one of {', '.join(RUNNABLE)}, got {layout.tag}, an interchange "
            "format that no kernel reads; pack it with CudaCoalescedInt4Tensor.from_int4, or lower "
            "through CudaInt4Partitioner, which does"
        )
    known = [t for t in map(LayoutTag.parse, LAYOUTS) if t.name == parsed.name]
    if not known:
        raise ValueError(
            f"{who}: expected one of {', '.join(RUNNABLE)}, got {parsed}, a layout unknown to this "
            "build; install the version of cuda_int4 that wrote it, or pack the weight again"
        )
    newest = max(known, key=lambda t: t.version)
    age, cure = (
        ("newer", "update cuda_int4, or pack the weight again with this version")
        if parsed.version > newest.version
        else ("older", "pack the weight again, from its source, with this version")
    )
    raise ValueError(
        f"{who}: expected {newest}, got {parsed}, {age} than the one this build reads; {cure}"
    )


@dataclass(frozen=True)
class WeightForm:
    """What the choice of a layout may depend on.

    Attributes:
        N, K, group_size: sizes of the weight.
        is_symmetric: it has no zero points.
        is_24: at most 2 of every 4 consecutive weights of a row are not zero. May be a function,
            called only if the choice comes to depend on it.
        activation: ``"none"`` or ``"int8"``.
    """

    N: int
    K: int
    group_size: int
    is_symmetric: bool
    is_24: bool | Callable[[], bool]
    activation: str = "none"


def choose_auto(form: WeightForm) -> str:
    """The layout that ``"auto"`` means for one weight; its table with the reasons: docs/layouts.md.

    A symmetric weight that is 2:4 already goes to ``marlin24.v1``: three quarters of the bytes. Any
    other goes to ``coalesced.v1``, which every kernel reads and which needs no padding.
    """
    if form.is_symmetric and (form.is_24() if callable(form.is_24) else form.is_24):
        return MARLIN24
    return COALESCED


def check_layout(layout: object) -> str:
    """What the option ``layout`` may say: ``"auto"``, a layout's name, or a full tag.

    Returns:
        ``"auto"`` or a tag that runs.

    Raises:
        ValueError: no layout of that name runs.
    """
    if layout == "auto":
        return "auto"
    by_name = {LayoutTag.parse(tag).name: tag for tag in RUNNABLE}
    if layout in by_name:
        return by_name[layout]  # type: ignore[index]
    if isinstance(layout, str) and "." in layout:
        return check_tag(layout, who="layout").tag
    raise ValueError(
        f"layout: expected 'auto' or one of {', '.join(map(repr, by_name))}, got {layout!r}; "
        "'auto' picks for each weight"
    )


def choose_layout(layout: str, form: WeightForm, *, who: str = "layout") -> str:
    """The tag for one weight: what ``layout`` says, or what ``"auto"`` picks.

    Raises:
        ValueError: no layout of that name runs, or the weight does not fit it.
    """
    check_shape(form.N, form.K, form.group_size, who=who)
    tag = check_layout(layout)
    if tag == "auto":
        return choose_auto(form)
    if LAYOUTS[tag].is_sparse and not form.is_symmetric:
        raise ValueError(
            f"{who}: expected a symmetric weight for {tag}, got one with zero points; 2:4 kernels "
            "know none: quantise with Int4Config(symmetric=True), or choose another layout"
        )
    return tag


def check_shape(N: int, K: int, group_size: int, *, who: str) -> None:
    """Check what every layout asks of a weight's shape; ``who`` names it in the message.

    Raises:
        ValueError: N, K or group_size does not fit.
    """
    if N < 1 or K < 1:
        raise ValueError(f"{who}: expected N >= 1 and K >= 1, got N={N}, K={K}; drop the layer")
    if group_size != K and group_size not in GROUP_SIZES:
        raise ValueError(
            f"{who}: expected group_size in {', '.join(map(str, GROUP_SIZES))} or equal to K={K}, "
            f"got group_size={group_size}; quantise again with one of these"
        )
    if K % K_MULTIPLE or K % group_size:
        divisor = max(K_MULTIPLE, group_size) if group_size != K else K_MULTIPLE
        raise ValueError(
            f"{who}: expected K % {divisor} == 0, got K={K}, group_size={group_size}; "
            f"{_cure_for_k(K, divisor)}"
        )


def _cure_for_k(K: int, divisor: int) -> str:
    fits = [size for size in GROUP_SIZES if K % size == 0]
    padded = -(-K // divisor) * divisor
    pad = f"pad K to {padded}"
    return f"pick group_size {' or '.join(map(str, fits))}, or {pad}" if fits else pad
