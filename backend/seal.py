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

import mmap
import os
import struct
from typing import Literal

from ._native import checksum

MAGIC = b"CI4SEAL1"
_SEAL = struct.Struct("<8sQII8s")
SEAL_NBYTES = _SEAL.size

SealState = Literal["none", "valid"]


def seal_file(path: str | os.PathLike[str]) -> None:
    """Append a seal to a file and flush it to disk; a file that has one is left as it is.

    Raises:
        ValueError: the file ends in a seal that does not fit it.
    """
    with open(path, "r+b") as file:
        nbytes = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                if check_seal(view, who=os.fspath(path)) == "valid":
                    return
                digest = checksum(view)
            finally:
                view.release()
        file.seek(0, os.SEEK_END)
        file.write(_SEAL.pack(MAGIC, nbytes, digest, 0, MAGIC[::-1]))
        file.flush()
        os.fsync(file.fileno())


def read_seal(path: str | os.PathLike[str]) -> SealState:
    """Verify the seal of a file, over all of its bytes.

    Raises:
        ValueError: the file ends in a seal that does not fit it.
    """
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return "none"
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            view = memoryview(data)
            try:
                return check_seal(view, who=os.fspath(path))
            finally:
                view.release()


def check_seal(data: memoryview, *, who: str) -> SealState:
    """Verify the seal at the end of a file's bytes; ``who`` names the file in the message.

    Raises:
        ValueError: there is a seal, and it does not fit the bytes before it.
    """
    nbytes = len(data) - SEAL_NBYTES
    trailer = bytes(data[max(nbytes, 0) :])
    if nbytes < 0 or (trailer[:8] != MAGIC and trailer[-8:] != MAGIC[::-1]):
        return "none"
    head, sealed_nbytes, digest, zero, tail = _SEAL.unpack(trailer)
    found = checksum(data[:nbytes])
    if (head, sealed_nbytes, digest, zero, tail) != (MAGIC, nbytes, found, 0, MAGIC[::-1]):
        raise ValueError(
            f"{who}: expected a seal over {nbytes} bytes with checksum {found:08x}, got one over "
            f"{sealed_nbytes} with {digest:08x}; the file is truncated or damaged, export it again"
        )
    return "valid"
