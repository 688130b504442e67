# SPDX-License-Identifier: Apache-2.0

"""The losses against values worked out by hand."""

import math

import pytest
import torch

from anomalib_spg.losses import dice_loss, focal_loss


def test_focal_loss() -> None:
    """-(1 - p_t)^2 ln p_t, averaged; p_t is the probability given to the true class."""
    p = torch.tensor([[0.9, 0.2], [0.5, 0.7]])
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    expected = sum(-((1 - t) ** 2) * math.log(t) for t in (0.9, 0.8, 0.5, 0.3)) / 4
    assert focal_loss(p, mask).item() == pytest.approx(expected, rel=1e-3)


def test_focal_loss_smoothing_is_that_of_the_paper() -> None:
    """A certain and wrong pixel costs -ln of twice the smoothing, not infinity."""
    assert focal_loss(torch.tensor([0.0]), torch.tensor([1.0])).item() == pytest.approx(-math.log(2e-5), rel=1e-3)


def test_dice_loss() -> None:
    """Anomalous class 1 - (2 * 1.1 + 1) / (1.6 + 2 + 1), normal class 1 - (2 * 0.5 + 1) / (1.4 + 1 + 1); then none."""
    p = torch.tensor([[0.8, 0.3, 0.5], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert dice_loss(p, mask).item() == pytest.approx(((1 - 3.2 / 4.6) + (1 - 2 / 3.4) + 0) / 2)
