# SPDX-License-Identifier: Apache-2.0

"""SPG in anomalib's engine, through the API, on small images and a tiny backbone with random weights."""

import logging
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_spg import SPG, AuxiliaryTarget, SPGModel
from anomalib_spg.components.files import load_tensors, save_tensors
from anomalib_spg.components.normal_images import short_digest
from anomalib_spg.guides import read_guides
from anomalib_spg.synthesis import AnomalySynthesizer
from tests.helpers import TINY, data, engine, make_mvtec, raw_metrics


def build(**arguments: Any) -> SPG:
    """A small model with random weights."""
    defaults = {
        "backbone": TINY,
        "layers": [3],
        "pre_trained": False,
        "image_size": 64,
        "views": 2,
        "num_atoms": 64,
        "k": 8,
        "sae_epochs": 2,
        "guide_epochs": 3,
        "ema_warmup": True,
        "visualizer": False,
    }
    torch.manual_seed(0)
    return SPG(**{**defaults, **arguments})


def auxiliary(mvtec: Path, visa: Path) -> AuxiliaryTarget:
    """Labelled auxiliary data of two categories, and a target."""
    return AuxiliaryTarget(
        auxiliary="MVTecAD",
        auxiliary_args={"root": mvtec},
        auxiliary_categories=["brick", "grass"],
        target="Visa",
        target_args={"root": visa, "category": "gravel"},
        num_workers=0,
        train_batch_size=5,
    )


@pytest.fixture(scope="module")
def trained(mvtec: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SPG, Engine, list[dict[str, float]]]:
    """A model trained on normal images, its engine, and the printed metrics."""
    folder = tmp_path_factory.mktemp("trained")
    model, run = build(), engine(folder, logger=CSVLogger(folder))
    torch.manual_seed(0)
    return model, run, run.train(model=model, datamodule=data(mvtec))


def test_training_on_normal_images(trained: tuple) -> None:
    """Guides are learned from drawn anomalies; the file says what from; losses reach the logger."""
    model, run, metrics = trained
    assert model.model.is_fitted
    _, metadata = read_guides(Path(run.trainer.default_root_dir) / "weights" / "guides.safetensors")
    assert metadata["trained_on"]["dataset"] == "MVTecAD"
    assert metadata["trained_on"]["images"] == 4
    assert metadata["trained_on"]["labels"] == "synthetic"
    assert (metadata["backbone"], metadata["layers"], metadata["image_size"]) == (TINY, [3], [64, 64])
    logged = Path(run.trainer.logger.log_dir) / "metrics.csv"
    run.trainer.logger.save()
    assert {"block3/sae_loss", "block3/segmentation_loss"} <= set(logged.read_text().splitlines()[0].split(","))
    expected = {"image_AUROC", "image_AveragePrecision", "image_F1Score", "image_FalseAlarmRate", "image_MissRate"}
    expected |= {"pixel_AUROC", "pixel_AUPRO", "pixel_F1Score"}
    assert set(metrics[0]) == expected


def test_printed_metrics_are_those_of_the_raw_scores(trained: tuple, mvtec: Path) -> None:
    """scikit-learn on what the torch model returns, against what the engine printed."""
    model, _, metrics = trained
    for name, value in raw_metrics(model, data(mvtec)).items():
        assert metrics[0][name] == pytest.approx(value, abs=1e-4 if name.startswith("pixel") else 1e-5), name


def test_checkpoint_stands_alone(trained: tuple, mvtec: Path, tmp_path: Path) -> None:
    """It loads with weights_only, without hub, weights file or guides file, and gives the same maps."""
    model, run, _ = trained
    checkpoint = torch.load(run.best_model_path, weights_only=True)
    assert checkpoint["hyper_parameters"]["pre_trained"] is False
    with patch("anomalib_spg.components.backbone.Backbone.load_weights") as load:
        restored = SPG.load_from_checkpoint(run.best_model_path)
        assert all(call.args == () for call in load.call_args_list)
    images = torch.rand(2, 3, 90, 70)
    torch.testing.assert_close(restored.eval()(images), model.cpu().eval()(images))
    other = build(pre_trained=True)  # would ask the hub if its weights were ever needed
    results = engine(tmp_path).test(other, datamodule=data(mvtec), ckpt_path=run.best_model_path)
    assert results[0]["image_AUROC"] == pytest.approx(trained[2][0]["image_AUROC"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [4]}, r"layers=\[3\], this model has layers=\[4\]"),
        ({"image_size": 96}, r"image_size=\[64, 64\], this model has image_size=\[96, 96\]"),
        ({"image_score": "top"}, "image_score=max, this model has image_score=top"),
        ({"cls_weight": 0.5}, "cls_weight=0.0, this model has cls_weight=0.5"),
        ({"own_weight": 8.0}, "own_weight=0.0, this model has own_weight=8.0"),
    ],
)
def test_checkpoint_of_another_model(
    trained: tuple, mvtec: Path, tmp_path: Path, arguments: dict, message: str
) -> None:
    """The message says what differs and what to do, whether the model was made before or from the checkpoint."""
    with pytest.raises(ValueError, match=message):
        engine(tmp_path).test(build(**arguments), datamodule=data(mvtec), ckpt_path=trained[1].best_model_path)
    with pytest.raises(ValueError, match=message):
        SPG.load_from_checkpoint(trained[1].best_model_path, **arguments)


def test_checkpoint_of_a_release_without_rarity(trained: tuple, mvtec: Path, tmp_path: Path) -> None:
    """Its thresholds belong to maps of the guides alone."""
    checkpoint = torch.load(trained[1].best_model_path, weights_only=True)
    del checkpoint["identity"], checkpoint["hyper_parameters"]["own_weight"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert SPG.load_from_checkpoint(tmp_path / "old.ckpt").model.own_weight == 0
    with pytest.raises(ValueError, match=r"saved with own_weight=0\.0, this model has own_weight=8"):
        engine(tmp_path).test(build(own_weight=8.0), datamodule=data(mvtec), ckpt_path=tmp_path / "old.ckpt")


def test_checkpoint_with_damaged_guides(trained: tuple, tmp_path: Path) -> None:
    """Numbers that are none, and vectors that are not those of the atoms, are seen when it is loaded."""
    checkpoint = torch.load(trained[1].best_model_path, weights_only=True)
    vectors = checkpoint["state_dict"]["model.guides.0.vectors"]
    for damage, message in ((float("nan"), "not finite"), (0.0, "not the sums of their atoms")):
        checkpoint["state_dict"]["model.guides.0.vectors"] = torch.cat([vectors[:3], vectors[3:] * damage])
        torch.save(checkpoint, tmp_path / "damaged.ckpt")
        with pytest.raises(ValueError, match=f"guides in the checkpoint are damaged: .*{message}"):
            SPG.load_from_checkpoint(tmp_path / "damaged.ckpt")


def test_learning_on(trained: tuple, mvtec: Path, visa: Path, tmp_path: Path) -> None:
    """From a guides file on labelled images: its atoms stay, no dictionary is trained, weights move; a new file."""
    path = next(Path(trained[1].trainer.default_root_dir).rglob("guides.safetensors"))
    before, stored = read_guides(path)
    model = build(backbone=None, layers=None, guides_file=path, learn_on=True, num_atoms=99, guide_epochs=5)
    with patch("anomalib_spg.torch_model.train_sae", side_effect=AssertionError("trains a dictionary")):
        run = engine(tmp_path)
        run.fit(model=model, datamodule=auxiliary(mvtec, visa))
    after, learned = read_guides(next(tmp_path.rglob("guides.safetensors")))
    row = {int(atom): number for number, atom in enumerate(before["0.atom_indices"])}
    rows = [row[int(atom)] for atom in after["0.atom_indices"]]
    torch.testing.assert_close(after["0.atoms"], before["0.atoms"][rows])
    start = before["0.coefficients"][:, rows]
    assert not torch.equal(after["0.coefficients"], start)
    assert not after["0.coefficients"][start == 0].any(), "what a guide does not use stays out of it"
    assert learned["settings"] == {**stored["settings"], "guide_epochs": 5}
    assert learned["trained_on"]["labels"] == "labelled"
    restored = SPG.load_from_checkpoint(run.best_model_path)
    assert restored.guides_file is None
    assert not restored.learn_on
    torch.testing.assert_close(restored.model.guides[0].vectors, after["0.vectors"])


def test_learning_on_from_nothing(tmp_path: Path) -> None:
    """Refused when the model is made: without a file, and without atoms."""
    with pytest.raises(ValueError, match=r"learn_on=True learns on from guides.*guides_file"):
        build(learn_on=True)
    model = build(dictionary=False)
    model.model.guides[0].set(torch.eye(192)[:4], torch.arange(4), torch.eye(4))
    path = model.model.save_guides(tmp_path / "free.safetensors")
    with pytest.raises(ValueError, match=r"'.*free\.safetensors' are free vectors"):
        build(guides_file=path, learn_on=True)


def test_guides_file_is_used_without_training(trained: tuple, mvtec: Path, tmp_path: Path) -> None:
    """SPG(guides_file=...) decides backbone, layer and size by itself, trains nothing, runs on another category."""
    path = Path(trained[1].trainer.default_root_dir) / "weights" / "guides.safetensors"
    model = SPG(guides_file=path, pre_trained=False, visualizer=False)
    assert (model.model.backbone.name, model.model.backbone.layers, tuple(model.input_size)) == (TINY, [3], (64, 64))
    model.model.backbone.load_state_dict(trained[0].model.backbone.state_dict())
    before = model.model.guides[0].vectors.clone()
    results = engine(tmp_path).train(model=model, datamodule=data(mvtec, category="grass"))
    assert torch.equal(model.model.guides[0].vectors.cpu(), before)
    assert "image_AUROC" in results[0]
    assert not model.post_processor.image_threshold.isnan(), "validation must still calibrate the threshold"


@pytest.mark.parametrize("learned_from", ["good parts", "labels", "a guides file"])
def test_checkpoint_of_another_product(
    learned_from: str, trained: tuple, mvtec: Path, visa: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only what has been learned from a product's good parts is for that product alone."""
    arguments: dict[str, Any] = {}
    if learned_from == "a guides file":
        arguments["guides_file"] = Path(trained[1].trainer.default_root_dir) / "weights" / "guides.safetensors"
    run = engine(tmp_path)
    run.fit(build(**arguments), datamodule=auxiliary(mvtec, visa) if learned_from == "labels" else data(mvtec))
    engine(tmp_path).test(build(), datamodule=data(mvtec, category="grass"), ckpt_path=run.best_model_path)
    message = "SPG knows the good parts of 'brick', but these images are of 'grass'"
    assert caplog.text.count(message) == (learned_from == "good parts")
    assert ("knows the good parts" in caplog.text) == (learned_from == "good parts")


def test_same_seed_same_result(mvtec: Path, tmp_path: Path) -> None:
    """Twice the same seed, bit for bit; another seed, other guides."""

    def learn(seed: int) -> torch.Tensor:
        model = build()
        torch.manual_seed(seed)
        engine(tmp_path).fit(model=model, datamodule=data(mvtec))
        return model.model.guides[0].vectors

    def learn_with_own(seed: int, process: int) -> torch.Tensor:
        model = build(seed=seed)
        torch.manual_seed(process)
        engine(tmp_path).fit(model=model, datamodule=data(mvtec))
        return model.model.guides[0].vectors

    assert torch.equal(learn_with_own(3, 1), learn_with_own(3, 2))
    assert torch.equal(learn(3), learn(3))
    assert not torch.equal(learn(3), learn(4))


def test_a_quarter_of_the_good_images_is_held_out(tmp_path: Path) -> None:
    """They set the threshold and are not learned from; few are all learned from; a guides file needs none of them."""
    root = make_mvtec(tmp_path / "data", ("brick",), count=12)

    def fit(count: int, **arguments: Any) -> SPG:
        folder = tmp_path / f"good{count}"
        folder.mkdir(exist_ok=True)
        for path in sorted((root / "brick/train/good").iterdir())[:count]:
            shutil.copyfile(path, folder / path.name)
        source = Folder("good", folder, num_workers=0, test_split_mode="none", val_split_mode="none")
        model = build(**arguments)
        run = engine(tmp_path, limit_val_batches=0)
        run.fit(model=model, datamodule=source)
        assert len(source.train_data) == count
        model.guides_path = Path(run.trainer.default_root_dir) / "weights" / "guides.safetensors"
        return model

    with patch.object(SPGModel, "_store", autospec=True, side_effect=SPGModel._store) as store:
        many = fit(12)
        assert sum(len(call.args[1]) for call in store.call_args_list) == 9 * 2
    assert many.post_processor.threshold.images == 12
    assert len(many.post_processor._scores["held_out"]) == 3
    assert fit(12, hold_out=0).post_processor._scores["held_out"] == []
    few = fit(6)
    assert few.post_processor.threshold.images == 6
    assert len(few.post_processor._scores["learned"]) == 6
    zero_shot = fit(12, backbone=None, layers=None, image_size=None, guides_file=many.guides_path)
    assert zero_shot.post_processor.threshold.images == 12


@pytest.mark.parametrize(("count", "hold_out"), [(12, 0.25), (12, 0.0), (5, 0.25)])
def test_guides_know_the_images_they_were_learned_from(count: int, hold_out: float, tmp_path: Path) -> None:
    """A run that uses them has the threshold of the run that learned them; other images, and older files, are new."""
    root = make_mvtec(tmp_path / "data", ("brick",), count=count) / "brick/train/good"

    def fit(folder: Path, **arguments: Any) -> tuple[SPG, Path]:
        model = build(seed=0, hold_out=hold_out, **arguments)
        source = Folder("good", folder, num_workers=0, test_split_mode="none", val_split_mode="none")
        run = engine(tmp_path, limit_val_batches=0)
        run.fit(model=model, datamodule=source)
        return model, Path(run.trainer.default_root_dir) / "weights" / "guides.safetensors"

    learned, path = fit(root)
    elsewhere = shutil.copytree(root, tmp_path / "copy")

    def use(guides: Path, **arguments: Any) -> SPG:
        weights = tmp_path / "weights.safetensors"
        save_file(learned.model.backbone.vit.state_dict(), weights)
        given = {"backbone": None, "layers": None, "image_size": None, "guides_file": guides, "weights": weights}
        return fit(elsewhere, **given, **arguments)[0]

    used = use(path)
    assert used.post_processor._scores == learned.post_processor._scores
    assert torch.equal(used.post_processor.image_threshold, learned.post_processor.image_threshold)
    assert torch.equal(used.post_processor.pixel_threshold, learned.post_processor.pixel_threshold)
    kinds = {kind: len(scores) for kind, scores in used.post_processor._scores.items()}
    held_out = 3 if hold_out and count == 12 else 0
    assert kinds == {"held_out": held_out, "learned": count - held_out, "good": 0, "bad": 0}

    learned_on = use(path, learn_on=True)
    assert len(learned_on.post_processor._scores["held_out"]) == held_out, (
        "those that they were learned from are not new"
    )

    digests = read_guides(path)[1]["trained_on"]["digests"]
    assert len(digests) == count - held_out
    changed = next(image for image in sorted(elsewhere.iterdir()) if short_digest(image) in digests)
    Image.effect_noise((96, 96), 40).convert("RGB").save(changed)
    assert len(use(path).post_processor._scores["held_out"]) == held_out + 1
    tensors, header = load_tensors(path)
    save_tensors(tmp_path / "older.safetensors", tensors, {**header, "trained_on": '{"dataset": "own"}'})
    assert len(use(tmp_path / "older.safetensors").post_processor._scores["held_out"]) == count


@pytest.mark.parametrize("zero_shot", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_good_parts_of_the_target_set_the_threshold(
    trained: tuple, zero_shot: bool, known: bool, tmp_path: Path
) -> None:
    """Nothing is learned from them; those that the guides are learned from, as labelled images, are not new."""
    root = make_mvtec(tmp_path / "data", ("gravel", "grass"), count=10)
    arguments: dict[str, Any] = {"seed": 0}
    if zero_shot:
        guides = Path(trained[1].trainer.default_root_dir) / "weights" / "guides.safetensors"
        arguments |= {"backbone": None, "layers": None, "image_size": None, "guides_file": guides}
    target = {"name": "own", "root": root / "gravel", "normal_dir": "train/good"}
    other = {"name": "other", "root": root / "grass", "normal_dir": "train/good", "mask_dir": "ground_truth/hole"}
    other |= {"abnormal_dir": "test/hole"}
    other |= {"normal_test_dir": root / "gravel/train/good" if known else "test/good"}
    datamodule = AuxiliaryTarget(
        *("Folder", "Folder"), other, {**target, "abnormal_dir": "test/hole"}, num_workers=0, train_batch_size=5, seed=0
    )
    model = build(**arguments)
    with patch.object(SPGModel, "_store", autospec=True, side_effect=SPGModel._store) as store:
        engine(tmp_path).fit(model=model, datamodule=datamodule)
    assert sum(len(call.args[1]) for call in store.call_args_list) == (0 if zero_shot else 20)
    counts = {kind: len(found) for kind, found in model.post_processor._scores.items()}
    new = 0 if known and not zero_shot else 8
    assert counts == {"held_out": new, "learned": 8 - new, "good": 1, "bad": 5}
    assert model.post_processor.threshold.images == 9


def test_a_second_fit_learns_the_new_data(mvtec: Path, tmp_path: Path) -> None:
    """The same object on other images equals a fresh one; tokens of a fit that failed are forgotten."""

    def fit(model: SPG, category: str) -> torch.Tensor:
        engine(tmp_path).fit(model=model, datamodule=data(mvtec, category=category))
        return model.model.guides[0].vectors

    fresh, used = build(seed=0), build(seed=0)
    used.model.load_state_dict(fresh.model.state_dict())
    expected = fit(fresh, "grass")
    assert not torch.equal(fit(used, "brick"), expected)
    with patch.object(SPGModel, "fit", side_effect=OSError("no")), pytest.raises(OSError, match="no"):
        fit(used, "brick")
    assert len(used.model.store)
    assert torch.equal(fit(used, "grass"), expected)
    assert not len(used.model.store)


def test_labelled_auxiliary_data(mvtec: Path, visa: Path, tmp_path: Path) -> None:
    """With labels nothing is drawn: each image passes once, with its own mask and label."""
    model = build(views=5)
    datamodule = auxiliary(mvtec, visa)
    passed = []
    with patch.object(model, "synthesizer", side_effect=AssertionError("drew on labelled data")):
        hook = model.model.backbone.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
        run = engine(tmp_path)
        run.fit(model=model, datamodule=datamodule)
        hook.remove()
    assert passed[:4] == [5, 5, 5, 1]
    _, metadata = read_guides(Path(run.trainer.default_root_dir) / "weights" / "guides.safetensors")
    assert metadata["trained_on"]["labels"] == "labelled"
    assert metadata["trained_on"]["categories"] == ["brick", "grass"]
    assert "image_AUROC" in run.test(model=model, datamodule=datamodule)[0]


def test_memory_limit_is_checked_before_the_first_pass(mvtec: Path, tmp_path: Path) -> None:
    """The need of all views is known beforehand."""
    model = build(memory_limit=1e-5, tokens_dir=None)
    with pytest.raises(MemoryError, match="tokens of 8 images of 64x64 need"):
        engine(tmp_path).fit(model=model, datamodule=data(mvtec))
    assert not len(model.model.store)


@pytest.mark.parametrize("labelled", [True, False])
def test_tokens_beyond_the_memory_limit_go_to_disk(
    labelled: bool, mvtec: Path, visa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On disk as in memory; an interrupted run goes on without the backbone; nothing is left behind."""
    monkeypatch.chdir(tmp_path)

    def datamodule() -> Any:
        return auxiliary(mvtec, visa) if labelled else data(mvtec)

    def vectors(model: SPG) -> torch.Tensor:
        engine(tmp_path).fit(model=model, datamodule=datamodule())
        return model.model.guides[0].vectors

    expected = vectors(build(seed=0))
    assert not Path("tokens").exists(), "what fits memory stays there"
    assert torch.equal(vectors(build(seed=0, memory_limit=0)), expected)
    assert not Path("tokens").exists(), "the folder is emptied"

    with patch("anomalib_spg.torch_model.train_sae", side_effect=KeyboardInterrupt), pytest.raises(SystemExit):
        vectors(build(seed=0, memory_limit=0))
    assert list(Path("tokens").rglob("*.safetensors"))
    model = build(seed=0, memory_limit=0)
    with patch.object(model.model, "_store", side_effect=AssertionError("passed again")):
        resumed = vectors(model)
    if labelled:  # drawing anomalies moves the random numbers that the dictionary starts from
        assert torch.equal(resumed, expected)
    assert not Path("tokens").exists()


def test_corrected_masks_are_read_again(tmp_path: Path, visa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks lie beside the tokens on disk: an interrupted run is not taken up with the masks of before."""
    monkeypatch.chdir(tmp_path)
    root = make_mvtec(tmp_path / "data")

    def stored() -> int:
        model = build(seed=0, memory_limit=0)
        with patch("anomalib_spg.torch_model.train_sae", side_effect=KeyboardInterrupt), pytest.raises(SystemExit):
            engine(tmp_path).fit(model=model, datamodule=auxiliary(root, visa))
        return len([path for path in Path("tokens").iterdir() if path.is_dir()])

    assert stored() == 1
    assert stored() == 1
    mask = next((root / "brick/ground_truth").rglob("*.png"))
    Image.new("L", Image.open(mask).size, 255).save(mask)
    assert stored() == 2


@pytest.mark.parametrize(
    ("difference", "resumed"),
    [
        ({}, True),
        ({"k": 4}, True),
        ({"views": 3}, False),
        ({"seed": 1}, False),
        ({"weights": "others"}, False),
        ({"normalise": "otherwise"}, False),
        ({"synthesizer": AnomalySynthesizer(probability=0.7)}, False),
        ({"augmentations": RandomHorizontalFlip()}, False),
        ({"precision": "bf16-mixed"}, False),
    ],
)
def test_what_an_interrupted_run_left_is_taken_up_only_where_it_fits(
    difference: dict[str, Any], resumed: bool, mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same views, seed, weights, normalisation, synthesizer, augmentations, precision; what acts later may differ."""
    monkeypatch.chdir(tmp_path)

    def interrupt(**given: Any) -> int:
        arguments = {name: given[name] for name in ("k", "views", "seed") if name in given}
        model = build(**{"seed": 0, "memory_limit": 0, **arguments})
        model.synthesizer = given.get("synthesizer", model.synthesizer)
        if "weights" in given:
            torch.nn.init.normal_(model.model.backbone.vit.blocks[-1].mlp.fc2.bias)
        if "normalise" in given:
            model.pre_processor.transform.transforms[-1].mean = [0.1, 0.2, 0.3]
        run = engine(tmp_path, precision=given.get("precision", "32-true"))
        datamodule = data(mvtec, train_augmentations=given.get("augmentations"))
        with (
            patch.object(model.model, "_store", wraps=model.model._store) as store,
            patch("anomalib_spg.torch_model.train_sae", side_effect=KeyboardInterrupt),
            pytest.raises(SystemExit),
        ):
            run.fit(model=model, datamodule=datamodule)
        return store.call_count

    assert interrupt() == 2
    assert interrupt(**difference) == (0 if resumed else difference.get("views", 2))


def test_the_same_object_goes_on_after_an_interruption(
    mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, where the cell is run again: what is on the disk stays there."""
    monkeypatch.chdir(tmp_path)
    model = build(seed=0, memory_limit=0)
    with patch("anomalib_spg.torch_model.train_sae", side_effect=KeyboardInterrupt), pytest.raises(SystemExit):
        engine(tmp_path).fit(model=model, datamodule=data(mvtec))
    with patch.object(model.model, "_store", side_effect=AssertionError("passed again")):
        engine(tmp_path).fit(model=model, datamodule=data(mvtec))
    assert not Path("tokens").exists()


def test_a_checkpoint_of_an_unfinished_pass_goes_on(
    mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a checkpoint callback of one's own may leave it: nothing has been learned in it, so there is no warning."""
    monkeypatch.chdir(tmp_path)

    def fit(checkpoint: Path | None = None, **arguments: Any) -> SPG:
        model, images = build(seed=0, memory_limit=0), data(mvtec, train_batch_size=1)
        engine(tmp_path, **arguments).fit(model=model, datamodule=images, ckpt_path=checkpoint)
        return model

    every_batch = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with patch("anomalib_spg.torch_model.train_sae", side_effect=KeyboardInterrupt), pytest.raises(SystemExit):
        fit(callbacks=[every_batch])
    assert fit(tmp_path / "step=2.ckpt").model.is_fitted


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    """A truncated file, whose name PIL does not say."""
    root = make_mvtec(tmp_path / "data")
    broken = root / "brick/train/good/002.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"Cannot read 1 of 16 files: .*train/good/002\.png"):
        engine(tmp_path).fit(model=build(), datamodule=data(root))


def test_empty_training_set(tmp_path: Path, mvtec: Path) -> None:
    """No images at all."""
    datamodule = data(mvtec)
    datamodule.setup("fit")
    datamodule.train_data.samples = datamodule.train_data.samples.iloc[:0]
    datamodule._is_setup = True
    with pytest.raises(ValueError, match="training set of MVTecAD is empty"):
        engine(tmp_path).fit(model=build(), datamodule=datamodule)


def test_grey_files_and_predict_on_a_folder(trained: tuple, tmp_path: Path) -> None:
    """Grey PNGs of other sizes are predicted on; labels come from the calibrated threshold."""
    for index, size in enumerate([(50, 70), (64, 64)]):
        Image.new("L", size, 100 + index).save(tmp_path / f"{index}.png")
    predictions = engine(tmp_path / "out").predict(trained[0], data_path=tmp_path)
    assert len(predictions) == 2
    for prediction in predictions:
        assert prediction.anomaly_map.shape[-2:] == (64, 64)
        assert 0 <= prediction.pred_score <= 1
        assert prediction.pred_label.dtype == torch.bool


def test_normal_images_only(mvtec: Path, tmp_path: Path) -> None:
    """A folder of good parts and nothing else: trains, calibrates on drawn defects, predicts."""
    datamodule = Folder(
        name="good",
        root=mvtec / "brick",
        normal_dir="train/good",
        test_split_mode="synthetic",
        test_split_ratio=0.5,
        val_split_mode="same_as_test",
        num_workers=0,
    )
    results = engine(tmp_path).train(model=build(), datamodule=datamodule)
    assert "image_AUROC" in results[0]


def test_rectangular_image_size(mvtec: Path, tmp_path: Path) -> None:
    """Height and width differ, neither is a multiple of the patch."""
    model = build(image_size=(72, 100))
    engine(tmp_path).train(model=model, datamodule=data(mvtec))
    assert model.eval()(torch.rand(1, 3, 33, 55)).anomaly_map.shape[-2:] == (72, 100)


@pytest.mark.parametrize(("asked", "is_said"), [(3, True), (1, False), (None, False)])
def test_epochs_that_do_nothing(
    asked: int | None, is_said: bool, mvtec: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The command keeps its config in a callback, which knows of another number of epochs: SPG names its own."""
    kept = Callback()
    kept.config = Namespace(trainer=Namespace(max_epochs=asked))
    run = engine(tmp_path, callbacks=[kept], limit_val_batches=0)
    with caplog.at_level(logging.WARNING):
        run.fit(build(), datamodule=data(mvtec))
    said = "max_epochs=3 does nothing: SPG passes the training images once. --model.sae_epochs and --model.guide_epochs"
    assert (said in caplog.text) == is_said
