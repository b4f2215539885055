"""Running a ``.pte``: our own loader, and ExecuTorch's with our delegate in it.

model = load("model.pte")            opened and verified in C++; errors carry their reason
(logits,) = model.forward(tokens, input_pos)
model.generate([1, 15043], max_new_tokens=20)

load_runtime()                       from here on executorch.runtime and TextLLMRunner know us
with explained():                    ... and their bare error codes get the reason
    executorch.runtime.Runtime.get().load_program("model.pte").load_method("forward")
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _native
from ._native import CudaInt4Error, TensorView, check, library, tensor_view

if TYPE_CHECKING:
    import torch

    from .generation import Generation

BACKEND_ID = "CudaInt4Backend"
_DTYPE_NAMES = {number: name for name, number in _native.DTYPE_NUMBERS.items()}


@dataclass(frozen=True)
class DeviceUse:
    """What a model has done on its device so far.

    Attributes:
        device: "cpu", "cuda:0"; "" for a model of which nothing was delegated. All else is 0 on the
            CPU.
        device_bytes: of device memory, allocated now.
        peak_device_bytes: the most it ever was.
        uploaded_bytes: of constants, in ``upload_s`` seconds.
        upload_s: see ``uploaded_bytes``.
        eager_runs: calls whose kernels were launched one by one.
        captures: CUDA graphs made.
        replays: calls that were the launch of one.
    """

    device: str
    device_bytes: int
    peak_device_bytes: int
    uploaded_bytes: int
    upload_s: float
    eager_runs: int
    captures: int
    replays: int


@dataclass(frozen=True)
class OpTime:
    """One instruction of a delegate: what it called, on which weight, how long it took."""

    op: str
    detail: str
    us: float


@dataclass(frozen=True)
class Profile:
    """Where the time of one call goes.

    Attributes:
        total_us: of the delegates' work on the device, transfers of inputs included.
        instructions: in their order. On a GPU the timestamps between them cost about a microsecond
            each, so that their sum is more than ``total_us``.
    """

    total_us: float
    instructions: tuple[OpTime, ...]

    def by_op(self) -> dict[str, tuple[int, float]]:
        """Name of the op -> how many there are, and their microseconds together; dearest first."""
        sums: dict[str, tuple[int, float]] = {}
        for one in self.instructions:
            n, us = sums.get(one.op, (0, 0.0))
            sums[one.op] = (n + 1, us + one.us)
        return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


class Model:
    """A loaded ``.pte``; made by :func:`load`.

    Every method of the file is loaded, so that what this build cannot run fails in ``load``. KV
    caches live in the model: one object is one conversation at a time, and calls from several
    threads take turns. Usable as a context manager.
    """

    def __init__(self, path: str, handle: int) -> None:
        """Take over the handle of ``cuda_int4_model_open``."""
        self.path = path
        self._handle: int | None = handle
        self._lock = threading.RLock()
        self._generations = 0  # in progress; more than one only from a callback of another

    @property
    def handle(self) -> int:
        """The ``cuda_int4_model*``.

        Raises:
            ValueError: the model has been closed.
        """
        if self._handle is None:
            raise ValueError(
                f"{self.path}: expected an open model, got a closed one; load it again"
            )
        return self._handle

    @contextlib.contextmanager
    def generating(self) -> Iterator[int]:
        """The handle, for a generation: a callback of it cannot close the model under it."""
        with self._lock:
            self._generations += 1
            try:
                yield self.handle
            finally:
                self._generations -= 1

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, constant ones included."""
        return tuple(library().model_methods(self.handle).decode().split())

    def forward(self, *inputs: torch.Tensor | int | float | bool) -> list[torch.Tensor]:
        """Run ``forward``; see :meth:`run`."""
        return self.run("forward", *inputs)

    def run(self, method: str, *inputs: torch.Tensor | int | float | bool) -> list[torch.Tensor]:
        """Run a method on CPU tensors and numbers; returns copies of its outputs.

        A number comes back as a 0-dimensional tensor (int64, float64 or bool).

        Raises:
            CudaInt4Error: wrong number, dtype or sizes of inputs, or a kernel failed.
        """
        views, _alive = _input_views(method, inputs)
        n_outputs = ctypes.c_uint64()
        with self._lock:
            check(
                library().model_forward(
                    self.handle, method.encode(), views, len(views), ctypes.byref(n_outputs)
                )
            )
            return [self._output(i) for i in range(n_outputs.value)]

    def profile(
        self,
        *inputs: torch.Tensor | int | float | bool,
        method: str = "forward",
        rounds: int = 10,
    ) -> Profile:
        """Where the time of one call goes, op by op: the median of ``rounds`` runs.

        The method runs ``rounds`` + 2 times or so. One that writes to given positions of a cache
        ends where one call would end; one that adds to a state does not: ``reset()`` it.

        Raises:
            CudaInt4Error: as :meth:`run`.
        """
        views, _alive = _input_views(method, inputs)
        text = ctypes.c_char_p()
        with self._lock:
            check(
                library().model_profile(
                    self.handle, method.encode(), views, len(views), rounds, ctypes.byref(text)
                )
            )
            lines = [line.split("\t") for line in (text.value or b"").decode().splitlines()]
        (total, _, _), *rest = lines
        return Profile(float(total), tuple(OpTime(op, what, float(us)) for us, op, what in rest))

    def time_part(
        self,
        *inputs: torch.Tensor | int | float | bool,
        kept: Sequence[bool],
        method: str = "forward",
        rounds: int = 10,
    ) -> float:
        """Microseconds that one call would take without some of its instructions, on a GPU.

        The call is recorded as a CUDA graph without them and launched several times in a row. What
        a call costs less without an instruction is what the instruction costs where it stands, with
        whatever it overlaps; timestamps between instructions would end that overlap.

        Args:
            inputs: as of :meth:`run`.
            kept: whether to keep it, for each of ``profile().instructions``.
            method: which.
            rounds: the median of so many.

        Caches hold anything afterwards: :meth:`reset` them.

        Raises:
            CudaInt4Error: as :meth:`run`; or it does not run on a GPU.
        """
        views, _alive = _input_views(method, inputs)
        us = ctypes.c_double()
        with self._lock:
            check(
                library().model_time_part(
                    self.handle, method.encode(), views, len(views), bytes(map(bool, kept)),
                    len(kept), rounds, ctypes.byref(us),
                )
            )  # fmt: skip
        return us.value

    def _output(self, index: int) -> torch.Tensor:
        view = TensorView()
        check(library().model_output(self.handle, index, ctypes.byref(view)))
        return _copy(view)

    def generate(self, prompt: list[int], **options: Any) -> Generation:
        """Generate tokens with the C++ decode loop; see :func:`.generation.generate_tokens`."""
        from .generation import generate_tokens

        return generate_tokens(self, prompt, **options)

    def device_use(self) -> DeviceUse:
        """Where the model runs, and what it has done there."""
        native = _native.DeviceUse()
        with self._lock:
            check(library().model_device_use(self.handle, ctypes.byref(native)))
        values = {name: getattr(native, name) for name, *_ in native._fields_}
        return DeviceUse(**{**values, "device": native.device.decode()})

    def reset(self) -> None:
        """Zero every mutable buffer (KV caches): a new conversation."""
        with self._lock:
            check(library().model_reset(self.handle))

    def close(self) -> None:
        """Free the model; more than once is harmless.

        Raises:
            RuntimeError: called by a callback of a generation, which still needs the model.
        """
        with self._lock:
            if self._generations:
                raise RuntimeError(
                    f"{self.path}: close: expected no generation in progress, got a call from "
                    "its callback; close the model when it is over"
                )
            if self._handle is not None:
                library().model_close(self._handle)
                self._handle = None

    def __enter__(self) -> Model:
        """The model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def __del__(self) -> None:
        """Close it, unless the interpreter is already taking itself apart."""
        try:  # not contextlib.suppress: modules may be gone by now
            self.close()
        except Exception:
            pass

    def __repr__(self) -> str:
        """Path, and methods while it is open."""
        state = "closed" if self._handle is None else ", ".join(self.methods)
        return f"cuda_int4.Model({self.path!r}: {state})"


def load(
    path: str | os.PathLike[str],
    data_path: str | os.PathLike[str] | None = None,
    device: str = "auto",
    verify: bool = True,
    *,
    cuda_graph: bool = True,
    device_loop: bool = True,
    cuda_stream: int | None = None,
) -> Model:
    """Open a ``.pte`` and make sure that this build can run all of it.

    Args:
        path: the ``.pte``.
        data_path: its ``.ptd``, where the weights were exported apart.
        device: "auto", "cpu", "cuda" or "cuda:1". The environment variable CUDA_INT4_DEVICE takes
            the place of "auto", which is CUDA where a GPU answers and has a kernel of every op,
            else the CPU.
        verify: compare the checksums of all bytes. Without it the constants are trusted; the
            program and its header are always checked.
        cuda_graph: on a GPU, replay a CUDA graph from the second call on with inputs of the same
            sizes. CUDA_INT4_CUDA_GRAPH=0 in the environment turns it off, too.
        device_loop: on a GPU, ``generate`` chooses tokens there, and the host reads them one step
            behind; ``CUDA_INT4_DEVICE_LOOP=0`` turns it off, too. The tokens are the same.
        cuda_stream: the ``cudaStream_t`` to work on, as a number
            (``torch.cuda.current_stream().cuda_stream``), alive as long as the model. None: each
            method has a stream of its own.

    Raises:
        CudaInt4Error: the file is damaged, truncated, of another version, or needs what this build
            lacks; the text names the part, what was expected, what was found, and the cure.
        ValueError: a path that no file can have.
    """
    paths = [None if p is None else os.fsencode(p) for p in (path, data_path)]
    for encoded in paths:
        if encoded is not None and b"\0" in encoded:  # C would open what stands before it
            raise ValueError(f"load: expected a path without NUL, got {encoded!r}; correct it")
    handle = ctypes.c_void_p()
    options = _native.ModelOptions(
        device.encode(), verify, cuda_graph, device_loop, cuda_stream is not None, cuda_stream
    )
    check(library().model_open_with(*paths, ctypes.byref(options), ctypes.byref(handle)))
    if handle.value is None:
        raise CudaInt4Error(1, f"{os.fspath(path)}: expected a handle, got none")
    return Model(os.fspath(path), handle.value)


def load_runtime() -> None:
    """Make the delegate known to ``executorch.runtime`` and to ExecuTorch's own runners.

    Call it before the first ``load_program`` or ``TextLLMRunner`` that needs it; more than once is
    harmless. Both sides link the one ``libexecutorch.so`` of the executorch package, where the
    registry of backends is.

    ExecuTorch's exceptions hold an error code only: wrap the calls in :func:`explained`, or ask
    ``cuda_int4._native.last_error()``.

    Raises:
        ImportError: the library is missing, or a second copy of ``libexecutorch.so`` is loaded.
    """
    library()
    from executorch.runtime import Runtime

    names = Runtime.get().backend_registry.registered_backend_names
    if BACKEND_ID not in names:
        raise ImportError(
            f"load_runtime: expected {BACKEND_ID} among executorch's backends, got "
            f"{', '.join(names) or 'none'}; another copy of executorch is loaded: keep one "
            "in the environment and reinstall executorch-cuda-int4"
        )


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Give ExecuTorch's own exceptions the reason that our delegate had.

    Raises:
        CudaInt4Error: in place of the RuntimeError that came, where the delegate was the cause.
    """
    library().clear_last_error()
    try:
        yield
    except CudaInt4Error:
        raise
    except RuntimeError as error:
        reason = _native.last_error()
        if not reason:
            raise
        raise CudaInt4Error(_code_in(str(error)), reason) from error


def _code_in(text: str) -> int:
    """The number in executorch's "error: 0x:30" or "error 0x30"; else 1 (Internal)."""
    found = re.search(r"0x:?([0-9a-fA-F]+)", text)
    return int(found[1], 16) if found else 1


def _input_views(method: str, inputs: tuple[Any, ...]) -> tuple[Any, list[torch.Tensor]]:
    """TensorViews of the inputs, and the tensors that must live as long as they do."""
    import torch

    tensors = []
    for value in inputs:
        tensor = value if isinstance(value, torch.Tensor) else _number(value)
        if tensor.device.type != "cpu":
            raise ValueError(f"{method}: expected CPU tensors, got one on {tensor.device}")
        tensors.append(tensor.detach().contiguous())
    return (TensorView * len(tensors))(*map(tensor_view, tensors)), tensors


def _number(value: int | float | bool) -> torch.Tensor:
    import torch

    if isinstance(value, bool):
        return torch.tensor(value)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int64)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    raise TypeError(f"expected tensors and numbers, got {type(value).__name__}")


def _copy(view: TensorView) -> torch.Tensor:
    import torch

    dtype = getattr(torch, _DTYPE_NAMES[view.dtype])
    sizes, strides = list(view.sizes[: view.ndim]), list(view.strides[: view.ndim])
    if view.nbytes == 0:
        return torch.empty(sizes, dtype=dtype)
    memory = (ctypes.c_char * view.nbytes).from_address(view.data)
    return torch.frombuffer(memory, dtype=dtype).as_strided(sizes, strides).clone()
