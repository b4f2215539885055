"""quantize_ makes float linears int4, on any machine; prepare_ makes int4 weights exportable."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.utils import TorchAOBaseTensor

from .int4 import CanonicalInt4, Convention, has_convention, is_readable, read_int4
from .layouts import ACTIVATIONS, GROUP_SIZES, LAYOUTS, check_layout, check_shape
from .packing import SCALE_DTYPES, describe, pack_nibbles
from .progress import progress
from .solvers import hqq, min_max
from .sparse24 import is_24
from .tensors import CudaInt4Tensor, check_packs, pack_int4

_SOLVERS = {"min_max": min_max, "hqq": hqq}
_CHUNK_WEIGHTS = 1 << 20  # of one weight at a time in float32: some 40 MB beside the model

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class Int4Config:
    """How float weights become int4.

    Attributes:
        group_size: weights along K that share a scale: 32, 64, 128, 256, or -1 for one per row.
        symmetric: no zero points (all 8); False costs 2 bytes per group and fits skewed weights.
        method: ``"min_max"`` or ``"hqq"`` (slower, lower error); see solvers.py.
        layout: order of the weights in memory: ``"auto"`` picks for each weight, ``"coalesced"``,
            ``"marlin"`` or ``"marlin24"`` (weights that are 2:4: see ``prune_24_``), or a full tag.
        activation: ``"none"`` (w4a16) or ``"int8"`` (w4a8).
        scale_dtype: of scales and zero points; None: that of the weight.
    """

    group_size: int = 128
    symmetric: bool = True
    method: Literal["min_max", "hqq"] = "min_max"
    layout: str = "auto"
    activation: Literal["none", "int8"] = "none"
    scale_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Refuse what no weight could be quantised with."""
        if self.group_size != -1 and self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"Int4Config: expected group_size in {', '.join(map(str, GROUP_SIZES))} or -1 (one "
                f"per row), got {self.group_size!r}; 128 is a good start"
            )
        for name, value, known in (
            ("method", self.method, tuple(_SOLVERS)),
            ("activation", self.activation, ACTIVATIONS),
            ("scale_dtype", self.scale_dtype, (None, *SCALE_DTYPES)),
        ):
            if value not in known:
                raise ValueError(
                    f"Int4Config: expected {name} in {', '.join(map(repr, known))}, got {value!r}; "
                    "choose one of them"
                )
        tag = check_layout(self.layout)
        if tag != "auto" and LAYOUTS[tag].is_sparse and not self.symmetric:
            raise ValueError(
                f"Int4Config: expected symmetric=True with layout {self.layout!r}, got False; 2:4 "
                "kernels know no zero points: leave symmetric as it is, or choose another layout"
            )


def quantize_(
    model: nn.Module, config: Int4Config | None = None, filter_fn: FilterFn | None = None
) -> nn.Module:
    """Replace the float weights of linears by int4 ones, in place; returns ``model``.

    Needs no GPU. A weight that several modules share is quantised once and stays shared: if any
    linear that uses it is selected, every user gets the one int4 tensor, an embedding as well (its
    rows are dequantised as they are looked up).

    Args:
        model: holds float16, bfloat16 or float32 weights.
        config: default ``Int4Config()``.
        filter_fn: ``(module, fully_qualified_name) -> bool``, as in torchao. Default: every
            ``nn.Linear`` that fits; a warning names those that do not. What a filter_fn selects
            must fit.

    Raises:
        ValueError: a selected weight cannot be quantised; the message names the layer. Shapes and
            values are all checked before the first weight changes, but whether ``scale_dtype``
            holds the scales.
    """
    config = config or Int4Config()
    uses = uses_by_weight(model)
    selected, unfit = _select(model, config, filter_fn, uses)
    if unfit:
        warnings.warn(
            "quantize_: these linears stay float (a filter_fn chooses others):\n  "
            + "\n  ".join(unfit),
            stacklevel=2,
        )
    for users in selected:
        _check_values(users[0].get(), config, who=users[0].name)
    with progress("quantising to int4", sum(u[0].get().numel() for u in selected)) as advance:
        for users in selected:  # each float weight is dropped as its int4 one is hung
            who, weight = users[0].name, users[0].get()
            _replace(users, quantize_weight(weight, config, who=who, advance=advance))
            del weight
    return model


def _select(
    model: nn.Module,
    config: Int4Config,
    filter_fn: FilterFn | None,
    uses: dict[int, list[Use]],
) -> tuple[list[list[Use]], list[str]]:
    """The users of each weight to quantise, and why the default filter left others."""
    selected: dict[int, list[Use]] = {}
    unfit = []
    for fqn, module in model.named_modules():
        if not (filter_fn or is_linear)(module, fqn):
            continue
        try:
            weight = _float_weight(module, f"{fqn}.weight" if fqn else "weight", config)
        except ValueError as error:
            if filter_fn is not None:
                raise
            unfit.append(str(error))
            continue
        for use in uses[id(weight)]:
            use.check()
        selected[id(weight)] = uses[id(weight)]
    return list(selected.values()), unfit


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    config: Int4Config,
    *,
    who: str = "weight",
    advance: Callable[[int], None] = lambda n: None,
) -> CudaInt4Tensor:
    """Quantise one float weight [N, K]; a few rows at a time, so that little memory is needed.

    Args:
        weight: float16, bfloat16 or float32, on any device.
        config: how.
        who: its name, for messages.
        advance: called with the number of weights done since the last call.

    Raises:
        ValueError: the shape does not fit ``config``, a value is not finite, or the weight is not
            2:4 and the layout needs it.
    """
    N, K = weight.shape
    group_size = K if config.group_size == -1 else config.group_size
    check_shape(N, K, group_size, who=who)
    n_groups = K // group_size
    scale_dtype = config.scale_dtype or weight.dtype
    qdata = torch.empty(N, K // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(N, n_groups, dtype=scale_dtype, device=weight.device)
    zero_point = None if config.symmetric else torch.empty_like(scale)
    lost = False  # whether a group's scale vanished; harmless where the weights are as coarse
    step = max(1, _CHUNK_WEIGHTS // K)
    for start in range(0, N, step):
        rows = slice(start, start + step)
        groups = weight[rows].float().reshape(-1, n_groups, group_size)
        _check_finite(groups, start, who)
        q, scale[rows], z = _SOLVERS[config.method](groups, config.symmetric, scale_dtype)
        qdata[rows] = pack_nibbles(q.reshape(-1, K))
        if zero_point is not None and z is not None:
            zero_point[rows] = z
        lost |= bool(((scale[rows] == 0) & groups.any(-1)).any())
        advance(groups.numel())
    if not bool(scale.isfinite().all()) or (lost and scale_dtype != weight.dtype):
        raise ValueError(
            f"{who}: expected scales within the range of {scale_dtype}, got "
            f"{'0 for weights that are not' if lost else 'inf'}; leave scale_dtype out, or take "
            "torch.bfloat16"
        )
    canonical = CanonicalInt4(qdata, scale, zero_point, group_size, None, weight.dtype)
    return pack_int4(canonical, config.layout, config.activation, who=who)


def _check_values(weight: Tensor, config: Int4Config, *, who: str) -> None:
    """Refuse values that quantize_weight would, a few rows at a time."""
    tag = check_layout(config.layout)
    fits = True
    step = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        _check_finite(rows, start, who)
        fits = fits and (tag == "auto" or not LAYOUTS[tag].is_sparse or is_24(rows))
    if not fits:  # it may be 2:4 all the same once it is int4, where small weights are 0
        quantize_weight(weight, config, who=who)


def _check_finite(rows: Tensor, start: int, who: str) -> None:
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"{who}: expected finite weights, got inf or nan in rows {start}.."
            f"{start + len(rows) - 1}; repair the checkpoint"
        )


def prepare_(
    model: nn.Module,
    *,
    convention: Convention | None = None,
    layout: str = "coalesced",
    activation: Literal["none", "int8"] = "none",
    scale_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Turn every int4 weight of the model into a form that exports, in place; returns ``model``.

    Reads torchao ``Int4Tensor`` (both conventions), ``IntxUnpackedToInt8Tensor`` of int4, and
    executorch's ``ExportableInt4Tensor`` and GGUF Q4_K tensors. All become
    :class:`CudaInt4Tensor`, not ``ExportableInt4Tensor``: that one has no place for
    ``act_pre_scale``, and its embedding dequantises the whole table. Weights that are such already,
    float weights and quantised weights that are not int4 are left alone. No value changes, unless
    ``scale_dtype`` asks for it. Shared weights stay shared.

    An int4 weight may belong to ``nn.Linear``, to ``nn.Embedding`` (which then dequantises the rows
    it looks up) or to a module of your own that calls ``F.linear`` or ``F.embedding`` on it.

    Args:
        model: as a quantiser or loader left it.
        convention: of every Int4Tensor, where you know better than the dtype of its qdata.
        layout: of the weights converted here, as in :class:`Int4Config`. The partitioner chooses
            again for what is ``"coalesced"``.
        activation: ``"none"`` (w4a16) or ``"int8"`` (w4a8), for the weights converted here.
        scale_dtype: round scales and zero points to this dtype. GGUF's need float32 to be exact;
            torch.bfloat16 makes Q4_K weights 5 bits each in place of 6.

    Raises:
        ValueError: an int4 weight contradicts itself, or ``layout`` does not take it; the message
            names the layer. No weight has been changed then.
        NotImplementedError: an int4 weight is of a kind, or in a place, that is not supported.
    """
    if activation not in ACTIVATIONS or scale_dtype not in (None, *SCALE_DTYPES):
        raise ValueError(
            f"prepare_: expected activation in {ACTIVATIONS} and scale_dtype None or one of "
            f"{SCALE_DTYPES}, got {activation!r} and {scale_dtype!r}; choose one of them"
        )
    check_layout(layout)
    uses = {key: users for key, users in uses_by_weight(model).items() if _is_int4(users[0].get())}
    for users in uses.values():
        for use in users:
            use.check()

    def read(use: Use) -> CanonicalInt4:
        weight = use.get()
        stated = convention if has_convention(weight) else None
        canonical = read_int4(weight, stated, who=use.name)
        if scale_dtype is None:
            return canonical
        return canonical.with_scale_dtype(scale_dtype, who=use.name)

    # All are looked at before one is replaced. Keeping what was read would need their memory twice.
    with progress("reading int4 weights", 2 * len(uses)) as advance:
        for use, *_ in uses.values():
            check_packs(read(use), layout, activation, who=use.name)
            advance(1)
        for users in uses.values():
            packed = pack_int4(read(users[0]), layout, activation, who=users[0].name)
            _replace(users, packed)
            advance(1)
    return model


@dataclass(frozen=True)
class Use:
    """One place of a model where a weight hangs."""

    module: nn.Module
    attribute: str
    name: str  # fully qualified

    def get(self) -> Tensor:
        """The weight that hangs there now."""
        return getattr(self.module, self.attribute)

    def check(self) -> None:
        """Refuse a place where an int4 weight could not be used."""
        module = self.module
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise NotImplementedError(
                f"{self.name}: expected an embedding without max_norm, got max_norm="
                f"{module.max_norm}, which rewrites the weight; leave this embedding float"
            )
        own = not type(module).__module__.startswith("torch.nn.")
        if not own and not isinstance(module, (nn.Linear, nn.Embedding)):
            raise NotImplementedError(
                f"{self.name}: expected an int4 weight in nn.Linear or nn.Embedding, got it in "
                f"{type(module).__name__}; leave this layer float"
            )


def uses_by_weight(model: nn.Module) -> dict[int, list[Use]]:
    """Every parameter and buffer by identity, with each place where it hangs."""
    uses: dict[int, list[Use]] = {}
    for fqn, module in model.named_modules():
        for store in (module._parameters, module._buffers):
            for attribute, weight in store.items():
                if weight is not None:
                    name = f"{fqn}.{attribute}" if fqn else attribute
                    uses.setdefault(id(weight), []).append(Use(module, attribute, name))
    return uses


def _replace(users: list[Use], weight: Tensor) -> None:
    """Hang the one new tensor in every place of the old."""
    parameter = nn.Parameter(weight, requires_grad=False)
    for use in users:
        is_buffer = use.attribute in use.module._buffers
        setattr(use.module, use.attribute, weight if is_buffer else parameter)


def is_linear(module: nn.Module, fqn: str) -> bool:
    """The default filter; a weight that is quantised already is no longer float."""
    return (
        isinstance(module, nn.Linear)
        # The output projection of nn.MultiheadAttention, which does not call it as a module.
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and not isinstance(module.weight, TorchAOBaseTensor)
    )


def _float_weight(module: nn.Module, name: str, config: Int4Config) -> Tensor:
    """The weight to quantise, once all that is known without its values is checked."""
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"{name}: expected a module with a parameter named weight, got {type(module).__name__};"
            " remove parametrizations first, or leave it out in filter_fn"
        )
    if isinstance(weight, TorchAOBaseTensor):
        raise ValueError(
            f"{name}: expected a float weight, got {type(weight).__name__}, which is quantised "
            "already; use prepare_ for int4 weights, or leave it out in filter_fn"
        )
    if weight.ndim != 2 or weight.dtype not in SCALE_DTYPES or weight.is_meta:
        raise ValueError(
            f"{name}: expected a weight float16, bfloat16 or float32 [N, K] with data, got "
            f"{describe(weight)} on {weight.device}; cast or load it, or leave it out in filter_fn"
        )
    N, K = weight.shape
    check_shape(N, K, K if config.group_size == -1 else config.group_size, who=name)
    return weight


def _is_int4(weight: Tensor) -> bool:
    """Whether prepare_ must read this weight, or refuse it."""
    if isinstance(weight, CudaInt4Tensor):
        return False
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        return str(weight.target_dtype) == "torch.int4"
    is_other_packing = isinstance(weight, TorchAOBaseTensor) and "Int4" in type(weight).__name__
    return is_readable(weight) or is_other_packing
