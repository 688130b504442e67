# SPDX-License-Identifier: Apache-2.0

"""Train on the labelled images of one dataset, validate and test on another."""

import logging
import random
from contextlib import nullcontext
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import anomalib.data
import numpy as np
import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset
from anomalib.data.utils import LabelName, TestSplitMode, ValSplitMode
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image

from .dataset_folders import categories_there, check_category, lacks_category, root_of, unmatched_masks

logger = logging.getLogger(__name__)

_OTHERS = tuple(f"anomalib.data.datamodules.{kind}" for kind in ("base", "depth", "video"))


class AuxiliaryTarget(AnomalibDataModule):
    """Labelled auxiliary data for training, and target data unseen in training for validation and testing.

    The training set is the auxiliary dataset's test split, which holds the anomalous images and their masks (as
    published). Validation and test set are those of the target datamodule, unchanged. Nothing is learned from the
    target's good training images; where the validation set has few good ones, they help to set the threshold (ours).

    Args:
        auxiliary (str): Name of an image datamodule of anomalib, for instance ``"Visa"``.
        target (str): Name of an image datamodule of anomalib, for instance ``"MVTecAD"``.
        auxiliary_args (dict[str, Any] | None): Its arguments, for instance ``{"root": "./datasets/visa"}``.
        target_args (dict[str, Any] | None): Its arguments, ``category`` among them.
        auxiliary_categories (str | list[str]): One category, several, or ``"all"`` of the dataset. Ignored for
            datasets without categories. Defaults to ``"all"`` (paper).
        train_batch_size (int): Images per batch through the backbone; does not change what is learned. Defaults to 16.
        eval_batch_size (int): Batch size for validation and testing. Defaults to 16.
        num_workers (int): Worker processes that read images. Defaults to 8.
        seed (int | None): Seed of both datamodules' random splits, unless their arguments have one. ``None`` takes the
            process's. Defaults to ``None``.

    Attributes:
        good_data (AnomalibDataset): After the set-up, the target's training images.

    Raises:
        ValueError: If a datamodule is unknown, an anomalous auxiliary image has no mask or one of another size, all of
            their masks are empty, there is no normal or no anomalous auxiliary image, or a dataset's folder lacks a
            category while others are there.

    Example:
        >>> datamodule = AuxiliaryTarget(
        ...     auxiliary="Visa",
        ...     auxiliary_args={"root": "./datasets/visa"},
        ...     target="MVTecAD",
        ...     target_args={"root": "./datasets/MVTecAD", "category": "bottle"},
        ... )
        >>> datamodule.name, datamodule.category
        ('Visa_to_MVTecAD', 'bottle')
    """

    def __init__(
        self,
        auxiliary: str,
        target: str,
        auxiliary_args: dict[str, Any] | None = None,
        target_args: dict[str, Any] | None = None,
        auxiliary_categories: str | list[str] = "all",
        train_batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 8,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            val_split_mode=ValSplitMode.FROM_DIR,
            seed=seed,
        )
        self._name = f"{auxiliary}_to_{target}"
        self.target = build_datamodule(target, {"seed": seed, **(target_args or {})})
        self.category = self.target.category
        categories = [auxiliary_categories] if isinstance(auxiliary_categories, str) else auxiliary_categories
        if not categories:
            msg = "auxiliary_categories=[] names no category. Give one or several, or 'all'."
            raise ValueError(msg)
        self._is_all = categories == ["all"]
        accepted = signature(datamodule_class(auxiliary)).parameters
        arguments = {"seed": seed, **(auxiliary_args or {})}
        if "val_split_mode" in accepted:
            arguments["val_split_mode"] = ValSplitMode.SAME_AS_TEST  # their test set must stay whole
        if "test_split_mode" in accepted:
            arguments.setdefault("test_split_mode", TestSplitMode.FROM_DIR)  # RealIAD's default drops the good images
        if "category" not in accepted:
            self.auxiliary_categories: list[str] | None = None
            self.auxiliaries = [build_datamodule(auxiliary, arguments)]
        else:
            self.auxiliary_categories = _all_categories(auxiliary) if self._is_all else list(categories)
            self.auxiliaries = [
                build_datamodule(auxiliary, {**arguments, "category": category})
                for category in self.auxiliary_categories
            ]

    @property
    def name(self) -> str:  # type: ignore[override]  # an attribute in Lightning, a property in anomalib
        """Name of the datamodule: both datasets' names."""
        return self._name

    def prepare_data(self) -> None:
        """Download and prepare both datasets if they are missing.

        Raises:
            ValueError: If a dataset is there, but lacks a category.
        """
        self._check_categories()
        for datamodule in [*self.auxiliaries, self.target]:
            datamodule.prepare_data()

    def _check_categories(self) -> None:
        first = self.auxiliaries[0]
        lacking = [datamodule.category for datamodule in self.auxiliaries if lacks_category(datamodule)]
        if self._is_all and lacking:
            msg = (
                f"auxiliary_categories='all' are the {len(self.auxiliaries)} of {first.name}, but '{root_of(first)}' "
                f"lacks {', '.join(lacking)}. auxiliary_categories takes a list, too: "
                f"[{', '.join(categories_there(first))}]."
            )
            raise ValueError(msg)
        for datamodule in [*self.auxiliaries, self.target]:
            check_category(datamodule)

    def _setup(self, _stage: str | None = None) -> None:
        self._check_categories()
        for datamodule in [*self.auxiliaries, self.target]:
            set_up(datamodule, seed=self.seed)
        self.train_data = _concatenate([evaluated_images(datamodule) for datamodule in self.auxiliaries])
        _check(self.train_data)
        self.good_data = self.target.train_data
        if hasattr(self.target, "val_data"):  # a target may have none: val_split_mode="none"
            self.val_data = self.target.val_data
        self.test_data = evaluated_images(self.target)
        check_evaluated_images(self.test_data, self.target.name)

    def _create_test_split(self) -> None:
        """Nothing to split: the target datamodule has done so."""

    def _create_val_split(self) -> None:
        """Nothing to split: the target datamodule has done so."""


def datamodule_class(name: str) -> type[AnomalibDataModule]:
    """Find an image datamodule of anomalib, or of a plugin.

    Args:
        name (str): Its name in ``anomalib.data``.

    Returns:
        type[AnomalibDataModule]: The class.

    Raises:
        ValueError: If there is none; the message names those there are.
    """
    classes = {key: value for key, value in vars(anomalib.data).items() if isinstance(value, type)}
    known = {
        key: value
        for key, value in classes.items()
        if issubclass(value, AnomalibDataModule) and not value.__module__.startswith(_OTHERS)
    }
    if name not in known:
        msg = f"anomalib has no image datamodule '{name}'. Choose one of {', '.join(sorted(known))}."
        raise ValueError(msg)
    return known[name]


def build_datamodule(name: str, arguments: dict[str, Any]) -> AnomalibDataModule:
    """Build an image datamodule of anomalib.

    Args:
        name (str): Its name in ``anomalib.data``.
        arguments (dict[str, Any]): Its arguments.

    Returns:
        AnomalibDataModule: The datamodule, not set up yet.

    Raises:
        ValueError: If there is none of that name, or the arguments do not fit.
    """
    datamodule = datamodule_class(name)
    try:
        return datamodule(**arguments)
    except TypeError as exception:
        msg = f"Datamodule {name} cannot be built from {arguments}: {exception}"
        raise ValueError(msg) from exception


def set_up(datamodule: AnomalibDataModule, stage: str | None = None, seed: int | None = None) -> None:
    """Set up a datamodule, with splits that depend on a seed alone, and also with pandas 3.

    There a column of texts has a type of its own, which takes neither lists nor ``None`` and equals no member of an
    enumeration: anomalib 2.7 would find no image of AutoVI and fail on MVTec LOCO and MVTec AD 2.

    Args:
        datamodule (AnomalibDataModule): Datamodule.
        stage (str | None): Stage of the trainer.
        seed (int | None): Seed of its random splits and drawn anomalies where it has none. ``None`` is the process's,
            ``torch.initial_seed``, whatever else was drawn before.

    Raises:
        ValueError: If masks or anomalous images are missing; names the first.
    """
    has_texts = int(pd.__version__.partition(".")[0]) >= 3
    own = datamodule.seed
    datamodule.seed = next(each for each in (own, seed, torch.initial_seed()) if each is not None)
    with (
        isolate_rng(include_cuda=False),
        pd.option_context({"future.infer_string": False}) if has_texts else nullcontext(),
    ):
        # Drawn anomalies take no seed. The CPU's generator alone, as torch.manual_seed would start CUDA.
        torch.default_generator.manual_seed(datamodule.seed)
        np.random.seed(datamodule.seed % 2**32)  # noqa: NPY002  # anomalib draws from it
        random.seed(datamodule.seed)
        try:
            datamodule.setup(stage)
        except Exception as exception:  # pandas' own, in no words of images
            if not (msg := unmatched_masks(datamodule)):
                raise
            raise ValueError(msg) from exception
    datamodule.seed = own


def evaluated_images(datamodule: AnomalibDataModule) -> AnomalibDataset:
    """Tell what a datamodule tests on: MVTec AD 2 has several test sets, and keeps no good image in ``test_data``.

    Args:
        datamodule (AnomalibDataModule): Datamodule after its set-up.

    Returns:
        AnomalibDataset: The dataset of its dataloader.
    """
    loader: Any = datamodule.test_dataloader()
    return loader.dataset


def check_evaluated_images(dataset: AnomalibDataset, name: str) -> None:
    """Say what a test set cannot tell: without good images there is no AUROC, without masks no pixel metric.

    Args:
        dataset (AnomalibDataset): Test set.
        name (str): What the datamodule is called.
    """
    labels = set(dataset.samples.label_index)
    if labels == {LabelName.ABNORMAL}:
        logger.warning(
            "The test set of %s has no good image, so its image AUROC means nothing. Give the datamodule "
            "test_split_mode: from_dir, or add good images.",
            name,
        )
    elif labels == {LabelName.UNKNOWN}:
        logger.warning("The test set of %s has no labels: images can be scored, but there are no metrics.", name)
    if LabelName.ABNORMAL in labels and dataset.task == TaskType.CLASSIFICATION:
        logger.warning("The test set of %s has no masks: images are scored and rated, pixel metrics left out.", name)


def _all_categories(name: str) -> list[str]:
    """List a dataset's categories, which anomalib keeps in the module of the datamodule's dataset."""
    datasets = import_module(datamodule_class(name).__module__.replace(".datamodules.", ".datasets."))
    if not hasattr(datasets, "CATEGORIES"):
        msg = f"anomalib does not list the categories of {name}; name them in auxiliary_categories."
        raise ValueError(msg)
    return list(datasets.CATEGORIES)


def _concatenate(datasets: list[AnomalibDataset]) -> AnomalibDataset:
    whole = datasets[0]
    task = whole.samples.attrs["task"]
    samples = pd.concat([dataset.samples for dataset in datasets], ignore_index=True)
    whole.samples = samples
    whole.samples.attrs["task"] = task
    return whole


def _check(dataset: AnomalibDataset) -> None:
    """Refuse auxiliary data that cannot be learned from, before any pass through the backbone."""
    samples = dataset.samples
    for label, word in ((LabelName.NORMAL, "normal"), (LabelName.ABNORMAL, "anomalous")):
        if not (samples.label_index == label).any():
            msg = f"The auxiliary test set has no {word} image among its {len(samples)}; the guides need both kinds."
            raise ValueError(msg)
    anomalous = samples[samples.label_index == LabelName.ABNORMAL]
    found = anomalous.get("mask_path", pd.Series("", index=anomalous.index)).fillna("")
    masks = [mask if isinstance(mask, list) else [mask] for mask in found]  # MVTec LOCO has several for an image
    without = anomalous[[not all(mask and Path(mask).is_file() for mask in several) for several in masks]]
    if len(without) == len(anomalous):
        msg = (
            f"None of the {len(without)} anomalous auxiliary images has a mask, the first is "
            f"'{without.image_path.iloc[0]}'. The guides are learned from masks, so this dataset can be a target only."
        )
        raise ValueError(msg)
    if len(without):
        msg = (
            f"{len(without)} of {len(anomalous)} anomalous auxiliary images have no mask, the first is "
            f"'{without.image_path.iloc[0]}'. The guides are learned from masks: add them or leave the images out."
        )
        raise ValueError(msg)
    empty = []
    for image_path, several in zip(anomalous.image_path, masks, strict=True):
        if all([_is_empty(mask, image_path) for mask in several]):  # noqa: C419  # looks at every mask
            empty.append(several[0])
    if empty:
        counted = f"{len(empty)} of {len(anomalous)} masks of anomalous auxiliary images are empty (all black)"
        named = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        if len(empty) == len(anomalous):
            msg = f"{counted}: {named}. The guides are learned from what masks mark: white, or any value above 0."
            raise ValueError(msg)
        logger.warning("%s, so that the guides learn these defects as normal: %s", counted, named)


def _is_empty(mask_path: str, image_path: str) -> bool:
    """Refuse a mask that cannot be read or has not its image's size; tell whether it is all black."""
    try:
        with Image.open(image_path) as image, Image.open(mask_path) as mask:
            size, mask_size, is_empty = image.size, mask.size, mask.convert("L").getbbox() is None
    except Exception as exception:  # PIL's decoders raise what they like
        msg = f"Cannot read image '{image_path}' or its mask '{mask_path}': {exception}. Replace or remove them."
        raise ValueError(msg) from exception
    if size != mask_size:
        msg = (
            f"Mask '{mask_path}' is {mask_size[0]}x{mask_size[1]} pixels, its image '{image_path}' is "
            f"{size[0]}x{size[1]}. Masks must have the size of their images."
        )
        raise ValueError(msg)
    return is_empty
