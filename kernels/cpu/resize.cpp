// One instruction set's resizing; CMakeLists.txt compiles this file once for each instruction set, under the same rules as level.cpp.

#include "resize.hpp"
#include "vectors.hpp"

namespace falcon {
namespace {

using std::size_t;

typedef std::uint8_t Bytes __attribute__((vector_size(16), may_alias));
typedef std::uint8_t LooseBytes __attribute__((vector_size(16), aligned(1), may_alias));
constexpr int kParts = 16 / kLanes;
struct Sums {
    Ints part[kParts];
};

ALWAYS_INLINE Bytes load16(const std::uint8_t *p) { return *reinterpret_cast<const LooseBytes *>(p); }
ALWAYS_INLINE void store16(std::uint8_t *p, Bytes v) { *reinterpret_cast<LooseBytes *>(p) = v; }

#if defined(__clang__)
#define INTERLEAVE(a, b, from)                                                                                         \
    __builtin_shufflevector(a, b, from, from + 16, from + 1, from + 17, from + 2, from + 18, from + 3, from + 19,     \
                            from + 4, from + 20, from + 5, from + 21, from + 6, from + 22, from + 7, from + 23)
#else
#define INTERLEAVE(a, b, from)                                                                                         \
    __builtin_shuffle(a, b, Bytes{from, from + 16, from + 1, from + 17, from + 2, from + 18, from + 3, from + 19,     \
                                  from + 4, from + 20, from + 5, from + 21, from + 6, from + 22, from + 7, from + 23})
#endif

// A step of four: element (i, j) of 16 x 16 moves by one bit of its address (i, j), rotated to the left.
ALWAYS_INLINE void rotate(const Bytes *in, Bytes *out) {
    for (int i = 0; i < 8; ++i) {
        out[2 * i] = INTERLEAVE(in[i], in[i + 8], 0);
        out[2 * i + 1] = INTERLEAVE(in[i], in[i + 8], 8);
    }
}

ALWAYS_INLINE void transpose(Bytes *block) {
    Bytes other[16];
    rotate(block, other);
    rotate(other, block);
    rotate(block, other);
    rotate(other, block);
}

// Columns [0, bytes) of 16 rows `stride` apart into [bytes][16], of the last ones `rows` and then the last again.
void load_tile(const std::uint8_t *in, size_t stride, size_t rows, size_t bytes, std::uint8_t *tile) {
    for (size_t column = 0; column < bytes; column += 16) {
        Bytes block[16];
        for (size_t i = 0; i < 16; ++i) {
            const std::uint8_t *from = in + (i < rows ? i : rows - 1) * stride + column;
            if (column + 16 <= bytes)
                block[i] = load16(from);
            else { // nothing past the row's end is read: there may be nothing
                block[i] = Bytes{};
                __builtin_memcpy(&block[i], from, bytes - column);
            }
        }
        transpose(block);
        for (size_t i = 0; i < 16; ++i)
            store16(tile + (column + i) * 16, block[i]);
    }
}

// [bytes][16] into 16 rows of `bytes`, a multiple of 16.
void store_tile(const std::uint8_t *tile, size_t bytes, std::uint8_t *out) {
    for (size_t column = 0; column < bytes; column += 16) {
        Bytes block[16];
        for (size_t i = 0; i < 16; ++i)
            block[i] = load16(tile + (column + i) * 16);
        transpose(block);
        for (size_t i = 0; i < 16; ++i)
            store16(out + i * bytes + column, block[i]);
    }
}

// Part `i` of 16 bytes. (`__builtin_convertvector` widens one byte after the other in GCC 12.)
ALWAYS_INLINE Ints widened(const std::uint8_t *p, int i) {
    p += i * kLanes;
#if defined(__AVX512F__)
    return reinterpret_cast<Ints>(_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
#elif defined(__AVX2__)
    return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadu_si64(p)));
#elif defined(__SSE2__)
    int four;
    __builtin_memcpy(&four, p, sizeof four);
    const __m128i pairs = _mm_unpacklo_epi8(_mm_cvtsi32_si128(four), __m128i{});
    return reinterpret_cast<Ints>(_mm_unpacklo_epi16(pairs, __m128i{}));
#else
    return Ints{p[0], p[1], p[2], p[3]};
#endif
}

ALWAYS_INLINE void add(Sums &sum, const std::uint8_t *pixels, std::int32_t weight) {
    for (int i = 0; i < kParts; ++i)
        sum.part[i] += widened(pixels, i) * weight;
}

// Rounded, and cut to [0, 255].
ALWAYS_INLINE void store_levels(std::uint8_t *out, Sums sum) {
    for (int i = 0; i < kParts; ++i)
        sum.part[i] = (sum.part[i] + (1 << (kWeightBits - 1))) >> kWeightBits;
#if defined(__AVX512F__)
    const __m512i levels = _mm512_maskz_max_epi32(0xffff, reinterpret_cast<__m512i>(sum.part[0]), __m512i{});
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm512_maskz_cvtusepi32_epi8(0xffff, levels));
#elif defined(__SSE2__)
    __m128i levels[4];
    __builtin_memcpy(levels, &sum, sizeof levels);
    const __m128i low = _mm_packs_epi32(levels[0], levels[1]), high = _mm_packs_epi32(levels[2], levels[3]);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm_packus_epi16(low, high));
#else
    for (int i = 0; i < 16; ++i) {
        const std::int32_t level = sum.part[i / kLanes][i % kLanes];
        out[i] = static_cast<std::uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
    }
#endif
}

void along_rows(const Resize &r) {
    for (size_t x = 0; x < r.size; ++x) {
        const std::int32_t *weights = r.along_rows.weights + x * r.along_rows.most;
        const std::uint8_t *in = r.tile + size_t(r.along_rows.first[x]) * 48;
        Sums red = {}, green = {}, blue = {};
        for (size_t k = 0; k < r.along_rows.count[x]; ++k, in += 48) {
            add(red, in, weights[k]);
            add(green, in + 16, weights[k]);
            add(blue, in + 32, weights[k]);
        }
        store_levels(r.resized_tile + 48 * x, red);
        store_levels(r.resized_tile + 48 * x + 16, green);
        store_levels(r.resized_tile + 48 * x + 32, blue);
    }
}

ALWAYS_INLINE Sums column_sums(const std::uint8_t *in, size_t pitch, const std::int32_t *weights, size_t count) {
    Sums sum = {};
    for (size_t k = 0; k < count; ++k)
        add(sum, in + k * pitch, weights[k]);
    return sum;
}

void along_columns(const Resize &r) {
    const size_t bytes = 3 * r.size, pitch = multiple16(bytes);
    for (size_t y = 0; y < r.size; ++y) {
        const std::int32_t *weights = r.along_columns.weights + y * r.along_columns.most;
        const std::uint8_t *in = r.rows + r.along_columns.first[y] * pitch;
        std::uint8_t *out = r.out + y * bytes;
        const size_t count = r.along_columns.count[y];
        size_t i = 0;
        for (; i + 16 <= bytes; i += 16)
            store_levels(out + i, column_sums(in + i, pitch, weights, count));
        if (i < bytes) {
            std::uint8_t last[16];
            store_levels(last, column_sums(in + i, pitch, weights, count));
            __builtin_memcpy(out + i, last, bytes - i);
        }
    }
}

} // namespace

void FALCON_JOIN(FALCON_LEVEL, _resize)(const Resize &r) {
    const size_t pitch = multiple16(3 * r.size);
    for (size_t y = 0; y < r.height; y += kRowsAtOnce) {
        const size_t left = r.height - y;
        load_tile(r.in + y * r.stride, r.stride, left < kRowsAtOnce ? left : kRowsAtOnce, 3 * r.width, r.tile);
        along_rows(r);
        store_tile(r.resized_tile, pitch, r.rows + y * pitch);
    }
    along_columns(r);
}

} // namespace falcon
