"""inspect: the whole dict for one file as golden text; what it says of files that are not right."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge, to_edge_transform_and_lower
from expecttest import assert_expected_inline
from torch import nn

import cases
import cuda_int4
import graphs
from cuda_int4.partitioner import CudaInt4Partitioner
from messages import folded, message

CASE = cases.Case(6, 32, 64, 32, "executorch", "integer", torch.bfloat16)


class Model(nn.Module):
    """Two int4 linears, one with a bias, and one op outside the delegate."""

    def __init__(self):
        super().__init__()
        self.up = graphs.Linear(graphs.packed(CASE), torch.linspace(-1, 1, 32, dtype=CASE.dtype))
        symmetric = cases.Case(6, 8, 32, 32, "executorch", "symmetric", torch.bfloat16)
        self.down = graphs.Linear(graphs.packed(symmetric, activation="int8"))

    def forward(self, x):
        """The distances between rows, too."""
        y = F.silu(self.up(x))
        return self.down(y), F.pdist(y.float())


X = torch.ones(4, 64, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspect")
    methods = {"get_eos_ids": [2, 3], "use_kv_cache": True, "get_max_seq_len": 16, "scale": 0.5}
    for name, external in (("whole", False), ("apart", True)):
        cuda_int4.export(
            Model(),
            (X,),
            folder / f"{name}.pte",
            constant_methods=methods,
            external_weights=external,
        )
    return folder


@pytest.fixture
def files(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "files")


def test_everything_it_says(files):
    summary = cuda_int4.inspect(files / "whole.pte")
    assert summary.pop("path") == str(files / "whole.pte")
    assert summary.pop("nbytes") == (files / "whole.pte").stat().st_size
    assert all(delegate.pop("nbytes") > 1000 for delegate in summary["delegates"])
    lines = [
        f"{name}: {json.dumps(value)}"
        if name not in ("weights", "constants", "outside")
        else "\n".join([f"{name}:", *(f"- {json.dumps(entry)}" for entry in value)])
        for name, value in summary.items()
    ]
    assert_expected_inline(
        folded(*"\n".join(lines).split("\n")),
        """\
seal: "valid"
methods: ["forward"]
constant_methods: {"get_eos_ids": [2, 3], "use_kv_cache": true, "get_max_seq_len": 16, "scale":
    0.5}
delegates: [{"method": "forward", "layout": "auto", "activation": "none", "external_weights":
    "", "devices": "cpu,cuda"}]
weights:
- {"name": "up.weight", "N": 32, "padded_N": 32, "K": 64, "group_size": 32, "layout_tag":
    "coalesced.v1", "activation": "none", "zero_point": true, "bias": true, "nbytes": 1280,
    "bits_per_weight": 5.0, "keys": {"qdata":
    "cuda_int4/coalesced.v1/qdata/6ba3347e8e47feabf6cfdcdd03897fb3", "scale":
    "cuda_int4/coalesced.v1/scale/51c4178b8898b33930d900fd5ece270f", "zero_point":
    "cuda_int4/coalesced.v1/zero_point/80e038d3611021c235778324641cb39e"}, "delegate": 0}
- {"name": "down.weight", "N": 8, "padded_N": 8, "K": 32, "group_size": 32, "layout_tag":
    "coalesced.v1", "activation": "int8", "zero_point": false, "bias": false, "nbytes": 144,
    "bits_per_weight": 4.5, "keys": {"qdata":
    "cuda_int4/coalesced.v1/qdata/5dc73a624f373a5a4ee2883205a63779", "scale":
    "cuda_int4/coalesced.v1/scale/7d86fe1c52a8c4818d2db9cc3e551318"}, "delegate": 0}
constants:
- {"name": "up.bias", "key": "cuda_int4/coalesced.v1/bias/3eb7ba71f9da8a2de923ef359ab97c7c",
    "dtype": "bfloat16", "sizes": [32], "nbytes": 64, "file": "whole.pte"}
- {"name": "up.weight.qdata", "key":
    "cuda_int4/coalesced.v1/qdata/6ba3347e8e47feabf6cfdcdd03897fb3", "dtype": "uint8", "sizes":
    [32, 32], "nbytes": 1024, "file": "whole.pte"}
- {"name": "up.weight.scale", "key":
    "cuda_int4/coalesced.v1/scale/51c4178b8898b33930d900fd5ece270f", "dtype": "bfloat16",
    "sizes": [32, 2], "nbytes": 128, "file": "whole.pte"}
- {"name": "up.weight.zero_point", "key":
    "cuda_int4/coalesced.v1/zero_point/80e038d3611021c235778324641cb39e", "dtype": "bfloat16",
    "sizes": [32, 2], "nbytes": 128, "file": "whole.pte"}
- {"name": "down.weight.qdata", "key":
    "cuda_int4/coalesced.v1/qdata/5dc73a624f373a5a4ee2883205a63779", "dtype": "uint8", "sizes":
    [8, 16], "nbytes": 128, "file": "whole.pte"}
- {"name": "down.weight.scale", "key":
    "cuda_int4/coalesced.v1/scale/7d86fe1c52a8c4818d2db9cc3e551318", "dtype": "bfloat16",
    "sizes": [8, 1], "nbytes": 16, "file": "whole.pte"}
ops: {"cuda_int4::_to_copy.out": 1, "cuda_int4::linear.out": 2, "cuda_int4::silu.out": 1}
outside_ops: {"aten::_pdist_forward.out": 1}
outside:
- {"node": "aten__pdist_forward_default", "op": "aten._pdist_forward.default", "reason":
    "libcuda_int4 has no kernel for aten::_pdist_forward.out on cpu, cuda"}
data_files: []
devices: {"cpu": [], "cuda": []}""",
    )


def test_weights_apart(files):
    whole, apart = (cuda_int4.inspect(files / f"{name}.pte") for name in ("whole", "apart"))
    assert {entry["file"] for entry in whole["constants"]} == {"whole.pte"}
    assert {entry["file"] for entry in apart["constants"]} == {"apart.ptd"}
    assert whole["weights"] == apart["weights"]
    assert apart["data_files"] == [
        {
            "path": str(files / "apart.ptd"),
            "nbytes": (files / "apart.ptd").stat().st_size,
            "seal": "valid",
        }
    ]
    (files / "apart.ptd").unlink()
    alone = cuda_int4.inspect(files / "apart.pte")
    assert alone["data_files"] == []
    assert {entry["file"] for entry in alone["constants"]} == {None}


def test_a_file_that_plain_executorch_wrote_has_no_seal(tmp_path):
    program = torch.export.export(Model(), (X,))
    edge = to_edge_transform_and_lower(program, partitioner=[CudaInt4Partitioner()])
    path = tmp_path / "plain.pte"
    path.write_bytes(edge.to_executorch().buffer)
    summary = cuda_int4.inspect(path)
    assert summary["seal"] == "none"
    assert [weight["name"] for weight in summary["weights"]] == ["up.weight", "down.weight"]


def test_files_that_are_not_right(files, tmp_path):
    whole, apart, data = (files / name for name in ("whole.pte", "apart.pte", "apart.ptd"))

    def refused(path, content=None):
        if content is not None:
            path = tmp_path / "changed.pte"
            path.write_bytes(content)
        text = message(cuda_int4.inspect, path)
        return text.replace(str(tmp_path), "").replace("/files/", "").removeprefix("/")

    sealed = whole.read_bytes()
    unsealed = sealed[:-32]
    other = to_edge(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))).to_executorch()
    qdata = CASE.source(0).qdata.numpy().tobytes()
    flipped = bytearray(unsealed)
    flipped[unsealed.index(qdata)] ^= 1
    blob = bytearray(unsealed)
    blob[unsealed.index(b"CUDAINT4") + 70] ^= 1
    messages = [
        refused(data),
        refused(None, b"not a program at all, but long enough to be looked at more closely"),
        refused(None, sealed[:40]),
        refused(None, sealed[:-100]),
        refused(None, unsealed[:-1]),
        refused(None, unsealed + b"x"),
        refused(None, sealed[:5000] + bytes([sealed[5000] ^ 1]) + sealed[5001:]),
        refused(None, other.buffer),
        refused(None, bytes(flipped)),
        refused(None, bytes(blob)),
    ]
    whole_data = data.read_bytes()
    data.write_bytes(whole_data[:-1] + b"?")
    messages.append(refused(apart))
    data.write_bytes(sealed)
    messages.append(refused(apart))
    assert_expected_inline(
        folded(*messages),
        """\
apart.ptd: expected a .pte, got its data file; inspect the .pte beside it
changed.pte: expected an ExecuTorch program (.pte) or data file (.ptd), got a file that has b'a
    pr' at byte 4; export it again
changed.pte: expected a .pte or .ptd file, got 40 bytes; it is truncated; export it again
changed.pte: expected 9104 bytes, got 9036; it is truncated or damaged; export it again
changed.pte: expected 9104 bytes, got 9103; it is truncated or damaged; export it again
changed.pte: expected 9104 bytes, got 9105; it is truncated or damaged; export it again
changed.pte: expected a seal over 9104 bytes with checksum 883adefe, got one over 9104 with
    b6967a3c; the file is truncated or damaged, export it again
changed.pte: expected a CudaInt4Backend delegate, got none; lower the model with
    CudaInt4Partitioner
changed.pte: up.weight.qdata: expected 1024 bytes with checksum 0de41bb9, got 1024 bytes with
    3d921ef7; the file is damaged, export it again
changed.pte: delegate blob: expected checksum 0ec41bc5, got 6bda4522; the file is damaged,
    export it again
apart.ptd: expected a seal over 2448 bytes with checksum d5e438c7, got one over 2448 with
    d5e438c7; the file is truncated or damaged, export it again
apart.ptd: expected a data file, got a program; export it again""",
    )
    with pytest.raises(FileNotFoundError):
        cuda_int4.inspect(tmp_path / "nothing.pte")


def test_any_damage_is_noticed_or_harmless(files):
    """Of an unsealed file: inspect raises ValueError, or says what it said before."""
    content = (files / "whole.pte").read_bytes()[:-32]
    path = files / "whole.pte"
    path.write_bytes(content)
    before = cuda_int4.inspect(path)
    generator = torch.Generator().manual_seed(0)
    noticed = 0
    for _ in range(150):
        at = int(torch.randint(len(content), (1,), generator=generator))
        bit = int(torch.randint(8, (1,), generator=generator))
        damaged = bytearray(content)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            after = cuda_int4.inspect(path)
        except ValueError:
            noticed += 1
            continue
        assert after["weights"] == before["weights"]
    assert noticed > 30
