"""Where the time goes, through our own interface and through ExecuTorch's event tracer (ETDump)."""

from __future__ import annotations

import re

import pytest
import torch

import cuda_int4
import delegate_models as models
import language_models
from cuda_int4._native import CudaInt4Error
from cuda_int4.model import OpTime, Profile

INPUTS = (torch.tensor([[3]]), torch.tensor([0]))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return language_models.export_toy_llama(tmp_path_factory.mktemp("llama") / "model.pte")


def test_every_instruction_is_timed(llama):
    model = cuda_int4.load(llama, device="cpu")
    expected = model.forward(*INPUTS)
    model.reset()
    profile = model.profile(*INPUTS, rounds=3)
    linears = [one.detail for one in profile.instructions if one.op == "cuda_int4::linear.out"]
    assert "layers.0.wq+wk+wv.weight N=128 K=64 w4a16" in linears
    assert linears[-1] == "output.weight N=128 K=64 w4a16"
    assert len(linears) == len(set(linears)) == 4 * 2 + 1
    assert all(one.us >= 0 for one in profile.instructions)
    assert 0 < profile.total_us < 1e6
    by_op = profile.by_op()
    assert by_op["cuda_int4::linear.out"][0] == 9 and by_op["cuda_int4::attention.out"][0] == 2
    assert sum(n for n, _ in by_op.values()) == len(profile.instructions)
    # What was timed was the model: it writes the same places of the cache every time.
    assert torch.equal(model.forward(*INPUTS)[0], expected[0])


def test_by_op_puts_the_dearest_first():
    times = (OpTime("a", "", 1.0), OpTime("b", "", 2.5), OpTime("a", "x", 2.0))
    assert list(Profile(5.5, times).by_op().items()) == [("a", (2, 3.0)), ("b", (1, 2.5))]


def test_what_cannot_be_profiled(llama):
    model = cuda_int4.load(llama, device="cpu")
    with pytest.raises(CudaInt4Error, match="expected 1 round or more, got 0"):
        model.profile(*INPUTS, rounds=0)
    with pytest.raises(CudaInt4Error, match='one of this model\'s methods, got "backward"'):
        model.profile(*INPUTS, method="backward")
    with pytest.raises(CudaInt4Error, match="expected 2 inputs, got 1"):
        model.profile(INPUTS[0])
    assert model.forward(*INPUTS)


def test_two_delegates_follow_each_other(tmp_path):
    path = models.write(models.make(models.Hybrid()), tmp_path / "hybrid.pte", (models.rows(3),))
    profile = cuda_int4.load(path, device="cpu").profile(models.rows(3))
    found = [one.detail for one in profile.instructions if one.detail]
    assert [re.sub(" .*", "", detail) for detail in found] == ["proj.weight", "after.weight"]


def test_the_event_tracer_of_executorch_sees_the_ops(llama, tmp_path):
    cuda_int4.load_runtime()
    from executorch.devtools import Inspector
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(llama, enable_etdump=True)
    program.load_method("forward").execute(list(INPUTS))
    dump = str(tmp_path / "dump.etdp")
    program.write_etdump_result_to_file(dump, str(tmp_path / "debug.bin"))
    events = [event for block in Inspector(etdump_path=dump).event_blocks for event in block.events]
    ours = {event.name for event in events if event.is_delegated_op}
    assert {
        "cuda_int4::linear.out",
        "cuda_int4::attention.out",
        "cuda_int4::rope_append.out",
    } <= ours
    assert all(event.perf_data.raw[0] >= 0 for event in events if event.is_delegated_op)


def test_a_part_is_timed_on_a_gpu_alone(llama):
    model = cuda_int4.load(llama, device="cpu")
    n = len(model.profile(*INPUTS, rounds=1).instructions)
    with pytest.raises(
        CudaInt4Error, match="time_part: expected a GPU, .* got cpu; ask for a prof"
    ):
        model.time_part(*INPUTS, kept=[True] * n)
    with pytest.raises(
        CudaInt4Error, match=rf"one entry for each of {n} instructions, got 3; take"
    ):
        model.time_part(*INPUTS, kept=[True] * 3)
    with pytest.raises(CudaInt4Error, match="time_part: expected 1 round or more, got 0"):
        model.time_part(*INPUTS, kept=[True] * n, rounds=0)
    with pytest.raises(CudaInt4Error, match='one of this model\'s methods, got "backward"'):
        model.time_part(*INPUTS, kept=[True] * n, method="backward")
    assert model.forward(*INPUTS)  # it runs as before
