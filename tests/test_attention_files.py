"""cuda_int4::attention in files: those from before it had a soft cap, or positions, still run."""

from unittest import mock

import pytest
import torch

import cuda_int4
from cuda_int4 import nested_program
from language_models import export_toy_llama, toy_llama

N_ARGUMENTS = {"before the soft cap": 7, "before positions": 8}  # of the schema, out included


def as_it_was(plan):
    """Operator names as ever, and each call of attention with as few arguments as `n_kept`."""
    ops = rename_ops(plan)
    attention = ops.index("cuda_int4::attention.out")
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if getattr(call, "op_index", None) == attention:
            n_arguments.append(len(call.args))
            (n,) = n_kept
            call.args[:] = [*call.args[: n - 1], *call.args[-2:]]  # out, and out again
    return ops


rename_ops = nested_program._rename_ops
n_arguments: list[int] = []
n_kept: list[int] = []


@pytest.mark.parametrize("age", [None, *N_ARGUMENTS])
def test_old_files_run(tmp_path, age):
    n_arguments.clear()
    n_kept[:] = [N_ARGUMENTS[age]] if age else []
    edit = as_it_was if age else rename_ops
    with mock.patch.object(nested_program, "_rename_ops", edit):
        path = tmp_path / "toy.pte"
        export_toy_llama(path, fusions="none")
    assert n_arguments == ([14, 14] if age else [])  # the schema's 13, and out again
    tokens, positions = torch.tensor([[1, 7, 3]]), torch.arange(3)
    (y,) = cuda_int4.load(path).forward(tokens, positions)
    torch.testing.assert_close(y, toy_llama()(tokens, positions), rtol=1e-4, atol=1e-4)
