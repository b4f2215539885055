"""The seal: a 32-byte trailer that lets a loader see any damage to a whole file before parsing it.

    offset  type  field
         0  8 B   magic "CI4SEAL1"
         8  u64   sealed_nbytes: size of the file without the trailer
        16  u32   cuda_int4_checksum of the bytes [0, sealed_nbytes)
        20  u32   0
        24  8 B   the magic backwards

It follows the last byte that ExecuTorch's own headers account for, in a ``.pte`` and in a ``.ptd``;
ExecuTorch does not look there, so a sealed file loads in a stock runtime as well.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO, Literal

from ._native import checksum

MAGIC = b"CI4SEAL1"
_SEAL = struct.Struct("<8sQII8s")
SEAL_NBYTES = _SEAL.size
# A file is read in parts, a multiple of 4 MiB: a mapping would count as memory of the process.
_PART_NBYTES = 16 << 20

SealState = Literal["none", "valid"]


def seal_file(path: str | os.PathLike[str]) -> None:
    """Append a seal to a file and flush it to disk; a file that has one is left as it is.

    Raises:
        ValueError: the file ends in a seal that does not fit it.
    """
    with open(path, "r+b") as file:
        if _read_seal(file, who=os.fspath(path)) == "valid":
            return
        nbytes = file.seek(0, os.SEEK_END)
        seal = _SEAL.pack(MAGIC, nbytes, _checksum(file, nbytes), 0, MAGIC[::-1])
        file.seek(0, os.SEEK_END)
        file.write(seal)
        file.flush()
        os.fsync(file.fileno())


def read_seal(path: str | os.PathLike[str]) -> SealState:
    """Verify the seal of a file, over all of its bytes.

    Raises:
        ValueError: the file ends in a seal that does not fit it.
    """
    with open(path, "rb") as file:
        return _read_seal(file, who=os.fspath(path))


def _read_seal(file: BinaryIO, *, who: str) -> SealState:
    nbytes = file.seek(0, os.SEEK_END) - SEAL_NBYTES
    file.seek(max(nbytes, 0))
    trailer = file.read(SEAL_NBYTES)
    if nbytes < 0 or (trailer[:8] != MAGIC and trailer[-8:] != MAGIC[::-1]):
        return "none"
    head, sealed_nbytes, digest, zero, tail = _SEAL.unpack(trailer)
    found = _checksum(file, nbytes)
    if (head, sealed_nbytes, digest, zero, tail) != (MAGIC, nbytes, found, 0, MAGIC[::-1]):
        raise ValueError(
            f"{who}: expected a seal over {nbytes} bytes with checksum {found:08x}, got one over "
            f"{sealed_nbytes} with {digest:08x}; the file is truncated or damaged, export it again"
        )
    return "valid"


def _checksum(file: BinaryIO, nbytes: int) -> int:
    """Of the first ``nbytes`` of a file; little of it is in memory at a time."""
    file.seek(0)
    part = bytearray(min(_PART_NBYTES, nbytes))
    digest = 0
    while nbytes > 0:
        view = memoryview(part)[: min(nbytes, len(part))]
        n_read = file.readinto(view)  # type: ignore[attr-defined]
        if n_read != len(view):
            raise OSError(f"{file.name}: expected {len(view)} more bytes, got {n_read}")
        digest = checksum(view, digest)
        nbytes -= n_read
    return digest
