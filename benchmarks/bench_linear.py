"""Times cuda_int4::linear on the CPU beside what torch has for the same layer, in one run.

    cuda-int4 bench linear                        the shapes and row counts we quote
    python benchmarks/bench_linear.py --help

Kernels:
    w4a16, w4a8        ours: ``cuda_int4_linear`` with activation "none" and "int8"
    torch_int4         ``torch.ops.aten._weight_int4pack_mm_for_cpu``, bfloat16
    torch_fp32         ``F.linear`` with the same weights in float32
    torch_bf16         ``F.linear`` with the same weights in bfloat16

Each kernel's answer is checked first, against float64 with that kernel's own arithmetic; a wrong
one prints WRONG in place of a time. Weights rotate through several times the last-level cache, so
each call reads them from memory. The kernels take turns in one loop, so that a disturbance of the
machine hits all of them. A turn starts with a pause (the previous kernel's thread pool stops
spinning) and untimed calls for a while: a decode loop calls without a pause, and a scheduler takes
milliseconds to give a thread that slept a processor of its own.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_int4 import _native

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # N, K
COLUMNS = (
    "kernel,M,N,K,group_size,us_p10,us_median,us_p90,GB_per_s,peak_fraction,gpu,device,commit"
).split(",")
KERNELS = ("w4a16", "w4a8", "torch_int4", "torch_fp32", "torch_bf16")
CALLS_PER_TURN = 4
PAUSE_S = 0.01
WARM_UP_S = 0.02


@dataclass
class Weight:
    """One int4 weight: codes 0..15 [N, K] and per group scale and zero point [N, n_groups]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_size: int

    def dequantize(self) -> Tensor:
        """The definition, in float64."""
        scale = self.scale.double().repeat_interleave(self.group_size, 1)
        zero_point = self.zero_point.double().repeat_interleave(self.group_size, 1)
        return (self.codes.double() - zero_point) * scale


def make_weight(N: int, K: int, group_size: int, seed: int) -> Weight:
    """Codes, scales and zero points that differ everywhere; bfloat16 as torch's kernel needs."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=generator)
    scale = torch.rand(N, K // group_size, generator=generator) * 0.02 + 0.002
    zero_point = torch.randint(4, 12, scale.shape, generator=generator)
    return Weight(codes, scale.bfloat16(), zero_point.bfloat16(), group_size)


@dataclass
class Candidate:
    """A kernel with several copies of its weight: ``call(i)`` uses copy i, output in ``y``."""

    name: str
    call: Callable[[int], Tensor]
    n_copies: int
    bytes_moved: int
    exact: Tensor
    tolerance: float

    def is_right(self) -> bool:
        """Relative Frobenius error of every copy's answer within the tolerance."""
        return all(
            (self.call(i).double() - self.exact).norm() <= self.tolerance * self.exact.norm()
            for i in range(self.n_copies)
        )


def copies_for(nbytes: int, rotate_bytes: int) -> int:
    """How many copies of a weight together pass ``rotate_bytes``, at least 2."""
    return max(2, -(-rotate_bytes // nbytes))


def ours(activation: str, x: Tensor, weight: Weight, rotate_bytes: int) -> Candidate:
    """``cuda_int4_linear`` through ctypes, arguments built once."""
    qdata = weight.codes[:, ::2] | (weight.codes[:, 1::2] << 4)
    parts = (qdata, weight.scale, weight.zero_point)
    nbytes = sum(part.nbytes for part in parts)
    y = torch.full((x.shape[0], qdata.shape[0]), float("nan"), dtype=x.dtype)
    kept, calls = [], []
    for _ in range(copies_for(nbytes, rotate_bytes)):
        copy = [part.clone() for part in parts]
        views = [_native.tensor_view(part) for part in (x, *copy, None, None, y)]
        args = _native.LinearArgs(
            *views, weight.group_size, b"coalesced.v1", activation.encode(), b"bench"
        )
        kept.append(copy)
        calls.append(ctypes.byref(args))
    linear = _native.library().linear

    def call(i: int, kept: list[list[Tensor]] = kept) -> Tensor:
        _native.check(linear(calls[i], _native.DEVICE_CPU, None))
        return y

    activations = x.double() if activation == "none" else int8_rounded(x)
    exact = activations @ weight.dequantize().T
    rounding = float((exact.to(x.dtype).double() - exact).norm() / exact.norm())
    name = "w4a16" if activation == "none" else "w4a8"
    moved = nbytes + x.nbytes + y.nbytes
    return Candidate(name, call, len(calls), moved, exact, max(1.2 * rounding, 1e-5))


def int8_rounded(x: Tensor) -> Tensor:
    """X as w4a8 sees it, in float64: per 32 values, max|x| / 127 times an int8."""
    groups = x.float().unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, (groups / step).round().clamp(-127, 127), 0)
    return (codes.double() * step.double()).flatten(-2)


def torch_int4(x: Tensor, weight: Weight, rotate_bytes: int) -> Candidate:
    """Torch's own int4 CPU kernel: w = (q - 8) * scale + zero, in bfloat16."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes.int(), 2)
    zero = (8 - weight.zero_point.float()) * weight.scale.float()
    scale_and_zero = torch.stack([weight.scale.float(), zero], -1).transpose(0, 1).bfloat16()
    parts = (packed, scale_and_zero.contiguous())
    nbytes = sum(part.nbytes for part in parts)
    copies = [[p.clone() for p in parts] for _ in range(copies_for(nbytes, rotate_bytes))]
    x = x.bfloat16()

    def call(i: int) -> Tensor:
        packed, scale_and_zero = copies[i]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, packed, weight.group_size, scale_and_zero
        )

    moved = nbytes + x.nbytes + x.shape[0] * weight.codes.shape[0] * 2
    exact = x.double() @ weight.dequantize().T
    return Candidate("torch_int4", call, len(copies), moved, exact, 1e-2)


def torch_dense(dtype: torch.dtype, x: Tensor, weight: Weight, rotate_bytes: int) -> Candidate:
    """F.linear with the dequantized weight."""
    dense = weight.dequantize().to(dtype)
    n_copies = copies_for(dense.nbytes, rotate_bytes)
    copies = [dense.clone() for _ in range(n_copies)]
    x = x.to(dtype)
    moved = dense.nbytes + x.nbytes + x.shape[0] * dense.shape[0] * x.element_size()
    name = "torch_fp32" if dtype == torch.float32 else "torch_bf16"
    exact = x.double() @ weight.dequantize().T
    return Candidate(name, lambda i: F.linear(x, copies[i]), n_copies, moved, exact, 1e-2)


def make_candidate(name: str, x: Tensor, weight: Weight, rotate_bytes: int) -> Candidate:
    """The kernel of that name on this case."""
    if name == "w4a16":
        return ours("none", x, weight, rotate_bytes)
    if name == "w4a8":
        return ours("int8", x, weight, rotate_bytes)
    if name == "torch_int4":
        return torch_int4(x, weight, rotate_bytes)
    dtype = torch.float32 if name == "torch_fp32" else torch.bfloat16
    return torch_dense(dtype, x, weight, rotate_bytes)


def time_turns(candidates: Sequence[Candidate], turns: int) -> dict[str, list[float]]:
    """Microseconds of each timed call, the candidates taking turns."""
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    next_copy = {
        candidate.name: itertools.cycle(range(candidate.n_copies)) for candidate in candidates
    }
    for _ in range(turns):
        for candidate in candidates:
            time.sleep(PAUSE_S)
            awake = time.perf_counter() + WARM_UP_S
            while time.perf_counter() < awake:
                candidate.call(next(next_copy[candidate.name]))
            for _ in range(CALLS_PER_TURN):
                i = next(next_copy[candidate.name])
                start = time.perf_counter_ns()
                candidate.call(i)
                times[candidate.name].append((time.perf_counter_ns() - start) / 1e3)
    return times


def read_bandwidth(rotate_bytes: int) -> float:
    """GB/s of summing float32 from memory on torch's threads: the peak that fractions are of."""
    data = torch.ones(max(rotate_bytes, 1 << 26) // 4)
    data.sum()
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds) / 1e9


def last_level_cache_bytes() -> int:
    """Of CPU 0; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes)


def cpu_name() -> str:
    """As /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "cpu")


def commit_id() -> str:
    """Short hash of the checkout, "+" behind it if files differ; empty outside of git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def run(options: argparse.Namespace, out: TextIO) -> bool:
    """Write the table; False if any answer was wrong."""
    rotate_bytes = options.rotate_mb << 20 if options.rotate_mb else 3 * last_level_cache_bytes()
    device, commit = f"{cpu_name()} x{options.threads}", commit_id()
    peak = read_bandwidth(rotate_bytes)
    print(f"read bandwidth {peak:.1f} GB/s, weights rotate through {rotate_bytes >> 20} MiB",
          file=sys.stderr)  # fmt: skip
    table = csv.writer(out)
    table.writerow(COLUMNS)
    all_right = True
    for (N, K), group_size in itertools.product(options.shapes, options.group_sizes):
        weight = make_weight(N, K, group_size or K, seed=N + K)
        for M in options.rows:
            x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(options.dtype)
            candidates = [make_candidate(name, x, weight, rotate_bytes) for name in options.kernels]
            right = {candidate.name: candidate.is_right() for candidate in candidates}
            times = time_turns([c for c in candidates if right[c.name]], options.turns)
            for candidate in candidates:
                case = [candidate.name, M, N, K, weight.group_size]
                if not right[candidate.name]:
                    all_right = False
                    table.writerow([*case, "WRONG", "WRONG", "WRONG", "", "", "", device, commit])
                    continue
                tenths = statistics.quantiles(times[candidate.name], n=10)
                median = statistics.median(times[candidate.name])
                rate = candidate.bytes_moved / median / 1e3
                numbers = [f"{tenths[0]:.1f}", f"{median:.1f}", f"{tenths[8]:.1f}", f"{rate:.2f}"]
                table.writerow([*case, *numbers, f"{rate / peak:.3f}", "", device, commit])
            out.flush()
    return all_right


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; ``cuda-int4 bench linear`` has the same."""
    parser.add_argument("--device", choices=["cpu"], default="cpu", help="where to run")
    parser.add_argument(
        "--shape",
        dest="shapes",
        action="append",
        type=shape,
        metavar="N,K",
        help="repeatable; default: " + " ".join(f"{n},{k}" for n, k in SHAPES),
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32], metavar="M")
    parser.add_argument(
        "--group-size",
        dest="group_sizes",
        type=int,
        nargs="+",
        default=[32, 128],
        help="0: one group per row (torch_int4 does not take it)",
    )
    parser.add_argument("--kernel", dest="kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help="of x for our kernels",
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--turns", type=int, default=20, help=f"of {CALLS_PER_TURN} calls each")
    parser.add_argument("--rotate-mb", type=int, default=0, help="default: 3 last-level caches")
    parser.add_argument("--out", type=Path, help="CSV file; default: standard output")


def shape(text: str) -> tuple[int, int]:
    """An argparse type: "4096,11008" as (N, K)."""
    try:
        N, K = (int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N,K such as 4096,4096, got {text!r}") from None
    return N, K


def command(options: argparse.Namespace) -> int:
    """Run with parsed options; 1 if an answer was wrong."""
    options.shapes = options.shapes or SHAPES
    options.dtype = getattr(torch, options.dtype)
    torch.set_num_threads(options.threads)
    _native.check(_native.library().set_num_threads(options.threads))
    if options.out is None:
        return 0 if run(options, sys.stdout) else 1
    with options.out.open("w", newline="") as out:
        return 0 if run(options, out) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_linear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
