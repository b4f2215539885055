// One tile of marlin.v1 or marlin24.v1, 64 rows of w, to the order of coalesced.v1.
//
//   operand     dtype   shape           order in memory
//   qdata       u32     [K/16, 2*Np]    ../marlin.h; 2:4: [K/32, 2*Np]
//   meta        u16     [K/32, 2*Np]    ../marlin.h; 2:4 only
//   codes(out)  u8      [64, K/2]       row-major; even k in the low nibble
//   scale(out)  2, 4 B  [64, n_groups]  row-major
//
// A block is what one row kt has for 8 rows of w: 16 words [pair][word], in which a byte holds the
// codes of k and k + 8 (bits 0..3, 4..7), bytes 0 and 1 those of even k for two rows, 2 and 3 of
// odd k. Bytes are joined with shifts of whole words, so that the compiler makes vectors of it.
#pragma once

#include <cstring>

#include "cpu_kernels.h"
#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

constexpr int64_t kUnpackTiles = 8;  // rows kt of one turn: 64 bytes of each row of w

// words [4 pair][4 word] to rows [4 word][2 half]: 4 bytes of lower k, 4 of upper k, each (k, k + 1).
static inline void unpack_block(const uint32_t* words, uint32_t (&rows)[4][2][2]) {
  uint32_t bytes[4]
                [4];  // per pair and word: half 0 lower, half 1 lower, half 0 upper, half 1 upper
  for (int i = 0; i < 16; ++i) {
    const uint32_t word = words[i];
    const uint32_t lower = (word & 0x0f0fu) | ((word >> 12) & 0xf0f0u);
    const uint32_t upper = ((word >> 4) & 0x0f0fu) | ((word >> 16) & 0xf0f0u);
    bytes[i / 4][i % 4] = lower | (upper << 16);
  }
  constexpr uint32_t kEven = 0x00ff00ffu;
  for (int j = 0; j < 4; ++j) {
    const uint32_t a = bytes[0][j], b = bytes[1][j], c = bytes[2][j], d = bytes[3][j];
    const uint32_t ab[2] = {(a & kEven) | ((b & kEven) << 8), ((a >> 8) & kEven) | (b & ~kEven)};
    const uint32_t cd[2] = {(c & kEven) | ((d & kEven) << 8), ((c >> 8) & kEven) | (d & ~kEven)};
    for (int half = 0; half < 2; ++half) {
      rows[j][half][0] = (ab[half] & 0xffffu) | (cd[half] << 16);
      rows[j][half][1] = (ab[half] >> 16) | (cd[half] & 0xffff0000u);
    }
  }
}

// Kept codes of 8 rows and their places to 16 dense bytes per row; 8 where none was kept. `places`
// is [2 j / 2][2 j % 2][2 upper][2 half] words of 16 bits, at 64-word steps of the first index.
static inline void expand_block(const uint32_t (&kept)[4][2][2], const uint16_t* places,
                                uint16_t (&rows)[4][2][8]) {
  for (int j = 0; j < 4; ++j) {
    for (int half = 0; half < 2; ++half) {
      uint32_t codes[8], meta[8];
      for (int i = 0; i < 8; ++i) {
        const uint32_t word = places[64 * (j / 2) + 4 * (j % 2) + 2 * (i / 4) + half];
        codes[i] = (kept[j][half][i / 4] >> (8 * (i % 4))) ^ 0x88u;
        meta[i] = word >> (4 * (i % 4));
      }
      for (int i = 0; i < 8; ++i) {
        const uint32_t first = (codes[i] & 15u) << (4 * (meta[i] & 3u));
        const uint32_t second = ((codes[i] >> 4) & 15u) << (meta[i] & 12u);
        rows[j][half][i] = static_cast<uint16_t>(first ^ second ^ 0x8888u);
      }
    }
  }
}

template <bool kSparse>
static void unpack_codes(const MarlinJob& job, int64_t tile, uint8_t* to) {
  constexpr int64_t kTileBytes = kSparse ? 16 : 8;  // of one row of w in a row kt
  const int64_t n_kt = job.K / (kSparse ? 32 : 16);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(job.qdata) + 128 * tile;
  const uint16_t* places = job.meta + (kSparse ? 128 * tile : 0);
  for (int64_t kt0 = 0; kt0 < n_kt; kt0 += kUnpackTiles) {
    const int64_t count = smaller(kUnpackTiles, n_kt - kt0);
    for (int64_t row = 0; row < 8; ++row) {
      alignas(64) uint8_t lines[8][kUnpackTiles * kTileBytes];  // [word][half]
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = (kt0 + i) * 2 * job.Np;
        uint32_t kept[4][2][2];
        unpack_block(words + at + 16 * row, kept);
        if constexpr (kSparse) {
          uint16_t dense[4][2][8];
          expand_block(kept, places + at + 8 * row, dense);
          for (int r = 0; r < 8; ++r) memcpy(lines[r] + 16 * i, dense[r / 2][r % 2], 16);
        } else {
          for (int r = 0; r < 8; ++r) memcpy(lines[r] + 8 * i, kept[r / 2][r % 2], 8);
        }
      }
      for (int r = 0; r < 8; ++r) {
        const int64_t n =
            kSparse ? 8 * row + 4 * (r % 2) + r / 2 : 16 * (r / 2) + 8 * (r % 2) + row;
        memcpy(to + n * (job.K / 2) + kt0 * kTileBytes, lines[r],
               static_cast<size_t>(count * kTileBytes));
      }
    }
  }
}

// The place of row n of a tile among the tile's 64 scales of one group.
static inline int64_t marlin_scale_place(const MarlinJob& job, int64_t n) {
  const bool one_group = job.K == job.group_size;
  if (job.meta != nullptr) return one_group ? n : n / 8 * 8 + n % 4 * 2 + n / 4 % 2;
  return one_group ? n / 32 * 32 + n / 2 % 4 * 8 + n / 8 % 4 * 2 + n % 2 : n % 8 * 8 + n / 8;
}

template <class T>
static void unpack_scale(const MarlinJob& job, const void* from, int64_t tile, void* to) {
  const int64_t n_groups = job.K / job.group_size;
  int64_t place[64];
  for (int64_t n = 0; n < 64; ++n) place[n] = marlin_scale_place(job, n);
  for (int64_t g = 0; g < n_groups; ++g) {
    const T* row = static_cast<const T*>(from) + g * job.Np + 64 * tile;
    for (int64_t n = 0; n < 64; ++n) static_cast<T*>(to)[n * n_groups + g] = row[place[n]];
  }
}

static inline void unpack_scale(const MarlinJob& job, const void* from, DType dtype, int64_t tile,
                                void* to) {
  if (from == nullptr) return;
  dtype == DType::kFloat32 ? unpack_scale<uint32_t>(job, from, tile, to)
                           : unpack_scale<uint16_t>(job, from, tile, to);
}

static void unpack_marlin(const MarlinJob& job, int64_t tile, const MarlinTile& to) {
  job.meta == nullptr ? unpack_codes<false>(job, tile, to.codes)
                      : unpack_codes<true>(job, tile, to.codes);
  unpack_scale(job, job.scale, job.scale_dtype, tile, to.scale);
  unpack_scale(job, job.zero_point, job.zero_point_dtype, tile, to.zero_point);
}

}  // namespace cpu
}  // namespace cuda_int4
