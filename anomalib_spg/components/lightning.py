# SPDX-License-Identifier: Apache-2.0

"""What both Lightning models share."""

# ruff: noqa: PLR6301  # Lightning calls a callback's methods on the instance

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataset, Batch, PredictDataset
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT

from .backbone import DEFAULT_BACKBONE, default_image_size
from .checkpoint import NameCheckpoint, WarnOfFitted, check_identity
from .decisions import DecisionTable
from .evaluator import default_evaluator
from .export import ExactExports
from .held_out import batches
from .normal_images import image_labels
from .pictures import KeepPictures, LogPictures
from .post_processor import GoodPartsPostProcessor
from .pre_processor import default_pre_processor
from .precision import check_precision
from .threshold import WEAK_PRIOR, Prior, logit
from .unreadable import CheckImages, datasets_of

logger = logging.getLogger(__name__)


class FrozenBackboneMixin(ExactExports):
    """Mixin of an anomalib model whose ``model.backbone`` is a :class:`Backbone`; goes before ``AnomalibModule``.

    Attributes:
        default_backbone (str): timm name of the backbone the default pre-processor is made for.
        prior (Prior): How much the logits of good parts usually vary.
        own_epochs (tuple[str, ...]): Arguments that say how many epochs it learns, since the images are passed once.
        learns_on (str): What to do for it to learn on from what it has learned.
        held_out (AnomalibDataset | None): While it is fitted, good images it does not learn from.
        product (str | None): What the images show that it was fitted on, where their datamodule has a name.
        is_product_specific (bool): Whether it compares with good parts of that product, or has learned from them.
    """

    default_backbone: ClassVar[str] = DEFAULT_BACKBONE
    prior: ClassVar[Prior] = WEAK_PRIOR
    own_epochs: ClassVar[tuple[str, ...]] = ()
    learns_on: ClassVar[str] = ""

    held_out: AnomalibDataset | None = None
    product: str | None = None
    is_product_specific: bool = False
    _swapped: tuple[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Keep training images and datasets, which a fit that failed may have left, out of an exported model."""
        state: dict[str, Any] = super().__getstate__()
        return state | {name: None for name in ("examples", "held_out", "_swapped") if name in state}

    @staticmethod
    def resolve_image_size(image_size: int | Sequence[int] | None, backbone: str) -> tuple[int, int]:
        """Turn the argument ``image_size`` into height and width.

        Args:
            image_size (int | Sequence[int] | None): Side of a square, height and width, or ``None`` for the backbone's
                default.
            backbone (str): timm model name.

        Returns:
            tuple[int, int]: Height and width.

        Raises:
            ValueError: If it is neither one nor two positive numbers.

        Example:
            >>> FrozenBackboneMixin.resolve_image_size(224, "vit_tiny_patch16_224")
            (224, 224)
        """
        if image_size is None:
            return default_image_size(backbone)
        sizes = tuple(image_size) if isinstance(image_size, list | tuple) else (image_size, image_size)
        if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
            msg = f"image_size={image_size!r} must be a positive whole number of pixels, or height and width."
            raise ValueError(msg)
        return sizes[0], sizes[1]

    @classmethod
    def configure_pre_processor(
        cls,
        image_size: tuple[int, int] | None = None,
        backbone: str | None = None,
    ) -> PreProcessor:
        """Configure the default pre-processor: resize, and normalise with the backbone's own image statistics.

        Args:
            image_size (tuple[int, int] | None, optional): Size to resize to. Defaults to 448, or 518 for CLIP.
            backbone (str | None): timm model name. ``None`` is the model's default.

        Returns:
            PreProcessor: Configured pre-processor.

        Example:
            >>> from anomalib_spg import SPG
            >>> SPG.configure_pre_processor().transform.transforms[0].size
            [448, 448]
        """
        return default_pre_processor(backbone or cls.default_backbone, image_size)

    @classmethod
    def configure_post_processor(
        cls,
        false_alarm_rate: float | None = None,
        pixel_false_alarm_rate: float | None = None,
    ) -> PostProcessor:
        """Configure the default post-processor, whose thresholds come from good parts.

        Args:
            false_alarm_rate (float | None): See :class:`GoodPartsPostProcessor`.
            pixel_false_alarm_rate (float | None): See :class:`GoodPartsPostProcessor`.

        Returns:
            PostProcessor: Configured post-processor.
        """
        return GoodPartsPostProcessor(false_alarm_rate, pixel_false_alarm_rate, cls.prior)

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Configure the default evaluator: anomalib's metrics, average precision, AUPRO, false alarms and misses."""
        return default_evaluator()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add callbacks: decisions after predictions, pictures for loggers, and a look at the images before a run."""
        callbacks = super().configure_callbacks()
        return [
            *(callbacks if isinstance(callbacks, Sequence) else [callbacks]),
            DecisionTable(),
            KeepPictures(),
            LogPictures(),
            _RestoreTrainingSet(),
            _CheckProduct(),
            NameCheckpoint(),
            WarnOfFitted(self.learns_on),
            CheckImages(),  # the last, because it may raise another error when there was one
        ]

    @staticmethod
    def configure_optimizers() -> None:
        """Return no optimiser: learning uses stored tokens, after the pass over the images."""
        return

    def optimizer_step(  # type: ignore[override]  # Lightning calls it on the instance
        self, epoch: int, batch_idx: int, optimizer: object, optimizer_closure: Callable[[], object]
    ) -> None:
        """Run the training step only: without an optimiser, the gradient scaler of ``16-mixed`` would find nothing."""
        del epoch, batch_idx, optimizer
        optimizer_closure()

    def setup(self, stage: str) -> None:
        """Refuse what would go wrong in silence, before anything is computed.

        Args:
            stage (str): Stage of the trainer.

        Raises:
            ValueError: If the precision would round more than the backbone, or several processes have divided the
                images differently.
        """
        super().setup(stage)
        check_precision(str(self.trainer.precision))
        if stage == "fit":
            self.product = category_of(self.trainer)
            self._name_unused_epochs()
        if self.trainer.world_size > 1:
            self._check_images()
        if stage == "fit" and isinstance(self.trainer.strategy, DDPStrategy):
            # DistributedDataParallel refuses a module without trainable parameters, and a frozen backbone has none. So
            # one small parameter is declared trainable; :meth:`no_loss` gives it a gradient of zero.
            min(self.model.backbone.parameters(), key=torch.Tensor.numel).requires_grad_()

    def _name_unused_epochs(self) -> None:
        """Say where another number of epochs was asked for: anomalib replaces it before the trainer is made."""
        asked = asked_epochs(self.trainer)
        if asked is None or asked == self.trainer.max_epochs:
            return
        options = " and ".join(f"--model.{name}" for name in self.own_epochs)
        remedy = f"{options} say how many epochs it learns" if options else "It has no epochs, so leave max_epochs out"
        logger.warning(
            "max_epochs=%d does nothing: %s passes the training images once. %s.", asked, type(self).__name__, remedy
        )

    def _check_images(self) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        sets = [getattr(datamodule, f"{name}_data", None) for name in ("train", "val", "test")]
        samples = [getattr(images, "samples", {}) for images in sets]
        mine = [[Path(path).parts[-3:] for path in known.get("image_path", ())] for known in samples]
        everywhere: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(everywhere, mine)
        if any(other != mine for other in everywhere):
            msg = (
                f"The {self.trainer.world_size} processes have divided the images differently into those for training, "
                "validation and test, so that some would be learned from and tested. Give the datamodule a seed "
                "(--data.seed <n>), or use one process (--trainer.devices 1)."
            )
            raise ValueError(msg)

    def no_loss(self) -> torch.Tensor:
        """Zero, with a gradient of zero for what is declared trainable.

        Returns:
            torch.Tensor: What a training step returns to Lightning.
        """
        trained = [parameter.sum() for parameter in self.model.parameters() if parameter.requires_grad]
        return 0 * sum(trained, start=torch.tensor(0.0, requires_grad=True, device=self.device))

    def begin_fit(self) -> None:
        """Make every fit learn: the object may have been fitted before, or left in evaluation mode by an error."""
        self._is_fitted = torch.tensor([False], device=self.device)
        self.train()

    def swap_training_set(self, training_set: AnomalibDataset | PredictDataset) -> None:
        """Let the datamodule's training set be another one until the dataloader is made.

        Args:
            training_set (AnomalibDataset | PredictDataset): What to learn from.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        self._swapped = datamodule, datamodule.train_data
        datamodule.train_data = training_set

    def restore_training_set(self) -> None:
        """Give the datamodule its training set back."""
        if self._swapped is not None:
            datamodule, training_set = self._swapped
            datamodule.train_data = training_set
            self._swapped = None

    @torch.no_grad()
    def add_good(self, dataset: AnomalibDataset | None, learned_from: bool = False, correction: float = 0.0) -> None:
        """Pass good images, and have the post-processor take note of what they score.

        Args:
            dataset (AnomalibDataset | None): Good images.
            learned_from (bool): Whether the model has learned from them.
            correction (float): What their scores are known to lack then, on the logit scale.
        """
        post_processor = self.post_processor
        if not isinstance(post_processor, GoodPartsPostProcessor) or dataset is None or not len(dataset):
            return
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        dataset = copy.copy(dataset)
        dataset.augmentations = getattr(datamodule, "val_augmentations", None)
        transform = None if self.pre_processor is None else self.pre_processor.transform
        training = self.model.training
        self.model.eval()
        batch_size = min(8, datamodule.eval_batch_size)  # so that the progress bar moves
        paths = [path for path, _ in image_labels(dataset)]
        for images in batches(dataset, transform, batch_size, datamodule.num_workers, self.device):
            with self.trainer.precision_plugin.forward_context():
                result = self.model(images)
            scores, maps = result.pred_score, result.anomaly_map
            if correction:
                scores, maps = (torch.sigmoid(logit(x) + correction) for x in (scores, maps))
            # Pixels of images that are learned from count only where there are no others.
            has_others = learned_from and self.held_out is not None and len(self.held_out) > 0
            post_processor.add_good(scores, None if has_others else maps, learned_from, paths)
            paths = paths[len(images) :]
        self.model.train(training)

    def place_thresholds(self) -> None:
        """Place the thresholds by the good images that are known, and say so where no validation will."""
        self.held_out = None
        if isinstance(self.post_processor, GoodPartsPostProcessor):
            self.post_processor.place_thresholds()
            if not self.trainer.enable_validation:
                logger.info(self.post_processor.report())

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Find anomalies in a validation batch.

        Args:
            batch (Batch): Input batch.
            *args: Additional arguments (unused).
            **kwargs: Additional keyword arguments (unused).

        Returns:
            STEP_OUTPUT: The batch with predictions.
        """
        del args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the checkpoint's tensors mean where nothing writes over it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["identity"] = self.identity()
        checkpoint["product"] = self.product
        checkpoint["is_product_specific"] = self.is_product_specific

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore component configuration, and refuse the checkpoint of another model.

        Raises:
            ValueError: If an argument that determines the meaning of the tensors differs.
        """
        super().on_load_checkpoint(checkpoint)
        check_identity(checkpoint, self.identity())
        self.product = checkpoint.get("product") or self.product
        self.is_product_specific = checkpoint.get("is_product_specific", type(self).is_product_specific)
        # Metrics may have been others when the checkpoint was saved; they keep nothing that testing needs.
        state = checkpoint.get("state_dict", {})
        own = {} if self.evaluator is None else self.evaluator.state_dict(prefix="evaluator.")
        for name in [name for name in state if name.startswith("evaluator.")]:
            del state[name]
        state.update(own)

    def identity(self) -> dict[str, Any]:
        """Arguments that determine the meaning of a checkpoint's tensors.

        Returns:
            dict[str, Any]: Plain data by argument name.
        """
        raise NotImplementedError

    @property
    def learning_type(self) -> LearningType:
        """Learning type.

        Returns:
            LearningType: Always ``ONE_CLASS``. The methods are zero- and few-shot, but anomalib's engine would only
                validate such a model: it would never see the training images, nor run in ``anomalib benchmark``.
        """
        return LearningType.ONE_CLASS


def category_of(trainer: Trainer) -> str | None:
    """Name what the images of a run show.

    Args:
        trainer (Trainer): Trainer of the run.

    Returns:
        str | None: The datamodule's category or name, if it has one.
    """
    datamodule = getattr(trainer, "datamodule", None)
    category = getattr(datamodule, "category", None) or getattr(datamodule, "name", None)
    return None if category is None else str(category)


def asked_epochs(trainer: Trainer) -> int | None:
    """Find out how many epochs the command or its config asked for, whatever the model made of it.

    Args:
        trainer (Trainer): Trainer of the run.

    Returns:
        int | None: ``max_epochs``; ``None`` where none was named, or where no command runs, which keeps its config.
    """
    configs = [getattr(callback, "config", None) for callback in getattr(trainer, "callbacks", ())]
    asked = [getattr(getattr(config, "trainer", None), "max_epochs", None) for config in configs]
    return next((epochs for epochs in asked if epochs is not None), None)


def check_seed(seed: int | None) -> None:
    """Refuse a seed now that would stop the fit.

    Args:
        seed (int | None): Seed.

    Raises:
        ValueError: If it is no number of 32 bits.
    """
    if seed is not None and not 0 <= seed < 2**32:
        msg = f"seed={seed} must lie between 0 and {2**32 - 1}, or be left out."
        raise ValueError(msg)


class _RestoreTrainingSet(Callback):
    """Gives the datamodule its training set back, however a fit goes; Lightning tells only callbacks of errors."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The dataloader is made by now."""
        del trainer
        _restore(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning may have been told to train on no batch."""
        del trainer
        _restore(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The fit may have failed before it began."""
        del trainer, exception
        _restore(pl_module)


class _CheckProduct(Callback):
    """Says where another product is tested or predicted than the one whose good parts the model knows."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation of its own; a training is tested afterwards."""
        if trainer.state.fn == "validate":
            _check_product(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """By now the checkpoint is loaded."""
        _check_product(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A folder of images has no product, whatever the datamodule of an earlier run on this trainer was."""
        if not any(isinstance(images, PredictDataset) for images in datasets_of(trainer.predict_dataloaders)):
            _check_product(trainer, pl_module)


def _check_product(trainer: Trainer, pl_module: LightningModule) -> None:
    shown = category_of(trainer)
    if not isinstance(pl_module, FrozenBackboneMixin) or not pl_module.is_product_specific:
        return
    if pl_module.product and shown and shown != pl_module.product:
        logger.warning(
            "%s knows the good parts of '%s', but these images are of '%s': its scores and threshold do not hold for "
            "them. Give the checkpoint of '%s', or train on its good parts. If both are the same product, all is well.",
            type(pl_module).__name__,
            pl_module.product,
            shown,
            shown,
        )


def _restore(pl_module: LightningModule) -> None:
    if isinstance(pl_module, FrozenBackboneMixin):
        pl_module.restore_training_set()
