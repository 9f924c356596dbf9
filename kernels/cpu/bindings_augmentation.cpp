// The Python face of the photometric stage.

#include "bindings.hpp"

#include "augmentation.hpp"

namespace nb = nanobind;

namespace {

using std::size_t;

template <typename Out>
void augment_views(Array<const std::uint8_t, 4> images, Array<const float, 2> factors, Array<const float, 2> order,
                   Array<const std::uint8_t, 1> gray, Array<const float, 1> sigma, Array<const std::uint8_t, 1> solarize,
                   Array<const float, 1> mean, Array<const float, 1> std_, size_t window, float threshold,
                   Array<Out, 4> out, int threads) {
    const size_t count = images.shape(0), height = images.shape(1), width = images.shape(2);
    require(images.shape(3) == 3, "images must have the shape (views, height, width, 3)");
    for (int axis = 0; axis < 4; ++axis)
        require(out.shape(axis) == images.shape(axis), "the output must have the shape of the images");
    require(factors.shape(0) == count && factors.shape(1) == 4 && order.shape(0) == count && order.shape(1) == 4,
            "factors and order must have the shape (views, 4)");
    require(gray.shape(0) == count && sigma.shape(0) == count && solarize.shape(0) == count,
            "there must be one number a view");
    require(mean.shape(0) == 3 && std_.shape(0) == 3, "mean and std must have three numbers");
    require(window <= 1024, "the blur's window may reach 1024 pixels, no more");
    if (count * height * width == 0)
        return;
    falcon::augment_views(level_in_use(), team_size(threads),
                          {images.data(), out.data(), sizeof(Out) == 2, count, height, width, factors.data(),
                           order.data(), gray.data(), solarize.data(), sigma.data(), window, threshold, mean.data(),
                           std_.data()});
}

template <typename Out> void bind(nb::module_ &module) {
    module.def("augment_views", &augment_views<Out>, nb::arg("images").noconvert(), nb::arg("factors").noconvert(),
               nb::arg("order").noconvert(), nb::arg("gray").noconvert(), nb::arg("sigma").noconvert(),
               nb::arg("solarize").noconvert(), nb::arg("mean").noconvert(), nb::arg("std").noconvert(),
               nb::arg("window"), nb::arg("threshold"), nb::arg("out").noconvert(), nb::arg("threads"), Without_gil());
}

} // namespace

void bind_augmentation(nb::module_ &module) {
    bind<float>(module);
    bind<std::uint16_t>(module); // bfloat16
}
