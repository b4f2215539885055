"""What must not run is refused at load, with the weight, what was expected, what came, the cure."""

from __future__ import annotations

import ctypes

import pytest
import torch
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.schema import Buffer

import cuda_int4
import delegate_models as models
import forged
from cuda_int4 import _native, nested_program
from cuda_int4._native import CudaInt4Error
from cuda_int4.model import explained
from cuda_int4.nested_program import _extract_constants
from cuda_int4.seal import SEAL_NBYTES
from delegate_models import make, rows
from forged import Forge, part


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    return Forge(tmp_path_factory.mktemp("forged"), make(models.Linear()), (rows(3),))


@pytest.fixture(scope="module")
def stock():
    cuda_int4.load_runtime()
    from executorch.runtime import Runtime

    return Runtime.get()


def refusal(path, *data_path, **options) -> CudaInt4Error:
    with pytest.raises(CudaInt4Error) as raised:
        cuda_int4.load(path, *data_path, **options)
    return raised.value


def test_the_good_file_runs_and_so_does_an_unchanged_copy(forge):
    (expected,) = cuda_int4.load(forge.path).forward(rows(3))
    (found,) = cuda_int4.load(forge.change(lambda blob: blob)).forward(rows(3))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", forged.REFUSALS, ids=str)
def test_refused_by_our_loader(forge, case):
    error = refusal(forge.change(case.changed))
    assert error.code == case.code, error
    for words in case.words:
        assert words in str(error)


@pytest.mark.parametrize("case", forged.REFUSALS, ids=str)
def test_refused_by_executorch_with_our_reason(forge, stock, case):
    path = forge.change(case.changed)
    with pytest.raises(CudaInt4Error) as raised, explained():
        stock.load_program(path).load_method("forward")
    assert raised.value.code == case.code, raised.value
    for words in case.words:
        assert words in str(raised.value)


def test_every_refusal_has_a_message_of_its_own(forge):
    messages = [str(refusal(forge.change(case.changed))) for case in forged.REFUSALS]
    assert len(set(messages)) == len(messages)


def planned_inputs(**options):
    return MemoryPlanningPass(**{**options, "alloc_graph_input": True})


def x_with_data(emitted, plan, roles):
    constants = _extract_constants(emitted, plan, roles)
    plan.values[plan.inputs[0]].val.data_buffer_idx = 1
    emitted.program.constant_buffer.append(Buffer(storage=bytes(4096)))
    return constants


@pytest.mark.parametrize(
    ("name", "changed", "found"),
    [
        ("MemoryPlanningPass", planned_inputs, "found 1 and 0"),
        ("_extract_constants", x_with_data, "found 0 and 1"),
    ],
)
def test_memory_that_the_host_would_write_is_refused(tmp_path, monkeypatch, name, changed, found):
    """Such a program runs on a CPU; on a GPU ExecuTorch would copy to its memory on the host."""
    monkeypatch.setattr(nested_program, name, changed)
    path = models.write(make(models.Linear()), tmp_path / "model.pte", (rows(3),))
    error = refusal(path)
    assert error.code == forged.INVALID_PROGRAM
    assert found in str(error) and "no input with memory of its own" in str(error)


def test_a_square_scale_of_the_old_order_is_told_by_its_tag(tmp_path):
    """[n_groups, N] and [N, n_groups] are both [2, 2] here: no shape can tell."""
    square = Forge(tmp_path, make(models.Linear(N=2)), (rows(3),))
    sizes = {c.name: c.sizes for c in square.blob.constants}
    assert sizes["proj.weight.scale"] == (2, 2)
    error = refusal(square.change(lambda b: forged.linear(b, layout_tag="plain.v1")))
    assert error.code == forged.INCOMPATIBLE and 'got "plain.v1"' in str(error)


def test_a_dense_constant_of_another_size(tmp_path):
    dense = Forge(tmp_path, make(models.Offset()), (rows(3),))
    error = refusal(dense.change(lambda b: part(b, "offset", sizes=(49,), nbytes=196)))
    assert error.code == forged.INVALID_EXTERNAL_DATA
    assert "offset: expected 196 bytes, found 192" in str(error)


@pytest.fixture(scope="module")
def two_exports(tmp_path_factory):
    """Two models of one shape, weights apart."""
    folder = tmp_path_factory.mktemp("ptd")
    return [
        models.write(
            make(models.Linear(), seed), folder / f"{seed}.pte", (rows(3),), external_weights=True
        )
        for seed in (1, 2)
    ]


def test_a_ptd_of_another_export(two_exports):
    one, two = two_exports
    error = refusal(one, two.with_suffix(".ptd"))
    assert error.code == forged.INVALID_EXTERNAL_DATA
    assert "proj" in str(error) and "found no such key" in str(error)
    assert "give the .ptd that was written together with this .pte" in str(error)


def test_no_ptd_where_there_should_be_one(two_exports):
    assert "found no such key" in str(refusal(two_exports[0]))


def test_a_pte_for_a_ptd_and_the_other_way_round(two_exports):
    one = two_exports[0]
    assert "expected an ExecuTorch .ptd" in str(refusal(one, one))
    assert "expected an ExecuTorch .pte" in str(refusal(one.with_suffix(".ptd")))


def test_a_damaged_ptd(two_exports, tmp_path):
    one = two_exports[0]
    data = one.with_suffix(".ptd").read_bytes()
    for at in (0, 9, 20, len(data) // 2, len(data) - 20, len(data) - 1):
        damaged = bytearray(data)
        damaged[at] ^= 4
        path = tmp_path / "damaged.ptd"
        path.write_bytes(damaged)
        assert refusal(one, path).code == forged.INVALID_EXTERNAL_DATA
    for nbytes in (0, 1, 63, 64, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:nbytes])
        refusal(one, path)


def test_truncated_at_every_kind_of_place(forge):
    data = forge.path.read_bytes()
    for nbytes in [
        *range(0, 200, 7),
        *range(200, len(data), 611),
        *range(len(data) - 31, len(data)),
    ]:
        if nbytes == len(data) - SEAL_NBYTES:
            continue  # the whole file without its seal, as the plain calls write it
        error = refusal(forge.with_bytes(data[:nbytes], sealed=False))
        assert str(forge.folder) in str(error)


def test_every_flipped_bit_of_a_sealed_file_is_seen(forge):
    data = forge.path.read_bytes()
    for at in [*range(0, 128), *range(128, len(data), 97), *range(len(data) - 32, len(data))]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        path = forge.folder / "flipped.pte"
        path.write_bytes(flipped)
        assert refusal(path).code in (forged.INVALID_PROGRAM, forged.INVALID_EXTERNAL_DATA)


def test_a_flipped_bit_of_a_constant_in_a_file_without_seal(forge, stock):
    data = bytearray(forge.path.read_bytes()[:-SEAL_NBYTES])
    model = make(models.Linear())
    qdata = model.proj.weight.qdata.numpy().tobytes()
    assert data.count(qdata) == 1
    data[data.index(qdata) + 77] ^= 0x10
    path = forge.with_bytes(data, sealed=False)
    error = refusal(path)
    assert error.code == forged.INVALID_EXTERNAL_DATA
    assert "proj.weight.qdata: expected checksum" in str(error)
    cuda_int4.load(path, verify=False)  # asked not to look
    with pytest.raises(CudaInt4Error, match="proj.weight.qdata: expected checksum"), explained():
        stock.load_program(path).load_method("forward")


def test_the_seal(forge):
    data = forge.path.read_bytes()
    body, seal = data[:-SEAL_NBYTES], data[-SEAL_NBYTES:]
    assert "7 more bytes" in str(refusal(forge.with_bytes(body + b"garbage", sealed=False)))
    assert "a seal over" in str(refusal(forge.with_bytes(body + seal[:-1] + b"x", sealed=False)))
    assert "a seal over" in str(refusal(forge.with_bytes(body + b"x" + seal, sealed=False)))
    assert "a seal over" in str(refusal(forge.with_bytes(body + seal + seal, sealed=False)))
    cuda_int4.load(forge.with_bytes(body, sealed=False))


def test_not_a_file_of_ours(tmp_path):
    assert "No such file" in str(refusal(tmp_path / "none.pte"))
    assert "not a regular file" in str(refusal(tmp_path))
    empty = tmp_path / "empty.pte"
    empty.touch()
    assert "an empty file" in str(refusal(empty))
    text = tmp_path / "text.pte"
    text.write_text("once upon a time " * 100)
    assert "expected an ExecuTorch .pte" in str(refusal(text))


def linear_args(x, weight, y, **views) -> _native.LinearArgs:
    args = _native.LinearArgs()
    for name in ("zero_point", "meta", "bias"):
        setattr(args, name, _native.tensor_view(None))
    args.x, args.y = _native.tensor_view(x), _native.tensor_view(y)
    for name in ("qdata", "scale", "zero_point"):
        setattr(args, name, _native.tensor_view(views.get(name, getattr(weight, name))))
    args.group_size, args.layout_tag, args.activation = 32, b"coalesced.v1", b"none"
    args.name = b"proj.weight"
    return args


def test_a_path_is_never_cut_short(forge):
    with pytest.raises(ValueError, match="expected a path without NUL"):
        cuda_int4.load(f"{forge.path}\0behind")


def test_strides_and_addresses_that_the_kernels_do_not_take():
    """In a file constants are contiguous by construction; in eager a caller can hand over views."""
    weight = make(models.Linear()).proj.weight
    x, y = rows(3), torch.empty(3, 48)
    strided = torch.empty(48, 64, dtype=torch.uint8)[:, ::2].copy_(weight.qdata)
    shifted = torch.empty(48 * 32 + 1, dtype=torch.uint8)[1:].view(48, 32).copy_(weight.qdata)
    library = _native.library()
    for views, words in (
        ({"qdata": strided}, ("qdata", "contiguous")),
        ({"qdata": shifted}, ("qdata", "16")),
        ({"scale": weight.scale.T.contiguous().T}, ("scale", "contiguous")),
    ):
        args = linear_args(x, weight, y, **views)
        with pytest.raises(CudaInt4Error) as raised:
            _native.check(
                library.linear(ctypes.byref(args), _native.DEVICE_CPU, None, None, 0, None)
            )
        assert "proj.weight" in str(raised.value)
        for word in words:
            assert word in str(raised.value)
    args = linear_args(x, weight, y)
    _native.check(library.linear(ctypes.byref(args), _native.DEVICE_CPU, None, None, 0, None))
