// One instruction set's arithmetic; CMakeLists.txt compiles this file once for each, with FALCON_LEVEL and FALCON_LANES.
// Everything is static or in the level's own namespace, and nothing of the standard library is instantiated: an inline
// function compiled for AVX-512 here could otherwise be the copy that the linker keeps for every machine.

#include "level.hpp"
#include "vectors.hpp"

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace falcon {
namespace {

constexpr int kVectors = kLanes == 16 ? 4 : 2; // of a panel
constexpr int kRows = 6;                       // of a register tile: 6 x 4 (or 6 x 2) sums, and room for the operands
constexpr std::size_t kPanel = kVectors * kLanes;
static_assert(kPanelMax % kPanel == 0);

// Returns the second of the two if one is NaN.
ALWAYS_INLINE Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
    return a > b ? a : b;
#endif
}

ALWAYS_INLINE float largest(Floats v) {
    float result = v[0];
    for (int i = 1; i < kLanes; ++i)
        result = v[i] > result ? v[i] : result;
    return result;
}

ALWAYS_INLINE double total(Floats v) {
    double result = 0;
    for (int i = 0; i < kLanes; ++i)
        result += v[i];
    return result;
}

// 2^t for t < 127, relative error below 1.3e-7, 0 far below -126, NaN of NaN: 2^n by the exponent, 2^r on |r| <= 1/2 by a
// polynomial (minimax, the constant fixed to 1).
ALWAYS_INLINE Floats power_of_two(Floats t) {
    t = larger(splat(-150.0f), t);
#if defined(__AVX512F__)
    const auto n = reinterpret_cast<Floats>(_mm512_maskz_roundscale_ps(0xffff, reinterpret_cast<__m512>(t), 0));
#else
    const Floats shifted = t + 12582912.0f; // adding 1.5 * 2^23 rounds to an integer, in the low bits
    const Floats n = shifted - 12582912.0f;
#endif
    const Floats r = t - n;
    Floats p = splat(1.326472731e-3f);
    p = p * r + 9.671512991e-3f;
    p = p * r + 5.550733581e-2f;
    p = p * r + 2.402224243e-1f;
    p = p * r + 6.931470037e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
    const Words bits = reinterpret_cast<const Words &>(p) + (reinterpret_cast<const Words &>(shifted) << 23);
    return t < -126.0f ? Floats{} : reinterpret_cast<const Floats &>(bits);
#endif
}

constexpr float kLog2e = 1.44269504088896341f;

// The relative error grows with |x|, by 6e-8 for each unit: negligible where the result has weight.
ALWAYS_INLINE Floats exponential(Floats x) { return power_of_two(x * kLog2e); }

// ln x, x positive and normal, error below 1e-7 relative or absolute, whichever is larger; any other x, NaN included, gives an arbitrary value.
ALWAYS_INLINE Floats logarithm(Floats x) {
    const Ints bits = reinterpret_cast<const Ints &>(x);
    const Ints exponent = (bits - 0x3f3504f3) >> 23; // of x over a mantissa in [sqrt(1/2), sqrt(2))
    const Ints mantissa = bits - (exponent << 23);
    const Floats m = reinterpret_cast<const Floats &>(mantissa) - 1.0f;
    Floats p = splat(8.700438589e-2f);
    p = p * m + -1.426748931e-1f;
    p = p * m + 1.491476744e-1f;
    p = p * m + -1.657758504e-1f;
    p = p * m + 1.996306330e-1f;
    p = p * m + -2.500133812e-1f;
    p = p * m + 3.333390951e-1f;
    const Floats square = m * m;
    return m + (square * (p * m - 0.5f) + __builtin_convertvector(exponent, Floats) * 0.6931471806f);
}

// ---- products -------------------------------------------------------------------------------------------------------

struct FloatProduct {
    typedef Floats Sum;
    static constexpr std::size_t kSigns = 1; // of the dictionary in one 32-bit step
    static ALWAYS_INLINE Sum add(Sum sum, std::uint32_t a, Words w) {
        const Words all = splat(a);
        return sum + reinterpret_cast<const Floats &>(all) * reinterpret_cast<const Floats &>(w);
    }
    static ALWAYS_INLINE Floats value(Sum sum) { return sum; }
    // 1.0f with the sign of bit 0.
    static ALWAYS_INLINE std::uint32_t step(std::uint32_t low, std::uint32_t) { return 0x3f800000u | ((~low & 1u) << 31); }
};

struct Int16Product {
    typedef Ints Sum;
    static constexpr std::size_t kSigns = 2;
    static ALWAYS_INLINE Sum add(Sum sum, std::uint32_t a, Words w) {
#if defined(__AVX512VNNI__)
        return reinterpret_cast<Ints>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(int(a)),
                                                          reinterpret_cast<__m512i>(w)));
#else
        const Words all = splat(a);
        const Ints pairs = reinterpret_cast<const Ints &>(all), signs = reinterpret_cast<const Ints &>(w);
        return sum + ((pairs << 16) >> 16) * ((signs << 16) >> 16) + (pairs >> 16) * (signs >> 16);
#endif
    }
    static ALWAYS_INLINE Floats value(Sum sum) { return __builtin_convertvector(sum, Floats); }
    // Two int16, each -1 or +1, with the signs of bit 0 of each.
    static ALWAYS_INLINE std::uint32_t step(std::uint32_t low, std::uint32_t high) {
        return (((low & 1u) | ((high & 1u) << 16)) * 0xfffeu) ^ 0xffffffffu;
    }
};

template <class Op, int Rows>
ALWAYS_INLINE void register_tile(const std::uint32_t *a, std::size_t stride, const std::uint32_t *panel,
                                 std::size_t steps, typename Op::Sum (&sums)[Rows][kVectors]) {
    UNROLL for (int row = 0; row < Rows; ++row)
        UNROLL for (int v = 0; v < kVectors; ++v) sums[row][v] = typename Op::Sum{};
    for (std::size_t k = 0; k < steps; ++k) {
        Words w[kVectors];
        UNROLL for (int v = 0; v < kVectors; ++v) w[v] = load(panel + k * kPanel + v * kLanes);
        UNROLL for (int row = 0; row < Rows; ++row) {
            const std::uint32_t one = a[row * stride + k];
            UNROLL for (int v = 0; v < kVectors; ++v) sums[row][v] = Op::add(sums[row][v], one, w[v]);
        }
    }
}

// `Rows` rows times one panel, scaled, over `out` (or added to it).
template <class Op, int Rows>
void rows_times_panel(const std::uint32_t *a, std::size_t a_stride, const std::uint32_t *panel, std::size_t steps,
                      const float *scale, std::size_t scale_stride, float *out, std::size_t out_stride, bool add) {
    typename Op::Sum sums[Rows][kVectors];
    register_tile<Op, Rows>(a, a_stride, panel, steps, sums);
    UNROLL for (int row = 0; row < Rows; ++row)
        UNROLL for (int v = 0; v < kVectors; ++v) {
            float *p = out + row * out_stride + v * kLanes;
            const Floats value = Op::value(sums[row][v]) * scale[row * scale_stride];
            store(p, add ? load(p) + value : value);
        }
}

template <class Op>
void block_times_panel(const std::uint32_t *a, std::size_t a_stride, const std::uint32_t *panel, std::size_t steps,
                       const float *scale, std::size_t scale_stride, float *out, std::size_t out_stride, bool add,
                       std::size_t rows) {
    for (; rows >= kRows; rows -= kRows) {
        rows_times_panel<Op, kRows>(a, a_stride, panel, steps, scale, scale_stride, out, out_stride, add);
        a += kRows * a_stride, scale += kRows * scale_stride, out += kRows * out_stride;
    }
    for (; rows >= 2; rows -= 2) {
        rows_times_panel<Op, 2>(a, a_stride, panel, steps, scale, scale_stride, out, out_stride, add);
        a += 2 * a_stride, scale += 2 * scale_stride, out += 2 * out_stride;
    }
    if (rows)
        rows_times_panel<Op, 1>(a, a_stride, panel, steps, scale, scale_stride, out, out_stride, add);
}

template <class Op> void logits(const Product &p, std::size_t first, std::size_t last) {
    constexpr std::size_t per_word = 32 / Op::kSigns;
    const std::size_t depth = p.words_per_code * per_word;
    const auto *a = static_cast<const std::uint32_t *>(p.a);
    // Steps outside, panels inside: these steps of all rows are half a megabyte at 256 rows, and stay in the L2 cache.
    for (std::size_t begin = 0; begin < depth; begin += kSteps) {
        const std::size_t steps = depth - begin < kSteps ? depth - begin : kSteps;
        for (std::size_t index = first; index < last; ++index) {
            const std::size_t code = index * kPanel;
            for (std::size_t k = 0; k < steps; k += per_word) {
                std::uint32_t words[kPanel];
                for (std::size_t j = 0; j < kPanel; ++j)
                    words[j] = code + j < p.count ? p.words[(code + j) * p.words_per_code + (begin + k) / per_word] : 0;
                for (std::size_t bit = 0; bit < 32; bit += Op::kSigns) {
                    std::uint32_t *row = p.panel + (k + bit / Op::kSigns) * kPanel;
                    for (std::size_t j = 0; j < kPanel; ++j)
                        row[j] = Op::step(words[j] >> bit, (words[j] >> bit) >> 1);
                }
            }
            block_times_panel<Op>(a + begin, depth, p.panel, steps, p.scale, 1, p.out + code, p.width, begin != 0, p.rows);
        }
    }
}

template <class Op>
void gradient_product(const Product &p, std::size_t first, std::size_t last, std::size_t row_first, std::size_t row_last) {
    const std::size_t tiles = p.width / kTile, depth = p.width / Op::kSigns;
    const auto *a = static_cast<const std::uint32_t *>(p.a);
    for (std::size_t index = first; index < last; ++index) {
        const std::size_t feature = index * kPanel;
        for (std::size_t tile = 0; tile < tiles; ++tile) {
            constexpr std::size_t steps = kTile / Op::kSigns;
            for (std::size_t k = 0; k < steps; ++k) {
                const std::size_t code = tile * kTile + k * Op::kSigns;
                for (std::size_t begin = 0; begin < kPanel; begin += 32) {
                    const std::size_t word = (feature + begin) / 32, shift = (feature + begin) % 32;
                    std::uint32_t low = 0, high = 0;
                    if (word < p.words_per_code) {
                        if (code < p.count)
                            low = p.words[code * p.words_per_code + word] >> shift;
                        if (Op::kSigns == 2 && code + 1 < p.count)
                            high = p.words[(code + 1) * p.words_per_code + word] >> shift;
                    }
                    constexpr std::uint32_t width = kPanel < 32 ? kPanel : 32;
                    for (std::uint32_t j = 0; j < width; ++j)
                        p.panel[k * kPanel + begin + j] = Op::step(low >> j, high >> j);
                }
            }
            block_times_panel<Op>(a + row_first * depth + tile * steps, depth, p.panel, steps,
                                  p.scale + row_first * tiles + tile, tiles, p.out + row_first * p.features + feature,
                                  p.features, true, row_last - row_first);
        }
    }
}

// ---- statistics -----------------------------------------------------------------------------------------------------

void row_statistics(const float *z1, const float *z2, std::size_t width, std::size_t first_code, RowState *state) {
    Floats top1 = splat(kAbsent), top2 = top1;
    for (std::size_t j = 0; j < width; j += kLanes) {
        top1 = larger(top1, load(z1 + j));
        top2 = larger(top2, load(z2 + j));
    }
    const float m[2] = {largest(top1), largest(top2)};
    Floats s1{}, s2{}, x1{}, x2{};
    for (std::size_t j = 0; j < width; j += kLanes) {
        const Floats y1 = load(z1 + j) - m[0], y2 = load(z2 + j) - m[1];
        const Floats e1 = exponential(y1), e2 = exponential(y2);
        s1 += e1;
        s2 += e2;
        x1 += e1 * y2;
        x2 += e2 * y1;
    }
    const double s[2] = {total(s1), total(s2)}, x[2] = {total(x1), total(x2)};
    const RowState old = *state;
    for (int v = 0; v < 2; ++v) {
        const float *z = v ? z2 : z1;
        if (old.s[v] == 0 || m[v] > old.m[v]) {
            std::size_t j = 0;
            while (j + 1 < width && z[j] != m[v])
                ++j;
            state->arg[v] = double(first_code + j);
            state->m[v] = m[v];
        }
    }
    for (int v = 0; v < 2; ++v) {
        const int other = 1 - v;
        const double now = __builtin_exp(m[v] - state->m[v]);
        state->s[v] = now * s[v];
        state->x[v] = now * (x[v] + (m[other] - state->m[other]) * s[v]);
        if (old.s[v] != 0) {
            const double before = __builtin_exp(old.m[v] - state->m[v]);
            state->s[v] += before * old.s[v];
            state->x[v] += before * (old.x[v] + (old.m[other] - state->m[other]) * old.s[v]);
        }
    }
}

// Returns the second of the two if one is NaN.
ALWAYS_INLINE Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return reinterpret_cast<Floats>(_mm512_maskz_min_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#else
    return a < b ? a : b;
#endif
}

// e = exp(y - log_sum - peak), at most 2. It is at most 1 but for the rounding of its terms, which is 1000 and more for logits
// of 1e10; without the limit e would be infinite there.
ALWAYS_INLINE Floats below_peak(Floats y, const RowTerms &row, Floats peak) {
    return power_of_two(smaller(splat(1.0f), y * kLog2e - row.log_sum * kLog2e - peak * kLog2e));
}

void column_statistics(const Strip &strip, const RowTerms *terms, float *peak, float *log_sum, std::size_t stride,
                       std::size_t first, std::size_t last) {
    constexpr int block = kPanelMax / kLanes < 4 ? kPanelMax / kLanes : 4;
    for (int v = 0; v < 2; ++v) {
        float *z = strip.z + v * strip.rows * strip.stride;
        const RowTerms *row = terms + v * strip.rows;
        for (std::size_t j = first; j < last; j += block * kLanes) {
            Floats top[block], sum[block];
            for (int b = 0; b < block; ++b)
                top[b] = splat(2 * kAbsent), sum[b] = Floats{};
            // One subtraction: a peak that is off by the rounding of m + log_sum serves as well, if e is relative to the same peak.
            for (std::size_t i = 0; i < strip.rows; ++i) {
                const Floats shift = splat(row[i].m + row[i].log_sum);
                for (int b = 0; b < block; ++b)
                    top[b] = larger(top[b], load(z + i * strip.stride + j + b * kLanes) - shift);
            }
            for (std::size_t i = 0; i < strip.rows; ++i)
                for (int b = 0; b < block; ++b) {
                    float *p = z + i * strip.stride + j + b * kLanes;
                    const Floats e = below_peak(load(p) - row[i].m, row[i], top[b]);
                    sum[b] += e;
                    store(p, e);
                }
            for (int b = 0; b < block; ++b) {
                const std::size_t at = v * stride + j + b * kLanes;
                store(peak + at, top[b]);
                store(log_sum + at, top[b] + logarithm(sum[b]));
            }
        }
    }
}

double prior_columns(const float *peak, const float *log_sum, float log_rows, float codes, bool forward,
                     std::size_t count, std::size_t width, float *weight, float *q) {
    const float log_codes = __builtin_logf(codes);
    Floats lane{};
    for (int i = 0; i < kLanes; ++i)
        lane[i] = float(i);
    double sum = 0;
    for (std::size_t j = 0; j < width; j += kLanes) {
        const Floats t = load(peak + j), log_pbar = load(log_sum + j) - log_rows;
        const Floats e = exponential(t), log_ratio = log_pbar + log_codes;
        Floats scaled, term;
        if (forward) {
            // pbar is at least the peak over the number of rows; the rounding of logits of 1e10 would exceed that by far.
            scaled = exponential(smaller(splat(log_rows), t - log_pbar)) * (-1.0f / codes);
            term = log_pbar * (-1.0f / codes);
        } else {
            scaled = e * log_ratio;
            term = exponential(log_pbar) * log_ratio;
        }
        const auto real = lane < float(count > j ? count - j : 0);
        store(weight + j, real ? (forward ? e : log_ratio) : Floats{});
        store(q + j, real ? scaled : Floats{});
        sum += total(real ? term : Floats{});
    }
    return sum;
}

double prior_row(const float *e, const float *q, std::size_t width) {
    Floats sums[4]{}; // 3.7 cycles per vector with one sum: each addition waits for the one before
    for (std::size_t j = 0; j < width; j += 4 * kLanes)
        UNROLL for (int b = 0; b < 4; ++b) sums[b] += load(e + j + b * kLanes) * load(q + j + b * kLanes);
    return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

double prior_row_of_logits(const float *z, const RowTerms &row, const float *peak, const float *q, std::size_t width) {
    Floats sum{};
    for (std::size_t j = 0; j < width; j += kLanes)
        sum += below_peak(load(z + j) - row.m, row, load(peak + j)) * load(q + j);
    return total(sum);
}

// For the forward prior P g = e q. For the reverse prior, where an underflowed P contributes nothing, P g itself: one array of the
// columns to read instead of three (15.7 cycles per vector with three).
template <bool Forward>
ALWAYS_INLINE void gradient_of_row(float *z1, float *z2, const RowTerms &row1, const RowTerms &row2,
                                   const ColumnTerms &columns, float beta, float factor, std::size_t width) {
    const std::size_t stride = columns.stride;
    const float free1 = beta - row1.a + beta * row1.x, free2 = beta - row2.a + beta * row2.x;
    for (std::size_t j = 0; j < width; j += kLanes) {
        const Floats y1 = load(z1 + j) - row1.m, y2 = load(z2 + j) - row2.m;
        const Floats weight1 = load(columns.weight + j), weight2 = load(columns.weight + stride + j);
        Floats p1, p2, prior1, prior2;
        if constexpr (Forward) {
            const Floats e1 = below_peak(y1, row1, load(columns.peak + j));
            const Floats e2 = below_peak(y2, row2, load(columns.peak + stride + j));
            p1 = e1 * weight1, p2 = e2 * weight2;
            prior1 = e1 * load(columns.q + j), prior2 = e2 * load(columns.q + stride + j);
        } else {
            p1 = power_of_two(y1 * kLog2e - row1.log_sum * kLog2e), p2 = power_of_two(y2 * kLog2e - row2.log_sum * kLog2e);
            prior1 = p1 * weight1, prior2 = p2 * weight2;
        }
        store(z1 + j, factor * (prior1 + p1 * (free1 - beta * y2) - beta * p2));
        store(z2 + j, factor * (prior2 + p2 * (free2 - beta * y1) - beta * p1));
    }
}

void gradient_row(float *z1, float *z2, const RowTerms &row1, const RowTerms &row2, const ColumnTerms &columns,
                  float beta, float factor, std::size_t width) {
    if (columns.forward)
        gradient_of_row<true>(z1, z2, row1, row2, columns, beta, factor, width);
    else
        gradient_of_row<false>(z1, z2, row1, row2, columns, beta, factor, width);
}

// ---- 2-byte forms ---------------------------------------------------------------------------------------------------

void quantise_row(const float *dz, std::size_t width, std::int16_t *out, float *scale) {
    for (std::size_t tile = 0; tile < width; tile += kTile) {
        Floats top{};
        for (std::size_t j = 0; j < kTile; j += kLanes) {
            const Floats v = load(dz + tile + j);
            top = larger(top, larger(v, -v));
        }
        const float peak = largest(top), inverse = peak > 1e-30f ? 32767.0f / peak : 0.0f;
        *scale++ = peak / 32767.0f;
        for (std::size_t j = 0; j < kTile; ++j) {
            const float x = dz[tile + j] * inverse;
            out[tile + j] = static_cast<std::int16_t>(static_cast<std::int32_t>(x + (x < 0 ? -0.5f : 0.5f)));
        }
    }
}

void encode_row(const float *z, std::size_t width, std::uint16_t *out, float *tiles) {
    for (std::size_t tile = 0; tile < width; tile += kTile, tiles += 2) {
        Floats top = splat(kAbsent), bottom = splat(-kAbsent), nothing{}; // NaN where a logit is not finite
        for (std::size_t j = 0; j < kTile; j += kLanes) {
            const Floats v = load(z + tile + j);
            nothing += 0.0f * v;
            top = larger(top, v);
            const Floats real = v > 0.5f * kAbsent ? v : splat(-kAbsent);
            bottom = real < bottom ? real : bottom;
        }
        const float peak = largest(top), range = peak + largest(-bottom);
        const float inverse = range > 1e-30f ? 1.0f / range : 0.0f;
        tiles[0] = peak + float(total(nothing)); // the whole tile becomes NaN then, and with it the loss, as it should
        tiles[1] = range * (1.0f / (65535.0f * 65535.0f));
        for (std::size_t j = 0; j < kTile; ++j) {
            float d = (peak - z[tile + j]) * inverse;
            d = d < 1.0f ? d : 1.0f; // absent columns, whose value the reader puts back
            out[tile + j] = static_cast<std::uint16_t>(static_cast<std::int32_t>(__builtin_sqrtf(d) * 65535.0f + 0.5f));
        }
    }
}

void decode_row(const std::uint16_t *in, const float *tiles, std::size_t width, float *z) {
    for (std::size_t tile = 0; tile < width; tile += kTile, tiles += 2) {
        const float peak = tiles[0], step = tiles[1];
        for (std::size_t j = 0; j < kTile; ++j) {
            const float u = static_cast<float>(static_cast<std::int32_t>(in[tile + j]));
            z[tile + j] = peak - (u * u) * step;
        }
    }
}

// ---- fast Walsh-Hadamard transform ----------------------------------------------------------------------------------

template <int... Values> struct Sequence {};
template <int N, int... Values> struct Count : Count<N - 1, N - 1, Values...> {};
template <int... Values> struct Count<0, Values...> {
    typedef Sequence<Values...> type;
};

// The butterfly of lanes that differ in bit X: the lower gets the sum, the upper the difference.
template <int X, int... Lane> ALWAYS_INLINE Floats lane_butterfly(Floats v, Sequence<Lane...>) {
    const Floats partner = __builtin_shufflevector(v, v, (Lane ^ X)...);
    const Floats sign = {((Lane & X) ? -1.0f : 1.0f)...};
    return v * sign + partner;
}

ALWAYS_INLINE Floats lane_butterflies(Floats v) {
    typedef typename Count<kLanes>::type Lanes;
    v = lane_butterfly<1>(v, Lanes());
    v = lane_butterfly<2>(v, Lanes());
    if constexpr (kLanes > 4)
        v = lane_butterfly<4>(v, Lanes());
    if constexpr (kLanes > 8)
        v = lane_butterfly<8>(v, Lanes());
    return v;
}

template <int Radix> ALWAYS_INLINE void butterflies(Floats (&v)[Radix]) {
    UNROLL for (int half = 1; half < Radix; half *= 2)
        UNROLL for (int i = 0; i < Radix; ++i) if (!(i & half)) {
            const Floats a = v[i], b = v[i + half];
            v[i] = a + b;
            v[i + half] = a - b;
        }
}

template <int... Lane>
ALWAYS_INLINE Floats signed_lanes(float scale, const std::uint32_t *signs, std::size_t first, Sequence<Lane...>) {
    const Words counts = {(31u - Lane)...};
    const Floats all = splat(scale);
    const Words negative = (splat(~signs[first / 32] >> (first % 32)) << counts) & 0x80000000u;
    const Words bits = reinterpret_cast<const Words &>(all) ^ negative;
    return reinterpret_cast<const Floats &>(bits);
}

void expand_diagonal(const std::uint32_t *signs, float scale, std::size_t f, float *diagonal) {
    for (std::size_t k = 0; k < f; k += kLanes)
        store(diagonal + k, signed_lanes(scale, signs, k, typename Count<kLanes>::type()));
}

// diagonal: nullptr for none.
template <int Radix> void first_pass(const float *h, const float *diagonal, std::size_t vectors, float *z) {
    for (std::size_t base = 0; base < vectors * kLanes; base += Radix * kLanes) {
        Floats v[Radix];
        UNROLL for (int r = 0; r < Radix; ++r) {
            v[r] = load(h + base + r * kLanes);
            if (diagonal)
                v[r] *= load(diagonal + base + r * kLanes);
            v[r] = lane_butterflies(v[r]);
        }
        butterflies<Radix>(v);
        UNROLL for (int r = 0; r < Radix; ++r) store(z + base + r * kLanes, v[r]);
    }
}

// The result of a transform's last pass is stored, or added to `sum` times a diagonal. (A separate pass for the addition took
// 3.3 cycles per vector, and the transform 11.8: a store takes two.)
struct Stored {
    float *z;
    ALWAYS_INLINE void operator()(std::size_t at, Floats v) const { store(z + at, v); }
};

struct Added {
    float *sum;
    const float *diagonal;
    ALWAYS_INLINE void operator()(std::size_t at, Floats v) const {
        store(sum + at, load(sum + at) + v * load(diagonal + at));
    }
};

template <int Radix, class Out> void later_pass(float *z, std::size_t vectors, std::size_t stride, const Out &out) {
    for (std::size_t base = 0; base < vectors; base += Radix * stride)
        for (std::size_t offset = base; offset < base + stride; ++offset) {
            Floats v[Radix];
            UNROLL for (int r = 0; r < Radix; ++r) v[r] = load(z + (offset + r * stride) * kLanes);
            butterflies<Radix>(v);
            UNROLL for (int r = 0; r < Radix; ++r) out((offset + r * stride) * kLanes, v[r]);
        }
}

template <int Radix, class Out> std::size_t pass(float *z, std::size_t vectors, std::size_t done, const Out &out) {
    if (done * Radix == vectors)
        later_pass<Radix>(z, vectors, done, out);
    else
        later_pass<Radix>(z, vectors, done, Stored{z});
    return done * Radix;
}

template <class Out>
void transform(const float *h, const float *diagonal, std::size_t f, float *z, const Out &out) {
    constexpr int radix = kLanes == 16 ? 16 : 8; // as many vectors as the registers hold
    const std::size_t vectors = f / kLanes;
    std::size_t done;
    if (vectors >= radix)
        first_pass<radix>(h, diagonal, vectors, z), done = radix;
    else if (vectors >= 4)
        first_pass<4>(h, diagonal, vectors, z), done = 4;
    else if (vectors >= 2)
        first_pass<2>(h, diagonal, vectors, z), done = 2;
    else
        first_pass<1>(h, diagonal, vectors, z), done = 1;
    if (done == vectors)
        later_pass<1>(z, vectors, 1, out);
    while (done < vectors) {
        const std::size_t left = vectors / done;
        if (left >= radix)
            done = pass<radix>(z, vectors, done, out);
        else if (left >= 8)
            done = pass<8>(z, vectors, done, out);
        else if (left >= 4)
            done = pass<4>(z, vectors, done, out);
        else
            done = pass<2>(z, vectors, done, out);
    }
}

void hadamard(const float *h, const float *diagonal, std::size_t f, float *z) {
    transform(h, diagonal, f, z, Stored{z});
}

void add_hadamard(float *z, const float *diagonal, std::size_t f, float *sum) {
    transform(z, nullptr, f, z, Added{sum, diagonal});
}

} // namespace

void FALCON_JOIN(FALCON_LEVEL, _augment_view)(const View &, const ViewScratch &); // view.cpp
void FALCON_JOIN(FALCON_LEVEL, _resize)(const Resize &);                         // resize.cpp

const Level &FALCON_JOIN(FALCON_LEVEL, _level)() {
    static constexpr Level level = {FALCON_STRING(FALCON_LEVEL),
                                    kPanel,
#if defined(__AVX512VNNI__)
                                    true,
#else
                                    false,
#endif
                                    {logits<FloatProduct>, logits<Int16Product>},
                                    {gradient_product<FloatProduct>, gradient_product<Int16Product>},
                                    row_statistics,
                                    column_statistics,
                                    prior_columns,
                                    prior_row,
                                    prior_row_of_logits,
                                    gradient_row,
                                    quantise_row,
                                    encode_row,
                                    decode_row,
                                    expand_diagonal,
                                    hadamard,
                                    add_hadamard,
                                    FALCON_JOIN(FALCON_LEVEL, _augment_view),
                                    FALCON_JOIN(FALCON_LEVEL, _resize)};
    return level;
}

} // namespace falcon
