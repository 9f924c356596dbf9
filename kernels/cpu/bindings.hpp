// Declarations shared by the parts of the Python module.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>

#include "level.hpp"

template <typename Scalar, int dimensions>
using Array = nanobind::ndarray<Scalar, nanobind::ndim<dimensions>, nanobind::c_contig, nanobind::device::cpu>;
using Without_gil = nanobind::call_guard<nanobind::gil_scoped_release>;

void require(bool holds, const char *rule);  // std::invalid_argument with the rule if it does not hold
std::size_t team_size(int threads);          // of at least 1
const falcon::Level &level_in_use();

void bind_augmentation(nanobind::module_ &);
void bind_crops(nanobind::module_ &);
