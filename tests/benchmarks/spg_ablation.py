# SPDX-License-Identifier: Apache-2.0

"""Which layer, and which synthetic anomalies, make SPG good without labels.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.spg_ablation layers
    python -m tests.benchmarks.spg_ablation contents

Learns from the 40 good textile images of the quickstart with the DINOv2-S/14 weights at 448x448 (1,024 atoms, 6 + 15
epochs, average with warm-up) and prints the image AUROC on 60 good and 60 locally defective images it never saw,
once per seed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from anomalib.data.utils import read_image
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from sklearn.metrics import roc_auc_score

from anomalib_spg import SPG
from anomalib_spg.quickstart import BACKBONE
from anomalib_spg.synthesis import CONTENTS, AnomalySynthesizer

Synthesizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Perlin:
    """anomalib's Perlin anomalies, which expect images in [0, 1]."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        self.mean, self.std = mean, std
        self.generator = PerlinAnomalyGenerator(probability=0.5)

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw on normalised images."""
        drawn, masks = self.generator(images * self.std + self.mean)
        return (drawn - self.mean) / self.std, masks[:, 0] > 0


def load(folder: Path, count: int | None, transform: Callable) -> torch.Tensor:
    """The first images of a folder, pre-processed."""
    return torch.stack([transform(read_image(path, as_tensor=True)) for path in sorted(folder.iterdir())[:count]])


def main() -> None:
    """Print the table asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["layers", "contents"])
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--views", type=int, default=4)
    arguments = parser.parse_args()

    layers = list(range(3, 12)) if arguments.table == "layers" else [6]
    model = SPG(
        backbone=BACKBONE,
        layers=layers,
        weights=arguments.data / "dinov2_vits14.safetensors",
        num_atoms=1024,
        sae_epochs=6,
        guide_epochs=15,
        ema_warmup=True,
    )
    transform, torch_model = model.pre_processor.transform, model.model
    normalize = transform.transforms[-1]
    mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (normalize.mean, normalize.std))
    train = load(arguments.data / "textile/train/good", None, transform)
    test = torch.cat([load(arguments.data / "textile/test" / kind, 60, transform) for kind in ("good", "defect")])
    with torch.inference_mode():
        tokens = [torch_model.backbone(images) for images in test.split(8)]
    labels = torch.arange(120) >= 60

    kinds: dict[str, Synthesizer] = {"all": AnomalySynthesizer()}
    if arguments.table == "contents":
        kinds["anomalib's Perlin"] = Perlin(mean, std)
        kinds |= {f"only {kind}": AnomalySynthesizer(contents=(kind,)) for kind in CONTENTS}
    print(f"| {arguments.table} | image AUROC by seed |\n|---|---|")
    results: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        for name, synthesizer in kinds.items():
            torch.manual_seed(seed)
            torch_model.train()
            for _ in range(arguments.views):
                for images in train[torch.randperm(len(train))].split(8):
                    torch_model(*synthesizer(images))
            torch_model.fit(model.settings)
            torch_model.eval()
            for index, layer in enumerate(layers):
                maps = []
                for batch in tokens:
                    patch_map = torch_model.guides[index].local_probability(batch.patches[index], 0.07)
                    maps.append(torch_model.anomaly_map_generator(patch_map.view(-1, *batch.grid), (448, 448)))
                scores = torch.cat(maps).flatten(1).amax(dim=1)
                row = f"block {layer}" if arguments.table == "layers" else name
                results.setdefault(row, []).append(roc_auc_score(labels, scores))
                if seed == arguments.seeds - 1:
                    print(f"| {row} | {', '.join(f'{value:.3f}' for value in results[row])} |", flush=True)


if __name__ == "__main__":
    main()
