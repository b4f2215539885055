"""``cuda-int4 demo``: the whole path on a small real model, in one command.

Exports the byte Llama (export_examples/byte_llama, trained on the Python standard library) in w4a16
and in w4a8, decodes from each file with the C++ program, and compares both with the same int4
weights in plain PyTorch: the bytes that each writes by itself, always taking the likeliest, and
what each thinks of the bytes of a given text.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import _native
from .shipped import shipped_folder, shipped_script

FORMS = {"none": "w4a16", "int8": "w4a8"}
# Activations rounded in another order move a logit by a few steps of their dtype: where PyTorch's
# two likeliest tokens lie closer than this, either may come first.
ROUNDING_STEPS = 4


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``cuda-int4 demo``."""
    parser.add_argument(
        "--prompt",
        default="class Stack:\n    def __init__(self",
        help="text to continue (default: the head of a class)",
    )
    parser.add_argument(
        "--max-new", type=int, default=256, help="bytes to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=3, help="of the text shown (default: %(default)s)"
    )
    parser.add_argument(
        "--check",
        metavar="TOKENS",
        type=int,
        default=2000,
        help="teacher-forced tokens to compare with PyTorch (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="of the activations; the 16-bit ones round on their own account, and either of two"
        " nearly equal tokens may come first (default: %(default)s)",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="keep the .pte files here (default: a temporary folder)"
    )


def demo_command(args: argparse.Namespace) -> int:
    """Run ``cuda-int4 demo``; 0, or 1 if a token differs by more than rounding explains."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.output or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [run_form(form, folder, args) for form in FORMS]
    print_table(rows, args.dtype)
    if args.output:
        print(f"The files are in {folder}; try: cuda-int4 inspect {rows[0].path}")
    return 0 if all(row.explained for row in rows) else 1


@dataclasses.dataclass(frozen=True)
class Row:
    """What one form of the model did."""

    form: str
    path: str
    file_bytes: int
    bits_per_weight: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    n_greedy_equal: int
    n_greedy: int
    agreement: Any
    explained: bool


def run_form(activation: str, folder: Path, args: argparse.Namespace) -> Row:
    """Export, decode in C++, compare."""
    from cuda_int4 import inspect, load

    form = FORMS[activation]
    byte_llama = shipped_script("export_examples/byte_llama/export")
    path = folder / f"byte_llama_{form}.pte"
    print(f"{form}: exporting {path.name} ...", file=sys.stderr, flush=True)
    dtype = byte_llama.DTYPES[args.dtype]
    model, _ = byte_llama.build(path, activation=activation, dtype=dtype)
    weights = inspect(path)["weights"]
    n_weights = sum(weight["N"] * weight["K"] for weight in weights)

    greedy = decode_in_cpp(path, args, temperature=0.0)
    if activation == "none":
        sampled = decode_in_cpp(path, args, temperature=0.6)
        print(f"\n{args.prompt}{sampled['text']}\n", flush=True)
    print(f"{form}: comparing with PyTorch ...", file=sys.stderr, flush=True)
    reference = in_plain_torch(model)
    reference.reset()
    same = reference.generate(args.prompt.encode(), args.max_new)
    pairs = list(zip(greedy["tokens"], same, strict=False))
    text = (shipped_folder("export_examples/byte_llama") / "train.py").read_bytes()
    text = text[: args.check - 1]
    agreement = byte_llama.agreement(reference, load(path, device="cpu").forward, text)
    return Row(
        form,
        str(path),
        path.stat().st_size,
        8 * sum(weight["nbytes"] for weight in weights) / n_weights,
        greedy["decode_tokens_per_s"],
        greedy["prefill_tokens_per_s"],
        next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs)),
        len(pairs),
        agreement,
        # w4a8 rounds activations, so its tokens may differ; the table says where.
        activation == "int8" or agreement.widest_margin_steps <= ROUNDING_STEPS,
    )


def decode_in_cpp(path: Path, args: argparse.Namespace, temperature: float) -> dict[str, Any]:
    """Run cuda-int4-decode; returns the object that its --json prints."""
    program = _native.package_dir() / "bin" / "cuda-int4-decode"
    command = [program, path, "--device", "cpu", "--prompt", args.prompt, "--json"]
    command += ["--max-new", args.max_new, "--temperature", temperature, "--seed", args.seed]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{program.name} failed with exit code {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


def in_plain_torch(model: Any) -> Any:
    """The model with each int4 linear replaced by F.linear in float32 on its dequantised weight.

    None of this project's kernels takes part, so that agreement says something about them.
    """
    import torch
    from torch import nn

    from ..tensors import CudaInt4Tensor

    class DenseLinear(nn.Module):
        """y = x @ w.T + b in float32, rounded once to the dtype of x."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight = linear.weight.dequantize()
            self.bias = None if linear.bias is None else linear.bias.float()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Map x [..., K] to [..., N]."""
            return nn.functional.linear(x.float(), self.weight, self.bias).to(x.dtype)

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and isinstance(child.weight, CudaInt4Tensor):
                setattr(module, name, DenseLinear(child))
    return model


def print_table(rows: list[Row], dtype: str) -> None:
    """The summary, side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"The byte Llama (5.6 M weights) in int4, {dtype}, on this CPU")
    table.add_column("")
    for row in rows:
        table.add_column(row.form, justify="right")

    def line(label: str, cells: Iterator[str]) -> None:
        table.add_row(label, *cells)

    line("file", (f"{row.file_bytes / 1e6:.2f} MB" for row in rows))
    line("bits per int4 weight", (f"{row.bits_per_weight:.2f}" for row in rows))
    line("prefill", (f"{row.prefill_tokens_per_s:.0f} tokens/s" for row in rows))
    line("decode", (f"{row.decode_tokens_per_s:.0f} tokens/s" for row in rows))
    line("greedy bytes as in PyTorch", (f"{row.n_greedy_equal} of {row.n_greedy}" for row in rows))
    line("greatest difference of a logit", (f"{r.agreement.greatest_difference:.2g}" for r in rows))
    line("greatest logit", (f"{row.agreement.greatest_logit:.2f}" for row in rows))
    line(
        "same token as PyTorch", (f"{r.agreement.n_equal} of {r.agreement.n_tokens}" for r in rows)
    )
    firsts = (row.agreement.first_difference for row in rows)
    line("first other token", ("none" if first is None else str(first) for first in firsts))
    line("PyTorch's margin there, at most", (f"{r.agreement.widest_margin:.2g}" for r in rows))
    Console().print(table)
