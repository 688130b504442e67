# SPDX-License-Identifier: Apache-2.0

"""Small datasets of real texture photographs with drawn defects and their masks, always the same ones.

The photographs of brick, grass and gravel come with scikit-image. Training crops are cut from the upper half of a
photograph, test crops from the lower one, so that no test pixel has been seen in training.

    python -m tests.textures datasets/textures

writes them in MVTec AD's layout.
"""

import argparse
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from skimage.draw import disk, line
from skimage.filters import gaussian
from skimage.morphology import dilation
from skimage.morphology import disk as disk_footprint

CATEGORIES = ("brick", "grass", "gravel")
DEFECTS = ("hole", "scratch", "stain")


def crop(category: str, rng: np.random.Generator, size: int, upper: bool) -> np.ndarray:
    """A grey crop of a photograph, as an RGB array ``(size, size, 3)``."""
    photo = getattr(skimage.data, category)()
    half = photo.shape[0] // 2
    top = int(rng.integers(0, half - size + 1)) + (0 if upper else half)
    left = int(rng.integers(0, photo.shape[1] - size + 1))
    return np.stack([photo[top : top + size, left : left + size]] * 3, axis=-1)


def draw_defect(image: np.ndarray, defect: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one defect, 8 to 30 % of the image's side long, and return image and mask."""
    size = len(image)
    y, x = (int(position) for position in rng.integers(size // 5, size - size // 5, 2))
    mask = np.zeros((size, size), dtype=bool)
    bright = 225 if image.mean() < 128 or rng.random() < 0.3 else 30
    if defect == "scratch":
        angle, length = rng.uniform(0, np.pi), size * rng.uniform(0.1, 0.15)
        dy, dx = int(np.sin(angle) * length), int(np.cos(angle) * length)
        rows, columns = line(y - dy, x - dx, y + dy, x + dx)
        inside = (rows >= 0) & (rows < size) & (columns >= 0) & (columns < size)
        mask[rows[inside], columns[inside]] = True
        mask = dilation(mask, disk_footprint(max(1, size // 100)))
    else:
        mask[disk((y, x), size * rng.uniform(0.04, 0.08), shape=mask.shape)] = True
    strength = gaussian(mask.astype(float), 0.7)[..., None]
    # In a stain the texture stays, darker or brighter.
    drawn = image * 0.45 + bright * 0.55 if defect == "stain" else bright + rng.normal(0, 12, (size, size, 1))
    return (image + strength * (drawn - image)).clip(0, 255).astype(np.uint8), mask


def make_mvtec(
    root: Path,
    categories: tuple[str, ...] = CATEGORIES,
    train: int = 16,
    test: int = 24,
    size: int = 200,
    seed: int = 0,
    defects: tuple[str, ...] = DEFECTS,
) -> Path:
    """Write a dataset in MVTec AD's layout: per category ``train`` normal, ``test`` good and ``test`` bad images."""
    for category in categories:
        rng = np.random.default_rng([seed, *category.encode()])
        for folder, upper, count in (("train/good", True, train), ("test/good", False, test)):
            (root / category / folder).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                Image.fromarray(crop(category, rng, size, upper)).save(root / category / folder / f"{index:03}.png")
        for index in range(test):
            defect = defects[index % len(defects)]
            image, mask = draw_defect(crop(category, rng, size, upper=False), defect, rng)
            for kind, name, array in (
                ("test", f"{index:03}.png", image),
                ("ground_truth", f"{index:03}_mask.png", mask),
            ):
                path = root / category / kind / defect / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return root


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    print(make_mvtec(parser.parse_args().root))
