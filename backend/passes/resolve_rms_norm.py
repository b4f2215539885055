"""Turn ``rms_norm`` over the last dimension into ``cuda_int4.rms_norm``."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from .graph import args_of, call_like, calls, replace, rewriting

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class ResolveRmsNormPass(ExportedProgramPassBase):
    """Call our kernel, which reads x once, in place of a chain of six ops.

    Before: y = aten.rms_norm(x, [D], weight, None)
    After:  y = cuda_int4.rms_norm(x, weight, 1.1920929e-07)

    Without an eps torch takes float32's epsilon, for 16-bit inputs too.
    Left alone: a norm over several dimensions, and other dtypes.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for node in calls(exported_program, torch.ops.aten.rms_norm.default):
                if refusal(node) is not None:
                    continue
                x, _, weight, eps = args_of(node)
                if eps is None:
                    eps = torch.finfo(torch.float32).eps
                ours = torch.ops.cuda_int4.rms_norm.default
                replace(
                    node,
                    call_like(exported_program, node, ours, (x, weight, float(eps))),
                )
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def refusal(node: Node) -> str | None:
    """Why our kernel cannot compute this norm; None: it can."""
    x, normalized_shape, weight, _ = args_of(node)
    if len(normalized_shape) != 1:
        return f"expected a norm over the last dimension, got one over {normalized_shape}"
    dtypes = [tensor.meta["val"].dtype for tensor in (x, weight) if tensor is not None]
    if not set(dtypes) <= set(_DTYPES):
        return f"expected float16, bfloat16 or float32, got {dtypes}"
    if weight is not None and torch.promote_types(*dtypes) != dtypes[0]:
        return f"expected a weight no wider than x, got {dtypes}: torch returns the wider dtype"
    return None
