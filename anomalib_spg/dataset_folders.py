# SPDX-License-Identifier: Apache-2.0

"""What a dataset's folder lacks, where anomalib would only fail or download: categories, masks of anomalous images."""

import sys
from collections.abc import Iterator
from pathlib import Path

from anomalib.data import BMAD, MPDD, VAD, AnomalibDataModule, AutoVI, BTech, MVTecAD, MVTecAD2, MVTecLOCO, Visa
from anomalib.data.utils.image import IMG_EXTENSIONS

_LIKE_MVTEC_AD = (MVTecAD, MPDD, VAD, Visa)  # anomalib pairs their anomalous images with masks by order alone


_BY_CATEGORY = (*_LIKE_MVTEC_AD, BMAD, AutoVI, BTech, MVTecAD2, MVTecLOCO)  # a folder for each category
_PARTS = ("train", "test", "test_public", "Data")  # folders of a category; the last is VisA's as it is distributed


def check_category(datamodule: AnomalibDataModule) -> None:
    """Refuse a category that a dataset's folder lacks while it has others: anomalib would download the whole dataset.

    Args:
        datamodule (AnomalibDataModule): Datamodule, not prepared yet.

    Raises:
        ValueError: If so; names the folder and the categories that are there.
    """
    if lacks_category(datamodule):
        folder, there = root_of(datamodule) / datamodule.category, ", ".join(categories_there(datamodule))
        msg = (
            f"{datamodule.name}: no folder '{folder}' with images; there are {there}. Correct the category or the root."
        )
        raise ValueError(msg)


def lacks_category(datamodule: AnomalibDataModule) -> bool:
    """Tell whether a dataset's folder has categories, but not the datamodule's.

    Args:
        datamodule (AnomalibDataModule): Datamodule, not prepared yet.

    Returns:
        bool: Whether it is so; never for AutoVI's categories, which anomalib downloads one by one.
    """
    own_download = getattr(sys.modules[type(datamodule).__module__], "DOWNLOAD_URLS", ())
    places = _places(datamodule)
    if datamodule.category in own_download or any(_holds_images(place / datamodule.category) for place in places):
        return False
    return bool(categories_there(datamodule))


def categories_there(datamodule: AnomalibDataModule) -> list[str]:
    """List the categories in a dataset's folder.

    Args:
        datamodule (AnomalibDataModule): Datamodule, not prepared yet.

    Returns:
        list[str]: Names of folders that hold images; none where the dataset is not laid out so, or not there.
    """
    places = [place for place in _places(datamodule) if place.is_dir()]
    return sorted({folder.name for place in places for folder in place.iterdir() if _holds_images(folder)})


def root_of(datamodule: AnomalibDataModule) -> Path:
    """Tell where a dataset lies that has a folder for each category.

    Args:
        datamodule (AnomalibDataModule): Datamodule of such a dataset.

    Returns:
        Path: Its argument ``root``.
    """
    return _places(datamodule)[-1]


def _places(datamodule: AnomalibDataModule) -> list[Path]:
    """Folders that hold a folder for each category: for VisA anomalib's converted copy, and what it is made of."""
    if not isinstance(datamodule, _BY_CATEGORY):
        return []
    return [datamodule.split_root, datamodule.root] if isinstance(datamodule, Visa) else [Path(datamodule.root)]


def _holds_images(folder: Path) -> bool:
    return any(path.is_file() for part in _PARTS for path in folder.glob(f"{part}/**/*"))


def unmatched_masks(datamodule: AnomalibDataModule) -> str:
    """Say which masks or anomalous images are missing, for datasets in the layout of MVTec AD.

    Args:
        datamodule (AnomalibDataModule): Datamodule that could not be set up.

    Returns:
        str: A message with dataset, category, counts and the first file; empty if nothing is missing, or the dataset
            has another layout.
    """
    if not isinstance(datamodule, _LIKE_MVTEC_AD):
        return ""
    test, truth = (_places(datamodule)[0] / datamodule.category / name for name in ("test", "ground_truth"))
    images, masks = ({_key(path): path for path in _anomalous(folder)} for folder in (test, truth))
    without, alone = ([path for key, path in a.items() if key not in b] for a, b in ((images, masks), (masks, images)))
    if len(images) == len(masks):
        return ""
    counts = f"{datamodule.name} {datamodule.category}: {len(masks) or 'no'} masks in '{truth}' for "
    counts += f"{len(images) or 'no'} anomalous images in '{test}'"
    if len(images) > len(masks):
        return (
            f"{counts}, the first image without one is '{without[0]}'. Add the masks, each as "
            f"<name of the image>_mask.png, leave such images out, or read the dataset as Folder, which tests without "
            "masks, too."
        )
    return f"{counts}, the first mask without an image is '{alone[0]}'. Add the images, or remove the masks."


def _anomalous(folder: Path) -> Iterator[Path]:
    found = (
        path for path in folder.glob("*/*") if path.suffix.lower() in IMG_EXTENSIONS and path.parent.name != "good"
    )
    yield from sorted(found)


def _key(path: Path) -> tuple[str, str]:
    """What an image and its mask have in common: the kind of defect and the name."""
    return path.parent.name, path.stem.removesuffix("_mask")
