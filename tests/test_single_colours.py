# SPDX-License-Identifier: Apache-2.0

"""The sequence of anomalib's own integration tests, on images like theirs: normal ones of a single, random colour."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.deploy import ExportType
from anomalib.models import AnomalibModule
from PIL import Image, ImageDraw

from anomalib_lake import LAKE
from anomalib_spg import SPG
from tests.helpers import TINY, data, engine

COUNT, SIZE = 5, 64


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A category ``brick`` in MVTec AD's layout: good images of one colour, bad ones with a shape, and masks."""
    folder, generator = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for kind in ("train/good", "test/good", "test/bad", "ground_truth/bad"):
        (folder / "brick" / kind).mkdir(parents=True)
    for index in range(COUNT):
        for kind in ("train/good", "test/good", "test/bad"):
            image = Image.new("RGB", (SIZE, SIZE), tuple(generator.integers(0, 256, 3).tolist()))
            if kind == "test/bad":
                mask, box = Image.new("L", image.size), (8, 8 + index, 40, 40)
                ImageDraw.Draw(mask).ellipse(box, fill=255)
                ImageDraw.Draw(image).ellipse(box, fill=tuple(generator.integers(0, 256, 3).tolist()))
                mask.save(folder / "brick/ground_truth/bad" / f"{index:03}_mask.png")
            image.save(folder / "brick" / kind / f"{index:03}.png")
    return folder


def build(name: str, **arguments: object) -> AnomalibModule:
    """A model with a tiny random backbone."""
    torch.manual_seed(0)
    shared = {"backbone": TINY, "pre_trained": False, "image_size": SIZE, "visualizer": False, **arguments}
    if name == "LAKE":
        return LAKE(**{"layers": [1], "scales": [1], "k_shot": 4, "num_neurons": 20, **shared})
    return SPG(layers=[1], views=2, num_atoms=64, k=8, sae_epochs=1, guide_epochs=2, ema_warmup=True, **shared)


@pytest.fixture(scope="module", params=["LAKE", "SPG"])
def fitted(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The name of a model, and its checkpoint."""
    run = engine(tmp_path_factory.mktemp(request.param))
    run.fit(model=build(request.param), datamodule=data(root))
    return request.param, run.best_model_path


# OpenVINO's export goes by way of ONNX.
EXPORTS = ("torch", "openvino")


@pytest.mark.slow
@pytest.mark.parametrize("step", ["test", "train", "validate", "predict", *EXPORTS])
def test_every_step_from_the_checkpoint(
    fitted: tuple[str, str], root: Path, tmp_path: Path, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With new objects each time; every number is finite, and a training says that it learns nothing."""
    name, checkpoint = fitted
    run, model = engine(tmp_path), build(name)
    if step in EXPORTS:
        exported = run.export(model, ExportType(step), export_root=tmp_path, ckpt_path=checkpoint)
        assert exported is not None
        assert Path(exported).stat().st_size > 0
        return
    results = getattr(run, step)(model=model, datamodule=data(root), ckpt_path=checkpoint)
    remedy = {"LAKE": "give it as extend", "SPG": "and learn_on"}[name]
    said = f"{name} has learned already in ckpt_path='{Path(checkpoint).resolve()}'"
    assert (said in caplog.text and remedy in caplog.text) == (step == "train")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point())
    if step == "predict":
        for batch in results:
            assert isinstance(batch, ImageBatch)
            assert batch.pred_score.isfinite().all()
            assert batch.anomaly_map.isfinite().all()
    elif step in {"test", "train"}:
        assert results[0]["image_AUROC"] >= 0


@pytest.mark.parametrize("k_shot", [1, 4])
def test_single_colours_are_named(k_shot: int, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They may be a mistake, but they are learned from; one alone, too."""
    caplog.set_level(logging.WARNING)
    model = build("LAKE", k_shot=k_shot)
    engine(tmp_path).fit(model=model, datamodule=data(root))
    assert f"{k_shot} normal images are of a single colour: " in caplog.text
    assert all(path in caplog.text for path in model.normal_images)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values() if tensor.is_floating_point())
    assert 0 < model.post_processor.image_threshold < 1
