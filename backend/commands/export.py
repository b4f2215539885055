"""``cuda-int4 export``: quantise the model that a function returns, and write a ``.pte``."""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import _native

EXPORT_KEYS = ("model", "example_inputs", "dynamic_shapes", "constant_methods")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``cuda-int4 export``."""
    parser.add_argument(
        "source",
        metavar="FILE.py:FUNCTION",
        help="what makes the model; also PACKAGE.MODULE:FUNCTION",
    )
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="the .pte to write")
    parser.add_argument(
        "--group-size",
        type=int,
        default=128,
        help="weights along K that share a scale: 32, 64, 128, 256, or -1 for one group per row"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        choices=("min_max", "hqq", "none"),
        default="min_max",
        help="how float weights become int4; none: the linears are int4 already"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--asymmetric", action="store_true", help="store a zero point beside each scale"
    )
    parser.add_argument(
        "--layout",
        default="auto",
        help="order of the weights in memory: auto (picks for each weight), coalesced, marlin, or"
        " marlin24, for weights that are 2:4 (default: %(default)s)",
    )
    parser.add_argument(
        "--activation",
        choices=("none", "int8"),
        default="none",
        help="none: 16-bit activations (w4a16); int8: rounded on the fly (w4a8)"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        dest="devices",
        nargs="+",
        choices=_native.DEVICES,
        default=_native.EXPORT_DEVICES,
        help="where the file is to run; an op that one of them lacks stays outside the delegate"
        f" (default: {' '.join(_native.EXPORT_DEVICES)})",
    )
    parser.add_argument(
        "--fusions",
        default="all",
        help="ops made one kernel: all, none, or names of fusions, such as linears,gate_mul"
        " (a wrong name lists them; default: %(default)s)",
    )
    parser.add_argument(
        "--kv-cache",
        choices=["none", "int8"],
        default="none",
        help="int8 keeps keys and values in half of the bytes, with a scale a token and head;"
        " so far for the CPU alone (default: in the model's dtype)",
    )
    parser.add_argument(
        "--external-weights",
        action="store_true",
        help="put the weights into a .ptd beside the .pte",
    )


def export_command(args: argparse.Namespace) -> int:
    """Run ``cuda-int4 export``; returns the exit code."""
    import cuda_int4

    parts = export_parts(load_function(args.source)(), args.source)
    if args.method != "none":
        cuda_int4.quantize_(
            parts["model"],
            cuda_int4.Int4Config(
                group_size=args.group_size,
                symmetric=not args.asymmetric,
                method=args.method,
                layout=args.layout,
                activation=args.activation,
            ),
        )
    path = cuda_int4.export(
        parts.pop("model"),
        parts.pop("example_inputs"),
        args.output,
        layout=args.layout,
        activation=args.activation,
        external_weights=args.external_weights,
        devices=args.devices,
        fusions=args.fusions if args.fusions in ("all", "none") else args.fusions.split(","),
        kv_cache=args.kv_cache,
        **parts,
    )
    summary = cuda_int4.inspect(path)
    n_bytes = sum(weight["nbytes"] for weight in summary["weights"])
    print(
        f"{path}: {len(summary['weights'])} int4 weights, {n_bytes / 1e6:.1f} MB;"
        f" `cuda-int4 inspect {path}` shows them"
    )
    return 0


def load_function(source: str) -> Callable[[], Any]:
    """The function that ``FILE.py:FUNCTION`` or ``PACKAGE.MODULE:FUNCTION`` names.

    Raises:
        ValueError: ``source`` has no colon, or names no file, module or function.
    """
    where, colon, name = source.rpartition(":")
    if not colon:
        raise ValueError(
            f"expected FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, got {source!r};"
            " name the function that returns the model after a colon"
        )
    if where.endswith(".py"):
        path = Path(where).resolve()
        if not path.is_file():
            raise ValueError(f"{where}: no such file")
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(f"{where}: {error}; write FILE.py:FUNCTION for a file") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{where} has no function {name!r}")
    return function


def export_parts(returned: object, source: str) -> dict[str, Any]:
    """What the user's function returned, by name.

    Raises:
        ValueError: it is none of the accepted forms.
    """
    if isinstance(returned, tuple) and 2 <= len(returned) <= 3:
        return dict(zip(EXPORT_KEYS, returned, strict=False))
    if isinstance(returned, dict) and {"model", "example_inputs"} <= returned.keys() <= set(
        EXPORT_KEYS
    ):
        return dict(returned)
    got = sorted(returned) if isinstance(returned, dict) else type(returned).__name__
    raise ValueError(
        f"{source}: expected (model, example_inputs[, dynamic_shapes]) or a dict with keys among"
        f" {', '.join(EXPORT_KEYS)}, got {got}"
    )
