"""Files with marlin.v1 and marlin24.v1: how they are written, run, and refused if damaged.

The delegate runs on the CPU here; tests/gpu runs such files on a GPU.
"""

import re
from unittest import mock

import pytest
import torch
from torch import nn

import cuda_int4
import delegate_models as models
import forged
from cuda_int4 import CudaMarlin24Int4Tensor, Int4Config, nested_program
from cuda_int4._native import CudaInt4Error
from delegate_models import dim, rows
from forged import Forge

TAGS = {"coalesced": "coalesced.v1", "marlin": "marlin.v1", "marlin24": "marlin24.v1"}
LAYOUTS = tuple(TAGS)


def make(
    layout: str, dtype=torch.float32, activation="none", pruned=True, symmetric=True, seed=0
) -> nn.Module:
    torch.manual_seed(seed)
    model = models.TwoLinears(dtype).eval().requires_grad_(False)
    if pruned:
        cuda_int4.prune_24_(model)
    config = Int4Config(group_size=32, layout=layout, activation=activation, symmetric=symmetric)
    return cuda_int4.quantize_(model, config)


def write(model, path, dtype=torch.float32, **options):
    return models.write(model, path, (rows(3).to(dtype),), ({0: dim()},), **options)


def tags(path) -> set[str]:
    return {weight["layout_tag"] for weight in cuda_int4.inspect(path)["weights"]}


@pytest.mark.parametrize("activation", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_computes_what_eager_does(layout, dtype, activation, tmp_path):
    model = make(layout, dtype, activation)
    path = write(model, tmp_path / "model.pte", dtype, layout=layout)
    assert tags(path) == {TAGS[layout]}
    loaded = cuda_int4.load(path)
    for M in (1, 3, 16):
        x = rows(M, seed=M).to(dtype)
        assert torch.equal(loaded.forward(x)[0], model(x))


def test_every_way_to_a_layout_writes_the_same_constants(tmp_path):
    """By quantize_, by export, by repacking another layout, and by "auto"."""
    for layout, tag in TAGS.items():
        found = {}
        for stored in LAYOUTS:
            path = write(make(stored), tmp_path / "model.pte", layout=layout)
            assert tags(path) == {tag}
            found[stored] = [w["keys"] for w in cuda_int4.inspect(path)["weights"]]
        assert found["coalesced"] == found["marlin"] == found["marlin24"]
    assert tags(write(make("coalesced"), tmp_path / "model.pte")) == {"marlin24.v1"}
    assert tags(write(make("coalesced", pruned=False), tmp_path / "m.pte")) == {"coalesced.v1"}
    # Somebody chose these: "auto" leaves them.
    for layout in ("marlin", "marlin24"):
        assert tags(write(make(layout), tmp_path / "model.pte")) == {TAGS[layout]}


def test_zero_points_go_to_marlin(tmp_path):
    model = make("marlin", pruned=False, symmetric=False)
    path = write(model, tmp_path / "model.pte")
    weights = cuda_int4.inspect(path)["weights"]
    assert tags(path) == {"marlin.v1"} and all(weight["zero_point"] for weight in weights)
    assert torch.equal(cuda_int4.load(path).forward(rows(5))[0], model(rows(5)))
    with pytest.raises(ValueError, match="up.weight: expected a symmetric weight for marlin24.v1"):
        write(model, tmp_path / "other.pte", layout="marlin24")


def test_a_weight_that_is_not_24_is_refused_at_export(tmp_path):
    model = make("coalesced", pruned=False)
    with pytest.raises(ValueError, match="up.weight: expected at most 2 non-zero of every 4"):
        write(model, tmp_path / "model.pte", layout="marlin24")


def test_inspect_tells_padding_and_bits(tmp_path):
    # scale float32: 1 bit per weight; 160 and 70 are padded to 192 and 128
    bits = {"coalesced": (5.0, 5.0), "marlin": (6.0, 9.1429), "marlin24": (4.8, 7.3143)}
    for layout, (up, down) in bits.items():
        path = write(make(layout), tmp_path / "model.pte", layout=layout)
        weights = {w["name"]: w for w in cuda_int4.inspect(path)["weights"]}
        padded = (160, 70) if layout == "coalesced" else (192, 128)
        for name, N, stored, bits_per_weight in (
            ("up.weight", 160, padded[0], up),
            ("down.weight", 70, padded[1], down),
        ):
            found = weights[name]
            assert (found["N"], found["padded_N"]) == (N, stored)
            assert found["bits_per_weight"] == bits_per_weight


def test_weights_in_a_file_of_their_own(tmp_path):
    model = make("marlin24")
    path = write(model, tmp_path / "model.pte", external_weights=True)
    loaded = cuda_int4.load(path, path.with_suffix(".ptd"))
    assert torch.equal(loaded.forward(rows(2))[0], model(rows(2)))
    meta = [key for w in cuda_int4.inspect(path)["weights"] for key in [w["keys"]["meta"]]]
    assert all(key.startswith("cuda_int4/marlin24.v1/meta/") for key in meta)


class Tied(nn.Module):
    """An embedding and a head that share one weight [100, 64]."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        """Logits."""
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_embedding_keeps_a_copy_in_the_order_it_has_where_its_linear_is_packed(layout, tmp_path):
    torch.manual_seed(0)
    model = Tied().eval().requires_grad_(False)
    model.head.weight.view(100, 16, 4)[..., 1::2] = 0
    cuda_int4.quantize_(model, Int4Config(group_size=32, layout="coalesced"))
    tokens = torch.tensor([[1, 99, 64, 0]])
    path = models.write(model, tmp_path / "model.pte", (tokens,), layout=layout)
    assert tags(path) == {TAGS[layout]}
    assert torch.equal(cuda_int4.load(path).forward(tokens)[0], model(tokens))
    sizes = [c["sizes"] for c in cuda_int4.inspect(path)["constants"] if c["dtype"] == "uint8"]
    packed = {"coalesced": [], "marlin": [[4, 1024]], "marlin24": [[2, 1024]]}
    assert sorted(sizes) == sorted([[100, 32], *packed[layout]])


# ---- files from before ----


def without_out_features(plan):
    """Take the argument that older files do not have out of every call of linear."""
    for chain in plan.chains:
        for instruction in chain.instructions:
            index = getattr(instruction.instr_args, "op_index", None)
            if index is not None and plan.operators[index].name == "cuda_int4::linear":
                assert len(instruction.instr_args.args) == 12  # out stands there twice
                del instruction.instr_args.args[9]
    return rename(plan)


rename = nested_program._rename_ops


def test_a_file_from_before_out_features_still_runs(tmp_path):
    model = make("coalesced")
    with mock.patch.object(nested_program, "_rename_ops", without_out_features):
        path = write(model, tmp_path / "model.pte", layout="coalesced")
    assert torch.equal(cuda_int4.load(path).forward(rows(5))[0], model(rows(5)))


def test_a_padded_layout_without_out_features_is_refused_as_it_runs(tmp_path):
    with mock.patch.object(nested_program, "_rename_ops", without_out_features):
        path = write(make("marlin"), tmp_path / "model.pte")
    with pytest.raises(CudaInt4Error, match="expected out_features in 129..192, as marlin.v1 pads"):
        cuda_int4.load(path).forward(rows(5))


# ---- damaged files ----


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    torch.manual_seed(0)
    model = cuda_int4.prune_24_(models.Linear(N=70)).eval().requires_grad_(False)
    cuda_int4.quantize_(model, Int4Config(group_size=32, layout="marlin24"))
    return Forge(tmp_path_factory.mktemp("forge"), model, (rows(3),))


def refusal(path) -> CudaInt4Error:
    with pytest.raises(CudaInt4Error) as raised:
        cuda_int4.load(path)
    return raised.value


def test_the_good_file_runs(forge):
    assert forge.blob.linears[0].layout_tag == "marlin24.v1"
    cuda_int4.load(forge.path)
    cuda_int4.load(forge.change(lambda blob: blob))


RECORDS = {
    "an older version": (dict(layout_tag="marlin24.v0"), forged.INCOMPATIBLE, "the older"),
    "a newer version": (dict(layout_tag="marlin24.v2"), forged.INCOMPATIBLE, "the newer"),
    "the dense order": (dict(layout_tag="marlin.v1"), forged.INVALID_PROGRAM, "shape [1, 128]"),
    "the row-major order": (
        dict(layout_tag="coalesced.v1"),
        forged.INVALID_PROGRAM,
        "pack it again",
    ),
    "an N of other tiles": (dict(N=64), forged.INVALID_PROGRAM, "expected out_features in 65..128"),
    "another N of these": (dict(N=71), forged.INVALID_PROGRAM, "bias of shape [71]"),
    "an N beyond the padding": (dict(N=129), forged.INVALID_PROGRAM, "got 129"),
    "another K": (dict(K=128), forged.INVALID_PROGRAM, "N=70 K=128"),
    "another group size": (dict(group_size=64), forged.INVALID_PROGRAM, "scale"),
    "no metadata": (dict(meta=-1), forged.INVALID_PROGRAM, "expected a tensor as meta, got none"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_says_something_else_is_refused(forge, name):
    fields, code, words = RECORDS[name]
    error = refusal(forge.change(lambda blob: forged.linear(blob, **fields)))
    assert error.code == code and "proj.weight" in str(error) and words in str(error)


def test_qdata_for_scale_and_scale_for_meta_are_refused(forge):
    record = forge.blob.linears[0]
    for fields in (
        {"meta": record.qdata},
        {"qdata": record.meta},
        {"scale": record.meta},
        {"zero_point": record.scale},
    ):
        error = refusal(forge.change(lambda blob, f=fields: forged.linear(blob, **f)))
        assert error.code == forged.INVALID_PROGRAM and "proj.weight" in str(error)


def test_an_n_that_the_program_does_not_say_is_refused(tmp_path):
    """Without a bias nothing in the header tells 69 from 70; the call in the program does."""
    torch.manual_seed(0)
    model = cuda_int4.quantize_(
        models.Linear(N=70, bias=False).eval().requires_grad_(False),
        Int4Config(group_size=32, layout="marlin"),
    )
    forge = Forge(tmp_path, model, (rows(3),))
    error = refusal(forge.change(lambda blob: forged.linear(blob, N=69)))
    assert error.code == forged.INCOMPATIBLE and "as in the header" in str(error)


@pytest.mark.parametrize("value", [0, 1, 2, 3, 5, 6, 7, 10, 11, 15])
def test_metadata_that_is_not_24_is_refused_at_load(forge, value):
    for n, k in ((0, 0), (69, 60), (100, 32)):
        path = forged.with_metadata(forge, n, k, value)
        error = refusal(path)
        assert error.code == forged.INVALID_PROGRAM
        where = rf"row {n}( \(padding\))?, columns {k}..{k + 3};"
        assert re.search(where, str(error)) and "proj.weight: expected meta" in str(error)
        with pytest.raises(CudaInt4Error, match="expected meta to name two places in order"):
            cuda_int4.load(path, verify=False)  # checksums may be left out, this may not


def test_other_metadata_that_is_24_runs(forge):
    """The change of a byte alone is no reason: what is refused above is refused for its meaning."""
    for value in (0x4, 0x8, 0x9, 0xC, 0xD, 0xE):
        cuda_int4.load(forged.with_metadata(forge, 3, 8, value)).forward(rows(3))


def test_a_flipped_bit_of_metadata_is_seen_by_its_checksum_too(forge):
    data = bytearray(forge.path.read_bytes()[: -forged.SEAL_NBYTES])
    model_meta = forge.blob.constants[forge.blob.linears[0].meta]
    with cuda_int4.pte_file.ExecutorchFile(forge.path) as file:
        meta = bytes(file.named_data[model_meta.key])
    # 0x4 (0, 1) to 0xC (0, 3): still two places in order.
    at = data.index(meta) + next(i for i, byte in enumerate(meta) if byte & 15 == 4)
    data[at] ^= 8
    error = refusal(forge.with_bytes(data, sealed=False))
    assert error.code == forged.INVALID_EXTERNAL_DATA and "expected checksum" in str(error)


def test_the_tensor_of_a_loaded_model_is_checked_too():
    """The same places, refused where PyTorch holds them."""
    model = make("marlin24")
    names, attributes = model.up.weight.data.__tensor_flatten__()
    parts = {name: getattr(model.up.weight.data, name) for name in names}
    parts["meta"] = parts["meta"] & 0x7FF0
    with pytest.raises(ValueError, match="expected meta 'first | second << 2'"):
        CudaMarlin24Int4Tensor(**parts, **attributes)
