"""Nested programs of another making: writes to constants, wider views, wrong arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from executorch.exir.scalar_type import ScalarType
from executorch.exir.schema import (
    Bool,
    EValue,
    FreeCall,
    Instruction,
    Int,
    KernelCall,
    MoveCall,
    Null,
    String,
    TensorList,
)
from torch import Tensor, nn

import cuda_int4
import delegate_models as models
import forged
from cuda_int4 import nested_program
from cuda_int4._native import CudaInt4Error, supported_ops
from cuda_int4.nested_program import _extract_constants
from delegate_models import K, make, rows


class Constant(models.Linear):
    """y = f(linear(x), c), c a dense constant [16, K]."""

    def __init__(self, f: Callable[..., Any], n_rows: int = 16):
        super().__init__(N=K)
        self.f = f
        self.register_buffer("c", torch.linspace(-1, 1, n_rows * K).view(n_rows, K))

    def forward(self, x: Tensor) -> Any:
        return self.f(self.proj(x), self.c)


@pytest.fixture
def forge(monkeypatch, tmp_path):
    """To the file of a model whose nested program an ``edit(plan)`` has been done to."""

    def export(
        model: nn.Module,
        edit: Callable[[Any], None],
        inputs: Any = None,
        shapes: Any = None,
        **options: Any,
    ) -> Any:
        def extract(emitted: Any, plan: Any, roles: Any) -> Any:
            constants = _extract_constants(emitted, plan, roles)
            edit(plan)
            return constants

        monkeypatch.setattr(nested_program, "_extract_constants", extract)
        path = tmp_path / "model.pte"
        return models.write(make(model), path, inputs or (rows(16),), shapes, **options)

    return export


def constant(plan: Any, of: str = "dense.v1") -> int:
    """The value that is a constant, by a part of its key."""
    for i, value in enumerate(plan.values):
        info = getattr(value.val, "extra_tensor_info", None)
        if info is not None and of in (info.fully_qualified_name or ""):
            return i
    raise LookupError(of)


def arguments(plan: Any, op: str) -> list[int]:
    """Of the last call of an op; to be changed in place."""
    calls = [
        instruction.instr_args.args
        for instruction in plan.chains[0].instructions
        if isinstance(instruction.instr_args, KernelCall)
        and plan.operators[instruction.instr_args.op_index].name.endswith(f"::{op}")
    ]
    return calls[-1]


def refusal(path: Any) -> str:
    with pytest.raises(CudaInt4Error) as raised:
        cuda_int4.load(path)
    assert raised.value.code == forged.INVALID_PROGRAM
    assert "no instruction that writes to a constant" in str(raised.value)
    return str(raised.value)


def test_in_place_on_a_weight(forge):
    def edit(plan):
        arguments(plan, "index_put_")[0] = constant(plan, "/qdata/")

    path = forge(models.Cache(), edit, (rows(3), torch.arange(3)))
    message = refusal(path)
    assert "cuda_int4::index_put_ on" in message and "/qdata/" in message


def test_a_cache_larger_than_the_machines_memory(forge):
    def edit(plan):
        plan.values[constant(plan, "seen")].val.sizes = [2**20, 2**20]

    path = forge(models.Cache(), edit, (rows(3), torch.arange(3)))
    with pytest.raises(CudaInt4Error, match=f"bytes of free memory .* {2**42} of caches"):
        cuda_int4.load(path, device="cpu")


@pytest.mark.parametrize("at", [-2, -1])
def test_an_output_that_is_a_constant(forge, at):
    def edit(plan):
        arguments(plan, "add")[at] = constant(plan)

    assert "cuda_int4::add on" in refusal(forge(Constant(torch.add), edit))


def test_an_output_of_an_op_of_ours(forge):
    def edit(plan):
        arguments(plan, "linear")[-2:] = [constant(plan)] * 2

    assert "cuda_int4::linear on" in refusal(forge(Constant(torch.add), edit))


def through_a_view(y: Tensor, c: Tensor) -> Tensor:
    return (y.view(-1, 16) * 2).view(-1, K) + c[0]


ANY_LENGTH = ({0: models.dim()},)  # views of fixed sizes are no instructions


def view_the_constant(plan: Any) -> int:
    """Let the first view be one of the constant; the value that it is."""
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if plan.operators[call.op_index].name == "executorch_prim::et_view":
            call.args[0] = constant(plan)
            return call.args[2]
    raise LookupError("et_view")


def test_an_output_that_views_a_constant(forge):
    def edit(plan):
        arguments(plan, "mul")[-2:] = [view_the_constant(plan)] * 2

    message = refusal(forge(Constant(through_a_view), edit, shapes=ANY_LENGTH))
    assert "cuda_int4::mul on a view of one" in message


def test_a_view_in_the_place_of_a_constant(forge):
    def edit(plan):
        arguments(plan, "et_view")[2] = constant(plan)

    message = refusal(forge(Constant(through_a_view), edit, shapes=ANY_LENGTH))
    assert "executorch_prim::et_view on" in message


def test_a_view_of_a_constant_that_is_only_read(forge):
    with cuda_int4.load(
        forge(Constant(through_a_view), view_the_constant, shapes=ANY_LENGTH)
    ) as model:
        c = Constant(through_a_view).c
        assert torch.equal(model.forward(rows(16))[0], c * 2 + c[0])


def test_a_list_of_outputs_with_a_constant(forge):
    def edit(plan):
        for value in plan.values:
            if isinstance(value.val, TensorList):
                value.val.items[1] = constant(plan)

    path = forge(Constant(lambda y, c: (y + c).split(32, 1)), edit)
    assert "cuda_int4::split_with_sizes_copy on" in refusal(path)


@pytest.mark.parametrize("call", [lambda x, c: MoveCall(x, c), lambda _, c: FreeCall(c)])
def test_moves_and_frees(forge, call):
    def edit(plan):
        instruction = Instruction(call(plan.inputs[0], constant(plan)))
        plan.chains[0].instructions.insert(0, instruction)

    assert "a move or free on" in refusal(forge(Constant(torch.add), edit))


def test_a_constant_moved_elsewhere(forge):
    def edit(plan):
        out = arguments(plan, "add")[-1]
        plan.chains[0].instructions.insert(0, Instruction(MoveCall(constant(plan), out)))

    assert "cuda_int4::add on a view of one" in refusal(forge(Constant(torch.add), edit))


def test_an_input_that_is_a_constant(forge):
    def edit(plan):
        plan.inputs[0] = constant(plan)

    assert "an input on" in refusal(forge(Constant(torch.add), edit))


def image(y: Tensor) -> Tensor:
    return y.view(1, 16, 8, 8)


def batch_norm(y: Tensor, c: Tensor) -> Tensor:
    mean, var = c[:, 0], c[:, 1].abs() + 1
    return nn.functional.batch_norm(image(y), mean, var)


# Ops that write several tensors: how many, and a graph that has the op.
SEVERAL: dict[str, tuple[int, Callable[..., Any]]] = {
    "_native_batch_norm_legit_no_training.out": (3, batch_norm),
    "max.dim_max": (2, lambda y, c: tuple((y + c).max(-1))),
    "max_pool2d_with_indices.out": (2, lambda y, c: nn.functional.max_pool2d(image(y + c), 2)),
    "min.dim_min": (2, lambda y, c: tuple((y + c).min(-1))),
    "native_group_norm.out": (3, lambda y, c: nn.functional.group_norm(image(y + c), 4)),
    "native_layer_norm.out": (3, lambda y, c: nn.functional.layer_norm(y + c, (K,))),
    "topk.values": (2, lambda y, c: tuple((y + c).topk(4))),
    "var_mean.correction_out": (2, lambda y, c: tuple((y + c).max(-1))),  # renamed
}


def test_what_is_known_of_ops_that_write_several_tensors():
    found = set()
    for op in supported_ops("cpu"):
        namespace, name = op.split("::")
        if namespace != "aten":
            continue
        packet, _, overload = name.partition(".")
        schema = getattr(getattr(torch.ops.aten, packet), overload or "default")._schema
        if sum(argument.is_out for argument in schema.arguments) > 1:
            found.add(name)
    assert found == set(SEVERAL)


@pytest.mark.parametrize("op", sorted(SEVERAL))
def test_each_of_several_outputs(forge, op):
    n, f = SEVERAL[op]
    name, overload = op.split(".")
    for i in range(n):

        def edit(plan, i=i):
            for operator in plan.operators:
                if name == "var_mean" and operator.name == "aten::max":
                    operator.name, operator.overload = "aten::var_mean", overload
            arguments(plan, name)[-1 - n + i] = constant(plan)

        assert f"cuda_int4::{name} on" in refusal(forge(Constant(f), edit))


@pytest.mark.parametrize("i", [0, 1])
def test_each_output_of_add_rms_norm(forge, i):
    def edit(plan):
        arguments(plan, "add_rms_norm")[-3 + i] = constant(plan)

    path = forge(Constant(lambda y, c: nn.functional.rms_norm(y + c, (K,))), edit)
    assert "cuda_int4::add_rms_norm on" in refusal(path)


class Turned(models.Linear):
    """Attention with caches; two query heads, one of keys and one of values, of 16."""

    def __init__(self) -> None:
        super().__init__(N=64)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(1, 1, 8, 16))
        self.register_buffer("cos", torch.linspace(-1, 1, 64).view(8, 8))
        self.register_buffer("sin", torch.linspace(1, 0, 64).view(8, 8))

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        heads = self.proj(x[None]).view(1, -1, 4, 16).transpose(1, 2)
        (a, b), cos, sin = heads[:, :3].chunk(2, -1), self.cos[pos], self.sin[pos]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
        k = self.k_cache.index_copy_(2, pos, turned[:, 2:])
        v = self.v_cache.index_copy_(2, pos, heads[:, 3:])
        return nn.functional.scaled_dot_product_attention(turned[:, :2], k, v, enable_gqa=True)


@pytest.mark.parametrize("at", [0, 1, -2, -1])
def test_what_rope_append_writes(forge, at):
    def edit(plan):
        arguments(plan, "rope_append")[at] = constant(plan)

    path = forge(Turned(), edit, (rows(3), torch.arange(3)))
    assert "cuda_int4::rope_append on" in refusal(path)


def test_a_view_of_a_wider_dtype(forge):
    """Its end would lie behind the tensor's."""

    def edit(plan):
        view = arguments(plan, "et_view")[2]
        plan.values[view].val.scalar_type = ScalarType.DOUBLE

    with cuda_int4.load(forge(Constant(through_a_view), edit, shapes=ANY_LENGTH)) as model:
        with pytest.raises(CudaInt4Error, match="a view of the tensor's dtype") as raised:
            model.forward(rows(16))
    assert raised.value.code == forged.INVALID_PROGRAM


def kind_refusal(path: Any) -> str:
    with pytest.raises(CudaInt4Error) as raised:
        cuda_int4.load(path)
    assert raised.value.code == forged.INVALID_PROGRAM
    assert "expected tensors in the place of tensors" in str(raised.value)
    return str(raised.value)


def of_sizes(y: Tensor, c: Tensor) -> Tensor:
    """Takes a size, and a quotient of it."""
    return y.sum() + c.sum() + torch.arange((y.shape[0] + 3) // 2, dtype=y.dtype).sum()


@pytest.mark.parametrize("op", ["sym_size", "floordiv"])
def test_a_number_in_the_place_of_a_tensor(forge, op):
    def edit(plan):
        arguments(plan, op)[-1] = plan.inputs[0]

    assert f"::{op}" in kind_refusal(forge(Constant(of_sizes), edit, shapes=ANY_LENGTH))


def test_a_number_moved_to_a_tensor(forge):
    def edit(plan):
        number = arguments(plan, "sym_size")[-1]
        plan.chains[0].instructions.append(Instruction(MoveCall(number, plan.outputs[0])))

    assert "a move" in kind_refusal(forge(Constant(of_sizes), edit, shapes=ANY_LENGTH))


@pytest.mark.parametrize(
    ("op", "argument", "by", "words"),
    [
        ("sym_size", 0, Int(3), "aten::sym_size.int: expected a tensor"),
        ("sym_size", 1, Int(7), "a dimension that it has"),
        ("sym_size", 1, Int(-3), "a dimension that it has"),
        ("floordiv", 1, Int(0), "expected a divisor other than 0"),
        ("et_view", 0, Int(1), "executorch_prim::et_view.default: expected a tensor"),
        ("et_view", 1, Int(1), "executorch_prim::et_view.default: expected a tensor"),
    ],
)
def test_arguments_that_an_op_of_executorch_takes_for_granted(forge, op, argument, by, words):
    def edit(plan):
        plan.values.append(EValue(by))
        arguments(plan, op)[argument] = len(plan.values) - 1

    model = Constant(through_a_view) if op == "et_view" else Constant(of_sizes)
    with cuda_int4.load(forge(model, edit, shapes=ANY_LENGTH)) as loaded:
        with pytest.raises(CudaInt4Error, match=words):
            loaded.forward(rows(16))


def test_an_item_in_the_place_of_a_tensor(forge):
    def edit(plan):
        for operator in plan.operators:
            if operator.name == "aten::mul":
                operator.name, operator.overload = "aten::_local_scalar_dense", ""
        call = arguments(plan, "_local_scalar_dense")
        call[:] = [call[0], call[-1]]

    path = forge(Constant(lambda y, c: y * c), edit, devices=("cpu",))
    assert "::_local_scalar_dense" in kind_refusal(path)


def add(y: Tensor, c: Tensor) -> Tensor:
    return y + c


@pytest.mark.parametrize("by", [Null(), Int(-1), Int(0)], ids=["None", "negative", "another shape"])
def test_a_copy_to_what_is_no_row(forge, by):
    def edit(plan):
        for operator in plan.operators:
            if operator.name == "aten::add":
                operator.name, operator.overload = "executorch_prim::et_copy_index", "tensor"
        plan.values.append(EValue(by))
        call = arguments(plan, "et_copy_index")
        call[:] = [call[-1], call[0], len(plan.values) - 1]

    with cuda_int4.load(forge(Constant(add), edit, devices=("cpu",)), device="cpu") as model:
        with pytest.raises(
            CudaInt4Error, match="et_copy_index.tensor: expected a tensor, one like"
        ):
            model.forward(rows(16))


def add_row(y: Tensor, _: Tensor) -> Tensor:
    return y + y.sum(0)


@pytest.mark.parametrize("row", [15, 16, 2**31 - 1, 2**62])
def test_a_copy_to_a_row_that_memory_is_planned_for_or_not(forge, row):
    def edit(plan):
        for operator in plan.operators:
            if operator.name == "aten::add":
                operator.name, operator.overload = "executorch_prim::et_copy_index", "tensor"
        plan.values.append(EValue(Int(row)))
        call = arguments(plan, "et_copy_index")
        call[:] = [call[-1], call[1], len(plan.values) - 1]

    x = rows(16)
    with cuda_int4.load(forge(Constant(add_row), edit, devices=("cpu",)), device="cpu") as model:
        if row < 16:
            plain = Constant(add_row)
            assert model.forward(x)[0].shape == plain(x).shape
            return
        with pytest.raises(CudaInt4Error, match=f"row that memory is planned for, got {row}; the"):
            model.forward(x)


def cat(y: Tensor, c: Tensor) -> Tensor:
    return torch.cat([y, c])


def layer_norm(y: Tensor, c: Tensor) -> Tensor:
    return nn.functional.layer_norm(y + c, (K,))


# One argument of each type in ExecuTorch's kernels, and another type in its place.
OTHER_TYPES: dict[str, tuple[Callable[..., Any], str, int, Any]] = {
    "add.out: expected a tensor as argument 1": (add, "add", 1, Int(3)),
    "add.out: expected a tensor as argument 0": (add, "add", 0, Null()),
    "add.out: expected a number as argument 2": (add, "add", 2, String("1")),
    "amax.out: expected a list of ints as argument 1": (
        lambda y, c: (y + c).amax(-1),
        "amax",
        1,
        Int(1),
    ),
    "amax.out: expected a bool as argument 2": (
        lambda y, c: (y + c).amax(-1),
        "amax",
        2,
        Int(1),
    ),
    "cat.out: expected a list of tensors as argument 0": (cat, "cat", 0, Int(3)),
    "cat.out: expected an int as argument 1": (cat, "cat", 1, Bool(True)),
    "gelu.out: expected a string as argument 1": (
        lambda y, c: nn.functional.gelu(y + c),
        "gelu",
        1,
        Int(0),
    ),
    "index.Tensor_out: expected a list of tensors or None as argument 1": (
        lambda y, c: y[torch.tensor([0, 2])] + c[:2],
        "index",
        1,
        Int(0),
    ),
    "native_layer_norm.out: expected a float as argument 4": (
        layer_norm,
        "native_layer_norm",
        4,
        Int(1),
    ),
}


@pytest.mark.parametrize("words", sorted(OTHER_TYPES))
def test_arguments_of_other_types_than_the_schema(forge, words):
    f, op, argument, by = OTHER_TYPES[words]

    def edit(plan):
        plan.values.append(EValue(by))
        arguments(plan, op)[argument] = len(plan.values) - 1

    with cuda_int4.load(forge(Constant(f), edit), device="cpu") as model:
        with pytest.raises(CudaInt4Error, match=re.escape(words)) as raised:
            model.forward(rows(16))
    assert raised.value.code == forged.INVALID_PROGRAM


def test_fewer_arguments_than_the_schema(forge):
    def edit(plan):
        call = arguments(plan, "add")
        call[:] = [call[-1], call[-1]]

    with cuda_int4.load(forge(Constant(add), edit), device="cpu") as model:
        with pytest.raises(CudaInt4Error, match="a number as argument 2, found none"):
            model.forward(rows(16))


def test_the_types_that_are_looked_for_are_those_of_the_schemas():
    """What the runtime has of each schema, against torch's."""
    letters = {
        "Tensor": "T",
        "number": "N",
        "int": "I",
        "bool": "B",
        "float": "F",
        "str": "S",
        "List[int]": "L",
        "List[float]": "D",
        "List[Tensor]": "V",
        "List[Optional[Tensor]]": "W",
    }
    source = Path(__file__).parents[1] / "backend" / "runtime" / "forwarded_ops.cpp"
    found = dict(re.findall(r'{"(\w+\.?\w*)", "(\w+)"}', source.read_text()))
    expected = {}
    for op in supported_ops("cpu"):
        namespace, name = op.split("::")
        packet, _, overload = name.partition(".")
        if name not in found or namespace not in ("aten", "dim_order_ops"):
            continue
        schema = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
        expected[name] = ""
        for argument in schema._schema.arguments:
            optional = re.fullmatch(r"Optional\[(.*)\]", str(argument.type))
            letter = letters[optional[1] if optional else str(argument.type)]
            expected[name] += letter.lower() if optional else letter
        if not any(argument.is_out for argument in schema._schema.arguments):
            expected[name] += "_"
    assert len(expected) > 150
    assert found == expected
