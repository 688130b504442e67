# SPDX-License-Identifier: Apache-2.0

"""What a model costs on top of its frozen backbone in torch, with its accuracy beside it.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.inference
    python -m tests.benchmarks.inference --batches 8 --runs 5 --device cuda
    python -m tests.benchmarks.inference --models SPG LAKE --precision bf16 --compile
    python -m tests.benchmarks.inference --threads 1  # on a machine that others use too
    python -m tests.benchmarks.inference --published --batches 1 8 32 --runs 20 --precision bf16  # needs a GPU

Times whole forward passes (image tensor to map and score) in turn in one run, and prints the median ratio, with
quartiles, to the bare backbone stopped at the same block and to all of its blocks. SPG, LAKE, and anomalib's
AnomalyDINO and PatchCore (10 % coreset) use the same DINOv2-S/14 with real weights, and learn from the quickstart's
textile; image AUROC is over its first test images. The first image, at the first batch size, is measured in a process
of its own, in single precision and not compiled: see first_image.py. So is memory on a CPU; on a GPU it is the peak of
what torch allocates for the model and a batch. Models are kept in ``--cache``.

WinCLIP (zero-shot) is compared with its own CLIP image tower. Its weights are random, which changes nothing in the
time; its accuracy is left out.

``--published`` takes the backbones of the papers' tables, with random weights, since no accuracy is asked for, and
learns from random images: SPG on DINOv3-L/16 at 448x448 up to the last block, LAKE on CLIP ViT-L/14 at 336x336 with its
text side, the peers on DINOv2-L/14 at 448x448.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import cache
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
from anomalib_lake.torch_model import DEFAULT_BACKBONE, default_layers
from anomalib_spg import GuideSettings, SPGModel
from anomalib_spg.components.backbone import Backbone, read_weights
from anomalib_spg.components.pre_processor import default_pre_processor
from anomalib_spg.quickstart import BACKBONE

from .first_image import in_fresh_process
from .first_image import load as load_file

SIZE = (448, 448)
WEIGHTS = "dinov2_vits14.safetensors"
SHOTS = (1, 4, 16)
CLIP_SIZE = (336, 336)
DINO_L = "vit_large_patch14_dinov2.lvd142m"
PEERS = {"AnomalyDINO": (4,), "PatchCore": (4, 16)}  # shots in the published setting


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


def peer(images: torch.Tensor, build: Callable[[], nn.Module], weights: Path | None = None) -> nn.Module:
    """anomalib's AnomalyDINO or PatchCore with local weights in the place of the hub's, else random ones."""
    create = timm.create_model

    def local(*names: str, **options: object) -> nn.Module:
        vit = create(*names, **{**options, "pretrained": False})
        if weights is not None:
            vit.load_state_dict(read_weights(weights), strict=False)
        return vit

    with patch("timm.create_model", local):
        model = build()
    for image in images:
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


# name: (how to make it, how its backbone, the block that stops at, the size of its images)
Builders = dict[str, tuple[Callable[[], nn.Module], Callable[[], Backbone] | None, int, tuple[int, int]]]


def of_quickstart(data: Path) -> Builders:
    """Everything on DINOv2-S/14, learned from the textile."""
    weights, good = data / WEIGHTS, data / "textile/train/good"
    vit = cache(lambda: Backbone(BACKBONE, weights=weights, image_size=SIZE, norm=False))
    peers: dict[str, Callable[[], nn.Module]] = {
        "AnomalyDINO": lambda: AnomalyDINOModel(encoder_name=BACKBONE),
        "PatchCore": lambda: PatchcoreModel(["blocks.4", "blocks.7"], BACKBONE),
    }
    return {
        "SPG": (lambda: spg(data), vit, 6, SIZE),
        "SPG-rarity": (lambda: spg_with_rarity(data), vit, 6, SIZE),
        **{f"LAKE-{n}": (lambda n=n: lake(data, n), vit, 7, SIZE) for n in SHOTS},
        **{
            f"{name}-{n}": (lambda build=build, n=n: peer(read(good, n), build, weights), vit, 11, SIZE)
            for name, build in peers.items()
            for n in SHOTS
        },
        "WinCLIP": (winclip, None, 11, (240, 240)),
    }


def of_papers(folder: Path, device: torch.device) -> Builders:
    """The published backbones with random weights, learned from random images on the device."""

    def lake_on_clip(shots: int) -> nn.Module:
        file = folder / "clip.pt"
        if not file.exists():
            torch.save(open_clip.create_model("ViT-L-14-336-quickgelu", pretrained=None).state_dict(), file)
        model = LAKEModel(weights=file).to(device).train()
        for _ in range(shots):
            model(torch.randn(1, 3, *model.backbone.image_size, device=device))
        model.fit()
        return model.cpu()

    def sparse(own_weight: float) -> nn.Module:
        model = SPGModel(pre_trained=False, image_size=SIZE, own_weight=own_weight).to(device).train()
        masks = torch.zeros(4, *SIZE, device=device)
        masks[:2, :50, :50] = 1
        model(torch.randn(4, 3, *SIZE, device=device), masks)
        model.fit(GuideSettings(num_atoms=64, k=8, sae_epochs=1, guide_epochs=1))
        return model.cpu()

    dino3 = cache(lambda: Backbone(pre_trained=False, image_size=SIZE))
    dino2 = cache(lambda: Backbone(DINO_L, pre_trained=False, image_size=SIZE))
    tower = cache(lambda: Backbone(DEFAULT_BACKBONE, pre_trained=False))
    layers = [f"blocks.{block}" for block in default_layers(24)]
    peers: dict[str, Callable[[], nn.Module]] = {
        "AnomalyDINO": lambda: AnomalyDINOModel(encoder_name=DINO_L).to(device),
        "PatchCore": lambda: PatchcoreModel(layers, DINO_L).to(device),
    }
    return {
        "SPG": (lambda: sparse(0.0), dino3, 23, SIZE),
        "SPG-rarity": (lambda: sparse(8.0), dino3, 23, SIZE),
        **{f"LAKE-{n}": (lambda n=n: lake_on_clip(n), tower, 23, CLIP_SIZE) for n in (*SHOTS, 200)},
        **{
            f"{name}-{n}": (
                lambda name=name, n=n: peer(torch.randn(n, 3, *SIZE, device=device), peers[name]).cpu(),
                dino2,
                23,
                SIZE,
            )
            for name, counts in PEERS.items()
            for n in counts
        },
        "WinCLIP": (winclip, None, 11, (240, 240)),
    }


def seconds(model: Callable, images: torch.Tensor) -> float:
    """Of a pass, the accelerator's queue included."""
    start = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def stopped_at(vit: Backbone, block: int) -> Callable:
    """The bare backbone up to a block."""

    def run(images: torch.Tensor) -> object:
        vit.layers = [block]
        return vit(images)

    return run


def peak(model: nn.Module, images: torch.Tensor) -> float:
    """MiB that torch allocates on the GPU for a model and a batch."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds(model, images)
    own = sum(tensor.nbytes for tensor in model.state_dict().values()) + images.nbytes
    return (torch.cuda.max_memory_allocated() - before + own) / 2**20


def ratio(times: list[float], bases: list[float]) -> str:
    """Median and quartiles of the ratios of runs made in turn."""
    ratios = torch.tensor(times) / torch.tensor(bases)
    low, median, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def auroc(model: nn.Module, data: Path, count: int, device: torch.device) -> str:
    """Of images of the textile."""
    kinds = [read(data / "textile/test" / kind, count) for kind in ("good", "defect")]
    scores = [model(image[None].to(device)).pred_score.item() for kind in kinds for image in kind]
    return f"{roc_auc_score([0] * len(kinds[0]) + [1] * len(kinds[1]), scores):.3f}"


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
    parser.add_argument("--no-first", dest="first", action="store_false", help="leave the first image out")
    parser.add_argument("--published", action="store_true", help="the papers' backbones, random weights")
    arguments = parser.parse_args()
    device, data = torch.device(arguments.device), arguments.data
    torch.set_num_threads(arguments.threads)
    arguments.cache.mkdir(parents=True, exist_ok=True)

    builders = of_papers(arguments.cache, device) if arguments.published else of_quickstart(data)
    wanted = tuple(arguments.models or builders)
    builders = {name: builder for name, builder in builders.items() if name.startswith(wanted)}

    def load(name: str) -> nn.Module:
        file = arguments.cache / f"{name}.pt"
        if not file.exists():
            # SPG trains; of the others no gradient is wanted
            with torch.inference_mode(mode=False), torch.set_grad_enabled(name.startswith("SPG")):
                torch.save(builders[name][0](), file)
        return load_file(file).to(device).eval()

    columns = ["model", "batch", "over its blocks", "over all blocks", "ms per image", "images/s", "AUROC"]
    columns += ["first image, s", "memory, MiB"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    half = torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16")
    with torch.inference_mode(), half:
        for name, (_, bare, block, size) in builders.items():
            model = load(name)
            if bare is None:
                trio: dict[str, Callable] = dict.fromkeys(("same", "all"), model.clip.encode_image)
            else:
                vit = bare().to(device)
                trio = {"same": stopped_at(vit, block), "all": stopped_at(vit, len(vit.vit.blocks) - 1)}
            trio["model"] = model
            random = arguments.published or name == "WinCLIP"
            accuracy = auroc(model, data, arguments.images, device) if arguments.images and not random else "-"
            if arguments.compile:
                trio = {key: torch.compile(runner, dynamic=False) for key, runner in trio.items()}
            for batch in arguments.batches:
                images = torch.randn(batch, 3, *size, device=device)
                times: dict[str, list[float]] = {key: [] for key in trio}
                for runner in (*trio.values(), *trio.values()):
                    seconds(runner, images)
                for run in range(arguments.runs):
                    for key in list(trio) if run % 2 else reversed(trio):
                        times[key].append(seconds(trio[key], images))
                cells = [name, str(batch), ratio(times["model"], times["same"]), ratio(times["model"], times["all"])]
                each = torch.tensor(times["model"]).median().item() / batch
                cells += [f"{each * 1e3:.3g}", f"{1 / each:.3g}", accuracy, "", ""]
                if arguments.first and batch == arguments.batches[0]:
                    file, shape = arguments.cache / f"{name}.pt", tuple(images.shape)
                    first = in_fresh_process(file, shape, device.type, threads=arguments.threads)
                    cells[-2:] = [f"{first['seconds']:.1f}", f"{first['mib']:.0f}"]
                if device.type == "cuda":
                    cells[-1] = f"{peak(model, images):.0f}"
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
