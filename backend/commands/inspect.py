"""``cuda-int4 inspect``: what a ``.pte`` holds, as a table or as JSON."""

import argparse
import json
from typing import Any


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``cuda-int4 inspect``."""
    parser.add_argument("path", metavar="MODEL.pte")
    parser.add_argument("--json", action="store_true", help="print cuda_int4.inspect() as JSON")


def inspect_command(args: argparse.Namespace) -> int:
    """Run ``cuda-int4 inspect``; returns the exit code."""
    from cuda_int4.inspection import inspect

    summary = inspect(args.path)
    print(json.dumps(summary, indent=2) if args.json else as_text(summary))
    return 0


def as_text(summary: dict[str, Any]) -> str:
    """The dict of :func:`cuda_int4.inspect` as people read it."""
    return "\n".join(lines(summary))


def lines(summary: dict[str, Any]) -> list[str]:
    """The lines of the text form."""
    raise NotImplementedError
