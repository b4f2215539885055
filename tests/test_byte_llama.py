"""The examples: the byte Llama (model, weights, export) and executorch's own Llama.

``BYTE_LLAMA_TOKENS=2000 pytest tests/test_byte_llama.py`` compares that many tokens; CI a few.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import cuda_int4
from cuda_int4.sparse24 import is_24

EXAMPLES = Path(__file__).parents[1] / "export_examples"
sys.path.insert(0, str(EXAMPLES / "byte_llama"))  # its scripts import each other by plain names

import corpus  # noqa: E402
import export as byte_llama  # noqa: E402
import model as model_module  # noqa: E402
from model import (  # noqa: E402
    WEIGHTS,
    WEIGHTS_24,
    ByteLlama,
    Config,
    as_tensor,
    bits_per_byte,
    load,
    save_24,
)

N_TOKENS = int(os.environ.get("BYTE_LLAMA_TOKENS", "160"))
CONTEXT = max(256, N_TOKENS)
TEXT = Path(model_module.__file__).read_bytes()  # real Python that is always at hand


def small_model(max_context: int) -> ByteLlama:
    torch.manual_seed(0)
    model = ByteLlama(Config(n_layers=2), max_context=max_context)
    model.init_weights()
    return model.eval()


def test_every_linear_fits_every_layout():
    shapes = [tuple(p.shape) for p in ByteLlama(Config()).parameters() if p.dim() == 2]
    assert all(n % 128 == 0 and k % 256 == 0 for n, k in shapes), shapes


@torch.no_grad()
def test_decoding_with_the_cache_equals_reading_at_once():
    model = small_model(max_context=64)
    tokens = torch.randint(256, (1, 48))
    at_once = model(tokens)
    cuts = [(0, 20), (20, 33), *((i, i + 1) for i in range(33, 48))]
    pieces = [model(tokens[:, a:b], torch.arange(a, b)) for a, b in cuts]
    assert torch.allclose(torch.cat(pieces, 1), at_once, atol=1e-5)


@torch.no_grad()
def test_reset_forgets():
    model = small_model(max_context=64)
    tokens, input_pos = torch.randint(256, (1, 8)), torch.arange(8)
    first = model(tokens, input_pos)
    model.reset()
    assert all(not b.any() for name, b in model.named_buffers() if name.endswith("_cache"))
    assert torch.equal(model(tokens, input_pos), first)


def test_the_split_depends_on_paths_alone(tmp_path):
    root = corpus.standard_library()
    some = sorted(p.relative_to(root).as_posix() for p in root.glob("*.py"))
    held_out = [path for path in some if corpus.is_held_out(path)]
    for path in [*held_out, "argparse.py", "badly.py", "nul.py"]:
        (tmp_path / path).write_text("x = 1\n" if path != "nul.py" else "\0")
    assert list(corpus.documents(tmp_path, held_out=True)) == held_out
    assert list(corpus.documents(tmp_path, held_out=False)) == ["argparse.py"]


def test_no_sources_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="found none; pass a Python's Lib"):
        corpus.documents(tmp_path, held_out=True)


def test_weights_are_small_bfloat16_and_complete():
    assert WEIGHTS.stat().st_size <= 12_000_000
    model = load(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    report = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert report["n_parameters"] == sum(p.numel() for p in model.parameters())


def test_held_out_source_is_predicted():
    texts = corpus.documents(corpus.standard_library(), held_out=True)
    modules = {path: text for path, text in texts.items() if "test" not in path}
    data = as_tensor(corpus.stream(modules))
    bits = bits_per_byte(load(dtype=torch.bfloat16), data, 2048, batch=1, n_windows=4)
    assert bits < 1.2, f"expected at most 1.2 bits per byte, got {bits:.3f}"


def test_program_agrees_with_eager(tmp_path):
    model, path = byte_llama.build(tmp_path / "byte_llama.pte", max_context=CONTEXT)
    program = cuda_int4.load(path, device="cpu")
    found = byte_llama.agreement(model, program.forward, TEXT[: N_TOKENS - 1])
    assert found.n_tokens == N_TOKENS
    # Rounding activations to bfloat16 alone moves a logit by up to 0.19, some 6 steps at that size.
    assert found.widest_margin_steps <= 4, found
    assert found.greatest_difference <= 0.4, found


def test_program_agrees_with_eager_in_w4a8(tmp_path):
    model, path = byte_llama.build(
        tmp_path / "byte_llama.pte", method="min_max", activation="int8", max_context=CONTEXT
    )
    program = cuda_int4.load(path, device="cpu")
    found = byte_llama.agreement(model, program.forward, TEXT[: N_TOKENS - 1])
    # One bfloat16 step can push an activation over the middle between two int8 values.
    assert found.n_equal >= 0.95 * N_TOKENS, found
    assert found.greatest_difference <= 0.8, found


def test_program_agrees_with_eager_in_float32(tmp_path):
    model, path = byte_llama.build(
        tmp_path / "byte_llama.pte",
        method="min_max",
        dtype=torch.float32,
        symmetric=False,
        max_context=CONTEXT,
    )
    program = cuda_int4.load(path, device="cpu")
    found = byte_llama.agreement(model, program.forward, TEXT[: N_TOKENS - 1])
    assert found.greatest_difference <= 1e-4 * found.greatest_logit, found
    assert found.n_equal == found.n_tokens, found


def linears(model: ByteLlama) -> dict[str, torch.Tensor]:
    named = model.named_modules()
    return {name: m.weight for name, m in named if isinstance(m, torch.nn.Linear)}


def test_the_2_4_model_predicts_nearly_as_well_as_the_dense_one():
    dense, sparse = load(dtype=torch.bfloat16), load(WEIGHTS_24, dtype=torch.bfloat16)
    assert all(is_24(weight) for weight in linears(sparse).values())
    assert not any(is_24(weight) for weight in linears(dense).values())
    data = as_tensor(corpus.stream({"model.py": TEXT}))
    bits = [bits_per_byte(model, data, 1024, batch=1) for model in (dense, sparse)]
    assert bits[1] < 1.15 * bits[0], bits


def test_auto_exports_the_2_4_model_as_marlin24(tmp_path):
    model, path = byte_llama.build(tmp_path / "24.pte", weights=WEIGHTS_24, max_context=CONTEXT)
    weights = cuda_int4.inspect(path)["weights"]
    assert {weight["layout_tag"] for weight in weights} == {"marlin24.v1"}
    program = cuda_int4.load(path, device="cpu")
    found = byte_llama.agreement(model, program.forward, TEXT[: N_TOKENS - 1])
    assert found.n_equal >= 0.97 * found.n_tokens and found.widest_margin_steps <= 8, found


def test_2_4_weights_come_back_from_a_file_bit_for_bit(tmp_path):
    model = small_model(max_context=0).cast(torch.bfloat16)
    with pytest.raises(ValueError, match="expected at most 2 of 4 that are not 0, got more"):
        save_24(model, {}, tmp_path / "dense.safetensors")
    cuda_int4.prune_24_(model)
    model.output.weight.data[0, :8] = 0  # fewer than two of four
    save_24(model, {}, tmp_path / "24.safetensors")
    read = load(tmp_path / "24.safetensors", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("activation", ["none", "int8"])
@pytest.mark.parametrize("layout", ["marlin", "marlin24"])
def test_programs_in_tensor_core_orders_have_the_logits_of_the_row_major_one(
    layout, activation, tmp_path
):
    """The CPU's kernels are the oracle of the GPU's: the same bits from other packed bytes."""
    logits, generated = [], []
    for form in ("coalesced", layout):
        _, path = byte_llama.build(
            tmp_path / f"{form}.pte",
            method="min_max",
            activation=activation,
            layout=form,
            prune=layout == "marlin24",
            max_context=CONTEXT,
        )
        tags = {weight["layout_tag"] for weight in cuda_int4.inspect(path)["weights"]}
        assert tags == {f"{form}.v1"}
        program = cuda_int4.load(path, device="cpu")
        tokens = torch.tensor([[0, *TEXT[:63]]])
        logits.append(program.forward(tokens, torch.arange(64))[0])
        program.reset()
        generated.append(program.generate(tokens[0, :16].tolist(), max_new_tokens=32).tokens)
    assert torch.equal(*logits) and logits[0].isfinite().all()
    assert generated[0] == generated[1]


def test_executorchs_llama_agrees_with_eager(tmp_path):
    spec = importlib.util.spec_from_file_location("llama_export", EXAMPLES / "llama" / "export.py")
    llama = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llama)
    model, path = llama.build(tmp_path / "llama.pte", n_layers=1, dim=128, max_context=64)
    worst, size = llama.greatest_difference(model, path, n_tokens=12)
    assert worst <= 1e-4 * size
    assert not cuda_int4.inspect(path)["outside"]
