"""Where the scripts lie that are shipped beside the package: examples and benchmarks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from .. import _native


def shipped_folder(name: str) -> Path:
    """The folder ``name`` of a checkout, or of an installed package that has no checkout.

    Args:
        name: such as ``"export_examples/byte_llama"`` or ``"benchmarks"``.

    Raises:
        FileNotFoundError: this install has no such folder.
    """
    checkout = Path(__file__).resolve().parents[2]
    places = (checkout / name, _native.package_dir() / name)
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"expected the folder {name} at {' or at '.join(map(str, places))}, found none; "
            "install the package again"
        )
    return folder


def shipped_script(name: str) -> ModuleType:
    """Import a shipped script such as ``"benchmarks/bench_linear"``.

    Scripts import each other by name, as they do when run: their folder leads the path meanwhile.
    """
    parent, _, stem = name.rpartition("/")
    folder = str(shipped_folder(parent))
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(stem)
    finally:
        sys.path.remove(folder)
