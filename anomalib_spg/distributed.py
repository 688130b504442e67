# SPDX-License-Identifier: Apache-2.0

"""Broadcast and all-reduce for distributed training, where each process has its share of the images.

Without a process group every function here leaves its argument unchanged.
"""

from collections.abc import Iterable

import torch
from torch import distributed


def num_processes() -> int:
    """World size; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def broadcast(tensors: Iterable[torch.Tensor]) -> None:
    """Broadcast the tensors of rank 0, in place.

    Args:
        tensors (Iterable[torch.Tensor]): The same shapes in every process.
    """
    if num_processes() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)


def average_processes(tensors: Iterable[torch.Tensor | None]) -> None:
    """All-reduce tensors, such as gradients, to their mean, in place.

    Args:
        tensors (Iterable[torch.Tensor | None]): The same shapes in every process; ``None`` is skipped.
    """
    processes = num_processes()
    if processes > 1:
        for tensor in tensors:
            if tensor is not None:
                distributed.all_reduce(tensor)
                tensor.div_(processes)


def any_process(mask: torch.Tensor) -> torch.Tensor:
    """All-reduce a boolean mask by "or".

    Args:
        mask (torch.Tensor): Boolean mask of the same shape in every process.

    Returns:
        torch.Tensor: The combined mask.

    Example:
        >>> any_process(torch.tensor([True, False]))  # one process
        tensor([ True, False])
    """
    if num_processes() == 1:
        return mask
    counts = mask.int()
    distributed.all_reduce(counts)
    return counts > 0
