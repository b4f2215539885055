"""Decodes from the models of decode_model.py in plain PyTorch: what bench_decode is compared with.

    python benchmarks/bench_decode_torch.py --model llama-3-8b --weights bfloat16
    python benchmarks/bench_decode_torch.py --model llama-3-8b --weights tinygemm --sequences 16

The best that a short program does: a static cache of just the length that is needed, layers under
``torch.compile`` with coordinate descent tuning (one compiled function for all layers of a kind),
the whole step, choosing the likeliest token included, in one CUDA graph that is replayed without
the host reading a token. ``tinygemm`` has every linear and the head as ``_weight_int4pack_mm``,
groups of 128; ``bfloat16`` as ``F.linear``. Attention of one token is two products over the cache
with the heads of a group as rows; ``--sdpa`` makes it scaled_dot_product_attention with a mask.

The compiled step's logits are compared with eager PyTorch's before anything is timed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decode_model import MODELS, AttentionShape, Config
from machine import command_line, commit_id, driver_version

COLUMNS = (
    "model,layers,weights,sequences,phase,context,us_p10,us_median,us_p90,tokens_per_s,"
    "compile_s,machine,commit"
).split(",")
GROUP_SIZE = 128
INNER_K_TILES = 8
TOLERANCE = 0.05  # of the logits' size, bfloat16 twice
Weight = tuple[Tensor, ...]  # [N, K]; or packed codes, and scales with zeros
Layer = dict[str, Weight]


def linear(x: Tensor, weight: Weight) -> Tensor:
    """X @ w.T for either form."""
    if len(weight) == 1:
        return F.linear(x, weight[0])
    rows = x.reshape(-1, x.shape[-1])
    y = torch.ops.aten._weight_int4pack_mm(rows, weight[0], GROUP_SIZE, weight[1])
    return y.view(*x.shape[:-1], -1)


def rms_norm(x: Tensor, weight: Weight, eps: float) -> Tensor:
    """As decode_model's."""
    return F.rms_norm(x, (x.shape[-1],), weight[0], eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, heads, S, head_dim] by the angles of cos and sin [S, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, sdpa: bool) -> Tensor:
    """One token: q [B, Hq, 1, D] over caches [B, Hkv, T, D] under mask [T]."""
    B, Hq, _, D = q.shape
    grouped = q.view(B, k.shape[1], Hq // k.shape[1], D)
    if sdpa:
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask[None], scale=scale)
    else:
        weights = (grouped @ k.transpose(-1, -2)).float() * scale
        weights = weights.masked_fill(~mask, float("-inf")).softmax(-1)
        y = weights.to(v.dtype) @ v
    return y.reshape(B, Hq, 1, D)


def make_layer(config: Config, kind: AttentionShape, sdpa: bool) -> Callable[..., Tensor]:
    """The function of all layers of one kind: (layer, k_cache, v_cache, x, ...) -> x."""
    Hq, Hkv, D = kind.n_heads, kind.n_kv_heads, kind.head_dim
    scale = 1.0 if config.gemma else D**-0.5
    eps = config.norm_eps

    def run(
        layer: Layer, k_cache: Tensor, v_cache: Tensor, x: Tensor, cos: Tensor, sin: Tensor,
        input_pos: Tensor, mask: Tensor,
    ) -> Tensor:  # fmt: skip
        B, S, _ = x.shape
        y = rms_norm(x, layer["attention_norm"], eps)
        heads = linear(y, layer["wqkv"]).view(B, S, -1, D).transpose(1, 2)
        q, k, v = heads[:, :Hq], heads[:, Hq : Hq + Hkv], heads[:, -Hkv:]
        if config.gemma:
            q, k = rms_norm(q, layer["q_norm"], eps), rms_norm(k, layer["k_norm"], eps)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k_cache.index_copy_(2, input_pos, k)
        v_cache.index_copy_(2, input_pos, v)
        if S == 1:
            y = attend(q, k_cache, v_cache, mask, scale, sdpa)
        elif kind.window and S > kind.window:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask[:, :S], scale=scale, enable_gqa=True
            )
        else:  # a prompt from position 0 on
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=True
            )
        y = linear(y.transpose(1, 2).reshape(B, S, Hq * D), layer["wo"])
        x = x + (rms_norm(y, layer["attention_post_norm"], eps) if config.gemma else y)
        gate, up = linear(rms_norm(x, layer["ffn_norm"], eps), layer["w13"]).chunk(2, dim=-1)
        gate = F.gelu(gate, approximate="tanh") if config.gemma else F.silu(gate)
        y = linear(gate * up, layer["w2"])
        return x + (rms_norm(y, layer["ffn_post_norm"], eps) if config.gemma else y)

    return run


class Decoder:
    """Weights, caches and the step; everything on the GPU in bfloat16."""

    def __init__(self, config: Config, weights: str, sequences: int, length: int, sdpa: bool):
        """Draw the weights."""
        self.config, self.weights = config, weights
        self._generator = torch.Generator("cuda").manual_seed(0)
        kinds = [config.kinds[i % len(config.kinds)] for i in range(config.n_layers)]
        self.kinds = kinds
        self.layers = [self._layer(kind) for kind in kinds]
        shapes = [(sequences, kind.n_kv_heads, length, kind.head_dim) for kind in kinds]
        self.k = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        self.v = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes]
        self.head = self._linear(config.vocab_size, config.dim)
        self.norm = self._norm(config.dim)
        self.embedding = self._random(config.vocab_size, config.dim)
        self.token = torch.zeros(sequences, dtype=torch.long, device="cuda")
        self.pos = torch.zeros(1, dtype=torch.long, device="cuda")
        self.key_pos = torch.arange(length, device="cuda")
        self.turns = {kind: self._turns(kind, length) for kind in dict.fromkeys(kinds)}
        self.eager = {kind: make_layer(config, kind, sdpa) for kind in self.turns}
        self.compiled = {kind: torch.compile(f, fullgraph=True, dynamic=False)
                         for kind, f in self.eager.items()}  # fmt: skip
        self.compiled_end = torch.compile(self.end, fullgraph=True, dynamic=False)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=self._generator)

    def _norm(self, n: int) -> Weight:
        return (self._random(n) * 0.05 + 1,)

    def _linear(self, N: int, K: int) -> Weight:
        if self.weights == "bfloat16":
            return (self._random(N, K).mul_(K**-0.5),)
        codes = torch.randint(
            0, 256, (N, K // 2), dtype=torch.uint8, device="cuda", generator=self._generator
        )
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, INNER_K_TILES)
        scale = self._random(K // GROUP_SIZE, N).abs_().mul_(0.05).add_(1).mul_(0.22 * K**-0.5)
        return packed, torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()

    def _layer(self, kind: AttentionShape) -> Layer:
        config, width = self.config, kind.n_heads * kind.head_dim
        layer = {
            "wqkv": self._linear(kind.projected, config.dim),
            "wo": self._linear(config.dim, width),
            "w13": self._linear(2 * config.hidden_dim, config.dim),
            "w2": self._linear(config.dim, config.hidden_dim),
        }
        sizes = {"attention_norm": config.dim, "ffn_norm": config.dim}
        if config.gemma:
            sizes |= {"attention_post_norm": config.dim, "ffn_post_norm": config.dim}
            sizes |= {"q_norm": kind.head_dim, "k_norm": kind.head_dim}
        return layer | {name: self._norm(n) for name, n in sizes.items()}

    def _turns(self, kind: AttentionShape, length: int) -> tuple[Tensor, Tensor]:
        steps = torch.arange(0, kind.head_dim, 2, dtype=torch.float32, device="cuda")
        positions = torch.arange(length, dtype=torch.float32, device="cuda")
        angles = torch.outer(positions, kind.rope_theta ** -(steps / kind.head_dim)).repeat(1, 2)
        return angles.cos().bfloat16(), angles.sin().bfloat16()

    def end(self, x: Tensor) -> Tensor:
        """Logits of the last token."""
        logits = linear(rms_norm(x[:, -1], self.norm, self.config.norm_eps), self.head)
        cap = self.config.logit_cap
        return torch.tanh(logits / cap) * cap if cap else logits

    def forward(self, tokens: Tensor, input_pos: Tensor, compiled: bool) -> Tensor:
        """Logits [B, vocab] of the last of tokens [B, S] at input_pos [S]."""
        x = F.embedding(tokens, self.embedding)
        turns: dict[AttentionShape, tuple[Tensor, ...]] = {}
        for kind, (cos, sin) in self.turns.items():
            mask = self.key_pos <= input_pos[:, None]
            if kind.window:
                mask &= self.key_pos > input_pos[:, None] - kind.window
            turns[kind] = cos[input_pos], sin[input_pos], input_pos, mask.squeeze(0)
        functions = self.compiled if compiled else self.eager
        for kind, layer, k, v in zip(self.kinds, self.layers, self.k, self.v, strict=True):
            x = functions[kind](layer, k, v, x, *turns[kind])
        return (self.compiled_end if compiled else self.end)(x)

    def step(self) -> Tensor:
        """Choose a token and make it the next input, one position on."""
        logits = self.forward(self.token[:, None], self.pos, True)
        self.token.copy_(logits.argmax(-1))
        self.pos.add_(1)
        return logits


def record(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A graph of the call, which has run before: nothing is compiled in it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def seconds_of(call: Callable[[], Any]) -> float:
    """Until the GPU is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def check(model: Decoder) -> float:
    """Compare the compiled step with eager PyTorch; returns the seconds of the first call.

    Raises:
        RuntimeError: they are further apart than rounding.
    """
    exact = model.forward(model.token[:, None], model.pos, False).float()
    start = time.perf_counter()
    found = model.forward(model.token[:, None], model.pos, True).float()
    torch.cuda.synchronize()
    took_s = time.perf_counter() - start
    error = float((found - exact).norm() / exact.norm())
    if not error < TOLERANCE:
        raise RuntimeError(
            f"bench_decode_torch: expected the compiled logits within {TOLERANCE} of eager ones, "
            f"got {error:.3f}"
        )
    return took_s


def measure(model: Decoder, options: argparse.Namespace) -> list[list[str]]:
    """Rows from "phase" to "compile_s"."""
    compile_s = check(model)
    print(f"compiled in {compile_s:.1f} s", file=sys.stderr)
    rows = []
    graph = record(model.step)
    for n in [options.prompt, *options.context]:
        times = []
        n_tokens = options.generate if n == options.prompt else options.new_tokens

        def replay(n: int = n_tokens) -> None:
            for _ in range(n):
                graph.replay()

        for turn in range(options.repeat + 1):
            model.pos.fill_(n)
            took_s = seconds_of(replay)
            if turn:
                times.append(took_s * 1e6 / n_tokens)
        phase = f"generate {n_tokens}" if n == options.prompt else "decode"
        rows.append(_row(phase, n, times, model.token.numel(), compile_s))
    for n in options.prefill:
        tokens = torch.randint(model.config.vocab_size, (1, n), device="cuda")
        places = torch.arange(n, device="cuda")

        def call(tokens: Tensor = tokens, places: Tensor = places) -> Tensor:
            return model.forward(tokens, places, True)

        compile_s = seconds_of(call)
        times = [seconds_of(call) * 1e6 for _ in range(options.repeat)]
        rows.append(_row("prefill", n, times, n, compile_s))
    return rows


def _row(phase: str, n: int, times_us: list[float], n_tokens: int, compile_s: float) -> list[str]:
    median = statistics.median(times_us)
    tenths = statistics.quantiles(times_us, n=10) if len(times_us) > 1 else [median]
    us = [f"{t:.1f}" for t in (tenths[0], median, tenths[-1])]
    print(f"{phase} at {n}: {n_tokens / median * 1e6:.1f} tokens/s", file=sys.stderr)
    return [phase, str(n), *us, f"{n_tokens / median * 1e6:.1f}", f"{compile_s:.1f}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_decode_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the model has")
    parser.add_argument("--weights", choices=["bfloat16", "tinygemm"], default="bfloat16")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens before --generate")
    parser.add_argument("--generate", type=int, default=512)
    parser.add_argument("--context", type=int, nargs="*", default=[])
    parser.add_argument("--new-tokens", type=int, default=64, help="per --context")
    parser.add_argument("--prefill", type=int, nargs="*", default=[])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--sdpa", action="store_true", help="of one token, too")
    parser.add_argument("--no-tuning", dest="tuning", action="store_false")
    parser.add_argument("--commit", default="", help="to record, where git does not know it")
    parser.add_argument("--out", type=Path, help="CSV file; default: standard output")
    options = parser.parse_args(argv)
    config = MODELS[options.model]
    if options.layers:
        config = config.__class__(**{**vars(config), "n_layers": options.layers})
    torch._inductor.config.coordinate_descent_tuning = options.tuning
    length = max([
        options.prompt + options.generate,
        *(n + options.new_tokens for n in options.context),
        *options.prefill,
    ])  # fmt: skip
    start = time.perf_counter()
    with torch.inference_mode():
        model = Decoder(config, options.weights, options.sequences, length, options.sdpa)
        torch.cuda.synchronize()
        print(f"weights drawn in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        rows = measure(model, options)
    gpu = f"{torch.cuda.get_device_name()}, driver {driver_version()}, torch {torch.__version__}"
    case = [options.model, config.n_layers, options.weights, options.sequences]
    out = options.out.open("w", newline="") if options.out else sys.stdout
    out.write(f"# {gpu}\n# command: {command_line()}\n")
    table = csv.writer(out, lineterminator="\n")
    table.writerow(COLUMNS)
    for row in rows:
        table.writerow([*case, *row, torch.cuda.get_device_name(), options.commit or commit_id()])
    if options.out:
        out.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
