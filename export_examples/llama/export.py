"""Export a Llama written by executorch (``executorch.examples.models.llama``) with int4 weights.

    python export.py                    # small, random weights; checks the program against eager
    python export.py --layers 4 --dim 512 -o llama.pte

The model code is executorch's own. Of its source transformations one is used:
``replace_rms_norm_with_native_rms_norm``, so that a norm is one op and not six. None is needed for
attention (repeated key heads are folded into our attention op) or for the cache (writes at
``input_pos`` are in place). ``enable_dynamic_shape`` stays off: it reads positions back to the host
with ``.item()``; the sequence length is dynamic through torch.export instead.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from executorch.examples.models.llama.llama_transformer import Transformer, construct_transformer
from executorch.examples.models.llama.model_args import ModelArgs
from executorch.examples.models.llama.source_transformation.rms_norm import (
    replace_rms_norm_with_native_rms_norm,
)

import cuda_int4


def make_model(dim: int, n_layers: int, max_context: int, vocab_size: int = 512) -> Transformer:
    """Build a Llama with random weights, a key-value cache, and logits for every position."""
    args = ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=dim // 64,
        n_kv_heads=max(1, dim // 128),
        hidden_dim=3 * dim,
        vocab_size=vocab_size,
        max_seq_len=max_context,
        max_context_len=max_context,
        use_kv_cache=True,
        generate_full_logits=True,
    )
    torch.manual_seed(0)
    model = construct_transformer(args).eval()
    for p in model.parameters():
        p.requires_grad_(False)
    return replace_rms_norm_with_native_rms_norm(model)


def build(
    path: str | Path,
    *,
    dim: int = 256,
    n_layers: int = 2,
    max_context: int = 256,
    group_size: int = 32,
    activation: str = "none",
) -> tuple[Transformer, str]:
    """Quantize, export, and write ``path``.

    Returns:
        The eager model with the same int4 weights and an empty cache, and the path written.
    """
    model = make_model(dim, n_layers, max_context)
    config = cuda_int4.Int4Config(group_size=group_size, activation=activation)
    cuda_int4.quantize_(model, config)
    length = torch.export.Dim("length", min=1, max=max_context)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    written = cuda_int4.export(
        model,
        (tokens, {"input_pos": torch.arange(8)}),
        path,
        dynamic_shapes=({1: length}, {"input_pos": {0: length}}),
        activation=activation,
        constant_methods={
            "get_max_seq_len": max_context,
            "get_max_context_len": max_context,
            "get_vocab_size": model.vocab_size,
            "get_bos_id": 1,
            "get_eos_ids": [2],
            "use_kv_cache": True,
            "enable_dynamic_shape": True,
            "use_sdpa_with_kv_cache": False,
        },
    )
    return model, str(written)


def greatest_difference(model: Transformer, path: str, n_tokens: int = 24) -> tuple[float, float]:
    """Run a prompt of 8 tokens and then single ones through both.

    Returns:
        The greatest difference between their logits, and the greatest logit in size.
    """
    program = cuda_int4.load(path, device="cpu")
    tokens = torch.randint(model.vocab_size, (1, n_tokens))
    worst = size = 0.0
    for chunk in [range(8), *(range(i, i + 1) for i in range(8, n_tokens))]:
        input_pos = torch.tensor(chunk)
        with torch.no_grad():
            expected = model(tokens[:, input_pos], {"input_pos": input_pos})
        (got,) = program.forward(tokens[:, input_pos], input_pos)
        worst = max(worst, float((got - expected).abs().max()))
        size = max(size, float(expected.abs().max()))
    return worst, size


def main() -> None:
    """Read the command line, export, check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", default="llama.pte")
    parser.add_argument("--dim", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--activation", choices=["none", "int8"], default="none")
    args = parser.parse_args()
    model, path = build(
        args.output,
        dim=args.dim,
        n_layers=args.layers,
        group_size=args.group_size,
        activation=args.activation,
    )
    worst, size = greatest_difference(model, path)
    print(f"{path}: {Path(path).stat().st_size / 1e6:.2f} MB")
    print(f"greatest difference from eager {worst:.2e}, greatest logit {size:.2f}")
    if not worst <= 1e-4 * size:
        raise SystemExit("the program does not agree with the eager model")


if __name__ == "__main__":
    main()
