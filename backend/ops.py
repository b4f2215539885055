"""The only torch.library registration: ``torch.ops.cuda_int4.*``.

Each op has a schema, a fake (shapes and dtypes, for torch.export) and one implementation for CPU
and CUDA tensors, which calls the C entry point of libcuda_int4 that the ``.pte`` runtime calls too:
eager and ``.pte`` share one check and one kernel. Each has an ``.out`` overload, which ExecuTorch's
memory planning needs.

    linear     y[..., n] = sum_k x[..., k] * w[n, k] + bias[n], w = (q - zero_point) * scale; what
               the parts look like in memory is set by ``layout_tag`` (layouts.py)
    attention  softmax(q @ k.T * scale + mask) @ v; q [B, Hq, S, D], k and v [B, Hkv, T, D]; with a
               softcap c above 0, scores become c * tanh(score / c) before the mask; with input_pos
               ([S] or [B, S]) in the place of a mask, a query sees the keys up to its position, and
               of them the last ``window`` if that is not 0; with k_scale and v_scale [B, Hkv, T], k
               and v are int8; with merge_heads the result is [B, S, Hq * D], not [B, Hq, S, D]
    rms_norm   x / sqrt(mean(x^2) + eps) * weight over the last dimension
    silu       x * sigmoid(x)

and the fusions that passes make of several ops (kernels/ops.h has their arithmetic):

    add_rms_norm  sum = x + residual and rms_norm(sum): the pair of them; with x_norm, the weight
                  of a norm of x ahead of the sum
    gate_mul      f(gate) * up of [gate, up] in one tensor [..., 2 * N]
    rope_append   norms and turns q and k of [q, k, v] in one tensor, writes k and v into their
                  caches (which it changes), gives q [B, Hq, S, D]; of [q, k], k is v too;
                  with k_scale and v_scale [B, Hkv, T] the caches are int8
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
    "float softcap=0.0, Tensor? input_pos=None, int window=0, bool merge_heads=False, "
    "Tensor? k_scale=None, Tensor? v_scale=None",
    "rms_norm": "Tensor x, Tensor? weight, float eps",
    "silu": "Tensor x",
    "add_rms_norm": "Tensor x, Tensor residual, Tensor? weight, Tensor? x_norm, float eps",
    "gate_mul": "Tensor gate_up, str activation",
    "rope_append": "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor qkv, Tensor cos, Tensor sin, "
    "Tensor input_pos, Tensor? q_norm, Tensor? k_norm, int n_heads, bool interleaved, float eps, "
    "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None",
}
# The results of an op that has several; others have one, called ``out``.
_OUTPUTS = {"add_rms_norm": ("sum", "y")}
# The tensors in the order of the argument struct of ops.h, and the other arguments.
_TENSOR_ARGS = {
    "linear": ("x", "qdata", "scale", "zero_point", "meta", "bias"),
    "attention": ("q", "k", "v", "mask", "input_pos", "k_scale", "v_scale"),
    "rms_norm": ("x", "weight"),
    "silu": ("x",),
    "add_rms_norm": ("x", "residual", "weight", "x_norm"),
    "gate_mul": ("gate_up",),
    "rope_append": (
        "k_cache",
        "v_cache",
        "qkv",
        "cos",
        "sin",
        "input_pos",
        "q_norm",
        "k_norm",
        "k_scale",
        "v_scale",
    ),
}
_OTHER_ARGS = {
    "linear": ("group_size", "layout_tag", "activation", "out_features"),
    "attention": ("scale", "is_causal", "softcap", "window", "merge_heads"),
    "rms_norm": ("eps",),
    "silu": (),
    "add_rms_norm": ("eps",),
    "gate_mul": ("activation",),
    "rope_append": ("n_heads", "interleaved", "eps"),
}
_STRUCTS = {
    "linear": _native.LinearArgs,
    "attention": _native.AttentionArgs,
    "rms_norm": _native.RmsNormArgs,
    "silu": _native.SiluArgs,
    "add_rms_norm": _native.AddRmsNormArgs,
    "gate_mul": _native.GateMulArgs,
    "rope_append": _native.RopeAppendArgs,
}
_WRITTEN_ARGS = {"rope_append": ("k_cache", "v_cache", "k_scale", "v_scale")}  # beside the results
_RESULTS_LIKE = {"rope_append": 2}  # the argument whose dtype results have, where not the first
# The ops that take scratch (c_api.h), and what they take behind it: no quantized_x for linear.
_NEEDS_SCRATCH: dict[str, tuple] = {"linear": (None,), "attention": ()}
# What others take behind the stream: no quantized_y.
_NO_SCRATCH: dict[str, tuple] = {"rms_norm": (None,), "add_rms_norm": (None,), "gate_mul": (None,)}


# The names of an op's arguments, in the order in which they are given.
_NAMES = {
    op: tuple(part.partition("=")[0].split()[-1] for part in schema.split(", "))
    for op, schema in _SCHEMAS.items()
}


def _attended_shape(q: Tensor, *rest: object) -> list:
    B, H, S, D = q.shape
    merge_heads = dict(zip(_NAMES["attention"][1:], rest, strict=False)).get("merge_heads")
    return [B, S, H * D] if merge_heads else [B, H, S, D]


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


def _turned_shape(k_cache: Tensor, qkv: Tensor, n_heads: int) -> list:
    return [qkv.shape[0], n_heads, qkv.shape[1], k_cache.shape[3]]


_OUT_SHAPES: dict[str, Callable[..., list]] = {
    "linear": _linear_shape,
    "attention": _attended_shape,
    "rms_norm": lambda x, *_: list(x.shape),
    "silu": lambda x: list(x.shape),
    "add_rms_norm": lambda x, *_: list(x.shape),
    "gate_mul": lambda x, _: [*x.shape[:-1], x.shape[-1] // 2],
    "rope_append": lambda *args: _turned_shape(args[0], args[2], args[8]),
}


def _run(op: str, args: tuple, *outs: Tensor) -> None:
    """Call ``cuda_int4_<op>`` on the tensors' memory; on CUDA, on torch's current stream.

    The results all have the shape that ``_OUT_SHAPES`` says.
    """
    # The dispatcher leaves defaults out: no tensor, and 0 as in the struct.
    given = dict(zip(_NAMES[op], args, strict=False))
    # Held until the call is over: a contiguous copy must outlive its pointer.
    held = [
        None if given.get(name) is None else _dense(op, name, given[name])
        for name in _TENSOR_ARGS[op]
    ]
    views = b"".join([_native.packed_view(tensor) for tensor in (*held, *outs)])
    kind = _STRUCTS[op]
    struct = kind.from_buffer_copy(views.ljust(ctypes.sizeof(kind), b"\0"))
    for name in _OTHER_ARGS[op]:
        value = given.get(name)
        if value is not None:  # an int that is not stated is 0 too
            setattr(struct, name, value.encode() if isinstance(value, str) else value)
    out = outs[0]
    if not out.is_cuda:
        # No scratch: the op takes its own from the heap.
        scratched = op in _NEEDS_SCRATCH
        rest = (None, 0, *_NEEDS_SCRATCH[op]) if scratched else _NO_SCRATCH.get(op, ())
        _native.check(getattr(_native.library(), op)(struct, _native.DEVICE_CPU, None, *rest))
    elif out.get_device() == torch.cuda.current_device():
        _run_on_current_device(op, struct, out)
    else:
        with torch.cuda.device(out.device):
            _run_on_current_device(op, struct, out)


def _run_on_current_device(op: str, struct: ctypes.Structure, out: Tensor) -> None:
    """Queue the op on the current CUDA stream.

    Scratch comes from torch's caching allocator: it goes back to the stream's pool (in a capture,
    to the graph's) on return, and what is queued next on the stream may have it.
    """
    library = _native.library()
    stream = torch.cuda.current_stream().cuda_stream
    if op not in _NEEDS_SCRATCH:
        rest = _NO_SCRATCH.get(op, ())
        _native.check(getattr(library, op)(struct, _native.DEVICE_CUDA, stream, *rest))
        return
    nbytes = ctypes.c_uint64()
    _native.check(getattr(library, f"{op}_scratch_bytes")(struct, _native.DEVICE_CUDA, nbytes))
    scratch = None
    if nbytes.value:
        scratch = torch.empty(nbytes.value, dtype=torch.uint8, device=out.device)
    pointer = None if scratch is None else scratch.data_ptr()
    scratch_args = (pointer, nbytes.value, *_NEEDS_SCRATCH[op])
    _native.check(getattr(library, op)(struct, _native.DEVICE_CUDA, stream, *scratch_args))


def _dense(op: str, name: str, tensor: Tensor) -> Tensor:
    """Kernels want contiguous operands; attention wants only the last dimension so."""
    if op == "attention" and name in ("q", "k", "v"):
        return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    if name in _WRITTEN_ARGS.get(op, ()):
        return tensor  # what is written is no copy: the op refuses one that is not contiguous
    return tensor.contiguous()


def _register(library: torch.library.Library, op: str) -> None:
    names = _OUTPUTS.get(op, ("out",))
    free = "abcdef"[len(_WRITTEN_ARGS.get(op, ())) :]  # letters that no argument has
    marks = [f"Tensor({letter}!)" for letter, _ in zip(free, names, strict=False)]
    outs = ", ".join(f"{mark} {name}" for mark, name in zip(marks, names, strict=True))
    several = len(names) > 1
    plain = ", ".join(["Tensor"] * len(names))
    library.define(f"{op}({_SCHEMAS[op]}) -> {f'({plain})' if several else plain}")
    written = ", ".join(marks)
    library.define(
        f"{op}.out({_SCHEMAS[op]}, *, {outs}) -> {f'({written})' if several else written}"
    )

    def check_devices(args: tuple) -> None:
        x = args[0]
        given = dict(zip(_NAMES[op], args, strict=False))
        for name in _TENSOR_ARGS[op]:
            tensor = given.get(name)
            if tensor is not None and tensor.device != x.device:
                raise ValueError(
                    f"cuda_int4.{op}: expected {name} on {x.device}, where {_TENSOR_ARGS[op][0]} "
                    f"is, got {tensor.device}; move it there"
                )

    like = _RESULTS_LIKE.get(op, 0)

    def as_result(tensors):  # type: ignore[no-untyped-def]
        return tuple(tensors) if several else tensors[0]

    def functional(*args):  # type: ignore[no-untyped-def]
        check_devices(args)
        shape = _OUT_SHAPES[op](*args)
        made = [torch.empty(shape, dtype=args[like].dtype, device=args[0].device) for _ in names]
        _run(op, args, *made)
        return as_result(made)

    def out_variant(*args, **given):  # type: ignore[no-untyped-def]
        check_devices(args)
        shape = _OUT_SHAPES[op](*args)
        tensors = [given[name] for name in names]
        for name, out in given.items():
            if out.dtype != args[like].dtype:
                raise ValueError(
                    f"cuda_int4.{op}: expected {name} of {args[like].dtype}, got {out.dtype}; "
                    f"the result has the dtype of {_NAMES[op][like]}"
                )
            if list(out.shape) != shape:
                out.resize_(shape)
        if all(out.is_contiguous() for out in tensors):
            _run(op, args, *tensors)
        else:
            results = functional(*args)
            for out, result in zip(tensors, results if several else (results,), strict=True):
                out.copy_(result)
        return as_result(tensors)

    def fake(*args):  # type: ignore[no-untyped-def]
        return as_result([args[like].new_empty(_OUT_SHAPES[op](*args)) for _ in names])

    def fake_out(*args, **given):  # type: ignore[no-untyped-def]
        return as_result([given[name] for name in names])

    for device in ("CPU", "CUDA"):
        library.impl(op, functional, device)
        library.impl(f"{op}.out", out_variant, device)
    torch.library.register_fake(f"cuda_int4::{op}", fake, lib=library)
    torch.library.register_fake(f"cuda_int4::{op}.out", fake_out, lib=library)


_library = torch.library.Library("cuda_int4", "DEF")
for _op in _SCHEMAS:
    _register(_library, _op)
