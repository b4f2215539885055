"""The GPU half of bench_linear: each kernel in a CUDA graph of its own, all in one process.

Weights rotate through several times the L2, so every call reads them from memory. Each candidate is
one CUDA graph of calls that go around its copies, once or more; the candidates take turns replaying
theirs, so that a change of clock hits all of them; the median over the turns is what counts. Before
each timed replay the stream is kept busy for a moment, so that the launch of the graph itself is
over when the clock starts.

Bytes are those of the weight's parts, x and y, each once. The speed of light of a case is the
longer of bytes / read ceiling and 2 M N K / matmul ceiling, both measured in the same process; of a
2:4 weight half of the multiply-adds count.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_int4 import _native
from cuda_int4.int4 import CanonicalInt4
from cuda_int4.tensors import TENSORS
from machine import command_line, commit_id, driver_version

OURS = {  # name -> layout, activation
    "w4a16": ("coalesced.v1", "none"),
    "w4a8": ("coalesced.v1", "int8"),
    "w4a8_quantized_x": ("coalesced.v1", "int8"),
    "marlin": ("marlin.v1", "none"),
    "marlin24": ("marlin24.v1", "none"),
}
SPARSE = ("marlin24", "cusparselt_fp16")  # on a symmetric weight of which half is dropped
KERNELS = (*OURS, "cublas_fp16", "tinygemm", "gemlite", "cusparselt_fp16")
# The first columns are those of the CPU's table.
COLUMNS = (
    "kernel,M,N,K,group_size,us_p10,us_median,us_p90,GB_per_s,peak_fraction,gpu,commit,"
    "zero_points,bus_fraction,light_fraction,relative_error"
).split(",")
BUS_BYTES_PER_S = 4.3e12  # of an H200, the figure that shares are quoted against
ROTATE_L2S = 4.2
GRAPH_S = 5e-4
TINYGEMM_MAX_ROWS = 256  # beyond, a call takes tens of milliseconds
TINYGEMM_INNER_K_TILES = 8
BUSY_CYCLES = 60_000  # about 30 us: longer than the launch of a graph


@dataclass
class Weight:
    """One int4 weight on the GPU: codes 0..15 [N, K], scale and zero point [N, n_groups]."""

    codes: Tensor
    scale: Tensor  # in the dtype of x; exact in float16 and in bfloat16
    zero_point: Tensor | None  # whole numbers; None: 8
    group_size: int
    copies: dict[str, list[Any]] = field(default_factory=dict)  # by kernel, in its own order

    def copies_of(self, name: str, make: Callable[[], list[Any]]) -> list[Any]:
        """The copies in the order of that kernel, packed once for all numbers of rows."""
        if name not in self.copies:
            self.copies[name] = make()
        return self.copies[name]

    def dequantize(self) -> Tensor:
        """The definition, in float64."""
        scale = self.scale.double().repeat_interleave(self.group_size, 1)
        if self.zero_point is None:
            return (self.codes.double() - 8) * scale
        return (
            self.codes.double() - self.zero_point.double().repeat_interleave(self.group_size, 1)
        ) * scale


def make_weight(N: int, K: int, group_size: int, zero_points: bool, dtype: torch.dtype) -> Weight:
    """Codes, scales and zero points that differ everywhere.

    The mat-vecs are slower where scales are not of the dtype of x.
    """
    generator = torch.Generator("cuda").manual_seed(N + K)
    shape = (N, K // group_size)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device="cuda", generator=generator)
    scale = torch.rand(shape, device="cuda", generator=generator) * 0.02 + 0.002
    zero_point = torch.randint(4, 12, shape, device="cuda", generator=generator).to(dtype)
    scale = scale.bfloat16().to(dtype)
    return Weight(codes, scale, zero_point if zero_points else None, group_size)


def half_dropped(weight: Weight) -> Weight:
    """The same weight 2:4: of every four codes along K two are 8, zero."""
    fours = torch.rand(weight.codes.shape, device="cuda").unflatten(1, (-1, 4))
    dropped = fours.argsort(-1).flatten(1) < 2
    return Weight(weight.codes.masked_fill(dropped, 8), weight.scale, None, weight.group_size)


@dataclass
class Candidate:
    """A kernel with copies of its weight: ``call(i)`` queues the one that reads copy i."""

    name: str
    group_size: int | None
    zero_points: bool | None
    call: Callable[[int], Tensor]
    n_copies: int
    bytes_moved: int
    exact: Tensor
    tolerance: float
    error: float = float("nan")
    graph: torch.cuda.CUDAGraph | None = None
    n_calls: int = 0

    def is_right(self) -> bool:
        """Relative Frobenius error of every copy's answer within the tolerance."""
        norm = self.exact.norm()
        errors = [
            float((self.call(i).double() - self.exact).norm() / norm) for i in range(self.n_copies)
        ]
        self.error = max(errors)
        return all(error <= self.tolerance for error in errors)

    def capture(self) -> None:
        """Record the graph: whole rounds over the copies, about GRAPH_S long or one round."""
        round_s = best_time_s(lambda: [self.call(i) for i in range(self.n_copies)], 2)
        self.n_calls = self.n_copies * max(1, round(GRAPH_S / round_s))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(self.n_calls):
                self.call(i % self.n_copies)
        self.graph = graph


def copies_for(nbytes: int, rotate_bytes: int) -> int:
    """How many copies of a weight together pass ``rotate_bytes``, at least 2."""
    return max(2, -(-rotate_bytes // nbytes))


def int8_rounded(x: Tensor) -> Tensor:
    """X as w4a8 sees it, in float64: per 32 values, max|x| / 127 times an int8."""
    groups = x.float().unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, (groups / step).round().clamp(-127, 127), 0)
    return (codes.double() * step.double()).flatten(-2)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Frobenius, against float64."""
    return float((found.double() - exact).norm() / exact.norm())


def packed_copies(layout_tag: str, weight: Weight, rotate_bytes: int) -> list[list[Tensor | None]]:
    """Qdata, scale, zero point and metadata in that layout, copied."""
    qdata = weight.codes[:, ::2] | (weight.codes[:, 1::2] << 4)
    canonical = CanonicalInt4(qdata, weight.scale, weight.zero_point, weight.group_size)
    packed = TENSORS[layout_tag].from_int4(canonical)
    parts = [getattr(packed, name, None) for name in ("qdata", "scale", "zero_point", "meta")]
    nbytes = sum(part.nbytes for part in parts if part is not None)
    return [
        [None if part is None else part.clone() for part in parts]
        for _ in range(copies_for(nbytes, rotate_bytes))
    ]


def ours(name: str, x: Tensor, weight: Weight, dense: Tensor, rotate_bytes: int) -> Candidate:
    """The linear of a ``.pte`` through ctypes; arguments, scratch and output made once.

    "w4a8" quantises x in every call; "w4a8_quantized_x" leaves that to what comes before.
    """
    library = _native.library()
    layout_tag, activation = OURS[name]
    copies = weight.copies_of(layout_tag, lambda: packed_copies(layout_tag, weight, rotate_bytes))
    nbytes = sum(part.nbytes for part in copies[0] if part is not None)
    N = weight.codes.shape[0]
    y = torch.full((x.shape[0], N), float("nan"), dtype=x.dtype, device="cuda")
    quantized = torch.empty(0, dtype=torch.uint8, device="cuda")
    moved = nbytes + x.nbytes + y.nbytes
    if name == "w4a8_quantized_x":
        needed = library.quantized_activation_bytes(*x.shape)
        quantized = torch.empty(needed, dtype=torch.uint8, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        _native.check(
            library.quantize_activation(_native.tensor_view(x), stream, quantized.data_ptr())
        )
        moved += needed - x.nbytes
    scratch = torch.empty(0, dtype=torch.uint8, device="cuda")
    calls = []
    for copy in copies:
        tensors = (x, *copy, None, y)
        args = _native.LinearArgs(
            *map(_native.tensor_view, tensors), weight.group_size, layout_tag.encode(),
            activation.encode(), b"bench", N,
        )  # fmt: skip
        calls.append(args)
    size = _native.c_uint64()
    _native.check(library.linear_scratch_bytes(calls[0], _native.DEVICE_CUDA, size))
    if size.value:
        scratch = torch.empty(size.value, dtype=torch.uint8, device="cuda")

    def call(i: int) -> Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        code = library.linear_of_constants(
            calls[i], stream, scratch.data_ptr() or None, scratch.nbytes,
            quantized.data_ptr() or None,
        )  # fmt: skip
        _native.check(code)
        return y

    if activation == "none":
        exact = x.double() @ dense.T
        plain = relative_error(F.linear(x, dense.to(x.dtype)), exact)
        tolerance = 2 * plain  # of the product of the dequantised weight, rounded to x's dtype
    else:
        exact = int8_rounded(x) @ dense.T
        tolerance = 1.2 * relative_error(exact.to(x.dtype), exact)
    return Candidate(
        name, weight.group_size, weight.zero_point is not None, call, len(calls), moved, exact,
        tolerance,
    )  # fmt: skip


def cublas(x: Tensor, weight: Weight, dense: Tensor, rotate_bytes: int) -> Candidate:
    """F.linear in float16."""
    copies = weight.copies_of(
        "cublas_fp16", lambda: clones([dense.half()], dense.numel() * 2, rotate_bytes)
    )
    x = x.half()
    moved = copies[0][0].nbytes + x.nbytes + x.shape[0] * dense.shape[0] * 2
    exact = x.double() @ copies[0][0].double().T
    return Candidate(
        "cublas_fp16", None, None, lambda i: F.linear(x, copies[i][0]), len(copies), moved, exact,
        2e-3,
    )  # fmt: skip


def clones(parts: Sequence[Tensor], nbytes: int, rotate_bytes: int) -> list[list[Tensor]]:
    """Copies of the parts, which together have ``nbytes``."""
    return [[part.clone() for part in parts] for _ in range(copies_for(nbytes, rotate_bytes))]


def cusparselt(x: Tensor, weight: Weight, dense: Tensor, rotate_bytes: int) -> Candidate:
    """A 2:4 product in float16 by cuSPARSELt's quickest algorithm, x padded to 16 rows before.

    The search is its own, of the form that is timed: the algorithm of another form took three times
    as long. It fails where the result is to be transposed: y.T is what is timed.
    """

    def compress() -> list[list[Tensor]]:
        packed = torch.sparse.to_sparse_semi_structured(dense.half()).packed
        return clones([packed], packed.nbytes, rotate_bytes)

    copies = weight.copies_of("cusparselt_fp16", compress)
    M = x.shape[0]
    padded = F.pad(x.half(), (0, 0, 0, -M % 16)).T
    exact = x.half().double() @ dense.half().double().T
    moved = copies[0][0].nbytes + padded.nbytes + padded.shape[1] * dense.shape[0] * 2

    algorithm = torch._cslt_sparse_mm_search(copies[0][0], padded)

    def call(i: int) -> Tensor:
        return torch._cslt_sparse_mm(copies[i][0], padded, alg_id=algorithm).T[:M]

    return Candidate("cusparselt_fp16", None, None, call, len(copies), moved, exact, 2e-3)


def tinygemm(x: Tensor, weight: Weight, dense: Tensor, rotate_bytes: int) -> Candidate:
    """``_weight_int4pack_mm``: bfloat16, w = (q - 8) * scale + zero."""

    def pack() -> list[list[Tensor]]:
        packed = torch.ops.aten._convert_weight_to_int4pack(
            (weight.codes[:, ::2] << 4) | weight.codes[:, 1::2], TINYGEMM_INNER_K_TILES
        )
        scale, zero = weight.scale, torch.zeros_like(weight.scale)
        if weight.zero_point is not None:
            zero = (8 - weight.zero_point) * scale
        parts = [packed, torch.stack([scale, zero], -1).transpose(0, 1).bfloat16().contiguous()]
        return clones(parts, sum(part.nbytes for part in parts), rotate_bytes)

    copies = weight.copies_of("tinygemm", pack)
    nbytes = sum(part.nbytes for part in copies[0])
    x = x.bfloat16()

    def call(i: int) -> Tensor:
        packed, scale_and_zero = copies[i]
        return torch.ops.aten._weight_int4pack_mm(x, packed, weight.group_size, scale_and_zero)

    moved = nbytes + x.nbytes + x.shape[0] * weight.codes.shape[0] * 2
    exact = x.double() @ dense.T
    has_zero_points = weight.zero_point is not None
    return Candidate(
        "tinygemm", weight.group_size, has_zero_points, call, len(copies), moved, exact, 1e-2
    )


def gemlite(x: Tensor, weight: Weight, dense: Tensor, rotate_bytes: int) -> Candidate:
    """GemLite's weight-only kernels in float16, with its own tuning."""
    from gemlite.helper import A16W4_HQQ_INT  # type: ignore[import-not-found]

    zero = weight.zero_point
    scale = weight.scale.half()
    zero = torch.full_like(scale, 8) if zero is None else zero.half()
    nbytes = weight.codes.numel() // 2 + weight.scale.nbytes + zero.nbytes

    def pack() -> list[Any]:
        return [
            A16W4_HQQ_INT(device="cuda:0", dtype=torch.float16).from_weights(
                weight.codes.clone(), scale.clone(), zero.clone()
            )
            for _ in range(copies_for(nbytes, rotate_bytes))
        ]

    layers = weight.copies_of("gemlite", pack)
    x = x.half()
    moved = nbytes + x.nbytes + x.shape[0] * weight.codes.shape[0] * 2
    exact = x.double() @ dense.T
    has_zero_points = weight.zero_point is not None
    return Candidate(
        "gemlite", weight.group_size, has_zero_points, lambda i: layers[i](x), len(layers), moved,
        exact, 1e-2,
    )  # fmt: skip


def candidates_for(
    names: Sequence[str], x: Tensor, weight: Weight, dense: Tensor, rotate_bytes: int
) -> Iterator[Candidate]:
    """Those that read a dense int4 weight."""
    for name in names:
        if name == "tinygemm" and x.shape[0] <= TINYGEMM_MAX_ROWS:
            yield tinygemm(x, weight, dense, rotate_bytes)
        elif name == "gemlite":
            yield gemlite(x, weight, dense, rotate_bytes)
        elif name in OURS and name not in SPARSE:
            yield ours(name, x, weight, dense, rotate_bytes)


def time_turns(candidates: Sequence[Candidate], turns: int) -> list[list[float]]:
    """Microseconds a call in each turn, per candidate; two turns before are not counted."""
    times: list[list[float]] = [[] for _ in candidates]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for turn in range(turns + 2):
        for candidate, measured in zip(candidates, times, strict=True):
            assert candidate.graph is not None
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            candidate.graph.replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                measured.append(start.elapsed_time(end) * 1e3 / candidate.n_calls)
    return times


def best_time_s(call: Callable[[], object], n: int = 10) -> float:
    """Seconds of the quickest of ``n`` calls."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(n):
        start.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def read_ceiling() -> float:
    """Bytes a second of ``torch.max`` over 1 GiB, the quickest dtype."""
    rates = []
    for dtype in (torch.int8, torch.float16, torch.float32):
        data = torch.zeros((1 << 30) // dtype.itemsize, dtype=dtype, device="cuda")
        rates.append(data.nbytes / best_time_s(data.max))
    return max(rates)


def matmul_ceiling() -> float:
    """Multiply-adds times two, a second, of a large float16 product by cuBLAS."""
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / best_time_s(lambda: a @ b)


def multiply_adds(kernel: str, M: int, N: int, K: int) -> int:
    """That the result takes: with a 2:4 weight, those of the half that is kept."""
    return M * N * K // (2 if kernel in SPARSE else 1)


def kernels_here(asked: Sequence[str] | None) -> list[str]:
    """Those asked for, or all that are installed.

    Raises:
        ImportError: a kernel that is asked for by name is not installed.
    """
    cures = {}
    if importlib.util.find_spec("gemlite") is None:
        cures["gemlite"] = "pip install gemlite"
    if not torch.backends.cusparselt.is_available():
        cures["cusparselt_fp16"] = "install a torch that was built with cuSPARSELt"
    for name, cure in cures.items():
        if asked and name in asked:
            raise ImportError(f"bench: expected {name}, which is not installed; {cure}")
        if not asked:
            print(f"{name} is not installed: left out", file=sys.stderr)
    return [name for name in asked or KERNELS if name not in cures]


def run(options: argparse.Namespace, out: TextIO) -> bool:
    """Write the table; False if any answer was wrong."""
    gpu = torch.cuda.get_device_name()
    l2_bytes = torch.cuda.get_device_properties().L2_cache_size
    rotate_bytes = options.rotate_mb << 20 if options.rotate_mb else int(ROTATE_L2S * l2_bytes)
    commit = options.commit or commit_id()
    kernels = options.kernels
    ceiling, compute = read_ceiling(), matmul_ceiling()
    for line in (
        f"# {gpu}, driver {driver_version()}, torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, commit {commit or 'unknown'}",
        f"# command: {command_line()}",
        f"# read ceiling {ceiling / 1e12:.3f} TB/s (torch.max over 1 GiB), fp16 matmul ceiling "
        f"{compute / 1e12:.0f} TFLOP/s, L2 {l2_bytes >> 20} MiB, weights rotate through "
        f"{rotate_bytes >> 20} MiB",
    ):
        print(line, file=sys.stderr)
        out.write(line + "\n")
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    all_right = True
    weights: list[tuple[Weight, Tensor]] = []
    sparse: list[tuple[Weight, Tensor]] = []
    made_for = (0, 0)
    for (N, K), M in itertools.product(options.shapes, options.rows):
        began = time.perf_counter()
        if made_for != (N, K):
            weights.clear()
            kinds = itertools.product(options.group_sizes, options.zero_points)
            made = (
                make_weight(N, K, group_size or K, zeros, options.dtype)
                for group_size, zeros in kinds
            )
            weights += [(weight, weight.dequantize()) for weight in made]
            sparse.clear()
            if any(name in SPARSE for name in kernels):
                halves = [half_dropped(w) for w, _ in weights if w.zero_point is None]
                sparse += [(half, half.dequantize()) for half in halves]
            made_for = (N, K)
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(options.dtype).cuda()
        candidates = [
            candidate
            for weight, dense in weights
            for candidate in candidates_for(kernels, x, weight, dense, rotate_bytes)
        ]
        if "marlin24" in kernels:
            candidates += [ours("marlin24", x, half, d, rotate_bytes) for half, d in sparse]
        if "cublas_fp16" in kernels:
            candidates.append(cublas(x, *weights[-1], rotate_bytes))
        if "cusparselt_fp16" in kernels and sparse:
            candidates.append(cusparselt(x, *sparse[-1], rotate_bytes))
        right = [candidate.is_right() for candidate in candidates]
        timed = [c for c, is_right in zip(candidates, right, strict=True) if is_right]
        for candidate in timed:
            candidate.capture()
        times = iter(time_turns(timed, options.turns))
        for candidate, is_right in zip(candidates, right, strict=True):
            zeros = "" if candidate.zero_points is None else int(candidate.zero_points)
            case = [candidate.name, M, N, K, candidate.group_size or ""]
            error = f"{candidate.error:.2e}"
            if not is_right:
                all_right = False
                numbers = ["WRONG"] * 3 + ["", ""]
                table.writerow([*case, *numbers, gpu, commit, zeros, "", "", error])
                continue
            measured = next(times)
            tenths, median = statistics.quantiles(measured, n=10), statistics.median(measured)
            rate = candidate.bytes_moved / median * 1e6
            operations = multiply_adds(candidate.name, M, N, K)
            light_us = 1e6 * max(candidate.bytes_moved / ceiling, 2 * operations / compute)
            table.writerow(
                [
                    *case,
                    *(f"{us:.2f}" for us in (tenths[0], median, tenths[8])),
                    f"{rate / 1e9:.1f}",
                    f"{rate / ceiling:.3f}",
                    gpu,
                    commit,
                    zeros,
                    f"{rate / BUS_BYTES_PER_S:.3f}",
                    f"{light_us / median:.3f}",
                    error,
                ]
            )
        out.flush()
        took_s = time.perf_counter() - began
        print(f"N={N} K={K} M={M}: {len(candidates)} kernels in {took_s:.1f} s", file=sys.stderr)
        del candidates, timed
        torch.cuda.empty_cache()
    return all_right
