# SPDX-License-Identifier: Apache-2.0

"""The folder of guides for the hub, and its own commands against a hub on this machine."""

import re
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image

from anomalib_spg import SPGModel
from anomalib_spg.explanations.examples import Examples, digest
from anomalib_spg.guides import read_guides
from anomalib_spg.share import main, write_folder
from tests.helpers import TINY, run_command
from tests.hub_server import Hub, serve

TRAINED_ON = {"dataset": "textures", "category": "brick", "categories": None, "images": 40, "labels": "synthetic"}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Guides file and examples file of one training."""
    return learned(tmp_path / "weights")


def learned(folder: Path) -> tuple[Path, Path]:
    """What a training leaves."""
    model = SPGModel(TINY, layers=[3], pre_trained=False, image_size=(64, 64))
    atoms = torch.nn.functional.normalize(torch.randn(5, 192), dim=1)
    model.guides[0].set(atoms, torch.arange(5), torch.rand(4, 5))
    model.settings = {"num_atoms": 64, "k": 8}
    examples = Examples()
    examples.add(torch.rand(2, 3, 64, 64), model.backbone.mean, model.backbone.std)
    examples.find(3, atoms, torch.arange(5), list(torch.randn(2, 16, 192)))
    examples.learned = digest(model)
    return model.save_guides(folder / "guides.safetensors", **TRAINED_ON), examples.save(
        folder / "examples.safetensors"
    )


def test_folder(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Guides as they were, and a card that the hub's own library reads; no training images."""
    folder = write_folder(files[0], tmp_path / "out", "me/textures", "cc-by-4.0")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "guides.safetensors"]
    assert (folder / "guides.safetensors").read_bytes() == files[0].read_bytes()
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name, card.data.eval_results) == ("cc-by-4.0", "anomalib", None)
    assert card.data.base_model == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    text = card.text
    assert "hf://me/textures/guides.safetensors" in text
    assert "| learned on | textures brick; 40 images, all good, anomalies drawn on them |" in text
    assert "| blocks | 3 |" in text
    assert "| image size | 64x64 |" in text
    assert "| settings | num_atoms 64, k 8 |" in text
    assert f", timm {timm.__version__}," in text
    assert "cc-by-4.0, for the guides. The backbone's weights have a licence of their own (apache-2.0 by" in text
    assert "gave no figures" in text
    assert "training images" not in text


def test_examples_and_metrics(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Where they are wanted, the card says so."""
    metrics = {"image_AUROC": 0.91, "pixel_AUPRO": 0.8}
    folder = write_folder(files[0], tmp_path / "out", "me/textures", "mit", files[1], metrics, "my | parts, 2026")
    assert len(Examples.load(folder / "examples.safetensors").images) == 2
    assert (folder / "guides_block3.jpg").is_file()
    card = ModelCard.load(folder / "README.md")
    assert "![What the guides look for](guides_block3.jpg)" in card.text
    assert "holds 2 of them" in card.text
    assert "On my | parts, 2026, as whoever shared these guides says" in card.text
    assert "| image_AUROC | 0.91 |\n| pixel_AUPRO | 0.8 |" in card.text
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == metrics
    assert {result.dataset_type for result in card.data.eval_results} == {"my-parts-2026"}


def test_old_guides_say_less(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A file without some of the metadata still has a card."""
    from safetensors.torch import save_file

    header = {"format": "anomalib_spg.guides", "version": "1"}
    save_file(read_guides(files[0])[0], tmp_path / "old.safetensors", header)
    folder = write_folder(tmp_path / "old.safetensors", tmp_path / "out", "me/textures", "unknown")
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None
    for name in ("learned on", "backbone", "blocks", "image size", "temperature", "settings", "versions"):
        assert f"| {name} | not recorded |" in card.text
    assert "**Unknown.**" in card.text


@pytest.mark.parametrize(
    ("trained_on", "words"),
    [
        ({"dataset": "x"}, "x"),
        ({"images": 7, "labels": ["by", "hand"], "categories": "nut"}, "nut; 7 images"),
        ({"labels": "labelled", "categories": [1, 2]}, "1, 2; labelled by people"),
        ({"by": "me"}, "not recorded"),
        (
            {"dataset": "Visa_to_MVTecAD", "category": "bottle", "categories": ["candle", "pcb1"], "images": 22}
            | {"labels": "labelled"},
            "Visa: candle, pcb1; 22 images, labelled by people",
        ),
        (
            {"dataset": "Folder_to_MVTecAD", "category": "bottle", "categories": None, "labels": "labelled"},
            "Folder; labelled by people",
        ),
        (
            {"dataset": "day_to_night", "category": "nut", "labels": "synthetic"},
            "day_to_night nut; all good, anomalies drawn on them",
        ),
    ],
)
def test_what_guides_were_learned_on_is_free_to_say(trained_on: dict, words: str, tmp_path: Path) -> None:
    """Of other programs' plain data the card says what it knows."""
    model = SPGModel(TINY, layers=[3], pre_trained=False)
    model.guides[0].set(torch.eye(192)[:2], torch.arange(2), torch.rand(4, 2))
    path = model.save_guides(tmp_path / "guides.safetensors", **trained_on)
    card = ModelCard.load(write_folder(path, tmp_path / "out", "me/textures", "mit") / "README.md")
    assert f"| learned on | {words} |" in card.text


def test_a_card_that_cannot_be_written_leaves_no_folder(files: tuple[Path, Path], tmp_path: Path) -> None:
    """So that the same command works once the reason is gone."""
    arguments = (files[0], tmp_path / "out", "me/textures", "mit", files[1])
    with patch("anomalib_spg.share._body", side_effect=KeyError("images")), pytest.raises(KeyError):
        write_folder(*arguments)
    assert not (tmp_path / "out").exists()
    assert write_folder(*arguments) == tmp_path / "out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"repository": "textures"}, "repository='textures' must have the form owner/name"),
        ({"licence": "Apache 2.0"}, "license='Apache 2.0' is no name of the hub's"),
        ({"metrics": {"image_AUROC": 0.9}}, "tested_on=None go together"),
        ({"tested_on": "brick"}, "metrics=None and tested_on='brick' go together"),
        ({"guides_file": "gone.safetensors"}, "Cannot read the guides file 'gone.safetensors'"),
        ({"examples_file": "gone.safetensors"}, "Cannot read the examples file 'gone.safetensors'"),
    ],
)
def test_mistakes_are_named(files: tuple[Path, Path], tmp_path: Path, change: dict, message: str) -> None:
    """Before anything is written."""
    arguments = {"guides_file": files[0], "folder": tmp_path / "out", "repository": "me/textures", "licence": "mit"}
    with pytest.raises(ValueError, match=message):
        write_folder(**{**arguments, **change})
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_not_uploaded(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Neither examples of another training, nor what happens to lie in the folder."""
    other = learned(tmp_path / "other")[1]
    with pytest.raises(ValueError, match="belongs to another training"):
        write_folder(files[0], tmp_path / "out", "me/textures", "mit", other)
    with pytest.raises(FileExistsError, match="weights' is not empty, and all of it would be uploaded"):
        write_folder(files[0], files[0].parent, "me/textures", "mit")


@pytest.mark.parametrize(("licence", "warned"), [("mit", 0), ("unknown", 1)])
def test_command(
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    licence: str,
    warned: int,
) -> None:
    """It prints the hub's own command; who gives no licence reads that."""
    folder = tmp_path / "my guides"
    arguments = f"--guides {files[0]} --folder '{folder}' --repository me/textures --license {licence}"
    arguments += f" --examples {files[1]}" * warned + " --metrics image_AUROC=0.9 --tested_on x" * warned
    monkeypatch.setattr(sys, "argv", ["share", *shlex.split(arguments)])
    main()
    printed = capsys.readouterr().out
    assert re.search(rf"^    (hf|huggingface-cli) upload me/textures '{folder}' \.$", printed, re.MULTILINE)
    assert printed.count("WARNING: the licence is unknown") == warned
    assert printed.count("show training images to everyone") == warned
    with pytest.raises(SystemExit, match="error: .*is not empty"):
        main()


@pytest.mark.slow
@pytest.mark.command
def test_the_cards_own_commands(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Guides and examples go to a hub; what its card says makes another machine reject and explain."""
    write_folder(files[0], tmp_path / "hub/me/textures", "me/textures", "mit", files[1])
    work = tmp_path / "work"
    for number, name in enumerate(["datasets/my_part/good"] * 3 + ["path/to/new/images"]):
        (work / name).mkdir(parents=True, exist_ok=True)
        Image.effect_noise((80, 70), 40 + number).convert("RGB").save(work / name / f"{number}.png")
    card = (tmp_path / "hub/me/textures/README.md").read_text(encoding="utf-8")
    _, *lines = re.search(r"```bash\n(.*?)```", card, re.DOTALL)[1].replace("\\\n", "").strip().split("\n")
    train, predict = ([Path(sys.executable).parent / name, *rest] for name, *rest in map(shlex.split, lines))
    more = ["--model.pre_trained", "false", "--trainer.accelerator", "cpu"]
    more += ["--model.visualizer", "anomalib_spg.ExplanationVisualizer"]
    hub = Hub(tmp_path / "hub")
    environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    with serve(hub):
        printed = run_command([*train, *more], work, **environment, HF_HUB_OFFLINE="0")
        assert "SPG uses the guides in hf://me/textures/guides.safetensors" in " ".join(printed.split())
        printed = run_command([*predict, *more], work, **environment, HF_HUB_OFFLINE="0")
    assert "GET /me/textures/resolve/main/examples.safetensors" in hub.asked
    assert "lack example patches" not in printed
    assert "3.png" in next(work.rglob("predictions.csv")).read_text()
