# SPDX-License-Identifier: Apache-2.0

"""What LAKE and SPG cost once exported to OpenVINO, with the accuracy of the very same files beside it.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.openvino

Trains both on the quickstart's textile (its own configs; kept in ``--cache``, as are the exported files), exports with
anomalib's engine in every compression, and prints for each file, at f32 and at the runtime's default precision
(bfloat16 where the processor has it):

- the size of the file;
- the time of a whole forward pass, raw image to map and score, over that of torch eager: median and quartiles of the
  ratios of runs made in turn;
- image AUROC over test images that neither the threshold nor the calibration of INT8_PTQ saw, its difference to torch,
  the largest difference of a score (post-processed, so in [0, 1]) and how many decisions differ;
- seconds from the file to the first result and the rise of peak memory, in a process of its own.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from sklearn.metrics import roc_auc_score

from .first_image import in_fresh_process

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIG = {"LAKE": CONFIGS / "lake_quickstart.yaml", "SPG": CONFIGS / "quickstart.yaml"}
COMPRESSIONS = ("fp32", "fp16", "int8", "int8_ptq", "int8_acq")


class Torch:
    """A checkpoint as it comes."""

    def __init__(self, model: AnomalibModule) -> None:
        self.model = model.eval()

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and decisions."""
        with torch.inference_mode():
            batch = self.model(torch.from_numpy(images))
        return batch.pred_score.numpy(), batch.pred_label.numpy()


class OpenVINO:
    """An exported file."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        config: dict[str, object] = {"INFERENCE_NUM_THREADS": threads}
        if precision != "default":
            config["INFERENCE_PRECISION_HINT"] = precision
        self.compiled = ov.Core().compile_model(path, "CPU", config)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and decisions."""
        result = self.compiled(images)
        return result["pred_score"].squeeze(), result["pred_label"].squeeze()


def train(
    name: str, data: Path, cache: Path, arguments: dict[str, object] | None = None
) -> tuple[AnomalibModule, AnomalibDataModule, Path]:
    """The model of the quickstart's config, trained or restored, with its datamodule and checkpoint.

    ``arguments`` replace those of the config's model.
    """
    overrides = {
        "model.init_args.weights": data / "dinov2_vits14.safetensors",
        "data.init_args.root": data / "textile",
        "data.init_args.num_workers": 0,
        "default_root_dir": cache,
    } | {f"model.init_args.{key}": value for key, value in (arguments or {}).items()}
    engine, model, datamodule = Engine.from_config(CONFIG[name], **overrides)
    checkpoint = cache / name / "model.ckpt"
    if not checkpoint.exists():
        engine.fit(model, datamodule=datamodule)
        engine.trainer.save_checkpoint(checkpoint)
    return type(model).load_from_checkpoint(checkpoint), datamodule, checkpoint


def export(model: AnomalibModule, datamodule: AnomalibDataModule, compression: str, folder: Path) -> Path:
    """The exported file, made unless it is there."""
    path = folder / compression / "weights" / "openvino" / "model.xml"
    if not path.exists():
        Engine(default_root_dir=folder).export(
            model,
            ExportType.OPENVINO,
            export_root=folder / compression,
            compression_type=None if compression == "fp32" else CompressionType(compression),
            datamodule=datamodule,
        )
    return path


def seconds(runners: dict[str, object], images: np.ndarray, runs: int) -> dict[str, np.ndarray]:
    """Times of runs made in turn, by name."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        runner(images)
    for run in range(runs):
        for name in list(runners) if run % 2 else reversed(runners):
            start = time.perf_counter()
            runners[name](images)
            times[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in times.items()}


def quartiles(values: np.ndarray, digits: int = 2) -> str:
    """Median and quartiles in words."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(runners: dict[str, object], images: np.ndarray, runs: int) -> dict[str, str]:
    """Median and quartiles of the time over that of the first runner, by name."""
    times = seconds(runners, images, runs)
    base = next(iter(times.values()))
    return {name: quartiles(values / base) for name, values in times.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIG), default=list(CONFIG))
    parser.add_argument("--compressions", nargs="+", choices=COMPRESSIONS, default=list(COMPRESSIONS[:4]))
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--cache", type=Path, default=Path("openvino_models"))
    parser.add_argument("--images", type=int, default=60, help="test images of each kind; 0 leaves accuracy out")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    for name in arguments.models:
        model, datamodule, checkpoint = train(name, arguments.data, arguments.cache)
        files = {"torch": checkpoint}
        runners = {"torch": Torch(model)}
        for compression in arguments.compressions:
            path = export(model, datamodule, compression, arguments.cache / name)
            for precision in ("f32", "default"):
                variant = f"OpenVINO {compression}, {precision}"
                files[variant] = path
                runners[variant] = OpenVINO(path, precision, arguments.threads)
        model.eval()  # exporting and fitting may have left it otherwise

        datamodule.setup("test")
        samples = datamodule.test_data.samples
        kinds = [samples[samples.label_index == label][: arguments.images] for label in (0, 1)]
        paths = [*kinds[0].image_path, *kinds[1].image_path]
        labels = np.repeat([0, 1], [len(kind) for kind in kinds])
        images = np.stack([read_image(path) for path in paths or samples.image_path[: max(arguments.batches)]])
        images = images.transpose(0, 3, 1, 2).astype(np.float32)

        timed = [ratios(runners, images[:batch], arguments.runs) for batch in arguments.batches]
        expected: tuple[np.ndarray, np.ndarray] | None = None
        columns = [f"batch {batch}" for batch in arguments.batches]
        columns = ["MB", *columns, "AUROC", "to torch", "largest score", "decisions", "first image, s", "memory, MiB"]
        print(f"| {name} | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
        for variant, runner in runners.items():
            file = files[variant]
            size = sum(path.stat().st_size for path in {file, file.with_suffix(".bin")} if path.exists()) / 1e6
            cells = [f"{size:.1f}", *(times[variant] for times in timed)]
            if paths:
                parts = [runner(images[start : start + 8]) for start in range(0, len(images), 8)]
                scores, decisions = (np.concatenate([np.atleast_1d(part[i]) for part in parts]) for i in (0, 1))
                expected = expected or (scores, decisions)
                auroc, own = roc_auc_score(labels, scores), roc_auc_score(labels, expected[0])
                difference = np.abs(scores - expected[0]).max()
                changed = f"{(decisions != expected[1]).sum()} of {len(labels)}"
                cells += [f"{auroc:.4f}", f"{auroc - own:+.4f}", f"{difference:.1e}", changed]
            else:
                cells += [""] * 4
            precision = ["f32"] if variant.endswith(" f32") else []
            first = in_fresh_process(file, images[:1].shape, "cpu", *precision, threads=arguments.threads)
            cells += [f"{first['seconds']:.2f}", f"{first['mib']:.0f}"]
            print(f"| {variant} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
