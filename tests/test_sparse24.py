"""2:4: what is and is not, all ways of being it, and codes that never get lost."""

import itertools

import numpy as np
import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import cases
from cuda_int4.int4 import read_int4
from cuda_int4.marlin import Marlin24Int4
from cuda_int4.packing import pack_nibbles, unpack_nibbles
from cuda_int4.quantize import Int4Config, quantize_
from cuda_int4.sparse24 import check_24, compress_24, expand_24, is_24
from marlin_cases import NONZERO, PAIRS, codes_24, weight
from messages import folded, message

META = {  # which are not zero: which two are kept
    (): (2, 3), (0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3),
    (0, 1): (0, 1), (0, 2): (0, 2), (1, 2): (1, 2), (0, 3): (0, 3), (1, 3): (1, 3), (2, 3): (2, 3),
}  # fmt: skip


def every_way() -> np.ndarray:
    """Codes [n, 4]: all 2:4 fours with the codes 0, 7, 9 and 15 in their places."""
    fours = []
    for places in PAIRS:
        for values in itertools.product((0, 7, 9, 15), repeat=len(places)):
            four = [8, 8, 8, 8]
            for place, value in zip(places, values, strict=True):
                four[place] = value
            fours.append(four)
    return np.array(fours, np.uint8)


def test_every_way_of_being_24_is_kept_and_comes_back():
    fours = every_way()
    assert len(fours) == 1 + 4 * 4 + 6 * 16
    q = np.tile(fours, 8)  # K = 32; each row one way, eight times
    source = weight(q, 32)
    kept, meta = compress_24(source)
    assert kept.dtype == meta.dtype == torch.uint8 and kept.shape == meta.shape == (len(q), 8)
    for four, codes, places in zip(
        fours, unpack_nibbles(kept)[:, :2].tolist(), meta[:, 0].tolist(), strict=True
    ):
        first, second = META[tuple(np.flatnonzero(four != 8).tolist())]
        assert places == first | second << 2
        assert codes == [four[first], four[second]]
    assert torch.equal(expand_24(kept, meta), source.qdata)
    assert torch.equal(Marlin24Int4.pack(source).unpack().qdata, source.qdata)


@pytest.mark.parametrize("places", NONZERO, ids=str)
def test_what_is_24_is_known_for_floats_and_for_codes(places):
    w, q = torch.zeros(3, 64), np.full((3, 64), 8, np.uint8)
    for place in places:
        w[1, 8 + place], q[1, 8 + place] = 0.5, 0  # code 0 is -8, and not zero
    assert is_24(w) == is_24(w.bfloat16()) == is_24(weight(q, 32)) == (len(places) <= 2)
    if len(places) <= 2:
        check_24(w)
        compress_24(weight(q, 32))
    else:
        found = [message(call, weight(q, 32), who="w") for call in (check_24, compress_24)]
        assert found[0] == found[1] and f"got {len(places)} in row 1, columns 8..11" in found[0]


def test_zeros_that_straddle_two_fours_do_not_count():
    w = torch.zeros(1, 8)
    w[0, 2:6] = 1  # two in each four
    assert is_24(w)
    w[0, 1:5] = 1
    w[0, 5] = 0  # three and one
    assert not is_24(w)


def test_a_negative_zero_is_zero_and_nan_is_not():
    assert is_24(torch.tensor([[1.0, -0.0, -0.0, 2.0]]))
    assert not is_24(torch.tensor([[1.0, torch.nan, -0.0, 2.0]]))


def test_zeros_of_an_asymmetric_weight_are_codes_equal_to_its_zero_point():
    q = np.full((2, 64), 3, np.uint8)
    q[0, :2], q[1, 40:42] = 9, 12
    source = weight(q, 32, zero_point=True)
    source.zero_point[:] = 3
    check_24(source)
    source.zero_point[1, 1] = 3.25
    assert_expected_inline(
        folded(message(check_24, source, who="w")),
        """\
w: expected at most 2 non-zero of every 4 consecutive weights of a row, got 4 in row 1, columns
    32..35: -0.25, -0.25, -0.25, -0.25 in int4 (8 such of 32); prune the float model with
    prune_24_ before quantize_, or keep a dense layout""",
    )


def test_weights_that_are_not_24_are_refused_with_the_first_place():
    w = torch.zeros(5, 16, dtype=torch.bfloat16)
    w[3, 8:11] = torch.tensor([0.5, -1e-8, 3])
    w[4] = 1
    calls = [
        (check_24, w),
        (check_24, w[:, :15]),
        (check_24, w.double()),
        (check_24, w[0]),
    ]
    found = [message(call, w, who="layers.0.wq.weight") for call, w in calls]
    assert_expected_inline(
        folded(*found),
        """\
layers.0.wq.weight: expected at most 2 non-zero of every 4 consecutive weights of a row, got 3
    in row 3, columns 8..11: 0.5, -1.00117e-08, 3, 0 (5 such of 20); prune the float model with
    prune_24_ before quantize_, or keep a dense layout
layers.0.wq.weight: expected a weight float16, bfloat16 or float32 [N, K] with K % 4 == 0, got
    bfloat16 [5, 15]; 2:4 counts fours of weights along K
layers.0.wq.weight: expected a weight float16, bfloat16 or float32 [N, K] with K % 4 == 0, got
    float64 [5, 16]; 2:4 counts fours of weights along K
layers.0.wq.weight: expected a weight float16, bfloat16 or float32 [N, K] with K % 4 == 0, got
    bfloat16 [16]; 2:4 counts fours of weights along K""",
    )


def test_dense_int4_weights_are_not_24():
    for case in cases.WEIGHTS[::9]:
        source = read_int4(case.source(seed=0))
        assert not is_24(source)
        assert ("zero_point" if source.zero_point is not None else "non-zero") in message(
            compress_24, source
        )


def test_kept_codes_that_are_zero_come_back_as_such():
    """Others may keep a zero where we would keep another; both expand to the same weight."""
    kept = pack_nibbles(torch.tensor([[8, 5, 8, 8]], dtype=torch.uint8))
    a = expand_24(kept, torch.tensor([[0x4, 0xC]], dtype=torch.uint8))
    b = expand_24(kept, torch.tensor([[0x8, 0xE]], dtype=torch.uint8))
    assert unpack_nibbles(a).tolist() == [[8, 5, 8, 8, 8, 8, 8, 8]]
    assert unpack_nibbles(b).tolist() == [[8, 8, 5, 8, 8, 8, 8, 8]]


def test_a_model_pruned_by_torch_packs():
    """torch.ao.pruning hangs a mask beside the weight; squash_mask leaves a plain weight."""
    from torch.ao.pruning import WeightNormSparsifier

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 70))
    sparsifier = WeightNormSparsifier(
        sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2
    )
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    w = model[0].weight.detach().clone()
    check_24(w)
    packed = Marlin24Int4.pack(quantize_(model, Int4Config(64))[0].weight.unpack())
    assert torch.equal(packed.unpack().dequantize() == 0, model[0].weight.dequantize() == 0)
    assert not packed.unpack().dequantize()[w == 0].any()


@pytest.mark.parametrize("method", ["min_max", "hqq"])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("scale_dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_solver_keeps_zeros_exact(method, group_size, scale_dtype, dtype):
    """Symmetric: 0 is the code 8 whatever the scale is, so 2:4 stays 2:4."""
    w = weight(codes_24(40, 256), 32).dequantize()
    w *= 1 + torch.arange(256) / 300  # off the grid of codes
    w[3], w[4, :32], w[5] = 0, 0, w[5] * 2**-12
    w[6, 0], w[7, ::4] = -0.0, 500 * w[7, ::4]
    check_24(w.to(dtype))
    model = nn.Sequential(nn.Linear(256, 40, dtype=dtype))
    model[0].weight.data = w.to(dtype)
    quantize_(model, Int4Config(group_size, method=method, scale_dtype=scale_dtype))
    canonical = model[0].weight.unpack()
    q = unpack_nibbles(canonical.qdata)
    assert torch.all(q[w.to(dtype) == 0] == 8) and not torch.all(q == 8)
    packed = Marlin24Int4.pack(canonical)
    assert torch.equal(packed.unpack().qdata, canonical.qdata)
