"""Checks the CUDA kernels of cuda_int4::attention against float64, on a machine with a GPU.

    python tests/gpu/check_cuda_attention.py           every case
    python tests/gpu/check_cuda_attention.py --quick   small ones, for compute-sanitizer
    python tests/gpu/check_cuda_attention.py --ptx     the code for sm_80, compiled by the driver
    python tests/gpu/check_cuda_attention.py --time    also times, beside torch's attention

Needs torch with CUDA, nvcc and g++; nothing else (no executorch). Builds backend/kernels into a
library in a temporary folder, runs every case and prints a line per group of cases and a summary;
the exit status is 0 if all are right. Inputs are signed and fresh for each case, y lies between
guards and starts as NaN, scratch starts as NaN and has a guard, keys and values that no query may
see are NaN. The error may be twice that of torch's attention in the same dtype.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import ctypes
import importlib.util
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as torch_attention

BACKEND = Path(__file__).resolve().parents[2] / "backend"

# Suffix of a file -> what may be compiled in (kernels/README.md).
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
ISA_FLAGS = {"_avx2": AVX2, "_avx512": AVX512, "_avx512bf16": [*AVX512, "-mavx512bf16"]}

# Two functions of plain C, so that no runtime is needed around the kernels.
SHIM = """
#include "kernels/ops.h"
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED uint64_t check_scratch_bytes(const cuda_int4::AttentionArgs* args) {
  return cuda_int4::attention_scratch_bytes(*args, cuda_int4::DeviceKind::kCuda);
}
EXPORTED int32_t check_attention(const cuda_int4::AttentionArgs* args, void* stream, void* scratch,
                                 uint64_t scratch_bytes, cuda_int4::Status* status) {
  cuda_int4::ExecutionContext context = {};
  context.device = cuda_int4::DeviceKind::kCuda;
  context.stream = stream;
  context.scratch = scratch;
  context.scratch_bytes = scratch_bytes;
  *status = cuda_int4::attention(*args, context);
  return static_cast<int32_t>(status->code);
}
"""

HALF_DTYPES = (torch.float16, torch.bfloat16)
DTYPES = (*HALF_DTYPES, torch.float32)
MASKS = ("none", "bool", "float")
# Which of [B, Hq, S, T] a mask has; the others broadcast. "ST" is a mask of two dimensions.
MASK_SHAPES = ("ST", "BHST", "BST", "HST", "BT", "T", "S", "1ST")
PATTERNS = ("prefix", "window", "random", "nothing", "blocks")
LAYOUTS = ("dense", "interleaved", "padded", "unaligned")
GUARD_ELEMS = 256
NAN_BYTE = 0xFF  # all bits set is NaN in every float dtype
MAX_PRINTED = 40
N_REPLAYS, N_CALLS = 15, 3  # of a graph; of a prompt in it
UNSUPPORTED = 3


class Status(ctypes.Structure):
    """kernels/tensor_view.h Status."""

    _fields_ = [("code", ctypes.c_int32), ("message", ctypes.c_char * 1020)]


@dataclass(frozen=True)
class Case:
    """One call: sizes, mask, and how operands lie in memory."""

    B: int
    Hq: int
    Hkv: int
    S: int
    T: int
    D: int
    dtype: torch.dtype = torch.bfloat16
    mask: str = "none"
    mask_shape: str = "ST"
    pattern: str = "prefix"
    is_causal: bool = False
    layout: str = "dense"
    scale: float | None = None
    softcap: float = 0.0
    positions: str = ""  # shape of input_pos, "S" or "BS"; "": none
    pos_dtype: torch.dtype = torch.int64
    window: int = 0
    merge_heads: bool = False
    int8: bool = False  # keys and values


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


def build(library: Path, gpu_code: str) -> None:
    """Compile backend/kernels with g++ and nvcc, in parallel."""
    folder = library.parent
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


class Kernel:
    """The op on CUDA tensors, through the entry points that the runtime calls."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.library.check_scratch_bytes.restype = ctypes.c_uint64
        self.native = load_native()

    def args(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, y: Tensor, scale: float,
        is_causal: bool = False, softcap: float = 0.0, input_pos: Tensor | None = None,
        window: int = 0, merge_heads: bool = False, scales: tuple = (None, None),
    ) -> ctypes.Structure:  # fmt: skip
        """AttentionArgs; k and v may be views of one cache."""
        views = [self.native.tensor_view(part) for part in (q, k, v, mask, input_pos, *scales, y)]
        return self.native.AttentionArgs(*views, scale, is_causal, softcap, window, merge_heads)

    def scratch_bytes(self, args: ctypes.Structure) -> int:
        """What the op asks for."""
        return self.library.check_scratch_bytes(ctypes.byref(args))

    def __call__(self, args: ctypes.Structure, scratch: Tensor) -> tuple[int, str]:
        """Status code and message; asynchronous."""
        status = Status()
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.library.check_attention(
            ctypes.byref(args),
            stream,
            ctypes.c_void_p(scratch.data_ptr()),
            ctypes.c_uint64(scratch.numel()),
            ctypes.byref(status),
        )
        return status.code, status.message.decode()


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """Random values [B, H, L, D] with the strides that the layout names."""
    B, H, L, D = shape
    if layout == "interleaved":  # heads of a position side by side, as a projection writes them
        return torch.randn(B, L, H, D, device="cuda").to(dtype).transpose(1, 2)
    if layout == "padded":  # a slice of longer rows
        return torch.randn(B, H, L + 3, D + 8, device="cuda").to(dtype)[:, :, 1 : L + 1, :D]
    if layout == "unaligned":
        flat = torch.randn(B * H * L * (D + 1) + 1, device="cuda").to(dtype)
        return flat[1:].view(B, H, L, D + 1)[..., :D]
    return torch.randn(shape, device="cuda").to(dtype)


def make_mask(case: Case, generator: random.Random) -> Tensor | None:
    """A bool or additive mask of the case's shape and pattern."""
    if case.mask == "none":
        return None
    names = case.mask_shape.removeprefix("1")
    sizes = {"B": case.B, "H": case.Hq, "S": case.S, "T": case.T}
    shape = [sizes[name] if name in names else 1 for name in "BHST"]
    rows = torch.arange(shape[2], device="cuda")[:, None]
    keys = torch.arange(shape[-1], device="cuda")
    last = generator.randrange(case.T) if case.T > 1 else 0
    full = torch.zeros(shape, dtype=torch.bool, device="cuda")
    if case.pattern == "prefix":
        full |= keys <= last + rows
    elif case.pattern == "window":
        full |= (keys <= last + rows) & (keys > last + rows - max(1, case.T // 3))
    elif case.pattern == "random":
        full |= torch.rand(shape, device="cuda") < 0.5
    elif case.pattern == "blocks":
        full |= (keys // 64 + rows // 64) % 2 == 0
    if case.pattern != "nothing" and shape[-1] == case.T and generator.random() < 0.5:
        full[..., :1, :] = False  # a row that sees nothing among rows that do
    if case.mask_shape in ("ST", "T"):  # fewer dimensions
        full = full.view(shape[4 - len(case.mask_shape) :])
    if case.mask == "bool":
        return full
    values = torch.randn(full.shape, device="cuda") * 2
    low = generator.choice((float("-inf"), -1e4))
    return values.masked_fill(~full, low).to(case.dtype)


def make_positions(case: Case, generator: random.Random) -> Tensor | None:
    """Positions of the case's shape: one after the other, from anywhere, the last ones repeated."""
    if not case.positions:
        return None
    rows = []
    for _ in range(case.B if case.positions == "BS" else 1):
        first = generator.randrange(max(1, case.T - case.S + 1))
        n = generator.randint(1, case.S) if case.positions == "BS" else case.S
        row = [min(first + s, case.T - 1) for s in range(n)]
        rows.append(row + [row[-1]] * (case.S - n))
    if generator.random() < 0.2:  # sees nothing, or everything
        rows[0][0] = generator.choice((-1, case.T + 5))
    input_pos = torch.tensor(rows, dtype=case.pos_dtype, device="cuda")
    return input_pos if case.positions == "BS" else input_pos[0]


def seen_by_position(case: Case, input_pos: Tensor) -> Tensor:
    """Which keys a query sees, [1 or B, 1, S, T]."""
    pos = input_pos.view(-1, 1, case.S, 1)
    keys = torch.arange(case.T, device="cuda")
    seen = keys <= pos
    return seen & (keys > pos - case.window) if case.window else seen


def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 like x, and the scale of each row."""
    scale = x.float().abs().amax(-1) / 127
    codes = torch.empty_like(x, dtype=torch.int8)
    codes.copy_((x.float() / scale.unsqueeze(-1)).round())
    return codes, scale.contiguous()


def capped(scores: Tensor, softcap: float) -> Tensor:
    """Scores of a model with a soft cap, or as they were."""
    return softcap * torch.tanh(scores / softcap) if softcap else scores


@dataclass(frozen=True)
class Operands:
    """What one call reads."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    input_pos: Tensor | None
    scales: tuple[Tensor | None, Tensor | None]  # with int8 keys and values
    scale: float

    def values(self) -> list[Tensor]:
        """Keys and values in float64, those that are NaN as 0."""
        return [
            (
                x.double() if scale is None else x.double() * scale.double().unsqueeze(-1)
            ).nan_to_num()
            for x, scale in zip((self.k, self.v), self.scales, strict=True)
        ]


def exact_attention(case: Case, given: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """The answer in float64, which (b, h, s, t) are seen, and the mask as torch takes it."""
    shape = (case.B, case.Hq, case.S, case.T)
    rep = case.Hq // case.Hkv
    mask = given.mask
    seen = torch.ones(shape, dtype=torch.bool, device="cuda")
    added = torch.zeros(shape, dtype=torch.float64, device="cuda")
    if case.is_causal:
        seen &= torch.ones(case.S, case.T, dtype=torch.bool, device="cuda").tril()
    if given.input_pos is not None:
        seen &= seen_by_position(case, given.input_pos)
    if mask is not None and mask.dtype == torch.bool:
        seen &= mask
    elif mask is not None:
        added += mask.double()
        seen &= mask != float("-inf")
    added.masked_fill_(~seen, float("-inf"))
    k, v = (x.repeat_interleave(rep, 1) for x in given.values())
    scores = capped(given.q.double() @ k.transpose(-1, -2) * given.scale, case.softcap)
    y = torch.softmax(scores + added, -1).nan_to_num() @ v
    return y, seen, added.to(case.dtype)


class Checker:
    """Runs cases and counts what was right."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.n_right = 0
        self.failures: list[str] = []
        self.worst = 0.0
        self.generator = random.Random(1)

    def note(self, right: bool, what: str) -> None:
        """Count one check; print what failed."""
        if right:
            self.n_right += 1
        else:
            self.failures.append(what)
            if len(self.failures) <= MAX_PRINTED:
                print("WRONG", what, flush=True)

    def operands(self, case: Case) -> Operands:
        """Fresh ones."""
        shapes = [(case.B, case.Hq, case.S, case.D), *[(case.B, case.Hkv, case.T, case.D)] * 2]
        q, k, v = (laid_out(shape, case.layout, case.dtype) for shape in shapes)
        scale = case.D**-0.5 if case.scale is None else case.scale
        mask = make_mask(case, self.generator)
        input_pos = make_positions(case, self.generator)
        if not case.int8:
            return Operands(q, k, v, mask, input_pos, (None, None), scale)
        (k, k_scale), (v, v_scale) = quantized(k), quantized(v)
        return Operands(q, k, v, mask, input_pos, (k_scale, v_scale), scale)

    def args(self, case: Case, given: Operands, y: Tensor) -> ctypes.Structure:
        """The arguments of the op; y [B, Hq, S, D] or, in memory the same count, merged."""
        if case.merge_heads:
            y = y.view(case.B, case.S, case.Hq * case.D)
        return self.kernel.args(
            given.q, given.k, given.v, given.mask, y, given.scale, case.is_causal, case.softcap,
            given.input_pos, case.window, case.merge_heads, given.scales,
        )  # fmt: skip

    def check(self, case: Case) -> None:
        """One call, twice: right, inside its bounds, and the same bits again."""
        given = self.operands(case)
        exact, seen, added = exact_attention(case, given)
        by_torch = self.by_torch(case, given, added)
        # What no query of a key head sees is NaN from here on.
        n_rows = case.Hq // case.Hkv * case.S
        unseen = ~seen.view(case.B, case.Hkv, n_rows, case.T).any(2)
        if case.positions:  # keys between the first and the last that are seen may be read
            unseen = (
                unseen.cummin(-1).values | unseen.flip(-1).cummin(-1).values.flip(-1)
            ) & unseen
        for poisoned in given.scales if case.int8 else (given.k, given.v):
            poisoned[unseen] = float("nan")

        n = exact.numel()
        guarded = torch.full((n + 2 * GUARD_ELEMS,), float("nan"), dtype=case.dtype, device="cuda")
        memory = guarded[GUARD_ELEMS : GUARD_ELEMS + n]
        args = self.args(case, given, memory.view(exact.shape))
        n_scratch = self.kernel.scratch_bytes(args)
        results = []
        for _ in range(2):
            guarded.fill_(float("nan"))
            scratch = torch.full((n_scratch + 64,), NAN_BYTE, dtype=torch.uint8, device="cuda")
            code, message = self.kernel(args, scratch[:n_scratch])
            results.append(memory.clone())
            clean = bool((scratch[n_scratch:] == NAN_BYTE).all())
            clean &= bool(guarded[:GUARD_ELEMS].isnan().all())
            clean &= bool(guarded[GUARD_ELEMS + n :].isnan().all())
            self.note(code == 0 and clean, f"{case}: code {code}, guards clean {clean} {message}")
        self.note(torch.equal(*results), f"{case}: two calls differ")

        y = memory.view(exact.shape)
        if case.merge_heads:
            y = memory.view(case.B, case.S, case.Hq, case.D).transpose(1, 2)
        rows = seen.any(-1)
        self.note(bool((y[~rows] == 0).all()), f"{case}: a row that sees nothing is not 0")
        if not bool(rows.any()):
            return
        want = exact[rows]
        error = float((y[rows].double() - want).norm() / want.norm())
        torch_error = float((by_torch[rows].double() - want).norm() / want.norm())
        bound = 2 * torch_error + (1e-6 if case.dtype == torch.float32 else 1e-9)
        self.worst = max(self.worst, error / bound * 2)
        self.note(error <= bound, f"{case}: error {error:.2e}, torch's {torch_error:.2e}")

    @staticmethod
    def by_torch(case: Case, given: Operands, added: Tensor) -> Tensor:
        """What torch makes of it in the dtype of the case."""
        rep, scale = case.Hq // case.Hkv, given.scale
        # Dense copies: some of torch's kernels expect q to be aligned, and do not look.
        q = given.q.clone(memory_format=torch.contiguous_format)
        k, v = (x.to(case.dtype).repeat_interleave(rep, 1) for x in given.values())
        if case.softcap:  # torch has no such kernel: its ops, with float32 between them
            scores = capped(q.float() @ k.float().transpose(-1, -2) * scale, case.softcap)
            p = torch.softmax(scores + added.float(), -1)
            return p.to(case.dtype) @ v
        needed = case.mask != "none" or case.is_causal or case.positions
        call = partial(torch_attention, q, k, v, added if needed else None, scale=scale)
        try:
            return call()
        except RuntimeError:  # no fast kernel for this head size
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return call()

    def check_refusals(self) -> None:
        """What CUDA does not do is refused before anything is written."""
        q, k = (torch.randn(1, 1, n, 520, device="cuda") for n in (2, 3))
        y = torch.full_like(q, float("nan"))
        scratch = torch.empty(0, dtype=torch.uint8, device="cuda")
        code, message = self.kernel(self.kernel.args(q, k, k, None, y, 1.0), scratch)
        right = code == UNSUPPORTED and "520" in message and bool(y.isnan().all())
        self.note(right, f"refusal of D=520: code {code}, {message}")

    def check_graph(self, dtype: torch.dtype, positions: str = "", int8: bool = False) -> None:
        """One captured call follows a mask, or positions, that grow: the step of a decoder."""
        B, Hq, Hkv, T, D = (2 if positions == "BS" else 1), 8, 2, 2640, 128
        q = torch.randn(B, Hq, 1, D, device="cuda").to(dtype)
        k, v = torch.full((2, B, Hkv, T, D), float("nan"), dtype=dtype, device="cuda")
        mask = torch.zeros(1, T, dtype=torch.bool, device="cuda")
        y = torch.empty_like(q)
        case = Case(B, Hq, Hkv, 1, T, D, dtype, positions=positions, int8=int8)
        given = Operands(q, k, v, mask, None, (None, None), D**-0.5)
        if positions:
            shape = (B, 1) if positions == "BS" else (1,)
            input_pos = torch.zeros(shape, dtype=torch.int64, device="cuda")
            given = replace(given, mask=None, input_pos=input_pos)
        if int8:
            k, v = torch.zeros((2, B, Hkv, T, D), dtype=torch.int8, device="cuda")
            k_scale, v_scale = torch.full((2, B, Hkv, T), float("nan"), device="cuda")
            given = replace(given, k=k, v=v, scales=(k_scale, v_scale))
        args = self.args(case, given, y)
        scratch = torch.empty(self.kernel.scratch_bytes(args), dtype=torch.uint8, device="cuda")
        self.kernel(args, scratch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.kernel(args, scratch)
        for position in (0, 1, 15, 16, 63, 64, 200, 255, 256, 1023, T - 1, 700):
            for x in (given.k, given.v):
                seen = x[:, :, : position + 1]
                if int8:
                    seen.copy_(torch.randint(-127, 128, seen.shape, device="cuda"))
                else:
                    seen.normal_()
            if int8:
                k_scale[:, :, : position + 1].uniform_(0.001, 0.02)
                v_scale[:, :, : position + 1].uniform_(0.001, 0.02)
            q.normal_()
            mask[:, : position + 1] = True
            if given.input_pos is not None:
                given.input_pos.fill_(position)
                if positions == "BS":
                    given.input_pos[1] = position // 2
            graph.replay()
            exact, *_ = exact_attention(replace(case, mask="none" if positions else "bool"), given)
            error = float((y.double() - exact).norm() / exact.norm())
            right = error < (1e-5 if dtype == torch.float32 else 1e-2)
            self.note(right, f"graph {case} at {position}: error {error:.2e}")

    def check_replays(self, case: Case) -> None:
        """One captured call gives the same bits in every replay, whatever stood in its memory."""
        given = self.operands(case)
        y = torch.empty(given.q.shape, dtype=case.dtype, device="cuda")
        args = self.args(case, given, y)
        n_scratch = self.kernel.scratch_bytes(args)
        scratch = torch.empty(n_scratch, dtype=torch.uint8, device="cuda")
        self.kernel(args, scratch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.kernel(args, scratch)
        first = None
        for i in range(N_REPLAYS):
            y.fill_(float("nan"))
            scratch.fill_(17 * i % 256)
            graph.replay()
            first = y.clone() if first is None else first
            self.note(torch.equal(first, y), f"{case}: replay {i} differs from the first")


def decode_cases() -> list[Case]:
    """Few queries on long caches, as decoders with a cache call it."""
    cases: list[Case] = []
    for dtype in DTYPES:
        for D in (64, 80, 96, 128, 256, 512):
            for Hq, Hkv in ((8, 2), (4, 4), (16, 1), (6, 2)):
                for S, T in ((1, 129), (1, 1000), (2, 640), (5, 333), (16, 777)):
                    mask = MASKS[len(cases) % 3]
                    pattern = PATTERNS[len(cases) % 2]
                    layout = LAYOUTS[len(cases) % 3]
                    case = Case(1, Hq, Hkv, S, T, D, dtype, mask, "ST", pattern, layout=layout)
                    cases.append(case)
    cases.append(Case(1, 32, 8, 1, 8192, 128, torch.bfloat16, "bool", "ST", "prefix"))
    cases.append(Case(4, 32, 8, 1, 4096, 128, torch.float16, "bool", "BT", "window"))
    cases.append(Case(1, 32, 16, 1, 8192, 256, torch.bfloat16, "bool", "ST", "window"))
    cases.append(Case(2, 32, 4, 1, 3000, 512, torch.bfloat16, "none"))
    return cases


def position_cases() -> list[Case]:
    """Positions in the place of a mask, windows, int8 keys and values, either order of y."""
    cases: list[Case] = []
    for dtype in HALF_DTYPES:
        for D in (64, 96, 128, 256, 512):
            for Hq, Hkv in ((4, 4), (8, 4), (8, 2), (8, 1), (16, 1), (10, 2), (12, 4)):
                for S, T in ((1, 128), (1, 1000), (1, 5000), (2, 640), (5, 332), (16, 777)):
                    n = len(cases)
                    case = Case(
                        B=(1, 3, 2)[n % 3], Hq=Hq, Hkv=Hkv, S=S, T=T, D=D, dtype=dtype,
                        layout=LAYOUTS[n % 3], softcap=(0.0, 0.0, 0.0, 2.0)[n % 4],
                        positions=("S", "BS")[n % 2],
                        pos_dtype=(torch.int64, torch.int32)[n % 5 % 2],
                        window=(0, 0, 1, 17, 64, 300)[n % 6], merge_heads=n % 7 % 2 == 0,
                        int8=n % 11 % 2 == 0,
                    )  # fmt: skip
                    cases += [case, replace(case, int8=not case.int8, window=0)]
    for dtype in DTYPES:  # other kernels: prompts, odd head sizes, float32, no alignment
        for D in (20, 64, 128, 256, 512):
            for S, T in ((1, 300), (20, 300), (257, 1000), (384, 384)):
                n = len(cases)
                case = Case(
                    B=(1, 2)[n % 2], Hq=12, Hkv=4, S=S, T=T, D=D, dtype=dtype,
                    layout=LAYOUTS[n % 4], positions=("S", "BS")[n % 2],
                    window=(0, 0, 1, 100)[n % 4], merge_heads=n % 3 == 0,
                )  # fmt: skip
                cases += [case, replace(case, int8=True)]
    cases.append(Case(1, 64, 8, 1, 33000, 128, positions="S"))
    cases.append(Case(16, 32, 8, 1, 2048, 128, positions="BS", merge_heads=True))
    cases.append(Case(16, 32, 8, 1, 2048, 128, positions="BS", int8=True))
    cases.append(Case(40, 32, 8, 1, 200, 128, positions="BS"))
    return cases


def prefill_cases() -> list[Case]:
    """Many queries: prompts of decoders, and encoders."""
    cases: list[Case] = []
    for dtype in DTYPES:
        for D in (64, 80, 96, 128, 256, 512):
            for S, T in ((17, 17), (64, 64), (197, 197), (130, 400), (257, 63)):
                for is_causal in (False, True):
                    mask = MASKS[len(cases) % 3]
                    pattern = PATTERNS[len(cases) % 5]
                    shape = MASK_SHAPES[len(cases) % 8]
                    layout = LAYOUTS[len(cases) % 3]
                    case = Case(2, 4, 2, S, T, D, dtype, mask, shape, pattern, is_causal, layout)
                    cases.append(case)
    cases.append(Case(1, 8, 2, 1024, 1024, 128, torch.bfloat16, is_causal=True))
    cases.append(Case(1, 4, 1, 700, 2048, 256, torch.bfloat16, "bool", "ST", "window"))
    cases.append(Case(1, 16, 16, 257, 257, 80, torch.float16))
    return cases


def large_cases() -> list[Case]:
    """Enough queries that the kernel of sm_90a is taken where there is one."""
    cases: list[Case] = []
    for dtype in HALF_DTYPES:
        for D in (40, 64, 96, 128, 160, 256):
            for S, T in ((257, 257), (300, 555), (384, 100)):
                for is_causal in (False, True):
                    mask = MASKS[len(cases) % 3]
                    pattern = PATTERNS[len(cases) % 5]
                    shape = MASK_SHAPES[len(cases) % 8]
                    layout = LAYOUTS[len(cases) % 3]
                    softcap = (0.0, 0.0, 0.0, 2.0)[len(cases) % 4]
                    case = Case(2, 24, 6, S, T, D, dtype, mask, shape, pattern, is_causal, layout)
                    cases.append(replace(case, softcap=softcap))
    return cases


def shape_cases() -> list[Case]:
    """Every mask kind x broadcast x pattern x layout, on sizes that nothing divides."""
    cases: list[Case] = []
    for S, T, D in ((3, 77, 40), (75, 141, 72)):
        for mask in ("bool", "float"):
            for shape in MASK_SHAPES:
                for pattern in PATTERNS:
                    dtype = DTYPES[len(cases) % 3]
                    layout = LAYOUTS[len(cases) % 4]
                    cases.append(Case(2, 6, 3, S, T, D, dtype, mask, shape, pattern, False, layout))
    for D in (1, 2, 7, 8, 20, 33, 72, 100, 112, 160, 192, 264, 320, 511):
        for S in (1, 4, 70):
            dtype = DTYPES[len(cases) % 3]
            cases.append(Case(1, 2, 1, S, 90, D, dtype, scale=0.3))
    for S, T in ((1, 1), (1, 2), (2, 1), (64, 1), (100, 16)):
        cases.append(Case(1, 2, 2, S, T, 64))
    cases.append(replace(cases[0], S=4, T=0, mask="none"))
    # Scores far apart: the running maximum moves.
    cases += [Case(1, 4, 2, S, 500, 128, dtype, scale=4.0) for S in (1, 90) for dtype in DTYPES]
    return cases


def random_cases(n: int, largest: int, seed: int) -> list[Case]:
    """Anything goes."""
    generator = random.Random(seed)
    cases: list[Case] = []
    for _ in range(n):
        Hkv = generator.choice((1, 1, 2, 3))
        cases.append(
            Case(
                B=generator.choice((1, 1, 2, 3)),
                Hq=Hkv * generator.choice((1, 2, 4, 7, 8)),
                Hkv=Hkv,
                S=generator.choice((1, 1, 2, 3, 8, 16, 17, generator.randint(1, largest))),
                T=generator.randint(1, largest),
                D=generator.choice((32, 40, 64, 72, 80, 88, 96, 128, 128, 160, 256, 384, 512)),
                dtype=generator.choice((*HALF_DTYPES, *DTYPES)),
                mask=generator.choice(MASKS),
                mask_shape=generator.choice(MASK_SHAPES),
                pattern=generator.choice(PATTERNS),
                is_causal=generator.random() < 0.3,
                layout=generator.choice(LAYOUTS),
                softcap=generator.choice((0.0, 0.0, 0.5, 30.0)),
            )
        )
    return cases


def run_all(checker: Checker, quick: bool) -> None:
    """Every group of cases."""
    groups: dict[str, list[Case]] = {
        "decode": decode_cases(),
        "positions, windows, int8": position_cases(),
        "prefill": prefill_cases(),
        "prefill of many heads": large_cases(),
        "masks, strides, head sizes": shape_cases(),
        "random": random_cases(15 if quick else 600, 150 if quick else 900, seed=2),
    }
    for name, cases in groups.items():
        if quick and name != "random":
            cases = cases[:: len(cases) // 8]
        before = len(checker.failures)
        for case in cases:
            try:
                checker.check(case)
            except RuntimeError as error:  # of the device: nothing runs after it
                sys.exit(f"{case}: {error}")
        for case in cases[:: 1 + len(cases) // 20]:
            checker.check_replays(case)
        verdict = "ok" if len(checker.failures) == before else "WRONG"
        print(f"{name}: {len(cases)} cases  {verdict}", flush=True)
    checker.check_refusals()
    for dtype in DTYPES:
        for positions in ("", "S", "BS"):
            checker.check_graph(dtype, positions)
        checker.check_graph(dtype, "BS", int8=True)


# ---- times ----


def microseconds(calls: Sequence[Callable[[], object]]) -> float:
    """Median over the replays of one CUDA graph of all calls, per call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        times = []
        for _ in range(N_REPLAYS + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def time_decode(kernel: Kernel, rows: Sequence[tuple] = ()) -> None:
    """Decode steps at their positions; caches rotated through more than four times the L2.

    The bytes are those of the keys and values that are seen, each once, with their scales.
    """
    print(
        "\n| decode, bf16 | B | cache | T | keys seen | us | torch us | KV MB | share of 4.3 TB/s |"
    )
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    llama = ("Llama-3-8B", 32, 8, 128)
    many = [(*llama, 1, 8704, n, 0, int8) for int8 in (False, True) for n in (128, 2048, 8192)]
    many += [(*llama, 1, 32768, 32768, 0, int8) for int8 in (False, True)]
    many += [(*llama, 16, 8704, n, 0, int8) for int8 in (False, True) for n in (128, 2048, 8192)]
    many += [(*llama, 16, 32768, 32768, 0, int8) for int8 in (False, True)]
    many += [
        ("Llama-3-70B", 64, 8, 128, 1, 8704, 128, 0, False),
        ("Llama-3-70B", 64, 8, 128, 1, 8704, 8192, 0, False),
        ("Gemma-4-31B sliding", 32, 16, 256, 1, 8704, 128, 1024, False),
        ("Gemma-4-31B sliding", 32, 16, 256, 1, 8704, 8192, 1024, False),
        ("Gemma-4-31B full", 32, 4, 512, 1, 8704, 128, 0, False),
        ("Gemma-4-31B full", 32, 4, 512, 1, 8704, 8192, 0, False),
    ]
    for name, Hq, Hkv, D, B, T, context, window, int8 in rows or many:
        dtype = torch.bfloat16
        n_seen = min(window or context, context)
        n_bytes = 2 * B * Hkv * n_seen * (D + 4 if int8 else 2 * D)
        cache_bytes = 2 * B * Hkv * T * (D + 4 if int8 else 2 * D)
        n_copies = max(2, min(256, -(-(256 << 20) // n_bytes), (24 << 30) // cache_bytes))
        q = torch.randn(B, Hq, 1, D, device="cuda").to(dtype)
        input_pos = torch.full((B, 1), context - 1, device="cuda")
        y = torch.empty_like(q)
        shape = (2, B, Hkv, T, D)
        all_args, caches = [], []
        for _ in range(n_copies):
            scales: Any = (None, None)
            cache = torch.zeros(shape, dtype=torch.int8 if int8 else dtype, device="cuda")
            if int8:
                cache[:, :, :, :context].random_(-127, 128)
                scales = torch.rand(shape[:-1], device="cuda") / 100
            else:
                cache[:, :, :, :context].normal_()
            caches.append((cache, scales))
            all_args.append(
                kernel.args(
                    q, *cache, None, y, D**-0.5, False, 0.0, input_pos, window, False, scales
                )
            )
        scratch = torch.empty(kernel.scratch_bytes(all_args[0]), dtype=torch.uint8, device="cuda")
        calls = [partial(kernel, args, scratch) for args in all_args]
        ours = microseconds(calls * max(1, 16 // n_copies))
        seen = slice(context - n_seen, context)
        theirs = "-"
        if not int8:  # torch reads a cache cut to what is seen
            torch_calls = [
                partial(torch_attention, q, *cache[:, :, :, seen], enable_gqa=True)
                for cache, _ in caches
            ]
            theirs = f"{microseconds(torch_calls * max(1, 16 // n_copies)):.1f}"
        share = n_bytes / 4.3e12 / ours * 1e6
        print(
            f"| {name} | {B} | {'int8' if int8 else 'bf16'} | {T} | {n_seen} | {ours:.1f} | "
            f"{theirs} | {n_bytes / 1e6:.1f} | {share:.2f} |",
            flush=True,
        )
        del caches, all_args, calls


def time_prefill(kernel: Kernel) -> None:
    """Prompts and encoders, beside torch's attention (its choice of backend)."""
    print(
        "\n| prefill | dtype | S | T | mask | us | torch us | torch, FlashAttention | TFLOP/s |"
        " torch / ours |"
    )
    print("| --- | --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    bf16, f16 = torch.bfloat16, torch.float16
    for name, Hq, Hkv, D, S, T, kind, dtype in (
        ("Llama-3-8B", 32, 8, 128, 512, 512, "causal", bf16),
        ("Llama-3-8B", 32, 8, 128, 2048, 2048, "causal", bf16),
        ("Llama-3-8B", 32, 8, 128, 2048, 2048, "causal", f16),
        ("Llama-3-8B", 32, 8, 128, 2048, 2048, "none", bf16),
        ("Llama-3-8B", 32, 8, 128, 2048, 2048, "bool", bf16),
        ("Llama-3-8B, cache", 32, 8, 128, 2048, 8192, "bool", bf16),
        ("Gemma-2-9B", 16, 8, 256, 2048, 2048, "causal", bf16),
        ("Gemma-4-31B sliding", 32, 16, 256, 2048, 8192, "window", bf16),
        ("Gemma-4-31B full", 32, 4, 512, 2048, 8192, "bool", bf16),
        ("ViT-H/14", 16, 16, 80, 257, 257, "none", f16),
        ("BERT-large", 16, 16, 64, 512, 512, "float", f16),
        ("64-wide heads", 32, 32, 64, 2048, 2048, "none", bf16),
        ("96-wide heads", 32, 32, 96, 2048, 2048, "none", bf16),
        ("fp32", 8, 8, 128, 512, 512, "causal", torch.float32),
    ):
        q = torch.randn(1, Hq, S, D, device="cuda").to(dtype)
        k, v = torch.randn(2, 1, Hkv, T, D, device="cuda").to(dtype)
        rows, keys = torch.arange(S, device="cuda")[:, None], torch.arange(T, device="cuda")
        causal = keys <= rows
        window = causal & (keys > rows - 1024)
        no_key = torch.zeros(1, 1, 1, T, device="cuda", dtype=dtype)
        mask = {"bool": causal, "window": window, "float": no_key}.get(kind)
        n_seen = {"causal": causal, "bool": causal, "window": window}.get(kind)
        pairs = S * T if n_seen is None else int(n_seen.sum())
        y = torch.empty_like(q)
        args: Any = kernel.args(q, k, v, mask, y, D**-0.5, kind == "causal")
        scratch = torch.empty(kernel.scratch_bytes(args), dtype=torch.uint8, device="cuda")
        ours = microseconds([partial(kernel, args, scratch)] * N_CALLS)
        options = {"is_causal": kind == "causal", "enable_gqa": Hq != Hkv}
        theirs = microseconds([partial(torch_attention, q, k, v, mask, **options)] * N_CALLS)
        flash = "-"
        if mask is None and dtype in HALF_DTYPES:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
                calls = [partial(torch_attention, q, k, v, mask, **options)] * N_CALLS
                flash = f"{microseconds(calls):.0f}"
        rate = 4 * Hq * pairs * D / ours / 1e6
        print(
            f"| {name} | {str(dtype)[6:]} | {S} | {T} | {kind} | {ours:.0f} | {theirs:.0f} | "
            f"{flash} | {rate:.0f} | {theirs / ours:.2f} |",
            flush=True,
        )


def main() -> int:
    """Build, check, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for option in ("quick", "ptx", "time"):
        parser.add_argument(f"--{option}", action="store_true")
    parser.add_argument("--library", type=Path, help="built there unless it exists")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "check_cuda_attention: expected a CUDA GPU, torch sees none; run it where there is one"
        )
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    major, minor = torch.cuda.get_device_capability()
    sm = f"{major}{minor}" + ("a" if major >= 9 else "")
    code = "arch=compute_80,code=compute_80" if options.ptx else f"arch=compute_{sm},code=sm_{sm}"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        library = options.library or Path(folder, "libkernels.so")
        if not library.exists():
            build(library, code)
        kernel = Kernel(ctypes.CDLL(str(library)))
        checker = Checker(kernel)
        # cuDNN's attention builds a plan for every shape: 0.1 s a case.
        torch.backends.cuda.enable_cudnn_sdp(False)
        run_all(checker, options.quick)
        torch.backends.cuda.enable_cudnn_sdp(True)
        if options.time:
            time_decode(kernel)
            time_prefill(kernel)
    print(
        f"{checker.n_right} right, {len(checker.failures)} wrong; the error is at most "
        f"{checker.worst:.2f} times that of torch's attention"
    )
    return 1 if checker.failures else 0


if __name__ == "__main__":
    sys.exit(main())
