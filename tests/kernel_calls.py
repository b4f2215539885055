"""The kernels' C entry points on a stated instruction set (kernels/cpu/run_with_isa.cpp)."""

import ctypes
import functools

import torch
from torch import Tensor

from cuda_int4 import _native

ISAS = ("scalar", "avx2", "avx512", "avx512bf16")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
OK, INVALID_ARGUMENT, INCOMPATIBLE_LAYOUT, UNSUPPORTED = 0, 1, 2, 3


class Status(ctypes.Structure):
    """kernels/tensor_view.h Status."""

    _fields_ = [("code", ctypes.c_int32), ("message", ctypes.c_char * 1020)]


def run(op: str, args: ctypes.Structure, isa: str = "scalar") -> tuple[int, str]:
    """Status code and message of one op."""
    status = Status()
    entry = _native.library().cuda_int4_run_with_isa
    entry(op.encode(), ctypes.byref(args), isa.encode(), ctypes.byref(status))
    return status.code, status.message.decode()


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Those of this machine, so that tests are made for what can run and none is skipped."""
    empty = _native.SiluArgs(*[_native.tensor_view(torch.empty(0))] * 2)
    return tuple(isa for isa in ISAS if run("silu", empty, isa)[0] == OK)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output full of NaN, and the NaN that lies behind it and has to stay."""
    numel = torch.Size(shape).numel()
    whole = torch.full((numel + 64,), float("nan"), dtype=dtype)
    return whole[:numel].view(shape), whole[numel:]


def finish(op: str, args: ctypes.Structure, isa: str, y: Tensor, guard: Tensor) -> Tensor:
    """Run it, expecting success and nothing written behind y."""
    code, message = run(op, args, isa)
    assert (code, message) == (OK, "")
    assert guard.isnan().all(), f"{op} on {isa} wrote behind its output"
    return y


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    *,
    meta: Tensor | None = None,
    bias: Tensor | None = None,
    tag: str = "coalesced.v1",
    out_features: int = 0,
    activation: str = "none",
    isa: str = "scalar",
) -> Tensor:
    """Output of cuda_int4::linear; ``out_features`` is stated for layouts that pad N."""
    y, guard = poisoned((*x.shape[:-1], out_features or qdata.shape[0]), x.dtype)
    views = [_native.tensor_view(t) for t in (x, qdata, scale, zero_point, meta, bias, y)]
    names = tag.encode(), activation.encode(), b"w"
    args = _native.LinearArgs(*views, group_size, *names, out_features)
    return finish("linear", args, isa, y, guard)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    softcap: float = 0.0,
    input_pos: Tensor | None = None,
    window: int = 0,
    merge_heads: bool = False,
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
    isa: str = "scalar",
) -> Tensor:
    """Output of cuda_int4::attention."""
    B, H, S, D = q.shape
    y, guard = poisoned((B, S, H * D) if merge_heads else (B, H, S, D), q.dtype)
    views = [_native.tensor_view(t) for t in (q, k, v, mask, input_pos, *scales, y)]
    args = _native.AttentionArgs(*views, scale, is_causal, softcap, window, merge_heads)
    return finish("attention", args, isa, y, guard)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, isa: str = "scalar") -> Tensor:
    """Output of cuda_int4::rms_norm."""
    y, guard = poisoned(tuple(x.shape), x.dtype)
    views = [_native.tensor_view(t) for t in (x, weight, y)]
    return finish("rms_norm", _native.RmsNormArgs(*views, eps), isa, y, guard)


def silu(x: Tensor, isa: str = "scalar") -> Tensor:
    """Output of cuda_int4::silu."""
    y, guard = poisoned(tuple(x.shape), x.dtype)
    args = _native.SiluArgs(_native.tensor_view(x), _native.tensor_view(y))
    return finish("silu", args, isa, y, guard)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    isa: str = "scalar",
    x_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs of cuda_int4::add_rms_norm."""
    (total, guard), (y, y_guard) = (poisoned(tuple(x.shape), x.dtype) for _ in range(2))
    views = [_native.tensor_view(t) for t in (x, residual, weight, x_norm, total, y)]
    finish("add_rms_norm", _native.AddRmsNormArgs(*views, eps), isa, y, y_guard)
    assert guard.isnan().all(), f"add_rms_norm on {isa} wrote behind its sum"
    return total, y


def gate_mul(gate_up: Tensor, activation: str, isa: str = "scalar") -> Tensor:
    """Output of cuda_int4::gate_mul."""
    y, guard = poisoned((*gate_up.shape[:-1], gate_up.shape[-1] // 2), gate_up.dtype)
    views = [_native.tensor_view(t) for t in (gate_up, y)]
    return finish("gate_mul", _native.GateMulArgs(*views, activation.encode()), isa, y, guard)


def rope_append(
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    input_pos: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    n_heads: int,
    interleaved: bool,
    eps: float = 1e-5,
    isa: str = "scalar",
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Output of cuda_int4::rope_append; the caches, and their scales, are written."""
    shape = (qkv.shape[0], n_heads, qkv.shape[1], k_cache.shape[3])
    q, guard = poisoned(shape, qkv.dtype)
    tensors = (k_cache, v_cache, qkv, cos, sin, input_pos, q_norm, k_norm, *scales, q)
    views = [_native.tensor_view(t) for t in tensors]
    args = _native.RopeAppendArgs(*views, n_heads, interleaved, eps)
    return finish("rope_append", args, isa, q, guard)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Frobenius, in float64."""
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def rounding_error(exact: Tensor, dtype: torch.dtype) -> float:
    """Relative error of the exact answer rounded once."""
    return relative_error(exact.to(dtype), exact)


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """At most 1.2 times the error of one rounding; 1e-5 in float32."""
    bound = 1e-5 if found.dtype == torch.float32 else 1.2 * rounding_error(exact, found.dtype)
    assert relative_error(found, exact) <= bound + 1e-9
