# SPDX-License-Identifier: Apache-2.0

"""What a model costs on top of its frozen backbone.

    python -m tests.benchmarks.inference
    python -m tests.benchmarks.inference --batches 8 --runs 5

Times whole forward passes (image tensor to map and score) in turn in one run, and prints the median ratio, with
quartiles, to the bare DINOv2-S/14 stopped at the same block and to all of its blocks. Random weights and random bank
tokens: they do not change the time. AnomalyDINO and PatchCore are anomalib's own, on the same architecture; PatchCore
with a 10 % coreset.
"""

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import timm
import torch
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from torch import nn

from anomalib_lake import LAKEModel
from anomalib_spg import SPGModel
from anomalib_spg.backbone import Backbone
from anomalib_spg.quickstart import BACKBONE

SIZE = (448, 448)
PATCHES = 32 * 32


def spg() -> nn.Module:
    """SPG on block 6 with 500 atoms in each guide."""
    model = SPGModel(BACKBONE, layers=[6], pre_trained=False, image_size=SIZE)
    atoms = nn.functional.normalize(torch.randn(500, 384), dim=1)
    model.guides[0].set(atoms, torch.arange(500), torch.rand(4, 500))
    return model


def lake(shots: int) -> nn.Module:
    """LAKE with its defaults and a bank of so many images, cut to the default size."""
    model = LAKEModel(BACKBONE, pre_trained=False, image_size=SIZE)
    for neurons, banks in zip(model.neurons, model.banks, strict=True):
        neurons.indices = torch.arange(100)
        for patches, bank in zip((PATCHES, PATCHES // 4), banks, strict=True):
            size = min(shots * patches, bank.size)
            bank.tokens = nn.functional.normalize(torch.randn(size, 100), dim=1)
    return model


def anomaly_dino(shots: int) -> nn.Module:
    """anomalib's AnomalyDINO with so many images in its bank."""
    create = timm.create_model
    with patch("timm.create_model", lambda *names, **options: create(*names, **{**options, "pretrained": False})):
        model = AnomalyDINOModel(encoder_name=BACKBONE)
    model.memory_bank = nn.functional.normalize(torch.randn(shots * PATCHES, 384), dim=1)
    return model


def patchcore(shots: int) -> nn.Module:
    """anomalib's PatchCore on LAKE's layers with a 10 % coreset of so many images."""
    model = PatchcoreModel(["blocks.4", "blocks.7"], BACKBONE, pre_trained=False)
    model.memory_bank = torch.randn(shots * PATCHES // 10, 768)
    return model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)

    def bare(block: int) -> nn.Module:
        return Backbone(BACKBONE, layers=[block], pre_trained=False, image_size=SIZE, norm=False)

    # name: (model, block its backbone stops at)
    builders: dict[str, tuple[Callable[[], nn.Module], int]] = {
        "SPG": (spg, 6),
        **{f"LAKE, {shots} shots": (lambda n=shots: lake(n), 7) for shots in (1, 4, 16)},
        **{f"AnomalyDINO, {shots} shots": (lambda n=shots: anomaly_dino(n), 11) for shots in (4, 16)},
        **{f"PatchCore, {shots} shots": (lambda n=shots: patchcore(n), 11) for shots in (4, 16)},
    }
    models = {name: build().to(device).eval() for name, (build, _) in builders.items()}
    backbones = {block: bare(block).to(device) for block in (6, 7, 11)}

    def seconds(model: nn.Module, images: torch.Tensor) -> float:
        start = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def ratio(times: list[float], bases: list[float]) -> str:
        ratios = torch.tensor(times) / torch.tensor(bases)
        low, median, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        return f"{median:.2f} ({low:.2f} to {high:.2f})"

    print("| batch | model | over its blocks | over all blocks | ms per image |\n|---|---|---|---|---|")
    with torch.inference_mode():
        for batch in arguments.batches:
            images = torch.randn(batch, 3, *SIZE, device=device)
            for name, model in models.items():
                block = builders[name][1]
                trio = {"model": model, "same": backbones[block], "all": backbones[11]}
                times: dict[str, list[float]] = {key: [] for key in trio}
                seconds(model, images)
                for run in range(arguments.runs):
                    for key in list(trio) if run % 2 else reversed(trio):
                        times[key].append(seconds(trio[key], images))
                milliseconds = torch.tensor(times["model"]).median().item() * 1e3 / batch
                cells = f"{ratio(times['model'], times['same'])} | {ratio(times['model'], times['all'])}"
                print(f"| {batch} | {name} | {cells} | {milliseconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
