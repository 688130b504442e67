# SPDX-License-Identifier: Apache-2.0

"""Metrics printed by default, and those of papers' tables."""

from typing import Any

import torch
from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, Evaluator, F1Max, F1Score
from torchmetrics import Metric
from torchmetrics.classification import BinaryAveragePrecision

_IMAGE, _PIXEL = ["pred_score", "gt_label"], ["anomaly_map", "gt_mask"]


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
    return Evaluator(test_metrics=_default_metrics())


def benchmark_evaluator() -> Evaluator:
    """The default metrics, and the others that papers print: the best F1 any threshold reaches, and pixel AP.

    They are left to the benchmark, because they say nothing about the decision, and sorting all pixels twice more takes
    time.

    Returns:
        Evaluator: The default metrics; image F1Max, pixel AP and F1Max, the latter two where there are masks.

    Example:
        >>> names = [metric.name for metric in benchmark_evaluator().test_metrics]
        >>> names[-3:]
        ['image_F1Max', 'pixel_AveragePrecision', 'pixel_F1Max']
    """
    best: list[Any] = [
        F1Max(fields=_IMAGE, prefix="image_"),
        AveragePrecision(fields=_PIXEL, prefix="pixel_", strict=False),
        F1Max(fields=_PIXEL, prefix="pixel_", strict=False),
    ]
    for metric in best:
        if isinstance(metric, F1Max):  # its pixels lie in a metric of its own, which Evaluator would leave on the GPU
            metric.precision_recall_curve.compute_on_cpu = True
    return Evaluator(test_metrics=[*_default_metrics(), *best])


def _default_metrics() -> list[Any]:
    label, mask = ["pred_label", "gt_label"], ["pred_mask", "gt_mask"]
    return [
        AUROC(fields=_IMAGE, prefix="image_"),
        AveragePrecision(fields=_IMAGE, prefix="image_"),
        F1Score(fields=label, prefix="image_"),
        FalseAlarmRate(fields=label, prefix="image_"),
        MissRate(fields=label, prefix="image_"),
        AUROC(fields=_PIXEL, prefix="pixel_", strict=False),
        AUPRO(fields=_PIXEL, prefix="pixel_", strict=False),
        F1Score(fields=mask, prefix="pixel_", strict=False),
    ]
