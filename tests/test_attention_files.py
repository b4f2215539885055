"""cuda_int4::attention in files: those written before it had a soft cap still run."""

from unittest import mock

import pytest
import torch

import cuda_int4
from cuda_int4 import nested_program
from language_models import export_toy_llama, toy_llama

SOFTCAP = 6  # position among the arguments


def without_softcap(plan):
    """Operator names as ever, and each call of attention as it was before the soft cap."""
    ops = rename_ops(plan)
    attention = ops.index("cuda_int4::attention.out")
    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if getattr(call, "op_index", None) == attention:
            n_arguments.append(len(call.args))
            del call.args[SOFTCAP]
    return ops


rename_ops = nested_program._rename_ops
n_arguments: list[int] = []


@pytest.mark.parametrize("is_old", [False, True])
def test_a_file_from_before_the_soft_cap_runs(tmp_path, is_old):
    n_arguments.clear()
    edit = without_softcap if is_old else rename_ops
    with mock.patch.object(nested_program, "_rename_ops", edit):
        path = tmp_path / "toy.pte"
        export_toy_llama(path)
    assert n_arguments == ([9, 9] if is_old else [])  # the schema's 8, and out again
    tokens, positions = torch.tensor([[1, 7, 3]]), torch.arange(3)
    (y,) = cuda_int4.load(path).forward(tokens, positions)
    torch.testing.assert_close(y, toy_llama()(tokens, positions), rtol=1e-4, atol=1e-4)
