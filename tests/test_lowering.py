"""export and save: a model to a sealed .pte that runs like the model, in bounded memory."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import to_edge_transform_and_lower
from expecttest import assert_expected_inline
from torch import nn

import cases
import cuda_int4
import graphs
import language_models
from cuda_int4 import lowering
from cuda_int4.model import load
from cuda_int4.partitioner import CudaInt4Partitioner
from cuda_int4.seal import read_seal
from messages import folded, message

CASE = cases.Case(6, 64, 64, 32, "executorch", "fractional", torch.float32, torch.float32)


def assert_close(got: torch.Tensor, exact: torch.Tensor, rounds: float = 1.2):
    once = (exact.to(got.dtype).double() - exact).norm() / exact.norm()
    error = (got.double() - exact).norm() / exact.norm()
    assert error <= max(rounds * once, 1e-5), (float(error), float(once))


# ---- what a user writes ----


def sources():
    """Every kind of int4 weight, with what it means in float64; x has its dtype."""
    native = cases.Case(6, 13, 96, 32, "native", "fractional")
    half = cases.Case(6, 13, 256, 256, "executorch", "integer", torch.float16, torch.float16)
    row = cases.Case(6, 7, 160, 160, "executorch", "symmetric", torch.bfloat16, torch.float32)
    pre_scaled = native.source(0)
    pre_scaled.act_pre_scale = torch.tensor([0.5], dtype=torch.bfloat16)  # exact in x
    gguf = graphs.gguf(5, 512)
    from cuda_int4.int4 import read_int4

    return {
        "Int4Tensor native": (native.source(0), cases.definition(native.source(0)), torch.bfloat16),
        "act_pre_scale": (pre_scaled, cases.definition(native.source(0)) / 2, torch.bfloat16),
        "Int4Tensor executorch": (half.source(0), cases.definition(half.source(0)), torch.float16),
        "ExportableInt4Tensor": (
            graphs.exportable(row), cases.definition(row.source(0)), torch.bfloat16,
        ),
        "GGUF": (gguf, read_int4(gguf).dequantize(torch.float64), torch.float32),
        "our own": (graphs.packed(row), cases.definition(row.source(0)), torch.float32),
    }  # fmt: skip


@pytest.mark.parametrize("kind", sources())
@pytest.mark.parametrize("keyword", [True, False])
def test_every_kind_of_weight_runs_as_it_means(kind, keyword, tmp_path):
    weight, w, dtype = sources()[kind]
    x = torch.randn(2, 3, w.shape[1]).to(dtype)
    bias = torch.linspace(-1, 1, w.shape[0]).to(dtype)
    model = graphs.Linear(weight, bias, keyword)
    path = cuda_int4.export(model, (x,), tmp_path / "model.pte")
    (y,) = load(path).forward(x)
    assert y.dtype == dtype
    assert_close(y, F.linear(x.double(), w, bias.double()))


def reference(model: nn.Module, steps) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(*step) for step in steps]


def exact_llama() -> nn.Module:
    """The toy Llama in float64, on the dense values of its int4 weights."""
    model = language_models.toy_llama()
    for module in model.modules():
        if isinstance(weight := getattr(module, "weight", None), cuda_int4.CudaCoalescedInt4Tensor):
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return model.double()


STEPS = [
    (torch.tensor([[3, 1, 4, 1, 5]]), torch.arange(5)),
    (torch.tensor([[9]]), torch.tensor([5])),
    (torch.tensor([[2, 6]]), torch.tensor([6, 7])),
]


@pytest.mark.parametrize(
    ("dtype", "external"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)]
)
def test_a_transformer_runs_like_eager(dtype, external, tmp_path):
    model = language_models.toy_llama().to(dtype)
    inputs, shapes = language_models.example(16)
    path = tmp_path / "llama.pte"
    returned = cuda_int4.export(
        model,
        inputs,
        path,
        dynamic_shapes=shapes,
        constant_methods={"get_max_seq_len": 16, "get_eos_ids": [2, 3]},
        external_weights=external,
    )
    assert returned == path
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == (["llama.ptd", "llama.pte"] if external else ["llama.pte"])
    assert all(read_seal(tmp_path / file) == "valid" for file in files)
    loaded = load(path, tmp_path / "llama.ptd" if external else None)
    assert [int(v) for v in loaded.run("get_eos_ids")] == [2, 3]
    exact = reference(exact_llama(), STEPS)
    eager = reference(model, STEPS)
    for step, logits, plain in zip(STEPS, exact, eager, strict=True):
        (got,) = loaded.forward(*step)
        error, plain_error = ((y.double() - logits).norm() for y in (got, plain))
        assert error <= 2 * plain_error + 1e-5 * logits.norm()


def test_the_standard_calls_and_export_write_the_same_bytes(tmp_path):
    model = nn.Sequential(graphs.Linear(graphs.packed(CASE)), nn.RMSNorm(64), nn.SiLU()).eval()
    model.requires_grad_(False)  # a program says of each tensor whether it does
    inputs, shapes = (torch.randn(4, 64),), ({0: torch.export.Dim("M", min=1, max=8)},)
    one = cuda_int4.export(model, inputs, tmp_path / "one.pte", dynamic_shapes=shapes)
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    edge = to_edge_transform_and_lower(program, partitioner=[CudaInt4Partitioner()])
    manager = edge.to_executorch()
    two = cuda_int4.save(manager, tmp_path / "two.pte")
    assert one.read_bytes() == two.read_bytes()
    assert two.read_bytes()[:-32] == manager.buffer


def test_a_shared_weight_is_stored_once(tmp_path):
    shared = nn.Sequential(*(graphs.Linear(torch.empty(0)) for _ in range(3)))
    for layer in shared:
        layer.weight = nn.Parameter(graphs.exportable(CASE), requires_grad=False)
    shared[1].weight = shared[0].weight  # one parameter; shared[2] has equal bytes of its own
    path = cuda_int4.export(shared, (torch.randn(2, 64),), tmp_path / "shared.pte")
    summary = cuda_int4.inspect(path)
    assert summary["ops"] == {"cuda_int4::linear.out": 3}
    assert len(summary["constants"]) == 3  # qdata, scale, zero_point
    assert len({tuple(weight["keys"].values()) for weight in summary["weights"]}) == 1


def test_keys_depend_on_contents_alone(tmp_path):
    def keys(model, name):
        path = cuda_int4.export(model, (torch.randn(2, 64),), tmp_path / name)
        return {entry["key"] for entry in cuda_int4.inspect(path)["constants"]}

    here = keys(graphs.Linear(graphs.packed(CASE)), "a.pte")
    inside = nn.Sequential(graphs.Linear(graphs.packed(CASE)))
    assert keys(inside, "b.pte") == here
    assert not keys(graphs.Linear(graphs.packed(CASE, seed=1)), "c.pte") & here
    assert all(key.startswith("cuda_int4/coalesced.v1/") for key in here)


def test_a_training_model_is_exported_in_eval_mode_and_left_in_training(tmp_path):
    model = nn.Sequential(graphs.Linear(graphs.packed(CASE)), nn.Dropout(0.9)).train()
    x = torch.randn(2, 64)
    path = cuda_int4.export(model, (x,), tmp_path / "model.pte")
    assert model.training
    torch.testing.assert_close(load(path).forward(x)[0], model.eval()(x))


def test_parts_of_a_training_model_that_stand_in_eval_mode_stay_so(tmp_path):
    model = nn.Sequential(graphs.Linear(graphs.packed(CASE)), nn.Dropout(0.9)).train()
    model[1].eval()
    cuda_int4.export(model, (torch.randn(2, 64),), tmp_path / "model.pte")
    assert [module.training for module in model] == [True, False]


# ---- writing ----


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    model, x = graphs.Linear(graphs.packed(CASE)), torch.randn(2, 64)
    path = cuda_int4.export(model, (x,), tmp_path / "model.pte", external_weights=True)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(path):
        raise OSError("no space left on device")

    monkeypatch.setattr(lowering, "seal_file", full_disk)
    other = graphs.Linear(graphs.packed(CASE, seed=1))
    with pytest.raises(OSError, match="no space left"):
        cuda_int4.export(other, (x,), path, external_weights=True)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    path = cuda_int4.export(
        graphs.Linear(graphs.packed(CASE)), (torch.randn(2, 64),), tmp_path / "m.pte"
    )
    (tmp_path / "plain").touch()
    assert os.stat(path).st_mode == os.stat(tmp_path / "plain").st_mode


def test_messages(tmp_path):
    model, x = graphs.Linear(graphs.packed(CASE)), torch.randn(2, 64)
    program = graphs.export(model, x)
    folder = tmp_path / "folder.pte"
    folder.mkdir()
    messages = (
        message(cuda_int4.export, model, (x,), tmp_path / "model.bin"),
        message(cuda_int4.export, model, (x,), tmp_path / "none" / "model.pte"),
        message(cuda_int4.export, model, (x,), folder),
        message(cuda_int4.export, program, (x,), tmp_path / "model.pte"),
        message(cuda_int4.export, model, (x,), tmp_path / "model.pte", layout="zigzag"),
    )
    assert_expected_inline(
        folded(*(m.replace(str(tmp_path), "folder") for m in messages)),
        """\
export: expected a path that ends in .pte, got folder/model.bin; name it so
export: expected a folder folder/none, got none; make it first
export: expected the name of a file, got the folder folder/folder.pte; add a name
export: expected an nn.Module, got ExportedProgram; lower an ExportedProgram with
    to_edge_transform_and_lower(program, partitioner=[CudaInt4Partitioner()]), and write it with
    cuda_int4.save
layout: expected 'auto' or one of 'coalesced', 'marlin', 'marlin24', got 'zigzag'; 'auto' picks
    for each weight""",
    )
    assert list(tmp_path.iterdir()) == [folder] and not list(folder.iterdir())


def test_a_model_without_int4_weights_is_written_with_a_warning(tmp_path, caplog):
    model, x = nn.Linear(64, 8).eval(), torch.randn(2, 64)
    path = cuda_int4.export(model, (x,), tmp_path / "float.pte")
    (record,) = [r for r in caplog.records if r.name == "cuda_int4.lowering"]
    assert record.getMessage() == (
        "export: expected a model with int4 weights, Linear has none and is written as it is; "
        "call cuda_int4.quantize_ on it first"
    )
    torch.testing.assert_close(load(path).forward(x)[0], model(x))


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    text = message(cuda_int4.export, nn.Identity(), (), tmp_path / "model.pte")
    assert text == (
        f"export: expected a folder that can be written, got {tmp_path}; choose another"
    )


class Counter(nn.Module):
    """A mutated buffer that starts as ones, with an op outside of the delegate between."""

    def __init__(self):
        super().__init__()
        self.linear = graphs.Linear(graphs.packed(CASE))
        self.register_buffer("count", torch.ones(1))

    def forward(self, x):
        """Distances times the count."""
        self.count.add_(1)
        return F.pdist(self.linear(x)) * self.count


def test_constants_that_a_file_cannot_carry_are_refused(tmp_path):
    x, path = torch.randn(2, 64), tmp_path / "model.pte"
    empty = nn.Sequential(graphs.Linear(graphs.packed(CASE)), nn.RMSNorm(64)).to("meta")
    assert_expected_inline(
        folded(
            message(cuda_int4.export, Counter(), (x,), path),
            message(cuda_int4.export, empty, (x.to("meta"),), path),
            message(cuda_int4.export, nn.RMSNorm(64).to("meta"), (x.to("meta"),), path),
        ),
        """\
count: expected a mutated buffer that starts as zeros, got other values, which a .pte does not
    carry; zero it before export, or write it in the graph
0.weight: expected a tensor with data, got float32 [64, 64] on the meta device; load the weights
    before export
weight: expected a tensor with data, got float32 [64] on the meta device; load the weights
    before export""",
    )


# ---- memory ----

# ExportableInt4Tensor is the dearest kind: scales and zero points are copied into their new order.
_MEMORY = """
    import resource, sys
    import torch
    from executorch.exir import to_edge_transform_and_lower
    from executorch.extension.llm.export.int4 import ExportableInt4Tensor
    from torch import nn
    import cuda_int4

    def peak_bytes():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def linear(N, K, seed):
        torch.manual_seed(seed)
        layer = nn.Linear(1, 1, bias=False)
        qdata, scale = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8), torch.rand(K // 32, N)
        weight = ExportableInt4Tensor(qdata, scale, scale + 3, 32, torch.float32)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    class Wide(nn.Module):
        def __init__(self, sizes):
            super().__init__()
            self.layers = nn.ModuleList(linear(N, 2048, seed) for seed, N in enumerate(sizes))

        def forward(self, x):
            # None reads what another does: the sixteen would be one constant.
            return [layer(x + i) for i, layer in enumerate(self.layers)]

    def export(model, path):  # the standard calls: cuda_int4.export would pack the model first
        program = torch.export.export(model, (torch.randn(1, 2048),))
        partitioner = cuda_int4.CudaInt4Partitioner()
        edge = to_edge_transform_and_lower(program, partitioner=[partitioner])
        del program
        cuda_int4.save(edge.to_executorch(), path)

    export(Wide([64]), sys.argv[1])  # imports and caches are not what is measured
    model = Wide([4096 + 8 * i for i in range(16)])
    before = peak_bytes()
    export(model, sys.argv[1])
    used = peak_bytes() - before
    weights = sum(weight["nbytes"] for weight in cuda_int4.inspect(sys.argv[1])["weights"])
    print(used / weights, weights)
"""


def test_peak_memory_of_an_export(tmp_path):
    script, path = textwrap.dedent(_MEMORY), tmp_path / "model.pte"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2"},
        cwd=Path(__file__).parent,
    )
    times, weights = map(float, done.stdout.split())
    assert weights > 90e6
    assert times <= 2.2, f"{times:.2f} times the packed weights above the model"
