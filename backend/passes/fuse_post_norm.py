"""Turn a norm ahead of ``cuda_int4.add_rms_norm`` into an argument of it."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from .graph import args_of, calls, op_of, remove_dead_nodes, rewriting


class FusePostNormPass(ExportedProgramPassBase):
    """Norm what a part of a layer gives, add the residual and norm the sum in one kernel (Gemma).

    Before: n = cuda_int4.rms_norm(x, x_norm, eps)
            s, y = cuda_int4.add_rms_norm(n, residual, weight, None, eps)
    After:  s, y = cuda_int4.add_rms_norm(x, residual, weight, x_norm, eps)

    The norm may be either of the two that are added; it is rounded as before, so the numbers are
    the same to the bit on a CPU.
    Left alone: a norm that something else reads, one without a weight, one with another eps.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for node in calls(exported_program, torch.ops.cuda_int4.add_rms_norm.default):
                first, second, weight, x_norm, eps = args_of(node)
                if x_norm is not None:
                    continue
                for norm, residual in ((first, second), (second, first)):
                    if not _is_norm(norm, eps):
                        continue
                    x, x_norm, _ = args_of(norm)
                    node.args = (x, residual, weight, x_norm, eps)
                    remove_dead_nodes(exported_program, [norm])
                    modified = True
                    break
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _is_norm(node: Node, eps: float) -> bool:
    if op_of(node) is not torch.ops.cuda_int4.rms_norm.default or len(node.users) != 1:
        return False
    _, weight, its_eps = args_of(node)
    return weight is not None and its_eps == eps
