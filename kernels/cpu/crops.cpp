#include "crops.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "threads.hpp"

namespace falcon {

namespace {

constexpr double kSupport = 2; // of the filter below

// The cubic convolution kernel with a = -1/2 (Keys, 1981), in the order of operations that Pillow has.
double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1)
        return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

std::size_t most_inputs(std::size_t length, std::size_t size) {
    return 2 * static_cast<std::size_t>(std::ceil(kSupport * std::max(1.0, double(length) / double(size)))) + 1;
}

struct AxisMemory {
    std::uint32_t *first, *count;
    std::int32_t *weights;
};

// At the border of the region the weights are cut and rescaled: pixels outside do not contribute.
Axis axis_of(std::size_t length, std::size_t size, bool flip, const AxisMemory &memory) {
    const double scale = double(length) / double(size), reach = std::max(1.0, scale), inverse = 1 / reach;
    const std::size_t most = most_inputs(length, size);
    for (std::size_t i = 0; i < size; ++i) {
        const double centre = (double(i) + 0.5) * scale;
        const long first = std::max(0l, long(centre - kSupport * reach + 0.5));
        const long last = std::min(long(length), long(centre + kSupport * reach + 0.5));
        const auto weight = [&](long k) { return bicubic((double(first + k) - centre + 0.5) * inverse); };
        double sum = 0;
        for (long k = 0; k < last - first; ++k)
            sum += weight(k);
        const std::size_t at = flip ? size - 1 - i : i;
        memory.first[at] = std::uint32_t(first), memory.count[at] = std::uint32_t(last - first);
        for (long k = 0; k < last - first; ++k) {
            const double w = weight(k) / sum * (1 << kWeightBits);
            memory.weights[at * most + std::size_t(k)] = std::int32_t(w < 0 ? w - 0.5 : w + 0.5);
        }
    }
    return {most, memory.first, memory.count, memory.weights};
}

} // namespace

void resize_crops(const Level &level, std::size_t threads, const Crop *crops, std::size_t count, std::size_t size) {
    // Crops of small images take a few us each: several a task.
    const std::size_t grain = std::max<std::size_t>(1, (std::size_t(1) << 14) / (size * size));
    parallel(threads, 1, (count + grain - 1) / grain, [&](std::size_t, std::size_t task) {
        for (std::size_t i = task * grain; i < std::min(count, (task + 1) * grain); ++i) {
            const Crop &crop = crops[i];
            const std::size_t pitch = multiple16(3 * size), most_x = most_inputs(crop.width, size),
                              most_y = most_inputs(crop.height, size);
            const std::size_t words = 4 * size + size * most_x + size * most_y;
            const std::size_t tile = 16 * multiple16(3 * crop.width), resized = 16 * pitch,
                              rows = (crop.height + kRowsAtOnce - 1) * pitch;
            auto *memory = static_cast<std::uint8_t *>(scratch_bytes(Use::kView, 4 * words + tile + resized + rows));
            auto *numbers = reinterpret_cast<std::uint32_t *>(memory);
            const auto take = [&](std::size_t n) { return std::exchange(numbers, numbers + n); };
            const auto axis = [&](std::size_t length, std::size_t most, bool flip) {
                std::uint32_t *const first = take(size), *const inputs = take(size);
                return axis_of(length, size, flip, {first, inputs, reinterpret_cast<std::int32_t *>(take(size * most))});
            };
            const Axis x = axis(crop.width, most_x, crop.flip), y = axis(crop.height, most_y, false);
            std::uint8_t *const bytes = memory + 4 * words;
            level.resize({crop.image + crop.top * crop.stride + 3 * crop.left, crop.stride, crop.height, crop.width,
                          size, x, y, crop.out, bytes, bytes + tile, bytes + tile + resized});
        }
    }, team_for(count * size * size));
}

} // namespace falcon
