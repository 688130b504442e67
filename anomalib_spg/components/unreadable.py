# SPDX-License-Identifier: Apache-2.0

"""Images that would be read wrongly, or not at all: named before a run, or when one has stopped it."""
# ruff: noqa: PLR6301  # Lightning calls a callback's methods on the instance

import logging
import traceback
import warnings
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

logger = logging.getLogger(__name__)

SHOWN = 5  # files that a message names


class CheckImages(Callback):
    """Look at the images of a run before it starts, and name those that stop it.

    anomalib reads images through PIL's conversion to RGB, which cuts every value above 255: an image of 16 bits becomes
    white, and a model would learn from white images. Before a run only the files' headers are read (0.7 seconds for
    10,000 files, measured). A file whose header is sound can still be damaged, and PIL does not name it then; which one
    it is, is searched after the failure, and only if it came from reading.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is learned from, what sets the threshold, and the validation images."""
        held_out = getattr(pl_module, "held_out", None)
        check_images([*datasets_of(trainer.train_dataloader), held_out, *datasets_of(trainer.val_dataloaders)])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the images of a validation of its own; those of a training are checked at its start."""
        del pl_module
        if trainer.state.fn == "validate":
            check_images(datasets_of(trainer.val_dataloaders))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the test images."""
        del pl_module
        check_images(datasets_of(trainer.test_dataloaders))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the images that are predicted."""
        del pl_module
        check_images(datasets_of(trainer.predict_dataloaders))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Find the images that cannot be decoded, if reading one has failed.

        Raises:
            ValueError: If there are any; the message names them.
        """
        # Of a worker process only the text of its traceback arrives.
        if not any(name in "".join(traceback.format_exception(exception)) for name in ("read_image", "read_mask")):
            return
        loaders = (trainer.train_dataloader, trainer.val_dataloaders, trainer.test_dataloaders)
        datasets = [data for loader in (*loaders, trainer.predict_dataloaders) for data in datasets_of(loader)]
        masks = _paths([*datasets, getattr(pl_module, "held_out", None)])
        paths = [path for path in [*masks, *masks.values()] if path]
        logger.info("An image cannot be read; looking for it among %d files.", len(paths))
        broken = [path for path in paths if not _is_readable(path)]
        if broken:
            msg = f"Cannot read {len(broken)} of {len(paths)} files: {_shown(broken)}. Replace or remove them."
            raise ValueError(msg) from exception


def check_images(datasets: Iterable[Any]) -> None:
    """Read the headers of the images and masks of some datasets.

    A file with several pages, of which anomalib reads the first only, colours of 16 bits, of which PIL reads the higher
    8, an image too large for PIL's liking, and a mask of another size than its image cost a warning.

    Args:
        datasets (Iterable[Any]): anomalib's datasets; of others nothing is known, and nothing is checked.

    Raises:
        ValueError: If a file is no image, or one with more than 8 bits a channel in a mode that PIL would cut off. The
            message names the first.

    Example:
        >>> import tempfile
        >>> from anomalib.data import PredictDataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("I;16", (8, 8), 4095).save(f"{folder}/part.png")
        ...     check_images([PredictDataset(folder)])
        Traceback (most recent call last):
        ValueError: Image '...part.png' has mode I;16...
    """
    pages, deep, large, resized = [], [], [], []
    for path, mask_path in _paths(datasets).items():
        size, mode, has_several_pages, is_deep = _header(path)
        if mode in {"I", "F"} or mode.startswith("I;16"):
            msg = (
                f"Image '{path}' has mode {mode}, more than 8 bits a pixel. anomalib would cut its values at 255. "
                "Convert all images alike, by the range of values your camera gives: "
                "Image.fromarray((np.asarray(image) / highest * 255).clip(0, 255).astype('uint8'))."
            )
            raise ValueError(msg)
        if has_several_pages:
            pages.append(path)
        if is_deep:
            deep.append(path)
        if size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or float("inf")):
            large.append(path)
        if mask_path and _header(mask_path)[0] != size:
            resized.append(f"{mask_path} ({path})")
    for found, text in (
        (pages, "have several pages or frames, and only the first is used"),
        (deep, "have 16 bits a channel, of which only the higher 8 are read: black, if the camera gives fewer bits"),
        (large, "have more pixels than PIL takes for harmless, and take long to read; make them smaller if you can"),
        (resized, "are masks of another size than their images, and are stretched to it"),
    ):
        if found:
            logger.warning("%d files %s: %s", len(found), text, _shown(found))


def _header(path: str) -> tuple[tuple[int, int], str, bool, bool]:
    """Size, mode, whether there are several pages or frames, and whether these are colours of 16 bits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it names no file
            image = Image.open(path)
        with image:
            # PIL has no mode for colours of 16 bits: only its decoder is told of them.
            is_deep = image.mode.startswith("RGB") and any(";16" in str(tile) for tile in getattr(image, "tile", ()))
            return image.size, image.mode, getattr(image, "n_frames", 1) > 1, is_deep
    except Exception as exception:  # PIL's decoders raise what they like
        reason = "it is no image" if isinstance(exception, Image.UnidentifiedImageError) else str(exception)
        msg = f"Cannot read image '{path}': {reason}. Replace or remove it."
        raise ValueError(msg) from exception


def datasets_of(loaders: Any) -> list[Any]:  # noqa: ANN401  # what the trainer holds
    """Find the datasets behind dataloaders of a trainer.

    Args:
        loaders (Any): None, one, or several dataloaders.

    Returns:
        list[Any]: The dataset of each; ``None`` where there is none.
    """
    return [
        getattr(loader, "dataset", None) for loader in (loaders if isinstance(loaders, list | tuple) else [loaders])
    ]


def _paths(datasets: Iterable[Any]) -> dict[str, str]:
    """The masks of the datasets' images, or an empty text, by the images' paths."""
    paths: dict[str, str] = {}
    for dataset in datasets:
        samples = getattr(dataset, "samples", None)
        if samples is not None:
            masks = samples.mask_path if "mask_path" in samples else [""] * len(samples)
            pairs = zip(samples.image_path, masks, strict=True)
            paths |= {str(path): mask if isinstance(mask, str) else "" for path, mask in pairs}
        else:
            paths |= {str(path): "" for path in getattr(dataset, "image_filenames", ())}
    return paths


def _is_readable(path: str) -> bool:
    try:
        with Image.open(path) as image:
            image.convert("RGB")
    except Exception:  # noqa: BLE001  # PIL's decoders raise what they like
        return False
    return True


def _shown(paths: list[str]) -> str:
    return ", ".join(paths[:SHOWN]) + (", ..." if len(paths) > SHOWN else "")
