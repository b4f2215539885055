"""Opens a ``.pte`` or ``.ptd`` without loading its data: the program, and views of its segments.

What lies where is in ExecuTorch's headers, 8 bytes into the file:

    .pte  "eh00", u32 length, u64 program_nbytes, u64 segments_offset, u64 segments_nbytes
    .ptd  "FH01", u32 length, u64 flatbuffer_offset, u64 flatbuffer_nbytes,
          u64 segments_offset, u64 segments_nbytes

Behind the last segment comes nothing, or a seal (seal.py). A sealed file is verified whole before
anything in it is parsed.

The two parsers called here are private APIs of executorch 1.5.1: ``_flatbuffer_to_program`` and
``_deserialize_to_flat_tensor``.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from types import TracebackType
from typing import Any

from .seal import SEAL_NBYTES, SealState, read_seal

_PTE_IDENTIFIER, _PTD_IDENTIFIER = b"ET12", b"FT01"
_HEADER_OFFSET = 8
_PTE_HEADER = struct.Struct("<4sIQQQ")
_PTD_HEADER = struct.Struct("<4sIQQQQ")


class ExecutorchFile:
    """An open ``.pte`` or ``.ptd``; a context manager.

    Attributes:
        path: as it was given.
        nbytes: size of the file, seal included.
        seal: ``"valid"`` or ``"none"``.
        program: ``executorch.exir.schema.Program`` of a ``.pte``; None for a ``.ptd``.
        named_data: view of each named data entry, by key.

    Raises:
        ValueError: not a file of this kind, truncated, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Open, verify the seal, read the program; no named data is touched but by the seal."""
        self.path = os.fspath(path)
        self._file = open(path, "rb")  # noqa: SIM115  closed by close()
        try:
            self.nbytes = os.fstat(self._file.fileno()).st_size
            if self.nbytes < _HEADER_OFFSET + _PTD_HEADER.size:
                self._fail(
                    f"expected a .pte or .ptd file, got {self.nbytes} bytes; it is truncated"
                )
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
            self._data = memoryview(self._map)
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        identifier = bytes(self._data[4:8])
        if identifier not in (_PTE_IDENTIFIER, _PTD_IDENTIFIER):
            self._fail(
                f"expected an ExecuTorch program (.pte) or data file (.ptd), got a file that has "
                f"{identifier!r} at byte 4"
            )
        self.seal: SealState = read_seal(self.path)
        is_program = identifier == _PTE_IDENTIFIER
        header = _PTE_HEADER if is_program else _PTD_HEADER
        magic, _, *fields = header.unpack_from(self._data, _HEADER_OFFSET)
        if magic != (b"eh00" if is_program else b"FH01"):
            self._fail("expected ExecuTorch's extended header at byte 8; it is damaged")
        offset = 0 if is_program else fields.pop(0)
        flatbuffer_nbytes, self._segments_offset, segments_nbytes = fields
        end = self._segments_offset + segments_nbytes if segments_nbytes else flatbuffer_nbytes
        expected = end + (SEAL_NBYTES if self.seal == "valid" else 0)
        if expected != self.nbytes or offset + flatbuffer_nbytes > end:
            self._fail(f"expected {expected} bytes, got {self.nbytes}; it is truncated or damaged")
        self._segments_end = end
        # A .ptd's offset is that of the root table; flatbuffers count from the start of the file.
        flatbuffer = bytes(self._data[: offset + flatbuffer_nbytes])
        parsed = (parse_program if is_program else _parse_flat_tensor)(flatbuffer, who=self.path)
        self.program = parsed if is_program else None
        self._segments = [(segment.offset, segment.size) for segment in parsed.segments]
        self.named_data = {
            entry.key: self.segment(entry.segment_index) for entry in parsed.named_data or ()
        }

    def segment(self, index: int) -> memoryview:
        """The bytes of a segment; not copied."""
        if not 0 <= index < len(self._segments):
            self._fail(
                f"expected a segment below {len(self._segments)}, got {index}; it is damaged"
            )
        offset, nbytes = self._segments[index]
        begin = self._segments_offset + offset
        if begin + nbytes > self._segments_end:
            self._fail(f"segment {index} ends behind the file; it is truncated or damaged")
        return self._data[begin : begin + nbytes]

    def _fail(self, reason: str) -> None:
        raise ValueError(f"{self.path}: {reason}; export it again")

    def close(self) -> None:
        """Close the file; views that are still held keep the mapping alive."""
        self._file.close()

    def __enter__(self) -> ExecutorchFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def parse_program(flatbuffer: bytes, *, who: str) -> Any:
    """The ``executorch.exir.schema.Program`` in a flatbuffer; ``who`` names it in the message.

    Raises:
        ValueError: it cannot be read.
    """
    from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program

    return _guarded(_flatbuffer_to_program, flatbuffer, who)


def _parse_flat_tensor(flatbuffer: bytes, *, who: str) -> Any:
    from executorch.extension.flat_tensor.serialize.serialize import _deserialize_to_flat_tensor

    return _guarded(_deserialize_to_flat_tensor, flatbuffer, who)


def _guarded(parser: Callable[[bytes], Any], flatbuffer: bytes, who: str) -> Any:
    try:
        return parser(flatbuffer)
    except Exception as error:  # whatever a parser without checks of its own trips over
        raise ValueError(
            f"{who}: the flatbuffer cannot be read ({type(error).__name__}: {error}); the file is "
            "damaged, export it again"
        ) from error
