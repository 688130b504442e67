# SPDX-License-Identifier: Apache-2.0

"""Rotated copies of normal images, for parts that may lie in any direction."""

import math

import torch
from torch.nn import functional as F  # noqa: N812


def rotate(image: torch.Tensor, angle: float, pixel_aspect: float = 1.0) -> torch.Tensor:
    """Rotate an image about its middle; what comes from outside is its mirror image.

    Args:
        image (torch.Tensor): Image ``(C, H, W)``.
        angle (float): Degrees, counter-clockwise.
        pixel_aspect (float): Width over height of what a pixel shows; other than 1 where the image was squeezed.

    Returns:
        torch.Tensor: Image of the same size.

    Example:
        >>> rotate(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), 90).round(decimals=4)
        tensor([[[2., 4.],
                 [1., 3.]]])
    """
    theta = _theta(angle, image.shape[-1] * pixel_aspect / image.shape[-2]).to(image)
    grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]


def shown_patches(
    grid: tuple[int, int],
    angle: float,
    scale: int = 1,
    pixel_aspect: float = 1.0,
    extent: tuple[float, float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which patches of an image the windows of its rotated copy show.

    Args:
        grid (tuple[int, int]): Rows and columns of patches.
        angle (float): Degrees, counter-clockwise.
        scale (int): Side of the windows in patches, odd; cut at the copy's edge.
        pixel_aspect (float): As of :func:`rotate`.
        extent (tuple[float, float] | None): Rows and columns of patches that the image takes, where padding at its
            bottom and right fills up the last ones. ``None`` is all of them.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: By window of the copy, the number of the patch at its middle ``(N,)``, and
        whether all of it comes from the image ``(N,)``.

    Example:
        >>> shown, inside = shown_patches((2, 2), 90)
        >>> shown.tolist(), inside.tolist()
        ([1, 3, 0, 2], [True, True, True, True])
        >>> shown_patches((3, 3), 45)[1].tolist()
        [False, True, False, True, True, True, False, True, False]
    """
    rows, columns = grid
    height, width = extent or grid
    theta = _theta(angle, width * pixel_aspect / height)
    middles = F.affine_grid(torch.eye(2, 3)[None], [1, 1, rows, columns], align_corners=False)[0].flatten(0, 1)
    middles = (middles + 1) * torch.tensor([columns / width, rows / height]) - 1
    half = scale / torch.tensor([width, height])
    corners = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]]) * half + middles[:, None]
    inside = ((corners.clamp(-1, 1) @ theta[:, :2].T).abs() <= 1 + 1e-4).flatten(1).all(dim=1)
    places = ((middles @ theta[:, :2].T + 1) / 2 * torch.tensor([width, height])).floor().long()
    x, y = (places[:, axis].clamp(0, count - 1) for axis, count in enumerate((columns, rows)))
    return y * columns + x, inside


def _theta(angle: float, aspect: float) -> torch.Tensor:
    """Where a point of the copy comes from ``(2, 3)``; height and width are both 2, ``aspect`` is width over height."""
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return torch.tensor([[cosine, -sine / aspect, 0], [sine * aspect, cosine, 0]])
