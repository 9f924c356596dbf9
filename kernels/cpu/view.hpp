// The photometric stage of one view: uint8 pixels in, jittered, grayed, blurred, solarised and normalised pixels out.
//
//     x = level / 255                              in the view's own order, and only what is not neutral:
//     brightness, contrast, saturation             x <- clamp(f x + (1 - f) base),  base = 0 | mean of gray(x) | gray(x)
//     hue                                          channel = v - c clamp(min(k, 4 - k), 0, 1),  k = (o + 6 h) mod 6
//     grayscale; Gaussian blur, borders reflected; x >= threshold: 1 - x; (x - mean) / std
//
// A view is processed in strips of rows that stay in the L1 cache, from its levels to the finished pixels. A blurred view keeps
// as many rows as its window is high, in a ring. Only the mean for contrast needs a separate pass, over the operations before
// contrast.
#pragma once

#include <cstddef>
#include <cstdint>

namespace falcon {

constexpr std::size_t kStrip = 1024;  // pixels, or one row if that is more: three planes are 12 KiB
constexpr std::size_t kViewSlack = 16; // floats that vectors may read and write past the end of a row

enum Operation { kBrightness, kContrast, kSaturation, kHue };

struct View {
    const std::uint8_t *in; // [height][width][3]
    void *out;              // the same shape, float, or bfloat16 as uint16
    std::size_t height, width;
    struct {
        Operation operation;
        float factor; // of hue: turns times 6, in [0, 6)
    } jitter[4];
    std::size_t operations; // of `jitter`, first to last; none is neutral
    bool gray, solarize, bfloat16;
    float threshold;          // of solarisation
    std::size_t radius[2];    // of the blur's window along rows and along columns, less than the side; 0: none
    const float *taps[2];     // [radius + 1], from the centre
    const float *mean, *std_; // [3]
};

// Lengths in floats, with strip = rows_at_once(width) * width and slots = 2 radius[1] + rows_at_once(width).
struct ViewScratch {
    float *planes[3];   // strip + kViewSlack each
    float *padded;      // width + 2 radius[0] + kViewSlack
    float *ring[3];     // slots * (width + kViewSlack) each
    const float **rows; // [2 radius[1] + 1]
};

constexpr std::size_t rows_at_once(std::size_t width) { return width < kStrip ? kStrip / width : 1; }

} // namespace falcon
