# SPDX-License-Identifier: Apache-2.0

"""What LAKE's choice of neurons does to anomalib's PatchCore and AnomalyDINO.

    python -m anomalib_spg.quickstart
    OMP_NUM_THREADS=1 python -m tests.benchmarks.neuron_plugin

Prints image AUROC / pixel AUROC with 4 normal images, mean over draws of these, on the sources and tokens of
lake_accuracy.py; the size of the bank; and the time from an image's tokens to its patch scores (selection, nearest
neighbours), relative to the model as it is: median of runs that take turns.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

import torch
from anomalib.models import AnomalibModule, AnomalyDINO, Patchcore
from anomalib.models.components import KCenterGreedy
from torch import nn

from anomalib_lake import SelectSensitiveNeurons
from anomalib_spg.quickstart import BACKBONE
from tests.benchmarks.lake_accuracy import DEFAULT, Source, collect, peer

SHOTS = 4
CHANNELS = 384
MODELS = {"PatchCore, full bank": 1.0, "PatchCore, 10 % coreset": 0.1, "AnomalyDINO": None}  # and the coreset's ratio
VARIANTS = {
    "": None,
    ", 100 neurons a layer": SelectSensitiveNeurons(100),
    ", 100 random channels a layer": SelectSensitiveNeurons(100, "random"),
}


class NoMap(nn.Module):
    """Stands in for the generator of anomaly maps, whose blur takes the same time whatever the bank."""

    def forward(self, scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:  # noqa: D102, PLR6301
        del size
        return scores


def create(ratio: float | None) -> AnomalibModule:
    """The model without weights: its tokens are there already."""
    if ratio is not None:
        return Patchcore(BACKBONE, [f"blocks.{block}" for block in DEFAULT], pre_trained=False, visualizer=False)
    with patch("anomalib.models.image.anomaly_dino.torch_model.TimmFeatureExtractor") as extractor:
        extractor.return_value = nn.Module()
        extractor.return_value.patch_size = 14
        extractor.return_value.out_dims = [CHANNELS]
        return AnomalyDINO(encoder_name="vit_small_patch14_dinov2", visualizer=False)


def fit_and_rate(
    source: Source, ratio: float | None, callback: SelectSensitiveNeurons | None, draw: int
) -> tuple[nn.Module, tuple[float, float]]:
    """The fitted torch model, and its image and pixel AUROC."""
    model = create(ratio)
    if callback:
        callback.attach(model)
    torch.manual_seed(draw)
    drawn = source.draw(SHOTS, draw)
    if ratio is None:
        rates = peer(source, model.model, "feature_encoder", drawn, (11,), None)
    elif ratio < 1:
        rates = peer(source, model.model, "feature_extractor", drawn, DEFAULT, ratio)
    else:  # all tokens are in the coreset; their greedy order takes long and changes nothing
        with patch.object(KCenterGreedy, "sample_coreset", lambda sampler: sampler.embedding):
            rates = peer(source, model.model, "feature_extractor", drawn, DEFAULT, ratio)
    return model.model, rates


def times(models: list[nn.Module], runs: int) -> list[float]:
    """Median seconds of each model for one image whose tokens are there."""
    number = torch.zeros(1, 1, 448, 448)
    seconds: list[list[float]] = [[] for _ in models]
    for model in models:
        model.anomaly_map_generator = NoMap()
    with torch.inference_mode():
        for _ in range(runs):
            for model, taken in zip(models, seconds, strict=True):
                start = perf_counter()
                model(number)
                taken.append(perf_counter() - start)
    return [median(taken) for taken in seconds]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--cache", type=Path, default=Path("lake_tokens"))
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--runs", type=int, default=51)
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    sources = collect(arguments.data, arguments.cache)

    print(f"| | {' | '.join(sources)} | bank, MB | time |\n|---{'|---' * (len(sources) + 2)}|")
    for title, ratio in MODELS.items():
        cells, fitted = {}, []
        for variant, callback in VARIANTS.items():
            means = []
            for source in sources.values():
                rates = []
                for draw in range(arguments.draws):
                    model, found = fit_and_rate(source, ratio, callback, draw)
                    rates.append(found)
                image, pixel = torch.tensor(rates).mean(dim=0).tolist()
                means.append(f"{image:.3f}" if pixel != pixel else f"{image:.3f} / {pixel:.3f}")  # noqa: PLR0124
            fitted.append(model)
            cells[variant] = means
        seconds = times(fitted, arguments.runs)
        for (variant, means), model, taken in zip(cells.items(), fitted, seconds, strict=True):
            size = f"{model.memory_bank.nbytes / 1e6:.2f}"
            relative = f"{taken / seconds[0]:.2f} ({1000 * taken:.0f} ms)"
            print(f"| {' | '.join([title + variant, *means, size, relative])} |", flush=True)


if __name__ == "__main__":
    main()
