# SPDX-License-Identifier: Apache-2.0

"""Two small datasets of textures with drawn defects and their masks, always the same ones.

    python -m tests.textures datasets

writes photographs of brick, grass and gravel in MVTec AD's layout to ``datasets/textures_mvtec``, and textile
(simulated, from conformal-clip-data), tissue and moon in VisA's to ``datasets/textures_visa``. Photographs come with
scikit-image. Training crops are cut from the upper half of a photograph, test crops from the lower one, so that no test
pixel has been seen in training.
"""

import argparse
import csv
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image
from skimage.draw import disk, line
from skimage.filters import gaussian
from skimage.morphology import dilation
from skimage.morphology import disk as disk_footprint

CATEGORIES = ("brick", "grass", "gravel")
VISA_CATEGORIES = ("textile", "tissue", "moon")
DEFECTS = ("hole", "scratch", "stain")


@cache
def photo(category: str) -> np.ndarray:
    """The photograph of a category as RGB; of the textile, four rows of four images side by side."""
    if category == "textile":
        folder = distribution("conformal-clip-data").locate_file(
            "conformal_clip_data/data/textile_images/simulated/nominal",
        )
        paths = sorted(Path(str(folder)).iterdir(), key=lambda path: path.name)[-16:]
        tiles = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
        return np.concatenate([np.concatenate(tiles[row : row + 4], axis=1) for row in range(0, 16, 4)])
    array = {"tissue": skimage.data.immunohistochemistry}.get(category, getattr(skimage.data, category, None))()
    return array if array.ndim == 3 else np.stack([array] * 3, axis=-1)


def crop(category: str, rng: np.random.Generator, size: int, upper: bool) -> np.ndarray:
    """A crop ``(size, size, 3)`` of a photograph's upper or lower half."""
    whole = photo(category)
    half = whole.shape[0] // 2
    if category == "textile":  # no crop runs over the seams
        tile = int(rng.integers(0, 8))
        top, left = (int(offset) for offset in rng.integers(0, 250 - size + 1, 2))
        top, left = top + tile // 4 * 250 + (0 if upper else half), left + tile % 4 * 250
    else:
        top = int(rng.integers(0, half - size + 1)) + (0 if upper else half)
        left = int(rng.integers(0, whole.shape[1] - size + 1))
    return whole[top : top + size, left : left + size]


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


def make_visa(
    root: Path,
    categories: tuple[str, ...] = VISA_CATEGORIES,
    train: int = 16,
    test: int = 24,
    size: int = 200,
    seed: int = 0,
    defects: tuple[str, ...] = DEFECTS,
) -> Path:
    """Write a dataset in VisA's layout, both as it is distributed and as anomalib splits it.

    anomalib makes ``visa_pytorch`` from the rest itself, but for VisA's own categories only.
    """
    rows = []
    for category in categories:
        rng = np.random.default_rng([seed, *category.encode()])
        split = root / "visa_pytorch" / category

        def save(array: np.ndarray, path: str, copy: Path, category: str = category) -> str:
            name = f"{category}/Data/{path}"
            for target in (root / name, copy):
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(target, quality=95)
            return name

        for index in range(train + test):
            name, part = f"{index:04}.JPG", "train" if index < train else "test"
            image = crop(category, rng, size, upper=part == "train")
            name = save(image, f"Images/Normal/{name}", split / part / "good" / name)
            rows.append((category, part, "normal", name, ""))
        for index in range(test):
            image, mask = draw_defect(crop(category, rng, size, upper=False), defects[index % len(defects)], rng)
            stem = f"{index:03}"
            name = save(image, f"Images/Anomaly/{stem}.JPG", split / "test/bad" / f"{stem}.JPG")
            mask_name = save(mask, f"Masks/Anomaly/{stem}.png", split / "ground_truth/bad" / f"{stem}.png")
            rows.append((category, "test", "anomaly", name, mask_name))
    (root / "split_csv").mkdir(parents=True, exist_ok=True)
    with (root / "split_csv" / "1cls.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("object", "split", "label", "image", "mask"), *rows])
    return root


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    folder = parser.parse_args().root
    print(make_mvtec(folder / "textures_mvtec"), make_visa(folder / "textures_visa"))
