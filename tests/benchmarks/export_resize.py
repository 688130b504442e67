# SPDX-License-Identifier: Apache-2.0

"""What a resize without antialiasing does to images of a camera's size, and what the exported one costs.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.export_resize

Textile images of the quickstart, enlarged to 2048x1536 with noise. PatchCore (blocks 5 and 8, the same DINOv2-S/14) and
LAKE learn from four good ones with the resize that fit, test and predict use. Then others are scored with that resize,
and with the one that anomalib exports, which has no antialiasing. Printed: how far scores move, over the standard
deviation of the good ones; how many of the good and of the bad exceed the highest score of a good one with the right
resize; image AUROC.

Then the time of LAKE's exported OpenVINO file over that of the same file without antialiasing, at f32 and at the
runtime's default precision, in turn: median and quartiles.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openvino as ov
import torch
from anomalib.data import InferenceBatch
from anomalib.models import Patchcore
from anomalib.pre_processing import PreProcessor
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn

from anomalib_lake import LAKE
from anomalib_spg.components.backbone import read_weights

from .openvino import ratios

BACKBONE = "vit_small_patch14_dinov2.lvd142m"
SIZE = (2048, 1536)


def camera(paths: list[Path]) -> list[torch.Tensor]:
    """Images as a camera of that size might deliver them, ``(1, 3, H, W)``."""
    rng = np.random.default_rng(0)
    images = []
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB").resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = (pixels + rng.normal(0, 15, pixels.shape)).clip(0, 255).astype(np.uint8)
        images.append(torch.from_numpy(noisy).permute(2, 0, 1)[None] / 255)
    return images


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--images", type=int, default=24, help="good and bad ones to score")
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    textile, weights = arguments.data / "textile", arguments.data / "dinov2_vits14.safetensors"
    normal = camera(sorted((textile / "train/good").iterdir())[:4])
    new = camera([
        path for kind in ("good", "defect") for path in sorted((textile / "test" / kind).iterdir())[: arguments.images]
    ])
    bad = np.repeat([False, True], arguments.images)

    lake = LAKE(BACKBONE, weights=weights, image_size=448, visualizer=False)
    pre_processor = PreProcessor(lake.pre_processor.transform)  # anomalib's own: exports without antialiasing
    patchcore = Patchcore(BACKBONE, ["blocks.5", "blocks.8"], pre_trained=False, pre_processor=pre_processor)
    vit = next(module for module in patchcore.model.feature_extractor.modules() if hasattr(module, "blocks"))
    state = {key: value for key, value in read_weights(weights).items() if key in vit.state_dict()}
    print(vit.load_state_dict(state, strict=False))

    def score(model: nn.Module, transform: Callable) -> np.ndarray:
        with torch.inference_mode():
            batches: list[InferenceBatch] = [model(transform(image)) for image in new]
        return np.array([float(batch.pred_score) for batch in batches])

    print("| | moved, in deviations | good above | bad above | AUROC |\n|---|---|---|---|---|")
    for name, model in (("PatchCore", patchcore.model), ("LAKE", lake.model)):
        with torch.inference_mode():
            model.train()
            model(torch.cat([pre_processor.transform(image) for image in normal]))
            model.fit() if name == "LAKE" else model.subsample_embedding(1.0)
        model.eval()
        right, stripped = (score(model, each) for each in (pre_processor.transform, pre_processor.export_transform))
        threshold = right[~bad].max()
        for title, scores in (("as predict", right), ("as anomalib exports", stripped)):
            moved = np.abs(scores - right).mean() / right[~bad].std()
            above = " | ".join(f"{(scores[kind] > threshold).sum()} of {kind.sum()}" for kind in (~bad, bad))
            print(f"| {name}, {title} | {moved:.2f} | {above} | {roc_auc_score(bad, scores):.3f} |", flush=True)

    with TemporaryDirectory() as folder:
        files = {"ours": lake.to_openvino(Path(folder) / "ours")}
        lake.pre_processor.export_transform = pre_processor.export_transform
        files = {"without antialiasing": lake.to_openvino(Path(folder) / "plain"), **files}
        for precision in ({"INFERENCE_PRECISION_HINT": "f32"}, {}):
            runners = {name: ov.Core().compile_model(path, "CPU", precision) for name, path in files.items()}
            print(precision or "default precision", ratios(runners, new[0].numpy(), arguments.runs))


if __name__ == "__main__":
    main()
