"""Models of every form of an int4 linear, their edge programs, a graph as text and as numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge
from executorch.exir.program._program import _generate_edge_program
from executorch.extension.llm.export.gguf import ExportableGGUFTensor
from executorch.extension.llm.export.int4 import ExportableInt4Tensor
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Interpreter, Node

import cases
from cuda_int4.passes.graph import constant_tensor, input_spec, is_constant, op_of
from cuda_int4.tensors import CudaCoalescedInt4Tensor
from messages import folded

# Kept whole by the partitioner; a program without them is what to_edge alone gives.
WHOLE = (
    torch.ops.aten.linear.default,
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.rms_norm.default,
    torch.ops.aten.silu.default,
)


class Linear(nn.Module):
    """F.linear on a given weight, with the bias as a keyword, in the middle of other ops."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, keyword: bool = True):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        """The linear."""
        if self.keyword:
            return F.linear(x, self.weight, bias=self.bias)
        return F.linear(x, self.weight, self.bias)


def exportable(case: cases.Case, seed: int = 0) -> ExportableInt4Tensor:
    """The case's weight (in executorch's convention) as an ExportableInt4Tensor."""
    assert case.convention == "executorch"
    return ExportableInt4Tensor.from_int4_tensor(case.source(seed))


def packed(case: cases.Case, seed: int = 0, activation: str = "none") -> CudaCoalescedInt4Tensor:
    """The case's weight as our own tensor."""
    return CudaCoalescedInt4Tensor.from_int4(case.source(seed), activation)


def gguf(N: int, K: int, ggml_type: str = "q4_k", seed: int = 0) -> ExportableGGUFTensor:
    """Random GGUF blocks with finite scales."""
    n_bytes = {"q4_k": 144, "q6_k": 210}[ggml_type]
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (N * K // 256, n_bytes), dtype=torch.uint8, generator=generator)
    if ggml_type == "q4_k":
        raw[:, :4] = torch.tensor([2e-3, 1e-2], dtype=torch.float16).view(torch.uint8)
    return ExportableGGUFTensor(raw.view(N, -1), ggml_type, torch.float32)


def export(model: nn.Module, *inputs: Tensor, dynamic_shapes: Any = None) -> ExportedProgram:
    """torch.export, in eval mode."""
    return torch.export.export(model.eval(), inputs, dynamic_shapes=dynamic_shapes)


def edge(
    model: nn.Module, *inputs: Tensor, whole: bool = True, dynamic_shapes: Any = None
) -> ExportedProgram:
    """The edge program; ``whole`` keeps linears and the composite ops, as our partitioner does."""
    program = export(model, *inputs, dynamic_shapes=dynamic_shapes)
    if not whole:
        return to_edge(program).exported_program()
    table = torch.export.default_decompositions()
    for op in WHOLE:
        table.pop(op, None)
    program = program.run_decompositions(table)
    config = EdgeCompileConfig(_check_ir_validity=False)
    return _generate_edge_program(config, program, preserve_ops=list(WHOLE))


def text(program: ExportedProgram) -> str:
    """Constants and calls in order, with shapes; calls are numbered, lines folded."""
    names: dict[Node, str] = {}

    def show(arg: object) -> str:
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(map(show, arg))}]"
        return names[arg] if isinstance(arg, Node) else str(arg).removeprefix("torch.")

    def kind(value: object) -> str:
        if not isinstance(value, Tensor):
            return str(value)
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"

    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            constant = is_constant(program, node)
            target = input_spec(program, node).target if constant else node.name
            names[node] = target.replace("parametrizations.weight.original", "weight.")
            lines.append(f"{names[node]}: {kind(node.meta['val'])}{'' if constant else ', input'}")
        elif node.op == "call_function":
            names[node] = f"%{len(names)}"
            args = [show(arg) for arg in node.args]
            args += [f"{name}={show(arg)}" for name, arg in node.kwargs.items()]
            target = op_of(node)
            op = str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__
            call = f"{op.removesuffix('.default')}({', '.join(args)})"
            lines.append(f"{names[node]} = {call}: {kind(node.meta['val'])}")
        else:
            lines.append(f"return {show(node.args[0])}")
    return folded(*lines)


def run(program: ExportedProgram, *inputs: Tensor) -> list[Tensor]:
    """Run the graph as it stands, op by op, and return the user's outputs."""
    arguments = list(inputs)
    values = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = input_spec(program, node)
            is_input = spec is None or spec.target is None
            values.append(arguments.pop(0) if is_input else constant_tensor(program, node))
    outputs = Interpreter(program.graph_module).run(*values)
    specs = program.graph_signature.output_specs
    return [
        output
        for output, spec in zip(outputs, specs, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT
    ]
