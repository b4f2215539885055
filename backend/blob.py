"""The delegate blob: what ``CudaInt4Backend.preprocess`` returns and the C++ runtime opens.

A fixed header, three tables of records, then an ExecuTorch program of its own (nested). All
numbers are little-endian. Constants are not in it: each record names a key of the named data store.

    offset  type  field
         0  8 B   magic "CUDAINT4"
         8  u32   format_version (1)
        12  u32   checksum of the bytes [16, blob_nbytes)
        16  u64   blob_nbytes
        24  u64   program_offset, a multiple of 16
        32  u64   program_nbytes: the nested program, to the end of the blob
        40  u32   n_constants
        44  u32   n_linears
        48  u32   n_ops
        52  u32   0
        56        constants, then linears, then ops; zeros up to program_offset

    string    u32 nbytes, then utf-8 bytes
    constant  string name, string key, u32 dtype (ScalarType), u32 ndim, u64 sizes[ndim],
              u64 nbytes, u32 alignment, u32 checksum of the bytes
    linear    string name, string layout_tag, string activation, u64 N, u64 K, u64 group_size,
              i32 qdata, scale, zero_point, meta, bias (an index of a constant; -1: none)
    op        string name, as in the nested program's operator table

The C++ reader is ``runtime/blob.cpp``; ``tests/test_blob.py`` holds the bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ._native import checksum

MAGIC = b"CUDAINT4"
FORMAT_VERSION = 1
CONSTANT_ALIGNMENT_BYTES = 16
_PROGRAM_ALIGNMENT_BYTES = 16
_MAX_DIMS = 8
_HEADER = struct.Struct("<8sIIQQQIIII")
_CHECKED_FROM = 16  # the checksum covers all that follows it


@dataclass(frozen=True)
class ConstantRecord:
    """One constant of the nested program; its bytes lie in the named data store under ``key``.

    Attributes:
        name: fully qualified name in the model, e.g. ``"layers.0.wq.weight.qdata"``.
        key: key in the named data store.
        dtype: number of the torch ScalarType.
        sizes: contiguous sizes, in elements.
        nbytes: bytes of the data.
        checksum: ``cuda_int4_checksum`` of the data.
        alignment: bytes that the data's address is a multiple of.
    """

    name: str
    key: str
    dtype: int
    sizes: tuple[int, ...]
    nbytes: int
    checksum: int
    alignment: int = CONSTANT_ALIGNMENT_BYTES


@dataclass(frozen=True)
class LinearRecord:
    """One int4 linear; parts are indices into the blob's constants, -1 where there is none."""

    name: str
    layout_tag: str
    activation: str
    N: int
    K: int
    group_size: int
    qdata: int
    scale: int
    zero_point: int = -1
    meta: int = -1
    bias: int = -1


@dataclass(frozen=True)
class DelegateBlob:
    """The blob, taken apart."""

    constants: tuple[ConstantRecord, ...]
    linears: tuple[LinearRecord, ...]
    ops: tuple[str, ...]
    program: bytes


def pack_blob(blob: DelegateBlob) -> bytes:
    """Serialize a blob, with its checksum."""
    records = bytearray()
    for constant in blob.constants:
        records += _string(constant.name) + _string(constant.key)
        records += struct.pack("<II", constant.dtype, len(constant.sizes))
        records += struct.pack(f"<{len(constant.sizes)}Q", *constant.sizes)
        records += struct.pack("<QII", constant.nbytes, constant.alignment, constant.checksum)
    for linear in blob.linears:
        records += _string(linear.name) + _string(linear.layout_tag) + _string(linear.activation)
        records += struct.pack("<QQQ", linear.N, linear.K, linear.group_size)
        records += struct.pack(
            "<5i",
            linear.qdata,
            linear.scale,
            linear.zero_point,
            linear.meta,
            linear.bias,
        )
    for op in blob.ops:
        records += _string(op)
    records_end = _HEADER.size + len(records)
    program_offset = -(-records_end // _PROGRAM_ALIGNMENT_BYTES) * _PROGRAM_ALIGNMENT_BYTES
    header = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        0,
        program_offset + len(blob.program),
        program_offset,
        len(blob.program),
        len(blob.constants),
        len(blob.linears),
        len(blob.ops),
        0,
    )
    packed = bytearray(header + records + bytes(program_offset - records_end) + blob.program)
    struct.pack_into("<I", packed, 12, checksum(memoryview(packed)[_CHECKED_FROM:]))
    return bytes(packed)


def is_blob(data: bytes | memoryview) -> bool:
    """Whether the bytes start as a delegate blob does."""
    return bytes(data[: len(MAGIC)]) == MAGIC


def unpack_blob(data: bytes | memoryview) -> DelegateBlob:
    """Take a blob apart; the inverse of :func:`pack_blob`.

    Raises:
        ValueError: the bytes are not a delegate blob, of another version, or damaged.
    """
    view = memoryview(data)
    if not is_blob(view):
        raise ValueError(
            f"delegate blob: expected the magic {MAGIC!r}, got {bytes(view[:8])!r}; "
            "it was not written by cuda_int4"
        )
    if len(view) < _HEADER.size:
        raise ValueError(
            f"delegate blob: expected at least {_HEADER.size} bytes, got {len(view)}; "
            "the file is truncated, export it again"
        )
    (_, version, expected_checksum, nbytes, program_offset, program_nbytes, *counts) = (
        _HEADER.unpack_from(view)
    )
    if version != FORMAT_VERSION:
        raise ValueError(
            f"delegate blob: expected format version {FORMAT_VERSION}, got {version}; "
            "export the model again with this version of cuda_int4"
        )
    if nbytes < _HEADER.size or nbytes > len(view):
        raise ValueError(
            f"delegate blob: expected {nbytes} bytes, got {len(view)}; "
            "the file is truncated or damaged, export it again"
        )
    view = view[:nbytes]
    found_checksum = checksum(view[_CHECKED_FROM:])
    if found_checksum != expected_checksum:
        raise ValueError(
            f"delegate blob: expected checksum {expected_checksum:08x}, got {found_checksum:08x}; "
            "the file is damaged, export it again"
        )
    if program_offset % _PROGRAM_ALIGNMENT_BYTES or program_offset + program_nbytes != nbytes:
        raise ValueError(
            f"delegate blob: expected a program that ends at {nbytes}, got offset "
            f"{program_offset} and {program_nbytes} bytes; the file is damaged, export it again"
        )
    n_constants, n_linears, n_ops, _ = counts
    reader = _Reader(view[_HEADER.size : program_offset])
    constants = tuple(reader.constant() for _ in range(n_constants))
    linears = tuple(reader.linear(n_constants) for _ in range(n_linears))
    ops = tuple(reader.string() for _ in range(n_ops))
    return DelegateBlob(constants, linears, ops, bytes(view[program_offset:]))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<I", len(encoded)) + encoded


class _Reader:
    """Reads records front to back; every read is bounded by the table's end."""

    def __init__(self, view: memoryview):
        self._view = view
        self._at = 0

    def take(self, nbytes: int) -> memoryview:
        if nbytes > len(self._view) - self._at:
            raise ValueError(
                f"delegate blob: expected {nbytes} bytes of a record at {self._at}, got "
                f"{len(self._view) - self._at}; the file is damaged, export it again"
            )
        self._at += nbytes
        return self._view[self._at - nbytes : self._at]

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def string(self) -> str:
        (nbytes,) = self.numbers("I")
        try:
            return bytes(self.take(nbytes)).decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                "delegate blob: expected utf-8 in a name; the file is damaged, export it again"
            ) from error

    def constant(self) -> ConstantRecord:
        name, key = self.string(), self.string()
        dtype, ndim = self.numbers("II")
        if ndim > _MAX_DIMS:
            raise ValueError(
                f"delegate blob: {name}: expected at most {_MAX_DIMS} dimensions, got {ndim}; "
                "the file is damaged, export it again"
            )
        sizes = self.numbers(f"{ndim}Q")
        nbytes, alignment, data_checksum = self.numbers("QII")
        return ConstantRecord(name, key, dtype, sizes, nbytes, data_checksum, alignment)

    def linear(self, n_constants: int) -> LinearRecord:
        name, layout_tag, activation = self.string(), self.string(), self.string()
        N, K, group_size = self.numbers("QQQ")
        parts = self.numbers("5i")
        if any(not -1 <= part < n_constants for part in parts):
            raise ValueError(
                f"delegate blob: {name}: expected parts in -1..{n_constants - 1}, got {parts}; "
                "the file is damaged, export it again"
            )
        return LinearRecord(name, layout_tag, activation, N, K, group_size, *parts)
