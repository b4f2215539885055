#include "upload_ring.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "checksum.h"
#include "parallel.h"

namespace cuda_int4 {

namespace {

/// A mapped file's pages, in one call and not in one fault each. Only a matter of speed.
void map_pages(const uint8_t* from, uint64_t nbytes) {
#if defined(MADV_POPULATE_READ)
  static const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(from) / page * page;
  madvise(reinterpret_cast<void*>(begin), reinterpret_cast<uintptr_t>(from) + nbytes - begin,
          MADV_POPULATE_READ);
#else
  (void)from;
  (void)nbytes;
#endif
}

}  // namespace

UploadRing::UploadRing(const Upload* uploads, size_t n, bool verify)
    : uploads_(uploads), n_(n), verify_(verify) {
  if (n > 0) {
    base_ = static_cast<uint8_t*>(uploads[0].to);
    nbytes_ = uint64_t(static_cast<uint8_t*>(uploads[n - 1].to) - base_) + uploads[n - 1].nbytes;
  }
  for (size_t i = 0; i < n; ++i) {
    const uint64_t start = uint64_t(static_cast<uint8_t*>(uploads[i].to) - base_);
    for (uint64_t done = 0; done < uploads[i].nbytes;) {
      const uint64_t at = start + done;
      const uint64_t to_end_of_unit = kUnitBytes - at % kUnitBytes;
      const uint64_t to_end_of_piece = kChecksumPieceBytes - done % kChecksumPieceBytes;
      const uint64_t m = std::min({uploads[i].nbytes - done, to_end_of_unit, to_end_of_piece});
      while (first_segment_.size() <= at / kUnitBytes) first_segment_.push_back(segments_.size());
      segments_.push_back({static_cast<const uint8_t*>(uploads[i].from) + done, at, m, 0});
      done += m;
    }
  }
  first_segment_.push_back(segments_.size());
}

uint64_t UploadRing::buffer_bytes() const { return std::min(n_chunks(), kSlots) * kChunkBytes; }

bool UploadRing::run(void* buffers, UploadTransport& transport) {
  buffers_ = static_cast<uint8_t*>(buffers);
  transport_ = &transport;
  const auto n_lanes = int64_t(std::min(n_units(), kMaxLanes));
  parallel_for(
      n_lanes, 1,
      [](void* self, int64_t begin, int64_t end) {
        for (int64_t lane = begin; lane < end; ++lane) static_cast<UploadRing*>(self)->run_lane();
      },
      this);
  return !failed();
}

void UploadRing::run_lane() {
  if (!transport_->enter_thread()) failed_ = true;
  while (!failed()) {
    const size_t unit = next_unit_.fetch_add(1);
    if (unit >= n_units()) break;
    const size_t chunk = unit / kUnitsPerChunk;
    if (!open_chunk(chunk, unit % kUnitsPerChunk == 0)) break;
    fill(unit);
    Slot& slot = slots_[chunk % kSlots];
    const size_t n_in_chunk = std::min(kUnitsPerChunk, n_units() - chunk * kUnitsPerChunk);
    if (slot.n_filled.fetch_add(1) + 1 < n_in_chunk) continue;
    slot.n_filled = 0;
    const uint64_t at = chunk * kChunkBytes;
    const uint8_t* buffer = buffers_ + chunk % kSlots * kChunkBytes;
    if (!transport_->send(chunk % kSlots, base_ + at, buffer, std::min(kChunkBytes, nbytes_ - at)))
      failed_ = true;
    slot.sent.store(chunk + 1, std::memory_order_release);
  }
  transport_->leave_thread();
}

/// The chunk's buffer is free: whoever has its first unit waits for the chunk before it in the slot,
/// and tells the others. Units are taken in order, so what is waited for is always under way.
bool UploadRing::open_chunk(size_t chunk, bool first) {
  Slot& slot = slots_[chunk % kSlots];
  const auto spin_until = [this](const std::atomic<size_t>& value, size_t least) {
    while (value.load(std::memory_order_acquire) < least) {
      if (failed()) return false;
      std::this_thread::yield();
    }
    return true;
  };
  if (!first) return spin_until(slot.open, chunk + 1);
  if (chunk >= kSlots) {
    if (!spin_until(slot.sent, chunk - kSlots + 1)) return false;
    if (!transport_->wait(chunk % kSlots)) {
      failed_ = true;
      return false;
    }
  }
  slot.open.store(chunk + 1, std::memory_order_release);
  return true;
}

void UploadRing::fill(size_t unit) {
  const size_t chunk = unit / kUnitsPerChunk;
  uint8_t* buffer = buffers_ + chunk % kSlots * kChunkBytes;
  for (size_t i = first_segment_[unit]; i < first_segment_[unit + 1]; ++i) {
    Segment& segment = segments_[i];
    map_pages(segment.from, segment.nbytes);
    if (verify_) segment.crc = crc32c(segment.from, segment.nbytes);  // reads it into the cache
    std::memcpy(buffer + (segment.at - chunk * kChunkBytes), segment.from, segment.nbytes);
  }
}

size_t UploadRing::first_damaged() const {
  size_t next = 0;  // segment
  std::vector<uint32_t> crcs;
  for (size_t i = 0; i < n_; ++i) {
    crcs.clear();
    uint64_t done = 0;
    for (; done < uploads_[i].nbytes; ++next) {
      const Segment& segment = segments_[next];
      if (done % kChecksumPieceBytes == 0)
        crcs.push_back(segment.crc);
      else
        crcs.back() = crc32c_join(crcs.back(), segment.crc, segment.nbytes);
      done += segment.nbytes;
    }
    if (checksum_of_pieces(crcs.data(), crcs.size()) != uploads_[i].checksum) return i;
  }
  return n_;
}

}  // namespace cuda_int4
