# SPDX-License-Identifier: Apache-2.0

"""Parts of several pieces in place, good and with a piece that is missing, swapped or of the wrong kind.

``plate`` has screws of two kinds in eight of twelve holes, ``wires`` eight wires in a connector, ``tray`` four
photographs, ``coins`` is the photograph of coins that comes with scikit-image. What a defect shows is mostly normal at
another place of the part. Turned, moved, lit and noisy as tests/objects.py has it; the screws' slots point anywhere,
and the wires' waves differ.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import skimage.data
from scipy.ndimage import binary_fill_holes
from skimage.draw import disk, polygon
from skimage.filters import gaussian
from skimage.measure import label, regionprops
from skimage.transform import resize

from tests import objects

SIDE = 320  # of the drawing, of which an image shows the middle
SCREWS = ("slot", "slot", "", "cross", "", "cross", "slot", "slot", "cross", "", "slot", "")  # none: an empty hole
COLORS = np.array([(190, 40, 40), (40, 70, 180), (40, 150, 60), (220, 200, 50), (240, 240, 240), (30, 30, 30)])
WIRES = (0, 1, 2, 3, 1, 4, 5, 0)
PHOTOS = ("cup", "rocket", "cat", "cup")


def plate(rng: np.random.Generator, defect: str | None) -> np.ndarray:
    """A metal plate with screws: one is missing, one too many, or of the other kind."""
    image, screws = _metal(rng, 120, 6), list(SCREWS)
    filled = [index for index, kind in enumerate(screws) if kind]
    if defect == "missing":
        screws[rng.choice(filled)] = ""
    elif defect == "added":
        screws[rng.choice([index for index, kind in enumerate(screws) if not kind])] = "slot"
    elif defect == "wrong":
        index = rng.choice(filled)
        screws[index] = "cross" if screws[index] == "slot" else "slot"
    for index, kind in enumerate(screws):
        y, x = np.array([80 + 80 * (index // 4), 65 + 63 * (index % 4)]) + rng.uniform(-1.5, 1.5, 2)
        rings = ((15, 0, 180), (11, -2, 204)) if kind else ((11, 0, 45), (8, 2, 28))
        for radius, offset, grey in rings:
            image[disk((y + offset, x + offset), radius)] = grey
        angle = rng.uniform(0, np.pi)
        for turn in {"": (), "slot": (0,), "cross": (0, np.pi / 2)}[kind]:
            along = np.array([np.sin(angle + turn), np.cos(angle + turn)])
            across = along[::-1] * (1, -1)
            corners = [(y, x) + along * 11 * a + across * 2 * b for a, b in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
            image[polygon(*np.array(corners).T)] = 60
    return image


def wires(rng: np.random.Generator, defect: str | None) -> np.ndarray:
    """Wires in a connector: one is missing, of another colour, or swapped with its neighbour."""
    image, order = _metal(rng, 95, 3), list(WIRES)
    image[200:270, 40:280] = (70, 110, 90)
    chosen = int(rng.integers(0, 7))
    if defect == "swapped":
        order[chosen], order[chosen + 1] = order[chosen + 1], order[chosen]
    elif defect == "wrong":
        order[chosen] = (order[chosen] + 1 + int(rng.integers(0, 5))) % 6
    for index, color in enumerate(order):
        middle, wave, phase = 58 + 29 * index, rng.uniform(2, 7), rng.uniform(0, 6)
        image[205:225, middle - 8 : middle + 8] = (150, 150, 140)
        for y in range(48, 222) if (defect, index) != ("missing", chosen) else ():
            x = middle + wave * np.sin(y / 30 + phase) * min(1, (222 - y) / 60)
            columns = np.arange(int(x - 6), int(x + 7))
            image[y, columns] = COLORS[color] * (1 - 0.5 * ((columns - x) / 7) ** 2)[:, None]
    return image


def tray(rng: np.random.Generator, defect: str | None) -> np.ndarray:
    """Four photographs in a tray: one is missing, another one, or swapped with a different one."""
    image, names = _metal(rng, 150, 3), list(PHOTOS)
    chosen = int(rng.integers(0, 4))
    others = [name for name in ("cup", "rocket", "cat") if name != names[chosen]]
    if defect == "swapped":
        other = rng.choice([index for index, name in enumerate(names) if name != names[chosen]])
        names[chosen], names[other] = names[other], names[chosen]
    elif defect == "wrong":
        names[chosen] = str(rng.choice(others))
    for index, name in enumerate(names):
        top, left = np.array(divmod(index, 2)) * 120 + 45 + rng.integers(-3, 4, 2)
        place = image[top : top + 110, left : left + 110]
        place[:] = 0.85 * place if (defect, index) == ("missing", chosen) else _small(name)
    return image


def coins(rng: np.random.Generator, defect: str | None) -> np.ndarray:
    """Two dozen coins on a dark ground: one is missing, or two are swapped."""
    image, boxes = _coins()
    one, other = rng.choice(len(boxes), 2, replace=False)
    if defect == "missing":
        inside = _oval(image, boxes[one], 1.3)
        top, left, bottom, right = boxes[one]
        ground = np.percentile(image[max(0, top - 8) : bottom + 8, max(0, left - 8) : right + 8], 10)
        image = image + inside * (ground + 8 * gaussian(rng.normal(0, 1, image.shape), 1) - image)
    elif defect == "swapped":
        before = image
        for to, of in ((one, other), (other, one)):
            top, left, bottom, right = boxes[to]
            piece = np.zeros_like(image)
            coin = before[boxes[of][0] : boxes[of][2], boxes[of][1] : boxes[of][3]]
            piece[top:bottom, left:right] = resize(coin, (bottom - top, right - left), anti_aliasing=True)
            image = image + _oval(image, boxes[to], 0.95) * (piece - image)
    return np.repeat(resize(image, (SIDE, SIDE), anti_aliasing=True)[..., None], 3, axis=2)


MAKERS: dict[str, tuple[Callable[[np.random.Generator, str | None], np.ndarray], tuple[str, ...]]] = {
    "plate": (plate, ("missing", "added", "wrong")),
    "wires": (wires, ("missing", "swapped", "wrong")),
    "tray": (tray, ("missing", "swapped", "wrong")),
    "coins": (coins, ("missing", "swapped")),
}
CATEGORIES = tuple(MAKERS)


def take(category: str, rng: np.random.Generator, defect: str | None = None) -> np.ndarray:
    """Take an image of the size of those in tests/objects.py."""
    whole = MAKERS[category][0](rng, defect).clip(0, 255)
    moved, light = rng.uniform(-0.02, 0.02, 2) * objects.SIZE, rng.uniform(0.8, 1.15)
    return objects.noisy(objects.turned(whole, rng, 3, moved) * light, rng)


def take_all(category: str, good: int, bad: int) -> list[np.ndarray]:
    """Take good images, then bad ones; always the same."""
    rng, defects = np.random.default_rng([0, *category.encode()]), MAKERS[category][1]
    return [take(category, rng, None if index < good else defects[index % len(defects)]) for index in range(good + bad)]


def _metal(rng: np.random.Generator, grey: float, grain: float) -> np.ndarray:
    """Brushed metal."""
    noise = gaussian(rng.normal(0, 1, (SIDE, SIDE)), (0.7, 6))
    return np.repeat((grey + noise / noise.std() * grain)[..., None], 3, axis=2)


@cache
def _small(name: str) -> np.ndarray:
    return resize(objects.photo(name), (110, 110), anti_aliasing=True)


@cache
def _coins() -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """The photograph, and the boxes of the coins that every image shows."""
    image = skimage.data.coins().astype(float)
    mask = gaussian(binary_fill_holes(gaussian(image, 2) > 115).astype(float), 3) > 0.5
    size = np.array(image.shape)
    shown = [region for region in regionprops(label(mask)) if np.all(np.abs(region.centroid / size - 0.5) < 0.33)]
    return image, [region.bbox for region in shown if region.area > 700]


def _oval(image: np.ndarray, box: tuple[int, int, int, int], size: float) -> np.ndarray:
    """1 in the oval of a box, 0 outside, with a soft edge."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    top, left, bottom, right = box
    y, x = (2 * rows - top - bottom) / (bottom - top), (2 * columns - left - right) / (right - left)
    return gaussian((np.hypot(y, x) < size).astype(float), 1.5)
