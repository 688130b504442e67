# SPDX-License-Identifier: Apache-2.0

"""Copies of normal images that go into the bank beside them: how many, how each is made, and what it shows."""

from collections.abc import Callable
from functools import partial

import torch

from .rotations import rotate, shown_patches
from .shifts import shift, shifted_patches, shifts

# How a copy is made of an image; which patches of the image the windows of a grid and scale show, and which are whole.
View = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[..., tuple[torch.Tensor, torch.Tensor]]]
# Most normal images of which shifted copies go into the bank (ours): more of them fill it, and copies make it coarser.
FEW = 16


def num_copies(images: int, num_rotations: int, num_shifts: int) -> int:
    """Copies of each normal image that go into the bank beside it.

    Args:
        images (int): Normal images.
        num_rotations (int): Directions in which each goes into the bank.
        num_shifts (int): Places on the grid of patches, along height and along width, where there are no rotations.

    Returns:
        int: Their number for each.

    Example:
        >>> [num_copies(images, num_rotations=1, num_shifts=2) for images in (1, 2, 16, 17)]
        [0, 3, 3, 0]
        >>> num_copies(17, num_rotations=8, num_shifts=2)
        7
    """
    if num_rotations > 1:
        return num_rotations - 1
    return num_shifts**2 - 1 if 1 < images <= FEW else 0


def views(
    size: tuple[int, int], patch_size: int, num_rotations: int, num_shifts: int, pixel_aspect: float = 1.0
) -> list[View]:
    """How the copies of an image are made, and which of its patches they show.

    Args:
        size (tuple[int, int]): Height and width of the image in pixels.
        patch_size (int): Side of a patch in pixels.
        num_rotations (int): As of :func:`num_copies`.
        num_shifts (int): As of :func:`num_copies`.
        pixel_aspect (float): Width over height of what a pixel shows; other than 1 where the image was squeezed.

    Returns:
        list[View]: For each copy a function that makes it of the image, and one that gives the patches, see
        :func:`~anomalib_lake.rotations.shown_patches` and :func:`~anomalib_lake.shifts.shifted_patches`.

    Example:
        >>> (show, patches), *others = views((28, 28), 14, num_rotations=4, num_shifts=1)
        >>> show(torch.zeros(3, 28, 28)).shape, len(others)
        (torch.Size([3, 28, 28]), 2)
        >>> patches((2, 2), scale=1)[0].tolist()
        [1, 3, 0, 2]
    """
    if num_rotations > 1:
        extent = (size[0] / patch_size, size[1] / patch_size)
        return [
            (
                partial(rotate, angle=angle, pixel_aspect=pixel_aspect),
                partial(shown_patches, angle=angle, pixel_aspect=pixel_aspect, extent=extent),
            )
            for angle in (360 * number / num_rotations for number in range(1, num_rotations))
        ]
    return [
        (
            partial(shift, down=down, right=right),
            partial(shifted_patches, down=down, right=right, patch_size=patch_size, size=size),
        )
        for down, right in shifts(num_shifts, patch_size)
    ]
