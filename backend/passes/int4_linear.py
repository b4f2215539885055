"""What an int4 linear looks like in a graph, before any pass has touched it.

:func:`match_int4_linear` is asked twice about the same node: by the partitioner, which sees shapes
only and refuses what cannot be honoured, and by ResolveInt4LinearPass, which rewrites.

    form        graph
    packed      cuda_int4.linear(x, qdata, scale, zero_point, meta, bias, ...)
    dequantize  torchao.dequantize_int4_tensor(qdata, scale, zero_point, group_size) -> linear
    gguf        torchao.dequantize_gguf(raw, "q4_k") -> linear
    native      mslk.bf16i4bf16_rowwise(x, qdata, scale, zero)

where ``-> linear`` is ``aten.linear(x, w, bias)``, or what is left of it after decomposition:
``mm(x, w.t())`` or ``addmm(bias, x, w.t())`` on a flattened x, between two views.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ..layouts import ACTIVATIONS, check_shape, check_tag
from .graph import args_of, constant_name, is_constant, op_name, op_of

aten = torch.ops.aten
X_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRANSPOSES = (
    aten.permute_copy.default,
    aten.permute.default,
    aten.t_copy.default,
    aten.t.default,
    aten.transpose_copy.int,
    aten.transpose.int,
)
_VIEWS = (aten.view_copy.default, aten.view.default, aten._unsafe_view.default)
_GGUF_BLOCK = 256, 144  # weights and bytes of a Q4_K block
_GGUF_GROUP_SIZE = 32


class LinearArgs(NamedTuple):
    """The arguments of a ``cuda_int4.linear`` node, as its schema orders them."""

    x: Node
    qdata: Node
    scale: Node
    zero_point: Node | None
    meta: Node | None
    bias: Node | None
    group_size: int
    layout_tag: str
    activation: str
    out_features: int | None

    @property
    def weight(self) -> tuple[Node | None, ...]:
        """The nodes of the weight's parts; None where it has none of that."""
        return self.qdata, self.scale, self.zero_point, self.meta

    def as_node_args(self) -> tuple[Any, ...]:
        """What a node carries: without an ``out_features`` that is not stated."""
        return tuple(self) if self.out_features is not None else tuple(self)[:-1]


def linear_args(node: Node) -> LinearArgs:
    """Of a ``cuda_int4.linear`` node."""
    return LinearArgs(*args_of(node))


def weight_name(program: ExportedProgram, linear: Node) -> str:
    """The name of an int4 linear's weight, ``"layers.0.wq.weight"``."""
    name = linear.meta.get("weight_name") or constant_name(program, linear_args(linear).qdata)
    return re.sub(r"\.qdata(_\d+)?$", "", name)


@dataclass(frozen=True)
class Int4Match:
    """One int4 linear: the node whose value it computes, and where its operands are.

    Attributes:
        node: the call whose value the linear replaces.
        x: the activation, [..., K].
        form: ``"packed"``, ``"dequantize"``, ``"gguf"`` or ``"native"``.
        parts: the nodes of the weight's tensors, as the form orders them.
        bias: added to the result, [N]; or None.
        name: fully qualified name of the weight.
        N, K, group_size: sizes of the weight.
    """

    node: Node
    x: Node
    form: str
    parts: tuple[Node | None, ...]
    bias: Node | None
    name: str
    N: int
    K: int
    group_size: int


def is_dequantize(node: object) -> bool:
    """Whether a node turns int4 parts into a dense weight."""
    name = op_name(node)
    return name == "torchao::dequantize_int4_tensor" or name == "torchao::dequantize_gguf"


def match_int4_linear(program: ExportedProgram, node: Node) -> Int4Match | None:
    """The int4 linear whose value ``node`` computes, if it is one.

    Sizes are read off shapes and not judged: see :func:`refusal`.
    """
    name = op_name(node)
    if name == "cuda_int4::linear":
        args = linear_args(node)
        return Int4Match(
            node,
            args.x,
            "packed",
            args.weight,
            args.bias,
            constant_name(program, args.qdata),
            _shape(node)[-1],
            _shape(args.x)[-1],
            args.group_size,
        )
    if name == "mslk::bf16i4bf16_rowwise":
        x, qdata, scale, zero = node.args[:4]
        K, n_groups = _shape(x)[-1], _shape(scale)[0]
        return Int4Match(
            node,
            x,
            "native",
            (qdata, scale, zero),
            None,
            constant_name(program, qdata),
            _shape(qdata)[0],
            K,
            K // max(n_groups, 1),
        )
    operands = _dense_linear(node)
    if operands is None:
        return None
    x, weight, bias, replaced = operands
    if op_name(weight) == "torchao::dequantize_int4_tensor":
        qdata, scale, zero_point, group_size, _ = args_of(weight)
        *_, N, half_k = _shape(qdata)
        return Int4Match(
            replaced,
            x,
            "dequantize",
            (qdata, scale, zero_point),
            bias,
            constant_name(program, qdata),
            N,
            2 * half_k,
            group_size,
        )
    if op_name(weight) == "torchao::dequantize_gguf" and args_of(weight)[1] == "q4_k":
        raw = weight.args[0]
        N, row_bytes = _shape(raw)
        weights, nbytes = _GGUF_BLOCK
        K = row_bytes // nbytes * weights
        name = constant_name(program, raw)
        return Int4Match(replaced, x, "gguf", (raw,), bias, name, N, K, _GGUF_GROUP_SIZE)
    return None


def refusal(program: ExportedProgram, match: Int4Match) -> str | None:
    """Why this int4 linear cannot be honoured, in words for the user; None: it can.

    Looks at shapes and dtypes only: works on fake tensors too.
    """
    qdata = match.parts[0]
    who = match.name
    for part in match.parts:
        if part is not None and not is_constant(program, part):
            return (
                f"{who}: expected int4 weights that are parameters or buffers nothing writes, got "
                f"{part.name}, computed in the graph; quantise them before export"
            )
    if match.bias is not None and _shape(match.bias) != [match.N]:
        return f"{who}: expected a bias of shape [{match.N}], got {_shape(match.bias)}"
    if match.form != "gguf" and len(_shape(qdata)) != 2:
        return (
            f"{who}: expected a 2-D weight [N, K], got qdata of shape {_shape(qdata)}; "
            "split a batched weight into one linear per matrix"
        )
    dtype = match.x.meta["val"].dtype
    if dtype not in X_DTYPES:
        return (
            f"{who}: expected activations of float16, bfloat16 or float32, got {dtype}; "
            "convert the model with .to(torch.bfloat16)"
        )
    if match.bias is not None and match.bias.meta["val"].dtype != dtype:
        return (
            f"{who}: expected a bias of the dtype of x, {dtype}, got "
            f"{match.bias.meta['val'].dtype}; cast one to the other"
        )
    try:
        check_shape(match.N, match.K, match.group_size, who=who)
        if match.form == "packed":
            args = linear_args(match.node)
            layout = check_tag(args.layout_tag, who=who, interchange=True)
            if args.activation not in ACTIVATIONS:
                return f"{who}: expected activation in {ACTIVATIONS}, got {args.activation!r}"
            expected = list(layout.qdata_shape(match.N, match.K))
            if _shape(qdata) != expected:
                return (
                    f"{who}: expected qdata {expected} in {layout.tag} for x {_shape(match.x)} and "
                    f"N={match.N}, got {_shape(qdata)}; fix the call: x and the weight disagree"
                )
    except ValueError as error:
        return str(error)
    if match.form == "dequantize":
        assert qdata is not None
        if qdata.meta["val"].dtype != torch.uint8:
            return (
                f"{who}: expected qdata of uint8, got {qdata.meta['val'].dtype}: it was made from "
                "a native Int4Tensor, whose nibbles are signed, and means other values here; give "
                "prepare_ the Int4Tensor itself"
            )
        n_groups = match.K // match.group_size
        for what, part in zip(("scale", "zero_point"), match.parts[1:], strict=True):
            if _shape(part) != [n_groups, match.N]:
                return (
                    f"{who}: expected {what} of shape [n_groups, N] = [{n_groups}, {match.N}], got "
                    f"{_shape(part)}; quantise the weight again"
                )
    return None


def refusal_of_op(program: ExportedProgram, node: Node) -> str | None:
    """Why an op on quantised parts that is no linear we know cannot be honoured; None: it can."""
    name = op_name(node)
    if name == "torchao::dequantize_gguf" and args_of(node)[1] != "q4_k":
        return (
            f"{constant_name(program, node.all_input_nodes[0])}: expected a GGUF tensor of type "
            f"q4_k, got {args_of(node)[1]}; dequantise it before export, or quantise it to Q4_K"
        )
    if name.startswith("mslk::") and "i4" in name and name != "mslk::bf16i4bf16_rowwise":
        return (
            f"{node.name}: expected an int4 linear on a 2-D weight with 16-bit activations, got "
            f"{name}; give the weights to cuda_int4.prepare_ before export"
        )
    return None


def _dense_linear(node: Node) -> tuple[Node, Node, Node | None, Node] | None:
    """(x, weight [N, K], bias, the node whose value is theirs) if ``node`` is a linear."""
    op = op_of(node)
    if op is aten.linear.default:
        x, weight, bias = args_of(node)
        return x, weight, bias, node
    if op is aten.mm.default:
        x, transposed = args_of(node)
        bias = None
    elif op is aten.addmm.default:
        bias, x, transposed, beta, alpha = args_of(node)
        if beta != 1 or alpha != 1 or len(_shape(bias)) != 1:
            return None
    else:
        return None
    weight = _transposed(transposed)
    if weight is None:
        return None
    return _without_views(node, x, weight, bias)


def _without_views(
    node: Node, x: Node, weight: Node, bias: Node | None
) -> tuple[Node, Node, Node | None, Node]:
    """See through ``view(x, [M, K]) -> mm -> view(y, [..., N])``, if that is what stands there."""
    users = list(node.users)
    if op_of(x) in _VIEWS and len(users) == 1 and op_of(users[0]) in _VIEWS:
        inner = x.args[0]
        before, after = _shape(inner), _shape(users[0])
        if before[-1:] == _shape(x)[-1:] and _same(before[:-1], after[:-1]):
            return inner, weight, bias, users[0]
    return x, weight, bias, node


def _same(a: list, b: list) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(a) == len(b) and all(
        statically_known_true(operator.eq(i, j)) for i, j in zip(a, b, strict=True)
    )


def _transposed(node: object) -> Node | None:
    """The 2-D tensor that ``node`` is the transpose of."""
    op = op_of(node)
    if op not in _TRANSPOSES:
        return None
    assert isinstance(node, Node)
    args = args_of(node)
    if len(args) == 2 and [d % 2 for d in args[1]] != [1, 0]:
        return None
    if len(args) == 3 and {d % 2 for d in args[1:]} != {0, 1}:
        return None
    return args[0] if len(_shape(args[0])) == 2 else None


def _shape(node: object) -> list:
    return list(node.meta["val"].shape) if isinstance(node, Node) else []
