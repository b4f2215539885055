"""Small modules for the delegate's tests, and what an export of one looks like.

Each has at least one int4 linear of 64 features and something about its inputs or outputs that a
delegate can get wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cuda_int4

K = 64


def dim(name: str = "S", most: int = 16) -> Any:
    return torch.export.Dim(name, min=1, max=most)


class Linear(nn.Module):
    """y = linear(x)."""

    def __init__(self, N: int = 48, bias: bool = True, group_size: int = 32):
        super().__init__()
        self.proj = nn.Linear(K, N, bias=bias)
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class ManyOutputs(Linear):
    """The input, the result, views of both, the result again, a constant, and an int."""

    def __init__(self) -> None:
        super().__init__(N=K)
        self.register_buffer("constant", torch.arange(6.0).view(2, 3))

    def forward(self, x: Tensor) -> tuple[Any, ...]:
        y = self.proj(x)
        return x, y, y.view(-1, K), y + 1, self.constant, x.shape[0], x[:, :4]


class Offset(Linear):
    """A dense constant of 48 floats in the delegate."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.linspace(-1, 1, 48))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) + self.offset


class TakesInt(Linear):
    """A size that comes in from outside the delegate as an int."""

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        n = like.shape[0]
        return self.proj(x[:n]) * n


class Cache(Linear):
    """Adds up all it has seen, row by row, in a mutable buffer."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__(N=K)
        self.register_buffer("seen", torch.zeros(16, K, dtype=dtype))

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        y = self.proj(x).to(self.seen.dtype)
        self.seen.index_copy_(0, pos, y)
        return self.seen.sum(0)


class Hybrid(Linear):
    """cdist has no kernel in the delegate: it runs between two of them."""

    def __init__(self) -> None:
        super().__init__(N=K)
        self.after = nn.Linear(K, K)

    def forward(self, x: Tensor) -> Tensor:
        y = self.proj(x)
        distances = torch.cdist(y, y)
        return self.after(y) + distances.sum()


class TwoLinears(nn.Module):
    """Two int4 linears with N of no whole tiles, the first used twice."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.up = nn.Linear(K, 160, dtype=dtype)
        self.down = nn.Linear(160, 70, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x) + self.up(-2 * x)))


def make(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with random int4 weights, in eval mode."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.eval().requires_grad_(False)
    group_size = getattr(model, "group_size", 32)
    cuda_int4.quantize_(model, cuda_int4.Int4Config(group_size=group_size, symmetric=False))
    return model


def rows(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def write(
    model: nn.Module,
    path: Path,
    inputs: tuple[Any, ...],
    dynamic_shapes: Any = None,
    **options: Any,
) -> Path:
    """Export, sealed."""
    return cuda_int4.export(model, inputs, path, dynamic_shapes=dynamic_shapes, **options)
