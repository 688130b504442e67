# SPDX-License-Identifier: Apache-2.0

"""Compressed OpenVINO files tell apart what torch does."""

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import Folder, MVTecAD
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule

from anomalib_lake import LAKE
from anomalib_spg import SPG
from anomalib_spg.components.compression import give_validation_images

# Raw scores: next to a threshold the post-processor can make a large step of a small one.
SMALL = {
    "backbone": "vit_tiny_patch16_224",
    "pre_trained": False,
    "image_size": 64,
    "visualizer": False,
    "post_processor": False,
}
MODELS = {
    "LAKE": lambda: LAKE(**SMALL, layers=[0, 1], k_shot=2),
    "SPG": lambda: SPG(**SMALL, layers=[1], views=2, num_atoms=64, k=8, sae_epochs=1, guide_epochs=2),
}


@pytest.fixture(scope="module", params=list(MODELS))
def trained(
    request: pytest.FixtureRequest, mvtec: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AnomalibModule, MVTecAD]:
    """A small model and the datamodule it was trained on."""
    torch.manual_seed(0)
    model = MODELS[request.param]()
    datamodule = MVTecAD(root=mvtec, category="brick", num_workers=0, train_batch_size=4, eval_batch_size=4)
    folder = tmp_path_factory.mktemp("compression")
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.fit(model, datamodule=datamodule)
    return model.eval(), datamodule


@pytest.mark.slow
@pytest.mark.parametrize("compression", ["int8", "int8_ptq"])
def test_scores_survive(trained: tuple[AnomalibModule, MVTecAD], compression: str, mvtec: Path, tmp_path: Path) -> None:
    """Raw scores of INT8 follow those of torch, and so do maps."""
    model, datamodule = trained
    path = model.to_openvino(tmp_path, compression_type=CompressionType(compression), datamodule=datamodule)
    images = np.stack([read_image(path) for path in sorted((mvtec / "brick").rglob("test/*/*.png"))])
    images = images.transpose(0, 3, 1, 2).astype(np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images))
    result = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images)
    scores = result["pred_score"].flatten()
    assert np.corrcoef(scores, expected.pred_score)[0, 1] > 0.99
    maps = result["anomaly_map"].reshape(expected.anomaly_map.shape)
    assert np.abs(maps - expected.anomaly_map.numpy()).max() < 0.03


def test_calibration_on_good_parts_only(mvtec: Path) -> None:
    """A folder of good parts has no validation images, by which anomalib calibrates: its training images serve."""
    source = Folder(*("good", mvtec / "brick/train/good"), num_workers=0, test_split_mode="none", val_split_mode="none")
    give_validation_images(source)
    source.setup("fit")  # as anomalib does again
    assert len(source.val_dataloader().dataset) == 4
    give_validation_images(None)
