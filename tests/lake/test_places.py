# SPDX-License-Identifier: Apache-2.0

"""Places beside the neurons: the formula, who decides, and that a misplaced piece is found in every way there is."""

import pytest
import torch

from anomalib_lake import LAKE, LAKEModel
from anomalib_lake.explain import explain
from anomalib_lake.extension import Extension
from anomalib_lake.places import WEIGHT, Places
from tests.helpers import TINY

SIZE = 64  # 4x4 patches


def part(seed: int, swapped: bool = False) -> torch.Tensor:
    """A part of sixteen pieces, each of its own pattern, in place; or with two of them swapped."""
    pieces = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 4 - 2
    order = list(range(16))
    if swapped:
        order[5], order[15] = order[15], order[5]
    rows = [torch.cat([pieces[number] for number in order[start : start + 4]], dim=2) for start in range(0, 16, 4)]
    return torch.cat(rows, dim=1) + torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 0.2


def scrambled(seed: int) -> torch.Tensor:
    """The same pieces in any order."""
    whole = part(seed).unfold(1, 16, 16).unfold(2, 16, 16).flatten(1, 2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
    return whole[:, order].unflatten(1, (4, 4)).permute(0, 1, 3, 2, 4).reshape(3, SIZE, SIZE)


def fitted(images: torch.Tensor, **arguments: object) -> LAKEModel:
    """A model fitted on them; its backbone draws no places into the tokens, so that only ours count."""
    torch.manual_seed(0)
    settings = {"layers": [3], "scales": [1], "pre_trained": False, "num_neurons": 20, "num_shifts": 1}
    model = LAKEModel(TINY, image_size=(SIZE, SIZE), **{**settings, **arguments})
    with torch.no_grad():
        model.backbone.vit.pos_embed.zero_()
    model.train()(images)
    model.fit()
    return model.eval()


@pytest.fixture(scope="module")
def parts() -> torch.Tensor:
    """Good parts."""
    return torch.stack([part(seed) for seed in range(4)])


def test_distance_is_that_of_tokens_and_places() -> None:
    """d^2 = |x - m|^2 + w |x|^2 |p - q|^2, places over the longer side of the grid."""
    places = Places(weight=2.0)
    tokens = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    places.fit([tokens], grid=(2, 4), references=[0, 1, 2])
    placed = places(tokens, 0, (2, 4))
    length = tokens.square().sum(dim=-1).mean()
    # patch 1 lies in row 0, column 1; patch 6 in row 1, column 2
    apart = (1 / 4) ** 2 + (1 / 4) ** 2
    expected = (tokens[0, 1] - tokens[2, 6]).square().sum() + 2 * length * apart
    assert torch.allclose((placed[0, 1] - placed[2, 6]).square().sum(), expected)
    assert torch.equal(places(tokens[0, [6]], 0, (2, 4), torch.tensor([6])), placed[0, [6]])


def test_what_decides_by_hand() -> None:
    """Two images whose outer patches have swapped places; every second patch, 0 and 2, is compared with the other's."""
    first = [0.0, 2.0, 1.0, 1.5]
    images = torch.tensor([first, [1.6, 2.1, 1.1, 0.1]])[..., None]
    places = Places(weight=1.0)
    places.fit([images], (1, 4), [0, 1])
    weight = images.square().mean()
    near, plain, placed = [], [], []
    for one, other in ((0, 1), (1, 0)):
        for patch in (0, 2):
            squares = [float((images[one, patch, 0] - images[other, q, 0]) ** 2) for q in range(4)]
            near.append(squares.index(min(squares)) == patch)
            plain.append(min(squares))
            placed.append(min(square + float(weight) * ((q - patch) / 4) ** 2 for q, square in enumerate(squares)))
    longest = [torch.tensor(squares).sqrt().quantile(0.99) for squares in (placed, plain)]
    share, factor = places.alignment([images], (1, 4), [0, 1])
    assert share == pytest.approx(sum(near) / 4)
    assert share == pytest.approx(0.5)
    assert factor == pytest.approx(float(longest[0] / longest[1]), rel=0.02)  # a quantile between squares, not lengths
    # The layer where it is worse counts.
    same = torch.cat([images[:1], images[:1] + 0.01])
    places.fit([same, images], (1, 4), [0, 1])
    assert places.alignment([same, images], (1, 4), [0, 1]) == pytest.approx((share, factor), rel=1e-4)


def test_good_images_decide(parts: torch.Tensor) -> None:
    """In place, places count; in any order they do not, nor of one image, nor where the user says so."""
    loose = torch.stack([scrambled(seed) for seed in range(4)])
    assert fitted(parts).places.scales.tolist() == pytest.approx([WEIGHT**0.5])  # tokens have unit length
    assert fitted(parts).banks[0][0].tokens.shape[1] == 22
    for other in (fitted(loose), fitted(parts[:1]), fitted(parts, place_weight=0.0), fitted(parts, num_rotations=4)):
        assert len(other.places.scales) == 0
        assert other.banks[0][0].tokens.shape[1] == 20
    assert fitted(loose, place_weight=4.0).places.scales.tolist() == pytest.approx([2.0])


def test_a_swapped_piece_deviates(parts: torch.Tensor) -> None:
    """Two swapped pieces look normal wherever they lie; with places, they are the two highest patches."""
    bad = part(9, swapped=True)[None]
    good = part(9)[None]
    settings = {"own_weight": 0.0, "top_patches": 1}
    without, model = fitted(parts, place_weight=0.0, **settings), fitted(parts, **settings)
    gain = model(bad).pred_score - model(good).pred_score
    assert gain > 2 * (without(bad).pred_score - without(good).pred_score).abs()
    assert gain > 0.1
    tokens, grid = model.tokens(bad)
    assert set(model.structural_deviation(tokens, grid)[0].topk(2).indices.tolist()) == {5, 15}


def test_explanation_sums_and_names_the_place(parts: torch.Tensor) -> None:
    """Neurons and places sum to the score, and the place has the largest share of a swapped piece."""
    model = fitted(parts, layers=[1, 3], scales=[1, 3])
    bad = part(9, swapped=True)[None]
    explanation = explain(model, model.backbone(bad), (SIZE, SIZE))[0]
    total = explanation.contributions.sum() + sum(explanation.other.values())
    assert float(total) == pytest.approx(float(model(bad).pred_score[0]), abs=1e-5)
    assert len(explanation.units) == len(explanation.contributions) == len(explanation.blocks) == 40
    assert explanation.other["place"] > 0
    without = fitted(parts, place_weight=0.0)
    assert "place" not in explain(without, without.backbone(bad), (SIZE, SIZE))[0].other


def test_shifted_copies_have_places(parts: torch.Tensor) -> None:
    """Copies come with the place of the patch that they show, so that the bank of images and copies is consistent."""
    model = fitted(parts, num_shifts=2, bank_size=None)
    bank = model.banks[0][0]
    at = torch.stack([bank.patch_indices // 4, bank.patch_indices % 4], dim=1) / 4 * model.places.scales[0]
    assert torch.allclose(bank.tokens[:, 20:], at)


def test_more_images_than_are_kept_in_full() -> None:
    """The first 32 images decide, the others go into the bank with their places."""
    model = fitted(torch.stack([part(seed) for seed in range(40)]), bank_size=None)
    bank = model.banks[0][0]
    assert bank.tokens.shape == (640, 22)
    assert torch.allclose(bank.tokens[:, 20], (bank.patch_indices // 4) / 4 * model.places.scales[0])


def test_extension_takes_places_in(parts: torch.Tensor) -> None:
    """Further images are placed as those before, and none of the known scores rises."""
    model = fitted(parts)
    before = model(parts).pred_score
    extension = Extension(model)
    extension.add(torch.stack([part(20), part(21)]))
    extension.finish()
    assert model.banks[0][0].tokens.shape == (96, 22)
    assert (model(parts).pred_score <= before + 1e-6).all()


def test_checkpoints(parts: torch.Tensor) -> None:
    """Places come with the state; one of before there were places loads as it was."""
    model, other = fitted(parts), fitted(parts[:2], place_weight=0.0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(parts).pred_score, model(parts).pred_score)
    plain = fitted(parts, place_weight=0.0)
    state = {name: value for name, value in plain.state_dict().items() if not name.startswith("places.")}
    other.load_state_dict(state)
    assert len(other.places.scales) == 0
    assert torch.equal(other(parts).pred_score, plain(parts).pred_score)


def test_a_second_fit_decides_anew(parts: torch.Tensor) -> None:
    """Nothing of an earlier product is left."""
    model = fitted(parts)
    model.train()(torch.stack([scrambled(seed) for seed in range(4)]))
    model.fit()
    assert len(model.places.scales) == 0
    assert model.banks[0][0].tokens.shape[1] == 20


def test_exported_equals_torch(parts: torch.Tensor) -> None:
    """A traced model has the places as torch has."""
    model = fitted(parts)
    bad = torch.stack([part(9, swapped=True), part(9)])
    program = torch.export.export(model, (bad,))
    assert torch.allclose(program.module()(bad).pred_score, model(bad).pred_score, atol=1e-5)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weight_out_of_range(weight: float) -> None:
    """Refused with the argument's name."""
    with pytest.raises(ValueError, match="place_weight"):
        LAKE(backbone=TINY, pre_trained=False, place_weight=weight)


def test_another_weight_than_the_checkpoint_has_is_refused() -> None:
    """It would do nothing: bank and threshold are of the weight that they were learned with."""

    def load(given: float | None, saved: float | None) -> None:
        model = LAKE(backbone=TINY, pre_trained=False, place_weight=given, visualizer=False)
        checkpoint = {"hyper_parameters": {"place_weight": saved, "own_weight": 0.3}, "state_dict": {}}
        model.on_load_checkpoint(checkpoint)

    for given, saved in ((None, None), (None, 10.0), (5.0, 5.0), (0.0, 0.0)):
        load(given, saved)
    for given, saved in ((0.0, None), (5.0, None), (5.0, 10.0)):
        with pytest.raises(ValueError, match=f"saved with place_weight={saved}, this model has place_weight={given}"):
            load(given, saved)


def test_not_beside_rotated_copies() -> None:
    """Parts in any direction have no places."""
    with pytest.raises(ValueError, match="Leave one of them out"):
        LAKEModel(TINY, pre_trained=False, num_rotations=8, place_weight=1.0)
