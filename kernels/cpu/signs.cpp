#include "signs.hpp"

#include <algorithm>
#include <bit>

namespace falcon {

void pack_signs(const std::uint8_t *signs, std::size_t rows, std::size_t f, std::uint32_t *words) {
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t first = 0; first < f; first += 32) {
            const std::size_t count = std::min<std::size_t>(32, f - first);
            std::uint32_t word = 0;
            for (std::size_t bit = 0; bit < count; ++bit)
                word |= static_cast<std::uint32_t>(signs[row * f + first + bit] != 0) << bit;
            *words++ = word;
        }
    }
}

void unpack_signs(const std::uint32_t *words, std::size_t rows, std::size_t f, float *signs) {
    // The bit goes straight to the sign of 1.0f (0x3f800000): no conversion, and the loop over 32 bits vectorises.
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t first = 0; first < f; first += 32) {
            const std::uint32_t word = ~*words++;
            const std::size_t count = std::min<std::size_t>(32, f - first);
            for (std::size_t bit = 0; bit < count; ++bit)
                signs[row * f + first + bit] = std::bit_cast<float>(0x3f800000u | ((word >> bit) << 31));
        }
    }
}

} // namespace falcon
