#include "sweeps.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "threads.hpp"

namespace falcon {

const Level *const *levels() {
    static const Level *available[4] = {};
    static const bool found = [] {
        const Level **next = available;
#if defined(FALCON_X86)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni"))
            *next++ = &avx512_level();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
            *next++ = &avx2_level();
#endif
        *next = &portable_level();
        return true;
    }();
    (void)found;
    return available;
}

namespace {

constexpr std::size_t kRowBlock = 48; // a multiple of the register tile's 6 rows
constexpr std::size_t kRowsTogether = 8; // whose embeddings stay in the second cache while a sweep goes over the codes

std::size_t ceil_divide(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

void fill_absent(const Strip &strip, std::size_t count) {
    for (std::size_t row = 0; row < 2 * strip.rows && count < strip.width; ++row)
        std::fill(strip.z + row * strip.width + count, strip.z + (row + 1) * strip.width, kAbsent);
}

} // namespace

// ---- dense ----------------------------------------------------------------------------------------------------------

void dense_logits(const Level &level, std::size_t threads, const Dense &dense, const void *a, const float *scale,
                  const Strip &strip) {
    const std::size_t panels = ceil_divide(dense.count, level.panel);
    threads = std::min(threads, panels);
    std::vector<std::uint32_t> scratch(threads * kSteps * kPanelMax);
    team(threads, [&](std::size_t index, std::size_t count, const Sync &) {
        const Product product = {a, scale, 2 * strip.rows, dense.words, dense.words_per_code, dense.count, strip.width,
                                 strip.z, 0, scratch.data() + index * kSteps * kPanelMax};
        level.logits[dense.kind](product, panels * index / count, panels * (index + 1) / count);
    });
    fill_absent(strip, dense.count);
}

void dense_gradient(const Level &level, std::size_t threads, const Dense &dense, const Strip &strip, float *dh,
                    std::size_t features) {
    const std::size_t rows = 2 * strip.rows, tiles = strip.width / kTile;
    std::vector<std::int16_t> quantised(dense.kind == kInt16 ? rows * strip.width : 0);
    std::vector<float> scale(rows * tiles, 1.0f);
    if (dense.kind == kInt16)
        split(threads, rows, [&](std::size_t first, std::size_t last) {
            for (std::size_t row = first; row < last; ++row)
                level.quantise_row(strip.z + row * strip.width, strip.width, quantised.data() + row * strip.width,
                                   scale.data() + row * tiles);
        });
    const void *a = dense.kind == kInt16 ? static_cast<const void *>(quantised.data()) : strip.z;
    // A panel is expanded once for each block of rows: large blocks, but a task for every thread.
    const std::size_t panels = features / level.panel;
    // Blocks end at multiples of kRowBlock rows, so that a row is always in a register tile of the same height: the
    // compiler may round each height's last addition in its own way.
    const std::size_t units = ceil_divide(rows, kRowBlock), blocks = std::min(ceil_divide(threads, panels), units);
    const std::size_t tasks = panels * blocks;
    threads = std::min(threads, tasks);
    std::vector<std::uint32_t> scratch(threads * kTile * kPanelMax);
    team(threads, [&](std::size_t index, std::size_t count, const Sync &) {
        const Product product = {a, scale.data(), rows, dense.words, dense.words_per_code, dense.count, strip.width,
                                 dh, features, scratch.data() + index * kTile * kPanelMax};
        for (std::size_t task = tasks * index / count; task < tasks * (index + 1) / count; ++task) {
            const std::size_t panel = task / blocks, block = task % blocks;
            level.gradient_product[dense.kind](product, panel, panel + 1, units * block / blocks * kRowBlock,
                                               std::min(rows, units * (block + 1) / blocks * kRowBlock));
        }
    });
}

void strip_rows(const Level &level, std::size_t threads, const Strip &strip, std::size_t first_code, RowState *state) {
    split(threads, strip.rows, [&](std::size_t first, std::size_t last) {
        for (std::size_t row = first; row < last; ++row)
            level.row_statistics(strip.z + row * strip.width, strip.z + (strip.rows + row) * strip.width, strip.width,
                                 first_code, state + row);
    });
}

void strip_columns(const Level &level, std::size_t threads, const Strip &strip, const RowTerms *terms, float *peak,
                   float *log_sum, std::size_t stride) {
    split(threads, strip.width / kPanelMax, [&](std::size_t first, std::size_t last) {
        level.column_statistics(strip, terms, peak, log_sum, stride, first * kPanelMax, last * kPanelMax);
    });
}

void strip_prior(const Level &level, std::size_t threads, const Strip &strip, const float *q, std::size_t stride,
                 double *a) {
    split(threads, 2 * strip.rows, [&](std::size_t first, std::size_t last) {
        for (std::size_t row = first; row < last; ++row)
            a[row] += level.prior_row(strip.z + row * strip.width, q + row / strip.rows * stride, strip.width);
    });
}

void strip_gradient(const Level &level, std::size_t threads, const Strip &strip, const RowTerms *terms,
                    const ColumnTerms &columns, float beta, float factor) {
    split(threads, strip.rows, [&](std::size_t first, std::size_t last) {
        for (std::size_t row = first; row < last; ++row)
            level.gradient_row(strip.z + row * strip.width, strip.z + (strip.rows + row) * strip.width, terms[row],
                               terms[strip.rows + row], columns, beta, factor, strip.width);
    });
}

void strip_encode(const Level &level, std::size_t threads, const Strip &strip, std::uint16_t *stored, float *tiles,
                  std::size_t stride) {
    split(threads, 2 * strip.rows, [&](std::size_t first, std::size_t last) {
        for (std::size_t row = first; row < last; ++row)
            level.encode_row(strip.z + row * strip.width, strip.width, stored + row * stride,
                             tiles + row * (stride / kTile) * 2);
    });
}

void strip_decode(const Level &level, std::size_t threads, const Strip &strip, const std::uint16_t *stored,
                  const float *tiles, std::size_t stride, std::size_t count) {
    split(threads, 2 * strip.rows, [&](std::size_t first, std::size_t last) {
        for (std::size_t row = first; row < last; ++row)
            level.decode_row(stored + row * stride, tiles + row * (stride / kTile) * 2, strip.width,
                             strip.z + row * strip.width);
    });
    fill_absent(strip, count);
}

// ---- Hadamard -------------------------------------------------------------------------------------------------------

namespace {

struct Segment {
    std::size_t first, count, width; // codes; width: count up to a multiple of kTile
};

Segment segment_at(const Hadamard &hadamard, std::size_t index) {
    const std::size_t first = index * hadamard.segment, count = std::min(hadamard.segment, hadamard.codes - first);
    return {first, count, ceil_divide(count, kTile) * kTile};
}

void expand_flips(const Hadamard &hadamard, const Segment &segment, std::uint32_t *flips) {
    const std::size_t words_per_block = ceil_divide(hadamard.f, 32);
    for (std::size_t code = 0; code < segment.count; code += hadamard.f) {
        const std::uint32_t *words = hadamard.words + (segment.first + code) / hadamard.f * words_per_block;
        for (std::size_t k = 0; k < hadamard.f; k += 16) {
            const std::uint32_t word = ~words[k / 32] >> (k % 32);
            for (std::size_t bit = 0; bit < 16; ++bit)
                flips[code + k + bit] = (word >> bit) << 31;
        }
    }
}

void row_logits(const Level &level, const Hadamard &hadamard, const Segment &segment, std::size_t row,
                const std::uint32_t *flips, float *z) {
    for (std::size_t code = 0; code < segment.count; code += hadamard.f)
        level.hadamard(hadamard.h + row * hadamard.f, flips + code, hadamard.f, z + code);
    std::fill(z + segment.count, z + segment.width, kAbsent);
}

// work(row, segment, z1, z2, flips) for every row and segment, a thread's rows in small groups, so that both the group's
// embeddings and the logits stay in cache. Of one row the segments come in order.
template <typename Work> void sweep(const Level &level, std::size_t threads, const Hadamard &hadamard, const Work &work) {
    const std::size_t segments = ceil_divide(hadamard.codes, hadamard.segment);
    threads = std::min(threads, hadamard.rows);
    std::vector<float> scratch(threads * 3 * hadamard.segment);
    team(threads, [&](std::size_t index, std::size_t count, const Sync &) {
        float *z1 = scratch.data() + index * 3 * hadamard.segment, *z2 = z1 + hadamard.segment;
        auto *flips = reinterpret_cast<std::uint32_t *>(z2 + hadamard.segment);
        const std::size_t last = hadamard.rows * (index + 1) / count;
        for (std::size_t group = hadamard.rows * index / count; group < last; group += kRowsTogether)
            for (std::size_t s = 0; s < segments; ++s) {
                const Segment segment = segment_at(hadamard, s);
                expand_flips(hadamard, segment, flips);
                for (std::size_t row = group; row < std::min(last, group + kRowsTogether); ++row) {
                    row_logits(level, hadamard, segment, row, flips, z1);
                    row_logits(level, hadamard, segment, hadamard.rows + row, flips, z2);
                    work(row, segment, z1, z2, flips);
                }
            }
    });
}

} // namespace

void hadamard_rows(const Level &level, std::size_t threads, const Hadamard &hadamard, RowState *state) {
    sweep(level, threads, hadamard,
          [&](std::size_t row, const Segment &segment, const float *z1, const float *z2, const std::uint32_t *) {
              level.row_statistics(z1, z2, segment.width, segment.first, state + row);
          });
}

void hadamard_columns(const Level &level, std::size_t threads, const Hadamard &hadamard, const RowTerms *terms,
                      float *peak, float *log_sum, std::size_t stride, const Prior *prior, double sums[2]) {
    const std::size_t rows = 2 * hadamard.rows, segments = ceil_divide(hadamard.codes, hadamard.segment);
    std::vector<float> logits(rows * hadamard.segment);
    std::vector<std::uint32_t> flips(threads * hadamard.segment);
    // A term for each panel of columns, so that the sum does not depend on who formed which.
    std::vector<double> partial(2 * (hadamard.segment / kPanelMax));
    sums[0] = sums[1] = 0;
    team(threads, [&](std::size_t index, std::size_t count, const Sync &sync) {
        std::uint32_t *mine = flips.data() + index * hadamard.segment;
        for (std::size_t s = 0; s < segments; ++s) {
            const Segment segment = segment_at(hadamard, s);
            // One stride for all segments: a last, shorter one must not lie over rows that another thread still reads.
            const Strip strip = {logits.data(), hadamard.rows, hadamard.segment};
            const std::size_t first_row = rows * index / count, last_row = rows * (index + 1) / count;
            expand_flips(hadamard, segment, mine);
            for (std::size_t row = first_row; row < last_row; ++row)
                row_logits(level, hadamard, segment, row, mine, strip.z + row * strip.width);
            sync();
            const std::size_t panels = segment.width / kPanelMax;
            for (std::size_t p = panels * index / count; p < panels * (index + 1) / count; ++p) {
                const std::size_t column = p * kPanelMax, at = segment.first + column;
                level.column_statistics(strip, terms, peak + segment.first, log_sum + segment.first, stride, column,
                                        column + kPanelMax);
                const std::size_t real = column < segment.count ? std::min(kPanelMax, segment.count - column) : 0;
                for (std::size_t view = 0; prior && view < 2; ++view)
                    partial[2 * p + view] = level.prior_columns(
                        peak + view * stride + at, log_sum + view * stride + at, prior->log_rows, float(hadamard.codes),
                        prior->forward, real, kPanelMax, prior->weight + view * stride + at, prior->q + view * stride + at);
            }
            sync();
            if (!prior)
                continue;
            if (index == 0)
                for (std::size_t p = 0; p < panels; ++p)
                    sums[0] += partial[2 * p], sums[1] += partial[2 * p + 1];
            // The same rows as above: no barrier is needed before their logits are formed anew.
            for (std::size_t row = first_row; row < last_row; ++row)
                prior->a[row] += level.prior_row(strip.z + row * strip.width,
                                                 prior->q + row / hadamard.rows * stride + segment.first, segment.width);
        }
    });
}

void hadamard_prior(const Level &level, std::size_t threads, const Hadamard &hadamard, const RowTerms *terms,
                    const ColumnTerms &columns, double *a) {
    sweep(level, threads, hadamard,
          [&](std::size_t row, const Segment &segment, const float *z1, const float *z2, const std::uint32_t *) {
              for (std::size_t view = 0; view < 2; ++view) {
                  const std::size_t at = view * columns.stride + segment.first, i = view * hadamard.rows + row;
                  a[i] += level.prior_row_of_logits(view ? z2 : z1, terms[i], columns.peak + at, columns.q + at,
                                                    segment.width);
              }
          });
}

void hadamard_gradient(const Level &level, std::size_t threads, const Hadamard &hadamard, const RowTerms *terms,
                       const ColumnTerms &columns, float beta, float factor, float *dh) {
    const std::vector<std::uint32_t> unflipped(hadamard.f, 0);
    sweep(level, threads, hadamard,
          [&](std::size_t row, const Segment &segment, float *z1, float *z2, const std::uint32_t *flips) {
              const ColumnTerms here = {columns.peak + segment.first, columns.weight + segment.first,
                                        columns.q + segment.first, columns.stride};
              level.gradient_row(z1, z2, terms[row], terms[hadamard.rows + row], here, beta, factor, segment.width);
              for (std::size_t view = 0; view < 2; ++view)
                  for (std::size_t code = 0; code < segment.count; code += hadamard.f) {
                      float *dz = (view ? z2 : z1) + code;
                      level.hadamard(dz, unflipped.data(), hadamard.f, dz);
                      level.add_flipped(dz, flips + code, hadamard.f, dh + (view * hadamard.rows + row) * hadamard.f);
                  }
          });
}

} // namespace falcon
