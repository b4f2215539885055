"""``cuda-int4 bench``: mounts the scripts of benchmarks/."""

import argparse

from .shipped import shipped_script

_SCRIPTS = {
    "linear": "benchmarks/bench_linear",
    "roofline": "benchmarks/bench_roofline",
    "decode": "benchmarks/bench_decode",
}


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``cuda-int4 bench``: a subcommand for each script."""
    subparsers = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, path in _SCRIPTS.items():
        script = shipped_script(path)
        summary = script.__doc__ or ""
        subparser = subparsers.add_parser(
            name,
            help=summary.splitlines()[0],
            description=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        script.add_arguments(subparser)


def bench_command(args: argparse.Namespace) -> int:
    """Run ``cuda-int4 bench``; returns the exit code."""
    return shipped_script(_SCRIPTS[args.what]).command(args)
