# SPDX-License-Identifier: Apache-2.0

"""Half precision runs the backbone only: maps, scores and what is learned stay in single precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.models import AnomalibModule
from lightning.pytorch.plugins import MixedPrecision

from anomalib_lake import LAKE
from anomalib_spg import SPG
from anomalib_spg.components.backbone import Backbone
from tests.helpers import TINY, TINY_CLIP, data, engine
from tests.spg.test_lightning_model import auxiliary
from tests.spg.test_lightning_model import build as build_spg


def build(kind: str) -> SPG | LAKE:
    """A small model with random weights."""
    if kind != "lake":
        return build_spg(seed=0)
    torch.manual_seed(0)
    small: dict[str, Any] = {"image_size": 64, "k_shot": 2, "num_neurons": 20, "visualizer": False, "seed": 0}
    return LAKE(TINY, pre_trained=False, **small)


def half(precision: str) -> dict[str, Any]:
    """Arguments of the engine. On the CPU Lightning turns 16-mixed into bf16-mixed, a plugin's it leaves as it is."""
    if precision == "bf16-mixed":
        return {"precision": precision}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}


def raw(model: AnomalibModule, images: torch.Tensor, dtype: torch.dtype) -> Any:
    """What the torch model returns under autocast."""
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        return model.model.eval()(images)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("kind", ["synthetic", "labelled", "lake"])
def test_trains_tests_and_predicts(kind: str, precision: str, mvtec: Path, visa: Path, tmp_path: Path) -> None:
    """Everything but the backbone in float32; maps have as many values as pixels, and lie near those of float32."""
    model = build(kind)
    datamodule = auxiliary(mvtec, visa) if kind == "labelled" else data(mvtec)
    run = engine(tmp_path, **half(precision))
    assert "image_AUROC" in run.train(model=model, datamodule=datamodule)[0]
    predictions = run.predict(model=model, datamodule=datamodule)
    maps = torch.cat([prediction.anomaly_map for prediction in predictions])
    scores = torch.cat([prediction.pred_score for prediction in predictions])
    assert maps.dtype == scores.dtype == model.post_processor.image_threshold.dtype == torch.float32
    assert maps.unique().numel() > 0.9 * maps.numel()
    assert scores.unique().numel() == scores.numel() == 8
    assert {buffer.dtype for buffer in model.buffers() if buffer.is_floating_point()} == {torch.float32}

    images = torch.randn(8, 3, 64, 64)
    with torch.inference_mode():
        exact = model.model.eval()(images)
        backbone = model.model.backbone
        tokens = backbone(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = backbone(images)
    error = (rounded.patches[0] - tokens.patches[0]).norm() / tokens.patches[0].norm()
    assert 1e-4 < error < 0.02, "the backbone must have run in half precision"
    result = raw(model, images, torch.bfloat16)
    assert result.anomaly_map.dtype == result.pred_score.dtype == torch.float32
    assert (result.anomaly_map - exact.anomaly_map).abs().max() < 0.02
    assert result.pred_score.unique().numel() == 8


@pytest.mark.parametrize("kind", ["synthetic", "lake"])
def test_explanations_sum_to_the_score(kind: str, mvtec: Path, tmp_path: Path) -> None:
    """Also under autocast."""
    model = build(kind)
    engine(tmp_path, limit_val_batches=1).fit(model=model, datamodule=data(mvtec))
    images = torch.randn(1, 3, 64, 64)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        explanation = model.explain(images)[0]
    score = raw(model, images, torch.bfloat16).pred_score[0]
    assert float(explanation.base + explanation.contributions.sum()) == pytest.approx(float(score), abs=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_other_precisions_are_refused(precision: str, mvtec: Path, tmp_path: Path) -> None:
    """They would round thresholds and guides; the message names those that work."""
    for model in (build("synthetic"), build("lake")):
        with pytest.raises(ValueError, match=rf"precision={precision} would .*Choose one of 32-true, bf16-mixed, 16-"):
            engine(tmp_path, precision=precision).fit(model=model, datamodule=data(mvtec))


def test_tokens_leave_the_backbone_in_single_precision() -> None:
    """Also after CLIP's projection, which autocast computes in half precision."""
    with torch.autocast("cpu", torch.bfloat16):
        tokens = Backbone(TINY_CLIP, pre_trained=False)(torch.randn(1, 3, 64, 64))
    assert tokens.patches[0].dtype == tokens.pooled[0].dtype == torch.float32
