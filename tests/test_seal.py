"""The seal: its bytes, what it notices, and that stock ExecuTorch does not mind it."""

import pytest
import torch
from executorch.exir import ExecutorchBackendConfig, to_edge
from expecttest import assert_expected_inline
from torch import nn

from cuda_int4.seal import read_seal, seal_file
from messages import folded, message


def test_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    seal_file(path)
    sealed = path.read_bytes()
    assert sealed[:100] == bytes(range(100))
    assert_expected_inline(
        sealed[100:].hex(" ", 4),
        """43493453 45414c31 64000000 00000000 8bca3930 00000000 314c4145 53344943""",
    )
    assert read_seal(path) == "valid"
    seal_file(path)
    assert path.read_bytes() == sealed  # a second seal is not added


def test_a_file_without_one(tmp_path):
    for content in (b"", b"x", bytes(31), bytes(32), bytes(1000)):
        path = tmp_path / "file"
        path.write_bytes(content)
        assert read_seal(path) == "none"


def test_every_change_is_noticed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    seal_file(path)
    sealed = path.read_bytes()
    for byte in range(len(sealed)):
        path.write_bytes(sealed[:byte] + bytes([sealed[byte] ^ 4]) + sealed[byte + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            read_seal(path)
    path.write_bytes(sealed[1:])
    with pytest.raises(ValueError, match="damaged"):
        read_seal(path)
    for cut in range(1, 8):  # the front magic is still whole: a truncated seal is seen as one
        path.write_bytes(sealed[: -cut * 4] + sealed[-32:])
        with pytest.raises(ValueError, match="damaged"):
            seal_file(path)


def test_message(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    seal_file(path)
    path.write_bytes(path.read_bytes()[50:])
    assert_expected_inline(
        folded(message(read_seal, path).replace(str(path), "file")),
        """\
file: expected a seal over 50 bytes with checksum a6f0c05f, got one over 100 with 85ac0989; the
    file is truncated or damaged, export it again""",
    )


@pytest.mark.parametrize("external", [False, True])
def test_stock_executorch_loads_a_sealed_file(tmp_path, external):
    from executorch.runtime import Runtime

    model, x = nn.Linear(4, 3).eval(), torch.randn(2, 4)
    config = ExecutorchBackendConfig(external_constants=external)
    manager = to_edge(torch.export.export(model, (x,))).to_executorch(config)
    path = tmp_path / "model.pte"
    path.write_bytes(manager.buffer)
    manager.write_tensor_data_to_file(tmp_path)
    data = next(iter(tmp_path.glob("*.ptd")), None)
    assert (data is not None) == external
    for file in tmp_path.iterdir():
        seal_file(file)
        assert read_seal(file) == "valid"
    program = Runtime.get().load_program(path, data_path=data)
    (y,) = program.load_method("forward").execute((x,))
    torch.testing.assert_close(y, model(x))
