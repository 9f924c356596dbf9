// Resizes regions of many images to one size, with threads and scratch.
#pragma once

#include "level.hpp"

namespace falcon {

struct Crop {
    const std::uint8_t *image; // its first pixel, rows `stride` bytes apart
    std::size_t stride;
    std::size_t top, left, height, width; // not 0
    bool flip;                            // left to right, afterwards
    std::uint8_t *out;                    // [size][size][3]
};

void resize_crops(const Level &, std::size_t threads, const Crop *crops, std::size_t count, std::size_t size);

} // namespace falcon
