"""Files that must not run: a good .pte, changed on purpose, with every checksum made right again.

``Forge`` exports a model once, with room behind its delegate blob, and rewrites the blob in place;
``REFUSALS`` are the changes, each with the code and the words of its refusal. The Python and the
C++ tests share them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import delegate_models as models
from cuda_int4 import _native, preprocess
from cuda_int4.blob import DelegateBlob, LinearRecord, pack_blob, unpack_blob
from cuda_int4.marlin_layouts import marlin24_meta_bit_offset
from cuda_int4.pte_file import ExecutorchFile
from cuda_int4.seal import SEAL_NBYTES, seal_file

ROOM_NBYTES = 4096
INVALID_PROGRAM, INVALID_EXTERNAL_DATA, INCOMPATIBLE = 0x23, 0x24, 0x30


class Forge:
    """One exported model, and variants of it.

    Attributes:
        path: the good file, sealed.
        blob: its delegate blob, taken apart.
    """

    def __init__(self, folder: Path, model: Any, inputs: tuple[Any, ...], shapes: Any = None):
        """Export with ROOM_NBYTES of zeros behind the blob, which readers do not look at."""
        folder.mkdir(exist_ok=True)
        self.folder, self.n_forged = folder, 0
        with mock.patch.object(
            preprocess, "pack_blob", lambda blob: pack_blob(blob) + bytes(ROOM_NBYTES)
        ):
            self.path = models.write(model, folder / "good.pte", inputs, shapes)
        data = self.path.read_bytes()
        assert data.count(b"CUDAINT4") == 1
        self.blob_offset = data.index(b"CUDAINT4")
        (self.blob_nbytes,) = struct.unpack_from("<Q", data, self.blob_offset + 16)
        self.blob = unpack_blob(data[self.blob_offset :][: self.blob_nbytes])

    def with_blob(self, blob: bytes, *, sealed: bool = True) -> Path:
        """The file with other bytes for its blob."""
        assert len(blob) <= self.blob_nbytes + ROOM_NBYTES
        data = bytearray(self.path.read_bytes()[:-SEAL_NBYTES])
        room = self.blob_nbytes + ROOM_NBYTES
        data[self.blob_offset : self.blob_offset + room] = blob.ljust(room, b"\0")
        return self.with_bytes(data, sealed=sealed)

    def with_bytes(self, data: bytes | bytearray, *, sealed: bool) -> Path:
        """A file of these bytes."""
        self.n_forged += 1
        path = self.folder / f"forged{self.n_forged}.pte"
        path.write_bytes(data)
        if sealed:
            seal_file(path)
        return path

    def change(self, changed: Callable[[DelegateBlob], DelegateBlob | bytes]) -> Path:
        """The file with ``changed(blob)``, its checksum right."""
        blob = changed(self.blob)
        return self.with_blob(blob if isinstance(blob, bytes) else pack_blob(blob))


def linear(blob: DelegateBlob, **fields: Any) -> DelegateBlob:
    """The first linear's record with other fields."""
    first, *others = blob.linears
    return replace(blob, linears=(replace(first, **fields), *others))


def part(blob: DelegateBlob, name: str, **fields: Any) -> DelegateBlob:
    """The record of one constant, by the end of its name, with other fields."""
    index = [constant.name.endswith(name) for constant in blob.constants].index(True)
    constants = list(blob.constants)
    constants[index] = replace(constants[index], **fields)
    return replace(blob, constants=tuple(constants))


def with_metadata(forge: Forge, n: int, k: int, value: int) -> Path:
    """The file of a marlin24.v1 weight with other places for weights k .. k + 3 of row n.

    Every checksum is made right.
    """
    data = bytearray(forge.path.read_bytes()[:-SEAL_NBYTES])
    record = forge.blob.linears[0]
    constant = forge.blob.constants[record.meta]
    with ExecutorchFile(forge.path) as file:
        meta = bytearray(file.named_data[constant.key])
    first = data.index(meta)
    assert data.count(meta) == 1
    word, shift = divmod(marlin24_meta_bit_offset(n, k, record.N, record.K), 16)
    old = int.from_bytes(meta[2 * word : 2 * word + 2], "little")
    new = old & ~(15 << shift) | value << shift
    meta[2 * word : 2 * word + 2] = new.to_bytes(2, "little")
    data[first : first + len(meta)] = meta
    constants = list(forge.blob.constants)
    constants[record.meta] = replace(constant, checksum=_native.checksum(bytes(meta)))
    blob = pack_blob(replace(forge.blob, constants=tuple(constants)))
    data[forge.blob_offset : forge.blob_offset + len(blob)] = blob
    return forge.with_bytes(data, sealed=True)


def header(at: int, form: str, value: Any) -> Callable[[DelegateBlob], bytes]:
    """A field of the blob's header set to ``value``; the checksum is made right."""

    def changed(blob: DelegateBlob) -> bytes:
        data = bytearray(pack_blob(blob))
        struct.pack_into(form, data, at, value)
        struct.pack_into("<I", data, 12, _native.checksum(memoryview(data)[16:]))
        return bytes(data)

    return changed


def no_scale(record: LinearRecord) -> LinearRecord:
    return replace(record, scale=-1)


@dataclass(frozen=True)
class Refusal:
    """A change, and the code and words with which it is refused at load."""

    name: str
    changed: Callable[[DelegateBlob], DelegateBlob | bytes]
    code: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return self.name


# Of models.Linear(): proj.weight [48, 64], group_size 32, with zero points and bias.
REFUSALS = [
    Refusal(
        "plain layout",
        lambda b: linear(b, layout_tag="plain.v1"),
        INCOMPATIBLE,
        ("proj.weight", "expected packed weights (coalesced.v1, ", '"plain.v1"', "export"),
    ),
    Refusal(
        "unknown layout",
        lambda b: linear(b, layout_tag="zigzag.v1"),
        INCOMPATIBLE,
        ("proj.weight", "coalesced.v1", '"zigzag.v1"', "export"),
    ),
    Refusal(
        "older layout",
        lambda b: linear(b, layout_tag="coalesced.v0"),
        INCOMPATIBLE,
        ("proj.weight", "expected layout coalesced.v1", 'older "coalesced.v0"', "export"),
    ),
    Refusal(
        "newer layout",
        lambda b: linear(b, layout_tag="coalesced.v2"),
        INCOMPATIBLE,
        ("proj.weight", "expected layout coalesced.v1", 'newer "coalesced.v2"', "update"),
    ),
    Refusal(
        "no layout",
        lambda b: linear(b, layout_tag=""),
        INCOMPATIBLE,
        ("proj.weight", "expected a layout tag", "got none"),
    ),
    Refusal(
        "layout of the header only",
        lambda b: linear(b, activation="int8"),
        INCOMPATIBLE,
        ("proj.weight", "activation int8", "as in the header", "none and 32", "damaged"),
    ),
    Refusal(
        "unknown activation",
        lambda b: linear(b, activation="int3"),
        INVALID_PROGRAM,
        ("proj.weight", '"int3"'),
    ),
    Refusal(
        "scale of the old order",
        lambda b: part(b, "scale", sizes=(2, 48)),
        INVALID_PROGRAM,
        ("proj.weight", "scale", "[48, 2]", "[2, 48]"),
    ),
    Refusal(
        "scale of another dtype",
        lambda b: part(b, "scale", dtype=3),
        INVALID_PROGRAM,
        ("proj.weight", "scale", "int32"),
    ),
    Refusal(
        "qdata of another dtype",
        lambda b: part(b, "qdata", dtype=1),
        INVALID_PROGRAM,
        ("proj.weight", "qdata", "uint8", "int8"),
    ),
    Refusal(
        "qdata of another shape",
        lambda b: part(b, "qdata", sizes=(48, 32, 1)),
        INVALID_PROGRAM,
        ("proj.weight", "qdata", "[48, 32, 1]"),
    ),
    Refusal(
        "bias of another shape",
        lambda b: part(b, "bias", sizes=(24, 2)),
        INVALID_PROGRAM,
        ("proj.weight", "bias", "[48]", "[24, 2]"),
    ),
    Refusal(
        "another N",
        lambda b: linear(b, N=47),
        INVALID_PROGRAM,
        ("proj.weight", "expected out_features 48", "got 47", "pack it again"),
    ),
    Refusal(
        "another group size",
        lambda b: linear(b, group_size=64),
        INVALID_PROGRAM,
        ("proj.weight", "scale"),
    ),
    Refusal(
        "a dimension of zero",
        lambda b: linear(b, K=0),
        INVALID_PROGRAM,
        ("proj.weight", "expected N, K and group_size in 1..2147483647", "K=0"),
    ),
    Refusal(
        "a dimension beyond int32",
        lambda b: linear(b, N=1 << 40),
        INVALID_PROGRAM,
        ("proj.weight", "N=1099511627776"),
    ),
    Refusal(
        "a byte count that is not the shape's",
        lambda b: part(b, "qdata", nbytes=48 * 32 - 1),
        INVALID_PROGRAM,
        ("proj.weight.qdata", "expected 1536 bytes for its sizes, got 1535"),
    ),
    Refusal(
        "a missing constant",
        lambda b: part(b, "qdata", key="cuda_int4/coalesced.v1/qdata/0123"),
        INVALID_EXTERNAL_DATA,
        (
            "proj.weight.qdata",
            "expected key cuda_int4/coalesced.v1/qdata/0123",
            "found no such key",
            "give the .ptd",
        ),
    ),
    Refusal(
        "another constant's bytes",
        lambda b: part(b, "scale", key=[c.key for c in b.constants if "zero" in c.name][0]),
        INVALID_PROGRAM,
        ("proj.weight", "whose key it has"),
    ),
    Refusal(
        "an address that is not aligned",
        lambda b: part(b, "qdata", alignment=4096),
        INVALID_EXTERNAL_DATA,
        ("proj.weight.qdata", "expected an address that is a multiple of 4096"),
    ),
    Refusal(
        "an alignment that is none",
        lambda b: part(b, "qdata", alignment=3),
        INVALID_PROGRAM,
        ("proj.weight.qdata", "expected an alignment of 1, 2, 4", "got 3"),
    ),
    Refusal(
        "a dtype that is none",
        lambda b: part(b, "qdata", dtype=99),
        INVALID_PROGRAM,
        ("proj.weight.qdata", "expected a known dtype, got number 99"),
    ),
    Refusal(
        "nine dimensions",
        lambda b: part(b, "qdata", sizes=(48, 32, 1, 1, 1, 1, 1, 1, 1)),
        INVALID_PROGRAM,
        ("proj.weight.qdata", "expected at most 8 dimensions, got 9"),
    ),
    Refusal(
        "sizes whose product overflows",
        lambda b: part(b, "qdata", sizes=(2**31 - 1,) * 4),
        INVALID_PROGRAM,
        ("proj.weight.qdata", "expected sizes below 2^31"),
    ),
    Refusal(
        "a part that is no constant",
        lambda b: linear(b, scale=99),
        INVALID_PROGRAM,
        ("proj.weight", "expected its parts among the", "got number 99"),
    ),
    Refusal(
        "a weight without scale",
        lambda b: replace(b, linears=(no_scale(b.linears[0]),)),
        INVALID_PROGRAM,
        ("proj.weight", "expected qdata and scale, got none"),
    ),
    Refusal(
        "a weight that the header leaves out",
        lambda b: replace(b, linears=()),
        INVALID_PROGRAM,
        ("expected the weight of every int4 linear in the header", "coalesced.v1/qdata"),
    ),
    Refusal(
        "an op that this runtime lacks",
        lambda b: replace(b, ops=(*b.ops, "cuda_int4::fft.out")),
        INCOMPATIBLE,
        ("op cuda_int4::fft.out", "device cpu", "export again"),
    ),
    Refusal(
        "an op that was not renamed",
        lambda b: replace(b, ops=(*b.ops, "aten::mul.out")),
        INCOMPATIBLE,
        ("op aten::mul.out",),
    ),
    Refusal(
        "an op that the header leaves out",
        lambda b: replace(b, ops=()),
        INVALID_PROGRAM,
        ("expected only ops that the header lists, found cuda_int4::linear.out",),
    ),
    Refusal(
        "a nested program that is none",
        lambda b: replace(b, program=bytes(len(b.program))),
        INVALID_PROGRAM,
        ("nested program", "export it again"),
    ),
    Refusal(
        "another magic",
        header(0, "<8s", b"CUDAINT5"),
        INVALID_PROGRAM,
        ("expected the magic CUDAINT4",),
    ),
    Refusal(
        "a newer blob",
        header(8, "<I", 2),
        INCOMPATIBLE,
        ("expected format version 1, got 2", "export the model again"),
    ),
    Refusal(
        "a blob longer than its segment",
        header(16, "<Q", 1 << 60),
        INVALID_PROGRAM,
        ("delegate blob: expected 1152921504606846976 bytes",),
    ),
    Refusal(
        "a program outside the blob",
        header(24, "<Q", 1 << 40),
        INVALID_PROGRAM,
        ("the nested program does not fill its end",),
    ),
    Refusal(
        "more constants than bytes",
        header(40, "<I", 0xFFFFFFFF),
        INVALID_PROGRAM,
        ("more records than it has bytes for",),
    ),
    Refusal("more linears", header(44, "<I", 2), INVALID_PROGRAM, ("delegate blob", "damaged")),
    Refusal("more ops", header(48, "<I", 9), INVALID_PROGRAM, ("an op's name is cut off",)),
]
