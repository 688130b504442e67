# SPDX-License-Identifier: Apache-2.0

"""Rotated copies of normal images: where their pixels and patches come from, and what the bank makes of them."""

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_lake import LAKEModel
from anomalib_lake import torch_model as module
from anomalib_lake.explain import explain
from anomalib_lake.extension import Extension
from anomalib_lake.rotations import rotate, shown_patches

TINY = "vit_tiny_patch16_224"


def build(**arguments: object) -> LAKEModel:
    """A model of one layer and single patches, compared with the bank alone."""
    given = {"layers": [5], "scales": [1], "num_neurons": 20, "bank_size": None, "own_weight": 0, "top_patches": 1}
    given["num_shifts"] = 1
    torch.manual_seed(0)
    return LAKEModel(TINY, **{"pre_trained": False, "image_size": (64, 64), **given, **arguments})


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarters_are_exact(quarters: int) -> None:
    """Against torch.rot90, pixels and patches."""
    image = torch.rand(3, 8, 8)
    torch.testing.assert_close(rotate(image, 90 * quarters), image.rot90(quarters, (1, 2)))
    shown, inside = shown_patches((4, 4), 90 * quarters)
    assert torch.equal(shown.view(4, 4), torch.arange(16).view(4, 4).rot90(quarters))
    assert inside.all()


@pytest.mark.parametrize("pixel_aspect", [1.0, 2.0, 0.6])
@pytest.mark.parametrize("angle", [30.0, 90.0, 200.0])
def test_rotation_of_a_squeezed_image(angle: float, pixel_aspect: float) -> None:
    """A pattern of the real part, rotated by formula, then squeezed."""
    height, width = 60, 80
    y, x = torch.meshgrid(torch.arange(height) + 0.5 - height / 2, torch.arange(width) + 0.5 - width / 2, indexing="ij")
    x = x * pixel_aspect

    def part(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (0.11 * x).sin() + (0.07 * y).cos()

    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    from_x, from_y = cosine * x - sine * y, sine * x + cosine * y  # y points down
    inside = (from_x.abs() < (width / 2 - 1) * pixel_aspect) & (from_y.abs() < height / 2 - 1)
    found = rotate(part(x, y)[None], angle, pixel_aspect)[0]
    assert inside.any()
    torch.testing.assert_close(found[inside], part(from_x, from_y)[inside], atol=0.01, rtol=0)


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("pixel_aspect", [1.0, 1.5])
def test_patches_of_a_copy(scale: int, pixel_aspect: float) -> None:
    """By an image of the pixels' places, and one whose edge is marked: no window inside reaches it, most others do."""
    (rows, columns), side, angle = (6, 8), 21, 25
    shown, inside = shown_patches((rows, columns), angle, scale, pixel_aspect)
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    places = rotate(torch.stack([y, x]) + 0.5, angle, pixel_aspect)[:, side // 2 :: side, side // 2 :: side] / side
    expected = (places[0].floor() * columns + places[1].floor()).flatten()
    assert torch.equal(shown[inside], expected[inside].long())
    edge = torch.ones(1, rows * side, columns * side)
    edge[:, 2:-2, 2:-2] = 0
    window = {"kernel_size": scale * side, "stride": side, "padding": (scale - 1) * side // 2}
    reached = F.max_pool2d(rotate(edge, angle, pixel_aspect)[None], **window).flatten() > 0.1
    by_own_edge = torch.ones(rows, columns, dtype=torch.bool)  # there the copy's edge may show the image's
    by_own_edge[scale // 2 + 1 : -scale // 2, scale // 2 + 1 : -scale // 2] = False
    assert not (reached & inside & ~by_own_edge.flatten()).any()
    assert reached[~inside].float().mean() > 0.7
    assert 0 < inside.sum() < rows * columns


def test_rotated_parts_do_not_deviate() -> None:
    """A quarter turn of a normal image is in the bank with four rotations, and deviates without."""
    images = torch.randn(2, 3, 64, 64)
    turned = images.rot90(1, (2, 3))
    for rotations, limit in ((1, None), (4, 1e-3)):
        model = build(num_rotations=rotations)
        model.train()(images)
        model.fit()
        deviation = model.eval().structural_deviation(*model.tokens(turned))
        assert deviation.amax() < limit if limit else deviation.amin() > 0.1
        assert len(model.banks[0][0].tokens) == 2 * 16 * rotations


def test_an_image_is_not_compared_with_its_own_copies() -> None:
    """Scale and scores of the normal images, worked out from the quarters of the other one."""
    images = torch.randn(2, 3, 64, 64)
    model = build(num_rotations=4)
    model.train()(images)
    left_out = model.fit()

    def projected(images: torch.Tensor) -> torch.Tensor:
        tokens, _ = model.tokens(images)
        return model.neurons[0].normalize(model.neurons[0].project(tokens[5]))

    other = [projected(torch.stack([image.rot90(k, (1, 2)) for k in range(4)])).flatten(0, 1) for image in images]
    distances = torch.stack([torch.cdist(projected(images[i : i + 1])[0], other[1 - i]).amin(dim=1) for i in (0, 1)])
    scale = distances.quantile(0.99)
    torch.testing.assert_close(model.banks[0][0].distance_scale, scale, atol=1e-4, rtol=1e-3)
    deviation = distances.amax(dim=1) / scale * 0.5**0.09
    torch.testing.assert_close(left_out.pred_score, deviation / (1 + deviation), atol=1e-4, rtol=1e-3)


def test_nearest_patch_is_shown_where_it_lies_in_the_image() -> None:
    """Of a quarter turn of a normal image the nearest patch is the one it was before it was turned."""
    images = torch.randn(2, 3, 64, 64)
    model = build(num_rotations=4)
    model.train()(images)
    model.fit()
    turned = images[:1].rot90(1, (2, 3))
    explanation = explain(model.eval(), model.backbone(turned), (64, 64))[0]
    row, column = explanation.peak
    assert explanation.nearest == (0, int(torch.arange(16).view(4, 4).rot90(1)[row, column]), 1)


def test_copies_of_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that come after the neurons are chosen are rotated, too; a bank with a size stays within it."""
    monkeypatch.setattr(module, "SAMPLE", 10)
    images = torch.randn(14, 3, 64, 64)
    model = build(num_rotations=3)
    for batch in images.split(4):
        model.train()(batch)
    model.fit()
    bank = model.banks[0][0]
    counts = bank.image_indices.bincount()
    assert len(counts) == 14
    assert counts.unique().tolist() == [16 + 2 * int(shown_patches((4, 4), 120)[1].sum())]
    assert bank.patch_indices.amax() < 16
    small = build(num_rotations=3, bank_size=50)
    small.train()(images)
    small.fit()
    assert len(small.banks[0][0].tokens) == 50
    assert small.memory_need(14) > build(bank_size=50).memory_need(14)


def test_tokens_alone_cannot_be_rotated() -> None:
    """Nothing is left out in silence."""
    model = build(num_rotations=4)
    tokens, grid = model.tokens(torch.randn(2, 3, 64, 64))
    model.store(tokens, grid, (64, 64))
    with pytest.raises(ValueError, match="num_rotations=4 needs images"):
        model.fit()
    with pytest.raises(ValueError, match="num_rotations=0 must be at least 1"):
        build(num_rotations=0)


def test_extension_takes_copies() -> None:
    """A quarter turn of an image that was taken in does not deviate."""
    model = build(num_rotations=4)
    model.train()(torch.randn(2, 3, 64, 64))
    model.fit()
    new = torch.randn(1, 3, 64, 64)
    turned = new.rot90(3, (2, 3))
    before = model.eval().structural_deviation(*model.tokens(turned)).amin()
    extension = Extension(model)
    extension.add(new)
    left_out = extension.left_out().pred_score
    extension.finish()
    assert before > 0.1
    assert model.structural_deviation(*model.tokens(turned)).amax() < 1e-3
    torch.testing.assert_close(left_out > 0.1, torch.tensor([True]))


@pytest.mark.parametrize("angle", [90.0, 180.0, 60.0])
def test_patches_of_an_image_with_padding(angle: float) -> None:
    """By an image of the pixels' places, of no whole number of patches: it turns about its own middle."""
    (height, width), side = (80, 92), 16
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    copy = rotate(torch.stack([y, x]), angle)
    grid = (math.ceil(height / side), math.ceil(width / side))
    shown, inside = shown_patches(grid, angle, extent=(height / side, width / side))
    assert inside.any()
    for patch in inside.nonzero().flatten().tolist():
        row, column = patch // grid[1] * side, patch % grid[1] * side
        seen = copy[:, row : row + side, column : column + side]
        if seen.shape[1:] == (side, side):
            place = (seen.mean(dim=(1, 2)) / side).floor().long()
            assert int(place[0] * grid[1] + place[1]) == int(shown[patch])
