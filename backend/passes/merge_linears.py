"""Make the int4 linears that read one tensor one linear."""

from __future__ import annotations

import operator
from os.path import commonprefix

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.fx import Node

from ..layouts import COALESCED
from ..marlin_layouts import MARLIN, MARLIN24, N_TILE
from .graph import (
    add_constant,
    call_like,
    calls,
    constant_name,
    constant_tensor,
    edge_op,
    fake_mode_of,
    is_constant,
    op_of,
    remove_unused_constants,
    replace,
    rewriting,
)
from .int4_linear import LinearArgs, linear_args, weight_name

aten = torch.ops.aten
_PARTS = ("qdata", "scale", "zero_point", "meta")
# Along which dimension of every part N lies, and what each N must be a multiple of: whole tiles.
_N_DIM = {COALESCED: (0, 1), MARLIN: (1, N_TILE), MARLIN24: (1, N_TILE)}
_GATES = (torch.ops.cuda_int4.silu.default, aten.silu.default, aten.gelu.default)


class MergeLinearsPass(ExportedProgramPassBase):
    """Concatenate the packed constants along N: one mat-vec in place of two or three.

    Before: q = cuda_int4.linear(x, wq [Nq, K/2], ...)
            k = cuda_int4.linear(x, wk [Nk, K/2], ...)
            v = cuda_int4.linear(x, wv [Nk, K/2], ...)
    After:  y = cuda_int4.linear(x, wq+wk+wv [Nq + 2 * Nk, K/2], ...)
            q, k, v = aten.split_with_sizes_copy(y, [Nq, Nk, Nk], -1)

    They stand in the order of the graph, but for a linear whose value only a silu or gelu reads:
    it comes first, where FuseGateMulPass wants a gate. Each row of y is computed as before, so the
    numbers are the same to the bit. Biases are concatenated.
    Left alone: linears that differ in layout, activation, group size, dtypes, or in whether they
    have zero points or a bias; a weight that another node reads too (it would be stored twice);
    in Marlin's layouts an N that is not whole tiles of 64. An ``act_pre_scale`` is a product of its
    own in front of its linear, which then reads another tensor.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        groups: dict[tuple, list[Node]] = {}
        for node in calls(exported_program, torch.ops.cuda_int4.linear.default):
            key = _key(exported_program, node)
            if key is not None:
                groups.setdefault(key, []).append(node)
        modified = False
        with rewriting(exported_program):
            for linears in groups.values():
                if len(linears) > 1:
                    _merge(exported_program, linears)
                    modified = True
        if modified:
            exported_program.graph_module.recompile()
        return ExportedProgramPassResult(exported_program, modified)


def _key(program: ExportedProgram, node: Node) -> tuple | None:
    """What linears that can be one have in common; None: this one stays as it is."""
    args = linear_args(node)
    parts = [*args.weight, args.bias]
    if (
        args.layout_tag not in _N_DIM
        or int(node.meta["val"].shape[-1]) % _N_DIM[args.layout_tag][1]
    ):
        return None
    for part in parts:
        if part is not None and (not is_constant(program, part) or len(part.users) != 1):
            return None
    dtypes = tuple(None if part is None else part.meta["val"].dtype for part in parts)
    return args.x, args.layout_tag, args.activation, args.group_size, dtypes


def _merge(program: ExportedProgram, linears: list[Node]) -> None:
    first = linears[0]  # in the order of the graph: the others' operands are constants, or its x
    ordered = sorted(linears, key=lambda node: not _is_gate(node))
    all_args = [linear_args(node) for node in ordered]
    name = _joined([weight_name(program, node) for node in ordered])
    dim = _N_DIM[all_args[0].layout_tag][0]
    old = [part for args in all_args for part in (*args.weight, args.bias) if part is not None]

    def merged(label: str, parts: list[Node | None], dim: int) -> Node | None:
        data = [constant_tensor(program, part).detach() for part in parts if part is not None]
        return add_constant(program, f"{name}.{label}", torch.cat(data, dim)) if data else None

    qdata, scale, zero_point, meta = (
        merged(label, [args.weight[index] for args in all_args], dim)
        for index, label in enumerate(_PARTS)
    )
    assert qdata is not None and scale is not None
    bias = None
    if all_args[0].bias is not None:
        names = [constant_name(program, args.bias) for args in all_args if args.bias is not None]
        data = [constant_tensor(program, args.bias).detach() for args in all_args if args.bias]
        bias = add_constant(program, _joined(names), torch.cat(data))
    sizes = [int(node.meta["val"].shape[-1]) for node in ordered]
    out_features = None if all_args[0].out_features is None else sum(sizes)
    args = LinearArgs(
        all_args[0].x,
        qdata,
        scale,
        zero_point,
        meta,
        bias,
        all_args[0].group_size,
        all_args[0].layout_tag,
        all_args[0].activation,
        out_features,
    )
    op = torch.ops.cuda_int4.linear.default
    linear = call_like(program, first, op, args.as_node_args())
    linear.meta.pop("weight_name", None)  # that of the first
    with program.graph.inserting_before(first):
        op = aten.split_with_sizes_copy.default
        split = program.graph.call_function(edge_op(op), (linear, sizes, -1))  # type: ignore[arg-type]
    value = linear.meta["val"]  # that op's fake takes no symbolic sizes
    with fake_mode_of(program):
        parts = [value.new_empty([*value.shape[:-1], size]) for size in sizes]
    split.meta = {**linear.meta, "val": parts}
    for index, node in enumerate(ordered):
        with program.graph.inserting_after(split):
            item = program.graph.call_function(operator.getitem, (split, index))
        item.meta = {**node.meta, "val": split.meta["val"][index]}
        item.meta.pop("weight_name", None)
        replace(node, item)
    remove_unused_constants(program, set(old))


def _is_gate(linear: Node) -> bool:
    return len(linear.users) == 1 and op_of(next(iter(linear.users))) in _GATES


def _joined(names: list[str]) -> str:
    """``"layers.0.wq.weight"`` and ``"layers.0.wk.weight"`` as ``"layers.0.wq+wk.weight"``."""
    split = [name.split(".") for name in names]
    head = commonprefix(split)
    rest = [parts[len(head) :] for parts in split]
    tail = commonprefix([parts[::-1] for parts in rest])[::-1]
    middle = ["_".join(parts[: len(parts) - len(tail)]) for parts in rest]
    return ".".join([*head, "+".join(middle), *tail])
