# SPDX-License-Identifier: Apache-2.0

"""What an explanation is: the score of an image, split exactly into contributions of parts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from anomalib_spg.components.backbone import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .examples import Examples


@dataclass
class Explanation:
    """The score of one image, split into parts: ``score = base + contributions.sum() + sum(other.values())``.

    Attributes:
        unit (str): What the parts are: ``"atom"``, ``"neuron"``, or ``"component"`` of neurons.
        score (float): Raw score of the image, in [0, 1].
        base (float): Score without any part.
        blocks (torch.Tensor): 0-based block each part belongs to ``(n,)``.
        units (torch.Tensor): Atom (row of the block's dictionary) or neuron (channel) of each part ``(n,)``.
        contributions (torch.Tensor): What each part adds to the score, which may be negative ``(n,)``.
        maps (torch.Tensor): What each part adds to the patches of the anomaly map, before smoothing ``(n, h, w)``.
        anomaly_map (torch.Tensor): The anomaly map ``(H, W)``, in [0, 1].
        peak (tuple[int, int]): Row and column of the patch that contributes most to the score.
        other (dict[str, float]): What anything but the parts adds to the score, by name.
        opposed (torch.Tensor | None): Atoms that push to normal and add to the score because the image points away from
            them ``(n,)`` (SPG, where only the map makes the score).
        nearest (tuple[int, int, int] | None): Number of the normal image the peak was compared with, number of the
            patch in it, and side of the window in patches (LAKE).
    """

    unit: str
    score: float
    base: float
    blocks: torch.Tensor
    units: torch.Tensor
    contributions: torch.Tensor
    maps: torch.Tensor
    anomaly_map: torch.Tensor
    peak: tuple[int, int]
    other: dict[str, float] = field(default_factory=dict)
    opposed: torch.Tensor | None = None
    nearest: tuple[int, int, int] | None = None

    @property
    def shares(self) -> torch.Tensor:
        """Share of each part in all positive contributions ``(n,)``; 0 for parts with a negative one."""
        for_anomaly = self.contributions.clamp(min=0)
        return for_anomaly / (for_anomaly.sum() + sum(max(0.0, value) for value in self.other.values())).clamp(
            min=1e-12
        )

    def top(self, count: int = 5) -> list[int]:
        """Indices of the parts that add most, the largest first; only parts with a positive contribution.

        Args:
            count (int): Maximum number of parts. Defaults to 5.

        Returns:
            list[int]: Indices into the parts.
        """
        order = self.contributions.argsort(descending=True)[:count]
        return order[self.contributions[order] > 0].tolist()

    def others(self, top: Sequence[int]) -> tuple[int, float]:
        """Number of the parts that are not named, and what they add together.

        Args:
            top (Sequence[int]): Indices of the parts that are named.

        Returns:
            tuple[int, float]: Number and sum.
        """
        rest = self.contributions.clone()
        rest[list(top)] = 0
        return len(rest) - len(top), float(rest.sum())


@runtime_checkable
class ExplainableModel(Protocol):
    """What :class:`ExplanationVisualizer` needs from a Lightning model.

    Attributes:
        examples (Examples | None): Where the model keeps training images while it is fitted, if set.
    """

    examples: "Examples | None"

    def explain(self, images: torch.Tensor, tokens: Tokens | None = None) -> list[Explanation]:
        """Split the scores of normalised images ``(B, 3, H, W)``, from their tokens if given."""

    def figures(self, examples: "Examples | None" = None) -> "dict[str, tuple[str, Figure]]":
        """Draw the model: titles and figures by file name."""

    def chosen_neurons(self) -> dict[int, list[int]]:
        """Neurons the model compares, by block; empty where it has none."""
