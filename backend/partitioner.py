"""``CudaInt4Partitioner``: chooses what goes into the delegate, and says what does not and why.

A node goes in when libcuda_int4 has a kernel for it on each of ``devices``
(``_native.supported_ops``), or when a pass turns it into one that has. An int4 linear that cannot
be honoured is an error: computing it outside would need its dense weight. Any other node without a
kernel stays outside, on ExecuTorch's own CPU kernels, and its reason is logged, kept in ``report``
and written into the blob's compile specs.

Private APIs of executorch 1.5.1 used here: ``EdgeOpOverload.to_out_variant``,
``_PYTHON_SYM_OPS_TO_EXECUTORCH_SYM_OPS``.
"""

from __future__ import annotations

import json
import logging
import operator
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from executorch.exir.backend.partitioner import (
    DelegationSpec,
    Partitioner,
    PartitionResult,
)
from executorch.exir.passes.executorch_prim_ops_registry import (
    _PYTHON_SYM_OPS_TO_EXECUTORCH_SYM_OPS,
)
from torch._prims_common import is_channels_last_contiguous_or_false, is_contiguous_or_false
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from ._native import DTYPE_NUMBERS, EXPORT_DEVICES, supported_ops
from .layouts import ACTIVATIONS, check_layout
from .nested_program import operator_name
from .passes import (
    KV_CACHES,
    chosen_fusions,
    resolve_attention,
    resolve_dim_order,
    resolve_rms_norm,
    resolve_silu,
)
from .passes.graph import calls, edge_op, input_spec, is_constant, op_of
from .passes.int4_linear import (
    is_dequantize,
    match_int4_linear,
    refusal,
    refusal_of_op,
)
from .preprocess import CudaInt4Backend, encode_specs

logger = logging.getLogger(__name__)
aten = torch.ops.aten
# Composite ops that a pass turns into ours: the pass's own refusal, and what it calls.
_COMPOSITE: dict[object, tuple[Callable[[Node], str | None], str]] = {
    aten.scaled_dot_product_attention.default: (
        resolve_attention.refusal,
        "cuda_int4::attention.out",
    ),
    aten.rms_norm.default: (resolve_rms_norm.refusal, "cuda_int4::rms_norm.out"),
    aten.silu.default: (resolve_silu.refusal, "cuda_int4::silu.out"),
}
# Ops that the emitter drops or turns into something else than their out variant.
_EMITTED_AS = {
    aten.view_copy.default: "executorch_prim::et_view.default",
    aten.sym_size.int: "aten::sym_size.int",
    aten.sym_numel.default: "aten::sym_numel",
    aten.sym_stride.int: "aten::sym_stride.int",
    aten._local_scalar_dense.default: "aten::_local_scalar_dense",
}
_DROPPED = (
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


class CudaInt4Partitioner(Partitioner):
    """Tags what ``CudaInt4Backend`` takes: of a transformer, the whole graph as one partition.

    Args:
        layout: order of the int4 weights in memory: ``"auto"``, a layout's name, or a full tag.
        activation: ``"none"`` (w4a16), or ``"int8"`` (w4a8) for all int4 linears.
        external_weights: name of the ``.ptd`` that the constants go to; None: into the ``.pte``.
        devices: where the file is to run, of ``"cpu"`` and ``"cuda"``: a node goes in if each of
            them has a kernel for it. No GPU is needed for that.
        fusions: which ops are made one kernel where they meet: ``"all"``, ``"none"``, or names out
            of ``FUSIONS`` (passes/__init__.py), such as ``["linears", "gate_mul"]``.
        kv_cache: ``"int8"`` keeps the key-value caches as int8 with a scale a token and head, half
            of the bytes that a long context costs, and so far for the CPU: a GPU refuses the
            file; ``"none"``, in the dtype that the model has.

    Attributes:
        report: what the last ``partition`` left outside: dicts of ``node``, ``op`` and ``reason``.

    Raises:
        ValueError: an unknown layout, activation, device, fusion or kind of cache; from
            ``partition``, an int4 linear that cannot be honoured.
    """

    def __init__(
        self,
        *,
        layout: str = "auto",
        activation: str = "none",
        external_weights: str | None = None,
        devices: Sequence[str] = EXPORT_DEVICES,
        fusions: str | Collection[str] = "all",
        kv_cache: str = "none",
    ):
        super().__init__()
        check_layout(layout)  # refuses a name that no layout has
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"CudaInt4Partitioner: expected activation in {ACTIVATIONS}, got {activation!r}; "
                "'none' is w4a16, 'int8' is w4a8"
            )
        if kv_cache not in KV_CACHES:
            raise ValueError(
                f"CudaInt4Partitioner: expected kv_cache in {KV_CACHES}, got {kv_cache!r}; 'none' "
                "leaves the caches in the model's dtype"
            )
        if isinstance(devices, str) or not devices:
            raise ValueError(
                f"CudaInt4Partitioner: expected devices such as {EXPORT_DEVICES}, got {devices!r}; "
                "name each device that the file is to run on"
            )
        for device in devices:
            supported_ops(device)  # refuses a name that is no device
        self.devices = tuple(devices)
        self.fusions = chosen_fusions(fusions, who="CudaInt4Partitioner")
        self.kv_cache = kv_cache
        self.layout = layout
        self.activation = activation
        self.external_weights = external_weights
        self.report: list[dict[str, str]] = []
        self.delegation_spec = DelegationSpec(CudaInt4Backend.__name__, self._specs())

    def _specs(self) -> list:
        return encode_specs(
            layout=self.layout,
            activation=self.activation,
            external_weights=self.external_weights or "",
            devices=",".join(self.devices),
            fusions=",".join(self.fusions),
            kv_cache=self.kv_cache,
            outside=json.dumps(self.report),
        )

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[Node], bool] | None]:
        """The ops that are worth more whole: those a pass or a kernel takes as they are.

        An op of which this graph has only uses that we take is kept without a filter. ExecuTorch
        applies filters by renaming ops, which costs views their strides, so one is returned only
        where some uses must decompose and others must not.
        """
        support = _Support(ep, self.devices)
        kept: list[torch._ops.OpOverload] = []
        mixed = False
        for op in (aten.linear.default, *_COMPOSITE):
            reasons = [support.reason(node) for node in calls(ep, op)]
            if None in reasons:
                kept.append(op)  # type: ignore[arg-type]
                mixed |= any(reason is not None for reason in reasons)
        return kept, (lambda node: support.reason(node) is None) if mixed else None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the nodes that go into the delegate; called by ExecuTorch."""
        _refuse_int4_that_cannot_be_honoured(exported_program)
        support = _Support(exported_program, self.devices)
        tags: dict[str, DelegationSpec] = {}
        groups = _propose(exported_program, support)
        for index, nodes in enumerate(groups):
            tag = f"cuda_int4_{index}"
            for node in nodes:
                node.meta["delegation_tag"] = tag
            tags[tag] = self.delegation_spec
        _tag_constants(exported_program)
        support.reasons.update(_tag_mutated_buffers(exported_program))
        self.report = _report(exported_program, support)
        self._log()
        self.delegation_spec = DelegationSpec(CudaInt4Backend.__name__, self._specs())
        return PartitionResult(exported_program, dict.fromkeys(tags, self.delegation_spec))

    def _log(self) -> None:
        counts: dict[tuple[str, str], int] = {}
        for entry in self.report:
            counts[entry["op"], entry["reason"]] = counts.get((entry["op"], entry["reason"]), 0) + 1
        for (op, reason), count in counts.items():
            logger.warning("%d x %s outside the delegate: %s", count, op, reason)


class _Support(OperatorSupportBase):
    """Which nodes the delegate takes, and the reason for each that it does not."""

    def __init__(self, program: ExportedProgram, devices: Sequence[str]):
        self.program = program
        self.known = {device: supported_ops(device) for device in devices}
        self.reasons: dict[Node, str] = {}

    def is_node_supported(self, submodules: object, node: Node) -> bool:
        if node.op != "call_function" or node in self.reasons:
            return False
        reason = self.reason(node)
        if reason is not None:
            self.reasons[node] = reason
        return reason is None

    def reason(self, node: Node) -> str | None:
        """Why the delegate does not take a node; None: it does."""
        if node.op != "call_function":
            return f"{node.op} is not an op"
        op = op_of(node)
        if op is operator.getitem:
            return self.reason(node.args[0])  # type: ignore[arg-type]
        if op in _DROPPED:
            return None
        if op in _PYTHON_SYM_OPS_TO_EXECUTORCH_SYM_OPS:
            prim = _PYTHON_SYM_OPS_TO_EXECUTORCH_SYM_OPS[op]
            return self._lookup(operator_name(prim._schema.name, prim._schema.overload_name))
        if not isinstance(op, torch._ops.OpOverload):
            return f"{op} is control flow, which a delegate cannot hold"
        if is_dequantize(node):
            if all(is_constant(self.program, part) for part in node.all_input_nodes):
                return None
            return "its int4 parts are computed in the graph; expected parameters"
        if match_int4_linear(self.program, node) is not None:
            return self._lookup("cuda_int4::linear.out")
        if op in _COMPOSITE:
            refuse, ours = _COMPOSITE[op]
            reason = refuse(node)
            return self._lookup(ours) if reason is None else self._generic(op, node, reason)
        return self._generic(op, node)

    def _generic(
        self, op: torch._ops.OpOverload, node: Node, reason: str | None = None
    ) -> str | None:
        foreign = _foreign_tensor(node)
        if foreign is not None:
            return foreign
        if "cuda" in self.known and _has_mask_as_index(op, node):
            return "expected integer indices, got a mask: use torch.where, or export for cpu only"
        op = resolve_dim_order.plain_op(node) or op
        if op in _EMITTED_AS and self._lookup(_EMITTED_AS[op]) is None:
            return None
        if op in _EMITTED_AS and op is not aten.view_copy.default:
            return self._lookup(_EMITTED_AS[op])
        try:
            out_variant = edge_op(op).to_out_variant()
        except RuntimeError:
            return reason or f"{op} has no out variant"
        schema = out_variant._schema
        missing = self._lookup(operator_name(schema.name, schema.overload_name))
        return missing and (reason or missing)

    def _lookup(self, name: str) -> str | None:
        lacking = [device for device, ops in self.known.items() if name not in ops]
        return f"libcuda_int4 has no kernel for {name} on {', '.join(lacking)}" if lacking else None


def _foreign_tensor(node: Node) -> str | None:
    """What is wrong with the first operand or result that the delegate cannot hold."""
    values = [node.meta.get("val"), *(arg.meta.get("val") for arg in node.all_input_nodes)]
    for tensor in torch.utils._pytree.tree_leaves(values):
        if not isinstance(tensor, torch.Tensor):
            continue
        if str(tensor.dtype).removeprefix("torch.") not in DTYPE_NUMBERS:
            return f"expected tensors of {', '.join(DTYPE_NUMBERS)}, got {tensor.dtype}"
        if is_channels_last_contiguous_or_false(tensor) and not is_contiguous_or_false(tensor):
            return "expected contiguous tensors, got channels_last"
    return None


def _has_mask_as_index(op: torch._ops.OpOverload, node: Node) -> bool:
    """Whether an ``index`` or ``index_put`` must first count the positions of a mask.

    A GPU's caller would have to wait for the count.
    """
    if op not in (aten.index.Tensor, aten.index_put.default):
        return False
    indices = [index.meta["val"].dtype for index in node.args[1] if index is not None]  # type: ignore[union-attr]
    return torch.bool in indices or torch.uint8 in indices


def _refuse_int4_that_cannot_be_honoured(program: ExportedProgram) -> None:
    reasons = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        reason = refusal_of_op(program, node)
        match = match_int4_linear(program, node) if reason is None else None
        if match is not None:
            reason = refusal(program, match)
        if reason is not None:
            reasons.append(reason)
    if reasons:
        more = f"\n  and {len(reasons) - 8} more" if len(reasons) > 8 else ""
        raise ValueError(
            "CudaInt4Partitioner: int4 linears that cannot be honoured:\n  "
            + "\n  ".join(reasons[:8])
            + more
        )


def _propose(program: ExportedProgram, support: _Support) -> list[list[Node]]:
    """Groups of nodes, each of which can be cut out as one delegate.

    A delegate takes and gives tensors; it can take a SymInt but cannot give one. So a size that
    something outside reads is computed outside, and the proposal made again.
    """
    while True:
        partitions = CapabilityBasedPartitioner(
            program.graph_module, support, allows_single_node_partition=True
        ).propose_partitions()
        groups = [list(partition.nodes) for partition in partitions]
        owner = {node: index for index, nodes in enumerate(groups) for node in nodes}
        leaking = [
            node
            for node, index in owner.items()
            if not _is_tensor_valued(node) and any(owner.get(u) != index for u in node.users)
        ]
        if not leaking:
            return [nodes for nodes in groups if any(map(_is_tensor_valued, nodes))]
        for node in leaking:
            support.reasons[node] = "its value, a size, is read outside the delegate"


def _is_tensor_valued(node: Node) -> bool:
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves)


def _users_by_tag(node: Node) -> dict[str | None, list[Node]]:
    users: dict[str | None, list[Node]] = {}
    for user in node.users:
        users.setdefault(user.meta.get("delegation_tag"), []).append(user)
    return users


def _tag_constants(program: ExportedProgram) -> None:
    """Give each constant to the delegate that reads it.

    Where several do, ExecuTorch makes a copy for each. One that is also an output of the graph
    stays outside and is handed in: an output cannot be taken away from the graph.
    """
    for node in program.graph.nodes:
        if node.op != "placeholder" or not is_constant(program, node):
            continue
        users = _users_by_tag(node)
        tags = sorted(tag for tag in users if tag is not None)
        if tags and not any(user.op == "output" for user in users.get(None, ())):
            node.meta["delegation_tag"] = tags[0]


def _tag_mutated_buffers(program: ExportedProgram) -> dict[Node, str]:
    """Give a mutated buffer to the delegate that does all its reads and its write.

    Any other stays outside and passes through: copies of it would drift apart. So does one whose
    new value leaves the delegate, as ExecuTorch takes the write away from the graph together with
    the buffer. Returns the reasons.
    """
    signature = program.graph_signature
    writers = {
        spec.target: spec.arg.name
        for spec in signature.output_specs
        if spec.kind is OutputKind.BUFFER_MUTATION
    }
    returned = program.graph_signature.user_outputs
    by_name = {node.name: node for node in program.graph.nodes}
    reasons = {}
    for node in program.graph.nodes:
        spec = input_spec(program, node)
        if spec is None or spec.kind is not InputKind.BUFFER or spec.target not in writers:
            continue
        write = by_name[writers[spec.target]]
        readers = [*node.users, *(user for user in write.users if user.op != "output")]
        tags = {user.meta.get("delegation_tag") for user in (write, *readers)}
        (tag, *others) = tags
        if tag is None or others:
            reasons[node] = "a mutated buffer that more than one partition, or the outside, uses"
        elif write.name in returned:
            reasons[node] = "a mutated buffer that is also an output of the program"
        else:
            node.meta["delegation_tag"] = tag
    return reasons


def _report(program: ExportedProgram, support: _Support) -> list[dict[str, str]]:
    def entries() -> Iterable[dict[str, str]]:
        for node in program.graph.nodes:
            outside = node.op == "call_function" and "delegation_tag" not in node.meta
            if node.op == "placeholder" and node in support.reasons:
                yield {
                    "node": node.name,
                    "op": "buffer",
                    "reason": support.reasons[node],
                }
            elif outside and op_of(node) is not operator.getitem:
                op = op_of(node)
                known = isinstance(op, torch._ops.OpOverload)
                yield {
                    "node": node.name,
                    "op": str(op) if known else getattr(op, "__name__", str(op)),
                    "reason": support.reasons.get(node, "nothing in the delegate reads it"),
                }

    return list(entries())
