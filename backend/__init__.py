"""cuda_int4: PyTorch models with int4 weights, through ExecuTorch, on the GPU.

    quantize_ / prepare_  ->  torch.export  ->  CudaInt4Partitioner  ->  .pte  ->  load / C++

Every public name is listed below with the module that defines it. They are imported on first use
(PEP 562), so that `import cuda_int4` needs neither torch nor the C++ library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULE_OF = {
    "quantize_": "quantize",
    "Int4Config": "quantize",
    "prepare_": "quantize",
    "prune_24_": "prune",
    "read_marlin": "marlin_checkpoints",
    "read_marlin24": "marlin_checkpoints",
    "CudaCoalescedInt4Tensor": "tensors",
    "CudaMarlinInt4Tensor": "tensors",
    "CudaMarlin24Int4Tensor": "tensors",
    "CudaInt4Partitioner": "partitioner",
    "CudaInt4Backend": "preprocess",
    "export": "lowering",
    "save": "lowering",
    "inspect": "inspection",
    "load": "model",
    "load_runtime": "model",
}

if TYPE_CHECKING:
    from .inspection import inspect
    from .lowering import export, save
    from .marlin_checkpoints import read_marlin, read_marlin24
    from .model import load, load_runtime
    from .partitioner import CudaInt4Partitioner
    from .preprocess import CudaInt4Backend
    from .prune import prune_24_
    from .quantize import Int4Config, prepare_, quantize_
    from .tensors import CudaCoalescedInt4Tensor, CudaMarlin24Int4Tensor, CudaMarlinInt4Tensor

__all__ = [
    "CudaCoalescedInt4Tensor",
    "CudaInt4Backend",
    "CudaInt4Partitioner",
    "CudaMarlin24Int4Tensor",
    "CudaMarlinInt4Tensor",
    "Int4Config",
    "__version__",
    "export",
    "inspect",
    "load",
    "load_runtime",
    "prepare_",
    "prune_24_",
    "quantize_",
    "read_marlin",
    "read_marlin24",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` when it is first asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next access finds it without coming here
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(set(globals()) | set(__all__))
