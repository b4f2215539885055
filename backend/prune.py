"""prune_24_ makes a float model 2:4: of every 4 consecutive weights of a row, 2 become 0.

quantize_ keeps those zeros exact where it is symmetric: 0 is the code 8 whatever the scale. A model
that was pruned elsewhere needs nothing of this; sparse24.check_24 says whether a weight is 2:4.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from .packing import SCALE_DTYPES, describe
from .progress import progress
from .quantize import FilterFn, Use, is_linear, uses_by_weight

_METHODS = ("magnitude", "wanda")
_CHUNK_WEIGHTS = 1 << 20  # of one weight at a time in float32, and some masks beside them


@torch.no_grad()
def prune_24_(
    model: nn.Module,
    method: Literal["magnitude", "wanda"] = "magnitude",
    calibration: Iterable[Any] | None = None,
    filter_fn: FilterFn | None = None,
) -> nn.Module:
    """Set 2 of every 4 weights along K of linears to 0, in place; returns ``model``.

    Of each four the two of highest score stay, bit for bit. Of equal scores the larger weight
    stays, of equal weights the first, so that a result can be repeated and a weight that is 2:4
    already keeps every bit. A weight that several linears share is pruned once.

    Args:
        model: holds float16, bfloat16 or float32 weights.
        method: the score of a weight. ``"magnitude"``: |w|. ``"wanda"``: |w| times the 2-norm of
            its input feature over the calibration inputs (Sun et al. 2023, arXiv 2306.11695),
            measured in one run of the dense model: lower error where features differ in size.
        calibration: for wanda, inputs of ``model``: each a Tensor, a tuple or list of positional
            arguments, or a mapping of keyword arguments. Run in eval mode without gradients.
        filter_fn: ``(module, fully_qualified_name) -> bool``, as in quantize_. Default: every
            ``nn.Linear`` that fits and shares its weight with linears alone; a warning names those
            that do not. What a filter_fn selects must be an ``nn.Linear`` that fits.

    Raises:
        ValueError: a selected weight cannot be pruned, or calibration is missing, empty or does not
            reach a selected linear; the message names it. All is checked before a weight changes.
    """
    _check_options(method, calibration)
    selected, unfit = _select(model, filter_fn)
    norms = None if calibration is None else _input_norms(model, selected, calibration)
    if unfit:
        warnings.warn(
            "prune_24_: these linears stay as they are (a filter_fn chooses others):\n  "
            + "\n  ".join(unfit),
            stacklevel=2,
        )
    with progress("pruning to 2:4", sum(users[0].get().numel() for users in selected)) as advance:
        for i, users in enumerate(selected):
            weight = users[0].get()
            step = max(1, _CHUNK_WEIGHTS // weight.shape[1])
            for start in range(0, len(weight), step):
                rows = weight[start : start + step]
                size = rows.abs().float()
                score = size if norms is None else size * norms[i]
                rows.masked_fill_(~_kept(score, size), 0)
                advance(rows.numel())
    return model


def _kept(score: Tensor, size: Tensor) -> Tensor:
    """Bool [N, K]: the two of each four with the highest (score, size, -place)."""
    scores, sizes = (t.view(len(t), -1, 4).unbind(-1) for t in (score, size))
    beaten_by = [torch.zeros_like(scores[0], dtype=torch.uint8) for _ in range(4)]
    for i, j in itertools.combinations(range(4), 2):
        tie = scores[i] == scores[j]
        first = (scores[i] > scores[j]) | (tie & (sizes[i] >= sizes[j]))
        beaten_by[j] += first
        beaten_by[i] += ~first
    return (torch.stack(beaten_by, -1) < 2).view(score.shape)


def _input_norms(
    model: nn.Module, selected: list[list[Use]], calibration: Iterable[Any]
) -> list[Tensor]:
    """2-norm of each input feature of each weight, float32 [K], over all that uses the weight."""
    squares = [torch.zeros(users[0].get().shape[1], dtype=torch.float64) for users in selected]

    def count(i: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        total = x.float().square().reshape(-1, x.shape[-1]).sum(0, dtype=torch.float64)
        squares[i] = squares[i].to(total.device) + total

    training = {module: module.training for module in model.modules()}
    hooks = [
        use.module.register_forward_pre_hook(
            lambda module, args, kwargs, i=i: count(i, args, kwargs), with_kwargs=True
        )
        for i, users in enumerate(selected)
        for use in users
        if isinstance(use.module, nn.Linear)
    ]
    n_inputs = 0
    try:
        model.eval()
        for inputs in calibration:
            if isinstance(inputs, Mapping):
                model(**inputs)
            elif isinstance(inputs, (tuple, list)):
                model(*inputs)
            else:
                model(inputs)
            n_inputs += 1
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    norms = []
    for users, total in zip(selected, squares, strict=True):
        norm = total.sqrt().float()
        if not bool(norm.isfinite().all()):
            feature = int((~norm.isfinite()).nonzero()[0])
            raise ValueError(
                f"{users[0].name}: expected finite inputs, got {float(norm[feature])} as the norm "
                f"of feature {feature} over {n_inputs} calibration inputs; repair the checkpoint, "
                "or calibrate in bfloat16"
            )
        if not bool(norm.any()):
            raise ValueError(
                f"{users[0].name}: expected calibration inputs that reach this linear, got none "
                f"that is not 0 of {n_inputs}; give others, or leave it out in filter_fn"
            )
        norms.append(norm.to(users[0].get().device))
    return norms


def _select(model: nn.Module, filter_fn: FilterFn | None) -> tuple[list[list[Use]], list[str]]:
    """The users of each weight to prune, and why the default filter left others."""
    uses = uses_by_weight(model)
    selected: dict[int, list[Use]] = {}
    unfit = []
    for fqn, module in model.named_modules():
        if not (filter_fn or _is_linear)(module, fqn):
            continue
        name = f"{fqn}.weight" if fqn else "weight"
        try:
            weight = _float_weight(module, name)
            if filter_fn is None:
                _check_users(name, uses[id(weight)])
        except ValueError as error:
            if filter_fn is not None:
                raise
            unfit.append(str(error))
            continue
        selected[id(weight)] = uses[id(weight)]
    for users in selected.values():
        if not bool(users[0].get().isfinite().all()):
            raise ValueError(
                f"{users[0].name}: expected finite weights, got inf or nan; repair the checkpoint"
            )
    return list(selected.values()), unfit


def _is_linear(module: nn.Module, fqn: str) -> bool:
    """The default filter; unlike that of quantize_ it takes the quantised, for the warning."""
    is_quantised = isinstance(getattr(module, "weight", None), TorchAOBaseTensor)
    return is_linear(module, fqn) or (is_quantised and isinstance(module, nn.Linear))


def _float_weight(module: nn.Module, name: str) -> Tensor:
    """The weight to prune, once all that is known without its values is checked."""
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Linear) or weight is None:
        raise ValueError(
            f"{name}: expected an nn.Linear with a parameter named weight, got "
            f"{type(module).__name__}; remove parametrizations first, or leave it out in filter_fn"
        )
    if isinstance(weight, TorchAOBaseTensor):
        raise ValueError(
            f"{name}: expected a float weight, got {type(weight).__name__}, which is quantised "
            "already; prune before quantize_, or leave it out in filter_fn"
        )
    if weight.dtype not in SCALE_DTYPES or weight.is_meta:
        raise ValueError(
            f"{name}: expected a weight float16, bfloat16 or float32 with data, got "
            f"{describe(weight)} on {weight.device}; cast or load it, or leave it out in filter_fn"
        )
    K = weight.shape[1]
    if K % 4:
        raise ValueError(
            f"{name}: expected K % 4 == 0, got K={K}; pad K to {-(-K // 4) * 4}, or leave it out "
            "in filter_fn"
        )
    return weight


def _check_users(name: str, users: list[Use]) -> None:
    """Refuse a weight that something else than linears reads."""
    others = [use.name for use in users if not isinstance(use.module, nn.Linear)]
    if others:
        raise ValueError(
            f"{name}: expected a weight of linears alone, got one that is also {others[0]}, whose "
            "rows would lose half of their values; untie them, or select it in filter_fn"
        )


def _check_options(method: str, calibration: Iterable[Any] | None) -> None:
    if method not in _METHODS:
        raise ValueError(
            f"prune_24_: expected method in {', '.join(map(repr, _METHODS))}, got {method!r}; "
            "'magnitude' needs no calibration"
        )
    if (method == "wanda") != (calibration is not None):
        given = "none" if calibration is None else "some"
        raise ValueError(
            f"prune_24_: expected calibration with method='wanda' and with no other, got {given} "
            f"with {method!r}; wanda weighs each input feature by what it measures"
        )
    if isinstance(calibration, (Tensor, Mapping)):
        raise ValueError(
            f"prune_24_: expected calibration as an iterable of inputs, got one "
            f"{type(calibration).__name__}; write [x] for a single input"
        )
