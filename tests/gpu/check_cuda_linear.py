"""Checks the CUDA kernel of cuda_int4::linear against float64, on a machine with a GPU.

    python tests/gpu/check_cuda_linear.py

Needs torch with CUDA, nvcc and g++; nothing else (no executorch). Builds backend/kernels into a
library in a temporary folder, runs every case and prints a line per group of cases and a summary;
the exit status is 0 if all are right. Inputs are signed and fresh for each case, every scale and
zero point differs, outputs start as NaN with NaN guards behind them, shapes are ragged, and one-hot
activations read single weights back.
"""

from __future__ import annotations

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

# One function of plain C, so that no runtime is needed around the kernels.
SHIM = """
#include "kernels/ops.h"
extern "C" __attribute__((visibility("default"))) int32_t check_linear(
    const cuda_int4::LinearArgs* args, int32_t device, void* stream, cuda_int4::Status* status) {
  cuda_int4::ExecutionContext context = {};
  context.device = static_cast<cuda_int4::DeviceKind>(device);
  context.stream = stream;
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
    (5, 1280, 256),
    (37, 1088, 0),
    (257, 4096, 32),
    (1023, 2048, 128),
)
ROWS = (1, 2, 7, 64)
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


def build(folder: Path) -> ctypes.CDLL:
    """Compile backend/kernels with g++ and nvcc, in parallel, and load the library."""
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
    library = folder / "libkernels.so"
    run_command([nvcc, "-shared", "-cudart", "static", "-o", str(library), *objects])
    return ctypes.CDLL(str(library))


class Checker:
    """Calls the kernel and counts what was right."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.native = load_native()
        self.n_right = 0
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

    def call(
        self, x: Tensor, weight: dict, *, y: Tensor | None = None, layout_tag: str = "coalesced.v1",
        activation: str = "none", device: int = 1,
    ) -> tuple[int, str, Tensor]:  # fmt: skip
        """Status code, message and y; y starts as NaN."""
        qdata, bias = weight["qdata"], weight.get("bias")
        if y is None:
            shape = (*x.shape[:-1], qdata.shape[0])
            y = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
        parts = (x, qdata, weight["scale"], weight["zero_point"], None, bias, y)
        views = [self.native.tensor_view(part) for part in parts]
        args = self.native.LinearArgs(
            *views,
            weight["group_size"],
            layout_tag.encode(),
            activation.encode(),
            b"checked.weight",
        )
        status = Status()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.library.check_linear(ctypes.byref(args), device, stream, ctypes.byref(status))
        torch.cuda.synchronize()
        return status.code, status.message.decode(), y

    def weight(
        self, N: int, K: int, group_size: int, scale_dtype: torch.dtype, zero: str
    ) -> tuple[dict, Tensor]:
        """A weight on the GPU, and the definition in float64 on the CPU."""
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
        return on_gpu, exact

    def compare(self, x: Tensor, weight: dict, exact: Tensor, what: str) -> None:
        """Error at most 1.2 times that of rounding the exact answer once, 1e-5 in float32."""
        N = exact.shape[0]
        guarded = torch.full((x.shape[0] * N + 64,), float("nan"), dtype=x.dtype, device="cuda")
        y = guarded[: x.shape[0] * N].view(x.shape[0], N)
        code, message, _ = self.call(x, weight, y=y)
        want = x.cpu().double() @ exact.double().T
        if weight.get("bias") is not None:
            want = want + weight["bias"].cpu().double()
        error = float((y.cpu().double() - want).norm() / want.norm())
        rounding = float((want.to(x.dtype).double() - want).norm() / want.norm())
        bound = 1e-5 if x.dtype == torch.float32 else 1.2 * rounding + 1e-9
        clean = bool(guarded[x.shape[0] * N :].isnan().all())
        what += f": error {error:.2e}, bound {bound:.2e}, guards clean {clean} {message}"
        self.note(code == 0 and clean and error <= bound, what)

    def check_one_hot(self, weight: dict, exact: Tensor, dtype: torch.dtype, what: str) -> None:
        """X = e_k gives column k of the weight, rounded once."""
        K = exact.shape[1]
        ks = sorted({0, 1, 7, 8, 31, K // 2, K - 2, K - 1})
        x = torch.zeros(len(ks), K, dtype=dtype)
        x[range(len(ks)), ks] = 1
        code, message, y = self.call(x.cuda(), weight)
        same = bool(torch.equal(y.cpu(), exact[:, ks].T.to(dtype)))
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


def run_all(checker: Checker) -> None:
    """Every shape x dtype x zero point, with bias on every second."""
    for N, K, group_size in SHAPES:
        before = len(checker.failures)
        for i, (dtype, scale_dtype, zero) in enumerate(
            itertools.product(DTYPES, DTYPES, ZERO_POINTS)
        ):
            what = f"N={N} K={K} group_size={group_size or K} {dtype} {scale_dtype} zero={zero}"
            weight, exact = checker.weight(N, K, group_size, scale_dtype, zero)
            checker.check_one_hot(weight, exact, dtype, what)
            if i % 2:
                weight["bias"] = torch.randn(N, generator=checker.generator).to(dtype).cuda()
            for M in ROWS:
                x = torch.randn(M, K, generator=checker.generator).to(dtype).cuda()
                checker.compare(x, weight, exact, f"M={M} {what}")
        verdict = "ok" if len(checker.failures) == before else "WRONG"
        print(f"N={N:5} K={K:5} group_size={group_size or K:5}  {verdict}", flush=True)
    weight, exact = checker.weight(5, 32, 32, torch.bfloat16, "float32")
    x = torch.randn(70001, 32, generator=checker.generator).bfloat16().cuda()
    checker.compare(x, weight, exact, "M=70001, more rows than a grid has")
    checker.check_refusals()


def time_matvec(checker: Checker) -> None:
    """One number to see that nothing is absurd; the benchmarks are elsewhere."""
    N, K = 11008, 4096
    weights = [checker.weight(N, K, 128, torch.bfloat16, "none")[0] for _ in range(8)]
    x = torch.randn(1, K).bfloat16().cuda()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls = 200
    for timed in (False, True):
        if timed:
            start.record()
        for i in range(calls):
            checker.call(x, weights[i % 8])
        if timed:
            end.record()
    torch.cuda.synchronize()
    microseconds = start.elapsed_time(end) * 1e3 / calls
    print(f"one matvec N={N} K={K} bf16, with its launch and wait: {microseconds:.0f} us")


def main() -> int:
    """Build, check, report."""
    if not torch.cuda.is_available():
        sys.exit(
            "check_cuda_linear: expected a CUDA GPU, torch sees none; run it where there is one"
        )
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        checker = Checker(build(Path(folder)))
        run_all(checker)
        time_matvec(checker)
    print(f"{checker.n_right} right, {len(checker.failures)} wrong")
    return 1 if checker.failures else 0


if __name__ == "__main__":
    sys.exit(main())
