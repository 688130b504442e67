# SPDX-License-Identifier: Apache-2.0

"""Labelled auxiliary data in, target data out, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from anomalib_spg import AuxiliaryTarget
from anomalib_spg.dataset_folders import check_category
from tests.helpers import make_mvtec, make_visa
from tests.layouts import autovi, picture


def build(mvtec: Path, visa: Path, **arguments) -> AuxiliaryTarget:
    """MVTec-layout data as auxiliary, VisA-layout data as target."""
    defaults = {
        "auxiliary": "MVTecAD",
        "auxiliary_args": {"root": mvtec},
        "auxiliary_categories": ["brick", "grass"],
        "target": "Visa",
        "target_args": {"root": visa, "category": "gravel"},
        "num_workers": 0,
    }
    return AuxiliaryTarget(**{**defaults, **arguments})


def test_training_set_is_the_labelled_test_split_of_all_categories(mvtec: Path, visa: Path) -> None:
    """Every test image of both categories with its mask; validation and test are the target's own."""
    datamodule = build(mvtec, visa)
    datamodule.prepare_data()
    datamodule.setup()
    samples = datamodule.train_data.samples
    assert len(samples) == 16
    assert samples.label_index.sum() == 8
    assert all("/test/" in path for path in samples.image_path)
    assert {Path(path).parts[-4] for path in samples.image_path} == {"brick", "grass"}
    for subset in (datamodule.val_data, datamodule.test_data):
        assert len(subset) == 8
        assert all("gravel/test" in path for path in subset.samples.image_path)
    assert (datamodule.name, datamodule.category) == ("MVTecAD_to_Visa", "gravel")
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.gt_mask.shape[-2:] == batch.image.shape[-2:]
    assert batch.gt_mask[batch.gt_label == 1].flatten(1).any(dim=1).all()


def test_the_seed_of_a_datamodules_own_arguments_counts(mvtec: Path, visa: Path) -> None:
    """Ours is for those that have none."""
    for own, seed in (({}, 4), ({"seed": 7}, 7), ({"seed": 0}, 0)):
        datamodule = build(
            mvtec,
            visa,
            auxiliary_args={"root": mvtec, **own},
            target_args={"root": visa, "category": "gravel", **own},
            seed=4,
        )
        assert [each.seed for each in (datamodule.target, *datamodule.auxiliaries)] == [seed] * 3


@pytest.mark.parametrize(("categories", "count"), [("brick", 8), (["grass"], 8)])
def test_one_category(mvtec: Path, visa: Path, categories: str | list[str], count: int) -> None:
    """As a name or as a list."""
    datamodule = build(mvtec, visa, auxiliary_categories=categories)
    datamodule.setup()
    assert len(datamodule.train_data) == count


def test_all_categories_are_those_anomalib_lists(mvtec: Path, visa: Path) -> None:
    """The fifteen of MVTec AD, the twelve of VisA."""
    assert len(build(mvtec, visa, auxiliary_categories="all").auxiliaries) == 15
    other = build(mvtec, visa, auxiliary="Visa", auxiliary_args={"root": visa}, auxiliary_categories="all")
    assert len(other.auxiliaries) == 12


def test_datasets_without_categories(mvtec: Path, visa: Path) -> None:
    """A user's own labelled folder is auxiliary data too."""
    folder = {
        "name": "own",
        "root": mvtec / "brick",
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": "test/hole",
        "mask_dir": "ground_truth/hole",
    }
    datamodule = build(mvtec, visa, auxiliary="Folder", auxiliary_args=folder, auxiliary_categories="all")
    datamodule.setup()
    assert len(datamodule.train_data) == 8
    assert datamodule.train_data.has_anomalous


def test_anomalous_images_without_masks(tmp_path: Path, visa: Path) -> None:
    """The first one is named."""
    folder = {
        "name": "own",
        "root": make_mvtec(tmp_path) / "brick",
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": "test/hole",
    }
    with pytest.raises(ValueError, match=r"None of the 4 anomalous .* has a mask.*hole/000\.png.*a target only"):
        build(tmp_path, visa, auxiliary="Folder", auxiliary_args=folder).setup()


def without_folder(category: Path) -> None:
    """No folder of masks."""
    shutil.rmtree(category / "ground_truth")


def without_one(category: Path) -> None:
    """A mask is missing."""
    (category / "ground_truth/hole/002_mask.png").unlink()


def without_images(category: Path) -> None:
    """Masks, but nothing that they belong to."""
    shutil.rmtree(category / "test/hole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_folder, r"no masks in '.*/ground_truth' for 4 anomalous .*without one is '.*hole/000\.png'\. Add the"),
        (without_one, r"3 masks in '.*/ground_truth' for 4 anomalous .*without one is '.*hole/002\.png'\. Add the"),
        (without_images, r"4 masks in '.*' for no anomalous images .*without an image is '.*hole/000_mask\.png'\. Add"),
    ],
)
def test_missing_masks(change: Callable[[Path], None], message: str, tmp_path: Path, visa: Path) -> None:
    """anomalib fails with pandas' words about keys; the dataset, the category and the first file are named."""
    change(make_mvtec(tmp_path, categories=("brick",)) / "brick")
    with pytest.raises(ValueError, match=f"^MVTecAD brick: {message}"):
        build(tmp_path, visa, auxiliary_categories="brick").setup()


def test_missing_masks_of_visa(tmp_path: Path, mvtec: Path) -> None:
    """In the copy that anomalib reads."""
    shutil.rmtree(make_visa(tmp_path) / "visa_pytorch/gravel/ground_truth")
    with pytest.raises(ValueError, match=r"^Visa gravel: no masks in '.*visa_pytorch.*' for 4 anom.*'.*/bad/.*\.JPG'"):
        build(mvtec, tmp_path).setup()


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where anomalib would download."""
    for name in ("mvtecad", "visa", "autovi"):
        module = f"anomalib.data.datamodules.image.{name}.download_and_extract"
        monkeypatch.setattr(module, lambda *_, **__: pytest.fail("download"))


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("stage", ["prepare_data", "setup"])
def test_misspelt_category(stage: str, mvtec: Path, visa: Path) -> None:
    """Of either dataset: the folder, and what is there, before anything is downloaded."""
    message = r"^MVTecAD: no folder '.*/grss' with images; there are brick, grass\. Correct the category or the root"
    with pytest.raises(ValueError, match=message):
        getattr(build(mvtec, visa, auxiliary_categories=["brick", "grss"]), stage)()
    message = r"^Visa: no folder '.*/gravl' with images; there are gravel\."
    with pytest.raises(ValueError, match=message):
        getattr(build(mvtec, visa, target_args={"root": visa, "category": "gravl"}), stage)()


@pytest.mark.usefixtures("no_download")
@pytest.mark.parametrize("stage", ["prepare_data", "setup"])
@pytest.mark.parametrize("layout", ["as distributed", "converted", "both"])
def test_all_categories_of_an_incomplete_dataset(layout: str, stage: str, tmp_path: Path, mvtec: Path) -> None:
    """VisA with two of its twelve, in whichever layout; empty folders, as anomalib makes them, are no categories."""
    for category in ("candle", "pcb1"):
        if layout != "converted":
            picture(tmp_path / category / "Data/Images/Normal/0000.JPG")
        if layout != "as distributed":
            picture(tmp_path / "visa_pytorch" / category / "train/good/0000.JPG")
            (tmp_path / "visa_pytorch/pcb2/train/good").mkdir(parents=True, exist_ok=True)
    arguments = {"auxiliary_args": {"root": tmp_path}, "target": "MVTecAD", "auxiliary": "Visa"}
    arguments["target_args"] = {"root": mvtec, "category": "brick"}
    message = r"^auxiliary_categories='all' are the 12 of Visa, but '.*' lacks capsules, .*pcb2, .*pipe_fryum\. "
    message += r"auxiliary_categories takes a list, too: \[candle, pcb1\]"
    with pytest.raises(ValueError, match=message):
        getattr(build(mvtec, mvtec, auxiliary_categories="all", **arguments), stage)()


@pytest.mark.parametrize(
    ("auxiliary", "root", "category"),
    [
        ("MVTecAD", "nowhere", "brick"),
        ("MVTecAD", "empty", "brick"),
        ("Kaputt", "data", "paper"),
        ("AutoVI", "data", "tank_screw"),
    ],
)
def test_what_anomalib_knows_better(auxiliary: str, root: str, category: str, tmp_path: Path, visa: Path) -> None:
    """Datasets that are not there or laid out in another way, and AutoVI, of which it downloads one by one."""
    (tmp_path / "empty").mkdir()
    autovi(tmp_path / "data", "pipe_clip")
    arguments = {"auxiliary_args": {"root": tmp_path / root}, "auxiliary_categories": category}
    check_category(build(tmp_path, visa, auxiliary=auxiliary, **arguments).auxiliaries[0])


def test_other_failures_stay_as_they_are(tmp_path: Path, visa: Path) -> None:
    """A folder without any image is not said to lack masks."""
    (tmp_path / "brick").mkdir()
    with pytest.raises(RuntimeError, match="Found 0 images"):
        build(tmp_path, visa, auxiliary_categories="brick").setup()


def test_mask_of_another_size(tmp_path: Path, visa: Path) -> None:
    """Both files and both sizes are named."""
    root = make_mvtec(tmp_path)
    mask = root / "brick/ground_truth/hole/002_mask.png"
    Image.open(mask).resize((48, 96)).save(mask)
    with pytest.raises(ValueError, match=r"002_mask\.png' is 48x96.*002\.png' is 96x96"):
        build(root, visa).setup()


def test_empty_masks(tmp_path: Path, visa: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Some are named, all are refused."""
    root = make_mvtec(tmp_path, categories=("brick",))
    masks = sorted((root / "brick/ground_truth/hole").iterdir())
    Image.new("L", (96, 96)).save(masks[1])
    build(root, visa, auxiliary_categories="brick").setup()
    assert "1 of 4 masks of anomalous auxiliary images are empty" in caplog.text
    assert str(masks[1]) in caplog.text
    for mask in masks:
        Image.new("1", (96, 96)).save(mask)
    with pytest.raises(ValueError, match=r"4 of 4 masks .* are empty.*000_mask\.png"):
        build(root, visa, auxiliary_categories="brick").setup()


@pytest.mark.parametrize("kept", [0, 60])
def test_unreadable_mask(tmp_path: Path, visa: Path, kept: int) -> None:
    """Empty or cut off: named with its image."""
    root = make_mvtec(tmp_path, categories=("brick",))
    mask = root / "brick/ground_truth/hole/001_mask.png"
    mask.write_bytes(mask.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"Cannot read image '.*hole/001\.png' or its mask '.*001_mask\.png'"):
        build(root, visa, auxiliary_categories="brick").setup()


def test_no_categories(mvtec: Path, visa: Path) -> None:
    """An empty list is a mistake."""
    with pytest.raises(ValueError, match="names no category"):
        build(mvtec, visa, auxiliary_categories=[])


@pytest.mark.parametrize(("folder", "word"), [("test/good", "normal"), ("test/hole", "anomalous")])
def test_both_kinds_are_needed(tmp_path: Path, visa: Path, folder: str, word: str) -> None:
    """No normal, or no anomalous auxiliary image."""
    root = make_mvtec(tmp_path, categories=("brick",))
    for path in (root / "brick" / folder).iterdir():
        path.unlink()
    if word == "anomalous":
        for path in (root / "brick/ground_truth/hole").iterdir():
            path.unlink()
    with pytest.raises(ValueError, match=f"no {word} image"):
        build(root, visa, auxiliary_categories="brick").setup()


def test_unknown_names(mvtec: Path, visa: Path) -> None:
    """The datamodules there are, and the arguments that do not fit."""
    with pytest.raises(ValueError, match=r"no image datamodule 'MVTek'.*MVTecAD"):
        build(mvtec, visa, auxiliary="MVTek")
    with pytest.raises(ValueError, match=r"MVTecAD cannot be built.*rot"):
        build(mvtec, visa, auxiliary_args={"rot": mvtec})


def test_visa_as_auxiliary(tmp_path: Path, mvtec: Path) -> None:
    """The other direction."""
    datamodule = AuxiliaryTarget(
        auxiliary="Visa",
        auxiliary_args={"root": make_visa(tmp_path)},
        auxiliary_categories="gravel",
        target="MVTecAD",
        target_args={"root": mvtec, "category": "brick"},
        num_workers=0,
    )
    datamodule.setup()
    assert len(datamodule.train_data) == 8
    assert len(datamodule.test_data) == 8
