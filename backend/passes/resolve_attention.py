"""Turn ``scaled_dot_product_attention`` into ``cuda_int4.attention``."""

from __future__ import annotations

import math

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph import (
    args_of,
    call_like,
    calls,
    op_name,
    op_of,
    remove_dead_nodes,
    replace,
    rewriting,
)

aten = torch.ops.aten
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512  # of the kernels of every device
_COPIES = (
    "aten::clone",
    "aten::alias_copy",
    "dim_order_ops::_clone_dim_order",
)
_VIEWS = (aten.view_copy.default, aten.view.default, aten._unsafe_view.default)


class ResolveAttentionPass(ExportedProgramPassBase):
    """Call our attention kernel, which groups query heads itself.

    Before: y = aten.scaled_dot_product_attention(q, k, v, mask, scale=None, enable_gqa=True)
    After:  y = cuda_int4.attention(q, k, v, mask, 1 / sqrt(D), False)

    Keys and values that were repeated for their group of query heads (``unsqueeze(2) -> expand ->
    view``) are passed unrepeated: the copy of the whole cache goes away.
    Left alone: dropout, other ranks or dtypes, a value head of another size than the query's.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for node in calls(exported_program, aten.scaled_dot_product_attention.default):
                if refusal(node) is not None:
                    continue
                q, k, v, mask, _, is_causal, scale, _ = args_of(node)
                if scale is None:
                    scale = 1.0 / math.sqrt(shape_of(q)[-1])
                repeated = [k, v]
                k, v = before_repeat(k), before_repeat(v)
                if shape_of(k)[1] != shape_of(v)[1]:
                    k, v = repeated
                attention = call_like(
                    exported_program,
                    node,
                    torch.ops.cuda_int4.attention.default,
                    (q, k, v, mask, float(scale), is_causal),
                )
                replace(node, attention)
                remove_dead_nodes(exported_program, repeated)
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def refusal(node: Node) -> str | None:
    """Why our kernel cannot compute this attention; None: it can."""
    q, k, v, mask, dropout, is_causal, _, enable_gqa = args_of(node)
    shapes = [shape_of(tensor) for tensor in (q, k, v)]
    if dropout != 0:
        return f"expected dropout_p == 0, got {dropout}"
    if any(len(shape) != 4 for shape in shapes):
        return f"expected q, k and v of 4 dimensions, got {[len(s) for s in shapes]}"
    dtypes = {tensor.meta["val"].dtype for tensor in (q, k, v)}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES):
        return f"expected one of float16, bfloat16, float32 for q, k and v, got {dtypes}"
    (B, Hq, _, D), (Bk, Hk, T, Dk), (Bv, Hv, Tv, Dv) = shapes
    if not all(map(equal, (B, B, D, D, T, Hk), (Bk, Bv, Dk, Dv, Tv, Hv))):
        return f"expected k and v of one shape, and q of its batch and head size, got {shapes}"
    if not statically_known_true(D <= MAX_HEAD_DIM):
        return f"expected a head size of at most {MAX_HEAD_DIM}, got {D}"
    if not isinstance(Hq, int) or not isinstance(Hk, int) or Hq % Hk:
        return f"expected query heads that are a multiple of key heads, got {Hq} and {Hk}"
    if Hq != Hk and not enable_gqa:
        return f"expected enable_gqa for {Hq} query heads on {Hk} key heads"
    if mask is not None:
        if is_causal:
            return "expected a mask or is_causal, got both"
        value = mask.meta["val"]
        if value.dtype not in (torch.bool, *dtypes) or value.dim() > 4:
            return f"expected a mask of bool or {dtypes}, got {value.dtype} {list(value.shape)}"
    return None


def before_repeat(node: Node) -> Node:
    """[B, Hkv, T, D] of which ``node`` [B, Hkv * n, T, D] repeats each head n times, or itself."""
    view = node
    while op_name(view) in _COPIES:
        view = view.args[0]  # type: ignore[assignment]
    if op_of(view) not in _VIEWS:
        return node
    expand = view.args[0]
    while op_name(expand) in _COPIES:
        expand = expand.args[0]  # type: ignore[union-attr,assignment]
    if op_of(expand) not in (aten.expand_copy.default, aten.expand.default):
        return node
    unsqueeze = expand.args[0]  # type: ignore[union-attr]
    if op_of(unsqueeze) not in (aten.unsqueeze_copy.default, aten.unsqueeze.default):
        return node
    assert isinstance(unsqueeze, Node) and isinstance(expand, Node)
    source, dim = args_of(unsqueeze)
    B, H, *rest = shape_of(source)
    n = shape_of(expand)[2] if len(shape_of(expand)) == 5 else 0
    matches = (
        dim % 5 == 2
        and len(rest) == 2
        and isinstance(n, int)
        and len(shape_of(node)) == 4
        and all(map(equal, shape_of(expand), [B, H, n, *rest]))
        and all(map(equal, shape_of(node), [B, H * n, *rest]))
    )
    return source if matches else node


def equal(a: object, b: object) -> bool:
    """Whether two sizes, symbolic ones too, are surely equal."""
    return statically_known_true(a == b)  # type: ignore[arg-type]


def shape_of(node: Node) -> list:
    """The shape of a node's value."""
    return list(node.meta["val"].shape)
