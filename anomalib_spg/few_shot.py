# SPDX-License-Identifier: Apache-2.0

"""A few normal images of any dataset to learn from, the same ones for every model."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from anomalib.data import AnomalibDataModule

from .components.lightning import check_seed
from .components.normal_images import draw_normal_images
from .datamodule import build_datamodule, check_evaluated_images, evaluated_images, set_up
from .dataset_folders import check_category

logger = logging.getLogger(__name__)


class FewShot(AnomalibDataModule):
    """A few normal training images of another datamodule, drawn with a seed; all else is that datamodule's.

    With it every model of anomalib learns from the same ``k_shot`` images: those that LAKE draws itself from the same
    training set with the same ``k_shot`` and seed. LAKE then takes all there are (``k_shot: null``), WinCLIP the same
    number. Validation, test and prediction data, batch sizes, name and category are the datamodule's own.

    Args:
        target (str | AnomalibDataModule): Name of an image datamodule of anomalib, for instance ``"MVTecAD"``; or a
            datamodule, which a config gives as ``class_path`` and ``init_args``.
        target_args (dict[str, Any] | None): Its arguments, where ``target`` is a name.
        k_shot (int | None): Normal images to learn from, ``None`` for all. Defaults to 4 (ours).
        seed (int | None): Seed of the draw, and of the datamodule's random splits unless it has one. ``None`` takes
            the process's, which the benchmark sets to a job's ``seed``. Defaults to ``None``.

    Attributes:
        target (AnomalibDataModule): The datamodule.
        normal_images (list[str]): Paths of the images that were drawn.

    Raises:
        ValueError: If the datamodule is unknown, its arguments do not fit, its folder lacks the category while others
            are there, it has no training set, or there are fewer normal images than ``k_shot``.

    Example:
        >>> datamodule = FewShot("MVTecAD", {"root": "./datasets/MVTecAD", "category": "bottle"}, k_shot=4, seed=0)
        >>> datamodule.name, datamodule.category
        ('MVTecAD', 'bottle')

        On the command line: ``anomalib train --model Patchcore --data FewShot --data.target MVTecAD
        --data.target_args.category bottle --data.k_shot 4 --data.seed 0``.
    """

    def __init__(
        self,
        target: str | AnomalibDataModule,
        target_args: dict[str, Any] | None = None,
        k_shot: int | None = 4,
        seed: int | None = None,
    ) -> None:
        if k_shot is not None and k_shot < 1:
            msg = f"k_shot={k_shot} must be at least 1; leave it null to use every normal image."
            raise ValueError(msg)
        check_seed(seed)
        wrapped = _build(target, target_args)
        super().__init__(
            train_batch_size=wrapped.train_batch_size,
            eval_batch_size=wrapped.eval_batch_size,
            num_workers=wrapped.num_workers,
            train_augmentations=wrapped.train_augmentations,
            val_augmentations=wrapped.val_augmentations,
            test_augmentations=wrapped.test_augmentations,
            val_split_mode=wrapped.val_split_mode,
            val_split_ratio=wrapped.val_split_ratio,
            test_split_mode=wrapped.test_split_mode,
            test_split_ratio=wrapped.test_split_ratio,
            seed=seed,
        )
        self.target = wrapped
        self.category = wrapped.category
        self.k_shot = k_shot
        self.normal_images: list[str] = []

    @property
    def name(self) -> str:  # type: ignore[override]  # an attribute in Lightning, a property in anomalib
        """Name of the datamodule that is drawn from."""
        return self.target.name

    def prepare_data(self) -> None:
        """Download and prepare the dataset if it is missing.

        Raises:
            ValueError: If it is there, but lacks the category.
        """
        check_category(self.target)
        self.target.prepare_data()

    def _setup(self, stage: str | None = None) -> None:
        check_category(self.target)
        set_up(self.target, stage, self.seed)
        training_set = getattr(self.target, "train_data", None)
        if training_set is None:
            msg = f"Datamodule {self.name} has no training set to draw normal images from. Choose another target."
            raise ValueError(msg)
        seed = torch.initial_seed() if self.seed is None else self.seed
        self.train_data, self.normal_images = draw_normal_images(  # type: ignore[assignment]  # not from a folder
            training_set, self.k_shot, name=self.name, seed=seed
        )
        if hasattr(self.target, "val_data"):  # it may have none: val_split_mode="none"
            self.val_data = self.target.val_data
        self.test_data = evaluated_images(self.target)
        check_evaluated_images(self.test_data, self.name)
        logger.info(
            "FewShot: %d of the %d training images of %s %s, drawn with seed %d: %s",
            len(self.normal_images),
            len(training_set),
            self.name,
            self.category,
            seed,
            ", ".join(self.normal_images),
        )

    def _create_test_split(self) -> None:
        """Nothing to split: the target datamodule has done so."""

    def _create_val_split(self) -> None:
        """Nothing to split: the target datamodule has done so."""


def _build(target: str | AnomalibDataModule | Mapping[str, Any], arguments: Mapping[str, Any] | None) -> Any:  # noqa: ANN401
    """Build the datamodule; the benchmark, unlike the command line, leaves class_path and init_args as they are."""
    if isinstance(target, str):
        return build_datamodule(target, dict(arguments or {}))
    if arguments:
        msg = f"target_args={dict(arguments)} belong to a target given by its name; this one has arguments already."
        raise ValueError(msg)
    if isinstance(target, Mapping) and "class_path" in target:
        return build_datamodule(str(target["class_path"]).split(".")[-1], dict(target.get("init_args") or {}))
    if isinstance(target, AnomalibDataModule):
        return target
    msg = f"target={target!r} is neither the name of a datamodule nor a datamodule. Choose, for instance, 'MVTecAD'."
    raise ValueError(msg)
