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
    p_target = torch.addcmul(1 - target + smoothing, p_anomaly, 2 * target - 1)  # t p + (1 - t) (1 - p)
    return (-((1 - p_target).clamp(min=0) ** gamma) * p_target.log()).mean()


def dice_loss(p_anomaly: torch.Tensor, mask: torch.Tensor, smoothing: float = 1.0) -> torch.Tensor:
    r"""Dice loss :math:`1 - (2 \sum p t + s) / (\sum p + \sum t + s)` per image, averaged, added over both classes.

    The sums over the normal class, :math:`1 - p` and :math:`1 - t`, follow from those over the anomalous one.

    Args:
        p_anomaly (torch.Tensor): Probability of the anomalous class ``(B, ...)``, in ``[0, 1]``.
        mask (torch.Tensor): Ground truth of that shape, 0 or 1.
        smoothing (float): Added to both sides of the fraction. Defaults to 1 (paper).

    Returns:
        torch.Tensor: Scalar loss, in ``[0, 2]``.

    Example:
        >>> dice_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.)
    """
    p_anomaly, mask = p_anomaly.flatten(1), mask.flatten(1)
    both, predicted, true = (p_anomaly * mask).sum(dim=1), p_anomaly.sum(dim=1), mask.sum(dim=1)
    neither = p_anomaly.shape[1] - predicted - true + both
    anomalous = 1 - (2 * both + smoothing) / (predicted + true + smoothing)
    normal = 1 - (2 * neither + smoothing) / (2 * p_anomaly.shape[1] - predicted - true + smoothing)
    return (anomalous + normal).mean()
