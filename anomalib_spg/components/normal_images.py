# SPDX-License-Identifier: Apache-2.0

"""A few normal images: drawn with the seed, so that only they are ever decoded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from anomalib.data import AnomalibDataset, PredictDataset
from anomalib.data.utils import get_image_filenames

from .files import digest_of

AUTO = 32  # images that "auto" draws: measured, more hardly help


def draw_normal_images(
    dataset: AnomalibDataset,
    k_shot: int | Literal["auto"] | None,
    source: str | Path | None = None,
    transform: Callable | None = None,
    name: str = "the datamodule",
    seed: int | None = None,
) -> tuple[AnomalibDataset | PredictDataset, list[str]]:
    """Draw normal images from a training set, or from a folder.

    The draw depends on the seed and the number of images alone, not on what else was drawn before. So everything that
    draws from the same images with the same seed draws the same ones.

    Args:
        dataset (AnomalibDataset): Training set; images labelled anomalous are left aside.
        k_shot (int | Literal["auto"] | None): Number of images; ``"auto"`` for all, but at most 32; ``None`` for all.
        source (str | Path | None): Folder (or file) to draw from instead.
        transform (Callable | None): Transform for the images of that folder.
        name (str): What the training set is called in messages.
        seed (int | None): Seed of the draw. ``None`` is the process's, ``torch.initial_seed``. Defaults to ``None``.

    Returns:
        tuple[AnomalibDataset | PredictDataset, list[str]]: The dataset of the drawn images, and their paths.

    Raises:
        ValueError: If there are no images, or fewer than a number ``k_shot``; the message says how many there are.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for index in range(5):
        ...         Image.new("RGB", (8, 8)).save(f"{folder}/{index}.png")
        ...     drawn, paths = draw_normal_images(None, k_shot=2, source=folder)
        >>> len(drawn), len(paths)
        (2, 2)
    """
    if source is not None:
        place, remedy = f"folder '{source}'", "Check few_shot_source"
        try:
            paths = [str(path) for path in get_image_filenames(source)]
        except (FileNotFoundError, ValueError) as exception:
            msg = f"No normal images in {place}: {exception}. {remedy}."
            raise ValueError(msg) from exception
        normal = list(range(len(paths)))
    else:
        place, remedy = f"the training set of {name}", "Check the datamodule's root, category and folders"
        found = image_labels(dataset)
        paths = [path for path, _ in found]
        normal = [index for index, (_, label) in enumerate(found) if label != 1]
    if not normal:
        msg = f"There are no normal images in {place}. {remedy}."
        raise ValueError(msg)
    if k_shot == "auto":
        k_shot = min(AUTO, len(normal))
    if k_shot is not None and k_shot > len(normal):
        msg = (
            f"k_shot={k_shot} asks for more normal images than the {len(normal)} in {place}. Give more images, or "
            f"k_shot={len(normal)} (null for all there are)."
        )
        raise ValueError(msg)
    seed = torch.initial_seed() if seed is None else seed
    order = torch.randperm(len(normal), generator=torch.Generator().manual_seed(seed))
    drawn = sorted(normal[index] for index in order[: k_shot or len(normal)].tolist())
    if source is None:
        return dataset.subsample(drawn), [paths[index] for index in drawn]
    images = PredictDataset(source, transform=transform)
    images.image_filenames = [images.image_filenames[index] for index in drawn]
    return images, [paths[index] for index in drawn]


def copies(paths: Sequence[str]) -> dict[str, str]:
    """Find files that hold the same bytes as an earlier one.

    Args:
        paths (Sequence[str]): Files; those that do not exist are passed over.

    Returns:
        dict[str, str]: By each such file, the first one that it is a copy of.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = [Path(folder, name) for name in ("a.png", "b.png", "c.png")]
        ...     _ = [file.write_bytes(content) for file, content in zip(files, (b"1", b"2", b"1"), strict=True)]
        ...     {Path(copy).name: Path(first).name for copy, first in copies(files).items()}
        {'c.png': 'a.png'}
    """
    by_size: dict[int, list[str]] = {}
    for path in paths:
        if Path(path).is_file():
            by_size.setdefault(Path(path).stat().st_size, []).append(path)
    found: dict[str, str] = {}
    for of_size in (group for group in by_size.values() if len(group) > 1):
        first: dict[str, str] = {}
        for path in of_size:
            digest = digest_of(path)
            if first.setdefault(digest, path) != path:
                found[path] = first[digest]
    return found


def short_digest(path: str | Path) -> str:
    """Digest of a file's contents, by which an image is known again wherever it lies.

    Args:
        path (str | Path): File.

    Returns:
        str: 8 hexadecimal digits, which tell the images of a dataset apart; empty if there is no such file.
    """
    return digest_of(path)[:8] if Path(path).is_file() else ""


def image_labels(dataset: AnomalibDataset) -> list[tuple[str, int]]:
    """Paths and labels of a dataset's images.

    Args:
        dataset (AnomalibDataset): Dataset; images without a label count as normal.

    Returns:
        list[tuple[str, int]]: Path, and 1 for an image labelled anomalous, else another number.
    """
    paths = [str(path) for path in dataset.samples.image_path]
    labels = dataset.samples.label_index if "label_index" in dataset.samples else [0] * len(paths)
    return [(path, int(label)) for path, label in zip(paths, labels, strict=True)]
