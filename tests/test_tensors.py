"""CudaCoalescedInt4Tensor: its bytes, what it means, how it travels, and what it refuses."""

import copy
import hashlib
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn

import cases
from cuda_int4 import layouts
from cuda_int4.int4 import from_executorch
from cuda_int4.packing import pack_nibbles, unpack_nibbles
from cuda_int4.tensors import CudaCoalescedInt4Tensor
from messages import folded, message

RAGGED = cases.Case(7, 13, 288, 32, "native", "fractional")
LAYOUT = layouts.LAYOUTS[layouts.COALESCED]


def parts(weight: CudaCoalescedInt4Tensor) -> dict:
    """The constructor's arguments."""
    names, attributes = weight.__tensor_flatten__()
    return {name: getattr(weight, name) for name in names} | attributes


def rebuilt(weight: CudaCoalescedInt4Tensor, **changed) -> CudaCoalescedInt4Tensor:
    return CudaCoalescedInt4Tensor(**(parts(weight) | changed))


def assert_same(a: CudaCoalescedInt4Tensor, b: CudaCoalescedInt4Tensor):
    a, b = parts(a), parts(b)
    assert a.keys() == b.keys()
    for name, part in a.items():
        same = torch.equal if isinstance(part, torch.Tensor) else lambda x, y: x == y
        assert same(part, b[name]), name


# ---- bytes ----


@pytest.mark.parametrize("case", cases.WEIGHTS[::5], ids=str)
def test_gathering_through_the_index_maps_gives_codes_scales_and_zero_points(case):
    source = case.source(seed=0)
    weight = CudaCoalescedInt4Tensor.from_int4(source)
    N, K, n_groups = case.N, case.K, case.K // case.group_size
    n, k = np.meshgrid(np.arange(N), np.arange(K), indexing="ij")
    bit = LAYOUT.qdata_bit_offset(n, k, N, K)
    q = weight.qdata.numpy().ravel()[bit // 8] >> (bit % 8) & 15
    place = LAYOUT.scale_index(n, k // case.group_size, N, n_groups)
    scale = weight.scale.double().numpy().ravel()[place]
    zero = 8 if weight.zero_point is None else weight.zero_point.double().numpy().ravel()[place]
    w = cases.definition(source).numpy()
    assert np.all(np.abs((q - zero) * scale - w) <= 2**-22 * (16 * scale + np.abs(w)))


def test_parts_have_the_strides_of_new_tensors():
    weight = CudaCoalescedInt4Tensor.from_int4(cases.Case(1, 8, 64, 64, zero="integer").source(0))
    for name in weight.__tensor_flatten__()[0]:
        part = getattr(weight, name)
        assert part.stride() == torch.empty(part.shape).stride()


@pytest.mark.parametrize("n, k", [(0, 0), (0, 1), (2, 31), (2, 32), (4, 94), (4, 95)])
def test_scattering_one_code_sets_its_four_bits_and_no_other(n, k):
    N, K = 5, 96
    q = torch.zeros(N, K, dtype=torch.uint8)
    q[n, k] = 15
    ones = torch.ones(K // 32, N)
    weight = CudaCoalescedInt4Tensor.from_int4(from_executorch(pack_nibbles(q), ones, ones, 32))
    bits = np.unpackbits(weight.qdata.numpy().ravel(), bitorder="little")
    first = LAYOUT.qdata_bit_offset(n, k, N, K)
    assert np.flatnonzero(bits).tolist() == list(range(first, first + 4))


def test_packed_bytes_are_what_they_were():
    digest = hashlib.sha256()
    for case in cases.WEIGHTS:
        weight = CudaCoalescedInt4Tensor.from_int4(case.source(seed=0))
        for name in weight.__tensor_flatten__()[0]:
            digest.update(getattr(weight, name).view(torch.uint8).numpy().tobytes())
    assert_expected_inline(
        digest.hexdigest(), """772bb879db85ba72b821d8672f43779257b63dba8cc23d6270430fda4e78d4a8"""
    )


# ---- meaning ----


def test_dequantize_is_the_definition_weight_by_weight():
    _, weight = cases.Case(1, 3, 96, 32, "native", "fractional").make(seed=0)
    q = unpack_nibbles(weight.qdata)
    dequantized = weight.dequantize(torch.float64)
    for n in range(3):
        for k in range(96):
            zero_point, scale = weight.zero_point[n, k // 32], weight.scale[n, k // 32]
            assert dequantized[n, k] == (int(q[n, k]) - zero_point.double()) * scale.double()
    assert weight.dequantize().dtype == torch.float32


@pytest.mark.parametrize("case", cases.WEIGHTS[::7], ids=str)
def test_unpack_is_the_inverse_of_packing(case):
    _, weight = case.make(seed=0)
    assert_same(CudaCoalescedInt4Tensor.from_int4(weight.unpack()), weight)
    assert_same(CudaCoalescedInt4Tensor.from_int4(weight), weight)


def test_activation_is_carried():
    weight = CudaCoalescedInt4Tensor.from_int4(RAGGED.source(0), activation="int8")
    assert weight.activation == "int8"
    assert weight.to(torch.float32).activation == weight.clone().activation == "int8"


@pytest.mark.parametrize("zero", ["symmetric", "integer", "fractional"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_embedding_dequantises_the_rows_it_looks_up(zero, dtype):
    _, weight = cases.Case(1, 13, 288, 32, "executorch", zero, dtype).make(seed=0)
    table, indices = weight.dequantize().to(dtype), torch.tensor([[12, 0, 5], [5, 1, 12]])
    assert torch.equal(F.embedding(indices, weight), table[indices])
    assert torch.equal(F.embedding(indices, weight, padding_idx=0), table[indices])
    assert torch.equal(torch.embedding(weight, indices), table[indices])


# ---- travelling ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_to_a_dtype_keeps_every_bit(dtype):
    _, weight = RAGGED.make(seed=0)
    moved = weight.to(dtype)
    assert moved.dtype == dtype
    assert_same(rebuilt(moved, dtype=weight.dtype), weight)


def test_to_meta_and_clone_and_detach():
    _, weight = RAGGED.make(seed=0)
    assert weight.to("meta").qdata.is_meta and weight.to("meta").zero_point.is_meta
    clone, detached = weight.clone(), weight.detach()
    assert_same(clone, weight)
    assert_same(detached, weight)
    assert clone.scale.data_ptr() != weight.scale.data_ptr()
    assert detached.scale.data_ptr() == weight.scale.data_ptr()


class Tied(nn.Module):
    """An embedding and a head that share one int4 weight, and a layer beside them."""

    def __init__(self, seed: int):
        super().__init__()
        _, weight = cases.Case(1, 40, 64, 32, "executorch", "integer").make(seed)
        self.embedding, self.head = nn.Embedding(40, 64), nn.Linear(64, 40, bias=False)
        self.inner = nn.Linear(64, 64)
        self.embedding.weight = self.head.weight = nn.Parameter(weight, requires_grad=False)
        _, weight = cases.Case(1, 64, 64, 64, "native", "fractional").make(seed + 1)
        self.inner.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, tokens):
        """Logits of tokens."""
        return self.head(self.inner(self.embedding(tokens)))


@pytest.mark.parametrize(
    "move",
    [nn.Module.half, lambda m: m.to(torch.float32), copy.deepcopy],
    ids=["half", "to", "copy"],
)
def test_a_module_moves_its_weights_and_keeps_ties(move):
    module = move(Tied(seed=0).bfloat16())
    assert module.head.weight is module.embedding.weight
    assert isinstance(module.head.weight, CudaCoalescedInt4Tensor)
    reference = Tied(seed=0).inner.weight
    assert_same(rebuilt(module.inner.weight, dtype=reference.dtype), reference)
    assert module.inner.weight.dtype == module.inner.bias.dtype


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_saves_and_loads(assign):
    module, other, buffer = Tied(seed=0), Tied(seed=5), io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True), assign=assign)
    assert_same(other.head.weight, module.head.weight)
    assert_same(other.inner.weight, module.inner.weight)


def saved_and_loaded(change) -> CudaCoalescedInt4Tensor:
    weight, buffer = RAGGED.make(seed=0)[1], io.BytesIO()
    change(weight.__dict__)
    torch.save(weight, buffer)
    buffer.seek(0)
    return torch.load(buffer)


def test_a_saved_weight_is_checked_as_it_is_loaded():
    changes = [
        lambda fields: fields.update(layout_tag="coalesced.v0"),
        lambda fields: fields.pop("layout_tag"),
        lambda fields: fields.update(scale=fields["scale"].t().contiguous()),
    ]
    assert_expected_inline(
        folded(*[message(saved_and_loaded, change) for change in changes]),
        """\
CudaCoalescedInt4Tensor: layout_tag: expected coalesced.v1, got coalesced.v0, older than the one
    this build reads; pack the weight again, from its source, with this version
CudaCoalescedInt4Tensor: expected a saved weight with layout_tag, got none; it was saved by
    another version of cuda_int4: quantise or prepare the model again
CudaCoalescedInt4Tensor: expected scale float16, bfloat16 or float32 [N, n_groups] = [13, 9],
    got bfloat16 [9, 13]; torchao's [n_groups, N] order is read by from_int4""",
    )


def test_repr_shows_form_and_no_values():
    _, weight = RAGGED.make(seed=0)
    assert_expected_inline(
        folded(repr(weight)),
        """\
CudaCoalescedInt4Tensor(shape=[13, 288], dtype=torch.bfloat16, device=cpu, group_size=32,
    layout_tag='coalesced.v1', activation='none', scale=bfloat16 [13, 9], zero_point=float32
    [13, 9], act_pre_scale=False)""",
    )


# ---- refusals ----


def test_parts_that_disagree_are_refused():
    _, weight = cases.Case(1, 3, 96, 32, "executorch", "integer").make(seed=0)
    qdata, scale = weight.qdata, weight.scale
    found = [
        message(rebuilt, weight, **changed)
        for changed in [
            {"layout_tag": "plain.v1"},
            {"layout_tag": "coalesced.v2"},
            {"activation": "fp8"},
            {"group_size": 64},
            {"qdata": qdata.to(torch.int8)},
            {"qdata": qdata[None]},
            {"scale": scale.double()},
            {"scale": scale[:, :2].contiguous()},
            {"scale": scale.t().contiguous().t()},
            {"zero_point": weight.zero_point.to(torch.int8)},
            {"zero_point": weight.zero_point[:2]},
            {"zero_point": weight.zero_point.to("meta")},
            {"act_pre_scale": torch.ones(3)},
            {"shape": (3, 48)},
            {"dtype": torch.float64},
        ]
    ]
    assert_expected_inline(
        folded(*found),
        """\
CudaCoalescedInt4Tensor: layout_tag: expected one of coalesced.v1, marlin.v1, marlin24.v1, got
    plain.v1, an interchange format that no kernel reads; pack it with
    CudaCoalescedInt4Tensor.from_int4, or lower through CudaInt4Partitioner, which does
CudaCoalescedInt4Tensor: layout_tag: expected coalesced.v1, got coalesced.v2, newer than the one
    this build reads; update cuda_int4, or pack the weight again with this version
CudaCoalescedInt4Tensor: expected activation in 'none', 'int8', got 'fp8'; 'none' keeps x as it
    is
CudaCoalescedInt4Tensor: expected K % 64 == 0, got K=96, group_size=64; pick group_size 32, or
    pad K to 128
CudaCoalescedInt4Tensor: expected qdata uint8 [N, K/2], got int8 [3, 48]; only 2-D weights are
    supported, a stack of experts must be split into one weight each
CudaCoalescedInt4Tensor: expected qdata uint8 [N, K/2], got uint8 [1, 3, 48]; only 2-D weights
    are supported, a stack of experts must be split into one weight each
CudaCoalescedInt4Tensor: expected scale float16, bfloat16 or float32 [N, n_groups] = [3, 3], got
    float64 [3, 3]; torchao's [n_groups, N] order is read by from_int4
CudaCoalescedInt4Tensor: expected scale float16, bfloat16 or float32 [N, n_groups] = [3, 3], got
    bfloat16 [3, 2]; torchao's [n_groups, N] order is read by from_int4
CudaCoalescedInt4Tensor: expected scale contiguous, got strides (1, 3) for shape (3, 3); call
    .contiguous() on it
CudaCoalescedInt4Tensor: expected zero_point bfloat16 or float32 [3, 3], got int8 [3, 3]; None
    means 8 everywhere
CudaCoalescedInt4Tensor: expected zero_point bfloat16 or float32 [3, 3], got bfloat16 [2, 3];
    None means 8 everywhere
CudaCoalescedInt4Tensor: expected zero_point on cpu, where qdata is, got meta; move the parts to
    one device
CudaCoalescedInt4Tensor: expected act_pre_scale float16, bfloat16 or float32 [1] or [K] = [96],
    got float32 [3]; it multiplies x along K
CudaCoalescedInt4Tensor: expected shape [3, 96] for qdata [3, 48], got [3, 48]; two codes lie in
    each byte
CudaCoalescedInt4Tensor: expected dtype float16, bfloat16 or float32, got torch.float64; there
    are no kernels for other activations""",
    )


def test_other_uses_are_refused():
    _, weight = RAGGED.make(seed=0)
    x = torch.ones(288, dtype=torch.bfloat16)
    uses = [
        lambda: weight @ x,
        lambda: F.linear(weight, x[None]),
        lambda: F.embedding(torch.tensor([1]), weight, max_norm=1.0),
        lambda: weight[:2],
    ]
    found = [message(use, error=NotImplementedError) for use in uses]
    assert_expected_inline(
        folded(*found),
        """\
CudaCoalescedInt4Tensor: expected F.linear or F.embedding, outside of torch.cond and other
    control flow, got aten.mv.default; an int4 weight computes nothing else: call .dequantize()
    on it first, or leave this layer float
CudaCoalescedInt4Tensor: expected it as the weight of F.linear, got it as another argument; call
    .dequantize() on it first
CudaCoalescedInt4Tensor: expected an embedding without max_norm, got 1.0; it rewrites the weight
    in place: leave this embedding float
CudaCoalescedInt4Tensor: expected F.linear or F.embedding, outside of torch.cond and other
    control flow, got aten.slice.Tensor; an int4 weight computes nothing else: call
    .dequantize() on it first, or leave this layer float""",
    )


def test_copying_between_forms_is_refused():
    _, weight = RAGGED.make(seed=0)
    _, symmetric = cases.Case(1, 13, 288, 32).make(seed=0)
    found = [
        message(weight.copy_, symmetric),
        message(torch.empty(13, 288).copy_, weight),
    ]
    assert_expected_inline(
        folded(*found),
        """\
copy_: expected a source like the target CudaCoalescedInt4Tensor(shape=[13, 288], qdata=uint8
    [13, 144], scale=bfloat16 [13, 9], zero_point=float32 [13, 9], group_size=32, coalesced.v1,
    activation=none), got CudaCoalescedInt4Tensor(shape=[13, 288], qdata=uint8 [13, 144],
    scale=bfloat16 [13, 9], group_size=32, coalesced.v1, activation=none); to load int4 weights
    over others use load_state_dict(..., assign=True)
copy_: expected a source like the target Tensor float32 [13, 288], got
    CudaCoalescedInt4Tensor(shape=[13, 288], qdata=uint8 [13, 144], scale=bfloat16 [13, 9],
    zero_point=float32 [13, 9], group_size=32, coalesced.v1, activation=none); to load int4
    weights over others use load_state_dict(..., assign=True)""",
    )
