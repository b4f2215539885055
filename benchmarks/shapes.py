"""The shapes that are timed: decoders and encoders by name, and the linears (N, K) they consist of.

Linears that read the same x count as one, as an export fuses them: the query, key and value
projections, and gate and up of a gated feed-forward layer.
"""

from __future__ import annotations

LINEARS: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    "llama-3-70b": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (128256, 8192)),
    "gemma-4-31b": (
        (16384, 5376),  # the sliding layers: 32 query and 2 x 16 key and value heads of 256
        (5376, 8192),
        (18432, 5376),  # the full layers: 32 query and 4 key heads of 512, which are the values too
        (5376, 16384),
        (43008, 5376),
        (5376, 21504),
        (262144, 5376),
    ),
    "vit-h": ((3840, 1280), (1280, 1280), (5120, 1280), (1280, 5120)),
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
