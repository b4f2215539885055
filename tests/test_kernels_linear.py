"""cuda_int4::linear on coalesced.v1: every CPU kernel against float64 of its own arithmetic."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import kernel_calls
from kernel_calls import FLOATS, assert_rounded_once, available_isas

# N, K, group_size: ragged N, the least K, K that no block divides, every group size and one group
# per row; 8704 is longer than the group buffers of the mat-vec.
SHAPES = (
    (1, 32, 32),
    (13, 96, 96),
    (9, 160, 32),
    (33, 1088, 32),
    (17, 1088, 64),
    (70, 384, 128),
    (5, 1280, 256),
    (37, 1088, 1088),
    (3, 8704, 32),
)
ZERO_POINTS = ("none", "integer", "float32")


@pytest.fixture(params=available_isas())
def isa(request):
    return request.param


@dataclass
class Weight:
    """The parts as the kernel takes them; every scale and zero point differs."""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    group_size: int

    @classmethod
    def make(cls, N, K, group_size, scale_dtype=torch.bfloat16, zero="none", seed=0) -> "Weight":
        generator = torch.Generator().manual_seed(seed)
        qdata = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=generator)
        groups = (N, K // group_size)
        scale = torch.rand(groups, generator=generator) * 0.03 + 0.002
        if zero == "none":
            zero_point = None
        elif zero == "integer":
            zero_point = torch.randint(0, 16, groups, generator=generator).to(scale_dtype)
        else:  # from -40.5 to 53.87: negative, fractional, far outside the codes
            zero_point = torch.rand(groups, generator=generator) * (13.37 + 81) - 40.5
        return cls(qdata, scale.to(scale_dtype), zero_point, group_size)

    def dequantize(self, dtype=torch.float64) -> Tensor:
        codes = torch.stack([self.qdata & 15, self.qdata >> 4], -1).flatten(1).to(dtype)
        zero_point = torch.tensor(8.0).expand_as(self.scale)
        if self.zero_point is not None:
            zero_point = self.zero_point
        zero_point, scale = (
            t.to(dtype).repeat_interleave(self.group_size, 1) for t in (zero_point, self.scale)
        )
        return (codes - zero_point) * scale

    def linear(self, x, **keywords) -> Tensor:
        parts = (self.qdata, self.scale, self.zero_point, self.group_size)
        return kernel_calls.linear(x, *parts, **keywords)


def activations(M: int, K: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int8_rounded(x: Tensor) -> Tensor:
    """What w4a8 multiplies: per 32 values s_x * a, from the contract, in float64."""
    groups = x.float().unflatten(-1, (-1, 32))
    s_x = groups.abs().amax(-1, keepdim=True) / 127
    a = torch.where(s_x > 0, (groups / s_x).round().clamp(-127, 127), 0)
    return (a.double() * s_x.double()).flatten(-2)


@pytest.mark.parametrize("activation", ["none", "int8"])
@pytest.mark.parametrize("zero", ZERO_POINTS)
@pytest.mark.parametrize("N, K, group_size", SHAPES)
def test_error_is_that_of_one_rounding(N, K, group_size, zero, activation, isa):
    """Every pair of dtypes; the rows take turns, so that each shape meets each of them."""
    rows = itertools.cycle((1, 2, 7, 64) if isa != "scalar" else (1, 2))
    for dtype, scale_dtype in itertools.product(FLOATS, FLOATS):
        weight = Weight.make(N, K, group_size, scale_dtype, zero)
        M = next(rows)
        x = activations(M, K, dtype, seed=M)
        bias = activations(1, N, dtype)[0] if M % 2 else None
        y = weight.linear(x, bias=bias, activation=activation, isa=isa)
        exact = (x.double() if activation == "none" else int8_rounded(x)) @ weight.dequantize().T
        assert_rounded_once(y, exact if bias is None else exact + bias.double())


# Fractional, negative, and a group that is constant (q = 0, zero_point = -1); x far from 0.
@pytest.mark.parametrize("zero_point", [13.37, -40.5, 0.1, 7.999, -1.0, 300.0])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_zero_points_that_cancel_cost_no_accuracy(zero_point, mean, isa):
    for group_size, M in itertools.product((32, 128, 2176), (1, 7)):
        weight = Weight.make(16, 2176, group_size, torch.float32)
        weight.zero_point = torch.full_like(weight.scale, zero_point)
        x = activations(M, 2176, torch.float32) + mean
        assert_rounded_once(weight.linear(x, isa=isa), x.double() @ weight.dequantize().T)


@pytest.mark.parametrize("M", [1, 9])
@pytest.mark.parametrize("zero", ZERO_POINTS)
@pytest.mark.parametrize("N, K, group_size", [(70, 384, 128), (33, 1088, 32), (37, 1088, 1088)])
def test_one_hot_activation_reads_back_the_weight(N, K, group_size, zero, M, isa):
    weight = Weight.make(N, K, group_size, torch.bfloat16, zero)
    exact = weight.dequantize(torch.float32)
    for dtype in FLOATS:
        ks = [0, 1, 7, 8, 31, K // 2, K - 2, K - 1]
        for k in ks:
            x = torch.zeros(M, K, dtype=dtype)
            x[M // 2, k] = 1
            y = weight.linear(x, isa=isa)
            assert torch.equal(y[M // 2], exact[:, k].to(dtype)), f"k={k} {dtype}"
            assert y[: M // 2].eq(0).all() and y[M // 2 + 1 :].eq(0).all()


def test_int8_activations_round_half_to_even(isa):
    weight = Weight.make(4, 32, 32, torch.float32)
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5])  # s_x = 1
    a = torch.zeros(32, dtype=torch.float64)
    a[:6] = torch.tensor([127, 0, 2, 2, 0, -2])
    for M in (1, 5):
        y = weight.linear(x.expand(M, 32).contiguous(), activation="int8", isa=isa)
        assert_rounded_once(y, (weight.dequantize() @ a).expand(M, 4))


@pytest.mark.parametrize("activation", ["none", "int8"])
@pytest.mark.parametrize("M", [1, 6])
def test_a_group_of_zeros_gives_zero_and_nan_spreads_to_its_row_only(M, activation, isa):
    weight = Weight.make(19, 256, 32, zero="integer")
    assert weight.linear(torch.zeros(M, 256), activation=activation, isa=isa).eq(0).all()
    x = activations(M, 256, torch.float32)
    x[0, 200] = float("nan")
    y = weight.linear(x, activation=activation, isa=isa)
    assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["none", "int8"])
def test_a_row_has_one_answer_wherever_the_work_is_cut(activation, dtype, isa):
    """M rows go in turns of 64 or 128, n in units; row m must not depend on what surrounds it."""
    weight = Weight.make(300, 1024, 64, zero="float32")
    x = activations(150, 1024, dtype)
    whole = weight.linear(x[:, :], activation=activation, isa=isa)
    for begin, end in ((0, 20), (100, 150), (130, 137)):
        part = weight.linear(x[begin:end].contiguous(), activation=activation, isa=isa)
        assert torch.equal(part, whole[begin:end])
    rows = slice(16, 100)  # other columns of the same weight
    parts = (
        weight.qdata[rows].clone(),
        weight.scale[rows].clone(),
        weight.zero_point[rows].clone(),
    )
    part = kernel_calls.linear(x, *parts, 64, activation=activation, isa=isa)
    assert torch.equal(part, whole[:, rows])


def test_leading_dimensions_and_no_rows_at_all(isa):
    weight = Weight.make(5, 64, 32)
    x = activations(6, 64, torch.bfloat16)
    y = weight.linear(x.view(1, 2, 3, 64), isa=isa)
    assert y.shape == (1, 2, 3, 5) and torch.equal(y.view(6, 5), weight.linear(x, isa=isa))
    assert weight.linear(x[0], isa=isa).shape == (5,)
    assert weight.linear(x[:0], isa=isa).shape == (0, 5)
