#include "augmentation.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "threads.hpp"

namespace falcon {

namespace {

constexpr float kNarrowest = 0.05f; // sigma whose neighbouring tap is zero in float32
constexpr float kNegligible = 5.5f; // widths from a Gaussian's centre, where it is 3e-7 of its height
constexpr std::size_t kPixelsPerTask = 1 << 14; // views of 32 px take 5 us each: several a task

// taps: [radius + 1], from the centre; all on both sides sum to 1.
void gaussian(double sigma, std::size_t radius, float *taps) {
    double sum = 1;
    for (std::size_t k = 1; k <= radius; ++k)
        sum += 2 * std::exp(-0.5 * (k / sigma) * (k / sigma));
    for (std::size_t k = 0; k <= radius; ++k)
        taps[k] = static_cast<float>(std::exp(-0.5 * (k / sigma) * (k / sigma)) / sum);
}

// taps: two times [window + 1].
View view_of(const Views &views, std::size_t i, float *taps) {
    View v = {};
    const std::size_t values = views.height * views.width * 3;
    v.in = views.in + i * values;
    v.out = static_cast<char *>(views.out) + i * values * (views.bfloat16 ? 2 : 4);
    v.height = views.height, v.width = views.width, v.bfloat16 = views.bfloat16;
    for (std::size_t place = 0; place < 4; ++place) {
        const int operation = static_cast<int>(views.order[4 * i + place]);
        if (operation < kBrightness || operation > kHue)
            continue;
        float factor = views.factors[4 * i + operation];
        if (factor == (operation == kHue ? 0.0f : 1.0f))
            continue;
        if (operation == kHue)
            factor = std::min(6 * (factor - std::floor(factor)), 5.999999f);
        v.jitter[v.operations++] = {static_cast<Operation>(operation), factor};
    }
    v.gray = views.gray[i], v.solarize = views.solarize[i], v.threshold = views.threshold;
    v.mean = views.mean, v.std_ = views.std_;
    if (views.sigma[i] > 0) {
        const float sigma = std::max(views.sigma[i], kNarrowest);
        const auto needed = std::min(views.window, static_cast<std::size_t>(std::ceil(kNegligible * sigma) - 1));
        for (int axis = 0; axis < 2; ++axis) {
            v.radius[axis] = std::min(needed, (axis ? v.height : v.width) - 1);
            gaussian(sigma, v.radius[axis], taps + axis * (views.window + 1));
            v.taps[axis] = taps + axis * (views.window + 1);
        }
    }
    return v;
}

} // namespace

void augment_views(const Level &level, std::size_t threads, const Views &views) {
    const std::size_t together = rows_at_once(views.width), strip = together * views.width + kViewSlack;
    const std::size_t slots = 2 * views.window + together, ring = slots * (views.width + kViewSlack);
    const std::size_t padded = views.width + 2 * views.window + kViewSlack, pointers = 2 * views.window + 1;
    const std::size_t taps = 2 * (views.window + 1);
    const std::size_t grain = std::max<std::size_t>(1, kPixelsPerTask / (views.height * views.width));
    const std::size_t tasks = (views.count + grain - 1) / grain;
    parallel(threads, 1, tasks, [&](std::size_t, std::size_t task) {
        // Pointers first: they need the alignment.
        auto *memory = static_cast<char *>(scratch_bytes(
            Use::kView, pointers * sizeof(float *) + (3 * strip + padded + 3 * ring + taps) * sizeof(float)));
        float *floats = reinterpret_cast<float *>(memory + pointers * sizeof(float *));
        const auto take = [&](std::size_t count) { return std::exchange(floats, floats + count); };
        const ViewScratch scratch = {{take(strip), take(strip), take(strip)},
                                     take(padded),
                                     {take(ring), take(ring), take(ring)},
                                     reinterpret_cast<const float **>(memory)};
        float *own_taps = take(taps);
        for (std::size_t i = task * grain; i < std::min(views.count, (task + 1) * grain); ++i)
            level.augment_view(view_of(views, i, own_taps), scratch);
    }, team_for(views.count * views.height * views.width));
}

} // namespace falcon
