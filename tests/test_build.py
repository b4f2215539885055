"""The package as built: versions, run path, the C interface, the checksum, the op table."""

from __future__ import annotations

import ctypes
import importlib.metadata
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import cuda_int4
from cuda_int4 import _native

PIECE = 4 << 20


def crc32c(data: bytes) -> int:
    """CRC-32C by its definition, a bit table and a loop."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _table()


def checksum(data: bytes) -> int:
    """The checksum by its definition: CRC-32C of the pieces' CRC-32Cs."""
    pieces = [data[i : i + PIECE] for i in range(0, len(data), PIECE)]
    return crc32c(b"".join(crc32c(piece).to_bytes(4, "little") for piece in pieces))


def pattern(nbytes: int) -> bytes:
    """Bytes that repeat at no power of two."""
    return bytes((i * 131 + (i >> 8) * 17) & 0xFF for i in range(nbytes))


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, appendix B.4
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
    ],
)
def test_the_definition_agrees_with_the_rfc(data, expected):
    assert crc32c(data) == expected


@pytest.mark.parametrize("nbytes", [0, 1, 7, 8, 9, 63, 64, 4095, 16383, 16384, 16385, 100_003])
def test_checksum_of_one_piece(nbytes):
    data = pattern(nbytes)
    assert _native.checksum(data) == checksum(data)
    assert _native.checksum(bytearray(data)) == checksum(data)


@pytest.mark.parametrize("extra", [0, 1])
def test_checksum_at_the_border_of_a_piece(extra):
    data = (bytes(range(256)) * (PIECE // 256)) + b"x" * extra
    assert _native.checksum(data) == checksum(data)


def test_checksum_of_many_pieces_depends_on_each():
    data = bytearray(pattern(1 << 12) * ((300 * PIECE) >> 12))  # more than one batch of pieces
    whole = _native.checksum(data)
    for at in (0, 255 * PIECE - 1, 256 * PIECE, len(data) - 1):
        data[at] ^= 1
        assert _native.checksum(data) != whole
        data[at] ^= 1
    assert _native.checksum(data) == whole


def test_checksum_at_every_alignment():
    data = bytearray(pattern(20_000))
    for at in range(9):
        assert _native.checksum(memoryview(data)[at:]) == checksum(bytes(data[at:]))


def test_versions_agree():
    assert _native.library().version().decode() == cuda_int4.__version__
    assert importlib.metadata.version("executorch-cuda-int4") == cuda_int4.__version__


def test_the_library_needs_no_torch():
    code = (
        "import sys, cuda_int4._native as n; n.library(); n.checksum(b'x'); "
        "assert 'torch' not in sys.modules and 'executorch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_run_path_is_relative_to_the_package():
    library = _native.package_dir() / "lib" / "libcuda_int4.so"
    data = library.read_bytes()
    assert b"\0$ORIGIN/../../executorch/lib\0" in data
    decode = (_native.package_dir() / "bin" / "cuda-int4-decode").read_bytes()
    assert b"\0$ORIGIN/../lib:$ORIGIN/../../executorch/lib\0" in decode


def test_structs_have_the_sizes_that_c_gives_them():
    """Offsets follow from the fields; tests/cpp/structs.cpp prints what the compiler says."""
    view = ctypes.sizeof(_native.TensorView)
    assert view == 152
    assert ctypes.sizeof(_native.LinearArgs) == 7 * view + 5 * 8
    assert ctypes.sizeof(_native.AttentionArgs) == 8 * view + 40
    assert ctypes.sizeof(_native.RmsNormArgs) == 3 * view + 8
    assert ctypes.sizeof(_native.SiluArgs) == 2 * view
    assert ctypes.sizeof(_native.AddRmsNormArgs) == 6 * view + 8
    assert ctypes.sizeof(_native.GateMulArgs) == 2 * view + 8
    assert ctypes.sizeof(_native.RopeAppendArgs) == 11 * view + 24


def test_no_device_has_cuda_kernels_here_without_saying_so():
    library = _native.library()
    assert library.cuda_available() in (0, 1)
    assert library.cuda_available() <= library.cuda_built()


def test_op_table_holds_what_a_decoder_and_an_encoder_need():
    ops = _native.supported_ops("cpu")
    ours = {"linear.out", "attention.out", "rms_norm.out", "silu.out"}
    ours |= {"add_rms_norm.out", "gate_mul.out", "rope_append.out"}
    assert {name for name in ops if name.startswith("cuda_int4::")} == {
        f"cuda_int4::{name}" for name in ours
    }
    needed = """add.out mul.out sub.out div.out neg.out rsqrt.out pow.Tensor_Scalar_out sin.out
        cos.out exp.out sigmoid.out gelu.out tanh.out where.self_out eq.Scalar_out le.Tensor_out
        logical_and.out bitwise_and.Tensor_out sum.IntList_out mean.out amax.out argmax.out
        topk.values _softmax.out _log_softmax.out mm.out bmm.out addmm.out linear.out
        native_layer_norm.out embedding.out index.Tensor_out index_put_ index_put.out
        index_select.out gather.out scatter.src_out cat.out slice_copy.Tensor_out
        select_copy.int_out expand_copy.out permute_copy.out transpose_copy.int_out view_copy.out
        squeeze_copy.dims_out unsqueeze_copy.out split_with_sizes_copy.out clone.out _to_copy.out
        arange.start_out full.out full_like.out scalar_tensor.out cumsum.out convolution.out copy_
        repeat.out constant_pad_nd.out tril.out slice_scatter.out maximum.out minimum.out
        clamp.out sym_size.int"""
    assert {f"aten::{name}" for name in needed.split()} <= ops
    assert "executorch_prim::add.Scalar" in ops
    assert "dim_order_ops::_to_dim_order_copy.out" in ops
    # Never taken: random numbers, shapes that hang on data.
    assert not {"aten::rand.out", "aten::nonzero.out", "aten::native_dropout.out"} & ops


def test_every_listed_op_has_a_kernel():
    """The table leaves out what is not registered: a renamed kernel would drop out silently."""
    source = (Path(__file__).parents[1] / "backend/runtime/forwarded_ops.cpp").read_text()
    table = source[source.index("kAtenOps[] = {") : source.index("kDimOrderOps[]")]
    listed = re.findall(r'\{"([\w.]+)",\s*"', table)
    assert len(listed) > 150 and len(set(listed)) == len(listed)
    assert {f"aten::{name}" for name in listed} <= _native.supported_ops("cpu")


def test_device_names():
    cpu, cuda = map(_native.supported_ops, ("cpu", "cuda"))
    assert {"cuda_int4::linear.out", "executorch_prim::et_view.default"} <= cuda <= cpu
    # It copies tensor data on the host.
    assert "executorch_prim::et_copy_index.tensor" in cpu - cuda
    with pytest.raises(ValueError, match='expected device "cpu" or "cuda", got \'tpu\''):
        _native.supported_ops("tpu")


def test_zlib_is_another_polynomial():
    """CRC-32 and CRC-32C are easily mixed up; a file sealed with the wrong one must not pass."""
    assert zlib.crc32(b"123456789") != crc32c(b"123456789")


def test_the_delegate_stays_when_the_library_is_closed():
    code = (
        "import _ctypes, ctypes; from cuda_int4 import _native; _native._load_executorch();"
        "path = str(_native.package_dir() / 'lib' / 'libcuda_int4.so');"
        "_ctypes.dlclose(ctypes.CDLL(path)._handle); from executorch.runtime import Runtime;"
        "assert Runtime.get().backend_registry.is_available('CudaInt4Backend')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr[-2000:]
