"""Choose the layout tag and the activation of each int4 linear."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram

from ..layouts import choose_layout
from .graph import calls
from .int4_linear import linear_args

STORED_TAG = "stored_layout_tag"  # node.meta: the tag that the constants' bytes still have


class AssignLayoutPass(ExportedProgramPassBase):
    """Write the ``layout_tag`` that each int4 linear shall have, chosen by its N, K and group_size.

    Before: cuda_int4.linear(x, qdata, scale, zero_point, None, bias, 128, "plain.v1", "none")
    After:  cuda_int4.linear(x, qdata, scale, zero_point, None, bias, 128, "coalesced.v1", "int8")

    Moves no bytes: PackWeightsPass runs next; what the bytes are is kept in the node's meta until
    then. An activation other than ``"none"`` applies to all linears; with ``"none"`` each keeps the
    one that its weight asks for.

    Args:
        layout: ``"auto"``, a layout's name, or a full tag.
        activation: ``"none"`` (w4a16) or ``"int8"`` (w4a8).
    """

    def __init__(self, layout: str = "auto", activation: str = "none"):
        self.layout = layout
        self.activation = activation

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        for node in calls(exported_program, torch.ops.cuda_int4.linear.default):
            args = linear_args(node)
            N, K = node.meta["val"].shape[-1], args.x.meta["val"].shape[-1]
            new_tag = choose_layout(self.layout, N, K, args.group_size)
            new_activation = args.activation if self.activation == "none" else self.activation
            if (new_tag, new_activation) == (args.layout_tag, args.activation):
                continue
            node.meta.setdefault(STORED_TAG, args.layout_tag)
            node.args = args._replace(layout_tag=new_tag, activation=new_activation)
            modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)
