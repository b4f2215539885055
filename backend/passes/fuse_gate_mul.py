"""Turn the activation of a gate and its product into ``cuda_int4.gate_mul``."""

from __future__ import annotations

import operator

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from .graph import args_of, call_like, calls, op_of, remove_dead_nodes, replace, rewriting
from .resolve_attention import DTYPES, equal, shape_of

aten = torch.ops.aten
_SPLITS = (aten.split_with_sizes_copy.default, aten.split_copy.Tensor)


class FuseGateMulPass(ExportedProgramPassBase):
    """Read gate and up where the merged linear left them: no copies, one kernel.

    Before: gate, up = aten.split_with_sizes_copy(gate_up [..., 2 * N], [N, N], -1)
            y = aten.mul(cuda_int4.silu(gate), up)
    After:  y = cuda_int4.gate_mul(gate_up, "silu")

    ``aten.gelu`` becomes ``"gelu"`` or ``"gelu_tanh"``. The activation's value is rounded before
    the product, as before.
    Left alone: an activation that something else reads, parts of different sizes, up in front.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for mul in calls(exported_program, aten.mul.Tensor):
                match = _match(mul)
                if match is None:
                    continue
                gate_up, activation = match
                ours = torch.ops.cuda_int4.gate_mul.default
                y = call_like(exported_program, mul, ours, (gate_up, activation))
                dead = [*mul.all_input_nodes]
                replace(mul, y)
                remove_dead_nodes(exported_program, dead)
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _match(mul: Node) -> tuple[Node, str] | None:
    """The tensor of gates and factors, and the activation; None: no such product."""
    for gated, up in (mul.args[:2], mul.args[1::-1]):
        if not isinstance(gated, Node) or not isinstance(up, Node) or len(gated.users) != 1:
            continue
        activation = _activation(gated)
        gate = gated.args[0] if gated.args else None
        if activation is None or _item(gate) != 0 or _item(up) != 1:
            continue
        assert isinstance(gate, Node)
        split = gate.args[0]
        if split is not up.args[0] or not isinstance(split, Node) or op_of(split) not in _SPLITS:
            continue
        gate_up = split.args[0]
        assert isinstance(gate_up, Node)
        rank, (_, _, *dims) = len(shape_of(gate_up)), args_of(split)
        is_last = (dims[0] if dims else 0) in (-1, rank - 1)
        same = equal(shape_of(gate)[-1], shape_of(up)[-1]) and len(split.meta["val"]) == 2
        if is_last and same and mul.meta["val"].dtype in DTYPES:
            return gate_up, activation
    return None


def _activation(node: Node) -> str | None:
    op = op_of(node)
    if op in (torch.ops.cuda_int4.silu.default, aten.silu.default):
        return "silu"
    if op is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(args_of(node)[1])
    return None


def _item(node: object) -> object:
    """Which part of a split a node is."""
    is_item = isinstance(node, Node) and op_of(node) is operator.getitem
    return node.args[1] if is_item else None  # type: ignore[attr-defined]
