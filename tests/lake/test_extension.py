# SPDX-License-Identifier: Apache-2.0

"""Further good images in a bank that is filled: what changes, what stays, and what the threshold rests on then."""

import copy
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from anomalib_lake import LAKE, ExplanationVisualizer, LAKEModel, extension
from anomalib_lake.extension import Extension
from anomalib_spg.explanations.examples import Examples
from tests.helpers import TINY, data, engine


def build(**arguments: Any) -> LAKE:
    """A small model with random weights, the same each time."""
    torch.manual_seed(0)
    small = {"backbone": TINY, "pre_trained": False, "image_size": 64, "num_neurons": 20, "seed": 0}
    return LAKE(**{**small, "k_shot": 2, "num_shifts": 1, "visualizer": False, **arguments})


def torch_model(images: torch.Tensor, **arguments: Any) -> LAKEModel:
    """A fitted torch model."""
    torch.manual_seed(0)
    model = LAKEModel(TINY, layers=[5], scales=[1], pre_trained=False, num_neurons=20, own_weight=0, **arguments)
    model.train()(images)
    model.fit()
    return model.eval()


@pytest.fixture(scope="module")
def fitted(mvtec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run on two of four images of brick, with the pictures for explanations beside it."""
    run = engine(tmp_path_factory.mktemp("fitted"), limit_val_batches=0)  # good parts only
    run.fit(model=build(visualizer=ExplanationVisualizer()), datamodule=data(mvtec))
    return Path(run.best_model_path)


@pytest.fixture
def rejected(mvtec: Path, tmp_path: Path) -> Path:
    """A folder of good images unlike those before: grass."""
    return Path(shutil.copytree(mvtec / "grass/train/good", tmp_path / "rejected"))


def test_what_is_taken_in_is_normal() -> None:
    """Deviation 0 for the new images, never more than before for any; neurons, scale and old tokens stay."""
    old, new, others = torch.randn(3, 2, 3, 64, 64)
    model = torch_model(old)
    before = model(torch.cat([new, others])).anomaly_map
    state = {name: value.clone() for name, value in model.state_dict().items()}
    extension = Extension(model)
    extension.add(new)
    extension.finish()
    after = model(torch.cat([new, others])).anomaly_map
    assert (after <= before + 1e-6).all()
    assert after[:2].max() < 1e-2 < before[:2].min()
    bank = model.banks[0][0]
    assert bank.image_indices.unique().tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(bank.tokens[:32], state["banks.0.0.tokens"])
    for name, value in model.state_dict().items():
        if not name.startswith("banks.") or name.endswith("distance_scale"):
            torch.testing.assert_close(value, state[name])


def test_scores_of_the_new_images() -> None:
    """Each against all others, in batches or at once: as a model without it scores it, times the correction."""
    new = torch.randn(3, 3, 64, 64)
    model = torch_model(torch.randn(2, 3, 64, 64))
    for batch_size in (1, 3):
        extension = Extension(copy.deepcopy(model))
        for batch in new.split(batch_size):
            extension.add(batch)
        found = extension.left_out().pred_score
        for index in range(3):
            without = copy.deepcopy(model)
            Extension(without).add(new[[other for other in range(3) if other != index]])
            without.banks[0][0].distance_scale /= (4 / 5) ** 0.09
            torch.testing.assert_close(found[index], without(new[index : index + 1]).pred_score[0])


def test_a_bank_that_is_full() -> None:
    """Keeps what it knows until it has twice its size, with tokens of old and new images; so no score rises."""
    old, others = torch.randn(4, 3, 64, 64), torch.randn(3, 3, 64, 64)
    model = torch_model(old, bank_size=40)
    bank = model.banks[0][0]
    known, before = bank.tokens, model(torch.cat([old, others])).pred_score
    extension = Extension(model)
    for index in range(6):
        extension.add(torch.randn(2, 3, 64, 64))
        assert len(bank.tokens) <= 160
        if index == 0:  # with its 32 tokens there is room
            torch.testing.assert_close(bank.tokens[:40], known)
            assert (model(torch.cat([old, others])).pred_score <= before + 1e-6).all()
    extension.finish()
    assert len(bank.tokens) == len(bank.patch_indices) == 80
    assert {0, 15} <= set(bank.image_indices.tolist()) <= set(range(16))


def test_an_empty_bank_or_nothing_to_add() -> None:
    """Said, and what to do."""
    with pytest.raises(RuntimeError, match="no normality bank yet.*Train it first"):
        Extension(LAKEModel(TINY, pre_trained=False))
    with pytest.raises(ValueError, match="no further normal images"):
        Extension(torch_model(torch.randn(2, 3, 64, 64))).left_out()


def test_never_again(fitted: Path, rejected: Path, mvtec: Path, tmp_path: Path) -> None:
    """Good parts that were rejected are accepted, and further ones like them; a normal checkpoint, which goes on."""
    arguments = {"few_shot_source": rejected, "k_shot": None}
    before = LAKE.load_from_checkpoint(fitted)
    further = mvtec / "grass/test/good"
    assert all(bool(found.pred_label) for found in engine(tmp_path / "b").predict(before, data_path=rejected))
    run = engine(tmp_path / "run", limit_val_batches=0)
    run.fit(model=build(extend=fitted, **arguments), datamodule=data(mvtec))
    model = LAKE.load_from_checkpoint(run.best_model_path)
    assert [Path(path).parent.name for path in model.normal_images] == ["good"] * 2 + ["rejected"] * 4
    assert model.extend is None
    assert model.model.banks[0][0].image_indices.unique().tolist() == list(range(6))
    for folder in (rejected, further):
        found = engine(tmp_path / "a").predict(model, data_path=folder)
        assert not any(bool(prediction.pred_label) for prediction in found)
    torch.testing.assert_close(model.model.neurons[0].indices, before.model.neurons[0].indices)
    # Held out are the two images of brick that no bank holds, scored anew, and the new ones.
    assert len(model.post_processor._scores["held_out"]) == 2 + 4
    assert [Path(path).parent.name for path in model.held_out_images] == ["rejected"] * 4 + ["good"] * 2
    again = build(extend=run.best_model_path, **arguments)
    with pytest.raises(ValueError, match=r"holds 4 of the images already: .*rejected/000\.png"):
        engine(tmp_path / "again").fit(model=again, datamodule=data(mvtec))


def test_images_are_rotated_as_those_before(fitted: Path, mvtec: Path, tmp_path: Path) -> None:
    """A bank without rotated copies takes none in, and says so."""
    with pytest.raises(ValueError, match="saved with num_rotations=1, this model has num_rotations=8"):
        engine(tmp_path).fit(model=build(extend=fitted, num_rotations=8), datamodule=data(mvtec, category="grass"))


def test_scores_of_images_that_are_not_at_hand(fitted: Path, mvtec: Path, tmp_path: Path) -> None:
    """They count as they were; without few_shot_source further images are drawn from the training set."""
    before = LAKE.load_from_checkpoint(fitted).post_processor._scores["held_out"]
    only_new = data(mvtec, category="grass")
    model = build(extend=fitted, k_shot=4)
    engine(tmp_path, limit_val_batches=0).fit(model=model, datamodule=only_new)
    assert len(before) == 2
    assert model.post_processor._scores["held_out"][:2] == before
    assert len(model.post_processor._scores["held_out"]) == 2 + 4
    model = build(extend=fitted, k_shot=2)
    engine(tmp_path, limit_val_batches=0).fit(model=model, datamodule=data(mvtec))
    assert len(set(model.normal_images)) == 4, "the other two of the four"
    assert len(model.post_processor._scores["held_out"]) == 2, "each counts once"
    model = build(extend=fitted, k_shot=3)
    with pytest.raises(ValueError, match="k_shot=3 asks for more normal images than the 2 in"):
        engine(tmp_path).fit(model=model, datamodule=data(mvtec))


def test_explanations_know_all_images(fitted: Path, rejected: Path, mvtec: Path, tmp_path: Path) -> None:
    """Numbers of images in the bank are those of the pictures: the earlier ones, then the new ones."""
    run = engine(tmp_path)
    visualizer = ExplanationVisualizer()
    model = build(extend=fitted, few_shot_source=rejected, k_shot=None, visualizer=visualizer)
    run.fit(model=model, datamodule=data(mvtec))
    examples = Examples.load(next(tmp_path.rglob("examples.safetensors")))
    assert sorted(examples.images) == list(range(6))
    assert not any(image in pickle.dumps(model) for image in examples.images.values()), "no export holds them"
    earlier = Examples.load(fitted.parents[1] / "examples.safetensors")
    assert {number: examples.images[number] for number in (0, 1)} == earlier.images


def test_the_latest_run_is_the_one_before(fitted: Path, mvtec: Path, tmp_path: Path) -> None:
    """anomalib's link to the newest results leads elsewhere once the run has begun."""
    shutil.copytree(fitted.parents[2], tmp_path / "v0")
    (tmp_path / "latest").symlink_to("v0")
    model = build(extend=tmp_path / "latest/weights/lightning" / fitted.name, k_shot=1)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("v1")
    engine(tmp_path / "run", limit_val_batches=0).fit(model=model, datamodule=data(mvtec))
    assert model.model.banks[0][0].image_indices.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"extend='.*other\.ckpt' is no file.*weights/lightning/model\.ckpt"),
        (b"text", r"Cannot read the checkpoint extend='.*other\.ckpt'.*weights/lightning/model\.ckpt"),
        ({"state_dict": {}}, r"extend='.*other\.ckpt' is no checkpoint of LAKE"),
    ],
)
def test_other_files(content: Any, message: str, mvtec: Path, tmp_path: Path) -> None:
    """Named, and where a checkpoint is."""
    path = tmp_path / "other.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        engine(tmp_path).fit(model=build(extend=path), datamodule=data(mvtec))


def test_a_checkpoint_of_other_arguments(fitted: Path, mvtec: Path, tmp_path: Path) -> None:
    """The message says what differs."""
    with pytest.raises(ValueError, match="num_neurons=20, this model has num_neurons=30"):
        engine(tmp_path).fit(model=build(extend=fitted, num_neurons=30), datamodule=data(mvtec))


def test_the_first_fit_after_a_failed_one(fitted: Path, mvtec: Path, tmp_path: Path) -> None:
    """Begins with the checkpoint's bank again."""
    broken = tmp_path / "broken"
    broken.mkdir()
    Image.new("RGB", (64, 64)).save(broken / "a.png")
    (broken / "b.png").write_bytes(b"no image")
    model = build(extend=fitted, few_shot_source=broken, k_shot=None)
    with pytest.raises(ValueError, match=r"b\.png"):
        engine(tmp_path).fit(model=model, datamodule=data(mvtec))
    model.few_shot_source, model.k_shot = None, 1
    engine(tmp_path).fit(model=model, datamodule=data(mvtec))
    assert model.model.banks[0][0].image_indices.unique().tolist() == [0, 1, 2]


def test_nothing_further_to_take_in(fitted: Path, mvtec: Path, tmp_path: Path) -> None:
    """Once the bank holds the whole training set, a folder is asked for."""
    run = engine(tmp_path / "all", limit_val_batches=0)
    run.fit(model=build(extend=fitted, k_shot="auto"), datamodule=data(mvtec))
    model = build(extend=run.best_model_path, k_shot="auto")
    with pytest.raises(ValueError, match=r"holds every normal image of the training set already.* few_shot_source"):
        engine(tmp_path).fit(model=model, datamodule=data(mvtec))


def test_images_the_bank_takes_in_set_no_threshold_as_they_were(
    fitted: Path, mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their old scores are of a bank that did not know them; only the first few have new ones."""
    monkeypatch.setattr(extension, "MOST", 1)
    model = build(extend=fitted, k_shot=2)
    engine(tmp_path, limit_val_batches=0).fit(model=model, datamodule=data(mvtec))
    assert len(model.post_processor._scores["held_out"]) == len(model.held_out_images) == 1
    assert int(model.post_processor._pixels["held_out"].sum()) == 64 * 64


def test_a_named_rate_stays(mvtec: Path, tmp_path: Path) -> None:
    """An extension places the threshold by the rate that the model was fitted with."""
    run = engine(tmp_path / "first", limit_val_batches=0)
    run.fit(model=build(false_alarm_rate=0.3), datamodule=data(mvtec))
    model = build(extend=run.best_model_path, k_shot=1)
    engine(tmp_path / "second", limit_val_batches=0).fit(model=model, datamodule=data(mvtec))
    assert model.post_processor.threshold.rate == pytest.approx(0.3)
    restored = LAKE.load_from_checkpoint(run.best_model_path, false_alarm_rate=None)
    assert restored.post_processor.false_alarm_rate == pytest.approx(0.3)


def test_images_of_another_size_or_not_finite() -> None:
    """They cannot be told from others of the bank by where they are, or at all."""
    further = Extension(torch_model(torch.randn(2, 3, 64, 64)))
    further.add(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"must have one size: after \(4, 4\) patches came \(4, 6\)"):
        further.add(torch.randn(1, 3, 64, 96))
    with pytest.raises(ValueError, match=r"number 4\) are not finite"):
        further.add(torch.full((1, 3, 64, 64), float("nan")))


def test_copies_under_other_names(fitted: Path, mvtec: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of images the bank holds they are refused; of each other, named."""
    again = tmp_path / "again"
    again.mkdir()
    shutil.copyfile(LAKE.load_from_checkpoint(fitted).normal_images[0], again / "other.png")
    with pytest.raises(ValueError, match=r"holds 1 of the images already: .*other\.png"):
        engine(tmp_path).fit(model=build(extend=fitted, few_shot_source=again, k_shot=1), datamodule=data(mvtec))
    shutil.copyfile(again / "other.png", again / "third.png")
    shutil.copyfile(mvtec / "grass/train/good/000.png", again / "a.png")
    engine(tmp_path, limit_val_batches=0).fit(model=build(few_shot_source=again, k_shot=None), datamodule=data(mvtec))
    assert "1 normal images are copies of others" in caplog.text
    assert re.search(r"third\.png of \S+other\.png", caplog.text)
