# SPDX-License-Identifier: Apache-2.0

"""What a model costs on top of its frozen backbone in torch, with its accuracy beside it.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.inference
    python -m tests.benchmarks.inference --batches 8 --runs 5 --device cuda
    python -m tests.benchmarks.inference --models SPG LAKE --precision bf16 --compile
    python -m tests.benchmarks.inference --threads 1  # on a machine that others use too

Times whole forward passes (image tensor to map and score) in turn in one run, and prints the median ratio, with
quartiles, to the bare backbone stopped at the same block and to all of its blocks. SPG, LAKE, and anomalib's
AnomalyDINO and PatchCore (10 % coreset) use the same DINOv2-S/14 with real weights, and learn from the quickstart's
textile; image AUROC is over its first test images. The first image, and memory at that batch size, are measured in a
process of their own, in single precision and not compiled: see first_image.py. Models are kept in ``--cache``.

WinCLIP (zero-shot) is compared with its own CLIP image tower. Its weights are random, which changes nothing in the
time; its accuracy is left out.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import open_clip
import timm
import torch
from anomalib.data.utils import read_image
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from anomalib.models.image.winclip.torch_model import WinClipModel
from sklearn.metrics import roc_auc_score
from torch import nn

from anomalib_lake import LAKEModel
from anomalib_spg.components.backbone import Backbone, read_weights
from anomalib_spg.components.pre_processor import default_pre_processor
from anomalib_spg.quickstart import BACKBONE

from .first_image import in_fresh_process
from .first_image import load as load_file

SIZE = (448, 448)
WEIGHTS = "dinov2_vits14.safetensors"
SHOTS = (1, 4, 16)


def read(folder: Path, count: int) -> torch.Tensor:
    """The first images of a folder, ready for the backbone."""
    transform = default_pre_processor(BACKBONE, SIZE).transform
    return torch.stack([transform(read_image(path, as_tensor=True)) for path in sorted(folder.iterdir())[:count]])


def spg(data: Path) -> nn.Module:
    """SPG of the quickstart, trained or restored by the other benchmark."""
    from .openvino import train

    return train("SPG", data, Path("openvino_models"))[0].model


def spg_with_rarity(data: Path) -> nn.Module:
    """The same guides, and patches' rarity in their own image."""
    model = spg(data)
    model.own_weight = 8.0
    return model


def lake(data: Path, shots: int) -> nn.Module:
    """LAKE with its defaults."""
    model = LAKEModel(BACKBONE, weights=data / WEIGHTS, image_size=SIZE)
    model.train()(read(data / "textile/train/good", shots))
    model.fit()
    return model


def peer(data: Path, shots: int, build: Callable[[], nn.Module]) -> nn.Module:
    """anomalib's AnomalyDINO or PatchCore with the local weights in the place of the hub's."""
    create = timm.create_model

    def local(*names: str, **options: object) -> nn.Module:
        vit = create(*names, **{**options, "pretrained": False})
        vit.load_state_dict(read_weights(data / WEIGHTS), strict=False)
        return vit

    with patch("timm.create_model", local):
        model = build()
    for image in read(data / "textile/train/good", shots):
        model.train()(image[None])
    if isinstance(model, PatchcoreModel):
        model.subsample_embedding(0.1)
    else:
        model.fit()
    return model


def winclip() -> nn.Module:
    """anomalib's WinCLIP with random weights."""
    create = open_clip.create_model_and_transforms
    with patch("open_clip.create_model_and_transforms", lambda name, **_: create(name, pretrained=None)):
        return WinClipModel(class_name="textile")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--cache", type=Path, default=Path("inference_models"))
    parser.add_argument("--models", nargs="+", help="beginnings of names; all by default")
    parser.add_argument("--images", type=int, default=30, help="test images of each kind; 0 leaves AUROC out")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="bf16: autocast, as bf16-mixed does")
    parser.add_argument("--compile", action="store_true", help="compile model and bare backbone (torch.compile)")
    arguments = parser.parse_args()
    device, data = torch.device(arguments.device), arguments.data
    torch.set_num_threads(arguments.threads)
    arguments.cache.mkdir(parents=True, exist_ok=True)

    # name: (how to make it, block its backbone stops at)
    builders: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "SPG": (lambda: spg(data), 6),
        "SPG-rarity": (lambda: spg_with_rarity(data), 6),
        **{f"LAKE-{shots}": (lambda n=shots: lake(data, n), 7) for shots in SHOTS},
        **{
            f"AnomalyDINO-{shots}": (lambda n=shots: peer(data, n, lambda: AnomalyDINOModel(encoder_name=BACKBONE)), 11)
            for shots in SHOTS
        },
        **{
            f"PatchCore-{shots}": (
                lambda n=shots: peer(data, n, lambda: PatchcoreModel(["blocks.4", "blocks.7"], BACKBONE)),
                11,
            )
            for shots in SHOTS
        },
        "WinCLIP": (winclip, 11),
    }
    wanted = tuple(arguments.models or builders)
    builders = {name: builder for name, builder in builders.items() if name.startswith(wanted)}

    def load(name: str) -> nn.Module:
        file = arguments.cache / f"{name}.pt"
        if not file.exists():
            # SPG trains; of the others no gradient is wanted
            with torch.inference_mode(mode=False), torch.set_grad_enabled(name.startswith("SPG")):
                torch.save(builders[name][0](), file)
        return load_file(file).to(device).eval()

    def seconds(model: Callable, images: torch.Tensor) -> float:
        start = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def ratio(times: list[float], bases: list[float]) -> str:
        ratios = torch.tensor(times) / torch.tensor(bases)
        low, median, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        return f"{median:.2f} ({low:.2f} to {high:.2f})"

    def auroc(model: nn.Module) -> str:
        kinds = [read(data / "textile/test" / kind, arguments.images) for kind in ("good", "defect")]
        scores = [model(image[None].to(device)).pred_score.item() for kind in kinds for image in kind]
        return f"{roc_auc_score([0] * len(kinds[0]) + [1] * len(kinds[1]), scores):.3f}"

    backbones = {
        block: Backbone(BACKBONE, layers=[block], weights=data / WEIGHTS, image_size=SIZE, norm=False).to(device)
        for block in (6, 7, 11)
    }
    columns = ["model", "batch", "over its blocks", "over all blocks", "ms per image", "AUROC"]
    columns += ["first image, s", "memory, MiB"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    half = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16")
    with torch.inference_mode(), half:
        for name, (_, block) in builders.items():
            model = load(name)
            trio: dict[str, Callable] = {"model": model, "same": backbones[block], "all": backbones[11]}
            if name == "WinCLIP":
                trio |= {"same": model.clip.encode_image, "all": model.clip.encode_image}
            size = (240, 240) if name == "WinCLIP" else SIZE
            accuracy = auroc(model) if arguments.images and name != "WinCLIP" else "-"
            if arguments.compile:
                trio = {key: torch.compile(runner) for key, runner in trio.items()}
            for batch in arguments.batches:
                images = torch.randn(batch, 3, *size, device=device)
                times: dict[str, list[float]] = {key: [] for key in trio}
                for runner in trio.values():
                    seconds(runner, images)
                for run in range(arguments.runs):
                    for key in list(trio) if run % 2 else reversed(trio):
                        times[key].append(seconds(trio[key], images))
                file, shape = arguments.cache / f"{name}.pt", tuple(images.shape)
                first = in_fresh_process(file, shape, device.type, threads=arguments.threads)
                cells = [name, str(batch), ratio(times["model"], times["same"]), ratio(times["model"], times["all"])]
                cells += [f"{torch.tensor(times['model']).median().item() * 1e3 / batch:.0f}", accuracy]
                print(f"| {' | '.join(cells)} | {first['seconds']:.1f} | {first['mib']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
