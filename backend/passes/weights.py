"""The weight of a ``cuda_int4.linear`` node as tensors, whatever its layout."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from ..int4 import CanonicalInt4, from_executorch
from ..layouts import PLAIN
from ..packing import SYMMETRIC_ZERO_POINT
from ..tensors import TENSORS
from .graph import constant_tensor
from .int4_linear import LinearArgs, linear_args


def read_weight(
    program: ExportedProgram, linear: Node, stored_tag: str, *, who: str
) -> CanonicalInt4:
    """The canonical weight; a zero point that is 8 everywhere is dropped.

    Args:
        program: holds the constants.
        linear: the node; its ``layout_tag`` may be another one already.
        stored_tag: the layout that the constants' bytes have.
        who: the weight's name, for messages.
    """
    args = linear_args(linear)
    parts = {
        name: _data(program, part)
        for name, part in zip(("qdata", "scale", "zero_point", "meta"), args.weight, strict=True)
    }
    qdata, scale, zero_point = parts["qdata"], parts["scale"], parts["zero_point"]
    assert qdata is not None and scale is not None
    if stored_tag == PLAIN:
        if zero_point is None:
            return CanonicalInt4(qdata, scale.t().contiguous(), None, args.group_size)
        return from_executorch(qdata, scale, zero_point, args.group_size, who=who)
    N, K = linear.meta["val"].shape[-1], args.x.meta["val"].shape[-1]
    present = {name: part for name, part in parts.items() if part is not None}
    packed = TENSORS[stored_tag](
        **present,
        group_size=args.group_size,
        layout_tag=stored_tag,
        activation=args.activation,
        shape=(int(N), int(K)),
        dtype=scale.dtype,
    )
    return packed.unpack()


def is_symmetric(program: ExportedProgram, args: LinearArgs) -> bool:
    """Whether a linear's weight has no zero points, or only such as mean none."""
    zero_point = _data(program, args.zero_point)
    return zero_point is None or bool((zero_point == SYMMETRIC_ZERO_POINT).all())


def _data(program: ExportedProgram, part: Node | None) -> torch.Tensor | None:
    return None if part is None else constant_tensor(program, part).detach()
