# SPDX-License-Identifier: Apache-2.0

"""The post-processor keeps every ranking and places thresholds sensibly."""

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from sklearn.metrics import roc_auc_score

from anomalib_spg.components.evaluator import default_evaluator
from anomalib_spg.components.post_processor import OrderPreservingPostProcessor


def batch(scores: torch.Tensor, labels: torch.Tensor) -> ImageBatch:
    """Predictions whose maps are constant at the score."""
    maps = scores.view(-1, 1, 1).expand(-1, 4, 4).clone()
    return ImageBatch(
        image=torch.zeros(len(scores), 3, 4, 4),
        gt_label=labels,
        pred_score=scores.clone(),
        anomaly_map=maps,
    )


def calibrated(scores: torch.Tensor, labels: torch.Tensor, kind: type = OrderPreservingPostProcessor) -> PostProcessor:
    """A post-processor that has seen validation scores."""
    post_processor = kind()
    post_processor.on_validation_batch_end(None, None, batch(scores, labels))
    post_processor.on_validation_epoch_end(None, None)
    return post_processor


def test_metrics_equal_those_of_the_raw_scores() -> None:
    """With the threshold far from the middle, anomalib's clamping loses AUROC; ours prints scikit-learn's raw value.

    The scores are updated in small batches, some of whose raw values would be outside [0, 1] after a wrong map, which
    makes torchmetrics apply a sigmoid per batch.
    """
    labels = torch.tensor([0] * 60 + [1] * 20)
    scores = torch.cat([torch.rand(60) * 0.8, 0.5 + 0.5 * torch.rand(20)])
    validation_scores = torch.tensor([0.40, 0.42, 0.43, 0.45, 0.46, 0.48])
    validation_labels = torch.tensor([0, 0, 0, 0, 1, 1])
    printed = {}
    for kind in (OrderPreservingPostProcessor, PostProcessor):
        post_processor = calibrated(validation_scores, validation_labels, kind)
        evaluator = default_evaluator()
        order = torch.randperm(80)
        for index in order.split(7):
            predictions = batch(scores[index], labels[index])
            post_processor.post_process_batch(predictions)
            assert predictions.pred_score.min() >= 0
            assert predictions.pred_score.max() <= 1
            for metric in evaluator.test_metrics[:2]:
                metric.update(predictions)
        printed[kind] = evaluator.test_metrics[0].compute().item()
    raw = roc_auc_score(labels, scores)
    assert printed[OrderPreservingPostProcessor] == pytest.approx(raw, abs=1e-6)
    assert printed[PostProcessor] < raw - 0.005, "the trap this guards against is gone; the guard may be too"


def test_normalisation_is_strictly_rising() -> None:
    """No two different scores become equal, over the whole of [0, 1]."""
    post_processor = calibrated(torch.tensor([0.3, 0.31, 0.35, 0.36]), torch.tensor([0, 0, 1, 1]))
    scores = torch.linspace(0, 1, 10_001)
    shown = post_processor.forward(InferenceBatch(pred_score=scores, anomaly_map=scores.view(1, 1, 1, -1))).pred_score
    assert shown[0] == 0
    assert shown[-1] == pytest.approx(1)
    assert (shown.diff() > 0).all()


def test_threshold_is_shown_at_one_half_and_separates() -> None:
    """The image threshold lies midway between the scores it separates, and they are decided rightly."""
    scores, labels = torch.tensor([0.2, 0.4, 0.6, 0.9]), torch.tensor([0, 0, 1, 1])
    post_processor = calibrated(scores, labels)
    assert post_processor.image_threshold.item() == pytest.approx(0.5)
    shown = post_processor(InferenceBatch(pred_score=torch.tensor([0.4, 0.5, 0.6]), anomaly_map=None))
    torch.testing.assert_close(shown.pred_score[1], torch.tensor(0.5))
    assert shown.pred_label.tolist() == [False, False, True]


def test_only_normal_validation_images() -> None:
    """Three standard deviations above the mean on the logit scale; the validation images themselves pass."""
    scores = torch.tensor([0.10, 0.12, 0.15, 0.11, 0.13])
    post_processor = calibrated(scores, torch.zeros(5, dtype=torch.long))
    logits = torch.logit(scores)
    expected = torch.sigmoid(logits.mean() + 3 * logits.std(correction=0))
    torch.testing.assert_close(post_processor.image_threshold, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(post_processor.pixel_threshold, post_processor.image_threshold)
    shown = post_processor(InferenceBatch(pred_score=torch.cat([scores, torch.tensor([0.9])]), anomaly_map=None))
    assert shown.pred_label.tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("labels", [[0, 1], [1, 1], [0, 0]])
def test_degenerate_validation(labels: list[int]) -> None:
    """Equal scores, only anomalous ones, two images: finite, in range, still rising."""
    post_processor = calibrated(torch.tensor([0.5, 0.5]), torch.tensor(labels))
    scores = torch.tensor([0.0, 0.2, 0.5, 0.7, 1.0])
    shown = post_processor(InferenceBatch(pred_score=scores, anomaly_map=scores.view(1, 1, 1, -1))).pred_score
    assert shown.isfinite().all()
    assert (shown.diff() > 0).all()
    assert 0 <= shown.min() <= shown.max() <= 1


def test_without_validation_scores_are_raw() -> None:
    """Nothing is known yet: scores pass, and 0.5 decides."""
    shown = OrderPreservingPostProcessor()(InferenceBatch(pred_score=torch.tensor([0.2, 0.8]), anomaly_map=None))
    torch.testing.assert_close(shown.pred_score, torch.tensor([0.2, 0.8]))
    assert shown.pred_label.tolist() == [False, True]
