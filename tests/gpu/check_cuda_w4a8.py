"""Checks the w4a8 kernels of cuda_int4::linear on CUDA against float64, on a machine with a GPU.

    python tests/gpu/check_cuda_w4a8.py           every case
    python tests/gpu/check_cuda_w4a8.py --quick   fewer rows and dtypes, for compute-sanitizer
    python tests/gpu/check_cuda_w4a8.py --ptx     the code for sm_80, compiled by the driver

    python tests/gpu/check_cuda_w4a8.py --library p.so   keep the library there, for the next run

Needs torch with CUDA, nvcc and g++; nothing else (no executorch). Builds backend/kernels into a
library, runs every case and prints a line per group of cases and a summary; the exit status is 0 if
all are right.

The quantised activation is compared bit by bit with its definition (quantized_activation.h), y with
the exact product of that activation and the weight: its error may be 1.2 times that of rounding the
exact answer once. Inputs are signed and fresh for each case, every scale and zero point differs,
outputs and scratch start as NaN with guards behind them, shapes are ragged, operands start at odd
elements, and one-hot activations read single weights back. Every call is made twice, launched as in
PyTorch and as in a .pte, and must give the same bits; the baseline mat-vec runs beside some.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import itertools
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from check_cuda_linear import BACKEND, ISA_FLAGS, Status, load_native, run_command
from torch import Tensor

# Functions of plain C, so that no runtime is needed around the kernels.
SHIM = """
#include "kernels/cuda/linear_w4a8.cuh"
#include "kernels/ops.h"
#define EXPORTED extern "C" __attribute__((visibility("default")))
static cuda_int4::ExecutionContext on_stream(void* stream) {
  cuda_int4::ExecutionContext context = {};
  context.device = cuda_int4::DeviceKind::kCuda;
  context.stream = stream;
  return context;
}
EXPORTED uint64_t check_scratch_bytes(const cuda_int4::LinearArgs* args) {
  return cuda_int4::linear_scratch_bytes(*args, cuda_int4::DeviceKind::kCuda);
}
EXPORTED uint64_t check_quantized_bytes(int64_t M, int64_t K) {
  return cuda_int4::quantized_activation_bytes(M, K);
}
EXPORTED int32_t check_quantize(const cuda_int4::TensorView* x, void* to, void* stream,
                                cuda_int4::Status* status) {
  *status = cuda_int4::quantize_activation(*x, to, on_stream(stream));
  return static_cast<int32_t>(status->code);
}
EXPORTED int32_t check_linear(const cuda_int4::LinearArgs* args, const void* quantized_x,
                              int32_t constant_weights, int32_t baseline, void* stream,
                              void* scratch, uint64_t scratch_bytes, cuda_int4::Status* status) {
  cuda_int4::ExecutionContext context = on_stream(stream);
  context.scratch = scratch;
  context.scratch_bytes = scratch_bytes;
  context.quantized_x = quantized_x;
  context.constant_weights = constant_weights != 0;
  *status = baseline != 0 ? cuda_int4::linear_coalesced_w4a8_baseline(*args, context)
                          : cuda_int4::linear(*args, context);
  return static_cast<int32_t>(status->code);
}
"""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ZERO_POINTS = ("none", "scale_dtype", "float32")
# N, K, group_size (0 is one group per row) and whether every combination of dtypes is tried.
SHAPES = (
    (1, 32, 32, True),
    (3, 96, 32, True),
    (7, 64, 64, True),
    (13, 1088, 32, True),
    (17, 1088, 64, True),
    (66, 384, 128, True),
    (5, 1280, 256, True),
    (37, 1088, 0, True),
    (130, 544, 32, True),
    (257, 4096, 32, True),
    (1023, 2048, 128, False),
    (515, 4096, 64, False),
    (300, 5376, 32, False),
    (129, 5376, 128, False),
    (77, 14336, 32, False),
    (160, 14336, 256, False),
    (40, 28672, 128, False),
    (48, 21504, 32, False),
    (4096, 4096, 32, False),
    (1100, 4096, 128, True),
    (18, 2048, 64, False),
    (4700, 5376, 64, False),
    (700, 8192, 128, False),
    (290, 14336, 128, False),
    (34, 16384, 32, False),
    (2120, 28672, 128, False),
)
ROWS = (*range(1, 18), 33, 64, 200)
FEW_ROWS = (1, 2, 3, 8, 11, 16, 70)
GUARD = 256
MAX_PRINTED = 40
NAME = "checked.weight"


def build(library: Path, gpu_code: str) -> None:
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
            commands.append([nvcc, f"-gencode={gpu_code}", "-Xcompiler", "-fPIC", *common])
        else:
            isa = path.stem[path.stem.rfind("_") :]
            commands.append(["g++", "-fPIC", "-Wall", *ISA_FLAGS.get(isa, []), *common])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run_command, commands))
    run_command([nvcc, "-shared", "-cudart", "static", "-o", str(library), *objects, "-ldl"])


def guarded(nbytes: int) -> Tensor:
    """Bytes on the GPU, all 0xff (NaN in every float dtype), and a guard of the same behind."""
    return torch.full((nbytes + GUARD,), 0xFF, dtype=torch.uint8, device="cuda")


def at_odd_element(tensor: Tensor) -> Tensor:
    """The same values, starting one element into an allocation."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: a as float [M, K/32, 32] and s_x [M, K/32, 1]."""
    groups = x.float().unflatten(1, (-1, 32))
    largest = groups.abs().amax(2, keepdim=True)
    s_x = largest / torch.full_like(largest, 127)  # by a tensor: by a number torch multiplies
    s_x = torch.where(groups.isfinite().all(2, keepdim=True), s_x, float("nan"))
    a = torch.where(s_x > 0, (groups / s_x).clamp(-127, 127).round(), 0.0)
    return a, s_x


def stored_form(a: Tensor, s_x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What quantized_activation.h says is in memory: codes, s_x and sums."""
    M = a.shape[0]
    rows = a.flatten(1)
    codes = torch.stack((rows[:, ::2], rows[:, 1::2]), 1).to(torch.int8)
    n_tokens = M if M <= 2 else (M + 7) // 8 * 8
    scales, sums = (torch.zeros(a.shape[1], n_tokens, device=a.device) for _ in range(2))
    scales[:, :M] = s_x[:, :, 0].T
    sums[:, :M] = a.sum(2).T
    return codes, scales, sums.int()


class Checker:
    """Calls the kernels and counts what was right."""

    def __init__(self, library: ctypes.CDLL, native: ModuleType) -> None:
        self.library = library
        self.native = native
        library.check_scratch_bytes.restype = ctypes.c_uint64
        library.check_quantized_bytes.restype = ctypes.c_uint64
        library.check_quantized_bytes.argtypes = [ctypes.c_int64, ctypes.c_int64]
        self.n_right = 0
        self.n_cases = 0
        self.failures: list[str] = []
        self.generator = torch.Generator("cuda").manual_seed(1)

    def note(self, right: bool, what: str) -> None:
        """Count one check; print what failed."""
        if right:
            self.n_right += 1
        else:
            self.failures.append(what)
            if len(self.failures) <= MAX_PRINTED:
                print("WRONG", what)

    def random(self, *shape: int) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device="cuda")

    def stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def quantize(self, x: Tensor, what: str) -> Tensor:
        """quantize_activation of x, checked bit by bit."""
        M, K = x.shape
        nbytes = self.library.check_quantized_bytes(M, K)
        memory = guarded(nbytes)
        status = Status()
        view = self.native.tensor_view(x)
        self.library.check_quantize(
            ctypes.byref(view), ctypes.c_void_p(memory.data_ptr()), self.stream(),
            ctypes.byref(status),
        )  # fmt: skip
        codes, scales, sums = stored_form(*quantized(x))
        parameters = memory[M * K : nbytes].view(torch.int32).view(K // 32, -1, 2)
        same = (
            parameters.shape[1] == scales.shape[1]
            and torch.equal(memory[: M * K].view(torch.int8).view(M, 2, K // 2), codes)
            and torch.equal(parameters[:, :, 1], sums)
            and bool(torch.isclose(
                parameters[:, :, 0].contiguous().view(torch.float32), scales,
                rtol=0, atol=0, equal_nan=True,
            ).all())
        )  # fmt: skip
        clean = bool((memory[nbytes:] == 0xFF).all())
        self.note(
            status.code == 0 and same and clean,
            f"quantize {what}: same {same}, guard clean {clean} {status.message.decode()}",
        )
        return memory

    def linear_args(self, x: Tensor, weight: dict, y: Tensor) -> ctypes.Structure:
        """The arguments of one call."""
        parts = (x, weight["qdata"], weight["scale"], weight["zero_point"], None, weight["bias"], y)
        return self.native.LinearArgs(
            *(self.native.tensor_view(part) for part in parts),
            weight["group_size"],
            b"coalesced.v1",
            b"int8",
            NAME.encode(),
        )

    def linear(
        self,
        x: Tensor,
        weight: dict,
        quantized_x: Tensor | None,
        odd: bool,
        constant_weights: bool = False,
        baseline: bool = False,
    ) -> tuple[int, str, Tensor, bool]:
        """Status code, message, y (NaN at first) and whether the guards stayed clean.

        With `constant_weights` the kernel is launched as in a .pte: it may start, and read weights,
        before the one that quantises x has ended. `baseline`: of matvec_w4a8_coalesced, which needs
        `quantized_x`.
        """
        N, M = weight["qdata"].shape[0], x.shape[0]
        y_bytes = M * N * x.element_size()
        skip = x.element_size() if odd else 0
        y_memory = guarded(y_bytes + skip)
        y = y_memory[skip : skip + y_bytes].view(x.dtype).view(M, N)
        args = self.linear_args(x, weight, y)
        nbytes = self.library.check_scratch_bytes(ctypes.byref(args))
        scratch = guarded(nbytes)
        status = Status()
        self.library.check_linear(
            ctypes.byref(args),
            ctypes.c_void_p(0 if quantized_x is None else quantized_x.data_ptr()),
            constant_weights,
            baseline,
            self.stream(),
            ctypes.c_void_p(scratch.data_ptr()),
            ctypes.c_uint64(nbytes),
            ctypes.byref(status),
        )
        torch.cuda.synchronize()
        clean = bool(
            (scratch[nbytes:] == 0xFF).all() and (y_memory[skip + y_bytes :] == 0xFF).all()
        )
        clean = clean and bool((y_memory[:skip] == 0xFF).all())
        return status.code, status.message.decode(), y, clean

    def weight(
        self, N: int, K: int, group_size: int, scale_dtype: torch.dtype, zero: str
    ) -> tuple[dict, Tensor]:
        """A weight on the GPU, and its definition in float64."""
        group_size = group_size or K
        codes = torch.randint(0, 16, (N, K), generator=self.generator, device="cuda").byte()
        shape = (N, K // group_size)
        scale = (self.random(*shape) * 0.03 + 0.002).to(scale_dtype)
        zero_point = None
        if zero == "scale_dtype":
            zero_point = (self.random(*shape) * 24 - 4).to(scale_dtype)
        elif zero == "float32":
            zero_point = self.random(*shape) * 80 - 40.5
        z = torch.full(shape, 8.0, device="cuda") if zero_point is None else zero_point
        centred = codes.double() - z.double().repeat_interleave(group_size, 1)
        exact = centred * scale.double().repeat_interleave(group_size, 1)
        weight = {
            "qdata": codes[:, ::2] | (codes[:, 1::2] << 4),
            "scale": scale,
            "zero_point": zero_point,
            "bias": None,
            "group_size": group_size,
        }
        return weight, exact

    def compare(self, x: Tensor, weight: dict, exact: Tensor, what: str, share: bool) -> None:
        """One call against float64; with `share`, of an x that was quantised before."""
        self.n_cases += 1
        odd = self.n_cases % 3 == 0
        if odd:
            x = at_odd_element(x)
            weight = dict(weight)
            for part in ("scale", "zero_point", "bias"):
                if weight[part] is not None:
                    weight[part] = at_odd_element(weight[part])
        what = f"M={x.shape[0]} {what} bias={weight['bias'] is not None} shared={share} odd={odd}"
        quantized_x = self.quantize(x, what) if share else None
        code, message, y, clean = self.linear(x, weight, quantized_x, odd)
        a, s_x = quantized(x)
        want = (a.double() * s_x.double()).flatten(1) @ exact.T
        if weight["bias"] is not None:
            want = want + weight["bias"].double()
        error = float((y.double() - want).norm() / want.norm())
        rounding = float((want.to(x.dtype).double() - want).norm() / want.norm())
        bound = 1e-5 if x.dtype == torch.float32 else 1.2 * rounding + 1e-9
        again = self.linear(x, weight, quantized_x, odd, constant_weights=True)[2]
        same = torch.equal(y.view(torch.uint8), again.view(torch.uint8))
        self.note(
            code == 0 and clean and same and error <= bound,
            f"{what}: error {error:.2e}, bound {bound:.2e}, guards clean {clean}, "
            f"twice the same {same} {message}",
        )
        if quantized_x is None or self.n_cases % 4 > 0:
            return
        code, message, y, clean = self.linear(x, weight, quantized_x, odd, baseline=True)
        error = float((y.double() - want.double()).norm() / want.norm())
        self.note(
            code == 0 and clean and error <= bound,
            f"{what}: the baseline: error {error:.2e}, bound {bound:.2e}, guards clean {clean} "
            f"{message}",
        )

    def check_one_hot(
        self, weight: dict, exact: Tensor, dtype: torch.dtype, M: int, what: str
    ) -> None:
        """X of one 127, that is s_x = 1, gives 127 times column k of the weight."""
        K = exact.shape[1]
        ks = [0, 1, 7, 8, 31, K // 2, K - 2, K - 1]
        ks = [ks[i % 8] for i in range(M)]
        x = torch.zeros(M, K, dtype=dtype, device="cuda")
        x[range(M), ks] = 127
        code, message, y, clean = self.linear(x, weight, None, False)
        want = (127 * exact[:, ks].T).to(dtype)
        close = bool(((y.double() - want.double()).abs() <= 2**-7 * want.double().abs()).all())
        exact_scale = weight["scale"].dtype != torch.float32 and weight["zero_point"] is None
        same = torch.equal(y, want) if exact_scale else close
        self.note(
            code == 0 and clean and same,
            f"M={M} {what}: one-hot reads back another weight {message}",
        )

    def check_chain(self, N: int, K: int, M: int) -> None:
        """Calls behind each other, x quantised to one place: none reads what was there before.

        Kernels start while those ahead of them run, so a first-level cache may hold an older x.
        """
        weight, _ = self.weight(N, K, 128, torch.bfloat16, "none")
        xs = [(self.random(M, K) * 2 - 1).bfloat16() for _ in range(24)]
        want = [self.linear(x, weight, None, False)[2] for x in xs]
        got = [torch.full_like(y, float("nan")) for y in want]
        memory = guarded(self.library.check_quantized_bytes(M, K))
        views = [self.native.tensor_view(x) for x in xs]
        calls = [self.linear_args(x, weight, y) for x, y in zip(xs, got, strict=True)]
        nbytes = self.library.check_scratch_bytes(ctypes.byref(calls[0]))
        scratch, status = guarded(nbytes), Status()
        torch.cuda.synchronize()
        for view, args in zip(views, calls, strict=True):
            self.library.check_quantize(
                ctypes.byref(view), ctypes.c_void_p(memory.data_ptr()), self.stream(),
                ctypes.byref(status),
            )  # fmt: skip
            self.library.check_linear(
                ctypes.byref(args), ctypes.c_void_p(memory.data_ptr()), 1, 0, self.stream(),
                ctypes.c_void_p(scratch.data_ptr()), ctypes.c_uint64(nbytes), ctypes.byref(status),
            )  # fmt: skip
        torch.cuda.synchronize()
        n_same = sum(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        what = f"M={M} N={N} K={K}: {n_same} of {len(xs)} calls of a chain are as single ones"
        self.note(n_same == len(xs), f"{what} {status.message.decode()}")

    def check_not_finite(self, M: int, what: str) -> None:
        """A row of x that is not finite gives NaN in its row of y and nowhere else."""
        weight, _ = self.weight(70, 384, 32, torch.bfloat16, "none")
        x = self.random(M, 384).bfloat16() - 0.5
        x[0, 5] = float("inf")
        x[M - 1, 383] = float("nan")
        x[M // 2, 32:64] = 0
        self.quantize(x, what)
        code, message, y, clean = self.linear(x, weight, None, False)
        bad = torch.zeros(M, dtype=torch.bool, device="cuda")
        bad[[0, M - 1]] = True
        right = bool(y[bad].isnan().all()) and bool(y[~bad].isfinite().all())
        self.note(code == 0 and clean and right, f"M={M}: not finite x {message}")

    def check_quantize(self) -> None:
        """Values at the edges: ties, subnormal, huge, zero, one row more than a grid has."""
        for dtype in DTYPES:
            x = (self.random(5, 4096) - 0.5).to(dtype)
            x[1] *= 1e-4
            x[2] = 0
            x[3, ::32] = torch.finfo(dtype).max
            x[4] = torch.arange(4096, device="cuda").remainder(255).sub(127).div(2).to(dtype)
            x[4, ::32] = 127  # s_x = 1: halves are ties
            self.quantize(x, f"edges {dtype}")
            self.quantize(at_odd_element(x), f"edges {dtype} at an odd element")
        tiny = torch.full((1, 64), 1e-43, device="cuda")
        tiny[0, 32:] = torch.finfo(torch.float32).smallest_normal
        self.quantize(tiny, "subnormal")
        self.quantize(self.random(70001, 32) - 0.5, "70001 rows")


def run_shapes(checker: Checker, quick: bool) -> None:
    """Every shape x dtypes x zero point x rows, with bias and shared x on every second."""
    for N, K, group_size, full in SHAPES:
        before = len(checker.failures)
        combinations = list(itertools.product(DTYPES, DTYPES, ZERO_POINTS))
        if quick or not full:
            combinations = combinations[N % 5 :: 5]
        for i, (dtype, scale_dtype, zero) in enumerate(combinations):
            what = f"N={N} K={K} group_size={group_size or K} {dtype} {scale_dtype} zero={zero}"
            weight, exact = checker.weight(N, K, group_size, scale_dtype, zero)
            for M in (1, 2, 8) if quick else (1, 2, 5, 8, 16, 24):
                checker.check_one_hot(weight, exact, dtype, M, what)
            for j, M in enumerate(FEW_ROWS if quick else ROWS):
                has_bias = (i + j) % 2 == 1
                weight["bias"] = (checker.random(N) * 4 - 2).to(dtype) if has_bias else None
                x = (checker.random(M, K) * 2 - 1).to(dtype)
                checker.compare(x, weight, exact, what, share=(i + j) % 4 > 1)
        verdict = "ok" if len(checker.failures) == before else "WRONG"
        print(f"N={N:5} K={K:5} group_size={group_size or K:5}  {verdict}", flush=True)


def main() -> int:
    """Build, check, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rows and dtypes")
    parser.add_argument("--ptx", action="store_true", help="run the code for sm_80")
    parser.add_argument("--library", type=Path, help="kept there; built if it does not exist")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("check_cuda_w4a8: expected a CUDA GPU, torch sees none; run it where there is one")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        library = (options.library or Path(folder) / "libkernels.so").resolve()
        if not library.exists():
            code = ("compute_80", "compute_80") if options.ptx else ("compute_90a", "sm_90a")
            build(library, "arch={},code={}".format(*code))
        checker = Checker(ctypes.CDLL(str(library)), load_native())
        checker.check_quantize()
        for M in (3, 8, 16, 40):
            checker.check_not_finite(M, "not finite")
        for M in (1, 2, 3, 8, 16, 40):
            for N, K in ((4096, 4096), (1000, 4096), (4096, 14336)):
                checker.check_chain(N, K, M)
        run_shapes(checker, options.quick)
        weight, exact = checker.weight(5, 32, 32, torch.bfloat16, "float32")
        x = (checker.random(70001, 32) - 0.5).bfloat16()
        checker.compare(x, weight, exact, "more rows than a grid has", share=False)
    print(f"{checker.n_right} right, {len(checker.failures)} wrong")
    return 1 if checker.failures else 0


if __name__ == "__main__":
    sys.exit(main())
