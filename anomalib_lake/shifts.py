# SPDX-License-Identifier: Apache-2.0

"""Shifted copies of normal images, by parts of a patch: what a part shows meets the grid of patches anywhere."""

import itertools

import torch
from torch.nn import functional as F  # noqa: N812


def shifts(count: int, patch_size: int) -> list[tuple[int, int]]:
    """List by how many pixels copies are shifted.

    Args:
        count (int): Places on the grid of patches along height and along width.
        patch_size (int): Side of a patch in pixels.

    Returns:
        list[tuple[int, int]]: Down and right, of ``count**2 - 1`` copies.

    Example:
        >>> shifts(2, 14)
        [(0, 7), (7, 0), (7, 7)]
    """
    steps = [round(step * patch_size / count) for step in range(count)]
    return [shift for shift in itertools.product(steps, steps) if any(shift)]


def shift(image: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """Show what lies further down and right; what comes from outside is the image's mirror image.

    Args:
        image (torch.Tensor): Image ``(C, H, W)``.
        down (int): Pixels, less than the height.
        right (int): Pixels, less than the width.

    Returns:
        torch.Tensor: Image of the same size.

    Example:
        >>> shift(torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]), 1, 1)
        tensor([[[5., 6., 5.],
                 [2., 3., 2.]]])
    """
    return F.pad(image, (0, right, 0, down), mode="reflect")[:, down:, right:]


def shifted_patches(
    grid: tuple[int, int], down: int, right: int, scale: int, patch_size: int, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which patches of an image the windows of its shifted copy show.

    Args:
        grid (tuple[int, int]): Rows and columns of patches.
        down (int): Pixels by which the copy is shifted, less than a patch.
        right (int): Pixels by which the copy is shifted, less than a patch.
        scale (int): Side of the windows in patches, odd; cut at the copy's edge.
        patch_size (int): Side of a patch in pixels.
        size (tuple[int, int]): Height and width of the image in pixels; padding may fill up the last patches.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: By window of the copy, the number of the patch at its middle, or of the one
        above or left where it lies between ``(N,)``, and whether all of it comes from the image ``(N,)``.

    Example:
        >>> shown, inside = shifted_patches((2, 3), 7, 0, 1, 14, (28, 42))
        >>> shown.tolist(), inside.tolist()
        ([0, 1, 2, 3, 4, 5], [True, True, True, False, False, False])
    """
    rows, columns = (
        (torch.arange(count) + scale // 2 + 1).clamp(max=count) * patch_size + moved <= length
        for count, moved, length in zip(grid, (down, right), size, strict=True)
    )
    return torch.arange(grid[0] * grid[1]), (rows[:, None] & columns).flatten()
