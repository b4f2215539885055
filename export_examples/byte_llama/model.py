"""A small byte-level Llama in plain PyTorch: RMSNorm, RoPE, grouped-query attention, SwiGLU.

One class serves both lives of the model. Without ``input_pos`` it reads whole sequences, which is
how it is trained; with ``input_pos`` it appends to a key-value cache, which is how it is exported
and decoded:

    ByteLlama(Config())(tokens [B, T])                                   -> logits [B, T, 256]
    ByteLlama(Config(), max_context=2048)(tokens [1, S], input_pos [S])  -> logits [1, S, 256]

With ``max_sequences`` > 1 the cache has a row for each of as many texts. Row b of tokens goes on
with text b, at positions of its own; shorter rows repeat their last token and its position. The
logits are those of each row's last token:

    ByteLlama(Config(), max_context=2048, max_sequences=16)(tokens [B, S], input_pos [B, S])
                                                                         -> logits [B, 256]

Tokens are bytes (int64); byte 0 begins and ends a text. Every K and N is a multiple of 128.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = Path(__file__).with_name("byte_llama.safetensors")
WEIGHTS_24 = Path(__file__).with_name("byte_llama_24.safetensors")  # finetune24.py


KEPT, PLACES = ".kept", ".places"  # the two parts of a 2:4 weight in a file


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; the defaults are those of the weights here (5.6 M parameters)."""

    dim: int = 256
    hidden_dim: int = 768
    n_layers: int = 7
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64
    vocab_size: int = 256
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, heads, T, head_dim] by angles [T, head_dim / 2] or [B, 1, T, .] (RoPE)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class Place(NamedTuple):
    """Where the tokens of a call stand: what all layers share."""

    cos: Tensor  # [T, head_dim / 2], or [B, 1, T, head_dim / 2] of several sequences
    sin: Tensor
    mask: Tensor | None = None  # over the cache: [T, max_context] or [B, 1, T, max_context]
    input_pos: Tensor | None = None  # in the cache: [T] or [B, T]; None: there is none
    row: Tensor | None = None  # of the cache: 0..B-1 as [B, 1]; None: it has one


def append(cache: Tensor, x: Tensor, place: Place) -> Tensor:
    """Write x [B, heads, T, head_dim] to its place in the cache; returns the cache's first B."""
    if place.row is None:
        return cache.index_copy_(2, place.input_pos, x)
    cache[place.row, :, place.input_pos] = x.transpose(1, 2)
    return cache[: x.shape[0]]


class Attention(nn.Module):
    """Causal grouped-query attention; with ``max_context`` > 0 it owns a key-value cache."""

    def __init__(self, config: Config, max_context: int, max_sequences: int):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = (
            config.n_heads,
            config.n_kv_heads,
            config.head_dim,
        )
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        if max_context:
            cache = torch.zeros(max_sequences, config.n_kv_heads, max_context, config.head_dim)
            self.register_buffer("k_cache", cache, persistent=False)
            self.register_buffer("v_cache", cache.clone(), persistent=False)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """Attend over x [B, T, dim], or over the cache with x appended to it."""
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, place.cos, place.sin), rotate(k, place.cos, place.sin)
        if place.input_pos is not None:
            k, v = append(self.k_cache, k, place), append(self.v_cache, v, place)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=place.mask, is_causal=place.input_pos is None, enable_gqa=True
        )
        return self.wo(y.transpose(1, 2).reshape(B, T, self.n_heads * self.head_dim))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: Config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, dim] to the same shape."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One pre-norm layer; dropout, in training only, on what it adds to the residual stream."""

    def __init__(self, config: Config, max_context: int, max_sequences: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config, max_context, max_sequences)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = dropout

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """Map x [B, T, dim] to the same shape."""
        x = x + self.drop(self.attention(self.attention_norm(x), place))
        return x + self.drop(self.feed_forward(self.ffn_norm(x)))

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout, or nothing at all, so that the exported graph has no node for it."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class ByteLlama(nn.Module):
    """The model; see the head of this file for its two ways of being called.

    Args:
        config: sizes.
        max_context: positions of the key-value cache; 0 makes a model without one.
        dropout: probability used in training mode.
        max_sequences: rows of the key-value cache.
    """

    def __init__(
        self,
        config: Config,
        max_context: int = 0,
        dropout: float = 0.0,
        max_sequences: int = 1,
    ):
        super().__init__()
        self.config, self.max_context = config, max_context
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(
            Block(config, max_context, max_sequences, dropout) for _ in range(config.n_layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        positions = torch.arange(max_context or 4096, dtype=torch.float32)
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        angles = torch.outer(positions, config.rope_theta**-steps)
        self.register_buffer("rope_cos", angles.cos(), persistent=False)
        self.register_buffer("rope_sin", angles.sin(), persistent=False)
        if max_context:
            self.register_buffer("key_pos", torch.arange(max_context), persistent=False)
        if max_sequences > 1:
            self.register_buffer("sequences", torch.arange(max_sequences), persistent=False)

    def init_weights(self) -> None:
        """Draw weights for training: std 0.02, smaller where a layer adds to the residual."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                into_residual = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(
                    p, std=0.02 / (2 * self.config.n_layers) ** 0.5 if into_residual else 0.02
                )

    def reset(self) -> None:
        """Empty the cache."""
        for layer in self.layers:
            layer.attention.k_cache.zero_()
            layer.attention.v_cache.zero_()

    def cast(self, dtype: torch.dtype) -> ByteLlama:
        """Give weights, activations and cache ``dtype``; the rope tables stay float32."""
        tables = self.rope_cos, self.rope_sin
        self.to(dtype)
        self.rope_cos, self.rope_sin = tables
        return self

    def forward(self, tokens: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """Return logits [B, T, vocab_size], or [B, vocab_size] with ``input_pos`` [B, T].

        ``input_pos``: places of tokens in the cache; [T] where that has one row.
        """
        place = self.place(tokens, input_pos)
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, place)
        return self.output(self.norm(x if place.row is None else x[:, -1]))

    def place(self, tokens: Tensor, input_pos: Tensor | None) -> Place:
        """Angles, and a mask if there is a cache."""
        if input_pos is None:
            T = tokens.shape[1]
            return Place(self.rope_cos[:T], self.rope_sin[:T])
        cos, sin = self.rope_cos[input_pos], self.rope_sin[input_pos]
        mask = self.key_pos <= input_pos.unsqueeze(input_pos.dim())
        if input_pos.dim() == 1:
            return Place(cos, sin, mask, input_pos)
        cos, sin, mask = cos.unsqueeze(1), sin.unsqueeze(1), mask.unsqueeze(1)  # for all heads
        # Of a buffer: ExecuTorch makes a torch.arange(B) of one length.
        row = self.sequences[: input_pos.shape[0]].unsqueeze(1)
        return Place(cos, sin, mask, input_pos, row)

    @torch.no_grad()
    def generate(
        self, prompt: bytes, n_bytes: int, temperature: float = 0.0, seed: int = 0
    ) -> bytes:
        """Continue ``prompt`` by up to ``n_bytes``, greedily or sampled, until a byte 0."""
        device = self.output.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        tokens, position, out = (torch.tensor([[0, *prompt]], device=device), 0, bytearray())
        while len(out) < n_bytes and position + tokens.shape[1] <= self.max_context:
            input_pos = torch.arange(position, position + tokens.shape[1], device=device)
            logits, position = (self(tokens, input_pos)[0, -1].float(), position + tokens.shape[1])
            if temperature:
                tokens = torch.multinomial(
                    (logits / temperature).softmax(0), 1, generator=generator
                )[None]
            else:
                tokens = logits.argmax()[None, None]
            if not tokens.item():
                break
            out.append(tokens.item())
        return bytes(out)


def load(
    path: str | Path = WEIGHTS,
    *,
    max_context: int = 0,
    dtype: torch.dtype = torch.float32,
    max_sequences: int = 1,
) -> ByteLlama:
    """Load trained weights (safetensors, config in its metadata) into a model in eval mode.

    A 2:4 weight may be stored as :func:`save_24` does; it becomes a matrix with zeros again.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        config = Config(**json.loads(file.metadata()["config"]))
        state = {name: file.get_tensor(name) for name in file.keys()}
    for name in [name for name in state if name.endswith(KEPT)]:
        values, bits = state.pop(name), state.pop(name.removesuffix(KEPT) + PLACES)
        mask = (bits.unsqueeze(-1) >> torch.arange(8) & 1).bool().flatten(1)
        weight = torch.zeros(mask.shape, dtype=values.dtype)
        state[name.removesuffix(KEPT)] = weight.masked_scatter_(mask, values)
    model = ByteLlama(config, max_context=max_context, max_sequences=max_sequences)
    model.load_state_dict(state)
    return model.cast(dtype).eval()


def save_24(model: ByteLlama, report: dict, path: Path) -> None:
    """Write a bfloat16 model whose linears are 2:4, two of four weights each, and a report.

    A weight ``w`` [N, K] becomes ``w.kept`` bfloat16 [N, K/2] and ``w.places`` uint8 [N, K/8],
    bit i of byte j set where column 8j + i is kept. Where fewer than two of four are not 0, zeros
    are kept.
    """
    from safetensors.torch import save_file

    linears = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    state = {}
    for name, weight in model.state_dict().items():
        weight = weight.detach().cpu()
        if name not in linears:
            state[name] = weight.contiguous()
            continue
        fours = weight.unflatten(1, (-1, 4))
        largest = (fours != 0).byte().argsort(dim=-1, descending=True, stable=True)
        mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, largest[..., :2], True)
        if bool(fours[~mask].any()):
            raise ValueError(
                f"{name}: expected at most 2 of 4 that are not 0, got more; prune first"
            )
        mask = mask.flatten(1)
        state[name + KEPT] = weight[mask].view(len(weight), -1)
        weights_of_bits = 1 << torch.arange(8)
        state[name + PLACES] = (
            (mask.unflatten(1, (-1, 8)) * weights_of_bits).sum(-1).to(torch.uint8)
        )
    metadata = {
        "config": json.dumps(dataclasses.asdict(model.config)),
        "report": json.dumps(report),
    }
    part = path.with_suffix(".tmp")
    save_file(state, part, metadata=metadata)
    part.replace(path)


def as_tensor(text: bytes) -> Tensor:
    """View bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def loss_of(model: ByteLlama, window: Tensor) -> Tensor:
    """Mean cross entropy (nats) of each byte of ``window`` [B, T + 1] but the first."""
    logits = model(window[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(
    model: ByteLlama, data: Tensor, context: int, batch: int = 64, n_windows: int = 0
) -> float:
    """Mean bits per byte of ``data``, in windows of ``context`` bytes apart from each other.

    ``n_windows`` > 0 reads that many, evenly spaced; 0 reads all.
    """
    cuts = data[: (len(data) - 1) // context * context + 1].unfold(0, context + 1, context)
    if n_windows:
        cuts = cuts[torch.linspace(0, len(cuts) - 1, n_windows).long()]
    total = sum(float(loss_of(model, part.long())) * len(part) for part in cuts.split(batch))
    return total / len(cuts) / math.log(2)
