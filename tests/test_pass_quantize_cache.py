"""QuantizeCachePass: key-value caches in int8, in graphs, in files, and where it is refused."""

import pytest
import torch
from expecttest import assert_expected_inline

import cuda_int4
import graphs
import language_models
from cuda_int4 import passes
from messages import folded, message
from test_passes_fusions import halves, rope_program


def test_makes_caches_int8():
    program, _ = rope_program(halves)
    assert passes.FuseRopeAppendPass()(program).modified
    before = graphs.text(program)
    assert passes.QuantizeCachePass()(program).modified
    assert not passes.QuantizeCachePass()(program).modified
    program.validate()
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
wq+wk+wv.weight.qdata: uint8 [128, 32]
wq+wk+wv.weight.scale: bfloat16 [128, 2]
b_k_cache: bfloat16 [1, 2, 8, 16], input
b_v_cache: bfloat16 [1, 2, 8, 16], input
x: bfloat16 [1, s13, 64], input
cos: float32 [s13, 8], input
sin: float32 [s13, 8], input
input_pos: int64 [s13], input
%8 = cuda_int4.linear(x, wq+wk+wv.weight.qdata, wq+wk+wv.weight.scale, None, None, None, 32,
    coalesced.v1, none): bfloat16 [1, s13, 128]
%9 = cuda_int4.rope_append(b_k_cache, b_v_cache, %8, cos, sin, input_pos, None, None, 4, False,
    0.0): bfloat16 [1, 4, s13, 16]
%10 = cuda_int4.attention(%9, b_k_cache, b_v_cache, None, 0.25, False): bfloat16 [1, 4, s13, 16]
return [b_k_cache, b_v_cache, %10]

wq+wk+wv.weight.qdata: uint8 [128, 32]
wq+wk+wv.weight.scale: bfloat16 [128, 2]
b_k_cache: int8 [1, 2, 8, 16], input
b_k_cache_scale: float32 [1, 2, 8], input
b_v_cache: int8 [1, 2, 8, 16], input
b_v_cache_scale: float32 [1, 2, 8], input
x: bfloat16 [1, s13, 64], input
cos: float32 [s13, 8], input
sin: float32 [s13, 8], input
input_pos: int64 [s13], input
%10 = cuda_int4.linear(x, wq+wk+wv.weight.qdata, wq+wk+wv.weight.scale, None, None, None, 32,
    coalesced.v1, none): bfloat16 [1, s13, 128]
%11 = cuda_int4.rope_append(b_k_cache, b_v_cache, %10, cos, sin, input_pos, None, None, 4,
    False, 0.0, b_k_cache_scale, b_v_cache_scale): bfloat16 [1, 4, s13, 16]
%12 = cuda_int4.attention(%11, b_k_cache, b_v_cache, None, 0.25, False, 0.0, None, 0, False,
    b_k_cache_scale, b_v_cache_scale): bfloat16 [1, 4, s13, 16]
return [b_v_cache_scale, b_k_cache_scale, b_k_cache, b_v_cache, %12]""",
    )


def logits_of(path, n=40):
    tokens = torch.randint(50, (1, n), generator=torch.Generator().manual_seed(3))
    with cuda_int4.load(path, device="cpu") as model:
        found = []
        for at in (range(16), *([i] for i in range(16, n))):
            positions = torch.tensor(list(at))
            found.append(model.forward(tokens[:, positions], positions)[0])
        model.reset()
        assert torch.equal(model.forward(tokens[:, :16], torch.arange(16))[0], found[0])
    return torch.cat([logits.view(-1, logits.shape[-1]) for logits in found])


def test_a_file_with_int8_caches_is_near_the_one_without(tmp_path):
    export = language_models.export_toy_llama
    plain = logits_of(export(tmp_path / "plain.pte"))
    int8 = logits_of(export(tmp_path / "int8.pte", kv_cache="int8"))
    error = float((int8 - plain).norm() / plain.norm())
    assert 0 < error < 0.02


@pytest.mark.parametrize("fusions", ["none", ["add_rms_norm"]], ids=str)
def test_caches_that_rope_append_does_not_write_are_refused(tmp_path, fusions):
    options = {"kv_cache": "int8", "fusions": fusions}
    text = message(language_models.export_toy_llama, tmp_path / "no.pte", **options)
    assert_expected_inline(
        folded(text),
        """\
QuantizeCachePass: expected caches that rope_append writes and one attention reads, for
    kv_cache='int8', got layers.0.k_cache written or read otherwise; export with the fusions
    'linears' and 'rope_append', or with kv_cache='none'""",
    )
    assert not list(tmp_path.iterdir())


def test_a_model_without_caches_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).to(torch.bfloat16)
    cuda_int4.quantize_(model, cuda_int4.Int4Config(group_size=32))
    inputs = (torch.zeros(1, 64, dtype=torch.bfloat16),)
    path = tmp_path / "no.pte"
    assert_expected_inline(
        folded(message(cuda_int4.export, model, inputs, path, kv_cache="int8")),
        """\
QuantizeCachePass: expected a model with key-value caches for kv_cache='int8', got none that
    rope_append writes; export with kv_cache='none'""",
    )


def test_an_unknown_kind_of_cache_is_refused():
    assert_expected_inline(
        folded(message(cuda_int4.CudaInt4Partitioner, kv_cache="fp8")),
        """\
CudaInt4Partitioner: expected kv_cache in ('none', 'int8'), got 'fp8'; 'none' leaves the caches
    in the model's dtype""",
    )
