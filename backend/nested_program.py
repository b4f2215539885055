"""From an ExportedProgram to the nested ExecuTorch program and its constants.

ExecuTorch emits the program as it would emit a whole ``.pte``; the result is then edited:

- generic ops are renamed ``aten::x`` -> ``cuda_int4::x``, so that an op that the runtime lacks is
  an error there and never a CPU kernel on device pointers. Ours, ``aten::sym_*`` and
  ``executorch_prim::*`` keep their names; ``aten::linear``, whose new name would be that of ours,
  becomes ``cuda_int4::dense_linear``.
- constants leave the program: each constant tensor becomes external, under a key that is a hash of
  its contents and carries its layout tag.

Inputs, outputs and mutable buffers are not memory-planned: the delegate owns them, or gets them.

Private APIs of executorch 1.5.1 used here: ``ExecutorchProgramManager._emitter_output``,
``serialize_for_executorch``, ``exir.schema``, ``reinplace_pass``. Those of partitioner.py,
preprocess.py and pte_file.py are named there; no other file uses any.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

import torch
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
)
from executorch.exir._serialize._serialize import serialize_for_executorch
from executorch.exir.emit import EmitterOutput
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.passes.reinplace import reinplace_pass
from executorch.exir.schema import (
    Buffer,
    ExecutionPlan,
    ExtraTensorInfo,
    Tensor,
    TensorDataLocation,
)
from executorch.extension.flat_tensor.serialize.serialize import (
    FlatTensorConfig,
    FlatTensorSerializer,
)
from torch.export import ExportedProgram
from torch.fx import Node

from .passes.graph import args_of, calls, constant_name, edge_op, is_constant, op_of
from .passes.int4_linear import linear_args, weight_name
from .passes.widen_index_put import fits_in_place

_RENAMED_NAMESPACES = ("aten", "dim_order_ops")
_RENAMED_OTHERWISE = {"linear": "dense_linear"}
_KEPT_PREFIX = "aten::sym_"
_LINEAR_PARTS = ("qdata", "scale", "zero_point", "meta", "bias")
DENSE_TAG = "dense.v1"


@dataclass(frozen=True)
class Constant:
    """One constant of the nested program.

    Attributes:
        node: name of its placeholder in the graph.
        name: fully qualified name in the model.
        key: key in the named data store.
        dtype: number of the torch ScalarType.
        sizes: contiguous sizes.
        data: its bytes.
    """

    node: str
    name: str
    key: str
    dtype: int
    sizes: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class NestedProgram:
    """A serialized program without constants, its operators by name, and the constants."""

    data: bytes
    ops: tuple[str, ...]
    constants: tuple[Constant, ...]


def emit_nested_program(program: ExportedProgram) -> NestedProgram:
    """Emit ``program`` (edge dialect, passes done); consumes its graph and its constants."""
    roles = _roles(program)
    config = ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(
            alloc_graph_input=False,
            alloc_graph_output=False,
            alloc_mutable_buffers=False,
        ),
        emit_mutable_buffer_names=True,
    )
    program = _write_in_place(program)
    manager = EdgeProgramManager(
        program, compile_config=EdgeCompileConfig(_check_ir_validity=False)
    )
    with warnings.catch_warnings():
        # A mutated buffer whose initial value matters was refused by preprocess.
        warnings.filterwarnings("ignore", message="Mutation on a buffer")
        emitted = manager.to_executorch(config)._emitter_output
    (plan,) = emitted.program.execution_plan
    constants = _extract_constants(emitted, plan, roles)
    ops = _rename_ops(plan)
    serialized, external = serialize_for_executorch(
        emitted, config, FlatTensorSerializer(FlatTensorConfig()), None
    )
    assert not external, "every constant was taken out of the program"
    return NestedProgram(bytes(serialized), ops, constants)


def _write_in_place(program: ExportedProgram) -> ExportedProgram:
    """Run ExecuTorch's reinplace pass on the cache writes that may be done in place.

    It would take every ``index_put``: fail at run time on those with a mask, several indices or
    values to broadcast, and overwrite what a view still reads. They keep the op that writes a copy.
    """
    index_put = torch.ops.aten.index_put.default
    chosen = writable_in_place(program)
    others = [node for node in calls(program, index_put) if node not in chosen]
    for node in others:
        node.target = index_put  # not the edge dialect's op: the pass does not see it
    program = reinplace_pass(program)
    for node in others:
        node.target = edge_op(index_put)
    return program


def writable_in_place(program: ExportedProgram) -> set[Node]:
    """The ``index_put`` nodes that may overwrite their first operand.

    The in-place kernel can do them; nothing reads the old value later, also not through a view
    (views share memory at run time); and what is overwritten is no constant and no input, and a
    buffer only where its new value comes about in place as well: else that is copied into the
    buffer at the end, over a value that may be an output.
    """
    index_put = torch.ops.aten.index_put.default
    chosen = {node for node in calls(program, index_put) if fits_in_place(node)}
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    while True:
        owner = _memory_owners(program, chosen)
        sharing: dict[Node, list[Node]] = {}
        for node in place:
            sharing.setdefault(owner[node], []).append(node)
        unsafe = {
            node
            for node in chosen
            if not _is_ours_to_write(program, owner, owner[node])
            or any(
                place[reader] > place[node]
                for value in sharing[owner[node]]
                if place[value] < place[node]
                for reader in value.users
            )
        }
        if not unsafe:
            return chosen
        chosen -= unsafe


def _memory_owners(program: ExportedProgram, in_place: set[Node]) -> dict[Node, Node]:
    """Of each node the one whose memory its value lies in, when ``in_place`` are done in place."""
    owner: dict[Node, Node] = {}
    for node in program.graph.nodes:
        shares = node in in_place or op_of(node) is torch.ops.aten.view_copy.default
        owner[node] = owner[args_of(node)[0]] if shares else node
    return owner


def _is_ours_to_write(program: ExportedProgram, owner: dict[Node, Node], memory: Node) -> bool:
    if memory.op != "placeholder":
        return True
    signature = program.graph_signature
    target = signature.inputs_to_buffers.get(memory.name)
    new = [output for output, buffer in signature.buffers_to_mutate.items() if buffer == target]
    return any(node.name in new and owner[node] is memory for node in owner)


def operator_name(name: str, overload: str) -> str:
    """``"aten::mul", "out"`` as ``"aten::mul.out"``."""
    return f"{name}.{overload}" if overload else name


@dataclass(frozen=True)
class _Role:
    """What a placeholder is: its node, and for a constant its name, tag and part."""

    node: str
    name: str = ""
    tag: str = DENSE_TAG
    part: str = "constant"
    constant: bool = False


def _roles(program: ExportedProgram) -> list[_Role]:
    """One entry per placeholder, in order: the emitter's first values are theirs."""
    parts: dict[str, tuple[str, str, str]] = {}
    for node in calls(program, torch.ops.cuda_int4.linear.default):
        args = linear_args(node)
        weight = weight_name(program, node)
        for part, operand in zip(_LINEAR_PARTS, (*args.weight, args.bias), strict=True):
            if operand is not None:
                name = constant_name(program, operand) if part == "bias" else f"{weight}.{part}"
                parts.setdefault(operand.name, (name, args.layout_tag, part))
    roles = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if not is_constant(program, node):
            roles.append(_Role(node.name))
            continue
        dense = (constant_name(program, node), DENSE_TAG, "constant")
        name, tag, part = parts.get(node.name, dense)
        roles.append(_Role(node.name, name, tag, part, constant=True))
    return roles


def _extract_constants(
    emitted: EmitterOutput, plan: ExecutionPlan, roles: list[_Role]
) -> tuple[Constant, ...]:
    buffers = emitted.program.constant_buffer
    constants = []
    keys: dict[int, str] = {}  # by buffer; the emitter lets a view of a constant name its buffer
    for index, value in enumerate(plan.values):
        tensor = value.val
        if not isinstance(tensor, Tensor) or tensor.data_buffer_idx == 0:
            continue
        role = roles[index] if index < len(roles) else None
        key = keys.get(tensor.data_buffer_idx, "")
        if role is not None and role.constant:
            data = bytes(buffers[tensor.data_buffer_idx].storage)
            sizes = tuple(tensor.sizes)
            dtype = int(tensor.scalar_type)
            key = f"cuda_int4/{role.tag}/{role.part}/{_content_hash(dtype, sizes, data)}"
            constants.append(Constant(role.node, role.name, key, dtype, sizes, data))
            keys[tensor.data_buffer_idx] = key
        assert key and tensor.allocation_info is None, (
            f"value {index} of the nested program has data, and is no constant of the graph"
        )
        tensor.data_buffer_idx = 0
        tensor.extra_tensor_info = ExtraTensorInfo(
            fully_qualified_name=key, location=TensorDataLocation.EXTERNAL
        )
    emitted.program.constant_buffer = [Buffer(storage=b"")]  # entry 0 means "no data"
    return tuple(constants)


def _content_hash(dtype: int, sizes: tuple[int, ...], data: bytes) -> str:
    digest = hashlib.sha256(f"{dtype}:{','.join(map(str, sizes))}:".encode())
    digest.update(data)
    return digest.hexdigest()[:32]


def _rename_ops(plan: ExecutionPlan) -> tuple[str, ...]:
    for operator in plan.operators:
        operator.name = nested_name(operator.name)
    return tuple(operator_name(operator.name, operator.overload) for operator in plan.operators)


def nested_name(graph_name: str) -> str:
    """What an operator is called in the nested program, with or without its overload."""
    namespace, _, name = graph_name.partition("::")
    if namespace not in _RENAMED_NAMESPACES or graph_name.startswith(_KEPT_PREFIX):
        return graph_name
    base, dot, overload = name.partition(".")
    return f"cuda_int4::{_RENAMED_OTHERWISE.get(base, base)}{dot}{overload}"
