// The checksum of everything we write: blobs, constants, whole files.
//
//   checksum(data) = CRC-32C of [CRC-32C of each 4 MiB piece, as u32 little-endian]
//
// Pieces make it parallel, CRC-32C makes it one instruction per 8 bytes; it finds every burst of up
// to 32 flipped bits. It guards against damage, not against malice.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_int4 {

constexpr uint64_t kChecksumPieceBytes = uint64_t(4) << 20;

/// Pieces are hashed on the thread pool. 0 bytes have no pieces: the CRC of nothing, which is 0.
/// `so_far`: the checksum of what precedes, a multiple of 4 MiB, to go on from.
uint32_t checksum(const void* data, uint64_t nbytes, uint32_t so_far = 0);

/// The same of the CRC-32C of each piece, for who hashes the pieces while doing something else.
uint32_t checksum_of_pieces(const uint32_t* crcs, size_t n_pieces);

/// Plain CRC-32C (Castagnoli, reflected, RFC 3720 appendix B.4) with the fastest code this CPU runs.
uint32_t crc32c(const void* data, size_t nbytes);

/// The CRC-32C of two runs of bytes, from those of each and the length of the second.
uint32_t crc32c_join(uint32_t first, uint32_t second, uint64_t second_nbytes);

/// The portable code, whatever the CPU: what the fast ones are tested against.
uint32_t crc32c_portable(const void* data, size_t nbytes);

}  // namespace cuda_int4
