"""Turn rotary positions and the cache's update into ``cuda_int4.rope_append``."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .graph import (
    args_of,
    call_like,
    calls,
    input_spec,
    op_name,
    op_of,
    remove_dead_nodes,
    replace,
    rewriting,
)
from .resolve_attention import DTYPES, shape_of
from .widen_index_put import in_place_shape

aten = torch.ops.aten
# Products, sums and moves: what these make of their operands is, per element, a polynomial. With
# norms among them it is still no function that agrees with another at a random point by chance.
_POLYNOMIAL = {
    "aten::add", "aten::alias_copy", "aten::cat", "aten::clone", "aten::expand_copy", "aten::mul",
    "aten::neg", "aten::permute_copy", "aten::select_copy", "aten::slice_copy",
    "aten::split_copy", "aten::split_with_sizes_copy", "aten::squeeze_copy", "aten::stack",
    "aten::sub", "aten::_to_copy", "aten::transpose_copy", "aten::unsqueeze_copy",
    "aten::view_copy", "dim_order_ops::_clone_dim_order", "dim_order_ops::_to_dim_order_copy",
}  # fmt: skip
_NORM = torch.ops.cuda_int4.rms_norm.default
_TRIAL_TOKENS = 3  # in the place of a symbolic number of tokens


class _Site(NamedTuple):
    """One attention with a cache: what it reads, and what is written."""

    attention: Node
    q: Node
    writes: tuple[Node, Node]  # the index_put of keys and that of values
    caches: tuple[Node, Node]
    input_pos: Node


class FuseRopeAppendPass(ExportedProgramPassBase):
    """Turn q and k and write k and v into the caches, out of the merged projection, in one kernel.

    Before: q, k, v = <split, view, permute of qkv [B, S, (Hq + 2 * Hkv) * D]>
            q, k = cuda_int4.rms_norm(q, q_norm, eps), cuda_int4.rms_norm(k, k_norm, eps)
            q, k = <mul, neg, cat, add with cos, sin>
            k = aten.index_put(k_cache, [None, None, input_pos], k)
            v = aten.index_put(v_cache, [None, None, input_pos], v)
            y = cuda_int4.attention(q, k, v, ...)
    After:  q = cuda_int4.rope_append(k_cache, v_cache, qkv, cos, sin, input_pos, q_norm, k_norm,
                                      Hq, interleaved, eps)
            y = cuda_int4.attention(q, k_cache, v_cache, ...)

    Either norm may be absent. Without values in qkv [B, S, (Hq + Hkv) * D], v is k before its norm.

    Models spell the turn in many ways, so none is looked for. The graph between (qkv, cos, sin)
    and (q, k, v) must hold products, sums, moves and at most one norm of q and one of k only; it
    is computed on random numbers, the norms' weights too, and taken if q, k and v are to the bit
    what our op gives, in either order of pairs. Such functions that agree at a random point are
    the same but for a chance of rounding to 24 bits, and the roundings are compared with them.
    What a norm adds to the square is too small to show: it is read off the graph.
    Left alone: caches that anything but this attention reads, a turn of a part of the head, norms
    without a weight or with two different eps, a scale on q, other operands than these.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        with rewriting(exported_program):
            for attention in calls(exported_program, torch.ops.cuda_int4.attention.default):
                site = _match_site(exported_program, attention)
                arguments = None if site is None else _match_turn(site)
                if site is None or arguments is None:
                    continue
                ours = torch.ops.cuda_int4.rope_append.default
                q = call_like(exported_program, attention, ours, arguments)
                dead = [site.q, *(write.args[2] for write in site.writes)]
                attention.replace_input_with(site.q, q)
                for write, cache in zip(site.writes, site.caches, strict=True):
                    replace(write, cache)
                remove_dead_nodes(exported_program, dead)  # type: ignore[arg-type]
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _match_site(program: ExportedProgram, attention: Node) -> _Site | None:
    """Keys and values that are appended to caches for this attention and nothing else."""
    q, *writes = args_of(attention)[:3]
    caches, positions = [], []
    for write in writes:
        if op_of(write) is not aten.index_put.default:
            return None
        cache, indices, values, _ = args_of(write)
        spec = input_spec(program, cache)
        expected = in_place_shape(write)
        if (
            spec is None
            or program.graph_signature.buffers_to_mutate.get(write.name) != spec.target
            or set(cache.users) != {write}
            or any(user is not attention and user.op != "output" for user in write.users)
            or expected is None
            or len(indices) != 3
            or indices[2] is None
            or len(shape_of(cache)) != 4
            or len(shape_of(values)) != 4
            or not all(map(_same, shape_of(values), expected))
            or values.meta["val"].dtype != cache.meta["val"].dtype
        ):
            return None
        caches.append(cache)
        positions.append(indices[2])
    alike = shape_of(caches[0]) == shape_of(caches[1])
    dtypes = {node.meta["val"].dtype for node in (q, *caches)}
    if positions[0] is not positions[1] or caches[0] is caches[1] or not alike:
        return None
    if len(dtypes) != 1 or not dtypes <= set(DTYPES) or writes[0] in args_of(attention)[3:]:
        return None
    return _Site(attention, q, tuple(writes), tuple(caches), positions[0])


def _match_turn(site: _Site) -> tuple | None:
    """The arguments of the op that gives this q, k and v; None: nothing gives them."""
    targets = (site.q, *(write.args[2] for write in site.writes))
    nodes, leaves = _between(targets)  # type: ignore[arg-type]
    (B, Hq, S, D), Hkv = shape_of(site.q), shape_of(site.caches[0])[1]
    norms = _norms_of(targets)  # type: ignore[arg-type]
    if norms is None:
        return None
    q_norm, k_norm, eps = norms
    weights = {weight for weight in (q_norm, k_norm) if weight is not None}
    sources = [leaf for leaf in leaves if len(shape_of(leaf)) == 3]
    tables = [leaf for leaf in leaves - weights if len(shape_of(leaf)) == 2]
    if len(sources) != 1 or len(tables) != 2 or len(leaves) != 3 + len(weights):
        return None
    (qkv,) = sources
    n_tokens = S if isinstance(S, int) else _TRIAL_TOKENS
    widths = {shape_of(table)[1] for table in tables}
    table_dtypes = {table.meta["val"].dtype for table in tables}
    if (
        not isinstance(B, int)
        or shape_of(qkv)[2] not in ((Hq + 2 * Hkv) * D, (Hq + Hkv) * D)
        or any(list(shape_of(weight)) != [D] for weight in weights)
        or not all(map(_same, (shape_of(qkv)[0], shape_of(qkv)[1]), (B, S)))
        or len(widths) != 1
        or not widths <= {D, D // 2}
        or D % 2
        or len(table_dtypes) != 1
        or not table_dtypes <= {torch.float32, qkv.meta["val"].dtype}
        or not all(_same(shape_of(table)[0], S) for table in tables)
    ):
        return None
    generator = torch.Generator().manual_seed(0)

    def drawn(node: Node, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(node.meta["val"].dtype)

    values = {qkv: drawn(qkv, B, n_tokens, int(shape_of(qkv)[2]))}
    values.update({table: drawn(table, n_tokens, *widths) for table in tables})
    values.update({weight: drawn(weight, D) for weight in (q_norm, k_norm) if weight in weights})
    found = _computed(nodes, dict(values), S, n_tokens, targets)  # type: ignore[arg-type]
    if found is None:
        return None
    for cos, sin in (tables, tables[::-1]):
        for interleaved in (False, True):
            caches = [torch.zeros(B, Hkv, n_tokens, D, dtype=found[0].dtype) for _ in range(2)]
            given = (values[qkv], values[cos], values[sin], torch.arange(n_tokens))
            drawn_norms = [None if norm is None else values[norm] for norm in (q_norm, k_norm)]
            rest = (Hq, interleaved, eps)
            q = torch.ops.cuda_int4.rope_append(*caches, *given, *drawn_norms, *rest)
            if all(map(torch.equal, found, (q, *caches))):
                operands = (qkv, cos, sin, site.input_pos, q_norm, k_norm)
                return (*site.caches, *operands, *rest)
    return None


def _norms_of(targets: tuple[Node, ...]) -> tuple[Node | None, Node | None, float] | None:
    """The weights of q's and k's norm, and their eps; None: other norms than one of each."""
    weights: list[Node | None] = []
    all_eps = set()
    for target in targets:
        norms = [node for node in _between((target,))[0] if op_of(node) is _NORM]
        if len(norms) > 1:
            return None
        weight = None
        for norm in norms:
            _, weight, eps = args_of(norm)
            if weight is None or weight.op != "placeholder":
                return None
            all_eps.add(eps)
        weights.append(weight)
    if weights[2] is not None or len(all_eps) > 1:
        return None
    return weights[0], weights[1], all_eps.pop() if all_eps else 0.0


def _between(targets: tuple[Node, ...]) -> tuple[list[Node], set[Node]]:
    """The nodes that make ``targets``, in order, and the tensors that they start from."""
    seen: set[Node] = set()
    leaves: set[Node] = set()
    to_do = list(targets)
    while to_do:
        node = to_do.pop()
        if node in seen or node in leaves:
            continue
        if not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            continue  # a size
        is_item = op_of(node) is operator.getitem
        is_leaf = isinstance(node.meta["val"], torch.Tensor) and len(shape_of(node)) <= 2
        if is_leaf or not (is_item or op_of(node) is _NORM or op_name(node) in _POLYNOMIAL):
            leaves.add(node)
            continue
        seen.add(node)
        to_do.extend(node.all_input_nodes)
    order = [node for node in targets[0].graph.nodes if node in seen]
    return order, leaves


def _computed(
    nodes: list[Node],
    values: dict[Node, torch.Tensor],
    S: object,
    n_tokens: int,
    targets: tuple[Node, ...],
) -> list[torch.Tensor] | None:
    """The targets' values, with ``n_tokens`` for every size that is ``S``."""

    def concrete(arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            if arg in values:
                return values[arg]
            size = arg.meta.get("val")
            return n_tokens if statically_known_true(size == S) else None
        return arg

    known: dict[Node, Any] = values  # type: ignore[assignment]
    for node in nodes:
        args = torch.fx.node.map_arg(node.args, concrete)
        kwargs = torch.fx.node.map_arg(node.kwargs, concrete)
        try:
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError):
            return None  # a size that S alone does not give
    return [known[target] for target in targets]


def _same(a: object, b: object) -> bool:
    return statically_known_true(a == b)  # type: ignore[arg-type]
