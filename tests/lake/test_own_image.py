# SPDX-License-Identifier: Apache-2.0

"""Deviation from the rest of an image."""

import pytest
import torch

from anomalib_lake.own_image import OwnImage


def test_scale() -> None:
    """99 % of the patches of the normal images deviate by at most 1, unless that scale is below the least."""
    tokens = torch.randn(3, 64, 8)
    own = OwnImage()
    own.fit(tokens, (8, 8))
    assert float(own(tokens, (8, 8)).quantile(0.99)) == pytest.approx(1)
    own.fit(torch.ones(1, 64, 8), (8, 8), least=torch.tensor(0.3))
    assert float(own.distance_scale) == pytest.approx(0.3)
