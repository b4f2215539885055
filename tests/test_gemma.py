"""A decoder in the style of Gemma 2 and 3: the whole graph in the delegate."""

from __future__ import annotations

import pytest
import torch

import cuda_int4
from language_models import constant_methods, example, toy_gemma


def exported(model, tmp_path):
    inputs, shapes = example(16)
    return cuda_int4.export(
        model,
        inputs,
        tmp_path / "gemma.pte",
        dynamic_shapes=shapes,
        constant_methods=constant_methods(model.context),
    )


def chunks(tokens):
    """Prompts and steps, past the window of 5: tokens and positions of each call."""
    position = 0
    for n in (9, 1, 1, 5, 1, 7):
        yield tokens[:, position : position + n], torch.arange(position, position + n)
        position += n


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    "score_cap, dtype, bound", [(2.0, torch.float32, 1e-5), (None, torch.bfloat16, 2e-2)]
)
def test_prompt_and_steps_are_those_of_eager(tmp_path, score_cap, dtype, bound):
    model = toy_gemma(32, score_cap, dtype)
    loaded = cuda_int4.load(exported(toy_gemma(32, score_cap, dtype), tmp_path))
    for chunk in chunks(torch.randint(0, 128, (1, 24))):
        (y,), expected = loaded.forward(*chunk), model(*chunk)
        assert y.dtype == dtype and y.shape == expected.shape
        assert distance(y, expected) <= bound


def test_the_cap_and_the_window_matter():
    tokens = torch.randint(0, 128, (1, 24))
    with_cap, without, wide = toy_gemma(32), toy_gemma(32, None), toy_gemma(32)
    for layer in wide.layers:
        layer.window = 32
    for chunk in chunks(tokens):
        expected = with_cap(*chunk)
        others = [distance(model(*chunk), expected) for model in (without, wide)]
    assert min(others) > 0.05  # above the bounds of the test before
