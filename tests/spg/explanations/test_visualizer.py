# SPDX-License-Identifier: Apache-2.0

"""Explanations as users get them: by the real ``anomalib`` command with real weights, and in a real browser."""

import io
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.data import Folder, InferenceBatch
from anomalib.data.utils import read_image
from lightning.pytorch.callbacks import LambdaCallback
from PIL import Image

from anomalib_lake import LAKE, LAKEModel
from anomalib_spg import SPG, ExplanationVisualizer, SPGModel
from anomalib_spg.components.pre_processor import default_pre_processor
from anomalib_spg.explanations.categories import atom_usage, is_general, neuron_overlap
from anomalib_spg.explanations.examples import Examples, digest, to_picture
from anomalib_spg.explanations.figures import plot_explanation
from anomalib_spg.explanations.report import UNFINISHED, write_report
from anomalib_spg.quickstart import BACKBONE
from tests.benchmarks.faithfulness import faithfulness
from tests.helpers import BROWSER, TINY, data, dump, engine, few_textiles, run_command, shown_names

COUNT = 8  # images per folder
ON = ["--model.visualizer", "anomalib_spg.ExplanationVisualizer"]


def train(quickstart: Path, folder: Path, config: str, command: Callable[..., str], **arguments: Any) -> Path:
    """Run ``anomalib train`` with the visualizer on few images; return the results folder."""
    settings = few_textiles(quickstart, folder, COUNT, config)
    settings["model"]["init_args"] |= arguments
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    output = command("train", "--config", "config.yaml", *ON, folder=folder)
    assert "Explanations lack" not in output
    return next((folder / "results").glob("*/textile/v0"))


@pytest.fixture(scope="module")
def spg(quickstart: Path, tmp_path_factory: pytest.TempPathFactory, anomalib_command: Callable[..., str]) -> Path:
    """Results of SPG."""
    small = {"views": 6, "num_atoms": 256, "sae_epochs": 8, "guide_epochs": 20}
    return train(quickstart, tmp_path_factory.mktemp("spg"), "quickstart.yaml", anomalib_command, **small)


@pytest.fixture(scope="module")
def lake(quickstart: Path, tmp_path_factory: pytest.TempPathFactory, anomalib_command: Callable[..., str]) -> Path:
    """Results of LAKE."""
    return train(quickstart, tmp_path_factory.mktemp("lake"), "lake_quickstart.yaml", anomalib_command)


def check_folder(results: Path, unit: str) -> dict[str, Any]:
    """Every rejected image has a record, a picture and a thumbnail; return the records."""
    folder = results / "explanations"
    run = json.loads((folder / "explanations.json").read_text())
    assert run["settings"]["image_size"] == [448, 448]
    assert run["images"]
    for image in run["images"]:
        assert image["unit"] == unit
        assert image["rejected"]
        assert image["score"] > image["threshold"]
        assert image["category"] == "textile"
        assert len(image["parts"]) == 5
        adds = [part["adds"] for part in image["parts"]]
        assert adds == sorted(adds, reverse=True)
        assert Image.open(folder / image["picture"]).width > 1000  # with the column of training patches
        assert Image.open(folder / image["thumbnail"]).size == (224, 224)
        for defect in image["defects"]:
            left, top, right, bottom = defect["box"]
            assert 0 <= left < right <= 250  # pixels of the file
            assert 0 <= top < bottom <= 250
            assert 0 < defect["area"] <= (right - left) * (bottom - top)
            assert defect["score"] > 0.5
            assert len(defect["contour"]) >= 4
    assert any(image["defects"] for image in run["images"])
    for file in run["figures"].values():
        assert Image.open(folder / file).width > 400
    return run


@pytest.mark.command
@pytest.mark.slow
def test_spg(spg: Path) -> None:
    """Records and pictures; the examples file holds patches of every atom in use."""
    run = check_folder(spg, "atom")
    examples = Examples.load(spg / "weights" / "examples.safetensors")
    model = SPGModel(guides_file=spg / "weights" / "guides.safetensors", pre_trained=False)
    assert {atom for _, atom in examples.patches} == set(model.guides[0].atom_indices.tolist())
    assert all(examples.of(part["block"], part["unit"]) for image in run["images"] for part in image["parts"])


@pytest.mark.command
@pytest.mark.slow
def test_lake(lake: Path) -> None:
    """Records and pictures; the normal images are kept; the neurons are in the records."""
    run = check_folder(lake, "neuron")
    assert len(Examples.load(lake / "weights" / "examples.safetensors").images) == 4
    assert {block: len(numbers) for block, numbers in run["neurons"].items()} == {"4": 100, "7": 100}


@pytest.mark.command
@pytest.mark.slow
def test_predict_from_checkpoint(
    spg: Path, quickstart: Path, tmp_path: Path, anomalib_command: Callable[..., str]
) -> None:
    """`anomalib predict` explains too, all images if asked to, with the examples beside the checkpoint."""
    data = tmp_path / "new" / "shift_3"
    data.mkdir(parents=True)
    shutil.copyfile(quickstart / "textile/test/good/textile_0041.jpg", data / "a%20 #1 $x_$y.jpg")
    config = spg.parents[3] / "config.yaml"
    checkpoint = spg / "weights/lightning/model.ckpt"
    arguments = [
        "--config",
        config,
        "--ckpt_path",
        checkpoint,
        "--data",
        data,
        *ON,
        "--model.visualizer.explain",
        "all",
    ]
    output = anomalib_command("predict", *arguments, folder=spg.parents[3])
    assert "Explanations lack" not in output
    folder = spg.parents[1] / "latest" / "explanations_of_predictions"  # where anomalib puts predictions
    record = json.loads((folder / "explanations.json").read_text())["images"][0]
    assert record["name"] == "shift_3/a%20 #1 $x_$y.jpg"
    assert record["defective"] is None
    assert Image.open(folder / record["picture"]).width > 1000


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs with made-up records, one of them with a name that tries to break out of the script."""
    part = {"block": 6, "unit": 17, "adds": 0.2, "share": 0.5}
    common = {"path": "p", "defective": True, "other": {"text": 0.1}, "picture": "p.jpg", "thumbnail": "t.jpg"}
    common |= {"words": "", "raw_score": 0.4, "raw_threshold": 0.3, "base": 0.0, "others": {"count": 0, "adds": 0.0}}
    for category, scores in (("nut", (0.6, 0.9, 0.3)), ("bolt", (0.7,))):
        images = [
            {
                **common,
                "unit": "atom",
                "category": category,
                "name": f"bad/{category}{number}</script><b>.png",
                "score": score,
                "threshold": 0.5,
                "rejected": score > 0.5,
                "parts": [part, {**part, "unit": 100 + number}] if category == "nut" else [part],
            }
            for number, score in enumerate(scores)
        ]
        folder = tmp_path / "SPG" / category / "v0" / "explanations"
        folder.mkdir(parents=True)
        for name in ("p.jpg", "t.jpg"):
            Image.new("RGB", (8, 8)).save(folder / name)
        run = {
            "model": "SPG",
            "product": category,
            "settings": {},
            "figures": {},
            "learned": "same",
            "category": category,
            "images": images,
        }
        (folder / "explanations.json").write_text(json.dumps(run))
        (folder.parent.parent / "latest").symlink_to(folder.parent)
    return tmp_path


@pytest.mark.command
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_page_in_a_browser(runs: Path) -> None:
    """Worst first, filters by category, decision and atom, one image opened; nothing is fetched from elsewhere."""
    output = run_command([sys.executable, "-m", "anomalib_spg.explanations.report", runs], runs)
    page = runs / "explanations.html"
    assert str(page) in output
    end = "</script><b>.png"
    assert shown_names(dump(page)) == [f"bad/nut1{end}", f"bad/bolt0{end}", f"bad/nut0{end}"]
    assert shown_names(dump(page, "category=bolt")) == [f"bad/bolt0{end}"]
    assert shown_names(dump(page, "show=missed")) == [f"bad/nut2{end}"]
    assert shown_names(dump(page, "part=6:101&show=all")) == [f"bad/nut1{end}"]
    opened = dump(page, "image=0")
    assert re.search(r'<dialog id="one"[^>]*open', opened)
    assert re.search(r'<dialog.*src="SPG/(nut|bolt)/v0/explanations/p.jpg"', opened, flags=re.DOTALL)
    assert "score 0.600, threshold 0.500" in opened
    assert "http" not in re.sub(r"<script.*?</script>", "", opened, flags=re.DOTALL)
    assert (runs / "atoms_same.png").is_file()
    assert "3 of 4 explained images" in opened


@pytest.mark.command
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_clicks_in_a_browser(runs: Path) -> None:
    """A card opens on a click, the arrow goes to the next, an atom filters by itself, the list by category."""
    page = write_report(runs)

    def after(script: str) -> str:
        changed = page.with_name("changed.html")
        changed.write_text(page.read_text() + f"<script>{script}</script>")
        return dump(changed)

    card = "document.querySelectorAll('.card')[0].click();"
    title = r'<dialog id="one"[^>]*open.*?<strong>([^&<]*)'
    assert re.search(title, after(card), flags=re.DOTALL).group(1) == "nut: bad/nut1"
    following = after(card + "document.getElementById('next').click();")
    assert re.search(title, following, flags=re.DOTALL).group(1) == "bolt: bad/bolt0"
    filtered = after(card + "document.querySelectorAll('td button')[1].click();")
    assert len(shown_names(filtered)) == 1
    assert re.search(title, filtered, flags=re.DOTALL) is None
    choose = "const c = document.querySelector('select'); c.value = 'bolt';"
    assert len(shown_names(after(choose + "c.dispatchEvent(new Event('input', {bubbles: true}));"))) == 1


@pytest.mark.command
@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_real_page_in_a_browser(spg: Path) -> None:
    """The page of a real run shows what the records hold, and its pictures are there."""
    run = json.loads((spg / "explanations" / "explanations.json").read_text())
    page = dump(spg / "explanations" / "index.html")
    worst = sorted(run["images"], key=lambda image: -image["score"])
    assert shown_names(page) == [image["name"] for image in worst]
    sources = re.findall(r'<img[^>]* src="([^"]+)"', page)
    assert len(sources) == len(worst) + len(run["figures"])
    assert all((spg / "explanations" / source).is_file() for source in sources)


def test_report_without_runs(tmp_path: Path) -> None:
    """The message says what to do; a damaged file is named."""
    with pytest.raises(ValueError, match=r"no explanations below.*ExplanationVisualizer"):
        write_report(tmp_path)
    (tmp_path / "explanations.json").write_text("{")
    with pytest.raises(ValueError, match=r"explanations\.json'.*anomalib test"):
        write_report(tmp_path)


def test_general_and_specific_atoms() -> None:
    """By the stated rule: more than half of the categories, a tenth of the rejected images of each."""
    parts = {
        "a": [[1, 2]] * 9 + [[1, 3]],
        "b": [[1, 4]] * 10,
        "c": [[5, 2]] + [[5, 6]] * 9,
    }
    records = [
        {"category": category, "rejected": True, "parts": [{"block": 6, "unit": unit} for unit in units]}
        for category, images in parts.items()
        for units in images
    ]
    records.append({"category": "d", "rejected": False, "parts": [{"block": 6, "unit": 7}]})
    usage = atom_usage(records)
    assert {unit for _, unit in usage} == {1, 2, 3, 4, 5, 6}
    assert usage[6, 2] == pytest.approx({"a": 0.9, "b": 0, "c": 0.1})
    assert {unit for (_, unit), shares in usage.items() if is_general(shares)} == {1, 2}


def test_overlap_of_neurons() -> None:
    """The same channel of another block is another neuron."""
    table = neuron_overlap({"a": {4: [1, 2], 7: [3, 4]}, "b": {4: [1, 3], 7: [4, 5]}})
    assert table.tolist() == [[1, 0.5], [0.5, 1]]


def test_other_models_are_refused() -> None:
    """With a message that says what to do."""
    model = SimpleNamespace(model=torch.nn.Identity())
    with pytest.raises(TypeError, match=r"explains SPG and LAKE, not SimpleNamespace.*ImageVisualizer"):
        ExplanationVisualizer().setup(None, model, "fit")
    with pytest.raises(ValueError, match="choose 'rejected' or 'all'"):
        ExplanationVisualizer(explain="some")


@pytest.mark.command
@pytest.mark.slow
def test_sensitivity_decides(spg: Path, tmp_path: Path) -> None:
    """Rejected is what anomalib rejects, also where a sensitivity moves the threshold; the raw one does not decide."""
    model = SPG.load_from_checkpoint(spg / "weights/lightning/model.ckpt", visualizer=ExplanationVisualizer())
    model.post_processor.image_sensitivity = torch.tensor(0.97)
    engine(tmp_path).predict(model, data_path=spg.parents[3] / "quickstart/textile/test/good")
    records = json.loads(next(tmp_path.rglob("explanations.json")).read_text())["images"]
    assert records
    assert all(image["rejected"] and image["raw_threshold"] is None for image in records)
    assert {image["threshold"] for image in records} == {0.03}


@pytest.fixture
def tiny() -> SPG:
    """A model with random guides and the visualizer, for images that its patches do not divide."""
    model = SPG(
        backbone="vit_tiny_patch16_224",
        layers=[3, 5],
        pre_trained=False,
        image_size=100,
        visualizer=ExplanationVisualizer(),
    )
    examples = Examples(patch_size=16)
    examples.add(torch.randn(6, 3, 100, 100), [0.5] * 3, [0.5] * 3)
    for block, guides in zip((3, 5), model.model.guides, strict=True):
        guides.set(torch.nn.functional.normalize(torch.randn(9, 192), dim=1), torch.arange(9), torch.rand(4, 9))
        examples.find(block, guides.atoms, guides.atom_indices, torch.randn(6, 49, 192))
    examples.learned = digest(model.model)
    model._is_fitted = torch.tensor([True])
    model.visualizer._examples = examples
    return model


def explain_predictions(model: SPG, folder: Path, images: Path) -> list[dict[str, Any]]:
    """Records of a prediction."""
    engine(folder).predict(model, data_path=images)
    newest = max(folder.rglob("explanations.json"), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(newest.read_text())["images"]


def test_names_that_are_alike_or_odd(tiny: SPG, tmp_path: Path) -> None:
    """Every image has its own picture; without a threshold all are explained and none is called rejected."""
    paths = [tmp_path / "in" / name for name in ("a/x.png", "a/x.bmp", "b/a/x.png", "a/$1_$2 零.png")]
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((70, 50, 3), 60 * number, np.uint8)).save(path)
    records = explain_predictions(tiny, tmp_path / "out", tmp_path / "in")
    folder = next((tmp_path / "out").rglob("explanations_of_predictions"))
    assert {record["path"] for record in records} == set(map(str, paths))
    assert len({record["picture"] for record in records}) == 4
    assert all((folder / record[kind]).is_file() for record in records for kind in ("picture", "thumbnail"))
    assert all(record["rejected"] is None and record["threshold"] is None for record in records)
    assert not tiny.model.backbone._forward_hooks


def test_scores_are_those_of_the_table(tiny: SPG, tmp_path: Path) -> None:
    """As predictions.csv has them, with its threshold; the raw score is what the parts add up to."""
    for number, name in enumerate("ab"):
        Image.fromarray(np.full((70, 50, 3), 99 * number, np.uint8)).save(tmp_path / f"{name}.png")
    tiny.post_processor.add_good(torch.linspace(0.2, 0.3, 9))
    tiny.post_processor.place_thresholds()
    records = explain_predictions(tiny, tmp_path / "out", tmp_path)
    table = pd.read_csv(next(tmp_path.rglob("predictions.csv"))).set_index("image")
    assert len(records) == 2
    for record in records:
        row = table.loc[record["path"]]
        assert [record["score"], record["threshold"]] == pytest.approx([row.score, row.threshold], abs=1e-6)
        shown = tiny.post_processor(InferenceBatch(torch.tensor([record["raw_score"]]), None)).pred_score
        assert record["score"] == pytest.approx(float(shown), abs=1e-5)
        assert record["raw_threshold"] == pytest.approx(float(tiny.post_processor.image_threshold))
        total = record["base"] + sum(part["adds"] for part in record["parts"])
        total += record["others"]["adds"] + sum(record["other"].values())
        assert total == pytest.approx(record["raw_score"], abs=1e-5)


def test_photographs_are_not_squeezed(tiny: SPG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and thumbnails have the proportions of the file, and what the words call outlined is."""
    drawn = []

    def record(*args: Any, **kwargs: Any) -> Any:
        drawn.append(kwargs)
        return plot_explanation(*args, **kwargs)

    monkeypatch.setattr("anomalib_spg.explanations.visualizer.plot_explanation", record)
    sizes = {"a": (160, 120), "b": (60, 120), "c": (90, 90), "d": (2000, 3)}
    for name, size in sizes.items():
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{name}.png")
    tiny.post_processor.add_good(torch.linspace(0.2, 0.3, 9), torch.linspace(0.2, 0.3, 900).reshape(9, 10, 10))
    tiny.post_processor.place_thresholds()
    records = explain_predictions(tiny, tmp_path / "out", tmp_path)
    folder = next((tmp_path / "out").rglob("explanations_of_predictions"))
    shown = [Image.open(folder / record["thumbnail"]).size for record in records]
    assert shown == [(224, 168), (112, 224), (224, 224), (224, 1)]
    shapes = [width / height for width, height in sizes.values()]
    assert [kwargs["pixel_aspect"] for kwargs in drawn] == pytest.approx(shapes)
    assert any(record["defects"] for record in records)
    assert [bool(kwargs["mask"].any()) for kwargs in drawn] == ["outlined as" in record["words"] for record in records]


@pytest.mark.parametrize("model", [LAKE, SPG])
def test_what_kept_images_know(model: type[LAKE] | type[SPG], tmp_path: Path) -> None:
    """Of the file, for training patches and the nearest normal patch; and whether anomalies are drawn on them."""
    for number in range(8):
        path = tmp_path / "in" / "good" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((120, 40), 60).convert("RGB").save(path)
    few = {"views": 2, "num_atoms": 32, "k": 4, "sae_epochs": 1, "guide_epochs": 1, "layers": [5]}
    small = {"backbone": TINY, "pre_trained": False, "image_size": 64} | (few if model is SPG else {})
    given = Folder("part", root=tmp_path / "in", normal_dir="good", num_workers=0)
    engine(tmp_path / "out").fit(model(**small, visualizer=ExplanationVisualizer()), datamodule=given)
    examples = Examples.load(next(tmp_path.rglob("examples.safetensors")))
    assert examples.images
    assert all(examples.crop(number, 0, window=3).shape == (48, 144, 3) for number in examples.images)
    assert examples.drawn == (model is SPG)


def test_predicted_images_are_of_the_product_that_was_learned(mvtec: Path, tmp_path: Path) -> None:
    """A checkpoint knows it; the folders of the images are no category."""
    arguments = {"backbone": TINY, "pre_trained": False, "image_size": 64, "visualizer": ExplanationVisualizer("all")}
    engine(tmp_path / "trained", limit_val_batches=1).fit(LAKE(**arguments), datamodule=data(mvtec))
    (tmp_path / "in" / "new").mkdir(parents=True)
    Image.new("RGB", (50, 50)).save(tmp_path / "in" / "new" / "100% bad.png")
    checkpoint = next(tmp_path.rglob("model.ckpt"))
    engine(tmp_path / "out").predict(LAKE(**arguments), data_path=tmp_path / "in", ckpt_path=str(checkpoint))
    run = json.loads(next((tmp_path / "out").rglob("explanations.json")).read_text())
    assert [run["product"], run["category"], run["images"][0]["category"]] == ["brick"] * 3
    assert run["settings"]["layers"] == [4, 7]  # as they are resolved, in every run
    assert "weights" not in run["settings"]
    assert run["images"][0]["name"] == "new/100% bad.png"


def test_names_as_long_as_files_allow(tiny: SPG, tmp_path: Path) -> None:
    """255 bytes, not characters; and as many folders in the name on the page as tell images apart."""
    names = [
        "x" * 251 + ".png",
        "ü" * 125 + "x.png",
        "a/x/1.png",
        "b/x/1.png",
        os.fsdecode(b"\xe4.png"),
        os.fsdecode(b"\xf6.png"),
    ]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (50, 50)).save(tmp_path / "in" / name)
    records = explain_predictions(tiny, tmp_path / "out", tmp_path / "in")
    folder = next((tmp_path / "out").rglob("explanations_of_predictions"))
    assert len({record["picture"] for record in records}) == len(records) == len(names)
    assert all((folder / record[kind]).is_file() for record in records for kind in ("picture", "thumbnail"))
    assert len({record["name"] for record in records}) == len(names)
    assert {"a/x/1.png", "b/x/1.png"} < {record["name"] for record in records}


def test_scores_that_are_no_numbers(tiny: SPG, tmp_path: Path) -> None:
    """A broken model is explained as far as that goes, in valid JSON."""
    Image.new("RGB", (50, 50)).save(tmp_path / "x.png")
    for guides in tiny.model.guides:
        guides.vectors.fill_(float("nan"))
        guides.coefficients.fill_(float("nan"))
    tiny.visualizer._examples.learned = digest(tiny.model)
    assert explain_predictions(tiny, tmp_path / "out", tmp_path / "x.png")[0]["score"] is None
    for path in (tmp_path / "out").rglob("explanations.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_what_is_not_ours_stays(tiny: SPG, tmp_path: Path) -> None:
    """A folder of the user's that happens to have the same name is left alone."""
    Image.new("RGB", (50, 50)).save(tmp_path / "x.png")
    folder = tmp_path / "out" / "SPG" / "latest" / "explanations_of_predictions"
    (folder / "pictures").mkdir(parents=True)
    for name in ("mine.txt", "pictures/mine.jpg"):
        (folder / name).write_text("mine")
    assert len(explain_predictions(tiny, tmp_path / "out", tmp_path / "x.png")) == 1
    assert (folder / "pictures" / "mine.jpg").is_file()
    assert (folder / "mine.txt").is_file()


def test_earlier_predictions_stay(tiny: SPG, tmp_path: Path) -> None:
    """Explanations have the number of their table, whether or not each prediction was explained."""
    for name in "abc":
        Image.new("RGB", (50, 50)).save(tmp_path / f"{name}.png")
    explain_predictions(tiny, tmp_path / "out", tmp_path / "a.png")
    folder = next((tmp_path / "out").rglob("explanations_of_predictions"))
    shutil.copy(folder.parent / "predictions.csv", folder.parent / "predictions_2.csv")  # of a run without explanations
    explain_predictions(tiny, tmp_path / "out", tmp_path / "b.png")
    (folder.parent / "predictions.csv").unlink()
    explain_predictions(tiny, tmp_path / "out", tmp_path / "c.png")
    for end, name in (("", "a"), ("_3", "b"), ("_4", "c")):
        numbered = folder.with_name(folder.name + end)
        assert [path.name for path in (numbered / "pictures").iterdir()] == [f"00000_{name}.jpg"]
        assert (numbered / "index.html").is_file()
    pictures = sorted(path.relative_to(folder.parent).as_posix() for path in folder.parent.glob("images*/**/*.png"))
    assert [path.split("/")[0] for path in pictures] == ["images", "images", "images_of_predictions_3"]
    assert "/b.png" in (folder.parent / "predictions_3.csv").read_text()


def test_where_none_is_rejected_none_is_explained(tiny: SPG, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is sent to an empty page."""
    Image.new("RGB", (50, 50)).save(tmp_path / "x.png")
    for scores, words in ((0.9, "No image was rejected, so none is explained."), (0.1, "1 images explained: open ")):
        caplog.clear()
        tiny.post_processor._forget()
        tiny.post_processor.add_good(torch.linspace(scores, scores + 0.01, 9))
        tiny.post_processor.place_thresholds()
        with caplog.at_level(logging.INFO):
            explain_predictions(tiny, tmp_path / "out", tmp_path / "x.png")
        assert words in caplog.text
        assert ("index.html" in caplog.text) == words.endswith("open ")


def test_a_second_test_replaces_the_first(tiny: SPG, mvtec: Path, tmp_path: Path) -> None:
    """Its images are the same, and so is its folder."""
    for batches, pictures in ((2, 6), (1, 3)):
        engine(tmp_path, limit_test_batches=batches).test(tiny, datamodule=data(mvtec))
        assert len(list(tmp_path.rglob("explanations*/pictures/*.jpg"))) == pictures


def test_an_interrupted_run_lets_go(tiny: SPG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens to the backbone after an error."""
    Image.new("RGB", (50, 50)).save(tmp_path / "x.png")
    monkeypatch.setattr(ExplanationVisualizer, "_write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explain_predictions(tiny, tmp_path / "out", tmp_path / "x.png")
    assert not tiny.model.backbone._forward_hooks


def test_an_interrupted_run_says_so(tiny: SPG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures do not pass for those of a whole run, nor is there half a file; the next run is whole again."""
    for name in "ab":
        Image.new("RGB", (50, 50)).save(tmp_path / f"{name}.png")
    with monkeypatch.context() as patched:
        patched.setattr(ExplanationVisualizer, "on_predict_end", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            explain_predictions(tiny, tmp_path / "out", tmp_path / "b.png")
    folder = next((tmp_path / "out").rglob("explanations_of_predictions"))
    assert [path.name for path in (folder / "pictures").iterdir()] == ["00000_b.jpg"]
    assert not (folder / "index.html").exists()
    with pytest.raises(ValueError, match="being written, or their run was interrupted"):
        write_report(tmp_path / "out")
    for table in folder.parent.glob("predictions*.csv"):
        table.unlink()
    assert len(explain_predictions(tiny, tmp_path / "out", tmp_path / "a.png")) == 1
    assert [path.name for path in (folder / "pictures").iterdir()] == ["00000_a.jpg"]
    assert (folder / "index.html").is_file()


@pytest.mark.parametrize("when", ["start", "picture", "end"])
def test_a_full_disk(when: str, tiny: SPG, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the folder and the remedy, and the records stay unfinished."""
    Image.new("RGB", (50, 50)).save(tmp_path / "x.png")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if when == "picture":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    elif when == "end":
        monkeypatch.setattr(SPG, "figures", lambda *_: {"guides": ("guides", SimpleNamespace(savefig=full))})
    else:
        monkeypatch.setattr("anomalib_spg.explanations.visualizer._write_records", full)
    with pytest.raises(
        OSError, match=r"Cannot write explanations to '.*explanations_of_pred.*No space left.*Free space"
    ):
        explain_predictions(tiny, tmp_path / "out", tmp_path / "x.png")
    records = list((tmp_path / "out").rglob("explanations.json"))
    assert [json.loads(path.read_text()) for path in records] == [UNFINISHED] * (when != "start")


def test_examples_of_other_guides(tiny: SPG, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Numbers of atoms mean nothing in another dictionary: the file is named, and its patches are not shown."""
    Image.new("RGB", (50, 50)).save(tmp_path / "x.png")
    own = tiny.visualizer._examples.save(tmp_path / "own.safetensors")
    tiny.visualizer._examples.learned = "of another training"
    other = tiny.visualizer._examples.save(tmp_path / "other.safetensors")
    for path, fits in ((other, False), (own, True), (other, True)):  # the last falls back on those it had
        caplog.clear()
        tiny.visualizer.examples_path = path
        explain_predictions(tiny, tmp_path / "out", tmp_path / "x.png")
        assert (tiny.visualizer._examples is not None) == fits
        assert ("lack example patches" in caplog.text) != fits
        assert (f"'{path}' is not used" in caplog.text) == (path == other)
    assert digest(tiny.model.bfloat16()) == tiny.visualizer._examples.learned


def test_half_precision(tiny: SPG) -> None:
    """Where the model runs in bfloat16, so do its explanations and their pictures."""
    images = torch.randn(1, 3, 100, 100).bfloat16()
    explanation = tiny.bfloat16().explain(images)[0]
    picture = to_picture(images[0], [0.5] * 3, [0.5] * 3)
    plot_explanation(explanation, picture, tiny.visualizer._examples).savefig(io.BytesIO(), format="png")
    assert 0.5 + float(explanation.contributions.sum()) == pytest.approx(explanation.score, abs=0.02)


def test_exports_hold_no_training_images(tiny: SPG, mvtec: Path, tmp_path: Path) -> None:
    """The visualizer's images are part of the explanations only, and are the same as those in the file."""
    trained = SPG(
        backbone="vit_tiny_patch16_224",
        layers=[5],
        pre_trained=False,
        image_size=64,
        views=2,
        num_atoms=32,
        k=4,
        sae_epochs=1,
        guide_epochs=1,
        visualizer=ExplanationVisualizer(),
    )
    engine(tmp_path).fit(trained, datamodule=data(mvtec))
    path = next(tmp_path.rglob("examples.safetensors"))
    of_guides = SPGModel("vit_tiny_patch16_224", guides_file=path.with_name("guides.safetensors"), pre_trained=False)
    assert Examples.load(path).learned == digest(trained.model) == digest(of_guides)
    kept = Examples.load(path).images
    assert kept
    assert trained.examples is None
    assert trained.visualizer._examples.images.items() >= kept.items()
    for model in (trained, tiny):
        file = io.BytesIO()
        torch.save(model, file)
        assert b"JFIF" not in file.getvalue()


@pytest.mark.parametrize("late", [True, False])
def test_no_training_images_in_exports_after_a_failure(
    late: bool, mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fit that fails once it has learned, or a second one while it learns: neither images nor tokens nor paths."""
    monkeypatch.chdir(tmp_path)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    small = {"backbone": "vit_tiny_patch16_224", "layers": [5], "pre_trained": False, "image_size": 64, "views": 2}
    short = {"num_atoms": 32, "k": 4, "sae_epochs": 1, "guide_epochs": 1, "hold_out": 0}
    model = SPG(**small, **short, visualizer=ExplanationVisualizer())
    if late:
        callback = LambdaCallback(on_validation_epoch_end=fail)
        with pytest.raises(ZeroDivisionError):
            engine(tmp_path, callbacks=[callback]).fit(model, datamodule=data(mvtec))
    else:
        engine(tmp_path).fit(model, datamodule=data(mvtec))
        model.memory_limit = 0  # its tokens are on the disk
        with patch.object(SPGModel, "fit", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
            engine(tmp_path).fit(model, datamodule=data(mvtec))
        assert len(model.model.store), "the same command goes on from them"
    assert model.examples is None
    model.examples = tiny_examples()  # as a user may set
    exported = model.to_torch(tmp_path).read_bytes()
    assert b"JFIF" not in exported
    assert b"train/good" not in exported
    restored = torch.load(io.BytesIO(exported), weights_only=False)["model"]
    assert restored.examples is None
    assert not len(restored.model.store)


def tiny_examples() -> Examples:
    """One image."""
    examples = Examples(patch_size=16)
    examples.add(torch.zeros(1, 3, 64, 64), [0.5] * 3, [0.5] * 3)
    return examples


def test_off_costs_nothing() -> None:
    """Without the visualizer no image is kept and nothing listens to the backbone."""
    model = SPG(backbone="vit_tiny_patch16_224", layers=[5], pre_trained=False, image_size=64)
    assert not isinstance(model.visualizer, ExplanationVisualizer)
    assert model.examples is None
    assert not model.model.backbone._forward_hooks


@pytest.mark.command
@pytest.mark.slow
def test_faithfulness(spg: Path, quickstart: Path) -> None:
    """Without its top atoms or neurons a defect loses far more of its score than without as many random ones."""
    transform = default_pre_processor(BACKBONE, (448, 448)).transform
    folder = quickstart / "textile"

    def images(name: str, count: int) -> list[torch.Tensor]:
        return [transform(read_image(path, as_tensor=True))[None] for path in sorted((folder / name).iterdir())[:count]]

    weights = quickstart / "dinov2_vits14.safetensors"
    by_atoms = SPGModel(guides_file=spg / "weights" / "guides.safetensors", weights=weights).eval()
    by_neurons = LAKEModel(BACKBONE, weights=weights, image_size=(448, 448))
    with torch.no_grad():
        by_neurons.train()(torch.cat(images("train/good", 4)))
    by_neurons.fit()
    # LAKE's score is shared by three patches and two blocks, so more neurons make it.
    for model, defects, parts, least in ((by_atoms, 4, 10, 0.25), (by_neurons.eval(), 10, 20, 0.12)):
        top, random = faithfulness(model, images("test/good", 4), images("test/defect", defects), [parts], draws=3)[
            parts
        ]
        assert np.median(top) > least
        assert np.median(top) > 3 * abs(np.median(random))
