# SPDX-License-Identifier: Apache-2.0

"""Objects that always lie nearly in place, under changing light, good and with drawn defects.

Photographs that come with scikit-image; each image is turned by up to 3 degrees, moved and scaled by up to 2 %, 0.8 to
1.15 times as bright, with a camera's noise. ``variants`` is one product in three variants: cup, cat or rocket.

And round parts that lie in any direction: what such a photograph shows in a circle, on a grey ground, four pixels wide
for three high.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import skimage.data
from skimage.transform import AffineTransform, resize, warp

from tests.textures import DEFECTS, draw_defect

PHOTOS = {"cup": "coffee", "cat": "chelsea", "rocket": "rocket", "motorcycle": "stereo_motorcycle", "retina": "retina"}
VARIANTS = ("cup", "cat", "rocket")
CATEGORIES = (*PHOTOS, "variants")
SIZE = 256
STRENGTH = 0.6  # of the drawn defects: at full strength every method finds them all


@cache
def photo(category: str) -> np.ndarray:
    """The middle square of a photograph, a quarter larger than the images, in [0, 255]."""
    image = getattr(skimage.data, PHOTOS[category])()
    image = image[0] if isinstance(image, tuple) else image  # the left one of a stereo pair
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return resize(image[top : top + side, left : left + side, :3], (SIZE * 5 // 4,) * 2, anti_aliasing=True) * 255


def take(category: str, rng: np.random.Generator, defect: str | None = None) -> np.ndarray:
    """Take an image ``(SIZE, SIZE, 3)``, with one of :data:`tests.textures.DEFECTS` or none."""
    whole = photo(str(rng.choice(VARIANTS)) if category == "variants" else category)
    moved, light = rng.uniform(-0.02, 0.02, 2) * SIZE, rng.uniform(0.8, 1.15)
    return noisy(_spoiled(turned(whole, rng, 3, moved) * light, rng, defect), rng)


def take_round(category: str, rng: np.random.Generator, defect: str | None = None) -> np.ndarray:
    """Take an image ``(SIZE, SIZE * 4 / 3, 3)`` of a round part, with one of the defects or none."""
    part = _spoiled(turned(photo(category), rng, 180, (0, 0)), rng, defect)
    place = np.arange(SIZE) - (SIZE - 1) / 2
    inside = np.hypot(place, place[:, None]) < 0.42 * SIZE
    image = np.full((SIZE, SIZE * 4 // 3, 3), 110.0)
    top, left = (int(offset) for offset in rng.integers(-SIZE // 16, SIZE // 16, 2))
    rows, columns = np.nonzero(inside)
    image[rows + top, columns + left + SIZE // 6] = part[inside]
    return noisy(image * rng.uniform(0.8, 1.15), rng)


def turned(whole: np.ndarray, rng: np.random.Generator, degrees: float, moved: Sequence[float]) -> np.ndarray:
    """The middle of a photograph, turned by up to so many degrees and scaled by up to 2 %."""
    middle, scale = (len(whole) - 1) / 2, rng.uniform(0.98, 1.02)
    cut = AffineTransform(translation=((1 - SIZE) / 2,) * 2)
    turned = AffineTransform(rotation=np.deg2rad(rng.uniform(-degrees, degrees)), scale=scale, translation=moved)
    placed = AffineTransform(translation=(middle, middle))
    return warp(whole, cut + turned + placed, output_shape=(SIZE, SIZE), mode="edge")


def _spoiled(image: np.ndarray, rng: np.random.Generator, defect: str | None) -> np.ndarray:
    return image if defect is None else image + STRENGTH * (draw_defect(image, defect, rng)[0] - image)


def noisy(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As a camera takes it."""
    return (image + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)


def take_all(take: Callable[..., np.ndarray], category: str, good: int, bad: int) -> list[np.ndarray]:
    """Take good images, then bad ones, by one of the two functions above; always the same."""
    rng = np.random.default_rng([0, *category.encode()])
    return [
        *(take(category, rng) for _ in range(good)),
        *(take(category, rng, DEFECTS[index % len(DEFECTS)]) for index in range(bad)),
    ]
