# SPDX-License-Identifier: Apache-2.0

"""Do the named atoms and neurons make the score, and what does naming them cost?

    anomalib train --config configs/quickstart.yaml --model.visualizer anomalib_spg.ExplanationVisualizer
    python -m tests.benchmarks.faithfulness --guides results/SPG/textile/latest/weights/guides.safetensors

The first table: atoms or neurons are removed from the model, and as many at random, and defects are scored again. A
removed atom's coefficients become zero in every guide; a removed neuron is taken from bank and image, as if it had not
been chosen; the bank's usual distance stays. Each defective textile image has its own ones removed. Shown is how much
of what its score lies above the mean of the good images is gone then: median and quartiles over the images, random
choices averaged over 5 draws.

The second one: seconds of a whole pass without explanation, of the explanation from tokens at hand, and of drawing and
writing its picture, in turn, median over the images.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from anomalib.data.utils import read_image
from torch import nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from anomalib_lake import LAKEModel
from anomalib_lake.explain import explain as explain_lake
from anomalib_spg import SPGModel
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.components.pre_processor import default_pre_processor
from anomalib_spg.explain import explain as explain_spg
from anomalib_spg.explanations.examples import Examples, to_picture
from anomalib_spg.explanations.explanation import Explanation
from anomalib_spg.explanations.figures import plot_explanation
from anomalib_spg.quickstart import BACKBONE


def remove_atoms(guides: nn.ModuleList, parts: torch.Tensor) -> None:
    """Take atoms out of guides; ``parts`` numbers the atoms of all layers."""
    start = 0
    for layer in guides:
        stop = start + len(layer.atoms)
        layer.coefficients[:, parts[(parts >= start) & (parts < stop)] - start] = 0
        layer.vectors = layer.coefficients @ layer.atoms
        start = stop


def remove_neurons(neurons: nn.ModuleList, banks: nn.ModuleList, parts: torch.Tensor) -> None:
    """Take neurons out of the choice and out of the banks; ``parts`` numbers the neurons of all layers."""
    start = 0
    for layer, of_scales in zip(neurons, banks, strict=True):
        stop = start + len(layer.indices)
        kept = torch.ones(stop - start, dtype=torch.bool)
        kept[parts[(parts >= start) & (parts < stop)] - start] = False
        layer.indices = layer.indices[kept]
        for bank in of_scales:
            bank.tokens = F.normalize(bank.tokens[:, kept], dim=1)
        start = stop


def explain(model: SPGModel | LAKEModel, tokens: Tokens, size: tuple[int, int]) -> list[Explanation]:
    """Explain images whose tokens are at hand."""
    return (explain_spg if isinstance(model, SPGModel) else explain_lake)(model, tokens, size)


@torch.no_grad()
def score_of(model: SPGModel | LAKEModel, tokens: Tokens) -> float:
    """Score of an image whose tokens are at hand; of LAKE without text."""
    if isinstance(model, SPGModel):
        size = tuple(model.backbone.patch_size * count for count in tokens.grid)
        local = [
            guides.local_probability(patches, model.temperature)
            for guides, patches in zip(model.guides, tokens.patches, strict=True)
        ]
        patch_map = torch.stack(local).mean(dim=0).unflatten(1, tokens.grid)
        return float(model.score(model.anomaly_map_generator(patch_map, size).flatten(1)))
    deviation = model.structural_deviation(dict(zip(model.layers, tokens.patches, strict=True)), tokens.grid)
    return float((deviation / (1 + deviation)).topk(model.top_patches).values.mean())


@torch.no_grad()
def score_without(model: SPGModel | LAKEModel, tokens: Tokens, parts: torch.Tensor) -> float:
    """Score of an image by the model without some of its atoms or neurons."""
    names = ["guides"] if isinstance(model, SPGModel) else ["neurons", "banks"]
    whole = [getattr(model, name) for name in names]
    reduced = copy.deepcopy(whole)
    (remove_atoms if isinstance(model, SPGModel) else remove_neurons)(*reduced, parts)
    for name, module in zip(names, reduced, strict=True):
        setattr(model, name, module)
    score = score_of(model, tokens)
    for name, module in zip(names, whole, strict=True):
        setattr(model, name, module)
    return score


@torch.no_grad()
def faithfulness(
    model: SPGModel | LAKEModel,
    good: list[torch.Tensor],
    bad: list[torch.Tensor],
    counts: list[int],
    draws: int = 5,
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Measure what removing parts takes from the scores of defects.

    Args:
        model (SPGModel | LAKEModel): Model.
        good (list[torch.Tensor]): Normalised good images ``(1, 3, H, W)``.
        bad (list[torch.Tensor]): Defective ones.
        counts (list[int]): How many parts to remove.
        draws (int): Random choices to average. Defaults to 5.

    Returns:
        dict[int, tuple[np.ndarray, np.ndarray]]: By count, for every defective image the share of its score above the
            mean good one that is gone without the top parts, and without random parts.
    """
    usual = np.mean([score_of(model, model.backbone(image)) for image in good])
    gone: dict[int, tuple[list[float], list[float]]] = {count: ([], []) for count in counts}
    generator = torch.Generator().manual_seed(0)
    for image in tqdm(bad, desc=type(model).__name__, unit="image"):
        tokens = model.backbone(image)
        explanation = explain(model, tokens, image.shape[-2:])[0]
        order = explanation.contributions.argsort(descending=True)

        def share(parts: torch.Tensor, tokens: Tokens = tokens, whole: float = explanation.score) -> float:
            return (whole - score_without(model, tokens, parts)) / (whole - usual)

        for count, (top, random) in gone.items():
            top.append(share(order[:count]))
            choices = [torch.randperm(len(order), generator=generator)[:count] for _ in range(draws)]
            random.append(float(np.mean([share(parts) for parts in choices])))
    return {count: (np.array(top), np.array(random)) for count, (top, random) in gone.items()}


@torch.no_grad()
def costs(model: SPGModel | LAKEModel, images: list[torch.Tensor], examples: Examples | None) -> list[float]:
    """Median seconds of a pass, of an explanation, and of its picture."""
    seconds: list[list[float]] = []
    backbone = model.backbone
    with tempfile.TemporaryDirectory() as folder:
        for image in images:
            times = [time.perf_counter()]
            model(image)
            times.append(time.perf_counter())
            tokens = backbone(image)
            start = time.perf_counter()
            explanation = explain(model, tokens, image.shape[-2:])[0]
            times.append(times[-1] + time.perf_counter() - start)
            start = time.perf_counter()
            picture = to_picture(image[0], backbone.mean, backbone.std)
            figure = plot_explanation(explanation, picture, examples, patch_size=backbone.patch_size)
            figure.savefig(Path(folder, "explanation.jpg"), dpi=90)
            times.append(times[-1] + time.perf_counter() - start)
            seconds.append(np.diff(times).tolist())
    return np.median(seconds, axis=0).tolist()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guides", type=Path, required=True, help="guides file of the quickstart")
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--images", type=int, default=30, help="defective images, and good ones")
    arguments = parser.parse_args()
    weights = arguments.data / "dinov2_vits14.safetensors"
    spg = SPGModel(guides_file=arguments.guides, weights=weights).eval()
    lake = LAKEModel(BACKBONE, weights=weights, image_size=(448, 448))
    lake_examples = Examples(patch_size=14)

    transform = default_pre_processor(BACKBONE, (448, 448)).transform

    def images(folder: str, count: int) -> list[torch.Tensor]:
        paths = sorted((arguments.data / "textile" / folder).iterdir())[:count]
        return [transform(read_image(path, as_tensor=True))[None] for path in paths]

    with torch.no_grad():
        for image in images("train/good", 4):
            lake.train()(image)
            lake_examples.add(image, lake.backbone.mean, lake.backbone.std)
    lake.fit()
    good, bad = images("test/good", arguments.images), images("test/defect", arguments.images)
    print("| removed | SPG, top atoms | random atoms | LAKE, top neurons | random neurons |\n|---|---|---|---|---|")
    counts = [1, 5, 10, 20, 50, 100]
    tables = [faithfulness(model, good, bad, counts) for model in (spg, lake.eval())]
    for count in counts:
        cells = []
        for values in (values for table in tables for values in table[count]):
            low, middle, high = np.percentile(values, (25, 50, 75))
            cells.append(f"{middle:.0%} ({low:.0%} to {high:.0%})")
        print(f"| {count} | {' | '.join(cells)} |")
    print("\n| | a pass | its explanation | the picture |\n|---|---|---|---|")
    beside = arguments.guides.with_name("examples.safetensors")
    spg_examples = Examples.load(beside) if beside.is_file() else None
    for model, examples in ((spg, spg_examples), (lake, lake_examples)):
        cells = [f"{value:.3f} s" for value in costs(model, bad, examples)]
        print(f"| {type(model).__name__} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
