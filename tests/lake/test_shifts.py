# SPDX-License-Identifier: Apache-2.0

"""Shifted copies of normal images: where their pixels and patches come from, and what the bank makes of them."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_lake.bank import k_center_greedy
from anomalib_lake.shifts import shift, shifted_patches, shifts
from tests.lake.test_rotations import build


def test_shift() -> None:
    """Pixels further down and right; the mirror image beyond the edge."""
    image = torch.arange(30.0).view(1, 5, 6)
    moved = shift(image, 2, 1)
    assert torch.equal(moved[:, :3, :5], image[:, 2:, 1:])
    assert torch.equal(moved[:, 3:, :5], image[:, 2:4, 1:].flip(1))
    assert torch.equal(moved[:, :3, 5], image[:, 2:, 4])
    assert shifts(1, 16) == []
    assert shifts(3, 14) == [(0, 5), (0, 9), (5, 0), (5, 5), (5, 9), (9, 0), (9, 5), (9, 9)]


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize(("down", "right"), [(8, 0), (0, 8), (8, 8)])
@pytest.mark.parametrize(("height", "width"), [(64, 80), (57, 80)])
def test_patches_of_a_copy(height: int, width: int, down: int, right: int, scale: int) -> None:
    """By an image that is marked where it is mirrored or padded, and by the pixels' places."""
    side = 16
    rows, columns = -(-height // side), -(-width // side)
    shown, inside = shifted_patches((rows, columns), down, right, scale, side, (height, width))
    outside = torch.zeros(1, 1, rows * side, columns * side)
    outside[..., max(height - down, 0) :, :] = 1
    outside[..., max(width - right, 0) :] = 1
    window = {"kernel_size": scale * side, "stride": side, "padding": (scale - 1) * side // 2}
    assert torch.equal(inside, F.max_pool2d(outside, **window).flatten() == 0)
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    places = shift(torch.stack([y, x]).float(), down, right)[:, ::side, ::side].flatten(1) // side
    assert torch.equal(shown[inside], (places[0] * columns + places[1]).long()[inside])


def test_bank_by_hand() -> None:
    """Images and copies, thinned to the images' number of tokens; scale and scores without an image's own copies."""
    images = torch.randn(2, 3, 64, 64)
    model = build(num_shifts=2)
    model.train()(images)
    left_out = model.fit()
    bank = model.banks[0][0]

    def projected(image: torch.Tensor) -> torch.Tensor:
        tokens, _ = model.tokens(image[None])
        return model.neurons[0].normalize(model.neurons[0].project(tokens[5]))[0]

    whole = torch.arange(16).view(4, 4)
    of_image = []
    for image in images:
        tokens, patches = [projected(image)], [whole.flatten()]
        for (down, right), part in (((0, 8), whole[:, :3]), ((8, 0), whole[:3]), ((8, 8), whole[:3, :3])):
            tokens.append(projected(shift(image, down, right))[part.flatten()])
            patches.append(part.flatten())
        of_image.append((torch.cat(tokens), torch.cat(patches)))
    tokens, patches = (torch.cat(values) for values in zip(*of_image, strict=True))
    numbers = torch.arange(2).repeat_interleave(len(tokens) // 2)
    chosen, _ = k_center_greedy(tokens, 32)
    torch.testing.assert_close(bank.tokens, tokens[chosen], atol=1e-5, rtol=1e-4)
    assert torch.equal(bank.patch_indices, patches[chosen])
    assert torch.equal(bank.image_indices, numbers[chosen])
    distances = torch.stack([torch.cdist(projected(images[i]), of_image[1 - i][0]).amin(dim=1) for i in (0, 1)])
    scale = distances.quantile(0.99)
    torch.testing.assert_close(bank.distance_scale, scale, atol=1e-4, rtol=1e-3)
    others = [tokens[chosen][numbers[chosen] != i] for i in (0, 1)]
    distances = torch.stack([torch.cdist(projected(images[i]), others[i]).amin(dim=1) for i in (0, 1)])
    deviation = distances.amax(dim=1) / scale * 0.5**0.09
    torch.testing.assert_close(left_out.pred_score, deviation / (1 + deviation), atol=1e-4, rtol=1e-3)


def test_half_a_patch_matters() -> None:
    """What lies half a patch further deviates less."""
    images = torch.randn(2, 3, 64, 64)
    deviations = []
    for count in (1, 2):
        model = build(num_shifts=count)
        model.train()(images)
        model.fit()
        deviations.append(model.eval().structural_deviation(*model.tokens(shift(images[0], 8, 8)[None]))[0])
    inside = torch.arange(16).view(4, 4)[:3, :3].flatten()
    assert deviations[1][inside].mean() < 0.7 * deviations[0][inside].mean()


@pytest.mark.parametrize("rotations", [1, 3])
def test_no_copies(rotations: int) -> None:
    """Not of one image alone, nor beside rotated ones."""
    images = torch.randn(1 if rotations == 1 else 3, 3, 64, 64)
    states = []
    for count in (1, 2):
        model = build(num_rotations=rotations, num_shifts=count)
        model.train()(images)
        model.fit()
        states.append(model.banks[0][0].tokens)
    assert torch.equal(*states)


@pytest.mark.parametrize("count", [4, 16, 17, 40])
def test_few_images_only(count: int) -> None:
    """However they come; of more than 16 none has copies, since the images themselves fill the bank."""
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = {}
    for shifts_, size in ((2, count), (2, 1), (1, count)):
        model = build(num_shifts=shifts_, image_size=(32, 32))
        for part in images.split(size):
            model.train()(part)
        model.fit()
        bank = model.banks[0][0]
        assert len(bank.tokens) == 4 * count
        tokens[shifts_, size] = bank.tokens[bank.tokens[:, 0].argsort()]
    torch.testing.assert_close(tokens[2, count], tokens[2, 1], atol=1e-5, rtol=1e-4)
    assert torch.allclose(tokens[2, count], tokens[1, count], atol=1e-4) == (count > 16)


def test_what_is_refused() -> None:
    """Tokens that are stored have no copies, and a patch no more places than pixels."""
    model = build(num_shifts=2)
    tokens, grid = model.tokens(torch.randn(2, 3, 64, 64))
    model.store(tokens, grid, (64, 64))
    with pytest.raises(ValueError, match="num_shifts=2 needs images"):
        model.fit()
    for count in (0, 17):
        with pytest.raises(ValueError, match=f"num_shifts={count} must lie between 1, .* and 16"):
            build(num_shifts=count)


def test_memory() -> None:
    """Copies are in what is said before they are made, where there are any."""
    assert build(num_shifts=3).memory_need(4) > build(num_shifts=2).memory_need(4) > build().memory_need(4)
    assert build(num_shifts=2).memory_need(17) == build().memory_need(17)


def test_images_that_are_the_same() -> None:
    """No scale can be told from them, whatever their copies show."""
    model = build(num_shifts=2)
    model.train()(torch.randn(1, 3, 64, 64).expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match="copies of each other"):
        model.fit()
