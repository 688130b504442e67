# SPDX-License-Identifier: Apache-2.0

"""The datasets of two configs, in their layouts: what is learned from, what is tested, and whether there are masks."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import anomalib.data
import pandas as pd
import pytest
import yaml
from anomalib import TaskType

from anomalib_spg import AuxiliaryTarget, FewShot
from anomalib_spg.benchmark.grids import expand
from tests.helpers import REPOSITORY
from tests.layouts import LAYOUTS, read_parquet

NAMES = sorted(LAYOUTS)
AUXILIARIES = [name for name in NAMES if name != "VAD"]


@pytest.fixture(autouse=True)
def _parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kaputt's tables without pyarrow."""
    monkeypatch.setattr(import_module("anomalib.data.datasets.image.kaputt"), "module_available", lambda _: True)
    monkeypatch.setattr(pd, "read_parquet", read_parquet)


def configured(name: str, part: str) -> dict[str, Any]:
    """The first entry of a dataset in a config: the arguments of FewShot, or of AuxiliaryTarget."""
    text = (REPOSITORY / "configs" / "benchmark" / f"datasets_{part}.yaml").read_text(encoding="utf-8")
    blocks = yaml.safe_load(text)["benchmark"]
    wanted = "Folder" if name == "VAD" else name
    for block in blocks if isinstance(blocks, list) else [blocks]:
        for config in expand(block):
            arguments = config["data"]["init_args"]
            if arguments["auxiliary" if part == "auxiliary" else "target"] == wanted:
                return arguments
    return pytest.fail(f"datasets_{part}.yaml has no {name}")


def make(name: str, root: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Write the dataset, and give the arguments its root."""
    category = arguments.get("category", "vad")
    LAYOUTS[name](root, category)
    return {**arguments, "root": root / "vad" if name == "VAD" else root, "num_workers": 0}


@pytest.mark.parametrize("name", NAMES)
def test_as_target(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As the config has it: one good image to learn from, good and bad ones to test, masks or a word about them."""
    arguments = configured(name, "target")
    datamodule = FewShot(arguments["target"], make(name, tmp_path, arguments["target_args"]), k_shot=1, seed=0)
    datamodule.prepare_data()
    datamodule.setup()
    assert datamodule.train_data.samples.label_index.tolist() == [0]
    assert sorted(datamodule.test_data.samples.label_index) == [0, 0, 1, 1]
    batch = next(iter(datamodule.test_dataloader()))
    assert len(batch) == 4
    if name == "VAD":
        assert batch.gt_mask is None
        assert "The test set of vad has no masks: images are scored and rated, pixel metrics left out." in caplog.text
    else:
        assert "test set" not in caplog.text
        assert datamodule.test_data.task == TaskType.SEGMENTATION
        assert batch.gt_mask.flatten(1).any(dim=1).tolist() == batch.gt_label.bool().tolist()
    next(iter(datamodule.val_dataloader()))
    next(iter(datamodule.train_dataloader()))


@pytest.mark.parametrize("name", NAMES)
def test_as_target_of_labelled_data(name: str, tmp_path: Path, visa: Path) -> None:
    """SPG's guides from VisA: the same test images."""
    arguments = configured(name, "target")
    datamodule = AuxiliaryTarget(
        auxiliary="Visa",
        auxiliary_args={"root": visa},
        auxiliary_categories="gravel",
        target=arguments["target"],
        target_args=make(name, tmp_path, arguments["target_args"]),
        num_workers=0,
    )
    datamodule.setup()
    assert sorted(datamodule.test_data.samples.label_index) == [0, 0, 1, 1]
    assert len(next(iter(datamodule.test_dataloader()))) == 4


@pytest.mark.parametrize("name", AUXILIARIES)
def test_as_auxiliary(name: str, tmp_path: Path, mvtec: Path) -> None:
    """As the config has it: all test images, with their masks; two categories make one training set."""
    arguments = configured(name, "auxiliary")
    assert arguments["auxiliary_categories"] == "all"
    categories = import_module(f"anomalib.data.datasets.image.{module(name)}").CATEGORIES[:2]
    categories = categories[:1] if name == "Kaputt" else categories  # all of them are in one table
    for category in categories:
        auxiliary = make(name, tmp_path, {**arguments["auxiliary_args"], "category": category})
    del auxiliary["category"]
    datamodule = AuxiliaryTarget(
        auxiliary=name,
        auxiliary_args=auxiliary,
        auxiliary_categories=list(categories),
        target="MVTecAD",
        target_args={"root": mvtec, "category": "brick"},
        num_workers=0,
    )
    datamodule.setup()
    assert datamodule.train_data.samples.label_index.value_counts().to_dict() == dict.fromkeys(
        (0, 1), 2 * len(categories)
    )
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.gt_mask.flatten(1).any(dim=1).tolist() == batch.gt_label.bool().tolist()


def module(name: str) -> str:
    """Where anomalib keeps a dataset."""
    return getattr(anomalib.data, name).__module__.rpartition(".")[2]


def test_dataset_without_masks_is_no_auxiliary(tmp_path: Path, mvtec: Path) -> None:
    """The message says what it can be."""
    arguments = make("VAD", tmp_path, configured("VAD", "target")["target_args"])
    with pytest.raises(ValueError, match="None of the 2 anomalous auxiliary images has a mask.*can be a target only"):
        AuxiliaryTarget(
            auxiliary="Folder",
            auxiliary_args=arguments,
            target="MVTecAD",
            target_args={"root": mvtec, "category": "brick"},
        ).setup()


def second_mask(root: Path, change: Callable[[Path], None]) -> dict[str, Any]:
    """MVTec LOCO, whose second bad image has two masks, with a change to the second one."""
    LAYOUTS["MVTecLOCO"](root, "pushpins")
    change(root / "pushpins/ground_truth/logical_anomalies/001/001.png")
    return {"auxiliary": "MVTecLOCO", "auxiliary_args": {"root": root}, "auxiliary_categories": "pushpins"}


def test_every_mask_of_an_image_is_looked_at(tmp_path: Path, mvtec: Path) -> None:
    """Not only the first."""
    arguments = second_mask(tmp_path, lambda path: path.write_bytes(b"no image"))
    with pytest.raises(ValueError, match=r"001\.png' or its mask '.*001/001\.png'"):
        AuxiliaryTarget(**arguments, target="MVTecAD", target_args={"root": mvtec, "category": "brick"}).setup()


def test_test_sets_that_tell_little_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without good images, as Real-IAD by default, and without labels, as MVTec AD 2's private sets."""
    LAYOUTS["RealIAD"](tmp_path, "usb")
    arguments = {"root": tmp_path, "category": "usb", "resolution": 512, "num_workers": 0}
    FewShot("RealIAD", arguments, k_shot=1, seed=0).setup()
    assert "The test set of RealIAD has no good image" in caplog.text
    assert "test_split_mode: from_dir" in caplog.text
    LAYOUTS["MVTecAD2"](tmp_path, "can")
    arguments = {"root": tmp_path, "category": "can", "test_type": "private", "num_workers": 0}
    datamodule = FewShot("MVTecAD2", arguments, k_shot=1, seed=0)
    datamodule.setup()
    assert "The test set of MVTecAD2 has no labels" in caplog.text
    assert [Path(path).parent.name for path in datamodule.test_data.samples.image_path] == ["test_private"]
