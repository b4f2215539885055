"""Turn the int4 weights that something other than a linear reads into dense constants."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from ..int4 import from_executorch, from_gguf_blocks
from .graph import (
    add_constant,
    args_of,
    constant_name,
    constant_tensor,
    is_constant,
    op_name,
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
                name = constant_name(exported_program, parts[0])
                dense = _dense(exported_program, node, parts, who=name)
                replace(node, add_constant(exported_program, f"{name}.dense", dense))
                old_parts.update(parts)
                modified = True
        if modified:
            remove_unused_constants(exported_program, old_parts)
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _dense(program: ExportedProgram, node: Node, parts: list[Node], *, who: str) -> torch.Tensor:
    tensors = [constant_tensor(program, part).detach() for part in parts]
    if op_name(node) == "torchao::dequantize_gguf":  # its own body needs the gguf package
        canonical = from_gguf_blocks(tensors[0], args_of(node)[1], who=who)
    else:
        qdata, scale, zero_point = tensors
        canonical = from_executorch(qdata, scale, zero_point, args_of(node)[3], who=who)
    return canonical.dequantize().to(node.meta["val"].dtype)
