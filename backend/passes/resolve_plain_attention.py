"""Turn attention that is written in plain ops into ``cuda_int4.attention``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph import (
    args_of,
    call_like,
    calls,
    constant_tensor,
    is_constant,
    op_name,
    op_of,
    remove_dead_nodes,
    replace,
    rewriting,
)
from .resolve_attention import DTYPES, MAX_HEAD_DIM, before_repeat, equal, shape_of

aten = torch.ops.aten
_COPIES = ("aten::clone", "aten::alias_copy", "dim_order_ops::_clone_dim_order")
_CASTS = ("aten::_to_copy", "dim_order_ops::_to_dim_order_copy")
_EXPANDS = ("aten::expand_copy", "aten::expand")
_VIEWS = ("aten::view_copy", "aten::view", "aten::_unsafe_view")
_PERMUTES = ("aten::permute_copy", "aten::permute")


class _Scores(NamedTuple):
    """``softcap * tanh(scale * (q @ k.T) / softcap)``, or without the cap if it is 0."""

    q: Node  # [B, Hq, S, D]
    k: Node  # [B, Hq or Hkv, T, D]
    scale: float
    softcap: float


class ResolvePlainAttentionPass(ExportedProgramPassBase):
    """Call our attention kernel where a model computes softmax(q @ k.T) @ v by itself.

    Before: s = aten.bmm(q, k^T) * scale; s = aten.tanh(s / cap) * cap; s = s + mask
            y = aten.bmm(aten._softmax(s, -1), v), with the views and copies of torch.matmul
    After:  y = cuda_int4.attention(q, k, v, mask, scale, False, cap)

    The cap (Gemma 2) and the mask may be missing, the scale may be several factors or none, the
    softmax may be in float32. Keys and values repeated for their query heads go in unrepeated.
    Scores are kept in float32 here, where the plain ops round them to the dtype between each two.
    Left alone: scores or probabilities that anything else reads, dropout, other ranks or dtypes, a
    mask of another dtype than q, k that is not transposed in the graph.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for softmax in calls(exported_program, aten._softmax.default):
                match = _match(exported_program, softmax)
                if match is None:
                    continue
                out, (q, k, scale, softcap), v, mask = match
                repeated = [k, v]
                k, v = before_repeat(k), before_repeat(v)
                if not all(map(equal, shape_of(k), shape_of(v))):
                    k, v = repeated
                # In the place of `out`: v may be computed behind the softmax.
                args = (q, k, v, mask, scale, False, softcap)
                op = torch.ops.cuda_int4.attention.default
                attention = call_like(exported_program, out, op, args)
                dead = [*out.all_input_nodes]
                replace(out, attention)
                remove_dead_nodes(exported_program, dead)
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _match(
    program: ExportedProgram, softmax: Node
) -> tuple[Node, _Scores, Node, Node | None] | None:
    """The node whose value is y, the scores, v and the mask; None: not attention of this form."""
    logits, dim, half_to_float = args_of(softmax)
    if len(shape_of(softmax)) != 4 or dim not in (-1, 3) or half_to_float:
        return None
    found = _match_values(softmax)
    if found is None:
        return None
    out, v = found
    scores, mask = _match_masked(program, _before(logits, _COPIES + _CASTS))
    if scores is None:
        return None
    q, k = scores.q, scores.k
    tensors = (q, k, v, out)
    dtypes = {tensor.meta["val"].dtype for tensor in tensors}
    (B, H, S, D), T = shape_of(q), shape_of(k)[2]
    if (
        len(dtypes) != 1
        or not statically_known_true(D <= MAX_HEAD_DIM)
        or not dtypes <= set(DTYPES)
        or not all(map(equal, shape_of(k), (B, H, T, D)))
        or not all(map(equal, shape_of(v), (B, H, T, D)))
        or not all(map(equal, shape_of(softmax), (B, H, S, T)))
    ):
        return None
    if mask is not None and (mask.meta["val"].dtype not in dtypes or len(shape_of(mask)) > 4):
        return None
    return out, scores, v, mask


def _match_values(softmax: Node) -> tuple[Node, Node] | None:
    """The only thing that reads the probabilities: their product with v, and v [B, H, T, D]."""
    node = softmax
    while True:
        if len(node.users) != 1:
            return None
        (user,) = node.users
        if op_of(user) is aten.bmm.default:
            break
        if op_name(user) not in _COPIES + _CASTS + _EXPANDS + _VIEWS:
            return None
        if user.meta["val"].dtype not in DTYPES:
            return None
        if len(shape_of(user)) == 4 and not all(map(equal, shape_of(user), shape_of(softmax))):
            return None
        node = user
    if user.args[0] is not node or len(user.users) != 1:
        return None
    v, p = _four_dims(user.args[1]), _four_dims(node)
    (out,) = user.users
    if v is None or p is None or op_name(out) not in _VIEWS or len(shape_of(out)) != 4:
        return None
    (B, H, S, _), D = shape_of(softmax), shape_of(v)[3]
    return (out, v) if all(map(equal, shape_of(out), (B, H, S, D))) else None


def _match_masked(program: ExportedProgram, node: Node) -> tuple[_Scores | None, Node | None]:
    """``scores + mask`` or ``scores``."""
    if op_of(node) is not aten.add.Tensor or len(node.users) != 1:
        return _match_scores(program, node), None
    a, b, alpha = args_of(node)
    for scores, mask in ((a, b), (b, a)):
        if not isinstance(scores, Node) or not isinstance(mask, Node) or alpha != 1:
            continue
        matched = _match_scores(program, scores)
        if matched is not None:
            same = all(map(equal, shape_of(scores), shape_of(node)))
            return (matched, mask) if same else (None, None)
    return None, None


def _match_scores(program: ExportedProgram, node: Node) -> _Scores | None:
    """Factors, at most one tanh between them, and the product of q and k."""
    outer, inner, has_tanh = 1.0, 1.0, False  # outer * tanh(inner * product)
    while len(node.users) == 1:
        factor = _factor(program, node)
        if factor is not None:
            node, value = factor
            outer, inner = (outer, inner * value) if has_tanh else (outer * value, inner)
        elif op_of(node) is aten.tanh.default and not has_tanh:
            has_tanh, node = True, node.args[0]  # type: ignore[assignment]
        elif op_name(node) in _COPIES:
            node = node.args[0]  # type: ignore[assignment]
        else:
            break
    product = _match_product(node)
    if product is None or (has_tanh and outer <= 0):
        return None
    if has_tanh:
        return _Scores(*product, outer * inner, outer)
    return _Scores(*product, outer, 0.0)


def _factor(program: ExportedProgram, node: Node) -> tuple[Node, float] | None:
    """What is multiplied or divided by a number, and the factor."""
    op = op_of(node)
    if op not in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return None
    a, b = args_of(node)[:2]
    divides = op in (aten.div.Tensor, aten.div.Scalar)
    for x, other in ((a, b), (b, a))[: 1 if divides else 2]:
        value = _number(program, other)
        if isinstance(x, Node) and value is not None and not (divides and value == 0):
            if x.meta["val"].dtype != node.meta["val"].dtype:
                return None
            return x, 1 / value if divides else value
    return None


def _number(program: ExportedProgram, node: object) -> float | None:
    """The value of a number, or of a constant of one element."""
    if isinstance(node, (int, float)):
        return float(node)
    if isinstance(node, Node) and is_constant(program, node):
        tensor = constant_tensor(program, node)
        return float(tensor) if tensor.numel() == 1 else None
    return None


def _match_product(node: Node) -> tuple[Node, Node] | None:
    """``q`` and ``k`` [B, H, T, D] of ``q @ k.transpose(-1, -2)`` [B, H, S, T]."""
    if op_name(node) not in _VIEWS or len(shape_of(node)) != 4 or len(node.users) != 1:
        return None
    product = node.args[0]
    assert isinstance(product, Node)
    if op_of(product) is not aten.bmm.default or len(product.users) != 1:
        return None
    q, k = (_four_dims(operand) for operand in product.args)
    if q is None or k is None or op_name(k) not in _PERMUTES:
        return None
    source, dims = args_of(k)
    if [dim % 4 for dim in dims] != [0, 1, 3, 2]:
        return None
    (B, H, S, _), T = shape_of(q), shape_of(source)[2]
    return (q, source) if all(map(equal, shape_of(node), (B, H, S, T))) else None


def _four_dims(operand: object) -> Node | None:
    """[B, H, L, D] of which ``operand`` [B * H, L, D] of a bmm is a view."""
    view = _before(operand, _COPIES)
    if op_name(view) not in _VIEWS:
        return None
    matrices, source = shape_of(view), _before(view.args[0], _COPIES)
    while op_name(source) in _EXPANDS:
        inner = source.args[0]
        assert isinstance(inner, Node)
        if len(shape_of(inner)) != 4 or not all(map(equal, shape_of(inner), shape_of(source))):
            break
        source = _before(inner, _COPIES)
    shape = shape_of(source)
    if len(shape) != 4 or not all(map(equal, (shape[0] * shape[1], *shape[2:]), matrices)):
        return None
    return source


def _before(node: object, ops: tuple[str, ...]) -> Node:
    """What these copies and casts were made from."""
    assert isinstance(node, Node)
    while op_name(node) in ops and (op_name(node) not in _CASTS or _widens(node)):
        node = node.args[0]  # type: ignore[assignment]
        assert isinstance(node, Node)
    return node


def _widens(cast: Node) -> bool:
    """Whether a cast keeps the value: from a float dtype to float32."""
    source = cast.args[0]
    assert isinstance(source, Node)
    dtypes = source.meta["val"].dtype, cast.meta["val"].dtype
    return dtypes[0] in DTYPES and dtypes[1] in (torch.float32, dtypes[0])
