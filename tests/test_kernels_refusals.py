"""What the kernels' validators refuse: each with its own message, and before y is touched."""

import torch
from expecttest import assert_expected_inline

import kernel_calls
from cuda_int4 import _native
from kernel_calls import INCOMPATIBLE_LAYOUT, INVALID_ARGUMENT, UNSUPPORTED
from messages import folded

NAME = b"layers.0.wq.weight"


def linear_status(isa="scalar", op="linear", **changes) -> tuple[int, str]:
    """A valid call [3, 64] x [8, 64] of group size 32, with some of it changed."""
    y = torch.full((3, 8), float("nan")).bfloat16()
    parts = {
        "x": torch.ones(3, 64, dtype=torch.bfloat16),
        "qdata": torch.zeros(8, 32, dtype=torch.uint8),
        "scale": torch.ones(8, 2, dtype=torch.bfloat16),
        "zero_point": torch.ones(8, 2, dtype=torch.bfloat16),
        "meta": None,
        "bias": torch.ones(8, dtype=torch.bfloat16),
        "y": y,
        "group_size": 32,
        "layout_tag": b"coalesced.v1",
        "activation": b"none",
        "name": NAME,
    } | changes
    args = _native.LinearArgs()
    for field, value in parts.items():
        is_plain = isinstance(value, int | bytes | _native.TensorView)
        setattr(args, field, value if is_plain else _native.tensor_view(value))
    status = kernel_calls.run(op, args, isa)
    assert status[0] == kernel_calls.OK or y.isnan().all(), "y was written by a refused call"
    return status


def refusals(code: int, *calls: dict) -> str:
    """The messages of calls that all fail with ``code``, folded."""
    found = [linear_status(**changes) for changes in calls]
    assert [status for status, _ in found] == [code] * len(calls)
    return folded(*(message for _, message in found))


def view(tensor, **changes):
    """The tensor's view with fields overwritten: what a damaged file could hold."""
    result = _native.tensor_view(tensor)
    for field, value in changes.items():
        if isinstance(value, tuple):
            getattr(result, field)[: len(value)] = value
        else:
            setattr(result, field, value)
    return result


def test_the_call_itself_is_right():
    assert linear_status() == (kernel_calls.OK, "")


def test_each_wrong_layout_has_its_own_message():
    tags = (b"plain.v1", b"coalesced.v0", b"coalesced.v2", b"zigzag.v1", b"coalesced", b"")
    # A square weight: [n_groups, N] scales have the shape of [N, n_groups]; the tag alone tells.
    square = {"qdata": torch.zeros(2, 32, dtype=torch.uint8), "bias": None}
    square |= {name: torch.ones(2, 2, dtype=torch.bfloat16) for name in ("scale", "zero_point")}
    square |= {"y": torch.zeros(3, 2).bfloat16(), "layout_tag": b"plain.v1"}
    assert_expected_inline(
        refusals(INCOMPATIBLE_LAYOUT, *({"layout_tag": tag} for tag in tags), square),
        """\
layers.0.wq.weight: expected packed weights (coalesced.v1, marlin.v1, marlin24.v1), got
    "plain.v1", torchao's interchange order with scales [n_groups, N], which no kernel reads;
    export through CudaInt4Partitioner, or pack with CudaCoalescedInt4Tensor.from_int4
layers.0.wq.weight: expected layout coalesced.v1, got the older "coalesced.v0", whose bytes mean
    something else; export the model again with this version
layers.0.wq.weight: expected layout coalesced.v1, got the newer "coalesced.v2", which this build
    cannot read; update executorch-cuda-int4, or export again with this version
layers.0.wq.weight: expected a layout this build knows (coalesced.v1, marlin.v1, marlin24.v1),
    got "zigzag.v1"; install the version of executorch-cuda-int4 that wrote it, or export again
    with this one
layers.0.wq.weight: expected a layout tag of the form name.vN (coalesced.v1, marlin.v1,
    marlin24.v1), got "coalesced"; export the model again
layers.0.wq.weight: expected a layout tag (coalesced.v1, marlin.v1, marlin24.v1), got none; pack
    the weight with CudaCoalescedInt4Tensor.from_int4, which writes its tag, or export again
layers.0.wq.weight: expected packed weights (coalesced.v1, marlin.v1, marlin24.v1), got
    "plain.v1", torchao's interchange order with scales [n_groups, N], which no kernel reads;
    export through CudaInt4Partitioner, or pack with CudaCoalescedInt4Tensor.from_int4""",
    )


def test_a_wrong_part_of_the_weight():
    bytes_of_8_by_64 = torch.zeros(8, 64, dtype=torch.uint8)
    halves = torch.ones(2, 8, dtype=torch.bfloat16)
    shifted = torch.zeros(8 * 32 + 1, dtype=torch.uint8)[1:].view(8, 32)
    assert_expected_inline(
        refusals(
            INVALID_ARGUMENT,
            {"qdata": None},
            {"qdata": torch.zeros(8, 32, dtype=torch.int8)},
            {"qdata": torch.zeros(8, 8, 4, dtype=torch.uint8)},
            {"qdata": bytes_of_8_by_64[:, ::2]},
            {"qdata": shifted},
            {"scale": halves},
            {"scale": halves.t()},
            {"scale": torch.ones(8, 2, dtype=torch.float64)},
            {"zero_point": torch.ones(8, 1, dtype=torch.bfloat16)},
            {"zero_point": torch.ones(8, 2, dtype=torch.float16)},
            {"zero_point": torch.ones(8, 2, dtype=torch.uint8)},
            {"meta": torch.zeros(1)},
            {"bias": torch.ones(9, dtype=torch.bfloat16)},
            {"bias": torch.ones(8)},
            {"group_size": 16},
            {"group_size": 128},
            {"group_size": 0},
            {"group_size": 64},
            {"qdata": torch.zeros(8, 24, dtype=torch.uint8), "group_size": 48},
            {"activation": b"int4"},
        ),
        """\
layers.0.wq.weight: expected a tensor as qdata, got none; the weight is damaged or was packed
    for something else, pack it again
layers.0.wq.weight: expected qdata of dtype uint8 (codes 0..15), got int8; the weight is damaged
    or was packed for something else, pack it again
layers.0.wq.weight: expected qdata [N, K/2] with N and K in 1..2147483647, got [8, 8, 4]; the
    weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected qdata [8, 32] contiguous (stride 1 in dimension 1), got stride 2;
    the weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected qdata at an address that is a multiple of 16 bytes, got one 1 past
    it; copy the tensor (.clone()) so that it starts on its own allocation
layers.0.wq.weight: expected scale of shape [8, 2], got [2, 8]; the weight is damaged or was
    packed for something else, pack it again
layers.0.wq.weight: expected scale [8, 2] contiguous (stride 1 in dimension 1), got stride 8;
    the weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected scale of dtype float16, bfloat16 or float32, got float64; the
    weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected zero_point of shape [8, 2], got [8, 1]; the weight is damaged or
    was packed for something else, pack it again
layers.0.wq.weight: expected zero_point of dtype bfloat16 (scale's) or float32, got float16; the
    weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected zero_point of dtype bfloat16 (scale's) or float32, got uint8; the
    weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected no meta (coalesced.v1 is dense), got [1]; the weight is damaged or
    was packed for something else, pack it again
layers.0.wq.weight: expected bias of shape [8], got [9]; pass a contiguous bias of shape [N]
layers.0.wq.weight: expected bias of dtype bfloat16 (x's), got float32; cast one to the other
layers.0.wq.weight: expected group_size 32, 64, 128, 256 or K=64, got 16; quantize with one of
    these
layers.0.wq.weight: expected K % 32 == 0 and K % group_size == 0, got K=64, group_size=128; pick
    a group_size that divides K, or pad K
layers.0.wq.weight: expected group_size 32, 64, 128, 256 or K=64, got 0; quantize with one of
    these
layers.0.wq.weight: expected scale of shape [8, 1], got [8, 2]; the weight is damaged or was
    packed for something else, pack it again
layers.0.wq.weight: expected K % 32 == 0 and K % group_size == 0, got K=48, group_size=48; pick
    a group_size that divides K, or pad K
layers.0.wq.weight: expected activation "none" (w4a16) or "int8" (w4a8), got "int4"; export the
    model again""",
    )


def test_a_wrong_x_or_y():
    assert_expected_inline(
        refusals(
            INVALID_ARGUMENT,
            {"x": torch.ones(3, 65, dtype=torch.bfloat16)},
            {"x": torch.ones(3, 64, dtype=torch.float64)},
            {"x": torch.ones(3, 128, dtype=torch.bfloat16)[:, ::2]},
            {"y": torch.zeros(3, 9, dtype=torch.bfloat16)},
            {"y": torch.zeros(2, 8, dtype=torch.bfloat16)},
            {"y": torch.zeros(3, 8)},
            {"y": torch.zeros(8, 3, dtype=torch.bfloat16).t()},
        ),
        """\
layers.0.wq.weight: expected x [..., K=64], got [3, 65]; fix the call: it disagrees with the
    weight
layers.0.wq.weight: expected x of dtype float16, bfloat16 or float32, got float64; pass x as a
    contiguous float tensor [..., K]
layers.0.wq.weight: expected x [3, 64] contiguous (stride 1 in dimension 1), got stride 2; pass
    x as a contiguous float tensor [..., K]
layers.0.wq.weight: expected y of shape [3, 8], got [3, 9]; allocate y of shape [..., N] and the
    dtype of x
layers.0.wq.weight: expected y of shape [3, 8], got [2, 8]; allocate y of shape [..., N] and the
    dtype of x
layers.0.wq.weight: expected y of dtype bfloat16 (x's), got float32; allocate y of shape [...,
    N] and the dtype of x
layers.0.wq.weight: expected y [3, 8] contiguous (stride 1 in dimension 1), got stride 3;
    allocate y of shape [..., N] and the dtype of x""",
    )


def test_what_a_damaged_file_could_claim():
    qdata, scale = torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2, dtype=torch.bfloat16)
    assert_expected_inline(
        refusals(
            INVALID_ARGUMENT,
            {"qdata": view(qdata, nbytes=255)},
            {"qdata": view(qdata, sizes=(2**40, 2**40), nbytes=2**40)},
            {"qdata": view(qdata, sizes=(2**31 - 1, 2**31 - 1), nbytes=2**31)},
            {"qdata": view(qdata, sizes=(-8, 32))},
            {"qdata": view(qdata, sizes=(0, 32), nbytes=0)},
            {"qdata": view(qdata, ndim=9)},
            {"qdata": view(qdata, ndim=2**31 - 1)},
            {"qdata": view(qdata, dtype=99)},
            {"qdata": view(qdata, data=None)},
            {"scale": view(scale, nbytes=0)},
            {"scale": view(scale, strides=(2, -1))},
        ),
        """\
layers.0.wq.weight: expected qdata uint8 [8, 32] to have 256 bytes, got 255; the weight is
    damaged or was packed for something else, pack it again
layers.0.wq.weight: expected each size of qdata in 0..2147483647 and at most 281474976710656
    elements, got [1099511627776, 1099511627776]; the weight is damaged or was packed for
    something else, pack it again
layers.0.wq.weight: expected each size of qdata in 0..2147483647 and at most 281474976710656
    elements, got [2147483647, 2147483647]; the weight is damaged or was packed for something
    else, pack it again
layers.0.wq.weight: expected each size of qdata in 0..2147483647 and at most 281474976710656
    elements, got [-8, 32]; the weight is damaged or was packed for something else, pack it
    again
layers.0.wq.weight: expected qdata [N, K/2] with N and K in 1..2147483647, got [0, 32]; the
    weight is damaged or was packed for something else, pack it again
layers.0.wq.weight: expected qdata with at most 8 dimensions, got 9; the weight is damaged or
    was packed for something else, pack it again
layers.0.wq.weight: expected qdata with at most 8 dimensions, got 2147483647; the weight is
    damaged or was packed for something else, pack it again
layers.0.wq.weight: expected qdata of a known dtype, got ScalarType number 99; the weight is
    damaged or was packed for something else, pack it again
layers.0.wq.weight: expected qdata to have data, got a null pointer; pass a tensor that owns
    memory
layers.0.wq.weight: expected scale bfloat16 [8, 2] to have 32 bytes, got 0; the weight is
    damaged or was packed for something else, pack it again
layers.0.wq.weight: expected scale [8, 2] contiguous (stride 1 in dimension 1), got stride -1;
    the weight is damaged or was packed for something else, pack it again""",
    )


def test_a_weight_alone_may_come_without_data_but_not_with_a_wrong_shape():
    """At load the runtime checks sizes before it has uploaded anything, and has no x."""
    scale = view(torch.ones(8, 2, dtype=torch.bfloat16), data=None)
    alone = {"op": "linear_weight", "x": None, "scale": scale}
    assert linear_status(**alone) == (kernel_calls.OK, "")
    assert linear_status(**alone | {"op": "linear", "x": torch.ones(3, 64).bfloat16()})[0] != 0
    assert linear_status(**alone, layout_tag=b"plain.v1")[0] == INCOMPATIBLE_LAYOUT
    assert linear_status(**alone, group_size=64)[0] == INVALID_ARGUMENT


def test_an_isa_that_is_not_there():
    assert linear_status(isa="sse9") == (UNSUPPORTED, 'run_with_isa: no "sse9" on this machine')


def test_the_other_ops():
    def attention(
        q=(1, 4, 3, 8), k=(1, 2, 5, 8), v=None, mask=None, v_dtype=None, scale=1.0, softcap=0.0,
        input_pos=None, window=0, is_causal=False, merge_heads=False, kv_dtype=None,
        scales=(None, None),
    ):  # fmt: skip
        q, k, v = (
            torch.zeros(q), torch.zeros(k, dtype=kv_dtype),
            torch.zeros(v or k, dtype=v_dtype or kv_dtype),
        )  # fmt: skip
        tensors = (q, k, v, mask, input_pos, *scales, torch.zeros(q.shape))
        views = [_native.tensor_view(t) for t in tensors]
        rest = (scale, is_causal, softcap, window, merge_heads)
        return kernel_calls.run("attention", _native.AttentionArgs(*views, *rest))

    def rms_norm(x=(2, 8), weight=(8,), y=(2, 8), eps=1e-5):
        views = [_native.tensor_view(torch.zeros(shape)) for shape in (x, weight, y)]
        return kernel_calls.run("rms_norm", _native.RmsNormArgs(*views, eps))

    def silu(x, y):
        views = [_native.tensor_view(t) for t in (x, y)]
        return kernel_calls.run("silu", _native.SiluArgs(*views))

    found = [
        attention(k=(1, 3, 5, 8)),
        attention(k=(1, 2, 5, 4)),
        attention(v=(1, 2, 6, 8)),
        attention(q=(4, 3, 8)),
        attention(v_dtype=torch.bfloat16),
        attention(mask=torch.zeros(3, 4)),
        attention(mask=torch.zeros(3, 5, dtype=torch.float64)),
        attention(scale=float("nan")),
        attention(softcap=-1.0),
        attention(softcap=float("nan")),
        attention(q=(2, 4, 3, 8)),
        attention(window=4),
        attention(input_pos=torch.arange(3), window=-1),
        attention(input_pos=torch.arange(3), is_causal=True),
        attention(input_pos=torch.arange(3), mask=torch.zeros(3, 5)),
        attention(input_pos=torch.arange(4)),
        attention(input_pos=torch.zeros(2, 3, dtype=torch.int32)),
        attention(input_pos=torch.zeros(3)),
        attention(merge_heads=True),
        attention(kv_dtype=torch.int8),
        attention(scales=(torch.zeros(1, 2, 5), None)),
        attention(kv_dtype=torch.int8, scales=(torch.zeros(1, 2, 5), torch.zeros(1, 2, 4))),
        attention(kv_dtype=torch.int8, scales=(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5).half())),
        rms_norm(weight=(9,)),
        rms_norm(y=(2, 9)),
        rms_norm(x=(), y=()),
        rms_norm(eps=-1.0),
        silu(torch.zeros(2), torch.zeros(3)),
        silu(torch.zeros(2).int(), torch.zeros(2).int()),
        silu(torch.zeros(2), torch.zeros(2).half()),
    ]
    assert {code for code, _ in found} == {INVALID_ARGUMENT}
    assert_expected_inline(
        folded(*(message for _, message in found)),
        """\
cuda_int4::attention: expected k [B or more, Hkv, T, D] with the B and D of q and Hq % Hkv == 0,
    got q [1, 4, 3, 8] and k [1, 3, 5, 8]; fix the call
cuda_int4::attention: expected k [B or more, Hkv, T, D] with the B and D of q and Hq % Hkv == 0,
    got q [1, 4, 3, 8] and k [1, 2, 5, 4]; fix the call
cuda_int4::attention: expected v of shape [1, 2, 5, 8], got [1, 2, 6, 8]; v has the shape of k
cuda_int4::attention: expected q [B, H, L, D], got [4, 3, 8]; pass a tensor [B, H, L, D] whose
    last dimension is dense
cuda_int4::attention: expected q, k, v and y of one dtype (k and v may both be int8), got
    float32, float32, bfloat16 and float32; cast them
cuda_int4::attention: expected mask that broadcasts to [1, 4, 3, 5], got [3, 4]; pass a bool or
    additive mask that broadcasts to [B, Hq, S, T]
cuda_int4::attention: expected mask of dtype bool or float32, got float64; pass a bool or
    additive mask that broadcasts to [B, Hq, S, T]
cuda_int4::attention: expected a finite scale, got nan; the usual one is 1/sqrt(D)
cuda_int4::attention: expected softcap 0 (none) or between 1e-30 and 1e30, got -1; fix the call
cuda_int4::attention: expected softcap 0 (none) or between 1e-30 and 1e30, got nan; fix the call
cuda_int4::attention: expected k [B or more, Hkv, T, D] with the B and D of q and Hq % Hkv == 0,
    got q [2, 4, 3, 8] and k [1, 2, 5, 8]; fix the call
cuda_int4::attention: expected window 0 (none), or in 1..2147483647 with input_pos, got 4
    without input_pos; fix the call
cuda_int4::attention: expected window 0 (none), or in 1..2147483647 with input_pos, got -1 with
    input_pos; fix the call
cuda_int4::attention: expected input_pos by itself, got it with is_causal; leave one of them out
cuda_int4::attention: expected input_pos by itself, got it with a mask; leave one of them out
cuda_int4::attention: expected input_pos of shape [3], got [4]; pass one int32 or int64 position
    per query
cuda_int4::attention: expected input_pos of shape [1, 3], got [2, 3]; pass one int32 or int64
    position per query
cuda_int4::attention: expected input_pos of dtype int32 or int64, got float32; pass one int32 or
    int64 position per query
cuda_int4::attention: expected y of shape [1, 3, 32], got [1, 4, 3, 8]; allocate a contiguous y
    [B, S, Hq * D]
cuda_int4::attention: expected k_scale and v_scale with k and v of dtype int8 and without any
    otherwise, got k of int8 without k_scale and without v_scale; fix the call
cuda_int4::attention: expected k_scale and v_scale with k and v of dtype int8 and without any
    otherwise, got k of float32 with k_scale and without v_scale; fix the call
cuda_int4::attention: expected v_scale of shape [1, 2, 5], got [1, 2, 4]; pass a contiguous
    float32 scale, k's shape without D
cuda_int4::attention: expected v_scale of dtype float32, got float16; pass a contiguous float32
    scale, k's shape without D
cuda_int4::rms_norm: expected weight of shape [8], got [9]; pass a contiguous weight of shape
    [D]
cuda_int4::rms_norm: expected y of shape [2, 8], got [2, 9]; allocate a contiguous y like x
cuda_int4::rms_norm: expected x [..., D] with D of at least 1, got []; pass x.contiguous() of
    shape [..., D]
cuda_int4::rms_norm: expected eps of at least 0, got -1.000000; fix the call
cuda_int4::silu: expected y of shape [2], got [3]; allocate a contiguous y like x
cuda_int4::silu: expected x of dtype float16, bfloat16 or float32, got int32; pass
    x.contiguous()
cuda_int4::silu: expected y of dtype float32 (x's), got float16; allocate a contiguous y like x""",
    )
    wide = attention(q=(1, 1, 1, 513), k=(1, 1, 1, 513))
    assert wide[0] == UNSUPPORTED and "at most 512" in wide[1]
