# SPDX-License-Identifier: Apache-2.0

"""The calls that Anomalib Studio makes of a model, one after the other, on a folder of good parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils import ValSplitMode
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from anomalib.models import AnomalibModule, get_model
from lightning.pytorch.callbacks import Callback, EarlyStopping
from skimage.data import brick
from skimage.io import imsave

from tests.helpers import TINY

pytestmark = pytest.mark.slow

# Studio leaves all of it at its defaults; a large backbone with random weights would take minutes.
SMALL: dict[str, Any] = {"backbone": TINY, "pre_trained": False, "image_size": 64}
OPTIONS: dict[str, dict[str, Any]] = {
    "lake": SMALL,
    "spg": {**SMALL, "layers": [3], "views": 1, "num_atoms": 64, "k": 8, "sae_epochs": 1, "guide_epochs": 2},
}


class Progress(Callback):
    """Counts batches and epochs, as Studio's progress bar does."""

    def __init__(self) -> None:
        self.batches = self.epochs = 0

    def on_train_batch_end(self, *_: Any) -> None:
        """Count a batch."""
        self.batches += 1

    def on_train_epoch_end(self, *_: Any) -> None:
        """Count an epoch."""
        self.epochs += 1


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve crops of a photograph."""
    folder = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    for number in range(12):
        row, column = rng.integers(0, 512 - 96, 2)
        imsave(folder / f"{number:02}.png", brick()[row : row + 96, column : column + 96], check_contrast=False)
    return folder


Trained = tuple[str, AnomalibModule, Path, Path, Engine]


def create(name: str) -> AnomalibModule:
    """A model as Studio makes it."""
    evaluator = Evaluator(val_metrics=[AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_")])
    return get_model(name, evaluator=evaluator, **OPTIONS[name])


@pytest.fixture(scope="module", params=list(OPTIONS))
def trained(request: pytest.FixtureRequest, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model, fitted, and its checkpoint."""
    torch.manual_seed(0)
    model, progress = create(request.param), Progress()
    datamodule = Folder(
        "parts", normal_dir=parts, val_split_mode=ValSplitMode.SYNTHETIC, train_batch_size=4, eval_batch_size=4
    )
    datamodule.num_workers = 0
    folder = tmp_path_factory.mktemp(request.param)
    stopping = EarlyStopping(monitor="pixel_AUROC", mode="max", patience=5)
    engine = Engine(
        default_root_dir=folder, max_epochs=200, devices=1, callbacks=[progress, stopping], accelerator="cpu"
    )
    engine.fit(model, datamodule=datamodule)
    assert progress.epochs == 1
    assert progress.batches > 0
    return request.param, model, Path(engine.best_model_path), folder, engine


def decide(path: Path, parts: Path) -> list[float]:
    """Scores of some parts by anomalib's inferencer."""
    inferencer = OpenVINOInferencer(path, config={"INFERENCE_PRECISION_HINT": "f32"})
    results = [inferencer.predict(part) for part in sorted(parts.iterdir())[:6]]
    return [float(result.pred_score.squeeze()) for result in results]


@pytest.fixture(scope="module")
def expected(trained: Trained, parts: Path) -> list[float]:
    """Scores by the file of the object that was fitted."""
    _, model, _, folder, engine = trained
    return decide(Path(engine.export(model, ExportType.OPENVINO, export_root=folder / "fitted")), parts)


def bare(parts: Path) -> Folder:
    """A datamodule of good parts and nothing else."""
    datamodule = Folder("parts", normal_dir=parts)
    datamodule.num_workers = 0
    return datamodule


@pytest.mark.parametrize(
    ("compression", "datamodule", "within"),
    [
        (None, None, 1e-6),
        (CompressionType.FP16, None, 0.02),
        (CompressionType.INT8, None, 0.2),
        (CompressionType.INT8_PTQ, bare, 0.3),
    ],
    ids=["none", "fp16", "int8", "int8_ptq"],
)
def test_exports_in_another_process(
    trained: Trained,
    expected: list[float],
    compression: CompressionType | None,
    datamodule: Callable[[Path], Folder] | None,
    within: float,
    parts: Path,
    tmp_path: Path,
) -> None:
    """A new object with other metrics takes the checkpoint, and each export tells the parts apart as the first does."""
    name, _, checkpoint, _, _ = trained
    path = Engine(default_root_dir=tmp_path, accelerator="cpu").export(
        get_model(name, **OPTIONS[name]),
        ExportType.OPENVINO,
        export_root=tmp_path,
        compression_type=compression,
        ckpt_path=checkpoint,
        datamodule=None if datamodule is None else datamodule(parts),
    )
    scores = decide(Path(path), parts)
    assert scores == pytest.approx(expected, abs=within)
    assert len(set(scores)) == len(scores)
