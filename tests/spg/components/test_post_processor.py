# SPDX-License-Identifier: Apache-2.0

"""The post-processor keeps every ranking, takes its thresholds from good parts, and rejects what is no number."""

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from anomalib.post_processing import PostProcessor
from sklearn.metrics import roc_auc_score

from anomalib_spg import RawScorePostProcessor
from anomalib_spg.components.evaluator import default_evaluator
from anomalib_spg.components.post_processor import GoodPartsPostProcessor
from anomalib_spg.components.threshold import good_part_threshold
from tests.helpers import data


def batch(scores: torch.Tensor, labels: torch.Tensor) -> ImageBatch:
    """Predictions whose maps are constant at the score."""
    maps = scores.view(-1, 1, 1).expand(-1, 4, 4).clone()
    return ImageBatch(
        image=torch.zeros(len(scores), 3, 4, 4),
        gt_label=labels,
        pred_score=scores.clone(),
        anomaly_map=maps,
    )


def calibrated(scores: torch.Tensor, labels: torch.Tensor, kind: type = GoodPartsPostProcessor) -> PostProcessor:
    """A post-processor that has seen validation scores."""
    post_processor = kind()
    if kind is GoodPartsPostProcessor:
        post_processor.on_validation_epoch_start(None, None)
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
    for kind in (GoodPartsPostProcessor, PostProcessor):
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
    assert printed[GoodPartsPostProcessor] == pytest.approx(raw, abs=1e-6)
    assert printed[PostProcessor] < raw - 0.005, "the trap this guards against is gone; the guard may be too"


def test_normalisation_is_strictly_rising() -> None:
    """No two different scores become equal, over the whole of [0, 1]."""
    post_processor = calibrated(torch.tensor([0.3, 0.31, 0.35, 0.36]), torch.tensor([0, 0, 1, 1]))
    scores = torch.linspace(0, 1, 10_001)
    shown = post_processor.forward(InferenceBatch(pred_score=scores, anomaly_map=scores.view(1, 1, 1, -1))).pred_score
    assert 0 < shown[0] < 0.05
    assert 0.9 < shown[-1] < 1
    assert (shown.diff() > 0).all()


def test_shown_scores_mean_something() -> None:
    """0.5 at the threshold, 0.2 for a typical good part, 0.8 as far above the threshold on the logit scale."""
    scores = torch.linspace(0.2, 0.4, 99)
    post_processor = calibrated(scores, torch.zeros(99, dtype=torch.long))
    threshold = post_processor.image_threshold
    far = torch.sigmoid(2 * torch.logit(threshold) - torch.logit(scores.median()))
    shown = post_processor(InferenceBatch(torch.stack([scores.median(), threshold, far]), None)).pred_score
    torch.testing.assert_close(shown, torch.tensor([0.2, 0.5, 0.8]), rtol=1e-4, atol=1e-4)


def test_bad_images_move_the_threshold() -> None:
    """It separates what validation holds, as good parts alone would not; a named rate bounds the false alarms."""
    scores = torch.cat([torch.linspace(0.2, 0.4, 60), torch.linspace(0.45, 0.5, 10), torch.linspace(0.52, 0.9, 20)])
    labels = torch.tensor([0] * 70 + [1] * 20)
    batches = batch(scores, labels)
    thresholds = {}
    for rate in (None, 0.05):
        post_processor = GoodPartsPostProcessor(rate)
        post_processor.on_validation_batch_end(None, None, batches)
        post_processor.on_validation_epoch_end(None, None)
        thresholds[rate] = float(post_processor.image_threshold)
    assert 0.5 < thresholds[0.05] < 0.52
    assert 0.5 < thresholds[None] < 0.52
    overlapping = torch.cat([
        torch.linspace(0.2, 0.5, 70),
        torch.linspace(0.48, 0.482, 10),
        torch.linspace(0.55, 0.6, 10),
    ])
    named, free = GoodPartsPostProcessor(0.05), GoodPartsPostProcessor()
    for post_processor in (named, free):
        post_processor.on_validation_batch_end(None, None, batch(overlapping, labels))
        post_processor.on_validation_epoch_end(None, None)
    assert (overlapping[:70] > named.image_threshold).float().mean() <= 0.05
    assert 0.05 < (overlapping[:70] > free.image_threshold).float().mean() <= 0.1


def test_only_normal_validation_images() -> None:
    """The validation images themselves pass, and what scores far more does not."""
    scores = torch.tensor([0.10, 0.12, 0.15, 0.11, 0.13])
    post_processor = calibrated(scores, torch.zeros(5, dtype=torch.long))
    expected = good_part_threshold(torch.logit(scores).tolist()).logit
    torch.testing.assert_close(post_processor.image_threshold, torch.tensor(expected).sigmoid(), rtol=1e-4, atol=1e-5)
    shown = post_processor(InferenceBatch(pred_score=torch.cat([scores, torch.tensor([0.9])]), anomaly_map=None))
    assert shown.pred_label.tolist() == [False] * 5 + [True]


def test_drawn_anomalies_are_ignored() -> None:
    """anomalib's synthetic validation anomalies do not move the threshold; its good images count."""
    trainer = SimpleNamespace(
        val_dataloaders=SimpleNamespace(
            dataset=type("Drawn", (SyntheticAnomalyDataset,), {"__init__": lambda _: None, "__del__": lambda _: None})()
        )
    )
    scores = torch.linspace(0.2, 0.4, 50)
    drawn, alone = GoodPartsPostProcessor(), GoodPartsPostProcessor()
    drawn.on_validation_batch_end(trainer, None, batch(torch.cat([scores, scores]), torch.tensor([0] * 50 + [1] * 50)))
    alone.on_validation_batch_end(None, None, batch(scores, torch.zeros(50, dtype=torch.long)))
    for post_processor in (drawn, alone):
        post_processor.place_thresholds()
    assert drawn.image_threshold == alone.image_threshold
    assert "unknown" in drawn.report()


def test_pixels_of_good_parts() -> None:
    """A thousandth of their pixels lies above the threshold, and only rejected images have a mask."""
    maps = torch.rand(40, 1, 100, 100) * 0.5
    post_processor = GoodPartsPostProcessor(pixel_false_alarm_rate=0.001)
    post_processor.add_good(torch.linspace(0.2, 0.4, 40), maps)
    post_processor.place_thresholds()
    assert (maps > post_processor.pixel_threshold).float().mean() == pytest.approx(0.001, rel=0.2)
    one = torch.full((2, 1, 8, 8), 0.9)
    result = post_processor(InferenceBatch(pred_score=torch.tensor([0.1, 0.9]), anomaly_map=one))
    assert result.pred_mask.flatten(1).any(dim=1).tolist() == [False, True]
    item = ImageBatch(image=torch.zeros(2, 3, 8, 8), pred_score=torch.tensor([0.1, 0.9]), anomaly_map=one)
    post_processor.post_process_batch(item)
    assert item.pred_mask.flatten(1).any(dim=1).tolist() == [False, True]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_no_number_is_never_accepted(score: float) -> None:
    """Neither with thresholds nor without."""
    for post_processor in (
        calibrated(torch.linspace(0.2, 0.4, 50), torch.zeros(50, dtype=torch.long)),
        GoodPartsPostProcessor(),
    ):
        maps = torch.full((1, 1, 4, 4), score)
        result = post_processor(InferenceBatch(pred_score=torch.tensor([score]), anomaly_map=maps))
        assert result.pred_label.tolist() == [True]
        item = ImageBatch(image=torch.zeros(1, 3, 4, 4), pred_score=torch.tensor([score]), anomaly_map=maps)
        post_processor.post_process_batch(item)
        assert item.pred_label.tolist() == [True]


def test_another_rate_needs_no_training() -> None:
    """The scores travel in the checkpoint's plain data; a rate named when it is loaded moves the thresholds."""
    trained = GoodPartsPostProcessor()
    trained.add_good(torch.linspace(0.2, 0.4, 99), torch.rand(9, 1, 50, 50) * 0.5)
    trained.place_thresholds()
    config = json.loads(json.dumps(trained.checkpoint_config()))

    def load(**arguments: float) -> GoodPartsPostProcessor:
        loaded = GoodPartsPostProcessor(**arguments)
        loaded.load_checkpoint_config(config)
        loaded.load_state_dict(trained.state_dict())
        return loaded

    assert load().image_threshold == trained.image_threshold
    moved = load(false_alarm_rate=0.2, pixel_false_alarm_rate=0.1)
    assert moved.image_threshold < trained.image_threshold
    assert moved.pixel_threshold < trained.pixel_threshold
    moved.place_thresholds(false_alarm_rate=0.08, pixel_false_alarm_rate=0.001)
    assert moved.image_threshold == trained.image_threshold


@pytest.mark.parametrize("arguments", [{"false_alarm_rate": 0.0}, {"pixel_false_alarm_rate": 1.0}])
def test_bad_rates(arguments: dict) -> None:
    """Messages name the value."""
    for refuse in (GoodPartsPostProcessor, GoodPartsPostProcessor().place_thresholds):
        with pytest.raises(ValueError, match=rf"{next(iter(arguments))}={next(iter(arguments.values()))}"):
            refuse(**arguments)


def test_report_says_what_is_known() -> None:
    """Number of good parts, the rate with its interval, and that misses are unknown or how many bad parts are found."""
    few, many = GoodPartsPostProcessor(), GoodPartsPostProcessor()
    few.add_good(torch.linspace(0.2, 0.4, 5))
    few.add_good(torch.linspace(0.2, 0.4, 3), learned_from=True)
    many.on_validation_batch_end(None, None, batch(torch.linspace(0.2, 0.9, 60), torch.tensor([0] * 50 + [1] * 10)))
    for post_processor in (few, many):
        post_processor.place_thresholds()
    assert re.search(
        r"from 8 good images \(3 of them learned from\)\. It will reject about 8\.0% .*\(.*% to .*%.*24 good images.*"
        r"misses is unknown",
        few.report(),
    )
    assert re.search(
        r"moved by bad images: 0 of the 50 good images that are not learned from lie above it\. "
        r"Good images alone .* about 7\.8% .*finds 10 of the 10 bad",
        many.report(),
    )
    assert "No good image" in GoodPartsPostProcessor().report()


@pytest.mark.parametrize(
    ("mode", "validates", "is_said"),
    [
        ("same_as_test", True, True),
        ("same_as_test", False, False),
        ("from_test", True, False),
        ("from_train", True, False),
        ("none", True, False),
    ],
)
def test_images_that_place_the_threshold_and_are_tested_on(
    mode: str, validates: bool, is_said: bool, mvtec: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """anomalib's default for MVTec AD: what the decision's metrics are worth is said before the fit."""
    datamodule = data(mvtec, val_split_mode=mode)
    datamodule.setup()
    trainer = SimpleNamespace(datamodule=datamodule, enable_validation=validates, is_global_zero=True)
    with caplog.at_level(logging.WARNING):
        GoodPartsPostProcessor().on_fit_start(trainer, None)
    said = f"share {len(datamodule.test_data)} images" in caplog.text and "val_split_mode=from_test" in caplog.text
    assert said == is_said


def test_other_models_by_one_line() -> None:
    """Distances far outside [0, 1]: thresholds and shown scores as for our own models, in their order."""
    post_processor = RawScorePostProcessor()
    post_processor.on_validation_batch_end(
        None, None, batch(torch.linspace(20, 30, 50), torch.zeros(50, dtype=torch.long))
    )
    post_processor.on_validation_epoch_end(None, None)
    scores = torch.linspace(0, 100, 500)
    item = batch(scores.clone(), torch.zeros(500, dtype=torch.long))
    post_processor.post_process_batch(item)
    assert (item.pred_score.diff() > 0).all()
    assert item.pred_label[scores > 31].all()
    assert not item.pred_label[scores < 29].any()


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
    shown = GoodPartsPostProcessor()(InferenceBatch(pred_score=torch.tensor([0.2, 0.8]), anomaly_map=None))
    torch.testing.assert_close(shown.pred_score, torch.tensor([0.2, 0.8]))
    assert shown.pred_label.tolist() == [False, True]


@pytest.mark.parametrize("named", ["false_alarm_rate", "pixel_false_alarm_rate"])
def test_a_rate_that_is_not_named_stays(named: str) -> None:
    """That of the checkpoint goes on to hold when the other one is named, or nothing is, and for what comes later."""
    scores, maps = torch.linspace(0.2, 0.5, 200), torch.rand(200, 1, 4, 4).sort(dim=0).values * 0.4
    fitted = GoodPartsPostProcessor(false_alarm_rate=0.02, pixel_false_alarm_rate=0.05)
    fitted.add_good(scores, maps)
    fitted.place_thresholds()
    found = {}
    for name, arguments in {"none": {}, named: {named: 0.3}}.items():
        loaded = GoodPartsPostProcessor(**arguments)
        loaded.load_checkpoint_config(json.loads(json.dumps(fitted.checkpoint_config())))
        loaded.load_state_dict(fitted.state_dict())
        loaded.place_thresholds()
        found[name] = {"image": float(loaded.image_threshold), "pixel": float(loaded.pixel_threshold)}
    moved, kept = ("pixel", "image") if named.startswith("pixel") else ("image", "pixel")
    assert found["none"] == {"image": float(fitted.image_threshold), "pixel": float(fitted.pixel_threshold)}
    assert found[named][kept] == found["none"][kept]
    assert found[named][moved] < found["none"][moved] - 0.01


def test_a_rate_for_a_checkpoint_without_scores(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing can be placed anew, and that is said."""
    fitted = GoodPartsPostProcessor()
    fitted.add_good(torch.linspace(0.2, 0.5, 200))
    fitted.place_thresholds()
    loaded = GoodPartsPostProcessor(false_alarm_rate=0.02)
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(loaded.image_threshold, fitted.image_threshold)
    assert "holds no scores of good parts, so its thresholds stay as they are" in caplog.text


@pytest.mark.parametrize("kind", [GoodPartsPostProcessor, RawScorePostProcessor])
def test_normalization_cannot_be_left_out(kind: type[GoodPartsPostProcessor]) -> None:
    """Else anomalib compares raw scores with 0.5."""
    with pytest.raises(ValueError, match="would compare raw scores with 0.5"):
        kind(enable_normalization=False)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e6, 1e9])
def test_raw_scores_of_any_size(size: float) -> None:
    """As many of them are rejected, and shown scores still rise, where single precision would tie them."""
    scores = size * (1 + 0.05 * torch.randn(400))
    post_processor = RawScorePostProcessor(false_alarm_rate=0.1)
    post_processor.add_good(scores[:200])
    post_processor.place_thresholds()
    copy = RawScorePostProcessor()
    copy.load_state_dict(post_processor.state_dict())
    shown = copy(InferenceBatch(pred_score=scores.sort().values, anomaly_map=None))
    assert 0.03 < shown.pred_label[shown.pred_score.argsort()].float().mean() < 0.17
    assert shown.pred_score.dtype == torch.float32
    assert len(shown.pred_score.unique()) > 390
    assert (shown.pred_score.diff() >= 0).all()


def test_scores_that_are_no_numbers_are_named() -> None:
    """Of good parts, of validation's good and bad ones: which files, and what to do."""
    scores = torch.tensor([0.3, float("nan"), float("inf")])
    with pytest.raises(ValueError, match=r"2 of 3 images.*not a finite number: b\.png, c\.png\. Leave them out"):
        GoodPartsPostProcessor().add_good(scores, paths=["a.png", "b.png", "c.png"])
    for label in (False, True):
        seen = batch(scores, torch.tensor([False, label, label]))
        seen.image_path = ["a.png", "b.png", "c.png"]
        with pytest.raises(ValueError, match=r"not a finite number: b\.png, c\.png"):
            GoodPartsPostProcessor().on_validation_batch_end(None, None, seen)
