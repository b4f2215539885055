"""The fusions: each rewrite as golden text, its numbers to the bit, what is left alone."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.export import Dim

import cuda_int4
import graphs
from cuda_int4 import passes
from cuda_int4.passes.graph import calls
from messages import folded, message

LINEAR = torch.ops.cuda_int4.linear.default
DTYPE = torch.bfloat16


def quantized(model: nn.Module, layout: str = "coalesced", **options) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(p.dtype)
    model.requires_grad_(False)
    if layout == "marlin24":
        cuda_int4.prune_24_(model)
    cuda_int4.quantize_(model, cuda_int4.Int4Config(group_size=32, layout=layout, **options))
    return model


def before_fusions(model: nn.Module, *inputs: torch.Tensor, dynamic_shapes=None):
    """The program as the fusions find it."""
    program = graphs.edge(model, *inputs, dynamic_shapes=dynamic_shapes)
    return passes.run_passes(program, "auto", "none", fusions=())


def assert_same_bits(a, b):
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


class Projections(nn.Module):
    """Linears that read one tensor."""

    def __init__(self, sizes=(64, 32, 32), biases=(False,) * 3):
        super().__init__()
        linears = [
            nn.Linear(64, n, bias=b, dtype=DTYPE) for n, b in zip(sizes, biases, strict=True)
        ]
        self.w = nn.ModuleList(linears)

    def forward(self, x):
        return tuple(w(x) for w in self.w)


X = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(1)).to(DTYPE)


def test_merges_linears():
    program = before_fusions(quantized(Projections()), X)
    before, exact = graphs.text(program), graphs.run(program, X)
    assert passes.MergeLinearsPass()(program).modified
    assert not passes.MergeLinearsPass()(program).modified
    assert_same_bits(graphs.run(program, X), exact)
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
w.0.weight.0: uint8 [64, 32]
w.0.weight.1: bfloat16 [64, 2]
w.1.weight.0: uint8 [32, 32]
w.1.weight.1: bfloat16 [32, 2]
w.2.weight.0: uint8 [32, 32]
w.2.weight.1: bfloat16 [32, 2]
x: bfloat16 [1, 3, 64], input
%7 = cuda_int4.linear(x, w.0.weight.0, w.0.weight.1, None, None, None, 32, coalesced.v1, none):
    bfloat16 [1, 3, 64]
%8 = cuda_int4.linear(x, w.1.weight.0, w.1.weight.1, None, None, None, 32, coalesced.v1, none):
    bfloat16 [1, 3, 32]
%9 = cuda_int4.linear(x, w.2.weight.0, w.2.weight.1, None, None, None, 32, coalesced.v1, none):
    bfloat16 [1, 3, 32]
return [%7, %8, %9]

w.0+1+2.weight.qdata: uint8 [128, 32]
w.0+1+2.weight.scale: bfloat16 [128, 2]
x: bfloat16 [1, 3, 64], input
%3 = cuda_int4.linear(x, w.0+1+2.weight.qdata, w.0+1+2.weight.scale, None, None, None, 32,
    coalesced.v1, none): bfloat16 [1, 3, 128]
%4 = aten.split_with_sizes_copy(%3, [64, 32, 32], -1): [FakeTensor(..., size=(1, 3, 64),
    dtype=torch.bfloat16), FakeTensor(..., size=(1, 3, 32), dtype=torch.bfloat16),
    FakeTensor(..., size=(1, 3, 32), dtype=torch.bfloat16)]
%5 = getitem(%4, 2): bfloat16 [1, 3, 32]
%6 = getitem(%4, 1): bfloat16 [1, 3, 32]
%7 = getitem(%4, 0): bfloat16 [1, 3, 64]
return [%7, %6, %5]""",
    )


@pytest.mark.parametrize(
    "layout, symmetric",
    [("coalesced", True), ("coalesced", False), ("marlin", True), ("marlin", False),
     ("marlin24", True)],
)  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_merged_linears_give_the_same_bits(layout, symmetric, bias):
    model = quantized(Projections((64, 128, 192), (bias,) * 3), layout, symmetric=symmetric)
    program = before_fusions(model, X)
    exact = graphs.run(program, X)
    assert passes.MergeLinearsPass()(program).modified
    (linear,) = calls(program, LINEAR)
    assert linear.meta["val"].shape[-1] == 384
    assert_same_bits(graphs.run(program, X), exact)


def test_linears_that_differ_are_left_alone():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Linear(64, 64, bias=False, dtype=DTYPE) for _ in range(2))

        def forward(self, x):
            return self.a(x), self.b(x * 2)  # an act_pre_scale is such a product

    class Twice(Apart):
        def forward(self, x):
            return self.a(x), self.b(x), self.b(x + 1)  # a weight that is read twice

    for model in (Apart(), Twice(), Projections((64, 64), (True, False))):
        program = before_fusions(quantized(model), X)
        assert not passes.MergeLinearsPass()(program).modified
    program = before_fusions(quantized(Projections((64, 40), (False,) * 2), "marlin"), X)
    assert not passes.MergeLinearsPass()(program).modified  # 40 is no whole tile


class Residual(nn.Module):
    """A sum that goes on, and its norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(64, eps=1e-5, dtype=DTYPE)

    def forward(self, x, y):
        s = x + y
        return s, self.norm(s)


def test_fuses_add_and_rms_norm():
    x, y = X, X.flip(1) * 3
    program = before_fusions(Residual(), x, y)
    before, exact = graphs.text(program), graphs.run(program, x, y)
    assert passes.FuseAddRmsNormPass()(program).modified
    assert_same_bits(graphs.run(program, x, y), exact)
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
norm.weight: bfloat16 [64]
x: bfloat16 [1, 3, 64], input
y: bfloat16 [1, 3, 64], input
%3 = aten.add.Tensor(x, y): bfloat16 [1, 3, 64]
%4 = cuda_int4.rms_norm(%3, norm.weight, 1e-05): bfloat16 [1, 3, 64]
return [%3, %4]

norm.weight: bfloat16 [64]
x: bfloat16 [1, 3, 64], input
y: bfloat16 [1, 3, 64], input
%3 = cuda_int4.add_rms_norm(x, y, norm.weight, None, 1e-05): (FakeTensor(..., size=(1, 3, 64),
    dtype=torch.bfloat16,            grad_fn=<WarnNotImplemented>), FakeTensor(..., size=(1, 3,
    64), dtype=torch.bfloat16,            grad_fn=<WarnNotImplemented>))
%4 = getitem(%3, 0): bfloat16 [1, 3, 64]
%5 = getitem(%3, 1): bfloat16 [1, 3, 64]
return [%4, %5]""",
    )


def test_sums_that_broadcast_are_left_alone():
    class Scaled(Residual):
        def forward(self, x, y):
            return self.norm(torch.add(x, y, alpha=2))

    for model, y in ((Residual(), X[:, :1]), (Residual(), X[0]), (Scaled(), X)):
        assert not passes.FuseAddRmsNormPass()(before_fusions(model, X, y)).modified


class PostNorms(nn.Module):
    """Gemma's: what a part gives is normed, added, and the sum is normed for the next part."""

    def __init__(self, residual_first=True, post_eps=1e-5):
        super().__init__()
        self.post = nn.RMSNorm(64, eps=post_eps, dtype=DTYPE)
        self.norm = nn.RMSNorm(64, eps=1e-5, dtype=DTYPE)
        self.residual_first = residual_first

    def forward(self, x, y):
        s = x + self.post(y) if self.residual_first else self.post(y) + x
        return s, self.norm(s)


@pytest.mark.parametrize("residual_first", [True, False])
def test_fuses_a_norm_ahead_of_the_sum(residual_first):
    x, y = X, X.flip(1) * 3
    program = before_fusions(PostNorms(residual_first), x, y)
    exact = graphs.run(program, x, y)
    assert passes.FuseAddRmsNormPass()(program).modified
    before = graphs.text(program)
    assert passes.FusePostNormPass()(program).modified
    assert not passes.FusePostNormPass()(program).modified
    assert_same_bits(graphs.run(program, x, y), exact)
    if residual_first:
        assert_expected_inline(
            f"{before}\n\n{graphs.text(program)}",
            """\
post.weight: bfloat16 [64]
norm.weight: bfloat16 [64]
x: bfloat16 [1, 3, 64], input
y: bfloat16 [1, 3, 64], input
%4 = cuda_int4.rms_norm(y, post.weight, 1e-05): bfloat16 [1, 3, 64]
%5 = cuda_int4.add_rms_norm(x, %4, norm.weight, None, 1e-05): (FakeTensor(..., size=(1, 3, 64),
    dtype=torch.bfloat16,            grad_fn=<WarnNotImplemented>), FakeTensor(..., size=(1, 3,
    64), dtype=torch.bfloat16,            grad_fn=<WarnNotImplemented>))
%6 = getitem(%5, 0): bfloat16 [1, 3, 64]
%7 = getitem(%5, 1): bfloat16 [1, 3, 64]
return [%6, %7]

post.weight: bfloat16 [64]
norm.weight: bfloat16 [64]
x: bfloat16 [1, 3, 64], input
y: bfloat16 [1, 3, 64], input
%4 = cuda_int4.add_rms_norm(y, x, norm.weight, post.weight, 1e-05): (FakeTensor(..., size=(1, 3,
    64), dtype=torch.bfloat16,            grad_fn=<WarnNotImplemented>), FakeTensor(...,
    size=(1, 3, 64), dtype=torch.bfloat16,            grad_fn=<WarnNotImplemented>))
%5 = getitem(%4, 0): bfloat16 [1, 3, 64]
%6 = getitem(%4, 1): bfloat16 [1, 3, 64]
return [%5, %6]""",
        )


def test_norms_that_are_read_twice_or_differ_stay_ahead_of_the_sum():
    class Twice(PostNorms):
        def forward(self, x, y):
            n = self.post(y)
            s = x + n
            return s, self.norm(s), n

    class Unweighted(PostNorms):
        def forward(self, x, y):
            s = x + F.rms_norm(y, (64,), None, 1e-5)
            return s, self.norm(s)

    for model in (PostNorms(post_eps=1e-3), Twice(), Unweighted()):
        program = before_fusions(model, X, X.flip(1))
        assert passes.FuseAddRmsNormPass()(program).modified
        assert not passes.FusePostNormPass()(program).modified


class LastToken(Residual):
    """The norm of the last row of a sum."""

    dim = 1

    def forward(self, x, y):
        return self.norm((x + y).select(self.dim, -1))


def test_norms_before_the_last_token_is_selected():
    x, y = X, X.flip(1) * 3
    program = before_fusions(LastToken(), x, y)
    before, exact = graphs.text(program), graphs.run(program, x, y)
    assert passes.NormBeforeSelectPass()(program).modified
    assert not passes.NormBeforeSelectPass()(program).modified
    assert_same_bits(graphs.run(program, x, y), exact)
    after = graphs.text(program)
    assert passes.FuseAddRmsNormPass()(program).modified
    assert_same_bits(graphs.run(program, x, y), exact)
    assert_expected_inline(
        f"{before}\n\n{after}\n\n{graphs.text(program)}",
        """\
norm.weight: bfloat16 [64]
x: bfloat16 [1, 3, 64], input
y: bfloat16 [1, 3, 64], input
%3 = aten.add.Tensor(x, y): bfloat16 [1, 3, 64]
%4 = aten.select_copy.int(%3, 1, -1): bfloat16 [1, 64]
%5 = cuda_int4.rms_norm(%4, norm.weight, 1e-05): bfloat16 [1, 64]
return [%5]

norm.weight: bfloat16 [64]
x: bfloat16 [1, 3, 64], input
y: bfloat16 [1, 3, 64], input
%3 = aten.add.Tensor(x, y): bfloat16 [1, 3, 64]
%4 = cuda_int4.rms_norm(%3, norm.weight, 1e-05): bfloat16 [1, 3, 64]
%5 = aten.select_copy.int(%4, 1, -1): bfloat16 [1, 64]
return [%5]

norm.weight: bfloat16 [64]
x: bfloat16 [1, 3, 64], input
y: bfloat16 [1, 3, 64], input
%3 = cuda_int4.add_rms_norm(x, y, norm.weight, None, 1e-05): (FakeTensor(..., size=(1, 3, 64),
    dtype=torch.bfloat16,            grad_fn=<WarnNotImplemented>), FakeTensor(..., size=(1, 3,
    64), dtype=torch.bfloat16,            grad_fn=<WarnNotImplemented>))
%4 = getitem(%3, 0): bfloat16 [1, 3, 64]
%5 = getitem(%3, 1): bfloat16 [1, 3, 64]
%6 = aten.select_copy.int(%5, 1, -1): bfloat16 [1, 64]
return [%6]""",
    )


def test_selections_that_are_no_row_of_a_sum_are_left_alone():
    class Column(LastToken):
        dim = -1

        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(3, eps=1e-5, dtype=DTYPE)

    class Read(LastToken):
        def forward(self, x, y):
            s = x + y
            return s, self.norm(s.select(1, -1))

    class Product(LastToken):
        def forward(self, x, y):
            return self.norm((x * y).select(1, -1))

    for model in (Column(), Read(), Product()):
        program = before_fusions(model, X, X.flip(1))
        assert not passes.NormBeforeSelectPass()(program).modified


class FeedForward(nn.Module):
    """SwiGLU or GeGLU, the product either way around."""

    def __init__(self, activation=F.silu, up_first=False):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(64, 32, bias=False, dtype=DTYPE) for _ in range(2))
        self.activation, self.up_first = activation, up_first

    def forward(self, x):
        if self.up_first:
            return self.w3(x) * self.activation(self.w1(x))
        return self.activation(self.w1(x)) * self.w3(x)


@pytest.mark.parametrize("up_first", [False, True])
def test_fuses_gate_and_product(up_first):
    program = before_fusions(quantized(FeedForward(up_first=up_first)), X)
    exact = graphs.run(program, X)
    assert passes.MergeLinearsPass()(program).modified
    before = graphs.text(program)
    assert passes.FuseGateMulPass()(program).modified
    assert_same_bits(graphs.run(program, X), exact)
    if not up_first:
        assert_expected_inline(
            f"{before}\n\n{graphs.text(program)}",
            """\
w1+w3.weight.qdata: uint8 [64, 32]
w1+w3.weight.scale: bfloat16 [64, 2]
x: bfloat16 [1, 3, 64], input
%3 = cuda_int4.linear(x, w1+w3.weight.qdata, w1+w3.weight.scale, None, None, None, 32,
    coalesced.v1, none): bfloat16 [1, 3, 64]
%4 = aten.split_with_sizes_copy(%3, [32, 32], -1): [FakeTensor(..., size=(1, 3, 32),
    dtype=torch.bfloat16), FakeTensor(..., size=(1, 3, 32), dtype=torch.bfloat16)]
%5 = getitem(%4, 1): bfloat16 [1, 3, 32]
%6 = getitem(%4, 0): bfloat16 [1, 3, 32]
%7 = cuda_int4.silu(%6): bfloat16 [1, 3, 32]
%8 = aten.mul.Tensor(%7, %5): bfloat16 [1, 3, 32]
return [%8]

w1+w3.weight.qdata: uint8 [64, 32]
w1+w3.weight.scale: bfloat16 [64, 2]
x: bfloat16 [1, 3, 64], input
%3 = cuda_int4.linear(x, w1+w3.weight.qdata, w1+w3.weight.scale, None, None, None, 32,
    coalesced.v1, none): bfloat16 [1, 3, 64]
%4 = cuda_int4.gate_mul(%3, silu): bfloat16 [1, 3, 32]
return [%4]""",
        )


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_fuses_geglu(approximate):
    def gelu(x):
        return F.gelu(x, approximate=approximate)

    program = before_fusions(quantized(FeedForward(gelu)), X)
    (exact,) = graphs.run(program, X)
    assert passes.MergeLinearsPass()(program).modified
    assert passes.FuseGateMulPass()(program).modified
    (found,) = graphs.run(program, X)
    torch.testing.assert_close(found, exact, rtol=2**-7, atol=1e-6)  # torch's gelu has other bits


class Attention(nn.Module):
    """One attention with a cache; how it turns is ``turn``'s."""

    def __init__(self, turn, scale_q=1.0, norms=(), values_are_keys=False):
        super().__init__()
        self.wq = nn.Linear(64, 64, bias=False, dtype=DTYPE)
        self.wk, self.wv = (nn.Linear(64, 32, bias=False, dtype=DTYPE) for _ in range(2))
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, 2, 8, 16, dtype=DTYPE))
        self.turn, self.scale_q, self.values_are_keys = turn, scale_q, values_are_keys
        for name, eps in norms:
            setattr(self, name, nn.RMSNorm(16, eps=eps, dtype=DTYPE))

    def forward(self, x, cos, sin, input_pos):
        B, S, _ = x.shape
        q, k, v = (w(x).view(B, S, -1, 16).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        if self.values_are_keys:
            v = k
        q = self.q_norm(q) if hasattr(self, "q_norm") else q
        k = self.k_norm(k) if hasattr(self, "k_norm") else k
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        if self.scale_q != 1:
            q = q * self.scale_q
        k = self.k_cache.index_copy_(2, input_pos, k)
        v = self.v_cache.index_copy_(2, input_pos, v)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def halves(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def whole(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def pairs(x, cos, sin):
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def wrong_sign(x, cos, sin):
    return halves(x, cos, -sin)


def clipped(x, cos, sin):
    return halves(x.clamp(-100, 100), cos, sin)  # which no random number shows


def other_rounding(x, cos, sin):
    return halves(x.float(), cos, sin).to(x.dtype)


TURNS = {  # turn, width of the tables, their dtype
    halves: (8, torch.float32),
    whole: (16, DTYPE),
    pairs: (8, torch.float32),
}


def rope_inputs(turn):
    width, dtype = TURNS.get(turn, (8, torch.float32))
    angles = torch.randn(3, width, generator=torch.Generator().manual_seed(2))
    return X, angles.cos().to(dtype), angles.sin().to(dtype), torch.tensor([1, 2, 4])


def rope_program(turn, dynamic=True, **options):
    shapes = None
    if dynamic:
        S = Dim("S", min=1, max=8)
        shapes = ({1: S}, {0: S}, {0: S}, {0: S})
    inputs = rope_inputs(turn)
    model = quantized(Attention(turn, **options))
    program = before_fusions(model, *inputs, dynamic_shapes=shapes)
    assert passes.MergeLinearsPass()(program).modified
    return program, inputs


def test_fuses_rope_and_cache():
    program, _ = rope_program(halves)
    before = graphs.text(program)
    assert passes.FuseRopeAppendPass()(program).modified
    assert not passes.FuseRopeAppendPass()(program).modified
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
%8 = aten.sym_size.int(sin, 0): s13
%9 = cuda_int4.linear(x, wq+wk+wv.weight.qdata, wq+wk+wv.weight.scale, None, None, None, 32,
    coalesced.v1, none): bfloat16 [1, s13, 128]
%10 = aten.split_with_sizes_copy(%9, [64, 32, 32], -1): [FakeTensor(..., size=(1, s13, 64),
    dtype=torch.bfloat16), FakeTensor(..., size=(1, s13, 32), dtype=torch.bfloat16),
    FakeTensor(..., size=(1, s13, 32), dtype=torch.bfloat16)]
%11 = getitem(%10, 2): bfloat16 [1, s13, 32]
%12 = getitem(%10, 1): bfloat16 [1, s13, 32]
%13 = getitem(%10, 0): bfloat16 [1, s13, 64]
%14 = aten.view_copy(%13, [1, %8, -1, 16]): bfloat16 [1, s13, 4, 16]
%15 = aten.permute_copy(%14, [0, 2, 1, 3]): bfloat16 [1, 4, s13, 16]
%16 = aten.view_copy(%12, [1, %8, -1, 16]): bfloat16 [1, s13, 2, 16]
%17 = aten.permute_copy(%16, [0, 2, 1, 3]): bfloat16 [1, 2, s13, 16]
%18 = aten.view_copy(%11, [1, %8, -1, 16]): bfloat16 [1, s13, 2, 16]
%19 = aten.permute_copy(%18, [0, 2, 1, 3]): bfloat16 [1, 2, s13, 16]
%20 = aten.split_with_sizes_copy(%15, [8, 8], -1): [FakeTensor(..., size=(1, 4, s13, 8),
    dtype=torch.bfloat16), FakeTensor(..., size=(1, 4, s13, 8), dtype=torch.bfloat16)]
%21 = getitem(%20, 0): bfloat16 [1, 4, s13, 8]
%22 = getitem(%20, 1): bfloat16 [1, 4, s13, 8]
%23 = aten._to_copy(%21, dtype=float32): float32 [1, 4, s13, 8]
%24 = aten.mul.Tensor(%23, cos): float32 [1, 4, s13, 8]
%25 = aten._to_copy(%22, dtype=float32): float32 [1, 4, s13, 8]
%26 = aten.mul.Tensor(%25, sin): float32 [1, 4, s13, 8]
%27 = aten.sub.Tensor(%24, %26): float32 [1, 4, s13, 8]
%28 = aten._to_copy(%21, dtype=float32): float32 [1, 4, s13, 8]
%29 = aten.mul.Tensor(%28, sin): float32 [1, 4, s13, 8]
%30 = aten._to_copy(%22, dtype=float32): float32 [1, 4, s13, 8]
%31 = aten.mul.Tensor(%30, cos): float32 [1, 4, s13, 8]
%32 = aten.add.Tensor(%29, %31): float32 [1, 4, s13, 8]
%33 = aten.cat([%27, %32], -1): float32 [1, 4, s13, 16]
%34 = aten._to_copy(%33, dtype=bfloat16): bfloat16 [1, 4, s13, 16]
%35 = aten.split_with_sizes_copy(%17, [8, 8], -1): [FakeTensor(..., size=(1, 2, s13, 8),
    dtype=torch.bfloat16), FakeTensor(..., size=(1, 2, s13, 8), dtype=torch.bfloat16)]
%36 = getitem(%35, 0): bfloat16 [1, 2, s13, 8]
%37 = getitem(%35, 1): bfloat16 [1, 2, s13, 8]
%38 = aten._to_copy(%36, dtype=float32): float32 [1, 2, s13, 8]
%39 = aten.mul.Tensor(%38, cos): float32 [1, 2, s13, 8]
%40 = aten._to_copy(%37, dtype=float32): float32 [1, 2, s13, 8]
%41 = aten.mul.Tensor(%40, sin): float32 [1, 2, s13, 8]
%42 = aten.sub.Tensor(%39, %41): float32 [1, 2, s13, 8]
%43 = aten._to_copy(%36, dtype=float32): float32 [1, 2, s13, 8]
%44 = aten.mul.Tensor(%43, sin): float32 [1, 2, s13, 8]
%45 = aten._to_copy(%37, dtype=float32): float32 [1, 2, s13, 8]
%46 = aten.mul.Tensor(%45, cos): float32 [1, 2, s13, 8]
%47 = aten.add.Tensor(%44, %46): float32 [1, 2, s13, 8]
%48 = aten.cat([%42, %47], -1): float32 [1, 2, s13, 16]
%49 = aten._to_copy(%48, dtype=bfloat16): bfloat16 [1, 2, s13, 16]
%50 = aten.index_put(b_k_cache, [None, None, input_pos], %49): bfloat16 [1, 2, 8, 16]
%51 = aten.index_put(b_v_cache, [None, None, input_pos], %19): bfloat16 [1, 2, 8, 16]
%52 = cuda_int4.attention(%34, %50, %51, None, 0.25, False): bfloat16 [1, 4, s13, 16]
return [%50, %51, %52]

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
return [b_k_cache, b_v_cache, %10]""",
    )


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_rope_is_found_however_it_is_spelled(turn, dynamic):
    program, _ = rope_program(turn, dynamic)
    assert passes.FuseRopeAppendPass()(program).modified
    (node,) = calls(program, torch.ops.cuda_int4.rope_append.default)
    assert node.args[-5:] == (None, None, 4, turn is pairs, 0.0)
    assert not list(calls(program, torch.ops.aten.index_put.default))


BOTH = (("q_norm", 1e-3), ("k_norm", 1e-3))


@pytest.mark.parametrize("values_are_keys", [False, True])
@pytest.mark.parametrize("norms", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "of q", "of k"])
@pytest.mark.parametrize("turn", [halves, whole])
def test_fuses_norms_of_heads(turn, norms, values_are_keys):
    program, inputs = rope_program(turn, False, norms=norms, values_are_keys=values_are_keys)
    exact = graphs.run(program, *inputs)
    assert passes.FuseRopeAppendPass()(program).modified
    assert_same_bits(graphs.run(program, *inputs), exact)
    (node,) = calls(program, torch.ops.cuda_int4.rope_append.default)
    given = [None if weight is None else weight.name for weight in node.args[6:8]]
    names = [name for name, _ in norms]
    assert given == [f"p_{n}_weight" if n in names else None for n in ("q_norm", "k_norm")]
    assert node.args[8:] == (4, False, 1e-3)
    assert not list(calls(program, torch.ops.cuda_int4.rms_norm.default))


def test_norms_that_are_not_of_heads_once_are_left_alone():
    class Twice(Attention):
        def forward(self, x, *rest):
            self.turn = lambda q, *tables: halves(self.q_norm(q), *tables)
            return super().forward(x, *rest)

    inputs = rope_inputs(halves)
    two_eps = Attention(halves, norms=(("q_norm", 1e-3), ("k_norm", 1e-6)))
    for model in (two_eps, Twice(halves, norms=BOTH)):
        program = before_fusions(quantized(model), *inputs)
        assert passes.MergeLinearsPass()(program).modified
        assert not passes.FuseRopeAppendPass()(program).modified


@pytest.mark.parametrize("turn", [wrong_sign, clipped])
def test_other_turns_are_left_alone(turn):
    program, _ = rope_program(turn)
    assert not passes.FuseRopeAppendPass()(program).modified


def test_a_scaled_query_is_left_alone():
    program, _ = rope_program(halves, scale_q=0.5)
    assert not passes.FuseRopeAppendPass()(program).modified


@pytest.mark.parametrize("turn", TURNS)
def test_a_program_with_all_fusions_gives_the_same_bits(turn, tmp_path):
    outputs = []
    for fusions in ("none", "all"):
        S = Dim("S", min=1, max=8)
        inputs = rope_inputs(turn)
        path = cuda_int4.export(
            quantized(Attention(turn)),
            inputs,
            tmp_path / f"{fusions}.pte",
            dynamic_shapes=({1: S}, {0: S}, {0: S}, {0: S}),
            fusions=fusions,
        )
        model = cuda_int4.load(path, device="cpu")
        x, cos, sin, _ = inputs
        outputs.append([t.clone() for t in model.forward(*inputs)])  # and what the cache then holds
        outputs[-1] += model.forward(x[:, :1], cos[:1], sin[:1], torch.tensor([7]))
    assert_same_bits(*outputs)


def test_fusions_by_name():
    names = passes.chosen_fusions
    assert names("all", who="t") == tuple(passes.FUSIONS)
    assert names("none", who="t") == names([], who="t") == ()
    assert names(["gate_mul", "linears"], who="t") == ("linears", "gate_mul")
    messages = (
        message(cuda_int4.CudaInt4Partitioner, fusions=["linear"]),
        message(names, "linears", who="t"),
    )
    assert_expected_inline(
        folded(*[text.replace(", ".join(passes.FUSIONS), "<all names>") for text in messages]),
        """\
CudaInt4Partitioner: expected fusions 'all', 'none' or a list of <all names>, got ['linear'];
    drop or correct 'linear'
t: expected fusions 'all', 'none' or a list of <all names>, got 'linears'; drop or correct
    'linears'""",
    )
