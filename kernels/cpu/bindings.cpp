// The Python interface of the C++ kernels. Arrays arrive through the buffer protocol or DLPack, so one build serves every version
// of torch. Shapes are checked here, once, so that the kernels cannot read or write out of bounds. Nothing is converted: a
// converted output would be a copy.

#include "bindings.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "signs.hpp"
#include "sweeps.hpp"
#include "threads.hpp"

namespace nb = nanobind;

using falcon::kTile;
using std::size_t;

void require(bool holds, const char *rule) {
    if (!holds)
        throw std::invalid_argument(rule);
}

size_t team_size(int threads) {
    require(threads >= 1, "the number of threads must be at least 1");
    return static_cast<size_t>(threads);
}

static const falcon::Level *chosen = falcon::levels()[0];

const falcon::Level &level_in_use() { return *chosen; }

namespace {

template <typename Scalar> using Matrix = Array<Scalar, 2>;
template <typename Scalar> using Cube = Array<Scalar, 3>;
template <typename Scalar> using Vector = Array<Scalar, 1>;

void check_words(size_t signs_rows, size_t f, size_t words_rows, size_t words_columns) {
    require(signs_rows == words_rows && words_columns == (f + 31) / 32,
            "packed words must have the shape (rows, ceil(f / 32)) of the signs (rows, f)");
}

falcon::Strip strip_of(const Cube<float> &z) {
    require(z.shape(0) == 2 && z.shape(1) >= 1, "a strip must have the shape (2, rows, width), rows at least 1");
    require(z.shape(2) >= kTile && z.shape(2) % kTile == 0, "the width of a strip must be a multiple of 128, not 0");
    return {z.data(), z.shape(1), z.shape(2), z.shape(2)};
}

const falcon::RowTerms *terms_of(const Cube<const float> &terms, size_t rows) {
    require(terms.shape(0) == 2 && terms.shape(1) == rows && terms.shape(2) == 4,
            "row terms must have the shape (2, rows, 4)");
    return reinterpret_cast<const falcon::RowTerms *>(terms.data());
}

falcon::RowState *state_of(const Matrix<double> &state, size_t rows) {
    static_assert(sizeof(falcon::RowState) == 8 * sizeof(double));
    require(state.shape(0) == rows && state.shape(1) == 8, "row state must have the shape (rows, 8)");
    return reinterpret_cast<falcon::RowState *>(state.data());
}

// Codes [first, first + count) of a dictionary, and a strip wide enough for them.
falcon::Dense dense_of(const Matrix<const std::int32_t> &words, size_t first, size_t count, const falcon::Strip &strip,
                       bool int16) {
    require(count >= 1 && first <= words.shape(0) && count <= words.shape(0) - first && count <= strip.width,
            "the codes of a strip must lie within the dictionary and fit the strip's width");
    require(words.shape(1) >= 1, "a code must have at least one word");
    return {reinterpret_cast<const std::uint32_t *>(words.data()) + first * words.shape(1), words.shape(1), count,
            int16 ? falcon::kInt16 : falcon::kFloat};
}

void check_columns(const Matrix<float> &columns, size_t first, size_t width) {
    require(columns.shape(0) == 2 && first <= columns.shape(1) && width <= columns.shape(1) - first &&
                first % kTile == 0 && columns.shape(1) % kTile == 0,
            "column arrays must have the shape (2, codes up to a multiple of 128)");
}

falcon::ColumnTerms columns_of(const Matrix<float> &peak, const Matrix<float> &weight, const Matrix<float> &q,
                               size_t first, size_t width, bool forward) {
    check_columns(peak, first, width);
    require(weight.shape(0) == 2 && q.shape(0) == 2 && weight.shape(1) == peak.shape(1) &&
                q.shape(1) == peak.shape(1),
            "column arrays must have one shape");
    return {peak.data() + first, weight.data() + first, q.data() + first, peak.shape(1), forward};
}

falcon::Hadamard hadamard_of(const Matrix<const float> &h1, const Matrix<const float> &h2, float scale,
                             const Matrix<const std::int32_t> &words, size_t segment) {
    const size_t n = h1.shape(0), f = h1.shape(1);
    require(n >= 1 && h2.shape(0) == n && h2.shape(1) == f, "embeddings must be two (rows, f) of one shape, rows at least 1");
    require(f >= 16 && (f & (f - 1)) == 0, "the fast transform needs a width f that is a power of two, at least 16");
    require(words.shape(0) >= 1 && words.shape(1) == (f + 31) / 32,
            "packed signs must have the shape (blocks, ceil(f / 32)), at least one block");
    require(segment >= 1 && segment % f == 0 && segment % kTile == 0,
            "the segment must be a multiple of f and of 128, not 0");
    return {{h1.data(), h2.data()}, scale, n, f, reinterpret_cast<const std::uint32_t *>(words.data()),
            words.shape(0) * f, segment};
}

size_t padded(size_t codes) { return (codes + kTile - 1) / kTile * kTile; }

void bind_signs(nb::module_ &module) {
    module.def(
        "pack_signs",
        [](Matrix<const std::uint8_t> signs, Matrix<std::int32_t> words) {
            check_words(signs.shape(0), signs.shape(1), words.shape(0), words.shape(1));
            falcon::pack_signs(signs.data(), signs.shape(0), signs.shape(1),
                               reinterpret_cast<std::uint32_t *>(words.data()));
        },
        nb::arg("signs").noconvert(), nb::arg("words").noconvert(),
        "Pack (rows, f) bytes, 0 or not, into (rows, ceil(f / 32)) words.");
    module.def(
        "unpack_signs",
        [](Matrix<const std::int32_t> words, Matrix<float> signs) {
            check_words(signs.shape(0), signs.shape(1), words.shape(0), words.shape(1));
            falcon::unpack_signs(reinterpret_cast<const std::uint32_t *>(words.data()), signs.shape(0),
                                 signs.shape(1), signs.data());
        },
        nb::arg("words").noconvert(), nb::arg("signs").noconvert(),
        "Unpack (rows, ceil(f / 32)) words into (rows, f) of -1 and +1.");
}

void bind_levels(nb::module_ &module) {
    module.def(
        "levels",
        [] {
            std::vector<std::string> names;
            for (auto level = falcon::levels(); *level; ++level)
                names.emplace_back((*level)->name);
            return names;
        },
        "The instruction sets this processor runs, best first.");
    module.def("level", [] { return std::string(chosen->name); }, "The instruction set in use.");
    module.def(
        "use_level",
        [](const std::string &name) {
            for (auto level = falcon::levels(); *level; ++level)
                if (name == (*level)->name) {
                    chosen = *level;
                    return;
                }
            throw std::invalid_argument("this processor has no instruction set called " + name);
        },
        nb::arg("name"), "Use another instruction set than the best (for tests).");
    module.def("fast_int16", [] { return chosen->fast_int16; }, "Whether int16 products are faster than float here.");
}

void bind_dense(nb::module_ &module) {
    module.def(
        "dense_logits",
        [](Cube<float> z, Matrix<const std::int32_t> a, Vector<const float> scale, Matrix<const std::int32_t> words,
           size_t first, size_t count, bool int16, int threads) {
            const falcon::Strip strip = strip_of(z);
            const falcon::Dense dense = dense_of(words, first, count, strip, int16);
            require(a.shape(0) == 2 * strip.rows && a.shape(1) == dense.words_per_code * (int16 ? 16 : 32),
                    "embeddings must have the shape (2 rows, 32 words), padded with zeros");
            require(scale.shape(0) == 2 * strip.rows, "there must be one scale a row");
            falcon::dense_logits(*chosen, team_size(threads), dense, a.data(), scale.data(), strip);
        },
        nb::arg("z").noconvert(), nb::arg("a").noconvert(), nb::arg("scale").noconvert(), nb::arg("words").noconvert(),
        nb::arg("first"), nb::arg("count"), nb::arg("int16"), nb::arg("threads"), Without_gil(),
        "z = scale a W for codes [first, first + count); a: the bits of float (or pairs of int16), as int32.");
    module.def(
        "dense_gradient",
        [](Cube<float> dz, Matrix<const std::int32_t> words, size_t first, size_t count, Matrix<float> dh, bool int16,
           int threads) {
            const falcon::Strip strip = strip_of(dz);
            const falcon::Dense dense = dense_of(words, first, count, strip, int16);
            require(dh.shape(0) == 2 * strip.rows && dh.shape(1) >= falcon::kPanelMax &&
                        dh.shape(1) % falcon::kPanelMax == 0,
                    "the gradient must have the shape (2 rows, f up to a multiple of 64)");
            falcon::dense_gradient(*chosen, team_size(threads), dense, strip, dh.data(), dh.shape(1));
        },
        nb::arg("dz").noconvert(), nb::arg("words").noconvert(), nb::arg("first"), nb::arg("count"),
        nb::arg("dh").noconvert(), nb::arg("int16"), nb::arg("threads"), Without_gil(), "dh += dz W^T.");
}

void bind_strips(nb::module_ &module) {
    module.def(
        "strip_rows",
        [](Cube<float> z, size_t first, Matrix<double> state, int threads) {
            const falcon::Strip strip = strip_of(z);
            falcon::strip_rows(*chosen, team_size(threads), strip, first, state_of(state, strip.rows));
        },
        nb::arg("z").noconvert(), nb::arg("first"), nb::arg("state").noconvert(), nb::arg("threads"), Without_gil());
    module.def(
        "strip_columns",
        [](Cube<float> z, Cube<const float> terms, Matrix<float> peak, Matrix<float> log_sum, size_t first,
           int threads) {
            const falcon::Strip strip = strip_of(z);
            check_columns(peak, first, strip.width);
            check_columns(log_sum, first, strip.width);
            require(peak.shape(1) == log_sum.shape(1), "column arrays must have one shape");
            falcon::strip_columns(*chosen, team_size(threads), strip, terms_of(terms, strip.rows), peak.data() + first,
                                  log_sum.data() + first, peak.shape(1));
        },
        nb::arg("z").noconvert(), nb::arg("terms").noconvert(), nb::arg("peak").noconvert(),
        nb::arg("log_sum").noconvert(), nb::arg("first"), nb::arg("threads"), Without_gil());
    module.def(
        "prior_columns",
        [](Matrix<float> peak, Matrix<float> log_sum, float log_rows, size_t codes, bool forward, size_t first,
           size_t width, Matrix<float> weight, Matrix<float> q) {
            const falcon::ColumnTerms columns = columns_of(peak, weight, q, first, width, forward);
            check_columns(log_sum, first, width);
            require(log_sum.shape(1) == columns.stride, "column arrays must have one shape");
            require(width % kTile == 0, "the width must be a multiple of 128");
            const size_t count = first < codes ? std::min(codes - first, width) : 0;
            std::vector<double> sums(2);
            for (size_t view = 0; view < 2; ++view) {
                const size_t at = view * columns.stride;
                sums[view] = chosen->prior_columns(columns.peak + at, log_sum.data() + first + at, log_rows,
                                                   static_cast<float>(codes), forward, count, width,
                                                   columns.weight + at, columns.q + at);
            }
            return sums;
        },
        nb::arg("peak").noconvert(), nb::arg("log_sum").noconvert(), nb::arg("log_rows"), nb::arg("codes"),
        nb::arg("forward"), nb::arg("first"), nb::arg("width"), nb::arg("weight").noconvert(), nb::arg("q").noconvert());
    module.def(
        "strip_prior",
        [](Cube<float> e, Matrix<float> q, size_t first, Matrix<double> a, int threads) {
            const falcon::Strip strip = strip_of(e);
            check_columns(q, first, strip.width);
            require(a.shape(0) == 2 && a.shape(1) == strip.rows, "row sums must have the shape (2, rows)");
            falcon::strip_prior(*chosen, team_size(threads), strip, q.data() + first, q.shape(1), a.data());
        },
        nb::arg("e").noconvert(), nb::arg("q").noconvert(), nb::arg("first"), nb::arg("a").noconvert(),
        nb::arg("threads"), Without_gil());
    module.def(
        "strip_gradient",
        [](Cube<float> z, Cube<const float> terms, Matrix<float> peak, Matrix<float> weight, Matrix<float> q,
           size_t first, float beta, float factor, bool forward, int threads) {
            const falcon::Strip strip = strip_of(z);
            falcon::strip_gradient(*chosen, team_size(threads), strip, terms_of(terms, strip.rows),
                                   columns_of(peak, weight, q, first, strip.width, forward), beta, factor);
        },
        nb::arg("z").noconvert(), nb::arg("terms").noconvert(), nb::arg("peak").noconvert(),
        nb::arg("weight").noconvert(), nb::arg("q").noconvert(), nb::arg("first"), nb::arg("beta"), nb::arg("factor"),
        nb::arg("forward"), nb::arg("threads"), Without_gil());
    const auto check_stored = [](const falcon::Strip &strip, size_t first, const auto &stored, const auto &tiles) {
        require(stored.shape(0) == 2 * strip.rows && stored.shape(1) % kTile == 0 && first % kTile == 0 &&
                    first <= stored.shape(1) && strip.width <= stored.shape(1) - first,
                "stored logits must have the shape (2 rows, codes up to a multiple of 128)");
        require(tiles.shape(0) == 2 * strip.rows && tiles.shape(1) == stored.shape(1) / kTile && tiles.shape(2) == 2,
                "tiles of stored logits must have the shape (2 rows, codes / 128, 2)");
    };
    module.def(
        "strip_encode",
        [check_stored](Cube<float> z, Matrix<std::uint16_t> stored, Cube<float> tiles, size_t first, int threads) {
            const falcon::Strip strip = strip_of(z);
            check_stored(strip, first, stored, tiles);
            falcon::strip_encode(*chosen, team_size(threads), strip, stored.data() + first,
                                 tiles.data() + first / kTile * 2, stored.shape(1));
        },
        nb::arg("z").noconvert(), nb::arg("stored").noconvert(), nb::arg("tiles").noconvert(), nb::arg("first"),
        nb::arg("threads"), Without_gil());
    module.def(
        "strip_decode",
        [check_stored](Cube<float> z, Matrix<const std::uint16_t> stored, Cube<const float> tiles, size_t first,
                       size_t count, int threads) {
            const falcon::Strip strip = strip_of(z);
            check_stored(strip, first, stored, tiles);
            falcon::strip_decode(*chosen, team_size(threads), strip, stored.data() + first,
                                 tiles.data() + first / kTile * 2, stored.shape(1), count);
        },
        nb::arg("z").noconvert(), nb::arg("stored").noconvert(), nb::arg("tiles").noconvert(), nb::arg("first"),
        nb::arg("count"), nb::arg("threads"), Without_gil());
}

void bind_hadamard(nb::module_ &module) {
    module.def(
        "hadamard_rows",
        [](Matrix<const float> h1, Matrix<const float> h2, float scale, Matrix<const std::int32_t> words, size_t segment, Matrix<double> state, int threads) {
            const falcon::Hadamard hadamard = hadamard_of(h1, h2, scale, words, segment);
            falcon::hadamard_rows(*chosen, team_size(threads), hadamard, state_of(state, hadamard.rows));
        },
        nb::arg("h1").noconvert(), nb::arg("h2").noconvert(), nb::arg("scale"), nb::arg("words").noconvert(), nb::arg("segment"), nb::arg("state").noconvert(),
        nb::arg("threads"), Without_gil());
    module.def(
        "hadamard_columns",
        [](Matrix<const float> h1, Matrix<const float> h2, float scale, Matrix<const std::int32_t> words, size_t segment, Cube<const float> terms,
           Matrix<float> peak, Matrix<float> log_sum, Matrix<float> weight, Matrix<float> q, Matrix<double> a,
           float log_rows, bool forward, bool alone, int threads) {
            const falcon::Hadamard hadamard = hadamard_of(h1, h2, scale, words, segment);
            const size_t width = padded(hadamard.codes);
            columns_of(peak, weight, q, 0, width, forward);
            check_columns(log_sum, 0, width);
            require(peak.shape(1) == log_sum.shape(1), "column arrays must have one shape");
            require(a.shape(0) == 2 && a.shape(1) == hadamard.rows, "row sums must have the shape (2, rows)");
            const falcon::Prior prior = {log_rows, forward, weight.data(), q.data(), a.data()};
            std::vector<double> sums(2);
            const falcon::RowTerms *rows = terms_of(terms, hadamard.rows);
            nb::gil_scoped_release release; // not for the whole call: the result becomes a Python list
            falcon::hadamard_columns(*chosen, team_size(threads), hadamard, rows, peak.data(),
                                     log_sum.data(), peak.shape(1), alone ? &prior : nullptr, sums.data());
            return sums;
        },
        nb::arg("h1").noconvert(), nb::arg("h2").noconvert(), nb::arg("scale"), nb::arg("words").noconvert(), nb::arg("segment"), nb::arg("terms").noconvert(),
        nb::arg("peak").noconvert(), nb::arg("log_sum").noconvert(), nb::arg("weight").noconvert(),
        nb::arg("q").noconvert(), nb::arg("a").noconvert(), nb::arg("log_rows"), nb::arg("forward"), nb::arg("alone"),
        nb::arg("threads"));
    module.def(
        "hadamard_prior",
        [](Matrix<const float> h1, Matrix<const float> h2, float scale, Matrix<const std::int32_t> words, size_t segment, Cube<const float> terms,
           Matrix<float> peak, Matrix<float> weight, Matrix<float> q, Matrix<double> a, int threads) {
            const falcon::Hadamard hadamard = hadamard_of(h1, h2, scale, words, segment);
            require(a.shape(0) == 2 && a.shape(1) == hadamard.rows, "row sums must have the shape (2, rows)");
            falcon::hadamard_prior(*chosen, team_size(threads), hadamard, terms_of(terms, hadamard.rows),
                                   columns_of(peak, weight, q, 0, padded(hadamard.codes), false), a.data());
        },
        nb::arg("h1").noconvert(), nb::arg("h2").noconvert(), nb::arg("scale"), nb::arg("words").noconvert(), nb::arg("segment"), nb::arg("terms").noconvert(),
        nb::arg("peak").noconvert(), nb::arg("weight").noconvert(), nb::arg("q").noconvert(),
        nb::arg("a").noconvert(), nb::arg("threads"), Without_gil());
    module.def(
        "hadamard_gradient",
        [](Matrix<const float> h1, Matrix<const float> h2, float scale, Matrix<const std::int32_t> words, size_t segment, Cube<const float> terms,
           Matrix<float> peak, Matrix<float> weight, Matrix<float> q, float beta, float factor, bool forward, Matrix<float> dh1, Matrix<float> dh2,
           int threads) {
            const falcon::Hadamard hadamard = hadamard_of(h1, h2, scale, words, segment);
            for (const Matrix<float> &dh : {dh1, dh2})
                require(dh.shape(0) == hadamard.rows && dh.shape(1) == hadamard.f,
                        "the gradient must have the shape of the embeddings");
            float *const dh[2] = {dh1.data(), dh2.data()};
            falcon::hadamard_gradient(*chosen, team_size(threads), hadamard, terms_of(terms, hadamard.rows),
                                      columns_of(peak, weight, q, 0, padded(hadamard.codes), forward), beta, factor, dh);
        },
        nb::arg("h1").noconvert(), nb::arg("h2").noconvert(), nb::arg("scale"), nb::arg("words").noconvert(), nb::arg("segment"), nb::arg("terms").noconvert(),
        nb::arg("peak").noconvert(), nb::arg("weight").noconvert(), nb::arg("q").noconvert(), nb::arg("beta"),
        nb::arg("factor"), nb::arg("forward"), nb::arg("dh1").noconvert(), nb::arg("dh2").noconvert(), nb::arg("threads"), Without_gil());
}

} // namespace

NB_MODULE(_cpu, module) {
    module.def("scratch_kept", &falcon::scratch_kept, "Bytes of scratch that the calling thread keeps for its next call.");
    module.def(
        "team_members", [](int threads) { return falcon::team_members(team_size(threads)); }, nb::arg("threads"),
        "The kernel's numbers of torch's OpenMP threads, the calling thread's among them.");
    bind_signs(module);
    bind_levels(module);
    bind_dense(module);
    bind_strips(module);
    bind_hadamard(module);
    bind_augmentation(module);
    bind_crops(module);
}
