"""Checks the elementwise, shape and index ops on CUDA against torch, through a ``.pte``.

    python tests/gpu/check_cuda_ops_elementwise.py

Works as check_cuda_ops_reduce.py does, with the same arguments: a model for each group of cases,
lowered for CUDA, run five times on two sets of inputs in turns. The environment variable
CHECK_DEVICE=cpu runs ExecuTorch's kernels on the same cases.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from check_cuda_ops_reduce import (
    BFLOAT,
    DOUBLE,
    FLOAT,
    FLOATS,
    HALF,
    INTS,
    LOWER_ONLY,
    Case,
    lower,
    made,
    main,
    normal,
    special,
)
from torch import Tensor

import cuda_int4
from cuda_int4._native import CudaInt4Error

BOOL = torch.bool
ALL_FLOATS = (*FLOATS, DOUBLE)
aten = torch.ops.aten

# Shapes of two operands: the same, ragged, broadcast along rows, columns and both, single, empty.
PAIRS = (
    ((3, 5, 64), (3, 5, 64)),
    ((7, 13), (7, 13)),
    ((2, 3, 4, 64), (3, 1, 64)),
    ((6, 40), (6, 1)),
    ((1, 24), (5, 1)),
    ((33,), ()),
    ((), ()),
    ((0, 4), (1, 4)),
    ((2, 1, 3, 1, 8), (1, 5, 1, 2, 8)),
)
BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "add alpha": lambda a, b: torch.add(a, b, alpha=3),
    "sub alpha": lambda a, b: torch.sub(a, b, alpha=2),
}
CUTTING = {
    "floor_divide": torch.floor_divide,
    "fmod": torch.fmod,
    "remainder": torch.remainder,
    "div floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "div trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
}
COMPARISONS = {op: getattr(torch, op) for op in ("eq", "ne", "lt", "le", "gt", "ge")}
LOGICAL = {op: getattr(torch, op) for op in ("logical_and", "logical_or", "logical_xor")}


def ints(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Callable:
    """Makes integers in low .. high - 1."""
    return lambda g: torch.randint(low, high, shape, generator=g).to(dtype)


def uniform(low: float, high: float, *shape: int, dtype: torch.dtype = FLOAT) -> Callable:
    """Makes values in a range."""
    return lambda g: (torch.rand(shape, generator=g) * (high - low) + low).to(dtype)


def divisor(*shape: int, dtype: torch.dtype = FLOAT) -> Callable:
    """Makes signed values away from 0."""

    def make(generator: torch.Generator) -> Tensor:
        magnitude = torch.rand(shape, generator=generator) * 4 + 1
        sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return (magnitude * (1 if dtype == torch.uint8 else sign)).to(dtype)

    return make


def arithmetic() -> Iterator[Case]:
    """Sums, products and quotients of floats."""
    for dtype in ALL_FLOATS:
        for a, b in PAIRS:
            inputs = made(normal(*a, dtype=dtype), normal(*b, dtype=dtype))
            for name, op in BINARY.items():
                yield Case(f"{name} {a} {b} {dtype}", op, inputs)
            inputs = made(normal(*a, dtype=dtype), divisor(*b, dtype=dtype))
            yield Case(f"div {a} {b} {dtype}", torch.div, inputs)
            for name, op in CUTTING.items():
                yield Case(f"{name} {a} {b} {dtype}", op, inputs, exact=True)
        x = made(normal(5, 24, dtype=dtype))
        for name, op in {
            "add": lambda x: aten.add.Scalar(x, 0.3),
            "sub": lambda x: aten.sub.Scalar(x, 0.3, 2),
            "rsub": lambda x: aten.rsub.Scalar(x, 1.5, 2),
            "mul": lambda x: aten.mul.Scalar(x, -0.7),
            "div": lambda x: aten.div.Scalar(x, 3),
            "radd": lambda x: 2 + x,
            "rdiv": lambda x: 2 / (x * x + 1),
        }.items():
            yield Case(f"{name} number {dtype}", op, x, roundings=3 if "rdiv" in name else 1.2)
        for name, op in {
            "remainder": lambda x: aten.remainder.Scalar(x, 0.75),
            "fmod": lambda x: aten.fmod.Scalar(x, -0.75),
            "floor_divide": lambda x: x // 0.75,
            "div trunc": lambda x: aten.div.Scalar_mode(x, 0.75, rounding_mode="trunc"),
        }.items():
            yield Case(f"{name} number {dtype}", op, x, exact=True)
        extremes = made(special(4, 50, dtype=dtype), special(4, 50, dtype=dtype))
        for op in (torch.add, torch.mul, torch.div, torch.maximum, torch.minimum):
            yield Case(f"{op.__name__} of NaN and infinity {dtype}", op, extremes, exact=True)


def integers() -> Iterator[Case]:
    """Sums, products, quotients, bits of integers and booleans."""
    for dtype in INTS:
        for a, b in PAIRS:
            what = f"{a} {b} {dtype}"
            inputs = made(ints(0, 120, *a, dtype=dtype), ints(0, 120, *b, dtype=dtype))
            for name, op in BINARY.items():
                yield Case(f"{name} {what}", op, inputs, exact=True)
            for op in (torch.maximum, torch.minimum):
                yield Case(f"{op.__name__} {what}", op, inputs, exact=True)
            for op in (torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor):
                yield Case(f"{op.__name__} {what}", op, inputs, exact=True)
            inputs = made(normal(*a, dtype=dtype), divisor(*b, dtype=dtype))
            yield Case(f"div {what}", torch.div, inputs)
            for name, op in CUTTING.items():
                yield Case(f"{name} {what}", op, inputs, exact=True)
        x, small = ints(-9, 100, 5, 24, dtype=dtype), ints(0, 5, 5, 24, dtype=dtype)
        for name, op in {
            "add": lambda x: x + 3,
            "rsub": lambda x: 3 - x,
            "mul": lambda x: x * 2,
            "add float": lambda x: x + 0.5,
            "floor_divide": lambda x: x // 3,
            "remainder": lambda x: x % 7,
            "neg": torch.neg,
            "abs": torch.abs,
            "sign": torch.sign,
            "relu": torch.relu,
            "ceil": torch.ceil,
            "bitwise_not": torch.bitwise_not,
            "clamp": lambda x: x.clamp(2, 50),
            "clamp min": lambda x: x.clamp(min=4),
            "clamp max float": lambda x: x.clamp(max=4.5),
            "square": lambda x: x**2,
            "cube": lambda x: x**3,
            "and": lambda x: x & 6,
            "or": lambda x: x | 6,
            "xor": lambda x: x ^ 6,
            "shift left number": lambda x: aten.bitwise_left_shift.Tensor_Scalar(x, 2),
            "shift right number": lambda x: aten.bitwise_right_shift.Tensor_Scalar(x, 2),
        }.items():
            yield Case(f"{name} {dtype}", op, made(x), exact=True)
        for op in (torch.bitwise_left_shift, torch.bitwise_right_shift, torch.pow):
            yield Case(f"{op.__name__} {dtype}", op, made(x, small), exact=True)
        yield Case(f"sqrt {dtype}", torch.sqrt, made(small))
        yield Case(f"exp {dtype}", torch.exp, made(small))
    big = made(lambda g: torch.tensor([2**62, -(2**62), 2**53 + 1, -(2**63), 5, -1]))
    yield Case("add of large integers", lambda x: x + x, big, exact=True)
    yield Case("mul of large integers", lambda x: x * 7, big, exact=True)
    yield Case("maximum of large integers", lambda x: torch.maximum(x, x - 1), big, exact=True)
    yield Case("floor_divide of large integers", lambda x: x // 10, big, exact=True)
    coins = made(normal(4, 9, dtype=BOOL), ints(0, 2, 4, 9, dtype=BOOL))
    for op in (torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor, torch.mul, torch.add):
        yield Case(f"{op.__name__} of booleans", op, coins, exact=True)
    yield Case("bitwise_not of booleans", lambda a, b: torch.bitwise_not(a), coins, exact=True)


def promotions() -> Iterator[Case]:
    """Operands of two dtypes."""
    dtypes = (*ALL_FLOATS, torch.uint8, torch.int8, torch.int32, torch.int64, BOOL)
    for a in dtypes:
        for b in dtypes:
            if a == b:
                continue
            exact = not (a.is_floating_point or b.is_floating_point)
            for shapes in (((4, 24), (4, 24)), ((4, 24), ()), ((5, 7), (1, 7))):
                inputs = made(normal(*shapes[0], dtype=a), normal(*shapes[1], dtype=b))
                if a == torch.uint8 and shapes[1] == ():  # torch would make 255 of -1
                    inputs = made(normal(*shapes[0], dtype=a), ints(0, 4, dtype=b))
                what = f"{shapes} {a} {b}"
                # torch rounds an operand without dimensions to the dtype of the other ...
                roundings = 1.2 if shapes[1] else 4
                yield Case(f"add {what}", torch.add, inputs, exact, roundings)
                yield Case(f"mul {what}", torch.mul, inputs, exact, roundings)
                # ... and compares then: a number that both dtypes hold compares the same here.
                small = ints(0, 4, dtype=b) if shapes[1] == () else normal(*shapes[1], dtype=b)
                compared = made(normal(*shapes[0], dtype=a), small)
                yield Case(f"lt {what}", torch.lt, compared, exact=True)
                yield Case(f"where {what}", lambda x, y: torch.where(x > 0, x, y), inputs, True)


def unary() -> Iterator[Case]:
    """Functions of one float."""
    for dtype in ALL_FLOATS:
        for shape in ((3, 64), (5, 7), (), (0, 3)):
            x = normal(*shape, dtype=dtype)
            for name in (
                *("neg", "abs", "sign", "relu", "ceil", "floor", "round", "trunc", "isnan"),
                *("isinf", "logical_not"),
            ):
                op = getattr(torch, name)
                yield Case(f"{name} {shape} {dtype}", op, made(x), exact=True)
            for name in (
                *("exp", "expm1", "sin", "cos", "tanh", "sinh", "cosh", "erf", "sigmoid", "atan"),
                *("asinh", "reciprocal"),
            ):
                inside = divisor(*shape, dtype=dtype) if name == "reciprocal" else x
                yield Case(f"{name} {shape} {dtype}", getattr(torch, name), made(inside), False, 2)
            positive = uniform(0.1, 5, *shape, dtype=dtype)
            for name in ("sqrt", "rsqrt", "log", "log2", "log10", "log1p"):
                op = getattr(torch, name)
                yield Case(f"{name} {shape} {dtype}", op, made(positive), roundings=2)
            for name in ("asin", "acos", "atanh", "tan"):
                inside = uniform(-0.9, 0.9, *shape, dtype=dtype)
                op = getattr(torch, name)
                yield Case(f"{name} {shape} {dtype}", op, made(inside), roundings=2)
            over_one = uniform(1.1, 5, *shape, dtype=dtype)
            yield Case(f"acosh {shape} {dtype}", torch.acosh, made(over_one), roundings=2)
            for name, op in {
                "gelu": F.gelu,
                "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
                "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
                "elu": lambda x: F.elu(x, 0.7),
                "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.25),
                "clamp": lambda x: x.clamp(-0.5, 0.25),
                "clamp min": lambda x: x.clamp(min=0.25),
                "square": lambda x: x**2,
            }.items():
                yield Case(f"{name} {shape} {dtype}", op, made(x), roundings=2)
            for exponent in (0.5, -0.5, -1.0, 3.0, 1.7):
                op = lambda x, e=exponent: x**e  # noqa: E731
                yield Case(f"pow {exponent} {shape} {dtype}", op, made(positive), roundings=2)
            yield Case(f"2 ** x {shape} {dtype}", lambda x: 2.0**x, made(x), roundings=2)
            yield Case(f"pow {shape} {dtype}", torch.pow, made(positive, x), roundings=2)
            yield Case(f"atan2 {shape} {dtype}", torch.atan2, made(x, positive), roundings=2)
            inside = uniform(0.05, 0.95, *shape, dtype=dtype)
            yield Case(f"logit {shape} {dtype}", torch.logit, made(inside), roundings=3)
            eps = lambda x: torch.logit(x, 0.2)  # noqa: E731
            yield Case(f"logit eps {shape} {dtype}", eps, made(inside), roundings=3)
        odd = made(special(3, 40, dtype=dtype))
        for name, op in {
            "relu": torch.relu,
            "clamp": lambda x: x.clamp(-1, 2),
            "isnan": torch.isnan,
            "isinf": torch.isinf,
            "hardtanh": F.hardtanh,
            "logical_not": torch.logical_not,
            "floor": torch.floor,
            "round": torch.round,
        }.items():
            yield Case(f"{name} of NaN and infinity {dtype}", op, odd, exact=True)
        yield Case(f"sqrt of NaN and infinity {dtype}", torch.sqrt, odd)
        yield Case(f"exp of NaN and infinity {dtype}", torch.exp, odd, roundings=2)
    large = made(lambda g: torch.tensor([1e5, -3e6, 1e10, 0.0, 123456.78]))
    yield Case("sin of large numbers", torch.sin, large)
    yield Case("cos of large numbers", torch.cos, large)
    yield Case("exp past the ends", torch.exp, made(lambda g: torch.tensor([-200.0, 0, 1])))
    halves = made(lambda g: torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]))
    yield Case("round of halves", torch.round, halves, exact=True)


def choices() -> Iterator[Case]:
    """Comparisons, logic, where, clamp by tensors."""
    for dtype in (*ALL_FLOATS, *INTS, BOOL):
        for a, b in PAIRS:
            what = f"{a} {b} {dtype}"
            inputs = made(normal(*a, dtype=dtype), normal(*b, dtype=dtype))
            for name, op in (COMPARISONS | LOGICAL).items():
                yield Case(f"{name} {what}", op, inputs, exact=True)
            yield Case(f"where {what}", lambda x, y: torch.where(x > 0, x, y), inputs, exact=True)
        x = made(normal(6, 40, dtype=dtype))
        for name, op in COMPARISONS.items():
            yield Case(f"{name} number {dtype}", lambda x, op=op: op(x, 1), x, exact=True)
        mask = made(normal(6, 40, dtype=dtype), ints(0, 2, 6, 1, dtype=BOOL))
        yield Case(
            f"masked_fill {dtype}", lambda x, m: x.masked_fill(m, 1), mask, exact=True
        )  # fmt: skip
        wide_mask = made(normal(6, 1, dtype=dtype), ints(0, 2, 6, 40, dtype=BOOL))
        yield Case(
            f"masked_fill of a wider mask {dtype}",
            lambda x, m: torch.where(m, x, 0),
            wide_mask,
            exact=True,
        )
        if dtype != BOOL:
            three = made(*(normal(5, 24, dtype=dtype) for _ in range(3)))
            yield Case(f"clamp by tensors {dtype}", torch.clamp, three, exact=True)
            two = made(normal(5, 24, dtype=dtype), normal(1, 24, dtype=dtype))
            yield Case(f"clamp by a tensor {dtype}", lambda x, lo: x.clamp(min=lo), two, exact=True)
    odd = made(special(5, 40), special(5, 40))
    for name, op in COMPARISONS.items():
        yield Case(f"{name} of NaN", op, odd, exact=True)
    yield Case(
        "masked_fill with -inf",
        lambda x, y: x.masked_fill(y > 0, float("-inf")),
        odd,
        exact=True,
    )


def casts() -> Iterator[Case]:
    """Every dtype to every other, and copies."""
    dtypes = (*ALL_FLOATS, *INTS, BOOL)
    for a in dtypes:
        for shape in ((4, 64), (3, 7), ()):
            x = made(normal(*shape, dtype=a))
            for b in dtypes:
                if a != b:
                    op = lambda x, b=b: x.to(b)  # noqa: E731
                    yield Case(f"{shape} {a} to {b}", op, x, exact=True)
            yield Case(f"clone {shape} {a}", lambda x: x.clone(), x, exact=True)
    odd = made(special(3, 40))
    for b in (HALF, BFLOAT, DOUBLE, BOOL):
        yield Case(f"NaN and infinity to {b}", lambda x, b=b: x.to(b), odd, exact=True)
    wide = made(uniform(-7e4, 7e4, 500))
    for b in (HALF, BFLOAT):
        yield Case(f"large to {b}", lambda x, b=b: x.to(b), wide, exact=True)
    big = made(lambda g: torch.tensor([2**62 + 1, -(2**53) - 1, 2**31, 300, -1]))
    for b in (FLOAT, DOUBLE, torch.int32, torch.uint8, BOOL):
        yield Case(f"large integers to {b}", lambda x, b=b: x.to(b), big, exact=True)


def shapes_of(dtype: torch.dtype) -> Iterator[tuple[str, Callable, Callable]]:
    """Name, op, inputs of the ops that move elements."""
    x3, x4 = made(normal(3, 10, 64, dtype=dtype)), made(normal(2, 3, 5, 16, dtype=dtype))
    odd = made(normal(3, 5, 7, dtype=dtype))
    for name, x in (("3", x3), ("odd", odd)):
        for dims in ((0, 2, 1), (1, 0, 2), (2, 1, 0), (-1, 0, 1)):
            yield f"permute {name} {dims}", lambda x, d=dims: x.permute(d).clone(), x
        yield f"transpose {name}", lambda x: x.transpose(-1, -2) + 0, x
        yield f"slice {name}", lambda x: x[:, 1:-1].clone(), x
        yield f"slice step {name}", lambda x: x[..., 1::3].clone(), x
        yield f"slice past the end {name}", lambda x: x[:, 2:100, -3:].clone(), x
        yield f"slice of nothing {name}", lambda x: x[:, 4:2].clone(), x
        yield f"select {name}", lambda x: x[:, -2].clone(), x
        yield f"select last {name}", lambda x: x[..., 3].clone(), x
        yield f"split {name}", lambda x: x.split(2, 1), x
        yield f"split sizes {name}", lambda x: x.split([1, 3, x.shape[1] - 4], 1), x
        yield f"chunk last {name}", lambda x: [t.clone() for t in x.chunk(2, -1)], x
        yield f"unbind {name}", lambda x: x.unbind(1), x
        yield f"unsqueeze {name}", lambda x: x.unsqueeze(1).clone(), x
        yield f"expand {name}", lambda x: x[:, :1].expand(3, 6, -1).clone(), x
        yield f"expand new {name}", lambda x: x[0, :, :1].expand(2, -1, 9).clone(), x
        yield f"view {name}", lambda x: x.reshape(-1, x.shape[-1]).clone(), x
        yield f"flatten permuted {name}", lambda x: x.permute(1, 0, 2).reshape(-1), x
        yield f"repeat {name}", lambda x: x.repeat(2, 1, 3), x
        yield f"repeat new {name}", lambda x: x.repeat(2, 1, 2, 1), x
        yield f"cat {name}", lambda x: torch.cat([x, x[:, :1], x[:, 2:]], 1), x
        yield f"cat last {name}", lambda x: torch.cat([x[..., 3:], x[..., :3]], -1), x
        yield f"cat many {name}", lambda x: torch.cat([x[:, :1]] * 11, 1), x
        yield f"stack {name}", lambda x: torch.stack([x, x], 1), x
        yield f"stack last {name}", lambda x: torch.stack([x, x, x], -1), x
        yield f"flip {name}", lambda x: x.flip(0, 2), x
        yield f"roll {name}", lambda x: x.roll((1, -2), (0, 2)), x
        yield f"roll flat {name}", lambda x: x.roll(5), x
        yield f"pad {name}", lambda x: F.pad(x, (1, 2, 3, 0), value=1), x
        yield f"tril {name}", lambda x: x.tril(), x
        yield f"tril 2 {name}", lambda x: x.tril(2), x
        yield f"tril -1 {name}", lambda x: x.tril(-1), x
        yield f"narrow {name}", lambda x: aten.narrow_copy(x, 1, 2, 2), x
        yield f"diagonal {name}", lambda x: x.diagonal(1, 1, 2).clone(), x
        yield f"diagonal -1 {name}", lambda x: x.diagonal(-1, 0, 2).clone(), x
        yield f"unfold {name}", lambda x: x.unfold(1, 3, 2).clone(), x
        yield f"slice_scatter {name}", lambda x: torch.slice_scatter(x, x[:, :2], 1, 1, 3), x
        yield (
            f"slice_scatter step {name}",
            lambda x: torch.slice_scatter(x, x[..., :2], 2, 0, 4, 2),
            x,
        )
        yield f"select_scatter {name}", lambda x: torch.select_scatter(x, x[:, 0], 1, -1), x
        yield f"full_like {name}", lambda x: torch.full_like(x, 1), x
    yield "rotate half", lambda x: torch.cat((x[..., 8:], x[..., :8]), -1), x4
    yield "t", lambda x: x[0, 0].t().clone(), x4
    yield "squeeze", lambda x: x[:1].squeeze(0).clone(), x4
    yield "squeeze dims", lambda x: x[:1, :, :1].squeeze((0, 2, 3)).clone(), x4
    yield "heads", lambda x: x.permute(0, 2, 1, 3).reshape(2, 5, 48), x4
    yield "repeat_kv", lambda x: x[:, :, None].expand(2, 3, 4, 5, 16).reshape(2, 12, 5, 16), x4
    yield "as_strided", lambda x: aten.as_strided_copy(x, [3, 4], [7, 2], 5), odd
    shuffled = made(normal(2, 12, 3, 5, dtype=dtype))
    yield "pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), shuffled
    square = made(normal(2, 3, 6, 8, dtype=dtype))
    yield "pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), square
    if dtype.is_floating_point:
        yield "reflect 2", lambda x: F.pad(x, (2, 3, 1, 4), "reflect"), square
        yield "replicate 2", lambda x: F.pad(x, (2, 3, 1, 4), "replicate"), square
        line = made(normal(2, 3, 9, dtype=dtype))
        yield "reflect 1", lambda x: F.pad(x, (2, 8), "reflect"), line
        yield "replicate 1", lambda x: F.pad(x, (0, 12), "replicate"), line
    empty = made(normal(0, 3, 4, dtype=dtype))
    yield "cat of nothing", lambda x: torch.cat([x, x], 0), empty
    yield "permute of nothing", lambda x: x.permute(2, 1, 0).clone(), empty
    eight = made(normal(2, 1, 3, 2, 1, 2, 3, 4, dtype=dtype))
    yield "permute of 8 dimensions", lambda x: x.permute(7, 1, 3, 5, 0, 2, 4, 6).clone(), eight
    if dtype.is_floating_point:
        mixed = made(normal(3, 8, dtype=dtype), normal(2, 8, dtype=DOUBLE))
        yield "cat of two dtypes", lambda x, y: torch.cat([x, y]), mixed
    two = made(normal(3, 8, dtype=dtype), normal(8, dtype=dtype))
    yield "copy", lambda x, y: aten.copy(x, y), two
    yield "fill", lambda x, y: aten.fill.Tensor(x, y[2]), two
    yield "fill number", lambda x, y: aten.fill.Scalar(x, 1), two


def shape_ops() -> Iterator[Case]:
    """Copies of views, in all dtype sizes."""
    for dtype in (HALF, FLOAT, DOUBLE, torch.int8, torch.int64, BOOL):
        for name, op, inputs in shapes_of(dtype):
            yield Case(f"{name} {dtype}", op, inputs, exact=True)


def crops() -> Iterator[Case]:
    """Negative margins; ExecuTorch's kernel on the CPU refuses them."""
    for dtype in (HALF, FLOAT, torch.int64):
        x = made(normal(3, 5, 7, dtype=dtype))
        for pad in ((-1, 2), (-1, 2, -1, -2), (-3, -4), (0, 0, -2, 0, 1, -1)):
            yield Case(f"pad {pad} {dtype}", lambda x, p=pad: F.pad(x, p, value=2), x, exact=True)


def making() -> Iterator[Case]:
    """Tensors out of numbers."""
    x = made(normal(3, 4))
    for dtype in (*ALL_FLOATS, *INTS):
        for name, op in {
            "arange": lambda d: torch.arange(11, dtype=d),
            "arange step": lambda d: torch.arange(2, 30, 3, dtype=d),
            "full": lambda d: torch.full((3, 5), 7, dtype=d),
            "zeros": lambda d: torch.zeros(2, 3, dtype=d),
            "ones": lambda d: torch.ones(9, dtype=d),
            "scalar_tensor": lambda d: torch.scalar_tensor(3, dtype=d),
        }.items():
            yield Case(f"{name} {dtype}", lambda x, op=op, d=dtype: op(d), x, exact=True)
    yield Case("arange of floats", lambda x: torch.arange(-1.5, 2, 0.25), x, exact=True)
    yield Case("arange down", lambda x: torch.arange(10, -3, -4), x, exact=True)


def index_ops() -> Iterator[Case]:
    """Reading and writing by index; an index that repeats writes equal values."""
    for dtype in (HALF, BFLOAT, FLOAT, DOUBLE, torch.int8, torch.int64, BOOL):
        for index_dtype in (torch.int32, torch.int64):
            what = f"{dtype} {index_dtype}"
            for D in (64, 7, 1):
                table, rows = normal(20, D, dtype=dtype), ints(0, 20, 3, 5, dtype=index_dtype)
                yield Case(
                    f"embedding {D} {what}", lambda w, i: F.embedding(i, w), made(table, rows), True
                )
                line = ints(0, 20, 6, dtype=index_dtype)
                back = ints(-20, 20, 6, dtype=index_dtype)
                yield Case(
                    f"index_select 0 {D} {what}",
                    lambda w, i: w.index_select(0, i),
                    made(table, line),
                    exact=True,
                )
                yield Case(f"index {D} {what}", lambda w, i: w[i], made(table, back), exact=True)
                yield Case(f"index of two {D} {what}", lambda w, i: w[i], made(table, rows), True)
        x = normal(4, 6, 5, 8, dtype=dtype)
        four, five, six = (ints(-4, n, 3) for n in (4, 5, 6))
        for name, op, given in (
            ("select 2", lambda x, i: x.index_select(2, i), ints(0, 5, 7)),
            ("select last", lambda x, i: x.index_select(-1, i), ints(0, 8, 3)),
            ("first", lambda x, i: x[i], four),
            ("second", lambda x, i: x[:, i], six),
            ("third", lambda x, i: x[:, :, i], five),
            ("last", lambda x, i: x[..., i], four),
            ("two together", lambda x, i: x[:, i, i], five),
            ("two apart", lambda x, i: x[i, :, i], four),
            ("two apart, last", lambda x, i: x[:, i, :, i], four),
            ("broadcast", lambda x, i: x[i[:, None], i], four),
            ("all", lambda x, i: x[i, i, i, i], four),
            ("gather 0", lambda x, i: x.gather(0, i), ints(0, 4, 2, 6, 3, 8)),
            ("gather 1", lambda x, i: x.gather(1, i), ints(0, 6, 4, 9, 5, 8)),
            ("gather -1", lambda x, i: x.gather(-1, i), ints(0, 8, 4, 6, 5, 1)),
        ):
            yield Case(f"index {name} {dtype}", op, made(x, given), exact=True)
        once = lambda n, k: lambda g: torch.randperm(n, generator=g)[:k]  # noqa: E731
        for name, op, given, values in (
            ("0", lambda x, i, v: aten.index_put(x, [i], v), once(4, 3), (3, 6, 5, 8)),
            ("1", lambda x, i, v: aten.index_put(x, [None, i], v), once(6, 2), (4, 2, 5, 8)),
            ("2", lambda x, i, v: aten.index_put(x, [None, None, i], v), once(5, 2), (4, 6, 2, 8)),
            ("3", lambda x, i, v: aten.index_put(x, [None] * 3 + [i], v), once(8, 3), (1, 5, 3)),
            ("low", lambda x, i, v: aten.index_put(x, [None, i], v), once(6, 2), (8,)),
            ("one", lambda x, i, v: aten.index_put(x, [i], v), once(4, 3), ()),
            ("two", lambda x, i, v: aten.index_put(x, [i, i], v), once(4, 3), (3, 5, 8)),
            ("back", lambda x, i, v: aten.index_put(x, [i - 4], v), once(4, 2), (2, 6, 5, 8)),
            ("copy", lambda x, i, v: x.index_copy(1, i, v), once(6, 2), (4, 2, 5, 8)),
            ("select_scatter", lambda x, i, v: x.select_scatter(v, 1, 2), once(6, 2), (4, 5, 8)),
        ):
            inputs = made(x, given, normal(*values, dtype=dtype))
            yield Case(f"index_put {name} {dtype}", op, inputs, exact=True)
        columns = lambda g: torch.rand(4, 6, 5, 8, generator=g).argsort(1)[:, :4, :3]  # noqa: E731
        inputs = made(x, columns, normal(4, 6, 5, 8, dtype=dtype))
        yield Case(f"scatter {dtype}", lambda x, i, v: x.scatter(1, i, v), inputs, exact=True)
        yield Case(
            f"scatter number {dtype}", lambda x, i, v: x.scatter(1, i, 1), inputs, exact=True
        )
    for dtype in (*ALL_FLOATS, torch.int32, torch.int64):
        x, v = normal(5, 8, dtype=dtype), normal(40, 8, dtype=dtype)
        exact = not dtype.is_floating_point
        yield Case(
            f"index_put accumulate {dtype}",
            lambda x, i, v: aten.index_put(x, [i], v, True),
            made(x, ints(-5, 5, 40), v),
            exact=exact,
        )
        yield Case(
            f"index_put accumulate two {dtype}",
            lambda x, i, v: aten.index_put(x, [i, i + 1], v[:, 0], True),
            made(x, ints(0, 5, 40), v),
            exact=exact,
        )
        yield Case(
            f"scatter_add {dtype}",
            lambda x, i, v: x.scatter_add(0, i, v),
            made(x, ints(0, 5, 30, 7), v),
            exact=exact,
        )


def long_indices() -> Iterator[Case]:
    """Sums by more indices than one destination is compared with one by one."""
    put = lambda x, i, v: aten.index_put(x, [i], v, True)  # noqa: E731
    put_two = lambda x, i, j, v: aten.index_put(x, [i, None, j], v, True)  # noqa: E731
    for dtype in (*ALL_FLOATS, torch.int16, torch.int64):
        exact = not dtype.is_floating_point
        for name, low, high, n, columns in (
            ("", -3000, 3000, 20000, 20),
            ("to few", 0, 3, 9001, 5),
            ("to one", 7, 8, 20000, 3),
            ("to many", 0, 3000, 5000, 300),
        ):
            x, v = normal(3000, columns, dtype=dtype), normal(n, columns, dtype=dtype)
            inputs = made(x, ints(low, high, n), v)
            yield Case(f"index_put accumulate long {name} {dtype}", put, inputs, exact=exact)
        x, v = normal(70, 6, 300, dtype=dtype), normal(9000, 6, dtype=dtype)
        inputs = made(x, ints(-70, 70, 9000), ints(0, 300, 9000, dtype=torch.int32), v)
        yield Case(f"index_put accumulate long two {dtype}", put_two, inputs, exact=exact)
        for dim, shape in ((0, (9000, 7)), (1, (3, 6000)), (1, (2, 5000, 3)), (0, (70000,))):
            x, v = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
            inputs = made(x, ints(0, shape[dim], *shape), v)
            add = lambda x, i, v, d=dim: x.scatter_add(d, i, v)  # noqa: E731
            yield Case(f"scatter_add long {shape} {dtype}", add, inputs, exact=exact)


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "arithmetic": arithmetic,
    "integers": integers,
    "promotions": promotions,
    "unary": unary,
    "choices": choices,
    "casts": casts,
    "shapes": shape_ops,
    "crops": crops,
    "making": making,
    "indices": index_ops,
    "long indices": long_indices,
}


REFUSED: tuple[tuple[str, Callable, tuple[Tensor, Tensor], Tensor, str], ...] = (
    (
        "embedding past the end",
        lambda w, i: F.embedding(i, w),
        (torch.rand(20, 8), torch.tensor([3, 19])),
        torch.tensor([3, 20]),
        r"embedding.out: expected indices in 0\.\.19, got 20",
    ),
    (
        "embedding before the start",
        lambda w, i: F.embedding(i, w),
        (torch.rand(20, 8), torch.tensor([3, 0])),
        torch.tensor([3, -1]),
        r"embedding.out: expected indices in 0\.\.19, got -1",
    ),
    (
        "index",
        lambda x, i: x[:, i],
        (torch.rand(4, 6), torch.tensor([5, -6])),
        torch.tensor([5, -7]),
        r"index.Tensor_out: expected indices in 0\.\.5, got -7",
    ),
    (
        "index_put",
        lambda x, i: aten.index_put(x, [i], x[:2]),
        (torch.rand(4, 6), torch.tensor([3, -4])),
        torch.tensor([3, 4]),
        r"index_put.*: expected indices in 0\.\.3, got 4",
    ),
    (
        "scatter_add",
        lambda x, i: x.scatter_add(0, i, x),
        (torch.rand(4), torch.tensor([3, 0])),
        torch.tensor([3, 4]),
        r"scatter_add.out: expected indices in 0\.\.3, got 4",
    ),
    (
        "scatter_add of many",
        lambda x, i: x.scatter_add(0, i, x),
        (torch.ones(5000), torch.arange(5000)),
        torch.arange(1, 5001),
        r"scatter_add.out: expected indices in 0\.\.4999, got 5000",
    ),
    (
        "remainder by 0",
        torch.remainder,
        (torch.arange(4), torch.tensor([3, 1, 2, -1])),
        torch.tensor([3, 1, 0, 1]),
        "remainder.*: expected divisors other than 0",
    ),
)


def refusals(folder: Path, failures: list[str]) -> int:
    """Inputs that no kernel can use are an error of the call, and of no later one."""
    n_right = 0
    for name, function, good, bad, expected in REFUSED:
        case = Case(name, function, lambda g: ())
        path = folder / f"refused {name}.pte"
        if not path.exists():
            lower([case], [list(good)], path)
        if LOWER_ONLY in sys.argv:
            continue
        with cuda_int4.load(path, device="cuda") as model:
            for _ in range(4):  # the last ones replay a CUDA graph
                same = torch.equal(model.forward(*good)[0], function(*good))
                try:
                    model.forward(good[0], bad)
                    message = "no error"
                except CudaInt4Error as error:
                    message = str(error)
                if same and re.search(expected, message):
                    n_right += 1
                else:
                    failures.append(f"{name}: right before {same}, then {message}")
    return n_right


if __name__ == "__main__":
    on_cpu = os.environ.get("CHECK_DEVICE") == "cpu"
    sys.exit(main(GROUPS, {} if on_cpu else {"refusals": refusals}))
