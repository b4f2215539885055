"""Checks the reductions, norms and products on CUDA against float64, through a ``.pte``.

    python tests/gpu/check_cuda_ops_reduce.py

Needs the package, built with nvcc, executorch and a GPU. Each group of cases is one model, lowered
for CUDA (a node left outside of the delegate is a failure) and run five times, on two sets of
inputs in turns: what stands in memory from the run before is wrong, and the last runs replay a CUDA
graph. Equal inputs must give equal bits. Prints a line a group and a summary; the exit status is 0
if all are right. Names of groups as arguments run only those. With --lowered=FOLDER the models are
written there, and read where they are there already; --lower-only stops then, and needs no GPU.
With --quick every ninth case runs, for compute-sanitizer.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import cuda_int4

HALF, BFLOAT, FLOAT, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
FLOATS = (HALF, BFLOAT, FLOAT)
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOATS, DOUBLE, *INTS)}
aten = torch.ops.aten
MAX_PRINTED = 60
LOWERED, LOWER_ONLY, QUICK = "--lowered=", "--lower-only", "--quick"


@dataclass
class Case:
    """One call: ``function`` of tensors made by ``inputs(generator)``."""

    name: str
    function: Callable[..., Any]
    inputs: Callable[[torch.Generator], tuple[Tensor, ...]]
    exact: bool = False  # equal to torch on the CPU, bit by bit; else near to float64
    roundings: float = 1.2
    like: tuple[Tensor, ...] = ()  # dtypes and shapes of the outputs, once known


def normal(*shape: int, dtype: torch.dtype = FLOAT, mean: float = 0.5) -> Callable:
    """Makes a tensor of signed values; small integers for integer dtypes, coins for bool."""

    def make(generator: torch.Generator) -> Tensor:
        if dtype == torch.bool:
            return torch.rand(shape, generator=generator) < 0.1
        if not dtype.is_floating_point:
            low = 0 if dtype == torch.uint8 else -3
            return torch.randint(low, 4, shape, generator=generator).to(dtype)
        drawn = DOUBLE if dtype == DOUBLE else FLOAT
        return (torch.randn(shape, generator=generator, dtype=drawn) + mean).to(dtype)

    return make


def made(*makers: Callable) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda generator: tuple(maker(generator) for maker in makers)


def special(*shape: int, dtype: torch.dtype = FLOAT) -> Callable:
    """Small integers (so that there are ties) with NaN and infinities strewn in."""

    def make(generator: torch.Generator) -> Tensor:
        x = torch.randint(-4, 5, shape, generator=generator).to(dtype)
        where = torch.rand(shape, generator=generator)
        x = x.masked_fill(where < 0.01, float("nan")).masked_fill(where > 0.97, float("inf"))
        return x.masked_fill((where > 0.5) & (where < 0.53), float("-inf"))

    return make


def shuffled(*shape: int, dtype: torch.dtype = FLOAT) -> Callable:
    """All values differ."""

    def make(generator: torch.Generator) -> Tensor:
        numel = torch.Size(shape).numel()
        return (torch.randperm(numel, generator=generator) - numel // 2).view(shape).to(dtype)

    return make


SHAPES_AND_DIMS: tuple[tuple[tuple[int, ...], tuple[int, ...] | None], ...] = (
    ((7,), (0,)),
    ((), None),
    ((3, 5), None),
    ((33, 129), (-1,)),
    ((129, 33), (0,)),
    ((2, 3, 4, 5), (1, 3)),
    ((5, 6, 7, 8), (0, 2)),
    ((2, 37, 65), (1,)),
    ((1, 20001), (1,)),
    ((3, 9000), (-1,)),
    ((4100, 3), (0,)),
    ((70000, 2), (-1,)),
)


def sums() -> Iterator[Case]:
    for shape, dims in SHAPES_AND_DIMS:
        for dtype in (*FLOATS, DOUBLE):
            x = made(normal(*shape, dtype=dtype))
            what = f"{shape} {dims} {dtype}"
            for keepdim in (False, True):
                yield Case(f"sum {what}", lambda x, d=dims, k=keepdim: x.sum(d, k), x)
            yield Case(f"mean {what}", lambda x, d=dims: x.mean(d), x)
        for dtype in (*INTS, torch.bool):
            x = made(normal(*shape, dtype=dtype))
            yield Case(f"sum {shape} {dtype}", lambda x, d=dims: x.sum(d), x, exact=True)
    half = made(normal(6, 300, dtype=HALF))
    yield Case("sum to float", lambda x: x.sum(-1, dtype=FLOAT), half)
    yield Case("mean of all", lambda x: x.mean(), half)
    ints = made(normal(6, 300, dtype=torch.int32))
    yield Case("sum of ints to float", lambda x: x.sum(-1, dtype=FLOAT), ints)
    yield Case("mean of ints", lambda x: x.mean(-1, dtype=FLOAT), ints)
    yield Case("empty sum", lambda x: x.sum(0), made(normal(0, 3)), exact=True)
    yield Case("empty mean", lambda x: x.mean(0), made(normal(0, 3)), exact=True)
    yield Case("nothing to sum", lambda x: x.sum(1), made(normal(0, 3)), exact=True)


def products_of_elements() -> Iterator[Case]:
    for dtype in (*FLOATS, DOUBLE):
        x = made(lambda g, t=dtype: (torch.randn(4, 9, 6, generator=g) * 0.1 + 1).to(t))
        yield Case(f"prod {dtype}", lambda x: x.prod(), x, roundings=2)
        for dim in (0, 1, -1):
            yield Case(f"prod {dim} {dtype}", lambda x, d=dim: x.prod(d, keepdim=True), x)
    for dtype in INTS:
        x = made(normal(4, 9, 6, dtype=dtype))
        yield Case(f"prod {dtype}", lambda x: x.prod(1), x, exact=True)
    yield Case("empty prod", lambda x: x.prod(1), made(normal(3, 0)), exact=True)


def anys() -> Iterator[Case]:
    for dtype in (*FLOATS, DOUBLE, *INTS, torch.bool):
        for shape in ((13, 40), (1, 9000), (0, 3)):
            x = made(lambda g, s=shape, t=dtype: (torch.rand(s, generator=g) < 0.04).to(t))
            what = f"{shape} {dtype}"
            yield Case(f"any {what}", lambda x: x.any(), x, exact=True)
            yield Case(f"any 1 {what}", lambda x: x.any(1, keepdim=True), x, exact=True)
            yield Case(f"any (0,) {what}", lambda x: x.any((0,)), x, exact=True)
            yield Case(f"any () {what}", lambda x: aten.any.dims(x, []), x, exact=True)
    yield Case("any of NaN", lambda x: (x * float("nan")).any(), made(normal(3)), exact=True)


def extremes() -> Iterator[Case]:
    for shape, dims in SHAPES_AND_DIMS:
        for dtype in (*FLOATS, DOUBLE, *INTS, torch.bool):
            maker = special if dtype.is_floating_point else normal
            x = made(maker(*shape, dtype=dtype))
            what = f"{shape} {dims} {dtype}"
            if dims is None:
                if dtype != torch.bool:
                    yield Case(f"argmax {what}", lambda x: x.argmax(), x, exact=True)
                    yield Case(f"argmin {what}", lambda x: x.argmin(), x, exact=True)
                yield Case(f"max {what}", lambda x: x.max(), x, exact=True)
                yield Case(f"min {what}", lambda x: x.min(), x, exact=True)
                continue
            yield Case(f"amax {what}", lambda x, d=dims: x.amax(d), x, exact=True)
            yield Case(f"amin {what}", lambda x, d=dims: x.amin(d, True), x, exact=True)
            if len(dims) > 1:
                continue
            d = dims[0]
            yield Case(f"max dim {what}", lambda x, d=d: x.max(d), x, exact=True)
            yield Case(f"min dim {what}", lambda x, d=d: x.min(d, True), x, exact=True)
            if dtype != torch.bool:
                yield Case(f"argmax {what}", lambda x, d=d: x.argmax(d), x, exact=True)
                yield Case(f"argmin {what}", lambda x, d=d: x.argmin(d, True), x, exact=True)
    for dtype in FLOATS:
        row = made(normal(1, 128256, dtype=dtype))
        yield Case(f"argmax of a vocabulary {dtype}", lambda x: x.argmax(-1), row, exact=True)
    yield Case("amax of all", lambda x: x.amax(), made(normal(3, 4)), exact=True)


def variances() -> Iterator[Case]:
    for shape, dims in SHAPES_AND_DIMS:
        for dtype in (*FLOATS, DOUBLE):
            x = made(normal(*shape, dtype=dtype, mean=30))
            what = f"{shape} {dims} {dtype}"
            if torch.Size(shape).numel() < 2:
                yield Case(f"var {what}", lambda x: x.var(correction=0), x)
                continue
            yield Case(f"var {what}", lambda x, d=dims: x.var(d), x)
            yield Case(
                f"var_mean {what}",
                lambda x, d=dims: torch.var_mean(x, d, correction=0, keepdim=True),
                x,
            )
            yield Case(f"std {what}", lambda x, d=dims: aten.var(x, d, False, True), x)
    x = made(normal(3, 5))
    yield Case("var 1.5", lambda x: torch.var(x, 1, correction=1.5), x)
    yield Case("var of one", lambda x: x.var(1), made(normal(3, 1)), exact=True)


def softmaxes() -> Iterator[Case]:
    shapes = ((7, 5), (3, 33, 4), (2, 300), (2, 1000), (3, 8192), (2, 20003), (300, 64))
    for shape in shapes:
        for dtype in (*FLOATS, DOUBLE):
            x = made(normal(*shape, dtype=dtype))
            for dim in range(len(shape)):
                what = f"{shape} {dim} {dtype}"
                yield Case(f"softmax {what}", lambda x, d=dim: x.softmax(d), x)
                yield Case(f"log_softmax {what}", lambda x, d=dim: x.log_softmax(d), x)
    masked = made(lambda g: torch.randn(5, 70, generator=g).masked_fill(
        torch.rand(5, 70, generator=g) < 0.5, float("-inf")))  # fmt: skip
    yield Case("softmax with -inf", lambda x: x.softmax(-1), masked)
    yield Case(
        "softmax of -inf", lambda x: (x - float("inf")).softmax(-1), made(normal(2, 5)), exact=True
    )
    yield Case("softmax of nothing", lambda x: x.softmax(-1), made(normal(2, 0)), exact=True)


def norms() -> Iterator[Case]:
    for dtype in (*FLOATS, DOUBLE):
        for shape in ((3, 7), (2, 5, 64), (3, 1000), (4, 1280), (2, 4096), (1, 20000), (70, 8)):
            D = shape[-1]
            x, w, b = normal(*shape, dtype=dtype), normal(D, dtype=dtype), normal(D, dtype=dtype)
            what = f"{shape} {dtype}"
            yield Case(
                f"layer_norm {what}",
                lambda x, w, b, D=D: aten.native_layer_norm(x, [D], w, b, 1e-5),
                made(x, w, b),
                roundings=2,
            )
            yield Case(
                f"layer_norm without {what}",
                lambda x, D=D: aten.native_layer_norm(x, [D], None, None, 1e-3),
                made(x),
                roundings=2,
            )
        x, w = normal(3, 4, 5, 6, dtype=dtype), normal(5, 6, dtype=dtype)
        yield Case(
            f"layer_norm of two {dtype}", lambda x, w: F.layer_norm(x, (5, 6), w), made(x, w)
        )
        for inner, N, C, groups in (((5,), 2, 6, 3), ((9, 7), 3, 32, 8), ((100, 30), 1, 4, 2)):
            planes = (N, C, *inner)
            x, w, b = normal(*planes, dtype=dtype), normal(C, dtype=dtype), normal(C, dtype=dtype)
            yield Case(
                f"group_norm {planes} {dtype}",
                lambda x, w, b, g=groups: F.group_norm(x, g, w, b),
                made(x, w, b),
                roundings=2,
            )
            variance = made(x, w, b, b, lambda g, C=C, t=dtype: (torch.rand(C) + 0.5).to(t))
            yield Case(
                f"batch_norm {planes} {dtype}",
                lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b),
                variance,
                roundings=2,
            )
    x = normal(3, 40, dtype=BFLOAT)
    yield Case("rms_norm", lambda x, w: F.rms_norm(x, (40,), w), made(x, normal(40, dtype=BFLOAT)))


def running_sums() -> Iterator[Case]:
    for shape, dim in (((9,), 0), ((3, 4000), 1), ((4, 300, 5), 1), ((2000, 3), 0)):
        for dtype in (*FLOATS, DOUBLE):
            x = made(normal(*shape, dtype=dtype))
            yield Case(f"cumsum {shape} {dtype}", lambda x, d=dim: x.cumsum(d), x)
        for dtype in (*INTS, torch.bool):
            x = made(normal(*shape, dtype=dtype))
            yield Case(f"cumsum {shape} {dtype}", lambda x, d=dim: x.cumsum(d), x, exact=True)
    infinite = made(lambda g: torch.ones(2, 50).masked_fill(
        torch.rand(2, 50, generator=g) < 0.1, float("inf")))  # fmt: skip
    yield Case("cumsum of infinities", lambda x: x.cumsum(-1), infinite, exact=True)
    for dtype in (*FLOATS, DOUBLE):
        x = made(normal(3, 10, 6, dtype=dtype))
        for dim in (1, -1):
            yield Case(f"glu {dim} {dtype}", lambda x, d=dim: F.glu(x, d), x, roundings=2)


def topks() -> Iterator[Case]:
    for shape, k, dim in (
        ((8,), 3, 0),
        ((5, 64), 8, -1),
        ((3, 1024), 1024, -1),
        ((2, 1500), 700, 1),
        ((3, 5000), 50, -1),
        ((2, 600, 5), 7, 1),
        ((1, 128256), 40, -1),
        ((2, 30), 0, -1),
    ):
        for dtype in (FLOAT, DOUBLE, torch.int32, torch.int64):
            x = made(shuffled(*shape, dtype=dtype))
            for largest in (True, False):
                yield Case(
                    f"topk {shape} {k} {dim} {dtype} {largest}",
                    lambda x, k=k, d=dim, largest=largest: x.topk(k, d, largest),
                    x,
                    exact=True,
                )
        for dtype in (HALF, BFLOAT, torch.int8):
            x = made(normal(*shape, dtype=dtype))
            yield Case(
                f"topk values {shape} {k} {dtype}",
                lambda x, k=k, d=dim: x.topk(k, d)[0],
                x,
                exact=True,
            )
    nan = made(special(3, 300))
    yield Case("topk of NaN", lambda x: x.topk(20)[0], nan, exact=True)
    yield Case("smallest of NaN", lambda x: x.topk(290, largest=False)[0], nan, exact=True)


# With an addend, some of cuBLASLt's kernels round the product before they add it.
ROUNDED_TWICE = 1.6
MATRICES = (
    (1, 1, 1),
    (1, 64, 128),
    (1, 1000, 513),
    (2, 96, 2048),
    (5, 128, 72),
    (8, 257, 512),
    (17, 96, 64),
    (100, 130, 504),
    (129, 264, 200),
    (300, 512, 136),
    (4, 0, 8),
    (0, 4, 8),
    (4, 6, 0),
)


def matmuls() -> Iterator[Case]:
    for dtype in (*FLOATS, DOUBLE):
        for M, N, K in MATRICES:
            what = f"M={M} N={N} K={K} {dtype}"
            x, w = normal(M, K, dtype=dtype, mean=0), normal(N, K, dtype=dtype, mean=0)
            wt, bias = normal(K, N, dtype=dtype, mean=0), normal(N, dtype=dtype)
            full = normal(M, N, dtype=dtype)
            yield Case(f"linear {what}", F.linear, made(x, w))
            yield Case(
                f"linear with bias {what}", F.linear, made(x, w, bias), roundings=ROUNDED_TWICE
            )
            yield Case(f"mm {what}", torch.mm, made(x, wt))
            yield Case(f"addmm {what}", torch.addmm, made(bias, x, wt), roundings=ROUNDED_TWICE)
            yield Case(
                f"addmm of a matrix {what}",
                lambda c, x, w: torch.addmm(c, x, w, beta=0.5, alpha=2),
                made(full, x, wt),
                roundings=ROUNDED_TWICE,
            )
            yield Case(
                f"addmm times 0 {what}",
                lambda c, x, w: torch.addmm(c * float("nan"), x, w, beta=0),
                made(full, x, wt),
            )
            a, b = normal(3, M, K, dtype=dtype, mean=0), normal(3, K, N, dtype=dtype, mean=0)
            yield Case(f"bmm {what}", torch.bmm, made(a, b))
        x, w = normal(2, 3, 5, 24, dtype=dtype), normal(7, 24, dtype=dtype)
        yield Case(f"linear of 4 dimensions {dtype}", F.linear, made(x, w))
    for dtype in FLOATS:  # enough tiles of y for the large ones
        for K in (33, 40):
            x, w = normal(1450, K, dtype=dtype), normal(1432, K, dtype=dtype)
            yield Case(f"linear of many tiles K={K} {dtype}", F.linear, made(x, w))
            wt = normal(K, 1432, dtype=dtype)
            yield Case(f"mm of many tiles K={K} {dtype}", torch.mm, made(x, wt))
    for dtype in INTS:
        a, b = normal(5, 70, dtype=dtype), normal(70, 9, dtype=dtype)
        yield Case(f"mm {dtype}", torch.mm, made(a, b), exact=True)
        a, b = normal(2, 5, 70, dtype=dtype), normal(2, 70, 9, dtype=dtype)
        yield Case(f"bmm {dtype}", torch.bmm, made(a, b), exact=True)


# Input, weight, stride, padding, dilation, groups, transposed, output padding.
CONVOLUTIONS = (
    ((2, 3, 32, 32), (24, 3, 8, 8), 8, 0, 1, 1, False, 0),
    ((1, 3, 17, 19), (5, 3, 3, 3), 1, 1, 1, 1, False, 0),
    ((2, 8, 14, 13), (16, 8, 3, 2), (2, 1), (1, 0), (1, 2), 1, False, 0),
    ((3, 16, 9, 9), (24, 16, 1, 1), 1, 0, 1, 1, False, 0),
    ((2, 12, 10, 11), (12, 1, 3, 3), 1, 1, 1, 12, False, 0),
    ((2, 8, 10, 11), (6, 4, 3, 3), 1, 1, 1, 2, False, 0),
    ((2, 80, 101), (64, 80, 3), 2, 1, 1, 1, False, 0),
    ((1, 24, 50), (24, 1, 5), 1, 4, 1, 24, False, 0),
    ((2, 6, 7, 9), (6, 4, 3, 3), 2, 1, 1, 1, True, 1),
    ((2, 6, 7), (6, 2, 4), 3, 0, 2, 2, True, 0),
)


def convolutions() -> Iterator[Case]:
    for dtype in (*FLOATS, DOUBLE):
        for x, w, stride, padding, dilation, groups, transposed, more in CONVOLUTIONS:
            n_out = w[1] * groups if transposed else w[0]
            n = len(x) - 2
            lists = [
                [v] * n if isinstance(v, int) else list(v) for v in (stride, padding, dilation)
            ]
            options = (*lists, transposed, [more] * n, groups)
            parts = [normal(*shape, dtype=dtype, mean=0) for shape in (x, w, (n_out,))]
            what = f"{x} {w} {options} {dtype}"
            yield Case(
                f"convolution {what}",
                lambda x, w, b, o=options: aten.convolution(x, w, b, *o),
                made(*parts),
                roundings=ROUNDED_TWICE,
            )
            yield Case(
                f"convolution without bias {what}",
                lambda x, w, o=options: aten.convolution(x, w, None, *o),
                made(*parts[:2]),
            )


def pools() -> Iterator[Case]:
    for dtype in (*FLOATS, DOUBLE):
        x = made(normal(2, 3, 13, 18, dtype=dtype))
        what = str(dtype)
        yield Case(f"avg_pool {what}", lambda x: F.avg_pool2d(x, 3), x)
        yield Case(f"avg_pool padded {what}", lambda x: F.avg_pool2d(x, 3, 2, 1), x)
        yield Case(
            f"avg_pool ceil {what}",
            lambda x: F.avg_pool2d(x, (3, 4), (2, 3), (1, 2), True, False),
            x,
        )
        yield Case(f"avg_pool ceil padded {what}", lambda x: F.avg_pool2d(x, 4, 3, 2, True), x)
        yield Case(f"avg_pool divisor {what}", lambda x: F.avg_pool2d(x, 2, divisor_override=3), x)
        yield Case(f"adaptive {what}", lambda x: F.adaptive_avg_pool2d(x, (5, 7)), x)
        yield Case(f"adaptive larger {what}", lambda x: F.adaptive_avg_pool2d(x, (16, 1)), x)
        strewn = made(special(2, 3, 13, 18, dtype=dtype))
        for options in ((3,), (3, 2, 1), ((2, 3), (2, 1), (1, 1), (2, 3)), (3, 2, 1, 1, True)):
            yield Case(
                f"max_pool {options} {what}",
                lambda x, o=options: aten.max_pool2d_with_indices(x, *listed(o)),
                strewn,
                exact=True,
            )


def listed(options: tuple) -> list:
    return [list(o) if isinstance(o, tuple) else o if o is True else [o, o] for o in options]


GROUPS: dict[str, Callable[[], Iterator[Case]]] = {
    "sums": sums,
    "products of elements": products_of_elements,
    "any": anys,
    "extremes": extremes,
    "variances": variances,
    "softmax": softmaxes,
    "norms": norms,
    "running sums": running_sums,
    "topk": topks,
    "matmul": matmuls,
    "convolution": convolutions,
    "pooling": pools,
}


class Calls(nn.Module):
    """All calls of a group, one after the other."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, inputs: list[list[Tensor]]) -> list[Tensor]:
        return [out for case, x in zip(self.cases, inputs, strict=True) for out in results(case, x)]


def results(case: Case, inputs: Any) -> tuple[Tensor, ...]:
    found = case.function(*inputs)
    return (found,) if isinstance(found, Tensor) else tuple(found)


def lower(cases: list[Case], inputs: list[list[Tensor]], path: Path) -> list[str]:
    """Write the model; the targets that were left outside of the delegate."""
    program = torch.export.export(Calls(cases).eval(), (inputs,))
    partitioner = cuda_int4.CudaInt4Partitioner(devices=("cuda",))
    config = EdgeCompileConfig(_check_ir_validity=False)  # var_mean is not a core ATen op
    edge = to_edge_transform_and_lower(program, partitioner=[partitioner], compile_config=config)
    calls = [n for n in edge.exported_program().graph.nodes if n.op == "call_function"]
    names = [str(node.target) for node in calls]
    cuda_int4.save(edge.to_executorch(), path)
    return [name for name in names if "delegate" not in name and "getitem" not in name]


def wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@dataclass
class Expected:
    """What one call should give: dtypes and shapes, and values exact or in float64."""

    like: tuple[Tensor, ...]  # of values only where the case is exact
    exact: tuple[Tensor, ...]


def expected(case: Case, inputs: list[Tensor]) -> Expected:
    """From torch: on the CPU, bit by bit, or in float64, on the GPU where there is one."""
    if case.exact:
        eager = results(case, inputs)
        return Expected(eager, eager)
    if not case.like:
        with FakeTensorMode() as fake:
            case.like = results(case, [fake.from_tensor(x) for x in inputs])
    # Under a sanitizer only the kernels that are checked run on the GPU.
    device = "cuda" if torch.cuda.is_available() and QUICK not in sys.argv else "cpu"
    exact = results(case, [wide(x).to(device) for x in inputs])
    return Expected(case.like, tuple(tensor.double().cpu() for tensor in exact))


def is_right(case: Case, found: Tensor, want: Expected, index: int) -> tuple[bool, str]:
    """Whether output ``index`` is what it should be, and why not."""
    like, exact = want.like[index], want.exact[index]
    if found.shape != like.shape or found.dtype != like.dtype:
        shape = f"expected {like.dtype} {tuple(like.shape)}"
        return False, f"{shape}, got {found.dtype} {tuple(found.shape)}"
    if case.exact:
        same = torch.equal(found.nan_to_num(777), exact.nan_to_num(777))
        same = same and torch.equal(found.isnan(), exact.isnan())
        return same, f"expected {exact.flatten()[:5]}, got {found.flatten()[:5]}"
    rounded = exact.to(found.dtype).double()
    y = found.double()
    if not torch.equal(y.isfinite(), exact.isfinite()):
        return False, f"not finite where it should be: {y.flatten()[:5]}, {exact.flatten()[:5]}"
    y, exact, rounded = (t[t.isfinite()] for t in (y, exact, rounded))
    if exact.numel() == 0:
        return True, ""
    scale = exact.norm().clamp_min(1e-30)
    error, rounding = float((y - exact).norm() / scale), float((rounded - exact).norm() / scale)
    unit = torch.finfo(found.dtype).eps
    bound = case.roundings * rounding + (1e-12 if found.dtype == DOUBLE else 2e-6)
    worst = float((y - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
    right = error <= bound and worst <= 3 * unit + 20 * torch.finfo(FLOAT).eps
    return right, f"error {error:.2e}, bound {bound:.2e}, worst element {worst:.2e}"


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.flatten().view(torch.uint8), right.flatten().view(torch.uint8))


def check_group(name: str, cases: list[Case], folder: Path, failures: list[str]) -> int:
    """Run a group; the number of outputs that were right."""
    turns = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        turns.append([list(case.inputs(generator)) for case in cases])
    path = folder / f"{name}.pte"
    if not path.exists():
        outside = lower(cases, turns[0], path)
        if outside:
            failures.append(f"{name}: left outside of the delegate: {sorted(set(outside))}")
    if LOWER_ONLY in sys.argv:
        return 0
    n_right = 0
    seen: list[list[Tensor]] = [[], []]
    with cuda_int4.load(path, device=os.environ.get("CHECK_DEVICE", "cuda")) as model:
        for run in range(5):
            turn = run % 2
            outputs = model.forward(*[x for inputs in turns[turn] for x in inputs])
            if seen[turn]:
                for i, (now, before) in enumerate(zip(outputs, seen[turn], strict=True)):
                    if not same_bits(now, before):
                        failures.append(f"{name}: output {i} differs in run {run}")
                continue
            seen[turn] = outputs
            at = 0
            for case, inputs in zip(cases, turns[turn], strict=True):
                want = expected(case, inputs)
                for index in range(len(want.like)):
                    right, why = is_right(case, outputs[at], want, index)
                    at += 1
                    n_right += right
                    if not right:
                        failures.append(f"{case.name}, output {index}, run {run}: {why}")
    return n_right


def check_groups(
    groups: dict[str, Callable[[], Iterator[Case]]],
    others: dict[str, Callable[[Path, list[str]], int]],
    folder: Path,
) -> int:
    """Check those that are asked for, report; the exit status. ``others`` check by themselves."""
    names = [*groups, *others]
    n_right = 0
    all_failures: list[str] = []
    for name in [name for name in sys.argv[1:] if name in names] or names:
        failures: list[str] = []
        if name in groups:
            quick = QUICK in sys.argv
            cases = list(groups[name]())[:: 9 if quick else 1]
            title = f"quick {name}" if quick else name
            n_cases, right = len(cases), check_group(title, cases, folder, failures)
        else:
            n_cases, right = 1, others[name](folder, failures)
        n_right += right
        all_failures += failures
        verdict = "ok" if not failures else "WRONG"
        print(f"{name:22} {n_cases:4} cases {right:5} right  {verdict}", flush=True)
        for failure in failures[:MAX_PRINTED]:
            print("  WRONG", failure, flush=True)
    print(f"{n_right} right, {len(all_failures)} wrong")
    return 1 if all_failures else 0


def main(
    groups: dict[str, Callable[[], Iterator[Case]]],
    others: dict[str, Callable[[Path, list[str]], int]],
) -> int:
    """Check in a folder of its own, or in the one of --lowered=FOLDER."""
    for argument in sys.argv[1:]:
        if argument.startswith(LOWERED):
            folder = Path(argument.removeprefix(LOWERED))
            folder.mkdir(exist_ok=True)
            return check_groups(groups, others, folder)
    with tempfile.TemporaryDirectory() as temporary:
        return check_groups(groups, others, Path(temporary))


if __name__ == "__main__":
    sys.exit(main(GROUPS, {}))
