"""Affine views: rotated, shifted, scaled and sheared images; for the digits."""

from __future__ import annotations

import torch


def warp(images: torch.Tensor, theta: torch.Tensor, flips: torch.Tensor) -> torch.Tensor:
    """Apply affine maps to images, bilinearly, black outside the image. Returns uint8 (2 B, S, S, 3).

    images: uint8 (B, S, S, 3).  theta: float32 (2 B, 2, 3), from `affine_matrices`.  flips: bool (2 B,), mirror after the map.
    """
    source = images.permute(0, 3, 1, 2).float().repeat(2, 1, 1, 1)
    grid = torch.nn.functional.affine_grid(theta, list(source.shape), align_corners=False)
    grid = torch.where(flips[:, None, None, None], grid.flip(2), grid)
    warped = torch.nn.functional.grid_sample(source, grid, align_corners=False)
    return warped.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
