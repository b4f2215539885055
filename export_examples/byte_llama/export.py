"""Export the byte Llama with int4 weights to ``byte_llama.pte``.

    python export.py                                        # bf16 activations, groups of 32
    python export.py --group-size 128 --activation int8 -o small.pte
    python export.py --weights byte_llama_24.safetensors -o sparse.pte    # 2:4: marlin24.v1
    cuda-int4 run byte_llama.pte --tokenizer bytes --prompt 'def main():'

``forward(tokens [1, S] int64, input_pos [S] int64) -> logits [1, S, 256]`` with S from 1 to the
context's length; the key-value cache lives in the program. The constant methods are those that
executorch's TextLLMRunner asks for. With ``--max-sequences 16`` it is ``forward(tokens [B, S],
input_pos [B, S]) -> logits [B, 256]`` with B from 1 to 16, each row a text of its own (model.py),
which ``cuda-int4 run --prompts`` drives and that runner does not; ``get_max_batch`` says 16.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

import cuda_int4
from model import WEIGHTS, ByteLlama, load

Forward = Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build(
    path: str | Path,
    *,
    weights: str | Path = WEIGHTS,
    group_size: int = 32,
    symmetric: bool = True,
    method: str = "hqq",
    activation: str = "none",
    layout: str = "auto",
    prune: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    max_context: int = 2048,
    max_sequences: int = 1,
    external_weights: bool = False,
    kv_cache: str = "none",
) -> tuple[ByteLlama, str]:
    """Quantize, export, and write ``path``; with ``prune``, made 2:4 by magnitude before.

    Returns:
        The eager model with the same int4 weights and an empty cache, and the path written.
    """
    model = load(weights, max_context=max_context, dtype=dtype, max_sequences=max_sequences)
    if prune:
        cuda_int4.prune_24_(model)
    config = cuda_int4.Int4Config(
        group_size=group_size,
        symmetric=symmetric,
        method=method,
        layout=layout,
        activation=activation,
    )
    cuda_int4.quantize_(model, config)
    example, dynamic_shapes = example_call(max_context, max_sequences)
    written = cuda_int4.export(
        model,
        example,
        path,
        dynamic_shapes=dynamic_shapes,
        layout=layout,
        activation=activation,
        constant_methods={
            "get_max_seq_len": max_context,
            "get_max_context_len": max_context,
            "get_vocab_size": model.config.vocab_size,
            "get_bos_id": 0,
            "get_eos_ids": [0],
            "use_kv_cache": True,
            "enable_dynamic_shape": True,
            "use_sdpa_with_kv_cache": False,
            **({"get_max_batch": max_sequences} if max_sequences > 1 else {}),
        },
        external_weights=external_weights,
        kv_cache=kv_cache,
    )
    return model, str(written)


def example_call(
    max_context: int, max_sequences: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[dict, dict]]:
    """Tokens and positions to export with, and which of their sizes are free."""
    length = torch.export.Dim("length", min=1, max=max_context)
    if max_sequences == 1:
        return (torch.zeros(1, 8, dtype=torch.long), torch.arange(8)), ({1: length}, {0: length})
    free = {0: torch.export.Dim("sequences", min=1, max=max_sequences), 1: length}
    return (torch.zeros(2, 8, dtype=torch.long), torch.arange(8).repeat(2, 1)), (free, free)


@dataclasses.dataclass
class Agreement:
    """How a program's logits compare with the eager model's over teacher-forced tokens."""

    n_tokens: int
    n_equal: int  # positions where both put the same byte first
    first_difference: int | None  # the first position where they do not
    widest_margin: float  # how far eager's top two lie apart, at most, where they do not
    widest_margin_steps: float  # the same in steps of the logits' dtype at their size
    greatest_difference: float  # between two logits
    greatest_logit: float


@torch.no_grad()
def agreement(model: ByteLlama, forward: Forward, text: bytes, chunk: int = 64) -> Agreement:
    """Feed ``text`` to both, and compare the logits of every position.

    The eager model reads ``chunk`` bytes at a time; so does the program with the first chunk, and
    then it decodes byte by byte.

    Args:
        model: the eager model, with a cache.
        forward: of the program: (tokens, input_pos) -> [logits].
        text: at most as many bytes as the cache has positions, less one.
        chunk: bytes of one eager call.
    """
    model.reset()
    tokens = torch.tensor([0, *text])
    result = Agreement(0, 0, None, 0.0, 0.0, 0.0, 0.0)
    for input_pos in torch.arange(len(tokens)).split(chunk):
        logits = model(tokens[None, input_pos], input_pos)[0]
        calls = input_pos.split(chunk if input_pos[0] == 0 else 1)
        ours = torch.cat([forward(tokens[None, call], call)[0][0].float() for call in calls])
        eager = logits.float()
        difference = float((ours - eager).abs().max())
        result.greatest_difference = max(result.greatest_difference, difference)
        result.greatest_logit = max(result.greatest_logit, float(eager.abs().max()))
        differs = ours.argmax(-1) != eager.argmax(-1)
        result.n_tokens += len(input_pos)
        result.n_equal += len(input_pos) - int(differs.sum())
        if not differs.any():
            continue
        if result.first_difference is None:
            result.first_difference = int(input_pos[differs][0])
        top = eager[differs].topk(2).values
        margin = top[:, 0] - top[:, 1]
        step = 2.0 ** top.abs().amax(1).log2().floor() * torch.finfo(logits.dtype).eps
        result.widest_margin = max(result.widest_margin, float(margin.max()))
        result.widest_margin_steps = max(result.widest_margin_steps, float((margin / step).max()))
    return result


def main() -> None:
    """Read the command line and export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", default="byte_llama.pte")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="float weights")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument(
        "--asymmetric", action="store_true", help="store a zero point beside each scale"
    )
    parser.add_argument("--method", choices=["min_max", "hqq"], default="hqq")
    parser.add_argument("--activation", choices=["none", "int8"], default="none")
    parser.add_argument("--layout", default="auto", help="order of the weights in memory")
    parser.add_argument("--prune", action="store_true", help="make the weights 2:4 before")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--max-context", type=int, default=2048)
    parser.add_argument(
        "--max-sequences", type=int, default=1, help="texts to go on with in one call, up to"
    )
    parser.add_argument("--external-weights", action="store_true", help="weights in a .ptd")
    parser.add_argument("--kv-cache", choices=["none", "int8"], default="none")
    parser.add_argument("--check", type=int, default=0, help="compare this many tokens with eager")
    args = parser.parse_args()
    if args.check and args.max_sequences > 1:
        parser.error("--check compares a program of one sequence: leave out --max-sequences")
    model, path = build(
        args.output,
        weights=args.weights,
        group_size=args.group_size,
        symmetric=not args.asymmetric,
        method=args.method,
        activation=args.activation,
        layout=args.layout,
        prune=args.prune,
        dtype=DTYPES[args.dtype],
        max_context=args.max_context,
        max_sequences=args.max_sequences,
        external_weights=args.external_weights,
        kv_cache=args.kv_cache,
    )
    print(f"{path}: {Path(path).stat().st_size / 1e6:.2f} MB")
    if args.check:
        text = Path(__file__).with_name("model.py").read_bytes()[: args.check - 1]
        print(agreement(model, cuda_int4.load(path, device="cpu").forward, text))


if __name__ == "__main__":
    main()
