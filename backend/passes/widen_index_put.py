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
    expected = in_place_shape(node)
    if expected is None:
        return 0
    shape = list(args_of(node)[2].meta["val"].shape)
    missing = len(expected) - len(shape)
    return missing if _same([1] * missing + shape, expected) else 0


def fits_in_place(node: Node) -> bool:
    """Whether ExecuTorch's in-place kernel does this ``index_put``; the other one does them all."""
    expected = in_place_shape(node)
    return expected is not None and _same(list(args_of(node)[2].meta["val"].shape), expected)


def in_place_shape(node: Node) -> list | None:
    """The shape that the in-place kernel wants of the values; None: it does no such ``index_put``.

    It overwrites (no ``accumulate``) along one dimension, by one index [S] of int32 or int64.
    """
    x, indices, _, accumulate = args_of(node)
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if accumulate or len(given) != 1:
        return None
    ((dim, index),) = given
    value = index.meta["val"]
    if value.dim() != 1 or value.dtype not in (torch.int32, torch.int64):
        return None
    shape = list(x.meta["val"].shape)
    shape[dim] = value.shape[0]
    return shape


def _same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        statically_known_true(m == n) for m, n in zip(a, b, strict=True)
    )
