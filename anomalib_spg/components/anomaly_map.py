# SPDX-License-Identifier: Apache-2.0

"""From a map over patches to a smooth map over pixels."""

import math

import torch
from anomalib.models.components import GaussianBlur2d
from anomalib.models.components.filters.blur import compute_kernel_size
from torch import nn
from torch.nn import functional as F  # noqa: N812


def to_pixels(patch_map: torch.Tensor, patch_size: int, image_size: tuple[int, int]) -> torch.Tensor:
    """Upsample a map over patches bilinearly to pixels, and crop the padding.

    Args:
        patch_map (torch.Tensor): Map ``(B, h, w)``.
        patch_size (int): Side of a patch in pixels.
        image_size (tuple[int, int]): Height and width of the image.

    Returns:
        torch.Tensor: Map ``(B, H, W)``.
    """
    height, width = patch_map.shape[-2] * patch_size, patch_map.shape[-1] * patch_size
    pixels = F.interpolate(patch_map[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
    return pixels[:, : image_size[0], : image_size[1]]


class AnomalyMapGenerator(nn.Module):
    """Bilinear upsampling followed by Gaussian smoothing.

    Args:
        patch_size (int): Side of a patch in pixels.
        sigma (float): Standard deviation of the smoothing in pixels; 0 for none.
        image_size (tuple[int, int] | None): Height and width that the smoothing must fit into, where they are known.

    Raises:
        ValueError: If ``sigma`` is negative, no number, or too large for the images.

    Example:
        >>> generator = AnomalyMapGenerator(patch_size=14, sigma=4)
        >>> generator(torch.rand(2, 3, 5), (42, 65)).shape
        torch.Size([2, 1, 42, 65])
    """

    def __init__(self, patch_size: int, sigma: float, image_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        # The kernel reaches 4 sigma beyond the edge, where the image is reflected: once, hence not beyond its far side.
        highest = math.inf if image_size is None else (min(image_size) - 0.5) / 4
        if not 0 <= sigma < highest or math.isinf(sigma):
            msg = f"sigma={sigma} must lie in [0, {highest:g}) pixels for images of {image_size} pixels; 0 for none."
            raise ValueError(msg)
        self.patch_size = patch_size
        kernel_size = (compute_kernel_size(sigma), 1)
        self.blur = GaussianBlur2d(sigma=sigma, kernel_size=kernel_size) if sigma > 0 else nn.Identity()

    def forward(self, patch_map: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Upsample and smooth.

        Args:
            patch_map (torch.Tensor): Values in [0, 1] per patch ``(B, h, w)``.
            image_size (tuple[int, int]): Height and width of the image, at most those of the patches.

        Returns:
            torch.Tensor: Anomaly map in [0, 1], ``(B, 1, H, W)``.
        """
        rows, columns = self._pixels_of_patches(patch_map, image_size)
        # The clamp is for rounding only: a pixel of 1 + 1e-7 would make torchmetrics take the map for logits.
        return (rows @ patch_map @ columns.T)[:, None].clamp(0, 1)

    def patch_weights(self, pixel_weights: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Turn weights of the map's pixels into weights of the patches that give exactly the same weighted sum.

        Args:
            pixel_weights (torch.Tensor): Weights of the pixels ``(B, H, W)``.
            grid (tuple[int, int]): Rows and columns of patches.

        Returns:
            torch.Tensor: Weights of the patches ``(B, h, w)``.

        Example:
            >>> generator = AnomalyMapGenerator(patch_size=2, sigma=1)
            >>> patches, pixels = torch.rand(1, 3, 5), torch.rand(1, 6, 10)
            >>> by_pixels = (generator(patches, (6, 10))[0, 0] * pixels[0]).sum()
            >>> torch.allclose((generator.patch_weights(pixels, (3, 5)) * patches).sum(), by_pixels)
            True
        """
        size = (pixel_weights.shape[-2], pixel_weights.shape[-1])
        rows, columns = self._pixels_of_patches(pixel_weights.new_empty(grid), size)
        return rows.T @ pixel_weights @ columns

    def _pixels_of_patches(self, patch_map: torch.Tensor, image_size: tuple[int, int]) -> list[torch.Tensor]:
        """Matrices that upsample and smooth the rows ``(H, h)`` and the columns ``(W, w)``.

        Both steps are linear and separable, so applying them to unit vectors gives one small matrix per axis. Two
        matrix products cost a hundredth of smoothing the pixels themselves.
        """
        matrices = []
        for count, size in zip(patch_map.shape[-2:], image_size, strict=True):
            units = torch.eye(count, dtype=patch_map.dtype, device=patch_map.device)[None]
            pixels = F.interpolate(units, size=count * self.patch_size, mode="linear", align_corners=False)
            matrices.append(self.blur(pixels[:, None, :, :size].transpose(2, 3))[0, 0])
        return matrices
