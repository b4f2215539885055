"""Choose the layout tag and the activation of each int4 linear."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram

from ..layouts import COALESCED, LAYOUTS, PLAIN, WeightForm, choose_layout
from ..sparse24 import is_24
from .graph import calls
from .int4_linear import LinearArgs, linear_args, weight_name
from .weights import is_symmetric, read_weight

STORED_TAG = "stored_layout_tag"  # node.meta: the tag that the constants' bytes still have


class AssignLayoutPass(ExportedProgramPassBase):
    """Write the ``layout_tag`` that each int4 linear shall have, and N where that layout pads it.

    Before: cuda_int4.linear(x, qdata, scale, zero_point, None, bias, 128, "plain.v1", "none")
    After:  cuda_int4.linear(x, qdata, scale, zero_point, None, bias, 128, "coalesced.v1", "int8")
    or:     cuda_int4.linear(x, qdata, scale, None, None, bias, 128, "marlin.v1", "none", N)

    ``"auto"`` looks at N, K, group_size, zero points and whether the weight is 2:4, and leaves a
    weight alone that was packed in another order than coalesced.v1: somebody chose it.

    Moves no bytes: PackWeightsPass runs next; what the bytes are is kept in the node's meta until
    then. An activation other than ``"none"`` applies to all linears; with ``"none"`` each keeps the
    one that its weight asks for.

    Args:
        layout: ``"auto"``, a layout's name, or a full tag.
        activation: ``"none"`` (w4a16) or ``"int8"`` (w4a8).

    Raises:
        ValueError: the layout does not take a weight.
    """

    def __init__(self, layout: str = "auto", activation: str = "none"):
        self.layout = layout
        self.activation = activation

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        for node in calls(exported_program, torch.ops.cuda_int4.linear.default):
            args = linear_args(node)
            activation = args.activation if self.activation == "none" else self.activation
            tag = self._choose(exported_program, node, args, activation)
            if (tag, activation) == (args.layout_tag, args.activation):
                continue
            node.meta.setdefault(STORED_TAG, args.layout_tag)
            N = int(node.meta["val"].shape[-1]) if LAYOUTS[tag].pads_n else None
            new = args._replace(layout_tag=tag, activation=activation, out_features=N)
            node.args = new.as_node_args()
            modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)

    def _choose(
        self, program: ExportedProgram, node: torch.fx.Node, args: LinearArgs, activation: str
    ) -> str:
        if self.layout == "auto" and args.layout_tag not in (PLAIN, COALESCED):
            return args.layout_tag
        name = weight_name(program, node)
        form = WeightForm(
            node.meta["val"].shape[-1],
            args.x.meta["val"].shape[-1],
            args.group_size,
            is_symmetric(program, args),
            lambda: is_24(read_weight(program, node, args.layout_tag, who=name)),
            activation,
        )
        return choose_layout(self.layout, form, who=name)
