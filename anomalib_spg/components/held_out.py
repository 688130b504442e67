# SPDX-License-Identifier: Apache-2.0

"""Good images that a model does not learn from: what they score tells where good parts end."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from anomalib.data import AnomalibDataset, PredictDataset
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Transform
from tqdm import tqdm

logger = logging.getLogger(__name__)

ENOUGH = 24  # good images that guarantee the default false-alarm rate of 8 %, see good_part_threshold
MOST = 100  # more held-out images hardly move a threshold, and each costs a pass through the backbone


def good_validation_images(datamodule: LightningDataModule) -> int:
    """Count the good images of a datamodule's validation set, which set the threshold as well.

    Args:
        datamodule (LightningDataModule): Datamodule after its set-up.

    Returns:
        int: Number of images labelled normal.
    """
    samples = getattr(getattr(datamodule, "val_data", None), "samples", None)
    return 0 if samples is None or "label_index" not in samples else int((samples.label_index == 0).sum())


def validated_and_tested(datamodule: LightningDataModule | None) -> int:
    """Count the images of a datamodule that are in its validation set and in its test set.

    Args:
        datamodule (LightningDataModule | None): Datamodule after its set-up.

    Returns:
        int: Number of files.
    """
    sets = (getattr(datamodule, f"{name}_data", None) for name in ("val", "test"))
    validated, tested = (set(getattr(images, "samples", {}).get("image_path", ())) for images in sets)
    return len(validated & tested)


def choose(indices: list[int], count: int) -> list[int]:
    """Choose some of several images by the seed (``torch.initial_seed``), whatever else was drawn before.

    Args:
        indices (list[int]): Indices of images.
        count (int): How many to choose; all if there are fewer.

    Returns:
        list[int]: Chosen indices, rising.

    Example:
        >>> len(choose(list(range(10)), 3)), choose([4, 5], 3)
        (3, [4, 5])
    """
    generator = torch.Generator().manual_seed(torch.initial_seed() + 1)  # + 1: not the order LAKE's images come in
    return sorted(indices[index] for index in torch.randperm(len(indices), generator=generator)[:count].tolist())


def batches(
    dataset: AnomalibDataset | PredictDataset,
    transform: Transform | None,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[torch.Tensor]:
    """Read images one by one, transform them as for a test, and batch them.

    Args:
        dataset (AnomalibDataset | PredictDataset): Images of any size.
        transform (Transform | None): The model's pre-processing, which brings them to one size.
        batch_size (int): Images per batch.
        num_workers (int): Processes that read images.
        device (torch.device | str): Where the batches go.

    Yields:
        torch.Tensor: Images ``(B, 3, H, W)``; a batch ends early where the size changes.
    """
    items: Any = DataLoader(dataset, batch_size=None, num_workers=num_workers)
    waiting: list[torch.Tensor] = []
    for item in tqdm(items, desc="good parts that set the threshold", unit="image"):
        image = item.image[None].to(device)
        image = transform(image) if transform is not None else image
        if waiting and (len(waiting) == batch_size or waiting[0].shape != image.shape):
            yield torch.cat(waiting)
            waiting = []
        waiting.append(image)
    if waiting:
        yield torch.cat(waiting)
