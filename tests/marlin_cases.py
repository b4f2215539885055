"""Weights for the tests of marlin.v1 and marlin24.v1, from integer arithmetic alone.

Neighbouring scales differ, and so do zero points; no torch generator is used, so that the bytes are
the same with every version of torch.
"""

from __future__ import annotations

import numpy as np
import torch

from cuda_int4.int4 import CanonicalInt4
from cuda_int4.packing import pack_nibbles

# (N, K, group_size): N below, at and beyond whole tiles; the least K, odd numbers of tiles; every
# group size, one group per row with one tile and with many.
SHAPES = (
    (1, 32, 32),
    (63, 64, 32),
    (64, 96, 32),
    (65, 128, 64),
    (100, 160, 160),
    (128, 192, 64),
    (130, 256, 128),
    (192, 512, 256),
    (70, 128, 128),
)
NONZERO = [tuple(i for i in range(4) if pattern >> i & 1) for pattern in range(16)]
PAIRS = [places for places in NONZERO if len(places) <= 2]  # 11 ways to be 2:4


def noise(n, k) -> np.ndarray:
    """Integers 0..2**16-1 that look random, of integer arrays."""
    x = (n * 2654435761 + k * 40503 + 12345) % 2**32
    for _ in range(2):
        x = (x ^ (x >> 15)) * 2246822519 % 2**32
    return x >> 16


def codes(N: int, K: int) -> np.ndarray:
    """Codes 0..15, uint8 [N, K]."""
    return (noise(*np.ogrid[:N, :K]) % 16).astype(np.uint8)


def codes_24(N: int, K: int) -> np.ndarray:
    """Codes of a 2:4 weight, uint8 [N, K]; all 11 ways of being 2:4 occur, and the code 0."""
    q = codes(N, K)
    way = noise(*np.ogrid[7 : N + 7, : K // 4]) % len(PAIRS)
    is_zero = np.array([[i not in places for i in range(4)] for places in PAIRS])
    q[is_zero[way].reshape(N, K)] = 8
    return q


def weight(q: np.ndarray, group_size: int, *, zero_point: bool = False) -> CanonicalInt4:
    """The canonical weight of codes [N, K], with float16 scales and float32 zero points."""
    N, K = q.shape
    n, g = np.ogrid[:N, : K // group_size]
    scale = np.ldexp(1 + (n * 37 + g * 11) % 128 / 128, (n + 3 * g) % 5 - 9)
    zero = (n * 29 + g * 17) % 97 / 4 - 4  # fractional, negative and beyond 15
    return CanonicalInt4(
        pack_nibbles(torch.from_numpy(q)),
        torch.from_numpy(scale).half(),
        torch.from_numpy(zero).float() if zero_point else None,
        group_size,
    )
