# SPDX-License-Identifier: Apache-2.0

"""What fits an edge box: a ViT-T and a ViT-S at three resolutions, exported to OpenVINO.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.edge
    python -m tests.benchmarks.edge --backbones small --sizes 448

Trains LAKE by the quickstart's config with the backbone and resolution of each row (kept in ``--cache``, as are the
exported files), and prints a table of times and rates, raw image to map and score, batch 1, medians with quartiles:

- one thread: milliseconds in torch, and exported: FP32 at f32 precision, FP32 at the runtime's default (bfloat16 where
  the processor has it), INT8_PTQ at f32;
- all threads: images per second one after the other at the default precision, and of the same file in OpenVINO's
  throughput mode, which computes several requests side by side.

A second table has the image AUROC of the FP32 and the INT8_PTQ file, good parts rejected and bad parts accepted, over
test images that neither the threshold nor the calibration saw, where weights are real: DINOv2-S/14. The ViT-T/16 has
random weights, which changes nothing in the time.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from anomalib.data.utils import read_image
from sklearn.metrics import roc_auc_score

from .openvino import OpenVINO, Torch, export, quartiles, seconds, train

BACKBONES: dict[str, dict[str, object]] = {
    "tiny": {"backbone": "vit_tiny_patch16_224", "weights": "null", "pre_trained": False},
    "small": {},
}
NAMES = {"tiny": "ViT-T/16, random weights", "small": "DINOv2-S/14"}
SIZES = (224, 336, 448)


def throughput(path: Path, images: np.ndarray, runs: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Images per second one after the other, and with requests side by side, in turn."""
    rates = np.zeros((runs, 2))
    core, config = ov.Core(), {"INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(path, "CPU", config | {"PERFORMANCE_HINT": "LATENCY"})
    queue = ov.AsyncInferQueue(core.compile_model(path, "CPU", config | {"PERFORMANCE_HINT": "THROUGHPUT"}))
    for run in range(-1, runs):
        start = time.perf_counter()
        for image in images:
            compiled(image[None])
        middle = time.perf_counter()
        for image in images:
            queue.start_async({0: image[None]})
        queue.wait_all()
        if run >= 0:
            rates[run] = len(images) / (middle - start), len(images) / (time.perf_counter() - middle)
    return rates[:, 0], rates[:, 1]


def accuracy(runner: OpenVINO, images: np.ndarray, labels: np.ndarray) -> str:
    """Image AUROC, good parts rejected, bad parts accepted."""
    parts = [runner(image[None]) for image in images]
    scores, decisions = (np.array([np.atleast_1d(part[i])[0] for part in parts]) for i in (0, 1))
    rejected, accepted = decisions[labels == 0].mean(), 1 - decisions[labels == 1].mean()
    return f"{roc_auc_score(labels, scores):.3f} | {100 * rejected:.0f} % | {100 * accepted:.0f} %"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--cache", type=Path, default=Path("edge_models"))
    parser.add_argument("--images", type=int, default=60, help="test images of each kind; 0 leaves accuracy out")
    parser.add_argument("--runs", type=int, default=9)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)

    columns = "torch, ms | f32, ms | default, ms | INT8_PTQ, ms | images/s | images/s, throughput mode"
    print(f"| LAKE | pixels | MB, FP32 and INT8 | {columns} |\n|---|---|---|---|---|---|---|---|---|")
    rated = []
    for backbone in arguments.backbones:
        for size in arguments.sizes:
            cache = arguments.cache / f"{backbone}_{size}"
            changes = BACKBONES[backbone] | {"image_size": size}
            model, datamodule, _ = train("LAKE", arguments.data, cache, changes)
            fp32, ptq = (export(model, datamodule, name, cache / "LAKE") for name in ("fp32", "int8_ptq"))
            datamodule.setup("test")
            samples = datamodule.test_data.samples
            kinds = [samples[samples.label_index == label][: arguments.images or 8] for label in (0, 1)]
            images = np.stack([read_image(path) for kind in kinds for path in kind.image_path])
            images = images.transpose(0, 3, 1, 2).astype(np.float32)
            labels = np.repeat([0, 1], [len(kind) for kind in kinds])

            exact, compressed = OpenVINO(fp32, "f32", 1), OpenVINO(ptq, "f32", 1)
            runners = {"torch": Torch(model), "f32": exact, "default": OpenVINO(fp32, "default", 1), "PTQ": compressed}
            cells = [quartiles(1000 * x, 0) for x in seconds(runners, images[:1], arguments.runs).values()]
            cells += [quartiles(rates, 1) for rates in throughput(fp32, images[:16], arguments.runs, threads)]
            megabytes = " and ".join(f"{path.with_suffix('.bin').stat().st_size / 1e6:.0f}" for path in (fp32, ptq))
            print(f"| {NAMES[backbone]} | {size} | {megabytes} | {' | '.join(cells)} |", flush=True)
            if arguments.images and backbone == "small":
                pair = " | ".join(accuracy(runner, images, labels) for runner in (exact, compressed))
                rated.append(f"| {NAMES[backbone]} | {size} | {pair} |")
    if rated:
        columns = " | ".join(f"{name}: image AUROC | good rejected | bad accepted" for name in ("FP32", "INT8_PTQ"))
        print(f"\n| LAKE | pixels | {columns} |\n|---|---|---|---|---|---|---|---|", *rated, sep="\n")


if __name__ == "__main__":
    main()
