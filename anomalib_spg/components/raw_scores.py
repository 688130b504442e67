# SPDX-License-Identifier: Apache-2.0

"""Thresholds from good parts for any model of anomalib, whatever the range of its scores."""

from typing import Any

import torch
from anomalib.data import Batch

from .post_processor import GoodPartsPostProcessor


class RawScorePostProcessor(GoodPartsPostProcessor):
    """Thresholds from good parts, and scores whose order is kept, for any model of anomalib.

    Raw scores that lie anywhere, as distances do, are first brought into (0, 1) by :func:`squash`, which rises
    everywhere: no score is clamped, and torchmetrics, which takes a sigmoid of whatever it finds outside [0, 1], leaves
    them alone. The validation images labelled good set the thresholds, since other models hold none out themselves.

    Args:
        **kwargs: Arguments of :class:`GoodPartsPostProcessor`.

    Example:
        >>> from anomalib.models import Patchcore
        >>> model = Patchcore("resnet18", pre_trained=False, post_processor=RawScorePostProcessor(false_alarm_rate=0.1))

        On the command line: ``--model.post_processor anomalib_spg.RawScorePostProcessor``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.double()  # in single precision all of (0, 1) that scores of a million take is one number

    @staticmethod
    def to_unit(scores: torch.Tensor) -> torch.Tensor:
        """Bring raw scores of any shape into (0, 1); in double precision, so that rounding ties none of them."""
        return squash(scores)

    def normalize_batch(self, batch: Batch) -> None:
        """As the base class, after flattening: AnomalyDINO has scores ``(B, 1)``, which not every metric takes."""
        if batch.pred_score is not None:
            batch.pred_score = batch.pred_score.flatten()
        super().normalize_batch(batch)


def squash(scores: torch.Tensor) -> torch.Tensor:
    """Map any scores into (0, 1), strictly rising: ``(1 + s / (1 + |s|)) / 2``.

    Args:
        scores (torch.Tensor): Scores of any shape and sign.

    Returns:
        torch.Tensor: Double precision, of the same shape.

    Example:
        >>> squash(torch.tensor([-1.0, 0.0, 1.0, 3.0]))
        tensor([0.2500, 0.5000, 0.7500, 0.8750], dtype=torch.float64)
    """
    scores = scores.double()
    return (1 + scores / (1 + scores.abs())) / 2
