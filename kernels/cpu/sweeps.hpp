// The loss in sweeps over a dictionary, with threads and scratch. A dense dictionary goes strip by strip (level.hpp):
// logits, then statistics or gradient in place, then the product back. A Hadamard dictionary goes through whole sweeps,
// in which the logits of a row for a segment of codes stay in the L1 cache and are computed again each time.
#pragma once

#include "level.hpp"

namespace falcon {

// The instruction sets this processor can run, best first, ending with nullptr.
const Level *const *levels();

enum Kind { kFloat = 0, kInt16 = 1 };

struct Dense {
    const std::uint32_t *words; // of the strip's first code
    std::size_t words_per_code, count;
    Kind kind;
};

// strip = scale * (a W), rows of both views; a: [2 rows][32 words_per_code] floats or int16.
void dense_logits(const Level &, std::size_t threads, const Dense &, const void *a, const float *scale, const Strip &);
// dh += strip W^T; dh: [2 rows][features], features a multiple of kPanelMax.
void dense_gradient(const Level &, std::size_t threads, const Dense &, const Strip &, float *dh, std::size_t features);

// first_code: of the strip, in the dictionary. state: [rows].
void strip_rows(const Level &, std::size_t threads, const Strip &, std::size_t first_code, RowState *state);
void strip_columns(const Level &, std::size_t threads, const Strip &, const RowTerms *, float *peak, float *log_sum,
                   std::size_t stride);
// a: [2][rows], added to, from a strip that strip_columns has turned into e.
void strip_prior(const Level &, std::size_t threads, const Strip &, const float *q, std::size_t stride, double *a);
void strip_gradient(const Level &, std::size_t threads, const Strip &, const RowTerms *, const ColumnTerms &, float beta,
                    float factor);
// tiles: [2 rows][width / kTile][2]. Rows of both forms are `stride` columns apart (and stride / kTile tiles).
void strip_encode(const Level &, std::size_t threads, const Strip &, std::uint16_t *stored, float *tiles,
                  std::size_t stride);
void strip_decode(const Level &, std::size_t threads, const Strip &, const std::uint16_t *stored, const float *tiles,
                  std::size_t stride, std::size_t count);

struct Hadamard {
    const float *h[2]; // of each view, [rows][f]
    float scale;       // of the logits: 1 / tau
    std::size_t rows, f;
    const std::uint32_t *words; // [codes / f][ceil(f / 32)]
    std::size_t codes, segment; // codes at a time, a multiple of f and kTile
};

// The arguments for the terms of the prior in a column; codes: number of all codes.
struct Prior {
    float log_rows;
    bool forward;
    float *weight, *q;
    double *a; // [2][rows], added to
};

void hadamard_rows(const Level &, std::size_t threads, const Hadamard &, RowState *state);
// peak, log_sum: [2][stride]. With `prior` also weight, q and a, in the same sweep; returns the views' prior sums.
void hadamard_columns(const Level &, std::size_t threads, const Hadamard &, const RowTerms *, float *peak, float *log_sum,
                      std::size_t stride, const Prior *prior, double sums[2]);
// Computes only a; used when ln pbar first had to be combined across processes.
void hadamard_prior(const Level &, std::size_t threads, const Hadamard &, const RowTerms *, const ColumnTerms &, double *a);
void hadamard_gradient(const Level &, std::size_t threads, const Hadamard &, const RowTerms *, const ColumnTerms &,
                       float beta, float factor, float *const dh[2]);

} // namespace falcon
