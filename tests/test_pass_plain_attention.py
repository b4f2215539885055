"""ResolvePlainAttentionPass: attention in plain ops, as golden text and as numbers."""

import math

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.export import Dim

import graphs
from cuda_int4 import passes
from cuda_int4.passes.graph import calls
from language_models import example, repeat_heads, toy_gemma

ATTENTION = torch.ops.cuda_int4.attention.default
HEADS, KV_HEADS, D = 4, 2, 16


class Plain(nn.Module):
    """softmax(cap(q @ k.T * scale) + mask) @ v; options say what is there and how it is written."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor):
        o = self.options
        repeat = HEADS // k.shape[1]
        if o.get("q_scaled"):
            q = q * 0.3
        transposed = (k if repeat == 1 else repeat_heads(k, repeat)).transpose(-1, -2)
        s = q @ transposed
        if o.get("divided"):
            s = s / math.sqrt(D)
        elif not o.get("q_scaled"):
            s = s * 0.3
        if cap := o.get("cap"):
            s = cap * torch.tanh(s / cap)
        if o.get("capped_twice"):
            s = torch.tanh(s)
        if o.get("mask", True):
            s = mask + s if o.get("mask_first") else s + mask
        p = (
            s.softmax(-1, torch.float32).to(q.dtype)
            if o.get("float32")
            else s.softmax(o.get("dim", -1))
        )
        y = p @ (v if repeat == 1 else repeat_heads(v, repeat))
        return (y, p) if o.get("shows_weights") else y


def inputs(kv_heads: int = KV_HEADS, S: int = 5, T: int = 9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, HEADS, S, D), (2, kv_heads, T, D), (2, kv_heads, T, D), (S, T))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def resolved(model, *args, **options):
    program = graphs.edge(model, *args, **options)
    modified = passes.ResolvePlainAttentionPass()(program).modified
    assert modified == (len(list(calls(program, ATTENTION))) > 0)
    return program


def test_a_capped_masked_attention_becomes_one_call():
    args = inputs()
    S = Dim("S", min=2, max=8)
    shapes = ({2: S}, None, None, {0: S})
    program = graphs.edge(Plain(cap=2.0, float32=True), *args, dynamic_shapes=shapes)
    before = graphs.text(program)
    assert passes.ResolvePlainAttentionPass()(program).modified
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
_lifted_tensor_constant0: float32 []
_lifted_tensor_constant1: float32 []
_lifted_tensor_constant2: float32 []
q: float32 [2, 4, s0, 16], input
k: float32 [2, 2, 9, 16], input
v: float32 [2, 2, 9, 16], input
mask: float32 [s0, 9], input
%7 = aten.sym_size.int(q, 2): s0
%8 = aten.unsqueeze_copy(k, 2): float32 [2, 2, 1, 9, 16]
%9 = aten.expand_copy(%8, [2, 2, 2, 9, 16]): float32 [2, 2, 2, 9, 16]
%10 = dim_order_ops._clone_dim_order(%9, dim_order=[0, 1, 2, 3, 4]): float32 [2, 2, 2, 9, 16]
%11 = aten.view_copy(%10, [2, 4, 9, 16]): float32 [2, 4, 9, 16]
%12 = aten.permute_copy(%11, [0, 1, 3, 2]): float32 [2, 4, 16, 9]
%13 = aten.expand_copy(q, [2, 4, %7, 16]): float32 [2, 4, s0, 16]
%14 = aten.view_copy(%13, [8, %7, 16]): float32 [8, s0, 16]
%15 = aten.expand_copy(%12, [2, 4, 16, 9]): float32 [2, 4, 16, 9]
%16 = aten.view_copy(%15, [8, 16, 9]): float32 [8, 16, 9]
%17 = aten.bmm(%14, %16): float32 [8, s0, 9]
%18 = aten.view_copy(%17, [2, 4, %7, 9]): float32 [2, 4, s0, 9]
%19 = aten.mul.Tensor(%18, _lifted_tensor_constant0): float32 [2, 4, s0, 9]
%20 = aten.div.Tensor(%19, _lifted_tensor_constant1): float32 [2, 4, s0, 9]
%21 = aten.tanh(%20): float32 [2, 4, s0, 9]
%22 = aten.mul.Tensor(%21, _lifted_tensor_constant2): float32 [2, 4, s0, 9]
%23 = aten.add.Tensor(%22, mask): float32 [2, 4, s0, 9]
%24 = aten._softmax(%23, -1, False): float32 [2, 4, s0, 9]
%25 = aten.unsqueeze_copy(v, 2): float32 [2, 2, 1, 9, 16]
%26 = aten.expand_copy(%25, [2, 2, 2, 9, 16]): float32 [2, 2, 2, 9, 16]
%27 = dim_order_ops._clone_dim_order(%26, dim_order=[0, 1, 2, 3, 4]): float32 [2, 2, 2, 9, 16]
%28 = aten.view_copy(%27, [2, 4, 9, 16]): float32 [2, 4, 9, 16]
%29 = aten.expand_copy(%24, [2, 4, %7, 9]): float32 [2, 4, s0, 9]
%30 = aten.view_copy(%29, [8, %7, 9]): float32 [8, s0, 9]
%31 = aten.expand_copy(%28, [2, 4, 9, 16]): float32 [2, 4, 9, 16]
%32 = aten.view_copy(%31, [8, 9, 16]): float32 [8, 9, 16]
%33 = aten.bmm(%30, %32): float32 [8, s0, 16]
%34 = aten.view_copy(%33, [2, 4, %7, 16]): float32 [2, 4, s0, 16]
return [%34]

_lifted_tensor_constant0: float32 []
_lifted_tensor_constant1: float32 []
_lifted_tensor_constant2: float32 []
q: float32 [2, 4, s0, 16], input
k: float32 [2, 2, 9, 16], input
v: float32 [2, 2, 9, 16], input
mask: float32 [s0, 9], input
%7 = cuda_int4.attention(q, k, v, mask, 0.30000001192092896, False, 2.0): float32 [2, 4, s0, 16]
return [%7]""",
    )


@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cap": 1.5},
        {"cap": 1.5, "divided": True, "mask_first": True},
        {"q_scaled": True, "mask": False},
        {"q_scaled": True, "cap": 1.0, "float32": True},
    ],
    ids=str,
)
def test_numbers_are_those_of_the_plain_ops(options, kv_heads):
    args = inputs(kv_heads)
    program = resolved(Plain(**options), *args)
    (attention,) = calls(program, ATTENTION)
    assert attention.args[1].meta["val"].shape[1] == kv_heads  # not repeated
    assert (attention.args[3] is None) == (options.get("mask") is False)
    assert not list(calls(program, torch.ops.aten.bmm.default))
    y = graphs.run(program, *args)[0]
    torch.testing.assert_close(y, Plain(**options)(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    args = inputs(dtype=dtype)
    options = {"cap": 3.0, "float32": True}
    y = graphs.run(resolved(Plain(**options), *args), *args)[0]
    exact = Plain(**options)(*(x.double() for x in args))
    plain = Plain(**options)(*args)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() <= 1.2 * (plain.double() - exact).norm()


@pytest.mark.parametrize(
    "options, mask_dtype",
    [
        ({"shows_weights": True}, None),
        ({"cap": 2.0, "capped_twice": True}, None),
        ({"cap": -2.0}, None),  # a cap below 0 has no meaning in the kernel
        ({"dim": -2}, None),
        ({"float32": True}, torch.float32),
    ],
    ids=str,
)
def test_what_is_left_alone(options, mask_dtype):
    dtype = torch.float32 if mask_dtype is None else torch.bfloat16
    *qkv, mask = inputs(dtype=dtype)
    mask = mask.to(mask_dtype or dtype)
    program = resolved(Plain(**options), *qkv, mask)
    assert not list(calls(program, ATTENTION))


def test_a_head_that_no_kernel_takes_is_left_alone():
    q, k, v = (torch.randn(1, HEADS, n, 520) for n in (3, 4, 4))
    program = resolved(Plain(), q, k, v, torch.zeros(3, 4))
    assert not list(calls(program, ATTENTION))


@pytest.mark.parametrize("score_cap", [2.0, None])
def test_every_layer_of_a_gemma(score_cap):
    shapes = example(16)[1]
    program = resolved(toy_gemma(32, score_cap), *example(16)[0], dynamic_shapes=shapes)
    found = list(calls(program, ATTENTION))
    assert [node.args[6] for node in found] == [score_cap or 0.0] * 2
    assert all(node.args[1].meta["val"].shape == (1, 2, 32, 16) for node in found)
    assert not list(calls(program, torch.ops.aten.bmm.default))
