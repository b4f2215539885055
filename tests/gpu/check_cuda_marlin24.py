"""Checks cuda_int4::linear on marlin24.v1 (2:4) on CUDA against float64, on a machine with a GPU.

    python tests/gpu/check_cuda_marlin24.py [--quick] [--time]

Needs the package, built with nvcc, and torch with CUDA. Prints a line per shape and a summary; the
exit status is 0 if all are right.

Weights are put in place by the index maps of marlin_layouts.py, so the packer is not looked at. Any
two places in order may be kept of four weights, and codes 8 (zero) among the kept are frequent:
fours with one weight and with none. Inputs are signed and fresh for each case, every scale differs,
the rows that pad N have scale NaN, outputs and scratch start as NaN with guards around them, shapes
are ragged, x and y start at odd elements, and one-hot activations read single weights back.

The error may be 1.2 times that of rounding the exact answer once; where x is fp16 or bf16 and has
more than 16 rows, twice that of a plain matmul on the dequantised weight. ``--quick`` takes fewer
cases (for compute-sanitizer). ``--time`` prints microseconds and the share of 4.3 TB/s: weights
rotated through 300 MB, all calls in one CUDA graph, medians of 15; weights that a kernel ahead may
write, as in PyTorch, and constant ones, as in a .pte.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import sys

import torch
from torch import Tensor

from cuda_int4 import _native, marlin_layouts

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# N, K, group_size (0 is one group per row) and whether every pair of dtypes is tried.
SHAPES = (
    (1, 32, 32, True),
    (3, 96, 32, True),
    (64, 64, 64, True),
    (65, 1088, 32, True),
    (130, 1088, 64, True),
    (200, 384, 128, True),
    (5, 1280, 256, True),
    (37, 1088, 0, True),
    (257, 4096, 32, True),
    (1023, 2048, 128, False),
    (515, 5376, 64, False),
    (4096, 4096, 128, False),
    (4096, 14336, 128, False),
    (6100, 2560, 256, False),
    (28672, 4096, 128, False),
    (40, 28672, 64, False),
    (9, 90112, 0, False),
)
QUICK_SHAPES = ((65, 1088, 32), (130, 1088, 64), (200, 384, 128), (37, 1088, 0), (1023, 2048, 128))
ROWS = (*range(1, 18), 64)
FEW_ROWS = (1, 2, 5, 8, 11, 16, 33)
QUICK_ROWS = (1, 8, 16, 20)
FIRST = (0, 0, 1, 0, 1, 2)  # the six pairs of places, first and second
SECOND = (1, 2, 2, 3, 3, 3)
MAX_PRINTED = 40
GUARD = 512
TIMED_SHAPES = ((4096, 4096), (28672, 4096), (4096, 14336), (43008, 5376))
TIMED_ROWS = (1, 2, 4, 8, 16)
ROTATED_BYTES = 300 << 20


def guarded(n_bytes: int) -> Tensor:
    """Bytes on the GPU, all 0xff (NaN in every float dtype), and a guard of the same behind."""
    return torch.full((n_bytes + GUARD,), 0xFF, dtype=torch.uint8, device="cuda")


def at_odd_element(tensor: Tensor) -> Tensor:
    """The same values, starting one element into an allocation."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


def quantized(x: Tensor) -> Tensor:
    """What x is once it is int8 per 32 values (quantized_activation.h), in float64."""
    groups = x.float().unflatten(1, (-1, 32))
    largest = groups.abs().amax(2, keepdim=True)
    s_x = largest / torch.full_like(largest, 127)  # by a tensor: by a number torch multiplies
    a = torch.where(s_x > 0, (groups / s_x).clamp(-127, 127).round(), 0.0)
    return (a.double() * s_x.double()).flatten(1)


def linear_args(x: Tensor, weight: dict, y: Tensor, activation: str) -> _native.LinearArgs:
    """The struct of kernels/ops.h."""
    parts = (x, weight["qdata"], weight["scale"], None, weight["meta"], weight["bias"], y)
    views = (_native.tensor_view(part) for part in parts)
    return _native.LinearArgs(
        *views, weight["group_size"], b"marlin24.v1", activation.encode(), b"checked", weight["N"]
    )


def scratch_for(args: _native.LinearArgs) -> tuple[Tensor, int]:
    """As many bytes as the call asks for, and a guard behind."""
    n_bytes = ctypes.c_uint64()
    library = _native.library()
    _native.check(
        library.linear_scratch_bytes(ctypes.byref(args), _native.DEVICE_CUDA, ctypes.byref(n_bytes))
    )
    return guarded(n_bytes.value), n_bytes.value


def launch(args: _native.LinearArgs, scratch: Tensor, is_constant: bool) -> None:
    """One call on the current stream; is_constant: nothing on the stream writes the weight."""
    library = _native.library()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    memory = ctypes.c_void_p(scratch.data_ptr())
    n_bytes = scratch.numel() - GUARD
    if is_constant:
        code = library.linear_of_constants(ctypes.byref(args), stream, memory, n_bytes, None)
    else:
        code = library.linear(
            ctypes.byref(args), _native.DEVICE_CUDA, stream, memory, n_bytes, None
        )
    _native.check(code)


def set_bits(size: int, offsets: Tensor, values: Tensor) -> Tensor:
    """`size` bytes with 4-bit values at offsets in bits, each place at most once."""
    halves = torch.zeros(2 * size, dtype=torch.uint8, device="cuda")
    halves[(offsets // 4).flatten()] = values.flatten().byte()
    return halves[::2] | (halves[1::2] << 4)


class Checker:
    """Calls the kernels and counts what was right."""

    def __init__(self) -> None:
        self.n_right = 0
        self.n_cases = 0
        self.n_calls = 0
        self.failures: list[str] = []
        self.noted: list[tuple[Tensor, str, tuple[Tensor, ...]]] = []
        self.generator = torch.Generator("cuda").manual_seed(1)

    def note(self, right: Tensor, what: str, *numbers: Tensor) -> None:
        """One check, and numbers for its message; the GPU is not waited for."""
        self.noted.append((right, what, numbers))

    def settle(self) -> bool:
        """Count what was noted and print what failed; whether all was right."""
        rights = torch.stack([right for right, _, _ in self.noted]).tolist()
        for right, (_, what, numbers) in zip(rights, self.noted, strict=True):
            if not right:
                self.failures.append(what)
                if len(self.failures) <= MAX_PRINTED:
                    print("WRONG", what, *(f"{float(number):.2e}" for number in numbers))
        self.n_right += sum(rights)
        self.noted = []
        return all(rights)

    def random(self, *shape: int) -> Tensor:
        """Uniform in [-1, 1)."""
        return torch.rand(shape, generator=self.generator, device="cuda") * 2 - 1

    def randint(self, end: int, *shape: int) -> Tensor:
        """0 .. end - 1."""
        return torch.randint(0, end, shape, generator=self.generator, device="cuda")

    def weight(
        self, N: int, K: int, group_size: int, scale_dtype: torch.dtype
    ) -> tuple[dict, Tensor]:
        """A weight as marlin24.v1 has it, and its definition in float32."""
        group_size = group_size or K
        Np, n_groups = marlin_layouts.padded_n(N), K // group_size
        codes = self.randint(24, Np, K // 4, 2)
        codes = torch.where(codes < 16, codes, 8)
        pair = self.randint(6, Np, K // 4)
        first, second = (torch.tensor(places, device="cuda")[pair] for places in (FIRST, SECOND))
        n, four = torch.arange(Np, device="cuda")[:, None], torch.arange(K // 4, device="cuda")
        kc = 2 * four[:, None] + torch.arange(2, device="cuda")
        qdata_shape = marlin_layouts.qdata_shape("marlin24.v1", N, K)
        code_offsets = marlin_layouts.marlin24_bit_offset(n[:, :, None], kc, N, K)
        qdata = set_bits(qdata_shape[0] * qdata_shape[1], code_offsets, codes)
        meta_offsets = marlin_layouts.marlin24_meta_bit_offset(n, 4 * four, N, K)
        meta = set_bits(Np * K // 8, meta_offsets, first | second << 2)
        scale = (self.random(N, n_groups) * 0.015 + 0.017).to(scale_dtype)
        stored = torch.full((n_groups * Np,), float("nan"), dtype=scale_dtype, device="cuda")
        g = torch.arange(n_groups, device="cuda")
        stored[marlin_layouts.marlin24_scale_index(n[:N], g, N, n_groups)] = scale
        exact = torch.zeros(N, K // 4, 4, device="cuda")
        for i, place in enumerate((first, second)):
            exact.scatter_(2, place[:N, :, None], codes[:N, :, i : i + 1].float() - 8)
        exact = exact.view(N, n_groups, group_size) * scale.float()[:, :, None]
        weight = {
            "qdata": qdata.view(qdata_shape),
            "meta": meta.view(torch.int16).view(marlin_layouts.meta_shape(N, K)),
            "scale": stored.view(n_groups, Np),
            "bias": None,
            "group_size": group_size,
            "N": N,
        }
        return weight, exact.view(N, K)

    def call(
        self, x: Tensor, weight: dict, activation: str = "none", odd: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Y, NaN at first, and whether the guards stayed clean; every second time of constants."""
        M, N = x.shape[0], weight["N"]
        y_bytes, skip = M * N * x.element_size(), x.element_size() if odd else 0
        memory = guarded(y_bytes + skip)
        y = memory[skip : skip + y_bytes].view(x.dtype).view(M, N)
        args = linear_args(x, weight, y, activation)
        scratch, n_bytes = scratch_for(args)
        self.n_calls += 1
        if self.n_calls % 2 == 0:
            torch.cuda.synchronize()  # what made the weight has run: constants are read early
        launch(args, scratch, is_constant=self.n_calls % 2 == 0)
        around = torch.cat((memory[:skip], memory[skip + y_bytes :], scratch[n_bytes:]))
        return y, (around == 0xFF).all()

    def compare(
        self, x: Tensor, weight: dict, exact: Tensor, what: str, activation: str = "none"
    ) -> None:
        """Two calls: the error is within its bound, nothing around y is written, same bits."""
        self.n_cases += 1
        odd = self.n_cases % 3 == 0
        if odd:
            x = at_odd_element(x)
            if weight["bias"] is not None:
                weight = {**weight, "bias": at_odd_element(weight["bias"])}
        y, clean = self.call(x, weight, activation, odd)
        again = self.call(x, weight, activation, odd)[0]
        same = (y.view(torch.uint8) == again.view(torch.uint8)).all()
        want = (quantized(x) if activation == "int8" else x.double()) @ exact.double().T
        if weight["bias"] is not None:
            want = want + weight["bias"].double()
        norm = want.norm().clamp_min(1e-30)
        error = (y.double() - want).norm() / norm
        rounding = (want.to(x.dtype).double() - want).norm() / norm
        bound = 1.2 * rounding + 1e-9 if x.dtype != torch.float32 else torch.full_like(error, 1e-5)
        if x.dtype != torch.float32 and x.shape[0] > 16 and activation == "none":
            plain = torch.nn.functional.linear(x, exact.to(x.dtype), weight["bias"])
            bound = bound.maximum(2 * (plain.double() - want).norm() / norm)
        what = f"M={x.shape[0]} {what} {activation} odd={odd} bias={weight['bias'] is not None}"
        self.note(
            clean & same & (error <= bound),
            f"{what}: error, bound, guards clean, twice the same",
            *(error, bound, clean, same),
        )

    def check_one_hot(self, weight: dict, exact: Tensor, dtype: torch.dtype, what: str) -> None:
        """X = e_k gives column k of the weight, rounded once; as many rows as there are k."""
        K = exact.shape[1]
        ks = [0, 1, 2, 3, 5, 15, 16, 17, 31, K // 2, K - 32, K - 15, K - 4, K - 3, K - 2, K - 1]
        for rows in (5, 16):
            for begin in range(0, 16, rows):
                some = ks[begin : begin + rows]
                x = torch.zeros(len(some), K, dtype=dtype, device="cuda")
                x[range(len(some)), some] = 1
                y, clean = self.call(x, weight)
                right = clean & (y == exact[:, some].T.to(dtype)).all()
                self.note(right, f"{what} k={some}: one-hot reads another weight")


def check_shapes(checker: Checker, shapes: tuple, rows: tuple, quick: bool) -> None:
    """Every shape and pair of dtypes, with bias on every second."""
    for N, K, group_size, full in shapes:
        pairs = list(itertools.product(DTYPES, DTYPES))
        if quick:
            pairs = [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)]
        elif not full:
            pairs = [(dtype, dtype) for dtype in DTYPES[:2]]
        for i, (dtype, scale_dtype) in enumerate(pairs):
            what = f"N={N} K={K} group_size={group_size or K} {dtype} {scale_dtype}"
            weight, exact = checker.weight(N, K, group_size, scale_dtype)
            checker.check_one_hot(weight, exact, dtype, what)
            for j, M in enumerate(rows if full or quick else FEW_ROWS):
                has_bias = (i + j) % 2 == 1
                weight["bias"] = checker.random(N).to(dtype) if has_bias else None
                x = checker.random(M, K).to(dtype)
                checker.compare(x, weight, exact, what)
                if j % 3 == 0:
                    checker.compare(x, weight, exact, what, "int8")
        verdict = "ok" if checker.settle() else "WRONG"
        print(f"N={N:5} K={K:5} group_size={group_size or K:5}  {verdict}", flush=True)


def check_special(checker: Checker, quick: bool) -> None:
    """A large mean, inf, chains that overlap, graphs, more rows than a grid has."""
    for dtype in DTYPES[:2]:
        weight, exact = checker.weight(515, 1088, 32, dtype)
        for M in (1, 8, 16):
            what = f"{dtype} M={M}"
            x = checker.random(M, 1088).to(dtype)
            checker.compare(x + 100, weight, exact, f"x of mean 100 {what}")
            x[M // 2] = float("inf")
            finite = checker.call(x, weight)[0].isfinite()
            others = [m for m in range(M) if m != M // 2]
            alone = finite[others].all() & ~finite[M // 2].any()
            checker.note(alone, f"inf in one row of x {what}")
        # A chain in a graph: each product is the next one's x, and kernels overlap.
        links = [checker.weight(1024, 1024, 128, dtype)[0] for _ in range(6)]
        for link in links:
            link["scale"].mul_(0.17)  # the last of 24 products is still of a size with the first
        for M in (1, 8, 16):
            start = checker.random(M, 1024).to(dtype)
            ys = [torch.full_like(start, float("nan")) for _ in links * 4]
            want = start
            for link in links * 4:
                want = checker.call(want, link)[0]
            calls = [
                linear_args(x, link, y, "none")
                for link, x, y in zip(links * 4, [start, *ys], ys, strict=False)
            ]
            scratch = guarded(0)  # none is asked for
            for is_constant in (False, True):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for args in calls:
                        launch(args, scratch, is_constant)
                for _ in range(1 if quick else 5):
                    for y in ys:
                        y.fill_(float("nan"))
                    graph.replay()
                    torch.cuda.synchronize()
                    same = (ys[-1] == want).all() & want.isfinite().all()
                    what = f"{dtype} M={M} constant={is_constant}"
                    checker.note(same, f"a chain in a graph differs {what}")
    empty = torch.empty(0, 1024, dtype=dtype, device="cuda")
    checker.note(checker.call(empty, links[0])[1], "no rows")
    if not quick:
        weight, exact = checker.weight(5, 32, 32, torch.float32)
        checker.compare(checker.random(70001, 32), weight, exact, "more rows than a grid has")
    checker.settle()


def time_shapes() -> None:
    """Microseconds a call and share of 4.3 TB/s; fp16, group_size 128."""
    checker = Checker()
    for N, K in TIMED_SHAPES:
        one, _ = checker.weight(64, 128, 128, torch.float16)
        one["N"] = N
        n_weights = ROTATED_BYTES // (N * K * 25 // 64) + 1
        weights = []
        for _ in range(n_weights):
            weight = dict(one)
            weight["qdata"] = torch.randint(0, 256, (K // 32, 8 * N), device="cuda").byte()
            weight["meta"] = one["meta"].repeat(K // 128, N // 64)  # places as drawn above
            weight["scale"] = checker.random(K // 128, N).half()
            weights.append(weight)
        parts = ("qdata", "meta", "scale")
        n_bytes = sum(weights[0][part].nbytes for part in parts)
        for M in TIMED_ROWS:
            x = checker.random(M, K).half()
            ys = [torch.empty(M, N, dtype=torch.float16, device="cuda") for _ in range(2)]
            row = f"N={N:5} K={K:5} M={M:2}"
            for is_constant in (False, True):
                n_calls, scratch = max(n_weights, 12), guarded(0)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for i in range(n_calls):
                        args = linear_args(x, weights[i % n_weights], ys[i % 2], "none")
                        launch(args, scratch, is_constant)
                times = []
                for _ in range(16):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    graph.replay()
                    end.record()
                    end.synchronize()
                    times.append(begin.elapsed_time(end) * 1e3 / n_calls)
                us = statistics.median(times[1:])
                name = "constant" if is_constant else "as in PyTorch"
                row += f"  {name} {us:6.2f} us ({n_bytes / us / 4.3e6:.2f})"
            print(row, flush=True)


def main() -> int:
    """Check, report, time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and dtypes")
    parser.add_argument("--time", action="store_true", help="times, after the checks")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "check_cuda_marlin24: expected a CUDA GPU, torch sees none; run it where there is one"
        )
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    checker = Checker()
    if options.quick:
        shapes = tuple((*shape, False) for shape in QUICK_SHAPES)
        check_shapes(checker, shapes, QUICK_ROWS, quick=True)
    else:
        check_shapes(checker, SHAPES, ROWS, quick=False)
    check_special(checker, options.quick)
    print(f"{checker.n_right} right, {len(checker.failures)} wrong")
    if options.time:
        time_shapes()
    return 1 if checker.failures else 0


if __name__ == "__main__":
    sys.exit(main())
