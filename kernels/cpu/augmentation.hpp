// The photometric stage of a batch of views, each by its own parameters, with threads and scratch.
#pragma once

#include "level.hpp"

namespace falcon {

struct Views {
    const std::uint8_t *in; // [count][height][width][3]
    void *out;              // the same shape, float, or bfloat16 as uint16
    bool bfloat16;
    std::size_t count, height, width;
    const float *factors;  // [count][4]: brightness, contrast, saturation (1: off), hue (turns, 0: off)
    const float *order;    // [count][4]: the operations 0 to 3 of `factors`, first to last
    const std::uint8_t *gray, *solarize; // [count]
    const float *sigma;    // [count], of the Gaussian blur in pixels; 0: none
    std::size_t window;    // radius of the widest one
    float threshold;       // of solarisation, in [0, 1]
    const float *mean, *std_; // [3]
};

void augment_views(const Level &, std::size_t threads, const Views &);

} // namespace falcon
