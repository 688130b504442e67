# SPDX-License-Identifier: Apache-2.0

"""Images that would be read wrongly, or not at all: named before a run, or when one has stopped it."""
# ruff: noqa: PLR6301  # Lightning calls a callback's methods on the instance

import logging
import os
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anomalib.data import Folder
from anomalib.data.utils.image import IMG_EXTENSIONS
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageFile

logger = logging.getLogger(__name__)

SHOWN = 5  # files that a message names
LOOKED_AT = 1000  # files with other suffixes than those of images that are looked at


class CheckImages(Callback):
    """Look at the images of a run before it starts, and name those that stop it.

    anomalib reads images through PIL's conversion to RGB, which cuts every value above 255: an image of 16 bits becomes
    white, and a model would learn from white images. Before a run only the files' headers are read (0.7 seconds for
    10,000 files, measured). A file whose header is sound can still be damaged, and PIL does not name it then; which one
    it is, is searched after the failure, and only if it came from reading.

    Of a folder to predict, and of those of anomalib's ``Folder`` in training, what anomalib leaves out in silence is
    named, too: see :func:`check_left_out`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is learned from, what sets the threshold, and the validation images."""
        held_out = getattr(pl_module, "held_out", None)
        check_images([*datasets_of(trainer.train_dataloader), held_out, *datasets_of(trainer.val_dataloaders)])
        check_left_out(_folders_of(getattr(trainer, "datamodule", None)))

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
        datasets = datasets_of(trainer.predict_dataloaders)
        check_images(datasets)
        # PredictDataset does not keep the folder, only its images; a single one may have been given by name.
        several = [paths for data in datasets if len(paths := getattr(data, "image_filenames", ())) > 1]
        check_left_out(os.path.commonpath([Path(path).parent for path in paths]) for paths in several)

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


def check_left_out(folders: Iterable[str | Path]) -> None:
    """Warn of images in folders that anomalib does not find.

    It does not follow folders that are links, and takes files by their suffix. Of files with other suffixes the headers
    are read, of a thousand at most. A folder of 10,000 images takes 0.13 seconds, 10,000 other files 0.6 (measured).

    Args:
        folders (Iterable[str | Path]): Folders; one that does not exist is passed over.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (8, 8)).save(f"{folder}/part.gif")
        ...     check_left_out([folder])  # warns: 1 images are left out ...
    """
    links: list[str] = []
    others: list[str] = []
    for folder in folders:
        root = Path(folder).resolve()
        for place, inner, names in os.walk(folder):
            linked = [path for name in inner if (path := Path(place, name)).is_symlink()]
            # Images behind a link that leads back are found where they lie.
            links += [str(path) for path in linked if not path.resolve().is_relative_to(root)]
            others += [str(Path(place, name)) for name in names if not name.lower().endswith(IMG_EXTENSIONS)]
    unknown = [path for path in sorted(others)[:LOOKED_AT] if _is_image(path)]
    if links:
        logger.warning(
            "%d folders are links, which are not followed, so that images in them are left out: %s. Link the files "
            "instead, or give these folders themselves.",
            len(links),
            _shown(links),
        )
    if unknown:
        logger.warning(
            "%s%d images are left out, because their names do not end in one of %s: %s. Rename them to take them in.",
            "At least " if len(others) > LOOKED_AT else "",
            len(unknown),
            " ".join(IMG_EXTENSIONS),
            _shown(unknown),
        )


def _folders_of(datamodule: Any) -> list[Path]:  # noqa: ANN401  # any of anomalib's datamodules
    """Folders of images of anomalib's ``Folder``, also behind ``FewShot`` or ``AuxiliaryTarget``; none of others."""
    folder = getattr(datamodule, "target", datamodule)
    if not isinstance(folder, Folder) or folder.extensions:  # else others are left out on purpose
        return []
    given = (folder.normal_dir, folder.abnormal_dir, folder.normal_test_dir)
    several = [[each] if isinstance(each, str | Path) else each or [] for each in given]
    return sorted({Path(folder.root or "", name) for names in several for name in names})


def _is_image(path: str) -> bool:
    """Whether PIL knows a file for an image that it can decode; it knows some formats by their headers alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if Path(path).is_file():  # opening a pipe would wait for who writes to it
                with Image.open(path) as image:
                    return not isinstance(image, ImageFile.StubImageFile) and image.format != "MPEG"
    except Exception:  # noqa: BLE001  # PIL's decoders raise what they like
        return False
    return False


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
