# SPDX-License-Identifier: Apache-2.0

"""Atoms sum to the score, and each has the share the formulas give it."""

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_spg import SPGModel
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.explain import explain
from anomalib_spg.guides import Guides


def model_with_guides(layers: tuple[int, ...] = (3, 5), atoms: int = 12, **arguments: object) -> SPGModel:
    """A model with random guides."""
    model = SPGModel("vit_tiny_patch16_224", layers=list(layers), pre_trained=False, **arguments).eval()
    for number, guides in enumerate(model.guides):
        vectors = F.normalize(torch.randn(atoms, 192), dim=1)
        guides.set(vectors, torch.arange(atoms) + 100 * number, torch.rand(4, atoms) * (torch.rand(4, atoms) > 0.3))
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"image_score": "top", "top_fraction": 0.1},
        {"image_score": "lse"},
        {"cls_weight": 0.3, "image_score": "lse"},
        {"cls_weight": 0.3},
        {"sigma": 0},
        {"own_weight": 8.0},
        {"own_weight": 8.0, "cls_weight": 0.3, "image_score": "lse"},
    ],
    ids=str,
)
@torch.no_grad()
def test_atoms_sum_to_score_and_map(arguments: dict[str, object]) -> None:
    """For every image score, over two layers, and for a size that the patches do not divide."""
    model = model_with_guides(**arguments)
    images = torch.randn(3, 3, 60, 90)
    expected = model(images)
    for index, explanation in enumerate(explain(model, model.backbone(images), images.shape[-2:])):
        total = explanation.base + explanation.contributions.sum() + sum(explanation.other.values())
        torch.testing.assert_close(total, expected.pred_score[index], atol=1e-5, rtol=0)
        assert explanation.score == pytest.approx(float(expected.pred_score[index]), abs=1e-6)
        if not model.own_weight:
            maps = model.anomaly_map_generator(0.5 + explanation.maps.sum(dim=0)[None], (60, 90))
            torch.testing.assert_close(maps[0], expected.anomaly_map[index], atol=1e-5, rtol=0)
        named = {"rare in its image": "own_weight" in arguments, "image score": arguments.get("image_score") == "lse"}
        assert set(explanation.other) == {name for name, expected_there in named.items() if expected_there}
        assert ((explanation.units >= 100) == (explanation.blocks == 5)).all()


def test_values_by_hand() -> None:
    """Two atoms that are the axes: a token (3, 4) has cosines 0.6 and 0.8 to the normal and the anomaly guide."""
    model = SPGModel("vit_tiny_patch16_224", layers=[5], pre_trained=False, sigma=0, temperature=0.1).eval()
    model.guides[0] = Guides(dim=2)
    axes = torch.tensor([[1.0, 0], [0, 2], [3, 0], [0, 4]])  # norms must not matter
    model.guides[0].set(torch.eye(2), torch.tensor([7, 9]), axes)
    patches = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    explanation = explain(model, Tokens([patches], [], (2, 2)), (32, 32))[0]
    probability = 1 / (1 + math.exp(-2))
    assert explanation.units.tolist() == [7, 9]
    assert explanation.peak == (0, 0)
    expected = torch.tensor([-0.6, 0.8]) * (probability - 0.5) / 0.2
    torch.testing.assert_close(explanation.maps[:, 0, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(explanation.contributions, expected, atol=1e-5, rtol=0)  # a corner is its patch alone
    assert explanation.shares.tolist() == [0, 1]
    assert explanation.top(5) == [1]
    assert not explanation.opposed.any()
    opposed = explain(model, Tokens([torch.tensor([[[-3.0, 4.0]]])], [], (1, 1)), (16, 16))[0].opposed
    assert opposed.tolist() == [True, False]  # the normal atom is turned away from, which adds


def test_no_preference_is_divided_too() -> None:
    """Where the terms of the atoms cancel exactly, they still have their limit: a quarter of the logit."""
    model = SPGModel("vit_tiny_patch16_224", layers=[5], pre_trained=False, sigma=0, temperature=0.1).eval()
    model.guides[0] = Guides(dim=2)
    model.guides[0].set(torch.eye(2), torch.arange(2), torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]]))
    patches = torch.ones(1, 1, 2)
    explanation = explain(model, Tokens([patches], [], (1, 1)), (16, 16))[0]
    term = math.sqrt(0.5) / 0.1 / 4
    torch.testing.assert_close(explanation.contributions, torch.tensor([-term, term]))
    assert explanation.score == pytest.approx(0.5)


def test_free_vectors_are_their_own_atoms() -> None:
    """The control without a dictionary can be explained, too."""
    model = SPGModel("vit_tiny_patch16_224", layers=[5], pre_trained=False).eval()
    model.guides[0].set(F.normalize(torch.randn(4, 192), dim=1), torch.arange(4), torch.eye(4))
    images = torch.randn(1, 3, 64, 64)
    explanation = explain(model, model.backbone(images), images.shape[-2:])[0]
    with torch.no_grad():
        expected = float(model(images).pred_score)
    assert 0.5 + float(explanation.contributions.sum()) == pytest.approx(expected, abs=1e-5)
    assert explanation.contributions[:2].tolist() == [0, 0]  # the global guides do not enter the score
