# SPDX-License-Identifier: Apache-2.0

"""The losses the guides are learned with (arXiv 2604.02871)."""

import torch


def focal_loss(
    p_anomaly: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 2.0,
    smoothing: float = 1e-5,
) -> torch.Tensor:
    r"""Two-class focal loss :math:`-(1 - p_t)^\gamma \log p_t`, averaged over pixels, without class weights.

    It takes probabilities, not logits, because the maps are upsampled after their softmax.

    Args:
        p_anomaly (torch.Tensor): Probability of the anomalous class, any shape, in ``[0, 1]``.
        mask (torch.Tensor): Ground truth of that shape, 0 or 1.
        gamma (float): Focusing exponent. Defaults to 2 (paper).
        smoothing (float): Label smoothing. Defaults to 1e-5 (paper).

    Returns:
        torch.Tensor: Scalar loss.

    Example:
        >>> focal_loss(torch.tensor([0.5]), torch.tensor([1.0]))  # 0.25 * ln 2
        tensor(0.1733)
    """
    target = mask.clamp(smoothing, 1 - smoothing)
    p_target = target * p_anomaly + (1 - target) * (1 - p_anomaly) + smoothing
    return (-((1 - p_target).clamp(min=0) ** gamma) * p_target.log()).mean()


def dice_loss(probability: torch.Tensor, target: torch.Tensor, smoothing: float = 1.0) -> torch.Tensor:
    r"""Dice loss :math:`1 - (2 \sum p t + s) / (\sum p + \sum t + s)` per image, averaged over the batch.

    Args:
        probability (torch.Tensor): Predicted probabilities ``(B, ...)``.
        target (torch.Tensor): Ground truth ``(B, ...)``, 0 or 1.
        smoothing (float): Added to both sides of the fraction. Defaults to 1 (paper).

    Returns:
        torch.Tensor: Scalar loss.

    Example:
        >>> dice_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.)
    """
    probability, target = probability.flatten(1), target.flatten(1)
    overlap = (probability * target).sum(dim=1)
    return (1 - (2 * overlap + smoothing) / (probability.sum(dim=1) + target.sum(dim=1) + smoothing)).mean()
