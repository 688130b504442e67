# SPDX-License-Identifier: Apache-2.0

"""Pre-processing that fits a backbone."""

from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import Compose, Normalize, Resize

from .backbone import default_image_size, pretrained_config


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
    return PreProcessor(
        transform=Compose([
            Resize(image_size or default_image_size(backbone), antialias=True),
            Normalize(mean=list(config["mean"]), std=list(config["std"])),
        ]),
    )
