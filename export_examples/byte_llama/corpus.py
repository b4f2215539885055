"""The byte Llama's text: the Python standard library's source, in three parts.

``train``; ``validation``, by which training chooses; ``held_out``, on which results are reported.
The SHA-256 of a file's path relative to the library decides, so the split is the same on every
machine and does not depend on what else is installed. Left out altogether:
``site-packages``, generated tables (character encodings, ``pydoc_data``), files that are broken on
purpose (``bad*``) and files with a NUL byte, which marks the start of a document here.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from pathlib import Path

SEPARATOR = 0  # stands before each document: begin and end of text at once
HELD_OUT_PER_MILLE, VALIDATION_PER_MILLE = 30, 20
LEFT_OUT = re.compile(
    r"(^|/)(site-packages|__pycache__|pydoc_data|config-[^/]*)/"
    r"|^encodings/(cp|iso|mac_|koi8|big5|euc|gb|hz|johab|ptcp|kz|tis|hp_|shift|palmos)"
    r"|(^|/)bad[^/]*$|_sysconfigdata"
)


def standard_library() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def part_of(path: str) -> str:
    """Name the part that the file at ``path`` (relative, with forward slashes) belongs to."""
    ticket = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 1000
    if ticket < HELD_OUT_PER_MILLE:
        return "held_out"
    return "validation" if ticket < HELD_OUT_PER_MILLE + VALIDATION_PER_MILLE else "train"


def documents(root: Path, part: str) -> dict[str, bytes]:
    """Read one part of the library under ``root``: relative path -> bytes, ordered by path."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if LEFT_OUT.search(path) or part_of(path) != part:
            continue
        text = file.read_bytes().replace(b"\r\n", b"\n")
        if text.strip() and SEPARATOR not in text:
            found[path] = text
    if not found:
        raise ValueError(
            f"corpus: expected Python sources under {root}, found none; pass a Python's Lib"
        )
    return found


def stream(texts: dict[str, bytes]) -> bytes:
    """Join documents into one run of bytes, a separator before each."""
    return b"".join(bytes([SEPARATOR]) + text for text in texts.values())
