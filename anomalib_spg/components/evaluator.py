# SPDX-License-Identifier: Apache-2.0

"""Metrics printed by default."""

from typing import Any

import torch
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, Evaluator, F1Score
from torchmetrics import Metric
from torchmetrics.classification import BinaryAveragePrecision


class AveragePrecision(AnomalibMetric, BinaryAveragePrecision):  # type: ignore[misc]  # as anomalib's own metrics
    """Average precision of torchmetrics as an anomalib metric; anomalib's AUPR is the trapezoidal area instead."""


class _DecisionRate(Metric):
    """Share of wrong decisions among the images of one label; not a number if there are none."""

    label: int

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("wrong", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")
        self.wrong: torch.Tensor
        self.total: torch.Tensor

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        """Count a batch of decisions ``(B,)`` and labels ``(B,)``, 1 for rejected and for bad."""
        decisions = preds.flatten()[target.flatten() == self.label].bool()
        self.wrong += (decisions != bool(self.label)).sum()
        self.total += decisions.numel()

    def compute(self) -> torch.Tensor:
        """Compute the share."""
        return self.wrong / self.total


class _FalseAlarmRate(_DecisionRate):
    label = 0


class _MissRate(_DecisionRate):
    label = 1


class FalseAlarmRate(AnomalibMetric, _FalseAlarmRate):  # type: ignore[misc]  # anomalib's update takes a batch
    """Share of the good images that are rejected.

    Example:
        >>> metric = _FalseAlarmRate()
        >>> metric.update(torch.tensor([True, False, False, True]), torch.tensor([0, 0, 1, 1]))
        >>> metric.compute()
        tensor(0.5000)
    """


class MissRate(AnomalibMetric, _MissRate):  # type: ignore[misc]  # as above
    """Share of the bad images that are accepted.

    Example:
        >>> metric = _MissRate()
        >>> metric.update(torch.tensor([True, False, False, True, False]), torch.tensor([0, 0, 1, 1, 1]))
        >>> metric.compute()
        tensor(0.6667)
    """


def default_evaluator() -> Evaluator:
    """anomalib's default metrics; average precision, AUPRO and what the decision does beside them.

    Returns:
        Evaluator: Image AUROC, AP, F1, false alarms and misses; pixel AUROC, AUPRO and F1 where there are masks.
    """
    image, label = ["pred_score", "gt_label"], ["pred_label", "gt_label"]
    pixel, mask = ["anomaly_map", "gt_mask"], ["pred_mask", "gt_mask"]
    return Evaluator(
        test_metrics=[
            AUROC(fields=image, prefix="image_"),
            AveragePrecision(fields=image, prefix="image_"),
            F1Score(fields=label, prefix="image_"),
            FalseAlarmRate(fields=label, prefix="image_"),
            MissRate(fields=label, prefix="image_"),
            AUROC(fields=pixel, prefix="pixel_", strict=False),
            AUPRO(fields=pixel, prefix="pixel_", strict=False),
            F1Score(fields=mask, prefix="pixel_", strict=False),
        ],
    )
