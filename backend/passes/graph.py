"""What the passes share: reading constants of an ExportedProgram, adding them, replacing nodes.

Nothing here knows of int4. Node targets are compared as plain ``torch.ops`` overloads
(:func:`op_of`), so that a pass matches before and after conversion to the edge dialect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from executorch.exir.dialects._ops import ops as edge_ops
from executorch.exir.dialects.edge._ops import EdgeOpOverload
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

_CONSTANT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# torchao's flattening of a subclass names its parts "a.parametrizations.weight.original0", ...
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.(\w+)\.original\d*$")


def op_of(node: object) -> object:
    """The ``torch.ops`` overload a node calls, without the edge dialect's wrapper; else None."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    return node.target._op if isinstance(node.target, EdgeOpOverload) else node.target


def op_name(node: object) -> str:
    """``"aten::mul"``, whatever the overload; "" where no ``torch.ops`` overload is called."""
    op = op_of(node)
    return op._schema.name if isinstance(op, torch._ops.OpOverload) else ""


def edge_op(op: torch._ops.OpOverload) -> EdgeOpOverload:
    """The edge dialect's form of an overload: what a node in an edge program must call."""
    namespace, name = op._schema.name.split("::")
    return getattr(getattr(getattr(edge_ops.edge, namespace), name), op._overloadname)


def input_spec(program: ExportedProgram, node: Node) -> InputSpec | None:
    """The signature's entry of a placeholder."""
    if node.op != "placeholder":
        return None
    for spec in program.graph_signature.input_specs:
        if getattr(spec.arg, "name", None) == node.name:
            return spec
    return None


def is_constant(program: ExportedProgram, node: object) -> bool:
    """Whether a node is a parameter, buffer or lifted tensor that nothing writes."""
    spec = input_spec(program, node) if isinstance(node, Node) else None
    if spec is None or spec.kind not in _CONSTANT_KINDS:
        return False
    return spec.target not in program.graph_signature.buffers_to_mutate.values()


def constant_tensor(program: ExportedProgram, node: Node) -> torch.Tensor:
    """The data of a constant placeholder."""
    spec = input_spec(program, node)
    assert spec is not None and spec.target is not None, f"{node} is no constant"
    if spec.target in program.constants:
        return program.constants[spec.target]
    return program.state_dict[spec.target]


def constant_name(program: ExportedProgram, node: Node) -> str:
    """The fully qualified name of a constant, such as ``"layers.0.wq.weight"``.

    The parts of a flattened tensor subclass all get the name of the whole.
    """
    spec = input_spec(program, node)
    name = spec.target if spec is not None and spec.target is not None else node.name
    return _PARAMETRIZED.sub(r"\1\2", name)


def add_constant(program: ExportedProgram, name: str, data: torch.Tensor) -> Node:
    """Add a parameter of this fully qualified name behind the other parameters.

    A name that is taken gets a numeral, so a caller never overwrites another constant.
    """
    target, numeral = name, 0
    while target in program.state_dict or target in program.constants:
        numeral += 1
        target = f"{name}_{numeral}"
    specs = program.graph_signature.input_specs
    index = sum(spec.kind is InputKind.PARAMETER for spec in specs)
    # Parameters come first in a signature, in the order of the placeholders.
    behind = [node for node in program.graph.nodes if node.op == "placeholder"][index:]
    where = behind[0] if behind else next(n for n in program.graph.nodes if n.op != "placeholder")
    with program.graph.inserting_before(where):
        node = program.graph.create_node("placeholder", "p_" + re.sub(r"\W", "_", target))
    node.target = node.name
    node.meta["val"] = fake_mode_of(program).from_tensor(data, static_shapes=True)
    program.state_dict[target] = torch.nn.Parameter(data, requires_grad=False)
    specs.insert(index, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target))
    return node


def remove_unused_constants(program: ExportedProgram, nodes: set[Node]) -> None:
    """Remove those of ``nodes`` that nothing uses any more, and their data."""
    specs = program.graph_signature.input_specs
    for node in list(program.graph.nodes):
        if node not in nodes or node.users or not is_constant(program, node):
            continue
        spec = input_spec(program, node)
        assert spec is not None and spec.target is not None
        specs.remove(spec)
        program.graph.erase_node(node)
        if all(other.target != spec.target for other in specs):
            program.state_dict.pop(spec.target, None)
            program.constants.pop(spec.target, None)


def remove_dead_nodes(program: ExportedProgram, nodes: list[Node]) -> None:
    """Erase ``nodes`` and what only they used, back to placeholders (which stay)."""
    while nodes:
        node = nodes.pop()
        if node.op == "call_function" and not node.users and not node._erased:
            nodes.extend(node.all_input_nodes)
            program.graph.erase_node(node)


def fake_mode_of(program: ExportedProgram) -> torch._subclasses.FakeTensorMode:
    """The fake mode that the program's meta values live in."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    return torch._subclasses.FakeTensorMode()


@contextmanager
def rewriting(program: ExportedProgram) -> Iterator[GraphModule]:
    """Keep the signature's output names right while nodes are replaced."""
    hook = program.graph_signature.get_replace_hook()
    with program.graph_module._set_replace_hook(hook):
        yield program.graph_module


def call_like(
    program: ExportedProgram,
    old: Node,
    op: torch._ops.OpOverload,
    args: tuple,
    **kwargs: object,
) -> Node:
    """Insert a call of ``op`` in front of ``old``; its value's shape and dtype are computed.

    ``old`` keeps its users: the caller replaces them. Where it stood in the user's code is copied.
    """
    with program.graph.inserting_before(old):
        node = program.graph.call_function(edge_op(op), args, kwargs)  # type: ignore[arg-type]
    values = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
    with fake_mode_of(program):
        node.meta = {k: v for k, v in old.meta.items() if k not in ("val", "tensor_meta", "spec")}
        node.meta["val"] = op(*values, **kwargs)
    return node


def replace(old: Node, new: Node) -> None:
    """Hand the users of ``old`` over to ``new``, and erase ``old``."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def args_of(node: Node) -> tuple[Any, ...]:
    """A node's arguments in the order of the schema: keyword ones and defaults in their place."""
    op = op_of(node)
    assert isinstance(op, torch._ops.OpOverload), f"{node} calls no torch.ops overload"
    values = []
    for index, argument in enumerate(op._schema.arguments):
        if index < len(node.args):
            values.append(node.args[index])
        elif argument.name in node.kwargs:
            values.append(node.kwargs[argument.name])
        else:
            values.append(argument.default_value)
    return tuple(values)


def calls(program: ExportedProgram, *ops: object) -> Iterator[Node]:
    """The calls of any of ``ops``, in order; safe against edits while iterating."""
    for node in list(program.graph.nodes):
        if not node._erased and op_of(node) in ops:
            yield node
