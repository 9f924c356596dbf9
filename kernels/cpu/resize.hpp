// A region of an image resized by antialiased bicubic interpolation, the same bits as Pillow: fixed-point weights of 22 bits, first
// along rows, then along columns, each time rounded to uint8.
//
// Along a row, neighbouring outputs use different inputs with different weights, which cannot be vectorised; but 16 rows use the
// same. So 16 rows are transposed (in registers, 16 x 16 bytes at a time), interpolated as 16 lanes, and transposed back.
#pragma once

#include <cstddef>
#include <cstdint>

namespace falcon {

constexpr int kWeightBits = 22;
constexpr std::size_t kRowsAtOnce = 16;

// The inputs of each of `size` outputs: `count` inputs from `first` on, the k-th with the weight weights[i * most + k].
struct Axis {
    std::size_t most;
    const std::uint32_t *first, *count; // [size]
    const std::int32_t *weights;        // [size][most]
};

struct Resize {
    const std::uint8_t *in;    // of the region's first pixel, 3 bytes a pixel
    std::size_t stride;        // bytes from row to row
    std::size_t height, width; // of the region
    std::size_t size;          // of the output, [size][size][3]
    Axis along_rows, along_columns;
    std::uint8_t *out;
    // Scratch, in bytes: 16 multiple16(3 width), 16 multiple16(3 size), and (height + 15) multiple16(3 size).
    std::uint8_t *tile, *resized_tile, *rows;
};

constexpr std::size_t multiple16(std::size_t bytes) { return (bytes + 15) / 16 * 16; }

} // namespace falcon
