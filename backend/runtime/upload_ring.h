// UploadRing -- many threads fill page-locked buffers in the order of the device's memory; each full
// one is sent in one transfer.
//
// The destination is cut into chunks of kChunkBytes, a chunk into units. Threads take units in order:
// hash, copy into the chunk's buffer, and whoever finishes a chunk sends it. A ring of kSlots buffers
// keeps the bus busy meanwhile. One transfer to 2 MiB, not one to each thread's part or to each
// constant, because the driver takes one call at a time.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "device.h"

namespace cuda_int4 {

// What moves the buffers. Called from many threads at once; false is an error, which ends the upload.
class UploadTransport {
 public:
  virtual ~UploadTransport() = default;
  /// The calling thread begins, or ends, to work for this upload.
  virtual bool enter_thread() = 0;
  virtual void leave_thread() = 0;
  /// Sends buffer `slot`; returns before it has arrived.
  virtual bool send(size_t slot, void* to, const void* buffer, uint64_t nbytes) = 0;
  /// Waits until the latest send of `slot` has left its buffer.
  virtual bool wait(size_t slot) = 0;
};

class UploadRing {
 public:
  static constexpr uint64_t kChunkBytes = uint64_t(2) << 20;
  static constexpr uint64_t kUnitBytes = uint64_t(1) << 18;  // stays in a core's cache
  static constexpr size_t kSlots = 8;

  /// Destinations ascend and lie in one allocation; what is between two of them is written, too.
  UploadRing(const Upload* uploads, size_t n, bool verify);

  /// Bytes of page-locked memory that run() needs.
  uint64_t buffer_bytes() const;
  /// On the thread pool; false if the transport failed. Sends may still be under way afterwards.
  bool run(void* buffers, UploadTransport& transport);
  /// After run() with `verify`: the first upload whose bytes have another checksum; n if none has.
  size_t first_damaged() const;

 private:
  static constexpr size_t kUnitsPerChunk = kChunkBytes / kUnitBytes;
  static constexpr size_t kMaxLanes = 32;

  struct Segment {  // of one upload, in one unit and one piece of the checksum
    const uint8_t* from;
    uint64_t at;  // in the destination
    uint64_t nbytes;
    uint32_t crc;
  };
  struct Slot {
    std::atomic<size_t> open{0};  // the chunk after the one whose units may be filled in
    std::atomic<size_t> sent{0};  // the chunk after the one that was sent
    std::atomic<size_t> n_filled{0};
  };

  size_t n_units() const { return first_segment_.size() - 1; }
  size_t n_chunks() const { return (n_units() + kUnitsPerChunk - 1) / kUnitsPerChunk; }
  void run_lane();
  bool open_chunk(size_t chunk, bool first);
  void fill(size_t unit);
  bool failed() const { return failed_.load(std::memory_order_relaxed); }

  const Upload* uploads_;
  size_t n_;
  bool verify_;
  uint8_t* base_ = nullptr;  // of the destination
  uint64_t nbytes_ = 0;
  std::vector<Segment> segments_;
  std::vector<size_t> first_segment_;  // of each unit, and the end
  uint8_t* buffers_ = nullptr;
  UploadTransport* transport_ = nullptr;
  Slot slots_[kSlots];
  std::atomic<size_t> next_unit_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace cuda_int4
