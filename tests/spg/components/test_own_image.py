# SPDX-License-Identifier: Apache-2.0

"""Distances within an image."""

import pytest
import torch

from anomalib_spg.components import own_image as module
from anomalib_spg.components.own_image import outside, own_distances


@pytest.mark.parametrize("stride", [1, 2])
def test_distances(stride: int) -> None:
    """By brute force: the nearest kept patch more than a fifth of the rows or of the columns away."""
    tokens, grid = torch.randn(2, 6 * 11, 5, dtype=torch.float64), (6, 11)
    distances = own_distances(tokens, grid, stride).view(2, *grid)
    maps = tokens.view(2, *grid, 5)
    for row in range(6):
        for column in range(11):
            found = [
                (maps[:, r, c] - maps[:, row, column]).norm(dim=1)
                for r in range(0, 6, stride)
                for c in range(0, 11, stride)
                if abs(r - row) > 1 or abs(c - column) > 2
            ]
            torch.testing.assert_close(distances[:, row, column], torch.stack(found).amin(dim=0))


def test_compiled_path_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that is exported computes what the loop over images and parts of them computes."""
    monkeypatch.setattr(module, "ROWS", 16)
    tokens = torch.randn(3, 63, 6)
    with torch.inference_mode():
        expected = [own_distances(tokens, (7, 9), stride) for stride in (1, 2)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close([own_distances(tokens, (7, 9), stride) for stride in (1, 2)], expected)


def test_a_defect_stands_out_and_a_repeated_patch_does_not() -> None:
    """Two alike patches far apart explain each other, two side by side do not."""
    tokens = torch.zeros(10, 10, 4)
    tokens[2, 2] = tokens[2, 3] = torch.tensor([1.0, 0, 0, 0])
    tokens[8, 2] = tokens[2, 8] = torch.tensor([0, 1.0, 0, 0])
    deviation = own_distances(tokens.view(1, 100, 4), (10, 10)).view(10, 10)
    assert deviation[2, 2] == deviation[2, 3] == 1
    assert deviation[8, 2] == deviation[2, 8] == deviation[5, 5] == 0


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_few_patches(grid: tuple[int, int], stride: int) -> None:
    """Where no patch lies outside the surroundings, distances are finite all the same."""
    assert outside(grid, stride).any(dim=1).all()
    assert own_distances(torch.randn(1, grid[0] * grid[1], 4), grid, stride).isfinite().all()
