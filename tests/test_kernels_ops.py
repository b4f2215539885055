"""cuda_int4::attention, rms_norm and silu: every CPU kernel against float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import kernel_calls
from kernel_calls import FLOATS, assert_rounded_once, available_isas


@pytest.fixture(params=available_isas())
def isa(request):
    return request.param


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_attention(q, k, v, mask=None, *, scale, is_causal=False, softcap=0.0):
    rep = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(rep, 1) for t in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


# B, Hq, Hkv, S, T, D: one query, grouped queries, tiles that T and D do not fill.
ATTENTIONS = (
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 1, 33, 64),
    (1, 6, 2, 5, 17, 20),
    (1, 3, 3, 19, 19, 8),
    (2, 8, 1, 3, 70, 40),
)


@pytest.mark.parametrize("B, Hq, Hkv, S, T, D", ATTENTIONS)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive", "broadcast"])
def test_attention_is_within_one_rounding(B, Hq, Hkv, S, T, D, kind, isa):
    for dtype in FLOATS:
        q, k, v = (
            randn(*shape, dtype=dtype, seed=i)
            for i, shape in enumerate([(B, Hq, S, D), (B, Hkv, T, D), (B, Hkv, T, D)])
        )
        mask = None
        if kind == "bool":
            mask = randn(B, Hq, S, T, seed=3) > 0
        elif kind == "additive":
            mask = randn(B, 1, S, T, dtype=dtype, seed=3)
        elif kind == "broadcast":
            mask = randn(S, 1, seed=3).expand(S, T) > -1
        keywords = {"scale": 1 / math.sqrt(D), "is_causal": kind == "causal"}
        y = kernel_calls.attention(q, k, v, mask, isa=isa, **keywords)
        exact = exact_attention(q, k, v, mask, **keywords)
        assert_rounded_once(y, exact)


@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize("by_batch", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_positions_are_the_mask_that_they_stand_for(dtype, by_batch, window, isa):
    B, Hq, Hkv, S, T, D = 3, 4, 2, 5, 40, 20
    q = torch.randn(B, Hq, S, D).to(dtype)
    k, v = torch.randn(2, B + 1, Hkv, T, D).to(dtype)  # of one sequence more
    positions = torch.randint(T, (B, S) if by_batch else (S,))
    positions.view(-1)[0] = -1  # sees nothing
    keys = torch.arange(T)
    mask = keys <= positions.unsqueeze(-1)
    if window:
        mask &= keys > positions.unsqueeze(-1) - window
    mask = mask.unsqueeze(1) if by_batch else mask
    expected = kernel_calls.attention(q, k[:B], v[:B], mask, scale=0.3, isa=isa)
    unseen = ~mask.expand(B, -1, S, T).any(2)[:, 0] if by_batch else ~mask.any(0).expand(B, T)
    for b in range(B):
        k[b, :, unseen[b]] = v[b, :, unseen[b]] = float("nan")
    for given in (positions, positions.int()):
        options = {"scale": 0.3, "input_pos": given, "window": window, "isa": isa}
        assert torch.equal(kernel_calls.attention(q, k, v, **options), expected)
        merged = kernel_calls.attention(q, k, v, merge_heads=True, **options)
        assert torch.equal(merged, expected.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_keys_and_values_are_codes_times_scales(dtype, isa):
    B, Hq, Hkv, S, T, D = 2, 4, 2, 3, 40, 20
    q = torch.randn(B, Hq, S, D).to(dtype)
    codes = torch.randint(-127, 128, (2, B, Hkv, T, D), dtype=torch.int8)
    scales = torch.rand(2, B, Hkv, T) / 50
    k, v = (codes.double() * scales.double().unsqueeze(-1)).unbind()
    exact = exact_attention(q, k, v, scale=0.3)
    found = kernel_calls.attention(q, *codes, scale=0.3, scales=tuple(scales), isa=isa)
    assert_rounded_once(found, exact)


@pytest.mark.parametrize("softcap", [0.7, 50.0])
def test_a_soft_cap_comes_before_the_mask(softcap, isa):
    for dtype in FLOATS:
        q, k, v = (
            randn(*shape, dtype=dtype, seed=i)
            for i, shape in enumerate([(2, 4, 5, 20), (2, 2, 33, 20), (2, 2, 33, 20)])
        )
        mask = randn(5, 33, dtype=dtype, seed=3) * 3
        keywords = {"scale": 1.5, "softcap": softcap}
        y = kernel_calls.attention(q, k, v, mask, isa=isa, **keywords)
        exact = exact_attention(q, k, v, mask, **keywords)
        assert_rounded_once(y, exact)
        uncapped = exact_attention(q, k, v, mask, scale=1.5)
        assert (exact - uncapped).norm() > 0.02 * exact.norm()  # it makes a difference


def test_attention_reads_strided_heads_and_a_cache_longer_than_the_context(isa):
    q = randn(1, 3, 4, 16).transpose(1, 2)  # [B, Hq=4, S=3, D] in the order [B, S, H, D]
    cache = randn(1, 2, 64, 16, seed=1)
    k, v = cache[:, :, :21], randn(1, 21, 2, 16, seed=2).transpose(1, 2)
    y = kernel_calls.attention(q, k, v, scale=0.25, isa=isa)
    assert_rounded_once(y, exact_attention(q, k, v, scale=0.25))


def test_a_row_that_may_attend_to_nothing_is_zero_as_in_torch(isa):
    q, k, v = (randn(1, 2, 3, 8, seed=i) for i in range(3))
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    additive = torch.zeros(3, 3).masked_fill(~mask, -math.inf)
    for each in (mask, additive):
        y = kernel_calls.attention(q, k, v, each, scale=0.3, isa=isa)
        torch.testing.assert_close(y, F.scaled_dot_product_attention(q, k, v, each, scale=0.3))
        assert y[:, :, 1].eq(0).all()


def test_large_scores_do_not_overflow_and_nan_stays_in_its_row(isa):
    q, k, v = (randn(1, 1, 40, 8, seed=i) for i in range(3))
    y = kernel_calls.attention(q * 100, k * 100, v, scale=1.0, isa=isa)
    assert_rounded_once(y, exact_attention(q * 100, k * 100, v, scale=1.0))
    q[0, 0, 2, 3] = math.nan
    v[0, 0, 30] = math.nan
    y = kernel_calls.attention(q, k, v, scale=1.0, is_causal=True, isa=isa)[0, 0]
    expected = torch.zeros(40, dtype=torch.bool)
    expected[2] = True
    expected[30:] = True
    assert torch.equal(y.isnan().all(-1), expected) and torch.equal(y.isnan().any(-1), expected)


@pytest.mark.parametrize("D", [1, 7, 64, 1000])
def test_rms_norm_is_within_one_rounding(D, isa):
    for dtype, weight_dtype in itertools.product(FLOATS, (None, *FLOATS)):
        x = randn(3, 2, D, dtype=dtype) * 5
        weight = None if weight_dtype is None else randn(D, dtype=weight_dtype, seed=1)
        y = kernel_calls.rms_norm(x, weight, 1e-5, isa)
        exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        assert_rounded_once(y, exact if weight is None else exact * weight.double())


def test_rms_norm_of_zeros_is_zero(isa):
    assert kernel_calls.rms_norm(torch.zeros(2, 9), None, 1e-6, isa).eq(0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_silu_is_within_one_rounding(dtype, isa):
    x = torch.cat([torch.linspace(-20, 20, 4001), randn(99) * 5]).to(dtype)
    y = kernel_calls.silu(x, isa)
    exact = x.double() * x.double().sigmoid()
    assert_rounded_once(y, exact)
    normal = exact.abs() > torch.finfo(dtype).smallest_normal  # each value, not their norm alone
    worst = ((y.double() - exact).abs() / exact.abs())[normal].max()
    assert worst <= {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}[dtype]


def test_silu_at_the_ends_of_its_range(isa):
    x = torch.tensor([-math.inf, -1e30, -100.0, -88.0, 0.0, 88.0, 89.0, 1e30, math.inf, math.nan])
    y = kernel_calls.silu(x, isa)
    torch.testing.assert_close(y, F.silu(x), rtol=1e-5, atol=1e-35, equal_nan=True)
