// The arithmetic of the loss over ranges of rows or columns, once for each instruction set (level.cpp is compiled for
// each). No function here allocates, throws or starts a thread: threads.hpp splits the ranges, sweeps.cpp provides scratch.
//
// A strip is the logits of both views for some consecutive codes: float [2][rows][width], width a multiple of kTile;
// columns past the last code hold kAbsent and so have no weight. Per row and view y = z - m is the logit below the
// row's maximum m, and P = exp(y - log_sum); t_j = max_i ln P_ij is a column's peak, e_ij = exp(ln P_ij - t_j) is in [0, 1]
// even if some terms underflow, and every later quantity is e_ij times a number of the column:
//
//     P_ij = e_ij E_j,  E_j = exp(t_j)             P_ij g_j = e_ij q_j,  q_j = E_j ln(c pbar_j)     (reverse prior)
//                                                                         q_j = -exp(t_j - ln pbar_j) / c   (forward)
#pragma once

#include <cstddef>
#include <cstdint>

#include "resize.hpp"
#include "view.hpp"

namespace falcon {

constexpr std::size_t kTile = 128;     // codes that share one maximum in the 2-byte copy, and one scale in int16 dZ
constexpr std::size_t kPanelMax = 64;  // widest panel of any instruction set: widths and paddings are multiples of it
constexpr std::size_t kSteps = 512;    // depth of a panel that stays in the L2 cache
constexpr float kAbsent = -1e30f;

// Running statistics of a row: maxima, sums of exp(z - m), sums of exp(z_v - m_v) (z_other - m_other), argmax.
struct RowState {
    double m[2], s[2], x[2], arg[2];
};

// The statistics of a row and view that the later sweeps need: maximum, log-sum-exp - m, E_P[y of the other view], E_P[g].
struct RowTerms {
    float m, log_sum, x, a;
};

// The terms of a code that they need, [2][width] each: peak t, weight and q. The weight is E = exp(t) for the forward prior,
// and ln(c pbar) for the reverse prior, whose gradient needs nothing else.
struct ColumnTerms {
    float *peak, *weight, *q;
    std::size_t stride; // between views
    bool forward;
};

struct Strip {
    float *z;
    std::size_t rows, width, stride; // stride: from row to row
};

struct Product {
    const void *a;             // [rows][depth] of 32-bit steps: a float, or a pair of int16
    const float *scale;        // [rows] (logits) or [rows][width / kTile] (gradient)
    std::size_t rows;          // of both views
    const std::uint32_t *words; // of the first code of the strip
    std::size_t words_per_code, count; // codes in the strip
    std::size_t width;
    float *out;                // logits [rows][width], or gradient [rows][features], added to
    std::size_t features;      // padded width of the gradient, a multiple of kPanelMax
    std::uint32_t *panel;      // scratch, kSteps * kPanelMax
};

struct Level {
    const char *name;
    std::size_t panel; // codes (or features) of one panel: the grain of `logits` and `gradient_product`
    bool fast_int16;   // a pair of int16 products costs as much as one float product

    // Panels [first, last) of the strip's logits; [kind]: 0 float, 1 int16.
    void (*logits[2])(const Product &, std::size_t first, std::size_t last);
    // Feature panels [first, last) for rows [row_first, row_last) of dH += dZ W^T.
    void (*gradient_product[2])(const Product &, std::size_t first, std::size_t last, std::size_t row_first,
                                std::size_t row_last);

    void (*row_statistics)(const float *z1, const float *z2, std::size_t width, std::size_t first_code, RowState *);
    // e into the strip; peak and log_sum (ln sum_i P_ij) of columns [first, last), multiples of kPanelMax.
    void (*column_statistics)(const Strip &, const RowTerms *terms, float *peak, float *log_sum, std::size_t stride,
                              std::size_t first, std::size_t last);
    // weight and q of `count` columns from peak and ln pbar = log_sum - log_rows; columns beyond, to `width`, get 0.
    // Returns the sum over the columns of pbar ln(c pbar), or of -ln(pbar) / c.
    double (*prior_columns)(const float *peak, const float *log_sum, float log_rows, float codes, bool forward,
                            std::size_t count, std::size_t width, float *weight, float *q);
    // sum_j e_ij q_j of one row and view.
    double (*prior_row)(const float *e, const float *q, std::size_t width);
    // The same from the logits.
    double (*prior_row_of_logits)(const float *z, const RowTerms &, const float *peak, const float *q, std::size_t width);
    // dZ over the logits, both views of a row, times `factor`.
    void (*gradient_row)(float *z1, float *z2, const RowTerms &, const RowTerms &, const ColumnTerms &, float beta,
                         float factor, std::size_t width);
    // Round a row of dZ to int16 with one scale per tile.
    void (*quantise_row)(const float *dz, std::size_t width, std::int16_t *out, float *scale);
    // The 2-byte copy: with d = max - z and D its largest in the tile, round(65535 sqrt(d / D)). The error of d is
    // sqrt(d D) / 65535, small where the probability is large; that of half precision is d / 2048.
    void (*encode_row)(const float *z, std::size_t width, std::uint16_t *out, float *tiles);
    void (*decode_row)(const std::uint16_t *in, const float *tiles, std::size_t width, float *z);
    // The diagonal D of a block: f signs (bit 1: +) times scale. f is a power of two of at least 16, here and below.
    void (*expand_diagonal)(const std::uint32_t *signs, float scale, std::size_t f, float *diagonal);
    // z = H D h.
    void (*hadamard)(const float *h, const float *diagonal, std::size_t f, float *z);
    // sum += D H z; z is overwritten.
    void (*add_hadamard)(float *z, const float *diagonal, std::size_t f, float *sum);

    // The photometric stage of one view (view.hpp).
    void (*augment_view)(const View &, const ViewScratch &);
    // A region resized (resize.hpp).
    void (*resize)(const Resize &);
};

const Level &portable_level();
const Level &avx2_level();
const Level &avx512_level();

} // namespace falcon
