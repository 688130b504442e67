# SPDX-License-Identifier: Apache-2.0

"""Rarity of patches in their own image: evidence of a defect that needs neither labels nor good images."""

import torch

from .components.own_image import own_distances

# The patches of an image that count as rare, at least: defects seldom cover more.
RARE = 0.05
# Smallest distance that rarity is measured by, of unit tokens: in a drawn pattern, which repeats itself exactly, the
# usual distance vanishes.
LEAST = 0.05


def rarity(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    r"""Compute how much farther patches are from the rest of their image than is usual there.

    With :math:`d` a unit token's distance to the nearest one that is more than a fifth of the image away, and
    :math:`d_{95}` what 95 % of the patches stay below, it is :math:`d / d_{95} - 1`: 0 for the rarest patches of an
    image in which nothing stands out, 1 for one that is twice as far from the others (ours).

    Args:
        patches (torch.Tensor): Patch tokens ``(B, N, D)``.
        grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.

    Returns:
        torch.Tensor: Rarity, at least -1, ``(B, N)``.

    Example:
        >>> patches = torch.tensor([[1.0, 0.0]] * 30 + [[3.0, 4.0], [0.0, 1.0]] + [[1.0, 0.0]] * 8)[None]
        >>> rarity(patches, (1, 40))[0, [0, 30, 31]].round(decimals=2)
        tensor([-1.0000,  0.0000,  0.5800])
    """
    # As a product: OpenVINO would round the lengths to half precision where it spreads them over the channels.
    unit = patches * patches.norm(dim=-1, keepdim=True).clamp(min=1e-8).reciprocal()
    distances = own_distances(unit, grid)
    usual = distances.topk(max(1, round(RARE * distances.shape[1])), dim=1).values[:, -1:]
    return distances * usual.clamp(min=LEAST).reciprocal() - 1
