"""Put the constants of each int4 linear into the order that its layout tag names."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from ..tensors import TENSORS
from .assign_layout import STORED_TAG
from .graph import (
    add_constant,
    calls,
    constant_tensor,
    remove_unused_constants,
)
from .int4_linear import linear_args, weight_name
from .weights import read_weight

_PARTS = ("qdata", "scale", "zero_point", "meta")


class PackWeightsPass(ExportedProgramPassBase):
    """Pack the constants through the tensor subclass of the layout; the call itself stays.

    Before: cuda_int4.linear(x, qdata [N, K/2], scale [n_groups, N], zero_point [n_groups, N], ...)
    After:  cuda_int4.linear(x, qdata [N, K/2], scale [N, n_groups], zero_point [N, n_groups], ...)
    or:     cuda_int4.linear(x, qdata [K/32, 8*Np], scale [n_groups, Np], None, meta, ...)

    with new constants ``<weight>.qdata``, ``<weight>.scale`` and, where there are such,
    ``<weight>.zero_point`` and ``<weight>.meta``; a zero point that is 8 everywhere is dropped.
    Linears that share a weight share the new constants. The old ones are removed as soon as nothing
    reads them, so that one weight at a time exists twice. A linear whose bytes have the order of
    its tag already is left alone.

    Raises:
        ValueError: a weight that is not 2:4 for a layout that needs it; the message has the place.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        packed: dict[tuple, tuple[Node | None, ...]] = {}
        uses = _uses_by_weight(exported_program)
        for key, linears in uses.items():
            old = {
                part for node in linears for part in linear_args(node).weight if part is not None
            }
            packed[key] = _pack(exported_program, linears[0])
            for node in linears:
                args = linear_args(node)
                node.args = (args.x, *packed[key], *args.as_node_args()[5:])
                node.meta.pop(STORED_TAG, None)
            remove_unused_constants(exported_program, old)
        if uses:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, bool(uses))

    def ensures(self, exported_program: ExportedProgram) -> None:
        """No linear is left in the interchange order."""
        for node in calls(exported_program, torch.ops.cuda_int4.linear.default):
            assert STORED_TAG not in node.meta, f"{node} still holds unpacked bytes"


def _uses_by_weight(program: ExportedProgram) -> dict[tuple, list[Node]]:
    """The linears still to pack, by the memory of their weights: a parameter may have two names."""
    uses: dict[tuple, list[Node]] = {}
    for node in calls(program, torch.ops.cuda_int4.linear.default):
        args = linear_args(node)
        stored = node.meta.get(STORED_TAG, args.layout_tag)
        if stored == args.layout_tag:
            node.meta.pop(STORED_TAG, None)  # only the activation was changed
            continue
        tensors = [None if part is None else constant_tensor(program, part) for part in args.weight]
        memory = tuple(None if t is None else (t.data_ptr(), t.shape, t.dtype) for t in tensors)
        uses.setdefault((memory, args.group_size, stored, args.layout_tag), []).append(node)
    return uses


def _pack(program: ExportedProgram, node: Node) -> tuple[Node | None, ...]:
    args = linear_args(node)
    name = weight_name(program, node)
    canonical = read_weight(program, node, node.meta[STORED_TAG], who=name)
    weight = TENSORS[args.layout_tag].from_int4(canonical, who=name)
    data = [getattr(weight, part) for part in _PARTS]
    return tuple(
        None if part is None else add_constant(program, f"{name}.{label}", part.detach())
        for label, part in zip(_PARTS, data, strict=True)
    )
