#include "report.h"

#include <sys/resource.h>

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <string_view>

#include "utf8.h"

namespace cuda_int4 {
namespace {

void append(std::string* out, const char* format, ...) __attribute__((format(printf, 2, 3)));
void append(std::string* out, const char* format, ...) {
  char buffer[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(buffer, sizeof(buffer), format, args);
  va_end(args);
  *out += buffer;
}

void append_json_string(std::string* out, const std::string& bytes) {
  *out += '"';
  for (size_t i = 0; i < bytes.size();) {
    const size_t length = utf8_length(std::string_view(bytes).substr(i));
    const char c = bytes[i];
    if (length == 0) {
      *out += "\\ufffd";
    } else if (c == '"' || c == '\\') {
      append(out, "\\%c", c);
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      append(out, "\\u%04x", c);
    } else {
      out->append(bytes, i, length);
    }
    i += length == 0 ? 1 : length;
  }
  *out += '"';
}

void append_stats(std::string* out, const GenerateStats& stats, double load_s) {
  append(out,
         "\"stop_reason\": \"%s\", \"prompt_tokens\": %" PRId64 ", \"new_tokens\": %" PRId64
         ", \"load_s\": %.6f, \"prefill_s\": %.6f, \"decode_s\": %.6f, "
         "\"time_to_first_token_s\": %.6f, \"prefill_tokens_per_s\": %.3f, "
         "\"decode_tokens_per_s\": %.3f, \"peak_memory_bytes\": %" PRIu64
         ", \"peak_device_memory_bytes\": %" PRIu64,
         stop_reason_name(stats.stop_reason), stats.prompt_tokens, stats.new_tokens, load_s,
         stats.prefill_s, stats.decode_s, stats.time_to_first_token_s, stats.prefill_tokens_per_s(),
         stats.decode_tokens_per_s(), peak_memory_bytes(), stats.peak_device_memory_bytes);
}

}  // namespace

const char* stop_reason_name(StopReason reason) {
  switch (reason) {
    case StopReason::kMaxNewTokens:
      return "max_new_tokens";
    case StopReason::kStopToken:
      return "stop_token";
    case StopReason::kEndOfContext:
      return "end_of_context";
    case StopReason::kInterrupted:
      return "interrupted";
  }
  return "unknown";
}

uint64_t peak_memory_bytes() {
  struct rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;  // Linux counts in KiB
}

std::string report_text(const GenerateStats& stats, double load_s) {
  std::string out;
  append(&out, "load %.2f s, peak memory %.1f MiB", load_s, peak_memory_bytes() / 1048576.0);
  if (stats.peak_device_memory_bytes > 0)
    append(&out, ", %.1f MiB on the GPU", double(stats.peak_device_memory_bytes) / 1048576.0);
  out += "\n";
  append(&out, "prompt %" PRId64 " tokens, %.1f tokens/s, first token after %.3f s\n",
         stats.prompt_tokens, stats.prefill_tokens_per_s(), stats.time_to_first_token_s);
  append(&out, "decoded %" PRId64 " tokens, %.1f tokens/s", stats.new_tokens,
         stats.decode_tokens_per_s());
  if (stats.n_sequences == 1) {
    append(&out, ", ended by %s\n", stop_reason_name(stats.stop_reason));
  } else {
    append(&out, " in %d sequences\n", stats.n_sequences);
  }
  return out;
}

std::string report_json(const GenerateStats& stats, double load_s,
                        const std::vector<int64_t>& tokens, bool text_from_bytes) {
  std::string out = "{\"tokens\": [";
  std::string bytes;
  for (size_t i = 0; i < tokens.size(); ++i) {
    append(&out, i == 0 ? "%" PRId64 : ", %" PRId64, tokens[i]);
    if (tokens[i] < 256) bytes += static_cast<char>(tokens[i]);
  }
  out += "], ";
  if (text_from_bytes) {
    out += "\"text\": ";
    append_json_string(&out, bytes);
    out += ", ";
  }
  append_stats(&out, stats, load_s);
  out += "}";
  return out;
}

std::string report_json(const std::vector<GenerateStats>& stats, const GenerateStats& total,
                        double load_s, const std::vector<std::vector<int64_t>>& tokens,
                        bool text_from_bytes) {
  std::string out = "{\"sequences\": [";
  for (size_t i = 0; i < stats.size(); ++i) {
    if (i > 0) out += ", ";
    out += report_json(stats[i], load_s, tokens[i], text_from_bytes);
  }
  append(&out, "], \"total\": {\"n_sequences\": %d, ", total.n_sequences);
  append_stats(&out, total, load_s);
  out += "}}";
  return out;
}

}  // namespace cuda_int4
