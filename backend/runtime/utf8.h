// Where a character of UTF-8 ends: for bytes out of damaged files and out of language models.
#pragma once

#include <cstddef>
#include <string_view>

namespace cuda_int4 {

/// Bytes of the well-formed character that `text` begins with; 0 if there is none (Unicode 15,
/// table 3-7: no overlong forms, no surrogates, nothing above U+10FFFF).
inline size_t utf8_length(std::string_view text) {
  const auto is_continuation = [text](size_t i) {
    return i < text.size() && (static_cast<unsigned char>(text[i]) & 0xC0) == 0x80;
  };
  if (text.empty()) return 0;
  const auto lead = static_cast<unsigned char>(text[0]);
  if (lead < 0x80) return 1;
  if (lead < 0xC2 || lead > 0xF4 || !is_continuation(1)) return 0;
  if (lead < 0xE0) return 2;
  const auto second = static_cast<unsigned char>(text[1]);
  const bool overlong = (lead == 0xE0 && second < 0xA0) || (lead == 0xF0 && second < 0x90);
  const bool surrogate = lead == 0xED && second > 0x9F;
  const bool too_large = lead == 0xF4 && second > 0x8F;
  if (overlong || surrogate || too_large || !is_continuation(2)) return 0;
  if (lead < 0xF0) return 3;
  return is_continuation(3) ? 4 : 0;
}

}  // namespace cuda_int4
