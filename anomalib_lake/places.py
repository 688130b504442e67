# SPDX-License-Identifier: Apache-2.0

"""Places of patches: two coordinates beside the neurons, for parts that always lie in place."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import nn
from tqdm import tqdm

from anomalib_spg.components.own_image import kept_patches

from .bank import QUANTILE

# Squared distance of two places, as far apart as the image's longer side, over the squared length of a token (ours).
WEIGHT = 10.0
# Parts lie in place if this share of the patches of good images (ours)
SHARE = 0.9
# have their nearest patch in another one no farther away than a tenth of the image's longer side,
NEAR = 0.1
# and if places lengthen their distances by no more than this factor.
LONGER = 1.15
# Of every so many rows and columns of patches one is looked at to find that out.
STRIDE = 2


class Places(DynamicBufferMixin, nn.Module):
    """Puts the place of a patch beside its token, so that it is compared with what is normal about there.

    The squared distance of two tokens grows by the weighted squared distance of their places. A piece that is missing
    or swapped, which looks like something normal elsewhere, then deviates. It is for parts that always lie alike; of
    others, places would forbid comparisons that are right. The good images tell: where parts lie in place, the nearest
    patch of another image lies at about the same place anyway, and places hardly lengthen the distances.

    Args:
        weight (float | None): Squared distance of places as far apart as the image's longer side, over the squared
            length of a token. 0 leaves places out. ``None`` is 10 where the good images lie in place, else 0 (ours).
        num_rotations (int): Directions in which parts may lie; with more than one, places are left out.

    Attributes:
        scales (torch.Tensor): By layer, what the image's longer side counts as beside tokens ``(L,)``; empty where
            places are left out.

    Raises:
        ValueError: If the weight is out of range, or given beside several directions.

    Example:
        >>> places = Places(weight=4.0)
        >>> tokens = torch.tensor([[[0.0], [1.0], [0.0], [1.0]], [[0.0], [1.0], [0.0], [1.0]]])
        >>> places.fit([tokens], grid=(1, 4), references=[0, 1])
        >>> places(tokens[:1], layer=0, grid=(1, 4))[0, :, 2]
        tensor([0.0000, 0.3536, 0.7071, 1.0607])
    """

    def __init__(self, weight: float | None = None, num_rotations: int = 1) -> None:
        super().__init__()
        if num_rotations > 1 and weight:
            msg = (
                f"place_weight={weight} is for parts that lie in place, num_rotations={num_rotations} for parts in any "
                "direction. Leave one of them out."
            )
            raise ValueError(msg)
        if weight is not None and not 0 <= weight < math.inf:
            msg = (
                f"place_weight={weight} must be at least 0, which leaves places out, or None to let the images decide."
            )
            raise ValueError(msg)
        self.weight = weight if num_rotations == 1 else 0.0
        self.register_buffer("scales", torch.empty(0))
        self.scales: torch.Tensor

    @property
    def columns(self) -> int:
        """Columns beside those of the neurons: 2, or 0 where places are left out."""
        return 2 if len(self.scales) else 0

    def forget(self) -> None:
        """Leave places out until the next fit."""
        self.scales = self.scales[:0]

    def fit(self, tokens: Sequence[torch.Tensor], grid: tuple[int, int], references: Sequence[int]) -> None:
        """Decide whether places count, and how much beside tokens of this length.

        Args:
            tokens (Sequence[torch.Tensor]): By layer the projected patch tokens of normal images ``(I, N, K)``.
            grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.
            references (Sequence[int]): Images that are compared with the others.
        """
        self.forget()
        if self.weight == 0 or len(tokens[0]) == 1:  # of one image nobody knows
            return
        weight = WEIGHT if self.weight is None else self.weight
        self.scales = torch.stack([of_layer.square().sum(dim=-1).mean().mul(weight).sqrt() for of_layer in tokens])
        if self.weight is None:
            near, longer = self.alignment(tokens, grid, references)
            if near < SHARE or longer > LONGER:
                self.forget()

    def alignment(
        self, tokens: Sequence[torch.Tensor], grid: tuple[int, int], references: Sequence[int]
    ) -> tuple[float, float]:
        """Compare normal images with the others, to see whether places hold them together.

        Args:
            tokens (Sequence[torch.Tensor]): As of :meth:`fit`.
            grid (tuple[int, int]): As of :meth:`fit`.
            references (Sequence[int]): As of :meth:`fit`.

        Returns:
            tuple[float, float]: Share of the patches whose nearest one lies near their own place, and the factor by
            which the 99 % quantile of distances grows by places; each of the layer where it is worst.
        """
        kept = kept_patches(grid, STRIDE, tokens[0].device)
        places = _places(grid, torch.arange(grid[0] * grid[1], device=kept.device))
        apart = torch.cdist(places[kept], places).square()
        shares, factors = [], []
        for of_layer, scale in zip(tokens, self.scales, strict=True):
            near, plain, placed = [], [], []
            for number in tqdm(references, "do good parts lie in place", unit="image", delay=3):
                best = torch.full_like(kept, torch.inf, dtype=of_layer.dtype)  # squared distances
                best_placed, at = best.clone(), torch.zeros_like(kept)
                for other in (image for index, image in enumerate(of_layer) if index != number):
                    squares = torch.cdist(of_layer[number, kept], other).square()
                    least, where = squares.min(dim=1)
                    at = torch.where(least < best, where, at)
                    best = torch.minimum(best, least)
                    best_placed = torch.minimum(best_placed, torch.addcmul(squares, apart, scale.square()).amin(dim=1))
                near.append(apart.gather(1, at[:, None]) < NEAR**2)
                plain.append(best)
                placed.append(best_placed)
            shares.append(torch.cat(near).float().mean())
            longest = [torch.cat(squares).quantile(QUANTILE) for squares in (plain, placed)]
            factors.append((longest[1] / longest[0].clamp(min=1e-12)).sqrt())
        return float(torch.stack(shares).amin()), float(torch.stack(factors).amax())

    def forward(
        self, tokens: torch.Tensor, layer: int, grid: tuple[int, int], patches: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Put places beside tokens.

        Args:
            tokens (torch.Tensor): Projected patch tokens ``(..., N, K)``.
            layer (int): Number of the layer.
            grid (tuple[int, int]): Rows and columns of patches.
            patches (torch.Tensor | None): The patches that they show ``(N,)``. ``None`` is all of the grid.

        Returns:
            torch.Tensor: Tokens ``(..., N, K + 2)``; as they are, where places are left out.
        """
        if not self.columns:
            return tokens
        if patches is None:
            patches = torch.arange(grid[0] * grid[1], device=tokens.device)
        places = _places(grid, patches) * self.scales[layer]
        return torch.cat([tokens, places.to(tokens.dtype).expand(*tokens.shape[:-1], 2)], dim=-1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the checkpoint of a release that knew no places, too."""
        state_dict.setdefault(f"{prefix}scales", torch.empty(0))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _places(grid: tuple[int, int], patches: torch.Tensor) -> torch.Tensor:
    """Places of patches ``(N, 2)``, 1 being the longer side."""
    return torch.stack([patches // grid[1], patches % grid[1]], dim=-1) / max(grid)
