# SPDX-License-Identifier: Apache-2.0

"""Refuse the checkpoint of another model, even one whose tensors would fit."""

from typing import Any


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
    saved = checkpoint.get("hyper_parameters", {})
    for name, own in identity.items():
        if saved.get(name, own) != own:
            msg = (
                f"The checkpoint was saved with {name}={saved[name]}, this model has {name}={own}. Give the model the "
                "arguments it was trained with (for instance the same --config)."
            )
            raise ValueError(msg)
