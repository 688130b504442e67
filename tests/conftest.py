# SPDX-License-Identifier: Apache-2.0

"""Data and commands shared by the tests. Everything is made here or comes from installed packages; no network."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import yaml
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_spg.quickstart import prepare
from tests import textures

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the real DINOv2-S/14 weights and the textile images."""
    return prepare(tmp_path_factory.mktemp("data") / "quickstart")


def run_command(arguments: list[str | Path], folder: Path, timeout: int = 600, **environment: str) -> str:
    """Run a command in a folder and return what it printed; fail with its output if it fails."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{arguments} failed:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def anomalib_command() -> Callable[..., str]:
    """The real ``anomalib`` command of this environment."""

    def run(*arguments: str | Path, folder: Path, **keywords: str) -> str:
        return run_command([Path(sys.executable).parent / "anomalib", *arguments], folder, **keywords)

    return run


def few_textiles(quickstart: Path, folder: Path, count: int, config: str) -> dict[str, Any]:
    """Copy the first textile images of each kind to a working folder; return a quickstart's config made for them."""
    for name in ("train/good", "test/good", "test/defect"):
        target = folder / "quickstart" / "textile" / name
        target.mkdir(parents=True)
        for path in sorted((quickstart / "textile" / name).iterdir())[:count]:
            shutil.copyfile(path, target / path.name)
    (folder / "quickstart" / "dinov2_vits14.safetensors").symlink_to(quickstart / "dinov2_vits14.safetensors")
    settings = yaml.safe_load((REPOSITORY / "configs" / config).read_text())
    settings["data"]["init_args"] |= {"num_workers": 0, "val_split_ratio": 0.5}
    return settings


def metric(output: str, name: str) -> float:
    """A metric from the table that the command prints."""
    return float(re.search(rf"{name}\s*│\s*([\d.]+)", output).group(1))


def make_mvtec(root: Path, categories: tuple[str, ...] = ("brick", "grass"), count: int = 4) -> Path:
    """A small dataset in MVTec AD's layout: real textures, drawn defects, masks."""
    return textures.make_mvtec(root, categories, train=count, test=count, size=96, defects=("hole",))


def make_visa(root: Path, categories: tuple[str, ...] = ("gravel",), count: int = 4) -> Path:
    """A small dataset in VisA's layout."""
    return textures.make_visa(root, categories, train=count, test=count, size=96, defects=("hole",))


def data(mvtec: Path, **arguments: Any) -> MVTecAD:
    """One category of the small dataset."""
    defaults = {"root": mvtec, "category": "brick", "num_workers": 0, "train_batch_size": 4, "eval_batch_size": 3}
    return MVTecAD(**{**defaults, **arguments})


def engine(folder: Path, **arguments: Any) -> Engine:
    """An engine on the CPU that writes below a folder."""
    defaults = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    return Engine(default_root_dir=folder, **{**defaults, **arguments})


def raw_metrics(model: AnomalibModule, datamodule: AnomalibDataModule) -> dict[str, float]:
    """scikit-learn's metrics of what the torch model returns for the test images, one by one."""
    datamodule.setup()
    scores, maps, labels, masks = [], [], [], []
    for index in range(len(datamodule.test_data)):
        batch = datamodule.test_data.collate_fn([datamodule.test_data[index]])
        image, mask = model.pre_processor.transform(batch.image, batch.gt_mask)
        with torch.inference_mode():
            result = model.model.eval()(image)
        scores.append(result.pred_score)
        maps.append(result.anomaly_map.flatten())
        labels.append(batch.gt_label)
        masks.append(mask.flatten() > 0)
    scores, labels = torch.cat(scores), torch.cat(labels)
    return {
        "image_AUROC": roc_auc_score(labels, scores),
        "image_AveragePrecision": average_precision_score(labels, scores),
        "pixel_AUROC": roc_auc_score(torch.cat(masks), torch.cat(maps)),
    }


@pytest.fixture(scope="session")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small dataset in MVTec AD's layout with the categories ``brick`` and ``grass``."""
    return make_mvtec(tmp_path_factory.mktemp("mvtec"))


@pytest.fixture(scope="session")
def visa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small dataset in VisA's layout with the category ``gravel``."""
    return make_visa(tmp_path_factory.mktemp("visa"))
