"""Let attention write the heads of a token side by side."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph import args_of, call_like, calls, op_name, replace, rewriting
from .resolve_attention import shape_of

_ATTENTION = torch.ops.cuda_int4.attention.default
_COPIES = ("aten::clone", "aten::alias_copy", "dim_order_ops::_clone_dim_order")
_PERMUTES = ("aten::permute_copy", "aten::permute")
_VIEWS = ("aten::view_copy", "aten::view", "aten::_unsafe_view")


class MergeHeadsPass(ExportedProgramPassBase):
    """Write the result of attention as the output projection reads it.

    Before: y = cuda_int4.attention(q, k, v, ...)           [B, Hq, S, D]
            y = aten.permute_copy(y, [0, 2, 1, 3])          [B, S, Hq, D]
            y = aten.view_copy(y, [B, S, Hq * D])
    After:  y = cuda_int4.attention(q, k, v, ..., merge_heads=True)

    A copy of a token's heads goes away, and for a single token, where nothing moves, a call.
    Left alone: a result that anything else reads, other orders, views of other shapes.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for attention in calls(exported_program, _ATTENTION):
                args = args_of(attention)
                chain = None if args[9] else _chain_to_merged(attention)
                if chain is None:
                    continue
                new = call_like(
                    exported_program, attention, _ATTENTION, (*args[:9], True, *args[10:])
                )
                *between, merged = chain
                replace(merged, new)
                for node in (*reversed(between), attention):
                    exported_program.graph.erase_node(node)
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _chain_to_merged(attention: Node) -> list[Node] | None:
    """The nodes behind ``attention`` up to the one of value [B, S, Hq * D]; None: there is none."""
    B, H, S, D = shape_of(attention)
    chain: list[Node] = []
    node, is_permuted = attention, False
    while len(node.users) == 1:
        (node,) = node.users
        chain.append(node)
        if op_name(node) in _PERMUTES and not is_permuted:
            if [dim % 4 for dim in args_of(node)[1]] != [0, 2, 1, 3]:
                return None
            is_permuted = True
        elif op_name(node) in _VIEWS and is_permuted:
            shape = shape_of(node)
            wanted = [B, S, H * D]
            return chain if len(shape) == 3 and all(map(_same, shape, wanted)) else None
        elif op_name(node) not in _COPIES:
            return None
    return None


def _same(a: object, b: object) -> bool:
    return statically_known_true(a == b)  # type: ignore[arg-type]
