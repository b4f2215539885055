"""CudaCoalescedInt4Tensor: an int4 weight in the order the kernels read, as a torch tensor.

As the weight of a linear it calls ``torch.ops.cuda_int4.linear``, in eager and under torch.export;
as the weight of an embedding it dequantises the rows that are looked up. Nothing else computes with
it: any other use is an error that says so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from .int4 import CanonicalInt4, Convention, read_int4
from .layouts import ACTIVATIONS, COALESCED, check_tag
from .packing import SCALE_DTYPES, check_int4_parts, dequantize_rows, describe

aten = torch.ops.aten


class CudaCoalescedInt4Tensor(TorchAOBaseTensor):
    """Groupwise int4 weight of a linear layer, shape [N, K]: w = (q - zero_point) * scale.

    Tensors:
        qdata: uint8 [N, K/2], row-major; codes 0..15, the even k in the low nibble.
        scale: float16, bfloat16 or float32 [N, n_groups], row-major, in units of w.
        zero_point: None (8 everywhere), or dtype of scale or float32 [N, n_groups], in units of q.
        act_pre_scale: None, or [1] or [K]; x is multiplied by it before the linear.

    Attributes:
        group_size: weights along K that share a scale; 32, 64, 128, 256 or K.
        layout_tag: ``"coalesced.v1"``; a weight saved in another layout is refused when loaded.
        activation: ``"none"`` (w4a16) or ``"int8"`` (w4a8: x rounded to int8 per 32 values).
        shape: (N, K).
        dtype: of the float weight it stands in for. ``.to(dtype)`` changes this alone: codes,
            scales and zero points keep every bit, so ``model.half()`` loses nothing.

    Raises:
        ValueError: the parts disagree with each other or with ``layout_tag``.
    """

    tensor_data_names = ["qdata", "scale"]
    tensor_attribute_names = ["group_size", "layout_tag", "activation", "shape", "dtype"]
    optional_tensor_data_names = ["zero_point", "act_pre_scale"]

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None
    act_pre_scale: Tensor | None
    group_size: int
    layout_tag: str
    activation: str

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        group_size: int,
        layout_tag: str,
        activation: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        zero_point: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
    ) -> CudaCoalescedInt4Tensor:
        """Check the parts and wrap them; no bytes are copied."""
        _check(qdata, scale, group_size, layout_tag, activation, shape, dtype, zero_point,
               act_pre_scale)  # fmt: skip
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tuple(shape), dtype=dtype, device=qdata.device, requires_grad=False
        )

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        group_size: int,
        layout_tag: str,
        activation: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        zero_point: Tensor | None = None,
        act_pre_scale: Tensor | None = None,
    ) -> None:
        """See the class; ``shape`` and ``dtype`` live on the wrapper that ``__new__`` made."""
        super().__init__()
        self.qdata = qdata
        self.scale = scale
        self.zero_point = zero_point
        self.act_pre_scale = act_pre_scale
        self.group_size = group_size
        self.layout_tag = layout_tag
        self.activation = activation

    @classmethod
    def from_int4(
        cls,
        weight: Tensor | CanonicalInt4,
        activation: str = "none",
        *,
        convention: Convention | None = None,
        who: str = "weight",
    ) -> CudaCoalescedInt4Tensor:
        """Pack any int4 weight that :func:`cuda_int4.int4.read_int4` reads; values are kept.

        Args:
            weight: torchao, executorch or GGUF int4 tensor, or the canonical form.
            activation: ``"none"`` or ``"int8"``.
            convention: of qdata, where the caller knows better than its dtype.
            who: the weight's name, for messages.

        Raises:
            ValueError: it contradicts itself.
            NotImplementedError: it is of a kind that is not supported.
        """
        if isinstance(weight, cls):
            weight = weight.unpack()
        canonical = read_int4(weight, convention, who=who)
        # coalesced.v1 is the canonical order itself: nothing moves.
        return cls(
            canonical.qdata,
            canonical.scale,
            canonical.group_size,
            COALESCED,
            activation,
            canonical.shape,
            canonical.dtype or canonical.scale.dtype,
            canonical.zero_point,
            canonical.act_pre_scale,
        )

    def unpack(self) -> CanonicalInt4:
        """The inverse of packing."""
        return CanonicalInt4(
            self.qdata, self.scale, self.zero_point, self.group_size, self.act_pre_scale, self.dtype
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The definition of the weight, [N, K], computed in float32 (or float64): the oracle.

        ``act_pre_scale`` belongs to x and is not in it.
        """
        return self.unpack().dequantize(dtype)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Sizes and attributes; not the millions of values."""
        zero_point = "8" if self.zero_point is None else describe(self.zero_point)
        return (
            f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, group_size={self.group_size}, layout_tag={self.layout_tag!r}, "
            f"activation={self.activation!r}, scale={describe(self.scale)}, "
            f"zero_point={zero_point}, act_pre_scale={self.act_pre_scale is not None})"
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Run the aten ops below; refuse every other."""
        implementation = cls._ATEN_OP_TABLE[cls].get(func)
        if implementation is None:
            raise NotImplementedError(
                f"{cls.__name__}: expected F.linear or F.embedding, outside of torch.cond and "
                f"other control flow, got {func}; an int4 weight computes nothing else: call "
                ".dequantize() on it first, or leave this layer float"
            )
        return implementation(func, types, args, kwargs or {})


def _check(
    qdata: Tensor,
    scale: Tensor,
    group_size: int,
    layout_tag: str,
    activation: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    zero_point: Tensor | None,
    act_pre_scale: Tensor | None,
) -> None:
    who = "CudaCoalescedInt4Tensor"
    tag = check_tag(layout_tag, who=f"{who}: layout_tag").tag
    if tag != COALESCED:
        raise ValueError(f"{who}: expected layout_tag {COALESCED}, got {tag}; use its own class")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{who}: expected activation in {', '.join(map(repr, ACTIVATIONS))}, got "
            f"{activation!r}; 'none' keeps x as it is"
        )
    check_int4_parts(qdata, scale, zero_point, group_size, act_pre_scale, who=who)
    if tuple(shape) != (qdata.shape[0], qdata.shape[1] * 2):
        raise ValueError(
            f"{who}: expected shape [{qdata.shape[0]}, {qdata.shape[1] * 2}] for qdata "
            f"{list(qdata.shape)}, got {list(shape)}; two codes lie in each byte"
        )
    if dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{who}: expected dtype float16, bfloat16 or float32, got {dtype}; "
            "there are no kernels for other activations"
        )


def _set_state(self: CudaCoalescedInt4Tensor, state: Any) -> None:
    """Unpickle: the constructor does not run, so its checks run here."""
    torch._utils._set_obj_state(self, state)
    missing = [
        name
        for name in (
            "qdata",
            "scale",
            "zero_point",
            "act_pre_scale",
            "group_size",
            "layout_tag",
            "activation",
        )  # fmt: skip
        if name not in self.__dict__
    ]
    if missing:
        raise ValueError(
            f"{type(self).__name__}: expected a saved weight with {', '.join(missing)}, got none; "
            "it was saved by another version of cuda_int4: quantise or prepare the model again"
        )
    _check(self.qdata, self.scale, self.group_size, self.layout_tag, self.activation,
           tuple(self.shape), self.dtype, self.zero_point, self.act_pre_scale)  # fmt: skip


# TorchAOBaseTensor puts its own __setstate__ on every subclass as it is created; that one fills
# what is missing with None.
CudaCoalescedInt4Tensor.__setstate__ = _set_state  # type: ignore[method-assign]

implements = CudaCoalescedInt4Tensor.implements
implements_torch_function = CudaCoalescedInt4Tensor.implements_torch_function


@implements(aten.linear.default)
@implements_torch_function(F.linear)
def _(func, types, args, kwargs):  # type: ignore[no-untyped-def]
    return _linear(*args, **kwargs)


@implements_torch_function(F.embedding)
def _(func, types, args, kwargs):  # type: ignore[no-untyped-def]
    return _embedding(*args, **kwargs)


@implements(aten.embedding.default)
def _(func, types, args, kwargs):  # type: ignore[no-untyped-def]
    weight, indices, *rest = args  # the rest concerns gradients
    return _embedding(indices, weight)


@implements(aten._to_copy.default)
def _(func, types, args, kwargs):  # type: ignore[no-untyped-def]
    weight = args[0]
    device, non_blocking = kwargs.get("device"), kwargs.get("non_blocking", False)
    parts = weight._apply_fn_to_data(
        lambda part: part.to(device=device, non_blocking=non_blocking, copy=True)
    )
    moved = _with_dtype(parts, kwargs.get("dtype") or weight.dtype)
    return return_and_correct_aliasing(func, args, kwargs, moved)


@implements(aten.copy_.default)
def _(func, types, args, kwargs):  # type: ignore[no-untyped-def]
    target, source = args[0], args[1]
    form = [_form(t) for t in (target, source)]
    if form[0] != form[1]:
        raise ValueError(
            f"copy_: expected a source like the target {form[0]}, got {form[1]}; to load int4 "
            "weights over others use load_state_dict(..., assign=True)"
        )
    for name in target.__tensor_flatten__()[0]:
        getattr(target, name).copy_(getattr(source, name))
    return target


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, CudaCoalescedInt4Tensor):
        raise NotImplementedError(
            "CudaCoalescedInt4Tensor: expected it as the weight of F.linear, got it as another "
            "argument; call .dequantize() on it first"
        )
    # Imported on first use: it needs libcuda_int4, which packing and export of weights do not.
    from . import ops  # noqa: F401

    x = input
    if weight.act_pre_scale is not None:
        x = x * weight.act_pre_scale
        if x.dtype != input.dtype:  # a float32 act_pre_scale does not widen the result
            x = x.to(input.dtype)
    return torch.ops.cuda_int4.linear(
        x,
        weight.qdata,
        weight.scale,
        weight.zero_point,
        None,
        bias,
        weight.group_size,
        weight.layout_tag,
        weight.activation,
    )


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows and dequantise them alone; padding_idx and the last two concern gradients."""
    if not isinstance(weight, CudaCoalescedInt4Tensor):
        raise NotImplementedError(
            "CudaCoalescedInt4Tensor: expected it as the weight of F.embedding, got it as indices"
        )
    if max_norm is not None:
        raise NotImplementedError(
            f"CudaCoalescedInt4Tensor: expected an embedding without max_norm, got {max_norm}; it "
            "rewrites the weight in place: leave this embedding float"
        )
    zero_point = weight.zero_point
    return dequantize_rows(
        F.embedding(input, weight.qdata),
        F.embedding(input, weight.scale),
        None if zero_point is None else F.embedding(input, zero_point),
        weight.group_size,
        weight.dtype,
    )


def _with_dtype(weight: CudaCoalescedInt4Tensor, dtype: torch.dtype) -> CudaCoalescedInt4Tensor:
    names, attributes = weight.__tensor_flatten__()
    return CudaCoalescedInt4Tensor.__tensor_unflatten__(
        {name: getattr(weight, name) for name in names},
        attributes | {"dtype": dtype},
        None,
        None,
    )


def _form(t: Tensor) -> str:
    """Everything that must agree for a copy_, as text; dtype may differ, as between floats."""
    if not isinstance(t, CudaCoalescedInt4Tensor):
        return f"{type(t).__name__} {describe(t)}"
    parts = [f"{name}={describe(getattr(t, name))}" for name in t.__tensor_flatten__()[0]]
    attributes = (f"group_size={t.group_size}", t.layout_tag, f"activation={t.activation}")
    return f"{type(t).__name__}({', '.join([*parts, *attributes])})"


# torch.load(weights_only=True) accepts it.
torch.serialization.add_safe_globals([CudaCoalescedInt4Tensor])
