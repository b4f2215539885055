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
    constant_tensor,
    input_spec,
    is_constant,
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
_TRIAL_BATCH = 2  # and of sequences


class _Site(NamedTuple):
    """One attention with a cache: what it reads, and what is written."""

    attention: Node
    q: Node
    writes: tuple[Node, Node]  # the index_put of keys and that of values
    caches: tuple[Node, Node]
    input_pos: Node
    by_row: bool  # each sequence has positions of its own: values [B, S, Hkv, D]


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

    Several sequences have rows of the caches each, of which the first B take part:

    Before: k = aten.index_put(k_cache, [arange(B).unsqueeze(1), None, input_pos [B, S]], k)
            y = cuda_int4.attention(q, aten.slice_copy(k, 0, 0, B), ...)
    After:  q = cuda_int4.rope_append(k_cache, v_cache, ..., cos, sin, input_pos, ...)
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
                dead = [site.q]
                for write in site.writes:
                    dead += [node for node in write.all_input_nodes if node not in site.caches]
                attention.replace_input_with(site.q, q)
                for write, cache in zip(site.writes, site.caches, strict=True):
                    for user in list(write.users):
                        if op_of(user) is aten.slice_copy.Tensor:
                            replace(user, cache)
                    replace(write, cache)
                remove_dead_nodes(exported_program, dead)  # type: ignore[arg-type]
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _match_site(program: ExportedProgram, attention: Node) -> _Site | None:
    """Keys and values that are appended to caches for this attention and nothing else."""
    q, *read = args_of(attention)[:3]
    caches, positions, writes, by_row = [], [], [], []
    for write in read:
        readers = {attention}
        if op_of(write) is aten.slice_copy.Tensor:  # the rows of the sequences that take part
            if not _is_first_rows(write, shape_of(q)[0]) or set(write.users) != readers:
                return None
            readers = {write}
            write = write.args[0]
        if op_of(write) is not aten.index_put.default:
            return None
        cache, indices, values, accumulate = args_of(write)
        spec = input_spec(program, cache)
        by_row.append(len(indices) == 3 and indices[0] is not None)
        expected = in_place_shape(write)
        if by_row[-1]:
            is_row = _is_row_numbers(program, indices[0], shape_of(q)[0])
            fits = is_row and indices[1] is None and not accumulate and len(shape_of(cache)) == 4
            B, _, S, _ = shape_of(q)
            expected = [B, S, shape_of(cache)[1], shape_of(cache)[3]] if fits else None
        elif readers != {attention}:
            return None
        writes.append(write)
        if (
            spec is None
            or program.graph_signature.buffers_to_mutate.get(write.name) != spec.target
            or set(cache.users) != {write}
            or any(user not in readers and user.op != "output" for user in write.users)
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
    if by_row[0] != by_row[1]:
        return None
    if by_row[0] and not all(map(_same, shape_of(positions[0]), shape_of(q)[0:3:2])):
        return None  # not [B, S]
    return _Site(attention, q, tuple(writes), tuple(caches), positions[0], by_row[0])


def _is_first_rows(node: Node, B: object) -> bool:
    """Whether a slice takes rows 0 .. B - 1, all else whole."""
    source, dim, start, end, step = args_of(node)
    is_front = dim % len(shape_of(source)) == 0 and start in (None, 0) and step == 1
    return is_front and _same(end.meta["val"] if isinstance(end, Node) else end, B)


def _is_row_numbers(program: ExportedProgram, node: Node, B: object) -> bool:
    """Whether ``node`` is 0 .. B - 1, as a column, out of a constant."""
    if op_name(node) != "aten::unsqueeze_copy" or args_of(node)[1] not in (1, -1):
        return False
    rows = node.args[0]
    assert isinstance(rows, Node)
    if op_of(rows) is aten.slice_copy.Tensor:
        if not _is_first_rows(rows, B):
            return False
        rows = rows.args[0]  # type: ignore[assignment]
    elif not _same(shape_of(rows)[0], B):
        return False
    if not isinstance(rows, Node) or not is_constant(program, rows):
        return False
    numbers = constant_tensor(program, rows)
    return numbers.dim() == 1 and torch.equal(numbers, torch.arange(len(numbers)))


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
    wide = [(Hq + 2 * Hkv) * D, (Hq + Hkv) * D]
    sources = [leaf for leaf in leaves if len(shape_of(leaf)) == 3 and shape_of(leaf)[2] in wide]
    tables = [leaf for leaf in leaves - weights if leaf not in sources]
    if len(sources) != 1 or len(tables) != 2:
        return None
    (qkv,) = sources
    n_tokens = S if isinstance(S, int) else _TRIAL_TOKENS
    n_batch = B if isinstance(B, int) else _TRIAL_BATCH
    table_shapes = [shape_of(table) for table in tables]
    rank = len(table_shapes[0])
    if rank not in (2, 3) or len(table_shapes[1]) != rank:
        return None
    widths = {shape[-1] for shape in table_shapes}
    table_dtypes = {table.meta["val"].dtype for table in tables}
    if (
        any(list(shape_of(weight)) != [D] for weight in weights)
        or not all(map(_same, (shape_of(qkv)[0], shape_of(qkv)[1]), (B, S)))
        or len(widths) != 1
        or not widths <= {D, D // 2}
        or D % 2
        or len(table_dtypes) != 1
        or not table_dtypes <= {torch.float32, qkv.meta["val"].dtype}
        or not all(_same(shape[-2], S) for shape in table_shapes)
        or (rank == 3 and not all(_same(shape[0], B) for shape in table_shapes))
        or qkv.meta["val"].dtype != site.caches[0].meta["val"].dtype
    ):
        return None
    generator = torch.Generator().manual_seed(0)

    def drawn(node: Node, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(node.meta["val"].dtype)

    values = {qkv: drawn(qkv, n_batch, n_tokens, int(shape_of(qkv)[2]))}
    table_shape = (*(n_batch,) * (rank - 2), n_tokens, *widths)
    values.update({table: drawn(table, *table_shape) for table in tables})
    values.update({weight: drawn(weight, D) for weight in (q_norm, k_norm) if weight in weights})
    sizes = [(S, n_tokens), (B, n_batch)]
    found = _computed(nodes, dict(values), sizes, targets)  # type: ignore[arg-type]
    if found is None:
        return None
    if site.by_row:  # [B, S, Hkv, D] as index_put takes them
        found[1:] = [x.transpose(1, 2) for x in found[1:]]
    input_pos = torch.arange(n_tokens)
    if site.by_row:
        input_pos = input_pos.repeat(n_batch, 1)
    for cos, sin in (tables, tables[::-1]):
        for interleaved in (False, True):
            cache_shape = (n_batch, Hkv, n_tokens, D)
            caches = [torch.zeros(cache_shape, dtype=found[0].dtype) for _ in range(2)]
            given = (values[qkv], values[cos], values[sin], input_pos)
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
    sizes: list[tuple[Any, int]],
    targets: tuple[Node, ...],
) -> list[torch.Tensor] | None:
    """The targets' values, with a number for every size that is in ``sizes``."""

    def concrete(arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            if arg in values:
                return values[arg]
            value = arg.meta.get("val")
            return next((n for size, n in sizes if _same(size, value)), None)
        return arg

    known: dict[Node, Any] = values  # type: ignore[assignment]
    for node in nodes:
        args = torch.fx.node.map_arg(node.args, concrete)
        kwargs = torch.fx.node.map_arg(node.kwargs, concrete)
        try:
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError):
            return None  # a size that these do not give
    return [known[target] for target in targets]


def _same(a: object, b: object) -> bool:
    return statically_known_true(a == b)  # type: ignore[arg-type]
