# SPDX-License-Identifier: Apache-2.0

"""Images in odd modes give what plain ones give, or are named, as files that cannot be read are."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import torch
from anomalib.data import Folder, PredictDataset
from PIL import Image

from anomalib_spg import SPG, FewShot, SPGModel
from anomalib_spg.components import unreadable
from anomalib_spg.components.unreadable import check_images, check_left_out
from tests.helpers import TINY, data, engine, make_mvtec

# Black and white blocks, so that every mode and every palette can hold them.
BLOCKS = np.kron(np.random.default_rng(0).integers(0, 2, (4, 4)), np.ones((16, 16))).astype(np.uint8) * 255
IMAGE = Image.fromarray(BLOCKS)
DEEP = BLOCKS.astype(np.uint16) * 257


def build() -> SPG:
    """A small model with random weights."""
    torch.manual_seed(0)
    arguments = {"backbone": TINY, "layers": [3], "pre_trained": False, "image_size": 64, "views": 1, "k": 8}
    return SPG(**arguments, num_atoms=64, sae_epochs=1, guide_epochs=1, visualizer=False)


@pytest.fixture(scope="module")
def model(mvtec: Path, tmp_path_factory: pytest.TempPathFactory) -> SPG:
    """A trained one."""
    trained = build()
    engine(tmp_path_factory.mktemp("trained")).fit(model=trained, datamodule=data(mvtec))
    return trained


def rotated_by_exif(path: Path) -> None:
    """A photograph of a camera that was held upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    IMAGE.save(path, exif=exif, quality=95)


SOUND: dict[str, Callable[[Path], object]] = {
    "grey.png": IMAGE.save,
    "rgb.png": IMAGE.convert("RGB").save,
    "rgba.png": IMAGE.convert("RGBA").save,
    "la.png": IMAGE.convert("LA").save,
    "palette.png": IMAGE.convert("P").save,
    "transparent.png": lambda path: IMAGE.convert("P").save(path, transparency=0),
    "bits.png": IMAGE.convert("1").save,
    "cmyk.tif": IMAGE.convert("CMYK").save,
    "deep_rgb.png": lambda path: cv2.imwrite(str(path), np.dstack([DEEP] * 3)),
    "pages.tif": lambda path: IMAGE.save(path, save_all=True, append_images=[IMAGE.rotate(90)]),
    "progressive.jpg": lambda path: IMAGE.save(path, progressive=True, quality=95),
    "exif.jpg": rotated_by_exif,
}


def test_modes_that_are_read_rightly(model: SPG, tmp_path: Path) -> None:
    """Each file's map is that of the plain image: of several pages the first, without alpha, not turned by EXIF."""
    for name, write in SOUND.items():
        write(tmp_path / name)
    predictions = engine(tmp_path / "out").predict(model, data_path=tmp_path)
    maps = {Path(batch.image_path[0]).name: batch.anomaly_map for batch in predictions}  # one by one
    assert set(maps) == set(SOUND)
    for name, map_ in maps.items():
        tolerance = 0.05 if name.endswith(".jpg") else 1e-5
        torch.testing.assert_close(map_, maps["grey.png"], atol=tolerance, rtol=0, msg=name)
    turned = IMAGE.rotate(90)
    assert np.asarray(turned).tolist() != BLOCKS.tolist(), "else turning would not show"


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_file_is_named(model: SPG, tmp_path: Path, workers: int) -> None:
    """Its header is sound, so that it shows while reading, in this process or in another."""
    IMAGE.save(tmp_path / "a_good_one.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "half.png").read_bytes()[:2000])
    images = PredictDataset(tmp_path)
    loader = torch.utils.data.DataLoader(images, num_workers=workers, collate_fn=images.collate_fn)
    with pytest.raises(ValueError, match=r"Cannot read 1 of 2 files: .*/half\.png"):
        engine(tmp_path / "out").predict(model, dataloaders=loader)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("grey16.png", Image.fromarray(DEEP).save, "mode I;16.*Convert all images"),
        ("grey16.tif", Image.fromarray(DEEP.astype(">u2")).save, "mode I;16B"),
        ("grey32.tif", Image.fromarray(DEEP.astype(np.int32)).save, "mode I,"),
        ("float.tif", Image.fromarray(BLOCKS.astype(np.float32)).save, "mode F,"),
        ("empty.png", Path.touch, "no image"),
        ("text.png", lambda path: path.write_text("not an image"), "no image"),
        ("folder.png", Path.mkdir, "Is a directory"),
    ],
)
def test_predict_names_the_file(model: SPG, tmp_path: Path, name: str, write: Callable, message: str) -> None:
    """Whatever is wrong with it."""
    IMAGE.save(tmp_path / "a_good_one.png")
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        engine(tmp_path / "out").predict(model, data_path=tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Beyond PIL's limit a warning names the file, beyond twice that PIL refuses it."""
    IMAGE.save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    check_images([PredictDataset(tmp_path)])
    assert re.search(r"1 files have more pixels.*huge\.png", caplog.text)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"huge\.png.*exceeds limit of 2000 pixels"):
        check_images([PredictDataset(tmp_path)])


def test_several_pages_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the first counts."""
    SOUND["pages.tif"](tmp_path / "pages.tif")
    check_images([PredictDataset(tmp_path)])
    assert re.search(r"only the first is used: .*pages\.tif", caplog.text)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_every_stage_looks_first(model: SPG, tmp_path: Path, stage: str) -> None:
    """Before the backbone sees any image."""
    root = make_mvtec(tmp_path / "data", categories=("brick",))
    part = root / "brick" / ("train/good/003.png" if stage == "fit" else "test/hole/003.png")
    Image.fromarray(np.asarray(Image.open(part).convert("L")).astype(np.uint16) * 257).save(part)
    used = build() if stage == "fit" else model
    seen: list[int] = []
    hook = used.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with pytest.raises(ValueError, match=rf"{part.parent.name}/003\.png' has mode I;16"):
        getattr(engine(tmp_path / "out"), stage)(model=used, datamodule=data(root))
    hook.remove()
    assert not seen


@pytest.mark.parametrize("mode", ["1", "L", "I;16", "I", "F", "RGB", "P"])
def test_masks_of_any_mode(tmp_path: Path, mode: str) -> None:
    """Everything above zero is a defect, whatever the mode; headers of masks are not held against them."""
    for name in ("good", "bad", "masks"):
        (tmp_path / name).mkdir()
    IMAGE.save(tmp_path / "good/0.png")
    IMAGE.save(tmp_path / "bad/1.png")
    mask = Image.fromarray(DEEP) if mode == "I;16" else IMAGE.convert(mode)
    mask.save(tmp_path / "masks" / ("1.tif" if mode in {"I", "F"} else "1.png"))
    folder = Folder("own", "good", tmp_path, "bad", mask_dir="masks", val_split_mode="none")
    folder.setup()
    check_images([folder.test_data])
    item = next(item for item in folder.test_data if item.gt_label == 1)
    assert np.array_equal(item.gt_mask.numpy() > 0, BLOCKS > 0)


def test_masks_of_another_size_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a test they are stretched, as anomalib does, but not in silence; a missing one stops the run."""
    root = make_mvtec(tmp_path, categories=("brick",))
    mask = root / "brick/ground_truth/hole/002_mask.png"
    Image.open(mask).resize((48, 96)).save(mask)
    datamodule = data(root)
    datamodule.setup()
    check_images([datamodule.test_data])
    assert re.search(r"1 files are masks of another size.*002_mask\.png \(.*hole/002\.png\)", caplog.text)
    mask.unlink()
    with pytest.raises(ValueError, match=r"Cannot read image '.*002_mask\.png'"):
        check_images([datamodule.test_data])


def test_other_errors_search_nothing(mvtec: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A full disk is no reason to decode ten thousand images."""
    caplog.set_level(logging.INFO)
    with (
        patch.object(SPGModel, "_store", side_effect=OSError(28, "No space left on device")),
        patch.object(unreadable, "_is_readable", side_effect=AssertionError),
        pytest.raises(OSError, match="No space left"),
    ):
        engine(tmp_path).fit(model=build(), datamodule=data(mvtec))


def test_colours_of_16_bits_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PIL reads the higher 8 of them, and calls it RGB; those of 8 bits are none."""
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((8, 8, 3), 4095, np.uint16))
    assert np.asarray(Image.open(tmp_path / "deep.png")).max() == 15, "what this guards against"
    Image.new("RGB", (8, 8)).save(tmp_path / "flat.png")
    check_images([PredictDataset(tmp_path)])
    assert "1 files have 16 bits a channel" in caplog.text
    assert "deep.png" in caplog.text
    assert "flat.png" not in caplog.text


def with_left_out(folder: Path) -> Path:
    """Two images, a link to a folder of another one, an image of unknown suffix, and what is no image."""
    (folder / "other").mkdir(parents=True)
    (folder / "parts/inner").mkdir(parents=True)
    for path in (folder / "parts/a.png", folder / "parts/inner/b.PNG", folder / "other/c.png"):
        IMAGE.save(path)
    (folder / "parts/inner/linked").symlink_to(folder / "other")
    (folder / "parts/inner/back").symlink_to(folder / "parts")
    IMAGE.save(folder / "parts/d.gif")
    (folder / "parts/Thumbs.db").write_bytes(bytes(99))
    (folder / "parts/gone").symlink_to(folder / "nothing")
    os.mkfifo(folder / "parts/pipe")
    return folder / "parts"


def test_what_predict_leaves_out_is_named(model: SPG, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By a link to a folder that is not followed, or by its suffix; what is no image, or found elsewhere, is not."""
    parts = with_left_out(tmp_path)
    engine(tmp_path / "out").predict(model, data_path=parts)
    assert re.search(r"1 folders are links.*: \S*inner/linked\. Link", caplog.text)
    assert re.search(r"WARNING.* 1 images are left out.*: \S*parts/d\.gif\. Rename", caplog.text)
    assert not re.search(r"Thumbs|gone|pipe|back", caplog.text)
    caplog.clear()
    engine(tmp_path / "out").predict(model, data_path=parts / "a.png")
    assert "left out" not in caplog.text, "a single image was asked for"


@pytest.mark.parametrize("few", [False, True])
def test_what_a_folder_to_train_on_leaves_out_is_named(
    tmp_path: Path, few: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also behind another datamodule; with suffixes of one's own nothing is."""
    parts = with_left_out(tmp_path)
    arguments = {"name": "own", "root": tmp_path, "normal_dir": [parts.name], "val_split_mode": "none"}
    for extensions in (None, (".png",)):
        caplog.clear()
        folder = Folder(**arguments, test_split_mode="none", num_workers=0, extensions=extensions)
        run = engine(tmp_path / "out", limit_val_batches=0)
        run.fit(model=build(), datamodule=FewShot(folder, k_shot=2) if few else folder)
        assert ("inner/linked" in caplog.text) == (extensions is None)
        assert ("d.gif" in caplog.text) == (extensions is None)


def test_files_that_are_looked_at_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first by name, and the count says so."""
    monkeypatch.setattr(unreadable, "LOOKED_AT", 2)
    for number in range(4):
        IMAGE.save(tmp_path / f"{number}.gif")
    check_left_out([tmp_path])
    assert re.search(r"At least 2 images are left out.*: \S*0\.gif, \S*1\.gif\. Rename", caplog.text)
