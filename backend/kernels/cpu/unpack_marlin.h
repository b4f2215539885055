// One tile of marlin.v1 or marlin24.v1, 64 rows of w, to the order of coalesced.v1.
//
//   operand     dtype   shape           order in memory
//   qdata       u32     [K/16, 2*Np]    ../marlin.h; 2:4: [K/32, 2*Np]
//   meta        u16     [K/32, 2*Np]    ../marlin.h; 2:4 only
//   codes(out)  u8      [64, K/2]       row-major; even k in the low nibble
//   scale(out)  2, 4 B  [64, n_groups]  row-major
//
// Of each row kt, 8 rows of w have 16 words [pair][word]. A byte of a word holds the codes of k (bits
// 0..3) and k + 8; bytes 0 and 1 are of even k, for two rows of w, 2 and 3 of odd k. 8 rows kt go
// together: every step is one loop over arrays of words, which compilers make vectors of. Taking a
// row kt at a time, the same steps took twice (2:4: four times) as long.
#pragma once

#include <cstring>

#include "cpu_kernels.h"
#include "numeric.h"

namespace cuda_int4 {
namespace cpu {

constexpr int kUnpackRows = 8;  // rows kt of one turn
constexpr int kUnpackWords =
    4 * kUnpackRows;  // [kt][word]: words of one pair, so rows of w by half

// The codes of a turn, as bytes of (k, k + 1): of [kt][word], 4 bytes of k < 8 in lower, of k >= 8 in
// upper.
struct UnpackedCodes {
  alignas(64) uint32_t lower[2][kUnpackWords], upper[2][kUnpackWords];  // [half]
};

// `words` is the first of 16 of each of `count` rows kt, `stride` words apart.
static inline void unpack_codes(const uint32_t* words, int64_t stride, int64_t count,
                                UnpackedCodes* to) {
  alignas(64) uint32_t bytes[4][kUnpackWords];  // [pair][kt][word]
  for (int64_t kt = 0; kt < count; ++kt) {
    for (int pair = 0; pair < 4; ++pair) {
      memcpy(&bytes[pair][4 * kt], words + kt * stride + 4 * pair, 16);
    }
  }
  // To the codes of (k, k + 1) in a byte: half 0, half 1, the same of k + 8.
  for (int pair = 0; pair < 4; ++pair) {
    for (int i = 0; i < kUnpackWords; ++i) {
      const uint32_t word = bytes[pair][i];
      const uint32_t lower = (word & 0x0f0fu) | ((word >> 12) & 0xf0f0u);
      const uint32_t upper = ((word >> 4) & 0x0f0fu) | ((word >> 16) & 0xf0f0u);
      bytes[pair][i] = lower | (upper << 16);
    }
  }
  constexpr uint32_t kEven = 0x00ff00ffu;
  for (int i = 0; i < kUnpackWords; ++i) {
    const uint32_t a = bytes[0][i], b = bytes[1][i], c = bytes[2][i], d = bytes[3][i];
    const uint32_t ab0 = (a & kEven) | ((b & kEven) << 8), ab1 = ((a >> 8) & kEven) | (b & ~kEven);
    const uint32_t cd0 = (c & kEven) | ((d & kEven) << 8), cd1 = ((c >> 8) & kEven) | (d & ~kEven);
    to->lower[0][i] = (ab0 & 0xffffu) | (cd0 << 16);
    to->lower[1][i] = (ab1 & 0xffffu) | (cd1 << 16);
    to->upper[0][i] = (ab0 >> 16) | (cd0 & 0xffff0000u);
    to->upper[1][i] = (ab1 >> 16) | (cd1 & 0xffff0000u);
  }
}

// Kept codes, as bytes of two, and their places to dense codes: weights 0..7 in first, 8..15 in
// second; 8 where none was kept. A word of places has 4 bits for each byte.
static inline void expand_24(const uint32_t (&kept)[kUnpackWords],
                             const uint32_t (&places)[kUnpackWords],
                             uint32_t (&first)[kUnpackWords], uint32_t (&second)[kUnpackWords]) {
  const auto four = [](uint32_t codes, uint32_t at) {  // codes less 8 to 16 bits
    return ((codes & 15u) << (4 * (at & 3u))) ^ (((codes >> 4) & 15u) << (at & 12u));
  };
  for (int i = 0; i < kUnpackWords; ++i) {
    const uint32_t codes = kept[i] ^ 0x88888888u, at = places[i];
    first[i] = 0x88888888u ^ four(codes, at) ^ (four(codes >> 8, at >> 4) << 16);
    second[i] = 0x88888888u ^ four(codes >> 16, at >> 8) ^ (four(codes >> 24, at >> 12) << 16);
  }
}

// Words [kt][word] of n_parts arrays to the lines of 4 rows of w: n_parts words per kt.
template <int kParts>
static inline void write_lines(const uint32_t (*const (&parts)[kParts])[kUnpackWords],
                               uint32_t (*lines)[kUnpackRows * kParts]) {
  for (int word = 0; word < 4; ++word) {
    for (int kt = 0; kt < kUnpackRows; ++kt) {
      for (int part = 0; part < kParts; ++part) {
        lines[word][kt * kParts + part] = (*parts[part])[4 * kt + word];
      }
    }
  }
}

template <bool kSparse>
static void unpack_tile_codes(const MarlinJob& job, int64_t tile, uint8_t* to) {
  constexpr int kParts = kSparse ? 4 : 2;  // words of a row of w in a row kt
  const int64_t n_kt = job.K / (8 * kParts);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(job.qdata) + 128 * tile;
  UnpackedCodes codes = {};
  alignas(64) uint32_t lines[4][kUnpackRows * kParts];
  for (int64_t kt0 = 0; kt0 < n_kt; kt0 += kUnpackRows) {
    const int64_t count = smaller(kUnpackRows, n_kt - kt0);
    // The next turn's: 512 bytes here and there, which the hardware does not see coming: 1.8 to
    // 1.7 ms at 4096 x 4096.
    for (int64_t kt = kt0 + kUnpackRows; kt < smaller(kt0 + 2 * kUnpackRows, n_kt); ++kt) {
      for (int i = 0; i < 8; ++i) __builtin_prefetch(words + kt * 2 * job.Np + 16 * i);
      if (kSparse) {
        for (int i = 0; i < 4; ++i)
          __builtin_prefetch(job.meta + kt * 2 * job.Np + 128 * tile + 32 * i);
      }
    }
    for (int64_t row = 0; row < 8; ++row) {
      unpack_codes(words + kt0 * 2 * job.Np + 16 * row, 2 * job.Np, count, &codes);
      for (int half = 0; half < 2; ++half) {
        if constexpr (kSparse) {
          // The places of one row kt: [word / 2] 64 apart, then [word % 2][upper][half].
          alignas(64) uint32_t places[2][kUnpackWords] = {};
          const uint16_t* from = job.meta + 128 * tile + 8 * row + half + kt0 * 2 * job.Np;
          for (int64_t kt = 0; kt < count; ++kt, from += 2 * job.Np) {
            for (int i = 0; i < 8; ++i) {
              places[i % 2][4 * kt + i / 2] = from[64 * (i / 4) + 2 * (i % 4)];
            }
          }
          alignas(64) uint32_t dense[4][kUnpackWords];
          expand_24(codes.lower[half], places[0], dense[0], dense[1]);
          expand_24(codes.upper[half], places[1], dense[2], dense[3]);
          write_lines<4>({&dense[0], &dense[1], &dense[2], &dense[3]}, lines);
        } else {
          write_lines<2>({&codes.lower[half], &codes.upper[half]}, lines);
        }
        for (int word = 0; word < 4; ++word) {
          const int64_t n = kSparse ? 8 * row + 4 * half + word : 16 * word + 8 * half + row;
          memcpy(to + n * (job.K / 2) + kt0 * 4 * kParts, lines[word],
                 static_cast<size_t>(count * 4 * kParts));
        }
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
  job.meta == nullptr ? unpack_tile_codes<false>(job, tile, to.codes)
                      : unpack_tile_codes<true>(job, tile, to.codes);
  unpack_scale(job, job.scale, job.scale_dtype, tile, to.scale);
  unpack_scale(job, job.zero_point, job.zero_point_dtype, tile, to.zero_point);
}

}  // namespace cpu
}  // namespace cuda_int4
