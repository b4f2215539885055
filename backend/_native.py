"""The C interface of libcuda_int4 (runtime/c_api.h), through ctypes.

    library()            the library, loaded once; ctypes prototypes attached
    tensor_view(t)       a torch tensor (or None) as the TensorView that every entry point takes
    check(code)          0, or CudaInt4Error with the library's own reason
    checksum(buffer), supported_ops(device), last_error(), package_dir()

Nothing here imports torch: a tensor is asked for what it is.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import struct
import sys
import sysconfig
from ctypes import (
    POINTER,
    byref,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import Any

MAX_DIMS = 8
DEVICE_CPU, DEVICE_CUDA = 0, 1
DEVICES = ("cpu", "cuda")  # their names, by number
EXPORT_DEVICES = DEVICES  # those that a file is made for unless the caller says otherwise

# torch dtype (by name) -> number of torch::ScalarType, as in kernels/tensor_view.h.
DTYPE_NUMBERS = {
    "uint8": 0,
    "int8": 1,
    "int16": 2,
    "int32": 3,
    "int64": 4,
    "float16": 5,
    "float32": 6,
    "float64": 7,
    "bool": 11,
    "bfloat16": 15,
}

# executorch::runtime::Error, by number: what a code means where the library gave no reason.
ERROR_NAMES = {
    0x01: "Internal",
    0x02: "InvalidState",
    0x10: "NotSupported",
    0x11: "NotImplemented",
    0x12: "InvalidArgument",
    0x13: "InvalidType",
    0x14: "OperatorMissing",
    0x20: "NotFound",
    0x21: "MemoryAllocationFailed",
    0x22: "AccessFailed",
    0x23: "InvalidProgram",
    0x24: "InvalidExternalData",
    0x25: "OutOfResources",
    0x30: "DelegateInvalidCompatibility",
    0x31: "DelegateMemoryAllocationFailed",
    0x32: "DelegateInvalidHandle",
}


class CudaInt4Error(RuntimeError):
    """A call into libcuda_int4 failed: the text is its reason, ``code`` ExecuTorch's number."""

    def __init__(self, code: int, reason: str) -> None:
        """Keep ``code``; show ``reason`` and the name of the code."""
        super().__init__(f"{reason} [{ERROR_NAMES.get(code, hex(code))}]")
        self.code = code


# ---- structs, field for field as in kernels/tensor_view.h, kernels/ops.h and runtime/c_api.h ----


class TensorView(ctypes.Structure):
    """A tensor somebody else owns; ``ndim == -1`` is "no tensor"."""

    _fields_ = [
        ("data", c_void_p),
        ("nbytes", c_uint64),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("sizes", c_int64 * MAX_DIMS),
        ("strides", c_int64 * MAX_DIMS),
    ]


assert ctypes.sizeof(TensorView) == 152, "kernels/tensor_view.h asserts the same"


class LinearArgs(ctypes.Structure):
    """kernels/ops.h LinearArgs."""

    _fields_ = [
        ("x", TensorView),
        ("qdata", TensorView),
        ("scale", TensorView),
        ("zero_point", TensorView),
        ("meta", TensorView),
        ("bias", TensorView),
        ("y", TensorView),
        ("group_size", c_int64),
        ("layout_tag", c_char_p),
        ("activation", c_char_p),
        ("name", c_char_p),
        ("out_features", c_int64),
    ]


class AttentionArgs(ctypes.Structure):
    """kernels/ops.h AttentionArgs."""

    _fields_ = [
        ("q", TensorView),
        ("k", TensorView),
        ("v", TensorView),
        ("mask", TensorView),
        ("input_pos", TensorView),
        ("k_scale", TensorView),
        ("v_scale", TensorView),
        ("y", TensorView),
        ("scale", c_double),
        ("is_causal", ctypes.c_bool),
        ("softcap", c_double),
        ("window", c_int64),
        ("merge_heads", ctypes.c_bool),
    ]


class RmsNormArgs(ctypes.Structure):
    """kernels/ops.h RmsNormArgs."""

    _fields_ = [("x", TensorView), ("weight", TensorView), ("y", TensorView), ("eps", c_double)]


class SiluArgs(ctypes.Structure):
    """kernels/ops.h SiluArgs."""

    _fields_ = [("x", TensorView), ("y", TensorView)]


class AddRmsNormArgs(ctypes.Structure):
    """kernels/ops.h AddRmsNormArgs."""

    _fields_ = [
        ("x", TensorView),
        ("residual", TensorView),
        ("weight", TensorView),
        ("x_norm", TensorView),
        ("sum", TensorView),
        ("y", TensorView),
        ("eps", c_double),
    ]


class GateMulArgs(ctypes.Structure):
    """kernels/ops.h GateMulArgs."""

    _fields_ = [("gate_up", TensorView), ("y", TensorView), ("activation", c_char_p)]


class RopeAppendArgs(ctypes.Structure):
    """kernels/ops.h RopeAppendArgs."""

    _fields_ = [
        ("k_cache", TensorView),
        ("v_cache", TensorView),
        ("qkv", TensorView),
        ("cos", TensorView),
        ("sin", TensorView),
        ("input_pos", TensorView),
        ("q_norm", TensorView),
        ("k_norm", TensorView),
        ("k_scale", TensorView),
        ("v_scale", TensorView),
        ("q", TensorView),
        ("n_heads", c_int64),
        ("interleaved", ctypes.c_bool),
        ("eps", c_double),
    ]


class ModelOptions(ctypes.Structure):
    """runtime/c_api.h cuda_int4_model_options."""

    _fields_ = [
        ("device", c_char_p),
        ("verify", c_int32),
        ("cuda_graph", c_int32),
        ("device_loop", c_int32),
        ("on_callers_stream", c_int32),
        ("cuda_stream", c_void_p),
    ]


class DeviceUse(ctypes.Structure):
    """runtime/c_api.h cuda_int4_device_use."""

    _fields_ = [
        ("device", ctypes.c_char * 32),
        ("device_bytes", c_uint64),
        ("peak_device_bytes", c_uint64),
        ("uploaded_bytes", c_uint64),
        ("upload_s", c_double),
        ("eager_runs", c_uint64),
        ("captures", c_uint64),
        ("replays", c_uint64),
    ]


class DecodeInfo(ctypes.Structure):
    """runtime/c_api.h cuda_int4_decode_info."""

    _fields_ = [
        ("max_context_len", c_int64),
        ("max_seq_len", c_int64),
        ("vocab_size", c_int64),
        ("bos_id", c_int64),
        ("max_sequences", c_int64),
        ("n_eos_ids", c_uint64),
        ("eos_ids", c_int64 * 32),
    ]


TokenCallback = ctypes.CFUNCTYPE(c_int32, c_int64, c_void_p)
PrefillCallback = ctypes.CFUNCTYPE(c_int32, c_int64, c_void_p)


class GenerateConfig(ctypes.Structure):
    """runtime/c_api.h cuda_int4_generate_config."""

    _fields_ = [
        ("max_new_tokens", c_int64),
        ("prefill_chunk", c_int64),
        ("temperature", c_double),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("min_p", c_double),
        ("seed", c_uint64),
        ("sequence", c_uint64),
        ("stop_tokens", POINTER(c_int64)),
        ("n_stop_tokens", c_uint64),
        ("on_prefill", PrefillCallback),
    ]


class GenerateStats(ctypes.Structure):
    """runtime/c_api.h cuda_int4_generate_stats."""

    _fields_ = [
        ("load_s", c_double),
        ("prefill_s", c_double),
        ("decode_s", c_double),
        ("time_to_first_token_s", c_double),
        ("prompt_tokens", c_int64),
        ("new_tokens", c_int64),
        ("peak_memory_bytes", c_uint64),
        ("peak_device_memory_bytes", c_uint64),
        ("stop_reason", c_int32),
        ("n_sequences", c_int32),
    ]


class GenerateRequest(ctypes.Structure):
    """runtime/c_api.h cuda_int4_generate_request."""

    _fields_ = [
        ("prompt", POINTER(c_int64)),
        ("n_prompt", c_uint64),
        ("start_pos", c_int64),
        ("config", GenerateConfig),
        ("callback", TokenCallback),
        ("user", c_void_p),
        ("stats", GenerateStats),
    ]


class SampleRule(ctypes.Structure):
    """kernels/sampling.h SampleRule."""

    _fields_ = [
        ("scale", c_double),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("min_weight", c_uint64),
        ("seed", c_uint64),
        ("sequence", c_uint64),
    ]


class SampleRow(ctypes.Structure):
    """kernels/sampling.h SampleRow."""

    _fields_ = [("rule", SampleRule), ("end_position", c_int64), ("step", c_uint64)]


class SampleArgs(ctypes.Structure):
    """kernels/sampling.h SampleArgs."""

    _fields_ = [
        ("logits", c_void_p),
        ("n_rows", c_int64),
        ("vocab_size", c_int64),
        ("row_stride", c_int64),
        ("dtype", c_int32),
        ("is_greedy", c_int32),
        ("rows", c_void_p),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("words", c_void_p),
        ("n_slots", c_int64),
    ]


# name -> (result, arguments)
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "version": (c_char_p, []),
    "last_error": (c_char_p, []),
    "clear_last_error": (None, []),
    "cuda_built": (c_int32, []),
    "cuda_available": (c_int32, []),
    "supported_ops": (c_char_p, [c_char_p]),
    "checksum": (c_uint32, [c_void_p, c_uint64]),
    "checksum_continue": (c_uint32, [c_uint32, c_void_p, c_uint64]),
    "set_num_threads": (c_int32, [c_uint32]),
    "keep_log_quiet": (None, []),
    "linear": (c_int32, [POINTER(LinearArgs), c_int32, c_void_p, c_void_p, c_uint64, c_void_p]),
    "linear_of_constants": (
        c_int32,
        [POINTER(LinearArgs), c_void_p, c_void_p, c_uint64, c_void_p],
    ),
    "linear_scratch_bytes": (c_int32, [POINTER(LinearArgs), c_int32, POINTER(c_uint64)]),
    "quantize_activation": (c_int32, [POINTER(TensorView), c_void_p, c_void_p]),
    "quantized_activation_bytes": (c_uint64, [c_int64, c_int64]),
    "attention": (c_int32, [POINTER(AttentionArgs), c_int32, c_void_p, c_void_p, c_uint64]),
    "attention_scratch_bytes": (c_int32, [POINTER(AttentionArgs), c_int32, POINTER(c_uint64)]),
    "rms_norm": (c_int32, [POINTER(RmsNormArgs), c_int32, c_void_p, c_void_p]),
    "silu": (c_int32, [POINTER(SiluArgs), c_int32, c_void_p]),
    "add_rms_norm": (c_int32, [POINTER(AddRmsNormArgs), c_int32, c_void_p, c_void_p]),
    "gate_mul": (c_int32, [POINTER(GateMulArgs), c_int32, c_void_p, c_void_p]),
    "rope_append": (c_int32, [POINTER(RopeAppendArgs), c_int32, c_void_p]),
    "model_open": (c_int32, [c_char_p, c_char_p, c_char_p, c_int32, POINTER(c_void_p)]),
    "model_open_with": (c_int32, [c_char_p, c_char_p, POINTER(ModelOptions), POINTER(c_void_p)]),
    "model_profile": (
        c_int32,
        [c_void_p, c_char_p, POINTER(TensorView), c_uint64, c_int32, POINTER(c_char_p)],
    ),
    "model_time_part": (
        c_int32,
        [
            c_void_p,
            c_char_p,
            POINTER(TensorView),
            c_uint64,
            c_char_p,
            c_uint64,
            c_int32,
            POINTER(c_double),
        ],
    ),  # fmt: skip
    "model_device_use": (c_int32, [c_void_p, POINTER(DeviceUse)]),
    "model_close": (None, [c_void_p]),
    "model_forward": (
        c_int32,
        [c_void_p, c_char_p, POINTER(TensorView), c_uint64, POINTER(c_uint64)],
    ),
    "model_output": (c_int32, [c_void_p, c_uint64, POINTER(TensorView)]),
    "model_methods": (c_char_p, [c_void_p]),
    "model_reset": (c_int32, [c_void_p]),
    "model_decode_info": (c_int32, [c_void_p, POINTER(DecodeInfo)]),
    "sample": (
        c_int32,
        [POINTER(TensorView), POINTER(GenerateConfig), c_int64, POINTER(c_int64)],
    ),
    "sample_rule": (c_int32, [POINTER(GenerateConfig), POINTER(SampleRule)]),
    "sample_rows": (c_int32, [POINTER(SampleArgs), c_void_p]),
    "generate": (
        c_int32,
        [
            c_void_p,
            POINTER(c_int64),
            c_uint64,
            c_int64,
            POINTER(GenerateConfig),
            TokenCallback,
            c_void_p,
            POINTER(GenerateStats),
        ],
    ),
    "generate_several": (
        c_int32,
        [c_void_p, POINTER(GenerateRequest), c_uint64, POINTER(GenerateStats)],
    ),
}


# ---- the library ----


def _candidate_dirs() -> list[Path]:
    """Where an install puts the compiled part, the likeliest first.

    An editable install imports the sources from the checkout and leaves the compiled part in
    site-packages/cuda_int4.
    """
    spec = importlib.util.find_spec(__package__)
    dirs = list(spec.submodule_search_locations or []) if spec else []
    dirs += [str(Path(__file__).resolve().parent)]
    dirs += [str(Path(sysconfig.get_path(name)) / "cuda_int4") for name in ("platlib", "purelib")]
    dirs += [str(Path(entry) / "cuda_int4") for entry in sys.path if entry]
    return [Path(d) for d in dict.fromkeys(dirs)]


def package_dir() -> Path:
    """The installed folder that holds lib/, bin/, include/ and lib/cmake/cuda_int4/.

    Raises:
        ImportError: no install has the compiled library.
    """
    for candidate in _candidate_dirs():
        if (candidate / "lib" / "libcuda_int4.so").is_file():
            return candidate
    looked_in = ", ".join(str(d / "lib") for d in _candidate_dirs())
    raise ImportError(
        f"cuda_int4: expected libcuda_int4.so in one of: {looked_in}; found none. Build it: "
        "pip install . (or, to work on the sources: pip install --no-build-isolation -e .)"
    )


def _load_executorch() -> None:
    """Load the libraries that ours links, from the executorch that Python would import.

    Our run path finds them in the same site-packages; this finds them in another one too (a virtual
    environment over the system's packages). find_spec imports neither executorch nor torch.
    """
    spec = importlib.util.find_spec("executorch")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for name in ("", "_threadpool", "_kernels_optimized"):
            path = Path(root) / "lib" / f"libexecutorch{name}.so"
            if path.is_file():
                ctypes.CDLL(str(path))


@functools.cache
def library() -> ctypes.CDLL:
    """Load libcuda_int4 once and attach the prototypes.

    The environment variable CUDA_INT4_LIBRARY names another build of it, such as one with
    sanitizers. It links executorch's own libexecutorch.so, so its delegate is registered where
    ``executorch.runtime`` will look for it.

    Raises:
        ImportError: the library is missing, does not load, or is of another version.
    """
    path = os.environ.get("CUDA_INT4_LIBRARY") or str(package_dir() / "lib" / "libcuda_int4.so")
    try:
        _load_executorch()
        lib = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(
            f"cuda_int4: {path} does not load: {error}. It needs executorch==1.5.1 in the same "
            "site-packages; reinstall both: pip install --force-reinstall executorch-cuda-int4"
        ) from error
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(lib, f"cuda_int4_{name}")
        function.restype = result
        function.argtypes = arguments
        setattr(lib, name, function)
    from . import __version__

    found = lib.version().decode()
    if found != __version__:
        raise ImportError(
            f"cuda_int4: expected libcuda_int4 {__version__}, found {found} at {path}; build it "
            "again: pip install ."
        )
    return lib


def last_error() -> str:
    """The library's reason for this thread's latest failure, "" if there was none."""
    return library().last_error().decode(errors="replace")


def check(code: int) -> None:
    """Raise CudaInt4Error with the library's reason unless ``code`` is 0."""
    if code != 0:
        raise CudaInt4Error(code, last_error())


def checksum(buffer: Any, so_far: int = 0) -> int:
    """``cuda_int4_checksum`` of any contiguous buffer (bytes, memoryview, mmap, numpy array).

    ``so_far`` is the checksum of what precedes it, a multiple of 4 MiB, to go on from.
    """
    view = memoryview(buffer).cast("B")
    go_on = library().checksum_continue
    if view.nbytes == 0:
        return so_far
    if view.readonly:  # ctypes borrows writable buffers only; read-only ones go through numpy
        import numpy as np

        array = np.frombuffer(view, dtype=np.uint8)
        return go_on(so_far, array.ctypes.data, array.nbytes)
    return go_on(so_far, ctypes.addressof(ctypes.c_char.from_buffer(view)), view.nbytes)


def supported_ops(device: str = "cpu") -> frozenset[str]:
    """Names of every op the delegate runs on ``device``, such as ``aten::mul.out``.

    Raises:
        ValueError: ``device`` is not one of "cpu", "cuda".
    """
    names = library().supported_ops(device.encode())
    if names is None:
        raise ValueError(f'supported_ops: expected device "cpu" or "cuda", got {device!r}')
    return frozenset(names.decode().split())


# A TensorView written in one call, a third of the time of assigning its fields.
_PACKED_VIEW = struct.Struct("=QQii8q8q")
assert _PACKED_VIEW.size == ctypes.sizeof(TensorView)
_NO_TENSOR = _PACKED_VIEW.pack(0, 0, 0, -1, *(0,) * 2 * MAX_DIMS)
_ZEROS = tuple((0,) * (MAX_DIMS - ndim) for ndim in range(MAX_DIMS + 1))
_number_of: dict[Any, int] = {}  # torch dtype -> number, as they are met


def _dtype_number(dtype: Any) -> int:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_NUMBERS:
        raise ValueError(f"cuda_int4: expected one of {', '.join(DTYPE_NUMBERS)}, got {name}")
    return _number_of.setdefault(dtype, DTYPE_NUMBERS[name])


def packed_view(tensor: Any) -> bytes:
    """The bytes of :func:`tensor_view`, for structs that are put together from several.

    Raises:
        ValueError: a dtype or a number of dimensions that the interface does not carry.
    """
    if tensor is None:
        return _NO_TENSOR
    dtype = tensor.dtype
    number = _number_of.get(dtype)
    if number is None:
        number = _dtype_number(dtype)
    sizes, strides = tensor.shape, tensor.stride()
    ndim = len(sizes)
    if ndim > MAX_DIMS:
        raise ValueError(f"cuda_int4: expected at most {MAX_DIMS} dimensions, got {ndim}")
    if tensor.is_contiguous():
        n_elements = tensor.numel()
    elif 0 in sizes:
        n_elements = 0
    else:
        n_elements = 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    zeros = _ZEROS[ndim]
    return _PACKED_VIEW.pack(
        tensor.data_ptr(), n_elements * dtype.itemsize, number, ndim,
        *sizes, *zeros, *strides, *zeros,
    )  # fmt: skip


def tensor_view(tensor: Any) -> TensorView:
    """View of a torch tensor, or "no tensor" for None; the tensor must outlive the view.

    Raises:
        ValueError: a dtype or a number of dimensions that the interface does not carry.
    """
    return TensorView.from_buffer_copy(packed_view(tensor))


__all__ = [
    "DEVICE_CPU",
    "DEVICES",
    "DEVICE_CUDA",
    "DTYPE_NUMBERS",
    "EXPORT_DEVICES",
    "AttentionArgs",
    "CudaInt4Error",
    "DecodeInfo",
    "DeviceUse",
    "GenerateConfig",
    "GenerateRequest",
    "GenerateStats",
    "LinearArgs",
    "ModelOptions",
    "PrefillCallback",
    "RmsNormArgs",
    "SampleArgs",
    "SampleRow",
    "SampleRule",
    "SiluArgs",
    "TensorView",
    "TokenCallback",
    "byref",
    "check",
    "checksum",
    "last_error",
    "library",
    "package_dir",
    "packed_view",
    "supported_ops",
    "tensor_view",
]
