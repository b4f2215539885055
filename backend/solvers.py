"""Choosing scale and zero point of each group: min-max, and half-quadratic quantisation (HQQ).

Both take float32 groups [..., group_size] and return ``(q, scale, zero_point)`` for
``w ~ (q - zero_point) * scale``: q uint8 0..15 in the shape of the groups, scale [...] in
``scale_dtype``, zero_point [...] in ``scale_dtype`` or None for symmetric. Codes are rounded with
the scale and zero point as they are stored, so storing loses nothing further.
"""

from __future__ import annotations

import torch
from torch import Tensor

Solution = tuple[Tensor, Tensor, "Tensor | None"]

# HQQ, Badri and Shaji 2023 (mobiusml.github.io/hqq_blog): the norm and the schedule of the penalty.
# Errors are in units of the scale here, so that one beta fits weights of every size.
_NORM = 0.7
_BETA, _KAPPA, _ITERATIONS = 4.0, 1.05, 10
# Beside the min-max range, start from one cut by a tenth: HQQ moves slowly from where it starts.
# Student-t (3) weights, group 64, mean |error|**0.7 against min-max: 1 start -3.6 %, 2 starts
# -5.7 %, 3 starts (also 0.8) -5.9 %. Twice the iterations: another 0.2 %.
_STARTS = (1.0, 0.9)


def min_max(groups: Tensor, symmetric: bool, scale_dtype: torch.dtype) -> Solution:
    """Scales from the range of each group.

    Symmetric, q - 8 in -8..7: with m the weight of greatest size, either ``scale = |m| / 7`` (no
    value is cut) or ``scale = -m / 8`` (m itself becomes -8; finer steps, values beyond 7/8 of |m|
    on the other side are cut; the scale may be negative), whichever has less squared error in the
    group. Normal weights, group 64, mean squared error: |m|/7 1.000, -m/8 0.780, the better 0.776.

    Asymmetric: ``scale = (max - min) / 15``, ``zero_point = -min / scale``; a group of one value v
    is q = 0, zero_point = -1, scale = v, exactly.
    """
    scale, zero_point = _min_max_range(groups, symmetric, scale_dtype)
    return _finish(groups, scale, zero_point, symmetric, scale_dtype)


def hqq(groups: Tensor, symmetric: bool, scale_dtype: torch.dtype) -> Solution:
    """Half-quadratic quantisation: minimise mean ``|w - w_q|**0.7``, which spares the many weights.

    Alternates a shrunken error e (the proximal step of the norm) with a least-squares fit to w - e,
    of the zero point where there is one, else of the scale. A candidate is kept where it lowers the
    0.7-norm and does not raise the squared error, so no group is worse than min-max in either.
    """
    scale, zero_point = _min_max_range(groups, symmetric, scale_dtype)
    best_norm, limit = _errors(groups, scale, zero_point)
    start_scale, start_zero = scale, zero_point
    for cut in _STARTS:
        s = start_scale * cut
        # The range shrinks about its middle, code 7.5.
        z = start_zero if symmetric else 7.5 - (7.5 - start_zero) / cut
        beta = _BETA
        for _ in range(_ITERATIONS):
            stored_s, stored_z = _stored(s, scale_dtype), _stored(z, scale_dtype)
            norm, square = _errors(groups, stored_s, stored_z)
            better = (norm < best_norm) & (square <= limit)
            best_norm = torch.where(better, norm, best_norm)
            scale = torch.where(better, stored_s, scale)
            zero_point = torch.where(better, stored_z, zero_point)
            s, z = _half_quadratic_step(groups, s, z, beta, symmetric)
            beta *= _KAPPA
    return _finish(groups, scale, zero_point, symmetric, scale_dtype)


def _min_max_range(
    groups: Tensor, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [..., 1], float32 values that scale_dtype holds."""
    if symmetric:
        m = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        eight = torch.full_like(m, 8)
        whole, cut = _stored(m.abs() / 7, scale_dtype), _stored(-m / 8, scale_dtype)
        less = _errors(groups, cut, eight)[1] < _errors(groups, whole, eight)[1]
        return torch.where(less, cut, whole), eight
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = _stored((high - low) / 15, scale_dtype)
    zero_point = _stored(-low / scale, scale_dtype)
    # No range, or one so small beside its offset that the zero point overflows: one value.
    flat = (scale == 0) | ~zero_point.isfinite()
    scale = torch.where(flat, _stored(low, scale_dtype), scale)
    filled = torch.where(scale == 0, 8.0, -1.0)  # all zero: w = (8 - 8) * 0
    return scale, torch.where(flat, filled, zero_point)


def _half_quadratic_step(
    groups: Tensor, scale: Tensor, zero_point: Tensor, beta: float, symmetric: bool
) -> tuple[Tensor, Tensor]:
    unit = _nonzero(scale)
    q = _codes(groups, scale, zero_point)
    error = (groups - (q - zero_point) * scale) / unit
    size = error.abs()
    shrunk = error.sign() * (size - size.clamp_min(1e-8) ** (_NORM - 1) / beta).clamp_min(0)
    target = groups / unit - shrunk
    if not symmetric:
        return scale, (q - target).mean(-1, keepdim=True)
    steps = q - zero_point
    fit = (target * steps).sum(-1, keepdim=True) / _nonzero((steps * steps).sum(-1, keepdim=True))
    return scale * fit, zero_point


def _errors(groups: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``|error|**0.7`` and mean squared error of each group, [..., 1]; nan never wins."""
    error = groups - (_codes(groups, scale, zero_point) - zero_point) * scale
    size = error.abs()
    return (size**_NORM).mean(-1, keepdim=True), (size * size).mean(-1, keepdim=True)


def _finish(
    groups: Tensor, scale: Tensor, zero_point: Tensor, symmetric: bool, scale_dtype: torch.dtype
) -> Solution:
    q = _codes(groups, scale, zero_point).to(torch.uint8)
    scale, zero_point = scale.squeeze(-1).to(scale_dtype), zero_point.squeeze(-1).to(scale_dtype)
    return q, scale, None if symmetric else zero_point


def _codes(groups: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.round(groups / _nonzero(scale) + zero_point).clamp_(0, 15)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()
