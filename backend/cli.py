"""The ``cuda-int4`` command: export, inspect, run and time int4 programs.

Each subcommand is a pair of functions, ``add_*_arguments(parser)`` and ``*_command(args) -> int``,
kept where the work is done; this file mounts them, and imports them only once they are asked for.
Exit codes: 0 done, 1 the work failed (the reason is on stderr), 2 the command line was wrong,
130 interrupted.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from . import _native


@dataclass(frozen=True)
class Subcommand:
    """Where a subcommand's two functions live, and the line that ``--help`` shows for it."""

    module: str
    summary: str
    epilog: str = ""

    def load(self, name: str) -> tuple[Callable, Callable]:
        """The functions that declare and run subcommand ``name``."""
        module = import_module(f"cuda_int4.{self.module}")
        return getattr(module, f"add_{name}_arguments"), getattr(module, f"{name}_command")


SUBCOMMANDS = {
    "demo": Subcommand(
        "commands.demo",
        "export the byte Llama, decode from it in C++, compare with PyTorch",
    ),
    "export": Subcommand(
        "commands.export",
        "quantise a model to int4 and write a .pte",
        epilog="""\
FUNCTION takes no arguments and returns what torch.export needs:
  (model, example_inputs), (model, example_inputs, dynamic_shapes), or
  a dict with these names and, if you like, constant_methods.

examples:
  cuda-int4 export my_model.py:make --group-size 32 -o my_model.pte
  cuda-int4 export my_package.models:tiny --method hqq --activation int8 -o tiny.pte
  cuda-int4 export my_model.py:make --external-weights -o my_model.pte   # and my_model.ptd
""",
    ),
    "run": Subcommand(
        "commands.run",
        "generate text from a .pte with the C++ decode loop",
        epilog="""\
examples:
  cuda-int4 run byte_llama.pte --tokenizer bytes --prompt 'def main():' --max-new 200
  cuda-int4 run llama.pte --tokenizer tokenizer.json --prompt 'Once upon a time' --temperature 0.8
""",
    ),
    "inspect": Subcommand(
        "commands.inspect",
        "show what is in a .pte: int4 weights, layouts, ops, what stayed outside and why",
    ),
    "bench": Subcommand(
        "commands.bench",
        "time the int4 kernels beside PyTorch's, and decoding from models of real shapes",
        epilog="""\
examples:
  cuda-int4 bench linear --device cpu
  cuda-int4 bench linear --model llama-3-8b --rows 1 16 256 --out linear.csv --plot linear.png
  cuda-int4 bench decode --model llama-3-8b --out decode.csv
""",
    ),
}


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser; only the ``chosen`` subcommand's arguments are declared (and its module loaded).

    Args:
        chosen: the name of the subcommand on the command line, or None.
    """
    parser = argparse.ArgumentParser(
        prog="cuda-int4",
        description="int4 weights for ExecuTorch: export on any machine, run from C++ or Python.",
        epilog="Try `cuda-int4 demo` first, then `cuda-int4 COMMAND --help`.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, subcommand in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=subcommand.summary,
            description=subcommand.summary[0].upper() + subcommand.summary[1:] + ".",
            epilog=subcommand.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            add_arguments, run = subcommand.load(name)
            add_arguments(subparser)
            subparser.set_defaults(run=run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in argv if word in SUBCOMMANDS), None)
    parser = build_parser(chosen)
    args = parser.parse_args(argv)
    if args.version:
        from cuda_int4 import __version__

        print(f"cuda-int4 {__version__}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    try:
        if not getattr(args, "verbose", False):
            _be_quiet()
        return args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ImportError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        print(f"cuda-int4 {args.command}: {error}", file=sys.stderr)
        return 1


def _be_quiet() -> None:
    """Keep what ExecuTorch, torch and torchao log about themselves out of the user's terminal."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="`isinstance\\(treespec", category=FutureWarning)
    _native.library().keep_log_quiet()


if __name__ == "__main__":
    sys.exit(main())
