"""Packing for tensor cores: bytes, exact inverses, padding, refusals, and others' checkpoints."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import cases
import cuda_int4
from cuda_int4 import marlin_layouts as layouts
from cuda_int4.int4 import CanonicalInt4, read_int4
from cuda_int4.marlin import Marlin24Int4, MarlinInt4
from cuda_int4.marlin_checkpoints import read_marlin, read_marlin24
from cuda_int4.packing import pack_nibbles, unpack_nibbles
from cuda_int4.sparse24 import compress_24, is_24
from cuda_int4.tensors import CudaMarlinInt4Tensor
from marlin_cases import SHAPES, codes, codes_24, weight
from messages import folded, message

PARTS = ("qdata", "scale", "zero_point", "meta", "act_pre_scale")


def parts(w) -> dict[str, torch.Tensor]:
    return {name: part for name in PARTS if (part := getattr(w, name, None)) is not None}


def assert_same(a, b):
    assert type(a) is type(b) and parts(a).keys() == parts(b).keys()
    for name, part in parts(a).items():
        assert torch.equal(part, parts(b)[name]), name
        assert part.stride() == torch.empty(part.shape).stride(), name
    assert (a.shape, a.group_size, a.dtype) == (b.shape, b.group_size, b.dtype)


def field(part: torch.Tensor, bits: np.ndarray) -> np.ndarray:
    """The 4 bits of a part that start at each of ``bits``."""
    data = part.view(torch.uint8).numpy().ravel()
    return data[bits // 8] >> (bits % 8) & 15


# ---- bytes ----


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("N, K, group_size", SHAPES)
def test_dense_codes_scales_and_zero_points_are_where_the_maps_say(N, K, group_size, zero_point):
    q = codes(N, K)
    source = weight(q, group_size, zero_point=zero_point)
    packed, n_groups = MarlinInt4.pack(source), K // group_size
    n, k = np.ogrid[:N, :K]
    assert np.array_equal(field(packed.qdata, layouts.marlin_bit_offset(n, k, N, K)), q)
    place = layouts.marlin_scale_index(n, np.arange(n_groups)[None], N, n_groups)
    assert np.array_equal(packed.scale.numpy().ravel()[place], source.scale.numpy())
    if zero_point:
        assert np.array_equal(packed.zero_point.numpy().ravel()[place], source.zero_point.numpy())


@pytest.mark.parametrize("N, K, group_size", SHAPES)
def test_kept_codes_places_and_scales_are_where_the_maps_say(N, K, group_size):
    source = weight(codes_24(N, K), group_size)
    packed, n_groups = Marlin24Int4.pack(source), K // group_size
    kept, meta = compress_24(source)
    n, kc, k = np.arange(N)[:, None], np.arange(K // 2)[None], np.arange(0, K, 4)[None]
    held = field(packed.qdata, layouts.marlin24_bit_offset(n, kc, N, K))
    assert np.array_equal(held, unpack_nibbles(kept).numpy())
    held = field(packed.meta, layouts.marlin24_meta_bit_offset(n, k, N, K))
    assert np.array_equal(held, meta.numpy())
    place = layouts.marlin24_scale_index(n, np.arange(n_groups)[None], N, n_groups)
    assert np.array_equal(packed.scale.numpy().ravel()[place], source.scale.numpy())


@pytest.mark.parametrize("N, K, group_size", [s for s in SHAPES if s[0] % 64])
def test_rows_of_padding_are_zero_whatever_x_is(N, K, group_size):
    Np = layouts.padded_n(N)
    whole = (Np, K)  # the padding read as if it were rows of the weight
    dense = MarlinInt4.pack(weight(codes(N, K), group_size, zero_point=True))
    sparse = Marlin24Int4.pack(weight(codes_24(N, K), group_size))
    for packed in (dense, sparse):
        padding = dataclasses.replace(packed, shape=whole).unpack()
        assert torch.all(padding.qdata[N:] == 0x88) and not padding.scale[N:].any()
        assert padding.zero_point is None or torch.all(padding.zero_point[N:] == 8)
        assert not padding.dequantize()[N:].any() and padding.dequantize()[:N].any()


@pytest.mark.parametrize("n, k", [(0, 0), (0, 1), (64, 15), (63, 16), (37, 94), (64, 95)])
def test_one_weight_is_four_bits_and_moves_no_other(n, k):
    N, K = 65, 96
    q = np.full((N, K), 8, np.uint8)
    zeros = MarlinInt4.pack(weight(q, 32)).qdata, Marlin24Int4.pack(weight(q, 32))
    q[n, k] = 7  # differs from 8 in all four bits
    dense, sparse = MarlinInt4.pack(weight(q, 32)), Marlin24Int4.pack(weight(q, 32))
    first = layouts.marlin_bit_offset(n, k, N, K)
    assert changed_bits(dense.qdata, zeros[0]) == list(range(first, first + 4))
    # It is the first kept but where it stands in the last two places (0xE: 2 and 3).
    kc = k // 4 * 2 + (k % 4 == 3)
    first = layouts.marlin24_bit_offset(n, kc, N, K)
    assert changed_bits(sparse.qdata, zeros[1].qdata) == list(range(first, first + 4))
    first = layouts.marlin24_meta_bit_offset(n, k, N, K)
    nibble = {0: 0x8, 1: 0x9, 2: 0xE, 3: 0xE}[k % 4]
    differs = [first + bit for bit in range(4) if (nibble ^ 0xE) >> bit & 1]
    assert changed_bits(sparse.meta, zeros[1].meta) == differs


def changed_bits(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    difference = (a.view(torch.uint8) ^ b.view(torch.uint8)).numpy().ravel()
    return np.flatnonzero(np.unpackbits(difference, bitorder="little")).tolist()


def test_packed_bytes_are_what_they_were():
    digests = {"marlin.v1": hashlib.sha256(), "marlin24.v1": hashlib.sha256()}
    for N, K, group_size in SHAPES:
        for packed in (
            MarlinInt4.pack(weight(codes(N, K), group_size)),
            MarlinInt4.pack(weight(codes(N, K), group_size, zero_point=True)),
            Marlin24Int4.pack(weight(codes_24(N, K), group_size)),
        ):
            digest = digests["marlin24.v1" if hasattr(packed, "meta") else "marlin.v1"]
            for part in parts(packed).values():
                digest.update(part.view(torch.uint8).numpy().tobytes())
    assert_expected_inline(
        "\n".join(f"{tag} {digest.hexdigest()}" for tag, digest in digests.items()),
        """\
marlin.v1 0c7d798e8857b3e8251679cf9a283673152970c544fa864cd57910b6a197b723
marlin24.v1 32358d91e1596185181e1d0b82a43e7b6bceebacf6011377838d4a3867e1dea1""",
    )


def test_bytes_are_those_of_the_original_packers():
    """Hashes of what IST-DASLab's marlin and Sparse-Marlin make of the same weights.

    They take K and N in multiples of 128 and 256 and groups of 128 or one per row. Sparse-Marlin
    chooses what to keep by the biased code, so for it every four has two weights that are not 0, of
    codes 1..15; then the choice is ours.
    """
    N, K, digest = 512, 256, hashlib.sha256()
    for group_size in (128, 256):
        for packed in (
            MarlinInt4.pack(weight(codes(N, K), group_size)),
            Marlin24Int4.pack(weight(codes_of_pairs(N, K), group_size)),
        ):
            for part in parts(packed).values():
                digest.update(part.view(torch.uint8).numpy().tobytes())
    assert_expected_inline(
        digest.hexdigest(), """578be3bac360d6b1ff8744dd68897ac164e1a67f255eb02ecd3d3dbc02c211ad"""
    )


def codes_of_pairs(N: int, K: int) -> np.ndarray:
    """Codes of a 2:4 weight with exactly two of each four not 0, and no code 0."""
    n, four = np.ogrid[:N, : K // 4]
    pairs = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])[(3 * n + four) % 6]
    q = np.full((N, K // 4, 4), 8, np.uint8)
    values = 1 + codes(N, K // 2).reshape(N, K // 4, 2) % 7  # 1..7, and 9..15 below
    values[..., 1] += 8
    np.put_along_axis(q, pairs, values, -1)
    return q.reshape(N, K)


# ---- meaning ----


@pytest.mark.parametrize("case", cases.WEIGHTS, ids=str)
def test_unpacking_is_the_inverse_of_packing(case):
    source = read_int4(case.source(seed=0))
    assert_same(MarlinInt4.pack(source).unpack(), source)
    assert_same(MarlinInt4.pack(MarlinInt4.pack(source).unpack()), MarlinInt4.pack(source))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("N, K, group_size", SHAPES)
def test_unpacking_is_the_inverse_of_packing_24(N, K, group_size, dtype):
    source = weight(codes_24(N, K), group_size)
    source = dataclasses.replace(source, scale=source.scale.to(dtype), act_pre_scale=torch.ones(K))
    packed = Marlin24Int4.pack(source)
    assert_same(packed.unpack(), source)
    assert_same(Marlin24Int4.pack(packed.unpack()), packed)
    assert packed.qdata.numel() + 2 * packed.meta.numel() == layouts.padded_n(N) * K * 3 // 8


def test_codes_may_start_at_any_byte():
    """As in a file that was mapped: contiguous, but not at a multiple of a word."""
    source = weight(codes_24(64, 96), 32)
    for offset in range(1, 9):
        buffer = torch.zeros(source.qdata.numel() + offset, dtype=torch.uint8)
        qdata = buffer[offset:].view(source.qdata.shape).copy_(source.qdata)
        moved = dataclasses.replace(source, qdata=qdata)
        assert qdata.storage_offset() == offset and is_24(moved)
        for packed in (MarlinInt4.pack(source), Marlin24Int4.pack(source)):
            assert_same(type(packed).pack(moved), packed)
            flat = torch.cat([torch.zeros(offset, dtype=torch.uint8), packed.qdata.view(-1)])
            shifted = flat[offset:].view(packed.qdata.shape)
            assert_same(dataclasses.replace(packed, qdata=shifted).unpack(), source)


def test_what_is_no_part_of_the_order_is_carried():
    source = dataclasses.replace(
        weight(codes_24(3, 64), 64), act_pre_scale=torch.rand(64), dtype=torch.bfloat16
    )
    for packed in (MarlinInt4.pack(source), Marlin24Int4.pack(source)):
        assert packed.act_pre_scale is source.act_pre_scale and packed.shape == (3, 64)
        assert packed.dtype == torch.bfloat16 and packed.scale.dtype == torch.float16
        assert dataclasses.replace(packed, dtype=None).dtype == torch.float16


# ---- refusals ----


def test_what_24_cannot_hold_is_refused():
    asymmetric = weight(codes_24(3, 64), 64, zero_point=True)
    crowded = codes_24(70, 128)
    crowded[66, 40:44] = 9, 8, 0, 15
    crowded[67, :4] = 1, 2, 3, 4
    found = [
        message(Marlin24Int4.pack, asymmetric, who="layers.0.wq.weight"),
        message(Marlin24Int4.pack, weight(crowded, 64), who="layers.0.wq.weight"),
    ]
    assert_expected_inline(
        folded(*found),
        """\
layers.0.wq.weight: expected a symmetric int4 weight (zero_point None), got zero_point float32
    [3, 1]; 2:4 kernels know no zero points: quantise with Int4Config(symmetric=True)
layers.0.wq.weight: expected at most 2 non-zero of every 4 consecutive weights of a row, got 3
    in row 66, columns 40..43: 1, 0, -8, 7 in int4 (2 such of 2240); prune the float model with
    prune_24_ before quantize_, or keep a dense layout""",
    )


def test_meta_that_is_not_two_places_in_order_is_refused():
    packed = Marlin24Int4.pack(weight(codes_24(70, 128), 64))
    for value in range(16):
        bits = layouts.marlin24_meta_bit_offset(69, 100, 70, 128)
        words = packed.meta.clone().view(torch.uint8).view(-1)
        shift = bits % 8
        words[bits // 8] = int(words[bits // 8]) & ~(15 << shift) & 255 | value << shift
        spoiled = dataclasses.replace(packed, meta=words.view(torch.int16).view(packed.meta.shape))
        if value & 3 < value >> 2:
            spoiled.check_values()
            spoiled.unpack()
            continue
        found = message(spoiled.unpack, who="w")
        assert found == message(spoiled.check_values, who="w")
        assert f"got {value:#x}" in found and "in row 69, columns 100..103 (1 such" in found
    assert_expected_inline(
        folded(found),
        """\
w: expected meta 'first | second << 2' with first < second, got 0xf (first 3, second 3) in row
    69, columns 100..103 (1 such in all); the metadata is damaged or of another order: read the
    checkpoint again, or pack the weight from its source""",
    )


def test_parts_that_disagree_are_refused():
    dense = MarlinInt4.pack(weight(codes(70, 128), 64, zero_point=True))
    sparse = Marlin24Int4.pack(weight(codes_24(70, 128), 64))
    changes = [
        (dense, {"shape": (64, 128)}),
        (dense, {"shape": (70, 64)}),
        (dense, {"group_size": 128}),
        (dense, {"group_size": 48}),
        (dense, {"qdata": dense.qdata.view(torch.int32)}),
        (dense, {"qdata": sparse.qdata}),
        (dense, {"scale": dense.scale.double()}),
        (dense, {"zero_point": dense.zero_point.to(torch.int8)}),
        (dense, {"zero_point": dense.zero_point[:1]}),
        (dense, {"zero_point": dense.zero_point.to("meta")}),
        (dense, {"act_pre_scale": torch.ones(3)}),
        (sparse, {"meta": sparse.meta.int()}),
        (sparse, {"meta": sparse.meta.view(-1)}),
        (sparse, {"scale": sparse.scale.t().contiguous().t()}),
    ]
    found = [message(dataclasses.replace, packed, **change) for packed, change in changes]
    assert_expected_inline(
        folded(*found),
        """\
MarlinInt4: expected qdata uint8 [8, 512] for N=64 (padded to 64), K=128, group_size=64, got
    uint8 [8, 1024]; the parts are of another weight or in another order than marlin.v1
MarlinInt4: expected qdata uint8 [4, 1024] for N=70 (padded to 128), K=64, group_size=64, got
    uint8 [8, 1024]; the parts are of another weight or in another order than marlin.v1
MarlinInt4: expected scale float16 or bfloat16 or float32 [1, 128] for N=70 (padded to 128),
    K=128, group_size=128, got float16 [2, 128]; the parts are of another weight or in another
    order than marlin.v1
MarlinInt4: expected group_size in 32, 64, 128, 256 or equal to K=128, got group_size=48;
    quantise again with one of these
MarlinInt4: expected qdata uint8 [8, 1024] for N=70 (padded to 128), K=128, group_size=64, got
    int32 [8, 256]; the parts are of another weight or in another order than marlin.v1
MarlinInt4: expected qdata uint8 [8, 1024] for N=70 (padded to 128), K=128, group_size=64, got
    uint8 [4, 1024]; the parts are of another weight or in another order than marlin.v1
MarlinInt4: expected scale float16 or bfloat16 or float32 [2, 128] for N=70 (padded to 128),
    K=128, group_size=64, got float64 [2, 128]; the parts are of another weight or in another
    order than marlin.v1
MarlinInt4: expected zero_point float16 or float32 [2, 128] for N=70 (padded to 128), K=128,
    group_size=64, got int8 [2, 128]; the parts are of another weight or in another order than
    marlin.v1
MarlinInt4: expected zero_point float16 or float32 [2, 128] for N=70 (padded to 128), K=128,
    group_size=64, got float32 [1, 128]; the parts are of another weight or in another order
    than marlin.v1
MarlinInt4: expected zero_point contiguous on cpu, where qdata is, got strides (128, 1) on meta;
    move it there, and call .contiguous() on it
MarlinInt4: expected act_pre_scale float16 or bfloat16 or float32 [128] for N=70 (padded to
    128), K=128, group_size=64, got float32 [3]; the parts are of another weight or in another
    order than marlin.v1
Marlin24Int4: expected meta int16 [4, 256] for N=70 (padded to 128), K=128, group_size=64, got
    int32 [4, 256]; the parts are of another weight or in another order than marlin24.v1
Marlin24Int4: expected meta int16 [4, 256] for N=70 (padded to 128), K=128, group_size=64, got
    int16 [1024]; the parts are of another weight or in another order than marlin24.v1
Marlin24Int4: expected scale contiguous on cpu, where qdata is, got strides (1, 2) on cpu; move
    it there, and call .contiguous() on it""",
    )
    # Any N that pads to the same Np is a weight of its own: shape alone says which.
    assert dataclasses.replace(dense, shape=(65, 128)).unpack().shape == (65, 128)


# ---- checkpoints ----


@pytest.mark.parametrize("group_size", [128, 256])
def test_a_checkpoint_of_others_reads_as_what_it_was_made_from(group_size):
    dense = weight(codes(128, 256), group_size)
    packed = MarlinInt4.pack(dense)
    B = packed.qdata.view(torch.int32)
    assert B.shape == (256 // 16, 2 * 128)
    read = read_marlin(B, packed.scale)
    assert isinstance(read, CudaMarlinInt4Tensor) and read.layout_tag == "marlin.v1"
    assert torch.equal(read.qdata, packed.qdata) and torch.equal(read.scale, packed.scale)
    assert read_marlin(B, packed.scale).qdata.data_ptr() == B.data_ptr()
    assert_same(read_marlin(B, packed.scale).unpack(), dense)

    sparse = weight(codes_24(128, 256), group_size)
    packed = Marlin24Int4.pack(sparse)
    B, meta = packed.qdata.view(torch.int32), packed.meta
    assert (B.shape, meta.shape) == ((256 // 32, 2 * 128), (256 // 32, 2 * 128))
    for fields in ((B, meta), (B, meta.view(128, 256 // 16)), (B.view(torch.uint32), meta)):
        assert_same(read_marlin24(*fields, packed.scale).unpack(), sparse)
    assert read_marlin24(B, meta, packed.scale, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_checkpoint_of_others_becomes_a_weight_that_runs():
    source = weight(codes_24(128, 256), 128)
    sparse, dense = Marlin24Int4.pack(source), MarlinInt4.pack(source)
    for packed in (
        cuda_int4.read_marlin(dense.qdata.view(torch.int32), dense.scale),
        cuda_int4.read_marlin24(sparse.qdata.view(torch.int32), sparse.meta, sparse.scale),
    ):
        linear = nn.Linear(256, 128, bias=False, dtype=torch.float16)
        x = torch.eye(256, dtype=torch.float16)  # reads the weight back, a column at a time
        for ours in (packed, cuda_int4.CudaCoalescedInt4Tensor.from_int4(packed)):
            linear.weight = nn.Parameter(ours, requires_grad=False)
            assert torch.equal(linear(x).t(), source.dequantize().half())


def test_fields_that_are_of_no_such_checkpoint_are_refused():
    dense, sparse = (
        cls.pack(weight(codes_24(128, 256), 128)) for cls in (MarlinInt4, Marlin24Int4)
    )
    B, B_24, meta, s = (
        dense.qdata.view(torch.int32),
        sparse.qdata.view(torch.int32),
        sparse.meta,
        sparse.scale,
    )
    infinite = torch.where(torch.arange(128) == 5, torch.inf, s)
    damaged = meta.clone()
    damaged[0, 0] = 0
    found = [
        message(read_marlin, *fields, who="layers.0.wq")
        for fields in (
            (dense.qdata, s),
            (B[:, :96], s),
            (B, s[:, :64]),
            (B, s.t()),
            (B, s.repeat(3, 1)[:3]),
            (B, s.repeat(8, 1)),
            (B, infinite),
            (B[:3], s[:1]),
        )
    ] + [
        message(read_marlin24, *fields, who="layers.0.wq")
        for fields in (
            (B_24.view(torch.int16), meta, s),
            (B, meta, s),
            (B_24, meta.int(), s),
            (B_24, meta[:4], s),
            (B_24, damaged, s),
        )
    ]
    assert_expected_inline(
        folded(*found),
        """\
layers.0.wq: expected B int32 [K/16, 2*N] with N % 64 == 0, got uint8 [16, 1024]; it is not
    4-bit in the order of marlin.v1
layers.0.wq: expected B int32 [K/16, 2*N] with N % 64 == 0, got int32 [16, 96]; it is not 4-bit
    in the order of marlin.v1
layers.0.wq: expected s float16, bfloat16 or float32 [n_groups, N] with N=128, as B int32 [16,
    256] has it, got float16 [2, 64]; the fields are of two weights, or of another format
layers.0.wq: expected s float16, bfloat16 or float32 [n_groups, N] with N=128, as B int32 [16,
    256] has it, got float16 [128, 2]; the fields are of two weights, or of another format
layers.0.wq: expected a number of groups that divides K=256, got 3 rows of s; the fields are of
    two weights, or B is not 4-bit
layers.0.wq: expected group_size in 32, 64, 128, 256 or equal to K=256, got group_size=16;
    quantise again with one of these
layers.0.wq: expected finite scales, got 2 of 256 inf or nan; the checkpoint is damaged
layers.0.wq: expected K % 32 == 0, got K=48, group_size=48; pad K to 64
layers.0.wq: expected B_24 int32 [K/32, 2*N] with N % 64 == 0, got int16 [8, 512]; it is not
    4-bit in the order of marlin24.v1
layers.0.wq: expected B_meta int16 [K/32, 2*N] = [16, 256], got int16 [8, 256]; the fields are
    of two weights, or not of the format marlin_24
layers.0.wq: expected B_meta int16 [K/32, 2*N] = [8, 256], got int32 [8, 256]; the fields are of
    two weights, or not of the format marlin_24
layers.0.wq: expected B_meta int16 [K/32, 2*N] = [8, 256], got int16 [4, 256]; the fields are of
    two weights, or not of the format marlin_24
layers.0.wq: expected meta 'first | second << 2' with first < second, got 0x0 (first 0, second
    0) in row 0, columns 0..3 (4 such in all); the metadata is damaged or of another order: read
    the checkpoint again, or pack the weight from its source""",
    )


def test_dense_packing_asks_for_no_value_and_stays_on_the_device():
    """On the meta device only shapes are known; on a GPU nothing waits."""
    q = pack_nibbles(torch.from_numpy(codes(65, 96))).to("meta")
    source = CanonicalInt4(q, torch.ones(65, 3, device="meta"), None, 32)
    packed = MarlinInt4.pack(source)
    assert packed.qdata.is_meta and packed.unpack().qdata.shape == (65, 48)
