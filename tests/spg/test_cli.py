# SPDX-License-Identifier: Apache-2.0

"""The real ``anomalib`` command, in subprocesses, with the real DINOv2-S/14 weights on real images."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino as ov
import pandas as pd
import pytest
import timm
import torch
import yaml
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer
from PIL import Image
from safetensors.torch import load_file, save_file

from anomalib_spg import SPG
from tests.helpers import REPOSITORY, TINY, few_textiles, make_mvtec, metric, to_raw

pytestmark = [pytest.mark.command, pytest.mark.slow]

COUNT = 12  # images per folder
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def folder(quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with few textile images, and the quickstart's config made small."""
    folder = tmp_path_factory.mktemp("cli")
    config = few_textiles(quickstart, folder, COUNT, "quickstart.yaml")
    config["model"]["init_args"] |= {"views": 6, "num_atoms": 512, "sae_epochs": 8, "guide_epochs": 20}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path, anomalib_command: Callable[..., str]) -> str:
    """What ``anomalib train`` printed."""
    return anomalib_command("train", "--config", "config.yaml", folder=folder)


@pytest.fixture(scope="module")
def checkpoint(folder: Path, trained: str) -> Path:
    """The checkpoint it left."""
    assert trained
    return folder / "results/SPG/textile/latest/weights/lightning/model.ckpt"


@pytest.fixture(scope="module")
def defects(folder: Path) -> list[Path]:
    """Defective and good test images."""
    paths = [
        *(folder / "quickstart/textile/test/defect").iterdir(),
        *(folder / "quickstart/textile/test/good").iterdir(),
    ]
    return sorted(paths)


def test_train(folder: Path, trained: str) -> None:
    """Finds the defects, says what it does, leaves heatmaps and guides."""
    assert metric(trained, "image_AUROC") > 0.6
    assert metric(trained, "image_AveragePrecision") > 0.6
    assert "54 passes through the backbone, tokens take 0.05 GiB" in " ".join(trained.split())
    assert "dictionary, block" in trained
    assert "guides, block" in trained
    results = folder / "results/SPG/textile/latest"
    assert (results / "weights/guides.safetensors").stat().st_size < 3e6
    assert len(list((results / "images").rglob("*.jpg"))) == COUNT


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
    """Grey and colour images of any size below a folder; a heatmap for each."""
    (tmp_path / "images").mkdir()
    source = sorted((folder / "quickstart/textile/test/defect").iterdir())[0]
    shutil.copyfile(source, tmp_path / "images" / "colour.jpg")
    Image.open(source).convert("L").resize((300, 200)).save(tmp_path / "images" / "grey.png")
    anomalib_command(
        "predict",
        "--model",
        "SPG",
        "--model.backbone",
        "vit_small_patch14_dinov2.lvd142m",
        "--model.layers",
        "[6]",
        "--data",
        tmp_path / "images",
        "--ckpt_path",
        checkpoint,
        folder=tmp_path,
    )
    assert {path.name for path in tmp_path.rglob("results/**/images/**/*.*")} >= {"colour.jpg", "grey.png"}


@pytest.fixture(scope="module")
def exported(folder: Path, checkpoint: Path, anomalib_command: Callable[..., str]) -> dict[str, Path]:
    """The checkpoint exported by the command, in all three formats."""
    suffix = {"torch": "pt", "onnx": "onnx", "openvino": "xml"}
    for kind in suffix:
        anomalib_command(
            "export",
            "--model",
            "SPG",
            "--model.backbone",
            "vit_small_patch14_dinov2.lvd142m",
            "--model.layers",
            "[6]",
            "--ckpt_path",
            checkpoint,
            "--export_type",
            kind,
            "--export_root",
            folder / "exported",
            folder=folder,
        )
    return {kind: folder / "exported" / "weights" / kind / f"model.{end}" for kind, end in suffix.items()}


@pytest.fixture(scope="module")
def expected(checkpoint: Path, defects: list[Path]) -> dict[Path, tuple[float, bool, np.ndarray]]:
    """What torch computes from the checkpoint: score, decision, map."""
    model = SPG.load_from_checkpoint(checkpoint).eval()
    results = {}
    for path in defects:
        with torch.inference_mode():
            batch = model(read_image(path, as_tensor=True)[None])
        results[path] = (batch.pred_score.item(), bool(batch.pred_label), batch.anomaly_map[0, 0].numpy())
    return results


@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_exported_equals_torch(kind: str, exported: dict[str, Path], expected: dict, checkpoint: Path) -> None:
    """Raw maps and scores within 1e-4 at f32 precision, through anomalib's own inferencer, on real images."""
    post_processor = SPG.load_from_checkpoint(checkpoint).post_processor
    inferencer = OpenVINOInferencer(exported[kind], config=EXACT)
    for path, (score, label, anomaly_map) in list(expected.items())[:: 1 if kind == "openvino" else 6]:
        result = inferencer.predict(path)
        pairs = (("pixel", result.anomaly_map, anomaly_map), ("image", result.pred_score, score))
        for level, exported_values, own in pairs:
            difference = to_raw(exported_values, post_processor, level) - to_raw(own, post_processor, level)
            assert np.abs(difference).max() < 1e-4
        assert bool(result.pred_label.squeeze()) == label


def test_default_precision_changes_no_decision(exported: dict[str, Path], expected: dict) -> None:
    """At the runtime's own precision (bfloat16 where the CPU has it) images off the threshold are decided the same."""
    inferencer = OpenVINOInferencer(exported["openvino"])
    for path, (score, label, _) in expected.items():
        result = inferencer.predict(path)
        if abs(score - 0.5) > 0.05:
            assert bool(result.pred_label.squeeze()) == label, path
        assert float(result.pred_score.squeeze()) == pytest.approx(score, abs=0.1)


def test_exported_torch_model_stands_alone(exported: dict[str, Path], expected: dict) -> None:
    """The .pt file holds the weights and computes the same."""
    model = torch.load(exported["torch"], weights_only=False)["model"].eval()
    path, (score, _, anomaly_map) = next(iter(expected.items()))
    with torch.inference_mode():
        batch = model(read_image(path, as_tensor=True)[None])
    assert batch.pred_score.item() == pytest.approx(score, abs=1e-5)
    assert np.abs(batch.anomaly_map[0, 0].numpy() - anomaly_map).max() < 1e-5


def test_exported_graph_has_no_encoder(exported: dict[str, Path]) -> None:
    """Blocks behind the layer are not in the graph, nor are SAE encoder and dictionary."""
    shapes = [
        node.get_output_shape(0)
        for node in ov.Core().read_model(exported["openvino"]).get_ops()
        if node.get_type_name() == "Constant"
    ]
    assert not any(512 in shape and 384 in shape for shape in shapes)
    attention = [shape for shape in shapes if sorted(shape) == [384, 1152]]
    assert len(attention) == 7  # blocks 0 to 6


@pytest.mark.parametrize("name", ["spg_mvtecad.yaml", "spg_guides.yaml"])
def test_benchmark(name: str, folder: Path, trained: str, tmp_path: Path, anomalib_command: Callable[..., str]) -> None:
    """Our benchmark configs run over categories, with and without a guides file."""
    assert trained
    make_mvtec(tmp_path / "datasets/MVTecAD")
    config = yaml.safe_load((REPOSITORY / "configs" / "benchmark" / name).read_text())
    model = config["benchmark"]["model"]["init_args"]
    model["weights"] = str(folder / "quickstart/dinov2_vits14.safetensors")
    if "guides_file" in model:
        model["guides_file"] = str(folder / "results/SPG/textile/latest/weights/guides.safetensors")
    else:
        model |= {"views": 1, "num_atoms": 64, "k": 8, "sae_epochs": 1, "guide_epochs": 2, "image_size": 112}
    config["benchmark"]["data"]["init_args"] |= {"category": {"grid": ["brick", "grass"]}, "num_workers": 0}
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    anomalib_command("benchmark", "--config", "benchmark.yaml", folder=tmp_path)
    table = pd.read_csv(next((tmp_path / "runs").rglob("results.csv")))
    assert table["data.init_args.category"].tolist() == ["brick", "grass"]
    assert table[["image_AUROC", "image_AveragePrecision", "pixel_AUROC", "pixel_AUPRO"]].notna().all(axis=None)


SEVERAL = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]


@pytest.fixture(scope="module")
def two_processes(
    tmp_path_factory: pytest.TempPathFactory, mvtec: Path, visa: Path, anomalib_command: Callable[..., str]
) -> tuple[Path, str]:
    """A folder in which two processes of one machine have trained, started by Lightning, and what they printed."""
    folder = tmp_path_factory.mktemp("processes")
    save_file(timm.create_model(TINY, num_classes=0).state_dict(), folder / "weights.safetensors")
    model = {"backbone": TINY, "weights": str(folder / "weights.safetensors"), "layers": [3], "image_size": 64}
    model |= {"num_atoms": 64, "k": 8, "sae_epochs": 2, "guide_epochs": 3, "seed": 0}
    model |= {"visualizer": {"class_path": "anomalib_spg.ExplanationVisualizer", "init_args": {"explain": "all"}}}
    data = {"auxiliary": "MVTecAD", "auxiliary_args": {"root": str(mvtec)}, "auxiliary_categories": ["brick", "grass"]}
    data |= {"target": "Visa", "target_args": {"root": str(visa), "category": "gravel"}, "num_workers": 0}
    config = {
        "model": {"class_path": "SPG", "init_args": model},
        "data": {"class_path": "anomalib_spg.AuxiliaryTarget", "init_args": data},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["train", "--config", "config.yaml", *SEVERAL, "--trainer.devices", "2"]
    return folder, anomalib_command(*arguments, folder=folder, OMP_NUM_THREADS="1")


def test_two_processes(two_processes: tuple[Path, str], visa: Path, anomalib_command: Callable[..., str]) -> None:
    """Lightning's own strategy divides the images; the checkpoint is one that a single process reads."""
    folder, printed = two_processes
    # 16 labelled images, 8 for each process
    assert len(re.findall(r"INFO - SPG learns from labelled images: 8 passes", printed)) == 2
    # anomalib makes a versioned folder in each process; the first one's is written to
    weights = folder / "results/SPG/MVTecAD_to_Visa/gravel/v0/weights"
    assert (weights / "guides.safetensors").is_file()
    records = json.loads((weights.parent / "explanations" / "explanations.json").read_text())["images"]
    tested = {path.stem for path in (visa / "visa_pytorch" / "gravel" / "test").rglob("*.*")}
    assert sorted(Path(record["path"]).stem for record in records) == sorted(tested)
    alone = ["--trainer.accelerator", "cpu", "--ckpt_path", weights / "lightning/model.ckpt"]
    again = anomalib_command("test", "--config", "config.yaml", *alone, folder=folder)

    for name in ("image_AUROC", "pixel_AUROC"):
        assert metric(printed, name) == pytest.approx(metric(again, name), abs=1e-4)


def test_two_nodes(two_processes: tuple[Path, str], tmp_path: Path) -> None:
    """The README's line, once for each node, gives the guides that two processes of one node give."""
    folder = two_processes[0]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "trainer": {"limit_test_batches": 1}}))
    scripts = Path(sys.executable).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f"--nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {port} --node_rank"
    train = ["train", "--config", "config.yaml", *SEVERAL, "--trainer.num_nodes", "2", "--trainer.devices", "1"]
    nodes = [
        subprocess.Popen(
            [scripts / "torchrun", *line.split(), str(rank), scripts / "anomalib", *train],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        with ThreadPoolExecutor() as pool:  # neither may wait for the other's output to be read
            printed = list(pool.map(lambda node: node.communicate(timeout=600)[0], nodes))
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], printed
    assert ["Guides saved to" in text for text in printed] == [True, False]
    (one, two) = (load_file(next(path.rglob("guides.safetensors"))) for path in (folder, tmp_path))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {"class_path": "SPG"}}, "modle"),
        ({"model": {"class_path": "SPG", "init_args": {"guide": "x"}}}, "guide"),
        ({"model": {"class_path": "SPG", "init_args": {"guides_file": "gone.safetensors"}}}, "gone.safetensors"),
    ],
)
def test_mistakes_in_the_yaml_are_named(change: dict, message: str, folder: Path, tmp_path: Path) -> None:
    """A top-level typo, an unknown argument, a missing file."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["init_args"]["weights"] = str(folder / "quickstart/dinov2_vits14.safetensors")
    config |= change
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).parent / "anomalib", "train", "--config", "config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not (tmp_path / "results").exists()
