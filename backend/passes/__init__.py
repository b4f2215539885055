"""The graph rewrites that ``preprocess`` runs, and the reason for their order.

Each pass takes an ExportedProgram in the edge dialect, edits it in place and says truly whether it
did. The graph is valid before and after each.
"""

from __future__ import annotations

from executorch.exir.pass_base import ExportedProgramPassBase
from torch.export import ExportedProgram

from .. import ops as _ops  # noqa: F401  registers torch.ops.cuda_int4
from .assign_layout import AssignLayoutPass
from .fold_dequantize import FoldDequantizePass
from .pack_weights import PackWeightsPass
from .resolve_attention import ResolveAttentionPass
from .resolve_dim_order import ResolveDimOrderPass
from .resolve_int4_linear import ResolveInt4LinearPass
from .resolve_plain_attention import ResolvePlainAttentionPass
from .resolve_rms_norm import ResolveRmsNormPass
from .resolve_silu import ResolveSiluPass
from .widen_index_put import WidenIndexPutPass

__all__ = [
    "AssignLayoutPass",
    "FoldDequantizePass",
    "PackWeightsPass",
    "ResolveAttentionPass",
    "ResolveDimOrderPass",
    "ResolveInt4LinearPass",
    "ResolvePlainAttentionPass",
    "ResolveRmsNormPass",
    "ResolveSiluPass",
    "WidenIndexPutPass",
    "ordered_passes",
    "run_passes",
]


def ordered_passes(layout: str, activation: str) -> list[ExportedProgramPassBase]:
    """The passes, in the order in which they run."""
    return [
        # First: it needs the dequantize nodes in the form in which export left them.
        ResolveInt4LinearPass(),
        # After it: whatever dequantizes still has no linear behind it. Before packing, which drops
        # the constants that this one reads.
        FoldDequantizePass(),
        # Needs every int4 linear resolved: it reads N, K and group_size off cuda_int4.linear.
        AssignLayoutPass(layout, activation),
        # Needs the tag; the only one that moves bytes, so each weight is packed once.
        PackWeightsPass(),
        # Free of the others and of each other; they stand behind the passes that can refuse a
        # model, so that a refusal costs least.
        ResolveAttentionPass(),
        ResolvePlainAttentionPass(),
        ResolveRmsNormPass(),
        ResolveSiluPass(),
        WidenIndexPutPass(),
        # Last: our own ops return contiguous tensors, which makes more of these copies needless.
        ResolveDimOrderPass(),
    ]


def run_passes(program: ExportedProgram, layout: str, activation: str) -> ExportedProgram:
    """Run all passes on ``program``, in place; returns it."""
    for a_pass in ordered_passes(layout, activation):
        program = a_pass(program).exported_program
    return program
