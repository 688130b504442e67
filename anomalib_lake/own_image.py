# SPDX-License-Identifier: Apache-2.0

"""Distance of a patch to the rest of its own image: what is normal mostly recurs, a defect seldom does."""

from functools import lru_cache

import torch
from torch import nn

from .bank import QUANTILE, kept_patches

# Share of the image's height and width that a patch's surroundings reach in each direction. Inside them, patches of
# the same defect would explain each other.
SURROUNDINGS = 0.2
# Patches of an image compared at a time.
ROWS = 256


class OwnImage(nn.Module):
    """Distance of patches to the nearest one outside their surroundings in the same image.

    Needs no bank, so it helps most where few normal images leave much of what is normal unseen. Distances are divided
    by the 99 % quantile of those of the normal images, as the bank's are.

    Attributes:
        distance_scale (torch.Tensor): That quantile, a scalar.

    Example:
        >>> own = OwnImage()
        >>> normal = torch.tensor([[[0.0], [3.0], [1.0], [3.0]]])
        >>> own.fit(normal, grid=(1, 4))
        tensor([[1., 0., 1., 0.]])
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
    ) -> torch.Tensor:
        """Measure the normal images' own distances.

        Args:
            tokens (torch.Tensor): Projected patch tokens of normal images ``(I, N, K)``.
            grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.
            stride (int): Compare with the tokens of every ``stride``-th row and column.
            least (torch.Tensor | float): Smallest scale; where images repeat themselves exactly it would vanish.

        Returns:
            torch.Tensor: Deviation of each patch ``(I, N)``.
        """
        self.distance_scale = torch.ones_like(self.distance_scale)
        distances = self(tokens, grid, stride)
        self.distance_scale = distances.quantile(QUANTILE).clamp(min=least)
        return distances / self.distance_scale

    def forward(self, tokens: torch.Tensor, grid: tuple[int, int], stride: int = 1) -> torch.Tensor:
        """Compute how far patches are from the rest of their image.

        Args:
            tokens (torch.Tensor): Projected patch tokens ``(B, N, K)``.
            grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.
            stride (int): Compare with the tokens of every ``stride``-th row and column.

        Returns:
            torch.Tensor: Distance to the nearest patch outside the surroundings, over the scale ``(B, N)``.
        """
        if torch.compiler.is_compiling():
            distances = _distances(tokens, *_tables(grid, stride, tokens.device))
        else:
            tables = _tables_once(grid, stride, tokens.device)
            distances = torch.stack([_distances_in_parts(image, *tables) for image in tokens])
        return distances / self.distance_scale


def _tables(grid: tuple[int, int], stride: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the kept patches ``(M,)``, and minus infinity where one lies in a patch's surroundings ``(N, M)``."""
    forbidden = torch.where(outside(grid, stride, device), 0.0, float("-inf"))
    return kept_patches(grid, stride, device), forbidden


# Of the last few sizes of images: made anew for every image, they take as long as the distances.
_tables_once = lru_cache(maxsize=4)(torch.inference_mode(mode=False)(_tables))


def _distances(tokens: torch.Tensor, kept: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    """Distances ``(..., N)`` of tokens ``(..., N, K)`` to the nearest kept one that is not forbidden ``(N, M)``."""
    others = tokens[..., kept, :]
    squares = tokens.square().sum(dim=-1)
    brackets = tokens @ others.mT - squares[..., None, kept] / 2 + forbidden.to(tokens.dtype)
    return (squares - 2 * brackets.amax(dim=-1)).clamp(min=0).sqrt()


def _distances_in_parts(tokens: torch.Tensor, kept: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    """The same for one image ``(N, K)``, few rows at a time: tables that stay in the cache take a third of the time."""
    others, squares = tokens[kept].T, tokens.square().sum(dim=1)
    parts = zip(tokens.split(ROWS), forbidden.to(tokens.dtype).split(ROWS), strict=True)
    brackets = torch.cat([torch.addmm(hidden - squares[kept] / 2, part, others).amax(dim=1) for part, hidden in parts])
    return (squares - 2 * brackets).clamp(min=0).sqrt()


def outside(grid: tuple[int, int], stride: int = 1, device: torch.device | None = None) -> torch.Tensor:
    """Which of the kept patches lie outside each patch's surroundings; of a patch that has none there, all.

    Args:
        grid (tuple[int, int]): Rows and columns of patches.
        stride (int): Every ``stride``-th row and column is kept, as :func:`.bank.kept_patches` does.
        device (torch.device | None): Where the truth values are needed.

    Returns:
        torch.Tensor: Truth values ``(N, M)``.

    Example:
        >>> outside((1, 10), stride=2)[3].tolist()
        [True, False, False, True, True]
    """
    near = []  # rows, then columns: a table of all patches would take longer than their distances
    for count in grid:
        numbers = torch.arange(count, device=device)
        near.append((numbers[:, None] - numbers[::stride]).abs() <= SURROUNDINGS * count)
    far = ~(near[0][:, None, :, None] & near[1][None, :, None, :]).flatten(2).flatten(0, 1)
    has_none = near[0].all(dim=1)[:, None] & near[1].all(dim=1)
    return far | has_none.flatten()[:, None]
