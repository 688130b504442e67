# SPDX-License-Identifier: Apache-2.0

"""What tests of several modules share: names, commands, small datasets, engines."""

import html
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from sklearn.metrics import average_precision_score, roc_auc_score

from anomalib_spg.components.post_processor import GoodPartsPostProcessor
from tests import textures

REPOSITORY = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
TINY = "vit_tiny_patch16_224"
TINY_CLIP = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"  # 10 blocks of width 256; no OpenCLIP config has its name

# Code that finds both models in every way anomalib offers.
FIND = """
from anomalib.models import get_model, list_models
import anomalib.models
arguments = {"backbone": "vit_tiny_patch16_224", "pre_trained": False}
assert type(get_model("spg", **arguments)).__name__ == "SPG"
assert type(get_model({"class_path": "SPG", "init_args": arguments})).__name__ == "SPG"
assert type(get_model({"class_path": "anomalib_spg.SPG", "init_args": arguments})).__name__ == "SPG"
assert type(get_model("lake", **arguments)).__name__ == "LAKE"
assert type(get_model({"class_path": "LAKE", "init_args": arguments})).__name__ == "LAKE"
assert type(get_model({"class_path": "anomalib_lake.LAKE", "init_args": arguments})).__name__ == "LAKE"
assert {"SPG", "LAKE"} <= set(list_models("pascal")) and {"s_p_g", "l_a_k_e"} <= set(list_models())
assert type(anomalib.models).__name__ == "module"
"""


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


def dump(page: Path, view: str = "") -> str:
    """What a browser makes of the page."""
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with_profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [BROWSER, *options.split(), "--disable-component-update", "--disable-sync", with_profile]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"{page.as_uri()}#{view}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def shown_names(page: str) -> list[str]:
    """Names of the shown images in their order."""
    return [html.unescape(name) for name in re.findall(r'<div class="name">([^<]*)', page)]


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


def fake_distribution(folder: Path, name: str, entry_points: str, code: str) -> Path:
    """A distribution as it lies in site-packages, declaring entry points."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    return folder


def to_raw(shown: Any, post_processor: GoodPartsPostProcessor, kind: str) -> np.ndarray:
    """Raw scores ("image") or maps ("pixel") of shown ones: the inverse of the post-processor's map."""
    values = (getattr(post_processor, name) for name in (f"{kind}_min", f"{kind}_threshold"))
    typical, threshold = (np.log(float(value) / (1 - float(value))) for value in values)
    y = np.asarray(shown, dtype=float).squeeze() - 0.5
    x = np.sign(y) * 2 * np.abs(y) / (1.5 - 3 * np.abs(y))
    return 1 / (1 + np.exp(-threshold - x * (threshold - typical)))
