"""Turn an addition and the norm of its sum into ``cuda_int4.add_rms_norm``."""

from __future__ import annotations

import operator

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from .graph import args_of, call_like, calls, op_of, replace, rewriting
from .resolve_attention import equal, shape_of

aten = torch.ops.aten


class FuseAddRmsNormPass(ExportedProgramPassBase):
    """Add and norm in one kernel, which gives the sum too: the residual stream goes on from it.

    Before: s = aten.add(x, residual)
            y = cuda_int4.rms_norm(s, weight, eps)
    After:  s, y = cuda_int4.add_rms_norm(x, residual, weight, None, eps)

    The sum is rounded before it is normed, as before: the numbers are the same to the bit on a CPU.
    Left alone: operands that broadcast or differ in dtype, an addition with a factor.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for norm in calls(exported_program, torch.ops.cuda_int4.rms_norm.default):
                add, weight, eps = args_of(norm)
                if not is_plain_add(add) or is_computed(weight):
                    continue
                x, residual, _ = args_of(add)
                ours = torch.ops.cuda_int4.add_rms_norm.default
                # In the place of the addition: other nodes may read the sum ahead of the norm.
                pair = call_like(exported_program, add, ours, (x, residual, weight, None, eps))
                for index, old in reversed(list(enumerate((add, norm)))):
                    with exported_program.graph.inserting_after(pair):
                        item = exported_program.graph.call_function(operator.getitem, (pair, index))
                    item.meta = {**old.meta, "val": pair.meta["val"][index]}
                    replace(old, item)
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def is_plain_add(node: Node) -> bool:
    """Whether two tensors of one shape and dtype are added, nothing else."""
    if op_of(node) is not aten.add.Tensor:
        return False
    x, residual, alpha = args_of(node)
    if alpha != 1 or not isinstance(x, Node) or not isinstance(residual, Node):
        return False
    shapes = [shape_of(tensor) for tensor in (node, x, residual)]
    dtypes = {tensor.meta["val"].dtype for tensor in (node, x, residual)}
    same_rank = len({len(shape) for shape in shapes}) == 1
    return (
        len(dtypes) == 1
        and same_rank
        and all(map(equal, shapes[0], shapes[1]))
        and all(map(equal, shapes[0], shapes[2]))
    )


def is_computed(weight: Node | None) -> bool:
    """Whether a norm's weight might come about behind the addition."""
    return weight is not None and weight.op != "placeholder"
