# SPDX-License-Identifier: Apache-2.0

"""Synthetic anomalies: masks are true, every kind draws, the seed decides."""

import pytest
import torch

from anomalib_spg.synthesis import CONTENTS, SHAPES, AnomalySynthesizer


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_changes_stay_where_the_mask_says(content: str, shape: str) -> None:
    """Pixels further than the soft edge from the mask are untouched; some inside are changed."""
    synthesizer = AnomalySynthesizer(probability=1.0, contents=(content,), shapes=(shape,), size=(0.1, 0.3))
    images = torch.rand(4, 3, 64, 80)
    drawn, masks = synthesizer(images)
    near = torch.nn.functional.max_pool2d(masks[:, None].float(), 15, stride=1, padding=7)[:, 0] > 0
    change = (drawn - images).abs().amax(dim=1)
    assert change[~near].max() < 1e-5 if (~near).any() else True
    assert all(change[i][masks[i]].max() > 1e-3 for i in range(4))
    assert drawn.min() >= images.min()
    assert drawn.max() <= images.max()
    assert drawn.isfinite().all()


def test_probability_and_normal_images() -> None:
    """Images without an anomaly are returned bit for bit, with an empty mask."""
    images = torch.rand(200, 1, 16, 16)
    drawn, masks = AnomalySynthesizer(probability=0.3)(images)
    anomalous = masks.flatten(1).any(dim=1)
    assert 0.2 < anomalous.float().mean() < 0.4
    assert torch.equal(drawn[~anomalous], images[~anomalous])


def test_the_seed_decides() -> None:
    """Same seed, same anomalies; another seed, others."""
    images = torch.rand(4, 3, 32, 32)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return AnomalySynthesizer(probability=1.0)(images)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_scale_does_not_matter() -> None:
    """Normalised images get the same anomalies as images in [0, 1]."""
    images = torch.rand(4, 3, 32, 32)
    torch.manual_seed(5)
    drawn, masks = AnomalySynthesizer(probability=1.0)(images)
    torch.manual_seed(5)
    scaled, scaled_masks = AnomalySynthesizer(probability=1.0)(images * 4 - 2)
    assert torch.equal(masks, scaled_masks)
    torch.testing.assert_close(scaled, drawn * 4 - 2, rtol=1e-3, atol=1e-3)


def test_sizes_are_varied() -> None:
    """Areas spread over more than a factor of fifty."""
    _, masks = AnomalySynthesizer(probability=1.0, max_anomalies=1)(torch.rand(100, 1, 128, 128))
    areas = masks.flatten(1).sum(dim=1).float().sort().values
    assert areas[95] > 50 * areas[5]


@pytest.mark.parametrize(
    "arguments",
    [
        {"contents": ("rust",)},
        {"contents": ()},
        {"probability": 1.5},
        {"size": (0.5, 0.1)},
        {"strength": (0.0, 1.0)},
        {"max_anomalies": 0},
    ],
)
def test_bad_arguments(arguments: dict) -> None:
    """Unknown kinds and empty ranges."""
    with pytest.raises(ValueError, match="choose from|rising ranges|max_anomalies=0"):
        AnomalySynthesizer(**arguments)


def test_what_changes_nothing_is_no_anomaly() -> None:
    """On a white ground much of what is drawn is as white; of uniform images rounding alone remains."""
    images = torch.ones(8, 3, 64, 64)
    images[:, :, 20:45, 20:45] = 0
    drawn, masks = AnomalySynthesizer(probability=1.0)(images)
    changed = (drawn - images).abs().amax(dim=1)
    assert (changed[masks] > 0).all()
    assert masks.any()
    white = AnomalySynthesizer(probability=1.0, contents=("tone", "paste"), shapes=("blob",))
    unchanged = [int((~white(images)[1].flatten(1).any(dim=1)).sum()) for _ in range(10)]
    assert sum(unchanged) > 0  # of 80 images
    for level in (0.0, 0.2):
        _, masks = AnomalySynthesizer(probability=1.0)(torch.full((4, 3, 64, 64), level))
        assert not masks.any()


def test_images_of_a_single_colour_get_anomalies() -> None:
    """They have no levels of their own; those of all images serve them."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 1, 1).expand(-1, -1, 64, 64)
    drawn, masks = AnomalySynthesizer(probability=1.0)(images)
    assert masks.flatten(1).any(dim=1).sum() >= 6
    assert torch.equal((drawn != images).any(dim=1) & masks, masks)
    assert not AnomalySynthesizer(probability=1.0)(torch.zeros(8, 3, 64, 64))[1].any()
