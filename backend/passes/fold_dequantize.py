"""Turn the int4 weights that something other than a linear reads into dense constants."""

from __future__ import annotations

from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from .graph import (
    add_constant,
    args_of,
    constant_name,
    constant_tensor,
    is_constant,
    op_of,
    remove_unused_constants,
    replace,
    rewriting,
)
from .int4_linear import is_dequantize


class FoldDequantizePass(ExportedProgramPassBase):
    """Compute the dequantize nodes that no linear took, once, at export.

    Before: w = torchao.dequantize_int4_tensor(qdata, scale, zero_point, 32, bfloat16)
            y = aten.embedding(w, tokens)
    After:  y = aten.embedding(<weight>.dense, tokens)

    The runtime has no kernel that dequantizes. Where a linear shares the weight, it keeps its int4
    form. Left alone: parts that are computed in the graph.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        old_parts: set[Node] = set()
        with rewriting(exported_program):
            for node in list(exported_program.graph.nodes):
                if not is_dequantize(node) or not node.users:
                    continue
                parts = list(node.all_input_nodes)
                if not all(is_constant(exported_program, part) for part in parts):
                    continue
                values = [
                    constant_tensor(exported_program, arg).detach()
                    if arg in parts
                    else arg
                    for arg in args_of(node)
                ]
                dense = op_of(node)(*values)  # type: ignore[operator]
                name = f"{constant_name(exported_program, parts[0])}.dense"
                replace(node, add_constant(exported_program, name, dense))
                old_parts.update(parts)
                modified = True
        if modified:
            remove_unused_constants(exported_program, old_parts)
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)
