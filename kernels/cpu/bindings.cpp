// The Python face of the C++ kernels. Arrays come in through the buffer protocol or DLPack, so one build serves every
// version of torch; shapes are checked here, once, so that the kernels cannot write out of bounds, and nothing is
// converted: an output that was converted would be a copy.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>

#include "signs.hpp"

namespace nb = nanobind;

namespace {

template <typename Scalar> using Matrix = nb::ndarray<Scalar, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void check_words(std::size_t signs_rows, std::size_t f, std::size_t words_rows, std::size_t words_columns) {
    if (signs_rows != words_rows || words_columns != (f + 31) / 32)
        throw std::invalid_argument("packed words must have the shape (rows, ceil(f / 32)) of the signs (rows, f)");
}

} // namespace

NB_MODULE(_cpu, module) {
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
