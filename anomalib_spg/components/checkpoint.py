# SPDX-License-Identifier: Apache-2.0

"""Refuse the checkpoint of another model; name a fitted one in training, and one that cannot be read or saved."""
# ruff: noqa: PLR6301  # Lightning calls a callback's methods on the instance

import logging
import traceback
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

logger = logging.getLogger(__name__)


def check_identity(checkpoint: dict[str, Any], identity: dict[str, Any]) -> None:
    """Compare what a model is with what a checkpoint was saved from.

    Args:
        checkpoint (dict[str, Any]): Lightning checkpoint.
        identity (dict[str, Any]): Arguments that must agree, by name. One missing from the checkpoint is not compared.

    Raises:
        ValueError: If one differs; the message names it and both values.

    Example:
        >>> check_identity({"hyper_parameters": {"layers": [3]}}, {"layers": [3], "backbone": "vit_tiny_patch16_224"})
    """
    # Lightning's load_from_checkpoint writes the arguments it is given over the hyperparameters.
    saved = checkpoint.get("hyper_parameters", {}) | checkpoint.get("identity", {})
    for name, own in identity.items():
        if saved.get(name, own) != own:
            msg = (
                f"The checkpoint was saved with {name}={saved[name]}, this model has {name}={own}. Give the model the "
                "arguments it was trained with (for instance the same --config)."
            )
            raise ValueError(msg)


class WarnOfFitted(Callback):
    """Say that nothing is learned in a training from a checkpoint that has learned.

    Lightning takes its only epoch for done: it trains nothing, saves nothing, and prints what the checkpoint scores.

    Args:
        remedy (str): How else the model learns on.
    """

    def __init__(self, remedy: str) -> None:
        self.remedy = remedy

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what to do instead."""
        if trainer.state.fn == "fit" and checkpoint["state_dict"].get("_is_fitted"):
            logger.warning(
                "%s has learned already in ckpt_path='%s': it learns nothing more, and saves nothing. To learn anew, "
                "leave ckpt_path out; to test it, use `anomalib test`; %s.",
                type(pl_module).__name__,
                trainer.ckpt_path,
                self.remedy,
            )


class NameCheckpoint(Callback):
    """Name the checkpoint that cannot be read or saved: neither torch nor Lightning does."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say which file it was, and what to do.

        Raises:
            ValueError: If the checkpoint to go on from is damaged, or none.
            OSError: If a checkpoint cannot be written.
        """
        del pl_module
        steps = [frame.name for frame in traceback.extract_tb(exception.__traceback__)]
        if "resume_start" in steps and not isinstance(exception, FileNotFoundError):
            msg = (
                f"Cannot read the checkpoint '{trainer.ckpt_path}' ({type(exception).__name__}): damaged, or none. "
                "Training leaves one as weights/lightning/model.ckpt in its results folder."
            )
            raise ValueError(msg) from exception
        if "save_checkpoint" in steps and isinstance(exception, OSError):
            msg = (
                f"Could not save the checkpoint below '{trainer.default_root_dir}': {exception.strerror or exception}. "
                "Make room and run the same command again."
            )
            raise OSError(msg) from exception
