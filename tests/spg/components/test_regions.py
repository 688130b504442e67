# SPDX-License-Identifier: Apache-2.0

"""Defects one by one, against what was drawn."""

import numpy as np
import pytest
import torch
from skimage.draw import disk, polygon2mask
from skimage.measure import label

from anomalib_spg import defects
from anomalib_spg.components.regions import Defect


def test_two_places() -> None:
    """The larger first; pixels that touch at a corner are one place."""
    anomaly_map = np.full((6, 8), 0.1)
    anomaly_map[0, 0] = 0.9
    anomaly_map[2, 3] = 0.6
    anomaly_map[3:5, 4:8] = 0.7
    large, small = defects(anomaly_map, anomaly_map > 0.5)
    assert large[:3] == ((3, 2, 8, 5), 9, 0.7)
    assert small == Defect((0, 0, 1, 1), 1, 0.9, [(0.5, 1.0), (0.0, 0.5), (0.5, 0.0), (1.0, 0.5)])


@pytest.mark.parametrize("size", [None, (320, 320), (1000, 240), (40, 30)])
def test_pixels_of_the_image(size: tuple[int, int] | None) -> None:
    """Box, area and contour are those of a disc in an image of any size; the contour covers what the mask does."""
    mask = np.zeros((160, 160), bool)
    mask[disk((50, 100), 30)] = True
    anomaly_map = torch.where(torch.from_numpy(mask), 0.8, 0.2)[None]
    (found,) = defects(anomaly_map, torch.from_numpy(mask)[None], size)
    width, height = size or (160, 160)
    assert found.area == pytest.approx(np.pi * 30**2 * width * height / 160**2, rel=0.02)
    assert found.score == pytest.approx(0.8)
    expected = np.array([71 * width, 21 * height, 130 * width, 80 * height]) / 160
    np.testing.assert_allclose(found.box, expected, atol=1)
    x, y = np.array(found.contour).T
    np.testing.assert_allclose([x.min(), y.min(), x.max(), y.max()], expected, atol=0.1)
    shoelace = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
    assert shoelace == pytest.approx(found.area, rel=0.03)
    if size is None:
        assert (polygon2mask(mask.shape, np.stack([y, x], axis=1) - 0.5) != mask).sum() < 0.02 * mask.sum()


def test_holes_and_the_edge() -> None:
    """A ring has one contour, the outer one, and its hole is no part of its area; the border of the image closes it."""
    mask = np.ones((20, 30), bool)
    mask[5:15, 5:25] = False
    (found,) = defects(np.ones((20, 30)), mask)
    assert found.area == 20 * 30 - 10 * 20
    assert found.box == (0, 0, 30, 20)
    assert len(found.contour) == 8  # the corners are cut by half a pixel
    assert {value for corner in found.contour for value in corner} == {0, 0.5, 19.5, 20, 29.5, 30}


def test_noise() -> None:
    """As many as scikit-image counts, whatever their shape, each with a contour that stays in its box."""
    anomaly_map = np.random.default_rng(0).random((60, 60))
    mask = anomaly_map > 0.7
    found = defects(anomaly_map, mask)
    assert len(found) == label(mask).max()
    assert sum(defect.area for defect in found) == mask.sum()
    for defect in found:
        left, top, right, bottom = defect.box
        assert len(defect.contour) >= 4
        assert all(left <= x <= right and top <= y <= bottom for x, y in defect.contour)


def test_none() -> None:
    """Accepted images have an empty mask, models without maps none."""
    assert defects(torch.rand(1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.bool)) == []
    assert defects(torch.rand(8, 8), None) == []


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((8, 8), (4, 4)), r"map has \(8, 8\) pixels, the mask \(4, 4\)"),
        (((2, 8, 8), (2, 8, 8)), r"anomaly map has shape \(2, 8, 8\); it must be that of one image"),
        (((8,), (8,)), r"anomaly map has shape \(8,\)"),
    ],
)
def test_what_is_no_map_of_one_image(shapes: tuple, message: str) -> None:
    """Named with its shape."""
    with pytest.raises(ValueError, match=message):
        defects(np.ones(shapes[0]), np.ones(shapes[1]))
