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

# HQQ, Badri and Shaji 2023 (mobiusml.github.io/hqq_blog), whose norm 0.7 is 3/4 here: two square
# roots in place of a pow, which was most of the time. Errors are in units of the scale, so that one
# penalty beta fits weights of every size; it grows by kappa.
_BETA, _KAPPA, _ITERATIONS = 4.0, 1.05, 10
# Beside the min-max range, start from one cut by a tenth: HQQ moves slowly from where it starts.
# Student-t (3) weights, group 64, symmetric, mean |error|**0.7 against min-max: 1 start -3.5 %,
# 2 starts -5.6 %, 3 starts (also 0.8) -5.8 %. Twice the iterations: -5.7 %.
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
    """Half-quadratic quantisation: minimise mean ``|w - w_q|**(3/4)``, which spares the many.

    Alternates a shrunken error e (the proximal step of the norm) with a least-squares fit to w - e,
    of the zero point where there is one, else of the scale. What is fitted is rounded to
    ``scale_dtype`` each time and tried as it would be stored: rounding only what is tried costs six
    times the time for 1 % less error. A candidate is kept where it lowers the norm and does not
    raise the squared error, so no group is worse than min-max in either.
    """
    scale, zero_point = start, start_zero = _min_max_range(groups, symmetric, scale_dtype)
    best, limit = _scaled_errors(groups / _nonzero(scale) + zero_point, scale)
    for cut in _STARTS:
        s = _stored(start * cut, scale_dtype)
        # The range shrinks about its middle, code 7.5.
        z = start_zero if symmetric else _stored(7.5 - (7.5 - start_zero) / cut, scale_dtype)
        beta = _BETA
        for _ in range(_ITERATIONS):
            position = groups / _nonzero(s) + z  # where w stands on the axis of codes
            norm, square = _scaled_errors(position, s)
            better = (norm < best) & (square <= limit) & (s != 0)
            best = torch.where(better, norm, best)
            scale, zero_point = torch.where(better, s, scale), torch.where(better, z, zero_point)
            s, z = _half_quadratic_step(position, s, z, beta, symmetric)
            s, z = _stored(s, scale_dtype), _stored(z, scale_dtype)
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
        less = _square_error(groups, cut, eight) < _square_error(groups, whole, eight)
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
    position: Tensor, scale: Tensor, zero_point: Tensor, beta: float, symmetric: bool
) -> tuple[Tensor, Tensor]:
    q = position.round().clamp_(0, 15)
    error = position - q
    size = error.abs()
    # The proximal step: |e| - |e|**(-1/4) / beta, no less than 0.
    pull = size.clamp_min(1e-8).sqrt_().sqrt_().reciprocal_().div_(beta)
    target = position - size.sub_(pull).clamp_min_(0).copysign_(error)
    if not symmetric:
        return scale, zero_point + (q - target).mean(-1, keepdim=True)
    steps, target = q.sub_(zero_point), target.sub_(zero_point)
    fit = (target * steps).sum(-1, keepdim=True) / _nonzero(steps.square().sum(-1, keepdim=True))
    return scale * fit, zero_point


def _scaled_errors(position: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``|error|**(3/4)`` and mean squared error of each group, [..., 1]; nan never wins."""
    size = position.round().clamp_(0, 15).sub_(position).abs_()
    square = size.square().mean(-1, keepdim=True) * scale.square()
    root = size.sqrt_()
    norm = root.sqrt().mul_(root).mean(-1, keepdim=True)
    return norm * scale.abs() ** 0.75, square


def _square_error(groups: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Mean squared error of each group, [..., 1], in the units of w whatever the scale is."""
    error = (_codes(groups, scale, zero_point) - zero_point) * scale - groups
    return error.square().mean(-1, keepdim=True)


def _finish(
    groups: Tensor, scale: Tensor, zero_point: Tensor, symmetric: bool, scale_dtype: torch.dtype
) -> Solution:
    q = _codes(groups, scale, zero_point).to(torch.uint8)
    scale, zero_point = scale.squeeze(-1).to(scale_dtype), zero_point.squeeze(-1).to(scale_dtype)
    return q, scale, None if symmetric else zero_point


def _codes(groups: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (groups / _nonzero(scale)).add_(zero_point).round_().clamp_(0, 15)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).float()
