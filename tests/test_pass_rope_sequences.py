"""FuseRopeAppendPass where several sequences have rows of the caches and positions of their own."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.export import Dim

import graphs
from cuda_int4 import passes
from cuda_int4.passes.graph import calls

HQ, HKV, D, T, SEQUENCES = 4, 2, 16, 8, 3


class Sequences(nn.Module):
    """Attention of B of the sequences, each at its own positions in its own row of the caches."""

    def __init__(self, rows=range(SEQUENCES), first=0, mixes=False):
        super().__init__()
        self.first, self.mixes = first, mixes
        self.register_buffer("rows", torch.tensor(list(rows)))
        self.register_buffer("keys", torch.arange(T))
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(SEQUENCES, HKV, T, D))

    def append(self, cache, x, row, input_pos):
        cache[row, :, input_pos] = x.transpose(1, 2)
        return cache[self.first : self.first + x.shape[0]]

    def forward(self, qkv, cos, sin, input_pos):
        B, S, _ = qkv.shape
        heads = qkv.view(B, S, HQ + 2 * HKV, D).transpose(1, 2)
        q, k, v = heads.split([HQ, HKV, HKV], dim=1)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = (
            x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin for x in (q, k)
        )
        row = self.rows[:B].unsqueeze(1)
        if self.mixes:
            k = k.flip(0)
        k = self.append(self.k_cache, k, row, input_pos)
        v = self.append(self.v_cache, v, row, input_pos)
        mask = (self.keys <= input_pos.unsqueeze(2)).unsqueeze(1)
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def inputs_of(B=2, S=3):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, S, (HQ + 2 * HKV) * D, generator=generator)
    cos, sin = torch.randn(2, B, S, D, generator=generator).unbind()
    return qkv, cos, sin, torch.tensor([[0, 1, 2], [3, 4, 5], [2, 1, 0]])[:B, :S]


def program_of(model, dynamic=True):
    batch, length = Dim("batch", min=1, max=SEQUENCES), Dim("length", min=1, max=T)
    shapes = ({0: batch, 1: length},) * 4 if dynamic else None
    program = graphs.edge(model, *inputs_of(), dynamic_shapes=shapes)
    return passes.run_passes(program, "auto", "none", fusions=())


def test_writes_rows_of_sequences():
    program = program_of(Sequences())
    before = graphs.text(program)
    assert passes.FuseRopeAppendPass()(program).modified
    assert passes.PositionsPass()(program).modified
    program.validate()
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
rows: int64 [3]
keys: int64 [8]
b_k_cache: float32 [3, 2, 8, 16], input
b_v_cache: float32 [3, 2, 8, 16], input
qkv: float32 [s13, s2, 128], input
cos: float32 [s13, s2, 16], input
sin: float32 [s13, s2, 16], input
input_pos: int64 [s13, s2], input
%8 = aten.sym_size.int(sin, 0): s13
%9 = aten.sym_size.int(input_pos, 1): s2
%10 = aten.view_copy(qkv, [%8, %9, 8, 16]): float32 [s13, s2, 8, 16]
%11 = aten.permute_copy(%10, [0, 2, 1, 3]): float32 [s13, 8, s2, 16]
%12 = aten.split_with_sizes_copy(%11, [4, 2, 2], 1): [FakeTensor(..., size=(s13, 4, s2, 16)),
    FakeTensor(..., size=(s13, 2, s2, 16)), FakeTensor(..., size=(s13, 2, s2, 16))]
%13 = getitem(%12, 0): float32 [s13, 4, s2, 16]
%14 = getitem(%12, 1): float32 [s13, 2, s2, 16]
%15 = getitem(%12, 2): float32 [s13, 2, s2, 16]
%16 = aten.unsqueeze_copy(cos, 1): float32 [s13, 1, s2, 16]
%17 = aten.unsqueeze_copy(sin, 1): float32 [s13, 1, s2, 16]
%18 = aten.mul.Tensor(%13, %16): float32 [s13, 4, s2, 16]
%19 = aten.slice_copy.Tensor(%13, 3, 8, 9223372036854775807): float32 [s13, 4, s2, 8]
%20 = aten.neg(%19): float32 [s13, 4, s2, 8]
%21 = aten.slice_copy.Tensor(%13, 3, 0, 8): float32 [s13, 4, s2, 8]
%22 = aten.cat([%20, %21], -1): float32 [s13, 4, s2, 16]
%23 = aten.mul.Tensor(%22, %17): float32 [s13, 4, s2, 16]
%24 = aten.add.Tensor(%18, %23): float32 [s13, 4, s2, 16]
%25 = aten.mul.Tensor(%14, %16): float32 [s13, 2, s2, 16]
%26 = aten.slice_copy.Tensor(%14, 3, 8, 9223372036854775807): float32 [s13, 2, s2, 8]
%27 = aten.neg(%26): float32 [s13, 2, s2, 8]
%28 = aten.slice_copy.Tensor(%14, 3, 0, 8): float32 [s13, 2, s2, 8]
%29 = aten.cat([%27, %28], -1): float32 [s13, 2, s2, 16]
%30 = aten.mul.Tensor(%29, %17): float32 [s13, 2, s2, 16]
%31 = aten.add.Tensor(%25, %30): float32 [s13, 2, s2, 16]
%32 = aten.slice_copy.Tensor(rows, 0, None, %8): int64 [s13]
%33 = aten.unsqueeze_copy(%32, 1): int64 [s13, 1]
%34 = aten.permute_copy(%31, [0, 2, 1, 3]): float32 [s13, s2, 2, 16]
%35 = aten.index_put(b_k_cache, [%33, None, input_pos], %34): float32 [3, 2, 8, 16]
%36 = aten.permute_copy(%15, [0, 2, 1, 3]): float32 [s13, s2, 2, 16]
%37 = aten.index_put(b_v_cache, [%33, None, input_pos], %36): float32 [3, 2, 8, 16]
%38 = aten.unsqueeze_copy(input_pos, 2): int64 [s13, s2, 1]
%39 = aten.le.Tensor(keys, %38): bool [s13, s2, 8]
%40 = aten.unsqueeze_copy(%39, 1): bool [s13, 1, s2, 8]
%41 = aten.slice_copy.Tensor(%35, 0, 0, %8): float32 [s13, 2, 8, 16]
%42 = aten.slice_copy.Tensor(%37, 0, 0, %8): float32 [s13, 2, 8, 16]
%43 = cuda_int4.attention(%24, %41, %42, %40, 0.25, False): float32 [s13, 4, s2, 16]
return [%35, %37, %43]

rows: int64 [3]
keys: int64 [8]
b_k_cache: float32 [3, 2, 8, 16], input
b_v_cache: float32 [3, 2, 8, 16], input
qkv: float32 [s13, s2, 128], input
cos: float32 [s13, s2, 16], input
sin: float32 [s13, s2, 16], input
input_pos: int64 [s13, s2], input
%8 = cuda_int4.rope_append(b_k_cache, b_v_cache, qkv, cos, sin, input_pos, None, None, 4, False,
    0.0): float32 [s13, 4, s2, 16]
%9 = cuda_int4.attention(%8, b_k_cache, b_v_cache, None, 0.25, False, 0.0, input_pos, 0, False,
    None, None): float32 [s13, 4, s2, 16]
return [b_k_cache, b_v_cache, %9]""",
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_and_positions_give_the_same_bits(dynamic):
    program = program_of(Sequences(), dynamic)
    exact = graphs.run(program, *inputs_of())
    assert passes.FuseRopeAppendPass()(program).modified
    assert passes.PositionsPass()(program).modified
    for ours, theirs in zip(graphs.run(program, *inputs_of()), exact, strict=True):
        assert torch.equal(ours, theirs)
    (node,) = calls(program, torch.ops.cuda_int4.attention.default)
    assert [cache.name for cache in node.args[1:3]] == ["b_k_cache", "b_v_cache"]


@pytest.mark.parametrize(
    "model",
    [Sequences(rows=(0, 2, 1)), Sequences(first=1), Sequences(mixes=True)],
    ids=["other rows are written", "other rows are read", "other keys are written"],
)
def test_other_rows_are_left_alone(model):
    program = program_of(model, dynamic=False)
    assert not passes.FuseRopeAppendPass()(program).modified
