"""Measure what int4 costs the byte Llama: bits per byte of held-out files, as a Markdown table.

    python evaluate.py                 # every form, 128 KiB of held-out text; minutes on a laptop
    python evaluate.py --windows 16 --methods min_max --group-sizes 32

Each form is ``cuda_int4.quantize_`` on the bfloat16 model, run in PyTorch eager through the same
kernels that a .pte runs. The text is cut into windows of 2048 bytes (corpus.py says which files).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from corpus import documents, standard_library, stream
from cuda_int4 import Int4Config, quantize_
from model import WEIGHTS, as_tensor, bits_per_byte, load

CONTEXT = 2048
HEADER = (
    "| form | method | group_size | zero points | bits per weight | bits per byte | over bf16 |\n"
    "|---|---|---:|---|---:|---:|---:|"
)


def bits_per_weight(weight: Tensor) -> float:
    """Bits that an int4 weight takes, scales and zero points included."""
    parts = [getattr(weight, name) for name in ("qdata", "scale", "zero_point")]
    return 8 * sum(part.nbytes for part in parts if part is not None) / weight.numel()


def forms(args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Yield (activation, arguments of Int4Config) of each row."""
    for method, group_size, symmetric, activation in itertools.product(
        args.methods, args.group_sizes, (False, True), args.activations
    ):
        config = {"group_size": group_size, "symmetric": symmetric, "method": method}
        yield activation, config


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=standard_library(), help="a Python's Lib")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--windows", type=int, default=64, help="windows of 2048 bytes; 0: all")
    parser.add_argument("--methods", nargs="+", default=["min_max", "hqq"])
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--activations", nargs="+", default=["none", "int8"])
    args = parser.parse_args()

    data = as_tensor(stream(documents(args.source, held_out=True)))

    def measure(model: nn.Module) -> float:
        return bits_per_byte(model, data, CONTEXT, batch=1, n_windows=args.windows)

    print(HEADER)
    base = measure(load(args.weights, dtype=torch.bfloat16))
    print(f"| bf16 | | | | 16 | {base:.4f} | |", flush=True)
    for activation, config in forms(args):
        model = load(args.weights, dtype=torch.bfloat16)
        quantize_(model, Int4Config(**config, activation=activation))
        bits = measure(model)
        name = {"none": "w4a16", "int8": "w4a8"}[activation]
        zero_points = "no" if config["symmetric"] else "yes"
        size = bits_per_weight(model.layers[0].attention.wq.weight)
        print(
            f"| {name} | {config['method']} | {config['group_size']} | {zero_points} "
            f"| {size:.3f} | {bits:.4f} | {bits / base - 1:+.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
