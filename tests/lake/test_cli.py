# SPDX-License-Identifier: Apache-2.0

"""The real ``anomalib`` command with LAKE, in subprocesses, with the real DINOv2-S/14 weights on real images."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pandas as pd
import pytest
import torch
import yaml
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer

from anomalib_lake import LAKE
from tests.helpers import REPOSITORY, few_textiles, make_mvtec, metric, to_raw

pytestmark = [pytest.mark.command, pytest.mark.slow]

COUNT = 10  # images per folder
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
MODEL = ["--model", "LAKE", "--model.backbone", "vit_small_patch14_dinov2.lvd142m"]


@pytest.fixture(scope="module")
def folder(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with few textile images and the quickstart's config."""
    folder = tmp_path_factory.mktemp("cli")
    config = few_textiles(quickstart, folder, COUNT, "lake_quickstart.yaml")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, anomalib_command: Callable[..., str]) -> str:
    """What ``anomalib train`` printed."""
    return anomalib_command("train", "--config", "config.yaml", "--trainer.max_epochs", "3", folder=folder)


@pytest.fixture(scope="module")
def checkpoint(folder: Path, trained: str) -> Path:
    """The checkpoint it left."""
    assert trained
    return folder / "results/LAKE/textile/latest/weights/lightning/model.ckpt"


def test_train(folder: Path, trained: str) -> None:
    """Finds the defects from four images, says which ones it used, leaves heatmaps."""
    assert metric(trained, "image_AUROC") > 0.85
    flat = " ".join(trained.split())
    assert "LAKE uses 4 normal images" in flat
    assert "max_epochs=3 does nothing: LAKE passes the training images once. It has no epochs" in flat
    assert "4096 and 1024 tokens of 100 channels in each of the blocks [4, 7]" in flat
    assert len(list((folder / "results/LAKE/textile/latest/images").rglob("*.jpg"))) == COUNT


def test_test_from_checkpoint(
    folder: Path, trained: str, checkpoint: Path, tmp_path: Path, anomalib_command: Callable[..., str]
) -> None:
    """`anomalib test` prints what `anomalib train` printed, and needs no weights file for it."""
    shutil.copytree(folder / "quickstart/textile", tmp_path / "quickstart/textile")
    (tmp_path / "quickstart/dinov2_vits14.safetensors").write_bytes(b"not needed")
    output = anomalib_command("test", "--config", folder / "config.yaml", "--ckpt_path", checkpoint, folder=tmp_path)
    assert metric(output, "image_AUROC") == pytest.approx(metric(trained, "image_AUROC"), abs=1e-6)


def test_predict_on_a_folder(
    folder: Path, checkpoint: Path, tmp_path: Path, anomalib_command: Callable[..., str]
) -> None:
    """A heatmap for each image of a folder."""
    images = tmp_path / "images"
    images.mkdir()
    for path in sorted((folder / "quickstart/textile/test/defect").iterdir())[:2]:
        shutil.copyfile(path, images / path.name)
    anomalib_command("predict", *MODEL, "--data", images, "--ckpt_path", checkpoint, folder=tmp_path)
    assert {path.name for path in tmp_path.rglob("results/**/images/**/*.jpg")} == {p.name for p in images.iterdir()}


@pytest.fixture(scope="module")
def exported(folder: Path, checkpoint: Path, anomalib_command: Callable[..., str]) -> dict[str, Path]:
    """The checkpoint exported by the command."""
    for kind in ("onnx", "openvino"):
        paths = ["--ckpt_path", checkpoint, "--export_type", kind, "--export_root", folder / "exported"]
        anomalib_command("export", *MODEL, *paths, folder=folder)
    weights = folder / "exported" / "weights"
    return {"onnx": weights / "onnx" / "model.onnx", "openvino": weights / "openvino" / "model.xml"}


@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_exported_equals_torch(kind: str, exported: dict[str, Path], checkpoint: Path, folder: Path) -> None:
    """Raw maps and scores within 1e-4 at f32 precision, through anomalib's own inferencer, on real images."""
    model = LAKE.load_from_checkpoint(checkpoint).eval()
    inferencer = OpenVINOInferencer(exported[kind], config=EXACT)
    paths = sorted((folder / "quickstart/textile/test").rglob("*.jpg"))
    for path in paths[:: 4 if kind == "openvino" else 9]:
        with torch.inference_mode():
            expected = model(read_image(path, as_tensor=True)[None])
        result = inferencer.predict(path)
        pairs = (
            ("pixel", result.anomaly_map, expected.anomaly_map),
            ("image", result.pred_score, expected.pred_score),
        )
        for level, exported_values, own in pairs:
            difference = to_raw(exported_values, model.post_processor, level) - to_raw(own, model.post_processor, level)
            assert np.abs(difference).max() < 1e-4
        assert bool(result.pred_label.squeeze()) == bool(expected.pred_label)


def test_exported_graph_has_one_tower_that_stops_early(exported: dict[str, Path]) -> None:
    """The vision tower's blocks 0 to 7, and no vocabulary."""
    constants = [op for op in ov.Core().read_model(exported["openvino"]).get_ops() if op.get_type_name() == "Constant"]
    shapes = [list(constant.get_output_shape(0)) for constant in constants]
    assert sum(sorted(shape) == [384, 1152] for shape in shapes) == 8
    assert not any(49408 in shape for shape in shapes)


def test_benchmark(folder: Path, tmp_path: Path, anomalib_command: Callable[..., str]) -> None:
    """Our few-shot config for MVTec AD runs over categories and shots."""
    make_mvtec(tmp_path / "datasets/MVTecAD")
    config = yaml.safe_load((REPOSITORY / "configs" / "benchmark" / "lake_mvtecad.yaml").read_text())
    config["benchmark"]["model"]["init_args"] |= {
        "backbone": "vit_small_patch14_dinov2.lvd142m",
        "weights": str(folder / "quickstart/dinov2_vits14.safetensors"),
        "image_size": 112,
        "k_shot": {"grid": [1, 2]},
    }
    config["benchmark"]["data"]["init_args"] |= {"category": {"grid": ["brick", "grass"]}, "num_workers": 0}
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    anomalib_command("benchmark", "--config", "benchmark.yaml", folder=tmp_path)
    table = pd.read_csv(next((tmp_path / "runs").rglob("results.csv")))
    assert len(table) == 4
    assert set(table["model.init_args.k_shot"]) == {1, 2}
    assert table[["image_AUROC", "image_AveragePrecision", "pixel_AUROC", "pixel_AUPRO"]].notna().all(axis=None)


def test_clip_exports_without_a_text_tower(
    clip_file: Path, mvtec: Path, tmp_path: Path, anomalib_command: Callable[..., str]
) -> None:
    """Text at work, from the command line, in the checkpoint and in OpenVINO; the names of the prompts stay behind."""
    model = [
        *("--model", "LAKE", "--model.backbone", "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"),
        *("--model.image_size", "64", "--model.num_neurons", "20", "--model.k_shot", "2"),
    ]
    source = ["--data", "MVTecAD", "--data.root", mvtec, "--data.category", "brick", "--data.num_workers", "0"]
    anomalib_command("train", *model, "--model.weights", clip_file, *source, folder=tmp_path)
    checkpoint = next(tmp_path.rglob("latest/weights/lightning/model.ckpt"))
    anomalib_command(
        *("export", *model, "--ckpt_path", checkpoint, "--export_type", "openvino", "--export_root", tmp_path / "out"),
        folder=tmp_path,
    )
    exported = next((tmp_path / "out").rglob("*.xml"))
    path = next((mvtec / "brick/test/hole").iterdir())
    restored = LAKE.load_from_checkpoint(checkpoint).eval()
    assert restored.model.text_weight == pytest.approx(0.3)
    with torch.inference_mode():
        expected = restored(read_image(path, as_tensor=True)[None])
    result = OpenVINOInferencer(exported, config=EXACT).predict(path)
    difference = to_raw(result.anomaly_map, restored.post_processor, "pixel")
    difference -= to_raw(expected.anomaly_map, restored.post_processor, "pixel")
    assert np.abs(difference).max() < 1e-4
    constants = [op for op in ov.Core().read_model(exported).get_ops() if op.get_type_name() == "Constant"]
    assert not any(49408 in list(constant.get_output_shape(0)) for constant in constants)
