"""Checks cuda_int4::linear on CUDA, activation "none", against float64, on a machine with a GPU.

    python tests/gpu/check_cuda_linear.py           every case
    python tests/gpu/check_cuda_linear.py --quick   fewer dtypes and rows, for compute-sanitizer

    python tests/gpu/check_cuda_linear.py --library p.so   keep the library there, for the next run

Needs torch with CUDA, nvcc and g++; nothing else (no executorch). Builds backend/kernels into a
library, runs every case and prints a line per group of cases and a summary; the exit status is 0 if
all are right. Inputs are signed and fresh for each case, every scale and zero point differs,
scratch and outputs start as NaN, with NaN guards around the outputs, shapes are ragged, operands
start at odd elements, and one-hot activations read single weights back.

The error may be 1.2 times that of rounding the exact answer once; above 16 rows of fp16 and bf16,
where weights are rounded to the dtype of x (check_cuda_matmul.py has the cases), twice that of a
plain matmul on the dequantised weight.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

BACKEND = Path(__file__).resolve().parents[2] / "backend"

# Suffix of a file -> what may be compiled in (kernels/README.md).
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
ISA_FLAGS = {"_avx2": AVX2, "_avx512": AVX512, "_avx512bf16": [*AVX512, "-mavx512bf16"]}
GPU_CODE = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ("80", "90a")]

# Functions of plain C, so that no runtime is needed around the kernels.
SHIM = """
#include "kernels/ops.h"
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED uint64_t check_scratch_bytes(const cuda_int4::LinearArgs* args) {
  return cuda_int4::linear_scratch_bytes(*args, cuda_int4::DeviceKind::kCuda);
}
EXPORTED int32_t check_linear(const cuda_int4::LinearArgs* args, void* stream, void* scratch,
                              uint64_t scratch_bytes, int32_t constant_weights,
                              cuda_int4::Status* status) {
  cuda_int4::ExecutionContext context = {};
  context.device = cuda_int4::DeviceKind::kCuda;
  context.stream = stream;
  context.scratch = scratch;
  context.scratch_bytes = scratch_bytes;
  context.constant_weights = constant_weights != 0;
  *status = cuda_int4::linear(*args, context);
  return static_cast<int32_t>(status->code);
}
"""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# N, K, group_size; 0 is one group per row.
SHAPES = (
    (1, 32, 32),
    (3, 96, 32),
    (7, 64, 64),
    (13, 1088, 32),
    (17, 1088, 64),
    (66, 384, 128),
    (70, 1408, 128),
    (5, 1280, 256),
    (37, 1088, 0),
    (90, 1536, 64),
    (257, 4096, 32),
    (1023, 2048, 128),
)
# One dtype of scales each: long rows and many, in clusters and without.
LARGE_SHAPES = (
    (4096, 4096, 128),
    (2100, 5376, 128),
    (1030, 8192, 256),
    (515, 3712, 0),
    (6144, 2560, 32),
    (200, 14336, 128),
    (40, 28672, 64),
    (9, 90112, 0),
)
ROWS = (1, 2, 3, 7, 8, 9, 13, 16, 17, 64)
QUICK_SHAPES = (
    (7, 64, 64),
    (13, 1088, 32),
    (70, 1408, 128),
    (37, 1088, 0),
    (300, 2048, 128),
    (150, 4096, 128),
    (40, 14336, 256),
)
QUICK_ROWS = (1, 8, 16)
ZERO_POINTS = ("none", "scale_dtype", "float32")
INCOMPATIBLE = 2
MAX_PRINTED = 40
NAME = "checked.weight"


class Status(ctypes.Structure):
    """kernels/tensor_view.h Status."""

    _fields_ = [("code", ctypes.c_int32), ("message", ctypes.c_char * 1020)]


def load_native() -> ModuleType:
    """backend/_native.py by its path: the package itself need not be installed."""
    spec = importlib.util.spec_from_file_location("cuda_int4_native", BACKEND / "_native.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_command(command: list[str]) -> None:
    """Run it, or stop with its output."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def build(library: Path) -> None:
    """Compile backend/kernels with g++ and nvcc, in parallel."""
    folder = library.with_suffix("")
    folder.mkdir(exist_ok=True)
    nvcc = os.environ.get("NVCC", "nvcc")
    (folder / "shim.cpp").write_text(SHIM)
    sources = [folder / "shim.cpp", *(BACKEND / "kernels").rglob("*.cpp")]
    sources = [path for path in sources if path.name != "cuda_kernels_none.cpp"]
    commands, objects = [], []
    for i, path in enumerate(sources + list((BACKEND / "kernels").rglob("*.cu"))):
        objects.append(str(folder / f"{i}.o"))
        common = ["-std=c++17", "-O3", "-I", str(BACKEND), "-c", str(path), "-o", objects[-1]]
        if path.suffix == ".cu":
            commands.append([nvcc, *GPU_CODE, "-Xcompiler", "-fPIC", *common])
        else:
            isa = path.stem[path.stem.rfind("_") :]
            commands.append(["g++", "-fPIC", "-Wall", *ISA_FLAGS.get(isa, []), *common])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_command, commands))
    run_command([nvcc, "-shared", "-cudart", "static", "-o", str(library), *objects, "-ldl"])


class Checker:
    """Calls the kernel and counts what was right."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.check_scratch_bytes.restype = ctypes.c_uint64
        self.native = load_native()
        self.n_right = 0
        self.n_calls = 0
        self.failures: list[str] = []
        self.generator = torch.Generator().manual_seed(1)

    def note(self, right: bool, what: str) -> None:
        """Count one check; print what failed."""
        if right:
            self.n_right += 1
        else:
            self.failures.append(what)
            if len(self.failures) <= MAX_PRINTED:
                print("WRONG", what)

    def launch(
        self,
        x: Tensor,
        weight: dict,
        y: Tensor,
        layout_tag: str = "coalesced.v1",
        constant_weights: bool = True,
    ) -> tuple[int, str]:
        """Status code and message; does not wait."""
        parts = (x, weight["qdata"], weight["scale"], weight["zero_point"], None)
        views = [self.native.tensor_view(part) for part in (*parts, weight.get("bias"), y)]
        args = self.native.LinearArgs(
            *views, weight["group_size"], layout_tag.encode(), b"none", NAME.encode()
        )
        nbytes = self.library.check_scratch_bytes(ctypes.byref(args))
        scratch = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device="cuda")
        status = Status()
        self.library.check_linear(
            ctypes.byref(args),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            ctypes.c_void_p(scratch.data_ptr()),
            ctypes.c_uint64(nbytes),
            ctypes.c_int32(constant_weights),
            ctypes.byref(status),
        )
        return status.code, status.message.decode()

    def call(
        self, x: Tensor, weight: dict, y: Tensor | None = None, layout_tag: str = "coalesced.v1"
    ) -> tuple[int, str, Tensor]:
        """Status code, message and y; y starts as NaN. Every second call has constant weights."""
        if y is None:
            shape = (*x.shape[:-1], weight["qdata"].shape[0])
            y = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
        self.n_calls += 1
        code, message = self.launch(x, weight, y, layout_tag, self.n_calls % 2 == 0)
        torch.cuda.synchronize()
        return code, message, y

    def weight(
        self, N: int, K: int, group_size: int, scale_dtype: torch.dtype, zero: str
    ) -> tuple[dict, Tensor]:
        """A weight, and its definition, on the GPU."""
        group_size = group_size or K
        codes = torch.randint(0, 16, (N, K), generator=self.generator, dtype=torch.uint8)
        shape = (N, K // group_size)
        scale = (torch.rand(shape, generator=self.generator) * 0.03 + 0.002).to(scale_dtype)
        zero_point = None
        if zero == "scale_dtype":
            zero_point = torch.randint(0, 16, shape, generator=self.generator).to(scale_dtype)
        elif zero == "float32":
            zero_point = torch.rand(shape, generator=self.generator) * 80 - 40.5
        z = torch.full(shape, 8.0) if zero_point is None else zero_point
        # q - z and times scale, each rounded to float32: the definition.
        centred = codes.float() - z.float().repeat_interleave(group_size, 1)
        exact = centred * scale.float().repeat_interleave(group_size, 1)
        parts = {"qdata": codes[:, ::2] | (codes[:, 1::2] << 4), "scale": scale}
        on_gpu: dict = {name: part.cuda() for name, part in parts.items()}
        on_gpu["zero_point"] = None if zero_point is None else zero_point.cuda()
        on_gpu["group_size"] = group_size
        return on_gpu, exact.cuda()

    def compare(self, x: Tensor, weight: dict, exact: Tensor, what: str, offset: int = 0) -> None:
        """The error is within its bound, and nothing is written around y."""
        M, N = x.shape[0], exact.shape[0]
        memory = torch.full((M * N + 64,), float("nan"), dtype=x.dtype, device="cuda")
        y = memory[offset : offset + M * N].view(M, N)
        code, message, _ = self.call(x, weight, y)
        want = x.double() @ exact.double().T
        if weight.get("bias") is not None:
            want = want + weight["bias"].double()
        error = float((y.double() - want).norm() / want.norm())
        rounding = float((want.to(x.dtype).double() - want).norm() / want.norm())
        bound = 1e-5 if x.dtype == torch.float32 else 1.2 * rounding + 1e-9
        if x.dtype != torch.float32 and M > 16:
            plain = torch.nn.functional.linear(x, exact.to(x.dtype), weight.get("bias"))
            bound = max(bound, 2 * float((plain.double() - want).norm() / want.norm()))
        around = torch.cat((memory[:offset], memory[offset + M * N :]))
        clean = bool(around.isnan().all())
        what += f": error {error:.2e}, bound {bound:.2e}, guards clean {clean} {message}"
        self.note(code == 0 and clean and error <= bound, what)

    def check_one_hot(
        self, weight: dict, exact: Tensor, dtype: torch.dtype, is_whole: bool, what: str
    ) -> None:
        """X = e_k gives column k of the weight, rounded once.

        A zero point that is no whole number may come 2**-15 off: the sums of the tensor cores hold
        128 + q - (128 + zero_point) in float32.
        """
        K, group_size = exact.shape[1], weight["group_size"]
        ks = sorted({0, 1, 7, 8, 31, K // 2, K - 2, K - 1})
        x = torch.zeros(len(ks), K, dtype=dtype)
        x[range(len(ks)), ks] = 1
        code, message, y = self.call(x.cuda(), weight)
        want = exact[:, ks].T
        slack = 0.0 if is_whole else weight["scale"].float()[:, [k // group_size for k in ks]].T
        low, high = ((want + side * 2**-15 * slack).to(dtype) for side in (-1, 1))
        same = bool(((y >= low) & (y <= high)).all())
        self.note(code == 0 and same, f"{what}: one-hot reads back another weight {message}")

    def check_refusals(self) -> None:
        """What CUDA does not do is refused, with the weight's name, before anything is written."""
        weight, _ = self.weight(8, 64, 32, torch.bfloat16, "none")
        x = torch.randn(1, 64).bfloat16().cuda()
        for keywords, want in (
            ({"layout_tag": "plain.v1"}, INCOMPATIBLE),
            ({"layout_tag": "coalesced.v2"}, INCOMPATIBLE),
        ):
            code, message, y = self.call(x, weight, **keywords)
            right = code == want and NAME in message and bool(y.isnan().all())
            self.note(right, f"refusal of {keywords}: code {code}, {message}")


def check_shapes(checker: Checker, shapes: tuple, dtypes: tuple, rows: tuple) -> None:
    """Every shape x dtype x zero point, with bias on every second."""
    for N, K, group_size in shapes:
        before = len(checker.failures)
        for i, (dtype, scale_dtype, zero) in enumerate(
            itertools.product(dtypes, dtypes, ZERO_POINTS)
        ):
            what = f"N={N} K={K} group_size={group_size or K} {dtype} {scale_dtype} zero={zero}"
            weight, exact = checker.weight(N, K, group_size, scale_dtype, zero)
            is_whole = zero != "float32" or dtype == torch.float32
            checker.check_one_hot(weight, exact, dtype, is_whole, what)
            if i % 2:
                weight["bias"] = torch.randn(N, generator=checker.generator).to(dtype).cuda()
            for M in rows:
                x = torch.randn(M, K, generator=checker.generator).to(dtype).cuda()
                checker.compare(x, weight, exact, f"M={M} {what}")
        verdict = "ok" if len(checker.failures) == before else "WRONG"
        print(f"N={N:5} K={K:5} group_size={group_size or K:5}  {verdict}", flush=True)


def check_large(checker: Checker) -> None:
    """Shapes whose work is cut over clusters, warps and rows of x in other ways."""
    for N, K, group_size in LARGE_SHAPES:
        before = len(checker.failures)
        for dtype, zero in itertools.product(DTYPES[:2], ("none", "scale_dtype")):
            weight, exact = checker.weight(N, K, group_size, dtype, zero)
            what = f"N={N} K={K} group_size={group_size or K} {dtype} zero={zero}"
            for M in (1, 2, 4, 8, 16):
                x = torch.randn(M, K, generator=checker.generator).to(dtype).cuda()
                checker.compare(x, weight, exact, f"M={M} {what}")
        verdict = "ok" if len(checker.failures) == before else "WRONG"
        print(f"N={N:5} K={K:5} group_size={group_size or K:5}  {verdict}", flush=True)


def check_special(checker: Checker) -> None:
    """Odd addresses, a large mean, inf, repetition, chains, graphs."""
    for dtype in DTYPES[:2]:
        weight, exact = checker.weight(515, 1088, 32, dtype, "float32")
        for M in (1, 8, 16):
            what = f"{dtype} M={M}"
            x = torch.randn(M, 1088, generator=checker.generator).to(dtype).cuda()
            odd = torch.empty(M * 1088 + 1, dtype=dtype, device="cuda")[1:].view(M, 1088).copy_(x)
            checker.compare(odd, weight, exact, f"x at an odd address {what}")
            checker.compare(x, weight, exact, f"y at an odd address {what}", offset=1)
            checker.compare(x + 100, weight, exact, f"x of mean 100 {what}")
            first, second = checker.call(x, weight)[2], checker.call(x, weight)[2]
            checker.note(torch.equal(first, second), f"two calls differ {what}")
            x[M // 2, 5] = float("inf")
            finite = checker.call(x, weight)[2].isfinite()
            others = [m for m in range(M) if m != M // 2]
            alone = bool(finite[others].all()) and not bool(finite[M // 2].any())
            checker.note(alone, f"inf in one row of x {what}")
        # A chain: each product is the next one's x, and kernels overlap.
        links = [checker.weight(1024, 1024, 128, dtype, "none")[0] for _ in range(6)]
        for link in links:
            link["scale"].mul_(0.12)  # the last of 24 products is still of a size with the first
        for M in (1, 8, 16):
            start = torch.randn(M, 1024, generator=checker.generator).to(dtype).cuda()
            results = []
            for is_apart in (True, False):
                x, y = start.clone(), torch.empty_like(start)
                for link in links * 4:
                    checker.launch(x, link, y)
                    if is_apart:
                        torch.cuda.synchronize()
                    x, y = y, x
                torch.cuda.synchronize()
                results.append(x)
            same = torch.equal(results[0], results[1]) and bool(results[0].isfinite().all())
            checker.note(same, f"a chain without waits differs {dtype} M={M}")
        x = torch.randn(2, 1024, generator=checker.generator).to(dtype).cuda()
        y = torch.full_like(x, float("nan"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            checker.launch(x, links[0], y)
        x.mul_(0.5)  # the graph reads x anew
        graph.replay()
        want = checker.call(x, links[0])[2]
        checker.note(torch.equal(y, want), f"graph and eager differ {dtype}")
    empty = torch.empty(0, 1024, dtype=dtype, device="cuda")
    checker.note(checker.call(empty, links[0])[0] == 0, "no rows")
    weight, exact = checker.weight(5, 32, 32, torch.bfloat16, "float32")
    x = torch.randn(70001, 32, generator=checker.generator)
    checker.compare(x.cuda(), weight, exact, "M=70001, more rows than a grid has")


def main() -> int:
    """Build, check, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--library", type=Path, help="built there unless it is there already")
    parser.add_argument("--build", action="store_true", help="no more than that")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = options.library or Path(folder) / "libkernels.so"
        if not library.exists():
            build(library)
        if options.build:
            return 0
        if not torch.cuda.is_available():
            sys.exit(
                "check_cuda_linear: expected a CUDA GPU, torch sees none; run it where there is one"
            )
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
        checker = Checker(ctypes.CDLL(str(library.absolute())))
        if options.quick:
            check_shapes(checker, QUICK_SHAPES, DTYPES[:2], QUICK_ROWS)
        else:
            check_shapes(checker, SHAPES, DTYPES, ROWS)
            check_large(checker)
        check_special(checker)
        checker.check_refusals()
    print(f"{checker.n_right} right, {len(checker.failures)} wrong")
    return 1 if checker.failures else 0


if __name__ == "__main__":
    sys.exit(main())
