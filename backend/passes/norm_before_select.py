"""Norm a sum before one row of it is selected, so that the two can be fused."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from .fuse_add_rms_norm import is_computed, is_plain_add
from .graph import args_of, call_like, calls, op_of, remove_dead_nodes, replace, rewriting
from .resolve_attention import shape_of

aten = torch.ops.aten


class NormBeforeSelectPass(ExportedProgramPassBase):
    """Swap the last norm of a model, which reads the last token, with the selection of it.

    Before: s = aten.add(x, residual)
            t = aten.select_copy(s, dim, index)
            y = cuda_int4.rms_norm(t, weight, eps)
    After:  n = cuda_int4.rms_norm(s, weight, eps)
            y = aten.select_copy(n, dim, index)

    FuseAddRmsNormPass then makes one kernel of the sum and the norm. A prompt norms rows that
    nobody reads, which costs less than their sum.
    Left alone: a sum or a selection that something else reads, a selection within the rows.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for norm in calls(exported_program, torch.ops.cuda_int4.rms_norm.default):
                select, weight, eps = args_of(norm)
                if is_computed(weight) or not _is_row_of_sum(select):
                    continue
                total, dim, index = args_of(select)
                ours = torch.ops.cuda_int4.rms_norm.default
                normed = call_like(exported_program, norm, ours, (total, weight, eps))
                row = call_like(exported_program, norm, op_of(select), (normed, dim, index))  # type: ignore[arg-type]
                replace(norm, row)
                remove_dead_nodes(exported_program, [select])
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _is_row_of_sum(select: Node) -> bool:
    if op_of(select) is not aten.select_copy.int or len(select.users) != 1:
        return False
    total, dim, _ = args_of(select)
    is_within_rows = dim in (-1, len(shape_of(total)) - 1)
    return not is_within_rows and len(total.users) == 1 and is_plain_add(total)
