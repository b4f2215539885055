"""Times packing of int4 weights into each layout, and back: all linears of a model, one by one.

    python benchmarks/bench_packing.py                      on the CPU
    python benchmarks/bench_packing.py --device cuda --out packing.csv

A weight is quantised already (canonical codes, scales bfloat16, group_size 128, 2:4 so that every
layout takes it) and lies on the device; what is timed is ``from_int4`` and ``unpack``. One weight
of each shape stands for all of that shape. First, each is packed and unpacked once: a weight that
comes back otherwise, or a GPU that packs other bytes than the CPU, prints WRONG in place of a time.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_int4.int4 import CanonicalInt4
from cuda_int4.packing import pack_nibbles
from cuda_int4.tensors import TENSORS, CudaInt4Tensor
from machine import commit_id, cpu_name

GROUP_SIZE = 128
# (N, K): how many.
MODELS: dict[str, dict[tuple[int, int], int]] = {
    "llama-2-7b": {
        (4096, 4096): 4 * 32,
        (11008, 4096): 2 * 32,
        (4096, 11008): 32,
        (32000, 4096): 1,
    },
}
COLUMNS = (
    "layout_tag,operation,model,n_linears,n_weights,seconds_p10,seconds_median,seconds_p90,"
    "device,n_threads,commit"
).split(",")


def sparse_weight(N: int, K: int, device: str) -> CanonicalInt4:
    """Random codes, of each four of which two are 8; every scale its own."""
    generator = torch.Generator(device).manual_seed(N + K)
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device=device, generator=generator)
    order = torch.rand(N, K // 4, 4, device=device, generator=generator).argsort(-1)
    codes[(order < 2).view(N, K)] = 8
    scale = torch.rand(N, K // GROUP_SIZE, device=device, generator=generator) + 0.5
    return CanonicalInt4(pack_nibbles(codes), scale.bfloat16(), None, GROUP_SIZE)


@dataclass(frozen=True)
class Timed:
    """What one weight takes, in seconds: 10 %, median, 90 %."""

    p10: float
    median: float
    p90: float


def time_call(call: Callable[[], object], device: str, repeats: int) -> Timed:
    """Repeats after one call that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[1:])
    return Timed(*(seconds[int(share * (len(seconds) - 1))] for share in (0.1, 0.5, 0.9)))


def parts(weight: CudaInt4Tensor) -> dict[str, Tensor]:
    """The packed tensors."""
    return {name: getattr(weight, name) for name in weight.__tensor_flatten__()[0]}


def is_right(cls: type[CudaInt4Tensor], weight: CanonicalInt4) -> bool:
    """Whether it comes back as it was, and is packed as on the CPU."""
    packed = cls.from_int4(weight)
    back = packed.unpack()
    if not torch.equal(back.qdata, weight.qdata) or not torch.equal(back.scale, weight.scale):
        return False
    on_cpu = CanonicalInt4(weight.qdata.cpu(), weight.scale.cpu(), None, weight.group_size)
    expected = parts(cls.from_int4(on_cpu))
    return all(torch.equal(part.cpu(), expected[name]) for name, part in parts(packed).items())


def main() -> None:
    """Print one CSV row per layout and direction."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-2-7b")
    parser.add_argument("--repeats", type=int, default=9, help="of each shape")
    parser.add_argument("--out", help="the CSV to write too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a torch with CUDA and a GPU; use --device cpu")

    model = MODELS[args.model]
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    weights = {shape: sparse_weight(*shape, args.device) for shape in model}
    rows, commit = [], commit_id()
    for tag, cls in TENSORS.items():
        right = all(is_right(cls, weight) for weight in weights.values())
        for operation in ("pack", "unpack"):
            totals = [0.0, 0.0, 0.0]
            for shape, count in model.items():
                weight = weights[shape]
                packed = cls.from_int4(weight)
                pack = functools.partial(cls.from_int4, weight)
                call = pack if operation == "pack" else packed.unpack
                timed = time_call(call, args.device, args.repeats)
                for i, seconds in enumerate((timed.p10, timed.median, timed.p90)):
                    totals[i] += count * seconds
            times = [f"{total:.4f}" if right else "WRONG" for total in totals]
            rows.append(
                [
                    tag,
                    operation,
                    args.model,
                    sum(model.values()),
                    sum(N * K * count for (N, K), count in model.items()),
                    *times,
                    device,
                    torch.get_num_threads(),
                    commit,
                ]
            )
    files = [sys.stdout, *([open(args.out, "w", newline="")] if args.out else [])]
    for file in files:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
