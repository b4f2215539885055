"""``export``: a model to a ``.pte`` in one call; ``save``: write what ExecuTorch made, sealed."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from executorch.exir import (
    EdgeCompileConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from torch import nn
from torch.export import ExportedProgram

from ._native import EXPORT_DEVICES
from .partitioner import CudaInt4Partitioner
from .preprocess import check_constants
from .progress import progress
from .quantize import prepare_
from .seal import seal_file
from .tensors import CudaInt4Tensor

logger = logging.getLogger(__name__)
_STEPS = 4


def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
    layout: str = "auto",
    activation: str = "none",
    constant_methods: dict[str, Any] | None = None,
    external_weights: bool = False,
    devices: Sequence[str] = EXPORT_DEVICES,
    fusions: str | Collection[str] = "all",
    kv_cache: str = "none",
) -> Path:
    """Write a model with int4 weights as a ``.pte``; returns its path.

    The same as, with the standard calls::

        prepare_(model)
        program = torch.export.export(model.eval(), example_inputs, dynamic_shapes=dynamic_shapes)
        partitioner = CudaInt4Partitioner(layout=layout, activation=activation)
        edge = to_edge_transform_and_lower(program, partitioner=[partitioner])
        save(edge.to_executorch(), path)

    Args:
        model: its linears carry int4 weights of any kind that ``prepare_`` reads; those that do not
            export by themselves are replaced in place by ones that do. Exported in eval mode.
        example_inputs: positional arguments of ``forward``.
        path: where to write; must end in ``.pte``.
        dynamic_shapes: as ``torch.export.export`` takes them.
        layout: order of the int4 weights in memory: ``"auto"``, a layout's name, or a full tag.
        activation: ``"none"`` (w4a16) or ``"int8"`` (w4a8).
        constant_methods: values that the program returns by name, such as
            ``{"get_max_seq_len": 2048}``.
        external_weights: put all constants into ``<path without .pte>.ptd``.
        devices: where the file is to run; see :class:`CudaInt4Partitioner`.
        fusions: which ops are made one kernel; see :class:`CudaInt4Partitioner`.
        kv_cache: ``"int8"`` keeps the key-value caches in int8; see there.

    Raises:
        ValueError: an int4 weight that cannot be honoured, a tensor without data, or a mutated
            buffer that does not start as zeros (the message names it); a path or model of another
            kind.
        NotImplementedError: a weight of a kind that is not supported.
    """
    target = _checked_path(path)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"export: expected an nn.Module, got {type(model).__name__}; lower an ExportedProgram "
            "with to_edge_transform_and_lower(program, partitioner=[CudaInt4Partitioner()]), and "
            "write it with cuda_int4.save"
        )
    partitioner = CudaInt4Partitioner(
        layout=layout,
        activation=activation,
        external_weights=target.stem if external_weights else None,
        devices=devices,
        fusions=fusions,
        kv_cache=kv_cache,
    )
    training = [module for module in model.modules() if module.training]
    with progress(f"export {target.name}", _STEPS) as advance, torch.no_grad():
        prepare_(model)
        if not any(isinstance(p, CudaInt4Tensor) for p in model.parameters()):
            logger.warning(
                "export: expected a model with int4 weights, %s has none and is written as it is; "
                "call cuda_int4.quantize_ on it first",
                type(model).__name__,
            )
        model.eval()
        try:
            program = torch.export.export(model, example_inputs, dynamic_shapes=dynamic_shapes)
        finally:
            for module in training:  # not model.train(): a part of it may stand in eval mode
                module.training = True
        check_constants(program)
        advance(1)
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[partitioner],
            constant_methods=constant_methods,
            compile_config=_compile_config(program),
        )
        advance(1)
        manager = edge.to_executorch()
        advance(1)
        save(manager, target)
        advance(1)
    return target


def save(manager: ExecutorchProgramManager, path: str | os.PathLike[str]) -> Path:
    """Write a program, and its ``.ptd`` files beside it, each sealed; returns the path.

    A reader sees the old files or the new ones, never half of one: all are written under another
    name in the same folder, flushed, and renamed, the ``.pte`` last.

    Args:
        manager: what ``to_executorch()`` returned.
        path: where to write; must end in ``.pte``.

    Raises:
        ValueError: ``path`` does not end in ``.pte``, or cannot be written.
        OSError: writing failed, as on a full disk.
    """
    target = _checked_path(path)
    folder = target.parent
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=folder))
    try:
        manager.write_tensor_data_to_file(str(work))
        data_files = sorted(work.iterdir())
        program = work / target.name
        with open(program, "wb") as file:
            manager.write_to_file(file)
        for written in (*data_files, program):
            seal_file(written)
        for written in (*data_files, program):
            os.replace(written, folder / written.name)
        _flush_folder(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _compile_config(program: ExportedProgram) -> EdgeCompileConfig | None:
    """None, or one without ExecuTorch's check of dtypes where that would fix a dynamic batch.

    For an op that gives a list of tensors (split, chunk, unbind) the check takes ``len()`` of the
    first of them: the size of its first dimension, which becomes the example's for good.
    """
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)) and any(
            isinstance(part, torch.Tensor)
            and part.dim()
            and isinstance(part.shape[0], torch.SymInt)
            for part in value
        ):
            return EdgeCompileConfig(_check_ir_validity=False)
    return None


def _checked_path(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".pte":
        raise ValueError(f"export: expected a path that ends in .pte, got {target}; name it so")
    if not target.parent.is_dir():
        raise ValueError(f"export: expected a folder {target.parent}, got none; make it first")
    if target.is_dir():
        raise ValueError(
            f"export: expected the name of a file, got the folder {target}; add a name"
        )
    if not os.access(target.parent, os.W_OK):
        raise ValueError(
            f"export: expected a folder that can be written, got {target.parent}; choose another"
        )
    return target


def _flush_folder(folder: Path) -> None:
    """Make the renames survive a power cut, where the system knows how."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
