// The Python interface of the functions that make views: crops, and the photometric stage.

#include "bindings.hpp"

#include <nanobind/stl/vector.h>

#include <vector>

#include "augmentation.hpp"
#include "crops.hpp"

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

using Image = Array<const std::uint8_t, 3>;

void resize_crops(const std::vector<Image> &images, Array<const std::int64_t, 3> boxes,
                  Array<const std::uint8_t, 2> flips, Array<std::uint8_t, 4> out, int threads) {
    const size_t count = images.size(), size = out.shape(1);
    require(boxes.shape(0) == 2 && boxes.shape(1) == count && boxes.shape(2) == 4,
            "boxes must have the shape (2, images, 4)");
    require(flips.shape(0) == 2 && flips.shape(1) == count, "flips must have the shape (2, images)");
    require(out.shape(0) == 2 * count && out.shape(2) == size && out.shape(3) == 3 && size >= 1,
            "the output must have the shape (2 images, size, size, 3)");
    const size_t team = team_size(threads);
    std::vector<falcon::Crop> crops;
    for (size_t view = 0; view < 2; ++view)
        for (size_t i = 0; i < count; ++i) {
            const std::int64_t *box = boxes.data() + 4 * (view * count + i);
            const auto height = static_cast<std::int64_t>(images[i].shape(0));
            const auto width = static_cast<std::int64_t>(images[i].shape(1));
            require(images[i].shape(2) == 3, "images must have the shape (height, width, 3)");
            require(box[0] >= 0 && box[1] >= 0 && box[2] >= 1 && box[3] >= 1 && box[2] <= height && box[3] <= width &&
                        box[0] <= height - box[2] && box[1] <= width - box[3],
                    "a box (top, left, height, width) must lie within its image, with at least one pixel");
            crops.push_back({images[i].data(), 3 * images[i].shape(1), size_t(box[0]), size_t(box[1]), size_t(box[2]),
                             size_t(box[3]), flips.data()[view * count + i] != 0,
                             out.data() + (view * count + i) * size * size * 3});
        }
    const nb::gil_scoped_release without_gil;
    falcon::resize_crops(level_in_use(), team, crops.data(), crops.size(), size);
}

} // namespace

void bind_crops(nb::module_ &module) {
    module.def("resize_crops", &resize_crops, nb::arg("images").noconvert(), nb::arg("boxes").noconvert(),
               nb::arg("flips").noconvert(), nb::arg("out").noconvert(), nb::arg("threads"));
}

void bind_augmentation(nb::module_ &module) {
    bind<float>(module);
    bind<std::uint16_t>(module); // bfloat16
}
