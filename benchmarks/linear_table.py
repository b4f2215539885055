"""What bench_linear measured on a GPU, as Markdown: a table a shape, kernels by rows of x.

    python benchmarks/linear_table.py linear.csv > linear.md

A cell is the median in microseconds and, up to 16 rows, the share of 4.3 TB/s that the kernel's own
bytes make in that time; beyond, its speed over cuBLAS's in float16 in the same run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from plot_linear import label, read

MEMORY_BOUND_ROWS = 16
WRONG = "WRONG"


def markdown(table: Path) -> str:
    """The tables.

    Raises:
        ValueError: it is not a table of bench_linear on a GPU.
    """
    notes, rows = read(table, with_wrong=True)
    lines = ["# Linear on a GPU", "", *(f"- {note}" for note in notes), "", *CELLS]
    for shape in dict.fromkeys((row["N"], row["K"]) for row in rows):
        lines += _shape_table(shape, [row for row in rows if (row["N"], row["K"]) == shape])
    return "\n".join(lines) + "\n"


CELLS = (
    f"Microseconds a call; up to M = {MEMORY_BOUND_ROWS} with the share of 4.3 TB/s that the",
    "kernel's own bytes make, beyond with the speed over cuBLAS in float16. `g32 z`: groups of 32",
    "with zero points. `w4a8` quantises x in the call, `w4a8_quantized_x` has it quantised before.",
    "These three read coalesced.v1. The weights of `marlin24` and `cusparselt_fp16` are 2:4.",
)


def _shape_table(shape: tuple[str, str], rows: list[dict[str, str]]) -> list[str]:
    Ms = sorted({int(row["M"]) for row in rows})
    cells = {(label(row), int(row["M"])): row for row in rows}
    lines = ["", f"## N = {shape[0]}, K = {shape[1]}", ""]
    lines += ["| M = | " + " | ".join(map(str, Ms)) + " |", "|---|" + "---:|" * len(Ms)]
    for name in dict.fromkeys(label(row) for row in rows):
        texts = [_cell(cells.get((name, M)), cells.get(("cublas_fp16", M))) for M in Ms]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def _cell(row: dict[str, str] | None, cublas: dict[str, str] | None) -> str:
    if row is None:
        return ""
    if row["us_median"] == WRONG:
        return WRONG
    us = float(row["us_median"])
    text = f"{us:.1f}" if us < 1000 else f"{us:.0f}"
    if int(row["M"]) <= MEMORY_BOUND_ROWS:
        return f"{text} ({float(row['bus_fraction']):.2f})"
    if cublas is None or cublas is row or cublas["us_median"] == WRONG:
        return text
    return f"{text} ({float(cublas['us_median']) / us:.2f}x)"


if __name__ == "__main__":
    print(markdown(Path(sys.argv[1])), end="")
