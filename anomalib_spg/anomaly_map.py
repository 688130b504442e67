# SPDX-License-Identifier: Apache-2.0

"""From a map over patches to a smooth map over pixels."""

import torch
from anomalib.models.components import GaussianBlur2d
from anomalib.models.components.filters.blur import compute_kernel_size
from torch import nn
from torch.nn import functional as F  # noqa: N812


class AnomalyMapGenerator(nn.Module):
    """Bilinear upsampling followed by Gaussian smoothing.

    Args:
        patch_size (int): Side of a patch in pixels.
        sigma (float): Standard deviation of the smoothing in pixels; 0 for none.

    Example:
        >>> generator = AnomalyMapGenerator(patch_size=14, sigma=4)
        >>> generator(torch.rand(2, 3, 5), (42, 65)).shape
        torch.Size([2, 1, 42, 65])
    """

    def __init__(self, patch_size: int, sigma: float) -> None:
        super().__init__()
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
        # Both steps are linear and act on rows and columns apart. What they do to one row, found on unit vectors, is
        # a small matrix; two products with it cost a hundredth of smoothing the pixels themselves.
        rows, columns = (
            self._pixels_of_patches(count, size, patch_map)
            for count, size in zip(patch_map.shape[-2:], image_size, strict=True)
        )
        # The clamp is for rounding only: a pixel of 1 + 1e-7 would make torchmetrics take the map for logits.
        return (rows @ patch_map @ columns.T)[:, None].clamp(0, 1)

    def _pixels_of_patches(self, count: int, size: int, like: torch.Tensor) -> torch.Tensor:
        """Upsample and smooth unit vectors over ``count`` patches: a matrix ``(size, count)``."""
        units = torch.eye(count, dtype=like.dtype, device=like.device)[None]
        pixels = F.interpolate(units, size=count * self.patch_size, mode="linear", align_corners=False)
        return self.blur(pixels[:, None, :, :size].transpose(2, 3))[0, 0]
