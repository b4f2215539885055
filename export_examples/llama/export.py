"""Export a Llama written by executorch (``executorch.examples.models.llama``) with int4 weights.

    python export.py                    # small, random weights; checks the program against eager
    python export.py --layers 4 --dim 512 -o llama.pte
    python export.py --max-sequences 4                  # for cuda-int4 run --prompts

The model code is executorch's own. Of its source transformations one is used:
``replace_rms_norm_with_native_rms_norm``, so that a norm is one op and not six. None is needed for
attention (repeated key heads are folded into our attention op) or for the cache (writes at
``input_pos`` are in place). ``enable_dynamic_shape`` stays off: it reads positions back to the host
with ``.item()``; the sequence length is dynamic through torch.export instead.

Its cache and its attention know one list of positions for all rows of a batch. For several
sequences, each at positions of its own, both modules of a layer are replaced here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from executorch.examples.models.llama.attention import KVCache
from executorch.examples.models.llama.llama_transformer import Transformer, construct_transformer
from executorch.examples.models.llama.model_args import ModelArgs
from executorch.examples.models.llama.source_transformation.rms_norm import (
    replace_rms_norm_with_native_rms_norm,
)
from torch import Tensor, nn

import cuda_int4


class RowsCache(nn.Module):
    """A cache of which sequence b has row b, in the place of executorch's ``KVCache``."""

    def __init__(self, cache: KVCache):
        """Like ``cache``, which has as many rows."""
        super().__init__()
        self.register_buffer("k_cache", cache.k_cache)
        self.register_buffer("v_cache", cache.v_cache)
        rows = torch.arange(len(cache.k_cache))  # ExecuTorch makes a torch.arange(B) of one length
        self.register_buffer("rows", rows, persistent=False)

    def update(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [B, heads, S, head_dim] to input_pos [B, S]; returns the first B rows."""
        row = self.rows[: input_pos.shape[0]].unsqueeze(1)
        self.k_cache[row, :, input_pos] = k.transpose(1, 2)
        self.v_cache[row, :, input_pos] = v.transpose(1, 2)
        return self.k_cache[: input_pos.shape[0]], self.v_cache[: input_pos.shape[0]]


class RowsAttention(nn.Module):
    """Attention under a mask [B, S, max_context], in the place of executorch's ``SDPA``."""

    def forward(self, input_pos, q, k, v, bsz, seqlen, mask):  # type: ignore[no-untyped-def]
        """As ``SDPA.forward``."""
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(1), enable_gqa=True)
        return y.transpose(1, 2).reshape(bsz, seqlen, q.shape[1] * q.shape[3])


class RowsRotary(nn.Module):
    """Rotary positions of angles [B, S, head_dim / 2], in the place of ``RotaryEmbedding``."""

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Turn q and k [B, S, heads, head_dim], of which neighbours are a pair."""
        return self.turn(q, cos.unsqueeze(2), sin.unsqueeze(2)), self.turn(
            k, cos.unsqueeze(2), sin.unsqueeze(2)
        )

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One of them."""
        pairs = x.unflatten(-1, (-1, 2))
        a, b = pairs.select(-1, 0), pairs.select(-1, 1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(3).type_as(x)


def make_model(
    dim: int, n_layers: int, max_context: int, vocab_size: int = 512, max_sequences: int = 1
) -> Transformer:
    """Build a Llama with random weights and a key-value cache.

    It gives logits for every position, or with ``max_sequences`` > 1 for the last of each row.
    """
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
        max_batch_size=max_sequences,
        generate_full_logits=max_sequences == 1,
    )
    torch.manual_seed(0)
    model = construct_transformer(args).eval()
    for p in model.parameters():
        p.requires_grad_(False)
    if max_sequences > 1:
        model.rope.apply_rotary_emb = RowsRotary()
        for layer in model.layers:
            layer.attention.kv_cache = RowsCache(layer.attention.kv_cache)
            layer.attention.SDPA = RowsAttention()
    return replace_rms_norm_with_native_rms_norm(model)


def build(
    path: str | Path,
    *,
    dim: int = 256,
    n_layers: int = 2,
    max_context: int = 256,
    group_size: int = 32,
    activation: str = "none",
    max_sequences: int = 1,
) -> tuple[Transformer, str]:
    """Quantize, export, and write ``path``.

    Returns:
        The eager model with the same int4 weights and an empty cache, and the path written.
    """
    model = make_model(dim, n_layers, max_context, max_sequences=max_sequences)
    config = cuda_int4.Int4Config(group_size=group_size, activation=activation)
    cuda_int4.quantize_(model, config)
    length = torch.export.Dim("length", min=1, max=max_context)
    tokens, input_pos = torch.zeros(1, 8, dtype=torch.long), torch.arange(8)
    free: tuple[dict, dict] = {1: length}, {0: length}
    if max_sequences > 1:
        tokens, input_pos = tokens.repeat(2, 1), input_pos.repeat(2, 1)
        rows = {0: torch.export.Dim("sequences", min=1, max=max_sequences), 1: length}
        free = rows, rows
    written = cuda_int4.export(
        model,
        (tokens, {"input_pos": input_pos}),
        path,
        dynamic_shapes=(free[0], {"input_pos": free[1]}),
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
            **({"get_max_batch": max_sequences} if max_sequences > 1 else {}),
        },
    )
    return model, str(written)


def greatest_difference(model: Transformer, path: str, n_tokens: int = 24) -> tuple[float, float]:
    """Run a prompt of 8 tokens and then single ones through both.

    Of several sequences each is one token behind the one before it.

    Returns:
        The greatest difference between their logits, and the greatest logit in size.
    """
    program = cuda_int4.load(path, device="cpu")
    n_rows = model.params.max_batch_size
    tokens = torch.randint(model.vocab_size, (n_rows, n_tokens))
    worst = size = 0.0
    for chunk in [range(8), *(range(i, i + 1) for i in range(8, n_tokens))]:
        input_pos = torch.tensor(chunk)
        if n_rows > 1:
            input_pos = (input_pos - torch.arange(n_rows).unsqueeze(1)).clamp(min=0)
        with torch.no_grad():
            here = tokens[:, input_pos] if n_rows == 1 else tokens.gather(1, input_pos)
            expected = model(here, {"input_pos": input_pos})
        (got,) = program.forward(here, input_pos)
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
    parser.add_argument("--max-sequences", type=int, default=1)
    parser.add_argument("--activation", choices=["none", "int8"], default="none")
    args = parser.parse_args()
    model, path = build(
        args.output,
        dim=args.dim,
        n_layers=args.layers,
        group_size=args.group_size,
        activation=args.activation,
        max_sequences=args.max_sequences,
    )
    worst, size = greatest_difference(model, path)
    print(f"{path}: {Path(path).stat().st_size / 1e6:.2f} MB")
    print(f"greatest difference from eager {worst:.2e}, greatest logit {size:.2f}")
    if not worst <= 1e-4 * size:
        raise SystemExit("the program does not agree with the eager model")


if __name__ == "__main__":
    main()
