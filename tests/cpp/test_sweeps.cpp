// The CPU kernels without Python, for the sanitizers: every sweep at every instruction set of this processor, on shapes
// with ragged ends, buffers of exactly the documented size, and results against plain double-precision loops.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "signs.hpp"
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

struct Case {
    size_t n, f, c;
    bool hadamard, int16, stored, forward;
};

size_t up(size_t x, size_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct Problem {
    Case shape;
    float tau, beta = 0.7f;
    std::vector<float> h;               // [2][n][f]
    std::vector<std::uint8_t> signs;    // [c][f], of the codes
    std::vector<std::uint32_t> words;   // as the kernels take them
    std::vector<double> dh;             // expected
};

Problem make(const Case &shape) {
    std::mt19937 random(static_cast<unsigned>(shape.n * 131 + shape.f * 17 + shape.c));
    const auto [n, f, c, hadamard, int16, stored, forward] = shape;
    Problem p = {shape, float(f) / (std::sqrt(float(n)) * 12), 0.7f, {}, {}, {}, {}};
    p.h.resize(2 * n * f);
    std::normal_distribution<float> normal;
    for (float &x : p.h)
        x = std::tanh(normal(random));
    const size_t rows = hadamard ? c / f : c;
    std::vector<std::uint8_t> bits(rows * f);
    for (auto &b : bits)
        b = random() & 1;
    p.words.resize(rows * ((f + 31) / 32));
    pack_signs(bits.data(), rows, f, p.words.data());
    std::vector<float> unpacked(rows * f);
    unpack_signs(p.words.data(), rows, f, unpacked.data());
    for (size_t i = 0; i < bits.size(); ++i)
        if ((unpacked[i] > 0) != bits[i] || std::fabs(unpacked[i]) != 1.0f)
            std::printf("FAILED packing\n"), ++failures;
    p.signs.resize(c * f);
    for (size_t j = 0; j < c; ++j)
        for (size_t k = 0; k < f; ++k)
            p.signs[j * f + k] = hadamard ? bits[j / f * f + k] ^ (__builtin_popcountll(k & (j % f)) & 1) : bits[j * f + k];

    std::vector<double> z(2 * n * c), prob(2 * n * c), pbar(2 * c), a(2 * n), x(2 * n);
    for (size_t r = 0; r < 2 * n; ++r) {
        double top = -1e300, sum = 0;
        for (size_t j = 0; j < c; ++j) {
            double dot = 0;
            for (size_t k = 0; k < f; ++k)
                dot += (p.signs[j * f + k] ? 1.0 : -1.0) * p.h[r * f + k];
            z[r * c + j] = dot / p.tau;
            top = std::fmax(top, z[r * c + j]);
        }
        for (size_t j = 0; j < c; ++j)
            sum += std::exp(z[r * c + j] - top);
        for (size_t j = 0; j < c; ++j) {
            prob[r * c + j] = std::exp(z[r * c + j] - top) / sum;
            pbar[r / n * c + j] += prob[r * c + j] / double(n);
        }
    }
    const auto g = [&](size_t v, size_t j) {
        const double ratio = double(c) * pbar[v * c + j];
        return forward ? -1 / ratio : std::log(ratio);
    };
    for (size_t r = 0; r < 2 * n; ++r)
        for (size_t j = 0; j < c; ++j) {
            a[r] += prob[r * c + j] * g(r / n, j);
            x[r] += prob[r * c + j] * z[(r + n) % (2 * n) * c + j];
        }
    p.dh.resize(2 * n * f);
    for (size_t r = 0; r < 2 * n; ++r)
        for (size_t j = 0; j < c; ++j) {
            const size_t other = (r + n) % (2 * n) * c + j;
            const double mine = prob[r * c + j];
            const double dz = (mine * (g(r / n, j) - a[r]) + p.beta * (mine - prob[other]) -
                               p.beta * mine * (z[other] - x[r])) / (2.0 * double(n) * p.tau);
            for (size_t k = 0; k < f; ++k)
                p.dh[r * f + k] += dz * (p.signs[j * f + k] ? 1 : -1);
        }
    return p;
}

std::vector<RowTerms> terms_of(const std::vector<RowState> &state) {
    const size_t n = state.size();
    std::vector<RowTerms> terms(2 * n);
    for (size_t i = 0; i < n; ++i)
        for (size_t v = 0; v < 2; ++v)
            terms[v * n + i] = {float(state[i].m[v]), float(std::log(state[i].s[v])), float(state[i].x[v] / state[i].s[v]), 0};
    return terms;
}

std::vector<float> dense(const Level &level, size_t threads, const Problem &p, size_t strip_width) {
    const auto [n, f, c, hadamard, int16, stored, forward] = p.shape;
    const size_t words_per_code = (f + 31) / 32, depth = words_per_code * 32, width = up(c, kTile), features = up(f, kPanelMax);
    std::vector<float> scale(2 * n), a(2 * n * depth);
    std::vector<std::int16_t> a16(2 * n * depth);
    for (size_t r = 0; r < 2 * n; ++r) {
        float top = 0;
        for (size_t k = 0; k < f; ++k)
            top = std::fmax(top, std::fabs(p.h[r * f + k]));
        for (size_t k = 0; k < f; ++k) {
            a[r * depth + k] = p.h[r * f + k];
            a16[r * depth + k] = std::int16_t(std::lround(p.h[r * f + k] / top * 32767));
        }
        scale[r] = (int16 ? top / 32767 : 1) / p.tau;
    }
    const void *operand = int16 ? static_cast<const void *>(a16.data()) : a.data();
    std::vector<float> z(2 * n * strip_width), peak(2 * width), log_sum(2 * width), weight(2 * width), q(2 * width);
    std::vector<std::uint16_t> copy(2 * n * width);
    std::vector<float> tiles(2 * n * width / kTile * 2), dh(2 * n * features);
    std::vector<RowState> state(n);
    std::vector<RowTerms> terms;
    std::vector<double> sums(2 * n);
    for (int sweep = 0; sweep < 3; ++sweep) {
        for (size_t first = 0; first < c; first += strip_width) {
            const size_t count = std::min(strip_width, c - first);
            const Strip strip = {z.data(), n, up(count, kTile), up(count, kTile)};
            const Dense codes = {p.words.data() + first * words_per_code, words_per_code, count, int16 ? kInt16 : kFloat};
            float *const tile = tiles.data() + first / kTile * 2;
            if (!stored || sweep == 0)
                dense_logits(level, threads, codes, operand, scale.data(), strip);
            if (stored && sweep == 0)
                strip_encode(level, threads, strip, copy.data() + first, tile, width);
            if (stored)
                strip_decode(level, threads, strip, copy.data() + first, tile, width, count);
            const ColumnTerms columns = {peak.data() + first, weight.data() + first, q.data() + first, width, forward};
            if (sweep == 0)
                strip_rows(level, threads, strip, first, state.data());
            else if (sweep == 1) {
                strip_columns(level, threads, strip, terms.data(), columns.peak, log_sum.data() + first, width);
                for (size_t v = 0; v < 2; ++v)
                    level.prior_columns(columns.peak + v * width, log_sum.data() + first + v * width, std::log(float(n)),
                                        float(c), forward, count, strip.width, columns.weight + v * width, columns.q + v * width);
                strip_prior(level, threads, strip, columns.q, width, sums.data());
            } else {
                strip_gradient(level, threads, strip, terms.data(), columns, p.beta, 1 / (2 * float(n) * p.tau));
                dense_gradient(level, threads, codes, strip, dh.data(), features);
            }
        }
        if (sweep == 0)
            terms = terms_of(state);
        for (size_t r = 0; sweep == 1 && r < 2 * n; ++r)
            terms[r].a = float(sums[r]);
    }
    std::vector<float> result;
    for (size_t r = 0; r < 2 * n; ++r)
        result.insert(result.end(), dh.begin() + r * features, dh.begin() + r * features + f);
    return result;
}

std::vector<float> fast(const Level &level, size_t threads, const Problem &p, size_t segment, bool alone) {
    const auto [n, f, c, hadamard, int16, stored, forward] = p.shape;
    const size_t width = up(c, kTile);
    const Hadamard codes = {{p.h.data(), p.h.data() + n * f}, 1 / p.tau, n, f, p.words.data(), c, segment};
    std::vector<RowState> state(n);
    hadamard_rows(level, threads, codes, state.data());
    std::vector<RowTerms> terms = terms_of(state);
    std::vector<float> peak(2 * width), log_sum(2 * width), weight(2 * width), q(2 * width), dh(2 * n * f);
    std::vector<double> a(2 * n);
    double sums[2];
    const Prior prior = {std::log(float(n)), forward, weight.data(), q.data(), a.data()};
    hadamard_columns(level, threads, codes, terms.data(), peak.data(), log_sum.data(), width, alone ? &prior : nullptr, sums);
    const ColumnTerms columns = {peak.data(), weight.data(), q.data(), width, forward};
    if (!alone) {
        for (size_t v = 0; v < 2; ++v)
            level.prior_columns(peak.data() + v * width, log_sum.data() + v * width, prior.log_rows, float(c), forward, c,
                                width, weight.data() + v * width, q.data() + v * width);
        hadamard_prior(level, threads, codes, terms.data(), columns, a.data());
    }
    for (size_t r = 0; r < 2 * n; ++r)
        terms[r].a = float(a[r]);
    float *const views[2] = {dh.data(), dh.data() + n * f};
    hadamard_gradient(level, threads, codes, terms.data(), columns, p.beta, 1 / (2 * float(n)), views);
    return dh;
}

void compare(const Level &level, const Problem &p, const std::vector<float> &one, const std::vector<float> &many, const char *what) {
    double error = 0, norm = 0;
    for (size_t i = 0; i < p.dh.size(); ++i) {
        error += (one[i] - p.dh[i]) * (one[i] - p.dh[i]);
        norm += p.dh[i] * p.dh[i];
    }
    expect(std::isfinite(error) && error <= 1e-6 * norm, what, level, std::sqrt(error), std::sqrt(norm));
    expect(one == many, "one and many threads", level, 0, 0);
}

} // namespace

int main() {
    for (auto level = levels(); *level; ++level) {
        for (const Case &shape : {Case{1, 64, 2, false, true, false, false}, Case{7, 70, 130, false, true, true, false},
                                  Case{60, 33, 300, false, false, false, true}, Case{5, 1100, 513, false, true, false, true},
                                  Case{4, 1, 129, false, false, true, false}}) {
            const Problem p = make(shape);
            for (size_t width : {kTile, 3 * kTile})
                compare(**level, p, dense(**level, 1, p, width), dense(**level, 3, p, width), "dense gradient");
        }
        for (const Case &shape : {Case{1, 16, 16, true, false, false, false}, Case{9, 32, 160, true, false, false, true},
                                  Case{5, 512, 1536, true, false, false, false}, Case{3, 64, 320, true, false, false, true}}) {
            const Problem p = make(shape);
            for (size_t segment : {std::max<size_t>(128, shape.f), std::max<size_t>(2048, shape.f)})
                for (bool alone : {true, false})
                    compare(**level, p, fast(**level, 1, p, segment, alone), fast(**level, 3, p, segment, alone),
                            "Hadamard gradient");
        }
        std::printf("%s done\n", (*level)->name);
    }
    return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
