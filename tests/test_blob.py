"""The delegate blob: its bytes are a contract with runtime/blob.cpp."""

import struct

import pytest
from expecttest import assert_expected_inline

from cuda_int4._native import checksum
from cuda_int4.blob import (
    ConstantRecord,
    DelegateBlob,
    LinearRecord,
    is_blob,
    pack_blob,
    unpack_blob,
)
from messages import folded, message

BLOB = DelegateBlob(
    constants=(
        ConstantRecord("w.qdata", "cuda_int4/coalesced.v1/qdata/00ff", 0, (3, 16), 48, 0x11223344),
        ConstantRecord("w.scale", "cuda_int4/coalesced.v1/scale/01fe", 15, (3, 1), 6, 0x55667788),
        ConstantRecord("θ", "cuda_int4/dense.v1/constant/02fd", 6, (), 4, 7),
    ),
    linears=(LinearRecord("w", "coalesced.v1", "int8", 3, 32, 32, qdata=0, scale=1, bias=2),),
    ops=("cuda_int4::linear.out", "executorch_prim::et_view.default"),
    program=b"nested program",
)


def test_bytes():
    packed = pack_blob(BLOB)
    lines = []
    for start in range(0, len(packed), 16):
        row = packed[start : start + 16]
        shown = "".join(chr(b) if 33 <= b < 127 else "." for b in row)
        lines.append(f"{start:4d}  {row.hex(' ', 4):35}  {shown}")
    assert_expected_inline(
        "\n".join(lines),
        """\
   0  43554441 494e5434 01000000 b310392a  CUDAINT4......9*
  16  be010000 00000000 b0010000 00000000  ................
  32  0e000000 00000000 03000000 01000000  ................
  48  02000000 00000000 07000000 772e7164  ............w.qd
  64  61746121 00000063 7564615f 696e7434  ata!...cuda_int4
  80  2f636f61 6c657363 65642e76 312f7164  /coalesced.v1/qd
  96  6174612f 30306666 00000000 02000000  ata/00ff........
 112  03000000 00000000 10000000 00000000  ................
 128  30000000 00000000 10000000 44332211  0...........D3".
 144  07000000 772e7363 616c6521 00000063  ....w.scale!...c
 160  7564615f 696e7434 2f636f61 6c657363  uda_int4/coalesc
 176  65642e76 312f7363 616c652f 30316665  ed.v1/scale/01fe
 192  0f000000 02000000 03000000 00000000  ................
 208  01000000 00000000 06000000 00000000  ................
 224  10000000 88776655 02000000 ceb82000  .....wfU........
 240  00006375 64615f69 6e74342f 64656e73  ..cuda_int4/dens
 256  652e7631 2f636f6e 7374616e 742f3032  e.v1/constant/02
 272  66640600 00000000 00000400 00000000  fd..............
 288  00001000 00000700 00000100 0000770c  ..............w.
 304  00000063 6f616c65 73636564 2e763104  ...coalesced.v1.
 320  00000069 6e743803 00000000 00000020  ...int8.........
 336  00000000 00000020 00000000 00000000  ................
 352  00000001 000000ff ffffffff ffffff02  ................
 368  00000015 00000063 7564615f 696e7434  .......cuda_int4
 384  3a3a6c69 6e656172 2e6f7574 20000000  ::linear.out....
 400  65786563 75746f72 63685f70 72696d3a  executorch_prim:
 416  3a65745f 76696577 2e646566 61756c74  :et_view.default
 432  6e65 73746564 2070726f 6772616d      nested.program""",
    )


def test_reads_back_what_it_wrote():
    packed = pack_blob(BLOB)
    assert is_blob(packed)
    assert unpack_blob(packed) == BLOB
    assert unpack_blob(memoryview(packed + b"whatever follows in the segment")) == BLOB


def test_nothing_in_it():
    empty = DelegateBlob((), (), (), b"")
    assert len(pack_blob(empty)) == 64
    assert unpack_blob(pack_blob(empty)) == empty


def test_the_program_is_aligned():
    for n_ops in range(20):
        blob = DelegateBlob((), (), ("x",) * n_ops, b"program")
        packed = pack_blob(blob)
        offset = struct.unpack_from("<Q", packed, 24)[0]
        assert offset % 16 == 0 and packed[offset:] == b"program"
        assert unpack_blob(packed) == blob


def resealed(packed: bytearray) -> bytes:
    """With a checksum that fits, as a writer with a bug would have it."""
    struct.pack_into("<I", packed, 12, checksum(bytes(packed[16:])))
    return bytes(packed)


def test_every_flipped_bit_and_every_truncation_is_refused():
    packed = pack_blob(BLOB)
    for byte in range(len(packed)):
        damaged = bytearray(packed)
        damaged[byte] ^= 1 << byte % 8
        with pytest.raises(ValueError, match="delegate blob"):
            unpack_blob(damaged)
        with pytest.raises(ValueError, match="delegate blob"):
            unpack_blob(packed[:byte])


def test_any_byte_changed_under_a_right_checksum_is_read_or_refused():
    packed = pack_blob(BLOB)
    for offset in range(40, len(packed) - len(BLOB.program)):
        damaged = bytearray(packed)
        damaged[offset] = 0xFF
        try:
            unpack_blob(resealed(damaged))
        except ValueError as error:
            assert "delegate blob" in str(error), offset


def test_messages():
    packed = pack_blob(BLOB)

    def changed(offset: int, form: str, value: object) -> bytes:
        copy = bytearray(packed)
        struct.pack_into(form, copy, offset, value)
        return resealed(copy)

    assert_expected_inline(
        folded(
            message(unpack_blob, b"ELF and so on"),
            message(unpack_blob, packed[:20]),
            message(unpack_blob, packed[:-1]),
            message(unpack_blob, changed(8, "<I", 2)),
            message(unpack_blob, packed[:-1] + b"X"),
            message(unpack_blob, changed(24, "<Q", 8)),
            message(unpack_blob, changed(40, "<I", 900)),
            message(unpack_blob, changed(60, "<B", 0xFF)),
        ),
        """\
delegate blob: expected the magic b'CUDAINT4', got b'ELF and '; it was not written by cuda_int4
delegate blob: expected at least 56 bytes, got 20; the file is truncated, export it again
delegate blob: expected 446 bytes, got 445; the file is truncated or damaged, export it again
delegate blob: expected format version 1, got 2; export the model again with this version of
    cuda_int4
delegate blob: expected checksum 2a3910b3, got 66e7152b; the file is damaged, export it again
delegate blob: expected a program that ends at 446, got offset 8 and 14 bytes; the file is
    damaged, export it again
delegate blob: w: expected at most 8 dimensions, got 947154537; the file is damaged, export it
    again
delegate blob: expected utf-8 in a name; the file is damaged, export it again""",
    )
