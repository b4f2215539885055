// DecodeSteps -- decoding with no host in the loop: forward, the choice of the next token and its way
// into the next forward are queued on the device, and the host reads the tokens behind it.
//
//   begin_steps   the rows and where each stands; nothing runs yet
//   queue_step    one more step of all rows, behind those that are queued; does not wait
//   take_step     waits for the oldest step not taken: its tokens
//   stop_row      from the steps queued after this on the row repeats itself
//   end_steps     waits for everything queued
//
// Tokens are those that Sampler (sampler.h) chooses. A step that is queued and not wanted does no harm:
// it writes to the cache behind what the host counts.
#pragma once

#include <executorch/runtime/core/error.h>

#include <cstddef>
#include <cstdint>

#include "../kernels/sampling.h"

namespace cuda_int4 {

struct DecodeRow {
  SampleRule rule;
  int64_t token;     // to read next
  int64_t position;  // at which it is read
  // The first position that the row does not read. It stands still there, and a row whose position is
  // not below from the beginning does so at once: `token` is then what was read at `position`.
  int64_t end_position;
};

struct DecodedToken {
  int64_t token;
  SampleStatus status;  // another than kSampled: no token came, and the row stands still
};

class DecodeSteps {
 public:
  /// Steps that may be queued and not taken.
  static constexpr int64_t kMaxQueued = 3;

  virtual ~DecodeSteps() = default;
  virtual executorch::runtime::Error begin_steps(const DecodeRow* rows, size_t n_rows,
                                                 int64_t vocab_size) = 0;
  virtual executorch::runtime::Error queue_step() = 0;
  /// One for each row.
  virtual executorch::runtime::Error take_step(DecodedToken* tokens) = 0;
  virtual executorch::runtime::Error stop_row(size_t row) = 0;
  virtual executorch::runtime::Error end_steps() = 0;
};

}  // namespace cuda_int4
