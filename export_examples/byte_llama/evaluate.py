"""Measure what int4 costs the byte Llama: bits per byte of held-out files, as a Markdown table.

    python evaluate.py                 # every form, 128 KiB of held-out text; minutes on a laptop
    python evaluate.py --windows 16 --methods min_max --group-sizes 32

Each form is ``cuda_int4.quantize_`` on the bfloat16 model, run in PyTorch eager through the same
kernels that a .pte runs. The text is cut into windows of 2048 bytes (corpus.py says which files).
The forms that are 2:4 come last: pruned by wanda and no more, and fine-tuned (finetune24.py).
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from corpus import documents, standard_library, stream
from cuda_int4 import Int4Config, prune_24_, quantize_
from model import WEIGHTS, WEIGHTS_24, as_tensor, bits_per_byte, load

CONTEXT = 2048
HEADER = (
    "| weights | form | method | group_size | zero points | bits per weight | bits per byte "
    "| over bf16 |\n|---|---|---|---:|---|---:|---:|---:|"
)


def bits_per_weight(weight: Tensor) -> float:
    """Bits that an int4 weight takes, scales and zero points included."""
    names = ("qdata", "scale", "zero_point", "meta")
    parts = [getattr(weight, name, None) for name in names]
    return 8 * sum(part.nbytes for part in parts if part is not None) / weight.numel()


def forms(args: argparse.Namespace, is_24: bool) -> Iterator[Int4Config]:
    """Yield the int4 form of each row."""
    for method, group_size, symmetric, activation in itertools.product(
        args.methods, args.group_sizes, (True,) if is_24 else (False, True), args.activations
    ):
        yield Int4Config(
            group_size=group_size,
            symmetric=symmetric,
            method=method,
            activation=activation,
            layout="marlin24" if is_24 else "coalesced",
        )


def models(args: argparse.Namespace) -> Iterator[tuple[str, bool, Callable[[], nn.Module]]]:
    """Yield (name, is 2:4, how to load it in bfloat16) of each model."""

    def pruned() -> nn.Module:
        model = load(args.weights, dtype=torch.bfloat16)
        text = as_tensor(stream(documents(args.source, held_out=False))).long()
        cuts = torch.linspace(0, len(text) - CONTEXT, args.calibration).long()
        return prune_24_(model, "wanda", [text[i : i + CONTEXT][None] for i in cuts.tolist()])

    yield "dense", False, lambda: load(args.weights, dtype=torch.bfloat16)
    if args.calibration:
        yield "2:4, pruned", True, pruned
    if args.weights_24.exists():
        yield "2:4, fine-tuned", True, lambda: load(args.weights_24, dtype=torch.bfloat16)


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, default=standard_library(), help="a Python's Lib")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--weights-24", type=Path, default=WEIGHTS_24, help="of finetune24.py")
    parser.add_argument("--calibration", type=int, default=32, help="windows for wanda; 0: no row")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--windows", type=int, default=64, help="windows of 2048 bytes; 0: all")
    parser.add_argument("--methods", nargs="+", default=["min_max", "hqq"])
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--activations", nargs="+", default=["none", "int8"])
    args = parser.parse_args()

    data = as_tensor(stream(documents(args.source, held_out=True))).to(args.device)

    def measure(model: nn.Module) -> float:
        model = model.to(args.device)
        return bits_per_byte(model, data, CONTEXT, batch=1, n_windows=args.windows)

    print(HEADER)
    base = None
    for name, is_24, make in models(args):
        dense = make()
        bits = measure(dense)
        base = base or bits
        print(f"| {name} | bf16 | | | | 16 | {bits:.4f} | {bits / base - 1:+.2%} |", flush=True)
        for config in forms(args, is_24):
            model = copy.deepcopy(dense).cpu()
            quantize_(model, config)
            bits = measure(model)
            form = {"none": "w4a16", "int8": "w4a8"}[config.activation]
            zero_points = "no" if config.symmetric else "yes"
            size = bits_per_weight(model.layers[0].attention.wq.weight)
            print(
                f"| {name} | {form} | {config.method} | {config.group_size} | {zero_points} "
                f"| {size:.3f} | {bits:.4f} | {bits / base - 1:+.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
