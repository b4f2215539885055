"""Turn every form of an int4 linear into ``cuda_int4.linear``."""

from __future__ import annotations

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from ..int4 import CanonicalInt4, from_gguf_blocks, from_native
from ..layouts import PLAIN
from .graph import (
    add_constant,
    call_like,
    constant_tensor,
    remove_dead_nodes,
    remove_unused_constants,
    replace,
    rewriting,
)
from .int4_linear import Int4Match, match_int4_linear, refusal


class ResolveInt4LinearPass(ExportedProgramPassBase):
    """Match the int4 linears (forms: int4_linear.py) and call ``cuda_int4.linear`` in their place.

    Before: w = torchao.dequantize_int4_tensor(qdata, scale, zero_point, 128, bfloat16)
            y = aten.linear(x, w, bias)
    After:  y = cuda_int4.linear(x, qdata, scale, zero_point, None, bias, 128, "plain.v1", "none")

    ``plain.v1`` is torchao's order, [n_groups, N]: the constants of an ExportableInt4Tensor stay as
    they are. Weights in another encoding (mslk's signed codes with a float zero, GGUF blocks) are
    rewritten into it. A dequantize node that something else reads as well stays for that reader.
    A linear that is ``cuda_int4.linear`` already is left alone.

    Raises:
        ValueError: an int4 linear that cannot be honoured; the message names the weight.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        rewritten: dict[Node, tuple[Node, Node, Node | None]] = {}
        old_parts: set[Node] = set()
        modified = False
        with rewriting(exported_program):
            for node in list(exported_program.graph.nodes):
                match = None if node._erased else match_int4_linear(exported_program, node)
                if match is None:
                    continue
                reason = refusal(exported_program, match)
                if reason is not None:
                    raise ValueError(reason)
                if match.form == "packed":
                    continue
                old_parts.update(part for part in match.parts if part is not None)
                _resolve(exported_program, match, rewritten)
                modified = True
        if modified:
            remove_unused_constants(exported_program, old_parts)
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _resolve(
    program: ExportedProgram,
    match: Int4Match,
    rewritten: dict[Node, tuple[Node, Node, Node | None]],
) -> None:
    if match.form == "dequantize":
        qdata, scale, zero_point = match.parts
    else:
        first = match.parts[0]
        assert first is not None
        if first not in rewritten:
            rewritten[first] = _as_plain(program, match)
        qdata, scale, zero_point = rewritten[first]
    arguments = (match.x, qdata, scale, zero_point, None, match.bias)
    linear = call_like(
        program,
        match.node,
        torch.ops.cuda_int4.linear.default,
        (*arguments, match.group_size, PLAIN, "none"),
    )
    linear.meta["weight_name"] = match.name
    dead = [node for node in match.node.all_input_nodes]
    replace(match.node, linear)
    remove_dead_nodes(program, dead)


def _as_plain(program: ExportedProgram, match: Int4Match) -> tuple[Node, Node, Node | None]:
    """Add a weight of another encoding as constants in plain.v1."""
    canonical = _read(program, match)
    parts = {"qdata": canonical.qdata, "scale": canonical.scale.t().contiguous()}
    if canonical.zero_point is not None:
        parts["zero_point"] = canonical.zero_point.t().contiguous()
    nodes = {
        name: add_constant(program, f"{match.name}.plain_{name}", part)
        for name, part in parts.items()
    }
    return nodes["qdata"], nodes["scale"], nodes.get("zero_point")


def _read(program: ExportedProgram, match: Int4Match) -> CanonicalInt4:
    parts = [constant_tensor(program, part).detach() for part in match.parts if part is not None]
    if match.form == "gguf":
        return from_gguf_blocks(parts[0], "q4_k", who=match.name)
    qdata, scale, zero = parts
    return from_native(qdata, scale, zero, match.group_size, who=match.name)
