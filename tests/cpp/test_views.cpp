// The crops and the photometric stage without Python, for the sanitizers: every instruction set of this processor, on sizes
// with ragged ends, buffers of exactly the documented size, and results against plain double-precision loops.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "augmentation.hpp"
#include "crops.hpp"
#include "sweeps.hpp"

using namespace falcon;
using std::size_t;

namespace {

int failures = 0;

void expect(bool holds, const char *what, const Level &level, double found, double wanted) {
    if (!holds) {
        std::printf("FAILED %s (%s): %.9g, expected %.9g\n", what, level.name, found, wanted);
        ++failures;
    }
}

// ---- photometric stage ----------------------------------------------------------------------------------------------

typedef std::vector<double> Picture; // [height][width][3]

double luma(const double *p) { return 0.2989 * p[0] + 0.587 * p[1] + 0.114 * p[2]; }

// By way of hue, saturation and value, as the textbook has it.
void shift_hue(double *p, double turns) {
    const double value = std::max({p[0], p[1], p[2]}), chroma = value - std::min({p[0], p[1], p[2]});
    if (chroma == 0)
        return;
    double sextant = value == p[0] ? (p[1] - p[2]) / chroma : value == p[1] ? 2 + (p[2] - p[0]) / chroma
                                                                            : 4 + (p[0] - p[1]) / chroma;
    sextant = std::fmod(sextant + 6 * turns + 12, 6);
    const double middle = chroma * (1 - std::fabs(std::fmod(sextant, 2) - 1)), low = value - chroma;
    const double forms[6][3] = {{chroma, middle, 0}, {middle, chroma, 0}, {0, chroma, middle},
                                {0, middle, chroma}, {middle, 0, chroma}, {chroma, 0, middle}};
    for (int c = 0; c < 3; ++c)
        p[c] = low + forms[static_cast<int>(sextant)][c];
}

size_t reflected(long i, size_t side) {
    i = std::labs(i);
    return static_cast<size_t>(i < long(side) ? i : 2 * (long(side) - 1) - i);
}

Picture blurred(const Picture &x, size_t height, size_t width, double sigma, size_t window) {
    Picture result = x;
    for (int axis = 0; axis < 2; ++axis) {
        const Picture from = result;
        const long radius = long(std::min(window, (axis ? height : width) - 1));
        for (size_t i = 0; i < x.size(); ++i) {
            const long row = long(i / 3 / width), column = long(i / 3 % width);
            double sum = 0, weights = 0;
            for (long k = -radius; k <= radius; ++k) {
                const double w = std::exp(-0.5 * double(k * k) / (sigma * sigma));
                const size_t y = axis ? reflected(row + k, height) : size_t(row);
                const size_t z = axis ? size_t(column) : reflected(column + k, width);
                sum += w * from[(y * width + z) * 3 + i % 3];
                weights += w;
            }
            result[i] = sum / weights;
        }
    }
    return result;
}

struct Parameters {
    float factors[4], order[4], sigma;
    std::uint8_t gray, solarize;
};

Picture expected_view(const std::uint8_t *in, size_t height, size_t width, const Parameters &p, const Views &views) {
    const size_t pixels = height * width;
    Picture x(in, in + 3 * pixels);
    for (double &value : x)
        value /= 255;
    for (float place : p.order) {
        const int operation = int(place);
        const double factor = p.factors[operation];
        double mean = 0;
        for (size_t i = 0; i < pixels; ++i)
            mean += luma(&x[3 * i]) / double(pixels);
        for (size_t i = 0; i < pixels; ++i) {
            if (operation == kHue) {
                shift_hue(&x[3 * i], factor);
                continue;
            }
            const double base = operation == kContrast ? mean : operation == kSaturation ? luma(&x[3 * i]) : 0;
            for (int c = 0; c < 3; ++c)
                x[3 * i + c] = std::min(1.0, std::max(0.0, factor * x[3 * i + c] + (1 - factor) * base));
        }
    }
    for (size_t i = 0; i < pixels && p.gray; ++i)
        x[3 * i] = x[3 * i + 1] = x[3 * i + 2] = luma(&x[3 * i]);
    if (p.sigma > 0)
        x = blurred(x, height, width, p.sigma, views.window);
    for (size_t i = 0; i < x.size(); ++i) {
        if (p.solarize && x[i] >= views.threshold)
            x[i] = 1 - x[i];
        x[i] = (x[i] - views.mean[i % 3]) / views.std_[i % 3];
    }
    return x;
}

double as_double(std::uint16_t half) {
    const std::uint32_t bits = std::uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

void check_views(const Level &level, size_t height, size_t width, size_t window, std::mt19937 &random) {
    constexpr size_t kCount = 5;
    const size_t values = height * width * 3;
    const std::unique_ptr<std::uint8_t[]> in(new std::uint8_t[kCount * values]);
    for (size_t i = 0; i < kCount * values; ++i)
        in[i] = random() % 5 ? random() % 256 : 255 * (random() % 2);
    const Parameters parameters[kCount] = {
        {{1, 1, 1, 0}, {0, 1, 2, 3}, 0, 0, 0},
        {{1.5f, 0.6f, 1.8f, 0.2f}, {3, 1, 0, 2}, 0, 0, 0},
        {{0.7f, 1.6f, 0, -0.3f}, {2, 3, 1, 0}, 1.9f, 0, 0},
        {{1, 1, 1, 0}, {0, 1, 2, 3}, 0.3f, 1, 0},
        {{1.2f, 1, 0.5f, 0.5f}, {0, 2, 1, 3}, 0, 0, 1},
    };
    std::vector<float> factors, order, sigma;
    std::vector<std::uint8_t> gray, solarize;
    for (const Parameters &p : parameters) {
        factors.insert(factors.end(), p.factors, p.factors + 4);
        order.insert(order.end(), p.order, p.order + 4);
        sigma.push_back(p.sigma), gray.push_back(p.gray), solarize.push_back(p.solarize);
    }
    const float mean[3] = {0.49f, 0.48f, 0.45f}, std_[3] = {0.25f, 0.24f, 0.26f};
    const std::unique_ptr<float[]> full(new float[kCount * values]);
    const std::unique_ptr<std::uint16_t[]> half(new std::uint16_t[kCount * values]);
    Views views = {in.get(), full.get(), false, kCount, height, width, factors.data(), order.data(), gray.data(),
                   solarize.data(), sigma.data(), window, 128 / 255.0f, mean, std_};
    augment_views(level, 2, views);
    views.out = half.get(), views.bfloat16 = true;
    augment_views(level, 2, views);
    size_t crossed = 0; // of solarisation's threshold, by rounding
    for (size_t i = 0; i < kCount; ++i) {
        const Picture wanted = expected_view(in.get() + i * values, height, width, parameters[i], views);
        for (size_t j = 0; j < values; ++j) {
            const double found = full[i * values + j], rounded = as_double(half[i * values + j]);
            if (parameters[i].solarize && std::fabs(found - wanted[j]) > 1e-4 && ++crossed * 1000 <= kCount * values)
                continue;
            expect(std::fabs(found - wanted[j]) < 1e-4, "view", level, found, wanted[j]);
            expect(std::fabs(rounded - found) <= std::fabs(found) / 256, "view in bfloat16", level, rounded, found);
        }
    }
}

// ---- crops ----------------------------------------------------------------------------------------------------------

double cubic(double x) {
    x = std::fabs(x);
    return x < 1 ? 1.5 * x * x * x - 2.5 * x * x + 1 : x < 2 ? -0.5 * x * x * x + 2.5 * x * x - 4 * x + 2 : 0;
}

// `size` outputs of values in(k), k in [0, length), rounded.
std::vector<double> resized(size_t length, size_t size, const std::function<double(size_t)> &in) {
    const double scale = double(length) / double(size), reach = std::max(scale, 1.0);
    std::vector<double> out;
    for (size_t i = 0; i < size; ++i) {
        double sum = 0, weights = 0;
        for (size_t k = 0; k < length; ++k) {
            const double w = cubic((double(k) + 0.5 - (double(i) + 0.5) * scale) / reach);
            sum += w * in(k), weights += w;
        }
        out.push_back(std::min(255.0, std::max(0.0, std::floor(sum / weights + 0.5))));
    }
    return out;
}

void check_crops(const Level &level, size_t height, size_t width, size_t size, std::mt19937 &random) {
    const std::unique_ptr<std::uint8_t[]> image(new std::uint8_t[3 * height * width]);
    for (size_t i = 0; i < 3 * height * width; ++i)
        image[i] = std::uint8_t(random() % 256);
    const size_t top = random() % height, left = random() % width;
    // The whole image, and a region that ends in its last pixel, mirrored.
    const std::unique_ptr<std::uint8_t[]> out(new std::uint8_t[2 * size * size * 3]);
    const Crop crops[2] = {
        {image.get(), 3 * width, 0, 0, height, width, false, out.get()},
        {image.get(), 3 * width, top, left, height - top, width - left, true, out.get() + size * size * 3}};
    resize_crops(level, 2, crops, 2, size);
    size_t moved = 0;
    for (const Crop &crop : crops)
        for (size_t c = 0; c < 3; ++c) {
            std::vector<std::vector<double>> rows;
            for (size_t y = 0; y < crop.height; ++y)
                rows.push_back(resized(crop.width, size, [&](size_t x) {
                    return image[((crop.top + y) * width + crop.left + x) * 3 + c];
                }));
            for (size_t x = 0; x < size; ++x) {
                const std::vector<double> column = resized(crop.height, size, [&](size_t y) { return rows[y][x]; });
                for (size_t y = 0; y < size; ++y) {
                    const double found = crop.out[(y * size + (crop.flip ? size - 1 - x : x)) * 3 + c];
                    expect(std::fabs(found - column[y]) <= 1, "crop", level, found, column[y]);
                    moved += found != column[y];
                }
            }
        }
    expect(double(moved) <= 0.01 * double(6 * size * size) + 1, "moved by rounding", level, double(moved), 0);
}

} // namespace

int main() {
    for (auto level = levels(); *level; ++level) {
        std::mt19937 random(1);
        const size_t sizes[][2] = {{1, 1}, {1, 9}, {7, 1}, {2, 2}, {5, 3}, {16, 16}, {17, 33}, {40, 50}, {3, 1100}};
        for (const auto &[height, width] : sizes) {
            for (size_t window : {size_t(0), size_t(6), size_t(20)})
                check_views(**level, height, width, window, random);
            for (size_t size : {1, 5, 16, 32, 35})
                check_crops(**level, height, width, size, random);
        }
    }
    std::puts(failures ? "views: FAILED" : "views: ok");
    return failures != 0;
}
