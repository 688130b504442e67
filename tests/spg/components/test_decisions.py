# SPDX-License-Identifier: Apache-2.0

"""The table of decisions, from made-up predictions."""

import logging
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import ImageBatch, PredictDataset
from anomalib.data.utils import read_image
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from anomalib_lake import LAKE
from anomalib_spg.components.decisions import DecisionTable, _is_turned
from tests.helpers import TINY, engine


def table(folder: Path, paths: list[Path]) -> pd.DataFrame:
    """The table of images that are outlined where they are bright, and rejected unless they are black."""
    callback = DecisionTable()
    model = SimpleNamespace(post_processor=SimpleNamespace(normalized_image_threshold=0.5))
    trainer = SimpleNamespace(world_size=1, is_global_zero=True, default_root_dir=folder)
    callback.on_predict_start(trainer, model)
    for path in paths:
        image = read_image(path, as_tensor=True)[None]
        batch = ImageBatch(
            image=image,
            pred_score=torch.tensor([0.9]),
            pred_label=torch.tensor([bool(image.any())]),
            anomaly_map=image.mean(dim=1),
            pred_mask=image.mean(dim=1) > 0.5,
            image_path=[str(path)],
        )
        callback.on_predict_batch_end(trainer, model, batch, batch, 0)
    callback.on_predict_end(trainer, model)
    return pd.read_csv(folder / "predictions.csv")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_boxes_of_turned_images(orientation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Boxes are where the pixels are stored, as anomalib reads them; the warning says that viewers turn them."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[5:15, 60:70] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "part.png"
    Image.fromarray(pixels).save(path, exif=exif)
    with caplog.at_level(logging.WARNING):
        row = table(tmp_path, [path]).iloc[0]
    assert (row.boxes, row.box_pixels, row.box_scores) == ("60 5 70 15", 100, 1.0)
    assert ("Viewers turn 1 images" in caplog.text) == (orientation != 1)
    assert ("why 1 of them are rejected. Boxes are in pixels as stored" in caplog.text) == (orientation != 1)
    assert (str(path) in caplog.text) == (orientation != 1)


def test_every_turned_image_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Accepted ones behind the rejected, with a box or without; not one without EXIF, nor one that is gone by now."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    tones = {"a_accepted.jpg": 0, "b_without_box.png": 60, "c_with_box.webp": 255, "d_upright.png": 255}
    for name, tone in tones.items():
        Image.new("RGB", (80, 40), (tone,) * 3).save(tmp_path / name, **({} if "upright" in name else {"exif": exif}))
    with caplog.at_level(logging.WARNING):
        rows = table(tmp_path, [tmp_path / name for name in tones])
    assert rows.boxes.notna().tolist() == [False, False, True, True]
    assert rows.decision.tolist() == ["accepted", *["rejected"] * 3]
    assert "Viewers turn 3 images" in caplog.text
    assert "may be why 2 of them are rejected" in caplog.text
    assert re.search(r"b_without_box\.png, \S*c_with_box\.webp, \S*a_accepted\.jpg\. Save", caplog.text)
    assert not _is_turned(str(tmp_path / "gone.jpg"))


def test_several_defects(tmp_path: Path) -> None:
    """One beside the other in three columns, the largest first."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[20:24, 0:5] = 204
    pixels[5:15, 60:70] = 255
    Image.fromarray(pixels).save(tmp_path / "part.png")
    row = table(tmp_path, [tmp_path / "part.png"]).iloc[0]
    assert (row.boxes, row.box_pixels, row.box_scores) == ("60 5 70 15; 0 20 5 24", "100; 20", "1.000; 0.800")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A name in another encoding does not cost the table."""
    paths = [tmp_path / os.fsdecode(name) for name in (b"a.png", b"\xe4.png", b"\xf6.png")]
    for path in paths:
        Image.new("RGB", (8, 8), "white").save(path)
    names = [Path(name).name for name in table(tmp_path, paths).image]
    assert names == ["a.png", "\\udce4.png", "\\udcf6.png"]


def test_what_stops_the_predictions_leaves_the_decisions_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The images before a file that cannot be read, while there is an exception on its way."""
    for number in range(4):
        Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / f"{number}.png")
    damaged = tmp_path / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    model = LAKE(backbone=TINY, pre_trained=False, image_size=64, num_neurons=20, visualizer=False)
    model.model.train()(torch.randn(2, 3, 64, 64))
    model.model.fit()
    model._is_fitted = torch.tensor([True])
    dataset = PredictDataset(tmp_path)
    run = engine(tmp_path / "run")
    with pytest.raises(ValueError, match=r"3\.png. Replace or remove them"), caplog.at_level(logging.WARNING):
        run.predict(model, dataloaders=DataLoader(dataset, batch_size=1, collate_fn=dataset.collate_fn))
    found = pd.read_csv(next((tmp_path / "run").rglob("predictions.csv")))
    assert [Path(path).name for path in found.image] == ["0.png", "1.png", "2.png"]
    assert "stopped after 3 images, whose decisions are kept" in caplog.text
