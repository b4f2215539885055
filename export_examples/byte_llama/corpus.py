"""The byte Llama's text: the Python standard library's source, training and held-out files.

A file is held out if the SHA-256 of its path relative to the library says so, so the split is the
same on every machine and does not depend on what else is installed. Left out altogether:
``site-packages``, generated tables (character encodings, ``pydoc_data``), files that are broken on
purpose (``bad*``) and files with a NUL byte, which marks the start of a document here.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from pathlib import Path

SEPARATOR = 0  # stands before each document: begin and end of text at once
HELD_OUT_PER_MILLE = 30
LEFT_OUT = re.compile(
    r"(^|/)(site-packages|__pycache__|pydoc_data|config-[^/]*)/"
    r"|^encodings/(cp|iso|mac_|koi8|big5|euc|gb|hz|johab|ptcp|kz|tis|hp_|shift|palmos)"
    r"|(^|/)bad[^/]*$|_sysconfigdata"
)


def standard_library() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(path: str) -> bool:
    """Say whether the file at ``path`` (relative, with forward slashes) is kept from training."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % 1000 < HELD_OUT_PER_MILLE


def documents(root: Path, *, held_out: bool) -> dict[str, bytes]:
    """Read one side of the split under ``root``: relative path -> bytes, ordered by path."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if LEFT_OUT.search(path) or is_held_out(path) != held_out:
            continue
        text = file.read_bytes().replace(b"\r\n", b"\n")
        if text.strip() and SEPARATOR not in text:
            found[path] = text
    if not found:
        side = "held-out" if held_out else "training"
        raise ValueError(
            f"corpus: expected {side} Python sources under {root}, found none; pass a Python's Lib"
        )
    return found


def stream(texts: dict[str, bytes]) -> bytes:
    """Join documents into one run of bytes, a separator before each."""
    return b"".join(bytes([SEPARATOR]) + text for text in texts.values())
