# SPDX-License-Identifier: Apache-2.0

"""Distances of patches to the rest of their own image: what is normal mostly recurs, a defect seldom does."""

from functools import lru_cache

import torch

# Share of the image's height and width that a patch's surroundings reach in each direction. Inside them, patches of
# the same defect would explain each other.
SURROUNDINGS = 0.2
# Patches of an image compared at a time.
ROWS = 256
# Most distances that an accelerator, whose cost is to start operations, computes at a time: 256 MiB.
TABLE = 2**26


def own_distances(tokens: torch.Tensor, grid: tuple[int, int], stride: int = 1) -> torch.Tensor:
    """Euclidean distance of each patch to the nearest one outside its surroundings in the same image.

    Args:
        tokens (torch.Tensor): Patch tokens ``(B, N, K)``.
        grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.
        stride (int): Compare with the tokens of every ``stride``-th row and column.

    Returns:
        torch.Tensor: Distances ``(B, N)``.

    Example:
        >>> own_distances(torch.tensor([[[0.0], [3.0], [9.0], [3.0]]]), grid=(1, 4))
        tensor([[3., 0., 6., 0.]])
    """
    if torch.compiler.is_compiling():
        return _distances(tokens, *_tables(grid, stride, tokens.device))
    tables = _tables_once(grid, stride, tokens.device)
    if tokens.device.type == "cpu":
        return torch.stack([_distances_in_parts(image, *tables) for image in tokens])
    images = max(1, TABLE // tables[1].numel())
    return torch.cat([_distances(part, *tables) for part in tokens.split(images)])


def kept_patches(grid: tuple[int, int], stride: int, device: torch.device | None = None) -> torch.Tensor:
    """Numbers of the patches in every ``stride``-th row and column.

    Args:
        grid (tuple[int, int]): Rows and columns of patches.
        stride (int): 1 keeps all.
        device (torch.device | None): Where the numbers are needed.

    Returns:
        torch.Tensor: Numbers, row by row.

    Example:
        >>> kept_patches((3, 4), stride=2).tolist()
        [0, 2, 8, 10]
    """
    rows, columns = (torch.arange(0, count, stride, device=device) for count in grid)
    return (rows[:, None] * grid[1] + columns).flatten()


def _tables(grid: tuple[int, int], stride: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the kept patches ``(M,)``, and minus infinity where one lies in a patch's surroundings ``(N, M)``."""
    forbidden = torch.where(outside(grid, stride, device), 0.0, float("-inf"))
    return kept_patches(grid, stride, device), forbidden


# Of the last few sizes of images: made anew for every image, they take as long as the distances.
_tables_once = lru_cache(maxsize=4)(torch.inference_mode(mode=False)(_tables))


def _distances(tokens: torch.Tensor, kept: torch.Tensor, forbidden: torch.Tensor) -> torch.Tensor:
    """Distances ``(..., N)`` of tokens ``(..., N, K)`` to the nearest kept one that is not forbidden ``(N, M)``."""
    # One product of (t, 1) and (b, -|b|^2 / 2), as in the bank: OpenVINO would compute a bias in half precision.
    others = tokens.index_select(-2, kept)
    squares = tokens.square().sum(dim=-1)
    with_one = torch.cat([tokens, torch.ones_like(tokens[..., :1])], dim=-1)
    with_length = torch.cat([others, others.square().sum(dim=-1, keepdim=True) / -2], dim=-1)
    brackets = with_one @ with_length.mT + forbidden.to(tokens.dtype)
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
        stride (int): Every ``stride``-th row and column is kept, as :func:`kept_patches` says.
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
