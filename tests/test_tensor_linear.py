"""CudaCoalescedInt4Tensor as the weight of a linear: in eager, and in an exported graph."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import cases
from cuda_int4.tensors import CudaCoalescedInt4Tensor

CASE = cases.Case(3, 13, 288, 32, "native", "fractional", torch.float32, torch.float32)


def with_pre_scale(weight: CudaCoalescedInt4Tensor, pre_scale) -> CudaCoalescedInt4Tensor:
    canonical = replace(weight.unpack(), act_pre_scale=pre_scale)
    return CudaCoalescedInt4Tensor.from_int4(canonical, weight.activation)


def linear(weight, bias=None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


# ---- eager ----


@pytest.mark.parametrize("case", cases.WEIGHTS[::4] + cases.DTYPES, ids=str)
def test_one_hot_activations_read_back_the_weight(case):
    _, weight = case.make(seed=0)
    ks = sorted({0, 1, case.K // 2, case.K - 1})
    x = torch.eye(case.K, dtype=case.dtype)[ks]
    expected = weight.dequantize(torch.float64)[:, ks].t()
    y = F.linear(x, weight)
    assert y.dtype == case.dtype
    # The kernel's float32 value, rounded once to the dtype of x.
    assert torch.allclose(y.double(), expected, rtol=torch.finfo(case.dtype).eps, atol=1e-6)


def test_bias_is_taken_by_position_by_keyword_and_from_a_module():
    x, weight = CASE.make(seed=0)
    bias = torch.randn(13)
    y = F.linear(x, weight) + bias
    with torch.inference_mode():  # elsewhere aten.linear falls into matmuls before it comes to us
        aten = torch.ops.aten.linear(x, weight, bias)
    for with_bias in (
        F.linear(x, weight, bias),
        F.linear(x, weight, bias=bias),
        F.linear(input=x, weight=weight, bias=bias),
        linear(weight, bias)(x),
        aten,
    ):
        assert torch.allclose(with_bias, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pre_scale", [torch.tensor([0.5]), torch.rand(288) + 0.5], ids=["1", "K"])
def test_act_pre_scale_multiplies_x(pre_scale):
    x, weight = CASE.make(seed=0)
    scaled = with_pre_scale(weight, pre_scale)
    assert torch.equal(F.linear(x, scaled), F.linear(x * pre_scale, weight))
    # A float32 act_pre_scale does not widen the result of a bfloat16 model.
    y = F.linear(x.bfloat16(), scaled)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, F.linear((x.bfloat16() * pre_scale).bfloat16(), weight))


def test_leading_dimensions_of_x_are_kept():
    x, weight = CASE.make(seed=0)
    y = F.linear(x, weight)
    assert torch.equal(F.linear(x[None, :, None], weight), y[None, :, None])
    assert torch.equal(F.linear(x[1], weight), y[1])


# ---- export ----


@pytest.mark.parametrize("strict", [False, True])
def test_a_linear_exports_as_one_call_of_the_op(strict):
    x, weight = CASE.make(seed=0)
    model = linear(weight, torch.randn(13))
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},), strict=strict)
    assert_expected_inline(calls(exported), """cuda_int4.linear.default 32 coalesced.v1 none""")


@pytest.mark.parametrize("strict", [False, True])
def test_act_pre_scale_and_a_tied_embedding_export(strict):
    _, weight = cases.Case(1, 40, 64, 32, "executorch", "integer").make(seed=0)
    embedding, head = (
        nn.Embedding(40, 64),
        linear(with_pre_scale(weight, torch.rand(64).bfloat16())),
    )
    embedding.weight = head.weight
    model = nn.Sequential(embedding, head)
    exported = torch.export.export(model, (torch.tensor([[1, 2, 3]]),), strict=strict)
    assert_expected_inline(
        calls(exported),
        """\
aten.embedding.default
aten._assert_tensor_metadata.default
aten._to_copy.default
aten.mul.Tensor
aten.floor.default
aten.mul.Tensor 16
aten.sub.Tensor
aten.stack.default -1
aten.view.default
aten.embedding.default
aten.embedding.default
aten._assert_tensor_metadata.default
aten.view.default
aten._assert_tensor_metadata.default
aten._to_copy.default
aten.unsqueeze.default -1
aten.sub.Tensor
aten._assert_tensor_metadata.default
aten._to_copy.default
aten.unsqueeze.default -1
aten.mul.Tensor
aten.view.default
aten._assert_tensor_metadata.default
aten._to_copy.default
aten.mul.Tensor
cuda_int4.linear.default 32 coalesced.v1 none""",
    )
    parts = exported.run_decompositions({}).state_dict.values()
    assert len({part.data_ptr() for part in parts if part.dtype == torch.uint8}) == 1


def calls(exported: torch.export.ExportedProgram) -> str:
    """Each call of the decomposed graph, with the attributes of an int4 linear."""
    graph = exported.run_decompositions({}).graph
    lines = []
    for node in graph.nodes:
        if node.op == "call_function":
            constants = [a for a in node.args if isinstance(a, (int, str))]
            lines.append(f"{node.target} {' '.join(map(str, constants))}".strip())
    return "\n".join(lines)


def test_an_exported_program_computes_what_eager_does():
    x, weight = CASE.make(seed=0)
    model = linear(with_pre_scale(weight, torch.rand(288) + 0.5), torch.randn(13))
    exported = torch.export.export(model, (x,)).run_decompositions({})
    assert torch.equal(exported.module()(x), model(x))
