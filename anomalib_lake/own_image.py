# SPDX-License-Identifier: Apache-2.0

"""Distance of a patch to the rest of its own image: what is normal mostly recurs, a defect seldom does."""

import torch
from torch import nn

from anomalib_spg.components.own_image import own_distances

from .bank import QUANTILE


class OwnImage(nn.Module):
    """Distance of patches to the nearest one outside their surroundings in the same image.

    Needs no bank, so it helps most where few normal images leave much of what is normal unseen. Distances are divided
    by the 99 % quantile of those of the normal images, as the bank's are, but by no less than the bank's.

    Attributes:
        distance_scale (torch.Tensor): What they are divided by, a scalar.

    Example:
        >>> own = OwnImage()
        >>> normal = torch.tensor([[[0.0], [3.0], [1.0], [3.0]]])
        >>> own.fit(normal, grid=(1, 4))
        >>> own(torch.tensor([[[0.0], [3.0], [9.0], [3.0]]]), grid=(1, 4)).round(decimals=2)
        tensor([[3., 0., 6., 0.]])
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("distance_scale", torch.ones(()))
        self.distance_scale: torch.Tensor

    def fit(
        self,
        tokens: torch.Tensor,
        grid: tuple[int, int],
        stride: int = 1,
        least: torch.Tensor | float = 1e-6,
    ) -> None:
        """Measure the normal images' own distances.

        Args:
            tokens (torch.Tensor): Projected patch tokens of normal images ``(I, N, K)``.
            grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.
            stride (int): Compare with the tokens of every ``stride``-th row and column.
            least (torch.Tensor | float): Smallest scale; where images repeat themselves exactly it would vanish.
        """
        self.distance_scale = own_distances(tokens, grid, stride).quantile(QUANTILE).clamp(min=least)

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int], stride: int = 1) -> torch.Tensor:
        """Compute how far patches are from the rest of their image.

        Args:
            tokens (torch.Tensor): Projected patch tokens ``(B, N, K)``.
            grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.
            stride (int): Compare with the tokens of every ``stride``-th row and column.

        Returns:
            torch.Tensor: Distance to the nearest patch outside the surroundings, over the scale ``(B, N)``.
        """
        return own_distances(tokens, grid, stride) / self.distance_scale
