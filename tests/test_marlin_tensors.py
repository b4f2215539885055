"""CudaMarlinInt4Tensor and CudaMarlin24Int4Tensor: what they mean, how they travel and export.

What they share with CudaCoalescedInt4Tensor is tested there (test_tensors.py); bytes and index maps
in test_marlin.py and test_marlin_layouts.py; the numbers of kernels in test_kernels_marlin.py.
"""

import copy
import io
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import cuda_int4
from cuda_int4.marlin import Marlin24Int4, MarlinInt4
from cuda_int4.tensors import (
    TENSORS,
    CudaCoalescedInt4Tensor,
    CudaInt4Tensor,
    CudaMarlin24Int4Tensor,
    CudaMarlinInt4Tensor,
    pack_int4,
)
from marlin_cases import SHAPES, codes, codes_24, weight
from messages import folded, message

CLASSES = (CudaMarlinInt4Tensor, CudaMarlin24Int4Tensor)


def source(cls, N=70, K=128, group_size=32, zero_point=False):
    """A canonical weight that ``cls`` takes."""
    q = codes_24(N, K) if cls is CudaMarlin24Int4Tensor else codes(N, K)
    return weight(q, group_size, zero_point=zero_point and cls is CudaMarlinInt4Tensor)


def parts(packed: CudaInt4Tensor) -> dict:
    """The constructor's arguments."""
    names, attributes = packed.__tensor_flatten__()
    return {name: getattr(packed, name) for name in names} | attributes


def assert_same(a: CudaInt4Tensor, b: CudaInt4Tensor):
    assert type(a) is type(b)
    a, b = parts(a), parts(b)
    assert a.keys() == b.keys()
    for name, part in a.items():
        same = torch.equal if isinstance(part, torch.Tensor) else lambda x, y: x == y
        assert same(part, b[name]), name


def linear(packed: CudaInt4Tensor, bias=None) -> nn.Linear:
    layer = nn.Linear(packed.shape[1], packed.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


# ---- packing and meaning ----


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("N, K, group_size", SHAPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_unpacking_is_the_inverse_of_packing_and_layouts_change_into_each_other(
    cls, N, K, group_size, zero_point
):
    canonical = source(cls, N, K, group_size, zero_point)
    packed = cls.from_int4(canonical)
    assert packed.shape == (N, K) and packed.layout_tag == cls.TAG
    coalesced = CudaCoalescedInt4Tensor.from_int4(canonical)
    assert_same(CudaCoalescedInt4Tensor.from_int4(packed), coalesced)
    assert_same(cls.from_int4(coalesced), packed)
    assert_same(cls.from_int4(packed), packed)
    assert torch.equal(packed.dequantize(), canonical.dequantize())


def test_parts_are_those_of_the_packed_forms():
    canonical = source(CudaMarlinInt4Tensor, zero_point=True)
    ours, theirs = CudaMarlinInt4Tensor.from_int4(canonical), MarlinInt4.pack(canonical)
    for name in ("qdata", "scale", "zero_point"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    canonical = source(CudaMarlin24Int4Tensor)
    ours, theirs = CudaMarlin24Int4Tensor.from_int4(canonical), Marlin24Int4.pack(canonical)
    for name in ("qdata", "meta", "scale"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("cls", CLASSES)
def test_an_embedding_dequantises_the_rows_it_looks_up(cls, group_size, dtype):
    packed = cls.from_int4(source(cls, 130, 128, group_size, zero_point=True)).to(dtype)
    table = packed.dequantize().to(dtype)
    for indices in (torch.arange(130), torch.tensor([[129, 0, 64], [63, 1, 129]])):
        assert torch.equal(F.embedding(indices, packed), table[indices])
    assert torch.equal(torch.embedding(packed, torch.tensor([7])), table[[7]])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("row", [-1, 70, 127, 128])
def test_an_embedding_refuses_rows_that_are_padding(cls, row):
    packed = cls.from_int4(source(cls, 70))  # padded to 128
    with pytest.raises(IndexError, match="index out of range"):
        F.embedding(torch.tensor([69, row]), packed)


def test_auto_and_forced_layouts():
    dense, sparse = source(CudaMarlinInt4Tensor), source(CudaMarlin24Int4Tensor)
    asymmetric = source(CudaMarlinInt4Tensor, zero_point=True)
    assert type(pack_int4(dense)) is CudaCoalescedInt4Tensor
    assert type(pack_int4(asymmetric)) is CudaCoalescedInt4Tensor
    assert type(pack_int4(sparse)) is CudaMarlin24Int4Tensor
    for name, tag in (("coalesced", "coalesced.v1"), ("marlin", "marlin.v1")):
        assert pack_int4(sparse, name).layout_tag == pack_int4(dense, tag).layout_tag == tag
    assert pack_int4(sparse, "marlin24", "int8").activation == "int8"
    assert_expected_inline(
        folded(
            message(pack_int4, dense, "marlin24", who="wq.weight"),
            message(pack_int4, asymmetric, "marlin24", who="wq.weight"),
            message(CudaMarlin24Int4Tensor.from_int4, asymmetric, who="wq.weight"),
        ),
        """\
wq.weight: expected at most 2 non-zero of every 4 consecutive weights of a row, got 4 in row 0,
    columns 0..3: -4, 3, 1, -8 in int4 (2186 such of 2240); prune the float model with prune_24_
    before quantize_, or keep a dense layout
wq.weight: expected a symmetric weight for marlin24.v1, got one with zero points; 2:4 kernels
    know none: quantise with Int4Config(symmetric=True), or choose another layout
wq.weight: expected a symmetric int4 weight (zero_point None), got zero_point float32 [70, 4];
    2:4 kernels know no zero points: quantise with Int4Config(symmetric=True)""",
    )


# ---- quantize_ ----


def pruned(dtype=torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 100), nn.SiLU(), nn.Linear(100, 96)).to(dtype)
    model[2] = nn.Linear(128, 96).to(dtype)
    model[0] = nn.Linear(128, 128).to(dtype)
    return cuda_int4.prune_24_(model).eval().requires_grad_(False)


@pytest.mark.parametrize("method", ["min_max", "hqq"])
@pytest.mark.parametrize("layout", ["auto", "marlin24"])
def test_quantising_a_pruned_model_keeps_its_zeros_exact(layout, method):
    model, config = pruned(), cuda_int4.Int4Config(group_size=32, layout=layout, method=method)
    zeros = [layer.weight == 0 for layer in (model[0], model[2])]
    cuda_int4.quantize_(model, config)
    for layer, zero in zip((model[0], model[2]), zeros, strict=True):
        assert isinstance(layer.weight, CudaMarlin24Int4Tensor)
        assert zero.any() and layer.weight.dequantize()[zero].eq(0).all()


@pytest.mark.parametrize("activation", ["none", "int8"])
@pytest.mark.parametrize("layout", ["marlin", "marlin24"])
def test_a_quantised_model_computes_what_coalesced_does(layout, activation):
    model, other = pruned(), pruned()
    config = cuda_int4.Int4Config(group_size=64, layout=layout, activation=activation)
    cuda_int4.quantize_(model, config)
    cuda_int4.quantize_(other, replace(config, layout="coalesced"))
    kinds = [type(module.weight) for module in (model[0], model[2], other[0])]
    assert kinds == [TENSORS[f"{layout}.v1"]] * 2 + [CudaCoalescedInt4Tensor]
    x = torch.randn(3, 5, 128).bfloat16()
    assert torch.equal(model(x), other(x))


def test_a_weight_that_is_not_24_is_refused_with_its_first_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8, bias=False))
    with torch.no_grad():
        model[0].weight[:5].view(5, 16, 4)[..., :2] = 0
        model[0].weight[5:].view(3, 16, 4)[..., 2:] = 0
        model[0].weight[3, 41] = 1.0
    config = cuda_int4.Int4Config(group_size=32, layout="marlin24")
    assert_expected_inline(
        folded(
            message(cuda_int4.quantize_, model, config),
            message(cuda_int4.Int4Config, layout="marlin24", symmetric=False),
        ),
        """\
0.weight: expected at most 2 non-zero of every 4 consecutive weights of a row, got 3 in row 3,
    columns 40..43: 0, -8, -1, 1 in int4 (1 such of 128); prune the float model with prune_24_
    before quantize_, or keep a dense layout
Int4Config: expected symmetric=True with layout 'marlin24', got False; 2:4 kernels know no zero
    points: leave symmetric as it is, or choose another layout""",
    )
    assert type(model[0].weight) is nn.Parameter  # it is what it was


def test_no_weight_changes_where_a_later_one_is_refused():
    model = pruned()
    config = cuda_int4.Int4Config(group_size=32, layout="marlin24")
    for value in (1.0, float("nan")):
        with torch.no_grad():
            model[2].weight[7, :4] = value
        before = [layer.weight for layer in (model[0], model[2])]
        assert message(cuda_int4.quantize_, model, config).startswith("2.weight: expected ")
        assert model[0].weight is before[0] and model[2].weight is before[1]


def test_a_weight_that_is_24_once_it_is_int4_is_taken():
    model = pruned()
    with torch.no_grad():  # a 30th of the smallest scale: int4 has no code for it but 0
        weight = model[0].weight
        step = weight.abs().view(-1, 4, 32).amax(-1).min() / 7.5
        weight[weight == 0] = step / 30
    cuda_int4.quantize_(model, cuda_int4.Int4Config(group_size=32, layout="marlin24"))
    assert isinstance(model[0].weight, CudaMarlin24Int4Tensor)


def test_prepare_packs_into_the_layout_that_is_asked_for():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(64, 8))
    native = source(CudaMarlin24Int4Tensor, 8, 64)
    from torchao.quantization import Int4Tensor

    scale = native.scale.t().contiguous()
    for layer in model:
        signed = (native.qdata ^ 0x88).view(torch.int8)
        int4 = Int4Tensor(signed, scale, torch.zeros_like(scale), [1, 32], torch.Size((8, 64)))
        layer.weight = nn.Parameter(int4, requires_grad=False)
    cuda_int4.prepare_(model, layout="marlin24")
    assert all(isinstance(layer.weight, CudaMarlin24Int4Tensor) for layer in model)
    assert torch.equal(model[0].weight.dequantize(), native.dequantize())


# ---- travelling ----


@pytest.mark.parametrize("cls", CLASSES)
def test_a_weight_travels_bit_for_bit(cls):
    packed = cls.from_int4(source(cls, zero_point=True), "int8")
    moved = packed.to(torch.float32)
    assert moved.dtype == torch.float32 and moved.activation == "int8"
    assert_same(cls(**parts(moved) | {"dtype": packed.dtype}), packed)
    assert_same(packed.clone(), packed)
    assert_same(copy.deepcopy(nn.Parameter(packed, requires_grad=False)).data, packed)
    assert packed.to("meta").qdata.is_meta and packed.to("meta").shape == packed.shape
    for saved in (packed, {"weight": packed}):
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
        assert_same(loaded if saved is packed else loaded["weight"], packed)
    target, other = linear(packed), linear(cls.from_int4(source(cls, 70, 128, zero_point=True)))
    target.load_state_dict(linear(packed).state_dict(), assign=True)
    assert_same(target.weight.data, packed)
    with pytest.raises(RuntimeError, match="copy_: expected a source like the target"):
        other.load_state_dict(target.state_dict())  # of another activation
    with pytest.raises(ValueError, match=r"target .*shape=\[128, 128\].* got .*shape=\[70, 128\]"):
        cls.from_int4(source(cls, 128, 128), "int8").copy_(cls.from_int4(source(cls), "int8"))


def saved_and_loaded(cls, change):
    packed, buffer = cls.from_int4(source(cls)), io.BytesIO()
    change(packed.__dict__)
    torch.save(packed, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def test_a_saved_weight_is_checked_as_it_is_loaded():
    sparse = CudaMarlin24Int4Tensor
    changes = [
        (CudaMarlinInt4Tensor, lambda fields: fields.update(layout_tag="marlin.v2")),
        (CudaMarlinInt4Tensor, lambda fields: fields.update(layout_tag="coalesced.v1")),
        (CudaMarlinInt4Tensor, lambda fields: fields.pop("zero_point")),
        (sparse, lambda fields: fields.pop("meta")),
        (sparse, lambda fields: fields.update(qdata=fields["qdata"].repeat(2, 1))),
        (sparse, lambda fields: fields.update(meta=torch.zeros_like(fields["meta"]))),
    ]
    assert_expected_inline(
        folded(*[message(saved_and_loaded, *change) for change in changes]),
        """\
CudaMarlinInt4Tensor: layout_tag: expected marlin.v1, got marlin.v2, newer than the one this
    build reads; update cuda_int4, or pack the weight again with this version
CudaMarlinInt4Tensor: expected layout_tag marlin.v1, got coalesced.v1; use its own class
CudaMarlinInt4Tensor: expected a saved weight with zero_point, got none; it was saved by another
    version of cuda_int4: quantise or prepare the model again
CudaMarlin24Int4Tensor: expected a saved weight with meta, got none; it was saved by another
    version of cuda_int4: quantise or prepare the model again
CudaMarlin24Int4Tensor: expected qdata uint8 [4, 1024] for N=70 (padded to 128), K=128,
    group_size=32, got uint8 [8, 1024]; the parts are of another weight or in another order than
    marlin24.v1
CudaMarlin24Int4Tensor: expected meta 'first | second << 2' with first < second, got 0x0 (first
    0, second 0) in row 0, columns 0..3 (4096 such in all); the metadata is damaged or of
    another order: read the checkpoint again, or pack the weight from its source""",
    )


def test_repr_shows_form_and_no_values():
    shown = [repr(cls.from_int4(source(cls, zero_point=True))) for cls in CLASSES]
    assert_expected_inline(
        folded(*shown),
        """\
CudaMarlinInt4Tensor(shape=[70, 128], dtype=torch.float16, device=cpu, group_size=32,
    layout_tag='marlin.v1', activation='none', scale=float16 [4, 128], zero_point=float32 [4,
    128], act_pre_scale=False)
CudaMarlin24Int4Tensor(shape=[70, 128], dtype=torch.float16, device=cpu, group_size=32,
    layout_tag='marlin24.v1', activation='none', meta=int16 [4, 256], scale=float16 [4, 128],
    zero_point=8, act_pre_scale=False)""",
    )


def test_parts_that_disagree_are_refused():
    dense = CudaMarlinInt4Tensor.from_int4(source(CudaMarlinInt4Tensor, zero_point=True))
    sparse = CudaMarlin24Int4Tensor.from_int4(source(CudaMarlin24Int4Tensor))
    found = [
        message(type(packed), **parts(packed) | changed)
        for packed, changed in [
            (dense, {"layout_tag": "coalesced.v1"}),
            (dense, {"activation": "fp8"}),
            (dense, {"shape": (64, 128)}),
            (dense, {"shape": (70, 128, 1)}),
            (dense, {"shape": (70, 256)}),
            (dense, {"group_size": 64}),
            (dense, {"qdata": dense.qdata.view(torch.int32)}),
            (dense, {"zero_point": dense.zero_point.double()}),
            (dense, {"act_pre_scale": torch.ones(3)}),
            (dense, {"dtype": torch.float64}),
            (sparse, {"meta": sparse.meta[:2]}),
            (sparse, {"meta": sparse.meta.to("meta")}),
            (sparse, {"meta": sparse.meta ^ sparse.meta}),
            (sparse, {"scale": sparse.scale.t().contiguous().t()}),
        ]
    ]
    assert_expected_inline(
        folded(*found),
        """\
CudaMarlinInt4Tensor: expected layout_tag marlin.v1, got coalesced.v1; use its own class
CudaMarlinInt4Tensor: expected activation in 'none', 'int8', got 'fp8'; 'none' keeps x as it is
CudaMarlinInt4Tensor: expected qdata uint8 [8, 512] for N=64 (padded to 64), K=128,
    group_size=32, got uint8 [8, 1024]; the parts are of another weight or in another order than
    marlin.v1
CudaMarlinInt4Tensor: expected shape (N, K), got (70, 128, 1); a weight is 2-D
CudaMarlinInt4Tensor: expected qdata uint8 [16, 1024] for N=70 (padded to 128), K=256,
    group_size=32, got uint8 [8, 1024]; the parts are of another weight or in another order than
    marlin.v1
CudaMarlinInt4Tensor: expected scale float16 or bfloat16 or float32 [2, 128] for N=70 (padded to
    128), K=128, group_size=64, got float16 [4, 128]; the parts are of another weight or in
    another order than marlin.v1
CudaMarlinInt4Tensor: expected qdata uint8 [8, 1024] for N=70 (padded to 128), K=128,
    group_size=32, got int32 [8, 256]; the parts are of another weight or in another order than
    marlin.v1
CudaMarlinInt4Tensor: expected zero_point float16 or float32 [4, 128] for N=70 (padded to 128),
    K=128, group_size=32, got float64 [4, 128]; the parts are of another weight or in another
    order than marlin.v1
CudaMarlinInt4Tensor: expected act_pre_scale float16 or bfloat16 or float32 [128] for N=70
    (padded to 128), K=128, group_size=32, got float32 [3]; the parts are of another weight or
    in another order than marlin.v1
CudaMarlinInt4Tensor: expected dtype float16, bfloat16 or float32, got torch.float64; there are
    no kernels for other activations
CudaMarlin24Int4Tensor: expected meta int16 [4, 256] for N=70 (padded to 128), K=128,
    group_size=32, got int16 [2, 256]; the parts are of another weight or in another order than
    marlin24.v1
CudaMarlin24Int4Tensor: expected meta contiguous on cpu, where qdata is, got strides (256, 1) on
    meta; move it there, and call .contiguous() on it
CudaMarlin24Int4Tensor: expected meta 'first | second << 2' with first < second, got 0x0 (first
    0, second 0) in row 0, columns 0..3 (4096 such in all); the metadata is damaged or of
    another order: read the checkpoint again, or pack the weight from its source
CudaMarlin24Int4Tensor: expected scale contiguous on cpu, where qdata is, got strides (1, 4) on
    cpu; move it there, and call .contiguous() on it""",
    )


def test_other_uses_are_refused():
    packed = CudaMarlinInt4Tensor.from_int4(source(CudaMarlinInt4Tensor))
    x = torch.ones(128, dtype=torch.float16)
    found = [
        message(use, error=NotImplementedError)
        for use in (
            lambda: packed @ x,
            lambda: F.linear(packed, x[None]),
            lambda: F.embedding(torch.tensor([1]), packed, max_norm=1.0),
            lambda: packed[:2],
        )
    ]
    assert all(text.startswith("CudaMarlinInt4Tensor: expected ") for text in found)


# ---- linear ----


@pytest.mark.parametrize("pre_scale", [None, torch.tensor([0.5]), torch.rand(128) + 0.5])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_linear_takes_bias_and_act_pre_scale(cls, pre_scale):
    canonical = replace(source(cls), act_pre_scale=pre_scale)
    x, bias = torch.randn(2, 3, 128).half(), torch.randn(70).half()
    layers = [linear(c.from_int4(canonical), bias) for c in (cls, CudaCoalescedInt4Tensor)]
    assert torch.equal(layers[0](x), layers[1](x))


def test_the_op_needs_n_for_a_layout_that_pads_it():
    packed = CudaMarlinInt4Tensor.from_int4(source(CudaMarlinInt4Tensor))
    op, x = torch.ops.cuda_int4.linear, torch.randn(2, 128)
    args = (x, packed.qdata, packed.scale, None, None, None, 32, "marlin.v1", "none")
    assert op(*args, 70).shape == op(*args, out_features=70).shape == (2, 70)
    coalesced = CudaCoalescedInt4Tensor.from_int4(packed)
    plain = (x, coalesced.qdata, coalesced.scale, None, None, None, 32, "coalesced.v1", "none")
    assert torch.equal(op(*plain, 70), op(*plain))
    error = cuda_int4._native.CudaInt4Error
    assert_expected_inline(
        folded(
            message(op, *args),
            message(op, *args, 64, error=error),
            message(op, *plain, 64, error=error),
        ),
        """\
cuda_int4.linear: expected out_features with a weight in marlin.v1, which pads N to whole tiles,
    got None; state the N of the weight
cuda_int4::linear: expected out_features in 65..128, as marlin.v1 pads N to 128, got 64; state
    the N of the weight, without padding, in the call [InvalidArgument]
cuda_int4::linear: expected out_features 70, the rows of qdata, or none, got 64; the weight is
    damaged or was packed for something else, pack it again [InvalidArgument]""",
    )


# ---- export ----


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_linear_exports_as_one_call_of_the_op(cls, strict):
    model = linear(cls.from_int4(source(cls), "int8"), torch.randn(70).half())
    x = torch.randn(3, 128).half()
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},), strict=strict)
    exported = exported.run_decompositions({})
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [torch.ops.cuda_int4.linear.default]
    assert calls[0].args[6:] == (32, cls.TAG, "int8", 70)
    assert calls[0].meta["val"].shape[1:] == (70,)
    assert torch.equal(exported.module()(x), model(x))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_tied_embedding_exports_and_runs_from_a_file(cls, tmp_path):
    torch.manual_seed(0)
    packed = nn.Parameter(cls.from_int4(source(cls, 100, 64)), requires_grad=False)
    embedding, head = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
    embedding.weight = head.weight = packed
    model, tokens = nn.Sequential(embedding, head), torch.tensor([[1, 99, 64]])
    path = cuda_int4.export(model, (tokens,), tmp_path / "model.pte")
    loaded = cuda_int4.load(path, device="cpu")
    assert torch.equal(loaded.forward(tokens)[0], model(tokens))
    for row in (-1, 100):  # 100..127 are padding
        with pytest.raises(cuda_int4._native.CudaInt4Error, match="refused its arguments"):
            loaded.forward(torch.tensor([[1, row, 64]]))
    (entry,) = cuda_int4.inspect(path)["weights"]
    assert entry["layout_tag"] == cls.TAG and (entry["N"], entry["padded_N"]) == (100, 128)
