# SPDX-License-Identifier: Apache-2.0

"""Pre-processing that fits a backbone, and stays the same in an exported model."""

import copy
from typing import Any

from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import convert_center_crop_transform
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform

from .backbone import default_image_size, pretrained_config


class AntialiasedPreProcessor(PreProcessor):
    """anomalib's pre-processor, whose exported resize has antialiasing as that of fit, test and predict has.

    anomalib's own turns it off for exports. Scores of images larger than the model's input then differ from those the
    thresholds were set by.

    Args:
        transform (Transform | None): Transform of images. Defaults to ``None``.

    Example:
        >>> pre_processor = AntialiasedPreProcessor(Compose([Resize((8, 8), antialias=True)]))
        >>> pre_processor.export_transform.transforms[0].antialias
        True
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self._keep_antialiasing()

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore configuration from a checkpoint."""
        super().load_checkpoint_config(config)
        self._keep_antialiasing()

    def _keep_antialiasing(self) -> None:
        if self.transform is not None:
            self.export_transform = convert_center_crop_transform(copy.deepcopy(self.transform))


def default_pre_processor(backbone: str, image_size: tuple[int, int] | None = None) -> PreProcessor:
    """Resize, and normalise with the backbone's own image statistics.

    Args:
        backbone (str): timm model name.
        image_size (tuple[int, int] | None): Size to resize to. Defaults to 448, or 518 for CLIP.

    Returns:
        PreProcessor: Pre-processor.

    Example:
        >>> default_pre_processor("vit_large_patch14_clip_quickgelu_336.openai").transform.transforms[0].size
        [518, 518]
    """
    config = pretrained_config(backbone)
    return AntialiasedPreProcessor(
        transform=Compose([
            Resize(image_size or default_image_size(backbone), antialias=True),
            Normalize(mean=list(config["mean"]), std=list(config["std"])),
        ]),
    )


def pixel_aspect(pre_processor: nn.Module | None, path: str) -> float:
    """Say how a pre-processor squeezes an image that it resizes to a given shape.

    Args:
        pre_processor (nn.Module | None): Pre-processor, of anomalib's kind.
        path (str): File of the image.

    Returns:
        float: Width over height of what a pixel shows; 1 where nothing is squeezed, or there is no name of a file.

    Example:
        >>> pixel_aspect(None, "part.png")
        1.0
    """
    transform = getattr(pre_processor, "transform", None)
    steps = getattr(transform, "transforms", [transform])
    sizes = [step.size for step in steps if isinstance(step, Resize) and len(step.size) == 2]
    if not path or not sizes:
        return 1.0
    with Image.open(path) as file:  # reads the header only
        width, height = file.size
    return width / height * sizes[0][0] / sizes[0][1]  # a crop that follows squeezes nothing
