// Packed signs: bit b of word k of a row is column 32 k + b; a set bit is +1; padding bits are 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace falcon {

// signs: rows x f bytes, 0 or not 0. words: rows x ceil(f / 32), every word is written.
void pack_signs(const std::uint8_t *signs, std::size_t rows, std::size_t f, std::uint32_t *words);

// words as above. signs: rows x f, each -1 or +1.
void unpack_signs(const std::uint32_t *words, std::size_t rows, std::size_t f, float *signs);

} // namespace falcon
