# SPDX-License-Identifier: Apache-2.0

"""What a dataset's folder lacks, where anomalib would only fail: masks of anomalous images."""

from collections.abc import Iterator
from pathlib import Path

from anomalib.data import MPDD, VAD, AnomalibDataModule, MVTecAD, Visa
from anomalib.data.utils.image import IMG_EXTENSIONS

_LIKE_MVTEC_AD = (MVTecAD, MPDD, VAD, Visa)  # anomalib pairs their anomalous images with masks by order alone


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
    test, truth = (_root(datamodule) / datamodule.category / name for name in ("test", "ground_truth"))
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


def _root(datamodule: MVTecAD | MPDD | VAD | Visa) -> Path:
    """The folder that holds a folder for each category; anomalib reads VisA from a converted copy."""
    return datamodule.split_root if isinstance(datamodule, Visa) else datamodule.root


def _anomalous(folder: Path) -> Iterator[Path]:
    found = (
        path for path in folder.glob("*/*") if path.suffix.lower() in IMG_EXTENSIONS and path.parent.name != "good"
    )
    yield from sorted(found)


def _key(path: Path) -> tuple[str, str]:
    """What an image and its mask have in common: the kind of defect and the name."""
    return path.parent.name, path.stem.removesuffix("_mask")
