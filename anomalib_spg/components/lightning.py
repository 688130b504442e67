# SPDX-License-Identifier: Apache-2.0

"""What both Lightning models share."""

from collections.abc import Sequence
from typing import Any, ClassVar

from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT

from .backbone import DEFAULT_BACKBONE, default_image_size
from .checkpoint import check_identity
from .compression import CompressBackboneOnly
from .evaluator import default_evaluator
from .post_processor import OrderPreservingPostProcessor
from .pre_processor import default_pre_processor
from .unreadable import NameUnreadableImages


class FrozenBackboneMixin(CompressBackboneOnly):
    """Mixin of an anomalib model whose ``model.backbone`` is a :class:`Backbone`; goes before ``AnomalibModule``.

    Attributes:
        default_backbone (str): timm name of the backbone the default pre-processor is made for.
    """

    default_backbone: ClassVar[str] = DEFAULT_BACKBONE

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
        sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sizes) != 2 or min(sizes) < 1:
            msg = f"image_size={image_size} must be a positive number of pixels, or height and width."
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

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Configure the default post-processor, which cannot change a ranking metric."""
        return OrderPreservingPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Configure the default evaluator: anomalib's metrics, plus average precision and AUPRO."""
        return default_evaluator()

    def configure_callbacks(self) -> Sequence[Callback]:
        """Add the callback that names images which cannot be read."""
        callbacks = super().configure_callbacks()
        return [*(callbacks if isinstance(callbacks, Sequence) else [callbacks]), NameUnreadableImages()]

    @staticmethod
    def configure_optimizers() -> None:
        """Return no optimiser: learning uses stored tokens, after the pass over the images."""
        return

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore component configuration, and refuse the checkpoint of another model.

        Raises:
            ValueError: If an argument that determines the meaning of the tensors differs.
        """
        super().on_load_checkpoint(checkpoint)
        check_identity(checkpoint, self.identity())

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
