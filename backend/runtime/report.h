// The times at the end of a generation, for people and for programs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "decoder.h"
#include "visibility.h"

namespace cuda_int4 {

// "max_new_tokens", "stop_token", "end_of_context" or "interrupted".
CUDA_INT4_EXPORT const char* stop_reason_name(StopReason reason);

// The most memory the process has had resident, in bytes.
CUDA_INT4_EXPORT uint64_t peak_memory_bytes();

// A few lines, each ending in \n.
CUDA_INT4_EXPORT std::string report_text(const GenerateStats& stats, double load_s);

// One JSON object on one line, without a \n. text_from_bytes: tokens below 256 are bytes of UTF-8,
// and "text" holds what they spell, U+FFFD where they are none.
CUDA_INT4_EXPORT std::string report_json(const GenerateStats& stats, double load_s,
                                         const std::vector<int64_t>& tokens, bool text_from_bytes);

// The same of several that ran together: what each gave under "sequences", in their order, and "total".
CUDA_INT4_EXPORT std::string report_json(const std::vector<GenerateStats>& stats,
                                         const GenerateStats& total, double load_s,
                                         const std::vector<std::vector<int64_t>>& tokens,
                                         bool text_from_bytes);

}  // namespace cuda_int4
