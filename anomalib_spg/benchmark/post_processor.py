# SPDX-License-Identifier: Apache-2.0

"""Post-processor for models with unbounded raw scores, so that all are evaluated on the ranking of their scores."""

from typing import Any

import torch
from anomalib.data import Batch
from lightning import LightningModule, Trainer

from anomalib_spg.components.post_processor import OrderPreservingPostProcessor


class RawScorePostProcessor(OrderPreservingPostProcessor):
    """The order-preserving post-processor for models with unbounded raw scores, such as distances.

    Raw scores are first mapped into (0, 1) by :func:`squash`, which is strictly increasing: no score is clamped, and
    torchmetrics, which applies a sigmoid to values outside [0, 1], leaves them unchanged.

    Args:
        **kwargs: Arguments of :class:`anomalib.post_processing.PostProcessor`.

    Example:
        >>> low, high, threshold = squash(torch.tensor([30.0, 60.0, 40.0]))
        >>> scores = torch.tensor([30.0, 40.0, 60.0, 600.0])
        >>> RawScorePostProcessor()._normalize(scores, low, high, threshold)
        tensor([0.0500, 0.5000, 0.9500, 0.9949])
    """

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's type has no batches of anomalib
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Map the scores into (0, 1) before thresholds and extremes are computed from them."""
        for field in ("pred_score", "anomaly_map"):
            if getattr(outputs, field) is not None:
                setattr(outputs, field, squash(getattr(outputs, field)))
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)

    def normalize_batch(self, batch: Batch) -> None:
        """As the base class, after flattening: AnomalyDINO has scores ``(B, 1)``, which not every metric takes."""
        if batch.pred_score is not None:
            batch.pred_score = batch.pred_score.flatten()
        super().normalize_batch(batch)

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        """As the base class, from raw scores; in double precision, so that rounding ties none of them."""
        squashed = None if preds is None else squash(preds)
        normalized = OrderPreservingPostProcessor._normalize(squashed, norm_min, norm_max, threshold)  # noqa: SLF001
        return None if normalized is None else normalized.float()


def squash(scores: torch.Tensor) -> torch.Tensor:
    """Map any scores into (0, 1), strictly increasing: ``(1 + s / (1 + |s|)) / 2``.

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
