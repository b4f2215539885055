"""``inspect``: what a ``.pte`` made by this backend holds, verified as it is read."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from ._native import DEVICES, checksum, supported_ops
from .blob import ConstantRecord, DelegateBlob, LinearRecord, is_blob, unpack_blob
from .layouts import LAYOUTS
from .marlin_layouts import padded_n
from .nested_program import nested_name
from .pte_file import ExecutorchFile, parse_program

_BACKEND_ID = "CudaInt4Backend"
_SPECS = ("layout", "activation", "external_weights", "devices")
_WEIGHT_PARTS = ("qdata", "scale", "zero_point", "meta")


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a ``.pte`` with int4 weights; every checksum in it and in its ``.ptd`` is verified.

    Args:
        path: the ``.pte``. Its ``.ptd``, if it has one, is looked for in the same folder.

    Returns:
        A dict that ``json.dumps`` takes:

        - ``path``, ``nbytes``, ``seal`` (``"valid"`` or ``"none"``: not written by this package)
        - ``methods``: names, and ``constant_methods``: values by name
        - ``delegates``: per delegate ``method``, ``nbytes``, ``layout``, ``activation``,
          ``external_weights``, ``devices`` (those that it was exported for)
        - ``weights``: per int4 weight ``name``, ``N``, ``padded_N`` (rows that are stored), ``K``,
          ``group_size``, ``layout_tag``, ``activation``, ``zero_point`` and ``bias`` (whether it
          has one), ``nbytes`` (without the bias), ``bits_per_weight`` (padding counted, of N * K
          weights), ``keys`` (of its parts in the named data), ``delegate``
        - ``constants``: per constant ``name``, ``key``, ``dtype``, ``sizes``, ``nbytes``, ``file``
        - ``ops``: calls inside the delegates, by name; ``outside_ops``: calls outside
        - ``devices``: per device the ops inside the delegates that this build lacks there
        - ``outside``: per node left outside ``node``, ``op``, ``reason``
        - ``data_files``: per ``.ptd`` found ``path``, ``nbytes``, ``seal``

    Raises:
        ValueError: not an ExecuTorch program, not one with our delegate, truncated, or damaged.
        FileNotFoundError: no such file.
    """
    with ExecutorchFile(path) as file:
        if file.program is None:
            raise ValueError(
                f"{path}: expected a .pte, got its data file; inspect the .pte beside it"
            )
        plans = file.program.execution_plan
        found = [
            (plan.name, delegate) for plan in plans for delegate in plan.delegates
            if delegate.id == _BACKEND_ID
        ]  # fmt: skip
        if not found:
            others = {delegate.id for plan in plans for delegate in plan.delegates}
            raise ValueError(
                f"{path}: expected a {_BACKEND_ID} delegate, got {sorted(others) or 'none'}; lower "
                "the model with CudaInt4Partitioner"
            )
        summary: dict[str, Any] = {
            "path": os.fspath(path),
            "nbytes": file.nbytes,
            "seal": file.seal,
            "methods": [plan.name for plan in plans if plan.chains[0].instructions],
            "constant_methods": {
                plan.name: _constant_result(plan)
                for plan in plans
                if not plan.chains[0].instructions
            },
            "delegates": [],
            "weights": [],
            "constants": [],
            "ops": Counter(),
            "outside_ops": _count_calls(plans),
            "outside": [],
            "data_files": [],
        }
        data = dict.fromkeys(file.named_data, Path(file.path).name)
        views = dict(file.named_data)
        for number, (method, delegate) in enumerate(found):
            blob = _blob(file, delegate)
            specs = {spec.key: bytes(spec.value).decode() for spec in delegate.compile_specs}
            _open_data_file(file, specs.get("external_weights", ""), data, views, summary)
            _add_delegate(summary, number, method, blob, specs, data, views)
        summary["ops"] = dict(sorted(summary["ops"].items()))
        summary["devices"] = {
            device: sorted(set(summary["ops"]) - {nested_name(op) for op in supported_ops(device)})
            for device in DEVICES
        }
        return summary


def _blob(file: ExecutorchFile, delegate: Any) -> DelegateBlob:
    assert file.program is not None
    where = delegate.processed
    if where.location == type(where.location).SEGMENT:
        view = file.segment(where.index)
    else:
        view = memoryview(bytes(file.program.backend_delegate_data[where.index].data))
    if not is_blob(view):
        raise ValueError(
            f"{file.path}: its {_BACKEND_ID} delegate holds no delegate blob; the file is damaged, "
            "export it again"
        )
    try:
        return unpack_blob(view)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error


def _open_data_file(
    file: ExecutorchFile,
    tag: str,
    data: dict[str, str],
    views: dict[str, memoryview],
    summary: dict[str, Any],
) -> None:
    """Add the named data of ``<tag>.ptd``, unless it is there already or there is none."""
    name = tag if tag.endswith(".ptd") else f"{tag}.ptd"
    path = Path(file.path).parent / name
    known = {entry["path"] for entry in summary["data_files"]}
    if not tag or str(path) in known or not path.exists():
        return
    with ExecutorchFile(path) as data_file:
        if data_file.program is not None:
            raise ValueError(f"{path}: expected a data file, got a program; export it again")
        for key, view in data_file.named_data.items():
            data.setdefault(key, name)
            views.setdefault(key, view)
        summary["data_files"].append(
            {"path": str(path), "nbytes": data_file.nbytes, "seal": data_file.seal}
        )


def _add_delegate(
    summary: dict[str, Any],
    number: int,
    method: str,
    blob: DelegateBlob,
    specs: dict[str, str],
    data: dict[str, str],
    views: dict[str, memoryview],
) -> None:
    summary["delegates"].append(
        {
            "method": method,
            "nbytes": len(blob.program),
            **{key: specs.get(key, "") for key in _SPECS},
        }
    )
    for constant in blob.constants:
        _verify(summary["path"], constant, views)
    listed = {entry["key"] for entry in summary["constants"]}
    summary["constants"] += [
        _constant_entry(constant, data) for constant in blob.constants if constant.key not in listed
    ]
    summary["weights"] += [_weight_entry(linear, blob, number) for linear in blob.linears]
    summary["ops"] += Counter(_count_calls(_nested_plans(summary["path"], blob)))
    outside = json.loads(specs.get("outside", "[]"))
    summary["outside"] += [entry for entry in outside if entry not in summary["outside"]]


def _verify(path: str, constant: ConstantRecord, views: dict[str, memoryview]) -> None:
    view = views.get(constant.key)
    if view is None:
        return  # in a .ptd that is elsewhere: its entry has no file
    if len(view) != constant.nbytes or checksum(view) != constant.checksum:
        raise ValueError(
            f"{path}: {constant.name}: expected {constant.nbytes} bytes with checksum "
            f"{constant.checksum:08x}, got {len(view)} bytes with {checksum(view):08x}; the file "
            "is damaged, export it again"
        )


def _constant_entry(constant: ConstantRecord, data: dict[str, str]) -> dict[str, Any]:
    return {
        "name": constant.name,
        "key": constant.key,
        "dtype": _dtype_name(constant.dtype),
        "sizes": list(constant.sizes),
        "nbytes": constant.nbytes,
        "file": data.get(constant.key),
    }


def _weight_entry(linear: LinearRecord, blob: DelegateBlob, delegate: int) -> dict[str, Any]:
    parts = {
        part: blob.constants[getattr(linear, part)]
        for part in _WEIGHT_PARTS
        if getattr(linear, part) >= 0
    }
    nbytes = sum(part.nbytes for part in parts.values())
    return {
        "name": linear.name,
        "N": linear.N,
        "padded_N": _stored_rows(linear),
        "K": linear.K,
        "group_size": linear.group_size,
        "layout_tag": linear.layout_tag,
        "activation": linear.activation,
        "zero_point": "zero_point" in parts,
        "bias": linear.bias >= 0,
        "nbytes": nbytes,
        "bits_per_weight": round(8 * nbytes / (linear.N * linear.K), 4),
        "keys": {name: part.key for name, part in parts.items()},
        "delegate": delegate,
    }


def _stored_rows(linear: LinearRecord) -> int:
    layout = LAYOUTS.get(linear.layout_tag)
    return padded_n(linear.N) if layout is not None and layout.pads_n else linear.N


def _nested_plans(path: str, blob: DelegateBlob) -> list[Any]:
    return parse_program(blob.program, who=f"{path}: its nested program").execution_plan


def _count_calls(plans: list[Any]) -> dict[str, int]:
    """Kernel calls by operator name."""
    counts: Counter[str] = Counter()
    for plan in plans:
        names = [
            f"{operator.name}.{operator.overload}" if operator.overload else operator.name
            for operator in plan.operators
        ]
        for chain in plan.chains:
            for instruction in chain.instructions:
                index = getattr(instruction.instr_args, "op_index", None)
                if index is not None and index < len(names):
                    counts[names[index]] += 1
    return dict(sorted(counts.items()))


def _constant_result(plan: Any) -> Any:
    """What a method without instructions returns: a number, a string, or a list of them."""
    results = []
    for index in plan.outputs:
        value = plan.values[index].val
        for attribute in ("int_val", "double_val", "bool_val", "string_val"):
            if hasattr(value, attribute):
                results.append(getattr(value, attribute))
    return results[0] if len(results) == 1 else results


def _dtype_name(number: int) -> str:
    from ._native import DTYPE_NUMBERS

    names = {value: name for name, value in DTYPE_NUMBERS.items()}
    return names.get(number, f"ScalarType {number}")
