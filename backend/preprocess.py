"""``CudaInt4Backend``: from a delegated subgraph to the delegate blob and its named data.

subgraph -> passes -> nested program without constants   (nested_program.py)
                   -> named data: one entry per distinct constant
                   -> blob: header, records, nested program (blob.py)

A private API of executorch 1.5.1 used here: ``NamedDataStore``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch.export import ExportedProgram

from ._native import checksum, supported_ops
from .blob import (
    CONSTANT_ALIGNMENT_BYTES,
    ConstantRecord,
    DelegateBlob,
    LinearRecord,
    pack_blob,
)
from .layouts import check_tag
from .nested_program import NestedProgram, emit_nested_program, nested_name
from .packing import describe
from .passes import run_passes
from .passes.graph import calls, is_constant
from .passes.int4_linear import linear_args, weight_name


def encode_specs(**values: str) -> list[CompileSpec]:
    """Compile specs, each value in utf-8."""
    return [CompileSpec(key, value.encode()) for key, value in values.items()]


def decode_specs(specs: Sequence[CompileSpec]) -> dict[str, str]:
    """The inverse of :func:`encode_specs`."""
    return {spec.key: bytes(spec.value).decode() for spec in specs}


@final
class CudaInt4Backend(BackendDetails):
    """The ahead-of-time half of the delegate; ExecuTorch calls it for each partition."""

    @classmethod
    def copy_exported_program_for_preprocess(
        cls, edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> ExportedProgram:
        """A program of its own graph and signature on the same tensors.

        The passes replace constants and never write into one, so the weights need no copy: a deep
        copy of them would be the peak of the whole export.
        """
        graph_module = copy.deepcopy(edge_program.graph_module)
        return ExportedProgram(
            root=graph_module,
            graph=graph_module.graph,
            graph_signature=copy.deepcopy(edge_program.graph_signature),
            state_dict=dict(edge_program.state_dict),
            range_constraints=copy.deepcopy(edge_program.range_constraints),
            module_call_graph=copy.deepcopy(edge_program.module_call_graph),
            example_inputs=None,
            constants=dict(edge_program.constants),
            verifiers=[edge_program.verifier],
        )

    @staticmethod
    def preprocess(
        edge_program: ExportedProgram, compile_specs: list[CompileSpec]
    ) -> PreprocessResult:
        """Lower one partition.

        Raises:
            ValueError: a weight that cannot be honoured, a mutated buffer that starts non-zero, or
                a cache that cannot be int8 as it was asked for.
        """
        specs = decode_specs(compile_specs)
        check_constants(edge_program)
        program = run_passes(
            edge_program,
            specs.get("layout", "auto"),
            specs.get("activation", "none"),
            specs["fusions"].split(","),
            specs.get("kv_cache", "none"),
        )
        linears = _linears(program)
        nested = emit_nested_program(program)
        _check_ops(nested.ops, specs["devices"].split(","))
        program.state_dict.clear()  # the constants are bytes by now; nobody else has this program
        program.constants.clear()
        return PreprocessResult(
            processed_bytes=pack_blob(_blob(nested, linears)),
            debug_handle_map={},
            data_store_output=_named_data(
                nested, specs.get("external_weights") or None
            ).get_named_data_store_output(),
        )


def check_constants(program: ExportedProgram) -> None:
    """Check that a ``.pte`` can carry what the parameters and buffers hold.

    ExecuTorch drops the initial value of a mutated buffer: it must be the zeros that we use.

    Raises:
        ValueError: one has no data, or is a mutated buffer that holds other values.
    """
    constants = {**program.constants, **program.state_dict}
    for name, value in constants.items():
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise ValueError(
                f"{name}: expected a tensor with data, got {describe(value)} on the meta device; "
                "load the weights before export"
            )
    for name in program.graph_signature.buffers_to_mutate.values():
        value = constants.get(name)
        if value is not None and bool(torch.any(value != 0)):
            raise ValueError(
                f"{name}: expected a mutated buffer that starts as zeros, got other values, which "
                "a .pte does not carry; zero it before export, or write it in the graph"
            )


def _linears(program: ExportedProgram) -> list[tuple[LinearRecord, dict[str, str]]]:
    """The distinct int4 linears, each with the placeholder of each part that is a constant.

    A bias may be computed in the graph or handed in; it is then no part of the weight's record.
    """
    found: dict[tuple, tuple[LinearRecord, dict[str, str]]] = {}
    for node in calls(program, torch.ops.cuda_int4.linear.default):
        args = linear_args(node)
        parts = (*args.weight, args.bias)
        names = dict(zip(("qdata", "scale", "zero_point", "meta", "bias"), parts, strict=True))
        placeholders = {
            label: part.name
            for label, part in names.items()
            if part is not None and is_constant(program, part)
        }
        weight, tag, activation = weight_name(program, node), args.layout_tag, args.activation
        check_tag(tag, who=weight)
        N, K = node.meta["val"].shape[-1], args.x.meta["val"].shape[-1]
        record = LinearRecord(weight, tag, activation, int(N), int(K), args.group_size, -1, -1)
        found.setdefault((*placeholders.items(), activation), (record, placeholders))
    return list(found.values())


def _blob(
    nested: NestedProgram, linears: list[tuple[LinearRecord, dict[str, str]]]
) -> DelegateBlob:
    key_of = {constant.node: constant.key for constant in nested.constants}
    distinct = {constant.key: constant for constant in reversed(nested.constants)}
    constants = [distinct[key] for key in dict.fromkeys(key_of.values())]
    index_of = {constant.key: index for index, constant in enumerate(constants)}
    records = []
    for record, placeholders in linears:
        parts: dict[str, Any] = {
            label: index_of[key_of[node]] for label, node in placeholders.items()
        }
        records.append(replace(record, **parts))
    return DelegateBlob(
        constants=tuple(
            ConstantRecord(
                name=constant.name,
                key=constant.key,
                dtype=constant.dtype,
                sizes=constant.sizes,
                nbytes=len(constant.data),
                checksum=checksum(constant.data),
            )
            for constant in constants
        ),
        linears=tuple(records),
        ops=nested.ops,
        program=nested.data,
    )


def _named_data(nested: NestedProgram, external_tag: str | None) -> NamedDataStore:
    store = NamedDataStore()
    for constant in {constant.key: constant for constant in nested.constants}.values():
        store.add_named_data(
            constant.key,
            constant.data,
            alignment=CONSTANT_ALIGNMENT_BYTES,
            external_tag=external_tag,
        )
    return store


def _check_ops(ops: Sequence[str], devices: Sequence[str]) -> None:
    """What the emitter made of the graph must still be within the runtime's tables."""
    tables = [{nested_name(op) for op in supported_ops(device)} for device in devices]
    missing = sorted(op for op in ops if not all(op in table for table in tables))
    if missing:
        raise NotImplementedError(
            f"CudaInt4Backend: expected ops of the runtime's table, got {', '.join(missing)} from "
            "the emitter; the partitioner should have left them outside, please report the model"
        )
