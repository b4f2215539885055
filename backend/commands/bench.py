"""``cuda-int4 bench``: mounts the scripts of benchmarks/."""

import argparse

from .shipped import shipped_script


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``cuda-int4 bench``."""
    script = shipped_script("benchmarks/bench_linear")
    parser.description = script.__doc__
    parser.add_argument("what", nargs="?", choices=("linear",), default="linear")
    script.add_arguments(parser)


def bench_command(args: argparse.Namespace) -> int:
    """Run ``cuda-int4 bench``; returns the exit code."""
    return shipped_script("benchmarks/bench_linear").command(args)
