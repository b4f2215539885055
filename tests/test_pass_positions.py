"""PositionsPass and MergeHeadsPass: masks that only say where a query stands; merged heads."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.export import Dim

import cuda_int4
import graphs
from cuda_int4 import passes
from cuda_int4.passes.graph import args_of, calls

ATTENTION = torch.ops.cuda_int4.attention.default
T = 12


class Masked(nn.Module):
    """Attention of q over T keys under a mask that ``make`` computes of input_pos."""

    def __init__(self, make, heads_out: bool = False):
        super().__init__()
        self.make, self.heads_out = make, heads_out
        self.register_buffer("keys", torch.arange(T))
        self.register_buffer("table", torch.ones(T, T, dtype=torch.bool).tril())
        self.register_buffer("odd_table", self.table.clone())
        self.odd_table[5, 3] = False

    def forward(self, q, k, v, input_pos):
        y = F.scaled_dot_product_attention(q, k, v, self.make(self, input_pos), enable_gqa=True)
        return y if self.heads_out else y.transpose(1, 2).flatten(2)


def prefix(m, pos):
    return m.keys <= pos.unsqueeze(1)


def turned_around(m, pos):
    return pos.unsqueeze(-1) >= m.keys


def negated(m, pos):
    return ~(m.keys - pos[:, None] > 0)


def table(m, pos):
    return m.table[pos]


def fresh_keys(m, pos):
    return torch.arange(T) < pos.view(-1, 1) + 1


def added(m, pos):
    return torch.where(prefix(m, pos), 0.0, float("-inf"))


def added_least(m, pos):
    seen = prefix(m, pos)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def wide(m, pos):
    return prefix(m, pos)[None, None]


def batched(m, pos):
    return (m.keys <= pos.unsqueeze(2)).unsqueeze(1)


def window(m, pos):
    return prefix(m, pos) & (m.keys > pos.unsqueeze(1) - 4)


def window_of_one(m, pos):
    return m.keys == pos.unsqueeze(1)


def batched_window(m, pos):
    return batched(m, pos) & (m.keys > pos.unsqueeze(2) - 4).unsqueeze(1)


def before(m, pos):
    return m.keys < pos.unsqueeze(1)


def odd_table(m, pos):
    return m.odd_table[pos]


def sunk(m, pos):  # a window, and the first key
    return window(m, pos) | (m.keys == 0)


def late(m, pos):  # all that is there, then a window: the last position shows it
    return prefix(m, pos) & ((m.keys > pos.unsqueeze(1) - 4) | (pos.unsqueeze(1) < 6))


def of_the_last_row(m, pos):
    return (m.keys <= pos[-1]).expand(pos.shape[0], -1)


def penalised(m, pos):
    return torch.where(prefix(m, pos), 0.0, -1e4)


def biased(m, pos):
    return torch.where(prefix(m, pos), 0.5, float("-inf"))


SAID = {
    prefix: 0, turned_around: 0, negated: 0, table: 0, fresh_keys: 0, added: 0, added_least: 0,
    wide: 0, batched: 0, window: 4, window_of_one: 1, batched_window: 4,
}  # fmt: skip
NOT_SAID = (before, odd_table, sunk, late, of_the_last_row, penalised, biased)


def inputs_of(make, S=3):
    generator = torch.Generator().manual_seed(0)
    B = 2 if make in (batched, batched_window) else 1
    q, k, v = (torch.randn(B, H, L, 8, generator=generator) for H, L in ((4, S), (2, T), (2, T)))
    positions = torch.tensor([[2, 7, 11], [0, 4, 5]])[:B, :S]
    return q, k, v, positions if B == 2 else positions[0]


def program_of(make, dynamic=False, heads_out=False, S=3):
    inputs = inputs_of(make, S)
    shapes = None
    if dynamic:
        length, batch = Dim("length", min=1, max=T), Dim("batch", min=1, max=4)
        by_batch = inputs[0].shape[0] == 2
        rows = {0: batch} if by_batch else {}
        shapes = (None, {**rows, 2: length}, rows, rows, {**rows, int(by_batch): length})[1:]
    program = graphs.edge(Masked(make, heads_out), *inputs, dynamic_shapes=shapes)
    return passes.run_passes(program, "auto", "none", fusions=()), inputs


def test_says_positions():
    program, _ = program_of(window, dynamic=True)
    before_it = graphs.text(program)
    assert passes.PositionsPass()(program).modified
    assert not passes.PositionsPass()(program).modified
    after = graphs.text(program)
    assert passes.MergeHeadsPass()(program).modified
    assert not passes.MergeHeadsPass()(program).modified
    assert_expected_inline(
        f"{before_it}\n\n{after}\n\n{graphs.text(program)}",
        """\
keys: int64 [12]
table: bool [12, 12]
odd_table: bool [12, 12]
_lifted_tensor_constant3: int64 []
q: float32 [1, 4, s0, 8], input
k: float32 [1, 2, 12, 8], input
v: float32 [1, 2, 12, 8], input
input_pos: int64 [s0], input
%8 = aten.sym_size.int(q, 2): s0
%9 = aten.unsqueeze_copy(input_pos, 1): int64 [s0, 1]
%10 = aten.le.Tensor(keys, %9): bool [s0, 12]
%11 = aten.unsqueeze_copy(input_pos, 1): int64 [s0, 1]
%12 = aten.sub.Tensor(%11, _lifted_tensor_constant3): int64 [s0, 1]
%13 = aten.gt.Tensor(keys, %12): bool [s0, 12]
%14 = aten.bitwise_and.Tensor(%10, %13): bool [s0, 12]
%15 = cuda_int4.attention(q, k, v, %14, 0.35355339059327373, False): float32 [1, 4, s0, 8]
%16 = aten.permute_copy(%15, [0, 2, 1, 3]): float32 [1, s0, 4, 8]
%17 = aten.view_copy(%16, [1, %8, 32]): float32 [1, s0, 32]
return [%17]

keys: int64 [12]
table: bool [12, 12]
odd_table: bool [12, 12]
_lifted_tensor_constant3: int64 []
q: float32 [1, 4, s0, 8], input
k: float32 [1, 2, 12, 8], input
v: float32 [1, 2, 12, 8], input
input_pos: int64 [s0], input
%8 = aten.sym_size.int(q, 2): s0
%9 = cuda_int4.attention(q, k, v, None, 0.35355339059327373, False, 0.0, input_pos, 4, False,
    None, None): float32 [1, 4, s0, 8]
%10 = aten.permute_copy(%9, [0, 2, 1, 3]): float32 [1, s0, 4, 8]
%11 = aten.view_copy(%10, [1, %8, 32]): float32 [1, s0, 32]
return [%11]

keys: int64 [12]
table: bool [12, 12]
odd_table: bool [12, 12]
_lifted_tensor_constant3: int64 []
q: float32 [1, 4, s0, 8], input
k: float32 [1, 2, 12, 8], input
v: float32 [1, 2, 12, 8], input
input_pos: int64 [s0], input
%8 = aten.sym_size.int(q, 2): s0
%9 = cuda_int4.attention(q, k, v, None, 0.35355339059327373, False, 0.0, input_pos, 4, True,
    None, None): float32 [1, s0, 32]
return [%9]""",
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("make", SAID, ids=lambda make: make.__name__)
def test_a_mask_is_found_however_it_is_spelled(make, dynamic):
    program, inputs = program_of(make, dynamic)
    exact = graphs.run(program, *inputs)
    assert passes.PositionsPass()(program).modified
    for ours, theirs in zip(graphs.run(program, *inputs), exact, strict=True):
        assert torch.equal(ours, theirs)
    (node,) = calls(program, ATTENTION)
    _, _, _, mask, _, _, _, input_pos, found, *_ = args_of(node)
    assert mask is None and input_pos.name == "input_pos" and found == SAID[make]
    assert not list(calls(program, torch.ops.aten.le.Tensor, torch.ops.aten.index.Tensor))


@pytest.mark.parametrize("make", NOT_SAID, ids=lambda make: make.__name__)
@pytest.mark.parametrize("S", [1, 3])
def test_other_masks_are_left_alone(make, S):
    if make is of_the_last_row and S == 1:
        pytest.skip("one row is the last")
    program, _ = program_of(make, S=S)
    assert not passes.PositionsPass()(program).modified


def test_a_mask_of_each_head_is_left_alone():
    def of_heads(m, pos):
        return prefix(m, pos).expand(1, 4, -1, -1)

    program, _ = program_of(of_heads)
    assert not passes.PositionsPass()(program).modified


def test_heads_that_are_read_otherwise_stay_apart():
    program, _ = program_of(prefix, heads_out=True)
    assert not passes.MergeHeadsPass()(program).modified


@pytest.mark.parametrize("make", [prefix, window, batched_window], ids=lambda m: m.__name__)
def test_a_program_gives_the_same_bits(make, tmp_path):
    inputs, results = inputs_of(make), []
    for fusions in ("none", ["positions"], ["merge_heads"], "all"):
        path = tmp_path / f"{len(results)}.pte"
        cuda_int4.export(Masked(make), inputs, path, fusions=fusions)
        results.append(cuda_int4.load(path, device="cpu").forward(*inputs)[0])
    for other in results[1:]:
        assert torch.equal(results[0], other)
