"""The passes: each rewrite as golden text, its numbers against the definition of the weight."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.export import Dim

import cases
import graphs
from cuda_int4 import passes
from cuda_int4.passes.graph import calls
from messages import folded, message

CASE = cases.Case(6, 8, 64, 32, "executorch", "fractional", torch.float32, torch.float32)
LINEAR = torch.ops.cuda_int4.linear.default


def x_of(case: cases.Case) -> torch.Tensor:
    return case.make(seed=0)[0].view(2, -1, case.K)


def bias_of(case: cases.Case) -> torch.Tensor:
    return torch.linspace(-1, 1, case.N, dtype=case.dtype)


def lowered(program):
    return passes.run_passes(program, "auto", "none")


def assert_close(got: torch.Tensor, exact: torch.Tensor):
    """Within 1.2 roundings of the exact answer to the output's dtype; 1e-5 for float32."""
    exact = exact.double()
    once = (exact.to(got.dtype).double() - exact).norm() / exact.norm()
    error = (got.double() - exact).norm() / exact.norm()
    assert error <= max(1.2 * once, 1e-5), (float(error), float(once))


def definition(case: cases.Case, x: torch.Tensor, bias: torch.Tensor | None, seed: int = 0):
    w = cases.definition(case.source(seed))
    return F.linear(x.double(), w, None if bias is None else bias.double())


# ---- resolve_int4_linear ----


def test_resolves_dequantize_and_linear():
    model = graphs.Linear(graphs.exportable(CASE), bias_of(CASE))
    program = graphs.edge(model, x_of(CASE))
    before = graphs.text(program)
    assert passes.ResolveInt4LinearPass()(program).modified
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
bias: float32 [8]
weight.0: uint8 [8, 32]
weight.1: float32 [2, 8]
weight.2: float32 [2, 8]
x: float32 [2, 3, 64], input
%5 = torchao.dequantize_int4_tensor(weight.0, weight.1, weight.2, 32, float32): float32 [8, 64]
%6 = aten.linear(x, %5, bias): float32 [2, 3, 8]
return [%6]

bias: float32 [8]
weight.0: uint8 [8, 32]
weight.1: float32 [2, 8]
weight.2: float32 [2, 8]
x: float32 [2, 3, 64], input
%5 = cuda_int4.linear(x, weight.0, weight.1, weight.2, None, bias, 32, plain.v1, none): float32
    [2, 3, 8]
return [%5]""",
    )


def test_resolves_what_decomposition_leaves_of_a_linear():
    model = graphs.Linear(graphs.exportable(CASE), bias_of(CASE), keyword=False)
    shapes = ({1: Dim("S", min=2, max=8)},)
    program = graphs.edge(model, x_of(CASE), whole=False, dynamic_shapes=shapes)
    before = graphs.text(program)
    assert passes.ResolveInt4LinearPass()(program).modified
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
bias: float32 [8]
weight.0: uint8 [8, 32]
weight.1: float32 [2, 8]
weight.2: float32 [2, 8]
x: float32 [2, s27, 64], input
%5 = aten.sym_size.int(x, 1): s27
%6 = torchao.dequantize_int4_tensor(weight.0, weight.1, weight.2, 32, float32): float32 [8, 64]
%7 = mul(2, %5): 2*s27
%8 = aten.view_copy(x, [%7, 64]): float32 [2*s27, 64]
%9 = aten.permute_copy(%6, [1, 0]): float32 [64, 8]
%10 = aten.addmm(bias, %8, %9): float32 [2*s27, 8]
%11 = aten.view_copy(%10, [2, %5, 8]): float32 [2, s27, 8]
return [%11]

bias: float32 [8]
weight.0: uint8 [8, 32]
weight.1: float32 [2, 8]
weight.2: float32 [2, 8]
x: float32 [2, s27, 64], input
%5 = cuda_int4.linear(x, weight.0, weight.1, weight.2, None, bias, 32, plain.v1, none): float32
    [2, s27, 8]
return [%5]""",
    )


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (6, 64), (2, 3, 64)], ids=str)
def test_every_rank_of_x(whole, with_bias, shape):
    bias = bias_of(CASE) if with_bias else None
    x = x_of(CASE).reshape(-1)[: torch.Size(shape).numel()].view(shape)
    program = lowered(graphs.edge(graphs.Linear(graphs.exportable(CASE), bias), x, whole=whole))
    assert len(list(calls(program, LINEAR))) == 1
    assert_close(graphs.run(program, x)[0], definition(CASE, x, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "fractional"])
def test_numbers_in_every_dtype(dtype, zero):
    case = cases.Case(4, 13, 288, 32, "executorch", zero, dtype)
    x, bias = x_of(case), bias_of(case)
    program = lowered(graphs.edge(graphs.Linear(graphs.exportable(case), bias), x))
    (linear,) = calls(program, LINEAR)
    assert (linear.args[3] is None) == (zero == "symmetric")
    assert_close(graphs.run(program, x)[0], definition(case, x, bias))


def test_resolves_gguf_q4_k():
    model = graphs.Linear(graphs.gguf(3, 512), torch.ones(3))
    x = torch.randn(2, 512)
    program = graphs.edge(model, x)
    before = graphs.text(program)
    assert passes.ResolveInt4LinearPass()(program).modified
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
bias: float32 [3]
weight.0: uint8 [3, 288]
x: float32 [2, 512], input
%3 = torchao.dequantize_gguf(weight.0, q4_k, float32): float32 [3, 512]
%4 = aten.linear(x, %3, bias): float32 [2, 3]
return [%4]

bias: float32 [3]
weight.plain_qdata: uint8 [3, 256]
weight.plain_scale: float32 [16, 3]
weight.plain_zero_point: float32 [16, 3]
x: float32 [2, 512], input
%5 = cuda_int4.linear(x, weight.plain_qdata, weight.plain_scale, weight.plain_zero_point, None,
    bias, 32, plain.v1, none): float32 [2, 3]
return [%5]""",
    )
    from cuda_int4.int4 import read_int4

    w = read_int4(model.weight.data).dequantize(torch.float64)
    assert_close(graphs.run(lowered(program), x)[0], F.linear(x.double(), w) + 1)


@pytest.fixture
def mslk():
    """Mslk's op as a name and a definition; the real one needs a GPU."""
    library = torch.library.Library("mslk", "FRAGMENT")
    library.define(
        "bf16i4bf16_rowwise(Tensor X, Tensor WQ, Tensor w_scale_group, Tensor w_zero_group)"
        " -> Tensor"
    )
    torch.library.register_fake(
        "mslk::bf16i4bf16_rowwise", lambda x, wq, s, z: x.new_empty(len(x), len(wq)), lib=library
    )
    yield
    library._destroy()


def native_model(case: cases.Case):
    source = case.source(0)
    source.act_pre_scale = torch.linspace(0.5, 2, case.K, dtype=case.dtype)
    return graphs.Linear(source, bias_of(case))


def test_resolves_the_mslk_op(mslk):
    case = cases.Case(6, 8, 64, 32, "native", "fractional")
    model, x = native_model(case), x_of(case)
    program = graphs.edge(model, x)
    before = graphs.text(program)
    assert passes.ResolveInt4LinearPass()(program).modified
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
weight.0: int8 [8, 32]
weight.1: bfloat16 [2, 8]
weight.2: bfloat16 [2, 8]
weight.3: bfloat16 [64]
x: bfloat16 [2, 3, 64], input
%5 = aten.mul.Tensor(x, weight.3): bfloat16 [2, 3, 64]
%6 = aten.view_copy(%5, [-1, 64]): bfloat16 [6, 64]
%7 = mslk.bf16i4bf16_rowwise(%6, weight.0, weight.1, weight.2): bfloat16 [6, 8]
%8 = aten.view_copy(%7, [2, 3, 8]): bfloat16 [2, 3, 8]
return [%8]

weight.3: bfloat16 [64]
weight.plain_qdata: uint8 [8, 32]
weight.plain_scale: bfloat16 [2, 8]
weight.plain_zero_point: float32 [2, 8]
x: bfloat16 [2, 3, 64], input
%5 = aten.mul.Tensor(x, weight.3): bfloat16 [2, 3, 64]
%6 = aten.view_copy(%5, [-1, 64]): bfloat16 [6, 64]
%7 = cuda_int4.linear(%6, weight.plain_qdata, weight.plain_scale, weight.plain_zero_point, None,
    None, 32, plain.v1, none): bfloat16 [6, 8]
%8 = aten.view_copy(%7, [2, 3, 8]): bfloat16 [2, 3, 8]
return [%8]""",
    )
    model.bias = None  # the graph adds it in bfloat16, a second rounding
    program = lowered(graphs.edge(model, x))
    assert_close(graphs.run(program, x)[0], definition(case, x * model.weight.act_pre_scale, None))


def test_takes_our_own_tensor_as_it_is():
    model = graphs.Linear(graphs.packed(CASE, activation="int8"), bias_of(CASE))
    program = graphs.edge(model, x_of(CASE), whole=False)
    assert not passes.ResolveInt4LinearPass()(program).modified
    assert_expected_inline(
        graphs.text(program),
        """\
bias: float32 [8]
weight.0: uint8 [8, 32]
weight.1: float32 [8, 2]
weight.2: float32 [8, 2]
x: float32 [2, 3, 64], input
%5 = cuda_int4.linear(x, weight.0, weight.1, weight.2, None, bias, 32, coalesced.v1, int8):
    float32 [2, 3, 8]
return [%5]""",
    )
    for a_pass in passes.ordered_passes("auto", "none"):
        assert not a_pass(program).modified, a_pass


class Tied(nn.Module):
    """One int4 weight as the embedding, as the output layer and, under its second name, again."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(graphs.exportable(CASE), requires_grad=False)
        self.head = graphs.Linear(torch.empty(0))
        self.head.weight = self.table

    def forward(self, tokens):
        x = self.table.dequantize()[tokens]
        return self.head(x) + F.linear(x, self.table)


def test_a_weight_that_something_else_reads_too_keeps_its_dense_form_there():
    tokens = torch.tensor([[1, 7, 0]])
    program = graphs.edge(Tied(), tokens)
    assert passes.ResolveInt4LinearPass()(program).modified
    resolved = graphs.text(program)
    assert passes.FoldDequantizePass()(program).modified
    assert not passes.FoldDequantizePass()(program).modified
    assert_expected_inline(
        f"{resolved}\n\n{graphs.text(program)}",
        """\
head.weight.0: uint8 [8, 32]
head.weight.1: float32 [2, 8]
head.weight.2: float32 [2, 8]
tokens: int64 [1, 3], input
%4 = torchao.dequantize_int4_tensor(head.weight.0, head.weight.1, head.weight.2, 32, float32):
    float32 [8, 64]
%5 = aten.index.Tensor(%4, [tokens]): float32 [1, 3, 64]
%6 = cuda_int4.linear(%5, head.weight.0, head.weight.1, head.weight.2, None, None, 32, plain.v1,
    none): float32 [1, 3, 8]
%7 = cuda_int4.linear(%5, head.weight.0, head.weight.1, head.weight.2, None, None, 32, plain.v1,
    none): float32 [1, 3, 8]
%8 = aten.add.Tensor(%6, %7): float32 [1, 3, 8]
return [%8]

head.weight.0: uint8 [8, 32]
head.weight.1: float32 [2, 8]
head.weight.2: float32 [2, 8]
head.weight.dense: float32 [8, 64]
tokens: int64 [1, 3], input
%5 = aten.index.Tensor(head.weight.dense, [tokens]): float32 [1, 3, 64]
%6 = cuda_int4.linear(%5, head.weight.0, head.weight.1, head.weight.2, None, None, 32, plain.v1,
    none): float32 [1, 3, 8]
%7 = cuda_int4.linear(%5, head.weight.0, head.weight.1, head.weight.2, None, None, 32, plain.v1,
    none): float32 [1, 3, 8]
%8 = aten.add.Tensor(%6, %7): float32 [1, 3, 8]
return [%8]""",
    )
    w = cases.definition(CASE.source(0))
    exact = 2 * F.linear(w[tokens], w)
    assert_close(graphs.run(lowered(program), tokens)[0], exact)


def test_linears_that_share_a_weight_share_its_constants():
    model = nn.Sequential(*(graphs.Linear(torch.empty(0)) for _ in range(2)))
    square = cases.Case(4, 64, 64, 32, "executorch", "integer", torch.float32)
    model[0].weight = model[1].weight = nn.Parameter(graphs.exportable(square), False)
    x = x_of(square)
    program = lowered(graphs.edge(model, x))
    first, second = calls(program, LINEAR)
    assert first.args[1:6] == second.args[1:6]
    assert len(program.state_dict) == 3
    w = cases.definition(square.source(0))
    assert_close(graphs.run(program, x)[0], x.double() @ w.t() @ w.t())


class Dynamic(nn.Module):
    """An int4 weight whose scale the graph computes."""

    def __init__(self):
        super().__init__()
        weight = graphs.exportable(CASE)
        self.qdata, self.scale, self.zero = (
            nn.Parameter(part, requires_grad=False)
            for part in (weight.qdata, weight.scale, weight.zero_point)
        )

    def forward(self, x):
        op = torch.ops.torchao.dequantize_int4_tensor
        return F.linear(x, op(self.qdata, self.scale * 2, self.zero, 32, torch.float32))


def test_refuses_what_cannot_be_honoured():
    resolve = passes.ResolveInt4LinearPass()

    def refused(weight, dtype=torch.float32, K=None, bias=None):
        x = torch.randn(2, K or weight.shape[-1], dtype=dtype)
        return message(resolve, graphs.edge(graphs.Linear(weight, bias), x))

    odd = graphs.exportable(cases.Case(1, 8, 48, 48))
    small = graphs.exportable(CASE)
    small.group_size = 16
    signed = graphs.exportable(CASE)
    signed.qdata = signed.qdata.view(torch.int8)
    native = graphs.ExportableInt4Tensor(
        signed.qdata.view(torch.uint8), signed.scale.t().contiguous(), signed.zero_point, 32,
        torch.float32,
    )  # fmt: skip
    assert_expected_inline(
        folded(
            refused(odd),
            refused(small),
            refused(signed),
            refused(native),
            refused(graphs.exportable(CASE), torch.float64),
            refused(graphs.packed(CASE), K=32),
            refused(graphs.packed(CASE), bias=bias_of(CASE).double()),
            message(resolve, graphs.edge(Dynamic(), x_of(CASE))),
        ),
        """\
weight: expected K % 32 == 0, got K=48, group_size=48; pad K to 64
weight: expected group_size in 32, 64, 128, 256 or equal to K=64, got group_size=16; quantise
    again with one of these
weight: expected qdata of uint8, got torch.int8: it was made from a native Int4Tensor, whose
    nibbles are signed, and means other values here; give prepare_ the Int4Tensor itself
weight: expected scale of shape [n_groups, N] = [2, 8], got [8, 2]; quantise the weight again
weight: expected activations of float16, bfloat16 or float32, got torch.float64; convert the
    model with .to(torch.bfloat16)
weight: expected qdata [8, 16] in coalesced.v1 for x [2, 32] and N=8, got [8, 32]; fix the call:
    x and the weight disagree
weight: expected a bias of the dtype of x, torch.float32, got torch.float64; cast one to the
    other
qdata: expected int4 weights that are parameters or buffers nothing writes, got aten_mul_tensor,
    computed in the graph; quantise them before export""",
    )


# ---- assign_layout, pack_weights ----


def test_assigns_a_layout_and_packs_for_it():
    model = graphs.Linear(graphs.exportable(CASE), bias_of(CASE))
    program = graphs.edge(model, x_of(CASE))
    passes.ResolveInt4LinearPass()(program)
    assert passes.AssignLayoutPass("coalesced.v1", "int8")(program).modified
    assert not passes.AssignLayoutPass("coalesced.v1", "int8")(program).modified
    assigned = graphs.text(program)
    assert passes.PackWeightsPass()(program).modified
    assert not passes.PackWeightsPass()(program).modified
    assert_expected_inline(
        f"{assigned}\n\n{graphs.text(program)}",
        """\
bias: float32 [8]
weight.0: uint8 [8, 32]
weight.1: float32 [2, 8]
weight.2: float32 [2, 8]
x: float32 [2, 3, 64], input
%5 = cuda_int4.linear(x, weight.0, weight.1, weight.2, None, bias, 32, coalesced.v1, int8):
    float32 [2, 3, 8]
return [%5]

bias: float32 [8]
weight.qdata: uint8 [8, 32]
weight.scale: float32 [8, 2]
weight.zero_point: float32 [8, 2]
x: float32 [2, 3, 64], input
%5 = cuda_int4.linear(x, weight.qdata, weight.scale, weight.zero_point, None, bias, 32,
    coalesced.v1, int8): float32 [2, 3, 8]
return [%5]""",
    )
    weight = graphs.packed(CASE)
    for part in ("qdata", "scale", "zero_point"):
        assert torch.equal(program.state_dict[f"weight.{part}"], getattr(weight, part))


def test_an_activation_alone_moves_no_bytes():
    program = graphs.edge(graphs.Linear(graphs.packed(CASE)), x_of(CASE))
    before = dict(program.state_dict)
    assert passes.AssignLayoutPass("auto", "int8")(program).modified
    assert not passes.PackWeightsPass()(program).modified
    assert all(program.state_dict[name] is tensor for name, tensor in before.items())
    (linear,) = calls(program, LINEAR)
    assert linear.args[-1] == "int8"


# ---- attention, rms_norm, silu, dim order ----


class Attention(nn.Module):
    """scaled_dot_product_attention; ``repeat`` expands the keys for their group first."""

    def __init__(self, repeat: bool = False, **kwargs):
        super().__init__()
        self.repeat, self.kwargs = repeat, kwargs

    def forward(self, q, k, v, mask=None):
        if self.repeat:
            B, H, T, D = k.shape
            n = q.shape[1] // H
            k, v = (t[:, :, None].expand(B, H, n, T, D).reshape(B, H * n, T, D) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, **self.kwargs)


def qkv(heads=4, kv_heads=2, S=3, T=5, D=8, dtype=torch.float32):
    torch.manual_seed(0)
    return (
        torch.randn(1, heads, S, D, dtype=dtype),
        torch.randn(1, kv_heads, T, D, dtype=dtype),
        torch.randn(1, kv_heads, T, D, dtype=dtype),
    )


def test_resolves_attention_on_repeated_keys():
    inputs = (*qkv(), torch.ones(3, 5, dtype=torch.bool).tril(2))
    program = graphs.edge(Attention(repeat=True), *inputs)
    before = graphs.text(program)
    assert passes.ResolveAttentionPass()(program).modified
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
q: float32 [1, 4, 3, 8], input
k: float32 [1, 2, 5, 8], input
v: float32 [1, 2, 5, 8], input
mask: bool [3, 5], input
%4 = aten.unsqueeze_copy(k, 2): float32 [1, 2, 1, 5, 8]
%5 = aten.expand_copy(%4, [1, 2, 2, 5, 8]): float32 [1, 2, 2, 5, 8]
%6 = dim_order_ops._clone_dim_order(%5, dim_order=[0, 1, 2, 3, 4]): float32 [1, 2, 2, 5, 8]
%7 = aten.view_copy(%6, [1, 4, 5, 8]): float32 [1, 4, 5, 8]
%8 = aten.unsqueeze_copy(v, 2): float32 [1, 2, 1, 5, 8]
%9 = aten.expand_copy(%8, [1, 2, 2, 5, 8]): float32 [1, 2, 2, 5, 8]
%10 = dim_order_ops._clone_dim_order(%9, dim_order=[0, 1, 2, 3, 4]): float32 [1, 2, 2, 5, 8]
%11 = aten.view_copy(%10, [1, 4, 5, 8]): float32 [1, 4, 5, 8]
%12 = aten.scaled_dot_product_attention(q, %7, %11, mask): float32 [1, 4, 3, 8]
return [%12]

q: float32 [1, 4, 3, 8], input
k: float32 [1, 2, 5, 8], input
v: float32 [1, 2, 5, 8], input
mask: bool [3, 5], input
%4 = cuda_int4.attention(q, k, v, mask, 0.35355339059327373, False): float32 [1, 4, 3, 8]
return [%4]""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("model", "with_mask"),
    [
        (Attention(enable_gqa=True), True),
        (Attention(repeat=True), True),
        (Attention(enable_gqa=True, scale=0.3), False),
        (Attention(repeat=True, is_causal=True), False),
    ],
)
def test_attention_numbers(model, with_mask, dtype):
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]).bool()
    inputs = (*qkv(dtype=dtype), mask) if with_mask else qkv(dtype=dtype)
    program = graphs.edge(model, *inputs)
    assert passes.ResolveAttentionPass()(program).modified
    (attention,) = calls(program, torch.ops.cuda_int4.attention.default)
    assert attention.args[1].meta["val"].shape[1] == 2  # the repeat is gone
    exact = model(*(t if t.dtype == torch.bool else t.double() for t in inputs))
    assert_close(graphs.run(program, *inputs)[0], exact)


def test_attention_that_our_kernel_lacks_is_left_alone():
    q, k, v = qkv()
    for model, inputs in (
        (Attention(enable_gqa=True, dropout_p=0.5), (q, k, v)),
        (Attention(), (q[0], k[0].repeat(2, 1, 1), v[0].repeat(2, 1, 1))),
        (Attention(enable_gqa=True), (q, k, v[..., :4])),
        (Attention(enable_gqa=True), (q.double(), k.double(), v.double())),
    ):
        program = graphs.edge(model, *inputs)
        before = graphs.text(program)
        assert not passes.ResolveAttentionPass()(program).modified
        assert graphs.text(program) == before


class Norm(nn.Module):
    """RMSNorm with uneven weights, then silu."""

    def __init__(self, shape, dtype, eps=None, affine=True):
        super().__init__()
        self.norm = nn.RMSNorm(shape, eps=eps, elementwise_affine=affine, dtype=dtype)
        if affine:
            nn.init.uniform_(self.norm.weight, 0.5, 2)
        self.requires_grad_(False)

    def forward(self, x):
        return F.silu(self.norm(x))


def test_resolves_rms_norm_and_silu():
    program = graphs.edge(Norm(8, torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16))
    before = graphs.text(program)
    assert passes.ResolveRmsNormPass()(program).modified
    assert passes.ResolveSiluPass()(program).modified
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
norm.weight: bfloat16 [8]
x: bfloat16 [2, 8], input
%2 = aten.rms_norm(x, [8], norm.weight): bfloat16 [2, 8]
%3 = aten.silu(%2): bfloat16 [2, 8]
return [%3]

norm.weight: bfloat16 [8]
x: bfloat16 [2, 8], input
%2 = cuda_int4.rms_norm(x, norm.weight, 1.1920928955078125e-07): bfloat16 [2, 8]
%3 = cuda_int4.silu(%2): bfloat16 [2, 8]
return [%3]""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [None, 1e-2])
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_numbers(dtype, eps, affine):
    model = Norm(40, dtype, eps, affine).norm
    x = (torch.randn(3, 40) * torch.tensor([[1e-4], [1.0], [30.0]])).to(dtype)  # eps decides row 0
    program = graphs.edge(model, x)
    assert passes.ResolveRmsNormPass()(program).modified
    weight = model.weight.double() if affine else None
    default = torch.finfo(torch.float32).eps
    exact = F.rms_norm(x.double(), [40], weight, default if eps is None else eps)
    for got, row in zip(graphs.run(program, x)[0], exact, strict=True):
        assert_close(got, row)


def test_norms_that_our_kernel_lacks_are_left_alone():
    for model, x in (
        (Norm((4, 8), torch.float32), torch.randn(2, 4, 8)),
        (Norm(8, torch.float64), torch.randn(2, 8, dtype=torch.float64)),
        (Norm(8, torch.float32), torch.randn(2, 8, dtype=torch.bfloat16)),
    ):
        program = graphs.edge(model, x)
        assert not passes.ResolveRmsNormPass()(program).modified


class Casts(nn.Module):
    """A cast, a clone for the sake of strides, a clone as an output, and another dim order."""

    def forward(self, x):
        y = x.bfloat16().transpose(1, 2).contiguous().view(2, -1)
        return y.float(), x.clone(), x.to(memory_format=torch.channels_last)


def test_resolves_dim_order_copies():
    program = graphs.edge(Casts(), torch.randn(2, 3, 4, 5))
    before = graphs.text(program)
    assert passes.ResolveDimOrderPass()(program).modified
    assert not passes.ResolveDimOrderPass()(program).modified
    assert_expected_inline(
        f"{before}\n\n{graphs.text(program)}",
        """\
x: float32 [2, 3, 4, 5], input
%1 = dim_order_ops._to_dim_order_copy(x, dtype=bfloat16, dim_order=[0, 1, 2, 3]): bfloat16 [2,
    3, 4, 5]
%2 = aten.permute_copy(%1, [0, 2, 1, 3]): bfloat16 [2, 4, 3, 5]
%3 = dim_order_ops._clone_dim_order(%2, dim_order=[0, 1, 2, 3]): bfloat16 [2, 4, 3, 5]
%4 = aten.view_copy(%3, [2, -1]): bfloat16 [2, 60]
%5 = dim_order_ops._to_dim_order_copy(%4, dtype=float32, dim_order=[0, 1]): float32 [2, 60]
%6 = dim_order_ops._clone_dim_order(x, dim_order=[0, 1, 2, 3]): float32 [2, 3, 4, 5]
%7 = dim_order_ops._to_dim_order_copy(x, dtype=float32, layout=strided, device=cpu,
    dim_order=[0, 2, 3, 1]): float32 [2, 3, 4, 5]
return [%5, %6, %7]

x: float32 [2, 3, 4, 5], input
%1 = aten._to_copy(x, dtype=bfloat16): bfloat16 [2, 3, 4, 5]
%2 = aten.permute_copy(%1, [0, 2, 1, 3]): bfloat16 [2, 4, 3, 5]
%3 = aten.view_copy(%2, [2, -1]): bfloat16 [2, 60]
%4 = aten._to_copy(%3, dtype=float32): float32 [2, 60]
%5 = aten.clone(x): float32 [2, 3, 4, 5]
%6 = dim_order_ops._to_dim_order_copy(x, dtype=float32, layout=strided, device=cpu,
    dim_order=[0, 2, 3, 1]): float32 [2, 3, 4, 5]
return [%4, %5, %6]""",
    )
