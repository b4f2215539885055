"""The CUDA kernels of plain ops beside torch's: norms, softmax, sums, copies, indices, products.

    python benchmarks/bench_ops_cuda.py > benchmarks/results/ops_cuda.md

Needs torch with CUDA, nvcc and g++. Compiles the kernels into a library in a temporary folder. Each
row is one op on one shape: all calls of one side in one CUDA graph, inputs in turns over more than
four times the L2 where one call reads much, the median of 15 replays. The answer is checked against
float64 first: WRONG takes the place of a time that no right answer has.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

KERNELS = Path(__file__).resolve().parents[1] / "backend" / "kernels" / "cuda"
SOURCES = (
    "rms_norm.cu", "silu.cu", "layer_norm.cu", "softmax.cu", "reduce_sums.cu", "reduce_extremes.cu",
    "matmul.cu", "matmul_plain.cu", "matmul_w16a16_mma.cu", "matmul_cublaslt.cu",
    "matvec_w16a16_mma.cu", "matvec_dense.cu", "cublaslt.cpp", "tensor_kernels.cu", "copy.cu",
    "elementwise_arithmetic.cu", "elementwise_math.cu", "indexing.cu", "accumulate.cu",
    "accumulate_sorted.cu", "../checks.cpp",
)  # fmt: skip
SHIM = """
#include "kernels/checks.h"
#include "kernels/cuda/matmul_kernels.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/rms_norm.cuh"
#include "kernels/cuda/row_kernels.cuh"
#include "kernels/cuda/silu.cuh"
#include "kernels/cuda/tensor_kernels.h"
using namespace cuda_int4;
static DType dtype_of(int64_t dtype) { return static_cast<DType>(dtype); }
static cudaStream_t stream_of(void* stream) { return static_cast<cudaStream_t>(stream); }
extern "C" {
int bench_rms_norm(void* x, void* w, void* y, int64_t dtype, int64_t rows, int64_t D,
                   void* stream) {
  const DType t = dtype_of(dtype);
  return launch_rms_norm({x, w, y, t, t, rows, D, 1e-5f}, stream_of(stream));
}
int bench_silu(void* x, void* y, int64_t dtype, int64_t numel, void* stream) {
  return launch_silu({x, y, dtype_of(dtype), numel}, stream_of(stream));
}
int bench_layer_norm(void* x, void* w, void* b, void* y, void* mean, void* rstd, int64_t dtype,
                     int64_t rows, int64_t D, void* stream) {
  const DType t = dtype_of(dtype);
  return launch_layer_norm({x, w, b, y, mean, rstd, t, t, t, t, rows, D, 1e-5}, stream_of(stream));
}
int bench_softmax(void* x, void* y, int64_t dtype, int64_t rows, int64_t n, void* stream) {
  const DType t = dtype_of(dtype);
  return launch_softmax({x, y, t, t, rows, n, 1, false}, stream_of(stream));
}
int bench_reduce(void* x, void* out, void* index, int64_t dtype, int64_t reduction, int64_t rows,
                 int64_t n, void* scratch, int64_t scratch_bytes, void* stream) {
  ReduceArgs args = {};
  args.x = x;
  args.out = out;
  args.index = index;
  args.dtype = args.out_dtype = dtype_of(dtype);
  args.reduction = static_cast<Reduction>(reduction);
  args.n_out = rows;
  args.n_reduced = n;
  args.kept = {1, {rows}, {n}};
  args.reduced = {1, {n}, {1}};
  if (reduce_scratch_bytes(args) > static_cast<uint64_t>(scratch_bytes)) return -1;
  return args.reduction == Reduction::kMaximum
             ? launch_reduce_extremes(args, scratch, stream_of(stream))
             : launch_reduce_sums(args, scratch, stream_of(stream));
}
static TensorView view_of(void* data, int64_t dtype, int64_t rows, int64_t columns,
                          int64_t row_stride, int64_t column_stride) {
  const uint64_t nbytes = static_cast<uint64_t>(rows * columns * dtype_bytes(dtype_of(dtype)));
  return {data, nbytes, dtype_of(dtype), 2, {rows, columns}, {row_stride, column_stride}};
}
static ExecutionContext context_of(void* stream, void* scratch, int64_t scratch_bytes) {
  ExecutionContext context = {};
  context.device = DeviceKind::kCuda;
  context.stream = stream;
  context.scratch = scratch;
  context.scratch_bytes = static_cast<uint64_t>(scratch_bytes);
  return context;
}
// y [columns, rows] = x [rows, columns].T
int bench_transpose(void* x, void* y, int64_t dtype, int64_t rows, int64_t columns, void* stream) {
  const CopyPart part = {view_of(y, dtype, columns, rows, rows, 1),
                         view_of(x, dtype, columns, rows, 1, columns)};
  return static_cast<int>(kTensorKernels.copy("bench", &part, 1, context_of(stream, 0, 0)).code);
}
int bench_fill(void* y, int64_t dtype, int64_t n, void* stream) {
  FillArgs args = {};
  args.who = "bench";
  args.out = view_of(y, dtype, 1, n, n, 1);
  args.start.as_double = 1;
  args.start.as_int = 1;
  return static_cast<int>(kTensorKernels.fill(args, context_of(stream, 0, 0)).code);
}
// y = x + z; z [rows, 1] if it is one column.
int bench_add(void* x, void* z, void* y, int64_t dtype, int64_t rows, int64_t columns,
              int64_t one_column, void* stream) {
  ElementwiseArgs args = {};
  args.who = "bench";
  args.op = ElementwiseOp::kAdd;
  args.compute = ComputeType::kFloat32;
  args.n_in = 2;
  args.in[0] = view_of(x, dtype, rows, columns, columns, 1);
  args.in[1] = one_column ? view_of(z, dtype, rows, 1, 1, 1)
                          : view_of(z, dtype, rows, columns, columns, 1);
  args.in[2].ndim = -1;
  args.alpha.as_double = 1;
  args.out = view_of(y, dtype, rows, columns, columns, 1);
  return static_cast<int>(kTensorKernels.elementwise(args, context_of(stream, 0, 0)).code);
}
// y [N, D] += x [n, D] by index [n]
int bench_accumulate(void* x, void* index, void* y, int64_t dtype, int64_t n, int64_t N, int64_t D,
                     void* scratch, int64_t scratch_bytes, void* stream) {
  IndexArgs args = {};
  args.who = "bench";
  args.plain = view_of(x, dtype, n, D, D, 1);
  args.indexed = view_of(y, dtype, n, D, 0, 1);
  args.n_dims = 1;
  args.dims[0] = {view_of(index, static_cast<int64_t>(DType::kInt64), n, D, 1, 0), N, D};
  args.accumulates = true;
  if (kTensorKernels.scatter_scratch_bytes(args) > static_cast<uint64_t>(scratch_bytes)) return -1;
  return static_cast<int>(
      kTensorKernels.scatter(args, context_of(stream, scratch, scratch_bytes)).code);
}
// which: 0 is what the library picks; 1 cuBLASLt, 2 the tile kernel of ours, 3 the plain one.
int bench_matmul(void* x, void* w, void* y, int64_t which, int64_t dtype, int64_t M, int64_t N,
                 int64_t K, void* scratch, int64_t scratch_bytes, void* stream) {
  MatmulArgs args = {};
  args.a = x;
  args.b = w;
  args.y = y;
  args.dtype = dtype_of(dtype);
  args.batch = 1;
  args.M = M;
  args.N = N;
  args.K = K;
  args.a_m = args.b_n = K;
  args.a_k = args.b_k = 1;
  args.alpha = args.beta = 1;
  const uint64_t bytes = static_cast<uint64_t>(scratch_bytes);
  uint64_t needed = 0;
  switch (which) {
    case 0:
      if (matmul_scratch_bytes(args) > bytes) return -1;
      return launch_matmul(args, scratch, bytes, stream_of(stream));
    case 1:
      if (!cublaslt_accepts(args, &needed) || needed > bytes) return -1;
      return launch_matmul_cublaslt(args, scratch, bytes, stream_of(stream));
    case 2:
      return matmul_w16a16_accepts(args) ? launch_matmul_w16a16_mma(args, stream_of(stream)) : -1;
    default:
      return launch_matmul_plain(args, stream_of(stream));
  }
}
}
"""
DTYPE_NUMBERS = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
BF16 = DTYPE_NUMBERS[torch.bfloat16]
SUM, MAXIMUM = 0, 4  # cuda/reduce.h Reduction
PLAIN = 3  # the last of bench_matmul's kernels
ROTATE_BYTES = 260_000_000
REPLAYS = 15
SCRATCH_BYTES = 256 << 20


def run_command(command: list[str]) -> None:
    """Run it, or stop with its output."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def build(folder: Path) -> ctypes.CDLL:
    """Compile for this GPU, in parallel, and load."""
    nvcc = os.environ.get("NVCC", "nvcc")
    major, minor = torch.cuda.get_device_capability()
    sm = f"{major}{minor}{'a' if major == 9 else ''}"
    (folder / "shim.cu").write_text(SHIM)
    sources = [folder / "shim.cu", *(KERNELS / name for name in SOURCES)]
    objects = [str(folder / f"{i}.o") for i in range(len(sources))]
    flags = [f"-gencode=arch=compute_{sm},code=sm_{sm}", "-Xcompiler", "-fPIC", "-std=c++17", "-O3"]
    commands = [
        [nvcc, *flags, "-I", str(KERNELS.parents[1]), "-c", str(source), "-o", target]
        for source, target in zip(sources, objects, strict=True)
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_command, commands))
    library = folder / "libops.so"
    run_command([nvcc, "-shared", "-cudart", "static", "-o", str(library), *objects])
    return ctypes.CDLL(str(library))


def microseconds(call: Callable[[int], object], n_calls: int, n_replays: int = REPLAYS) -> float:
    """Of one call, from a CUDA graph of ``call(0)`` to ``call(n_calls - 1)``."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
        call(min(1, n_calls - 1))
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(n_calls):
                call(i)
        times = []
        for _ in range(n_replays + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / n_calls)
    return statistics.median(times[2:])


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Signed values on the GPU."""
    return (torch.randn(shape, device="cuda") / 4).to(dtype)


class Bench:
    """The library, its scratch, and one table row after the other."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device="cuda")

    def call(self, name: str, *values: Tensor | int | None) -> None:
        """``bench_<name>`` on the current stream; a code other than 0 is a ValueError."""
        arguments: list[object] = []
        for value in values:
            if value is None or isinstance(value, Tensor):
                pointer = None if value is None else value.data_ptr()
                arguments.append(ctypes.c_void_p(pointer))
            else:
                arguments.append(ctypes.c_int64(value))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = getattr(self.library, f"bench_{name}")(*arguments, stream)
        if code != 0:
            raise ValueError(f"{name}: expected 0, got {code}")

    def time(self, ours: Callable[[int], object], y: Tensor, exact: Tensor, n_calls: int) -> str:
        """Microseconds of ours, or why there are none."""
        y.fill_(-77)
        try:
            ours(0)
        except ValueError:
            return "-"
        rounded = exact.to(y.dtype).double()
        scale = exact.double().norm()
        error = float((y.double() - exact).norm() / scale)
        if error > 1.5 * float((rounded - exact).norm() / scale) + 2e-6:
            return f"WRONG {error:.1e}"
        return f"{microseconds(ours, n_calls):.2f}"

    def row(
        self, what: str, ours: Callable[[int], object], theirs: Callable[[int], object], y: Tensor,
        exact: Tensor, nbytes: int, n_calls: int = 100,
    ) -> None:  # fmt: skip
        """One line of the first table."""
        time = self.time(ours, y, exact, n_calls)
        torchs = microseconds(theirs, n_calls)
        share = f"{nbytes / float(time) / 4.3e6:.0%}" if time[0].isdigit() else "-"
        print(f"| {what} | {time} | {torchs:.2f} | {share} |", flush=True)

    def rms_norm(self, rows: int, D: int) -> None:
        """One line each, here and below."""
        x, w = normal(rows, D), normal(D)
        y, wide = torch.empty_like(x), x.double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
        self.row(
            f"rms_norm [{rows}, {D}] bf16",
            lambda _: self.call("rms_norm", x, w, y, BF16, rows, D),
            lambda _: F.rms_norm(x, (D,), w, 1e-5),
            y, exact, 2 * x.nbytes,
        )  # fmt: skip

    def silu(self, n: int) -> None:
        """As rms_norm."""
        x = normal(n)
        y = torch.empty_like(x)
        exact = x.double() * x.double().sigmoid()
        self.row(
            f"silu [{n}] bf16",
            lambda _: self.call("silu", x, y, BF16, n),
            lambda _: F.silu(x),
            y, exact, 2 * x.nbytes,
        )  # fmt: skip

    def layer_norm(self, rows: int, D: int) -> None:
        """With weight and bias."""
        x, w, b = normal(rows, D), normal(D), normal(D)
        y, moments = torch.empty_like(x), torch.empty(2, rows, device="cuda", dtype=x.dtype)
        self.row(
            f"layer_norm [{rows}, {D}] bf16",
            lambda _: self.call("layer_norm", x, w, b, y, moments[0], moments[1], BF16, rows, D),
            lambda _: F.layer_norm(x, (D,), w, b),
            y, F.layer_norm(x.double(), (D,), w.double(), b.double()), 2 * x.nbytes,
        )  # fmt: skip

    def softmax(self, rows: int, n: int) -> None:
        """Over the last dimension."""
        x = normal(rows, n)
        y = torch.empty_like(x)
        self.row(
            f"softmax [{rows}, {n}] bf16",
            lambda _: self.call("softmax", x, y, BF16, rows, n),
            lambda _: x.softmax(-1),
            y, x.double().softmax(-1), 2 * x.nbytes,
        )  # fmt: skip

    def argmax(self, n: int, dtype: torch.dtype) -> None:
        """Of one row, as greedy decoding takes it."""
        x = normal(1, n, dtype=dtype)
        y = torch.empty(1, dtype=torch.int64, device="cuda")
        number = DTYPE_NUMBERS[dtype]
        self.row(
            f"argmax [1, {n}] {str(dtype)[6:]}",
            lambda _: self.call(
                "reduce", x, None, y, number, MAXIMUM, 1, n, self.scratch, SCRATCH_BYTES
            ),
            lambda _: x.argmax(-1),
            y, x.cpu().argmax(-1).double().cuda(), x.nbytes,
        )  # fmt: skip

    def sum(self, rows: int, n: int) -> None:
        """Over the last dimension."""
        x = torch.rand(rows, n, device="cuda")
        y = torch.empty(rows, device="cuda")
        number = DTYPE_NUMBERS[x.dtype]
        self.row(
            f"sum [{rows}, {n}] float32, dim -1",
            lambda _: self.call(
                "reduce", x, y, None, number, SUM, rows, n, self.scratch, SCRATCH_BYTES
            ),
            lambda _: x.sum(-1),
            y, x.double().sum(-1), x.nbytes,
        )  # fmt: skip

    def transpose(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        """A copy whose two sides have other innermost dimensions."""
        x, y = normal(rows, columns, dtype=dtype), normal(columns, rows, dtype=dtype)
        self.row(
            f"transpose [{rows}, {columns}] {str(dtype)[6:]}",
            lambda _: self.call("transpose", x, y, DTYPE_NUMBERS[dtype], rows, columns),
            lambda _: y.copy_(x.T),
            y, x.T.double(), 2 * x.nbytes, 20,
        )  # fmt: skip

    def fill(self, n: int) -> None:
        """Ones."""
        y = torch.empty(n, device="cuda", dtype=torch.bfloat16)
        self.row(
            f"fill [{n}] bf16",
            lambda _: self.call("fill", y, BF16, n),
            lambda _: y.fill_(1),
            y, torch.ones(n, device="cuda", dtype=torch.float64), y.nbytes, 20,
        )  # fmt: skip

    def add(self, rows: int, columns: int, one_column: bool) -> None:
        """Of tensors of the same sizes, or of one column to all."""
        x, y = normal(rows, columns), normal(rows, columns)
        z = normal(rows, 1 if one_column else columns)
        self.row(
            f"add [{rows}, {columns}]{' and a column' if one_column else ''} bf16",
            lambda _: self.call("add", x, z, y, BF16, rows, columns, int(one_column)),
            lambda _: torch.add(x, z, out=y),
            y, x.double() + z.double(), x.nbytes + y.nbytes + z.nbytes, 20,
        )  # fmt: skip

    def accumulate(self, n: int, N: int, D: int, kind: str) -> None:
        """Rows added up by index, as the gradient of an embedding does."""
        index = {
            "any": torch.randint(0, N, (n,), device="cuda"),
            "frequent": (torch.rand(n, device="cuda").pow(8) * N).long(),
            "one": torch.full((n,), 7 % N, device="cuda"),
        }[kind]
        x, start = normal(n, D), normal(N, D)
        y = start.clone()
        exact = start.double().index_put((index,), x.double(), True)

        def ours(_: int) -> None:
            self.call(
                "accumulate", x, index, y, BF16, n, N, D, self.scratch, SCRATCH_BYTES
            )  # fmt: skip

        y.copy_(start)
        ours(0)
        rounded = (exact.to(y.dtype).double() - exact).norm()
        right = bool((y.double() - exact).norm() <= 1.5 * rounded + 2e-6 * exact.norm())
        time = f"{microseconds(ours, 4):.2f}" if right else "WRONG"
        # torch takes up to a second where an index is frequent.
        torchs = microseconds(lambda _: y.index_put_((index,), x, True), 1, 3)
        share = f"{x.nbytes / float(time) / 4.3e6:.0%}" if right else "-"
        what = f"index_put of {n} rows of {D}, {kind} of {N}, added, bf16"
        print(f"| {what} | {time} | {torchs:.2f} | {share} |", flush=True)

    def rows_of_norms(self) -> None:
        """The first table."""
        print("| op | ours, us | torch, us | ours, share of 4.3 TB/s |")
        print("| --- | ---: | ---: | ---: |")
        for rows, n in ((1, 4096), (1, 8192), (16, 4096), (512, 4096), (4096, 4096)):
            self.rms_norm(rows, n)
        for n in (14336, 14336 * 512):
            self.silu(n)
        for rows, n in ((1, 1280), (257, 1280), (2056, 1280), (4096, 4096)):
            self.layer_norm(rows, n)
        for rows, n in ((32, 1024), (4112, 257), (32 * 512, 512), (1, 128256)):
            self.softmax(rows, n)
        for dtype in (torch.float32, torch.bfloat16):
            self.argmax(128256, dtype)
        for rows, n in ((4096, 4096), (1, 1 << 20), (32, 128)):
            self.sum(rows, n)
        for dtype in (torch.bfloat16, torch.float32):
            self.transpose(4096, 4096, dtype)
        self.transpose(2048 * 32, 128, torch.bfloat16)
        self.fill(1 << 26)
        for rows, n in ((1, 4096), (1 << 14, 1 << 12), (1 << 14, 4095), (197 * 64, 197)):
            for one_column in (False, True):
                self.add(rows, n, one_column)
        for kind in ("any", "frequent", "one"):
            self.accumulate(1_000_000, 128256, 64, kind)
        self.accumulate(20_000, 32000, 1024, "any")
        self.accumulate(2048, 32000, 1024, "any")

    def product(self, dtype: torch.dtype, M: int, N: int, K: int) -> None:
        """One line of the second table."""
        nbytes = N * K * dtype.itemsize
        n_copies = max(1, -(-ROTATE_BYTES // nbytes))
        copies = [normal(N, K, dtype=dtype) for _ in range(n_copies)]
        x, y = normal(M, K, dtype=dtype), torch.empty(M, N, device="cuda", dtype=dtype)
        exact = x.double() @ copies[0].double().T
        n_calls = max(8, 2 * n_copies)

        def ours(which: int) -> Callable[[int], None]:
            return lambda i: self.call(
                "matmul", x, copies[i % n_copies], y, which, DTYPE_NUMBERS[dtype], M, N, K,
                self.scratch, SCRATCH_BYTES,
            )  # fmt: skip

        times = [
            "-" if which == PLAIN and M > 64 else self.time(ours(which), y, exact, n_calls)
            for which in range(PLAIN + 1)
        ]
        theirs = microseconds(lambda i: F.linear(x, copies[i % n_copies]), n_calls)
        share = f"{nbytes / float(times[0]) / 4.3e6:.0%}" if times[0][0].isdigit() else "-"
        what = f"M={M} N={N} K={K} {str(dtype)[6:]}"
        print(
            f"| {what} | {times[0]} | {share} | {' | '.join(times[1:])} | {theirs:.2f} |",
            flush=True,
        )

    def rows_of_products(self) -> None:
        """Products x [M, K] @ w [N, K].T: what the library picks, and what it picks from."""
        print("\n| x @ w.T | picked, us | share of 4.3 TB/s | cuBLASLt | tiles | plain | torch |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        weights = ((4096, 4096), (28672, 4096), (4096, 14336), (1280, 1280), (128256, 4096))
        for N, K in (*weights, (50257, 768)):
            for M in (1, 8, 16):
                self.product(torch.bfloat16, M, N, K)
        for M in (32, 256, 1024):
            self.product(torch.bfloat16, M, 4096, 4096)
        self.product(torch.bfloat16, 257, 3840, 1280)
        self.product(torch.float16, 1, 4096, 4096)
        for M in (1, 8, 64, 512):
            self.product(torch.float32, M, 4096, 4096)
        self.product(torch.float32, 1, 128256, 2048)


def main() -> int:
    """Build, measure, print."""
    if not torch.cuda.is_available():
        sys.exit("bench_ops_cuda: expected a CUDA GPU, torch sees none; run it where there is one")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    print("# Plain ops on CUDA\n\n    python benchmarks/bench_ops_cuda.py\n")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}.")
    print("Microseconds a call in one CUDA graph, median of 15 replays; an empty kernel takes 1.")
    print("Small inputs stay in the L2; weights of products rotate through 260 MB.\n")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(build(Path(folder)))
        bench.rows_of_norms()
        bench.rows_of_products()
    return 0


if __name__ == "__main__":
    sys.exit(main())
