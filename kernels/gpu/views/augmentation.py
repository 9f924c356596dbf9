"""The photometric stage: uint8 views in, jittered, grayed, blurred, solarised and normalised views out, in one to three launches.

    x = level / 255                              in each view's own order, and only what is not neutral:
    brightness, contrast, saturation             x <- clamp(f x + (1 - f) base),  base = 0 | mean of gray(x) | gray(x)
    hue                                          channel = v - c clamp(min(k, 4 - k), 0, 1),  k = (o + 6 h) mod 6,  o = 5, 3, 1
    grayscale; Gaussian blur, borders reflected; x >= threshold: 1 - x; (x - mean) / std

One program processes a view of up to WHOLE pixels, and computes the mean for contrast when its turn comes: one launch. A larger
view is cut into blocks of whole rows. Operations that need other blocks then end a launch: `contrast_sums_kernel` (everything
before contrast, summed per block), `colours_kernel` (everything up to the blur along the rows, which needs no other block) and
`blur_columns_kernel`. A view that is not blurred is finished by the second.

All pixels of a program undergo the same operations, so the program branches: an operation that is off costs nothing and changes
no bit. Divisions by 255 and by std are correctly rounded, so a level exactly on the threshold falls on the same side as in the
reference.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from falcon_fast.kernels.gpu.launch import ceil_div, launch

WHOLE = 4096  # pixels of a view that one program holds: 64 x 64
BLOCK = (
    2048  # pixels of a program of a larger view: 9 rows of 224. Rows wider than 1024 px may spill (1500 px: 8 bytes)
)
PIXELS_PER_THREAD = 8
CONTRAST, SATURATION, HUE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NARROWEST = tl.constexpr(0.05)  # sigma whose neighbouring tap is zero in float32

# Parameters are rows of tables for many batches: the alignment of their addresses varies and is not worth a second compilation.
UNALIGNED = ["p_factors", "p_order", "p_gray", "p_sigma", "p_solarize"]


class Recipe(NamedTuple):
    """The recipe from which the parameters were drawn; a stage that it never uses is not compiled in."""

    operations: tuple[bool, bool, bool, bool]  # whether there is brightness, contrast, saturation, hue
    gray: bool
    max_sigma: float  # 0: no blur
    solarize: bool
    threshold: float  # of solarisation, in [0, 1]


@triton.jit
def luma(b_red, b_green, b_blue):
    return 0.2989 * b_red + 0.587 * b_green + 0.114 * b_blue


@triton.jit
def unit_interval(b_x):
    return tl.minimum(tl.maximum(b_x, 0.0), 1.0)


@triton.jit
def load_pixels(p_image, stride_c, stride_h, stride_w, o, m, WIDTH: tl.constexpr):
    """Load the pixels `o` of a uint8 image as float32 in [0, 1]: red, green, blue."""
    p = p_image + (o // WIDTH) * stride_h + (o % WIDTH) * stride_w
    b_red = tl.load(p, mask=m, other=0).to(tl.float32)
    b_green = tl.load(p + stride_c, mask=m, other=0).to(tl.float32)
    b_blue = tl.load(p + 2 * stride_c, mask=m, other=0).to(tl.float32)
    b_full = tl.full(b_red.shape, 255.0, tl.float32)
    return tl.div_rn(b_red, b_full), tl.div_rn(b_green, b_full), tl.div_rn(b_blue, b_full)


@triton.jit
def hue_channel(b_value, b_chroma, b_sextant):
    b_k = b_sextant - 6.0 * tl.floor(b_sextant * (1.0 / 6.0))
    return b_value - unit_interval(tl.minimum(b_k, 4.0 - b_k)) * b_chroma


@triton.jit
def shift_hue(b_red, b_green, b_blue, turns):
    b_value = tl.maximum(tl.maximum(b_red, b_green), b_blue)
    b_chroma = b_value - tl.minimum(tl.minimum(b_red, b_green), b_blue)
    m_red, m_green = b_value == b_red, b_value == b_green
    b_difference = tl.where(m_red, b_green - b_blue, tl.where(m_green, b_blue - b_red, b_red - b_green))
    b_offset = tl.where(m_red, 0.0, tl.where(m_green, 2.0, 4.0))
    # A gray pixel has no hue: the value computed for it is multiplied by its chroma, 0.
    b_sextant = b_difference / tl.where(b_chroma == 0, 1.0, b_chroma) + b_offset + 6.0 * turns
    return (
        hue_channel(b_value, b_chroma, b_sextant + 5.0),
        hue_channel(b_value, b_chroma, b_sextant + 3.0),
        hue_channel(b_value, b_chroma, b_sextant + 1.0),
    )


@triton.jit
def jitter(
    b_red, b_green, b_blue, p_factors, p_order, places, mean, m, pixels, OPERATIONS: tl.constexpr, WHOLE: tl.constexpr
):
    """Apply the first `places` operations of a view's order. The mean gray for contrast is computed if WHOLE, else `mean`."""
    for i_place in range(places):
        operation = tl.load(p_order + i_place).to(tl.int32)
        factor = tl.load(p_factors + operation)
        if ((OPERATIONS >> operation) & 1) != 0:
            if operation == HUE:
                if OPERATIONS >= 8 and factor != 0.0:
                    b_red, b_green, b_blue = shift_hue(b_red, b_green, b_blue, factor)
            else:
                if factor != 1.0:
                    b_gray = luma(b_red, b_green, b_blue)
                    if WHOLE and operation == CONTRAST:
                        mean = tl.sum(tl.where(m, b_gray, 0.0)) / pixels
                    of_gray = tl.where(operation == SATURATION, 1.0 - factor, 0.0)
                    of_mean = tl.where(operation == CONTRAST, 1.0 - factor, 0.0)
                    b_base = of_gray * b_gray + of_mean * mean
                    b_red = unit_interval(factor * b_red + b_base)
                    b_green = unit_interval(factor * b_green + b_base)
                    b_blue = unit_interval(factor * b_blue + b_base)
    return b_red, b_green, b_blue


@triton.jit
def blurred(p_plane, o, o_along, step, side, radius, sigma, m):
    """Return pixels `o` of a float32 plane blurred along an axis of `side` pixels, `step` apart; `o_along`: places on it."""
    sharpness = -0.5 / (sigma * sigma)
    b_sum = tl.load(p_plane + o, mask=m, other=0.0)
    total = 1.0
    for k in range(1, radius + 1):
        weight = tl.exp(sharpness * (k * k))
        o_before = tl.abs(o_along - k)
        o_after = side - 1 - tl.abs(side - 1 - o_along - k)
        b_before = tl.load(p_plane + o + (o_before - o_along) * step, mask=m, other=0.0)
        b_after = tl.load(p_plane + o + (o_after - o_along) * step, mask=m, other=0.0)
        b_sum += weight * (b_before + b_after)
        total += 2.0 * weight
    return b_sum / total


@triton.jit
def finish_channel(b_x, invert, threshold, p_mean, p_std, p_out, o, m, CHANNEL: tl.constexpr, SOLARIZE: tl.constexpr):
    """Solarise, normalise and store one channel of the pixels `o` of a channels_last view."""
    if SOLARIZE:
        b_x = tl.where((b_x >= threshold) & (invert != 0), 1.0 - b_x, b_x)
    b_std = tl.full(b_x.shape, 1.0, tl.float32) * tl.load(p_std + CHANNEL)
    b_x = tl.div_rn(b_x - tl.load(p_mean + CHANNEL), b_std)
    tl.store(p_out + o * 3 + CHANNEL, b_x.to(p_out.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def contrast_sums_kernel(
    p_images,  # uint8 [N, 3, H, W], any strides
    p_factors,  # [N, 4]
    p_order,
    p_sums,  # of gray over a block [N, blocks]
    pixels,
    block_pixels,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    stride_factors,
    stride_order,
    OPERATIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_image = tl.cast(tl.program_id(0), tl.int64)
    i_block = tl.program_id(1)
    p_factors += i_image * stride_factors
    p_order += i_image * stride_order
    if tl.load(p_factors + CONTRAST) != 1.0:
        places = 0
        for i_place in tl.static_range(1, 4):
            places += tl.where(tl.load(p_order + i_place).to(tl.int32) == CONTRAST, i_place, 0)
        o_local = tl.arange(0, BLOCK)
        o = i_block * block_pixels + o_local
        m = (o_local < block_pixels) & (o < pixels)
        b_red, b_green, b_blue = load_pixels(p_images + i_image * stride_n, stride_c, stride_h, stride_w, o, m, WIDTH)
        b_red, b_green, b_blue = jitter(
            b_red, b_green, b_blue, p_factors, p_order, places, 0.0, m, pixels, OPERATIONS, False
        )
        b_gray = luma(b_red, b_green, b_blue)
        tl.store(p_sums + i_image * tl.num_programs(1) + i_block, tl.sum(tl.where(m, b_gray, 0.0)))


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def colours_kernel(
    p_images,  # uint8 [N, 3, H, W], any strides
    p_factors,  # [N, 4]
    p_order,
    p_gray,  # [N]
    p_sigma,
    p_solarize,
    p_mean,  # [3]
    p_std,
    p_sums,  # [N, blocks]
    p_planes,  # what is yet to be blurred [N, 3, H, W]
    p_out,  # [N, H, W, 3]
    pixels,
    block_pixels,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    stride_factors,
    stride_order,
    stride_sigma,
    radius_w,
    radius_h,
    threshold,
    OPERATIONS: tl.constexpr,  # bit 0 brightness, 1 contrast, 2 saturation, 3 hue
    GRAY: tl.constexpr,
    BLUR: tl.constexpr,
    SOLARIZE: tl.constexpr,
    WHOLE: tl.constexpr,  # the view is one block
    SUMS: tl.constexpr,  # power of two, at least as many as blocks
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_image = tl.cast(tl.program_id(0), tl.int64)
    i_block = tl.program_id(1)
    o_local = tl.arange(0, BLOCK)
    o = i_block * block_pixels + o_local
    m = (o_local < block_pixels) & (o < pixels)
    b_red, b_green, b_blue = load_pixels(p_images + i_image * stride_n, stride_c, stride_h, stride_w, o, m, WIDTH)
    if OPERATIONS != 0:
        p_factors += i_image * stride_factors
        mean = 0.0
        if not WHOLE and (OPERATIONS & 2) != 0:
            blocks = tl.num_programs(1)
            if tl.load(p_factors + CONTRAST) != 1.0:  # else nothing was summed
                o_sum = tl.arange(0, SUMS)
                b_sums = tl.load(p_sums + i_image * blocks + o_sum, mask=o_sum < blocks, other=0.0)
                mean = tl.sum(b_sums) / pixels
        b_red, b_green, b_blue = jitter(
            b_red, b_green, b_blue, p_factors, p_order + i_image * stride_order, 4, mean, m, pixels, OPERATIONS, WHOLE
        )
    if GRAY:
        m_gray = tl.load(p_gray + i_image) != 0
        b_gray = luma(b_red, b_green, b_blue)
        b_red, b_green = tl.where(m_gray, b_gray, b_red), tl.where(m_gray, b_gray, b_green)
        b_blue = tl.where(m_gray, b_gray, b_blue)
    p_view = p_out + i_image * 3 * pixels
    invert = 0
    if SOLARIZE:
        invert = tl.load(p_solarize + i_image).to(tl.int32)
    if BLUR:
        sigma = tl.load(p_sigma + i_image * stride_sigma)
        if sigma > 0.0:
            sigma = tl.maximum(sigma, NARROWEST)
            p_red = p_planes + i_image * 3 * pixels
            p_green, p_blue = p_red + pixels, p_red + 2 * pixels
            # Neighbours are exchanged through memory (in practice the cache), where each program has its own rows. The barriers
            # order the stores of a thread before the loads of the others, and those loads before the stores that overwrite.
            tl.store(p_red + o, b_red, mask=m)
            tl.store(p_green + o, b_green, mask=m)
            tl.store(p_blue + o, b_blue, mask=m)
            tl.debug_barrier()
            o_column = o % WIDTH
            b_red = blurred(p_red, o, o_column, 1, WIDTH, radius_w, sigma, m)
            b_green = blurred(p_green, o, o_column, 1, WIDTH, radius_w, sigma, m)
            b_blue = blurred(p_blue, o, o_column, 1, WIDTH, radius_w, sigma, m)
            tl.debug_barrier()
            tl.store(p_red + o, b_red, mask=m)
            tl.store(p_green + o, b_green, mask=m)
            tl.store(p_blue + o, b_blue, mask=m)
            if WHOLE:
                tl.debug_barrier()
                o_row, rows = o // WIDTH, pixels // WIDTH
                b_red = blurred(p_red, o, o_row, WIDTH, rows, radius_h, sigma, m)
                b_green = blurred(p_green, o, o_row, WIDTH, rows, radius_h, sigma, m)
                b_blue = blurred(p_blue, o, o_row, WIDTH, rows, radius_h, sigma, m)
        if not WHOLE:
            m = m & (o < tl.where(sigma > 0.0, 0, pixels))  # `blur_columns_kernel` finishes these
    finish_channel(b_red, invert, threshold, p_mean, p_std, p_view, o, m, 0, SOLARIZE)
    finish_channel(b_green, invert, threshold, p_mean, p_std, p_view, o, m, 1, SOLARIZE)
    finish_channel(b_blue, invert, threshold, p_mean, p_std, p_view, o, m, 2, SOLARIZE)


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def blur_columns_kernel(
    p_planes,  # blurred along the rows [N, 3, H, W]
    p_sigma,  # [N]
    p_solarize,
    p_mean,  # [3]
    p_std,
    p_out,  # [N, H, W, 3]
    pixels,
    block_pixels,
    stride_sigma,
    radius_h,
    threshold,
    SOLARIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_image = tl.cast(tl.program_id(0), tl.int64)
    sigma = tl.load(p_sigma + i_image * stride_sigma)
    if sigma > 0.0:
        sigma = tl.maximum(sigma, NARROWEST)
        o_local = tl.arange(0, BLOCK)
        o = tl.program_id(1) * block_pixels + o_local
        m = (o_local < block_pixels) & (o < pixels)
        o_row, rows = o // WIDTH, pixels // WIDTH
        invert = 0
        if SOLARIZE:
            invert = tl.load(p_solarize + i_image).to(tl.int32)
        p_plane = p_planes + i_image * 3 * pixels
        p_view = p_out + i_image * 3 * pixels
        for CHANNEL in tl.static_range(3):
            b_x = blurred(p_plane + CHANNEL * pixels, o, o_row, WIDTH, rows, radius_h, sigma, m)
            finish_channel(b_x, invert, threshold, p_mean, p_std, p_view, o, m, CHANNEL, SOLARIZE)


def augment_views_triton(
    images: torch.Tensor,
    factors: torch.Tensor,
    order: torch.Tensor,
    gray: torch.Tensor,
    sigma: torch.Tensor,
    solarize: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return views after colour changes and normalisation: (N, 3, H, W) in `dtype` (float32, float16, bfloat16), channels_last.

    images: uint8 (N, 3, H, W), any strides.  factors, order: float32 (N, 4), rows contiguous: brightness, contrast, saturation
    (1 = off), hue (turns, 0 = off), and the numbers 0 to 3 of these operations in the order in which they apply.  gray,
    solarize: bool (N,), contiguous.
    sigma: float32 (N,), pixels, 0 = no blur.  mean, std: float32 (3,).  All on one device. There is no gradient.
    """
    n, _, height, width = images.shape
    out = torch.empty((n, 3, height, width), dtype=dtype, device=images.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    pixels = height * width
    whole = pixels <= WHOLE
    block = triton.next_power_of_2(pixels if whole else max(BLOCK, width))
    block_pixels = pixels if whole else block // width * width
    blocks = ceil_div(pixels, block_pixels)
    grid = (n, blocks)
    warps = min(16, max(1, block // (32 * PIXELS_PER_THREAD)))
    operations = sum(1 << number for number, there in enumerate(recipe.operations) if there)
    blur = recipe.max_sigma > 0
    reach = math.ceil(3 * recipe.max_sigma)
    radius_w, radius_h = min(reach, width - 1), min(reach, height - 1)
    # Empty if they are not used: the kernels take the pointers anyway.
    sums = torch.empty(
        n if recipe.operations[1] and not whole else 0, blocks, dtype=torch.float32, device=images.device
    )
    planes = torch.empty(n if blur else 0, 3, pixels, dtype=torch.float32, device=images.device)
    gray, solarize = gray.view(torch.uint8), solarize.view(torch.uint8)
    if len(sums):
        launch(
            contrast_sums_kernel,
            grid,
            images,
            factors,
            order,
            sums,
            pixels,
            block_pixels,
            *images.stride(),
            factors.stride(0),
            order.stride(0),
            OPERATIONS=operations,
            WIDTH=width,
            BLOCK=block,
            num_warps=warps,
        )
    launch(
        colours_kernel,
        grid,
        images,
        factors,
        order,
        gray,
        sigma,
        solarize,
        mean,
        std,
        sums,
        planes,
        out,
        pixels,
        block_pixels,
        *images.stride(),
        factors.stride(0),
        order.stride(0),
        sigma.stride(0),
        radius_w,
        radius_h,
        recipe.threshold,
        OPERATIONS=operations,
        GRAY=recipe.gray,
        BLUR=blur,
        SOLARIZE=recipe.solarize,
        WHOLE=whole,
        SUMS=triton.next_power_of_2(blocks),
        WIDTH=width,
        BLOCK=block,
        num_warps=warps,
        num_stages=1,
    )
    if blur and not whole:
        launch(
            blur_columns_kernel,
            grid,
            planes,
            sigma,
            solarize,
            mean,
            std,
            out,
            pixels,
            block_pixels,
            sigma.stride(0),
            radius_h,
            recipe.threshold,
            SOLARIZE=recipe.solarize,
            WIDTH=width,
            BLOCK=block,
            num_warps=warps,
            num_stages=1,
        )
    return out
