# SPDX-License-Identifier: Apache-2.0

"""Name the image that stopped a run."""

from anomalib.data import AnomalibDataset, PredictDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image


class NameUnreadableImages(Callback):
    """When a run fails on an image that cannot be decoded, say which one.

    PIL's message about a truncated file does not name it. The search runs only after the failure.
    """

    def on_exception(  # noqa: PLR6301  # Lightning calls it on the instance
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        exception: BaseException,
    ) -> None:
        """Find the unreadable images of all datasets.

        Raises:
            ValueError: If images cannot be decoded; the message names them.
        """
        del pl_module
        if not isinstance(exception, OSError):
            return
        datamodule = getattr(trainer, "datamodule", None)
        subsets = [getattr(datamodule, f"{name}_data", None) for name in ("train", "val", "test")]
        subsets.append(getattr(trainer.train_dataloader, "dataset", None))  # LAKE may draw its images from a folder
        paths = {path for subset in subsets if subset is not None for path in _image_paths(subset)}
        broken = [str(path) for path in sorted(paths) if not _is_readable(path)]
        if broken:
            msg = f"Cannot read {len(broken)} of {len(paths)} images: {', '.join(broken[:5])}. Replace or remove them."
            raise ValueError(msg) from exception


def _image_paths(dataset: AnomalibDataset | PredictDataset) -> list[str]:
    if isinstance(dataset, PredictDataset):
        return [str(path) for path in dataset.image_filenames]
    return [str(path) for path in dataset.samples.image_path]


def _is_readable(path: str) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True
