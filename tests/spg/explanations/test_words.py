# SPDX-License-Identifier: Apache-2.0

"""A decision in plain words: true of the image it is about."""

import pytest
import torch

from anomalib_spg.components.regions import Defect
from anomalib_spg.explanations.examples import Examples
from anomalib_spg.explanations.explanation import Explanation
from anomalib_spg.explanations.figures import plot_explanation
from anomalib_spg.explanations.words import in_words


def explanation(unit: str = "neuron", score: float = 0.8, peak: tuple[int, int] = (4, 4)) -> Explanation:
    """An explanation by one part, of an image of 9 x 9 patches."""
    part = torch.tensor([1])
    maps = torch.rand(1, 9, 9)
    return Explanation(unit, score, 0.0, part, part, torch.tensor([score]), maps, torch.rand(72, 72), peak)


@pytest.mark.parametrize(
    ("peak", "place"),
    [((0, 0), "at the top left"), ((4, 4), "in the middle"), ((3, 8), "at the right"), ((8, 5), "at the bottom")],
)
def test_place(peak: tuple[int, int], place: str) -> None:
    """By thirds of the image; an atom speaks for a defect, a neuron against a good part."""
    assert f"The framed place {place} looks least like a good part." in in_words(explanation(peak=peak), rejected=True)
    assert f"place {place} looks most like a defect" in in_words(explanation("atom", peak=peak), rejected=True)


@pytest.mark.parametrize(
    ("rejected", "below", "words"),
    [
        (True, (24, 24), "Rejected, because its score exceeds the threshold; all 24 known good parts score lower."),
        (True, (1, 1), "exceeds the threshold; 1 of 1 known good part scores lower."),
        (False, (5, 24), "Accepted, because its score does not exceed the threshold; 5 of 24 known good parts score"),
        (False, (0, 24), "threshold; none of 24 known good parts score lower."),
        (True, (0, 0), "Rejected, because its score exceeds the threshold. The"),
        (None, (0, 0), "Nothing is decided, because there is no threshold. The"),
    ],
)
def test_decision(rejected: bool | None, below: tuple[int, int], words: str) -> None:
    """Good parts are counted where any are known."""
    assert words in in_words(explanation(), rejected, below)
    assert "not a finite number" in in_words(explanation(score=float("nan")), rejected, below)


def test_defects() -> None:
    """How many, and how large; an accepted image has none, and none is spoken of."""
    found = [Defect((0, 0, 30, 20), 400, 0.9, []), Defect((50, 50, 52, 51), 2, 0.6, [])]
    assert in_words(explanation(), rejected=True, defects=found).endswith(
        "2 places are outlined as defects, the largest 30 x 20 pixels."
    )
    assert in_words(explanation(), rejected=True, defects=found[1:]).endswith(
        "One place is outlined as a defect, 2 x 1 pixels."
    )
    assert in_words(explanation(), rejected=True).endswith("so none is outlined.")
    assert "outlined" not in in_words(explanation(), rejected=False)


def test_in_the_picture() -> None:
    """Above the sum, with the nearest normal patch where that is shown."""
    words = in_words(explanation(), rejected=True, has_nearest=True)
    assert "the most similar place of a good part is shown beside it" in words
    figure = plot_explanation(explanation(), torch.zeros(72, 72, 3).byte().numpy(), patch_size=8, words=words)
    caption = figure.get_supxlabel()
    assert " ".join(caption.split()).startswith(f"{words} Raw score: ")


@pytest.mark.parametrize("mask", [slice(20, 30), slice(0, 72), slice(72, 80)], ids=["inside", "all of it", "empty"])
def test_what_is_called_outlined_is_outlined(mask: slice) -> None:
    """On the image and on its map, up to the border; without a defect there is no line."""
    pixels = torch.zeros(72, 72, dtype=torch.bool)
    pixels[mask, mask] = True
    plots = [
        plot_explanation(explanation(), torch.zeros(72, 72, 3).byte().numpy(), patch_size=8, mask=given).axes[:2]
        for given in (pixels, None)
    ]
    for axes, plain in zip(*plots, strict=True):
        assert axes.axis() == plain.axis()
        assert len(axes.collections) == 2 * bool(pixels.any())
        for line in axes.collections:
            corners = line.get_paths()[0].vertices
            assert corners.min() == pytest.approx(mask.start - 0.5, abs=0.01)
            assert corners.max() == pytest.approx(mask.stop - 0.5, abs=0.01)
    assert ("outlined" in plots[0][0].get_title()) == bool(pixels.any())


@pytest.mark.parametrize("aspect", [2.0, 1.0, 0.5])
@pytest.mark.parametrize("unit", ["atom", "neuron"])
def test_panels_have_the_proportions_of_the_image(unit: str, aspect: float) -> None:
    """Image, map, places and patches, of a square that the model sees; nothing lies over another panel."""
    examples = Examples(patch_size=8)
    examples.add(torch.rand(4, 3, 72, 72), [0.5] * 3, [0.5] * 3, aspects=[aspect] * 4)
    given = explanation(unit)
    if unit == "atom":
        examples.patches[1, 1] = [(number, 30) for number in range(4)]
    else:
        given.nearest = (2, 30, 3)
    square = torch.zeros(72, 72, 3).byte().numpy()
    figure = plot_explanation(given, square, examples, patch_size=8, pixel_aspect=aspect)
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.images]
    boxes = [axes.get_window_extent() for axes in panels]
    right = [4 * aspect + 0.3] if unit == "atom" else [aspect] * 2  # four cuts of 40 pixels a side, and gaps of 4
    assert [box.width / box.height for box in boxes] == pytest.approx([aspect] * 3 + right, rel=0.02)
    assert not any(box.count_overlaps([other]) for box in boxes for other in boxes if other is not box)


@pytest.mark.parametrize("drawn", [False, True])
def test_drawn_anomalies_are_called_so(drawn: bool) -> None:
    """In the title of the training patches, where the images are known to have them."""
    examples = Examples(patch_size=8)
    examples.add(torch.rand(1, 3, 72, 72), [0.5] * 3, [0.5] * 3)
    examples.patches[1, 1] = [(0, 30)]
    examples.drawn = drawn
    figure = plot_explanation(explanation("atom"), torch.zeros(72, 72, 3).byte().numpy(), examples, patch_size=8)
    title = "max-activating training patches" + " (with drawn anomalies)" * drawn
    assert title in [axes.get_title() for axes in figure.axes]
