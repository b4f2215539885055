"""WidenIndexPutPass: a cache written as ``cache[:, :, pos] = v`` lowers and runs in place."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import cuda_int4
import graphs
from cuda_int4 import nested_program, passes
from cuda_int4._native import CudaInt4Error
from cuda_int4.passes import widen_index_put


class Cache(nn.Module):
    """A cache [1, H, 8, 2] written at ``pos``, the way executorch's Llama does it."""

    def __init__(self, n_heads: int):
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, n_heads, 8, 2))

    def forward(self, v: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        """Write v [1, H, S, 2] at pos [S]; return twice the cache."""
        self.cache[:, :, pos] = v
        return self.cache * 2


def test_values_get_the_dimensions_of_the_cache():
    program = graphs.edge(Cache(3), torch.ones(1, 3, 2, 2), torch.tensor([4, 1]))
    before = graphs.text(program)
    assert passes.WidenIndexPutPass()(program).modified
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
b_cache: float32 [1, 3, 8, 2], input
_lifted_tensor_constant1: int64 []
v: float32 [1, 3, 2, 2], input
pos: int64 [2], input
%4 = aten.view_copy(v, [3, 2, 2]): float32 [3, 2, 2]
%5 = aten.index_put(b_cache, [None, None, pos], %4): float32 [1, 3, 8, 2]
%6 = dim_order_ops._to_dim_order_copy(_lifted_tensor_constant1, dtype=float32, dim_order=[]):
    float32 []
%7 = aten.mul.Tensor(%5, %6): float32 [1, 3, 8, 2]
return [%5, %7]

b_cache: float32 [1, 3, 8, 2], input
_lifted_tensor_constant1: int64 []
v: float32 [1, 3, 2, 2], input
pos: int64 [2], input
%4 = aten.view_copy(v, [3, 2, 2]): float32 [3, 2, 2]
%5 = aten.unsqueeze_copy(%4, 0): float32 [1, 3, 2, 2]
%6 = aten.index_put(b_cache, [None, None, pos], %5): float32 [1, 3, 8, 2]
%7 = dim_order_ops._to_dim_order_copy(_lifted_tensor_constant1, dtype=float32, dim_order=[]):
    float32 []
%8 = aten.mul.Tensor(%6, %7): float32 [1, 3, 8, 2]
return [%6, %8]""",
    )
    assert not passes.WidenIndexPutPass()(program).modified


@pytest.mark.parametrize("n_heads", [1, 3])
def test_runs_in_place(tmp_path, n_heads):
    eager = Cache(n_heads)
    v, pos = torch.rand(1, n_heads, 2, 2), torch.tensor([4, 1])
    path = cuda_int4.export(Cache(n_heads), (v, pos), tmp_path / "cache.pte")
    program = cuda_int4.load(path, device="cpu")
    for pos in torch.tensor([[4, 1], [0, 7], [1, 2]]):
        v = torch.rand(1, n_heads, 2, 2)
        assert torch.equal(program.forward(v, pos)[0], eager(v, pos))


def test_a_file_whose_values_lack_dimensions_is_refused(tmp_path, monkeypatch):
    inputs = torch.rand(1, 3, 1, 2), torch.tensor([4])
    monkeypatch.setattr(widen_index_put, "missing_dims", lambda node: 0)
    monkeypatch.setattr(nested_program, "fits_in_place", lambda node: True)
    path = cuda_int4.export(Cache(3), inputs, tmp_path / "low.pte")
    with pytest.raises(CudaInt4Error, match="expected values of 4 dimensions.*got 3"):
        cuda_int4.load(path, device="cpu").forward(*inputs)


class Scattered(nn.Module):
    """Writes that ExecuTorch's in-place kernel does not do, each to a buffer of its own."""

    def __init__(self):
        super().__init__()
        for name in ("two", "mask", "sum", "wide"):
            self.register_buffer(name, torch.zeros(2, 8, 3))

    def forward(self, v: torch.Tensor, pos: torch.Tensor):
        """By two indices, by a mask, added up, and one row for all; v [2, 3], pos [2]."""
        self.two[torch.tensor([1, 0]), pos] = v
        self.mask[self.mask + v[0] > 1.5] = 1.0
        self.sum.index_put_((torch.tensor([1, 1]),), v.unsqueeze(1), accumulate=True)
        self.wide[:, pos] = v[:1]
        return self.two * 1, self.mask * 1, self.sum * 1, self.wide * 1


def test_writes_that_cannot_be_done_in_place_are_right_all_the_same(tmp_path):
    eager, inputs = Scattered(), (torch.rand(2, 3), torch.tensor([4, 1]))
    path = cuda_int4.export(Scattered(), inputs, tmp_path / "scattered.pte")
    program = cuda_int4.load(path, device="cpu")
    for pos in ([4, 1], [0, 7], [1, 2]):
        inputs = torch.rand(2, 3) * 2, torch.tensor(pos)
        torch.testing.assert_close(program.forward(*inputs), list(eager(*inputs)), rtol=0, atol=0)
    assert "cuda_int4::index_put_" not in cuda_int4.inspect(path)["ops"]


class Overwritten(nn.Module):
    """Old values that are read after the write, through a view, each in its own way."""

    def __init__(self):
        super().__init__()
        for name in ("old", "first", "halved"):
            self.register_buffer(name, torch.zeros(4, 8))

    def forward(self, v: torch.Tensor, pos: torch.Tensor):
        """Values v [2, 8] at pos [2]."""
        before = self.old.reshape(32)
        new = self.old.index_copy(0, pos, v)
        self.old.copy_(new)

        self.first[pos] = v
        between = self.first.clone().view(32)
        self.first[pos] = v + 1

        self.halved[pos] = v
        whole = self.halved.clone().view(32)
        self.halved.mul_(0.5)

        computed = v * 2
        source = computed.view(16)
        changed = computed.index_copy(0, pos[:1] % 2, v[:1])
        given = v.view(4, 4).index_copy(0, pos[:1], v[:1, :4])
        caches = new * 1, self.first * 1, self.halved * 1
        return before * 1, between * 1, whole, source * 1, changed, given, v * 1, *caches


def test_nothing_is_overwritten_that_is_still_read(tmp_path):
    eager, inputs = Overwritten(), (torch.rand(2, 8), torch.tensor([3, 1]))
    path = cuda_int4.export(Overwritten(), inputs, tmp_path / "overwritten.pte")
    program = cuda_int4.load(path, device="cpu")
    for pos in ([3, 1], [0, 3], [1, 2]):
        inputs = torch.rand(2, 8), torch.tensor(pos)
        torch.testing.assert_close(program.forward(*inputs), list(eager(*inputs)), rtol=0, atol=0)
