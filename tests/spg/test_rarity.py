# SPDX-License-Identifier: Apache-2.0

"""Rarity of patches in their own image."""

import pytest
import torch

from anomalib_spg.rarity import rarity


def test_by_brute_force() -> None:
    """Distance of unit tokens to the nearest one more than a fifth away, over the one that 5 % of them exceed."""
    grid = (8, 10)
    patches = torch.randn(2, 80, 6, dtype=torch.double) * 5
    unit = patches / patches.norm(dim=-1, keepdim=True)
    distances = torch.full((2, 80), float("inf"), dtype=torch.double)
    for i in range(80):
        for j in range(80):
            if abs(i // 10 - j // 10) > 1.6 or abs(i % 10 - j % 10) > 2:
                distances[:, i] = torch.minimum(distances[:, i], (unit[:, i] - unit[:, j]).norm(dim=-1))
    usual = distances.sort(dim=1, descending=True).values[:, 3:4]  # 4 of 80
    torch.testing.assert_close(rarity(patches, grid), distances / usual - 1)


def test_a_defect_is_rare_and_what_recurs_is_not() -> None:
    """Whatever the length of the tokens; an image that repeats itself exactly gives finite numbers."""
    patches = torch.ones(1, 400, 3)
    patches[0, 45:47] = torch.tensor([-1.0, 1, 1])
    patches[0, [5, 300]] = torch.tensor([1.0, -1, 1]) * 7
    result = rarity(patches, (20, 20))[0]
    assert result.isfinite().all()
    assert result[45] == pytest.approx(result[46])
    assert result[45] > 1
    torch.testing.assert_close(result[[5, 300, 100]], torch.full((3,), -1.0), atol=0.02, rtol=0)  # rounding
