"""Small language models to decode from, in the form that the decode loop takes, and their export.

HistoryModel has no weights to speak of and lowers to ExecuTorch's own kernels: its tests are of the
loop alone. ToyLlama has int4 linears, RoPE, grouped queries and a KV cache, all in one delegate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HistoryModel(nn.Module):
    """The logits are a row of a table, chosen by a hash of every token so far.

    One wrong entry of the cache, one wrong position, and every later token differs.

    Args:
        vocab_size: V.
        context: tokens the cache holds.
        dtype: of the logits.
        last_only: logits are [1, V] and not [1, S, V].
        start_only: input_pos is [1], the position of the first token.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        context: int = 64,
        dtype: torch.dtype = torch.float32,
        *,
        last_only: bool = False,
        start_only: bool = False,
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.vocab_size, self.context = vocab_size, context
        self.last_only, self.start_only = last_only, start_only
        table = torch.randn(vocab_size, vocab_size, generator=generator)
        self.register_buffer("table", table.to(dtype))
        self.register_buffer("history", torch.zeros(context))
        weights = torch.randint(1, 60, (context,), generator=generator).float()
        self.register_buffer("weights", weights)  # context * 60 * V < 2^24: the sum is exact
        self.register_buffer("keys", torch.arange(context))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        if self.start_only:
            input_pos = input_pos + torch.arange(tokens.shape[1])
        history = self.history.index_copy_(0, input_pos, tokens[0].float() + 1)
        seen = (self.keys <= input_pos.unsqueeze(1)).float()
        state = (history * self.weights * seen).sum(-1)
        row = (state - self.vocab_size * torch.floor(state / self.vocab_size)).long()
        logits = F.embedding(row, self.table).unsqueeze(0)
        return logits[:, -1] if self.last_only else logits


class RowsHistoryModel(HistoryModel):
    """HistoryModel for several conversations, each with a row of the cache.

    forward(tokens [B, S], input_pos [B, S]) -> logits [B, S, V], or [B, V] with ``last_only``.
    """

    def __init__(self, n_rows: int, **options: Any):
        super().__init__(**options)
        self.register_buffer("history", torch.zeros(n_rows, self.context))
        self.register_buffer("rows", torch.arange(n_rows))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        n = tokens.shape[0]
        history = self.history.index_put_((self.rows[:n, None], input_pos), tokens.float() + 1)
        seen = (self.keys <= input_pos.unsqueeze(2)).float()
        state = (history[:n].unsqueeze(1) * self.weights * seen).sum(-1)
        row = (state - self.vocab_size * torch.floor(state / self.vocab_size)).long()
        logits = F.embedding(row, self.table)
        return logits[:, -1] if self.last_only else logits


class ToyLlama(nn.Module):
    """Two layers of a byte-level Llama; every weight random, so that no bug hides behind zeros."""

    VOCAB, DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128, 64, 128, 2, 4, 2, 16

    def __init__(self, context: int = 64):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(self.VOCAB, self.DIM)
        self.layers = nn.ModuleList(ToyBlock(self, context) for _ in range(self.LAYERS))
        self.norm = nn.RMSNorm(self.DIM)
        self.output = nn.Linear(self.DIM, self.VOCAB, bias=False)
        frequencies = 10000.0 ** -(torch.arange(0, self.HEAD_DIM, 2) / self.HEAD_DIM)
        angles = torch.outer(torch.arange(context).float(), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("keys", torch.arange(context))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = self.cos[input_pos], self.sin[input_pos]
        mask = self.keys <= input_pos.unsqueeze(1)
        for layer in self.layers:
            x = layer(x, input_pos, cos, sin, mask)
        return self.output(self.norm(x))


class ToyBlock(nn.Module):
    """One pre-norm layer of ToyLlama, with its cache."""

    def __init__(self, m: type[ToyLlama] | ToyLlama, context: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = m.HEADS, m.KV_HEADS, m.HEAD_DIM
        self.norm1, self.norm2 = nn.RMSNorm(m.DIM), nn.RMSNorm(m.DIM)
        self.wq = nn.Linear(m.DIM, m.HEADS * m.HEAD_DIM, bias=False)
        self.wk = nn.Linear(m.DIM, m.KV_HEADS * m.HEAD_DIM, bias=False)
        self.wv = nn.Linear(m.DIM, m.KV_HEADS * m.HEAD_DIM, bias=False)
        self.wo = nn.Linear(m.HEADS * m.HEAD_DIM, m.DIM, bias=False)
        self.w1 = nn.Linear(m.DIM, m.HIDDEN, bias=False)
        self.w2 = nn.Linear(m.HIDDEN, m.DIM, bias=False)
        self.w3 = nn.Linear(m.DIM, m.HIDDEN, bias=False)
        cache = torch.zeros(1, m.KV_HEADS, context, m.HEAD_DIM)
        self.register_buffer("k_cache", cache)
        self.register_buffer("v_cache", cache.clone())

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor, mask: Tensor):
        _, S, _ = x.shape
        h = self.norm1(x)
        q = self.wq(h).view(1, S, self.heads, self.head_dim).transpose(1, 2)
        k = self.wk(h).view(1, S, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(h).view(1, S, self.kv_heads, self.head_dim).transpose(1, 2)
        k = self.k_cache.index_copy_(2, input_pos, rotate(k, cos, sin))
        v = self.v_cache.index_copy_(2, input_pos, v)
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), k, v, attn_mask=mask, enable_gqa=True
        )
        x = x + self.wo(y.transpose(1, 2).reshape(1, S, self.heads * self.head_dim))
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class GemmaNorm(nn.Module):
    """RMSNorm with weight 1 + w, in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (scaled * (1 + self.weight.float())).to(x.dtype)


class ToyGemma(nn.Module):
    """What Gemma 2 and 3 have and Llama has not, as their modelling code writes it.

    A tied embedding times sqrt(dim), norms of 1 + w before and after each part, norms of q and k,
    every second layer with a sliding window, tanh caps on scores and logits, and GeGLU. Attention
    is plain ops: repeat heads, matmul, cap, add a mask of finfo.min, softmax in float32, matmul.

    Args:
        context: tokens the cache holds.
        score_cap: None as in Gemma 3, which has no such cap.
    """

    VOCAB, DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 128, 64, 128, 2, 4, 2, 16
    WINDOW, LOGIT_CAP = 5, 30.0

    def __init__(self, context: int = 64, score_cap: float | None = 2.0):
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(self.VOCAB, self.DIM)
        self.layers = nn.ModuleList(
            GemmaBlock(context, score_cap, self.WINDOW if i % 2 == 0 else context)
            for i in range(self.LAYERS)
        )
        self.norm = GemmaNorm(self.DIM)
        frequencies = 10000.0 ** -(torch.arange(0, self.HEAD_DIM, 2) / self.HEAD_DIM)
        angles = torch.outer(torch.arange(context).float(), frequencies)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("keys", torch.arange(context))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.DIM**0.5
        cos, sin = self.cos[input_pos].to(x.dtype), self.sin[input_pos].to(x.dtype)
        for layer in self.layers:
            x = layer(x, input_pos, cos, sin, self.keys)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return torch.tanh(logits / self.LOGIT_CAP) * self.LOGIT_CAP


class GemmaBlock(nn.Module):
    """One layer of ToyGemma, with its cache; ``window`` keys back to attend to."""

    def __init__(self, context: int, score_cap: float | None, window: int):
        super().__init__()
        m = ToyGemma
        self.heads, self.kv_heads, self.head_dim = m.HEADS, m.KV_HEADS, m.HEAD_DIM
        self.score_cap, self.window = score_cap, window
        self.norms = nn.ModuleList(GemmaNorm(m.DIM) for _ in range(4))
        self.q_norm, self.k_norm = GemmaNorm(m.HEAD_DIM), GemmaNorm(m.HEAD_DIM)
        self.wq = nn.Linear(m.DIM, m.HEADS * m.HEAD_DIM, bias=False)
        self.wk = nn.Linear(m.DIM, m.KV_HEADS * m.HEAD_DIM, bias=False)
        self.wv = nn.Linear(m.DIM, m.KV_HEADS * m.HEAD_DIM, bias=False)
        self.wo = nn.Linear(m.HEADS * m.HEAD_DIM, m.DIM, bias=False)
        self.gate = nn.Linear(m.DIM, m.HIDDEN, bias=False)
        self.up = nn.Linear(m.DIM, m.HIDDEN, bias=False)
        self.down = nn.Linear(m.HIDDEN, m.DIM, bias=False)
        cache = torch.zeros(1, m.KV_HEADS, context, m.HEAD_DIM)
        self.register_buffer("k_cache", cache)
        self.register_buffer("v_cache", cache.clone())

    def forward(self, x: Tensor, input_pos: Tensor, cos: Tensor, sin: Tensor, keys: Tensor):
        _, S, _ = x.shape
        h = self.norms[0](x)
        q = self.wq(h).view(1, S, self.heads, self.head_dim).transpose(1, 2)
        k = self.wk(h).view(1, S, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(h).view(1, S, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        k = self.k_cache.index_copy_(2, input_pos, k)
        v = self.v_cache.index_copy_(2, input_pos, v)
        at = input_pos.unsqueeze(1)
        seen = (keys <= at) & (keys > at - self.window)
        mask = torch.where(seen, 0.0, torch.finfo(x.dtype).min).to(x.dtype)
        scores = torch.matmul(q, repeat_heads(k, 2).transpose(2, 3)) * self.head_dim**-0.5
        if self.score_cap is not None:
            scores = torch.tanh(scores / self.score_cap) * self.score_cap
        p = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(x.dtype)
        y = torch.matmul(p, repeat_heads(v, 2)).transpose(1, 2).reshape(1, S, -1)
        x = x + self.norms[1](self.wo(y))
        h = self.norms[2](x)
        h = self.down(F.gelu(self.gate(h), approximate="tanh") * self.up(h))
        return x + self.norms[3](h)


def repeat_heads(x: Tensor, n: int) -> Tensor:
    """[B, H, T, D] with each head n times in a row, as Hugging Face writes it."""
    B, H, T, D = x.shape
    return x[:, :, None].expand(B, H, n, T, D).reshape(B, H * n, T, D)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [1, heads, S, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def toy_llama(context: int = 64) -> ToyLlama:
    """The quantised model, in eval mode."""
    import cuda_int4

    torch.manual_seed(0)
    model = ToyLlama(context).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.2)
    cuda_int4.quantize_(model, cuda_int4.Int4Config(group_size=32))
    return model


def toy_gemma(
    context: int = 64, score_cap: float | None = 2.0, dtype: torch.dtype = torch.float32
) -> ToyGemma:
    """The quantised model, in eval mode."""
    import cuda_int4

    torch.manual_seed(0)
    model = ToyGemma(context, score_cap).eval().requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    model.to(dtype)
    cuda_int4.quantize_(model, cuda_int4.Int4Config(group_size=32))
    return model


def constant_methods(context: int, max_seq_len: int = 16, **changes: Any) -> dict[str, Any]:
    """What TextLLMRunner and our loop ask a model for; ``changes`` with None take one out."""
    methods = {
        "get_max_seq_len": max_seq_len,
        "get_max_context_len": context,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "use_sdpa_with_kv_cache": False,
        "get_eos_ids": [],
        **changes,
    }
    return {name: value for name, value in methods.items() if value is not None}


def example(max_seq_len: int, *, start_only: bool = False) -> tuple[tuple[Tensor, Tensor], Any]:
    """Example inputs and dynamic shapes for a sequence of 1 to ``max_seq_len`` tokens."""
    n = min(4, max_seq_len)
    inputs = torch.arange(1, n + 1)[None], torch.arange(1 if start_only else n)
    if max_seq_len == 1:
        return inputs, None
    S = torch.export.Dim("S", min=1, max=max_seq_len)
    return inputs, ({1: S}, None if start_only else {0: S})


def export_plain(
    model: nn.Module,
    path: Path,
    *,
    max_seq_len: int = 16,
    inputs: tuple[Tensor, ...] | None = None,
    **methods: Any,
) -> Path:
    """Write ``model`` as a .pte without any delegate.

    Args:
        model: a HistoryModel, or with ``inputs`` any module.
        path: of the .pte.
        max_seq_len: greatest S; 1 exports a static shape.
        inputs: example inputs of a module of another signature, exported with static shapes.
        **methods: changes to ``constant_methods``.
    """
    from executorch.exir import to_edge_transform_and_lower

    shapes = None
    if inputs is None:
        inputs, shapes = example(max_seq_len, start_only=getattr(model, "start_only", False))
    exported = torch.export.export(model, inputs, dynamic_shapes=shapes)
    context = getattr(model, "context", 64)
    methods = constant_methods(context, max_seq_len, **methods)
    program = to_edge_transform_and_lower(exported, constant_methods=methods).to_executorch()
    path.write_bytes(program.buffer)
    return path


def export_rows(path: Path, n_rows: int, max_seq_len: int = 16, **options: Any) -> Path:
    """Write a RowsHistoryModel as a .pte without any delegate."""
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    model = RowsHistoryModel(n_rows, **options)
    free = {0: torch.export.Dim("B", max=n_rows), 1: torch.export.Dim("S", max=max_seq_len)}
    inputs = torch.arange(6).reshape(2, 3), torch.arange(3).expand(2, 3).contiguous()
    exported = torch.export.export(model, inputs, dynamic_shapes=(free, free))
    program = to_edge_transform_and_lower(
        exported,
        constant_methods=constant_methods(model.context, max_seq_len),
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    ).to_executorch()
    path.write_bytes(program.buffer)
    return path


def export_delegated(
    path: Path, model: nn.Module | None = None, n_rows: int = 0, **methods: Any
) -> Path:
    """Write a HistoryModel, with ``n_rows`` a RowsHistoryModel, as a .pte of one delegate."""
    import cuda_int4

    inputs, shapes = example(16)
    if n_rows > 0:
        model = RowsHistoryModel(n_rows)
        free = {0: torch.export.Dim("B", max=n_rows), 1: torch.export.Dim("S", max=16)}
        inputs = torch.arange(6).reshape(2, 3), torch.arange(3).expand(2, 3).contiguous()
        shapes = (free, free)
    cuda_int4.export(
        model or HistoryModel(),
        inputs,
        str(path),
        dynamic_shapes=shapes,
        constant_methods=constant_methods(64, **methods),
    )
    return path


def export_toy_llama(
    path: Path, context: int = 64, fusions: Any = "all", kv_cache: str = "none", **methods: Any
) -> Path:
    """Write ``toy_llama(context)`` as a .pte with one delegate."""
    import cuda_int4

    inputs, shapes = example(16)
    cuda_int4.export(
        toy_llama(context),
        inputs,
        str(path),
        dynamic_shapes=shapes,
        constant_methods=constant_methods(context, **methods),
        fusions=fusions,
        kv_cache=kv_cache,
    )
    return path


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], n: int) -> list[int]:
    """The ``n`` likeliest tokens after ``prompt``, by PyTorch eager, one token per forward."""
    tokens, chosen = list(prompt), []
    for position in range(len(prompt) + n - 1):
        token = torch.tensor([[tokens[position]]])
        logits = model(token, torch.tensor([position]))
        if position >= len(prompt) - 1:
            chosen.append(int(logits.reshape(-1, logits.shape[-1])[-1].argmax()))
            tokens.append(chosen[-1])
    return chosen
