"""Decoders of real shapes with random int4 weights, in plain PyTorch.

One module serves Llama and Gemma style models: pre-norms (and post-norms), grouped queries with a
key-value cache, rotary positions, gated feed-forward, an embedding of its own or the head's.

    build("llama-3-8b", max_context=8704, ...)(tokens [1, S], input_pos [S]) -> logits [1, vocab]
    build(..., max_sequences=16)(tokens [B, S], input_pos [B, S]) -> logits [B, vocab], B <= 16

The logits are those of the last token of each row. Of several sequences row b is in row b of every
cache, at positions of its own; a shorter one repeats its last token and that token's position.
Linears that read the same x are one (query, key and value; gate and up), so the (N, K) are those of
shapes.py. What differs from the released models: nothing is trained, rotary positions turn whole
heads at one base per kind of layer, a sliding layer keeps the whole context in its cache, and norms
have weights near 1 that are multiplied as they are.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cuda_int4.layouts import COALESCED
from cuda_int4.marlin_layouts import MARLIN24, padded_n
from cuda_int4.sparse24 import VALID_META
from cuda_int4.tensors import TENSORS, CudaInt4Tensor

CODE_STD = math.sqrt(21.5)  # of a code 0..15 less 8, around 0


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """One kind of attention layer."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope_theta: float
    window: int = 0  # keys that a query sees, itself included; 0: all before it
    values_are_keys: bool = False  # one projection for both; the keys are then turned and normed

    @property
    def projected(self) -> int:
        """Outputs of the fused projection of x."""
        n_projections = 1 if self.values_are_keys else 2
        return (self.n_heads + n_projections * self.n_kv_heads) * self.head_dim

    def cache_bytes_read(self, context: int, element_bytes: int) -> int:
        """Bytes of keys and values that one token needs; of int8 (1) with a scale a head too."""
        seen = min(context, self.window) if self.window else context
        row_bytes = self.head_dim * element_bytes + (4 if element_bytes == 1 else 0)
        return 2 * self.n_kv_heads * seen * row_bytes


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model; layer i attends as ``kinds[i % len(kinds)]``."""

    dim: int
    hidden_dim: int
    n_layers: int
    vocab_size: int
    kinds: tuple[AttentionShape, ...]
    gemma: bool = False  # GeGLU, q/k norms, post-norms, scaled embedding tied to the head, soft cap
    norm_eps: float = 1e-5
    logit_cap: float = 0.0
    separate: bool = False  # q, k, v, gate, up: linears of their own, which the fusion merges

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(N, K) of every int4 linear that a token reads, the head last."""
        shapes = []
        for layer in range(self.n_layers):
            kind = self.kinds[layer % len(self.kinds)]
            shapes += [
                (kind.projected, self.dim),
                (self.dim, kind.n_heads * kind.head_dim),
                (2 * self.hidden_dim, self.dim),
                (self.dim, self.hidden_dim),
            ]
        return [*shapes, (self.vocab_size, self.dim)]

    def cache_bytes_read(self, context: int, element_bytes: int) -> int:
        """Bytes of all caches that one token needs."""
        layers = (self.kinds[i % len(self.kinds)] for i in range(self.n_layers))
        return sum(kind.cache_bytes_read(context, element_bytes) for kind in layers)


def _llama(dim: int, hidden_dim: int, n_layers: int, n_heads: int, head_dim: int = 128) -> Config:
    kind = AttentionShape(n_heads, 8, head_dim, 500_000.0)
    return Config(dim, hidden_dim, n_layers, 128256, (kind,))


_SLIDING = AttentionShape(32, 16, 256, 10_000.0, window=1024)
_FULL = AttentionShape(32, 4, 512, 1_000_000.0, values_are_keys=True)
MODELS = {
    "llama-3-8b": _llama(4096, 14336, 32, 32),
    "llama-3-70b": _llama(8192, 28672, 80, 64),
    "llama-3-1b": _llama(2048, 8192, 16, 32, head_dim=64),
    "gemma-4-31b": Config(
        5376, 21504, 60, 262144, (*(_SLIDING,) * 5, _FULL), gemma=True, norm_eps=1e-6, logit_cap=30
    ),
    "toy-llama": Config(256, 512, 2, 512, (AttentionShape(4, 2, 64, 10_000.0),)),
    "toy-gemma": Config(
        256, 512, 3, 512,
        (AttentionShape(4, 2, 64, 1e4, window=16),
         AttentionShape(4, 2, 64, 1e6, values_are_keys=True)),
        gemma=True, logit_cap=30,
    ),
}  # fmt: skip


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, heads, T, head_dim] by the angles of cos and sin [T, head_dim] or [B, 1, T, .]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class Place(NamedTuple):
    """Where the tokens of a call stand: what all attention layers of one kind share."""

    cos: Tensor  # [T, head_dim], or [B, 1, T, head_dim] of several sequences
    sin: Tensor
    mask: Tensor  # [T, max_context] or [B, 1, T, max_context]
    input_pos: Tensor  # [T] or [B, T]
    row: Tensor | None  # of the cache: None, or 0..B-1 as [B, 1]


def append(cache: Tensor, x: Tensor, place: Place) -> Tensor:
    """Write x [B, heads, T, head_dim] to its place in the cache; returns the cache's first B."""
    if place.row is None:
        return cache.index_copy_(2, place.input_pos, x)
    cache[place.row, :, place.input_pos] = x.transpose(1, 2)
    return cache[: x.shape[0]]


class Attention(nn.Module):
    """Grouped-query attention over a cache of its own."""

    def __init__(self, config: Config, kind: AttentionShape, max_context: int, max_sequences: int):
        super().__init__()
        self.kind = kind
        if config.separate:
            self.wq = nn.Linear(config.dim, kind.n_heads * kind.head_dim, bias=False)
            self.wk = nn.Linear(config.dim, kind.n_kv_heads * kind.head_dim, bias=False)
            if not kind.values_are_keys:
                self.wv = nn.Linear(config.dim, kind.n_kv_heads * kind.head_dim, bias=False)
        else:
            self.wqkv = nn.Linear(config.dim, kind.projected, bias=False)
        self.wo = nn.Linear(kind.n_heads * kind.head_dim, config.dim, bias=False)
        if config.gemma:
            self.q_norm = nn.RMSNorm(kind.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(kind.head_dim, eps=config.norm_eps)
        self.scale = 1.0 if config.gemma else kind.head_dim**-0.5
        shape = (max_sequences, kind.n_kv_heads, max_context, kind.head_dim)
        self.register_buffer("k_cache", torch.zeros(shape), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape), persistent=False)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """Append x [B, T, dim] to the cache and attend over it."""
        kind = self.kind
        B, T, _ = x.shape
        n_q, n_k = kind.n_heads, kind.n_kv_heads

        def heads_of(projection: nn.Module) -> Tensor:
            return projection(x).view(B, T, -1, kind.head_dim).transpose(1, 2)

        if hasattr(self, "wqkv"):
            heads = heads_of(self.wqkv)
            q, k, v = heads[:, :n_q], heads[:, n_q : n_q + n_k], heads[:, -n_k:]
        else:
            q, k = heads_of(self.wq), heads_of(self.wk)
            v = heads_of(self.wv) if hasattr(self, "wv") else k
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        if hasattr(self, "wqkv") and not hasattr(self, "q_norm"):  # both at once
            turned = rotate(heads[:, : n_q + n_k], place.cos, place.sin)
            q, k = turned.split([n_q, n_k], dim=1)
        else:
            q, k = rotate(q, place.cos, place.sin), rotate(k, place.cos, place.sin)
        k, v = append(self.k_cache, k, place), append(self.v_cache, v, place)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=place.mask, scale=self.scale, enable_gqa=True
        )
        return self.wo(y.transpose(1, 2).reshape(B, T, kind.n_heads * kind.head_dim))


class FeedForward(nn.Module):
    """SwiGLU or, in Gemma, GeGLU: w2(f(gate x) * up x)."""

    def __init__(self, config: Config):
        super().__init__()
        self.gelu = config.gemma
        if config.separate:
            self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
            self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        else:
            self.w13 = nn.Linear(config.dim, 2 * config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, dim] to the same shape."""
        if hasattr(self, "w13"):
            gate, up = self.w13(x).chunk(2, dim=-1)
        else:
            gate, up = self.w1(x), self.w3(x)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        return self.w2(gate * up)


class Block(nn.Module):
    """One layer; Gemma norms what attention and feed-forward give, too."""

    def __init__(self, config: Config, kind: AttentionShape, max_context: int, max_sequences: int):
        super().__init__()
        self.attention = Attention(config, kind, max_context, max_sequences)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        if config.gemma:
            self.attention_post_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
            self.ffn_post_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """Map x [B, T, dim] to the same shape."""
        y = self.attention(self.attention_norm(x), place)
        x = x + (self.attention_post_norm(y) if hasattr(self, "attention_post_norm") else y)
        y = self.feed_forward(self.ffn_norm(x))
        return x + (self.ffn_post_norm(y) if hasattr(self, "ffn_post_norm") else y)


class Decoder(nn.Module):
    """The model; see the head of this file. ``build`` fills its buffers."""

    def __init__(self, config: Config, max_context: int, max_sequences: int = 1):
        super().__init__()
        self.config, self.max_context = config, max_context
        kinds = [config.kinds[i % len(config.kinds)] for i in range(config.n_layers)]
        self.layers = nn.ModuleList(
            Block(config, kind, max_context, max_sequences) for kind in kinds
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if not config.gemma:
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.distinct = list(dict.fromkeys(kinds))
        self.kind_of_layer = [self.distinct.index(kind) for kind in kinds]
        for index, kind in enumerate(self.distinct):
            for name in ("rope_cos", "rope_sin"):
                table = torch.empty(max_context, kind.head_dim)
                self.register_buffer(f"{name}_{index}", table, persistent=False)
        self.register_buffer("key_pos", torch.arange(max_context), persistent=False)
        if max_sequences > 1:
            self.register_buffer("sequences", torch.arange(max_sequences), persistent=False)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        """Logits [B, vocab_size] of the last of tokens [B, T], at ``input_pos`` of the context.

        ``input_pos`` is [T] and B is 1, or [B, T] where the model holds several sequences.
        """
        row, places = None, []
        if input_pos.dim() == 2:  # of a buffer: ExecuTorch makes a torch.arange(B) of one length
            row = self.sequences[: input_pos.shape[0]].unsqueeze(1)
        for index, kind in enumerate(self.distinct):
            mask = self.key_pos <= input_pos.unsqueeze(input_pos.dim())
            if kind.window:
                mask = mask & (self.key_pos > input_pos.unsqueeze(input_pos.dim()) - kind.window)
            cos = getattr(self, f"rope_cos_{index}")[input_pos]
            sin = getattr(self, f"rope_sin_{index}")[input_pos]
            if row is not None:  # the same for all heads
                mask, cos, sin = mask.unsqueeze(1), cos.unsqueeze(1), sin.unsqueeze(1)
            places.append(Place(cos, sin, mask, input_pos, row))
        if self.config.gemma:
            x = F.embedding(tokens, self.output.weight) * math.sqrt(self.config.dim)
        else:
            x = self.tok_embeddings(tokens)
        for layer, index in zip(self.layers, self.kind_of_layer, strict=True):
            x = layer(x, places[index])
        logits = self.output(self.norm(x[:, -1]))
        cap = self.config.logit_cap
        return torch.tanh(logits / cap) * cap if cap else logits


class RandomWeights:
    """Int4 weights out of one pool of random bytes: each has memory of its own, none is drawn anew.

    A linear of them keeps the size of what goes through it: scales are near
    1 / (CODE_STD * sqrt(K)).
    """

    POOL_BYTES = 1 << 26

    def __init__(
        self,
        dtype: torch.dtype,
        group_size: int,
        zero_points: bool,
        activation: str,
        layout_tag: str = COALESCED,
    ):
        self.dtype, self.group_size, self.layout_tag = dtype, group_size, layout_tag
        self.scale_dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        self.zero_points, self.activation = zero_points, activation
        generator = torch.Generator().manual_seed(0)
        n = self.POOL_BYTES
        self.bytes = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator)
        self.floats = torch.rand(n // 8, generator=generator)
        places = torch.tensor(VALID_META)[torch.randint(6, (4, n // 8), generator=generator)]
        shifts = torch.tensor([0, 4, 8, 12]).unsqueeze(1)
        self.places = (places << shifts).sum(0).to(torch.int16)  # of kept codes, four a word
        self.n_made = 0

    def _take(self, pool: Tensor, n: int) -> Tensor:
        """``n`` elements of the pool, from another place each time, around the end if need be."""
        self.n_made += 1
        start = self.n_made * 1_000_003 % len(pool)
        parts, left = [], n
        while left:
            part = pool[start : start + left]
            parts.append(part)
            left, start = left - len(part), 0
        return torch.cat(parts)

    def weight(self, N: int, K: int) -> CudaInt4Tensor:
        """One [N, K] weight, packed as it is drawn: any bytes are codes in every layout."""
        group_size = self.group_size or K
        sizes = part_sizes(N, K, group_size, self.layout_tag)
        kept = 0.5 if "meta" in sizes else 1.0
        size = 1 / (CODE_STD * math.sqrt(kept * K))
        scale = (self._take(self.floats, math.prod(sizes["scale"])) * 0.4 + 0.8) * size
        parts = {
            "qdata": self._take(self.bytes, math.prod(sizes["qdata"])).view(sizes["qdata"]),
            "scale": scale.to(self.scale_dtype).view(sizes["scale"]),
        }
        if "meta" in sizes:
            parts["meta"] = self._take(self.places, math.prod(sizes["meta"])).view(sizes["meta"])
        if self.zero_points:
            zero_point = self._take(self.floats, scale.numel()) * 2 + 7
            parts["zero_point"] = zero_point.to(self.scale_dtype).view(sizes["scale"])
        return TENSORS[self.layout_tag](
            **parts, group_size=group_size, layout_tag=self.layout_tag,
            activation=self.activation, shape=(N, K), dtype=self.dtype,
        )  # type: ignore[call-arg]  # fmt: skip


def part_sizes(N: int, K: int, group_size: int, layout_tag: str) -> dict[str, tuple[int, int]]:
    """Of qdata, scale and, where the layout is 2:4, meta: layouts.md."""
    n_groups = K // (group_size or K)
    if layout_tag == COALESCED:
        return {"qdata": (N, K // 2), "scale": (N, n_groups)}
    Np = padded_n(N)
    if layout_tag == MARLIN24:
        return {"qdata": (K // 32, 8 * Np), "scale": (n_groups, Np), "meta": (K // 32, 2 * Np)}
    return {"qdata": (K // 16, 8 * Np), "scale": (n_groups, Np)}


def weight_bytes(
    N: int, K: int, group_size: int, zero_points: bool, layout_tag: str = COALESCED
) -> int:
    """Of one weight as ``RandomWeights`` makes it, with 16-bit scales."""
    sizes = part_sizes(N, K, group_size, layout_tag)
    scales = math.prod(sizes["scale"]) * (4 if zero_points else 2)
    return math.prod(sizes["qdata"]) + scales + 2 * math.prod(sizes.get("meta", (0,)))


def bytes_a_token_reads(
    config: Config,
    group_size: int,
    zero_points: bool,
    dense_head_bytes: int = 0,
    layout_tag: str = COALESCED,
) -> int:
    """Of all weights of linears; ``dense_head_bytes`` an element where the head is not int4."""
    *linears, (N, K) = config.linears
    form = (group_size, zero_points, layout_tag)
    layers = sum(weight_bytes(n, k, *form) for n, k in linears)
    if dense_head_bytes:
        return layers + N * K * dense_head_bytes
    return layers + weight_bytes(N, K, *form)


def build(
    config: Config,
    *,
    max_context: int,
    dtype: torch.dtype,
    group_size: int,
    zero_points: bool = False,
    activation: str = "none",
    dense_head: bool = False,
    layout_tag: str = COALESCED,
    max_sequences: int = 1,
) -> Decoder:
    """A model in eval mode whose linears, and head unless it is dense, hold random int4 weights.

    Everything else has ``dtype``. The dense form of an int4 weight is never made.
    """
    with torch.device("meta"):
        model = Decoder(config, max_context, max_sequences)
    weights = RandomWeights(dtype, group_size, zero_points, activation, layout_tag)
    for module in model.modules():
        if module is model.output and dense_head:
            N, K = module.out_features, module.in_features
            values = weights._take(weights.floats.to(dtype), N * K).sub_(0.5).mul_((12 / K) ** 0.5)
            module.weight = nn.Parameter(values.view(N, K), requires_grad=False)
        elif isinstance(module, nn.Linear):
            weight = weights.weight(module.out_features, module.in_features)
            module.weight = nn.Parameter(weight, requires_grad=False)
        elif isinstance(module, nn.RMSNorm):
            values = weights._take(weights.floats, module.weight.numel()) * 0.2 + 0.9
            module.weight = nn.Parameter(values.to(dtype), requires_grad=False)
        elif isinstance(module, nn.Embedding):
            shape = module.weight.shape
            values = weights._take(weights.floats.to(dtype), shape.numel()) * 2 - 1
            module.weight = nn.Parameter(values.view(shape), requires_grad=False)
    _fill_buffers(model, dtype)
    return model.eval()


def _fill_buffers(model: Decoder, dtype: torch.dtype) -> None:
    """Caches as zeros, and the tables, which were made without memory."""
    for layer in model.layers:
        attention = layer.attention
        for name in ("k_cache", "v_cache"):
            setattr(attention, name, torch.zeros(getattr(attention, name).shape, dtype=dtype))
    positions = torch.arange(model.max_context, dtype=torch.float32)
    for index, kind in enumerate(model.distinct):
        steps = torch.arange(0, kind.head_dim, 2, dtype=torch.float32) / kind.head_dim
        angles = torch.outer(positions, kind.rope_theta**-steps).repeat(1, 2)
        setattr(model, f"rope_cos_{index}", angles.cos().to(dtype))
        setattr(model, f"rope_sin_{index}", angles.sin().to(dtype))
    model.key_pos = torch.arange(model.max_context)
    if hasattr(model, "sequences"):
        model.sequences = torch.arange(len(model.sequences))


def example_call(
    max_seq_len: int, max_sequences: int
) -> tuple[tuple[Tensor, Tensor], tuple[dict, dict]]:
    """Tokens and positions to export with, and which of their sizes are free."""
    length = torch.export.Dim("length", min=1, max=max_seq_len)
    tokens, places = torch.zeros(1, 8, dtype=torch.long), torch.arange(8)
    if max_sequences == 1:
        return (tokens, places), ({1: length}, {0: length})
    free = {0: torch.export.Dim("sequences", min=1, max=max_sequences), 1: length}
    return (tokens.repeat(2, 1), places.repeat(2, 1)), (free, free)
