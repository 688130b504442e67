# SPDX-License-Identifier: Apache-2.0

"""Metrics printed by default."""

from anomalib.metrics import AUPRO, AUROC, AnomalibMetric, Evaluator, F1Score
from torchmetrics.classification import BinaryAveragePrecision


class AveragePrecision(AnomalibMetric, BinaryAveragePrecision):  # type: ignore[misc]  # as anomalib's own metrics
    """Average precision of torchmetrics as an anomalib metric; anomalib's AUPR is the trapezoidal area instead."""


def default_evaluator() -> Evaluator:
    """anomalib's default metrics, plus average precision and AUPRO.

    Returns:
        Evaluator: Image AUROC, AP and F1; pixel AUROC, AUPRO and F1 where there are masks.
    """
    image, label = ["pred_score", "gt_label"], ["pred_label", "gt_label"]
    pixel, mask = ["anomaly_map", "gt_mask"], ["pred_mask", "gt_mask"]
    return Evaluator(
        test_metrics=[
            AUROC(fields=image, prefix="image_"),
            AveragePrecision(fields=image, prefix="image_"),
            F1Score(fields=label, prefix="image_"),
            AUROC(fields=pixel, prefix="pixel_", strict=False),
            AUPRO(fields=pixel, prefix="pixel_", strict=False),
            F1Score(fields=mask, prefix="pixel_", strict=False),
        ],
    )
