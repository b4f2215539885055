"""Turn ExecuTorch's dim-order copies into plain ones where the order is the usual one."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch._prims_common import is_contiguous_or_false
from torch.export import ExportedProgram
from torch.fx import Node

from .graph import call_like, op_name, replace, rewriting


class ResolveDimOrderPass(ExportedProgramPassBase):
    """Cast with ``aten._to_copy``, which each device has a kernel for, and drop clones of nothing.

    Before: a = dim_order_ops._to_dim_order_copy(x, dtype=bfloat16, dim_order=[0, 1, 2])
            b = dim_order_ops._clone_dim_order(a, dim_order=[0, 1, 2])
    After:  a = aten._to_copy(x, dtype=bfloat16)

    Every value of a nested program is contiguous, and none is overwritten while it is still read
    (nested_program.py sees to it), so such a clone copies for no one. Where it separates an output
    of the graph from what it was cloned from it becomes ``aten.clone``. Left alone: another dim
    order on either side, such as channels_last.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for node in list(exported_program.graph.nodes):
                plain = plain_op(node)
                if plain is None:
                    continue
                source = node.args[0]
                if plain is torch.ops.aten._to_copy.default:
                    dtype = node.meta["val"].dtype
                    replace(
                        node,
                        call_like(exported_program, node, plain, (source,), dtype=dtype),
                    )
                elif source.op == "placeholder" or any(u.op == "output" for u in node.users):
                    replace(node, call_like(exported_program, node, plain, (source,)))
                else:
                    replace(node, source)
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def plain_op(node: Node) -> torch._ops.OpOverload | None:
    """The aten op that does the same where all is contiguous; None: another node, or it is not."""
    name = op_name(node)
    if name not in (
        "dim_order_ops::_to_dim_order_copy",
        "dim_order_ops::_clone_dim_order",
    ):
        return None
    source, value = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if not is_contiguous_or_false(source) or not is_contiguous_or_false(value):
        return None
    if name.endswith("_clone_dim_order"):
        return torch.ops.aten.clone.default
    return torch.ops.aten._to_copy.default
