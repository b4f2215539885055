"""Prints each linear kernel against the roofline: bytes, operations, floor, time, share.

    cuda-int4 bench roofline --model llama-3-8b             times ours, on a GPU
    cuda-int4 bench roofline --table linear_cuda.csv        a page of what bench linear wrote

A page per kernel, a line per shape and number of rows of x. Bytes are those of the weight's parts,
x and y, each once; operations are multiply-adds times two, of a 2:4 weight those of the half that
is kept. The memory floor is bytes over the read ceiling, the compute floor operations over the
ceiling of a large float16 product; both ceilings were measured in the process that took the times,
or in the first of them, where a table has several. The share is the longer floor over the time.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import bench_linear
import linear_cuda
from plot_linear import label, read

CEILINGS = re.compile(r"read ceiling ([\d.]+) TB/s .* matmul ceiling ([\d.]+) TFLOP/s")
HEADER = (
    "| N | K | M | MB | GFLOP | memory floor, us | compute floor, us | time, us | share |",
    "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)


def page(table: Path | io.StringIO) -> str:
    """The pages, as Markdown.

    Raises:
        ValueError: it is not a table of bench_linear on a GPU, or lacks the line with the ceilings.
    """
    notes, rows = read(table)
    found = next(filter(None, map(CEILINGS.search, notes)), None)
    if found is None:
        raise ValueError(
            "roofline: expected a table with a line '# read ceiling ... TB/s, ... matmul ceiling "
            "... TFLOP/s', got none; run cuda-int4 bench linear --device cuda again"
        )
    bytes_per_us, operations_per_us = float(found[1]) * 1e6, float(found[2]) * 1e6
    lines = ["# Linear kernels against the roofline", "", *(f"- {note}" for note in notes)]
    for kernel in dict.fromkeys(map(label, rows)):
        lines += ["", f"## {kernel}", "", *HEADER]
        for row in (row for row in rows if label(row) == kernel):
            M, N, K, us = int(row["M"]), int(row["N"]), int(row["K"]), float(row["us_median"])
            nbytes = float(row["GB_per_s"]) * us * 1e3
            operations = 2 * linear_cuda.multiply_adds(row["kernel"], M, N, K)
            floors = nbytes / bytes_per_us, operations / operations_per_us
            texts = [
                *(str(n) for n in (N, K, M)),
                f"{nbytes / 1e6:.2f}",
                f"{operations / 1e9:.2f}",
                *(f"{floor:.2f}" for floor in floors),
                f"{us:.2f}",
                f"{max(floors) / us:.2f}",
            ]
            lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: those of bench linear, and ``--table``."""
    parser.add_argument("--table", type=Path, help="CSV of bench linear; nothing is timed then")
    bench_linear.add_arguments(parser)
    parser.set_defaults(device="cuda", kernels=list(linear_cuda.OURS))


def command(options: argparse.Namespace) -> int:
    """Run with parsed options; 1 if an answer was wrong."""
    table: Path | io.StringIO = options.table
    all_right = True
    if table is None:
        has_gpu = bench_linear.choose_device("auto") == "cuda"
        if not has_gpu or options.device == "cpu":
            given = "--device cpu" if has_gpu else "a machine without one, or a build for none"
            raise ValueError(
                f"bench roofline: expected a GPU, got {given}; give --table the CSV that bench "
                "linear wrote on one"
            )
        bench_linear.fill_in(options)
        table = io.StringIO()
        all_right = linear_cuda.run(options, table)
    text = page(table)
    print(text, end="")
    if options.out is not None:
        options.out.write_text(text)
    return 0 if all_right else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
