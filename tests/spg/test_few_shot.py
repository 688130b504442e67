# SPDX-License-Identifier: Apache-2.0

"""A few normal images of any dataset, the same ones for every model."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import anomalib.data
import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataModule, Folder, MVTecAD
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Patchcore
from lightning.pytorch.trainer.states import TrainerFn
from omegaconf import OmegaConf

from anomalib_lake import LAKE
from anomalib_spg import FewShot
from anomalib_spg.benchmark.pipeline import BenchmarkJob, training_config
from tests.helpers import TINY, engine

LAKE_ARGUMENTS = {"backbone": TINY, "pre_trained": False, "image_size": 64}


def arguments(mvtec: Path, **more: Any) -> dict[str, Any]:
    """Those of the datamodule that is drawn from."""
    return {"root": mvtec, "category": "brick", "num_workers": 0, "train_batch_size": 4, "eval_batch_size": 3, **more}


def drawn(mvtec: Path, **keywords: Any) -> list[str]:
    """Names of the images that are drawn."""
    datamodule = FewShot("MVTecAD", arguments(mvtec), **keywords)
    datamodule.setup()
    assert datamodule.normal_images == datamodule.train_data.samples.image_path.tolist()
    return [Path(path).name for path in datamodule.normal_images]


@pytest.mark.parametrize(("k_shot", "seed"), [(1, 5), (3, 0)])
def test_the_same_images_as_lake(mvtec: Path, tmp_path: Path, k_shot: int, seed: int) -> None:
    """What LAKE draws itself; LAKE then takes all of them."""
    alone = LAKE(**LAKE_ARGUMENTS, k_shot=k_shot, seed=seed)
    engine(tmp_path).fit(alone, datamodule=MVTecAD(**arguments(mvtec)))
    datamodule = FewShot("MVTecAD", arguments(mvtec), k_shot=k_shot, seed=seed)
    wrapped = LAKE(**LAKE_ARGUMENTS, k_shot=None)
    engine(tmp_path).fit(wrapped, datamodule=datamodule)
    assert len(alone.normal_images) == k_shot
    assert alone.normal_images == datamodule.normal_images == wrapped.normal_images


def test_the_seed_decides(mvtec: Path) -> None:
    """The same one draws the same, whatever was drawn before; without one the process's counts; null takes all."""
    first = drawn(mvtec, k_shot=2, seed=1)
    torch.rand(3)
    assert drawn(mvtec, k_shot=2, seed=1) == first
    torch.manual_seed(1)
    assert drawn(mvtec, k_shot=2) == first
    assert len({tuple(drawn(mvtec, k_shot=2, seed=seed)) for seed in range(8)}) > 1
    assert len(drawn(mvtec, k_shot=None)) == 4


def folder_images(mvtec: Path, split: dict[str, Any], advanced: int, **keywords: Any) -> list[Any]:
    """What a folder that is split at random is learned from, validated and tested on, after random numbers."""
    own = {"name": "own", "root": mvtec / "brick", "normal_dir": "train/good", "normal_test_dir": "test/good"}
    own |= {"abnormal_dir": "test/hole", "num_workers": 0}
    torch.manual_seed(6)
    torch.rand(advanced)
    np.random.seed(advanced)  # noqa: NPY002  # anomalib draws from it
    datamodule = FewShot("Folder", {**own, **split}, k_shot=1, **keywords)
    datamodule.setup()
    assert torch.initial_seed() == 6
    sets = (datamodule.train_data, datamodule.val_data, datamodule.test_data)
    return [
        hashlib.sha256(Path(path).read_bytes()).hexdigest() for images in sets for path in images.samples.image_path
    ]


@pytest.mark.parametrize(
    "split", [{}, {"val_split_mode": "from_train"}, {"val_split_mode": "synthetic"}, {"test_split_mode": "synthetic"}]
)
def test_random_splits_are_the_same_for_every_model(mvtec: Path, split: dict[str, Any]) -> None:
    """However many random numbers a model has drawn; the target's own seed comes first."""
    first = folder_images(mvtec, split, 0, seed=3)
    assert folder_images(mvtec, split, 5, seed=3) == first
    assert folder_images(mvtec, split, 0) == folder_images(mvtec, split, 5), "the process's seed"
    own = [folder_images(mvtec, {**split, "seed": seed}, 0, seed=3) for seed in range(4)]
    assert own[3] == first
    assert len(set(map(tuple, own))) > 1


def test_a_job_of_the_benchmark_splits_by_its_seed(
    mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder without FewShot: models whose weights take other random numbers learn from the same images."""
    learned = []

    def fit(_: Engine, model: AnomalibModule, datamodule: AnomalibDataModule) -> None:
        del model
        datamodule.setup(TrainerFn.FITTING)
        learned.append(datamodule.train_data.samples.image_path.tolist())

    monkeypatch.setattr(Engine, "fit", fit)
    monkeypatch.setattr(Engine, "test", lambda *_, **__: [{}])
    own = {"name": "own", "root": str(mvtec / "brick"), "normal_dir": "train/good", "abnormal_dir": "test/hole"}
    data = {"class_path": "Folder", "init_args": {**own, "test_split_ratio": 0.5, "num_workers": 0}}
    for seed in range(4):
        for backbone in ("resnet18", "resnet34"):
            model = {"class_path": "Patchcore", "init_args": {"backbone": backbone, "pre_trained": False}}
            BenchmarkJob("cpu", {"seed": seed, "model": model, "data": data}, tmp_path).run()
    assert learned[0::2] == learned[1::2]
    assert len(set(map(tuple, learned))) > 1


def test_all_else_is_the_datamodules(mvtec: Path) -> None:
    """Validation, test and prediction data, batch sizes, name and category."""
    plain, datamodule = MVTecAD(**arguments(mvtec)), FewShot("MVTecAD", arguments(mvtec), k_shot=1, seed=0)
    for one in (plain, datamodule):
        one.prepare_data()
        one.setup()
    for loader in ("val_dataloader", "test_dataloader", "predict_dataloader"):
        batches, expected = list(getattr(datamodule, loader)()), list(getattr(plain, loader)())
        assert [batch.image_path for batch in batches] == [batch.image_path for batch in expected]
        assert all(torch.equal(a.gt_mask, b.gt_mask) for a, b in zip(batches, expected, strict=True))
    assert len(datamodule.train_data) == 1
    assert (datamodule.name, datamodule.category, datamodule.task) == ("MVTecAD", "brick", plain.task)
    assert (datamodule.train_batch_size, datamodule.eval_batch_size, datamodule.num_workers) == (4, 3, 0)


def test_ways_to_give_the_datamodule(mvtec: Path) -> None:
    """Its name and arguments, itself, and class_path with init_args as a config of a benchmark gives them."""
    config = {"class_path": "anomalib.data.MVTecAD", "init_args": {**arguments(mvtec), "root": str(mvtec)}}
    targets = [MVTecAD(**arguments(mvtec)), config, OmegaConf.create(config)]
    for target in targets:
        assert isinstance(FewShot(target).target, MVTecAD)
    with pytest.raises(ValueError, match=r"target_args=\{'category': 'grass'\} belong to a target given by its name"):
        FewShot(targets[0], {"category": "grass"})
    with pytest.raises(ValueError, match="target=3 is neither the name of a datamodule nor a datamodule"):
        FewShot(3)


def test_images_labelled_anomalous_are_left_aside(mvtec: Path) -> None:
    """Some training sets hold bad parts; the log says how many images there were, and names those that are drawn."""
    target = Folder(name="own", root=mvtec / "brick", normal_dir="train/good", abnormal_dir="test/hole", num_workers=0)
    target.setup()
    target.train_data += target.test_data
    target._is_setup = True
    datamodule = FewShot(target, k_shot=None)
    datamodule.setup()
    assert datamodule.train_data.samples.label_index.tolist() == [0] * len(datamodule.train_data)
    assert 0 < len(datamodule.train_data) < len(target.train_data)


def test_log_names_the_images(mvtec: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of them, and the seed."""
    caplog.set_level(logging.INFO)
    names = drawn(mvtec, k_shot=3, seed=7)
    assert "FewShot: 3 of the 4 training images of MVTecAD brick, drawn with seed 7: " in caplog.text
    assert all(f"brick/train/good/{name}" in caplog.text for name in names)


@pytest.mark.parametrize(
    ("target", "keywords", "message"),
    [
        ("MVTecAD", {"k_shot": 5}, r"k_shot=5 asks for more normal images than the 4 in the training set of MVTecAD"),
        ("MVTecAD", {"k_shot": 0}, r"k_shot=0 must be at least 1; leave it null"),
        ("MVTecAD", {"seed": -1}, r"seed=-1 must lie between 0 and"),
        ("MVTek", {}, r"no image datamodule 'MVTek'. Choose one of .*, MVTecAD,"),
        ("Avenue", {}, r"no image datamodule 'Avenue'"),
        (
            "ImageDataFormat",
            {},
            r"Choose one of AutoVI, .*BMAD, .*Folder, Kaputt, .*, Visa",
        ),
        ("Folder", {}, r"Folder cannot be built from .*category"),
    ],
)
def test_mistakes_are_named(mvtec: Path, target: str, keywords: dict[str, Any], message: str) -> None:
    """The value, and what to do."""
    with pytest.raises(ValueError, match=message):
        FewShot(target, arguments(mvtec), **keywords).setup()


@pytest.mark.parametrize("stage", ["prepare_data", "setup"])
def test_misspelt_category(stage: str, mvtec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder, and what is there, before anything is downloaded."""
    download = "anomalib.data.datamodules.image.mvtecad.download_and_extract"
    monkeypatch.setattr(download, lambda *_, **__: pytest.fail("download"))
    message = r"^MVTecAD: no folder '.*/brik' with images; there are brick, grass\. Correct the category or the root"
    with pytest.raises(ValueError, match=message):
        getattr(FewShot("MVTecAD", arguments(mvtec, category="brik")), stage)()


def test_datamodule_without_a_training_set(mvtec: Path) -> None:
    """A plugin's datamodule may have none."""

    class Testing(MVTecAD):
        def setup(self, stage: str | None = None) -> None:
            super().setup(stage)
            del self.train_data

    with pytest.raises(ValueError, match="Datamodule Testing has no training set to draw normal images from"):
        FewShot(Testing(**arguments(mvtec))).setup()


def test_in_the_benchmark(mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's seed draws, PatchCore learns from these images only, and guides are not shared between draws."""
    monkeypatch.setattr(anomalib.data, "FewShot", FewShot, raising=False)
    seen: list[int] = []
    fit = Patchcore.fit
    monkeypatch.setattr(
        Patchcore, "fit", lambda self: (seen.append(sum(map(len, self.model.embedding_store))), fit(self))
    )
    data = {"class_path": "FewShot", "init_args": {"k_shot": 2, "target": "MVTecAD", "target_args": arguments(mvtec)}}
    model = {"class_path": "Patchcore", "init_args": {"backbone": "resnet18", "pre_trained": False}, "image_size": 64}
    BenchmarkJob("cpu", {"seed": 4, "model": model, "data": data}, tmp_path).run()
    assert seen == [2 * 8 * 8]
    spg = {"seed": 0, "model": {"class_path": "SPG"}, "data": data}
    other = {**spg, "data": {**data, "init_args": {**data["init_args"], "target": "Visa"}}}
    assert training_config(spg) != training_config(other)
