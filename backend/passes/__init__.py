"""The graph rewrites that ``preprocess`` runs, and the reason for their order.

Each pass takes an ExportedProgram in the edge dialect, edits it in place and says truly whether it
did. The graph is valid before and after each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from executorch.exir.pass_base import ExportedProgramPassBase
from torch.export import ExportedProgram

from .. import ops as _ops  # noqa: F401  registers torch.ops.cuda_int4
from .assign_layout import AssignLayoutPass
from .fold_dequantize import FoldDequantizePass
from .fuse_add_rms_norm import FuseAddRmsNormPass
from .fuse_gate_mul import FuseGateMulPass
from .fuse_post_norm import FusePostNormPass
from .fuse_rope_append import FuseRopeAppendPass
from .merge_heads import MergeHeadsPass
from .merge_linears import MergeLinearsPass
from .norm_before_select import NormBeforeSelectPass
from .pack_weights import PackWeightsPass
from .positions import PositionsPass
from .quantize_cache import KV_CACHES, QuantizeCachePass
from .resolve_attention import ResolveAttentionPass
from .resolve_dim_order import ResolveDimOrderPass
from .resolve_int4_linear import ResolveInt4LinearPass
from .resolve_plain_attention import ResolvePlainAttentionPass
from .resolve_rms_norm import ResolveRmsNormPass
from .resolve_silu import ResolveSiluPass
from .widen_index_put import WidenIndexPutPass

__all__ = [
    "FUSIONS",
    "KV_CACHES",
    "AssignLayoutPass",
    "FoldDequantizePass",
    "FuseAddRmsNormPass",
    "FuseGateMulPass",
    "FusePostNormPass",
    "FuseRopeAppendPass",
    "MergeHeadsPass",
    "MergeLinearsPass",
    "NormBeforeSelectPass",
    "PackWeightsPass",
    "PositionsPass",
    "QuantizeCachePass",
    "ResolveAttentionPass",
    "ResolveDimOrderPass",
    "ResolveInt4LinearPass",
    "ResolvePlainAttentionPass",
    "ResolveRmsNormPass",
    "ResolveSiluPass",
    "WidenIndexPutPass",
    "chosen_fusions",
    "ordered_passes",
    "run_passes",
]


# The passes that make one kernel of several, by the name that turns one off, in their order. Each
# stands on its own, but last_norm helps add_rms_norm and post_norm extends it; gate_mul and
# rope_append find more where the linears have been merged.
FUSIONS: dict[str, Callable[[], ExportedProgramPassBase]] = {
    "linears": MergeLinearsPass,
    "last_norm": NormBeforeSelectPass,
    "add_rms_norm": FuseAddRmsNormPass,
    "post_norm": FusePostNormPass,
    "gate_mul": FuseGateMulPass,
    "rope_append": FuseRopeAppendPass,
    "positions": PositionsPass,
    "merge_heads": MergeHeadsPass,
}


def chosen_fusions(fusions: str | Collection[str], *, who: str) -> tuple[str, ...]:
    """The names of fusions that ``"all"``, ``"none"`` or a list of names stands for, in order.

    Raises:
        ValueError: a name that no fusion has; ``who`` begins the message.
    """
    named = {"all": tuple(FUSIONS), "none": ()}
    chosen = named.get(fusions) if isinstance(fusions, str) else tuple(fusions)
    unknown = [fusions] if chosen is None else [name for name in chosen if name not in FUSIONS]
    if chosen is None or unknown:
        raise ValueError(
            f"{who}: expected fusions 'all', 'none' or a list of {', '.join(FUSIONS)}, got "
            f"{fusions!r}; drop or correct {', '.join(map(repr, unknown))}"
        )
    return tuple(name for name in FUSIONS if name in chosen)


def ordered_passes(
    layout: str,
    activation: str,
    fusions: Collection[str] = tuple(FUSIONS),
    kv_cache: str = "none",
) -> list[ExportedProgramPassBase]:
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
        # Behind all that they match: packed constants, and our own ops.
        *(FUSIONS[name]() for name in FUSIONS if name in fusions),
        # Needs rope_append, the one op that writes int8.
        *([QuantizeCachePass()] if kv_cache == "int8" else []),
        # Last: our own ops return contiguous tensors, which makes more of these copies needless.
        ResolveDimOrderPass(),
    ]


def run_passes(
    program: ExportedProgram,
    layout: str,
    activation: str,
    fusions: Collection[str] = tuple(FUSIONS),
    kv_cache: str = "none",
) -> ExportedProgram:
    """Run all passes on ``program``, in place; returns it."""
    for a_pass in ordered_passes(layout, activation, fusions, kv_cache):
        program = a_pass(program).exported_program
    return program
