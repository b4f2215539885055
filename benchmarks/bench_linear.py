"""Times cuda_int4::linear beside what torch has for the same layer, in one run.

    cuda-int4 bench linear                        the shapes and row counts we quote
    cuda-int4 bench linear --model llama-3-8b --out linear.csv --plot linear.png
    python benchmarks/bench_linear.py --help

Kernels on the CPU:
    w4a16, w4a8        ours: ``cuda_int4_linear`` with activation "none" and "int8"
    torch_int4         ``torch.ops.aten._weight_int4pack_mm_for_cpu``, bfloat16
    torch_fp32         ``F.linear`` with the same weights in float32
    torch_bf16         ``F.linear`` with the same weights in bfloat16

Kernels on a GPU:
    w4a16, w4a8        ours; w4a8 quantises x in every call
    w4a8_quantized_x   ours, x quantised before: what the later linears of one x cost
    marlin             ours, w4a16 from marlin.v1
    marlin24           ours, w4a16 from marlin24.v1: symmetric, 2:4
    cublas_fp16        ``F.linear`` with the same weights in float16
    tinygemm           ``torch.ops.aten._weight_int4pack_mm``, bfloat16
    gemlite            where it is installed
    cusparselt_fp16    a 2:4 weight in float16, where torch has cuSPARSELt

Each kernel's answer is checked first, against float64 with that kernel's own arithmetic; a wrong
one prints WRONG in place of a time. Weights rotate through several times the last-level cache, so
each call reads them from memory. The kernels take turns in one loop, so that a disturbance of the
machine hits all of them. linear_cuda.py has the GPU's method. On the CPU a turn starts with a
pause (the previous kernel's thread pool stops spinning) and untimed calls for a while: a decode
loop calls without a pause, and a scheduler takes milliseconds to give a thread that slept a
processor of its own.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from torch import Tensor

import linear_cuda
import linear_table
import plot_linear
from cuda_int4 import _native
from linear_cuda import KERNELS as CUDA_KERNELS
from machine import choose_device, commit_id, cpu_name, last_level_cache_bytes
from shapes import LINEARS, ROWS

CPU_SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]  # N, K
CPU_ROWS = (1, 32)
COLUMNS = (
    "kernel,M,N,K,group_size,us_p10,us_median,us_p90,GB_per_s,peak_fraction,gpu,device,commit"
).split(",")
CPU_KERNELS = ("w4a16", "w4a8", "torch_int4", "torch_fp32", "torch_bf16")
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
        calls.append(args)
    linear = _native.library().linear

    def call(i: int, kept: list[list[Tensor]] = kept) -> Tensor:
        _native.check(linear(calls[i], _native.DEVICE_CPU, None, None, 0, None))
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


def run(options: argparse.Namespace, out: TextIO) -> bool:
    """Write the table; False if any answer was wrong."""
    rotate_bytes = options.rotate_mb << 20 if options.rotate_mb else 3 * last_level_cache_bytes()
    device = f"{cpu_name()} x{options.threads}"
    commit = options.commit or commit_id()
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
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="where to run; auto: cuda where there is a GPU",
    )
    parser.add_argument(
        "--shape",
        dest="shapes",
        action="append",
        type=shape,
        metavar="N,K",
        help="repeatable; default: " + " ".join(f"{n},{k}" for n, k in CPU_SHAPES)
        + "; on a GPU all of --model",
    )  # fmt: skip
    parser.add_argument(
        "--model",
        dest="models",
        nargs="+",
        choices=tuple(LINEARS),
        default=[],
        help="time the linears of these models (shapes.py)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        metavar="M",
        help=f"default: {' '.join(map(str, CPU_ROWS))}; on a GPU {' '.join(map(str, ROWS))}",
    )
    parser.add_argument(
        "--group-size",
        dest="group_sizes",
        type=int,
        nargs="+",
        default=[32, 128],
        help="0: one group per row (torch's int4 kernels do not take it)",
    )
    parser.add_argument(
        "--zero-points",
        choices=["no", "yes", "both"],
        default="both",
        help="of the int4 weights, on a GPU; the CPU's have them",
    )
    parser.add_argument(
        "--kernel",
        dest="kernels",
        nargs="+",
        choices=tuple(dict.fromkeys(CPU_KERNELS + CUDA_KERNELS)),
        help="default: all of the device",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of x for our kernels; default: bfloat16, on a GPU float16",
    )
    parser.add_argument(
        "--threads", type=int, default=min(2, os.cpu_count() or 1), help="of the CPU's kernels"
    )
    parser.add_argument(
        "--turns",
        type=int,
        help=f"default: 20 of {CALLS_PER_TURN} calls each; on a GPU 15 replays of a graph",
    )
    parser.add_argument(
        "--rotate-mb", type=int, default=0, help="default: 3 last-level caches; on a GPU 4.2 L2s"
    )
    parser.add_argument("--commit", default="", help="to record, where git does not know it")
    parser.add_argument(
        "--out",
        type=Path,
        help="CSV file; default: standard output; on a GPU Markdown goes beside it",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw the GPU's results; needs matplotlib"
    )


def shape(text: str) -> tuple[int, int]:
    """An argparse type: "4096,11008" as (N, K)."""
    try:
        N, K = (int(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N,K such as 4096,4096, got {text!r}") from None
    return N, K


def fill_in(options: argparse.Namespace) -> None:
    """The defaults that hang on the device.

    Raises:
        ValueError: a kernel that the device does not have, or a plot of the CPU's results.
    """
    options.device = choose_device(options.device)
    on_cpu = options.device == "cpu"
    known = CPU_KERNELS if on_cpu else CUDA_KERNELS
    unknown = [name for name in options.kernels or () if name not in known]
    if unknown:
        raise ValueError(
            f"bench: expected kernels of the {options.device} ({', '.join(known)}), got "
            f"{', '.join(unknown)}; leave them out, or choose another --device"
        )
    options.kernels = (
        (options.kernels or known) if on_cpu else linear_cuda.kernels_here(options.kernels)
    )
    if on_cpu and options.plot:
        raise ValueError("bench: --plot draws a GPU's results, got --device cpu; leave it out")
    if options.plot:
        plot_linear.require_matplotlib()
    models = options.models or ([] if on_cpu or options.shapes else list(LINEARS))
    options.shapes = (options.shapes or []) + [pair for name in models for pair in LINEARS[name]]
    options.shapes = list(dict.fromkeys(options.shapes)) or CPU_SHAPES
    options.rows = options.rows or (CPU_ROWS if on_cpu else ROWS)
    options.turns = options.turns or (20 if on_cpu else 15)
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if on_cpu else "float16"))
    choices = {"no": [False], "yes": [True], "both": [False, True]}
    options.zero_points = choices[options.zero_points]
    if not on_cpu and all(options.zero_points) and set(options.kernels) <= set(linear_cuda.SPARSE):
        raise ValueError(
            f"bench: expected --zero-points no or both with {', '.join(options.kernels)}, got yes; "
            "2:4 weights have none"
        )


def command(options: argparse.Namespace) -> int:
    """Run with parsed options; 1 if an answer was wrong."""
    fill_in(options)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
        _native.check(_native.library().set_num_threads(options.threads))
    measure = run if options.device == "cpu" else linear_cuda.run
    if options.out is None:
        text = io.StringIO()
        all_right = measure(options, text if options.plot else sys.stdout)
        print(text.getvalue(), end="")
        table: Path | io.StringIO = text
    else:
        table = options.out
        with options.out.open("w", newline="") as out:
            all_right = measure(options, out)
        if options.device == "cuda":
            options.out.with_suffix(".md").write_text(linear_table.markdown(options.out))
    if options.plot:
        plot_linear.draw(table, options.plot)
    return 0 if all_right else 1


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
