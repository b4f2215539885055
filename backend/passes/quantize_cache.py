"""Keep the key-value caches in int8."""

from __future__ import annotations

import re

import torch
from executorch.exir.pass_base import ExportedProgramPassBase, ExportedProgramPassResult
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Node

from .graph import args_of, calls, fake_mode_of, input_spec

KV_CACHES = ("none", "int8")  # "none": in the dtype that the model gives them
_ATTENTION = torch.ops.cuda_int4.attention.default
_ROPE_APPEND = torch.ops.cuda_int4.rope_append.default
_K_SCALE, _V_SCALE = 10, 11  # among the arguments of attention


class QuantizeCachePass(ExportedProgramPassBase):
    """Write keys and values as int8 codes, each head of a token with a scale of its own.

    Before: q = cuda_int4.rope_append(k_cache, v_cache, ...)          caches [B, Hkv, T, D] of bf16
            y = cuda_int4.attention(q, k_cache, v_cache, None, ..., None, None)
    After:  q = cuda_int4.rope_append(k_cache, v_cache, ..., k_scale, v_scale)          of int8
            y = cuda_int4.attention(q, k_cache, v_cache, None, ..., k_scale, v_scale)

    k_scale and v_scale are new buffers [B, Hkv, T] of float32, zeros at first as the caches are.
    One scale a token and head: a token's codes never change when later ones arrive, and a scale is
    a factor of a whole score or of a whole probability, outside of the products of attention.

    Runs only where it is asked for, and then nothing is left alone in silence.

    Raises:
        ValueError: a cache that attention reads is not written by rope_append alone, or none is.
    """

    def call(self, exported_program: ExportedProgram) -> ExportedProgramPassResult:
        """Run the pass."""
        program = exported_program
        mutated = set(program.graph_signature.buffers_to_mutate.values())
        writers = {}
        for writer in calls(program, _ROPE_APPEND):
            for cache in writer.args[:2]:
                writers[cache] = writer
        modified = False
        for attention in calls(program, _ATTENTION):
            args = args_of(attention)
            keys, values = args[1:3]
            sources = [_buffer_of(program, node, mutated) for node in (keys, values)]
            if sources == [None, None]:
                continue  # it reads no cache
            for node, source in zip((keys, values), sources, strict=True):
                if node not in writers or set(node.users) - {attention, writers[node]} - _outputs(
                    program
                ):
                    raise ValueError(
                        "QuantizeCachePass: expected caches that rope_append writes and one "
                        f"attention reads, for kv_cache='int8', got {source or node.name} written "
                        "or read otherwise; export with the fusions 'linears' and 'rope_append', "
                        "or with kv_cache='none'"
                    )
            if keys.meta["val"].dtype == torch.int8:
                continue
            scales = [_quantize(program, node) for node in (keys, values)]
            writer = writers[keys]
            writer.args = (*args_of(writer)[:11], *scales)
            attention.args = (*args[:_K_SCALE], *scales)
            modified = True
        if not modified and not any(n.meta["val"].dtype == torch.int8 for n in writers):
            raise ValueError(
                "QuantizeCachePass: expected a model with key-value caches for kv_cache='int8', "
                "got none that rope_append writes; export with kv_cache='none'"
            )
        if modified:
            program.graph_module.recompile()
        return ExportedProgramPassResult(program, modified)


def _outputs(program: ExportedProgram) -> set[Node]:
    return {node for node in program.graph.nodes if node.op == "output"}


def _buffer_of(program: ExportedProgram, node: Node, mutated: set[str]) -> str | None:
    """The mutated buffer that ``node`` is, or is made of by writing to it; None: neither."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    spec = input_spec(program, node)
    return spec.target if spec is not None and spec.target in mutated else None


def _quantize(program: ExportedProgram, cache: Node) -> Node:
    """Make ``cache`` int8; returns the placeholder of its scales."""
    spec = input_spec(program, cache)
    assert spec is not None and spec.target is not None
    shape = list(cache.meta["val"].shape)
    fake_mode = fake_mode_of(program)
    codes, scales = torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[:-1])
    cache.meta["val"] = fake_mode.from_tensor(codes, static_shapes=True)
    target = f"{spec.target}_scale"
    for store in (program.state_dict, program.constants):
        if spec.target in store:
            store[spec.target], store[target] = codes, scales

    signature, graph = program.graph_signature, program.graph
    with graph.inserting_after(cache):
        node = graph.create_node("placeholder", "b_" + re.sub(r"\W", "_", target))
    node.target = node.name
    node.meta["val"] = fake_mode.from_tensor(scales, static_shapes=True)
    at = signature.input_specs.index(spec)
    argument = TensorArgument(node.name)
    new_input = InputSpec(InputKind.BUFFER, argument, target, persistent=spec.persistent)
    signature.input_specs.insert(at + 1, new_input)
    (output,) = _outputs(program)
    signature.output_specs.insert(
        0, OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(node.name), target)
    )
    output.args = ((node, *output.args[0]),)  # type: ignore[misc]
    return node
