"""Turn masks that say no more than where a query stands into its position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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
    remove_dead_nodes,
    replace,
    rewriting,
)
from .resolve_attention import shape_of

_ATTENTION = torch.ops.cuda_int4.attention.default
_MASK = 3  # its place among the arguments
# What makes an element of its result from elements of one row of its operands.
_ROW_BY_ROW = {
    "aten::add", "aten::alias_copy", "aten::arange", "aten::bitwise_and", "aten::bitwise_not",
    "aten::bitwise_or", "aten::clone", "aten::eq", "aten::expand_copy", "aten::full",
    "aten::full_like", "aten::ge", "aten::gt", "aten::le", "aten::logical_and",
    "aten::logical_not", "aten::logical_or", "aten::lt", "aten::ne", "aten::neg",
    "aten::permute_copy", "aten::rsub", "aten::scalar_tensor", "aten::slice_copy",
    "aten::squeeze_copy", "aten::sub", "aten::_to_copy", "aten::transpose_copy",
    "aten::unsqueeze_copy", "aten::view_copy", "aten::where", "dim_order_ops::_clone_dim_order",
    "dim_order_ops::_to_dim_order_copy",
}  # fmt: skip
_LOOKUPS = {"aten::embedding", "aten::index", "aten::index_select"}  # of rows of a table
_TRIAL_POSITIONS = 2048  # of which all are tried where there are no more, or where a table is read
_TRIAL_ELEMS = 1 << 26  # of one mask that is computed here
_TRIAL_BATCH = 2  # in the place of a symbolic one


class PositionsPass(ExportedProgramPassBase):
    """Tell attention the positions of its queries where a mask was made of them.

    Before: mask = aten.le(key_pos, aten.unsqueeze_copy(input_pos, 1))
            mask = aten.bitwise_and(mask, aten.gt(key_pos, <input_pos - 1024>))    (or without)
            y = cuda_int4.attention(q, k, v, mask, scale, False)
    After:  y = cuda_int4.attention(q, k, v, None, scale, False, 0.0, input_pos, 1024)

    The mask is not written and read, and the kernel knows how far the cache is filled.

    Models spell masks in many ways, rows of a table among them, so none is looked for. Between one
    integer tensor input_pos [S] or [B, S], constants and the mask there may be comparisons, sums,
    logic, moves and look-ups only. The mask is computed for positions in a random order, all there
    are if they are looked up, and taken if key t is seen exactly where t <= position and, with a
    window that the last position shows, t > position - window. A mask that is added must be 0 there
    and minus infinity, or the least number of its dtype, elsewhere.
    Without look-ups positions are compared with sums of numbers: what some thousands show, all do.
    Left alone: any other mask, one that differs between heads, positions of another shape.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        modified = False
        found: dict[tuple, tuple[Node, int] | None] = {}  # layers share masks
        with rewriting(exported_program):
            for attention in calls(exported_program, _ATTENTION):
                args = args_of(attention)
                q, k, _, mask, scale, is_causal, softcap, input_pos, *_ = args
                if mask is None or is_causal or input_pos is not None:
                    continue
                B, _, S, _ = shape_of(q)
                T = shape_of(k)[2]
                key = (mask, str(B), str(S), T)
                if key not in found:
                    found[key] = _match(exported_program, mask, B, S, T)
                if found[key] is None:
                    continue
                positions, window = found[key]  # type: ignore[misc]
                new_args = (*args[:_MASK], None, scale, False, softcap, positions, window)
                new = call_like(exported_program, attention, _ATTENTION, (*new_args, *args[9:]))
                replace(attention, new)
                if not mask.users:
                    found.pop(key)  # its nodes are gone
                    remove_dead_nodes(exported_program, [mask])
                modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _match(
    program: ExportedProgram, mask: Node, B: object, S: object, T: object
) -> tuple[Node, int] | None:
    """The positions that ``mask`` says and its window (0: none); None: it says something else."""
    parts = _between(program, mask)
    if parts is None or not isinstance(T, int):
        return None
    nodes, positions, constants = parts
    shape = shape_of(positions)
    by_batch = len(shape) == 2
    if len(shape) not in (1, 2) or not _same(shape[-1], S) or (by_batch and not _same(shape[0], B)):
        return None
    dtype = positions.meta["val"].dtype
    if dtype not in (torch.int32, torch.int64):
        return None
    n_batch = 1 if not by_batch else B if isinstance(B, int) else _TRIAL_BATCH
    reads_table = any(op_name(node) in _LOOKUPS for node in nodes)
    values: dict[Node, Any] = {node: constant_tensor(program, node) for node in constants}
    window: int | None = None
    for trial in _trials(T, S, n_batch, reads_table):
        given = trial.to(dtype)
        sizes = [(S, trial.shape[1]), *([(B, n_batch)] if by_batch else [])]
        start = {**values, positions: given if by_batch else given[0]}
        computed = _computed(nodes, start, sizes, mask)
        if computed is None:
            return None
        seen = _seen(computed, trial.shape, T)
        if seen is None:
            return None
        if window is None:  # the first trial has the last position in front
            window = int(seen[0, 0].sum()) % T
        keys = torch.arange(T)
        expected = keys <= trial.unsqueeze(-1)
        if window:
            expected &= keys > trial.unsqueeze(-1) - window
        if not bool((seen == expected).all()):
            return None
    return positions, window or 0


def _between(program: ExportedProgram, mask: Node) -> tuple[list[Node], Node, list[Node]] | None:
    """The nodes that make the mask in order, its one source that varies, and its constants."""
    seen: set[Node] = set()
    constants: list[Node] = []
    sources: set[Node] = set()
    to_do = [mask]
    while to_do:
        node = to_do.pop()
        if node in seen or not isinstance(node.meta.get("val"), torch.Tensor):
            continue  # or a size
        seen.add(node)
        if is_constant(program, node):
            constants.append(node)
        elif op_name(node) in _ROW_BY_ROW or op_name(node) in _LOOKUPS:
            to_do.extend(node.all_input_nodes)
        else:
            sources.add(node)
    if len(sources) != 1:
        return None
    inner = seen - sources - set(constants)
    nodes = [node for node in mask.graph.nodes if node in inner]
    return nodes, sources.pop(), constants


def _trials(T: int, S: object, n_batch: int, all_of_them: bool) -> Iterator[torch.Tensor]:
    """Positions [n_batch, S, or as many as memory allows], the last one first."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(T, generator=generator)
    order = torch.cat((torch.tensor([T - 1, 0]), order))
    if not all_of_them:
        order = order[:_TRIAL_POSITIONS]
    most = max(2, _TRIAL_ELEMS // (T * n_batch))
    width = S if isinstance(S, int) else min(most, -(-len(order) // n_batch))
    size = width * n_batch
    for chunk in order.split(size):
        yield chunk.repeat(-(-size // len(chunk)))[:size].view(n_batch, width)


def _computed(
    nodes: list[Node], known: dict[Node, Any], sizes: list[tuple[Any, int]], mask: Node
) -> torch.Tensor | None:
    """The mask's value, with a number for every size that is in ``sizes``."""

    def concrete(arg: Any) -> Any:
        if not isinstance(arg, torch.fx.Node):
            return arg
        if arg in known:
            return known[arg]
        value = arg.meta.get("val")
        return next((n for size, n in sizes if _same(size, value)), None)

    for node in nodes:
        args = torch.fx.node.map_arg(node.args, concrete)
        kwargs = torch.fx.node.map_arg(node.kwargs, concrete)
        try:
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None  # a size that these do not give, a position that the table lacks
    return known[mask]


def _seen(mask: torch.Tensor, shape: torch.Size, T: int) -> torch.Tensor | None:
    """Which keys are seen, [n_batch, S, T]; None: not a mask of one for all heads."""
    if mask.dtype != torch.bool:
        least = torch.finfo(mask.dtype).min
        if not bool(((mask == 0) | (mask <= least)).all()):
            return None
        mask = mask == 0
    if mask.dim() == 4:
        if mask.shape[1] != 1:
            return None
        mask = mask.squeeze(1)
    elif mask.dim() == 3 and mask.shape[0] != 1:  # one for each head
        return None
    if mask.dim() > 3:
        return None
    return mask.expand(*shape, T) if mask.shape[-1] == T else None


def _same(a: object, b: object) -> bool:
    return statically_known_true(a == b)  # type: ignore[arg-type]
