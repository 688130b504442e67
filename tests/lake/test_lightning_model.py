# SPDX-License-Identifier: Apache-2.0

"""LAKE in anomalib's engine, through the API, on small images and tiny backbones with random weights."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.datasets.base import image as base_dataset
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_lake import LAKE, ExplanationVisualizer
from anomalib_spg.components import normal_images
from tests.helpers import TINY, TINY_CLIP, data, engine, make_mvtec, raw_metrics


def build(**arguments: Any) -> LAKE:
    """A small model with random weights."""
    defaults = {"backbone": TINY, "pre_trained": False, "image_size": 64, "k_shot": 2, "num_neurons": 20}
    torch.manual_seed(0)
    return LAKE(**{**defaults, "visualizer": False, **arguments})


@pytest.fixture(scope="module")
def trained(mvtec: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LAKE, Engine, list[dict[str, float]]]:
    """A fitted model, its engine, and the printed metrics."""
    model, run = build(), engine(tmp_path_factory.mktemp("trained"))
    torch.manual_seed(0)
    return model, run, run.train(model=model, datamodule=data(mvtec))


def test_only_the_drawn_images_are_compared_with(mvtec: Path, tmp_path: Path) -> None:
    """Two of four; the others set the threshold, each decoded once; the datamodule has its training set back."""
    model, datamodule = build(), data(mvtec)
    passed, decoded = [], []
    model.model.backbone.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    read = base_dataset.read_image

    def spy(path: str, **keywords: Any) -> Any:
        decoded.append(str(path))
        return read(path, **keywords)

    with patch.object(base_dataset, "read_image", spy):
        engine(tmp_path, limit_val_batches=1).fit(model=model, datamodule=datamodule)
    assert passed[0] == 2
    train = [path for path in decoded if "/train/" in path]
    assert sorted(train[:2]) == sorted(model.normal_images)
    assert len(set(train)) == len(train) == 4
    assert len(model.normal_images) == 2
    assert len(datamodule.train_data) == 4
    assert model.model.banks[0][0].tokens.shape == (2 * 16, 20)


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_checkpoint_of_another_product(
    command: str, trained: tuple, mvtec: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line names both; its own product and images without one are nothing to speak of."""
    checkpoint, run, model = trained[1].best_model_path, engine(tmp_path), build()

    def said(category: str) -> list[str]:
        caplog.clear()
        getattr(run, command)(model, datamodule=data(mvtec, category=category), ckpt_path=checkpoint)
        return [message for message in caplog.messages if "knows the good parts" in message]

    (message,) = said("grass")
    assert message.startswith("LAKE knows the good parts of 'brick', but these images are of 'grass'")
    assert "Give the checkpoint of 'grass', or train on its good parts" in message
    for other in (run, engine(tmp_path)):  # after a run with a datamodule, too
        caplog.clear()
        other.predict(model, data_path=mvtec / "grass/test/good", ckpt_path=checkpoint)
        assert "knows the good parts" not in caplog.text
    assert not said("brick")


def test_checkpoint_of_a_run_with_other_metrics(mvtec: Path, tmp_path: Path) -> None:
    """Fitted with one metric, as a larger application does, and loaded by a model with defaults; and without any."""
    few = Evaluator(val_metrics=[AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False)])
    run = engine(tmp_path)
    run.fit(model=build(evaluator=few), datamodule=data(mvtec))
    for evaluator in (True, False):
        loaded = build(evaluator=evaluator)
        results = engine(tmp_path).test(loaded, datamodule=data(mvtec), ckpt_path=run.best_model_path)
        assert loaded.model.is_fitted
        assert ("image_AUROC" in results[0]) == evaluator


def test_a_second_fit_learns_the_new_data(mvtec: Path, tmp_path: Path) -> None:
    """The same object on other images equals a fresh one; so it does after a fit that failed half-way."""

    def fit(model: LAKE, category: str) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        engine(tmp_path).fit(model=model, datamodule=data(mvtec, category=category))
        return model.model.banks[0][0].tokens, model.post_processor.image_threshold

    fresh = build()
    used = build()
    used.model.load_state_dict(fresh.model.state_dict())
    expected = fit(fresh, "grass")
    fit(used, "brick")
    datamodule = data(mvtec, category="grass")
    with patch.object(LAKE, "fit", side_effect=OSError("no")), pytest.raises(OSError, match="no"):
        engine(tmp_path).fit(model=used, datamodule=datamodule)
    assert len(datamodule.train_data) == 4
    for one, other in zip(fit(used, "grass"), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_failing_fit_gives_the_training_set_back(mvtec: Path, tmp_path: Path) -> None:
    """Before the first batch, where the drawn images stand in its place."""
    model, datamodule = build(), data(mvtec)
    with patch.object(LAKE, "on_fit_start", side_effect=OSError("no")), pytest.raises(OSError, match="no"):
        engine(tmp_path).fit(model=model, datamodule=datamodule)
    assert len(datamodule.train_data) == 4


@pytest.mark.parametrize("k_shot", [1, 2, 4])
def test_each_normal_image_held_against_the_others(k_shot: int, mvtec: Path, tmp_path: Path) -> None:
    """Without other good images the threshold comes from the normal ones alone, and they are accepted by it."""
    for path in sorted((mvtec / "brick/train/good").iterdir())[:k_shot]:
        (tmp_path / "good").mkdir(exist_ok=True)
        shutil.copyfile(path, tmp_path / "good" / path.name)
    source = Folder("good", tmp_path / "good", num_workers=0, test_split_mode="none", val_split_mode="none")
    model = build(k_shot=None)
    engine(tmp_path, limit_val_batches=0).fit(model=model, datamodule=source)
    threshold = model.post_processor.threshold
    assert (threshold.images, threshold.is_conformal) == (k_shot, False)
    assert 0 < model.post_processor.image_threshold < 1
    assert 0 < model.post_processor.pixel_threshold < 1
    for prediction in engine(tmp_path / "out").predict(model, data_path=tmp_path / "good"):
        assert not prediction.pred_label


@pytest.mark.slow
def test_the_draw_follows_the_seed(mvtec: Path, tmp_path: Path) -> None:
    """Same seed, same images and bank; other seeds, other images; None takes all."""

    def drawn(seed: int, **arguments: Any) -> tuple[list[str], torch.Tensor]:
        model = build(**arguments)
        torch.manual_seed(seed)
        engine(tmp_path, limit_val_batches=1).fit(model=model, datamodule=data(mvtec))
        return model.normal_images, model.model.banks[0][0].tokens.sort(dim=0).values

    paths, tokens = drawn(1)
    again, same = drawn(1)
    assert paths == again
    torch.testing.assert_close(tokens, same)
    assert len({tuple(drawn(seed)[0]) for seed in range(4)}) > 1
    assert len(drawn(1, k_shot=None)[0]) == 4


def test_own_seed_comes_before_that_of_the_process(mvtec: Path, tmp_path: Path) -> None:
    """The command line's --seed_everything reaches nobody in anomalib 2.7; the model's seed does."""

    def drawn(seed: int, process: int) -> list[str]:
        model = build(seed=seed)
        torch.manual_seed(process)
        engine(tmp_path, limit_val_batches=1).fit(model=model, datamodule=data(mvtec))
        return model.normal_images

    assert drawn(1, 5) == drawn(1, 6)
    assert len({tuple(drawn(seed, 5)) for seed in range(4)}) > 1


def test_printed_metrics_are_those_of_the_raw_scores(trained: tuple, mvtec: Path) -> None:
    """scikit-learn on what the torch model returns, against what the engine printed."""
    model, _, metrics = trained
    for name, value in raw_metrics(model, data(mvtec)).items():
        assert metrics[0][name] == pytest.approx(value, abs=1e-4 if name.startswith("pixel") else 1e-5), name


def test_checkpoint_stands_alone(trained: tuple, mvtec: Path, tmp_path: Path) -> None:
    """It loads with weights_only, without hub or normal images, holds neurons and variances, gives the same maps."""
    model, run, metrics = trained
    checkpoint = torch.load(run.best_model_path, weights_only=True)
    assert checkpoint["hyper_parameters"]["pre_trained"] is False
    assert checkpoint["normal_images"] == model.normal_images
    assert checkpoint["state_dict"]["model.neurons.0.indices"].shape == (20,)
    assert checkpoint["state_dict"]["model.neurons.0.variances"].shape == (192,)
    restored = LAKE.load_from_checkpoint(run.best_model_path)
    images = torch.rand(2, 3, 90, 70)
    torch.testing.assert_close(restored.eval()(images), model.cpu().eval()(images))
    other = build(pre_trained=True)  # would ask the hub if its weights were ever needed
    results = engine(tmp_path).test(other, datamodule=data(mvtec), ckpt_path=run.best_model_path)
    assert results[0]["image_AUROC"] == pytest.approx(metrics[0]["image_AUROC"])


def test_what_a_checkpoint_does_not_restore(tmp_path: Path) -> None:
    """As the README says of anomalib 2.7: visualizer and evaluator; and it removes a given one if there was none."""
    few = Evaluator(test_metrics=[AUROC(fields=["pred_score", "gt_label"], prefix="image_")])

    def loaded(given: dict[str, Any], **arguments: Any) -> LAKE:
        model = build(**arguments)
        checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        checkpoint["pytorch-lightning_version"] = "2.5.0"
        model.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, tmp_path / "model.ckpt")
        return LAKE.load_from_checkpoint(tmp_path / "model.ckpt", **given)

    own = {"visualizer": ExplanationVisualizer(), "evaluator": few}
    defaults = loaded({}, **own)
    assert type(defaults.visualizer) is ImageVisualizer
    assert len(defaults.evaluator.test_metrics) > 1
    given = loaded(own, **own)
    assert given.visualizer is own["visualizer"]
    assert given.evaluator is few
    assert loaded(own, visualizer=False).visualizer is None


def test_checkpoint_of_before_the_own_image(tmp_path: Path) -> None:
    """It knows neither own_weight nor top_patches, and goes on scoring by the bank and its maximum."""
    arguments = {"backbone": TINY, "layers": [4, 7], "num_neurons": 20, "image_size": 64, "pre_trained": False}
    model = LAKE(**arguments, own_weight=0, top_patches=1)
    model.model.train()(torch.randn(2, 3, 64, 64))
    model.model.fit()
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict(), "hyper_parameters": {}}
    checkpoint["pytorch-lightning_version"] = "2.5.0"
    model.on_save_checkpoint(checkpoint)
    del checkpoint["identity"]
    for name in ("own_weight", "top_patches"):
        del checkpoint["hyper_parameters"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    restored = LAKE.load_from_checkpoint(tmp_path / "old.ckpt")
    del checkpoint["hyper_parameters"]["num_neighbors"]  # older still
    with pytest.raises(ValueError, match="num_neighbors=1, this model has num_neighbors=5"):
        LAKE(**arguments, num_neighbors=5).on_load_checkpoint(checkpoint)
    images = torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(restored.model.eval()(images), model.model.eval()(images))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [4]}, r"layers=\[4, 7\], this model has layers=\[4\]"),
        ({"image_size": 96}, r"image_size=\[64, 64\], this model has image_size=\[96, 96\]"),
        ({"backbone": "vit_small_patch16_224"}, "backbone=vit_tiny_patch16_224, this model has backbone=vit_small"),
        ({"selection": "all"}, "selection=variance, this model has selection=all"),
        ({"num_neighbors": 3}, "num_neighbors=1, this model has num_neighbors=3"),
    ],
)
def test_checkpoint_of_another_model(
    trained: tuple, mvtec: Path, tmp_path: Path, arguments: dict, message: str
) -> None:
    """The message says what differs and what to do, whether the model was made before or from the checkpoint."""
    with pytest.raises(ValueError, match=message):
        engine(tmp_path).test(build(**arguments), datamodule=data(mvtec), ckpt_path=trained[1].best_model_path)
    with pytest.raises(ValueError, match=message):
        LAKE.load_from_checkpoint(trained[1].best_model_path, **arguments)


@pytest.mark.slow
def test_text_takes_the_category(mvtec: Path, tmp_path: Path, clip_file: Path) -> None:
    """The datamodule's, unless a name is given; a folder without one is an object; the checkpoint needs no tower."""

    def asked(datamodule: Any, **arguments: Any) -> tuple[str, Path]:
        model, run = build(backbone=TINY_CLIP, weights=clip_file, pre_trained=True, **arguments), engine(tmp_path)
        with patch.object(model.model, "fit", wraps=model.model.fit) as fit:
            run.fit(model=model, datamodule=datamodule)
        return fit.call_args.args[0], Path(run.best_model_path)

    folder = Folder(
        name="parts",
        root=mvtec / "brick",
        normal_dir="train/good",
        abnormal_dir="test/hole",
        num_workers=0,
    )
    assert asked(data(mvtec), class_name="paving stone")[0] == "paving stone"
    assert asked(folder)[0] == "object"
    name, checkpoint = asked(data(mvtec))
    assert name == "brick"
    with patch("anomalib_lake.torch_model.read_checkpoint", side_effect=AssertionError("asked for the tower")):
        restored = LAKE.load_from_checkpoint(checkpoint).eval()
        assert restored.model.text_embeddings.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
        assert restored(torch.rand(1, 3, 64, 64)).pred_score.shape == (1,)


def test_normal_images_from_a_folder(mvtec: Path, tmp_path: Path) -> None:
    """few_shot_source takes the place of the training set; sizes and modes may differ there."""
    source = tmp_path / "few"
    source.mkdir()
    for index, size in enumerate([(80, 60), (100, 100), (64, 64)]):
        Image.effect_noise(size, 60).convert("L" if index else "RGB").save(source / f"{index}.png")
    model = build(few_shot_source=source, k_shot=3)
    engine(tmp_path / "run").train(model=model, datamodule=data(mvtec))
    assert [Path(path).name for path in model.normal_images] == ["0.png", "1.png", "2.png"]
    assert model.model.banks[0][0].tokens.shape[0] == 3 * 16


@pytest.mark.parametrize(
    ("steps", "aspects"),
    [
        ([Resize((64, 64))], [2.0, 2 / 3]),
        ([Resize(64), CenterCrop(64)], [1.0, 1.0]),
        ([Resize((64, 128)), CenterCrop(64)], [1.0, 1 / 3]),
    ],
)
def test_rotations_know_the_shape_of_the_files(steps: list, aspects: list[float], mvtec: Path, tmp_path: Path) -> None:
    """Images resized to a square are rotated as the part is; cutting out their middle squeezes nothing."""
    source = tmp_path / "few"
    source.mkdir()
    sizes = [(100, 50), (60, 90)]
    for index, size in enumerate(sizes):
        Image.effect_noise(size, 60).convert("RGB").save(source / f"{index}.png")
    pre_processor = PreProcessor(Compose([*steps, Normalize([0.5] * 3, [0.5] * 3)]))
    model = build(few_shot_source=source, num_rotations=3, pre_processor=pre_processor)
    with patch.object(model.model, "copies", wraps=model.model.copies) as rotated:
        engine(tmp_path / "run").train(model=model, datamodule=data(mvtec))
    found = [call.args[1] for call in rotated.call_args_list]
    assert found == pytest.approx(aspects)
    assert len(model.model.banks[0][0].tokens) > 2 * 16


def test_labelled_defects_are_never_drawn(mvtec: Path, tmp_path: Path) -> None:
    """A training set that holds anomalous images gives its normal ones only."""
    datamodule = data(mvtec)
    datamodule.setup("fit")
    samples = datamodule.train_data.samples
    samples.loc[samples.index[:2], "label_index"] = 1
    datamodule._is_setup = True
    model = build()
    engine(tmp_path, limit_val_batches=1).fit(model=model, datamodule=datamodule)
    assert sorted(model.normal_images) == sorted(samples.image_path[2:].astype(str))


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_normal_images(count: int, mvtec: Path, tmp_path: Path) -> None:
    """Says how many there were."""
    source = tmp_path / "few"
    source.mkdir()
    for path in sorted((mvtec / "brick/train/good").iterdir())[:count]:
        shutil.copyfile(path, source / path.name)
    message = "no normal images in|No normal images in" if count == 0 else "k_shot=4 asks for more .* than the 3 in"
    with pytest.raises(ValueError, match=message):
        engine(tmp_path).fit(model=build(k_shot=4, few_shot_source=source), datamodule=data(mvtec))


def test_fewer_in_the_training_set(mvtec: Path, tmp_path: Path) -> None:
    """The datamodule is named."""
    with pytest.raises(ValueError, match="k_shot=5 asks for more normal images than the 4 in the training set of MVTe"):
        engine(tmp_path).fit(model=build(k_shot=5), datamodule=data(mvtec))


@pytest.mark.parametrize(("most", "count"), [(32, 4), (3, 3)])
def test_all_good_parts_up_to_a_number_by_default(
    most: int, count: int, mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them against the others helps to set the threshold; beyond that number the others do, too."""
    monkeypatch.setattr(normal_images, "AUTO", most)
    model = build(k_shot="auto")
    assert LAKE(backbone=TINY, pre_trained=False, image_size=64).k_shot == "auto"
    engine(tmp_path, limit_val_batches=0).fit(model=model, datamodule=data(mvtec))
    assert len(model.normal_images) == count
    assert model.model.banks[0][0].image_indices.unique().tolist() == list(range(count))
    assert len(model.post_processor._scores["learned"]) == count
    assert len(model.post_processor._scores["held_out"]) == len(model.held_out_images) == 4 - count
    # A single image that is left over does not decide about pixels alone.
    assert int(model.post_processor._pixels["held_out"].sum()) == 4 * 64 * 64


def test_unreadable_normal_image_is_named(tmp_path: Path) -> None:
    """A truncated file."""
    root = make_mvtec(tmp_path / "data", categories=("brick",))
    broken = root / "brick/train/good/002.png"
    broken.write_bytes(broken.read_bytes()[:2000])
    datamodule = data(root)
    with pytest.raises(ValueError, match=r"Cannot read 1 of .*train/good/002\.png"):
        engine(tmp_path).fit(model=build(k_shot=None), datamodule=datamodule)
    datamodule = data(root, category="brick")
    model = build(seed=0)

    def fit_until_drawn() -> None:
        for model.seed in range(8):
            engine(tmp_path).fit(model=model, datamodule=datamodule)

    with pytest.raises(ValueError, match=r"train/good/002\.png"):
        fit_until_drawn()
    assert len(datamodule.train_data) == 4, "a failed fit must leave the datamodule as it was"


@pytest.mark.parametrize("place", ["drawn or held out", "few_shot_source"])
def test_image_of_16_bits_is_named(tmp_path: Path, place: str) -> None:
    """Wherever LAKE takes its normal images from, and whether it compares with this one or sets the threshold by it."""
    root = make_mvtec(tmp_path / "data", categories=("brick",))
    source = root / "brick/train/good"
    few = None
    if place == "few_shot_source":
        few = shutil.copytree(source, tmp_path / "few")
    part = (few or source) / "002.png"
    Image.fromarray(np.asarray(Image.open(part).convert("L")).astype(np.uint16) * 16).save(part)
    model = build(k_shot=None if few else 2, few_shot_source=few)
    with pytest.raises(ValueError, match=rf"Image '{part}' has mode I;16"):
        engine(tmp_path).fit(model=model, datamodule=data(root))
    assert not model.model.num_stored


def test_unreadable_image_of_a_folder_is_named(mvtec: Path, tmp_path: Path) -> None:
    """Also where the images are not those of the datamodule."""
    source = tmp_path / "few"
    shutil.copytree(mvtec / "brick/train/good", source)
    (source / "001.png").write_bytes((source / "001.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"Cannot read 1 of .*few/001\.png"):
        engine(tmp_path).fit(model=build(k_shot=None, few_shot_source=source), datamodule=data(mvtec))


def test_only_normal_images(mvtec: Path, tmp_path: Path) -> None:
    """Good parts and nothing else: the threshold lies above them, so that new good ones pass."""
    datamodule = Folder(
        name="good",
        root=mvtec / "brick",
        normal_dir="train/good",
        normal_test_dir="test/good",
        val_split_mode="same_as_test",
        num_workers=0,
    )
    model = build(false_alarm_rate=0.01)
    engine(tmp_path).fit(model=model, datamodule=datamodule)
    predictions = engine(tmp_path).predict(model, data_path=mvtec / "brick/test/good")
    assert not any(bool(prediction.pred_label) for prediction in predictions)
    assert all(0 < float(prediction.pred_score) < 0.5 for prediction in predictions)


@pytest.mark.parametrize("k_shot", [0, -1])
def test_bad_shots(k_shot: int) -> None:
    """Named, and how to say all."""
    with pytest.raises(ValueError, match=f"k_shot={k_shot} must be at least 1"):
        build(k_shot=k_shot)
