"""Checks cuda_int4::linear on marlin.v1 on CUDA, M = 1 to 16 and a few above, against float64.

    python tests/gpu/check_cuda_marlin.py [--quick] [--time]

Needs the package, built with nvcc, and torch with CUDA. Weights are packed by the package from
codes, scales and zero points drawn by check_cuda_matmul.py, beside this, whose bound holds here
too: twice the error of a plain matmul in the dtype of x on the dequantised weight. y and
scratch start as NaN, with NaN around y; x and y start at odd elements; one-hot rows of x read
single weights back; the CPU twin reads the same packed bytes; kernels of a chain overlap;
replays of a graph give the same bits. ``--quick`` takes fewer cases (for compute-sanitizer).
``--time`` prints microseconds and the share of 4.3 TB/s: weights rotated through 300 MB, all
calls in one CUDA graph, medians; weights that a kernel ahead may write, as in PyTorch, and
constant ones, as in a .pte.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import sys
from collections.abc import Callable

import check_cuda_matmul as base
import torch
from check_cuda_marlin_matmul import MarlinWeight
from torch import Tensor

from cuda_int4 import _native

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
    (515, 4096, 0),
    (300, 4096, 32),
    (1023, 2048, 128),
)
# Work that is cut over blocks and clusters in other ways.
LARGE_SHAPES = (
    (4096, 4096, 128),
    (6144, 2560, 32),
    (200, 14336, 128),
    (40, 28672, 64),
    (9, 90112, 0),
    (5376, 8192, 128),
    (28672, 1024, 128),
    (40000, 512, 256),
)
QUICK_SHAPES = ((130, 1088, 32), (37, 1088, 0), (300, 2048, 128), (8500, 2112, 64))
OTHER_SHAPES = ((13, 1088, 32), (130, 1280, 128), (37, 1088, 0))
ROWS = (*range(1, 17), 17, 40)
FEW_ROWS = (1, 2, 7, 8, 9, 16)
QUICK_ROWS = (1, 8, 16)
DTYPES = (torch.float16, torch.bfloat16)
REPLAYS = 15
ROTATED_BYTES = 300 << 20
PEAK_BYTES_PER_US = 4.3e6
TIMED_SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (43008, 5376))
TIMED_ROWS = (1, 2, 4, 8, 16)


def moved_bytes(weight: base.Weight, M: int, dtype: torch.dtype) -> int:
    """What a call has to move, each byte once."""
    parts = [weight.qdata, weight.scale]
    if weight.zero_point is not None:
        parts.append(weight.zero_point)
    return sum(part.nbytes for part in parts) + M * (weight.N + weight.K) * dtype.itemsize


def launch_constant(args: _native.LinearArgs, scratch: Tensor) -> None:
    """One call on the current stream; nothing queued writes the weight."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    pointer = ctypes.c_void_p(scratch.data_ptr() if scratch.numel() else None)
    library = _native.library()
    _native.check(
        library.linear_of_constants(ctypes.byref(args), stream, pointer, scratch.numel(), None)
    )


def on_cpu(x: Tensor, weight: MarlinWeight, bias: Tensor | None) -> Tensor:
    """The CPU twin on the same packed bytes."""
    y = torch.full((x.shape[0], weight.N), base.NAN, dtype=x.dtype)
    host = MarlinWeight.__new__(MarlinWeight)
    host.N, host.K, host.group_size = weight.N, weight.K, weight.group_size
    host.qdata, host.scale = weight.qdata.cpu(), weight.scale.cpu()
    host.zero_point = None if weight.zero_point is None else weight.zero_point.cpu()
    host_x, host_bias = x.cpu(), None if bias is None else bias.cpu()
    args = base.linear_args(host_x, host, host_bias, y)
    library, n_bytes = _native.library(), ctypes.c_uint64()
    device = _native.DEVICE_CPU
    _native.check(library.linear_scratch_bytes(ctypes.byref(args), device, ctypes.byref(n_bytes)))
    memory = torch.zeros(n_bytes.value + 64, dtype=torch.uint8)
    pointer = ctypes.c_void_p((memory.data_ptr() + 63) // 64 * 64)
    _native.check(library.linear(ctypes.byref(args), device, None, pointer, n_bytes.value, None))
    return y


def check_one_hot(checker: base.Checker, weight: MarlinWeight, dtype: torch.dtype) -> None:
    """Row i of x is e_k: row i of y is column k of the weight, within one rounding of each part."""
    K = weight.K
    ks = sorted({0, 1, 7, 8, 15, 16, 31, K // 2, K // 2 + 1, K - 9, K - 8, K - 2, K - 1})
    x = torch.zeros(len(ks), K, dtype=dtype, device="cuda")
    x[range(len(ks)), ks] = 1
    y, want = base.call(x, weight), weight.exact[:, ks].T
    # Codes, and 128 + code in bfloat16, meet zero points in float32.
    slack = 2.0**-15 * float(weight.scale.max()) if weight.zero_point is not None else 0.0
    low, high = ((want + side * (2.0**-23 * want.abs() + slack)).to(dtype) for side in (-1, 1))
    right = y is not None and bool(((y >= low) & (y <= high)).all())
    what = f"one-hot N={weight.N} K={K} group_size={weight.group_size} {dtype}"
    checker.note(right, f"{what} {weight.scale.dtype}")


def check_twin(
    checker: base.Checker,
    x: Tensor,
    weight: MarlinWeight,
    bias: Tensor | None,
    what: str,
) -> None:
    """Both devices agree to a rounding of y and of sums of 1024 times a scale."""
    y, twin = base.call(x, weight, bias), on_cpu(x, weight, bias)
    epsilon = torch.finfo(x.dtype).eps
    right = y is not None
    if y is not None:
        difference = (y.cpu().double() - twin.double()).abs()
        rounding = epsilon * twin.double().abs().amax(1, keepdim=True)
        offsets = x.cpu().double().abs().sum(1, keepdim=True) * float(weight.scale.max())
        right = bool((difference <= 1.01 * rounding + 2.0**-12 * offsets).all())
    checker.note(right, f"{what}: the CPU twin differs")


def check_shapes(checker: base.Checker, shapes: tuple, rows: tuple, every: bool) -> None:
    """Every shape x dtypes x zero points x M, with bias on every second."""
    seed = 0
    for N, K, group_size in shapes:
        wrong, checker.largest_ratio, checker.squares = checker.n_wrong, 0.0, [0.0, 0.0]
        scale_dtypes = base.SCALE_DTYPES if every else (torch.bfloat16,)
        for scale_dtype, zero in itertools.product(scale_dtypes, base.ZERO_POINTS):
            weight = MarlinWeight(N, K, group_size, scale_dtype, zero, seed)
            for dtype in DTYPES:
                check_one_hot(checker, weight, dtype)
                for M in rows if scale_dtype == dtype or not every else FEW_ROWS:
                    seed += 1
                    x = base.random_x(M, K, dtype, seed)
                    bias = base.random_x(1, N, dtype, seed + 7)[0] if seed % 2 else None
                    what = f"M={M} N={N} K={K} group_size={weight.group_size} {dtype}"
                    what += f" {scale_dtype} zero={zero}"
                    checker.compare(x, weight, bias, what)
                    if M == 8 and N * K < 1 << 21:
                        check_twin(checker, x, weight, bias, what)
        verdict = "ok" if checker.n_wrong == wrong else "WRONG"
        print(
            f"N={N:5} K={K:5} group_size={group_size or K:5}  {verdict}, error at most "
            f"{checker.largest_ratio:.2f} times that of a plain matmul",
            flush=True,
        )


def check_other_paths(checker: base.Checker, shapes: tuple) -> None:
    """float32 x and activation "int8": the baseline kernels."""
    for N, K, group_size in shapes:
        for zero, M in itertools.product(base.ZERO_POINTS, (1, 5, 20)):
            weight = MarlinWeight(N, K, group_size, torch.bfloat16, zero, M)
            x = base.random_x(M, K, torch.float32, M)
            y, want = base.call(x, weight), x.double() @ weight.exact.T
            right = y is not None and float((y - want).norm() / want.norm()) < 1e-5
            checker.note(right, f"float32 x M={M} N={N} K={K} zero={zero}")
            for dtype in DTYPES:
                y, want = (
                    call_int8(x.to(dtype), weight),
                    quantized(x.to(dtype)) @ weight.exact.T,
                )
                error = float((y.double() - want).norm() / want.norm())
                rounding = float((want.to(dtype).double() - want).norm() / want.norm())
                what = f"int8 x M={M} N={N} K={K} {dtype} zero={zero}: error {error:.2e}"
                checker.note(error <= 1.2 * rounding + 1e-9, what)


def call_int8(x: Tensor, weight: MarlinWeight) -> Tensor:
    """Activation "int8"."""
    _, y = base.guarded(x.shape[0], weight.N, x.dtype)
    args = base.linear_args(x, weight, None, y)
    args.activation = b"int8"
    base.launch(args, base.scratch_for(args))
    torch.cuda.synchronize()
    return y


def quantized(x: Tensor) -> Tensor:
    """The definition (quantized_activation.h), as float64."""
    groups = x.float().unflatten(1, (-1, 32))
    s_x = groups.abs().amax(2, keepdim=True)
    s_x = s_x / torch.full_like(s_x, 127)  # by a tensor: by a number torch multiplies
    a = torch.where(s_x > 0, (groups / s_x).clamp(-127, 127).round(), 0.0)
    return (a.double() * s_x.double()).flatten(1)


def check_special(checker: base.Checker, rows: tuple) -> None:
    """Odd addresses, large means, small x, inf, repetition, chains, graphs."""
    for dtype, M in itertools.product(DTYPES, rows):
        weight = MarlinWeight(515, 1088, 32, dtype, "float32", seed=3)
        what = f"{dtype} M={M}"
        x = base.random_x(M, 1088, dtype, M)
        odd = torch.empty(M * 1088 + 1, dtype=dtype, device="cuda")[1:].view(M, 1088).copy_(x)
        checker.compare(odd, weight, None, f"x at an odd address {what}")
        checker.compare(x, weight, None, f"y at an odd address {what}", offset=1)
        large = base.random_x(M, 1088, dtype, M, mean=100.0)
        checker.compare(large, weight, None, f"x of mean 100 {what}")
        checker.compare(x * 2.0**-12, weight, None, f"small x {what}")
        first, second = base.call(x, weight), base.call(x, weight)
        same = first is not None and second is not None and torch.equal(first, second)
        checker.note(same, f"two calls differ {what}")
        x[M // 2, 5] = float("inf")
        y = base.call(x, weight)
        others = [m for m in range(M) if m != M // 2]
        alone = y is not None and bool(y[others].isfinite().all())
        checker.note(alone and not bool(y[M // 2].isfinite().any()), f"inf in one row {what}")
        check_chain(checker, dtype, M)


def check_chain(checker: base.Checker, dtype: torch.dtype, M: int) -> None:
    """Each product is the next one's x, and kernels overlap; a graph of the chain, replayed."""
    links = [MarlinWeight(1024, 1024, 128, dtype, "none", seed) for seed in range(6)]
    for link in links:
        link.scale.mul_(0.13)  # the last of 24 products is still of a size with the first
    start = base.random_x(M, 1024, dtype, M + 40)

    def run(launch: Callable[[_native.LinearArgs, Tensor], None], is_apart: bool) -> Tensor:
        x, y = start.clone(), torch.full_like(start, base.NAN)
        for link in links * 4:
            args = base.linear_args(x, link, None, y)
            launch(args, base.scratch_for(args))
            if is_apart:
                torch.cuda.synchronize()
            x, y = y, x
        return x

    want = run(base.launch, True)
    torch.cuda.synchronize()
    right = 0.001 < float(want.double().norm() / start.double().norm()) < 1000.0
    for launch in (base.launch, launch_constant):
        got = run(launch, False)
        torch.cuda.synchronize()
        right = right and torch.equal(got, want)
    checker.note(right, f"a chain without waits differs {dtype} M={M}")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(launch_constant, False)
    same = True
    for _ in range(REPLAYS):
        got.fill_(base.NAN)
        graph.replay()
        same = same and torch.equal(got, want)
    checker.note(same, f"replays of a graph differ {dtype} M={M}")


def time_all(dtype: torch.dtype, group_size: int, zero_points: bool) -> None:
    """Microseconds a call and share."""
    title = f"{dtype}, group_size {group_size}, zero points {zero_points}"
    print(f"us a call and share of 4.3 TB/s, marlin.v1, {title}: PyTorch, .pte")
    for N, K in TIMED_SHAPES:
        copies = max(2, -(-ROTATED_BYTES // (N * K // 2)))
        weights = [
            MarlinWeight.random(N, K, group_size, dtype, zero_points, i) for i in range(copies)
        ]
        for M in TIMED_ROWS:
            x, (_, y) = base.random_x(M, K, dtype, M), base.guarded(M, N, dtype)
            line = f"{N:6} x {K:5} M={M:2}"
            for launch in (base.launch, launch_constant):
                us = time_calls(x, y, weights * (1 + 12 // copies), launch)
                share = moved_bytes(weights[0], M, dtype) / us / PEAK_BYTES_PER_US
                line += f"  {us:6.2f} ({share:.2f})"
            print(line, flush=True)


def time_calls(
    x: Tensor,
    y: Tensor,
    weights: list[MarlinWeight],
    launch: Callable[[_native.LinearArgs, Tensor], None],
) -> float:
    """Median of microseconds a call over replays of one graph."""
    arguments = [base.linear_args(x, weight, None, y) for weight in weights]
    scratch = base.scratch_for(arguments[0])
    graph = base.capture([lambda args=args: launch(args, scratch) for args in arguments])
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(REPLAYS + 2):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(arguments))
    return statistics.median(times[2:])


def main() -> int:
    """Check, report, time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--time", action="store_true", help="time it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "check_cuda_marlin: expected a CUDA GPU, torch sees none; run it where there is one"
        )
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    checker = base.Checker()
    if options.quick:
        check_shapes(checker, QUICK_SHAPES, QUICK_ROWS, every=False)
    else:
        check_shapes(checker, SHAPES, ROWS, every=True)
        check_shapes(checker, LARGE_SHAPES, FEW_ROWS, every=False)
    check_special(checker, (9,) if options.quick else FEW_ROWS)
    check_other_paths(checker, OTHER_SHAPES[:1] if options.quick else OTHER_SHAPES)
    print(f"{checker.n_right} right, {checker.n_wrong} wrong", flush=True)
    if options.time and checker.n_wrong == 0:
        time_all(torch.float16, 128, False)
        time_all(torch.bfloat16, 128, False)
        time_all(torch.float16, 128, True)
        time_all(torch.bfloat16, 32, True)
    return 1 if checker.n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
