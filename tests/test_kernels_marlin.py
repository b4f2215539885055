"""cuda_int4::linear on marlin.v1 and marlin24.v1, and what their validators refuse.

The CPU kernels read the packed bytes themselves. They are held to float64 of their own arithmetic,
to the weight that a one-hot activation reads back, and to the bits that coalesced.v1 gives.
"""

import itertools

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import kernel_calls
from cuda_int4 import _native
from cuda_int4.int4 import CanonicalInt4
from cuda_int4.marlin_layouts import marlin24_meta_bit_offset
from cuda_int4.packing import pack_nibbles, unpack_nibbles
from cuda_int4.sparse24 import VALID_META
from cuda_int4.tensors import TENSORS, CudaMarlin24Int4Tensor, CudaMarlinInt4Tensor
from kernel_calls import (
    FLOATS,
    INVALID_ARGUMENT,
    assert_rounded_once,
    available_isas,
)
from marlin_cases import codes, codes_24
from messages import folded
from test_kernels_linear import int8_rounded

# N, K, group_size: N within a tile, whole tiles, one more; K of 1, 2, 3, 5 and 17 tile rows and
# 8 + 1; every group size and one group per row.
SHAPES = (
    (1, 32, 32),
    (64, 64, 32),
    (65, 96, 96),
    (13, 160, 32),
    (130, 192, 64),
    (70, 544, 544),
    (100, 384, 128),
    (192, 1280, 256),
    (37, 288, 32),
)
TAGS = ("marlin.v1", "marlin24.v1")
# Per layout: dtypes of scale and zero_point; 2:4 weights are symmetric.
FORMS = [("marlin24.v1", scale, None) for scale in FLOATS] + [
    ("marlin.v1", scale, zero) for scale in FLOATS for zero in (None, *{scale: 0, torch.float32: 0})
]


@pytest.fixture(params=available_isas())
def isa(request):
    return request.param


def canonical(tag, N, K, group_size, scale_dtype, zero_dtype) -> CanonicalInt4:
    """Neighbouring scales differ, and so do zero points, which are fractional and negative."""
    q = codes_24(N, K) if tag == "marlin24.v1" else codes(N, K)
    n, g = np.ogrid[:N, : K // group_size]
    scale = np.ldexp(1 + (n * 37 + g * 11) % 128 / 128, (n + 3 * g) % 5 - 9)
    zero = (n * 29 + g * 17) % 97 / 4 - 4
    return CanonicalInt4(
        pack_nibbles(torch.from_numpy(q)),
        torch.from_numpy(scale).to(scale_dtype),
        None if zero_dtype is None else torch.from_numpy(zero).to(zero_dtype),
        group_size,
    )


def linear(x: Tensor, packed, **keywords) -> Tensor:
    return kernel_calls.linear(
        x,
        packed.qdata,
        packed.scale,
        packed.zero_point,
        packed.group_size,
        meta=packed.meta,
        tag=packed.layout_tag,
        out_features=packed.shape[0] if packed.layout_tag in TAGS else 0,
        **keywords,
    )


def activations(M: int, K: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(dtype)


def exact_weight(source: CanonicalInt4) -> Tensor:
    """From its codes, in float64; the formula once more."""
    q = unpack_nibbles(source.qdata).double()
    zero = torch.tensor(8.0) if source.zero_point is None else source.zero_point
    zero, scale = (
        t.double().expand(source.scale.shape).repeat_interleave(source.group_size, 1)
        for t in (zero, source.scale)
    )
    return (q - zero) * scale


# ---- numbers ----


@pytest.mark.parametrize("activation", ["none", "int8"])
@pytest.mark.parametrize("tag, scale_dtype, zero_dtype", FORMS)
@pytest.mark.parametrize("N, K, group_size", SHAPES)
def test_error_is_that_of_one_rounding(
    N, K, group_size, tag, scale_dtype, zero_dtype, activation, isa
):
    source = canonical(tag, N, K, group_size, scale_dtype, zero_dtype)
    packed, w = TENSORS[tag].from_int4(source), exact_weight(source)
    rows = itertools.cycle((1, 2, 7, 65) if isa != "scalar" else (1, 2))
    for dtype in FLOATS:
        x, bias = activations(next(rows), K, dtype), activations(1, N, dtype)[0]
        y = linear(x, packed, bias=bias, activation=activation, isa=isa)
        exact = (x.double() if activation == "none" else int8_rounded(x)) @ w.T + bias.double()
        assert_rounded_once(y, exact)


@pytest.mark.parametrize("tag, scale_dtype, zero_dtype", FORMS)
@pytest.mark.parametrize("N, K, group_size", SHAPES)
def test_one_hot_activations_read_back_the_weight(
    N, K, group_size, tag, scale_dtype, zero_dtype, isa
):
    """Every weight of the tensor: an index bug moves a value, it cannot blur it."""
    source = canonical(tag, N, K, group_size, scale_dtype, zero_dtype)
    y = linear(torch.eye(K), TENSORS[tag].from_int4(source), isa=isa)
    assert torch.equal(y.T, source.dequantize())


@pytest.mark.parametrize("activation", ["none", "int8"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tag", TAGS)
def test_the_bits_are_those_of_coalesced(tag, dtype, activation, isa):
    """Also beyond one pass over the rows of x, and beyond as many tiles as scratch has room for."""
    for N, K, group_size, M in ((2112, 64, 32, 3), (100, 256, 64, 150), (2113, 32, 32, 130)):
        if isa == "scalar" and M > 3:
            continue
        source = canonical(tag, N, K, group_size, torch.bfloat16, None)
        x = activations(M, K, dtype)
        y, expected = (
            linear(x, TENSORS[layout].from_int4(source), activation=activation, isa=isa)
            for layout in (tag, "coalesced.v1")
        )
        assert torch.equal(y, expected)


@pytest.mark.parametrize("tag", TAGS)
def test_leading_dimensions_and_no_rows_at_all(tag, isa):
    packed = TENSORS[tag].from_int4(canonical(tag, 70, 64, 32, torch.float16, None))
    x = activations(6, 64, torch.bfloat16)
    y = linear(x.view(1, 2, 3, 64), packed, isa=isa)
    assert y.shape == (1, 2, 3, 70) and torch.equal(y.view(6, 70), linear(x, packed, isa=isa))
    assert linear(x[0], packed, isa=isa).shape == (70,)
    assert linear(x[:0], packed, isa=isa).shape == (0, 70)


@pytest.mark.parametrize("tag", TAGS)
def test_padding_is_not_looked_at_where_it_could_hurt(tag, isa):
    """Rows beyond N are computed or not: what they hold must not reach y."""
    source = canonical(tag, 70, 64, 32, torch.float16, None)
    packed = TENSORS[tag].from_int4(source)
    x = activations(3, 64, torch.float16)
    expected = linear(x, packed, isa=isa)
    order = CudaMarlinInt4Tensor if tag == "marlin.v1" else CudaMarlin24Int4Tensor
    loud = order.from_int4(
        CanonicalInt4(
            torch.cat([source.qdata, source.qdata[:58]]),
            torch.cat([source.scale, torch.full((58, 2), torch.inf).half()]),
            None,
            32,
        )
    )
    y = kernel_calls.linear(
        x, loud.qdata, loud.scale, None, 32, meta=loud.meta, tag=tag, out_features=70, isa=isa
    )
    assert torch.equal(y, expected)


# ---- refusals ----

NAME = b"layers.0.wq.weight"


def status(tag, op="linear", **changes) -> tuple[int, str]:
    """A valid call [3, 64] x [70, 64] of group size 32, with some of it changed."""
    packed = TENSORS[tag].from_int4(canonical(tag, 70, 64, 32, torch.bfloat16, None))
    y = torch.full((3, 70), float("nan")).bfloat16()
    parts = {
        "x": torch.ones(3, 64, dtype=torch.bfloat16),
        "qdata": packed.qdata,
        "scale": packed.scale,
        "zero_point": None if tag == "marlin24.v1" else torch.ones_like(packed.scale),
        "meta": packed.meta,
        "bias": torch.ones(70, dtype=torch.bfloat16),
        "y": y,
        "group_size": 32,
        "layout_tag": tag.encode(),
        "activation": b"none",
        "name": NAME,
        "out_features": 70,
    } | changes
    args = _native.LinearArgs()
    for field, value in parts.items():
        is_plain = isinstance(value, int | bytes | _native.TensorView)
        setattr(args, field, value if is_plain else _native.tensor_view(value))
    found = kernel_calls.run(op, args)
    assert found[0] == kernel_calls.OK or y.isnan().all(), "y was written by a refused call"
    return found


def refusals(tag: str, *calls: dict, code: int = INVALID_ARGUMENT) -> str:
    found = [status(tag, **changes) for changes in calls]
    assert [code_of for code_of, _ in found] == [code] * len(calls)
    return folded(*(message for _, message in found))


@pytest.mark.parametrize("tag", TAGS)
def test_the_call_itself_is_right(tag):
    for op in ("linear", "linear_weight", "linear_values"):
        assert status(tag, op) == (kernel_calls.OK, "")


def shifted(tensor: Tensor, nbytes: int) -> Tensor:
    """The same values at an address that is `nbytes` past a multiple of 64."""
    whole = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    first = -whole.data_ptr() % 64 + nbytes
    copy = whole[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def test_a_wrong_part_of_a_dense_weight():
    packed = CudaMarlinInt4Tensor.from_int4(
        canonical("marlin.v1", 70, 64, 32, torch.bfloat16, torch.float32)
    )
    qdata, scale, zero_point = packed.qdata, packed.scale, packed.zero_point
    assert_expected_inline(
        refusals(
            "marlin.v1",
            {"qdata": None},
            {"qdata": qdata.view(torch.int8)},
            {"qdata": qdata.view(torch.int32)},
            {"qdata": qdata.view(4, 8, 128)},
            {"qdata": qdata[:, :512].contiguous()},
            {"qdata": qdata[:, :960].contiguous()},
            {"qdata": qdata[:3]},
            {"qdata": qdata.T.contiguous().T},
            {"qdata": shifted(qdata, 8)},
            {"out_features": 0},
            {"out_features": 64},
            {"out_features": 129},
            {"out_features": -1},
            {"out_features": 71},
            {"scale": scale[:1]},
            {"scale": scale.view(128, 2)},
            {"scale": scale.double()},
            {"scale": shifted(scale, 8)},
            {"zero_point": zero_point[:1]},
            {"zero_point": zero_point.half()},
            {"zero_point": shifted(zero_point, 4)},
            {"meta": torch.zeros(2, 256, dtype=torch.int16)},
            {"bias": torch.ones(128, dtype=torch.bfloat16)},
            {"group_size": 16},
            {"group_size": 64},
            {"activation": b"int4"},
            {"x": torch.ones(3, 128, dtype=torch.bfloat16)},
            {"y": torch.full((3, 128), float("nan"), dtype=torch.bfloat16)},
        ),
        """\
layers.0.wq.weight: expected a tensor as qdata, got none; the weight is damaged or was packed
    for something else, pack it again
layers.0.wq.weight: expected qdata of dtype uint8 (codes 0..15), got int8; the weight is damaged
    or was packed for something else, pack it again
layers.0.wq.weight: expected qdata of dtype uint8 (codes 0..15), got int32; the weight is
    damaged or was packed for something else, pack it again
layers.0.wq.weight: expected qdata [K/16, 8*Np] with N and K in 1..2147483647, got [4, 8, 128];
    the weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected out_features in 1..64, as marlin.v1 pads N to 64, got 70; state the
    N of the weight, without padding, in the call
layers.0.wq.weight: expected qdata [K/16, 8*Np] of marlin.v1, Np a multiple of 64 and K in
    1..2147483647, got [4, 960]; the weight is damaged or was packed for something else, pack it
    again
layers.0.wq.weight: expected K % 32 == 0 and K % group_size == 0, got K=48, group_size=32; pick
    a group_size that divides K, or pad K
layers.0.wq.weight: expected qdata [4, 1024] contiguous (stride 1 in dimension 1), got stride 4;
    the weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected qdata at an address that is a multiple of 16 bytes, got one 8 past
    it; copy the tensor (.clone()) so that it starts on its own allocation
layers.0.wq.weight: expected out_features in 65..128, as marlin.v1 pads N to 128, got 0; state
    the N of the weight, without padding, in the call
layers.0.wq.weight: expected out_features in 65..128, as marlin.v1 pads N to 128, got 64; state
    the N of the weight, without padding, in the call
layers.0.wq.weight: expected out_features in 65..128, as marlin.v1 pads N to 128, got 129; state
    the N of the weight, without padding, in the call
layers.0.wq.weight: expected out_features in 65..128, as marlin.v1 pads N to 128, got -1; state
    the N of the weight, without padding, in the call
layers.0.wq.weight: expected bias of shape [71], got [70]; pass a contiguous bias of shape [N]
layers.0.wq.weight: expected scale of shape [2, 128], got [1, 128]; the weight is damaged or was
    packed for something else, pack it again
layers.0.wq.weight: expected scale of shape [2, 128], got [128, 2]; the weight is damaged or was
    packed for something else, pack it again
layers.0.wq.weight: expected scale of dtype float16, bfloat16 or float32, got float64; the
    weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected scale at an address that is a multiple of 16 bytes, got one 8 past
    it; copy the tensor (.clone()) so that it starts on its own allocation
layers.0.wq.weight: expected zero_point of shape [2, 128], got [1, 128]; the weight is damaged
    or was packed for something else, pack it again
layers.0.wq.weight: expected zero_point of dtype bfloat16 (scale's) or float32, got float16; the
    weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected zero_point at an address that is a multiple of 16 bytes, got one 4
    past it; copy the tensor (.clone()) so that it starts on its own allocation
layers.0.wq.weight: expected no meta (marlin.v1 is dense), got [2, 256]; the weight is damaged
    or was packed for something else, pack it again
layers.0.wq.weight: expected bias of shape [70], got [128]; pass a contiguous bias of shape [N]
layers.0.wq.weight: expected group_size 32, 64, 128, 256 or K=64, got 16; quantize with one of
    these
layers.0.wq.weight: expected scale of shape [1, 128], got [2, 128]; the weight is damaged or was
    packed for something else, pack it again
layers.0.wq.weight: expected activation "none" (w4a16) or "int8" (w4a8), got "int4"; export the
    model again
layers.0.wq.weight: expected x [..., K=64], got [3, 128]; fix the call: it disagrees with the
    weight
layers.0.wq.weight: expected y of shape [3, 70], got [3, 128]; allocate y of shape [..., N] and
    the dtype of x""",
    )


def test_a_wrong_part_of_a_sparse_weight():
    packed = CudaMarlin24Int4Tensor.from_int4(
        canonical("marlin24.v1", 70, 64, 32, torch.bfloat16, None)
    )
    qdata, meta, scale = packed.qdata, packed.meta, packed.scale
    assert_expected_inline(
        refusals(
            "marlin24.v1",
            {"qdata": qdata.repeat(2, 1)},
            {"qdata": shifted(qdata, 8)},
            {"out_features": 0},
            {"out_features": 64},
            {"zero_point": torch.full_like(scale, 8.0)},
            {"meta": None},
            {"meta": meta.to(torch.int32)},
            {"meta": meta.view(torch.uint8)},
            {"meta": meta[:1]},
            {"meta": meta.view(128, 4)},
            {"meta": meta.T.contiguous().T},
            {"meta": shifted(meta, 8)},
            {"scale": scale[:, :64].contiguous()},
            {"group_size": 64},
        ),
        """\
layers.0.wq.weight: expected scale of shape [4, 128], got [2, 128]; the weight is damaged or was
    packed for something else, pack it again
layers.0.wq.weight: expected qdata at an address that is a multiple of 16 bytes, got one 8 past
    it; copy the tensor (.clone()) so that it starts on its own allocation
layers.0.wq.weight: expected out_features in 65..128, as marlin24.v1 pads N to 128, got 0; state
    the N of the weight, without padding, in the call
layers.0.wq.weight: expected out_features in 65..128, as marlin24.v1 pads N to 128, got 64;
    state the N of the weight, without padding, in the call
layers.0.wq.weight: expected no zero_point (marlin24.v1 is symmetric: what is not kept is 0),
    got [2, 128]; the weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected a tensor as meta, got none; the weight is damaged or was packed for
    something else, pack it again
layers.0.wq.weight: expected meta of dtype int16, got int32; the weight is damaged or was packed
    for something else, pack it again
layers.0.wq.weight: expected meta of dtype int16, got uint8; the weight is damaged or was packed
    for something else, pack it again
layers.0.wq.weight: expected meta of shape [2, 256], got [1, 256]; the weight is damaged or was
    packed for something else, pack it again
layers.0.wq.weight: expected meta of shape [2, 256], got [128, 4]; the weight is damaged or was
    packed for something else, pack it again
layers.0.wq.weight: expected meta [2, 256] contiguous (stride 1 in dimension 1), got stride 2;
    the weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected meta at an address that is a multiple of 16 bytes, got one 8 past
    it; copy the tensor (.clone()) so that it starts on its own allocation
layers.0.wq.weight: expected scale of shape [2, 128], got [2, 64]; the weight is damaged or was
    packed for something else, pack it again
layers.0.wq.weight: expected scale of shape [1, 128], got [2, 128]; the weight is damaged or was
    packed for something else, pack it again""",
    )


def test_what_a_damaged_file_could_claim():
    packed = CudaMarlinInt4Tensor.from_int4(
        canonical("marlin.v1", 70, 64, 32, torch.bfloat16, None)
    )

    def view(tensor, **changes):
        result = _native.tensor_view(tensor)
        for field, value in changes.items():
            if isinstance(value, tuple):
                getattr(result, field)[: len(value)] = value
            else:
                setattr(result, field, value)
        return result

    qdata = packed.qdata
    claims = (
        {"qdata": view(qdata, nbytes=4095)},
        {"qdata": view(qdata, sizes=(2**31 - 1, 512), strides=(512, 1), nbytes=(2**31 - 1) * 512)},
        {"qdata": view(qdata, sizes=(0, 1024), nbytes=0)},
        {"qdata": view(qdata, sizes=(-4, 1024))},
        {"qdata": view(qdata, sizes=(4, 0), nbytes=0)},
        {"qdata": view(qdata, data=None)},
        {"out_features": 2**62},
    )
    assert_expected_inline(
        refusals("marlin.v1", *claims),
        """\
layers.0.wq.weight: expected qdata uint8 [4, 1024] to have 4096 bytes, got 4095; the weight is
    damaged or was packed for something else, pack it again
layers.0.wq.weight: expected qdata [K/16, 8*Np] of marlin.v1, Np a multiple of 64 and K in
    1..2147483647, got [2147483647, 512]; the weight is damaged or was packed for something
    else, pack it again
layers.0.wq.weight: expected qdata [K/16, 8*Np] with N and K in 1..2147483647, got [0, 1024];
    the weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected each size of qdata in 0..2147483647 and at most 281474976710656
    elements, got [-4, 1024]; the weight is damaged or was packed for something else, pack it
    again
layers.0.wq.weight: expected qdata [K/16, 8*Np] with N and K in 1..2147483647, got [4, 0]; the
    weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected qdata to have data, got a null pointer; pass a tensor that owns
    memory
layers.0.wq.weight: expected out_features in 65..128, as marlin.v1 pads N to 128, got
    4611686018427387904; state the N of the weight, without padding, in the call""",
    )


@pytest.mark.parametrize("tag", TAGS)
def test_other_versions_and_the_tag_of_another_order(tag):
    name = tag.removesuffix(".v1")
    for other in (f"{name}.v0", f"{name}.v2", name, "plain.v1"):
        code, message = status(tag, layout_tag=other.encode())
        assert code == kernel_calls.INCOMPATIBLE_LAYOUT and f'"{other}"' in message
    for other in {"coalesced.v1", *TAGS} - {tag}:
        code, message = status(tag, layout_tag=other.encode())
        assert code == INVALID_ARGUMENT and "pack it again" in message


# ---- metadata ----

INVALID = sorted(set(range(16)) - set(VALID_META))


def with_meta(*changes: tuple[int, int, int]) -> Tensor:
    """Meta of the weight of status(), with other values (n, k, value) for weights k .. k + 3."""
    source = canonical("marlin24.v1", 70, 64, 32, torch.bfloat16, None)
    meta = CudaMarlin24Int4Tensor.from_int4(source).meta.clone()
    words = meta.view(-1).numpy().view(np.uint16)
    for n, k, value in changes:
        word, shift = divmod(marlin24_meta_bit_offset(n, k, 70, 64), 16)
        words[word] = words[word] & (0xFFFF ^ 15 << shift) | value << shift
    return meta


@pytest.mark.parametrize("value", INVALID)
def test_places_that_are_not_two_in_order_are_refused(value):
    for n, k in ((0, 0), (1, 60), (37, 16), (69, 32), (64, 4)):
        meta = with_meta((n, k, value))
        code, message = status("marlin24.v1", "linear_values", meta=meta)
        assert code == INVALID_ARGUMENT and message.startswith(f"{NAME.decode()}: expected meta")
        assert f"got {value & 3} and {value >> 2} for row {n}, columns {k}..{k + 3};" in message
        # PyTorch's side says the same of the same bytes, as the tensor is made.
        packed = CudaMarlin24Int4Tensor.from_int4(
            canonical("marlin24.v1", 70, 64, 32, torch.bfloat16, None)
        )
        names, attributes = packed.__tensor_flatten__()
        parts = {name: getattr(packed, name) for name in names} | {"meta": meta}
        with pytest.raises(ValueError, match=rf"in row {n}, columns {k}\.\.{k + 3} "):
            CudaMarlin24Int4Tensor(**parts, **attributes)


def test_the_first_wrong_place_is_named_and_padding_counts():
    changes = (((3, 8, 0), (2, 60, 5)), ((100, 12, 0),))
    found = [status("marlin24.v1", "linear_values", meta=with_meta(*c))[1] for c in changes]
    assert_expected_inline(
        folded(*found),
        """\
layers.0.wq.weight: expected meta to name two places in order, got 1 and 1 for row 2, columns
    60..63; the weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected meta to name two places in order, got 0 and 0 for row 100
    (padding), columns 12..15; the weight is damaged or was packed for something else, pack it
    again""",
    )


@pytest.mark.parametrize("value", VALID_META)
def test_places_in_order_are_taken(value):
    meta = with_meta((5, 20, value), (127, 60, value))
    assert status("marlin24.v1", "linear_values", meta=meta) == (kernel_calls.OK, "")
