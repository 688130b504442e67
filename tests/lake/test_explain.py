# SPDX-License-Identifier: Apache-2.0

"""Neurons and text sum to the score, and each neuron has its share of the squared distance."""

from pathlib import Path

import pytest
import torch

from anomalib_lake import LAKEModel
from anomalib_lake.bank import average_neighbors
from anomalib_lake.explain import explain
from tests.helpers import TINY, TINY_CLIP


def fitted(**arguments: object) -> LAKEModel:
    """A model with a bank of two random images."""
    model = LAKEModel(**{"backbone": TINY, "layers": [3, 6], "pre_trained": False, "num_neurons": 20, **arguments})
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 96, 128))
    model.fit("part")
    return model.eval()


def check_sum(model: LAKEModel) -> None:
    """The parts sum to the scores of what the model itself returns, and to its maps."""
    images = torch.randn(3, 3, 96, 128)
    with torch.no_grad():
        expected = model(images)
    for index, explanation in enumerate(explain(model, model.backbone(images), images.shape[-2:])):
        total = explanation.base + explanation.contributions.sum() + sum(explanation.other.values())
        torch.testing.assert_close(total, expected.pred_score[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(explanation.anomaly_map, expected.anomaly_map[index, 0], atol=1e-5, rtol=0)
        assert float(explanation.shares.sum()) == pytest.approx(
            1 - explanation.other.get("text", 0) / float(total), abs=1e-4
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"scales": [1]},
        {"normalization": "none"},
        {"normalization": "before"},
        {"selection": "pca"},
        {"layers": [5]},
        {"own_weight": 0, "top_patches": 1},
        {"num_neighbors": 5},
        {"num_rotations": 3},
    ],
    ids=str,
)
def test_neurons_sum_to_score(arguments: dict[str, object]) -> None:
    """Without text, for every way to project tokens."""
    check_sum(fitted(**arguments))


def test_neurons_and_text_sum_to_score(clip_file: Path) -> None:
    """With text, whose part is its weight times the semantic activation of the highest patch."""
    model = fitted(backbone=TINY_CLIP, weights=clip_file, pre_trained=True, text_weight=0.4, layers=[3, 6])
    check_sum(model)
    explanation = explain(model, model.backbone(torch.randn(1, 3, 96, 128)), (96, 128))[0]
    assert 0 < explanation.other["text"] < 0.4


@torch.no_grad()
def test_shares_are_those_of_the_squared_distance() -> None:
    """One block, one scale and one patch: recomputed from tokens and bank, the nearest patch by brute force."""
    model = fitted(layers=[5], scales=[1], own_weight=0, top_patches=1)
    images = torch.randn(1, 3, 96, 128)
    explanation = explain(model, model.backbone(images), images.shape[-2:])[0]
    x = model.neurons[0](model.backbone(images).patches[0])[0]
    bank = model.banks[0][0]
    distances = (x[:, None] - bank.tokens[None]).square().sum(dim=2)
    peak = int(distances.amin(dim=1).argmax())
    match = int(distances[peak].argmin())
    squares = (x[peak] - bank.tokens[match]).square()
    torch.testing.assert_close(explanation.shares, squares / squares.sum(), atol=1e-5, rtol=0)
    assert explanation.units.tolist() == model.neurons[0].indices.tolist()
    assert explanation.peak == divmod(peak, 8)
    assert explanation.nearest == (int(bank.image_indices[match]), int(bank.patch_indices[match]), 1)


@torch.no_grad()
def test_shares_of_the_own_image() -> None:
    """With the own image alone they are those of the squared distance to the nearest patch outside the surroundings."""
    model = fitted(layers=[5], scales=[1], own_weight=1, top_patches=1)
    images = torch.randn(1, 3, 96, 128)
    explanation = explain(model, model.backbone(images), images.shape[-2:])[0]
    x = model.neurons[0](model.backbone(images).patches[0])[0]
    squares = (x[:, None] - x[None]).square()
    distances = squares.sum(dim=2)
    for patch in range(48):
        for other in range(48):
            if abs(patch // 8 - other // 8) <= 1 and abs(patch % 8 - other % 8) <= 1:  # 20 % of 6 and of 8
                distances[patch, other] = float("inf")
    peak = int(distances.amin(dim=1).argmax())
    shares = squares[peak, int(distances[peak].argmin())]
    assert explanation.peak == divmod(peak, 8)
    torch.testing.assert_close(explanation.shares, shares / shares.sum(), atol=1e-5, rtol=0)


@torch.no_grad()
def test_nearest_patch_is_that_of_the_block_and_scale_that_decide() -> None:
    """Recomputed for two blocks and two scales, for images that single patches and windows decide."""
    model = fitted(own_weight=0, top_patches=1)
    seen = set()
    for seed in range(8):
        images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(seed))
        images[:, :, 32:64] *= 1 + seed
        explanation = explain(model, model.backbone(images), images.shape[-2:])[0]
        peak = explanation.peak[0] * 8 + explanation.peak[1]
        tokens, grid = model.tokens(images)
        found = {}
        for layer, block in enumerate(model.layers):
            for number, scale in enumerate(model.scales):
                neurons, bank = model.neurons[layer], model.banks[layer][number]
                x = neurons.normalize(average_neighbors(neurons.project(tokens[block]), grid, scale))[0, peak]
                distances = (x - bank.tokens).norm(dim=1) / bank.distance_scale
                match = int(distances.argmin())
                place = (int(bank.image_indices[match]), int(bank.patch_indices[match]), scale)
                found[number, layer] = (float(distances.min()), place)
        scale = max(range(2), key=lambda s: found[s, 0][0] + found[s, 1][0])
        layer = max(range(2), key=lambda b: found[scale, b][0])
        assert explanation.nearest == found[scale, layer][1]
        seen.add((scale, layer))
    assert len(seen) > 1
