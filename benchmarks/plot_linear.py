"""Draws what bench_linear measured on a GPU: share of the speed of light over M, a panel a shape.

    python benchmarks/plot_linear.py linear.csv -o linear.png

The speed of light of a kernel is the longer of the time to read its own bytes and the time of its
multiply-adds, at the ceilings measured in the same run: a kernel that reads four times the bytes
can stand as high and still take four times as long. Needs matplotlib (``pip install '.[bench]'``).
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Kernel -> colour: ours strong, the others pale.
COLOURS = {
    "w4a16": "#1f6fb4",
    "w4a8": "#c23b22",
    "w4a8_quantized_x": "#f28e2b",
    "marlin": "#2e8b57",
    "marlin24": "#7b3fa0",
    "cublas_fp16": "#999999",
    "tinygemm": "#8cbf88",
    "gemlite": "#b39ddb",
    "cusparselt_fp16": "#c9a66b",
}
OURS = ("w4", "marlin")
DOTTED = {  # name -> in the legend
    "cublas_fp16": "cublas_fp16, 4x the bytes",
    "cusparselt_fp16": "cusparselt_fp16 2:4, 2.25x the bytes",
}
PANEL_INCHES = (4.2, 3.0)
MAX_COLUMNS = 4


def require_matplotlib() -> None:
    """Raises ImportError, with the cure, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "plot: expected matplotlib, which is not installed; pip install matplotlib, or "
            "pip install 'executorch-cuda-int4[bench]'"
        )


def read(
    table: Path | io.StringIO, with_wrong: bool = False
) -> tuple[list[str], list[dict[str, str]]]:
    """The lines before the table, and its rows that hold a time (or also WRONG).

    Raises:
        ValueError: it is not a table of bench_linear on a GPU.
    """
    text = table.getvalue() if isinstance(table, io.StringIO) else table.read_text()
    lines = text.splitlines()
    notes = [line[2:] for line in lines if line.startswith("# ")]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if not rows or "light_fraction" not in rows[0]:
        who = "bench" if isinstance(table, io.StringIO) else table
        raise ValueError(
            f"{who}: expected the CSV of `cuda-int4 bench linear --device cuda`, with a column "
            f"light_fraction, got {', '.join(rows[0]) if rows else 'no rows'}; give another file"
        )
    return notes, [row for row in rows if with_wrong or row["us_median"] != "WRONG"]


def label(row: dict[str, str]) -> str:
    """Such as "w4a16 g32 z": kernel, group size, with zero points."""
    group = f" g{row['group_size']}" if row["group_size"] else ""
    return row["kernel"] + group + (" z" if row["zero_points"] == "1" else "")


def draw(table: Path | io.StringIO, to: Path) -> None:
    """Write the picture.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: it is not a table of bench_linear on a GPU.
    """
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    notes, rows = read(table)
    shapes = list(dict.fromkeys((int(row["N"]), int(row["K"])) for row in rows))
    labels = sorted({label(row) for row in rows}, key=lambda text: _order(text))
    styles = {text: _style(text) for text in labels}
    all_rows = sorted({int(row["M"]) for row in rows})
    n_columns = min(MAX_COLUMNS, len(shapes))
    n_rows = math.ceil(len(shapes) / n_columns)
    figure, panels = plt.subplots(
        n_rows,
        n_columns,
        figsize=(PANEL_INCHES[0] * n_columns, PANEL_INCHES[1] * n_rows + 1.2),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    lines: dict[str, Any] = {}
    for panel, (N, K) in zip(panels.flat, shapes, strict=False):
        for text in labels:
            points = sorted(
                (int(row["M"]), float(row["light_fraction"]))
                for row in rows
                if label(row) == text and (int(row["N"]), int(row["K"])) == (N, K)
            )
            if points:
                (lines[text],) = panel.plot(*zip(*points, strict=True), **styles[text])
        panel.set_title(f"N = {N}, K = {K}", fontsize=10)
        panel.set_xscale("log", base=2)
        panel.set_xticks(all_rows, [str(M) for M in all_rows], fontsize=8)
        panel.set_ylim(0, 1.1)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.grid(True, color="#dddddd", linewidth=0.6)
    for panel in list(panels.flat)[len(shapes) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("share of speed of light")
    for panel in panels[-1]:
        panel.set_xlabel("M, rows of x")
    figure.legend(
        list(lines.values()),
        [DOTTED.get(text, text) for text in lines],
        loc="outside lower center",
        ncols=2 * n_columns,
        fontsize=8,
    )
    figure.suptitle(
        "Share of the speed of light: max(own bytes / read ceiling, 2MNK / matmul ceiling) / time\n"
        + (notes[0] if notes else ""),
        fontsize=11,
    )
    figure.savefig(to, dpi=110)
    plt.close(figure)


def _order(text: str) -> tuple[int, str]:
    return list(COLOURS).index(text.split()[0]), text


def _style(text: str) -> dict[str, Any]:
    kernel, *rest = text.split()
    return {
        "color": COLOURS[kernel],
        "linestyle": ":" if kernel in DOTTED else "--" if "g128" in rest else "-",
        "marker": "o" if "z" in rest else ".",
        "markersize": 4,
        "markerfacecolor": "white" if "z" in rest else COLOURS[kernel],
        "linewidth": 1.6 if kernel.startswith(OURS) else 1.2,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="plot_linear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", type=Path, help="CSV of bench_linear")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args(argv)
    draw(args.table, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
