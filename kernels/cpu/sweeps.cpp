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
constexpr std::size_t kRowsTogether = 8; // their embeddings stay in the L2 cache while a sweep goes over the codes

std::size_t ceil_divide(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

constexpr std::size_t kTasksPerThread = 4; // so that a thread that starts late does less

// work(first, last) over all of [0, items).
template <typename Work> void ranges(std::size_t threads, std::size_t items, const Work &work) {
    const std::size_t tasks = std::min(items, kTasksPerThread * threads);
    parallel(threads, 1, tasks, [&](std::size_t, std::size_t task) {
        work(items * task / tasks, items * (task + 1) / tasks);
    });
}

void fill_absent(const Strip &strip, std::size_t count) {
    for (std::size_t row = 0; row < 2 * strip.rows && count < strip.width; ++row)
        std::fill(strip.z + row * strip.stride + count, strip.z + row * strip.stride + strip.width, kAbsent);
}

} // namespace

// ---- dense ----------------------------------------------------------------------------------------------------------

void dense_logits(const Level &level, std::size_t threads, const Dense &dense, const void *a, const float *scale,
                  const Strip &strip) {
    ranges(threads, ceil_divide(dense.count, level.panel), [&](std::size_t first, std::size_t last) {
        const Product product = {a, scale, 2 * strip.rows, dense.words, dense.words_per_code, dense.count, strip.width,
                                 strip.z, 0, scratch<std::uint32_t>(Use::kPanel, kSteps * kPanelMax)};
        level.logits[dense.kind](product, first, last);
    });
    fill_absent(strip, dense.count);
}

void dense_gradient(const Level &level, std::size_t threads, const Dense &dense, const Strip &strip, float *dh,
                    std::size_t features) {
    const std::size_t rows = 2 * strip.rows, tiles = strip.width / kTile;
    float *scale = scratch<float>(Use::kScale, rows * tiles);
    const void *a = strip.z;
    if (dense.kind == kInt16) {
        std::int16_t *quantised = scratch<std::int16_t>(Use::kQuantised, rows * strip.width);
        ranges(threads, rows, [&](std::size_t first, std::size_t last) {
            for (std::size_t row = first; row < last; ++row)
                level.quantise_row(strip.z + row * strip.width, strip.width, quantised + row * strip.width,
                                   scale + row * tiles);
        });
        a = quantised;
    } else
        std::fill(scale, scale + rows * tiles, 1.0f);
    // A panel is expanded once for each block of rows: large blocks, but a task for every thread.
    const std::size_t panels = features / level.panel;
    // Blocks end at multiples of kRowBlock rows, so that a row is always in a register tile of the same height: the
    // compiler may round each height's last addition in its own way.
    const std::size_t units = ceil_divide(rows, kRowBlock), blocks = std::min(ceil_divide(threads, panels), units);
    parallel(threads, 1, panels * blocks, [&](std::size_t, std::size_t task) {
        const Product product = {a, scale, rows, dense.words, dense.words_per_code, dense.count, strip.width,
                                 dh, features, scratch<std::uint32_t>(Use::kPanel, kSteps * kPanelMax)};
        const std::size_t panel = task / blocks, block = task % blocks;
        level.gradient_product[dense.kind](product, panel, panel + 1, units * block / blocks * kRowBlock,
                                           std::min(rows, units * (block + 1) / blocks * kRowBlock));
    });
}

void strip_rows(const Level &level, std::size_t threads, const Strip &strip, std::size_t first_code, RowState *state) {
    ranges(threads, strip.rows, [&](std::size_t first, std::size_t last) {
        for (std::size_t row = first; row < last; ++row)
            level.row_statistics(strip.z + row * strip.width, strip.z + (strip.rows + row) * strip.width, strip.width,
                                 first_code, state + row);
    });
}

void strip_columns(const Level &level, std::size_t threads, const Strip &strip, const RowTerms *terms, float *peak,
                   float *log_sum, std::size_t stride) {
    ranges(threads, strip.width / kPanelMax, [&](std::size_t first, std::size_t last) {
        level.column_statistics(strip, terms, peak, log_sum, stride, first * kPanelMax, last * kPanelMax);
    });
}

void strip_prior(const Level &level, std::size_t threads, const Strip &strip, const float *q, std::size_t stride,
                 double *a) {
    ranges(threads, 2 * strip.rows, [&](std::size_t first, std::size_t last) {
        for (std::size_t row = first; row < last; ++row)
            a[row] += level.prior_row(strip.z + row * strip.width, q + row / strip.rows * stride, strip.width);
    });
}

void strip_gradient(const Level &level, std::size_t threads, const Strip &strip, const RowTerms *terms,
                    const ColumnTerms &columns, float beta, float factor) {
    ranges(threads, strip.rows, [&](std::size_t first, std::size_t last) {
        for (std::size_t row = first; row < last; ++row)
            level.gradient_row(strip.z + row * strip.width, strip.z + (strip.rows + row) * strip.width, terms[row],
                               terms[strip.rows + row], columns, beta, factor, strip.width);
    });
}

void strip_encode(const Level &level, std::size_t threads, const Strip &strip, std::uint16_t *stored, float *tiles,
                  std::size_t stride) {
    ranges(threads, 2 * strip.rows, [&](std::size_t first, std::size_t last) {
        for (std::size_t row = first; row < last; ++row)
            level.encode_row(strip.z + row * strip.width, strip.width, stored + row * stride,
                             tiles + row * (stride / kTile) * 2);
    });
}

void strip_decode(const Level &level, std::size_t threads, const Strip &strip, const std::uint16_t *stored,
                  const float *tiles, std::size_t stride, std::size_t count) {
    ranges(threads, 2 * strip.rows, [&](std::size_t first, std::size_t last) {
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

// The diagonals of the blocks are the same for all rows, so they are expanded to floats once for many rows. (Expanded from the
// bits at every load, a transform took 14.6 cycles per vector instead of 11.8.)
void expand_diagonals(const Level &level, const Hadamard &hadamard, const Segment &segment, float *diagonals) {
    const std::size_t words = ceil_divide(hadamard.f, 32);
    for (std::size_t code = 0; code < segment.count; code += hadamard.f)
        level.expand_diagonal(hadamard.words + (segment.first + code) / hadamard.f * words, hadamard.scale, hadamard.f,
                              diagonals + code);
}

// row: of both views.
void row_logits(const Level &level, const Hadamard &hadamard, const Segment &segment, std::size_t row,
                const float *diagonals, float *z) {
    const float *h = hadamard.h[row / hadamard.rows] + row % hadamard.rows * hadamard.f;
    for (std::size_t code = 0; code < segment.count; code += hadamard.f)
        level.hadamard(h, diagonals + code, hadamard.f, z + code);
    std::fill(z + segment.count, z + segment.width, kAbsent);
}

// work(row, segment, z1, z2, diagonals) for every row and segment, rows in small groups, so that both the group's embeddings
// and the logits stay in cache. Of one row the segments come in order.
template <typename Work> void sweep(const Level &level, std::size_t threads, const Hadamard &hadamard, const Work &work) {
    const std::size_t segments = ceil_divide(hadamard.codes, hadamard.segment);
    const std::size_t together = std::clamp<std::size_t>(hadamard.rows / (kTasksPerThread * threads), 1, kRowsTogether);
    parallel(threads, 1, ceil_divide(hadamard.rows, together), [&](std::size_t, std::size_t group) {
        float *z1 = scratch<float>(Use::kRows, 2 * hadamard.segment), *z2 = z1 + hadamard.segment;
        float *diagonals = scratch<float>(Use::kDiagonals, hadamard.segment);
        for (std::size_t s = 0; s < segments; ++s) {
            const Segment segment = segment_at(hadamard, s);
            expand_diagonals(level, hadamard, segment, diagonals);
            for (std::size_t row = group * together; row < std::min(hadamard.rows, (group + 1) * together); ++row) {
                row_logits(level, hadamard, segment, row, diagonals, z1);
                row_logits(level, hadamard, segment, hadamard.rows + row, diagonals, z2);
                work(row, segment, z1, z2, diagonals);
            }
        }
    });
}

} // namespace

void hadamard_rows(const Level &level, std::size_t threads, const Hadamard &hadamard, RowState *state) {
    sweep(level, threads, hadamard,
          [&](std::size_t row, const Segment &segment, const float *z1, const float *z2, const float *) {
              level.row_statistics(z1, z2, segment.width, segment.first, state + row);
          });
}

void hadamard_columns(const Level &level, std::size_t threads, const Hadamard &hadamard, const RowTerms *terms,
                      float *peak, float *log_sum, std::size_t stride, const Prior *prior, double sums[2]) {
    const std::size_t rows = 2 * hadamard.rows, segments = ceil_divide(hadamard.codes, hadamard.segment);
    // Rows 8 KiB apart would share four sets of the L1 cache, and columns would miss it in every row.
    const std::size_t stride_z = hadamard.segment + kPanelMax;
    float *z = scratch<float>(Use::kLogits, rows * stride_z);
    // One term for each panel of columns, so that the sum does not depend on which thread computed which panel.
    std::vector<double> partial(prior ? 2 * segments * (hadamard.segment / kPanelMax) : 0);
    const std::size_t tasks = kTasksPerThread * threads;
    parallel(threads, 3 * segments, tasks, [&](std::size_t phase, std::size_t task) {
        const Segment segment = segment_at(hadamard, phase / 3);
        const std::size_t first_row = rows * task / tasks, last_row = rows * (task + 1) / tasks;
        if (phase % 3 == 0) {
            float *diagonals = scratch<float>(Use::kDiagonals, hadamard.segment);
            expand_diagonals(level, hadamard, segment, diagonals);
            for (std::size_t row = first_row; row < last_row; ++row)
                row_logits(level, hadamard, segment, row, diagonals, z + row * stride_z);
        } else if (phase % 3 == 1) {
            const Strip strip = {z, hadamard.rows, segment.width, stride_z};
            const std::size_t panels = segment.width / kPanelMax;
            for (std::size_t p = panels * task / tasks; p < panels * (task + 1) / tasks; ++p) {
                const std::size_t column = p * kPanelMax, at = segment.first + column;
                const std::size_t real = column < segment.count ? std::min(kPanelMax, segment.count - column) : 0;
                level.column_statistics(strip, terms, peak + segment.first, log_sum + segment.first, stride, column,
                                        column + kPanelMax);
                for (std::size_t view = 0; prior && view < 2; ++view)
                    partial[at / kPanelMax * 2 + view] = level.prior_columns(
                        peak + view * stride + at, log_sum + view * stride + at, prior->log_rows, float(hadamard.codes),
                        prior->forward, real, kPanelMax, prior->weight + view * stride + at, prior->q + view * stride + at);
            }
        } else if (prior)
            for (std::size_t row = first_row; row < last_row; ++row)
                prior->a[row] += level.prior_row(z + row * stride_z, prior->q + row / hadamard.rows * stride + segment.first,
                                                 segment.width);
    });
    sums[0] = sums[1] = 0;
    for (std::size_t i = 0; i < partial.size(); ++i)
        sums[i % 2] += partial[i];
}

void hadamard_prior(const Level &level, std::size_t threads, const Hadamard &hadamard, const RowTerms *terms,
                    const ColumnTerms &columns, double *a) {
    sweep(level, threads, hadamard,
          [&](std::size_t row, const Segment &segment, const float *z1, const float *z2, const float *) {
              for (std::size_t view = 0; view < 2; ++view) {
                  const std::size_t at = view * columns.stride + segment.first, i = view * hadamard.rows + row;
                  a[i] += level.prior_row_of_logits(view ? z2 : z1, terms[i], columns.peak + at, columns.q + at,
                                                    segment.width);
              }
          });
}

void hadamard_gradient(const Level &level, std::size_t threads, const Hadamard &hadamard, const RowTerms *terms,
                       const ColumnTerms &columns, float beta, float factor, float *const dh[2]) {
    sweep(level, threads, hadamard,
          [&](std::size_t row, const Segment &segment, float *z1, float *z2, const float *diagonals) {
              const ColumnTerms here = {columns.peak + segment.first, columns.weight + segment.first,
                                        columns.q + segment.first, columns.stride, columns.forward};
              level.gradient_row(z1, z2, terms[row], terms[hadamard.rows + row], here, beta, factor, segment.width);
              for (std::size_t view = 0; view < 2; ++view)
                  for (std::size_t code = 0; code < segment.count; code += hadamard.f)
                      level.add_hadamard((view ? z2 : z1) + code, diagonals + code, hadamard.f, dh[view] + row * hadamard.f);
          });
}

} // namespace falcon
