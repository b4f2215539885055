"""Where the bits of a weight lie in ``marlin.v1`` and ``marlin24.v1``: index maps, no torch.

Both keep codes in the order in which the lanes of a warp hold the weights-as-A operand of a tensor
core instruction, m16n8k16 (dense) or m16n8k32 (2:4 sparse): one 16-byte load gives a lane its share
of four instructions. The orders are those of Marlin (IST-DASLab, 2024) and Sparse-Marlin, and bit
for bit those of GPTQ "marlin" and compressed-tensors "marlin-24" checkpoints.

    qdata       [K/16, 2*Np] (2:4: [K/32, 2*Np]) words of 32 bits, little-endian, 8 codes each;
                Np is N rounded up to 64, and the rows added have scale 0
    scale       [n_groups, Np], permuted within blocks of N; zero_point, where there is one, in the
                order of scale and, as everywhere here, a float in units of q
    meta        2:4 only: [K/32, 2*Np] words of 16 bits; 4 bits for each 4 weights along K

The maps are plain arithmetic, on ints or on integer arrays, as in layouts.py, whose rows they are.
``marlin24.v1`` keeps half of the codes: its ``qdata`` map takes kc, the place of a kept code along
K/2.
"""

from __future__ import annotations

MARLIN = "marlin.v1"
MARLIN24 = "marlin24.v1"

N_TILE = 64  # N is padded to a multiple of it
# K needs no padding: every K is a multiple of 32 (layouts.K_MULTIPLE), a tile is 16 codes kept.
K_TILE = {MARLIN: 16, MARLIN24: 32}

# How scales are permuted: n = block + b * (A * E) + a * E + e moves to block + a * (B * E) + b * E
# + e, for (A, B, E) below; a block is A * B * E. By layout and whether a row has but one group.
SCALE_SWAP = {
    (MARLIN, False): (8, 8, 1),
    (MARLIN, True): (4, 4, 2),
    (MARLIN24, False): (4, 2, 1),
    (MARLIN24, True): (1, 1, 1),
}


def padded_n(N: int) -> int:
    """N rounded up to whole tiles."""
    return -(-N // N_TILE) * N_TILE


def marlin_bit_offset(n: int, k: int, N: int, K: int) -> int:
    """First of the 4 bits of code (n, k) in ``marlin.v1``, in bits from the start of qdata."""
    word = 128 * (n // 64) + 4 * (4 * (n % 8) + k % 8 // 2) + n % 64 // 16
    nibble = 4 * (k % 2) + 2 * (n // 8 % 2) + k // 8 % 2
    return 32 * (k // 16 * 2 * padded_n(N) + word) + 4 * nibble


def marlin24_bit_offset(n: int, kc: int, N: int, K: int) -> int:
    """First of the 4 bits of kept code (n, kc) in ``marlin24.v1``, in bits from qdata's start.

    Of the weights 4 * (kc // 2) .. 4 * (kc // 2) + 3 of row n, kc even is the first one kept and kc
    odd the second; ``meta`` has their places.
    """
    word = 128 * (n // 64) + 16 * (n % 64 // 8) + 4 * (kc % 8 // 2) + n % 4
    nibble = 4 * (kc % 2) + 2 * (n // 4 % 2) + kc // 8 % 2
    return 32 * (kc // 16 * 2 * padded_n(N) + word) + 4 * nibble


def marlin24_meta_bit_offset(n: int, k: int, N: int, K: int) -> int:
    """First of the 4 bits of ``meta`` that place the kept of weights k - k % 4 .. + 3 of row n.

    The lower two bits are the place of the first one kept, the upper two that of the second.
    """
    cc = k // 16  # one 16-bit word has the places of 16 weights
    word = (
        2 * padded_n(N) * (cc // 2)
        + 128 * (n // 64)
        + 64 * (n // 2 % 2)
        + 8 * (n % 64 // 8)
        + 4 * (n % 2)
        + 2 * (cc % 2)
        + n // 4 % 2
    )
    return 16 * word + 4 * (k // 4 % 4)


def marlin_scale_index(n: int, g: int, N: int, n_groups: int) -> int:
    """Element of ``scale`` and of ``zero_point`` of group g of row n, ``marlin.v1``."""
    return g * padded_n(N) + _swapped(n, *SCALE_SWAP[MARLIN, n_groups == 1])


def marlin24_scale_index(n: int, g: int, N: int, n_groups: int) -> int:
    """Element of ``scale`` of group g of row n, ``marlin24.v1``."""
    return g * padded_n(N) + _swapped(n, *SCALE_SWAP[MARLIN24, n_groups == 1])


def qdata_shape(tag: str, N: int, K: int) -> tuple[int, int]:
    """Shape of qdata in bytes, uint8; as words of 32 bits it is [K / K_TILE, 2 * Np]."""
    return K // K_TILE[tag], 8 * padded_n(N)


def meta_shape(N: int, K: int) -> tuple[int, int]:
    """Shape of meta, int16."""
    return K // 32, 2 * padded_n(N)


def scale_shape(N: int, n_groups: int) -> tuple[int, int]:
    """Shape of scale and of zero_point."""
    return n_groups, padded_n(N)


def _swapped(n: int, A: int, B: int, E: int) -> int:
    a, b, e = n // E % A, n // (A * E) % B, n % E
    return n - n % (A * B * E) + (a * B + b) * E + e
