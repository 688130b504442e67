# SPDX-License-Identifier: Apache-2.0

"""Where anomalib's pictures go: to a folder for each prediction, and to TensorBoard, MLflow and W&B.

anomalib 2.7 has each prediction overwrite the pictures of the one before, and gives its loggers none.
"""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data import ImageBatch
from anomalib.loggers.base import ImageLoggerBase
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback, LightningModule, Trainer

from .decisions import next_number, numbered

logger = logging.getLogger(__name__)

FOLDER = "images"  # anomalib's, in the results folder
PREDICTIONS = "images_of_predictions"  # from the second prediction on, with its number

MOST = 200  # pictures of a run: a dashboard of thousands is slow, and all of them are in the results folder


class KeepPictures(Callback):
    """Have the pictures of later predictions go to a folder of their own, so that those of earlier ones are kept.

    Tests and the first prediction write to anomalib's ``images/``, later predictions to the number of their table:
    ``images_of_predictions_2/`` beside ``predictions_2.csv``. A visualizer with an ``output_dir`` of its own keeps it.
    """

    def __init__(self) -> None:
        self._set: list[ImageVisualizer] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the folder."""
        del pl_module
        results = Path(trainer.default_root_dir)
        number = next_number(results) if trainer.predicting else 1
        folder = results / (FOLDER if number == 1 else numbered(PREDICTIONS, number))
        callbacks: Any = getattr(trainer, "callbacks", ())
        for visualizer in callbacks:
            if isinstance(visualizer, ImageVisualizer) and visualizer.output_dir is None:
                visualizer.output_dir = folder
                self._set.append(visualizer)

    on_predict_start = on_test_start

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the visualizer as it was: the next run has another folder."""
        del trainer, pl_module
        while self._set:
            self._set.pop().output_dir = None

    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the visualizer as it was."""
        del exception
        self.on_test_end(trainer, pl_module)


class LogPictures(Callback):
    """Give anomalib's pictures of rejected and of defective images to those of the loggers that take pictures.

    These are ``AnomalibTensorBoardLogger``, ``AnomalibMLFlowLogger``, ``AnomalibWandbLogger`` and
    ``AnomalibCometLogger``. Without one of them, or without a visualizer, nothing is drawn. Of several processes the
    first one logs its share.
    """

    def __init__(self) -> None:
        self._count = 0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        del trainer, pl_module
        self._count = 0

    on_predict_start = on_test_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's type has no batches of anomalib
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the pictures of a batch."""
        del pl_module, batch, batch_idx, dataloader_idx
        # The one that runs; that of the model may be another after a checkpoint is loaded.
        callbacks: Any = getattr(trainer, "callbacks", ())
        visualizer: Any = next((found for found in callbacks if isinstance(found, ImageVisualizer)), None)
        if visualizer is None or not _image_loggers(trainer) or not outputs.image_path:
            return
        for item in outputs:
            if not (_is_true(item.pred_label) or _is_true(item.gt_label)):
                continue
            self._count += 1
            picture = visualizer.visualize(item) if self._count <= MOST else None
            if picture is not None:
                log_picture(trainer, np.asarray(picture.convert("RGB")), Path(item.image_path), "images")

    on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the loggers write what they keep."""
        del pl_module
        for image_logger in _image_loggers(trainer):
            image_logger.save()
            kept = getattr(image_logger, "image_list", None)
            if kept:  # anomalib's logger of W&B keeps a single picture to itself
                image_logger.experiment.log({"Predictions": kept})
                image_logger.image_list = []
        if self._count > MOST and _image_loggers(trainer):
            logger.info("The loggers have the pictures of the first %d of %d images.", MOST, self._count)

    on_predict_end = on_test_end


def log_picture(trainer: Trainer, picture: np.ndarray, source: Path, kind: str) -> None:
    """Give a picture to the loggers that take pictures.

    Args:
        trainer (Trainer): Trainer with the loggers.
        picture (np.ndarray): Picture ``(H, W, 3)``, 8 bits.
        source (Path): Image it is of; its name and folder name the picture.
        kind (str): What the picture shows, the first part of its name.
    """
    name = "/".join(re.sub(r"[^A-Za-z0-9._-]", "_", part) for part in source.with_suffix("").parts[-2:])
    for image_logger in _image_loggers(trainer):
        image_logger.add_image(picture, f"{kind}/{name}.png", global_step=trainer.global_step)


def _image_loggers(trainer: Trainer) -> list[Any]:
    return [found for found in trainer.loggers if isinstance(found, ImageLoggerBase)]


def _is_true(label: Any) -> bool:  # noqa: ANN401  # a tensor, or none
    return label is not None and bool(label)
