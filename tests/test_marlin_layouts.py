"""Index maps of marlin.v1 and marlin24.v1: every place once, and what a warp's lanes must find.

The maps say where a weight goes (scatter). Here they are held to the formats' other definition,
which says what a place holds (gather), and to the operands of the tensor core instructions.
"""

import numpy as np
import pytest

from cuda_int4 import marlin_layouts as layouts
from cuda_int4.layouts import LayoutTag
from marlin_cases import SHAPES

TILES = [(64, 32), (64, 96), (192, 64), (128, 160)]


def test_tags_have_the_form_of_tags():
    assert [str(LayoutTag.parse(tag)) for tag in layouts.K_TILE] == ["marlin.v1", "marlin24.v1"]


def test_n_is_padded_to_whole_tiles():
    assert [layouts.padded_n(N) for N in (1, 63, 64, 65, 128, 129)] == [64, 64, 64, 128, 128, 192]


@pytest.mark.parametrize("N, K, group_size", SHAPES)
def test_maps_reach_places_of_their_own_and_all_of_them_where_n_is_whole(N, K, group_size):
    n_groups = K // group_size
    Np = layouts.padded_n(N)
    for rows in (N, Np):
        n, k = np.ogrid[:rows, :K]
        g, kc = np.arange(n_groups)[None], np.arange(K // 2)[None]
        dense, sparse = layouts.MARLIN, layouts.MARLIN24
        maps = [
            (layouts.marlin_bit_offset(n, k, N, K), 4, 8, layouts.qdata_shape(dense, N, K)),
            (layouts.marlin24_bit_offset(n, kc, N, K), 4, 8, layouts.qdata_shape(sparse, N, K)),
            (layouts.marlin24_meta_bit_offset(n, k[:, ::4], N, K), 4, 16, layouts.meta_shape(N, K)),
        ]
        for scale_index in (layouts.marlin_scale_index, layouts.marlin24_scale_index):
            places = scale_index(n, g, N, n_groups)
            maps.append((places, 1, 1, layouts.scale_shape(N, n_groups)))
        for places, step, per_element, shape in maps:
            total = np.prod(shape) * per_element
            reached = np.unique(places)
            assert reached.size == places.size and np.all(reached % step == 0)
            assert reached.min() >= 0 and reached.max() < total
            if rows == Np:
                assert reached.size == total // step


def gathered(W: np.ndarray, t: np.ndarray, sparse: bool) -> tuple[np.ndarray, np.ndarray]:
    """(n, k within the tile) that nibble t of word W of a row of tiles holds."""
    c, i, j = W >> 7, (W & 127) >> 2, W & 3
    k = 2 * (i & 3) + (t >> 2) + 8 * (t & 1)
    upper = t >> 1 & 1
    n = 64 * c + 8 * (i >> 2) + 4 * upper + j if sparse else 64 * c + 16 * j + (i >> 2) + 8 * upper
    return n, k


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("N, K", TILES)
def test_what_a_nibble_holds_is_scattered_to_it(N, K, sparse):
    kept = K // 2 if sparse else K
    offset = layouts.marlin24_bit_offset if sparse else layouts.marlin_bit_offset
    kt, W, t = np.ogrid[: kept // 16, : 2 * N, :8]
    n, k = gathered(W, t, sparse)
    bits = 32 * (kt * 2 * N + W) + 4 * t
    assert np.array_equal(offset(n, 16 * kt + k, N, K), bits)


def test_scales_are_permuted_as_the_formats_have_it():
    def sources(scale_index, n_groups):
        """Which n each of the first places holds, for group 0."""
        n = np.arange(64)
        held = np.empty(64, int)
        held[scale_index(n, 0, 64, n_groups)] = n
        return held

    dense, sparse = layouts.marlin_scale_index, layouts.marlin24_scale_index
    a, b = np.divmod(np.arange(64), 8)
    assert np.array_equal(sources(dense, 2), a + 8 * b)
    m, a, b = (x.ravel() for x in np.mgrid[:8, :4, :2])
    assert np.array_equal(sources(sparse, 2), 8 * m + a + 4 * b)
    c, a, b, e = (x.ravel() for x in np.mgrid[:2, :4, :4, :2])
    assert np.array_equal(sources(dense, 1), 32 * c + 2 * a + 8 * b + e)
    assert np.array_equal(sources(sparse, 1), np.arange(64))
    assert dense(3, 5, 65, 8) == 5 * 128 + 24  # groups are rows of Np


# ---- lanes ----


def a_fragment(words: np.ndarray) -> np.ndarray:
    """The A operand [16, 16] that 32 lanes hold, one word each, in m16n8k16 (PTX ISA).

    Lane 4g + t has, in registers 0..3, two neighbours along k from column 2t (+ 8 in registers 2
    and 3) of row g (+ 8 in registers 1 and 3). Nibbles i and i + 4 make a register: that is what
    one mask and one shift of a word give.
    """
    nibble_of_register = (0, 2, 1, 3)
    A = np.zeros((16, 16), int)
    for lane, word in enumerate(words.tolist()):
        g, t = divmod(lane, 4)
        for register, nibble in enumerate(nibble_of_register):
            for e in range(2):
                row, column = g + 8 * (register & 1), 2 * t + e + 8 * (register >> 1)
                A[row, column] = word >> 4 * (nibble + 4 * e) & 15
    return A


def scattered(offset, values: np.ndarray, N: int, K: int, n_bits: int, word_bits: int):
    """Values [N, ..] put where a map says, as words."""
    bits = offset(*np.ogrid[: values.shape[0], : values.shape[1]], N, K).ravel()
    words = np.zeros(n_bits // word_bits, np.uint32)
    np.bitwise_or.at(
        words, bits // word_bits, values.ravel().astype(np.uint32) << (bits % word_bits)
    )
    return words


@pytest.mark.parametrize("N, K", TILES)
def test_a_warp_finds_the_operands_of_four_dense_instructions(N, K):
    q = np.random.default_rng(0).integers(0, 16, (N, K))
    B = scattered(layouts.marlin_bit_offset, q, N, K, 4 * N * K, 32).reshape(K // 16, 2 * N)
    for kt in range(K // 16):
        for c in range(N // 64):
            loads = B[kt, 128 * c : 128 * c + 128].reshape(32, 4)  # 16 bytes by lane
            for j in range(4):
                rows = slice(64 * c + 16 * j, 64 * c + 16 * j + 16)
                assert np.array_equal(a_fragment(loads[:, j]), q[rows, 16 * kt : 16 * kt + 16])


@pytest.mark.parametrize("N, K", TILES)
def test_a_warp_finds_operands_and_metadata_of_four_sparse_instructions(N, K):
    """mma.sp m16n8k32: selector s takes the metadata of lanes 4g + 2s and 4g + 2s + 1.

    The first has the columns 0..15, the second 16..31; the low half is row g, the high row g + 8.
    """
    generator = np.random.default_rng(0)
    kept = generator.integers(0, 16, (N, K // 2))
    places = generator.choice([0x4, 0x8, 0x9, 0xC, 0xD, 0xE], (N, K // 4))
    w = np.zeros((N, K), int)
    rows, fours = np.ogrid[:N, : K // 4]
    w[rows, 4 * fours + places % 4] = kept[:, ::2]
    w[rows, 4 * fours + places // 4] = kept[:, 1::2]

    B = scattered(layouts.marlin24_bit_offset, kept, N, K, 2 * N * K, 32).reshape(-1, 2 * N)
    meta = scattered(
        lambda n, four, N, K: layouts.marlin24_meta_bit_offset(n, 4 * four, N, K),
        places, N, K, N * K, 32,
    ).reshape(-1, N)  # fmt: skip
    for tile in range(K // 32):
        for R in range(N // 64):
            loads = B[tile, 128 * R : 128 * R + 128].reshape(32, 4)
            for j in range(4):
                b1, selector = j >> 1, j & 1
                lanes = meta[tile, 64 * R + 32 * b1 : 64 * R + 32 * b1 + 32]
                operand = expanded(a_fragment(loads[:, j]), lanes, selector)
                g = np.arange(8)
                rows = 64 * R + 8 * g + j
                wanted = w[np.concatenate([rows, rows + 4]), 32 * tile : 32 * tile + 32]
                assert np.array_equal(operand, wanted)


def expanded(A: np.ndarray, lanes: np.ndarray, selector: int) -> np.ndarray:
    """The dense operand [16, 32] of compressed A [16, 16] and 32 metadata words."""
    dense = np.zeros((16, 32), int)
    for row in range(16):
        for four in range(8):
            word = int(lanes[4 * (row % 8) + 2 * selector + four // 4])
            nibble = word >> (16 * (row // 8) + 4 * (four % 4)) & 15
            dense[row, 4 * four + nibble % 4] = A[row, 2 * four]
            dense[row, 4 * four + nibble // 4] = A[row, 2 * four + 1]
    return dense
