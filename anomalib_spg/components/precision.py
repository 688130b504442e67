# SPDX-License-Identifier: Apache-2.0

"""Half precision is for the backbone: what compares its tokens computes in single precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")  # of Lightning's trainer


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Switch autocast off, for everything but the backbone.

    In bfloat16 a score has three digits: scores tie, and a map has hardly more than a hundred values.

    Args:
        device (torch.device): Where the tensors are.

    Returns:
        AbstractContextManager[None]: Nothing happens in it where autocast is off already, so exports do not see it.

    Example:
        >>> values = torch.rand(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     half = values @ values
        ...     with full_precision(values.device):
        ...         print(half.dtype, (values @ values).dtype)
        torch.bfloat16 torch.float32
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def check_precision(precision: str) -> None:
    """Refuse precisions in which more than the backbone would be rounded.

    Args:
        precision (str): Precision of Lightning's trainer.

    Raises:
        ValueError: If it is none of 32-true, bf16-mixed and 16-mixed.
    """
    if precision not in PRECISIONS:
        msg = (
            f"precision={precision} would round thresholds and everything that is learned; only the backbone may run "
            f"in half precision. Choose one of {', '.join(PRECISIONS)} (--trainer.precision on the command line)."
        )
        raise ValueError(msg)
