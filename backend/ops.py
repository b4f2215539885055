"""The only torch.library registration: ``torch.ops.cuda_int4.{linear,attention,rms_norm,silu}``.

Each op has a schema, a fake (shapes and dtypes, for torch.export) and one implementation for CPU
and CUDA tensors, which calls the C entry point of libcuda_int4 that the ``.pte`` runtime calls too:
eager and ``.pte`` share one check and one kernel. Each has an ``.out`` overload, which ExecuTorch's
memory planning needs.

    linear     y[..., n] = sum_k x[..., k] * w[n, k] + bias[n], w = (q - zero_point) * scale; what
               the parts look like in memory is set by ``layout_tag`` (layouts.py)
    attention  softmax(q @ k.T * scale + mask) @ v; q [B, Hq, S, D], k and v [B, Hkv, T, D]; with a
               softcap c above 0, scores become c * tanh(score / c) before the mask
    rms_norm   x / sqrt(mean(x^2) + eps) * weight over the last dimension
    silu       x * sigmoid(x)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from . import _native
from .layouts import LAYOUTS

_SCHEMAS = {
    "linear": "Tensor x, Tensor qdata, Tensor scale, Tensor? zero_point, Tensor? meta, "
    "Tensor? bias, int group_size, str layout_tag, str activation, int? out_features=None",
    "attention": "Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, bool is_causal, "
    "float softcap=0.0",
    "rms_norm": "Tensor x, Tensor? weight, float eps",
    "silu": "Tensor x",
}
# Position and name of each tensor in the argument struct of ops.h, and of each other argument.
_TENSOR_ARGS = {
    "linear": ("x", "qdata", "scale", "zero_point", "meta", "bias"),
    "attention": ("q", "k", "v", "mask"),
    "rms_norm": ("x", "weight"),
    "silu": ("x",),
}
_OTHER_ARGS = {
    "linear": ("group_size", "layout_tag", "activation", "out_features"),
    "attention": ("scale", "is_causal", "softcap"),
    "rms_norm": ("eps",),
    "silu": (),
}
_STRUCTS = {
    "linear": _native.LinearArgs,
    "attention": _native.AttentionArgs,
    "rms_norm": _native.RmsNormArgs,
    "silu": _native.SiluArgs,
}
# The ops that take scratch (c_api.h), and what they take behind it: no quantized_x for linear.
_NEEDS_SCRATCH: dict[str, tuple] = {"linear": (None,), "attention": ()}


def _linear_shape(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    meta: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    layout_tag: str,
    activation: str,
    out_features: int | None = None,
) -> list:
    if out_features is None:
        layout = LAYOUTS.get(layout_tag)
        if layout is not None and layout.pads_n:
            raise ValueError(
                f"cuda_int4.linear: expected out_features with a weight in {layout_tag}, which "
                "pads N to whole tiles, got None; state the N of the weight"
            )
        out_features = qdata.shape[0]
    return [*x.shape[:-1], out_features]


_OUT_SHAPES: dict[str, Callable[..., list]] = {
    "linear": _linear_shape,
    "attention": lambda q, *_: list(q.shape),
    "rms_norm": lambda x, *_: list(x.shape),
    "silu": lambda x: list(x.shape),
}


def _run(op: str, args: tuple, out: Tensor) -> Tensor:
    """Call ``cuda_int4_<op>`` on the tensors' memory; on CUDA, on torch's current stream."""
    n_tensors = len(_TENSOR_ARGS[op])
    # Held until the call is over: a contiguous copy must outlive its pointer.
    held = [
        None if tensor is None else _dense(op, name, tensor)
        for name, tensor in zip(_TENSOR_ARGS[op], args, strict=False)
    ]
    views = b"".join([_native.packed_view(tensor) for tensor in (*held, out)])
    kind = _STRUCTS[op]
    struct = kind.from_buffer_copy(views.ljust(ctypes.sizeof(kind), b"\0"))
    # The dispatcher leaves a default out: 0, as in the struct.
    for name, value in zip(_OTHER_ARGS[op], args[n_tensors:], strict=False):
        if value is not None:  # an int that is not stated is 0 too
            setattr(struct, name, value.encode() if isinstance(value, str) else value)
    if not out.is_cuda:
        # No scratch: the op takes its own from the heap.
        rest = (None, 0, *_NEEDS_SCRATCH[op]) if op in _NEEDS_SCRATCH else ()
        _native.check(getattr(_native.library(), op)(struct, _native.DEVICE_CPU, None, *rest))
    elif out.get_device() == torch.cuda.current_device():
        _run_on_current_device(op, struct, out)
    else:
        with torch.cuda.device(out.device):
            _run_on_current_device(op, struct, out)
    return out


def _run_on_current_device(op: str, struct: ctypes.Structure, out: Tensor) -> None:
    """Queue the op on the current CUDA stream.

    Scratch comes from torch's caching allocator: it goes back to the stream's pool (in a capture,
    to the graph's) on return, and what is queued next on the stream may have it.
    """
    library = _native.library()
    stream = torch.cuda.current_stream().cuda_stream
    if op not in _NEEDS_SCRATCH:
        _native.check(getattr(library, op)(struct, _native.DEVICE_CUDA, stream))
        return
    nbytes = ctypes.c_uint64()
    _native.check(getattr(library, f"{op}_scratch_bytes")(struct, _native.DEVICE_CUDA, nbytes))
    scratch = None
    if nbytes.value:
        scratch = torch.empty(nbytes.value, dtype=torch.uint8, device=out.device)
    pointer = None if scratch is None else scratch.data_ptr()
    rest = (pointer, nbytes.value, *_NEEDS_SCRATCH[op])
    _native.check(getattr(library, op)(struct, _native.DEVICE_CUDA, stream, *rest))


def _dense(op: str, name: str, tensor: Tensor) -> Tensor:
    """Kernels want contiguous operands; attention wants only the last dimension so."""
    if op == "attention" and name != "mask":
        return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.contiguous()


def _register(library: torch.library.Library, op: str) -> None:
    library.define(f"{op}({_SCHEMAS[op]}) -> Tensor")
    library.define(f"{op}.out({_SCHEMAS[op]}, *, Tensor(a!) out) -> Tensor(a!)")

    def check_devices(args: tuple) -> None:
        x = args[0]
        for name, tensor in zip(_TENSOR_ARGS[op], args, strict=False):
            if tensor is not None and tensor.device != x.device:
                raise ValueError(
                    f"cuda_int4.{op}: expected {name} on {x.device}, where {_TENSOR_ARGS[op][0]} "
                    f"is, got {tensor.device}; move it there"
                )

    def functional(*args):  # type: ignore[no-untyped-def]
        check_devices(args)
        out = torch.empty(_OUT_SHAPES[op](*args), dtype=args[0].dtype, device=args[0].device)
        return _run(op, args, out)

    def out_variant(*args, out):  # type: ignore[no-untyped-def]
        check_devices((*args[: len(_TENSOR_ARGS[op])],))
        shape = _OUT_SHAPES[op](*args)
        if out.dtype != args[0].dtype:
            raise ValueError(
                f"cuda_int4.{op}: expected out of {args[0].dtype}, got {out.dtype}; "
                "the result has the dtype of the first argument"
            )
        if list(out.shape) != shape:
            out.resize_(shape)
        if out.is_contiguous():
            return _run(op, args, out)
        return out.copy_(functional(*args))

    def fake(*args):  # type: ignore[no-untyped-def]
        return args[0].new_empty(_OUT_SHAPES[op](*args))

    def fake_out(*args, out):  # type: ignore[no-untyped-def]
        return out

    for device in ("CPU", "CUDA"):
        library.impl(op, functional, device)
        library.impl(f"{op}.out", out_variant, device)
    torch.library.register_fake(f"cuda_int4::{op}", fake, lib=library)
    torch.library.register_fake(f"cuda_int4::{op}.out", fake_out, lib=library)


_library = torch.library.Library("cuda_int4", "DEF")
for _op in _SCHEMAS:
    _register(_library, _op)
