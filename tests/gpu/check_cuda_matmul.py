"""Checks cuda_int4::linear on CUDA, w4a16 with M > 16, against float64; times it on request.

    python tests/gpu/check_cuda_matmul.py [--quick] [--time]

Needs the package, built with nvcc, and torch with CUDA. Every case: signed inputs of its own, every
scale and zero point different, outputs that start as NaN between NaN guards, scratch full of NaN.
Bound: twice the error of a plain matmul in the dtype of x on the dequantised weight; for weights of
fewer than 64 groups, where one rounded scale decides, over all cases of the shape together. Prints
the largest ratio of the two errors per shape; the exit status is 0 if all are right. ``--quick``
takes fewer cases (for compute-sanitizer). ``--time`` prints microseconds beside cuBLAS: weights
rotated through 256 MB, the calls of one kernel in a CUDA graph, kernels in turns, medians.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_int4 import _native

DTYPES = (torch.float16, torch.bfloat16)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ZERO_POINTS = ("none", "whole", "float32")
# N, K, group_size (0: one group per row)
SHAPES = (
    (1, 32, 32),
    (3, 96, 32),
    (7, 64, 64),
    (13, 1088, 32),
    (130, 1088, 64),
    (66, 384, 128),
    (257, 1280, 256),
    (37, 1088, 0),
    (300, 4096, 32),
    (1023, 2048, 128),
    (2056, 5376, 128),
    (8200, 544, 32),
    (8193, 1024, 128),
)
ROWS = (17, 32, 33, 64, 129, 256, 300, 512)
QUICK_SHAPES = ((3, 96, 32), (130, 1088, 64), (257, 1280, 256), (300, 512, 0), (8200, 288, 32))
QUICK_ROWS = (17, 64, 129, 512)
GUARD = 512
TINY_GROUPS = 64
TIMED_SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (43008, 5376))
TIMED_ROWS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
ROTATED_BYTES = 256 << 20
NAN = float("nan")


class Weight:
    """An int4 weight on the GPU; ``exact`` is its definition in float64."""

    layout_tag = "coalesced.v1"
    meta: Tensor | None = None

    def __init__(
        self, N: int, K: int, group_size: int, scale_dtype: torch.dtype, zero: str, seed: int = 0
    ) -> None:
        """Fresh codes, scales and zero points."""
        generator = torch.Generator("cuda").manual_seed(seed)
        self.N, self.K, self.group_size = N, K, group_size or K
        shape = (N, K // self.group_size)
        codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8, device="cuda")
        random = torch.rand(shape, generator=generator, device="cuda")
        self.scale = (random * 0.03 + 0.002).to(scale_dtype)
        self.zero_point: Tensor | None = None
        if zero == "whole":
            whole = torch.randint(0, 16, shape, generator=generator, device="cuda")
            self.zero_point = whole.to(scale_dtype)
        elif zero == "float32":
            random = torch.rand(shape, generator=generator, device="cuda")
            self.zero_point = random * 80 - 40.5
        self.qdata = codes[:, ::2] | (codes[:, 1::2] << 4)
        z = torch.full(shape, 8.0, device="cuda") if zero == "none" else self.zero_point
        assert z is not None
        centred = codes.double() - z.double().repeat_interleave(self.group_size, 1)
        self.exact = centred * self.scale.double().repeat_interleave(self.group_size, 1)

    @classmethod
    def random(
        cls, N: int, K: int, group_size: int, dtype: torch.dtype, zero_points: bool, seed: int
    ) -> Weight:
        """One to be timed: bytes as they come, and no ``exact``."""
        weight = cls(1, group_size, group_size, dtype, "none", seed)
        weight.N, weight.K = N, K
        weight.qdata = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
        weight.scale = torch.rand(N, K // group_size, device="cuda").mul(0.01).to(dtype)
        if zero_points:
            weight.zero_point = torch.rand_like(weight.scale) * 15
        return weight


def linear_args(x: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> _native.LinearArgs:
    """The struct of kernels/ops.h."""
    parts = (x, weight.qdata, weight.scale, weight.zero_point, weight.meta, bias, y)
    views = [_native.tensor_view(part) for part in parts]
    tag = weight.layout_tag.encode()
    return _native.LinearArgs(*views, weight.group_size, tag, b"none", b"checked", weight.N)


def scratch_for(args: _native.LinearArgs) -> Tensor:
    """As much as the call asks for, every byte 0xFF."""
    n_bytes = ctypes.c_uint64()
    library = _native.library()
    _native.check(
        library.linear_scratch_bytes(ctypes.byref(args), _native.DEVICE_CUDA, ctypes.byref(n_bytes))
    )
    return torch.full((n_bytes.value,), 0xFF, dtype=torch.uint8, device="cuda")


def launch(args: _native.LinearArgs, scratch: Tensor) -> None:
    """One call on the current stream."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    pointer = ctypes.c_void_p(scratch.data_ptr() if scratch.numel() else None)
    _native.check(
        _native.library().linear(
            ctypes.byref(args), _native.DEVICE_CUDA, stream, pointer, scratch.numel(), None
        )
    )


def launch_constant(args: _native.LinearArgs, scratch: Tensor) -> None:
    """The same as a .pte calls it: nothing that is queued writes the weight."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    pointer = ctypes.c_void_p(scratch.data_ptr() if scratch.numel() else None)
    _native.check(
        _native.library().linear_of_constants(
            ctypes.byref(args), stream, pointer, scratch.numel(), None
        )
    )


def guarded(M: int, N: int, dtype: torch.dtype, offset: int = 0) -> tuple[Tensor, Tensor]:
    """NaN everywhere: the whole buffer, and the [M, N] view in its middle."""
    whole = torch.full((M * N + 2 * GUARD,), NAN, dtype=dtype, device="cuda")
    return whole, whole[GUARD + offset : GUARD + offset + M * N].view(M, N)


def call(x: Tensor, weight: Weight, bias: Tensor | None = None, offset: int = 0) -> Tensor | None:
    """y, or None if anything outside it was written."""
    whole, y = guarded(x.shape[0], weight.N, x.dtype, offset)
    args = linear_args(x, weight, bias, y)
    launch(args, scratch_for(args))
    torch.cuda.synchronize()
    begin, end = GUARD + offset, GUARD + offset + y.numel()
    clean = bool(whole[:begin].isnan().all()) and bool(whole[end:].isnan().all())
    return y if clean else None


class Checker:
    """Counts what was right and prints what was not."""

    def __init__(self) -> None:
        self.n_right = self.n_wrong = 0
        self.largest_ratio = 0.0
        self.squares = [0.0, 0.0]  # of the errors of tiny weights: ours, allowed

    def note(self, right: bool, what: str) -> None:
        """Count one check."""
        self.n_right += right
        self.n_wrong += not right
        if not right and self.n_wrong <= 40:
            print("WRONG", what, flush=True)

    def compare(
        self, x: Tensor, weight: Weight, bias: Tensor | None, what: str, offset: int = 0
    ) -> None:
        """Error against float64 at most twice that of a plain matmul."""
        y = call(x, weight, bias, offset)
        if y is None:
            self.note(False, f"{what}: wrote outside y")
            return
        exact = x.double() @ weight.exact.T
        plain = F.linear(x, weight.exact.to(x.dtype), bias).double()
        if bias is not None:
            exact = exact + bias.double()
        error = float((y.double() - exact).norm())
        allowed = float((plain - exact).norm())
        rounding = float((exact.to(x.dtype).double() - exact).norm())
        allowed = max(allowed, rounding, 1e-30)
        ratio = error / allowed
        if weight.N * weight.K // weight.group_size < TINY_GROUPS:
            unit = float(exact.norm()) or 1.0
            self.squares = [
                sum_ + (e / unit) ** 2
                for sum_, e in zip(self.squares, (error, allowed), strict=True)
            ]
            self.note(ratio <= 8.0, f"{what}: error {ratio:.2f} times that of a plain matmul")
            return
        self.largest_ratio = max(self.largest_ratio, ratio)
        self.note(ratio <= 2.0, f"{what}: error {ratio:.2f} times that of a plain matmul")


def random_x(M: int, K: int, dtype: torch.dtype, seed: int, mean: float = 0.0) -> Tensor:
    """Normal values."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(M, K, generator=generator, device="cuda") + mean).to(dtype)


def check_shapes(
    checker: Checker,
    shapes: tuple,
    rows: tuple,
    make: type[Weight] = Weight,
    zero_points: tuple = ZERO_POINTS,
) -> None:
    """Every shape x dtypes x zero points x M, with bias on every second."""
    seed = 0
    for N, K, group_size in shapes:
        wrong, checker.largest_ratio, checker.squares = checker.n_wrong, 0.0, [0.0, 0.0]
        for scale_dtype in SCALE_DTYPES:
            for zero in zero_points:
                weight = make(N, K, group_size, scale_dtype, zero, seed)
                for dtype in DTYPES:
                    check_one_hot(checker, weight, dtype, zero)
                    for M in rows:
                        seed += 1
                        x = random_x(M, K, dtype, seed)
                        bias = random_x(1, N, dtype, seed + 7)[0] if seed % 2 else None
                        what = f"M={M} N={N} K={K} group_size={weight.group_size} {dtype}"
                        checker.compare(x, weight, bias, f"{what} {scale_dtype} zero={zero}")
        if checker.squares[1] > 0.0:
            checker.largest_ratio = (checker.squares[0] / checker.squares[1]) ** 0.5
            what = f"N={N} K={K}: error {checker.largest_ratio:.2f} times that of a plain matmul"
            checker.note(checker.largest_ratio <= 2.0, what)
        verdict = "ok" if checker.n_wrong == wrong else "WRONG"
        print(
            f"N={N:5} K={K:5} group_size={group_size or K:5}  {verdict}, error at most "
            f"{checker.largest_ratio:.2f} times that of a plain matmul",
            flush=True,
        )


def check_one_hot(checker: Checker, weight: Weight, dtype: torch.dtype, zero: str) -> None:
    """Row i of x is e_k: row i of y is column k of the weight.

    Exact where scale and zero point are exact in the dtype of x; else within their roundings.
    """
    K = weight.K
    ks = sorted({0, 1, 7, 8, 15, 16, 31, K // 2, K // 2 + 1, K - 9, K - 8, K - 2, K - 1})
    ks = (ks * 20)[:40]
    x = torch.zeros(len(ks), K, dtype=dtype, device="cuda")
    x[range(len(ks)), ks] = 1
    y = call(x, weight)
    want = weight.exact[:, ks].T
    if y is None:
        right = False
    elif zero != "float32" and (weight.scale.dtype in (dtype, torch.bfloat16)):
        right = torch.equal(y, want.to(dtype))
    else:
        ulp = 2.0**-10 if dtype == torch.float16 else 2.0**-7
        right = bool(((y.double() - want).abs() <= 1.5 * ulp * want.abs() + 0.02 * ulp).all())
    self_text = f"one-hot N={weight.N} K={K} group_size={weight.group_size} {dtype}"
    checker.note(right, f"{self_text} {weight.scale.dtype} zero={zero}")


def check_special(checker: Checker, make: type[Weight] = Weight, zero: str = "float32") -> None:
    """Odd addresses, large means, inf, repetition, graphs."""
    for dtype in DTYPES:
        weight = make(515, 1088, 32, dtype, zero, seed=3)
        for M in (17, 64, 257):
            what = f"{dtype} M={M}"
            x = random_x(M, 1088, dtype, M)
            odd = torch.empty(M * 1088 + 1, dtype=dtype, device="cuda")[1:].view(M, 1088).copy_(x)
            checker.compare(odd, weight, None, f"x at an odd address {what}")
            checker.compare(x, weight, None, f"y at an odd address {what}", offset=1)
            large = random_x(M, 1088, dtype, M, mean=100.0)
            checker.compare(large, weight, None, f"x of mean 100 {what}")
            first, second = call(x, weight), call(x, weight)
            same = first is not None and second is not None and torch.equal(first, second)
            checker.note(same, f"two calls differ {what}")
            x[M // 2, 5] = float("inf")
            y = call(x, weight)
            others = [m for m in range(M) if m != M // 2]
            alone = y is not None and bool(y[others].isfinite().all())
            # a 2:4 weight does not multiply what it dropped
            reached = y is not None and not bool(
                y[M // 2][weight.exact[:, 5] != 0].isfinite().any()
            )
            checker.note(alone and reached, f"inf in one row of x {what}")
    weight = make(1024, 2048, 128, torch.bfloat16, "none", seed=4)
    for M in (32, 256):
        x = random_x(M, 2048, torch.bfloat16, 5)
        _, y = guarded(M, 1024, torch.bfloat16)
        args = linear_args(x, weight, None, y)
        scratch = scratch_for(args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(args, scratch)
        for seed in (6, 7):  # the graph reads x anew
            x.copy_(random_x(M, 2048, torch.bfloat16, seed))
            y.fill_(NAN)
            scratch.fill_(0xFF)
            graph.replay()
            torch.cuda.synchronize()
            want = call(x, weight)
            checker.note(
                want is not None and torch.equal(y, want), f"M={M}: graph and eager differ"
            )
    weight = make(8200, 512, 128, torch.float16, "none", seed=8)
    checker.compare(random_x(17, 512, torch.float16, 9), weight, None, "M=17 N=8200 K=512")
    weight = make(40, 64, 32, torch.bfloat16, "none", seed=10)
    checker.compare(random_x(70001, 64, torch.bfloat16, 11), weight, None, "M=70001")
    check_chain(checker, make)


def check_chain(checker: Checker, make: type[Weight] = Weight) -> None:
    """Linears that feed each other through one scratch, each launched while the one before ends."""
    dtype = torch.float16
    down = make(1024, 2048, 128, dtype, "none", seed=12)
    up = make(2048, 1024, 128, dtype, "none", seed=13)
    for M in (17, 64, 256):
        x = [random_x(M, 2048, dtype, M).mul(2.0**-4)] + [
            torch.full((M, n), NAN, dtype=dtype, device="cuda") for n in (1024, 2048) * 3
        ]
        weights = [down, up] * 3
        calls = [
            linear_args(given, w, None, y) for given, w, y in zip(x, weights, x[1:], strict=False)
        ]
        needed = [scratch_for(args) for args in calls]
        scratch = max(needed, key=Tensor.numel)
        for args in calls:
            launch(args, scratch)
            torch.cuda.synchronize()
        want = [y.clone() for y in x[1:]]
        graph = capture([partial(launch_constant, args, scratch) for args in calls])
        for _ in range(5):
            for y in x[1:]:
                y.fill_(NAN)
            scratch.fill_(0xFF)
            graph.replay()
            torch.cuda.synchronize()
            same = all(torch.equal(y, w) for y, w in zip(x[1:], want, strict=True))
            checker.note(same, f"M={M}: a chain of dependent launches differs")


def capture(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls in one graph."""
    for one in calls[:2]:
        one()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for one in calls:
            one()
    return graph


def time_all(
    shapes: tuple,
    rows: tuple,
    group_size: int = 128,
    replays: int = 15,
    dtype: torch.dtype = torch.bfloat16,
    zero_points: bool = False,
    make: type[Weight] = Weight,
) -> None:
    """Ours beside cuBLAS, in turns; microseconds a call and the ratio."""
    print(
        f"us a call, {make.layout_tag}, {dtype}, group_size {group_size}, "
        f"zero points {zero_points}; "
        "ratio = cuBLAS / ours"
    )
    for N, K in shapes:
        copies = max(2, -(-ROTATED_BYTES // (N * K // 2)))
        weights = [
            make.random(N, K, group_size, dtype, zero_points, seed) for seed in range(copies)
        ]
        n_dense = max(2, -(-ROTATED_BYTES // (2 * N * K)))
        dense = [torch.randn(N, K, device="cuda", dtype=dtype) for _ in range(n_dense)]
        for M in rows:
            x = random_x(M, K, dtype, 1)
            y = torch.empty(M, N, dtype=dtype, device="cuda")
            arguments = [linear_args(x, weight, None, y) for weight in weights]
            scratch = scratch_for(arguments[0])
            calls = max(6, min(40, copies)) if M <= 512 else 6
            graphs = {
                "ours": capture(
                    [partial(launch_constant, arguments[i % copies], scratch) for i in range(calls)]
                ),
                "cuBLAS": capture([partial(F.linear, x, dense[i % n_dense]) for i in range(calls)]),
            }
            times: dict[str, list[float]] = {name: [] for name in graphs}
            for _ in range(replays):
                for name, graph in graphs.items():
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    graph.replay()
                    end.record()
                    end.synchronize()
                    times[name].append(start.elapsed_time(end) * 1e3 / calls)
            ours, cublas = (statistics.median(times[name]) for name in ("ours", "cuBLAS"))
            print(
                f"N={N:6} K={K:6} M={M:5}  ours {ours:8.1f}  cuBLAS {cublas:8.1f}  "
                f"ratio {cublas / ours:5.2f}",
                flush=True,
            )
            del graphs


def main() -> int:
    """Check, report, time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--time", action="store_true", help="time it beside cuBLAS")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "check_cuda_matmul: expected a CUDA GPU, torch sees none; run it where there is one"
        )
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    checker = Checker()
    if options.quick:
        check_shapes(checker, QUICK_SHAPES, QUICK_ROWS)
    else:
        check_shapes(checker, SHAPES, ROWS)
    check_special(checker)
    print(f"{checker.n_right} right, {checker.n_wrong} wrong", flush=True)
    if options.time and checker.n_wrong == 0:
        time_all(TIMED_SHAPES, TIMED_ROWS)
    return 1 if checker.n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
