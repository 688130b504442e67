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
    rows, columns = (
        upsampling(count, patch_size, size, like=patch_map)
        for count, size in zip(patch_map.shape[-2:], image_size, strict=True)
    )
    return rows @ (patch_map @ columns.T)


def upsampling(count: int, patch_size: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """Matrix that upsamples one axis of a map over patches linearly to pixels.

    Bilinear upsampling is linear and separable, so applying it to unit vectors gives one small matrix per axis. The
    products take as long as torch's own upsampling, and their gradient a twentieth of its gradient.

    Args:
        count (int): Patches along the axis.
        patch_size (int): Side of a patch in pixels.
        size (int): Pixels of the image along the axis; the rest of the last patch is padding, and is cropped.
        like (torch.Tensor): A tensor of the type and on the device wanted.

    Returns:
        torch.Tensor: Weights of the patches in each pixel ``(size, count)``.

    Example:
        >>> upsampling(2, patch_size=2, size=4, like=torch.zeros(1))
        tensor([[1.0000, 0.0000],
                [0.7500, 0.2500],
                [0.2500, 0.7500],
                [0.0000, 1.0000]])
    """
    units = torch.eye(count, dtype=like.dtype, device=like.device)[None]
    pixels = F.interpolate(units, size=count * patch_size, mode="linear", align_corners=False)
    return pixels[0, :, :size].T


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
        return (rows @ (patch_map @ columns.T))[:, None].clamp(0, 1)

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

        Two matrix products cost a hundredth of smoothing the pixels themselves.
        """
        matrices = []
        for count, size in zip(patch_map.shape[-2:], image_size, strict=True):
            pixels = upsampling(count, self.patch_size, size, like=patch_map)
            matrices.append(self.blur(pixels[None, None])[0, 0])
        return matrices
