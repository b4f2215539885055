"""``cuda-int4 inspect``: what a ``.pte`` holds, as tables or as JSON."""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``cuda-int4 inspect``."""
    parser.add_argument("path", metavar="MODEL.pte")
    parser.add_argument("--json", action="store_true", help="print cuda_int4.inspect() as JSON")


def inspect_command(args: argparse.Namespace) -> int:
    """Run ``cuda-int4 inspect``; returns the exit code."""
    from ..inspection import inspect

    summary = inspect(args.path)
    print(json.dumps(summary, indent=2) if args.json else "\n".join(as_lines(summary)))
    return 0


def as_lines(summary: dict[str, Any]) -> Iterator[str]:
    """The dict of :func:`cuda_int4.inspect` as people read it."""
    seal = {"valid": "sealed", "none": "no seal"}
    yield f"{summary['path']}: {megabytes(summary['nbytes'])}, {seal[summary['seal']]}"
    for file in summary["data_files"]:
        yield f"{file['path']}: {megabytes(file['nbytes'])}, {seal[file['seal']]}"
    for name, value in summary["constant_methods"].items():
        yield f"  {name}: {value}"

    weights = summary["weights"]
    n_bytes = sum(weight["nbytes"] for weight in weights)
    yield ""
    yield f"int4 weights: {len(weights)}, {megabytes(n_bytes)}"
    columns = ("name", "N", "padded_N", "K", "group_size", "layout_tag", "activation", "nbytes")
    header = (*columns, "bits_per_weight")
    rows = [
        (*(str(weight[column]) for column in columns), f"{weight['bits_per_weight']:.3f}")
        for weight in weights
    ]
    yield from table(header, rows)

    yield ""
    yield "ops in the delegate:"
    yield from table(("calls", "op"), [(str(n), op) for op, n in summary["ops"].items()])
    yield ""
    for device, lacking in summary["devices"].items():
        yield f"on {device}: " + (f"no kernel for {', '.join(lacking)}" if lacking else "every op")
    yield ""
    if not summary["outside"]:
        yield "outside the delegate: nothing"
        return
    yield "outside the delegate:"
    counts = Counter((entry["op"], entry["reason"]) for entry in summary["outside"])
    rows = [(str(n), op, reason) for (op, reason), n in counts.items()]
    yield from table(("nodes", "op", "why"), rows)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Lines with the columns aligned: numbers to the right, words to the left."""
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(is_number(row[i]) for row in rows) for i in range(len(header))]
    for row in cells:
        aligned = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        )
        yield ("  " + "  ".join(aligned)).rstrip()


def is_number(text: str) -> bool:
    """Whether a cell holds digits and a point only."""
    return text.replace(".", "", 1).isdigit()


def megabytes(n_bytes: int) -> str:
    """A size in units of 1,000,000 bytes."""
    return f"{n_bytes / 1e6:.2f} MB"
