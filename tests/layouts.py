# SPDX-License-Identifier: Apache-2.0

"""Tiny datasets in the on-disk layouts of those that anomalib has datamodules of: plain images, a bright square each.

Each maker writes three good images to learn from, two good and two bad ones to test, and masks where the dataset has
them; where it has a validation set, two good images, too.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

SIZE = 32


def picture(path: Path, mark: int = 0) -> Path:
    """A grey image, with a bright square where ``mark`` is not 0."""
    array = np.full((SIZE, SIZE, 3), 90, np.uint8)
    array[8 : 8 + mark, 8 : 8 + mark] = 220
    array[0, 0] = len(str(path)) % 250  # not of a single colour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def mask(path: Path, mark: int) -> Path:
    """The mask of that square."""
    array = np.zeros((SIZE, SIZE), np.uint8)
    array[8 : 8 + mark, 8 : 8 + mark] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def folders(root: Path, bad: str, suffix: str = "png") -> None:
    """``train/good``, ``test/good`` and ``test/<bad>``."""
    for folder, count, mark in (("train/good", 3, 0), ("test/good", 2, 0), (f"test/{bad}", 2, 10)):
        for index in range(count):
            picture(root / folder / f"{index:03}.{suffix}", mark)


def mpdd(root: Path, category: str) -> None:
    """One mask for each bad image."""
    folders(root / category, "scratch")
    for index in range(2):
        mask(root / category / f"ground_truth/scratch/{index:03}_mask.png", 10)


def vad(root: Path, category: str) -> None:
    """No masks, and bad images to learn from, too."""
    folders(root / category, "bad")
    picture(root / category / "train/bad/100.png", 10)


def autovi(root: Path, category: str) -> None:
    """A folder of masks for each bad image."""
    folders(root / category, "missing")
    for index in range(2):
        mask(root / category / f"ground_truth/missing/{index:03}/0000.png", 10)


def mvtec_loco(root: Path, category: str) -> None:
    """Several masks for a bad image, and good images for validation."""
    folders(root / category, "logical_anomalies")
    for index in range(2):
        picture(root / category / f"validation/good/{index:03}.png")
        for part in range(index + 1):
            mask(root / category / f"ground_truth/logical_anomalies/{index:03}/{part:03}.png", 4 + part)


def mvtec_ad_2(root: Path, category: str) -> None:
    """A public test set with masks, private ones without labels, good images for validation."""
    for folder, count in (("train/good", 3), ("validation/good", 2), ("test_public/good", 2), ("test_private", 1)):
        for index in range(count):
            picture(root / category / folder / f"{index:03}_regular.png")
    picture(root / category / "test_private_mixed/000_mixed.png")
    for index in range(2):
        picture(root / category / f"test_public/bad/{index:03}_regular.png", 10)
        mask(root / category / f"test_public/ground_truth/bad/{index:03}_regular_mask.png", 10)


def real_iad(root: Path, category: str, resolution: str = "512") -> None:
    """A JSON file names images and masks."""
    folder = Path(f"realiad_{resolution}")
    parts: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for part, label, count in (("train", "OK", 3), ("test", "OK", 2), ("test", "NG", 2)):
        for index in range(count):
            name = f"{label}/S{index:04}_{part}_C1.jpg"
            picture(root / folder / category / name, 10 if label == "NG" else 0)
            entry = {"category": category, "anomaly_class": label, "view": "C1", "image_path": name, "mask_path": ""}
            if label == "NG":
                entry["mask_path"] = name.replace(".jpg", ".png")
                mask(root / folder / category / entry["mask_path"], 10)
            parts[part].append(entry)
    path = root / "realiad_jsons/realiad_jsons" / f"{category}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"normal_class": "OK", "prefix": f"{category}/"}
    path.write_text(json.dumps({"meta": meta, **parts}), encoding="utf-8")


def kaputt(root: Path, category: str) -> None:
    """Tables name images and masks; written as CSV, see :func:`read_parquet`. Bad images to learn from, too."""
    for split, good, bad in (("train", 3, 1), ("validation", 2, 1), ("test", 2, 2)):
        rows = []
        for index in range(good + bad):
            is_bad = index >= good
            image, mask_path = f"data/{split}/query-data/image/{index}.jpg", f"data/{split}/query-data/mask/{index}.png"
            picture(root / "query-image" / image, 10 if is_bad else 0)
            mask(root / "query-mask" / mask_path, 10 if is_bad else 0)
            rows.append({
                "capture_id": f"{split}{index}",
                "defect": is_bad,
                "item_material": category,
                "defect_types": "hole" if is_bad else "",
                "query_image": image,
                "query_crop": image,
                "query_mask": mask_path,
            })
        path = root / "datasets" / f"query-{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(path, index=False)


def read_parquet(path: Path) -> pd.DataFrame:
    """In the place of pandas' own, which needs pyarrow, an option of anomalib."""
    return pd.read_csv(path, keep_default_na=False)


LAYOUTS: dict[str, Callable[[Path, str], None]] = {
    "AutoVI": autovi,
    "Kaputt": kaputt,
    "MPDD": mpdd,
    "MVTecAD2": mvtec_ad_2,
    "MVTecLOCO": mvtec_loco,
    "RealIAD": real_iad,
    "VAD": vad,
}
