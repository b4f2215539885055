"""The partitioner: what goes into the delegate, what stays outside and why, what it refuses."""

import json
import logging
import operator

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge, to_edge_transform_and_lower
from executorch.exir.backend.utils import get_delegates, get_non_lowered_nodes
from expecttest import assert_expected_inline
from torch import nn
from torch.export import Dim

import cases
import graphs
import language_models
from cuda_int4 import _native
from cuda_int4 import partitioner as partitioner_module
from cuda_int4.blob import unpack_blob
from cuda_int4.lowering import save
from cuda_int4.model import load
from cuda_int4.partitioner import CudaInt4Partitioner
from cuda_int4.passes import FUSIONS
from cuda_int4.preprocess import decode_specs
from messages import folded, message

CASE = cases.Case(6, 32, 32, 32, "executorch", "integer", torch.float32)
X = torch.randn(4, 32)


def lower(model, *inputs, dynamic_shapes=None, whole=True, **options):
    """(edge manager, partitioner), by one of ExecuTorch's two user paths."""
    partitioner = CudaInt4Partitioner(**options)
    program = graphs.export(model, *inputs, dynamic_shapes=dynamic_shapes)
    if whole:
        return to_edge_transform_and_lower(program, partitioner=[partitioner]), partitioner
    return to_edge(program).to_backend(partitioner), partitioner


def delegates(manager):
    module = manager.exported_program().graph_module
    return [getattr(module, node.target) for node in get_delegates(module.graph)]


def blobs(manager):
    return [unpack_blob(delegate.processed_bytes) for delegate in delegates(manager)]


def outside(manager):
    graph = manager.exported_program().graph_module.graph
    ops = [graphs.op_of(node) for node in get_non_lowered_nodes(graph)]
    return [op for op in ops if op is not operator.getitem]


def assert_runs_like_eager(manager, model, *inputs, tmp_path):
    """Twice, for the sake of buffers."""
    with load(save(manager.to_executorch(), tmp_path / "model.pte")) as loaded:
        for _ in range(2):
            expected = torch.utils._pytree.tree_leaves(model(*inputs))
            torch.testing.assert_close(loaded.forward(*inputs), expected, rtol=1e-5, atol=1e-5)


def report(partitioner):
    return folded(*(f"{e['node']}: {e['op']}: {e['reason']}" for e in partitioner.report))


@pytest.fixture(scope="module")
def linear():
    return graphs.Linear(graphs.packed(CASE))


# ---- a whole transformer ----


@pytest.mark.parametrize(
    ("whole", "dtype"), [(True, torch.bfloat16), (True, torch.float32), (False, torch.float16)]
)
def test_a_transformer_with_cache_and_dynamic_length_is_one_delegate(whole, dtype):
    model = language_models.toy_llama().to(dtype)
    inputs, shapes = language_models.example(16)
    manager, partitioner = lower(model, *inputs, dynamic_shapes=shapes, whole=whole)
    assert partitioner.report == [] and outside(manager) == []
    (blob,) = blobs(manager)
    assert len(blob.linears) == 4 * model.LAYERS + 1  # q, k and v, and gate and up, are one
    names = [linear.name for linear in blob.linears]
    assert names[:2] == ["layers.0.wq+wk+wv.weight", "layers.0.wo.weight"]
    assert ("cuda_int4::attention.out" in blob.ops) == whole
    assert ("cuda_int4::rope_append.out" in blob.ops) == whole
    assert ("cuda_int4::index_put_" in blob.ops) != whole and "cuda_int4::copy_" not in blob.ops
    assert not manager.exported_program().state_dict  # caches and weights went along
    program = manager.to_executorch()
    assert len(program.executorch_program.execution_plan[0].delegates) == 1


def test_ops_of_a_whole_transformer():
    inputs, shapes = language_models.example(16)
    manager, _ = lower(language_models.toy_llama(), *inputs, dynamic_shapes=shapes)
    assert_expected_inline(
        "\n".join(sorted(blobs(manager)[0].ops)),
        """\
cuda_int4::add_rms_norm.out
cuda_int4::attention.out
cuda_int4::embedding.out
cuda_int4::gate_mul.out
cuda_int4::index.Tensor_out
cuda_int4::linear.out
cuda_int4::rms_norm.out
cuda_int4::rope_append.out""",
    )


# ---- what stays outside ----


class Distances(nn.Module):
    """An op without a kernel of ours, but one of ExecuTorch's, between two int4 linears."""

    def __init__(self, weight):
        super().__init__()
        self.a, self.b = graphs.Linear(weight), graphs.Linear(weight)

    def forward(self, x):
        """The distances split the graph."""
        return self.b(F.pdist(self.a(x).t())[:480].view(15, 32))


@pytest.mark.parametrize("whole", [True, False])
def test_a_node_without_a_kernel_stays_outside_with_its_reason(whole, caplog, tmp_path):
    model = Distances(graphs.packed(CASE))
    with caplog.at_level(logging.WARNING, logger="cuda_int4"):
        manager, partitioner = lower(model, X, whole=whole)
    assert outside(manager) == [torch.ops.aten._pdist_forward.default]
    assert_expected_inline(
        report(partitioner),
        """\
aten__pdist_forward_default: aten._pdist_forward.default: libcuda_int4 has no kernel for
    aten::_pdist_forward.out on cpu, cuda""",
    )
    assert_expected_inline(
        folded(*caplog.messages),
        """\
1 x aten._pdist_forward.default outside the delegate: libcuda_int4 has no kernel for
    aten::_pdist_forward.out on cpu, cuda""",
    )
    first, second = delegates(manager)
    for delegate in (first, second):
        specs = decode_specs(delegate.compile_specs)
        assert json.loads(specs.pop("outside")) == partitioner.report
        assert specs == {
            "layout": "auto",
            "fusions": ",".join(FUSIONS),
            "kv_cache": "none",
            "activation": "none",
            "external_weights": "",
            "devices": "cpu,cuda",
        }
    assert [len(blob.linears) for blob in blobs(manager)] == [1, 1]
    assert_runs_like_eager(manager, model, X, tmp_path=tmp_path)


class Flips(nn.Module):
    """Two linears with a flip between them."""

    def __init__(self, weight):
        super().__init__()
        self.a, self.b = graphs.Linear(weight), graphs.Linear(weight)

    def forward(self, x):
        """Rows in reverse between the linears."""
        return self.b(self.a(x).flip(0))


def test_a_node_goes_in_if_every_device_has_its_kernel(monkeypatch, tmp_path):
    tables = {device: _native.supported_ops(device) for device in _native.DEVICES}
    tables["cuda"] = (tables["cpu"] | tables["cuda"]) - {"aten::flip.out"}
    monkeypatch.setattr(partitioner_module, "supported_ops", lambda device: tables[device])
    model = Flips(graphs.packed(CASE))
    manager, partitioner = lower(model, X, devices=("cpu",))
    assert partitioner.report == [] and outside(manager) == []
    for devices in (("cpu", "cuda"), ("cuda",)):
        manager, partitioner = lower(model, X, devices=devices)
        assert outside(manager) == [torch.ops.aten.flip.default]
        (entry,) = partitioner.report
        assert entry["reason"] == "libcuda_int4 has no kernel for aten::flip.out on cuda"
        (first, _) = delegates(manager)
        assert decode_specs(first.compile_specs)["devices"] == ",".join(devices)
    assert_runs_like_eager(manager, model, X, tmp_path=tmp_path)


class PutsByMask(nn.Module):
    """A linear, and 1 where it is negative."""

    def __init__(self, weight):
        super().__init__()
        self.a = graphs.Linear(weight)

    def forward(self, x):
        """By a mask as the index."""
        y = self.a(x)
        return torch.ops.aten.index_put(y, [y < 0], torch.ones(()))


def test_a_mask_as_an_index_stays_outside_of_a_file_for_cuda(tmp_path):
    model = PutsByMask(graphs.packed(CASE))
    manager, partitioner = lower(model, X, devices=("cpu",))
    assert outside(manager) == []
    manager, partitioner = lower(model, X, devices=("cpu", "cuda"))
    assert outside(manager) == [torch.ops.aten.index_put.default]
    assert "got a mask" in partitioner.report[0]["reason"]
    assert_runs_like_eager(manager, model, X, tmp_path=tmp_path)


@pytest.mark.parametrize("devices", ["cuda", (), ("cpu", "tpu")])
def test_devices_that_are_none(devices):
    with pytest.raises(ValueError, match="expected device"):
        CudaInt4Partitioner(devices=devices)


class Mixed(nn.Module):
    """Of each composite op one use that our kernel takes and one that it does not."""

    def forward(self, x):
        """Head sizes, ranks and dtypes that differ."""
        q = x.view(1, 2, 4, 16)
        y = F.scaled_dot_product_attention(q, q, q)
        y = y + F.scaled_dot_product_attention(q[0], q[0], q[0])
        y = F.rms_norm(y, [16]) + F.rms_norm(y, [4, 16])
        return F.silu(y) + F.silu(y.double()).float()


def test_of_an_op_only_the_uses_we_take_are_kept_whole(tmp_path):
    x = torch.randn(8, 16)
    manager, partitioner = lower(Mixed(), x)
    assert partitioner.report == [] and outside(manager) == []
    ours = {op for op in blobs(manager)[0].ops if op.split("::")[1].split(".")[0] in (
        "attention", "rms_norm", "silu", "scaled_dot_product_attention",
    )}  # fmt: skip
    assert ours == {"cuda_int4::attention.out", "cuda_int4::rms_norm.out", "cuda_int4::silu.out"}
    assert "cuda_int4::bmm.out" in blobs(manager)[0].ops  # the 3-D attention
    assert_runs_like_eager(manager, Mixed(), x, tmp_path=tmp_path)


def test_ops_to_not_decompose_asks_for_no_filter_where_none_is_needed():
    def kept(model, *inputs):
        program = graphs.export(model, *inputs).run_decompositions({})
        ops, accepts = CudaInt4Partitioner().ops_to_not_decompose(program)
        return {op._schema.name.split("::")[1] for op in ops}, accepts is not None

    class Silu(nn.Module):
        def forward(self, x):
            return F.silu(x)

    assert kept(Silu(), X) == ({"silu"}, False)
    assert kept(Silu(), X.double()) == (set(), False)
    assert kept(nn.Linear(32, 4), X) == ({"linear"}, False)
    assert kept(Mixed(), torch.randn(8, 16)) == (
        {"scaled_dot_product_attention", "rms_norm", "silu"},
        True,
    )


class SizeOutside(nn.Module):
    """A size that the delegate and an op outside of it both need."""

    def __init__(self, weight):
        super().__init__()
        self.linear = graphs.Linear(weight)

    def forward(self, x):
        """Random numbers are made outside."""
        n = x.shape[0]
        return self.linear(x).reshape(n * 2, 16) + 0 * torch.rand(n * 2, 1)


def test_a_size_that_is_read_outside_is_computed_outside(tmp_path):
    model = SizeOutside(graphs.packed(CASE))
    manager, partitioner = lower(model, X, dynamic_shapes=({0: Dim("n", min=2, max=9)},))
    reasons = {entry["reason"] for entry in partitioner.report}
    assert any("size" in reason for reason in reasons), reasons
    for delegate in delegates(manager):
        outputs = delegate.original_module.graph.output_node().args[0]
        assert all(isinstance(node.meta["val"], torch.Tensor) for node in outputs)
    assert_runs_like_eager(manager, model, X[:3], tmp_path=tmp_path)


class CacheOutside(nn.Module):
    """A buffer that the graph writes inside the delegate and reads outside."""

    def __init__(self, weight):
        super().__init__()
        self.linear = graphs.Linear(weight)
        self.register_buffer("seen", torch.zeros(4, 32))

    def forward(self, x):
        """Distances of what was there before."""
        before = F.pdist(self.seen)
        self.seen.add_(self.linear(x))
        return before


def test_a_mutated_buffer_that_the_outside_reads_stays_outside(tmp_path):
    model = CacheOutside(graphs.packed(CASE))
    manager, partitioner = lower(model, X)
    signature = manager.exported_program().graph_signature
    assert list(signature.buffers_to_mutate.values()) == ["seen"]
    assert_expected_inline(
        report(partitioner),
        """\
b_seen: buffer: a mutated buffer that more than one partition, or the outside, uses
aten__pdist_forward_default: aten._pdist_forward.default: libcuda_int4 has no kernel for
    aten::_pdist_forward.out on cpu, cuda""",
    )
    assert_runs_like_eager(manager, model, X, tmp_path=tmp_path)


class ReturnsConstant(nn.Module):
    """A parameter that is a graph output and an operand as well."""

    def __init__(self, weight):
        super().__init__()
        self.linear = graphs.Linear(weight)
        self.offset = nn.Parameter(torch.ones(32), requires_grad=False)

    def forward(self, x):
        """Both."""
        return self.linear(x) + self.offset, self.offset


@pytest.mark.parametrize("whole", [True, False])
def test_a_constant_that_is_an_output_is_handed_in(whole, tmp_path):
    model = ReturnsConstant(graphs.packed(CASE))
    manager, _ = lower(model, X, whole=whole)
    assert "offset" in manager.exported_program().state_dict
    assert [constant.name for constant in blobs(manager)[0].constants] == [
        "linear.weight.qdata",
        "linear.weight.scale",
        "linear.weight.zero_point",
    ]
    assert_runs_like_eager(manager, model, X, tmp_path=tmp_path)


class ReturnsCache(nn.Module):
    """A buffer whose new value is an output of the program, or read outside of the delegate."""

    def __init__(self, weight, outside):
        super().__init__()
        self.linear, self.outside = graphs.Linear(weight), outside
        self.register_buffer("seen", torch.zeros(4, 32))

    def forward(self, x):
        """The new value, or distances of it."""
        self.seen.add_(self.linear(x))
        return F.pdist(self.seen) if self.outside else self.seen


@pytest.mark.parametrize(
    ("outside", "reason"),
    [
        (False, "that is also an output of the program"),
        (True, "that more than one partition, or the outside, uses"),
    ],
)
def test_a_mutated_buffer_whose_new_value_leaves_the_delegate_stays_outside(
    outside, reason, tmp_path
):
    model = ReturnsCache(graphs.packed(CASE), outside)
    manager, partitioner = lower(model, X)
    assert partitioner.report[0]["reason"] == f"a mutated buffer {reason}"
    assert_runs_like_eager(manager, model, X, tmp_path=tmp_path)


class Biases(nn.Module):
    """Every origin that a bias can have; the last one is a graph output as well."""

    def __init__(self, weight):
        super().__init__()
        self.linear = graphs.Linear(weight, torch.linspace(-1, 1, 32))
        self.register_buffer("steps", torch.zeros(32))

    def forward(self, x, given):
        """Linears on one weight."""
        self.steps.add_(1)
        weight, own = self.linear.weight, self.linear.bias
        computed, mutated = F.linear(x, weight, own * 2), F.linear(x, weight, self.steps)
        return F.linear(x, weight, given), computed, mutated, self.linear(x), own


@pytest.mark.parametrize("whole", [True, False])
def test_a_bias_from_anywhere(whole, tmp_path):
    model = Biases(graphs.packed(CASE))
    inputs = X, torch.randn(32)
    manager, _ = lower(model, *inputs, whole=whole)
    assert {linear.bias for linear in blobs(manager)[0].linears} == {-1}
    assert_runs_like_eager(manager, model, *inputs, tmp_path=tmp_path)


# ---- options and refusals ----


def test_options_reach_every_linear(linear):
    manager, _ = lower(linear, X, layout="coalesced", activation="int8")
    (record,) = blobs(manager)[0].linears
    assert (record.layout_tag, record.activation) == ("coalesced.v1", "int8")


def test_a_weight_s_own_activation_is_kept_unless_asked_otherwise():
    model = graphs.Linear(graphs.packed(CASE, activation="int8"))
    manager, _ = lower(model, X)
    assert blobs(manager)[0].linears[0].activation == "int8"


@pytest.mark.parametrize("whole", [True, False])
def test_dense_linears_are_delegated_as_well(whole, tmp_path):
    model = nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 3, bias=False))
    manager, partitioner = lower(model, X, whole=whole)
    assert partitioner.report == [] and outside(manager) == []
    assert blobs(manager)[0].linears == ()
    assert ("cuda_int4::dense_linear.out" in blobs(manager)[0].ops) == whole
    assert_runs_like_eager(manager, model, X, tmp_path=tmp_path)


def test_another_dim_order_stays_outside():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, 8, 8).to(memory_format=torch.channels_last)
    _, partitioner = lower(model, image)
    reasons = {entry["reason"] for entry in partitioner.report}
    assert reasons == {"expected contiguous tensors, got channels_last"}


class Batched(nn.Module):
    """A stack of int4 matrices."""

    def __init__(self):
        super().__init__()
        weight = graphs.exportable(CASE)
        parts = (weight.qdata, weight.scale, weight.zero_point)
        for name, part in zip(("qdata", "scale", "zero"), parts, strict=True):
            self.register_buffer(name, torch.stack([part, part]))

    def forward(self, x):
        """One of them as a linear."""
        op = torch.ops.torchao.dequantize_int4_tensor
        return F.linear(x, op(self.qdata[0], self.scale[0], self.zero[0], 32, torch.float32))


class StartsNonZero(nn.Module):
    """A counter that starts at one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.ones(1))

    def forward(self, x):
        """Counts calls."""
        self.count.add_(1)
        return x * self.count


def test_messages():
    def refused(model, *inputs):
        return message(lower, model, *inputs)

    ragged = graphs.Linear(graphs.exportable(cases.Case(1, 8, 48, 48)))
    assert_expected_inline(
        folded(
            refused(ragged, torch.randn(2, 48)),
            refused(graphs.Linear(graphs.gguf(2, 256, "q6_k")), torch.randn(2, 256)),
            refused(Batched(), X),
            refused(StartsNonZero(), X),
            message(CudaInt4Partitioner, layout="zigzag"),
            message(CudaInt4Partitioner, layout="plain.v1"),
            message(CudaInt4Partitioner, activation="fp8"),
        ),
        """\
CudaInt4Partitioner: int4 linears that cannot be honoured:   weight: expected K % 32 == 0, got
    K=48, group_size=48; pad K to 64
CudaInt4Partitioner: int4 linears that cannot be honoured:   weight: expected a GGUF tensor of
    type q4_k, got q6_k; dequantise it before export, or quantise it to Q4_K
CudaInt4Partitioner: int4 linears that cannot be honoured:   aten_select_copy_int: expected int4
    weights that are parameters or buffers nothing writes, got aten_select_copy_int, computed in
    the graph; quantise them before export
count: expected a mutated buffer that starts as zeros, got other values, which a .pte does not
    carry; zero it before export, or write it in the graph
layout: expected 'auto' or one of 'coalesced', 'marlin', 'marlin24', got 'zigzag'; 'auto' picks
    for each weight
layout: expected one of coalesced.v1, marlin.v1, marlin24.v1, got plain.v1, an interchange
    format that no kernel reads; pack it with CudaCoalescedInt4Tensor.from_int4, or lower
    through CudaInt4Partitioner, which does
CudaInt4Partitioner: expected activation in ('none', 'int8'), got 'fp8'; 'none' is w4a16, 'int8'
    is w4a8""",
    )
