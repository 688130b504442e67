# SPDX-License-Identifier: Apache-2.0

"""The answer of ``anomalib predict`` as a table: which images are rejected, and where."""

import logging
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import ExifTags, Image

from .files import atomic_write
from .regions import defects_of

logger = logging.getLogger(__name__)

FILE = "predictions.csv"


def numbered(name: str, number: int) -> str:
    """Name what the predictions of a number leave in a results folder.

    Args:
        name (str): Name of the file or folder that the first predictions leave.
        number (int): Number of the predictions, from 1.

    Returns:
        str: Name.

    Example:
        >>> numbered("predictions.csv", 1), numbered("predictions.csv", 2)
        ('predictions.csv', 'predictions_2.csv')
    """
    path = Path(name)
    return name if number == 1 else f"{path.stem}_{number}{path.suffix}"


def next_number(folder: Path) -> int:
    """Number of the predictions whose table would be the next in a results folder.

    Args:
        folder (Path): Results folder.

    Returns:
        int: Number, from 1.

    Example:
        >>> next_number(Path("a folder without predictions"))
        1
    """
    return next(number for number in count(1) if not (folder / numbered(FILE, number)).exists())


class DecisionTable(Callback):
    """After predictions, write ``predictions.csv`` to the results folder, and say how many images are rejected.

    A row for each image: its path, shown score and threshold, ``rejected`` or ``accepted``, the share of it that is
    outlined, and the defects, the largest first, divided by ``;``: their boxes as ``left top right bottom`` in pixels
    of the image file, how many pixels they have, and their highest score. Contours: :func:`.regions.defects`. Pixels
    count as they are stored, which is how anomalib reads them: a rotation that EXIF asks for is not applied, so that a
    part may lie otherwise than viewers show it, and a warning names such images. Where a score is not finite, the
    decision is ``rejected`` and the score empty. An earlier table is kept: the next one is called
    ``predictions_2.csv``. Where something stops the predictions, such as an image that cannot be read, the decisions on
    the images before it are written.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del trainer, pl_module
        self._rows = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: ImageBatch,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the images of a batch."""
        del trainer, batch, batch_idx, dataloader_idx
        if outputs.pred_score is None or outputs.pred_label is None or not outputs.image_path:
            return
        post_processor: Any = pl_module.post_processor
        threshold = float(post_processor.normalized_image_threshold)
        for index, path in enumerate(outputs.image_path):
            score = float(outputs.pred_score[index])
            mask = None if outputs.pred_mask is None else outputs.pred_mask[index]
            found = defects_of(outputs, index)
            self._rows.append({
                "image": str(path),
                "score": round(score, 6) if np.isfinite(score) else None,
                "threshold": round(threshold, 6),
                "decision": "rejected" if bool(outputs.pred_label[index]) else "accepted",
                "outlined": 0.0 if mask is None else round(float(mask.float().mean()), 6),
                "boxes": "; ".join(" ".join(map(str, defect.box)) for defect in found),
                "box_pixels": "; ".join(str(defect.area) for defect in found),
                "box_scores": "; ".join(f"{defect.score:.3f}" for defect in found),
            })

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is decided already, if something has stopped the predictions."""
        del exception
        if trainer.predicting and trainer.world_size == 1 and self._rows:
            logger.warning("Predictions were stopped after %d images, whose decisions are kept.", len(self._rows))
            self.on_predict_end(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        del pl_module
        rows, self._rows = self._rows, []
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, rows)
            rows = [row for share in shares for row in share]
        if not rows or not trainer.is_global_zero:
            return
        table = pd.DataFrame(rows).drop_duplicates("image", keep="first")  # processes may share images unevenly
        folder = Path(trainer.default_root_dir)
        path = folder / numbered(FILE, next_number(folder))
        try:
            with atomic_write(path) as temporary:
                table.to_csv(temporary, index=False, errors="backslashreplace")  # names of files may be no valid UTF-8
        except OSError as exception:
            msg = f"Could not write the decisions to '{path}': {exception.strerror or exception}. Make room."
            raise OSError(msg) from exception
        rejected = int((table.decision == "rejected").sum())
        logger.info("%d of %d images rejected. Decisions: %s", rejected, len(table), path)
        turned = table[[_is_turned(path) for path in table.image]]
        if len(turned):
            refused = int((turned.decision == "rejected").sum())
            logger.warning(
                "Viewers turn %d images as EXIF asks for, anomalib does not: the model sees them as they are stored, "
                "on their side for instance%s. Boxes are in pixels as stored, which is not where viewers show them: "
                "%s. Save images upright to avoid that.",
                len(turned),
                f", which may be why {refused} of them are rejected" if refused else "",
                ", ".join(turned.sort_values("decision", ascending=False, kind="stable").image[:5]),
            )
        broken = table.image[table.score.isna()].tolist()
        if broken:
            logger.warning(
                "%d images are rejected because their score is not a finite number: %s. Train the model again, or "
                "check its weights.",
                len(broken),
                ", ".join(broken[:5]),
            )


def _is_turned(path: str) -> bool:
    """Whether EXIF asks viewers to turn or mirror an image, if that is known without decoding it."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG" and "exif" not in image.info:  # PIL would look behind the pixels, too
                return False
            return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # noqa: BLE001  # it may be gone by now, and PIL's decoders raise what they like
        return False
