"""Turn ``silu`` into ``cuda_int4.silu``."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from .graph import call_like, calls, replace, rewriting

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class ResolveSiluPass(ExportedProgramPassBase):
    """Call our kernel, which rounds once; decomposed, ``x * sigmoid(x)`` rounds twice.

    Before: y = aten.silu(x)
    After:  y = cuda_int4.silu(x)

    Left alone: other dtypes than float16, bfloat16 and float32.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for node in calls(exported_program, torch.ops.aten.silu.default):
                if refusal(node) is not None:
                    continue
                ours = torch.ops.cuda_int4.silu.default
                replace(node, call_like(exported_program, node, ours, (node.args[0],)))
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def refusal(node: Node) -> str | None:
    """Why our kernel cannot compute this; None: it can."""
    dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    return None if dtype in _DTYPES else f"expected float16, bfloat16 or float32, got {dtype}"
