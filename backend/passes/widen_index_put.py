"""Give the values of an ``index_put`` the shape of what they overwrite."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph import args_of, call_like, calls, rewriting

aten = torch.ops.aten


class WidenIndexPutPass(ExportedProgramPassBase):
    """Write a cache in place whichever way the model spells it.

    Before: aten.index_put(cache [1, H, T, D], [None, None, pos [S]], v [H, S, D])
    After:  v = aten.unsqueeze_copy(v, 0)
            aten.index_put(cache [1, H, T, D], [None, None, pos [S]], v [1, H, S, D])

    ``cache[:, :, pos] = v`` is exported with the leading dimensions of size 1 taken off ``v``, for
    broadcasting to put back. ExecuTorch's in-place kernel does not broadcast: it refuses such
    values, and aborts where they have too few dimensions.
    Left alone: several indices, an index of several dimensions (that kernel takes neither), and
    values that repeat along a dimension.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for node in calls(exported_program, aten.index_put.default):
                for _ in range(missing_dims(node)):
                    unsqueeze = aten.unsqueeze_copy.default
                    values = call_like(exported_program, node, unsqueeze, (node.args[2], 0))
                    node.update_arg(2, values)
                    modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def missing_dims(node: Node) -> int:
    """How many leading dimensions of size 1 the values of an ``index_put`` lack."""
    x, indices, values, _ = args_of(node)
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][1].meta["val"].dim() != 1:
        return 0
    expected, shape = list(x.meta["val"].shape), list(values.meta["val"].shape)
    dim, index = given[0]
    expected[dim] = index.meta["val"].shape[0]
    missing = len(expected) - len(shape)
    shape = [1] * missing + shape
    same = all(statically_known_true(a == b) for a, b in zip(shape, expected, strict=True))
    return missing if same else 0
