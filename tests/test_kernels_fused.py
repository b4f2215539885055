"""cuda_int4::add_rms_norm, gate_mul and rope_append: the bits of the ops that they stand for."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

import kernel_calls
from cuda_int4 import _native
from messages import folded

ISAS = kernel_calls.available_isas()
DTYPES = pytest.mark.parametrize("dtype", kernel_calls.FLOATS, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@DTYPES
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("D", [1, 7, 33, 256])
def test_add_rms_norm_is_an_addition_and_a_norm(D, isa, dtype):
    x, residual, weight = normal(3, D, dtype=dtype), 3 * normal(3, D + 1)[:, :D], normal(D)
    residual = residual.to(dtype).contiguous()
    for w in (None, weight, weight.to(dtype)):
        total, y = kernel_calls.add_rms_norm(x, residual, w, 1e-5, isa)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, kernel_calls.rms_norm(x + residual, w, 1e-5, isa))


@DTYPES
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("D", [7, 256])
def test_add_rms_norm_norms_x_first(D, isa, dtype):
    x, residual = 2 * normal(3, D).to(dtype), 3 * normal(3, D + 1)[:, :D]
    residual, weight, x_norm = residual.to(dtype).contiguous(), normal(D), normal(D + 1)[:D]
    for w, w_x in ((None, x_norm), (weight, x_norm.to(dtype)), (weight.to(dtype), x_norm)):
        total, y = kernel_calls.add_rms_norm(x, residual, w, 1e-3, isa, w_x)
        assert torch.equal(total, kernel_calls.rms_norm(x, w_x, 1e-3, isa) + residual)
        assert torch.equal(y, kernel_calls.rms_norm(total, w, 1e-3, isa))


def test_the_sum_may_take_the_place_of_an_operand():
    x, residual = normal(2, 40), normal(2, 41)[:, :40].contiguous()
    expected, y = x + residual, torch.empty(2, 40)
    views = [_native.tensor_view(t) for t in (x, residual, None, None, residual, y)]
    assert kernel_calls.run("add_rms_norm", _native.AddRmsNormArgs(*views, 1e-5))[0] == 0
    assert torch.equal(residual, expected)
    assert torch.equal(y, kernel_calls.rms_norm(expected, None, 1e-5))


@DTYPES
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("N", [1, 19, 256])
def test_gate_mul_is_silu_and_a_product(N, isa, dtype):
    gate_up = 4 * normal(3, 2 * N).to(dtype)
    gate, up = gate_up.split(N, dim=-1)
    expected = kernel_calls.silu(gate.contiguous(), isa) * up
    assert torch.equal(kernel_calls.gate_mul(gate_up, "silu", isa), expected)


@DTYPES
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gate_mul_with_gelu(approximate, dtype):
    gate_up = 3 * normal(5, 2 * 33).to(dtype)
    name = {"none": "gelu", "tanh": "gelu_tanh"}[approximate]
    gate, up = gate_up.double().split(33, dim=-1)
    rounded = F.gelu(gate, approximate=approximate).to(dtype).double()  # the gate's own rounding
    y = kernel_calls.gate_mul(gate_up, name)
    if dtype == torch.float32:
        torch.testing.assert_close(y.double(), rounded * up, rtol=1e-5, atol=1e-6)
    else:
        kernel_calls.assert_rounded_once(y, rounded * up)


def turned(x, cos, sin, interleaved):
    """[B, H, S, D] turned by ops of their own, each of which rounds."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        cos_a, cos_b = (cos[:, 0::2], cos[:, 1::2]) if cos.shape[1] == x.shape[3] else (cos, cos)
        sin_a, sin_b = (sin[:, 0::2], sin[:, 1::2]) if sin.shape[1] == x.shape[3] else (sin, sin)
        pairs = (a * cos_a - b * sin_a, b * cos_b + a * sin_b)
        return torch.stack(pairs, dim=-1).flatten(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    if cos.shape[1] == x.shape[3]:
        return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@DTYPES
@pytest.mark.parametrize("float_tables", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["tables of D/2", "tables of D"])
@pytest.mark.parametrize("pos_dtype", [torch.int32, torch.int64])
def test_rope_append(dtype, float_tables, interleaved, whole, pos_dtype):
    B, S, Hq, Hkv, T, D = 2, 3, 4, 2, 7, 10
    qkv = normal(B, S, (Hq + 2 * Hkv) * D, dtype=dtype)
    tables = normal(2, S, D if whole else D // 2)
    cos, sin = tables if float_tables else tables.to(dtype)
    input_pos = torch.tensor([5, 0, -1], dtype=pos_dtype)
    caches = normal(2, B, Hkv, T, D, dtype=dtype)
    heads = qkv.view(B, S, -1, D).transpose(1, 2)
    q, k, v = heads.split([Hq, Hkv, Hkv], dim=1)
    expected = caches.clone()
    places = torch.tensor([5, 0, T - 1])
    expected[0].index_copy_(2, places, turned(k, cos, sin, interleaved))
    expected[1].index_copy_(2, places, v)
    operands = (qkv, cos, sin, input_pos, None, None)
    found = kernel_calls.rope_append(*caches, *operands, Hq, interleaved)
    assert torch.equal(found, turned(q, cos, sin, interleaved))
    assert torch.equal(caches, expected)


@DTYPES
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("values_are_keys", [False, True])
@pytest.mark.parametrize("normed", [(True, True), (True, False), (False, True)])
def test_rope_append_with_norms_of_heads(dtype, isa, values_are_keys, normed):
    B, S, Hq, Hkv, T, D = 2, 3, 4, 2, 7, 34
    n_kv = 1 if values_are_keys else 2
    qkv = 3 * normal(B, S, (Hq + n_kv * Hkv) * D, dtype=dtype)
    cos, sin = normal(2, S, D, dtype=dtype)
    q_norm, k_norm = (
        w if is_normed else None
        for w, is_normed in zip((normal(D), normal(D + 1)[:D].to(dtype)), normed, strict=True)
    )
    input_pos = torch.tensor([5, 0, 6])
    caches = normal(2, B, Hkv, T, D, dtype=dtype)
    heads = qkv.view(B, S, -1, D).transpose(1, 2)
    q, k, v = heads[:, :Hq], heads[:, Hq : Hq + Hkv], heads[:, -Hkv:]

    def norm(x, weight):
        return x if weight is None else kernel_calls.rms_norm(x.contiguous(), weight, 1e-3, isa)

    expected = caches.clone()
    expected[0].index_copy_(2, input_pos, turned(norm(k, k_norm), cos, sin, False))
    expected[1].index_copy_(2, input_pos, v)
    operands = (qkv, cos, sin, input_pos, q_norm, k_norm)
    found = kernel_calls.rope_append(*caches, *operands, Hq, False, 1e-3, isa)
    assert torch.equal(found, turned(norm(q, q_norm), cos, sin, False))
    assert torch.equal(caches, expected)


@pytest.mark.parametrize("by_table", [False, True])
def test_sequences_have_rows_and_positions_of_their_own(by_table):
    B, S, T, D = 2, 3, 8, 4
    qkv, caches = normal(B, S, (3 + 2 * 2) * D), torch.zeros(2, 3, 2, T, D)  # of 3 sequences, 2
    cos, sin = normal(2, B, S, D) if by_table else normal(2, S, D)
    positions = torch.tensor([[0, 1, 2], [5, 6, 6]])  # the last token, and again
    qkv[1, 2] = qkv[1, 1]
    if by_table:
        cos[1, 2], sin[1, 2] = cos[1, 1], sin[1, 1]
    else:
        cos[2], sin[2] = cos[1], sin[1]
    q = kernel_calls.rope_append(*caches, qkv, cos, sin, positions, None, None, 3, False)
    expected = torch.zeros_like(caches)
    for b in range(B):
        tables = (cos[b], sin[b]) if by_table else (cos, sin)
        rows = expected[0, b : b + 1].clone(), expected[1, b : b + 1].clone()
        one = kernel_calls.rope_append(
            *rows, qkv[b : b + 1], *tables, positions[b], None, None, 3, False
        )
        expected[0, b], expected[1, b] = rows[0][0], rows[1][0]
        assert torch.equal(q[b], one[0])
    assert torch.equal(caches, expected)


@DTYPES
@pytest.mark.parametrize("values_are_keys", [False, True])
def test_int8_caches_hold_each_head_of_a_token_over_its_greatest(dtype, values_are_keys):
    B, S, T, D = 2, 3, 8, 16
    qkv = normal(B, S, (3 + (1 if values_are_keys else 2) * 2) * D).to(dtype)
    qkv[0, 1] = 0
    cos, sin = normal(2, S, D)
    positions = torch.tensor([[4, 1, 7], [0, 3, 2]], dtype=torch.int32)
    exact = torch.zeros(2, B, 2, T, D, dtype=dtype)
    rest = (qkv, cos, sin, positions, None, None, 3, False)
    q = kernel_calls.rope_append(*exact, *rest)
    codes = torch.full((2, B, 2, T, D), 99, dtype=torch.int8)
    scales = torch.full((2, B, 2, T), -1.0)
    assert torch.equal(kernel_calls.rope_append(*codes, *rest, scales=tuple(scales)), q)
    for b in range(B):
        rows = torch.arange(T)[:, None].eq(positions[b]).any(1)
        values = exact[:, b, :, rows].float()
        greatest = values.abs().amax(-1)
        assert torch.equal(scales[:, b, :, rows], greatest / 127)
        expected = torch.round(values / (greatest / 127).unsqueeze(-1)).nan_to_num()  # 0 / 0
        assert torch.equal(codes[:, b, :, rows].float(), expected)
        assert bool((codes[:, b, :, ~rows] == 99).all() and (scales[:, b, :, ~rows] == -1).all())


@pytest.mark.parametrize("odd", [float("inf"), float("nan")])
def test_a_head_that_is_not_finite_is_not_finite_in_int8(odd):
    qkv = normal(1, 1, 3 * 16)
    qkv[0, 0, 40] = odd  # of the value
    codes, scales = torch.zeros(2, 1, 1, 4, 16, dtype=torch.int8), torch.zeros(2, 1, 1, 4)
    tables = torch.ones(1, 16), torch.zeros(1, 16)
    rest = (qkv, *tables, torch.tensor([2]), None, None, 1, False)
    kernel_calls.rope_append(*codes, *rest, scales=tuple(scales))
    assert bool(scales[0].isfinite().all()) and not bool(scales[1, 0, 0, 2].isfinite())


def test_a_position_outside_writes_nothing():
    caches, before = torch.ones(2, 1, 1, 4, 2), torch.ones(2, 1, 1, 4, 2)
    operands = (normal(1, 2, 6), *normal(2, 2, 2), torch.tensor([1, 4]), *[None] * 4)
    tensors = (*caches, *operands, normal(1, 1, 2, 2))
    args = _native.RopeAppendArgs(*map(_native.tensor_view, tensors), 1, False, 0.0)
    code, message = kernel_calls.run("rope_append", args)
    assert code == kernel_calls.INVALID_ARGUMENT
    assert torch.equal(caches, before)
    assert_expected_inline(
        folded(message),
        """\
cuda_int4::rope_append: expected input_pos in 0..3, got 4 for token 1; make the cache longer, or
    the context shorter""",
    )


def test_refusals():
    def add_rms_norm(
        x=(2, 8), residual=(2, 8), weight=(8,), x_norm=(8,), total=(2, 8), y=(2, 8), eps=1e-5
    ):
        tensors = [torch.zeros(s) for s in (x, residual, weight, x_norm, total, y)]
        views = map(_native.tensor_view, tensors)
        return kernel_calls.run("add_rms_norm", _native.AddRmsNormArgs(*views, eps))

    def gate_mul(gate_up=(2, 8), y=(2, 4), activation=b"silu"):
        tensors = [torch.zeros(s) for s in (gate_up, y)]
        views = map(_native.tensor_view, tensors)
        return kernel_calls.run("gate_mul", _native.GateMulArgs(*views, activation))

    def rope_append(
        k=(1, 2, 5, 4),
        v=(1, 2, 5, 4),
        qkv=(1, 3, 28),
        cos=(3, 4),
        sin=(3, 4),
        pos=3,
        q=(1, 3, 3, 4),
        n_heads=3,
        dtype=torch.float32,
        q_norm=(4,),
        k_norm=(4,),
        eps=1e-5,
        cache_dtype=torch.float32,
        scales=(None, None),
    ):
        tensors = [torch.zeros(s, dtype=cache_dtype) for s in (k, v)]
        tensors += [torch.zeros(qkv)]
        tensors += [torch.zeros(s, dtype=dtype) for s in (cos, sin)]
        tensors += [torch.zeros(pos, dtype=torch.int64)]
        tensors += [*(torch.zeros(s) for s in (q_norm, k_norm)), *scales, torch.zeros(q)]
        views = map(_native.tensor_view, tensors)
        args = _native.RopeAppendArgs(*views, n_heads, False, eps)
        return kernel_calls.run("rope_append", args)

    assert add_rms_norm()[0] == gate_mul()[0] == rope_append()[0] == kernel_calls.OK
    assert rope_append(qkv=(1, 3, 20))[0] == kernel_calls.OK  # values are keys
    found = [
        add_rms_norm(residual=(2, 9)),
        add_rms_norm(weight=(9,)),
        add_rms_norm(x_norm=(2, 8)),
        add_rms_norm(total=(1, 8)),
        add_rms_norm(y=(8,)),
        add_rms_norm(x=()),
        add_rms_norm(eps=-1.0),
        gate_mul(gate_up=(2, 7)),
        gate_mul(y=(2, 8)),
        gate_mul(activation=b"relu"),
        gate_mul(activation=None),
        rope_append(k=(2, 5, 4)),
        rope_append(k=(1, 2, 5, 3)),
        rope_append(v=(1, 2, 4, 4)),
        rope_append(qkv=(1, 3, 24)),
        rope_append(qkv=(2, 3, 28)),
        rope_append(cos=(3, 3)),
        rope_append(sin=(3, 2)),
        rope_append(pos=2),
        rope_append(q=(1, 3, 3, 2)),
        rope_append(n_heads=0),
        rope_append(dtype=torch.bfloat16),
        rope_append(q_norm=(5,)),
        rope_append(k_norm=(1, 4)),
        rope_append(eps=-1.0),
        rope_append(k=(3, 2, 5, 4), v=(3, 2, 5, 4), qkv=(2, 3, 28), pos=(3, 3)),
        rope_append(scales=(torch.zeros(1, 2, 5), None)),
        rope_append(cache_dtype=torch.int8),
        rope_append(cache_dtype=torch.int8, scales=(torch.zeros(1, 2, 5), torch.zeros(1, 2, 4))),
    ]
    assert {code for code, _ in found} == {kernel_calls.INVALID_ARGUMENT}
    assert_expected_inline(
        folded(*[message for _, message in found]),
        """\
cuda_int4::add_rms_norm: expected residual of shape [2, 8], got [2, 9]; pass a contiguous
    residual like x
cuda_int4::add_rms_norm: expected weight of shape [8], got [9]; pass a contiguous weight of
    shape [D]
cuda_int4::add_rms_norm: expected x_norm of shape [8], got [2, 8]; pass a contiguous weight of
    shape [D]
cuda_int4::add_rms_norm: expected sum of shape [2, 8], got [1, 8]; allocate a contiguous sum
    like x
cuda_int4::add_rms_norm: expected y of shape [2, 8], got [8]; allocate a contiguous y like x
cuda_int4::add_rms_norm: expected x [..., D] with D of at least 1, got []; pass x.contiguous()
    of shape [..., D]
cuda_int4::add_rms_norm: expected eps of at least 0, got -1.000000; fix the call
cuda_int4::gate_mul: expected gate_up [..., 2 * N] of gates and as many factors, got [2, 7];
    pass gate_up.contiguous() of shape [..., 2 * N]
cuda_int4::gate_mul: expected y of shape [2, 4], got [2, 8]; allocate a contiguous y [..., N] of
    gate_up's dtype
cuda_int4::gate_mul: expected activation "silu", "gelu" or "gelu_tanh", got "relu"; fix the call
cuda_int4::gate_mul: expected activation "silu", "gelu" or "gelu_tanh", got ""; fix the call
cuda_int4::rope_append: expected k_cache [B or more, Hkv, T, D] with an even D, got [2, 5, 4];
    make a cache [B or more, Hkv, T, D] with an even D
cuda_int4::rope_append: expected k_cache [B or more, Hkv, T, D] with an even D, got [1, 2, 5,
    3]; make a cache [B or more, Hkv, T, D] with an even D
cuda_int4::rope_append: expected v_cache of shape [1, 2, 5, 4], got [1, 2, 4, 4]; make both
    caches alike
cuda_int4::rope_append: expected qkv [1 or less, S, 7 heads of 4] (or 5, where values are keys),
    got [1, 3, 24]; pass qkv.contiguous(), [B, S, (n_heads + 2 * Hkv) * D]
cuda_int4::rope_append: expected qkv [1 or less, S, 7 heads of 4] (or 5, where values are keys),
    got [2, 3, 28]; pass qkv.contiguous(), [B, S, (n_heads + 2 * Hkv) * D]
cuda_int4::rope_append: expected cos of shape [3, 4], got [3, 3]; pass tables [S, D], [S, D/2]
    or the like for each of B, of qkv's dtype or float32
cuda_int4::rope_append: expected sin of shape [3, 4], got [3, 2]; make both tables alike
cuda_int4::rope_append: expected input_pos of shape [3], got [2]; pass one int32 or int64
    position per token
cuda_int4::rope_append: expected q of shape [1, 3, 3, 4], got [1, 3, 3, 2]; allocate a
    contiguous q [B, n_heads, S, D]
cuda_int4::rope_append: expected n_heads in 1..2147483647, got 0; fix the call
cuda_int4::rope_append: expected cos of dtype float32, got bfloat16; pass tables [S, D], [S,
    D/2] or the like for each of B, of qkv's dtype or float32
cuda_int4::rope_append: expected q_norm of shape [4], got [5]; pass a contiguous weight of shape
    [D], the size of a head
cuda_int4::rope_append: expected k_norm of shape [4], got [1, 4]; pass a contiguous weight of
    shape [D], the size of a head
cuda_int4::rope_append: expected eps of at least 0, got -1.000000; fix the call
cuda_int4::rope_append: expected input_pos of shape [2, 3], got [3, 3]; pass one int32 or int64
    position per token
cuda_int4::rope_append: expected k_scale with caches of int8 and with no others, got caches of
    float32 with it; make float32 scales like the caches, but without D
cuda_int4::rope_append: expected k_scale with caches of int8 and with no others, got caches of
    int8 without it; make float32 scales like the caches, but without D
cuda_int4::rope_append: expected v_scale of shape [1, 2, 5], got [1, 2, 4]; make float32 scales
    like the caches, but without D""",
    )
