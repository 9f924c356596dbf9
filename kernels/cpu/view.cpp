// One instruction set's photometric stage; CMakeLists.txt compiles this file once for each instruction set, under the same rules as level.cpp.

#include "view.hpp"
#include "vectors.hpp"

namespace falcon {
namespace {

using std::size_t;

constexpr float kRed = 0.2989f, kGreen = 0.587f, kBlue = 0.114f;

ALWAYS_INLINE float smaller(float a, float b) { return a < b ? a : b; }
ALWAYS_INLINE float larger(float a, float b) { return a > b ? a : b; }
ALWAYS_INLINE float unit(float x) { return smaller(larger(x, 0.0f), 1.0f); }
ALWAYS_INLINE float luma(float red, float green, float blue) { return kRed * red + kGreen * green + kBlue * blue; }

// a / b, correctly rounded (Markstein), like the reference: a level exactly on the threshold falls on the same side.
ALWAYS_INLINE float quotient(float a, float b, float inverse) {
#if defined(__FMA__)
    const float q = a * inverse;
    return __builtin_fmaf(__builtin_fmaf(-q, b, a), inverse, q);
#else
    (void)inverse;
    return a / b;
#endif
}

struct Planes {
    float *__restrict red, *__restrict green, *__restrict blue;
};

void load_levels(const std::uint8_t *__restrict in, size_t n, Planes p) {
    for (size_t i = 0; i < n; ++i) {
        p.red[i] = quotient(in[3 * i], 255.0f, 1 / 255.0f);
        p.green[i] = quotient(in[3 * i + 1], 255.0f, 1 / 255.0f);
        p.blue[i] = quotient(in[3 * i + 2], 255.0f, 1 / 255.0f);
    }
}

// x <- clamp(factor x + of_gray gray(x) + constant)
void blend(Planes p, size_t n, float factor, float of_gray, float constant) {
    for (size_t i = 0; i < n; ++i) {
        const float base = of_gray * luma(p.red[i], p.green[i], p.blue[i]) + constant;
        p.red[i] = unit(factor * p.red[i] + base);
        p.green[i] = unit(factor * p.green[i] + base);
        p.blue[i] = unit(factor * p.blue[i] + base);
    }
}

void brighten(float *__restrict x, size_t n, float factor) {
    for (size_t i = 0; i < n; ++i)
        x[i] = smaller(factor * x[i], 1.0f);
}

ALWAYS_INLINE float hue_channel(float value, float chroma, float sextant) {
    const float k = sextant - 6.0f * float(int(sextant * (1 / 6.0f)));
    return value - unit(smaller(k, 4.0f - k)) * chroma;
}

// turn: in sextants, [0, 6), so that no sextant is negative.
void shift_hue(Planes p, size_t n, float turn) {
    for (size_t i = 0; i < n; ++i) {
        const float red = p.red[i], green = p.green[i], blue = p.blue[i];
        const float value = larger(larger(red, green), blue), chroma = value - smaller(smaller(red, green), blue);
        const bool is_red = value == red, is_green = value == green;
        const float difference = is_red ? green - blue : is_green ? blue - red : red - green;
        const float offset = is_red ? 0.0f : is_green ? 2.0f : 4.0f;
        // A gray pixel has no hue: the value computed for it is multiplied by its chroma, 0.
        const float sextant = difference / (chroma == 0 ? 1.0f : chroma) + (offset + turn);
        p.red[i] = hue_channel(value, chroma, sextant + 5.0f);
        p.green[i] = hue_channel(value, chroma, sextant + 3.0f);
        p.blue[i] = hue_channel(value, chroma, sextant + 1.0f);
    }
}

double sum_of_gray(Planes p, size_t n) {
    float sums[kLanes] = {}, rest = 0;
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane)
            sums[lane] += luma(p.red[i + lane], p.green[i + lane], p.blue[i + lane]);
    for (; i < n; ++i)
        rest += luma(p.red[i], p.green[i], p.blue[i]);
    double sum = rest;
    for (float each : sums)
        sum += each;
    return sum;
}

void make_gray(Planes p, size_t n) {
    for (size_t i = 0; i < n; ++i)
        p.red[i] = p.green[i] = p.blue[i] = luma(p.red[i], p.green[i], p.blue[i]);
}

// Levels of n pixels, and the first `operations` of the jitter.
void colours(const View &v, const std::uint8_t *in, size_t n, size_t operations, float mean_gray, Planes p) {
    load_levels(in, n, p);
    for (size_t i = 0; i < operations; ++i) {
        const float factor = v.jitter[i].factor;
        switch (v.jitter[i].operation) {
        case kBrightness:
            brighten(p.red, n, factor);
            brighten(p.green, n, factor);
            brighten(p.blue, n, factor);
            break;
        case kContrast:
            blend(p, n, factor, 0, (1 - factor) * mean_gray);
            break;
        case kSaturation:
            blend(p, n, factor, 1 - factor, 0);
            break;
        case kHue:
            shift_hue(p, n, factor);
            break;
        }
    }
}

// The mean of gray(x) where contrast comes in the order; 0 if it does not.
float mean_gray(const View &v, Planes p) {
    size_t before = 0;
    while (before < v.operations && v.jitter[before].operation != kContrast)
        ++before;
    if (before == v.operations)
        return 0;
    const size_t pixels = v.height * v.width, strip = rows_at_once(v.width) * v.width;
    double sum = 0;
    for (size_t first = 0; first < pixels; first += strip) {
        const size_t n = pixels - first < strip ? pixels - first : strip;
        colours(v, v.in + 3 * first, n, before, 0, p);
        sum += sum_of_gray(p, n);
    }
    return static_cast<float>(sum / static_cast<double>(pixels));
}

ALWAYS_INLINE void put(float x, float *out) { *out = x; }
ALWAYS_INLINE void put(float x, std::uint16_t *out) { // to the nearest bfloat16, ties to even
    std::uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    *out = static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <bool solarize> ALWAYS_INLINE float finished(float x, float threshold, float mean, float std_, float inverse) {
    if (solarize)
        x = x >= threshold ? 1.0f - x : x;
    return quotient(x - mean, std_, inverse);
}

template <typename Out, bool solarize> void finish(const View &v, Planes p, size_t n, Out *__restrict out) {
    const float mean[3] = {v.mean[0], v.mean[1], v.mean[2]}, std_[3] = {v.std_[0], v.std_[1], v.std_[2]};
    const float inverse[3] = {1 / std_[0], 1 / std_[1], 1 / std_[2]}, threshold = v.threshold;
    for (size_t i = 0; i < n; ++i) {
        put(finished<solarize>(p.red[i], threshold, mean[0], std_[0], inverse[0]), out + 3 * i);
        put(finished<solarize>(p.green[i], threshold, mean[1], std_[1], inverse[1]), out + 3 * i + 1);
        put(finished<solarize>(p.blue[i], threshold, mean[2], std_[2], inverse[2]), out + 3 * i + 2);
    }
}

void finish(const View &v, Planes p, size_t first, size_t n) {
    if (v.bfloat16) {
        std::uint16_t *out = static_cast<std::uint16_t *>(v.out) + 3 * first;
        v.solarize ? finish<std::uint16_t, true>(v, p, n, out) : finish<std::uint16_t, false>(v, p, n, out);
    } else {
        float *out = static_cast<float *>(v.out) + 3 * first;
        v.solarize ? finish<float, true>(v, p, n, out) : finish<float, false>(v, p, n, out);
    }
}

void blur_row(const float *row, const View &v, float *padded, float *out) {
    const size_t radius = v.radius[0], width = v.width;
    const float *taps = v.taps[0];
    float *centre = padded + radius;
    __builtin_memcpy(centre, row, width * sizeof(float));
    for (size_t k = 1; k <= radius; ++k) {
        *(centre - k) = row[k];
        centre[width - 1 + k] = row[width - 1 - k];
    }
    for (size_t i = 0; i < width; i += kLanes) {
        Floats sum = load(centre + i) * taps[0];
        for (size_t k = 1; k <= radius; ++k)
            sum += (load(centre + i - k) + load(centre + i + k)) * taps[k];
        store(out + i, sum);
    }
}

// rows: of the window, the middle one at `radius`.
void blur_column(const float *const *rows, const View &v, float *out) {
    const size_t radius = v.radius[1];
    const float *taps = v.taps[1];
    for (size_t i = 0; i < v.width; i += kLanes) {
        Floats sum = load(rows[radius] + i) * taps[0];
        for (size_t k = 1; k <= radius; ++k)
            sum += (load(rows[radius - k] + i) + load(rows[radius + k] + i)) * taps[k];
        store(out + i, sum);
    }
}

} // namespace

void FALCON_JOIN(FALCON_LEVEL, _augment_view)(const View &v, const ViewScratch &scratch) {
    const Planes p = {scratch.planes[0], scratch.planes[1], scratch.planes[2]};
    const float mean = mean_gray(v, p);
    const bool blurred = v.radius[0] + v.radius[1] > 0;
    const size_t together = rows_at_once(v.width), radius = v.radius[1];
    const size_t slots = 2 * radius + together, pitch = v.width + kViewSlack;
    size_t done = 0; // rows of a blurred view
    for (size_t first = 0; first < v.height; first += together) {
        const size_t last = first + together < v.height ? first + together : v.height;
        const size_t n = (last - first) * v.width;
        colours(v, v.in + 3 * first * v.width, n, v.operations, mean, p);
        if (v.gray)
            make_gray(p, n);
        if (!blurred) {
            finish(v, p, first * v.width, n);
            continue;
        }
        for (int channel = 0; channel < 3; ++channel)
            for (size_t y = first; y < last; ++y)
                blur_row(scratch.planes[channel] + (y - first) * v.width, v, scratch.padded,
                         scratch.ring[channel] + y % slots * pitch);
        // The planes of this strip are no longer needed: the finished rows replace them.
        for (; done < v.height && (done + radius < last || last == v.height); ++done) {
            for (int channel = 0; channel < 3; ++channel) {
                for (size_t k = 0; k <= radius; ++k) {
                    const size_t above = done >= k ? done - k : k - done;
                    const size_t below = done + k < v.height ? done + k : 2 * (v.height - 1) - (done + k);
                    scratch.rows[radius - k] = scratch.ring[channel] + above % slots * pitch;
                    scratch.rows[radius + k] = scratch.ring[channel] + below % slots * pitch;
                }
                blur_column(scratch.rows, v, scratch.planes[channel]);
            }
            finish(v, p, done * v.width, v.width);
        }
    }
}

} // namespace falcon
