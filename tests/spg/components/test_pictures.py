# SPDX-License-Identifier: Apache-2.0

"""Folders of pictures, and pictures in local stores of TensorBoard, MLflow and W&B, the latter two where installed."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.loggers import AnomalibMLFlowLogger, AnomalibTensorBoardLogger, AnomalibWandbLogger
from anomalib.loggers.base import ImageLoggerBase
from anomalib.visualization import ImageVisualizer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from anomalib_lake import LAKE, ExplanationVisualizer
from anomalib_spg.components import pictures
from tests.helpers import TINY, data, engine


@pytest.fixture(scope="module")
def fitted(mvtec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint."""
    run = engine(tmp_path_factory.mktemp("fitted"))
    run.fit(model=build(visualizer=True), datamodule=data(mvtec))
    return Path(run.best_model_path)


def build(**arguments: Any) -> LAKE:
    """A small model with random weights."""
    small = {"backbone": TINY, "pre_trained": False, "image_size": 64, "k_shot": 2, "num_neurons": 20, "seed": 0}
    return LAKE(**{**small, "visualizer": ExplanationVisualizer(explain="all"), **arguments})


def in_tensorboard(folder: Path) -> dict[str, tuple[int, int]]:
    """Names and sizes of the pictures in event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # slow

    found = {}
    for path in folder.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(path), size_guidance={"images": 0})
        events.Reload()
        for tag in events.Tags()["images"]:
            picture = events.Images(tag)[0]
            found[tag] = (picture.width, picture.height)
    return found


def in_mlflow(folder: Path) -> dict[str, tuple[int, int]]:
    """Names and sizes of the pictures among the artifacts of the one run in a store."""
    found = {}
    for path in folder.rglob("*.png"):
        found[path.as_posix().rpartition("/artifacts/")[2]] = Image.open(path).size
    return found


@pytest.mark.parametrize("store", ["tensorboard", "mlflow"])
def test_pictures_of_a_test(
    store: str, fitted: Path, mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """anomalib's picture of each rejected or defective image, and the explanation of each that is explained."""
    pytest.importorskip(store)
    monkeypatch.chdir(tmp_path)
    if store == "tensorboard":
        image_logger: Any = AnomalibTensorBoardLogger(str(tmp_path / "store"))
    else:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks for a database otherwise
        image_logger = AnomalibMLFlowLogger(tracking_uri=f"file:{tmp_path / 'store'}")
    run = engine(tmp_path / "results", logger=image_logger)
    run.test(build(), datamodule=data(mvtec), ckpt_path=str(fitted))
    found = (in_tensorboard if store == "tensorboard" else in_mlflow)(tmp_path / "store")
    shown = {name.removeprefix("images/") for name in found if name.startswith("images/")}
    assert {f"hole/{number:03}.png" for number in range(4)} <= shown  # defective, whether found or not
    explained = {name.removeprefix("explanations/") for name in found if name.startswith("explanations/")}
    assert explained == {f"{kind}/{number:03}.png" for kind in ("good", "hole") for number in range(4)}
    assert all(width > 250 and height > 250 for width, height in found.values())


def test_one_picture_of_a_prediction(
    fitted: Path, mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B, offline: anomalib's logger keeps a single picture to itself, and writes none during predictions."""
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    image_logger = AnomalibWandbLogger(save_dir=str(tmp_path), offline=True, project="parts")
    model = build(visualizer=ExplanationVisualizer(explain="all"))
    path = next((mvtec / "brick/test/hole").iterdir())
    found = engine(tmp_path / "results", logger=image_logger).predict(model, data_path=path, ckpt_path=str(fitted))
    image_logger.experiment.finish()
    pictures_there = list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))
    assert len(pictures_there) == 1 + bool(found[0].pred_label)  # the explanation, and the heatmap of a rejected image


class Recorder(ImageLoggerBase, CSVLogger):
    """Remembers names."""

    names: tuple[str, ...] = ()

    def add_image(self, image: np.ndarray, name: str | None = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Take note of a picture."""
        assert image.dtype == np.uint8
        self.names += (name,)


def test_not_more_than_a_dashboard_holds(
    fitted: Path, mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of them; none of images that are good and accepted; names are safe everywhere."""
    monkeypatch.setattr(pictures, "MOST", 2)
    recorder = Recorder(tmp_path)
    engine(tmp_path, logger=recorder).test(
        build(visualizer=True, false_alarm_rate=0.01), datamodule=data(mvtec), ckpt_path=str(fitted)
    )
    assert len(recorder.names) == 2
    recorder.names = ()
    engine(tmp_path, logger=recorder).test(build(visualizer=False), datamodule=data(mvtec), ckpt_path=str(fitted))
    assert recorder.names == ()


class Small(ImageVisualizer):
    """A user's own."""

    def __init__(self) -> None:
        super().__init__(field_size=(64, 64))


@pytest.mark.parametrize("visualizer", [True, Small(), ExplanationVisualizer()], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("one_object", [True, False])
def test_pictures_of_earlier_predictions_stay(
    visualizer: ImageVisualizer | bool, one_object: bool, fitted: Path, mvtec: Path, tmp_path: Path
) -> None:
    """Those of later ones have the number of their table, for an object that has predicted before, and a new one."""
    given = [mvtec / "brick/test/hole" / f"{number:03}.png" for number in range(3)]
    folders = ("images", "images_of_predictions_2", "images_of_predictions_3")
    model = build(visualizer=visualizer)
    for path in given:
        engine(tmp_path).predict(model, data_path=path, ckpt_path=str(fitted))
        model = model if one_object else build(visualizer=visualizer)
    results = next(tmp_path.rglob("predictions_3.csv")).parent
    for folder, path in zip(folders, given, strict=True):
        assert [found.name for found in (results / folder).rglob("*.*")] == [path.name]
    assert given[1].as_posix() in (results / "predictions_2.csv").read_text()


def test_pictures_of_tests_and_of_an_own_folder(fitted: Path, mvtec: Path, tmp_path: Path) -> None:
    """A test between predictions writes to images/, as ever; a folder that the visualizer is given is its own."""
    model = build(visualizer=True)
    engine(tmp_path).predict(model, datamodule=data(mvtec), ckpt_path=str(fitted))
    results = next(tmp_path.rglob("predictions.csv")).parent
    for _ in range(2):
        shutil.rmtree(results / "images")
        engine(tmp_path).test(model, datamodule=data(mvtec), ckpt_path=str(fitted))
        assert len(list((results / "images").rglob("*.png"))) == 8
    assert not list(results.glob("images_of_predictions*"))
    engine(tmp_path).predict(model, datamodule=data(mvtec), ckpt_path=str(fitted))
    assert len(list((results / "images_of_predictions_2").rglob("*.png"))) == 8
    model = build(visualizer=ImageVisualizer(output_dir=tmp_path / "own"))
    engine(tmp_path).predict(model, datamodule=data(mvtec), ckpt_path=str(fitted))
    assert len(list((tmp_path / "own").rglob("*.png"))) == 8
    assert not (results / "images_of_predictions_3").exists()


def test_an_interrupted_prediction_leaves_the_visualizer_as_it_was(
    fitted: Path, mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one, which may write elsewhere, is not bound to its folder."""
    model = build(visualizer=True)
    monkeypatch.setattr(LAKE, "predict_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine(tmp_path).predict(model, data_path=mvtec / "brick/test/hole/000.png", ckpt_path=str(fitted))
    assert model.visualizer.output_dir is None
