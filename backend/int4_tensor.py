"""CudaInt4Tensor: an int4 weight in an order that kernels read, as a torch tensor.

What the tensors of all layouts share; tensors.py has one class for each. As the weight of a linear
it calls ``torch.ops.cuda_int4.linear``, in eager and under torch.export; as the weight of an
embedding it dequantises the rows that are looked up. Nothing else computes with it: any other use
is an error that says so.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torchao.utils import TorchAOBaseTensor

from .int4 import CanonicalInt4, Convention, read_int4
from .layouts import ACTIVATIONS, LAYOUTS, check_tag
from .packing import SCALE_DTYPES, dequantize_codes, describe

aten = torch.ops.aten
_Self = TypeVar("_Self", bound="CudaInt4Tensor")


class CudaInt4Tensor(TorchAOBaseTensor):
    """Groupwise int4 weight of a linear layer, shape [N, K]: w = (q - zero_point) * scale.

    A subclass sets ``TAG``, the names that TorchAOBaseTensor asks for, and the five methods below
    that say what its parts are.

    Attributes:
        qdata: uint8, codes 0..15.
        scale: float16, bfloat16 or float32, in units of w.
        zero_point: None (8 everywhere), or in units of q.
        meta: None, or the places of what a 2:4 layout keeps.
        act_pre_scale: None, or [1] or [K]; x is multiplied by it before the linear.
        group_size: weights along K that share a scale; 32, 64, 128, 256 or K.
        layout_tag: that of the class; a weight saved in another layout is refused when loaded.
        activation: ``"none"`` (w4a16) or ``"int8"`` (w4a8: x rounded to int8 per 32 values).
        shape: (N, K), without padding.
        dtype: of the float weight it stands in for. ``.to(dtype)`` changes this alone: codes,
            scales and zero points keep every bit, so ``model.half()`` loses nothing.
    """

    TAG: ClassVar[str] = ""

    qdata: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    meta: Tensor | None = None
    act_pre_scale: Tensor | None = None
    group_size: int
    layout_tag: str
    activation: str

    # ---- what a layout says ----

    @classmethod
    def _check_parts(cls, fields: dict[str, Any]) -> None:
        """Refuse parts that disagree with each other; ``fields`` are the constructor's."""
        raise NotImplementedError

    @classmethod
    def _pack(cls, weight: CanonicalInt4, who: str) -> dict[str, Tensor | None]:
        """The tensors of a weight, by name."""
        raise NotImplementedError

    def unpack(self) -> CanonicalInt4:
        """The inverse of packing; exact."""
        raise NotImplementedError

    def _code_rows(self, indices: Tensor) -> Tensor:
        """Codes [..., K] of rows [...], in float32; a weight that is not stored is an 8."""
        raise NotImplementedError

    def _scale_rows(self, scale: Tensor, indices: Tensor) -> Tensor:
        """Scales or zero points [..., n_groups] of rows [...]."""
        raise NotImplementedError

    # ---- what all have ----

    @classmethod
    def _wrapped(cls: type[_Self], fields: dict[str, Any]) -> _Self:
        """Check the fields and make the tensor, which is still without them; copies no bytes."""
        _check(cls, fields)
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            tuple(fields["shape"]),
            dtype=fields["dtype"],
            device=fields["qdata"].device,
            requires_grad=False,
        )

    @classmethod
    def from_int4(
        cls: type[_Self],
        weight: Tensor | CanonicalInt4,
        activation: str = "none",
        *,
        convention: Convention | None = None,
        who: str = "weight",
    ) -> _Self:
        """Pack any int4 weight that :func:`cuda_int4.int4.read_int4` reads; values are kept.

        Args:
            weight: torchao, executorch or GGUF int4 tensor, one of ours in any layout, or the
                canonical form.
            activation: ``"none"`` or ``"int8"``.
            convention: of qdata, where the caller knows better than its dtype.
            who: the weight's name, for messages.

        Raises:
            ValueError: it contradicts itself, or the layout does not take it.
            NotImplementedError: it is of a kind that is not supported.
        """
        if isinstance(weight, CudaInt4Tensor):
            weight = weight.unpack()
        canonical = read_int4(weight, convention, who=who)
        dtype = canonical.dtype or canonical.scale.dtype
        parts = cls._pack(canonical, who) | {"act_pre_scale": canonical.act_pre_scale}
        attributes = {
            "group_size": canonical.group_size,
            "layout_tag": cls.TAG,
            "activation": activation,
            "shape": canonical.shape,
            "dtype": dtype,
        }
        return cls(**parts, **attributes)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The definition of the weight, [N, K], computed in float32 (or float64): the oracle.

        ``act_pre_scale`` belongs to x and is not in it.
        """
        return self.unpack().dequantize(dtype)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        """Sizes and attributes; not the millions of values."""
        zero_point = "8" if self.zero_point is None else describe(self.zero_point)
        meta = "" if self.meta is None else f"meta={describe(self.meta)}, "
        return (
            f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, group_size={self.group_size}, layout_tag={self.layout_tag!r}, "
            f"activation={self.activation!r}, {meta}scale={describe(self.scale)}, "
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

    @classmethod
    def _field_names(cls) -> tuple[list[str], list[str]]:
        """Of the tensors, and of all that an object has in its ``__dict__``."""
        tensors = [*cls.tensor_data_names, *cls.optional_tensor_data_names]  # type: ignore[attr-defined]
        return tensors, [*tensors, "group_size", "layout_tag", "activation"]

    def _set_state(self, state: Any) -> None:
        """Unpickle: the constructor does not run, so its checks run here."""
        torch._utils._set_obj_state(self, state)
        missing = [name for name in self._field_names()[1] if name not in self.__dict__]
        if missing:
            raise ValueError(
                f"{type(self).__name__}: expected a saved weight with {', '.join(missing)}, got "
                "none; it was saved by another version of cuda_int4: quantise or prepare the model "
                "again"
            )
        fields = {name: self.__dict__[name] for name in self._field_names()[1]}
        _check(type(self), fields | {"shape": tuple(self.shape), "dtype": self.dtype})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """TorchAOBaseTensor gives each subclass a __setstate__ that fills what is missing."""
        super().__init_subclass__(**kwargs)
        cls.__setstate__ = CudaInt4Tensor._set_state  # type: ignore[attr-defined]
        torch.serialization.add_safe_globals([cls])  # torch.load(weights_only=True) accepts it


def _check(cls: type[CudaInt4Tensor], fields: dict[str, Any]) -> None:
    who, activation, dtype = cls.__name__, fields["activation"], fields["dtype"]
    tag = check_tag(fields["layout_tag"], who=f"{who}: layout_tag").tag
    if tag != cls.TAG:
        raise ValueError(f"{who}: expected layout_tag {cls.TAG}, got {tag}; use its own class")
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{who}: expected activation in {', '.join(map(repr, ACTIVATIONS))}, got "
            f"{activation!r}; 'none' keeps x as it is"
        )
    cls._check_parts(fields)
    if dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{who}: expected dtype float16, bfloat16 or float32, got {dtype}; "
            "there are no kernels for other activations"
        )


implements = CudaInt4Tensor.implements
implements_torch_function = CudaInt4Tensor.implements_torch_function


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
    if not isinstance(weight, CudaInt4Tensor):
        raise NotImplementedError(
            f"{_name_of(input, bias)}: expected it as the weight of F.linear, got it as another "
            "argument; call .dequantize() on it first"
        )
    # Imported on first use: it needs libcuda_int4, which packing and export of weights do not.
    from . import ops  # noqa: F401

    x = input
    if weight.act_pre_scale is not None:
        x = x * weight.act_pre_scale
        if x.dtype != input.dtype:  # a float32 act_pre_scale does not widen the result
            x = x.to(input.dtype)
    pads_n = LAYOUTS[weight.layout_tag].pads_n
    return torch.ops.cuda_int4.linear(
        x,
        weight.qdata,
        weight.scale,
        weight.zero_point,
        weight.meta,
        bias,
        weight.group_size,
        weight.layout_tag,
        weight.activation,
        *([weight.shape[0]] if pads_n else []),
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
    if not isinstance(weight, CudaInt4Tensor):
        raise NotImplementedError(
            f"{_name_of(input)}: expected it as the weight of F.embedding, got it as indices"
        )
    if max_norm is not None:
        raise NotImplementedError(
            f"{type(weight).__name__}: expected an embedding without max_norm, got {max_norm}; it "
            "rewrites the weight in place: leave this embedding float"
        )
    rows, zero_point = input, weight.zero_point
    if LAYOUTS[weight.layout_tag].pads_n:
        # Rows that are only padding, and negative ones, would be read as others: this lookup, of
        # what it is given, refuses them as that of any embedding does.
        table = torch.arange(weight.shape[0], device=weight.device).unsqueeze(1)
        rows = F.embedding(input, table).squeeze(-1)
    return dequantize_codes(
        weight._code_rows(rows),
        weight._scale_rows(weight.scale, rows),
        None if zero_point is None else weight._scale_rows(zero_point, rows),
        weight.group_size,
        weight.dtype,
    )


def _name_of(*operands: Tensor | None) -> str:
    """Of the class of the first that is one of ours."""
    return next(type(t).__name__ for t in operands if isinstance(t, CudaInt4Tensor))


def _with_dtype(weight: CudaInt4Tensor, dtype: torch.dtype) -> CudaInt4Tensor:
    names, attributes = weight.__tensor_flatten__()
    return type(weight).__tensor_unflatten__(
        {name: getattr(weight, name) for name in names},
        attributes | {"dtype": dtype},
        None,
        None,
    )


def _form(t: Tensor) -> str:
    """Everything that must agree for a copy_, as text; dtype may differ, as between floats."""
    if not isinstance(t, CudaInt4Tensor):
        return f"{type(t).__name__} {describe(t)}"
    parts = [f"{name}={describe(getattr(t, name))}" for name in t.__tensor_flatten__()[0]]
    attributes = (f"group_size={t.group_size}", t.layout_tag, f"activation={t.activation}")
    return f"{type(t).__name__}({', '.join([f'shape={list(t.shape)}', *parts, *attributes])})"
