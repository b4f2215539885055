"""torch.ops.cuda_int4: schemas, fakes, .out overloads, errors; the numbers are tested elsewhere."""

import pytest
import torch
from executorch.exir.operator.convert import to_out_variant
from expecttest import assert_expected_inline

import cases
from cuda_int4 import _native
from cuda_int4 import ops as _ops  # noqa: F401
from messages import folded, message

OPS = ("linear", "attention", "rms_norm", "silu", "add_rms_norm", "gate_mul", "rope_append")
CASE = cases.Case(3, 13, 96, 32, "executorch", "fractional")


def arguments(op: str, dtype: torch.dtype = torch.bfloat16) -> tuple:
    torch.manual_seed(0)
    if op == "linear":
        x, w = CASE.make(seed=0)
        bias = torch.randn(CASE.N).to(dtype)
        return x.to(dtype), w.qdata, w.scale, w.zero_point, None, bias, 32, w.layout_tag, "none"
    if op == "attention":
        q, k, v = (torch.randn(2, h, s, 8).to(dtype) for h, s in ((4, 3), (2, 5), (2, 5)))
        return q, k, v, None, 0.5, False
    if op == "rms_norm":
        return torch.randn(2, 3, 16).to(dtype), torch.randn(16).to(dtype), 1e-5
    if op == "add_rms_norm":
        x, residual = torch.randn(2, 2, 3, 16).to(dtype)
        return x, residual, *torch.randn(2, 16).to(dtype), 1e-5
    if op == "gate_mul":
        return torch.randn(2, 10).to(dtype), "silu"
    if op == "rope_append":  # 3 query heads and 2 of keys, of 4, at 2 places of 5
        caches, tables = torch.zeros(2, 1, 2, 5, 4).to(dtype), torch.randn(2, 2, 4).to(dtype)
        norms = torch.randn(2, 4).to(dtype)
        qkv, input_pos = torch.randn(1, 2, 28).to(dtype), torch.tensor([3, 0])
        return *caches, qkv, *tables, input_pos, *norms, 3, False, 1e-5
    return (torch.randn(2, 5).to(dtype),)


def test_schemas():
    lines = [
        str(getattr(getattr(torch.ops.cuda_int4, op), overload)._schema)
        for op in OPS
        for overload in ("default", "out")
    ]
    assert_expected_inline(
        folded(*lines),
        """\
cuda_int4::linear(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? meta,
    Tensor? bias, int group_size, str layout_tag, str activation, int? out_features=None) ->
    Tensor
cuda_int4::linear.out(Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? meta,
    Tensor? bias, int group_size, str layout_tag, str activation, int? out_features=None, *,
    Tensor(a!) out) -> Tensor(a!)
cuda_int4::attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal,
    float softcap=0., Tensor? input_pos=None, int window=0, bool merge_heads=False, Tensor?
    k_scale=None, Tensor? v_scale=None) -> Tensor
cuda_int4::attention.out(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool
    is_causal, float softcap=0., Tensor? input_pos=None, int window=0, bool merge_heads=False,
    Tensor? k_scale=None, Tensor? v_scale=None, *, Tensor(a!) out) -> Tensor(a!)
cuda_int4::rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor
cuda_int4::rms_norm.out(Tensor x, Tensor? weight, float eps, *, Tensor(a!) out) -> Tensor(a!)
cuda_int4::silu(Tensor x) -> Tensor
cuda_int4::silu.out(Tensor x, *, Tensor(a!) out) -> Tensor(a!)
cuda_int4::add_rms_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? x_norm, float eps) ->
    (Tensor, Tensor)
cuda_int4::add_rms_norm.out(Tensor x, Tensor residual, Tensor? weight, Tensor? x_norm, float
    eps, *, Tensor(a!) sum, Tensor(b!) y) -> (Tensor(a!), Tensor(b!))
cuda_int4::gate_mul(Tensor gate_up, str activation) -> Tensor
cuda_int4::gate_mul.out(Tensor gate_up, str activation, *, Tensor(a!) out) -> Tensor(a!)
cuda_int4::rope_append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor qkv, Tensor cos, Tensor
    sin, Tensor input_pos, Tensor? q_norm, Tensor? k_norm, int n_heads, bool interleaved, float
    eps, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> Tensor
cuda_int4::rope_append.out(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor qkv, Tensor cos,
    Tensor sin, Tensor input_pos, Tensor? q_norm, Tensor? k_norm, int n_heads, bool interleaved,
    float eps, Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, *, Tensor(e!) out) ->
    Tensor(e!)""",
    )


@pytest.mark.parametrize("op", OPS)
def test_executorch_finds_the_out_variant(op):
    packet = getattr(torch.ops.cuda_int4, op)
    names = ("sum", "y") if op == "add_rms_norm" else ("out",)
    assert to_out_variant(packet.default) == (packet.out, names)
    assert f"cuda_int4::{op}.out" in _native.supported_ops()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fake_and_out_agree_with_the_op(op, dtype):
    function = getattr(torch.ops.cuda_int4, op)
    args = arguments(op, dtype)
    results = function(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
        fake_results = function(*fakes)
    names = [a.name for a in function.out._schema.arguments if a.is_out]
    several = len(names) > 1
    pairs = zip(results, fake_results, strict=True) if several else [(results, fake_results)]
    results = results if several else (results,)
    for y, fake in pairs:
        assert y.dtype == dtype and y.isfinite().all()
        assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())
    for empty in (False, True):  # the second grows
        outs = [
            torch.empty(0, dtype=dtype) if empty else torch.full_like(y, torch.nan) for y in results
        ]
        got = function.out(*args, **dict(zip(names, outs, strict=True)))
        for one, out, y in zip(got if several else (got,), outs, results, strict=True):
            assert one is out
            assert torch.equal(out, y)


@pytest.mark.parametrize("op", OPS)
def test_strided_operands_are_read_by_their_strides(op):
    args = arguments(op)
    strided = [
        torch.stack([a, torch.full_like(a, 77)], dim=-1)[..., 0]
        if isinstance(a, torch.Tensor)
        else a
        for a in args
    ]
    assert all(not a.is_contiguous() for a in strided if isinstance(a, torch.Tensor))
    function = getattr(torch.ops.cuda_int4, op)
    if op == "rope_append":  # the caches are written where they lie
        refusal = message(function, *strided, error=_native.CudaInt4Error)
        assert refusal.startswith(
            "cuda_int4::rope_append: expected k_cache [1, 2, 5, 4] contiguous"
        )
        strided[:2] = args[:2]
    for found, expected in zip(function(*strided), function(*args), strict=True):
        assert torch.equal(found, expected)


def test_a_strided_out_is_written_by_its_strides():
    (x,) = arguments("silu")
    whole = torch.zeros(2, 10, dtype=x.dtype)
    torch.ops.cuda_int4.silu.out(x, out=whole[:, ::2])
    assert torch.equal(whole[:, ::2], torch.ops.cuda_int4.silu(x))
    assert not whole[:, 1::2].any()


def test_errors_carry_the_library_s_reason():
    linear = torch.ops.cuda_int4.linear
    x, qdata, scale, zero_point, _, _, group_size, tag, activation = arguments("linear")
    plain = (x, qdata, scale.t().contiguous(), zero_point.t().contiguous(), None, None)
    ours = (x, qdata, scale, zero_point, None, None)
    error = _native.CudaInt4Error
    assert_expected_inline(
        folded(
            message(linear, *plain, group_size, "plain.v1", "none", error=error),
            message(linear, *ours, group_size, "coalesced.v2", "none", error=error),
            message(linear, *ours, 64, tag, activation, error=error),
            message(linear.out, *ours, 32, tag, "none", out=torch.empty(3, 13)),
        ),
        """\
cuda_int4::linear: expected packed weights (coalesced.v1, marlin.v1, marlin24.v1), got
    "plain.v1", torchao's interchange order with scales [n_groups, N], which no kernel reads;
    export through CudaInt4Partitioner, or pack with CudaCoalescedInt4Tensor.from_int4
    [DelegateInvalidCompatibility]
cuda_int4::linear: expected layout coalesced.v1, got the newer "coalesced.v2", which this build
    cannot read; update executorch-cuda-int4, or export again with this version
    [DelegateInvalidCompatibility]
cuda_int4::linear: expected K % 32 == 0 and K % group_size == 0, got K=96, group_size=64; pick a
    group_size that divides K, or pad K [InvalidArgument]
cuda_int4.linear: expected out of torch.bfloat16, got torch.float32; the result has the dtype of
    x""",
    )
