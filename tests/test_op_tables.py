"""The tables of ops of the two devices: what one lacks that the other has, what exports take."""

import pytest
from expecttest import assert_expected_inline

import cuda_int4
import language_models
from cuda_int4._native import supported_ops
from messages import folded


def test_cuda_runs_nothing_that_the_cpu_does_not():
    assert supported_ops("cuda") <= supported_ops("cpu")


def test_what_only_the_cpu_runs():
    only = sorted(supported_ops("cpu") - supported_ops("cuda"))
    assert_expected_inline(
        folded(" ".join(only)),
        """\
aten::_local_scalar_dense aten::upsample_bilinear2d.vec_out aten::upsample_nearest2d.vec_out
    executorch_prim::et_copy_index.tensor""",
    )


@pytest.mark.parametrize("make", [language_models.toy_llama, language_models.toy_gemma])
def test_a_decoder_exported_by_default_has_only_ops_of_both(make, tmp_path):
    inputs, dynamic_shapes = language_models.example(16)
    path = tmp_path / "model.pte"
    cuda_int4.export(make(), inputs, path, dynamic_shapes=dynamic_shapes)
    summary = cuda_int4.inspect(path)
    assert len(summary["delegates"]) == 1 and summary["outside_ops"] == {}
    assert summary["devices"] == {"cpu": [], "cuda": []}
